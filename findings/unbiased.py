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
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from drgrpo import Rollout, collate, drgrpo_loss, group_advantages, token_logprobs
from findings.common import BLUE, METHODS, RED, Finding
from support.records import markdown

CLAIM = (
    "Of the four losses only Dr. GRPO has the right expected gradient in every case that was tried"
)

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
    settings: dict = dict(vocab_size=2, eos_token_id=0, hidden_size=32, intermediate_size=64)
    settings |= dict(num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1)
    settings |= dict(tie_word_embeddings=False, initializer_range=0.1)
    settings |= dict(attn_implementation="packed", dtype="float32")
    config = Qwen2Config(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


@cache
def all_groups() -> tuple[torch.Tensor, torch.Tensor]:
    """Every group of GROUP responses (P, G), and in how many orders each can be drawn (P,).

    The order does not matter to any loss here: 495 groups stand for the 5^8 ordered ones.
    """
    ordered = product(range(len(RESPONSES)), repeat=GROUP)
    counts = Counter(tuple(sorted(group)) for group in ordered)
    return torch.tensor(list(counts)), torch.tensor(list(counts.values()))


def gradients(model: Qwen2ForCausalLM, problem: tuple) -> dict[str, torch.Tensor]:
    """The true gradient of the problem's expected reward, and the expected one of each method.

    The latter are multiplied by L_max * G/(G-1), the constant that is known of Dr. GRPO.
    """
    prompt, values = problem
    rewards = torch.tensor(values)
    batch = collate([Rollout(0, prompt, ids, [0.0] * len(ids)) for ids in RESPONSES])
    logprobs = token_logprobs(model, batch.ids, batch.response_mask)  # (5, T-1)
    probabilities = logprobs.sum(dim=1).exp()  # (5,)
    groups, orders = all_groups()
    chances = orders * probabilities[groups].prod(dim=1).detach()  # (P,), of each group
    rows = groups.flatten()  # (P*G,), all groups laid end to end
    # A loss is a sum over rows, and importance weights are constants for its gradient. So they can
    # carry each group's probability, and one call gives the expected loss.
    weights = chances.repeat_interleave(GROUP)[:, None].expand(-1, logprobs.shape[1])
    found = {"true": gradient((probabilities * rewards).sum(), model)}
    for name, method in METHODS.items():
        loss, _ = drgrpo_loss(
            logprobs[rows],
            logprobs[rows].detach(),
            group_advantages(rewards[groups], method.divide_by_std).flatten(),
            batch.response_mask[rows],
            GROUP * (1 if method.divide_by_length else LONGEST),
            divide_by_length=method.divide_by_length,
            importance_weights=weights,
        )
        found[name] = gradient(-loss * LONGEST * GROUP / (GROUP - 1), model)
    return found


def gradient(value: torch.Tensor, model: Qwen2ForCausalLM) -> torch.Tensor:
    parts = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts]).double()


def compare(gradient: torch.Tensor, true: torch.Tensor) -> dict[str, float]:
    """How far an expected gradient is from the true one: the angle in degrees, which is left at any
    learning rate, and `error`, |gradient - true| / |true|."""
    along = (gradient @ true / true.norm()).item()
    across = (gradient - along * true / true.norm()).norm().item()
    return {
        "angle": math.degrees(math.atan2(across, along)),  # acos would round small angles away
        "error": ((gradient - true).norm() / true.norm()).item(),
    }


def measure() -> dict:
    """All cases on POLICIES random policies: lists with a number for each policy."""
    lists: dict = {case: {name: {"angle": [], "error": []} for name in METHODS} for case in CASES}
    for seed in tqdm(range(POLICIES), desc="policies"):
        model = tiny_policy(seed)
        easy, hard, bonus = (gradients(model, problem) for problem in (EASY, HARD, BONUS))
        both = {name: easy[name] + hard[name] for name in easy}
        for case, found in zip(CASES, (easy, hard, bonus, both), strict=True):
            for name in METHODS:
                for key, value in compare(found[name], found["true"]).items():
                    lists[case][name][key].append(value)
    return lists


# --------------------------------------------------------------------------- figure and text

ROUNDING = 0.01  # degrees; fp32 leaves about 1e-5


def draw(numbers: dict) -> Figure:
    """A panel for each case: the angles of all policies, a line of dots for each method."""
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    figure.suptitle("How far each loss points away from the true gradient")
    spread = np.random.default_rng(0).uniform(-0.22, 0.22, POLICIES)
    panels = figure.subplots(2, 2, sharey=True).flat
    for axis, (case, title) in zip(panels, CASES.items(), strict=True):
        for place, name in enumerate(METHODS):
            angles = np.array(numbers[case][name]["angle"])
            color = RED if max(angles) > ROUNDING else BLUE
            axis.plot(angles, place + spread, "o", markersize=3.5, mew=0, color=color, alpha=0.55)
        axis.axvspan(1e-7, ROUNDING, color="#eef4f9")
        axis.set(xscale="log", xlim=(1e-6, 400), ylim=(3.6, -0.75), title=title)
        axis.set_yticks(range(len(METHODS)), [method.label for method in METHODS.values()])
        axis.set_xticks([1e-4, 1e-2, 1, 90], ["0.0001°", "0.01°", "1°", "90°"])
        axis.grid(False, axis="y")
    figure.supxlabel(
        "angle, a dot for each random policy; left: right up to rounding; above 90°: downhill",
        fontsize=9,
    )
    return figure


def angle(numbers: dict, case: str, name: str) -> str:
    """Median (smallest to largest) over the policies."""
    angles = numbers[case][name]["angle"]
    return f"{np.median(angles):.2f}° ({min(angles):.2f} to {max(angles):.2f})"


def measured(numbers: dict) -> str:
    return (
        f"angle to the true gradient: Dr. GRPO {angle(numbers, 'both', 'drgrpo')}, "
        f"GRPO {angle(numbers, 'both', 'grpo')}"
    )


def text(numbers: dict) -> str:
    rows = []
    for name, method in METHODS.items():
        rows.append([method.label, *(angle(numbers, case, name) for case in CASES)])
    error = max(max(numbers[case]["drgrpo"]["error"]) for case in CASES)
    uphill = sum(angle > 90 for angle in numbers["bonus"]["std"]["angle"])
    return f"""Every group of {GROUP} responses of {POLICIES} random tiny policies is enumerated.
The angle to the true gradient, median (smallest to largest) over the policies:

{markdown(["loss", *CASES.values()], rows)}

Dr. GRPO's expected gradient is the gradient of the expected reward times (G-1) / (G * L_max): the
relative error is at most {error:.0e}, which is rounding. The division by the std keeps the
direction within one problem whose rewards are 0 and 1. It turns it where there are two problems,
because it weighs them anew, or more than two rewards: with 0.1 for ending, a step along it lowers
the expected reward of {uphill} of {POLICIES} policies. The division by the length turns it in every
case and policy.

**Not shown:** how much it matters in training. Five responses of at most {LONGEST} tokens are no
language model, and the angle depends on the policy. It is a step's first update; later ones are
off-policy and clipped."""


FINDING = Finding("unbiased", CLAIM, measure, draw, measured, text)

if __name__ == "__main__":
    FINDING.run()
