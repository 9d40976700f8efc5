"""Facts about the golden step: drgrpo.py makes it, and no trainer with a usual mistake does."""

import gzip
import json
from copy import deepcopy
from dataclasses import replace

import pytest

import drgrpo
from findings import golden_step

GOLDEN = json.loads(gzip.decompress(golden_step.FILE.read_bytes()))
GIVEN = GOLDEN["given"]


@pytest.fixture(autouse=True)
def toy_in_the_repository(ranks, toy):
    """The stored step is of the toy, which these fixtures bring, and needs a process group."""


def wrong_stages(found: dict, method: str = "dr_grpo") -> list[str]:
    """The stages that differ by more than their tolerance."""
    differences = golden_step.differences(GOLDEN["expected"][method], found)
    return [stage for stage, size in differences.items() if size > golden_step.TOLERANCES[stage]]


@pytest.mark.parametrize("method", golden_step.METHODS)
def test_drgrpo_makes_the_golden_step(method):
    found = golden_step.replay(GIVEN, golden_step.toy_config(method))
    assert wrong_stages(found, method) == []


def test_a_trainer_that_drops_eos_fails():
    given = deepcopy(GIVEN)
    for row in given["responses"]:
        if len(row["response_ids"]) < 72:
            row["response_ids"].pop()
            row["sampler_logprobs"].pop()
    found = golden_step.replay(given, golden_step.toy_config("dr_grpo"))
    assert {"loss", "moved"} <= set(wrong_stages(found))


@pytest.mark.parametrize("stage, mistake", [
    ("old_logprobs", {"temperature": 0.9}), ("advantages", {"divide_by_std": True})
])  # fmt: skip
def test_a_trainer_with_a_wrong_setting_fails(stage, mistake):
    config = replace(golden_step.toy_config("dr_grpo"), **mistake)
    assert stage in wrong_stages(golden_step.replay(GIVEN, config))


def test_a_trainer_that_divides_by_the_tokens_fails(monkeypatch):
    def collate(rows, denominator=1.0):
        return drgrpo.collate(rows, sum(len(row.response_ids) for row in rows))

    monkeypatch.setattr(golden_step, "collate", collate)
    found = golden_step.replay(GIVEN, golden_step.toy_config("dr_grpo"))
    assert {"loss", "grad_norm"} <= set(wrong_stages(found))


def test_a_trainer_with_the_old_logprobs_of_the_wrong_update_fails(monkeypatch):
    monkeypatch.setattr(drgrpo, "add_old_logprobs", lambda policy, updates, config: None)
    found = golden_step.replay(GIVEN, golden_step.toy_config("dr_grpo"))
    assert "loss" in wrong_stages(found)
