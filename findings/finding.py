"""What every finding is made of: numbers, a figure, a table and a caption, all from one JSON.

`measure` makes the numbers, and is the only part that computes or trains. All else is drawn and
written from the JSON file of the numbers, so that no figure and no sentence can say anything else.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from support.metrics import versions

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Method:
    """One of the four losses: the two divisions of GRPO, each there or not."""

    label: str
    divide_by_std: bool
    divide_by_length: bool
    color: str
    dashes: str  # of a line

    @property
    def settings(self) -> dict:
        """What differs from the preset, as a Run takes it."""
        flags = {"divide_by_std": self.divide_by_std, "divide_by_length": self.divide_by_length}
        return {key: True for key, value in flags.items() if value}


# Two colours that colour-blind readers can tell apart (Okabe and Ito's), for the division by
# length; dashes for the division by the std.
BLUE, RED, GREY, GREEN = "#0072B2", "#D55E00", "#666666", "#009E73"
METHODS = {
    "drgrpo": Method("Dr. GRPO", False, False, BLUE, "-"),
    "std": Method("only std division", True, False, BLUE, "--"),
    "length": Method("only length division", False, True, RED, "-"),
    "grpo": Method("GRPO (both)", True, True, RED, "--"),
}

STYLE: Any = {  # of matplotlib's rc parameters
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "lines.linewidth": 2,
    "svg.hashsalt": "drgrpo",  # the same numbers give the same file
    "svg.fonttype": "path",  # looks the same where the font is missing
}


@dataclass(frozen=True)
class Finding:
    """One command of findings/. `name` is that of its files in findings/results."""

    name: str
    title: str
    command: str
    measure: Callable[[], dict]
    draw: Callable[[dict], Figure]
    table: Callable[[dict], str]
    caption: Callable[[dict], str]  # what was seen, in words and numbers
    not_shown: Callable[[dict], str]  # what it does not show

    def run(self) -> None:
        """Measure, write the files, and print table and caption."""
        print(f"\n{self.title}\n    {self.command}\n", flush=True)
        RESULTS.mkdir(exist_ok=True)
        record = self.origin() | rounded(self.measure())
        self.file(".json").write_text(compact(record) + "\n")
        self.redraw()
        print(f"\n{self.text('')}\nThe figure is findings/results/{self.name}.svg.", flush=True)

    def redraw(self) -> None:
        """Write figure and text again from the numbers that are there."""
        with rc_context(STYLE):
            self.draw(self.numbers()).savefig(self.file(".svg"), metadata={"Date": None})
        self.file(".md").write_text(self.text(""))

    def numbers(self) -> dict:
        return json.loads(self.file(".json").read_text())

    def file(self, suffix: str) -> Path:
        return RESULTS / f"{self.name}{suffix}"

    def text(self, folder: str) -> str:
        """Caption, figure, table and origin in Markdown; `folder` leads to the files."""
        numbers = self.numbers()
        used = ", ".join(f"{package} {number}" for package, number in numbers["versions"].items())
        return (
            f"## {self.title}\n\n"
            f"{self.caption(numbers)}\n\n"
            f"![{self.title}]({folder}{self.name}.svg)\n\n"
            f"{self.table(numbers)}\n\n"
            f"**What this does not show.** {self.not_shown(numbers)}\n\n"
            f"`{numbers['command']}`, {numbers['date']}, {numbers['machine']}, {used}; "
            f"[numbers]({folder}{self.name}.json).\n"
        )

    def origin(self) -> dict[str, Any]:
        """Where the numbers come from."""
        return {
            "command": self.command,
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{os.cpu_count()} CPU cores",
            "versions": versions(),
        }


def rounded(value: Any) -> Any:
    """The same with every float at six digits: more would only make the files large."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def compact(record: dict) -> str:
    """JSON with a line for each list of plain values, so that a change is easy to see."""
    return indent(record, "")


def indent(value: Any, space: str) -> str:
    inner = space + "  "
    if isinstance(value, dict) and value:
        lines = [f"{inner}{json.dumps(key)}: {indent(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{space}}}"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return "[\n" + ",\n".join(inner + indent(item, inner) for item in value) + f"\n{space}]"
    return json.dumps(value, ensure_ascii=False)


def p_text(p: float) -> str:
    """A p as tables show it."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1g}"
