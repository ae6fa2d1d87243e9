"""Log-probs of the chosen tokens, computed from the last hidden states without the (tokens, vocabulary) matrix."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

# 32 Mi logits at a time are 128 MB in float32: large enough for a full-speed matrix product.
_LOGITS_AT_A_TIME = 1 << 25


class TokenLogprobs(NamedTuple):
    """The result of `token_logprobs`; fields that were not requested are None."""

    logprobs: Tensor
    """Log-probs of the chosen tokens, `(...)`, with gradient."""
    entropy: Tensor | None = None
    """Entropy in nats, `(...)`, with gradient."""
    top_logprobs: Tensor | None = None
    """The largest log-probs, `(..., top_k)`, largest first, without gradient."""
    top_ids: Tensor | None = None
    """The tokens of `top_logprobs`, `(..., top_k)`, int64."""


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    top_k: int = 0,
    chunk_size: int | None = None,
) -> TokenLogprobs:
    """Log-prob (and entropy) of the chosen tokens from hidden states and the LM head, chunk by chunk.

    Computes `log softmax((h Wᵀ + b) / T)` at the target, and the entropy `H = -Σ π log π`, with the logits of one chunk of
    tokens in memory at a time; the backward pass computes the logits again. Tokens whose gradient is 0 (padding, or clipped by
    the trust region) cost nothing in the backward pass on a CPU.

    Args:
        hidden: Last hidden states, `(..., features)`, any float dtype. Products are computed in this dtype, or under
            `torch.autocast` in autocast's dtype, forward and backward; the softmax in float32 (float64 for float64).
        weight: Weight of the LM head, `(vocabulary, features)`.
        targets: Chosen tokens, `(...)`, int64.
        bias: Bias of the LM head, `(vocabulary,)`, or None.
        temperature: T > 0, the temperature at which the tokens were sampled.
        entropy: Whether to return the entropy as well.
        top_k: Number of the largest log-probs to return as well.
        chunk_size: Tokens in a chunk; by default as many as have 32 Mi logits.

    Returns:
        `TokenLogprobs`, with shapes `(...)` and `(..., top_k)`, in float32 (float64 for float64).

    Raises:
        ValueError: If shapes do not fit, or `temperature`, `top_k` or `chunk_size` is out of range.
        TypeError: If a dtype does not fit.

    Examples:
        >>> h, w = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> out = token_logprobs(h, w, torch.tensor([0, 2]), entropy=True, top_k=1)
        >>> out.logprobs, out.top_ids.tolist()
        (tensor([-0.2395, -2.2395]), [[0], [1]])
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)
    _check(hidden, weight, targets, bias, temperature, top_k, chunk_size)
    rows = chunk_size or max(1, _LOGITS_AT_A_TIME // weight.shape[0])
    flat = hidden.reshape(-1, hidden.shape[-1])
    with torch.autocast(hidden.device.type, enabled=False):
        logprobs, entropies, top, ids = _ChunkedHead.apply(  # type: ignore[no-untyped-call]
            flat, weight, bias, targets.reshape(-1), 1.0 / temperature, entropy, top_k, rows
        )
    shape = targets.shape
    return TokenLogprobs(
        logprobs.view(shape),
        entropies.view(shape) if entropy else None,
        top.view(*shape, top_k) if top_k else None,
        ids.view(*shape, top_k) if top_k else None,
    )


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        entropy: bool,
        top_k: int,
        rows: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = _wide(hidden.dtype)
        n = hidden.shape[0]
        logprobs, entropies, log_z = hidden.new_empty(3, n, dtype=wide)
        top, ids = hidden.new_empty(n, top_k, dtype=wide), targets.new_empty(n, top_k)
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            logits = _logits(hidden[part], weight, bias, scale)
            log_z[part] = logits.logsumexp(-1)
            chosen = logits.gather(-1, targets[part].unsqueeze(-1)).squeeze(-1)
            logprobs[part] = chosen - log_z[part]
            if top_k:
                values, ids[part] = logits.topk(top_k)
                top[part] = values - log_z[part].unsqueeze(-1)
            if entropy:
                logits -= log_z[part].unsqueeze(-1)
                entropies[part] = torch.linalg.vecdot(logits.exp(), logits).neg_()
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, entropies)
        ctx.scale, ctx.rows, ctx.entropy = scale, rows, entropy
        ctx.mark_non_differentiable(top, ids, *([] if entropy else [entropies]))
        return logprobs, entropies, top, ids

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        d_logprobs, d_entropy, _, _ = grads
        hidden, weight, bias, targets, log_z, entropies = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        # Summed over chunks in float32: a sum of bfloat16 parts would lose the small ones.
        d_weight = torch.zeros_like(weight, dtype=log_z.dtype) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=log_z.dtype) if needs_bias else None
        live = d_logprobs != 0
        if ctx.entropy and d_entropy is not None:
            live = live | (d_entropy != 0)
        # On a GPU, the number of live tokens would cost a host sync.
        index = (
            live.nonzero().squeeze(-1) if hidden.device.type == "cpu" else torch.arange(len(live), device=live.device)
        )
        for part in torch.split(index, ctx.rows):
            h = hidden[part]
            logits = _logits(h, weight, bias, ctx.scale).sub_(log_z[part].unsqueeze(-1))
            # dL/dlogits = g (1[target] - π) - g_H π (log π + H), with the chain rule's 1/T.
            if ctx.entropy and d_entropy is not None:
                pull = logits.add(entropies[part].unsqueeze(-1)).mul_(d_entropy[part].unsqueeze(-1))
                d_logits = pull.add_(d_logprobs[part].unsqueeze(-1)).mul_(logits.exp_()).neg_()
            else:
                d_logits = logits.exp_().mul_(-d_logprobs[part].unsqueeze(-1))
            d_logits.scatter_add_(1, targets[part].unsqueeze(-1), d_logprobs[part].unsqueeze(-1))
            d_logits.mul_(ctx.scale)
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            narrow = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[part] = narrow @ weight
            if d_weight is not None and d_weight.dtype == narrow.dtype:
                d_weight.addmm_(narrow.T, h)  # no second (vocabulary, features) matrix
            elif d_weight is not None:
                d_weight += narrow.T @ h
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *(None,) * 5,
        )


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inputs in the dtype that autocast would give them, by differentiable casts.

    With autocast itself, only the forward pass would compute products in the narrow dtype: the backward pass usually runs
    outside of autocast, and would subtract the log-sum of a different softmax from the logits that it computes again.
    """
    device = hidden.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    narrow = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(narrow)

    return cast(hidden), cast(weight), None if bias is None else cast(bias)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias).to(_wide(hidden.dtype))
    return logits if scale == 1.0 else logits.mul_(scale)


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    top_k: int,
    chunk_size: int | None,
) -> None:
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (..., features) and (vocabulary, features)"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}; with hidden {tuple(hidden.shape)} pass one per row"
        )
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise TypeError(f"hidden and weight must have one float dtype, got {hidden.dtype} and {weight.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, the vocabulary {weight.shape[0]} tokens")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a positive number, got {temperature}")
    if not 0 <= top_k <= weight.shape[0]:
        raise ValueError(f"top_k must be between 0 and the vocabulary's {weight.shape[0]}, got {top_k}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
