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


MEASURED_ROW = {
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
            dtype="bfloat16",
            gpus=8,
        )
    )


def report(config):
    _, problems, held_out, dropped = load_data(config)
    return plan.plan(config, problems, held_out, dropped)


def mean_prompt(config):
    return np.mean([len(problem.prompt_ids) for problem in load_data(config)[1]])


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_plans_activations_are_what_autograd_keeps(dtype):
    settings = QWEN_7B | dict(
        hidden_size=256,
        num_attention_heads=4,
        intermediate_size=512,
        num_key_value_heads=2,
        vocab_size=99,
    )
    one, two = (tiny_model(**settings | dict(num_hidden_layers=n)) for n in (1, 2))
    dtype = getattr(torch, dtype)
    layer = kept_by_autograd(two.to(dtype)) - kept_by_autograd(one.to(dtype))
    # On a CPU packed_attention copies its result once more: one of about 18 vectors like it
    copy = 256 * dtype.itemsize
    one.set_attn_implementation("only shapes")
    assert plan.layer_activations(one.to("meta")) == pytest.approx(layer - copy, rel=0.03)


def test_the_plans_hours_come_from_measured_figures_only(seven_b, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "MEASURED", tmp_path / "measured.jsonl")
    row = MEASURED_ROW
    for parameters, scale in ((7_615_616_512, 1), (3_807_808_256, 2), (1_000_000_000, None)):
        lines = [row | {"parameters": parameters} | old for old in ({"seconds_step": 99}, {})]
        plan.MEASURED.write_text("".join(json.dumps(line) + "\n" for line in lines))
        text = report(seven_b)
        assert ("from 10,000 and 20,000 tokens/s of `C`, D, torch T" in text) == bool(scale)
        if scale:
            prompt = mean_prompt(seven_b)
            # three passes measured, and here one more for checkpointing and 7/8 for old log-probs
            learning = (prompt + 700) / 20_000 * (4 + 7 / 8) / 3
            step = 1024 * (700 / 10_000 + learning) * 4 / 8 * scale + 10
            assert f"hours      {300 * step / 3600:,.2f} on 8 x H100 (" in text
            assert text.count("from 10,000") == 1, "of two measurements the later one"
        else:
            assert "no model of a third to three times this size" in text


def lines_of(text, name):
    """A line of the report and those that are indented below it."""
    lines = text[text.index(f"\n{name}  ") :].split("\n")[1:]
    return lines[0] + "".join(line[10:] for line in lines[1:4] if line.startswith(" " * 11))


def test_what_a_gpu_sends_by_hand(seven_b):
    """Of 7.6e9 weights 1.1e9 are of the embedding and the head."""
    work = plan.Workload(100.0)
    assert work.micro_batches(replace(seven_b, gpus=8)) == 1
    found = lines_of(report(seven_b), "network")
    weights, root = 7_615_616_512, 2 * 152064 * 3584 + 3584
    gathered = 2 * (2 * (weights - root) + root) * 7 / 8 + 2 * weights * 7 / 8 * 7 / 8
    assert (
        f"on average: {gathered / 1e9:.1f} GB of weights (all-gather; 1 micro-batch(es))" in found
    )
    assert f"{4 * weights * 7 / 8 / 1e9:.1f} GB of gradients (reduce-scatter)" in found
    assert " 0.0 GB of gradients (all-reduce) to other nodes: 0.00 s" in found
    two_nodes = lines_of(report(replace(seven_b, nodes=2, network_gb_s=10)), "network")
    copied = 4 * weights / 8  # twice the shard, and half of the ring
    assert f"{copied / 1e9:.1f} GB of gradients (all-reduce)" in two_nodes
    assert f"other nodes: {copied / 1e10:.2f} s at 10 GB/s (assumed)" in two_nodes
    # with --offload gradients are reduced in each micro-batch
    many = replace(seven_b, tokens_per_microbatch=4096, offload=True)
    count = plan.Workload(mean_prompt(many)).micro_batches(many)
    assert count > 1
    assert f"{count * 4 * weights * 7 / 8 / 1e9:.1f} GB of gradients (reduce" in report(many)
    assert "network    nothing" in report(replace(seven_b, gpus=1))


def test_nodes_share_the_work_and_not_the_memory(seven_b):
    one, two = report(seven_b), report(replace(seven_b, nodes=2))
    assert "on 2 nodes of 8 GPU(s)" in two
    assert "| master weights | 3.8 |" in one and "| master weights | 3.8 |" in two
    work, learning = plan.Workload(100.0), []
    for nodes in (1, 2):
        seconds = plan.measured_seconds(replace(seven_b, nodes=nodes), work, MEASURED_ROW, 1.0)
        learning.append(seconds[1])
    assert learning[0] == pytest.approx(2 * learning[1]) and learning[1] > 0
    low, high = plan_hours(one)
    less, least = plan_hours(two)
    # the engine takes as many steps on two nodes: its share does not halve
    assert low / 2 < less < low and high / 2 < least < high


def plan_hours(text):
    """The two ends of the reckoned range."""
    (line,) = (line for line in text.splitlines() if "reckoned and not measured" in line)
    words = line.split()
    return float(words[1]), float(words[3])


def test_the_reckoned_hours_by_hand(seven_b):
    """The lower end: short responses, 40% of 8 x 989 TFLOPS, 2 ms and the memory a step."""
    prompt, response, weights = mean_prompt(seven_b), 0.15 * 3000, 7_615_616_512
    layers, head = weights - 2 * 152064 * 3584 - 3584, 152064 * 3584
    forward = 2 * ((prompt + response) * layers + response * head)
    forward += 2 * 28 * 28 * 128 * (prompt + response) ** 2
    learning = 1024 * forward * (5 - 1 / 8) / (8 * 989e12 * 0.4)
    cache = 128 * response * (prompt + response / 2) * 2 * 28 * 4 * 128 * 2
    sampling = (3000 * 2 * weights + cache) / 3350e9 + 3000 * 0.002
    expected = 300 * (learning + sampling) / 3600
    assert plan_hours(report(seven_b))[0] == pytest.approx(expected, abs=0.06)


def test_the_reckoned_hours_say_that_they_leave_the_offloaded_optimizer_out(seven_b):
    assert "without evaluations: 989" in report(seven_b)
    assert "without evaluations, the CPU's AdamW" in report(replace(seven_b, offload=True))


@pytest.mark.parametrize("number, dtype", [(4, "float32"), (2, "bfloat16")])
def test_the_dtype_of_computing_counts_in_the_memory(number, dtype, toy):
    model = plan.meta_model(str(toy / "model"), dtype)
    assert model.dtype == getattr(torch, dtype)
    config = plan.PlanConfig(**vars(PRESETS["toy"][1]) | {"dtype": dtype, "gpus": 1})
    parts = {name: size for name, size, _ in plan.learner_memory(config, model, 1)}
    weights = plan.Weights(model)
    assert parts["gathered weights"] == number * (weights.rest + 2 * weights.layer)
    assert parts["gradients on their way"] == 4 * max(weights.rest, weights.layer)


def test_a_model_too_large_for_a_gpu_is_said_not_to_fit(seven_b, tmp_path):
    big = QWEN_7B | dict(hidden_size=5120, intermediate_size=27648, num_hidden_layers=64)
    big |= dict(num_attention_heads=40, num_key_value_heads=8)
    Qwen2Config(**big).save_pretrained(tmp_path)  # Qwen2.5-32B
    text = report(seven_b)
    assert "32,763,876,352 parameters" in text
    assert text.count("does not fit") == 4


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
