"""The runs of a study of forks and where their results are kept: a file for each, made by several processes."""

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from bandpo._system.errors import RunError
from bandpo._system.files import finite_or_null, read_checked_json, write_checked_json
from bandpo._system.progress import clock_time
from bandpo.lab.backends import processes
from bandpo.lab.forks.policy import Fork
from bandpo.lab.forks.regimes import objective_of
from bandpo.lab.forks.training import Schedule, train
from bandpo.objective import Objective

_FORMAT = 2
"""Raised when the content of a result changes, so that older results are made anew. A file without a checksum is older too."""
_WORTH = 20_000
"""Optimiser steps that take about as long as several processes take to start."""
_SILENCE = 10.0
"""Seconds between two lines about how far the runs are."""

Result = dict[str, Any]


class Cell(NamedTuple):
    """One run of a number of seeds.

    Args:
        part: Part of the study, and the problem in it, for messages.
        fork: The problem.
        arm: A name that `objective_of` knows.
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
            "objective": _spelled(objective_of(self.arm)),
        }
        return json.loads(json.dumps(found))


def _spelled(objective: Objective) -> str:
    """Bounds and surrogate as text that is the same in every process: the repr of a function has its address."""
    surrogate: Any = objective.surrogate
    return f"{objective.bounds!r}, {getattr(surrogate, '__name__', surrogate)!s}"


def run_cell(cell: Cell) -> Result:
    """The result of one run, with one thread.

    Args:
        cell: The run.
    """
    torch.set_num_threads(1)
    started = time.process_time()
    outcome = train(
        cell.fork, objective_of(cell.arm), cell.schedule, rate=cell.rate, seeds=cell.seeds, seed=cell.seed
    ).as_json()
    return {**outcome, "cpu_seconds": round(time.process_time() - started, 2)}


class Store:
    """The results of cells in a folder, one file each; a cell that has its result is not run again.

    Args:
        folder: The folder.
        say: Function that is called with lines about the progress.
        jobs: Number of processes; 1 runs the cells in this one. The results do not depend on it.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], jobs: int = 1) -> None:
        self.folder, self.say, self.jobs = folder, say, jobs
        self.made, self.found = 0, 0
        self._seconds: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """Seconds of a core that all results took, also those that were found."""
        return round(sum(self._seconds.values()), 1)

    def results(self, what: str, cells: Sequence[Cell]) -> list[Result]:
        """The results of cells, in their order; those that are not there are run first.

        Args:
            what: The work in a few words, for messages.
            cells: The cells; the same one may occur more than once.

        Returns:
            For each cell `final` by measure and seed, `curve`, `entropies` and `moves`.

        Raises:
            RunError: For the first run that fails in a process of its own; the results that were made before it are kept.
        """
        names = [sha256(json.dumps(cell.describe(), sort_keys=True).encode()).hexdigest()[:20] for cell in cells]
        work = dict(zip(names, cells, strict=True))
        kept = {name: self._read(name, cell) for name, cell in work.items()}
        missing = {name: work[name] for name, result in kept.items() if result is None}
        self.found += len(work) - len(missing)
        if missing:
            self.say(f"{what}: {len(missing)} runs to make, {len(work) - len(missing)} are there")
            kept |= self._make(what, missing)
        found = {name: cast("Result", result) for name, result in kept.items()}
        self._seconds |= {name: result["cpu_seconds"] for name, result in found.items()}
        return [found[name] for name in names]

    def _read(self, name: str, cell: Cell) -> Result | None:
        path = self.folder / f"{name}.json"
        if not path.exists():
            return None
        try:
            found = read_checked_json(path, required=True)
            if found["cell"] != cell.describe():
                return None
            return _checked(_with_nan(found["result"]), cell.seeds)
        except (ValueError, KeyError, TypeError, AttributeError):
            self.say(f"  {path} is damaged: the run is made again")
            return None

    def _make(self, what: str, missing: dict[str, Cell]) -> dict[str, Result]:
        self.folder.mkdir(parents=True, exist_ok=True)
        names = {cell: name for name, cell in missing.items()}
        made: dict[str, Result] = {}
        started = said = time.monotonic()
        for cell, result in self._outcomes([*missing.values()]):
            if isinstance(result, Exception):
                run = f"{cell.part}, {cell.arm}, rate {cell.rate:g}, seed {cell.seed}"
                raise RunError(f"{run}: {result}") from result
            content = {"cell": cell.describe(), "result": finite_or_null(result)}
            write_checked_json(self.folder / f"{names[cell]}.json", content)
            made[names[cell]] = _with_nan(result)
            self.made += 1
            now = time.monotonic()
            if now - said > _SILENCE:
                said, left = now, (now - started) / len(made) * (len(missing) - len(made))
                self.say(f"  {what}: {len(made)} of {len(missing)} runs, about {clock_time(left)} left")
        return made

    def _outcomes(self, cells: Sequence[Cell]) -> Iterable[tuple[Cell, Result | Exception]]:
        steps = sum(cell.schedule.rollouts * cell.schedule.steps for cell in cells)
        if self.jobs == 1 or len(cells) == 1 or steps < _WORTH:
            return ((cell, run_cell(cell)) for cell in cells)
        return processes(cells, run_cell, min(self.jobs, len(cells)), self.say)


def _checked(result: Result, seeds: int) -> Result:
    """The result, where each measure has a value for each seed, the time is there, and the start has numbers.

    The start of a run has exact measures, whatever happens later. With numbers there, a value at the end that is not a number
    is that of a run that diverged, and not of one that was never computed.

    Raises:
        ValueError: If it has not.
    """
    if any(len(values) != seeds for values in result["final"].values()) or not result["cpu_seconds"] >= 0:
        raise ValueError("the result does not have a number for each seed")
    if not all(math.isfinite(result[name][0]) for name in ("curve", "entropies")):
        raise ValueError("the result has no numbers of the start")
    return result


def _with_nan(result: Result) -> Result:
    """The result with NaN where JSON has null, or an infinity."""

    def numbers(values: Sequence[float | None]) -> list[float]:
        return [math.nan if x is None or not math.isfinite(x) else x for x in values]

    lists = {part: {name: numbers(x) for name, x in result[part].items()} for part in ("final", "moves")}
    return {**result, **lists}
