"""What must stay true of the algorithm, as facts. `make test` runs them on a CPU in some minutes.

The engine has tests/test_engine.py, log-probs and models have tests/test_models.py. Where a trained
model is needed, it is the toy base model, which is made on first use.
"""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp

import drgrpo
import templates
from drgrpo import (
    PRESETS,
    Policy,
    Rollout,
    add_old_logprobs,
    collate,
    drgrpo_loss,
    forward_backward,
    give_rewards,
    group_advantages,
    learning_metrics,
    make_policy,
    micro_batches,
    split_updates,
    token_logprobs,
    update,
)
from support.data import Problem, derive_seed
from support.grader import Grader, Verdict
from tests.helpers import (
    TOY,
    FakeSampler,
    StoredSampler,
    assert_same,
    launch,
    read_jsonl,
    some_rollouts,
    tiny_model,
)
from tests.runs import train

pytest_plugins = ["tests.fixtures"]

NAN = float("nan")

# ------------------------------------------------------------------------------ advantages


def test_an_advantage_is_the_reward_minus_the_groups_mean():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]])
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]])
    assert torch.equal(group_advantages(rewards), expected)
    assert torch.equal(rewards, torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]])), "input is changed"
    for dtype in (torch.bool, torch.int64):
        assert torch.equal(group_advantages(rewards.to(dtype)), expected)
    assert group_advantages(rewards.double()).dtype == torch.float64


def test_grpo_divides_by_the_std_that_torch_computes_over_n_minus_1():
    rewards = torch.tensor([[1.0, 0, 0, 0], [8.0, 0, 0, 0], [0.1, 0.7, 0.2, 0.4]])
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    expected = centered / rewards.std(dim=1, keepdim=True)
    assert torch.allclose(group_advantages(rewards, divide_by_std=True), expected)


@pytest.mark.parametrize("divide_by_std", [False, True])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.01, 1 / 3])
def test_a_group_of_equal_rewards_has_no_advantage(reward, divide_by_std):
    """Not even a rounding error, which a division by the std would make large."""
    groups = torch.tensor([[-1.0] * 12, [reward] * 12, [reward] * 11 + [NAN]])
    assert torch.equal(group_advantages(groups, divide_by_std), torch.zeros(3, 12))


@pytest.mark.parametrize("divide_by_std", [False, True])
def test_an_unknown_reward_is_left_out_of_its_group(divide_by_std):
    rewards = torch.tensor([[1.0, NAN, 0, 0.5], [NAN, NAN, NAN, 1.0], [NAN] * 4])
    advantages = group_advantages(rewards, divide_by_std)
    of_three = group_advantages(torch.tensor([[1.0, 0, 0.5]]), divide_by_std)[0]
    assert advantages[0].tolist() == [*of_three[:1].tolist(), 0, *of_three[1:].tolist()]
    assert torch.equal(advantages[1:], torch.zeros(2, 4)), "of one known reward, and of none"


# ------------------------------------------------------------------------------ the loss


def test_loss_by_hand():
    # ratios 1.5 and 0.5 with A=+1: 1.5 is clipped to 1.2, 0.5 is not; with A=-2 it is the reverse
    logprobs = torch.tensor([[1.5, 0.5, 1.0], [1.5, 0.5, 9.0]]).log()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    args = (logprobs, torch.zeros(2, 3), torch.tensor([1.0, -2.0]), mask)
    loss, sums = drgrpo_loss(*args, 10.0)
    assert loss.item() == pytest.approx((-(1.2 + 0.5 + 1.0) + (2 * 1.5 + 2 * 0.8)) / 10)
    assert (sums["tokens"], sums["clipped"]) == (5, 2)
    k3 = sum(ratio - 1 - math.log(ratio) for ratio in (1.5, 0.5, 1.0, 1.5, 0.5))
    assert sums["kl"].item() == pytest.approx(k3, rel=1e-5)
    loss, sums = drgrpo_loss(*args, 10.0, clip_eps=0.4)
    assert loss.item() == pytest.approx((-(1.4 + 0.5 + 1.0) + (2 * 1.5 + 2 * 0.6)) / 10)


def test_divide_by_length_is_the_mean_over_each_response():
    logprobs, mask = torch.zeros(3, 3), torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    args = (logprobs, logprobs, torch.tensor([1.0, -2.0, 5.0]), mask)
    assert drgrpo_loss(*args, 2, divide_by_length=True)[0].item() == pytest.approx((-1 + 2) / 2)
    assert drgrpo_loss(*args, 6)[0].item() == pytest.approx((-3 + 2) / 6)


def test_padding_may_hold_anything():
    mask = torch.tensor([[1, 0, 0]])
    logprobs = torch.tensor([[-1.0, NAN, -math.inf]], requires_grad=True)
    old = torch.tensor([[-1.0, math.inf, -math.inf]])
    loss, sums = drgrpo_loss(
        logprobs, old, torch.ones(1), mask, 3, importance_weights=torch.tensor([[1.0, NAN, 2.0]])
    )
    loss.backward()
    assert loss.item() == pytest.approx(-1 / 3)
    assert logprobs.grad.tolist() == [[pytest.approx(-1 / 3), 0, 0]]
    assert all(torch.isfinite(value) for value in sums.values())
    assert not any(value.requires_grad for value in sums.values()), "they would keep the graph"


def test_importance_weights_are_constants_for_the_gradient():
    logprobs, weights = torch.zeros(1, 2, requires_grad=True), torch.tensor([[0.5, 2.0]])
    weights.requires_grad_()
    args = (logprobs, torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2), 1)
    loss, _ = drgrpo_loss(*args, importance_weights=weights)
    loss.backward()
    assert loss == -2.5 and logprobs.grad.tolist() == [[-0.5, -2.0]] and weights.grad is None


def test_wrong_shapes_and_denominators_are_refused():
    """Else one tensor would be stretched over all rows or tokens."""
    x, column, advantages = torch.ones(2, 3), torch.ones(2, 1), torch.ones(2)
    for logprobs, old, mask in ((column, x, x), (x, column, x), (x, x, column)):
        with pytest.raises(ValueError, match="one shape"):
            drgrpo_loss(logprobs, old, advantages, mask, 6)
    for wrong, denominator in ((x, 6), (column, 6), (advantages, 0)):
        with pytest.raises(ValueError, match="advantages"):
            drgrpo_loss(x, x, wrong, x, denominator)
    with pytest.raises(ValueError, match="one row a prompt"):
        group_advantages(torch.zeros(8))


# ------------------------------------------------ the expected gradient, by enumeration


def expected_gradients(divide_by_std=False, divide_by_length=False, train_eos=True):
    """(expected gradient of -loss, scaled by L_max * G/(G-1); gradient of the expected reward).

    The policy has two tokens, EOS (0) and 1, and writes at most L_max = 2 of them, so there are
    three responses: EOS; 1 EOS; and 1 1, which is truncated. All 3^G groups of responses to an
    easy prompt are enumerated, and all of those to a hard one.
    """
    model, longest, size = tiny_model(vocab_size=2), 2, 4
    loss, expected_reward = 0, 0
    for prompt, rewards in (([1], [0.9, 1.0, 0.3]), ([0, 1], [0.0, 0.0, 1.0])):
        rewards = torch.tensor(rewards)
        batch = collate([Rollout(0, prompt, r, [0.0] * len(r)) for r in ([0], [1, 0], [1, 1])])
        logprobs = token_logprobs(model, batch.ids, batch.response_mask)  # (3, T-1)
        mask = batch.response_mask * (train_eos or batch.ids[:, 1:] != 0)
        probability = logprobs.sum(dim=1).exp()
        assert probability.sum().item() == pytest.approx(1, abs=1e-6)
        expected_reward = expected_reward + (probability * rewards).sum()
        for group in map(list, itertools.product(range(3), repeat=size)):
            group_loss, _ = drgrpo_loss(
                logprobs[group],
                logprobs[group].detach(),
                group_advantages(rewards[None, group], divide_by_std)[0],
                mask[group],
                size * (1 if divide_by_length else longest),
                divide_by_length=divide_by_length,
            )
            loss = loss + probability[group].prod().detach() * group_loss
    gradients = []
    for function in (-loss * longest * size / (size - 1), expected_reward):
        parts = torch.autograd.grad(function, model.parameters(), retain_graph=True)
        gradients.append(torch.cat([part.flatten() for part in parts]))
    return gradients


def test_the_expected_gradient_is_that_of_the_expected_reward():
    expected, exact = expected_gradients()
    assert exact.abs().max() > 0.05
    assert (expected - exact).abs().max() < 1e-5


def distance_after_scaling(expected, exact):
    """A learning rate can scale a gradient: the largest difference that no scale mends."""
    best = expected * (expected @ exact) / (expected @ expected)
    return (best - exact).abs().max().item()


@pytest.mark.parametrize("bias", [
    {"divide_by_std": True},
    {"divide_by_length": True},
    {"train_eos": False},
    {"divide_by_std": True, "divide_by_length": True},
])  # fmt: skip
def test_each_bias_of_grpo_bends_the_expected_gradient(bias):
    assert distance_after_scaling(*expected_gradients(**bias)) > 0.01


# ------------------------------------------------------------------------------ batches


def test_collate_marks_the_response_and_its_eos():
    batch = collate([Rollout(3, [5, 6], [7, 8, 0], [-1.0, -2.0, -3.0], advantage=0.5),
                     Rollout(4, [9], [9], [-4.0])], 24.0)  # fmt: skip
    assert batch.ids.tolist() == [[5, 6, 7, 8, 0], [9, 9, 0, 0, 0]]
    assert batch.response_mask.tolist() == [[0, 1, 1, 1], [1, 0, 0, 0]]
    assert batch.sampler_logprobs.tolist() == [[0, -1, -2, -3], [-4, 0, 0, 0]]
    assert batch.advantages.tolist() == [0.5, 0] and batch.problems == [3, 4]
    assert batch.denominator == 24


def dealt(rollouts, budget, world):
    """The micro-batches of each rank."""
    return [micro_batches(rollouts, budget, rank, world) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("budget", [1, 60, 120, 10_000])
def test_micro_batches_keep_the_budget_lose_nothing_and_share_the_work(world, budget):
    rollouts = some_rollouts(100)
    ranks = dealt(rollouts, budget, world)
    assert len(ranks) == world and len({len(batches) for batches in ranks}) == 1
    batches = [rows for rank in ranks for rows in rank]
    found = sorted(r.problem for rows in batches for r in rows if r.response_ids)
    assert found == sorted(r.problem for r in rollouts)
    tokens = [sum(map(len, rows)) for rows in batches]
    assert all(n <= budget or len(rows) == 1 for rows, n in zip(batches, tokens))
    if budget >= 60:
        assert max(tokens) - min(tokens) <= max(map(len, rollouts))
        assert len(batches) <= 1.3 * sum(tokens) / budget + world


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_update_gets_its_share_of_the_responses_whatever_the_number_of_ranks(world):
    rollouts = some_rollouts(48)
    config = replace(TOY, prompts_per_step=6, responses_per_update=12, tokens_per_microbatch=60)

    def problems(world, step=5, seed=0):
        """Of each update, on all ranks together."""
        seeded = replace(config, seed=seed)
        ranks = [split_updates(rollouts, seeded, step, rank, world) for rank in range(world)]
        return [
            sorted(p for batches in parts for batch in batches for p in batch.problems if p >= 0)
            for parts in zip(*ranks, strict=True)
        ]

    assert problems(world) == problems(1) and len(problems(1)) == 4
    everyone = [problem for part in problems(1) for problem in part]
    assert sorted(everyone) == [r.problem for r in rollouts if r.advantage]
    assert everyone != sorted(everyone), "a group is spread over the updates"
    assert problems(1) != problems(1, step=6) and problems(1) != problems(1, seed=1)


@pytest.mark.parametrize("divide_by_length, expected", [(False, 12 * 80), (True, 12)])
def test_the_denominator_is_all_responses_of_the_update_times_the_longest_allowed(
    divide_by_length, expected
):
    """On every rank, in every micro-batch. Neither prompts nor what was left out change it."""
    config = replace(TOY, prompts_per_step=6, responses_per_update=12, max_response_tokens=80)
    config = replace(config, tokens_per_microbatch=60, divide_by_length=divide_by_length)
    few = some_rollouts(48)
    for rollout in few[5:]:
        rollout.advantage = 0.0
    for rollouts in (some_rollouts(48), few):
        for rank in range(3):
            for batches in split_updates(rollouts, config, 0, rank, 3):
                assert {batch.denominator for batch in batches} == {expected}


# ------------------------------------- what saves memory does not change the gradient


def gradient(rollouts, batches=None, model=None, **settings):
    """The gradient of one update, as `update` adds it up, and the sums of its metrics."""
    model = model or tiny_model()
    model.zero_grad()
    config = replace(TOY, tis_cap=None, **settings)
    longest = 1 if config.divide_by_length else config.max_response_tokens
    sums = []
    for batch in batches or [collate(rollouts)]:
        batch.denominator = len(rollouts) * longest
        sums.append(forward_backward(Policy(model), batch, config))
    flat = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    return flat, {key: sum(float(s[key]) for s in sums) for key in sums[0]}


@pytest.mark.parametrize("divide_by_length", [False, True])
@pytest.mark.parametrize("budget", [1, 120])
def test_micro_batches_do_not_change_the_gradient(ranks, budget, divide_by_length):
    rollouts = some_rollouts()
    whole, sums = gradient(rollouts, divide_by_length=divide_by_length)
    batches = [collate(rows) for rank in dealt(rollouts, budget, 2) for rows in rank]
    assert len(batches) > 2
    split, split_sums = gradient(rollouts, batches, divide_by_length=divide_by_length)
    assert_same(whole, split)
    assert split_sums == pytest.approx(sums, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{"offload": True}, {"activation_checkpointing": True}, {"tokens_per_microbatch": 50}],
)
def test_what_saves_memory_makes_the_same_updates(ranks, tmp_path, settings):
    rollouts, after = some_rollouts(), []
    sizes = dict(prompts_per_step=2, samples_per_prompt=6, responses_per_update=6, max_gap=100)
    for changed in ({}, settings):
        config = replace(TOY, **sizes | changed)
        policy = tiny_policy(tmp_path, config)
        optimizer = torch.optim.AdamW(policy.parameters(), 1e-3, fused=True)
        updates = split_updates(rollouts, config, 0, 0, 1)
        add_old_logprobs(policy, updates[1:], config)
        metrics = learning_metrics([update(policy, optimizer, u, config) for u in updates])
        after.append((metrics, weights_of(policy)))
    assert after[1][0] == pytest.approx(after[0][0], rel=1e-4, abs=1e-6)
    assert after[0][0]["kl"] > 1e-4, "the second update's old policy is the one before the first"
    assert_same(after[0][1], after[1][1])


# ------------------------------------------------------------------------------ learning


def tiny_policy(folder, config=TOY):
    """A sharded policy of `tiny_model`."""
    tiny_model().save_pretrained(folder)
    return make_policy(replace(config, model=str(folder)))


def weights_of(policy):
    return torch.cat([p.full_tensor().detach().flatten() for p in policy.parameters()])


LOOSE = replace(TOY, max_gap=100.0, tis_cap=None)  # rollouts whose log-probs are made up


def test_an_update_moves_the_weights_by_the_gradient_clipped_to_its_norm(ranks, tmp_path):
    rollouts = some_rollouts()
    batches = [collate(rows) for rows in micro_batches(rollouts, 120, 0, 1)]
    expected, _ = gradient(rollouts, batches)
    norm = expected.norm().item()
    for limit in (norm / 10, norm * 10):
        policy = tiny_policy(tmp_path)
        before = weights_of(policy)
        optimizer = torch.optim.SGD(policy.parameters(), 1.0)
        sums = update(policy, optimizer, batches, replace(LOOSE, max_grad_norm=limit))
        assert_same(expected * min(1, limit / norm), before - weights_of(policy), 1e-3)
        assert sums["grad_norm"] == pytest.approx(norm, rel=1e-4), "before it is clipped"
        assert all(p.grad is None for p in policy.parameters()), "the next update begins at 0"


def test_the_gap_is_a_mean_of_absolute_differences_and_stops_the_update(ranks, tmp_path):
    """Too high in one token and too low in the next is not right on average."""
    policy = tiny_policy(tmp_path)
    batches = [collate(rows) for rows in micro_batches(some_rollouts(), 120, 0, 1)]
    sign = 1
    for batch in batches:
        off = torch.zeros_like(batch.sampler_logprobs)
        for row, column in batch.response_mask.nonzero().tolist():
            off[row, column], sign = 0.01 * sign, -sign
        batch.sampler_logprobs = policy(batch.ids, batch.response_mask).detach() + off
    policy.reshard()  # as a backward pass does
    before, optimizer = weights_of(policy), torch.optim.SGD(policy.parameters(), 0.1)
    with pytest.raises(RuntimeError, match=r"differ by 0\.01 nats per token, above .* 0\.0095"):
        update(policy, optimizer, batches, replace(TOY, max_gap=0.0095))
    assert torch.equal(weights_of(policy), before), "no update was made"
    optimizer.zero_grad()
    sums = update(policy, optimizer, batches, replace(TOY, max_gap=0.0105))
    assert sums["gap"] / sums["tokens"] == pytest.approx(0.01, rel=1e-3)
    assert not torch.equal(weights_of(policy), before)


def test_the_largest_gap_without_a_setting_is_that_of_the_precision(monkeypatch):
    for dtype, largest in ((torch.float32, 1e-3), (torch.bfloat16, 0.1)):
        monkeypatch.setattr(drgrpo, "DTYPE", dtype)
        drgrpo.refuse_gap(largest, None)
        for gap in (1.01 * largest, NAN):
            with pytest.raises(RuntimeError, match="This update was not made"):
                drgrpo.refuse_gap(gap, None)


def test_importance_weights_are_per_token_and_capped(ranks):
    policy = Policy(tiny_model())
    batch = collate([Rollout(0, [5], [6, 7], [0.0, 0.0], advantage=1.0)])
    trainer = policy(batch.ids, batch.response_mask).detach()

    def weights(differences, cap):
        """Sum of both tokens' weights, where trainer - sampler is `differences`; tokens capped."""
        batch.sampler_logprobs = trainer - torch.tensor([differences])
        sums = forward_backward(policy, batch, replace(TOY, tis_cap=cap))
        return -sums["loss"].item(), sums["tis_capped"].item()

    assert weights([0.1, -0.2], None) == (2, 0)
    assert weights([0.1, -0.2], 2.0) == (pytest.approx(math.exp(0.1) + math.exp(-0.2), 1e-4), 0)
    assert weights([5.0, -0.2], 2.0) == (pytest.approx(2 + math.exp(-0.2), 1e-4), 1)
    assert weights([0.1, -0.2], 1.0) == (pytest.approx(1 + math.exp(-0.2), 1e-4), 1)


def test_old_and_new_log_probs_are_those_of_the_samplings_temperature(ranks, tmp_path):
    policy, config = tiny_policy(tmp_path), replace(TOY, temperature=0.6)
    batch = collate(some_rollouts())
    batch.sampler_logprobs = policy(batch.ids, batch.response_mask, 0.6).detach()
    optimizer = torch.optim.SGD(policy.parameters(), 0.0)
    sums = update(policy, optimizer, [batch], config)  # its gap is that of the new log-probs
    assert sums["gap"] / sums["tokens"] < 1e-5
    add_old_logprobs(policy, [[batch]], config)
    assert torch.allclose(batch.old_logprobs, batch.sampler_logprobs, atol=1e-5)
    assert not batch.old_logprobs.requires_grad


def test_clipping_is_at_the_settings_epsilon(ranks):
    """Half of the tokens have a ratio of 1.1."""
    model, batch = tiny_model(), collate(some_rollouts())
    logprobs = Policy(model)(batch.ids, batch.response_mask).detach()
    batch.old_logprobs = logprobs - 0.0953 * batch.response_mask
    batch.advantages = torch.ones(12)
    for clip_eps, clipped in ((0.2, 0), (0.05, batch.response_mask.sum())):
        sums = forward_backward(Policy(model), batch, replace(LOOSE, clip_eps=clip_eps))
        assert sums["clipped"] == clipped


def test_a_steps_metrics_are_means_over_its_updates_and_tokens():
    sums = dict(loss=1.0, grad_norm=2.0, tokens=10, gap=1.0, tis_capped=2.0, clipped=3.0, kl=0.1)
    other = dict(loss=2.0, grad_norm=4.0, tokens=30, gap=3.0, tis_capped=0.0, clipped=5.0, kl=0.3)
    expected = dict(loss=1.5, grad_norm=3.0, gap=0.1, tis_capped=0.05, clipped=0.2, kl=0.01)
    assert learning_metrics([sums, other]) == pytest.approx(expected)


def test_a_gradient_that_is_not_finite_makes_no_update(ranks, monkeypatch, tmp_path):
    norm = torch.tensor(math.inf)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *given: norm)
    policy, optimizer = tiny_policy(tmp_path), mock.Mock()
    with pytest.raises(FloatingPointError, match="norm is inf; this update was not made"):
        update(policy, optimizer, [collate(some_rollouts())], LOOSE)
    assert not optimizer.step.called


def test_a_loss_that_is_not_finite_names_its_problems(ranks):
    rollouts = some_rollouts()
    rollouts[4].advantage = NAN
    with pytest.raises(FloatingPointError, match="problems .*4"):
        gradient(rollouts)


def test_weights_are_fp32_masters_and_nearly_all_move_at_the_papers_lr(ranks, tmp_path):
    tiny_model().bfloat16().save_pretrained(tmp_path)
    policy = make_policy(replace(TOY, model=str(tmp_path)))
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    before = {k: v.full_tensor().clone() for k, v in policy.state_dict().items()}
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-6, (0.9, 0.95), weight_decay=0)
    for _ in range(3):
        update(policy, optimizer, [collate(some_rollouts())], LOOSE)
    used = [k for k in before if "embed" not in k and "lm_head" not in k]
    after = policy.state_dict()
    moved = torch.cat([(before[k] != after[k].full_tensor()).flatten() for k in used])
    assert moved.float().mean() > 0.99, "share of the weights that moved"


@pytest.mark.parametrize("on", [False, True])
def test_a_policy_is_sharded_and_spares_memory_as_its_settings_say(toy, monkeypatch, on):
    shards: list[tuple] = []
    monkeypatch.setattr(drgrpo, "fully_shard", lambda module, **s: shards.append((module, s)))
    monkeypatch.setattr(drgrpo, "mesh", lambda: "the mesh of the ranks")
    monkeypatch.setattr(drgrpo, "CUDA", on)
    monkeypatch.setattr(drgrpo, "DTYPE", torch.bfloat16 if on else torch.float32)
    policy = make_policy(replace(TOY, offload=on, activation_checkpointing=on))
    layers = list(policy.model.get_decoder().layers)
    assert [module for module, _ in shards] == [*layers, policy]
    for _, settings in shards:
        assert settings["mesh"] == "the mesh of the ranks"
        precision, offload = settings["mp_policy"], settings["offload_policy"]
        assert precision.param_dtype == (torch.bfloat16 if on else torch.float32)
        assert precision.reduce_dtype == torch.float32
        assert isinstance(offload, drgrpo.CPUOffloadPolicy) == on
        assert getattr(offload, "pin_memory", False) == on
    assert policy.model.training and policy.model.is_gradient_checkpointing == on
    if on:
        recompute = layers[0]._gradient_checkpointing_func
        assert recompute.keywords["use_reentrant"] is False
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


# ------------------------------------------------------------------------------ ranks


def three_steps(model, dtype):
    """Two updates each; the first step has no gradient, the second a single row."""
    drgrpo.DTYPE = getattr(torch, dtype)
    settings = dict(prompts_per_step=4, samples_per_prompt=6, responses_per_update=12)
    settings |= dict(tokens_per_microbatch=40, max_gap=100.0, activation_checkpointing=True)
    config = replace(TOY, model=str(model), **settings)
    policy = make_policy(config)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-3)
    metrics, reductions = [], []
    for step in range(3):
        rollouts = some_rollouts(24, seed=step)
        for rollout in rollouts[step:]:
            rollout.advantage = float(step == 2) * rollout.advantage
        rollouts[0].advantage = float(step == 1)
        updates = split_updates(rollouts, config, step, dist.get_rank(), dist.get_world_size())
        add_old_logprobs(policy, updates[1:], config)
        with mock.patch.object(fsdp, "foreach_reduce", wraps=fsdp.foreach_reduce) as reduce:
            sums = [update(policy, optimizer, batches, config) for batches in updates]
        metrics.append(learning_metrics(sums))
        reductions.append((sum(map(len, updates)), reduce.call_count))
    weights = weights_of(policy)
    probe = weights[:: len(weights) // 50].tolist()
    return {"metrics": metrics, "reductions": reductions, "probe": probe}


THREE_STEPS = """
import json, sys
import torch.distributed as dist
from support.run import end_ranks, start_ranks
from test_drgrpo import three_steps

start_ranks()
found = {dtype: three_steps(sys.argv[1], dtype) for dtype in ("float32", "bfloat16")}
if dist.get_rank() == 0:
    print(json.dumps(found))
end_ranks()
"""


def test_two_ranks_with_uneven_work_make_the_updates_of_one(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(drgrpo, "DTYPE", torch.float32)  # put back after three_steps set it
    tiny_model(initializer_range=0.1).save_pretrained(tmp_path / "model")
    (tmp_path / "steps.py").write_text(THREE_STEPS)
    printed = launch(2, tmp_path / "steps.py", tmp_path / "model")
    of_two = json.loads(printed.splitlines()[-1])
    for dtype, tolerance in (("float32", 1e-3), ("bfloat16", 0.02)):
        one, two = three_steps(tmp_path / "model", dtype), of_two[dtype]
        for a, b in zip(one["metrics"], two["metrics"], strict=True):
            assert a == pytest.approx(b, rel=tolerance, abs=1e-4 if dtype == "bfloat16" else 1e-7)
        if dtype == "float32":
            assert one["probe"] == pytest.approx(two["probe"], rel=1e-4, abs=1e-6)
        norms = [m["grad_norm"] for m in one["metrics"]]
        assert norms[0] == 0 and norms[1] > 0 and norms[2] > 0
        for found in (one, two):  # two layers, and the rest of the model
            assert all(calls == 3 * batches for batches, calls in found["reductions"]), (
                "gradients are not kept whole: they are reduced on every micro-batch"
            )
        assert two["reductions"][2][0] > 4


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_no_two_ranks_draw_the_same(toy, monkeypatch, world):
    """The same seeds are dealt to the same problems, whatever the number of ranks."""
    problems = [Problem("", [i], ["1"]) for i in range(5)]
    chosen, seeds = [4, 2, 2, 0, 1, 3, 4], [11, 12, 13, 14, 15, 16, 17]
    grader, drawn, found = SimpleNamespace(template=templates.TEMPLATES["r1"]), [], []

    def generate(problems, seeds, n, max_tokens, temperature, stop):
        drawn.extend(seeds)
        assert len(problems) == len(seeds) and stop == ("</answer>",)
        assert (n, max_tokens, temperature) == (2, TOY.max_response_tokens, 0.5)
        return [[Rollout(9, p.prompt_ids, [1], [0.0])] * n for p in problems]

    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    config = replace(TOY, samples_per_prompt=2, temperature=0.5)
    for rank in range(world):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        sampler = SimpleNamespace(generate=generate)
        found += drgrpo.sample(sampler, grader, problems, chosen, seeds, config)
    assert drawn == seeds
    assert [rollout.problem for rollout in found] == [p for p in chosen for _ in range(2)]
    assert [r.prompt_ids for r in found] == [[p] for p in chosen for _ in range(2)]


# ------------------------------------------------------------------------------ reward


ONE_PROBLEM = [Problem("1+1", [1], ["2"])]


def responses(count):
    return [Rollout(0, [1], [1], [-1.0], "", "stop") for _ in range(count)]


def says(*verdicts):
    """A grader that gives these verdicts."""
    return SimpleNamespace(verdicts=mock.Mock(return_value=list(verdicts)))


def test_a_truncated_response_is_judged_and_kept_but_gets_the_reward_that_is_set(ranks):
    problems = [Problem(f"p{i}", [i], [f"a{i}"], row={"i": i}) for i in range(3)]
    rollouts = [
        Rollout(2, [1], [1], [0.0], "right", "stop"),
        Rollout(2, [1], [1], [0.0], "right, but cut off", "length"),
        Rollout(1, [1], [1], [0.0], "hangs", "stop"),
    ]
    grader = says(Verdict(1.0, True), Verdict(1.0, True), Verdict(NAN, None, "timeout"))
    for settings, cut_off in (({}, 0.0), ({"truncated_reward": -1.0}, -1.0)):
        found = give_rewards(grader, problems, rollouts, replace(TOY, **settings))
        assert [r.reward for r in found] == pytest.approx([1.0, cut_off, NAN], nan_ok=True)
        assert [r.correct for r in found] == [True, True, None], "the grader's own verdicts"
        assert [r.failure for r in found] == [None, None, "timeout"]
    texts, answers, rows = grader.verdicts.call_args.args
    assert texts == ["right", "right, but cut off", "hangs"], "each with its own problem's"
    assert answers == [["a2"], ["a2"], ["a1"]] and rows == [{"i": 2}, {"i": 2}, {"i": 1}]


def test_a_reward_that_fails_on_other_ranks_only_stops_the_run(ranks, monkeypatch):
    theirs = [Verdict(NAN, None, "KeyError('oops')")] * 9

    def from_all_ranks(mine):
        return [mine, (responses(9), theirs)]

    monkeypatch.setattr(drgrpo, "from_all_ranks", from_all_ranks)
    grader, rollouts = says(*[Verdict(0.0, None)] * 8), responses(8)
    with pytest.raises(RuntimeError, match=r"9 of 17 .*KeyError\('oops'\)"):
        give_rewards(grader, ONE_PROBLEM, rollouts, TOY)
    theirs[:] = theirs[:8] + [Verdict(0.0, None)]
    assert len(give_rewards(grader, ONE_PROBLEM, rollouts, TOY)) == 17, "half is not most"


def test_a_held_out_problem_gets_one_greedy_response(toy, ranks):
    """A right answer counts although its response is truncated, as in eval.py."""
    problems = [Problem(str(i), [1], ["1/2"]) for i in range(4)]
    texts = dict(zip("0123", ("\\boxed{0.5}", "\\boxed{3}", "no", "\\boxed{1/2}"), strict=True))
    with Grader("none") as grader:
        for reason, reward in (("stop", 0.5), ("length", 0.0)):
            sampler = StoredSampler({key: [text] for key, text in texts.items()}, reason)
            sampler.generate = mock.Mock(wraps=sampler.generate)
            found = drgrpo.evaluate(sampler, grader, problems, TOY)
            assert (found["eval_accuracy"], found["eval_reward"]) == (0.5, reward)
            _, _, n, longest, temperature, _ = sampler.generate.call_args.args
            assert (n, longest, temperature) == (1, TOY.max_response_tokens, 0.0)
        assert drgrpo.evaluate(sampler, grader, [], TOY) == {}
    assert {key.partition("_")[0] for key in found} == {"eval", "seconds"}
    assert "eval_entropy" not in found, "one response each: there are no groups"


# ------------------------------------------------------------------------------ the loop


class BoxGrader:
    """1 for \\boxed{1} and 0 for \\boxed{0}, as FakeSampler writes; it fails on \\boxed{2}."""

    template = templates.TEMPLATES["none"]

    def verdicts(self, texts, answers, rows):
        return [Verdict([0.0, 1.0, NAN][int(text[-2])], None) for text in texts]


def noting(monkeypatch, owner, name, calls):
    """Note each call of owner.name in `calls`, and make it."""
    original = getattr(owner, name)

    def noted(*arguments, **settings):
        calls.append(name)
        return original(*arguments, **settings)

    monkeypatch.setattr(owner, name, noted)


@pytest.mark.parametrize("divide_by_std", [False, True])
def test_a_step_samples_sleeps_rewards_learns_and_wakes(
    toy, ranks, tmp_path, monkeypatch, divide_by_std
):
    settings = dict(prompts_per_step=4, samples_per_prompt=4, responses_per_update=8)
    settings |= dict(seed=7, max_response_tokens=12, divide_by_std=divide_by_std)
    config = replace(TOY, **settings)
    policy = tiny_policy(tmp_path)
    sampler, learned = FakeSampler(policy), []
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-2)
    for name in ("give_rewards", "add_old_logprobs"):
        noting(monkeypatch, drgrpo, name, sampler.calls)

    def noted_update(policy, optimizer, batches, config):
        sampler.calls.append("update")
        learned.append((batches, update(policy, optimizer, batches, config)))
        return learned[-1][1]

    monkeypatch.setattr(drgrpo, "update", noted_update)
    problems = [Problem(f"p{i}", [5, i], ["1"]) for i in range(4)]
    metrics, rollouts = drgrpo.train_step(
        config, 3, problems, policy, optimizer, sampler, BoxGrader()
    )
    assert sampler.calls == [
        "sample", "sleep", "give_rewards", "add_old_logprobs", "update", "update", "wake"
    ]  # fmt: skip
    assert sampler.seeds == [[derive_seed("sample", 7, 3, place) for place in range(4)]]
    rewards = torch.tensor([r.reward for r in rollouts]).view(4, 4)
    assert rewards.isnan().any() and metrics["reward"] == pytest.approx(rewards.nanmean().item())
    advantages = group_advantages(rewards, divide_by_std).flatten().tolist()
    assert [r.advantage for r in rollouts] == advantages and any(advantages)
    assert metrics | learning_metrics([sums for _, sums in learned]) == metrics
    phases = {key for key in metrics if key.startswith("seconds_")}
    expected = ("sample", "sleep", "score", "update", "old_logprobs", "sync")
    assert phases == {f"seconds_{phase}" for phase in expected}
    # the sampler had the policy of before the step: so have the old log-probs of every update
    (first, sums), (second, later_sums) = learned
    assert all(batch.old_logprobs is None for batch in first) and sums["kl"] == 0
    for batch in second:
        assert torch.allclose(batch.old_logprobs, batch.sampler_logprobs, atol=1e-5)
    assert later_sums["kl"] > 1e-4, "the first update changed the policy"


@pytest.mark.parametrize("offload", [False, True])
def test_a_run_starts_with_what_its_settings_say_and_ends_it_all(ranks, toy, monkeypatch, offload):
    """On the second of three ranks: the engine gets what the policy and Adam leave."""
    called = mock.Mock()
    for name in ("start_ranks", "end_ranks", "Sampler", "Grader", "give_threads_back"):
        monkeypatch.setattr(drgrpo, name, getattr(called, name))
    config = replace(TOY, offload=offload, prompts_per_step=8, responses_per_update=64, seed=5)
    config = replace(config, grader_workers=3, grader_timeout=7.0, reward="rewards.py:short")
    policy = make_policy(config)
    monkeypatch.setattr(drgrpo, "make_policy", lambda config: policy)
    monkeypatch.setattr(drgrpo.dist, "get_world_size", lambda: 3)
    with pytest.raises(KeyError), drgrpo.start(config) as (found, optimizer, sampler, grader):
        assert found is policy
        assert sampler is called.Sampler.return_value and grader is called.Grader.return_value
        raise KeyError("a run that fails")
    weights = sum(p.numel() for p in policy.parameters())
    began = [
        mock.call.start_ranks(),
        mock.call.Grader("none", 3, 7.0, "rewards.py:short"),
        mock.call.Sampler(
            config.model,
            64 + 72,  # the longest prompt and the longest response
            5,
            reserve=0 if offload else 2 * 4 * weights,  # Adam's two moments, in fp32
            sequences=3 * 8,  # three of the eight prompts, eight responses each
            can_sleep=True,
        ),
    ]
    began += [mock.call.give_threads_back()] * offload
    ended = [mock.call.Sampler().close(), mock.call.Grader().close(), mock.call.end_ranks()]
    assert called.mock_calls == began + ended
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert all(a is b for a, b in zip(group["params"], policy.parameters(), strict=True))
    assert (group["lr"], group["betas"], group["weight_decay"]) == (config.lr, (0.9, 0.95), 0)
    assert group["fused"]


def test_a_policy_can_be_trained_with_a_reward_of_ones_own(here, rewards):
    train(steps=2, reward=f"{rewards}:short", truncated_reward=-1.0, eval_every=1)
    rows = read_jsonl(Path("runs/run/metrics.jsonl"))
    assert all("accuracy" not in key for row in rows for key in row)
    assert rows[0]["eval_reward"] == pytest.approx(1 - len("\\boxed{0}") / 50)
    assert {row["correct"] for row in read_jsonl(Path("runs/run/samples.jsonl"))} == {None}


# ------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("settings, message", [
    ({"temperature": 0.0}, "temperature must be above 0"),
    ({"max_grad_norm": NAN}, "max_grad_norm must be above 0"),
    ({"eval_every": 0}, "eval_every must be above 0"),
    ({"samples_per_prompt": 1}, "samples_per_prompt must be 2"),
    ({"responses_per_update": 100}, "must divide"),
    ({"responses_per_update": 0}, "responses_per_update must be above 0"),
    ({"template": "chatty"}, "qwen_math, r1, none"),
    ({"seed": -1}, "seed must be 0 or more"),
    ({"truncated_reward": NAN}, "truncated_reward must be a finite number"),
])  # fmt: skip
def test_wrong_settings_are_refused_with_what_to_do(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(TOY, **settings)


def test_the_7b_preset_is_the_papers_recipe():
    config = PRESETS["math-7b"][1]
    assert config.model == "Qwen/Qwen2.5-Math-7B" and config.levels == (3, 4, 5)
    assert (config.prompts_per_step, config.samples_per_prompt) == (128, 8)
    assert (config.responses_per_update, config.max_response_tokens) == (128, 3000)
    assert (config.temperature, config.clip_eps, config.template) == (1.0, 0.2, "qwen_math")
    assert (config.lr, config.max_grad_norm) == (1e-6, 1.0)
    assert not config.divide_by_std and not config.divide_by_length
    assert config.max_prompt_tokens + config.max_response_tokens <= 4096


HELP = """
import runpy, sys
sys.argv = ["drgrpo.py", "--help"]
try:
    runpy.run_path("drgrpo.py", run_name="__main__")
except SystemExit:
    found = {"vllm", "drgrpo", "eval", "plan", "toy"} & set(sys.modules)
    sys.exit(f"imported: {found}" if found else 0)
"""


def test_help_needs_no_vllm_and_imports_nothing_twice():
    """As `drgrpo` the script would be imported again by something that it imports."""
    printed = launch(1, "-c", HELP)
    assert "math-7b" in printed and "imported" not in printed
