"""What several test files share: small models, rollouts, stored responses, commands."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from drgrpo import PRESETS, Policy, Rollout, collate

ROOT = Path(__file__).resolve().parents[1]
TOY = PRESETS["toy"][1]
# What eval.py needs to score the toy model
TOY_EVAL = dict(template="none", max_prompt_tokens=64, max_response_tokens=72)
LONG = [int(i) for i in np.random.default_rng(0).integers(5, 60, 290)]  # a prompt of many blocks


def tiny_model(vocab_size=64, attention="packed", **kwargs):
    """A random Qwen2 on a CPU, the same each time, with tied embeddings."""
    settings = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        eos_token_id=0,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.3,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=vocab_size, attn_implementation=attention, **settings | kwargs
        )
        return Qwen2ForCausalLM(config)


def some_rollouts(count=12, seed=0, vocab_size=64):
    """Rollouts of uneven lengths; a third have no advantage, and some end in EOS (id 0)."""
    rng = np.random.default_rng(seed)
    rollouts = []
    for i in range(count):
        prompt, response = (rng.integers(1, vocab_size, rng.integers(1, 20)).tolist() for _ in "ab")
        response += [0] * (i % 2)
        rollouts.append(
            Rollout(
                i,
                prompt,
                response,
                (-rng.random(len(response))).tolist(),
                advantage=0.0 if i % 3 == 0 else float(rng.normal()),
            )
        )
    return rollouts


class StoredSampler:
    """Says what it was given: the responses to each problem, by the problem's prompt.

    A response has as many ids as its text has letters; the last one is EOS (0).
    """

    def __init__(self, responses: dict[str, list[str]], finish_reason: str = "stop"):
        self.responses, self.finish_reason = responses, finish_reason

    def generate(self, problems, seeds, n, max_tokens, temperature, stop):
        groups = []
        for place, problem in enumerate(problems):
            group = []
            for text in self.responses[problem.prompt][:n]:
                ids = [1] * (len(text) - 1) + [0] * bool(text)
                zeros = [0.0] * len(ids)
                group.append(
                    Rollout(place, problem.prompt_ids, ids, zeros, text, self.finish_reason)
                )
            groups.append(group)
        return groups


class FakeSampler:
    """Random ids with the policy's own log-probs, and a note of all that it is asked to do."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self.calls: list[str] = []
        self.seeds: list[list[int]] = []  # of each call

    def generate(self, problems, seeds, n, max_tokens, temperature, stop):
        self.calls.append("sample")
        self.seeds.append(list(seeds))
        groups = []
        for place, (problem, seed) in enumerate(zip(problems, seeds, strict=True)):
            rng = np.random.default_rng(seed)
            groups.append([self.respond(place, problem, max_tokens, rng) for _ in range(n)])
        return groups

    @torch.no_grad()
    def respond(self, place, problem, max_tokens, rng) -> Rollout:
        ids = rng.integers(1, 60, rng.integers(1, max_tokens + 1)).tolist()
        reason = "length" if len(ids) == max_tokens else "stop"
        text = f"\\boxed{{{ids[0] % 3}}}"
        if reason == "stop":
            ids[-1] = 0  # EOS
        batch = collate([Rollout(place, problem.prompt_ids, ids, [0.0] * len(ids))])
        logprobs = self.policy(batch.ids, batch.response_mask)[batch.response_mask.bool()]
        self.policy.reshard()  # as a backward pass does
        return Rollout(place, problem.prompt_ids, ids, logprobs.tolist(), text, reason)

    def sleep(self):
        self.calls.append("sleep")

    def wake(self, policy):
        self.calls.append("wake")

    def close(self):
        self.calls.append("close")


def boxed(answer: object) -> str:
    return f"So the answer is \\boxed{{{answer}}}."


def write_jsonl(file: Path, rows: list[dict]) -> str:
    """Write the rows, and return the file's name."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def read_jsonl(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def assert_same(a, b, tolerance=1e-5):
    """Two tensors up to rounding, relative to the first one's norm."""
    assert a.norm() > 0, "the first tensor is all zeros"
    difference = ((a - b).norm() / a.norm()).item()
    assert difference <= tolerance, f"relative difference of the two tensors: {difference:.2g}"


def wait_until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def launch(ranks, *arguments, folder=ROOT, timeout=600, fails=False, **options):
    """Run a script on so many ranks as a user would, with options such as --steps 3 for steps=3.

    Returns what it printed; if it must fail, what it printed as an error.
    """
    for key, value in options.items():
        values = value if isinstance(value, tuple) else (value,)
        arguments += (f"--{key.replace('_', '-')}", *values)
    of_torchrun = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in of_torchrun}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=folder,
        timeout=timeout,
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode != 0) == fails, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stderr if fails else done.stdout
