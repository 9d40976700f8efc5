"""One group under the microscope: eight responses to one problem, and the weight of each token.

    python findings/one_group.py

The responses are those of the toy base model, from step 0 of a run. For each the table shows
reward, length, advantage, and the weight of each of its tokens under the four losses: how hard an
update pushes that token's log-prob up (+) or down (-). These weights are not worked out here: they
are the gradient of drgrpo.py's own loss.
"""

import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from drgrpo import PRESETS, drgrpo_loss, group_advantages
from findings.finding import BLUE, GREY, METHODS, RED, Finding, Method
from findings.length_bias import method_runs
from findings.runs import Run, train
from support.metrics import markdown

TOY = PRESETS["toy"][1]
GROUP, LONGEST = TOY.samples_per_prompt, TOY.max_response_tokens
SHOWN = 43  # characters of a response in the figure
SCALE = 1000  # weights are small: tables and figure show thousandths


def base_groups(run: Run) -> list[list[dict]]:
    """The groups of step 0: what the base model wrote, before the first update."""
    rows = [row for row in run.samples() if row["step"] == 0]
    return [rows[start : start + GROUP] for start in range(0, len(rows), GROUP)]


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
    run = method_runs("drgrpo")[0]
    train([run])
    group = next(group for group in base_groups(run) if is_telling(group))
    group = sorted(group, key=lambda row: (-row["reward"], row["length"]))
    rewards = [row["reward"] for row in group]
    lengths = [row["length"] for row in group]
    responses = []
    for row, advantage in zip(group, group_advantages(torch.tensor([rewards]))[0], strict=True):
        kept = {key: row[key] for key in ("response", "reward", "length", "finish_reason")}
        responses.append(kept | {"advantage": advantage.item()})
    return {
        "seeds": [run.seed],
        "runs": {"drgrpo": run.command},
        "problem": group[0]["prompt"],
        "answer": group[0]["answers"][0],
        "l_max": LONGEST,
        "std": torch.tensor(rewards).std().item(),
        "responses": responses,
        "weights": {
            name: token_weights(rewards, lengths, method) for name, method in METHODS.items()
        },
    }


# ------------------------------------------------------------------------- figure, table, text


def one_line(text: str, shown: int) -> str:
    line = text.replace("\n", "↵")
    return line if len(line) <= shown else line[: shown - 1] + "…"


def draw(numbers: dict) -> Figure:
    """A row for each response: what it says, and its tokens under Dr. GRPO and under GRPO."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    figure.suptitle(
        f"Eight responses of the base model to “{numbers['problem'].strip()}”",
        fontweight="bold",
    )
    text, *panels = figure.subplots(1, 3, sharey=True, width_ratios=(1.45, 1, 1))
    text.set_axis_off()
    rows = len(numbers["responses"])
    for place, response in enumerate(numbers["responses"]):
        right = response["reward"] == 1
        color = BLUE if right else RED
        mark = "right" if right else "wrong"
        if response["finish_reason"] == "length":
            mark = "cut off"
        line = one_line(response["response"], SHOWN)
        text.text(0, place - 0.17, line, fontsize=7.8, family="monospace", va="center")
        note = f"{mark}, {response['length']} tokens"
        text.text(0, place + 0.2, note, fontsize=8, color=color, va="center")
    text.set(xlim=(0, 1), ylim=(rows - 0.4, -0.6))
    note = (
        "Bars are as long as the response, and as high\n"
        "as the push on each token: the number, in 1/1000."
    )
    text.text(0, rows - 0.05, note, fontsize=8, color=GREY, va="center", linespacing=1.4)
    titles = {"drgrpo": "Dr. GRPO:  A / L_max", "grpo": "GRPO:  A / std / |o|"}
    for axis, (name, title) in zip(panels, titles.items(), strict=True):
        draw_tokens(axis, numbers, name)
        axis.set_title(title)
    return figure


def draw_tokens(axis: Axes, numbers: dict, name: str) -> None:
    """Each response as a bar as long as its tokens and as high as the weight of each of them."""
    weights = numbers["weights"][name]
    largest = max(map(abs, weights))
    for place, (response, weight) in enumerate(zip(numbers["responses"], weights, strict=True)):
        color = BLUE if weight > 0 else RED
        height = 0.86 * abs(weight) / largest
        axis.barh(place, response["length"], height, color=color, alpha=0.85)
        label = f"{weight * SCALE:+.1f}"
        axis.text(response["length"] + 2, place, label, fontsize=8.5, color=color, va="center")
    axis.set(xlim=(0, 90), xlabel="tokens")
    axis.set_xticks([0, 8, 27, LONGEST])
    axis.tick_params(left=False, labelleft=False)
    axis.spines["left"].set_color(GREY)
    axis.grid(False, axis="y")


def table(numbers: dict) -> str:
    """A line for each response; the weights are those of each token, in thousandths."""
    head = ["response", "reward", "tokens", "A"]
    head += [method.label for method in METHODS.values()]
    rows = []
    for place, response in enumerate(numbers["responses"]):
        row = [f"`{one_line(response['response'], 24)}`", f"{response['reward']:.0f}"]
        row += [str(response["length"]), f"{response['advantage']:+.3f}"]
        row += [f"{numbers['weights'][name][place] * SCALE:+.1f}" for name in METHODS]
        rows.append(row)
    return (
        f"Weight of each token, in thousandths. A is the reward minus the group's mean; the "
        f"group's std is {numbers['std']:.3f}, and L_max is {numbers['l_max']}.\n\n"
        + markdown(head, rows)
    )


def caption(numbers: dict) -> str:
    responses, weights = numbers["responses"], numbers["weights"]
    wrong = [place for place, response in enumerate(responses) if response["reward"] == 0]
    short = min(wrong, key=lambda place: responses[place]["length"])
    long = max(wrong, key=lambda place: responses[place]["length"])
    right = [place for place, response in enumerate(responses) if response["reward"] == 1]
    guess = min(right, key=lambda place: responses[place]["length"])
    work = max(right, key=lambda place: responses[place]["length"])
    ratio = weights["grpo"][short] / weights["grpo"][long]
    ratio_right = weights["grpo"][guess] / weights["grpo"][work]
    return (
        "Bars are as long as the response and as high as the push on each of its tokens. Each "
        "panel has its own scale, and the number is the weight in thousandths. Under Dr. GRPO "
        "every token of a wrong response is pushed down alike, by "
        f"{-weights['drgrpo'][long] * SCALE:.1f}. Under GRPO a token of the wrong response with "
        f"{responses[short]['length']} tokens is pushed down {ratio:.0f} times as hard as one of "
        f"the response with {responses[long]['length']}. To be wrong at length is cheap, so wrong "
        "responses grow. Among the right ones the short one gains: each token of the lucky guess "
        f"of {responses[guess]['length']} tokens is pushed up {ratio_right:.1f} times as hard as "
        f"each token of the worked response of {responses[work]['length']}. The division by the "
        f"std multiplies all weights of this group by the same {1 / numbers['std']:.2f}."
    )


def not_shown(numbers: dict) -> str:
    return (
        "What training makes of it: that is length_bias. This is one group, the first of its run "
        "that has right responses of two lengths, wrong ones of three and one that was cut off. "
        "The weights are those of a round's first update, without importance weights and clip. "
        "Both losses also push on the same token in other responses, and the sum is what counts."
    )


FINDING = Finding(
    "one_group",
    "One group under the microscope",
    "python findings/one_group.py",
    measure,
    draw,
    table,
    caption,
    not_shown,
)

if __name__ == "__main__":
    FINDING.run()
