"""A control: rewards drawn by a coin. On clean problems accuracy must not rise.

    python findings/random_reward.py

The reward is findings/coin.py. A response that is cut off gets 0.5, the coin's mean, in place of
the preset's 0. Else the reward would know something: to stop in time. The coin is tried with the
clip and without it, because arXiv 2506.10947 holds the clip responsible for gains under random
rewards. With 5 seeds.
"""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from findings.finding import BLUE, GREEN, GREY, RED, Finding, p_text
from findings.length_bias import method_runs
from findings.runs import TOY_BASE, Run, train
from findings.stats import band, mean_interval, sign_flip_test
from support.metrics import markdown
from templates import last_boxed

SEEDS = 5
COIN = {"reward": "findings/coin.py:coin", "truncated_reward": 0.5}
OUTPUT = Path("runs/findings-random-eval")
DRAWS = {"greedy": ["--n", "1"], "sampled": ["--n", "4", "--temperature", "1"]}
NO_CLIP = COIN | {"clip_eps": 1000.0}  # no ratio comes near it
LABELS = {"drgrpo": "true reward", "coin": "coin", "no_clip": "coin, no clip"}
COLORS = {"drgrpo": BLUE, "coin": RED, "no_clip": GREEN}


def arm_runs() -> dict[str, list[Run]]:
    """The runs of each arm, one a seed."""
    return {
        "drgrpo": method_runs("drgrpo")[:SEEDS],
        "coin": [Run("coin", seed, COIN) for seed in range(SEEDS)],
        "no_clip": [Run("coin-no-clip", seed, NO_CLIP) for seed in range(SEEDS)],
    }


def is_right(sample: dict) -> bool:
    """Whether a training response is right. The coin's runs have no verdict of the grader, and the
    toy's answers are single digits, so equal text is enough."""
    return last_boxed(sample["response"]) in sample["answers"]


def is_worked(sample: dict) -> bool:
    """Whether a response works the problem out step by step, in the toy's own words."""
    return sample["response"].startswith("Step by step")


def share(run: Run, has: Callable[[dict], bool]) -> list[float]:
    """The share of each step's responses that have something. They are sampled at temperature 1."""
    steps: dict[int, list[bool]] = {}
    for sample in run.samples():
        steps.setdefault(sample["step"], []).append(has(sample))
    return [float(np.mean(found)) for found in steps.values()]


def held_out_accuracy(models: list[Path], draw: str) -> list[float]:
    """The accuracy of each model on the 500 held-out problems, by eval.py."""
    command = [sys.executable, *eval_arguments(models, draw)]
    if subprocess.run(command, check=False).returncode != 0:
        # eval.py refuses a folder with responses of other weights: these runs are new
        shutil.rmtree(OUTPUT / draw, ignore_errors=True)
        subprocess.run(command, check=True)
    results = json.loads((OUTPUT / draw / "results.json").read_text())["results"]
    return [result["accuracy"] for result in results]


def eval_arguments(models: list[Path], draw: str) -> list[str]:
    command = ["eval.py", "--model", *map(str, models), "--template", "none"]
    command += ["--tasks", str(TOY_BASE / "test.jsonl"), "--max-prompt-tokens", "64"]
    command += ["--max-response-tokens", "72", "--output", str(OUTPUT / draw)]
    return command + DRAWS[draw]


def measure() -> dict:
    runs = arm_runs()
    train([run for arm in LABELS for run in runs[arm]])
    coins = [*runs["coin"], *runs["no_clip"]]
    models = [TOY_BASE / "model", *(run.folder / "model" for run in coins)]
    base, held_out = {}, {}
    for draw_name in DRAWS:
        base[draw_name], *after = held_out_accuracy(models, draw_name)
        held_out[draw_name] = {"coin": after[:SEEDS], "no_clip": after[SEEDS:]}
    return {
        "seeds": list(range(SEEDS)),
        "runs": {arm: runs[arm][0].command for arm in LABELS},
        "eval": {name: shlex.join(["python", *eval_arguments(models, name)]) for name in DRAWS},
        "accuracy": {arm: [share(run, is_right) for run in runs[arm]] for arm in LABELS},
        "worked": {arm: [share(run, is_worked) for run in runs[arm]] for arm in LABELS},
        "base": base,
        "held_out": held_out,
        "reward_right": mean_reward(coins, right=True),
        "reward_wrong": mean_reward(coins, right=False),
    }


def mean_reward(runs: list[Run], right: bool) -> float:
    """The mean reward of all right or of all wrong responses that were not cut off."""
    rewards = []
    for run in runs:
        for sample in run.samples():
            if is_right(sample) == right and sample["finish_reason"] == "stop":
                rewards.append(sample["reward"])
    return float(np.mean(rewards))


# ------------------------------------------------------------------------- figure, table, text


def draw(numbers: dict) -> Figure:
    """Left: accuracy while it trains. Right: before and after, on held-out problems."""
    figure = Figure(figsize=(8, 3.9), layout="constrained")
    figure.suptitle("Rewards drawn by a coin teach nothing here", fontweight="bold", fontsize=13)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    for arm, color in COLORS.items():
        middle, low, high = band(numbers["accuracy"][arm])
        left.plot(middle, color=color, label=LABELS[arm])
        left.fill_between(range(len(middle)), low, high, color=color, alpha=0.13, linewidth=0)
    left.set(title="Accuracy of training responses", xlabel="step", ylim=(0, 1.05), xlim=(0, 40))
    left.legend(loc="center right", labelcolor="linecolor")
    ticks = {}
    for group, draw_name in enumerate(DRAWS):
        before = numbers["base"][draw_name]
        for shift, arm in enumerate(("coin", "no_clip")):
            place = 3 * group + shift
            after = numbers["held_out"][draw_name][arm]
            right.plot([place - 0.3, place + 0.3], [before, before], color=GREY, linewidth=2.5)
            dots = np.linspace(place - 0.2, place + 0.2, len(after))
            right.plot(dots, after, "o", color=COLORS[arm], markersize=6, mew=0)
            ticks[place] = f"{draw_name}\n{LABELS[arm].replace(', ', chr(10))}"
    right.set(title="Held-out accuracy, each seed", ylim=(0, 0.5), xlim=(-0.6, 4.6))
    right.set_xticks(list(ticks), list(ticks.values()), fontsize=8.5)
    right.text(2, numbers["base"]["greedy"], "before", color=GREY, ha="center", va="center")
    right.grid(False, axis="x")
    return figure


def changes(numbers: dict, draw_name: str, arm: str) -> list[float]:
    """Held-out accuracy after minus before, of each seed."""
    return [after - numbers["base"][draw_name] for after in numbers["held_out"][draw_name][arm]]


def table(numbers: dict) -> str:
    """Before and after, each seed."""
    rows = []
    for draw_name in DRAWS:
        for arm in ("coin", "no_clip"):
            after = " ".join(f"{value:.3f}" for value in numbers["held_out"][draw_name][arm])
            change = changes(numbers, draw_name, arm)
            middle, low, high = mean_interval(change)
            interval = f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]"
            before = f"{numbers['base'][draw_name]:.3f}"
            p = p_text(sign_flip_test(change))
            rows.append([LABELS[arm], draw_name, before, after, interval, p])
    head = ["reward", "500 held-out problems", "before", "after, each seed"]
    return markdown([*head, "change [95% interval]", "p"], rows)


def first_and_last(curves: list[list[float]]) -> str:
    """The mean over seeds of the first and of the last five steps."""
    first, last = np.mean([c[:5] for c in curves]), np.mean([c[-5:] for c in curves])
    return f"from {first:.2f} to {last:.2f}"


def caption(numbers: dict) -> str:
    coin, no_clip = (changes(numbers, "sampled", arm) for arm in ("coin", "no_clip"))
    greedy = changes(numbers, "greedy", "coin")
    return (
        "The same training, but the reward is a coin: its mean is "
        f"{numbers['reward_right']:.3f} for right responses and {numbers['reward_wrong']:.3f} for "
        f"wrong ones. Held-out accuracy changes by {np.mean(coin):+.3f} at temperature 1 and by "
        f"{np.mean(greedy):+.3f} with greedy decoding. At temperature 1 it rises in "
        f"{sum(change > 0 for change in coin)} of {len(coin)} seeds, and without the clip in "
        f"{sum(change > 0 for change in no_clip)} of {len(no_clip)} (mean {np.mean(no_clip):+.3f})."
        f" The share of responses that work the problem out goes "
        f"{first_and_last(numbers['worked']['coin'])} with the clip, and "
        f"{first_and_last(numbers['worked']['no_clip'])} without it. The toy's problems are clean: "
        "nothing that it has read holds a held-out problem. On contaminated benchmarks it can come "
        "out otherwise. With Qwen2.5-Math-7B random rewards raised MATH-500 by 21 points (arXiv "
        "2506.10947). arXiv 2507.10532 offers contamination as the reason: that model completes "
        "54.6% of MATH-500's questions word by word from their first 60%, and on generated "
        "arithmetic, which it cannot have read, random rewards did not help. The authors of "
        "2506.10947 hold the clip responsible, which strengthens habits that the model has. "
        "Either way, a gain under a coin says something of model and benchmark, and nothing of the "
        "reward: run this control before you believe a gain."
    )


def not_shown(numbers: dict) -> str:
    return (
        "Which of the two explanations is right for large models: neither contamination nor the "
        "clip was varied here. Where a base model's likeliest habit is also its best one, a coin "
        "could raise accuracy on clean problems, too; the toy's likeliest habit is to guess. "
        "The coin is a hash of problem and response, so equal responses to a problem get equal "
        "rewards, as the grader needs it; nearly all problems are seen once."
    )


FINDING = Finding(
    "random_reward",
    "A coin as the reward: on clean problems accuracy does not rise",
    "python findings/random_reward.py",
    measure,
    draw,
    table,
    caption,
    not_shown,
)

if __name__ == "__main__":
    FINDING.run()
