"""The reward: does a response's answer equal the right one, or what does a function of yours say.

Equality is decided by sympy, which runs on text that a language model wrote. It may compute for
ever or fill the memory, and no code inside the same process can reliably stop it. So `Grader`
compares answers in worker processes that it can kill. A reward function of one's own
(`--reward FILE.py:FUNCTION`) runs there, too. A grading that is lost says nothing of the response:
its reward is nan, and it is counted.
"""

import asyncio
import functools
import importlib.util
import inspect
import math
import numbers
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

from pebble import ProcessExpired, ProcessPool
from pebble.common import CONSTS

from support.answers import answers_match, gold_answers
from templates import TEMPLATES, Template

TIMEOUT = "timeout"  # the failure of a grading that ran too long
MIN_TASKS = 8  # fewer gradings than this do not tell whether the grader is broken
WORKER_BYTES = 4 * 2**30  # memory a worker may take on top of what it has when it is ready
SLACK = 4  # of the two clocks of a grading, how much longer the one may run that is no limit
AWAITED_AT_ONCE = 64  # calls of an async reward function

Pair = tuple[str, tuple[str, ...]]  # an extracted answer and the golds of its problem


@dataclass(frozen=True)
class Verdict:
    """What the grader says of one response."""

    reward: float  # nan if the grading failed
    correct: bool | None  # None: it failed, or a reward function of one's own does not say
    failure: str | None = None  # TIMEOUT, or the text of an error
    graded: bool = True  # False: it has no answer, so no worker was asked


class Grader:
    """Scores responses, in workers that it can kill. A context manager.

    template: a Template or a name in TEMPLATES; raises ValueError for an unknown name.
    workers: processes that grade. They start with the first batch and do not import the trainer.
    timeout: seconds one grading may run: of processor time for comparing answers, so that a busy
        machine loses none; of the clock for a function of one's own. Waiting for a free worker does
        not count.
    reward: "math" gives 1.0 for a right answer, else 0.0. "FILE.py:FUNCTION" gives what
        FUNCTION(response: str, row: dict) returns; equal responses to one row are graded once. An
        `async def` is awaited for AWAITED_AT_ONCE responses at once, in one worker.
    graded, timeouts, errors: how many responses so far were scored; had no reward because the
        grading ran too long; had none because it failed or its worker died.
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

    def grade(
        self, responses: list[str], answers: list, rows: list[dict] | None = None
    ) -> list[float]:
        """The reward of each response, nan where the grading failed.

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
        rows = [{}] * len(responses) if rows is None else rows
        if not len(responses) == len(answers) == len(rows):
            raise ValueError(
                f"{len(responses)} responses but {len(answers)} answers and {len(rows)} rows"
            )
        verdicts = (
            self.math_verdicts(responses, answers)
            if self.reward == "math"
            else self.own_verdicts(responses, rows)
        )
        failures = [verdict.failure for verdict in verdicts if verdict.failure]
        self.graded += len(verdicts)
        self.timeouts += failures.count(TIMEOUT)
        self.errors += len(failures) - failures.count(TIMEOUT)
        return verdicts

    def math_verdicts(self, responses: list[str], answers: list) -> list[Verdict]:
        """Whether each response's answer equals one of its golds; equal pairs are compared once."""
        pairs: list[Pair] = []
        for response, gold in zip(responses, answers, strict=True):
            pairs.append((self.template.extract(response) or "", tuple(gold_answers(gold))))
        results = self.compare(pair for pair in pairs if all(pair))
        verdicts = []
        for pair in pairs:
            result = results.get(pair)
            if result is None:
                verdicts.append(Verdict(0.0, False, graded=False))
            elif isinstance(result, str):
                verdicts.append(Verdict(math.nan, None, result))
            else:
                verdicts.append(Verdict(float(result), result))
        return verdicts

    def compare(self, pairs: Iterable[Pair]) -> dict[Pair, bool | str]:
        """For each distinct pair of an answer and its golds True or False, TIMEOUT, or the text
        of an error."""
        limits = (self.timeout, SLACK * self.timeout)
        return self.run({pair: (*limits, self.equal, *pair) for pair in pairs})

    def own_verdicts(self, responses: list[str], rows: list[dict]) -> list[Verdict]:
        """What a reward function of one's own says. Equal responses to one row are graded once."""
        # A row is a dict and no key, but its problem keeps it, so its id stays its own
        keys = [(response, id(row)) for response, row in zip(responses, rows, strict=True)]
        tasks = dict(zip(keys, zip(responses, rows, strict=True), strict=True))
        if inspect.iscoroutinefunction(load_reward(self.reward)):
            together = list(tasks.values())
            seconds = self.timeout * (math.ceil(len(together) / AWAITED_AT_ONCE) + 1)
            limits = (SLACK * seconds, seconds)
            call = (*limits, await_rewards, self.reward, together, self.timeout)
            found = self.run({"all": call})["all"]
            failed = isinstance(found, str)  # the worker was killed, and all its calls with it
            results = dict(zip(tasks, [found] * len(tasks) if failed else found, strict=True))
        else:
            limits = (SLACK * self.timeout, self.timeout)
            calls = {}
            for key, task in tasks.items():
                calls[key] = (*limits, own_reward, self.reward, *task)
            results = self.run(calls)
        verdicts = []
        for key in keys:
            result = results[key]
            failure = result if isinstance(result, str) else None
            verdicts.append(Verdict(math.nan if failure else result, None, failure))
        return verdicts

    def close(self) -> None:
        """End the workers."""
        self.pool.stop()
        self.pool.join()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # The rest is inside work.

    def open_pool(self) -> None:
        CONSTS.term_timeout = 0.1  # seconds from pebble's SIGTERM to its SIGKILL
        context = WorkerContext()
        # Workers inherit what is blocked while their server starts. A run that is asked to stop
        # finishes its step, and needs them for it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        # What takes seconds to import, once before the workers are forked
        context.set_forkserver_preload(["latex2sympy2_extended"])
        ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.pool = ProcessPool(
            self.workers, initializer=prepare_worker, initargs=(self.reward,), context=context
        )

    def run(self, calls: dict) -> dict:
        """The result of each call, TIMEOUT, or the text of an error. A call is (seconds of the
        processor, seconds of the clock, function, arguments...)."""
        try:
            return self.wait_for(calls)
        except RuntimeError:  # pebble's pool does not survive the death of an idle worker
            self.close()
            self.open_pool()
            return self.wait_for(calls)

    def wait_for(self, calls: dict) -> dict:
        futures: dict[Hashable, Future] = {}
        for key, call in calls.items():
            cpu_seconds, seconds, *rest = call
            futures[key] = self.pool.schedule(run_call, args=(cpu_seconds, *rest), timeout=seconds)
        return {key: result_of(future) for key, future in futures.items()}


class WorkerProcess(ForkServerProcess):
    """A worker that does not import the main script: with torch that takes seconds and memory.

    multiprocessing tells a new process the main script's file, if it has one.
    """

    lock = threading.Lock()

    def start(self) -> None:
        main = sys.modules["__main__"]
        with self.lock:
            spec, file = main.__spec__, main.__dict__.pop("__file__", None)
            main.__spec__ = None
            try:
                super().start()
            finally:
                main.__spec__ = spec
                if file is not None:
                    main.__file__ = file


class WorkerContext(ForkServerContext):
    """forkserver, because fork copies the trainer's GPU state."""

    Process = WorkerProcess


def refuse_broken_reward(verdicts: list[Verdict]) -> None:
    """Stop a run whose reward does not work.

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


def result_of(future: Future) -> Any:
    try:
        return future.result()
    except TimeoutError:
        return TIMEOUT
    except ProcessExpired as error:
        if error.exitcode == -signal.SIGXCPU:  # the limit on processor time
            return TIMEOUT
        return f"the worker died with exit code {error.exitcode}"


# ------------------------------------------------------------------- a function of one's own


@functools.cache
def load_reward(reward: str) -> Callable[[str, dict], Any]:
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


def check_reward(reward: str, rows: list[dict]) -> None:
    """Try a reward function on an empty response to each of these rows, in a worker.

    Raises ValueError that names the function if it cannot be imported, fails, hangs, or returns no
    finite number.
    """
    if reward == "math":
        return
    load_reward(reward)
    with Grader("none", workers=1, timeout=60.0, reward=reward) as grader:
        verdicts = grader.verdicts([""] * len(rows), [[]] * len(rows), rows)
    for row, verdict in zip(rows, verdicts, strict=True):
        if verdict.failure:
            raise ValueError(
                f"--reward {reward!r} failed on an empty response to the row "
                f"{str(row)[:200]}: {verdict.failure}"
            )


# ------------------------------------------------------------------------- inside a worker


def prepare_worker(reward: str) -> None:
    """Runs once in each worker, before the clock of any grading."""
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)  # in case it was inherited as ignored
    with suppress(TimeoutError):  # loading takes long on a busy machine
        answers_match("\\frac{1}{2}", "0.5")  # loads what the parser loads at its first use
    if reward != "math":
        with suppress(ValueError):  # each grading will say what is wrong with it
            load_reward(reward)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit(resource.RLIMIT_AS, pages * resource.getpagesize() + WORKER_BYTES)


def run_call(cpu_seconds: float, function: Callable, *arguments: Any) -> Any:
    """One grading. The limit on processor time also ends a worker whose trainer is gone."""
    limit(resource.RLIMIT_CPU, int(time.process_time() + cpu_seconds) + 1)
    try:
        return function(*arguments)
    except TimeoutError:
        return TIMEOUT
    except BaseException:  # pebble would raise even SystemExit again, in the trainer
        return last_lines()


def last_lines() -> str:
    """The end of the traceback of the error that is being handled."""
    return "\n".join(traceback.format_exc().splitlines()[-4:]).strip()[-500:]


def own_reward(reward: str, response: str, row: dict) -> float:
    """What the function that `reward` names says of a response."""
    return checked_reward(load_reward(reward)(response, row))


def await_rewards(reward: str, tasks: list[tuple[str, dict]], timeout: float) -> list[float | str]:
    """What an async function says of each (response, row), many at once. TIMEOUT, or the text of an
    error, for those that failed."""
    function = load_reward(reward)
    free = asyncio.Semaphore(AWAITED_AT_ONCE)

    async def one(response: str, row: dict) -> float | str:
        async with free:
            try:
                return checked_reward(await asyncio.wait_for(function(response, row), timeout))
            except TimeoutError:
                return TIMEOUT
            except Exception:
                return last_lines()

    async def everyone() -> list[float | str]:
        return await asyncio.gather(*(one(*task) for task in tasks))

    return asyncio.run(everyone())


def checked_reward(value: Any) -> float:
    """A reward as a float. Raises ValueError if it is not a finite number."""
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"a reward must be a finite number, not {value!r}")
    return float(value)


def limit(kind: int, value: int) -> None:
    """Set a soft resource limit, but none above the hard limit."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
