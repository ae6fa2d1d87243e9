"""Metrics of a log as sums, added up over processes and over the micro-batches between two lines of the log."""

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeGuard, cast, get_args

import numpy as np
import torch

from bandpo.metrics import PooledSum

Kind = Literal["mean", "max", "min"]
"""How the parts of a metric are put together."""

Log = MutableMapping[str, list[float]]
"""The metrics that a trainer of TRL has collected since the last line of its log."""

Part = list[Any]
"""Numerator, denominator and kind of a metric; a list, because checkpoints hold plain values."""


MOST_WAITING = 256
"""Micro-batches whose metrics wait as tensors; a run that logs more rarely settles them in between."""


class Gathers(Protocol):
    """What is used of accelerate's `Accelerator`."""

    device: torch.device

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all processes, concatenated along the first dimension."""
        ...


class Total(NamedTuple):
    """A `PooledSum` over all processes, on the host."""

    numerator: float
    """Sum over the tokens that count, or their maximum or minimum."""
    denominator: float
    """Number of those tokens."""
    kind: Kind = "mean"
    """How several of them become one."""


@torch.no_grad()
def over_processes(accelerator: Gathers, groups: Sequence[Mapping[str, PooledSum]]) -> list[dict[str, Total]]:
    """Add up the sums of all processes, with one collective and one transfer to the host.

    Args:
        accelerator: The trainer's accelerator.
        groups: The sums of this process by name, for example those of several micro-batches; with the same names on every
            process.

    Returns:
        The sums of all processes by name, as Python floats, for each group.
    """
    every = [s for group in groups for s in group.values()]
    if not every:
        return [{} for _ in groups]
    wide = torch.float32 if accelerator.device.type == "mps" else torch.float64
    numbers = [x for s in every for x in (s.numerator, s.denominator)]
    places: dict[torch.dtype, list[int]] = {}  # numbers of one dtype are converted together
    for i, x in enumerate(numbers):
        places.setdefault(x.dtype, []).append(i)
    mine = torch.cat([torch.stack([numbers[i] for i in chosen]).to(wide) for chosen in places.values()])
    everywhere = accelerator.gather(mine.unsqueeze(0)).cpu().numpy().astype(np.float64)
    order = np.argsort([i for chosen in places.values() for i in chosen])
    parts = everywhere[:, order].reshape(len(everywhere), len(every), 2)
    added = cast("list[list[float]]", parts.sum(0).tolist())
    largest = cast("list[float]", np.where(parts[..., 1] == 0, -math.inf, parts[..., 0]).max(0).tolist())
    found = iter(
        Total(largest[i] if s.kind == "max" else added[i][0], added[i][1], s.kind) for i, s in enumerate(every)
    )
    return [{name: next(found) for name in group} for group in groups]


class Measured(NamedTuple):
    """What a micro-batch measured on this process, which waits for the next line of the log."""

    sums: Mapping[str, PooledSum]
    """The sums by name, as tensors on the device."""
    add: Callable[[dict[str, Total]], None]
    """Adds their totals over all processes to the parts of a `PooledLog`."""


class PooledLog:
    """Pools the metrics of micro-batches into the log that TRL empties after each line: one entry for each name.

    Micro-batches wait as tensors, without a transfer to the host, until `settle`. A name whose denominator is 0 has no entry: a
    mean over nothing is no number. Neither has a name that no micro-batch of a line has measured.
    """

    def __init__(self) -> None:
        self.parts: dict[str, Part] = {}
        """Numerator, denominator and kind by name. A checkpoint holds them."""
        self._waiting: list[Measured] = []

    def load(self, parts: object, of: Log) -> None:
        """Restore `parts` from a checkpoint.

        Args:
            parts: What the checkpoint holds. Those of a line that had been written are left out.
            of: The log in the same checkpoint.

        Raises:
            ValueError: If they are not parts of metrics.
        """
        given = cast("dict[object, object]", parts) if isinstance(parts, dict) else None
        if given is None or not all(_is_part(name, part) for name, part in given.items()):
            raise ValueError("the sums of the metrics are not as they were saved")
        self.parts = {name: part for name, part in cast("dict[str, Part]", given).items() if of.get(name)}

    def wait(self, measured: Measured) -> bool:
        """Keep what a micro-batch measured.

        Args:
            measured: The sums of this process.

        Returns:
            Whether so many micro-batches wait that they should be settled before the next line of the log.
        """
        self._waiting.append(measured)
        return len(self._waiting) >= MOST_WAITING

    def settle(self, accelerator: Gathers, log: Log) -> None:
        """Add up over processes what has waited, and write the pooled values: one collective and one transfer for all of it.

        Args:
            accelerator: The trainer's accelerator.
            log: TRL's log.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        for measured, found in zip(waiting, over_processes(accelerator, [w.sums for w in waiting]), strict=True):
            measured.add(found)
        for name, (numerator, denominator, kind) in self.parts.items():
            # float64 sums, rounded once: what float32 tensors give for a single part
            log[name] = [float(np.float32(numerator / denominator if kind == "mean" else numerator))]

    def forget(self) -> None:
        """Begin the next line of the log."""
        self.parts = {}

    def put(self, name: str, total: Total) -> None:
        """Add a part.

        Args:
            name: Name of the metric.
            total: The part, over all processes.
        """
        numerator, denominator, kind = total
        if not denominator > 0 or math.isnan(numerator):
            return
        part = self.parts.get(name)
        if part is None:
            self.parts[name] = [numerator, denominator, kind]
        elif kind == "mean":
            self.parts[name] = [part[0] + numerator, part[1] + denominator, kind]
        else:
            choose = max if kind == "max" else min
            self.parts[name] = [choose(part[0], numerator), part[1] + denominator, kind]


def checked_metrics(log: object) -> dict[str, list[float]]:
    """The metrics of a trainer since the last line of its log, from a checkpoint.

    Args:
        log: What the checkpoint holds.

    Raises:
        ValueError: If it is not a dict with lists of numbers.
    """
    given = cast("dict[object, object]", log) if isinstance(log, dict) else None
    if given is None or not all(isinstance(name, str) and _are_numbers(values) for name, values in given.items()):
        raise ValueError("the metrics since the last log are not as they were saved")
    return cast("dict[str, list[float]]", given)


def _is_part(name: object, part: object) -> bool:
    if not isinstance(name, str) or not isinstance(part, list) or len(cast("Part", part)) != 3:
        return False
    numerator, denominator, kind = cast("list[object]", part)
    return _is_number(numerator) and _is_number(denominator) and denominator > 0 and kind in get_args(Kind)


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and all(map(_is_number, cast("list[object]", values)))


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def without_empty(log: Log) -> None:
    """Remove names without any number from a log; TRL would write None for them, and TensorBoard would print an error.

    Args:
        log: TRL's log, or values of one line.
    """
    for name in [name for name, values in log.items() if all(math.isnan(v) for v in values)]:
        del log[name]
