"""`bandpo lab forks`: runs the parts of a study, and writes forks.json and the figures."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import bandpo
from bandpo._system.about import about
from bandpo._system.files import finite_or_null, write_json, write_text
from bandpo._system.locks import claim_output, released
from bandpo._system.progress import Progress
from bandpo.lab.forks.figures import draw
from bandpo.lab.forks.plan import PRESETS, Preset, run_confirmation, run_drift, run_map, run_regimes, run_widths
from bandpo.lab.forks.regimes import BASELINE
from bandpo.lab.forks.store import Store
from bandpo.lab.forks.summary import (
    summarise_confirmation,
    summarise_drift,
    summarise_map,
    summarise_moves,
    summarise_regimes,
    summarise_theory,
    summarise_widths,
)
from bandpo.lab.forks.training import MEASURES, MOVES, Optimizer
from bandpo.lab.forks.widths import width_values

_RUNS: Mapping[str, Callable[[Preset, Store], Any]] = {
    "drift": run_drift,
    "regimes": run_regimes,
    "widths": run_widths,
    "map": run_map,
    "confirmation": run_confirmation,
}
_SUMMARIES: Mapping[str, Callable[[Any], Any]] = {
    "drift": summarise_drift,
    "regimes": summarise_regimes,
    "widths": summarise_widths,
    "map": summarise_map,
    "confirmation": summarise_confirmation,
}
PARTS = tuple(_RUNS)
"""The parts of a study, in the order in which they are run."""


def lab_forks(options: argparse.Namespace) -> dict[str, Any]:
    """Run the study. The output folder gets forks.json, an SVG file for each figure, and cells/ with a file for each run.

    Args:
        options: The options of `bandpo lab forks`.

    Returns:
        The content of forks.json.

    Raises:
        ValueError: If an option has a value that is not allowed.
    """
    if options.device != "cpu":
        raise ValueError(
            f"--device {options.device}: bandpo lab forks runs small tables in float64; choose --device cpu"
        )
    if options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {options.jobs}")
    parts = _chosen("--only", options.only, PARTS)
    preset = _restricted(PRESETS[options.preset], options)
    progress = Progress()
    folder: Path = options.output
    with released(claim_output(folder)):
        store = Store(folder / "cells", progress.say, options.jobs)
        found = summarise(results(preset, store, parts))
        content = {
            **about(),
            "bandpo": bandpo.__version__,
            "preset": options.preset,
            "runs": store.made + store.found,
            "cpu_seconds": store.seconds,
            **found,
        }
        write_json(folder / "forks.json", finite_or_null(content), indent=None)
        for name, picture in draw(found).items():
            write_text(folder / f"{name}.svg", picture)
            progress.say(f"figure: {folder / f'{name}.svg'}")
    progress.say(f"{store.made} runs made, {store.found} found from before; {folder / 'forks.json'}")
    return content


def _restricted(preset: Preset, options: argparse.Namespace) -> Preset:
    """The preset with the regimes, arms and optimisers that the options name."""
    regimes = _chosen("--regimes", options.regimes, [*dict.fromkeys((*preset.regimes, *preset.width_regimes))])
    arms = _chosen("--arms", options.arms, preset.arms)
    if BASELINE not in arms:
        raise ValueError(f"--arms {','.join(arms)}: all arms are compared with {BASELINE}; name it too")
    return replace(
        preset,
        regimes=tuple(x for x in preset.regimes if x in regimes),
        width_regimes=tuple(x for x in preset.width_regimes if x in regimes),
        confirmation_regimes=tuple(x for x in preset.confirmation_regimes if x in regimes),
        confirmation_arms=tuple(x for x in preset.confirmation_arms if x in arms),
        arms=arms,
        optimizers=cast("tuple[Optimizer, ...]", _chosen("--optimizers", options.optimizers, preset.optimizers)),
    )


def _chosen(option: str, given: str | None, known: Sequence[str]) -> tuple[str, ...]:
    """The names of an option, in the order of the known ones; all of them where it is not given."""
    names = [*known] if given is None else [x.strip() for x in given.split(",")]
    if unknown := [x for x in names if x not in known]:
        raise ValueError(f"{option} {','.join(unknown)}: choose from {', '.join(known)}")
    return tuple(x for x in known if x in names)


def results(preset: Preset, store: Store, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """What the runs of a study gave, by part, with the values of each seed.

    Args:
        preset: What the study contains.
        store: The results of runs.
        parts: Names in `PARTS`.
    """
    return {name: run(preset, store) for name, run in _RUNS.items() if name in parts}


def summarise(found: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of the theory, and the summaries of the parts of a study.

    Args:
        found: Result of `results`.
    """
    summary: dict[str, Any] = {"theory": summarise_theory()}
    if "regimes" in found:
        summary["moves"] = summarise_moves(found["regimes"])
    return {**summary, **{name: _SUMMARIES[name](part) for name, part in found.items()}}


def values_of(found: Mapping[str, Any]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """The values of each report seed, `values[place][arm][measure]`; the same position is the same seed in every arm.

    The places are, for a regime R and an optimiser O (`adam` or `sgd`):

    * `R/O`: each arm at its own rate, but in `noise`, where no rate is better than another one, at the baseline's;
    * `R/O/same-rate`: every arm at the baseline's rate;
    * `moves/R`: the same runs by Adam, with how far updates move rare tokens (`MOVES`);
    * `R/confirmation`: each arm at its own rate, by Adam, on fresh seeds;
    * `R/confirmation/same-rate`: the band and its upper half at the baseline's rate on these seeds;
    * `width/R`: the families `radius`, `upper`, `eps` and `two`, with `area` and `best`, the best of `TRIALS` cells, by Adam.

    A run that diverged has NaN. Arms of `bandpo.lab.forks.plan.SLOW` have fewer seeds, the first ones of the others.

    Args:
        found: Result of `results`.
    """
    values: dict[str, dict[str, dict[str, list[float]]]] = {}
    for place, arms in found.get("regimes", {}).items():
        regime, _, optimizer = place.partition("/")
        ways = {way: {arm: row[way]["final"] for arm, row in arms.items()} for way in ("own", "same")}
        values[place] = _only(ways["own"], MEASURES)
        values[f"{place}/same-rate"] = _only(ways["same"], MEASURES)
        if optimizer == "adam":
            values[f"moves/{regime}"] = _only(ways["same"], MOVES)
    for regime, arms in found.get("confirmation", {}).items():
        for way, place in (("own", f"{regime}/confirmation"), ("same", f"{regime}/confirmation/same-rate")):
            values[place] = _only({arm: row[way]["final"] for arm, row in arms.items() if way in row}, MEASURES)
    widths = width_values(found.get("widths", {}))
    return {**values, **{f"width/{place.partition('/')[0]}": families for place, families in widths.items()}}


def _only(arms: Mapping[str, Mapping[str, list[float]]], measures: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    return {arm: {measure: row[measure] for measure in measures} for arm, row in arms.items()}
