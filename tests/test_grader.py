"""Facts about the reward: equality of answers, and workers that may hang, die or be killed."""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial
from pathlib import Path

import pytest

import support.grader
from support.grader import (
    Grader,
    Verdict,
    answers_match,
    check_reward,
    gold_answers,
    refuse_broken_reward,
)
from templates import TEMPLATES, Template, last_boxed
from tests.helpers import DATA, ROOT, boxed, read_jsonl, wait_until

BENCHMARKS = ("aime24", "amc23", "math500", "minerva", "olympiadbench", "math_lvl3to5_train")

# ------------------------------------------------------------------------------ equality


@pytest.mark.parametrize(
    "cell, golds",
    [
        (" 70\n", ["70"]),
        (70, ["70"]),
        (142.0, ["142.0"]),
        (["1", 2, " 3.5 \n", ""], ["1", "2", "3.5"]),
        ("", []),
        ("  ", []),
        ([], []),
        ([""], []),
    ],
)
def test_a_gold_cell_becomes_a_list_of_strings(cell, golds):
    assert gold_answers(cell) == golds


@pytest.mark.parametrize("cell", [None, {"a": 1}, [["1"]], [None]])
def test_a_gold_cell_of_another_type_raises(cell):
    with pytest.raises(TypeError, match="gold"):
        gold_answers(cell)


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("70", "70"),
        ("25", "025"),
        ("142", 142.0),
        ("142", "142.0"),
        ("$70$", "70"),
        ("\\dfrac{6}{8}", "\\frac{3}{4}"),
        ("3/4", "0.75"),
        ("11\\sqrt{2}", "11\\sqrt2"),
        ("\\sqrt{242}", "11\\sqrt2"),
        ("\\left( 3, \\dfrac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
        ("84, 69", "$69$,$84$"),
        ("\\$32348", "\\$32,348"),
        ("Evelyn", "\\text{Evelyn}"),
        ("4.5\\times 10^{33}", "4.5e33"),
        ("(-\\infty, 0) \\cup \\{1\\}", "$(-\\infty, 0) \\cup\\{1\\}$."),
        ("3", ["1", "2", "3"]),
        ("52_8", "52_{8}"),
        ("52_8", "52"),
        ("x=5", "5"),
        ("f(x) = 2x+1", "2x+1"),
        ("\\mathrm{Area} = 12", "12"),
        ("2+3=5", "5"),
        ("-2 \\le x \\le 7", "[-2,7]"),
        ("\\text{The answer is } 12", "12"),
        ("The final answer is $12$.", "12"),
        ("12\\ 345", "12,345"),
        ("1.6e-19", "1.6 \\times 10^{-19}"),
    ],
)
def test_equal_answers_match(answer, gold):
    assert answers_match(answer, gold)


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("71", "70"),
        ("0.33", "\\frac{1}{3}"),
        ("11", "11\\sqrt2"),
        ("\\{1,3\\}", "3"),
        ("(-2,7)", "[-2,7]"),
        ("nylevE", "\\text{Evelyn}"),
        ("0", "$(-\\infty, 0) \\cup\\{1\\}$."),
        ("2", "\\hbar \\omega(v+1 / 2)-\\frac{E_{0}^{2} e^{2}}{2 m \\omega^{2}}"),
        ("52", "52_8"),
        ("52_9", "52_8"),
        ("x+2=5", "5"),
        ("x^2-7x=0", "0"),
        ("k=k", "k=K"),
        ("10^{-30}", "8 \\times 10^{-19}"),
        ("0", "10^{-20}"),
        ("\\leftarrow", "\\rightarrow"),
        ("4", ["1", "2", "3"]),
        ("", "70"),
        ("$ $", "$$"),
        ("", ""),
        ("70", ""),
        ("70", []),
        ("7" * 100_000, "70"),
    ],
)
def test_unequal_or_empty_answers_do_not_match(answer, gold):
    assert not answers_match(answer, gold)


def test_the_gold_is_the_first_argument_of_the_comparison():
    assert answers_match("2x+3", "y=2x+3")
    assert not answers_match("1", "2x+z=1")


def test_a_comparison_without_end_raises_and_logs_nothing(caplog):
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        answers_match("9^{9^{9^{9}}}", "70")
    assert time.monotonic() - start < 10 * support.grader.MATH_SECONDS
    assert caplog.text == ""


def assert_each_gold_matches_itself(file):
    golds = [gold for row in read_jsonl(file) for gold in gold_answers(row["answer"])]
    in_tags = [TEMPLATES["r1"].extract(f"</think> <answer> {gold} </answer>") for gold in golds]
    in_boxes = [last_boxed(boxed(gold)) for gold in golds]
    for answers in (in_boxes, in_tags):
        assert [g for a, g in zip(answers, golds, strict=True) if not answers_match(a, g)] == []


def test_every_gold_matches_itself():
    assert_each_gold_matches_itself(ROOT / "tests" / "golds.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_gold_of_the_benchmarks_matches_itself(name):
    file = DATA / f"{name}.jsonl"
    if not file.exists():
        pytest.skip("set DRGRPO_DATA to the folder of the benchmarks' .jsonl files")
    assert_each_gold_matches_itself(file)


@pytest.mark.parametrize("answer", [
    r"-4 \lor \frac{1}{2}", r"\frac{1}{2} \vee 7", r"\begin{cases} -4 \\ \frac{1}{2} \end{cases}",
    r"1 | \frac{1}{2}", r"-4 \quad \frac{1}{2}", r"\frac{2}{3} / \frac{1}{2} ?",
    r"-4 \text{ (or } \frac{1}{2})", r"7 \to \frac{1}{2}", r"\frac{1}{2} \Rightarrow 1",
])  # fmt: skip
def test_several_answers_are_not_one_right_answer(answer):
    """Found by benchmarks/fuzz.py."""
    assert not answers_match(answer, r"\frac{1}{2}")


def test_a_gold_of_several_parts_still_matches():
    assert answers_match(
        r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"
    )
    assert answers_match("2|x|", "|2x|")


# ------------------------------------------------------------------------------ the grader


def test_rewards_are_one_or_zero_in_the_order_of_the_responses(grader):
    before = grader.graded, grader.timeouts, grader.errors
    responses = [boxed("70"), boxed("71"), "70", boxed("\\frac{2}{4}"), boxed("70"), boxed("1")]
    answers = ["70", "70", "70", ["3", "0.5"], "70", ""]
    rewards = grader.grade(responses, answers)
    assert rewards == [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    assert all(isinstance(reward, float) for reward in rewards)
    after = grader.graded, grader.timeouts, grader.errors
    assert after == (before[0] + 6, before[1], before[2])
    assert grader.grade([], []) == []


def test_many_symbols_left_of_an_equals_sign_take_no_time(grader):
    before = grader.timeouts
    responses = [boxed("\\alpha" * 20 + "+1=5"), boxed("x" + "_a" * 15 + "+1=5")]
    assert grader.grade(responses, ["5", "5"]) == [0.0, 0.0]
    assert grader.timeouts == before


def test_as_many_answers_as_responses(grader):
    with pytest.raises(ValueError, match="2 responses but 1 answers"):
        grader.grade(["a", "b"], ["1"])


def test_a_template_is_given_by_name_or_as_a_record():
    with pytest.raises(ValueError, match="'qwen'.*qwen_math, r1, none"):
        Grader("qwen")
    shout = Template("shout", str.upper, (), str.lower)
    with Grader(shout, workers=1) as grader:
        assert grader.template is shout
        assert grader.grade(["X+X"], ["2x"]) == [1.0]


def test_grading_works_outside_the_main_thread(grader):
    rewards = []
    batch = [boxed("\\frac{2}{4}"), boxed("3")], ["0.5", "2"]
    thread = threading.Thread(target=lambda: rewards.extend(grader.grade(*batch)))
    thread.start()
    thread.join(30)
    assert rewards == [1.0, 0.0]


def test_comparisons_happen_only_in_workers(grader, hostile):
    grader.equal = hostile.worker_id
    try:
        assert grader.grade([boxed(os.getpid())], ["1"]) == [1.0]
    finally:
        grader.equal = answers_match


def test_what_takes_long_to_import_is_in_a_worker_before_it_begins(hostile):
    for name in support.grader.PRELOADED:  # the server of the workers passes over what it lacks
        importlib.import_module(name)
    with Grader("none") as grader:
        grader.equal = hostile.has_imported
        assert grader.grade([boxed("datasets")], ["1"]) == [1.0]


def test_what_is_imported_before_the_fork_looks_for_no_gpu():
    code = """
import importlib, sys, torch
from support.grader import PRELOADED

looked = []
for name in ("is_available", "device_count"):
    setattr(torch.cuda, name, lambda: looked.append(1))
for name in [*PRELOADED, *sys.argv[1:]]:
    importlib.import_module(name)
print(bool(looked))
"""
    for others, answer in ([], "False"), (["drgrpo"], "True"):  # drgrpo.py does look
        command = [sys.executable, "-c", code, *others]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.strip() == answer, done.stderr


CLEAN = [boxed(f"{i}+0") for i in range(20)]
CLEAN_GOLDS = [str(i if i % 2 else -1) for i in range(20)]
CLEAN_REWARDS = [float(i % 2) for i in range(20)]


@pytest.mark.parametrize(
    "answer, timeouts, errors",
    [("hang", 1, 0), ("exit", 0, 1), ("kill", 0, 1), ("fill", 0, 1), ("leave", 0, 1)],
)
def test_a_lost_worker_costs_one_reward_and_is_counted_once(answer, timeouts, errors, hostile):
    with Grader("none", timeout=1.5) as grader:
        grader.equal = hostile.hostile
        assert grader.grade(CLEAN + [boxed(answer)], CLEAN_GOLDS + ["1"]) == CLEAN_REWARDS + [0.0]
        assert (grader.timeouts, grader.errors) == (timeouts, errors)
        assert grader.grade(CLEAN, CLEAN_GOLDS) == CLEAN_REWARDS
        assert (grader.timeouts, grader.errors) == (timeouts, errors)


def test_more_hangs_than_workers_do_not_stop_the_grading(hostile):
    with Grader("none", timeout=0.5) as grader:
        grader.equal = hostile.hostile
        responses, golds = [boxed("hang")] * 4 + CLEAN, [str(i) for i in range(4)] + CLEAN_GOLDS
        start = time.monotonic()
        assert grader.grade(responses, golds) == [0.0] * 4 + CLEAN_REWARDS
        assert grader.timeouts == 4
        assert time.monotonic() - start < 100
        assert grader.grade(CLEAN, CLEAN_GOLDS) == CLEAN_REWARDS


def test_each_distinct_pair_is_compared_once_but_every_response_counts(tmp_path, hostile):
    calls = tmp_path / "calls"
    with Grader("none") as grader:
        grader.equal = partial(hostile.note_call, str(calls))
        responses = [boxed(i % 3) for i in range(20)]
        assert grader.grade(responses, ["1"] * 20) == [float(i % 3 == 1) for i in range(20)]
        assert sorted(calls.read_text().split()) == ["0", "1", "2"]
        assert grader.graded == 20


def test_grading_can_begin_before_it_is_asked_for(tmp_path, hostile):
    calls = tmp_path / "calls"
    with Grader("none") as grader:
        grader.equal = partial(hostile.note_call, str(calls))
        grader.start([boxed(1), boxed(1), "no answer"], ["1", "1", "1"])
        grader.start([boxed(1), boxed(2)], ["1", "1"])
        wait_until(lambda: calls.exists() and len(calls.read_text().split()) == 2, 30)
        assert grader.graded == 0
        assert grader.grade([boxed(2), boxed(3), boxed(1)], ["1"] * 3) == [0.0, 0.0, 1.0]
        assert sorted(calls.read_text().split()) == ["1", "2", "3"], "each compared once"
        assert grader.grade([boxed(1)], ["1"]) == [1.0]
        assert sorted(calls.read_text().split()) == ["1", "1", "2", "3"], "nothing is kept"


def test_a_comparison_that_began_early_may_hang_and_its_pool_may_die(hostile):
    others = set(workers_of_this_process())
    with Grader("none", timeout=1.0) as grader:
        grader.equal = hostile.hostile
        grader.start([boxed("hang"), boxed("1")], ["1", "1"])
        assert grader.grade([boxed("hang"), boxed("1")], ["1", "1"]) == [0.0, 1.0]
        assert (grader.timeouts, grader.errors) == (1, 0)
    with Grader("none") as grader:
        assert grader.grade(CLEAN, CLEAN_GOLDS) == CLEAN_REWARDS
        for pid in set(workers_of_this_process()) - others:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)
        for _ in range(3):  # pebble notices at some time
            grader.start(CLEAN, CLEAN_GOLDS)
            time.sleep(0.2)
        assert grader.grade(CLEAN, CLEAN_GOLDS) == CLEAN_REWARDS


def test_waiting_for_a_worker_is_not_counted_as_running_time(hostile):
    with Grader("none", workers=1, timeout=0.8) as grader:
        grader.equal = hostile.slow
        assert grader.grade([boxed(i) for i in range(8)], ["1"] * 8) == [1.0] * 8  # 1.6 s in all


def test_a_batch_of_mostly_errors_raises_the_first_error(hostile):
    with Grader("none") as grader:
        grader.equal = hostile.hostile
        bugs = [boxed(f"bug {i}") for i in range(8)]
        with pytest.raises(RuntimeError, match=r"8 of 15 .*KeyError\('bug 0'\)"):
            grader.grade(bugs + CLEAN[:7], ["1"] * 15)
        assert grader.grade(bugs + CLEAN[:8], ["1"] * 16)[:8] == [0.0] * 8
        assert grader.grade(bugs[:7], ["1"] * 7) == [0.0] * 7
        assert grader.errors == 8 + 8 + 7


def workers_of_this_process() -> list[int]:
    return [child.pid for child in multiprocessing.active_children()]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_idle_workers_lost_to_a_signal_are_replaced(sent, monkeypatch):
    monkeypatch.setattr(support.grader, "PATIENCE", 15.0)
    others = set(workers_of_this_process())
    with Grader("none") as grader:
        assert grader.grade(CLEAN, CLEAN_GOLDS) == CLEAN_REWARDS
        for pid in set(workers_of_this_process()) - others:
            os.kill(pid, sent)
        time.sleep(0.5)
        assert grader.grade(CLEAN, CLEAN_GOLDS) == CLEAN_REWARDS
        assert (grader.timeouts, grader.errors) == (0, 0)
    assert set(workers_of_this_process()) <= others


TRAINER = """
    import collections, itertools, os, signal, sys
    sys.path.insert(0, sys.argv[1])
    from support.grader import Grader

    def spin(answer, golds):
        with open(sys.argv[2], "w") as file:
            file.write(str(os.getpid()))
        collections.deque(itertools.count(), maxlen=0)

    if __name__ == "__main__":
        signal.signal(signal.SIGXCPU, signal.SIG_IGN)
        grader = Grader("none", workers=1, timeout=0.3)
        grader.equal = spin
        grader.grade(["\\\\boxed{1}"], ["2"])
"""


def test_a_stuck_worker_does_not_outlive_a_killed_trainer(tmp_path):
    script, pid_file = tmp_path / "trainer.py", tmp_path / "pid"
    script.write_text(textwrap.dedent(TRAINER))
    arguments = [sys.executable, script, ROOT, pid_file]
    trainer = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    wait_until(lambda: pid_file.exists() and pid_file.read_text(), 20)
    trainer.kill()
    trainer.wait()
    worker = Path("/proc") / pid_file.read_text()
    assert worker.exists()
    wait_until(lambda: not worker.exists(), 15)


CASES = read_jsonl(ROOT / "tests" / "grader_cases.jsonl")
BOMBS = [case for case in CASES if "bomb" in case["note"]]  # made to hang or break a grader


def rewards_of(cases):
    rewards = {}
    for name, template in [("qwen_math", "qwen_math"), ("r1", "r1"), ("no", "none")]:
        rows = [case for case in cases if case["template"] == name]
        with Grader(template, workers=4) as grader:
            graded = grader.grade([r["response"] for r in rows], [r["gold"] for r in rows])
        rewards |= {row["id"]: reward for row, reward in zip(rows, graded, strict=True)}
        assert grader.errors == 0
    return rewards


def test_labelled_cases_are_graded_right():
    cases = [case for case in CASES if case not in BOMBS]
    rewards = rewards_of(cases)
    clear = [c for c in cases if "debatable" not in c["note"] and "lenient" not in c["note"]]
    missed = [case for case in clear if rewards[case["id"]] != case["expected"]]
    assert len(clear) > 80 and len(missed) <= 2, [case["note"] for case in missed]


@pytest.mark.parametrize(
    "every", [8, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"]
)  # 2 s each
def test_hostile_responses_score_zero(every):
    bombs = BOMBS[::every]
    assert bombs and not any(rewards_of(bombs).values())


# ------------------------------------------------------------- a reward function of one's own


def own(rewards, function, **settings):
    """A grader that asks this function of the file."""
    return Grader("none", reward=f"{rewards}:{function}", **settings)


def test_a_function_of_ones_own_gets_response_and_row_in_another_process(rewards, tmp_path):
    row = {"problem": "1+1", "log": str(tmp_path / "calls"), "level": 3, "tests": [{"a": None}]}
    with own(rewards, "note") as grader:
        verdicts = grader.verdicts(["two", "\\boxed{2}", ""], [["2"], [], ["7"]], [row] * 3)
    assert verdicts == [Verdict(0.25, None)] * 3
    calls = read_jsonl(tmp_path / "calls")
    assert sorted(response for _, response, _ in calls) == ["", "\\boxed{2}", "two"]
    assert all(found == row for _, _, found in calls)
    assert os.getpid() not in [pid for pid, _, _ in calls]


def test_equal_responses_to_one_row_are_graded_once_and_to_two_rows_twice(rewards, tmp_path):
    rows = [{"log": str(tmp_path / "calls"), "row": i} for i in range(2)]
    with own(rewards, "note") as grader:
        grader.start(["a", "a"], [[], []], rows[:1] * 2)
        assert grader.grade(["a"] * 4, [[]] * 4, [rows[0], rows[0], rows[1], rows[0]]) == [0.25] * 4
        assert grader.graded == 4
    assert sorted(row["row"] for _, _, row in read_jsonl(tmp_path / "calls")) == [0, 1]


def test_whatever_a_function_does_costs_its_own_response_and_is_counted(rewards):
    fine = {"half": 0.5, "true": 1.0, "negative": -3.0, "": 1.0, **{str(i): 1.0 for i in range(9)}}
    odd = ["nan", "infinity", "text", "nothing", "complex", "list", "raise", "exit", "hang"]
    responses = [*fine, *odd]
    with own(rewards, "obey", timeout=1.0) as grader:
        verdicts = grader.verdicts(responses, [[]] * len(responses), [{}] * len(responses))
        assert (grader.graded, grader.timeouts, grader.errors) == (len(responses), 1, 8)
    found = dict(zip(responses, verdicts, strict=True))
    assert {response: found[response].reward for response in fine} == fine
    assert not any(found[response].failure for response in fine)
    assert all(found[response].reward == 0.0 for response in odd)
    for response in ("nan", "infinity", "text", "nothing", "complex", "list"):
        assert "must be a finite number" in found[response].failure
    assert "KeyError('oops')" in found["raise"].failure
    assert found["hang"].failure == "timeout"
    assert all(verdict.correct is None for verdict in verdicts)


@pytest.mark.parametrize("wrong", [["raise"] * 5, ["hang"] * 5, ["hang"] * 2 + ["text"] * 3])
def test_a_reward_that_mostly_fails_or_hangs_stops_the_run(rewards, wrong):
    """Each in a row of its own, because equal responses to one row are graded once."""
    with own(rewards, "obey", timeout=0.3) as grader:
        rows = [{"row": i} for i in range(10)]
        verdicts = grader.verdicts(wrong + ["fine"] * 5, [[]] * 10, rows)
    assert [verdict.reward for verdict in verdicts] == [0.0] * 5 + [1.0] * 5
    with pytest.raises(RuntimeError, match="5 of 9 gradings failed.*means nothing"):
        refuse_broken_reward(verdicts[:9])
    refuse_broken_reward(verdicts)  # half is not most


def test_grade_refuses_a_broken_reward(rewards):
    with (
        own(rewards, "obey") as grader,
        pytest.raises(RuntimeError, match="9 of 9 gradings failed"),
    ):
        grader.grade(["raise"] * 9, [[]] * 9, [{}] * 9)


def test_what_no_worker_was_asked_for_does_not_hide_a_broken_reward(hostile):
    unanswered = Verdict(0.0, False, graded=False)
    broken = [Verdict(0.0, False, "KeyError()")] * 8
    with pytest.raises(RuntimeError, match=r"8 of 8 .*KeyError"):
        refuse_broken_reward([unanswered] * 100 + broken)
    refuse_broken_reward([unanswered] * 100 + broken[:7])
    refuse_broken_reward([])


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere.py:f", "FILE.py:FUNCTION of a file that exists"),
        ("FILE", "FILE.py:FUNCTION of a file that exists"),
        ("FILE:missing", "has no function missing"),
        ("FILE:number", "has no function number"),
        ("broken.py:f", "importing .*broken.py failed: .*oops"),
        ("syntax.py:f", "importing .*syntax.py failed: SyntaxError"),
        ("text.txt:f", "is not a Python file"),
    ],
)
def test_a_function_that_cannot_be_had_is_refused(rewards, name, message):
    (rewards.parent / "broken.py").write_text("raise RuntimeError('oops')")
    (rewards.parent / "syntax.py").write_text("def f(:")
    (rewards.parent / "text.txt").write_text("def f(): pass")
    reward = name.replace("FILE", str(rewards))
    if not name.startswith(("FILE", "nowhere")):
        reward = str(rewards.parent / name)
    with pytest.raises(ValueError, match=message):
        check_reward(reward, {})


@pytest.mark.parametrize(
    "does, message",
    [
        ("raise", r"failed on an empty response to the first row: KeyError\('oops'\)"),
        ("nan", "a finite number, not nan"),
        pytest.param("text", "a finite number, not '1'", marks=pytest.mark.slow),
        pytest.param("nothing", "a finite number, not None", marks=pytest.mark.slow),
        pytest.param("exit", "the worker died with exit code 3", marks=pytest.mark.slow),
        ("hang", "the first row: timeout"),
    ],
)
def test_a_function_is_tried_on_the_first_row(rewards, does, message, monkeypatch):
    impatient = lambda *args, timeout, **kwargs: Grader(*args, timeout=1.0, **kwargs)
    monkeypatch.setattr(support.grader, "Grader", impatient)
    reward = f"{rewards}:on_the_first_row"
    with pytest.raises(ValueError, match=message):
        check_reward(reward, {"problem": does})
    check_reward("math", {})


def test_a_function_that_works_on_the_first_row_is_taken(rewards):
    check_reward(f"{rewards}:on_the_first_row", {"problem": "half"})
