"""Training runs that the findings share: each is trained once, two of them at a time.

A run is one `python drgrpo.py toy ...` in runs/findings-NAME-SEED. A finished one is taken as it
is, also if the code has changed since: `rm -r runs/findings-*` to train all of them again. One that
was stopped goes on. One with other settings is removed and trained again.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from filelock import FileLock
from tqdm import tqdm

from support.checkpoint import read_json
from support.metrics import read_rows

ROOT = Path(__file__).resolve().parents[1]
TOY_BASE = Path("runs/toy-base")
# A run of the toy on one thread takes little longer than on two, so two run side by side.
AT_ONCE = 2
THREADS = 1
STEPS = 40  # of the preset `toy`
EVAL_EVERY = 5  # steps; a greedy pass over the 500 held-out problems takes about a second
SEEDS = 8  # with 5 seeds no exact paired test can give a two-sided p below 0.06


@dataclass(frozen=True, eq=False)  # so that a run can be a key of a dict
class Run:
    """One training run of the toy: what is changed in the preset, and the seed."""

    name: str
    seed: int
    settings: dict = field(default_factory=dict)  # a Config's field -> its value

    @property
    def folder(self) -> Path:
        return Path("runs", f"findings-{self.name}-{self.seed}")

    @property
    def wanted(self) -> dict:
        """Settings that the run's config.json must have."""
        return self.settings | {"seed": self.seed, "eval_every": EVAL_EVERY}

    @property
    def arguments(self) -> list[str]:
        """What follows `python` on the command line."""
        words = ["drgrpo.py", "toy", "--name", self.folder.name, "--seed", str(self.seed)]
        # One worker grades fast enough, and each takes seconds of a core to start
        words += ["--eval-every", str(EVAL_EVERY), "--grader-workers", "1"]
        for key, value in self.settings.items():
            option = "--" + key.replace("_", "-")
            words += [option] if value is True else [option, str(value)]
        return words

    @property
    def command(self) -> str:
        return shlex.join(["python", *self.arguments])

    def metrics(self) -> list[dict]:
        """The rows of metrics.jsonl, one a step."""
        return read_rows(self.folder / "metrics.jsonl")

    def samples(self) -> list[dict]:
        """The rows of samples.jsonl, one a response; G responses to a problem stand together."""
        return read_rows(self.folder / "samples.jsonl")

    def state(self) -> Literal["none", "other", "begun", "finished"]:
        """How far the run in this folder is; "other" if it has other settings."""
        run = read_json(self.folder / "config.json")
        if run is None:
            return "none"
        settings = run.get("settings", {})
        if any(settings.get(key) != value for key, value in self.wanted.items()):
            return "other"
        return "finished" if run["finished"] == settings["steps"] else "begun"


def train(runs: list[Run]) -> list[Run]:
    """See to it that all these runs are finished. Returns them.

    Raises RuntimeError with the end of its log if one of them fails.
    """
    os.chdir(ROOT)  # the preset names its files relative to the repository
    Path("runs").mkdir(exist_ok=True)
    with FileLock("runs/.findings.lock"):  # two findings at once would train the same runs
        make_toy_base()
        waiting = [run for run in runs if run.state() != "finished"]
        if waiting:
            train_all(waiting)
    return runs


def make_toy_base() -> None:
    """Pre-train the toy base model if it is not there."""
    if not TOY_BASE.exists():
        subprocess.run([sys.executable, "toy.py"], check=True)


def train_all(waiting: list[Run]) -> None:
    """Train these, AT_ONCE at a time, beside a progress bar that counts the steps of all."""
    waiting, total = list(waiting), len(waiting)
    running: dict[Run, subprocess.Popen] = {}
    done = 0
    with tqdm(total=total * STEPS, unit="step", desc="training") as bar, ends(running):
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                run = waiting.pop(0)
                running[run] = start(run)
            time.sleep(1)
            for run in [run for run, process in running.items() if process.poll() is not None]:
                running.pop(run)
                if run.state() != "finished":
                    raise RuntimeError(f"{run.command} failed:\n{tail(run)}")
                done += 1
            steps = done * STEPS + sum(len(run.metrics()) for run in running)
            bar.update(min(steps, bar.total) - bar.n)
            bar.set_postfix_str(f"{done} of {total} runs; now " + ", ".join(map(label, running)))


def label(run: Run) -> str:
    return f"{run.name}-{run.seed}"


def start(run: Run) -> subprocess.Popen:
    """Begin a run, or go on with one that was stopped. What it prints goes to log.txt there."""
    if run.state() != "begun":
        shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "log.txt").open("a") as log:
        return subprocess.Popen(
            [sys.executable, *run.arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(THREADS)},
        )


def tail(run: Run) -> str:
    return (run.folder / "log.txt").read_text()[-2000:]


@contextmanager
def ends(running: dict[Run, subprocess.Popen]) -> Iterator[None]:
    """End what still runs when the block is left, also by an error or Ctrl-C."""
    try:
        yield
    finally:
        for process in running.values():
            process.terminate()
            process.wait()
