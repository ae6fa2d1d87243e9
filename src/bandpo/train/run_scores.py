"""The evaluations of groups of runs: before and after training, the change, and the difference from the first group."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bandpo.statistics import Difference, Interval, interval, paired, t_half_width
from bandpo.train.record import Scores

Evaluations = Mapping[str, Scores]
"""The evaluations of a run by their stage."""
_FEWEST_SEEDS = 3
_UNKNOWN = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Measured:
    """A measure of a group of runs.

    Args:
        before: Before training.
        after: After training.
        change: The change.
        over: What the intervals of these three are over.
        difference: After training, minus that of the first group; None for the first group.
        paired: What the interval of the difference is over.
        p_holm: p-value of the difference, with Holm's correction over the groups.
    """

    before: Interval
    after: Interval
    change: Interval
    over: str
    difference: Interval | None = None
    paired: str = ""
    p_holm: float | None = None

    def plain(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        found = {name: getattr(self, name) for name in ("before", "after", "change", "difference")}
        intervals = {name: None if x is None else x._asdict() for name, x in found.items()}
        return {**intervals, "over": self.over, "paired": self.paired, "p_holm": self.p_holm}


def measures(
    groups: Mapping[str, Sequence[Evaluations]], seeds: Sequence[Sequence[Any]]
) -> dict[str, dict[str, Measured]]:
    """mean@k and pass@k of each group; pass@k only where all runs have the same k, which is above 1.

    For one run the intervals are over its prompts (BCa bootstrap), for several they are over the runs (Student's t, since a
    bootstrap of a few values is too narrow). A difference is paired over the prompts that both groups have, each with its mean
    over the runs of a group; with three or more common seeds it is paired over those instead. Its interval is Student's.

    Args:
        groups: The evaluations of the runs of each group, by its label.
        seeds: The seeds of the runs of each group.

    Returns:
        For each measure, what it is in each group.
    """
    sizes = {e.rewards.shape[1] for runs in groups.values() for run in runs for e in run.values()}
    if not sizes:
        return {}
    k = str(min(sizes)) if len(sizes) == 1 else "k"
    found = {f"mean@{k}": _measured(groups, seeds, Scores.means)}
    if len(sizes) == 1 and k != "1":
        found[f"pass@{k}"] = _measured(groups, seeds, Scores.solved)
    return found


def _measured(
    groups: Mapping[str, Sequence[Evaluations]], seeds: Sequence[Sequence[Any]], of: Any
) -> dict[str, Measured]:
    own = {label: _own(runs, of) for label, runs in groups.items()}
    labels = list(groups)
    pairs: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    over: dict[str, str] = {}
    for label, named in zip(labels[1:], seeds[1:], strict=True):
        chosen = _pair(groups[label], named, groups[labels[0]], seeds[0], of)
        if chosen is not None:
            pairs[label], over[label] = chosen
    differences: dict[str, Difference] = paired(pairs)
    means = {label: found.mean for label, found in differences.items()}
    for label, chosen in over.items():
        if chosen.endswith("seeds"):
            means[label] = _over_seeds(np.subtract(*pairs[label]).tolist())
    return {
        label: Measured(
            *own[label],
            difference=means.get(label, None if label == labels[0] else _UNKNOWN),
            paired=over.get(label, ""),
            p_holm=differences[label].p_holm if label in differences else None,
        )
        for label in labels
    }


def _own(runs: Sequence[Evaluations], of: Any) -> tuple[Interval, Interval, Interval, str]:
    """Before, after and change of a group, and what their intervals are over."""
    if len(runs) == 1:
        values = {stage: _by_prompt(runs, stage, of) for stage in ("before", "after")}
        before, after = (_over_values(list(v.values())) for v in values.values())
        both = [p for p in values["before"] if p in values["after"]]
        change = _over_values([values["after"][p] - values["before"][p] for p in both])
        return before, after, change, f"{len(values['before'])} prompts" if values["before"] else ""
    means = {
        stage: [_mean(of(run[stage])) if stage in run else np.nan for run in runs] for stage in ("before", "after")
    }
    change = np.subtract(means["after"], means["before"]).tolist()
    before, after, changed = (_over_seeds(x) for x in (means["before"], means["after"], change))
    return before, after, changed, f"{len(runs)} seeds"


def _pair(
    first: Sequence[Evaluations],
    first_seeds: Sequence[Any],
    second: Sequence[Evaluations],
    second_seeds: Sequence[Any],
    of: Any,
) -> tuple[tuple[Sequence[float], Sequence[float]], str] | None:
    """The values after training of two groups in pairs, and what the pairs are; None where there are none."""
    ends = [
        {str(seed): _mean(of(run["after"])) for run, seed in zip(runs, seeds, strict=True) if "after" in run}
        for runs, seeds in ((first, first_seeds), (second, second_seeds))
    ]
    common = [seed for seed in ends[0] if seed in ends[1]]
    if len(common) >= _FEWEST_SEEDS and _all_prompts(first, second):
        return ([ends[0][s] for s in common], [ends[1][s] for s in common]), f"paired over {len(common)} seeds"
    own, other = (_by_prompt(runs, "after", of) for runs in (first, second))
    both = [prompt for prompt in own if prompt in other]
    if not both:
        return None
    return ([own[p] for p in both], [other[p] for p in both]), f"paired over {len(both)} prompts"


def _all_prompts(*groups: Sequence[Evaluations]) -> bool:
    """Whether the runs of the groups have the same held-out prompts."""
    return len({frozenset(run["after"].prompts) for runs in groups for run in runs if "after" in run}) == 1


def _by_prompt(runs: Sequence[Evaluations], stage: str, of: Any) -> dict[str, float]:
    """The value of each prompt, its mean over the runs that have it; prompts without a value are left out."""
    found: dict[str, list[float]] = {}
    for run in runs:
        if stage in run:
            for prompt, value in zip(run[stage].prompts, of(run[stage]), strict=True):
                if not np.isnan(value):
                    found.setdefault(prompt, []).append(float(value))
    return {prompt: float(np.mean(values)) for prompt, values in found.items()}


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _over_seeds(values: Sequence[float]) -> Interval:
    """The mean of some runs with its t-interval; NaN if a run has no value."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2 or not np.isfinite(x).all():
        return Interval(float(x.mean()), math.nan, math.nan)
    mean, half = float(x.mean()), float(t_half_width(x))
    return Interval(mean, mean - half, mean + half)


def _over_values(values: Sequence[float]) -> Interval:
    return interval(values, np.mean) if len(values) else _UNKNOWN
