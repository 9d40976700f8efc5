r"""Whether two final answers are equal: pure functions, no processes. docs/rewards.md has the rules.

Four steps: `normalise` the text, split it into parts ("1, 2" has two), `parse` each part into a sympy
object, compare these objects: numbers exactly, formulas with letters at a few points.
"""

import itertools
import random
import re
import signal
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from sympy import Expr, Float, Integer, Interval, Rational, Symbol, Tuple
from sympy.concrete.expr_with_limits import ExprWithLimits
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from templates import last_boxed

MATH_SECONDS = 3  # of processor time for one comparison
MAX_CHARS = 300  # longer texts are compared only as strings
MAX_BITS = 20_000  # of a power or a factorial: larger ones are not computed
DIGITS = 120  # to which two numbers are compared that are not rational
CASE_MATTERS = ConversionConfig(lowercase_symbols=False)
LIBRARY = NormalizationConfig(malformed_operators=True, boxed="none")  # \left, \dfrac, \frac12, ...


class OutOfTimeError(BaseException):
    """Not an Exception, so that no library catches it."""


class Part(NamedTuple):
    """One of the answers that a text gives."""

    value: Any  # a sympy object; None: an equation that gives no value
    name: str = ""  # "x" of x = 5
    unit: str = ""
    relation: tuple[str, Expr] | None = None  # ("==", x + y - 7) of x + y = 7


def gold_answers(cell: str | int | float | list) -> list[str]:
    """The golds in one cell of a dataset, any of which is right, as stripped non-empty strings; of
    one that holds a box, what is in its last box. An empty list, as for a float nan, means that
    there is no gold. Raises TypeError for any other kind of cell."""
    entries = cell if isinstance(cell, list | tuple) else [cell]
    if not all(isinstance(entry, str | int | float) for entry in entries):
        raise TypeError(f"a gold must be str, int, float or a list of these, not {cell!r}")
    texts = [str(entry) for entry in entries if entry == entry]  # nan is not equal to itself
    golds = [(last_boxed(text) or text).strip() for text in texts]
    return [gold for gold in golds if gold]


def readable(gold: str) -> bool:
    """Whether a gold has a meaning: else only the same text is equal to it. Takes milliseconds.
    Raises ValueError outside the main thread."""
    try:
        with processor_limit(MATH_SECONDS):
            return any(read(text) for text in readings(gold))
    except TimeoutError:
        return False


def answers_match(answer: str, gold: str | int | float | list) -> bool:
    """Whether `answer` equals `gold` or one of its entries; an empty answer or gold never does.

    Raises TimeoutError after MATH_SECONDS of processor time: the answer is then unknown, not wrong.
    Raises ValueError outside the main thread, where no alarm can be set.
    """
    golds = gold_answers(gold)
    if not spelling(answer):
        return False
    if any(spelling(answer) == spelling(text) for text in golds):
        return True
    with processor_limit(MATH_SECONDS):
        return any(same_answer(text, answer) for text in golds)


@contextmanager
def processor_limit(seconds: float) -> Iterator[None]:
    """TimeoutError after so much processor time of this process, however busy the machine is."""

    def stop(*_: object) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)  # again after 1 s, if something swallowed it
    try:
        yield
    except OutOfTimeError:
        raise TimeoutError(f"comparing took more than {seconds} s") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


# ------------------------------------------------------------------------------- normalising

# The names of each unit. Two units are never the same; names that are not here are not looked at.
UNIT_NAMES = """mm millimeter millimeters, cm centimeter centimeters, m meter meters, km kilometer
kilometers, in inch inches, ft foot feet, yd yard yards, mi mile miles, s sec second seconds, min
minute minutes, h hr hour hours, day days, week weeks, year years, g gram grams, kg kilograms, lb lbs
pound pounds, cent cents, dollar dollars, degree degrees, rad radians, am, pm, mph"""
UNITS = {name: unit.split()[0] for unit in UNIT_NAMES.split(",") for name in unit.split()}
LONG = "|".join(sorted((name for name in UNITS if len(name) > 1), key=len, reverse=True))
FUNCTIONS = "sqrt|pi|infty|ln|log|exp|(?:arc)?(?:sin|cos|tan)|sec|csc|cot|theta|alpha|beta"
END = "(?![a-zA-Z])"  # of a LaTeX command


def narrow(found: re.Match) -> str:
    """Small digits and fractions of Unicode as usual ones."""
    text = unicodedata.normalize("NFKC", found[0]).replace("⁄", "/")
    return f" {text}" if "/" in text else f"^{{{text}}}"


def repeating(number: re.Match) -> str:
    """0.1\\overline{6} as 15/90."""
    fixed, period = number[2], number[3]
    top = int(number[1] + fixed + period) - int(number[1] + fixed)
    return rf"\frac{{{top}}}{{{(10 ** len(period) - 1) * 10 ** len(fixed)}}}"


def quoted(text: re.Match) -> str:
    """The words inside \\text{...} in double quotes, the rest of it as it is. A letter alone is a
    unit after a number, else a symbol or a choice."""
    after_number = re.search(r"[\d})°]\s*$", text.string[: text.start()])
    word = r"[a-zA-Z][a-zA-Z .'-]*" if after_number else r"[a-zA-Z][a-zA-Z .'-]*[a-zA-Z]\.?"
    return " " + re.sub(word, r' "\g<0>" ', text[1]) + " "


Rewrites = list[tuple[str, str | Callable[[re.Match], str]]]
BEFORE: Rewrites = [
    (r"[\s~\"]|(?<!\\)\\[>;: ]|\\displaystyle", " "),
    (r"^ *\*\*(.*)\*\* *$", r"\1"),  # bold in Markdown
    (r"\\[()\[\]]|(?<!\\)\$|\\(?:begin|end)\{(?:cases|aligned|array)\}(?:\{[lcr]*\})?", ""),
    (r"\\q?quad" + END + r"|\\\\(?!.*matrix)", ";"),
    (r"(?<=\d) *(?:\{,\}|, *\\!) *(?=\d{3})|\\!|\\phantom", ""),
    (r"^-?\d{1,3}(?:(?:\\,| )\d{3})+(?:\.\d+)?$", lambda m: re.sub(r"[\\, ]", "", m[0])),
    (r"\\,", " "),
    (r"√ ?(\d+|\w|\([^()]*\))", r"\\sqrt{\1}"),
    (r"[⁰¹²³⁴-⁹⁻]+|[¼-¾⅐-⅞]", narrow),
    ("∞", r"\\infty "),
    ("∈", r"\\in "),
    ("·", r"\\cdot "),
    (r"(\d+)\.(\d*)\\(?:overline|bar|dot) *\{?(\d+)\}?", repeating),
    (r"(?<=\d)[eE]([+-]?\d+)(?!\w)", r"\\cdot 10^{\1}"),
    (r"\^ *\{?\\prime\}?|['′]", "_{prime}"),
    (r"\*\* *(-?\w+|\([^()]*\))", r"^{\1}"),
    (r"\((\w+)\)_\{?(\d+)\}?", r"\1_{\2}"),  # a number in another base
    (r"\\\$ *([\d.,]*\d)", r"\1\\text{ dollar}"),
    (r"(?<![a-zA-Z\\])or(?![a-zA-Z])|\\(?:lor|vee)" + END, "§"),
    (r"(?<![a-zA-Z\\])and(?![a-zA-Z])|\\(?:land|wedge)" + END, ";"),
    (r"(?<!\\)%", r"\\%"),
    (r"(?<=\\frac|\\sqrt) *\\pi", r"{\\pi}"),
]
WORDS = r"(?<![\\a-zA-Z{_^])(?:[a-zA-Z]{2,} )*[a-zA-Z]{4,}(?: [a-zA-Z]{2,})*(?![a-zA-Z(_^])"
AFTER: Rewrites = [
    (r"\\bmod" + END, r"\\mod "),
    (r"\^ *(?:\\circ|\{ *\\circ *\})|\\degree", "°"),
    (
        rf"(\\(?:{FUNCTIONS})(?:\^\{{?\d\}}?)? *\(?)([\d.]+|\\?[a-z]+)°",
        r"\1(\2\\cdot\\frac{\\pi}{180})",
    ),
    (r"° *[CF]?$", r"\\text{ degree}"),
    ("°", ""),
    (
        r"_ *\{ *\\(?:(?:text|mbox) *\{ *([a-zA-Z]+) *\}|([a-zA-Z]+)) *\}",
        lambda m: f"_{{{m[1] or m[2]}}}",
    ),
    (r"_ *([a-zA-Z])", r"_{\1}"),
    (r"\\(?:text|mbox)\{([eid])\}", r"\1"),
    (r"\\(?:text|mbox) *\{((?:[^{}]|\{[^{}]*\})*)\}", quoted),
    (rf"(?<![\\a-zA-Z])({FUNCTIONS})" + END, r"\\\1 "),
    (r"\\sqrt *\(((?:[^()]|\([^()]*\))*)\)", r"\\sqrt{\1}"),
    (
        rf"(?<=[\d}}]) *((?:{LONG}|[mg](?=/))(?:/(?:{LONG}|[smhg]))?|[\u3040-\u9fff]+){END}",
        r' "\1" ',
    ),
    (rf'"[^"]*"|{WORDS}', lambda m: m[0] if m[0].startswith('"') else f' "{m[0]}" '),
    (r'(?i)^ *"(?:(?:(?:so )?the )?(?:final )?answer(?: is)?|about|approximately)"[ :]*', ""),
    (  # 5 1/2
        r"(?<![\w.}^_)/])(\d+) *(?:\\frac\{(\d+)\}\{(\d+)\}|(?<= )(\d+)/(\d+))(?!\w)",
        lambda m: rf"({m[1]}+\frac{{{m[2] or m[4]}}}{{{m[3] or m[5]}}})",
    ),
    (r"((?<![\w^{.])\d+|\)) *(?=\()", r"\1\\cdot "),  # the parser takes 3(2) for 3 + 2
]


def normalise(text: str) -> str:
    """One way of writing: words in double quotes, ; and § (or) between parts, the rest LaTeX."""
    for pattern, new in BEFORE:
        text = re.sub(pattern, new, text)
    text = normalize_latex(text, LIBRARY)
    for pattern, new in AFTER:
        text = re.sub(pattern, new, text)
    return text.strip(" .,;")


def spelling(text: str) -> str:
    """Without the LaTeX that changes only the looks."""
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)
    return re.sub(r"\\(?:left|right)(?![a-zA-Z])|\\[,;:!]|(?<!\\)\$|\s", "", text).removesuffix(".")


def readings(text: str) -> list[str]:
    """The normalised text, with 12,000 as one number and as two. Empty if it is too long."""
    if len(text) > MAX_CHARS or re.search(r"\\[lc]?dots|\.\.\.|…", text):
        return []
    text = normalise(text)
    grouped = re.sub(
        r"(?<![\d,.(\[])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", ""), text
    )
    return list(dict.fromkeys([grouped, text]))


# ----------------------------------------------------------------------------------- reading


@lru_cache(1024)
def read(text: str) -> list[Part] | None:
    """The parts of a normalised text; None if one cannot be read."""
    pieces = split(text)
    try:
        parts = []
        for piece in filter(None, pieces[::2]):
            signed = [read_part(one) for one in signs(piece)]
            same = len(signed) > 1 and equal(signed[0].value, signed[-1].value)  # 3 \pm 0
            parts += signed[:1] if same else signed
        if len(parts) == 1 and isinstance(parts[0].value, sympy.FiniteSet):  # \{1, 2\}
            return [parts[0]._replace(value=value) for value in parts[0].value]
        return one_range(one_solution(parts), "§" in pieces)
    except MemoryError:
        raise
    except Exception:  # the parser raises nothing more special, and sympy many kinds
        return None


def split(text: str) -> list[str]:
    """The pieces of a text between commas and the like outside of any brackets, and these."""
    pieces, depth, start = [], 0, 0
    for found in re.finditer(r"(\\begin|[(\[{])|(\\end|[)\]}])|[,;§]", text):
        opens, closes = found.groups()
        depth += 1 if opens else -1 if closes else 0
        if not opens and not closes and depth == 0:
            pieces += [text[start : found.start()].strip(), found[0]]
            start = found.end()
    return [*pieces, text[start:].strip()]


def signs(text: str) -> list[str]:
    r"""The texts that \pm stands for; \mp is the other sign."""
    number = 1 if "\\mp" in text else min(text.count("\\pm"), 4)
    texts = []
    for chosen in itertools.product("+-", repeat=number):
        new = itertools.cycle(chosen)
        signed = re.sub(r"\\pm" + END, lambda _, new=new: next(new), text)
        texts.append(signed.replace("\\mp", "-" if chosen == ("+",) else "+"))
    return [text] if text.startswith("\\{") else texts  # the parser does those in a set


def one_solution(parts: list[Part]) -> list[Part]:
    """x = 1, y = 2 as one part, the tuple of its values in the order of the names; and so on, if
    the same names come again."""
    names = sorted({part.name for part in parts})
    starts = range(0, len(parts), len(names))
    groups = [sorted(parts[i : i + len(names)], key=lambda part: part.name) for i in starts]
    if len(names) < 2 or "" in names or any([p.name for p in group] != names for group in groups):
        return parts
    return [Part(Tuple(*(p.value for p in group)), f"({', '.join(names)})") for group in groups]


def one_range(parts: list[Part], either: bool) -> list[Part]:
    """x < 1 or x > 3 as one part, a union; x > 1, x < 3 as an intersection."""
    ranges = [part.value for part in parts if re.match(r"[^(]", part.name) and is_set(part.value)]
    if len(parts) < 2 or len(ranges) < len(parts):
        return parts
    both = sympy.Intersection(*ranges)
    return [parts[0]._replace(value=sympy.Union(*ranges) if either or not both else both)]


def is_set(value: Any) -> bool:
    return isinstance(value, sympy.Set)


def read_part(text: str) -> Part:
    """One answer: words, a value with a unit, an equation, or several values with units."""
    text = re.sub(r'^(?:"[^"]*")? *(?:=|\\approx)', "", text)  # "Area" = 5
    pieces = re.split(r'"([^"]*)"(?: *\^ *\{?-?\d\}?)?', text)
    numbers = [re.sub(r"^[\s/().\\]*$", "", number).strip() for number in pieces[::2]]
    words = [word.lower().replace(".", "").strip() for word in pieces[1::2]]
    if not any(numbers):
        return Part(Symbol(f'"{" ".join(words)}"'))
    if any(numbers[1:]):  # 2 hours 30 minutes
        units = [Symbol(UNITS.get(word, word) + " ") for word in words]
        values = [parse(number) if number else Integer(1) for number in numbers]
        return Part(
            Tuple(*itertools.chain(*itertools.zip_longest(values, units, fillvalue=Integer(1))))
        )
    if numbers[0].isdigit() and words in (["am"], ["pm"]):
        numbers[0] += ":00"
    part = relate(parse(numbers[0]))
    return part._replace(unit="percent" if numbers[0].endswith("%") else " ".join(words))


def parse(text: str) -> Any:
    """A sympy object, evaluated, or relations as the parser gives them."""
    compact = text.replace(" ", "")
    if re.fullmatch(r"-?\d+", compact):
        return Integer(compact)
    if clock := re.fullmatch(r"(\d{1,2})(:[0-5]\d)(:[0-5]\d)?", text):
        return Symbol(f"{int(clock[1])}{clock[2]}{clock[3] or ''} o'clock")
    if re.fullmatch(r"-?[A-F\d.]*\d[A-F\d.]*_\{?\d+\}?", compact):
        return Symbol(re.sub("[{}]", "", compact) + " in another base")
    if re.search(r":.*:|matrix.*[_^]|operatorname|\\det", compact):
        raise ValueError(f"{text!r} is not what the parser takes it for")
    text = re.sub(r"\b([A-Z])\([^()]*[<>=|][^()]*\) *=", r"\1=", text)  # P(X > 2) =
    # the parser takes I for the imaginary unit, and E for that of 1E5
    text = re.sub(r"\\[a-zA-Z]+|[IE]", lambda m: rf"\vec{{{m[0]}}}" if m[0] in "IE" else m[0], text)
    raw = latex2sympy(text, normalization_config=None, conversion_config=CASE_MATTERS)
    return raw if isinstance(raw, Relational | sympy.And) else evaluate(raw)


def evaluate(node: Any, letters: dict | None = None) -> Any:
    """The parser's tree with its operations done, and numbers in place of letters. What is no
    closed form becomes a letter. Raises ValueError where that would take too long."""
    if isinstance(node, Float):
        return Float(Rational(str(node)), DIGITS)
    if isinstance(node, Symbol):
        return sympy.I if node.name == "i" else (letters or {}).get(node, node)
    if isinstance(node, sympy.MatrixBase):
        return sympy.ImmutableMatrix(node.applyfunc(evaluate))
    if isinstance(node, AppliedUndef | sympy.Derivative | ExprWithLimits | sympy.Limit):
        return Symbol(str(node))
    if not node.args:
        return node
    args = [evaluate(arg, letters) for arg in node.args]
    if isinstance(node, sympy.UnevaluatedExpr):
        return args[0]
    if isinstance(node, Expr) and all(arg.is_number for arg in args):
        refuse_large(node, args)
    return node.func(*args)


def refuse_large(node: Expr, args: list[Expr]) -> None:
    """Raise ValueError for a power, exponential or factorial that would fill the memory."""
    bits = 1
    if isinstance(node, sympy.Pow) and args[0].is_Rational:
        bits = max(args[0].p.bit_length(), args[0].q.bit_length())
    elif isinstance(node, sympy.Pow):
        bits = 1 + abs(sympy.log(abs(args[0]), 2).evalf(5))
    elif isinstance(node, sympy.factorial | sympy.binomial | sympy.gamma):
        bits = 4
    elif not isinstance(node, sympy.exp | sympy.sinh | sympy.cosh | sympy.tanh):
        return
    if args[-1].is_finite and (bits * abs(args[-1])).evalf(5) > MAX_BITS:
        raise ValueError(f"{node} is too large")


NAMES = r"(?:(?:[A-Z]\w*|vec\{[EI]\}\w*|m|angle|triangle)\*?)+|\(\w+(?:, \w+)+\)"


def is_name(side: Any) -> bool:
    """Whether it names a value where it stands left of it: x, f(x), AB, \\angle A, |z|, (x, y)."""
    return isinstance(side, Symbol | sympy.Abs) or bool(re.fullmatch(NAMES, str(pair(side))))


def relate(found: Any) -> Part:
    """x = 6/8 = 3/4 as 3/4 with the name x; x + y = 7 as a relation, which may have a value."""
    if not isinstance(found, Relational | sympy.And):
        return Part(found)
    relations = [found] if isinstance(found, Relational) else found.args
    relations = [one.func(*map(evaluate, one.args), evaluate=False) for one in relations]
    if not all(isinstance(one, sympy.Eq) for one in relations):
        return inequality(relations)
    sides = list(dict.fromkeys(side for one in relations for side in one.args))
    name = next((side for side in (sides[0], sides[-1]) if is_name(side)), None)
    if name is not sides[0] and not all(side.is_number for side in sides[:-1]):  # 5 = x
        name = None
    values = [side for side in sides if side is not name]
    if values and all(equal(values[0], value) for value in values):
        lettered = name is not None and getattr(values[0], "free_symbols", None)
        relation = ("==", name - values[0]) if lettered and isinstance(values[0], Expr) else None
        return Part(values[0], "" if name is None else str(pair(name)), relation=relation)
    left, right = sorted(sides, key=lambda side: side.is_number)
    # the value of x + y = 7 is 7, but x + 2 = 7 can be solved, and any equation can end in 0
    valued = right.is_number and right != 0 and len(left.free_symbols) > 1
    return Part(right if valued else None, relation=("==", left - right))


def inequality(relations: list[Relational]) -> Part:
    """A set, if bounds of one name are numbers. Else what one relation says of a difference."""
    names = {side for one in relations for side in one.args if not side.is_number}
    if len(names) == 1 and isinstance(name := names.pop(), Symbol):
        return Part(sympy.Intersection(*(one.as_set() for one in relations)), str(name))
    (one,) = relations
    one = one.reversed if isinstance(one, sympy.Gt | sympy.Ge) else one
    return Part(None, relation=(one.rel_op, one.lhs - one.rhs))


# --------------------------------------------------------------------------------- comparing


def same_answer(gold: str, answer: str) -> bool:
    """Whether a reading of the one equals one of the other."""
    choice = re.fullmatch(r"(?:\\text(?:bf)? *\{)?\(?([A-Z])\)?\}?", gold)
    if choice and choice[1] == chosen(answer):
        return True
    for one, other in itertools.product(readings(gold), readings(answer)):
        if re.fullmatch('"[^"]*"', one) and one.strip('"').lower() == other.strip('"').lower():
            return True
        if same_parts(read(one), read(other)):
            return True
    return False


def chosen(answer: str) -> str | None:
    """The letter of a choice that comes with its text, as in "C: the third" or "(C) 3"."""
    text = re.sub(r"\\(?:text(?:bf)?|mathrm|mathbf)|[{}$]|\\(?=[ ,])", "", answer)
    letter = re.fullmatch(r" *\(?([A-Z])[:.)]((?:[ \w].*)?)", text, re.DOTALL)
    several = letter and re.search(r"(?<![a-zA-Z\\])[A-Z](?![a-zA-Z])", letter[2])
    return letter[1] if letter and not several else None


def same_parts(gold: list[Part] | None, answer: list[Part] | None) -> bool:
    """Whether each part of one equals another part of the other, in any order."""
    if gold is None or answer is None:
        return False
    if len(gold) == 1 < len(answer) and gold[0].name.startswith("("):  # 3, 4 for x = 3, y = 4
        answer = [Part(Tuple(*(part.value for part in answer)))]
    left = list(answer)
    for one in gold:
        found = next((other for other in left if same_part(one, other)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


def same_part(gold: Part, answer: Part) -> bool:
    f, g = (re.fullmatch(r"(.+\()(\w)\)", part.name) for part in (gold, answer))
    if f and g and f[1] == g[1]:  # f(t) = 2t for f(x) = 2x
        answer = Part(answer.value.subs(Symbol(g[2]), Symbol(f[2])), gold.name)
    named = gold.name or not gold.relation  # else only another equation is equal
    if named and (gold.name == answer.name or not gold.name or not answer.name):
        if same_units(gold.unit, answer.unit) and same_value(gold, answer):
            return True
    return bool(gold.relation and answer.relation) and same_relation(gold.relation, answer.relation)


def same_units(gold: str, answer: str) -> bool:
    """Whether they are not known to be different."""
    a, b = (
        [UNITS[word] for word in re.findall("[a-z]+", unit) if word in UNITS]
        for unit in (gold, answer)
    )
    return a == b or not a or not b


def same_value(gold: Part, answer: Part) -> bool:
    """Also of percentages: 50\\% is 0.5, and 50 where either may be asked for."""
    if equal(gold.value, answer.value):
        return True
    a, b = (part.unit == "percent" for part in (gold, answer))
    if a == b or is_set(gold.value) or is_set(answer.value):
        return False
    if a:
        return equal(100 * gold.value, answer.value)
    return bool(abs(gold.value) >= 1) and equal(gold.value, 100 * answer.value)


def pair(value: Any) -> Any:
    """An open interval as the tuple that it may be."""
    ends = isinstance(value, Interval) and value.left_open and value.right_open
    return Tuple(value.start, value.end) if ends else value


def equal(a: Any, b: Any) -> bool:
    """Whether two sympy objects are equal."""
    if a is None or b is None or any(x.has(sympy.nan, sympy.zoo) for x in (a, b)):
        return False
    a, b = pair(a), pair(b)
    if a == b:
        return True
    if isinstance(a, Interval) and isinstance(b, Interval):
        return a.args[2:] == b.args[2:] and equal(a.start, b.start) and equal(a.end, b.end)
    if is_set(a) and is_set(b):
        return a.func == b.func and same_parts([*map(Part, a.args)], [*map(Part, b.args)])
    if isinstance(a, Tuple | sympy.MatrixBase) and type(a) is type(b) and len(a) == len(b):
        return getattr(a, "shape", 0) == getattr(b, "shape", 0) and all(map(equal, a, b))
    if not all(isinstance(x, Expr) and not isinstance(x, sympy.MatrixBase) for x in (a, b)):
        return False
    return all(same_number(evaluate(a, at), evaluate(b, at)) for at in points(a, b))


def points(*formulas: Expr) -> Iterator[dict[Symbol, Rational]]:
    """Numbers for the letters of formulas: positive ones, and negative ones if signs matter."""
    letters = sorted(set().union(*(formula.free_symbols for formula in formulas)), key=str)
    draw = random.Random(0)
    signed = any(formula.has(sympy.Abs) for formula in formulas)
    for sign in ([1, 1, 1, -1] if signed else [1, 1, 1]) if letters else [1]:
        yield {letter: Rational(sign * draw.randint(1, 400), 101) for letter in letters}


def same_number(a: Expr, b: Expr) -> bool:
    """Exactly, if both are exact. A decimal may differ in its tenth digit, and in its seventh from
    a number that no decimal can be, such as a root."""
    if a == b or not a.is_finite or not b.is_finite:
        return a == b
    apart = a - b
    if apart.is_Rational:
        return apart == 0
    bound = Rational(1, 10 ** (DIGITS - 20))
    if a.has(Float) or b.has(Float):
        bound = Rational(1, 10**9 if all(x.is_Rational or x.is_Float for x in (a, b)) else 10**6)
    sizes = []
    for number in (apart, a, b):
        sizes.append(max(abs(part) for part in number.evalf(15, maxn=DIGITS).as_real_imag()))
    return bool(sizes[0] <= bound * max(sizes[1:]))


def same_relation(a: tuple[str, Expr], b: tuple[str, Expr]) -> bool:
    """Whether one is a multiple of the other: 2x + 2y = 2 and x + y - 1 = 0."""
    if a[0] != b[0]:
        return False
    ratios = [evaluate(a[1], at) / evaluate(b[1], at) for at in points(a[1], b[1])]
    if len(ratios) < 2 or any(ratio.is_zero or not ratio.is_finite for ratio in ratios):
        return False
    positive = a[0] in ("==", "!=") or ratios[0] > 0
    return bool(positive) and all(same_number(ratio, ratios[0]) for ratio in ratios)
