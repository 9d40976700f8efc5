"""What a run needs, before anything is paid for: no GPU, and no weights are read.

    python plan.py math-7b --gpus 8
    python plan.py math-7b --gpus 8 --nodes 2

All settings of drgrpo.py work here, too. Sizes follow from the model's config and the settings;
memory and network from formulas that are written next to each part, the activations of a layer
from running one without data. Hours come from tokens per second that benchmarks/step.py measured
and wrote to benchmarks/measured.jsonl; beside them stands a range that is only reckoned, from
assumptions that the report names. (The toy's model is made if it is not there: a minute.)
"""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from drgrpo import PRESETS, TOY, Config, Dtype
from support.data import Problem, load_data
from support.engine import BLOCK, FEWEST_SEQUENCES, cache_bytes
from support.logprobs import LOGITS_AT_ONCE
from support.metrics import markdown
from toy import make_toy

MEASURED = Path(__file__).with_name("benchmarks") / "measured.jsonl"
# The mean length of a response, as a share of the limit: in the mix of benchmarks/shapes.py, and of
# models that answer briefly or at length (assumed)
MEAN_SHARE = 700 / 3000
BRIEF_LONG = (0.15, 0.35)
GPU_SIZES = (24, 40, 80, 141)  # GB
GB = 1e9

# What the reckoned hours assume
MFU = (0.2, 0.4)  # share of the peak that the learner reaches
OVERHEAD = (0.002, 0.006)  # seconds of an engine's step beside reading the memory


@dataclass(frozen=True)
class PlanConfig(Config):
    """A run's settings, and the GPUs that it would have."""

    dtype: Dtype = "bfloat16"  # of computing, as on a GPU
    gpus: int = 8  # of a node
    nodes: int = 1
    gpu_tflops: float = 989  # a GPU's peak in dense bf16; H100, data sheet
    gpu_gb_s: float = 3350  # GB/s of a GPU's memory; H100, data sheet
    node_gb_s: float = 300  # GB/s that a GPU sends within its node: assumed
    network_gb_s: float = 40  # GB/s that a GPU sends to another node: assumed

    @property
    def ranks(self) -> int:
        """GPUs of the whole run."""
        return self.gpus * self.nodes

    @property
    def responses(self) -> int:
        """Responses of a round."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def updates(self) -> int:
        """Updates of a round."""
        return self.responses // self.responses_per_update

    @property
    def context(self) -> int:
        return self.max_prompt_tokens + self.max_response_tokens

    @property
    def bytes_per_number(self) -> int:
        """In the dtype of computing."""
        return 2 if self.dtype == "bfloat16" else 4


@dataclass(frozen=True)
class Workload:
    """Numbers of tokens, on average."""

    prompt: float  # of a prompt
    share: float = MEAN_SHARE  # mean length of a response, as a share of the limit

    def response(self, config: PlanConfig) -> float:
        return config.max_response_tokens * self.share

    def micro_batches(self, config: PlanConfig) -> int:
        """Micro-batches of an update on each GPU."""
        tokens = config.responses_per_update * (self.prompt + self.response(config))
        return math.ceil(tokens / config.ranks / config.tokens_per_microbatch)


@dataclass(frozen=True)
class Weights:
    """Numbers of weights of a model."""

    model: torch.nn.Module = field(repr=False)  # without values

    @property
    def all(self) -> int:
        return count(self.model.parameters())

    @property
    def layers(self) -> int:
        return count(self.model.get_decoder().layers.parameters())

    @property
    def layer(self) -> int:
        return count(self.model.get_decoder().layers[0].parameters())

    @property
    def rest(self) -> int:
        """Embedding, head and last norm: FSDP's root group."""
        return self.all - self.layers

    @property
    def head(self) -> int:
        return self.model.config.vocab_size * self.model.config.hidden_size


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


def plan(
    config: PlanConfig,
    problems: list[Problem],
    held_out: list[Problem],
    dropped: dict[str, int],
) -> str:
    """The whole report, from what `load_data` returned."""
    model = meta_model(config.model, config.dtype)
    weights = Weights(model)
    prompts = [len(problem.prompt_ids) for problem in problems]
    usual = Workload(sum(prompts) / len(prompts))
    longest = Workload(usual.prompt, 1.0).micro_batches(config)
    parts = learner_memory(config, model, longest)
    epochs = config.steps * config.prompts_per_step / len(problems)
    nodes = f"{config.nodes} nodes of " if config.nodes > 1 else ""
    response = usual.response(config)
    lines = [
        f"{config.name}: {config.model} on {nodes}{config.gpus} GPU(s), {config.steps} steps",
        "",
        f"data       {len(problems)} problems, {len(held_out)} held out; dropped: {dropped}",
        f"           prompts of {usual.prompt:.0f} tokens on average and {max(prompts)} at most; "
        f"{epochs:.2f} epochs",
        f"template   {config.template}: {problems[0].prompt!r}",
        f"model      {weights.all:,} parameters, {weights.layers:,} of them in "
        f"{model.config.num_hidden_layers} layers; vocabulary {model.config.vocab_size}",
        f"a step     {config.prompts_per_step} prompts x {config.samples_per_prompt} responses = "
        f"{config.responses}; {config.updates} update(s) of {config.responses_per_update}, "
        f"{usual.micro_batches(config)} to {longest} micro-batch(es) a GPU each",
        f"tokens     {config.responses * response:,.0f} of responses a step, if they are "
        f"{response:.0f} on average ({MEAN_SHARE:.0%} of the limit: an assumption); "
        f"{config.responses * config.max_response_tokens:,} at most",
        "",
        "Memory per GPU while it learns, estimated:",
        markdown(
            ["part", "GB", "how"],
            [[name, f"{size / GB:.1f}", how] for name, size, how in parts],
        ),
        "",
        *sampler_memory(config, model, parts),
        "",
        *network(config, weights, usual.micro_batches(config)),
        "",
        disk(weights.all),
        *hours(config, weights.all, usual.prompt),
        reckoned_hours(config, model, usual.prompt),
    ]
    return "\n".join(lines)


def meta_model(name: str, dtype: str = "bfloat16") -> torch.nn.Module:
    """The model without weights: nothing but its config is read."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(name),
            dtype=getattr(torch, dtype),
            attn_implementation="only shapes",
        )


# ------------------------------------------------------------------------------------- memory


class OnlyShapes(torch.autograd.Function):
    """Attention on no data: keeps for its backward pass what the kernel for GPUs keeps."""

    @staticmethod
    def forward(ctx, query, key, value):
        rows, heads, tokens, size = query.shape
        out = query.new_empty(rows, tokens, heads, size)
        ctx.save_for_backward(query, key, value, out, out.new_empty(heads, tokens).float())
        return out


def only_shapes(module, query, key, value, attention_mask, **others):
    return OnlyShapes.apply(query, key, value), None


AttentionInterface.register("only shapes", only_shapes)


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
            1, tokens, model.config.hidden_size, dtype=model.dtype, requires_grad=True
        )
        rotary = model.get_decoder().rotary_emb(hidden, torch.empty(1, tokens, dtype=torch.long))
        model.get_decoder().layers[0](hidden, position_embeddings=rotary)
    return sum(t.untyped_storage().nbytes() for t in kept.values()) // tokens


def learner_memory(config: PlanConfig, model: torch.nn.Module, micro_batches: int) -> list[tuple]:
    """(part, bytes, how) of the policy on one GPU: FSDP2 within a node, fp32 master weights."""
    weights, number = Weights(model), config.bytes_per_number  # 2 in bf16
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    tokens = max(config.tokens_per_microbatch, config.context)
    inside = layer_activations(model)
    logits = min(LOGITS_AT_ONCE, tokens * model.config.vocab_size)  # of a chunk
    on_gpu = 0 if config.offload else 1
    holders = config.gpus if micro_batches == 1 else 1  # GPUs that share the gradients
    whole = number * (weights.rest + 2 * weights.layer)
    if config.activation_checkpointing:
        kept, how = layers * number * width + inside, "inputs of all layers and the inside of one"
    else:
        kept, how = layers * inside, "of all layers"
    return [
        ("master weights", on_gpu * 4 * weights.all / config.gpus, "4 B a weight, over a node"),
        ("Adam's moments", on_gpu * 8 * weights.all / config.gpus, "8 B a weight, over a node"),
        (
            "gradients",
            on_gpu * 4 * weights.all / holders,
            "4 B a weight: all of them until the last micro-batch, if there are several",
        ),
        ("gathered weights", whole, f"{number} B: embedding, head and two layers"),
        ("their gradients", whole, f"{number} B a weight"),
        (
            "gradients on their way",
            4 * max(weights.rest, weights.layer),
            "4 B a weight of the largest group: what FSDP adds up over the GPUs",
        ),
        ("activations", tokens * kept, f"{how}, {tokens} tokens x {kept:,} B"),
        (
            "head",
            2 * 4 * logits + 2 * 4 * weights.head,
            "two chunks of logits; the head's gradient in fp32, and a chunk's part of it",
        ),
    ]


def sampler_memory(config: PlanConfig, model: torch.nn.Module, parts: list[tuple]) -> list[str]:
    """Which GPUs it fits on, and how much of vLLM's cache does."""
    weights, per_token = Weights(model), cache_bytes(model.config, 1, config.bytes_per_number)
    learning = sum(size for _, size, _ in parts)
    masters, moments = parts[0][1], parts[1][1]
    prompts = math.ceil(config.prompts_per_step / config.ranks)
    sequences = max(FEWEST_SEQUENCES, prompts * config.samples_per_prompt)
    engine = config.bytes_per_number * weights.all
    buffer = 4 * sequences * model.config.vocab_size
    wanted = sequences * (config.context + BLOCK) * per_token
    rows = []
    for size in GPU_SIZES:
        # as Sampler reckons: the moments are not there yet when it starts
        room = 0.95 * (size * GB - masters) - moments - engine - buffer
        fits = learning < size * GB and room > config.context * per_token
        cache = min(room, wanted)
        in_flight = min(cache / per_token / config.context, sequences)
        held = f"{in_flight:,.0f} of {config.context} tokens"
        rows.append([f"{size} GB", f"{learning / GB:.1f}", held if fits else "does not fit"])
    return [
        f"{learning / GB:.1f} GB in all, without CUDA's context, communication buffers and what "
        f"vLLM keeps asleep.\nWhile it samples: {(masters + moments) / GB:.1f} GB of masters and "
        f"moments; vLLM's weights {engine / GB:.1f} GB,\nits logits {buffer / GB:.1f} GB "
        f"({sequences} sequences at once) and its cache ({per_token:,} B a token; the run can use "
        f"{wanted / GB:.1f} GB\nof it), without its activations and CUDA graphs.",
        "",
        markdown(["GPU", "GB to learn", "full-length responses in flight on a GPU"], rows),
    ]


def disk(weights: int) -> str:
    """What a run's folder needs: two states and two exports, and one more of each while it is
    being written."""
    state = 12 * weights  # fp32 weights and Adam's two moments
    export = 2 * weights  # bf16
    return (
        f"disk       {3 * (state + export) / GB:.1f} GB at the peak: 3 states of {state / GB:.1f} "
        f"GB (12 B a weight) and 3 saved models of {export / GB:.1f} GB (2 B a weight)"
    )


# -------------------------------------------------------------------------- network and hours


def network(config: PlanConfig, weights: Weights, micro_batches: int) -> list[str]:
    """What a GPU sends in an update: within its node, and to other nodes."""
    if config.ranks == 1:
        return ["network    nothing: there is one GPU"]
    others = (config.gpus - 1) / config.gpus
    # Layers are gathered for the forward and for the backward pass, the root group once
    a_pass = config.bytes_per_number * weights.all * others
    for_gradient = config.bytes_per_number * (2 * weights.layers + weights.rest) * others
    old_logprobs = (1 - 1 / config.updates) * a_pass
    gathered = micro_batches * (for_gradient + old_logprobs)
    reductions = micro_batches if config.offload else 1
    reduced = reductions * 4 * weights.all * others
    # A ring's all-reduce of this GPU's shard, over the nodes
    copied = reductions * 2 * (config.nodes - 1) / config.nodes * 4 * weights.all / config.gpus
    within = (gathered + reduced) / GB / config.node_gb_s
    between = copied / GB / config.network_gb_s
    return [
        f"network    a GPU sends in an update, on average: {gathered / GB:.1f} GB of weights "
        f"(all-gather; {micro_batches} micro-batch(es)) and\n           {reduced / GB:.1f} GB of "
        f"gradients (reduce-scatter) within its node: {within:.2f} s at {config.node_gb_s:g} GB/s "
        f"(assumed);\n           {copied / GB:.1f} GB of gradients (all-reduce) to other nodes: "
        f"{between:.2f} s at {config.network_gb_s:g} GB/s (assumed).\n           FSDP hides most "
        f"of it behind computing. The engine gets {a_pass / GB:.1f} GB of weights a step.",
    ]


def hours(config: PlanConfig, weights: int, prompt: float) -> Iterator[str]:
    """A line for each device that step.py has measured with a model of like size."""
    rows = [json.loads(line) for line in MEASURED.read_text().splitlines()]
    latest = {(row["device"], row["parameters"]): row for row in rows}
    found = False
    for row in latest.values():
        ratio = weights / row["parameters"]
        if not 1 / 3 <= ratio <= 3:
            continue
        found = True
        few, usual, many = (
            measured_seconds(config, Workload(prompt, share), row, ratio)
            for share in (BRIEF_LONG[0], MEAN_SHARE, BRIEF_LONG[1])
        )
        in_hours = [config.steps * sum(seconds) / 3600 for seconds in (few, usual, many)]
        yield (
            f"hours      {in_hours[1]:,.2f} on {config.ranks} x {row['device']} "
            f"({in_hours[0]:,.2f} to {in_hours[2]:,.2f} for responses of {BRIEF_LONG[0]:.0%} to "
            f"{BRIEF_LONG[1]:.0%} of the limit): a step samples for {usual[0]:.1f} s and learns "
            f"for {usual[1]:.1f} s, without evaluations; from {row['sample_tokens_per_s']:,.0f} "
            f"and {row['update_tokens_per_s']:,.0f} tokens/s of `{row['command']}`, {row['date']}, "
            f"torch {row['versions']['torch']}"
            + ("" if 0.99 < ratio < 1.01 else f", scaled by {ratio:.2f} in parameters")
        )
    if all("cpu" in row["device"].lower() for row in rows):
        yield (
            "hours      on a GPU: not yet measured on a GPU. `python benchmarks/step.py --save "
            "--shape 1.5b --prompts 16 --activation-checkpointing` (or 0.5b, 7b) on yours adds its "
            "tokens/s to benchmarks/measured.jsonl, and plan.py then uses them."
        )
    elif not found:
        yield (
            "hours      no model of a third to three times this size has been measured: "
            "run `python benchmarks/step.py --save --shape ...` with a nearer one."
        )


def measured_seconds(
    config: PlanConfig, work: Workload, row: dict, ratio: float
) -> tuple[float, float, float]:
    """Seconds of a step: to sample, to learn, and the rest; `row` is what step.py measured."""
    scale = ratio * row["ranks"] / config.ranks  # its tokens/s are those of all its ranks
    response = work.response(config)
    sampling = config.responses * response / row["sample_tokens_per_s"] * scale
    learning = config.responses * (work.prompt + response) / row["update_tokens_per_s"] * scale
    learning *= passes(config) / (3 + row["activation_checkpointing"])
    rest = row["seconds_step"] - row["seconds_sample"] - row["seconds_update"]
    return sampling, learning, rest


def passes(config: PlanConfig) -> float:
    """What a round's learning costs, in forward passes over its tokens.

    The backward pass is two, checkpointing one more, and there is one for the old log-probs of all
    updates but the first.
    """
    return 3 + config.activation_checkpointing + 1 - 1 / config.updates


def reckoned_hours(config: PlanConfig, model: torch.nn.Module, prompt: float) -> str:
    """A range of hours from the GPU's data sheet and from shares of it that are assumed.

    An engine's step reads all weights and the cache of the responses in flight; some response
    reaches the limit, so there are as many steps as that has tokens.
    """
    weights, c = Weights(model), model.config
    ends = []
    for share, mfu, overhead in zip(BRIEF_LONG, reversed(MFU), OVERHEAD, strict=True):
        work = Workload(prompt, share)
        response = work.response(config)
        length = prompt + response
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        attention = 2 * c.num_hidden_layers * c.num_attention_heads * head_dim * length**2
        forward = 2 * (length * weights.layers + response * weights.head) + attention
        flops = passes(config) * config.responses * forward
        learning = flops / (config.ranks * config.gpu_tflops * 1e12 * mfu)
        tokens_to_read = config.responses / config.ranks * (prompt + response / 2)
        gb_read = config.max_response_tokens * (config.bytes_per_number * weights.all / GB)
        # each response is read while it lasts, which is a share of the steps
        gb_read += response * cache_bytes(c, 1, config.bytes_per_number) * tokens_to_read / GB
        sampling = gb_read / config.gpu_gb_s + config.max_response_tokens * overhead
        ends.append(config.steps * (sampling + learning) / 3600)
    missing = "evaluations"
    if config.offload:
        missing += ", the CPU's AdamW and the way of weights and gradients to it and back"
    return (
        f"hours      {ends[0]:,.1f} to {ends[1]:,.1f} on {config.ranks} GPU(s), reckoned and not "
        f"measured, without {missing}: {config.gpu_tflops:g} TFLOPS and {config.gpu_gb_s:g} GB/s "
        f"a GPU; assumed are responses of {BRIEF_LONG[0]:.0%} to {BRIEF_LONG[1]:.0%} of the "
        f"limit, a learner at {MFU[1]:.0%} to {MFU[0]:.0%} of the peak (with what it computes "
        f"again), and {1000 * OVERHEAD[0]:g} to {1000 * OVERHEAD[1]:g} ms an engine step beside "
        "reading its memory"
    )


def main() -> None:
    presets = {}
    for name, (description, config) in PRESETS.items():
        gpus = 1 if name in ("toy", "gsm8k-0.5b") else 8
        settings = vars(config) | {"dtype": "bfloat16", "gpus": gpus}
        presets[name] = (description, PlanConfig(**settings))
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
