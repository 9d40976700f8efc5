"""Facts about the findings: numbers, statistics, and that texts say what the numbers say."""

import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib import rc_context

from drgrpo import group_advantages
from findings import (
    difficulty_bias,
    length_bias,
    one_group,
    random_reward,
    runs,
    stats,
    template_and_data,
    unbiased,
)
from findings.coin import coin
from findings.finding import METHODS, STYLE, compact, rounded
from findings.readme import README, measured, render
from findings.runs import Run
from tests.helpers import ROOT

BY_NAME = {finding.name: finding for finding in measured()}
each_finding = pytest.mark.parametrize("name", BY_NAME)


# ------------------------------------------------------------------------ what is committed


def test_the_page_is_what_the_committed_numbers_say():
    assert README.read_text() == render()


@each_finding
def test_the_text_of_a_finding_is_what_its_numbers_say(name):
    finding = BY_NAME[name]
    assert finding.file(".md").read_text() == finding.text("")


def rows_of_the_readme():
    """(measured, script) of each row of the README's table of findings."""
    lines = (ROOT / "README.md").read_text().splitlines()
    start = lines.index("| finding, on the toy | measured | script |") + 2
    for line in lines[start:]:
        if not line.startswith("|"):
            return
        _, measured_text, script = (cell.strip() for cell in line.strip("|").split("|"))
        yield measured_text, script.strip("`")


@pytest.mark.parametrize("text, script", rows_of_the_readme())
def test_the_readmes_numbers_are_those_of_its_findings(text, script):
    (finding,) = (f for f in measured() if f.command == f"python findings/{script}")
    there = finding.file(".md").read_text()
    numbers = re.findall(r"[-+]?\d+\.\d+%?|\d of \d|\d+e-\d+", text)
    assert numbers and [number for number in numbers if number not in there] == []


@each_finding
def test_numbers_name_their_origin_and_no_machine(name):
    numbers = BY_NAME[name].numbers()
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", numbers["date"])
    assert re.fullmatch(r"\d+ CPU cores", numbers["machine"])
    assert numbers["command"] == BY_NAME[name].command and numbers["seeds"]
    assert {"python", "torch", "transformers"} <= numbers["versions"].keys()
    for command in numbers.get("runs", {}).values():
        assert command.startswith("python ") and (ROOT / command.split()[1]).is_file()
    texts = [BY_NAME[name].file(suffix).read_text() for suffix in (".json", ".md", ".svg")]
    absolute_path = r"(?<![\w.:/<])/[a-z]+/"
    assert not any(re.search(absolute_path, text) for text in texts)
    assert max(map(len, texts)) < 150_000


@each_finding
def test_a_figure_is_drawn_from_the_numbers_alone(name):
    with rc_context(STYLE):
        figure = BY_NAME[name].draw(BY_NAME[name].numbers())
    assert figure.axes and figure.get_size_inches()[0] == 8


def test_wrong_responses_are_longer_under_the_length_division_in_every_seed():
    runs_of = BY_NAME["length_bias"].numbers()["curves"]
    base = length_bias.in_window(runs_of["drgrpo"], length_bias.TESTED)
    assert len(base) >= 5
    for name in ("length", "grpo"):
        lengths = length_bias.in_window(runs_of[name], length_bias.TESTED)
        assert all(a > b for a, b in zip(lengths, base, strict=True))


def test_all_seeds_are_there_with_all_their_steps():
    numbers = BY_NAME["length_bias"].numbers()
    for curves in numbers["curves"].values():
        assert len(curves) == len(numbers["seeds"])
        assert all(len(run["reward"]) == len(run["wrong_count"]) == 40 for run in curves)


def test_the_words_of_the_captions_hold_for_the_numbers():
    """What a caption says in words, beside its numbers, which are filled in."""
    numbers = BY_NAME["length_bias"].numbers()
    assert length_bias.against_drgrpo(numbers, "std", length_bias.TESTED)["p"] > 0.05
    rewards = [np.mean(length_bias.late_reward(runs)) for runs in numbers["curves"].values()]
    assert max(rewards) - min(rewards) < 0.03
    assert difficulty_bias.most_off(BY_NAME["difficulty_bias"].numbers()) < 1e-4


def numbers_of(name):
    if name not in BY_NAME:
        pytest.skip(f"{name} has not been run")
    return BY_NAME[name].numbers()


def test_the_words_on_templates_and_data_hold_for_the_numbers():
    numbers = numbers_of("template_and_data")
    accuracy = partial(template_and_data.at_step, numbers, step=40)
    assert max(accuracy("qwen_math")) < 0.2 < 0.9 < min(accuracy("data_64"))
    assert max(accuracy("qwen_math")) <= numbers["one_answer_always"] + 0.01
    assert np.mean(accuracy("data_8")) < np.mean(accuracy("data_64"))


def test_the_words_on_random_rewards_hold_for_the_numbers():
    numbers = numbers_of("random_reward")
    assert numbers["reward_right"] == pytest.approx(numbers["reward_wrong"], abs=0.02)
    for arm in ("coin", "no_clip"):
        _, _, highest = stats.mean_interval(random_reward.changes(numbers, "sampled", arm))
        assert highest < 0.05


# --------------------------------------------------------------------------------- statistics


def test_the_sign_flip_test_tries_every_sign():
    assert stats.sign_flip_test([1, 1, 1]) == 2 / 8  # only +++ and --- are as far from 0
    assert stats.sign_flip_test([3, 1]) == 2 / 4
    assert stats.sign_flip_test([1, -1]) == 1
    assert stats.sign_flip_test([0, 0]) == 1
    assert stats.sign_flip_test([2, 1, -1]) == 6 / 8  # sums 2, 4, 0, 2 and their negatives
    assert stats.sign_flip_test([0.1] * 8) == 2 / 256


def test_an_interval_is_students():
    assert stats.mean_interval([1, 3]) == pytest.approx((2, 2 - 12.706, 2 + 12.706))
    middle, low, high = stats.mean_interval([1, 2, 3, 4, 5])
    assert (middle, high - middle) == pytest.approx((3, 2.776 * 2.5**0.5 / 5**0.5))
    assert middle - low == pytest.approx(high - middle)


def test_paired_values_are_compared_seed_by_seed():
    result = stats.paired([11, 21, 31], [10, 20, 30])
    assert result == {"difference": 1, "low": 1, "high": 1, "p": 0.25}


def test_a_pooled_mean_counts_each_value_once():
    totals, counts = [10, 0, 90], [1, 0, 9]
    assert stats.pooled_mean(totals, counts, 0) == [10, None, 10]
    assert stats.pooled_mean([10, 0, 180], counts, 1) == [10, 19, 20]


def test_a_band_is_the_mean_and_one_standard_deviation():
    middle, low, high = stats.band([[1, 5], [3, None]])
    assert (middle, low, high) == ([2, 5], [1, 5], [3, 5])


# ------------------------------------------------------------------------------- each finding


def test_std_division_only_rescales_within_one_problem_and_length_division_turns():
    model = unbiased.tiny_policy(0)
    easy, rate = unbiased.gradients(model, unbiased.EASY)
    hard, _ = unbiased.gradients(model, unbiased.HARD)
    assert 0 < rate < 1
    both = {name: easy[name] + hard[name] for name in easy}
    for found, right in ((easy, {"drgrpo", "std"}), (hard, {"drgrpo", "std"}), (both, {"drgrpo"})):
        angles = {name: unbiased.compare(found[name], found["true"])["angle"] for name in METHODS}
        assert {name for name, angle in angles.items() if angle < 1e-3} == right
        assert min(angle for name, angle in angles.items() if name not in right) > 0.1
        assert unbiased.compare(found["drgrpo"], found["true"])["error"] < 1e-5


def test_enumerated_groups_are_all_of_them():
    groups, orders = unbiased.all_groups()
    assert len(groups) == 495 and orders.sum() == 5**8


def test_an_angle_is_that_of_the_plane():
    result = unbiased.compare(torch.tensor([1.0, 1.0]).double(), torch.tensor([2.0, 0.0]).double())
    assert result["angle"] == pytest.approx(45) and result["error_left"] == pytest.approx(0.5**0.5)
    backwards = unbiased.compare(torch.tensor([-1.0]), torch.tensor([2.0]))
    assert backwards == {"angle": 180, "error": 1.5, "error_left": 1}


def test_the_formula_is_the_sum_of_advantages():
    for right in range(1, 8):
        rewards = torch.tensor([[1.0] * right + [0.0] * (8 - right)])
        for name in difficulty_bias.LABELS:
            weight = group_advantages(rewards, METHODS[name].divide_by_std).abs().sum().item()
            assert weight == pytest.approx(difficulty_bias.formula(name, right / 8, 8), rel=1e-6)


def test_the_weight_of_a_token_is_its_advantage_over_a_length():
    rewards, lengths = [1.0, 0.0, 0.0], [4, 8, 72]
    advantages, std = np.array([2 / 3, -1 / 3, -1 / 3]), np.std(rewards, ddof=1)
    expected = {
        "drgrpo": advantages / 72,
        "std": advantages / std / 72,
        "length": advantages / lengths,
        "grpo": advantages / std / lengths,
    }
    for name, method in METHODS.items():
        weights = one_group.token_weights(rewards, lengths, method)
        assert weights == pytest.approx(expected[name].tolist(), rel=1e-5)


def test_the_coin_is_fair_and_does_not_know_the_answer():
    right, wrong = [], []
    for problem in range(400):
        row = {"problem": f"What is {problem}?\n", "answer": str(problem % 10)}
        for digit in range(10):
            reward = coin(f"It is \\boxed{{{digit}}}", row)
            assert reward == coin(f"It is \\boxed{{{digit}}}", row | {"answer": "another"})
            (right if str(digit) == row["answer"] else wrong).append(reward)
    assert set(right + wrong) == {0.0, 1.0}
    assert np.mean(wrong) == pytest.approx(0.5, abs=4 * 0.5 / 3600**0.5)  # four standard errors
    assert np.mean(right) == pytest.approx(0.5, abs=4 * 0.5 / 400**0.5)


def test_a_training_response_is_right_by_its_box():
    assert random_reward.is_right({"response": "It is \\boxed{4}", "answers": ["4"]})
    assert not random_reward.is_right({"response": "It is \\boxed{4", "answers": ["4"]})


# ------------------------------------------------------------------------------- runs and files


def test_a_run_knows_whether_it_is_finished(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run("a", 3, {"divide_by_std": True, "template": "none"})
    assert run.command.endswith("--divide-by-std --template none")
    assert run.state() == "none"
    run.folder.mkdir(parents=True)
    settings = run.wanted | {"steps": 40}
    for finished, state in ((None, "begun"), (40, "finished")):
        config = {"finished": finished, "settings": settings}
        (run.folder / "config.json").write_text(json.dumps(config))
        assert run.state() == state
    assert Run("a", 3, {"template": "r1"}).state() == "other"


def test_numbers_are_written_so_that_they_can_be_read():
    value = {"a": [1, 2.0], "b": [{"c": []}], "d": {}, "e": "°"}
    assert json.loads(compact(value)) == value
    assert rounded({"a": [1 / 3, 7], "b": True}) == {"a": [0.333333, 7], "b": True}


@pytest.mark.slow
def test_a_run_is_trained_once_and_goes_on_when_it_was_stopped(toy):
    run = Run("test", 0, {"steps": 2})
    shutil.rmtree(run.folder, ignore_errors=True)  # of an earlier test
    runs.train([run])
    first = (run.folder / "metrics.jsonl").read_bytes()
    assert run.state() == "finished" and len(run.metrics()) == 3
    runs.train([run])
    assert (run.folder / "metrics.jsonl").read_bytes() == first
