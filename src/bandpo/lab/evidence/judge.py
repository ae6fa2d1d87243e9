"""Verdicts on the claims of the protocol, by one rule for claims that we like and claims that we do not.

A contrast is the mean of paired differences between two arms, with an interval that holds together with those of the other
contrasts of its claim. Its verdict is `better`, `worse`, `equivalent` or `undecided` (`bandpo.statistics.verdict`), and
`equivalent` needs an interval that allows for failures that no seed has shown. A measure without a range has no such interval,
and is never `equivalent`.

A run that diverged counts as the worst value where the measure has it so. A value that is missing for another reason decides
nothing: it leaves the contrast `undecided`, with the reason.

A claim holds in the places where its contrasts have the claimed verdict. The opposite of `better` is `worse`, and `equivalent`
is a result of its own: no difference that matters. Exchanging the arms, or claiming the opposite, exchanges "holds" with "the
opposite is seen" and changes nothing else.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from bandpo.lab.evidence.protocol import Claim, Contrast, Experiment, Measure, Protocol
from bandpo.statistics import (
    Floats,
    Interval,
    Verdict,
    bounded_interval,
    pairs_needed,
    t_interval,
    unseen_share,
    verdict,
)

Bools = NDArray[np.bool_]

Values = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]]
"""`values[experiment][place][arm][measure]` has a number for each seed of the report, in the same order in every arm."""

Diverged = Mapping[str, Mapping[str, Mapping[str, Sequence[int]]]]
"""`diverged[experiment][place][arm]` has the places in the lists of `Values` of the seeds whose runs diverged."""

Sense = Literal["holds", "opposite", "equivalent", "undecided", "not measured"]
"""What a contrast says of its claim."""

NOT_MEASURED = "not measured"
"""The verdict on a contrast, and on a claim, of which these runs have no values."""


@dataclass(frozen=True)
class JudgedContrast:
    """A contrast with what the runs say.

    Args:
        experiment: Name of the experiment.
        place: Name of the place.
        first: The arm whose values are on the left of the difference.
        second: The arm whose values are taken away.
        measure: Name of the measure.
        claimed: The verdict that the claim needs.
        smallest: The smallest effect of interest.
        interval: `bounded` or `t`.
        pairs: Seeds with values of both arms.
        missing: Seeds on which the first and the second arm have no number.
        diverged: How many of them are runs that diverged, of the first and of the second arm.
        value: Mean difference.
        low: Lower end of its interval.
        high: Upper end of its interval.
        unseen: The largest share of failures that so many seeds without one allow.
        hidden: Whether only failures that so many seeds may not show keep it from being `equivalent`.
        verdict: `better`, `worse`, `equivalent`, `undecided`, or `not measured`.
        sense: What this says of the claim.
        needed: Seeds that would find the smallest effect of interest with the power of the protocol, if differences spread as
            they did here, where it is undecided.
        reason: Why it is undecided, where more seeds would not help; else empty.
    """

    experiment: str
    place: str
    first: str
    second: str
    measure: str
    claimed: str
    smallest: float
    interval: str
    pairs: int
    missing: tuple[int, int]
    diverged: tuple[int, int]
    value: float
    low: float
    high: float
    unseen: float
    hidden: bool
    verdict: Verdict | Literal["not measured"]
    sense: Sense
    needed: int | None
    reason: str


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict.

    Args:
        id: Short name of the claim.
        text: The claim in one sentence.
        source: Who makes it.
        kind: `primary` or `exploratory`.
        verdict: The verdict as it is printed.
        counts: The number of contrasts of each sense.
        contrasts: The contrasts.
    """

    id: str
    text: str
    source: str
    kind: str
    verdict: str
    counts: Mapping[str, int]
    contrasts: tuple[JudgedContrast, ...]

    def as_json(self) -> dict[str, Any]:
        """The claim as JSON has it; a number that is not finite is null."""
        return {
            **{key: value for key, value in asdict(self).items() if key != "contrasts"},
            "counts": dict(self.counts),
            "contrasts": [{key: _as_json(value) for key, value in asdict(c).items()} for c in self.contrasts],
        }


def _as_json(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return list(cast("tuple[int, int]", value)) if isinstance(value, tuple) else value


def judge(protocol: Protocol, values: Values, diverged: Diverged = MappingProxyType({})) -> list[Judged]:
    """The verdict on each claim of a protocol.

    An experiment or a place that `values` has not, and a place or an arm that the preset leaves out, is not measured. The
    verdict of the claim names how many of its places these are, or of its contrasts if a place has several.

    Args:
        protocol: The protocol, reduced to the preset of the runs.
        values: The numbers of the runs; NaN where there is none.
        diverged: Which seeds diverged. What has no number and is not named here was not computed, or has no such token.

    Returns:
        The claims in the order of the protocol.

    Raises:
        ValueError: If an arm or a measure of the preset is missing in a place of `values`, or has another number of values than
            the preset has seeds, or a value is outside its range, or a seed that diverged has a number.
    """
    return [_judge(protocol, claim, values, diverged) for claim in protocol.claims]


def _judge(protocol: Protocol, claim: Claim, values: Values, diverged: Diverged) -> Judged:
    # The intervals hold together for all contrasts of the claim, so that leaving some out makes none of the others narrower.
    together = len(claim.contrasts)
    found = tuple(
        _contrast(protocol, c, values, diverged, together)
        if _is_measured(protocol, c, values)
        else _unmeasured(protocol, c)
        for c in claim.contrasts
    )
    senses: list[Sense] = [c.sense for c in found]
    counts = {sense: senses.count(sense) for sense in ("holds", "opposite", "equivalent", "undecided", NOT_MEASURED)}
    needed = max(((c.needed, c.smallest) for c in found if c.needed is not None), default=None)
    each_once = len({(c.experiment, c.place) for c in found}) == len(found)
    text = verdict_of(counts, needed, "place" if each_once else "contrast")
    return Judged(claim.id, claim.text, claim.source, claim.kind, text, counts, found)


def _is_measured(protocol: Protocol, contrast: Contrast, values: Values) -> bool:
    place = protocol.experiments[contrast.experiment].places.get(contrast.place)
    arms = place.arms if place else ()
    return contrast.place in values.get(contrast.experiment, {}) and {contrast.first, contrast.second} <= set(arms)


def _contrast(
    protocol: Protocol, contrast: Contrast, values: Values, diverged: Diverged, comparisons: int
) -> JudgedContrast:
    experiment = protocol.experiments[contrast.experiment]
    place = experiment.places[contrast.place]
    measure = place.measures[contrast.measure]
    arms = (contrast.first, contrast.second)
    raw = [_values(contrast, arm, values, place.seeds, measure) for arm in arms]
    gone = [_gone(contrast, arm, diverged, found) for arm, found in zip(arms, raw, strict=True)]
    first, second = (_scored(found, away, measure) for found, away in zip(raw, gone, strict=True))
    difference = first - second
    if measure.missing == "left out":
        difference = difference[np.isfinite(difference)]
    found, method = _interval(difference, measure, experiment, comparisons)
    reason = _no_number(arms, raw, difference)
    state = "undecided" if reason else verdict(found, measure.smallest)
    if state == "equivalent" and measure.range is None:
        state, reason = "undecided", _NO_RANGE
    elif state == "equivalent" and method == "t":
        state = verdict(_bounded(difference, measure, comparisons), measure.smallest)
        state = state if state == "equivalent" else "undecided"
    hidden = (
        state == "undecided"
        and not reason
        and verdict(t_interval(difference.tolist(), comparisons), measure.smallest) == "equivalent"
    )
    reach = measure.range[1] - measure.range[0] if measure.range and (hidden or method == "bounded") else 0.0
    more = state == "undecided" and not reason
    return JudgedContrast(
        **asdict(contrast),
        smallest=measure.smallest,
        interval=method,
        pairs=len(difference),
        missing=_counts(~np.isfinite(found) for found in raw),
        diverged=_counts(gone),
        value=found.value,
        low=found.low,
        high=found.high,
        unseen=unseen_share(len(difference), comparisons) if len(difference) else 1.0,
        hidden=hidden,
        verdict=state,
        sense=_sense(state, contrast.claimed),
        needed=_needed(difference, measure, comparisons, protocol.power, reach) if more else None,
        reason=reason,
    )


_NO_RANGE = "the measure has no range, and without one no interval excludes rare large differences"


def _counts(seeds: Iterable[Bools]) -> tuple[int, int]:
    first, second = (int(x.sum()) for x in seeds)
    return first, second


def _gone(contrast: Contrast, arm: str, diverged: Diverged, values: Floats) -> Bools:
    """Which seeds of an arm diverged.

    Raises:
        ValueError: If one of them has a number.
    """
    found = np.zeros(len(values), dtype=bool)
    found[list(diverged.get(contrast.experiment, {}).get(contrast.place, {}).get(arm, ()))] = True
    if (both := found & np.isfinite(values)).any():
        raise ValueError(
            f"values of {contrast.experiment}, {contrast.place}, {arm}, {contrast.measure}: seed {int(both.argmax())} diverged "
            "and has a number; correct one of the two"
        )
    return found


def _no_number(arms: tuple[str, str], raw: Sequence[Floats], difference: Floats) -> str:
    """Why values that are missing leave a contrast undecided; empty where they do not."""
    without = [arm for arm, found in zip(arms, raw, strict=True) if not np.isfinite(found).any()]
    if len(without) == 2:
        return "no run of either arm gave a number"
    if not len(difference):
        return f"no run of {without[0]} gave a number" if without else "no seed has a number of both arms"
    if left := int((~np.isfinite(difference)).sum()):
        return (
            f"no run of {without[0]} gave a number"
            if without
            else f"{left} {'seed lacks' if left == 1 else 'seeds lack'} a number of one arm or of both"
        )
    return ""


def _unmeasured(protocol: Protocol, contrast: Contrast) -> JudgedContrast:
    return JudgedContrast(
        **asdict(contrast),
        smallest=protocol.measures[contrast.measure].smallest,
        interval=protocol.experiments[contrast.experiment].interval,
        pairs=0,
        missing=(0, 0),
        diverged=(0, 0),
        value=math.nan,
        low=math.nan,
        high=math.nan,
        unseen=1.0,
        hidden=False,
        verdict=NOT_MEASURED,
        sense=NOT_MEASURED,
        needed=None,
        reason="",
    )


def _values(contrast: Contrast, arm: str, values: Values, seeds: int, measure: Measure) -> Floats:
    """The values of an arm, as many as there are seeds."""
    where = f"{contrast.experiment}, {contrast.place}"
    here: Any = values[contrast.experiment]
    for key in (contrast.place, arm, contrast.measure):
        if key not in here:
            raise ValueError(f"values of {where}: {key!r} is missing; there are {', '.join(here) or 'none'}")
        here = here[key]
    found = np.array([math.nan if x is None else x for x in here], dtype=np.float64)
    if len(found) != seeds:
        raise ValueError(
            f"values of {where}, {arm}, {contrast.measure}: got {len(found)}; the preset of the protocol has {seeds} seeds"
        )
    _check_range(found, measure, f"values of {where}, {arm}, {contrast.measure}")
    return found


def _check_range(values: Floats, measure: Measure, where: str) -> None:
    if measure.range is None:
        return
    low, high = measure.range
    rounding = 1e-6 * (high - low)  # of values that were computed in float32
    if (outside := values[(values < low - rounding) | (values > high + rounding)]).size:
        raise ValueError(
            f"{where}: got {outside[0]:g}, which is outside the range [{low:g}, {high:g}] of the protocol; correct the range, "
            "or the measure"
        )


def _scored(values: Floats, diverged: Bools, measure: Measure) -> Floats:
    """The values, with the worst one for a run that diverged where the measure has it."""
    if measure.missing == "worst" and measure.range is not None:
        return np.where(diverged, measure.range[0], values)
    return values


def _interval(difference: Floats, measure: Measure, experiment: Experiment, comparisons: int) -> tuple[Interval, str]:
    if experiment.interval == "t" or measure.range is None:
        return t_interval(difference.tolist(), comparisons), "t"
    return _bounded(difference, measure, comparisons), "bounded"


def _bounded(difference: Floats, measure: Measure, comparisons: int) -> Interval:
    assert measure.range is not None
    reach = measure.range[1] - measure.range[0]
    return bounded_interval(difference.clip(-reach, reach).tolist(), -reach, reach, comparisons)


def _needed(difference: Floats, measure: Measure, comparisons: int, power: float, reach: float) -> int | None:
    if len(difference) < 2 or not np.isfinite(difference).all():
        return None
    return pairs_needed(float(difference.std(ddof=1)), measure.smallest, comparisons, power=power, reach=reach)


def _sense(state: Verdict, claimed: str) -> Sense:
    if state == "undecided":
        return "undecided"
    if state == claimed:
        return "holds"
    return "equivalent" if state == "equivalent" else "opposite"


def came_out(counts: Mapping[str, int]) -> str:
    """How a claim came out, in the classes that advice names (`bandpo.monitoring.catalog.Rule.rests_on`).

    | of the measured contrasts | class |
    |---|---|
    | all hold | holds |
    | some hold, in none the opposite is seen | in part |
    | some hold, in others the opposite is seen | mixed |
    | none holds, in some the opposite is seen | opposite |
    | all show no difference that matters | no difference |
    | none holds, in none the opposite is seen, and not all show no difference; or none is measured | open |

    Args:
        counts: Number of contrasts of each `Sense`; a sense that is left out has none.

    Examples:
        >>> came_out({"holds": 2}), came_out({"holds": 2, "undecided": 1}), came_out({"undecided": 3})
        ('holds', 'in part', 'open')
        >>> came_out({"holds": 1, "opposite": 1}), came_out({"opposite": 1, "undecided": 4})
        ('mixed', 'opposite')
    """
    holds, opposite, equal, open_ = (counts.get(x, 0) for x in ("holds", "opposite", "equivalent", "undecided"))
    if opposite:
        return "mixed" if holds else "opposite"
    if not holds:
        return "no difference" if equal and not open_ else "open"
    return "in part" if equal or open_ else "holds"


def verdict_of(counts: Mapping[str, int], needed: tuple[int, float] | None = None, unit: str = "place") -> str:
    """The verdict on a claim from the number of its contrasts of each sense.

    | of the measured contrasts | verdict |
    |---|---|
    | all hold | holds |
    | in all the opposite is seen | the opposite holds |
    | none is more than the smallest effect of interest | no difference that matters |
    | all are undecided | undecided, with the seeds that the smallest effect of interest would need |
    | some hold, in others the opposite is seen | holds in n of m places, the opposite in k |
    | some hold, in none the opposite is seen | holds in n of m places |
    | in some the opposite is seen, none holds | the opposite in k of m places |
    | some show no difference that matters, the others are undecided | no difference that matters in n of m places |

    Args:
        counts: Number of contrasts of each `Sense`; a sense that is left out has none.
        needed: Seeds that an undecided contrast would need, and the smallest effect of interest that they would find.
        unit: What is counted: a place, or a contrast where a place has several.

    Examples:
        >>> verdict_of({"holds": 3}), verdict_of({"holds": 1, "opposite": 1, "undecided": 1})
        ('holds', 'holds in 1 of 3 places, the opposite in 1')
        >>> verdict_of({"undecided": 2}, (1310, 0.02)), verdict_of({"not measured": 2})
        ('undecided (a difference of 0.02 would need about 1,310 seeds)', 'not measured')
        >>> verdict_of({"holds": 2, "not measured": 1})
        'holds (1 place not measured)'
    """
    holds, opposite, equal, open_ = (counts.get(x, 0) for x in ("holds", "opposite", "equivalent", "undecided"))
    total, left = holds + opposite + equal + open_, counts.get(NOT_MEASURED, 0)
    if not total:
        return NOT_MEASURED
    if open_ == total:
        text = "undecided"
        if needed is not None:
            text += f" (a difference of {needed[1]:g} would need about {needed[0]:,} seeds)"
    elif total in (holds, opposite, equal):
        text = "holds" if holds else "the opposite holds" if opposite else "no difference that matters"
    elif holds:
        text = f"holds in {holds} of {total} {unit}s" + (f", the opposite in {opposite}" if opposite else "")
    elif opposite:
        text = f"the opposite in {opposite} of {total} {unit}s"
    else:
        text = f"no difference that matters in {equal} of {total} {unit}s"
    return f"{text} ({left} {unit}{'s' if left > 1 else ''} not measured)" if left else text
