"""Facts about a run: it goes on after anything that stops it, and its folder tells no lies.

Most runs here have a tiny policy and random responses in place of an engine's: tests/runs.py.
"""

import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager
from dataclasses import asdict, replace
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
from support.run import Run, States, check_folder, is_finished, reason, saved_steps, what_is_asked
from tests.helpers import ROOT, TOY, read_jsonl, some_rollouts, tiny_model, write_jsonl
from tests.runs import assert_as, contents, furnish, on_ranks, same, small, train, train_here

RUN = Path("runs/run")
FULL = OSError(errno.ENOSPC, "No space left on device")
WRITER = dcp.FileSystemWriter


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
    """The current folder, with what a run needs."""
    monkeypatch.chdir(tmp_path)
    return furnish(tmp_path, base)


@pytest.fixture(scope="session")
def unbroken(base, tmp_path_factory):
    """The folder of an unbroken run of four steps."""
    folder = furnish(tmp_path_factory.mktemp("unbroken"), base)
    on_ranks(1, train_here, {}, folder=folder)
    return folder / RUN


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


def test_a_state_without_metadata_is_none_and_no_damage(saved):
    Path("state/2/.metadata").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Learner().states().load() == 1
        Path("state/1/.metadata").unlink()
        assert Learner().states().load() == 0


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


def flip_bits(file, *places):
    """At these places; without any at one in a thousand, since not every bit matters."""
    content = bytearray(file.read_bytes())
    for place in places or range(0, len(content), 1000):
        content[place] ^= 1
    file.write_bytes(content)


def cut(file):
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata"])
@pytest.mark.parametrize("damage", [flip_bits, cut, Path.unlink])
def test_a_damaged_state_is_named_and_the_one_before_it_is_taken(saved, damage, file):
    damage(Path("state/2", file))
    learner = Learner()
    if (damage, file) != (Path.unlink, ".metadata"):
        with pytest.warns(match="the state state/2 is damaged: rank 0: [^\n]*$"):
            assert learner.states().load() == 1
    else:
        assert learner.states().load() == 1
    assert same(learner.values(), saved[2][1])


def test_a_flipped_bit_is_seen_wherever_it_changes_a_value(saved):
    file = Path("state/2/__0_0.distcp")
    whole, refused = file.read_bytes(), 0
    learner = Learner()
    states = learner.states()
    for place in range(7, len(whole), len(whole) // 15):
        flip_bits(file, place)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step = states.load()
        assert same(learner.values(), saved[2][step]), place
        assert (step == 1) == any("state/2 is damaged" in str(each.message) for each in seen)
        refused += step == 1
        file.write_bytes(whole)
    assert refused >= 8


def test_if_no_state_can_be_loaded_the_error_says_what_to_do(saved):
    for step in "12":
        cut(Path("state", step, "__0_0.distcp"))
    with pytest.warns(match="damaged"), pytest.raises(ValueError) as refused:
        Learner().states().load()
    assert "every state in state is damaged: remove . to start again, or put back a copy" in str(
        refused.value
    )
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
        assert "File too large (" in message and "GB are free on that disk)" in message
        assert "The run goes on; the older states are kept." in message and "\n" not in message
        assert states.failed == 1 and sorted(os.listdir("state")) == ["1", "2"], "nothing half done"
        save(states, 2)  # a save that works begins the count again
        assert states.failed == 0
    with a_disk_of(100_000):
        with pytest.warns(match="could not be saved"):
            save(states, 3)
        with pytest.raises(RuntimeError, match="twice in a row, the state could not .*too large"):
            save(states, 4)
    assert Learner().states().load() == 2


@pytest.mark.parametrize("error", [FULL, RuntimeError("no answer"), CheckpointException("", {})])
@pytest.mark.parametrize("place", ["write_data", "finish", "set_up_storage_writer"])
def test_whatever_fails_in_a_save_is_a_failed_save(saved, monkeypatch, place, error):
    """dcp raises a CheckpointException, which is no Exception."""
    assert not issubclass(CheckpointException, Exception)
    _, states, _ = saved
    monkeypatch.setattr(WRITER, place, mock.Mock(side_effect=error))
    states.save(3)
    with pytest.warns(match="could not be saved"):
        states.wait()
    assert states.failed == 1 and saved_steps(Path("state")) == [2, 1]


def test_a_save_into_what_is_no_folder_is_a_failed_save(here):
    Path("state").write_text("")
    states = Learner().learn(1).states()
    with pytest.warns(match="could not be saved in state: .*FileExistsError|NotADirectory"):
        save(states, 1)
    assert states.failed == 1 and saved_steps(Path("state")) == []


def test_a_reason_is_one_line():
    failures = {1: (FULL, None), 0: (RuntimeError("failed\n#0 a frame\n#1 another"), None)}
    found = reason(CheckpointException("write", failures))
    assert found == f"rank 0: RuntimeError: failed; rank 1: OSError: {FULL}"
    assert reason(KeyError("lr")) == "KeyError: 'lr'", "the text alone would say nothing"


@pytest.mark.parametrize("room, said", [(1.01, []), (0.99, ["little disk", "little memory"])])
def test_too_little_room_is_said_at_the_start(tmp_path, monkeypatch, capsys, room, said):
    """A million weights: three states and two exports on the disk, one of each in memory."""
    policy = SimpleNamespace(parameters=lambda: [torch.zeros(1000, 1000)], saved_dtype=torch.half)
    (tmp_path / "state" / "1").mkdir(parents=True)
    (tmp_path / "state" / "1" / "part").write_bytes(bytes(10**6))  # of the run that goes on
    disk = SimpleNamespace(free=room * 39e6)
    memory = SimpleNamespace(available=room * 14e6)
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
    run = Run(small(), tokenizer, [], [], {}, policy, optimizer)

    def export(step, **metrics):
        weights = {name: torch.full_like(w, step) for name, w in model.state_dict().items()}
        run.export(step, metrics, weights.items())

    export.model = model
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
    run = Run(small(), tokenizer, [], [], {}, learner.policy, learner.optimizer)
    with torch.no_grad():
        for weight in learner.policy.parameters():
            weight.mul_(2)  # exact in bf16
    model = learner.policy.model
    run.export(2, {}, full_weights(model, learner.policy.saved_dtype))
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


def test_there_are_two_folders_in_turn_behind_a_link_that_may_move(export):
    export(0)
    assert not RUN.joinpath("model").exists(), "the base model is there already"
    for step, folder in ((8, "export-1"), (16, "export-2"), (24, "export-1"), (24, "export-2")):
        export(step, eval_accuracy=0.25, eval_length_wrong=None)
        assert os.readlink(RUN / "model") == folder and value_of_the_model() == step
        assert sorted(file.name for file in RUN.glob("*export*")) == [folder]
        assert not RUN.joinpath(".model.new").exists()


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
    export.model.generation_config.temperature = 0.6
    export.model.generation_config.do_sample = False
    with pytest.raises(ValueError):
        export.model.generation_config.save_pretrained("other")
    export(1)
    saved = AutoModelForCausalLM.from_pretrained(RUN / "model").generation_config
    assert saved.temperature == 0.6


def test_rank_0_alone_keeps_the_weights_and_as_copies(export, monkeypatch):
    """What was gathered may be a view of padded shards; other ranks only help to gather it."""
    kept, weight = [], torch.ones(3)
    monkeypatch.setattr(support.run, "save_torch_state_dict", lambda found, _: kept.append(found))
    run = export.__closure__[1].cell_contents
    run.export(1, {}, [("a", weight)])
    assert torch.equal(kept[0]["a"], weight) and kept[0]["a"].data_ptr() != weight.data_ptr()
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    gathered = mock.Mock()
    run.export(1, {}, iter([("a", gathered)]))
    assert len(kept) == 1 and not gathered.to.called


def test_a_saved_model_has_a_card_with_what_made_it_and_what_it_scores(export, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["drgrpo.py", "math-7b", "--name", "my run"])
    export(2, eval_accuracy=0.25, eval_length_wrong=None)
    card = (RUN / "model" / "README.md").read_text()
    assert card.startswith("---\nbase_model: base\n") and "step 2 of 4" in card
    assert "\n    python drgrpo.py math-7b --name 'my run'\n" in card
    assert "eval_accuracy 0.25." in card and "None" not in card


# ------------------------------------------------------------------- runs that are killed

# The function in which a process gets SIGKILL: in which of its calls, and whether at its end
KILLS = {
    "the start": ("drgrpo:train_step", 1, False),
    "sampling, before the first state": ("drgrpo:sample", 2, False),
    "sampling": ("drgrpo:sample", 5, False),
    "grading": ("drgrpo:give_rewards", 4, False),
    "the middle of an update": ("torch.nn.utils:clip_grad_norm_", 6, False),
    "the end of an update": ("drgrpo:update", 3, True),
    "sync": ("tests.helpers:FakeSampler.wake", 3, False),
    "evaluation": ("drgrpo:evaluate", 2, True),
    "an export": ("support.run:save_torch_state_dict", 1, True),
    "the end of the last export": ("support.run:Run.export", 3, True),
    "the first save": ("torch.distributed.checkpoint:FileSystemWriter.write_data", 1, False),
    "a save": ("torch.distributed.checkpoint:FileSystemWriter.write_data", 3, True),
    "the end of a save": ("torch.distributed.checkpoint:FileSystemWriter.finish", 3, True),
    "the removal of a state": ("shutil:rmtree", 4, True),
    "the records": ("support.records:append_rows", 5, True),
    "the end": ("support.records:Records.close", 1, False),
}


def goes_on_as(folder, unbroken, world=1):
    """The same command again, after a kill."""
    steps = saved_steps(folder / RUN / "state")
    done = on_ranks(world, train_here, {}, folder=folder)
    assert_as(folder / RUN, unbroken)
    expected = f"runs/run goes on from step {steps[0]}\n" if steps else "runs/run\n"
    assert done.printed.startswith(expected)
    assert "damaged" not in done.printed
    return done


@pytest.mark.parametrize("phase", KILLS)
def test_a_run_that_was_killed_ends_as_the_unbroken_one(here, unbroken, phase):
    killed = on_ranks(1, train_here, {}, 0, *KILLS[phase], signal.SIGKILL, folder=here, fails=True)
    assert killed.codes == [-signal.SIGKILL]
    assert not is_finished(small())
    goes_on_as(here, unbroken)
    assert is_finished(small())


def test_a_run_that_is_killed_at_every_step_ends_as_the_unbroken_one(here, unbroken):
    kill = (0, "drgrpo:train_step", 2, False, signal.SIGKILL)
    for _ in range(3):
        on_ranks(1, train_here, {}, *kill, folder=here, fails=True)
    goes_on_as(here, unbroken)


def test_after_a_resume_the_weights_go_to_the_engine_before_the_first_sampling(here):
    """Else the first evaluation and step would be the base model's."""
    assert train(steps=1).calls[0] == "sample", "a new run has them in the engine"
    seen = {}

    def change(sampler):
        wake = sampler.wake
        seen["base"] = dict(full_weights(sampler.policy.model, torch.float32))
        seen["base"] = {name: weight.clone() for name, weight in seen["base"].items()}

        def noting_wake(policy):
            seen.setdefault("woken", dict(full_weights(policy.model, torch.float32)))
            wake(policy)

        sampler.wake = noting_wake

    assert train(change, steps=2).calls[:3] == ["sleep", "wake", "sample"]
    assert not same(seen["woken"], seen["base"])


def test_a_run_goes_on_to_more_steps_as_if_it_had_had_them_from_the_start(here, unbroken):
    assert train(steps=2, save_every=100).finished
    assert saved_steps(RUN / "state") == [2], "the last one is always saved"
    assert is_finished(small(steps=2)) and not is_finished(small())
    train()
    assert_as(RUN, unbroken)


def stop_in(name, number, call):
    """A patch by which this process gets a signal in the call of this number."""
    function, calls = getattr(drgrpo, name), []

    def stopping(*arguments, **settings):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return function(*arguments, **settings)

    return mock.patch.object(drgrpo, name, stopping)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_finishes_its_step_and_saves(here, unbroken, number, capfd):
    before = signal.getsignal(number)
    with stop_in("sample", number, call=3):
        assert not train(save_every=100).finished
    assert "the step in flight is finished and saved; again: stop now" in capfd.readouterr().err
    assert saved_steps(RUN / "state") == [2], "steps 0 and 1 are done"
    assert len(read_jsonl(RUN / "metrics.jsonl")) == 2 and not is_finished(small())
    assert signal.getsignal(number) is before
    train()
    assert_as(RUN, unbroken)


def test_a_run_that_is_asked_to_stop_in_its_last_step_makes_what_is_left(here, unbroken):
    with stop_in("update", signal.SIGTERM, call=8):
        assert not train().finished
    assert not is_finished(small())
    train()
    assert_as(RUN, unbroken)


def test_a_signal_in_the_last_evaluation_finishes_the_run(here, unbroken):
    with stop_in("evaluate", signal.SIGTERM, call=3):
        assert train().finished
    assert is_finished(small())
    assert_as(RUN, unbroken)


def test_an_error_waits_for_the_save_and_does_not_finish_the_run(here, unbroken):
    """The save that is under way is a step's work."""
    broken = mock.Mock(side_effect=RuntimeError("broken"))

    def change(sampler):
        works = sampler.generate
        sampler.generate = lambda *given: broken() if len(sampler.seeds) == 2 else works(*given)

    with pytest.raises(RuntimeError, match="broken"):
        train(change)
    assert saved_steps(RUN / "state") == [1] and not is_finished(small())
    train()
    assert_as(RUN, unbroken)


def test_a_full_disk_costs_two_saves_and_then_the_run_but_no_state(here, unbroken):
    train(steps=2)
    with (
        mock.patch.object(WRITER, "write_data", side_effect=FULL),
        pytest.warns(match="No space left"),
        pytest.raises(RuntimeError, match="twice in a row"),
    ):
        train(steps=8)
    assert [row["failed_saves"] for row in read_jsonl(RUN / "metrics.jsonl")] == [0, 0, 0, 0, 1]
    assert saved_steps(RUN / "state") == [2, 1]
    train()
    assert_as(RUN, unbroken)


def test_a_run_with_a_damaged_state_goes_on_from_the_one_before_it(here, unbroken):
    train(steps=3)
    flip_bits(RUN / "state/3/__0_0.distcp")
    with pytest.warns(match="runs/run/state/3 is damaged"):
        train()
    assert_as(RUN, unbroken)


# ---------------------------------------------------- what may go on, and what may not


@pytest.fixture(scope="session")
def begun(base, tmp_path_factory):
    """A folder with a run of two steps; for `of_a_run` alone."""
    folder = furnish(tmp_path_factory.mktemp("begun"), base)
    on_ranks(1, train_here, {"steps": 2}, folder=folder)
    return folder


@pytest.fixture
def of_a_run(begun, tmp_path, monkeypatch):
    """A copy of that folder, as the current one."""
    shutil.copytree(begun, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setattr(support.run, "check_model", lambda *given: None)


def rewrite(name, change):
    """Change the rows of a file."""
    write_jsonl(Path(name), change(read_jsonl(Path(name))))


def other_stop_strings():
    support.run.TEMPLATES["none"] = replace(support.run.TEMPLATES["none"], stop=("\n",))


CHANGES = {
    "the problem": lambda: rewrite("train.jsonl", lambda r: [r[0] | {"problem": "2+2="}, *r[1:]]),
    "the gold": lambda: rewrite("train.jsonl", lambda r: [*r[:-1], r[-1] | {"answer": "7"}]),
    "the order": lambda: rewrite("train.jsonl", lambda rows: rows[::-1]),
    "the held-out problems": lambda: rewrite("test.jsonl", lambda rows: rows[1:]),
    "the template": lambda: {"template": "qwen_math", "max_prompt_tokens": 400},
    "its stop strings": other_stop_strings,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("steps", [2, 5])
def test_a_run_that_is_asked_something_else_is_refused(of_a_run, monkeypatch, change, steps):
    """A finished one, too."""
    monkeypatch.setattr(support.run, "TEMPLATES", dict(support.run.TEMPLATES))
    settings = CHANGES[change]() or {}
    with pytest.raises(ValueError, match="asked something else: .* remove the folder, or choose a"):
        support.run.prepare(small(steps=steps, **settings))


def asked(**settings):
    """The hash of what a run here is asked."""
    config = small(**settings)
    _, problems, held_out, _ = support.run.load_data(config)
    return what_is_asked(config, problems, held_out)


def test_a_chat_template_that_says_todays_date_asks_something_else_tomorrow(of_a_run, base):
    tokenizer = AutoTokenizer.from_pretrained("base")
    Path("base").unlink()
    shutil.copytree(base, "base")
    found = []
    for date in ("1 May", "1 May", "2 May"):
        tokenizer.chat_template = f"{date} {{{{ messages[0]['content'] }}}}"
        tokenizer.save_pretrained("base")
        found.append(asked(template="chat", max_prompt_tokens=300))
    assert found[0] == found[1] != found[2]


def test_with_ones_own_reward_other_columns_may_not_change(of_a_run, rewards):
    own = f"{rewards}:short"
    before = asked(), asked(reward=own)
    rewrite("train.jsonl", lambda rows: [row | {"i": 0} for row in rows])
    assert asked() == before[0] and asked(reward=own) != before[1]


def test_a_renamed_folder_other_code_and_a_new_setting_are_no_error(of_a_run, capsys):
    """A fork's setting may be 0.0; an old run has no value for it."""
    RUN.rename("runs/other")
    run = json.loads(Path("runs/other/config.json").read_text())
    run["settings"] = {key: run["settings"][key] for key in run["settings"] if key != "clip_eps"}
    run["versions"]["torch"] = "1.0"
    Path("runs/other/config.json").write_text(json.dumps(run))
    assert support.run.prepare(small(name="other", steps=5))
    assert capsys.readouterr().out == "runs/other: steps was 2, is 5\n"


def test_a_changed_setting_is_printed_and_used(of_a_run, capsys):
    train(steps=3, lr=0.0)
    before = contents(RUN)[2]
    printed = capsys.readouterr().out
    assert "runs/run: lr was 0.01, is 0.0\n" in printed and "goes on from step 2" in printed
    train(steps=4, lr=0.0)
    assert same(contents(RUN)[2], before), "with the old rate the weights would move"


def test_fewer_steps_than_there_are_are_refused(of_a_run):
    with pytest.raises(ValueError, match="has made 2 steps already: --steps must not be fewer"):
        support.run.prepare(small(steps=1))


def test_a_run_that_was_killed_before_its_first_state_begins_anew_on_any_data(of_a_run):
    shutil.rmtree(RUN / "state")
    run = json.loads((RUN / "config.json").read_text())
    (RUN / "config.json").write_text(json.dumps(run | {"finished": None}))
    CHANGES["the problem"]()
    train(steps=1)
    assert [row["step"] for row in read_jsonl(RUN / "metrics.jsonl")] == [0, 1]


def test_the_records_of_a_finished_run_are_never_cut_because_its_states_are_gone(of_a_run):
    """Whoever removes the states to save disk keeps the results."""
    shutil.rmtree(RUN / "state")
    before = contents(RUN)
    with pytest.raises(ValueError, match="no state to go on from is left: remove or rename"):
        train(steps=5)
    assert contents(RUN)[:2] == before[:2]
    support.run.prepare(small(steps=2))
    assert is_finished(small(steps=2))


def test_a_folder_that_cannot_hold_a_run_is_refused_before_a_model_loads(here, monkeypatch):
    """root may write anywhere, so a file stands in the way."""
    monkeypatch.setattr(support.run, "check_model", mock.Mock())
    Path("runs").write_text("")
    with pytest.raises(ValueError, match="runs/run cannot hold the run: .*Choose another folder"):
        support.run.prepare(small())
    assert not support.run.check_model.called
    Path("runs").unlink()
    support.run.prepare(small())
    assert support.run.check_model.called and list(RUN.iterdir()) == []
    monkeypatch.setattr(Path, "touch", mock.Mock(side_effect=OSError(errno.EROFS, "Read-only")))
    with pytest.raises(ValueError, match="Read-only"):
        check_folder(small(), "")


def test_rank_0_alone_checks_the_folder(here, monkeypatch):
    """All ranks would print the changed settings, and write over each other."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(support.run, "check_folder", mock.Mock(side_effect=AssertionError))
    support.run.prepare(small())


@pytest.mark.parametrize("steps, trained", [(2, []), (5, [5])])
def test_a_finished_run_says_so_and_ends_well(of_a_run, monkeypatch, capsys, steps, trained):
    monkeypatch.setattr(drgrpo, "prepare", lambda config: (None, [], [], {}))
    found = []
    monkeypatch.setattr(drgrpo, "train", lambda config, *given: not found.append(config.steps))
    command = f"drgrpo.py toy --model base --name run --steps {steps}"
    monkeypatch.setattr(sys, "argv", command.split())
    drgrpo.main()
    assert found == trained
    said = "runs/run is finished: 2 steps. --steps N goes on with it.\n"
    assert capsys.readouterr().out == ("" if trained else said)


def test_a_stopped_run_and_a_refused_one_end_with_a_message(here, monkeypatch):
    monkeypatch.setattr(sys, "argv", "drgrpo.py toy --model base --name run".split())
    prepare = mock.Mock(side_effect=ValueError("no such file"))
    monkeypatch.setattr(drgrpo, "prepare", prepare)
    with pytest.raises(SystemExit) as ended:
        drgrpo.main()
    assert ended.value.code == "error: no such file"
    prepare.side_effect = None
    prepare.return_value = ()
    monkeypatch.setattr(drgrpo, "train", lambda config: False)
    with pytest.raises(SystemExit) as ended:
        drgrpo.main()
    assert ended.value.code.startswith("runs/run is stopped") and "same command" in ended.value.code


def test_config_json_says_how_the_run_was_made(unbroken):
    run = json.loads((unbroken / "config.json").read_text())
    assert run["finished"] == 4 and run["settings"] == json.loads(json.dumps(asdict(small())))
    assert {"python", "torch", "transformers", "model_commit"} <= set(run["versions"])
    assert set(run["dropped_problems"].values()) == {0} and len(run["asked"]) == 64


def test_a_run_leaves_two_states_one_export_and_nothing_half_done(unbroken):
    assert sorted(os.listdir(unbroken / "state")) == ["3", "4"]
    expected = {"config.json", "metrics.jsonl", "model", "samples.jsonl", "state", "export-2"}
    assert {file.name for file in unbroken.iterdir()} == expected


# ------------------------------------------------------------------------- several ranks


@pytest.fixture(scope="session")
def unbroken_of_two(base, tmp_path_factory):
    folder = furnish(tmp_path_factory.mktemp("two"), base)
    on_ranks(2, train_here, {}, folder=folder)
    return folder / RUN


def assert_nearly_as(folder, other):
    """As assert_as, to floating-point tolerance."""
    (rows, _, weights), (others, _, other_weights) = map(contents, (folder, other))
    samples, other_samples = (read_jsonl(each / "samples.jsonl") for each in (folder, other))
    assert [s["response"] for s in samples] == [s["response"] for s in other_samples]
    for row, expected in zip(rows, others, strict=True):
        for key in expected.keys() - {"gap"}:
            assert row[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5), key
    for name, weight in other_weights.items():
        assert torch.allclose(weights[name], weight, atol=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("phase", ["sampling", "the middle of an update", "a save", "an export"])
def test_two_ranks_of_which_one_is_killed_end_as_unbroken(here, unbroken_of_two, phase, rank):
    if phase == "an export" and rank == 1:  # rank 1 writes none
        phase = "sync"
    on_ranks(2, train_here, {}, rank, *KILLS[phase], signal.SIGKILL, folder=here, fails=True)
    goes_on_as(here, unbroken_of_two, world=2)


@pytest.mark.slow
def test_if_one_of_two_ranks_is_asked_to_stop_both_finish_the_step(here, unbroken_of_two):
    stop = (1, "drgrpo:sample", 3, False, signal.SIGTERM)
    done = on_ranks(2, train_here, {"save_every": 100}, *stop, folder=here)
    assert [finished for finished, _ in done.results] == [False, False]
    assert done.printed.count("SIGTERM: the step in flight is finished") == 1
    assert saved_steps(RUN / "state") == [2]
    goes_on_as(here, unbroken_of_two, world=2)


ON_A_NODE = """
from support.run import start_ranks
from tests.runs import train

start_ranks()
train()
"""


@pytest.mark.slow
def test_a_run_goes_on_with_more_ranks_and_on_two_nodes(here, unbroken):
    """Two of torchrun's agents stand in for two nodes: (nodes, ranks) is a mesh of 2 x 2."""
    train(steps=1)
    on_ranks(2, train_here, {"steps": 2}, folder=here)
    Path("node.py").write_text(ON_A_NODE)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = "--nnodes=2 --nproc-per-node=2 --local-addr=127.0.0.1 --rdzv-backend=c10d"
    options += f" --rdzv-endpoint=127.0.0.1:{port} --rdzv-id=1 node.py"
    command = [sys.executable, "-m", "torch.distributed.run", *options.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(key, None)
    with Path("log").open("w") as log:
        nodes = [subprocess.Popen(command, env=environment, stdout=log, stderr=log) for _ in "ab"]
        assert [node.wait(timeout=400) for node in nodes] == [0, 0], Path("log").read_text()[-4000:]
    assert_nearly_as(RUN, unbroken)


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
    flip_bits(Path("state/3/__1_0.distcp"))
    with pytest.warns(match="state/3 is damaged: rank 0: ValueError: __1_0.distcp is not what"):
        assert Learner().states().load() == 1, "one rank reads what two have written"
