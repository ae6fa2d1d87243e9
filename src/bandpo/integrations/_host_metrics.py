"""Metrics in the form that survives what hosts do to them: a plain mean over micro-batches and ranks."""

from collections.abc import Mapping

import torch
from torch import Tensor

from bandpo.metrics import PooledSum

# A mean of this many radii is off any chart, and still a number after a mean in float32.
_LARGEST = 1e9


def mean_proof(sums: Mapping[str, PooledSum]) -> dict[str, Tensor]:
    """Statistics of a micro-batch whose entries are always there and always finite.

    A clip fraction of a bin of probabilities, or a share of the tokens with `A != 0`, is a quotient whose denominator may be 0
    in a micro-batch; one such NaN makes the mean of a whole step NaN. Instead there are shares of all valid tokens, with
    `_of_all` in their names, whose means can be divided afterwards: `clip_fraction_by_prob_of_all/{low,high,any}/BIN` by
    `token_fraction_by_prob/BIN`. A micro-batch without a valid token counts as 0. Names have no prefix `band/`; the host puts
    its own in front. Names of maxima end in `_max`, as hosts expect that take their maximum.

    Args:
        sums: From `bandpo.metrics.policy_sums`.

    Examples:
        >>> none, five = torch.tensor(0.0), torch.tensor(5.0)
        >>> mean_proof({"ratio/mean": PooledSum(torch.tensor(6.0), five), "band/cap_fraction": PooledSum(none, none)})
        {'ratio/mean': tensor(1.2000), 'cap_fraction_of_all': tensor(0.)}
    """
    tokens = sums["ratio/mean"].denominator.clamp_min(1)
    found: dict[str, Tensor] = {}
    for name, statistic in sums.items():
        family, slash, rest = name.partition("/")
        if family == "clip_fraction_by_prob":
            found[f"{family}_of_all{slash}{rest}"] = statistic.numerator / tokens
        elif family == "band" and rest.endswith("_fraction"):
            found[f"{rest}_of_all"] = statistic.numerator / tokens
        else:
            value = statistic.value()
            found[name.removeprefix("band/")] = torch.nan_to_num(value, nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)
    return found


def as_floats(metrics: Mapping[str, Tensor], prefix: str = "") -> dict[str, float]:
    """Metrics as Python floats, after one synchronisation with the device."""
    values = torch.stack([x.float() for x in metrics.values()]).tolist() if metrics else []
    return {f"{prefix}{name}": value for name, value in zip(metrics, values, strict=True)}
