"""Facts about scores: their intervals, what is left out of them, and what is refused."""

import itertools
import json
import math
import re
import sys
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

import eval as evaluation
from eval import EvalConfig, Z, interval, pass_at_k, regrade, scores_table
from support.data import Problem, load_tokenizer
from support.grader import Grader
from tests.helpers import ROOT, TOY_EVAL, boxed, launch, read_jsonl, write_jsonl
from tests.helpers import StoredSampler as Stored

RIGHT, WRONG = boxed("0.5"), boxed("3")


def evaluate(grader, responses: list[list[str]], finish_reason="stop"):
    """The scores of these responses, and their rows in responses.jsonl."""
    n = len(responses[0])
    problems = [Problem(str(i), [1], ["1/2"]) for i in range(len(responses))]
    sampler = Stored({str(i): texts for i, texts in enumerate(responses)}, finish_reason)
    config = EvalConfig("model", n=n, temperature=1.0)
    rollouts = evaluation.evaluate(sampler, grader, problems, config)
    rows = evaluation.response_rows("task", grader, problems, rollouts)
    return evaluation.scores_of(rollouts, n, grader), rows


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
    bounds = [interval(m, e, problems) for m, e in zip(means, errors, strict=True)]
    covered = np.mean([low <= a / (a + b) <= high for low, high in bounds])
    assert 0.925 <= covered <= 0.98
    assert (errors**2).mean() ** 0.5 == pytest.approx(means.std(), rel=0.06)


def test_an_interval_never_claims_certainty_and_stays_within_0_and_1():
    assert interval(0.0, 0.0, 30) == (0.0, pytest.approx(0.1135, abs=1e-4))
    assert interval(1.0, 0.0, 30) == (pytest.approx(0.8865, abs=1e-4), 1.0)
    se = (0.4 * 0.6 / 30) ** 0.5
    assert interval(0.4, se, 30) == pytest.approx((0.2459, 0.5768), abs=1e-3)


def test_the_average_over_benchmarks_is_unweighted_and_squares_of_errors_add_up():
    results = [{"accuracy": 0.1, "accuracy_se": 0.03}, {"accuracy": 0.7, "accuracy_se": 0.04}]
    scores = evaluation.average([result | {"length": 1.0, "problems": 9} for result in results])
    assert scores == pytest.approx({"accuracy": 0.4, "accuracy_se": 0.05 / 2})
    assert evaluation.average([{"a": None}, *results]) == {}
    assert evaluation.average([*results, {"accuracy": None}]) == {}


# ------------------------------------------------------------------------------ scores


def test_scores_are_those_of_a_count_by_hand(ranks, grader):
    scores, rows = evaluate(
        grader,
        [
            [RIGHT, RIGHT, WRONG, "wait, let me recheck. " + RIGHT],
            [WRONG, "no box", "", WRONG],
            [WRONG, "Let me Double-Check: " + RIGHT, WRONG, "\\boxed{1/2"],
        ],
    )
    assert scores["accuracy"] == pytest.approx((3 / 4 + 0 + 1 / 4) / 3)
    assert scores["accuracy_se"] == pytest.approx(np.std([0.75, 0, 0.25]) / 3**0.5)
    assert [scores[f"pass@{k}"] for k in (1, 2, 4)] == pytest.approx(
        [1 / 3, (1 + 0 + 1 / 2) / 3, 2 / 3]
    )
    assert (scores["maj@4"], scores["maj@4_problems"]) == (pytest.approx(1 / 3), 3)
    assert (scores["unparsed"], scores["truncated"], scores["right"]) == (3 / 12, 0, 4)
    assert (scores["responses"], scores["graded"]) == (12, 12)
    lengths = [len(RIGHT)] * 2 + [22 + len(RIGHT), 21 + len(RIGHT)]
    assert scores["length_right"] == np.mean(lengths)
    assert [row["problem"] for row in rows] == [0] * 4 + [1] * 4 + [2] * 4
    assert [row["answer"] for row in rows[:6]] == ["0.5", "0.5", "3", "0.5", "3", None]


def test_a_failed_grading_is_unknown_not_wrong_and_the_score_says_so(ranks, hostile):
    bug, hang = boxed("bug"), boxed("hang")
    with Grader("qwen_math", timeout=1.0) as grader:
        grader.equal = hostile.hostile
        scores, rows = evaluate(
            grader,
            [
                [WRONG, bug, RIGHT, RIGHT],  # 2 of 3
                [bug, bug, bug, bug],  # in no score
                [RIGHT, hang, RIGHT, RIGHT],  # 3 of 3
                [WRONG, WRONG, WRONG, WRONG],
            ],
        )
    assert (scores["responses"], scores["graded"], scores["right"]) == (16, 10, 5)
    assert (scores["timeouts"], scores["errors"]) == (1, 5)
    assert (scores["accuracy"], scores["accuracy_problems"]) == (pytest.approx(5 / 9), 3)
    assert (scores["pass@2"], scores["pass@2_problems"]) == (pytest.approx(2 / 3), 3)
    assert (scores["pass@4"], scores["pass@4_problems"]) == (0, 1)
    assert (scores["maj@4"], scores["maj@4_problems"]) == (pytest.approx(2 / 3), 3)
    assert [row["reward"] for row in rows[:5]] == [0, None, 1, 1, None]
    assert [row["correct"] for row in rows[:5]] == [False, None, True, True, None]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    table = scores_table([{"task": "t", "problems": 4} | scores], 4)
    assert "| t | 4 | 10 of 16 | 0.556 ± " in table
    assert "1 timeouts, 5 errors" in table and "Counted as wrong, they make accuracy 0.312" in table
    whole = scores | {"graded": 16, "timeouts": 0, "errors": 0}
    assert "failed" not in scores_table([{"task": "t", "problems": 4} | whole], 4)


def test_the_majority_is_found_by_equivalence_not_by_string(ranks, grader):
    def vote(*answers):
        texts = [boxed(answer) if answer else "" for answer in answers]
        return evaluate(grader, [texts])[0][f"maj@{len(answers)}"]

    assert vote("3", "1/2", "3", "\\frac{1}{2}", "0.5") == 1.0
    assert vote("3", "1/2", "3", "7", "0.5", "3") == 0.0
    assert vote("1/2", "3") == 1.0 and vote("3", "1/2") == 0.0, "the earlier wins a tie"
    assert vote("", "", "0.5") == 1.0, "who says nothing does not vote"
    assert vote("", "") == 0.0


def test_a_right_answer_in_a_truncated_response_counts(ranks, grader):
    scores, _ = evaluate(grader, [[RIGHT]], finish_reason="length")
    assert (scores["accuracy"], scores["truncated"]) == (1, 1)


def test_odd_responses_are_never_fatal_and_no_number_is_nan(ranks, grader):
    odd = boxed("0.5") + "\u2028\n\x85\ud800"
    texts = ["", "x" * 100_000, "1/2", boxed("{" * 100_000), "\\boxed{}", odd, "</answer>"]
    scores, rows = evaluate(grader, [[text] for text in texts])
    assert (scores["accuracy"], scores["unparsed"]) == (1 / 7, 6 / 7)
    assert json.loads(json.dumps(rows))[5]["response"] == odd
    scores, _ = evaluate(grader, [[RIGHT], [RIGHT]])
    assert scores["length_wrong"] is None
    assert not any(math.isnan(value) for value in scores.values() if value is not None)


def test_a_reward_of_ones_own_has_an_interval_and_says_nothing_of_right_and_wrong(ranks, rewards):
    texts = ["", "a" * 25, "b" * 100, "c" * 100]  # 1, 0.5, -1, -1
    with Grader("none", reward=f"{rewards}:short") as grader:
        scores, rows = evaluate(grader, [texts[:2], texts[2:]])
    se = np.std([0.75, -1]) / 2**0.5
    assert (scores["reward"], scores["reward_se"]) == pytest.approx((-0.125, se))
    assert (scores["reward_low"], scores["reward_high"]) == pytest.approx(
        (-0.125 - Z * se, -0.125 + Z * se)
    )
    assert not [key for key in scores if key.startswith(("accuracy", "pass@", "maj@", "right"))]
    assert {row["correct"] for row in rows} == {None}
    head, _, line = scores_table([{"task": "t", "problems": 2} | scores], 2).splitlines()
    assert "| reward |" in head and "mean@" not in head
    assert "| 4 of 4 | -0.125 ± 0.619 [-1.338, 1.088] |" in line


def test_a_reward_that_fails_is_left_out_and_one_that_mostly_fails_stops(ranks, rewards):
    with Grader("none", reward=f"{rewards}:obey") as grader:
        scores, _ = evaluate(grader, [["raise"], ["nan"], ["half"]])
        assert (scores["reward"], scores["reward_problems"], scores["errors"]) == (0.5, 1, 2)
        assert (scores["reward_low"], scores["reward_high"]) == interval(0.5, 0, 1)
        scores, _ = evaluate(grader, [["raise"]])
        assert (scores["reward"], scores["graded"]) == (None, 0)
        with pytest.raises(RuntimeError, match=r"(?s)8 of 15 gradings failed.*KeyError: 'oops'"):
            evaluate(grader, [["raise"]] * 8 + [["fine"]] * 7)


def test_a_rank_takes_every_second_problem_of_two_ranks(ranks, grader, monkeypatch):
    monkeypatch.setattr(evaluation.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(evaluation.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(evaluation, "from_all_ranks", lambda value: [value])
    texts = [[RIGHT], [WRONG], [WRONG], [boxed("0.50")]]
    rows = evaluate(grader, texts)[1]
    assert [(row["problem"], row["prompt"], row["answer"]) for row in rows] == [
        (1, "1", "3"),
        (3, "3", "0.50"),
    ]


def test_the_sampler_is_asked_as_the_settings_say_and_no_two_draws_share_a_seed(ranks):
    asked = []

    class Notes(Stored):
        def generate(self, problems, seeds, *how):
            asked.append((seeds, how))
            return super().generate(problems, seeds, *how)

    problems = [Problem(str(i), [1], ["2"]) for i in range(3)]
    sampler = Notes({str(i): ["", ""] for i in range(3)})
    with Grader("r1") as grader:
        for seed in (0, 1):
            config = EvalConfig("m", n=2, temperature=0.7, max_response_tokens=9, seed=seed)
            evaluation.evaluate(sampler, grader, problems, config)
    assert [how for _, how in asked] == [(2, 9, 0.7, ("</answer>",))] * 2
    assert len({seed for seeds, _ in asked for seed in seeds}) == 6


# ------------------------------------------------------------------------------ the command


class AnyPrompt(Stored):
    """Answers every second problem right, whatever the model."""

    def __init__(self, model, context, seed):
        super().__init__({})

    def generate(self, problems, *arguments):
        for i, problem in enumerate(problems):
            answer = problem.answers[0] if i % 2 == 0 else "77"
            self.responses[problem.prompt] = [boxed(answer), boxed("99")]
        return super().generate(problems, *arguments)

    def close(self):
        pass


@pytest.fixture
def command(ranks, monkeypatch):
    """The command without vLLM: of a config and a sampler that answers in its place."""

    def give(config, sampler=AnyPrompt):
        monkeypatch.setattr(evaluation, "Sampler", sampler)
        model, tasks = evaluation.prepare(config)
        evaluation.report(config, model, evaluation.score(config, model, tasks))
        return json.loads((config.folder / "results.json").read_text())

    monkeypatch.setattr(evaluation, "start_ranks", lambda: None)
    monkeypatch.setattr(evaluation, "end_ranks", lambda: None)
    return give


@pytest.fixture
def config(toy, tmp_path):
    return EvalConfig(
        model=str(toy / "model"),
        template="none",
        tasks=(str(toy / "test.jsonl"),),
        max_prompt_tokens=64,
        max_response_tokens=72,
        output=str(tmp_path),
        limit=4,
    )


def test_a_report_has_a_line_for_each_task_and_an_average(command, config, toy, tmp_path, capsys):
    tasks = (*config.tasks, str(toy / "train.jsonl"))
    found = command(replace(config, tasks=tasks, n=2, temperature=1.0))
    printed = capsys.readouterr().out
    *each, mean = found["results"]
    assert [result["task"] for result in each] == list(tasks)
    for result in each:
        assert (result["accuracy"], result["pass@2"], result["problems"]) == (0.25, 0.5, 4)
    assert (mean["task"], mean["accuracy"], mean["problems"]) == ("average", 0.25, 8)
    assert mean["accuracy_se"] == pytest.approx(each[0]["accuracy_se"] / 2**0.5)
    assert (found["settings"]["n"], found["settings"]["template"]) == (2, "none")
    assert found["versions"]["torch"] == torch.__version__
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    assert [name in lines[0] for name in ("mean@2", "pass@2", "maj@2")] == [True] * 3
    assert [line.count("| 0.250 ± 0.125 [") for line in lines[2:]] == [1, 1, 0]
    assert "| average | 8 |  | 0.250 ± 0.088 |" in lines[4]
    rows = read_jsonl(tmp_path / "responses.jsonl")
    assert [row["task"] for row in rows] == [task for task in tasks for _ in range(8)]
    assert {row["template"] for row in rows} == {"none"}


def test_nothing_of_an_earlier_command_is_shown_or_kept(command, config, tmp_path):
    class Silent(AnyPrompt):
        def generate(self, problems, *arguments):
            self.responses = {problem.prompt: ["no box"] for problem in problems}
            return Stored.generate(self, problems, *arguments)

    class Dies(AnyPrompt):
        def generate(self, problems, *arguments):
            raise RuntimeError("no memory")

    assert [result["accuracy"] for result in command(config)["results"]] == [0.5], "no average"
    assert command(replace(config, limit=3), Silent)["results"][0]["accuracy"] == 0
    rows = read_jsonl(tmp_path / "responses.jsonl")
    assert [row["response"] for row in rows] == ["no box"] * 3
    with pytest.raises(RuntimeError, match="no memory"):
        command(config, Dies)
    assert not (tmp_path / "results.json").exists()
    assert (tmp_path / "responses.jsonl").read_text() == ""


def test_a_link_is_followed_once_and_the_folder_is_named_after_the_model(toy, config, tmp_path):
    (tmp_path / "model").symlink_to(toy / "model")
    linked = replace(config, model=str(tmp_path / "model"), output=None)
    assert evaluation.prepare(linked)[0] == str((toy / "model").resolve())
    assert str(replace(linked, model="Qwen/Qwen2.5").folder) == "runs/eval/Qwen-Qwen2.5"
    assert str(replace(linked, model="runs/toy/model/").folder) == "runs/eval/runs-toy-model"


def score_toy(toy, folder, ranks):
    settings = TOY_EVAL | dict(model=toy / "model", tasks=toy / "test.jsonl", output=folder)
    printed = launch(ranks, ROOT / "eval.py", **settings, n=4, temperature=1, limit=41, seed=3)
    found = json.loads((folder / "results.json").read_text())
    return printed, found["results"], (folder / "responses.jsonl").read_bytes()


@pytest.mark.slow
def test_the_command_scores_what_it_writes_and_two_ranks_score_as_one(toy, tmp_path):
    printed, results, responses = score_toy(toy, tmp_path / "one", 1)
    (result,) = results
    assert f"| {result['accuracy']:.3f} ± {result['accuracy_se']:.3f} [" in printed
    assert {"mean@4", "pass@4", "maj@4"} <= set(printed.split())
    assert 0 < result["pass@1"] < result["pass@2"] < result["pass@4"] < 1
    rows = [json.loads(line) for line in responses.splitlines()]
    assert [row["problem"] for row in rows] == [i for i in range(41) for _ in range(4)]
    assert result["accuracy"] == pytest.approx(np.mean([row["reward"] for row in rows]))
    assert len({row["response"] for row in rows}) > 41, "four draws are not one"
    _, results_of_two, responses_of_two = score_toy(toy, tmp_path / "two", 2)
    assert responses_of_two == responses
    assert results_of_two == results


@pytest.mark.parametrize("settings, message", [
    ({"model": ""}, "give --model"),
    ({"model": "runs/no/such/model"}, "no model at"),
    ({"tasks": ("aime25",)}, "unknown task 'aime25': give aime24, amc23, math500"),
    ({"tasks": ("no.jsonl",)}, "no file no.jsonl"),
    ({"problem_column": "question"}, "no column question; it has problem, answer"),
    ({"max_response_tokens": 3000}, "context of .* is 512: lower"),
    ({"template": "chat"}, "has none: choose another --template"),
    ({"template": "gpt"}, "template 'gpt' must be one of qwen_math, r1, none"),
    ({"n": 4}, "--temperature above 0"),
    ({"limit": -1}, "limit and max_response_tokens 1 or more"),
    ({"limit": 0}, "limit and max_response_tokens 1 or more"),
    ({"reward": "nowhere.py:f"}, "--reward 'nowhere.py:f'"),
])  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_with_what_to_do(config, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluation.prepare(replace(config, **settings))


# ------------------------------------------------------------------------------ benchmarks


def load(config, file, **settings):
    tokenizer = load_tokenizer(config.model, 100)
    return evaluation.load_task(str(file), tokenizer, replace(config, limit=None, **settings))


def test_a_benchmark_is_never_scored_in_part(config, tmp_path):
    rows = [
        {"problem": "1+1", "answer": "2"},
        {"problem": "3+" * 50, "answer": "2"},
        {"problem": "2+2", "answer": ""},
    ]
    file = tmp_path / "task.jsonl"
    for some, message in (
        (rows[:2], "'too_long': 1.*--max-prompt-tokens"),
        (rows[::2], "'no_answer': 1"),
    ):
        write_jsonl(file, some)
        with pytest.raises(ValueError, match=message):
            load(config, file, max_prompt_tokens=30, max_response_tokens=30)
    write_jsonl(file, rows[1:2])
    (problem,) = load(config, file, max_prompt_tokens=30, max_response_tokens=100)
    assert 30 < len(problem.prompt_ids) < 130, "a long prompt has a shorter response"


def test_a_task_may_be_a_folder_with_splits_and_columns_of_its_own(config, tmp_path):
    rows = [{"question": f"{i}+1", "gold": f"so #### {i + 1}"} for i in range(3)]
    data = Dataset.from_list(rows)
    DatasetDict({"train": data.select([0]), "test": data}).save_to_disk(tmp_path)
    columns = dict(problem_column="question", answer_column="gold")
    found = load(config, tmp_path, **columns, answer_marker="####")
    assert [problem.answers for problem in found] == [["1"], ["2"], ["3"]]
    assert len(load(config, tmp_path, **columns, split="train")) == 1


def test_a_task_for_a_reward_of_ones_own_needs_no_answers(config, rewards, tmp_path):
    file = write_jsonl(tmp_path / "task.jsonl", [{"problem": "1+1", "checks": ["a"]}])
    with pytest.raises(ValueError, match="no column answer"):
        load(config, file)
    (problem,) = load(config, file, reward=f"{rewards}:short")
    assert problem.row == {"problem": "1+1", "checks": ["a"]}


def hub(name, split):
    """In place of load_dataset."""
    assert (name, split) == ("EleutherAI/asdiv", "validation")
    row = {"body": "Ellen has six balls.", "question": "How many are left?", "answer": "9 (apples)"}
    return Dataset.from_list([row])


@pytest.mark.project
def test_the_sets_of_the_page_become_files_of_problems(config, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "evaluate.md").read_text()
    asdiv, orz = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    dialogue = [{"value": "What is 1+1?"}, {"ground_truth": {"value": "2"}}]
    (tmp_path / "orz_math_57k_collected.json").write_text(json.dumps([dialogue]))
    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.chdir(tmp_path)
    exec(asdiv, {})
    exec(orz, {})
    monkeypatch.undo()
    found = [load(config, tmp_path / name)[0] for name in ("asdiv.jsonl", "orz.jsonl")]
    assert [(problem.text, problem.answers) for problem in found] == [
        ("Ellen has six balls. How many are left?", ["9"]),
        ("What is 1+1?", ["2"]),
    ]


# ------------------------------------------------------------------------------ regrade


def test_regrading_tells_what_another_grader_changes():
    rows = [
        {"template": "r1", "response": "</think> <answer> 2 </answer>", "correct": False},
        {"template": "none", "response": boxed("2"), "correct": True},
        {"template": "none", "response": boxed("3"), "correct": True},
        {"template": "none", "response": boxed("2"), "correct": None, "failure": "timeout"},
        {"response": "2"},
    ]
    rows = [row | {"answers": ["2"]} for row in rows]
    lines = regrade(rows, "qwen_math").splitlines()[2:]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert table == [
        ["r1", "1", "0", "1", "1", "0", "0", "0"],
        ["none", "3", "2", "2", "0", "1", "0", "0"],
        ["qwen_math", "1", "0", "0", "0", "0", "0", "0"],
    ]
    assert [row["reward"] for row in rows] == [1, 1, 0, 1, 0]
    assert [row["correct"] for row in rows] == [True, True, False, True, False]
    assert [row["failure"] for row in rows] == [None] * 5
    for wrong in ([], [{"response": "2"}]):
        with pytest.raises(ValueError, match=r"no response to grade|have no answers"):
            regrade(wrong, "none")


def test_a_file_is_regraded_by_the_command(tmp_path, monkeypatch, capsys):
    rows = [{"response": boxed(2), "answers": ["2"], "correct": False, "reward": 0.0}]
    file = write_jsonl(tmp_path / "FILE.jsonl", rows)
    monkeypatch.setattr(sys, "argv", ["eval.py", "--regrade", file, "--template", "none"])
    evaluation.main()
    assert "| none | 1 | 0 | 1 | 1 | 0 |" in capsys.readouterr().out
    assert read_jsonl(tmp_path / "FILE.regraded.jsonl")[0]["reward"] == 1
    assert read_jsonl(tmp_path / "FILE.jsonl") == rows
    monkeypatch.setattr(sys, "argv", ["eval.py", "--regrade", str(tmp_path / "no.jsonl")])
    with pytest.raises(SystemExit, match="no response to grade"):
        evaluation.main()
