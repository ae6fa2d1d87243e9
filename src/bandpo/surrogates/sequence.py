"""Surrogates that look at the whole sequence of a token: GMPO and TOPR.

Args:
    log_ratio: `log r` at the ratio level of the objective, with gradient: `(batch, time)`, or `(batch, 1)` for sequences.
    advantages: A, `(batch, 1)` or `(batch, time)`.
    bounds: The interval of each token, two tensors of the shape of `log_ratio` or 0-d.
    mask: The tokens that are used, bool or 0/1, `(batch, time)`.
    logprobs: `log π` of the sampled tokens, with gradient, `(batch, time)`.
    old_logprobs: `log p` of the policy that the ratio is taken against, `(batch, time)`.

Returns:
    Objective of each token, to be maximised, of the shape of `log_ratio`.
"""

import torch
from torch import Tensor

from bandpo._deprecations import moved_within
from bandpo._inputs import as_mask
from bandpo.bounds import RatioBounds, outside
from bandpo.surrogates.stops import never, stops
from bandpo.surrogates.token import ratio

__getattr__ = moved_within(__name__, {"clip_cov": "experimental.clip_cov", "kl_cov": "experimental.kl_cov"})


def _outside_in_logs(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds) -> Tensor:
    """The rule of `outside` with both sides as logarithms, as the surrogate compares them."""
    return outside(log_ratio, advantages, RatioBounds(bounds.lower.log(), bounds.upper.log()), ratio=log_ratio)


@stops(_outside_in_logs)
def geometric_mean(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds, *, mask: Tensor) -> Tensor:
    """`exp(mean_t c_t)·A`, `c_t` the log-ratio clamped on the side A pushes to (GMPO, arXiv:2507.20673, eq. 4).

    One value for a sequence where it has one advantage. With advantages per token, a token's value is the geometric mean times
    its own advantage, with the gradient of that product, as in GSPO-token (arXiv:2507.18071, sec. 4.3). The bounds are
    `[e^-ε, e^ε]`; `w` of `clip` times the geometric mean over `r`.

    Returns:
        `(batch, 1)` for one advantage per sequence, else `(batch, time)`.

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


@stops(never)
def tapered(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds, *, logprobs: Tensor, mask: Tensor) -> Tensor:
    """`A·log π` for A >= 0, `min(ρ, 1)·A·log π` for A < 0, ρ the sequence's product ratio (TOPR, arXiv:2503.14286).

    Good sequences are imitated however unlikely they have become; bad ones weigh less as they vanish. Equation 8 of the paper,
    known to us from two secondary sources that agree. The bounds are not used.

    Returns:
        The value of each token, `(batch, time)`.

    Examples:
        >>> edge, one = RatioBounds(torch.tensor(0.0), torch.tensor(9.0)), torch.ones(1, 2)
        >>> tapered(torch.tensor([[0.5, 0.5]]).log(), -one, edge, logprobs=-one, mask=one)
        tensor([[0.2500, 0.2500]])
    """
    del bounds
    whole = torch.where(as_mask(mask), log_ratio, 0.0).sum(-1, keepdim=True).detach()
    return torch.where(advantages < 0, whole.clamp(max=0.0).exp(), 1.0) * advantages * logprobs
