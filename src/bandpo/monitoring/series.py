"""The numbers of a metric over a run, as the rules see them: of a whole log, or as they come, in bounded memory."""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import chain
from statistics import median

_MOST_BLOCKS = 2048
_FEWEST, _RECENT = 5, 20
"""Values, at least and at most, of which the median is the end of a running series for findings while the run goes."""


@dataclass(frozen=True)
class Stats:
    """What the rules need of a series of finite values.

    Args:
        count: How many values there are.
        mean: Their mean; NaN if there is none, as for the numbers below.
        largest: The largest value.
        smallest: The smallest value.
        start: Mean over the first tenth of the values, of at least one.
        end: Mean over the last tenth.
        zeros: How many values are 0.
    """

    count: int
    mean: float
    largest: float
    smallest: float
    start: float
    end: float
    zeros: int = 0

    @property
    def constant(self) -> bool:
        """Whether there is a value, and all are the same."""
        return self.largest == self.smallest

    def __bool__(self) -> bool:
        return self.count > 0


NOTHING = Stats(0, math.nan, math.nan, math.nan, math.nan, math.nan)
"""A series without values."""


def stats_of(values: Sequence[float]) -> Stats:
    """The numbers of a series that is at hand.

    Args:
        values: Finite values in the order of the run.

    Examples:
        >>> stats_of([4.0, 2.0, 3.0])
        Stats(count=3, mean=3.0, largest=4.0, smallest=2.0, start=4.0, end=3.0, zeros=0)
    """
    if not values:
        return NOTHING
    n, tenth = len(values), max(1, len(values) // 10)
    start, end = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
    return Stats(n, sum(values) / n, max(values), min(values), start, end, values.count(0))


class Running:
    """A series that grows, in bounded memory.

    Sums are kept of at most 2048 blocks of values; when there are more, each two are joined. Count, mean, largest and smallest
    value are always exact. The start and the end are exact up to 2048 values; beyond, a tenth begins or ends within a block,
    whose values count as their mean there. A block has less than a hundredth of the values of a tenth.

    Examples:
        >>> series = Running()
        >>> for x in [4.0, 2.0, 3.0]:
        ...     series.add(x)
        >>> series.stats() == stats_of([4.0, 2.0, 3.0])
        True
    """

    __slots__ = (
        "_blocks",
        "_held",
        "_last",
        "_recent",
        "_size",
        "count",
        "largest",
        "lost",
        "smallest",
        "total",
        "zeros",
    )

    def __init__(self) -> None:
        self.count = self.lost = self.zeros = 0
        self.total, self.largest, self.smallest = 0.0, -math.inf, math.inf
        self._size: int = 1  # values in a whole block
        self._blocks: list[float] = []  # their sums
        self._last, self._held = 0.0, 0  # sum and values of the block that is not whole
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def add(self, value: float) -> None:
        """Take a value; one that is not finite is only counted, in `lost`.

        Args:
            value: The value.
        """
        if not math.isfinite(value):
            self.lost += 1
            return
        self.count += 1
        self.zeros += value == 0
        self.total += value
        self.largest, self.smallest = max(self.largest, value), min(self.smallest, value)
        self._recent.append(value)
        self._last, self._held = self._last + value, self._held + 1
        if self._held == self._size:
            self._blocks.append(self._last)
            self._last, self._held = 0.0, 0
        if len(self._blocks) == _MOST_BLOCKS:
            self._blocks = [a + b for a, b in zip(self._blocks[::2], self._blocks[1::2], strict=True)]
            self._size = 2 * self._size

    def stats(self, *, recent: bool = False) -> Stats:
        """The numbers of the series so far.

        Args:
            recent: Whether the end is the median of the last tenth, of at least 5 and at most 20 values: it notices a change
                early, and no single odd value.
        """
        if not self.count:
            return NOTHING
        tenth = max(1, self.count // 10)
        whole = ((self._size, total) for total in self._blocks)
        backwards = ((self._size, total) for total in reversed(self._blocks))
        rest = (self._held, self._last)
        if recent:
            newest = list(self._recent)[-max(_FEWEST, tenth) :]
            end = median(newest)
        else:
            end = _mean_of_first(chain([rest], backwards), tenth)
        mean = self.total / self.count
        start = _mean_of_first(chain(whole, [rest]), tenth)
        return Stats(self.count, mean, self.largest, self.smallest, start, end, self.zeros)


def _mean_of_first(blocks: Iterable[tuple[int, float]], count: int) -> float:
    """The mean of the first values of a row of blocks, `(values, sum)`."""
    total, left = 0.0, count
    for size, block in blocks:
        taken = min(size, left)
        total, left = total + (block if taken == size else block * (taken / size)), left - taken
        if not left:
            break
    return total / count


class Symptomatic(ABC):
    """What a rule over the metrics of a run may ask. The names of series are the keys of `bandpo.monitoring.symptoms.NAMES`."""

    @abstractmethod
    def others_lost(self) -> Mapping[str, int]:
        """Other metrics that are NaN or infinite, with the number of rows."""

    @abstractmethod
    def known(self) -> Set[str]:
        """The series that the run has."""

    @abstractmethod
    def series(self, what: str) -> tuple[str, Stats]:
        """The host's name of a metric, and the numbers of its finite values.

        Args:
            what: The series.
        """

    @abstractmethod
    def lost(self, what: str) -> tuple[int, int]:
        """How many values of a series are not finite, and how many it has.

        Args:
            what: The series.
        """

    def always(self, what: str, value: float) -> bool:
        """Whether a metric is in some row, and has this value in every row in which it is.

        Args:
            what: The series.
            value: The value to compare with.
        """
        _, stats = self.series(what)
        return bool(stats) and not self.lost(what)[0] and stats.smallest == value == stats.largest

    def no_signal(self) -> str:
        """The evidence that every advantage was 0 in every row, "" if there is none."""
        if self.always("zero variance", 1):
            return f"{self.series('zero variance')[0]} is 1"
        if self.always("largest advantage", 0) and self.always("smallest advantage", 0):
            return "every advantage is 0"
        if self.always("spread", 0):
            return f"{self.series('spread')[0]} is 0"
        return ""

    def not_finite(self) -> Iterator[tuple[str, int, int]]:
        """The series with values that are not finite: their name, how many, of how many."""
        for what in self.known():
            count, values = self.lost(what)
            if count:
                yield self.series(what)[0], count, values
