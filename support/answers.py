"""Whether two final answers are equal: pure functions, no processes. Rules: docs/rewards.md.

Four steps: `normalise` the text, split it into parts ("1, 2" has two), `parse` each into a sympy
object, compare these objects: numbers exactly, formulas with letters at a few points.
"""

import itertools
import random
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from sympy import Eq, Expr, Float, Integer, Interval, MatrixBase, Rational, Symbol, Tuple
from sympy.concrete.expr_with_limits import ExprWithLimits
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from templates import last_boxed

MATH_SECONDS = 3  # of processor time for one comparison
MAX_CHARS = 300  # longer texts are compared only as strings
MAX_DEPTH = 12  # of brackets
MAX_BITS = 20_000  # of a power or a factorial: larger ones are not computed
DIGITS = 400  # to which two numbers are compared that are not rational
LIBRARY = NormalizationConfig(malformed_operators=True, boxed="none")  # \left, \dfrac, \frac12, ...
CASE_MATTERS = ConversionConfig(lowercase_symbols=False)


class OutOfTimeError(BaseException):
    """Not an Exception, so that no library catches it."""


class Part(NamedTuple):
    """One of the answers that a text gives."""

    value: Any  # a sympy object; None: an equation that gives no value
    name: str = ""  # "x" of x = 5
    unit: str = ""
    zero: Expr | None = None  # x + y - 7 of x + y = 7


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
    """Whether a gold has a meaning; without one, only the same text is equal to it. Takes some
    milliseconds, and is for texts of a dataset: nothing ends it if one takes for ever."""
    return bool(read(gold))


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


def singular(word: str) -> str:
    return word.removesuffix("s") or word


# The names of each unit. Two units are never the same; names that are not here are not looked at.
UNIT_NAMES = """mm millimeters, cm centimeters, m meters, km kilometers, in inches, ft foot feet,
yd yards, mi miles, s sec seconds, min minutes, h hr hours, days, weeks, years, g grams,
kg kilograms, lb pounds, cents, dollars, degrees, rad radians, am, pm, mph"""
UNITS = {singular(name): unit for unit in UNIT_NAMES.split(",") for name in unit.split()}
LONG = "|".join(sorted((name + "s?" for name in UNITS if len(name) > 1), key=len, reverse=True))
FUNCTIONS = "sqrt|pi|infty|ln|log|exp|(?:arc)?(?:sin|cos|tan)|sec|csc|cot|theta|alpha|beta"
END = "(?![a-zA-Z])"  # of a LaTeX command


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
    (r"(?<![^ ])\*\*([^*]+)\*\*(?![^ .])|`", r"\1"),  # bold and code in Markdown
    (r"(?<!\d)\.(?=\d)", "0."),
    (r"(?:\\left)? *[(\[] *\\begin\{array\} *\{[lcr]*\}", r"\\begin{pmatrix}"),
    (r"\\end\{array\} *(?:\\right)? *[)\]]", r"\\end{pmatrix}"),
    (r"\\\\ *(?=\\end)|\\[()\[\]]|(?<!\\)\$", ""),
    (r"\\(?:begin|end)\{(?:cases|aligned|array)\}(?:\{[lcr]*\})?", ""),
    (r"\\q?quad" + END + r"|\\\\(?![a-zA-Z]|.*matrix)", ";"),
    (r"(?<=\d) *(?:\{,\}|, *\\!) *(?=\d{3})|\\!|\\phantom", ""),
    (r"^-?\d{1,3}(?:(?:\\,| )\d{3})+(?:\.\d+)?$", lambda m: re.sub(r"[\\, ]", "", m[0])),
    (r"(?<![\d,.(\[])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", "")),
    (r"\\,", " "),
    (r"√ ?(\d+|\w|\([^()]*\))", r"\\sqrt{\1}"),
    (r"[∞∈·²]", lambda m: {"∞": r"\infty ", "∈": r"\in ", "·": r"\cdot "}.get(m[0], "^{2}")),
    (r"(\d+)\.(\d*)\\(?:overline|bar|dot) *\{?(\d+)\}?", repeating),
    (r"(?<=\d)[eE]([+-]?\d+)(?!\w)", r"\\cdot 10^{\1}"),
    (r"\^ *\{?\\prime\}?|['\u2032]", "_{prime}"),
    (r"\*\* *(-?\w+|\([^()]*\))", r"^{\1}"),
    (r"\((\w+)\)_\{?(\d+)\}?", r"\1_{\2}"),  # a number in another base
    (r"\\\$ *([\d.,]*\d)", r"\1\\text{ dollar}"),
    (r"(?<![a-zA-Z\\])(?:or|and)(?![a-zA-Z])|\\(?:lor|vee|land|wedge)" + END, ";"),
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
    (r"_ *\{ *\\(?:(?:text|mbox) *\{ *([a-zA-Z]+) *\}|([a-zA-Z]+)) *\}", r"_{\1\2}"),
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
    (
        r"(?<![\w.}^_)/])(\d+) *(?:\\frac\{(\d+)\}\{(\d+)\}|(?<= )(\d+)/(\d+))(?!\w)",
        r"(\1+\\frac{\2\4}{\3\5})",  # 5 1/2
    ),
    (r" +(?=\\%)", ""),
    (r"((?<![\w^{.])\d+|\)) *(?=\()", r"\1\\cdot "),  # the parser takes 3(2) for 3 + 2
]


def normalise(text: str) -> str:
    """One way of writing: words in double quotes, commas between parts, the rest LaTeX."""
    for pattern, new in BEFORE:
        text = re.sub(pattern, new, text)
    text = normalize_latex(text.strip(" .,;"), LIBRARY)
    for pattern, new in AFTER:
        text = re.sub(pattern, new, text)
    return text.strip(" .,;")


def spelling(text: str) -> str:
    """Without the LaTeX that changes only the looks."""
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)
    return re.sub(r"\\(?:left|right)(?![a-zA-Z])|\\[,;:!]|(?<!\\)\$|\s", "", text).removesuffix(".")


# ----------------------------------------------------------------------------------- reading


@lru_cache(1024)
def read(text: str) -> list[Part] | None:
    """The parts of a text; None if one cannot be read, or if it is too long."""
    if len(text) > MAX_CHARS or re.search(r"\\[lc]?dots|\.\.\.|…", text):
        return None
    try:
        parts = []
        for piece in filter(None, split(normalise(text))):
            signed = [read_part(one) for one in signs(piece)]
            parts += signed[:1] if equal(signed[0].value, signed[-1].value) else signed
        return one_solution(list(itertools.chain(*map(members, parts))))
    except MemoryError:
        raise
    except Exception:  # the parser raises nothing more special, and sympy many kinds
        return None


def split(text: str) -> list[str]:
    """The pieces of a text between commas and semicolons outside of any brackets."""
    pieces, depth, start = [], 0, 0
    for found in re.finditer(r"(\\begin|[(\[{])|(\\end|[)\]}])|[,;]", text):
        opens, closes = found.groups()
        depth += 1 if opens else -1 if closes else 0
        if depth > MAX_DEPTH:  # the parser's time grows with it
            raise ValueError(f"{depth} brackets inside each other")
        if not opens and not closes and depth == 0:
            pieces.append(text[start : found.start()].strip())
            start = found.end()
    return [*pieces, text[start:].strip()]


def signs(text: str) -> list[str]:
    r"""The text with the upper and with the lower signs of \pm and \mp."""
    if "\\pm" not in text or text.startswith("\\{"):  # the parser knows \pm in a set
        return [text]
    upper = text.replace("\\pm", "+").replace("\\mp", "-")
    return [upper, text.replace("\\pm", "-").replace("\\mp", "+")]


def members(part: Part) -> list[Part]:
    """The parts of a union or of a set in braces."""
    if not isinstance(part.value, sympy.Union | sympy.FiniteSet):
        return [part]
    return [one for value in part.value.args for one in members(part._replace(value=value))]


def one_solution(parts: list[Part]) -> list[Part]:
    """x = 1, y = 2 as one part, the tuple of its values in the order of the names; and so on, if
    the same names come again."""
    names = sorted({part.name for part in parts})
    starts = range(0, len(parts), len(names))
    groups = [sorted(parts[i : i + len(names)], key=lambda part: part.name) for i in starts]
    if len(names) < 2 or "" in names or any([p.name for p in group] != names for group in groups):
        return parts
    return [Part(Tuple(*(p.value for p in group)), f"({', '.join(names)})") for group in groups]


def read_part(text: str) -> Part:
    """One answer: words, a value with a unit, an equation, or several values with units."""
    text = re.sub(r'^(?:"[^"]*")? *(?:=|\\approx)', "", text)  # "Area" = 5
    pieces = re.split(r'"([^"]*)"(?: *\^ *\{?-?\d\}?)?', text)
    numbers = [re.sub(r"^[\s/().\\]*$", "", number).strip() for number in pieces[::2]]
    words = [word.lower().replace(".", "").strip() for word in pieces[1::2]]
    if not any(numbers):
        return Part(Symbol(f'"{" ".join(words)}"'))
    if any(numbers[1:]):  # 2 hours 30 minutes
        units = [Symbol(f'"{UNITS.get(singular(word), word)}"') for word in [*words, ""]]
        values = [parse(number) if number else Integer(1) for number in numbers]
        return Part(Tuple(*itertools.chain(*zip(values, units, strict=True))))
    if numbers[0].isdigit() and words in (["am"], ["pm"]):
        numbers[0] += ":00"
    part = relate(parse(numbers[0]))
    return part._replace(unit="percent" if numbers[0].endswith("%") else " ".join(words))


def parse(text: str) -> Any:
    """A sympy object, evaluated, or relations as the parser gives them."""
    compact = re.sub("[ {}]", "", text)
    if re.fullmatch(r"-?\d+", compact):
        return Integer(compact)
    if re.fullmatch(r"\d\d?(:[0-5]\d){1,2}", text):
        return Symbol(re.sub(r"^0|(?<=:..):00", "", text) + " o'clock")
    if re.fullmatch(r"-?[A-F\d.]*\d[A-F\d.]*_\d+", compact):
        return Symbol(compact + " in another base")
    if re.search(r":.*:|matrix[_^]|operatorname|\\det|\^-?\d{6,}|binom\d{6,}", compact):
        raise ValueError(f"{text!r} would be misread, or computed for too long")
    text = re.sub(r"\b([A-Z])\([^()]*[<>=|][^()]*\) *=", r"\1=", text)  # P(X > 2) =
    # the parser takes I for the imaginary unit, and E for that of 1E5
    text = re.sub(r"\\[a-zA-Z]+|[IE]", lambda m: rf"\vec{{{m[0]}}}" if m[0] in "IE" else m[0], text)
    raw = latex2sympy(text, normalization_config=None, conversion_config=CASE_MATTERS)
    return raw if isinstance(raw, Relational | sympy.And) else evaluate(raw)


def evaluate(node: Any, letters: dict | None = None) -> Any:
    """The parser's tree with its operations done, and numbers in place of letters. What is no
    closed form becomes a letter. Raises ValueError for what would fill the memory."""
    if isinstance(node, Float):
        return Float(Rational(str(node)), DIGITS)
    if isinstance(node, Symbol):
        return sympy.I if node.name == "i" else (letters or {}).get(node, node)
    if isinstance(node, MatrixBase):
        return sympy.ImmutableMatrix(node.applyfunc(evaluate))
    if isinstance(node, AppliedUndef | sympy.Derivative | ExprWithLimits | sympy.Limit):
        return Symbol(str(node))
    args = [evaluate(arg, letters) for arg in node.args]
    if isinstance(node, sympy.UnevaluatedExpr):
        return args[0]
    grows = isinstance(node, sympy.Pow | sympy.exp | sympy.factorial | sympy.binomial)
    if grows and all(arg.is_number for arg in args) and args[-1].is_finite:
        bits = Integer(4)
        if isinstance(node, sympy.Pow) and args[0].is_Rational:
            bits = Integer(max(abs(args[0].p), args[0].q).bit_length())
        if (bits * abs(args[-1])).evalf(5) > MAX_BITS:
            raise ValueError(f"{node} is too large")
    return node.func(*args) if args else node


def relate(found: Any) -> Part:
    """x = 6/8 = 3/4 as 3/4 with the name x; 1 < x < 2 as a set; x + y = 7 as what must be 0."""
    if not isinstance(found, Relational | sympy.And):
        return Part(found)
    relations = [found] if isinstance(found, Relational) else found.args
    relations = [one.func(*map(evaluate, one.args), evaluate=False) for one in relations]
    sides = list(dict.fromkeys(side for one in relations for side in one.args))
    if not all(isinstance(one, Eq) for one in relations):
        (name,) = (side for side in sides if not side.is_number)
        return Part(sympy.Intersection(*(one.as_set() for one in relations)), str(name))
    if all(getattr(side, "is_number", False) for side in sides[:-1]):  # 5 = x
        sides = sides[::-1]
    name = str(pair(sides[0])) if is_name(sides[0]) else ""
    values = sides[1:] if name else sides
    if values and all(equal(values[0], value) for value in values):
        letters = name and isinstance(values[0], Expr) and values[0].free_symbols
        return Part(values[0], name, zero=sides[0] - values[0] if letters else None)
    left, right = sorted(sides, key=lambda side: side.is_number)
    # the value of x + y = 7 is 7, but x + 2 = 7 can be solved, and any equation can end in 0
    valued = right.is_number and right != 0 and len(left.free_symbols) > 1
    return Part(right if valued else None, zero=left - right)


NAMES = r"(?:(?:[A-Z]\w*|vec\{[EI]\}\w*|m|angle|triangle)\*?)+|\(\w+(?:, \w+)+\)"


def is_name(side: Any) -> bool:
    """Whether it names a value where it stands left of it: x, f(x), AB, \\angle A, |z|, (x, y)."""
    return isinstance(side, Symbol | sympy.Abs) or bool(re.fullmatch(NAMES, str(pair(side))))


# --------------------------------------------------------------------------------- comparing


def same_answer(gold: str, answer: str) -> bool:
    """Whether they are the same choice, the same words, or equal part by part."""
    choice = re.fullmatch(r"(?:\\text(?:bf)? *\{)?\(?([A-Z])\)?\}?", gold)
    if choice and choice[1] == chosen(answer):
        return True
    words = re.fullmatch('"[^"]*"', normalise(gold)) if len(answer) <= MAX_CHARS else None
    if words and words[0].strip('"').lower() == normalise(answer).strip('"').lower():
        return True
    try:
        return same_parts(read(gold), read(answer))
    except ValueError:  # too large with numbers for its letters
        return False


def chosen(answer: str) -> str:
    """The letter of a choice with its text, as in "C: the third" or "(C) 3"; "" for several."""
    text = re.sub(r"\\(?:text(?:bf)?|mathrm|mathbf)|[{}$]|\\(?=[ ,])", "", answer)
    letter = re.fullmatch(r"\(?([A-Z])[:.)]((?:[ \w].*)?)", text.strip())
    several = letter and re.search(r"(?<![a-zA-Z\\])[A-Z](?![a-zA-Z])", letter[2])
    return letter[1] if letter and not several else ""


def same_parts(gold: list[Part] | None, answer: list[Part] | None) -> bool:
    """Whether each part of one equals another part of the other, in any order."""
    if gold is None or answer is None:
        return False
    one, several = sorted((gold, answer), key=len)
    if len(one) == 1 < len(several) and one[0].name.startswith("("):  # 3, 4 for x = 3, y = 4
        return same_part(one[0], Part(Tuple(*(part.value for part in several))))
    left = list(answer)
    for part in gold:
        found = next((other for other in left if same_part(part, other)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


def same_part(gold: Part, answer: Part) -> bool:
    """Whether names and units do not differ and values are equal, or both are the same equation."""
    f, g = (re.fullmatch(r"(.+\()(\w)\)", part.name) for part in (gold, answer))
    if f and g and f[1] == g[1]:  # f(t) = 2t for f(x) = 2x
        answer = Part(answer.value.subs(Symbol(g[2]), Symbol(f[2])), gold.name)
    named = gold.name == answer.name or not gold.name or not answer.name
    units = known_units(gold.unit), known_units(answer.unit)
    if named and (units[0] == units[1] or not all(units)) and (gold.name or gold.zero is None):
        if same_value(gold, answer):
            return True
    return gold.zero is not None and answer.zero is not None and multiples(gold.zero, answer.zero)


def known_units(text: str) -> list[str]:
    words = map(singular, re.findall("[a-z]+", text))
    return [UNITS[word] for word in words if word in UNITS]


def same_value(gold: Part, answer: Part) -> bool:
    """Also of percentages: 50\\% is 0.5, and 50 where either may be asked for."""
    a, b = gold.value, answer.value
    if equal(a, b):
        return True
    if not (isinstance(a, Expr) and isinstance(b, Expr)):
        return False
    if gold.unit == "percent" != answer.unit:
        return equal(100 * a, b)
    large = a.is_number and abs(a) >= 1  # 0.5 is not 0.5\%
    return answer.unit == "percent" != gold.unit and bool(large) and equal(a, 100 * b)


def pair(value: Any) -> Any:
    """An open interval as the tuple that it may be."""
    ends = isinstance(value, Interval) and value.left_open and value.right_open
    return Tuple(value.start, value.end) if ends else value


def equal(a: Any, b: Any) -> bool:
    """Whether two sympy objects are equal."""
    a, b = pair(a), pair(b)
    if a is None or b is None or any(x.has(sympy.nan, sympy.zoo) for x in (a, b)):
        return False
    if a == b:
        return True
    if isinstance(a, Tuple | Interval | MatrixBase) or isinstance(b, Tuple | Interval | MatrixBase):
        same = type(a) is type(b) and len(a.args) == len(b.args)
        return same and all(map(equal, a.args, b.args))
    if not (isinstance(a, Expr) and isinstance(b, Expr)):
        return False
    return all(same_number(evaluate(a, at), evaluate(b, at)) for at in points(a, b))


def points(a: Expr, b: Expr) -> Iterator[dict[Symbol, Rational]]:
    """Numbers for the letters of formulas: positive ones, and negative ones if signs matter."""
    letters = sorted(a.free_symbols | b.free_symbols, key=str)
    draw = random.Random(0)
    for sign in (1, 1, 1, -1) if a.has(sympy.Abs) or b.has(sympy.Abs) else (1, 1, 1):
        yield {letter: Rational(sign * draw.randint(1, 400), 101) for letter in letters}
        if not letters:
            return


def same_number(a: Expr, b: Expr) -> bool:
    """Exactly, if both are exact. A decimal may differ in its tenth digit, and in its seventh from
    a number that no decimal can be, such as a root."""
    if a == b or a.is_finite is False or b.is_finite is False:
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


def multiples(a: Expr, b: Expr) -> bool:
    """Whether a / b is a number, as that of 2x + 2y - 2 and x + y - 1."""
    ratios = [evaluate(a, at) / evaluate(b, at) for at in points(a, b)]
    usable = len(ratios) > 1 and all(ratio.is_finite and not ratio.is_zero for ratio in ratios)
    return usable and all(same_number(ratio, ratios[0]) for ratio in ratios)
