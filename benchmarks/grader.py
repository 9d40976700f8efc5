"""This grader against plain math-verify, on labelled responses: a table in Markdown.

    python benchmarks/grader.py tests/grader_cases.jsonl

Rows have response, gold, template, expected (0 or 1) and note; "bomb" in the note marks a response
that is made to hang or break a grader. Plain is verify(parse(gold), parse(response)), all defaults,
in a process that is killed after LIMIT seconds, so that a hang is a result too; once with the gold
as it stands in the data, once in a box, which tells math-verify that it is LaTeX.
"""

import json
import logging
import sys
import time
from concurrent.futures import TimeoutError as PoolTimeout
from importlib.metadata import version
from pathlib import Path

from math_verify import parse, verify
from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.grader import Grader
from support.metrics import markdown
from templates import TEMPLATES

LIMIT = 30  # seconds a response; math-verify's own alarms end each of its three steps after 5
SLOW = 5  # seconds: the default limit of our grader and of math-verify's alarms


def plain(gold: str, response: str) -> bool:
    return verify(parse(gold), parse(response))


def plain_verdicts(rows: list[dict], gold: str) -> list[tuple[bool | str, float]]:
    """Verdict ("hang", "died" or an error in words) and seconds of each row, in one worker."""
    results: list[tuple[bool | str, float]] = []
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it logs whole responses
    with ProcessPool(1) as pool:
        pool.schedule(plain, args=["1", "$1$"]).result()  # loads what is loaded at the first use
        for row in tqdm(rows, desc="plain math-verify"):
            start = time.perf_counter()
            verdict: bool | str
            try:
                args = gold.replace("GOLD", row["gold"]), row["response"]
                verdict = pool.schedule(plain, args=args, timeout=LIMIT).result()
            except PoolTimeout:
                verdict = "hang"
            except ProcessExpired:
                verdict = "died"
            except Exception as error:  # the worker's, whatever it is: a result of the measurement
                verdict = repr(error)
            results.append((verdict, time.perf_counter() - start))
    return results


def our_verdicts(rows: list[dict]) -> list[tuple[bool | str, float]]:
    """As plain_verdicts, of our grader with one worker for each template."""
    graders = {}
    for name in {row["template"] for row in rows}:
        graders[name] = Grader(TEMPLATES["none" if name == "no" else name], workers=1)
    for grader in graders.values():
        grader.grade(["\\boxed{1}</think> <answer>1</answer>"], ["2"])  # starts the worker
    results: list[tuple[bool | str, float]] = []
    for row in tqdm(rows, desc="this grader"):
        start = time.perf_counter()
        (verdict,) = graders[row["template"]].verdicts([row["response"]], [row["gold"]])
        results.append((verdict.failure or verdict.correct is True, time.perf_counter() - start))
    for grader in graders.values():
        grader.close()
    return results


def line(name: str, rows: list[dict], results: list[tuple[bool | str, float]]) -> list[str]:
    bombs = [r for row, r in zip(rows, results) if "bomb" in row["note"]]
    usual = [(row, r) for row, r in zip(rows, results) if "bomb" not in row["note"]]
    accepts = sum(v is True and not row["expected"] for row, (v, _) in usual)
    rejects = sum(v is not True and row["expected"] for row, (v, _) in usual)
    seconds = sum(s for _, (_, s) in usual)
    return [
        name,
        str(accepts),
        str(rejects),
        f"{len(usual) / seconds:.0f}",
        str(sum(v is True for v, _ in bombs)),
        str(sum(s > SLOW for _, s in bombs)),
        f"{max(s for _, s in bombs):.1f}",
        f"{sum(s for _, s in bombs):.0f}",
    ]


def main() -> None:
    rows = [json.loads(text) for text in Path(sys.argv[1]).read_text().splitlines()]
    bombs = sum("bomb" in row["note"] for row in rows)
    right = sum(row["expected"] for row in rows)
    print(
        f"{len(rows) - bombs} ordinary responses, {right} of them right, and {bombs} hostile "
        "ones; one worker each.",
        "; ".join(
            f"{p} {version(p)}" for p in ("math-verify", "latex2sympy2_extended", "sympy", "pebble")
        )
        + "\n",
    )
    head = [
        "grader",
        "false accepts",
        "false rejects",
        "ordinary responses/s",
        "hostile accepted",
        f"hangs (over {SLOW} s)",
        "longest hang (s)",
        "hostile responses (s)",
    ]
    print(
        markdown(
            head,
            [
                line("support.grader.Grader", rows, our_verdicts(rows)),
                line("plain math-verify", rows, plain_verdicts(rows, "GOLD")),
                line(
                    "plain math-verify, gold in a box", rows, plain_verdicts(rows, "\\boxed{GOLD}")
                ),
            ],
        )
    )


if __name__ == "__main__":
    main()
