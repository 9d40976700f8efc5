"""Facts about a run: it goes on after anything that stops it, and its folder tells no lies.

Most runs here have a tiny policy and random responses in place of an engine's: tests/runs.py.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoTokenizer

import drgrpo
import support.run
from drgrpo import full_weights
from support.run import check_folder, is_finished, saved_steps, what_is_asked
from tests.helpers import ROOT, read_jsonl, write_jsonl
from tests.runs import (
    assert_as,
    contents,
    free_port,
    furnish,
    on_ranks,
    same,
    small,
    train,
    train_here,
)

RUN = Path("runs/run")


@pytest.fixture(scope="session")
def unbroken(base, tmp_path_factory):
    """The folder of an unbroken run of four steps."""
    folder = furnish(tmp_path_factory.mktemp("unbroken"), base)
    on_ranks(1, train_here, {}, folder=folder)
    return folder / RUN


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
    assert expected in done.printed
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_finishes_its_step_and_saves(here, unbroken, number):
    asked = (0, "drgrpo:sample", 3, False, number)
    done = on_ranks(1, train_here, {"save_every": 100}, *asked, folder=here)
    assert done.results[0][0] is False
    assert "the step in flight is finished and saved; again: stop now" in done.printed
    assert saved_steps(RUN / "state") == [2], "steps 0 and 1 are done"
    assert len(read_jsonl(RUN / "metrics.jsonl")) == 2 and not is_finished(small())
    train()
    assert_as(RUN, unbroken)


def test_an_error_waits_for_the_save_and_does_not_finish_the_run(here, unbroken):
    """The save that is under way is a step's work."""
    broken = mock.Mock(side_effect=RuntimeError("broken"))

    def change(sampler):
        works = sampler.generate
        sampler.generate = lambda *given: broken() if len(sampler.seeds) == 2 else works(*given)

    with pytest.raises(RuntimeError, match="broken"):
        train(lambda sampler: setattr(sampler, "generate", broken))
    assert not is_finished(small())
    with pytest.raises(RuntimeError, match="broken"):
        train(change)
    assert saved_steps(RUN / "state") == [1] and not is_finished(small())
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


@pytest.mark.parametrize("gpu, names", [(False, r"g\+\+"), (True, "gcc or clang")])
def test_a_missing_compiler_is_named_before_a_model_loads(here, monkeypatch, gpu, names):
    """torch and vLLM compile when the engine starts; their own errors are pages long."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("CXX", "g++ -O1")
    support.run.check_compiler()
    for variable in ("CXX", "CC"):
        monkeypatch.setenv(variable, "")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match=f"no compiler {names}: install it"):
        support.run.prepare(small())


def test_rank_0_alone_checks_the_folder(here, monkeypatch):
    """All ranks would print the changed settings, and write over each other."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(support.run, "check_folder", mock.Mock(side_effect=AssertionError))
    support.run.prepare(small())


def test_a_refused_run_ends_with_a_message(monkeypatch):
    monkeypatch.setattr(sys, "argv", "drgrpo.py toy --model base".split())
    monkeypatch.setattr(drgrpo, "prepare", mock.Mock(side_effect=ValueError("no such file")))
    with pytest.raises(SystemExit, match="^error: no such file$"):
        drgrpo.main()


def test_config_json_says_how_the_run_was_made(unbroken):
    run = json.loads((unbroken / "config.json").read_text())
    assert run["finished"] == 4 and run["settings"] == json.loads(json.dumps(asdict(small())))
    assert {"python", "torch", "transformers", "model_commit"} <= set(run["versions"])
    assert set(run["dropped_problems"].values()) == {0} and len(run["asked"]) == 64


def test_a_run_leaves_two_states_one_export_and_nothing_half_done(unbroken):
    assert sorted(os.listdir(unbroken / "state")) == ["3", "4"]
    expected = {"config.json", "metrics.jsonl", "model", "samples.jsonl", "state", "export-2"}
    assert {file.name for file in unbroken.iterdir()} == expected
    rows = read_jsonl(unbroken / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [0, 2, 4]


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
    options = "--nnodes=2 --nproc-per-node=2 --local-addr=127.0.0.1 --rdzv-backend=c10d"
    options += f" --rdzv-endpoint=127.0.0.1:{free_port()} --rdzv-id=1 node.py"
    command = [sys.executable, "-m", "torch.distributed.run", *options.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(key, None)
    with Path("log").open("w") as log:
        nodes = [subprocess.Popen(command, env=environment, stdout=log, stderr=log) for _ in "ab"]
        assert [node.wait(timeout=400) for node in nodes] == [0, 0], Path("log").read_text()[-4000:]
    assert_nearly_as(RUN, unbroken)
