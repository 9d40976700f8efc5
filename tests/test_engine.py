"""Tests of support/engine.py: what vLLM may take of the machine. A GPU is only pretended here."""

import importlib.metadata
import json
import os
import subprocess
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig

import drgrpo
import support.engine
from support.data import Problem
from support.engine import (
    cache_bytes,
    driver_version,
    engine_settings,
    give_threads_back,
    refuse_unusable_gpu,
)
from tests.helpers import LONG, ROOT, launch, tiny_model

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
    tiny_model().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model"), calls


def test_on_a_cpu_the_cache_has_a_fixed_size():
    settings = engine_settings("no model is read", 100, 8, 0, can_sleep=True)
    assert settings["kv_cache_memory_bytes"] == GIB and settings["enforce_eager"]


def test_more_prompts_than_go_through_at_once_can_be_sampled_with_seeds(engine):
    """On a CPU vLLM fails where it cuts a prompt that has a seed."""
    sampler, _, _ = engine
    at_once = sampler.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    count = at_once // len(LONG) + 2
    problems = [Problem("", [i + 1, *LONG[1:]], ["1"]) for i in range(count)]
    groups = sampler.generate(problems, list(range(count)), 1, 3, 1.0, ())
    assert [len(group) for group in groups] == [1] * count


def test_on_a_gpu_the_engine_takes_what_the_policy_leaves_free(gpu):
    model, calls = gpu
    settings = engine_settings(model, 100, 1024, 17 * GIB, can_sleep=True)
    assert calls == ["NCCL", "empty", "ask"]
    assert settings["gpu_memory_utilization"] == pytest.approx((0.95 * 60 - 17) / 80)
    assert settings["enable_sleep_mode"] is True and "enforce_eager" not in settings
    with pytest.raises(ValueError, match="--offload, or more GPUs"):
        engine_settings(model, 100, 1024, 57 * GIB, can_sleep=True)


def test_only_an_engine_that_sleeps_is_made_for_it(gpu):
    """A second engine in one process fails where the first one's memory was made for sleeping."""
    assert engine_settings(gpu[0], 100, 8, 0, can_sleep=False)["enable_sleep_mode"] is False


@pytest.mark.parametrize("sequences, expected", [(8, 256), (256, 256), (1000, 1008)])
def test_as_many_sequences_are_in_flight_as_are_sampled_at_once(gpu, sequences, expected):
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
    config = AutoConfig.for_model(
        "qwen2",
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_hidden_layers=5,
    )
    assert cache_bytes(config, 7) == 7 * 2 * 5 * 2 * (96 // 6) * 2
    config.head_dim = 32
    assert cache_bytes(config, 1, bytes_a_number=4) == 2 * 5 * 2 * 32 * 4


REAL_CONFIG = """
import json, sys
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
from support import guards

GIB = 2**30
torch.cuda.is_available, torch.cuda.mem_get_info = lambda: True, lambda: (60 * GIB, 80 * GIB)
torch.zeros, drgrpo.dist.all_reduce = mock.Mock(), mock.Mock()
guards.eos_ids = lambda llm: {0}
with mock.patch.object(vllm, "LLM") as llm:
    drgrpo.Sampler(sys.argv[1], 136, 7, dtype="bfloat16", sequences=1000, can_sleep=True)
arguments = llm.call_args.kwargs | {"model": llm.call_args.args[0]}
config = EngineArgs(**arguments).create_engine_config(UsageContext.LLM_CLASS)
print(json.dumps({
    "dtype": str(config.model_config.dtype),
    "head": str(config.model_config.head_dtype),
    "sleeps": config.model_config.enable_sleep_mode,
    "logprobs": config.model_config.logprobs_mode,
    "longest": config.model_config.max_model_len,
    "seed": config.model_config.seed,
    "sequences": config.scheduler_config.max_num_seqs,
    "graphs": config.compilation_config.cudagraph_capture_sizes[-1],
    "eager": config.model_config.enforce_eager,
    "share": config.cache_config.gpu_memory_utilization,
    "worker": config.parallel_config.worker_cls,
    "processes": config.parallel_config.distributed_executor_backend,
}))
"""


@pytest.mark.slow
def test_vllm_makes_of_our_settings_what_is_meant_on_a_gpu(toy, tmp_path):
    """vLLM's own configuration, built on a platform that says it is an H100."""
    (tmp_path / "config.py").write_text(REAL_CONFIG)
    found = json.loads(launch(1, tmp_path / "config.py", toy / "model").splitlines()[-1])
    assert found.pop("share") == pytest.approx(0.95 * 60 / 80)
    assert found == {
        "dtype": "torch.bfloat16",
        "head": "torch.float32",
        "sleeps": True,
        "logprobs": "processed_logprobs",
        "longest": 136,
        "seed": 7,
        "sequences": 1008,
        "graphs": 1008,
        "eager": False,
        "worker": "vllm.v1.worker.gpu_worker.Worker",
        "processes": "external_launcher",
    }


def test_vllm_sleeps_and_wakes_in_the_order_in_which_we_ask(engine, monkeypatch):
    """All of vLLM but the worker, which cannot sleep on a CPU and only notes what it is asked."""
    sampler, policy, _ = engine
    executor = sampler.llm.llm_engine.engine_core.engine_core.model_executor
    real, calls = executor.collective_rpc, []

    def noting(method, *arguments, **settings):
        given = settings.get("kwargs") or {}
        calls.append((method, given.get("level") or given.get("tags")))
        if method in ("sleep", "wake_up"):
            return [None]
        return real(method, *arguments, **settings)

    monkeypatch.setattr(executor, "collective_rpc", noting)
    monkeypatch.setattr(drgrpo, "CUDA", True)
    sampler.sleep()
    assert executor.is_sleeping
    sampler.wake(policy)
    assert not executor.is_sleeping
    assert [call for call in calls if call[0] in ("sleep", "wake_up", "reload_weights")] == [
        ("sleep", 2),
        ("wake_up", ["weights"]),
        ("reload_weights", None),
        ("wake_up", ["kv_cache"]),
    ]
    problem = Problem("", LONG[:20], ["1"])
    ((response,),) = sampler.generate([problem], [0], 1, 5, 1.0, ())  # it schedules again
    assert response.response_ids


# ------------------------------------------------------------------------------------- drivers

SMI = """#!/bin/sh
case "$*" in
*driver_version*) echo "{driver}"; echo "{driver}" ;;
-L) echo "GPU 0: NVIDIA H100" ;;
esac
"""


@pytest.fixture
def cuda_build(monkeypatch):
    """vLLM's CUDA build, in the eyes of refuse_unusable_gpu."""
    found = [mock.Mock()]
    found[0].name = "vllm"
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def pretend_gpu(folder, monkeypatch, driver):
    (folder / "nvidia-smi").write_text(SMI.format(driver=driver))
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_a_driver_that_is_too_old_is_named_with_the_one_that_is_needed(
    cuda_build, tmp_path, monkeypatch
):
    pretend_gpu(tmp_path, monkeypatch, "550.54.15")
    assert driver_version() == "550.54.15"
    with pytest.raises(ValueError, match="Its driver is 550.54.15; driver 580 or newer is needed"):
        refuse_unusable_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # somebody hides the GPU on purpose
    refuse_unusable_gpu()


def test_a_cuda_build_without_a_gpu_is_an_error_that_says_what_to_do(cuda_build, monkeypatch):
    monkeypatch.setattr(support.engine, "driver_version", lambda: None)
    with pytest.raises(ValueError, match="no NVIDIA GPU: remove .venv and run make again"):
        refuse_unusable_gpu()


def test_a_gpu_that_torch_can_use_needs_no_look_at_its_driver(cuda_build, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(support.engine, "driver_version", mock.Mock(side_effect=AssertionError))
    refuse_unusable_gpu()


def test_a_machine_without_a_gpu_is_right_with_the_cpu_build():
    refuse_unusable_gpu()


@pytest.mark.parametrize("driver, code", [("550.54.15", 2), ("580.65.06", 0), ("610.1", 0)])
def test_make_says_before_it_installs_that_the_driver_is_too_old(
    driver, code, tmp_path, monkeypatch
):
    pretend_gpu(tmp_path, monkeypatch, driver)
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "python3").chmod(0o755)
    folder = tmp_path / "clone"
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "pip").symlink_to(tmp_path / "pip")
    (tmp_path / "pip").write_text('#!/bin/sh\necho pip "$@"\n')
    (tmp_path / "pip").chmod(0o755)
    for name in ("Makefile", "requirements.txt"):
        (folder / name).write_text((ROOT / name).read_text())
    done = subprocess.run(["make", ".venv/ready"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    installs = "pip install -r requirements.txt" in done.stdout.splitlines()
    assert installs == (code == 0)
    if code:
        assert "driver is 550.54.15; 580 or newer is needed" in done.stderr


# ------------------------------------------------------------------------------------- threads


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
