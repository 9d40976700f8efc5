"""Facts behind docs/traps.md that no other file states, and that the tests it names are there."""

import ast
import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import drgrpo
from benchmarks.traps import TRAPS
from drgrpo import collate, token_logprobs
from support.data import Problem
from support.grader import answers_match
from support.logprobs import definition
from templates import TEMPLATES
from tests.helpers import ROOT, TOY, tiny_model

PAGE = ROOT / "docs" / "traps.md"


def rows_of_the_table():
    """The cells of each trap."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if row[0] != "trap" and not set(row[0]) <= set("-: ")]


def names_of_tests():
    names = set()
    for file in (ROOT / "test_drgrpo.py", *(ROOT / "tests").glob("test_*.py")):
        tree = ast.parse(file.read_text())
        names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return names


def test_every_trap_has_a_test_that_is_there():
    rows, there = rows_of_the_table(), names_of_tests()
    assert len(rows) > 30
    for trap, tests in rows:
        named = re.findall(r"`(test_\w+)`", tests)
        assert named, f"no test: {trap}"
        assert set(named) <= there, trap


class NotingSampler:
    """Notes the seeds, and draws nothing."""

    def __init__(self):
        self.seeds = []

    def generate(self, problems, seeds, n, max_tokens, temperature, stop, finished):
        self.seeds += seeds
        assert len(problems) == len(seeds)
        return [[drgrpo.Rollout(0, p.prompt_ids, [1], [0.0])] * n for p in problems]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_no_two_ranks_draw_the_same(monkeypatch, world):
    """The same seeds are dealt to the same problems, whatever the number of ranks."""
    problems = [Problem("", [i], ["1"]) for i in range(5)]
    chosen, seeds = [4, 2, 2, 0, 1, 3, 4], [11, 12, 13, 14, 15, 16, 17]
    grader, drawn, found = type("", (), {"template": TEMPLATES["none"]}), [], []
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        sampler = NotingSampler()
        found += drgrpo.sample(sampler, grader, problems, chosen, seeds, 2, 1.0, TOY)
        drawn += sampler.seeds
    assert drawn == seeds
    assert [rollout.problem for rollout in found] == [p for p in chosen for _ in range(2)]
    assert [r.prompt_ids for r in found] == [[p] for p in chosen for _ in range(2)]


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_the_model_sees_special_tokens_inside_a_prompt(attention):
    """Id 0 is EOS and what rows are padded with; a chat prompt may hold it between two turns."""
    model = tiny_model(attention=attention)
    rollouts = [
        drgrpo.Rollout(0, [0, 5, 0, 0, 6], [7, 0], [0.0, 0.0]),
        drgrpo.Rollout(1, [9, 8, 0], [0], [0.0]),
        drgrpo.Rollout(2, [0], [3, 0, 4, 0], [0.0] * 4),
    ]
    batch = collate(rollouts)
    found = token_logprobs(model, batch.ids, batch.response_mask)
    model.set_attn_implementation("eager")
    for row, mask, rollout in zip(found, batch.response_mask.bool(), rollouts, strict=True):
        ids = torch.tensor(rollout.prompt_ids + rollout.response_ids)
        expected = definition(model, ids)[len(rollout.prompt_ids) - 1 :]
        assert torch.allclose(row[mask], expected, atol=2e-6)
        assert mask.sum() == len(rollout.response_ids), "EOS is trained"


@pytest.mark.parametrize("code", [
    "__import__('pathlib').Path('made').touch()",
    "open('made', 'w')",
    "(lambda: open('made', 'w'))()",
    "\\text{open('made', 'w')}",
    "x = open('made', 'w')",
])  # fmt: skip
def test_an_answer_is_never_run_as_code(tmp_path, monkeypatch, code):
    monkeypatch.chdir(tmp_path)
    for answer, gold in ((code, "1"), ("1", code), (code, f"{code} + 0")):
        try:
            answers_match(answer, gold)
        except Exception:  # a worker reports it as a failed grading
            pass
    assert list(tmp_path.iterdir()) == []


def test_the_denominator_holds_no_prompt():
    longer = replace(TOY, max_prompt_tokens=10 * TOY.max_prompt_tokens)
    assert longer.denominator == TOY.denominator


def test_every_trap_can_be_put_back():
    """benchmarks/traps.py knows every row of the page, and its edits still fit the code."""
    rows = [row[0] for row in rows_of_the_table()]
    assert len(TRAPS) == len(rows)
    for trap, row in zip(TRAPS, rows, strict=True):
        assert row.startswith(trap.begins)
        for name, old, new in trap.edits:
            assert (ROOT / name).read_text().count(old) == 1, (trap.begins, old)
            assert old != new
