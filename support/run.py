"""A run in runs/NAME: whether this command may begin it or go on with it, and all that it leaves.

A run is known by its settings and by fingerprints of its data, base model, code and reward file,
which are in its config.json.
"""

import hashlib
import json
import os
import shlex
import sys
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from support.checkpoint import (
    StateKeeper,
    newest_whole_state,
    read_json,
    save_model,
    saved_steps,
    sha256_of,
    weights_fingerprint,
)
from support.data import Problem, check_tracker, load_data
from support.engine import refuse_unusable_gpu
from support.grader import check_reward
from support.metrics import RunLog, headline, versions
from support.models import check_model
from support.ranks import REQUEUE, from_rank_0

# Settings that leave the responses and the gradient as they are
MAY_CHANGE = (
    "steps",
    "save_every",
    "eval_every",
    "track",
    "grader_workers",
    "grader_timeout",
    "max_gap",
    "tokens_per_microbatch",
    "activation_checkpointing",
    "offload",
    "compile",
)
HERE = Path(__file__).parents[1]
REQUEUE_FILE = "requeue"  # in runs/NAME of a run that was asked to stop and wants to go on


def prepare(config) -> tuple[Any, list[Problem], list[Problem], dict[str, int]]:
    """All that can go wrong in a training run before it starts.

    Returns the tokenizer, problems, held-out problems, and counts of dropped rows. Raises
    ValueError that says what to change.
    """
    refuse_unusable_gpu()
    check_tracker(config.track)
    tokenizer, problems, held_out, dropped = load_data(config)
    check_reward(config.reward, problems[0].row)
    if os.environ.get("RANK", "0") == "0":  # if it ends with an error, torchrun ends the others
        check_run(config, fingerprints(config, problems, held_out))
        if not is_finished(config):
            refuse_read_only(config.folder)
        check_model(config.model, config.max_prompt_tokens + config.max_response_tokens)
    return tokenizer, problems, held_out, dropped


def fingerprints(config, problems: list[Problem], held_out: list[Problem]) -> dict[str, str]:
    """sha256 of all that a run depends on beside its settings."""
    data = [[(problem.text, problem.answers) for problem in part] for part in (problems, held_out)]
    code = [HERE / "drgrpo.py", HERE / "templates.py", *sorted((HERE / "support").glob("*.py"))]
    reward = "math"
    if config.reward != "math":
        reward = sha256_of(Path(config.reward.rpartition(":")[0]))
    return {
        "problems": hashlib.sha256(json.dumps(data).encode()).hexdigest(),
        "model": weights_fingerprint(config.model),
        "code": hashlib.sha256(b"".join(file.read_bytes() for file in code)).hexdigest(),
        "reward": reward,
    }


def is_finished(config) -> bool:
    """Whether the run has made all its steps, and all that comes after them."""
    run = read_json(config.folder / "config.json")
    return run is not None and run.get("finished") is not None and run["finished"] >= config.steps


def refuse_read_only(folder: Path) -> None:
    """Raises ValueError if the folder cannot be written to, or not be made."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise ValueError(
            f"{there.resolve()} cannot be written to, and {folder} would hold the run: make it "
            "writable, or start from another folder"
        )


def check_run(config, prints: dict[str, str]) -> None:
    """Whether this command may begin the run, or go on with it.

    Raises ValueError if the folder holds another run. Warns if the code has changed meanwhile.
    """
    run = read_json(config.folder / "config.json")
    if run is None:
        if (config.folder / "metrics.jsonl").exists():
            raise ValueError(
                f"{config.folder} holds a run without config.json: remove it, or choose a --name"
            )
        return
    if "settings" not in run:
        raise ValueError(
            f"{config.folder} holds a run of an older version: remove it, or choose a --name"
        )
    settings = json.loads(json.dumps(asdict(config)))  # tuples become lists, as in the file
    different = []
    for key, value in settings.items():
        before = run["settings"].get(key)
        if key not in MAY_CHANGE and before != value:
            different.append(f"{key} was {before!r} and is {value!r}")
    for key in ("problems", "model"):
        if run["fingerprints"][key] != prints[key]:
            different.append(
                f"the {key} are others: sha256 {run['fingerprints'][key][:8]} before, "
                f"{prints[key][:8]} now"
            )
    steps = saved_steps(config.folder / "state")
    if run["finished"] and not steps and not is_finished(config):
        raise ValueError(
            f"{config.folder} is finished after {run['finished']} steps, and no state to go on "
            "from is left: remove or rename the folder, or choose a --name"
        )
    if steps and steps[0] > config.steps:
        different.append(f"it has {steps[0]} steps already, and steps is {config.steps}")
    if different:
        raise ValueError(
            f"{config.folder} holds another run: {'; '.join(different)}. Give what was, remove the "
            "folder, or choose a --name"
        )
    changed = [key for key in ("code", "reward") if run["fingerprints"][key] != prints[key]]
    if changed and is_finished(config):
        raise ValueError(
            f"{config.folder} is finished, but the {' and the '.join(changed)} changed since: its "
            "results are those of the old one. Remove or rename the folder, or choose a --name"
        )
    if changed:
        warnings.warn(
            f"the {' and the '.join(changed)} changed since {config.folder} was started: the rest "
            "of the run is made with the new one",
            stacklevel=2,
        )


class Run:
    """What a run leaves in its folder: records, models, and states from which it goes on.

    Made after the engine has taken its share of the memory. If there is a state, the newest one is
    loaded into policy and optimizer, and `first_step` is its step.
    """

    def __init__(
        self,
        config,
        problems: list[Problem],
        held_out: list[Problem],
        dropped: dict[str, int],
        policy: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
    ):
        self.config = config
        self.problems = problems
        self.keeper = StateKeeper(config.folder / "state", policy, optimizer)
        is_rank_0 = dist.get_rank() == 0
        found = newest_whole_state(config.folder / "state") if is_rank_0 else None
        self.first_step, facts = from_rank_0(found or (0, {}))
        if self.first_step > 0:
            self.keeper.load(self.first_step)
        prints = fingerprints(config, problems, held_out) if is_rank_0 else {}
        self.log = RunLog(config, prints, dropped, self.first_step, facts)
        (config.folder / REQUEUE_FILE).unlink(missing_ok=True)
        steps = range(self.first_step, config.steps + 1)
        self.bar = tqdm(steps, config.name, disable=not is_rank_0, unit="step")

    def record(self, step: int, metrics: dict, rollouts: list) -> None:
        """Enter a step into the records; one without metrics leaves no line."""
        if metrics:
            row = {"step": step} | metrics | {"failed_saves": self.keeper.failed}
            self.log.record(row, self.problems, rollouts)
            self.bar.set_postfix(headline(metrics))

    def export(
        self,
        step: int,
        metrics: dict,
        weights: Iterable[tuple[str, torch.Tensor]],
        model,
        tokenizer,
    ) -> None:
        """Save the model as it is before round `step`, with the scores it has."""
        card = model_card(self.config, step, metrics)
        save_model(weights, model, tokenizer, self.config.folder, step, card)

    def save_state(self, step: int, at_once: bool) -> None:
        """Begin to save the state before round `step`, if it is time or `at_once`."""
        every = self.config.save_every or self.config.eval_every
        if at_once or step % every == 0 or step == self.config.steps:
            self.keeper.save(step, self.log.lengths())

    def close(self, finished: bool) -> None:
        """Wait for the last save and close the records."""
        self.keeper.close()
        if finished:
            self.log.finish(self.config.steps)
        self.log.close()
        self.bar.close()

    def ask_to_be_requeued(self) -> None:
        """End with exit code 75. torchrun hides the code, so a file in the run's folder says it,
        too."""
        if self.log.writes:
            (self.config.folder / REQUEUE_FILE).touch()
            done = (
                "stopped, but its last state could not be" if self.keeper.failed else "stopped and"
            )
            print(f"{self.config.folder}: {done} saved. The same command goes on with it.")
        sys.exit(REQUEUE)


def model_card(config, step: int, metrics: dict) -> str:
    """README.md of a saved model: what it is, how it was made, what it scores."""
    found = ", ".join(f"{package} {number}" for package, number in versions().items())
    lines = [
        "---",
        f"base_model: {config.model}",
        "library_name: transformers",
        "tags: [dr-grpo, reinforcement-learning]",
        "---",
        "",
        f"# {config.name}, step {step} of {config.steps}",
        "",
        f"{config.model}, trained with Dr. GRPO on {config.dataset} (template {config.template}, "
        f"reward {config.reward}).",
        "",
        f"    python {shlex.join(sys.argv)}",
        "",
        f"Versions: {found}.",
        "",
        f"On {config.eval_dataset}, one greedy response to each problem:",
        "",
        "| metric | value |",
        "| --- | --- |",
    ]
    for key, value in metrics.items():
        if key.startswith("eval_") and value is not None:
            lines.append(f"| {key.removeprefix('eval_')} | {value:.4g} |")
    return "\n".join(lines) + "\n"
