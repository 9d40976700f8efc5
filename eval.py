"""Measuring: the accuracy of a model, and the records of a training run.

    python eval.py --models runs/toy-base/model runs/toy/model --data runs/toy-base/test.jsonl \\
        --template none

Training scores its held-out problems with the same `evaluate`, on the engine that is awake.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist
import tyro

from templates import TEMPLATES, Grader, Problem, derive_seed, load_problems, load_tokenizer


def evaluate(sampler, grader: Grader, problems: list[Problem], max_tokens: int, n: int = 1,
             temperature: float = 0.0, seed: int = 0) -> dict[str, float]:
    """Accuracy (pass@1, the mean over n responses to each problem) of an engine that is awake.

    `sampler` and `grader` are drgrpo's. Each rank takes a share of the problems; all get the
    scores of all. Unlike in training, a right answer in a truncated response counts, as in the
    paper. "length" is in tokens.
    """
    mine = range(dist.get_rank(), len(problems), dist.get_world_size())
    groups = sampler.generate([problems[i] for i in mine], [derive_seed(seed, i) for i in mine],
                              n, max_tokens, temperature, grader.template.stop)
    responses = [response for group in groups for response in group]
    answers = [problems[i].answers for i in mine for _ in range(n)]
    rewards = grader.grade([r.text for r in responses], answers)
    rows = [(reward, r.finish_reason == "length", len(r.response_ids))
            for reward, r in zip(rewards, responses, strict=True)]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, rows)
    means = np.mean([row for part in everyone for row in part], axis=0)
    return dict(zip(("accuracy", "truncated", "length"), means.tolist(), strict=True))


# ------------------------------------------------------------------- records of a training run


def start_log(config, dropped: dict[str, int]):
    """Make the run's folder; returns a TensorBoard writer where tracking was asked for, or None."""
    config.folder.mkdir(parents=True, exist_ok=True)
    settings = asdict(config) | {"dropped_problems": dropped}
    (config.folder / "config.json").write_text(json.dumps(settings, indent=2))
    if config.track == "no":
        return None
    if config.track == "wandb":
        import wandb

        wandb.init(project="drgrpo", name=config.name, config=settings, sync_tensorboard=True)
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(config.folder)


@contextmanager
def timed(metrics: dict, phase: str) -> Iterator[None]:
    """Enter how long the block took as seconds_PHASE."""
    start = time.perf_counter()
    yield
    metrics[f"seconds_{phase}"] = time.perf_counter() - start


def summarize(rollouts: list, samples_per_prompt: int) -> dict[str, float | None]:
    """Metrics of a step's N responses, as the README explains them; None: no such response."""

    def mean(values: list) -> float | None:
        return sum(values) / len(values) if values else None

    rewards = np.array([r.reward for r in rollouts]).reshape(-1, samples_per_prompt)
    return {
        "reward": float(rewards.mean()),
        "groups_all_right": float((rewards == 1).all(axis=1).mean()),
        "groups_all_wrong": float((rewards == 0).all(axis=1).mean()),
        "truncated": mean([r.finish_reason == "length" for r in rollouts]),
        "length": mean([len(r.response_ids) for r in rollouts]),
        "length_right": mean([len(r.response_ids) for r in rollouts if r.reward > 0]),
        "length_wrong": mean([len(r.response_ids) for r in rollouts if r.reward == 0]),
        # -logprob of a sampled token is an unbiased estimate of the policy's entropy, for free
        "entropy": mean([-x for r in rollouts for x in r.sampler_logprobs]),
    }


def append_rows(file: Path, rows: list[dict]) -> None:
    with file.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def record(config, metrics: dict, problems: list[Problem], rollouts: list, writer) -> None:
    """Append a step to metrics.jsonl, and its responses to samples.jsonl."""
    append_rows(config.folder / "metrics.jsonl", [metrics])
    append_rows(config.folder / "samples.jsonl", [
        {"step": metrics["step"], "prompt": problems[r.problem].prompt, "response": r.text,
         "answers": problems[r.problem].answers, "reward": r.reward,
         "length": len(r.response_ids), "finish_reason": r.finish_reason} for r in rollouts])
    for key, value in metrics.items():
        if writer and value is not None:
            writer.add_scalar(key, value, metrics["step"])


def plot_curves(folder: Path) -> None:
    """Draw metrics.jsonl as curves.png: reward, length, gap and gradient norm against the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    panels = {
        "reward": {"training": "reward", "held-out accuracy": "eval_accuracy"},
        "response length (tokens)": {"right": "length_right", "wrong": "length_wrong"},
        "gap of sampler and trainer (nats a token)": {"": "gap"},
        "gradient norm": {"": "grad_norm"},
    }
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=True):
        for label, key in lines.items():
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            axis.plot(*zip(*points), label=label, marker="o" if key == "eval_accuracy" else None)
        axis.set(title=title, xlabel="step")
        if len(lines) > 1:
            axis.legend()
    figure.savefig(folder / "curves.png", dpi=120)
    pyplot.close(figure)


# ----------------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class Config:
    """Score models on a dataset."""

    models: tuple[str, ...]  # folders or hub names
    data: str  # a .jsonl or .parquet file, or a hub dataset
    template: str = "qwen_math"
    split: str = "test"
    subset: str | None = None
    problem_column: str = "problem"
    answer_column: str = "answer"
    limit: int | None = None  # only the first so many problems
    n: int = 1  # responses to a problem
    temperature: float = 0.0
    max_prompt_tokens: int = 1024
    max_response_tokens: int = 3000
    gpu_memory: float = 0.9
    seed: int = 0


def main() -> None:
    from drgrpo import Sampler, start_ranks  # not at the top: drgrpo imports `evaluate` from here

    config = tyro.cli(Config)
    context = config.max_prompt_tokens + config.max_response_tokens
    try:
        if config.template not in TEMPLATES:
            raise ValueError(f"template {config.template!r} must be one of {', '.join(TEMPLATES)}")
        problems = {
            model: load_problems(
                config.data, load_tokenizer(model, context), TEMPLATES[config.template],
                config.max_prompt_tokens, config.subset, config.split, config.problem_column,
                config.answer_column)[0][: config.limit]
            for model in config.models
        }
    except ValueError as error:
        sys.exit(f"error: {error}")
    for model in config.models:
        start_ranks()
        sampler = Sampler(model, context, config.seed, config.gpu_memory)
        with Grader(config.template) as grader:
            scores = evaluate(sampler, grader, problems[model], config.max_response_tokens,
                              config.n, config.temperature, config.seed)
            scores |= {"timeouts": grader.timeouts, "errors": grader.errors}
        print(json.dumps({"model": model, "problems": len(problems[model])} | scores))
        sampler.close()


if __name__ == "__main__":
    main()
