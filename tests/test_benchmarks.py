"""Facts about the benchmarks."""

import json

import pytest

from benchmarks.mutate import mutants
from benchmarks.shapes import length_mix
from tests.helpers import ROOT, launch

SOURCE = """
def outside(): return 1 + 1
def inside(a, b):
    a += 1
    if not a < b:
        print(a)
    return a.sum() * 2
"""


def test_each_change_is_in_one_place_of_the_functions_that_were_named():
    found = dict(mutants(SOURCE, ["inside"]))
    assert {what.partition(": ")[2] for what in found} == {
        "a += 1  ->  pass",
        "1  ->  2",
        "not a < b  ->  (a < b)",
        "a < b  ->  (a <= b)",
        "print(a)  ->  pass",
        "a.sum() * 2  ->  (a.sum() / 2)",
        "a.sum()  ->  (a)",
        "2  ->  3",
    }
    for mutant in found.values():
        compile(mutant, "mutant", "exec")
        lines = zip(SOURCE.splitlines(), mutant.splitlines(), strict=True)
        assert sum(old != new for old, new in lines) == 1


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
