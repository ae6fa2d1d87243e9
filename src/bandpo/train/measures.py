"""mean@k, pass@k and maj@k of an evaluation, each with its interval over the prompts, and their paired differences."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from bandpo.metrics import pass_at_k
from bandpo.statistics import Interval, interval

RIGHT_FROM = 0.5
"""The reward from which on a sample counts as right."""

MOST_VOTERS = 64
"""Largest k of maj@k, besides the number of samples itself: the exact expectation takes time that grows with k."""


@dataclass(frozen=True)
class Tally:
    """What the samples of one prompt scored; samples without a score are left out.

    Args:
        mean: Mean reward; NaN if no sample has a score.
        samples: Number of samples with a score, n.
        right: Number of samples whose reward is at least 0.5, c.
        votes: For each distinct answer, how many samples gave it, and the share of these that are right. Samples without an
            answer are not counted. None where the reward has no answers to vote by.
    """

    mean: float
    samples: int
    right: int
    votes: tuple[tuple[int, float], ...] | None = None


def tally(rewards: Sequence[float], answers: Sequence[str | None] | None = None) -> Tally:
    """Count the samples of one prompt.

    Args:
        rewards: Reward of each sample; NaN where it has none.
        answers: Answer of each sample; None where it states none. None for all where there is nothing to vote by.

    Returns:
        The counts.

    Examples:
        >>> tally([1.0, 0.0, 1.0, 0.0, math.nan], ["7", "8", "7", None, "9"])
        Tally(mean=0.5, samples=4, right=2, votes=((2, 1.0), (1, 0.0)))
    """
    scored = [i for i, reward in enumerate(rewards) if not math.isnan(reward)]
    right = [i for i in scored if rewards[i] >= RIGHT_FROM]
    mean = math.fsum(rewards[i] for i in scored) / len(scored) if scored else math.nan
    votes = None
    if answers is not None:
        counts, good = (Counter(answers[i] for i in places if answers[i] is not None) for places in (scored, right))
        votes = tuple(sorted(((n, good[a] / n) for a, n in counts.items()), reverse=True))
    return Tally(mean, len(scored), len(right), votes)


def sizes(samples: int) -> list[int]:
    """The k of pass@k: 1, 2, 4 ... and the number of samples.

    Args:
        samples: Number of samples of each prompt.

    Examples:
        >>> sizes(8), sizes(6)
        ([1, 2, 4, 8], [1, 2, 4, 6])
    """
    return sorted({*(1 << i for i in range(samples.bit_length())), samples})


def majority_at_k(votes: Sequence[tuple[int, float]], n: int, k: int) -> float:
    r"""maj@k of one prompt: how often the most frequent answer among k of its n samples is right.

    It is the exact expectation over the subsets of k samples, which are drawn without replacement, each equally likely:

        maj@k = E_S [ sum over the most frequent answers a in S of right(a) / (number of the most frequent answers in S) ],

    so a tie is decided by chance. Samples without an answer are drawn as the others are, and do not vote; a subset without a
    vote counts as wrong. For k = n there is one subset, all samples.

    Args:
        votes: For each distinct answer, how many of the n samples gave it, and the share of these that are right.
        n: Number of samples, those without an answer among them.
        k: Number of samples that vote, `1 <= k <= n`.

    Returns:
        The expectation, between 0 and 1.

    Raises:
        ValueError: If k is not in `[1, n]`, or there are more votes than samples.

    Examples:
        >>> majority_at_k([(2, 1.0), (1, 0.0)], 3, 3), round(majority_at_k([(2, 1.0), (1, 0.0)], 3, 1), 4)
        (1.0, 0.6667)
        >>> majority_at_k([(2, 1.0), (2, 0.0)], 5, 5)
        0.5
    """
    if not 1 <= k <= n:
        raise ValueError(f"majority_at_k: k must be between 1 and the number of samples n={n}, got k={k}")
    if sum(count for count, _ in votes) > n:
        raise ValueError(f"majority_at_k: {sum(count for count, _ in votes)} votes of n={n} samples")
    return _majority(tuple(sorted(votes, reverse=True)), n, k)


@lru_cache(maxsize=1 << 14)
def _majority(votes: tuple[tuple[int, float], ...], n: int, k: int) -> float:
    if k == n:
        winners = [right for count, right in votes if count == votes[0][0]]
        return sum(winners) / len(winners) if winners else 0.0
    counts = [count for count, _ in votes]
    return float(
        sum(
            right * _wins(count, (*counts[:i], *counts[i + 1 :]), n, k)
            for i, (count, right) in enumerate(votes)
            if right
        )
    )


@lru_cache(maxsize=1 << 14)
def _wins(count: int, others: tuple[int, ...], n: int, k: int) -> float:
    """The probability that an answer wins among k of n samples, where a tie of j answers counts as 1/j.

    The numbers of samples of each answer in the subset are multivariate hypergeometric: independent binomials, given that their
    sum is k. So the binomials are convolved, up to t for each other answer where this one has t. A tie with j others counts
    1/(1 + j), which is the integral of y^j over [0, 1]: each tied answer is multiplied by y, and the polynomial in y integrated
    by Gauss-Legendre quadrature, which is exact. With more than half of the votes nothing else can tie.
    """
    found = float(stats.hypergeom.sf(k // 2, n, count, k))
    silent = n - count - sum(others)
    for t in range(1, min(count, k // 2) + 1):
        left = k - t
        strong = [m for m in others if m >= t]
        weak = _binomial(silent + sum(m for m in others if m < t), n, k)
        y, weights = np.polynomial.legendre.leggauss(min(len(strong), left // t) // 2 + 1)
        y, weights = (y + 1) / 2, weights / 2
        sums = np.zeros((len(y), left + 1))
        sums[:, : len(weak)] = weak[: left + 1]
        for m in strong:
            share, new = _binomial(m, n, k), np.zeros_like(sums)
            for s in range(min(t, left) + 1):
                tied = y[:, None] if s == t else 1.0
                new[:, s:] += share[s] * tied * sums[:, : left + 1 - s]
            sums = new
        found += float(_binomial(count, n, k)[t] * (weights @ sums[:, left]) / _binomial(n, n, k)[k])
    return found


@lru_cache(maxsize=1 << 12)
def _binomial(m: int, n: int, k: int) -> NDArray[np.float64]:
    """Probabilities of 0 ... m among m samples, each taken with probability k / n."""
    return cast("NDArray[np.float64]", stats.binom.pmf(np.arange(m + 1), m, k / n))


@lru_cache(maxsize=1 << 12)
def _pass_table(n: int, k: int) -> list[float]:
    """pass@k for 0 ... n right samples of n."""
    return cast("list[float]", pass_at_k(n, torch.arange(n + 1), k).tolist())


def by_prompt(tallies: Sequence[Tally], samples: int) -> dict[str, list[float]]:
    """mean@k, pass@k and maj@k of each prompt.

    Args:
        tallies: The prompts.
        samples: Number of samples of each prompt, also of those with fewer scores.

    Returns:
        For `mean@samples`, `pass@1`, `pass@2` ..., `maj@1`, `maj@2` ...: one value for each prompt, NaN where it has too few
        samples with a score. maj@k is absent where the prompts have no votes.
    """
    found = {f"mean@{samples}": [t.mean for t in tallies]}
    for k in sizes(samples):
        found[f"pass@{k}"] = [_pass_table(t.samples, k)[t.right] if t.samples >= k else math.nan for t in tallies]
    if all(t.votes is not None for t in tallies):
        for k in (k for k in sizes(samples) if k <= MOST_VOTERS or k == samples):
            found[f"maj@{k}"] = majority(tallies, k)
    # Values that are equal have to be so to the last digit: a bootstrap counts how many resamples are below the estimate.
    return {name: [round(value, 12) for value in values] for name, values in found.items()}


def majority(tallies: Sequence[Tally], k: int) -> list[float]:
    """maj@k of each prompt, as in `majority_at_k`; NaN where it has too few samples with a score.

    Args:
        tallies: The prompts, with votes.
        k: Number of samples that vote.
    """
    return [majority_at_k(t.votes or (), t.samples, k) if t.samples >= k else math.nan for t in tallies]


def estimates(values: Mapping[str, Sequence[float]]) -> dict[str, Interval]:
    """The mean of each measure over the prompts, with its 95% interval (BCa bootstrap of the prompts).

    Args:
        values: What `by_prompt` returns; prompts with NaN are left out of that measure.

    Returns:
        The estimates; NaN where no prompt has a value, and no ends of the interval with fewer than three prompts.

    Examples:
        >>> estimates({"pass@1": [0.0, 1.0, math.nan]})["pass@1"].value
        0.5
    """
    return {name: _mean([v for v in each if not math.isnan(v)]) for name, each in values.items()}


def differences(first: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> dict[str, Interval]:
    """The mean change of each measure from one evaluation to another, paired by prompt, with its 95% interval.

    The changes of the prompts are resampled (BCa bootstrap). So the interval has the noise of prompts and samples, and not that
    of other seeds of training.

    Args:
        first: What `by_prompt` returns for the evaluation to compare with.
        other: The same for the other evaluation, of the same prompts in the same order.

    Returns:
        other - first of each measure that both have; prompts with NaN in either are left out.

    Raises:
        ValueError: If the evaluations have different numbers of prompts.
    """
    found: dict[str, Interval] = {}
    for name in (name for name in first if name in other):
        if len(first[name]) != len(other[name]):
            raise ValueError(f"{name}: {len(first[name])} and {len(other[name])} prompts cannot be paired")
        changes = [b - a for a, b in zip(first[name], other[name], strict=True)]
        found[name] = _mean([c for c in changes if not math.isnan(c)])
    return found


def _mean(values: list[float]) -> Interval:
    return interval(values, np.mean) if values else Interval(math.nan, math.nan, math.nan)
