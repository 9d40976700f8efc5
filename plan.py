"""What a run needs, before anything is paid for: no GPU, and no weights are read.

    python plan.py math-7b --gpus 8

All settings of drgrpo.py work here, too. Sizes follow from the model's config and the settings;
memory from formulas that are written next to each part, the activations of a layer from running
one without data. Hours come from tokens per second that benchmarks/step.py measured and wrote to
benchmarks/measured.jsonl, and from nothing else.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoConfig, AutoModelForCausalLM

from drgrpo import PRESETS, TOY, Config
from support.data import Problem, load_data
from support.logprobs import LOGITS_AT_ONCE
from support.metrics import markdown
from toy import make_toy

MEASURED = Path(__file__).with_name("benchmarks") / "measured.jsonl"
MEAN_SHARE = 700 / 3000  # mean response over the limit, in the mix of benchmarks/shapes.py
GPU_SIZES = (24, 40, 80, 141)  # GB
GB = 1e9


@dataclass(frozen=True)
class PlanConfig(Config):
    """A run's settings, and the GPUs that it would have."""

    gpus: int = 8  # of the whole run


def plan(
    config: PlanConfig,
    problems: list[Problem],
    held_out: list[Problem],
    dropped: dict[str, int],
) -> str:
    """The whole report, from what `load_data` returned."""
    model = meta_model(config.model)
    response = config.max_response_tokens * MEAN_SHARE
    prompts = [len(problem.prompt_ids) for problem in problems]
    prompt = sum(prompts) / len(prompts)
    n = config.prompts_per_step * config.samples_per_prompt
    usual, most = (
        math.ceil(
            config.responses_per_update
            * (prompt + length)
            / config.gpus
            / config.tokens_per_microbatch
        )
        for length in (response, config.max_response_tokens)
    )
    parts = learner_memory(config, model, most)
    epochs = config.steps * config.prompts_per_step / len(problems)
    layers = count(model.get_decoder().layers.parameters())
    lines = [
        f"{config.name}: {config.model} on {config.gpus} GPU(s), {config.steps} steps",
        "",
        f"data       {len(problems)} problems, {len(held_out)} held out; dropped: {dropped}",
        f"           prompts of {prompt:.0f} tokens on average and {max(prompts)} at most; "
        f"{epochs:.2f} epochs",
        f"template   {config.template}: {problems[0].prompt!r}",
        f"model      {count(model.parameters()):,} parameters, {layers:,} of them in "
        f"{model.config.num_hidden_layers} layers; vocabulary {model.config.vocab_size}",
        f"a step     {config.prompts_per_step} prompts x {config.samples_per_prompt} responses = "
        f"{n}; {n // config.responses_per_update} update(s) of {config.responses_per_update}, "
        f"{usual} to {most} micro-batch(es) a GPU each",
        f"tokens     {n * response:,.0f} of responses a step, if they are {response:.0f} on "
        f"average ({MEAN_SHARE:.0%} of the limit: an assumption); "
        f"{n * config.max_response_tokens:,} at most",
        "",
        "Memory per GPU while it learns, estimated:",
        markdown(
            ["part", "GB", "how"],
            [[name, f"{size / GB:.1f}", how] for name, size, how in parts],
        ),
        "",
        *sampler_memory(config, model, parts),
        "",
        disk(model),
        *hours(config, model, n, prompt, response),
    ]
    return "\n".join(lines)


def meta_model(name: str) -> torch.nn.Module:
    """The model without weights: nothing but its config is read."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(name), dtype=torch.bfloat16, attn_implementation="packed"
        )


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


def layer_activations(model: torch.nn.Module) -> int:
    """Bytes a token that autograd keeps of one layer, found by running the first one on no data."""
    kept, tokens = {}, 64
    weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor):
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor  # alive: no address is used twice
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        hidden = torch.empty(
            1, tokens, model.config.hidden_size, dtype=torch.bfloat16, requires_grad=True
        )
        rotary = model.get_decoder().rotary_emb(hidden, torch.empty(1, tokens, dtype=torch.long))
        model.get_decoder().layers[0](
            hidden,
            position_embeddings=rotary,
            lengths=torch.tensor([tokens], device="cpu"),
            ends=None,
        )
    return sum(t.untyped_storage().nbytes() for t in kept.values()) // tokens


def learner_memory(config: PlanConfig, model: torch.nn.Module, microbatches: int) -> list[tuple]:
    """(part, bytes, how) of the policy on one GPU: FSDP2, fp32 masters, bf16 compute."""
    weights, layers = count(model.parameters()), model.config.num_hidden_layers
    layer = count(model.get_decoder().layers[0].parameters())
    rest = weights - count(model.get_decoder().layers.parameters())
    context = config.max_prompt_tokens + config.max_response_tokens
    tokens, width = max(config.tokens_per_microbatch, context), model.config.hidden_size
    inside = layer_activations(model)
    on_gpu = 0 if config.offload else 1
    if config.activation_checkpointing:
        kept, how = layers * 2 * width + inside, "inputs of all layers and the inside of one"
    else:
        kept, how = layers * inside, "of all layers"
    return [
        ("master weights", on_gpu * 4 * weights / config.gpus, "4 B a weight, over all GPUs"),
        ("Adam's moments", on_gpu * 8 * weights / config.gpus, "8 B a weight, over all GPUs"),
        (
            "gradients",
            on_gpu * 4 * weights / (1 if microbatches > 1 else config.gpus),
            "4 B a weight: all of them until the last micro-batch, if there are several",
        ),
        ("gathered weights", 2 * rest + 2 * 2 * layer, "2 B: embedding, head and two layers"),
        ("their gradients", 2 * rest + 2 * 2 * layer, "2 B a weight"),
        ("activations", tokens * kept, f"{how}, {tokens} tokens x {kept:,} B"),
        (
            "head",
            2 * 4 * LOGITS_AT_ONCE + 4 * model.config.vocab_size * width,
            "two chunks of logits and the head's gradient in fp32",
        ),
    ]


def sampler_memory(config: PlanConfig, model: torch.nn.Module, parts: list[tuple]) -> list[str]:
    """Which GPUs it fits on, and how much of vLLM's cache does."""
    c = model.config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    per_token = 2 * 2 * c.num_hidden_layers * c.num_key_value_heads * head_dim
    learning = sum(size for _, size, _ in parts)
    masters, resting = parts[0][1], parts[0][1] + parts[1][1]
    context = config.max_prompt_tokens + config.max_response_tokens
    rows = []
    for size in GPU_SIZES:
        # as Sampler reckons: the moments are not there yet when it starts
        cache = 0.95 * (size * GB - masters) - (resting - masters) - 2 * count(model.parameters())
        fits = learning < size * GB and cache > context * per_token
        room = f"{cache / per_token / context:,.0f} of {context} tokens" if fits else "does not fit"
        rows.append([f"{size} GB", f"{learning / GB:.1f}", room])
    return [
        f"{learning / GB:.1f} GB in all, without CUDA's context, communication buffers and what "
        f"vLLM keeps asleep.\nWhile it samples: {resting / GB:.1f} GB of masters and moments, "
        f"{2 * count(model.parameters()) / GB:.1f} GB of vLLM's weights, and the cache "
        f"({per_token:,} B a token),\nwithout vLLM's own activations and CUDA graphs.",
        "",
        markdown(["GPU", "GB to learn", "full-length responses in flight on a GPU"], rows),
    ]


def disk(model: torch.nn.Module) -> str:
    """What a run's folder needs. Two states and two exports are kept, and a third of each is there
    while it is written."""
    weights = count(model.parameters())
    state = 12 * weights  # fp32 weights and Adam's two moments
    export = 2 * weights  # bf16
    return (
        f"disk       {3 * (state + export) / GB:.1f} GB at the peak: 3 states of {state / GB:.1f} "
        f"GB (12 B a weight) and 3 saved models of {export / GB:.1f} GB (2 B a weight)"
    )


def hours(
    config: PlanConfig, model: torch.nn.Module, n: int, prompt: float, response: float
) -> list[str]:
    """A line for each device that step.py has measured with a model of like size."""
    rows = [json.loads(line) for line in MEASURED.read_text().splitlines()]
    weights, lines = count(model.parameters()), []
    for row in {(row["device"], row["parameters"]): row for row in rows}.values():  # the latest
        ratio = weights / row["parameters"]
        if not 1 / 3 <= ratio <= 3:
            continue
        scale = ratio * row["ranks"] / config.gpus  # its tokens/s are those of all its ranks
        sampling = n * response / row["sample_tokens_per_s"] * scale
        learning = n * (prompt + response) / row["update_tokens_per_s"] * scale
        # in forward passes: the backward pass is two, checkpointing one more, and one for the old
        # log-probs of all updates but the first
        learning *= (3 + config.activation_checkpointing + 1 - config.responses_per_update / n) / (
            3 + row["activation_checkpointing"]
        )
        rest = row["seconds_step"] - row["seconds_sample"] - row["seconds_update"]
        total = config.steps * (sampling + learning + rest) / 3600
        lines.append(
            f"hours      {total:,.2f} on {config.gpus} x {row['device']}: a step samples for "
            f"{sampling:.1f} s and learns for {learning:.1f} s, without evaluations; from "
            f"{row['sample_tokens_per_s']:,.0f} and {row['update_tokens_per_s']:,.0f} tokens/s of "
            f"`{row['command']}`, {row['date']}, torch {row['versions']['torch']}"
            + ("" if 0.99 < ratio < 1.01 else f", scaled by {ratio:.2f} in parameters")
        )
    if not any("cpu" not in row["device"].lower() for row in rows):
        lines.append(
            "hours      on a GPU: not yet measured on a GPU. `python benchmarks/step.py --save "
            "--shape 1.5b --prompts 16 --activation-checkpointing` (or 0.5b, 7b) on yours adds its "
            "tokens/s to benchmarks/measured.jsonl, and plan.py then uses them."
        )
    elif not lines:
        lines.append(
            "hours      no model of a third to three times this size has been measured: "
            "run `python benchmarks/step.py --save --shape ...` with a nearer one."
        )
    return lines


def main() -> None:
    presets = {}
    for name, (description, config) in PRESETS.items():
        gpus = 1 if name in ("toy", "gsm8k-0.5b") else 8
        presets[name] = (description, PlanConfig(**vars(config), gpus=gpus))
    try:
        config = tyro.extras.overridable_config_cli(presets, description=__doc__)
        if config.model.startswith(TOY):
            make_toy(TOY)
        _, problems, held_out, dropped = load_data(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(plan(config, problems, held_out, dropped))


if __name__ == "__main__":
    main()
