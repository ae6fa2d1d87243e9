"""The order in which rows are drawn: it follows from the seed alone, so that a resumed run draws what the first one did."""

from typing import cast

import torch

_EPOCH_STRIDE = 7919
"""Added to the seed for each epoch. A prime number far above usual seeds: neighbouring seeds share no epoch's permutation."""


def shuffled_rows(first: int, count: int, *, rows: int, seed: int) -> list[int]:
    """The row numbers at the places `first` ... `first + count - 1` of an endless sequence of shuffled epochs.

    Each epoch is a permutation of all rows that depends on the seed and on the epoch's number, and on nothing else.

    Args:
        first: Number of places that were drawn before.
        count: Number of places to draw.
        rows: Number of rows in the data set.
        seed: Seed of the run.

    Returns:
        `count` numbers in `[0, rows)`.

    Examples:
        >>> shuffled_rows(0, 3, rows=3, seed=0), shuffled_rows(1, 4, rows=3, seed=0)
        ([0, 2, 1], [2, 1, 0, 1])
    """
    places = torch.arange(first, first + count)
    epochs = places.div(rows, rounding_mode="floor")
    chosen: list[int] = []
    for epoch in cast("list[int]", epochs.unique().tolist()):
        generator = torch.Generator().manual_seed(seed + _EPOCH_STRIDE * (epoch + 1))
        order = torch.randperm(rows, generator=generator)
        chosen += order[places[epochs == epoch] % rows].tolist()
    return chosen
