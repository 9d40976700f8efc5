"""Facts about a run: it goes on after anything that stops it, and its folder tells no lies.

Most runs here have a tiny policy and random responses in place of an engine's.
"""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoTokenizer

import drgrpo
import support.checkpoint
import support.metrics
import support.run
from drgrpo import collate, full_weights, make_policy, micro_batches, update
from support.checkpoint import (
    FACTS,
    MANIFEST,
    StateKeeper,
    find_damage,
    newest_whole_state,
    saved_steps,
)
from support.data import Problem
from support.grader import Verdict
from support.metrics import RunLog, cut_file
from support.ranks import check_shared_folder
from support.run import MAY_CHANGE, check_run, fingerprints, is_finished
from templates import TEMPLATES
from tests.helpers import (
    ROOT,
    TOY,
    FakeSampler,
    launch,
    read_jsonl,
    some_rollouts,
    tiny_model,
    wait_until,
)

# ---------------------------------------------------------------- runs without an engine

PROBLEMS = [Problem(f"p{i}", [5, 6, i], [str(i % 3)], f"p{i}", {"i": i}) for i in range(6)]
HELD_OUT = [Problem(f"h{i}", [7, i], [str(i % 3)], f"h{i}", {"i": i}) for i in range(4)]


class QuickGrader:
    """Compares strings, without workers."""

    def __init__(self, template: str):
        self.template = TEMPLATES[template]

    def start(self, responses, answers, rows):
        pass

    def verdicts(self, responses, answers, rows):
        found = [self.template.extract(text) in gold for text, gold in zip(responses, answers)]
        return [Verdict(float(right), right) for right in found]

    def close(self):
        pass


def small(**settings):
    """A config of four short steps with two updates each, on the model in the folder `base`."""
    usual = dict(
        name="run",
        model="base",
        steps=4,
        prompts_per_step=4,
        samples_per_prompt=4,
        responses_per_update=8,
        max_response_tokens=12,
        eval_every=2,
        save_every=1,
        lr=1e-2,
    )
    return replace(TOY, **usual | settings)


def run_without_engine(change=lambda policy, sampler: None, **settings):
    """`drgrpo.train` in the current folder; `change` may first change the policy or the sampler.
    Returns the sampler."""
    made = []

    def start(config):
        check_shared_folder(config.folder)
        policy = make_policy(config)
        optimizer = torch.optim.AdamW(policy.parameters(), config.lr, (0.9, 0.95), fused=True)
        made.append(FakeSampler(policy))
        change(policy, made[0])
        return policy, optimizer, made[0], QuickGrader(config.template)

    config = small(**settings)
    with mock.patch.object(drgrpo, "start", start):
        tokenizer = AutoTokenizer.from_pretrained("base")
        drgrpo.train(config, tokenizer, PROBLEMS, HELD_OUT, {"too_long": 0})
    return made[0]


@pytest.fixture(scope="session")
def base(ranks, toy, tmp_path_factory):
    """A tiny model with the toy's tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "base"
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    tiny_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def here(base, tmp_path, monkeypatch):
    """An empty current folder, but for the model `base`."""
    (tmp_path / "base").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def unbroken(base, tmp_path_factory):
    """The folder of an unbroken run of four steps."""
    folder = tmp_path_factory.mktemp("unbroken")
    (folder / "base").symlink_to(base)
    before = os.getcwd()
    os.chdir(folder)
    run_without_engine()
    os.chdir(before)
    return folder / "runs" / "run"


def contents(folder):
    """What a run left, without times."""
    rows = []
    for row in read_jsonl(folder / "metrics.jsonl"):
        rows.append({key: value for key, value in row.items() if "seconds" not in key})
    weights = load_file(folder / "model" / "model.safetensors")
    return rows, read_jsonl(folder / "samples.jsonl"), weights


def assert_as(folder, other):
    """Two runs left the same, to the bit."""
    (rows, samples, weights), (others, other_samples, other_weights) = map(
        contents, (folder, other)
    )
    assert rows == others
    assert samples == other_samples
    assert weights.keys() == other_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, other_weights[name]), name


class Crash(BaseException):
    """As if the process had been killed."""


def crash_at(owner, name, call=1, done=False):
    """A patch by which the call of this number crashes, before it begins or when it is done."""
    function, calls = getattr(owner, name), []

    def crashing(*arguments, **settings):
        calls.append(name)
        if len(calls) == call and not done:
            raise Crash
        result = function(*arguments, **settings)
        if len(calls) == call:
            raise Crash
        return result

    return mock.patch.object(owner, name, crashing)


def crash(patch, **settings):
    """A run that crashes."""
    keepers = []

    class Noted(StateKeeper):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            keepers.append(self)

    with patch, mock.patch.object(support.run, "StateKeeper", Noted), pytest.raises(Crash):
        run_without_engine(**settings)
    for keeper in keepers:  # a thread does not outlive a killed process
        keeper.thread.shutdown()


# ------------------------------------------------------------------------------ states


class Learner:
    """A policy and its optimizer, which can make an update and be compared."""

    def __init__(self, folder):
        self.config = replace(TOY, model=str(folder), max_gap=100.0, responses_per_update=32)
        self.policy = make_policy(self.config)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), 1e-2, fused=True)

    def learn(self, seed):
        mine = micro_batches(
            some_rollouts(seed=seed), 10**6, dist.get_rank(), dist.get_world_size()
        )
        update(self.policy, self.optimizer, [[collate(rows) for rows in mine]], self.config)
        return self

    def keeper(self, folder="state"):
        return StateKeeper(Path(folder), self.policy, self.optimizer)

    def values(self):
        """Weights and Adam's state, a copy."""
        found = {name: w.clone() for name, w in full_weights(self.policy.model, torch.float32)}
        for place, state in self.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                whole = value.full_tensor() if hasattr(value, "full_tensor") else value
                found[f"{place}.{key}"] = whole.clone()
        return found


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def save(keeper, step, facts=None):
    keeper.save(step, facts or {})
    keeper.wait()


@pytest.fixture
def states(here):
    """Two states in the folder `state`; returns the learner, its keeper, and values by step."""
    learner = Learner("base")
    keeper, values = learner.keeper(), {}
    for step in (1, 2):
        learner.learn(step)
        save(keeper, step, {"step": step})
        values[step] = learner.values()
    return learner, keeper, values


def test_a_state_restores_weights_and_adam_to_the_bit_and_so_the_next_update(states):
    learner, _, values = states
    after = learner.learn(3).values()
    again = Learner("base")
    again.keeper().load(2)
    assert same(again.values(), values[2])
    assert any(key.endswith("exp_avg_sq") for key in values[2])
    assert not same(after, values[2])
    assert same(again.learn(3).values(), after)


def test_the_newest_state_is_found_with_its_facts(states):
    assert newest_whole_state(Path("state")) == (2, {"step": 2})
    assert newest_whole_state(Path("nothing")) is None


def test_a_state_without_a_manifest_is_none(states):
    Path("state", "2", MANIFEST).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an unfinished save is no damage
        assert newest_whole_state(Path("state"))[0] == 1
        Path("state", "1", MANIFEST).unlink()
        assert newest_whole_state(Path("state")) is None


def test_the_last_two_states_are_kept(states):
    _, keeper, _ = states
    for step in (9, 10):
        save(keeper, step)
        assert len(saved_steps(Path("state"))) == 2
    assert sorted(os.listdir("state")) == ["10", "9"]


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file):
    os.truncate(file, file.stat().st_size - 1)


DAMAGE = {
    "a flipped bit": (flip_a_bit, "__0_0.distcp", "is not what was written"),
    "a cut file": (cut, "__0_0.distcp", "bytes, not"),
    "a missing file": (Path.unlink, "__0_0.distcp", "is missing"),
    "missing metadata": (Path.unlink, ".metadata", "is missing"),
    "missing facts": (Path.unlink, FACTS, "is missing"),
    "a cut manifest": (cut, MANIFEST, "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_named_and_the_older_one_is_used(states, damage):
    do, file, message = DAMAGE[damage]
    do(Path("state", "2", file))
    with pytest.warns(match=f"state/2 is damaged: {file} .*{message}"):
        assert newest_whole_state(Path("state")) == (1, {"step": 1})
    assert find_damage(Path("state", "1")) is None
    do(Path("state", "1", file))
    with (
        pytest.warns(match="state/1 is damaged"),
        pytest.raises(ValueError, match="every state in state is damaged: remove"),
    ):
        newest_whole_state(Path("state"))


def test_a_damaged_state_is_not_counted_among_the_two_that_are_kept(states):
    """Else what is saved next would be removed at once, and the only whole one with it."""
    learner, _, _ = states
    cut(Path("state", "2", "__0_0.distcp"))
    for step in "89":
        shutil.copytree("state/2", f"state/{step}")
    with pytest.warns(match="damaged"):
        assert newest_whole_state(Path("state"))[0] == 1
    keeper = learner.keeper()  # of a run that goes on
    keeper.load(1)
    for step in (2, 3):
        save(keeper, step)
        assert saved_steps(Path("state")) == [step, step - 1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert newest_whole_state(Path("state"))[0] == step


class CrashAt:
    """Lets the file operation with this number crash, before it begins or when it is done.

    A folder that is being removed is then half removed.
    """

    operations = (
        (os, "replace"),
        (os, "fsync"),
        (shutil, "rmtree"),
        (Path, "rename"),
        (Path, "unlink"),
        (Path, "mkdir"),
        (json, "dump"),
        (dcp, "save"),
    )

    def __init__(self, monkeypatch, number, begun):
        self.left, self.begun = number, begun
        for owner, name in self.operations:
            monkeypatch.setattr(owner, name, self.wrap(name, getattr(owner, name)))

    def wrap(self, name, operation):
        def wrapped(first, *arguments, **settings):
            self.left -= 1
            if self.left == 0:
                if self.begun and name == "rmtree":
                    for file in list(Path(first).glob("*.distcp")):
                        os.remove(file)
                elif self.begun:
                    operation(first, *arguments, **settings)
                raise Crash
            return operation(first, *arguments, **settings)

        return wrapped


@pytest.mark.parametrize("begun", [False, True])
def test_whenever_the_machine_stops_there_is_a_whole_state_or_none(here, begun):
    learner, values, crashes = Learner("base"), {}, 0
    for step in (1, 2, 3):
        values[step] = learner.learn(step).values()
        found = newest_whole_state(Path("state"))
        before = found[0] if found else None
        for number in range(1, 100):
            keeper = learner.keeper()
            with pytest.MonkeyPatch.context() as monkeypatch:
                CrashAt(monkeypatch, number, begun)
                try:
                    keeper.save(step, {"step": step})
                    keeper.saving.result()
                    break
                except (Crash, CheckpointException):  # the latter from inside DCP
                    crashes += 1
                finally:
                    keeper.thread.shutdown()
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # nothing half done looks like damage
                found = newest_whole_state(Path("state"))
            assert (found[0] if found else None) in (before, step), f"step {step}, {number}"
            if found:
                again = Learner("base")
                again.keeper().load(found[0])
                assert found[1] == {"step": found[0]}
                assert same(again.values(), values[found[0]])
        assert newest_whole_state(Path("state"))[0] == step
    assert crashes > 20


def test_what_else_lies_beside_the_states_is_left_alone(states):
    """Somebody's copy of a state, or what a file system keeps there."""
    _, keeper, _ = states
    shutil.copytree("state/1", "state/1-copy")
    Path("state/.nfs0001").write_text("")
    save(keeper, 3)
    assert keeper.failed == 0
    assert sorted(os.listdir("state")) == [".nfs0001", "1-copy", "2", "3"]
    assert newest_whole_state(Path("state"))[0] == 3


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("a rank does not answer"),
    CheckpointException("save", {0: (OSError(errno.EIO, "Input/output error"), None)}),
], ids=["OSError", "RuntimeError", "CheckpointException"])  # fmt: skip
def test_a_failed_save_leaves_nothing_that_fills_the_disk(states, monkeypatch, error):
    """Else there would be no room for the next one, nor for the records."""
    _, keeper, _ = states
    works = dcp.save

    def half(*arguments, **settings):
        works(*arguments, **settings)
        raise error

    monkeypatch.setattr(dcp, "save", half)
    with pytest.warns(match="could not be saved in state: .*(No space|not answer|Input/output)"):
        save(keeper, 3)
    assert keeper.failed == 1
    assert sorted(os.listdir("state")) == ["1", "2"]


def test_what_a_killed_save_or_removal_left_is_removed_by_the_next_save(states):
    """At 7B a state is 84 GB: nobody would look for it there."""
    _, keeper, _ = states
    shutil.copytree("state/2", "state/0")
    Path("state/0", MANIFEST).unlink()
    save(keeper, 3)
    assert sorted(os.listdir("state")) == ["2", "3"]


def test_the_manifest_is_the_last_to_come_and_the_first_to_go(states, monkeypatch):
    _, keeper, _ = states
    seen = []

    def noting(name, operation):
        def noted(first, *arguments, **settings):
            manifests = {path.parent.name for path in Path("state").glob(f"*/{MANIFEST}")}
            seen.append((name, str(first), manifests))
            return operation(first, *arguments, **settings)

        return noted

    monkeypatch.setattr(shutil, "rmtree", noting("rmtree", shutil.rmtree))
    monkeypatch.setattr(dcp, "save", noting("save", dcp.save))
    save(keeper, 3)
    save(keeper, 3)  # the same step again
    names = [name for name, _, _ in seen]
    assert names == ["save", "rmtree", "rmtree", "save"]
    assert "3" not in seen[0][2], "written before its manifest"
    assert seen[1][1] == "state/1" and "1" not in seen[1][2], "removed after its manifest"
    assert "3" not in seen[2][2] and "3" not in seen[3][2]


def test_all_ranks_write_after_rank_0_has_made_the_folder(states, monkeypatch):
    _, keeper, _ = states
    seen, works, on_rank_0 = [], dcp.save, keeper.on_rank_0

    def all_know(*call):
        on_rank_0(*call)
        state = Path("state", "3")
        seen.append(("all know", (state / FACTS).exists(), (state / MANIFEST).exists()))

    def noted(*arguments, **settings):
        seen.append("save")
        works(*arguments, **settings)

    monkeypatch.setattr(keeper, "on_rank_0", all_know)
    monkeypatch.setattr(dcp, "save", noted)
    save(keeper, 3)
    assert seen == [("all know", True, False), "save", ("all know", True, True)]


def test_a_rank_raises_what_rank_0_could_not_write(states, monkeypatch):
    _, keeper, _ = states
    full = OSError(errno.ENOSPC, "No space left on device")

    def broadcast(failure, src, group):
        assert failure == [None], "this is another rank"
        assert src == 0 and group is keeper.group, "not the one of the step"
        failure[0] = full

    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    never = mock.Mock(side_effect=AssertionError("rank 0 alone writes"))
    with pytest.raises(OSError, match="No space left"):
        keeper.on_rank_0(never)


def test_a_failed_save_warns_and_is_counted_and_the_second_in_a_row_raises(states, monkeypatch):
    _, keeper, _ = states
    works, full = support.checkpoint.write_json, OSError(errno.ENOSPC, "No space left on device")
    assert keeper.failed == 0
    for _ in range(2):
        monkeypatch.setattr(support.checkpoint, "write_json", mock.Mock(side_effect=full))
        with pytest.warns(match=r"in state: .*No space left.* \([\d.,]+ GB are free.*are kept"):
            save(keeper, 3)
        assert keeper.failed == 1
        assert newest_whole_state(Path("state"))[0] == 2
        monkeypatch.setattr(support.checkpoint, "write_json", works)
        save(keeper, 2)  # a save that works begins the count again
        assert keeper.failed == 0
    monkeypatch.setattr(support.checkpoint, "write_json", mock.Mock(side_effect=full))
    with pytest.warns(match="could not be saved"):
        save(keeper, 3)
    with pytest.raises(RuntimeError, match="twice in a row, .*No space left"):
        save(keeper, 4)
    monkeypatch.setattr(support.checkpoint, "write_json", works)
    assert newest_whole_state(Path("state"))[0] == 2


@pytest.mark.parametrize("obstacle", ["a file in place of the folder", "dcp"])
def test_a_save_that_cannot_write_is_a_failed_save(here, obstacle, monkeypatch):
    """The first stands for a read-only folder, which root would be allowed to write to."""
    keeper = Learner("base").learn(1).keeper()
    if obstacle == "dcp":
        full = OSError(errno.ENOSPC, "No space left on device")
        writer = "torch.distributed.checkpoint.FileSystemWriter.write_data"
        monkeypatch.setattr(writer, mock.Mock(side_effect=full))
    else:
        Path("state").write_text("")
    with pytest.warns(match="could not be saved in state") as seen:
        save(keeper, 1)
    assert "Traceback" not in str(seen[0].message), "one line that says why"
    assert keeper.failed == 1 and saved_steps(Path("state")) == []


def test_the_next_save_tells_that_the_one_before_it_failed(states, monkeypatch):
    _, keeper, _ = states
    works, full = dcp.save, OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(dcp, "save", mock.Mock(side_effect=full))
    keeper.save(3, {})
    assert keeper.saving.exception(60) is full
    monkeypatch.setattr(dcp, "save", works)
    with pytest.warns(match="No space left"):
        keeper.save(4, {})
    keeper.wait()
    assert saved_steps(Path("state")) == [4, 2]


def test_what_is_saved_are_the_values_of_the_moment_of_save(states, monkeypatch):
    learner, keeper, _ = states
    go, works = threading.Event(), dcp.save

    def wait_and_save(*arguments, **settings):
        assert go.wait(60)
        works(*arguments, **settings)

    monkeypatch.setattr(dcp, "save", wait_and_save)
    before = learner.learn(3).values()
    keeper.save(3, {})
    after = learner.learn(4).values()
    go.set()
    keeper.wait()
    assert not same(before, after)
    keeper.load(3)
    assert same(learner.values(), before)


def test_one_save_is_under_way_at_a_time(states, monkeypatch):
    _, keeper, _ = states
    running, most, works = [], [], dcp.save

    def noted(*arguments, **settings):
        running.append(1)
        most.append(len(running))
        works(*arguments, **settings)
        running.pop()

    monkeypatch.setattr(dcp, "save", noted)
    for step in (3, 4, 5):
        keeper.save(step, {})
    keeper.close()
    assert most == [1, 1, 1] and saved_steps(Path("state")) == [5, 4]


# ------------------------------------------------------------------- runs that go on


PHASES = {
    "the start": lambda: crash_at(drgrpo, "train_step"),
    "sampling, before the first state": lambda: crash_at(drgrpo, "sample", 2),
    "sampling": lambda: crash_at(drgrpo, "sample", 5),
    "grading": lambda: crash_at(drgrpo, "score", 4),
    "the middle of a round's updates": lambda: crash_at(torch.nn.utils, "clip_grad_norm_", 6),
    "the end of an update": lambda: crash_at(drgrpo, "update", 3, done=True),
    "sync": lambda: crash_at(FakeSampler, "wake", 2),
    "evaluation": lambda: crash_at(drgrpo, "score_held_out", 2),
    "the last evaluation": lambda: crash_at(drgrpo, "score_held_out", 3),
    "the first export": lambda: crash_at(support.run, "save_model", 1),
    "after the last export": lambda: crash_at(support.run, "save_model", 2, done=True),
    "the first save": lambda: crash_at(StateKeeper, "write"),
    "a save": lambda: crash_at(dcp, "save", 3),
    "the end of a save": lambda: crash_at(StateKeeper, "write", 3, done=True),
    "the records": lambda: crash_at(support.metrics, "append_rows", 4, done=True),
    "the end": lambda: crash_at(RunLog, "finish"),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_that_was_killed_ends_as_the_unbroken_one(here, unbroken, phase):
    crash(PHASES[phase]())
    assert not is_finished(small())
    sampler = run_without_engine()
    assert_as(Path("runs/run"), unbroken)
    assert is_finished(small())
    assert (sampler.calls.count("sample") < 7) == (
        phase not in ("the start", "sampling, before the first state", "the first save")
    ), "it went on from a state, if there was one"


def test_a_run_that_is_killed_at_every_step_ends_as_the_unbroken_one(here, unbroken):
    for _ in range(3):
        crash(crash_at(drgrpo, "update", 2))
    run_without_engine()
    assert_as(Path("runs/run"), unbroken)


def test_a_run_goes_on_to_more_steps_as_if_it_had_had_them_from_the_start(here, unbroken):
    run_without_engine(steps=2, save_every=100)
    assert saved_steps(Path("runs/run/state")) == [2], "the last one is always saved"
    assert is_finished(small(steps=2)) and not is_finished(small())
    run_without_engine()
    assert_as(Path("runs/run"), unbroken)


def weights_of(policy):
    return {name: weight.clone() for name, weight in full_weights(policy.model, torch.float32)}


def test_after_a_resume_the_weights_go_to_the_engine_before_the_first_sampling(here):
    """Else the first evaluation and step would be the base model's."""
    crash(crash_at(drgrpo, "update", 3))
    seen = {}

    def change(policy, sampler):
        wake = sampler.wake

        def noting_wake(policy):
            seen.setdefault("woken with", weights_of(policy))
            wake(policy)

        sampler.wake = noting_wake
        seen["at the start"] = weights_of(policy)

    sampler = run_without_engine(change)
    assert sampler.calls[:3] == ["sleep", "wake", "sample"]
    assert not same(seen["woken with"], seen["at the start"])
    fresh = run_without_engine(name="fresh")
    assert fresh.calls[0] == "sample", "a new run has the base model's weights in the engine"


def test_there_is_no_state_before_the_first_update(here):
    """Loading one into a fresh Adam would advance its step."""
    crash(crash_at(drgrpo, "update", 1))
    assert saved_steps(Path("runs/run/state")) == []
    crash(crash_at(drgrpo, "update", 2))
    assert saved_steps(Path("runs/run/state")) == [1]


def stop_in(name, number, call=1):
    """A patch by which this process gets a signal in the call of this number."""
    function, calls = getattr(drgrpo, name), []

    def stopping(*arguments, **settings):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return function(*arguments, **settings)

    return mock.patch.object(drgrpo, name, stopping)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_run_that_is_asked_to_stop_finishes_its_step_saves_and_says_requeue(
    here, unbroken, number, capsys
):
    before = signal.getsignal(number)
    with stop_in("sample", number, call=3), pytest.raises(SystemExit) as stopped:
        run_without_engine(save_every=100)
    assert stopped.value.code == 75
    assert "The same command goes on" in capsys.readouterr().out
    folder = Path("runs/run")
    assert (folder / "requeue").exists() and not is_finished(small())
    assert saved_steps(folder / "state") == [2], "steps 0 and 1 are done"
    assert signal.getsignal(number) is before
    run_without_engine()
    assert not (folder / "requeue").exists()
    assert_as(folder, unbroken)


def test_a_run_that_is_asked_to_stop_in_its_last_step_makes_what_is_left(here, unbroken):
    with stop_in("update", signal.SIGTERM, call=4), pytest.raises(SystemExit) as stopped:
        run_without_engine()
    assert stopped.value.code == 75 and not is_finished(small())
    run_without_engine()
    assert_as(Path("runs/run"), unbroken)


def test_a_signal_in_the_last_evaluation_finishes_the_run(here, unbroken):
    with stop_in("score_held_out", signal.SIGTERM, call=3):
        run_without_engine()
    assert is_finished(small()) and not Path("runs/run/requeue").exists()
    assert_as(Path("runs/run"), unbroken)


def test_a_run_ends_its_grader_and_its_engine(here):
    with mock.patch.object(QuickGrader, "close") as closed:
        assert run_without_engine(steps=1, save_every=2).calls[-1] == "close"
    assert closed.call_count == 1
    assert saved_steps(Path("runs/run/state")) == [1], "none of a step that was not made"


def test_an_error_does_not_ask_to_be_requeued(here):
    with (
        mock.patch.object(drgrpo, "update", mock.Mock(side_effect=RuntimeError("broken."))),
        pytest.raises(RuntimeError, match="step 0: broken. Its responses are in"),
    ):
        run_without_engine()
    assert not Path("runs/run/requeue").exists()


def test_a_stop_whose_state_could_not_be_saved_does_not_say_that_it_was(here, capsys):
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        stop_in("sample", signal.SIGTERM, call=2),
        mock.patch.object(dcp, "save", mock.Mock(side_effect=full)),
        pytest.raises(SystemExit),
        pytest.warns(match="No space left"),
    ):
        run_without_engine()
    assert "stopped and saved" not in capsys.readouterr().out


def test_a_full_disk_costs_two_saves_and_then_the_run_but_no_state(here, unbroken):
    crash(crash_at(drgrpo, "update", 3))
    assert saved_steps(Path("runs/run/state")) == [2, 1]
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        mock.patch.object(dcp, "save", mock.Mock(side_effect=full)),
        pytest.warns(match="No space left"),
        pytest.raises(RuntimeError, match="twice in a row"),
    ):
        run_without_engine(steps=8)
    assert read_jsonl(Path("runs/run/metrics.jsonl"))[-1]["failed_saves"] == 1
    run_without_engine()
    assert_as(Path("runs/run"), unbroken)


def test_a_run_with_a_damaged_state_goes_on_from_the_older_one(here, unbroken):
    crash(crash_at(drgrpo, "update", 4))
    flip_a_bit(Path("runs/run/state/3/__0_0.distcp"))
    with pytest.warns(match="state/3 is damaged"):
        run_without_engine()
    assert_as(Path("runs/run"), unbroken)


# ------------------------------------------------------------------------- records


def test_records_are_cut_to_what_they_were_when_the_state_was_saved(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("one\ntwo\nhalf")
    cut_file(file, 4)
    assert file.read_text() == "one\n"
    with pytest.raises(ValueError, match="metrics.jsonl has 4 bytes, .* it had 8: put it back, or"):
        cut_file(file, 8)
    assert file.read_text() == "one\n"
    cut_file(tmp_path / "new", 0)
    assert (tmp_path / "new").read_bytes() == b""


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_records_that_lack_what_the_state_has_are_an_error(here, name):
    crash(crash_at(drgrpo, "update", 3))
    file = Path("runs/run", name)
    file.write_text(file.read_text()[:10])
    with pytest.raises(ValueError, match=f"{name} has 10 bytes.*put it back"):
        run_without_engine()


def test_a_line_that_was_cut_off_by_a_kill_is_gone_after_a_resume(here, unbroken):
    crash(crash_at(drgrpo, "update", 3))
    for name in ("metrics.jsonl", "samples.jsonl"):
        with Path("runs/run", name).open("a") as file:
            file.write('{"step": 2, "rew')
    run_without_engine()
    assert_as(Path("runs/run"), unbroken)


def test_a_run_killed_before_its_first_state_leaves_nothing_of_its_first_try(here, unbroken):
    crash(crash_at(drgrpo, "update", 2), save_every=4)
    assert len(read_jsonl(Path("runs/run/metrics.jsonl"))) == 1
    assert saved_steps(Path("runs/run/state")) == []
    run_without_engine(save_every=4)
    assert_as(Path("runs/run"), unbroken)


def test_the_records_of_a_finished_run_are_never_cut_because_its_states_are_gone(here):
    """Whoever removes the states to save disk keeps the results."""
    run_without_engine(steps=2)
    before = contents(Path("runs/run"))[0]
    shutil.rmtree("runs/run/state")
    with pytest.raises(ValueError, match="state"):
        check_run(small(), fingerprints(small(), PROBLEMS, HELD_OUT))
        run_without_engine()
    assert contents(Path("runs/run"))[0] == before


def fake_trackers(monkeypatch):
    """TensorBoard and W&B that note what they are given."""
    wandb, board = ModuleType("wandb"), ModuleType("torch.utils.tensorboard")
    wandb.init = mock.Mock()
    board.SummaryWriter = mock.Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    return wandb.init, board.SummaryWriter


def test_trackers_go_on_where_the_run_does(here, monkeypatch):
    init, writer = fake_trackers(monkeypatch)
    crash(crash_at(drgrpo, "update", 3), track="wandb")
    run_without_engine(track="wandb")
    (first, second) = init.call_args_list
    assert first.kwargs["id"] == second.kwargs["id"] and second.kwargs["resume"] == "allow"
    first, second = writer.call_args_list
    assert not first.kwargs["purge_step"] and second.kwargs["purge_step"] == 2
    run_without_engine(track="wandb", name="other")
    assert init.call_args.kwargs["id"] != second.kwargs.get("id")
    assert init.call_args_list[0].kwargs["id"] != init.call_args.kwargs["id"]


def test_a_tracker_forgets_the_points_of_a_run_that_starts_anew(here, monkeypatch):
    """Killed before its first state: its steps are made again, from 0."""
    _, writer = fake_trackers(monkeypatch)
    crash(crash_at(drgrpo, "update", 2), save_every=4, track="tensorboard")
    run_without_engine(save_every=4, track="tensorboard")
    assert writer.call_args.kwargs["purge_step"] == 0


# ---------------------------------------------------------- what may go on, and what may not


@pytest.fixture(scope="session")
def finished(unbroken):
    """What belongs to the unbroken run: (folder with `runs`, fingerprints)."""
    before = os.getcwd()
    os.chdir(unbroken.parents[1])
    prints = fingerprints(small(), PROBLEMS, HELD_OUT)
    os.chdir(before)
    return unbroken.parents[1], prints


OTHER = {
    "model": "other",
    "dataset": "other.jsonl",
    "subset": "other",
    "split": "other",
    "problem_column": "other",
    "answer_column": "other",
    "answer_marker": "####",
    "levels": (3,),
    "template": "r1",
    "reward": "file.py:f",
    "truncated_reward": -1.0,
    "eval_dataset": None,
    "eval_split": "other",
    "seed": 1,
    "prompts_per_step": 6,
    "samples_per_prompt": 2,
    "responses_per_update": 16,
    "max_prompt_tokens": 65,
    "max_response_tokens": 13,
    "temperature": 0.9,
    "lr": 1e-3,
    "clip_eps": 0.1,
    "max_grad_norm": 2.0,
    "tis_cap": None,
    "divide_by_std": True,
    "divide_by_length": True,
    "dtype": "bfloat16",
}
MAY = {
    "steps": 5,
    "save_every": None,
    "eval_every": 3,
    "track": "tensorboard",
    "grader_workers": 7,
    "grader_timeout": 1.0,
    "max_gap": 1.0,
    "tokens_per_microbatch": 999,
    "activation_checkpointing": True,
    "offload": True,
    "compile": True,
}


def test_every_setting_is_known_to_be_free_or_fixed():
    assert set(MAY) == set(MAY_CHANGE)
    # a name makes another folder, and top_p has one value
    assert set(MAY) | set(OTHER) | {"name", "top_p"} == {field.name for field in fields(TOY)}


@pytest.mark.parametrize("key", OTHER)
def test_a_run_does_not_go_on_with_another_setting(finished, monkeypatch, key):
    folder, prints = finished
    monkeypatch.chdir(folder)
    before = asdict(small())[key]
    value = list(OTHER[key]) if isinstance(OTHER[key], tuple) else OTHER[key]
    before = list(before) if isinstance(before, tuple) else before
    with pytest.raises(ValueError) as refused:
        check_run(small(**{key: OTHER[key]}), prints)
    assert f"runs/run holds another run: {key} was {before!r} and is {value!r}. Give what was" in (
        str(refused.value)
    )


@pytest.mark.parametrize("key", MAY)
def test_a_run_may_go_on_with_another(finished, monkeypatch, key):
    folder, prints = finished
    monkeypatch.chdir(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_run(small(**{key: MAY[key]}), prints)


def test_all_that_differs_is_listed_at_once(finished, monkeypatch):
    folder, prints = finished
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="lr was .*; seed was|seed was .*; lr was"):
        check_run(small(lr=1e-3, seed=1), prints)


def test_fewer_steps_than_there_are_are_refused(finished, monkeypatch):
    folder, prints = finished
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="has 4 steps already, and steps is 3"):
        check_run(small(steps=3), prints)


@pytest.mark.parametrize("key", ["problems", "model"])
def test_a_run_does_not_go_on_with_other_problems_or_another_base_model(finished, monkeypatch, key):
    folder, prints = finished
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=f"the {key} are others: sha256 .* before, 123 now"):
        check_run(small(), prints | {key: "123"})


@pytest.mark.parametrize("key", ["code", "reward"])
def test_other_code_is_a_warning_and_on_a_finished_run_an_error(finished, monkeypatch, key):
    folder, prints = finished
    monkeypatch.chdir(folder)
    with pytest.warns(match=f"the {key} changed since runs/run was started"):
        check_run(small(steps=5), prints | {key: "123"})
    with pytest.raises(ValueError, match=f"finished, but the {key} changed .*Remove or rename"):
        check_run(small(), prints | {key: "123"})


def test_fingerprints_tell_problems_models_and_rewards_apart(here, rewards):
    prints = fingerprints(small(), PROBLEMS, HELD_OUT)
    assert prints == fingerprints(small(), list(PROBLEMS), HELD_OUT)
    other = [replace(PROBLEMS[0], answers=["7"]), *PROBLEMS[1:]]
    for problems, held_out in (
        (other, HELD_OUT),
        (PROBLEMS, HELD_OUT[1:]),
        (PROBLEMS[::-1], HELD_OUT),
    ):
        found = fingerprints(small(), problems, held_out)
        assert {key for key in prints if prints[key] != found[key]} == {"problems"}
    found = fingerprints(small(reward=f"{rewards}:short"), PROBLEMS, HELD_OUT)
    assert {key for key in prints if prints[key] != found[key]} == {"reward"}
    tiny_model(99).save_pretrained("other")
    found = fingerprints(small(model="other"), PROBLEMS, HELD_OUT)
    assert {key for key in prints if prints[key] != found[key]} == {"model"}


def test_a_folder_of_an_older_version_is_refused_with_what_to_do(here):
    """Its config.json had the settings themselves."""
    Path("runs/run").mkdir(parents=True)
    Path("runs/run/config.json").write_text(json.dumps(asdict(small())))
    Path("runs/run/metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="remove it|remove the folder|choose a --name"):
        check_run(small(), fingerprints(small(), PROBLEMS, HELD_OUT))


def test_records_without_a_config_are_refused(here):
    Path("runs/run").mkdir(parents=True)
    Path("runs/run/metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="holds a run without config.json: remove it"):
        check_run(small(), {})


def test_a_folder_that_cannot_be_written_to_is_refused_before_a_model_loads(here, monkeypatch):
    for part, value in {
        "load_data": (None, PROBLEMS, HELD_OUT, {}),
        "check_reward": None,
        "check_model": None,
        "fingerprints": {},
    }.items():
        monkeypatch.setattr(support.run, part, mock.Mock(return_value=value))
    Path("runs").mkdir()
    support.run.prepare(small())
    read_only = Path("runs")
    monkeypatch.setattr(os, "access", lambda path, mode: path != read_only and mode == os.W_OK)
    with pytest.raises(ValueError, match="runs cannot be written to, and runs/run would hold"):
        support.run.prepare(small())
    support.run.check_model.assert_called_once()
    monkeypatch.setattr(support.run, "is_finished", lambda config: True)
    support.run.prepare(small())  # will only say so


def test_a_finished_run_says_so_and_ends_well(finished, monkeypatch, capsys):
    folder, _ = finished
    monkeypatch.chdir(folder)
    monkeypatch.setattr(drgrpo, "make_toy", lambda folder: None)
    monkeypatch.setattr(drgrpo, "prepare", lambda config: (None, [], [], {}))
    trained = []
    monkeypatch.setattr(drgrpo, "train", lambda config, *prepared: trained.append(config.steps))
    for steps in ("4", "5"):
        monkeypatch.setattr(sys, "argv", ["drgrpo.py", "toy", "--name", "run", "--steps", steps])
        drgrpo.main()
    assert capsys.readouterr().out == "runs/run is finished: 4 steps. --steps N goes on with it.\n"
    assert trained == [5]


def test_what_the_run_refuses_is_an_error_without_a_traceback(finished, monkeypatch):
    folder, _ = finished
    monkeypatch.chdir(folder)
    monkeypatch.setattr(drgrpo, "make_toy", lambda folder: None)
    monkeypatch.setattr(drgrpo, "prepare", mock.Mock(side_effect=ValueError("another run")))
    monkeypatch.setattr(sys, "argv", ["drgrpo.py", "toy", "--name", "run"])
    with pytest.raises(SystemExit) as ended:
        drgrpo.main()
    assert ended.value.code == "error: another run"


def test_a_saved_model_has_a_card_with_what_made_it_and_what_it_scores(unbroken, monkeypatch):
    card = (unbroken / "model" / "README.md").read_text()
    row = read_jsonl(unbroken / "metrics.jsonl")[-1]
    assert card.startswith("---\nbase_model: base\n")
    assert "# run, step 4 of 4" in card and f"| accuracy | {row['eval_accuracy']:.4g} |" in card
    assert f"torch {support.metrics.versions()['torch']}" in card
    assert "seconds" not in card
    monkeypatch.setattr(sys, "argv", ["drgrpo.py", "math-7b", "--name", "my run"])
    card = support.run.model_card(small(), 2, {"eval_accuracy": 0.25, "eval_length_wrong": None})
    assert "\n    python drgrpo.py math-7b --name 'my run'\n" in card
    assert "| accuracy | 0.25 |" in card and "None" not in card


def test_config_json_says_how_the_run_was_made(unbroken):
    run = json.loads((unbroken / "config.json").read_text())
    assert run["finished"] == 4 and run["settings"] == json.loads(json.dumps(asdict(small())))
    assert {"torch", "transformers"} <= set(run["versions"])
    assert run["dropped_problems"] == {"too_long": 0}
    assert set(run["fingerprints"]) == {"problems", "model", "code", "reward"}


def test_a_run_leaves_two_states_two_exports_and_nothing_half_done(unbroken):
    assert sorted(os.listdir(unbroken / "state")) == ["3", "4"]
    assert sorted(os.listdir(unbroken / "exports")) == ["2", "4"]
    expected = {"config.json", "curves.png", "exports", "metrics.jsonl", "model", "samples.jsonl"}
    assert {file.name for file in unbroken.iterdir()} == expected | {"state"}


# ------------------------------------------------------------------------- several ranks

SAVE_ON_TWO = """
import errno, signal, sys, warnings
from unittest import mock
import torch, torch.distributed as dist
import support.checkpoint
from support.ranks import start_ranks
from tests.test_run import Learner, save

signal.alarm(150)  # a hang ends
start_ranks()
fails_at = int(sys.argv[1])
learner = Learner("base")
keeper = learner.keeper()
for step in (1, 2, 3):
    learner.learn(step)
    full = OSError(errno.ENOSPC, "No space left on device")
    works = support.checkpoint.write_json
    if step == fails_at and dist.get_rank() == 0:
        support.checkpoint.write_json = mock.Mock(side_effect=full)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(keeper, step, {"step": step})
    assert keeper.failed == (step == fails_at)
    support.checkpoint.write_json = works
    values = learner.values()
    if dist.get_rank() == 0:
        torch.save(values, f"values-{step}.pt")
again = Learner("base")
again.keeper().load(3)
values = again.learn(4).values()
if dist.get_rank() == 0:
    torch.save(values, "values-4.pt")
dist.barrier()
dist.destroy_process_group()
"""


def save_on_two_ranks(base, folder, fails_at=0):
    """States after three updates; at one of them rank 0 may find the disk full."""
    (folder / "base").symlink_to(base)
    (folder / "save.py").write_text(SAVE_ON_TWO)
    launch(2, folder / "save.py", fails_at, folder=folder)


@pytest.fixture(scope="session")
def two_ranks(base, tmp_path_factory):
    """A folder with the states of two ranks."""
    folder = tmp_path_factory.mktemp("two")
    save_on_two_ranks(base, folder)
    return folder


@pytest.mark.slow
def test_what_two_ranks_saved_one_rank_loads(ranks, two_ranks, monkeypatch):
    monkeypatch.chdir(two_ranks)
    learner = Learner("base")
    for step in (2, 3):
        learner.keeper().load(step)
        assert same(learner.values(), torch.load(f"values-{step}.pt"))
    after = torch.load("values-4.pt")  # of two ranks that loaded the state
    for name, value in learner.learn(4).values().items():
        assert torch.allclose(value, after[name], atol=1e-5), name


@pytest.mark.slow
def test_a_state_that_lacks_the_part_of_one_rank_is_damaged(two_ranks, tmp_path):
    shutil.copytree(two_ranks / "state", tmp_path / "state")
    (tmp_path / "state" / "3" / "__1_0.distcp").unlink()
    with pytest.warns(match="state/3 is damaged: __1_0.distcp is missing"):
        assert newest_whole_state(tmp_path / "state")[0] == 2


@pytest.mark.slow
def test_a_save_that_fails_on_one_rank_keeps_the_ranks_in_step(base, tmp_path):
    save_on_two_ranks(base, tmp_path, fails_at=2)
    assert saved_steps(tmp_path / "state") == [3, 1]
    assert find_damage(tmp_path / "state" / "3") is None


# Runs without an engine in processes of their own; the first may wait in its last step but one
ALONE = """
import json, sys, time
from support.ranks import start_ranks
from tests.test_run import run_without_engine

start_ranks()
pause = float(sys.argv[1])


def slow(policy, sampler):
    generate = sampler.generate

    def slow_generate(*arguments):
        time.sleep(pause)
        return generate(*arguments)

    sampler.generate = slow_generate


run_without_engine(slow, **json.loads(sys.argv[2]))
"""


def begin(folder, *launcher, pause=0.0, **settings):
    """Start ALONE in a folder; `launcher` are torchrun's arguments, or none."""
    (folder / "alone.py").write_text(ALONE)
    torchrun = ["-m", "torch.distributed.run", *launcher, "--"] if launcher else []
    command = [sys.executable, *torchrun, "alone.py", str(pause), json.dumps(settings)]
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    foreign = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in foreign}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment | ours,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process, code=0):
    """Wait for a process; what it printed."""
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == code, printed[-4000:]
    return printed


def wait_for_a_step(process, folder):
    """Until the first step is recorded."""
    records = folder / "runs" / "run" / "metrics.jsonl"
    wait_until(
        lambda: process.poll() is not None or (records.exists() and records.stat().st_size), 200
    )
    assert process.poll() is None, process.communicate()[0][-4000:]


def assert_nearly_as(folder, other):
    """As assert_as, to floating-point tolerance."""
    (rows, samples, weights), (others, other_samples, other_weights) = map(
        contents, (folder, other)
    )
    assert [s["response"] for s in samples] == [s["response"] for s in other_samples]
    for row, expected in zip(rows, others, strict=True):
        for key in expected.keys() - {"gap"}:
            assert row[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5), key
    for name, weight in other_weights.items():
        assert torch.allclose(weights[name], weight, atol=1e-4), name


TWO_RANKS = ("--standalone", "--nproc-per-node=2", "--shutdown-timeout=120")


@pytest.mark.slow
def test_a_second_signal_stops_at_once_and_the_run_goes_on_from_its_newest_state(here, unbroken):
    process = begin(here, pause=5)
    wait_for_a_step(process, here)
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: "again: stop now" in process.stdout.readline(), 60)
    process.send_signal(signal.SIGTERM)
    end(process, -signal.SIGTERM)
    assert not Path("runs/run/requeue").exists()
    run_without_engine()
    assert_as(Path("runs/run"), unbroken)


@pytest.mark.slow
def test_two_ranks_under_torchrun_are_asked_to_stop_and_go_on(here, unbroken):
    """As launch/slurm.sbatch does it. torchrun exits with 1, so a file says what it was."""
    forward = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    process = begin(here, *TWO_RANKS, forward, pause=1)
    wait_for_a_step(process, here)
    process.send_signal(signal.SIGUSR1)
    printed = end(process, 1)
    assert printed.count("SIGUSR1: the step in flight is finished") == 2
    assert printed.count("The same command goes on") == 1
    assert Path("runs/run/requeue").exists()
    made = len(read_jsonl(Path("runs/run/metrics.jsonl")))
    assert made < 4 and saved_steps(Path("runs/run/state"))[0] == made
    end(begin(here, *TWO_RANKS))
    assert not Path("runs/run/requeue").exists()
    assert_nearly_as(Path("runs/run"), unbroken)


@pytest.mark.slow
def test_two_agents_make_the_steps_of_one_process(here, unbroken):
    """They stand in for two nodes: (nodes, ranks) is a mesh of 2 x 2. Begun on one rank."""
    run_without_engine(steps=1)
    free = socket.create_server(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=1"]
    node = ["--nnodes=2", "--nproc-per-node=2", "--local-addr=127.0.0.1", *rendezvous]
    for process in [begin(here, *node) for _ in "ab"]:
        end(process)
    assert_nearly_as(Path("runs/run"), unbroken)


def mounted(folder, size):
    """A small disk at a folder; skips the test where that is not allowed."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a small disk can only be mounted as root")


@pytest.mark.slow
@pytest.mark.parametrize("obstacle", ["full", "read-only"])
def test_a_real_disk_that_is_full_or_read_only_costs_no_state(here, unbroken, obstacle):
    """A full one holds the records, too: what a failed save has written must not fill it."""
    disk = Path("runs/run") if obstacle == "full" else Path("runs/run/state")
    mounted(disk, "2800k" if obstacle == "full" else "16m")  # a state has 1044 KiB
    try:
        if obstacle == "read-only":
            crash(crash_at(drgrpo, "update", 3))
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with (
            pytest.warns(match="(?s)could not be saved in runs/run/state: .*older states are kept"),
            pytest.raises(RuntimeError, match="twice in a row"),
        ):
            run_without_engine(steps=8, eval_every=100)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert newest_whole_state(Path("runs/run/state"))[0] == 2
        assert read_jsonl(Path("runs/run/metrics.jsonl"))[-1]["failed_saves"] == 1
        subprocess.run(["mount", "-o", "remount,rw,size=16m", str(disk)], check=True)
        run_without_engine()
        assert_as(Path("runs/run"), unbroken)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


# --------------------------------------------------------- whole runs from the command line

SETTINGS = ["--prompts-per-step", "8", "--responses-per-update", "32", "--eval-every", "3"]
NOBODY = ("no rank", "start", 0, 0, 0, False)


def toy_run(folder, kill=NOBODY, ranks=1, steps=3):
    """One command that trains the toy, in which `kill` is done as benchmarks/chaos.py does it:
    (rank, phase, call, delay, signal, whether to the whole group). Returns its exit code."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    launcher = [*torchrun, "--shutdown-timeout=120", "--"] if ranks > 1 else []
    chaos = [str(ROOT / "benchmarks" / "chaos.py"), "child", *map(str, kill)]
    command = [sys.executable, *launcher, *chaos, "toy", "--steps", str(steps), *SETTINGS]
    foreign = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in foreign}
    done = subprocess.run(
        [*command, "--save-every", "1"],
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        start_new_session=True,
    )
    (folder / "log").write_text(done.stdout + done.stderr)
    return done.returncode


def toy_folder(toy, folder):
    (folder / "runs").mkdir()
    (folder / "runs" / "toy-base").symlink_to(toy)
    return folder


@pytest.fixture(scope="session")
def unbroken_toy(toy, tmp_path_factory):
    folder = toy_folder(toy, tmp_path_factory.mktemp("toy"))
    assert toy_run(folder) == 0, (folder / "log").read_text()[-4000:]
    return folder / "runs" / "toy"


@pytest.mark.slow
def test_a_real_run_that_is_killed_again_and_again_ends_as_the_unbroken_one(
    toy, unbroken_toy, tmp_path
):
    folder = toy_folder(toy, tmp_path)
    for phase, call, group in (("sampling", 3, True), ("update", 2, False), ("saving", 1, True)):
        kill = (0, phase, call, 0.02, int(signal.SIGKILL), group)
        assert toy_run(folder, kill) == -signal.SIGKILL, (folder / "log").read_text()[-4000:]
    assert toy_run(folder) == 0, (folder / "log").read_text()[-4000:]
    assert_as(folder / "runs" / "toy", unbroken_toy)
    assert toy_run(folder) == 0
    assert "is finished: 3 steps" in (folder / "log").read_text()


@pytest.mark.slow
def test_a_signal_to_the_whole_group_leaves_the_graders_workers_to_the_step(
    toy, unbroken_toy, tmp_path
):
    """Else its gradings would be lost and score 0."""
    folder = toy_folder(toy, tmp_path)
    kill = (0, "sampling", 3, 0.0, int(signal.SIGTERM), True)
    assert toy_run(folder, kill) == 75, (folder / "log").read_text()[-4000:]
    run = folder / "runs" / "toy"
    assert (run / "requeue").exists()
    row = read_jsonl(run / "metrics.jsonl")[-1]
    assert row["step"] == 1 and row["timeouts"] == row["errors"] == 0
    assert toy_run(folder) == 0, (folder / "log").read_text()[-4000:]
    assert_as(run, unbroken_toy)


@pytest.mark.slow
def test_a_real_run_grows_from_one_rank_to_two_and_one_of_them_is_asked_to_stop(
    toy, unbroken_toy, tmp_path
):
    folder = toy_folder(toy, tmp_path)
    assert toy_run(folder, steps=1) == 0, (folder / "log").read_text()[-4000:]
    kill = (1, "sampling", 1, 0.0, int(signal.SIGTERM), False)
    assert toy_run(folder, kill, ranks=2) == 1, (folder / "log").read_text()[-4000:]
    run = folder / "runs" / "toy"
    assert (run / "requeue").exists() and saved_steps(run / "state") == [2, 1]
    assert toy_run(folder, ranks=2) == 0, (folder / "log").read_text()[-4000:]
    samples, others = (read_jsonl(r / "samples.jsonl") for r in (run, unbroken_toy))
    assert [s["response"] for s in samples] == [s["response"] for s in others]
    _, _, weights = contents(run)
    for name, weight in contents(unbroken_toy)[2].items():
        assert torch.allclose(weights[name], weight, atol=1e-5), name
