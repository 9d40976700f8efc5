"""Log-probs of response tokens, without padding and without ever holding all logits.

`definition` says in five lines what is computed. `token_logprobs` computes the same and is what
training calls: rows lie end to end, and the head works a chunk at a time.

Shapes: B rows of T tokens, S of them real, R response tokens, D hidden size, V vocabulary.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

LOGITS_AT_ONCE = 2**27  # rows * V of a chunk of the head: 0.5 GiB in fp32
MAX_HEAD_SIZE = 256  # of the attention kernel for GPUs, FlashAttention 2


def definition(model: torch.nn.Module, ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """What `token_logprobs` must equal: the log-probs of tokens 1..T-1 of one row, ids (T,).

    Everything is the model's own: its attention (load it with "eager" or "sdpa"), its logits.
    """
    logits = model(input_ids=ids[None], use_cache=False).logits[0]  # (T, V)
    logprobs = (logits[:-1].float() / temperature).log_softmax(dim=1)
    return logprobs.gather(1, ids[1:, None]).squeeze(1)  # (T-1,)


def token_logprobs(
    model: torch.nn.Module,
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


@torch.compiler.disable
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
    **others,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each of B rows laid end to end, as transformers calls it.

    query (1, H, S, d), key and value (1, H_kv, S, d) -> (1, S, H, d). lengths: (B,) on the CPU;
    ends: (B+1,) from 0 to S, where rows end. Raises ValueError where the model wants any other
    attention: `others` are the keywords by which it would say so.
    """
    if lengths is None:
        raise ValueError("the model does not pass `lengths` and `ends` on to its attention")
    longest = lengths.max().item()
    refuse_other_attention(longest, attention_mask=attention_mask, **others)
    refuse_head_size(query.shape[-1], value.shape[-1])
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


def refuse_other_attention(
    longest: int,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_ids: torch.Tensor | None = None,  # `lengths` says the same
    **others,
) -> None:
    """Raise ValueError unless transformers asks for plain causal attention in the longest row."""
    if sliding_window is not None and sliding_window < longest:
        raise ValueError(
            f"attention is asked for sliding_window={sliding_window}, and a row has {longest} "
            "tokens: packed_attention has no window, so rows must be no longer"
        )
    if is_causal is False:
        raise ValueError("attention is asked for is_causal=False: packed_attention is causal")
    for name, value in others.items():
        switched_off = isinstance(value, bool | int | float) and value == 0  # e.g. dropout=0.0
        if value is not None and not switched_off:
            raise ValueError(f"attention is asked for `{name}`, which packed_attention ignores")


def refuse_head_size(of_queries: int, of_values: int) -> None:
    """Raise ValueError, on any device, for a head that FlashAttention cannot take on a GPU."""
    if of_queries != of_values or of_queries > MAX_HEAD_SIZE or of_queries % 8 != 0:
        raise ValueError(
            f"attention has heads of size {of_queries} and values of size {of_values}: on a GPU "
            f"both must be one multiple of 8, at most {MAX_HEAD_SIZE}"
        )


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
