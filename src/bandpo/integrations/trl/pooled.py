"""Metrics of a log as sums, added up over processes and over the micro-batches between two lines of the log."""

import math
from collections.abc import Mapping, MutableMapping
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


def over_processes(accelerator: Gathers, sums: Mapping[str, PooledSum]) -> dict[str, Total]:
    """Add up the sums of all processes, with one collective and one transfer to the host.

    Args:
        accelerator: The trainer's accelerator.
        sums: The sums of this process by name, with the same names on every process.

    Returns:
        The sums of all processes by name, as Python floats.
    """
    wide = torch.float32 if accelerator.device.type == "mps" else torch.float64
    mine = torch.stack([x.detach().to(wide) for s in sums.values() for x in (s.numerator, s.denominator)])
    everywhere = accelerator.gather(mine.unsqueeze(0)).cpu().to(torch.float64).view(-1, len(sums), 2)
    numerators, denominators = everywhere.unbind(-1)
    largest = _floats(numerators.masked_fill(denominators == 0, -math.inf).amax(0))
    added, counts = _floats(numerators.sum(0)), _floats(denominators.sum(0))
    return {
        name: Total(largest[i] if s.kind == "max" else added[i], counts[i], s.kind)
        for i, (name, s) in enumerate(sums.items())
    }


def _floats(x: torch.Tensor) -> list[float]:
    return cast("list[float]", x.tolist())


class PooledLog:
    """Writes pooled values into the log that TRL empties after each line: one entry for each name, of all parts so far.

    A name whose denominator is 0 has no entry: a mean over nothing is no number.
    """

    def __init__(self) -> None:
        self.parts: dict[str, Part] = {}
        """Numerator, denominator and kind by name. A checkpoint holds them."""

    def load(self, parts: object) -> None:
        """Restore `parts` from a checkpoint.

        Args:
            parts: What the checkpoint holds.

        Raises:
            ValueError: If they are not parts of metrics.
        """
        given = cast("dict[object, object]", parts) if isinstance(parts, dict) else None
        if given is None or not all(_is_part(name, part) for name, part in given.items()):
            raise ValueError("the sums of the metrics are not as they were saved")
        self.parts = cast("dict[str, Part]", given)

    def begin(self, log: Log) -> None:
        """Forget the parts of a line that has been written; to be called before each micro-batch.

        Args:
            log: TRL's log.
        """
        for name in [name for name in self.parts if not log.get(name)]:
            del self.parts[name]

    def put(self, log: Log, name: str, total: Total) -> None:
        """Add a part, and write the pooled value as the only entry of its name.

        Args:
            log: TRL's log.
            name: Name of the metric.
            total: The part, over all processes.
        """
        numerator, denominator, kind = total
        if denominator > 0 and not math.isnan(numerator):
            part = self.parts.get(name)
            if part is None:
                self.parts[name] = [numerator, denominator, kind]
            elif kind == "mean":
                self.parts[name] = [part[0] + numerator, part[1] + denominator, kind]
            else:
                choose = max if kind == "max" else min
                self.parts[name] = [choose(part[0], numerator), part[1] + denominator, kind]
        part = self.parts.get(name)
        if part is None:
            log.pop(name, None)
            return
        # float64 sums, rounded once: what float32 tensors give for a single part
        log[name] = [float(np.float32(part[0] / part[1] if kind == "mean" else part[0]))]

    def take(self, log: Log, name: str, *, weight: float, count: float, kind: Kind = "mean") -> None:
        """Pool the value that TRL has appended for this micro-batch, if there is one.

        Args:
            log: TRL's log.
            name: Name of the metric.
            weight: Number of tokens or sequences that TRL's mean was taken over, on all processes.
            count: How many of them count.
            kind: How the parts are put together.
        """
        fresh = log.get(name, [])[1 if name in self.parts else 0 :]
        if fresh:
            self.put(log, name, Total(fresh[-1] * weight if kind == "mean" else fresh[-1], count, kind))

    def drop(self, log: Log, name: str) -> None:
        """Remove a metric that TRL has computed for other advantages than those of the batch.

        Args:
            log: TRL's log.
            name: Name of the metric.
        """
        self.parts.pop(name, None)
        log.pop(name, None)


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
