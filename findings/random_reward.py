"""A control: rewards drawn by a coin. On clean problems accuracy must not rise.

    python findings/random_reward.py

The reward is findings/coin.py. It is tried with the clip and without it, because arXiv 2506.10947
holds the clip responsible for gains under random rewards. Accuracy is that of the responses that
the runs train on: each problem is asked once and answered before it is learned from.
"""

import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from findings import common
from findings.common import BLUE, GREEN, RED, STEPS, TOY_BASE, Difference, Finding, Run
from support.records import markdown, read_rows
from templates import last_boxed

CLAIM = "With a coin as the reward the toy's accuracy does not rise"

SEEDS = 6
LAST = 5  # steps: before and after are step 0 and these
COIN = {"reward": "findings/coin.py:coin", "truncated_reward": 0.5}
NO_CLIP = COIN | {"clip_eps": 1000.0}  # no ratio comes near it
ARMS = {"drgrpo": "true reward", "coin": "coin", "no_clip": "coin, no clip"}
COLORS = {"drgrpo": BLUE, "coin": RED, "no_clip": GREEN}


def arm_runs() -> dict[str, list[Run]]:
    """The runs of each arm, one a seed."""
    return {
        "drgrpo": common.method_runs("drgrpo", SEEDS),
        "coin": [Run("coin", seed, COIN) for seed in range(SEEDS)],
        "no_clip": [Run("coin-no-clip", seed, NO_CLIP) for seed in range(SEEDS)],
    }


def is_worked(sample: dict) -> bool:
    """Whether a response works the problem out step by step, in the toy's own words."""
    return sample["response"].startswith("Step by step")


def share(samples: list[dict], has: Callable[[dict], bool]) -> list[float]:
    """The share of each step's responses that have something."""
    steps = np.array([sample["step"] for sample in samples])
    found = np.array([has(sample) for sample in samples])
    return (np.bincount(steps, found) / np.bincount(steps)).tolist()


def measure() -> dict:
    runs = arm_runs()
    common.train([run for arm in ARMS for run in runs[arm]])
    # A run with a reward of its own has no verdicts
    answers = {row["problem"]: row["answer"] for row in read_rows(TOY_BASE / "train.jsonl")}

    def is_right(sample: dict) -> bool:
        """The toy's answers are single digits, so equal text is enough."""
        return last_boxed(sample["response"]) == answers[sample["prompt"]]

    numbers: dict = {"runs": [runs[arm][0].command for arm in ARMS], "accuracy": {}, "worked": {}}
    rewards: dict[bool, list[float]] = {True: [], False: []}  # of right and wrong ones that ended
    for arm in ARMS:
        samples = [run.samples() for run in runs[arm]]
        numbers["accuracy"][arm] = [share(rows, is_right) for rows in samples]
        numbers["worked"][arm] = [share(rows, is_worked) for rows in samples]
        for row in chain(*samples):
            if arm != "drgrpo" and row["finish_reason"] == "stop":
                rewards[is_right(row)].append(row["reward"])
    numbers["reward_right"] = float(np.mean(rewards[True]))
    numbers["reward_wrong"] = float(np.mean(rewards[False]))
    return numbers


# --------------------------------------------------------------------------- figure and text


def draw(numbers: dict) -> Figure:
    """Left: accuracy while it trains. Right: how often a response is worked out."""
    figure = Figure(figsize=(8, 3.9), layout="constrained")
    figure.suptitle("With a coin as the reward accuracy does not rise")
    panels = {"accuracy": "Right responses", "worked": "Responses that are worked out"}
    for axis, (key, title) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for arm, label in ARMS.items():
            common.draw_band(axis, numbers[key][arm], COLORS[arm], label)
        axis.set(title=title, xlabel="step", ylim=(0, 1.05), xlim=(0, STEPS))
    axis.legend(loc="center right", labelcolor="linecolor")
    return figure


def around(numbers: dict, key: str, arm: str) -> tuple[np.ndarray, np.ndarray]:
    """Of each seed, the share at step 0, which is the base model's, and over the last steps."""
    shares = np.array(numbers[key][arm])  # (seeds, steps)
    return shares[:, 0], shares[:, -LAST:].mean(axis=1)


def change(numbers: dict, key: str, arm: str) -> Difference:
    before, after = around(numbers, key, arm)
    return common.paired(after, before)


def measured(numbers: dict) -> str:
    return f"accuracy changes by {change(numbers, 'accuracy', 'coin').text(3)}"


def text(numbers: dict) -> str:
    rows = []
    for arm, label in ARMS.items():
        for key, name in (("accuracy", "right"), ("worked", "worked out")):
            before, after = around(numbers, key, arm)
            each = " ".join(f"{value:.3f}" for value in after)
            cells = [label, name, f"{before.mean():.3f}", f"{after.mean():.3f}", each]
            rows.append([*cells, change(numbers, key, arm).text(3)])
    head = ["reward", "share of responses", "step 0", f"last {LAST} steps", "each seed"]
    seeds = len(numbers["accuracy"]["coin"])

    def fell(arm: str) -> int:
        """Number of seeds in which accuracy is lower at the end."""
        before, after = around(numbers, "accuracy", arm)
        return int((after < before).sum())

    return f"""{markdown([*head, "change [95% interval]"], rows)}

The coin's mean is {numbers["reward_right"]:.3f} for right responses that ended and
{numbers["reward_wrong"]:.3f} for wrong ones, so it knows nothing of the answer. The updates are
noise. Accuracy falls in {fell("coin")} of {seeds} seeds, and without the clip in
{fell("no_clip")}. p is of an exact sign-flip test; with {seeds} seeds it cannot be below
{2 / 2**seeds:.3f}.

The toy's problems are clean: nothing that it has read holds one of them. On contaminated benchmarks
it can come out otherwise. With Qwen2.5-Math-7B random rewards raised MATH-500 by 21 points (arXiv
2506.10947). arXiv 2507.10532 offers contamination as the reason, the authors of 2506.10947 hold the
clip responsible, which strengthens habits that the model has. Either way a gain under a coin says
something of model and benchmark, and nothing of the reward: run this control before you believe a
gain.

**Not shown:** which of the two explanations is right for large models. Where a base model's
likeliest habit is also its best one, a coin could raise accuracy on clean problems, too; the toy's
likeliest habit is to guess."""


FINDING = Finding("random_reward", CLAIM, measure, draw, measured, text)

if __name__ == "__main__":
    FINDING.run()
