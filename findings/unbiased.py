"""Is the expected gradient the right one? A tiny policy, of which every group is enumerated.

    python findings/unbiased.py

The policy is a random Qwen2 with two tokens: EOS and 1. It can only decide when to stop, so with
L_max = 4 there are five responses: EOS; 1 EOS; 1 1 EOS; 1 1 1 EOS; and 1 1 1 1, which is truncated.
Every group of G = 8 of them is made, with its probability. The sum over all groups is the expected
gradient of each loss, without sampling and without noise, and stands beside the gradient of the
expected reward.
"""

import math
import sys
from collections import Counter
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from drgrpo import Rollout, collate, drgrpo_loss, group_advantages, token_logprobs
from findings.finding import BLUE, GREY, METHODS, RED, Finding
from support.metrics import markdown

GROUP, LONGEST, POLICIES = 8, 4, 20
RESPONSES = ([0], [1, 0], [1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1])  # 0 is EOS
# A problem is a prompt and the reward of each response.
EASY = ([1, 0, 1], [1.0, 1.0, 0.0, 0.0, 0.0])
HARD = ([0, 0, 1], [0.0, 0.0, 0.0, 1.0, 0.0])
BONUS = ([0, 0, 1], [0.1, 0.1, 0.1, 1.0, 0.0])  # HARD, and 0.1 for any response that ends
CASES = {
    "easy": "one easy problem",
    "hard": "one hard problem",
    "bonus": "the hard one, with 0.1 for ending",
    "both": "the easy and the hard one",
}


def tiny_policy(seed: int) -> Qwen2ForCausalLM:
    """A random model. `packed` is the attention that training uses."""
    config = Qwen2Config(
        vocab_size=2,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        initializer_range=0.1,
        eos_token_id=0,
        attn_implementation="packed",
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def all_groups() -> tuple[torch.Tensor, torch.Tensor]:
    """Every group of GROUP responses (P, G), and in how many orders each can be drawn (P,).

    The order does not matter to any loss here: 495 groups stand for the 5^8 ordered ones.
    """
    groups = list(combinations_with_replacement(range(len(RESPONSES)), GROUP))
    orders = []
    for group in groups:
        ways = math.factorial(GROUP)
        for count in Counter(group).values():
            ways //= math.factorial(count)
        orders.append(ways)
    return torch.tensor(groups), torch.tensor(orders)


def gradients(model: Qwen2ForCausalLM, problem: tuple) -> tuple[dict[str, torch.Tensor], float]:
    """The true gradient of the problem's expected reward, and the expected one of each method.

    All of them are multiplied by L_max * G/(G-1), the constant that is known of Dr. GRPO. Also
    returns the expected reward, which for rewards of 0 and 1 is the pass rate.
    """
    prompt, values = problem
    rewards = torch.tensor(values)
    rollouts = [Rollout(0, prompt, response, [0.0] * len(response)) for response in RESPONSES]
    batch = collate(rollouts)
    logprobs = token_logprobs(model, batch.ids, batch.response_mask)  # (5, T-1)
    probabilities = logprobs.sum(dim=1).exp()  # (5,)
    expected_reward = (probabilities * rewards).sum()
    groups, orders = all_groups()
    chances = orders * probabilities[groups].prod(dim=1).detach()  # (P,), of each group
    rows = groups.flatten()  # (P*G,), all groups laid end to end
    # A loss is a sum over rows, and these weights are constants for its gradient. So they can
    # carry each group's probability, and one call gives the expected loss.
    weights = chances.repeat_interleave(GROUP)[:, None].expand(-1, logprobs.shape[1])
    found = {"true": gradient(expected_reward, model)}
    for name, method in METHODS.items():
        longest = 1 if method.divide_by_length else LONGEST
        loss, _ = drgrpo_loss(
            logprobs[rows],
            logprobs[rows].detach(),
            group_advantages(rewards[groups], method.divide_by_std).flatten(),
            batch.response_mask[rows],
            GROUP * longest,
            divide_by_length=method.divide_by_length,
            importance_weights=weights,
        )
        found[name] = gradient(-loss * LONGEST * GROUP / (GROUP - 1), model)
    return found, expected_reward.item()


def gradient(value: torch.Tensor, model: Qwen2ForCausalLM) -> torch.Tensor:
    parts = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts]).double()


def compare(gradient: torch.Tensor, true: torch.Tensor) -> dict[str, float]:
    """How far an expected gradient is from the true one, up to a factor: its angle in degrees.

    `error` is |gradient - true| / |true|. `error_left` is the same after the best rescaling, so it
    is what no learning rate can mend.
    """
    along = (gradient @ true / true.norm()).item()
    across = (gradient - along * true / true.norm()).norm().item()
    return {
        "angle": math.degrees(math.atan2(across, along)),  # acos would round small angles away
        "error": ((gradient - true).norm() / true.norm()).item(),
        "error_left": across / math.hypot(along, across) if along > 0 else 1.0,
    }


def measure() -> dict:
    """All cases on POLICIES random policies: a list with a number for each policy."""
    results: dict = {case: {name: [] for name in METHODS} for case in CASES}
    pass_rates: dict = {"easy": [], "hard": []}
    for seed in tqdm(range(POLICIES), desc="policies", unit="policy"):
        model = tiny_policy(seed)
        easy, easy_rate = gradients(model, EASY)
        hard, hard_rate = gradients(model, HARD)
        bonus, _ = gradients(model, BONUS)
        both = {name: easy[name] + hard[name] for name in easy}
        pass_rates["easy"].append(easy_rate)
        pass_rates["hard"].append(hard_rate)
        for case, found in zip(CASES, (easy, hard, bonus, both), strict=True):
            for name in METHODS:
                results[case][name].append(compare(found[name], found["true"]))
    cases = {}
    for case, methods in results.items():
        cases[case] = {name: columns(rows) for name, rows in methods.items()}
    return {
        "seeds": list(range(POLICIES)),
        "group": GROUP,
        "l_max": LONGEST,
        "pass_rates": pass_rates,
        "cases": cases,
    }


def columns(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    return {key: [row[key] for row in rows] for key in rows[0]}


# ------------------------------------------------------------------------- figure, table, text

ROUNDING = 0.01  # degrees; fp32 leaves about 1e-5


def draw(numbers: dict) -> Figure:
    """A panel for each case: the angles of all policies, a line of dots for each method."""
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    figure.suptitle("How far each loss points away from the true gradient", fontweight="bold")
    axes = figure.subplots(2, 2, sharey=True)
    spread = np.random.default_rng(0).uniform(-0.22, 0.22, len(numbers["seeds"]))
    for axis, (case, title) in zip(axes.flat, CASES.items(), strict=True):
        axis.axvspan(1e-7, ROUNDING, color="#eef4f9")
        axis.axvline(90, color=GREY, linewidth=1, linestyle=":")
        for place, name in enumerate(METHODS):
            angles = numbers["cases"][case][name]["angle"]
            color = RED if max(angles) > ROUNDING else BLUE
            heights = place + spread
            dots = np.maximum(angles, 2e-6)
            axis.plot(dots, heights, "o", markersize=3.5, mew=0, color=color, alpha=0.55)
        axis.set(xscale="log", xlim=(1e-6, 400), ylim=(3.6, -0.75), title=title)
        axis.set_yticks(range(len(METHODS)), [method.label for method in METHODS.values()])
        axis.set_xticks([1e-4, 1e-2, 1, 90], ["0.0001°", "0.01°", "1°", "90°"])
        axis.minorticks_off()
        axis.grid(False, axis="y")
        axis.text(1.6e-6, -0.5, "right, up to rounding", fontsize=8, color=BLUE, va="center")
        axis.text(0.016, -0.5, "wrong", fontsize=8, color=RED, va="center")
    figure.supxlabel(
        "angle, a dot for each random policy; above 90° it points downhill", fontsize=9
    )
    return figure


def table(numbers: dict) -> str:
    """Angles and errors, a line for each method."""
    angles, errors = [], []
    for name, method in METHODS.items():
        cells = [numbers["cases"][case][name] for case in CASES]
        angles.append([method.label, *(angle_text(cell["angle"]) for cell in cells)])
        errors.append([method.label, *(error_text(cell["error_left"]) for cell in cells)])
    return (
        "Angle to the true gradient, median over the policies (largest):\n\n"
        + markdown(["loss", *CASES.values()], angles)
        + "\n\nRelative error that is left at the best learning rate, median (largest):\n\n"
        + markdown(["loss", *CASES.values()], errors)
    )


def angle_text(angles: list[float]) -> str:
    return f"{np.median(angles):.2f}° ({max(angles):.2f}°)"


def error_text(errors: list[float]) -> str:
    return f"{np.median(errors):.3f} ({max(errors):.3f})"


def caption(numbers: dict) -> str:
    cases, policies = numbers["cases"], len(numbers["seeds"])
    as_it_is = max(max(cases[case]["drgrpo"]["error"]) for case in CASES)
    single = max(max(cases[case]["std"]["angle"]) for case in ("easy", "hard"))
    uphill = sum(angle > 90 for angle in cases["bonus"]["std"]["angle"])
    least = min(min(cases[case]["length"]["angle"]) for case in CASES)
    return (
        f"Every group of {numbers['group']} responses of {policies} random tiny policies is "
        "enumerated. The expected gradient of Dr. GRPO is the gradient of the expected reward "
        f"times (G-1)/(G * L_max): the relative error is at most {as_it_is:.0e}, which is "
        "rounding. Within one problem, and with rewards of 0 and 1, the division by the std keeps "
        f"the direction (cosine {math.cos(math.radians(single)):.4f}) and changes only the size. "
        "Its direction is wrong as soon as there are two problems (median "
        f"{np.median(cases['both']['std']['angle']):.1f}°), because it weighs them anew, or more "
        "than two rewards. With a bonus of 0.1 for ending beside the reward the median is "
        f"{np.median(cases['bonus']['std']['angle']):.0f}°, and for {uphill} of {policies} "
        "policies a step along it lowers the expected reward. The division by the length turns "
        f"the gradient in every case and policy, by {least:.1f}° or more, also within one problem."
    )


def not_shown(numbers: dict) -> str:
    return (
        f"Five responses of at most {numbers['l_max']} tokens are no language model, and the angle "
        "depends on the policy: the figure says that there is a bias, not how much it matters in "
        "training. It is about a round's first update; later ones are off-policy and clipped. "
        "ScaleRL (arXiv 2510.13786) finds that such choices change efficiency and hardly the final "
        "score at scale."
    )


FINDING = Finding(
    "unbiased",
    "Only Dr. GRPO's expected gradient is the right one",
    "python findings/unbiased.py",
    measure,
    draw,
    table,
    caption,
    not_shown,
)

if __name__ == "__main__":
    FINDING.run()
