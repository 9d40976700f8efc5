"""Ranks: one process a GPU, started by torchrun, and what they tell each other."""

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous
from transformers.utils.logging import disable_progress_bar


def start_ranks(name: str = "", training: bool = False) -> None:
    """Join the process group that torchrun describes; without torchrun, a group of one.

    A second group in one process needs another name: torchrun's store still has the addresses of
    the first.
    """
    if training:  # what the policy frees can go back to the GPU. To be set before CUDA starts
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    for key, value in alone.items():
        os.environ.setdefault(key, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # keep the engine in this process
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    keep_engine_quiet()
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    store, rank, world = next(rendezvous("env://"))
    store = dist.PrefixStore(name, store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def keep_engine_quiet() -> None:
    """Leave out what vLLM and transformers print while they load, and a user can do nothing about.

    Errors are still shown, and VLLM_LOGGING_LEVEL=INFO shows all.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # vLLM warns once before it has set up its own handler; Python would print that
    logging.getLogger("vllm").addHandler(logging.NullHandler())
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    disable_progress_bar()


def mesh() -> DeviceMesh:
    """Ranks as FSDP uses them: (ranks,), or (nodes, ranks of a node) on several nodes.

    Weights are sharded over the ranks of a node and copied on every node, so that only gradients
    travel between nodes.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    world = dist.get_world_size()
    ranks_of_a_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    nodes = world // ranks_of_a_node
    if nodes == 1:
        return init_device_mesh(device, (world,))
    return init_device_mesh(device, (nodes, ranks_of_a_node), mesh_dim_names=("nodes", "ranks"))


def all_reduce(values: dict) -> dict[str, float]:
    """Each value's sum over the ranks."""
    vector = torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
    dist.all_reduce(vector)
    return dict(zip(values, vector.tolist(), strict=True))


def from_all_ranks(value: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks. All ranks get all of them."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_rows(rows: list[Any]) -> list[Any]:
    """All ranks' dataclass records, in the order of the ranks.

    Lists of numbers travel as arrays: pickled one by one, the token ids and log-probs of a round
    would be many times larger.
    """
    packed: dict[str, Any] = {}
    for field in fields(rows[0]) if rows else ():
        column = [getattr(row, field.name) for row in rows]
        if isinstance(column[0], list):
            flat = np.array([number for numbers in column for number in numbers])
            packed[field.name] = (flat, np.array([len(numbers) for numbers in column]))
        else:
            packed[field.name] = column
    everyone = []
    for kind, part in from_all_ranks((type(rows[0]) if rows else None, packed)):
        columns = []
        for column in part.values():
            if isinstance(column, tuple):
                flat, lengths = column
                pieces = np.split(flat, np.cumsum(lengths)[:-1])
                column = [piece.tolist() for piece in pieces]
            columns.append(column)
        everyone += [kind(*values) for values in zip(*columns, strict=True)]
    return everyone


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def check_shared_folder(folder: Path) -> None:
    """Raises ValueError if ranks, on several nodes, do not see one and the same folder."""
    token = from_rank_0(os.urandom(8).hex())
    file = folder / ".shared"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(token)
    dist.barrier()
    seen = file.exists() and file.read_text() == token
    missing = all_reduce({"missing": not seen})["missing"]
    dist.barrier()
    if dist.get_rank() == 0:
        file.unlink()
    if missing:
        raise ValueError(
            f"{missing:.0f} ranks do not see what rank 0 writes to {folder}: the folder must be on "
            "a disk that all nodes share"
        )


@contextmanager
def timed(metrics: dict, phase: str) -> Iterator[None]:
    """Enter how long the block took as seconds_PHASE, what it started on the GPU included."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    metrics[f"seconds_{phase}"] = time.perf_counter() - start


REQUEUE = 75  # the exit code of a run that was stopped and wants to go on: EX_TEMPFAIL


class StopSignals:
    """Lets a run finish its step when it is asked to stop: by SIGTERM, SIGINT or SIGUSR1.

    A context manager. The first signal is noted, the second one ends the process at once.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received = False
        self.before: dict = {}

    def note(self, number: int, frame: Any) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = True
        name = signal.Signals(number).name
        print(f"{name}: the step in flight is finished and saved; again: stop now", file=sys.stderr)

    def on_any_rank(self) -> bool:
        """Whether any rank was asked to stop. All ranks must call it, and get the same answer."""
        return all_reduce({"received": self.received})["received"] > 0

    def __enter__(self) -> "StopSignals":
        for number in self.SIGNALS:
            self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
