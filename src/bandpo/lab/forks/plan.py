"""The cells of a study of forks: which runs it needs, where their results are kept, and how rates are chosen.

Rates are chosen on tuning seeds by the mean reward over training, from a grid that is extended while its best cell is at an
end. The report is made on other seeds, in two ways: each arm at its own rate, and every arm at the baseline's rate.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from bandpo._system.bounded import parse_json, read_regular
from bandpo._system.files import write_json
from bandpo.bounds import Clip
from bandpo.lab.forks.policy import Fork
from bandpo.lab.forks.regimes import ARMS, BASELINE, REGIMES, aligned, mixed
from bandpo.lab.forks.training import Optimizer, Schedule, train
from bandpo.objective import Objective

TUNING_SEED, REPORT_SEED = 1_000, 2_000
"""Seeds of the generators: what is tuned on never enters the report."""
_FACTOR: dict[Optimizer, float] = {"adam": 2.0, "sgd": 4.0}
_EXTENSIONS = 6
_FORMAT = 1
"""Raised when the content of a result changes, so that older results are made anew."""
_TUNED_LIKE = {"noise": "noisy"}
"""Regimes without a reward to choose a rate by, and the regime whose rate they take."""
SLOW = ("troll",)
"""Arms that take minutes for a run. They are not tuned and have the baseline's rate in both ways."""


class Interval(NamedTuple):
    """A fixed interval of the ratio in the study of drift.

    Args:
        lower: l.
        upper: u.
    """

    lower: float
    upper: float

    @property
    def label(self) -> str:
        """The interval as it is printed."""
        return f"[{self.lower:g}, {'∞' if self.upper == float('inf') else f'{self.upper:g}'}]"

    def objective(self) -> Objective:
        """PPO's clip to the interval."""
        return aligned(Objective(bounds=Clip(1 - self.lower, self.upper - 1)), self.label)


_INF = float("inf")
DRIFT = tuple(
    Interval(*edges)
    for edges in (
        *((0.8, u) for u in (1.1, 1.15, 1.2, 1.25, 1.28, 1.5, _INF)),
        *((0.5, u) for u in (1.5, 1.755, 2.0)),
        *((0.0, u) for u in (1.2, _INF)),
    )
)
"""The intervals of the study of drift."""

NOISE = Fork(certain=0, good=1, rare=0.1 / 63, common_solves=8, good_solves=8, flip=0.5, even=True)
"""One fork and rewards that are coin flips: the problem of the study of drift."""


@dataclass(frozen=True)
class Preset:
    """What a study contains.

    Args:
        regimes: Names in `REGIMES`.
        arms: Names in `ARMS`; the baseline is among them.
        optimizers: `adam`, `sgd`.
        rates: First grid of learning rates of each optimiser.
        rollouts: Rollouts of a run.
        seeds: Seeds of the report.
        tuning_seeds: Seeds on which rates are chosen.
        shares: Shares of good options among the rare ones, of the map.
        reuse: Epochs and mini-batches of the map.
        flips: Chances of a wrong reward, of the map.
        map_arms: Arms of the map.
        drift_seeds: Seeds of the study of drift.
        drift_rates: Optimisers and rates of the study of drift.
    """

    regimes: tuple[str, ...] = tuple(REGIMES)
    arms: tuple[str, ...] = tuple(ARMS)
    optimizers: tuple[Optimizer, ...] = ("adam", "sgd")
    rates: dict[Optimizer, tuple[float, ...]] = field(
        default_factory=lambda: {"adam": (0.025, 0.05, 0.1), "sgd": (4.0, 16.0, 64.0)}
    )
    rollouts: int = 60
    seeds: int = 64
    tuning_seeds: int = 16
    shares: tuple[float, ...] = (0.05, 0.2, 0.4, 0.7)
    reuse: tuple[tuple[int, int], ...] = ((1, 4), (2, 8), (8, 8))
    flips: tuple[float, ...] = (0.0, 0.25)
    map_arms: tuple[str, ...] = (
        *("grpo", "clip-higher", "bandpo-kl", "bandpo-kl-upper"),
        *("bandpo-kl-lower", "no-clip"),
    )
    drift_seeds: int = 256
    drift_rates: tuple[tuple[Optimizer, float], ...] = (("sgd", 1.0), ("sgd", 4.0), ("adam", 0.02))


_SHORT = (
    *("grpo", "clip-higher", "dcpo", "bandpo-kl", "bandpo-kl-upper", "bandpo-kl-lower"),
    *("neutral", "no-clip"),
)

PRESETS = {
    "smoke": Preset(
        regimes=("diversity", "noise"),
        arms=("grpo", "bandpo-kl", "bandpo-kl-upper"),
        optimizers=("adam",),
        rates={"adam": (0.05,)},
        rollouts=4,
        seeds=8,
        tuning_seeds=4,
        shares=(0.2,),
        reuse=((1, 4),),
        flips=(0.0,),
        map_arms=("grpo", "bandpo-kl-upper"),
        drift_seeds=8,
        drift_rates=(("sgd", 1.0),),
    ),
    "quick": Preset(
        arms=_SHORT,
        optimizers=("adam",),
        shares=(0.05, 0.2, 0.7),
        reuse=((1, 4), (2, 8)),
        map_arms=("grpo", "clip-higher", "bandpo-kl", "bandpo-kl-upper", "bandpo-kl-lower"),
    ),
    "full": Preset(),
}
"""The studies by name."""


class Cell(NamedTuple):
    """One run of a number of seeds.

    Args:
        part: Part of the study, and the problem in it, for messages.
        fork: The problem.
        arm: Name of the arm, or the label of an interval.
        schedule: How the policy is trained.
        rate: Learning rate.
        seeds: Number of seeds.
        seed: Seed of the generator.
    """

    part: str
    fork: Fork
    arm: str
    schedule: Schedule
    rate: float
    seeds: int
    seed: int

    def describe(self) -> dict[str, Any]:
        """All that decides the result, as JSON has it."""
        found = {
            "format": _FORMAT,
            "fork": asdict(self.fork),
            "arm": self.arm,
            "schedule": asdict(self.schedule),
            "rate": self.rate,
            "seeds": self.seeds,
            "seed": self.seed,
            "objective": _spelled(self.objective()),
        }
        return json.loads(json.dumps(found))

    def objective(self) -> Objective:
        """The objective of the arm."""
        if self.arm in ARMS:
            return ARMS[self.arm]
        return next(x for x in DRIFT if x.label == self.arm).objective()


def _spelled(objective: Objective) -> str:
    """Bounds and surrogate as text that is the same in every process: the repr of a function has its address."""
    surrogate: Any = objective.surrogate
    return f"{objective.bounds!r}, {getattr(surrogate, '__name__', surrogate)!s}"


class Store:
    """The results of cells in a folder, one file each; a cell that has its result is not run again.

    Args:
        folder: The folder.
        say: Function that is called with a line for each run that ends.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.made, self.found = 0, 0

    def result(self, cell: Cell) -> dict[str, Any]:
        """The result of a cell, run if it is not there: `final` by measure and seed, `curve`, `entropies`."""
        described = cell.describe()
        name = sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:20]
        path = self.folder / f"{name}.json"
        if path.exists():
            kept = parse_json(read_regular(path), str(path))
            found = cast("dict[str, Any]", kept) if isinstance(kept, dict) else {}
            if found.get("cell") == described:
                self.found += 1
                return found["result"]
        outcome = train(
            cell.fork, cell.objective(), cell.schedule, rate=cell.rate, seeds=cell.seeds, seed=cell.seed
        ).as_json()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"cell": described, "result": outcome}, indent=None)
        self.made += 1
        mean = float(np.mean(cast("list[float]", outcome["final"]["mean"])))
        self.say(f"{cell.part}: {cell.arm}, rate {cell.rate:g}, {cell.seeds} seeds: mean {mean:.3f}")
        return outcome


def tuned_rate(store: Store, cell: Cell, rates: Sequence[float]) -> float:
    """The rate with the highest mean reward over training, on the tuning seeds of a cell.

    While the best rate is at an end of the grid, the grid grows there by the optimiser's factor, six times at most.

    Args:
        store: The results.
        cell: The cell, whose rate is replaced.
        rates: First grid.

    Returns:
        The chosen rate.
    """
    factor = _FACTOR[cell.schedule.optimizer]
    speeds = {rate: _speed(store, cell, rate) for rate in rates}
    for _ in range(_EXTENSIONS if len(rates) > 1 else 0):
        best = max(speeds, key=lambda rate: speeds[rate])
        if best not in (min(speeds), max(speeds)):
            break
        new = best * factor if best == max(speeds) else best / factor
        speeds[new] = _speed(store, cell, new)
    return max(speeds, key=lambda rate: speeds[rate])


def _speed(store: Store, cell: Cell, rate: float) -> float:
    value = float(np.mean(cast("list[float]", store.result(cell._replace(rate=rate))["final"]["speed"])))
    return value if math.isfinite(value) else -math.inf


def run_regimes(preset: Preset, store: Store) -> dict[str, Any]:
    """Each regime and optimiser: for each arm its rate, and its values at that rate and at the baseline's."""
    found: dict[str, Any] = {}
    for optimizer in preset.optimizers:
        schedule = Schedule(rollouts=preset.rollouts, optimizer=optimizer)
        for regime in preset.regimes:
            rates = _rates(preset, store, schedule, regime)
            part = f"{regime}, {optimizer}"
            found[f"{regime}/{optimizer}"] = {
                arm: {
                    "rate": rates[arm],
                    **{
                        way: store.result(Cell(part, REGIMES[regime], arm, schedule, rate, preset.seeds, REPORT_SEED))
                        for way, rate in (("own", rates[arm]), ("same", rates[BASELINE]))
                    },
                }
                for arm in preset.arms
            }
    return found


def _rates(preset: Preset, store: Store, schedule: Schedule, regime: str) -> dict[str, float]:
    """The chosen rate of each arm."""
    like = _TUNED_LIKE.get(regime, regime)
    grid = preset.rates[schedule.optimizer]

    def chosen(arm: str) -> float:
        cell = Cell(
            f"{like}, {schedule.optimizer}, tuning", REGIMES[like], arm, schedule, 0.0, preset.tuning_seeds, TUNING_SEED
        )
        return tuned_rate(store, cell, grid)

    baseline = chosen(BASELINE)
    return {arm: baseline if arm in (BASELINE, *SLOW) else chosen(arm) for arm in preset.arms}


def run_map(preset: Preset, store: Store) -> list[dict[str, Any]]:
    """Each cell of the map, by Adam: share of good options, steps for each rollout, wrong rewards, and each arm's values."""
    found: list[dict[str, Any]] = []
    for flip in preset.flips:
        for epochs, minibatches in preset.reuse:
            schedule = Schedule(rollouts=preset.rollouts, epochs=epochs, minibatches=minibatches)
            for share in preset.shares:
                fork, part = mixed(share, flip), f"map, share {share:g}, {schedule.steps} steps, {flip:g} wrong"
                arms: dict[str, Any] = {}
                for arm in preset.map_arms:
                    cell = Cell(f"{part}, tuning", fork, arm, schedule, 0.0, preset.tuning_seeds, TUNING_SEED)
                    rate = tuned_rate(store, cell, preset.rates["adam"])
                    cell = Cell(part, fork, arm, schedule, rate, preset.seeds, REPORT_SEED)
                    arms[arm] = {"rate": rate, "own": store.result(cell)}
                found.append({"share": share, "steps": schedule.steps, "flip": flip, "arms": arms})
    return found


def run_drift(preset: Preset, store: Store) -> dict[str, Any]:
    """The entropy of one fork on each seed after 40 rollouts of 64 tokens and 16 steps under pure noise, by interval."""
    found: dict[str, Any] = {}
    for optimizer, rate in preset.drift_rates:
        rollouts = min(40, preset.rollouts)
        schedule = Schedule(rollouts=rollouts, queries=1, group=64, epochs=16, minibatches=1, optimizer=optimizer)
        cells = [
            Cell(f"drift, {optimizer}", NOISE, x.label, schedule, rate, preset.drift_seeds, REPORT_SEED) for x in DRIFT
        ]
        found[f"{optimizer} {rate:g}"] = {cell.arm: store.result(cell)["final"]["entropy"] for cell in cells}
    return found
