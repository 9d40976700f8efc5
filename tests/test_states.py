"""Facts about states and exports: what is in them, and that there is always a whole one."""

import errno
import os
import resource
import shutil
import threading
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

import drgrpo
import support.run
from drgrpo import collate, full_weights, make_policy, micro_batches, update
from support.logprobs import token_logprobs
from support.run import Run, States, saved_steps
from tests.helpers import TOY, some_rollouts, tiny_model
from tests.runs import on_ranks, same, small

RUN = Path("runs/run")
FACTS: dict = {"dropped_problems": {}}
FULL = OSError(errno.ENOSPC, "No space left on device")
WRITER = dcp.FileSystemWriter


# ------------------------------------------------------------------------------ states


class Learner:
    """A policy and its optimizer, which can make an update, be saved and be compared."""

    def __init__(self, lr=1e-2):
        self.config = replace(TOY, model="base", max_gap=100.0, responses_per_update=32)
        self.policy = make_policy(self.config)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr, fused=True)

    def learn(self, seed):
        world = dist.get_world_size()
        mine = micro_batches(some_rollouts(seed=seed), 10**6, dist.get_rank(), world)
        update(self.policy, self.optimizer, [collate(rows) for rows in mine], self.config)
        return self

    def states(self):
        return States(Path("state"), self.policy, self.optimizer)

    def values(self):
        """Weights and Adam's state, a copy."""
        found = {name: w.clone() for name, w in full_weights(self.policy.model, torch.float32)}
        for place, state in self.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                found[f"{place}.{key}"] = drgrpo.whole(value).clone()
        return found


def save(states, step):
    states.save(step)
    states.wait()


@pytest.fixture
def saved(here):
    """Two states in the folder `state`: the learner, its states, and the values by step."""
    learner = Learner()
    states, values = learner.states(), {}
    for step in (1, 2):
        learner.learn(step)
        save(states, step)
        values[step] = learner.values()
    return learner, states, values


def test_a_state_restores_weights_and_adam_to_the_bit_and_so_the_next_update(saved):
    learner, _, values = saved
    after = learner.learn(3).values()
    again = Learner()
    assert again.states().load() == 2
    assert same(again.values(), values[2])
    assert any(key.endswith("exp_avg_sq") for key in values[2])
    assert not same(after, values[2])
    assert same(again.learn(3).values(), after)


def test_the_learning_rate_is_that_of_the_command_and_not_that_of_the_state(saved):
    learner, _, _ = saved
    other = Learner(lr=1e-3)
    other.states().load()
    (group,) = other.optimizer.param_groups
    assert group["lr"] == 1e-3
    before = other.values()
    for each in (learner, other):
        each.learn(3)
    name = "model.embed_tokens.weight"
    moved, moved_less = (each.values()[name] - before[name] for each in (learner, other))
    assert torch.allclose(moved_less, moved / 10, atol=1e-6) and moved.abs().max() > 1e-3


def test_metadata_is_written_last(saved, monkeypatch):
    """So a state that has it is whole. torch promises it nowhere, but its version is pinned. The
    state is one that is there already, as a damaged one is."""
    _, states, _ = saved
    data, metadata, seen = Path("state/2/__0_0.distcp"), Path("state/2/.metadata"), []
    whole = data.stat().st_size

    def noted(name, function):
        def noting(*arguments, **settings):
            seen.append((name, metadata.exists(), data.exists() and data.stat().st_size))
            return function(*arguments, **settings)

        return noting

    monkeypatch.setattr(WRITER, "write_data", noted("data", WRITER.write_data))
    monkeypatch.setattr(Path, "rename", noted("rename", Path.rename))
    save(states, 2)
    assert seen == [("data", False, False), ("rename", False, whole)] and metadata.exists()


def cut(file):
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_a_damaged_state_is_named_and_the_one_before_it_is_taken(saved, damage):
    damage(Path("state/2/__0_0.distcp"))
    learner = Learner()
    with pytest.warns(match="the state state/2 is damaged: rank 0: [^\n]*$"):
        assert learner.states().load() == 1
    assert same(learner.values(), saved[2][1])


def test_if_no_state_can_be_loaded_the_error_says_what_to_do(saved):
    for step in "12":
        cut(Path("state", step, "__0_0.distcp"))
    message = "every state in state is damaged: remove . to start again, or put back a copy"
    with pytest.warns(match="damaged"), pytest.raises(ValueError, match=message):
        Learner().states().load()
    assert saved_steps(Path("state")) == [2, 1], "nothing is thrown away"


def test_damaged_states_are_not_counted_among_the_two_that_are_kept(saved):
    """Else what is saved next would be removed at once, and the only whole one with it."""
    cut(Path("state/2/__0_0.distcp"))
    for step in "89":
        shutil.copytree("state/2", f"state/{step}")
    learner = Learner()
    states = learner.states()
    with pytest.warns(match="damaged"):
        assert states.load() == 1
    for step, kept in ((2, [2, 1]), (3, [3, 2])):
        save(states, step)
        assert saved_steps(Path("state")) == kept
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Learner().states().load() == 3


def test_two_states_are_kept_and_what_else_lies_there_is_left_alone(saved):
    """Somebody's copy of a state, or what a file system keeps there."""
    _, states, _ = saved
    shutil.copytree("state/1", "state/1-copy")
    shutil.copytree("state/1", "state/0")
    Path("state/0/.metadata").unlink()  # as a killed save or removal leaves it
    Path("state/.nfs0001").write_text("")
    save(states, 3)
    assert sorted(os.listdir("state")) == [".nfs0001", "1-copy", "2", "3"]
    states.save(4)
    states.save(5)  # waits for the save before it
    assert saved_steps(Path("state"))[-2:] == [4, 3] and not Path("state/2").exists()
    states.wait()


def test_what_is_saved_are_the_values_of_the_moment_of_save(saved, monkeypatch):
    learner, states, _ = saved
    go, works = threading.Event(), WRITER.write_data

    def wait_and_write(*arguments):
        assert go.wait(60)
        return works(*arguments)

    monkeypatch.setattr(WRITER, "write_data", wait_and_write)
    before = learner.learn(3).values()
    states.save(3)
    after = learner.learn(4).values()
    go.set()
    states.wait()
    assert not same(before, after)
    assert states.load() == 3
    assert same(learner.values(), before)


# ------------------------------------------------------------------------- saves that fail


@contextmanager
def a_disk_of(size):
    """No file of this process can have more bytes than this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_save_warns_and_is_counted_and_the_second_in_a_row_ends_the_run(saved):
    _, states, _ = saved
    for _ in range(2):
        with a_disk_of(100_000), pytest.warns() as seen:
            save(states, 3)
        message = str(seen[0].message)
        assert message.startswith("the state could not be saved in state: rank 0: OSError: ")
        assert "File too large. The run goes on; the older states are kept." in message
        assert "\n" not in message
        assert states.failed == 1 and sorted(os.listdir("state")) == ["1", "2"], "nothing half done"
        save(states, 2)  # a save that works begins the count again
        assert states.failed == 0
    with a_disk_of(100_000):
        with pytest.warns(match="could not be saved"):
            save(states, 3)
        with pytest.raises(RuntimeError, match="twice in a row, the state could not .*too large"):
            save(states, 4)
    assert sorted(os.listdir("state")) == ["1", "2"], "nothing fills the disk"
    assert Learner().states().load() == 2


@pytest.mark.parametrize("error", [FULL, RuntimeError("no answer"), CheckpointException("", {})])
@pytest.mark.parametrize("place", ["write_data", "finish", "set_up_storage_writer"])
def test_whatever_fails_in_a_save_is_a_failed_save(saved, monkeypatch, place, error):
    """Also in the first one. dcp raises a CheckpointException, which is no Exception."""
    assert not issubclass(CheckpointException, Exception)
    states = saved[0].states()
    monkeypatch.setattr(WRITER, place, mock.Mock(side_effect=error))
    states.save(3)
    with pytest.warns(match="could not be saved"):
        states.wait()
    assert states.failed == 1 and saved_steps(Path("state")) == [2, 1]


@pytest.mark.parametrize("device, memory", [("cpu", 26e6), ("meta", 14e6)])
@pytest.mark.parametrize("room, said", [(1.01, []), (0.99, ["little disk", "little memory"])])
def test_too_little_room_is_said_at_the_start(
    tmp_path, monkeypatch, capsys, device, memory, room, said
):
    """A million weights: three states and two exports on the disk, one of each in memory, and where
    the policy is on the CPU its gradients and moments."""
    weight = torch.zeros(1000, 1000, device=device)
    policy = SimpleNamespace(parameters=lambda: [weight], saved_dtype=torch.half)
    (tmp_path / "state" / "1").mkdir(parents=True)
    (tmp_path / "state" / "1" / "part").write_bytes(bytes(10**6))  # of the run that goes on
    disk = SimpleNamespace(free=room * 39e6)
    memory = SimpleNamespace(available=room * memory)
    monkeypatch.setattr(support.run.shutil, "disk_usage", lambda folder: disk)
    monkeypatch.setattr(support.run.psutil, "virtual_memory", lambda: memory)
    support.run.say_if_scarce(tmp_path, policy)
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == said


# ------------------------------------------------------------------------------ exports


@pytest.fixture
def export(here, monkeypatch):
    """A function that exports a model, with all weights set to one number, as that step's."""
    monkeypatch.setattr(States, "load", lambda states: 0)
    tokenizer = AutoTokenizer.from_pretrained("base")
    model = tiny_model(len(tokenizer), num_hidden_layers=1)
    optimizer = torch.optim.AdamW(model.parameters())
    policy = SimpleNamespace(model=model, parameters=model.parameters, saved_dtype=torch.float32)
    run = Run(small(), tokenizer, [], FACTS, policy, optimizer)

    def export(step):
        weights = {name: torch.full_like(w, step) for name, w in model.state_dict().items()}
        run.export(step, weights.items())

    export.run = run
    return export


def value_of_the_model():
    """The one number that all weights of the run's model have; None if there is no model."""
    if not os.path.lexists(RUN / "model"):
        return None
    weights = AutoModelForCausalLM.from_pretrained(RUN / "model").state_dict()
    AutoTokenizer.from_pretrained(RUN / "model")
    (value,) = {number for weight in weights.values() for number in weight.unique().tolist()}
    return value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_an_export_loads_with_the_policys_logprobs(here, tied, dtype):
    tokenizer = AutoTokenizer.from_pretrained("base")
    Path("base").unlink()
    base = tiny_model(len(tokenizer), tie_word_embeddings=tied).to(dtype)
    base.save_pretrained("base")
    learner = Learner()
    run = Run(small(), tokenizer, [], FACTS, learner.policy, learner.optimizer)
    with torch.no_grad():
        for weight in learner.policy.parameters():
            weight.mul_(2)  # exact in bf16
    model = learner.policy.model
    run.export(2, full_weights(model, learner.policy.saved_dtype))
    saved = AutoModelForCausalLM.from_pretrained(RUN / "model")
    weights = load_file(RUN / "model" / "model.safetensors")
    assert type(saved) is Qwen2ForCausalLM and saved.dtype == dtype
    assert {weight.dtype for weight in weights.values()} == {dtype}
    assert ("lm_head.weight" in weights) == (not tied)
    assert "packed" not in (RUN / "model" / "config.json").read_text()
    assert saved.generation_config.eos_token_id == base.generation_config.eos_token_id == 0
    assert AutoTokenizer.from_pretrained(RUN / "model")("1+1") == tokenizer("1+1")
    batch = collate(some_rollouts())
    expected = learner.policy(batch.ids, batch.response_mask)
    found = token_logprobs(saved.float(), batch.ids, batch.response_mask)
    assert torch.allclose(found, expected, atol=1e-2 if dtype == torch.bfloat16 else 1e-5)


class Crash(BaseException):
    """As if the process had been killed."""


def crash_at(monkeypatch, number, done):
    """Let the file operation with this number crash, before it begins or when it is done. A folder
    that is being removed is then half removed."""
    left = [number]

    def wrap(name, operation):
        def wrapped(first, *arguments, **settings):
            left[0] -= 1
            if left[0] == 0 and not done:
                raise Crash
            if left[0] == 0 and name == "rmtree" and Path(first).is_dir():
                for file in Path(first).glob("*.safetensors"):
                    file.unlink()
                raise Crash
            result = operation(first, *arguments, **settings)
            if left[0] == 0:
                raise Crash
            return result

        return wrapped

    operations = [(os, "replace"), (shutil, "rmtree"), (support.run, "save_torch_state_dict")]
    operations += [(Path, name) for name in ("symlink_to", "mkdir", "write_text", "unlink")]
    for owner, name in operations:
        monkeypatch.setattr(owner, name, wrap(name, getattr(owner, name)))


@pytest.mark.parametrize("done", [False, True])
def test_whenever_a_process_is_killed_there_is_the_last_whole_model(export, done):
    crashes = 0
    for step in (1, 2, 3):
        before = value_of_the_model()
        for number in range(1, 100):
            with pytest.MonkeyPatch.context() as monkeypatch:
                crash_at(monkeypatch, number, done)
                try:
                    export(step)
                    break
                except Crash:
                    crashes += 1
            found = value_of_the_model()
            assert found in (before, step), f"step {step}, operation {number}"
            before = found  # what was there once stays
        assert value_of_the_model() == step
    assert crashes > 20
    assert len(list(RUN.glob("*export*"))) == 1, "what crashes left behind is gone"


def test_a_generation_config_that_transformers_would_not_save_is_saved(export):
    """Many base models ship a temperature without do_sample."""
    found = export.run.model.generation_config
    found.temperature, found.do_sample = 0.6, False
    with pytest.raises(ValueError):
        found.save_pretrained("other")
    export(1)
    saved = AutoModelForCausalLM.from_pretrained(RUN / "model").generation_config
    assert saved.temperature == 0.6


def test_rank_0_alone_keeps_the_weights_and_as_copies(export, monkeypatch):
    """What was gathered may be a view of padded shards; other ranks only help to gather it."""
    kept, weight = [], torch.ones(3)
    monkeypatch.setattr(support.run, "save_torch_state_dict", lambda found, _: kept.append(found))
    export.run.export(1, [("a", weight)])
    assert torch.equal(kept[0]["a"], weight) and kept[0]["a"].data_ptr() != weight.data_ptr()
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    gathered = mock.Mock()
    export.run.export(1, iter([("a", gathered)]))
    assert len(kept) == 1 and not gathered.to.called


def save_with_a_failure_on_rank_1():
    learner = Learner()
    states, failed = learner.states(), []
    for step in (1, 2, 3):
        learner.learn(step)
        works = WRITER.write_data
        if step == 2 and dist.get_rank() == 1:
            WRITER.write_data = mock.Mock(side_effect=FULL)
        save(states, step)
        WRITER.write_data = works
        failed.append(states.failed)
    return failed


@pytest.mark.slow
def test_a_save_that_fails_on_one_rank_fails_on_all(here):
    done = on_ranks(2, save_with_a_failure_on_rank_1, folder=here)
    assert done.results == [[0, 1, 0], [0, 1, 0]]
    assert done.printed.count("rank 1: OSError: [Errno 28] No space left on device") == 2
    assert saved_steps(Path("state")) == [3, 1]
    cut(Path("state/3/__1_0.distcp"))
    with pytest.warns(match="state/3 is damaged: rank 0: "):
        assert Learner().states().load() == 1, "one rank reads what two have written"
