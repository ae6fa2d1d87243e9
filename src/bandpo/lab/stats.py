"""Statistics of paired runs: interquartile means with BCa intervals, permutation tests, Holm's correction, effect sizes."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
RESAMPLES = 9999
Key = TypeVar("Key")


class Interval(NamedTuple):
    """An estimate and its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Difference(NamedTuple):
    """A paired comparison with a baseline."""

    mean: Interval
    p: float
    """Two-sided permutation test of the paired differences, before correction."""
    p_holm: float
    """After Holm's correction over the comparisons made together."""
    effect: float
    """Mean difference over the standard deviation of the differences (Cohen's d for pairs)."""
    pairs: int


def iqm(values: Sequence[float] | Floats, axis: int = -1) -> Any:
    """Interquartile mean: the mean of the middle half (Agarwal et al., arXiv:2108.13264); NaN if a value is no number.

    Examples:
        >>> float(iqm([0.0, 1.0, 2.0, 100.0]))
        1.5
    """
    x = np.asarray(values, dtype=np.float64)
    # Trimming would cut NaN off as if it were a large value, and infinities too.
    return np.where(np.isfinite(x).all(axis), stats.trim_mean(x, 0.25, axis=axis), np.nan)[()]


def interval(values: Sequence[float], statistic: Callable[..., Any] = iqm, *, seed: int = 0) -> Interval:
    """Estimate with a BCa bootstrap interval at 95%; the interval is the point itself where all values agree.

    One value that is no number makes all three NaN: a run that diverged is not averaged away.

    Args:
        values: One for each run.
        statistic: Takes an array and `axis`.
        seed: Of the resampling.
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
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # the caller takes another method then
        found = stats.bootstrap(
            (x,), statistic, n_resamples=RESAMPLES, method=method, rng=np.random.default_rng(seed), vectorized=True
        ).confidence_interval
    return float(found.low), float(found.high)


def compare(results: Mapping[str, Sequence[float]], baseline: str, *, seed: int = 0) -> dict[str, Difference]:
    """Every arm against a baseline, run by run: the same place in two sequences is the same seed and warm-up.

    Args:
        results: Values of each arm, in the same order of runs.
        baseline: The arm to compare with.
        seed: Of the resampling.

    Raises:
        ValueError: If the arms have different numbers of runs, or the baseline is missing.
    """
    if baseline not in results:
        raise ValueError(f"baseline {baseline!r} is not among {', '.join(results)}")
    return paired({name: (results[name], results[baseline]) for name in results if name != baseline}, seed=seed)


def paired(pairs: Mapping[Key, tuple[Sequence[float], Sequence[float]]], *, seed: int = 0) -> dict[Key, Difference]:
    """Differences first - second of pairs of arms, corrected together.

    The test flips the signs of the differences: all 2^n ways up to n = 13, else 9999 random ones (scipy's permutation_test).

    Args:
        pairs: Values of two arms, in the same order of runs.
        seed: Of the resampling.

    Raises:
        ValueError: If two arms have different numbers of runs.
    """
    found: dict[Key, tuple[Interval, float, float, int]] = {}
    for name, (first, second) in pairs.items():
        if len(first) != len(second):
            raise ValueError(f"{name}: {len(first)} and {len(second)} runs cannot be paired")
        difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
        count = len(difference)
        if not np.isfinite(difference).all():  # a run diverged: there is no difference to test
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


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction. A test without a p-value (NaN) stays without, and counts as one that was made.

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


def best_of_bootstrap(rewards: Floats, k: int, *, draws: int = 1000, seed: int = 42) -> float:
    """`best@k` as in BandPO's official logs: the mean over `draws` of the best of k samples drawn *with* replacement.

    Not pass@k: one right sample of 32 scores 0.64 at k = 32 and not 1. For comparison with those logs only.

    Args:
        rewards: `(prompts, samples)`.
        k: Samples of each draw.
        draws: Bootstrap draws for each prompt.
        seed: Of the draws.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, rewards.shape[1], (draws, k))
    return float(rewards[:, chosen].max(-1).mean())


def _sign_flips(difference: Floats, seed: int) -> float:
    if not difference.any():
        return 1.0
    if len(difference) < 2:
        return math.nan
    return float(
        stats.permutation_test(
            (difference,),
            lambda x, axis: x.mean(axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=9999 if len(difference) > 13 else 2**13,
            rng=np.random.default_rng(seed),
        ).pvalue
    )


def number(value: float | None, form: str = ".3f") -> str:
    """A number for a table; a dash where there is none, as the interval of two runs.

    Examples:
        >>> number(0.25), number(None), number(math.nan)
        ('0.250', '–', '–')
    """
    return "–" if value is None or math.isnan(value) else format(value, form)
