"""Statistics of paired runs: interquartile means with BCa intervals, permutation tests, Holm's correction, effect sizes."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
RESAMPLES = 9999
"""Bootstrap resamples, and random sign flips of a permutation test."""

NORMAL_95 = 1.959963984540054
"""The 97.5% quantile of the standard normal distribution, for two-sided intervals at 95%."""

_EXACT_PAIRS = 13  # up to so many pairs, all 2^n sign flips are tried
_AT_ONCE = 1 << 18
"""Values that are resampled at a time: memory does not grow with the number of runs, and the draws are the same."""
Key = TypeVar("Key")


class Interval(NamedTuple):
    """An estimate and its 95% interval.

    Args:
        value: The estimate.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Difference(NamedTuple):
    """A paired comparison with a baseline.

    Args:
        mean: Mean difference with its interval.
        p: p-value of a two-sided permutation test of the paired differences, before correction.
        p_holm: p-value after Holm's correction over the comparisons made together.
        effect: Mean difference over the standard deviation of the differences (Cohen's d for pairs).
        pairs: Number of pairs.
    """

    mean: Interval
    p: float
    p_holm: float
    effect: float
    pairs: int


def iqm(values: Sequence[float] | Floats, axis: int = -1) -> Any:
    """Interquartile mean: the mean of the middle half (arXiv:2108.13264). NaN or an infinity among the values makes it NaN.

    Args:
        values: Values, any shape.
        axis: Axis over which the mean is taken.

    Returns:
        A float for one axis, else an array without that axis.

    Examples:
        >>> float(iqm([0.0, 1.0, 2.0, 100.0]))
        1.5
    """
    x = np.asarray(values, dtype=np.float64)
    # Trimming alone would cut NaN and infinities off, as if they were the largest values.
    return np.where(np.isfinite(x).all(axis), stats.trim_mean(x, 0.25, axis=axis), np.nan)[()]


def interval(values: Sequence[float], statistic: Callable[..., Any] = iqm, *, seed: int = 0) -> Interval:
    """Estimate with a BCa bootstrap interval at 95%; the interval is the point itself where all values agree.

    A NaN or infinite value makes all three numbers NaN, so that a run that diverged is not averaged away.

    Args:
        values: One value for each run.
        statistic: Function of an array and `axis`.
        seed: Seed of the resampling.

    Returns:
        The estimate with its interval; the ends are NaN with fewer than three values.
    """
    x = np.asarray(values, dtype=np.float64)
    if not np.isfinite(x).all():
        return Interval(math.nan, math.nan, math.nan)
    value = float(statistic(x, axis=-1))
    if len(x) < 3:
        return Interval(value, math.nan, math.nan)
    if np.ptp(x) == 0:
        return Interval(value, value, value)
    low, high = _bootstrap(x, statistic, "BCa", seed)
    if math.isnan(low) or math.isnan(high):  # BCa has no acceleration where the jackknife is constant
        low, high = _bootstrap(x, statistic, "percentile", seed)
    return Interval(value, low, high)


def _bootstrap(x: Floats, statistic: Callable[..., Any], method: str, seed: int) -> tuple[float, float]:
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # the caller then uses another method
        done: Any = stats.bootstrap(
            (x,),
            statistic,
            n_resamples=RESAMPLES,
            batch=_resamples_at_once(len(x)),
            method=method,
            rng=np.random.default_rng(seed),
            vectorized=True,
        )
    found = done.confidence_interval
    return float(found.low), float(found.high)


def compare(results: Mapping[str, Sequence[float]], baseline: str, *, seed: int = 0) -> dict[str, Difference]:
    """Compare every arm with a baseline, run by run: the same place in two sequences is the same seed and warm-up.

    Args:
        results: Values of each arm, in the same order of runs.
        baseline: The arm to compare with.
        seed: Seed of the resampling.

    Returns:
        The difference of each other arm from the baseline.

    Raises:
        ValueError: If the arms have different numbers of runs, or the baseline is missing.
    """
    if baseline not in results:
        raise ValueError(f"baseline {baseline!r} is not among {', '.join(results)}")
    return paired({name: (results[name], results[baseline]) for name in results if name != baseline}, seed=seed)


def paired(pairs: Mapping[Key, tuple[Sequence[float], Sequence[float]]], *, seed: int = 0) -> dict[Key, Difference]:
    """The differences first - second of pairs of arms, with p-values that are corrected together.

    The test flips the signs of the differences in all 2^n ways up to n = 13, else in 9999 random ways (scipy's
    permutation_test).

    Args:
        pairs: Values of two arms, in the same order of runs.
        seed: Seed of the resampling.

    Returns:
        The difference of each pair.

    Raises:
        ValueError: If two arms have different numbers of runs.
    """
    found: dict[Key, tuple[Interval, float, float, int]] = {}
    for name, (first, second) in pairs.items():
        if len(first) != len(second):
            raise ValueError(f"{name}: {len(first)} and {len(second)} runs cannot be paired")
        difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
        count = len(difference)
        if not np.isfinite(difference).all():  # a run diverged, so there is no difference to test
            found[name] = (Interval(math.nan, math.nan, math.nan), math.nan, math.nan, count)
            continue
        deviation = float(np.std(difference, ddof=1)) if count > 1 else math.nan
        mean = float(difference.mean())
        effect = mean / deviation if deviation else (0.0 if mean == 0 else math.copysign(math.inf, mean))
        found[name] = (
            interval(list(difference), np.mean, seed=seed),
            _sign_flips(difference, seed),
            effect,
            count,
        )
    corrected = holm([p for _, p, _, _ in found.values()])
    return {
        name: Difference(mean, p, q, effect, count)
        for (name, (mean, p, effect, count)), q in zip(found.items(), corrected, strict=True)
    }


def t_half_width(x: Floats) -> Floats:
    """Half of the 95% t-interval of the mean of `(runs, ...)` values, of shape `(...)`."""
    return stats.t.ppf(0.975, len(x) - 1) * x.std(0, ddof=1) / np.sqrt(len(x))


Verdict = Literal["better", "worse", "equivalent", "undecided"]


def t_interval(values: Sequence[float], comparisons: int = 1) -> Interval:
    """Mean with its two-sided t-interval, at 95% for all of several comparisons together (Bonferroni).

    Args:
        values: One value for each independent run, such as the paired differences of two arms.
        comparisons: Number of intervals of which all are to hold together with a chance of 95% or more.

    Returns:
        The mean with its interval. The ends are NaN with fewer than two values; a NaN or infinite value makes all three NaN.

    Raises:
        ValueError: If `comparisons` is below 1.

    Examples:
        >>> print(t_interval([1.0, 2.0, 3.0]))
        2.000 [-0.484, 4.484]
    """
    if comparisons < 1:
        raise ValueError(f"t_interval: comparisons must be at least 1, got {comparisons}")
    x = np.asarray(values, dtype=np.float64)
    if not np.isfinite(x).all():
        return Interval(math.nan, math.nan, math.nan)
    mean = float(x.mean())
    if len(x) < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf(1 - 0.025 / comparisons, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return Interval(mean, mean - half, mean + half)


def verdict(difference: Interval, smallest: float) -> Verdict:
    """What an interval says of a difference, by one rule for both directions.

    `equivalent` if the whole interval is closer to 0 than the smallest effect of interest, else `better` or `worse` if it does
    not contain 0, else `undecided`: the data allow no effect as well as one that matters.

    Args:
        difference: The difference with its interval.
        smallest: The smallest effect of interest, > 0, in the units of the difference.

    Raises:
        ValueError: If `smallest` is not positive.

    Examples:
        >>> [verdict(Interval(x, x - 0.01, x + 0.01), 0.02) for x in (0.05, -0.05, 0.005)]
        ['better', 'worse', 'equivalent']
        >>> verdict(Interval(0.01, -0.02, 0.04), 0.02)
        'undecided'
    """
    if not smallest > 0:
        raise ValueError(f"verdict: the smallest effect must be positive, got {smallest}")
    if max(abs(difference.low), abs(difference.high)) < smallest:
        return "equivalent"
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "undecided"


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of p-values.

    Args:
        p_values: One p-value for each test. NaN stays NaN, and is counted as a test that was made.

    Returns:
        The corrected p-values, in the same order.

    Examples:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
        >>> holm([0.01, math.nan])
        [0.02, nan]
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    corrected, largest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share (E. B. Wilson, JASA 22, 1927).

    Args:
        successes: How many of the trials succeeded.
        n: Number of trials.

    Returns:
        The lower and the upper end.

    Examples:
        >>> [round(x, 3) for x in wilson(90, 100)]
        [0.826, 0.945]
    """
    z, p = NORMAL_95, successes / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def best_of_bootstrap(rewards: Floats, k: int, *, draws: int = 1000, seed: int = 42) -> float:
    """`best@k` as in BandPO's official logs: the mean over `draws` of the best of k samples drawn *with* replacement.

    It differs from pass@k: one right sample of 32 scores 0.64 at k = 32 and not 1. Use it only to compare with those logs.

    Args:
        rewards: `(prompts, samples)`.
        k: Samples of each draw.
        draws: Bootstrap draws for each prompt.
        seed: Seed of the draws.

    Returns:
        The mean over prompts and draws.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, rewards.shape[1], (draws, k))
    return float(rewards[:, chosen].max(-1).mean())


def _mean(x: Floats, axis: int) -> Any:
    return x.mean(axis)


def _sign_flips(difference: Floats, seed: int) -> float:
    if not difference.any():
        return 1.0
    if len(difference) < 2:
        return math.nan
    return float(
        stats.permutation_test(
            (difference,),
            _mean,
            permutation_type="samples",
            vectorized=True,
            n_resamples=RESAMPLES if len(difference) > _EXACT_PAIRS else 2**_EXACT_PAIRS,
            batch=_resamples_at_once(len(difference)),
            rng=np.random.default_rng(seed),
        ).pvalue
    )


def _resamples_at_once(values: int) -> int:
    return max(1, _AT_ONCE // values)


def number(value: float | None, form: str = ".3f") -> str:
    """A number for a table, or a dash where there is no number, such as an end of the interval of two runs.

    Args:
        value: The number; None or NaN gives the dash.
        form: Format specification of the number.

    Examples:
        >>> number(0.25), number(None), number(math.nan)
        ('0.250', '–', '–')
    """
    return "–" if value is None or math.isnan(value) else format(value, form)
