"""What happens at the edge of the interval: `(log_ratio, advantages, bounds) -> per-token objective` to be maximised."""

from collections.abc import Callable

import torch
from torch import Tensor

from bandpo.bounds import RatioBounds

Surrogate = Callable[[Tensor, Tensor, RatioBounds], Tensor]

# exp(60) = 1e26: squares and sums of such ratios stay finite in float32. Beyond it the ratio is held and has no gradient.
MAX_LOG_RATIO = 60.0


def ratio(log_ratio: Tensor) -> Tensor:
    """`r = exp(log r)`, held at e^60 so that one exploded token cannot turn the batch's gradient into NaN."""
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def clip(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds) -> Tensor:
    """The pessimistic surrogate of PPO (arXiv:1707.06347, eq. 7): `min(r·A, r̃·A)` with `r̃` the ratio clamped to the bounds.

    Examples:
        >>> edge = RatioBounds(torch.tensor(0.8), torch.tensor(1.2))
        >>> clip(torch.tensor([1.5, 0.5]).log(), torch.tensor([1.0, -1.0]), edge)
        tensor([ 1.2000, -0.8000])
    """
    r = ratio(log_ratio)
    return torch.minimum(r * advantages, r.clamp(bounds.lower, bounds.upper) * advantages)


def dual_clip(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds, c: float = 3.0) -> Tensor:
    """As `clip`, and for `A < 0` at least `c·A`: a bad token whose ratio explodes stops weighing (arXiv:1912.09729, eq. 5).

    Give another `c` by `functools.partial(dual_clip, c=10.0)` (the BandPO paper's runs).

    Examples:
        >>> edge = RatioBounds(torch.tensor(0.8), torch.tensor(1.2))
        >>> dual_clip(torch.tensor([9.0]).log(), torch.tensor([-1.0]), edge, c=3.0)
        tensor([-3.])
    """
    pessimistic = clip(log_ratio, advantages, bounds)
    return torch.where(advantages < 0, torch.maximum(pessimistic, c * advantages), pessimistic)


def mask(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds | Tensor) -> Tensor:
    """`r·A` inside, 0 where the ratio has left on the side the advantage pushes to (DPPO, arXiv:2602.04879, eq. 12).

    Its gradient is that of `clip` with the same bounds; the value differs by a constant of the policy. For the gradient alone
    nothing needs to be solved: pass the result of `in_band` instead of bounds.

    Examples:
        >>> edge = RatioBounds(torch.tensor(0.8), torch.tensor(1.2))
        >>> mask(torch.tensor([1.5, 1.1]).log(), torch.tensor([1.0, 1.0]), edge)
        tensor([0.0000, 1.1000])
        >>> mask(torch.tensor([1.5, 1.1]).log(), torch.tensor([1.0, 1.0]), torch.tensor([False, True]))
        tensor([0.0000, 1.1000])
    """
    r = ratio(log_ratio)
    if isinstance(bounds, RatioBounds):
        outside = torch.where(advantages > 0, r > bounds.upper, r < bounds.lower)
    else:
        outside = ~bounds & torch.where(advantages > 0, log_ratio > 0, log_ratio < 0)
    return (r * advantages).masked_fill(outside, 0.0)
