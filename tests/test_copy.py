"""The script, templates.py and support/ are a whole trainer: copied, killed, and going on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import psutil
import pytest
from transformers import AutoModelForCausalLM

from support.run import saved_steps
from tests.helpers import ROOT, TOY_EVAL, launch, wait_until
from tests.runs import assert_as, contents, same
from tests.test_run import assert_nearly_as

SETTINGS = """--model model --dataset train.jsonl --eval-dataset test.jsonl --steps 3 --eval-every 2
    --save-every 1 --prompts-per-step 8 --responses-per-update 32
    --tokens-per-microbatch 512""".split()


@pytest.fixture(scope="session")
def trainer(toy, tmp_path_factory):
    """A folder with a copy of the trainer, a model and two files of problems, and nothing else."""
    folder = tmp_path_factory.mktemp("copy")
    copied = subprocess.run(["cp", "-r", "drgrpo.py", "templates.py", "support", folder], cwd=ROOT)
    assert copied.returncode == 0
    shutil.copytree(toy / "model", folder / "model")
    for name in ("train", "test"):
        lines = (toy / f"{name}.jsonl").read_text().splitlines(keepends=True)[:40]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def begin(folder, name, ranks=1):
    """Start a run of three steps there, in a process group of its own. Nothing here is on its path;
    it prints to NAME.log."""
    ours = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH"}
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    torchrun += ["--shutdown-timeout=200", "--"]  # else it kills a step of more than 30 s
    command = [sys.executable, *(torchrun if ranks > 1 else []), "drgrpo.py", "toy", *SETTINGS]
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            [*command, "--name", name],
            cwd=folder,
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def finish(folder, name, ranks=1):
    """Give a command, and wait for its end. Returns the run's folder."""
    code = begin(folder, name, ranks).wait(timeout=400)
    assert code == 0, (folder / f"{name}.log").read_text()[-4000:]
    return folder / "runs" / name


def wait_for(process, file, text):
    """Until a file of a run that goes on has the text."""
    wait_until(
        lambda: process.poll() is not None or (file.exists() and text in file.read_text()), 300
    )
    assert process.poll() is None, "it has ended before"


@pytest.fixture(scope="session")
def unbroken(trainer):
    return finish(trainer, "unbroken")


@pytest.mark.slow
def test_a_copy_of_the_script_and_its_folder_trains(unbroken):
    rows, samples, _ = contents(unbroken)
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and len(samples.splitlines()) == 3 * 8 * 8
    assert max(row["gap"] for row in rows[:3]) < 1e-4
    assert (unbroken / "curves.png").stat().st_size > 10_000
    before = AutoModelForCausalLM.from_pretrained(unbroken.parents[1] / "model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(unbroken / "model").state_dict()
    assert after.keys() == before.keys() and not same(before, after)


@pytest.mark.slow
def test_eval_scores_a_saved_model_as_training_did(trainer, unbroken):
    settings = dict(tasks=trainer / "test.jsonl", output=trainer / "eval", model=unbroken / "model")
    launch(1, ROOT / "eval.py", **TOY_EVAL | settings)
    (scores,) = json.loads((trainer / "eval" / "results.json").read_text())["results"]
    last = contents(unbroken)[0][3]
    keys = [key for key in last if key.startswith("eval_") and key != "eval_reward"]
    assert last["eval_accuracy"] > 0
    assert {key: scores[key.removeprefix("eval_")] for key in keys} == {k: last[k] for k in keys}


@pytest.mark.slow
@pytest.mark.parametrize("ranks, sent", [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_real_run_that_is_killed_and_stopped_ends_as_the_unbroken_one(
    trainer, unbroken, ranks, sent
):
    """Ctrl-C goes to the whole group: the workers that grade must not hear it."""
    name, log = f"killed-{ranks}", trainer / f"killed-{ranks}.log"
    run = trainer / "runs" / name
    process = begin(trainer, name, ranks)
    wait_for(process, run / "metrics.jsonl", '{"step": 0')
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()  # ranks and grading workers, too, as if the machine were switched off
    process.wait()
    process = begin(trainer, name, ranks)
    wait_for(process, log, f"runs/{name}")  # "... goes on from step"
    (os.killpg if sent == signal.SIGINT else os.kill)(process.pid, sent)
    assert process.wait(timeout=200) == 1
    said = log.read_text()
    assert said.count(f"{sent.name}: the step in flight is finished") == ranks
    assert f"runs/{name} is stopped. The same command goes on with it." in said
    assert saved_steps(run / "state")
    assert finish(trainer, name, ranks) == run
    (assert_as if ranks == 1 else assert_nearly_as)(run, unbroken)
    finish(trainer, name, ranks)
    assert f"runs/{name} is finished: 3 steps. --steps N goes on with it." in log.read_text()


@pytest.mark.project
def test_no_file_names_a_place_on_somebodys_machine():
    private = re.compile(r"/(?:home|Users|root|work)/\w")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = [name for name in listed.stdout.split("\0") if name and name != "tests/test_copy.py"]
    assert names or listed.returncode != 0
    files = [ROOT / name for name in names]
    texts = {file: file.read_text(errors="ignore") for file in files if file.is_file()}
    assert [str(file) for file, text in texts.items() if private.search(text)] == []
