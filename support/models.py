"""Refuse a model that this trainer would get wrong, before a run begins.

Training never calls a model as it is: `token_logprobs` packs rows, and has an attention and a head
of its own. No list of names says for which models that gives the model's own log-probs. It is
tried, on a small copy of the model with random weights: the model's own weights are not read.
"""

from copy import deepcopy

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from support.logprobs import definition, token_logprobs

TOLERANCE = 1e-4  # nats a token, in fp32. Measured: right families 2e-6, wrong ones 5e-3 and more
SHORT_ROWS = (7, 12)  # tokens


def check_model(model: str, longest: int) -> None:
    """Return if `model`, a folder or hub name, can be trained on rows of up to `longest` tokens.

    Raises ValueError, which names the model and says why, if `token_logprobs` does not give the
    model's own log-probs, or if vLLM could not load the weights that the trainer sends it.
    """
    try:
        problem = find_problem(AutoConfig.from_pretrained(model), longest)
    except Exception as error:  # an unknown architecture may raise anything
        reason = f"{type(error).__name__}: {error}"[:500]
        raise ValueError(f"{model} cannot be trained, a trial ended with {reason}") from error
    if problem:
        raise ValueError(f"{model} cannot be trained: {problem}")


def find_problem(config: PreTrainedConfig, longest: int) -> str | None:
    """Why a model of this configuration cannot be trained; None if it can."""
    whole = build(config, "meta")  # shapes only, whatever the model's size
    decoder = whole.get_decoder()
    if not hasattr(decoder, "layers"):
        return f"its {type(decoder).__name__} has no `layers`, which make_policy shards one by one"
    experts = find_experts(decoder.layers)
    if experts:
        return (
            f"it is a mixture of experts. Transformers stacks them in one weight (layers.{experts})"
            ", vLLM wants one weight for each, and nothing here translates"
        )
    fast, own = two_copies(cut(config, whole))
    error = largest_error(fast, own, SHORT_ROWS)
    if not error <= TOLERANCE:
        return (
            f"token_logprobs differs by {error:.2g} nats from its own log-probs: its layers or its "
            "head do something that support/logprobs.py does not"
        )
    # What begins to matter only in long rows: sliding windows, rotary scaling by the longest row
    error = largest_error(fast, own, (SHORT_ROWS[0], longest))
    if not error <= TOLERANCE:
        return (
            f"beside a row of {longest} tokens, token_logprobs differs by {error:.2g} nats from "
            "its own log-probs, and beside short rows it does not: lower --max-prompt-tokens or "
            "--max-response-tokens"
        )
    return None


def find_experts(layers: torch.nn.ModuleList) -> str | None:
    """The name of a weight that stacks a layer's experts, (experts, out, in); None without one."""
    for name, module in layers.named_modules():
        of_experts = "expert" in f"{name} {type(module).__name__}".lower()
        for key, weight in module.named_parameters(recurse=False):
            if of_experts and weight.dim() == 3:
                return f"{name}.{key}"
    return None


# -------------------------------------------------------------------------------- small copies


def build(config: PreTrainedConfig, device: str, **settings) -> PreTrainedModel:
    """A model in fp32 as its class initialises it. On "meta" it has shapes but no values."""
    config = deepcopy(config)  # building a model changes it
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **settings)


def cut(config: PreTrainedConfig, whole: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of a copy with the first layers, until there is one of each kind.

    Attention keeps its size. Vocabulary and MLP get smaller, so that even the copy of a large
    model takes seconds.
    """
    config = deepcopy(config)
    text = config.get_text_config()
    layers = whole.get_decoder().layers
    a_value_each = []  # settings with one value for each layer, e.g. layer_types
    for setting in vars(text).values():
        if isinstance(setting, list | tuple) and len(setting) == len(layers):
            a_value_each.append(setting)
    kinds = []
    for index, layer in enumerate(layers):
        kinds.append(f"{describe(layer)} {[setting[index] for setting in a_value_each]}")
    text.num_hidden_layers = 1 + max(kinds.index(kind) for kind in kinds)  # index: of the first
    text.vocab_size = min(text.vocab_size, 512)
    text.pad_token_id = 0  # the old one may be outside of the vocabulary
    if isinstance(getattr(text, "intermediate_size", None), int):
        text.intermediate_size = min(text.intermediate_size, 256)
    return config


def describe(layer: torch.nn.Module) -> str:
    """What tells a layer from another kind of layer: its modules and their settings."""
    parts = []
    for name, module in layer.named_modules():
        settings = {}
        for key, value in vars(module).items():
            if isinstance(value, bool | int | float | str | None) and key != "layer_idx":
                settings[key] = value
        parts.append((name, type(module).__name__, settings))
    return str(parts)


def two_copies(config: PreTrainedConfig) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same random model twice: as training runs it, and with its own attention."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        fast = build(config, "cpu", attn_implementation="packed").train()
        # A new model has biases of 0 and scales of 1: nobody would see that one is left out
        for weight in fast.parameters():
            std = 0.2 if weight.dim() == 1 else weight.shape[-1] ** -0.5
            weight += std * torch.randn_like(weight)
        own = build(config, "cpu").eval()
    own.load_state_dict(fast.state_dict())
    return fast, own


@torch.no_grad()
def largest_error(fast: PreTrainedModel, own: PreTrainedModel, lengths: tuple[int, ...]) -> float:
    """How far a token's log-prob in packed rows can be from that of the row alone, in nats."""
    vocab_size = len(own.get_output_embeddings().weight)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]
    masks = [torch.ones(length - 1) for length in lengths]
    ids = pad_sequence(rows, batch_first=True)
    packed = token_logprobs(fast, ids, pad_sequence(masks, batch_first=True))
    errors = []
    for row, logprobs in zip(rows, packed, strict=True):
        errors.append((logprobs[: len(row) - 1] - definition(own, row)).abs())
    return torch.cat(errors).max().item()
