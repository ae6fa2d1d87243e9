"""Statistics of paired runs: intervals of a mean difference, verdicts by one rule, power, permutation tests, Holm's correction.

Four intervals of the mean of paired differences, with what each assumes. Their coverage in the designs of our studies is
measured by tests/lab/test_coverage.py:

* `t_interval` (Student): differences that are roughly normal. Rare failures that no run of the sample shows are outside it.
* `sign_flip_interval`: differences that are symmetric about their mean, as those of two exchangeable arms are.
* `bounded_interval`: nothing but a range, so it holds for rare failures too, and is wider by about (4 × range) / runs.
* `cluster_interval`: runs that share something, such as a warmed-up model; it counts groups, not runs.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

Floats = NDArray[np.float64]
RESAMPLES = 9999
"""Bootstrap resamples, and random sign flips of a permutation test."""

NORMAL_95 = 1.959963984540054
"""The 97.5% quantile of the standard normal distribution, for two-sided intervals at 95%."""

_ALPHA = 0.05
_EXACT_PAIRS = 13  # up to so many pairs there are fewer sign flips, 2^n, than RESAMPLES, so all are tried
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


_NOTHING = Interval(math.nan, math.nan, math.nan)


class Difference(NamedTuple):
    """A paired comparison with a baseline.

    Args:
        mean: Mean difference with its interval.
        p: p-value of a two-sided permutation test of the paired differences, before correction.
        p_holm: p-value after Holm's correction over the comparisons made together.
        effect: Mean difference over the standard deviation of the differences (Cohen's d for pairs).
        pairs: Number of pairs.
        clusters: Number of clusters, whose means take the place of the pairs; None where runs share nothing.
    """

    mean: Interval
    p: float
    p_holm: float
    effect: float
    pairs: int
    clusters: int | None = None


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


def paired(
    pairs: Mapping[Key, tuple[Sequence[float], Sequence[float]]],
    *,
    clusters: Mapping[Key, Sequence[Hashable]] | None = None,
    seed: int = 0,
) -> dict[Key, Difference]:
    """The differences first - second of pairs of arms, with Student's intervals, and p-values that are corrected together.

    The test flips the signs of the differences in all 2^n ways up to n = 13, else in 9999 random ways (scipy's
    permutation_test). With clusters, the means of the clusters take the place of the differences, since runs that share a
    warmed-up model are not independent: three warm-ups are three numbers, however many runs there are.

    Args:
        pairs: Values of two arms, in the same order of runs.
        clusters: The cluster of each run of a pair, such as its warmed-up model; None where runs share nothing.
        seed: Seed of the resampling.

    Returns:
        The difference of each pair.

    Raises:
        ValueError: If two arms have different numbers of runs, or a pair has another number of clusters.

    Examples:
        >>> found = paired({"a - b": ([1.0, 1.2, 2.0, 2.2], [0.0] * 4)}, clusters={"a - b": "xxyy"})["a - b"]
        >>> found.pairs, found.clusters, round(found.mean.value, 2)
        (4, 2, 1.6)
    """
    found: dict[Key, tuple[Interval, float, float, int, int | None]] = {}
    for name, (first, second) in pairs.items():
        if len(first) != len(second):
            raise ValueError(f"{name}: {len(first)} and {len(second)} runs cannot be paired")
        units = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
        groups = None
        if clusters is not None:
            units = np.array(_cluster_means(units.tolist(), clusters[name], str(name)))
            groups = len(units)
        if not np.isfinite(units).all():  # a run diverged, so there is no difference to test
            found[name] = (_NOTHING, math.nan, math.nan, len(first), groups)
            continue
        deviation = float(np.std(units, ddof=1)) if len(units) > 1 else math.nan
        mean = float(units.mean())
        effect = mean / deviation if deviation else (0.0 if mean == 0 else math.copysign(math.inf, mean))
        found[name] = (t_interval(units.tolist()), _sign_flips(units, seed), effect, len(first), groups)
    corrected = holm([p for _, p, _, _, _ in found.values()])
    return {
        name: Difference(mean, p, q, effect, count, groups)
        for (name, (mean, p, effect, count, groups)), q in zip(found.items(), corrected, strict=True)
    }


def _cluster_means(values: Sequence[float], clusters: Sequence[Hashable], where: str) -> list[float]:
    if len(values) != len(clusters):
        raise ValueError(f"{where}: {len(values)} values and {len(clusters)} clusters; give each value its cluster")
    groups: dict[Hashable, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        groups.setdefault(cluster, []).append(value)
    return [math.fsum(group) / len(group) for group in groups.values()]


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
    _check_comparisons("t_interval", comparisons)
    x = np.asarray(values, dtype=np.float64)
    if not np.isfinite(x).all() or not len(x):
        return _NOTHING
    mean = float(x.mean())
    if len(x) < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf(1 - _ALPHA / 2 / comparisons, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return Interval(mean, mean - half, mean + half)


def sign_flip_interval(values: Sequence[float], comparisons: int = 1, *, seed: int = 0) -> Interval:
    """Mean with the interval of all centres that the sign-flip test of the mean does not reject, at 95% together (Bonferroni).

    For a sign vector, the flipped mean of x - c exceeds the mean of x - c exactly if c exceeds the mean of the values that are
    flipped. So the ends are order statistics of the means of subsets (J. A. Hartigan, JASA 64, 1969): of all 2^n - 1 of them up
    to n = 13, else of 9999 random ones, which keeps the test valid (J. Hemerik, J. Goeman, TEST 27, 2018).

    Args:
        values: One value for each independent run, with a distribution that is symmetric about its mean.
        comparisons: Number of intervals of which all are to hold together with a chance of 95% or more.
        seed: Seed of the random subsets.

    Returns:
        The mean with its interval. The ends are infinite where the values are too few for the level; a NaN or infinite value
        makes all three NaN.

    Raises:
        ValueError: If `comparisons` is below 1.

    Examples:
        >>> print(sign_flip_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
        3.500 [1.000, 6.000]
        >>> print(sign_flip_interval([1.0, 2.0, 3.0]))
        2.000 [-inf, inf]
    """
    _check_comparisons("sign_flip_interval", comparisons)
    x = np.asarray(values, dtype=np.float64)
    if not np.isfinite(x).all() or not len(x):
        return _NOTHING
    means = np.sort(_subset_means(x, seed))
    # Of the len(means) + 1 gaps between the subset means, so many are cut off on either side.
    cut = math.floor(_ALPHA / 2 / comparisons * (len(means) + 1) + 1e-9)
    ends = (-math.inf, math.inf) if cut < 1 else (float(means[cut - 1]), float(means[-cut]))
    return Interval(float(x.mean()), *ends)


def _subset_means(x: Floats, seed: int) -> Floats:
    """The means of all subsets that are not empty, or of `RESAMPLES` random ones."""
    if len(x) <= _EXACT_PAIRS:
        chosen = np.array(list(itertools.product((0.0, 1.0), repeat=len(x)))[1:])
        return chosen @ x / chosen.sum(1)
    rng = np.random.default_rng(seed)
    # A random sign vector without a flip ties with the data at every centre, and is drawn with chance 2^-n: it is left out.
    rows = (rng.integers(0, 2, (min(_resamples_at_once(len(x)), left), len(x))) for left in _batches(len(x)))
    return np.concatenate([picked @ x / picked.sum(1) for picked in (r[r.any(1)] for r in rows)])


def _batches(values: int) -> Iterator[int]:
    """How many resamples are left before each batch."""
    return iter(range(RESAMPLES, 0, -_resamples_at_once(values)))


def bounded_interval(values: Sequence[float], lowest: float, highest: float, comparisons: int = 1) -> Interval:
    """Mean with an interval that assumes nothing but a range of the values, at 95% for all together (Bonferroni).

    The upper end is the 97.5% quantile of Σ Dᵢ zᵢ, where z are the values and `highest`, and D is uniform on the simplex
    (Dirichlet with all parameters 1); the lower end is its mirror image (N. Gaffke, 2005; E. Learned-Miller, P. S. Thomas,
    arXiv:1905.06208). For values of 0 and 1 it is the interval of Clopper and Pearson, for equal values v it ends at
    v + (highest - v)·`unseen_share`. That it holds for every distribution on the range is a conjecture without a known
    counter-example; we measure it. The quantile is exact: it inverts the characteristic function of Σ Eᵢ (zᵢ - q) with
    exponential E.

    Args:
        values: One value for each independent run.
        lowest: The smallest value that is possible.
        highest: The largest value that is possible.
        comparisons: Number of intervals of which all are to hold together with a chance of 95% or more.

    Returns:
        The mean with its interval. A NaN or infinite value makes all three NaN.

    Raises:
        ValueError: If a value is outside the range, or `comparisons` is below 1.

    Examples:
        >>> print(bounded_interval([0.0] * 20, -1.0, 1.0))
        0.000 [-0.168, 0.168]
        >>> print(bounded_interval([0.0] * 9 + [1.0], 0.0, 1.0))  # Clopper and Pearson for 1 of 10
        0.100 [0.003, 0.445]
    """
    _check_comparisons("bounded_interval", comparisons)
    x = np.asarray(values, dtype=np.float64)
    if not np.isfinite(x).all() or not len(x):
        return _NOTHING
    if not (lowest <= x.min() and x.max() <= highest):
        raise ValueError(
            f"bounded_interval: values from {x.min():g} to {x.max():g} are outside the range [{lowest:g}, {highest:g}]; give "
            "the smallest and the largest value that are possible"
        )
    tail = _ALPHA / 2 / comparisons
    high = _dirichlet_quantile(np.append(x, highest), tail)
    return Interval(float(x.mean()), 0.0 - _dirichlet_quantile(np.append(-x, -lowest), tail), high)


def _dirichlet_quantile(z: Floats, tail: float) -> float:
    """The q that Σ Dᵢ zᵢ exceeds with chance `tail`, for D uniform on the simplex."""
    low, high = float(z.min()), float(z.max())
    if high - low <= 1e-12 * max(1.0, abs(low), abs(high)):
        return high
    scaled = (z - low) / (high - low)
    # The chance is about 0.5 at the mean. From there the bracket grows in standard deviations of the sum.
    start, step = float(scaled.mean()), 4 * float(scaled.std()) / math.sqrt(len(z) + 1)
    end = min(1.0, start + step)
    while end < 1 and _chance_above(scaled, end) >= tail:
        start, step = end, 2 * step
        end = min(1.0, start + step)
    # At 1 the chance is 0, which the integral does not show: the sum is below 1 there in all but rounding.
    found = _root(lambda q: (_chance_above(scaled, q) if q < 1 else 0.0) - tail, start, end)
    return low + (high - low) * found


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return float(cast(float, optimize.brentq(function, low, high, xtol=1e-9)))


def _chance_above(z: Floats, q: float) -> float:
    """P(Σ Eᵢ (zᵢ - q) > 0) for independent exponential E: ½ + 1/π ∫ Im φ(t) dt/t with φ = Π 1/(1 - i t (zᵢ - q)).

    This is the inversion of the characteristic function (J. Gil-Pelaez, Biometrika 38, 1951). The trapezoidal rule over log t
    converges fast, because the integrand is smooth and vanishes at both ends.
    """
    a = z - q
    first = math.log(1e-8 / float(np.abs(a).sum()))
    last = first
    while float(np.log1p((math.exp(last) * a) ** 2).sum()) < 40:  # |φ| > 2e-9
        last += 1.0
    t = np.exp(np.linspace(first, last, _POINTS))
    product = (1 - 1j * t[:, None] * a).prod(1)
    return 0.5 + float(np.trapezoid((1 / product).imag, dx=(last - first) / (_POINTS - 1))) / math.pi


_POINTS = 300  # 200 are off by up to 1e-6, 800 change the ends of 1000 values in [-1, 1] by less than 1e-10


def unseen_share(runs: int, comparisons: int = 1) -> float:
    """The largest share of failures that so many runs without one allow: m with (1 - m)^runs = 0.025 / comparisons.

    Args:
        runs: Number of independent runs, at least 1.
        comparisons: Number of intervals that hold together.

    Raises:
        ValueError: If a number is below 1.

    Examples:
        >>> round(unseen_share(64), 3), round(unseen_share(192), 3)
        (0.056, 0.019)
    """
    _check_comparisons("unseen_share", comparisons)
    if runs < 1:
        raise ValueError(f"unseen_share: runs must be at least 1, got {runs}")
    return -math.expm1(math.log(_ALPHA / 2 / comparisons) / runs)


def cluster_interval(values: Sequence[float], clusters: Sequence[Hashable], comparisons: int = 1) -> Interval:
    """Student's interval of the cluster means, for runs that share something within a cluster, such as a warmed-up model.

    The mean is over clusters, each of which has one vote, and the degrees of freedom are the clusters less one. So few clusters
    give a wide interval, however many runs each has: that is what they know.

    Args:
        values: One value for each run.
        clusters: The cluster of each run.
        comparisons: Number of intervals of which all are to hold together with a chance of 95% or more.

    Returns:
        The mean with its interval. The ends are NaN with fewer than two clusters.

    Raises:
        ValueError: If the two sequences have different lengths, or `comparisons` is below 1.

    Examples:
        >>> print(cluster_interval([1.0, 1.2, 2.0, 2.2, 3.0, 3.2], "aabbcc"))
        2.100 [-0.384, 4.584]
    """
    return t_interval(_cluster_means(values, clusters, "cluster_interval"), comparisons)


def t_power(pairs: int, deviation: float, effect: float, comparisons: int = 1) -> float:
    """The chance that `t_interval` excludes 0 on the side of the true difference.

    Args:
        pairs: Number of pairs, at least 2.
        deviation: Standard deviation of the paired differences, > 0.
        effect: The true mean difference.
        comparisons: Number of intervals that hold together.

    Examples:
        >>> round(t_power(34, 1.0, 0.5), 2)
        0.81
    """
    freedom = pairs - 1
    critical = float(stats.t.ppf(1 - _ALPHA / 2 / comparisons, freedom))
    shift = abs(effect) / deviation * math.sqrt(pairs)
    if shift > 20 * max(critical, 1.0):  # misses with a chance below 1e-22; scipy has NaN for very large shifts
        return 1.0
    return float(stats.nct.sf(critical, freedom, shift))


def pairs_needed(
    deviation: float, effect: float, comparisons: int = 1, *, power: float = 0.8, reach: float = 0.0
) -> int:
    """The smallest number of pairs that finds a true difference with a chance of `power`.

    With `reach`, what is left of the difference after failures that were not seen, `reach`·`unseen_share`, must be found. This
    is about what `bounded_interval` needs; it is also what it takes to call two arms equivalent.

    Args:
        deviation: Standard deviation of the paired differences.
        effect: The true mean difference, not 0; the smallest effect of interest, as a rule.
        comparisons: Number of intervals that hold together.
        power: The chance.
        reach: How far one failure moves a difference; 0 leaves unseen failures out.

    Raises:
        ValueError: If a number is out of its range.

    Examples:
        >>> pairs_needed(1.0, 0.5), pairs_needed(0.0, 0.02, reach=1.0)
        (34, 183)
    """
    if not (
        deviation >= 0
        and effect != 0
        and 0 < power < 1
        and reach >= 0
        and math.isfinite(deviation + abs(effect) + reach)
    ):
        raise ValueError(
            "pairs_needed: deviation and reach must be at least 0, effect not 0 and power between 0 and 1; got "
            f"deviation={deviation}, effect={effect}, power={power}, reach={reach}"
        )

    def enough(pairs: int) -> bool:
        left = abs(effect) - reach * unseen_share(pairs, comparisons)
        return left > 0 and (deviation == 0 or t_power(pairs, deviation, left, comparisons) >= power)

    high = 2
    while not enough(high):
        high *= 2
    low = max(1, high // 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def smallest_detectable(pairs: int, deviation: float, comparisons: int = 1, *, power: float = 0.8) -> float:
    """The true difference that so many pairs find with a chance of `power`.

    Args:
        pairs: Number of pairs, at least 2.
        deviation: Standard deviation of the paired differences, > 0.
        comparisons: Number of intervals that hold together.
        power: The chance.

    Examples:
        >>> round(smallest_detectable(34, 1.0), 2)
        0.5
    """
    return deviation * _root(lambda effect: t_power(pairs, 1.0, effect, comparisons) - power, 1e-6, 1e3)


def _check_comparisons(name: str, comparisons: int) -> None:
    if comparisons < 1:
        raise ValueError(f"{name}: comparisons must be at least 1, got {comparisons}")


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
