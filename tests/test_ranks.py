"""Facts about ranks: what they tell each other, how they are laid out, how they are stopped."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import pytest
import torch.distributed as dist

import support.ranks
from drgrpo import Rollout
from support.grader import Verdict
from support.ranks import (
    REQUEUE,
    StopSignals,
    all_reduce,
    check_shared_folder,
    from_rank_0,
    gather_rows,
    mesh,
)
from tests.helpers import ROOT, launch, some_rollouts

# --------------------------------------------------------------------------------- records


@dataclass
class Record:
    """A column of each kind."""

    text: str | None
    ids: list[int]
    logprobs: list[float]
    right: bool | None = None


def kinds(value):
    """The types of a value and of all within it."""
    if isinstance(value, list):
        return [kinds(entry) for entry in value]
    return type(value)


RECORDS = {
    "rollouts": some_rollouts(),
    "one": some_rollouts(1),
    "none": [],
    "no numbers": [Record(None, [], []), Record("", [], [], True)],
    "some numbers": [Record("a", [], [-0.5]), Record("b", [3, 2**40], []), Record("c", [], [])],
    "odd numbers": [
        Record("x", [0], [float("-inf"), -1e-300, 0.1 + 0.2]),
        Record("y", [1], [-0.0]),
    ],
    "verdicts": [Verdict(1.0, True), Verdict(0.0, None, "timeout"), Verdict(0.25, None)],
}


@pytest.mark.parametrize("name", RECORDS)
def test_gathered_records_are_what_they_were(ranks, name):
    rows = RECORDS[name]
    found = gather_rows(rows)
    assert repr(found) == repr(rows), "-0.0 and -inf, too"
    for row, original in zip(found, rows, strict=True):
        assert type(row) is type(original)
        assert {k: kinds(v) for k, v in vars(row).items()} == {
            k: kinds(v) for k, v in vars(original).items()
        }


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (3, 0), (2, 1), (1, 1, 0, 4)])
def test_records_come_in_the_order_of_the_ranks_and_a_rank_may_have_none(monkeypatch, counts):
    """Each rank's part is made by itself, and all parts are then given to one of them."""
    parts, everyone = [], []
    for rank, count in enumerate(counts):
        rows = [replace(row, text=f"rank {rank}") for row in some_rollouts(count, seed=rank)]
        everyone += rows
        monkeypatch.setattr(support.ranks, "from_all_ranks", lambda part: parts.append(part) or [])
        assert gather_rows(rows) == []
    monkeypatch.setattr(support.ranks, "from_all_ranks", lambda part: parts)
    assert gather_rows([]) == everyone


def test_numbers_travel_as_arrays(ranks, monkeypatch):
    """Pickled one by one they would be many times larger."""
    rows = [Rollout(0, list(range(200)), list(range(3000)), [-0.25] * 3000) for _ in range(8)]
    sizes = []
    monkeypatch.setattr(
        support.ranks,
        "from_all_ranks",
        lambda part: [sizes.append(len(pickle.dumps(part))), part][1:],
    )
    assert gather_rows(rows) == rows
    assert sizes[0] < 8 * (3200 * 8 + 3000 * 8) + 3000


def test_sums_are_over_the_ranks_by_name(ranks):
    assert all_reduce({"a": 1, "b": True, "c": 0.1}) == {"a": 1.0, "b": 1.0, "c": 0.1}
    assert all_reduce({}) == {}
    assert from_rank_0({"any": ["thing"]}) == {"any": ["thing"]}


TALK = """
import json, os, sys
import torch.distributed as dist
from dataclasses import replace
from support.grader import Verdict
from support.ranks import all_reduce, check_shared_folder, from_rank_0, gather_rows, start_ranks
from pathlib import Path
from tests.helpers import some_rollouts

start_ranks()
rank = dist.get_rank()
found = {}
for name, counts in (("both", (2, 3)), ("second", (0, 3)), ("first", (3, 0)), ("none", (0, 0))):
    rows = [replace(row, text=f"rank {rank}") for row in some_rollouts(counts[rank], seed=rank)]
    found[name] = repr(gather_rows(rows))
found["verdicts"] = repr(gather_rows([Verdict(float(rank), None, None if rank else "oops")]))
found["sum"] = all_reduce({"a": rank + 1})
found["first rank's"] = from_rank_0(f"of rank {rank}")
check_shared_folder(Path("shared"))
try:
    check_shared_folder(Path(f"of-rank-{rank}"))
except ValueError as error:
    found["not shared"] = str(error).replace("of-rank-1", "of-rank-0")
found["left"] = sorted(file.name for file in Path("shared").iterdir())
Path(f"found-{rank}.json").write_text(json.dumps(found))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_get_the_same_records_in_the_same_order(tmp_path):
    (tmp_path / "talk.py").write_text(TALK)
    launch(2, tmp_path / "talk.py", folder=tmp_path)
    one, two = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1))
    assert one == two

    def rows(*counts):
        made = []
        for rank, count in enumerate(counts):
            made += [replace(r, text=f"rank {rank}") for r in some_rollouts(count, seed=rank)]
        return repr(made)

    assert one["both"] == rows(2, 3) and one["none"] == "[]"
    assert one["second"] == rows(0, 3) and one["first"] == rows(3, 0)
    assert one["verdicts"] == repr([Verdict(0.0, None, "oops"), Verdict(1.0, None)])
    assert one["sum"] == {"a": 3.0} and one["first rank's"] == "of rank 0"
    assert "1 ranks do not see what rank 0 writes to of-rank" in one["not shared"]
    assert one["left"] == []


# ----------------------------------------------------------------------- nodes and folders


@pytest.mark.parametrize("world, ranks_of_a_node, shape, names", [
    (1, None, (1,), None),
    (8, None, (8,), None),
    (8, "8", (8,), None),
    (16, "8", (2, 8), ("nodes", "ranks")),
    (2, "1", (2, 1), ("nodes", "ranks")),
    (12, "4", (3, 4), ("nodes", "ranks")),
])  # fmt: skip
def test_the_mesh_is_that_of_torchruns_nodes(monkeypatch, world, ranks_of_a_node, shape, names):
    made = []
    monkeypatch.setattr(
        support.ranks,
        "init_device_mesh",
        lambda device, shape, mesh_dim_names=None: made.append((shape, mesh_dim_names)),
    )
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks_of_a_node:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks_of_a_node)
    mesh()
    assert made == [(shape, names)]


def test_a_shared_folder_is_made_and_nothing_is_left_in_it(ranks, tmp_path):
    check_shared_folder(tmp_path / "runs" / "new")
    assert list((tmp_path / "runs" / "new").iterdir()) == []


def test_a_folder_that_another_node_does_not_see_is_refused(ranks, tmp_path, monkeypatch):
    """This rank has an old token there, as one that sees another disk would have."""
    monkeypatch.setattr(support.ranks, "from_rank_0", lambda token: "another")
    (tmp_path / ".shared").write_text("old")
    monkeypatch.setattr(type(tmp_path), "write_text", lambda file, text: None)
    with pytest.raises(ValueError, match="on a disk that all nodes share"):
        check_shared_folder(tmp_path)


ALONE = """
import os
import torch.distributed as dist
from support.ranks import start_ranks

start_ranks()
start_ranks_again = dist.get_world_size(), dist.get_rank(), dist.get_backend()
dist.destroy_process_group()
start_ranks("again")
print(*start_ranks_again, dist.get_world_size(), os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"])
"""


def test_without_torchrun_there_is_a_group_of_one_and_another_after_it():
    assert launch(1, "-c", ALONE).split()[-5:] == ["1", "0", "gloo", "1", "0"]


# --------------------------------------------------------------------------------- signals

# A process that is asked to stop again and again while it is in the middle of something
BUSY = """
import sys, time
from support.ranks import StopSignals

with StopSignals() as signals:
    print("ready", flush=True)
    while not signals.received:
        time.sleep(0.01)
    print("noted", flush=True)
    time.sleep(float(sys.argv[1]))
print("finished", flush=True)
time.sleep(float(sys.argv[2]))
"""


def busy(seconds, after=0.0):
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, str(seconds), str(after)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_the_first_signal_lets_the_step_finish_and_after_the_run_it_means_what_it_did():
    process = busy(0.2, after=100)
    process.send_signal(signal.SIGUSR1)
    assert [process.stdout.readline() for _ in "ab"] == ["noted\n", "finished\n"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == -signal.SIGTERM
    _, errors = process.communicate()
    assert "SIGUSR1: the step in flight is finished and saved; again: stop now" in errors


def test_the_second_signal_ends_the_process_at_once():
    """Another one than the first: a user's Ctrl-C after a batch system's SIGTERM."""
    process = busy(100)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "noted\n"
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == -signal.SIGINT
    assert time.monotonic() - start < 20
    process.communicate()


@pytest.mark.parametrize("number", StopSignals.SIGNALS)
def test_ranks_agree_on_whether_one_of_them_was_asked_to_stop(ranks, number):
    before = [signal.getsignal(each) for each in StopSignals.SIGNALS]
    with StopSignals() as signals:
        assert not signals.on_any_rank()
        os.kill(os.getpid(), number)
        assert signals.received and signals.on_any_rank()
    assert [signal.getsignal(each) for each in StopSignals.SIGNALS] == before
    assert REQUEUE == os.EX_TEMPFAIL
