"""What the runs of a study say: paired differences with intervals that hold together, and verdicts by one rule."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch

from bandpo.lab.forks.policy import Fork
from bandpo.lab.forks.regimes import ARMS, BASELINE, DRIFT, NOISE, PEAK
from bandpo.lab.forks.theory import along_own_gradient, entropy, free_drift, neutral_upper, one_token_drift, reach
from bandpo.lab.forks.training import MOVES, RARE, TRACKED
from bandpo.lab.forks.widths import SHARE, TRIALS, width_values
from bandpo.statistics import Interval, bounded_interval, t_interval, verdict

SMALLEST: Mapping[str, float] = {"mean": 0.02, "passed": 0.03, "entropy": 0.1, "speed": 0.02, "right": 0.02}
"""The smallest effect of interest of each measure, set by hand; entropy in nats, the others as shares."""

SMALLEST_MOVES: Mapping[str, float] = {"moved_up": 0.05, "moved_down": 0.05, "beyond_up": 0.05, "beyond_down": 0.05}
"""The same for how far updates move rare tokens: nats of the log-ratio, and shares."""

SMALLEST_WIDTHS: Mapping[str, float] = {"area": 0.05, "best": 0.02}
"""The same for the study of widths, as shares."""

_SMALLEST = {**SMALLEST, **SMALLEST_MOVES, **SMALLEST_WIDTHS}

HALVES = (("bandpo-kl-upper", "bandpo-kl"), ("bandpo-kl-upper", "bandpo-kl-lower"), ("bandpo-kl-lower", "bandpo-kl"))
"""Pairs of arms that are compared beside the differences from the baseline."""

_DIGITS = 5


def pairs_of(arms: Sequence[str]) -> list[tuple[str, str]]:
    """The comparisons of a set of arms: each arm with the baseline, and the halves.

    Args:
        arms: Names of the arms.
    """
    found = [(arm, BASELINE) for arm in arms if arm != BASELINE]
    return [*found, *((a, b) for a, b in HALVES if a in arms and b in arms)]


def range_of(regime: str | None, measure: str) -> tuple[float, float] | None:
    """The smallest and the largest value that a measure can have; None where it has no end.

    Args:
        regime: A name in `REGIMES`; None for a problem of the map.
        measure: A name in `SMALLEST`, `SMALLEST_MOVES` or `SMALLEST_WIDTHS`.
    """
    if measure.startswith("moved"):
        return None
    if measure == "entropy":
        return 0.0, math.log(Fork().options)
    peak = PEAK.get(regime or "", 1.0) if measure in ("mean", "speed") else 1.0
    return 0.0, peak


def compared(
    first: Sequence[float], second: Sequence[float], measure: str, comparisons: int, regime: str | None = None
) -> dict[str, Any]:
    """The paired difference of two arms in a measure, with its verdict.

    A measure with a range has an interval that allows for failures that no seed has shown (`bounded_interval`), the others
    Student's. A seed on which one of the two has no such token is left out; a run that diverged makes all numbers NaN.

    Args:
        first: Values of the first arm by seed.
        second: Values of the second arm on the same seeds; of two lists the longer one is cut.
        measure: A name in `SMALLEST`, `SMALLEST_MOVES` or `SMALLEST_WIDTHS`.
        comparisons: Intervals that hold together with a chance of 95%.
        regime: A name in `REGIMES`; None for a problem of the map.
    """
    pairs = min(len(first), len(second))
    differences = np.subtract(first[:pairs], second[:pairs], dtype=float)
    if measure in SMALLEST_MOVES:
        differences = differences[np.isfinite(differences)]
    ends = range_of(regime, measure)
    if ends is None or not np.isfinite(differences).all():
        found = t_interval(differences.tolist(), comparisons)
    else:
        reach = ends[1] - ends[0]
        found = bounded_interval(differences.clip(-reach, reach).tolist(), -reach, reach, comparisons)
    return {**_rounded(found), "verdict": verdict(found, _SMALLEST[measure])}


def _rounded(found: Interval) -> dict[str, float]:
    return {name: float(f"{x:.{_DIGITS}g}") for name, x in found._asdict().items()}


def summarise_regimes(found: Mapping[str, Any]) -> dict[str, Any]:
    """Each regime and optimiser: rates, values with 95% intervals, and the differences, at each arm's own and at the same rate.

    The intervals of the differences in one measure, by one optimiser and way, hold together over all regimes and pairs.

    Args:
        found: Result of `bandpo.lab.forks.plan.run_regimes`.
    """
    optimizers = [key.partition("/")[2] for key in found]
    summary: dict[str, Any] = {}
    for key, arms in found.items():
        regime = key.partition("/")[0]
        pairs = pairs_of(list(arms))
        family = len(pairs) * optimizers.count(key.partition("/")[2])
        values = {
            way: {arm: {m: _rounded(t_interval(row[way]["final"][m])) for m in SMALLEST} for arm, row in arms.items()}
            for way in ("own", "same")
        }
        differences = {
            way: {
                f"{a} - {b}": {
                    m: compared(arms[a][way]["final"][m], arms[b][way]["final"][m], m, family, regime) for m in SMALLEST
                }
                for a, b in pairs
            }
            for way in ("own", "same")
        }
        seeds = len(arms[BASELINE]["own"]["final"]["mean"])
        rates = {arm: row["rate"] for arm, row in arms.items()}
        summary[key] = {"seeds": seeds, "family": family, "rates": rates, "values": values, "differences": differences}
    return summary


def summarise_confirmation(found: Mapping[str, Any]) -> dict[str, Any]:
    """Each regime of the confirmation: rates, values with 95% intervals, and the differences at each arm's own rate.

    The intervals of the differences in one measure hold together over all regimes and pairs.

    Args:
        found: Result of `bandpo.lab.forks.plan.run_confirmation`.
    """
    family = sum(len(pairs_of(list(arms))) for arms in found.values())
    summary: dict[str, Any] = {}
    for regime, arms in found.items():
        final = {arm: row["own"]["final"] for arm, row in arms.items()}
        summary[regime] = {
            "seeds": len(final[BASELINE]["mean"]),
            "family": family,
            "rates": {arm: row["rate"] for arm, row in arms.items()},
            "values": {arm: {m: _rounded(t_interval(row[m])) for m in SMALLEST} for arm, row in final.items()},
            "differences": {
                f"{a} - {b}": {m: compared(final[a][m], final[b][m], m, family, regime) for m in SMALLEST}
                for a, b in pairs_of(list(arms))
            },
        }
    return summary


def summarise_map(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each cell of the map: values, differences from the baseline, and the arm that wins in each measure.

    The intervals of one measure hold together within a cell, and not over the map.

    An arm wins if it has the best mean of all and is better than the baseline by the rule of `verdict`; the baseline wins if
    every other arm is worse than it; otherwise nobody does.

    Args:
        found: Result of `bandpo.lab.forks.plan.run_map`.
    """
    summary: list[dict[str, Any]] = []
    for cell in found:
        arms = cell["arms"]
        pairs = pairs_of(list(arms))
        family = len(pairs)
        differences = {
            f"{a} - {b}": {
                m: compared(arms[a]["own"]["final"][m], arms[b]["own"]["final"][m], m, family) for m in SMALLEST
            }
            for a, b in pairs
        }
        means = {
            m: {arm: float(np.mean(cast("list[float]", row["own"]["final"][m]))) for arm, row in arms.items()}
            for m in SMALLEST
        }
        winners = {m: _winner(means[m], {n: d[m]["verdict"] for n, d in differences.items()}) for m in SMALLEST}
        summary.append(
            {
                **{name: cell[name] for name in ("share", "steps", "flip")},
                "seeds": len(arms[BASELINE]["own"]["final"]["mean"]),
                "family": family,
                "rates": {arm: row["rate"] for arm, row in arms.items()},
                "means": {m: {arm: round(x, _DIGITS) for arm, x in row.items()} for m, row in means.items()},
                "differences": differences,
                "winners": winners,
            }
        )
    return summary


def _winner(means: Mapping[str, float], verdicts: Mapping[str, str]) -> str | None:
    against = {arm: verdicts[f"{arm} - {BASELINE}"] for arm in means if arm != BASELINE}
    best = max(means, key=lambda arm: means[arm])
    if best == BASELINE:
        return BASELINE if all(v == "worse" for v in against.values()) else None
    return best if against[best] == "better" else None


def summarise_drift(found: Mapping[str, Any]) -> dict[str, Any]:
    """The entropy at the start, and at the end for each optimiser and interval with a 95% interval over seeds.

    Args:
        found: Result of `bandpo.lab.forks.plan.run_drift`.
    """
    start = entropy(NOISE.start()[0].softmax(-1)).item()
    ends = {
        name: {label: _rounded(t_interval(values)) for label, values in rows.items()} for name, rows in found.items()
    }
    seeds = len(next(iter(next(iter(found.values())).values())))
    return {"start": round(start, _DIGITS), "seeds": seeds, "ends": ends}


def summarise_moves(found: Mapping[str, Any]) -> dict[str, Any]:
    """How far the updates of the first rollouts moved rare tokens, every arm at the baseline's rate, in each place.

    The intervals of the differences in one measure hold together over all places and arms.

    Args:
        found: Result of `bandpo.lab.forks.plan.run_regimes`.
    """
    others = sum(len(arms) - 1 for arms in found.values())
    places: dict[str, Any] = {}
    for key, arms in found.items():
        regime = key.partition("/")[0]
        values = {arm: row["same"]["final"] for arm, row in arms.items()}
        places[key] = {
            "rate": arms[BASELINE]["rate"],
            "values": {arm: {m: _rounded(t_interval(_present(row[m]))) for m in MOVES} for arm, row in values.items()},
            "differences": {
                f"{arm} - {BASELINE}": {m: compared(row[m], values[BASELINE][m], m, others, regime) for m in MOVES}
                for arm, row in values.items()
                if arm != BASELINE
            },
            "by_rollout": {
                arm: {m: [round(x, 4) for x in row["same"]["moves"][m]] for m in ("moved_up", "moved_down")}
                for arm, row in arms.items()
            },
        }
    return {"tracked": TRACKED, "rare": RARE, "family": others, "places": places}


def summarise_widths(found: Mapping[str, Any]) -> dict[str, Any]:
    """One radius against one or two epsilons: area and best of a few trials, and how they differ from those of one epsilon.

    The intervals of the differences in one measure hold together over all places and families.

    Args:
        found: Result of `bandpo.lab.forks.plan.run_widths`.
    """
    values = width_values(found)
    others = sum(len(families) - 1 for families in values.values())
    places = {
        place: {
            "needed": round(SHARE * PEAK[place.partition("/")[0]], _DIGITS),
            "seeds": len(families["eps"]["area"]),
            "cells": {name: len(found[place][name]) for name in families},
            "values": {name: {m: _rounded(t_interval(x)) for m, x in row.items()} for name, row in families.items()},
            "differences": {
                f"{name} - eps": {
                    m: compared(x, families["eps"][m], m, others, place.partition("/")[0]) for m, x in row.items()
                }
                for name, row in families.items()
                if name != "eps"
            },
            "grid": {name: [_grid_cell(cell) for cell in found[place][name]] for name in families},
        }
        for place, families in values.items()
    }
    return {"share": SHARE, "trials": TRIALS, "family": others, "places": places}


def _present(values: Sequence[float]) -> list[float]:
    """Without the seeds that had no such token."""
    return [x for x in values if not math.isnan(x)]


def _grid_cell(cell: Mapping[str, Any]) -> list[Any]:
    """Width, rate, speed on the tuning seeds, and mean at the end."""
    mean = float(np.mean(cast("list[float]", cell["mean"])))
    return [cell["width"], cell["rate"], round(cell["tuning"], 4), round(mean, 4)]


BUDGET = 0.25
"""T = η·K/N of the SGD runs of rate 1 in the study of drift: 16 steps on 64 tokens."""


def summarise_theory() -> dict[str, Any]:
    """The numbers of the theory on the page: neutral upper edges, exponents, the drift of each interval, and the reach."""
    start = NOISE.start()[0].softmax(-1)
    intervals = {x.label: x.objective().bounds for x in DRIFT}
    halves = {name: ARMS[name].bounds for name in ("bandpo-kl", "bandpo-kl-upper", "bandpo-kl-lower")}
    drifts = {
        name: round(1000 * one_token_drift(start, bounds, BUDGET).item(), 4)
        for name, bounds in {**intervals, **halves}.items()
    }
    rare = torch.tensor([0.0001, 0.01, 0.5, 0.99], dtype=torch.float64)
    reached = {
        name: {side: [round(x, 4) for x in getattr(found, side).tolist()] for side in ("up", "down")}
        for name in (BASELINE, "bandpo-kl", "no-clip")
        for found in (reach(ARMS[name].bounds, rare, 1.0),)
    }
    neutral: dict[str, list[float | None]] = {}
    exponents: dict[str, float] = {}
    for common in (0.5, 0.7, 0.9, 0.99):
        policy = torch.tensor([common] + [(1 - common) / 63] * 63, dtype=torch.float64)
        edges = [neutral_upper(policy, 0.8, budget) for budget in (0.1, BUDGET, 0.5, 1.0)]
        neutral[f"{common:g}"] = [None if np.isnan(u) else round(u, 3) for u in edges]
        exponents[f"{common:g}"] = round(along_own_gradient(policy).exponent[1].item(), 3)
    free = {str(k): round(free_drift(start, rate=1 / k, steps=k).item(), 5) for k in (1, 2, 16)}
    flat = torch.tensor([0.3] + [0.7 / 9] * 9, dtype=torch.float64)
    plain = {
        name: round(1000 * one_token_drift(flat, ARMS[name].bounds, 1.0).item(), 4)
        for name in (BASELINE, "bandpo-kl-upper", "bandpo-kl-lower")
    }
    return {
        "drift": drifts, "reach": reached, "neutral": neutral, "exponents": exponents, "free": free, "flat": plain,
    }  # fmt: skip
