"""Facts about forks/: each diff applies to the tree as it is and does what its paragraph says.

A fork is made in a copy of the tree. What it promises is checked by a function of this file, which
a process of its own calls inside that copy, and by two steps of the toy.
"""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import drgrpo
from drgrpo import (
    Policy,
    collate,
    drgrpo_loss,
    forward_backward,
    group_advantages,
    make_policy,
    score,
    split_updates,
    train_step,
    update,
)
from forks.format_bonus import format_bonus
from support.data import Problem
from support.grader import Verdict
from support.ranks import start_ranks
from templates import TEMPLATES, find_template
from tests.helpers import (
    ROOT,
    TOY,
    FakeSampler,
    assert_same,
    launch,
    read_jsonl,
    some_rollouts,
    tiny_model,
)

FORKS = ROOT / "forks"
README = (FORKS / "README.md").read_text()
DIFFS = sorted(path.stem for path in FORKS.glob("*.diff"))
each_diff = pytest.mark.parametrize("name", DIFFS)

# ------------------------------------------------------------------- inside a fork: its promise


def gradient(policy: torch.nn.Module, batches: list, config) -> torch.Tensor:
    """The gradient that an update of these micro-batches has."""
    policy.zero_grad()
    for batch in batches:
        forward_backward(policy, batch, config)
    return torch.cat([weight.grad.flatten() for weight in policy.parameters()])


def a_policy(**settings):
    """A tiny model as the policy of a run, its optimizer, and the run's config."""
    start_ranks()
    with tempfile.TemporaryDirectory() as folder:
        tiny_model().save_pretrained(folder)
        config = replace(TOY, model=folder, **settings)
        policies = make_policy(config), make_policy(config)
    return *policies, torch.optim.SGD(policies[0].parameters(), config.lr), config


def clip_higher():
    def slope(ratio, advantage, high):
        """Of the loss, against the log-prob."""
        logprob = torch.tensor([[math.log(ratio)]], requires_grad=True)
        one = torch.ones(1, 1)
        loss, _ = drgrpo_loss(
            logprob, one * 0, torch.tensor([advantage]), one, 1.0, 0.2, clip_eps_high=high
        )
        loss.backward()
        return round(logprob.grad.item(), 4)

    assert slope(1.25, 1.0, high=0.28) == -1.25, "a ratio between the two clips has a gradient"
    assert slope(1.25, 1.0, high=0.2) == slope(1.3, 1.0, high=0.28) == 0
    assert slope(0.75, -1.0, high=0.28) == 0 and slope(0.85, -1.0, high=0.28) == 0.85
    start_ranks()
    policy = Policy(tiny_model())
    batch = collate([replace(rollout, advantage=1.0) for rollout in some_rollouts()])
    logprobs = policy(batch.ids, batch.response_mask).detach()
    batch.old_logprobs = logprobs - math.log(1.25) * batch.response_mask
    config = replace(TOY, tis_cap=None)
    assert config.clip_eps_high == 0.28
    assert gradient(policy, [batch], config).norm() > 0
    assert gradient(policy, [batch], replace(config, clip_eps_high=0.2)).norm() == 0


def leave_one_out():
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0)).double()
    ours = rewards - rewards.mean(dim=1, keepdim=True)
    torch.testing.assert_close(group_advantages(rewards), ours * 8 / 7, rtol=1e-12, atol=1e-12)
    first = rewards[0, 0] - rewards[0, 1:].mean()
    assert abs(group_advantages(rewards)[0, 0] - first) < 1e-12
    assert group_advantages(torch.tensor([[1.0, 0, 0, 0]])).tolist()[0][0] == 1
    for equal in (torch.full((2, 12), 1 / 3), torch.ones(3, 1)):  # one response: an evaluation
        assert torch.equal(group_advantages(equal), torch.zeros_like(equal))


def mask_truncated():
    policy, _, _, config = a_policy(
        prompts_per_step=3, samples_per_prompt=4, responses_per_update=12, tis_cap=None
    )
    problems = [Problem(f"p{i}", [5], ["1"]) for i in range(3)]

    def scored(is_cut):
        rollouts = []
        for i, rollout in enumerate(some_rollouts(12)):
            reason = "length" if is_cut(i) else "stop"
            rollouts.append(replace(rollout, problem=i // 4, finish_reason=reason, text=str(i)))
        right = lambda texts, *others: [Verdict(float(int(text) % 3 == 1), None) for text in texts]
        return score(SimpleNamespace(verdicts=right), problems, rollouts, 4, config)

    rollouts = scored(lambda i: i % 4 == 0)
    for group in groups_of(4, rollouts):
        mean = sum(rollout.reward for rollout in group) / 4
        assert group[0].reward == group[0].advantage == 0, "the first was cut off"
        assert [r.advantage for r in group[1:]] == [r.reward - mean for r in group[1:]]
    (batches,) = split_updates(rollouts, config, 0, 0, 1)
    kept = [rollout for rollout in rollouts if rollout.finish_reason == "stop"]
    assert sum(len(batch.problems) for batch in batches) <= len(kept)
    # The first update's gradient from its definition: N is 12, though 3 have left the loss
    by_hand = Policy(tiny_model())
    batch = collate(kept)
    logprobs = by_hand(batch.ids, batch.response_mask).sum(dim=1)
    (-(batch.advantages * logprobs).sum() / (12 * config.max_response_tokens)).backward()
    expected = torch.cat([weight.grad.flatten() for weight in by_hand.parameters()])
    assert_same(expected, full(gradient(policy, batches, config)))
    (batches,) = split_updates(scored(lambda i: True), config, 0, 0, 1)
    assert full(gradient(policy, batches, config)).norm() == 0, "all of them were cut off"


def kl_to_base():
    # The loss is larger by beta * k3, and its slope pulls each log-prob to the base model's
    logprobs = torch.tensor([[-1.0, -2.0, -3.0, 7.0]], requires_grad=True)
    base, mask = torch.tensor([[-1.5, -2.0, -2.0, float("nan")]]), torch.tensor([[1, 1, 1, 0]])
    arguments = logprobs, logprobs.detach(), torch.zeros(1), mask, 10.0
    loss, sums = drgrpo_loss(*arguments, base_logprobs=base, kl_beta=0.5)
    k3 = sum(math.exp(r) - 1 - r for r in (-0.5, 0.0, 1.0))
    assert abs(loss.item() - 0.5 * k3 / 10) < 1e-6 and abs(sums["kl_to_base"].item() - k3) < 1e-5
    loss.backward()
    expected = torch.tensor([[1 - math.exp(-0.5), 0, 1 - math.exp(1), 0]]) * 0.5 / 10
    torch.testing.assert_close(logprobs.grad, expected)
    lengths, _ = drgrpo_loss(*arguments, divide_by_length=True, base_logprobs=base, kl_beta=0.5)
    assert abs(lengths.item() - 0.5 * k3 / 10 / 3) < 1e-6, "divided as the rest of the loss is"

    settings = dict(lr=0.01, kl_beta=0.5, tis_cap=None, max_gap=1e9, responses_per_update=6)
    policy, base, optimizer, config = a_policy(
        prompts_per_step=3, samples_per_prompt=4, max_response_tokens=20, **settings
    )
    base.requires_grad_(False)
    rollouts = [replace(rollout, advantage=0.0) for rollout in some_rollouts(12)]

    def learn():
        updates = split_updates(rollouts, config, 0, 0, 1)
        assert sum(len(b.problems) for batches in updates for b in batches) == 12
        drgrpo.ask_base(base, updates, config)
        return update(policy, optimizer, updates, config)

    still = learn()
    assert still["kl_to_base"] == still["grad_norm"] == 0, "the policy is the base model"
    before = [weight.full_tensor().clone() for weight in base.parameters()]
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1.05)
    found = [learn()["kl_to_base"] for _ in range(10)]
    assert 0 < found[-1] < found[0] / 2, found
    after = [weight.full_tensor() for weight in base.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def second_template():
    template = find_template("question", tokenizer=None)
    assert replace(TOY, template="question").template == template.name == "question"
    prompt = template.render("What is 1+1?")
    assert prompt.startswith("Question: What is 1+1?\n") and prompt.endswith("\nAnswer:")
    assert "\\boxed{}" in prompt
    response = " 1+1=2, so \\boxed{2}\nQuestion:"
    assert response.endswith(template.stop) and template.extract(response) == "2"


def lr_schedule():
    config = replace(TOY, lr=1.0, warmup_steps=4)
    rates = [drgrpo.learning_rate(config, step) for step in (0, 1, 3, 4, 100)]
    assert rates == [0.25, 0.5, 1, 1, 1]
    assert drgrpo.learning_rate(replace(config, steps=1000), 1) == 0.5
    assert drgrpo.learning_rate(replace(config, warmup_steps=1), 0) == 1
    policy, _, _, config = a_policy(
        prompts_per_step=2, samples_per_prompt=4, responses_per_update=4, max_response_tokens=9
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=123.0)  # as if another run had left it
    right = lambda texts, *others: [Verdict(float("1" in text), None) for text in texts]
    grader = SimpleNamespace(template=TEMPLATES["none"], start=lambda *_: None, verdicts=right)
    problems = [Problem(f"p{i}", [5, 6, i], ["1"]) for i in range(3)]
    sampler = FakeSampler(policy)
    metrics, _ = train_step(config, 4, problems, policy, optimizer, sampler, grader)
    assert {group["lr"] for group in optimizer.param_groups} == {metrics["lr"]}
    assert math.isclose(metrics["lr"], config.lr * 5 / 20)


PROMISES = {
    "clip-higher": clip_higher,
    "leave-one-out": leave_one_out,
    "mask-truncated": mask_truncated,
    "kl-to-base": kl_to_base,
    "second-template": second_template,
    "lr-schedule": lr_schedule,
}
INSIDE = """
from pathlib import Path
import drgrpo
from tests.test_forks import PROMISES
assert Path(drgrpo.__file__).parent == Path.cwd(), drgrpo.__file__
PROMISES[{name!r}]()
"""


def full(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.full_tensor()


def groups_of(size: int, rows: list) -> list[list]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


# ------------------------------------------------------------------------- outside: the forks


def git(*arguments, folder) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    return subprocess.run(
        ["git", *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A copy of the tree, with what is not committed yet and without what git ignores."""
    folder = tmp_path_factory.mktemp("forks") / "tree"
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", folder=ROOT)
    assert listed.returncode == 0, listed.stderr
    for name in listed.stdout.split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git("init", "--quiet", folder=folder)
    return folder


@pytest.fixture
def fork(tree, tmp_path):
    """fork(name) is a copy of the tree with that diff applied."""

    def make(name):
        folder = tmp_path / name
        shutil.copytree(tree, folder)
        if (FORKS / f"{name}.diff").exists():
            apply(name, folder)
        return folder

    return make


def apply(name, folder, *options):
    done = git("apply", *options, FORKS / f"{name}.diff", folder=folder)
    if done.returncode != 0:
        pytest.fail(
            f"forks/{name}.diff does not apply to drgrpo.py and templates.py as they are now: make "
            f"the change by hand and write `git diff -U1` into it.\n{done.stderr}"
        )


def changed_lines(name, sign):
    lines = (FORKS / f"{name}.diff").read_text().splitlines()
    return [line for line in lines if line[0] == sign and not line.startswith(sign * 3)]


def changed_files(name):
    return re.findall(r"^\+\+\+ b/(.*)$", (FORKS / f"{name}.diff").read_text(), re.MULTILINE)


def section(name):
    """The paragraph of forks/README.md on a fork."""
    return re.search(rf"^## {re.escape(name)}$(.*?)(?=^## |\Z)", README, re.M | re.S).group(1)


def test_every_fork_has_a_paragraph_with_a_command_and_its_facts():
    titles = re.findall(r"^## (.*)$", README, re.MULTILINE)
    there = [path.name for path in FORKS.iterdir() if path.suffix in (".diff", ".py")]
    assert sorted(titles) == sorted(there)
    assert set(PROMISES) == set(DIFFS) and set(RUNS) == set(DIFFS) | {"format_bonus"}
    for title in titles:
        assert "*For it:*" in section(title) and "*Against it:*" in section(title)


@each_diff
def test_a_diff_applies_to_the_tree_as_it_is_and_back(tree, fork, name):
    folder = fork(name)
    for file in changed_files(name):
        assert (folder / file).read_text() != (tree / file).read_text()
    apply(name, folder, "-R")
    for file in changed_files(name):
        assert (folder / file).read_text() == (tree / file).read_text()


@each_diff
def test_a_diff_is_small(name):
    assert len(changed_lines(name, "+")) <= (30 if name == "kl-to-base" else 10)
    assert len(changed_lines(name, "-")) <= 12


@each_diff
def test_a_fork_keeps_the_style(fork, name):
    folder = fork(name)
    for command in ("check", "format --check"):
        ruff = [sys.executable, "-m", "ruff", *command.split(), *changed_files(name)]
        done = subprocess.run(ruff, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"forks/{name}.diff: {done.stdout}{done.stderr}"


@each_diff
def test_a_fork_does_what_its_paragraph_says(fork, name):
    launch(1, "-c", INSIDE.format(name=name), folder=fork(name))


@pytest.mark.parametrize("response, reward", [
    ("It is \\boxed{4}", 1.1),
    ("It is \\boxed{\\frac{8}{2}}\n", 1.1),
    ("\\boxed{3} or \\boxed{4}", 1.0),
    ("\\boxed{4} is it", 1.0),
    ("It is \\boxed{5}", 0.1),
    ("\\boxed{5} is it", 0.0),
    ("It is 4", 0.0),
    ("", 0.0),
])  # fmt: skip
def test_the_format_bonus_is_for_one_box_at_the_end(response, reward):
    assert format_bonus(response, {"answer": "4"}) == pytest.approx(reward)


# ------------------------------------------------------------------- two steps of each command


def clip_higher_run(run, rows):
    assert '"clip_eps_high": 0.28' in (run / "config.json").read_text()
    assert all(0 <= row["clipped"] <= 1 for row in rows)


def leave_one_out_run(run, rows):
    for group in groups_of(8, read_jsonl(run / "samples.jsonl")):
        mean = sum(sample["reward"] for sample in group) / 8
        for sample in group:
            ours = sample["reward"] - mean
            assert sample["advantage"] == pytest.approx(ours * 8 / 7, abs=1e-6)


def mask_truncated_run(run, rows):
    samples = read_jsonl(run / "samples.jsonl")
    cut = [sample for sample in samples if sample["finish_reason"] == "length"]
    assert cut and all(sample["advantage"] == 0 for sample in cut)
    assert any(sample["advantage"] for sample in samples)


def format_bonus_run(run, rows):
    rewards = {round(s["reward"], 6) for s in read_jsonl(run / "samples.jsonl")}
    assert 0.1 in rewards and rewards <= {0, 0.1, 1, 1.1}
    assert all(row["errors"] == row["timeouts"] == 0 for row in rows)


def kl_to_base_run(run, rows):
    # At the first update the policy is the base model: only the second one is away from it
    assert 0 < rows[0]["kl_to_base"] < 0.1 and rows[1]["kl_to_base"] > 0


def second_template_run(run, rows):
    prompts = {sample["prompt"] for sample in read_jsonl(run / "samples.jsonl")}
    assert all(p.startswith("Question: What is") and p.endswith("\nAnswer:") for p in prompts)


def lr_schedule_run(run, rows):
    rates = [row["lr"] for row in rows if "lr" in row]
    assert rates == pytest.approx([TOY.lr * (step + 1) / 20 for step in range(len(rates))])


RUNS = {
    "clip-higher": clip_higher_run,
    "leave-one-out": leave_one_out_run,
    "mask-truncated": mask_truncated_run,
    "format_bonus": format_bonus_run,
    "kl-to-base": kl_to_base_run,
    "second-template": second_template_run,
    "lr-schedule": lr_schedule_run,
}
TINY = (
    "--prompts-per-step 4 --responses-per-update 16 --eval-dataset None --grader-workers 1"
).split()


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_command_of_a_fork_trains(toy, fork, name):
    folder = fork(name)
    (folder / "runs").mkdir()
    (folder / "runs" / "toy-base").symlink_to(toy)
    suffix = "py" if name == "format_bonus" else "diff"
    (command,) = re.findall(r"^    python (.*)$", section(f"{name}.{suffix}"), re.MULTILINE)
    words = shlex.split(command)
    run = folder / "runs" / words[words.index("--name") + 1]
    # Two ranks where a second model is sharded; a second command where a run must go on
    for steps in (2, 3) if name == "lr-schedule" else (2,):
        ranks = 2 if name == "kl-to-base" else 1
        launch(ranks, *words, *TINY, "--steps", steps, folder=folder, timeout=600)
        rows = [row for row in read_jsonl(run / "metrics.jsonl") if "reward" in row]
        assert [row["step"] for row in rows] == list(range(steps))
        assert all(row["weights_moved"] > 0 for row in rows)
        RUNS[name](run, rows)
