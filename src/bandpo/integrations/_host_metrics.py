"""Metrics in a form that stays correct in hosts that take a plain mean over micro-batches and ranks."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from bandpo.metrics import PooledSum
from bandpo.monitoring.names import averaged_name

# Replaces an infinity: far larger than any useful value, and still finite after a mean in float32.
_LARGEST = 1e9


def mean_proof(sums: Mapping[str, PooledSum]) -> dict[str, Tensor]:
    """Statistics of a micro-batch that always have the same names and are always finite.

    A clip fraction of a bin of probabilities, or a share of the tokens with `A != 0`, is a quotient whose denominator may be 0
    in a micro-batch; one such NaN makes the mean of a whole step NaN. They are reported as shares of all valid tokens instead,
    with `_of_all` in their names. Their means can be divided afterwards: `clip_fraction_by_prob_of_all/{low,high,any}/BIN` by
    `token_fraction_by_prob/BIN`. A micro-batch without a valid token reports 0. The names have no prefix `band/`, because the
    adapter adds a prefix. Names of maxima end in `_max`, by which hosts know that they must take the maximum.

    Args:
        sums: Statistics from `bandpo.metrics.policy_sums`.

    Examples:
        >>> none, five = torch.tensor(0.0), torch.tensor(5.0)
        >>> mean_proof({"ratio/mean": PooledSum(torch.tensor(6.0), five), "band/cap_fraction": PooledSum(none, none)})
        {'ratio/mean': tensor(1.2000), 'cap_fraction_of_all': tensor(0.)}
    """
    tokens = sums["ratio/mean"].denominator.clamp_min(1)
    found: dict[str, Tensor] = {}
    for name, statistic in sums.items():
        averaged = averaged_name(name)
        if "_of_all" in averaged:
            found[averaged] = statistic.numerator / tokens
        else:
            found[averaged] = torch.nan_to_num(statistic.value(), nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)
    return found


def as_floats(metrics: Mapping[str, Tensor], prefix: str = "") -> dict[str, float]:
    """Metrics as Python floats, with one synchronisation with the device.

    Args:
        metrics: 0-d tensors by name.
        prefix: Text to put before each name.
    """
    values: list[float] = []
    if metrics:
        values = cast("list[float]", torch.stack([x.float() for x in metrics.values()]).tolist())
    return {f"{prefix}{name}": value for name, value in zip(metrics, values, strict=True)}
