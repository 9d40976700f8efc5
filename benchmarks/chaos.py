"""Runs that are killed and go on end as the unbroken run: a table in Markdown.

    python benchmarks/chaos.py --kills 20 --repeated 20 --terms 5
    python benchmarks/chaos.py --kills 5 --repeated 0 --terms 5 --ranks 2

Each run is a few steps of the toy. It is killed inside a phase of one step, after a random delay:
with SIGKILL, every second time together with its process group (grader workers, other ranks), or
with SIGTERM, on which it must finish its step, save and exit with code 75 (1 under torchrun). The
same command is then given again until it is finished. Its metrics (but for seconds), samples and
weights must be those of the unbroken run on as many ranks, to the bit.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import load_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import drgrpo
import support.run
from support.checkpoint import StateKeeper
from support.metrics import markdown, read_rows, versions

# Where to kill, and about how many seconds that takes
PHASES: dict[str, tuple[Any, str, float]] = {
    "start": (drgrpo, "make_policy", 1.0),
    "sampling": (drgrpo, "sample", 0.3),
    "grading": (drgrpo, "score", 0.02),
    "update": (drgrpo, "update", 0.15),
    "sync": (drgrpo.Sampler, "wake", 0.02),
    "evaluation": (drgrpo, "score_held_out", 0.5),
    "saving": (StateKeeper, "write", 0.03),
    "export": (support.run, "save_model", 0.03),
}
NOBODY = ("no rank", "start", 0, 0, 0, False)
SETTINGS = ["--prompts-per-step", "8", "--responses-per-update", "32", "--eval-every", "2"]


@dataclass(frozen=True)
class Options:
    """Kill runs and compare."""

    kills: int = 20  # runs killed once with SIGKILL
    repeated: int = 20  # how often one more run is killed
    terms: int = 5  # runs stopped once with SIGTERM
    ranks: int = 1
    steps: int = 6
    seed: int = 0


# ----------------------------------------------------------------------- in the run to be killed


def kill_inside(phase: str, call: int, delay: float, number: int, group: bool) -> None:
    """Let this process kill itself `delay` seconds after a phase's function is called for the
    `call`-th time."""
    owner, name, _ = PHASES[phase]
    function = getattr(owner, name)
    calls = 0

    def kill() -> None:
        time.sleep(delay)
        if group:
            os.killpg(os.getpgid(0), number)
        else:
            os.kill(os.getpid(), number)

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            threading.Thread(target=kill, daemon=True).start()
        return function(*args, **kwargs)

    setattr(owner, name, counted)


def run_child() -> None:
    """`chaos.py child RANK PHASE CALL DELAY SIGNAL GROUP ...`: a run with the arguments after
    these, of which this rank is killed."""
    rank, phase, call, delay, number, group = sys.argv[2:8]
    sys.argv = ["drgrpo.py", *sys.argv[8:]]
    if os.environ.get("RANK", "0") == rank:
        kill_inside(phase, int(call), float(delay), int(number), group == "True")
    drgrpo.main()


# --------------------------------------------------------------------------------- the experiment


def start(options: Options, name: str, steps: int, kill: tuple = NOBODY) -> int:
    """One command; returns its exit code."""
    launcher = [sys.executable]
    if options.ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--shutdown-timeout", "60"]
        launcher += [f"--nproc-per-node={options.ranks}", "--"]
    command = [*launcher, __file__, "child", *map(str, kill), "toy", "--name", name]
    command += ["--steps", str(steps), *SETTINGS]
    if options.ranks > 1:
        command += ["--save-every", "1"]
    with Path("runs", f"{name}.log").open("a") as log:
        done = subprocess.run(
            command,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    return done.returncode


def contents(name: str) -> dict:
    """What a run left, without times."""
    folder = Path("runs", name)
    rows = []
    for row in read_rows(folder / "metrics.jsonl"):
        rows.append({key: value for key, value in row.items() if "seconds" not in key})
    weights = load_file(folder / "model" / "model.safetensors")
    return {"metrics": rows, "samples": read_rows(folder / "samples.jsonl"), "weights": weights}


def same(one: dict, other: dict) -> str:
    """ "yes", or what differs."""
    wrong = [key for key in ("metrics", "samples") if one[key] != other[key]]
    for name, weight in one["weights"].items():
        if not torch.equal(weight, other["weights"][name]):
            wrong.append(name)
    return ", ".join(wrong) or "yes"


def finish(options: Options, name: str, steps: int) -> bool:
    """Give the command again until the run is finished."""
    for _ in range(3):
        if start(options, name, steps) == 0:
            return True
    return False


def fresh(name: str) -> None:
    shutil.rmtree(Path("runs", name), ignore_errors=True)
    Path("runs", f"{name}.log").unlink(missing_ok=True)


def kill_once(options: Options, name: str, number: int, place: int, draw: random.Random) -> list:
    """One run, killed in the phase whose turn it is. A line of the table."""
    phase = list(PHASES)[place % len(PHASES)]
    call = 1 if phase == "start" else draw.randint(1, 2 if phase in ("saving", "export") else 3)
    delay = draw.uniform(0, PHASES[phase][2])
    group = place % 2 == 1
    rank = place // 2 % options.ranks
    fresh(name)
    code = start(options, name, options.steps, (rank, phase, call, delay, int(number), group))
    finished = finish(options, name, options.steps)
    whom = "the whole group" if group else "the main process"
    outcome = same(contents("chaos"), contents(name)) if finished else "not finished"
    stopped = 75 if options.ranks == 1 else 1
    if number == signal.SIGTERM and phase != "start" and code != stopped:
        outcome = f"exit code {code}"
    cells = [signal.Signals(number).name, phase, str(call), f"{delay:.2f}", whom, str(code)]
    return [*cells, outcome]


def kill_often(options: Options, draw: random.Random) -> list:
    """One run that is killed again and again, each time in a random phase of its first steps."""
    name, steps = "chaos-often", 2 * options.repeated  # it gets on between two kills
    fresh("chaos-long")
    fresh(name)
    start(options, "chaos-long", steps)
    codes = []
    for _ in tqdm(range(options.repeated), "one run killed often"):
        phase = draw.choice(["sampling", "grading", "update", "sync", "saving"])
        call = draw.randint(2, 4)
        delay = draw.uniform(0, PHASES[phase][2])
        kill = (0, phase, call, delay, int(signal.SIGKILL), True)
        codes.append(start(options, name, steps, kill))
    finished = finish(options, name, steps)
    outcome = same(contents("chaos-long"), contents(name)) if finished else "not finished"
    killed = sum(1 for code in codes if code != 0)
    return ["SIGKILL", "any", "", "", f"one run, {killed} times", "", outcome]


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        run_child()
        return
    options = tyro.cli(Options, description=__doc__)
    draw = random.Random(options.seed)
    fresh("chaos")
    if start(options, "chaos", options.steps) != 0:
        sys.exit("the unbroken run failed: see runs/chaos.log")
    table = []
    turns = [signal.SIGKILL] * options.kills + [signal.SIGTERM] * options.terms
    for place, number in enumerate(tqdm(turns, "runs killed once")):
        table.append(kill_once(options, "chaos-once", number, place, draw))
    if options.repeated:
        table.append(kill_often(options, draw))
    head = ["signal", "inside", "call", "seconds after", "to", "exit code", "as the unbroken run"]
    print(markdown(head, table))
    different = [row for row in table if row[-1] != "yes"]
    print(
        f"\n{len(table) - len(different)} of {len(table)} end as the unbroken run, to the bit. "
        f"{options.ranks} rank(s); " + ", ".join(f"{k} {v}" for k, v in versions().items())
    )
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
