"""Facts about what a run needs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config

import plan
from drgrpo import PRESETS, Rollout, collate
from support.data import load_data
from support.logprobs import token_logprobs
from tests.helpers import ROOT, launch, tiny_model

QWEN_7B = dict(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
    max_position_embeddings=4096,
)


@pytest.fixture
def seven_b(toy, tmp_path):
    """The 7B preset with a config and a tokenizer, but without any weights."""
    Qwen2Config(**QWEN_7B).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(toy / "model").save_pretrained(tmp_path)
    return plan.PlanConfig(
        **vars(PRESETS["math-7b"][1])
        | dict(
            model=str(tmp_path),
            dataset=str(toy / "train.jsonl"),
            eval_dataset=str(toy / "test.jsonl"),
            levels=(),
            name=f"plan-{tmp_path.name}",
            gpus=8,
        )
    )


def report(config):
    _, problems, held_out, dropped = load_data(config)
    return plan.plan(config, problems, held_out, dropped)


def test_a_plan_needs_no_weights_and_reckons_with_the_models_size(seven_b):
    text = report(seven_b)
    assert "7,615,616,512 parameters" in text and "5000 problems, 500 held out" in text
    assert "128 prompts x 8 responses = 1024; 8 update(s) of 128" in text
    assert "| master weights | 3.8 |" in text and "| Adam's moments | 7.6 |" in text
    assert "1 to 4 micro-batch(es)" in text and "| gradients | 30.5 |" in text
    assert "not yet measured on a GPU" in text and "| 24 GB |" in text
    assert "| gradients | 3.8 |" in report(replace(seven_b, tokens_per_microbatch=65536))
    text = report(replace(seven_b, offload=True, gpus=2))
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
    settings = QWEN_7B | dict(
        hidden_size=256,
        num_attention_heads=4,
        intermediate_size=512,
        num_key_value_heads=2,
        vocab_size=99,
        dtype="bfloat16",
    )
    one, two = (tiny_model(**settings | dict(num_hidden_layers=n)) for n in (1, 2))
    layer = kept_by_autograd(two) - kept_by_autograd(one)
    assert plan.layer_activations(one.to("meta")) == pytest.approx(layer, rel=0.05)


def test_the_plans_hours_come_from_measured_figures_only(seven_b, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "MEASURED", tmp_path / "measured.jsonl")
    row = {
        "device": "H100",
        "ranks": 4,
        "activation_checkpointing": False,
        "parameters": 7_615_616_512,
        "sample_tokens_per_s": 10_000,
        "update_tokens_per_s": 20_000,
        "seconds_sample": 1,
        "seconds_update": 1,
        "seconds_step": 12,
        "command": "C",
        "date": "D",
        "versions": {"torch": "T"},
    }
    problems = load_data(seven_b)[1]
    for parameters, scale in ((7_615_616_512, 1), (3_807_808_256, 2), (1_000_000_000, None)):
        lines = [row | {"parameters": parameters} | old for old in ({"seconds_step": 99}, {})]
        plan.MEASURED.write_text("".join(json.dumps(line) + "\n" for line in lines))
        text = report(seven_b)
        assert ("from 10,000 and 20,000 tokens/s of `C`, D, torch T" in text) == bool(scale)
        if scale:
            prompt = np.mean([len(p.prompt_ids) for p in problems])
            # three passes measured, and here one more for checkpointing and 7/8 for old log-probs
            learning = (prompt + 700) / 20_000 * (4 + 7 / 8) / 3
            step = 1024 * (700 / 10_000 + learning) * 4 / 8 * scale + 10
            assert f"hours      {300 * step / 3600:,.2f} on 8 x H100" in text
            assert text.count("hours  ") == 1, "of two measurements the later one"
        else:
            assert "no model of a third to three times this size" in text


@pytest.mark.slow
def test_the_command_prints_a_plan_and_trains_nothing(toy, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "toy-base").symlink_to(toy.resolve())
    text = launch(1, ROOT / "plan.py", "toy", gpus=2, folder=tmp_path)
    assert "on 2 GPU(s)" in text and "hours" in text
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        ".toy-base.lock",
        "toy-base",
    ]
