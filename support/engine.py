"""What vLLM may take of the machine, and what must be right before it starts."""

import gc
import importlib.metadata
import math
import os
import shutil
import subprocess

import torch
import torch.distributed as dist
from transformers import AutoConfig, PreTrainedConfig

DRIVER = 580  # NVIDIA's first driver for CUDA 13, which torch 2.13 is built for
BLOCK = 16  # tokens of vLLM's cache that belong together
FEWEST_SEQUENCES = 256  # that an engine can have in flight


def refuse_unusable_gpu() -> None:
    """Raise ValueError where vLLM's CUDA build is installed and torch cannot use a GPU.

    Either the GPU's driver is too old, or there is none. torch then takes the machine for one
    without a GPU, and vLLM would fail much later.
    """
    built_for_gpus = "vllm" in {d.name for d in importlib.metadata.distributions()}
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.cuda.is_available() or not built_for_gpus or hidden:
        return
    found = driver_version()
    if found is None:
        raise ValueError(
            "vLLM's CUDA build is installed, and there is no NVIDIA GPU: remove .venv and run make "
            "again, which installs its CPU build here"
        )
    raise ValueError(
        f"torch {torch.__version__} cannot use the GPU of this machine. Its driver is {found}; "
        f"driver {DRIVER} or newer is needed: update it, or run on a newer machine"
    )


def driver_version() -> str | None:
    """Of the first NVIDIA GPU that nvidia-smi sees; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def cache_bytes(config: PreTrainedConfig, tokens: int, bytes_a_number: int = 2) -> int:
    """Of the keys and values of so many tokens, in all layers."""
    c = config.get_text_config()
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return tokens * 2 * c.num_hidden_layers * heads * size * bytes_a_number


def engine_settings(
    model: str, context: int, sequences: int, reserve: int, can_sleep: bool
) -> dict[str, int | float | bool]:
    """Arguments of vLLM's LLM that depend on the machine. On a CPU they are always the same.

    context: tokens of the longest prompt plus response; sequences: how many are sampled at once;
    reserve: bytes of the GPU that must stay free. Raises ValueError if nothing is left for the
    engine.
    """
    if not torch.cuda.is_available():
        return {
            "kv_cache_memory_bytes": 2**30,
            "enforce_eager": True,
            # vLLM's CPU build cannot cut a prompt with a seed: "CPU Generator does not use offset"
            "enable_chunked_prefill": False,
        }
    dist.all_reduce(torch.zeros(1, device="cuda"))  # NCCL takes its memory now
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    room = 0.95 * free - reserve
    if room <= 0:
        raise ValueError(f"no room for vLLM beside {model}: --offload, or more GPUs")
    sequences = BLOCK * math.ceil(
        max(sequences, FEWEST_SEQUENCES) / BLOCK
    )  # CUDA graphs: sizes of 16
    settings = {
        "gpu_memory_utilization": room / total,
        "enable_sleep_mode": can_sleep,
        "max_num_seqs": sequences,
        "max_cudagraph_capture_size": sequences,
    }
    # A small model would fill the GPU with millions of blocks that nobody needs, each of them a
    # Python object. With this setting vLLM does not measure what it can have, so it is given only
    # where it is surely small.
    needed = cache_bytes(AutoConfig.from_pretrained(model), sequences * (context + BLOCK))
    if needed < room / 2:
        settings["kv_cache_memory_bytes"] = needed
    return settings


def give_threads_back() -> None:
    """Let this rank compute on its share of the machine's cores.

    On a GPU vLLM sets the process to one thread, and so does torchrun. With `offload` AdamW runs
    on the CPU and needs more.
    """
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
