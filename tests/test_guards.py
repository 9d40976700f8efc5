"""Facts about the exact checks and the warnings of a run."""

import warnings

import pytest
import torch

from drgrpo import make_policy
from support.guards import PATIENCE, Warner, all_sent, probe, refuse_gap, refuse_rest
from tests.helpers import TOY

HEALTHY = {
    "groups_without_signal": 0.5,
    "weights_moved": 0.9,
    "truncated": 0.1,
    "entropy": 0.5,
    "timeouts": 0,
}


def told(*steps, responses=100):
    """The warnings of these steps, each a change of a healthy one."""
    warner = Warner(responses)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for step in steps:
            warner.look(step if "eval_reward" in step else HEALTHY | step)
    return [str(warning.message) for warning in seen]


def test_a_healthy_run_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warner = Warner(100)
        for _ in range(3 * PATIENCE):
            warner.look(HEALTHY)


@pytest.mark.parametrize("change, fine, message", [
    ({"weights_moved": 0.009}, {"weights_moved": 0.01}, "under 1% of the weights: raise --lr"),
    ({"truncated": 0.51}, {"truncated": 0.5}, "most responses are truncated: raise --max-resp"),
    ({"entropy": 0.0009}, {"entropy": 0.001}, "the entropy is near 0: .* Lower --lr"),
    ({"timeouts": 11}, {"timeouts": 10}, "a tenth of the gradings time out: raise --grader-t"),
])  # fmt: skip
def test_a_warning_says_what_to_try_once(change, fine, message):
    assert told(fine) == []
    found = told(change, {}, change, change)
    assert len(found) == 1
    with pytest.warns(match=message):
        Warner(100).look(HEALTHY | change)


def test_equal_rewards_are_a_warning_only_after_many_steps_in_a_row():
    silent = {"groups_without_signal": 1.0, "weights_moved": 0.0}
    assert told(*[silent] * (PATIENCE - 1)) == [], "nor do weights move where there is no signal"
    (message,) = told(*[silent] * PATIENCE)
    assert "equal for 10 steps" in message and "read samples.jsonl" in message
    assert told(*[silent] * (PATIENCE - 1), {}, *[silent] * (PATIENCE - 1)) == []
    assert len(told(*[silent] * (PATIENCE - 1), {"eval_reward": 1.0}, silent)) == 1


def test_an_evaluation_alone_says_nothing():
    assert told({"eval_reward": 0.0, "eval_truncated": 1.0}) == []


@pytest.mark.parametrize("gap, fine", [
    (0.0, True), (0.1, True), (0.11, False), (float("nan"), False), (float("inf"), False),
])  # fmt: skip
def test_a_gap_above_the_limit_is_refused_with_its_likely_causes(gap, fine):
    if fine:
        refuse_gap(gap, 0.1, "float32")
        return
    with pytest.raises(RuntimeError) as refused:
        refuse_gap(gap, 0.1, "float32")
    for cause in ("old weights", "prefix cache", "not sent", "temperature", "precision", "prompt"):
        assert cause in str(refused.value)
    assert "This update was not made" in str(refused.value)


@pytest.mark.parametrize("dtype, limit", [("bfloat16", 0.1), ("float32", 1e-3)])
def test_without_a_limit_the_gap_must_be_what_rounding_can_reach(dtype, limit):
    refuse_gap(limit, None, dtype)
    with pytest.raises(RuntimeError, match=f"above max_gap {limit:g}"):
        refuse_gap(1.01 * limit, None, dtype)


def test_all_weights_of_the_model_are_sent_and_no_other():
    weights = {name: torch.zeros(1) for name in ("a", "b", "c")}
    assert dict(all_sent(iter(weights.items()), {"a", "b", "c"})) == weights
    for expected, named in (
        ({"a", "b", "c", "d"}, "d"),
        ({"a", "b"}, "c"),
        ({"a", "x", "b"}, "c, x"),
    ):
        with pytest.raises(RuntimeError, match=f"not those of the model: {named}$"):
            list(all_sent(iter(weights.items()), expected))


def test_weights_that_the_sampler_left_over_are_named():
    weights = iter([(name, torch.zeros(1)) for name in ("a", "b", "c")])
    next(weights)
    with pytest.raises(RuntimeError, match="did not take all weights. Left over: b, c"):
        refuse_rest(weights)
    refuse_rest(weights)


def test_the_probe_sees_an_update_of_each_tensor(ranks, toy):
    policy = make_policy(TOY)
    before = probe(policy)
    for parameter in policy.parameters():
        with torch.no_grad():
            parameter.add_(1.0)
        after = probe(policy)
        assert (after != before).any(), "and is a copy"
        before = after
