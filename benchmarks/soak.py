"""A long run of the toy: does it keep its memory, files and processes? A table in Markdown.

    python benchmarks/soak.py --steps 300

Samples a second apart, and the largest of each stretch of steps: memory of the trainer (with the
engine, which is in the same process) and of its grader workers, open files, threads, processes.
`flat` compares the last stretch with the second: the first one warms up. At the end no process of
the run may be left.
"""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.metrics import markdown, read_rows, versions

COLUMNS = ("trainer (MiB)", "workers (MiB)", "open files", "threads", "processes")


@dataclass(frozen=True)
class Options:
    """Watch a long run."""

    steps: int = 300
    stretch: int = 50  # steps of a line of the table
    name: str = "soak"  # of the run; one that is there already must be removed


def look(trainer: psutil.Process) -> tuple[float, ...]:
    """What the run holds now, in the order of COLUMNS."""
    workers = 0.0
    children = trainer.children(recursive=True)
    for child in children:
        try:
            workers += child.memory_info().rss
        except psutil.NoSuchProcess:  # it ended since
            pass
    own = trainer.memory_info().rss
    return own / 2**20, workers / 2**20, trainer.num_fds(), trainer.num_threads(), 1 + len(children)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    folder = Path("runs", options.name)
    if folder.exists():
        sys.exit(f"error: {folder} is there: remove it, or choose a --name")
    command = [sys.executable, "drgrpo.py", "toy", "--name", options.name]
    command += ["--steps", str(options.steps), "--eval-every", str(options.stretch)]
    most: dict[int, list[float]] = {}
    family: set[psutil.Process] = set()
    folder.parent.mkdir(exist_ok=True)
    with Path("runs", f"{options.name}.log").open("w") as log, tqdm(total=options.steps) as bar:
        run = subprocess.Popen(command, stdout=log, stderr=log)
        trainer = psutil.Process(run.pid)
        while run.poll() is None:
            time.sleep(1)
            step = len(read_rows(folder / "metrics.jsonl"))
            bar.update(min(step, options.steps) - bar.n)
            try:
                family |= set(trainer.children(recursive=True))
                found = list(look(trainer))
            except psutil.NoSuchProcess:
                break
            stretch = min(step, options.steps - 1) // options.stretch
            before = most.get(stretch, [0.0] * len(found))
            most[stretch] = [max(pair) for pair in zip(before, found, strict=True)]
        code = run.wait()
    time.sleep(2)
    left = [process for process in family if process.is_running()]
    rows = []
    for stretch, found in sorted(most.items()):
        first = stretch * options.stretch
        rows.append([f"{first} to {first + options.stretch - 1}", *(f"{x:.0f}" for x in found)])
    stretches = sorted(most)
    growth = ["flat"]
    for start, end in zip(most[stretches[1]], most[stretches[-1]], strict=True):
        growth.append(f"{end / start - 1:+.1%}")
    print(markdown(["steps", *COLUMNS], [*rows, growth]))
    print(
        f"\nExit code {code}; {len(left)} processes left of {len(family)}. "
        + ", ".join(f"{package} {number}" for package, number in versions().items())
    )
    sys.exit(1 if code or left else 0)


if __name__ == "__main__":
    main()
