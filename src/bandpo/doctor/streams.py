"""Statistics of a stream of numbers that need no more memory the longer it is: quantiles, sums of exponentials, moments."""

import math

import torch
from torch import Tensor

from bandpo.bounds.calibration import Largest


class Quantiles:
    """Quantiles of numbers that are not negative.

    A quantile is the middle between the two numbers that its rank lies between, and exact while there are no more than
    `KEPT` numbers. Of more, quantiles are within a relative error of 2⁻¹⁰; the largest number is always exact.

    Examples:
        >>> found = Quantiles()
        >>> found.add(torch.arange(1.0, 101.0))
        >>> found.at(0.5), found.at(0.99), found.largest, found.error
        (50.5, 99.5, 100.0, 0.0)
    """

    KEPT = 1 << 19
    """Numbers that are kept, 4 MB of them."""

    def __init__(self) -> None:
        self.count = 0
        """How many numbers there were."""
        self.largest = math.nan
        """The largest of them."""
        self.error = 0.0
        """Largest relative error of the quantiles that have been asked for."""
        self._ranked = Largest(1 << 62, kept=self.KEPT)

    def add(self, values: Tensor) -> None:
        """Take further numbers.

        Args:
            values: Finite numbers >= 0, `(n,)`.
        """
        if not len(values):
            return
        self.count += len(values)
        most = values.max().item()
        self.largest = most if math.isnan(self.largest) else max(self.largest, most)
        self._ranked.add(values.to(torch.float64))

    def at(self, share: float) -> float:
        """The number below which a share of the numbers lies; NaN where there is none.

        Args:
            share: Between 0 and 1.
        """
        rank = math.floor((1 - share) * self.count + 1e-9)
        if not 0 < rank < self.count:
            return self.largest
        split = self._ranked.split(rank)
        self.error = max(self.error, split.error)
        return min(split.radius, self.largest)


class LogSum:
    """The logarithm of a sum of exponentials, which neither overflows nor loses small terms.

    Examples:
        >>> found = LogSum()
        >>> found.add(torch.tensor([1000.0, 1000.0]))
        >>> round(found.value - 1000, 6)
        0.693147
    """

    def __init__(self) -> None:
        self.count = 0
        """How many exponents there were."""
        self.largest = -math.inf
        """The largest exponent."""
        self._scaled = 0.0

    def add(self, exponents: Tensor) -> None:
        """Take further exponents.

        Args:
            exponents: Float64, finite, `(n,)`.
        """
        if not len(exponents):
            return
        self.count += len(exponents)
        most = max(self.largest, exponents.max().item())
        self._scaled = self._scaled * math.exp(self.largest - most) + (exponents - most).exp().sum().item()
        self.largest = most

    @property
    def value(self) -> float:
        """The logarithm of the sum; -inf without an exponent."""
        return self.largest + math.log(self._scaled) if self.count else -math.inf


class Moments:
    """Mean, variance and largest value of a stream of numbers.

    Examples:
        >>> found = Moments()
        >>> found.add(torch.tensor([1.0, 3.0]))
        >>> found.mean, found.variance, found.largest
        (2.0, 2.0, 3.0)
    """

    def __init__(self) -> None:
        self.count = 0
        """How many numbers there were."""
        self.mean = 0.0
        """Their mean."""
        self.largest = -math.inf
        """The largest of them."""
        self._squares = 0.0

    def add(self, values: Tensor) -> None:
        """Take further numbers.

        Args:
            values: Finite numbers, `(n,)`.
        """
        n = len(values)
        if not n:
            return
        values = values.to(torch.float64)
        mean = values.mean().item()
        apart, total = mean - self.mean, self.count + n
        self._squares += (values - mean).square().sum().item() + apart * apart * self.count * n / total
        self.mean += apart * n / total
        self.count, self.largest = total, max(self.largest, values.max().item())

    @property
    def variance(self) -> float:
        """The unbiased variance; NaN for fewer than two numbers."""
        return self._squares / (self.count - 1) if self.count > 1 else math.nan

    @property
    def standard_error(self) -> float:
        """The standard error of the mean, of independent numbers; NaN for fewer than two."""
        return math.sqrt(self.variance / self.count) if self.count > 1 else math.nan


def rounded(x: float) -> float:
    """A number to nine digits: what is left of the order in which parts of a batch are added up is beyond them.

    Args:
        x: The number.

    Examples:
        >>> rounded(1 / 3)
        0.333333333
    """
    return float(f"{x:.9g}")
