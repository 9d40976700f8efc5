"""What the toy base model does before any training, asked with two templates.

    python findings/toy_base_model.py

runs findings/base_models.py, the analysis of section 2 of arXiv 2503.20783, on the toy base model.
For models of yours use base_models.py itself.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from findings.base_models import COLUMNS
from findings.finding import BLUE, GREEN, GREY, Finding
from findings.runs import make_toy_base
from support.metrics import markdown

OUTPUT = Path("runs/findings-base-models")
SAMPLES = 8  # responses to a problem, base_models.py's default
# The prompts of qwen_math have up to 145 tokens
ARGUMENTS = shlex.split(
    "findings/base_models.py --model runs/toy-base/model --tasks runs/toy-base/test.jsonl "
    f"--template none qwen_math --max-prompt-tokens 160 --max-response-tokens 72 --output {OUTPUT}"
)
KEPT = ("model", "template", "task", "problems", "truncated", "length_right", "length_wrong")
NAMES = {"answered": "holds an answer", "accuracy": "right", f"pass@{SAMPLES}": f"pass@{SAMPLES}"}
BARS = {"answered": GREY, "accuracy": BLUE, f"pass@{SAMPLES}": GREEN}


def measure() -> dict:
    make_toy_base()
    subprocess.run([sys.executable, *ARGUMENTS], check=True)
    results = json.loads((OUTPUT / "results.json").read_text())["results"]
    kept = [*KEPT, *COLUMNS, f"pass@{SAMPLES}"]
    return {
        "seeds": [0],
        "runs": {"base_models": shlex.join(["python", *ARGUMENTS])},
        "results": [{key: result[key] for key in kept} for result in results],
    }


# ------------------------------------------------------------------------- figure, table, text


def draw(numbers: dict) -> Figure:
    """Three bars for each template."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axis = figure.subplots()
    results = numbers["results"]
    places = np.arange(len(results))
    for shift, (key, color) in zip((-0.27, 0, 0.27), BARS.items(), strict=True):
        heights = [result[key] for result in results]
        bars = axis.bar(places + shift, heights, 0.25, color=color, label=NAMES.get(key, key))
        axis.bar_label(bars, fmt="%.2f", fontsize=8.5)
    axis.set_xticks(places, [f"template {result['template']}" for result in results])
    axis.set(title="The toy base model, before any training", ylim=(0, 1.1))
    axis.grid(False, axis="x")
    axis.legend(loc="upper right")
    return figure


def table(numbers: dict) -> str:
    head = ["template", *(NAMES[key] for key in BARS), "cut off", "tokens, right", "tokens, wrong"]
    rows = []
    for result in numbers["results"]:
        shares = [f"{result[key]:.3f}" for key in (*BARS, "truncated")]
        lengths = [f"{result[key]:.0f}" for key in ("length_right", "length_wrong")]
        rows.append([result["template"], *shares, *lengths])
    return markdown(head, rows)


def caption(numbers: dict) -> str:
    results = {result["template"]: result for result in numbers["results"]}
    told = []
    for template, result in results.items():
        told.append(
            f"with {template} {result['answered']:.1%} of the responses hold an answer and "
            f"{result['accuracy']:.1%} are right"
        )
    none = results["none"]
    return (
        f"Asked {none['problems']} held-out problems {SAMPLES} times each at temperature 1: "
        f"{'; '.join(told)}. The toy has only read plain questions and answers, so any template "
        "hides what it can. Without one, at least one of its "
        f"{SAMPLES} responses is right for {none[f'pass@{SAMPLES}']:.1%} of the problems: the "
        "ability is there before training, which raises how often it is used. Words of "
        f'self-reflection are in {none["reflection"]:.1%} of the responses: the toy says "wait", '
        "which is not on the paper's list."
    )


def not_shown(numbers: dict) -> str:
    return (
        "What a real base model does. The paper finds that Qwen2.5 base models answer best without "
        "a template, and that Llama and DeepSeek models need one. That depends on what they have "
        "read, which nobody outside knows; of the toy it is known, because toy.py writes it."
    )


FINDING = Finding(
    "base_models",
    "A base model can do it before training, if it is asked in the way it knows",
    "python findings/toy_base_model.py",
    measure,
    draw,
    table,
    caption,
    not_shown,
)

if __name__ == "__main__":
    FINDING.run()
