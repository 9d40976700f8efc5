"""Dr. GRPO: R1-Zero-like reinforcement learning of a language model, in one file.

The model is given problems, writes several responses to each, is told which of them are right,
and is moved towards those. For responses i = 1..G to one problem, with rewards r_i, a step lowers

    loss = 1/(N * L_max) * sum_i sum_t max(-A_i * ratio_it, -A_i * clip(ratio_it, 1-eps, 1+eps))
    A_i  = r_i - mean(r_1..r_G)             ratio_it = exp(logprob_it - old_logprob_it)

where N counts the responses of the optimizer step and L_max is the longest that one may be. (By
default each token's term is also multiplied by min(trainer/sampler probability, tis_cap), a
constant.) GRPO differs in two places, and each of them is a bias (arXiv 2503.20783, section 3):

  1. it divides A_i by the group's standard deviation, so problems that are nearly always or
     nearly never solved weigh more than the others;
  2. it divides the sum over t by the response's own length, so a long wrong response is punished
     less per token than a short one, and wrong responses grow.

Without them the expected gradient is that of the expected reward, times (G-1)/(G * L_max):
test_drgrpo.py enumerates every group of a tiny policy to see it. What keeps it so, and is tested:
N * L_max is fixed before micro-batches are formed and counts the responses of all ranks, so that
nothing which saves memory changes the gradient; EOS is an action like any other; the ids that are
trained are those that were sampled, under the distribution they were sampled from; and each step
measures how far the sampler's log-probs are from the trainer's.

    python drgrpo.py toy                               # minutes on two CPU cores
    torchrun --nproc-per-node 8 drgrpo.py math-7b      # the paper's 7B run on one 8-GPU node

Shapes: P prompts a step, G responses each, N = P*G responses, B rows of T tokens, V vocabulary.
Not a framework: copy this file and change it.
"""

import gc
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy,
                                    fully_shard)
from torch.nn.attention.varlen import varlen_attn
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM

from eval import (all_reduce, evaluate, full_weights, plot_curves, record, save_checkpoint,
                  start_log, start_ranks, summarize, timed)
from templates import TEMPLATES, Grader, Problem, derive_seed, prepare, step_problems

CUDA = torch.cuda.is_available()  # else everything runs on the CPU, in fp32
DEVICE = "cuda" if CUDA else "cpu"

# ---------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Config:
    """Settings of a run. The defaults are the paper's, but for tis_cap: it had none."""

    name: str  # the run's folder is runs/NAME
    model: str  # folder or hub name of the base model
    dataset: str  # a .jsonl or .parquet file, or a hub dataset
    subset: str | None = None  # the hub dataset's configuration, where it has several
    split: str = "train"  # the hub dataset's split
    problem_column: str = "problem"  # the column with the problem's text
    answer_column: str = "answer"  # the column with the right answer, or a list of right ones
    levels: tuple[int, ...] = ()  # keep only rows whose column `level` is one of these; () is all
    template: str = "qwen_math"  # how a problem becomes a prompt, and where the answer stands
    eval_dataset: str | None = None  # scored before and after training and every eval_every steps
    eval_split: str = "test"  # its columns are those of the dataset
    eval_every: int = 16  # steps from one evaluation and checkpoint to the next
    seed: int = 0  # of the order of the problems and of every draw

    steps: int = 300  # rounds of sampling and learning
    prompts_per_step: int = 128  # P, problems of a step over all ranks
    samples_per_prompt: int = 8  # G, responses to each of them
    responses_per_update: int = 128  # of one optimizer step; P*G must be a multiple of it
    max_prompt_tokens: int = 1024  # problems with longer prompts are dropped and counted
    max_response_tokens: int = 3000  # L_max: a response that reaches it is truncated: reward 0
    temperature: float = 1.0  # of sampling, and of the log-probs that are trained
    top_p: float = 1.0  # must be 1: a cut distribution is not the one that is trained

    lr: float = 1e-6  # of AdamW: constant, no warm-up, no weight decay
    clip_eps: float = 0.2  # the ratio is clipped to 1 - clip_eps .. 1 + clip_eps
    max_grad_norm: float = 1.0  # the gradient's global norm is clipped to this
    tis_cap: float | None = 2.0  # cap of trainer/sampler importance weights; None: no weights
    divide_by_std: bool = False  # True is GRPO's first bias
    divide_by_length: bool = False  # True is GRPO's second bias
    # stop if trainer and sampler log-probs differ by more, in nats a token (bf16 rounds)
    max_gap: float = 0.1 if CUDA else 1e-3

    tokens_per_microbatch: int = 16384  # prompts and responses: memory, not the gradient
    activation_checkpointing: bool = True  # recompute activations: memory, not the gradient
    offload: bool = False  # keep master weights, gradients and optimizer in the CPU's memory
    compile: bool = False  # torch.compile the layers: a slow start; not yet measured on a GPU
    grader_workers: int = 2  # processes a rank that compare answers
    grader_timeout: float = 5.0  # seconds a comparison; then the reward is 0, and it is counted
    track: Literal["no", "tensorboard", "wandb"] = "no"  # log to a tracker too
    plan: bool = False  # only check everything, and print what the run needs; no GPU, no weights
    gpus: int = 8  # that --plan reckons with; torchrun says how many a run has

    def __post_init__(self):
        """Refuse what cannot work. Raises ValueError that says what to do instead."""
        n = self.prompts_per_step * self.samples_per_prompt
        wrong = [f"{key} must be above 0" for key, value in vars(self).items()
                 if type(value) in (int, float) and key != "seed" and not value > 0]
        wrong += [message for is_wrong, message in (
            (self.seed < 0, "seed must be 0 or more"),
            (self.top_p != 1, "top_p must be 1: the cut distribution that is sampled would not be "
             "the one that is trained; lower the temperature instead"),
            (self.samples_per_prompt < 2, "samples_per_prompt must be 2 or more: a group of 1 has "
             "no advantage"),
            (self.responses_per_update > 0 and n % self.responses_per_update,
             f"responses_per_update {self.responses_per_update} must divide prompts_per_step * "
             f"samples_per_prompt = {n}"),
            (self.template not in TEMPLATES,
             f"template {self.template!r} must be one of {', '.join(TEMPLATES)}")) if is_wrong]
        if wrong:
            raise ValueError("; ".join(wrong))

    @property
    def folder(self) -> Path:
        return Path("runs", self.name)

    @property
    def denominator(self) -> int:
        """N * L_max of an optimizer step; N if each response is divided by its own length."""
        longest = 1 if self.divide_by_length else self.max_response_tokens
        return self.responses_per_update * longest


# ----------------------------------------------------------------------------- the algorithm

LOGITS_AT_ONCE = 2**27  # rows * V of a chunk of the head: 0.5 GiB in fp32


def group_advantages(rewards: torch.Tensor, divide_by_std: bool = False) -> torch.Tensor:
    """How much better each response is than its group: (P, G) rewards -> (P, G) advantages.

    A = r - mean(r) (arXiv 2503.20783, section 3.2); a group of equal rewards gets exact zeros.
    `divide_by_std` gives GRPO's advantage, with the std over G-1 as in the paper's code.
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be (P, G), one row a prompt; got {tuple(rewards.shape)}")
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    advantages = rewards - rewards.mean(dim=1, keepdim=True)  # Dr. GRPO (1/2): not divided by std
    if divide_by_std:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-8)
    equal = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return torch.where(equal, torch.zeros_like(advantages), advantages)


def drgrpo_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor,
    response_mask: torch.Tensor, denominator: float, clip_eps: float = 0.2,
    divide_by_length: bool = False, weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped surrogate, summed over tokens and divided by one constant.

    logprobs, old_logprobs, response_mask, weights: (B, T); advantages: (B,). `denominator` is
    N * L_max of the whole optimizer step (N for `divide_by_length`), never a number taken from
    this micro-batch: losses of micro-batches then add up to the loss of the step. `weights` are
    truncated importance weights, constants for the gradient. Returns the scalar loss and sums
    over this batch's response tokens: tokens, clipped, kl (k3 estimate of KL(old || new)).
    """
    if not logprobs.shape == old_logprobs.shape == response_mask.shape:
        raise ValueError("logprobs, old_logprobs and response_mask must have one shape (B, T)")
    if advantages.shape != logprobs.shape[:1] or not denominator > 0:
        raise ValueError("advantages must be (B,), and denominator above 0")
    mask = response_mask.bool()
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)  # padding may hold anything
    ratio = log_ratio.exp()
    advantage = advantages[:, None]
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip_eps, 1 + clip_eps)
    token_loss = torch.maximum(plain, clipped)
    if weights is not None:
        token_loss = token_loss * weights.detach()
    response_loss = torch.where(mask, token_loss, 0.0).sum(dim=1)
    if divide_by_length:
        response_loss = response_loss / mask.sum(dim=1).clamp(min=1)
    loss = response_loss.sum() / denominator  # Dr. GRPO (2/2): a constant, not the length
    return loss, {"tokens": mask.sum(), "clipped": (mask & (clipped > plain)).sum(),
                  "kl": (ratio - 1 - log_ratio).sum().detach()}


def token_logprobs(model: torch.nn.Module, ids: torch.Tensor, response_mask: torch.Tensor,
                   temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of the response tokens: ids (B, T), response_mask (B, T-1) -> (B, T-1) in fp32.

    Column t belongs to token t+1, given tokens 0..t; it is 0 where response_mask is 0. The model
    sees each row up to its last response token, all rows laid end to end in one, each with
    positions from 0: no padding is computed, and no row sees another.
    """
    mask, targets = response_mask.bool(), ids[:, 1:]
    column = torch.arange(ids.shape[1], device=ids.device)
    lengths = (mask * (column[1:] + 1)).amax(dim=1).clamp(min=1)  # (B,)
    real = column < lengths[:, None]  # (B, T), S of them true
    # use_cache=False: keys and values are not kept, and no attention takes the rows for one text
    hidden = model.get_decoder()(  # (1, S, D)
        ids[real][None], position_ids=column.expand_as(ids)[real][None], use_cache=False,
        lengths=lengths.cpu(), ends=F.pad(lengths.cumsum(0), (1, 0)).int())[0]
    place = real.flatten().cumsum(0).view_as(ids) - 1  # (B, T), where in S each token went
    values = HeadLogprobs.apply(hidden[0, place[:, :-1][mask]],  # (R, D), R response tokens
                                model.get_output_embeddings().weight, targets[mask], temperature)
    zeros = torch.zeros(targets.shape, dtype=torch.float32, device=ids.device)
    return zeros.masked_scatter(mask, values)


@torch.compiler.disable
def packed_attention(module, query, key, value, attention_mask=None, scaling=None, *,
                     lengths: torch.Tensor, ends: torch.Tensor, **kwargs):
    """Causal attention within each of B sequences laid end to end, as transformers calls it.

    query (1, H, S, d), key and value (1, H_kv, S, d) -> (1, S, H, d); lengths (B,) on the CPU,
    ends (B+1,) from 0 to S.
    """
    gqa, longest = query.shape[1] != key.shape[1], lengths.max().item()
    if query.is_cuda:  # a kernel without padding, in half precision
        out = varlen_attn(*(x.squeeze(0).transpose(0, 1) for x in (query, key, value)), ends, ends,
                          longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=gqa)
        return out.unsqueeze(0), None
    rows = zip(*(x.split(lengths.tolist(), dim=2) for x in (query, key, value)), strict=True)
    out = [F.scaled_dot_product_attention(*row, is_causal=True, scale=scaling, enable_gqa=gqa)
           for row in rows]
    return torch.cat(out, dim=2).transpose(1, 2), None


AttentionInterface.register("packed", packed_attention)


class HeadLogprobs(torch.autograd.Function):
    """log_softmax(hidden @ weight.T / temperature) at `targets`, in fp32, a chunk at a time.

    hidden (R, D), weight (V, D), targets (R,) -> (R,). The backward pass makes each chunk's logits
    again, so that (R, V) of them never exist, and adds up the weight's gradient in fp32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature = temperature
        values = [mm_fp32(h, weight.T).div_(temperature).log_softmax(dim=1).gather(1, y)
                  for h, y in chunks(weight, hidden, targets.unsqueeze(1))]
        return torch.cat(values).squeeze(1)

    @staticmethod
    def backward(ctx, grad):  # of the logit of token v: grad / temperature * (1[v = y] - p(v))
        hidden, weight, targets = ctx.saved_tensors
        grad, targets, grad_hidden = grad.unsqueeze(1) / ctx.temperature, targets.unsqueeze(1), []
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for h, y, g in chunks(weight, hidden, targets, grad):
            probs = mm_fp32(h, weight.T).div_(ctx.temperature).softmax(dim=1)
            grad_logits = probs.mul_(-g).scatter_add_(1, y, g).to(weight.dtype)
            grad_hidden.append(grad_logits @ weight)
            grad_weight += mm_fp32(grad_logits.T, h)
        return torch.cat(grad_hidden), grad_weight.to(weight.dtype), None, None


def chunks(weight: torch.Tensor, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The tensors' rows together, so many at a time that LOGITS_AT_ONCE is kept."""
    return zip(*(x.split(max(1, LOGITS_AT_ONCE // len(weight))) for x in tensors), strict=True)


def mm_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in fp32; on CUDA of bf16 factors, without ever rounding the sums to bf16."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()


# ---------------------------------------------------------------------------------- rollouts


@dataclass
class Rollout:
    """One response, and all that learning needs to know of it."""

    problem: int  # index into the problems
    prompt_ids: list[int]
    response_ids: list[int]  # as sampled: ends in EOS unless stopped by length or a stop string
    sampler_logprobs: list[float]  # of the response's tokens, at the sampling temperature
    text: str = ""
    finish_reason: str = ""  # "stop", or "length" for a truncated response
    reward: float = 0.0
    advantage: float = 0.0

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


class Sampler:
    """vLLM in this process, one engine a rank, on the GPU that the policy trains on.

    `context` is the longest prompt plus response, in tokens. Token ids go in and come out. So many
    neighbouring ranks as `tensor_parallel` hold a model together: give them the same prompts. The
    engine takes what memory is free now, but for a margin and `reserve` bytes.
    """

    def __init__(self, model: str, context: int, seed: int = 0, tensor_parallel: int = 1,
                 reserve: int = 0):
        from vllm import LLM

        self.tensor_parallel = tensor_parallel
        self.dtype = torch.bfloat16 if CUDA else torch.float32
        machine = {"kv_cache_memory_bytes": 2**30, "enforce_eager": True}
        if CUDA:
            dist.all_reduce(torch.zeros(1, device=DEVICE))  # NCCL takes its memory now
            gc.collect()
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info()
            share = (0.95 * free - reserve) / total
            if share <= 0:
                raise ValueError(f"no room for vLLM beside {model}: --offload, or more GPUs")
            machine = {"gpu_memory_utilization": share, "enable_sleep_mode": True,
                       "max_num_seqs": 1024}
        self.llm = LLM(
            model, dtype=self.dtype, max_model_len=context, seed=seed, **machine,
            tensor_parallel_size=tensor_parallel,
            distributed_executor_backend="external_launcher",  # a rank is a torchrun process
            logprobs_mode="processed_logprobs",  # of the distribution at this temperature
        )

    def generate(self, problems: list[Problem], seeds: list[int], n: int, max_tokens: int,
                 temperature: float, stop: tuple[str, ...],
                 finished=lambda i, responses: None) -> list[list[Rollout]]:
        """n responses to each problem; a draw depends on its seed and not on its neighbours.
        finished(i, responses) is called as soon as all responses to problem i are there."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        engine, decode, groups = self.llm.llm_engine, self.llm.get_tokenizer().decode, {}
        for i, (problem, seed) in enumerate(zip(problems, seeds, strict=True)):
            params = SamplingParams(
                n=n, seed=seed, temperature=temperature, max_tokens=max_tokens, logprobs=0,
                flat_logprobs=True, stop=list(stop), include_stop_str_in_output=True,
                detokenize=bool(stop),  # vLLM decodes token by token: slow
                output_kind=RequestOutputKind.FINAL_ONLY)
            engine.add_request(str(i), TokensPrompt(prompt_token_ids=problem.prompt_ids), params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                i = int(output.request_id)
                groups[i] = [
                    Rollout(i, problems[i].prompt_ids, list(o.token_ids), list(o.logprobs.logprobs),
                            o.text or decode(o.token_ids, skip_special_tokens=True),
                            o.finish_reason) for o in output.outputs]
                finished(i, groups[i])
        return [groups[i] for i in range(len(problems))]

    def sleep(self) -> None:
        """Hand the GPU's memory to the policy; the engine has no weights until `wake`."""
        if CUDA:
            self.llm.sleep(level=2)
            torch.cuda.empty_cache()

    def wake(self, model: torch.nn.Module) -> None:
        """Take the memory back and load the policy's weights: one operation, lest it samples
        from discarded or old weights."""
        if CUDA:
            gc.collect()
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={
            "weights_iterator": full_weights(model, self.dtype), "is_checkpoint_format": True})
        if CUDA:
            torch.cuda.empty_cache()  # what gathering left behind, before the cache is allocated
            self.llm.wake_up(tags=["kv_cache"])
        if not self.llm.reset_prefix_cache():  # it holds keys and values of the old weights
            raise RuntimeError("vLLM kept its prefix cache: a request is still running")

    def close(self) -> None:
        """End the engine and, with it, the process group."""
        self.llm.llm_engine.engine_core.shutdown()


def sample(sampler: Sampler, grader: Grader, problems: list[Problem], config: Config,
           step: int) -> list[Rollout]:
    """This rank's share of the step's responses, in the order of the prompts. The grader starts
    on a problem's responses as soon as they are there, while others are still being sampled."""
    chosen = step_problems(len(problems), step, config.prompts_per_step, config.seed)
    rank, world = dist.get_rank(), dist.get_world_size()
    places = range(len(chosen) * rank // world, len(chosen) * (rank + 1) // world)
    mine = [problems[chosen[i]] for i in places]
    groups = sampler.generate(
        mine, [derive_seed(config.seed, step, i) for i in places],
        config.samples_per_prompt, config.max_response_tokens, config.temperature,
        TEMPLATES[config.template].stop,
        lambda i, group: grader.start([r.text for r in group], [mine[i].answers] * len(group)))
    return [replace(r, problem=chosen[i]) for i, group in zip(places, groups) for r in group]


def score(grader: Grader, problems: list[Problem], rollouts: list[Rollout],
          config: Config) -> list[Rollout]:
    """Reward this rank's responses; returns all ranks' responses, with advantages.

    Every rank then knows all N: token ids are small, and updates, metrics and samples come out
    the same on any number of ranks.
    """
    answers = [problems[r.problem].answers for r in rollouts]
    rewards = grader.grade([r.text for r in rollouts], answers)
    for rollout, reward in zip(rollouts, rewards, strict=True):
        # a truncated response gets 0 even if it holds the right answer, and stays in the loss
        rollout.reward = 0.0 if rollout.finish_reason == "length" else reward
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rollouts)
    rollouts = [r for part in parts for r in part]
    rewards = torch.tensor([r.reward for r in rollouts]).view(-1, config.samples_per_prompt)
    advantages = group_advantages(rewards, config.divide_by_std).flatten().tolist()
    return [replace(r, advantage=a) for r, a in zip(rollouts, advantages, strict=True)]


# ---------------------------------------------------------------------------------- batches


@dataclass
class MicroBatch:
    ids: torch.Tensor  # (B, T), padded on the right
    response_mask: torch.Tensor  # (B, T-1), column t is 1 if token t+1 is of the response
    sampler_logprobs: torch.Tensor  # (B, T-1), 0 outside the response
    advantages: torch.Tensor  # (B,)
    problems: list[int]
    old_logprobs: torch.Tensor | None = None  # (B, T-1)


def collate(rollouts: list[Rollout]) -> MicroBatch:
    """Rollouts as the rows of one batch. A prompt [5, 6] with the response [7, 8, 1] becomes

        ids            5 6 7 8 1
        response_mask    0 1 1 1      from lengths, never by comparing ids with a padding id
    """
    ids = torch.zeros(len(rollouts), max(map(len, rollouts)), dtype=torch.long)
    mask, sampler_logprobs = torch.zeros(2, *ids[:, 1:].shape)
    for i, r in enumerate(rollouts):
        response = slice(len(r.prompt_ids) - 1, len(r) - 1)
        ids[i, : len(r)] = torch.tensor(r.prompt_ids + r.response_ids)
        mask[i, response] = 1
        sampler_logprobs[i, response] = torch.tensor(r.sampler_logprobs)
    tensors = ids, mask, sampler_logprobs, torch.tensor([r.advantage for r in rollouts])
    return MicroBatch(*(x.to(DEVICE) for x in tensors), [r.problem for r in rollouts])


def micro_batches(rollouts: list[Rollout], budget: int, world: int) -> list[list[list[Rollout]]]:
    """Deal rollouts into micro-batches of at most `budget` tokens: a list of them for each rank.

    All ranks get equally many, since every rank must take part in every collective operation, and
    alike work: from the longest on, each rollout goes where the fewest tokens are. There are as
    few as that allows; a rollout above the budget is alone, and what stays empty gets no response.
    """
    rows = sorted(rollouts, key=len, reverse=True)
    count = -(-sum(map(len, rows)) // (budget * world))  # of each rank, if all came out even
    while True:
        batches, tokens = [[] for _ in range(count * world)], [0] * (count * world)
        for row in rows:
            i = tokens.index(min(tokens))
            batches[i].append(row)
            tokens[i] += len(row)
        if all(n <= budget or len(batch) == 1 for batch, n in zip(batches, tokens)):
            batches = [batch or [Rollout(-1, [0, 0], [], [])] for batch in batches]
            return [batches[rank::world] for rank in range(world)]
        count += 1


def split_updates(rollouts: list[Rollout], config: Config, step: int,
                  world: int) -> list[list[list[list[Rollout]]]]:
    """The micro-batches of each rank in each of the round's optimizer steps, in a random order.

    Responses of zero advantage have no gradient: left out here, they still count in N.
    """
    order = np.random.default_rng((config.seed, step, 1)).permutation(len(rollouts))
    updates = []
    for chosen in np.split(order, len(order) // config.responses_per_update):
        rows = [rollouts[i] for i in chosen]
        active = [r for r in rows if r.advantage != 0] or [min(rows, key=len)]  # one: for the gap
        updates.append(micro_batches(active, config.tokens_per_microbatch, world))
    return updates


# ---------------------------------------------------------------------------------- learning


def make_policy(config: Config) -> torch.nn.Module:
    """The model in FSDP2 shards: fp32 master weights, bf16 compute on CUDA, fp32 on a CPU.

    Its forward is `token_logprobs`, which reads the weights of the head: FSDP gathers them
    around forward only.
    """
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype="auto",
                                                 attn_implementation="packed").train()
    if model.get_output_embeddings().bias is not None:
        raise ValueError(f"the head of {config.model} has a bias, which HeadLogprobs leaves out")
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    shard = partial(
        fully_shard, mesh=init_device_mesh(DEVICE, (dist.get_world_size(),)),
        mp_policy=MixedPrecisionPolicy(torch.bfloat16 if CUDA else None, torch.float32),
        offload_policy=CPUOffloadPolicy(pin_memory=CUDA) if config.offload else OffloadPolicy())
    for layer in model.get_decoder().layers:
        if config.compile:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        shard(layer)
    shard(model)
    model.float()  # the shards: no rank ever holds the whole model in fp32
    model.forward = partial(token_logprobs, model)
    return model


def backward(forward, batch: MicroBatch, config: Config) -> dict[str, torch.Tensor]:
    """Add one micro-batch's gradient to the update's. Returns sums over its response tokens."""
    logprobs = forward(batch.ids, batch.response_mask)
    old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    difference = old_logprobs - batch.sampler_logprobs  # both are 0 outside the response
    cap = float("inf") if config.tis_cap is None else config.tis_cap
    weights = None if config.tis_cap is None else difference.exp().clamp(max=cap)
    loss, stats = drgrpo_loss(logprobs, old_logprobs, batch.advantages, batch.response_mask,
                              config.denominator, config.clip_eps, config.divide_by_length, weights)
    if not torch.isfinite(loss):
        raise FloatingPointError(f"loss {loss.item()} on responses to problems {batch.problems}")
    # FSDP takes the mean over ranks, but the denominator counts the responses of all of them
    (loss * dist.get_world_size()).backward()
    return stats | {"loss": loss.detach(), "gap": difference.abs().sum(),
                    "tis_capped": (difference.exp() > cap).sum()}


def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer,
           updates: list[list[MicroBatch]], config: Config) -> dict[str, float]:
    """Take the round's optimizer steps. Returns metrics over all tokens trained, of all ranks.

    Before an update is made, raises RuntimeError if the sampler's log-probs are not the trainer's
    and FloatingPointError if a loss or the gradient is not finite.
    """
    forward = partial(model, temperature=config.temperature)
    totals, seconds = Counter(), {}
    # the old policy is the one before the first update, whose own log-probs are thus the old ones
    with timed(seconds, "old_logprobs"), torch.no_grad():
        for batch in (batch for batches in updates[1:] for batch in batches):
            batch.old_logprobs = forward(batch.ids, batch.response_mask)
    for batches in updates:
        sums = Counter()
        for batch in batches:
            # one reduction an update, unless the GPU has no room for all gradients until then
            model.set_requires_gradient_sync(config.offload or batch is batches[-1])
            sums.update(backward(forward, batch, config))  # adds
        totals.update(all_reduce(sums))
        gap = totals["gap"] / totals["tokens"]
        if not gap <= config.max_gap:
            raise RuntimeError(
                f"the log-probs of trainer and sampler differ by {gap:.3g} nats a token, above "
                f"max_gap {config.max_gap:g}: the sampler has other weights than the trainer, or "
                "another temperature or precision. This update was not made.")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        norm = norm.full_tensor().item()
        if not np.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm}; this update was not made")
        totals["grad_norm"] += norm
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    tokens = totals.pop("tokens")
    per_update = {key: totals.pop(key) / len(updates) for key in ("loss", "grad_norm")}
    return per_update | {key: value / tokens for key, value in totals.items()} | seconds


# ---------------------------------------------------------------------------------- the loop


def start(config: Config):
    """Join the ranks; returns policy, optimizer, sampler and grader, all of this rank."""
    start_ranks()
    model = make_policy(config)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, (0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    moments = 0 if config.offload else 2 * sum(p.to_local().nbytes for p in model.parameters())
    sampler = Sampler(config.model, config.max_prompt_tokens + config.max_response_tokens,
                      derive_seed(config.seed, dist.get_rank()) % 2**32, reserve=moments)
    return model, optimizer, sampler, Grader(config.template, config.grader_workers,
                                             config.grader_timeout)


def train_step(config: Config, step: int, problems: list[Problem], model: torch.nn.Module,
               optimizer: torch.optim.Optimizer, sampler: Sampler,
               grader: Grader) -> tuple[dict[str, float], list[Rollout]]:
    """Sample, score, update, sync. Returns metrics and the responses of all ranks."""
    metrics = {}
    with timed(metrics, "sample"):
        rollouts = sample(sampler, grader, problems, config, step)
    with timed(metrics, "sleep"):
        sampler.sleep()
    with timed(metrics, "score"):
        rollouts = score(grader, problems, rollouts, config)
    with timed(metrics, "update"):
        updates = split_updates(rollouts, config, step, dist.get_world_size())
        batches = [[collate(rows) for rows in ranks[dist.get_rank()]] for ranks in updates]
        metrics |= update(model, optimizer, batches, config)
    with timed(metrics, "sync"):
        sampler.wake(model)
    metrics |= all_reduce({"timeouts": grader.timeouts, "errors": grader.errors})
    return metrics | summarize(rollouts, config.samples_per_prompt), rollouts


def train(config: Config, tokenizer, problems: list[Problem], held_out: list[Problem],
          dropped: dict[str, int]) -> None:
    """A whole run, from what `prepare` returned."""
    model, optimizer, sampler, grader = start(config)
    rank = dist.get_rank()
    writer = start_log(config, dropped) if rank == 0 else None
    bar = tqdm(range(config.steps + 1), desc=config.name, disable=rank > 0)
    for step in bar:
        metrics, rollouts = {"step": step}, []
        milestone = step % config.eval_every == 0 or step == config.steps
        if milestone and step > 0:
            save_checkpoint(full_weights(model, model.config.dtype), model, tokenizer,
                            config.folder / "model")
        if milestone and held_out:
            with timed(metrics, "eval"):
                scores = evaluate(sampler, grader, held_out, config.max_response_tokens)
            metrics |= {f"eval_{key}": value for key, value in scores.items()}
        if step < config.steps:
            learned, rollouts = train_step(config, step, problems, model, optimizer, sampler,
                                           grader)
            metrics |= learned
        if rank == 0 and len(metrics) > 1:
            record(config, metrics, problems, rollouts, writer)
            shown = {key: metrics.get(key) for key in ("reward", "length", "gap", "eval_accuracy")}
            bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items() if v is not None})
    grader.close()
    sampler.close()
    if rank == 0:
        plot_curves(config.folder)


# ------------------------------------------------------------------------------- the command

TOY = "runs/toy-base"
MATH = "nlile/hendrycks-MATH-benchmark"
PRESETS = {
    "toy": ("a 0.2M-parameter model learns arithmetic: minutes on two CPU cores", Config(
        name="toy", model=f"{TOY}/model", dataset=f"{TOY}/train.jsonl", template="none",
        eval_dataset=f"{TOY}/test.jsonl", eval_every=10, steps=40, prompts_per_step=32,
        responses_per_update=64, max_prompt_tokens=64, max_response_tokens=72, lr=3e-4,
        activation_checkpointing=False, gpus=1)),
    "gsm8k-0.5b": ("Qwen2.5-0.5B on GSM8K, on one 24 GB GPU", Config(
        name="gsm8k-0.5b", model="Qwen/Qwen2.5-0.5B", dataset="openai/gsm8k", subset="main",
        problem_column="question", eval_dataset="openai/gsm8k", steps=200, prompts_per_step=32,
        max_prompt_tokens=512, max_response_tokens=512, gpus=1)),
    "math-1.5b": ("Qwen2.5-Math-1.5B on MATH, the paper's settings", Config(
        name="math-1.5b", model="Qwen/Qwen2.5-Math-1.5B", dataset=MATH, eval_dataset=MATH)),
    "math-7b": ("Qwen2.5-Math-7B on MATH levels 3-5: the paper's recipe, for 8 GPUs", Config(
        name="math-7b", model="Qwen/Qwen2.5-Math-7B", dataset=MATH, levels=(3, 4, 5),
        eval_dataset=MATH)),
    "llama-3b-r1": ("Llama-3.2-3B-NuminaQA on MATH with the R1 template, as in the paper", Config(
        name="llama-3b-r1", model="lkevinzc/Llama-3.2-3B-NuminaQA", dataset=MATH, template="r1",
        eval_dataset=MATH)),
}


def main() -> None:
    try:
        config = tyro.extras.overridable_config_cli(PRESETS, description=__doc__)
        if config.model.startswith(TOY):
            from toy import make_toy

            make_toy(TOY)
        prepared = prepare(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if config.plan:
        from benchmarks.plan import plan

        print(plan(config, *prepared))
    else:
        train(config, *prepared)


if __name__ == "__main__":
    main()
