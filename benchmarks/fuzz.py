"""The grader under attack: random, mutated and hostile responses, and a table in Markdown.

    python benchmarks/fuzz.py --minutes 10

Responses are graded in batches of BATCH, as in training, and each batch ends with two clean ones.
It must end within the time that its timeouts and lost workers allow; the memory
of the workers must stay below their limit; no hollow answer (empty, nan, several at once, or one
that names itself) may be accepted, and no number for another one; and the clean responses must be
graded right. The exit code is 1 if any of this is not so.
"""

import json
import random
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.grader import TIMEOUT, WORKER_BYTES, Grader
from support.metrics import markdown, versions

CASES = Path(__file__).parents[1] / "tests" / "grader_cases.jsonl"
BATCH = 128  # attacks graded together
SLACK = 60  # seconds for a batch in which nothing hangs
WORKER_MB = 1024  # of a worker that has loaded sympy, at most


@dataclass(frozen=True)
class Options:
    """Attack the grader."""

    minutes: float = 10
    seed: int = 0
    workers: int = 2
    timeout: float = 5.0  # seconds a grading, as in training


@dataclass(frozen=True)
class Attack:
    """A response, and whether it may be accepted; None: nobody knows."""

    response: str
    gold: str
    right: bool | None = None


@dataclass
class Findings:
    """What was seen."""

    responses: Counter = field(default_factory=Counter)  # of each kind of attack
    accepted: Counter = field(default_factory=Counter)
    rejected: Counter = field(default_factory=Counter)  # although they are right
    timeouts: Counter = field(default_factory=Counter)
    errors: Counter = field(default_factory=Counter)
    longest: float = 0.0  # seconds of a batch
    bound: float = 0.0  # seconds that this batch was allowed
    wrong: list[str] = field(default_factory=list)  # what must not be


# ---------------------------------------------------------------------------------- attacks


def boxed(answer: str) -> str:
    return f"So it is $\\boxed{{{answer}}}$."


# Random LaTeX whose value is known: (text, value). Depth bounds its length.
def expression(draw: random.Random, depth: int = 3) -> tuple[str, Fraction]:
    if depth == 0 or draw.random() < 0.2:
        number = draw.randint(0, 20)
        return str(number), Fraction(number)
    left, a = expression(draw, depth - 1)
    right, b = expression(draw, depth - 1)
    kind = draw.choice(["+", "-", "\\cdot ", "\\times ", "frac", "group", "power", "minus"])
    if kind == "+":
        return f"({left}) + ({right})", a + b
    if kind == "-":
        return f"({left}) - ({right})", a - b
    if kind in ("\\cdot ", "\\times "):
        return f"({left}) {kind}({right})", a * b
    if kind == "frac" and b != 0:
        return draw.choice(["\\frac", "\\dfrac"]) + f"{{{left}}}{{{right}}}", a / b
    if kind == "power":
        exponent = draw.randint(1, 3)
        return f"({left})^{{{exponent}}}", a**exponent
    if kind == "minus":
        return f"-({left})", -a
    return f"\\left({left}\\right)", a


def spell(draw: random.Random, value: Fraction) -> str:
    """One of the ways to write a number."""
    if value.denominator == 1:
        return draw.choice([f"{value.numerator}", f"{value.numerator}.0", f"{value.numerator}."])
    return draw.choice([f"\\frac{{{value.numerator}}}{{{value.denominator}}}", str(value)])


def known(draw: random.Random) -> Attack:
    """An expression against its own value, or another one."""
    text, value = expression(draw)
    if draw.random() < 0.5:
        return Attack(boxed(text), spell(draw, value), True)
    steps = [Fraction(1), Fraction(-1), Fraction(1, 2), value + 3, 1 - 2 * value]
    other = value + draw.choice(steps)
    near = abs(other - value) < Fraction(1, 10**4) * max(Fraction(1), abs(value))  # it is rounded
    return Attack(boxed(text), spell(draw, other), None if near else False)


EMPTY = [
    "",
    " ",
    "$$",
    "\\,",
    "~",
    "{}",
    "\\text{}",
    "\\ ",
    "\\boxed{}",
    "\\quad",
    "()",
    "\\{\\}",
    ".",
]
NAN = [
    "nan", "NaN", "\\text{nan}", "\\mathrm{NaN}", "\\frac{0}{0}", "0/0", "\\infty-\\infty",
    "\\text{undefined}", "None", "null", "zoo", "\\frac{1}{0}", "0 \\cdot \\infty", "?", "-", "x/0",
    "\\text{error}", "\\text{no solution}", "\\varnothing", "\\log 0", "0^{-1}",
]  # fmt: skip
SEVERAL = [
    "{a} or {b}", "{a} \\text{{ or }} {b}", "{a}, {b}", "{a} ; {b}", "{a} / {b} ?",
    "\\text{{either }} {a} \\text{{ or }} {b}", "x = {a} \\text{{ or }} x = {b}", "{a} and {b}",
    "x={a}, x={b}", "\\{{{a}, {b}\\}}", "({a}, {b})", "[{a}, {b}]", "{a} \\lor {b}",
    "{a} \\vee {b}", "\\pm {a}", "{a} \\neq {b}", "{a} \\to {b}", "{a} < x < {b}", "{a} \\quad {b}",
    "{a} = {b}", "{a} \\\\ {b}", "{a} | {b}", "x \\in [{a}, {b}]",
    "\\begin{{cases}} {a} \\\\ {b} \\end{{cases}}", "{a} \\text{{ (or }} {b})",
]  # fmt: skip
ITSELF = [
    "{s} = {s}", "{s}={s}", "{s} =  {s} ", "{s} = {s} = {s}", "\\boxed{{{s} = {s}}}",
    "\\text{{the answer}} = \\text{{the answer}}", "f({s}) = f({s})", "{s} \\equiv {s}",
    "answer", "\\text{{answer}}", "{s}", "{s} = {t}", "\\text{{itself}}", "{s} + {t} = {s} + {t}",
]  # fmt: skip


def hollow(draw: random.Random) -> Attack:
    """What is no answer, against a gold that is a number."""
    gold = draw.choice(["3", "5", "0", "-2", "\\frac{1}{2}", "0.5", "12", "\\sqrt{2}", "\\pi"])
    other = draw.choice(["1", "7", "-4", "\\frac{2}{3}", "100", "\\sqrt{3}"])
    symbol, another = draw.sample(["x", "n", "N", "\\theta", "a_1", "e", "i", "S"], 2)
    kind = draw.choice([EMPTY, NAN, SEVERAL, ITSELF])
    text = draw.choice(kind)
    if kind is SEVERAL:
        a, b = draw.sample([gold, other], 2)
        if text.startswith("\\pm"):
            a, gold = "3", "3"
        text = text.format(a=a, b=b)
    if kind is ITSELF:
        text = text.format(s=symbol, t=another)
    return Attack(boxed(text), gold, False)


def itself(draw: random.Random) -> Attack:
    """An equation that says nothing, against a gold that is the same symbol."""
    symbol = draw.choice(["x", "n", "N", "\\theta", "a_1", "E"])
    space, others = draw.choice(["", " ", "  "]), draw.choice(["", " "])
    return Attack(boxed(f"{symbol}{space}={others}{symbol}"), symbol, False)


LETTERS = (
    "0123456789+-*/^_{}()[]\\$.,;:=<>|! \n\tabcxyzN"
    "\u03c0\u221a\u221e\u2264\u00bd\u00b2\u2026\u202e\u200b\u00e9\u4e2d\U0001f600\x00\ufeff"
)


def mutated(draw: random.Random, cases: list[dict]) -> Attack:
    """A labelled response with some letters changed, moved, doubled or cut off."""
    case = draw.choice(cases)
    text = case["response"][-3000:]
    for _ in range(draw.randint(1, 6)):
        place, end = sorted(draw.randint(0, len(text)) for _ in "ab")
        end = min(end, place + 20)
        part = text[place:end]
        new = draw.choice(
            ["", part * 2, part[::-1], draw.choice(LETTERS), part.upper(), "\\" + part]
        )
        text = text[:place] + new + text[end:]
    return Attack(text, case["gold"])


def hostile(draw: random.Random) -> Attack:
    """What a careless grader computes for ever, or fills the memory with."""
    big, n = draw.choice([9, 99, 10**6, 10**9]), draw.choice([10, 100, 1000, 10**5])
    text = draw.choice([
        f"{big}^{{{big}^{{{big}}}}}",
        f"{big}**{big}**{big}",
        f"({big}!)!",
        f"{n}!!!!",
        f"\\binom{{{big}}}{{{big // 2}}}",
        f"\\sum_{{k=1}}^{{{big}}} k^{{k}}",
        f"\\prod_{{k=1}}^{{{big}}} (1 + x^k)",
        f"\\int_0^{{{big}}} x^{{x^x}} dx",
        f"\\int \\sin(x^{{{n}}}) e^{{x^2}} \\tan(\\log x) dx",
        f"\\lim_{{x \\to \\infty}} x^{{x^{{x^x}}}} / {big}!",
        f"(x + y + z + w)^{{{n}}}",
        f"\\frac{{1}}{{1 - x^{{{n}}}}} = \\sum x^{{{n} k}}",
        f"\\sqrt[{n}]{{{big}^{{{n}}} + 1}}",
        f"\\{{1, 2, \\ldots, {big}\\}}",
        f"[0, {big}] \\cup \\{{{', '.join(map(str, range(min(n, 60))))}\\}}",
        f"\\log_{{{big}}} {big}^{{{big}^{{2}}}}",
        f"\\gcd({big}^{{{n}}} - 1, {big + 1}^{{{n}}} - 1)",
        f"{big}^{{{n}}} \\bmod {n + 1}",
        "\\sqrt{" * (n // 10) + "2" + "}" * (n // 10),
        "\\frac{1}{1+" * min(n, 1000) + "x" + "}" * min(n, 1000),
        "(" * n + "1" + ")" * n,
        "{" * n,
        "}" * n,
        "\\boxed{" * n,
        "\\boxed{" * min(n, 1000) + "1" + "}" * min(n, 1000),
        "9" * n,
        "0." + "0" * n + "1",
        "1" + "+1" * n,
        "x_" * n,
        "a" * n + " = 1",
        "\\a" * n + " = 1",
        "-" * n + "1",
        "\\begin{pmatrix}" + " & ".join(map(str, range(min(n, 300)))) + "\\end{pmatrix}",
        "\\left(" * min(n, 1000),
        "\uff11\uff12\uff13",  # full-width digits
        "\u202e543" + "\u202c" * min(n, 1000),  # written from right to left
        "1" + "\u0301" * n,
        "\ud800",
        "\x00" * n,
        "1\\\\" * n,
        "$" * n,
        "\\text{" * min(n, 1000),
        "the answer is " * (n // 10),
        "1 000 " * n,
        "1e" + "9" * min(n, 1000),
        f"1e{big}",
        f"x = {big}^{{{big}^{{{big}}}}}",
        "\\$ % & # @ ~ ^",
    ])  # fmt: skip
    before = "thinking " * draw.choice([0, 0, 10, 10**5])
    if draw.random() < 0.1:  # the gold may be as bad
        return Attack(before + boxed(text), text)
    return Attack(before + boxed(text), draw.choice(["3", "\\frac{1}{2}", "x^2", "(0, 1]"]))


def attack(kind: str, draw: random.Random, cases: list[dict]) -> Attack:
    return mutated(draw, cases) if kind == "mutated" else ATTACKS[kind](draw)


ATTACKS: dict[str, Callable[[random.Random], Attack]] = {
    "known": known,
    "hollow": hollow,
    "itself": itself,
    "hostile": hostile,
}
KINDS = {  # what each is, and how many of a hundred
    "known": ("random expressions of a known value", 30),
    "hollow": ("empty, nan, several at once, naming itself", 30),
    "itself": ("x = x, where the gold is x", 5),
    "mutated": ("labelled responses, mutated", 27),
    "hostile": ("powers, factorials, nesting, unicode, huge strings", 8),
}
CLEAN = [Attack(boxed("\\frac{6}{8}"), "0.75", True), Attack(boxed("\\frac{6}{9}"), "0.75", False)]


# ------------------------------------------------------------------------------- measuring


class Memory(threading.Thread):
    """Watches the largest memory that any process below this one has had, in MB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0.0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.2):
            self.look()

    def look(self) -> None:
        parents: dict[int, int] = {}
        peaks: dict[int, float] = {}
        for file in Path("/proc").glob("[0-9]*/status"):
            try:
                lines = dict(line.split(":", 1) for line in file.read_text().splitlines())
            except OSError:  # it has just ended
                continue
            parents[int(file.parent.name)] = int(lines["PPid"])
            peaks[int(file.parent.name)] = int(lines.get("VmHWM", "0 kB").split()[0]) / 1024
        me = int(Path("/proc/self").resolve().name)
        for process, peak in peaks.items():
            above = parents[process]
            while above not in (me, 0):
                above = parents.get(above, 0)
            if above == me:
                self.peak = max(self.peak, peak)


def judge(kind: str, tried: Attack, verdict, found: Findings) -> None:
    """Count a verdict, and note it if it must not be."""
    found.responses[kind] += 1
    found.accepted[kind] += verdict.correct
    found.timeouts[kind] += verdict.failure == TIMEOUT
    found.errors[kind] += verdict.failure not in (None, TIMEOUT)
    found.rejected[kind] += tried.right is True and not verdict.correct
    if tried.right is False and verdict.correct:
        found.wrong.append(f"accepted: {tried.response[-200:]!r} for {tried.gold!r}")


def one_batch(
    options: Options, grader: Grader, draw: random.Random, cases, starting: float, found: Findings
) -> None:
    """Grade a batch, and then the clean ones."""
    shares = [share for _, share in KINDS.values()]
    kinds = draw.choices(list(KINDS), shares, k=BATCH)
    tried = [attack(kind, draw, cases) for kind in kinds]
    start = time.perf_counter()
    verdicts = grader.verdicts([a.response for a in tried], [a.gold for a in tried])
    seconds = time.perf_counter() - start
    lost = sum(verdict.failure is not None for verdict in verdicts)
    bound = SLACK + lost * (options.timeout + 2 * starting)  # a killed worker is started again
    if seconds > bound:
        found.wrong.append(f"a batch took {seconds:.0f} s, with {lost} gradings lost")
    if seconds > found.longest:
        found.longest, found.bound = seconds, bound
    for kind, one, verdict in zip(kinds, tried, verdicts, strict=True):
        judge(kind, one, verdict, found)
    grade_clean(grader, found)


def grade_clean(grader: Grader, found: Findings) -> float:
    """Grade the clean responses; returns the seconds that it took."""
    start = time.perf_counter()
    verdicts = grader.verdicts([a.response for a in CLEAN], [a.gold for a in CLEAN])
    if [verdict.correct for verdict in verdicts] != [a.right for a in CLEAN]:
        found.wrong.append(f"after a batch, clean responses were graded {verdicts}")
    return time.perf_counter() - start


def report(found: Findings, peak: float, minutes: float) -> str:
    """The tables."""
    head = ["responses", "number", "accepted", "right, but rejected", "timeouts", "errors"]
    rows = []
    for kind, (what, _) in KINDS.items():
        counts = [found.responses, found.accepted, found.rejected, found.timeouts, found.errors]
        rows.append([what, *(str(count[kind]) for count in counts)])
    everything = sum(found.responses.values())
    return markdown(head, rows) + (
        f"\n{everything} responses in {minutes:.1f} minutes. The longest batch of {BATCH} took "
        f"{found.longest:.0f} s (its bound: {found.bound:.0f}). The largest worker had "
        f"{peak:.0f} MB. What must not be: {len(found.wrong)}.\n"
        + ", ".join(f"{package} {number}" for package, number in versions().items())
    )


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    cases = [json.loads(line) for line in CASES.read_text().splitlines()]
    draw, found, memory = random.Random(options.seed), Findings(), Memory()
    memory.start()
    start = time.monotonic()
    with Grader("none", options.workers, options.timeout) as grader, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        starting = grade_clean(grader, found)  # seconds until the workers are there
        while time.monotonic() - start < 60 * options.minutes:
            one_batch(options, grader, draw, cases, starting, found)
    memory.ended.set()
    if memory.peak > WORKER_MB + WORKER_BYTES / 2**20:
        found.wrong.append(f"a worker had {memory.peak:.0f} MB")
    print(report(found, memory.peak, (time.monotonic() - start) / 60))
    for wrong in found.wrong[:50]:
        print(f"* {wrong}")
    sys.exit(1 if found.wrong else 0)


if __name__ == "__main__":
    main()
