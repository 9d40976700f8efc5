"""What base models do before any training: section 2 of arXiv 2503.20783, for models of yours.

    python findings/base_models.py --model Qwen/Qwen2.5-Math-1.5B --tasks math500

asks each model with no template, r1 and qwen_math, 8 responses to a problem at temperature 1, and
prints a table: does it answer at all, accuracy, pass@8, self-reflection and what it is worth. The
figure is OUTPUT/analysis.png. With --judge an OpenAI-compatible endpoint looks for self-reflection
as well. All settings of eval.py work here, too.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from eval import EvalConfig, measure_cells, prepare_cells, report
from support.metrics import markdown, mean, number, read_rows
from templates import answer_in_loose_tags, last_boxed

# Words of self-reflection: the list of the paper (arXiv 2503.20783) and of its keyword_count.py
REFLECTION = (
    "recheck",
    "rethink",
    "reassess",
    "reevaluate",
    "re-evaluate",
    "reevaluation",
    "re-examine",
    "reexamine",
    "reconsider",
    "reanalyze",
    "double-check",
    "check again",
    "think again",
    "verify again",
    "go over the steps",
)


@dataclass(frozen=True)
class AnalysisConfig(EvalConfig):
    """Analyse base models. The settings are eval.py's, with other defaults."""

    template: tuple[str, ...] = ("none", "r1", "qwen_math")
    tasks: tuple[str, ...] = ("math500",)
    n: int = 8
    temperature: float = 1.0
    output: Path = Path("runs/base_models")
    judge: str | None = None  # URL of an OpenAI-compatible endpoint; may be left out
    judge_model: str | None = None  # its key is the environment's OPENAI_API_KEY


def reflects(response: str) -> bool:
    return any(word in response.lower() for word in REFLECTION)


def analyse(rows: list[dict], n: int) -> dict[str, float | None]:
    """Shares of P*n responses, in the order of the problems. None: there is no such response."""
    answers = []
    for row in rows:
        response = row["response"]
        box, tags = last_boxed(response), answer_in_loose_tags(response)
        answers.append(box is not None or tags is not None)
    reflecting = np.array([reflects(row["response"]) for row in rows])  # (P*n,)
    right = np.array([row["correct"] for row in rows])  # (P*n,)
    questions = np.asarray(reflecting.reshape(-1, n).any(axis=1))  # (P,)
    return {
        "answered": mean(answers),
        "reflection": mean(reflecting),
        "reflection_of_questions": mean(questions),
        "accuracy_reflecting": mean(right[reflecting]),
        "accuracy_not_reflecting": mean(right[~reflecting]),
    }


COLUMNS = {
    "answered": "answers",
    "accuracy": "accuracy",
    "reflection": "reflects: responses",
    "reflection_of_questions": "reflects: questions",
    "accuracy_reflecting": "accuracy with",
    "accuracy_not_reflecting": "accuracy without",
}


def analysis_table(rows: list[dict], n: int) -> str:
    """Markdown, a line for each model, template and task."""
    columns = COLUMNS | {f"pass@{n}": f"pass@{n}"}
    for key in rows[0]:
        if key.startswith("judge_") and key != "judge_model":
            columns[key] = key
    head = ["model", "template", "task", *columns.values(), "length right/wrong"]
    table = []
    for row in rows:
        cells = [row["model"], row["template"], row["task"]]
        cells += [number(row[key]) for key in columns]
        cells.append("/".join(number(row[f"length_{key}"], 0) for key in ("right", "wrong")))
        table.append(cells)
    return markdown(head, table)


def plot_analysis(rows: list[dict], n: int, file: Path) -> None:
    """Draw the analysis as bars: answers, accuracy and pass@n, self-reflection, length."""
    panels = {
        "share of responses that answer": ["answered"],
        "right": ["accuracy", f"pass@{n}"],
        "share with self-reflection words": ["reflection", "reflection_of_questions"],
        "length (tokens)": ["length_right", "length_wrong"],
    }
    figure = Figure(figsize=(12, 8), layout="constrained")
    places = np.arange(len(rows))
    labels = [f"{Path(row['model']).name}\n{row['template']}, {row['task']}" for row in rows]
    for axis, (title, keys) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for i, key in enumerate(keys):
            heights = [row[key] if row[key] is not None else 0.0 for row in rows]
            axis.bar(places + 0.4 * i, heights, 0.4, label=key)
        axis.set(title=title)
        axis.set_xticks(places + 0.2 * (len(keys) - 1), labels, fontsize=7)
        axis.legend()
    figure.savefig(file, dpi=120)


JUDGE = """Below are a question and a response to it. Reply with one digit and nothing else.
0: the response does not try to answer the question.
1: it tries to answer, and never looks back at its own steps.
2: it tries to answer, and somewhere checks, doubts or revises its own steps.

Question: {prompt}

Response: {response}"""


def judge(rows: list[dict], url: str, model: str) -> dict[str, float | None]:
    """What an OpenAI-compatible endpoint says: the share of responses that try to answer, that
    reflect, that reflect and have a word of REFLECTION, and that it gave no verdict on."""
    from openai import OpenAI, OpenAIError

    client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))

    def ask(row: dict) -> str:
        question = JUDGE.format_map(row)
        try:
            reply = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": question}], temperature=0
            )
        except OpenAIError as error:
            return f"failed: {error}"
        return (reply.choices[0].message.content or "").strip()

    with ThreadPoolExecutor(16) as pool:
        verdicts = list(pool.map(ask, rows))
    both = []
    for verdict, row in zip(verdicts, rows, strict=True):
        both.append(verdict == "2" and reflects(row["response"]))
    return {
        "judge_answers": mean(verdict in ("1", "2") for verdict in verdicts),
        "judge_reflects": mean(verdict == "2" for verdict in verdicts),
        "judge_and_words": mean(both),
        "judge_silent": mean(verdict not in ("0", "1", "2") for verdict in verdicts),
    }


def main() -> None:
    config = tyro.cli(AnalysisConfig, description=__doc__)
    if config.judge and not config.judge_model:
        sys.exit("error: --judge needs --judge-model")
    if config.reward != "math":
        sys.exit("error: the analysis needs to know which responses are right: --reward math")
    try:
        cells = prepare_cells(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    results = measure_cells(config, cells)
    if os.environ["RANK"] != "0":
        return
    for cell, result in zip(cells, results, strict=True):
        rows = read_rows(cell.file)
        result |= analyse(rows, config.n)
        if config.judge and config.judge_model:
            result |= judge(rows, config.judge, config.judge_model)
    report(config, results)
    print("\n" + analysis_table(results, config.n))
    plot_analysis(results, config.n, config.output / "analysis.png")


if __name__ == "__main__":
    main()
