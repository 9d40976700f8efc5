"""What several tests share and is made once: a toy model, a process group, an engine, workers."""

import importlib
import os
import sys
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

import drgrpo
from support.grader import Grader
from support.run import start_ranks
from tests.helpers import ROOT, TOY, tiny_model
from tests.runs import furnish
from toy import make_toy


@pytest.fixture(scope="session")
def toy():
    """The toy base model's folder, as the preset finds it."""
    os.chdir(ROOT)
    make_toy(ROOT / drgrpo.TOY)
    return ROOT / drgrpo.TOY


@pytest.fixture
def toy_here(toy, tmp_path):
    """A link to the toy in tmp_path, where a command of the preset looks for it."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "toy-base").symlink_to(toy)


@pytest.fixture(scope="session")
def ranks():
    """A process group of one, in which vLLM can start."""
    start_ranks()


@pytest.fixture(scope="session")
def base(ranks, toy, tmp_path_factory):
    """A tiny model with the toy's tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "base"
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    tiny_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared_engine(base):
    """For `engine` alone."""
    # the first thing a CUDA machine would do differently is to give the policy the GPU
    config = replace(TOY, model=str(base), max_prompt_tokens=300, max_response_tokens=20)
    policy = drgrpo.make_policy(config)
    sampler = drgrpo.Sampler(config.model, 320)
    yield sampler, policy, config
    sampler.close()


@pytest.fixture
def engine(shared_engine):
    """A sampler on a random model with tied embeddings, that model as a policy, and a config.

    Many tests share the two: whatever a test does to the weights is undone after it.
    """
    sampler, policy, config = shared_engine
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    try:
        yield sampler, policy, config
    finally:
        policy.reshard()  # a refused update did not
        policy.zero_grad()
        policy.load_state_dict(before)
        sampler.wake(policy)


@pytest.fixture
def here(base, tmp_path, monkeypatch):
    """The current folder, with what a run needs."""
    monkeypatch.chdir(tmp_path)
    return furnish(tmp_path, base)


@pytest.fixture(scope="session")
def grader():
    """Boxed answers, graded by two workers."""
    with Grader("qwen_math", timeout=30.0) as grader:
        yield grader


# Comparisons that misbehave, in a module of their own: workers import it, and it must be light.
HOSTILE = """
import collections, itertools, mmap, os, signal, sys, time
from support.answers import answers_match


def has_imported(answer: str, golds: tuple) -> bool:
    return answer in sys.modules


def hostile(answer: str, golds: tuple) -> bool:
    '''A comparison that does what a dangerous answer might make the real one do.'''
    if answer == "hang":
        collections.deque(itertools.count(), maxlen=0)  # in C: no signal handler ever runs
    if answer == "exit":
        os._exit(3)
    if answer == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if answer == "fill":
        blocks = []
        while len(blocks) < 64:  # 16 GiB, without touching them
            blocks.append(mmap.mmap(-1, 2**28))
        return True
    if answer == "leave":
        raise SystemExit(1)
    if answer.startswith("bug"):
        raise KeyError(answer)
    return answers_match(answer, golds)


def slow(answer: str, golds: tuple) -> bool:
    time.sleep(0.2)
    return True
"""


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    """A module of comparisons that misbehave."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "hostile_comparisons.py").write_text(HOSTILE)
    sys.path.append(str(folder))
    return importlib.import_module("hostile_comparisons")


# Reward functions of somebody's own. They import a file that stands beside theirs.
REWARDS = """
import asyncio, json, math, os, time
from fractions import Fraction
from beside import QUARTER


def note(response, row):
    with open(row["log"], "a") as out:
        out.write(json.dumps([os.getpid(), response, row]) + "\\n")
    return QUARTER


def short(response, row):
    # between -1 and 1, and 1 for saying nothing
    return 1 - min(len(response), 100) / 50


def obey(response, row):
    # does or returns what the response says; 1 if that is nothing special
    if response == "hang":
        time.sleep(1000)
    if response == "exit":
        os._exit(3)
    if response == "raise":
        raise KeyError("oops")
    odd = {"nan": math.nan, "infinity": math.inf, "text": "1", "nothing": None, "complex": 1j}
    odd |= {"list": [1.0], "half": Fraction(1, 2), "true": True, "negative": -3}
    return odd.get(response, 1.0)


async def obey_later(response, row):
    await asyncio.sleep(1000 if response == "hang" else 0.01)
    if response == "block":
        time.sleep(1000)
    return obey(response, row)


def on_the_first_row(response, row):
    return obey(row["problem"], row)


number = 5
"""


@pytest.fixture(scope="session")
def rewards(tmp_path_factory):
    """A file of reward functions, for --reward FILE.py:FUNCTION."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "beside.py").write_text("QUARTER = 0.25\n")
    (folder / "rewards.py").write_text(REWARDS)
    return folder / "rewards.py"
