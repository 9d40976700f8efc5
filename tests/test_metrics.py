"""Facts about records: what a step's responses say in numbers, files, trackers and curves."""

import json
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

import drgrpo
from drgrpo import Rollout
from support.data import Problem
from support.grader import Verdict
from support.metrics import plot_curves, read_rows, summarize, write_rows
from tests.helpers import TOY, read_jsonl


def responses(lengths, rewards, correct=None, advantages=None, reasons=None, failures=None):
    """Rollouts with one entry each of these lists."""
    count = len(lengths)
    return [
        Rollout(
            0,
            [1],
            [2] * lengths[i],
            [-0.5] * lengths[i],
            finish_reason=reasons[i] if reasons else "stop",
            reward=rewards[i],
            correct=correct[i] if correct else None,
            failure=failures[i] if failures else None,
            advantage=advantages[i] if advantages else 0.0,
        )
        for i in range(count)
    ]


# ------------------------------------------------------------------------------ summaries

OF_GROUPS = {"entropy", "groups_without_signal", "length_above", "length_below"}
OF_VERDICTS = {"accuracy", "accuracy_se", "length_right", "length_wrong"}
ALWAYS = {"reward", "truncated", "length", "timeouts", "errors"}


def test_a_summary_is_that_of_a_count_by_hand():
    """Two groups of three: in the first one of three is right, in the second all are."""
    found = summarize(
        responses(
            lengths=[1, 2, 3, 4, 5, 6],
            rewards=[1.0, 0.0, 0.0, 1.0, 1.0, 1.0],
            correct=[True, False, False, True, True, True],
            advantages=[2 / 3, -1 / 3, -1 / 3, 0.0, 0.0, 0.0],
            failures=[None, "timeout", "KeyError()", None, None, None],
        ),
        3,
    )
    assert found == {
        "reward": pytest.approx(4 / 6),
        "truncated": 0.0,
        "length": 3.5,
        "timeouts": 1,
        "errors": 1,
        "entropy": 0.5,
        "groups_without_signal": 0.5,
        "length_above": 1.0,
        "length_below": 2.5,
        "accuracy": pytest.approx(4 / 6),
        "accuracy_se": pytest.approx(np.std([1 / 3, 1]) / 2**0.5),
        "length_right": 4.0,
        "length_wrong": 2.5,
        "groups_all_right": 0.5,
        "groups_all_wrong": 0.0,
    }


def test_a_right_answer_in_a_truncated_response_is_right_but_not_rewarded():
    found = summarize(
        responses([1, 9], [0.0, 0.0], [False, True], reasons=["stop", "length"]),
        2,
    )
    assert (found["reward"], found["accuracy"], found["truncated"]) == (0.0, 0.5, 0.5)
    assert (found["length_right"], found["length_wrong"]) == (9, 1)
    assert (found["groups_without_signal"], found["groups_all_wrong"]) == (1.0, 0.0)
    assert found["length_above"] is found["length_below"] is None


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("has_verdict", [False, True])
def test_what_needs_groups_or_verdicts_is_there_only_with_them(n, has_verdict):
    correct = [True, False, False, False] if has_verdict else None
    found = summarize(responses([1, 2, 3, 4], [0.5, -1.0, 0.25, 0.25], correct), n)
    expected = set(ALWAYS)
    if n > 1:
        expected |= OF_GROUPS
    if has_verdict:
        expected |= OF_VERDICTS
    else:
        expected.add("reward_se")
        means = {1: [0.5, -1.0, 0.25, 0.25], 2: [-0.25, 0.25]}[n]
        assert found["reward_se"] == pytest.approx(np.std(means) / len(means) ** 0.5)
    if n > 1 and has_verdict:
        expected |= {"groups_all_right", "groups_all_wrong"}
    assert set(found) == expected
    if n > 1:
        assert found["groups_without_signal"] == 0.5


def test_failed_gradings_of_an_evaluation_are_apart_from_those_of_training(ranks):
    verdicts = [Verdict(0.0, False, "timeout"), Verdict(0.0, False, "died"), Verdict(1.0, True)]
    grader = types.SimpleNamespace(verdicts=lambda texts, *others: verdicts[: len(texts)])
    rollouts = responses([1] * 3, [0.0] * 3)
    sampler = object()
    problems = [Problem("", [1], ["1"])] * 3

    def respond(*arguments):
        return [replace(rollout, problem=i) for i, rollout in enumerate(rollouts)]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(drgrpo, "sample", respond)
        found = drgrpo.score_held_out(sampler, grader, problems, TOY)
    assert (found["eval_timeouts"], found["eval_errors"]) == (1, 1)
    verdicts[:] = [Verdict(0.0, False), Verdict(0.0, False, "timeout"), Verdict(1.0, True)]
    step = summarize(drgrpo.score(grader, problems, rollouts, 3, TOY), 3)
    assert (step["timeouts"], step["errors"]) == (1, 0), "of this step alone"


# ------------------------------------------------------------------------------ files


def test_a_file_of_rows_is_read_up_to_a_line_that_was_cut_off(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert read_rows(file) == []
    rows = [{"text": "\u2028\x85\n\ud800"}, {"text": None}]
    write_rows(file, rows)
    with file.open("a") as out:
        out.write('{"text": "cut o')
    assert read_rows(file) == rows
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


# Each makes the second step fail in another way


def with_a_gap(sampler):
    sampler.shift = 0.5


def with_a_loss_that_is_not_finite(sampler):
    with torch.no_grad():
        for parameter in sampler.policy.parameters():
            parameter.fill_(float("nan"))


@pytest.mark.parametrize(
    "fail, error, message",
    [
        (with_a_gap, RuntimeError, "differ by 0.5 nats a token"),
        (with_a_loss_that_is_not_finite, FloatingPointError, "loss nan on responses to problems"),
    ],
)
def test_a_step_that_fails_keeps_its_responses_apart(fake_run, tmp_path, fail, error, message):
    def change(sampler):
        generate = sampler.generate

        def generate_and_fail(*arguments):
            if len(sampler.seeds) == 1:
                fail(sampler)
            return generate(*arguments)

        sampler.generate = generate_and_fail

    with pytest.raises(error, match=f"step 1: .*{message}.*runs/run/failed_step.jsonl"):
        fake_run(change, steps=3)
    assert_only_step_0_is_recorded(tmp_path / "runs" / "run")


def test_a_step_whose_gradient_overflows_keeps_its_responses_apart(fake_run, tmp_path):
    """Rewards of 1e30 in step 1: the loss is finite, the gradient's norm is not."""
    (tmp_path / "huge.py").write_text(
        "def huge(response, row):\n"
        "    return len(response) * 10.0 ** row['power'] - int(response[7])\n"
    )

    def change(sampler):
        generate = sampler.generate

        def generate_for_huge_rewards(problems, *arguments):
            power = 30 if len(sampler.seeds) == 1 else 0
            for problem in problems:
                problem.row["power"] = power
            groups = generate(problems, *arguments)
            for group in groups:
                for place, rollout in enumerate(group):
                    rollout.text = f"{rollout.text}{'.' * place}"
            return groups

        sampler.generate = generate_for_huge_rewards

    with pytest.raises(FloatingPointError, match="step 1: the gradient's norm is inf"):
        fake_run(change, steps=3, reward="huge.py:huge", truncated_reward=-9.0)
    assert_only_step_0_is_recorded(tmp_path / "runs" / "run")


def assert_only_step_0_is_recorded(run):
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == [0]
    assert {row["step"] for row in read_jsonl(run / "samples.jsonl")} == {0}
    failed = read_jsonl(run / "failed_step.jsonl")
    assert {row["step"] for row in failed} == {1} and len(failed) == 16
    assert all(row["prompt"] and row["response"] for row in failed)
    assert not (run / "curves.png").exists() and not (run / "model").exists()


def test_a_run_leaves_its_records(fake_run, tmp_path):
    fake_run(steps=2, held_out=[Problem("q", [5, 6], ["1"])], eval_every=1)
    run = tmp_path / "runs" / "run"
    rows, samples = read_jsonl(run / "metrics.jsonl"), read_jsonl(run / "samples.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(np.isfinite(v) for row in rows for v in row.values() if v is not None)
    assert all(row["gap"] < 1e-5 for row in rows[:2]) and "gap" not in rows[2]
    assert all("eval_accuracy" in row for row in rows)
    assert len(samples) == 2 * 4 * 4
    first = [s for s in samples if s["step"] == 0]
    assert rows[0]["reward"] == pytest.approx(np.mean([s["reward"] for s in first]))
    assert rows[0]["accuracy"] == pytest.approx(np.mean([s["correct"] for s in first]))
    assert rows[0]["length"] == pytest.approx(np.mean([s["length"] for s in first]))
    assert all(s["reward"] == (s["correct"] and s["finish_reason"] == "stop") for s in samples)
    assert (run / "curves.png").stat().st_size > 10_000
    assert json.loads((run / "config.json").read_text())["dropped_problems"] == {"too_long": 0}


# ------------------------------------------------------------------------------ trackers


class FakeWriter:
    """Keeps what TensorBoard's writer gets, and shows what is safe on the disk."""

    written: list[tuple] = []  # noqa: RUF012
    waiting: list[tuple] = []  # noqa: RUF012
    closed = 0

    def __init__(self, folder, **settings):
        self.folder = folder

    def add_scalar(self, key, value, step):
        self.waiting.append((key, value, step))

    def flush(self):
        self.written.extend(self.waiting)
        self.waiting.clear()

    def close(self):
        self.flush()
        FakeWriter.closed += 1


@pytest.fixture
def writer(monkeypatch):
    FakeWriter.written.clear()
    FakeWriter.waiting.clear()
    FakeWriter.closed = 0
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = FakeWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return FakeWriter


def test_every_point_reaches_the_tracker_and_it_is_closed(fake_run, writer, tmp_path):
    fake_run(track="tensorboard", steps=2)
    rows = read_jsonl(tmp_path / "runs" / "run" / "metrics.jsonl")
    expected = {
        (key, row["step"]): value for row in rows for key, value in row.items() if value is not None
    }
    assert {(key, step): value for key, value, step in writer.written} == expected
    assert writer.closed == 1


def test_a_run_that_fails_loses_no_point_of_the_steps_before(fake_run, writer, tmp_path):
    def change(sampler):
        sampler.wake = lambda policy: setattr(sampler, "shift", 0.5)

    with pytest.raises(RuntimeError, match="step 1: "):
        fake_run(change, track="tensorboard", steps=2)
    assert {step for _, _, step in writer.written} == {0} and not writer.waiting


def test_tensorboard_can_read_what_a_run_leaves(fake_run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fake_run(track="tensorboard", steps=2)
    events = EventAccumulator(str(tmp_path / "runs" / "run"))
    events.Reload()
    rows = read_jsonl(tmp_path / "runs" / "run" / "metrics.jsonl")
    assert [event.step for event in events.Scalars("reward")] == [0, 1]
    found = [event.value for event in events.Scalars("gap")]
    assert found == pytest.approx([row["gap"] for row in rows])


# ------------------------------------------------------------------------------ curves


@pytest.mark.parametrize("kind", ["accuracy", "reward"])
def test_curves_show_the_held_out_score_with_and_without_verdicts(tmp_path, monkeypatch, kind):
    rows = []
    for step in range(4):
        row = {"step": step, "reward": step / 10, "gap": 1e-4, "grad_norm": 0.1}
        row |= {"length_above": 5, "length_below": None, f"eval_{kind}": 0.1}
        if kind == "accuracy":
            row |= {"accuracy": 0.1, "length_right": 5, "length_wrong": None}
        rows.append(row)
    rows.append({"step": 4, f"eval_{kind}": 0.2})  # after the last step
    write_rows(tmp_path / "metrics.jsonl", rows)
    labels = []
    plot = Axes.plot

    def noting(axis, xs, ys, label, **settings):
        labels.append((label, tuple(xs)))
        return plot(axis, xs, ys, label=label, **settings)

    monkeypatch.setattr(Axes, "plot", noting)
    plot_curves(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert (f"held-out {kind}", (0, 1, 2, 3, 4)) in labels
    assert ("training", (0, 1, 2, 3)) in labels
    assert len(labels) == 5, "reward, held-out score, length, gap, norm"
