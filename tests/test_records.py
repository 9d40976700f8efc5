"""Facts about records: summaries of responses, files, warnings, trackers, curves."""

import sys
import types
import warnings
from importlib.machinery import ModuleSpec
from unittest import mock

import numpy as np
import pytest
from matplotlib.axes import Axes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from drgrpo import Rollout
from support import records
from support.records import append_rows, check_tracker, cut_rows, plot_curves, read_rows, summarize
from tests.helpers import read_jsonl
from tests.runs import small, train

NAN = float("nan")


def responses(lengths, rewards, **columns):
    """Rollouts with one entry each of these lists."""
    rollouts = []
    for place, (length, reward) in enumerate(zip(lengths, rewards, strict=True)):
        others = {key: values[place] for key, values in columns.items()}
        others = {"finish_reason": "stop"} | others
        rollouts.append(Rollout(0, [1], [2] * length, [-0.5] * length, reward=reward, **others))
    return rollouts


# ------------------------------------------------------------------------------ summaries


def test_a_summary_is_that_of_a_count_by_hand():
    """Two groups of three. In the first one is right, and one grading timed out; in the second
    all are right."""
    found = summarize(
        responses(
            lengths=[1, 2, 3, 4, 5, 6],
            rewards=[1.0, 0.0, NAN, 1.0, 1.0, 1.0],
            correct=[True, False, None, True, True, True],
            advantage=[0.5, -0.5, 0.0, 0.0, 0.0, 0.0],
            failure=[None, None, "timeout", None, None, None],
        ),
        3,
    )
    assert found == {
        "reward": pytest.approx(4 / 5),
        "truncated": 0.0,
        "length": 3.5,
        "timeouts": 1,
        "errors": 0,
        "entropy": 0.5,
        "groups_without_signal": 0.5,
        "length_above": 1.0,
        "length_below": 2.0,
        "accuracy": pytest.approx(4 / 5),
        "accuracy_se": pytest.approx(np.std([1 / 2, 1]) / 2**0.5),
        "length_right": 4.0,
        "length_wrong": 2.0,
        "groups_all_right": 0.5,
        "groups_all_wrong": 0.0,
    }


def test_a_right_answer_in_a_truncated_response_is_right_but_not_rewarded():
    found = summarize(
        responses(
            [1, 9],
            [0.0, 0.0],
            correct=[False, True],
            finish_reason=["stop", "length"],
            failure=["KeyError()", None],
        ),
        2,
    )
    assert (found["reward"], found["accuracy"], found["truncated"]) == (0.0, 0.5, 0.5)
    assert (found["length_right"], found["length_wrong"]) == (9, 1)
    assert (found["groups_without_signal"], found["groups_all_wrong"]) == (1.0, 0.0)
    assert (found["timeouts"], found["errors"]) == (0, 1)
    assert found["length_above"] is found["length_below"] is None


def test_what_needs_groups_or_verdicts_is_there_only_with_them():
    rollouts = responses([1, 2, 3, 4], [0.5, -1.0, 0.25, 0.25])
    groups, single = summarize(rollouts, 2), summarize(rollouts, 1)
    assert groups["reward_se"] == pytest.approx(np.std([-0.25, 0.25]) / 2**0.5)
    assert "accuracy" not in groups and "entropy" in groups and "entropy" not in single


def test_nothing_is_known_where_all_gradings_failed():
    found = summarize(responses([1, 2], [NAN, NAN], failure=["timeout", "oops"]), 2)
    assert found["reward"] is found["reward_se"] is None
    assert (found["timeouts"], found["errors"], found["groups_without_signal"]) == (1, 1, 1.0)


# ------------------------------------------------------------------------------ files


def test_rows_are_read_up_to_a_line_that_was_cut_off(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert read_rows(file) == []
    rows = [{"text": "\u2028\x85\n\ud800"}, {"text": None}]
    for row in rows:
        append_rows(file, [row])
    with file.open("a") as out:
        out.write('{"text": "cut o')
    assert read_rows(file) == rows


@pytest.mark.parametrize("first, kept", [(0, 0), (1, 2), (2, 3), (9, 3)])
def test_rows_of_steps_that_are_made_again_are_cut_off(tmp_path, first, kept):
    file = tmp_path / "rows.jsonl"
    rows = [{"step": 0, "text": "\u2028"}, {"step": 0}, {"step": 1}]
    append_rows(file, rows)
    with file.open("a") as out:
        out.write('{"step": 1, "rew')
    cut_rows(file, first)
    assert read_jsonl(file) == rows[:kept]
    cut_rows(tmp_path / "new", first)
    assert (tmp_path / "new").read_bytes() == b""


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    records.write_json(file, {"a": 1})
    monkeypatch.setattr(records.os, "replace", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        records.write_json(file, {"a": 2})
    assert records.read_json(file) == {"a": 1} and records.read_json(tmp_path / "no") is None


def test_a_run_leaves_its_records(here):
    train(steps=2, eval_every=1)
    run = here / "runs" / "run"
    rows, samples = read_jsonl(run / "metrics.jsonl"), read_jsonl(run / "samples.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(np.isfinite(v) for row in rows for v in row.values() if v is not None)
    assert all(row["gap"] < 1e-5 for row in rows[:2]) and "gap" not in rows[2]
    assert all("eval_accuracy" in row for row in rows)
    assert len(samples) == 2 * 4 * 4
    first = [s for s in samples if s["step"] == 0]
    for key, of_a_sample in (("reward", "reward"), ("accuracy", "correct"), ("length", "length")):
        assert rows[0][key] == pytest.approx(np.mean([s[of_a_sample] for s in first]))
    assert all(s["reward"] == (s["correct"] and s["finish_reason"] == "stop") for s in samples)
    assert {s["prompt"] for s in samples} <= {f"{i}+{i}=" for i in range(6)}


# ------------------------------------------------------------------------------ warnings

HEALTHY = {"timeouts": 0, "errors": 0, "groups_without_signal": 0.5, "truncated": 0.5}


def told(change, rewards=(0.0, 1.0) * 100, stop=(), truncated_reward=0.0):
    samples = [{"reward": reward} for reward in rewards]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        records.warn_of(HEALTHY | change, samples, stop, truncated_reward)
    return [str(warning.message) for warning in seen]


@pytest.mark.parametrize("change, fine, message", [
    ({"timeouts": 1, "errors": 1}, {"timeouts": 1}, "1% of the gradings or more failed: .*timeout"),
    ({"groups_without_signal": 1.0}, {"groups_without_signal": 0.99}, "so nothing was learned.*Re"),
    ({"truncated": 0.51}, {}, "most responses are truncated; EOS ends a response. Raise --max-res"),
])  # fmt: skip
def test_a_warning_says_what_to_try(change, fine, message):
    assert told(fine) == []
    with pytest.warns(match=message):
        records.warn_of(HEALTHY | change, [{"reward": 0.0}] * 200, (), 0.0)
    assert len(told(change)) == 1


def test_warnings_know_stop_strings_and_what_being_cut_off_pays():
    (message,) = told({"truncated": 1.0}, stop=("</answer>",))
    assert "EOS or '</answer>' ends a response" in message
    (message,) = told({}, rewards=(0.0, -0.5, None))
    assert "some rewards are below that of a truncated response, 0.0" in message
    assert told({}, rewards=(0.0, -0.5, None), truncated_reward=-0.5) == []


# ------------------------------------------------------------------------------ trackers


def points(folder):
    """{(key, step): value} of what TensorBoard would show of a run."""
    events = EventAccumulator(str(folder)).Reload()
    found = {}
    for key in events.Tags()["scalars"]:
        found |= {(key, event.step): event.value for event in events.Scalars(key)}
    return found


def test_tensorboard_shows_each_point_at_once_and_none_that_is_made_again(here):
    train(track="tensorboard", steps=2)
    folder, expected = here / "runs" / "run", {}
    for row in read_jsonl(folder / "metrics.jsonl"):
        expected |= {(key, row["step"]): v for key, v in row.items() if v is not None}
    assert points(folder) == pytest.approx(expected)
    again = records.Records(small(track="tensorboard"), {"dropped_problems": {}}, (), 1)
    again.send({"step": 1, "reward": 0.25, "length_right": None})
    expected = {key: value for key, value in expected.items() if key[1] == 0}
    assert points(folder) == pytest.approx(expected | {("step", 1): 1, ("reward", 1): 0.25})
    again.close(finished=False)


class FakeWandb(types.ModuleType):
    """Keeps a run's points by its id, as the server does; the step must grow."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.runs = {}

    def init(self, id, resume, **settings):
        assert resume == "allow"
        self.points = self.runs.setdefault(id, {})
        return self

    @property
    def step(self):
        return max(self.points, default=-1) + 1

    def log(self, row, step):
        assert step >= self.step, "W&B drops this point"
        self.points[step] = dict(row)

    def finish(self):
        self.finished = True


def test_wandb_gets_again_what_a_killed_run_had_not_sent(here, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train(track="wandb", steps=3, eval_dataset=None)
    (points,) = wandb.runs.values()
    complete = {step: dict(row) for step, row in points.items()}
    assert sorted(complete) == [0, 1, 2] and wandb.finished
    for step in (1, 2):
        del points[step]
    records.Records(small(track="wandb", steps=5), {"dropped_problems": {}}, (), 3)
    assert wandb.runs == {next(iter(wandb.runs)): complete}, "the same run, and all its points"
    records.Records(small(track="wandb", name="other"), {"dropped_problems": {}}, (), 0)
    assert len(wandb.runs) == 2


def test_a_tracker_that_is_not_installed_is_an_early_error(monkeypatch):
    monkeypatch.setattr(records.importlib.util, "find_spec", lambda name: None)
    check_tracker("no")
    with pytest.raises(ValueError, match="--track wandb needs `pip install wandb`"):
        check_tracker("wandb")


# ------------------------------------------------------------------------------ curves


def test_curves_show_what_a_run_has_and_no_more(tmp_path, monkeypatch):
    """Here a reward of one's own: there is no accuracy, and nothing is right or wrong."""
    rows = [{"step": step, "reward": step / 10, "length": 5, "gap": 1e-4} for step in range(4)]
    rows[0]["eval_reward"] = 0.1
    rows.append({"step": 4, "eval_reward": 0.2, "length_right": None})  # after the last step
    append_rows(tmp_path / "metrics.jsonl", rows)
    labels, plot = [], Axes.plot

    def noting(axis, xs, ys, label, **settings):
        labels.append((label, tuple(xs)))
        return plot(axis, xs, ys, label=label, **settings)

    monkeypatch.setattr(Axes, "plot", noting)
    plot_curves(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    steps = (0, 1, 2, 3)
    assert labels == [("training", steps), ("held-out", (0, 4)), ("all", steps), ("", steps)]
