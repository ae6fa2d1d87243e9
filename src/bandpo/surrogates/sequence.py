"""Surrogates that look beyond their own token: at its sequence (GMPO, TOPR) or at the batch (Clip-Cov, KL-Cov)."""

import torch
from torch import Tensor

from bandpo._inputs import as_mask, needs, traits
from bandpo.bounds import RatioBounds
from bandpo.surrogates.token import clip, ratio


@needs("mask")
def geometric_mean(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds, *, mask: Tensor) -> Tensor:
    """`exp(mean_t c_t)·A`, `c_t` the log-ratio clamped on the side A pushes to (GMPO, arXiv:2507.20673, eq. 4).

    One value for a sequence, `(batch, 1)`, where it has one advantage. With advantages per token a token's value is the
    geometric mean times its own advantage, and so is its gradient, as in GSPO-token (arXiv:2507.18071, sec. 4.3). With bounds
    `[e^-ε, e^ε]`; `w` of `clip` times the geometric mean over `r`.

    Examples:
        >>> edge = RatioBounds(torch.tensor(0.5), torch.tensor(2.0))
        >>> x = torch.tensor([[4.0, 0.25]]).log()
        >>> geometric_mean(x, torch.ones(1, 1), edge, mask=torch.ones(1, 2))
        tensor([[0.7071]])
    """
    valid = as_mask(mask)
    count = valid.sum(-1, keepdim=True).clamp_min(1)
    clamped = log_ratio.clamp(bounds.lower.log(), bounds.upper.log())
    pessimistic = torch.where(advantages < 0, torch.maximum(log_ratio, clamped), torch.minimum(log_ratio, clamped))
    own = torch.where(valid, pessimistic, 0.0)
    mean = own.sum(-1, keepdim=True) / count
    if advantages.shape[-1] == 1:
        return ratio(mean) * torch.where(valid, advantages, 0.0).sum(-1, keepdim=True) / count
    return ratio(mean.detach() + own - own.detach()) * advantages


@needs("logprobs", "mask")
def tapered(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds, *, logprobs: Tensor, mask: Tensor) -> Tensor:
    """`A·log π` for A >= 0, `min(ρ, 1)·A·log π` for A < 0, ρ the sequence's product ratio (TOPR, arXiv:2503.14286).

    Good sequences are imitated however unlikely they have become; bad ones weigh less as they vanish. Known to us from
    descriptions of the paper. The bounds are not used.

    Examples:
        >>> edge, one = RatioBounds(torch.tensor(0.0), torch.tensor(9.0)), torch.ones(1, 2)
        >>> tapered(torch.tensor([[0.5, 0.5]]).log(), -one, edge, logprobs=-one, mask=one)
        tensor([[0.2500, 0.2500]])
    """
    del bounds
    whole = torch.where(as_mask(mask), log_ratio, 0.0).sum(-1, keepdim=True).detach()
    return torch.where(advantages < 0, whole.clamp(max=0.0).exp(), 1.0) * advantages * logprobs


@traits("of_batch")
@needs("logprobs", "mask")
def clip_cov(
    log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds, *, logprobs: Tensor, mask: Tensor,
    share: float = 2e-4, low: float = 1.0, high: float = 5.0,
) -> Tensor:  # fmt: skip
    """`clip`, with a few random tokens of high covariance taken out (Clip-Cov, arXiv:2505.22617).

    Of the unclipped tokens with `low < (A - mean A)(log π - mean log π) < high`, a random `share` of the batch's tokens (at
    least one) gets no gradient. The draw is torch's: seed it by `torch.manual_seed`. Means and share are those of the call,
    so micro-batches differ from the whole batch.
    """
    valid = as_mask(mask)
    a = advantages.expand(valid.shape)
    r = ratio(log_ratio.detach())
    covariance = _covariance(a, logprobs, valid)
    clipped = torch.where(a > 0, r > bounds.upper, r < bounds.lower)
    candidate = valid & ~clipped & (covariance > low) & (covariance < high)
    order = torch.where(candidate, torch.rand_like(covariance), 2.0)
    chosen = candidate & (_rank(order) < _count(valid, share))
    return clip(log_ratio, advantages, bounds).masked_fill(chosen, 0.0)


@traits("of_batch", "without_advantage")
@needs("logprobs", "mask")
def kl_cov(
    log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds, *, logprobs: Tensor, mask: Tensor,
    share: float = 2e-4, beta: float = 0.1,
) -> Tensor:  # fmt: skip
    """`r·A`, less `β|log r|` on the tokens of the highest covariance of A and log π (KL-Cov, arXiv:2505.22617).

    A `share` of the batch's tokens, at least one, is penalised. Its mean is that of the call. The bounds are not used.
    """
    del bounds
    valid = as_mask(mask)
    covariance = _covariance(advantages.expand(valid.shape), logprobs, valid)
    chosen = valid & (_rank(torch.where(valid, -covariance, torch.inf)) < _count(valid, share))
    return ratio(log_ratio) * advantages - torch.where(chosen, beta * log_ratio.abs(), 0.0)


def _covariance(advantages: Tensor, logprobs: Tensor, valid: Tensor) -> Tensor:
    """The token's term of the covariance of A and log π."""
    n = valid.sum().clamp_min(1)
    a, x = (torch.where(valid, v, 0.0) for v in (advantages, logprobs.detach()))
    return (a - a.sum() / n) * (x - x.sum() / n)


def _rank(x: Tensor) -> Tensor:
    """0 for the smallest entry, and so on."""
    return x.flatten().argsort(stable=True).argsort().view(x.shape)


def _count(valid: Tensor, share: float) -> Tensor:
    return (valid.sum().to(torch.float32) * share).floor().clamp_min(1)
