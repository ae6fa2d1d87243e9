"""The bounds in float64: a divergence's closed form if it has one, otherwise one search for both sides."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bandpo.divergences import (
    LARGEST_RADIUS,
    MAX_LOG,
    SMALLEST_RADIUS,
    FDivergence,
    LogBounds,
    binary_divergence,
    log_upper_of,
)

_FLOAT64_EXPONENT_BITS = 11
# log-bounds are promised within 1e-12 ≈ 2^-39.9 relative; 44 digits leave room for the rounding of the divergence.
_MANTISSA_BITS = 44
_STEPS = _FLOAT64_EXPONENT_BITS + _MANTISSA_BITS


def log_bounds(divergence: FDivergence, logp: Tensor, radius_low: Tensor, radius_high: Tensor) -> LogBounds:
    """Bounds of `log r` at float64 `logp <= 0`, saturated at the simplex; NaN where `logp` or a radius is NaN.

    Values beyond the range of float64 are replaced by the nearest value in it, on the narrower side: p below e^-700 by e^-700
    (p = 0 itself is unbounded), 1 - p below e^-700 by 0, a radius above 1e300 by 1e300, a radius below 1e-300 by 0.

    Args:
        divergence: The divergence.
        logp: `log p`, float64, any shape.
        radius_low: Radius of the lower side, float64; broadcasts to `logp`.
        radius_high: Radius of the upper side, float64; broadcasts to `logp`.
    """
    held = torch.where(logp > -math.exp(-MAX_LOG), 0.0, logp.clamp_min(-MAX_LOG))
    low = radius_low.clamp(SMALLEST_RADIUS, LARGEST_RADIUS)
    high = low if radius_high is radius_low else radius_high.clamp(SMALLEST_RADIUS, LARGEST_RADIUS)
    if divergence.closed_form is None:
        log_lower, log_upper = _search(divergence, held, low, high)
    else:
        log_lower, log_upper = divergence.closed_form(held, low)
        if high is not low:
            _, log_upper = divergence.closed_form(held, high)
    # At p = 0 no f bounds the token (docs/theory.md, limits).
    impossible = logp == -math.inf
    log_lower = log_lower.clamp_max(0.0).masked_fill(radius_low < SMALLEST_RADIUS, 0.0)
    log_upper = torch.minimum(log_upper.clamp_min(0.0).masked_fill(radius_high < SMALLEST_RADIUS, 0.0), -logp)
    # A closed form may have lost a NaN, or computed 0·inf at an invalid radius: both bounds become NaN.
    bad = (low + high + logp).isnan()
    return (
        log_lower.masked_fill(impossible, -math.inf).masked_fill(bad, math.nan),
        log_upper.masked_fill(impossible, math.inf).masked_fill(bad, math.nan),
    )


def largest_feasible(feasible: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Largest `y` in `[0, inf]` with `feasible(y)`, elementwise; as `y` grows, feasibility is lost once and not regained.

    The order of positive float64 numbers is the order of their bit patterns, so the answer is built one binary digit
    at a time, most significant first: 11 steps find the exponent, 44 the mantissa. The result is feasible itself (rounded
    inward by less than 2^-44 relative), `inf` where `inf` is feasible, 0 where nothing is. Patterns above `inf` are NaN,
    which no comparison accepts, so the search needs no bracket. The number of steps never depends on the data.

    Args:
        feasible: Maps a float64 tensor `y` to a bool tensor of the same shape; False on NaN.
        like: Float64 tensor that gives the shape and device of the answer.

    Returns:
        Float64 tensor of the shape of `like`.
    """
    digits = torch.zeros_like(like, dtype=torch.int64)
    for step in range(_STEPS):
        candidate = digits | (1 << (62 - step))
        digits = torch.where(feasible(candidate.view(torch.float64)), candidate, digits)
    return digits.view(torch.float64)


def log1mexp(logp: Tensor) -> Tensor:
    """`log(1 - p)` from `log p`, exact to rounding at both ends (Mächler's split at p = ½); the same shape and dtype."""
    return torch.where(logp > -math.log(2), (-logp.expm1()).log(), (-logp.exp()).log1p())


def _search(divergence: FDivergence, logp: Tensor, radius_low: Tensor, radius_high: Tensor) -> LogBounds:
    """Bounds of `log r` by one search over both sides.

    The binary divergence of {token, rest} is the same whichever of the two events is called the token. So with
    `shrink(p)` the largest `y` such that an event of probability `p` may fall to `p e^-y`, the lower bound of `log r` is
    `-shrink(p)`, and the upper one leaves the rest `(1-p) e^-shrink(1-p)`: the mirror identity (docs/theory.md), with no
    `1 - (nearly 1)` anywhere.
    """
    sides = torch.stack([logp, log1mexp(logp)])
    radii = torch.stack([radius_low.expand_as(logp), radius_high.expand_as(logp)])
    shrink_token, shrink_rest = largest_feasible(
        lambda y: binary_divergence(-y, sides, divergence) <= radii, like=sides
    ).unbind()
    return -shrink_token, log_upper_of(logp, shrink_rest)
