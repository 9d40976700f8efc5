"""What each of GRPO's two divisions does to the length of wrong responses, on the toy.

    python findings/length_bias.py

The same training with and without each division, with 8 seeds. A seed draws the same problems in
all four, so they are compared in pairs.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from findings.common import (
    GREY,
    METHODS,
    SEEDS,
    STEPS,
    Finding,
    Run,
    draw_band,
    least_p,
    method_runs,
    paired,
    train,
)
from support.records import markdown, mean

WINDOWS = ((0, 10), (10, 20), (20, 30), (30, 40))  # steps
LATE = WINDOWS[-1]
LEVELS = ((0.5, 0.7), (0.7, 0.85), (0.85, 0.95))  # of the training reward, to compare at equal ones
OTHERS = ("std", "length", "grpo")  # than Dr. GRPO
SMOOTH = 2  # the figure pools a step with so many neighbours on each side


def curves(run: Run) -> dict[str, list]:
    """What the figure and the tests need of a run: a number for each step."""
    steps = [row for row in run.metrics() if "reward" in row]
    wrong: list[list[int]] = [[] for _ in steps]
    for sample in run.samples():
        if not sample["correct"]:
            wrong[sample["step"]].append(sample["length"])
    return {
        "reward": [row["reward"] for row in steps],
        "wrong_count": [len(lengths) for lengths in wrong],
        "wrong_tokens": [sum(lengths) for lengths in wrong],
        "eval_accuracy": [row["eval_accuracy"] for row in run.metrics() if "eval_accuracy" in row],
    }


def measure() -> dict:
    runs = {name: method_runs(name) for name in METHODS}
    train([runs[name][seed] for seed in range(SEEDS) for name in METHODS])
    return {"runs": [runs[name][0].command for name in METHODS]} | {
        name: [curves(run) for run in runs[name]] for name in METHODS
    }


# ------------------------------------------------------------------------------- comparisons


def wrong_length(run: dict, steps: list[int]) -> float | None:
    """Mean tokens of the wrong responses of these steps; each response counts once."""
    count = sum(run["wrong_count"][step] for step in steps)
    return sum(run["wrong_tokens"][step] for step in steps) / count if count else None


def in_window(runs: list[dict], window: tuple[int, int]) -> list[float]:
    """Of each run, the length of wrong responses in a window of steps."""
    lengths = [wrong_length(run, list(range(*window))) for run in runs]
    return [length for length in lengths if length is not None]  # every window has wrong ones


def at_reward(run: dict, level: tuple[float, float]) -> float | None:
    """The length of wrong responses in the steps whose reward is in this range."""
    steps = [i for i, reward in enumerate(run["reward"]) if level[0] <= reward < level[1]]
    return wrong_length(run, steps)


def pairs_at_reward(numbers: dict, name: str, level: tuple[float, float]) -> np.ndarray:
    """(seeds, 2): the lengths of a method and of Dr. GRPO, of the seeds where both have some."""
    pairs = [
        (at_reward(run, level), at_reward(base, level))
        for run, base in zip(numbers[name], numbers["drgrpo"], strict=True)
    ]
    return np.array([pair for pair in pairs if None not in pair], dtype=float)


def rewards(runs: list[dict], window: tuple[int, int]) -> list[float]:
    return [float(np.mean(run["reward"][slice(*window)])) for run in runs]


# --------------------------------------------------------------------------- figure and text


def draw(numbers: dict) -> Figure:
    """Large: the length of wrong responses. Small: reward and held-out accuracy."""
    figure = Figure(figsize=(8, 4.3), layout="constrained")
    figure.suptitle("Dividing by the response's length makes wrong answers long")
    axes = figure.subplot_mosaic([["wrong", "reward"], ["wrong", "accuracy"]], width_ratios=(2, 1))
    draw_lengths(axes["wrong"], numbers)
    for key, panel in (("reward", "reward"), ("eval_accuracy", "accuracy")):
        for name, method in METHODS.items():
            lines = [run[key] for run in numbers[name]]
            steps = np.linspace(0, STEPS, len(lines[0]), endpoint=key != "reward").tolist()
            draw_band(axes[panel], steps, lines, method.color, method.label, method.dashes)
        axes[panel].set(xlim=(0, STEPS), ylim=(0, 1.05))
    axes["reward"].set(title="Training reward")
    axes["accuracy"].set(title="Held-out accuracy", xlabel="step")
    return figure


def draw_lengths(axis: Axes, numbers: dict) -> None:
    """The large panel, with a legend beside each pair of lines."""
    lines = {}
    for name, method in METHODS.items():
        smooth = []
        for run in numbers[name]:
            windows = [(max(0, i - SMOOTH), min(STEPS, i + SMOOTH + 1)) for i in range(STEPS)]
            smooth.append([wrong_length(run, list(range(*window))) for window in windows])
        lines[name] = draw_band(
            axis, list(range(STEPS)), smooth, method.color, method.label, method.dashes
        )
    start = base_length(numbers)
    axis.axhline(start, color=GREY, linewidth=1, linestyle=":")
    axis.text(39, start - 1.4, f"base model: {start:.0f}", color=GREY, fontsize=9, ha="right")
    axis.set(title="Mean tokens of wrong responses", xlabel="step", xlim=(0, STEPS), ylim=(0, 50))
    long = [lines["grpo"], lines["length"]]
    axis.add_artist(axis.legend(handles=long, loc="upper left", labelcolor="linecolor"))
    short = [lines["drgrpo"], lines["std"]]
    axis.legend(handles=short, loc="lower right", labelcolor="linecolor")


def base_length(numbers: dict) -> float:
    """Tokens of the base model's wrong responses: those of step 0, before the first update."""
    return float(np.mean(in_window(numbers["drgrpo"], (0, 1))))


def by_window(numbers: dict) -> str:
    """Lengths, their ratios and differences."""
    rows = []
    for start, end in WINDOWS:
        base = in_window(numbers["drgrpo"], (start, end))
        cells = [f"{start} to {end - 1}", f"{np.mean(base):.1f}"]
        for name in OTHERS:
            lengths = in_window(numbers[name], (start, end))
            ratio = np.mean(lengths) / np.mean(base)
            cells.append(f"{np.mean(lengths):.1f} ({ratio:.2f}): {paired(lengths, base)}")
        rows.append(cells)
    return markdown(["steps", *(method.label for method in METHODS.values())], rows)


def by_reward(numbers: dict) -> str:
    """Lengths at equal training reward."""
    rows = []
    for level in LEVELS:
        cells = [f"{level[0]:g} to {level[1]:g}"]
        base = [at_reward(run, level) for run in numbers["drgrpo"]]
        cells.append(f"{mean(length for length in base if length is not None):.1f}")
        for name in OTHERS:
            mine, other = pairs_at_reward(numbers, name, level).T.tolist()
            cells.append(f"{np.mean(mine):.1f}: {paired(mine, other)} ({len(mine)} seeds)")
        rows.append(cells)
    return markdown(["reward", *(method.label for method in METHODS.values())], rows)


def gained(numbers: dict, name: str, window: tuple[int, int]) -> str:
    """Training reward of a method minus Dr. GRPO's."""
    return paired(rewards(numbers[name], window), rewards(numbers["drgrpo"], window), 3)


def measured(numbers: dict) -> str:
    base = in_window(numbers["drgrpo"], LATE)
    return (
        f"tokens more than with Dr. GRPO, steps {LATE[0]} to {LATE[1] - 1}: GRPO "
        f"{paired(in_window(numbers['grpo'], LATE), base)}"
    )


def text(numbers: dict) -> str:
    late = {name: np.mean(in_window(numbers[name], LATE)) for name in METHODS}
    accuracy = {name: np.mean([run["eval_accuracy"][-1] for run in numbers[name]]) for name in late}
    start, seeds = base_length(numbers), len(numbers["drgrpo"])
    gains = {}  # in reward
    for window in ((10, 30), LATE):
        told = (f"{gained(numbers, name, window)} ({METHODS[name].label})" for name in OTHERS)
        gains[window] = ", ".join(told)
    return f"""Mean tokens of wrong responses, with the ratio to Dr. GRPO's and the difference to
it, paired by seed, with its 95% interval:

{by_window(numbers)}

At equal training reward:

{by_reward(numbers)}

The base model's wrong responses have {start:.1f} tokens. They grow with Dr. GRPO, too, to
{late["drgrpo"]:.1f} over the last ten steps ({late["drgrpo"] - start:+.1f}). With the division by
the length they have {late["length"]:.1f} ({late["length"] - start:+.1f}), with both divisions
{late["grpo"]:.1f} ({late["grpo"] - start:+.1f}). The division by the std alone does not lengthen
them.

On the toy the longer ones cost nothing that was measured. Training reward minus Dr. GRPO's, over
steps 10 to 29: {gains[10, 30]}; over steps 30 to 39: {gains[LATE]}. Held-out accuracy ends at
{accuracy["drgrpo"]:.3f} with Dr. GRPO and at {accuracy["grpo"]:.3f} with GRPO.

In the figure a line is the mean over {seeds} seeds and a band one standard deviation; a step is
pooled with {SMOOTH} steps on each side. p is of an exact sign-flip test over seeds, which with
{seeds} of them cannot be below {least_p(seeds)}; it is not corrected for the number of comparisons.

**Not shown:** a large model. The toy has few ways to be wrong: it guesses at once (8 tokens), works
the problem out with a slip (27), or starts over until it is cut off (72). At scale the evidence is
open: ScaleRL (arXiv 2510.13786) finds that the aggregation of the loss changes efficiency and
hardly the final score."""


FINDING = Finding(
    "length_bias",
    "Dividing by the length makes wrong responses longer",
    measure,
    draw,
    measured,
    text,
)

if __name__ == "__main__":
    FINDING.run()
