"""The bandit over grids of settings: reuse x rarity, learning rate x width, staleness, δ x cap, and the ease of tuning.

And how far the steps on one rollout really move a rare arm, which no clip bounds.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import bandpo
from bandpo._system.errors import RunError
from bandpo.bounds import Band, Clip
from bandpo.divergences import KL
from bandpo.lab.backends import processes
from bandpo.lab.comparison.exact import Outcome, Tree, run_tree
from bandpo.lab.comparison.own import objective_of, with_definitions
from bandpo.lab.comparison.plan import Arm, cannot_be, has_width, matched, scaled
from bandpo.objective import Objective
from bandpo.statistics import NORMAL_95, Floats, wilson
from bandpo.zoo import OBJECTIVES

RARITIES = (0.1, 0.03, 0.01, 0.003, 0.001)
REUSE = ((1, 1), (1, 4), (2, 4), (4, 8))
RATES = (0.03, 0.1, 0.3, 1.0)
WIDTHS = (0.1, 0.3, 1.0, 3.0)
LAGS = (0, 1, 2, 4)
RADII = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
CAPS = (2.0, 10.0, None)
EPSILONS = (0.05, 0.1, 0.2, 0.4)
TRIALS = (1, 2, 4, 8)
REALISED = ("grpo", "bandpo-kl", "no-clip")
"""The objectives whose realised ratios are measured: a fixed clip, the band, and no region."""
_REALISED_RARITIES, _REALISED_RATES = (0.01, 0.001), (0.03, 0.1, 0.3)
_FEWEST_DRAWN = 5  # seeds that drew the arm; a rarity with fewer has no numbers
_RESAMPLES = 1000  # of the bootstrap over seeds


def bandit(objective: Objective, seeds: int, *, rare: float = 0.01, **changes: Any) -> Outcome:
    """Train on a bandit with a rare best arm. Advantages are standardised for all objectives, so that only the region differs.

    Args:
        objective: The objective.
        seeds: Number of seeds.
        rare: Initial probability of the best arm.
        **changes: Other arguments of `run_tree`.

    Returns:
        The outcome of every seed, on the CPU.
    """
    common = min(0.4, 0.8 - rare)
    outcome = run_tree(
        Tree(rare=rare, common=common), dataclasses.replace(objective, advantage="std"), seeds=seeds, **changes
    )
    return Outcome(*(x.cpu() for x in outcome))


def regimes(names: Sequence[str], seeds: int, device: str = "cpu") -> dict[str, Any]:
    """Share of seeds that commit to the best arm, over its rarity and the reuse of a batch; balls are matched to ε = 0.2.

    Args:
        names: Names of objectives; the first is the baseline.
        seeds: Number of seeds of a cell.
        device: Device of the bandit.

    Returns:
        The axes, the share of each cell under `commit`, and under `against` the paired difference of each objective with the
        baseline, with a normal 95% interval.
    """
    commits: dict[str, Any] = {}
    for name in names:
        objective = objective_of(name)
        ball = isinstance(objective.bounds, Band) and not cannot_be(Arm(name, "matched"))
        objective = matched(objective) if ball else objective
        commits[name] = np.array(
            [
                [
                    bandit(objective, seeds, rare=rare, epochs=k, minibatches=m, device=device).commits.numpy()
                    for rare in RARITIES
                ]
                for k, m in REUSE
            ],
            dtype=float,
        )
    first = commits[names[0]]
    return {
        "rarities": RARITIES,
        "reuse": REUSE,
        "baseline": names[0],
        "commit": {name: c.mean(-1).tolist() for name, c in commits.items()},
        "against": {name: _normal(c - first).tolist() for name, c in commits.items() if name != names[0]},
    }


def planes(names: Sequence[str], seeds: int, device: str = "cpu") -> dict[str, Any]:
    """Mean reward of the batches, over learning rate and multiples of ε or δ, with 2 epochs of 4 mini-batches.

    Args:
        names: Names of objectives.
        seeds: Number of seeds of a cell.
        device: Device of the bandit.

    Returns:
        The axes, and the mean reward of each cell.
    """
    found: dict[str, Any] = {"rates": RATES, "widths": WIDTHS, "value": {}}
    for name in names:
        objective = objective_of(name)
        built = has_width(name) and not any(cannot_be(Arm(name, "tuned", width)) for width in WIDTHS)
        widths = WIDTHS if built else (1.0,)
        found["value"][name] = [
            [bandit(scaled(objective, w), seeds, learning_rate=lr, device=device).value.mean().item() for w in widths]
            for lr in RATES
        ]
    return found


def staleness(names: Sequence[str], seeds: int, device: str = "cpu") -> dict[str, Any]:
    """Commitment and reward with a sampler that is some batches behind the policy.

    Args:
        names: Names of objectives.
        seeds: Number of seeds of a cell.
        device: Device of the bandit.

    Returns:
        The lags, and for each objective the share of seeds that commit and the mean reward at each lag.
    """
    found: dict[str, Any] = {"lags": LAGS, "commit": {}, "value": {}}
    for name in names:
        outcomes = [bandit(objective_of(name), seeds, lag=lag, device=device) for lag in LAGS]
        found["commit"][name] = [o.commits.double().mean().item() for o in outcomes]
        found["value"][name] = [o.value.mean().item() for o in outcomes]
    return found


def radius_and_cap(seeds: int, device: str = "cpu") -> dict[str, Any]:
    """Commitment and reward over the KL band's δ and cap.

    Args:
        seeds: Number of seeds of a cell.
        device: Device of the bandit.

    Returns:
        The axes, and the share of seeds that commit and the mean reward of each cell.
    """
    base = OBJECTIVES["bandpo-kl"]
    cells = [
        [
            bandit(dataclasses.replace(base, bounds=Band(KL, radius, max_ratio=cap)), seeds, device=device)
            for radius in RADII
        ]
        for cap in CAPS
    ]
    return {
        "radii": RADII,
        "caps": CAPS,
        "commit": [[o.commits.double().mean().item() for o in row] for row in cells],
        "value": [[o.value.mean().item() for o in row] for row in cells],
    }


def ease_of_tuning(seeds: int, device: str = "cpu") -> dict[str, Any]:
    """Expected reward of the best of n random settings: one δ of `RADII` against ε low and ε high of `EPSILONS`.

    The interval of the difference is a percentile bootstrap over seeds, which are paired.

    Args:
        seeds: Number of seeds of a setting.
        device: Device of the bandit.

    Returns:
        The numbers n, the expected rewards of both families, and their difference with its interval.
    """
    base = OBJECTIVES["bandpo-kl"]
    families = {
        "δ": [Band(KL, radius, max_ratio=10.0) for radius in RADII],
        "ε low, ε high": [Clip(low, high) for low in EPSILONS for high in EPSILONS],
    }
    values = {
        name: np.array(
            [bandit(dataclasses.replace(base, bounds=b), seeds, device=device).value.numpy() for b in bounds], float
        )
        for name, bounds in families.items()
    }
    draw = np.random.default_rng(0)
    picks = draw.integers(0, seeds, (_RESAMPLES, seeds))
    found: dict[str, Any] = {"trials": TRIALS, "expected": {n: best_of(v.mean(1)) for n, v in values.items()}}
    resampled = np.array(
        [
            np.subtract(best_of(values["δ"][:, pick].mean(1)), best_of(values["ε low, ε high"][:, pick].mean(1)))
            for pick in picks
        ]
    )
    difference = np.subtract(*found["expected"].values())
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    found["difference"] = [list(row) for row in zip(difference.tolist(), low.tolist(), high.tolist(), strict=True)]
    return found


def realised(seeds: int, device: str = "cpu") -> dict[str, Any]:
    """How far the steps on one rollout move a rare arm of the best reward, where the rollout has drawn it.

    The ratio is that of the probability after all steps on the first rollout to the one before. A clip stops the gradient of a
    token's own term beyond its edge; the step that crosses the edge, momentum, and the terms of other tokens are free.

    Args:
        seeds: Number of seeds of a setting; those that do not draw the arm are left out.
        device: Device of the bandit.

    Returns:
        The axes (`rarities`, `rates`, `reuse`), the number of seeds that drew the arm, the `edge` of each objective at each
        rarity, and by objective, rarity, rate and reuse the median, the 95% quantile and the share (with Wilson's interval) of
        ratios beyond the fixed clip's edge. `against` has the mean difference of the log-ratio from the clip's on the same
        seeds, with a normal 95% interval. A rarity that fewer than five seeds drew is left out; empty if none is left.
    """
    first = {
        rare: bandit(OBJECTIVES["grpo"], seeds, rare=rare, batches=1, device=device) for rare in _REALISED_RARITIES
    }
    rarities = [rare for rare, outcome in first.items() if (outcome.discovery == 0).sum() >= _FEWEST_DRAWN]
    if not rarities:
        return {}
    ratios = {name: [_ratios_of(OBJECTIVES[name], seeds, rare, device) for rare in rarities] for name in REALISED}
    clip = OBJECTIVES["grpo"].bounds
    assert isinstance(clip, Clip) and clip.high is not None
    limit = 1 + clip.high + 1e-6  # the rounding of a softmax in float32
    old = torch.tensor(rarities, dtype=torch.float64).log()
    return {
        "rarities": rarities,
        "rates": _REALISED_RATES,
        "reuse": REUSE,
        "seeds": seeds,
        "drawn": [r.shape[-1] for r in ratios["grpo"]],
        "edge": {name: OBJECTIVES[name].bounds(old).upper.tolist() for name in REALISED},  # type: ignore[union-attr]
        "median": {name: [np.median(r, -1).tolist() for r in found] for name, found in ratios.items()},
        "high": {name: [np.quantile(r, 0.95, -1).tolist() for r in found] for name, found in ratios.items()},
        "beyond": {name: [_shares(r > limit) for r in found] for name, found in ratios.items()},
        "against": {
            name: [_normal(np.log(r / c)).tolist() for r, c in zip(ratios[name], ratios["grpo"], strict=True)]
            for name in REALISED[1:]
        },
        "versions": f"bandpo {bandpo.__version__}, torch {torch.__version__}",
    }


def _ratios_of(objective: Objective, seeds: int, rare: float, device: str) -> Floats:
    """The realised ratio of the rare arm, `(rates, reuse, seeds that drew it)`."""
    cells: list[list[Floats]] = []
    for rate in _REALISED_RATES:
        outcomes = [
            bandit(objective, seeds, rare=rare, batches=1, learning_rate=rate, epochs=k, minibatches=m, device=device)
            for k, m in REUSE
        ]
        cells.append([(o.curve[0].double() / rare)[o.discovery == 0].numpy() for o in outcomes])
    return np.array(cells)


def _shares(beyond: Any) -> list[list[list[float]]]:
    """The share of each cell with Wilson's interval, over the last axis."""
    count = beyond.shape[-1]
    return [[[cell.sum() / count, *wilson(int(cell.sum()), count)] for cell in row] for row in beyond]


def _normal(differences: Floats) -> Floats:
    """The mean and the normal 95% interval over the last axis, `(..., 3)`."""
    mean = differences.mean(-1)
    half = NORMAL_95 * differences.std(-1, ddof=1) / np.sqrt(differences.shape[-1])
    return np.stack([mean, mean - half, mean + half], -1)


def best_of(values: Floats) -> list[float]:
    """Expected best of n settings drawn with replacement, for each n in `TRIALS`: Σ v₍ᵢ₎ ((i/N)ⁿ - ((i-1)/N)ⁿ).

    This is the mean of the largest order statistic of n draws from the N values.

    Args:
        values: `(N,)`, the value of each setting.

    Returns:
        The expected best for each n.

    Examples:
        >>> import numpy as np
        >>> best_of(np.array([0.0, 1.0]))
        [0.5, 0.75, 0.9375, 0.99609375]
    """
    ordered, count = np.sort(values), len(values)
    share = np.arange(count + 1) / count
    return [float((ordered * np.diff(share**n)).sum()) for n in TRIALS]


def sweep(names: Sequence[str], seeds: int, workers: int = 1, device: str = "cpu") -> dict[str, Any]:
    """Run all five sweeps, in parallel.

    Args:
        names: Names of objectives, or import paths of own ones, with a token ratio and without extra inputs; the first is the
            baseline.
        seeds: Number of seeds of a cell.
        workers: Number of processes.
        device: Device of the bandit.

    Returns:
        The result of each sweep by its name.

    Raises:
        RunError: If a sweep failed.
    """
    parts: list[tuple[str, tuple[Any, ...]]] = [  # the longest first, so that no worker waits at the end
        ("regimes", (names, seeds, device)),
        ("planes", (names, seeds, device)),
        ("staleness", (names, seeds, device)),
        ("tuning", (seeds, device)),
        ("radius and cap", (seeds, device)),
    ]
    found: dict[str, Any] = {}
    for (name, _), made in processes(parts, with_definitions(_part, names), workers):
        if isinstance(made, Exception):
            raise RunError(f"the sweep {name!r} of the bandit failed: {made}") from made
        found[name] = made
    return {"seeds": seeds, **{name: found[name] for name, _ in parts}}


def _part(part: tuple[str, tuple[Any, ...]]) -> dict[str, Any]:
    torch.set_num_threads(1)
    name, arguments = part
    makers: dict[str, Callable[..., dict[str, Any]]] = {
        "regimes": regimes,
        "planes": planes,
        "staleness": staleness,
        "tuning": ease_of_tuning,
        "radius and cap": radius_and_cap,
    }
    return makers[name](*arguments)
