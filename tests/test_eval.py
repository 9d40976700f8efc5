"""Facts about scores: their intervals, their traces, and what is refused."""

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

import eval as evaluation
from eval import (
    TASKS,
    EvalConfig,
    Z,
    average,
    evaluate,
    interval,
    load_task,
    majority,
    measure_cells,
    pass_at_k,
    prepare_cells,
    regrade,
    report,
    saved_rows,
    scores_table,
)
from support.data import Problem, load_tokenizer
from support.grader import Grader
from support.metrics import append_rows
from templates import TEMPLATES
from tests.helpers import DATA, LONG, ROOT, TOY_EVAL, StoredSampler, boxed, launch, write_jsonl


def evaluate_stored(grader, responses: list[list[str]], gold="1/2", file=None, **settings):
    problems = [Problem(str(i), [1], [gold]) for i in range(len(responses))]
    sampler = StoredSampler({str(i): texts for i, texts in enumerate(responses)}, **settings)
    return evaluate(sampler, grader, problems, 9, n=len(responses[0]), file=file)


# ------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("n, c", [(n, c) for n in range(1, 7) for c in range(n + 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_response(n, c):
    for k in range(1, n + 1):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]))
    for wrong in [(n, c, 0), (n, c, n + 1), (n, n + 1, 1), (n, -1, 1)]:
        with pytest.raises(ValueError, match="needs 0 <= c <= n"):
            pass_at_k(*wrong)


@pytest.mark.parametrize(
    "problems, a, b, n",
    [(30, 1, 20, 1), (30, 4, 6, 1), (30, 0.3, 0.4, 8), (83, 0.5, 0.7, 1), (272, 0.2, 0.8, 4)],
)
def test_intervals_hold_the_true_accuracy_in_95_of_100_benchmarks(problems, a, b, n):
    """Each problem has its own chance of a right response, from a Beta(a, b): mean a/(a+b)."""
    rng = np.random.default_rng(0)
    chances = rng.beta(a, b, (4000, problems))
    values = rng.binomial(n, chances) / n  # (4000, P)
    means, errors = values.mean(axis=1), values.std(axis=1) / problems**0.5
    bounds = [interval(m, e, problems) for m, e in zip(means, errors)]
    covered = np.mean([low <= a / (a + b) <= high for low, high in bounds])
    assert 0.925 <= covered <= 0.98
    assert (errors**2).mean() ** 0.5 == pytest.approx(means.std(), rel=0.06)


def test_an_interval_never_claims_certainty_and_stays_within_0_and_1():
    assert interval(0.0, 0.0, 30) == (0.0, pytest.approx(0.1135, abs=1e-4))
    assert interval(1.0, 0.0, 30) == (pytest.approx(0.8865, abs=1e-4), 1.0)
    se = (0.4 * 0.6 / 30) ** 0.5
    assert interval(0.4, se, 30) == pytest.approx((0.2459, 0.5768), abs=1e-3)


def test_the_average_over_benchmarks_is_unweighted_and_its_interval_holds():
    rng, truth, covered, errors = np.random.default_rng(1), (0.1 + 0.7) / 2, [], []
    for _ in range(2000):
        results = []
        for chance, size in ((0.1, 30), (0.7, 500)):
            share = rng.binomial(size, chance) / size
            se = (share * (1 - share) / size) ** 0.5
            low, high = interval(share, se, size)
            results.append(
                {"accuracy": share, "accuracy_se": se, "accuracy_low": low, "accuracy_high": high}
            )
        scores = average(results)
        assert scores["accuracy"] == pytest.approx(np.mean([r["accuracy"] for r in results]))
        errors.append((scores["accuracy"] - truth) / scores["accuracy_se"])
        covered.append(scores["accuracy_low"] <= truth <= scores["accuracy_high"])
    assert 0.925 <= np.mean(covered) <= 0.98
    assert np.median(np.abs(errors)) == pytest.approx(0.674, rel=0.15)  # of a normal variable


def test_the_majority_is_found_by_equivalence_not_by_string(grader):
    def vote(*texts, gold="1/2"):
        verdicts = grader.verdicts([boxed(text) for text in texts], [gold] * len(texts))
        rows = [
            {"answer": text or None, "correct": verdict.correct}
            for text, verdict in zip(texts, verdicts, strict=True)
        ]
        return majority(grader, [rows])[0]

    assert vote("3", "1/2", "3", "\\frac{1}{2}", "0.5") == 1.0
    assert vote("3", "1/2", "3", "7", "0.5", "3") == 0.0
    assert vote("1/2", "3") == 1.0 and vote("3", "1/2") == 0.0, "the earlier wins a tie"
    assert vote("", "", "0.5") == 1.0, "who says nothing does not vote"
    assert vote("", "") == 0.0


# ------------------------------------------------------------------------------ evaluate


def test_scores_are_those_of_a_count_by_hand(ranks, grader):
    right, wrong = boxed("0.5"), boxed("3")
    scores = evaluate_stored(
        grader,
        [
            [right, right, wrong, "wait, let me recheck. " + right],
            [wrong, "no box", "", wrong],
            [wrong, "Let me Double-Check: " + right, wrong, "\\boxed{1/2"],
        ],
    )
    assert scores["accuracy"] == pytest.approx((3 / 4 + 0 + 1 / 4) / 3)
    assert scores["accuracy_se"] == pytest.approx(np.std([0.75, 0, 0.25]) / 3**0.5)
    assert [scores[f"pass@{k}"] for k in (1, 2, 4)] == pytest.approx(
        [1 / 3, (1 + 0 + 1 / 2) / 3, 2 / 3]
    )
    assert scores["maj@4"] == pytest.approx(1 / 3)
    assert (scores["boxed"], scores["unparsed"], scores["truncated"]) == (9 / 12, 3 / 12, 0)
    lengths = [len(right)] * 2 + [22 + len(right), 21 + len(right)]
    assert scores["length_right"] == np.mean(lengths)
    assert scores["length_right_p50"] == np.median(lengths)


def test_a_right_answer_in_a_truncated_response_counts(ranks, grader):
    scores = evaluate_stored(grader, [[boxed("0.5")]], finish_reason="length")
    assert (scores["accuracy"], scores["truncated"]) == (1, 1)


def test_odd_responses_are_counted_and_never_fatal(ranks, grader, tmp_path):
    hanging = boxed("9^{9^{9^{9}}}")
    texts = [
        "",
        "x" * 100_000,
        "the answer is 1/2",
        hanging,
        boxed("{" * 100_000),
        "\\boxed{}",
        boxed("0.5") + "\u2028\n\x85\ud800",
        "</answer> <answer>",
    ]
    scores = evaluate_stored(grader, [[text] for text in texts], file=tmp_path / "rows.jsonl")
    assert (scores["accuracy"], scores["unparsed"]) == (1 / 8, 6 / 8)
    assert (scores["timeouts"], scores["errors"]) == (1, 0)
    rows = saved_rows(tmp_path / "rows.jsonl", {})
    assert [row["response"] for row in rows] == texts
    assert [row["failure"] for row in rows] == [None] * 3 + ["timeout"] + [None] * 4
    assert [row["correct"] for row in rows] == [False] * 6 + [True, False]


def test_no_response_right_or_wrong_gives_no_number_instead_of_nan(ranks, grader):
    scores = evaluate_stored(grader, [[boxed("0.5")], [boxed("1/2")]])
    assert scores["length_wrong"] is scores["length_wrong_p50"] is None
    assert not any(math.isnan(v) for v in scores.values() if v is not None)


def test_an_interrupted_evaluation_ends_with_the_file_of_an_unbroken_one(
    engine, grader, tmp_path, monkeypatch
):
    sampler, _, _ = engine
    monkeypatch.setattr(evaluation, "RESPONSES_AT_ONCE", 6)  # 3 problems of 2 responses
    problems = [Problem(str(i), LONG[: 5 + i], ["1"]) for i in range(8)]
    asked, generate = [], sampler.generate
    monkeypatch.setattr(
        sampler,
        "generate",
        lambda some, *args: (asked.extend(p.prompt for p in some), generate(some, *args))[1],
    )

    def run(file, run="a"):
        asked.clear()
        return evaluate(sampler, grader, problems, 10, 2, 1.0, 5, file, {"run": run})

    whole = tmp_path / "whole.jsonl"
    scores = run(whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) == 16 and len({json.loads(line)["response"] for line in lines}) > 8
    for cut, first in ((0, 0), (3, 0), (6, 3), (11, 3), (12.5, 6), (15.5, 6), (16, 8)):
        file = tmp_path / f"{cut}.jsonl"
        half = lines[int(cut)][:40] if cut % 1 else b""
        file.write_bytes(b"".join(lines[: int(cut)]) + half)
        assert run(file) == scores
        assert file.read_bytes() == whole.read_bytes()
        assert asked == [str(i) for i in range(first, 8)], "only what is missing is sampled"
    with pytest.raises(ValueError, match="other settings.*--output"):
        run(whole, "b")


def test_a_function_of_ones_own_is_averaged_with_an_interval_and_says_nothing_of_right_or_wrong(
    ranks, rewards, tmp_path
):
    texts = ["", "a" * 25, "b" * 100, "c" * 100]  # 1, 0.5, -1, -1
    with Grader("none", reward=f"{rewards}:short") as grader:
        file = tmp_path / "rows.jsonl"
        scores = evaluate_stored(grader, [texts[:2], texts[2:]], file=file)
    assert scores["reward"] == pytest.approx(-0.125)
    assert scores["reward_se"] == pytest.approx(np.std([0.75, -1]) / 2**0.5)
    low, high = -0.125 - Z * scores["reward_se"], -0.125 + Z * scores["reward_se"]
    assert (scores["reward_low"], scores["reward_high"]) == pytest.approx((low, high))
    wrong = ("accuracy", "pass@", "maj@", "length_right", "length_wrong")
    assert not [key for key in scores if key.startswith(wrong)]
    assert {row["correct"] for row in saved_rows(file, {})} == {None}
    row = {"model": "m", "template": "none", "task": "t", "problems": 2} | scores
    head, _, line = scores_table([row], 2).splitlines()
    assert "| reward |" in head and "accuracy" not in head and "mean@" not in head
    assert "| -0.125 ± 0.619 [-1.338, 1.088] |" in line


def test_a_reward_between_0_and_1_has_wilsons_interval(ranks, rewards):
    with Grader("none", reward=f"{rewards}:obey") as grader:
        scores = evaluate_stored(grader, [["half"], ["half"]])
    assert (scores["reward"], scores["reward_se"]) == (0.5, 0)
    assert (scores["reward_low"], scores["reward_high"]) == interval(0.5, 0, 2)


def test_a_reward_that_mostly_fails_stops_the_evaluation(ranks, rewards):
    with Grader("none", reward=f"{rewards}:obey") as grader:
        responses = [["raise"]] * 8 + [["fine"]] * 7
        with pytest.raises(RuntimeError, match=r"8 of 15 gradings failed.*KeyError\('oops'\)"):
            evaluate_stored(grader, responses)


def test_failures_are_counted_anew_in_each_evaluation(ranks, rewards):
    with Grader("none", reward=f"{rewards}:obey") as grader:
        first = evaluate_stored(grader, [["raise"], ["nan"], ["fine"]])
        second = evaluate_stored(grader, [["raise"], ["fine"], ["fine"]])
    assert (first["errors"], second["errors"], grader.errors) == (2, 1, 3)


def test_the_progress_bar_shows_responses_and_accuracy(ranks, grader, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "RESPONSES_AT_ONCE", 2)
    evaluate_stored(grader, [[boxed("0.5")], [boxed("3")], [boxed("1/2")], [boxed("1/2")]])
    shown = capsys.readouterr().err
    assert "2/4" in shown and "accuracy=0.500" in shown
    assert "4/4" in shown and "accuracy=0.750" in shown
    assert "response/s" in shown or "s/response" in shown


def test_the_progress_bar_shows_a_reward_of_ones_own(ranks, rewards, capsys):
    with Grader("none", reward=f"{rewards}:short") as grader:
        evaluate_stored(grader, [["a" * 25], ["b" * 100]])
    assert "reward=-0.250" in capsys.readouterr().err


# ------------------------------------------------------------------------------ the command


class AnyPrompt(StoredSampler):
    """Answers every second problem right, whatever the model."""

    def __init__(self, model, context, seed, tensor_parallel, dtype):
        super().__init__({})

    def generate(self, problems, *arguments):
        for i, problem in enumerate(problems):
            answer = problem.answers[0] if i % 2 == 0 else "no"
            self.responses[problem.prompt] = [boxed(answer), boxed("7^9")]
        return super().generate(problems, *arguments)

    def close(self):
        pass


@pytest.fixture
def no_engine(ranks, monkeypatch):
    monkeypatch.setattr(evaluation, "start_ranks", lambda name: None)
    monkeypatch.setattr(evaluation, "Sampler", AnyPrompt)


def test_a_report_has_a_line_for_each_cell_and_an_average(no_engine, eval_config, toy, capsys):
    other = eval_config.output / "other.jsonl"
    shutil.copy(toy / "test.jsonl", other)
    tasks = (*eval_config.tasks, str(other))
    config = replace(eval_config, tasks=tasks, n=2, temperature=1.0, limit=4)
    report(config, measure_cells(config, prepare_cells(config)))
    printed = capsys.readouterr().out
    found = json.loads((config.output / "results.json").read_text())
    assert [result["task"] for result in found["results"]] == list(tasks)
    for result in found["results"]:
        assert (result["accuracy"], result["pass@2"], result["problems"]) == (0.25, 0.5, 4)
        assert (result["template"], result["n"], result["seed"]) == ("none", 2, 0)
    (average,) = found["averages"]
    assert (average["accuracy"], average["problems"]) == (0.25, 8)
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    assert [name in lines[0] for name in ("mean@2", "pass@2", "maj@2")] == [True] * 3
    assert [line.count("| 0.250 ± ") for line in lines[2:]] == [1, 1, 1]


def test_a_report_of_a_reward_of_ones_own_says_which_function(
    no_engine, eval_config, rewards, capsys
):
    config = replace(eval_config, reward=f"{rewards}:short", limit=4)
    report(config, measure_cells(config, prepare_cells(config)))
    (result,) = json.loads((config.output / "results.json").read_text())["results"]
    mean = np.mean([row["reward"] for row in saved_rows(next(config.output.glob("*_none_*")), {})])
    assert result["reward"] == pytest.approx(mean) and "accuracy" not in result
    assert f"{rewards}:short" in result.values(), "which function it was"
    assert f"| {mean:.3f} ± " in capsys.readouterr().out


@pytest.fixture(scope="session")
def scored_alone(toy, tmp_path_factory):
    """The toy model's results.json and its responses, from one rank."""
    return score_toy(toy, tmp_path_factory.mktemp("eval"), 1)


def score_toy(toy, folder, ranks, *more_models):
    settings = TOY_EVAL | dict(model=(toy / "model", *more_models), tasks=toy / "test.jsonl")
    settings |= dict(output=folder, n=4, temperature=1, limit=41, seed=3)
    printed = launch(ranks, ROOT / "eval.py", **settings)
    files = list(folder.glob("*_none_*.jsonl"))
    assert len(files) == 1 + len(more_models)
    return printed, (folder / "results.json").read_text(), files[0]


@pytest.mark.slow
def test_the_command_prints_a_table_and_leaves_what_traces_a_number(toy, scored_alone):
    printed, results, file = scored_alone
    (result,) = json.loads(results)["results"]
    assert f"| {result['accuracy']:.3f} ± {result['accuracy_se']:.3f} [" in printed
    assert {"mean@4", "pass@4", "maj@4"} <= set(printed.split())
    assert (result["seed"], result["n"], result["temperature"]) == (3, 4, 1.0)
    assert (result["template"], result["problems"], result["context"]) == ("none", 41, 136)
    assert result["versions"]["torch"] == torch.__version__
    assert len(result["data"]) == len(result["weights"]) == 64
    assert 0 < result["pass@1"] < result["pass@2"] < result["pass@4"] < 1
    rows = saved_rows(file, {"run": result["run"]})
    assert [(row["problem"], row["sample"]) for row in rows] == list(
        itertools.product(range(41), range(4))
    )
    assert result["accuracy"] == pytest.approx(np.mean([row["reward"] for row in rows]))


@pytest.mark.slow
def test_two_ranks_that_end_an_interrupted_run_give_the_numbers_of_one(toy, scored_alone, tmp_path):
    _, results, file = scored_alone
    (tmp_path / file.name).write_bytes(file.read_bytes()[:5000])
    again = tmp_path / "again"  # a second model under one torchrun: a second process group
    shutil.copytree(toy / "model", again)
    _, results_of_two, _ = score_toy(toy, tmp_path, 2, again)
    assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    (expected,) = json.loads(results)["results"]
    first, second = json.loads(results_of_two)["results"]
    assert first == expected
    assert second == expected | {"model": str(again), "run": second["run"]}


@pytest.fixture
def eval_config(toy, tmp_path):
    return EvalConfig(
        model=(str(toy / "model"),),
        template=("none",),
        tasks=(str(toy / "test.jsonl"),),
        n=1,
        temperature=0.0,
        max_prompt_tokens=64,
        max_response_tokens=72,
        output=tmp_path,
    )


@pytest.mark.parametrize("settings, message", [
    ({"model": ()}, "give --model"),
    ({"model": ("runs/no/such/model",)}, "no model at"),
    ({"tasks": ("aime25",)}, "unknown task 'aime25': give aime24, amc23, math500"),
    ({"tasks": ("no.jsonl",)}, "no file no.jsonl"),
    ({"tasks": ("aime24",), "data_dir": Path("nowhere")}, "no file nowhere/aime24.jsonl"),
    ({"problem_column": "question"}, "no column question; it has problem, answer"),
    ({"max_response_tokens": 3000}, "context of .* is 512: lower"),
    ({"max_prompt_tokens": 1, "max_response_tokens": 1}, "prompts of .* raise --max-prompt-tokens"),
    ({"template": ("chat",)}, "has none: give qwen_math, r1, none"),
    ({"template": ("gpt",)}, "unknown template 'gpt': give qwen_math, r1, none"),
    ({"n": 4}, "--temperature above 0"),
    ({"tensor_parallel": 2}, "torchrun --nproc-per-node 2"),
    ({"reward": "nowhere.py:f"}, "--reward 'nowhere.py:f'"),
])  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_with_what_to_do(eval_config, settings, message):
    with pytest.raises(ValueError, match=message):
        prepare_cells(replace(eval_config, **settings))


def test_a_folder_with_responses_of_other_settings_is_refused(eval_config, toy):
    (cell,) = prepare_cells(eval_config)
    append_rows(cell.file, [cell.labels])
    prepare_cells(eval_config)
    for other in ({"seed": 1}, {"max_response_tokens": 71}, {"limit": 3}, {"temperature": 0.5}):
        with pytest.raises(ValueError, match="other settings, versions, weights or data"):
            prepare_cells(replace(eval_config, **other))


SIZES = {"aime24": 30, "amc23": 83, "math500": 500, "minerva": 272, "olympiadbench": 675}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_gold_of_every_benchmark_boxed_scores_1(toy, grader, task):
    if not (DATA / f"{task}.jsonl").exists():
        pytest.skip("set DRGRPO_DATA to the folder of the benchmarks' .jsonl files")
    tokenizer = load_tokenizer(str(toy / "model"), 100)
    problems = load_task(task, tokenizer, TEMPLATES["none"], 10**6, DATA)
    assert len(problems) == SIZES[task]
    assert_every_gold_scores_1(problems, grader)


def test_every_gold_boxed_scores_1(toy, grader):
    """Golds written in the styles of the benchmarks."""
    tokenizer = load_tokenizer(str(toy / "model"), 100)
    problems = load_task(str(ROOT / "tests" / "golds.jsonl"), tokenizer, TEMPLATES["none"], 10**6)
    assert len(problems) > 40
    assert_every_gold_scores_1(problems, grader)


def assert_every_gold_scores_1(problems, grader):
    golds = [(gold, p.answers) for p in problems for gold in p.answers]
    rewards = grader.grade([boxed(gold) for gold, _ in golds], [answers for _, answers in golds])
    assert [gold for (gold, _), reward in zip(golds, rewards, strict=True) if reward != 1] == []


def test_a_benchmark_is_never_scored_in_part(toy, tmp_path):
    tokenizer = load_tokenizer(str(toy / "model"), 100)
    rows = [
        {"problem": "1+1", "answer": "2"},
        {"problem": "3+" * 50, "answer": "2"},
        {"problem": "2+2", "answer": ""},
    ]
    for some, message in ((rows[:2], "1 prompts of"), (rows[::2], "1 rows of .* have no answer")):
        (tmp_path / "math500.jsonl").write_text("\n".join(map(json.dumps, some)))
        with pytest.raises(ValueError, match=message):
            load_task("math500", tokenizer, TEMPLATES["none"], 60, tmp_path)


@pytest.mark.parametrize("kind", ["json", "arrow", "folder", "folder of splits"])
def test_a_task_is_a_file_or_a_folder_of_any_kind_and_its_marker_is_cut(toy, tmp_path, kind):
    rows = [{"question": f"{i}+1", "gold": f"so #### {i + 1}"} for i in range(3)]
    data, path = Dataset.from_list(rows), tmp_path / f"task.{kind}"
    if kind == "json":
        data.to_json(path, lines=False)
    elif kind == "arrow":
        data.save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(path)
    elif kind == "folder":
        data.save_to_disk(path)
    else:
        DatasetDict({"train": data.select([0]), "test": data}).save_to_disk(path)
    tokenizer = load_tokenizer(str(toy / "model"), 100)
    some = (str(path), tokenizer, TEMPLATES["none"], 60, None, "question", "gold")
    assert [p.answers for p in load_task(*some, "####")] == [["1"], ["2"], ["3"]]
    assert [p.answers for p in load_task(*some)] == [[row["gold"]] for row in rows]
    if kind == "folder of splits":
        assert len(load_task(*some, split="train")) == 1
        with pytest.raises(ValueError, match="no split 'dev'; it has 'train', 'test'"):
            load_task(*some, split="dev")


def test_a_task_for_a_reward_of_ones_own_needs_no_answers(toy, tmp_path):
    file = write_jsonl(tmp_path / "task.jsonl", [{"problem": "1+1", "checks": ["a"]}])
    tokenizer = load_tokenizer(str(toy / "model"), 100)
    with pytest.raises(ValueError, match="no column answer"):
        load_task(file, tokenizer, TEMPLATES["none"], 60)
    (problem,) = load_task(file, tokenizer, TEMPLATES["none"], 60, needs_answer=False)
    assert problem.row == {"problem": "1+1", "checks": ["a"]}


def test_regrading_tells_what_another_grader_changes():
    rows = [
        {"template": "r1", "response": "</think> <answer> 2 </answer>", "reward": 0.0},
        {"template": "none", "response": boxed("2"), "reward": 1.0},
        {"template": "none", "response": boxed("3"), "reward": 1.0},
        {"template": "chat", "response": boxed("9^{9^{9^{9}}}"), "reward": 0.0},
        {"response": "2"},
    ]
    rows = [row | {"answers": ["2"]} for row in rows]
    table = [
        [cell.strip() for cell in line.split("|")[1:-2]]
        for line in regrade(rows, "qwen_math").splitlines()[2:]
    ]
    assert table == [
        ["r1", "1", "0.000", "1.000", "1", "0", "0/0"],
        ["none", "2", "1.000", "0.500", "0", "1", "0/0"],
        ["chat", "1", "0.000", "0.000", "0", "0", "1/0"],
        ["qwen_math", "1", "0.000", "0.000", "0", "0", "0/0"],
    ]
    assert [row["reward"] for row in rows] == [1, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="have no answers"):
        regrade([{"response": "2"}], "none")
