"""The grader: against others on labelled responses, on the golds of benchmarks, and under attack.

    python benchmarks/grader.py                              # false accepts and rejects, time
    python benchmarks/grader.py --paper-grader math_grader.py
    python benchmarks/grader.py --golds sets/                # golds equal themselves and no others
    python benchmarks/grader.py --fuzz 10                    # ten minutes of random answers

Cases have response, gold, template, expected (0 or 1) and note; "bomb" in the note marks a response
that is made to hang or break a grader. Each grader compares in a process that is killed after LIMIT
seconds. Math-verify gets the gold in a box, else it takes it for plain text. The paper's grader, in
slow mode, is understand_r1_zero/math_grader.py of github.com/sail-sg/understand-r1-zero, which
needs pylatexenc. --golds reads every .jsonl of a folder. Figures go to
benchmarks/results/grader.json.
"""

import ast
import importlib
import json
import logging
import multiprocessing
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import TimeoutError as PoolTimeout
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import tyro
from pebble import ProcessExpired, ProcessPool

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.answers import answers_match, gold_answers, readable, spelling
from support.grader import TIMEOUT, Grader
from support.records import markdown, read_rows, versions
from templates import TEMPLATES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "grader.json"
LIMIT = 30  # seconds for a response
SLOW = 5  # seconds: the default limit of our grader and of math-verify's alarms
PAIRS = 20_000  # of different golds of one file
CASES = read_rows(ROOT / "tests" / "grader_cases.jsonl")


@dataclass(frozen=True)
class Options:
    """Which of the measurements; see the top of the file."""

    paper_grader: Path | None = None
    golds: Path | None = None
    fuzz: float = 0  # minutes
    seed: int = 0


# ------------------------------------------------------------------------- labelled responses


def template_of(case: dict) -> str:
    return "none" if case["template"] == "no" else case["template"]


def ours(case: dict) -> bool:
    answer = TEMPLATES[template_of(case)].extract(case["response"]) or ""
    return answers_match(answer, case["gold"])


def plain(case: dict) -> bool:
    from math_verify import parse, verify

    return verify(parse(f"\\boxed{{{case['gold']}}}"), parse(case["response"]))


def paper(case: dict, file: Path) -> bool:
    sys.path.append(str(file.resolve().parent))
    module = importlib.import_module(file.stem)
    rule = module.answer_tag_reward_fn if case["template"] == "r1" else module.boxed_reward_fn
    return rule(case["response"], case["gold"])[1] == 1.0


def judged(grader: Callable, case: dict, *args) -> tuple[bool, float]:
    """The verdict, and its seconds of processor time."""
    logging.disable()  # math-verify logs whole responses
    start = time.process_time()
    return bool(grader(case, *args)), time.process_time() - start


def figures(grader: Callable, *args) -> dict:
    """What one grader does with CASES, in a process that is started again when lost."""
    counts: Counter = Counter()
    times: list[float] = []
    wrong: list[int] = []
    with ProcessPool(1) as pool:
        pool.schedule(judged, args=(grader, CASES[0], *args)).result()  # loads what is loaded once
        for case in CASES:
            start = time.perf_counter()
            try:
                call = (grader, case, *args)
                found = pool.schedule(judged, args=call, timeout=LIMIT).result()
            except Exception as error:  # the grader's own, whatever it is
                found = False, time.perf_counter() - start
                killed = isinstance(error, (PoolTimeout, ProcessExpired))
                counts["killed" if killed else "errors"] += 1
            verdict, seconds = found
            counts["slow"] += seconds > SLOW
            if "bomb" not in case["note"]:
                times.append(1000 * seconds)
            if verdict != bool(case["expected"]):
                wrong.append(case["id"])
                counts["false accepts" if verdict else "false rejects"] += 1
    times.sort()
    counted = ("false accepts", "false rejects", "killed", "errors", "slow")
    return {key: counts[key] for key in counted} | {
        "median ms": round(statistics.median(times), 2),
        "99th percentile ms": round(times[int(0.99 * len(times))], 1),
        "wrong": wrong,
    }


def compare(paper_grader: Path | None) -> dict:
    found = {"support/answers.py": figures(ours), "math-verify": figures(plain)}
    if paper_grader:
        found["paper"] = figures(paper, paper_grader)
    head = [key for key in found["math-verify"] if key != "wrong"]
    rows = [[name, *(str(row[key]) for key in head)] for name, row in found.items()]
    right = sum(case["expected"] for case in CASES)
    print(f"{len(CASES)} responses, {right} right\n\n" + markdown(["grader", *head], rows))
    return {"cases": len(CASES), "right": right, **found}


# -------------------------------------------------------------------------- golds of benchmarks


def golds_of(file: Path) -> list[list[str]]:
    golds = []
    for line in file.read_text().strip().split("\n"):  # splitlines knows more ends of a line
        row = json.loads(line)
        cell = row.get("answer", "")
        if isinstance(cell, str) and cell.startswith(("['", '["')):
            cell = ast.literal_eval(cell)
        golds.append(gold_answers(cell))
    return [entry for entry in golds if entry]


def check_golds(golds: list[list[str]], seed: int) -> dict:
    """Golds that are not readable or not equal to themselves, and pairs of different ones that are
    taken for equal."""
    texts, draw = sorted({text for entry in golds for text in entry}), random.Random(seed)
    equal, tried = set(), 0
    while tried < PAIRS:
        (gold, *_), (answer, *_) = draw.sample(golds, 2)
        if spelling(gold) != spelling(answer):
            tried += 1
            if answers_match(answer, gold):
                equal.add((gold, answer))
    return {
        "golds": len(golds),
        "unreadable": [text for text in texts if not readable(text)],
        "not equal to itself": [text for text in texts if not answers_match(f"$ {text} $", text)],
        "pairs": PAIRS,
        "equal": sorted(equal),
    }


# ---------------------------------------------------------------------------------- attacks


class Attack(NamedTuple):
    """An answer, and whether it may be accepted; None: nobody knows."""

    answer: str
    gold: str
    right: bool | None


def expression(draw: random.Random, depth: int = 3) -> tuple[str, Fraction]:
    """Random LaTeX, and its value."""
    if depth == 0 or draw.random() < 0.2:
        number = draw.randint(0, 20)
        return str(number), Fraction(number)
    left, a = expression(draw, depth - 1)
    right, b = expression(draw, depth - 1)
    exponent = draw.randint(1, 3)
    ways: list[tuple[str, Fraction]] = [
        (f"({left}) + ({right})", a + b),
        (f"({left}) - ({right})", a - b),
        (f"({left}) \\cdot ({right})", a * b),
        (f"({left})({right})", a * b),
        (f"({left})^{{{exponent}}}", a**exponent),
        (f"-\\left({left}\\right)", -a),
    ]
    if b:
        ways.append((f"\\frac{{{left}}}{{{right}}}", a / b))
    return draw.choice(ways)


def known(draw: random.Random) -> Attack:
    """An expression against its value, or against one that is near."""
    text, value = expression(draw)
    right = draw.random() < 0.5
    steps = [Fraction(1), Fraction(-1), Fraction(1, 2), Fraction(1, 10**12)]
    other = value if right else value + draw.choice(steps)
    return Attack(text, f"\\frac{{{other.numerator}}}{{{other.denominator}}}", right)


def listed(draw: random.Random) -> Attack:
    """Several answers for several, for one, or too few; in many ways of writing."""
    gold = draw.sample(range(-30, 30), draw.randint(1, 4))
    answer, spare = draw.sample(gold, len(gold)), draw.randint(31, 60)
    changes = [answer, answer, [*answer, spare], [spare, *answer[1:]]]
    changes += [[*answer, answer[0]], answer[1:]]
    answer = draw.choice(changes)
    name = draw.choice(["", "", "x = "])
    joints = [", ", " \\text{ or } ", " \\text{ and } ", " or ", " \\lor ", " \\quad ", "; "]
    joint = draw.choice(joints)
    text = joint.join(f"{name}{number}" for number in answer)
    return Attack(text, ", ".join(map(str, gold)), sorted(answer) == sorted(gold))


def system(draw: random.Random) -> Attack:
    """Points as equations, right or with two numbers exchanged."""
    points = [draw.sample(range(-9, 10), 2) for _ in range(draw.randint(1, 3))]
    right = draw.random() < 0.5
    written = [point if right else point[::-1] for point in points]
    equations = [f"x = {x}, y = {y}" for x, y in draw.sample(written, len(written))]
    gold = ", ".join(f"({x}, {y})" for x, y in points)
    return Attack(" \\text{ and } ".join(equations), gold, sorted(written) == sorted(points))


def near(draw: random.Random) -> Attack:
    """What differs only in what a careless grader drops."""
    a, b = draw.sample(range(2, 50), 2)
    n, upper = draw.randint(100, 2000), draw.choice("ABCDKMNRST")
    lower = upper.lower()
    return Attack(
        *draw.choice([
            (f"{a}{lower} + {b}{upper}", f"{a}{upper} + {b}{lower}", False),
            (f"{a}{lower} + {b}{upper}", f"{b}{upper} + {a}{lower}", True),
            (f"\\frac{{1}}{{{a}^{{{n}}}}}", f"\\frac{{1}}{{{b}^{{{n}}}}}", False),
            (f"{a}^{{{n}}} + 1", f"{a}^{{{n}}}", False),
            (f"{a}", f"x + y = {a}", False),
            (f"x + y = {a}", f"{a}", True),
            (f"x + {b} = {a}", f"{a}", False),
            (f"{a} \\text{{ hours }} {b} \\text{{ minutes}}", f"{a} \\text{{ hours }}", False),
            (f"{a} \\text{{ cm}}", f"{a} \\text{{ m}}", False),
            (f"{a} \\text{{ cm}}", f"{a}", True),
            (f"{a % 12 + 1}:{10 + b}", f"{a % 12 + 1}:{10 + (b + 1) % 50}", False),
            (f"{a}\\%", f"{100 * a}", False),
            (f"{a}_{{{b}}}", f"{a}", False),
            (f"x_{{{a}}}", f"x_{{{b}}}", False),
            (f"{lower} = {lower}", lower, False),
            (f"({a}, {b})", f"({b}, {a})", False),
            (f"[{a}, {a + b}]", f"({a}, {a + b})", False),
        ])
    )  # fmt: skip


HOLLOW = [
    "", " ", "$$", "\\,", "~", "{}", "\\text{}", "\\quad", "()", "\\{\\}", ".", "nan",
    "\\frac{0}{0}", "0/0", "\\infty-\\infty", "None", "null", "zoo", "\\frac{1}{0}", "?", "-",
    "x/0", "\\varnothing", "\\log 0", "0^{-1}", "answer", "\\text{answer}", "x = x",
    "f(x) = f(x)", "x \\equiv x", "3 \\to 5", "3 < x < 5", "3 | 5", "3 / 5 ?", "3 \\neq 5",
    "3 = 5", "\\text{either 3 or 5}", "3 \\text{ (or } 5)",
]  # fmt: skip


def hollow(draw: random.Random) -> Attack:
    return Attack(draw.choice(HOLLOW), draw.choice(["3", "5", "0", "\\frac{1}{2}", "\\pi"]), False)


def hostile(draw: random.Random) -> Attack:
    """What is computed for ever, or fills the memory, or is hard to parse."""
    big, n = draw.choice([9, 99, 10**6, 10**9]), draw.choice([10, 20, 40, 90])
    texts = [
        f"{big}^{{{big}^{{{big}}}}}", f"{big}**{big}**{big}", f"({big}!)!", f"{n}!!!!",
        f"1e{big}", f"\\binom{{{big}}}{{{big // 2}}}", f"\\sum_{{k=1}}^{{{big}}} k^{{k}}",
        f"10^{{-{big}^{{9}}}}", f"\\int_0^{{{big}}} x^{{x^x}} dx",
        f"\\lim_{{x \\to \\infty}} x^{{x^x}} / {big}!", f"(x + y + z + w)^{{{big}}}",
        f"\\sqrt[{n}]{{{big}^{{{n}}} + 1}}", f"{big}^{{{n}}} \\bmod {n}",
        f"\\gcd({big}^{{{n}}} - 1, {big + 1}^{{{n}}} - 1)",
        f"\\log_{{{big}}} {big}^{{{big}^{{2}}}}", f"\\sin({big}^{{{big}}})",
        f"\\lfloor \\pi^{{{big}}} \\rfloor", f"({big}^{{{big}}}, 3)",
        "\\sqrt{" * n + "2" + "}" * n, "\\frac{1}{1+" * n + "x" + "}" * n,
        "(" * n + "1" + ")" * n, "{" * n, "}" * n, "\\boxed{" * n, "9" * 3 * n, "1" + "+1" * n,
        "x_" * n, "\\a" * n + " = 1", "-" * 3 * n + "1", "\\left(" * n,
        "\u202e543" + "\u202c" * n, "1" + "\u0301" * n, "\x00" * n, "1\\\\" * n, "$" * n,
        "\\text{" * n, "the answer is " * n, "1 000 " * n, "\\$ % & # @ ~ ^",
    ]  # fmt: skip
    text = draw.choice(texts)
    return Attack(text, draw.choice(["3", "\\frac{1}{2}", "x^2", "(0, 1]", text]), None)


LETTERS = (
    "0123456789+-*/^_{}()[]\\$.,;:=<>|! abcxyzN\u03c0\u221a\u221e\u2264\u00b2\u2026\u4e2d\U0001f600"
)


def mutated(draw: random.Random) -> Attack:
    """A labelled answer with some letters changed, moved, doubled or cut off."""
    case = draw.choice(CASES)
    text = (TEMPLATES[template_of(case)].extract(case["response"]) or "")[-400:]
    for _ in range(draw.randint(1, 5)):
        place, end = sorted(draw.randint(0, len(text)) for _ in "ab")
        part = text[place : min(end, place + 20)]
        letter = draw.choice(LETTERS)
        new = draw.choice(["", part * 2, part[::-1], letter, part.upper(), "\\" + part])
        text = text[:place] + new + text[place + len(part) :]
    return Attack(text, case["gold"], None)


KINDS = {known: 25, listed: 15, system: 8, near: 17, hollow: 10, mutated: 20, hostile: 5}  # percent
CLEAN = [Attack("\\frac{6}{8}", "0.75", True), Attack("\\frac{6}{9}", "0.75", False)]


def attack(minutes: float, seed: int) -> dict:
    """Batches of answers as in training, each with two clean ones. What must not be is "wrong"."""
    draw, memory = random.Random(seed), 0.0
    table: dict[str, Counter] = {}
    wrong: list[Attack] = []
    start, longest = time.monotonic(), 0.0
    with Grader("none", workers=2) as grader:
        while time.monotonic() - start < 60 * minutes:
            kinds = draw.choices(list(KINDS), list(KINDS.values()), k=126)
            tried = [*(kind(draw) for kind in kinds), *CLEAN]
            begun = time.monotonic()
            boxed = [f"So it is $\\boxed{{{one.answer}}}$." for one in tried]
            verdicts = grader.verdicts(boxed, [one.gold for one in tried])
            longest = max(longest, time.monotonic() - begun)
            for kind, one, verdict in zip([*kinds, known, known], tried, verdicts, strict=True):
                counts = table.setdefault(kind.__name__, Counter())
                counts["answers"] += 1
                counts["accepted"] += verdict.correct is True
                counts["right, but refused"] += one.right is True and verdict.correct is False
                counts["timeouts"] += verdict.failure == TIMEOUT
                counts["errors"] += verdict.failure not in (None, TIMEOUT)
                if one in CLEAN and verdict.correct != one.right:
                    wrong.append(one)
                elif one.right is False and verdict.correct:
                    wrong.append(one)
                elif verdict.failure or (one.right and not verdict.correct):
                    counts[f"e.g. {one.answer[:60]!r} for {one.gold[:60]!r}"] += 1
            for worker in multiprocessing.active_children():
                status = Path(f"/proc/{worker.pid}/status").read_text()
                memory = max(memory, int(status.partition("VmHWM:")[2].split()[0]) / 1024)
    head = ["answers", "accepted", "right, but refused", "timeouts", "errors"]
    print(markdown(["kind", *head], [[k, *(str(c[h]) for h in head)] for k, c in table.items()]))
    print(f"the longest batch took {longest:.0f} s, the largest worker {memory:.0f} MB", wrong[:20])
    return {"minutes": minutes, "longest": longest, "memory MB": memory, "wrong": wrong, **table}


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.fuzz:
        measured = {"fuzz": attack(options.fuzz, options.seed)}
    elif options.golds:
        sets = {file.stem: golds_of(file) for file in sorted(options.golds.glob("*.jsonl"))}
        golds = {name: check_golds(some, options.seed) for name, some in sets.items() if some}
        print(json.dumps(golds, indent=1))
        measured = {"golds": golds}
    else:
        measured = {"cases": compare(options.paper_grader)}
    results = json.loads(RESULTS.read_text())
    RESULTS.write_text(json.dumps(results | measured | {"versions": versions()}, indent=1) + "\n")
    sys.exit(1 if measured.get("fuzz", {}).get("wrong") else 0)


if __name__ == "__main__":
    main()
