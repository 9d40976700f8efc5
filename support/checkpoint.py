"""Checkpoints: models that transformers and vLLM load, and states from which a run goes on.

runs/NAME/model          a link to the newest of the exports, each a Hugging Face checkpoint
runs/NAME/exports/STEP
runs/NAME/state/STEP     fp32 weights and optimizer before round STEP, in the format of
                         torch.distributed.checkpoint, for any number of ranks
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import save_torch_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from transformers import AutoConfig

# ------------------------------------------------------------------------------------- exports


def save_model(
    weights: Iterable[tuple[str, torch.Tensor]],
    model,
    tokenizer,
    folder: Path,
    step: int,
    card: str = "",
) -> None:
    """Write folder/exports/STEP, and let the link folder/model point to it.

    `weights` are (name, full weight) that all ranks gather one by one; rank 0 writes. The link is
    switched in one operation, so that there is always a whole model behind it. The export before
    this one is kept, older ones are removed. `card` becomes the model's README.md.
    """
    kept = {}
    for name, weight in weights:
        tied_head = model.config.tie_word_embeddings and name == "lm_head.weight"
        if dist.get_rank() == 0 and not tied_head:
            kept[name] = weight.to("cpu", copy=True)  # it may be a view of padded shards
    if dist.get_rank() == 0:
        exports = folder / "exports"
        target = exports / str(step)
        if (folder / "model").resolve() == target.resolve():  # a run that makes this step again
            target = exports / f"{step}-again"
        write_export(kept, model, tokenizer, target, card)
        switch_link(folder / "model", target.relative_to(folder))
        remove_old_exports(exports, target)


def remove_old_exports(exports: Path, live: Path) -> None:
    """Keep the export that was just written, and the newest one of a step before."""
    steps = {path: int(path.name.split("-")[0]) for path in exports.glob("[0-9]*")}
    before = [step for step in steps.values() if step < steps[live]]
    for path, step in steps.items():
        if path != live and step != max(before, default=None):
            shutil.rmtree(path)


def write_export(
    weights: dict[str, torch.Tensor], model, tokenizer, target: Path, card: str
) -> None:
    """A Hugging Face checkpoint that appears as a whole or not at all."""
    new = target.with_name(f".{target.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save_torch_state_dict(weights, new)
    model.config.save_pretrained(new)
    tokenizer.save_pretrained(new)
    # As text: save_pretrained refuses, at the first checkpoint, what many base models ship: a
    # temperature without do_sample
    (new / "generation_config.json").write_text(model.generation_config.to_json_string())
    (new / "README.md").write_text(card)
    shutil.rmtree(target, ignore_errors=True)  # nothing points to it: a killed run left it
    new.rename(target)


def switch_link(link: Path, target: Path) -> None:
    """Let the link point to `target`, a path relative to the link's folder, in one operation."""
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    os.replace(new, link)


def weights_fingerprint(model: str) -> str:
    """The commit of a hub model; of a folder, the sha256 of its weight files."""
    if not Path(model).is_dir():
        return AutoConfig.from_pretrained(model)._commit_hash
    digest = hashlib.sha256()
    for path in sorted((*Path(model).glob("*.safetensors"), *Path(model).glob("*.bin"))):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


# ------------------------------------------------------------------------- state to resume from

FACTS = "facts.json"  # of a state: what else a resume needs
MANIFEST = "manifest.json"  # of a state: size and sha256 of each of its files
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def reason(error: BaseException) -> str:
    """What went wrong, in one line: a CheckpointException prints the traceback of every rank."""
    if not isinstance(error, CheckpointException):
        return str(error)
    failures = sorted(error.failures.items())
    return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in failures)


class StateKeeper:
    """Saves all that a run needs to go on, and loads it again.

    Saving copies the tensors and writes them in a thread while the run goes on, one save at a
    time. A failed save warns and is counted; the second one in a row raises. There must have been
    an update before the first save: Adam has no state before it.
    """

    def __init__(self, folder: Path, policy: torch.nn.Module, optimizer: torch.optim.Optimizer):
        self.folder = folder  # of the states
        self.policy = policy
        self.optimizer = optimizer
        # The thread's collective operations must not mix with those of the step
        self.group = dist.new_group(backend="gloo")
        self.thread = ThreadPoolExecutor(1)
        self.saving: Future | None = None
        self.failed = 0  # saves in a row
        self.whole: list[int] = []  # steps of states that were loaded or saved, the newest last

    def save(self, step: int, facts: dict) -> None:
        """Begin to save the state before round `step`."""
        self.wait()
        copies = {}
        for part, values in self.state().items():
            copies[part] = {key: copy_to_cpu(value) for key, value in values.items()}
        self.saving = self.thread.submit(self.write, step, copies, facts)

    def wait(self) -> None:
        """Wait for the save that is under way. Raises RuntimeError if it failed and the one before
        it, too."""
        if self.saving is None:
            return
        saving, self.saving = self.saving, None
        try:
            saving.result()
        except (OSError, RuntimeError, CheckpointException) as error:
            self.failed += 1
            free = shutil.disk_usage(self.folder.parent).free / 1e9  # torch hides what a disk says
            message = (
                f"the state could not be saved in {self.folder}: {reason(error)} "
                f"({free:,.3f} GB are free on that disk)"
            )
            if self.failed > 1:
                raise RuntimeError(f"twice in a row, {message}") from error
            warnings.warn(f"{message}. The run goes on; the older states are kept.", stacklevel=2)
        else:
            self.failed = 0

    def load(self, step: int) -> None:
        """Put the state before round `step` into policy and optimizer."""
        self.whole = [step]
        state = self.state()
        dcp.load(state, checkpoint_id=self.folder / str(step))
        set_state_dict(
            self.policy,
            self.optimizer,
            model_state_dict=state["policy"],
            optim_state_dict=state["optimizer"],
            options=FLAT,
        )

    def close(self) -> None:
        """Wait for the last save, and end the thread."""
        self.wait()
        self.thread.shutdown()

    def state(self) -> dict[str, dict[str, Any]]:
        """This rank's shards, by name."""
        policy, optimizer = get_state_dict(self.policy, self.optimizer, options=FLAT)
        return {"policy": policy, "optimizer": optimizer}

    def write(self, step: int, copies: dict, facts: dict) -> None:
        """Runs in the thread: the state, then its manifest. Then all is removed but this state and
        the whole one before it: older states, damaged ones, and what killed saves have left."""
        target = self.folder / str(step)
        self.on_rank_0(begin_state, target, facts)
        try:
            dcp.save(copies, checkpoint_id=target, process_group=self.group)
        except (OSError, RuntimeError, CheckpointException):
            if dist.get_rank() == 0:  # half a state would only fill the disk
                remove_state(target)
            raise
        self.on_rank_0(self.publish, step, target)  # save returned: all ranks have written

    def publish(self, step: int, target: Path) -> None:
        """Write the manifest, and remove what is not kept."""
        write_json(target / MANIFEST, describe_files(target))
        before = [other for other in self.whole if other != step]
        self.whole = [*before[-1:], step]
        for folder in self.folder.iterdir():
            if folder.name.isdigit() and int(folder.name) not in self.whole:
                remove_state(folder)

    def on_rank_0(self, function: Callable, *arguments: Any) -> None:
        """Call it on rank 0. All ranks wait for it, and raise what it raised: else they would wait
        for a rank 0 that has given up."""
        failure: list[OSError | None] = [None]
        if dist.get_rank() == 0:
            try:
                function(*arguments)
            except OSError as error:
                failure[0] = error
        dist.broadcast_object_list(failure, src=0, group=self.group)
        if failure[0] is not None:
            raise failure[0]


def begin_state(folder: Path, facts: dict) -> None:
    """An empty folder for a state, with its facts."""
    remove_state(folder)
    folder.mkdir(parents=True)
    write_json(folder / FACTS, facts)


def copy_to_cpu(value: Any) -> Any:
    """A copy that the next update does not change."""
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def saved_steps(folder: Path) -> list[int]:
    """Steps of the states that are complete, the newest first."""
    names = [path.parent.name for path in folder.glob(f"*/{MANIFEST}")]
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def newest_whole_state(folder: Path) -> tuple[int, dict] | None:
    """Step and facts of the newest state whose files are what they were; None without any state.

    Warns of a damaged one. Raises ValueError if all are damaged.
    """
    steps = saved_steps(folder)
    for step in steps:
        damage = find_damage(folder / str(step))
        if damage is None:
            return step, json.loads((folder / str(step) / FACTS).read_text())
        warnings.warn(f"the state {folder / str(step)} is damaged: {damage}", stacklevel=2)
    if steps:
        raise ValueError(
            f"every state in {folder} is damaged: remove {folder.parent} to start again, or put "
            "back a copy of a state"
        )
    return None


def find_damage(state: Path) -> str | None:
    """What is wrong with a state's files; None if nothing is."""
    try:
        manifest = json.loads((state / MANIFEST).read_text())
    except ValueError as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, (size, digest) in manifest.items():
        file = state / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
        if sha256_of(file) != digest:
            return f"{name} is not what was written"
    return None


def describe_files(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 of each file of a folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {file.name: (file.stat().st_size, sha256_of(file)) for file in files}


def remove_state(folder: Path) -> None:
    """Remove a state, its manifest first: what is left of it is then no state."""
    (folder / MANIFEST).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def read_json(file: Path) -> Any:
    """What a JSON file holds; None without a file."""
    return json.loads(file.read_text()) if file.exists() else None


def write_json(file: Path, value: Any) -> None:
    """Write a file that appears as a whole or not at all, and is on the disk."""
    new = file.with_name(f".{file.name}.new")
    with new.open("w") as out:
        json.dump(value, out, indent=2)
        out.flush()
        os.fsync(out.fileno())
    os.replace(new, file)


def sha256_of(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
