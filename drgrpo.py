"""Dr. GRPO: R1-Zero-like reinforcement learning of a language model, in one script.

The model gets P problems and writes G responses to each. A reward says how good each of the P*G
responses is. The trainer learns from them in a few updates (optimizer steps), each from N of them.
All of this is one step. For the responses i = 1..N of an update, GRPO minimises

    1/N * sum_i 1/|o_i| * sum_t max(-A_i * ratio_it, -A_i * clip(ratio_it, 1-eps, 1+eps))  + KL term

    A_i      = (r_i - mean) / std     mean and std of the rewards of i's group: all G responses to
                                      the same problem
    ratio_it = exp(logprob_it - old_logprob_it)     old: before the step's first update
    |o_i|    = tokens of response i

Dr. GRPO (arXiv 2503.20783) is GRPO without the two divisions that bias it, and without the KL term:

  1. A_i = r_i - mean. Dividing by the std gives problems that are nearly always or nearly never
     solved more weight than they have without this division.
  2. 1/L_max in place of 1/|o_i|. L_max is the longest response allowed: a constant. With 1/|o_i|
     a long wrong response is punished less per token than a short one, and wrong responses grow.
     (The paper's formula leaves the constant 1/L_max out. Its code has it.)

This file adds one factor that the paper does not have. vLLM samples and the trainer learns, and
the two compute slightly different probabilities with the same weights. So each token's term is
multiplied by w_it = min(p_old / p_sampler, tis_cap), a truncated importance weight (TIS), which is
a constant for the gradient. `--tis-cap None` gives the loss of the paper's code. With
`--divide-by-std --divide-by-length` as well, it gives GRPO without its KL term.

Left out: a critic, a KL term, an entropy bonus, a learning rate schedule, LoRA.

The expected gradient of a step's first update is minus that of the expected reward, times
(G-1) / (G * L_max): test_drgrpo.py lists every group of a tiny policy to see it. It holds as long
as the sampler's probabilities are the trainer's and the gradient's norm is not clipped. For this,

  - N * L_max is fixed before micro-batches are formed, and counts the responses of all ranks;
  - EOS is an action like any other;
  - the loss uses the token ids that were sampled, at the temperature of sampling;
  - every update measures how far the log-probs of sampler and trainer are apart (the gap), and a
    run stops if it is above max_gap.

The later updates of a step are off-policy. The clip limits the bias of that; it does not remove it.

    python drgrpo.py toy                               # minutes on two CPU cores
    torchrun --nproc-per-node 8 drgrpo.py math-7b      # the paper's 7B run on one 8-GPU node

Shapes: P problems a step, G responses to each, N responses an update, B rows of T tokens in a
micro-batch, and T-1 log-probs in a row, because the first token has none.
Not a framework: copy this file, templates.py and support/, and change them.
"""

import gc
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from support.data import Problem, check_endings, derive_seed, endings, step_problems
from support.grader import Grader, refuse_broken_reward
from support.logprobs import token_logprobs
from support.records import on_screen, say, show_examples, status, summarize
from support.run import (
    Run,
    all_reduce,
    end_ranks,
    engine_settings,
    from_all_ranks,
    give_threads_back,
    is_finished,
    mesh,
    prepare,
    start_ranks,
    stop_signals,
    timed,
)
from templates import TEMPLATES

CUDA = torch.cuda.is_available()  # else everything runs on the CPU
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32  # of computing; master weights are always fp32
MAX_GAP = {torch.bfloat16: 0.1, torch.float32: 1e-3}  # nats; rounding to this dtype stays below

# ---------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Config:
    """Settings of a run. The defaults are the paper's, except tis_cap: it had none.

    A step samples prompts_per_step * samples_per_prompt responses: 128 * 8 = 1024. It then makes
    one pass over them in 1024 / responses_per_update = 8 updates of 128.
    """

    name: str  # the run's folder is runs/NAME
    model: str  # folder or hub name of the base model
    dataset: str  # .jsonl, .json, .parquet or .arrow file, save_to_disk folder, or hub dataset
    subset: str | None = None  # the hub dataset's configuration, where it has several
    split: str = "train"  # the dataset's split
    problem_column: str = "problem"  # the column with the problem's text
    answer_column: str = "answer"  # the column with the right answer, or a list of right ones
    # the answer is the text after the last of these markers: "####" in GSM8K
    answer_marker: str | None = None
    levels: tuple[int, ...] = ()  # keep only rows whose column `level` is one of these; () is all
    template: str = "qwen_math"  # how a problem becomes a prompt, and where the answer stands
    reward: str = "math"  # or FILE.py:FUNCTION, called as FUNCTION(response, row) -> float
    truncated_reward: float = 0.0  # of a response that did not end within max_response_tokens
    eval_dataset: str | None = None  # scored before and after training and every eval_every steps
    eval_split: str = "test"  # its columns are named as those of `dataset`
    eval_every: int = 16  # steps from one evaluation and saved model to the next
    save_every: int | None = None  # steps between states to resume from; None: as eval_every
    seed: int = 0  # of the order of the problems and of every draw

    steps: int = 300  # how many times to sample and learn
    prompts_per_step: int = 128  # P, problems of a step over all ranks
    samples_per_prompt: int = 8  # G, responses to each of them
    responses_per_update: int = 128  # N, of one optimizer step; P*G must be a multiple of it
    max_prompt_tokens: int = 1024  # problems with longer prompts are dropped and counted
    max_response_tokens: int = 3000  # L_max: a response that has not ended then is truncated
    temperature: float = 1.0  # of sampling, and of the log-probs that are trained

    lr: float = 1e-6  # of AdamW: constant, no warm-up, no weight decay
    clip_eps: float = 0.2  # the ratio is clipped to 1 - clip_eps .. 1 + clip_eps
    max_grad_norm: float = 1.0  # the gradient's global norm is clipped to this
    tis_cap: float | None = 2.0  # cap of trainer/sampler importance weights; None: no weights
    divide_by_std: bool = False  # True is GRPO's first bias
    divide_by_length: bool = False  # True is GRPO's second bias
    # stop if the log-probs of trainer and sampler differ by more, in nats per token;
    # None: 0.1 in bf16, 0.001 in fp32
    max_gap: float | None = None

    tokens_per_microbatch: int = 16384  # prompts and responses: memory, not the gradient
    activation_checkpointing: bool = True  # recompute activations: memory, not the gradient
    offload: bool = False  # keep master weights, gradients and optimizer in the CPU's memory
    grader_workers: int = 2  # processes per rank that grade
    grader_timeout: float = 5.0  # seconds per grading; after that there is no reward
    track: Literal["no", "tensorboard", "wandb"] = "no"  # log to a tracker too

    def __post_init__(self):
        """Refuse what would fail late or in silence. Raises ValueError that says what to do."""
        positive = ("prompts_per_step", "responses_per_update", "max_response_tokens", "eval_every")
        positive += ("temperature", "clip_eps", "max_grad_norm", "tokens_per_microbatch")
        positive += ("save_every", "tis_cap", "max_gap")  # these may be None
        wrong = []
        for key in positive:
            value = getattr(self, key)
            if value is not None and not value > 0:
                wrong.append(f"{key} must be above 0")
        if self.seed < 0:
            wrong.append("seed must be 0 or more")
        if not math.isfinite(self.truncated_reward):
            wrong.append("truncated_reward must be a finite number")
        if self.samples_per_prompt < 2:
            wrong.append("samples_per_prompt must be 2 or more: a group of 1 has no advantage")
        responses = self.prompts_per_step * self.samples_per_prompt
        if self.responses_per_update > 0 and responses % self.responses_per_update != 0:
            wrong.append(
                f"responses_per_update {self.responses_per_update} must divide prompts_per_step * "
                f"samples_per_prompt = {responses}"
            )
        if self.template not in TEMPLATES:
            wrong.append(f"template {self.template!r} must be one of {', '.join(TEMPLATES)}")
        if wrong:
            raise ValueError("; ".join(wrong))

    @property
    def folder(self) -> Path:
        return Path("runs", self.name)


# ----------------------------------------------------------------------------- the algorithm


def group_advantages(rewards: torch.Tensor, divide_by_std: bool = False) -> torch.Tensor:
    """How much better each response is than its group: (P, G) rewards -> (P, G) advantages.

    A = r - mean(r) (arXiv 2503.20783, section 3.2). A group of equal rewards gets exact zeros.
    A reward of nan is unknown: its response is left out of the mean and gets 0.
    `divide_by_std` gives GRPO's advantage, with the std over G-1 as in the paper's code. Raises
    ValueError if rewards are not (P, G).
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be (P, G), one row a prompt; got {tuple(rewards.shape)}")
    if not rewards.is_floating_point():
        rewards = rewards.float()
    known = ~rewards.isnan()
    advantages = rewards - rewards.nanmean(dim=1, keepdim=True)
    if divide_by_std:  # Dr. GRPO (1/2) leaves this division out; GRPO has it
        count = known.sum(dim=1, keepdim=True)
        variance = advantages.nan_to_num().square().sum(dim=1, keepdim=True) / (count - 1)
        advantages = advantages / (variance.sqrt() + 1e-8)
    highest = rewards.masked_fill(~known, -math.inf).amax(dim=1, keepdim=True)
    lowest = rewards.masked_fill(~known, math.inf).amin(dim=1, keepdim=True)
    has_signal = known & (highest > lowest)  # else the mean's rounding error would be a signal
    return torch.where(has_signal, advantages, 0.0)


def drgrpo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    denominator: float,
    clip_eps: float = 0.2,
    divide_by_length: bool = False,
    importance_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped surrogate, summed over tokens and divided by one constant.

    logprobs, old_logprobs, response_mask, importance_weights: (B, T-1); advantages: (B,).
    `denominator` is N * L_max of the whole update (N for `divide_by_length`), never a number taken
    from this micro-batch: the losses of micro-batches then add up to the loss of the update.
    `importance_weights` are constants for the gradient. Returns the scalar loss, and sums over
    this batch's response tokens that are only reported: tokens, clipped, kl (k3 estimate of
    KL(old || new), http://joschu.net/blog/kl-approx.html). Raises ValueError if a shape is another
    or the denominator is not above 0.
    """
    if not logprobs.shape == old_logprobs.shape == response_mask.shape:
        raise ValueError("logprobs, old_logprobs and response_mask must have one shape")
    if advantages.shape != logprobs.shape[:1] or not denominator > 0:
        raise ValueError("advantages must be (B,), and denominator above 0")
    mask = response_mask.bool()
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)  # padding may hold anything
    ratio = log_ratio.exp()  # (B, T-1)
    advantage = advantages[:, None]  # (B, 1)
    unclipped = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - clip_eps, 1 + clip_eps)
    token_loss = torch.maximum(unclipped, clipped)  # (B, T-1)
    if importance_weights is not None:
        token_loss = token_loss * importance_weights.detach()
    response_loss = torch.where(mask, token_loss, 0.0).sum(dim=1)  # (B,)
    if divide_by_length:  # Dr. GRPO (2/2) leaves this division out; GRPO has it
        response_loss = response_loss / mask.sum(dim=1).clamp(min=1)
    loss = response_loss.sum() / denominator
    # From log-probs, not from `ratio`: a fork with another ratio reports the same kl
    kl = torch.where(mask, log_ratio.exp() - 1 - log_ratio, 0.0)
    return loss, {
        "tokens": mask.sum(),
        "clipped": (mask & (clipped > unclipped)).sum(),
        "kl": kl.sum().detach(),
    }


# ---------------------------------------------------------------------------------- the loop


def train_step(
    config: Config,
    step: int,
    problems: list[Problem],
    policy: "Policy",
    optimizer: torch.optim.Optimizer,
    sampler: "Sampler",
    grader: Grader,
) -> tuple[dict[str, float | None], list["Rollout"]]:
    """Sample, reward, learn. Returns metrics and the responses of all ranks, P*G of them.

    These are in the order of `chosen`: G to the first problem, G to the second, and so on.
    """
    seconds: dict[str, float] = {}
    chosen = step_problems(len(problems), step, config.prompts_per_step, config.seed)
    # A seed is made from the step and the place in `chosen`, and not from the rank, so that any
    # number of ranks draws the same
    seeds = [derive_seed("sample", config.seed, step, place) for place in range(len(chosen))]
    with timed(seconds, "sample"):
        rollouts = sample(sampler, grader, problems, chosen, seeds, config)  # this rank's share
    with timed(seconds, "sleep"):
        sampler.sleep()  # the policy gets the GPU's memory
    with timed(seconds, "score"):
        rollouts = give_rewards(grader, problems, rollouts, config)  # now of all ranks
    rewards = torch.tensor([r.reward for r in rollouts]).view(-1, config.samples_per_prompt)
    advantages = group_advantages(rewards, config.divide_by_std)  # (P, G)
    for rollout, advantage in zip(rollouts, advantages.flatten().tolist(), strict=True):
        rollout.advantage = advantage
    with timed(seconds, "update"):
        updates = split_updates(rollouts, config, step, dist.get_rank(), dist.get_world_size())
        with timed(seconds, "old_logprobs"):  # the first update computes its own: see there
            add_old_logprobs(policy, updates[1:], config)
        sums = []
        for number, batches in enumerate(updates, start=1):
            status(f"update {number} of {len(updates)}")
            sums.append(update(policy, optimizer, batches, config))
    with timed(seconds, "sync"):
        sampler.wake(policy)  # the sampler gets the memory back, and the new weights
    metrics = summarize(rollouts, config.samples_per_prompt) | learning_metrics(sums)
    return metrics | seconds, rollouts


def train(
    config: Config,
    tokenizer,
    problems: list[Problem],
    held_out: list[Problem],
    facts: dict,
) -> bool:
    """A whole run, or the rest of one that was stopped, from what `prepare` returned.

    `facts` go into config.json. Returns whether all steps are made; False if a signal asked the run
    to stop before. What stops a run by itself is an error: docs/metrics.md lists them.
    """
    with (
        stop_signals() as asked_to_stop,
        start(config) as (policy, optimizer, sampler, grader),
        Run(config, tokenizer, problems, facts, policy, optimizer) as run,
    ):
        if run.first_step > 0:  # the engine still has the base model's weights
            sampler.sleep()
            sampler.wake(policy)
        for step in range(run.first_step, config.steps + 1):  # the last one only evaluates
            metrics: dict[str, float | None] = {}
            rollouts: list[Rollout] = []
            if step % config.eval_every == 0 or step == config.steps:
                metrics |= evaluate(sampler, grader, held_out, config)
                run.export(step, full_weights(policy.model, policy.saved_dtype))
            if step < config.steps:
                learned, rollouts = train_step(
                    config, step, problems, policy, optimizer, sampler, grader
                )
                metrics |= learned
            run.record(step, metrics, rollouts)
            stop = asked_to_stop()
            run.save_state(step + 1, at_once=stop)  # none after the last evaluation
            if stop:
                break
    return run.finished


@contextmanager
def start(config: Config) -> Iterator[tuple["Policy", torch.optim.Optimizer, "Sampler", Grader]]:
    """Join the ranks; gives policy, optimizer, sampler and grader of this rank, and ends them."""
    with ExitStack() as stack:
        start_ranks()
        stack.callback(end_ranks)
        say(f"loading {config.model}")
        policy = make_policy(config)
        optimizer = torch.optim.AdamW(
            policy.parameters(), config.lr, (0.9, 0.95), weight_decay=0.0, fused=True
        )
        grader = Grader(
            config.template, config.grader_workers, config.grader_timeout, config.reward
        )
        stack.callback(grader.close)
        say("starting vLLM: seconds on a CPU, a minute or more on a GPU")
        weights = policy.parameters()
        shards = sum(weight.to_local().nbytes for weight in weights if isinstance(weight, DTensor))
        # Adam's two moments stay on the GPU while vLLM samples, and are made by the first update
        reserve = 0 if config.offload else 2 * shards
        prompts = math.ceil(config.prompts_per_step / dist.get_world_size())  # of this rank
        sampler = Sampler(
            config.model,
            config.max_prompt_tokens + config.max_response_tokens,
            config.seed,
            reserve=reserve,
            sequences=prompts * config.samples_per_prompt,
            can_sleep=True,
        )
        stack.callback(sampler.close)
        if config.offload:  # AdamW runs on the CPU
            give_threads_back()
        yield policy, optimizer, sampler, grader


# ---------------------------------------------------------------------------------- sampling


@dataclass
class Rollout:
    """One response, and all that learning needs to know of it."""

    problem: int  # index into the problems that `sample` or `generate` was given
    prompt_ids: list[int]
    response_ids: list[int]  # as sampled, with EOS or the stop string if it ended by one
    sampler_logprobs: list[float]  # of the response's tokens, at the sampling temperature
    text: str = ""
    finish_reason: str = ""  # "stop", or "length" for a truncated response
    reward: float = 0.0  # after the rule for truncated responses; nan: the grading failed
    correct: bool | None = None  # the grader's verdict on the text; None: no verdict
    failure: str | None = None  # why the grading failed, if it did
    advantage: float = 0.0

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


class Sampler:
    """vLLM in this process, one engine per rank, on the GPU that the policy trains on.

    A sampler of your own has these four methods: generate, sleep, wake, close.

    `context` is the longest prompt plus response, in tokens. `sequences`: responses sampled at
    once. The engine takes the memory that is free now, but for `reserve` bytes and a margin. Only
    a Sampler made with `can_sleep` can give it back. Raises ValueError if there is too little.
    """

    def __init__(
        self,
        model: str,
        context: int,
        seed: int = 0,
        reserve: int = 0,
        sequences: int = 1024,
        can_sleep: bool = False,
    ):
        from vllm import LLM

        self.model = model
        self.llm = LLM(
            model,
            dtype=DTYPE,
            # Logits in fp32, not rounded to bf16: so does the trainer (support/logprobs.py)
            hf_overrides={"head_dtype": "float32"},
            max_model_len=context,
            seed=seed,
            distributed_executor_backend="external_launcher",  # a rank is a torchrun process
            logprobs_mode="processed_logprobs",  # of the distribution at this temperature
            load_format="safetensors",  # no pickle
            use_tqdm_on_load=False,
            **engine_settings(model, context, sequences, reserve, can_sleep),
        )

    def generate(
        self,
        problems: list[Problem],
        seeds: list[int],
        n: int,
        max_tokens: int,
        temperature: float,
        stop: tuple[str, ...],
    ) -> list[list[Rollout]]:
        """n responses to each problem, token ids in and token ids out.

        vLLM draws the n responses to a problem with its seed, seed + 1 and so on. A draw depends on
        its seed and not on its neighbours: to the bit on a CPU, up to rounding in bf16 on a GPU. A
        rollout's `problem` is the problem's place in the list. A response ends with EOS or a stop
        string, which stays in its ids; the stop string stays in its text, too.
        """
        from vllm import SamplingParams, TokensPrompt

        tokenizer = self.llm.get_tokenizer()
        self.llm.reset_prefix_cache()  # a full cache would make other sums than an empty one
        ends = endings(self.model, stop)
        params = [
            SamplingParams(
                n=n,
                seed=seed,
                temperature=temperature,
                max_tokens=max_tokens,
                logprobs=0,
                flat_logprobs=True,
                stop=list(stop),
                stop_token_ids=list(ends),
                include_stop_str_in_output=True,
                detokenize=bool(stop),  # only to find stop strings: vLLM decodes token by token
            )
            for seed in seeds
        ]
        prompts = [TokensPrompt(prompt_token_ids=problem.prompt_ids) for problem in problems]
        bar = partial(tqdm, leave=False) if on_screen() else False
        groups = []
        for place, output in enumerate(self.llm.generate(prompts, params, use_tqdm=bar)):
            group = []
            for response in output.outputs:
                ids, logprobs = list(response.token_ids), list(response.logprobs.logprobs)
                # without stop strings vLLM decodes nothing
                text = response.text or tokenizer.decode(ids, skip_special_tokens=True)
                text += ends.get(ids[-1], "")  # a stop string that is one special token
                reason = response.finish_reason
                group.append(
                    Rollout(place, problems[place].prompt_ids, ids, logprobs, text, reason)
                )
            groups.append(group)
        return groups

    def sleep(self) -> None:
        """Hand the GPU's memory to the policy; the engine has no weights until `wake`."""
        if CUDA:
            self.llm.sleep(level=2)
            torch.cuda.empty_cache()

    def wake(self, policy: "Policy") -> None:
        """Take the memory back and load the policy's weights.

        Waking and loading are one method: on a GPU nobody can sample between them. The prefix
        cache is emptied: it holds keys and values of the old weights. Raises RuntimeError if vLLM
        did not take all weights.
        """
        if CUDA:
            gc.collect()
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        weights = full_weights(policy.model, DTYPE)
        self.llm.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": weights, "is_checkpoint_format": True}
        )
        left_over = [name for name, _ in weights]
        if left_over:
            raise RuntimeError(f"vLLM did not take all weights. Left over: {', '.join(left_over)}")
        if CUDA:
            torch.cuda.empty_cache()  # what gathering left behind, before the cache is allocated
            self.llm.wake_up(tags=["kv_cache"])
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: a request is still running")

    def close(self) -> None:
        """End the engine. vLLM ends the process group, too."""
        self.llm.llm_engine.engine_core.shutdown()


def full_weights(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Each weight by its checkpoint's name, gathered from all ranks, one at a time.

    From state_dict: named_parameters would leave out a head that is tied to the embedding.
    """
    for name, weight in model.state_dict().items():
        # Offloaded shards are on the CPU. Casting before gathering halves the traffic.
        weight = weight.detach().to(DEVICE, dtype)
        yield name, whole(weight)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the shards of all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sample(
    sampler: Sampler,
    grader: Grader,
    problems: list[Problem],
    chosen: list[int],
    seeds: list[int],
    config: Config,
    greedy: bool = False,
) -> list[Rollout]:
    """This rank's share of G responses to each chosen problem, in the order of `chosen`.

    `chosen` are indices into `problems`, `seeds` one for each of them. `greedy`: one response each,
    at temperature 0. Raises RuntimeError if a response stopped without EOS or a stop string.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    share = slice(len(chosen) * rank // world, len(chosen) * (rank + 1) // world)
    mine = [problems[index] for index in chosen[share]]
    n, temperature = config.samples_per_prompt, config.temperature
    if greedy:
        n, temperature = 1, 0.0
    limit, stop = config.max_response_tokens, grader.template.stop
    groups = sampler.generate(mine, seeds[share], n, limit, temperature, stop)
    rollouts = []
    for index, group in zip(chosen[share], groups, strict=True):
        rollouts += [replace(rollout, problem=index) for rollout in group]
    check_endings(rollouts, config.model, stop)
    return rollouts


# ------------------------------------------------------------------------------------ reward


def give_rewards(
    grader: Grader, problems: list[Problem], rollouts: list[Rollout], config: Config
) -> list[Rollout]:
    """Reward this rank's responses; returns those of all ranks.

    A truncated response gets `truncated_reward`, even if it holds the right answer. It stays in its
    group's mean and in the loss. Of the others, one whose grading failed gets nan: unknown, not
    wrong.
    Every rank gets all responses: updates, metrics and samples are then the same on any number of
    ranks. Raises RuntimeError if most gradings of all ranks fail.
    """
    asked = [problems[rollout.problem] for rollout in rollouts]
    verdicts = grader.verdicts(
        [rollout.text for rollout in rollouts],
        [problem.answers for problem in asked],
        [problem.row for problem in asked],
    )
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        truncated = rollout.finish_reason == "length"
        rollout.reward = config.truncated_reward if truncated else verdict.reward
        rollout.correct, rollout.failure = verdict.correct, verdict.failure
    of_all_ranks = from_all_ranks((rollouts, verdicts))
    refuse_broken_reward([verdict for _, part in of_all_ranks for verdict in part])
    return [rollout for part, _ in of_all_ranks for rollout in part]


def evaluate(
    sampler: Sampler, grader: Grader, problems: list[Problem], config: Config
) -> dict[str, float | None]:
    """Metrics eval_... of one greedy response to each held-out problem; {} without problems.

    `eval_accuracy` is the share of right ones. A right answer in a truncated response counts in it,
    as in the paper and in eval.py; in the reward it does not.
    """
    if not problems:
        return {}
    seconds: dict[str, float] = {}
    places = list(range(len(problems)))
    unused = [0] * len(problems)  # greedy sampling draws nothing
    with timed(seconds, "eval"):
        rollouts = sample(sampler, grader, problems, places, unused, config, greedy=True)
        rollouts = give_rewards(grader, problems, rollouts, config)
    show_examples(rollouts)
    metrics = {f"eval_{key}": value for key, value in summarize(rollouts, 1).items()}
    return metrics | seconds


# ----------------------------------------------------------------------------------- batches


@dataclass
class MicroBatch:
    """Rows that go through the model together."""

    ids: torch.Tensor  # (B, T), padded on the right
    response_mask: torch.Tensor  # (B, T-1), column t is 1 if token t+1 is of the response
    sampler_logprobs: torch.Tensor  # (B, T-1), 0 outside the response
    advantages: torch.Tensor  # (B,)
    problems: list[int]
    denominator: float = 1.0  # of the whole update, on all ranks: N * L_max
    old_logprobs: torch.Tensor | None = None  # (B, T-1)


# An empty micro-batch gets this row without response tokens. Its gradient is 0, and its rank still
# takes part in every collective operation.
EMPTY_ROLLOUT = Rollout(problem=-1, prompt_ids=[0, 0], response_ids=[], sampler_logprobs=[])


def collate(rollouts: list[Rollout], denominator: float = 1.0) -> MicroBatch:
    """Rollouts as the rows of one batch. A prompt [5, 6] with the response [7, 8, 1] becomes

    ids            5 6 7 8 1
    response_mask    0 1 1 1      from lengths, never by comparing ids with a padding id
    """
    rows, longest = len(rollouts), max(len(rollout) for rollout in rollouts)
    ids = torch.zeros(rows, longest, dtype=torch.long)
    mask = torch.zeros(rows, longest - 1)
    sampler_logprobs = torch.zeros(rows, longest - 1)
    for row, rollout in enumerate(rollouts):
        response = slice(len(rollout.prompt_ids) - 1, len(rollout) - 1)
        ids[row, : len(rollout)] = torch.tensor(rollout.prompt_ids + rollout.response_ids)
        mask[row, response] = 1
        sampler_logprobs[row, response] = torch.tensor(rollout.sampler_logprobs)
    advantages = torch.tensor([rollout.advantage for rollout in rollouts])
    return MicroBatch(
        ids.to(DEVICE),
        mask.to(DEVICE),
        sampler_logprobs.to(DEVICE),
        advantages.to(DEVICE),
        [rollout.problem for rollout in rollouts],
        denominator,
    )


def micro_batches(
    rollouts: list[Rollout], budget: int, rank: int, world: int
) -> list[list[Rollout]]:
    """Deal rollouts into micro-batches of at most `budget` tokens; returns those of this rank.

    Tokens are counted without padding: training computes none. All ranks get equally many
    micro-batches, since every rank must take part in every collective operation, and similar work:
    from the longest on, each rollout goes where the fewest tokens are. There are as few
    micro-batches as this allows. A rollout above the budget is alone.
    """
    rows = sorted(rollouts, key=len, reverse=True)
    total = sum(len(row) for row in rows)
    count = math.ceil(total / (budget * world))  # of each rank, if all came out even
    while True:
        batches: list[list[Rollout]] = [[] for _ in range(count * world)]
        tokens = [0] * len(batches)
        for row in rows:
            emptiest = tokens.index(min(tokens))
            batches[emptiest].append(row)
            tokens[emptiest] += len(row)
        if all(n <= budget or len(batch) == 1 for batch, n in zip(batches, tokens, strict=True)):
            return [batch or [EMPTY_ROLLOUT] for batch in batches[rank::world]]
        count += 1


def split_updates(
    rollouts: list[Rollout], config: Config, step: int, rank: int, world: int
) -> list[list[MicroBatch]]:
    """This rank's micro-batches of each of the step's updates.

    The responses are shuffled, alike on all ranks, so that a group is spread over the updates.
    Those of zero advantage have no gradient: they are left out here and still count in N.
    """
    draw = np.random.default_rng(derive_seed("updates", config.seed, step))
    order = draw.permutation(len(rollouts))
    updates = []
    for indices in np.split(order, len(order) // config.responses_per_update):
        rows = [rollouts[index] for index in indices]
        longest = 1 if config.divide_by_length else config.max_response_tokens
        denominator = len(rows) * longest  # N * L_max; GRPO's is N, see (2/2)
        active = [row for row in rows if row.advantage != 0]
        if not active:
            active = [min(rows, key=len)]  # one row, so that the gap is measured
        mine = micro_batches(active, config.tokens_per_microbatch, rank, world)
        updates.append([collate(batch, denominator) for batch in mine])
    return updates


# ---------------------------------------------------------------------------------- learning


class Policy(torch.nn.Module):
    """A causal language model whose forward returns log-probs of response tokens.

    Call policy(...), never policy.model(...): FSDP gathers the head's weights around this forward.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.saved_dtype = model.dtype  # of the base model and of exports

    def forward(
        self, ids: torch.Tensor, response_mask: torch.Tensor, temperature: float = 1.0
    ) -> torch.Tensor:
        """ids (B, T), response_mask (B, T-1) -> log-probs (B, T-1) in fp32; see token_logprobs."""
        return token_logprobs(self.model, ids, response_mask, temperature)


def make_policy(config: Config) -> Policy:
    """The policy in FSDP2 shards: fp32 master weights, computing in DTYPE."""
    model = AutoModelForCausalLM.from_pretrained(
        config.model,
        dtype="auto",
        attn_implementation="packed",  # of support/logprobs.py
        use_safetensors=True,
    ).train()
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(model)
    shard = partial(
        fully_shard,
        mesh=mesh(),
        mp_policy=MixedPrecisionPolicy(DTYPE, reduce_dtype=torch.float32),
        offload_policy=CPUOffloadPolicy(pin_memory=CUDA) if config.offload else OffloadPolicy(),
    )
    for layer in model.get_decoder().layers:
        shard(layer)
    shard(policy)
    policy.float()  # the shards alone: the whole model is never converted
    return policy


@torch.no_grad()
def add_old_logprobs(policy: Policy, updates: list[list[MicroBatch]], config: Config) -> None:
    """Store the log-probs of the policy as it is now, before the step's first update.

    That update itself needs no such pass: see forward_backward.
    """
    for batches in updates:
        for batch in batches:
            batch.old_logprobs = policy(batch.ids, batch.response_mask, config.temperature)


def forward_backward(policy: Policy, batch: MicroBatch, config: Config) -> dict[str, torch.Tensor]:
    """Send one micro-batch through the policy and add its gradient to the update's.

    Returns sums over its response tokens. Raises FloatingPointError if the loss is not finite.
    """
    logprobs: torch.Tensor = policy(batch.ids, batch.response_mask, config.temperature)
    old_logprobs = batch.old_logprobs
    if old_logprobs is None:  # in the step's first update the policy still is the old policy
        old_logprobs = logprobs.detach()
    log_importance = old_logprobs - batch.sampler_logprobs  # both are 0 outside the response
    tis_capped, importance_weights = torch.zeros(()), None
    if config.tis_cap is not None:
        importance_ratio = log_importance.exp()
        tis_capped = ((importance_ratio > config.tis_cap) * batch.response_mask).sum()
        importance_weights = importance_ratio.clamp(max=config.tis_cap)
    loss, sums = drgrpo_loss(
        logprobs,
        old_logprobs,
        batch.advantages,
        batch.response_mask,
        batch.denominator,
        config.clip_eps,
        config.divide_by_length,
        importance_weights,
    )
    if not torch.isfinite(loss):
        raise FloatingPointError(f"loss {loss.item()} on responses to problems {batch.problems}.")
    # FSDP takes the mean over ranks, but the denominator counts the responses of all of them
    (loss * dist.get_world_size()).backward()
    return sums | {
        "loss": loss.detach(),
        "gap": log_importance.abs().sum(),
        "tis_capped": tis_capped,
    }


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, batches: list[MicroBatch], config: Config
) -> dict[str, float]:
    """One optimizer step from this rank's micro-batches. Returns sums over all ranks.

    An update without any signal has the gradient 0; Adam still moves the weights by its moments.
    Raises RuntimeError if the sampler's log-probs are not the trainer's and FloatingPointError if
    a loss or the gradient is not finite; the update is not made then.
    """
    sums: dict = defaultdict(float)
    for batch in batches:
        for key, value in forward_backward(policy, batch, config).items():
            sums[key] += value
    sums = all_reduce(sums)
    refuse_gap(sums["gap"] / sums["tokens"], config.max_gap)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    grad_norm = whole(norm).item()
    if not math.isfinite(grad_norm):
        raise FloatingPointError(f"the gradient's norm is {grad_norm}; this update was not made.")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums | {"grad_norm": grad_norm}


def refuse_gap(gap: float, max_gap: float | None) -> None:
    """Raises RuntimeError if trainer and sampler differ too much, in nats per token on average."""
    limit = MAX_GAP[DTYPE] if max_gap is None else max_gap
    if not gap <= limit:
        raise RuntimeError(
            f"the log-probs of trainer and sampler differ by {gap:.3g} nats per token, above "
            f"max_gap {limit:g}. Likely causes: the sampler has old weights (no wake after an "
            "update) or a prefix cache of old weights; a weight was not sent to it; another "
            "temperature, precision or prompt on one side. This update was not made."
        )


def learning_metrics(updates: list[dict[str, float]]) -> dict[str, float]:
    """Of a step, from the sums of its updates: means over updates, and over trained tokens."""
    metrics = {}
    for key in ("loss", "grad_norm"):
        metrics[key] = sum(sums[key] for sums in updates) / len(updates)
    tokens = sum(sums["tokens"] for sums in updates)
    for key in ("gap", "tis_capped", "clipped", "kl"):
        metrics[key] = sum(sums[key] for sums in updates) / tokens
    return metrics


# ------------------------------------------------------------------------------- the command

TOY = "runs/toy-base"
MATH = "nlile/hendrycks-MATH-benchmark"
PAPER = Config("math-7b", "Qwen/Qwen2.5-Math-7B", MATH, eval_dataset=MATH, save_every=4)
PRESETS = {
    "toy": (
        "a 0.2M-parameter model learns arithmetic: minutes on two CPU cores",
        Config(
            name="toy",
            model=f"{TOY}/model",
            dataset=f"{TOY}/train.jsonl",
            template="none",
            eval_dataset=f"{TOY}/test.jsonl",
            eval_every=10,
            steps=40,
            prompts_per_step=32,
            responses_per_update=64,
            max_prompt_tokens=64,
            max_response_tokens=72,
            lr=3e-4,
            activation_checkpointing=False,
        ),
    ),
    "gsm8k-0.5b": (
        "Qwen2.5-0.5B on GSM8K, on one 24 GB GPU",
        Config(
            name="gsm8k-0.5b",
            model="Qwen/Qwen2.5-0.5B",
            dataset="openai/gsm8k",
            subset="main",
            problem_column="question",
            answer_marker="####",
            eval_dataset="openai/gsm8k",
            steps=200,
            prompts_per_step=32,
            max_prompt_tokens=512,
            max_response_tokens=512,
        ),
    ),
    "math-1.5b": (
        "Qwen2.5-Math-1.5B on MATH, the paper's settings",
        replace(PAPER, name="math-1.5b", model="Qwen/Qwen2.5-Math-1.5B"),
    ),
    "math-7b": (
        "Qwen2.5-Math-7B on MATH levels 3-5: the paper's recipe, for 8 GPUs",
        replace(PAPER, levels=(3, 4, 5)),
    ),
    "llama-3b-r1": (
        "Llama-3.2-3B-NuminaQA on MATH with the R1 template, as in the paper",
        replace(PAPER, name="llama-3b-r1", model="lkevinzc/Llama-3.2-3B-NuminaQA", template="r1"),
    ),
}


def main() -> None:
    try:
        config = tyro.extras.overridable_config_cli(PRESETS, description=__doc__)
        if config.model.startswith(TOY) and Path(__file__).with_name("toy.py").exists():
            from toy import make_toy

            make_toy(TOY)
        prepared = prepare(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if is_finished(config):
        print(f"{config.folder} is finished: {config.steps} steps. --steps N goes on with it.")
    elif not train(config, *prepared):
        sys.exit(f"{config.folder} is stopped. The same command goes on with it.")


if __name__ == "__main__":
    main()
