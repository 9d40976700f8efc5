"""Log-probs: that they are what the definition says, and for which models that can be trusted.

All models here are tiny and random. Those that are refused need their config.json only.
"""

import json
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import drgrpo
import support.logprobs
from drgrpo import EMPTY_ROLLOUT, Sampler, collate, forward_backward, make_policy, update
from support.logprobs import (
    TOLERANCE,
    HeadLogprobs,
    all_rows_at_once,
    check_model,
    definition,
    largest_error,
    packed_attention,
    row_by_row,
    tiny,
    token_logprobs,
    two_tiny_models,
)
from support.run import end_ranks, start_ranks
from tests.helpers import LONG, TOY, assert_same, launch, some_rollouts, tiny_model
from tests.test_engine import draw, gap

TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
LINEAR = {
    "layer_types": ["full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


def configured(family, **settings):
    """The configuration of a small model; `family` as in the class name, e.g. Qwen2."""
    return getattr(transformers, f"{family}Config")(**TINY | settings)


def save(folder, family, **settings):
    configured(family, **settings).save_pretrained(folder)
    return str(folder)


def reason(folder, family, longest=40, **settings):
    """The message by which the model is refused."""
    with pytest.raises(ValueError, match=f"{folder} cannot be trained") as refused:
        check_model(save(folder, family, **settings), longest)
    return str(refused.value)


# ------------------------------------------------------------------------ the definition


def test_the_definition_is_log_softmax_of_the_models_own_logits():
    model, ids = tiny_model(attention="eager"), torch.tensor([5, 9, 7, 0])
    probabilities = (model(ids[None]).logits[0] / 0.7).softmax(dim=1)
    by_hand = [probabilities[t, ids[t + 1]].log().item() for t in range(3)]
    assert definition(model, ids, 0.7).tolist() == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_of_a_batch_are_those_of_each_row_alone(temperature):
    model = tiny_model(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
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


def test_no_padding_goes_through_the_model():
    model, seen, rollouts = tiny_model(), [], some_rollouts()
    model.get_decoder().layers[0].register_forward_pre_hook(lambda _, x: seen.append(x[0].shape))
    batch = collate(rollouts)
    token_logprobs(model, F.pad(batch.ids, (0, 50)), F.pad(batch.response_mask, (0, 50)))
    assert seen == [(1, sum(map(len, rollouts)), 32)]


FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma3Text", "Phi3", "SmolLM3"]
FAMILIES += ["Starcoder2", "Olmo2", "Olmo3", "Glm4", "Granite", "Ernie4_5", "Exaone4"]
SETTINGS = {
    "Starcoder2": {"residual_dropout": 0.0, "embedding_dropout": 0.0},
    "Llama": {"attention_dropout": 0.1},  # no harm: training has none
    "Qwen2": {"vocab_size": 4096, "pad_token_id": 4095},  # beyond the tiny model's vocabulary
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_accepted_whose_log_probs_and_gradients_are_its_own(tmp_path, family):
    settings = SETTINGS.get(family, {})
    check_model(save(tmp_path, family, **settings), 40)
    fast, own = two_tiny_models(configured(family, **settings))
    fast.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    rows = [torch.randint(100, (length,)) for length in (9, 4, 17)]
    weights = [torch.randn(len(row) - 1) for row in rows]
    masks = pad_sequence([torch.ones_like(weight) for weight in weights], batch_first=True)
    logprobs = token_logprobs(fast, pad_sequence(rows, batch_first=True), masks)
    (logprobs * pad_sequence(weights, batch_first=True)).sum().backward()
    sum((definition(own, ids) * w).sum() for ids, w in zip(rows, weights)).backward()
    flat = [torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (own, fast)]
    assert_same(*flat, 1e-4)


# ------------------------------------------------------------------------ attention and head


def reference(query, key, value, ends, ends_k, longest, longest_k, scale, window_size, enable_gqa):
    """What varlen_attn's documentation says, from its own arguments: (S, H, d) -> (S, H, d)."""
    assert torch.equal(ends, ends_k) and ends.dtype == torch.int32 and longest == longest_k
    assert longest == (ends[1:] - ends[:-1]).max() and window_size == (-1, 0)
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    out = []
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        future = torch.ones(end - start, end - start).triu(1).bool()
        out.append((scores.masked_fill(future, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("key_heads", [4, 1])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_gpus_attention_is_called_for_what_the_cpus_computes(key_heads, scale, monkeypatch):
    monkeypatch.setattr(support.logprobs, "varlen_attn", reference)
    torch.manual_seed(0)
    lengths, ends = torch.tensor([3, 1, 6]), torch.tensor([0, 3, 4, 10], dtype=torch.int32)
    inputs = [torch.randn(1, heads, 10, 8) for heads in (4, key_heads, key_heads)]
    inputs = [x.requires_grad_() for x in inputs]
    outputs = all_rows_at_once(*inputs, ends, 6, scale), row_by_row(*inputs, lengths, scale)
    assert outputs[0].shape == outputs[1].shape == (1, 10, 4, 8)
    upstream = torch.randn(1, 10, 4, 8)
    there, here = [[out, *torch.autograd.grad(out, inputs, upstream)] for out in outputs]
    for a, b in zip(there, here, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_on_a_gpu_attention_and_head_make_calls_that_torch_accepts():
    """Shapes and types only: without a GPU nothing can be computed with CUDA tensors."""
    lengths = mock.Mock(**{"max.return_value": 6})  # a tensor made below would have no values
    with FakeTensorMode(allow_non_fake_inputs=True):

        def empty(*shape, dtype=torch.bfloat16):
            return torch.empty(shape, dtype=dtype, device="cuda")

        q, k, ends = empty(1, 4, 10, 64), empty(1, 2, 10, 64), empty(3, dtype=torch.int32)
        out, _ = packed_attention(None, q, k, k, scaling=0.1, lengths=lengths, ends=ends)
        assert out.shape == (1, 10, 4, 64) and out.dtype == torch.bfloat16
        saved = (empty(10, 64), empty(99, 64), empty(10, dtype=torch.long))
        context = mock.Mock(temperature=0.9, saved_tensors=saved)
        logprobs = HeadLogprobs.forward(context, *saved, 0.9)
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
    found, exact = (torch.autograd.grad(v, inputs, upstream) for v in (values, expected))
    for a, b in zip(exact, found, strict=True):
        assert_same(a, b)


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
        forwards = largest.size
        loss.backward()
    assert batch.response_mask.sum() > 2000
    assert forwards == largest.size == 100 * 2**14, "a chunk's logits"


def test_the_gradient_of_a_bf16_head_is_summed_in_fp32(monkeypatch):
    """1 and then many small terms, each in a chunk of its own: bf16 would lose every one."""
    monkeypatch.setattr(support.logprobs, "LOGITS_AT_ONCE", 1)
    hidden = torch.full((257, 1), 1 / 256, dtype=torch.bfloat16)
    hidden[0] = 1
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(257, dtype=torch.long)
    HeadLogprobs.apply(hidden, weight, targets, 1.0).sum().backward()
    assert weight.grad.flatten().tolist() == [1, -1]  # half of 1 + 256/256


def test_a_bf16_head_makes_logits_that_were_never_rounded_to_bf16():
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 16).bfloat16(), torch.randn(50, 16).bfloat16()
    targets = torch.randint(0, 50, (40,))
    logits = hidden.double() @ weight.double().T
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].float()
    logprobs = HeadLogprobs.apply(hidden, weight, targets, 1.0)
    assert logprobs.dtype == torch.float32
    assert torch.allclose(logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_bf16_gradients_are_fp32_sums_near_those_of_fp32(ranks, tmp_path, monkeypatch, tied):
    tiny_model(initializer_range=0.1, tie_word_embeddings=tied).save_pretrained(tmp_path)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(drgrpo, "DTYPE", dtype)
        config = replace(TOY, model=str(tmp_path), tis_cap=None)
        policy = make_policy(config)
        for rollouts in ([EMPTY_ROLLOUT], some_rollouts()):
            forward_backward(policy, collate(rollouts, 100.0), config)
        weights = list(policy.parameters())
        assert {x.dtype for w in weights for x in (w, w.grad)} == {torch.float32}
        gradients.append(torch.cat([w.grad.full_tensor().flatten() for w in weights]))
    exact, rounded = gradients
    assert 1e-5 < ((exact - rounded).norm() / exact.norm()).item() < 0.02


# ------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("family, settings, message", [
    ("Granite", {"logits_scaling": 8.0}, "its layers or its head"),
    ("Cohere", {}, "its layers or its head"),  # logit_scale
    ("Gemma3Text", {"final_logit_softcapping": 30.0}, "its layers or its head"),
    ("NanoChat", {}, "its layers or its head"),  # a soft cap under another name
    ("Phi", {}, "its layers or its head"),  # the head has a bias
    ("GraniteSWA", {}, "its layers or its head"),  # attention sinks
    ("Doge", {}, "its layers or its head"),  # a mask of its own
    ("Starcoder2", {"residual_dropout": 0.1}, "its layers or its head"),
    ("Gemma2", {"final_logit_softcapping": None}, "caps its attention scores"),
    ("StableLm", {}, "does not pass `lengths` and `ends`"),
    ("Llama", {"head_dim": 264}, "at most 256"),
    ("Llama", {"head_dim": 20}, "a multiple of 8"),
    ("DeepseekV3", MOE | {"first_k_dense_replace": 2}, "a trial ended with"),  # two head sizes
    ("GPT2", {}, "its decoder has no `layers`"),
    ("T5", {}, "T5Config"),
    ("Qwen3_5Text", LINEAR, "conv1d.weight has 3 dimensions"),  # and a state that runs on
    ("Mamba", {}, "conv1d.weight has 3 dimensions"),
    ("Qwen3Moe", MOE, "Stacked experts have another shape in vLLM"),
    ("JetMoe", MOE, "Stacked experts"),
    ("DeepseekV3", MOE | {"first_k_dense_replace": 1}, "Stacked experts"),
])  # fmt: skip
def test_a_model_that_would_train_wrong_is_refused_with_the_reason(
    tmp_path, family, settings, message
):
    assert message in reason(tmp_path, family, **settings)


def longrope(original):
    factors = {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0} | factors
    rope["original_max_position_embeddings"] = original
    return {"original_max_position_embeddings": original, "rope_parameters": rope}


def dynamic(most):
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return {"max_position_embeddings": most, "rope_parameters": scaling}


@pytest.mark.parametrize("family, settings, message", [
    ("Mistral", {"sliding_window": 40}, "a sliding window of 40, and a row has 48 tokens"),
    ("Gemma3Text", {"sliding_window": 40, "num_hidden_layers": 6}, "a sliding window of 40"),
    ("Phi3", longrope(40), "beside a row of 48 tokens"),
    ("Llama", dynamic(40), "beside a row of 48 tokens"),
])  # fmt: skip
def test_what_binds_only_in_long_rows_is_judged_by_the_longest(tmp_path, family, settings, message):
    check_model(save(tmp_path, family, **settings), 40)
    assert message in reason(tmp_path, family, longest=48, **settings)


def test_a_window_matters_only_where_a_layer_uses_it(tmp_path):
    settings = {"use_sliding_window": True, "sliding_window": 16}
    check_model(save(tmp_path, "Qwen2", **settings, max_window_layers=2), 40)
    assert "window of 16" in reason(tmp_path, "Qwen2", **settings, max_window_layers=1)


@pytest.mark.parametrize("error, fine", [(3e-5, True), (2e-4, False), (float("nan"), False)])
def test_rounding_is_no_difference_and_nan_is_one(tmp_path, monkeypatch, error, fine):
    monkeypatch.setattr(support.logprobs, "largest_error", lambda *given: error)
    if fine:
        check_model(save(tmp_path, "Qwen2"), 40)
    else:
        assert f"differs by {error:.2g}" in reason(tmp_path, "Qwen2")


# ------------------------------------------------------------------------ the tiny models


@pytest.mark.parametrize("family, settings, layers", [
    ("Qwen2", {"num_hidden_layers": 2}, 2),
    ("Llama", {"eos_token_id": [2, 3]}, 8),  # a list, but not of layers
    ("Gemma3Text", {}, 8),  # five windows, then one full
    ("Llama", {"flavours": ["sweet"] * 10 + ["sour"] + ["sweet"]}, 11),
])  # fmt: skip
def test_the_tiny_model_has_a_layer_of_each_kind(family, settings, layers):
    config = configured(family, **{"num_hidden_layers": 12} | settings)
    before = config.to_dict()
    assert tiny(config).num_hidden_layers == layers
    assert config.to_dict() == before


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Gemma", "Olmo2"])
def test_no_weight_could_be_left_out_of_the_log_probs_unseen(family):
    fast, own = two_tiny_models(configured(family, num_hidden_layers=1))
    assert largest_error(fast, own, (7, 12)) < 0.1 * TOLERANCE
    torch.manual_seed(0)
    for name, weight in own.named_parameters():
        if "k_proj.bias" in name:  # adds the same to all scores of a query: softmax drops it
            continue
        before = weight.data
        weight.data = before + 0.3 * before.std() * torch.randn_like(before)
        assert largest_error(fast, own, (7, 12)) > 10 * TOLERANCE, name
        weight.data = before


# ------------------------------------------------------------------ policy, engine and update

ENGINES = ["Llama", "Gemma", "Gemma3Text", "Mistral", "Ministral3", "Qwen2", "Qwen3", "Phi3"]
# vLLM runs the last two by the code of transformers
ENGINES += ["Glm4", "Ernie4_5", "Exaone4", "Olmo2", "SmolLM3"]


def sample_update_wake(folder, family):
    """The largest gaps of a token before an update, after it, and after `wake`."""
    start_ranks()
    _, model = two_tiny_models(configured(family, eos_token_id=0, bos_token_id=0))
    model.save_pretrained(folder)
    check_model(folder, 128)
    config = replace(TOY, model=folder)
    policy, sampler = make_policy(config), Sampler(folder, 128)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-2, weight_decay=0.0)
    group = draw(sampler, LONG[:12])
    for rollout, advantage in zip(group, (1.0, -1.0, 1.0, -1.0), strict=True):
        rollout.advantage = advantage
    gaps = [gap(policy, group)]
    sampler.sleep()
    update(policy, optimizer, [collate(group)], config)
    gaps.append(gap(policy, group))
    sampler.wake(policy)
    gaps.append(gap(policy, draw(sampler, LONG[:12])))
    sampler.close()
    end_ranks()
    return gaps


ALL_ENGINES = """
import json, sys
from pathlib import Path
from transformers import AutoTokenizer
from tests.test_models import ENGINES, sample_update_wake

for family in ENGINES:
    folder = Path(family)
    AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(folder)
    print(json.dumps([family, sample_update_wake(str(folder), family)]))
"""


@pytest.mark.slow
def test_an_accepted_model_is_sampled_trained_and_synced_without_a_gap(toy, tmp_path):
    """All families, one after the other in one process."""
    (tmp_path / "all.py").write_text(ALL_ENGINES)
    printed = launch(1, tmp_path / "all.py", toy / "model", folder=tmp_path, timeout=1800)
    gaps = dict(json.loads(line) for line in printed.splitlines() if line.startswith("["))
    assert list(gaps) == ENGINES
    for family, (before, after_update, after_wake) in gaps.items():
        assert before < 1e-4 and after_wake < 1e-4, family
        assert after_update > 1e-2, f"{family}: the engine's old weights would be noticed"
