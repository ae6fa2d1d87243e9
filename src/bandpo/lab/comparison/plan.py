"""The plan of a comparison: objectives and their arms, tasks, seeds, grids, and the presets."""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, cast

import numpy as np

from bandpo._system.errors import printable
from bandpo.bounds import DCPO, Band, Bounds, Clip
from bandpo.bounds.calibration import match_radius
from bandpo.bounds.combined import change_leaves
from bandpo.bounds.regions import TopK
from bandpo.lab.comparison.aligned import aligned
from bandpo.lab.comparison.devices import device_kind
from bandpo.lab.comparison.loop import Setting
from bandpo.lab.comparison.own import definition_of, is_own, objective_of
from bandpo.objective import Objective
from bandpo.surrogates.stops import stops_outside
from bandpo.zoo import OBJECTIVES

_FORMAT = 3  # part of every hash: raise it when the same configuration gives other numbers
TUNING_SEEDS = 1000
"""The first seed of the tuning; the seeds of the report are below it."""

KL_TARGET = 0.01
"""The target of an arm whose KL penalty adapts, in nats for a token; PPO's paper uses 0.003, 0.01 and 0.03 (its table 1)."""

_USUAL = MappingProxyType({"device": "cpu", "sampler": "eager", "split": "report"})
_ROBUST_SEEDS = 500  # the first seed of the robustness maps
_RATES = MappingProxyType(
    {
        "paths": 4e-4,
        "addition": 3e-4,
        "countdown": 4e-4,
        "chain_sum": 3e-4,
        "sums": 3e-4,
        "letter_counting": 3e-4,
        "detours": 4e-4,
        "traps": 4e-4,
    }
)
_SETTING = MappingProxyType({"prompts": 64, "group": 8, "epochs": 2, "minibatches": 2})
_SIZES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "addition": {"prompts": 32},
        "countdown": {"epochs": 1, "minibatches": 4},
        **{key: {"prompts": 24, "minibatches": 8, "hidden_size": 32, "layers": 1} for key in ("detours", "traps")},
    }
)


@dataclass(frozen=True)
class Plan:
    """The runs of a comparison.

    Args:
        objectives: Names of objectives, or import paths of own ones, "package.module:NAME"; `no-clip` is always compared too.
        tasks: Names of problems.
        seeds: Seeds of the report, below 1000.
        warm_ups: Number of warmed-up models; seed s starts from model s modulo this number, and the tables then count models,
            not seeds. None gives every seed a model of its own.
        rates: Learning rate of each task before tuning.
        tuning_seeds: Number of seeds for tuning; 0 leaves the tuned arms out.
        tuning_rates: Multiples of the rate that are tried.
        tuning_widths: Multiples of ε or δ that are tried.
        ablations: Whether the KL band's halves, radii, caps and relaxation are arms too.
        robust_tasks: Tasks with robustness maps.
        robust_rates: Multiples of the rate for the maps.
        robust_reuse: (epochs, lag) pairs for the maps.
        robust_seeds: Number of seeds of each cell of the maps.
        updates: Rollouts of a run.
        exact_seeds: Number of seeds of the bandit; 0 leaves it out.
        sweep_seeds: Number of seeds of each cell of the bandit's sweeps; 0 leaves them out.
        setting: Other fields of `Setting`, for all tasks.
        sizes: Fields of `Setting` for single tasks.
        device: Device of the runs and of the bandit: `cpu`, `cuda`, or one card as `cuda:0`.
        sampler: `eager`, or `graph` for a CUDA graph of each new token.

    Raises:
        ValueError: If an objective or a task is unknown or cannot be compared, or a seed is out of range.
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
        "troll",
        "no-clip",
    )
    tasks: tuple[str, ...] = ("paths", "addition", "countdown")
    seeds: tuple[int, ...] = tuple(range(10))
    warm_ups: int | None = None
    rates: Mapping[str, float] = field(default_factory=lambda: _RATES)
    tuning_seeds: int = 2
    tuning_rates: tuple[float, ...] = (1.0, 2.0)
    tuning_widths: tuple[float, ...] = (0.3, 1.0, 3.0)
    ablations: bool = True
    robust_tasks: tuple[str, ...] = ()
    robust_rates: tuple[float, ...] = (1.0, 2.0, 4.0)
    robust_reuse: tuple[tuple[int, int], ...] = ((1, 0), (4, 0), (2, 4))
    robust_seeds: int = 2
    updates: int = 30
    exact_seeds: int = 1000
    sweep_seeds: int = 0
    setting: Mapping[str, Any] = field(default_factory=lambda: _SETTING)
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: _SIZES)
    device: str = "cpu"
    sampler: str = "eager"

    def __post_init__(self) -> None:
        for name in self.objectives:
            objective_of(name)
        for task in self.tasks:
            self.setting_of(task)
        if not self.seeds or max(self.seeds) >= TUNING_SEEDS or min(self.seeds) < 0:
            raise ValueError(f"seeds: at least one, from 0 to {TUNING_SEEDS - 1}; got {self.seeds}")
        if self.warm_ups is not None and self.warm_ups < 1:
            raise ValueError(f"warm_ups: at least 1, or None for one of each seed; got {self.warm_ups}")

    def __getstate__(self) -> dict[str, Any]:
        """The fields with plain dictionaries: a `MappingProxyType` cannot be pickled."""
        mappings = {
            name: dict(cast("Mapping[str, Any]", getattr(self, name))) for name in ("rates", "setting", "sizes")
        }
        return {**vars(self), **mappings}

    def warm_up_of(self, seed: int) -> int:
        """The number of the warmed-up model that a seed starts from.

        Args:
            seed: The seed.
        """
        return seed if self.warm_ups is None else seed % self.warm_ups

    def setting_of(self, task: str, **changes: Any) -> Setting:
        """The setting of a task's runs.

        Args:
            task: Name of the task.
            **changes: Fields of `Setting` that differ from the plan's.
        """
        own: dict[str, Any] = {"updates": self.updates, "device": self.device, "sampler": self.sampler}
        return Setting(task, **{**own, **self.setting, **self.sizes.get(task, {}), **changes})


def describe(plan: Plan) -> dict[str, Any]:
    """The fields of the plan as JSON has them, for reports."""
    fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    mappings = {"rates": dict(plan.rates), "setting": dict(plan.setting)}
    return {**fields, **mappings, "sizes": {task: dict(size) for task, size in plan.sizes.items()}}


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
            ("grpo", "bandpo-kl", "no-clip"),
            ("paths",),
            tuple(range(4)),
            tuning_seeds=1,
            tuning_rates=(1.0,),
            tuning_widths=(0.5, 1.0),
            ablations=False,
            updates=4,
            exact_seeds=100,
            setting=_TINY,
            sizes={},
        ),
        "quick": Plan(
            ("grpo", "dapo", "bandpo-kl", "bandpo-tv", "no-clip"),
            ("paths",),
            tuple(range(6)),
            tuning_seeds=1,
            tuning_rates=(1.0,),
            ablations=False,
            updates=18,
        ),
        "paper": Plan(
            ("grpo", "dapo", "dcpo", "bandpo-kl", "bandpo-tv", "bandpo-chi2", "troll"), tuning_seeds=0, sweep_seeds=200
        ),
        "full": Plan(robust_tasks=("addition",), sweep_seeds=200),
    }
)
"""Sizes of a comparison; docs/compare.md has what each takes."""


@dataclass(frozen=True)
class Arm:
    """One of the configurations that are compared: a variant of an objective.

    Args:
        objective: Name of the objective, or the import path of an own one.
        variant: `default`, `matched`, `tuned`, `adaptive` (the β of a KL penalty follows `KL_TARGET`), `aligned` (with the
            aggregation, advantage and anchor of `bandpo.lab.comparison.aligned`), or one of `ABLATIONS`.
        width: Multiple of the objective's own ε or δ.
        rate: Multiple of the task's learning rate.
    """

    objective: str
    variant: str = "default"
    width: float = 1.0
    rate: float = 1.0

    @property
    def kl_target(self) -> float | None:
        """The mean KL(π_old ‖ π) that the β of the arm's KL penalty follows; None for a constant β."""
        return KL_TARGET if self.variant == "adaptive" else None

    @property
    def label(self) -> str:
        """The name of the arm in tables."""
        return self.objective if self.variant == "default" else f"{self.objective} {self.variant}"

    def build(self) -> Objective:
        """The objective of the arm."""
        base = objective_of(self.objective)
        if self.variant == "matched":
            return matched(base)
        if self.variant == "aligned":
            return aligned(base, self.objective)
        if self.variant in HALVES:
            return OBJECTIVES[f"{self.objective}-{self.variant}"]
        if self.variant in _CHANGES:
            assert isinstance(base.bounds, Band)
            return dataclasses.replace(base, bounds=_CHANGES[self.variant](base.bounds))
        return scaled(base, self.width)


HALVES = ("upper", "lower")
"""Halves of a band, objectives of their own in the zoo (`bandpo-kl-upper`); the other side has PPO's ε = 0.2."""

_CHANGES: Mapping[str, Callable[[Band], Band]] = MappingProxyType(
    {
        "relax": lambda band: dataclasses.replace(band, relax=Clip(0.2, 0.28)),
        "cap 2": lambda band: dataclasses.replace(band, max_ratio=2.0),
        "no cap": lambda band: dataclasses.replace(band, max_ratio=None),
        "δ/5": lambda band: dataclasses.replace(band, radius=0.2 * cast(float, band.radius)),
        "4δ": lambda band: dataclasses.replace(band, radius=4 * cast(float, band.radius)),
    }
)

ABLATIONS = (*HALVES, *_CHANGES)
"""Changes of a band that show the effect of each of its parts."""


@dataclass(frozen=True)
class Job:
    """One run of a comparison.

    Args:
        setting: The setting that it shares with other runs.
        arm: The configuration of the objective.
        learning_rate: Learning rate of Adam.
        seed: Seed of prompts, noise and mini-batches.
        warm_up: Number of the warmed-up checkpoint that it starts from.
    """

    setting: Setting
    arm: Arm
    learning_rate: float
    seed: int
    warm_up: int

    @property
    def key(self) -> str:
        """The name of the file of its result, a hash of its configuration; the cards of a machine are one device.

        For an own objective, the configuration has the fingerprint of its definition.
        """
        # For a surrogate that is no clip, `clip_fraction_by_prob` once counted the tokens outside of the interval instead.
        version = _FORMAT if stops_outside(objective_of(self.arm.objective).surrogate) else _FORMAT + 1
        config = asdict(self)
        if is_own(self.arm.objective):
            config["definition"] = definition_of(self.arm.objective).fingerprint
        setting = config["setting"] = {**config["setting"], "device": device_kind(self.setting.device)}
        for name, usual in _USUAL.items():  # the name of a result of the CPU is as it was before there was a choice
            if setting[name] == usual:
                del setting[name]
        decides = json.dumps([version, config], sort_keys=True)
        return hashlib.sha256(decides.encode()).hexdigest()[:20]


def scaled(objective: Objective, factor: float) -> Objective:
    """The objective with all its ε and δ multiplied by a factor; an objective without either is returned unchanged."""

    def wider(bounds: Bounds) -> Bounds:
        if isinstance(bounds, Band | TopK) and isinstance(bounds.radius, int | float):
            return dataclasses.replace(bounds, radius=bounds.radius * factor)
        if isinstance(bounds, DCPO):
            return dataclasses.replace(bounds, low=bounds.low * factor, high=bounds.high * factor)
        if isinstance(bounds, Clip) and bounds.high is not None and math.isfinite(bounds.high):
            return Clip(min(1.0, bounds.low * factor), bounds.high * factor)
        return bounds

    if objective.projection is not None and isinstance(objective.radius, int | float):
        objective = objective.with_radius(objective.radius * factor)
    return dataclasses.replace(objective, bounds=change_leaves(objective.bounds, wider))


def matched(objective: Objective) -> Objective:
    """The objective of a ball, with the radius whose upper bound at p = 0.5 is PPO's 1.2."""
    assert isinstance(objective.bounds, Band) and not isinstance(objective.bounds.divergence, str)
    radius = match_radius(objective.bounds.divergence, like=Clip(0.2), by="upper@0.5")
    return dataclasses.replace(objective, bounds=dataclasses.replace(objective.bounds, radius=radius))


@functools.cache
def cannot_be(arm: Arm) -> str:
    """Why an arm of an own objective cannot be built, such as a radius that its bounds refuse; "" if it can.

    Args:
        arm: An arm; those of named objectives can all be built.
    """
    if not is_own(arm.objective):
        return ""
    try:
        arm.build()
    except Exception as error:  # parts of a user's objective may raise anything
        return printable(str(error) or type(error).__name__)
    return ""


def left_out(plan: Plan) -> list[str]:
    """Lines about the arms of own objectives that cannot be built and are left out."""
    arms = [
        arm
        for name in plan.objectives
        if is_own(name)
        for arm in (Arm(name, "matched"), *(Arm(name, "tuned", width) for width in plan.tuning_widths))
        if arm.variant == "tuned" or isinstance(objective_of(name).bounds, Band)
    ]
    return [
        f"{arm.label}{'' if arm.width == 1 else f', width x{arm.width:g}'}: left out ({why})"
        for arm in arms
        if (why := cannot_be(arm))
    ]


def has_width(objective: str) -> bool:
    """Whether an objective has an ε or a δ that `scaled` changes.

    Args:
        objective: Name or import path.
    """
    base = objective_of(objective)
    try:
        return scaled(base, 2.0) != base
    except ValueError:  # it has one that cannot be twice as wide
        return True


def report_arms(plan: Plan) -> list[Arm]:
    """The arms that need no tuning."""
    arms = [Arm(name) for name in _objectives(plan)]
    arms += [Arm(a.objective, "matched") for a in arms if isinstance(objective_of(a.objective).bounds, Band)]
    arms += [Arm(a.objective, "adaptive") for a in arms if objective_of(a.objective).penalty and a.variant == "default"]
    if "bandpo-kl" in plan.objectives:
        arms += [Arm("bandpo-kl", name) for name in (ABLATIONS if plan.ablations else HALVES)]
    return [arm for arm in arms if not cannot_be(arm)]


def tuning_arms(plan: Plan, objective: str) -> list[Arm]:
    """The tuning grid of one objective. An objective without ε or δ has as many arms, with more rates, spread wider."""
    if has_width(objective):
        arms = [Arm(objective, "tuned", width, rate) for width in plan.tuning_widths for rate in plan.tuning_rates]
        return [arm for arm in arms if not cannot_be(arm)]
    count = len(plan.tuning_widths) * len(plan.tuning_rates)
    rates = np.geomspace(min(plan.tuning_rates) / 2, max(plan.tuning_rates) * 2, count)
    return [Arm(objective, "tuned", 1.0, round(float(rate), 3)) for rate in rates]


def tuning_jobs(plan: Plan, task: str) -> list[Job]:
    """The runs of all tuning grids of a task."""
    seeds = range(TUNING_SEEDS, TUNING_SEEDS + plan.tuning_seeds)
    return [job for name in _objectives(plan) for job in jobs_of(plan, task, tuning_arms(plan, name), seeds)]


def robust_jobs(plan: Plan, task: str) -> dict[tuple[str, float, tuple[int, int]], list[Job]]:
    """The runs of each cell of the robustness maps: objective x learning rate x (epochs, lag)."""
    if task not in plan.robust_tasks:
        return {}
    seeds = range(_ROBUST_SEEDS, _ROBUST_SEEDS + plan.robust_seeds)
    return {
        (name, rate, reuse): jobs_of(plan, task, [Arm(name, rate=rate)], seeds, epochs=reuse[0], lag=reuse[1])
        for name in _objectives(plan)
        for rate in plan.robust_rates
        for reuse in plan.robust_reuse
    }


def jobs_of(plan: Plan, task: str, arms: Iterable[Arm], seeds: Iterable[int], **changes: Any) -> list[Job]:
    """The runs of every arm on every seed.

    Args:
        plan: The plan of the comparison.
        task: Name of the task.
        arms: The arms.
        seeds: The seeds.
        **changes: Fields of `Setting` that differ from the plan's.
    """
    setting = plan.setting_of(task, **changes)
    return [
        Job(setting, arm, plan.rates[task] * arm.rate, seed, plan.warm_up_of(seed)) for arm in arms for seed in seeds
    ]


def _objectives(plan: Plan) -> list[str]:
    return list(dict.fromkeys((*plan.objectives, "no-clip")))
