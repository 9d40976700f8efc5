"""How much each question weighs, by its pass rate, with and without the division by the std.

    python findings/difficulty_bias.py

A question's weight in a step is the sum of |A| over its G responses. For k right ones of G, and
p = k / G, that is

    2 G p (1 - p)                            without the division
    2 G sqrt(p (1 - p)) * sqrt((G-1) / G)    divided by the group's std, which is over G-1

Here it is measured in the runs of length_bias.py, from the advantages that they trained with.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from findings.finding import BLUE, GREEN, GREY, Finding, p_text
from findings.length_bias import method_runs
from findings.runs import SEEDS, Run, train
from findings.stats import band, paired
from support.metrics import markdown

GROUP = 8  # samples_per_prompt of the preset `toy`
LATE = range(20, 30)  # steps
LABELS = {"drgrpo": "not divided (Dr. GRPO)", "std": "divided by the std"}
COLORS = {"drgrpo": BLUE, "std": GREEN}


def weigh(run: Run) -> dict:
    """Of one run: groups and their weight for each number of right responses, 0 to G; for each
    step the share of the weight that is on questions with one right or one wrong response; and the
    mean reward over the steps LATE."""
    samples = run.samples()
    groups, weights = [0] * (GROUP + 1), [0.0] * (GROUP + 1)
    steps = samples[-1]["step"] + 1
    extreme, total = [0.0] * steps, [0.0] * steps
    late_rewards = []
    for start in range(0, len(samples), GROUP):
        group = samples[start : start + GROUP]
        right, step = sum(row["reward"] == 1 for row in group), group[0]["step"]
        weight = sum(abs(row["advantage"]) for row in group)
        groups[right] += 1
        weights[right] += weight
        total[step] += weight
        if right in (1, GROUP - 1):
            extreme[step] += weight
        if step in LATE:
            late_rewards.append(right / GROUP)
    shares = [part / whole for part, whole in zip(extreme, total, strict=True)]
    reward = float(np.mean(late_rewards))
    return {"groups": groups, "weights": weights, "extreme_share": shares, "late_reward": reward}


def measure() -> dict:
    runs = {name: method_runs(name) for name in LABELS}
    train([runs[name][seed] for seed in range(SEEDS) for name in LABELS])
    return {
        "seeds": list(range(SEEDS)),
        "group": GROUP,
        "runs": {name: runs[name][0].command for name in LABELS},
        "weighed": {name: [weigh(run) for run in runs[name]] for name in LABELS},
    }


def formula(name: str, p: np.ndarray | float, group: int) -> np.ndarray:
    """The weight of a question with pass rate p."""
    spread = np.asarray(p) * (1 - np.asarray(p))
    if name == "drgrpo":
        return 2 * group * spread
    return 2 * group * np.sqrt(spread) * np.sqrt((group - 1) / group)


def measured(numbers: dict, name: str) -> np.ndarray:
    """Mean weight of the questions with 1 to G-1 right responses, over all seeds and steps."""
    runs = numbers["weighed"][name]
    weights = np.sum([run["weights"] for run in runs], axis=0)
    return (weights / np.sum([run["groups"] for run in runs], axis=0))[1:-1]


# ------------------------------------------------------------------------- figure, table, text


def draw(numbers: dict) -> Figure:
    """Left: weight against pass rate. Right: what that makes of a step."""
    figure = Figure(figsize=(8, 3.9), layout="constrained")
    figure.suptitle(
        "Dividing by the std gives more weight to questions that are nearly always\n"
        "or nearly never solved",
        fontweight="bold",
    )
    left, right = figure.subplots(1, 2)
    draw_weights(left, numbers)
    for name, label in LABELS.items():
        curves = [run["extreme_share"] for run in numbers["weighed"][name]]
        middle, low, high = band(curves)
        right.plot(middle, color=COLORS[name], label=label)
        right.fill_between(
            range(len(middle)), low, high, color=COLORS[name], alpha=0.13, linewidth=0
        )
    right.set(title="Share of a step's weight on questions\nwith 1 or 7 of 8 right", xlabel="step")
    right.set(ylim=(0, 1), xlim=(0, None))
    return figure


def draw_weights(axis: Axes, numbers: dict) -> None:
    """Dots are measured, lines are the formula; both are 1 at a pass rate of one half."""
    group = numbers["group"]
    rates = np.arange(1, group) / group
    p = np.linspace(0, 1, 101)
    for name in LABELS:
        half = formula(name, 0.5, group)
        axis.plot(p, formula(name, p, group) / half, color=COLORS[name], linewidth=1.4)
        axis.plot(rates, measured(numbers, name) / half, "o", color=COLORS[name], markersize=6)
    axis.text(0.5, 1.04, "divided by the std", color=COLORS["std"], ha="center")
    axis.text(0.5, 0.8, "not divided\n(Dr. GRPO)", color=COLORS["drgrpo"], ha="center", va="top")
    axis.text(0.5, 0.06, "dots: measured; lines: formula", fontsize=8.5, color=GREY, ha="center")
    axis.set(title="Weight of a question\n(1 at a pass rate of 1/2)", xlabel="pass rate")
    axis.set(ylim=(0, 1.15), xlim=(0, 1))


def table(numbers: dict) -> str:
    """A line for each number of right responses."""
    group, rows = numbers["group"], []
    for right in range(1, group):
        row = [f"{right} of {group}"]
        for name in LABELS:
            seen = sum(run["groups"][right] for run in numbers["weighed"][name])
            weight = measured(numbers, name)[right - 1]
            half = measured(numbers, name)[group // 2 - 1]
            expected = formula(name, right / group, group)
            row += [str(seen), f"{weight:.3f}", f"{expected:.3f}", f"{weight / half:.2f}"]
        rows.append(row)
    head = ["right"]
    for name in ("", ", divided by std"):
        head += [f"questions{name}", f"weight{name}", f"formula{name}", f"relative{name}"]
    return markdown(head, rows)


def late_share(numbers: dict, name: str) -> float:
    """Mean share of a step's weight that is on extreme questions, over steps 10 to 29."""
    shares = [run["extreme_share"][10:30] for run in numbers["weighed"][name]]
    return float(np.mean(shares))


def most_off(numbers: dict) -> float:
    """The largest difference of measured weight and formula."""
    group = numbers["group"]
    rates = np.arange(1, group) / group
    gaps = [np.abs(measured(numbers, name) - formula(name, rates, group)) for name in LABELS]
    return float(np.max(gaps))


def caption(numbers: dict) -> str:
    group = numbers["group"]

    def relative(name: str, p: float) -> float:
        return float(formula(name, p, group) / formula(name, 0.5, group))

    low = 1 / group
    more = relative("std", low) / relative("drgrpo", low)
    more_64 = relative("std", 1 / 64) / relative("drgrpo", 1 / 64)
    shares = {name: late_share(numbers, name) for name in LABELS}
    return (
        f"Measured in {len(numbers['seeds'])} seeds of each run, a question weighs what the "
        f"formula says (largest difference {most_off(numbers):.0e}). Beside a question that is "
        f"solved half of the time, one that is solved once in {group} weighs "
        f"{relative('drgrpo', low):.2f} in the true gradient and {relative('std', low):.2f} when "
        f"it is divided by the std: {more:.2f} times as much. With groups of 64 a question could "
        f"be solved once in 64, and the factor would be {more_64:.1f}. Over steps 10 to 29 the "
        f"questions with one right or one wrong response of {group} have {shares['std']:.0%} of "
        f"the weight with the division and {shares['drgrpo']:.0%} without it. Dr. GRPO does not "
        "weigh all questions alike either: p (1 - p) comes from the gradient of the mean reward."
    )


def not_shown(numbers: dict) -> str:
    rewards = {name: [run["late_reward"] for run in numbers["weighed"][name]] for name in LABELS}
    result = paired(rewards["std"], rewards["drgrpo"])
    return (
        "Whether the other weights do harm. On the toy the reward over steps 20 to 29 changes by "
        f"{result['difference']:+.4f} [{result['low']:+.4f}, {result['high']:+.4f}] "
        f"with the division (p {p_text(result['p'])}, paired by seed). All of the toy's problems "
        "are of one kind, so easy ones and hard ones hardly compete. Tricks-or-Traps (arXiv "
        "2508.08221) finds a group's mean with the batch's std the most robust; that is one factor "
        "for all questions of a batch, and not this bias."
    )


FINDING = Finding(
    "difficulty_bias",
    "Dividing by the std adds weight to questions that are nearly always or nearly never solved",
    "python findings/difficulty_bias.py",
    measure,
    draw,
    table,
    caption,
    not_shown,
)

if __name__ == "__main__":
    FINDING.run()
