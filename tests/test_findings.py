"""Facts about the findings: statistics, what each measures, and that texts say what numbers say."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from findings import (
    base_models,
    common,
    difficulty_bias,
    length_bias,
    one_group,
    random_reward,
    template_and_data,
    unbiased,
)
from findings.__main__ import ALL, README, REAL, page, table
from findings.coin import coin
from findings.common import METHODS, Run, paired
from tests.helpers import ROOT, boxed

EVERY = (*ALL, REAL)
each_finding = pytest.mark.parametrize("finding", EVERY, ids=lambda finding: finding.name)


# ------------------------------------------------------------------------ what is committed


@pytest.mark.project
def test_the_page_is_what_the_committed_numbers_say():
    assert README.read_text() == page()


@pytest.mark.project
def test_the_readme_shows_the_table_of_findings_and_their_lengths():
    readme = (ROOT / "README.md").read_text()
    assert table() in readme and REAL.measured(REAL.numbers) in " ".join(readme.split())
    caption = r"start at (\d+) tokens.*?have\s+(\d+)\s+with Dr\. GRPO and (\d+)\s+with GRPO"
    numbers = length_bias.FINDING.numbers
    said = [int(number) for number in re.search(caption, readme, re.DOTALL).groups()]
    late = [np.mean(length_bias.in_window(numbers[name], (30, 40))) for name in ("drgrpo", "grpo")]
    assert said == [round(length_bias.base_length(numbers)), *map(round, late)]


@pytest.mark.project
@each_finding
def test_numbers_name_their_origin_and_no_machine_and_suffice_for_the_figure(finding):
    numbers = finding.numbers
    assert numbers["command"] == finding.command and re.fullmatch(r"20[\d-]{8}", numbers["date"])
    assert {"python", "torch", "transformers"} <= numbers["versions"].keys()
    for command in numbers.get("runs", []):
        assert command.startswith("python ") and (ROOT / command.split()[1]).is_file()
    absolute_path = r"(?<![\w.:/<])/[a-z]+/"
    for suffix in ("json", "svg"):
        text = (common.RESULTS / f"{finding.name}.{suffix}").read_text()
        assert not re.search(absolute_path, text) and len(text) < 150_000
    figure = finding.draw(numbers)  # from the numbers alone
    assert figure.axes and figure.get_size_inches()[0] == 8


@pytest.mark.project
def test_the_words_on_length_hold_for_the_numbers():
    """What the text says in words, beside its numbers, which are filled in."""
    numbers, late, middle = length_bias.FINDING.numbers, length_bias.LATE, length_bias.MIDDLE
    lengths = {name: length_bias.in_window(numbers[name], late) for name in METHODS}
    assert np.mean(lengths["drgrpo"]) > length_bias.base_length(numbers)
    cut_off = {name: length_bias.mean_of(numbers[name], "truncated", middle) for name in METHODS}
    for name in ("length", "grpo"):
        assert (cut_off[name] > cut_off["drgrpo"]).all()
        assert paired(lengths[name], lengths["drgrpo"]).low > 0
        earlier = [length_bias.in_window(numbers[key], middle) for key in (name, "drgrpo")]
        assert (earlier[0] > earlier[1]).all()
        for window in (middle, late):  # it costs reward
            assert length_bias.gained(numbers, name, window).high < 0
    for window in length_bias.WINDOWS:
        std = length_bias.in_window(numbers["std"], window)
        assert paired(std, length_bias.in_window(numbers["drgrpo"], window)).low < 0


@pytest.mark.project
def test_the_words_of_the_other_findings_hold_for_their_numbers():
    assert difficulty_bias.most_off(difficulty_bias.FINDING.numbers) < 1e-4
    numbers = template_and_data.FINDING.numbers
    last = {arm: template_and_data.at_step(numbers, arm, 40) for arm in template_and_data.ARMS}
    assert max(last["qwen_math"]) <= numbers["one_answer_always"] + 0.01
    assert last["data_8"].mean() < last["data_64"].mean()
    assert abs(last["none"].mean() - last["data_64"].mean()) < 0.05
    numbers = random_reward.FINDING.numbers
    assert numbers["reward_right"] == pytest.approx(numbers["reward_wrong"], abs=0.03)
    assert random_reward.change(numbers, "accuracy", "coin").mean < 0
    assert random_reward.change(numbers, "accuracy", "no_clip").high < 0
    numbers = base_models.FINDING.numbers
    assert numbers["none"]["accuracy_worked"] > 0.9 > 0.05 > numbers["qwen_math"]["accuracy"]


@pytest.mark.slow
@pytest.mark.project
def test_numbers_hold_on_any_cpu_up_to_rounding(toy):
    """The first steps of a run that is committed. A draw that is close can come out otherwise on
    another CPU, so a few of the 256 responses of a step may differ."""
    run = Run("test", 0, {"steps": 4})
    shutil.rmtree(run.folder, ignore_errors=True)  # of an earlier test
    common.train([run])
    made, kept = length_bias.curves([run]), length_bias.FINDING.numbers["drgrpo"]
    assert made["reward"][0] == pytest.approx(kept["reward"][0][:4], abs=0.03)
    assert made["wrong_tokens"][0][:4] == pytest.approx(kept["wrong_tokens"][0][:4], rel=0.1)
    assert made["eval_accuracy"][0][0] == pytest.approx(kept["eval_accuracy"][0][0], abs=0.01)
    before = (run.folder / "metrics.jsonl").stat().st_mtime_ns
    common.train([run])  # a finished run is not trained again
    assert (run.folder / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_run_with_other_settings_is_removed_and_one_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run("a", 3, {"divide_by_std": True, "lr": 0.1})
    assert run.command.endswith(
        "--name findings-a-3 --seed 3 --grader-workers 1 --divide-by-std --lr 0.1"
    )
    run.folder.mkdir(parents=True)
    settings = {"seed": 3, "divide_by_std": True, "lr": 0.2, "steps": 40, "eval_every": 10}
    (run.folder / "config.json").write_text(json.dumps({"finished": 40, "settings": settings}))
    broken = lambda *arguments, **others: subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(subprocess, "run", broken)
    with pytest.raises(RuntimeError, match="--lr 0.1 failed"):
        run.train()
    assert not (run.folder / "config.json").exists()


# --------------------------------------------------------------------------------- statistics


def test_the_sign_flip_test_tries_every_sign():
    assert common.sign_flip_test([1, 1, 1]) == 2 / 8  # only +++ and --- are as far from 0
    assert common.sign_flip_test([3, 1]) == common.sign_flip_test([-3, -1]) == 2 / 4
    assert common.sign_flip_test([1, -1]) == common.sign_flip_test([0, 0]) == 1
    assert common.sign_flip_test([2, 1, -1]) == 6 / 8  # sums 2, 4, 0, 2 and their negatives
    assert common.sign_flip_test([0.1] * 8) == 2 / 256  # it cannot be lower


def test_an_interval_is_students():
    assert common.mean_interval([1, 3]) == pytest.approx((2, 2 - 12.706, 2 + 12.706))
    half = 2.776 * 2.5**0.5 / 5**0.5
    assert common.mean_interval([1, 2, 3, 4, 5]) == pytest.approx((3, 3 - half, 3 + half))


def test_paired_values_are_compared_seed_by_seed():
    result = paired([11, 21, 31], [10, 20, 30])
    assert result == common.Difference(1, 1, 1, 0.25)
    assert result.text(2) == "+1.00 [+1.00, +1.00], p 0.250"


def test_lengths_are_pooled_over_responses(monkeypatch):
    monkeypatch.setattr(length_bias, "STEPS", 3)
    counts, tokens = [[1, 0, 9], [1, 2, 0]], [[10, 0, 180], [8, 32, 0]]
    found = {"wrong_count": counts, "wrong_tokens": tokens}
    found["reward"] = [[0.6, 0.65, 0.9], [0.9, 0.9, 0.9]]
    assert length_bias.in_window(found, (0, 3)).tolist() == [19, 40 / 3]
    np.testing.assert_equal(length_bias.in_window(found, (1, 2)), [np.nan, 16])
    np.testing.assert_equal(length_bias.at_reward(found, (0.5, 0.7)), [10, np.nan])
    assert length_bias.mean_of(found, "reward", (1, 3)) == pytest.approx([0.775, 0.9])


# ------------------------------------------------------------------------------- each finding


def test_std_division_only_rescales_within_one_problem_and_length_division_turns():
    model = unbiased.tiny_policy(0)
    easy, hard = (unbiased.gradients(model, problem) for problem in (unbiased.EASY, unbiased.HARD))
    both = {name: easy[name] + hard[name] for name in easy}
    for found, right in ((easy, {"drgrpo", "std"}), (hard, {"drgrpo", "std"}), (both, {"drgrpo"})):
        angles = {name: unbiased.compare(found[name], found["true"])["angle"] for name in METHODS}
        assert {name for name, angle in angles.items() if angle < 1e-3} == right
        assert min(angle for name, angle in angles.items() if name not in right) > 0.1
        assert unbiased.compare(found["drgrpo"], found["true"])["error"] < 1e-5


def test_an_angle_is_that_of_the_plane():
    result = unbiased.compare(torch.tensor([1.0, 1.0]).double(), torch.tensor([2.0, 0.0]).double())
    assert result["angle"] == pytest.approx(45) and result["error"] == pytest.approx(0.5**0.5)
    backwards = unbiased.compare(torch.tensor([-1.0]), torch.tensor([2.0]))
    assert backwards == {"angle": 180, "error": 1.5}


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


def test_the_coin_is_fair_for_any_columns_and_does_not_know_the_answer():
    right, wrong = [], []
    for problem in range(400):
        row = {"question": f"What is {problem}?\n", "gold": str(problem % 10), "odd": {1, 2}}
        for digit in range(10):
            reward = coin(f"It is \\boxed{{{digit}}}", row)
            assert reward == coin(f"It is \\boxed{{{digit}}}", row)
            (right if str(digit) == row["gold"] else wrong).append(reward)
    assert set(right + wrong) == {0.0, 1.0}
    assert np.mean(wrong) == pytest.approx(0.5, abs=4 * 0.5 / 3600**0.5)  # four standard errors
    assert np.mean(right) == pytest.approx(0.5, abs=4 * 0.5 / 400**0.5)


def test_an_analysis_is_that_of_a_count_by_hand():
    right, wrong = (boxed("0.5"), True), (boxed("3"), False)
    responses = [right, right, wrong, ("wait, let me recheck. " + boxed("0.5"), True)]
    responses += [wrong, ("no box", False), ("<answer> 2 </answer>", False), wrong]
    responses += [wrong, ("Let me Double-Check: " + boxed("0.5"), True), ("\\boxed{1", False)]
    responses += [("lost", None)]  # its grading failed
    rows = [
        {"response": text, "correct": correct, "length": len(text), "finish_reason": "stop"}
        for text, correct in responses
    ]
    found = base_models.analyse(rows, 4)
    assert found["answered"] == 9 / 12 and found["pass@4"] == 2 / 3 and found["accuracy"] == 4 / 12
    assert (found["reflection"], found["reflection_of_problems"]) == (2 / 12, 2 / 3)
    assert found["accuracy_reflecting"] == 1 and found["accuracy_not_reflecting"] == 2 / 10
    assert base_models.analyse(rows[:1], 1)["accuracy_reflecting"] is None
    assert base_models.analysis_table([found]).splitlines()[2].startswith("| 0.750 | 0.333 |")
