"""Weights for the mismatch between the sampler and the policy before the update, `w = π_old / μ`, per token or sequence.

The sampler (an inference engine in lower precision, a stale copy) is not exactly the policy whose log-probs the trainer
recomputes. Both corrections multiply the token's objective by a constant of the update.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from bandpo._inputs import as_mask
from bandpo.surrogates.token import ratio

Level = Literal["token", "sequence"]
# `(log π_old - log μ, mask) -> weights`, `(batch, time)` or `(batch, 1)`.
Correction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TIS:
    """Truncated importance sampling: `min(w, cap)` (truncated IS, Ionides 2008; as in verl and TRL).

    Args:
        cap: C > 0; verl's default is 2, TRL's 3.
        level: `token`, or `sequence` for the product over the sequence.

    Raises:
        ValueError: If a number or the level is out of range.

    Examples:
        >>> TIS(2.0)(torch.tensor([[0.5, 3.0]]).log(), torch.ones(1, 2))
        tensor([[0.5000, 2.0000]])
    """

    cap: float = 2.0
    level: Level = "token"

    def __post_init__(self) -> None:
        _check(self.level, 0.0, self.cap)

    def __call__(self, log_mismatch: Tensor, mask: Tensor) -> Tensor:
        return _weight(log_mismatch, mask, self.level).clamp(max=self.cap)


@dataclass(frozen=True)
class IcePop:
    """Masked importance sampling: `w` inside `[low, high]`, 0 outside (IcePop, as in verl).

    Args:
        low: At least 0; verl's default is 0.5.
        high: Above `low`; verl's default is 5.
        level: `token`, or `sequence` for the product over the sequence.

    Raises:
        ValueError: If a number or the level is out of range.

    Examples:
        >>> IcePop()(torch.tensor([[0.4, 3.0]]).log(), torch.ones(1, 2))
        tensor([[0., 3.]])
    """

    low: float = 0.5
    high: float = 5.0
    level: Level = "token"

    def __post_init__(self) -> None:
        _check(self.level, self.low, self.high)

    def __call__(self, log_mismatch: Tensor, mask: Tensor) -> Tensor:
        weight = _weight(log_mismatch, mask, self.level)
        return weight.masked_fill((weight < self.low) | (weight > self.high), 0.0)


def _weight(log_mismatch: Tensor, mask: Tensor, level: Level) -> Tensor:
    with torch.no_grad():
        if level == "sequence":
            log_mismatch = log_mismatch.masked_fill(~as_mask(mask), 0.0).sum(-1, keepdim=True)
        return ratio(log_mismatch)


def _check(level: str, low: float, high: float) -> None:
    if level not in get_args(Level):
        raise ValueError(f"level: got {level!r}; choose one of {', '.join(get_args(Level))}")
    if not (0 <= low < high and not math.isnan(high)):
        raise ValueError(f"the weights must satisfy 0 <= low < high, got {low} and {high}")
