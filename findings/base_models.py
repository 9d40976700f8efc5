"""What base models do before any training: section 2 of arXiv 2503.20783.

    python findings/base_models.py          # the finding: the toy base model, asked in two ways
    python findings/base_models.py --model Qwen/Qwen2.5-Math-1.5B --tasks math500

The second form is for models of yours. Each is asked with each template (none, r1, qwen_math), 8
responses to a problem at temperature 1. A table says: does it answer at all, accuracy, pass@8,
self-reflection and what it is worth. Other options go to eval.py as they are.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from findings.common import BLUE, GREEN, GREY, ROOT, TOY_BASE, Finding
from support.records import markdown, mean, number, read_rows
from templates import last_boxed

CLAIM = "The base model can do it before training, if it is asked in the way it knows"

# Words of self-reflection: the list of the paper and of its keyword_count.py
REFLECTION = (
    *("recheck", "rethink", "reassess", "reevaluate", "re-evaluate", "reevaluation", "re-examine"),
    *("reexamine", "reconsider", "reanalyze", "double-check", "check again", "think again"),
    *("verify again", "go over the steps"),
)


def reflects(response: str) -> bool:
    return any(word in response.lower() for word in REFLECTION)


def answers(response: str) -> bool:
    """Whether there is an answer in any of the formats of the templates."""
    in_tags = "<answer>" in response and "</answer>" in response
    return in_tags or last_boxed(response) is not None


def analyse(rows: list[dict], n: int) -> dict[str, float | None]:
    """Shares of P*n responses, in the order of the problems. None: there is no such response."""
    reflecting = np.array([reflects(row["response"]) for row in rows])  # (P*n,)
    right = np.array([row["correct"] is True for row in rows])  # (P*n,)
    return {
        "answered": mean(answers(row["response"]) for row in rows),
        "accuracy": mean(right),
        f"pass@{n}": mean(np.any(right.reshape(-1, n), axis=1).tolist()),
        "reflection": mean(reflecting),
        "reflection_of_problems": mean(np.any(reflecting.reshape(-1, n), axis=1).tolist()),
        "accuracy_reflecting": mean(right[reflecting]),
        "accuracy_not_reflecting": mean(right[~reflecting]),
        "truncated": mean(row["finish_reason"] == "length" for row in rows),
        "length_right": mean(row["length"] for row in rows if row["correct"] is True),
        "length_wrong": mean(row["length"] for row in rows if row["correct"] is False),
    }


def ask(model: str, template: str, folder: Path, n: int, options: list[str]) -> list[dict]:
    """The graded responses of eval.py, n to a problem. Raises CalledProcessError if it fails."""
    command = ["eval.py", "--model", model, "--template", template, "--output", str(folder)]
    command += ["--n", str(n), "--temperature", "1", *options]
    print(shlex.join(["python", *command]), flush=True)
    subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], check=True)
    return read_rows(folder / "responses.jsonl")


# ------------------------------------------------------------------------- models of one's own


def analysis_table(results: list[dict]) -> str:
    """Markdown, a line for each model, template and task."""
    cells = [[v if isinstance(v, str) else number(v) for v in row.values()] for row in results]
    return markdown([key.replace("_", " ") for key in results[0]], cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", required=True, help="folders or hub names")
    parser.add_argument("--template", nargs="+", default=["none", "r1", "qwen_math"])
    parser.add_argument("--n", type=int, default=8, help="responses to a problem")
    parser.add_argument("--output", type=Path, default=Path("runs/base_models"))
    config, options = parser.parse_known_args()
    results = []
    for model in config.model:
        for template in config.template:
            folder = config.output / f"{model.strip('/.').replace('/', '-')}-{template}"
            rows = ask(model, template, folder, config.n, options)
            for task in dict.fromkeys(row["task"] for row in rows):
                some = [row for row in rows if row["task"] == task]
                labels = {"model": model, "template": template, "task": task}
                results.append(labels | analyse(some, config.n))
    print("\n" + analysis_table(results))


# -------------------------------------------------------------------------------- the finding

N, TEMPLATES = 8, ("none", "qwen_math")
# The prompts of qwen_math have up to 145 tokens
OPTIONS = ["--tasks", f"{TOY_BASE}/test.jsonl", "--max-prompt-tokens", "160"]
OPTIONS += ["--max-response-tokens", "72"]
BARS = {"answered": GREY, "accuracy": BLUE, f"pass@{N}": GREEN}
NAMES = {"answered": "holds an answer", "accuracy": "right", f"pass@{N}": f"right in {N} tries"}


def habits(rows: list[dict], n: int) -> dict:
    """How often the toy works a problem out, in its own words, and what the other responses get."""
    worked = np.array([row["response"].startswith("Step by step") for row in rows])  # (P*n,)
    right = np.array([row["correct"] is True for row in rows])
    return {
        "worked": mean(worked),
        "accuracy_worked": mean(right[worked]),
        "accuracy_other": mean(right[~worked]),
        "pass_other": mean(np.any((right & ~worked).reshape(-1, n), axis=1).tolist()),
    }


def measure() -> dict:
    numbers = {}
    for template in TEMPLATES:
        folder = Path(f"runs/findings-base-{template}")
        rows = ask(f"{TOY_BASE}/model", template, folder, N, OPTIONS)
        numbers[template] = analyse(rows, N) | habits(rows, N) | {"problems": len(rows) // N}
    return numbers


def draw(numbers: dict) -> Figure:
    """Three bars for each template."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axis = figure.subplots()
    for shift, (key, color) in zip((-0.27, 0, 0.27), BARS.items(), strict=True):
        heights = [numbers[template][key] for template in TEMPLATES]
        bars = axis.bar(np.arange(2) + shift, heights, 0.25, color=color, label=NAMES[key])
        axis.bar_label(bars, fmt="%.2f", fontsize=8.5)
    axis.set_xticks(range(2), [f"template {template}" for template in TEMPLATES])
    axis.set(title="The toy base model, before any training", ylim=(0, 1.1))
    axis.grid(False, axis="x")
    axis.legend(loc="upper right")
    return figure


def measured(numbers: dict) -> str:
    none, chat = numbers["none"], numbers["qwen_math"]
    return (
        f"works out {none['worked']:.1%} of its responses, of which {none['accuracy_worked']:.1%} "
        f"are right; in another format {chat['worked']:.1%}"
    )


def text(numbers: dict) -> str:
    head = ["template", *NAMES.values(), "worked out", "right of these", "right of the others"]
    rows = []
    for template in TEMPLATES:
        found = numbers[template]
        keys = (*BARS, "worked", "accuracy_worked", "accuracy_other", "truncated")
        rows.append([template, *(number(found[key]) for key in keys)])
    none = numbers["none"]
    return f"""{markdown([*head, "cut off"], rows)}

{none["problems"]} held-out problems, {N} responses to each at temperature 1. The toy has only read
plain questions and answers, so another format hides what it can. Without one it works out
{none["worked"]:.1%} of its responses, and {none["accuracy_worked"]:.1%} of these are right: the
ability is there before training, which raises how often it is used. That {none[f"pass@{N}"]:.1%} of
the problems have a right response among {N} shows less: the responses that are not worked out, most
of them guesses of a digit, reach {none["pass_other"]:.1%} alone. Words of self-reflection are in
{none["reflection"]:.1%} of the responses: the toy says "wait", which is not on the paper's list.

**Not shown:** what a real base model does. The paper finds that Qwen2.5 base models answer best
without a template, and that Llama and DeepSeek models need one."""


FINDING = Finding("base_models", CLAIM, measure, draw, measured, text)

if __name__ == "__main__":
    if len(sys.argv) == 1:
        FINDING.run()
    else:
        main()
