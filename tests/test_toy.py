"""Facts about `make toy`: what it runs, and what it shows of the run."""

import pytest

from tests.helpers import ROOT, launch, read_jsonl


@pytest.mark.slow
def test_the_toy_learns_to_work_its_problems_out(toy_here, tmp_path):
    """A quarter of the run of `make toy`. Its numbers hold on any CPU up to rounding."""
    launch(1, ROOT / "drgrpo.py", "toy", folder=tmp_path, steps=10)
    rows = read_jsonl(tmp_path / "runs" / "toy" / "metrics.jsonl")
    before, after = rows[0]["eval_accuracy"], rows[10]["eval_accuracy"]
    assert before == pytest.approx(0.084, abs=0.01)
    assert after > 0.95
    assert rows[9]["reward"] > rows[0]["reward"] + 0.2
    shown = launch(1, ROOT / "toy.py", "--show", folder=tmp_path)
    assert f"| before | {round(before * 500)} of 500 |" in shown
    assert f"| after 10 steps | {round(after * 500)} of 500 |" in shown
    assert "The first response of step 0:" in shown and "The first response of step 9:" in shown
