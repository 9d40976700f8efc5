"""A real language model on GSM8K, on two CPU cores, in a run that is killed three times.

    python findings/real_model.py --model MODEL --train train.jsonl --test test.jsonl

MODEL is the folder or hub name of Qwen2.5-Coder-0.5B-Instruct; the files have the columns `problem`
and `answer`, and answers are plain numbers. Give absolute paths. It takes hours. As on a GPU, vLLM
and the trainer both compute in bf16, and the master weights are fp32.
"""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
import drgrpo
from eval import Z, interval
from findings.common import BLUE, GREY, RED, Finding
from support.data import load_problems, load_tokenizer
from support.records import markdown, number, read_rows
from support.run import end_ranks, start_ranks
from templates import TEMPLATES

CLAIM = "40 small steps of a real 0.5B model, killed three times: accuracy does not rise"
LONGEST = 256  # tokens of a response
SETTINGS = {  # of `gsm8k-0.5b`: what differs from the preset
    "subset": None,
    "problem_column": "problem",
    "answer_marker": None,
    "steps": 40,
    "prompts_per_step": 4,
    "responses_per_update": 16,
    "max_prompt_tokens": 256,
    "max_response_tokens": LONGEST,
    "lr": 5e-6,
    "eval_every": 20,
    "save_every": 2,
    "tokens_per_microbatch": 2048,
}
IN_BF16 = "import drgrpo, torch; drgrpo.DTYPE = torch.bfloat16; drgrpo.main()"
HELD_OUT = 200  # the first problems of the test file
KILLED_IN = (3, 10, 32)  # steps, SECONDS after they began
SECONDS = 45
COMPARED = 5  # first steps, which are made once more and not killed
RUNS = Path("runs")


@dataclass(frozen=True)
class Options:
    """Where the model and the data are."""

    model: str
    train: str
    test: str


def train(options: Options, name: str, kills: tuple[int, ...], **changed) -> Path:
    """Make a run, or the rest of one, with SIGKILL in these steps. Returns its folder.

    Raises CalledProcessError if it ends with an error.
    """
    folder = RUNS / name
    words = [sys.executable, "-c", IN_BF16, "gsm8k-0.5b", "--name", name]
    words += ["--model", options.model, "--dataset", options.train]
    for key, value in (SETTINGS | changed).items():
        words += ["--" + key.replace("_", "-"), str(value)]
    for step in kills:
        process = subprocess.Popen(words)
        while process.poll() is None and len(read_rows(folder / "metrics.jsonl")) < step:
            time.sleep(1)
        time.sleep(SECONDS)
        process.kill()
        process.wait()
    subprocess.run(words, check=True)
    return folder


def held_out(options: Options) -> str:
    """A file of the first problems of the test file. Returns its name."""
    file = RUNS / "gsm8k-held-out.jsonl"
    lines = Path(options.test).read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:HELD_OUT]))
    return str(file)


def greedy_response(model: str, file: str) -> dict:
    """What a model says to the first problem of a file."""
    problems, _ = load_problems(file, load_tokenizer(model, 512), TEMPLATES["qwen_math"], 256)
    start_ranks()
    sampler = drgrpo.Sampler(model, 512)
    ((rollout,),) = sampler.generate(problems[:1], [0], 1, LONGEST, 0.0, ())
    sampler.close()
    end_ranks()
    answered = {"tokens": len(rollout.response_ids), "finish_reason": rollout.finish_reason}
    return {"problem": problems[0].text, "response": rollout.text} | answered


def measure() -> dict:
    options = tyro.cli(Options, description=__doc__)
    file = held_out(options)
    folder = train(options, "real", KILLED_IN, eval_dataset=file)
    again = train(options, "real-unbroken", (), eval_dataset=None, steps=COMPARED)
    first = [row for row in read_rows(folder / "samples.jsonl") if row["step"] < COMPARED]
    drgrpo.DTYPE = torch.bfloat16
    return {
        "settings": SETTINGS,
        "killed_in": KILLED_IN,
        "compared": len(first),
        "alike": first == read_rows(again / "samples.jsonl"),
        "metrics": read_rows(folder / "metrics.jsonl"),
        "before": greedy_response(options.model, file),
        "after": greedy_response(str(folder / "model"), file),
    }


# --------------------------------------------------------------------------- figure and text


def column(numbers: dict, key: str) -> tuple[list[int], list[float]]:
    """Steps that have this number, and the numbers."""
    rows = [row for row in numbers["metrics"] if row.get(key) is not None]
    return [row["step"] for row in rows], [row[key] for row in rows]


def evaluations(numbers: dict) -> list[dict]:
    """The rows that have a held-out accuracy, with its 95% interval as `low` and `high`."""
    rows = [dict(row) for row in numbers["metrics"] if "eval_accuracy" in row]
    for row in rows:
        bounds = interval(row["eval_accuracy"], row["eval_accuracy_se"], HELD_OUT)
        row["low"], row["high"] = bounds
    return rows


def change(numbers: dict) -> tuple[float, float, float]:
    """Held-out accuracy after minus before, and its 95% interval.

    As of two independent samples. The problems are the same, so the interval is rather too wide.
    """
    first, *_, last = evaluations(numbers)
    half = Z * (first["eval_accuracy_se"] ** 2 + last["eval_accuracy_se"] ** 2) ** 0.5
    difference = last["eval_accuracy"] - first["eval_accuracy"]
    return difference, difference - half, difference + half


def draw(numbers: dict) -> Figure:
    """Reward, held-out accuracy, truncation and length against the step; kills as dotted lines."""
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    reward, accuracy, truncated, length = axes = figure.subplots(2, 2, sharex=True).ravel()
    reward.plot(*column(numbers, "reward"), color=BLUE)
    reward.set(title="Reward in training, 32 responses a step")
    for row in evaluations(numbers):
        accuracy.plot([row["step"]] * 2, [row["low"], row["high"]], color=BLUE)
    accuracy.plot(*column(numbers, "eval_accuracy"), "o", color=BLUE)
    accuracy.set(title=f"Held-out accuracy, {HELD_OUT} problems", ylim=(0, None))
    truncated.plot(*column(numbers, "truncated"), color=RED)
    truncated.set(title=f"Share cut off at {LONGEST} tokens", xlabel="step", ylim=(0, 1))
    for key, color in (("right", BLUE), ("wrong", RED)):
        length.plot(*column(numbers, f"length_{key}"), color=color, label=key)
    length.set(title="Tokens of a response", xlabel="step")
    length.legend(labelcolor="linecolor")
    for axis in axes:
        for step in numbers["killed_in"]:
            axis.axvline(step, color=GREY, linestyle=":", linewidth=1)
    return figure


def measured(numbers: dict) -> str:
    first, *_, last = evaluations(numbers)
    middle, low, high = (f"{100 * value:+.1f}" for value in change(numbers))
    return (
        f"held-out accuracy {first['eval_accuracy']:.1%} before and {last['eval_accuracy']:.1%} "
        f"after {SETTINGS['steps']} steps: {middle} points [{low}, {high}]"
    )


def quoted(said: dict) -> str:
    """A response as code without empty lines: no page shall interpret its formulas."""
    lines = [line.rstrip() for line in said["response"].splitlines() if line.strip()]
    return "\n".join(["```text", *lines, "```"])


def text(numbers: dict) -> str:
    rows = []
    for row in evaluations(numbers):
        bounds = f"{row['eval_accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        shown = [number(row[f"eval_{key}"], 2) for key in ("truncated", "length")]
        rows.append([str(row["step"]), bounds, *shown])
    head = ["step", "held-out accuracy", f"cut off at {LONGEST} tokens", "tokens of a response"]
    middle, low, high = (f"{100 * value:+.1f}" for value in change(numbers))
    _, rewards = column(numbers, "reward")
    _, gaps = column(numbers, "gap")
    kills = ", ".join(map(str, numbers["killed_in"]))
    before, after = numbers["before"], numbers["after"]
    _, silent = column(numbers, "groups_without_signal")
    return f"""{markdown(head, rows)}

Qwen2.5-Coder-0.5B-Instruct, from a file with 4-bit weights, on GSM8K with the template qwen_math:
{SETTINGS["steps"]} steps of {SETTINGS["prompts_per_step"]} problems with 8 responses each, two
updates per step, learning rate {SETTINGS["lr"]:g}. Held out: the first {HELD_OUT} problems of the
test split, one greedy response each. Accuracy changes by {middle} points [{low}, {high}]. The
reward was {sum(rewards[:10]) / 10:.3f} over the first ten steps, {max(rewards):.3f} in step
{rewards.index(max(rewards))}, and {sum(rewards[-10:]) / 10:.3f} over the last ten steps. In
{sum(silent) / len(silent):.0%} of the groups all rewards were equal, which teaches nothing.

The model learned to end its responses, and then it got worse. A likely reason is noise: an update
learns from some ten responses, where the paper's has 128. Larger updates or a lower learning rate
were not tried; one setting was chosen before the run and kept.

The run was ended with SIGKILL in steps {kills} (dotted lines), and the same command went on. In
this run the last two signals were the kernel's, out of memory: at 20 GB beside other work, and at
24 GB. The
{numbers["compared"]} responses of its first {COMPARED} steps, some of them made anew after a kill,
{"are those" if numbers["alike"] else "are not those"} of a run that was not killed, with the same
rewards and advantages to the last digit. Trainer and sampler, both in bf16, differed by at most
{max(gaps):.4f} nats per token.

To the first held-out problem the model said before training, in {before["tokens"]} tokens:

{quoted(before)}

and after it, in {after["tokens"]} tokens:

{quoted(after)}

**Not shown:** what a longer run, another seed or other settings give, and GRPO beside it: one run
was made."""


FINDING = Finding("real_model", CLAIM, measure, draw, measured, text)

if __name__ == "__main__":
    FINDING.run()
