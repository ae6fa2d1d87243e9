"""What paired timings gave: medians, and the ratios of cases that ran in turn. Needs nothing but Python."""

import statistics
from collections.abc import Mapping, Sequence


class Seconds(dict[str, float]):
    """The median seconds of one call of each case; the cases of a round ran one after the other.

    Args:
        rounds: Seconds of each case in each round.
    """

    def __init__(self, rounds: Mapping[str, Sequence[float]]) -> None:
        super().__init__({name: statistics.median(values) for name, values in rounds.items()})
        self.rounds = rounds

    def ratio(self, a: str, b: str) -> float:
        """The median over rounds of the ratio of two cases, which ran one after the other."""
        return statistics.median(self._ratios(a, b))

    def quartiles(self, a: str, b: str) -> list[float]:
        """The middle half of these ratios, which a row records as `quartiles`."""
        ratios = self._ratios(a, b)
        if len(ratios) < 2:
            return [ratios[0], ratios[0]]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return [low, high]

    def _ratios(self, a: str, b: str) -> list[float]:
        return [x / y for x, y in zip(self.rounds[a], self.rounds[b], strict=True)]
