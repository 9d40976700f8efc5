"""Dr. GRPO: R1-Zero-like reinforcement learning of a language model, in one file.

The model is given problems, writes several responses to each, is told which of them are right,
and is moved towards those. For responses i = 1..G to one problem with rewards r_i, GRPO lowers

    1/N * sum_i 1/|o_i| * sum_t max(-A_i * ratio_it, -A_i * clip(ratio_it, 1-eps, 1+eps))
    A_i = (r_i - mean(r_1..r_G)) / std(r_1..r_G)
    ratio_it = exp(logprob_it - old_logprob_it)

over the N responses of an optimizer step, of |o_i| tokens each. Two of its divisions are biases
(arXiv 2503.20783, section 3). Dr. GRPO is GRPO without them. From GRPO to this file:

  1. A_i = r_i - mean. Divided by the group's std, problems that are nearly always or nearly never
     solved would weigh more than the others.
  2. 1/L_max in place of 1/|o_i|, where L_max is the longest response allowed: a constant. Divided
     by its own length, a long wrong response would be punished less per token than a short one,
     and wrong responses would grow.
  3. Nothing else: no critic, no KL term, no entropy bonus.
  4. By default each token's term is also multiplied by min(p_old / p_sampler, tis_cap): how
     probable the token is with the same weights, as the trainer and as vLLM compute it. This is
     a truncated importance weight (TIS). No gradient flows through it.

Where sampler and trainer agree, the expected gradient of a round's first update is that of the
expected reward, times (G-1)/(G * L_max): test_drgrpo.py enumerates every group of a tiny policy to
see it. These rules keep it so, and are tested. N * L_max is fixed before micro-batches are formed
and counts the responses of all ranks, so nothing that saves memory changes the gradient. EOS is an
action like any other. Exactly the sampled token ids are trained, at the temperature of sampling.
Each step measures how far the sampler's log-probs are from the trainer's. A round's later updates
are off-policy: the clip limits that bias, it does not remove it.

    python drgrpo.py toy                               # minutes on two CPU cores
    torchrun --nproc-per-node 8 drgrpo.py math-7b      # the paper's 7B run on one 8-GPU node

Words: a round is one sampling of P*G responses and the learning from them, and `step` is its
number; an update is one optimizer step. Shapes: P prompts a round, G responses to each, N
responses of an update, B rows of T tokens, and T-1 log-probs, because the first token has none.
Not a framework: copy this file and change it.
"""

import gc
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
from transformers import AutoModelForCausalLM

from support import guards
from support.data import Problem, derive_seed, step_problems
from support.engine import engine_settings, give_threads_back
from support.grader import Grader, refuse_broken_reward
from support.logprobs import token_logprobs
from support.metrics import keep_if_it_fails, summarize
from support.ranks import (
    StopSignals,
    all_reduce,
    check_shared_folder,
    gather_rows,
    mesh,
    start_ranks,
    timed,
)
from support.run import Run, is_finished, prepare
from templates import TEMPLATES
from toy import make_toy

CUDA = torch.cuda.is_available()  # else everything runs on the CPU
DEVICE = "cuda" if CUDA else "cpu"
Dtype = Literal["bfloat16", "float32"]  # of computing; master weights are always fp32
DTYPE: Dtype = "bfloat16" if CUDA else "float32"

# ---------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Config:
    """Settings of a run. The defaults are the paper's, but for tis_cap: it had none.

    A round samples prompts_per_step * samples_per_prompt responses: 128 * 8 = 1024. It then makes
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

    steps: int = 300  # rounds of sampling and learning
    prompts_per_step: int = 128  # P, problems of a round over all ranks
    samples_per_prompt: int = 8  # G, responses to each of them
    responses_per_update: int = 128  # N, of one optimizer step; P*G must be a multiple of it
    max_prompt_tokens: int = 1024  # problems with longer prompts are dropped and counted
    max_response_tokens: int = 3000  # L_max: a response that has not ended then is truncated
    temperature: float = 1.0  # of sampling, and of the log-probs that are trained
    top_p: float = 1.0  # must be 1: a cut distribution is not the one that is trained

    lr: float = 1e-6  # of AdamW: constant, no warm-up, no weight decay
    clip_eps: float = 0.2  # the ratio is clipped to 1 - clip_eps .. 1 + clip_eps
    max_grad_norm: float = 1.0  # the gradient's global norm is clipped to this
    tis_cap: float | None = 2.0  # cap of trainer/sampler importance weights; None: no weights
    divide_by_std: bool = False  # True is GRPO's first bias
    divide_by_length: bool = False  # True is GRPO's second bias
    # stop if trainer and sampler log-probs differ by more, in nats a token; None: by the dtype
    max_gap: float | None = None

    tokens_per_microbatch: int = 16384  # prompts and responses: memory, not the gradient
    activation_checkpointing: bool = True  # recompute activations: memory, not the gradient
    offload: bool = False  # keep master weights, gradients and optimizer in the CPU's memory
    dtype: Dtype = DTYPE  # of computing, in policy and sampler
    compile: bool = False  # torch.compile the layers: a slow start; not yet measured on a GPU
    grader_workers: int = 2  # processes a rank that grade
    grader_timeout: float = 5.0  # seconds a grading; then the reward is 0, and it is counted
    track: Literal["no", "tensorboard", "wandb"] = "no"  # log to a tracker too

    def __post_init__(self):
        """Refuse what cannot work. Raises ValueError that says what to do instead."""
        wrong = []
        for key, value in vars(self).items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            any_sign = key in ("seed", "truncated_reward")
            if is_number and not any_sign and not value > 0:
                wrong.append(f"{key} must be above 0")
        if Path(self.name).name != self.name or self.name in ("", ".."):
            wrong.append(f"name {self.name!r} must be the name of a folder in runs, not a path")
        if self.seed < 0:
            wrong.append("seed must be 0 or more")
        if not math.isfinite(self.truncated_reward):
            wrong.append("truncated_reward must be a finite number")
        if self.top_p != 1:
            wrong.append(
                "top_p must be 1: the cut distribution that is sampled would not be the one that "
                "is trained; lower the temperature instead"
            )
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
        if CUDA and self.dtype == "float32":
            wrong.append("dtype must be bfloat16 on a GPU: its attention kernel has no float32")
        if wrong:
            raise ValueError("; ".join(wrong))

    @property
    def folder(self) -> Path:
        return Path("runs", self.name)

    @property
    def denominator(self) -> int:
        """N * L_max of an update; N if each response is divided by its own length."""
        longest = 1 if self.divide_by_length else self.max_response_tokens
        return self.responses_per_update * longest


# ----------------------------------------------------------------------------- the algorithm


def group_advantages(rewards: torch.Tensor, divide_by_std: bool = False) -> torch.Tensor:
    """How much better each response is than its group: (P, G) rewards -> (P, G) advantages.

    A = r - mean(r) (arXiv 2503.20783, section 3.2); a group of equal rewards gets exact zeros.
    `divide_by_std` gives GRPO's advantage, with the std over G-1 as in the paper's code. Raises
    ValueError if rewards are not (P, G).
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be (P, G), one row a prompt; got {tuple(rewards.shape)}")
    if not rewards.is_floating_point():
        rewards = rewards.float()
    advantages = rewards - rewards.mean(dim=1, keepdim=True)  # Dr. GRPO (1/2): not divided by std
    if divide_by_std:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-8)
    equal = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return torch.where(equal, torch.zeros_like(advantages), advantages)


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
    KL(old || new)). Raises ValueError if a shape is another or the denominator is not above 0.
    """
    if not logprobs.shape == old_logprobs.shape == response_mask.shape:
        raise ValueError("logprobs, old_logprobs and response_mask must have one shape")
    if advantages.shape != logprobs.shape[:1] or not denominator > 0:
        raise ValueError("advantages must be (B,), and denominator above 0")
    mask = response_mask.bool()
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)  # padding may hold anything
    ratio = log_ratio.exp()
    advantage = advantages[:, None]  # (B, 1)
    unclipped = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - clip_eps, 1 + clip_eps)
    token_loss = torch.maximum(unclipped, clipped)  # (B, T-1)
    if importance_weights is not None:
        token_loss = token_loss * importance_weights.detach()
    response_loss = torch.where(mask, token_loss, 0.0).sum(dim=1)  # (B,)
    if divide_by_length:
        response_loss = response_loss / mask.sum(dim=1).clamp(min=1)
    loss = response_loss.sum() / denominator  # Dr. GRPO (2/2): a constant, not the length
    kl = torch.where(mask, ratio - 1 - log_ratio, 0.0)
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
    """One round: sample, sleep, score, update, wake. Returns metrics and all ranks' responses."""
    seconds: dict[str, float] = {}
    chosen = step_problems(len(problems), step, config.prompts_per_step, config.seed)
    # A draw's seed knows the step and the prompt, but no rank: any number of ranks draws the same
    seeds = [derive_seed("sample", config.seed, step, place) for place in range(len(chosen))]
    n, temperature = config.samples_per_prompt, config.temperature
    with timed(seconds, "sample"):
        rollouts = sample(sampler, grader, problems, chosen, seeds, n, temperature, config)
    with timed(seconds, "sleep"):
        sampler.sleep()
    with timed(seconds, "score"):
        rollouts = score(grader, problems, rollouts, n, config)
    with timed(seconds, "update"), keep_if_it_fails(config.folder, step, problems, rollouts):
        updates = split_updates(rollouts, config, step, dist.get_rank(), dist.get_world_size())
        learned = update(policy, optimizer, updates, config)
    with timed(seconds, "sync"):
        sampler.wake(policy)
    return summarize(rollouts, n) | learned | seconds, rollouts


def train(
    config: Config,
    tokenizer,
    problems: list[Problem],
    held_out: list[Problem],
    dropped: dict[str, int],
) -> None:
    """A whole run, or the rest of one that was stopped, from what `prepare` returned."""
    with StopSignals() as signals:
        policy, optimizer, sampler, grader = start(config)
        run = Run(config, problems, held_out, dropped, policy, optimizer)
        if run.first_step > 0:  # the engine still has the base model's weights
            sampler.sleep()
            sampler.wake(policy)
        for step in run.bar:  # the last one only evaluates and saves
            metrics: dict[str, float | None] = {}
            rollouts: list[Rollout] = []
            if step % config.eval_every == 0 or step == config.steps:
                metrics |= score_held_out(sampler, grader, held_out, config)
                if step > 0:
                    weights = full_weights(policy.model, policy.model.config.dtype)
                    run.export(step, metrics, weights, policy.model, tokenizer)
            if step < config.steps:
                learned, rollouts = train_step(
                    config, step, problems, policy, optimizer, sampler, grader
                )
                metrics |= learned
            run.record(step, metrics, rollouts)
            asked_to_stop = signals.on_any_rank()
            if step < config.steps:
                run.save_state(step + 1, at_once=asked_to_stop)
            if asked_to_stop:
                break
        run.close(finished=step == config.steps)
        grader.close()
        sampler.close()
    if step < config.steps:
        run.ask_to_be_requeued()


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
    reward: float = 0.0  # after the rule for truncated responses
    correct: bool | None = None  # the grader's verdict on the text; None: no verdict
    failure: str | None = None  # why the grading failed, if it did
    advantage: float = 0.0

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


class Sampler:
    """vLLM in this process, one engine a rank, on the GPU that the policy trains on.

    `context` is the longest prompt plus response, in tokens. Token ids go in and come out.
    `tensor_parallel` consecutive ranks share one model and must get the same prompts.
    `sequences`: responses sampled at once. The engine takes the memory that is free now, but for
    `reserve` bytes and a margin (support/engine.py). Only a Sampler made with `can_sleep` can
    give it back. Raises ValueError if there is too little.
    """

    def __init__(
        self,
        model: str,
        context: int,
        seed: int = 0,
        tensor_parallel: int = 1,
        reserve: int = 0,
        dtype: str = DTYPE,
        sequences: int = 1024,
        can_sleep: bool = False,
    ):
        from vllm import LLM

        self.tensor_parallel = tensor_parallel
        self.dtype = getattr(torch, dtype)
        self.llm = LLM(
            model,
            dtype=self.dtype,
            # Logits in fp32, not rounded to bf16: so does the trainer (support/logprobs.py)
            hf_overrides={"head_dtype": "float32"},
            max_model_len=context,
            seed=seed,
            tensor_parallel_size=tensor_parallel,
            distributed_executor_backend="external_launcher",  # a rank is a torchrun process
            logprobs_mode="processed_logprobs",  # of the distribution at this temperature
            load_format="safetensors",  # no pickle
            use_tqdm_on_load=False,
            **engine_settings(model, context, sequences, reserve, can_sleep),
        )
        self.eos_ids = guards.eos_ids(self.llm)

    def generate(
        self,
        problems: list[Problem],
        seeds: list[int],
        n: int,
        max_tokens: int,
        temperature: float,
        stop: tuple[str, ...],
        finished: Callable[[int, list[Rollout]], None] = lambda place, responses: None,
    ) -> list[list[Rollout]]:
        """n responses to each problem; a draw depends on its seed and not on its neighbours.

        A rollout's `problem` is the problem's place in the list. finished(place, responses) is
        called as soon as all responses to the problem at this place are there. A stop string
        stays in the text, and the token that completes it in the ids and in the loss.
        """
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        engine, decode = self.llm.llm_engine, self.llm.get_tokenizer().decode
        self.llm.reset_prefix_cache()  # what was sampled before must not change a bit
        for place, (problem, seed) in enumerate(zip(problems, seeds, strict=True)):
            params = SamplingParams(
                n=n,
                seed=seed,
                temperature=temperature,
                max_tokens=max_tokens,
                logprobs=0,
                flat_logprobs=True,
                stop=list(stop),
                include_stop_str_in_output=True,
                detokenize=bool(stop),  # only to find stop strings: vLLM decodes token by token
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            prompt = TokensPrompt(prompt_token_ids=problem.prompt_ids)
            engine.add_request(str(place), prompt, params)
        groups: dict[int, list[Rollout]] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                place = int(output.request_id)
                groups[place] = [
                    Rollout(
                        place,
                        problems[place].prompt_ids,
                        list(response.token_ids),
                        list(response.logprobs.logprobs),
                        # without stop strings vLLM decodes nothing
                        response.text or decode(response.token_ids, skip_special_tokens=True),
                        response.finish_reason,
                    )
                    for response in output.outputs
                ]
                guards.check_endings(groups[place], self.eos_ids, stop)
                finished(place, groups[place])
        return [groups[place] for place in range(len(problems))]

    def sleep(self) -> None:
        """Hand the GPU's memory to the policy; the engine has no weights until `wake`."""
        if CUDA:
            self.llm.sleep(level=2)
            torch.cuda.empty_cache()

    def wake(self, policy: "Policy") -> None:
        """Take the memory back and load the policy's weights.

        Waking and loading are one method, so that nobody can sample with old weights. The prefix
        cache is emptied: it holds keys and values of the old weights.
        """
        if CUDA:
            gc.collect()
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        names = set(policy.model.state_dict())
        weights = guards.all_sent(full_weights(policy.model, self.dtype), names)
        self.llm.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": weights, "is_checkpoint_format": True}
        )
        guards.refuse_rest(weights)
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
        yield name, weight.full_tensor() if isinstance(weight, DTensor) else weight


def sample(
    sampler: Sampler,
    grader: Grader,
    problems: list[Problem],
    chosen: list[int],
    seeds: list[int],
    n: int,
    temperature: float,
    config: Config,
) -> list[Rollout]:
    """This rank's share of n responses to each chosen problem, in the order of `chosen`.

    `chosen` are indices into `problems`, `seeds` one for each of them. The grader starts on a
    problem's responses as soon as they are there, while others are still being sampled.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    share = slice(len(chosen) * rank // world, len(chosen) * (rank + 1) // world)
    mine = [problems[index] for index in chosen[share]]

    def grade_early(place: int, group: list[Rollout]) -> None:
        texts, problem = [rollout.text for rollout in group], mine[place]
        grader.start(texts, [problem.answers] * len(group), [problem.row] * len(group))

    limit, stop = config.max_response_tokens, grader.template.stop
    groups = sampler.generate(mine, seeds[share], n, limit, temperature, stop, grade_early)
    rollouts = []
    for index, group in zip(chosen[share], groups, strict=True):
        rollouts += [replace(rollout, problem=index) for rollout in group]
    return rollouts


# ------------------------------------------------------------------------------------ reward


def score(
    grader: Grader, problems: list[Problem], rollouts: list[Rollout], n: int, config: Config
) -> list[Rollout]:
    """Reward this rank's responses, n to a problem; returns all ranks' responses, with advantages.

    A truncated response gets `truncated_reward`, even if it holds the right answer. It stays in its
    group's mean and in the loss. Every rank gets all P*G responses: token ids are small, and then
    updates, metrics and samples are the same on any number of ranks. Raises RuntimeError if most
    gradings of all ranks fail.
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
    rollouts = gather_rows(rollouts)
    refuse_broken_reward(gather_rows(verdicts))
    lowest = min(rollout.reward for rollout in rollouts)
    guards.warn_if_truncation_pays(lowest, config.truncated_reward)
    rewards = torch.tensor([rollout.reward for rollout in rollouts]).view(-1, n)  # (P, G)
    advantages = group_advantages(rewards, config.divide_by_std and n > 1).flatten().tolist()
    return [replace(r, advantage=a) for r, a in zip(rollouts, advantages, strict=True)]


def score_held_out(
    sampler: Sampler, grader: Grader, problems: list[Problem], config: Config
) -> dict[str, float | None]:
    """Metrics eval_... of one greedy response to each held-out problem.

    `eval_accuracy` is the share of right ones. A right answer in a truncated response counts in it,
    as in the paper and in eval.py; in the reward it does not.
    """
    if not problems:
        return {}
    seconds: dict[str, float] = {}
    everyone = list(range(len(problems)))
    unused = [0] * len(problems)  # greedy sampling draws nothing
    with timed(seconds, "eval"):
        rollouts = sample(sampler, grader, problems, everyone, unused, 1, 0.0, config)
        rollouts = score(grader, problems, rollouts, 1, config)
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
    old_logprobs: torch.Tensor | None = None  # (B, T-1)


# An empty micro-batch gets this row without response tokens. Its gradient is 0, and its rank still
# takes part in every collective operation.
EMPTY_ROLLOUT = Rollout(problem=-1, prompt_ids=[0, 0], response_ids=[], sampler_logprobs=[])


def collate(rollouts: list[Rollout]) -> MicroBatch:
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
    )


def micro_batches(
    rollouts: list[Rollout], budget: int, rank: int, world: int
) -> list[list[Rollout]]:
    """Deal rollouts into micro-batches of at most `budget` tokens; returns those of this rank.

    All ranks get equally many, since every rank must take part in every collective operation, and
    alike work: from the longest on, each rollout goes where the fewest tokens are. There are as
    few micro-batches as this way of dealing allows. A rollout above the budget is alone.
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
    """This rank's micro-batches of each of the round's updates.

    The responses are shuffled, so that a group is spread over the updates. Those of zero advantage
    have no gradient: they are left out here and still count in N.
    """
    draw = np.random.default_rng(derive_seed("updates", config.seed, step))
    order = draw.permutation(len(rollouts))
    updates = []
    for indices in np.split(order, len(order) // config.responses_per_update):
        rows = [rollouts[index] for index in indices]
        active = [row for row in rows if row.advantage != 0]
        if not active:
            active = [min(rows, key=len)]  # one row, so that the gap is measured
        mine = micro_batches(active, config.tokens_per_microbatch, rank, world)
        updates.append([collate(batch) for batch in mine])
    return updates


# ---------------------------------------------------------------------------------- learning


class Policy(torch.nn.Module):
    """A causal language model whose forward returns log-probs of response tokens.

    Call policy(...), never policy.model(...): FSDP gathers the head's weights around this forward.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model  # of transformers

    def forward(
        self, ids: torch.Tensor, response_mask: torch.Tensor, temperature: float = 1.0
    ) -> torch.Tensor:
        """ids (B, T), response_mask (B, T-1) -> log-probs (B, T-1) in fp32; see token_logprobs."""
        return token_logprobs(self.model, ids, response_mask, temperature)


def make_policy(config: Config) -> Policy:
    """The policy in FSDP2 shards: fp32 master weights, computing in the run's dtype."""
    model = AutoModelForCausalLM.from_pretrained(
        config.model,
        dtype="auto",
        attn_implementation="packed",  # of support/logprobs.py
        use_safetensors=True,
    ).train()
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(model)
    settings = {
        "mesh": mesh(),
        "mp_policy": MixedPrecisionPolicy(getattr(torch, config.dtype), torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=CUDA) if config.offload else OffloadPolicy(),
    }
    for layer in model.get_decoder().layers:
        if config.compile:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        fully_shard(layer, **settings)
    fully_shard(policy, **settings)
    policy.float()  # the shards: no rank ever holds the whole model in fp32
    return policy


def start(config: Config) -> tuple[Policy, torch.optim.Optimizer, Sampler, Grader]:
    """Join the ranks; returns policy, optimizer, sampler and grader, all of this rank."""
    start_ranks(training=True)
    check_shared_folder(config.folder)
    policy = make_policy(config)
    optimizer = torch.optim.AdamW(
        policy.parameters(), config.lr, (0.9, 0.95), weight_decay=0.0, fused=True
    )
    grader = Grader(config.template, config.grader_workers, config.grader_timeout, config.reward)
    shards = sum(parameter.to_local().nbytes for parameter in policy.parameters())
    prompts = math.ceil(config.prompts_per_step / dist.get_world_size())  # of this rank
    sampler = Sampler(
        config.model,
        config.max_prompt_tokens + config.max_response_tokens,
        config.seed,
        reserve=0 if config.offload else 2 * shards,  # Adam's moments, which are not there yet
        dtype=config.dtype,
        sequences=prompts * config.samples_per_prompt,
        can_sleep=True,
    )
    if config.offload:  # AdamW runs on the CPU
        give_threads_back()
    return policy, optimizer, sampler, grader


def forward_backward(policy, batch: MicroBatch, config: Config) -> dict[str, torch.Tensor]:
    """Send one micro-batch through the policy and add its gradient to the update's.

    Returns sums over its response tokens. Raises FloatingPointError if the loss is not finite.
    """
    logprobs = policy(batch.ids, batch.response_mask, config.temperature)
    old_logprobs = batch.old_logprobs
    if old_logprobs is None:  # in the round's first update the policy still is the old policy
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
        config.denominator,
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
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    updates: list[list[MicroBatch]],
    config: Config,
) -> dict[str, float]:
    """Make the round's updates. Returns metrics over all tokens trained, of all ranks.

    Before an update is made, raises RuntimeError if the sampler's log-probs are not the trainer's
    and FloatingPointError if a loss or the gradient is not finite.
    """
    seconds: dict[str, float] = {}
    before = guards.probe(policy)
    # The old policy is the policy before the round's first update. That update uses its own
    # log-probs; the later ones need the old policy's, computed here.
    with timed(seconds, "old_logprobs"), torch.no_grad():
        for batches in updates[1:]:
            for batch in batches:
                batch.old_logprobs = policy(batch.ids, batch.response_mask, config.temperature)
    totals: dict[str, float] = defaultdict(float)
    grad_norms = 0.0
    for batches in updates:
        sums: dict = defaultdict(float)
        for batch in batches:
            # Reduce gradients only on the last micro-batch; with offload, on each, because
            # unreduced gradients need 4 bytes a weight on every GPU.
            policy.set_requires_gradient_sync(config.offload or batch is batches[-1])
            for key, value in forward_backward(policy, batch, config).items():
                sums[key] += value
        for key, value in all_reduce(sums).items():
            totals[key] += value
        guards.refuse_gap(totals["gap"] / totals["tokens"], config.max_gap, config.dtype)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        norm = norm.full_tensor().item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm}; this update was not made.")
        grad_norms += norm
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    metrics = {"loss": totals["loss"] / len(updates), "grad_norm": grad_norms / len(updates)}
    for key in ("gap", "tis_capped", "clipped", "kl"):
        metrics[key] = totals[key] / totals["tokens"]
    moved = all_reduce({"moved": (guards.probe(policy) != before).sum(), "probed": before.numel()})
    metrics["weights_moved"] = moved["moved"] / moved["probed"]
    return metrics | seconds


# ------------------------------------------------------------------------------- the command

TOY = "runs/toy-base"
MATH = "nlile/hendrycks-MATH-benchmark"
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
        Config(
            name="math-1.5b",
            model="Qwen/Qwen2.5-Math-1.5B",
            dataset=MATH,
            eval_dataset=MATH,
        ),
    ),
    "math-7b": (
        "Qwen2.5-Math-7B on MATH levels 3-5: the paper's recipe, for 8 GPUs",
        Config(
            name="math-7b",
            model="Qwen/Qwen2.5-Math-7B",
            dataset=MATH,
            levels=(3, 4, 5),
            eval_dataset=MATH,
        ),
    ),
    "llama-3b-r1": (
        "Llama-3.2-3B-NuminaQA on MATH with the R1 template, as in the paper",
        Config(
            name="llama-3b-r1",
            model="lkevinzc/Llama-3.2-3B-NuminaQA",
            dataset=MATH,
            template="r1",
            eval_dataset=MATH,
        ),
    ),
}


def main() -> None:
    try:
        config = tyro.extras.overridable_config_cli(PRESETS, description=__doc__)
        if config.model.startswith(TOY):
            make_toy(TOY)
        prepared = prepare(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if is_finished(config):
        print(f"{config.folder} is finished: {config.steps} steps. --steps N goes on with it.")
        return
    train(config, *prepared)


if __name__ == "__main__":
    main()
