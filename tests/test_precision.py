"""Facts of computing in bf16, as on a GPU, over fp32 master weights. Run here on a CPU."""

import json
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import vllm

import support.logprobs
from drgrpo import (
    EMPTY_ROLLOUT,
    Sampler,
    collate,
    forward_backward,
    make_policy,
    split_updates,
)
from support.data import Problem
from support.logprobs import all_rows_at_once, row_by_row
from tests.helpers import ROOT, TOY, launch, read_jsonl, some_rollouts, tiny_model

CASES = [dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)]


# ----------------------------------------------------------------------- attention on a GPU


def reference(query, key, value, ends, ends_k, longest, longest_k, scale, window_size, enable_gqa):
    """What varlen_attn's documentation says, from its own arguments: (S, H, d) -> (S, H, d)."""
    assert torch.equal(ends, ends_k) and ends.dtype == torch.int32 and longest == longest_k
    assert longest == (ends[1:] - ends[:-1]).max() and window_size == (-1, 0)
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    out = torch.zeros_like(query)
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        future = torch.ones(end - start, end - start).triu(1).bool()
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        out = torch.cat([out[:start], (weights @ v).transpose(0, 1), out[end:]])
    return out


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_gpus_attention_is_called_for_what_the_cpus_computes(key_heads, scale, monkeypatch):
    monkeypatch.setattr(support.logprobs, "varlen_attn", reference)
    torch.manual_seed(0)
    lengths = torch.tensor([3, 1, 6])
    ends = torch.tensor([0, 3, 4, 10], dtype=torch.int32)
    inputs = [torch.randn(1, heads, 10, 8) for heads in (4, key_heads, key_heads)]
    inputs = [x.requires_grad_() for x in inputs]
    there = all_rows_at_once(*inputs, ends, 6, scale)
    here = row_by_row(*inputs, lengths, scale)
    assert there.shape == here.shape == (1, 10, 4, 8)
    assert torch.allclose(there, here, atol=1e-6)
    upstream = torch.randn(1, 10, 4, 8)
    gradients = [torch.autograd.grad(out, inputs, upstream) for out in (there, here)]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


# -------------------------------------------------------------------------------- gradients


def gradient_of_an_update(model, dtype):
    """Of all weights, after two micro-batches, one of which has no response. And their dtypes."""
    settings = dict(prompts_per_step=3, samples_per_prompt=4, responses_per_update=12)
    settings |= dict(max_gap=100.0, tis_cap=None, dtype=dtype, tokens_per_microbatch=200)
    config = replace(TOY, model=str(model), **settings)
    policy = make_policy(config)
    (batches,) = split_updates(some_rollouts(12), config, 0, dist.get_rank(), dist.get_world_size())
    batches = [collate([EMPTY_ROLLOUT]), *batches]
    for batch in batches:
        policy.set_requires_gradient_sync(batch is batches[-1])
        forward_backward(policy, batch, config)
    gradients = [parameter.grad for parameter in policy.parameters()]
    dtypes = {str(g.dtype) for g in gradients} | {str(p.dtype) for p in policy.parameters()}
    flat = torch.cat([gradient.full_tensor().flatten() for gradient in gradients])
    return flat.tolist(), sorted(dtypes)


def difference(exact, rounded):
    exact, rounded = torch.tensor(exact), torch.tensor(rounded)
    return ((exact - rounded).norm() / exact.norm()).item()


@pytest.mark.parametrize("settings", CASES, ids=["tied", "untied"])
def test_bf16_gradients_are_fp32_sums_near_those_of_fp32(ranks, settings, tmp_path):
    tiny_model(initializer_range=0.1, **settings).save_pretrained(tmp_path)
    exact, _ = gradient_of_an_update(tmp_path, "float32")
    rounded, dtypes = gradient_of_an_update(tmp_path, "bfloat16")
    assert dtypes == ["torch.float32"]
    assert 1e-5 < difference(exact, rounded) < 0.02


TWO_RANKS = """
import json, sys
import torch.distributed as dist
import vllm
from support.ranks import start_ranks
from tests.test_precision import gradient_of_an_update

start_ranks()
found = [gradient_of_an_update(sys.argv[1], dtype)[0] for dtype in ("float32", "bfloat16")]
if dist.get_rank() == 0:
    print(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_have_the_bf16_gradients_of_one(ranks, tmp_path):
    tiny_model(initializer_range=0.1, tie_word_embeddings=False).save_pretrained(tmp_path / "model")
    alone, _ = gradient_of_an_update(tmp_path / "model", "bfloat16")
    (tmp_path / "two.py").write_text(TWO_RANKS)
    printed = launch(2, tmp_path / "two.py", tmp_path / "model")
    exact, rounded = json.loads(printed.splitlines()[-1])
    assert difference(exact, rounded) < 0.02
    assert difference(alone, rounded) < 0.02


# ----------------------------------------------------------------------------------- the gap


def mean_gap(model, head):
    """Nats a token between sampler and trainer, both in bf16, before and after a sync."""
    policy = make_policy(replace(TOY, model=str(model), dtype="bfloat16"))
    with mock.patch("vllm.LLM", partial(with_head, vllm.LLM, head)):
        sampler = Sampler(str(model), 136, dtype="bfloat16")
    problems = [Problem("", [5 + i, 6, 7], ["1"]) for i in range(16)]
    rollouts = []
    for seeds in (range(16), range(16, 32)):
        for group in sampler.generate(problems, list(seeds), 4, 60, 1.0, ()):
            rollouts += group
        sampler.wake(policy)  # the head is tied to the embedding
    sampler.close()
    batch = collate(rollouts)
    with torch.no_grad():
        logprobs = policy(batch.ids, batch.response_mask)
    gaps = (logprobs - batch.sampler_logprobs).abs()[batch.response_mask.bool()]
    return gaps.mean().item()


def with_head(real, head, *arguments, hf_overrides, **settings):
    assert hf_overrides == {"head_dtype": "float32"}
    return real(*arguments, hf_overrides={"head_dtype": head}, **settings)


TWO_HEADS = """
import sys
from support.ranks import start_ranks
from tests.test_precision import mean_gap

for head in ("float32", "model"):
    start_ranks(head)
    print(mean_gap(sys.argv[1], head))
"""


@pytest.mark.slow
def test_an_fp32_head_in_the_engine_makes_the_gap_smaller(toy, tmp_path):
    (tmp_path / "heads.py").write_text(TWO_HEADS)
    printed = launch(1, tmp_path / "heads.py", toy / "model")
    with_it, without = map(float, printed.splitlines()[-2:])
    assert with_it < 0.01
    assert with_it < 0.95 * without


@pytest.mark.slow
def test_the_toy_learns_in_bf16_with_a_small_and_flat_gap(toy, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "toy-base").symlink_to(toy)
    launch(1, ROOT / "drgrpo.py", "toy", folder=tmp_path, dtype="bfloat16", steps=16, eval_every=8)
    rows = read_jsonl(tmp_path / "runs" / "toy" / "metrics.jsonl")
    gaps = [row["gap"] for row in rows if "gap" in row]
    assert len(gaps) == 16 and max(gaps) < 0.002
    assert max(gaps[8:]) < 3 * max(gaps[:8])
    assert rows[-1]["eval_accuracy"] > rows[0]["eval_accuracy"] + 0.3
