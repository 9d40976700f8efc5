"""What a step costs as responses get longer, groups larger and ranks more: a table in Markdown.

    python benchmarks/scaling.py --shape 10m

Each line is a run of benchmarks/step.py in which all responses have one length. Lengths: the same
number of response tokens each, so a column that stays flat is linear in the length. Groups: the
same prompts with more responses. Ranks: the same work on more processes; on a CPU they have one
thread each.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.metrics import markdown, versions

STEP = Path(__file__).with_name("step.py")


@dataclass(frozen=True)
class Options:
    """Measure how the cost grows."""

    shape: str = "10m"  # of shapes.py
    tokens: int = 16384  # of responses, in each line of lengths
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    groups: tuple[int, ...] = (2, 4, 8, 16, 32)
    ranks: tuple[int, ...] = (1, 2)
    steps: int = 1  # that count, a line


def run(options: Options, ranks: int | None = None, **settings: int) -> dict:
    """What step.py measured, on so many ranks of one thread or, by default, on one of them all."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--"]
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    command = [
        sys.executable,
        *(launcher if ranks else []),
        str(STEP),
        "--shape",
        options.shape,
        "--equal",
        "--json",
        "--no-plain",
        "--steps",
        str(options.steps),
        *arguments,
    ]
    threads = {"OMP_NUM_THREADS": "1"} if ranks else {}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    print(f"done: {settings}, ranks: {ranks}", file=sys.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def line(name: str, row: dict) -> list[str]:
    sampled, trained = (
        1e6 * row[f"seconds_{phase}"] / row[tokens]
        for phase, tokens in (("sample", "sampled"), ("learn", "trained"))
    )
    return [
        name,
        f"{row['sampled']:.0f}",
        f"{row['seconds_sample']:.2f}",
        f"{sampled:.0f}",
        f"{row['trained']:.0f}",
        f"{row['seconds_learn']:.2f}",
        f"{trained:.0f}",
        f"{row['mfu']:.0%}",
        f"{row['seconds_step']:.2f}",
    ]


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    rows = [
        line(
            f"length {length}",
            run(options, longest=length, samples=2, prompts=max(1, options.tokens // length // 2)),
        )
        for length in options.lengths
    ]
    rows += [
        line(f"group of {group}", run(options, longest=128, samples=group, prompts=4))
        for group in options.groups
    ]
    rows += [
        line(f"{ranks} rank(s)", run(options, ranks, longest=256, samples=8, prompts=4))
        for ranks in options.ranks
    ]
    print(
        markdown(
            [
                "",
                "tokens sampled",
                "sample (s)",
                "µs a token",
                "tokens trained",
                "learn (s)",
                "µs a token",
                "MFU",
                "step (s)",
            ],
            rows,
        )
    )
    print(", ".join(f"{name} {v}" for name, v in versions().items()))


if __name__ == "__main__":
    main()
