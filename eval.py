"""Measuring: scores of a model on benchmarks, with intervals.

    python eval.py --model Qwen/Qwen2.5-Math-1.5B --tasks aime24 amc23 math500 minerva olympiadbench
    python eval.py --model runs/toy/model --template none --tasks runs/toy-base/test.jsonl \\
        --max-prompt-tokens 64 --max-response-tokens 72
    python eval.py --regrade runs/eval/NAME/responses.jsonl      # without a model

A command reads no results of an earlier one, and writes its two files anew.

Shapes: P problems, n responses to each, in groups laid end to end.
"""

import os
import sys
from dataclasses import dataclass
from math import comb
from pathlib import Path

import numpy as np
import torch.distributed as dist
import tyro

from drgrpo import Rollout, Sampler
from support import records
from support.data import Problem, derive_seed, load_problems, load_tokenizer
from support.grader import Grader, check_reward, refuse_broken_reward
from support.records import mean, number
from support.run import check_compiler, end_ranks, from_all_ranks, start_ranks
from templates import TEMPLATES

# ---------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class EvalConfig:
    """Score one model on benchmarks. The defaults are the paper's."""

    model: str = ""  # folder or hub name
    template: str = "qwen_math"
    tasks: tuple[str, ...] = ("aime24", "math500")  # benchmarks, files, or save_to_disk folders
    problem_column: str = "problem"  # of files
    answer_column: str = "answer"  # of files: a right answer, or a list of right ones
    answer_marker: str | None = None  # the answer is the text after the last of these
    split: str = "test"  # of a save_to_disk folder with several splits
    limit: int | None = None  # only the first so many problems of each task
    n: int = 1  # responses to a problem
    temperature: float = 0.0  # 0 is greedy
    seed: int = 0
    reward: str = "math"  # or FILE.py:FUNCTION, called as FUNCTION(response, row) -> float
    grader_workers: int = 2  # processes per rank that grade
    grader_timeout: float = 5.0  # seconds per grading; after that the response is in no score
    max_response_tokens: int = 3000  # the paper's
    max_prompt_tokens: int = 1096  # the context is the sum: a longer prompt has a shorter response
    output: str | None = None  # of results.json and responses.jsonl; None: runs/eval/MODEL
    regrade: str | None = None  # only grade the responses of this file again, without a model

    def __post_init__(self):
        """Raises ValueError that says what to do."""
        if not self.model and not self.regrade:
            raise ValueError("give --model, the folder or hub name of a model")
        if self.template not in TEMPLATES:
            raise ValueError(f"template {self.template!r} must be one of {', '.join(TEMPLATES)}")
        if self.n < 1 or self.temperature < 0 or (self.n > 1 and self.temperature == 0):
            raise ValueError("n must be 1 or more, and above 1 only with a --temperature above 0")
        smallest = min(self.max_response_tokens, 1 if self.limit is None else self.limit)
        if self.seed < 0 or smallest < 1:
            raise ValueError("seed must be 0 or more; limit and max_response_tokens 1 or more")

    @property
    def context(self) -> int:
        return self.max_prompt_tokens + self.max_response_tokens

    @property
    def folder(self) -> Path:
        return Path(self.output or f"runs/eval/{self.model.strip('/.').replace('/', '-')}")


# ------------------------------------------------------------------------------- the benchmarks


@dataclass(frozen=True)
class Task:
    """A benchmark of the paper, and where the hub has it."""

    source: str
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
        "Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", "question", "final_answer"
    ),
}


def load_task(task: str, tokenizer, config: EvalConfig) -> list[Problem]:
    """All problems of a benchmark in TASKS, or of the file or save_to_disk folder `task` names.

    Raises ValueError if it is unknown or cannot be read, or if a prompt fills the whole context or
    an answer is missing: a score over fewer problems would not be the benchmark's.
    """
    if task in TASKS:
        where = TASKS[task]
    elif Path(task).suffix or Path(task).is_dir():
        where = Task(task, None, config.split, config.problem_column, config.answer_column)
    else:
        raise ValueError(f"unknown task {task!r}: give {', '.join(TASKS)}, or a file or folder")
    problems, dropped = load_problems(
        tokenizer=tokenizer,
        template=TEMPLATES[config.template],
        max_prompt_tokens=config.context - 1,
        answer_marker=config.answer_marker,
        needs_answer=config.reward == "math",
        **vars(where),
    )
    if any(dropped.values()):
        raise ValueError(
            f"{task} is scored as a whole or not at all, and rows of it cannot be used: {dropped}. "
            "If prompts are too long, raise --max-prompt-tokens; if answers are missing, give "
            "another --answer-column, or remove these rows"
        )
    return problems[: config.limit]


# ----------------------------------------------------------------------------------- statistics


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k responses is right, from n of which c are:
    1 - C(n-c, k) / C(n, k) (arXiv 2107.03374). Raises ValueError unless 0 <= c <= n, 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1 - comb(n - c, k) / comb(n, k)


Scores = dict[str, float | None]
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


def measure(name: str, values: list[float]) -> Scores:
    """The mean of a value per problem, its standard error, 95% interval, and number of problems.

    The interval is Wilson's for values in 0..1, else the normal one.
    """
    if not values:
        return {name: None, f"{name}_problems": 0}
    value, se = float(np.mean(values)), float(np.std(values)) / len(values) ** 0.5
    low, high = value - Z * se, value + Z * se
    if min(values) >= 0 and max(values) <= 1:
        low, high = interval(value, se, len(values))
    bounds = {f"{name}_se": se, f"{name}_low": low, f"{name}_high": high}
    return {name: value, **bounds, f"{name}_problems": len(values)}


def majority(group: list[Rollout], grader: Grader) -> float | None:
    """Whether the most frequent answer to a problem is right, 1.0 or 0.0; the earlier wins a tie.

    Answers are counted together if the grader takes them as equal to the first of them; a
    comparison that fails finds no equality. Responses without an answer do not vote; if there is no
    vote, the result is 0. None: the winner could not be graded.
    """
    answers = [(grader.template.extract(r.text), r) for r in group]
    left = [(answer, r) for answer, r in answers if answer]
    winner: list[Rollout] = []
    while left:
        first = left[0][0]
        same = grader.compare((answer, (first,)) for answer, _ in left if answer != first)
        party, others = [], []
        for answer, rollout in left:
            if answer == first or same[answer, (first,)] is True:
                party.append(rollout)
            else:
                others.append((answer, rollout))
        winner, left = max(winner, party, key=len), others
    if not winner:
        return 0.0
    known = [float(rollout.correct) for rollout in winner if rollout.correct is not None]
    return known[0] if known else None


def scores_of(rollouts: list[Rollout], n: int, grader: Grader) -> Scores:
    """All scores of P*n responses, as docs/evaluate.md explains them. None: there is no such one.

    A response whose grading failed is unknown, not wrong. It is in no score of right and wrong, and
    `graded` says how many are.
    """
    groups = [rollouts[start : start + n] for start in range(0, len(rollouts), n)]
    known = [[r for r in group if r.failure is None] for group in groups]
    scores: Scores = {"responses": len(rollouts), "graded": sum(len(g) for g in known)}
    scores |= records.summarize(rollouts, 1)
    scores["unparsed"] = mean(not grader.template.extract(r.text) for r in rollouts)
    if grader.reward != "math":  # a reward of one's own says nothing of right and wrong
        rewards = [[r.reward for r in group] for group in known if group]
        return scores | measure("reward", [sum(group) / len(group) for group in rewards])
    rights = [[bool(r.correct) for r in group] for group in known if group]
    scores |= measure("accuracy", [sum(group) / len(group) for group in rights])
    scores["right"] = sum(sum(group) for group in rights)
    if n > 1:
        for k in sorted({2**i for i in range(n.bit_length())} | {n}):
            enough = [group for group in rights if len(group) >= k]
            scores |= measure(f"pass@{k}", [pass_at_k(len(g), sum(g), k) for g in enough])
        votes = [majority(group, grader) for group in groups]
        scores |= measure(f"maj@{n}", [vote for vote in votes if vote is not None])
    return scores


def average(results: list[dict]) -> Scores:
    """The unweighted mean over benchmarks of each score that has a standard error, and its own:
    benchmarks are independent, so squares of errors add up."""
    scores: Scores = {}
    for key in results[0]:
        if key.endswith("_se") and all(result.get(key) is not None for result in results):
            name = key.removesuffix("_se")
            scores[name] = mean(result[name] for result in results)
            scores[key] = sum(result[key] ** 2 for result in results) ** 0.5 / len(results)
    return scores


# ------------------------------------------------------------------------------------- evaluate


def evaluate(
    sampler: Sampler, grader: Grader, problems: list[Problem], config: EvalConfig
) -> list[Rollout]:
    """n graded responses to each problem, in the order of the problems; all ranks get all.

    Each rank takes a share of the problems. Unlike in training, a truncated response has the reward
    of its text: a right answer counts, as in the paper. Raises RuntimeError if most gradings fail.
    """
    indices = range(dist.get_rank(), len(problems), dist.get_world_size())
    mine = [problems[index] for index in indices]
    seeds = [derive_seed("evaluate", config.seed, index) for index in indices]
    limit, stop = config.max_response_tokens, grader.template.stop
    groups = sampler.generate(mine, seeds, config.n, limit, config.temperature, stop)
    records.status("grading")
    rollouts = [r for group in groups for r in group]
    verdicts = grader.verdicts(
        [r.text for r in rollouts],
        [mine[r.problem].answers for r in rollouts],
        [mine[r.problem].row for r in rollouts],
    )
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        rollout.problem = indices[rollout.problem]
        rollout.reward = verdict.reward
        rollout.correct, rollout.failure = verdict.correct, verdict.failure
        rollout.sampler_logprobs = []  # only learning needs them
    everyone = from_all_ranks((rollouts, verdicts))
    refuse_broken_reward([verdict for _, part in everyone for verdict in part])
    rollouts = [r for part, _ in everyone for r in part]
    return sorted(rollouts, key=lambda r: r.problem)  # keeps the order within a problem


def response_rows(
    task: str, grader: Grader, problems: list[Problem], rollouts: list[Rollout]
) -> list[dict]:
    """Rows of responses.jsonl: those of a run's samples.jsonl, and where they come from."""
    rows = []
    for rollout, row in zip(rollouts, records.sample_rows(0, problems, rollouts), strict=True):
        del row["step"], row["advantage"]  # there are none
        labels = {"task": task, "template": grader.template.name, "problem": rollout.problem}
        rows.append(labels | row | {"answer": grader.template.extract(rollout.text)})
    return rows


# ---------------------------------------------------------------------------- tables and regrade


def with_error(row: dict, name: str) -> str:
    """Value ± standard error [95% interval]; an average has no interval."""
    if row.get(name) is None:
        return ""
    text = f"{row[name]:.3f} ± {row[f'{name}_se']:.3f}"
    if f"{name}_low" not in row:
        return text
    return f"{text} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"


def scores_table(rows: list[dict], n: int) -> str:
    """Markdown, and below it a line for each task in which gradings failed."""
    measures = {"accuracy": "pass@1" if n == 1 else f"mean@{n}"}
    if n > 1:
        measures |= {f"pass@{n}": f"pass@{n}", f"maj@{n}": f"maj@{n}"}
    if "accuracy" not in rows[0]:  # a reward function of one's own
        measures = {"reward": "reward"}
    table, notes = [], []
    for row in rows:
        graded = f"{row['graded']} of {row['responses']}" if "graded" in row else ""
        cells = [row["task"], str(row["problems"]), graded]
        cells += [with_error(row, name) for name in measures]
        cells += [number(row.get(key)) for key in ("unparsed", "truncated")]
        cells.append("/".join(number(row.get(f"length_{key}"), 0) for key in ("right", "wrong")))
        table.append(cells)
        if graded and row["graded"] < row["responses"]:
            note = (
                f"{row['task']}: gradings that failed: {row['timeouts']} timeouts, {row['errors']} "
                "errors. These responses are unknown, not wrong, and in no score of right and "
                "wrong. Read `failure` in responses.jsonl."
            )
            if "right" in row:
                wrong = row["right"] / row["responses"]
                note += f" Counted as wrong, they make accuracy {wrong:.3f}."
            notes.append(note)
    head = ["task", "problems", "graded", *measures.values(), "unparsed", "truncated"]
    return "\n".join([records.markdown([*head, "length right/wrong"], table), *notes])


def regrade(rows: list[dict], template: str) -> str:
    """Grade saved responses again: sets `reward`, `correct`, `answer` and `failure` of the rows.

    Returns a Markdown table of what changed. Rows need `response` and `answers`; their template is
    their `template`, or else the one given. Raises ValueError if a column is missing.
    """
    if not rows:
        raise ValueError("there is no response to grade")
    missing = [key for key in ("response", "answers") if any(key not in row for row in rows)]
    if missing:
        raise ValueError(f"the rows have no {', '.join(missing)}")
    table = []
    for name in dict.fromkeys(row.get("template", template) for row in rows):
        some = [row for row in rows if row.get("template", template) == name]
        before = [row.get("correct") for row in some]
        with Grader(name) as grader:
            verdicts = grader.verdicts([r["response"] for r in some], [r["answers"] for r in some])
        for row, verdict in zip(some, verdicts, strict=True):
            row["reward"] = None if verdict.failure else verdict.reward
            row["correct"], row["failure"] = verdict.correct, verdict.failure
            row["answer"] = grader.template.extract(row["response"])
        changes = [(old, row["correct"]) for old, row in zip(before, some, strict=True)]
        counts = [len(some), before.count(True), sum(new is True for _, new in changes)]
        counts += [changes.count((False, True)), changes.count((True, False))]
        counts += [grader.timeouts, grader.errors]
        table.append([name, *map(str, counts)])
    head = ["template", "responses", "right before", "right now", "became right", "became wrong"]
    return records.markdown([*head, "timeouts", "errors"], table)


# ----------------------------------------------------------------------------------- the command


def prepare(config: EvalConfig) -> tuple[str, dict[str, list[Problem]]]:
    """All that can go wrong before a model loads. Returns the model and the problems of each task.

    runs/NAME/model is a link, which a run may switch meanwhile: the model is the folder behind it.
    Raises ValueError that says what to do.
    """
    check_compiler()
    is_folder = Path(config.model).is_dir()
    model = str(Path(config.model).resolve()) if is_folder else config.model
    tokenizer = load_tokenizer(model, config.context)
    tasks = {task: load_task(task, tokenizer, config) for task in config.tasks}
    check_reward(config.reward, [problems[0].row for problems in tasks.values()])
    return model, tasks


def score(config: EvalConfig, model: str, tasks: dict[str, list[Problem]]) -> list[dict]:
    """The scores of each task, on rank 0, which writes the responses; the ranks end with it."""
    start_ranks()
    folder = config.folder
    if dist.get_rank() == 0:  # what an earlier command left would stand beside other responses
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").unlink(missing_ok=True)
        (folder / "responses.jsonl").write_text("")
    records.say(f"loading {config.model} and starting vLLM")
    sampler = Sampler(model, config.context, config.seed)
    results = []
    workers, timeout = config.grader_workers, config.grader_timeout
    with Grader(config.template, workers, timeout, config.reward) as grader:
        for task, problems in tasks.items():
            records.say(f"{task}: {config.n} responses to each of {len(problems)} problems")
            rollouts = evaluate(sampler, grader, problems, config)
            if dist.get_rank() == 0:
                rows = response_rows(task, grader, problems, rollouts)
                records.append_rows(folder / "responses.jsonl", rows)
                scores = scores_of(rollouts, config.n, grader)
                results.append({"task": task, "problems": len(problems)} | scores)
    sampler.close()
    end_ranks()
    return results


def report(config: EvalConfig, model: str, results: list[dict]) -> None:
    """Print the table, and write results.json."""
    rows = list(results)
    if len(results) > 1:
        total = sum(result["problems"] for result in results)
        rows.append({"task": "average", "problems": total} | average(results))
    print(f"\n{config.model}, template {config.template}, temperature {config.temperature:g}\n")
    print(scores_table(rows, config.n))
    facts = {"settings": vars(config), "folder": model, "versions": records.versions()}
    records.write_json(config.folder / "results.json", facts | {"results": rows})
    print(f"\nresults.json and responses.jsonl are in {config.folder}")


def main() -> None:
    try:
        config = tyro.cli(EvalConfig, description=__doc__)
        if config.regrade:
            file = Path(config.regrade)
            rows = records.read_rows(file)
            print(regrade(rows, config.template))
            new = file.with_suffix(".regraded.jsonl")
            new.write_text("")
            records.append_rows(new, rows)
            return
        model, tasks = prepare(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    results = score(config, model, tasks)
    if os.environ["RANK"] == "0":
        report(config, model, results)


if __name__ == "__main__":
    main()
