"""One whole step of `drgrpo.train_step`, taken apart: seconds, tokens/s, memory, real tokens, MFU.

    python benchmarks/step.py --shape 10m --longest 512
    torchrun --nproc-per-node 8 -- benchmarks/step.py --shape 7b --prompts 128 --updates 8

The model has random weights, so the lengths of the responses are fixed beforehand: those of
`shapes.length_mix`, alike in a group; everything else is the trainer's own code. Each response gets
a boxed fraction to be graded, every second one of a group right. The first steps warm up and do
not count; the table has the median of the others.

The learner's model FLOPs: 6 * (tokens * weights of the layers + response tokens * weights of the
head + layers * heads * head_dim * sum of length^2), the last for causal attention; what activation
checkpointing computes again is not counted. MFU is these over the seconds of the update (without
the pass for old log-probs) and the peak: a GPU's dense bf16 figure from its data sheet, a CPU's
best matrix product in fp32 here.
"""

import json
import platform
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import drgrpo
from benchmarks.shapes import SHAPES, length_mix, make_model, make_problems, response_text
from plan import Watch
from support.records import markdown, versions
from support.run import all_reduce

PEAK_FLOPS = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, data sheets
EOS = 0  # of the random models


@dataclass(frozen=True)
class Options:
    """Measure one step of a model shape."""

    shape: str = "10m"  # of shapes.py: toy, 10m, 0.5b, 1.5b, 7b
    prompts: int = 8  # a step, over all ranks
    samples: int = 8  # responses to each
    updates: int = 1  # optimizer steps a step
    longest: int = 3000  # limit of a response, in tokens
    prompt_tokens: int = 150
    tokens_per_microbatch: int = 16384
    activation_checkpointing: bool = False
    offload: bool = False
    warmup: int = 1  # steps that do not count
    steps: int = 3  # that do
    json: bool = False  # print the figures as one line of JSON, in place of the table


class Answering(drgrpo.Sampler):
    """A sampler whose random responses get an answer each, every second one of a group right."""

    def generate(self, problems, seeds, n, max_tokens, temperature, stop):
        groups = super().generate(problems, seeds, n, max_tokens, temperature, stop)
        for problem, seed, group in zip(problems, seeds, groups, strict=True):
            draw = random.Random(seed)
            for place, rollout in enumerate(group):
                rollout.text = response_text(problem.answers[0], place % 2 == 0, draw)
                rollout.finish_reason = "stop"  # so that none counts as truncated
                rollout.response_ids[-1] = EOS
        return groups


class FixedLengths(Answering):
    """A sampler whose responses to each problem have the length that the mix says."""

    def generate(self, problems, seeds, n, max_tokens, temperature, stop):
        rank, world = dist.get_rank(), dist.get_world_size()
        lengths = length_mix(len(problems) * world, max_tokens)[rank::world]
        llm_generate = self.llm.generate

        def fixed(prompts, params, **options):
            for one, length in zip(params, lengths, strict=True):
                one.max_tokens, one.ignore_eos, one.stop_token_ids = length, True, []
            return llm_generate(prompts, params, **options)

        self.llm.generate = fixed
        try:
            return super().generate(problems, seeds, n, max_tokens, temperature, stop)
        finally:
            self.llm.generate = llm_generate


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

    def share(self) -> float:
        """Real tokens among those that went through the layers, of all ranks."""
        tokens = all_reduce({"real": self.real, "processed": self.processed})
        return tokens["real"] / tokens["processed"]


def model_flops(model, rollouts) -> float:
    """Of the forward and backward pass over these rollouts; the formula is above."""
    config = model.config
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    body = sum(p.numel() for p in model.get_decoder().layers.parameters())
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


def make_config(options: Options) -> drgrpo.Config:
    responses = options.prompts * options.samples
    return drgrpo.Config(
        name="step",
        model=make_model(options.shape),
        dataset="",
        template="none",
        prompts_per_step=options.prompts,
        samples_per_prompt=options.samples,
        responses_per_update=responses // options.updates,
        max_prompt_tokens=options.prompt_tokens,
        max_response_tokens=options.longest,
        max_gap=100.0,  # the last token is exchanged for EOS
        tokens_per_microbatch=options.tokens_per_microbatch,
        offload=options.offload,
        activation_checkpointing=options.activation_checkpointing,
    )


def figures(metrics: dict, rollouts: list) -> dict[str, float]:
    """Of one step."""
    seconds = {k: v for k, v in metrics.items() if k.startswith("seconds_")}
    old = seconds["seconds_old_logprobs"]  # part of the update
    trained = [rollout for rollout in rollouts if rollout.advantage != 0]
    return seconds | {
        "seconds_step": sum(seconds.values()) - old,
        "seconds_learn": seconds["seconds_update"] - old,
        "sampled": sum(len(rollout.response_ids) for rollout in rollouts),
        "trained": sum(map(len, trained)),
    }


def measure(options: Options) -> dict:
    """What was measured: medians over the steps; `peaks` are bytes by phase."""
    config, (device, peak) = make_config(options), peak_flops()
    watch = Watch()
    drgrpo.Sampler, drgrpo.timed = FixedLengths, watch  # type: ignore[misc,assignment]
    with drgrpo.start(config) as (policy, optimizer, sampler, grader):
        passes = Passes(policy)
        problems, rows = make_problems(options.prompts, options.prompt_tokens), []
        for step in tqdm(range(options.warmup + options.steps), disable=dist.get_rank() > 0):
            metrics, rollouts = drgrpo.train_step(
                config, step, problems, policy, optimizer, sampler, grader
            )
            rows.append(figures(metrics, rollouts))
        counted = rows[options.warmup :]
        result: dict = {key: statistics.median(row[key] for row in counted) for key in rows[0]}
        flops = model_flops(policy.model, [r for r in rollouts if r.advantage != 0])
        return result | {
            "rank": dist.get_rank(),
            "ranks": dist.get_world_size(),
            "device": device,
            "real_tokens": passes.share(),
            "mfu": flops / result["seconds_learn"] / peak / dist.get_world_size(),
            "peaks": watch.peaks,
        }


def report(result: dict) -> str:
    whole = result["seconds_step"]
    names = {"score": "waiting for the grader", "learn": "- of it learning"}
    names |= {"sync": "wake and sync"}
    rows = []
    for phase in ("sample", "sleep", "score", "update", "learn", "sync"):
        seconds = result[f"seconds_{phase}"]
        tokens = {"sample": result["sampled"], "learn": result["trained"]}.get(phase)
        rate = f"{tokens / seconds:.0f}" if tokens else ""
        peak = f"{result['peaks'][phase] / 2**30:.2f}" if phase in result["peaks"] else ""
        name = names.get(phase, phase)
        rows.append([name, f"{seconds:.3f}", f"{seconds / whole:.1%}", rate, peak])
    rows.append(["whole step", f"{whole:.3f}", "", f"{result['sampled'] / whole:.0f}", ""])
    table = markdown(["phase", "seconds", "share", "tokens/s", "peak memory (GiB)"], rows)
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"{table}\n\nReal tokens among processed: {result['real_tokens']:.1%}. Learner's MFU "
        f"{result['mfu']:.1%}. {result['device']}, {result['ranks']} rank(s); {packages}"
    )


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.shape not in (*SHAPES, "toy"):
        sys.exit(f"error: --shape must be one of toy, {', '.join(SHAPES)}")
    result = measure(options)
    if result["rank"] == 0:
        print(json.dumps(result) if options.json else report(result))


if __name__ == "__main__":
    main()
