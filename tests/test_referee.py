"""findings/referee.py: it passes Dr. GRPO, and names what is wrong with anything else."""

import json
import sys
from pathlib import Path

import pytest

from findings import referee
from findings.referee import Trainer, from_file, import_theirs, judge, ours
from tests.helpers import ROOT

# A trainer of one's own, as somebody else would write it. Each test breaks one line of it.
MINE = """
import torch

def loss(logprobs, old_logprobs, sampler_logprobs, advantages, mask, settings):
    ratio = (logprobs - old_logprobs).exp()
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    clipped = ratio.clamp(1 - settings.clip_eps, 1 + settings.clip_eps)
    each = -torch.min(ratio * advantages, clipped * advantages)
    constant = settings.responses * settings.max_response_tokens
    return (each * mask).sum() / constant * settings.ranks

def advantages(rewards, mask):
    return (rewards - rewards.mean(dim=1, keepdim=True)).flatten()
"""
SUM, CONSTANT = "(each * mask).sum() / constant", "settings.responses * settings.max_"
CLIP = "torch.min(ratio * advantages, clipped * advantages)"
MEAN, RANKS = "rewards.mean(dim=1, keepdim=True)", " * settings.ranks"
SABOTAGES = {
    "divides by the response's length": (SUM, "((each * mask).sum(1) / mask.sum(1)).mean()"),
    "divides by lengths of other responses": ("constant =", "constant = mask.sum() #"),
    "padding": ("settings.max_response_tokens", "mask.shape[1]"),
    "divides by the std": (".flatten", ".div(rewards.std(1, keepdim=True) + 1e-8).flatten"),
    "takes its baseline over tokens": (
        MEAN, "(rewards * mask.sum(1).view_as(rewards)).sum(1, True) / mask.sum()"
    ),
    "does not train EOS": ("each * mask", "each[:, :-1] * mask[:, 1:]"),
    "does not train truncated": ("each * mask", "each * mask * (torch.arange(mask.shape[1]) < 2)"),
    "changes with equal micro-batches": (CONSTANT, "len(mask) * settings.max_"),
    "changes with unequal micro-batches": (
        CONSTANT, "len(mask) * settings.micro_batches * settings.ranks * settings.max_"
    ),
    "changes with ranks": (RANKS, ""),
    "order": ("(each * mask).sum()", "(each * mask)[1:].sum()"),
    "length of groups without signal": ("constant =", "constant = settings.tokens #"),
    "clips A > 0: high, A < 0: high": (CLIP, "(torch.min(ratio, clipped) * advantages)"),
    "clips A > 0: none, A < 0: none": (CLIP, "ratio * advantages"),
    "": (RANKS, f"{RANKS} + (0 * logprobs / mask).sum()"),  # nan is wrong somehow
}  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    """Without the two problems, of which 1225 pairs of groups are listed."""
    cases = {name: case for name, case in referee.CASES.items() if len(case) == 1}
    monkeypatch.setattr(referee, "CASES", cases)


def written(folder, old="", new="") -> Trainer:
    """The trainer above, with one change."""
    assert old in MINE
    path = folder / "mine.py"
    path.write_text(MINE.replace(old, new) if old else MINE)
    return Trainer("mine", from_file(f"{path}:loss"), from_file(f"{path}:advantages"))


@pytest.mark.parametrize("what", SABOTAGES)
def test_what_is_wrong_is_named(quick, tmp_path, what):
    found = judge(written(tmp_path, *SABOTAGES[what]))
    assert found["wrong"] and what in found["verdict"], found


def test_equal_micro_batches_may_be_all_that_a_trainer_makes(quick, tmp_path):
    path = written(tmp_path, *SABOTAGES["changes with unequal micro-batches"]).loss
    assert judge(Trainer("mine", path, equal=True))["verdict"] == "exact"


@pytest.mark.slow
def test_ours_is_exact_and_the_half_fixes_are_not():
    found = {trainer.name: judge(trainer) for trainer in ours()}
    assert [record["verdict"] for record in found.values()] == [
        "exact",
        "divides by the response's length",
        "divides by the std",
        "divides by the response's length; divides by the std",
    ]
    cases = [record["cases"].values() for record in found.values()]
    angles = [[case["angle"] > 0.01 for case in three] for three in cases]
    assert angles == [[False] * 3, [True] * 3, [False, True, True], [True] * 3]


@pytest.mark.parametrize("change, verdict, code", [
    (("", ""), "exact", 0),
    (("settings.max_response_tokens", "1"), "right up to the factor 3", 0),
    (SABOTAGES["changes with ranks"], "changes with ranks", 1),
])  # fmt: skip
def test_a_loss_of_ones_own_is_judged(quick, tmp_path, monkeypatch, capsys, change, verdict, code):
    written(tmp_path, *change)
    path = str(tmp_path / "mine.py")
    command = ["referee.py", f"{path}:loss", "--advantages", f"{path}:advantages"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        referee.main()
    assert ended.value.code == code
    assert capsys.readouterr().out.endswith(f": {verdict}\n")


@pytest.mark.parametrize("text", ["none.py:loss", "mine.py:none", "mine.py"])
def test_a_function_that_is_not_there_is_an_error(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    written(tmp_path)
    with pytest.raises(SystemExit, match="there is no file|has no function"):
        from_file(text)


def test_a_trainer_that_is_not_installed_is_named_and_what_it_does_not_use_is_left_hollow(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "theirs").mkdir()
    text = (
        "import no_engine.parts\nfrom no_server import Base, retry\n"
        "class Learner(Base):\n    @retry(times=3)\n    def answer(self): return 42\n"
    )
    (tmp_path / "theirs" / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(referee.HOLLOW, "names", set())
    monkeypatch.setattr(referee, "RESULTS", tmp_path / "referee.json")
    (tmp_path / "referee.json").write_text('{"trainers": {"before": {}}}')
    missing = lambda: import_theirs("no_trainer.loss")
    monkeypatch.setattr(referee, "TRAINERS", {"another": missing})
    assert referee.judge_all() == {"trainers": {"before": {}}}, "others' results are kept"
    assert "another is not called: No module named 'no_trainer'" in capsys.readouterr().out
    assert import_theirs("theirs").Learner().answer() == 42
    assert referee.HOLLOW.names == {"no_engine", "no_server"}


@pytest.mark.project
def test_the_page_has_the_results():
    record = json.loads(Path(referee.RESULTS).read_text())
    page = (ROOT / "findings" / "referee.md").read_text()
    assert referee.table(record) in page and referee.deviations(record) in page
    packages = {name.split()[0] for name in record["trainers"]}
    assert packages == {"drgrpo.py", "trl", "verl", "openrlhf", "areal", "oat-llm"}
