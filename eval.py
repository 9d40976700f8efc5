r"""Measuring: scores with intervals that can be traced and repeated, and records of a training run.

    python eval.py --model Qwen/Qwen2.5-Math-1.5B --tasks aime24 amc23 math500 minerva olympiadbench
    python eval.py --model runs/toy/model --template none --tasks runs/toy-base/test.jsonl \
        --max-prompt-tokens 64 --max-response-tokens 72
    python eval.py --model Qwen/Qwen2.5-Math-1.5B --analyse       # section 2 of arXiv 2503.20783
    python eval.py --regrade runs/eval/NAME.jsonl                 # without a model

Training scores its held-out problems with the same `evaluate`, on the engine that is awake.
Shapes: P problems, n responses to each.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from math import comb
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import tyro
from huggingface_hub import save_torch_state_dict
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from templates import (TEMPLATES, TIMEOUT, Grader, Problem, Template, answer_in_loose_tags,
                       derive_seed, find_template, last_boxed, load_task, load_tokenizer)

# ---------------------------------------------------------------------------------------- ranks


def start_ranks(name: str = "") -> None:
    """Join the process group that torchrun describes; without torchrun, a group of one. Another
    one after `Sampler.close` needs another name: the store still has the first one's addresses."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "0"}
    for key, value in (alone | {"MASTER_ADDR": "127.0.0.1"}).items():
        os.environ.setdefault(key, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # keep the engine in this process
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    store, rank, world = next(rendezvous("env://"))
    dist.init_process_group(backend, store=dist.PrefixStore(name, store), rank=rank,
                            world_size=world)


def all_reduce(values: dict) -> dict[str, float]:
    """Each value's sum over the ranks."""
    vector = torch.tensor([float(v) for v in values.values()], dtype=torch.float64)
    dist.all_reduce(vector)
    return dict(zip(values, vector.tolist(), strict=True))


def from_rank_0(value):
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


# ----------------------------------------------------------------------------------- statistics


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k responses is right, from n of which c are:
    1 - C(n-c, k) / C(n, k) (arXiv 2107.03374). Raises ValueError unless 0 <= c <= n, 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1 - comb(n - c, k) / comb(n, k)


def interval(mean: float, se: float, problems: float) -> tuple[float, float]:
    """95% interval of a mean of values in 0..1 with standard error `se`: Wilson's score interval.

    Its size of the sample is the number of yes-or-no problems that would have this standard
    error, mean (1-mean) / se^2. That is P for values of 0 and 1, and more for means over several
    responses. Where all values are equal (0 of 30 right) it is `problems`; a bootstrap would then
    claim certainty.
    """
    size, z = (mean * (1 - mean) / se**2 if se > 0 else problems), 1.959964
    middle = (mean + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * (mean * (1 - mean) / size + z**2 / (4 * size**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def majority(grader: Grader, groups: list[list[dict]]) -> list[float]:
    """The reward of each problem's most frequent answer, 0 without any; the earlier wins a tie.

    Answers are grouped by what the grader takes as equal to the group's first one. Responses
    without an answer do not vote, and a comparison that fails finds no equality.
    """
    left = [[row for row in rows if row["answer"]] for rows in groups]
    parties: list[list[list[dict]]] = [[] for _ in groups]
    while any(left):  # a round makes one party of each problem, all comparisons at once
        same = grader.compare((row["answer"], (rows[0]["answer"],)) for rows in left for row in rows
                              if row["answer"] != rows[0]["answer"])
        for i, rows in enumerate(left):
            first = rows[0]["answer"] if rows else None
            equal = [r["answer"] == first or same[r["answer"], (first,)] is True for r in rows]
            parties[i].append([row for row, member in zip(rows, equal) if member])
            left[i] = [row for row, member in zip(rows, equal) if not member]
    return [max(found, key=len)[0]["reward"] if any(found) else 0.0 for found in parties]


def score(rows: list[dict], n: int, grader: Grader) -> dict[str, float | None]:
    """All metrics of P*n responses to P problems, as the README explains them, in the order of
    the problems. None: there is no such response."""
    rewards = np.array([row["reward"] for row in rows])  # (P*n,)
    right, groups = rewards == 1, [rows[i : i + n] for i in range(0, len(rows), n)]
    measures = {"accuracy": rewards.reshape(-1, n).mean(axis=1)}  # (P,) each
    if n > 1:
        counts = right.reshape(-1, n).sum(axis=1).tolist()
        for k in sorted({2**i for i in range(n.bit_length())} | {n}):
            measures[f"pass@{k}"] = np.array([pass_at_k(n, c, k) for c in counts])
        measures[f"maj@{n}"] = np.array(majority(grader, groups))
    scores: dict[str, float | None] = {}
    for name, values in measures.items():
        value, se = float(values.mean()), float(values.std()) / len(values) ** 0.5
        scores |= measured(name, value, se, *interval(value, se, len(values)))

    lengths = np.array([row["length"] for row in rows])
    reflecting = np.array([reflects(row["response"]) for row in rows])
    flags = {
        "answered": [last_boxed(row["response"]) is not None
                     or answer_in_loose_tags(row["response"]) is not None for row in rows],
        "boxed": [last_boxed(row["response"]) is not None for row in rows],
        "unparsed": [not row["answer"] for row in rows],
        "truncated": [row["finish_reason"] == "length" for row in rows],
        "reflection": reflecting,
        "reflection_of_questions": reflecting.reshape(-1, n).any(axis=1),
    }
    scores |= {name: float(np.mean(values)) for name, values in flags.items()}
    scores |= {"accuracy_reflecting": mean(rewards[reflecting]),
               "accuracy_not_reflecting": mean(rewards[~reflecting]), "length": mean(lengths)}
    for name, some in {"right": lengths[right], "wrong": lengths[~right]}.items():
        scores[f"length_{name}"] = mean(some)
        for q in (10, 50, 90):
            scores[f"length_{name}_p{q}"] = float(np.percentile(some, q)) if some.size else None
    failures = [row["failure"] for row in rows if row["failure"]]
    timeouts = failures.count(TIMEOUT)
    return scores | {"timeouts": timeouts, "errors": len(failures) - timeouts}


def measured(name: str, value: float, se: float, low: float, high: float) -> dict[str, float]:
    return {name: value, f"{name}_se": se, f"{name}_low": low, f"{name}_high": high}


def mean(values: np.ndarray | list) -> float | None:
    return float(np.mean(values)) if len(values) else None


def average(results: list[dict]) -> dict[str, float]:
    """The unweighted mean over benchmarks of each measure, with its own interval: the distances
    to the lower bounds add up as independent errors do, and so do those to the upper bounds
    (Zou and Donner, Statistics in Medicine 2008)."""
    scores = {}
    for name in [key[:-3] for key in results[0] if key.endswith("_se")]:
        value, se, low, high = np.array(  # (4, benchmarks)
            [[r[name + part] for r in results] for part in ("", "_se", "_low", "_high")])
        middle = float(value.mean())
        error, below, above = (float((x**2).sum() ** 0.5) / len(results)
                               for x in (se, value - low, high - value))
        scores |= measured(name, middle, error, middle - below, middle + above)
    return scores


# ------------------------------------------------------------------------------------- evaluate

RESPONSES_AT_ONCE = 256  # of each engine between two writes to disk


def evaluate(sampler, grader: Grader, problems: list[Problem], max_tokens: int, n: int = 1,
             temperature: float = 0.0, seed: int = 0, file: Path | None = None,
             labels: dict[str, str] | None = None) -> dict[str, float | None]:
    """Sample n responses to each problem from an engine that is awake, grade and `score` them.

    `sampler` and `grader` are drgrpo's. Each rank takes a share of the problems; all get the
    scores of all. Unlike in training, a right answer in a truncated response counts, as in the
    paper. With `file`, every response is a line of it, beginning with `labels`, and what is there
    already under the same labels is not sampled again; raises ValueError under other labels.
    """
    rank, engines = dist.get_rank(), dist.get_world_size() // sampler.tensor_parallel
    step = max(1, RESPONSES_AT_ONCE * engines // n)  # problems
    rows = saved_rows(file, labels or {}) if file and rank == 0 else []
    if len(rows) < len(problems) * n:  # begin a new chunk, so that it is the unbroken run's
        rows = rows[: len(rows) // (step * n) * step * n]
    if file and rank == 0:
        write_rows(file, rows)
    for start in range(from_rank_0(len(rows) // n), len(problems), step):
        chunk = range(start, min(start + step, len(problems)))
        mine = respond(sampler, grader, problems, chunk[rank // sampler.tensor_parallel :: engines],
                       max_tokens, n, temperature, seed)
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        parts = everyone[:: sampler.tensor_parallel]  # ranks that share an engine say the same
        new = sorted((row for part in parts for row in part),
                     key=lambda row: (row["problem"], row["sample"]))
        rows += [(labels or {}) | row for row in new] if rank == 0 else []
        if file and rank == 0:
            append_rows(file, rows[start * n :])
    return from_rank_0(score(rows, n, grader) if rank == 0 else None)


def respond(sampler, grader: Grader, problems: list[Problem], chosen: range, max_tokens: int,
            n: int, temperature: float, seed: int) -> list[dict]:
    """This rank's responses to the chosen problems, graded: a row each."""
    seeds, mine = [derive_seed(seed, i) for i in chosen], [problems[i] for i in chosen]
    groups = sampler.generate(
        mine, seeds, n, max_tokens, temperature, grader.template.stop,
        lambda i, group: grader.start([r.text for r in group], [mine[i].answers] * len(group)))
    responses = [response for group in groups for response in group]
    verdicts = grader.verdicts([r.text for r in responses],
                               [problems[i].answers for i in chosen for _ in range(n)])
    return [
        {"problem": chosen[place // n], "sample": place % n, "seed": seeds[place // n],
         "prompt": problems[chosen[place // n]].prompt, "response": r.text,
         "length": len(r.response_ids), "finish_reason": r.finish_reason,
         "answers": problems[chosen[place // n]].answers,
         "answer": grader.template.extract(r.text), "reward": float(verdict is True),
         "failure": verdict if isinstance(verdict, str) else None}
        for place, (r, verdict) in enumerate(zip(responses, verdicts, strict=True))]


def saved_rows(file: Path, labels: dict[str, str]) -> list[dict]:
    """The whole lines of a file, none if there is no file; ValueError if they have other labels."""
    lines = file.read_text().split("\n")[:-1] if file.exists() else []  # the last may be cut off
    rows = [json.loads(line) for line in lines]
    if any(row.get(key) != value for row in rows for key, value in labels.items()):
        raise ValueError(f"{file} holds responses under other settings, versions, weights or data: "
                         "remove it, or choose another --output")
    return rows


def write_rows(file: Path, rows: list[dict]) -> None:
    """Replace the file in one operation."""
    temporary = file.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    append_rows(temporary, rows)
    temporary.replace(file)


# ------------------------------------------------------------------- what responses show

# Words of self-reflection: the list of the paper (arXiv 2503.20783) and of its keyword_count.py
REFLECTION = ("recheck", "rethink", "reassess", "reevaluate", "re-evaluate", "reevaluation",
              "re-examine", "reexamine", "reconsider", "reanalyze", "double-check", "check again",
              "think again", "verify again", "go over the steps")


def reflects(response: str) -> bool:
    return any(word in response.lower() for word in REFLECTION)


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def with_interval(row: dict, name: str) -> str:
    if name not in row:
        return ""
    return (f"{row[name]:.3f} ± {row[f'{name}_se']:.3f} "
            f"[{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]")


def scores_table(rows: list[dict], n: int) -> str:
    """Markdown; each measure as value ± standard error [95% interval]."""
    measures = ["accuracy"] + [f"pass@{n}", f"maj@{n}"] * (n > 1)
    head = ["model", "template", "task", "problems", "pass@1" if n == 1 else f"mean@{n}",
            *measures[1:], "boxed", "unparsed", "truncated", "length right/wrong",
            "timeouts/errors"]
    return markdown(head, [
        [row["model"], row["template"], row["task"], str(row["problems"]),
         *(with_interval(row, name) for name in measures),
         *(number(row.get(key)) for key in ("boxed", "unparsed", "truncated")),
         "/".join(number(row.get(f"length_{key}"), 0) for key in ("right", "wrong")),
         f"{row['timeouts']}/{row['errors']}" if "errors" in row else ""] for row in rows])


ANALYSIS = {"answered": "answers", "accuracy": "accuracy", "reflection": "reflects: responses",
            "reflection_of_questions": "reflects: questions",
            "accuracy_reflecting": "accuracy with", "accuracy_not_reflecting": "accuracy without"}


def analysis_table(rows: list[dict], n: int) -> str:
    """Markdown: what base models do before any training."""
    names = ANALYSIS | {f"pass@{n}": f"pass@{n}"}
    judged = [key for key in rows[0] if key.startswith("judge_")]
    head = ["model", "template", "task", *names.values(), *judged, "length right/wrong"]
    return markdown(head, [
        [row["model"], row["template"], row["task"],
         *(number(row[key]) for key in (*names, *judged)),
         "/".join(number(row[f"length_{key}"], 0) for key in ("right", "wrong"))] for row in rows])


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def plot_analysis(rows: list[dict], n: int, file: Path) -> None:
    """Draw the analysis as bars: answers, accuracy and pass@n, self-reflection, length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"share of responses that answer": ["answered"],
              "right": ["accuracy", f"pass@{n}"],
              "share with self-reflection words": ["reflection", "reflection_of_questions"],
              "length (tokens)": ["length_right", "length_wrong"]}
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    places = np.arange(len(rows))
    for axis, (title, keys) in zip(axes.flat, panels.items(), strict=True):
        for i, key in enumerate(keys):
            heights = [row[key] if row[key] is not None else 0.0 for row in rows]
            axis.bar(places + 0.4 * i, heights, 0.4, label=key)
        axis.set(title=title)
        labels = [f"{Path(row['model']).name}\n{row['template']}, {row['task']}" for row in rows]
        axis.set_xticks(places + 0.2 * (len(keys) - 1), labels, fontsize=7)
        axis.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


JUDGE = """Below are a question and a response to it. Reply with one digit and nothing else.
0: the response does not try to answer the question.
1: it tries to answer, and never looks back at its own steps.
2: it tries to answer, and somewhere checks, doubts or revises its own steps.

Question: {prompt}

Response: {response}"""


def judge(rows: list[dict], url: str, model: str) -> dict[str, float]:
    """What an OpenAI-compatible endpoint says: the share of responses that try to answer, that
    reflect, that reflect and have a word of REFLECTION, and that it gave no verdict on."""
    from openai import OpenAI, OpenAIError

    client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))

    def ask(row: dict) -> str:
        messages = [{"role": "user", "content": JUDGE.format_map(row)}]
        try:
            reply = client.chat.completions.create(model=model, messages=messages, temperature=0)
        except OpenAIError as error:
            return f"failed: {error}"
        return (reply.choices[0].message.content or "").strip()

    with ThreadPoolExecutor(16) as pool:
        verdicts = list(pool.map(ask, rows))
    both = [v == "2" and reflects(row["response"]) for v, row in zip(verdicts, rows)]
    return {"judge_answers": float(np.mean([v in ("1", "2") for v in verdicts])),
            "judge_reflects": float(np.mean([v == "2" for v in verdicts])),
            "judge_and_words": float(np.mean(both)),
            "judge_silent": float(np.mean([v not in ("0", "1", "2") for v in verdicts]))}


def regrade(rows: list[dict], default: str) -> str:
    """Grade saved responses again: sets `reward`, `answer` and `failure` of the rows, and returns
    a Markdown table of what changed.

    Rows need `response` and `answers`; the template is their `template`, or else `default`.
    Raises ValueError if a column is missing.
    """
    if missing := [key for key in ("response", "answers") if any(key not in row for row in rows)]:
        raise ValueError(f"the rows have no {', '.join(missing)}")
    table = []
    for name in dict.fromkeys(row.get("template", default) for row in rows):
        # "chat" needs a tokenizer only to ask; it answers in a box, too
        template = TEMPLATES["none"] if name == "chat" else find_template(name, None)
        some = [row for row in rows if row.get("template", default) == name]
        saved, start = [row.get("reward", 0.0) for row in some], time.perf_counter()
        with Grader(template) as grader:
            verdicts = grader.verdicts([r["response"] for r in some], [r["answers"] for r in some])
        rate = len(some) / (time.perf_counter() - start)
        for row, verdict in zip(some, verdicts, strict=True):
            row |= {"answer": template.extract(row["response"]), "reward": float(verdict is True),
                    "failure": verdict if isinstance(verdict, str) else None}
        new = [row["reward"] for row in some]
        table.append([name, str(len(some)), number(np.mean(saved)), number(np.mean(new)),
                      str(sum(a > b for a, b in zip(new, saved))),
                      str(sum(a < b for a, b in zip(new, saved))),
                      f"{grader.timeouts}/{grader.errors}", number(rate, 0)])
    return markdown(["template", "responses", "saved accuracy", "accuracy", "now right",
                     "now wrong", "timeouts/errors", "responses/s"], table)


# ------------------------------------------------------------------- records of a training run


def start_log(config, dropped: dict[str, int]):
    """Make the run's folder; returns a TensorBoard writer where tracking was asked for, or None."""
    config.folder.mkdir(parents=True, exist_ok=True)
    settings = asdict(config) | {"dropped_problems": dropped}
    (config.folder / "config.json").write_text(json.dumps(settings, indent=2))
    print(f"{config.folder}: rows of {config.dataset} that were dropped: {dropped}")
    if config.track == "no":
        return None
    if config.track == "wandb":
        import wandb

        wandb.init(project="drgrpo", name=config.name, config=settings, sync_tensorboard=True)
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(config.folder)


@contextmanager
def timed(metrics: dict, phase: str) -> Iterator[None]:
    """Enter how long the block took as seconds_PHASE, on the GPU too."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    metrics[f"seconds_{phase}"] = time.perf_counter() - start


def summarize(rollouts: list, samples_per_prompt: int) -> dict[str, float | None]:
    """Metrics of a step's N responses, as the README explains them; None: no such response."""
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


def full_weights(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Each weight by its checkpoint's name, gathered from all ranks, one at a time.

    From state_dict: named_parameters would leave out a head that is tied to the embedding.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"  # offloaded ones are on the CPU
    for name, weight in model.state_dict().items():
        weight = weight.detach().to(device, dtype)  # before gathering: half the traffic
        yield name, weight.full_tensor() if isinstance(weight, DTensor) else weight


def save_checkpoint(gathered: Iterable[tuple[str, torch.Tensor]], model, tokenizer,
                    folder: Path) -> None:
    """Write a checkpoint that transformers and vLLM load, of weights that all ranks gather. What
    was in the folder stays until all is written."""
    rank, tied, weights = dist.get_rank(), model.config.tie_word_embeddings, {}
    for name, weight in gathered:
        if rank == 0 and not (tied and name == "lm_head.weight"):
            weights[name] = weight.to("cpu", copy=True)  # it may be a view of padded shards
    if rank == 0:
        new = folder.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        save_torch_state_dict(weights, new)
        for part in (model.config, model.generation_config, tokenizer):
            part.save_pretrained(new)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)


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
    """Score models on benchmarks. Where it stands already, OUTPUT/*.jsonl is not sampled again."""

    model: tuple[str, ...] = ()  # folders or hub names
    template: tuple[str, ...] = ()  # default qwen_math; with --analyse none, r1 and qwen_math
    tasks: tuple[str, ...] = ("aime24", "math500")  # benchmarks, or .jsonl or .parquet files
    data_dir: Path | None = None  # the folder of aime24.jsonl and so on, in place of the hub
    problem_column: str = "problem"  # of files
    answer_column: str = "answer"  # of files: a right answer, or a list of right ones
    limit: int | None = None  # only the first so many problems of each task
    n: int | None = None  # responses to a problem; default 1, with --analyse 8
    temperature: float | None = None  # default 0, which is greedy; with --analyse 1
    seed: int = 0
    max_response_tokens: int = 3000  # the paper's
    max_prompt_tokens: int = 1096  # the context is the sum: a longer prompt has a shorter response
    output: Path = Path("runs/eval")  # folder of results.json and one .jsonl of responses a score
    tensor_parallel: int = 1  # GPUs that hold one model together; the ranks are a multiple of it
    analyse: bool = False  # base models as in section 2 of the paper: a table and analysis.png
    judge: str | None = None  # for --analyse: URL of an OpenAI-compatible endpoint; may be left out
    judge_model: str | None = None  # its key is the environment's OPENAI_API_KEY
    regrade: Path | None = None  # only grade the responses of this file again, without a model

    @property
    def context(self) -> int:
        return self.max_prompt_tokens + self.max_response_tokens


@dataclass(frozen=True)
class Cell:
    """One number to measure: a model, a template and a task."""

    template: Template
    problems: list[Problem]
    settings: dict  # all that the responses depend on
    file: Path  # of the responses

    @property
    def labels(self) -> dict[str, str]:
        """What each line of the file begins with: `run` stands for all settings."""
        named = {key: self.settings[key] for key in ("model", "template", "task")}
        return named | {"run": sha256(self.settings)[:16]}


def sha256(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def weights_fingerprint(model: str) -> str:
    """The commit of a hub model; of a folder, the sha256 of its weight files."""
    from transformers import AutoConfig

    if not Path(model).is_dir():
        return AutoConfig.from_pretrained(model)._commit_hash
    digest = hashlib.sha256()
    for path in sorted((*Path(model).glob("*.safetensors"), *Path(model).glob("*.bin"))):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("vllm", "vllm-cpu", "torch", "transformers", "math-verify"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # vllm is there under one of two names
            continue
    return found


def prepare(config: Config) -> list[Cell]:
    """All that can go wrong before a model loads. Raises ValueError that says what to do."""
    if not config.model:
        raise ValueError("give --model, the folder or hub name of one or more models")
    if config.n < 1 or config.temperature < 0 or (config.n > 1 and config.temperature == 0):
        raise ValueError(f"n {config.n} at temperature {config.temperature}: n must be 1 or more, "
                         "and above 1 only with a --temperature above 0")
    if config.seed < 0 or min(config.tensor_parallel, config.max_response_tokens,
                              1 if config.limit is None else config.limit) < 1:
        raise ValueError("seed must be 0 or more; limit, tensor_parallel and max_response_tokens "
                         "1 or more")
    if config.judge and not (config.judge_model and config.analyse):
        raise ValueError("--judge needs --judge-model and --analyse")
    if int(os.environ.get("WORLD_SIZE", 1)) % config.tensor_parallel:
        raise ValueError("the number of ranks must be a multiple of --tensor-parallel: start "
                         f"`torchrun --nproc-per-node {config.tensor_parallel} eval.py ...`")
    cells, found = [], versions()
    for model in config.model:
        tokenizer, weights = load_tokenizer(model, config.context), weights_fingerprint(model)
        for template in (find_template(name, tokenizer) for name in config.template):
            for task in config.tasks:
                problems = load_task(task, tokenizer, template, config.context, config.data_dir,
                                     config.problem_column, config.answer_column)[: config.limit]
                settings = {key: getattr(config, key) for key in (
                    "n", "temperature", "seed", "max_response_tokens", "context")} | {
                    "model": model, "template": template.name, "task": task, "weights": weights,
                    "data": sha256([(p.text, p.answers) for p in problems]), "versions": found}
                name = "_".join((model, template.name, task)).strip("/.").replace("/", "-")
                cells.append(Cell(template, problems, settings, config.output / f"{name}.jsonl"))
                saved_rows(cells[-1].file, cells[-1].labels)
    config.output.mkdir(parents=True, exist_ok=True)
    return cells


def measure(config: Config, cells: list[Cell]) -> list[dict]:
    """Settings and scores of each cell."""
    from drgrpo import Sampler  # not at the top: drgrpo imports `evaluate` from here

    results = []
    for model in config.model:
        start_ranks(model)
        sampler = Sampler(model, config.context, config.seed, config.tensor_parallel)
        for cell in [cell for cell in cells if cell.settings["model"] == model]:
            with Grader(cell.template) as grader:
                scores = evaluate(sampler, grader, cell.problems, config.max_response_tokens,
                                  config.n, config.temperature, config.seed, cell.file, cell.labels)
            squeezed = sum(len(p.prompt_ids) > config.max_prompt_tokens for p in cell.problems)
            results.append(cell.settings | cell.labels | {
                "problems": len(cell.problems), "long_prompts": squeezed} | scores)
        sampler.close()
        del sampler  # the next engine needs the memory
    return results


def report(config: Config, cells: list[Cell], results: list[dict]) -> None:
    """Print the tables, and write results.json and, for an analysis, analysis.png."""
    if config.judge:
        for cell, result in zip(cells, results, strict=True):
            result |= judge(saved_rows(cell.file, {}), config.judge, config.judge_model)
    averages = []
    for model, template in product(config.model, config.template) if len(config.tasks) > 1 else ():
        same = [r for r in results if (r["model"], r["template"]) == (model, template)]
        averages.append({"model": model, "template": template, "task": "average",
                         "problems": sum(r["problems"] for r in same)} | average(same))
    print(scores_table(results + averages, config.n))
    if config.analyse:
        print("\n" + analysis_table(results, config.n))
        plot_analysis(results, config.n, config.output / "analysis.png")
    text = json.dumps({"results": results, "averages": averages}, indent=2)
    (config.output / "results.json").write_text(text + "\n")
    print(f"\nresults.json and the responses are in {config.output}")


def main() -> None:
    config = tyro.cli(Config)
    usual = ("none", "r1", "qwen_math") if config.analyse else ("qwen_math",)
    n, temperature = (8, 1.0) if config.analyse else (1, 0.0)
    config = replace(config, template=config.template or usual,
                     n=n if config.n is None else config.n,
                     temperature=temperature if config.temperature is None else config.temperature)
    try:
        if config.regrade:
            if not config.regrade.is_file():
                raise ValueError(f"no file {config.regrade}")
            rows = saved_rows(config.regrade, {})
            print(regrade(rows, config.template[0]))
            write_rows(config.regrade.with_suffix(".regraded.jsonl"), rows)
            return
        cells = prepare(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    results = measure(config, cells)
    if os.environ["RANK"] == "0":
        report(config, cells, results)


if __name__ == "__main__":
    main()
