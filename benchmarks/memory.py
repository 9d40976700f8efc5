"""What plan.py says that the learner needs, beside what it took: a table in Markdown.

    MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/memory.py --shape 10m
    MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/memory.py --shape 0.5b --tokens 1024

The policy alone, without an engine, makes a round of two updates of several micro-batches on random
ids. Memory is the process's (on a GPU the device's), above what it was before the policy was made:
at rest after a round, and at its highest in the next one. With the setting above the C library
gives large blocks back as soon as they are free.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import drgrpo
import plan
from benchmarks.shapes import SHAPES, make_model
from benchmarks.step import Watch, memory_in_use
from support.metrics import markdown, versions
from support.ranks import start_ranks


@dataclass(frozen=True)
class Options:
    """Compare the plan's memory with a learner's."""

    shape: str = "10m"  # of shapes.py
    tokens: int = 4096  # of a micro-batch
    micro_batches: int = 2  # of an update
    activation_checkpointing: bool = False


def make_rollouts(count: int, tokens: int, vocabulary: int) -> list[drgrpo.Rollout]:
    """Rows of so many random ids, a quarter of them the prompt, with an advantage."""
    draw, prompt = random.Random(0), tokens // 4
    rollouts = []
    for place in range(count):
        ids = [draw.randrange(vocabulary) for _ in range(tokens)]
        sampled = [-1.0] * (tokens - prompt)
        advantage = 0.5 if place % 2 else -0.5
        row = drgrpo.Rollout(place, ids[:prompt], ids[prompt:], sampled, advantage=advantage)
        rollouts.append(row)
    return rollouts


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.shape not in SHAPES:
        sys.exit(f"error: --shape must be one of {', '.join(SHAPES)}")
    rows, updates = 4 * options.micro_batches, 2  # 4 rows in a micro-batch
    config = plan.PlanConfig(
        name="memory",
        model=make_model(options.shape),
        dataset="",
        prompts_per_step=updates * rows // 2,
        samples_per_prompt=2,
        responses_per_update=rows,
        max_prompt_tokens=options.tokens // 16,
        max_response_tokens=options.tokens // 4 - options.tokens // 16,
        tokens_per_microbatch=options.tokens,
        activation_checkpointing=options.activation_checkpointing,
        max_gap=100.0,
        dtype=drgrpo.DTYPE,
        gpus=1,
    )
    start_ranks(training=True)
    before, watch = memory_in_use(), Watch()
    policy = drgrpo.make_policy(config)
    optimizer = torch.optim.AdamW(policy.parameters(), config.lr, fused=True)
    rollouts = make_rollouts(updates * rows, options.tokens // 4, policy.model.config.vocab_size)
    for step in range(2):  # Adam's moments are there after the first
        batches = drgrpo.split_updates(rollouts, config, step, 0, 1)
        with watch({}, f"round {step}"):
            drgrpo.update(policy, optimizer, batches, config)
        rest = memory_in_use()
    parts = plan.learner_memory(
        config, plan.meta_model(config.model, config.dtype), len(batches[0])
    )
    table = [[name, f"{size / 1e9:.2f}", ""] for name, size, _ in parts]
    gib = 2**30 / 1e9
    at_rest = sum(size for name, size, _ in parts if name in ("master weights", "Adam's moments"))
    at_most = sum(size for _, size, _ in parts)
    measured_rest, measured_most = rest - before, watch.peaks["round 1"] - before
    table.append(["at rest", f"{at_rest / 1e9:.2f}", f"{measured_rest * gib:.2f}"])
    table.append(["at most", f"{at_most / 1e9:.2f}", f"{measured_most * gib:.2f}"])
    print(markdown(["part", "planned (GB)", "measured (GB)"], table))
    print(f"\n{config.dtype}; " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
