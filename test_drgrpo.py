"""What must stay true of drgrpo.py, as facts. `make test` runs them on a CPU in some minutes.

Tests that need a trained model use the toy base model, which is made on first use.
"""

import importlib
import itertools
import http.server
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GraniteConfig,
                          MistralConfig, Qwen2Config, Qwen2ForCausalLM)

import drgrpo
import eval as evaluation
import templates
from benchmarks import plan as planning
from benchmarks.shapes import length_mix
from drgrpo import (PRESETS, Config, Rollout, Sampler, backward, collate, drgrpo_loss,
                    group_advantages, micro_batches, split_updates, token_logprobs)
from eval import (REFLECTION, analysis_table, average, evaluate, interval, judge, majority,
                  pass_at_k, plot_analysis, reflects, regrade, saved_rows)
from templates import (TASKS, TEMPLATES, Grader, Problem, Template, answers_match, find_template,
                       gold_answers, last_boxed, load_problems, load_task, load_tokenizer,
                       step_problems)
from toy import make_toy

HERE = Path(__file__).parent
DATA = HERE.parent / "shared" / "data"
TOY = PRESETS["toy"][1]


@pytest.fixture(scope="session")
def toy():
    """The toy base model's folder, as the preset finds it."""
    os.chdir(HERE)
    make_toy(HERE / drgrpo.TOY)
    return HERE / drgrpo.TOY


@pytest.fixture(scope="session")
def ranks():
    """A process group of one, in which vLLM can start."""
    return drgrpo.start_ranks()


def tiny_model(vocab_size=64, attention="packed", **kwargs):
    """A random Qwen2 on a CPU, the same each time, with tied embeddings."""
    settings = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, eos_token_id=0,
                    num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=512,
                    tie_word_embeddings=True, initializer_range=0.3, dtype="float32")  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen2Config(vocab_size=vocab_size, attn_implementation=attention,
                             **settings | kwargs)
        return Qwen2ForCausalLM(config)


def some_rollouts(count=12, seed=0, vocab_size=64):
    """Rollouts of uneven lengths; a third have no advantage, and some end in EOS (id 0)."""
    rng = np.random.default_rng(seed)
    rollouts = []
    for i in range(count):
        prompt, response = (rng.integers(1, vocab_size, rng.integers(1, 20)).tolist() for _ in "ab")
        response += [0] * (i % 2)
        rollouts.append(Rollout(i, prompt, response, (-rng.random(len(response))).tolist(),
                                advantage=0.0 if i % 3 == 0 else float(rng.normal())))
    return rollouts


def gradient(rollouts, batches=None, model=None, **settings):
    """The gradient of one update, as `update` adds it up, and the sums of its metrics."""
    model = model or tiny_model()
    model.zero_grad()
    n = len(rollouts)
    config = replace(TOY, prompts_per_step=1, samples_per_prompt=max(2, n),
                     responses_per_update=n, tis_cap=None, **settings)
    forward = partial(token_logprobs, model)
    stats = [backward(forward, b, config) for b in batches or [collate(rollouts)]]
    grad = torch.cat([p.grad.flatten() for p in model.parameters()])
    return grad, {key: sum(float(s[key]) for s in stats) for key in stats[0]}


def assert_same(a, b, tolerance=1e-5):
    assert a.norm() > 0
    assert (a - b).norm() <= tolerance * a.norm(), f"{(a - b).norm() / a.norm():.2g}"


# ------------------------------------------------------------------------------ advantages


def test_advantage_is_reward_minus_group_mean():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]])
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]])
    assert torch.equal(group_advantages(rewards), expected)
    assert torch.equal(rewards, torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]]))
    assert torch.equal(group_advantages(rewards.bool()), expected)


def test_grpo_divides_by_the_std_over_n_minus_1():
    advantages = group_advantages(torch.tensor([[1.0, 0, 0, 0]]), divide_by_std=True)
    assert torch.allclose(advantages, torch.tensor([[1.5, -0.5, -0.5, -0.5]]))


@pytest.mark.parametrize("divide_by_std", [False, True])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.01, 1 / 3])
def test_equal_rewards_give_exact_zeros(reward, divide_by_std):
    advantages = group_advantages(torch.full((2, 12), reward), divide_by_std)
    assert torch.equal(advantages, torch.zeros(2, 12))


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


@pytest.mark.parametrize("advantages, denominator", [((2, 3), 6), ((2, 1), 6), ((2,), 0)])
def test_wrong_shapes_and_denominators_are_refused(advantages, denominator):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="advantages"):
        drgrpo_loss(x, x, torch.zeros(advantages), x, denominator)


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
                logprobs[group], logprobs[group].detach(),
                group_advantages(rewards[group][None], divide_by_std)[0], mask[group],
                size * (1 if divide_by_length else longest), divide_by_length=divide_by_length)
            loss = loss + probability[group].prod().detach() * group_loss
    grads = [torch.autograd.grad(f, model.parameters(), retain_graph=True)
             for f in (-loss * longest * size / (size - 1), expected_reward)]
    return [torch.cat([g.flatten() for g in grad]) for grad in grads]


def test_expected_gradient_is_the_policy_gradient():
    expected, exact = expected_gradients()
    assert exact.abs().max() > 0.05
    assert (expected - exact).abs().max() < 1e-6


@pytest.mark.parametrize("bias", [
    {"divide_by_std": True}, {"divide_by_length": True}, {"train_eos": False},
    {"divide_by_std": True, "divide_by_length": True}])
def test_each_bias_of_grpo_bends_the_expected_gradient(bias):
    expected, exact = expected_gradients(**bias)
    best = expected * (expected @ exact) / (expected @ expected)  # a learning rate can do that
    assert (best - exact).abs().max() > 0.01


# ------------------------------------------------------------------------------ log-probs


def direct_logprobs(model, rollout, temperature=1.0):
    """The definition: one sequence, full logits, no tricks."""
    ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float() / temperature
    chosen = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return chosen[len(rollout.prompt_ids) - 1 :]


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
        assert torch.allclose(row[mask], direct_logprobs(model, rollout, temperature), atol=2e-6)


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
        out, _ = drgrpo.packed_attention(None, q, k, k, scaling=0.1, lengths=lengths, ends=ends)
        assert out.shape == (1, 10, 4, 64) and out.dtype == torch.bfloat16
        context = mock.Mock(temperature=0.9, saved_tensors=(
            empty(10, 64), empty(99, 64), empty(10, dtype=torch.long)))
        logprobs = drgrpo.HeadLogprobs.forward(context, *context.saved_tensors, 0.9)
        assert logprobs.shape == (10,) and logprobs.dtype == torch.float32
        grads = drgrpo.HeadLogprobs.backward(context, logprobs)
        assert [g.shape for g in grads[:2]] == [(10, 64), (99, 64)]
        assert {g.dtype for g in grads[:2]} == {torch.bfloat16}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 7, 100])  # rows, of 40
def test_the_chunked_head_has_the_values_and_gradients_of_the_definition(chunk, temperature,
                                                                         monkeypatch):
    monkeypatch.setattr(drgrpo, "LOGITS_AT_ONCE", chunk * 50)
    torch.manual_seed(0)
    inputs = torch.randn(40, 16).requires_grad_(), torch.randn(50, 16).requires_grad_()
    targets, upstream = torch.randint(0, 50, (40,)), torch.randn(40)
    values = drgrpo.HeadLogprobs.apply(*inputs, targets, temperature)
    logits = inputs[0] @ inputs[1].T / temperature
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(values, expected, atol=1e-5)
    for a, b in zip(torch.autograd.grad(values, inputs, upstream),
                    torch.autograd.grad(expected, inputs, upstream), strict=True):
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
    monkeypatch.setattr(drgrpo, "LOGITS_AT_ONCE", 100 * 2**14)
    with Largest() as largest:
        loss = token_logprobs(model, batch.ids, batch.response_mask).sum()
        kept = largest.size
        loss.backward()
    assert batch.response_mask.sum() > 2000
    assert kept == largest.size == 100 * 2**14, "a chunk's logits, forwards and backwards"


def test_the_gradient_of_a_bf16_head_is_summed_in_fp32(monkeypatch):
    """1 and then many small terms, each in a chunk of its own: bf16 would lose every one."""
    monkeypatch.setattr(drgrpo, "LOGITS_AT_ONCE", 1)
    hidden = torch.full((257, 1), 1 / 256, dtype=torch.bfloat16)
    hidden[0] = 1
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(257, dtype=torch.long)
    drgrpo.HeadLogprobs.apply(hidden, weight, targets, 1.0).sum().backward()
    assert weight.grad.flatten().tolist() == [1, -1]  # half of 1 + 256/256


def test_bf16_logits_become_fp32_logprobs():
    model, batch = tiny_model().bfloat16(), collate(some_rollouts())
    logprobs = token_logprobs(model, batch.ids, batch.response_mask)
    assert logprobs.dtype == torch.float32
    assert (logprobs != logprobs.bfloat16()).any()


# ------------------------------------- what saves memory does not change the gradient


@pytest.mark.parametrize("divide_by_length", [False, True])
@pytest.mark.parametrize("budget", [1, 50, 120])
def test_micro_batches_do_not_change_the_gradient(ranks, budget, divide_by_length):
    rollouts = some_rollouts()
    whole, sums = gradient(rollouts, divide_by_length=divide_by_length)
    batches = [collate(rows) for rank in micro_batches(rollouts, budget, 2) for rows in rank]
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
    (((batches),),) = split_updates(rollouts, config, step=0, world=1)
    kept = [r for rows in batches for r in rows]
    assert len(kept) == 8 and all(r.advantage for r in kept)
    skipped, _ = gradient(rollouts, [collate(rows) for rows in batches])
    assert_same(gradient(rollouts)[0], skipped)
    without, _ = gradient(kept)  # N is 8 here: what forgetting the skipped rows would give
    assert_same(without * 8 / 12, skipped)


def test_denominator_counts_all_responses_times_the_longest_allowed():
    config = replace(TOY, responses_per_update=64, max_response_tokens=80)
    assert config.denominator == 64 * 80
    assert replace(config, divide_by_length=True).denominator == 64


def test_an_empty_micro_batch_has_a_zero_gradient_for_every_weight(ranks):
    grad, sums = gradient([Rollout(-1, [0, 0], [], [])])
    assert grad.shape[0] == sum(p.numel() for p in tiny_model().parameters())
    assert grad.abs().max() == 0 and sums["tokens"] == sums["gap"] == 0


# ------------------------------------------------------------------------------ plan


QWEN_7B = dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
               num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
               max_position_embeddings=4096)


@pytest.fixture
def seven_b(toy, tmp_path):
    """The 7B preset with a config and a tokenizer, but without any weights."""
    Qwen2Config(**QWEN_7B).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(toy / "model").save_pretrained(tmp_path)
    return replace(PRESETS["math-7b"][1], model=str(tmp_path), dataset=str(toy / "train.jsonl"),
                   eval_dataset=str(toy / "test.jsonl"), levels=(), name=f"plan-{tmp_path.name}")


def test_a_plan_needs_no_weights_and_reckons_with_the_models_size(seven_b):
    text = planning.plan(seven_b, *drgrpo.prepare(seven_b))
    assert "7,615,616,512 parameters" in text and "5000 problems, 500 held out" in text
    assert "128 prompts x 8 responses = 1024; 8 update(s) of 128" in text
    assert "| master weights | 3.8 |" in text and "| Adam's moments | 7.6 |" in text
    assert "1 to 4 micro-batch(es)" in text and "| gradients | 30.5 |" in text
    assert "not yet measured on a GPU" in text and "| 24 GB |" in text
    one = replace(seven_b, tokens_per_microbatch=65536)
    assert "| gradients | 3.8 |" in planning.plan(one, *drgrpo.prepare(one))
    offloaded = replace(seven_b, offload=True, gpus=2)
    text = planning.plan(offloaded, *drgrpo.prepare(offloaded))
    assert "| master weights | 0.0 |" in text and "| gradients | 0.0 |" in text


def kept_by_autograd(model):
    """Bytes a token that the forward pass keeps for the backward pass, on real data."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = collate([Rollout(0, [1] * 40, [2] * 60, [0.0] * 60)])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        token_logprobs(model, batch.ids, batch.response_mask)
    return sum(t.untyped_storage().nbytes() for t in kept.values()) / 100


def test_the_plans_activations_are_what_autograd_keeps():
    settings = QWEN_7B | dict(hidden_size=256, num_attention_heads=4, intermediate_size=512,
                              num_key_value_heads=2, vocab_size=99, dtype="bfloat16")
    one, two = (tiny_model(**settings | dict(num_hidden_layers=n)) for n in (1, 2))
    layer = kept_by_autograd(two) - kept_by_autograd(one)
    assert planning.layer_activations(one.to("meta")) == pytest.approx(layer, rel=0.05)


def test_the_plans_hours_come_from_measured_figures_only(seven_b, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "MEASURED", tmp_path / "measured.jsonl")
    row = {"device": "H100", "ranks": 4, "activation_checkpointing": False,
           "parameters": 7_615_616_512, "sample_tokens_per_s": 10_000,
           "update_tokens_per_s": 20_000, "seconds_sample": 1, "seconds_update": 1,
           "seconds_step": 12, "command": "C", "date": "D", "versions": {"torch": "T"}}
    prepared = drgrpo.prepare(seven_b)
    for parameters, scale in ((7_615_616_512, 1), (3_807_808_256, 2), (1_000_000_000, None)):
        lines = [row | {"parameters": parameters} | old for old in ({"seconds_step": 99}, {})]
        planning.MEASURED.write_text("".join(json.dumps(line) + "\n" for line in lines))
        text = planning.plan(seven_b, *prepared)
        assert ("from 10,000 and 20,000 tokens/s of `C`, D, torch T" in text) == bool(scale)
        if scale:
            prompt = np.mean([len(p.prompt_ids) for p in prepared[1]])
            # three passes measured, and here one more for checkpointing and 7/8 for old log-probs
            learning = (prompt + 700) / 20_000 * (4 + 7 / 8) / 3
            step = 1024 * (700 / 10_000 + learning) * 4 / 8 * scale + 10
            assert f"hours      {300 * step / 3600:,.2f} on 8 x H100" in text
            assert text.count("hours  ") == 1, "of two measurements the later one"
        else:
            assert "no model of a third to three times this size" in text


def test_plan_on_the_command_line_trains_nothing(toy, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "toy-base").symlink_to(toy.resolve())
    text = launch(1, HERE / "drgrpo.py", "toy", "--plan", folder=tmp_path)
    assert "hours" in text and not (tmp_path / "runs" / "toy").exists()


def test_the_step_benchmark_takes_a_real_step_apart(toy):
    printed = launch(1, HERE / "benchmarks" / "step.py", "--shape", "toy", "--longest", 40,
                     "--prompt-tokens", 8, "--prompts", 4, "--samples", 4, "--updates", 2,
                     "--steps", 1, "--warmup", 0, "--no-plain", "--json")
    found = json.loads(printed.splitlines()[-1])
    lengths = length_mix(4, 40)
    assert found["sampled"] == 4 * sum(lengths) and found["trained"] == 4 * (sum(lengths) + 4 * 8)
    assert found["real_tokens"] == 1 and found["gap"] < 1e-4
    assert 0 < found["seconds_old_logprobs"] < found["seconds_update"] < found["seconds_step"]


# ------------------------------------------------------------------------------ batches


def test_collate_marks_the_response_and_its_eos():
    batch = collate([Rollout(3, [5, 6], [7, 8, 0], [-1.0, -2.0, -3.0], advantage=0.5),
                     Rollout(4, [9], [9], [-4.0])])  # fmt: skip
    assert batch.ids.tolist() == [[5, 6, 7, 8, 0], [9, 9, 0, 0, 0]]
    assert batch.response_mask.tolist() == [[0, 1, 1, 1], [1, 0, 0, 0]]
    assert batch.sampler_logprobs.tolist() == [[0, -1, -2, -3], [-4, 0, 0, 0]]
    assert batch.advantages.tolist() == [0.5, 0] and batch.problems == [3, 4]


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("budget", [1, 60, 120, 10_000])
def test_micro_batches_keep_the_budget_lose_nothing_and_share_the_work(world, budget):
    rollouts = some_rollouts(100)
    ranks = micro_batches(rollouts, budget, world)
    assert len(ranks) == world and len({len(batches) for batches in ranks}) == 1
    batches = [rows for rank in ranks for rows in rank]
    dealt = sorted(r.problem for rows in batches for r in rows if r.response_ids)
    assert dealt == sorted(r.problem for r in rollouts)
    tokens = [sum(map(len, rows)) for rows in batches]
    assert all(n <= budget or len(rows) == 1 for rows, n in zip(batches, tokens))
    if budget >= 60:
        assert max(tokens) - min(tokens) <= max(map(len, rollouts))
        assert len(batches) <= 1.3 * sum(tokens) / budget + world


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_update_gets_its_share_of_the_responses_whatever_the_number_of_ranks(world):
    rollouts = some_rollouts(48)
    config = replace(TOY, prompts_per_step=6, responses_per_update=12, tokens_per_microbatch=60)

    def problems(world):
        return [sorted(r.problem for rank in update for rows in rank for r in rows
                       if r.response_ids) for update in split_updates(rollouts, config, 5, world)]

    assert problems(world) == problems(1) and len(problems(1)) == 4
    everyone = sum(problems(1), [])
    assert sorted(everyone) == [r.problem for r in rollouts if r.advantage]
    assert everyone != sorted(everyone), "shuffled after the baseline"


def test_a_round_in_which_no_response_has_an_advantage_still_takes_part():
    rollouts = [replace(r, advantage=0.0) for r in some_rollouts()]
    config = replace(TOY, prompts_per_step=2, samples_per_prompt=6, responses_per_update=6)
    for update in split_updates(rollouts, config, 0, 2):
        assert [len(batches) for batches in update] == [1, 1]
        measured = [len(r.response_ids) > 0 for ((r,),) in update]
        assert measured == [True, False], "one real row an update: the gap is always measured"


# ------------------------------------------------------------------------------ settings and data


@pytest.mark.parametrize("settings, message", [
    ({"top_p": 0.9}, "top_p must be 1"),
    ({"temperature": 0.0}, "temperature must be above 0"),
    ({"samples_per_prompt": 1}, "samples_per_prompt must be 2"),
    ({"responses_per_update": 100}, "must divide"),
    ({"template": "chatty"}, "qwen_math, r1, none"),
    ({"steps": 0}, "steps must be above 0"),
    ({"seed": -1}, "seed must be 0 or more"),
    ({"tis_cap": -1.0}, "tis_cap must be above 0"),
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


@pytest.mark.parametrize("settings, message", [
    ({"model": "runs/no/such/model"}, "no model at"),
    ({"max_response_tokens": 10_000}, "lower --max-prompt-tokens"),
    ({"dataset": "nowhere.jsonl"}, "no file nowhere.jsonl"),
    ({"problem_column": "question"}, "has problem, answer"),
    ({"levels": (3,)}, "no column level"),
    ({"max_prompt_tokens": 1}, "no usable problem"),
    ({"track": "wandb"}, "pip install"),
])  # fmt: skip
def test_wrong_inputs_are_found_before_a_model_loads(toy, settings, message):
    with pytest.raises(ValueError, match=message):
        drgrpo.prepare(replace(TOY, name="none", **settings))


def test_a_run_is_never_overwritten(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(Config, "folder", property(lambda self: tmp_path))
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="holds a run already"):
        drgrpo.prepare(TOY)


def test_rows_dropped_from_the_held_out_problems_are_counted_too(toy, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    rows = [{"problem": "1+1", "answer": "2"}, {"problem": "2+2", "answer": " "}]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, _, problems, dropped = drgrpo.prepare(replace(TOY, name="none", eval_dataset=str(held_out)))
    assert len(problems) == 1 and (dropped["eval_no_answer"], dropped["no_answer"]) == (1, 0)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_problems_are_read_filtered_and_counted(toy, tmp_path, kind):
    import datasets

    rows = {"question": ["What is 1+1?\n", "2+2 " * 90, "3+3", "4+4", "5+5"],
            "answer": ["2", "4", " ", "8", "long story #### 1,010"], "level": [3, 3, 3, 1, 5]}
    data = datasets.Dataset.from_dict(rows)
    file = str(tmp_path / f"data.{kind}")
    data.to_json(file) if kind == "jsonl" else data.to_parquet(file)
    tokenizer = load_tokenizer(str(toy / "model"), 100)
    problems, dropped = load_problems(file, tokenizer, TEMPLATES["none"], 64, levels=(3, 5),
                                      problem_column="question")
    assert [(p.prompt, p.answers) for p in problems] == [
        ("What is 1+1?\n", ["2"]), ("5+5", ["1,010"])]
    assert dropped == {"level": 1, "no_answer": 1, "too_long": 1}
    assert problems[0].prompt_ids == tokenizer("What is 1+1?\n")["input_ids"]


@pytest.mark.parametrize("row, message", [
    ({"problem": None, "answer": "1"}, "column problem must hold text"),
    ({"problem": "1+1", "answer": {"a": 1}}, "column answer: a gold must be"),
])  # fmt: skip
def test_rows_of_the_wrong_kind_are_named(toy, tmp_path, row, message):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"problem": "1", "answer": row["answer"]}) + "\n" + json.dumps(row))
    tokenizer = load_tokenizer(str(toy / "model"), 100)
    with pytest.raises(ValueError, match=message):
        load_problems(str(file), tokenizer, TEMPLATES["none"], 64)


def test_a_model_with_dropout_is_refused(toy, tmp_path):
    tiny_model(attention_dropout=0.1).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(toy / "model").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="set attention_dropout to 0"):
        load_tokenizer(str(tmp_path), 100, training=True)
    load_tokenizer(str(tmp_path), 100)  # it can be evaluated


def test_a_model_with_sliding_attention_is_refused_where_the_window_matters(toy, tmp_path):
    tiny_model(use_sliding_window=True, sliding_window=64, max_window_layers=1,
               max_position_embeddings=512).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(toy / "model").save_pretrained(tmp_path)
    load_tokenizer(str(tmp_path), 64, training=True)
    with pytest.raises(ValueError, match="sliding-window"):
        load_tokenizer(str(tmp_path), 65, training=True)
    for config in (MistralConfig(sliding_window=64), Gemma2Config(sliding_window=None),
                   GraniteConfig(logits_scaling=8.0)):
        config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="does not compute: add it there"):
            load_tokenizer(str(tmp_path), 65, training=True)
    MistralConfig(sliding_window=None).save_pretrained(tmp_path)
    load_tokenizer(str(tmp_path), 65, training=True)


def test_a_template_that_writes_bos_gets_one_bos(toy, tmp_path):
    from tokenizers import processors

    tokenizer = load_tokenizer(str(toy / "model"), 100)
    bos = tokenizer.eos_token
    tokenizer.bos_token = bos
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.eos_token_id)])
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"problem": "1+1", "answer": "2"}))
    for template in (TEMPLATES["none"], replace(TEMPLATES["none"], render=lambda p: bos + p)):
        (problem,), _ = load_problems(str(file), tokenizer, template, 64)
        assert problem.prompt_ids.count(tokenizer.eos_token_id) == 1


def test_every_problem_comes_once_an_epoch_in_an_order_of_the_seed():
    taken = [i for step in range(10) for i in step_problems(23, step, 7, seed=1)]
    for epoch in range(3):
        assert sorted(taken[23 * epoch : 23 * (epoch + 1)]) == list(range(23))
    assert taken[:23] != taken[23:46] and taken[:23] != sorted(taken[:23])
    assert step_problems(23, 0, 7, seed=1) != step_problems(23, 0, 7, seed=2)
    assert sorted(step_problems(3, 0, 9, seed=0)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    np.random.seed(5)
    torch.manual_seed(5)
    assert taken[:7] == step_problems(23, 0, 7, seed=1), "no global random state is read"


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
    model = tiny_model()
    sampler.sleep()
    sampler.wake(model)
    assert calls == ["sleep 2", "empty", "empty", "wake weights", "reload_weights", "empty",
                     "wake kv_cache", "reset"]
    assert set(sampler.llm.weights) == set(model.state_dict())
    assert {w.dtype for w in sampler.llm.weights.values()} == {torch.bfloat16}
    sampler.llm.resets = False
    with pytest.raises(RuntimeError, match="prefix cache"):
        sampler.wake(model)


def test_on_a_gpu_the_engine_takes_what_the_policy_leaves_free(monkeypatch):
    import vllm

    settings, calls = {}, []
    monkeypatch.setattr(drgrpo, "CUDA", True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "mem_get_info",
                        lambda: calls.append("ask") or (60 * 2**30, 80 * 2**30))
    monkeypatch.setattr(vllm, "LLM", lambda model, **given: settings.update(given))
    monkeypatch.setattr(drgrpo.dist, "all_reduce", lambda tensor: calls.append("NCCL"))
    Sampler("model", 100, reserve=17 * 2**30)
    assert settings["gpu_memory_utilization"] == pytest.approx((0.95 * 60 - 17) / 80)
    assert settings["enable_sleep_mode"] and "enforce_eager" not in settings  # CUDA graphs
    assert settings["dtype"] == torch.bfloat16 and calls == ["NCCL", "empty", "ask"]
    with pytest.raises(ValueError, match="--offload, or more GPUs"):
        Sampler("model", 100, reserve=57 * 2**30)


@pytest.fixture(scope="session")
def engine(ranks, toy, tmp_path_factory):
    """An engine on a random model with tied embeddings, and that model as a policy."""
    folder = tmp_path_factory.mktemp("engine") / "model"
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # the first thing a CUDA machine would do differently is to give the policy the GPU
    config = replace(TOY, model=str(folder), max_prompt_tokens=300, max_response_tokens=20)
    model = drgrpo.make_policy(config)
    sampler = Sampler(config.model, 320)
    yield sampler, model, config
    sampler.close()


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


LONG = [int(i) for i in np.random.default_rng(0).integers(5, 60, 290)]  # more than two cache blocks


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
    sampler, model, config = engine
    before = draw(engine, LONG)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    rollouts = [replace(r, advantage=a) for r, a in zip(before, (1, -1, 0.5, -0.5), strict=True)]
    old = {k: v.full_tensor().clone() for k, v in model.state_dict().items()}
    config = replace(config, prompts_per_step=1, samples_per_prompt=4, responses_per_update=4)
    drgrpo.update(model, optimizer, [[collate(rollouts)]], config)
    weights = {k: v.full_tensor() for k, v in model.state_dict().items()}
    moved = torch.cat([(old[k] != v).flatten() for k, v in weights.items()])
    assert gap(engine, before) > 0.05, "the update changed the policy"
    assert gap(engine, draw(engine, LONG)) > 0.05, "without a sync the engine is stale"
    sampler.wake(model)
    assert gap(engine, draw(engine, LONG)) < 1e-4, "the prompt is cached: the cache must be reset"
    assert moved.float().mean() > 0.5


def test_stale_weights_stop_the_run_and_change_nothing(engine):
    sampler, model, config = engine
    sampler.wake(model)
    group = [replace(r, advantage=(-1) ** i) for i, r in enumerate(draw(engine, LONG))]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.2)
    before = {k: v.full_tensor().clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    config = replace(config, prompts_per_step=1, samples_per_prompt=4, responses_per_update=2)
    for updates in ([[collate(group)]], [[collate(group[:2])], [collate(group[2:])]]):
        with pytest.raises(RuntimeError, match="differ by .* above max_gap"):
            drgrpo.update(model, optimizer, updates, config)
    assert all(torch.equal(before[k], v.full_tensor()) for k, v in model.state_dict().items())
    optimizer.zero_grad()
    sampler.wake(model)


def test_score_gives_truncated_responses_no_reward_but_counts_them(engine):
    config = replace(TOY, prompts_per_step=2, samples_per_prompt=2, responses_per_update=4)
    problems = [Problem("1+1", [1], ["2"]), Problem("2+2", [2], ["4"])]
    texts = ["\\boxed{2}", "\\boxed{2}", "\\boxed{4}", "no idea"]
    rollouts = [Rollout(i // 2, [1], [1], [-1.0], text, "length" if i == 1 else "stop")
                for i, text in enumerate(texts)]
    with Grader("none") as grader:
        scored = drgrpo.score(grader, problems, rollouts, config)
    assert [r.reward for r in scored] == [1, 0, 1, 0]
    assert [r.advantage for r in scored] == [0.5, -0.5, 0.5, -0.5]


# ------------------------------------------------------------------------------ learning


def test_importance_weights_are_per_token_and_capped(ranks):
    rng = np.random.default_rng(0)
    noise = torch.tensor(rng.normal(0, 0.02, 3000), dtype=torch.float32)
    assert noise.exp().clamp(max=2).mean() == pytest.approx(1, abs=2e-3)  # a product would not be

    forward = partial(token_logprobs, tiny_model())
    rollout = Rollout(0, [5], [6, 7], [0.0, 0.0], advantage=1.0)
    batch = collate([rollout])
    trainer = forward(batch.ids, batch.response_mask).detach()

    def weight(differences, cap):
        """Sum of both tokens' weights, where trainer - sampler is `differences`; tokens capped."""
        batch.sampler_logprobs = trainer - torch.tensor([differences])
        config = replace(TOY, prompts_per_step=1, samples_per_prompt=2, responses_per_update=1,
                         tis_cap=cap, max_response_tokens=1)
        stats = backward(forward, batch, config)
        return -stats["loss"].item(), stats["tis_capped"].item()

    assert weight([0.1, -0.2], None) == (2, 0)
    assert weight([0.1, -0.2], 2.0) == (pytest.approx(np.exp(0.1) + np.exp(-0.2), rel=1e-4), 0)
    assert weight([5.0, -0.2], 2.0) == (pytest.approx(2 + np.exp(-0.2), rel=1e-4), 1)


def test_weights_are_fp32_masters_and_nearly_all_move_at_the_papers_lr(ranks, tmp_path):
    model = tiny_model().bfloat16()
    model.save_pretrained(tmp_path)
    policy = drgrpo.make_policy(replace(TOY, model=str(tmp_path)))
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    before = {k: v.full_tensor().clone() for k, v in policy.state_dict().items()}
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-6, (0.9, 0.95), weight_decay=0)
    config = replace(TOY, prompts_per_step=1, samples_per_prompt=12, responses_per_update=12,
                     max_gap=100)
    for _ in range(3):
        drgrpo.update(policy, optimizer, [[collate(some_rollouts())]], config)
    used = [k for k in before if "embed" not in k and "lm_head" not in k]
    after = policy.state_dict()
    moved = torch.cat([(before[k] != after[k].full_tensor()).flatten() for k in used])
    assert moved.float().mean() > 0.99


@pytest.mark.parametrize("settings", [
    {"offload": True}, {"compile": True}, {"activation_checkpointing": True},
    {"compile": True, "activation_checkpointing": True}, {"tokens_per_microbatch": 50}])
def test_what_saves_memory_or_time_makes_the_same_update(ranks, tmp_path, settings, monkeypatch):
    """The whole update, with old log-probs; `compile` without the compiler behind it."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    tiny_model().save_pretrained(tmp_path)
    rollouts, after = some_rollouts(), []
    for changed in ({}, settings):
        config = replace(TOY, model=str(tmp_path), prompts_per_step=2, samples_per_prompt=6,
                         responses_per_update=6, max_gap=100, **changed)
        policy = drgrpo.make_policy(config)
        optimizer = torch.optim.AdamW(policy.parameters(), 1e-3, fused=True)
        batches = [[collate(rows) for rows in rank]
                   for (rank,) in split_updates(rollouts, config, 0, 1)]
        metrics = drgrpo.update(policy, optimizer, batches, config)
        metrics.pop("seconds_old_logprobs")
        weights = torch.cat([w.flatten() for _, w in drgrpo.full_weights(policy, torch.float32)])
        after.append((metrics, weights))
    assert after[1][0] == pytest.approx(after[0][0], rel=1e-4, abs=1e-6)
    assert after[0][0]["kl"] > 1e-4, "the second update's old policy is the one before the first"
    assert_same(after[0][1], after[1][1])


def test_a_loss_that_is_not_finite_names_its_problems(ranks):
    rollouts = some_rollouts()
    rollouts[4].advantage = float("nan")
    with pytest.raises(FloatingPointError, match="problems .*4"):
        gradient(rollouts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_loads_with_the_same_logprobs(ranks, toy, tmp_path, tied, dtype):
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    base = tiny_model(len(tokenizer), tie_word_embeddings=tied).to(dtype)
    base.save_pretrained(tmp_path / "base")
    model = drgrpo.make_policy(replace(TOY, model=str(tmp_path / "base")))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)  # exact in bf16
    for _ in range(2):  # the second replaces the first
        weights = drgrpo.full_weights(model, model.config.dtype)
        drgrpo.save_checkpoint(weights, model, tokenizer, tmp_path / "model")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["base", "model"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert type(saved) is Qwen2ForCausalLM and saved.dtype == dtype
    assert {w.dtype for w in weights.values()} == {dtype}
    assert ("lm_head.weight" in weights) == (not tied)
    assert saved.config.architectures == ["Qwen2ForCausalLM"]
    assert "packed" not in (tmp_path / "model" / "config.json").read_text()
    assert saved.generation_config.eos_token_id == base.generation_config.eos_token_id == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("1+1") == tokenizer("1+1")
    batch = collate(some_rollouts())
    expected = model(batch.ids, batch.response_mask)
    found = token_logprobs(saved.float(), batch.ids, batch.response_mask)
    assert torch.allclose(found, expected, atol=1e-2 if dtype == torch.bfloat16 else 1e-5)


# ------------------------------------------------------------------------------ ranks and runs


def launch(ranks, *arguments, folder=HERE, timeout=300):
    """Run a script on so many ranks as a user would, and return what it printed."""
    environment = {k: v for k, v in os.environ.items() if k not in (
        "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, timeout=timeout, capture_output=True, text=True,
                          env=environment | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


UPDATES = """
import json, sys, torch, drgrpo
from dataclasses import replace
from functools import partial
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp
from unittest import mock
from test_drgrpo import TOY, some_rollouts
drgrpo.start_ranks()
rank, world = drgrpo.dist.get_rank(), drgrpo.dist.get_world_size()
config = replace(TOY, model=sys.argv[1], prompts_per_step=4, samples_per_prompt=6,
                 responses_per_update=12, tokens_per_microbatch=40, max_gap=100,
                 activation_checkpointing=True)
model = drgrpo.make_policy(config)
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
metrics, reductions = [], []
for step in range(3):
    rollouts = some_rollouts(24, seed=step)
    for r in rollouts[step:]:  # the first round has no gradient, the second a single row
        r.advantage = float(step == 2) * r.advantage
    rollouts[0].advantage = float(step == 1)
    updates = drgrpo.split_updates(rollouts, config, step, world)
    batches = [[drgrpo.collate(rows) for rows in ranks[rank]] for ranks in updates]
    with mock.patch.object(fsdp, "foreach_reduce", wraps=fsdp.foreach_reduce) as reduce:
        metrics.append(drgrpo.update(model, optimizer, batches, config))
    assert metrics[-1].pop("seconds_old_logprobs") > 0
    reductions.append((sum(map(len, batches)), reduce.call_count))
weights = torch.cat([w.flatten() for _, w in drgrpo.full_weights(model, torch.float64)])
if rank == 0:
    print(json.dumps({"metrics": metrics, "reductions": reductions, "norm": weights.norm().item(),
                      "probe": weights[:: len(weights) // 50].tolist()}))
drgrpo.dist.destroy_process_group()
"""


def test_two_ranks_with_uneven_work_make_the_updates_of_one(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    script = tmp_path / "updates.py"
    script.write_text(UPDATES)
    one, two = (json.loads(launch(n, script, tmp_path / "model", timeout=120).splitlines()[-1])
                for n in (1, 2))
    assert one["norm"] == pytest.approx(two["norm"], rel=1e-6)
    assert one["probe"] == pytest.approx(two["probe"], rel=1e-4, abs=1e-6)
    for a, b in zip(one["metrics"], two["metrics"], strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-7)
    norms = [m["grad_norm"] for m in one["metrics"]]
    assert norms[0] == 0 and norms[1] > 0 and norms[2] > 0
    # two layers and the rest of the model, reduced once in each of the two updates
    assert [n for _, n in two["reductions"]] == [6, 6, 6] and two["reductions"][2][0] > 4


def whole_run(toy, folder, ranks):
    """Three steps of two updates each from the command line; returns rows of metrics, weights."""
    (folder / "runs").mkdir(parents=True)
    (folder / "runs" / "toy-base").symlink_to(toy)
    launch(ranks, HERE / "drgrpo.py", "toy", "--steps", 3, "--prompts-per-step", 8,
           "--responses-per-update", 32, "--tokens-per-microbatch", 512, "--eval-every", 3,
           folder=folder)
    run = folder / "runs" / "toy"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    return run, rows, samples


@pytest.fixture(scope="session")
def run_of_one(toy, tmp_path_factory):
    return whole_run(toy, tmp_path_factory.mktemp("one"), 1)


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


SAVES = """
import sys, drgrpo
from dataclasses import replace
from test_drgrpo import TOY
drgrpo.save_checkpoint = lambda *args: print("saved", args[-1])
if __name__ == "__main__":  # the grader's workers import this file
    model, data = sys.argv[1:]
    config = replace(TOY, model=model, dataset=data, eval_dataset=None, steps=3, eval_every=2,
                     prompts_per_step=2, samples_per_prompt=4, responses_per_update=8)
    drgrpo.train(config, *drgrpo.prepare(config))
"""


def test_weights_are_saved_on_the_way_and_steps_without_metrics_leave_no_line(toy, tmp_path):
    script = tmp_path / "saves.py"
    script.write_text(SAVES)
    printed = launch(1, script, toy / "model", toy / "train.jsonl", folder=tmp_path)
    assert printed.count("saved runs/toy/model") == 2, "after step 2, and at the end"
    rows = (tmp_path / "runs" / "toy" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0, 1, 2]


def test_two_ranks_make_the_run_of_one(toy, run_of_one, tmp_path):
    _, one, samples_of_one = run_of_one
    run, two, samples = whole_run(toy, tmp_path, 2)
    assert [s["response"] for s in samples] == [s["response"] for s in samples_of_one]
    for a, b in zip(one, two, strict=True):
        for key in [key for key in a if "seconds" not in key and key != "gap"]:
            same = b[key] is None or pytest.approx(b[key], rel=1e-3, abs=1e-6)
            assert a[key] is b[key] or a[key] == same, key
    weights = [AutoModelForCausalLM.from_pretrained(r / "model").state_dict()
               for r in (run, run_of_one[0])]
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], atol=1e-5), name


TOY_EVAL = ("--template", "none", "--max-prompt-tokens", 64, "--max-response-tokens", 72)


def test_eval_scores_a_saved_model_as_training_did(toy, run_of_one):
    run, rows, _ = run_of_one
    launch(1, HERE / "eval.py", "--model", run / "model", "--tasks", toy / "test.jsonl",
           "--output", run / "eval", *TOY_EVAL)
    (scores,) = json.loads((run / "eval" / "results.json").read_text())["results"]
    assert scores["problems"] == 500
    for key in [key for key in rows[3] if key.startswith("eval_")]:
        assert scores[key.removeprefix("eval_")] == rows[3][key], key


# ------------------------------------------------------------------- templates and grader

needs_data = pytest.mark.skipif(not DATA.exists(), reason="the data files are not here")
BENCHMARKS = ("aime24", "amc23", "math500", "minerva", "olympiadbench", "math_lvl3to5_train")


def read_rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def grader():
    with Grader("qwen_math") as grader:
        yield grader


def boxed(answer: object) -> str:
    return f"So the answer is \\boxed{{{answer}}}."


# --- templates -----------------------------------------------------------------------------------

QWEN = (
    "<|im_start|>system\n"
    "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    "<|im_start|>user\n"
    "What is {1} + $2$?\\n<|im_end|>\n"
    "<|im_start|>assistant\n"
)
R1 = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves"
    " it. The Assistant first thinks about the reasoning process in the mind and then provides the"
    " User with the answer. The reasoning process is enclosed within <think> </think> and answer is"
    " enclosed within <answer> </answer> tags, respectively, i.e., <think> reasoning process here"
    " </think> <answer> answer here </answer>.\n"
    "User: What is {1} + $2$?\\n\n"
    "Assistant: <think>"
)


@pytest.mark.parametrize(
    "name, prompt, stop",
    [
        ("qwen_math", QWEN, ()),
        ("r1", R1, ("</answer>",)),
        ("none", "What is {1} + $2$?\\n", ()),
    ],
)
def test_templates_are_byte_exact(name, prompt, stop):
    template = TEMPLATES[name]
    assert template.render("What is {1} + $2$?\\n") == prompt
    assert (template.name, template.stop) == (name, stop)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("\\boxed{70}", "70"),
        ("\\boxed{70} then \\boxed{\\frac{1}{2}} end}", "\\frac{1}{2}"),
        ("\\boxed{\\boxed{2}}", "2"),
        ("\\boxed{}", ""),
        ("\\boxed{70} then \\boxed{7", None),
        ("\\boxed{70} then \\boxed 7", None),
        ("\\boxed {70}", None),
        ("\\boxed 7", None),
        ("\\fbox{70}", None),
        ("boxed{70}", None),
        ("the answer is 70", None),
        ("", None),
    ],
)
def test_only_the_last_box_is_the_answer(text, answer):
    assert last_boxed(text) == answer
    assert TEMPLATES["qwen_math"].extract(text) == TEMPLATES["none"].extract(text) == answer


@pytest.mark.parametrize(
    "text, answer",
    [
        (" so </think> <answer> 70 </answer>", "70"),
        (" so </think> <answer> \\boxed{70} </answer>", "70"),
        (" \\boxed{1} </think> <answer> 70 </answer>", "70"),
        (" so </think> <answer> 71 </answer> <answer> 70 </answer>", "70"),
        (" so </think> <answer> \\boxed{70 </answer>", None),
        (" so </think> <answer> 70", None),
        (" so </think>\n<answer> 70 </answer>", None),
        (" so </think><answer> 70 </answer>", None),
        (" \\boxed{70}", None),
    ],
)
def test_an_r1_answer_stands_in_its_tags(text, answer):
    assert TEMPLATES["r1"].extract(text) == answer


def test_extraction_takes_linear_time():
    start = time.monotonic()
    assert last_boxed("\\boxed{" + "{" * 1_000_000) is None
    assert last_boxed("\\boxed{1} " * 30_000) == "1"
    assert TEMPLATES["r1"].extract("</think> <answer>" * 20_000 + "</answer>") == ""
    assert time.monotonic() - start < 10


# --- comparison ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cell, golds",
    [
        (" 70\n", ["70"]),
        (70, ["70"]),
        (142.0, ["142.0"]),
        (["1", 2, " 3.5 \n", ""], ["1", "2", "3.5"]),
        ("", []),
        ("  ", []),
        ([], []),
        ([""], []),
    ],
)
def test_a_gold_cell_becomes_a_list_of_strings(cell, golds):
    assert gold_answers(cell) == golds


@pytest.mark.parametrize("cell", [None, {"a": 1}, [["1"]], [None]])
def test_a_gold_cell_of_another_type_raises(cell):
    with pytest.raises(TypeError, match="gold"):
        gold_answers(cell)


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("70", "70"),
        ("25", "025"),
        ("142", 142.0),
        ("142", "142.0"),
        ("$70$", "70"),
        ("\\dfrac{6}{8}", "\\frac{3}{4}"),
        ("3/4", "0.75"),
        ("11\\sqrt{2}", "11\\sqrt2"),
        ("\\sqrt{242}", "11\\sqrt2"),
        ("\\left( 3, \\dfrac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
        ("84, 69", "$69$,$84$"),
        ("\\$32348", "\\$32,348"),
        ("Evelyn", "\\text{Evelyn}"),
        ("4.5\\times 10^{33}", "4.5e33"),
        ("(-\\infty, 0) \\cup \\{1\\}", "$(-\\infty, 0) \\cup\\{1\\}$."),
        ("3", ["1", "2", "3"]),
        ("52_8", "52_{8}"),
        ("52_8", "52"),
        ("x=5", "5"),
        ("f(x) = 2x+1", "2x+1"),
        ("\\mathrm{Area} = 12", "12"),
        ("2+3=5", "5"),
        ("-2 \\le x \\le 7", "[-2,7]"),
        ("\\text{The answer is } 12", "12"),
        ("The final answer is $12$.", "12"),
        ("12\\ 345", "12,345"),
        ("1.6e-19", "1.6 \\times 10^{-19}"),
    ],
)
def test_equal_answers_match(answer, gold):
    assert answers_match(answer, gold)


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("71", "70"),
        ("0.33", "\\frac{1}{3}"),
        ("11", "11\\sqrt2"),
        ("\\{1,3\\}", "3"),
        ("(-2,7)", "[-2,7]"),
        ("nylevE", "\\text{Evelyn}"),
        ("0", "$(-\\infty, 0) \\cup\\{1\\}$."),
        ("2", "\\hbar \\omega(v+1 / 2)-\\frac{E_{0}^{2} e^{2}}{2 m \\omega^{2}}"),
        ("52", "52_8"),
        ("52_9", "52_8"),
        ("x+2=5", "5"),
        ("x^2-7x=0", "0"),
        ("k=k", "k=K"),
        ("10^{-30}", "8 \\times 10^{-19}"),
        ("0", "10^{-20}"),
        ("\\leftarrow", "\\rightarrow"),
        ("4", ["1", "2", "3"]),
        ("", "70"),
        ("$ $", "$$"),
        ("", ""),
        ("70", ""),
        ("70", []),
        ("7" * 100_000, "70"),
    ],
)
def test_unequal_or_empty_answers_do_not_match(answer, gold):
    assert not answers_match(answer, gold)


def test_the_gold_is_the_first_argument_of_the_comparison():
    assert answers_match("2x+3", "y=2x+3")
    assert not answers_match("1", "2x+z=1")


def test_a_comparison_without_end_raises_and_logs_nothing(caplog):
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        answers_match("9^{9^{9^{9}}}", "70")
    assert time.monotonic() - start < 10 * templates.MATH_SECONDS
    assert caplog.text == ""


@needs_data
def test_every_gold_matches_itself():
    for name in BENCHMARKS:
        golds = [gold for row in read_rows(name) for gold in gold_answers(row["answer"])]
        in_tags = [TEMPLATES["r1"].extract(f"</think> <answer> {gold} </answer>") for gold in golds]
        in_boxes = [last_boxed(boxed(gold)) for gold in golds]
        for answers in (in_boxes, in_tags):
            assert [g for a, g in zip(answers, golds) if not answers_match(a, g)] == []


# --- the grader ----------------------------------------------------------------------------------


def test_rewards_are_one_or_zero_in_the_order_of_the_responses(grader):
    before = grader.graded
    responses = [boxed("70"), boxed("71"), "70", boxed("\\frac{2}{4}"), boxed("70"), boxed("1")]
    answers = ["70", "70", "70", ["3", "0.5"], "70", ""]
    rewards = grader.grade(responses, answers)
    assert rewards == [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    assert all(isinstance(reward, float) for reward in rewards)
    assert (grader.graded - before, grader.timeouts, grader.errors) == (6, 0, 0)
    assert grader.grade([], []) == []


def test_many_symbols_left_of_an_equals_sign_take_no_time(grader):
    before = grader.timeouts
    responses = [boxed("\\alpha" * 20 + "+1=5"), boxed("x" + "_a" * 30 + "+1=5")]
    assert grader.grade(responses, ["5", "5"]) == [0.0, 0.0]
    assert grader.timeouts == before


def test_as_many_answers_as_responses(grader):
    with pytest.raises(ValueError, match="2 responses but 1 answers"):
        grader.grade(["a", "b"], ["1"])


def test_a_template_is_given_by_name_or_as_a_record():
    with pytest.raises(ValueError, match="'qwen'.*qwen_math, r1, none"):
        Grader("qwen")
    shout = Template("shout", str.upper, (), str.lower)
    with Grader(shout, workers=1) as grader:
        assert grader.template is shout
        assert grader.grade(["X+X"], ["2x"]) == [1.0]


def test_grading_works_outside_the_main_thread(grader):
    rewards = []
    batch = [boxed("\\frac{2}{4}"), boxed("3")], ["0.5", "2"]
    thread = threading.Thread(target=lambda: rewards.extend(grader.grade(*batch)))
    thread.start()
    thread.join(30)
    assert rewards == [1.0, 0.0]


def test_comparisons_happen_only_in_workers(grader, hostile):
    grader._compare = hostile.worker_id
    try:
        assert grader.grade([boxed(os.getpid())], ["1"]) == [1.0]
    finally:
        grader._compare = answers_match


# Comparisons that misbehave, in a module of their own: workers import it, and it must be light.
HOSTILE = """
import collections, itertools, mmap, os, signal, time
from templates import answers_match


def worker_id(answer: str, golds: tuple) -> bool:
    return str(os.getpid()) != answer


def hostile(answer: str, golds: tuple) -> bool:
    '''A comparison that does what a dangerous answer might make the real one do.'''
    if answer == "hang":
        collections.deque(itertools.count(), maxlen=0)  # in C: no signal handler ever runs
    if answer == "exit":
        os._exit(3)
    if answer == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if answer == "fill":
        blocks = []
        while len(blocks) < 64:  # 16 GiB, without touching them
            blocks.append(mmap.mmap(-1, 2**28))
        return True
    if answer == "leave":
        raise SystemExit(1)
    if answer.startswith("bug"):
        raise KeyError(answer)
    return answers_match(answer, golds)


def note_call(file: str, answer: str, golds: tuple) -> bool:
    with open(file, "a") as out:
        out.write(f"{answer}\\n")
    return answer in golds


def slow(answer: str, golds: tuple) -> bool:
    time.sleep(0.2)
    return True
"""


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "hostile_comparisons.py").write_text(HOSTILE)
    sys.path.append(str(folder))
    return importlib.import_module("hostile_comparisons")


CLEAN = [boxed(f"{i}+0") for i in range(20)]
CLEAN_GOLDS = [str(i if i % 2 else -1) for i in range(20)]
CLEAN_REWARDS = [float(i % 2) for i in range(20)]


@pytest.mark.parametrize(
    "answer, timeouts, errors",
    [("hang", 1, 0), ("exit", 0, 1), ("kill", 0, 1), ("fill", 0, 1), ("leave", 0, 1)],
)
def test_a_lost_worker_costs_one_reward_and_is_counted_once(answer, timeouts, errors, hostile):
    with Grader("none", timeout=1.5) as grader:
        grader._compare = hostile.hostile
        assert grader.grade(CLEAN + [boxed(answer)], CLEAN_GOLDS + ["1"]) == CLEAN_REWARDS + [0.0]
        assert (grader.timeouts, grader.errors) == (timeouts, errors)
        assert grader.grade(CLEAN, CLEAN_GOLDS) == CLEAN_REWARDS
        assert (grader.timeouts, grader.errors) == (timeouts, errors)


def test_more_hangs_than_workers_do_not_stop_the_grading(hostile):
    with Grader("none", timeout=0.5) as grader:
        grader._compare = hostile.hostile
        responses, golds = [boxed("hang")] * 4 + CLEAN, [str(i) for i in range(4)] + CLEAN_GOLDS
        start = time.monotonic()
        assert grader.grade(responses, golds) == [0.0] * 4 + CLEAN_REWARDS
        assert grader.timeouts == 4
        assert time.monotonic() - start < 100
        assert grader.grade(CLEAN, CLEAN_GOLDS) == CLEAN_REWARDS


def test_each_distinct_pair_is_compared_once_but_every_response_counts(tmp_path, hostile):
    calls = tmp_path / "calls"
    with Grader("none") as grader:
        grader._compare = partial(hostile.note_call, str(calls))
        responses = [boxed(i % 3) for i in range(20)]
        assert grader.grade(responses, ["1"] * 20) == [float(i % 3 == 1) for i in range(20)]
        assert sorted(calls.read_text().split()) == ["0", "1", "2"]
        assert grader.graded == 20


def test_grading_can_begin_before_it_is_asked_for(tmp_path, hostile):
    calls = tmp_path / "calls"
    with Grader("none") as grader:
        grader._compare = partial(hostile.note_call, str(calls))
        grader.start([boxed(1), boxed(1), "no answer"], ["1", "1", "1"])
        grader.start([boxed(1), boxed(2)], ["1", "1"])
        wait_until(lambda: calls.exists() and len(calls.read_text().split()) == 2, 30)
        assert grader.graded == 0
        assert grader.grade([boxed(2), boxed(3), boxed(1)], ["1"] * 3) == [0.0, 0.0, 1.0]
        assert sorted(calls.read_text().split()) == ["1", "2", "3"], "each compared once"
        assert grader.grade([boxed(1)], ["1"]) == [1.0]
        assert sorted(calls.read_text().split()) == ["1", "1", "2", "3"], "nothing is kept"


def test_a_comparison_that_began_early_may_hang_and_its_pool_may_die(hostile):
    others = set(workers_of_this_process())
    with Grader("none", timeout=1.0) as grader:
        grader._compare = hostile.hostile
        grader.start([boxed("hang"), boxed("1")], ["1", "1"])
        assert grader.grade([boxed("hang"), boxed("1")], ["1", "1"]) == [0.0, 1.0]
        assert (grader.timeouts, grader.errors) == (1, 0)
    with Grader("none") as grader:
        assert grader.grade(CLEAN, CLEAN_GOLDS) == CLEAN_REWARDS
        for pid in set(workers_of_this_process()) - others:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)
        for _ in range(3):  # pebble notices at some time
            grader.start(CLEAN, CLEAN_GOLDS)
            time.sleep(0.2)
        assert grader.grade(CLEAN, CLEAN_GOLDS) == CLEAN_REWARDS


def test_waiting_for_a_worker_is_not_counted_as_running_time(hostile):
    with Grader("none", workers=1, timeout=0.8) as grader:
        grader._compare = hostile.slow
        assert grader.grade([boxed(i) for i in range(8)], ["1"] * 8) == [1.0] * 8  # 1.6 s in all


def test_a_batch_of_mostly_errors_raises_the_first_error(hostile):
    with Grader("none") as grader:
        grader._compare = hostile.hostile
        bugs = [boxed(f"bug {i}") for i in range(8)]
        with pytest.raises(RuntimeError, match=r"8 of 15 .*KeyError\('bug 0'\)"):
            grader.grade(bugs + CLEAN[:7], ["1"] * 15)
        assert grader.grade(bugs + CLEAN[:8], ["1"] * 16)[:8] == [0.0] * 8
        assert grader.grade(bugs[:7], ["1"] * 7) == [0.0] * 7
        assert grader.errors == 8 + 8 + 7


def workers_of_this_process() -> list[int]:
    return [child.pid for child in multiprocessing.active_children()]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_idle_workers_lost_to_a_signal_are_replaced(sent, monkeypatch):
    monkeypatch.setattr(templates, "PATIENCE", 3.0)
    others = set(workers_of_this_process())
    with Grader("none") as grader:
        assert grader.grade(CLEAN, CLEAN_GOLDS) == CLEAN_REWARDS
        for pid in set(workers_of_this_process()) - others:
            os.kill(pid, sent)
        time.sleep(0.5)
        assert grader.grade(CLEAN, CLEAN_GOLDS) == CLEAN_REWARDS
        assert (grader.timeouts, grader.errors) == (0, 0)
    assert set(workers_of_this_process()) <= others


TRAINER = """
    import collections, itertools, os, signal, sys
    sys.path.insert(0, sys.argv[1])
    from templates import Grader

    def spin(answer, golds):
        with open(sys.argv[2], "w") as file:
            file.write(str(os.getpid()))
        collections.deque(itertools.count(), maxlen=0)

    if __name__ == "__main__":
        signal.signal(signal.SIGXCPU, signal.SIG_IGN)
        grader = Grader("none", workers=1, timeout=0.3)
        grader._compare = spin
        grader.grade(["\\\\boxed{1}"], ["2"])
"""


def test_a_stuck_worker_does_not_outlive_a_killed_trainer(tmp_path):
    script, pid_file = tmp_path / "trainer.py", tmp_path / "pid"
    script.write_text(textwrap.dedent(TRAINER))
    arguments = [sys.executable, script, Path(templates.__file__).parent, pid_file]
    trainer = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    wait_until(lambda: pid_file.exists() and pid_file.read_text(), 20)
    trainer.kill()
    trainer.wait()
    worker = Path("/proc") / pid_file.read_text()
    assert worker.exists()
    wait_until(lambda: not worker.exists(), 15)


def wait_until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@needs_data
def test_labelled_cases_are_graded_right_and_hostile_ones_score_zero():
    cases = read_rows("grader_cases")
    hostile = [case["id"] for case in cases if "bomb" in case["note"]]
    cases = [case for case in cases if case["id"] not in hostile[1::2]]  # half: they take 2 s each
    rewards = {}
    for name, template in [("qwen_math", "qwen_math"), ("r1", "r1"), ("no", "none")]:
        rows = [case for case in cases if case["template"] == name]
        with Grader(template, workers=4) as grader:
            graded = grader.grade([r["response"] for r in rows], [r["gold"] for r in rows])
        rewards |= {row["id"]: reward for row, reward in zip(rows, graded)}
        assert grader.errors == 0
    clear = [c for c in cases if "debatable" not in c["note"] and "lenient" not in c["note"]]
    missed = [case for case in clear if rewards[case["id"]] != case["expected"]]
    assert len(missed) <= 2, [case["note"] for case in missed]
    assert not any(rewards[name] for name in hostile[::2])


# --- evaluation ----------------------------------------------------------------------------------


class StoredSampler:
    """Says what it was given: the responses to each problem, by the problem's prompt."""

    tensor_parallel = 1

    def __init__(self, responses: dict[str, list[str]], finish_reason: str = "stop"):
        self.responses, self.finish_reason = responses, finish_reason

    def generate(self, problems, seeds, n, max_tokens, temperature, stop, finished):
        return [[Rollout(i, p.prompt_ids, [1] * len(text), [], text, self.finish_reason)
                 for text in self.responses[p.prompt][:n]] for i, p in enumerate(problems)]


def evaluate_stored(grader, responses: list[list[str]], gold="1/2", file=None, **settings):
    problems = [Problem(str(i), [1], [gold]) for i in range(len(responses))]
    sampler = StoredSampler({str(i): texts for i, texts in enumerate(responses)}, **settings)
    return evaluate(sampler, grader, problems, 9, n=len(responses[0]), file=file)


@pytest.mark.parametrize("n, c", [(n, c) for n in range(1, 7) for c in range(n + 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_response(n, c):
    for k in range(1, n + 1):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]))
    for wrong in [(n, c, 0), (n, c, n + 1), (n, n + 1, 1), (n, -1, 1)]:
        with pytest.raises(ValueError, match="needs 0 <= c <= n"):
            pass_at_k(*wrong)


@pytest.mark.parametrize("problems, a, b, n", [
    (30, 1, 20, 1), (30, 4, 6, 1), (30, 0.3, 0.4, 8), (83, 0.5, 0.7, 1), (272, 0.2, 0.8, 4)])
def test_intervals_hold_the_true_accuracy_in_95_of_100_benchmarks(problems, a, b, n):
    """Each problem has its own chance of a right response, from a Beta(a, b): mean a/(a+b)."""
    rng = np.random.default_rng(0)
    chances = rng.beta(a, b, (4000, problems))
    values = rng.binomial(n, chances) / n  # (4000, P)
    means, errors = values.mean(axis=1), values.std(axis=1) / problems**0.5
    bounds = [interval(m, e, problems) for m, e in zip(means, errors)]
    covered = np.mean([low <= a / (a + b) <= high for low, high in bounds])
    assert 0.925 <= covered <= 0.98
    assert (errors**2).mean() ** 0.5 == pytest.approx(means.std(), rel=0.06)


def test_an_interval_never_claims_certainty_and_stays_within_0_and_1():
    assert interval(0.0, 0.0, 30) == (0.0, pytest.approx(0.1135, abs=1e-4))
    assert interval(1.0, 0.0, 30) == (pytest.approx(0.8865, abs=1e-4), 1.0)
    se = (0.4 * 0.6 / 30) ** 0.5
    assert interval(0.4, se, 30) == pytest.approx((0.2459, 0.5768), abs=1e-3)


def test_the_average_over_benchmarks_is_unweighted_and_its_interval_holds():
    rng, truth, covered, errors = np.random.default_rng(1), (0.1 + 0.7) / 2, [], []
    for _ in range(2000):
        results = []
        for chance, size in ((0.1, 30), (0.7, 500)):
            share = rng.binomial(size, chance) / size
            se = (share * (1 - share) / size) ** 0.5
            low, high = interval(share, se, size)
            results.append({"accuracy": share, "accuracy_se": se, "accuracy_low": low,
                            "accuracy_high": high})
        scores = average(results)
        assert scores["accuracy"] == pytest.approx(np.mean([r["accuracy"] for r in results]))
        errors.append((scores["accuracy"] - truth) / scores["accuracy_se"])
        covered.append(scores["accuracy_low"] <= truth <= scores["accuracy_high"])
    assert 0.925 <= np.mean(covered) <= 0.98
    assert np.median(np.abs(errors)) == pytest.approx(0.674, rel=0.15)  # of a normal variable


def test_the_majority_is_found_by_equivalence_not_by_string(grader):
    def vote(*texts, gold="1/2"):
        rewards = grader.grade([boxed(text) for text in texts], [gold] * len(texts))
        rows = [{"answer": text or None, "reward": reward} for text, reward in zip(texts, rewards)]
        return majority(grader, [rows])[0]

    assert vote("3", "1/2", "3", "\\frac{1}{2}", "0.5") == 1.0
    assert vote("3", "1/2", "3", "7", "0.5", "3") == 0.0
    assert vote("1/2", "3") == 1.0 and vote("3", "1/2") == 0.0, "the earlier wins a tie"
    assert vote("", "", "0.5") == 1.0, "who says nothing does not vote"
    assert vote("", "") == 0.0


def test_scores_are_those_of_a_count_by_hand(ranks, grader):
    right, wrong = boxed("0.5"), boxed("3")
    scores = evaluate_stored(grader, [
        [right, right, wrong, "wait, let me recheck. " + right], [wrong, "no box", "", wrong],
        [wrong, "Let me Double-Check: " + right, wrong, "\\boxed{1/2"]])
    assert scores["accuracy"] == pytest.approx((3 / 4 + 0 + 1 / 4) / 3)
    assert scores["accuracy_se"] == pytest.approx(np.std([0.75, 0, 0.25]) / 3**0.5)
    assert [scores[f"pass@{k}"] for k in (1, 2, 4)] == pytest.approx(
        [1 / 3, (1 + 0 + 1 / 2) / 3, 2 / 3])
    assert scores["maj@4"] == pytest.approx(1 / 3)
    assert (scores["boxed"], scores["unparsed"], scores["truncated"]) == (9 / 12, 3 / 12, 0)
    assert (scores["reflection"], scores["reflection_of_questions"]) == (2 / 12, 2 / 3)
    assert scores["accuracy_reflecting"] == 1
    assert scores["accuracy_not_reflecting"] == pytest.approx(2 / 10)
    lengths = [len(right)] * 2 + [22 + len(right), 21 + len(right)]
    assert scores["length_right"] == np.mean(lengths)
    assert scores["length_right_p50"] == np.median(lengths)


def test_a_right_answer_in_a_truncated_response_counts(ranks, grader):
    scores = evaluate_stored(grader, [[boxed("0.5")]], finish_reason="length")
    assert (scores["accuracy"], scores["truncated"]) == (1, 1)


def test_odd_responses_are_counted_and_never_fatal(ranks, grader, tmp_path):
    hanging = boxed("9^{9^{9^{9}}}")
    texts = ["", "x" * 100_000, "the answer is 1/2", hanging, boxed("{" * 100_000), "\\boxed{}",
             boxed("0.5") + "\u2028\n\x85\ud800", "</answer> <answer>"]
    scores = evaluate_stored(grader, [[text] for text in texts], file=tmp_path / "rows.jsonl")
    assert (scores["accuracy"], scores["unparsed"]) == (1 / 8, 6 / 8)
    assert (scores["timeouts"], scores["errors"]) == (1, 0)
    rows = saved_rows(tmp_path / "rows.jsonl", {})
    assert [row["response"] for row in rows] == texts
    assert [row["failure"] for row in rows] == [None] * 3 + ["timeout"] + [None] * 4


def test_no_response_right_or_wrong_gives_no_number_instead_of_nan(ranks, grader):
    scores = evaluate_stored(grader, [[boxed("0.5")], [boxed("1/2")]])
    assert scores["length_wrong"] is scores["length_wrong_p50"] is None
    assert scores["accuracy_reflecting"] is None
    assert not any(math.isnan(v) for v in scores.values() if v is not None)


def test_an_interrupted_evaluation_ends_with_the_file_of_an_unbroken_one(engine, grader, tmp_path,
                                                                       monkeypatch):
    sampler, _, _ = engine
    monkeypatch.setattr(evaluation, "RESPONSES_AT_ONCE", 6)  # 3 problems of 2 responses
    problems = [Problem(str(i), LONG[: 5 + i], ["1"]) for i in range(8)]
    asked, generate = [], sampler.generate
    monkeypatch.setattr(sampler, "generate", lambda some, *args: (
        asked.extend(p.prompt for p in some), generate(some, *args))[1])

    def run(file, run="a"):
        asked.clear()
        return evaluate(sampler, grader, problems, 10, 2, 1.0, 5, file, {"run": run})

    whole = tmp_path / "whole.jsonl"
    scores = run(whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) == 16 and len({json.loads(line)["response"] for line in lines}) > 8
    for cut, first in ((0, 0), (3, 0), (6, 3), (11, 3), (12.5, 6), (15.5, 6), (16, 8)):
        file = tmp_path / f"{cut}.jsonl"
        half = lines[int(cut)][:40] if cut % 1 else b""
        file.write_bytes(b"".join(lines[: int(cut)]) + half)
        assert run(file) == scores
        assert file.read_bytes() == whole.read_bytes()
        assert asked == [str(i) for i in range(first, 8)], "only what is missing is sampled"
    with pytest.raises(ValueError, match="other settings.*--output"):
        run(whole, "b")


@pytest.fixture(scope="session")
def scored_alone(toy, tmp_path_factory):
    """The toy model's results.json and its responses, from one rank."""
    return score_toy(toy, tmp_path_factory.mktemp("eval"), 1)


def score_toy(toy, folder, ranks, *more_models):
    printed = launch(ranks, HERE / "eval.py", "--model", toy / "model", *more_models, "--tasks",
                     toy / "test.jsonl", "--output", folder, "--n", 4, "--temperature", 1,
                     "--limit", 41, "--seed", 3, *TOY_EVAL)
    files = list(folder.glob("*_none_*.jsonl"))
    assert len(files) == 1 + len(more_models)
    return printed, (folder / "results.json").read_text(), files[0]


def test_the_command_prints_a_table_and_leaves_what_traces_a_number(toy, scored_alone):
    printed, results, file = scored_alone
    (result,) = json.loads(results)["results"]
    assert f"| {result['accuracy']:.3f} ± {result['accuracy_se']:.3f} [" in printed
    assert {"mean@4", "pass@4", "maj@4"} <= set(printed.split())
    assert (result["seed"], result["n"], result["temperature"]) == (3, 4, 1.0)
    assert (result["template"], result["problems"], result["context"]) == ("none", 41, 136)
    assert result["versions"]["torch"] == torch.__version__
    assert len(result["data"]) == len(result["weights"]) == 64
    assert 0 < result["pass@1"] < result["pass@2"] < result["pass@4"] < 1
    rows = saved_rows(file, {"run": result["run"]})
    assert [(row["problem"], row["sample"]) for row in rows] == list(
        itertools.product(range(41), range(4)))
    assert result["accuracy"] == pytest.approx(np.mean([row["reward"] for row in rows]))


def test_two_ranks_that_end_an_interrupted_run_give_the_numbers_of_one(toy, scored_alone, tmp_path):
    _, results, file = scored_alone
    (tmp_path / file.name).write_bytes(file.read_bytes()[:5000])
    again = tmp_path / "again"  # a second model under one torchrun: a second process group
    again.symlink_to(toy / "model")
    _, results_of_two, _ = score_toy(toy, tmp_path, 2, again)
    assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    (expected,) = json.loads(results)["results"]
    first, second = json.loads(results_of_two)["results"]
    assert first == expected
    assert second == expected | {"model": str(again), "run": second["run"]}


@pytest.fixture
def eval_config(toy, tmp_path):
    return evaluation.Config(
        model=(str(toy / "model"),), template=("none",), tasks=(str(toy / "test.jsonl"),), n=1,
        temperature=0.0, max_prompt_tokens=64, max_response_tokens=72, output=tmp_path)


@pytest.mark.parametrize("settings, message", [
    ({"model": ()}, "give --model"),
    ({"model": ("runs/no/such/model",)}, "no model at"),
    ({"tasks": ("aime25",)}, "unknown task 'aime25': give aime24, amc23, math500"),
    ({"tasks": ("no.jsonl",)}, "no file no.jsonl"),
    ({"tasks": ("aime24",), "data_dir": Path("nowhere")}, "no file nowhere/aime24.jsonl"),
    ({"problem_column": "question"}, "no column question; it has problem, answer"),
    ({"max_response_tokens": 3000}, "context of .* is 512: lower"),
    ({"max_prompt_tokens": 1, "max_response_tokens": 1}, "prompts of .* raise --max-prompt-tokens"),
    ({"template": ("chat",)}, "has none: give qwen_math, r1, none"),
    ({"template": ("gpt",)}, "unknown template 'gpt': give chat, qwen_math"),
    ({"n": 4}, "--temperature above 0"),
    ({"judge": "http://127.0.0.1"}, "--judge-model"),
    ({"tensor_parallel": 2}, "torchrun --nproc-per-node 2"),
])  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_with_what_to_do(eval_config, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluation.prepare(replace(eval_config, **settings))


def test_a_folder_with_responses_of_other_settings_is_refused(eval_config, toy):
    (cell,) = evaluation.prepare(eval_config)
    evaluation.append_rows(cell.file, [cell.labels])
    evaluation.prepare(eval_config)
    for other in ({"seed": 1}, {"max_response_tokens": 71}, {"limit": 3}, {"temperature": 0.5}):
        with pytest.raises(ValueError, match="other settings, versions, weights or data"):
            evaluation.prepare(replace(eval_config, **other))


def test_weights_are_told_apart_by_what_they_hold(toy, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    same = [evaluation.weights_fingerprint(str(tmp_path / name)) for name in "ab"]
    assert same[0] == same[1] != evaluation.weights_fingerprint(str(toy / "model"))


@needs_data
def test_every_gold_of_every_benchmark_boxed_scores_1(toy, grader):
    tokenizer, sizes = load_tokenizer(str(toy / "model"), 100), {}
    for task in TASKS:
        problems = load_task(task, tokenizer, TEMPLATES["none"], 10**6, DATA)
        golds = [(boxed(gold), p.answers) for p in problems for gold in p.answers]
        assert np.mean(grader.grade(*map(list, zip(*golds)))) == 1, task
        sizes[task] = len(problems)
    assert sizes == {"aime24": 30, "amc23": 83, "math500": 500, "minerva": 272,
                     "olympiadbench": 675}


def test_a_benchmark_is_never_scored_in_part(toy, tmp_path):
    tokenizer = load_tokenizer(str(toy / "model"), 100)
    rows = [{"problem": "1+1", "answer": "2"}, {"problem": "3+" * 50, "answer": "2"},
            {"problem": "2+2", "answer": ""}]
    for some, message in ((rows[:2], "1 prompts of"), (rows[::2], "1 rows of .* have no answer")):
        (tmp_path / "math500.jsonl").write_text("\n".join(map(json.dumps, some)))
        with pytest.raises(ValueError, match=message):
            load_task("math500", tokenizer, TEMPLATES["none"], 60, tmp_path)


TAGS = ("The reasoning process is enclosed within <think> </think> and answer is enclosed within "
        "<answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> "
        "<answer> answer here </answer>.")


def test_templates_of_published_models_ask_as_these_were_trained():
    orz, prime = TEMPLATES["orz"], TEMPLATES["prime"]
    assert orz.render("1+1?").endswith(
        TAGS + " User: You must put your answer inside <answer> </answer> tags, i.e., <answer> "
        "answer here </answer>. And your final answer will be extracted automatically by the "
        "\\boxed{} tag.\nThis is the problem:\n1+1?\nAssistant: <think>")
    assert orz.extract("so</think><answer>it is \\boxed{2}</answer>") == "2"
    assert orz.extract("so</think>\n<answer> 2 </answer>") == "2"
    assert orz.extract("\\boxed{2}") is orz.extract("<answer> \\boxed{2}") is None
    assert prime.render("1+1?").endswith(
        "</answer>. User: 1+1?\n\nPresent the answer in LaTex format: \\boxed{Your answer}. "
        "Assistant:")
    assert prime.extract("\\boxed{2}") == "2"


def test_the_chat_template_is_the_tokenizers_own(toy):
    tokenizer = load_tokenizer(str(toy / "model"), 100)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}")
    chat = find_template("chat", tokenizer)
    assert chat.render("1+1?") == ("[user]1+1?\nPlease reason step by step, and put your final "
                                   "answer within \\boxed{}.[assistant]")
    assert (chat.name, chat.extract("\\boxed{2}")) == ("chat", "2")


def test_regrading_tells_what_another_grader_changes():
    rows = [{"template": "r1", "response": "</think> <answer> 2 </answer>", "reward": 0.0},
            {"template": "none", "response": boxed("2"), "reward": 1.0},
            {"template": "none", "response": boxed("3"), "reward": 1.0},
            {"template": "chat", "response": boxed("9^{9^{9^{9}}}"), "reward": 0.0},
            {"response": "2"}]
    rows = [row | {"answers": ["2"]} for row in rows]
    table = [[cell.strip() for cell in line.split("|")[1:-2]]
             for line in regrade(rows, "qwen_math").splitlines()[2:]]
    assert table == [["r1", "1", "0.000", "1.000", "1", "0", "0/0"],
                     ["none", "2", "1.000", "0.500", "0", "1", "0/0"],
                     ["chat", "1", "0.000", "0.000", "0", "0", "1/0"],
                     ["qwen_math", "1", "0.000", "0.000", "0", "0", "0/0"]]
    assert [row["reward"] for row in rows] == [1, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="have no answers"):
        regrade([{"response": "2"}], "none")


def test_self_reflection_is_a_word_of_the_papers_list():
    assert len(REFLECTION) == 15 and all(reflects(f"Let me {word.title()}.") for word in REFLECTION)
    assert not reflects("Wait, checking the steps: 2") and not reflects("")


def test_an_analysis_is_a_table_and_a_figure(ranks, grader, tmp_path):
    results = []
    for template, text in (("none", "no box"), ("r1", "I recheck: " + boxed("0.5"))):
        scores = evaluate_stored(grader, [[text, boxed("7")]] * 3)
        results.append({"model": "a/b", "template": template, "task": "t"} | scores)
    head, _, none, r1 = analysis_table(results, 2).splitlines()
    cells = [dict(zip(head.split(" | "), line.split(" | "))) for line in (none, r1)]
    assert [c["answers"] for c in cells] == ["0.500", "1.000"]
    assert [c["pass@2"] for c in cells] == ["0.000", "1.000"]
    assert [c["accuracy with"] for c in cells] == ["", "1.000"]
    assert [c["reflects: questions"] for c in cells] == ["0.000", "1.000"]
    plot_analysis(results, 2, tmp_path / "analysis.png")
    assert (tmp_path / "analysis.png").stat().st_size > 10_000


class FakeJudge(http.server.BaseHTTPRequestHandler):
    """Says 2 of a response with "hm", fails at one with "error", else says 1."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = request["messages"][0]["content"]
        reply = json.dumps({
            "id": "1", "object": "chat.completion", "created": 0, "model": request["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": {
                "role": "assistant", "content": "2" if "hm" in asked else "1"}}]}).encode()
        self.send_response(400 if "error" in asked else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        pass


def test_a_judge_is_asked_over_http_and_may_fail():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeJudge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    rows = [{"prompt": "1+1", "response": r} for r in ("2", "hm, 2", "hm, I recheck", "error {0}")]
    try:
        shares = judge(rows, f"http://127.0.0.1:{server.server_port}/v1", "small")
    finally:
        server.shutdown()
        server.server_close()
    assert shares == {"judge_answers": 0.75, "judge_reflects": 0.5, "judge_and_words": 0.25,
                      "judge_silent": 0.25}
