"""The same work with this trainer and with TRL's GRPOTrainer, in turns, as a ratio of seconds.

    pip install trl==1.16.0
    python benchmarks/vs_trl.py --shape 10m --longest 512          # the learner alone
    python benchmarks/vs_trl.py --shape 10m-eos --whole            # with sampling and grading

Both get the same model, prompts, Dr. GRPO loss (loss_type="dr_grpo", scale_rewards="none", beta 0),
number of optimizer steps, precision and AdamW, no activation checkpointing, and a learning rate
that leaves the model as it is. The learner alone gets the same responses, too: lengths are those of
`shapes.length_mix`, rewards a coin; with one update a round, the first gradient norms must agree,
and what TRL does before its first forward pass (decoding, rewards, padding) is not counted, though
our own padding is. TRL also computes the entropy of every token, which it logs. In the whole step
both sample for themselves, from the toy's problems, and call the same grader; TRL generates with
transformers on a CPU, and on a GPU with vLLM in the same process, asleep while it learns, as here.
The toy model answers; the other shapes have random weights, so their responses get an answer, every
second one right. Responses end where the model says so: nearly all of `--shape 10m` have the full
length, those of `10m-eos` are of mixed lengths. TRL runs once for each of `--rows` rows a
micro-batch, and its best counts. Seconds are of a round, without the first rounds, the median over
all turns.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import drgrpo
from benchmarks.shapes import length_mix, make_model, response_text
from benchmarks.step import Answering
from support.data import load_problems, load_tokenizer
from support.grader import Grader
from support.records import markdown, versions
from support.run import start_ranks
from templates import TEMPLATES

# Seconds of each round, norms of the gradients, and response tokens of each round
Found = tuple[list[float], list[float], list[int]]


@dataclass(frozen=True)
class Options:
    """Compare with TRL."""

    shape: str = "10m"  # of shapes.py: toy, 10m, 10m-eos, 0.5b, 1.5b, 7b
    whole: bool = False  # the whole step, on the toy's problems; else the learner alone
    prompts: int = 8  # a round
    samples: int = 8  # responses to each
    updates: int = 1  # optimizer steps a round
    longest: int = 512  # limit of a response, in tokens
    prompt_tokens: int = 150  # without --whole
    rows: tuple[int, ...] = (4, 16, 64)  # rows of a micro-batch that TRL is tried with
    warmup: int = 1  # rounds that do not count
    rounds: int = 3  # that do
    turns: int = 2  # how often each side runs
    side: Literal["both", "ours", "trl"] = "both"  # one side alone prints its figures as JSON


def fixed_rollouts(options: Options) -> list[drgrpo.Rollout]:
    """The same each time: random tokens (never EOS), lengths of the mix, rewards of 0 and 1."""
    draw, count = np.random.default_rng(0), options.prompts * options.samples
    prompts = draw.integers(2, 250, (options.prompts, options.prompt_tokens)).tolist()
    rollouts = []
    for i, length in enumerate(length_mix(count, options.longest)):
        response = draw.integers(2, 250, length).tolist()
        problem = i // options.samples
        reward, logprobs = float(draw.integers(2)), [0.0] * length
        rollouts.append(
            drgrpo.Rollout(problem, prompts[problem], response, logprobs, reward=reward)
        )
    rewards = torch.tensor([r.reward for r in rollouts]).view(options.prompts, -1)
    for rollout, advantage in zip(rollouts, drgrpo.group_advantages(rewards).flatten().tolist()):
        rollout.advantage = advantage
    return rollouts


def our_config(options: Options) -> drgrpo.Config:
    return drgrpo.Config(
        name="vs_trl",
        model=make_model(options.shape),
        dataset="",
        template="none",
        prompts_per_step=options.prompts,
        samples_per_prompt=options.samples,
        lr=1e-12,
        responses_per_update=options.prompts * options.samples // options.updates,
        max_prompt_tokens=options.prompt_tokens,
        max_response_tokens=options.longest,
        max_gap=100.0,
        tis_cap=2.0 if options.whole else None,
        activation_checkpointing=False,
    )


def ready(grader: Grader) -> Grader:
    """The grader, once its workers have loaded: that would slow the first rounds down."""
    grader.grade(["\\boxed{1}"], ["1"])
    return grader


def toy_problems(model: str):
    tokenizer = load_tokenizer(model, 512)
    return load_problems("runs/toy-base/train.jsonl", tokenizer, TEMPLATES["none"], 64)[0]


def run_ours(options: Options, rounds: int) -> Found:
    return whole_steps(options, rounds) if options.whole else learner(options, rounds)


def whole_steps(options: Options, rounds: int) -> Found:
    config = our_config(options)
    if options.shape != "toy":
        drgrpo.Sampler = Answering  # type: ignore[misc]
    problems = toy_problems(config.model)
    seconds, norms, tokens = [], [], []
    with drgrpo.start(config) as (policy, optimizer, sampler, grader):
        ready(grader)
        for step in range(rounds):
            start = time.perf_counter()
            metrics, rollouts = drgrpo.train_step(
                config, step, problems, policy, optimizer, sampler, grader
            )
            seconds.append(time.perf_counter() - start)
            norms.append(float(metrics["grad_norm"] or 0.0))
            tokens.append(sum(len(r.response_ids) for r in rollouts))
    return seconds, norms, tokens


def learner(options: Options, rounds: int) -> Found:
    """Learning alone, from responses that are given."""
    config = our_config(options)
    start_ranks()
    policy = drgrpo.make_policy(config)
    optimizer = torch.optim.AdamW(policy.parameters(), config.lr, (0.9, 0.95), fused=True)
    seconds, norms, tokens = [], [], []
    for step in range(rounds):
        rollouts = fixed_rollouts(options)
        start = time.perf_counter()
        updates = drgrpo.split_updates(rollouts, config, step, rank=0, world=1)
        drgrpo.add_old_logprobs(policy, updates[1:], config)
        sums = [drgrpo.update(policy, optimizer, batches, config) for batches in updates]
        seconds.append(time.perf_counter() - start)
        norms.append(sums[0]["grad_norm"])
        tokens.append(sum(len(r.response_ids) for r in rollouts))
    return seconds, norms, tokens


def trl_arguments(options: Options, rounds: int):
    """TRL's settings for the same work, with the first of `--rows` rows a micro-batch."""
    from trl import GRPOConfig

    n = options.prompts * options.samples
    rows, whole = min(options.rows[0], n // options.updates), {}
    if options.whole and drgrpo.CUDA:
        whole = {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_enable_sleep_mode": True,
            "vllm_gpu_memory_utilization": 0.6,
            "vllm_importance_sampling_mode": "token_truncate",
            "vllm_importance_sampling_clip_max": 2.0,
        }
    return GRPOConfig(
        output_dir="runs/vs_trl",
        loss_type="dr_grpo",
        scale_rewards="none",
        beta=0.0,
        num_generations=options.samples,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=n // options.updates // rows,
        steps_per_generation=n // rows,
        max_completion_length=options.longest,
        temperature=1.0,
        epsilon=0.2,
        learning_rate=1e-12,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        optim="adamw_torch_fused",
        gradient_checkpointing=False,
        bf16=drgrpo.CUDA,
        use_cpu=not drgrpo.CUDA,
        max_steps=rounds * options.updates,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        shuffle_dataset=False,
        disable_tqdm=True,
        **whole,
    )


def leave_out_scoring(trainer, clock) -> None:
    """Stop the clock for what TRL does with the responses before its first forward pass."""
    score = trainer._generate_and_score_completions

    def uncounted(inputs):
        start = time.perf_counter()
        outputs = score(inputs)
        clock.start += time.perf_counter() - start
        return outputs

    trainer._generate_and_score_completions = uncounted


def whole_task(options: Options, rounds: int, tokens: list[int]):
    """TRL's data set and reward function for whole steps. Notes in `tokens` those of each call."""
    grader = ready(Grader("none"))
    problems = toy_problems(make_model(options.shape))[: options.prompts * rounds]
    draw = random.Random(0)

    def reward(completions, completion_ids, answers, **_):
        tokens.append(sum(map(len, completion_ids)))
        if options.shape != "toy":
            completions = [
                response_text(gold, i % 2 == 0, draw) for i, (gold,) in enumerate(answers)
            ]
        return grader.grade(completions, answers)

    return [{"prompt": p.prompt, "answers": p.answers} for p in problems], reward, None


def learner_task(options: Options, rounds: int, tokens: list[int]):
    """TRL's data set, reward function and rollout function for responses that are given."""
    fixed = fixed_rollouts(options)
    rewards = {tuple(rollout.response_ids): rollout.reward for rollout in fixed}

    def reward(completion_ids, **_):
        tokens.append(sum(map(len, completion_ids)))
        return [rewards[tuple(ids)] for ids in completion_ids]

    def rollout(prompts, trainer):
        left = {str(i): [r for r in fixed if r.problem == i] for i in range(options.prompts)}
        chosen = [left[prompt].pop() for prompt in prompts]
        return {
            "prompt_ids": [r.prompt_ids for r in chosen],
            "logprobs": None,
            "completion_ids": [r.response_ids for r in chosen],
        }

    data = [{"prompt": str(i)} for i in range(options.prompts)] * rounds
    return data, reward, rollout


def run_trl(options: Options, rounds: int) -> Found:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    path = make_model(options.shape)
    seconds: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.start)

    clock = Clock()
    task = whole_task if options.whole else learner_task
    data, reward, rollout = task(options, rounds, tokens)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        args=trl_arguments(options, rounds),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(data),
        rollout_func=rollout,
        processing_class=AutoTokenizer.from_pretrained(path),
        callbacks=[clock],
    )
    if not options.whole and options.updates == 1:  # with more, old log-probs are in it
        leave_out_scoring(trainer, clock)
    trainer.train()
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    starts = range(0, len(seconds), options.updates)
    return [sum(seconds[i : i + options.updates]) for i in starts], norms, tokens


def compare(options: Options) -> str:
    """Runs the sides in turns, each in a process of its own; returns a table."""
    sides = [("ours", options.rows[:1])] + [("trl", (rows,)) for rows in options.rows]
    found: dict = {side: ([], [], []) for side in sides}
    for _ in range(options.turns):
        for side, rows in sides:
            own = [*sys.argv[1:], "--side", side, "--rows", *map(str, rows)]
            command = [sys.executable, __file__, *own]
            silent = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=silent)
            if done.returncode:
                sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
            seconds, norms, tokens = json.loads(done.stdout.splitlines()[-1])
            for all_turns, new in zip(found[side, rows], (seconds, norms[:1], tokens)):
                all_turns += new[0 if len(new) == 1 else options.warmup :]
    norms = [norms[0] for _, norms, _ in found.values()]
    if not options.whole and options.updates == 1 and max(norms) > 1.01 * min(norms):
        sys.exit(f"the sides did not do the same work: first gradient norms {norms}")
    medians = {side: statistics.median(seconds) for side, (seconds, _, _) in found.items()}
    ours, best = medians[sides[0]], min(medians[side] for side in sides[1:])
    head = ["", "seconds a round (min, max)", "response tokens/s", "first gradient norm"]
    table = []
    for (side, rows), (seconds, norms, tokens) in found.items():
        median = medians[side, rows]
        name = "drgrpo.py" if side == "ours" else f"TRL, {rows[0]} rows a micro-batch"
        cells = [name, f"{median:.3f} ({min(seconds):.3f}, {max(seconds):.3f})"]
        cells += [f"{statistics.mean(tokens) / median:.0f}", f"{norms[0]:.4g}"]
        table.append([*cells, f"{ours / median:.2f}"])
    threads = f"{torch.get_num_threads()} CPU threads"
    device = torch.cuda.get_device_name() if drgrpo.CUDA else threads
    packages = versions() | {"trl": version("trl")}
    return (
        f"{markdown([*head, 'ours / it'], table)}\n\nOurs takes {ours / best:.2f} of TRL's best. "
        f"{device}; " + ", ".join(f"{name} {number}" for name, number in packages.items())
    )


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.side == "both":
        print(compare(options))
        return
    run = run_ours if options.side == "ours" else run_trl
    print(json.dumps(run(options, options.warmup + options.rounds)))


if __name__ == "__main__":
    main()
