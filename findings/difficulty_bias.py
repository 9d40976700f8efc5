"""How much each problem weighs, by its pass rate, with and without the division by the std.

    python findings/difficulty_bias.py

A problem's weight in a step is the sum of |A| over its G responses. For k right ones of G, and
p = k / G, that is

    2 G p (1 - p)                            without the division
    2 G sqrt(p (1 - p)) * sqrt((G-1) / G)    divided by the group's std, which is over G-1

Here it is measured in the runs of length_bias.py, from the advantages that they trained with.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from findings.common import BLUE, GREEN, SEEDS, Finding, Run, draw_band, method_runs, train
from support.records import markdown

CLAIM = "Dividing by the std gives more weight to problems that are nearly always or never solved"

GROUP = 8  # samples_per_prompt of the preset `toy`
NAMES = {"drgrpo": ("not divided (Dr. GRPO)", BLUE), "std": ("divided by the std", GREEN)}


def weigh(run: Run) -> dict[str, list]:
    """Of one run: problems and their weight for each number of right responses, 0 to G; and for
    each step the share of the weight that is on problems with one right or one wrong response."""
    rows = run.samples()
    steps = np.array([row["step"] for row in rows[::GROUP]])  # (P,), P problems of all steps
    right = np.array([row["reward"] == 1 for row in rows]).reshape(-1, GROUP).sum(axis=1)  # (P,)
    advantages = np.array([row["advantage"] for row in rows]).reshape(-1, GROUP)
    weight = np.abs(advantages).sum(axis=1)  # (P,)
    extreme = weight * np.isin(right, (1, GROUP - 1))
    return {
        "problems": np.bincount(right, minlength=GROUP + 1).tolist(),
        "weights": np.bincount(right, weight, minlength=GROUP + 1).tolist(),
        "extreme": (np.bincount(steps, extreme) / np.bincount(steps, weight)).tolist(),
    }


def measure() -> dict:
    runs = {name: method_runs(name) for name in NAMES}
    train([runs[name][seed] for seed in range(SEEDS) for name in NAMES])
    return {"runs": [runs[name][0].command for name in NAMES]} | {
        name: [weigh(run) for run in runs[name]] for name in NAMES
    }


def formula(name: str, p: np.ndarray | float, group: int = GROUP) -> np.ndarray:
    """The weight of a problem with pass rate p."""
    spread = np.asarray(p) * (1 - np.asarray(p))
    if name == "drgrpo":
        return 2 * group * spread
    return 2 * group * np.sqrt(spread) * np.sqrt((group - 1) / group)


RATES = np.arange(1, GROUP) / GROUP  # of the problems that have a weight


def mean_weights(numbers: dict, name: str) -> np.ndarray:
    """Mean weight of the problems with 1 to G-1 right responses, over all seeds and steps."""
    weights = np.sum([run["weights"] for run in numbers[name]], axis=0)
    return (weights / np.sum([run["problems"] for run in numbers[name]], axis=0))[1:-1]


def most_off(numbers: dict) -> float:
    """The largest difference of measured weight and formula."""
    gaps = [np.abs(mean_weights(numbers, name) - formula(name, RATES)) for name in NAMES]
    return float(np.max(gaps))


# --------------------------------------------------------------------------- figure and text


def draw(numbers: dict) -> Figure:
    """Left: weight against pass rate. Right: what that makes of a step."""
    figure = Figure(figsize=(8, 3.9), layout="constrained")
    figure.suptitle("The weight of problems that are nearly always or nearly never solved")
    left, right = figure.subplots(1, 2)
    p = np.linspace(0, 1, 101)
    for name, (label, color) in NAMES.items():
        half = formula(name, 0.5)
        left.plot(p, formula(name, p) / half, color=color, label=label)
        left.plot(RATES, mean_weights(numbers, name) / half, "o", color=color)
        shares = [run["extreme"] for run in numbers[name]]
        draw_band(right, shares, color, label)
    left.set(title="Weight beside a pass rate of 1/2\n(dots: measured; lines: formula)")
    left.set(xlabel="pass rate", ylim=(0, 1.15), xlim=(0, 1))
    left.legend(loc="lower center", labelcolor="linecolor")
    right.set(title="Share of a step's weight on problems\nwith 1 or 7 of 8 right", xlabel="step")
    right.set(ylim=(0, 1), xlim=(0, None))
    return figure


def relative(name: str, p: float, group: int = GROUP) -> float:
    """The weight beside that of a problem which is solved half of the time."""
    return float(formula(name, p, group) / formula(name, 0.5, group))


def measured(numbers: dict) -> str:
    plain, divided = (mean_weights(numbers, name) for name in NAMES)
    return (
        f"1 of {GROUP} right weighs {divided[0] / divided[3]:.2f} of a problem with half of them "
        f"right, with Dr. GRPO {plain[0] / plain[3]:.2f}"
    )


def text(numbers: dict) -> str:
    rows = []
    for right in range(1, GROUP):
        cells = [f"{right} of {GROUP}"]
        for name in NAMES:
            weight = mean_weights(numbers, name)[right - 1]
            seen = sum(run["problems"][right] for run in numbers[name])
            cells += [str(seen), f"{weight:.3f}", f"{relative(name, right / GROUP):.2f}"]
        rows.append(cells)
    head = ["right"]
    for name in ("", ", divided by std"):
        head += [f"problems{name}", f"weight{name}", f"relative to 4 of 8{name}"]
    share = {name: np.mean([run["extreme"] for run in numbers[name]]) for name in NAMES}
    factor = relative("std", 1 / GROUP) / relative("drgrpo", 1 / GROUP)
    of_64 = relative("std", 1 / 64, 64) / relative("drgrpo", 1 / 64, 64)
    return f"""{markdown(head, rows)}

Measured in {len(numbers["std"])} seeds of each run, a problem weighs what the formula says (largest
difference {most_off(numbers):.0e}). Divided by the std, problems that are nearly always or nearly
never solved still weigh less than even ones, but more than they do without it: {factor:.2f} times
as much for 1 of {GROUP}, {of_64:.1f} times for 1 of 64. Over all steps the problems with one right
or one wrong response of {GROUP} have {share["std"]:.0%} of the weight with the division and
{share["drgrpo"]:.0%} without it. Dr. GRPO does not weigh all problems alike either: p (1 - p) comes
from the gradient of the mean reward.

**Not shown:** whether the other weights do harm. All of the toy's problems are of one kind, so easy
ones and hard ones hardly compete."""


FINDING = Finding("difficulty_bias", CLAIM, measure, draw, measured, text)

if __name__ == "__main__":
    FINDING.run()
