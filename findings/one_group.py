"""One group under the microscope: eight responses to one problem, and the weight of each token.

    python findings/one_group.py

The responses are those of the toy base model, from step 0 of a run. A token's weight is how hard an
update pushes its log-prob up (+) or down (-): the gradient of drgrpo.py's own loss.
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from drgrpo import PRESETS, drgrpo_loss, group_advantages
from findings.common import BLUE, METHODS, RED, Finding, Method, method_runs, train
from support.records import markdown

CLAIM = "GRPO punishes each token of a long wrong response less than one of a short wrong response"

TOY = PRESETS["toy"][1]
GROUP, LONGEST = TOY.samples_per_prompt, TOY.max_response_tokens
COLORS = {"right": BLUE, "wrong": RED}
SCALE = 1000  # weights are small: table and figure show thousandths


def is_telling(group: list[dict]) -> bool:
    """Whether a group shows everything: short and long right responses, wrong ones of three
    lengths, and one that was cut off."""
    right = {row["length"] for row in group if row["reward"] == 1}
    wrong = {row["length"] for row in group if row["reward"] == 0}
    return len(right) >= 2 and len(wrong) >= 3 and LONGEST in wrong


def token_weights(rewards: list[float], lengths: list[int], method: Method) -> list[float]:
    """The weight of each token of each response: N times the gradient of -loss by its log-prob."""
    advantages = group_advantages(torch.tensor([rewards]), method.divide_by_std)[0]  # (G,)
    mask = (torch.arange(LONGEST) < torch.tensor(lengths)[:, None]).float()  # (G, L_max)
    logprobs = torch.zeros(len(lengths), LONGEST, requires_grad=True)
    longest = 1 if method.divide_by_length else LONGEST
    loss, _ = drgrpo_loss(
        logprobs,
        logprobs.detach(),
        advantages,
        mask,
        len(lengths) * longest,
        divide_by_length=method.divide_by_length,
    )
    (gradient,) = torch.autograd.grad(-loss * len(lengths), logprobs)
    return gradient[:, 0].tolist()  # all tokens of a response have the same


def measure() -> dict:
    run = method_runs("drgrpo", 1)[0]
    train([run])
    rows = [row for row in run.samples() if row["step"] == 0]
    groups = [rows[start : start + GROUP] for start in range(0, len(rows), GROUP)]
    group = next(group for group in groups if is_telling(group))
    group.sort(key=lambda row: (-row["reward"], row["length"]))
    rewards, lengths = [row["reward"] for row in group], [row["length"] for row in group]
    kept = ("response", "reward", "length")
    return {
        "runs": [run.command],
        "problem": group[0]["prompt"],
        "l_max": LONGEST,
        "std": torch.tensor(rewards).std().item(),
        "responses": [{key: row[key] for key in kept} for row in group],
        "weights": {key: token_weights(rewards, lengths, METHODS[key]) for key in METHODS},
    }


# --------------------------------------------------------------------------- figure and text


def draw(numbers: dict) -> Figure:
    """A row for each response: what it says, and under Dr. GRPO and under GRPO a bar, as long as
    its tokens and as high as the weight of each of them."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    figure.suptitle(f"Eight responses of the base model to “{numbers['problem'].strip()}”")
    said, *panels = figure.subplots(1, 3, sharey=True, width_ratios=(1.45, 1, 1))
    said.set_axis_off()
    said.set(xlim=(0, 1), ylim=(len(numbers["responses"]) - 0.4, -0.6))
    for place, row in enumerate(numbers["responses"]):
        line = row["response"].replace("\n", "↵")
        line = line if len(line) <= 43 else line[:42] + "…"
        said.text(0, place - 0.17, line, fontsize=7.8, family="monospace", va="center")
        verdict = "right" if row["reward"] == 1 else "wrong"
        note = f"{verdict}, {row['length']} tokens"
        said.text(0, place + 0.2, note, fontsize=8, color=COLORS[verdict], va="center")
    titles = {"drgrpo": "Dr. GRPO:  A / L_max", "grpo": "GRPO:  A / std / |o|"}
    for axis, (name, title) in zip(panels, titles.items(), strict=True):
        weights = numbers["weights"][name]
        largest = max(map(abs, weights))
        for place, (row, weight) in enumerate(zip(numbers["responses"], weights, strict=True)):
            color = COLORS["right" if weight > 0 else "wrong"]
            axis.barh(place, row["length"], 0.86 * abs(weight) / largest, color=color)
            label = f"{weight * SCALE:+.1f}"
            axis.text(row["length"] + 2, place, label, fontsize=8.5, color=color, va="center")
        axis.set(title=title, xlim=(0, 90), xlabel="tokens", xticks=[0, 8, 27, LONGEST])
        axis.tick_params(left=False, labelleft=False)
        axis.grid(False, axis="y")
    return figure


def wrong_weights(numbers: dict, name: str) -> tuple[float, float]:
    """The weight of a token of the shortest and of the longest wrong response."""
    pairs = zip(numbers["responses"], numbers["weights"][name], strict=True)
    wrong = [weight * SCALE for row, weight in pairs if row["reward"] == 0]  # from short to long
    return wrong[0], wrong[-1]


def measured(numbers: dict) -> str:
    short, long = wrong_weights(numbers, "grpo")
    same, _ = wrong_weights(numbers, "drgrpo")
    return f"GRPO {short:.1f} and {long:.1f}, Dr. GRPO {same:.1f} and {same:.1f} (thousandths)"


def text(numbers: dict) -> str:
    rows = []
    for place, row in enumerate(numbers["responses"]):
        weights = [f"{numbers['weights'][name][place] * SCALE:+.1f}" for name in METHODS]
        rows.append([f"{row['reward']:.0f}", str(row["length"]), *weights])
    short, long = wrong_weights(numbers, "grpo")
    same, _ = wrong_weights(numbers, "drgrpo")
    return f"""The weight of each token of a response, in thousandths. In the figure a bar is as
long as the response and as high as this weight; each panel has its own scale.

{markdown(["reward", "tokens", *(method.label for method in METHODS.values())], rows)}

Under Dr. GRPO every token of a wrong response is pushed down alike, by {-same:.1f}. Under GRPO a
token of the shortest wrong response is pushed down {short / long:.0f} times as hard as a token of
the longest. Among the right ones the short one gains. The division by the std multiplies all
weights of this group by the same {1 / numbers["std"]:.2f}.

**Not shown:** what training makes of it (see length_bias). This is the first group of its run that
has right responses of two lengths, wrong ones of three, and one that was cut off. The weights are
those of a step's first update, without importance weights and clip."""


FINDING = Finding("one_group", CLAIM, measure, draw, measured, text)

if __name__ == "__main__":
    FINDING.run()
