"""What the findings share: the toy's training runs, statistics, figures, and the page.

A finding measures once and leaves results/NAME.json. Its figure and its section of README.md are
drawn and written from that file, so that no sentence can say anything but the numbers.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from support.records import read_json, read_rows, versions
from toy import make_toy

ROOT = Path(__file__).resolve().parents[1]
TOY_BASE = Path("runs/toy-base")

# -------------------------------------------------------------------------------------- runs

# A run of the toy on one thread takes little longer than on two, so two run side by side.
AT_ONCE = 2
STEPS = 40  # of the preset `toy`
EVAL_EVERY = 10  # also of the preset


@dataclass(frozen=True, eq=False)  # so that a run can be a key of a dict
class Run:
    """One training run of the toy, in runs/findings-NAME-SEED: what differs from the preset."""

    name: str
    seed: int
    settings: dict = field(default_factory=dict)  # a Config's field -> its value

    @property
    def folder(self) -> Path:
        return Path("runs", f"findings-{self.name}-{self.seed}")

    @property
    def arguments(self) -> list[str]:
        """What follows `python` on the command line."""
        words = ["drgrpo.py", "toy", "--name", self.folder.name, "--seed", str(self.seed)]
        # One worker grades fast enough, and each takes seconds of a core to start
        words += ["--grader-workers", "1"]
        for key, value in self.settings.items():
            option = "--" + key.replace("_", "-")
            words += [option] if value is True else [option, str(value)]
        return words

    @property
    def command(self) -> str:
        return shlex.join(["python", *self.arguments])

    def metric(self, key: str) -> list[float]:
        """A number for each step, or for each evaluation."""
        return [row[key] for row in read_rows(self.folder / "metrics.jsonl") if key in row]

    def samples(self) -> list[dict]:
        """The rows of samples.jsonl, one a response; G responses to a problem stand together."""
        return read_rows(self.folder / "samples.jsonl")

    def train(self) -> None:
        """Train it, unless it is finished; one that was stopped goes on. One with other settings is
        removed first. Raises RuntimeError with the end of its log if it fails."""
        there = read_json(self.folder / "config.json")
        preset = {"steps": STEPS, "eval_every": EVAL_EVERY}
        wanted = preset | self.settings | {"seed": self.seed}
        if there and any(there["settings"].get(key) != value for key, value in wanted.items()):
            shutil.rmtree(self.folder)
        elif there and there["finished"] == wanted["steps"]:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.txt").open("w") as log:
            command, one_thread = [sys.executable, *self.arguments], {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, stdout=log, stderr=log, env=os.environ | one_thread)
        if done.returncode != 0:
            end = (self.folder / "log.txt").read_text()[-2000:]
            raise RuntimeError(f"{self.command} failed:\n{end}")


def train(runs: list[Run]) -> None:
    """See to it that all these runs are finished: `rm -r runs/findings-*` trains all anew."""
    # Two findings at once would train the same runs
    with FileLock("runs/.findings.lock"), ThreadPoolExecutor(AT_ONCE) as pool:
        # If one fails, its error is raised here, and those that have not begun are left out
        list(tqdm(pool.map(Run.train, runs), "runs of the toy", len(runs)))


# ------------------------------------------------------------------------------- statistics

# Two-sided 95% quantiles of Student's t for 1, 2, 3, ... degrees of freedom
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """The mean and its 95% interval by Student's t, for 2 to 13 values."""
    half = T_95[len(values) - 2] * float(np.std(values, ddof=1)) / len(values) ** 0.5
    middle = float(np.mean(values))
    return middle, middle - half, middle + half


def sign_flip_test(differences: Sequence[float]) -> float:
    """Two-sided p of the hypothesis that differences paired by seed are as likely below 0 as above.

    Exact: all 2^n ways to flip signs are tried. p is the share of them whose sum is at least as
    far from 0 as the one that was seen, so it cannot be below 2 / 2^n.
    """
    signs = np.array(list(product((-1, 1), repeat=len(differences))))  # (2^n, n)
    sums = np.abs(signs @ np.array(differences))
    seen = abs(sum(differences))
    return float(np.mean(sums >= seen - 1e-9 * (1 + seen)))  # with room for rounding


@dataclass(frozen=True)
class Difference:
    """Of values paired by seed: the mean difference, its 95% interval, and p of the sign test."""

    mean: float
    low: float
    high: float
    p: float

    def text(self, digits: int = 1) -> str:
        mean, low, high = (f"{v:+.{digits}f}" for v in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}], p {self.p:.3f}"


def paired(values: Iterable[float], base: Iterable[float]) -> Difference:
    """values - base, one of each a seed."""
    differences = [value - other for value, other in zip(values, base, strict=True)]
    return Difference(*mean_interval(differences), sign_flip_test(differences))


# ---------------------------------------------------------------------- methods and drawing

# Colours that colour-blind readers can tell apart (Okabe and Ito's)
BLUE, RED, GREY, GREEN = "#0072B2", "#D55E00", "#666666", "#009E73"


@dataclass(frozen=True)
class Method:
    """One of the four losses: the two divisions of GRPO, each there or not."""

    label: str
    divide_by_std: bool
    divide_by_length: bool
    color: str
    dashes: str  # of a line


METHODS = {
    "drgrpo": Method("Dr. GRPO", False, False, BLUE, "-"),
    "std": Method("only std division", True, False, BLUE, "--"),
    "length": Method("only length division", False, True, RED, "-"),
    "grpo": Method("GRPO (both)", True, True, RED, "--"),
}
SEEDS = 6  # with 5 seeds no exact paired test can give a two-sided p below 0.06


def method_runs(name: str, seeds: int = SEEDS) -> list[Run]:
    """The runs of one of METHODS, one a seed. All findings share them."""
    flags = ("divide_by_std", "divide_by_length")
    settings = {flag: True for flag in flags if getattr(METHODS[name], flag)}
    return [Run(name, seed, settings) for seed in range(seeds)]


STYLE: Any = {  # of matplotlib's rc parameters
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "legend.frameon": False,
    "lines.linewidth": 2,
    "svg.hashsalt": "drgrpo",  # the same numbers give the same file, up to rounding of the layout
}


def draw_band(
    axis: Axes, curves: Any, color: str, label: str, dashes: str = "-", every: int = 1
) -> None:
    """The mean over seeds of (seeds, steps) numbers, and one standard deviation around it."""
    middle, spread = np.nanmean(curves, axis=0), np.nanstd(curves, axis=0)
    steps = np.arange(len(middle)) * every
    axis.fill_between(steps, middle - spread, middle + spread, color=color, alpha=0.13, lw=0)
    axis.plot(steps, middle, dashes, color=color, label=label)


# ---------------------------------------------------------------------------------- findings

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Finding:
    """One command of findings/. All but `measure` only read the numbers that it made."""

    name: str  # of its script, and of its files in results/
    claim: str  # in a line
    measure: Callable[[], dict]
    draw: Callable[[dict], Figure]
    measured: Callable[[dict], str]  # the claim's figure, for a cell of a table
    text: Callable[[dict], str]  # what was seen, and what it does not show

    @property
    def command(self) -> str:
        return f"python findings/{self.name}.py"

    @property
    def numbers(self) -> dict:
        return json.loads((RESULTS / f"{self.name}.json").read_text())

    def run(self) -> None:
        """Measure, write numbers and figure, and print the text."""
        print(f"{self.claim}\n    {self.command}\n", flush=True)
        os.chdir(ROOT)  # the preset names its files relative to the repository
        make_toy(TOY_BASE)
        origin = {
            "command": self.command,
            "date": time.strftime("%Y-%m-%d"),
            "cores": os.cpu_count(),
            "versions": versions(),
        }
        # Six digits are enough, and a line for each key
        whole = json.dumps(origin | self.measure())
        numbers = json.loads(whole, parse_float=lambda digits: float(f"{float(digits):.6g}"))
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in numbers.items()]
        (RESULTS / f"{self.name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
        self.write_figure()
        print(f"\n{self.section()}\n`python -m findings --page` writes findings/README.md again.")

    def write_figure(self) -> None:
        with rc_context(STYLE):
            self.draw(self.numbers).savefig(RESULTS / f"{self.name}.svg", metadata={"Date": None})

    def row(self) -> str:
        """A line of the table of findings, here and in the README."""
        return f"| {self.claim} | {self.measured(self.numbers)} | `{self.command}` |"

    def section(self) -> str:
        """Of README.md."""
        numbers = f"`{self.command}`, [numbers](results/{self.name}.json)"
        figure = f"![{self.claim}](results/{self.name}.svg)"
        return f"## {self.claim}\n\n{figure}\n\n{wrapped(self.text(self.numbers))}\n\n{numbers}\n"


def wrapped(text: str) -> str:
    """The same with the lines of its paragraphs filled; a table or code stays as it is."""
    parts = []
    for part in text.split("\n\n"):
        filled = textwrap.fill(part, 100, break_long_words=False, break_on_hyphens=False)
        parts.append(part if part.startswith(("|", "```")) else filled)
    return "\n\n".join(parts)
