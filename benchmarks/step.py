"""One whole step of `drgrpo.train_step`, taken apart: seconds, tokens/s, memory, real tokens, MFU.

    python benchmarks/step.py --shape 10m --longest 512
    torchrun --nproc-per-node 8 -- benchmarks/step.py --shape 7b --prompts 128 --updates 8

The model has random weights, so the lengths of the responses are fixed beforehand: those of
`shapes.length_mix`, alike in a group; everything else is the trainer's own code. Each response gets
a boxed fraction to be graded, every second one of a group right. The first steps warm up and do
not count; the table has the median of the others. `--save` adds the figures to
benchmarks/measured.jsonl, from which plan.py takes the hours of a run.

The learner's model FLOPs: 6 * (tokens * weights of the layers + response tokens * weights of the
head + layers * heads * head_dim * sum of length^2), the last for causal attention; what activation
checkpointing computes again is not counted. MFU is these over the seconds of the update (without
the pass for old log-probs) and the peak: a GPU's dense bf16 figure from its data sheet, a CPU's
best matrix product in fp32 here.
"""

import json
import os
import platform
import random
import shlex
import statistics
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import drgrpo
from benchmarks.shapes import SHAPES, length_mix, make_model, make_problems, response_text
from support.metrics import markdown, versions
from support.ranks import all_reduce

MEASURED = Path(__file__).with_name("measured.jsonl")
PEAK_FLOPS = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, data sheets


@dataclass(frozen=True)
class Options:
    """Measure one step of a model shape."""

    shape: str = "10m"  # of shapes.py: toy, 10m, 0.5b, 1.5b, 7b
    prompts: int = 8  # a step, over all ranks
    samples: int = 8  # responses to each
    updates: int = 1  # optimizer steps a round
    longest: int = 3000  # limit of a response, in tokens
    equal: bool = False  # all responses have this length, in place of a mix
    prompt_tokens: int = 150
    tokens_per_microbatch: int = 16384
    activation_checkpointing: bool = False
    offload: bool = False
    compile: bool = False
    warmup: int = 1  # steps that do not count
    steps: int = 3  # that do
    plain: bool = True  # afterwards, sample with plain vLLM in turns with ours
    save: bool = False  # add the figures to benchmarks/measured.jsonl
    json: bool = False  # print the figures as one line of JSON, in place of the table


class Answering(drgrpo.Sampler):
    """A sampler whose random responses get an answer each, every second one of a group right."""

    def generate(
        self,
        problems,
        seeds,
        n,
        max_tokens,
        temperature,
        stop,
        finished=lambda place, group: None,
    ):
        def answer(place, group):
            draw = random.Random(seeds[place])
            for j, rollout in enumerate(group):
                rollout.text = response_text(problems[place].answers[0], j % 2 == 0, draw)
                rollout.finish_reason = "stop"  # so that none counts as truncated
            finished(place, group)

        return super().generate(problems, seeds, n, max_tokens, temperature, stop, answer)


class FixedLengths(Answering):
    """A sampler whose responses to each problem have the length that the mix says."""

    given_back: float | None = (
        None  # share of the GPU memory that the engine held which sleep gives back
    )
    tail = 0.0  # share of the last sampling in which under an eighth of the sequences were left
    equal = False  # whether all responses have the longest length, in place of the mix

    def lengths(self, count: int, longest: int) -> list[int]:
        """This rank's, one for each of its problems."""
        rank, world = dist.get_rank(), dist.get_world_size()
        return [longest] * count if self.equal else length_mix(count * world, longest)[rank::world]

    def __init__(self, *args, **kwargs):
        self.without_engine = memory_in_use()
        super().__init__(*args, **kwargs)

    def sleep(self):
        awake = memory_in_use()
        super().sleep()
        if drgrpo.CUDA and self.given_back is None:  # later the policy has taken memory, too
            self.given_back = (awake - memory_in_use()) / (awake - self.without_engine)

    def plain(self, problems, n, max_tokens, temperature):
        """The same responses from vLLM as it comes, without log-probs."""
        from vllm import SamplingParams, TokensPrompt

        params = [
            SamplingParams(n=n, temperature=temperature, max_tokens=length, ignore_eos=True)
            for length in self.lengths(len(problems), max_tokens)
        ]
        self.llm.generate(
            [TokensPrompt(prompt_token_ids=p.prompt_ids) for p in problems], params, use_tqdm=False
        )

    def generate(self, problems, seeds, n, max_tokens, *others):
        engine, lengths = self.llm.llm_engine, self.lengths(len(problems), max_tokens)
        add_request = engine.add_request

        def add_fixed(key, prompt, params):
            params.max_tokens, params.ignore_eos = lengths[int(key)], True
            return add_request(key, prompt, params)

        run_step, in_tail = engine.step, 0.0

        def step_timed():
            nonlocal in_tail
            few = engine.get_num_unfinished_requests() < len(problems) * n / 8
            start = time.perf_counter()
            outputs = run_step()
            in_tail += time.perf_counter() - start if few else 0.0
            return outputs

        engine.add_request, engine.step = add_fixed, step_timed
        start = time.perf_counter()
        groups = super().generate(problems, seeds, n, max_tokens, *others)
        self.tail = in_tail / (time.perf_counter() - start)
        del engine.add_request, engine.step
        return groups


def memory_in_use() -> float:
    """GiB: on a GPU all that is taken from the device, by vLLM too; on a CPU this process's."""
    if drgrpo.CUDA:  # any thread may ask, and only the main one has a current device
        free, total = torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", 0)))
        return (total - free) / 2**30
    return psutil.Process().memory_info().rss / 2**30


class Watch:
    """Replaces `drgrpo.timed`: notes the highest memory in use in each phase, too."""

    def __init__(self):
        self.peaks, self.phase, self.timed = {}, [], drgrpo.timed
        threading.Thread(target=self.sample, daemon=True).start()

    def note(self) -> None:
        for phase in list(self.phase):
            self.peaks[phase] = max(self.peaks.get(phase, 0.0), memory_in_use())

    def sample(self) -> None:
        while True:
            self.note()
            time.sleep(0.02)

    @contextmanager
    def __call__(self, metrics, phase):
        self.phase.append(phase)
        with self.timed(metrics, phase):
            yield
        self.note()
        self.phase.remove(phase)


def model_flops(shape, rollouts) -> float:
    """Of the forward and backward pass over these rollouts; the formula is above."""
    config = shape.config
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    body = sum(p.numel() for p in shape.get_decoder().layers.parameters())
    head = config.vocab_size * config.hidden_size
    tokens = sum(map(len, rollouts))
    responses = sum(len(r.response_ids) for r in rollouts)
    squares = sum(len(r) ** 2 for r in rollouts)
    return 6 * (body * tokens + head * responses + config.num_hidden_layers * width * squares)


def peak_flops() -> tuple[str, float]:
    """The device's name, and its peak: from the data sheet, or the best of some products here."""
    if drgrpo.CUDA:
        name = torch.cuda.get_device_name()
        return name, next((flops for key, flops in PEAK_FLOPS.items() if key in name), float("nan"))
    a, best = torch.randn(2048, 2048), 0.0
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        best = max(best, 2 * 2048**3 / (time.perf_counter() - start))
    return f"{torch.get_num_threads()} threads of a {platform.machine()} CPU", best


class Passes:
    """Counts the tokens that the model is asked for, and those that go through its layers."""

    def __init__(self, policy):
        self.real = self.processed = 0
        policy.register_forward_pre_hook(self.asked)
        decoder = policy.model.get_decoder()
        self.forward, decoder.forward = decoder.forward, self.computed

    def asked(self, policy, inputs):
        mask = inputs[1].bool()  # (B, T-1): up to the last response token, the padding left out
        self.real += sum(int(row.nonzero()[-1]) + 2 if row.any() else 1 for row in mask)

    def computed(self, ids, **others):
        self.processed += ids.numel()
        return self.forward(ids, **others)


def make_config(options: Options) -> drgrpo.Config:
    n = options.prompts * options.samples
    return drgrpo.Config(
        name="step",
        model=make_model(options.shape),
        dataset="",
        template="none",
        prompts_per_step=options.prompts,
        samples_per_prompt=options.samples,
        responses_per_update=n // options.updates,
        max_prompt_tokens=options.prompt_tokens,
        max_response_tokens=options.longest,
        max_gap=10.0,  # random weights in bf16: not the point
        tokens_per_microbatch=options.tokens_per_microbatch,
        offload=options.offload,
        activation_checkpointing=options.activation_checkpointing,
        compile=options.compile,
    )


def figures(metrics: dict, rollouts: list) -> dict[str, float]:
    """Of one step."""
    seconds = {k: v for k, v in metrics.items() if k.startswith("seconds_")}
    old = seconds["seconds_old_logprobs"]  # part of the update
    learn, trained = seconds["seconds_update"] - old, [r for r in rollouts if r.advantage != 0]
    sampled, tokens = sum(len(r.response_ids) for r in rollouts), sum(map(len, trained))
    return seconds | {
        "seconds_step": sum(seconds.values()) - old,
        "sampled": sampled,
        "trained": tokens,
        "sample_tokens_per_s": sampled / seconds["seconds_sample"],
        "update_tokens_per_s": tokens / learn,
        "seconds_learn": learn,
        "gap": metrics["gap"],
    }


def measure(options: Options) -> tuple[dict, dict[str, float]]:
    """What was measured, medians over the steps; and GiB by phase."""
    config, (device, peak) = make_config(options), peak_flops()
    watch = Watch()
    drgrpo.Sampler, drgrpo.timed = FixedLengths, watch  # type: ignore[misc]
    FixedLengths.equal = options.equal
    policy, optimizer, sampler, grader = drgrpo.start(config)
    assert isinstance(sampler, FixedLengths)
    ranks, passes = dist.get_world_size(), Passes(policy)
    problems, rows = make_problems(options.prompts, options.prompt_tokens), []
    steps = range(options.warmup + options.steps)
    for step in tqdm(steps, desc=options.shape, disable=dist.get_rank() > 0):
        metrics, rollouts = drgrpo.train_step(
            config, step, problems, policy, optimizer, sampler, grader
        )
        rows.append(figures(metrics, rollouts) | {"tail": sampler.tail})
    counted = rows[options.warmup :]
    result: dict = {key: statistics.median(row[key] for row in counted) for key in rows[0]}
    flops = model_flops(policy.model, [r for r in rollouts if r.advantage != 0])
    tokens = all_reduce({"real": passes.real, "processed": passes.processed})
    result |= {
        "device": device,
        "parameters": sum(p.numel() for p in policy.parameters()),
        "ranks": ranks,
        "given_back": sampler.given_back,
        "real_tokens": tokens["real"] / tokens["processed"],
        "mfu": flops / result["seconds_learn"] / peak / ranks,
        "against_plain": None,
    }
    if options.plain:
        result["against_plain"] = against_plain_vllm(sampler, problems[::ranks], config)
    result["is_rank_0"] = dist.get_rank() == 0
    grader.close()
    sampler.close()
    return vars(options) | result, watch.peaks


def against_plain_vllm(sampler: FixedLengths, problems: list, config: drgrpo.Config) -> float:
    """Tokens/s of our sampler over those of plain vLLM: best of three each, in turns. Ours has to
    return log-probs and takes a seed a request; plain vLLM decodes token by token."""
    args = config.samples_per_prompt, config.max_response_tokens, 1.0
    ours, plain = [], []
    for turn in range(6):
        sampler.llm.reset_prefix_cache()
        start = time.perf_counter()
        if turn % 2:
            sampler.plain(problems, *args)
            plain.append(time.perf_counter() - start)
        else:
            sampler.generate(problems, list(range(len(problems))), *args, ())
            ours.append(time.perf_counter() - start)
    return min(plain) / min(ours)


def report(result: dict, peaks: dict[str, float]) -> str:
    whole = result["seconds_step"]
    tokens = {
        "sample": result["sampled"],
        "update": result["trained"],
        "old_logprobs": result["trained"] * (1 - 1 / result["updates"]),  # not for the first
    }
    rows = []
    for phase in ("sample", "sleep", "score", "update", "old_logprobs", "sync"):
        seconds = result[f"seconds_{phase}"]
        if phase != "old_logprobs" or result["updates"] > 1:
            rate = f"{tokens[phase] / seconds:.0f}" if phase in tokens else ""
            name = {
                "old_logprobs": "- of it old log-probs",
                "score": "waiting for the grader",
                "sync": "wake and sync",
            }.get(phase, phase)
            rows.append(
                [name, f"{seconds:.3f}", f"{seconds / whole:.1%}", rate, f"{peaks[phase]:.2f}"]
            )
    rows.append(["whole step", f"{whole:.3f}", "", f"{result['sampled'] / whole:.0f}", ""])
    return (
        markdown(["phase", "seconds", "share", "tokens/s", "peak memory (GiB)"], rows)
        + f"\n\nReal tokens among processed: {result['real_tokens']:.1%}. Learner: "
        f"{result['update_tokens_per_s']:.0f} tokens/s, MFU {result['mfu']:.1%}. "
        + (
            f"Sampling: {result['against_plain']:.1%} of plain vLLM's tokens/s. "
            if result["against_plain"] is not None
            else ""
        )
        + (
            f"Memory given back asleep: {result['given_back']:.1%}. "
            if result["given_back"] is not None
            else ""
        )
        + f"The tail, with under an eighth of the sequences in flight, is {result['tail']:.1%} of "
        f"the sampling. Gap {result['gap']:.2g}. {result['device']}, {result['ranks']} rank(s); "
        + ", ".join(f"{k} {v}" for k, v in versions().items())
    )


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.shape not in (*SHAPES, "toy"):
        sys.exit(f"error: --shape must be one of toy, {', '.join(SHAPES)}")
    result, peaks = measure(options)
    if result.pop("is_rank_0"):
        print(json.dumps(result) if options.json else report(result, peaks))
        if options.save:
            source = {
                "command": shlex.join(["python", "benchmarks/step.py", *sys.argv[1:]]),
                "date": time.strftime("%Y-%m-%d"),
                "versions": versions(),
            }
            with MEASURED.open("a") as out:
                out.write(json.dumps(result | source) + "\n")


if __name__ == "__main__":
    main()
