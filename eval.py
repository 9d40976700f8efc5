"""Measuring: scores with intervals that can be traced and repeated.

    python eval.py --model Qwen/Qwen2.5-Math-1.5B --tasks aime24 amc23 math500 minerva olympiadbench
    python eval.py --model runs/toy/model --template none --tasks runs/toy-base/test.jsonl \\
        --max-prompt-tokens 64 --max-response-tokens 72
    python eval.py --regrade runs/eval/NAME.jsonl                 # without a model

Shapes: P problems, n responses to each.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from math import comb
from pathlib import Path

import numpy as np
import torch.distributed as dist
import tyro
from tqdm import tqdm

from drgrpo import CUDA, DTYPE, Dtype, Rollout, Sampler
from support.checkpoint import weights_fingerprint
from support.data import Problem, derive_seed, load_problems, load_tokenizer
from support.engine import refuse_unusable_gpu
from support.grader import TIMEOUT, Grader, Verdict, check_reward, refuse_broken_reward
from support.metrics import append_rows, markdown, mean, number, read_rows, versions, write_rows
from support.ranks import from_all_ranks, from_rank_0, start_ranks
from templates import Template, find_template, last_boxed

# ------------------------------------------------------------------------------- the benchmarks


@dataclass(frozen=True)
class Task:
    """A benchmark of the paper, and where the hub has it."""

    dataset: str
    subset: str | None = None
    split: str = "train"
    problem_column: str = "problem"
    answer_column: str = "answer"


TASKS = {
    "aime24": Task("HuggingFaceH4/aime_2024"),
    "amc23": Task("AI-MO/aimo-validation-amc"),
    "math500": Task("HuggingFaceH4/MATH-500", split="test"),
    "minerva": Task("math-ai/minervamath", split="test", problem_column="question"),
    "olympiadbench": Task(
        "Hothan/OlympiadBench",
        subset="OE_TO_maths_en_COMP",
        problem_column="question",
        answer_column="final_answer",
    ),
}


def load_task(
    task: str,
    tokenizer,
    template: Template,
    context: int,
    data_dir: Path | None = None,
    problem_column: str = "problem",
    answer_column: str = "answer",
    answer_marker: str | None = None,
    split: str = "test",
    needs_answer: bool = True,
) -> list[Problem]:
    """All problems of a benchmark in TASKS, from data_dir/TASK.jsonl or else from the hub; or of
    the file, or the folder of save_to_disk, that `task` names.

    The columns, the marker and the split (of a folder with several) are those of files. Raises
    ValueError if the task is unknown, if it cannot be read, or if a prompt fills the whole context
    or an answer is missing: a score over fewer problems would not be the benchmark's.
    """
    source = Task(task, None, split, problem_column, answer_column)
    if task in TASKS and data_dir:
        file = str(data_dir / f"{task}.jsonl")
        source = Task(file, None, "train", problem_column, answer_column)
    elif task in TASKS:
        source = TASKS[task]
    elif not Path(task).suffix and not Path(task).is_dir():
        raise ValueError(
            f"unknown task {task!r}: give {', '.join(TASKS)}, or the path of a .jsonl, .json, "
            ".parquet or .arrow file or of a folder that save_to_disk wrote"
        )
    problems, dropped = load_problems(
        source.dataset,
        tokenizer,
        template,
        sys.maxsize,
        source.subset,
        source.split,
        source.problem_column,
        source.answer_column,
        answer_marker=answer_marker,
        needs_answer=needs_answer,
    )
    too_long = [problem for problem in problems if len(problem.prompt_ids) >= context]
    if too_long:
        raise ValueError(
            f"{len(too_long)} prompts of {task} leave no room for a response in {context} tokens: "
            "raise --max-prompt-tokens"
        )
    if dropped["no_answer"]:
        raise ValueError(
            f"{dropped['no_answer']} rows of {task} have no answer: remove them, or give another "
            "--answer-column"
        )
    return problems


# ----------------------------------------------------------------------------------- statistics


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k responses is right, from n of which c are:
    1 - C(n-c, k) / C(n, k) (arXiv 2107.03374). Raises ValueError unless 0 <= c <= n, 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1 - comb(n - c, k) / comb(n, k)


Z = 1.959964  # of a normal variable, 95% lie between -Z and Z


def interval(mean: float, se: float, problems: float) -> tuple[float, float]:
    """95% interval of a mean of values in 0..1 with standard error `se`: Wilson's score interval.

    Its size of the sample is the number of yes-or-no problems that would have this standard
    error, mean (1-mean) / se^2. That is P for values of 0 and 1, and more for means over several
    responses. Where all values are equal (0 of 30 right) it is `problems`; a bootstrap would then
    claim certainty.
    """
    size = mean * (1 - mean) / se**2 if se > 0 else problems
    middle = (mean + Z**2 / (2 * size)) / (1 + Z**2 / size)
    half = Z / (1 + Z**2 / size) * (mean * (1 - mean) / size + Z**2 / (4 * size**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def measure(name: str, values: np.ndarray) -> dict[str, float]:
    """The mean of a value for each problem, (P,), its standard error and its 95% interval.

    Wilson's interval for values in 0..1, else the normal one.
    """
    value, se = float(values.mean()), float(values.std()) / len(values) ** 0.5
    low, high = value - Z * se, value + Z * se
    if values.min() >= 0 and values.max() <= 1:
        low, high = interval(value, se, len(values))
    return {name: value, f"{name}_se": se, f"{name}_low": low, f"{name}_high": high}


def majority(grader: Grader, groups: list[list[dict]]) -> list[float]:
    """Whether each problem's most frequent answer is right; the earlier wins a tie, none is wrong.

    Answers are grouped by what the grader takes as equal to the group's first one. Responses
    without an answer do not vote, and a comparison that fails finds no equality.
    """
    left = [[row for row in rows if row["answer"]] for rows in groups]
    parties: list[list[list[dict]]] = [[] for _ in groups]
    while any(left):  # each round makes one party of each problem, with all comparisons at once
        pairs = []
        for rows in left:
            for row in rows:
                if row["answer"] != rows[0]["answer"]:
                    pairs.append((row["answer"], (rows[0]["answer"],)))
        same = grader.compare(pairs)
        for i, rows in enumerate(left):
            members: list[dict] = []
            others: list[dict] = []
            for row in rows:
                first = rows[0]["answer"]
                if row["answer"] == first or same[row["answer"], (first,)] is True:
                    members.append(row)
                else:
                    others.append(row)
            parties[i].append(members)
            left[i] = others
    winners = [max(found, key=len, default=[]) for found in parties]
    return [float(winner[0]["correct"]) if winner else 0.0 for winner in winners]


def score_rows(rows: list[dict], n: int, grader: Grader) -> dict[str, float | None]:
    """All metrics of P*n responses to P problems, in the order of the problems.

    docs/evaluate.md explains them. None: there is no such response. What needs the grader's verdict
    is left out with a reward function of one's own.
    """
    rewards = np.array([row["reward"] for row in rows], dtype=float).reshape(-1, n)  # (P, n)
    has_verdict = all(row["correct"] is not None for row in rows)
    scores: dict[str, float | None] = {}
    if has_verdict:
        scores |= verdict_scores(rows, n, grader)
    else:
        scores |= measure("reward", rewards.mean(axis=1))
    scores["boxed"] = mean(last_boxed(row["response"]) is not None for row in rows)
    scores["unparsed"] = mean(not row["answer"] for row in rows)
    scores["truncated"] = mean(row["finish_reason"] == "length" for row in rows)
    scores["length"] = mean(row["length"] for row in rows)
    failures = [row["failure"] for row in rows if row["failure"]]
    scores["timeouts"] = failures.count(TIMEOUT)
    scores["errors"] = len(failures) - failures.count(TIMEOUT)
    return scores


def verdict_scores(rows: list[dict], n: int, grader: Grader) -> dict[str, float | None]:
    """The metrics that need to know which responses are right."""
    right = np.array([row["correct"] for row in rows])  # (P*n,)
    scores: dict[str, float | None] = {}
    scores |= measure("accuracy", right.reshape(-1, n).mean(axis=1))
    if n > 1:
        counts = right.reshape(-1, n).sum(axis=1).tolist()
        powers = {2**i for i in range(n.bit_length())}
        for k in sorted(powers | {n}):
            scores |= measure(f"pass@{k}", np.array([pass_at_k(n, c, k) for c in counts]))
        groups = [rows[start : start + n] for start in range(0, len(rows), n)]
        scores |= measure(f"maj@{n}", np.array(majority(grader, groups)))
    lengths = np.array([row["length"] for row in rows])
    for name, some in {"right": lengths[right], "wrong": lengths[~right]}.items():
        scores[f"length_{name}"] = mean(some)
        for q in (10, 50, 90):
            scores[f"length_{name}_p{q}"] = float(np.percentile(some, q)) if some.size else None
    return scores


def average(results: list[dict]) -> dict[str, float]:
    """The unweighted mean over benchmarks of each measure, with its own interval.

    The distances to the lower bounds add up as independent errors do, and so do those to the upper
    bounds (Zou and Donner, Statistics in Medicine 2008).
    """
    scores = {}
    for name in [key.removesuffix("_se") for key in results[0] if key.endswith("_se")]:
        value = np.array([result[name] for result in results])
        middle = float(value.mean())

        def combined(errors: np.ndarray) -> float:
            return float((errors**2).sum() ** 0.5) / len(results)

        scores[name] = middle
        scores[f"{name}_se"] = combined(np.array([result[f"{name}_se"] for result in results]))
        low = np.array([result[f"{name}_low"] for result in results])
        high = np.array([result[f"{name}_high"] for result in results])
        scores[f"{name}_low"] = middle - combined(value - low)
        scores[f"{name}_high"] = middle + combined(high - value)
    return scores


# ------------------------------------------------------------------------------------- evaluate

# Of each engine between two writes to disk. At the end of each a GPU waits for a few long ones
RESPONSES_AT_ONCE = 4096 if CUDA else 256


def evaluate(
    sampler: Sampler,
    grader: Grader,
    problems: list[Problem],
    max_tokens: int,
    n: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    file: Path | None = None,
    labels: dict[str, str] | None = None,
) -> dict[str, float | None]:
    """Sample n responses to each problem from an engine that is awake, grade and score them.

    Each rank takes a share of the problems; all get the scores of all. Unlike in training, a right
    answer in a truncated response counts, as in the paper. With `file`, every response is a line
    of it, beginning with `labels`, and what is there already under the same labels is not sampled
    again; raises ValueError under other labels.
    """
    labels = labels or {}
    is_rank_0, engines = dist.get_rank() == 0, dist.get_world_size() // sampler.tensor_parallel
    step = max(1, RESPONSES_AT_ONCE * engines // n)  # problems of a chunk
    rows: list[dict] = []
    if file and is_rank_0:
        rows = saved_rows(file, labels)
        if len(rows) < len(problems) * n:  # begin a new chunk, so that it is the unbroken run's
            whole_chunks = len(rows) // (step * n)
            rows = rows[: whole_chunks * step * n]
        write_rows(file, rows)
    done = from_rank_0(len(rows))
    bar = tqdm(total=len(problems) * n, initial=done, unit="response", disable=not is_rank_0)
    for start in range(done // n, len(problems), step):
        chunk = range(start, min(start + step, len(problems)))
        mine = chunk[dist.get_rank() // sampler.tensor_parallel :: engines]
        new = respond(
            sampler,
            grader,
            problems,
            mine,
            max_tokens,
            n,
            temperature,
            seed,
            answered=lambda: bar.update(n * engines),  # about as many as this rank's
        )
        everyone = from_all_ranks(new)
        parts = everyone[:: sampler.tensor_parallel]  # ranks that share an engine say the same
        refuse_broken_reward([verdict for part in parts for _, verdict in part])
        found = [labels | row for part in parts for row, _ in part]
        found.sort(key=lambda row: (row["problem"], row["sample"]))
        if is_rank_0:
            rows += found
            show_progress(bar, rows)
            if file:
                append_rows(file, found)
    bar.close()
    return from_rank_0(score_rows(rows, n, grader) if is_rank_0 else None)


def show_progress(bar: tqdm, rows: list[dict]) -> None:
    """How many responses there are so far, and how good they are."""
    bar.n = len(rows)
    name = "reward" if rows[0]["correct"] is None else "accuracy"
    key = "reward" if name == "reward" else "correct"
    bar.set_postfix({name: f"{np.mean([row[key] for row in rows]):.3f}"})


def respond(
    sampler: Sampler,
    grader: Grader,
    problems: list[Problem],
    chosen: range,
    max_tokens: int,
    n: int,
    temperature: float,
    seed: int,
    answered: Callable[[], object],
) -> list[tuple[dict, Verdict]]:
    """This rank's responses to the chosen problems: a row and a verdict of each.

    `answered()` is called for each problem whose responses are there.
    """
    mine = [problems[index] for index in chosen]
    seeds = [derive_seed("evaluate", seed, index) for index in chosen]

    def grade_early(place: int, group: list[Rollout]) -> None:
        texts, problem = [rollout.text for rollout in group], mine[place]
        grader.start(texts, [problem.answers] * len(group), [problem.row] * len(group))
        answered()

    stop = grader.template.stop
    groups = sampler.generate(mine, seeds, n, max_tokens, temperature, stop, grade_early)
    verdicts = iter(
        grader.verdicts(
            [rollout.text for group in groups for rollout in group],
            [problem.answers for problem in mine for _ in range(n)],
            [problem.row for problem in mine for _ in range(n)],
        )
    )
    rows: list[tuple[dict, Verdict]] = []
    for index, problem, problem_seed, group in zip(chosen, mine, seeds, groups, strict=True):
        for sample, rollout in enumerate(group):
            verdict = next(verdicts)
            row = {
                "problem": index,
                "sample": sample,
                "seed": problem_seed,
                "prompt": problem.prompt,
                "response": rollout.text,
                "length": len(rollout.response_ids),
                "finish_reason": rollout.finish_reason,
                "answers": problem.answers,
                "answer": grader.template.extract(rollout.text),
                "reward": verdict.reward,
                "correct": verdict.correct,
                "failure": verdict.failure,
            }
            rows.append((row, verdict))
    return rows


def saved_rows(file: Path, labels: dict[str, str]) -> list[dict]:
    """The whole lines of a file, none if there is no file; ValueError if they have other labels."""
    rows = read_rows(file)
    for row in rows:
        if any(row.get(key) != value for key, value in labels.items()):
            raise ValueError(
                f"{file} holds responses under other settings, versions, weights or data: remove "
                "it, or choose another --output"
            )
    return rows


# ---------------------------------------------------------------------------- tables and regrade


def with_interval(row: dict, name: str) -> str:
    if name not in row:
        return ""
    return (
        f"{row[name]:.3f} ± {row[f'{name}_se']:.3f} "
        f"[{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"
    )


def scores_table(rows: list[dict], n: int) -> str:
    """Markdown; each measure as value ± standard error [95% interval]."""
    measures = {"accuracy": "pass@1" if n == 1 else f"mean@{n}"}
    if n > 1:
        measures |= {f"pass@{n}": f"pass@{n}", f"maj@{n}": f"maj@{n}"}
    if "reward" in rows[0]:  # a reward function of one's own
        measures = {"reward": "reward"}
    head = ["model", "template", "task", "problems", *measures.values(), "boxed", "unparsed"]
    head += ["truncated", "length right/wrong", "timeouts/errors"]
    table = []
    for row in rows:
        cells = [row["model"], row["template"], row["task"], str(row["problems"])]
        cells += [with_interval(row, name) for name in measures]
        cells += [number(row.get(key)) for key in ("boxed", "unparsed", "truncated")]
        cells.append("/".join(number(row.get(f"length_{key}"), 0) for key in ("right", "wrong")))
        cells.append(f"{row['timeouts']}/{row['errors']}" if "errors" in row else "")
        table.append(cells)
    return markdown(head, table)


def regrade(rows: list[dict], default: str) -> str:
    """Grade saved responses again: sets `reward`, `correct`, `answer` and `failure` of the rows,
    and returns a Markdown table of what changed.

    Rows need `response` and `answers`; the template is their `template`, or else `default`.
    Raises ValueError if a column is missing.
    """
    missing = [key for key in ("response", "answers") if any(key not in row for row in rows)]
    if missing:
        raise ValueError(f"the rows have no {', '.join(missing)}")
    table = []
    for name in dict.fromkeys(row.get("template", default) for row in rows):
        some = [row for row in rows if row.get("template", default) == name]
        before, start = [row.get("reward", 0.0) for row in some], time.perf_counter()
        with Grader(name) as grader:
            responses, answers = [r["response"] for r in some], [r["answers"] for r in some]
            verdicts = grader.verdicts(responses, answers)
        rate = len(some) / (time.perf_counter() - start)
        for row, verdict in zip(some, verdicts, strict=True):
            row["answer"] = grader.template.extract(row["response"])
            row["reward"], row["correct"] = verdict.reward, verdict.correct
            row["failure"] = verdict.failure
        after = [row["reward"] for row in some]
        better = sum(new > old for new, old in zip(after, before, strict=True))
        worse = sum(new < old for new, old in zip(after, before, strict=True))
        cells = [name, str(len(some)), number(mean(before)), number(mean(after)), str(better)]
        cells += [str(worse), f"{grader.timeouts}/{grader.errors}", number(rate, 0)]
        table.append(cells)
    head = ["template", "responses", "saved accuracy", "accuracy", "now right", "now wrong"]
    return markdown([*head, "timeouts/errors", "responses/s"], table)


# ----------------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class EvalConfig:
    """Score models on benchmarks. Where it stands already, OUTPUT/*.jsonl is not sampled again."""

    model: tuple[str, ...] = ()  # folders or hub names
    template: tuple[str, ...] = ("qwen_math",)
    tasks: tuple[str, ...] = ("aime24", "math500")  # benchmarks, files, or save_to_disk folders
    data_dir: Path | None = None  # the folder of aime24.jsonl and so on, in place of the hub
    problem_column: str = "problem"  # of files
    answer_column: str = "answer"  # of files: a right answer, or a list of right ones
    answer_marker: str | None = None  # of files: the answer is what follows the last of these
    split: str = "test"  # of a save_to_disk folder with several splits
    limit: int | None = None  # only the first so many problems of each task
    n: int = 1  # responses to a problem
    temperature: float = 0.0  # 0 is greedy
    seed: int = 0
    reward: str = "math"  # or FILE.py:FUNCTION, called as FUNCTION(response, row) -> float
    max_response_tokens: int = 3000  # the paper's
    max_prompt_tokens: int = 1096  # the context is the sum: a longer prompt has a shorter response
    dtype: Dtype = DTYPE  # of computing
    output: Path = Path("runs/eval")  # folder of results.json and one .jsonl of responses a score
    tensor_parallel: int = 1  # GPUs that hold one model together; the ranks are a multiple of it
    regrade: Path | None = None  # only grade the responses of this file again, without a model

    @property
    def context(self) -> int:
        return self.max_prompt_tokens + self.max_response_tokens


@dataclass(frozen=True)
class Cell:
    """One number to measure: a model, a template and a task."""

    checkpoint: str  # the model's folder as it was at the start: a link may be switched meanwhile
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


def refuse_wrong_settings(config: EvalConfig) -> None:
    """Raises ValueError that says what to do."""
    if not config.model:
        raise ValueError("give --model, the folder or hub name of one or more models")
    if config.n < 1 or config.temperature < 0 or (config.n > 1 and config.temperature == 0):
        raise ValueError(
            f"n {config.n} at temperature {config.temperature}: n must be 1 or more, and above 1 "
            "only with a --temperature above 0"
        )
    positive = [config.tensor_parallel, config.max_response_tokens]
    if config.limit is not None:
        positive.append(config.limit)
    if config.seed < 0 or min(positive) < 1:
        raise ValueError(
            "seed must be 0 or more; limit, tensor_parallel and max_response_tokens 1 or more"
        )
    if int(os.environ.get("WORLD_SIZE", 1)) % config.tensor_parallel:
        raise ValueError(
            "the number of ranks must be a multiple of --tensor-parallel: start "
            f"`torchrun --nproc-per-node {config.tensor_parallel} eval.py ...`"
        )


def prepare_cells(config: EvalConfig) -> list[Cell]:
    """All that can go wrong before a model loads. Raises ValueError that says what to do."""
    refuse_unusable_gpu()
    refuse_wrong_settings(config)
    cells = []
    shared: dict = {"versions": versions(), "reward_function": config.reward}
    for key in ("n", "temperature", "seed", "max_response_tokens", "context", "dtype"):
        shared[key] = getattr(config, key)
    for model in config.model:
        checkpoint = str(Path(model).resolve()) if Path(model).is_dir() else model
        tokenizer = load_tokenizer(checkpoint, config.context)
        weights = weights_fingerprint(checkpoint)
        for template_name, task in product(config.template, config.tasks):
            template = find_template(template_name, tokenizer)
            problems = load_task(
                task,
                tokenizer,
                template,
                config.context,
                config.data_dir,
                config.problem_column,
                config.answer_column,
                config.answer_marker,
                config.split,
                needs_answer=config.reward == "math",
            )[: config.limit]
            data = sha256([(problem.text, problem.answers) for problem in problems])
            settings = shared | {"model": model, "template": template_name, "task": task}
            settings |= {"weights": weights, "data": data}
            name = "_".join((model, template_name, task)).strip("/.").replace("/", "-")
            file = config.output / f"{name}.jsonl"
            cells.append(Cell(checkpoint, template, problems, settings, file))
            saved_rows(file, cells[-1].labels)
    check_reward(config.reward, cells[0].problems[0].row)
    config.output.mkdir(parents=True, exist_ok=True)
    return cells


def measure_cells(config: EvalConfig, cells: list[Cell]) -> list[dict]:
    """Settings and scores of each cell; the ranks end with it."""
    results = []
    for checkpoint in dict.fromkeys(cell.checkpoint for cell in cells):
        start_ranks(checkpoint)
        sampler = Sampler(
            checkpoint, config.context, config.seed, config.tensor_parallel, dtype=config.dtype
        )
        for cell in [cell for cell in cells if cell.checkpoint == checkpoint]:
            with Grader(cell.template, reward=config.reward) as grader:
                scores = evaluate(
                    sampler,
                    grader,
                    cell.problems,
                    config.max_response_tokens,
                    config.n,
                    config.temperature,
                    config.seed,
                    cell.file,
                    cell.labels,
                )
            long = [p for p in cell.problems if len(p.prompt_ids) > config.max_prompt_tokens]
            sizes = {"problems": len(cell.problems), "long_prompts": len(long)}
            results.append(cell.settings | cell.labels | sizes | scores)
        sampler.close()
        del sampler  # the next engine needs the memory
    return results


def report(config: EvalConfig, results: list[dict]) -> None:
    """Print the table, and write results.json."""
    averages = []
    for model, template in product(config.model, config.template):
        same = [r for r in results if (r["model"], r["template"]) == (model, template)]
        if len(same) > 1:
            total = sum(result["problems"] for result in same)
            labels = {"model": model, "template": template, "task": "average", "problems": total}
            averages.append(labels | average(same))
    print(scores_table(results + averages, config.n))
    text = json.dumps({"results": results, "averages": averages}, indent=2)
    (config.output / "results.json").write_text(text + "\n")
    print(f"\nresults.json and the responses are in {config.output}")


def regrade_file(file: Path, template: str) -> None:
    """Grade the responses of a file again, print what changed, write them beside it."""
    if not file.is_file():
        raise ValueError(f"no file {file}")
    rows = read_rows(file)
    print(regrade(rows, template))
    write_rows(file.with_suffix(".regraded.jsonl"), rows)


def main() -> None:
    config = tyro.cli(EvalConfig, description=__doc__)
    try:
        if config.regrade:
            regrade_file(config.regrade, config.template[0])
            return
        cells = prepare_cells(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    results = measure_cells(config, cells)
    if os.environ["RANK"] == "0":
        report(config, results)


if __name__ == "__main__":
    main()
