"""Facts about `make toy`: what it runs, and what it shows of the run."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT, launch, read_jsonl, write_jsonl
from toy import show_run


def test_make_toy_trains_and_shows_the_run_and_starts_no_third_engine():
    done = subprocess.run(
        ["make", "-n", "--no-print-directory", "-o", ".venv/ready", "toy"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [
        ".venv/bin/python drgrpo.py toy",
        ".venv/bin/python toy.py --show",
    ]


@pytest.fixture
def finished_run(tmp_path):
    (tmp_path / "toy-base").mkdir()
    write_jsonl(tmp_path / "toy-base" / "test.jsonl", [{}] * 500)
    run = tmp_path / "toy"
    run.mkdir()
    rows = [
        {"step": 0, "eval_accuracy": 0.084, "eval_length": 8.04},
        {"step": 1},
        {"step": 2, "eval_accuracy": 0.5, "eval_length": 20.0},
        {"step": 3, "eval_accuracy": 0.998, "eval_length": 27.0},
    ]
    write_jsonl(run / "metrics.jsonl", rows)
    samples = [{"step": i // 2, "prompt": f"p{i}\n", "response": f"r{i}"} for i in range(6)]
    write_jsonl(run / "samples.jsonl", samples)
    return run


def test_a_run_is_shown_as_counts_and_as_a_response_before_and_after(finished_run, capsys):
    show_run(finished_run, finished_run.with_name("toy-base"))
    lines = capsys.readouterr().out.splitlines()
    assert "| before | 42 of 500 | 8.0 |" in lines
    assert "| after 3 steps | 499 of 500 | 27.0 |" in lines
    first, last = (
        lines.index("The first response of step 0:"),
        lines.index("The first response of step 2:"),
    )
    assert lines[first + 2 : first + 4] == ["p0", "r0"]
    assert lines[last + 2 : last + 4] == ["p4", "r4"]


def test_no_run_is_a_message(tmp_path):
    with pytest.raises(SystemExit, match="error: no run in .*: python drgrpo.py toy"):
        show_run(tmp_path / "toy")


def test_what_make_toy_shows_needs_no_import_that_takes_seconds():
    """torch, transformers and vLLM are for making the toy, not for showing a run."""
    code = "import sys, toy; print({'torch', 'transformers', 'vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
def test_the_toy_learns_to_work_its_problems_out(toy, tmp_path):
    """A quarter of the run of `make toy`. Its numbers hold on any CPU up to rounding."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "toy-base").symlink_to(toy)
    launch(1, ROOT / "drgrpo.py", "toy", folder=tmp_path, steps=10)
    rows = read_jsonl(tmp_path / "runs" / "toy" / "metrics.jsonl")
    before, after = rows[0]["eval_accuracy"], rows[10]["eval_accuracy"]
    assert before == pytest.approx(0.084, abs=0.01)
    assert after > 0.95
    assert rows[9]["reward"] > rows[0]["reward"] + 0.2
    shown = launch(1, ROOT / "toy.py", "--show", folder=tmp_path)
    assert f"| before | {round(before * 500)} of 500 |" in shown
    assert f"| after 10 steps | {round(after * 500)} of 500 |" in shown
