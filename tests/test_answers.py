"""Facts about equal answers: what counts as equal, what does not, and what it may cost."""

import collections
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import support.answers
from benchmarks.grader import hollow, known, listed, near, system
from support.answers import answers_match, gold_answers, processor_limit, readable
from templates import TEMPLATES
from tests.helpers import ROOT, read_jsonl

CASES = read_jsonl(ROOT / "tests" / "grader_cases.jsonl")
GOLDS = [row["answer"] for row in read_jsonl(ROOT / "tests" / "golds.jsonl")]
# Two labels that no rule on two answers can meet: 4 = 3 is a false equation that ends in the gold,
# and of two <answer> tags the template takes the last one.
EXCEPTIONS = {138, 178}


def verdict(case: dict) -> bool:
    template = TEMPLATES["none" if case["template"] == "no" else case["template"]]
    return answers_match(template.extract(case["response"]) or "", case["gold"])


@pytest.mark.parametrize("note", sorted({case["note"].partition(": ")[2] for case in CASES}))
def test_the_labelled_cases_get_their_verdict(note):
    """Those of a kind have right answers and near misses; a "bomb" is made to hang a grader."""
    cases = [case for case in CASES if case["note"].partition(": ")[2] == note]
    found = {case["id"]: verdict(case) for case in cases if case["id"] not in EXCEPTIONS}
    wrong = [case for case in cases if found.get(case["id"], case["expected"]) != case["expected"]]
    assert not wrong


def test_golds_in_the_style_of_each_benchmark_are_readable_and_equal_to_themselves_only():
    texts = [gold_answers(gold) for gold in GOLDS]
    assert all(readable(text) for golds in texts for text in golds)
    for golds in texts:
        assert all(answers_match(f"$ {text} $.", golds) for text in golds)
    for golds, others in zip(texts, texts[1:] + texts[:1], strict=True):
        assert not answers_match(others[0], golds)


@pytest.mark.parametrize("kind", [hollow, known, listed, near, system])
def test_random_answers_of_each_kind_get_their_verdict(kind):
    """As in benchmarks/grader.py --fuzz, which tries many more, in workers."""
    draw = random.Random(0)
    for attack in [kind(draw) for _ in range(15)]:
        assert answers_match(attack.answer, attack.gold) == attack.right, attack


# ------------------------------------------------------------------------------------- golds


@pytest.mark.parametrize(
    "cell, golds",
    [
        (142.0, ["142.0"]),
        (7, ["7"]),
        ([" 1/2\n", "0.5"], ["1/2", "0.5"]),
        ("", []),
        (["", " "], []),
        (float("nan"), []),
        (r"So $\boxed{1}$, no, $\boxed{\frac{1}{2}}$.", [r"\frac{1}{2}"]),
        ("long " * 100 + r"\boxed{7}", ["7"]),
    ],
)
def test_a_cell_of_a_dataset_gives_its_golds(cell, golds):
    assert gold_answers(cell) == golds


@pytest.mark.parametrize("cell", [None, {"a": 1}, [["1"]], [None], b"1"])
def test_other_cells_are_an_error_that_shows_them(cell):
    with pytest.raises(TypeError, match="must be str, int, float or a list"):
        gold_answers(cell)


def test_any_entry_of_a_gold_is_right_and_an_empty_answer_never():
    assert answers_match("0.25", ["1/3", "1/4"])
    assert not answers_match("0.2", ["1/3", "1/4"])
    for empty in ["", " ", "$$", "\\,", "{}"]:
        assert not answers_match(empty, ["", "1", "\\,"])


def test_a_gold_without_a_meaning_is_named_and_equals_the_same_text():
    strange = r"\mathop{x \uplus} {}^{7"
    assert not readable(strange)
    assert answers_match(strange.replace(" ", ""), strange)
    assert not answers_match("7", strange)
    assert readable(r"\frac{1}{2}") and readable(r"\text{Evelyn}")


def test_long_texts_are_compared_as_strings():
    long = "+".join(["1"] * 200)
    assert not readable(long)
    assert answers_match(long + " ", long)
    assert not answers_match("200", long)
    assert not answers_match(long, "200")


# ----------------------------------------------------------------------- time, memory, threads


@pytest.mark.parametrize("answer", [
    "e^{e^{e^{e^{e}}}}",
    "(" * 140 + "7" + ")" * 140,
    "9" * 290 + "^9",
    "x=" * 100 + "7",
    "x^{x^{x^{x^{x^{x}}}}}",
    "(1000000^{1000000}, 3)",
])  # fmt: skip
def test_what_would_hang_or_fill_the_memory_is_not_computed(answer):
    start = time.process_time()
    assert not answers_match(answer, ["7", r"\sqrt{2}", "x^2"])
    assert time.process_time() - start < support.answers.MATH_SECONDS


def test_what_takes_too_long_is_unknown(monkeypatch):
    def slow(gold, answer):
        while True:
            try:
                collections.deque(range(10**6))
            except Exception:  # as a library might
                continue

    monkeypatch.setattr(support.answers, "MATH_SECONDS", 0.1)
    monkeypatch.setattr(support.answers, "same_answer", slow)
    with pytest.raises(TimeoutError, match=r"0\.1 s"):
        answers_match("1", "2")


def test_only_time_on_the_processor_counts():
    with processor_limit(0.1):
        time.sleep(0.4)


def test_outside_the_main_thread_it_is_an_error():
    with ThreadPoolExecutor() as pool, pytest.raises(ValueError):
        pool.submit(answers_match, "1", "2").result()
