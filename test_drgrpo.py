"""What must stay true of drgrpo.py, as facts. `make test` runs them on a CPU in some minutes.

Tests that need a trained model use the toy base model, which is made on first use. Facts about
everything else are in tests/, a file a module.
"""

import itertools
import json
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import drgrpo
import eval as evaluation
import support.logprobs
import support.metrics
import support.run
import templates
from drgrpo import (
    EMPTY_ROLLOUT,
    PRESETS,
    Policy,
    Rollout,
    Sampler,
    collate,
    drgrpo_loss,
    forward_backward,
    full_weights,
    group_advantages,
    make_policy,
    micro_batches,
    score,
    split_updates,
    token_logprobs,
    update,
)
from support.data import Problem, derive_seed
from support.grader import Grader, Verdict
from support.logprobs import HeadLogprobs, definition, packed_attention
from tests.helpers import (
    LONG,
    ROOT,
    TOY,
    TOY_EVAL,
    StoredSampler,
    assert_same,
    launch,
    read_jsonl,
    some_rollouts,
    tiny_model,
    write_jsonl,
)

pytest_plugins = ["tests.fixtures"]


def gradient(rollouts, batches=None, model=None, **settings):
    """The gradient of one update, as `update` adds it up, and the sums of its metrics."""
    model = model or tiny_model()
    model.zero_grad()
    n = len(rollouts)
    config = replace(
        TOY,
        prompts_per_step=1,
        samples_per_prompt=max(2, n),
        responses_per_update=n,
        tis_cap=None,
        **settings,
    )
    policy = Policy(model)
    stats = [forward_backward(policy, b, config) for b in batches or [collate(rollouts)]]
    grad = torch.cat([p.grad.flatten() for p in model.parameters()])
    return grad, {key: sum(float(s[key]) for s in stats) for key in stats[0]}


# ------------------------------------------------------------------------------ advantages


def test_advantage_is_reward_minus_group_mean():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]])
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]])
    assert torch.equal(group_advantages(rewards), expected)
    assert torch.equal(rewards, torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]]))
    assert torch.equal(group_advantages(rewards.bool()), expected)


def test_grpo_divides_by_the_std_over_n_minus_1():
    rewards = torch.tensor([[1.0, 0, 0, 0], [8.0, 0, 0, 0]])
    advantages = group_advantages(rewards, divide_by_std=True)
    assert torch.allclose(advantages, torch.tensor([[1.5, -0.5, -0.5, -0.5]] * 2)), "of each group"


@pytest.mark.parametrize("divide_by_std", [False, True])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.01, 1 / 3])
def test_equal_rewards_give_exact_zeros(reward, divide_by_std):
    advantages = group_advantages(torch.full((2, 12), reward), divide_by_std)
    assert torch.equal(advantages, torch.zeros(2, 12))
    between = torch.tensor([[-1.0] * 12, [reward] * 12, [2.0] * 12])  # each group for itself
    assert torch.equal(group_advantages(between, divide_by_std), torch.zeros(3, 12))


def test_rewards_in_double_precision_stay_so():
    assert group_advantages(torch.zeros(1, 2, dtype=torch.float64)).dtype == torch.float64


def test_rewards_must_be_grouped():
    with pytest.raises(ValueError, match="one row a prompt"):
        group_advantages(torch.zeros(8))


# ------------------------------------------------------------------------------ the loss


def test_loss_by_hand():
    # ratios 1.5 and 0.5 with A=+1: 1.5 is clipped to 1.2, 0.5 is not; with A=-2 it is the reverse
    logprobs = torch.tensor([[1.5, 0.5, 1.0], [1.5, 0.5, 9.0]]).log()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    loss, stats = drgrpo_loss(logprobs, torch.zeros(2, 3), torch.tensor([1.0, -2.0]), mask, 10.0)
    assert loss.item() == pytest.approx((-(1.2 + 0.5 + 1.0) + (2 * 1.5 + 2 * 0.8)) / 10)
    assert (stats["tokens"], stats["clipped"]) == (5, 2)
    kl = sum(r - 1 - np.log(r) for r in (1.5, 0.5, 1.0, 1.5, 0.5))
    assert stats["kl"].item() == pytest.approx(kl, rel=1e-5)


def test_divide_by_length_is_the_mean_over_each_response():
    logprobs, mask = torch.zeros(2, 3), torch.tensor([[1, 1, 1], [1, 0, 0]])
    args = (logprobs, logprobs, torch.tensor([1.0, -2.0]), mask)
    assert drgrpo_loss(*args, 2, divide_by_length=True)[0].item() == pytest.approx((-1 + 2) / 2)
    assert drgrpo_loss(*args, 6)[0].item() == pytest.approx((-3 + 2) / 6)


def test_padding_may_hold_anything():
    mask = torch.tensor([[1, 0, 0]])
    logprobs = torch.tensor([[-1.0, float("nan"), float("-inf")]], requires_grad=True)
    old = torch.tensor([[-1.0, float("inf"), float("-inf")]])
    loss, stats = drgrpo_loss(logprobs, old, torch.ones(1), mask, 3)
    loss.backward()
    assert loss.item() == pytest.approx(-1 / 3)
    assert logprobs.grad.tolist() == [[pytest.approx(-1 / 3), 0, 0]]
    assert all(torch.isfinite(value) for value in stats.values())
    assert not any(value.requires_grad for value in stats.values()), "they would keep the graph"


@pytest.mark.parametrize("advantages, denominator", [((2, 3), 6), ((2, 1), 6), ((2,), 0)])
def test_wrong_shapes_and_denominators_are_refused(advantages, denominator):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="advantages"):
        drgrpo_loss(x, x, torch.zeros(advantages), x, denominator)


@pytest.mark.parametrize("which", range(3))
def test_logprobs_and_mask_must_have_one_shape(which):
    """Else one of them would be stretched over all rows or tokens."""
    shapes = [torch.ones(2, 3)] * 3
    shapes[which] = torch.ones(2, 1)
    logprobs, old, mask = shapes
    with pytest.raises(ValueError, match="one shape"):
        drgrpo_loss(logprobs, old, torch.ones(2), mask, 6)


# ------------------------------------------------ the expected gradient, by enumeration


def expected_gradients(divide_by_std=False, divide_by_length=False, train_eos=True):
    """(expected gradient of -loss, scaled by L_max * G/(G-1); gradient of the expected reward).

    The policy has two tokens, EOS (0) and 1, and writes at most L_max = 2 of them, so there are
    three responses: EOS; 1 EOS; and 1 1, which is truncated. All 3^4 groups of responses to an
    easy prompt are enumerated, and all of those to a hard one.
    """
    model, size, longest = tiny_model(vocab_size=2), 4, 2
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
                group_advantages(rewards[group][None], divide_by_std)[0],
                mask[group],
                size * (1 if divide_by_length else longest),
                divide_by_length=divide_by_length,
            )
            loss = loss + probability[group].prod().detach() * group_loss
    grads = [
        torch.autograd.grad(f, model.parameters(), retain_graph=True)
        for f in (-loss * longest * size / (size - 1), expected_reward)
    ]
    return [torch.cat([g.flatten() for g in grad]) for grad in grads]


def test_expected_gradient_is_the_policy_gradient():
    expected, exact = expected_gradients()
    assert exact.abs().max() > 0.05
    assert (expected - exact).abs().max() < 1e-6


@pytest.mark.parametrize(
    "bias",
    [
        {"divide_by_std": True},
        {"divide_by_length": True},
        {"train_eos": False},
        {"divide_by_std": True, "divide_by_length": True},
    ],
)
def test_each_bias_of_grpo_bends_the_expected_gradient(bias):
    expected, exact = expected_gradients(**bias)
    best = expected * (expected @ exact) / (expected @ expected)  # a learning rate can do that
    assert (best - exact).abs().max() > 0.01


# ------------------------------------------------------------------------------ log-probs


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("attention", ["packed", "sdpa", "eager"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_logprobs_of_a_batch_are_those_of_each_row_alone(attention, mode, temperature):
    settings = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    model = getattr(tiny_model(attention=attention, **settings), mode)()
    rollouts = some_rollouts()
    batch = collate(rollouts)
    logprobs = token_logprobs(model, batch.ids, batch.response_mask, temperature)
    assert logprobs.dtype == torch.float32 and logprobs.shape == batch.response_mask.shape
    assert logprobs[batch.response_mask == 0].abs().max() == 0
    model.set_attn_implementation("eager")
    for row, mask, rollout in zip(logprobs, batch.response_mask.bool(), rollouts, strict=True):
        ids = torch.tensor(rollout.prompt_ids + rollout.response_ids)
        expected = definition(model, ids, temperature)[len(rollout.prompt_ids) - 1 :]
        assert torch.allclose(row[mask], expected, atol=2e-6)


def test_the_definition_is_log_softmax_of_the_models_own_logits():
    model, ids = tiny_model(attention="eager"), torch.tensor([5, 9, 7, 0])
    probabilities = (model(ids[None]).logits[0] / 0.7).softmax(dim=1)
    by_hand = [probabilities[t, ids[t + 1]].log().item() for t in range(3)]
    assert definition(model, ids, 0.7).tolist() == pytest.approx(by_hand, abs=1e-5)


def test_no_padding_goes_through_the_model():
    model, seen = tiny_model(), []
    model.get_decoder().layers[0].register_forward_pre_hook(lambda _, x: seen.append(x[0].shape))
    rollouts = some_rollouts()
    batch = collate(rollouts)
    batch.ids = torch.nn.functional.pad(batch.ids, (0, 50))
    batch.response_mask = torch.nn.functional.pad(batch.response_mask, (0, 50))
    token_logprobs(model, batch.ids, batch.response_mask)
    assert seen == [(1, sum(map(len, rollouts)), 32)]


def test_on_a_gpu_attention_and_head_make_calls_that_torch_accepts():
    """Shapes and types only: without a GPU nothing can be computed with CUDA tensors."""
    lengths = np.array([4, 6])  # a tensor made below would have no values
    with FakeTensorMode(allow_non_fake_inputs=True):

        def empty(*shape, dtype=torch.bfloat16):
            return torch.empty(shape, dtype=dtype, device="cuda")

        q, k, ends = empty(1, 4, 10, 64), empty(1, 2, 10, 64), empty(3, dtype=torch.int32)
        out, _ = packed_attention(None, q, k, k, scaling=0.1, lengths=lengths, ends=ends)
        assert out.shape == (1, 10, 4, 64) and out.dtype == torch.bfloat16
        context = mock.Mock(
            temperature=0.9,
            saved_tensors=(empty(10, 64), empty(99, 64), empty(10, dtype=torch.long)),
        )
        logprobs = HeadLogprobs.forward(context, *context.saved_tensors, 0.9)
        assert logprobs.shape == (10,) and logprobs.dtype == torch.float32
        grads = HeadLogprobs.backward(context, logprobs)
        assert [g.shape for g in grads[:2]] == [(10, 64), (99, 64)]
        assert {g.dtype for g in grads[:2]} == {torch.bfloat16}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 7, 100])  # rows, of 40
def test_the_chunked_head_has_the_values_and_gradients_of_the_definition(
    chunk, temperature, monkeypatch
):
    monkeypatch.setattr(support.logprobs, "LOGITS_AT_ONCE", chunk * 50)
    torch.manual_seed(0)
    inputs = torch.randn(40, 16).requires_grad_(), torch.randn(50, 16).requires_grad_()
    targets, upstream = torch.randint(0, 50, (40,)), torch.randn(40)
    values = HeadLogprobs.apply(*inputs, targets, temperature)
    logits = inputs[0] @ inputs[1].T / temperature
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(values, expected, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(values, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        assert_same(b, a)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor):
            self.size = max(self.size, out.numel())
        return out


def test_the_head_never_makes_full_logits(monkeypatch):
    model, batch = tiny_model(vocab_size=2**14), collate(some_rollouts(count=300))
    monkeypatch.setattr(support.logprobs, "LOGITS_AT_ONCE", 100 * 2**14)
    with Largest() as largest:
        loss = token_logprobs(model, batch.ids, batch.response_mask).sum()
        kept = largest.size
        loss.backward()
    assert batch.response_mask.sum() > 2000
    assert kept == largest.size == 100 * 2**14, "a chunk's logits, forwards and backwards"


def test_the_gradient_of_a_bf16_head_is_summed_in_fp32(monkeypatch):
    """1 and then many small terms, each in a chunk of its own: bf16 would lose every one."""
    monkeypatch.setattr(support.logprobs, "LOGITS_AT_ONCE", 1)
    hidden = torch.full((257, 1), 1 / 256, dtype=torch.bfloat16)
    hidden[0] = 1
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(257, dtype=torch.long)
    HeadLogprobs.apply(hidden, weight, targets, 1.0).sum().backward()
    assert weight.grad.flatten().tolist() == [1, -1]  # half of 1 + 256/256


def test_bf16_logits_become_fp32_logprobs():
    model, batch = tiny_model().bfloat16(), collate(some_rollouts())
    logprobs = token_logprobs(model, batch.ids, batch.response_mask)
    assert logprobs.dtype == torch.float32
    assert (logprobs != logprobs.bfloat16()).any()


# ------------------------------------- what saves memory does not change the gradient


def dealt(rollouts, budget, world):
    """The micro-batches of each rank."""
    return [micro_batches(rollouts, budget, rank, world) for rank in range(world)]


@pytest.mark.parametrize("divide_by_length", [False, True])
@pytest.mark.parametrize("budget", [1, 50, 120])
def test_micro_batches_do_not_change_the_gradient(ranks, budget, divide_by_length):
    rollouts = some_rollouts()
    whole, sums = gradient(rollouts, divide_by_length=divide_by_length)
    batches = [collate(rows) for rank in dealt(rollouts, budget, 2) for rows in rank]
    assert len(batches) > 2
    split, split_sums = gradient(rollouts, batches, divide_by_length=divide_by_length)
    assert_same(whole, split)
    assert split_sums == pytest.approx(sums, rel=1e-4, abs=1e-6)


def test_order_and_wider_padding_do_not_change_the_gradient(ranks):
    rollouts = some_rollouts()
    wide = collate(rollouts[::-1])
    pad = partial(torch.nn.functional.pad, pad=(0, 9))
    wide.ids, wide.response_mask = pad(wide.ids, value=5), pad(wide.response_mask)
    wide.sampler_logprobs = pad(wide.sampler_logprobs)
    for attention in ("packed", "sdpa"):
        model = tiny_model(attention=attention)
        assert_same(gradient(rollouts)[0], gradient(rollouts, [wide], model)[0])


def test_activation_checkpointing_does_not_change_the_gradient(ranks):
    model = tiny_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(gradient(some_rollouts())[0], gradient(some_rollouts(), model=model)[0])


def test_rows_without_advantage_are_skipped_but_counted(ranks):
    rollouts = some_rollouts()
    config = replace(TOY, responses_per_update=12, prompts_per_step=2, samples_per_prompt=6)
    (batches,) = split_updates(rollouts, config, step=0, rank=0, world=1)
    kept = [r for r in rollouts if r.advantage]
    found = sorted(problem for batch in batches for problem in batch.problems)
    assert found == [r.problem for r in kept] and len(kept) == 8
    skipped, _ = gradient(rollouts, batches)
    assert_same(gradient(rollouts)[0], skipped)
    without, _ = gradient(kept)  # N is 8 here: what forgetting the skipped rows would give
    assert_same(without * 8 / 12, skipped)


def test_denominator_counts_all_responses_times_the_longest_allowed():
    config = replace(TOY, responses_per_update=64, max_response_tokens=80)
    assert config.denominator == 64 * 80
    assert replace(config, divide_by_length=True).denominator == 64


def test_an_empty_micro_batch_has_a_zero_gradient_for_every_weight(ranks):
    grad, sums = gradient([EMPTY_ROLLOUT])
    assert grad.shape[0] == sum(p.numel() for p in tiny_model().parameters())
    assert grad.abs().max() == 0 and sums["tokens"] == sums["gap"] == 0


# ------------------------------------------------------------------------------ batches


def test_collate_marks_the_response_and_its_eos():
    batch = collate([Rollout(3, [5, 6], [7, 8, 0], [-1.0, -2.0, -3.0], advantage=0.5),
                     Rollout(4, [9], [9], [-4.0])])  # fmt: skip
    assert batch.ids.tolist() == [[5, 6, 7, 8, 0], [9, 9, 0, 0, 0]]
    assert batch.response_mask.tolist() == [[0, 1, 1, 1], [1, 0, 0, 0]]
    assert batch.sampler_logprobs.tolist() == [[0, -1, -2, -3], [-4, 0, 0, 0]]
    assert batch.advantages.tolist() == [0.5, 0] and batch.problems == [3, 4]


def test_batches_and_weights_go_to_the_device_of_the_policy(monkeypatch):
    monkeypatch.setattr(drgrpo, "DEVICE", "meta")  # a device that is not the CPU, anywhere
    batch = collate(some_rollouts())
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 4
    tensors += [weight for _, weight in full_weights(tiny_model(), torch.float16)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert tensors[-1].dtype == torch.float16


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


def test_a_micro_batch_may_be_full_to_the_last_token():
    rollouts = [Rollout(i, [5] * 4, [6] * 6, [0.0] * 6) for i in range(4)]
    assert [len(rows) for rows in micro_batches(rollouts, 20, 0, 1)] == [2, 2]
    assert [len(rows) for rows in micro_batches(rollouts, 19, 0, 1)] == [1] * 4
    assert [len(rows) for rows in micro_batches(rollouts, 20, 1, 2)] == [2]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_update_gets_its_share_of_the_responses_whatever_the_number_of_ranks(world):
    rollouts = some_rollouts(48)
    config = replace(TOY, prompts_per_step=6, responses_per_update=12, tokens_per_microbatch=60)

    def problems(world):
        """Of each update, on all ranks together."""
        ranks = [split_updates(rollouts, config, 5, rank, world) for rank in range(world)]
        return [
            sorted(p for batches in parts for batch in batches for p in batch.problems if p >= 0)
            for parts in zip(*ranks, strict=True)
        ]

    assert problems(world) == problems(1) and len(problems(1)) == 4
    everyone = [problem for part in problems(1) for problem in part]
    assert sorted(everyone) == [r.problem for r in rollouts if r.advantage]
    assert everyone != sorted(everyone), "shuffled after the baseline"


def test_each_round_spreads_its_responses_over_the_updates_in_another_way():
    rollouts = [replace(r, advantage=1.0) for r in some_rollouts(48)]
    config = replace(TOY, prompts_per_step=6, responses_per_update=12)

    def first_update(step, **settings):
        updates = split_updates(rollouts, replace(config, **settings), step, 0, 1)
        return sorted(problem for batch in updates[0] for problem in batch.problems)

    assert first_update(5) == first_update(5)
    assert len({str(first_update(step)) for step in range(8)}) == 8
    assert first_update(5) != first_update(5, seed=1)


def test_a_round_in_which_no_response_has_an_advantage_still_takes_part():
    rollouts = [replace(r, advantage=0.0) for r in some_rollouts()]
    config = replace(TOY, prompts_per_step=2, samples_per_prompt=6, responses_per_update=6)
    for rank, has_response in ((0, True), (1, False)):
        updates = split_updates(rollouts, config, 0, rank, 2)
        assert [[len(batch.ids) for batch in batches] for batches in updates] == [[1], [1]]
        measured = [bool(batch.response_mask.any()) for (batch,) in updates]
        assert measured == [has_response] * 2, "one real row an update: the gap is always measured"


# ------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("settings, message", [
    ({"top_p": 0.9}, "top_p must be 1"),
    ({"temperature": 0.0}, "temperature must be above 0"),
    ({"samples_per_prompt": 1}, "samples_per_prompt must be 2"),
    ({"responses_per_update": 100}, "must divide"),
    ({"template": "chatty"}, "qwen_math, r1, none"),
    ({"steps": 0}, "steps must be above 0"),
    ({"seed": -1}, "seed must be 0 or more"),
    ({"tis_cap": -1.0}, "tis_cap must be above 0"),
    ({"truncated_reward": float("nan")}, "truncated_reward must be a finite number"),
    ({"truncated_reward": float("-inf")}, "truncated_reward must be a finite number"),
    ({"name": "a/b"}, "name 'a/b' must be the name of a folder"),
    ({"name": ".."}, "name '..' must be"),
    ({"name": "."}, "name '.' must be"),
    ({"name": ""}, "name '' must be"),
    ({"name": "/tmp"}, "name '/tmp' must be"),
])  # fmt: skip
def test_wrong_settings_are_refused_with_what_to_do(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(TOY, **settings)


def test_the_7b_preset_is_the_papers_recipe():
    config = PRESETS["math-7b"][1]
    assert config.model == "Qwen/Qwen2.5-Math-7B" and config.levels == (3, 4, 5)
    assert (config.prompts_per_step, config.samples_per_prompt) == (128, 8)
    assert (config.responses_per_update, config.max_response_tokens) == (128, 3000)
    assert (config.temperature, config.top_p, config.clip_eps) == (1.0, 1.0, 0.2)
    assert (config.lr, config.max_grad_norm, config.template) == (1e-6, 1.0, "qwen_math")
    assert not config.divide_by_std and not config.divide_by_length
    assert config.max_prompt_tokens + config.max_response_tokens <= 4096


def test_the_names_that_forks_import_are_there():
    names = "group_advantages drgrpo_loss token_logprobs Sampler Grader Config train_step TEMPLATES"
    assert all(hasattr(drgrpo, name) for name in names.split())
    assert drgrpo.TEMPLATES is templates.TEMPLATES and callable(evaluation.pass_at_k)


HELP = """
import runpy, sys
sys.argv = ["drgrpo.py", "--help"]
try:
    runpy.run_path("drgrpo.py", run_name="__main__")
except SystemExit:
    found = {"vllm", "drgrpo", "eval", "plan"} & set(sys.modules)
    sys.exit(f"imported: {found}" if found else 0)
"""


def test_help_needs_no_vllm_and_imports_nothing_twice():
    """As `drgrpo` the script would be imported again by something that it imports."""
    printed = launch(1, "-c", HELP)
    assert "math-7b" in printed and "imported" not in printed


# ------------------------------------------------------------------------------ the sampler


class FakeEngine:
    """Notes the order in which vLLM is called, and the weights that it is sent."""

    def __init__(self):
        self.calls, self.weights, self.resets = [], {}, True

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags):
        self.calls.append(f"wake {tags[0]}")

    def collective_rpc(self, method, kwargs):
        self.calls.append(method)
        self.weights = dict(kwargs["weights_iterator"])

    def reset_prefix_cache(self):
        self.calls.append("reset")
        return self.resets


def test_on_a_gpu_the_engine_wakes_in_stages_around_the_weights(monkeypatch):
    sampler = Sampler.__new__(Sampler)
    sampler.llm, sampler.dtype = FakeEngine(), torch.bfloat16
    monkeypatch.setattr(drgrpo, "CUDA", True)
    calls = sampler.llm.calls
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(drgrpo.gc, "collect", lambda: calls.append("collect"))
    policy = Policy(tiny_model())
    sampler.sleep()
    sampler.wake(policy)
    assert calls == [
        "sleep 2",
        "empty",
        "collect",
        "empty",
        "wake weights",
        "reload_weights",
        "empty",
        "wake kv_cache",
        "reset",
    ]
    assert set(sampler.llm.weights) == set(policy.model.state_dict()) != set(policy.state_dict())
    assert {w.dtype for w in sampler.llm.weights.values()} == {torch.bfloat16}
    sampler.llm.resets = False
    with pytest.raises(RuntimeError, match="prefix cache"):
        sampler.wake(policy)
    sampler.llm.collective_rpc = lambda method, kwargs: next(kwargs["weights_iterator"])
    with pytest.raises(RuntimeError, match="did not take all weights"):
        sampler.wake(policy)


def draw(engine, prompt, seed=0, n=4, temperature=1.0):
    sampler, _, config = engine
    problem = Problem("", prompt, ["1"])
    (group,) = sampler.generate([problem], [seed], n, config.max_response_tokens, temperature, ())
    return group


def gap(engine, group, temperature=1.0):
    """Largest difference of the two log-probs over all tokens, with the policy as it is now."""
    batch = collate(group)
    logprobs = engine[1](batch.ids, batch.response_mask, temperature).detach()
    return (logprobs - batch.sampler_logprobs).abs().max().item()


def test_the_sampler_returns_the_ids_that_it_drew_and_their_logprobs(engine):
    group, tokenizer = draw(engine, LONG), AutoTokenizer.from_pretrained(engine[2].model)
    for rollout in group:
        assert rollout.text == tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
        assert rollout.prompt_ids == LONG
        assert len(rollout.response_ids) == len(rollout.sampler_logprobs) <= 20
        assert rollout.finish_reason == ("length" if len(rollout.response_ids) == 20 else "stop")
        assert (rollout.response_ids[-1] == 0) == (rollout.finish_reason == "stop")
    assert len({tuple(r.response_ids) for r in group}) == 4
    assert gap(engine, group) < 1e-4


def test_each_group_is_handed_over_as_soon_as_it_is_finished(engine):
    sampler, _, _ = engine
    problems, seen = [Problem("", [5, 6, i], ["1"]) for i in range(40)], {}
    stop = tuple("aeiou")  # so that lengths differ
    groups = sampler.generate(problems, range(40), 1, 20, 1.0, stop, seen.__setitem__)
    assert groups == [seen[i] for i in range(40)] and list(seen) != sorted(seen)
    assert [g[0].prompt_ids for g in groups] == [p.prompt_ids for p in problems]
    stopped = [r.text for (r,) in groups if r.finish_reason == "stop" and r.response_ids[-1] != 0]
    assert len(stopped) > 10 and all(set(text[-1]) & set(stop) for text in stopped)


def test_eos_ends_a_response_and_belongs_to_it(engine):
    groups = [draw(engine, [5, 6], seed, n=16) for seed in range(4)]
    ended = [r for group in groups for r in group if r.finish_reason == "stop"]
    assert ended and all(r.response_ids[-1] == 0 for r in ended)
    eos = AutoTokenizer.from_pretrained(engine[2].model).decode([0])
    assert eos and not any(eos in r.text for r in ended), "it is in the ids, not in the text"
    assert gap(engine, ended) < 1e-4


def test_a_draw_depends_on_its_seed_alone(engine):
    sampler, _, _ = engine
    problems = [Problem("", LONG[:k], ["1"]) for k in (9, 17, 33)]
    args = (2, 20, 1.0, ())
    ids = [[r.response_ids for r in g] for g in sampler.generate(problems, [1, 2, 3], *args)]
    again = [[r.response_ids for r in g] for g in sampler.generate(problems[1:], [2, 3], *args)]
    other = [[r.response_ids for r in g] for g in sampler.generate(problems, [4, 5, 6], *args)]
    assert ids[1:] == again and ids[0] != other[0]
    assert sampler.generate([], [], *args) == []


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_logprobs_are_those_of_the_distribution_that_is_sampled(engine, temperature):
    assert gap(engine, draw(engine, LONG, temperature=temperature), temperature) < 1e-4
    assert gap(engine, draw(engine, LONG, temperature=0.6), 1.0) > 0.05


def test_after_an_update_the_engine_has_the_new_weights(engine):
    sampler, policy, config = engine
    before = draw(engine, LONG)
    optimizer = torch.optim.AdamW(policy.parameters(), 0.01)
    rollouts = [replace(r, advantage=a) for r, a in zip(before, (1, -1, 0.5, -0.5), strict=True)]
    old = {k: v.full_tensor().clone() for k, v in policy.state_dict().items()}
    config = replace(config, prompts_per_step=1, samples_per_prompt=4, responses_per_update=4)
    update(policy, optimizer, [[collate(rollouts)]], config)
    weights = {k: v.full_tensor() for k, v in policy.state_dict().items()}
    moved = torch.cat([(old[k] != v).flatten() for k, v in weights.items()])
    assert gap(engine, before) > 0.05, "the update changed the policy"
    assert gap(engine, draw(engine, LONG)) > 0.05, "without a sync the engine is stale"
    sampler.wake(policy)
    assert gap(engine, draw(engine, LONG)) < 1e-4, "the prompt is cached: the cache must be reset"
    assert moved.float().mean() > 0.5


def test_stale_weights_stop_the_run_and_change_nothing(engine):
    sampler, policy, config = engine
    sampler.wake(policy)
    group = [replace(r, advantage=(-1) ** i) for i, r in enumerate(draw(engine, LONG))]
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.2)
    before = {k: v.full_tensor().clone() for k, v in policy.state_dict().items()}
    optimizer = torch.optim.AdamW(policy.parameters(), 0.01)
    config = replace(config, prompts_per_step=1, samples_per_prompt=4, responses_per_update=2)
    for updates in ([[collate(group)]], [[collate(group[:2])], [collate(group[2:])]]):
        with pytest.raises(RuntimeError, match="differ by .* above max_gap"):
            update(policy, optimizer, updates, config)
    assert all(torch.equal(before[k], v.full_tensor()) for k, v in policy.state_dict().items())
    optimizer.zero_grad()
    sampler.wake(policy)


class EagerSampler:
    """Hands over each group, the last problem's first, before it returns them all.

    Notes what it was asked for.
    """

    def generate(self, problems, seeds, n, max_tokens, temperature, stop, finished):
        self.asked = ([p.prompt for p in problems], n, max_tokens, temperature, stop)
        self.seeds = list(seeds)
        groups = [
            [Rollout(place, p.prompt_ids, [1], [0.0], f"{p.prompt}{i}") for i in range(n)]
            for place, p in enumerate(problems)
        ]
        for place in reversed(range(len(problems))):
            finished(place, groups[place])
        return groups


def test_grading_begins_while_others_are_still_sampled(monkeypatch):
    """Each response with its own problem's answers and row; here, of the second of two ranks."""
    problems = [Problem(f"p{i}", [i], [f"a{i}"], f"p{i}", {"i": i}) for i in range(5)]
    monkeypatch.setattr(drgrpo.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(drgrpo.dist, "get_world_size", lambda: 2)
    grader = mock.Mock(template=templates.TEMPLATES["none"])
    drgrpo.sample(EagerSampler(), grader, problems, [0, 1, 4, 2], range(4), 2, 1.0, TOY)
    assert grader.start.call_args_list == [
        mock.call([f"p{i}0", f"p{i}1"], [[f"a{i}"]] * 2, [{"i": i}] * 2) for i in (2, 4)
    ]


# ------------------------------------------------------------------------------ reward


def stored(rewards, reasons=None, text=""):
    """Responses to one problem, and a grader that gives them these rewards."""
    reasons = reasons or ["stop"] * len(rewards)
    verdicts = [Verdict(reward, None) for reward in rewards]
    grader = SimpleNamespace(verdicts=lambda texts, answers, rows: verdicts)
    return grader, [Rollout(0, [1], [1], [-1.0], text, reason) for reason in reasons]


ONE_PROBLEM = [Problem("1+1", [1], ["2"])]


def test_score_gives_truncated_responses_no_reward_but_counts_them(ranks):
    problems = [Problem("1+1", [1], ["2"]), Problem("2+2", [2], ["4"])]
    texts = ["\\boxed{2}", "\\boxed{2}", "\\boxed{4}", "no idea"]
    rollouts = [
        Rollout(i // 2, [1], [1], [-1.0], text, "length" if i == 1 else "stop")
        for i, text in enumerate(texts)
    ]
    with Grader("none") as grader:
        scored = score(grader, problems, rollouts, 2, TOY)
    assert [r.reward for r in scored] == [1, 0, 1, 0]
    assert [r.correct for r in scored] == [True, True, True, False], "the grader's own verdict"
    assert [r.advantage for r in scored] == [0.5, -0.5, 0.5, -0.5]


@pytest.mark.parametrize(
    "truncated_reward, advantages", [(-1.0, [0, 0, 0]), (0.5, [-0.5, -0.5, 1])]
)
def test_a_truncated_response_gets_the_reward_that_is_set_for_it(
    ranks, truncated_reward, advantages
):
    """With rewards of -1 and 1, three wrong ones, of which one is truncated, are all alike."""
    grader, rollouts = stored([-1.0, -1.0, 1.0], ["stop", "stop", "length"])
    config = replace(TOY, truncated_reward=truncated_reward)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scored = score(grader, ONE_PROBLEM, rollouts, 3, config)
    assert [r.reward for r in scored] == [-1, -1, truncated_reward]
    assert [r.advantage for r in scored] == advantages


def test_a_truncated_response_gets_0_unless_another_reward_is_set(ranks):
    assert TOY.truncated_reward == 0
    grader, rollouts = stored([0.5, 0.25, 1.0], ["stop", "stop", "length"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none is due
        assert [r.reward for r in score(grader, ONE_PROBLEM, rollouts, 3, TOY)] == [0.5, 0.25, 0]


def test_one_reward_below_that_of_a_truncated_response_is_a_warning(ranks):
    grader, rollouts = stored([1.0, -0.5, 1.0])
    with pytest.warns(match="some rewards are below"):
        score(grader, ONE_PROBLEM, rollouts, 3, TOY)


def test_score_divides_by_the_std_only_where_the_settings_say_so(ranks):
    grader, rollouts = stored([1.0, 0.0, 0.0, 0.0])
    for divide_by_std, expected in ((False, 0.75), (True, 1.5)):
        config = replace(TOY, divide_by_std=divide_by_std)
        scored = score(grader, ONE_PROBLEM, rollouts, 4, config)
        assert scored[0].advantage == pytest.approx(expected)


def test_a_run_warns_once_if_being_cut_off_pays(fake_run, rewards):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        fake_run(steps=3, reward=f"{rewards}:short", truncated_reward=0.9, held_out=ONE_PROBLEM)
    told = [str(w.message) for w in seen if "truncated response" in str(w.message)]
    assert len(told) == 1 and "lower --truncated-reward" in told[0]


def test_a_reward_that_fails_on_other_ranks_only_stops_the_run(ranks, monkeypatch):
    grader, rollouts = stored([0.0] * 8)
    theirs = [Verdict(0.0, None, "KeyError('oops')")] * 9
    others = {Rollout: rollouts, Verdict: theirs}
    monkeypatch.setattr(drgrpo, "gather_rows", lambda own: own + others[type(own[0])])
    with pytest.raises(RuntimeError, match=r"9 of 17 .*KeyError\('oops'\)"):
        score(grader, ONE_PROBLEM, rollouts, 8, TOY)
    theirs[:] = theirs[:8] + [Verdict(0.0, None)]
    assert len(score(grader, ONE_PROBLEM, rollouts, 8, TOY)) == 16, "half is not most"


def test_held_out_problems_are_scored_as_eval_scores_them(ranks, grader):
    """One greedy response each; a right answer counts although its response is truncated."""
    problems = [Problem(str(i), [1], ["1/2"]) for i in range(4)]
    texts = dict(zip("0123", ("\\boxed{0.5}", "\\boxed{3}", "no", "\\boxed{1/2}"), strict=True))
    for reason in ("stop", "length"):
        sampler = StoredSampler({key: [text] for key, text in texts.items()}, reason)
        found = drgrpo.score_held_out(sampler, grader, problems, TOY)
        expected = evaluation.evaluate(sampler, grader, problems, 9)
        assert found["eval_accuracy"] == expected["accuracy"] == 0.5
        keys = ("accuracy_se", "length_right", "length_wrong", "length", "truncated", "errors")
        assert [found[f"eval_{key}"] for key in keys] == [expected[key] for key in keys]


def test_a_held_out_problem_gets_one_greedy_response(ranks):
    grader, _ = stored([1.0, 0.0])
    grader.start, grader.template = mock.Mock(), templates.TEMPLATES["r1"]
    sampler = EagerSampler()
    found = drgrpo.score_held_out(sampler, grader, ONE_PROBLEM * 2, TOY)
    stop = templates.TEMPLATES["r1"].stop
    assert sampler.asked == (["1+1"] * 2, 1, TOY.max_response_tokens, 0.0, stop) and stop
    assert found["eval_reward"] == 0.5 and found["seconds_eval"] > 0
    assert {key.partition("_")[0] for key in found} == {"eval", "seconds"}
    assert drgrpo.score_held_out(sampler, grader, [], TOY) == {}


# ------------------------------------------------------------------------------ learning


def test_importance_weights_are_per_token_and_capped(ranks):
    rng = np.random.default_rng(0)
    noise = torch.tensor(rng.normal(0, 0.02, 3000), dtype=torch.float32)
    assert noise.exp().clamp(max=2).mean() == pytest.approx(1, abs=2e-3)  # a product would not be

    policy = Policy(tiny_model())
    rollout = Rollout(0, [5], [6, 7], [0.0, 0.0], advantage=1.0)
    batch = collate([rollout])
    trainer = policy(batch.ids, batch.response_mask).detach()

    def weight(differences, cap):
        """Sum of both tokens' weights, where trainer - sampler is `differences`; tokens capped."""
        batch.sampler_logprobs = trainer - torch.tensor([differences])
        config = replace(
            TOY,
            prompts_per_step=1,
            samples_per_prompt=2,
            responses_per_update=1,
            tis_cap=cap,
            max_response_tokens=1,
        )
        stats = forward_backward(policy, batch, config)
        return -stats["loss"].item(), stats["tis_capped"].item()

    assert weight([0.1, -0.2], None) == (2, 0)
    assert weight([0.1, -0.2], 2.0) == (pytest.approx(np.exp(0.1) + np.exp(-0.2), rel=1e-4), 0)
    assert weight([5.0, -0.2], 2.0) == (pytest.approx(2 + np.exp(-0.2), rel=1e-4), 1)
    assert weight([0.0, -0.2], 1.0) == (pytest.approx(1 + np.exp(-0.2), rel=1e-4), 0)


@pytest.mark.parametrize("on", [False, True])
def test_a_policy_is_sharded_and_spares_memory_as_its_settings_say(toy, monkeypatch, on):
    shards: list[tuple] = []
    compiled = mock.Mock(side_effect=lambda forward, **settings: forward)
    monkeypatch.setattr(drgrpo, "fully_shard", lambda module, **s: shards.append((module, s)))
    monkeypatch.setattr(drgrpo, "mesh", lambda: "the mesh of the ranks")
    monkeypatch.setattr(drgrpo, "CUDA", on)
    monkeypatch.setattr(torch, "compile", compiled)
    dtype = "bfloat16" if on else "float32"
    changed = dict(offload=on, compile=on, activation_checkpointing=on, dtype=dtype)
    policy = make_policy(replace(TOY, **changed))
    layers = list(policy.model.get_decoder().layers)
    assert [module for module, _ in shards] == [*layers, policy]
    for _, settings in shards:
        assert settings["mesh"] == "the mesh of the ranks"
        precision, offload = settings["mp_policy"], settings["offload_policy"]
        assert precision.param_dtype == getattr(torch, dtype)
        assert precision.reduce_dtype == torch.float32
        assert isinstance(offload, drgrpo.CPUOffloadPolicy) == on
        assert getattr(offload, "pin_memory", False) == on
    assert policy.model.training and policy.model.is_gradient_checkpointing == on
    if on:
        recompute = layers[0]._gradient_checkpointing_func
        assert recompute.keywords["use_reentrant"] is False
    expected = [mock.call(layer.forward, dynamic=True) for layer in layers] if on else []
    assert compiled.call_args_list == expected
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


def test_weights_are_fp32_masters_and_nearly_all_move_at_the_papers_lr(ranks, tmp_path):
    model = tiny_model().bfloat16()
    model.save_pretrained(tmp_path)
    policy = make_policy(replace(TOY, model=str(tmp_path)))
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    before = {k: v.full_tensor().clone() for k, v in policy.state_dict().items()}
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-6, (0.9, 0.95), weight_decay=0)
    config = replace(
        TOY, prompts_per_step=1, samples_per_prompt=12, responses_per_update=12, max_gap=100
    )
    for _ in range(3):
        update(policy, optimizer, [[collate(some_rollouts())]], config)
    used = [k for k in before if "embed" not in k and "lm_head" not in k]
    after = policy.state_dict()
    moved = torch.cat([(before[k] != after[k].full_tensor()).flatten() for k in used])
    assert moved.float().mean() > 0.99


@pytest.mark.parametrize(
    "settings",
    [
        {"offload": True},
        {"compile": True},
        {"activation_checkpointing": True},
        {"compile": True, "activation_checkpointing": True},
        {"tokens_per_microbatch": 50},
    ],
)
def test_what_saves_memory_or_time_makes_the_same_update(ranks, tmp_path, settings, monkeypatch):
    """The whole update, with old log-probs; `compile` without the compiler behind it."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    tiny_model().save_pretrained(tmp_path)
    rollouts, after = some_rollouts(), []
    for changed in ({}, settings):
        config = replace(
            TOY,
            model=str(tmp_path),
            prompts_per_step=2,
            samples_per_prompt=6,
            responses_per_update=6,
            max_gap=100,
            **changed,
        )
        policy = make_policy(config)
        optimizer = torch.optim.AdamW(policy.parameters(), 1e-3, fused=True)
        updates = split_updates(rollouts, config, 0, 0, 1)
        metrics = update(policy, optimizer, updates, config)
        assert 0 < metrics["weights_moved"] <= 1, "a share"
        metrics.pop("seconds_old_logprobs")
        weights = torch.cat([w.flatten() for _, w in full_weights(policy.model, torch.float32)])
        after.append((metrics, weights))
    assert after[1][0] == pytest.approx(after[0][0], rel=1e-4, abs=1e-6)
    assert after[0][0]["kl"] > 1e-4, "the second update's old policy is the one before the first"
    assert_same(after[0][1], after[1][1])


def test_all_updates_are_made_at_the_temperature_of_the_sampling(ranks, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    settings = dict(prompts_per_step=4, samples_per_prompt=6, responses_per_update=12)
    config = replace(TOY, model=str(tmp_path), temperature=0.6, max_gap=100, **settings)
    policy = make_policy(config)
    updates = [[collate(some_rollouts(seed=seed))] for seed in range(2)]
    for (batch,) in updates:
        logprobs = policy(batch.ids, batch.response_mask, 0.6)
        batch.sampler_logprobs = logprobs.detach()
    optimizer = torch.optim.AdamW(policy.parameters(), 0.0)
    metrics = update(policy, optimizer, updates, config)
    assert metrics["gap"] < 1e-5 and metrics["kl"] < 1e-5
    assert updates[0][0].old_logprobs is None, "the first update has its own"


def test_metrics_of_an_update_are_sums_over_all_its_micro_batches(ranks, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    settings = dict(prompts_per_step=4, samples_per_prompt=6, responses_per_update=12)
    settings |= dict(tokens_per_microbatch=80, tis_cap=1.0, max_gap=100)
    config = replace(TOY, model=str(tmp_path), **settings)
    updates = split_updates(some_rollouts(24), config, 0, 0, 1)
    assert [len(batches) > 1 for batches in updates] == [True, True]
    totals, norms = {}, []
    for batches in updates:
        model.zero_grad()
        for batch in batches:
            batch.sampler_logprobs -= 4 * batch.response_mask  # about what a random model gives
            for key, value in forward_backward(Policy(model), batch, config).items():
                totals[key] = totals.get(key, 0.0) + float(value)
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
    policy = make_policy(config)
    synced = mock.Mock(wraps=policy.set_requires_gradient_sync)
    policy.set_requires_gradient_sync = synced
    found = update(policy, torch.optim.AdamW(policy.parameters(), 0.0), updates, config)
    assert [call.args for call in synced.call_args_list] == [
        (batch is batches[-1],) for batches in updates for batch in batches
    ]
    assert found.pop("seconds_old_logprobs") > 0
    expected = {key: totals[key] / totals["tokens"] for key in ("gap", "tis_capped", "clipped")}
    expected |= {"loss": totals["loss"] / 2, "grad_norm": sum(norms) / 2, "kl": 0.0}
    expected["weights_moved"] = 0.0  # at a learning rate of 0
    assert abs(totals["loss"]) > 1e-4 and 0 < totals["tis_capped"] < totals["tokens"]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_a_gradient_that_is_not_finite_makes_no_update(ranks, monkeypatch):
    norm = mock.Mock(full_tensor=lambda: torch.tensor(float("inf")))  # sharded, as FSDP's
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *given: norm)
    policy, optimizer = make_policy(TOY), mock.Mock()
    batch = collate(some_rollouts())
    with pytest.raises(FloatingPointError, match="norm is inf; this update was not made"):
        update(policy, optimizer, [[batch]], replace(TOY, max_gap=100))
    assert not optimizer.step.called


def test_the_gradient_counts_the_ranks_because_fsdp_takes_their_mean(ranks, monkeypatch):
    whole, _ = gradient(some_rollouts())
    monkeypatch.setattr(drgrpo.dist, "get_world_size", lambda: 3)
    assert_same(3 * whole, gradient(some_rollouts())[0])


def test_a_loss_that_is_not_finite_names_its_problems(ranks):
    rollouts = some_rollouts()
    rollouts[4].advantage = float("nan")
    with pytest.raises(FloatingPointError, match="problems .*4"):
        gradient(rollouts)


# ------------------------------------------------------------------------------ ranks


def three_rounds(model):
    """Two updates each; the first round has no gradient, the second a single row."""
    settings = dict(prompts_per_step=4, samples_per_prompt=6, responses_per_update=12)
    settings |= dict(tokens_per_microbatch=40, max_gap=100.0, activation_checkpointing=True)
    config = replace(TOY, model=str(model), **settings)
    policy = make_policy(config)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-3)
    metrics, reductions = [], []
    for step in range(3):
        rollouts = some_rollouts(24, seed=step)
        for r in rollouts[step:]:
            r.advantage = float(step == 2) * r.advantage
        rollouts[0].advantage = float(step == 1)
        updates = split_updates(rollouts, config, step, dist.get_rank(), dist.get_world_size())
        with mock.patch.object(fsdp, "foreach_reduce", wraps=fsdp.foreach_reduce) as reduce:
            metrics.append(update(policy, optimizer, updates, config))
        assert metrics[-1].pop("seconds_old_logprobs") > 0
        del metrics[-1]["weights_moved"]  # it looks at some weights of each shard, so at others
        reductions.append((sum(map(len, updates)), reduce.call_count))
    weights = torch.cat([w.flatten() for _, w in full_weights(policy.model, torch.float64)])
    probe = weights[:: len(weights) // 50].tolist()
    return {"metrics": metrics, "reductions": reductions, "norm": weights.norm().item()} | {
        "probe": probe
    }


THREE_ROUNDS = """
import json, sys
import torch.distributed as dist
from support.ranks import start_ranks
from test_drgrpo import three_rounds

start_ranks()
found = three_rounds(sys.argv[1])
if dist.get_rank() == 0:
    print(json.dumps(found))
dist.destroy_process_group()
"""


def test_two_ranks_with_uneven_work_make_the_updates_of_one(ranks, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    one = three_rounds(tmp_path / "model")
    (tmp_path / "rounds.py").write_text(THREE_ROUNDS)
    printed = launch(2, tmp_path / "rounds.py", tmp_path / "model")
    two = json.loads(printed.splitlines()[-1])
    assert one["norm"] == pytest.approx(two["norm"], rel=1e-6)
    assert one["probe"] == pytest.approx(two["probe"], rel=1e-4, abs=1e-6)
    for a, b in zip(one["metrics"], two["metrics"], strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-7)
    norms = [m["grad_norm"] for m in one["metrics"]]
    assert norms[0] == 0 and norms[1] > 0 and norms[2] > 0
    # two layers and the rest of the model, reduced once in each of the two updates
    assert [n for _, n in two["reductions"]] == [6, 6, 6] and two["reductions"][2][0] > 4


# ------------------------------------------------------------------------------ the loop


def test_a_step_samples_sleeps_scores_learns_and_wakes(fake_run, monkeypatch):
    def noting(owner, name):
        original = getattr(owner, name)

        def noted(*arguments):
            calls.append(name)
            return original(*arguments)

        return noted

    calls: list[str] = []

    def change(sampler):
        sampler.calls = calls
        for owner, name in (
            (drgrpo, "score"),
            (drgrpo, "update"),
            (support.run, "save_model"),
            (support.metrics, "plot_curves"),
        ):
            monkeypatch.setattr(owner, name, noting(owner, name))

    fake_run(change, steps=2, eval_every=1)
    one_step = ["sample", "sleep", "score", "update", "wake"]
    assert calls == one_step + ["save_model"] + one_step + ["save_model", "plot_curves", "close"]


def test_a_step_hands_on_what_each_part_returns(ranks, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    grader, _ = stored([1.0, 0.0, 0.0, 1.0])
    grader.start, grader.template = mock.Mock(), templates.TEMPLATES["none"]
    called, sampler = mock.Mock(), EagerSampler()
    called.update.return_value = {"loss": 0.25}
    sampler.sleep, sampler.wake = called.sleep, called.wake
    score = drgrpo.score
    monkeypatch.setattr(drgrpo, "score", lambda *given: called.score() and score(*given))
    monkeypatch.setattr(drgrpo, "update", called.update)
    config = replace(TOY, prompts_per_step=2, samples_per_prompt=2, responses_per_update=2, seed=7)
    problems = [Problem(f"p{i}", [5, i], ["1"]) for i in range(2)]
    metrics, rollouts = drgrpo.train_step(
        config, 3, problems, "policy", "optimizer", sampler, grader
    )
    assert [name for name, _, _ in called.mock_calls] == ["sleep", "score", "update", "wake"]
    assert sampler.asked[1:4] == (2, TOY.max_response_tokens, 1.0)
    assert sampler.seeds == [derive_seed("sample", 7, 3, place) for place in range(2)]
    policy, optimizer, updates, settings = called.update.call_args.args
    assert (policy, optimizer, settings) == ("policy", "optimizer", config) and len(updates) == 2
    assert called.wake.call_args == mock.call("policy")
    assert [r.advantage for r in rollouts] == [0.5, -0.5, -0.5, 0.5]
    assert metrics["loss"] == 0.25 and metrics["reward"] == 0.5
    phases = {key for key in metrics if key.startswith("seconds_")}
    assert phases == {f"seconds_{x}" for x in ("sample", "sleep", "score", "update", "sync")}


def test_weights_are_saved_on_the_way_and_steps_without_metrics_leave_no_line(
    fake_run, monkeypatch, tmp_path
):
    saved = []
    monkeypatch.setattr(support.run, "save_model", lambda *arguments: saved.append(arguments[3:5]))
    fake_run(steps=3, eval_every=2)
    assert saved == [(Path("runs/run"), 2), (Path("runs/run"), 3)], "on the way, and at the end"
    assert [row["step"] for row in read_jsonl(tmp_path / "runs/run/metrics.jsonl")] == [0, 1, 2]


def test_every_step_and_every_prompt_has_a_draw_of_its_own(fake_run):
    """The same on any number of ranks, because a seed knows no rank."""
    first = fake_run(steps=3).seeds
    assert len(first) == 3 and len({seed for seeds in first for seed in seeds}) == 3 * 4
    assert fake_run(steps=3, name="again").seeds == first
    others = {seed for seeds in fake_run(steps=3, name="other", seed=1).seeds for seed in seeds}
    assert not others & {seed for seeds in first for seed in seeds}


@pytest.mark.parametrize("offload", [False, True])
def test_what_a_run_starts_with_is_made_of_its_settings(ranks, toy, monkeypatch, offload):
    """On the second of three ranks: the engine gets what the policy and Adam leave."""
    called = mock.Mock()
    for name in ("start_ranks", "check_shared_folder", "Sampler", "Grader", "give_threads_back"):
        monkeypatch.setattr(drgrpo, name, getattr(called, name))
    config = replace(
        TOY,
        offload=offload,
        prompts_per_step=8,
        samples_per_prompt=8,
        responses_per_update=64,
        grader_workers=3,
        grader_timeout=7.0,
        reward="rewards.py:short",
        seed=5,
    )
    policy = make_policy(config)
    monkeypatch.setattr(drgrpo, "make_policy", lambda config: policy)
    monkeypatch.setattr(drgrpo.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(drgrpo.dist, "get_world_size", lambda: 3)
    found, optimizer, sampler, grader = drgrpo.start(config)
    assert found is policy
    assert sampler is called.Sampler.return_value and grader is called.Grader.return_value
    weights = sum(p.numel() for p in policy.parameters())
    expected = [
        mock.call.start_ranks(training=True),
        mock.call.check_shared_folder(config.folder),
        mock.call.Grader("none", 3, 7.0, "rewards.py:short"),  # loads while the engine does
        mock.call.Sampler(
            config.model,
            64 + 72,  # the longest prompt and the longest response
            5,
            reserve=0 if offload else 2 * 4 * weights,  # Adam's two moments, in fp32
            dtype=config.dtype,
            sequences=3 * 8,  # three of the eight prompts, eight responses each
            can_sleep=True,
        ),
        mock.call.give_threads_back(),
    ]
    assert called.mock_calls == [c for c in expected if offload or "threads" not in str(c)]
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert all(a is b for a, b in zip(group["params"], policy.parameters(), strict=True))
    assert (group["lr"], group["betas"], group["weight_decay"]) == (config.lr, (0.9, 0.95), 0)
    assert group["fused"]


def test_a_policy_can_be_trained_with_a_reward_of_ones_own(fake_run, rewards, tmp_path):
    reward = f"{rewards}:short"
    fake_run(reward=reward, truncated_reward=-1.0, held_out=ONE_PROBLEM, eval_every=1)
    rows = read_jsonl(tmp_path / "runs/run/metrics.jsonl")
    assert all("accuracy" not in key for row in rows for key in row)
    assert rows[0]["eval_reward"] == pytest.approx(1 - len("\\boxed{0}") / 50)
    assert {row["correct"] for row in read_jsonl(tmp_path / "runs/run/samples.jsonl")} == {None}
    assert (
        json.loads((tmp_path / "runs/run/config.json").read_text())["settings"]["reward"] == reward
    )


def test_the_chat_template_can_be_trained_with(fake_run, tmp_path):
    fake_run(template="chat")
    assert any(row["correct"] for row in read_jsonl(tmp_path / "runs/run/samples.jsonl"))


# ------------------------------------------------------------------------------ whole runs


def test_a_run_with_an_engine_keeps_it_in_step_with_the_policy(
    engine, toy, rewards, tmp_path, monkeypatch
):
    sampler, policy, config = engine
    monkeypatch.chdir(tmp_path)
    settings = dict(steps=3, prompts_per_step=4, samples_per_prompt=4, responses_per_update=8)
    settings |= dict(reward=f"{rewards}:short", truncated_reward=-1.0, lr=1e-2, eval_every=2)
    config = replace(config, name="short", **settings)
    policy.reshard()  # another test may have left some weights whole
    optimizer = torch.optim.AdamW(policy.parameters(), config.lr)
    monkeypatch.setattr(sampler, "close", lambda: None)  # other tests need it
    grader = Grader(config.template, 1, reward=config.reward)
    monkeypatch.setattr(drgrpo, "start", lambda config: (policy, optimizer, sampler, grader))
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    problems = [Problem("", LONG[:k], ["1"]) for k in range(20, 80, 10)]
    drgrpo.train(config, tokenizer, problems, problems[:2], {})
    rows = read_jsonl(tmp_path / "runs" / "short" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert max(row["gap"] for row in rows[:3]) < 1e-4
    assert min(row["weights_moved"] for row in rows[:3]) > 0.5
    assert max(row["reward"] for row in rows[1:3]) > rows[0]["reward"]
    assert ["eval_reward" in row for row in rows] == [True, False, True, True]


def whole_run(toy, folder, ranks, **settings):
    """Some steps of two updates each from the command line; returns folder, metrics, samples."""
    (folder / "runs").mkdir(parents=True)
    (folder / "runs" / "toy-base").symlink_to(toy)
    usual = dict(steps=3, prompts_per_step=8, responses_per_update=32, tokens_per_microbatch=512)
    usual |= dict(eval_every=3)
    launch(ranks, ROOT / "drgrpo.py", "toy", folder=folder, **usual | settings)
    run = folder / "runs" / "toy"
    return run, read_jsonl(run / "metrics.jsonl"), read_jsonl(run / "samples.jsonl")


@pytest.fixture(scope="session")
def run_of_one(toy, tmp_path_factory):
    return whole_run(toy, tmp_path_factory.mktemp("one"), 1)


@pytest.mark.slow
def test_a_run_leaves_metrics_samples_curves_and_a_checkpoint(run_of_one):
    run, rows, samples = run_of_one
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(np.isfinite(v) for row in rows for v in row.values() if v is not None)
    assert max(row["gap"] for row in rows[:3]) < 1e-4
    assert {"eval_accuracy", "eval_truncated"} <= set(rows[0]) & set(rows[3])
    assert len(samples) == 3 * 8 * 8
    assert set(samples[0]) >= {"prompt", "response", "reward", "length", "finish_reason"}
    first = [s for s in samples if s["step"] == 0]
    assert rows[0]["reward"] == pytest.approx(np.mean([s["reward"] for s in first]))
    assert rows[0]["length"] == pytest.approx(np.mean([s["length"] for s in first]))
    assert (run / "curves.png").stat().st_size > 10_000
    AutoModelForCausalLM.from_pretrained(run / "model")


@pytest.mark.slow
def test_two_ranks_make_the_run_of_one(toy, run_of_one, tmp_path):
    _, one, samples_of_one = run_of_one
    run, two, samples = whole_run(toy, tmp_path, 2)
    assert [s["response"] for s in samples] == [s["response"] for s in samples_of_one]
    for a, b in zip(one, two, strict=True):
        # weights_moved looks at some weights of each shard, so at others here
        others = ("gap", "weights_moved")
        for key in [key for key in a if "seconds" not in key and key not in others]:
            same = b[key] is None or pytest.approx(b[key], rel=1e-3, abs=1e-6)
            assert a[key] is b[key] or a[key] == same, key
    weights = [
        AutoModelForCausalLM.from_pretrained(r / "model").state_dict() for r in (run, run_of_one[0])
    ]
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], atol=1e-5), name


@pytest.mark.slow
def test_eval_scores_a_saved_model_as_training_did(toy, run_of_one):
    run, rows, _ = run_of_one
    settings = TOY_EVAL | dict(model=run / "model", tasks=toy / "test.jsonl", output=run / "eval")
    launch(1, ROOT / "eval.py", **settings)
    (scores,) = json.loads((run / "eval" / "results.json").read_text())["results"]
    assert scores["problems"] == 500
    keys = [key for key in rows[3] if key.startswith("eval_") and key != "eval_reward"]
    assert "eval_accuracy" in keys and rows[3]["eval_accuracy"] > 0
    for key in keys:
        assert scores[key.removeprefix("eval_")] == rows[3][key], key


@pytest.mark.slow
def test_a_reward_of_ones_own_trains_and_scores_from_the_command_line(toy, rewards, tmp_path):
    """It returns -1 to 1, and the data need no answers."""
    rows = [{"problem": row["problem"]} for row in read_jsonl(toy / "test.jsonl")[:40]]
    data, reward = write_jsonl(tmp_path / "data.jsonl", rows), f"{rewards}:short"
    settings = dict(reward=reward, dataset=data, eval_dataset=data, truncated_reward=-1)
    run, metrics, samples = whole_run(toy, tmp_path, 1, steps=2, **settings)
    assert [row["step"] for row in metrics] == [0, 1, 2]
    assert not [key for row in metrics for key in row if "accuracy" in key or "right" in key]
    assert min(row["reward"] for row in samples) == -1 < max(row["reward"] for row in samples)
    launch(
        1,
        ROOT / "eval.py",
        **TOY_EVAL | dict(model=run / "model", tasks=data, output=run / "eval", reward=reward),
    )
    (scores,) = json.loads((run / "eval" / "results.json").read_text())["results"]
    found = read_jsonl(next((run / "eval").glob("*_none_*.jsonl")))
    assert scores["reward"] == pytest.approx(np.mean([row["reward"] for row in found]))
    assert scores["reward_low"] < scores["reward"] < scores["reward_high"]
    assert "accuracy" not in scores
    # here as everywhere else, training counts a truncated response as truncated_reward
    expected = [-1.0 if row["finish_reason"] == "length" else row["reward"] for row in found]
    assert metrics[2]["eval_reward"] == pytest.approx(np.mean(expected))
