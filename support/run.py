"""A run: its ranks, the memory of its engine, and what it leaves in runs/NAME.

runs/NAME/model        a link to the newest export: a Hugging Face checkpoint, always a whole one
runs/NAME/state/STEP   fp32 weights and optimizer before step STEP, for any number of ranks
runs/NAME/...          the records: see support/records.py
"""

import gc
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import save_torch_state_dict
from huggingface_hub.utils import enable_progress_bars
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils.logging import disable_progress_bar

from support.data import Problem, load_data, unreadable_golds
from support.grader import check_reward
from support.logprobs import check_model
from support.records import Records, check_tracker, read_json, say, status, versions
from templates import TEMPLATES

if TYPE_CHECKING:
    from drgrpo import Config, Policy

# --------------------------------------------------------------------------------------- ranks


GROUPS = itertools.count()  # of this process, one after the other


def start_ranks() -> None:
    """Join the process group that torchrun describes; without torchrun, a group of one."""
    # What the policy frees can go back to the GPU. To be set before CUDA starts
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for key, value in alone.items():
        os.environ.setdefault(key, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # keep the engine in this process
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # What vLLM and transformers print while they load helps nobody. Errors are still shown, and
    # VLLM_LOGGING_LEVEL=INFO shows all
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").addHandler(logging.NullHandler())  # before vLLM sets up its own
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    disable_progress_bar()  # of loading weights; it takes those of downloads along
    enable_progress_bars()
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    store, rank, world = next(dist.rendezvous("env://"))
    # torchrun's store still has the addresses of an earlier group of this process
    store = dist.PrefixStore(f"group {next(GROUPS)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def end_ranks() -> None:
    """Leave the process group, and what vLLM has built upon it."""
    if "vllm.distributed.parallel_state" in sys.modules:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
    gc.collect()  # a group that something still holds would abort the process when it ends
    if dist.is_initialized():
        dist.destroy_process_group()


def mesh() -> DeviceMesh:
    """Ranks as FSDP uses them: (ranks,), or (nodes, ranks of a node) on several nodes.

    Weights are sharded over the ranks of a node and copied on every node, so that only gradients
    travel between nodes.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    world = dist.get_world_size()
    ranks_of_a_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    nodes = world // ranks_of_a_node
    if nodes == 1:
        return init_device_mesh(device, (world,))
    return init_device_mesh(device, (nodes, ranks_of_a_node), mesh_dim_names=("nodes", "ranks"))


def all_reduce(values: dict) -> dict[str, float]:
    """Each value's sum over the ranks."""
    vector = torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
    dist.all_reduce(vector)
    return dict(zip(values, vector.tolist(), strict=True))


def from_all_ranks(value: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks. All ranks get all of them."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def timed(metrics: dict, phase: str) -> Iterator[None]:
    """Enter how long the block took as seconds_PHASE, what it started on the GPU included."""
    status(phase)
    start = time.perf_counter()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    metrics[f"seconds_{phase}"] = time.perf_counter() - start


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Lets a run finish its step when it is asked to stop, by SIGTERM or SIGINT (Ctrl-C).

    Gives a function that says whether any rank was asked to; all ranks must call it. Another
    signal, seconds later, ends the process at once.
    """
    received: list[float] = []  # when

    def note(number: int, frame: Any) -> None:
        now = time.monotonic()
        if received and now - received[0] < 3:  # the same one, by way of torchrun
            return
        if received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received.append(now)
        name = signal.Signals(number).name
        print(f"{name}: the step in flight is finished and saved; again: stop now", file=sys.stderr)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: all_reduce({"asked": bool(received)})["asked"] > 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -------------------------------------------------------------------------------------- engine

BLOCK = 16  # tokens of vLLM's cache that belong together
FEWEST_SEQUENCES = 256  # that an engine can have in flight


def cache_bytes(config: PreTrainedConfig, tokens: int, bytes_per_number: int = 2) -> int:
    """Of the keys and values of so many tokens, in all layers."""
    c = config.get_text_config()
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return tokens * 2 * c.num_hidden_layers * heads * size * bytes_per_number


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
    sequences = BLOCK * math.ceil(max(sequences, FEWEST_SEQUENCES) / BLOCK)
    settings = {
        "gpu_memory_utilization": room / total,
        "enable_sleep_mode": can_sleep,
        "max_num_seqs": sequences,
        "max_cudagraph_capture_size": sequences,  # CUDA graphs have sizes of 16
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


# ------------------------------------------------------------------------- before a run begins


def prepare(config: "Config") -> tuple[Any, list[Problem], list[Problem], dict]:
    """All that can go wrong in a training run before it starts.

    Returns the tokenizer, problems, held-out problems, and facts for config.json. Raises ValueError
    that says what to change.
    """
    check_tracker(config.track)
    check_compiler()
    tokenizer, problems, held_out, dropped = load_data(config)
    check_reward(config.reward, [part[0].row for part in (problems, held_out) if part])
    facts: dict = {"asked": what_is_asked(config, problems, held_out), "dropped_problems": dropped}
    if os.environ.get("RANK", "0") == "0":  # if it ends with an error, torchrun ends the others
        check_folder(config, facts["asked"])
        check_model(config.model, config.max_prompt_tokens + config.max_response_tokens)
        for name, part in ((config.dataset, problems), (config.eval_dataset, held_out)):
            if message := unreadable_golds(part):
                say(f"{name}: {message}")
    return tokenizer, problems, held_out, facts


def check_compiler() -> None:
    """Raises ValueError if there is no compiler: torch and vLLM compile when the engine starts."""
    compilers = [os.environ.get("CXX") or "g++"]
    if torch.cuda.is_available():
        compilers = [os.environ.get("CC") or "gcc", "clang"]
    if not any(shutil.which(name.split()[0]) for name in compilers):
        names = " or ".join(compilers)
        raise ValueError(f"no compiler {names}: install it, for example with `apt install g++`")


def what_is_asked(config: "Config", problems: list[Problem], held_out: list[Problem]) -> str:
    """sha256 of prompts, golds and stop strings, in order; of whole rows for one's own reward."""
    asked: list = [TEMPLATES[config.template].stop]
    for problem in (*problems, *held_out):
        graded_by = problem.answers if config.reward == "math" else problem.row
        asked.append([problem.prompt_ids, graded_by])
    return hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()


def is_finished(config: "Config") -> bool:
    """Whether the run has made all its steps, and all that comes after them."""
    run = read_json(config.folder / "config.json") or {}
    return (run.get("finished") or -1) >= config.steps


def check_folder(config: "Config", asked: str) -> None:
    """Whether the run may begin in its folder, or go on there. Prints settings that changed.

    Raises ValueError if the folder cannot be written to, or holds a run on other data.
    """
    folder = config.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise ValueError(f"{folder} cannot hold the run: {error}. Choose another folder") from error
    run = read_json(folder / "config.json") or {}
    steps = saved_steps(folder / "state")
    if not steps and not run.get("finished"):
        return  # nothing is there to go on with: the run begins
    for key, value in json.loads(json.dumps(asdict(config))).items():  # tuples become lists
        before = run.get("settings", {}).get(key, value)
        if before != value and key != "name":
            print(f"{folder}: {key} was {before}, is {value}")
    if run.get("asked") != asked:
        raise ValueError(
            f"{folder} holds a run that was asked something else: the data, the template or the "
            "tokenizer's chat template (today's date in it?) changed. Give what was, remove the "
            "folder, or choose a --name"
        )
    if steps and steps[0] > config.steps:
        raise ValueError(f"{folder} has made {steps[0]} steps already: --steps must not be fewer")
    if not steps and not is_finished(config):
        raise ValueError(
            f"{folder} is finished after {run['finished']} steps, and no state to go on from is "
            "left: remove or rename the folder, or choose a --name"
        )


# ---------------------------------------------------------------------------------- the states

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class States:
    """Saves all that a run needs to go on, and loads it again.

    A save copies the tensors and writes them in a thread while the run goes on. torch writes the
    file .metadata last: a folder without it is no state. A failed save warns and is counted; the
    second one in a row raises. There must have been an update before the first save: Adam has no
    state before it.
    """

    def __init__(self, folder: Path, policy: torch.nn.Module, optimizer: torch.optim.Optimizer):
        self.folder = folder  # of the states
        self.policy = policy
        self.optimizer = optimizer
        # The thread's collective operations must not mix with those of the step
        self.group = dist.new_group(backend="gloo")
        self.saving: tuple[int, Any] | None = None  # step and Future of the save under way
        self.failed = 0  # saves in a row

    def shards(self) -> dict[str, dict[str, Any]]:
        """This rank's tensors of policy and optimizer by name, not copies of them.

        What else an optimizer has is left out: lr, betas and so on are those of the command.
        """
        policy, optimizer = get_state_dict(self.policy, self.optimizer, options=FLAT)
        moments = {name: value for name, value in optimizer.items() if torch.is_tensor(value)}
        return {"policy": policy, "optimizer": moments}

    def save(self, step: int) -> None:
        """Begin to save the state before step `step`."""
        self.wait()
        target = self.folder / str(step)
        if dist.get_rank() == 0:
            shutil.rmtree(target, ignore_errors=True)  # what a killed save left, or a damaged state
        saving = dcp.async_save(self.shards(), checkpoint_id=target, process_group=self.group)
        self.saving = step, saving

    def wait(self) -> None:
        """Wait for the save that is under way, and remove all states but the last two. Raises
        RuntimeError if the save failed and the one before it, too."""
        if self.saving is None:
            return
        (step, saving), self.saving = self.saving, None
        try:
            saving.result()
        except (OSError, RuntimeError, CheckpointException) as error:
            self.failed += 1
            if dist.get_rank() == 0:
                shutil.rmtree(self.folder / str(step), ignore_errors=True)
            message = f"the state could not be saved in {self.folder}: {reason(error)}"
            if self.failed > 1:
                raise RuntimeError(f"twice in a row, {message}") from error
            warnings.warn(f"{message}. The run goes on; the older states are kept.", stacklevel=2)
            return
        self.failed = 0
        if dist.get_rank() == 0:
            # States of later steps are damaged: the run did not go on from them
            kept = [whole for whole in saved_steps(self.folder) if whole <= step][:2]
            for folder in self.folder.glob("[0-9]*"):
                if folder.name.isdigit() and int(folder.name) not in kept:
                    shutil.rmtree(folder, ignore_errors=True)

    def load(self) -> int:
        """Load the newest state that can be loaded. Returns its step, 0 if there is no state.

        Raises ValueError if none can be loaded, or if ranks do not see the same folder.
        """
        steps = saved_steps(self.folder)
        seen = from_all_ranks((self.folder.parent.exists(), steps))
        if any(other != seen[0] for other in seen):
            raise ValueError(
                f"ranks see different states in {self.folder}: it must be on a disk that all nodes "
                "share"
            )
        for step in steps:
            state = self.folder / str(step)
            try:
                dcp.load(self.shards(), checkpoint_id=state, process_group=self.group)
                return step
            except CheckpointException as error:
                warnings.warn(f"the state {state} is damaged: {reason(error)}", stacklevel=2)
        if steps:
            raise ValueError(
                f"every state in {self.folder} is damaged: remove {self.folder.parent} to start "
                "again, or put back a copy of a state"
            )
        return 0


def saved_steps(folder: Path) -> list[int]:
    """Steps of the states that are complete, the newest first."""
    names = [path.parent.name for path in folder.glob("*/.metadata")]
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def reason(error: BaseException) -> str:
    """What went wrong, in one line: a CheckpointException prints the traceback of every rank."""
    if isinstance(error, CheckpointException):
        failures = sorted(error.failures.items())
        return "; ".join(f"rank {rank}: {reason(failure[0])}" for rank, failure in failures)
    return f"{type(error).__name__}: {error}".partition("\n")[0]


# ----------------------------------------------------------------------------------- the run


class Run:
    """What a run leaves in its folder: records, models, and states from which it goes on.

    A context manager: at the end, also by an error, it waits for a save that is under way.
    Made after the engine has taken its share of the memory. If there is a state, the newest one is
    loaded into policy and optimizer, and `first_step` is its step.
    """

    def __init__(
        self,
        config: "Config",
        tokenizer,
        problems: list[Problem],
        facts: dict,
        policy: "Policy",
        optimizer: torch.optim.Optimizer,
    ):
        self.config, self.tokenizer, self.problems = config, tokenizer, problems
        self.model = policy.model
        self.states = States(config.folder / "state", policy, optimizer)
        self.first_step = self.states.load()
        self.finished = False  # whether all steps are made, and the last evaluation
        self.records = None
        if dist.get_rank() == 0:
            commit = getattr(self.model.config, "_commit_hash", None)
            facts = facts | {"versions": versions() | {"model_commit": commit}}
            stop = TEMPLATES[config.template].stop
            self.records = Records(config, facts, stop, self.first_step)
            say_if_scarce(config.folder, policy)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: object) -> None:
        self.states.wait()
        if self.records:
            self.records.close(self.finished)

    def record(self, step: int, metrics: dict, rollouts: list) -> None:
        """Enter a step into the records; one without metrics leaves no line."""
        self.finished = step == self.config.steps
        if metrics and self.records:
            row = {"step": step} | metrics | {"failed_saves": self.states.failed}
            self.records.add(row, self.problems, rollouts)

    def save_state(self, step: int, at_once: bool) -> None:
        """Begin to save the state before step `step`, if it is time or `at_once`."""
        every = self.config.save_every or self.config.eval_every
        is_time = at_once or step % every == 0 or step == self.config.steps
        if is_time and not self.finished:
            self.states.save(step)

    def export(self, step: int, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Save the model as it is before step `step`; before step 0 it is still the base model.

        `weights` are (name, full weight) that all ranks gather one by one; rank 0 writes. There are
        two folders in turn, and `model` is switched to the new one in one operation.
        """
        if step == 0:
            return
        kept = {}
        for name, weight in weights:
            tied_head = self.model.config.tie_word_embeddings and name == "lm_head.weight"
            if dist.get_rank() == 0 and not tied_head:
                kept[name] = weight.to("cpu", copy=True)  # it may be a view of padded shards
        if dist.get_rank() != 0:
            return
        link = self.config.folder / "model"
        old = link.resolve().name
        new = link.with_name("export-2" if old == "export-1" else "export-1")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        save_torch_state_dict(kept, new)
        self.model.config.save_pretrained(new)
        self.tokenizer.save_pretrained(new)
        # As text: save_pretrained refuses, at the first checkpoint, what many base models ship: a
        # temperature without do_sample
        generation_config = self.model.generation_config.to_json_string()
        (new / "generation_config.json").write_text(generation_config)
        new_link = link.with_name(".model.new")
        new_link.unlink(missing_ok=True)
        new_link.symlink_to(new.name)
        os.replace(new_link, link)
        if old.startswith("export-"):
            shutil.rmtree(link.with_name(old))


def say_if_scarce(folder: Path, policy: "Policy") -> None:
    """Print it if a run that begins is likely to find the disk or the memory too small."""
    count = sum(weight.numel() for weight in policy.parameters())
    state, export = 12 * count, policy.saved_dtype.itemsize * count  # bytes
    written = [*folder.glob("state/*/*"), *folder.glob("export-*/*")]
    there = sum(file.stat().st_size for file in written)
    disk = 3 * state + 2 * export - there  # a third state is written before the first one goes
    memory = state + export  # copies, while they are written
    if next(iter(policy.parameters())).device.type == "cpu":
        memory += state  # gradients and moments, which the first update makes
    for name, needed, free in (
        ("disk", disk, shutil.disk_usage(folder).free),
        ("memory", memory, psutil.virtual_memory().available),
    ):
        if needed > free:
            say(f"little {name}: {free / 1e9:.1f} GB are free, saving may take {needed / 1e9:.1f}")
