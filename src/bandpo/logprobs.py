"""Log-probs of the chosen tokens, computed from the last hidden states without the (tokens, vocabulary) matrix."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# 32 Mi logits at a time are 128 MiB in float32: large enough for a full-speed matrix product.
_LOGITS_AT_A_TIME = 1 << 25
_LOGITS_IN_CACHE = 1 << 18  # 1 MiB in float32
_TOKENS_AT_A_TIME = 4096  # in the backward pass of float32


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
    memory: float | None = None,
) -> TokenLogprobs:
    """Log-prob (and entropy) of the chosen tokens from hidden states and the LM head, chunk by chunk.

    Computes `log softmax((h Wᵀ + b) / T)` at the target, and the entropy `H = -Σ π log π`, with the logits of one chunk of
    tokens in memory at a time. The logits of as many tokens as `memory` allows are kept for the backward pass, which computes
    those of the others again: a fourth matrix product beside the three of a plain log-softmax. A head without gradient (LoRA)
    needs the two of the plain one, whatever `memory` is: unless the entropy is asked for, the forward pass computes the
    gradient of the hidden states up to a factor for each token. Tokens whose gradient is 0 (padding, or clipped by the trust
    region) cost nothing in the other backward passes on a CPU. There is no second derivative.

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
        memory: Bytes of logits that may be kept for the backward pass, in the dtype of the products; `float("inf")` keeps all
            and is fastest, 0 keeps none. By default those of one chunk, so that nothing is computed again for fewer tokens.

    Returns:
        `TokenLogprobs`, with shapes `(...)` and `(..., top_k)`, in float32 (float64 for float64).

    Raises:
        ValueError: If shapes do not fit, or `temperature`, `top_k`, `chunk_size` or `memory` is out of range.
        TypeError: If a dtype does not fit.

    Examples:
        >>> h, w = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> out = token_logprobs(h, w, torch.tensor([0, 2]), entropy=True, top_k=1)
        >>> out.logprobs, out.top_ids.tolist()
        (tensor([-0.2395, -2.2395]), [[0], [1]])
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)
    _check(hidden, weight, targets, bias, temperature, top_k, chunk_size, memory)
    flat = hidden.reshape(-1, hidden.shape[-1])
    plan = _plan(flat, weight, bias, 1.0 / temperature, entropy, top_k, chunk_size, memory)
    with _no_autocast(hidden.device.type):
        logprobs, entropies, top, ids = _ChunkedHead.apply(  # type: ignore[no-untyped-call]
            flat, weight, bias, targets.reshape(-1), plan
        )
    shape = targets.shape
    return TokenLogprobs(
        logprobs.view(shape),
        entropies.view(shape) if entropy else None,
        top.view(*shape, top_k) if top_k else None,
        ids.view(*shape, top_k) if top_k else None,
    )


class _Plan(NamedTuple):
    scale: float  # 1 / temperature
    entropy: bool
    top_k: int
    rows: int  # tokens in a chunk
    kept: int  # tokens, from the first on, whose logits are kept for the backward pass
    early: bool  # whether the forward pass computes the gradient of the hidden states, up to a factor for each token


def _plan(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    entropy: bool,
    top_k: int,
    chunk_size: int | None,
    memory: float | None,
) -> _Plan:
    rows = chunk_size or max(1, _LOGITS_AT_A_TIME // weight.shape[0])
    tensors = (hidden, weight) if bias is None else (hidden, weight, bias)
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
        return _Plan(scale, entropy, top_k, rows, kept=0, early=False)
    share = rows if memory is None else memory / (weight.shape[0] * hidden.dtype.itemsize)
    kept = int(min(share, len(hidden)))
    frozen = not any(x.requires_grad for x in tensors[1:])
    if frozen and not entropy and kept < len(hidden):
        return _Plan(scale, entropy, top_k, rows, kept=0, early=True)
    return _Plan(scale, entropy, top_k, rows, kept, early=False)


class _Saved(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    log_z: Tensor
    entropies: Tensor | None
    kept: Tensor
    pulls: Tensor | None


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n, vocabulary = len(hidden), len(weight)
        wide = _wide(hidden.dtype)
        logprobs, entropies, log_z = hidden.new_empty(3, n, dtype=wide)
        top, ids = hidden.new_empty(n, plan.top_k, dtype=wide), targets.new_empty(n, plan.top_k)
        kept = hidden.new_empty(plan.kept, vocabulary)
        buffer = hidden.new_empty(min(plan.rows, n - plan.kept), vocabulary)  # for each chunk that is not kept
        pulls = torch.empty_like(hidden) if plan.early else None
        for chunk in (*_slices(0, plan.kept, plan.rows), *_slices(plan.kept, n, plan.rows)):
            logits = kept[chunk] if chunk.stop <= plan.kept else buffer[: chunk.stop - chunk.start]
            _product(hidden[chunk], weight, bias, out=logits)
            for rows in _slices(0, len(logits), _rows_at_a_time(logits)):
                part = slice(chunk.start + rows.start, chunk.start + rows.stop)
                scaled = _scaled(logits[rows], plan.scale)
                logp, at = scaled.log_softmax(-1), targets[part].unsqueeze(-1)
                logprobs[part] = logp.gather(-1, at).squeeze(-1)
                log_z[part] = scaled.amax(-1) - logp.amax(-1)
                if plan.top_k:
                    top[part], ids[part] = logp.topk(plan.top_k)
                if plan.entropy:
                    entropies[part] = torch.linalg.vecdot(logp.exp(), logp).neg_()
                if plan.early:
                    logits[rows] = logp.exp_().neg_().scatter_add_(-1, at, torch.ones_like(at, dtype=wide))
            if pulls is not None:
                torch.mm(logits, weight, out=pulls[chunk])
        ctx.save_for_backward(*_Saved(hidden, weight, bias, targets, log_z, entropies, kept, pulls))
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(top, ids, *([] if plan.entropy else [entropies]))
        return logprobs, entropies, top, ids

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> Any:
        d_logprobs, d_entropy, _, _ = grads
        saved, plan = _Saved(*ctx.saved_tensors), ctx.plan
        if d_logprobs is None:
            d_logprobs = torch.zeros_like(saved.log_z)
        if saved.pulls is None:
            return *_gradients(saved, plan, ctx.needs_input_grad, d_logprobs, d_entropy), None, None
        d_logprobs = d_logprobs.unsqueeze(-1)
        # A token without a gradient adds 0, also where its hidden state is NaN.
        d_hidden = torch.where(d_logprobs != 0, saved.pulls * (d_logprobs * plan.scale), 0.0)
        return d_hidden.to(saved.hidden.dtype), *(None,) * 4


class _Block(NamedTuple):
    tokens: slice | Tensor
    size: int
    kept: slice | Tensor  # those of its tokens, which come first, whose logits were kept
    known: int  # and their number


def _gradients(
    saved: _Saved, plan: _Plan, needs: tuple[bool, ...], d_logprobs: Tensor, d_entropy: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of hidden states, weight and bias, from tiles: a block of tokens by a part of the vocabulary."""
    hidden, weight, wide = saved.hidden, saved.weight, saved.log_z.dtype
    live = d_logprobs != 0 if d_entropy is None else (d_logprobs != 0) | (d_entropy != 0)
    # In a narrow dtype each part of a sum is rounded, so that a tile has the whole vocabulary: one part of a hidden state.
    blocks = _blocks(live, plan.kept, _TOKENS_AT_A_TIME if hidden.dtype == wide else plan.rows)
    tokens = max((block.size for block in blocks), default=1)
    share = 4 if hidden.device.type == "cpu" else 1  # a smaller tile is in a CPU's cache for longer
    width = max(1, plan.rows * len(weight) // share // tokens) if hidden.dtype == wide else len(weight)
    width = min(width, len(weight))
    buffers = [hidden.new_empty(tokens * width, dtype=dtype) for dtype in {wide: 0, hidden.dtype: 0}]
    # Parts are added up in float32: a sum of bfloat16 numbers would lose the small ones.
    d_hidden = torch.zeros_like(hidden) if needs[0] else None
    d_weight = torch.zeros_like(weight, dtype=hidden.dtype if len(blocks) == 1 else wide) if needs[1] else None
    d_bias = saved.log_z.new_zeros(len(weight)) if needs[2] else None
    for block in blocks:
        h, total = hidden[block.tokens], hidden.new_zeros(block.size, hidden.shape[1], dtype=wide)
        for columns in _slices(0, len(weight), width):
            shape = block.size, columns.stop - columns.start
            tile, product = (buffers[i][: shape[0] * shape[1]].view(shape) for i in (0, -1))
            product[: block.known] = saved.kept[block.kept, columns]
            if block.known < block.size:
                bias = None if saved.bias is None else saved.bias[columns]
                _product(h[block.known :], weight[columns], bias, out=product[block.known :])
            if product is not tile:
                tile.copy_(product)
            _to_gradient(tile, saved, plan.scale, block.tokens, columns, d_logprobs, d_entropy)
            if d_bias is not None:
                d_bias[columns] += tile.sum(0)
            if product is not tile:
                product.copy_(tile)
            if d_weight is not None:
                _add_product(product.T, h, to=d_weight[columns])
            if d_hidden is not None:
                _add_product(product, weight[columns], to=total)
        if d_hidden is not None:
            d_hidden[block.tokens] = total.to(hidden.dtype)
    return (
        d_hidden,
        None if d_weight is None else d_weight.to(weight.dtype),
        None if d_bias is None or saved.bias is None else d_bias.to(saved.bias.dtype),
    )


def _to_gradient(
    tile: Tensor,
    saved: _Saved,
    scale: float,
    tokens: slice | Tensor,
    columns: slice,
    d_logprobs: Tensor,
    d_entropy: Tensor | None,
) -> None:
    """Turn a tile of logits into the gradient of the logits before the temperature, in place.

    `dL/dlogits = g (1[target] - π) - g_H π (log π + H)`, with the chain rule's 1/T.
    """
    if scale != 1.0:
        tile.mul_(scale)
    tile.sub_(saved.log_z[tokens].unsqueeze(-1))
    g = d_logprobs[tokens].unsqueeze(-1)
    if d_entropy is None:
        tile.exp_().mul_(-g)
    else:
        assert saved.entropies is not None
        pull = tile.add(saved.entropies[tokens].unsqueeze(-1)).mul_(d_entropy[tokens].unsqueeze(-1)).add_(g)
        tile.exp_().mul_(pull).neg_()
    place = saved.targets[tokens].unsqueeze(-1) - columns.start
    here = (place >= 0) & (place < tile.shape[1])
    tile.scatter_add_(-1, place.clamp(0, tile.shape[1] - 1), torch.where(here, g, 0.0))
    if scale != 1.0:
        tile.mul_(scale)


def _blocks(live: Tensor, kept: int, size: int) -> list[_Block]:
    """Blocks of the tokens that have a gradient; on a GPU of all tokens, because their number would cost a host sync."""
    if live.device.type == "cpu" and not live.all():
        parts = cast("tuple[Tensor, ...]", live.nonzero().squeeze(-1).split(size))  # type: ignore[no-untyped-call]
        counts = [int((part < kept).sum()) for part in parts]
        return [_Block(part, len(part), part[:k], k) for part, k in zip(parts, counts, strict=True) if len(part)]
    whole = _slices(0, len(live), size)
    ends = [min(max(kept, part.start), part.stop) for part in whole]
    return [
        _Block(part, part.stop - part.start, slice(part.start, end), end - part.start)
        for part, end in zip(whole, ends, strict=True)
    ]


def _slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def _add_product(a: Tensor, b: Tensor, *, to: Tensor) -> None:
    if to.dtype == a.dtype:
        to.addmm_(a, b)
    else:
        to += a @ b


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


def _no_autocast(device: str) -> AbstractContextManager[object]:
    available = torch.amp.is_autocast_available(device)  # not on the meta device
    return torch.autocast(device, enabled=False) if available else nullcontext()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> None:
    if bias is None:
        torch.mm(hidden, weight.T, out=out)
    else:
        torch.addmm(bias, hidden, weight.T, out=out)


def _scaled(logits: Tensor, scale: float) -> Tensor:
    logits = logits.to(_wide(logits.dtype))
    return logits if scale == 1.0 else logits * scale


def _rows_at_a_time(logits: Tensor) -> int:
    """How many rows the softmax is computed of at a time: on a CPU as many as its cache holds."""
    if logits.device.type != "cpu":
        return max(1, len(logits))
    return max(1, _LOGITS_IN_CACHE // logits.shape[1])


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    top_k: int,
    chunk_size: int | None,
    memory: float | None,
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
    if memory is not None and not memory >= 0:
        raise ValueError(
            f"memory must be a number of bytes >= 0, float('inf') to keep all logits, or None; got {memory}"
        )
