"""The runs of the protocol, part by part, and the verdicts on its claims: the content of evidence.json."""

import dataclasses
import fnmatch
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import bandpo
from bandpo._system.about import about
from bandpo._system.options import not_one_of
from bandpo._system.progress import clock_time
from bandpo.lab.evidence.judge import Diverged, Values, judge
from bandpo.lab.evidence.protocol import Claim, Contrast, Experiment, Place, Protocol, read
from bandpo.lab.forks.plan import CONFIRMATION_SEED, PRESETS, REPORT_SEED, SLOW, TUNING_SEED, Preset
from bandpo.lab.forks.store import Store
from bandpo.lab.forks.study import PARTS, results, summarise, values_of
from bandpo.lab.forks.summary import HALVES
from bandpo.statistics import t_interval

Say = Callable[[str], None]
Found = Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]

_OF_WIDTHS = "eps"  # what the other families of widths are compared with: one epsilon, as in the baseline


class Outcome(NamedTuple):
    """What the runs of an experiment gave.

    Args:
        values: The value of each report seed, `[place][arm][measure]`.
        summary: What the experiment tells beside them, as JSON has it.
        core_seconds: Processor time of all of its runs, also of those that an earlier command made.
        same_rate: The values of the places in which every arm was also trained at the rate of the baseline.
    """

    values: Found
    summary: Mapping[str, Any]
    core_seconds: float
    same_rate: Found = MappingProxyType({})


def study(protocol: Protocol, folder: Path, jobs: int, say: Say) -> dict[str, Any]:
    """Make the runs that are missing, and judge the claims.

    Args:
        protocol: The protocol, reduced to a preset or more.
        folder: Folder of the results; each experiment has a folder in it, with one file for each run.
        jobs: Runs at once.
        say: Function that is called with each line of the progress.

    Returns:
        The content of evidence.json.
    """
    outcomes: dict[str, Outcome] = {}
    parts = {name: experiment for name, experiment in protocol.experiments.items() if experiment.places}
    for i, (name, experiment) in enumerate(parts.items()):
        say(f"part {i + 1} of {len(parts)}: {name}, {described(experiment)}")
        began = time.monotonic()
        outcomes[name] = EXPERIMENTS[name](protocol, folder / name, jobs, say)
        say(f"{name}: done after {clock_time(time.monotonic() - began)}")
    values = {name: outcome.values for name, outcome in outcomes.items()}
    diverged = diverged_in(protocol, values)
    return {
        **about(),
        "bandpo": bandpo.__version__,
        "preset": protocol.preset,
        "protocol": registration(protocol),
        "smallest": {name: measure.smallest for name, measure in protocol.measures.items()},
        "core_seconds": {name: round(outcome.core_seconds, 1) for name, outcome in outcomes.items()},
        **verdicts(protocol, values, diverged),
        "diverged": diverged,
        "same_rate": at_one_rate(protocol, {name: outcome.same_rate for name, outcome in outcomes.items()}),
        "values": values,
        **{name: outcome.summary for name, outcome in outcomes.items()},
    }


def described(experiment: Experiment) -> str:
    """The size of an experiment in a few words.

    Args:
        experiment: The experiment.
    """
    places, arms = len(experiment.places), len(experiment.arms)
    counts = sorted({place.seeds for place in experiment.places.values()})
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    return f"{places} places, {arms} arms, {seeds} seeds, and {experiment.tuning_seeds} others for tuning"


def diverged_in(protocol: Protocol, values: Values) -> dict[str, dict[str, dict[str, list[int]]]]:
    """The seeds whose runs diverged, as `judge` takes them; places and arms without one are left out.

    A run that diverged has no number in any measure. The runs were computed: both experiments refuse a result that has no
    numbers at its start. A seed that lacks a number in some measures only is not among these. Measures that leave out what is
    missing do not count, since a run without such a token has no number of them.

    Args:
        protocol: The protocol, reduced to the preset of the runs.
        values: The value of each report seed.
    """
    found: dict[str, dict[str, dict[str, list[int]]]] = {}
    for name, places in values.items():
        for place, arms in places.items():
            measures = protocol.experiments[name].places[place].measures
            count = [m for m, measure in measures.items() if measure.missing != "left out"]
            for arm, row in arms.items():
                seeds = zip(*(row[m] for m in count), strict=True)
                if gone := [i for i, seed in enumerate(seeds) if not any(map(_is_number, seed))]:
                    found.setdefault(name, {}).setdefault(place, {})[arm] = gone
    return found


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def verdicts(protocol: Protocol, values: Values, diverged: Diverged) -> dict[str, Any]:
    """All that the values say, and that needs no run: claims, exploratory differences, and means.

    Args:
        protocol: The protocol, reduced to the preset of the runs.
        values: The value of each report seed.
        diverged: The seeds whose runs diverged.

    Returns:
        `judged`: the claims. `explored`: `[experiment][place]["first - second"][measure]` with the value, an interval that
        holds alone, and the verdict. `means`: `[experiment][place][arm][measure]` with Student's interval.
    """
    return {
        "judged": [claim.as_json() for claim in judge(protocol, values, diverged)],
        "explored": explored(protocol, values, diverged),
        "means": {
            experiment: {
                place: {arm: {measure: _mean(found) for measure, found in row.items()} for arm, row in arms.items()}
                for place, arms in places.items()
            }
            for experiment, places in values.items()
        },
    }


def registration(protocol: Protocol) -> dict[str, Any]:
    """What evidence.json has of the protocol itself.

    Args:
        protocol: The protocol.
    """
    return {
        "sha256": protocol.sha256,
        "registered": protocol.registered,
        "amendments": list(protocol.amendments),
    }


def explored(protocol: Protocol, values: Values, diverged: Diverged) -> dict[str, Any]:
    """Every arm against the baseline, and the halves, in every measure and place: differences that no claim rests on.

    Args:
        protocol: The protocol, reduced to the preset of the runs.
        values: The value of each report seed.
        diverged: The seeds whose runs diverged.
    """
    contrasts = [x for name in values for x in _contrasts(protocol, name)]
    claims = tuple(Claim(str(i), "", "", "exploratory", (contrast,)) for i, contrast in enumerate(contrasts))
    found: dict[str, Any] = {}
    for claim in judge(dataclasses.replace(protocol, claims=claims), values, diverged):
        (x,) = claim.contrasts
        pairs = found.setdefault(x.experiment, {}).setdefault(x.place, {})
        row = [*(number if math.isfinite(number) else None for number in (x.value, x.low, x.high)), x.verdict]
        pairs.setdefault(f"{x.first} - {x.second}", {})[x.measure] = row
    return found


def at_one_rate(protocol: Protocol, values: Values) -> dict[str, Any]:
    """The differences of `explored` where every arm has the learning rate of the baseline, for the places that were run so.

    They show how much of a difference at the arms' own rates is that of the edge, and how much that of the rate.

    Args:
        protocol: The protocol, reduced to the preset of the runs.
        values: The value of each report seed at the baseline's rate.
    """
    experiments = {
        name: dataclasses.replace(
            has,
            places={
                place: dataclasses.replace(x, arms=tuple(arm for arm in x.arms if arm in values[name][place]))
                for place, x in has.places.items()
                if place in values.get(name, {})
            },
        )
        for name, has in protocol.experiments.items()
    }
    reduced = dataclasses.replace(protocol, experiments=experiments)
    return explored(reduced, values, diverged_in(reduced, values))


def _contrasts(protocol: Protocol, name: str) -> Iterator[Contrast]:
    for place, has in protocol.experiments[name].places.items():
        base = protocol.baseline if protocol.baseline in has.arms else _OF_WIDTHS
        pairs = [(arm, base) for arm in has.arms if arm != base]
        pairs += [pair for pair in HALVES if set(pair) <= set(has.arms)]
        for first, second in pairs:
            for measure in has.measures:
                yield Contrast(name, place, first, second, measure, "better")


def _mean(values: Sequence[float]) -> list[float | None]:
    kept = [x for x in values if math.isfinite(x)]  # a seed on which the arm has no such token
    return [x if math.isfinite(x) else None for x in t_interval(kept)]


def measured(experiment: Experiment, values: Found) -> dict[str, dict[str, dict[str, list[float]]]]:
    """The values that the protocol asks for, in its order; others are left out.

    Args:
        experiment: The experiment.
        values: All values of its runs.

    Raises:
        ValueError: If a place, an arm or a measure has no values.
    """
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for place, has in experiment.places.items():
        for arm in has.arms:
            for measure in has.measures:
                try:
                    row = values[place][arm][measure]
                except KeyError as missing:
                    raise ValueError(
                        f"the runs have no {measure} of {arm} at {place} ({missing} is missing), which the protocol asks for"
                    ) from None
                found.setdefault(place, {}).setdefault(arm, {})[measure] = list(row)[: has.seeds]
    return found


_SAME_RATE = "/same-rate"


def _same_rate(experiment: Experiment, values: Found) -> Found:
    """The values at the baseline's rate, by the names of the places."""
    renamed = {place.removesuffix(_SAME_RATE): found for place, found in values.items() if place.endswith(_SAME_RATE)}
    places = {
        place: dataclasses.replace(has, arms=tuple(arm for arm in has.arms if arm in renamed[place]))
        for place, has in experiment.places.items()
        if place in renamed
    }
    return measured(dataclasses.replace(experiment, places=places), renamed)


def restricted(protocol: Protocol, only: Sequence[str] | None, arms: Sequence[str] | None = None) -> Protocol:
    """The protocol with some of its experiments, places and arms. The claims stay; what they lack is not measured.

    Args:
        protocol: The protocol, reduced to a preset.
        only: Names of experiments, and patterns of `EXPERIMENT/PLACE` such as `forks/*/adam`; None keeps all.
        arms: Arms that are kept beside the baseline, at the places that have the baseline; None keeps all.

    Raises:
        ValueError: If one of them names nothing of the preset.
    """
    known = [f"{name}/{place}" for name, experiment in protocol.experiments.items() for place in experiment.places]
    chosen: set[str] = set()
    for pattern in known if only is None else only:
        found = fnmatch.filter(known, f"{pattern}/*" if pattern in protocol.experiments else pattern)
        if not found:
            raise ValueError(not_one_of("--only", pattern, [*protocol.experiments, *known]))
        chosen.update(found)
    every = dict.fromkeys(arm for experiment in protocol.experiments.values() for arm in experiment.arms)
    for arm in arms or ():
        if arm not in every:
            raise ValueError(not_one_of("--arms", arm, every))

    def kept(place: Place) -> Place:
        if arms is None or protocol.baseline not in place.arms:
            return place
        return dataclasses.replace(place, arms=tuple(x for x in place.arms if x in (protocol.baseline, *arms)))

    experiments = {
        name: dataclasses.replace(
            experiment, places={p: kept(x) for p, x in experiment.places.items() if f"{name}/{p}" in chosen}
        )
        for name, experiment in protocol.experiments.items()
    }
    return dataclasses.replace(protocol, experiments=experiments)


def _forks(protocol: Protocol, folder: Path, jobs: int, say: Say) -> Outcome:
    """The exact policies."""
    experiment = protocol.experiments["forks"]
    for place, has in experiment.places.items():
        first = CONFIRMATION_SEED if place.endswith(_CONFIRMATION) else REPORT_SEED
        registered, made = (has.report_seed, experiment.tuning_seed), (first, TUNING_SEED)
        if registered != made:
            raise ValueError(
                f"the protocol registers the first seeds {registered} of forks, {place}, and lab.forks has {made}; they must "
                "agree"
            )
    preset, parts = forks_preset(protocol)
    store = Store(folder / "cells", say, jobs)
    found = results(preset, store, parts)
    summary = {"preset": protocol.preset, "runs": store.made + store.found, **summarise(found)}
    values = values_of(found)
    return Outcome(measured(experiment, values), summary, store.seconds, _same_rate(experiment, values))


_CONFIRMATION = "/confirmation"


def forks_preset(protocol: Protocol) -> tuple[Preset, tuple[str, ...]]:
    """The study of forks that has the places of the protocol, and its parts.

    The drift and the map, on which no claim rests, are made where all places of the preset are.

    Args:
        protocol: The protocol, reduced to a preset or more.
    """
    experiment, full = protocol.experiments["forks"], PRESETS[protocol.preset]
    whole = set(experiment.places) == set(read(protocol.preset).experiments["forks"].places)
    confirmed = {place: has for place, has in experiment.places.items() if place.endswith(_CONFIRMATION)}
    regimes = {place.removesuffix(_CONFIRMATION) for place in confirmed}
    names = [place.partition("/") for place in experiment.places if place not in confirmed]
    trained = {(x, "adam") if name == "moves" else (name, x) for name, _, x in names if name != "width"}
    widths = {x: experiment.places[f"width/{x}"].seeds for name, _, x in names if name == "width"}
    preset = dataclasses.replace(
        full,
        seeds=experiment.seeds,
        tuning_seeds=experiment.tuning_seeds,
        regimes=tuple(x for x in full.regimes if x in {regime for regime, _ in trained}),
        arms=tuple(x for x in full.arms if x in experiment.arms or (whole and x in SLOW)),
        optimizers=tuple(x for x in full.optimizers if x in {optimizer for _, optimizer in trained}),
        width_regimes=tuple(x for x in full.width_regimes if x in widths),
        width_seeds=max(widths.values(), default=1),
        slow_regimes=full.slow_regimes if whole else (),
        confirmation_regimes=tuple(x for x in full.confirmation_regimes if x in regimes),
        confirmation_arms=tuple(x for x in full.confirmation_arms if x in experiment.arms),
        confirmation_seeds=max((has.seeds for has in confirmed.values()), default=1),
    )
    chosen = {"regimes": trained, "widths": widths, "confirmation": confirmed}
    return preset, PARTS if whole else tuple(part for part in PARTS if chosen.get(part))


def _transformers(protocol: Protocol, folder: Path, jobs: int, say: Say) -> Outcome:
    """The small transformers."""
    from bandpo.lab.evidence.transformers import run

    found = run(protocol, folder, jobs, say)
    experiment = protocol.experiments["transformers"]
    values = found["values"]
    return Outcome(
        measured(experiment, values), found["summary"], found["core_seconds"], _same_rate(experiment, values)
    )


EXPERIMENTS: Mapping[str, Callable[[Protocol, Path, int, Say], Outcome]] = MappingProxyType(
    {"forks": _forks, "transformers": _transformers}
)
"""The experiments of the protocol by name, in the order in which they are made."""
