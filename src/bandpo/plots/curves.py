"""What the figures of a run need of its log, read in one pass: curves of bounded size, and means over the run."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from bandpo._system.jsonl import as_number
from bandpo.metrics import PROB_BINS

MOST_POINTS = 2000
"""Points of a curve that are drawn."""
_DRAWN = (
    *("reward", "entropy", "clip_ratio/high_mean", "clip_ratio/low_mean"),
    *("rewards/accuracies", "concentrability/log_mean", "rewards/chosen", "rewards/rejected"),
    *("completions/mean_length", "completions/max_length", "kl", "kl/old_new", "band/divergence_mean"),
)
SPEED = "tokens per second"
"""The curve that is computed from the tokens of the rollouts (`num_tokens`) and the seconds of the steps (`step_time`)."""

_Point = tuple[int, float, float]  # which one it is, x, y


class Curve:
    """The points of a curve; of more than `MOST_POINTS`, the lowest and the highest of groups of equal numbers of points.

    So a peak of a single point is drawn, however many points there are. Points whose y is not finite are kept while all points
    are, and leave a gap; afterwards they are left out.

    Examples:
        >>> curve = Curve()
        >>> for i in range(10_000):
        ...     curve.add(i, 5.0 if i == 777 else 0.0)
        >>> x, y = curve.points()
        >>> len(x) <= MOST_POINTS, max(y), x[y.index(5.0)]
        (True, 5.0, 777)
    """

    def __init__(self) -> None:
        self.count = 0
        """Number of points that were added."""
        self._all: list[tuple[float, float]] = []
        self._groups: list[tuple[_Point, _Point]] = []  # the lowest and the highest point of each
        self._low = self._high = (0, 0.0, 0.0)  # of the group that is not full
        self._filled = 0  # points in it
        self._width = 1  # points in a full group

    @property
    def reduced(self) -> bool:
        """Whether some points are left out."""
        return self.count > MOST_POINTS

    def add(self, x: float, y: float) -> None:
        """Add the next point.

        Args:
            x: Where it is.
            y: The value there.
        """
        self.count += 1
        if self.count > MOST_POINTS:
            if self._all:
                for i, point in enumerate(self._all):
                    self._put(i, *point)
                self._all = []
            self._put(self.count - 1, x, y)
        else:
            self._all.append((x, y))

    def points(self) -> tuple[list[float], list[float]]:
        """The coordinates x and y of the points to draw, in the order in which they were added."""
        groups = [*self._groups, (self._low, self._high)] if self._filled else self._groups
        kept = self._all or [(x, y) for group in groups for _, x, y in sorted(set(group))]
        return [x for x, _ in kept], [y for _, y in kept]

    def _put(self, i: int, x: float, y: float) -> None:
        if not math.isfinite(y):
            return
        if self._filled == 0:
            self._low = self._high = (i, x, y)
        elif y < self._low[2]:
            self._low = (i, x, y)
        elif y > self._high[2]:
            self._high = (i, x, y)
        self._filled += 1
        if self._filled == self._width:
            self._groups.append((self._low, self._high))
            self._filled = 0
            if len(self._groups) == MOST_POINTS // 2:
                self._groups = [_joined(*self._groups[i : i + 2]) for i in range(0, len(self._groups), 2)]
                self._width *= 2


class Curves:
    """The curves of a run, and its clip fractions by probability, from the rows of its metrics.jsonl.

    A metric may be missing in some rows: its curve joins the rows that have it, and a mean is over those.

    Args:
        rows: The rows in their order, also as `number_texts` reads them. They are read once, and not kept.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.rows = 0
        """Number of rows."""
        self._curves = {name: Curve() for name in (*_DRAWN, SPEED)}
        self._speed = _Speed(self._curves[SPEED])
        self.last: float | None = None
        """The step of the last row that has one."""
        self._shares = {name: [0.0, 0.0] for name in PROB_BINS}
        self._clipped = {(side, name): [0.0, 0.0] for side in ("low", "high") for name in PROB_BINS}
        self._bins = [
            (
                (f"token_fraction_by_prob/{name}", mean),
                [(f"clip_fraction_by_prob/{side}/{name}", self._clipped[side, name]) for side in ("low", "high")],
            )
            for name, mean in self._shares.items()
        ]
        for row in rows:
            self.rows += 1
            self._add(row)
        self._speed.close()

    @property
    def reduced(self) -> bool:
        """Whether a curve has more points than are drawn."""
        return any(curve.reduced for curve in self._curves.values())

    @property
    def by_probability(self) -> bool:
        """Whether a row has shares by probability, which a run measures with `full_metrics_every`."""
        return any(weight for _, weight in self._shares.values())

    def curve(self, name: str) -> Curve:
        """The curve of a metric over the steps.

        Args:
            name: One of the metrics that the figures show.
        """
        return self._curves[name]

    def clipped(self, side: str | None, name: str) -> float:
        """The clip fraction of a bin over the run, its rows weighted by their tokens; for None the mean share of tokens.

        Args:
            side: "low" or "high"; None for the share of all tokens.
            name: A bin of `PROB_BINS`.
        """
        total, weight = self._shares[name] if side is None else self._clipped[side, name]
        return total / weight if weight else 0.0

    def _add(self, row: Mapping[str, Any]) -> None:
        step = _number(row.get("step"))
        if step is not None:
            self.last = step
            self._speed.add(step, _number(row.get("num_tokens")), _number(row.get("step_time")))
            for name, curve in self._curves.items():
                if (y := _number(row.get(name))) is not None:
                    curve.add(step, y)
        for (share_key, mean), sides in self._bins:
            share = _number(row.get(share_key))
            if share is None:
                continue
            mean[0] += share
            mean[1] += 1
            if not share:
                continue
            for clip_key, clipped in sides:
                if (value := _number(row.get(clip_key))) is not None:
                    clipped[0] += share * value
                    clipped[1] += share


class _Speed:
    """Tokens of the rollouts per second of training.

    A rollout is sampled once and used for several steps, so its tokens are divided by the seconds from the row that counts them
    up to the row before the next rollout.

    Args:
        curve: Where the points are added, at the last step of each rollout.
    """

    def __init__(self, curve: Curve) -> None:
        self._curve = curve
        self._step: float = 0.0  # of the last row, as are the tokens
        self._tokens: float = 0.0
        self._new: float = 0.0  # of the rollouts that are counted, as are the seconds
        self._seconds: float = 0.0
        self._longest: float = 0.0  # steps of one rollout, at most
        self._began: float = 0.0

    def add(self, step: float, tokens: float | None, seconds: float | None) -> None:
        """Take a row.

        Args:
            step: The step of the row.
            tokens: Tokens of all rollouts so far; None where there was no rollout since the last row.
            seconds: Mean seconds of a step since the last row.
        """
        tokens = self._tokens if tokens is None else tokens
        if seconds is None or not math.isfinite(tokens * seconds) or step <= self._step:
            self._step, self._tokens, self._new = step, tokens, 0.0
            return
        if tokens > self._tokens:
            self._close()
            self._new, self._seconds, self._began = tokens - self._tokens, 0.0, self._step
        self._seconds += seconds * (step - self._step)
        self._step, self._tokens = step, tokens

    def close(self) -> None:
        """Take the last rollout, unless it was used for fewer steps than another one: its update was cut off."""
        if self._step - self._began >= self._longest:
            self._close()

    def _close(self) -> None:
        if self._new > 0 and self._seconds > 0:
            self._longest = max(self._longest, self._step - self._began)
            self._curve.add(self._step, self._new / self._seconds)
        self._new = 0.0


def _number(value: Any) -> float | None:
    return None if value is None else float(value) if value.__class__ is bytes else as_number(value)


def _joined(first: tuple[_Point, _Point], second: tuple[_Point, _Point]) -> tuple[_Point, _Point]:
    """The lowest and the highest point of two groups; of equal ones the first."""
    return (
        second[0] if second[0][2] < first[0][2] else first[0],
        second[1] if second[1][2] > first[1][2] else first[1],
    )
