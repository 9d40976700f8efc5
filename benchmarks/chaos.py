"""Runs that are killed and go on end as the unbroken run: a table in Markdown.

    python benchmarks/chaos.py --kills 10 --terms 5 --repeated 10
    python benchmarks/chaos.py --kills 5 --terms 3 --repeated 0 --ranks 2

Each run is a few steps of the toy. It is killed inside a phase of one step, after a random delay:
with SIGKILL, every second time together with its process group (grader workers, other ranks), or
with SIGTERM, on which it must finish its step, save and exit with code 1. The same command is then
given again until it is finished. Its metrics (but for seconds), its samples and its weights must be
those of the unbroken run on as many ranks, to the byte.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import drgrpo
import support.run
from support.records import markdown, read_rows, versions

# Where to kill, and about how many seconds that takes
PHASES: dict[str, tuple[Any, str, float]] = {
    "start": (drgrpo, "make_policy", 1.0),
    "sampling": (drgrpo, "sample", 0.3),
    "grading": (drgrpo, "give_rewards", 0.02),
    "update": (drgrpo, "update", 0.15),
    "sync": (drgrpo.Sampler, "wake", 0.02),
    "evaluation": (drgrpo, "evaluate", 0.5),
    "saving": (support.run.States, "save", 0.05),
    "export": (drgrpo.Run, "export", 0.05),
}
SETTINGS = ["--prompts-per-step", "8", "--responses-per-update", "32", "--eval-every", "2"]


@dataclass(frozen=True)
class Options:
    """Kill runs and compare."""

    kills: int = 10  # runs killed once with SIGKILL
    terms: int = 5  # runs stopped once with SIGTERM
    repeated: int = 10  # how often one more run is killed
    ranks: int = 1
    steps: int = 6
    seed: int = 0


@dataclass(frozen=True)
class Kill:
    """One signal: to whom, when."""

    rank: int
    phase: str
    call: int  # of the phase's function
    delay: float  # seconds after this call begins
    signal: int
    group: bool  # to the whole process group


# ----------------------------------------------------------------------- in the run to be killed


def kill_inside(kill: Kill) -> None:
    """Let this process send itself the signal when the time has come."""
    owner, name, _ = PHASES[kill.phase]
    function = getattr(owner, name)
    calls = 0

    def send() -> None:
        time.sleep(kill.delay)
        os.kill(0 if kill.group else os.getpid(), kill.signal)  # 0 is the group

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == kill.call:
            threading.Thread(target=send, daemon=True).start()
        return function(*args, **kwargs)

    setattr(owner, name, counted)


# --------------------------------------------------------------------------------- the experiment


def start(options: Options, name: str, steps: int, kill: Kill | None = None) -> int:
    """One command; returns its exit code."""
    command = [sys.executable]
    if options.ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--shutdown-timeout", "60"]
        command += [f"--nproc-per-node={options.ranks}", "--"]
    command += [__file__, "child", json.dumps(asdict(kill) if kill else None)]
    command += ["toy", "--name", name, "--steps", str(steps), "--save-every", "1", *SETTINGS]
    with Path("runs", f"{name}.log").open("a") as log:
        settings: dict = dict(stdout=log, stderr=log, start_new_session=True)
        settings["env"] = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, **settings).returncode


def run_to_the_end(options: Options, name: str, steps: int) -> bool:
    """Give the command again until the run is finished."""
    return any(start(options, name, steps) == 0 for _ in range(3))


def fresh(name: str) -> None:
    shutil.rmtree(Path("runs", name), ignore_errors=True)
    Path("runs", f"{name}.log").unlink(missing_ok=True)


def contents(name: str) -> dict:
    """What a run left, without times."""
    folder = Path("runs", name)
    rows = []
    for row in read_rows(folder / "metrics.jsonl"):
        rows.append({key: value for key, value in row.items() if "seconds" not in key})
    return {
        "metrics": rows,
        "samples": (folder / "samples.jsonl").read_bytes(),
        "weights": (folder / "model" / "model.safetensors").read_bytes(),
    }


def outcome(unbroken: str, name: str, finished: bool) -> str:
    """ "yes" if the run is the unbroken one, else what differs."""
    if not finished:
        return "not finished"
    one, other = contents(unbroken), contents(name)
    return ", ".join(key for key in one if one[key] != other[key]) or "yes"


def kill_once(options: Options, number: int, place: int, draw: random.Random) -> list[str]:
    """One run, killed in the phase whose turn it is. A row of the table."""
    phase = list(PHASES)[place % len(PHASES)]
    call = 1 if phase == "start" else draw.randint(1, 2 if phase == "export" else 3)
    delay = draw.uniform(0, PHASES[phase][2])
    kill = Kill(place // 2 % options.ranks, phase, call, delay, int(number), place % 2 == 1)
    fresh("chaos-once")
    code = start(options, "chaos-once", options.steps, kill)
    finished = run_to_the_end(options, "chaos-once", options.steps)
    result = outcome("chaos", "chaos-once", finished)
    if number == signal.SIGTERM and phase != "start" and code != 1:
        result = f"exit code {code}"
    whom = "the whole group" if kill.group else "the main process"
    name = signal.Signals(number).name
    return [name, phase, str(call), f"{delay:.2f}", whom, str(code), result]


def kill_often(options: Options, draw: random.Random) -> list[str]:
    """One run that is killed again and again, each time in a random phase of its first steps."""
    steps = 2 * options.repeated  # it gets on between two kills
    fresh("chaos-long")
    fresh("chaos-often")
    start(options, "chaos-long", steps)
    killed = 0
    for _ in tqdm(range(options.repeated), "one run killed often"):
        phase = draw.choice(["sampling", "grading", "update", "sync", "saving"])
        delay = draw.uniform(0, PHASES[phase][2])
        kill = Kill(0, phase, draw.randint(2, 4), delay, int(signal.SIGKILL), True)
        if start(options, "chaos-often", steps, kill) != 0:
            killed += 1
    finished = run_to_the_end(options, "chaos-often", steps)
    result = outcome("chaos-long", "chaos-often", finished)
    return ["SIGKILL", "any", "", "", f"one run, {killed} times", "", result]


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        kill = json.loads(sys.argv[2])
        sys.argv = ["drgrpo.py", *sys.argv[3:]]
        if kill and os.environ.get("RANK", "0") == str(kill["rank"]):
            kill_inside(Kill(**kill))
        drgrpo.main()
        return
    options = tyro.cli(Options, description=__doc__)
    draw = random.Random(options.seed)
    fresh("chaos")
    if start(options, "chaos", options.steps) != 0:
        sys.exit("the unbroken run failed: see runs/chaos.log")
    table = []
    turns = [signal.SIGKILL] * options.kills + [signal.SIGTERM] * options.terms
    for place, number in enumerate(tqdm(turns, "runs killed once")):
        table.append(kill_once(options, number, place, draw))
    if options.repeated:
        table.append(kill_often(options, draw))
    head = ["signal", "inside", "call", "seconds after", "to", "exit code", "as the unbroken run"]
    print(markdown(head, table))
    same = [row for row in table if row[-1] == "yes"]
    print(f"\n{len(same)} of {len(table)} end as the unbroken run, to the byte. ", end="")
    print(f"{options.ranks} rank(s); " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    sys.exit(len(same) != len(table))


if __name__ == "__main__":
    main()
