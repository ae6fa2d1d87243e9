"""The numerical inversion behind the bounds that have no closed form."""

from collections.abc import Callable

import torch
from torch import Tensor

_FLOAT64_EXPONENT_BITS = 11
# log-bounds are promised within 1e-12 ≈ 2^-39.9 relative; 44 digits leave the rounding of the divergence its share.
_MANTISSA_BITS = 44
_STEPS = _FLOAT64_EXPONENT_BITS + _MANTISSA_BITS


def largest_feasible(feasible: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Largest `y` in `[0, inf]` with `feasible(y)`, elementwise, where feasibility is lost once and for good as `y` grows.

    The order of positive float64 numbers is the order of their bit patterns, so the answer is built one binary digit
    at a time, most significant first: 11 steps find the exponent, 44 the mantissa. The result is feasible itself (rounded
    inward by less than 2^-44 relative), `inf` where `inf` is feasible, 0 where nothing is. Patterns above `inf` are NaN,
    which no comparison accepts, so the search needs no bracket. The number of steps never depends on the data.

    Args:
        feasible: Maps a float64 tensor `y` to a bool tensor of its shape. False on NaN.
        like: Float64 tensor that gives the shape and device of the answer.

    Returns:
        Float64 tensor of the shape of `like`.
    """
    digits = torch.zeros_like(like, dtype=torch.int64)
    for step in range(_STEPS):
        candidate = digits | (1 << (62 - step))
        digits = torch.where(feasible(candidate.view(torch.float64)), candidate, digits)
    return digits.view(torch.float64)
