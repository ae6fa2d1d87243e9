"""Log-probs, with gradient, of the sampled tokens and of the sampler's top K at each place, from one forward pass.

TRL scores the sampled tokens alone, without the logits of the vocabulary. An objective that moves the policy by other tokens
too, such as a projection, needs more columns of the same distribution, and all of them from one pass: with dropout, two passes
are two policies.
"""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from bandpo.integrations.trl.host import GRPOHost
from bandpo.integrations.trl.packing import packed_logits
from bandpo.objective import Objective

_AT_ONCE = 2**24  # entries of the float32 copies of logits that exist at a time


class TopScores(NamedTuple):
    """The scores of a batch, with gradient."""

    logprobs: Tensor
    """Log-probs of the completions, `(batch, time)`, float32; 0 at padding."""
    entropy: Tensor | None
    """Entropies in nats, of the same shape; None where they are not computed."""
    router_loss: Tensor | None
    """Load-balancing loss of a mixture of experts; None where it is not computed."""
    top: Tensor
    """Log-probs of the top-K tokens, `(batch, time, K)`, float32."""


def learns_from_top(objective: Objective) -> bool:
    """Whether the gradient of an objective flows through the log-probs of the top-K tokens.

    A projection learns from them. A region only compares them with its radius.
    """
    return objective.top_k is not None and "extras_with_gradient" in objective.traits


def refuse_images(objective: Objective) -> None:
    """Refuse a batch with images, of which only the sampled tokens are scored.

    Args:
        objective: The objective of the run.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"objective {objective.name!r} scores the top-K tokens of text, and this batch has images: choose an objective of the "
        "sampled tokens, such as dppo-kl, dppo-tv or bandpo-kl"
    )


def top_scores(
    trainer: GRPOHost,
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
    ids: Tensor,
    *,
    compute_entropy: bool = False,
    compute_aux_loss: bool = False,
) -> TopScores:
    """Scores of a batch of completions, as TRL's `_get_per_token_logps_and_entropies` makes them, and the top-K columns.

    Of the vocabulary's size, the model's own logits at the completions are kept for the backward pass, and nothing else.

    Args:
        trainer: The trainer.
        model: The policy in training.
        input_ids: Prompts and completions, `(batch, width)`.
        attention_mask: 1 for tokens and 0 for padding, `(batch, width)`.
        logits_to_keep: Width of the completions.
        ids: Ids of the top-K tokens, `(batch, logits_to_keep, K)`.
        compute_entropy: Whether to compute entropies.
        compute_aux_loss: Whether to compute the router loss of a mixture of experts.
    """
    wanted = torch.cat([input_ids[:, -logits_to_keep:, None], ids], -1)
    valid = attention_mask[:, -logits_to_keep:] != 0
    router_loss = None
    if trainer.args.packing:
        logits, places = packed_logits(trainer, model, input_ids, attention_mask, logits_to_keep)
        some, entropy = columns(logits, wanted[places], 1 / trainer.temperature)
        # At padding: K tokens that share half of the probability, so that each place has a distribution.
        scores = some.new_full(wanted.shape, -math.log(2 * ids.shape[-1]))
        scores = scores.index_put(places.nonzero(as_tuple=True), some)
        entropy = entropy.new_zeros(places.shape).index_put(places.nonzero(as_tuple=True), entropy)
    else:
        more = {"output_router_logits": True} if compute_aux_loss else {}
        with trainer.accelerator.autocast():
            out = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                logits_to_keep=logits_to_keep + 1,
                use_cache=False,
                **more,
            )
        router_loss = out.aux_loss if compute_aux_loss else None
        scores, entropy = columns(out.logits[:, -logits_to_keep - 1 : -1], wanted, 1 / trainer.temperature)
    logprobs = scores[..., 0].masked_fill(~valid, 0.0)
    return TopScores(
        logprobs, entropy.masked_fill(~valid, 0.0) if compute_entropy else None, router_loss, scores[..., 1:]
    )


def columns(logits: Tensor, ids: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Some columns of `log_softmax(scale * logits)` and the entropy, with gradient, in float32 (float64 for float64).

    The backward pass makes the softmax again from the logits; no second tensor of their size is kept between the passes.

    Args:
        logits: `(..., vocabulary)`.
        ids: Columns of each place, `(..., n)`, int64.
        scale: Factor of the logits, one over the temperature.

    Returns:
        Log-probs `(..., n)` and entropies `(...)` in nats.
    """
    made = cast("Any", _Columns).apply(logits.flatten(0, -2), ids.flatten(0, -2), scale)
    values, entropy = cast("tuple[Tensor, Tensor]", made)
    return values.view(ids.shape), entropy.view(ids.shape[:-1])


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        values = logits.new_empty(ids.shape, dtype=wide)
        log_z, entropy = logits.new_empty(2, len(logits), dtype=wide)
        for part in _parts(logits):
            x = logits[part].to(wide) * scale
            log_z[part] = x.logsumexp(-1)
            values[part] = x.gather(-1, ids[part]) - log_z[part].unsqueeze(-1)
            x -= log_z[part].unsqueeze(-1)
            entropy[part] = _entropy(x)
        ctx.save_for_backward(logits, ids, log_z, entropy)
        ctx.scale = scale
        return values, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        logits, ids, log_z, entropy = ctx.saved_tensors
        d_values, d_entropy = grads
        d_logits = torch.empty_like(logits)
        for part in _parts(logits):
            # dL/dlogits = Σ_k g_k (1[k] - π) - g_H π (log π + H), with the chain rule's 1/T.
            x = logits[part].to(log_z.dtype) * ctx.scale - log_z[part].unsqueeze(-1)
            p = x.exp()
            pull = torch.where(p > 0, x, 0.0).add_(entropy[part].unsqueeze(-1)).mul_(d_entropy[part].unsqueeze(-1))
            d = pull.add_(d_values[part].sum(-1, keepdim=True)).mul_(p).neg_()
            d_logits[part] = d.scatter_add_(-1, ids[part], d_values[part]).mul_(ctx.scale)
        return d_logits, None, None


def _entropy(logp: Tensor) -> Tensor:
    p = logp.exp()
    return -(p * torch.where(p > 0, logp, 0.0)).sum(-1)


def _parts(logits: Tensor) -> list[slice]:
    rows = max(1, _AT_ONCE // logits.shape[-1])
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]
