"""Short runs with a tiny policy and random responses in place of an engine's, also in processes
that can be killed: a server imports everything once and forks for each run, which takes a second.
"""

import functools
import itertools
import json
import os
import pkgutil
import random
import signal
import socket
import subprocess
import sys
import traceback
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file

import drgrpo
import support.records
import support.run
from support.grader import Grader, Verdict
from support.run import is_finished, start_ranks
from templates import TEMPLATES
from tests.helpers import ROOT, TOY, FakeSampler, read_jsonl, write_jsonl


def small(**settings) -> drgrpo.Config:
    """Four short steps of two updates each, on the model and the data that `furnish` made."""
    usual = dict(
        name="run",
        model="base",
        dataset="train.jsonl",
        eval_dataset="test.jsonl",
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


def furnish(folder: Path, base: Path) -> Path:
    """Put what `small` needs into a folder: a link to the model, and the data."""
    (folder / "base").symlink_to(base)
    for name, count in (("train", 6), ("test", 4)):
        rows = [{"problem": f"{i}+{i}=", "answer": str(i % 3), "i": i} for i in range(count)]
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


class QuickGrader:
    """Compares strings, without workers."""

    def __init__(self, template: str):
        self.template = TEMPLATES[template]

    def verdicts(self, responses, answers, rows):
        found = [self.template.extract(text) in gold for text, gold in zip(responses, answers)]
        return [Verdict(float(right), right) for right in found]

    def close(self):
        pass


def train(change=lambda sampler: None, **settings) -> FakeSampler:
    """A run in the current folder as drgrpo.main makes it, but for the trial of the model and the
    drawing of curves, which take seconds.

    `change` may first change the sampler. Returns it; its `finished` is what drgrpo.train returned.
    """
    config, made = small(**settings), []

    @contextmanager
    def start(config):
        policy = drgrpo.make_policy(config)
        optimizer = torch.optim.AdamW(policy.parameters(), config.lr, (0.9, 0.95), fused=True)
        made.append(FakeSampler(policy))
        change(made[0])
        with ExitStack() as stack:
            grader = QuickGrader(config.template)
            if config.reward != "math":
                grader = stack.enter_context(Grader("none", 1, reward=config.reward))
            yield policy, optimizer, made[0], grader
            made[0].close()

    with (
        mock.patch.object(drgrpo, "start", start),
        mock.patch.object(support.run, "check_model"),
        mock.patch.object(support.records, "plot_curves"),
    ):
        prepared = support.run.prepare(config)
        assert not is_finished(config)
        finished = drgrpo.train(config, *prepared)
    made[0].finished = finished
    return made[0]


# ------------------------------------------------------------------- what a run has left


def contents(folder: Path) -> tuple[list[dict], bytes, dict[str, torch.Tensor]]:
    """Metrics without seconds, all of samples.jsonl, the model's weights."""
    rows = []
    for row in read_jsonl(folder / "metrics.jsonl"):
        rows.append({key: value for key, value in row.items() if "seconds" not in key})
    weights = load_file(folder / "model" / "model.safetensors")
    return rows, (folder / "samples.jsonl").read_bytes(), weights


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors are the same, to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def assert_as(folder: Path, other: Path) -> None:
    """Two runs left the same, to the bit."""
    (rows, samples, weights), (others, other_samples, other_weights) = map(
        contents, (folder, other)
    )
    assert rows == others
    assert samples == other_samples
    assert same(weights, other_weights)


# ------------------------------------------------------------------------ other processes


@dataclass
class Done:
    """What became of the ranks."""

    codes: list[int]  # exit codes; a signal's number below 0
    results: list  # what the function returned, on each rank that ended well
    printed: str


def on_ranks(world: int, function, *arguments, folder: Path, nodes=1, fails=False) -> Done:
    """Call a function of a test module on so many ranks, each a process, in a folder.

    Arguments and results are those that JSON knows. If one rank fails, the others are killed.
    """
    port, jobs = free_port(), []
    for rank in range(world):
        environment = {"RANK": rank, "LOCAL_RANK": rank % (world // nodes), "WORLD_SIZE": world}
        environment |= {"LOCAL_WORLD_SIZE": world // nodes}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port if world > 1 else 0}
        name = f"tests.{function.__module__.rpartition('.')[2]}:{function.__name__}"
        jobs.append([str(folder), environment, name, arguments])
    for old in (folder / "log", *folder.glob("result-*.json")):
        old.unlink(missing_ok=True)
    server = fork_server()
    server.stdin.write(json.dumps(jobs) + "\n")
    server.stdin.flush()
    codes = json.loads(server.stdout.readline())
    printed = (folder / "log").read_text()
    assert any(codes) == fails, f"{codes}\n{printed[-4000:]}"
    results = [json.loads(file.read_text()) for file in sorted(folder.glob("result-*.json"))]
    return Done(codes, results, printed)


def free_port() -> int:
    """Not one that the system hands out: somebody else could get it before we use it."""
    for port in random.sample(range(15000, 30000), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no free port")


@functools.cache
def fork_server() -> subprocess.Popen:
    """It ends when this process ends, because then nothing more comes."""
    foreign = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in foreign}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.runs"],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def serve() -> None:
    for line in sys.stdin:
        jobs = json.loads(line)
        ranks = {}
        for rank, job in enumerate(jobs):
            process = os.fork()
            if process == 0:
                do(*job)
            ranks[process] = rank
        codes = [0] * len(jobs)
        while ranks:
            process, status = os.wait()
            code = os.waitstatus_to_exitcode(status)
            codes[ranks.pop(process)] = code
            for other in ranks if code != 0 else ():
                os.kill(other, signal.SIGKILL)
        print(json.dumps(codes), flush=True)


def do(folder: str, environment: dict, name: str, arguments: list) -> None:
    """One rank. Never returns."""
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update({key: str(value) for key, value in environment.items()})
    signal.alarm(200)  # a hang ends
    code = 1
    try:
        start_ranks()
        result = pkgutil.resolve_name(name)(*arguments)
        Path(f"result-{environment['RANK']}.json").write_text(json.dumps(result))
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def signal_at(place: str, call: int, done: bool, number: int) -> None:
    """Let this process send itself a signal at the call of this number of a function, MODULE:NAME,
    before it begins or when it is done."""
    owner, name = place.rpartition("." if "." in place.partition(":")[2] else ":")[::2]
    owner = pkgutil.resolve_name(owner)
    function, calls = getattr(owner, name), itertools.count(1)

    def signalling(*arguments, **settings):
        now = next(calls) == call
        if now and not done:
            os.kill(os.getpid(), number)
        result = function(*arguments, **settings)
        if now and done:
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, signalling)


def train_here(settings: dict, rank: int | None = None, *when) -> list:
    """`train` on a rank; this one may get a signal, as `signal_at` says. Returns whether the run
    is finished, and what the sampler did."""
    if rank == torch.distributed.get_rank():
        signal_at(*when)
    sampler = train(**settings)
    return [sampler.finished, sampler.calls]


if __name__ == "__main__":
    serve()
