"""Metrics of a trainer's log as sums, added up over the processes and over the micro-batches between two lines of the log."""

import math
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from bandpo.metrics import PooledSum

Kind = Literal["mean", "max", "min"]
Log = MutableMapping[str, list[float]]


class Total(NamedTuple):
    """A `PooledSum` over all processes, on the host."""

    numerator: float
    denominator: float
    kind: Kind = "mean"


def over_processes(accelerator: Any, sums: Mapping[str, PooledSum]) -> dict[str, Total]:
    """The sums of all processes together, by one collective and one transfer to the host.

    Args:
        accelerator: accelerate's.
        sums: Of this process; the same names on every process.
    """
    wide = torch.float32 if accelerator.device.type == "mps" else torch.float64
    mine = torch.stack([x.detach().to(wide) for s in sums.values() for x in (s.numerator, s.denominator)])
    everywhere = accelerator.gather(mine.unsqueeze(0)).cpu().to(torch.float64).view(-1, len(sums), 2)
    counts = everywhere[..., 1].sum(0).tolist()
    added = everywhere[..., 0].sum(0).tolist()
    largest = everywhere[..., 0].masked_fill(everywhere[..., 1] == 0, -math.inf).amax(0).tolist()
    return {
        name: Total(largest[i] if s.kind == "max" else added[i], counts[i], s.kind)
        for i, (name, s) in enumerate(sums.items())
    }


class PooledLog:
    """Writes pooled values into a log that TRL empties after each line: one entry of each name, of all parts so far.

    A name without evidence (a denominator of 0) has no entry: the mean of nothing is no number.
    """

    def __init__(self) -> None:
        self.parts: dict[str, list[Any]] = {}
        """Numerator, denominator and kind by name; a checkpoint keeps them."""

    def load(self, parts: Any) -> None:
        """Take back `parts` from a checkpoint.

        Raises:
            ValueError: If it is something else.
        """
        if not isinstance(parts, dict) or not all(_is_part(name, part) for name, part in parts.items()):
            raise ValueError("the sums of the metrics are not as they were saved")
        self.parts = parts

    def begin(self, log: Log) -> None:
        """Before a micro-batch: forget what belongs to a line that has been written."""
        for name in [name for name in self.parts if not log.get(name)]:
            del self.parts[name]

    def put(self, log: Log, name: str, total: Total) -> None:
        """Add a part, and write the pooled value as the only entry of its name."""
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
        """Pool the value that the host has appended for this micro-batch, if it has.

        Args:
            log: The host's.
            name: Of the value.
            weight: Tokens or sequences that the host's mean was taken over, on all processes.
            count: How many of them count.
            kind: How parts are put together.
        """
        fresh = log.get(name, [])[1 if name in self.parts else 0 :]
        if fresh:
            self.put(log, name, Total(fresh[-1] * weight if kind == "mean" else fresh[-1], count, kind))

    def drop(self, log: Log, name: str) -> None:
        """Leave out a name whose value the host got wrong."""
        self.parts.pop(name, None)
        log.pop(name, None)


def checked_metrics(log: Any) -> dict[str, list[float]]:
    """A trainer's metrics since its last log, from a checkpoint.

    Raises:
        ValueError: If it is something else.
    """
    numbers = isinstance(log, dict) and all(isinstance(v, list) and all(map(_is_number, v)) for v in log.values())
    if not numbers or not all(isinstance(name, str) for name in log):
        raise ValueError("the metrics since the last log are not as they were saved")
    return log


def _is_part(name: Any, part: Any) -> bool:
    numbers = isinstance(part, list) and len(part) == 3 and all(map(_is_number, part[:2]))
    return isinstance(name, str) and numbers and part[1] > 0 and part[2] in get_args(Kind)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def without_empty(log: Log) -> None:
    """Remove the names that have no number at all; TRL would write None for them, which TensorBoard complains about."""
    for name in [name for name, values in log.items() if all(math.isnan(v) for v in values)]:
        del log[name]
