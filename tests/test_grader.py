"""Facts about grading: workers that may hang, die or be killed, and rewards of one's own."""

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from support.grader import Grader, Verdict, check_reward, refuse_broken_reward
from templates import Template
from tests.helpers import ROOT, boxed, launch, read_jsonl, wait_until


def same(found: list[float], expected: list[float | None]) -> bool:
    """Whether rewards are as expected; None stands for nan."""
    return [None if math.isnan(reward) else reward for reward in found] == expected


# ------------------------------------------------------------------------------- the grader


def test_rewards_are_one_or_zero_in_the_order_of_the_responses(grader):
    graded = grader.graded
    responses = [boxed("70"), boxed("71"), "70", boxed("\\frac{2}{4}"), boxed("70"), boxed("1")]
    answers = ["70", "70", "70", ["3", "0.5"], "70", ""]
    rewards = grader.grade(responses, answers)
    assert rewards == [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    assert all(isinstance(reward, float) for reward in rewards)
    assert grader.graded == graded + 6
    assert grader.grade([], []) == []


def test_as_many_answers_as_responses(grader):
    with pytest.raises(ValueError, match="2 responses but 1 answers"):
        grader.grade(["a", "b"], ["1"])


def test_a_template_is_given_by_name_or_as_a_record():
    with pytest.raises(ValueError, match="'qwen'.*qwen_math, r1, none"):
        Grader("qwen")
    shout = Template("shout", str.upper, (), str.lower)
    with Grader(shout, workers=1) as grader:
        assert grader.grade(["X+X"], ["2x"]) == [1.0]


def test_grading_works_outside_the_main_thread(grader):
    with ThreadPoolExecutor() as pool:
        graded = pool.submit(grader.grade, [boxed("\\frac{2}{4}"), boxed("3")], ["0.5", "2"])
        assert graded.result(30) == [1.0, 0.0]


MAIN_SCRIPT = """
import sys
sys.path.append(sys.argv[1])
import torch
import hostile_comparisons
from support.grader import Grader

if __name__ == "__main__":
    with Grader("none", workers=1) as grader:
        grader.equal = hostile_comparisons.has_imported
        print(grader.grade(["\\\\boxed{torch}", "\\\\boxed{latex2sympy2_extended}"], ["1", "1"]))
    print(__file__)
"""


def test_workers_import_what_they_need_and_neither_torch_nor_the_main_script(hostile, tmp_path):
    script = tmp_path / "main_script.py"
    script.write_text(MAIN_SCRIPT)
    printed = launch(1, script, Path(hostile.__file__).parent)
    assert printed.splitlines() == ["[0.0, 1.0]", str(script)]


CLEAN = [boxed(f"{i}+0") for i in range(20)]
CLEAN_GOLDS = [str(i if i % 2 else -1) for i in range(20)]
CLEAN_REWARDS = [float(i % 2) for i in range(20)]


@pytest.mark.parametrize(
    "answer, timeouts, errors",
    [("hang", 1, 0), ("exit", 0, 1), ("kill", 0, 1), ("fill", 0, 1), ("leave", 0, 1)],
)
def test_a_lost_worker_costs_one_reward_which_is_unknown(answer, timeouts, errors, hostile):
    with Grader("none", timeout=1.5) as grader:
        grader.equal = hostile.hostile
        found = grader.grade(CLEAN + [boxed(answer)], CLEAN_GOLDS + ["1"])
        assert same(found, CLEAN_REWARDS + [None])
        assert grader.grade(CLEAN, CLEAN_GOLDS) == CLEAN_REWARDS
        assert (grader.timeouts, grader.errors) == (timeouts, errors), "timeouts, errors"


def test_more_hangs_than_workers_do_not_stop_the_grading(hostile):
    with Grader("none", timeout=0.5) as grader:
        grader.equal = hostile.hostile
        responses, golds = [boxed("hang")] * 4 + CLEAN, [str(i) for i in range(4)] + CLEAN_GOLDS
        assert same(grader.grade(responses, golds), [None] * 4 + CLEAN_REWARDS)
        assert grader.timeouts == 4
        assert grader.grade(CLEAN, CLEAN_GOLDS) == CLEAN_REWARDS


def test_waiting_for_a_worker_is_not_counted_as_running_time(hostile):
    with Grader("none", workers=1, timeout=0.3) as grader:
        grader.equal = hostile.slow
        # 1.6 s in all, and one may take 1.2
        assert grader.grade([boxed(i) for i in range(8)], ["1"] * 8) == [1.0] * 8


def test_a_reward_that_mostly_fails_stops_the_run():
    """What no worker was asked for, since there was no answer, does not hide it."""
    bug, hang = Verdict(math.nan, None, "KeyError()"), Verdict(math.nan, None, "timeout")
    fine, unanswered = Verdict(0.0, False), Verdict(0.0, False, graded=False)
    for failed in ([bug] * 5, [hang] * 5, [bug] * 2 + [hang] * 3):
        with pytest.raises(RuntimeError, match=rf"5 of 9 .* first: .*{failed[0].failure[:5]}"):
            refuse_broken_reward([unanswered] * 100 + failed + [fine] * 4)
        refuse_broken_reward(failed + [fine] * 5)  # half is not most
    refuse_broken_reward([bug] * 7)  # too few to tell
    refuse_broken_reward([])


def workers_of_this_process() -> list[int]:
    return [child.pid for child in multiprocessing.active_children()]


def test_idle_workers_that_were_killed_are_replaced():
    others = set(workers_of_this_process())
    with Grader("none") as grader:
        assert grader.grade(CLEAN, CLEAN_GOLDS) == CLEAN_REWARDS
        for pid in set(workers_of_this_process()) - others:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)
        assert grader.grade(CLEAN, CLEAN_GOLDS) == CLEAN_REWARDS
        assert (grader.timeouts, grader.errors) == (0, 0)
    assert set(workers_of_this_process()) <= others


TRAINER = """
import signal, sys
sys.path.append(sys.argv[1])
from support.grader import Grader
from spinning import spin

if __name__ == "__main__":
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)
    grader = Grader("none", workers=1, timeout=0.3)
    grader.equal = spin
    grader.grade(["\\\\boxed{1}"], ["2"])
"""
SPINNING = """
import collections, itertools, os
from pathlib import Path

def spin(answer, golds):
    Path(__file__).with_name("pid").write_text(str(os.getpid()))
    collections.deque(itertools.count(), maxlen=0)
"""


def test_a_stuck_worker_does_not_outlive_a_killed_trainer(tmp_path):
    script, pid_file = tmp_path / "trainer.py", tmp_path / "pid"
    script.write_text(TRAINER)
    (tmp_path / "spinning.py").write_text(SPINNING)
    trainer = subprocess.Popen([sys.executable, script, ROOT], stdout=subprocess.DEVNULL)
    wait_until(lambda: pid_file.exists() and pid_file.read_text(), 60)
    trainer.kill()
    trainer.wait()
    worker = Path("/proc") / pid_file.read_text()
    assert worker.exists()
    wait_until(lambda: not worker.exists(), 30)


# ------------------------------------------------------------- a reward function of one's own


def own(rewards, function, **settings):
    """A grader that asks this function of the file."""
    return Grader("none", reward=f"{rewards}:{function}", **settings)


def test_a_function_of_ones_own_gets_response_and_row_in_another_process(rewards, tmp_path):
    """Equal responses to one row are graded once, and to two rows twice."""
    log = str(tmp_path / "calls")
    rows = [{"log": log, "row": i, "tests": [{"a": None}]} for i in range(2)]
    given = [("two", 0), ("two", 0), ("two", 1), ("\\boxed{2}", 0), ("", 1), ("two", 0)]
    with own(rewards, "note") as grader:
        texts, asked = zip(*((text, rows[i]) for text, i in given), strict=True)
        assert grader.verdicts(texts, [["2"]] * 6, asked) == [Verdict(0.25, None)] * 6
        assert grader.graded == 6
    calls = read_jsonl(tmp_path / "calls")
    assert all(row == rows[row["row"]] and pid != os.getpid() for pid, _, row in calls)
    assert sorted((text, row["row"]) for _, text, row in calls) == sorted(set(given))


FINE = {"half": 0.5, "true": 1.0, "negative": -3.0, "": 1.0, **{str(i): 1.0 for i in range(9)}}
ODD = ["nan", "infinity", "text", "nothing", "complex", "list", "raise", "hang"]


@pytest.mark.parametrize("function", ["obey", "obey_later"])
def test_whatever_a_function_does_makes_only_its_own_reward_unknown(rewards, function):
    """obey_later is an async def, whose calls are awaited together in one worker."""
    responses = [*FINE, *ODD]
    with own(rewards, function, timeout=1.0) as grader:
        verdicts = grader.verdicts(responses, [[]] * len(responses), [{}] * len(responses))
        assert (grader.graded, grader.timeouts, grader.errors) == (len(responses), 1, 7)
    found = dict(zip(responses, verdicts, strict=True))
    assert {response: found[response].reward for response in FINE} == FINE
    assert not any(found[response].failure for response in FINE)
    assert all(math.isnan(found[response].reward) for response in ODD)
    for response in ("nan", "infinity", "text", "nothing", "complex", "list"):
        assert "must be a finite number" in found[response].failure
    assert "in obey" in found["raise"].failure and "KeyError: 'oops'" in found["raise"].failure
    assert found["hang"].failure == "timeout"
    assert all(verdict.correct is None for verdict in verdicts)


def test_a_function_that_ends_its_worker_makes_only_its_own_reward_unknown(rewards):
    with own(rewards, "obey") as grader:
        assert same(grader.grade(["", "exit", "half"], [[]] * 3, [{}] * 3), [1.0, None, 0.5])


def test_an_async_function_that_blocks_or_ends_its_worker_makes_all_of_them_unknown(rewards):
    with own(rewards, "obey_later", timeout=0.5) as grader:
        for does, failure in (("block", "timeout"), ("exit", "the worker died with exit code 3")):
            verdicts = grader.verdicts(["half", does], [[]] * 2, [{}] * 2)
            assert [verdict.failure for verdict in verdicts] == [failure] * 2
        assert grader.grade(["half"], [[]], [{}]) == [0.5]


@pytest.mark.parametrize("name, message", [
    ("nowhere.py:f", "FILE.py:FUNCTION of a file that exists"),
    ("rewards.py", "FILE.py:FUNCTION of a file that exists"),
    ("rewards.py:missing", "has no function missing"),
    ("rewards.py:number", "has no function number"),
    ("syntax.py:f", "importing .*syntax.py failed: SyntaxError"),
    ("text.txt:f", "is not a Python file"),
])  # fmt: skip
def test_a_function_that_cannot_be_had_is_refused(rewards, name, message):
    (rewards.parent / "syntax.py").write_text("def f(:")
    (rewards.parent / "text.txt").write_text("def f(): pass")
    with pytest.raises(ValueError, match=message):
        check_reward(str(rewards.parent / name), [{}])


# ------------------------------------------------------------------- a judge over HTTP, in docs


class Judge(BaseHTTPRequestHandler):
    """Says after a while whether a text holds an 'a'; an error for a text with 'refuse'."""

    def do_POST(self):
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        time.sleep(0.3)
        self.send_response(500 if "refuse" in text else 200)
        self.end_headers()
        self.wfile.write(b"1.0" if "a" in text else b"0.0")

    def log_message(self, *args):
        pass


def test_the_judge_of_the_docs_is_awaited_for_many_responses_at_once(tmp_path):
    page = (ROOT / "docs" / "rewards.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "judge.py").write_text(
        code.replace("http://127.0.0.1:8000", f"http://127.0.0.1:{server.server_port}")
    )
    responses = [f"a {i}" for i in range(20)] + [f"b {i}" for i in range(19)] + ["refuse"]
    try:
        with Grader("none", timeout=60.0, reward=f"{tmp_path}/judge.py:judge") as grader:
            start = time.monotonic()
            found = grader.grade(responses, [[]] * 40, [{"problem": "?"}] * 40)
            took = time.monotonic() - start
    finally:
        server.shutdown()
    assert same(found, [1.0] * 20 + [0.0] * 19 + [None])
    assert took < 40 * 0.3, "one after the other would take 12 s"
