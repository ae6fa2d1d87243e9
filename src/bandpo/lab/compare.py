"""A fair comparison: every arm through the same code, tuned with the same budget on other seeds, on the same fresh seeds.

Work is cut into stacks of runs that share a setting. Each run leaves one JSON file named by the hash of its configuration, so a
comparison that was interrupted, or is extended, makes only what is missing; a stack that fails leaves its error behind, and the
others go on.
"""

import dataclasses
import functools
import hashlib
import json
import math
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from bandpo.bounds import DCPO, Band, Clip
from bandpo.calibration import match_radius
from bandpo.composition import Objective
from bandpo.lab.loop import Loop, Run, Setting
from bandpo.objectives import OBJECTIVES
from bandpo.regions import Sides

_FORMAT = 1  # part of every hash: raise it when the same configuration gives other numbers
_STACK = 12  # runs in one stack
TUNING_SEEDS = 1000  # tuning uses seeds from here on, the report those below


_RATES = MappingProxyType(
    {"paths": 4e-4, "addition": 2e-4, "countdown": 3e-4, "chain_sum": 3e-4, "letter_counting": 3e-4}
)
_SETTING = MappingProxyType({"prompts": 64, "group": 8, "epochs": 2, "minibatches": 2})


@dataclass(frozen=True)
class Plan:
    """What a comparison runs.

    Args:
        objectives: Names; `no-clip` always belongs.
        tasks: Names of problems.
        seeds: Of the report, below 1000.
        warm_ups: Checkpoints; seed s starts from checkpoint s modulo this.
        rates: Learning rate of each task before tuning.
        tuning_seeds: Seeds for tuning; 0 leaves the tuned arms out.
        tuning_rates: Multiples of the rate that are tried.
        tuning_widths: Multiples of ε or δ that are tried.
        robust_rates: Multiples of the rate for the robustness maps; none, no maps.
        robust_reuse: (epochs, lag) of the maps.
        robust_seeds: Seeds of each of their cells.
        updates: Rollouts of a run.
        exact_seeds: Of the bandit; 0 leaves it out.
        setting: Other fields of `Setting`.
    """

    objectives: tuple[str, ...] = (
        "grpo",
        "dapo",
        "dcpo",
        "bandpo-kl",
        "bandpo-tv",
        "bandpo-chi2",
        "dppo-kl",
        "cfpo",
        "no-clip",
    )
    tasks: tuple[str, ...] = ("paths", "addition", "countdown")
    seeds: tuple[int, ...] = tuple(range(10))
    warm_ups: int = 3
    rates: Mapping[str, float] = field(default_factory=lambda: _RATES)
    tuning_seeds: int = 2
    tuning_rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    tuning_widths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    robust_rates: tuple[float, ...] = ()
    robust_reuse: tuple[tuple[int, int], ...] = ((1, 0), (2, 0), (4, 0), (2, 2), (2, 4))
    robust_seeds: int = 2
    updates: int = 60
    exact_seeds: int = 1000
    setting: Mapping[str, Any] = field(default_factory=lambda: _SETTING)

    def __post_init__(self) -> None:
        for name in self.objectives:
            if name not in OBJECTIVES:
                raise ValueError(f"objectives: {name!r} is unknown; choose from {', '.join(OBJECTIVES)}")
            if OBJECTIVES[name].extras and OBJECTIVES[name].group_stats is None:
                raise ValueError(f"objectives: {name!r} needs {OBJECTIVES[name].extras}, which the lab does not have")
        for task in self.tasks:
            Setting(task, updates=self.updates, **self.setting)
        if not self.seeds or max(self.seeds) >= TUNING_SEEDS or min(self.seeds) < 0:
            raise ValueError(f"seeds: at least one, from 0 to {TUNING_SEEDS - 1}; got {self.seeds}")


def describe(plan: Plan) -> dict[str, Any]:
    """The plan for JSON and for people."""
    fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in fields.items()}


_TINY = MappingProxyType(
    {
        "prompts": 8,
        "group": 4,
        "epochs": 2,
        "minibatches": 2,
        "hidden_size": 32,
        "layers": 1,
        "eval_samples": 4,
        "warm_up_steps": 300,
    }
)

PRESETS: Mapping[str, Plan] = MappingProxyType(
    {
        "smoke": Plan(
            ("grpo", "bandpo-kl", "no-clip"), ("paths",), tuple(range(4)), tuning_seeds=1, tuning_rates=(1.0,),
            tuning_widths=(0.5, 1.0), updates=4, exact_seeds=100, setting=_TINY,
        ),
        "quick": Plan(
            ("grpo", "dapo", "bandpo-kl", "bandpo-tv", "no-clip"), ("paths",), tuple(range(6)), tuning_seeds=1,
            tuning_rates=(1.0,), updates=18,
        ),
        "full": Plan(robust_rates=(0.5, 1.0, 2.0, 4.0)),
    }
)  # fmt: skip
"""Sizes of a comparison: half a minute, some minutes, and (by the count of its runs, not yet timed) an hour and a half."""


@dataclass(frozen=True)
class Arm:
    """A configuration of a method.

    Args:
        objective: Name of the objective it varies.
        variant: `default`, `matched`, `tuned`, `upper`, `lower`.
        width: Multiple of the objective's own ε or δ.
        rate: Multiple of the task's learning rate.
    """

    objective: str
    variant: str = "default"
    width: float = 1.0
    rate: float = 1.0

    @property
    def label(self) -> str:
        """For tables."""
        return self.objective if self.variant == "default" else f"{self.objective} {self.variant}"

    def build(self) -> Objective:
        """The objective itself."""
        base = OBJECTIVES[self.objective]
        if self.variant == "matched":
            return matched(base)
        if self.variant in ("upper", "lower"):
            band, clip = base.bounds, Clip(0.2)
            sides = Sides(clip, band) if self.variant == "upper" else Sides(band, clip)
            return dataclasses.replace(base, bounds=sides)
        return scaled(base, self.width)


@dataclass(frozen=True)
class Job:
    """One run and where its result lies."""

    setting: Setting
    arm: Arm
    learning_rate: float
    seed: int
    warm_up: int

    @property
    def key(self) -> str:
        """Name of its file."""
        decides = json.dumps([_FORMAT, asdict(self)], sort_keys=True)
        return hashlib.sha256(decides.encode()).hexdigest()[:20]


def scaled(objective: Objective, factor: float) -> Objective:
    """The objective with its ε or δ multiplied; one without either is returned as it is."""
    bounds = objective.bounds
    if isinstance(bounds, Band) and isinstance(bounds.radius, float):
        bounds = dataclasses.replace(bounds, radius=bounds.radius * factor)
    elif isinstance(bounds, DCPO):
        bounds = dataclasses.replace(bounds, low=bounds.low * factor, high=bounds.high * factor)
    elif isinstance(bounds, Clip) and bounds.high is not None and math.isfinite(bounds.high):
        bounds = Clip(min(1.0, bounds.low * factor), bounds.high * factor)
    return dataclasses.replace(objective, bounds=bounds)


def matched(objective: Objective) -> Objective:
    """A ball with the radius whose upper bound at p = 0.5 is PPO's 1.2."""
    assert isinstance(objective.bounds, Band) and not isinstance(objective.bounds.divergence, str)
    radius = match_radius(objective.bounds.divergence, like=Clip(0.2), by="upper@0.5")
    return dataclasses.replace(objective, bounds=dataclasses.replace(objective.bounds, radius=radius))


def report_arms(plan: Plan) -> list[Arm]:
    """Arms that need no tuning."""
    arms = [Arm(name) for name in dict.fromkeys((*plan.objectives, "no-clip"))]
    arms += [Arm(a.objective, "matched") for a in arms if isinstance(OBJECTIVES[a.objective].bounds, Band)]
    arms += [Arm("bandpo-kl", side) for side in ("upper", "lower") if "bandpo-kl" in plan.objectives]
    return arms


def tuning_arms(plan: Plan, objective: str) -> list[Arm]:
    """The grid of one objective: all of them have the same number of learning rates, and of widths where they have one."""
    widths = plan.tuning_widths if scaled(OBJECTIVES[objective], 2.0) != OBJECTIVES[objective] else (1.0,)
    return [Arm(objective, "tuned", width, rate) for width in widths for rate in plan.tuning_rates]


def jobs_of(plan: Plan, task: str, arms: Iterable[Arm], seeds: Sequence[int], **changes: Any) -> list[Job]:
    """Every arm on every seed."""
    setting = Setting(task, **{"updates": plan.updates, **plan.setting, **changes})
    return [
        Job(setting, arm, plan.rates[task] * arm.rate, seed, seed % plan.warm_ups) for arm in arms for seed in seeds
    ]


class Study:
    """Runs jobs and reads their results.

    Args:
        folder: Where results lie, one file for each run.
        workers: Processes.
        say: Called with a line now and then.
    """

    def __init__(self, folder: Path, workers: int = 2, say: Callable[[str], None] = print) -> None:
        self.folder, self.workers, self.say = folder, workers, say
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        self.failures: list[str] = []

    def result(self, job: Job) -> dict[str, Any] | None:
        """A run's result, None where it has none."""
        path = self.folder / "runs" / f"{job.key}.json"
        return json.loads(path.read_text())["result"] if path.exists() else None

    def run(self, jobs: Sequence[Job], what: str) -> None:
        """Make the results that are missing."""
        missing = [job for job in dict.fromkeys(jobs) if self.result(job) is None]
        stacks: list[list[Job]] = []
        by_setting: dict[Setting, list[Job]] = {}
        for job in missing:
            by_setting.setdefault(job.setting, []).append(job)
        for group in by_setting.values():
            size = min(_STACK, math.ceil(len(group) / self.workers))
            stacks += [group[i : i + size] for i in range(0, len(group), size)]
        self.say(f"{what}: {len(jobs)} runs, {len(missing)} to make")
        if not stacks:
            return
        started, done = time.monotonic(), 0
        with ProcessPoolExecutor(self.workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
            waiting: dict[Future[None], list[Job]] = {pool.submit(_run_stack, self.folder, s): s for s in stacks}
            for future in as_completed(waiting):
                error = future.exception()
                if error is not None:
                    self.failures.append(f"{what}, {waiting[future][0].arm.label} and others: {error!r}")
                    self.say(f"  failed: {self.failures[-1]}")
                done += len(waiting[future])
                left = (time.monotonic() - started) * (len(missing) - done) / done
                self.say(f"  {done}/{len(missing)} runs, about {left / 60:.1f} min left")

    def tuned(self, plan: Plan, task: str, objective: str) -> Arm | None:
        """The arm of the grid with the best mean@k over the tuning seeds, the first of equals."""
        seeds = range(TUNING_SEEDS, TUNING_SEEDS + plan.tuning_seeds)
        means: dict[Arm, float] = {}
        for arm in tuning_arms(plan, objective):
            found = [self.result(job) for job in jobs_of(plan, task, [arm], list(seeds))]
            if found and all(r is not None for r in found):
                means[arm] = float(np.mean([score(r) for r in found if r is not None]))
        return max(means, key=means.__getitem__) if means else None


def score(result: Mapping[str, Any]) -> float:
    """What tuning maximises: mean@k at the end."""
    return next(v for k, v in result["after"].items() if k.startswith("mean@"))


def _one_thread() -> None:
    torch.set_num_threads(1)


def _run_stack(folder: Path, jobs: list[Job]) -> None:
    try:
        runs = [Run(_objective(job.arm), job.learning_rate, job.seed, job.warm_up) for job in jobs]
        results = Loop(jobs[0].setting, runs).train()
    except Exception:
        (folder / "runs" / f"{jobs[0].key}.error").write_text(traceback.format_exc())
        raise
    for job, result in zip(jobs, results, strict=True):
        path = folder / "runs" / f"{job.key}.json"
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps({"config": asdict(job), "result": asdict(result)}))
        aside.replace(path)
    (folder / "runs" / f"{jobs[0].key}.error").unlink(missing_ok=True)


@functools.lru_cache
def _objective(arm: Arm) -> Objective:
    return arm.build()
