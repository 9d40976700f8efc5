"""What a set of saved responses shows: tables, a figure, self-reflection, another grader's view.

A row is a response as eval.py saves it; a result is the settings and scores of one model, template
and task.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from templates import TEMPLATES, Grader, find_template

# Words of self-reflection: the list of the paper (arXiv 2503.20783) and of its keyword_count.py
REFLECTION = ("recheck", "rethink", "reassess", "reevaluate", "re-evaluate", "reevaluation",
              "re-examine", "reexamine", "reconsider", "reanalyze", "double-check", "check again",
              "think again", "verify again", "go over the steps")


def reflects(response: str) -> bool:
    return any(word in response.lower() for word in REFLECTION)


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def with_interval(row: dict, name: str) -> str:
    if name not in row:
        return ""
    return (f"{row[name]:.3f} ± {row[f'{name}_se']:.3f} "
            f"[{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]")


def scores_table(rows: list[dict], n: int) -> str:
    """Markdown; each measure as value ± standard error [95% interval]."""
    measures = ["accuracy"] + [f"pass@{n}", f"maj@{n}"] * (n > 1)
    head = ["model", "template", "task", "problems", "pass@1" if n == 1 else f"mean@{n}",
            *measures[1:], "boxed", "unparsed", "truncated", "length right/wrong",
            "timeouts/errors"]
    return markdown(head, [
        [row["model"], row["template"], row["task"], str(row["problems"]),
         *(with_interval(row, name) for name in measures),
         *(number(row.get(key)) for key in ("boxed", "unparsed", "truncated")),
         "/".join(number(row.get(f"length_{key}"), 0) for key in ("right", "wrong")),
         f"{row.get('timeouts', '')}/{row.get('errors', '')}"] for row in rows])


ANALYSIS = {"answered": "answers", "accuracy": "accuracy", "reflection": "reflects: responses",
            "reflection_of_questions": "reflects: questions",
            "accuracy_reflecting": "accuracy with", "accuracy_not_reflecting": "accuracy without"}


def analysis_table(rows: list[dict], n: int) -> str:
    """Markdown: what base models do before any training."""
    names = ANALYSIS | {f"pass@{n}": f"pass@{n}"}
    judged = [key for key in rows[0] if key.startswith("judge_")]
    head = ["model", "template", "task", *names.values(), *judged, "length right/wrong"]
    return markdown(head, [
        [row["model"], row["template"], row["task"],
         *(number(row[key]) for key in (*names, *judged)),
         "/".join(number(row[f"length_{key}"], 0) for key in ("right", "wrong"))] for row in rows])


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def plot_analysis(rows: list[dict], n: int, file: Path) -> None:
    """Draw the analysis as bars: answers, accuracy and pass@n, self-reflection, length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"share of responses that answer": ["answered"],
              "right": ["accuracy", f"pass@{n}"],
              "share with self-reflection words": ["reflection", "reflection_of_questions"],
              "length (tokens)": ["length_right", "length_wrong"]}
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    places = np.arange(len(rows))
    for axis, (title, keys) in zip(axes.flat, panels.items(), strict=True):
        for i, key in enumerate(keys):
            heights = [row[key] if row[key] is not None else 0.0 for row in rows]
            axis.bar(places + 0.4 * i, heights, 0.4, label=key)
        axis.set(title=title)
        labels = [f"{Path(row['model']).name}\n{row['template']}, {row['task']}" for row in rows]
        axis.set_xticks(places + 0.2 * (len(keys) - 1), labels, fontsize=7)
        axis.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


JUDGE = """Below are a question and a response to it. Reply with one digit and nothing else.
0: the response does not try to answer the question.
1: it tries to answer, and never looks back at its own steps.
2: it tries to answer, and somewhere checks, doubts or revises its own steps.

Question: {prompt}

Response: {response}"""


def judge(rows: list[dict], url: str, model: str) -> dict[str, float]:
    """What an OpenAI-compatible endpoint says: the share of responses that try to answer, that
    reflect, that reflect and have a word of REFLECTION, and that it gave no verdict on."""
    from openai import OpenAI, OpenAIError

    client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))

    def ask(row: dict) -> str:
        messages = [{"role": "user", "content": JUDGE.format_map(row)}]
        try:
            reply = client.chat.completions.create(model=model, messages=messages, temperature=0)
        except OpenAIError as error:
            return f"failed: {error}"
        return (reply.choices[0].message.content or "").strip()

    with ThreadPoolExecutor(16) as pool:
        verdicts = list(pool.map(ask, rows))
    both = [v == "2" and reflects(row["response"]) for v, row in zip(verdicts, rows)]
    return {"judge_answers": float(np.mean([v in ("1", "2") for v in verdicts])),
            "judge_reflects": float(np.mean([v == "2" for v in verdicts])),
            "judge_and_words": float(np.mean(both)),
            "judge_silent": float(np.mean([v not in ("0", "1", "2") for v in verdicts]))}


def regrade(rows: list[dict], default: str) -> str:
    """Grade saved responses again: sets `reward`, `answer` and `failure` of the rows, and returns
    a Markdown table of what changed.

    Rows need `response` and `answers`; the template is their `template`, or else `default`.
    Raises ValueError if a column is missing.
    """
    if missing := [key for key in ("response", "answers") if any(key not in row for row in rows)]:
        raise ValueError(f"the rows have no {', '.join(missing)}")
    table = []
    for name in dict.fromkeys(row.get("template", default) for row in rows):
        # "chat" needs a tokenizer only to ask; it answers in a box, too
        template = TEMPLATES["none"] if name == "chat" else find_template(name, None)
        some = [row for row in rows if row.get("template", default) == name]
        saved, start = [row.get("reward", 0.0) for row in some], time.perf_counter()
        with Grader(template) as grader:
            verdicts = grader.verdicts([r["response"] for r in some], [r["answers"] for r in some])
        rate = len(some) / (time.perf_counter() - start)
        for row, verdict in zip(some, verdicts, strict=True):
            row |= {"answer": template.extract(row["response"]), "reward": float(verdict is True),
                    "failure": verdict if isinstance(verdict, str) else None}
        new = [row["reward"] for row in some]
        table.append([name, str(len(some)), number(np.mean(saved)), number(np.mean(new)),
                      str(sum(a > b for a, b in zip(new, saved))),
                      str(sum(a < b for a, b in zip(new, saved))),
                      f"{grader.timeouts}/{grader.errors}", number(rate, 0)])
    return markdown(["template", "responses", "saved accuracy", "accuracy", "now right",
                     "now wrong", "timeouts/errors", "responses/s"], table)
