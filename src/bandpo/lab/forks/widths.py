"""One radius against one or two epsilons: on how much of a grid learning succeeds, and what a few trials of it find."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bandpo.lab.forks.regimes import PEAK

SHARE = 0.8
"""A seed has learnt where its mean at the end exceeds this share of `PEAK`; set before any run of this study."""
TRIALS = 4
"""Number of cells that a user tries in `best`."""


def width_values(found: Mapping[str, Any]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """For each place and family the values of each seed.

    `area` is the share of cells (width and learning rate) in which the seed has learnt. `best` is the mean at the end of the
    cell that is best on the tuning seeds among `TRIALS` cells drawn without replacement, as its exact expectation over draws.

    Args:
        found: Result of `bandpo.lab.forks.plan.run_widths`.

    Returns:
        `values[place][family][measure]`, one number for each report seed.
    """
    values: dict[str, dict[str, dict[str, list[float]]]] = {}
    for place, families in found.items():
        needed = SHARE * PEAK[place.partition("/")[0]]
        values[place] = {}
        for name, cells in families.items():
            means = np.array([cell["mean"] for cell in cells], float)  # (cells, seeds)
            best = best_of([cell["tuning"] for cell in cells], TRIALS) @ means
            area = np.where(np.isnan(means), np.nan, means > needed).mean(0)
            values[place][name] = {"area": area.tolist(), "best": best.tolist()}
    return values


def best_of(scores: Sequence[float], trials: int) -> Any:
    """The chance of each cell to be the best of several that are drawn without replacement.

    Of N cells, the one with k cells above it is the best of n with the chance `C(N-1-k, n-1) / C(N, n)`.

    Args:
        scores: What a cell is judged by, the higher the better; of equal ones the first counts as the better one.
        trials: n, at most N.

    Returns:
        float64, `(cells,)`; adds up to 1.

    Raises:
        ValueError: If n is below 1 or above N.

    Examples:
        >>> best_of([0.1, 0.3, 0.2], 2).round(3).tolist()
        [0.0, 0.667, 0.333]
    """
    count = len(scores)
    if not 1 <= trials <= count:
        raise ValueError(f"best_of: trials must be from 1 to the number of cells, {count}; got {trials}")
    order = sorted(range(count), key=lambda i: -scores[i])
    chances = np.empty(count)
    for above, i in enumerate(order):
        chances[i] = math.comb(count - 1 - above, trials - 1) / math.comb(count, trials)
    return chances
