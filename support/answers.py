"""Whether two answers are equal: a pure function, no processes."""

import re

from math_verify import LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException

MATH_SECONDS = 2  # for each parse and comparison; math-verify sets an alarm, in whole seconds
MAX_MATH_CHARS = 300  # longer texts are compared only as strings
# LaTeX only: math-verify's plain-number extractor picks a stray number out of LaTeX it cannot read.
LATEX = [LatexExtractionConfig(boxed_match_priority=0)]
# what may stand to the left of an equals sign: x, \theta, a_1, f(x), |AB|, \mathrm{Area}
# Possessive (++): there are exponentially many ways to split it, and a mismatch would try them all.
NAME = re.compile(
    r"(?:[a-zA-Z|\s{}(),']|\\(?!frac|sqrt|cdot|times)[a-zA-Z]++|_\{?\w++\}?|\^\{-1\})++"
)
# what stands between several answers: "or", a gap, an arrow, a new line, a bar without a second one
SEVERAL = re.compile(
    r"\\(?:lor|vee|quad|qquad|to|rightarrow|Rightarrow|implies)(?![a-zA-Z])"
    r"|\\\\|\\text *\{[^}]*\bor\b|\?|^[^|]*\|[^|]*$"
)


def gold_answers(cell: str | int | float | list) -> list[str]:
    """The golds in one cell of a dataset, any of which is right, as stripped non-empty strings.
    An empty list means that there is no gold. Raises TypeError for any other kind of cell."""
    entries = cell if isinstance(cell, list | tuple) else [cell]
    if not all(isinstance(entry, str | int | float) for entry in entries):
        raise TypeError(f"a gold must be str, int, float or a list of these, not {cell!r}")
    return [text for entry in entries if (text := str(entry).strip())]


def answers_match(answer: str, gold: str | int | float | list) -> bool:
    """Whether `answer` equals `gold` or one of its entries; an empty answer or gold never does.

    Raises TimeoutError after MATH_SECONDS in one step: the answer is then unknown, not wrong.
    Raises ValueError outside the main thread, where math-verify's alarm does not work.
    """
    answer, golds = clean(answer), [clean(text) for text in gold_answers(gold)]
    if not answer:
        return False
    if any(spelling(answer) == spelling(text) for text in golds):
        return True
    try:
        return any(same_value(text, answer) for text in golds)
    except TimeoutException:  # derived from BaseException: no caller would expect it
        raise TimeoutError(f"math-verify took more than {MATH_SECONDS} s") from None


def clean(text: str) -> str:
    """Without the dollar signs of maths mode, a final full stop, a leading "The answer is" and
    spaces that group digits; 4.5e33 as 4.5 times 10^33, because math-verify takes its e for
    Euler's number."""
    text = re.sub(r"(?<!\\)\$", "", text).strip().removesuffix(".")
    if sentence := re.match(r"(?i)(?:\\text *\{ *)?the (?:final )?answer is:?\s*", text):
        text = text[sentence.end() :]
        if text.count("}") > text.count("{"):  # the one that closed \text{
            text = text.replace("}", "", 1)
    if re.fullmatch(r"-?\d{1,3}((?:\\,|\\? |~)\d{3})+(\.\d+)?", text):
        text = re.sub(r"\\,|\\? |~", "", text)
    return re.sub(r"(?<=\d)[eE]([+-]?\d+)(?!\w)", r"\\times 10^{\1}", text)


def spelling(text: str) -> str:
    """Without the LaTeX that changes only the looks."""
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)
    return re.sub(r"\\(?:left|right)(?![a-zA-Z])|\\[,;:!]|\s", "", text)


def same_value(gold: str, answer: str) -> bool:
    """Whether math-verify takes the two for the same object, and rightly."""
    if not gold or max(len(gold), len(answer)) > MAX_MATH_CHARS:
        return False
    # It drops the base of 52_8
    gold_base, answer_base = (re.findall(r"\d_\{?(\d+)", text) for text in (gold, answer))
    if gold_base and gold_base != answer_base:
        return False
    # It picks one of several answers that are given at once: guessing would pay
    if SEVERAL.search(answer) and not SEVERAL.search(gold):
        return False
    # It takes the right side of any equation for its value, where only "x = 5" names a value,
    # and it folds case, so that N = N is N = n
    left, equals, right = answer.partition("=")
    if equals and left.strip() == right.strip():
        return False
    if equals and "=" not in gold and not NAME.fullmatch(left) and not answers_match(left, gold):
        return False
    parsed = [
        parse(f"\\boxed{{{text}}}", LATEX, parsing_timeout=MATH_SECONDS, raise_on_error=True)
        for text in (gold, answer)
    ]
    same = verify(
        *parsed, allow_set_relation_comp=True, timeout_seconds=MATH_SECONDS, raise_on_error=True
    )
    return same and not far_apart(parsed[0][0], parsed[1][0])


def far_apart(gold, answer) -> bool:
    """Whether both are small numbers that differ: math-verify rounds them all to 0."""
    if not (getattr(gold, "is_comparable", False) and getattr(answer, "is_comparable", False)):
        return False
    gold, answer = float(gold), float(answer)
    return max(abs(gold), abs(answer)) < 1e-3 and abs(gold - answer) > 1e-3 * abs(gold)
