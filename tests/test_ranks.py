"""Facts about ranks: what they tell each other, how they are laid out, how they are stopped."""

import os
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

import support.records
import support.run
from support.run import (
    States,
    all_reduce,
    end_ranks,
    from_all_ranks,
    mesh,
    start_ranks,
    stop_signals,
)
from tests.helpers import launch
from tests.runs import on_ranks


def talk(folders):
    """Of two ranks, which see these folders."""
    rank = dist.get_rank()
    found = [all_reduce({"a": rank + 1, "b": 0.5}), from_all_ranks(f"of rank {rank}")]
    with stop_signals() as asked:
        found.append(asked())
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        found.append(asked())
    errors = []
    for folder in folders[rank]:
        try:
            errors.append(States(Path(folder, "state"), None, None).load())
        except ValueError as error:
            errors.append(str(error).replace(folder, "FOLDER"))
    return [found, errors]


def test_two_ranks_hear_the_same_and_must_see_the_same_folder(tmp_path):
    for name in ("shared", "mine/state/3", "yours/state/4"):
        (tmp_path / name).mkdir(parents=True)
    for state in tmp_path.glob("*/state/*"):
        (state / ".metadata").touch()
    folders = (("shared", "shared", "mine"), ("shared", "nowhere", "yours"))
    done = on_ranks(2, talk, folders, folder=tmp_path)
    assert done.results[0] == done.results[1]
    (sums, texts, before, after), errors = done.results[0]
    assert sums == {"a": 3.0, "b": 1.0} and texts == ["of rank 0", "of rank 1"]
    assert (before, after) == (False, True), "one rank was asked to stop, and all know it"
    not_shared = "ranks see different states in FOLDER/state: it must be on a disk that all nodes"
    assert errors[0] == 0 and all(error.startswith(not_shared) for error in errors[1:])


@pytest.mark.parametrize("world, ranks_of_a_node, shape, names", [
    (1, None, (1,), None),
    (8, "8", (8,), None),
    (16, "8", (2, 8), ("nodes", "ranks")),
    (2, "1", (2, 1), ("nodes", "ranks")),
])  # fmt: skip
def test_the_mesh_is_that_of_torchruns_nodes(monkeypatch, world, ranks_of_a_node, shape, names):
    made = mock.Mock()
    monkeypatch.setattr(support.run, "init_device_mesh", made)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks_of_a_node:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks_of_a_node)
    mesh()
    assert made.call_args.args[1] == shape
    assert made.call_args.kwargs.get("mesh_dim_names") == names


def groups_in_turn():
    found = []
    for _ in range(2):
        found.append(sum(from_all_ranks(1)))
        end_ranks()
        end_ranks()  # does no harm
        if os.environ["RANK"] == "0":
            time.sleep(1)  # the others must wait for the new group
        start_ranks()
    return found


def test_a_process_can_leave_its_group_and_join_another(tmp_path):
    assert on_ranks(1, groups_in_turn, folder=tmp_path).results == [[1, 1]]


IN_TORCHRUN = """
from support.run import start_ranks
from tests.test_ranks import groups_in_turn

start_ranks()
print(groups_in_turn())
"""


@pytest.mark.slow
def test_so_can_the_ranks_of_torchrun(tmp_path):
    """Its store still has the addresses of the first group."""
    (tmp_path / "twice.py").write_text(IN_TORCHRUN)
    assert launch(2, tmp_path / "twice.py", folder=tmp_path).count("[2, 2]") == 2


# --------------------------------------------------------------------------------- signals


def two_signals(first, second, seconds):
    """Two signals with so many seconds between them, in the middle of a step."""
    with stop_signals() as asked:
        os.kill(os.getpid(), first)
        with mock.patch.object(time, "monotonic", return_value=time.monotonic() + seconds):
            os.kill(os.getpid(), second)
        return asked()


@pytest.mark.parametrize("first, second", [
    (signal.SIGINT, signal.SIGINT),
    (signal.SIGTERM, signal.SIGINT),  # a user's Ctrl-C after a batch system's SIGTERM
])  # fmt: skip
def test_the_second_signal_ends_a_process_at_once(tmp_path, first, second):
    done = on_ranks(1, two_signals, first, second, 3.5, folder=tmp_path, fails=True)
    assert done.codes == [-second]
    name = signal.Signals(first).name
    assert f"{name}: the step in flight is finished and saved; again: stop now" in done.printed


def test_a_signal_that_comes_twice_by_way_of_torchrun_is_one(tmp_path):
    done = on_ranks(1, two_signals, signal.SIGINT, signal.SIGINT, 2.5, folder=tmp_path)
    assert done.results == [True] and done.printed.count("the step in flight") == 1


def test_after_a_run_signals_mean_what_they_did(ranks):
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(KeyError), stop_signals() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
        raise KeyError
    assert [signal.getsignal(number) for number in numbers] == before
