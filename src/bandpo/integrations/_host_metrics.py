"""Metrics in the form that survives what hosts do to them: a plain mean over micro-batches and ranks."""

from collections.abc import Mapping

import torch
from torch import Tensor

# A mean of this many radii is off any chart, and still a number after a mean in float32.
_LARGEST = 1e9


def mean_proof(report: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A report of `policy_metrics` whose entries are always there and always finite.

    The clip fraction of a probability bin is a quotient whose denominator may be empty in a micro-batch; one such NaN makes
    the mean of a whole step NaN. Instead there are two shares of all valid tokens, whose means can be divided afterwards:
    `clip_fraction_by_prob_of_all/{low,high,any}/BIN` and `token_fraction_by_prob/BIN`. A micro-batch without a valid token
    counts as 0. Names have no prefix `band/`; the host puts its own in front. Names of maxima end in `_max`, as hosts expect
    that take their maximum.

    Examples:
        >>> report = {"clip_fraction_by_prob/any/>=0.99": torch.tensor(torch.nan),
        ...           "token_fraction_by_prob/>=0.99": torch.tensor(0.0), "band/cap_fraction": torch.tensor(0.5)}
        >>> mean_proof(report)
        {'clip_fraction_by_prob_of_all/any/>=0.99': tensor(0.), 'token_fraction_by_prob/>=0.99': tensor(0.),
         'cap_fraction': tensor(0.5000)}
    """
    found: dict[str, Tensor] = {}
    for name, value in report.items():
        if name.startswith("clip_fraction_by_prob/"):
            _, side, bin_name = name.split("/")
            name, value = (
                f"clip_fraction_by_prob_of_all/{side}/{bin_name}",
                value * report[f"token_fraction_by_prob/{bin_name}"],
            )
        found[name.removeprefix("band/")] = torch.nan_to_num(value, nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)
    return found


def as_floats(metrics: Mapping[str, Tensor], prefix: str = "") -> dict[str, float]:
    """Metrics as Python floats, after one synchronisation with the device."""
    values = torch.stack([x.float() for x in metrics.values()]).tolist() if metrics else []
    return {f"{prefix}{name}": value for name, value in zip(metrics, values, strict=True)}
