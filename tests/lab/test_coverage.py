"""The coverage of the intervals in the designs of our studies, and the error rates of the verdicts.

    python tests/lab/test_coverage.py            # the full table: more samples, more sizes; about 15 minutes on one core

The tests use fewer samples with fixed seeds, and bounds that are 3 standard errors below what is asked.
"""

import math
import sys
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from bandpo.statistics import (
    Interval,
    _chance_above,
    bounded_interval,
    cluster_interval,
    interval,
    pairs_needed,
    sign_flip_interval,
    t_interval,
    t_power,
    verdict,
)

Draw = Callable[[np.random.Generator, int], np.ndarray]


def failures(share: float, size: float = 1.0, noise: float = 0.0) -> tuple[Draw, float]:
    """Differences of 0, but -size in a share of the runs, as where one arm sometimes finds nothing."""

    def draw(rng: np.random.Generator, n: int) -> np.ndarray:
        return -size * (rng.random(n) < share) + noise * rng.standard_normal(n)

    return draw, -share * size


def designs() -> dict[str, tuple[Draw, float]]:
    """Paired differences in [-1, 1], with their mean."""

    def ties(rng: np.random.Generator, n: int) -> np.ndarray:
        return np.round(rng.normal(0, 0.05, n) * 16) / 16

    def both(rng: np.random.Generator, n: int) -> np.ndarray:
        return rng.choice([-1.0, 0.0, 1.0], n, p=[0.05, 0.9, 0.05])

    def modes(rng: np.random.Generator, n: int) -> np.ndarray:
        """pass@16 of policies that keep one, two or three of the good options, against one that keeps one."""
        return rng.choice([0.0, 0.25, 0.5], n, p=[0.3, 0.4, 0.3])

    return {
        "normal, sd 0.1": (lambda rng, n: rng.normal(0.02, 0.1, n), 0.02),
        "skewed (exponential), sd 0.1": (lambda rng, n: np.minimum(0.1 * rng.exponential(1, n), 1), 0.1),
        "skewed (gamma 4), sd 0.1": (lambda rng, n: np.minimum(0.05 * rng.gamma(4, 1, n), 1), 0.2),
        **{f"failures in {p:.0%}": failures(p) for p in (0.01, 0.02, 0.05, 0.1, 0.25, 0.5)},
        "failures of 0.8 in 3%, others normal, sd 0.02": failures(0.03, 0.8, 0.02),
        "±1 in 5% each": (both, 0.0),
        "heavy ties": (ties, 0.0),
        "three modes": (modes, 0.25),
    }


def inside(found: Interval, mean: float) -> bool:
    return found.low - 1e-12 <= mean <= found.high + 1e-12


def bounded_contains(x: np.ndarray, mean: float, comparisons: int = 1) -> bool:
    """Whether `bounded_interval` on [-1, 1] contains the mean, without a search for its ends."""
    tail = 0.025 / comparisons
    return all(
        side == end or _chance_above(np.append(sign * x, 1.0), side) >= tail
        for sign, side, end in ((1, mean, -1.0), (-1, -mean, -1.0))
    )


METHODS: dict[str, Callable[[np.ndarray, float, int], bool]] = {
    "t": lambda x, mean, c: inside(t_interval(x.tolist(), c), mean),
    "sign flips": lambda x, mean, c: inside(sign_flip_interval(x.tolist(), c), mean),
    "bounded": bounded_contains,
    "BCa": lambda x, mean, c: inside(interval(x.tolist(), np.mean), mean),
}
"""Whether an interval contains the mean, by method."""

HOLDS_IN = {
    "t": ("normal, sd 0.1", "skewed (gamma 4), sd 0.1", "heavy ties", "three modes", "±1 in 5% each"),
    "bounded": tuple(designs()),
}
"""The designs in which the report uses an interval."""


def coverage(name: str, method: str, n: int, samples: int, comparisons: int = 1) -> float:
    """The share of samples in which all of so many independent intervals contain the mean."""
    draw, mean = designs()[name]
    rng = np.random.default_rng(n)
    good = 0
    for _ in range(samples):
        good += all(METHODS[method](draw(rng, n), mean, comparisons) for _ in range(comparisons))
    return good / samples


def at_least(share: float, samples: int) -> float:
    """What a share of so many samples is above, up to 3 standard errors."""
    return share - 3 * math.sqrt(share * (1 - share) / samples)


@pytest.mark.parametrize("name", HOLDS_IN["t"])
@pytest.mark.parametrize("n", [20, 64])
def test_students_interval_covers_where_the_report_uses_it(name: str, n: int) -> None:
    assert coverage(name, "t", n, 2000) >= at_least(0.93, 2000)


@pytest.mark.parametrize("name", HOLDS_IN["bounded"])
def test_the_bounded_interval_covers_in_every_design(name: str) -> None:
    for n in (20, 192):
        assert coverage(name, "bounded", n, 500) >= at_least(0.95, 500)


def test_intervals_that_hold_together() -> None:
    assert coverage("normal, sd 0.1", "t", 24, 1000, comparisons=5) >= at_least(0.95, 1000)
    assert coverage("failures in 2%", "bounded", 64, 300, comparisons=5) >= at_least(0.95, 300)


def test_students_interval_misses_rare_failures_which_is_why_forks_have_the_bounded_one() -> None:
    assert coverage("failures in 1%", "t", 64, 1000) < 0.6
    assert coverage("failures in 5%", "t", 64, 1000) < 0.9
    assert coverage("failures in 1%", "sign flips", 64, 200) < 0.6


def in_clusters(rng: np.random.Generator, clusters: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Values with an intra-class correlation of 0.5."""
    labels = np.repeat(np.arange(clusters), each)
    return rng.standard_normal(clusters)[labels] + rng.standard_normal(clusters * each), labels


def cluster_coverage(clusters: int, each: int, samples: int) -> dict[str, float]:
    rng = np.random.default_rng(clusters)
    good = {"t": 0, "clusters": 0}
    for _ in range(samples):
        x, labels = in_clusters(rng, clusters, each)
        for name, found in (("t", t_interval(x.tolist())), ("clusters", cluster_interval(x.tolist(), labels.tolist()))):
            good[name] += found.low <= 0 <= found.high
    return {name: count / samples for name, count in good.items()}


@pytest.mark.parametrize(("clusters", "each"), [(3, 10), (20, 3)])
def test_the_cluster_interval_covers_where_runs_share_a_warm_up(clusters: int, each: int) -> None:
    found = cluster_coverage(clusters, each, 3000)
    assert found["clusters"] >= at_least(0.95, 3000)
    assert found["t"] < 0.87  # three warm-ups for 30 runs: less than two thirds


def test_the_cluster_interval_holds_with_clusters_of_unequal_size() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(8), [1, 2, 3, 4, 5, 6, 7, 8])
    good = 0
    for _ in range(2000):
        x = rng.standard_normal(8)[labels] + rng.standard_normal(len(labels))
        found = cluster_interval(x.tolist(), labels.tolist())
        good += found.low <= 0 <= found.high
    assert good / 2000 >= at_least(0.95, 2000)


def test_the_coverage_is_that_of_the_interval_itself() -> None:
    rng = np.random.default_rng(8)
    for name, (draw, mean) in designs().items():
        x = draw(rng, 20)
        found = bounded_interval(x.tolist(), -1.0, 1.0, 2)
        assert bounded_contains(x, mean, 2) == inside(found, mean), name
        for side in (-1e-4, 1e-4):
            for end in (found.low, found.high):
                assert bounded_contains(x, end + side, 2) == inside(found, end + side), name


def test_the_bounded_interval_is_that_of_clopper_and_pearson_for_zeros_and_ones() -> None:
    for n, k in ((20, 0), (20, 20), (64, 1), (192, 30)):
        found = bounded_interval([1.0] * k + [0.0] * (n - k), 0.0, 1.0, 3)
        tail = 0.025 / 3
        low = stats.beta.ppf(tail, k, n - k + 1) if k else 0.0
        high = stats.beta.isf(tail, k + 1, n - k) if k < n else 1.0
        assert found == pytest.approx((k / n, low, high), abs=1e-7)


def test_the_bounded_interval_is_the_quantile_of_dirichlet_sums() -> None:
    rng = np.random.default_rng(1)
    x = rng.beta(2, 3, 12)
    sums = rng.dirichlet(np.ones(13), 400_000)
    found = bounded_interval(x.tolist(), 0.0, 1.0)
    # P(sum > end) is 0.025, up to 4 standard errors of the sampling.
    error = 4 * math.sqrt(0.025 * 0.975 / 400_000)
    assert np.mean(sums @ np.append(x, 1.0) > found.high) == pytest.approx(0.025, abs=error)
    assert np.mean(sums @ np.append(x, 0.0) < found.low) == pytest.approx(0.025, abs=error)


def test_the_sign_flip_interval_inverts_the_test() -> None:
    """Centres inside are not rejected by the test of all sign flips, and centres outside are."""
    rng = np.random.default_rng(2)
    x = rng.normal(0.3, 1.0, 9)
    signs = 1 - 2 * ((np.arange(2**9)[:, None] >> np.arange(9)) & 1)

    def p_value(centre: float) -> float:
        sums = signs @ (x - centre)
        return float(min(1.0, 2 * min(np.mean(sums >= sums[0] - 1e-12), np.mean(sums <= sums[0] + 1e-12))))

    found = sign_flip_interval(x.tolist())
    for end, outwards in ((found.low, -1), (found.high, 1)):
        assert p_value(end + outwards * 1e-6) < 0.05 <= p_value(end - outwards * 1e-6) + 2 / 2**9
    inside = np.linspace(found.low + 1e-6, found.high - 1e-6, 50)
    assert all(p_value(c) >= 0.05 - 1e-12 for c in inside)
    assert sign_flip_interval((x + 5).tolist()) == pytest.approx([v + 5 for v in found])


@pytest.mark.parametrize("n", [20, 64])
def test_the_sign_flip_interval_covers_symmetric_designs(n: int) -> None:
    for name in ("normal, sd 0.1", "heavy ties", "±1 in 5% each"):
        assert coverage(name, "sign flips", n, 300) >= at_least(0.95, 300)


VERDICTS = {"better": 0.05, "worse": -0.05, "equivalent": 0.0}
"""True differences with a standard deviation of 0.02, so that 48 pairs decide; the smallest effect is 0.02."""


@pytest.mark.parametrize("truth", VERDICTS)
def test_verdicts_find_what_is_there(truth: str) -> None:
    rng = np.random.default_rng(3)
    found = [verdict(t_interval(rng.normal(VERDICTS[truth], 0.02, 48).tolist()), 0.02) for _ in range(1000)]
    assert found.count(truth) >= 990  # by the noncentral t, more than 0.999 are right


def test_verdicts_are_undecided_with_too_few_pairs_and_symmetric() -> None:
    rng = np.random.default_rng(4)
    draws = rng.normal(0.0, 0.1, (2000, 20))
    found = [verdict(t_interval(x.tolist()), 0.02) for x in draws]
    turned = [verdict(t_interval((-x).tolist()), 0.02) for x in draws]
    swap = {"better": "worse", "worse": "better"}
    assert [swap.get(x, x) for x in found] == turned
    wrong = sum(x in swap for x in found) / 2000
    assert wrong <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000) and found.count("undecided") > 0.9 * 2000


def test_a_difference_as_large_as_the_smallest_effect_is_seldom_called_equivalent() -> None:
    rng = np.random.default_rng(5)
    for mean in (0.02, -0.02):
        found = [verdict(t_interval(rng.normal(mean, 0.02, 48).tolist()), 0.02) for _ in range(2000)]
        assert found.count("equivalent") / 2000 <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / 2000)


@pytest.mark.parametrize("comparisons", [1, 5])
def test_the_calculated_number_of_pairs_has_the_power(comparisons: int) -> None:
    n = pairs_needed(0.1, 0.04, comparisons)
    rng = np.random.default_rng(6)
    found = [t_interval(rng.normal(0.04, 0.1, n).tolist(), comparisons).low > 0 for _ in range(4000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.02 + 3 * math.sqrt(0.16 / 4000))


def test_differences_that_hardly_spread_need_as_many_pairs_as_those_that_do_not():
    """With a spread of rounding errors scipy has no power, and without care the search for the pairs would never end."""
    assert pairs_needed(4.7e-13, 0.03, reach=1.0) == pairs_needed(0.0, 0.03, reach=1.0)
    assert pairs_needed(1e-300, 0.02) == 2
    powers = [t_power(12, 1.0, effect) for effect in np.geomspace(1e-3, 1e12, 200)]
    assert powers == sorted(powers) and powers[-1] == 1.0


def test_the_pairs_that_unseen_failures_need_decide_equal_arms() -> None:
    n = pairs_needed(0.0, 0.02, reach=1.0)
    assert verdict(bounded_interval([0.0] * n, -1.0, 1.0), 0.02) == "equivalent"
    assert verdict(bounded_interval([0.0] * (n - 1), -1.0, 1.0), 0.02) == "undecided"


def test_the_pairs_that_unseen_failures_need_have_the_power() -> None:
    """An approximation, so the power is asked to be at least 0.8 and may be higher."""
    n = pairs_needed(0.05, 0.04, reach=1.0)
    rng = np.random.default_rng(7)
    found = [bounded_interval(rng.normal(0.04, 0.05, n).tolist(), -1.0, 1.0).low > 0 for _ in range(100)]
    assert np.mean(found) >= at_least(0.8, 100)


def table(samples: int) -> None:
    """Print the coverage of all intervals in all designs."""
    print(f"| design | runs | {' | '.join(METHODS)} |\n|---|---|{'---|' * len(METHODS)}")
    for name in designs():
        for n in (10, 20, 64, 192):
            many = {"t": samples, "sign flips": samples // 4, "bounded": samples // 4, "BCa": samples // 16}
            cells = [f"{coverage(name, m, n, many[m]):.3f}" for m in METHODS]
            print(f"| {name} | {n} | {' | '.join(cells)} |", flush=True)
    for clusters, each in ((3, 10), (3, 4), (20, 1), (20, 3)):
        found = cluster_coverage(clusters, each, samples)
        print(f"intra-class correlation 0.5, {clusters} clusters of {each}: {found}", flush=True)


if __name__ == "__main__":
    table(int(sys.argv[1]) if len(sys.argv) > 1 else 4000)
