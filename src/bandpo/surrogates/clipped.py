"""The clipped objective with one edge for each token, the one that its advantage pushes to: few passes, few temporaries.

The other edge matters for nothing: `min(r·A, clamp(r)·A)` is `min(r, upper)·A` for A > 0, and `max(r, lower)·A` for A < 0.
Times s, the sign of A, both are `min(s·r, s·b)·|A|`.
"""

import torch
from torch import Tensor

from bandpo._eager import Fill, is_plain, with_slope
from bandpo.surrogates.token import ratio


def clipped_to_edge(
    log_ratio: Tensor, advantages: Tensor, edge: Tensor, fill: Fill, r: Tensor
) -> tuple[Tensor, Tensor]:
    """`bandpo.surrogates.clip` of the tokens that are used, `min(s·r, s·b)·|A|` with s = sign(A).

    Args:
        log_ratio: `log r`, held, `(batch, time)`, with gradient.
        advantages: A, finite, `(batch, 1)` or `(batch, time)`.
        edge: `s·b`, the result of `bandpo.bounds.band.pushed_edge`.
        fill: The fill of the tokens that are used.
        r: `exp(log_ratio)` without gradient.

    Returns:
        The value of each token, and which tokens are outside, bool; 0 and False where a token is not used.
    """
    if not is_plain(log_ratio):
        with torch.no_grad():
            stopped = (r * advantages.sign() > edge) & fill.mask
        return _clipped(log_ratio, advantages, edge, fill.mask), stopped
    with torch.no_grad():
        pushed = r * advantages.sign()
        value = torch.minimum(pushed, edge)
        inside = torch.sub(value, pushed, out=pushed).sign_().add_(1)  # 0 where the edge was the smaller one
        stopped = inside == 0  # and never where a token is not used: its ratio of 1 is inside of every interval
        inside, value = fill.own(inside), fill.own(value.mul_(advantages.abs()))
    return with_slope(log_ratio, _clipped, value, r, advantages, inside, of=(advantages, edge, fill.mask)), stopped


def _clipped(log_ratio: Tensor, advantages: Tensor, edge: Tensor, mask: Tensor) -> Tensor:
    pushed = ratio(log_ratio) * advantages.sign()
    # Not torch.minimum, which halves the gradient of a token on the edge.
    return torch.where(mask, torch.where(pushed > edge, edge, pushed) * advantages.abs(), 0.0)
