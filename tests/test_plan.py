"""Facts about what a run needs, and about the trial before it."""

import collections
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, Qwen2Config

import drgrpo
import plan
from drgrpo import PRESETS, Rollout, collate
from support.data import Problem, load_data
from support.grader import Grader
from support.logprobs import token_logprobs
from tests.helpers import ROOT, TOY, FakeSampler, launch, tiny_model, wait_until

# kind, hidden, MLP, heads, key-value heads, vocabulary, tied; then GB per GPU of the real FSDP2
# code on fake CUDA tensors: 8 ranks, bf16, checkpointing, micro-batches of 16,384 tokens, several
# of them in an update, and one
SIMULATED = {
    "7b": (Qwen2Config, 3584, 18944, 28, 4, 152064, False, 28.7, 25.1),
    "1.5b": (Qwen2Config, 1536, 8960, 12, 2, 151936, True, 8.1, 7.4),
    "llama-3b": (LlamaConfig, 3072, 8192, 24, 8, 128256, True, 14.7, 13.1),
}
CONFIG = plan.PlanConfig(**vars(PRESETS["math-7b"][1]))


def save_config(name, folder, layers=28):
    kind, hidden, mlp, heads, kv_heads, vocabulary, tied, *_ = SIMULATED[name]
    kind(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
    ).save_pretrained(folder)


def parts_of(name, folder, micro_batches=2, layers=28, **settings):
    """{part: GB} of a learner, and the sum."""
    save_config(name, folder, layers)
    config, model = replace(CONFIG, **settings), plan.meta_model(str(folder))
    parts = plan.learner_memory(config, model, micro_batches)
    return {part: size / 1e9 for part, size, _ in parts}, plan.total(parts) / 1e9


@pytest.mark.parametrize("name", SIMULATED)
def test_the_learners_memory_is_that_of_the_simulation(name, tmp_path):
    several, one = SIMULATED[name][-2:]
    assert parts_of(name, tmp_path)[1] == pytest.approx(several, rel=0.05)
    assert parts_of(name, tmp_path, micro_batches=1)[1] == pytest.approx(one, rel=0.05)


def test_the_parts_are_those_of_the_simulation(tmp_path):
    simulated = {
        "master weights": 3.81,
        "Adam's moments": 7.62,
        "gradients": 3.81,
        "gathered weights": 3.11,
        "head": 1.23,  # and of a weight of the layer, which the plan has among the activations
        "to reduce": 1.05,
        "activations": 8.24,
    }
    expected = {name: pytest.approx(size, rel=0.15) for name, size in simulated.items()}
    assert parts_of("7b", tmp_path)[0] == expected
    assert parts_of("7b", tmp_path, offload=True)[1] == pytest.approx(13.5, rel=0.05)


def test_the_fullest_of_three_moments_counts(tmp_path):
    """A layer's with many tokens, the end with few, the head's where it is most of the model."""
    assert "root" not in parts_of("7b", tmp_path)[0]
    few = parts_of("7b", tmp_path, tokens_per_microbatch=4096)[0]
    root, layer = 2 * 152064 * 3584, 233_057_792
    assert few["root"] == pytest.approx(2 * root / 1e9, rel=0.01)
    assert few["to reduce"] == pytest.approx(4 * (root + layer) * (1 + 1 / 8) / 1e9, rel=0.01)
    small = parts_of("1.5b", tmp_path, layers=1, tokens_per_microbatch=4096)[0]
    assert small["head"] == pytest.approx((8 * 151936 * 1536 + 6 * 2**27) / 1e9, rel=0.01)


def kept_by_autograd(model):
    """Bytes that the forward pass keeps for the backward pass, on 100 real tokens."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = collate([Rollout(0, [1] * 40, [2] * 60, [0.0] * 60)])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        token_logprobs(model, batch.ids, batch.response_mask)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_keeps_what_autograd_keeps(dtype, tmp_path):
    shape = dict(hidden_size=512, num_attention_heads=8, intermediate_size=1024)
    one, two = (tiny_model(99, num_hidden_layers=n, **shape).to(dtype) for n in (1, 2))
    one.config.save_pretrained(tmp_path)
    kept, backward = plan.layer_memory(plan.meta_model(str(tmp_path), dtype), 100)
    # On a CPU packed_attention copies its result once more
    real = kept_by_autograd(two) - kept_by_autograd(one) - 100 * 512 * dtype.itemsize
    assert kept == pytest.approx(real, rel=0.08)
    assert backward > kept + 100 * 1024 * dtype.itemsize


@pytest.fixture
def seven_b(toy, tmp_path):
    """The 7B preset with a config and a tokenizer, but without any weights."""
    save_config("7b", tmp_path)
    AutoTokenizer.from_pretrained(toy / "model").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()  # nobody reads it
    data = dict(dataset=str(toy / "train.jsonl"), eval_dataset=str(toy / "test.jsonl"), levels=())
    return replace(CONFIG, model=str(tmp_path), **data)


def test_a_plan_needs_no_weights(seven_b):
    _, *data = load_data(seven_b)
    text = plan.plan(seven_b, *data)
    weights = 7_615_616_512
    assert f"{weights:,} parameters in 28 layers" in text
    assert "5000 problems, 500 held out" in text
    # 128 responses of 3000 tokens and their prompts over 8 GPUs, 16,384 tokens at a time
    assert "1024 responses, 8 update(s) of at most 4 micro-batch(es) per GPU" in text
    assert "304.6 GB: 3 states of 91.4 GB (one is being written) and 2 models of 15.2 GB" in text
    assert "host      122.6 GB per node" in text  # 14 B per weight, and 2 GB per rank
    assert "| in all | 29.1 |" in text
    room = 0.95 * (40e9 - 4 * weights / 8) - (8 / 8 + 2) * weights - 4 * 256 * 152064
    row = 2 * 28 * 4 * 128 * 2 * 4024  # bytes of the cache
    assert f"24 GB: does not fit; 40 GB: {room / row:.0f} responses; 80 GB: " in text
    assert "host      244.5 GB" in plan.plan(replace(seven_b, offload=True), *data)
    assert "at most 2 micro-batch(es)" in plan.plan(replace(seven_b, nodes=2), *data)


def test_the_reckoned_hours_by_hand():
    """The lower end: short responses, 40% of 8 x 989 TFLOPS, 2 ms and all weights a step."""
    weights, tokens = 7_615_616_512, 1024 * (100 + 0.15 * 3000)
    learning = 5 * 2 * weights * tokens / (8 * 989e12 * 0.4)
    sampling = 3000 * (2 * weights / 3350e9 + 0.002)
    text = plan.hours(CONFIG, weights, 100)
    assert f"{300 * (learning + sampling) / 3600:.1f} to " in text


def test_the_first_rung_is_the_micro_batch_and_only_where_it_helps():
    ladder = plan.ladder(CONFIG, "update")
    assert ladder.endswith("--tokens-per-microbatch 8192, --offload, more GPUs")
    small = replace(CONFIG, tokens_per_microbatch=5000, offload=True)
    assert plan.ladder(small, "update").endswith(": --tokens-per-microbatch 4024, more GPUs")
    assert plan.ladder(CONFIG, "sample").endswith(": --offload, more GPUs")


# -------------------------------------------------------------------------------------- --try


@pytest.fixture
def fake_trial(ranks, toy, tmp_path, monkeypatch):
    """`trial` of the toy in tmp_path, with random responses in place of an engine's."""
    monkeypatch.chdir(tmp_path)
    settings = dict(model=str(toy / "model"), dataset=str(toy / "train.jsonl"), eval_dataset=None)
    settings |= dict(prompts_per_step=4, samples_per_prompt=4, responses_per_update=8)
    config = plan.PlanConfig(**vars(TOY) | settings | dict(max_response_tokens=12, gpus=1))
    policy = drgrpo.make_policy(config)
    optimizer = torch.optim.AdamW(policy.parameters(), config.lr)

    @contextmanager
    def start(config):
        with Grader(config.template, 1) as grader:
            yield policy, optimizer, FakeSampler(policy), grader

    monkeypatch.setattr(drgrpo, "start", start)
    monkeypatch.setattr(plan, "let_no_response_end", lambda sampler: None)
    for name in ("timed", "give_rewards"):  # a trial replaces them
        monkeypatch.setattr(drgrpo, name, getattr(drgrpo, name))
    return lambda: plan.trial(config)


def test_a_trial_trains_every_response_and_leaves_nothing(
    fake_trial, tmp_path, monkeypatch, capsys
):
    split, advantages = drgrpo.split_updates, []

    def note(rollouts, *others):
        advantages.extend(rollout.advantage for rollout in rollouts)
        return split(rollouts, *others)

    monkeypatch.setattr(drgrpo, "split_updates", note)
    fake_trial()
    assert sorted(advantages) == [-0.5] * 16 + [0.5] * 16
    text = capsys.readouterr().out
    for phase in ("start", "sample", "old_logprobs", "update", "load a state", "export"):
        assert f"| {phase} | " in text
    assert "it came back equal" in text and "hours     at most 0.0" in text
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_state_that_comes_back_otherwise_stops_the_trial(fake_trial, monkeypatch, capsys):
    monkeypatch.setattr("support.run.States.load", lambda states: 2)  # loads nothing
    with pytest.raises(RuntimeError, match="is not the one"):
        fake_trial()
    assert "stop: rank 0, comparison: " in capsys.readouterr().out


def test_memory_that_runs_out_stops_the_trial_and_names_the_rungs(fake_trial, monkeypatch, capsys):
    def fail(*arguments):
        raise MemoryError("out of memory")

    monkeypatch.setattr(drgrpo, "update", fail)
    with pytest.raises(MemoryError):
        fake_trial()
    text = capsys.readouterr().out
    assert "stop: rank 0, update: out of memory\n" in text
    assert "--tokens-per-microbatch 8192, --offload" in text


def test_too_small_a_disk_or_host_stops_before_anything_is_loaded(fake_trial, monkeypatch):
    monkeypatch.setattr(drgrpo, "start", None)
    usage = collections.namedtuple("usage", "free")
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda path: usage(5_000_000))
        with pytest.raises(SystemExit, match="stop: disk: 0.007 GB needed, 0.005 GB free"):
            fake_trial()
    memory = SimpleNamespace(available=1_000_000_000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    with pytest.raises(SystemExit, match="stop: host's memory: 2.003 GB needed, 1.000 GB free"):
        fake_trial()


def test_a_phase_has_the_highest_memory_that_was_seen_in_it(ranks):
    watch, before = plan.Watch(), plan.memory_in_use()
    with watch({}, "large"):
        large = torch.ones(100_000_000)
        wait_until(lambda: watch.peaks["large"] > before + 3e8, seconds=60)
    assert watch.phases == [] and len(large) == 100_000_000


def test_the_measured_hours_by_hand(ranks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    watch = plan.Watch()
    names = ("sample", "sleep", "score", "update", "sync", "write a state", "export")
    watch.seconds = dict(zip(names, (100.0, 1.0, 2.0, 50.0, 7.0, 9.0, 30.0)))
    watch.peaks = dict.fromkeys(names, 5e9)
    problem, metrics = Problem("", [0] * 100, []), {"gap": 0.01, "length": 3000}
    text = plan.report(CONFIG, [problem], [problem] * 512, watch, metrics)
    # 300 steps of 160 s; evaluated 19.75 times: half as many responses as in a step, and an export
    assert f"hours     at most {(300 * 160 + 19.75 * (50 + 30)) / 3600:.2f}, if" in text
    assert f"{(300 * 160 + 19.75 * 80) / 3600 * 800 / 3100:.2f} if they have" in text
    assert "| update | 50.00 | 5.00 |" in text


@pytest.mark.slow
def test_no_response_ends_and_log_probs_stay_right(engine, monkeypatch):
    sampler, policy, config = engine
    monkeypatch.setattr(sampler.llm, "generate", sampler.llm.generate)  # it comes back
    plan.let_no_response_end(sampler)
    problems = [Problem("", [5, 6, 7], [])]
    (group,) = sampler.generate(problems, [1], 32, 20, 1.0, ("1",))
    assert all(len(r.response_ids) == 20 and r.finish_reason == "length" for r in group)
    ends = drgrpo.endings(config.model, ())
    assert any(token in ends for r in group for token in r.response_ids[:-1])
    batch = collate(group)
    logprobs = policy(batch.ids, batch.response_mask)
    policy.reshard()
    assert torch.allclose(logprobs, batch.sampler_logprobs, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_command_tries_the_toy(ranks, toy_here, tmp_path):
    text = launch(ranks, ROOT / "plan.py", "toy", "--try", folder=tmp_path)
    assert "all responses have 72 tokens" in text and "it came back equal" in text
    assert not (tmp_path / "runs" / "toy-try").exists()
