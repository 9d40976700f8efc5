"""Whatever breaks between trainer and sampler stops the run within one step.

Each test breaks one thing of a small run with a real engine, whose prompts are longer than a block
of vLLM's prefix cache, and makes two steps.
"""

import copy
from dataclasses import replace
from unittest import mock

import pytest
import torch

import drgrpo
from drgrpo import Sampler, collate, full_weights, train_step
from support.data import Problem
from support.grader import Verdict
from support.guards import check_endings, eos_ids
from templates import TEMPLATES
from tests.helpers import LONG

# Two blocks of 128 tokens are the same in all
PROBLEMS = [Problem("", [*LONG[:280], i], ["1"]) for i in range(5, 9)]


class AnyGrader:
    """A reward that says nothing of the problem, but is not the same for all responses."""

    # Some letters end a response, or all would be truncated and get the same reward
    template = replace(TEMPLATES["none"], stop=tuple("aeiou13579"))

    def start(self, responses, answers, rows):
        pass

    def verdicts(self, responses, answers, rows):
        return [Verdict(float(sum(map(ord, text)) % 2), None) for text in responses]


class Steps:
    """Steps of a run, at a learning rate that moves the log-probs."""

    def __init__(self, sampler, policy, config):
        self.sampler, self.policy = sampler, policy
        changed = dict(prompts_per_step=2, samples_per_prompt=8, responses_per_update=16)
        self.config = replace(config, **changed, lr=1e-2, max_gap=1e-3)
        self.optimizer = torch.optim.AdamW(policy.parameters(), self.config.lr, weight_decay=0.0)
        self.step = 0

    def __call__(self):
        """The next step's metrics."""
        parts = (self.policy, self.optimizer, self.sampler, AnyGrader())
        metrics, _ = train_step(self.config, self.step, PROBLEMS, *parts)
        self.step += 1
        return metrics

    def gap(self):
        """Largest difference of a log-prob, as policy and engine are now."""
        group = draw(self.sampler)
        batch = collate(group)
        logprobs = self.policy(batch.ids, batch.response_mask).detach()
        self.policy.reshard()  # as a backward pass does
        return (logprobs - batch.sampler_logprobs).abs().max().item()


def draw(sampler, prompt=LONG, seed=0, n=4):
    return sampler.generate([Problem("", prompt, ["1"])], [seed], n, 20, 1.0, ())[0]


@pytest.fixture
def steps(engine, tmp_path, monkeypatch):
    sampler, policy, config = engine
    before = copy.deepcopy(policy.state_dict())
    sampler.wake(policy)
    monkeypatch.chdir(tmp_path)  # where a step that fails leaves its responses
    yield Steps(sampler, policy, config)
    monkeypatch.undo()
    policy.reshard()  # a refused update did not
    policy.zero_grad()
    policy.load_state_dict(before)
    sampler.wake(policy)


CAUSES = (
    "differ by .*above max_gap 0.001. Likely causes: .*old weights.*prefix cache.*not sent.*temp"
)


def test_steps_that_nobody_broke_show_no_gap(steps):
    metrics = [steps() for _ in range(3)]
    assert max(row["gap"] for row in metrics) < 1e-5
    assert min(row["weights_moved"] for row in metrics) > 0.5


def test_a_skipped_sync_is_caught_in_the_next_step(steps, monkeypatch, tmp_path):
    monkeypatch.setattr(Sampler, "wake", lambda sampler, policy: None)
    steps()
    weights = copy.deepcopy(steps.policy.state_dict())
    with pytest.raises(RuntimeError, match=f"step 1: .*{CAUSES}"):
        steps()
    for name, weight in steps.policy.state_dict().items():
        assert torch.equal(weight.full_tensor(), weights[name].full_tensor()), "no update was made"
    assert (tmp_path / steps.config.folder / "failed_step.jsonl").exists()


def test_a_prefix_cache_of_old_weights_is_caught_in_the_next_step(steps, monkeypatch):
    monkeypatch.setattr(steps.sampler.llm, "reset_prefix_cache", lambda: True)
    draw(steps.sampler, PROBLEMS[0].prompt_ids)
    steps()
    with pytest.raises(RuntimeError, match=CAUSES):
        steps()


def test_what_is_cached_is_forgotten_before_each_sampling(steps, monkeypatch):
    """So that a prompt which was seen before is sampled to the bit as one which was not."""
    llm, calls = steps.sampler.llm, []

    def noting(owner, name):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: calls.append(name) or original(*given))

    noting(llm, "reset_prefix_cache")
    noting(llm.llm_engine, "add_request")
    first, again = draw(steps.sampler), draw(steps.sampler)
    assert calls == ["reset_prefix_cache", "add_request"] * 2
    assert [r.response_ids for r in first] == [r.response_ids for r in again]
    assert [r.sampler_logprobs for r in first] == [r.sampler_logprobs for r in again]


def test_another_temperature_of_the_sampler_is_caught_at_once(steps, monkeypatch):
    generate = Sampler.generate

    def hotter(sampler, problems, seeds, n, max_tokens, temperature, *rest):
        return generate(sampler, problems, seeds, n, max_tokens, 1.2 * temperature, *rest)

    monkeypatch.setattr(Sampler, "generate", hotter)
    with pytest.raises(RuntimeError, match=f"step 0: .*{CAUSES}"):
        steps()


def test_another_temperature_of_the_trainer_is_caught_at_once(steps, monkeypatch):
    logprobs = drgrpo.token_logprobs
    monkeypatch.setattr(drgrpo, "token_logprobs", lambda *given: logprobs(*given[:3], 1.0))
    steps.config = replace(steps.config, temperature=0.8)
    with pytest.raises(RuntimeError, match=CAUSES):
        steps()


def test_another_prompt_is_caught_at_once(steps, monkeypatch):
    """As with a second BOS, of which the trainer knows nothing."""
    generate = Sampler.generate

    def with_bos(sampler, problems, *rest):
        longer = [replace(problem, prompt_ids=[1, *problem.prompt_ids]) for problem in problems]
        groups = generate(sampler, longer, *rest)
        return [[replace(r, prompt_ids=r.prompt_ids[1:]) for r in group] for group in groups]

    monkeypatch.setattr(Sampler, "generate", with_bos)
    with pytest.raises(RuntimeError, match=CAUSES):
        steps()


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",  # tied to the embedding, of which the CPU engine has a packed copy
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    ],
)
def test_an_old_large_tensor_is_caught_in_the_next_step(steps, monkeypatch, name):
    send, first = drgrpo.full_weights, {}
    for key, weight in send(steps.policy.model, torch.float32):
        first[key] = weight.clone()

    def stale(model, dtype):
        for key, weight in send(model, dtype):
            yield key, first[key] if key == name else weight

    monkeypatch.setattr(drgrpo, "full_weights", stale)
    steps()
    with pytest.raises(RuntimeError, match=CAUSES):
        steps()


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_a_tensor_that_is_not_sent_is_named(steps, monkeypatch, name):
    """A norm's weights move too little for the gap."""
    send = drgrpo.full_weights
    monkeypatch.setattr(
        drgrpo,
        "full_weights",
        lambda model, dtype: ((key, weight) for key, weight in send(model, dtype) if key != name),
    )
    with pytest.raises(RuntimeError, match=f"not those of the model: {name}"):
        steps()
    monkeypatch.undo()
    steps.sampler.wake(steps.policy)
    assert steps.gap() < 1e-4


def zero(worker):
    for tensor in worker.get_model().parameters():
        tensor.data.zero_()


def test_an_engine_whose_weights_were_zeroed_gets_all_of_them_back(steps):
    """As vLLM's is after a sleep of level 2."""
    llm = steps.sampler.llm
    zeros = ((k, torch.zeros_like(w)) for k, w in full_weights(steps.policy.model, torch.float32))
    settings = {"weights_iterator": zeros, "is_checkpoint_format": True}
    llm.collective_rpc("reload_weights", kwargs=settings)
    llm.collective_rpc(zero)
    assert steps.gap() > 0.1
    with pytest.raises(RuntimeError, match=CAUSES):
        steps()
    steps.sampler.wake(steps.policy)
    assert steps.gap() < 1e-4


def test_a_response_whose_eos_was_dropped_is_caught_at_once(steps, monkeypatch):
    """Every other token is right, so the gap says nothing."""
    engine = steps.sampler.llm.llm_engine
    step = engine.step

    def dropping_step():
        outputs = step()
        for response in (response for output in outputs for response in output.outputs):
            if response.finish_reason == "stop":
                response.token_ids = response.token_ids[:-1]
        return outputs

    ended = [r for seed in range(4) for r in draw(steps.sampler, [5, 6], seed, n=16)]
    assert any(r.finish_reason == "stop" for r in ended)
    monkeypatch.setattr(engine, "step", dropping_step)
    with pytest.raises(RuntimeError, match="a response stopped, but .* would not learn to stop"):
        for seed in range(4):
            draw(steps.sampler, [5, 6], seed, n=16)
    monkeypatch.undo()
    while engine.has_unfinished_requests():
        engine.step()


@pytest.mark.parametrize("reason, ids, text, fine", [
    ("stop", [7, 0], "", True),
    ("stop", [7, 1], "", True),  # the second of two EOS
    ("stop", [7, 8], "so </answer>", True),
    ("stop", [7, 8], "so </answer> and", False),
    ("stop", [0, 7], "", False),
    ("stop", [], "", False),
    ("length", [7, 8], "", True),
])  # fmt: skip
def test_a_response_that_stopped_ends_in_eos_or_a_stop_string(reason, ids, text, fine):
    rollout = drgrpo.Rollout(0, [5], ids, [0.0] * len(ids), text, reason)
    if fine:
        check_endings([rollout], {0, 1}, ("</answer>",))
    else:
        with pytest.raises(RuntimeError, match="neither EOS"):
            check_endings([rollout], {0, 1}, ("</answer>",))


def test_the_engines_own_eos_are_known(steps):
    llm = mock.Mock()
    for eos, tokenizers, expected in (([3, 4], 5, {3, 4, 5}), (0, 5, {0, 5}), (None, 5, {5})):
        llm.llm_engine.model_config.try_get_generation_config.return_value = {"eos_token_id": eos}
        llm.get_tokenizer.return_value.eos_token_id = tokenizers
        assert eos_ids(llm) == expected
    assert steps.sampler.eos_ids == {0}
