"""The parts of a study of forks: which runs they need, and how rates are chosen.

Rates are chosen on tuning seeds by the mean reward over training, from a grid that is extended while its best cell is at an
end. The report is made on other seeds, in two ways: each arm at its own rate, and every arm at the baseline's rate.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np

from bandpo.lab.forks.policy import Fork
from bandpo.lab.forks.regimes import ARMS, BASELINE, DRIFT, FACTORS, NOISE, REGIMES, families, mixed
from bandpo.lab.forks.store import Cell, Result, Store
from bandpo.lab.forks.training import Optimizer, Schedule
from bandpo.lab.forks.widths import TRIALS

TUNING_SEED, REPORT_SEED, CONFIRMATION_SEED = 1_000, 30_000, 40_000
"""Seeds of the generators: what is tuned on never enters the report, and the confirmation has seeds that no run of the regimes
had when it was planned. Block number i of the report has the seed `REPORT_SEED + i`."""
BLOCK = 64
"""Seeds that one run of the report trains together: they share a generator."""
_FACTOR: dict[Optimizer, float] = {"adam": 2.0, "sgd": 4.0}
_EXTENSIONS = 6
_RATE_OF = {"noise": "noisy"}
"""Regimes without a reward to choose a rate by, and the regime whose baseline gives all arms their rate."""
SLOW = ("troll",)
"""Arms that take minutes for a run. They are not tuned and have the baseline's rate in both ways; they are run in
`Preset.slow_regimes` only, on the first block of seeds, by Adam."""
Key = TypeVar("Key")
_MAIN = ("grpo", "clip-higher", "bandpo-kl", "bandpo-kl-upper", "bandpo-kl-lower", "no-clip")


@dataclass(frozen=True)
class Preset:
    """What a study contains.

    Args:
        regimes: Names in `REGIMES`.
        slow_regimes: Those of them in which the arms of `SLOW` are run.
        arms: Names in `ARMS`; the baseline is among them.
        optimizers: `adam`, `sgd`.
        rates: First grid of learning rates of each optimiser.
        rollouts: Rollouts of a run.
        seeds: Seeds of the report: a multiple of `BLOCK`, or fewer than one block.
        tuning_seeds: Seeds on which rates are chosen.
        map_seeds: Seeds of a cell of the map, like `seeds`.
        shares: Shares of good options among the rare ones, of the map.
        reuse: Epochs and mini-batches of the map.
        flips: Chances of a wrong reward, of the map.
        map_arms: Arms of the map.
        width_regimes: Regimes of the study of widths.
        width_factors: Widths as multiples of the default.
        width_rates: Learning rates of the study of widths, by Adam.
        width_seeds: Seeds of one of its cells, like `seeds`.
        drift_seeds: Seeds of the study of drift.
        drift_rates: Optimisers and rates of the study of drift.
        confirmation_regimes: Names in `REGIMES`, of the confirmation by Adam at each arm's own rate.
        confirmation_arms: Arms of the confirmation; the baseline is among them.
        confirmation_seeds: Seeds of the confirmation, like `seeds`.

    Raises:
        ValueError: If a number of seeds cannot be split into blocks, or the study of widths has too few cells.
    """

    regimes: tuple[str, ...] = tuple(REGIMES)
    slow_regimes: tuple[str, ...] = ()
    arms: tuple[str, ...] = tuple(ARMS)
    optimizers: tuple[Optimizer, ...] = ("adam", "sgd")
    rates: dict[Optimizer, tuple[float, ...]] = field(
        default_factory=lambda: {"adam": (0.05, 0.1, 0.2), "sgd": (4.0, 16.0, 64.0)}
    )
    rollouts: int = 60
    seeds: int = 192
    tuning_seeds: int = 16
    map_seeds: int = 64
    shares: tuple[float, ...] = (0.05, 0.2, 0.4, 0.7)
    reuse: tuple[tuple[int, int], ...] = ((1, 4), (2, 8), (4, 8))
    flips: tuple[float, ...] = (0.0, 0.25)
    map_arms: tuple[str, ...] = _MAIN
    width_regimes: tuple[str, ...] = ("needle", "diversity", "noisy", "race")
    width_factors: tuple[float, ...] = FACTORS
    width_rates: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8)
    width_seeds: int = 64
    drift_seeds: int = 256
    drift_rates: tuple[tuple[Optimizer, float], ...] = (("sgd", 1.0), ("sgd", 4.0), ("adam", 0.02))
    confirmation_regimes: tuple[str, ...] = tuple(REGIMES)
    confirmation_arms: tuple[str, ...] = _MAIN
    confirmation_seeds: int = 1408

    def __post_init__(self) -> None:
        for name in ("seeds", "map_seeds", "width_seeds", "confirmation_seeds"):
            value = getattr(self, name)
            if value < 1 or (value > BLOCK and value % BLOCK):
                raise ValueError(f"{name}: must be a multiple of {BLOCK}, or fewer than {BLOCK}; got {value}")
        if self.width_regimes and len(self.width_factors) * len(self.width_rates) < TRIALS:
            raise ValueError(f"width_factors x width_rates: at least {TRIALS} cells, got {self!r}")


PRESETS = {
    "smoke": Preset(
        regimes=("diversity", "noise"),
        arms=("grpo", "bandpo-kl", "bandpo-kl-upper"),
        optimizers=("adam",),
        rates={"adam": (0.05,)},
        rollouts=4,
        seeds=8,
        tuning_seeds=4,
        map_seeds=8,
        shares=(0.2,),
        reuse=((1, 4),),
        flips=(0.0,),
        map_arms=("grpo", "bandpo-kl-upper"),
        width_regimes=("noisy",),
        width_factors=(0.5, 1.0),
        width_rates=(0.05, 0.1),
        width_seeds=8,
        drift_seeds=8,
        drift_rates=(("sgd", 1.0),),
        confirmation_regimes=("diversity", "noise"),
        confirmation_arms=("grpo", "bandpo-kl", "bandpo-kl-upper"),
        confirmation_seeds=8,
    ),
    "quick": Preset(
        arms=_MAIN,
        optimizers=("adam",),
        seeds=64,
        shares=(0.05, 0.7),
        reuse=((1, 4), (2, 8)),
        map_arms=("grpo", "clip-higher", "bandpo-kl", "bandpo-kl-upper"),
        width_regimes=("noisy",),
        width_factors=(0.25, 1.0, 4.0),
        width_rates=(0.05, 0.1, 0.2),
        width_seeds=16,
        drift_seeds=64,
        drift_rates=(("sgd", 1.0),),
        confirmation_seeds=64,
    ),
    "full": Preset(slow_regimes=("noisy",)),
}
"""The studies by name."""


def report_cells(
    part: str, fork: Fork, arm: str, schedule: Schedule, rate: float, seeds: int, first: int = REPORT_SEED
) -> list[Cell]:
    """The runs of one arm for the report: a block of seeds each, whose numbers are the same for every arm.

    Args:
        part: Part of the study, and the problem in it, for messages.
        fork: The problem.
        arm: A name that `objective_of` knows.
        schedule: How the policy is trained.
        rate: Learning rate.
        seeds: Number of seeds of all blocks.
        first: Seed of the generator of the first block.
    """
    size = min(seeds, BLOCK)
    return [Cell(part, fork, arm, schedule, rate, size, first + i) for i in range(seeds // size)]


def joined(results: Sequence[Result]) -> Result:
    """The results of several blocks of seeds as one.

    Args:
        results: The results, of blocks of equal size.
    """
    final = {name: [x for result in results for x in result["final"][name]] for name in results[0]["final"]}
    curves = {name: np.mean([result[name] for result in results], 0).tolist() for name in ("curve", "entropies")}
    moves = {
        name: np.mean(np.array([result["moves"][name] for result in results], float), 0).tolist()
        for name in results[0]["moves"]
    }
    return {"final": final, **curves, "moves": moves}


def report(store: Store, what: str, wanted: Mapping[Key, Sequence[Cell]]) -> dict[Key, Result]:
    """The results of many arms, each over all of its blocks.

    Args:
        store: The results.
        what: The work in a few words, for messages.
        wanted: The runs of each arm.
    """
    results = iter(store.results(what, [cell for cells in wanted.values() for cell in cells]))
    return {key: joined([next(results) for _ in cells]) for key, cells in wanted.items()}


def tuned_rates(
    store: Store, what: str, cells: Mapping[Key, Cell], rates: Mapping[Optimizer, Sequence[float]]
) -> dict[Key, float]:
    """For each cell the rate with the highest mean reward over training, on the tuning seeds.

    While the best rate is at an end of the grid, the grid grows there by the optimiser's factor, six times at most.

    Args:
        store: The results.
        what: The work in a few words, for messages.
        cells: The cells, whose rates are replaced.
        rates: First grid of each optimiser.

    Returns:
        The chosen rates.
    """
    speeds: dict[Key, dict[float, float]] = {key: {} for key in cells}
    wanted: dict[Key, list[float]] = {key: [*rates[cell.schedule.optimizer]] for key, cell in cells.items()}
    for _ in range(1 + _EXTENSIONS):
        tried = [(key, rate) for key, more in wanted.items() for rate in more]
        if not tried:
            break
        results = store.results(what, [cells[key]._replace(rate=rate) for key, rate in tried])
        for (key, rate), result in zip(tried, results, strict=True):
            speeds[key][rate] = _speed(result)
        wanted = {
            key: _beyond(speeds[key], _FACTOR[cell.schedule.optimizer])
            for key, cell in cells.items()
            if len(rates[cell.schedule.optimizer]) > 1
        }
    return {key: _best(found) for key, found in speeds.items()}


def _best(speeds: Mapping[float, float]) -> float:
    return max(speeds, key=lambda rate: speeds[rate])


def _beyond(speeds: Mapping[float, float], factor: float) -> list[float]:
    """The next rate, where the best one is at an end of the grid."""
    best = _best(speeds)
    return [best * factor] if best == max(speeds) else [best / factor] if best == min(speeds) else []


def _speed(result: Result) -> float:
    value = float(np.mean(cast("list[float]", result["final"]["speed"])))
    return value if math.isfinite(value) else -math.inf


def run_regimes(preset: Preset, store: Store) -> dict[str, Any]:
    """Each regime and optimiser: for each arm its rate, and its values at that rate and at the baseline's."""
    places: list[tuple[str, Optimizer]] = [(r, optimizer) for optimizer in preset.optimizers for r in preset.regimes]
    rates = _rates(preset, store, places, preset.arms)
    wanted = {
        (regime, optimizer, arm, way): report_cells(
            f"{regime}, {optimizer}",
            REGIMES[regime],
            arm,
            Schedule(rollouts=preset.rollouts, optimizer=optimizer),
            rate,
            min(preset.seeds, BLOCK) if arm in SLOW else preset.seeds,
        )
        for regime, optimizer in places
        for arm in _arms(preset, regime, optimizer)
        for way, rate in (("own", rates[regime, optimizer, arm]), ("same", rates[regime, optimizer, BASELINE]))
    }
    results = report(store, "regimes", wanted)
    return {
        f"{regime}/{optimizer}": {
            arm: {
                "rate": rates[regime, optimizer, arm],
                **{way: results[regime, optimizer, arm, way] for way in ("own", "same")},
            }
            for arm in _arms(preset, regime, optimizer)
        }
        for regime, optimizer in places
    }


def _arms(preset: Preset, regime: str, optimizer: Optimizer) -> list[str]:
    slow = regime in preset.slow_regimes and optimizer == "adam"
    return [arm for arm in preset.arms if slow or arm not in SLOW]


def _rates(
    preset: Preset, store: Store, places: Sequence[tuple[str, Optimizer]], arms: Sequence[str]
) -> dict[tuple[str, Optimizer, str], float]:
    """The chosen rate of each arm in each place."""
    sources: list[tuple[str, Optimizer, bool]] = [
        (_RATE_OF.get(regime, regime), optimizer, regime in _RATE_OF) for regime, optimizer in places
    ]
    cells = {
        (regime, optimizer, arm): Cell(
            f"{regime}, {optimizer}, tuning",
            REGIMES[regime],
            arm,
            Schedule(rollouts=preset.rollouts, optimizer=optimizer),
            0.0,
            preset.tuning_seeds,
            TUNING_SEED,
        )
        for regime, optimizer, taken in sources
        for arm in ((BASELINE,) if taken else arms)
        if arm not in SLOW
    }
    found = tuned_rates(store, "rates of the regimes", cells, preset.rates)
    return {
        (regime, optimizer, arm): found[like, optimizer, BASELINE if taken or arm in SLOW else arm]
        for (regime, optimizer), (like, _, taken) in zip(places, sources, strict=True)
        for arm in arms
    }


def run_confirmation(preset: Preset, store: Store) -> dict[str, Any]:
    """Each regime of the confirmation, by Adam: for each arm its rate, and its values at that rate on fresh seeds.

    The band and its upper half have their values at the baseline's rate too.
    """
    arms, schedule = preset.confirmation_arms, Schedule(rollouts=preset.rollouts)
    rates = _rates(preset, store, [(regime, "adam") for regime in preset.confirmation_regimes], arms)
    wanted = {
        (regime, arm, way): report_cells(
            f"{regime}, confirmation",
            REGIMES[regime],
            arm,
            schedule,
            rates[regime, "adam", arm if way == "own" else BASELINE],
            preset.confirmation_seeds,
            CONFIRMATION_SEED,
        )
        for regime in preset.confirmation_regimes
        for arm, way in [*((arm, "own") for arm in arms), *((arm, "same") for arm in _at_one_rate(preset))]
    }
    results = report(store, "confirmation", wanted)
    return {
        regime: {
            arm: {
                "rate": rates[regime, "adam", arm],
                **{way: results[regime, arm, way] for way in ("own", "same") if (regime, arm, way) in results},
            }
            for arm in arms
        }
        for regime in preset.confirmation_regimes
    }


def _at_one_rate(preset: Preset) -> list[str]:
    """The arms of the confirmation that are also run at the rate of the baseline."""
    return [arm for arm in (BASELINE, "bandpo-kl", "bandpo-kl-upper") if arm in preset.confirmation_arms]


def run_map(preset: Preset, store: Store) -> list[dict[str, Any]]:
    """Each cell of the map, by Adam: share of good options, steps for each rollout, wrong rewards, and each arm's values."""
    places = {
        (share, schedule.steps, flip): (mixed(share, flip), schedule)
        for flip in preset.flips
        for epochs, minibatches in preset.reuse
        for schedule in (Schedule(rollouts=preset.rollouts, epochs=epochs, minibatches=minibatches),)
        for share in preset.shares
    }
    part = "map, share {:g}, {} steps, {:g} wrong".format
    cells = {
        (place, arm): Cell(part(*place), fork, arm, schedule, 0.0, preset.tuning_seeds, TUNING_SEED)
        for place, (fork, schedule) in places.items()
        for arm in preset.map_arms
    }
    rates = tuned_rates(store, "rates of the map", cells, preset.rates)
    wanted = {
        (place, arm): report_cells(part(*place), places[place][0], arm, places[place][1], rate, preset.map_seeds)
        for (place, arm), rate in rates.items()
    }
    results = report(store, "map", wanted)
    return [
        {
            **dict(zip(("share", "steps", "flip"), place, strict=True)),
            "arms": {arm: {"rate": rates[place, arm], "own": results[place, arm]} for arm in preset.map_arms},
        }
        for place in places
    ]


def run_widths(preset: Preset, store: Store) -> dict[str, Any]:
    """Each regime by Adam: every width of every family at every rate, with the speed on the tuning seeds and the final mean."""
    schedule = Schedule(rollouts=preset.rollouts)
    found = families(preset.width_factors)
    widths = [*dict.fromkeys(width for family in found.values() for width in family)]
    grid = [(regime, width, rate) for regime in preset.width_regimes for width in widths for rate in preset.width_rates]
    wanted = {
        **{
            ("tuning", *at): [
                Cell(f"widths, {at[0]}", REGIMES[at[0]], at[1], schedule, at[2], preset.tuning_seeds, TUNING_SEED)
            ]
            for at in grid
        },
        **{
            ("report", *at): report_cells(
                f"widths, {at[0]}", REGIMES[at[0]], at[1], schedule, at[2], preset.width_seeds
            )
            for at in grid
        },
    }
    results = report(store, "widths", wanted)
    return {
        f"{regime}/adam": {
            name: [
                {
                    "width": width,
                    "rate": rate,
                    "tuning": _speed(results["tuning", regime, width, rate]),
                    "mean": results["report", regime, width, rate]["final"]["mean"],
                }
                for width in family
                for rate in preset.width_rates
            ]
            for name, family in found.items()
        }
        for regime in preset.width_regimes
    }


def run_drift(preset: Preset, store: Store) -> dict[str, Any]:
    """The entropy of one fork on each seed after 40 rollouts of 64 tokens and 16 steps under pure noise, by interval."""
    rollouts = min(40, preset.rollouts)
    cells = {
        (f"{optimizer} {rate:g}", x.label): Cell(
            f"drift, {optimizer}",
            NOISE,
            x.label,
            Schedule(rollouts=rollouts, queries=1, group=64, epochs=16, minibatches=1, optimizer=optimizer),
            rate,
            preset.drift_seeds,
            REPORT_SEED,
        )
        for optimizer, rate in preset.drift_rates
        for x in DRIFT
    }
    results = dict(zip(cells, store.results("drift", [*cells.values()]), strict=True))
    return {
        f"{optimizer} {rate:g}": {x.label: results[f"{optimizer} {rate:g}", x.label]["final"]["entropy"] for x in DRIFT}
        for optimizer, rate in preset.drift_rates
    }
