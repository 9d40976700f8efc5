"""Facts about forks/: each diff applies to drgrpo.py as it is and does what forks/README.md says.

A fork is made from a copy of drgrpo.py and imported beside it, under another name.
"""

import importlib.util
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

import drgrpo
from forks.format_bonus import format_bonus
from support.data import Problem
from test_drgrpo import BoxGrader, distance_after_scaling
from tests.helpers import ROOT, FakeSampler, assert_same, launch, read_jsonl, tiny_model
from tests.test_engine import gap

pytestmark = pytest.mark.project

FORKS = ROOT / "forks"
README = (FORKS / "README.md").read_text()
DIFFS = sorted(path.stem for path in FORKS.glob("*.diff"))
each_diff = pytest.mark.parametrize("name", DIFFS)


def apply(name, folder):
    """Apply a diff in a folder that has drgrpo.py; returns git's process."""
    # git would skip the files of a repository that the folder happens to be in
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", FORKS / f"{name}.diff"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="session")
def fork(tmp_path_factory):
    """fork(name) is drgrpo.py with that diff, as a module; fork("drgrpo") is as it is."""
    forks: dict[str, ModuleType] = {"drgrpo": drgrpo}

    def make(name):
        if name not in forks:
            folder = tmp_path_factory.mktemp(name)
            shutil.copy(ROOT / "drgrpo.py", folder)
            applied = apply(name, folder)
            assert applied.returncode == 0, f"forks/{name}.diff does not apply: {applied.stderr}"
            spec = importlib.util.spec_from_file_location(f"fork_{name}", folder / "drgrpo.py")
            forks[name] = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = forks[name]  # dataclasses look there
            spec.loader.exec_module(forks[name])
        return forks[name]

    return make


def config_of(module, **settings):
    """The toy's settings, as this module has them."""
    return replace(module.PRESETS["toy"][1], **settings)


# --------------------------------------------------------------------------- all of them


@each_diff
def test_a_diff_fits_one_place_wherever_other_lines_are_added(name):
    script = (ROOT / "drgrpo.py").read_text()
    for hunk in re.split(r"^@@.*\n", (FORKS / f"{name}.diff").read_text(), flags=re.M)[1:]:
        replaced = [line[1:] + "\n" for line in hunk.splitlines() if not line.startswith("+")]
        assert script.count("".join(replaced)) == 1, hunk


@each_diff
def test_a_diff_is_small_and_keeps_the_style(fork, name):
    added = re.findall(r"^\+(?!\+\+ )", (FORKS / f"{name}.diff").read_text(), re.M)
    assert f"| [{name}](#{name}) | {len(added)} lines |" in README
    for command in (["check"], ["format", "--check"]):
        ruff = ["-m", "ruff", *command, "--config", ROOT / "pyproject.toml", fork(name).__file__]
        done = subprocess.run([sys.executable, *ruff], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_every_fork_is_explained_and_has_a_command_that_it_understands(fork):
    titles = re.findall(r"^## (.*)$", README, re.M)
    assert sorted(titles) == sorted([*DIFFS, "format_bonus"])
    for title, text in zip(titles, re.split(r"^## ", README, flags=re.M)[1:], strict=True):
        (command,) = re.findall(r"^    python drgrpo.py (.*)$", text, re.M)
        module = fork("drgrpo" if title == "format_bonus" else title)
        config = drgrpo.tyro.extras.overridable_config_cli(module.PRESETS, args=command.split())
        assert config.name == title.replace("_", "-")


# --------------------------------------------------------------------------- the maths


def expected_gradients(module, **settings):
    """As in test_drgrpo.py, but through all that makes an update of rewards.

    (expected gradient of -loss, gradient of the expected reward) of a tiny policy that writes EOS;
    1 EOS; or 1 1, which is truncated. All groups of 2 are listed.
    """
    size, model = 2, tiny_model(vocab_size=2)
    usual = dict(prompts_per_step=1, samples_per_prompt=size, responses_per_update=size)
    config = config_of(module, max_response_tokens=2, tis_cap=None, **usual | settings)
    policy, expected_reward, gradient = module.Policy(model), 0, 0
    for prompt, rewards in (([1], [0.9, 1.0, 0.3]), ([0, 1], [0, 0, 1.0])):
        responses = ([0], [1, 0], [1, 1])
        batch = module.collate([module.Rollout(0, prompt, r, [0.0] * len(r)) for r in responses])
        probability = policy(batch.ids, batch.response_mask).sum(dim=1).exp()
        expected_reward = expected_reward + (probability * torch.tensor(rewards)).sum()
        for group in itertools.product(range(3), repeat=size):
            rollouts = []
            for i in group:
                ids, reason = responses[i], "stop" if 0 in responses[i] else "length"
                rollout = module.Rollout(0, prompt, ids, [0.0] * len(ids), "", reason, rewards[i])
                rollouts.append(rollout)
            enter_advantages(module, rollouts, config)
            model.zero_grad()
            for micro_batch in module.split_updates(rollouts, config, 0, 0, 1)[0]:
                module.forward_backward(policy, micro_batch, config)
            flat = torch.cat([weight.grad.flatten() for weight in model.parameters()])
            gradient = gradient - probability[list(group)].prod().detach() * flat
    exact = torch.autograd.grad(expected_reward, model.parameters())
    return gradient, torch.cat([part.flatten() for part in exact])


def enter_advantages(module, rollouts, config):
    """As train_step does it: the lines are taken from there."""
    source = open(module.__file__).read()
    (lines,) = re.findall(r"^    rewards = torch.*?(?=^    with timed)", source, re.M | re.S)
    exec(
        re.sub("^    ", "", lines, flags=re.M),
        vars(module) | dict(rollouts=rollouts, config=config),
    )


@pytest.mark.parametrize("name, biased, settings", [
    ("drgrpo", False, {}),
    ("drgrpo", True, {"divide_by_length": True}),
    ("clip-higher", False, {}),
    ("gspo", False, {}),
    ("gspo", True, {"divide_by_length": True}),
    ("token-mean", True, {}),
    ("mask-truncated", True, {}),
    ("kl-to-base", False, {}),
    ("transformers-sampler", False, {}),
])  # fmt: skip
def test_the_expected_gradient_is_biased_where_the_readme_says_so(
    ranks, fork, name, biased, settings
):
    distance = distance_after_scaling(*expected_gradients(fork(name), **settings))
    assert (distance > 0.005) if biased else (distance < 1e-5)
    row = README.partition(f"| [{name}](#{name})")[2].partition("\n")[0]
    assert name == "drgrpo" or settings or ("**biased**" in row) == biased


def loss_of(module, logprobs, advantages, mask=None, denominator=1.0, **settings):
    """(loss, its slope against each log-prob, sums); the old log-probs are 0."""
    logprobs = torch.tensor(logprobs, requires_grad=True)
    mask = torch.ones_like(logprobs) if mask is None else torch.tensor(mask)
    zeros, advantages = torch.zeros_like(logprobs), torch.tensor(advantages)
    loss, sums = module.drgrpo_loss(logprobs, zeros, advantages, mask, denominator, **settings)
    loss.backward()
    return loss.item(), logprobs.grad, sums


def test_clip_higher_clips_at_another_ratio_above_one(fork):
    module = fork("clip-higher")

    def slope(ratio, advantage, high):
        _, slopes, _ = loss_of(module, [[math.log(ratio)]], [advantage], clip_eps_high=high)
        return round(slopes.item(), 4)

    assert slope(1.25, 1.0, high=0.28) == -1.25, "a ratio between the two clips has a gradient"
    assert slope(1.25, 1.0, high=0.2) == slope(1.25, 1.0, high=None) == slope(1.3, 1.0, 0.28) == 0
    assert slope(0.75, -1.0, high=0.28) == 0 and slope(0.85, -1.0, high=0.28) == 0.85


def test_gspo_has_one_ratio_for_a_response(fork):
    """With the division by the length it is GSPO's formula; clipped and unclipped responses."""
    logs, mask = [[0.3, -0.1, 9.0], [0.2, 0.6, 0.4]], [[1, 1, 0], [1, 1, 1]]
    ratio = math.exp(0.1)  # of the mean over the first one's 2 tokens; the second is above 1.2
    module, both = fork("gspo"), [1.0, 2.0]
    loss, slopes, sums = loss_of(module, logs, both, mask, 2, divide_by_length=True)
    assert loss == pytest.approx(-(ratio + 2 * 1.2) / 2)
    expected = torch.tensor([[-ratio / 2 / 2, -ratio / 2 / 2, 0.0], [0.0] * 3])
    torch.testing.assert_close(slopes, expected)
    assert sums["clipped"] == 3, "all tokens of the second response"
    k3 = sum(math.exp(x) - 1 - x for x in (0.3, -0.1, 0.2, 0.6, 0.4))
    assert sums["kl"].item() == pytest.approx(k3, rel=1e-5), "kl stays that of the tokens"
    loss, slopes, _ = loss_of(module, logs, both, mask, 2)
    assert loss == pytest.approx(-(2 * ratio + 3 * 2 * 1.2) / 2)
    torch.testing.assert_close(slopes, expected * 2)
    weights = torch.tensor([[0.5, 2.5, 9.0], [1.0, 1.0, 1.0]])
    _, slopes, _ = loss_of(module, logs, both, mask, 2, importance_weights=weights)
    torch.testing.assert_close(slopes, expected * 2 * 1.5), "times the mean of 0.5 and 2.5"


@pytest.mark.parametrize("world", [1, 3])
def test_the_token_mean_counts_the_tokens_of_all_ranks(fork, world):
    module = fork("token-mean")
    settings = dict(prompts_per_step=6, responses_per_update=24, tokens_per_microbatch=60)
    rollouts = [
        module.Rollout(i, [5] * 9, [6] * (1 + i % 7), [0.0] * (1 + i % 7), advantage=float(i % 2))
        for i in range(48)
    ]
    config, draws = config_of(module, **settings), []
    for rank in range(world):
        for batches in module.split_updates(rollouts, config, 0, rank, world):
            (found,) = {batch.denominator for batch in batches}
            draws.append(found)
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    assert draws == draws[:2] * world and sum(draws[:2]) == tokens
    by_length = replace(config, divide_by_length=True)
    assert module.split_updates(rollouts, by_length, 0, 0, 1)[0][0].denominator == 24


def test_the_kl_to_base_is_k3_and_has_the_slope_of_the_other_kl(fork):
    module, logs, base = fork("kl-to-base"), [[0.5, 0.0, -1.0, 7.0]], [[0.0, 0.0, 0.0, math.nan]]
    settings = dict(base_logprobs=torch.tensor(base), kl_beta=0.5)
    loss, slopes, sums = loss_of(module, logs, [0.0], [[1, 1, 1, 0]], 10, **settings)
    k3 = sum(math.exp(x) - 1 - x for x in (-0.5, 0.0, 1.0))
    assert loss == pytest.approx(0.5 * k3 / 10)
    assert sums["kl_to_base"].item() == pytest.approx(k3)
    expected = torch.tensor([[1 - math.exp(-0.5), 0, 1 - math.exp(1), 0]]) * 0.5 / 10
    torch.testing.assert_close(slopes, expected)
    # On average over the tokens that the policy draws the estimate is KL(policy || base), and its
    # slope is that of KL(base || policy)
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    policy, frozen = logits[0].log_softmax(0), logits[1].log_softmax(0).detach()
    one, mean = torch.ones(1, 1), 0.0
    for logprob, of_base in zip(policy, frozen, strict=True):
        arguments = (logprob.view(1, 1), logprob.detach().view(1, 1), torch.zeros(1), one, 1.0)
        loss, _ = module.drgrpo_loss(*arguments, base_logprobs=of_base.view(1, 1), kl_beta=1.0)
        mean = mean + logprob.exp().detach() * loss
    assert mean.item() == pytest.approx((policy.exp() * (policy - frozen)).sum().item(), rel=1e-5)
    (slope,) = torch.autograd.grad(mean, logits, retain_graph=True)
    (other,) = torch.autograd.grad((frozen.exp() * (frozen - policy)).sum(), logits)
    assert_same(other, slope)


# --------------------------------------------------------------------------- a step of each


@pytest.mark.parametrize("name", [name for name in DIFFS if name != "transformers-sampler"])
def test_a_fork_makes_a_step(toy, ranks, fork, name, tmp_path):
    module = fork(name)
    tiny_model().save_pretrained(tmp_path)
    settings = dict(prompts_per_step=4, samples_per_prompt=4, responses_per_update=8)
    config = config_of(module, max_response_tokens=12, **settings)
    policy, *base = [
        module.make_policy(replace(config, model=str(tmp_path)))
        for _ in range(2 if name == "kl-to-base" else 1)
    ]
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-2)
    problems = [Problem(f"p{i}", [5, i], ["1"]) for i in range(4)]
    metrics, rollouts = module.train_step(
        config, 3, problems, policy, optimizer, FakeSampler(policy), BoxGrader(), *base
    )
    assert metrics["grad_norm"] > 0 and math.isfinite(metrics["loss"]) and metrics["kl"] > 1e-4
    cut = [rollout for rollout in rollouts if rollout.finish_reason == "length"]
    assert cut and any(rollout.advantage for rollout in cut) == (name != "mask-truncated")
    if name == "kl-to-base":
        assert metrics["kl_to_base"] > 1e-4 and metrics["kl_to_base"] != metrics["kl"]


def test_the_sampler_of_transformers_gives_ids_log_probs_endings_and_takes_weights(
    toy, ranks, fork, tmp_path
):
    module, model = fork("transformers-sampler"), str(toy / "model")
    policy = module.make_policy(config_of(module))
    sampler = module.Sampler(model, 136, 0, reserve=0, sequences=8, can_sleep=True)
    ids = sampler.tokenizer("What is 7-4+5-2?\n")["input_ids"]
    problems, seeds = [Problem("", ids, ["6"]), Problem("", ids[:3], ["6"])], [11, 12]
    for temperature, stop in ((1.0, ()), (1.5, ("=", "boxe")), (0.0, ())):
        n = 4 if temperature else 1
        groups = sampler.generate(problems, seeds, n, 30, temperature, stop)
        alone = sampler.generate(problems[1:], seeds[1:], n, 30, temperature, stop)
        assert [r.response_ids for r in groups[1]] == [r.response_ids for r in alone[0]]
        rollouts = [rollout for group in groups for rollout in group]
        assert [r.problem for r in rollouts] == [0] * n + [1] * n
        drgrpo.check_endings(rollouts, model, stop)
        assert all(len(r.response_ids) == 30 for r in rollouts if r.finish_reason == "length")
        for string in stop:  # "boxe" is a part of a token
            assert any(r.text.endswith(string) for r in rollouts)
            assert all(string not in r.text[:-1] or r.text.endswith(string) for r in rollouts)
        if temperature:
            assert len({r.text for r in groups[0]}) > 1
            assert gap(policy, rollouts, temperature) < 1e-4
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1.1)
    (stale, _) = sampler.generate(problems, seeds, 4, 30, 1.0, ())
    sampler.sleep()
    sampler.wake(policy)
    (fresh, _) = sampler.generate(problems, seeds, 4, 30, 1.0, ())
    assert gap(policy, stale) > 0.01 and gap(policy, fresh) < 1e-4
    sampler.close()


# --------------------------------------------------------------------------- whole runs

WITHOUT_VLLM = """
import runpy, sys
sys.modules["vllm"] = None  # importing it raises ImportError
sys.argv = ["drgrpo.py", *sys.argv[1:]]
runpy.run_path("drgrpo.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name, ranks, command, settings", [
    ("transformers-sampler", 1, ("-c", WITHOUT_VLLM), {}),
    ("kl-to-base", 2, ("drgrpo.py",), {"kl_beta": 0.04}),
])  # fmt: skip
def test_a_fork_makes_a_whole_run(toy_here, tmp_path, name, ranks, command, settings):
    for file in ("drgrpo.py", "templates.py"):
        shutil.copy(ROOT / file, tmp_path)
    assert apply(name, tmp_path).returncode == 0
    small = dict(steps=2, prompts_per_step=8, responses_per_update=32, eval_dataset="None")
    launch(ranks, *command, "toy", folder=tmp_path, **small | settings)
    rows = read_jsonl(tmp_path / "runs" / "toy" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1] and max(row["gap"] for row in rows) < 1e-4
    if name == "kl-to-base":
        assert 0 < rows[0]["kl_to_base"] < 0.1 and rows[1]["kl_to_base"] > 0


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
