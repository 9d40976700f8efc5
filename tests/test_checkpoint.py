"""Facts about checkpoints: what is in them, and that there is always a whole one."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen2ForCausalLM,
)

import support.checkpoint
from drgrpo import collate, full_weights, make_policy
from support.checkpoint import save_model, weights_fingerprint
from support.logprobs import token_logprobs
from tests.helpers import TOY, some_rollouts, tiny_model


@pytest.fixture(scope="session")
def tokenizer(toy):
    return AutoTokenizer.from_pretrained(toy / "model")


def exports(folder):
    return sorted(file.name for file in (folder / "exports").iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_loads_with_the_same_logprobs(ranks, tokenizer, tmp_path, tied, dtype):
    base = tiny_model(len(tokenizer), tie_word_embeddings=tied).to(dtype)
    base.save_pretrained(tmp_path / "base")
    policy = make_policy(replace(TOY, model=str(tmp_path / "base")))
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(2)  # exact in bf16
    for step in (1, 2):
        weights = full_weights(policy.model, policy.model.config.dtype)
        save_model(weights, policy.model, tokenizer, tmp_path, step)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["base", "exports", "model"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert type(saved) is Qwen2ForCausalLM and saved.dtype == dtype
    assert {w.dtype for w in weights.values()} == {dtype}
    assert ("lm_head.weight" in weights) == (not tied)
    assert saved.config.architectures == ["Qwen2ForCausalLM"]
    assert "packed" not in (tmp_path / "model" / "config.json").read_text()
    assert saved.generation_config.eos_token_id == base.generation_config.eos_token_id == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("1+1") == tokenizer("1+1")
    batch = collate(some_rollouts())
    expected = policy(batch.ids, batch.response_mask)
    found = token_logprobs(saved.float(), batch.ids, batch.response_mask)
    assert torch.allclose(found, expected, atol=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_the_export_before_is_kept_and_older_ones_are_removed(ranks, tokenizer, tmp_path):
    model = tiny_model(len(tokenizer))
    for step, kept in ((8, ["8"]), (16, ["16", "8"]), (24, ["16", "24"]), (100, ["100", "24"])):
        save_model(model.state_dict().items(), model, tokenizer, tmp_path, step, f"card {step}")
        assert exports(tmp_path) == kept, "the highest numbers, not the last names"
        assert os.readlink(tmp_path / "model") == f"exports/{step}", "it may move with its folder"
        assert (tmp_path / "model" / "README.md").read_text() == f"card {step}"


def test_rank_0_alone_keeps_the_weights_and_as_copies(ranks, tmp_path, monkeypatch):
    """What was gathered may be a view of padded shards; other ranks only help to gather it."""
    weight, kept = torch.ones(3), []
    monkeypatch.setattr(support.checkpoint, "write_export", lambda found, *_: kept.append(found))
    monkeypatch.setattr(support.checkpoint, "switch_link", lambda *_: None)
    monkeypatch.setattr(support.checkpoint, "remove_old_exports", lambda *_: None)
    save_model([("a", weight)], tiny_model(), None, tmp_path, 1)
    assert torch.equal(kept[0]["a"], weight) and kept[0]["a"].data_ptr() != weight.data_ptr()
    monkeypatch.setattr(support.checkpoint.dist, "get_rank", lambda: 1)
    gathered = mock.Mock()
    save_model(iter([("a", gathered)]), tiny_model(), None, tmp_path, 1)
    assert len(kept) == 1 and not gathered.to.called


def test_a_step_that_is_made_again_is_written_beside_the_live_export(ranks, tokenizer, tmp_path):
    """As by a run that was killed after this step's export and before its state was saved."""
    model = tiny_model(len(tokenizer))
    kept = []
    for step, card in ((4, "a"), (8, "b"), (8, "c"), (8, "d")):
        save_model(model.state_dict().items(), model, tokenizer, tmp_path, step, card)
        assert (tmp_path / "model" / "README.md").read_text() == card
        kept.append(exports(tmp_path))
    assert kept == [["4"], ["4", "8"], ["4", "8-again"], ["4", "8"]]


class Crash(BaseException):
    """As if the machine had been switched off."""


class CrashAt:
    """Lets the file operation with this number crash, before it begins or when it is done.

    A folder that is being removed is then half removed.
    """

    operations = (
        (os, "replace"),
        (shutil, "rmtree"),
        (Path, "rename"),
        (Path, "symlink_to"),
        (Path, "unlink"),
        (Path, "mkdir"),
        (Path, "write_text"),
        (support.checkpoint, "save_torch_state_dict"),
    )

    def __init__(self, monkeypatch, number, begun):
        self.left, self.begun = number, begun
        for owner, name in self.operations:
            monkeypatch.setattr(owner, name, self.wrap(name, getattr(owner, name)))

    def wrap(self, name, operation):
        def wrapped(first, *arguments, **settings):
            self.left -= 1
            if self.left == 0:
                if self.begun and name == "rmtree":
                    for file in list(Path(first).glob("*.safetensors")):
                        os.remove(file)
                elif self.begun:
                    operation(first, *arguments, **settings)
                raise Crash
            return operation(first, *arguments, **settings)

        return wrapped


def saved_value(folder, tokenizer):
    """The one number that all weights of folder/model have; None if there is no such folder."""
    if not os.path.lexists(folder / "model"):
        return None
    weights = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    assert AutoTokenizer.from_pretrained(folder / "model")("1+1") == tokenizer("1+1")
    GenerationConfig.from_pretrained(folder / "model")
    (value,) = {number for weight in weights.values() for number in weight.unique().tolist()}
    return value


@pytest.mark.parametrize("begun", [False, True])
def test_whenever_the_machine_stops_the_last_whole_checkpoint_is_there(
    ranks, tokenizer, tmp_path, begun
):
    model = tiny_model(len(tokenizer), num_hidden_layers=1)

    def save(step):
        weights = {name: torch.full_like(w, step) for name, w in model.state_dict().items()}
        save_model(weights.items(), model, tokenizer, tmp_path, step)

    crashes = 0
    for step in (1, 2, 3):
        before = saved_value(tmp_path, tokenizer)
        for number in range(1, 100):
            with pytest.MonkeyPatch.context() as monkeypatch:
                CrashAt(monkeypatch, number, begun)
                try:
                    save(step)
                    break
                except Crash:
                    crashes += 1
            found = saved_value(tmp_path, tokenizer)
            assert found in (before, step), f"step {step}, operation {number}"
            before = found  # what was there once stays
        assert saved_value(tmp_path, tokenizer) == step
    assert crashes > 20
    kept = sorted(name.removesuffix("-again") for name in exports(tmp_path))
    assert kept == ["2", "3"], "what crashes left behind is gone"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["exports", "model"]


def test_a_generation_config_that_transformers_would_not_save_is_saved(ranks, tokenizer, tmp_path):
    """Many base models ship a temperature without do_sample."""
    model = tiny_model(len(tokenizer))
    model.generation_config.temperature, model.generation_config.top_p = 0.6, 0.9
    model.generation_config.do_sample = False
    with pytest.raises(ValueError):
        model.generation_config.save_pretrained(tmp_path)
    save_model(model.state_dict().items(), model, tokenizer, tmp_path, 1)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config
    assert (saved.temperature, saved.top_p) == (0.6, 0.9)


def test_weights_are_told_apart_by_what_they_hold(toy, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    same = [weights_fingerprint(str(tmp_path / name)) for name in "ab"]
    assert same[0] == same[1] != weights_fingerprint(str(toy / "model"))
