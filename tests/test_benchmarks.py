"""Facts about the benchmarks."""

import json

import pytest

from benchmarks.shapes import length_mix
from tests.helpers import ROOT, launch


@pytest.mark.slow
def test_the_step_benchmark_takes_a_real_step_apart(toy):
    settings = dict(shape="toy", longest=40, prompt_tokens=8, prompts=4, samples=4, updates=2)
    settings |= dict(steps=1, warmup=0)
    printed = launch(1, ROOT / "benchmarks" / "step.py", "--json", **settings)
    found = json.loads(printed.splitlines()[-1])
    lengths = length_mix(4, 40)
    assert found["sampled"] == 4 * sum(lengths) and found["trained"] == 4 * (sum(lengths) + 4 * 8)
    assert found["real_tokens"] == 1
    assert 0 < found["seconds_old_logprobs"] < found["seconds_update"] < found["seconds_step"]
