"""Log-probs of response tokens, without padding and without ever holding all logits.

`definition` says in five lines what is computed. `token_logprobs` computes the same and is what
training calls: rows lie end to end, and the head works a chunk at a time. `check_model` refuses a
model for which the two differ.

Shapes: B rows of T tokens, S of them real, R response tokens, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

LOGITS_AT_ONCE = 2**27  # rows * V of a chunk of the head: 0.5 GiB in fp32
MAX_HEAD_SIZE = 256  # of the attention kernel for GPUs, FlashAttention 2


def definition(model: PreTrainedModel, ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """What `token_logprobs` must equal: the log-probs of tokens 1..T-1 of one row, ids (T,).

    Everything is the model's own: its attention (load it with "eager" or "sdpa"), its logits.
    """
    logits = model(input_ids=ids[None], use_cache=False).logits[0]  # (T, V)
    logprobs = (logits[:-1].float() / temperature).log_softmax(dim=1)
    return logprobs.gather(1, ids[1:, None]).squeeze(1)  # (T-1,)


def token_logprobs(
    model: PreTrainedModel,
    ids: torch.Tensor,
    response_mask: torch.Tensor,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Log-probs of the response tokens: ids (B, T), response_mask (B, T-1) -> (B, T-1) in fp32.

    Column t belongs to token t+1, given tokens 0..t. It is 0 where response_mask is 0. The model
    sees each row up to its last response token, and no row sees another. Two rows of 3 and 2
    tokens (the 0 is padding) are computed as one row of 5:

        ids   5 6 7      packed ids   5 6 7 8 9
              8 9 0      positions    0 1 2 0 1
    """
    mask = response_mask.bool()
    column = torch.arange(ids.shape[1], device=ids.device)  # (T,)
    last = (mask * column[1:]).amax(dim=1)  # (B,), the column of the last response token
    lengths = last + 1
    real = column < lengths[:, None]  # (B, T), without padding
    # Not __call__: where vLLM runs transformers' class, it replaces that for the whole process
    hidden = model.get_decoder().forward(  # (1, S, D)
        ids[real][None],
        position_ids=column.expand_as(ids)[real][None],
        use_cache=False,  # no cache: with one, transformers may treat the packed rows as one text
        lengths=lengths.cpu(),
        ends=F.pad(lengths.cumsum(0), (1, 0)).int(),
    )[0]
    predicts = F.pad(mask, (0, 1))  # (B, T), whether the next token is of the response
    values = HeadLogprobs.apply(
        hidden[0, predicts[real]],  # (R, D)
        model.get_output_embeddings().weight,
        ids[:, 1:][mask],
        temperature,
    )
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device=ids.device)
    return zeros.masked_scatter(mask, values)


# --------------------------------------------------------------------------------- attention


def packed_attention(
    module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    *,
    lengths: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **others,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each of B rows laid end to end, as transformers calls it.

    query (1, H, S, d), key and value (1, H_kv, S, d) -> (1, S, H, d). lengths: (B,) on the CPU;
    ends: (B+1,) from 0 to S, where rows end. What else a model asks for in `others` is not done:
    check_model sees whether it matters. Raises ValueError if a row is longer than the model's
    sliding window, or if its scores are capped.
    """
    if lengths is None:
        raise ValueError("the model does not pass `lengths` and `ends` on to its attention")
    if others.get("softcap") is not None:  # a trial sees it only where scores are large
        raise ValueError("the model caps its attention scores, and packed_attention does not")
    longest = int(lengths.max())
    if sliding_window is not None and sliding_window < longest:
        raise ValueError(
            f"the model has a sliding window of {sliding_window}, and a row has {longest} tokens: "
            "packed_attention has no window, so rows must be no longer"
        )
    if query.is_cuda:
        return all_rows_at_once(query, key, value, ends, longest, scaling), None
    return row_by_row(query, key, value, lengths, scaling), None


def all_rows_at_once(query, key, value, ends, longest: int, scaling) -> torch.Tensor:
    """With FlashAttention's kernel for rows of different lengths, in half precision."""
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (S, H, d)
    out = varlen_attn(
        query,
        key,
        value,
        ends,
        ends,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),  # everything before a token, nothing after it
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, torch.Tensor)  # it could return log-sum-exps, too
    return out.unsqueeze(0)


def row_by_row(query, key, value, lengths, scaling) -> torch.Tensor:
    """On a CPU, where there is no such kernel."""
    outputs = []
    rows = zip(*(x.split(lengths.tolist(), dim=2) for x in (query, key, value)), strict=True)
    for q, k, v in rows:
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out)
    return torch.cat(outputs, dim=2).transpose(1, 2)


AttentionInterface.register("packed", packed_attention)


# -------------------------------------------------------------------------------------- head


class HeadLogprobs(torch.autograd.Function):
    """log_softmax(hidden @ weight.T / temperature) at `targets`, in fp32, a chunk at a time.

    hidden (R, D), weight (V, D), targets (R,) -> (R,). The backward pass makes each chunk's logits
    again, so that (R, V) of them never exist. It adds up the weight's gradient in fp32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature = temperature
        values = []
        for h, y in chunks(weight, hidden, targets):
            logits = logits_fp32(h, weight, temperature)
            chosen = logits.gather(1, y.unsqueeze(1)).squeeze(1)
            values.append(chosen - logits.logsumexp(dim=1))  # log_softmax of the chosen ones
        return torch.cat(values)

    @staticmethod
    def backward(ctx, grad):
        """The gradient of the logit of token v is grad / temperature * (1[v = target] - p(v))."""
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden = []
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for h, y, g in chunks(weight, hidden, targets, grad / ctx.temperature):
            y, g = y.unsqueeze(1), g.unsqueeze(1)
            probs = logits_fp32(h, weight, ctx.temperature).softmax(dim=1)
            grad_logits = probs.mul_(-g).scatter_add_(1, y, g).to(weight.dtype)
            grad_hidden.append(grad_logits @ weight)
            grad_weight += mm_fp32(grad_logits.T, h)
        return torch.cat(grad_hidden), grad_weight.to(weight.dtype), None, None


def chunks(weight: torch.Tensor, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The tensors' rows together, a chunk of at most LOGITS_AT_ONCE logits at a time."""
    rows = max(1, LOGITS_AT_ONCE // len(weight))
    return zip(*(x.split(rows) for x in tensors), strict=True)


def logits_fp32(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    """hidden (rows, D) @ weight (V, D).T / temperature, in fp32."""
    logits = mm_fp32(hidden, weight.T)
    return logits if temperature == 1 else logits.div_(temperature)


def mm_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in fp32. The factors may be bf16, and the sums are never rounded to bf16."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


# ----------------------------------------------------------------------- the trial of a model

TOLERANCE = 1e-4  # nats per token, in fp32. Measured: right families 2e-6, wrong ones 5e-3 and more
SHORT_ROWS = (7, 12)  # tokens


def check_model(model: str, longest: int) -> None:
    """Return if `model`, a folder or hub name, can be trained on rows of up to `longest` tokens.

    Training never calls a model as it is: `token_logprobs` has an attention and a head of its own.
    No list of names says for which models that is right. It is tried, on a tiny model of the same
    kind with random weights. Raises ValueError, which names the model and says why it cannot be
    trained.
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
    size = head_size(config.get_text_config())
    if size > MAX_HEAD_SIZE or size % 8 != 0:
        return f"FlashAttention takes heads of a multiple of 8, at most {MAX_HEAD_SIZE}: not {size}"
    fast, own = two_tiny_models(config)
    if not hasattr(own.get_decoder(), "layers"):
        return "its decoder has no `layers`, which make_policy shards one by one"
    for name, weight in own.named_parameters():
        if weight.dim() > 2:
            return (
                f"{name} has {weight.dim()} dimensions. Stacked experts have another shape in "
                "vLLM, and convolutions see tokens of other rows"
            )
    error = largest_error(fast, own, SHORT_ROWS)
    if not error <= TOLERANCE:
        return (
            f"token_logprobs differs by {error:.2g} nats from its own log-probs: its layers or its "
            "head do something that support/logprobs.py does not (dropout in config.json, too)"
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


def head_size(text: PreTrainedConfig) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def tiny(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a tiny model with layers of each kind that the real one has."""
    config = deepcopy(config)
    text = config.get_text_config()
    layers = text.num_hidden_layers
    per_layer = []  # settings with one value for each layer, e.g. layer_types
    for setting in vars(text).values():
        if isinstance(setting, list | tuple) and len(setting) == layers:
            per_layer.append(setting)
    kinds = [str([setting[index] for setting in per_layer]) for index in range(layers)]
    last_new_kind = max(kinds.index(kind) for kind in kinds)
    text.num_hidden_layers = min(layers, max(8, last_new_kind + 1))
    size = head_size(text)
    text.num_attention_heads, text.num_key_value_heads = 2, 1
    text.hidden_size, text.intermediate_size, text.vocab_size = 2 * size, 64, 128
    text.pad_token_id = 0  # the old one may be outside of the vocabulary
    return config


def build(config: PreTrainedConfig, **settings) -> PreTrainedModel:
    """A model in fp32 as its class initialises it."""
    config = deepcopy(config)  # building a model changes it
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **settings)


def two_tiny_models(config: PreTrainedConfig) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same random model twice: as training runs it, and with its own attention."""
    config = tiny(config)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        fast = build(config, attn_implementation="packed").train()
        # A new model has biases of 0 and scales of 1: nobody would see that one is left out
        for weight in fast.parameters():
            std = 0.2 if weight.dim() == 1 else weight.shape[-1] ** -0.5
            weight += std * torch.randn_like(weight)
        own = build(config).eval()
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
