"""The reward: does a response's answer equal the right one, or what does a function of yours say.

Equality is decided by math-verify, that is by sympy running on text a language model wrote. It may
compute for ever or fill the memory, and no code inside the same process can reliably stop it. So
`Grader` finds the answers itself, by plain string search, and compares them in worker processes
that it can kill. A reward function of one's own (`--reward FILE.py:FUNCTION`) runs there, too. A
grading that is lost scores 0 and is counted.
"""

import functools
import importlib.util
import math
import multiprocessing
import numbers
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException
from pebble import ProcessExpired, ProcessPool
from pebble.common import CONSTS

from support.ranks import StopSignals
from templates import TEMPLATES, Template

# Each worker imports the main script. What takes seconds of that is imported once, before the fork.
# None of these may look for a GPU: CUDA does not survive a fork, and a worker would see none.
PRELOADED = [
    "math_verify",
    "datasets",
    "torch.distributed.fsdp",
    "transformers.models.auto.modeling_auto",
]

# ------------------------------------------------------------------- equality of two answers

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


# ------------------------------------------------------------------- a function of one's own


@functools.cache
def load_reward(reward: str) -> Callable[[str, dict], float]:
    """The function that `FILE.py:FUNCTION` names. Its file may import others beside it.

    Raises ValueError if there is no such file or function, or if the file cannot be imported.
    """
    file, colon, name = reward.rpartition(":")
    if not colon or not Path(file).is_file():
        raise ValueError(
            f"--reward {reward!r}: give math, or FILE.py:FUNCTION of a file that exists"
        )
    folder = str(Path(file).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"--reward {reward!r}: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"--reward {reward!r}: importing {file} failed: {error!r}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"--reward {reward!r}: {file} has no function {name}")
    return function


def checked_reward(value: Any) -> float:
    """A reward as a float. Raises ValueError if it is not a finite number."""
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"a reward must be a finite number, not {value!r}")
    return float(value)


def check_reward(reward: str, row: dict) -> None:
    """Try a reward function on an empty response to one row of the data, in a worker.

    Raises ValueError that names the function if it cannot be imported, fails, hangs, or returns no
    finite number.
    """
    if reward == "math":
        return
    load_reward(reward)
    with Grader("none", workers=1, timeout=60.0, reward=reward) as grader:
        (verdict,) = grader.verdicts([""], [[]], [row])
    if verdict.failure:
        raise ValueError(
            f"--reward {reward!r} failed on an empty response to the first row: {verdict.failure}"
        )


# ---------------------------------------------------------------------------------- the grader

TIMEOUT = "timeout"  # the failure of a grading that ran too long
MIN_TASKS = 8  # fewer gradings than this do not tell whether the grader is broken
PATIENCE = 120.0  # seconds without any finished grading, after which all workers are replaced
WORKER_BYTES = 4 * 2**30  # memory a worker may take on top of what it has when it is ready

Pair = tuple[str, tuple[str, ...]]  # an extracted answer and the golds of its problem


@dataclass(frozen=True)
class Verdict:
    """What the grader says of one response."""

    reward: float
    correct: bool | None  # None: a reward function of one's own does not say
    failure: str | None = None  # TIMEOUT, or the text of an error; the reward is then 0
    graded: bool = True  # False: it has no answer, so no worker was asked


UNANSWERED = Verdict(0.0, False, graded=False)


class Grader:
    """Scores responses, in workers that it can kill. A context manager.

    template: a Template or a name in TEMPLATES; raises ValueError for an unknown name.
    workers: processes that grade. They start with the first batch, and each imports the main
        script again (as `__mp_main__`): keep the `if __name__ == "__main__"` there.
    timeout: seconds one grading may run; waiting for a free worker does not count.
    reward: "math" gives 1.0 for a right answer, else 0.0. "FILE.py:FUNCTION" gives what
        FUNCTION(response: str, row: dict) returns; equal responses to one row are graded once.
    graded, timeouts, errors: how many responses so far were scored; scored 0 because the grading
        ran too long; scored 0 because it failed or its worker died.
    """

    def __init__(
        self,
        template: Template | str,
        workers: int = 2,
        timeout: float = 5.0,
        reward: str = "math",
    ):
        if isinstance(template, str) and template not in TEMPLATES:
            raise ValueError(f"unknown template {template!r}; known: {', '.join(TEMPLATES)}")
        self.template = TEMPLATES[template] if isinstance(template, str) else template
        self.workers = workers
        self.timeout = timeout
        self.reward = reward
        self.graded = self.timeouts = self.errors = 0
        self.equal = answers_match  # decides whether an answer equals one of the golds
        self.open_pool()

    def start(self, responses: list[str], answers: list, rows: list[dict] | None = None) -> None:
        """Begin to grade what `grade` or `verdicts` will soon be asked for, and do not wait."""
        calls = self.calls(responses, answers, rows)
        with suppress(RuntimeError):  # a broken pool: `run` will open another one
            for key, call in calls:
                if key is not None and key not in self.begun:
                    self.begun[key] = self.schedule(call)

    def grade(
        self, responses: list[str], answers: list, rows: list[dict] | None = None
    ) -> list[float]:
        """The reward of each response.

        `answers` has the golds of each response's problem: a string, or a list of which any is
        right. `rows` has the dataset's rows, for a function of one's own. Raises ValueError if
        the lists differ in length, RuntimeError if most gradings fail.
        """
        verdicts = self.verdicts(responses, answers, rows)
        refuse_broken_reward(verdicts)
        return [verdict.reward for verdict in verdicts]

    def verdicts(
        self, responses: list[str], answers: list, rows: list[dict] | None = None
    ) -> list[Verdict]:
        """As `grade`, with all that is known of each response.

        Whether most gradings failed is for the caller to ask (`refuse_broken_reward`), who may
        know the verdicts of other ranks, too.
        """
        calls = self.calls(responses, answers, rows)
        results = self.run({key: call for key, call in calls if key is not None})
        verdicts = []
        for key, _ in calls:
            verdicts.append(UNANSWERED if key is None else self.verdict(results[key]))
        failures = [verdict.failure for verdict in verdicts if verdict.failure]
        self.graded += len(verdicts)
        self.timeouts += failures.count(TIMEOUT)
        self.errors += len(failures) - failures.count(TIMEOUT)
        return verdicts

    def compare(self, pairs: Iterable[Pair]) -> dict[Pair, bool | str]:
        """For each distinct pair of an answer and its golds True or False, TIMEOUT, or the text
        of an error. Not counted in `graded`, `timeouts` and `errors`."""
        return self.run({pair: (self.equal, *pair) for pair in pairs})

    def close(self) -> None:
        """End the workers."""
        self.pool.stop()
        self.pool.join()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # The rest is inside work.

    def calls(
        self, responses: list[str], answers: list, rows: list[dict] | None
    ) -> list[tuple[Hashable, tuple]]:
        """For each response a key and the call that grades it: (function, arguments...).

        Equal keys are graded once. The key is None where there is no answer to grade.
        """
        rows = [{}] * len(responses) if rows is None else rows
        if not len(responses) == len(answers) == len(rows):
            raise ValueError(
                f"{len(responses)} responses but {len(answers)} answers and {len(rows)} rows"
            )
        calls: list[tuple[Hashable, tuple]] = []
        for response, gold, row in zip(responses, answers, rows, strict=True):
            answer, golds = self.template.extract(response), tuple(gold_answers(gold))
            if self.reward != "math":
                # a row is a dict and no key, but its problem keeps it, so its id stays its own
                key = (response, id(row))
                calls.append((key, (own_reward, self.reward, response, row)))
            elif answer and golds:
                calls.append(((answer, golds), (self.equal, answer, golds)))
            else:
                calls.append((None, ()))
        return calls

    def verdict(self, result: bool | float | str) -> Verdict:
        """What the result of a call says of a response."""
        failure = result if isinstance(result, str) else None
        reward = 0.0 if isinstance(result, str) else float(result)
        correct = result is True if self.reward == "math" else None
        return Verdict(reward, correct, failure)

    def open_pool(self) -> None:
        self.begun: dict[Hashable, Future] = {}  # gradings that nobody has asked for yet
        CONSTS.term_timeout = 0.1  # seconds from pebble's SIGTERM to its SIGKILL
        context = multiprocessing.get_context("forkserver")  # fork copies the trainer's GPU state
        # Workers inherit what is blocked while their server starts. A run that is asked to stop
        # finishes its step, and needs them for it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, StopSignals.SIGNALS)
        context.set_forkserver_preload(PRELOADED)
        ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.pool = ProcessPool(
            self.workers, initializer=prepare_worker, initargs=(self.reward,), context=context
        )

    def schedule(self, call: tuple) -> Future:
        cpu_seconds = 3 * self.timeout
        return self.pool.schedule(run_call, args=(cpu_seconds, *call), timeout=self.timeout)

    def run(self, calls: dict[Hashable, tuple]) -> dict[Any, Any]:
        """The result of each call, TIMEOUT, or the text of an error."""
        try:
            return self.wait_for(calls)
        except RuntimeError:  # pebble's pool does not survive the death of an idle worker
            self.close()
            self.open_pool()
            return self.wait_for(calls)

    def wait_for(self, calls: dict[Hashable, tuple]) -> dict[Any, Any]:
        begun, self.begun = self.begun, {}
        futures = {key: begun.get(key) or self.schedule(call) for key, call in calls.items()}
        left = set(futures.values())
        while left:
            done, left = wait(left, timeout=PATIENCE)
            if not done:
                raise BrokenProcessPool(f"no grading finished within {PATIENCE} s")
        return {key: result_of(future) for key, future in futures.items()}


def refuse_broken_reward(verdicts: list[Verdict]) -> None:
    """Stop a run whose reward does not work: it would look like a policy that is always wrong.

    Raises RuntimeError with the first failure if more than half of the gradings timed out or
    failed, and there are enough of them to tell.
    """
    graded = [verdict for verdict in verdicts if verdict.graded]
    failures = [verdict.failure for verdict in graded if verdict.failure]
    if len(graded) >= MIN_TASKS and len(failures) > len(graded) / 2:
        raise RuntimeError(
            f"{len(failures)} of {len(graded)} gradings failed, so the reward means nothing. The "
            f"first: {failures[0]}"
        )


def result_of(future: Future) -> bool | float | str:
    try:
        return future.result()
    except TimeoutError:
        return TIMEOUT
    except ProcessExpired as error:
        if error.exitcode == -signal.SIGXCPU:  # the limit on CPU time was quicker than pebble
            return TIMEOUT
        return f"the worker died with exit code {error.exitcode}"


# ------------------------------------------------------------------------- inside a worker


def prepare_worker(reward: str) -> None:
    """Runs once in each worker, before the clock of any grading."""
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)  # in case it was inherited as ignored
    with suppress(TimeoutError):  # loading takes long on a busy machine
        answers_match("\\frac{1}{2}", "0.5")  # loads what math-verify loads at its first use
    if reward != "math":
        with suppress(ValueError):  # each grading will say what is wrong with it
            load_reward(reward)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit(resource.RLIMIT_AS, pages * resource.getpagesize() + WORKER_BYTES)


def run_call(cpu_seconds: float, function: Callable, *arguments: Any) -> bool | float | str:
    """One grading. The limit on CPU time ends a worker whose trainer is gone; a living trainer
    kills it earlier."""
    limit(resource.RLIMIT_CPU, int(time.process_time() + cpu_seconds) + 1)
    try:
        return function(*arguments)
    except TimeoutError:
        return TIMEOUT
    except BaseException as error:  # pebble would raise even SystemExit again, in the trainer
        return repr(error)[:300]


def own_reward(reward: str, response: str, row: dict) -> float:
    """What the function that `reward` names says of a response."""
    return checked_reward(load_reward(reward)(response, row))


def limit(kind: int, value: int) -> None:
    """Set a soft resource limit, but none above the hard limit."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
