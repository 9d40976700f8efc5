"""What a run needs, before anything is paid for; and ten minutes on the machine itself.

    python plan.py math-7b --gpus 8                      # reckoned: no GPU, no weights are read
    torchrun --nproc-per-node 8 plan.py math-7b --try    # measured: two steps of full length

All settings of drgrpo.py work here, too. Without --try, all follows from the model's config and the
settings. With --try, two steps are made in runs/NAME-try in which no response ends before its
limit: the worst case. Then a state is saved, loaded and compared, and the model is exported. Where
something does not fit it says "stop" and what to change, and the exit code is 1.
"""

import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import psutil
import torch
import tyro
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

import drgrpo
from support.data import Problem, load_data
from support.logprobs import LOGITS_AT_ONCE, all_rows_at_once
from support.records import markdown, versions
from support.run import FEWEST_SEQUENCES, Run, cache_bytes, from_all_ranks, prepare, timed
from toy import make_toy

GB = 1e9
GPU_SIZES = (24, 40, 80, 141)  # GB
GPU_FLOPS, GPU_BYTES = 989e12, 3350e9  # per second, of an H100: bf16 and memory, data sheet
STATE, MODEL = 12, 2  # bytes per weight on the disk: weights and moments in fp32; bf16
# Assumed:
LIBRARIES = 2e9  # bytes of a rank in the host's memory: the toy's on a CPU; CUDA takes more
MEAN_SHARE = 700 / 3000  # mean length of a response, as a share of the limit
BRIEF_LONG = (0.15, 0.35)  # the same, of models that answer briefly and at length
MFU = (0.4, 0.2)  # share of GPU_FLOPS that the learner reaches
OVERHEAD = (0.002, 0.006)  # seconds of an engine's step beside reading the weights

Parts = list[tuple[str, float, str]]  # (what, bytes, how)


@dataclass(frozen=True)
class PlanConfig(drgrpo.Config):
    """A run's settings, and the GPUs that it would have."""

    gpus: int = 8  # of a node
    nodes: int = 1
    trial: Annotated[bool, tyro.conf.arg(name="try")] = False  # measure on this machine

    @property
    def responses(self) -> int:
        """Of a step."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def context(self) -> int:
        return self.max_prompt_tokens + self.max_response_tokens


def plan(config: PlanConfig, problems: list[Problem], held_out: list, dropped: dict) -> str:
    """The whole report, from what `load_data` returned."""
    model = meta_model(config.model)
    weights, prompt = numel(model), mean_prompt(problems)
    disk, host = needs(config, weights)
    tokens = config.responses_per_update * (prompt + config.max_response_tokens)
    batches = math.ceil(tokens / config.gpus / config.nodes / config.tokens_per_microbatch)
    updates = config.responses // config.responses_per_update
    parts = learner_memory(config, model, batches)
    table = [[name, f"{size / GB:.1f}", how] for name, size, how in parts]
    dropped = {reason: count for reason, count in dropped.items() if count}
    lines = [
        f"{config.name}: {config.model} on {config.nodes} x {config.gpus} GPU(s), "
        f"{config.steps} steps\n",
        f"data      {len(problems)} problems, {len(held_out)} held out; dropped: {dropped}",
        f"prompts   {prompt:.0f} tokens on average; the first: {problems[0].prompt!r}",
        f"model     {weights:,} parameters in {model.config.num_hidden_layers} layers",
        f"a step    {config.responses} responses, {updates} update(s) of at most {batches} "
        "micro-batch(es) per GPU",
        f"disk      {disk / GB:.1f} GB: 3 states of {STATE * weights / GB:.1f} GB (one is being "
        f"written) and 2 models of {MODEL * weights / GB:.1f} GB",
        f"host      {host / GB:.1f} GB per node: copies of a state that is being written, a model "
        f"to export, {LIBRARIES / GB:g} GB\n          per rank for libraries (assumed). Loading "
        f"takes none: the model's {MODEL * weights / GB:.1f} GB are mapped from\n          its "
        "file, once for all ranks",
        hours(config, weights, prompt),
        "\nMemory of a GPU at the fullest moment of learning, reckoned:\n",
        markdown(["part", "GB", "how"], [*table, ["in all", f"{total(parts) / GB:.1f}", ""]]),
        sampler_memory(config, model, parts),
    ]
    return "\n".join(lines)


def mean_prompt(problems: list[Problem]) -> float:
    """In tokens."""
    return sum(len(problem.prompt_ids) for problem in problems) / len(problems)


def meta_model(name: str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The model without weights: nothing but its config is read."""
    config = AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="one row on a GPU"
        )


def numel(module: torch.nn.Module) -> int:
    """Number of weights; a head that is tied to the embedding counts once."""
    return sum(weight.numel() for weight in module.parameters())


def hours(config: PlanConfig, weights: int, prompt: float) -> str:
    """A range, from a GPU's data sheet and the shares of it that are assumed above.

    A forward pass takes 2 operations per weight and token. An engine's step reads all weights;
    some response reaches the limit, so there are as many of them as that has tokens.
    """
    # One pass forward, two backward, one more for checkpointing, one for the old log-probs
    flops = 2 * weights * (4 + config.activation_checkpointing)  # per token
    ends = []
    for share, mfu, overhead in zip(BRIEF_LONG, MFU, OVERHEAD, strict=True):
        tokens = config.responses * (prompt + share * config.max_response_tokens)
        learning = flops * tokens / (config.gpus * config.nodes * GPU_FLOPS * mfu)
        sampling = config.max_response_tokens * (2 * weights / GPU_BYTES + overhead)
        ends.append(config.steps * (sampling + learning) / 3600)
    return (
        f"hours     {ends[0]:,.1f} to {ends[1]:,.1f} on H100s, reckoned, without evaluations: "
        f"responses of {BRIEF_LONG[0]:.0%} to {BRIEF_LONG[1]:.0%} of the\n          limit, a "
        f"learner at {MFU[0]:.0%} to {MFU[1]:.0%} of the GPU's peak (assumed). --try measures"
    )


# ------------------------------------------------------------------------------------- memory


def one_row_on_a_gpu(module, query, key, value, attention_mask, scaling=None, **others):
    """The attention of training on a GPU, for tensors without data."""
    ends = torch.empty(2, dtype=torch.int32, device=query.device)
    return all_rows_at_once(query, key, value, ends, query.shape[2], scaling), None


AttentionInterface.register("one row on a GPU", one_row_on_a_gpu)


def layer_memory(model: PreTrainedModel, tokens: int) -> tuple[int, int]:
    """Bytes that a layer keeps for its backward pass, and has at most in it.

    Torch's MemTracker follows the first layer, which runs without data. Its input and its weights'
    gradients count, its weights do not.
    """
    layer, width = model.get_decoder().layers[0], model.config.hidden_size
    weights = numel(layer) * model.dtype.itemsize
    with torch.device("meta"):
        hidden = torch.empty(1, tokens, width, dtype=model.dtype, requires_grad=True)
        rotary = model.get_decoder().rotary_emb(hidden, torch.empty(1, tokens, dtype=torch.long))
        with MemTracker() as tracker:
            out = layer(hidden, position_embeddings=rotary)
            after = tracker.get_tracker_snapshot("current")[out.device]["Total"]
            out.backward(torch.empty_like(out))
    most = tracker.get_tracker_snapshot("peak")[out.device]["Total"]
    layer.zero_grad()
    return after - weights - out.nbytes, most - weights


def learner_memory(config: PlanConfig, model: PreTrainedModel, micro_batches: int) -> Parts:
    """Of one GPU at the fullest moment of an update; FSDP2 shards within a node.

    Three moments can be the fullest: the backward pass of the head, that of the last layer, and the
    end, when the gradients of FSDP's root group (embedding, head, last norm) are reduced.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings().weight.numel()
    layers, layer = len(decoder.layers), numel(decoder.layers[0])
    root = numel(model) - numel(decoder.layers)
    number, share = model.dtype.itemsize, 1 / config.gpus  # 2 bytes in bf16
    tokens = max(config.tokens_per_microbatch, config.context)
    hidden = number * tokens * model.config.hidden_size
    logits = min(LOGITS_AT_ONCE, tokens * model.config.vocab_size)  # of a chunk
    kept, backward = layer_memory(model, tokens)
    of_layers = f"{tokens} tokens: all layers' activations"
    if config.activation_checkpointing:
        kept, of_layers = hidden, f"{tokens} tokens: the inputs of all layers"
    shard = 0 if config.offload else numel(model) * share
    earlier = shard if micro_batches > 1 else 0  # else each comes where an activation goes
    always = [
        ("master weights", 4 * shard, "4 B per weight, over a node"),
        ("Adam's moments", 8 * shard, "8 B per weight, over a node"),
        ("gradients", 4 * earlier, "4 B per weight, over a node; of earlier micro-batches"),
    ]
    at_head = [
        ("gathered weights", number * (root + layer), "embedding, head and a layer"),
        ("head", 8 * head + 6 * logits, "its gradient and a chunk's in fp32; logits"),
        ("activations", layers * kept + 3 * hidden, of_layers),
    ]
    at_layer = [
        ("gathered weights", number * (root + 2 * layer), "embedding, head and two layers"),
        ("head", number * head, "its gradient"),
        ("to reduce", 4 * layer * (1 + share), "fp32 gradients of a layer, and their shard"),
        ("activations", (layers - 1) * kept + backward, f"{of_layers}; backward pass of one"),
    ]
    at_end = [
        ("root", number * root, "gradients of embedding and head"),
        ("to reduce", 4 * (root + layer) * (1 + share), "the same in fp32; those of a layer"),
        ("activations", backward, f"{tokens} tokens: backward pass of the first layer"),
    ]
    return always + max(at_head, at_layer, at_end, key=total)


def total(parts: Parts) -> float:
    return sum(size for _, size, _ in parts)


def sampler_memory(config: PlanConfig, model: PreTrainedModel, parts: Parts) -> str:
    """Which GPUs the run fits on, and how many responses of full length vLLM holds there."""
    masters, states = parts[0][1], total(parts[:2])
    prompts = math.ceil(config.prompts_per_step / config.gpus / config.nodes)
    sequences = max(FEWEST_SEQUENCES, prompts * config.samples_per_prompt)
    weights, logits = 2 * numel(model), 4 * sequences * model.config.vocab_size
    row = cache_bytes(model.config, config.context)
    held = []
    for size in GPU_SIZES:
        # As Sampler does: it starts before there are moments
        room = 0.95 * (size * GB - masters) - (states - masters) - weights - logits
        fits = total(parts) < size * GB and room > row
        number = f"{min(room / row, sequences):.0f} responses" if fits else "does not fit"
        held.append(f"{size} GB: {number}")
    return (
        "\nCUDA, NCCL and the sleeping engine need 3 to 6 GB more, by guess. A GPU holds at once, "
        f"of full length\n({row / GB:.2f} GB each), beside {states / GB:.1f} GB of masters and "
        f"moments and {weights / GB:.1f} GB of vLLM's weights:\n{'; '.join(held)}"
    )


def needs(config: PlanConfig, weights: int) -> tuple[float, float]:
    """Bytes of the run's folder and of a node's memory, both at their fullest."""
    host = STATE + MODEL + 16 * config.offload  # 16: weights, moments and gradients in fp32
    return (3 * STATE + 2 * MODEL) * weights, host * weights + config.gpus * LIBRARIES


# -------------------------------------------------------------------------------------- --try


def trial(config: PlanConfig) -> None:
    """Measure in a scratch folder, which is removed. Exits with code 1 if something must stop."""
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    nodes = int(os.environ.get("WORLD_SIZE", 1)) // local
    config = replace(config, name=f"{config.name}-try", gpus=local, nodes=nodes, track="no")
    if rank == 0:  # if it ends, torchrun ends the others
        shutil.rmtree(config.folder, ignore_errors=True)  # of a trial that was killed
        refuse_small_machine(config)
    prepared = prepare(config)
    watch, give_rewards = Watch(), drgrpo.give_rewards

    def half_right(*arguments):
        """Grades as usual, and then rewards every second response: all of them are trained."""
        rollouts = give_rewards(*arguments)
        for place, rollout in enumerate(rollouts):
            rollout.reward = float(place % 2)
        return rollouts

    drgrpo.timed, drgrpo.give_rewards = watch, half_right
    with ExitStack() as ends:
        if rank == 0:
            ends.callback(shutil.rmtree, config.folder)
        try:
            measured = measure(config, prepared, watch, ends)
        except Exception as error:  # said at once: without this rank, the others may not end
            phase = watch.phases[-1] if watch.phases else "comparison"
            print(f"stop: rank {rank}, {phase}: {error}\n{ladder(config, phase)}", flush=True)
            raise
    if rank == 0:
        print(measured)


def refuse_small_machine(config: PlanConfig) -> None:
    """Say what the run needs of disk and host, and what is free; exit if that is less."""
    disk, host = needs(config, numel(meta_model(config.model)))
    config.folder.parent.mkdir(exist_ok=True)
    disk_free = shutil.disk_usage(config.folder.parent).free
    host_free = psutil.virtual_memory().available
    for name, need, free in (("disk", disk, disk_free), ("host's memory", host, host_free)):
        line = f"{name}: {need / GB:.3f} GB needed, {free / GB:.3f} GB free"
        if need > free:
            sys.exit(f"stop: {line}")
        print(line)


def ladder(config: PlanConfig, phase: str) -> str:
    """What to change, in order, if memory ran out in this phase."""
    rungs = [] if config.offload else ["--offload"]
    if phase in ("old_logprobs", "update") and config.tokens_per_microbatch > config.context:
        fewer = max(config.context, config.tokens_per_microbatch // 2)
        rungs.insert(0, f"--tokens-per-microbatch {fewer}")
    return f"If memory ran out, try in this order: {', '.join([*rungs, 'more GPUs'])}"


def measure(config: PlanConfig, prepared: tuple, watch: "Watch", ends: ExitStack) -> str:
    """Make two steps, a state and an export. Returns the report, of all ranks.

    Raises RuntimeError if a state comes back other than it was.
    """
    tokenizer, problems, held_out, facts = prepared
    with watch({}, "start"):
        policy, optimizer, sampler, grader = ends.enter_context(drgrpo.start(config))
        run = Run(config, tokenizer, problems, facts, policy, optimizer)
        ends.enter_context(run)
    let_no_response_end(sampler)
    for step in range(2):  # the first one warms up
        metrics, _ = drgrpo.train_step(config, step, problems, policy, optimizer, sampler, grader)
    with watch({}, "copy a state"):
        run.states.save(2)
    with watch({}, "write a state"):
        run.states.wait()
    saved = [tensor.to("cpu", copy=True) for tensor in shards(policy, optimizer)]
    for tensor in shards(policy, optimizer):
        tensor.zero_()
    with watch({}, "load a state"):
        run.states.load()
    loaded = [tensor.cpu() for tensor in shards(policy, optimizer)]
    if not all(map(torch.equal, saved, loaded)):
        raise RuntimeError("the state that was loaded is not the one that was to be saved")
    with watch({}, "export"):
        run.export(2, drgrpo.full_weights(policy.model, policy.saved_dtype))
    return report(config, problems, held_out, watch, metrics)


def shards(policy: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """This rank's weights and moments."""
    moments = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [tensor.detach() for tensor in (*policy.parameters(), *moments)]
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def let_no_response_end(sampler: drgrpo.Sampler) -> None:
    """Every response gets its full length. EOS and stop strings may be drawn and are tokens like
    any other then: no log-prob is another."""
    generate = sampler.llm.generate

    def full_length(prompts, params, **options):
        for one in params:
            one.ignore_eos, one.stop, one.stop_token_ids = True, [], []
        return generate(prompts, params, **options)

    sampler.llm.generate = full_length


class Watch:
    """Takes the place of `drgrpo.timed`: keeps each phase's seconds and highest memory."""

    def __init__(self):
        self.seconds: dict[str, float] = {}  # the last time
        self.peaks: dict[str, float] = {}  # bytes
        self.phases: list[str] = []  # that are not over, or failed
        threading.Thread(target=self.look, daemon=True).start()

    def look(self) -> None:
        while True:
            used = memory_in_use()
            for phase in list(self.phases):
                self.peaks[phase] = max(self.peaks.get(phase, 0), used)
            time.sleep(0.02)

    @contextmanager
    def __call__(self, metrics: dict, phase: str) -> Iterator[None]:
        self.peaks[phase] = max(self.peaks.get(phase, 0), memory_in_use())
        self.phases.append(phase)
        with timed(metrics, phase):
            yield
        self.phases.remove(phase)
        self.seconds[phase] = metrics[f"seconds_{phase}"]


def memory_in_use() -> float:
    """Bytes: of this rank's GPU, by all processes; without a GPU, of this process."""
    if not drgrpo.CUDA:
        return psutil.Process().memory_info().rss
    if not torch.cuda.is_initialized():  # that is for start_ranks to do
        return 0
    free, size = torch.cuda.mem_get_info(int(os.environ["LOCAL_RANK"]))
    return size - free


def report(
    config: PlanConfig, problems: list[Problem], held_out: list, watch: Watch, metrics: dict
) -> str:
    """What the trial has measured: of all ranks the longest time and the highest memory."""
    rss = psutil.Process().memory_info().rss
    seconds_of, peaks_of, rss_of = zip(*from_all_ranks((watch.seconds, watch.peaks, rss)))
    seconds = {phase: max(rank[phase] for rank in seconds_of) for phase in watch.seconds}
    peaks = {phase: max(rank[phase] for rank in peaks_of) for phase in watch.peaks}
    rows = [[phase, f"{seconds[phase]:.2f}", f"{peaks[phase] / GB:.2f}"] for phase in seconds]
    state, model = (folder_gb(config.folder / name) for name in ("state", "model"))
    prompt, limit = mean_prompt(problems), config.max_response_tokens
    share = (prompt + MEAN_SHARE * limit) / (prompt + limit)
    step = sum(seconds[phase] for phase in ("sample", "sleep", "score", "update", "sync"))
    evaluation = seconds["sample"] * len(held_out) / config.responses + seconds["export"]
    most = config.steps * step + (config.steps / config.eval_every + 1) * evaluation
    write = seconds["write a state"]
    memory, device = "process", f"CPU, {torch.backends.cpu.get_cpu_capability()}"
    if drgrpo.CUDA:
        memory, device = "GPU", torch.cuda.get_device_name()
    lines = [
        markdown(["phase", "seconds", f"highest memory of a {memory}, GB"], rows),
        f"\ngap       {metrics['gap']:.2g} nats per token; all responses have "
        f"{metrics['length']:.0f} tokens",
        f"saving    {state:.3f} GB at {state / write:.3f} GB/s, while a run goes on; it came back "
        f"equal. A model has {model:.3f} GB",
        f"host      {sum(rss_of) / config.nodes / GB:.2f} GB per node in all processes",
        f"hours     at most {most / 3600:,.2f}, if all responses have full length; "
        f"{share * most / 3600:,.2f} if they have\n          {MEAN_SHARE:.0%} of it on average "
        "(assumed) and time follows the tokens",
        f"on        {device}; " + ", ".join(f"{k} {v}" for k, v in versions().items()),
    ]
    return "\n".join(lines)


def folder_gb(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*")) / GB


def main() -> None:
    presets = {}
    for name, (description, config) in drgrpo.PRESETS.items():
        gpus = 1 if name in ("toy", "gsm8k-0.5b") else 8
        presets[name] = (description, PlanConfig(**vars(config), gpus=gpus))
    try:
        config = tyro.extras.overridable_config_cli(presets, description=__doc__)
        if config.model.startswith(drgrpo.TOY):
            make_toy(drgrpo.TOY)
        if config.trial:
            trial(config)
        else:
            _, problems, held_out, dropped = load_data(config)
            print(plan(config, problems, held_out, dropped))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
