"""The engine that samples: vLLM in this process, on a CPU. A GPU is only pretended.

Whatever breaks between sampler and trainer must stop a run within one step, so some tests break
one thing of a small run and make two steps. Prompts are longer than a block of vLLM's prefix cache.
"""

import itertools
import os
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoTokenizer

import drgrpo
from drgrpo import Rollout, collate, full_weights, train_step
from support.data import Problem, check_endings, endings
from support.grader import Verdict
from support.run import cache_bytes, engine_settings, give_threads_back
from templates import TEMPLATES
from test_drgrpo import noting
from tests.helpers import LONG, TOY, launch, read_jsonl, some_rollouts, tiny_model


def draw(sampler, prompt=LONG, seed=0, n=4, temperature=1.0, stop=()):
    """A group of responses of at most 20 tokens."""
    return sampler.generate([Problem("", prompt, ["1"])], [seed], n, 20, temperature, stop)[0]


def gap(policy, group, temperature=1.0):
    """Largest difference of the two log-probs over all tokens, with the policy as it is now."""
    batch = collate(group)
    logprobs = policy(batch.ids, batch.response_mask, temperature).detach()
    policy.reshard()  # as a backward pass does
    return (logprobs - batch.sampler_logprobs).abs().max().item()


def many(sampler, stop=()):
    """64 responses to a short prompt."""
    return [r for seed in range(4) for r in draw(sampler, [5, 6], seed, 16, stop=stop)]


# ------------------------------------------------------------------------------ sampling


def test_the_sampler_returns_the_ids_that_it_drew_and_their_log_probs(engine):
    sampler, policy, config = engine
    group, tokenizer = draw(sampler), AutoTokenizer.from_pretrained(config.model)
    for rollout in group:
        assert rollout.text == tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
        assert rollout.prompt_ids == LONG
        assert len(rollout.response_ids) == len(rollout.sampler_logprobs) <= 20
        assert rollout.finish_reason == ("length" if len(rollout.response_ids) == 20 else "stop")
    assert len({tuple(r.response_ids) for r in group}) == 4
    assert gap(policy, group) < 1e-4


@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_log_probs_are_those_of_the_distribution_that_is_sampled(engine, temperature):
    sampler, policy, _ = engine
    group = draw(sampler, temperature=temperature)
    assert gap(policy, group, temperature) < 1e-4
    assert gap(policy, group, 1.0) > 0.05


def test_a_draw_depends_on_its_seed_and_not_on_its_neighbours(engine):
    sampler, _, _ = engine
    problems = [Problem("", LONG[:k], ["1"]) for k in (9, 17, 33)]

    def drawn(problems, seeds):
        groups = sampler.generate(problems, seeds, 2, 20, 1.0, ())
        return [[(r.problem, r.response_ids, r.sampler_logprobs) for r in g] for g in groups]

    three, two = drawn(problems, [1, 2, 3]), drawn(problems[1:], [2, 3])
    assert [[r[1:] for r in g] for g in three[1:]] == [[r[1:] for r in g] for g in two]
    assert [[r[0] for r in g] for g in three] == [[0, 0], [1, 1], [2, 2]]
    assert drawn(problems, [1, 2, 3]) == three != drawn(problems, [4, 2, 3])
    assert drawn([], []) == []


def test_more_prompts_than_go_through_at_once_can_be_sampled_with_seeds(engine):
    """On a CPU vLLM fails where it cuts a prompt that has a seed."""
    sampler, _, _ = engine
    at_once = sampler.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    count = at_once // len(LONG) + 2
    problems = [Problem("", [i + 1, *LONG[1:]], ["1"]) for i in range(count)]
    groups = sampler.generate(problems, list(range(count)), 1, 3, 1.0, ())
    assert [len(group) for group in groups] == [1] * count


# ------------------------------------------------------------------------------ how a response ends


def test_eos_ends_a_response_and_belongs_to_it(engine):
    sampler, policy, config = engine
    ended = [r for r in many(sampler) if r.finish_reason == "stop"]
    assert ended and all(r.response_ids[-1] == 0 for r in ended)
    eos = AutoTokenizer.from_pretrained(config.model).decode([0])
    assert eos and not any(eos in r.text for r in ended), "it is in the ids, not in the text"
    assert gap(policy, ended) < 1e-4


def test_a_stop_string_ends_a_response_and_stays_in_it(engine):
    sampler, policy, config = engine
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    stop = tuple("aeiou")
    ended = [r for r in many(sampler, stop) if r.finish_reason == "stop" and r.response_ids[-1]]
    assert len(ended) > 10
    for rollout in ended:
        assert tokenizer.decode(rollout.response_ids).startswith(rollout.text)
        assert rollout.text.endswith(stop) and not set(rollout.text[:-1]) & set(stop)
    assert gap(policy, ended) < 1e-4


def test_a_stop_string_that_is_a_special_token_ends_a_response_and_is_trained(engine):
    """It does not show in decoded text: who looks for it there would never stop."""
    sampler, policy, config = engine
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    pad, pad_id = tokenizer.pad_token, tokenizer.pad_token_id
    assert tokenizer.decode([pad_id], skip_special_tokens=True) == ""
    ((common, _),) = Counter(i for r in many(sampler) for i in r.response_ids).most_common(1)
    embedding = policy.model.get_input_embeddings().weight.to_local()  # and the head
    embedding.data[pad_id] = embedding.data[common]  # so that it is sampled as often
    sampler.wake(policy)
    for stop in ((pad,), (pad, "e")):
        responses = many(sampler, stop)
        ended = [r for r in responses if r.response_ids[-1] == pad_id]
        assert ended and all(r.finish_reason == "stop" and r.text.endswith(pad) for r in ended)
        assert not any(pad_id in r.response_ids[:-1] for r in responses)
        check_endings(responses, config.model, stop)
        assert gap(policy, ended) < 1e-4, "the log-prob of the token itself, too"


def test_all_that_ends_a_response_is_known(toy, tmp_path):
    folder = str(toy / "model")
    assert endings(folder, ()) == {0: ""}
    assert endings(folder, ("<|pad|>", "</answer>")) == {0: "", 1: "<|pad|>"}
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    tiny_model(eos_token_id=[3, 4]).config.save_pretrained(tmp_path)  # no generation_config.json
    assert endings(str(tmp_path), ()) == {0: "", 3: "", 4: ""}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    endings.cache_clear()
    assert endings(str(tmp_path), ()) == {0: "", 5: ""}


@pytest.mark.parametrize("reason, ids, text, fine", [
    ("stop", [7, 0], "", True),
    ("stop", [7, 8], "so </answer>", True),
    ("stop", [7, 8], "so </answer> and", False),
    ("stop", [0, 7], "", False),
    ("stop", [], "", False),
    ("length", [7, 8], "", True),
])  # fmt: skip
def test_a_response_whose_eos_was_dropped_stops_the_run(ranks, toy, reason, ids, text, fine):
    """Every other token is right, so the gap says nothing."""
    config = replace(TOY, model=str(toy / "model"))
    rollout = Rollout(0, [5], ids, [0.0] * len(ids), text, reason)
    sampler = SimpleNamespace(generate=lambda *given: [[rollout]])
    grader = SimpleNamespace(template=TEMPLATES["r1"])  # which stops at </answer>
    problems = [Problem("", [5], ["1"])]
    if fine:
        assert drgrpo.sample(sampler, grader, problems, [0], [0], config) == [rollout]
    else:
        with pytest.raises(RuntimeError, match="neither EOS .* would not learn to stop"):
            drgrpo.sample(sampler, grader, problems, [0], [0], config)


# ------------------------------------------------------------------------------ new weights


def test_on_a_gpu_the_engine_wakes_in_stages_around_the_weights(engine, monkeypatch):
    """All of vLLM but the worker, which cannot sleep on a CPU and only notes what it is asked."""
    sampler, policy, _ = engine
    executor = sampler.llm.llm_engine.engine_core.engine_core.model_executor
    real, calls, sent = executor.collective_rpc, [], mock.Mock(wraps=full_weights)

    def note_or_call(method, *arguments, **settings):
        given = settings.get("kwargs") or {}
        if method in ("sleep", "wake_up", "reload_weights"):
            calls.append((method, given.get("level") or given.get("tags")))
        return [None] if method in ("sleep", "wake_up") else real(method, *arguments, **settings)

    monkeypatch.setattr(executor, "collective_rpc", note_or_call)
    monkeypatch.setattr(drgrpo, "full_weights", sent)
    monkeypatch.setattr(drgrpo, "CUDA", True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    sampler.sleep()
    assert executor.is_sleeping
    sampler.wake(policy)
    assert not executor.is_sleeping
    assert calls == [
        ("sleep", 2), "empty", "empty", ("wake_up", ["weights"]),
        ("reload_weights", None), "empty", ("wake_up", ["kv_cache"]),
    ]  # fmt: skip
    assert sent.mock_calls == [mock.call(policy.model, drgrpo.DTYPE)]
    assert all(r.response_ids for r in draw(sampler)), "it schedules again"


def test_an_engine_that_did_not_take_all_weights_or_kept_its_cache_stops_the_run(
    engine, monkeypatch
):
    sampler, policy, _ = engine
    monkeypatch.setattr(sampler.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(RuntimeError, match="kept its prefix cache"):
        sampler.wake(policy)
    first_only = lambda method, kwargs: next(kwargs["weights_iterator"])
    monkeypatch.setattr(sampler.llm, "collective_rpc", first_only)
    with pytest.raises(RuntimeError, match=r"did not take all weights\. Left over: .*lm_head"):
        sampler.wake(policy)
    monkeypatch.undo()


def test_batches_and_weights_go_to_the_device_of_the_policy(monkeypatch):
    monkeypatch.setattr(drgrpo, "DEVICE", "meta")  # a device that is not the CPU, anywhere
    batch = collate(some_rollouts())
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 4
    weights = dict(full_weights(tiny_model(), torch.float16))
    assert "lm_head.weight" in weights, "it is tied to the embedding, and sent all the same"
    tensors += weights.values()
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert tensors[-1].dtype == torch.float16


def zero(worker):
    for tensor in worker.get_model().parameters():
        tensor.data.zero_()


def test_an_engine_whose_weights_were_zeroed_gets_all_of_them_back(engine):
    """As vLLM's are after a sleep of level 2; the CPU's engine has a copy of the head, too."""
    sampler, policy, _ = engine
    zeros = ((k, torch.zeros_like(w)) for k, w in full_weights(policy.model, torch.float32))
    settings = {"weights_iterator": zeros, "is_checkpoint_format": True}
    sampler.llm.collective_rpc("reload_weights", kwargs=settings)
    sampler.llm.collective_rpc(zero)
    assert gap(policy, draw(sampler)) > 0.1
    sampler.wake(policy)
    assert gap(policy, draw(sampler)) < 1e-4


def test_a_prompt_that_was_seen_before_is_sampled_as_one_that_was_not(engine, monkeypatch):
    """To the bit: what is cached is forgotten before each sampling."""
    sampler, calls = engine[0], []
    for name in ("reset_prefix_cache", "generate"):
        noting(monkeypatch, sampler.llm, name, calls)
    first, again = draw(sampler), draw(sampler)
    assert calls == ["reset_prefix_cache", "generate"] * 2
    assert [r.sampler_logprobs for r in first] == [r.sampler_logprobs for r in again]


# ------------------------------------------------------------------- what breaks stops the run

# Two blocks of 128 tokens are the same in all
PROBLEMS = [Problem("", [*LONG[:280], i], ["1"]) for i in range(5, 9)]


class AnyGrader:
    """A reward that says nothing of the problem, but is not the same for all responses."""

    # Some letters end a response, or all would be truncated and get the same reward
    template = replace(TEMPLATES["none"], stop=tuple("aeiou13579"))

    def verdicts(self, responses, answers, rows):
        return [Verdict(float(sum(map(ord, text)) % 2), None) for text in responses]


@pytest.fixture
def steps(engine):
    """Makes the next step of a run whose learning rate moves the log-probs, and returns its gap."""
    sampler, policy, config = engine
    changed = dict(prompts_per_step=2, samples_per_prompt=8, responses_per_update=16)
    config = replace(config, **changed, temperature=0.8)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-2, weight_decay=0.0)
    numbers = itertools.count()

    def step():
        parts = (policy, optimizer, sampler, AnyGrader())
        return train_step(config, next(numbers), PROBLEMS, *parts)[0]["gap"]

    return SimpleNamespace(step=step, sampler=sampler, policy=policy)


CAUSES = (
    "differ by .*above max_gap 0.001. Likely causes: .*old weights.*prefix cache.*not sent.*temp"
)


def test_steps_that_nobody_broke_show_no_gap(steps):
    assert max(steps.step() for _ in range(3)) < 1e-5


def test_a_prefix_cache_of_old_weights_is_caught_in_the_next_step(steps, monkeypatch):
    monkeypatch.setattr(steps.sampler.llm, "reset_prefix_cache", lambda: True)
    draw(steps.sampler, PROBLEMS[0].prompt_ids)
    steps.step()
    with pytest.raises(RuntimeError, match=CAUSES):
        steps.step()


# The head is tied to the embedding, and the CPU's engine has a packed copy of it
@pytest.mark.parametrize("old", ["lm_head.weight", "layers.0.mlp.down_proj.weight", ""])
def test_old_weights_in_the_sampler_are_caught_in_the_next_step(steps, monkeypatch, old):
    """One large tensor, or all."""
    first = {k: w.clone() for k, w in full_weights(steps.policy.model, torch.float32)}

    def stale(model, dtype):
        for key, weight in full_weights(model, dtype):
            yield key, first[key] if old in key else weight

    monkeypatch.setattr(drgrpo, "full_weights", stale)
    steps.step()
    before = {name: w.full_tensor().clone() for name, w in steps.policy.state_dict().items()}
    with pytest.raises(RuntimeError, match=CAUSES):
        steps.step()
    for name, weight in steps.policy.state_dict().items():
        assert torch.equal(weight.full_tensor(), before[name]), "no update was made"


# ------------------------------------------------------------------- what it takes of the machine

GIB = 2**30


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU of 80 GiB with 60 free, in the eyes of engine_settings; returns what was called."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda: calls.append("ask") or (60 * GIB, 80 * GIB)
    )
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: calls.append("NCCL"))
    monkeypatch.setattr(torch, "zeros", mock.Mock())
    tiny_model().config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model"), calls


def test_on_a_gpu_the_engine_takes_what_the_policy_leaves_free(gpu):
    model, calls = gpu
    settings = engine_settings(model, 100, 1024, 17 * GIB, can_sleep=True)
    assert calls == ["NCCL", "empty", "ask"]
    assert settings["gpu_memory_utilization"] == pytest.approx((0.95 * 60 - 17) / 80)
    assert settings["enable_sleep_mode"] is True and "enforce_eager" not in settings
    # A second engine in one process fails where the first one's memory was made for sleeping
    assert engine_settings(model, 100, 8, 0, can_sleep=False)["enable_sleep_mode"] is False
    with pytest.raises(ValueError, match="--offload, or more GPUs"):
        engine_settings(model, 100, 1024, 57 * GIB, can_sleep=True)


def test_as_many_sequences_are_in_flight_as_are_sampled_at_once(gpu):
    for sequences, expected in ((8, 256), (256, 256), (1000, 1008)):
        settings = engine_settings(gpu[0], 100, sequences, 0, can_sleep=True)
        assert settings["max_num_seqs"] == settings["max_cudagraph_capture_size"] == expected


def test_the_cache_is_no_larger_than_the_run_can_use(gpu):
    model, _ = gpu
    config = AutoConfig.from_pretrained(model)
    settings = engine_settings(model, 100, 300, 0, can_sleep=True)
    assert settings["kv_cache_memory_bytes"] == cache_bytes(config, 304 * 116)
    # what would be more than half of the room is left to vLLM, which measures what it can have
    tokens = int(0.95 * 60 * GIB / 2 / cache_bytes(config, 1) / 304) - 17
    assert "kv_cache_memory_bytes" in engine_settings(model, tokens, 300, 0, can_sleep=True)
    assert "kv_cache_memory_bytes" not in engine_settings(model, tokens + 9, 300, 0, can_sleep=True)


def test_a_tokens_keys_and_values_are_counted_in_all_layers():
    heads = dict(num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=5)
    config = AutoConfig.for_model("qwen2", hidden_size=96, **heads)
    assert cache_bytes(config, 7) == 7 * 2 * 5 * 2 * (96 // 6) * 2
    config.head_dim = 32
    assert cache_bytes(config, 1, bytes_per_number=4) == 2 * 5 * 2 * 32 * 4


@pytest.mark.parametrize("ranks, threads", [("1", 6), ("4", 1), ("9", 1), (None, 6)])
def test_a_rank_computes_on_its_share_of_the_cores(ranks, threads, monkeypatch):
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)  # vLLM's CPU build replaces it
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    give_threads_back()
    assert given == [threads]


REAL_CONFIG = """
import sys
from unittest import mock

import torch

for missing in ("vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch"):  # not in the CPU build
    sys.modules[missing] = mock.MagicMock()
from vllm import platforms
from vllm.platforms.cuda import NonNvmlCudaPlatform
from vllm.platforms.interface import DeviceCapability


class H100(NonNvmlCudaPlatform):
    get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
    get_device_name = classmethod(lambda cls, device_id=0: "NVIDIA H100 80GB HBM3")
    get_device_total_memory = classmethod(lambda cls, device_id=0: 80 * 2**30)
    num_compute_units = classmethod(lambda cls, device_id=0: 132)
    is_cumem_allocator_available = lambda self: True


platforms._current_platform = H100()
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.usage.usage_lib import UsageContext

import drgrpo

GIB = 2**30
torch.cuda.is_available, torch.cuda.mem_get_info = lambda: True, lambda: (60 * GIB, 80 * GIB)
torch.zeros, drgrpo.dist.all_reduce = mock.Mock(), mock.Mock()
drgrpo.DTYPE = torch.bfloat16
with mock.patch.object(vllm, "LLM") as llm:
    drgrpo.Sampler(sys.argv[1], 136, 7, sequences=1000, can_sleep=True)
arguments = llm.call_args.kwargs | {"model": llm.call_args.args[0]}
config = EngineArgs(**arguments).create_engine_config(UsageContext.LLM_CLASS)
model = config.model_config
assert (model.dtype, model.head_dtype) == (torch.bfloat16, torch.float32)
assert model.enable_sleep_mode and not model.enforce_eager
assert model.logprobs_mode == "processed_logprobs"
assert (model.max_model_len, model.seed) == (136, 7)
assert abs(config.cache_config.gpu_memory_utilization - 0.95 * 60 / 80) < 1e-6
assert config.scheduler_config.max_num_seqs == 1008
assert config.compilation_config.cudagraph_capture_sizes[-1] == 1008
parallel = config.parallel_config
assert parallel.worker_cls == "vllm.v1.worker.gpu_worker.Worker"
assert parallel.distributed_executor_backend == "external_launcher"
"""


@pytest.mark.slow
def test_vllm_makes_of_our_settings_what_is_meant_on_a_gpu(toy, tmp_path):
    """vLLM's own configuration, built on a platform that says it is an H100."""
    (tmp_path / "config.py").write_text(REAL_CONFIG)
    launch(1, tmp_path / "config.py", toy / "model")


# ------------------------------------------------------------------------------ in bf16

IN_BF16 = """
import torch, drgrpo

drgrpo.DTYPE = torch.bfloat16
drgrpo.main()
"""


@pytest.mark.slow
def test_the_toy_learns_in_bf16_with_a_small_and_flat_gap(toy_here, tmp_path):
    (tmp_path / "bf16.py").write_text(IN_BF16)
    launch(1, tmp_path / "bf16.py", "toy", folder=tmp_path, steps=16, eval_every=8)
    rows = read_jsonl(tmp_path / "runs" / "toy" / "metrics.jsonl")
    gaps = [row["gap"] for row in rows if "gap" in row]
    assert len(gaps) == 16 and 1e-6 < max(gaps) < 0.002
    assert max(gaps[8:]) < 3 * max(gaps[:8])
    assert rows[-1]["eval_accuracy"] > rows[0]["eval_accuracy"] + 0.3
