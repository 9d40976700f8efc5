"""What each of GRPO's two divisions does to the length of wrong responses, on the toy.

    python findings/length_bias.py

The same training with and without each division, with 6 seeds. A seed draws the same problems in
all four, so they are compared in pairs.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from findings import common
from findings.common import EVAL_EVERY, GREY, METHODS, STEPS, Difference, Finding, Run
from support.records import markdown

CLAIM = "Dividing by the length makes wrong responses longer"

WINDOWS = ((0, 10), (10, 20), (20, 30), (30, 40))  # steps
MIDDLE, LATE = (10, 30), (30, 40)
LEVELS = ((0.5, 0.7), (0.7, 0.85), (0.85, 0.95))  # of the training reward, to compare at equal ones
OTHERS = ("std", "length", "grpo")  # than Dr. GRPO
SMOOTH = 2  # the figure pools a step with so many neighbours on each side


def curves(runs: list[Run]) -> dict[str, list[list]]:
    """What the figure and the tests need: for each run a list with a number for each step."""
    metrics = ("reward", "truncated", "eval_accuracy")
    found: dict = {key: [] for key in (*metrics, "wrong_count", "wrong_tokens")}
    for run in runs:
        wrong = [(row["step"], row["length"]) for row in run.samples() if not row["correct"]]
        steps, lengths = np.array(wrong).T
        found["wrong_count"].append(np.bincount(steps, minlength=STEPS).tolist())
        found["wrong_tokens"].append(np.bincount(steps, lengths, minlength=STEPS).tolist())
        for key in metrics:
            found[key].append(run.metric(key))
    return found


def measure() -> dict:
    runs = {name: common.method_runs(name) for name in METHODS}
    common.train([runs[name][seed] for seed in range(common.SEEDS) for name in METHODS])
    commands = [runs[name][0].command for name in METHODS]
    return {"runs": commands} | {name: curves(runs[name]) for name in METHODS}


# ------------------------------------------------------------------------------- comparisons


def pooled(found: dict, chosen: np.ndarray) -> np.ndarray:
    """Mean tokens of wrong responses of the chosen steps, (steps,) or (seeds, steps) of bool.

    Returns (seeds,), nan where there is no response. Each response counts once.
    """
    tokens = np.where(chosen, found["wrong_tokens"], 0).sum(axis=1)
    count = np.where(chosen, found["wrong_count"], 0).sum(axis=1)
    return np.where(count > 0, tokens / np.maximum(count, 1), np.nan)


def in_window(found: dict, window: tuple[int, int]) -> np.ndarray:
    """Of each run, the length of wrong responses in a window of steps."""
    return pooled(found, np.isin(np.arange(STEPS), range(*window)))


def at_reward(found: dict, level: tuple[float, float]) -> np.ndarray:
    """Of each run, that in the steps whose training reward is in this range."""
    rewards = np.array(found["reward"])  # (seeds, steps)
    return pooled(found, (rewards >= level[0]) & (rewards < level[1]))


def mean_of(found: dict, key: str, window: tuple[int, int]) -> np.ndarray:
    """Of each run, the mean of a metric in a window of steps."""
    return np.array(found[key])[:, slice(*window)].mean(axis=1)


def gained(numbers: dict, name: str, window: tuple[int, int]) -> Difference:
    """Training reward of a method minus Dr. GRPO's."""
    base = mean_of(numbers["drgrpo"], "reward", window)
    return common.paired(mean_of(numbers[name], "reward", window), base)


def base_length(numbers: dict) -> float:
    """Tokens of the base model's wrong responses: those of step 0, before the first update."""
    return float(np.mean(in_window(numbers["drgrpo"], (0, 1))))


# --------------------------------------------------------------------------- figure and text


def draw(numbers: dict) -> Figure:
    """Large: the length of wrong responses. Small: reward and held-out accuracy."""
    figure = Figure(figsize=(8, 4.3), layout="constrained")
    figure.suptitle("Dividing by the response's length makes wrong answers long")
    axes = figure.subplot_mosaic([["wrong", "reward"], ["wrong", "accuracy"]], width_ratios=(2, 1))
    steps = np.arange(STEPS)
    for name, method in METHODS.items():
        found, style = numbers[name], (method.color, method.label, method.dashes)
        smooth = [pooled(found, abs(steps - step) <= SMOOTH) for step in steps]
        common.draw_band(axes["wrong"], np.transpose(smooth), *style)
        common.draw_band(axes["reward"], found["reward"], *style)
        common.draw_band(axes["accuracy"], found["eval_accuracy"], *style, every=EVAL_EVERY)
    start = base_length(numbers)
    axes["wrong"].axhline(start, color=GREY, linewidth=1, linestyle=":")
    axes["wrong"].text(39, start - 3.5, f"base model: {start:.0f}", color=GREY, ha="right")
    axes["wrong"].set(title="Mean tokens of wrong responses", xlabel="step", ylim=(0, 75))
    axes["wrong"].legend(loc="lower center", ncols=2, labelcolor="linecolor")
    axes["reward"].set(title="Training reward", ylim=(0, 1.05))
    axes["accuracy"].set(title="Held-out accuracy", xlabel="step", ylim=(0, 1.05))
    return figure


def comparison(head: str, rows: dict[str, dict[str, np.ndarray]]) -> str:
    """A table: each row's lengths of each method, with ratio and difference to Dr. GRPO's, of the
    seeds where both have some."""
    table = []
    for label, lengths in rows.items():
        base = lengths["drgrpo"]
        cells = [label, f"{np.nanmean(base):.1f}"]
        for name in OTHERS:
            both = ~np.isnan(lengths[name]) & ~np.isnan(base)
            mine, other = lengths[name][both], base[both]
            versus = common.paired(mine, other).text()
            few = "" if both.all() else f" ({both.sum()} seeds)"
            cells.append(
                f"{mine.mean():.1f}, {mine.mean() / other.mean():.2f} times: {versus}{few}"
            )
        table.append(cells)
    return markdown([head, *(method.label for method in METHODS.values())], table)


def measured(numbers: dict) -> str:
    versus = common.paired(in_window(numbers["grpo"], LATE), in_window(numbers["drgrpo"], LATE))
    return f"tokens, GRPO minus Dr. GRPO, over the last ten steps: {versus.text()}"


def text(numbers: dict) -> str:
    late = {name: np.mean(in_window(numbers[name], LATE)) for name in METHODS}
    accuracy = {name: np.mean(numbers[name]["eval_accuracy"], axis=0)[-1] for name in METHODS}
    cut_off = {name: mean_of(numbers[name], "truncated", MIDDLE).mean() for name in METHODS}
    start, seeds = base_length(numbers), len(numbers["drgrpo"]["reward"])
    by_window = {
        f"{window[0]} to {window[1] - 1}": {n: in_window(numbers[n], window) for n in METHODS}
        for window in WINDOWS
    }
    by_reward = {
        f"{level[0]:g} to {level[1]:g}": {n: at_reward(numbers[n], level) for n in METHODS}
        for level in LEVELS
    }
    gains = {}  # in reward
    for window in (MIDDLE, LATE):
        told = (
            f"{gained(numbers, name, window).text(3)} ({METHODS[name].label})" for name in OTHERS
        )
        gains[window] = ", ".join(told)
    return f"""Mean tokens of wrong responses, with the ratio to Dr. GRPO's and the difference to
it, paired by seed, with its 95% interval:

{comparison("steps", by_window)}

At equal training reward:

{comparison("reward", by_reward)}

The base model's wrong responses have {start:.1f} tokens. They grow with Dr. GRPO, too, to
{late["drgrpo"]:.1f} over the last ten steps ({late["drgrpo"] - start:+.1f}). With the division by
the length they have {late["length"]:.1f} ({late["length"] - start:+.1f}), with both divisions
{late["grpo"]:.1f} ({late["grpo"] - start:+.1f}). The division by the std alone does not lengthen
them.

With the division by the length the reward is lower, and more responses are cut off, which gives no
reward: over steps 10 to 29 {cut_off["length"]:.1%} of all with this division and
{cut_off["grpo"]:.1%} with both, {cut_off["drgrpo"]:.1%} with Dr. GRPO. Training reward minus Dr.
GRPO's, over steps 10 to 29: {gains[MIDDLE]}; over steps 30 to 39: {gains[LATE]}. Held-out
accuracy (greedy) hardly differs at the end: {accuracy["drgrpo"]:.3f} with Dr. GRPO and
{accuracy["grpo"]:.3f} with GRPO.

In the figure a line is the mean over {seeds} seeds and a band one standard deviation; a step is
pooled with {SMOOTH} steps on each side. p is of an exact sign-flip test over seeds, which with
{seeds} of them cannot be below {2 / 2**seeds:.3f}; it is not corrected for the number of
comparisons.

**Not shown:** a large model. The toy has few ways to be wrong: it guesses at once (8 tokens), works
the problem out with a slip (27), or goes on until it is cut off (72). How long they grow, and what
it does to the reward, depends on the base model: with one pre-trained by the same recipe on another
CPU they were 1.98, 1.65 and 1.41 times as long in the last three rows of the first table, and the
reward over steps 10 to 29 was 0.017 [0.005, 0.029] higher with the division by the length (`git
show 74b046a:findings/results/length_bias.json`). At scale the evidence is open: ScaleRL (arXiv
2510.13786) finds that the aggregation of the loss changes efficiency and hardly the final score."""


FINDING = Finding("length_bias", CLAIM, measure, draw, measured, text)

if __name__ == "__main__":
    FINDING.run()
