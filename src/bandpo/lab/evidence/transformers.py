"""The runs of small transformers: rates chosen on seeds, warm-ups and prompts of their own, then the runs of the report.

Every seed starts from a warm-up of its own. The rate of each arm is the one with the highest mean reward over training on the
tuning seeds, from a grid that is the same for every arm and grows while the best rate is at an end. Each run leaves one file,
so that an interrupted study makes only what is missing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np

from bandpo.lab.comparison.loop import Setting
from bandpo.lab.comparison.plan import Arm, Job
from bandpo.lab.comparison.study import Study, diverged
from bandpo.lab.evidence.protocol import Protocol
from bandpo.metrics import PROB_BINS
from bandpo.statistics import t_interval

Values = dict[str, dict[str, dict[str, list[float]]]]
"""Numbers by place, arm, measure and seed."""

Results = Sequence[Mapping[str, Any]]
"""The results of some runs, each with the fields of `bandpo.lab.comparison.loop.Result`."""

ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        "grpo": Arm("grpo", "aligned"),
        "clip-higher": Arm("dapo", "aligned"),
        "bandpo-kl": Arm("bandpo-kl", "aligned"),
        "bandpo-kl-upper": Arm("bandpo-kl-upper", "aligned"),
        "bandpo-kl-lower": Arm("bandpo-kl-lower", "aligned"),
        "no-clip": Arm("no-clip", "aligned"),
    }
)
"""The arms by name: bounds and surrogate of the zoo, one aggregation, one advantage, one anchor."""

BASELINE = "grpo"
"""The arm that the others are compared with."""

MEASURES = ("mean", "passed", "entropy", "speed")
"""The measures of a run: mean@16 and pass@16 on held-out prompts, entropy of the fork that decides, and mean over training."""

PLATEAU = 0.05
"""The largest change of an arm's mean reward over the last third of its rollouts that counts as a plateau."""

RARE = ("<1e-4", "1e-4:1e-3", "1e-3:0.01", "0.01:0.1")
"""The bins of p of the tokens that count as rare."""

_FACTOR = 2.0  # by which the grid of rates grows
_EXTENSIONS = 5
_PROFILE_ROLLOUTS = 8
_DIGITS = 5


@dataclass(frozen=True)
class Plan:
    """The runs of small transformers.

    Args:
        places: `TASK/lagN`: the name of a problem, and how many rollouts the sampler is behind; or one of `CONFIRMED`.
        arms: Names in `ARMS`.
        seeds: Seeds of the report; each is also the number of its warm-up.
        tuning_seeds: Seeds and warm-ups on which rates are chosen.
        rates: First grid of learning rates.
        tuned_like: Places without a tuning of their own, and the place whose rates they take.
        setting: Fields of `Setting` of all runs.
        fresh: Seeds of the places that have seeds of their own.

    Raises:
        ValueError: If a place or an arm is unknown, a place takes the rates of one that is not tuned, or seeds of the report
            are among those of tuning.
    """

    places: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    rates: tuple[float, ...] = (2e-4, 4e-4, 8e-4)
    tuned_like: Mapping[str, str] = field(default_factory=dict[str, str])
    setting: Mapping[str, Any] = field(default_factory=lambda: SETTING)
    fresh: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])

    def __post_init__(self) -> None:
        for place in self.places:
            self.setting_of(place)
        if unknown := [arm for arm in self.arms if arm not in ARMS]:
            raise ValueError(f"arms: {unknown[0]!r} is unknown; choose from {', '.join(ARMS)}")
        report = set(self.seeds).union(*self.fresh.values())
        if both := sorted(report & set(self.tuning_seeds)):
            raise ValueError(
                f"seeds {both} are in the report and in tuning; what is tuned on must not enter the report"
            )
        for place, like in self.tuned_like.items():
            if place in self.places and (like in self.tuned_like or like not in self.places):
                raise ValueError(f"tuned_like: {place} takes the rates of {like}, which is not tuned itself")

    def setting_of(self, place: str, **changes: Any) -> Setting:
        """The setting of a place's runs.

        Args:
            place: `TASK/lagN`, or one of `CONFIRMED`.
            **changes: Fields of `Setting` that differ from the plan's.

        Raises:
            ValueError: If the place has no lag, or its problem is unknown.
        """
        task, _, lag = CONFIRMED.get(place, place).partition("/lag")
        if not lag.isdecimal():
            raise ValueError(f"place {place!r}: write TASK/lagN, such as detours/lag0")
        fields: dict[str, Any] = {**self.setting, "lag": int(lag), **changes}
        return Setting(task, **fields)

    def seeds_of(self, place: str) -> tuple[int, ...]:
        """The seeds of the report at a place.

        Args:
            place: One of `places`.
        """
        return self.fresh.get(place, self.seeds)

    @property
    def baseline(self) -> str:
        """The arm whose rate all arms have in a place with the end `/same-rate`: `BASELINE`, or else the first one."""
        return BASELINE if BASELINE in self.arms else self.arms[0]

    def jobs(self, place: str, arm: str, rate: float, seeds: Sequence[int], **changes: Any) -> list[Job]:
        """The runs of an arm at a rate.

        Args:
            place: `TASK/lagN`.
            arm: Name of the arm.
            rate: Learning rate.
            seeds: The seeds, which are also the numbers of the warm-ups.
            **changes: Fields of `Setting` that differ from the plan's.
        """
        setting = self.setting_of(place, **changes)
        return [Job(setting, ARMS[arm], rate, seed, seed) for seed in seeds]

    def tuning_jobs(self, place: str, arm: str, rate: float) -> list[Job]:
        """The runs of one cell of the tuning grid, on the prompts for tuning.

        Args:
            place: `TASK/lagN`.
            arm: Name of the arm.
            rate: Learning rate.
        """
        return self.jobs(place, arm, rate, self.tuning_seeds, split="tuning")

    def profile_jobs(self, place: str) -> list[Job]:
        """Rollouts of the warmed-up models at a learning rate of 0, on the seeds and prompts of tuning.

        Args:
            place: `TASK/lagN`.
        """
        changes = {"split": "tuning", "updates": _PROFILE_ROLLOUTS, "lag": 0}
        return self.jobs(place, self.arms[0], 0.0, self.tuning_seeds, **changes)


SETTING: Mapping[str, Any] = MappingProxyType(
    {"updates": 60, "prompts": 24, "group": 8, "epochs": 2, "minibatches": 8, "hidden_size": 32, "layers": 1}
)
"""The setting of every run: 192 completions in a rollout, 16 optimiser steps on each."""

CONFIRMED: Mapping[str, str] = MappingProxyType({"detours/confirmation": "detours/lag0"})
"""Places that repeat another place on fresh seeds, at the rates that were tuned before."""

TUNED_LIKE: Mapping[str, str] = MappingProxyType({"detours/lag4": "detours/lag0", **CONFIRMED})
"""Places without a tuning of their own, and the place whose rates they take: one to save an hour, one by its purpose."""

_SMALL = MappingProxyType(
    {**SETTING, "updates": 4, "prompts": 8, "minibatches": 4, "eval_samples": 16, "warm_up_steps": 120}
)
_SHORT = MappingProxyType({**SETTING, "updates": 30})

_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "full": {},
        "quick": {"rates": (8e-4,), "setting": _SHORT},
        "smoke": {"rates": (8e-4,), "setting": _SMALL},
    }
)


def plan_of(protocol: Protocol) -> Plan:
    """The plan of a protocol's preset.

    Args:
        protocol: What `bandpo.lab.evidence.protocol.read` returned.
    """
    found = protocol.experiments["transformers"]
    # A preset without the place that another one takes its rates from has a grid of one rate, where nothing is tuned.
    like = {place: other for place, other in TUNED_LIKE.items() if {place, other} <= set(found.places)}
    seeds = {name: tuple(range(x.report_seed, x.report_seed + x.seeds)) for name, x in found.places.items()}
    changes: dict[str, Any] = {"tuned_like": like, **_PRESETS[protocol.preset]}
    return Plan(
        places=tuple(found.places),
        arms=found.arms,
        seeds=tuple(range(found.report_seed, found.report_seed + found.seeds)),
        tuning_seeds=tuple(range(found.tuning_seed, found.tuning_seed + found.tuning_seeds)),
        fresh={name: seeds[name] for name in CONFIRMED if name in seeds},
        **changes,
    )


def run(protocol: Protocol, folder: Path, jobs: int = 2, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Make the runs of a protocol that are missing.

    Args:
        protocol: What `bandpo.lab.evidence.protocol.read` returned.
        folder: Folder of the results; its subfolder `runs` has one file for each run.
        jobs: Number of worker processes.
        say: Function that is called with each line of the progress.

    Returns:
        `values[place][arm][measure]`, one number for each seed of the report, NaN for a run that diverged, and the same under
        `PLACE/same-rate` for all arms at the rate of the baseline, which is exploratory; `summary` (of the own rates, see
        `summarise`; and `rates`, `tuning` with the speed at each rate that was tried, and `profile`); and `core_seconds` of all
        runs.

    Raises:
        RuntimeError: If a run failed.
    """
    return run_plan(plan_of(protocol), folder, jobs, say)


def run_plan(plan: Plan, folder: Path, jobs: int = 2, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Make the runs of a plan that are missing.

    Args:
        plan: The plan.
        folder: Folder of the results; its subfolder `runs` has one file for each run.
        jobs: Number of worker processes.
        say: Function that is called with each line of the progress.

    Returns:
        `values`, `summary` and `core_seconds`, as `run` has them.

    Raises:
        RuntimeError: If a run failed.
    """
    study = Study(folder, jobs, say)
    speeds = tune(plan, study)
    rates = rates_of(plan, speeds)
    own = {(p, arm): plan.jobs(p, arm, rates[p][arm], plan.seeds_of(p)) for p in plan.places for arm in plan.arms}
    same = {(p, arm): plan.jobs(p, arm, rates[p][plan.baseline], plan.seeds_of(p)) for p, arm in own}
    for place in plan.places:
        jobs_here = [job for way in (own, same) for arm in plan.arms for job in way[place, arm]]
        _make(study, [*dict.fromkeys(jobs_here), *plan.profile_jobs(place)], f"{place}, report")
    found = {cell: [_result(study, job) for job in runs] for cell, runs in own.items()}
    tried = {place: {arm: sorted(row.items()) for arm, row in rows.items()} for place, rows in speeds.items()}
    summary = {
        **summarise(plan, found),
        "rates": rates,
        "tuning": tried,
        "profile": {place: profile(plan, place, study) for place in plan.places},
    }
    values: Values = {}
    for (place, arm), results in found.items():
        k = plan.setting_of(place).eval_samples
        values.setdefault(place, {})[arm] = values_of(results, k)
        at_same = values_of([_result(study, job) for job in same[place, arm]], k)
        values.setdefault(f"{place}/same-rate", {})[arm] = at_same
    summary["core_parts"] = _core_parts(plan, study, speeds, own, same)
    return {"values": values, "summary": summary, "core_seconds": round(sum(summary["core_parts"].values()), 1)}


def _core_parts(plan: Plan, study: Study, speeds: "Speeds", *reports: Mapping[Any, list[Job]]) -> dict[str, float]:
    """The core seconds of all runs of a plan (report, profile and tuning) by part, as `Study.core_parts` has them."""
    every = [job for report in reports for runs in report.values() for job in runs]
    every += [job for place in plan.places for job in plan.profile_jobs(place)]
    for place, rows in speeds.items():
        every += [job for arm, row in rows.items() for rate in row for job in plan.tuning_jobs(place, arm, rate)]
    return {name: round(seconds, 1) for name, seconds in study.core_parts(every).items()}


Speeds = dict[str, dict[str, dict[float, float]]]
"""The mean reward over training on the tuning seeds, by place, arm and rate."""


def tune(plan: Plan, study: Study) -> Speeds:
    """Make the runs of the tuning grids of all arms, in the places that have a tuning of their own.

    While an arm's best rate is at an end of its grid, the grid grows there by a factor of 2, five times at most. A grid of a
    single rate needs no runs.

    Args:
        plan: The plan.
        study: The results.

    Returns:
        The mean reward over training on the tuning seeds by place, arm and rate; -inf where a run diverged.

    Raises:
        RuntimeError: If a run failed.
    """
    tuned = [place for place in plan.places if place not in plan.tuned_like]
    if len(plan.rates) == 1:
        return {place: {arm: {} for arm in plan.arms} for place in tuned}
    grids = {(place, arm): list(plan.rates) for place in tuned for arm in plan.arms}
    speeds: dict[tuple[str, str], dict[float, float]] = {cell: {} for cell in grids}
    for _ in range(_EXTENSIONS + 1):
        wanted = {cell: [r for r in grid if r not in speeds[cell]] for cell, grid in grids.items()}
        for place in tuned:  # the runs of all arms and rates together, so that their stacks are full
            runs = [j for arm in plan.arms for rate in wanted[place, arm] for j in plan.tuning_jobs(place, arm, rate)]
            _make(study, runs, f"{place}, tuning")
        for (place, arm), rates in wanted.items():
            for rate in rates:
                speeds[place, arm][rate] = _speed([_result(study, j) for j in plan.tuning_jobs(place, arm, rate)])
        if not _extend(grids, speeds):
            break
    return {place: {arm: speeds[place, arm] for arm in plan.arms} for place in tuned}


def rates_of(plan: Plan, speeds: Speeds) -> dict[str, dict[str, float]]:
    """The rate of each arm in each place, with the highest mean reward over training on the tuning seeds.

    Args:
        plan: The plan.
        speeds: What `tune` returned.

    Returns:
        `rates[place][arm]`.
    """
    return {
        place: {
            arm: _best(found) if (found := speeds[plan.tuned_like.get(place, place)][arm]) else plan.rates[0]
            for arm in plan.arms
        }
        for place in plan.places
    }


def _extend(grids: dict[tuple[str, str], list[float]], speeds: Mapping[tuple[str, str], Mapping[float, float]]) -> bool:
    """Add a rate beyond the end at which a grid's best rate is; whether any grid has grown."""
    grown = False
    for cell, grid in grids.items():
        best = _best(speeds[cell])
        if best in (min(grid), max(grid)):
            grid.append(best * _FACTOR if best == max(grid) else best / _FACTOR)
            grown = True
    return grown


def _best(speeds: Mapping[float, float]) -> float:
    return max(speeds, key=lambda rate: speeds[rate])


def _speed(results: Results) -> float:
    """The mean reward over training, -inf if a run diverged."""
    if any(diverged(r) for r in results):
        return -math.inf
    return float(np.mean([r["reward"] for r in results]))


def values_of(results: Results, k: int = 16) -> dict[str, list[float]]:
    """The measures of an arm by seed; NaN for a run that diverged.

    Args:
        results: Results of runs, by seed.
        k: Samples of mean@k and pass@k.

    Returns:
        `{measure: [value of each seed]}`, for each of `MEASURES`.

    Raises:
        ValueError: If a run has no numbers before its training: it did not diverge, and was never computed.
    """
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    for number, r in enumerate(results):
        if not all(math.isfinite(x) for x in r["before"].values()):
            raise ValueError(
                f"run {number} has no numbers before its training: its warm-up is broken, so that it says nothing of its arm; "
                "remove its file, and its warm-up from the cache"
            )
        after = cast("Mapping[str, float]", r["after"])
        numbers = (
            after[f"mean@{k}"],
            after[f"pass@{k}"],
            after["entropy of fork 1"],
            float(np.mean(cast("list[float]", r["reward"]))),
        )
        for name, x in zip(MEASURES, numbers, strict=True):
            found[name].append(math.nan if diverged(r) else x)
    return found


def profile(plan: Plan, place: str, study: Study) -> dict[str, float]:
    """The tokens that the warmed-up models sample, on the seeds and prompts of tuning.

    Args:
        plan: The plan.
        place: `TASK/lagN`.
        study: The results, with those of `plan.profile_jobs`.

    Returns:
        Shares of sampled tokens: `near-certain` (p >= 0.99), `rare` (p < 0.1), and of the rare ones `rewarded` (A > 0) and
        `punished` (A < 0); mean reward, pass@16 and entropies of the warmed-up models on the prompts of the evaluation.
    """
    results = [_result(study, job) for job in plan.profile_jobs(place)]
    before = {name: float(np.mean([r["before"][name] for r in results])) for name in results[0]["before"]}
    k = plan.setting_of(place).eval_samples
    names = {"mean": f"mean@{k}", "passed": f"pass@{k}", "groups with signal": "groups with signal"}
    names |= {name: name for name in before if name.startswith("entropy of fork")}
    found = {name: before[key] for name, key in names.items()}
    tokens = _mean_tokens(results)
    return _rounded({**found, "near-certain": tokens[">=0.99"], **_rare(results)})


def _mean_tokens(results: Results) -> dict[str, float]:
    return {b: float(np.mean([r["tokens"][b] for r in results])) for b in PROB_BINS}


def _rare(results: Results) -> dict[str, float]:
    """The share of rare tokens, and the shares of them with an advantage above and below 0, over all rollouts of some runs."""
    weight = np.array([[r["tokens"][b] for b in RARE] for r in results])
    total = max(float(weight.sum()), 1e-12)
    up, down = (np.array([[r["pushed"][side][b] for b in RARE] for r in results]) for side in ("up", "down"))
    return _rounded(
        {
            "rare": float(weight.sum(1).mean()),
            "rewarded": float((up * weight).sum() / total),
            "punished": float((down * weight).sum() / total),
        }
    )


def summarise(plan: Plan, found: Mapping[tuple[str, str], Results]) -> dict[str, Any]:
    """What the runs of the report say beside the measures.

    Args:
        plan: The plan.
        found: Results by place and arm, in the order of the seeds.

    Returns:
        For each place and arm: `curves` (mean reward and token entropy of each rollout), `plateau` (the change of the reward
        over the last third of the rollouts with a 95% interval, and whether it is within `PLATEAU`), `clip` (shares of stopped
        tokens by bin of p and side), `rare` (the rare tokens that were sampled), `after` (mean values of the last evaluation),
        and `diverged`; and `setting`, `seeds`, `tuning_seeds`, `bins`.
    """
    summary: dict[str, Any] = {
        "setting": dict(plan.setting),
        "seeds": {place: [plan.seeds_of(place)[0], plan.seeds_of(place)[-1]] for place in plan.places},
        "tuning_seeds": [plan.tuning_seeds[0], plan.tuning_seeds[-1]],
        "grid": list(plan.rates),
        "tuned_like": dict(plan.tuned_like),
        "bins": list(PROB_BINS),
        "allowed_change": PLATEAU,
    }
    parts: dict[str, Callable[[Results], Any]] = {
        "curves": _curves,
        "plateau": _plateau,
        "clip": _clip_map,
        "rare": _rare,
        "after": _after,
        "diverged": lambda results: sum(map(diverged, results)),
    }
    for name, of in parts.items():
        summary[name] = {place: {arm: of(found[place, arm]) for arm in plan.arms} for place in plan.places}
    return summary


def _curves(results: Results) -> dict[str, list[float]]:
    return {name: [float(f"{x:.4g}") for x in np.mean([r[name] for r in results], 0)] for name in ("reward", "entropy")}


def change_at_the_end(rewards: Sequence[float]) -> float:
    """The change of a curve over the last third of its places, by least squares.

    Args:
        rewards: The reward of each rollout.

    Examples:
        >>> round(change_at_the_end([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.2, 0.3]), 3)
        0.3
    """
    last = np.asarray(rewards[-max(2, len(rewards) // 3) :])
    return float(np.polyfit(np.arange(len(last)), last, 1)[0] * len(last))


def _plateau(results: Results) -> dict[str, Any]:
    changes = [change_at_the_end(r["reward"]) for r in results]
    interval = t_interval(changes)
    return {**_rounded(interval._asdict()), "reached": abs(interval.value) <= PLATEAU}


def _clip_map(results: Results) -> dict[str, list[float]]:
    """The share of stopped tokens in each bin of p, where a run weighs as much as its tokens there, and the share of tokens."""
    weight = np.array([[r["tokens"][b] for b in PROB_BINS] for r in results])
    found = {"tokens": weight.mean(0)}
    for side in ("low", "high"):
        stopped = np.array([[r["clip"][side][b] for b in PROB_BINS] for r in results])
        found[side] = (stopped * weight).sum(0) / np.maximum(weight.sum(0), 1e-12)
    return {name: [float(f"{v:.4g}") for v in x] for name, x in found.items()}


def _after(results: Results) -> dict[str, float]:
    """The means of the numbers of the last evaluation over the runs that have them."""
    names = dict.fromkeys(name for r in results for name in r["after"])
    return _rounded({n: float(np.mean([r["after"][n] for r in results if n in r["after"]])) for n in names})


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{x:.{_DIGITS}g}") for name, x in values.items()}


def _make(study: Study, jobs: list[Job], what: str) -> None:
    """Make the runs that are missing.

    Raises:
        RuntimeError: If one failed.
    """
    failed = len(study.failures)
    study.run(jobs, what)
    if study.failures[failed:]:
        raise RuntimeError(f"{what}: {study.failures[failed]}")


def _result(study: Study, job: Job) -> dict[str, Any]:
    found = study.result(job)
    assert found is not None  # `_make` raised otherwise
    return found
