"""What each of GRPO's two divisions does to the length of wrong responses, on the toy.

    python findings/length_bias.py

The same training with and without each division, with 8 seeds. A seed draws the same problems in
all four, so they are compared in pairs. The runs are shared with other findings: see runs.py.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

sys.path.insert(0, str(Path(__file__).parents[1]))
from findings.finding import GREY, METHODS, Finding, Method, p_text
from findings.runs import SEEDS, Run, train
from findings.stats import band, paired, pooled_mean
from support.metrics import markdown

WINDOWS = ((10, 20), (20, 30))  # steps
TESTED = (10, 30)  # both: the difference is tested here, and was not tried elsewhere
LEVELS = ((0.5, 0.7), (0.7, 0.85), (0.85, 0.95))  # of the training reward, to compare at equal ones
SMOOTH = 2  # the figure pools a step with so many neighbours on each side


def method_runs(name: str) -> list[Run]:
    """The runs of one of METHODS, one a seed."""
    return [Run(name, seed, METHODS[name].settings) for seed in range(SEEDS)]


def curves(run: Run) -> dict:
    """What the figure and the tests need of a run: a number for each step."""
    steps = [row for row in run.metrics() if "reward" in row]
    wrong: list[list[int]] = [[] for _ in steps]
    for sample in run.samples():
        if not sample["correct"]:
            wrong[sample["step"]].append(sample["length"])
    evaluated = [row for row in run.metrics() if "eval_accuracy" in row]
    return {
        "reward": [row["reward"] for row in steps],
        "wrong_count": [len(lengths) for lengths in wrong],
        "wrong_tokens": [sum(lengths) for lengths in wrong],
        "eval_step": [row["step"] for row in evaluated],
        "eval_accuracy": [row["eval_accuracy"] for row in evaluated],
    }


def measure() -> dict:
    runs = {name: method_runs(name) for name in METHODS}
    train([runs[name][seed] for seed in range(SEEDS) for name in METHODS])
    return {
        "seeds": list(range(SEEDS)),
        "runs": {name: runs[name][0].command for name in METHODS},
        "curves": {name: [curves(run) for run in runs[name]] for name in METHODS},
    }


# -------------------------------------------------------------------------------- statistics


def wrong_length(run: dict, steps: list[int]) -> float | None:
    """Mean tokens of the wrong responses of these steps; each response counts once."""
    count = sum(run["wrong_count"][step] for step in steps)
    return sum(run["wrong_tokens"][step] for step in steps) / count if count else None


def in_window(runs: list[dict], window: tuple[int, int]) -> list[float]:
    """Of each run, the length of wrong responses in a window of steps."""
    lengths = [wrong_length(run, list(range(*window))) for run in runs]
    return [length for length in lengths if length is not None]  # every window has wrong ones


def at_reward(runs: list[dict], level: tuple[float, float]) -> list[float | None]:
    """Of each run, the length of wrong responses in the steps whose reward is in this range."""
    lengths = []
    for run in runs:
        steps = [i for i, reward in enumerate(run["reward"]) if level[0] <= reward < level[1]]
        lengths.append(wrong_length(run, steps))
    return lengths


def paired_at_reward(numbers: dict, name: str, level: tuple[float, float]) -> dict:
    """A method against Dr. GRPO at one level of reward, by the seeds that both have there."""
    mine = at_reward(numbers["curves"][name], level)
    base = at_reward(numbers["curves"]["drgrpo"], level)
    pairs = [(a, b) for a, b in zip(mine, base, strict=True) if a is not None and b is not None]
    values, others = [list(side) for side in zip(*pairs, strict=True)]
    return paired(values, others) | {"mean": float(np.mean(values)), "seeds": len(pairs)}


def against_drgrpo(numbers: dict, name: str, window: tuple[int, int]) -> dict:
    runs = numbers["curves"]
    return paired(in_window(runs[name], window), in_window(runs["drgrpo"], window))


def final_accuracy(runs: list[dict]) -> list[float]:
    return [run["eval_accuracy"][-1] for run in runs]


def late_reward(runs: list[dict]) -> list[float]:
    return [float(np.mean(run["reward"][20:30])) for run in runs]


# ------------------------------------------------------------------------- figure, table, text


def draw(numbers: dict) -> Figure:
    """Large: the length of wrong responses. Small: reward and held-out accuracy."""
    figure = Figure(figsize=(8, 4.3), layout="constrained")
    figure.suptitle(
        "Dividing by the response's length makes wrong answers long", fontsize=13, fontweight="bold"
    )
    axes = figure.subplot_mosaic([["wrong", "reward"], ["wrong", "accuracy"]], width_ratios=(2, 1))
    draw_lengths(axes["wrong"], numbers)
    for name, method in METHODS.items():
        runs = numbers["curves"][name]
        rewards = [run["reward"] for run in runs]
        draw_band(axes["reward"], list(range(len(rewards[0]))), rewards, method)
        accuracies = [run["eval_accuracy"] for run in runs]
        draw_band(axes["accuracy"], runs[0]["eval_step"], accuracies, method)
    axes["reward"].set(title="Training reward", xlim=(0, 40), ylim=(0, 1.05))
    axes["reward"].tick_params(labelbottom=False)
    axes["accuracy"].set(title="Held-out accuracy", xlim=(0, 40), ylim=(0, 1.05))
    axes["accuracy"].set_xlabel("step")
    return figure


def draw_band(axis: Axes, steps: list[int], curves: list, method: Method) -> Line2D:
    """The mean over seeds, and one standard deviation around it."""
    middle, low, high = band(curves)
    axis.fill_between(steps, low, high, color=method.color, alpha=0.13, linewidth=0)
    (line,) = axis.plot(steps, middle, method.dashes, color=method.color, label=method.label)
    return line


def draw_lengths(axis: Axes, numbers: dict) -> None:
    """The large panel, with a legend beside each pair of lines."""
    lines = {}
    for name, method in METHODS.items():
        lengths = []
        for run in numbers["curves"][name]:
            lengths.append(pooled_mean(run["wrong_tokens"], run["wrong_count"], SMOOTH))
        lines[name] = draw_band(axis, list(range(len(lengths[0]))), lengths, method)
    # The responses of step 0 are those of the base model: they come before the first update
    base = float(np.mean(in_window(numbers["curves"]["drgrpo"], (0, 1))))
    axis.axhline(base, color=GREY, linewidth=1, linestyle=":")
    axis.text(14, base + 0.5, f"base model: {base:.0f}", color=GREY, fontsize=9, ha="center")
    axis.set(title="Mean tokens of wrong responses", xlabel="step", xlim=(0, 40), ylim=(0, 46))
    long = axis.legend(
        handles=[lines["grpo"], lines["length"]], loc="upper left", labelcolor="linecolor"
    )
    axis.add_artist(long)  # a second legend would take the place of the first
    axis.legend(handles=[lines["drgrpo"], lines["std"]], loc="lower right", labelcolor="linecolor")


def table(numbers: dict) -> str:
    """By steps, and at equal reward."""
    by_step, by_reward = [], []
    for name, method in METHODS.items():
        runs = numbers["curves"][name]
        lengths = [f"{np.mean(in_window(runs, window)):.1f}" for window in WINDOWS]
        scores = [
            f"{np.mean(late_reward(runs)):.3f}",
            f"{np.mean(final_accuracy(runs)):.3f}",
        ]
        versus = "" if name == "drgrpo" else difference_text(against_drgrpo(numbers, name, TESTED))
        by_step.append([method.label, *lengths, versus, *scores])
        cells = []
        for level in LEVELS:
            result = paired_at_reward(numbers, name, level)
            versus = "" if name == "drgrpo" else f" (p {p_text(result['p'])})"
            cells.append(f"{result['mean']:.1f}{versus}")
        by_reward.append([method.label, *cells])
    head = ["loss", *(f"steps {start} to {end - 1}" for start, end in WINDOWS)]
    head += ["difference to Dr. GRPO", "reward, steps 20 to 29", "held-out accuracy, last"]
    levels = [f"reward {low:g} to {high:g}" for low, high in LEVELS]
    return (
        f"Mean tokens of wrong responses; the difference is over steps {TESTED[0]} to "
        f"{TESTED[1] - 1}, paired by seed, with its 95% interval:\n\n"
        + markdown(head, by_step)
        + "\n\nThe same at equal training reward, with the p of the difference to Dr. GRPO:\n\n"
        + markdown(["loss", *levels], by_reward)
    )


def difference_text(result: dict) -> str:
    return (
        f"{result['difference']:+.1f} [{result['low']:+.1f}, {result['high']:+.1f}], "
        f"p {p_text(result['p'])}"
    )


def caption(numbers: dict) -> str:
    runs, seeds = numbers["curves"], len(numbers["seeds"])
    base = in_window(runs["drgrpo"], TESTED)
    longer, ratios = {}, {}
    for name in ("length", "grpo", "std"):
        lengths = in_window(runs[name], TESTED)
        longer[name] = sum(a > b for a, b in zip(lengths, base, strict=True))
        ratios[name] = np.mean(lengths) / np.mean(base)
    std = against_drgrpo(numbers, "std", TESTED)
    rewards = {name: float(np.mean(late_reward(runs[name]))) for name in METHODS}
    return (
        f"Over steps {TESTED[0]} to {TESTED[1] - 1} wrong responses have {np.mean(base):.1f} "
        f"tokens under Dr. GRPO. With the division by the length they are {ratios['length']:.1f} "
        f"times as long, and longer in {longer['length']} of {seeds} seeds; under GRPO "
        f"{ratios['grpo']:.1f} times, in {longer['grpo']} of {seeds}. The division by the std "
        f"changes them by {difference_text(std)}. Reward (from {min(rewards.values()):.3f} to "
        f"{max(rewards.values()):.3f} over steps 20 to 29) and held-out accuracy hardly differ, "
        f"and at equal reward the lengths differ as well. Lines are means over {seeds} seeds, and "
        f"a band is one standard deviation; a step's wrong responses are pooled with those of "
        f"{SMOOTH} steps on each side, because few are wrong late. p is that of an exact "
        f"sign-flip test over seeds, which with {seeds} seeds cannot be below {2 / 2**seeds:.3f}."
    )


def not_shown(numbers: dict) -> str:
    return (
        "A toy of 0.2M parameters has few ways to be wrong: it guesses at once (8 tokens), works "
        "the problem out with a slip (27) or starts over until it is cut off (up to 72). How long "
        "a large model's wrong responses grow is not measured here, nor whether it harms its "
        "accuracy: on the toy none is seen. At scale the evidence is open: ScaleRL (arXiv "
        "2510.13786) finds that the aggregation of the loss changes efficiency and hardly the "
        "final score, and open-instruct#636 reports no significant difference."
    )


FINDING = Finding(
    "length_bias",
    "Dividing by the length makes wrong responses long; dividing by the std does not",
    "python findings/length_bias.py",
    measure,
    draw,
    table,
    caption,
    not_shown,
)

if __name__ == "__main__":
    FINDING.run()
