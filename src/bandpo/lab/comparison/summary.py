"""The tables of a comparison from its results: intervals, paired differences, clip maps, robustness."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from bandpo._system.bounded import parse_json, read_regular
from bandpo._system.files import finite_or_null, write_json, write_text
from bandpo.lab.comparison.plan import (
    ABLATIONS,
    TUNING_SEEDS,
    Arm,
    Job,
    Plan,
    jobs_of,
    report_arms,
    robust_jobs,
    tuning_arms,
)
from bandpo.lab.comparison.study import Study, diverged
from bandpo.metrics import PROB_BINS
from bandpo.statistics import (
    Difference,
    Interval,
    best_of_bootstrap,
    bounded_interval,
    cluster_interval,
    number,
    paired,
    t_half_width,
    t_interval,
)

Result = dict[str, Any]
"""A run's result, the fields of `bandpo.lab.comparison.loop.Result`."""

Values = dict[str, list[float]]
"""The measures of an arm, with one value for each run."""

BASELINE = "grpo"
"""The objective that the others are compared with, where it has results."""

ABLATED = "bandpo-kl"
"""The objective whose parts are compared with the whole."""

_COLLAPSED = 0.5  # a run has collapsed if it loses half of the mean@k that it started with
_LEARNS = 0.02  # the gain in mean@k from which a cell of the robustness maps counts as learning
_DIGITS = 6  # significant digits of summary.json
_RARE = ("<1e-4", "1e-4:1e-3", "1e-3:0.01", "0.01:0.1")


def summarise(study: Study, plan: Plan) -> dict[str, Any]:
    """All tables of a comparison, as JSON.

    Missing runs are named in `incomplete`. An arm without any result is left out; an arm with some results is shown with those,
    and compared on the seeds that both arms have. A run that diverged (NaN or an infinity is among its numbers) is a result: it
    is counted and named in `diverged`, and every mean that it is part of is NaN.

    Args:
        study: The results.
        plan: The plan of the comparison.

    Returns:
        `tasks` with the tables of each task, `incomplete`, `diverged`, and the `failures` of this session.
    """
    gaps = _Gaps([], [])
    tasks: dict[str, Any] = {}
    for task in plan.tasks:
        arms = [*report_arms(plan), *_tuned_arms(study, plan, task, gaps)]
        results = {arm: found for arm in arms if (found := _results(study, plan, task, arm, gaps))}
        tasks[task] = _task(results, plan, study, task) if results else {}
        for (name, rate, reuse), jobs in robust_jobs(plan, task).items():
            cell = f"{task}: {name}, robustness at rate x{rate:g}, (epochs, lag) {reuse}"
            gaps.note(study, jobs, cell, f"{len(jobs)} runs")
    return {"tasks": tasks, "incomplete": gaps.incomplete, "diverged": gaps.diverged, "failures": study.failures}


class _Gaps(NamedTuple):
    """Lines about missing runs and about runs that diverged."""

    incomplete: list[str]
    diverged: list[str]

    def note(self, study: Study, jobs: Sequence[Job], what: str, count: str) -> None:
        found = [study.result(job) for job in jobs]
        missing, gone = sum(r is None for r in found), sum(r is not None and diverged(r) for r in found)
        if missing:
            self.incomplete.append(f"{what}, {missing} of {count}")
        if gone:
            self.diverged.append(f"{what}, {gone} of {count}")


def _tuned_arms(study: Study, plan: Plan, task: str, gaps: _Gaps) -> list[Arm]:
    """The best arm of each objective's grid."""
    tuned: list[Arm] = []
    for name in dict.fromkeys((*plan.objectives, "no-clip")):
        seeds = range(TUNING_SEEDS, TUNING_SEEDS + plan.tuning_seeds)
        grid = list(dict.fromkeys(jobs_of(plan, task, tuning_arms(plan, name), seeds)))
        gaps.note(study, grid, f"{task}: {name} tuned", f"{len(grid)} runs of its grid")
        if (best := study.tuned(plan, task, name)) is not None:
            tuned.append(best)
    return tuned


def _results(study: Study, plan: Plan, task: str, arm: Arm, gaps: _Gaps) -> dict[int, Result]:
    """The results of an arm by seed."""
    jobs = jobs_of(plan, task, [arm], plan.seeds)
    found = {job.seed: r for job in jobs if (r := study.result(job)) is not None}
    for r in found.values():  # as an array, they take a quarter of the memory
        r["rewards"] = np.asarray(r["rewards"], dtype=np.float64)
    if len(found) < len(jobs):
        without = [job.seed for job in jobs if job.seed not in found]
        gaps.incomplete.append(f"{task}: {arm.label}, no result of {_seeds(without) if found else 'any seed'}")
    if ends := [seed for seed, r in found.items() if diverged(r)]:
        gaps.diverged.append(f"{task}: {arm.label}, {_seeds(ends)}")
    return found


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _task(results: Mapping[Arm, dict[int, Result]], plan: Plan, study: Study, task: str) -> dict[str, Any]:
    """The tables of a task."""
    arms = {arm.label: arm for arm in results}
    runs = {arm.label: list(found.values()) for arm, found in results.items()}
    seeds = {arm.label: list(found) for arm, found in results.items()}
    first = next(iter(runs.values()))[0]
    k = max(int(name.split("@")[1]) for name in first["after"] if name.startswith("mean@"))
    values = {label: _measures(found, k) for label, found in runs.items()}
    main = {label: v for label, v in values.items() if arms[label].variant not in ABLATIONS}
    parts = {label: v for label, v in values.items() if label not in main or label == ABLATED}
    baseline = BASELINE if BASELINE in runs else next(iter(runs))
    compared = [f"mean@{k}", f"pass@{k}", "entropy", "speed"] if len(plan.seeds) > 1 else []
    ablated = compared if len(parts) > 1 and ABLATED in parts else []
    start = (f"mean@{k}", f"pass@{k}", "entropy", "groups with signal")
    return {
        "baseline": baseline,
        "before": {m: float(np.mean([r["before"][m] for r in runs[baseline]])) for m in start},
        "table": {label: _row(arms[label], runs[label], seeds[label], v, plan, task) for label, v in values.items()},
        "differences": {m: _differences(plan, main, seeds, baseline, m) for m in compared},
        "ablations": {m: _differences(plan, parts, seeds, ABLATED, m) for m in ablated},
        "values": values,
        "seeds": seeds,
        "curves": {label: _curves(found) for label, found in runs.items()},
        "clip": {label: _clip_map(found) for label, found in runs.items()},
        "samples": {label: found[0]["samples"] for label, found in runs.items()},
        "robustness": _robustness(study, plan, task),
    }


def _row(
    arm: Arm, runs: Sequence[Result], seeds: Sequence[int], values: Values, plan: Plan, task: str
) -> dict[str, Any]:
    """A row of the main table."""
    rate = plan.rates[task] * arm.rate
    return {
        "arm": {"objective": arm.objective, "variant": arm.variant, "width": arm.width, "rate": rate},
        "runs": len(runs),
        "missing": len(plan.seeds) - len(runs),
        "diverged": sum(diverged(r) for r in runs),
        **{measure: _mean(measure, v, seeds, plan)._asdict() for measure, v in values.items()},
    }


def _mean(measure: str, values: Sequence[float], seeds: Sequence[int], plan: Plan) -> Interval:
    """The mean over runs with its 95% interval: Student's, over warmed-up models where runs share them.

    The share of collapsed runs has that of Clopper and Pearson: where no run collapsed, Student's would have the width 0.
    """
    if measure == "collapsed":
        return bounded_interval(values, 0.0, 1.0)
    if plan.warm_ups is None:
        return t_interval(values)
    return cluster_interval(values, [plan.warm_up_of(seed) for seed in seeds])


def _differences(
    plan: Plan, values: Mapping[str, Values], seeds: Mapping[str, list[int]], baseline: str, measure: str
) -> dict[str, Any]:
    """The paired differences of a measure between each other arm and the baseline."""
    pairs = {
        label: pair
        for label, v in values.items()
        if label != baseline
        and (pair := common_seeds(v[measure], seeds[label], values[baseline][measure], seeds[baseline]))[0]
    }
    clusters = None
    if plan.warm_ups is not None:
        common = {label: [s for s in seeds[label] if s in seeds[baseline]] for label in pairs}
        clusters = {label: [plan.warm_up_of(s) for s in found] for label, found in common.items()}
    return {label: as_dict(d) for label, d in paired(pairs, clusters=clusters).items()}


def common_seeds(
    first: Sequence[Any], seeds: Sequence[int], second: Sequence[Any], other_seeds: Sequence[int]
) -> tuple[list[float], list[float]]:
    """The values of two arms on the seeds that both have, in the order of the first.

    Args:
        first: Values of the first arm; None, which JSON has for NaN, becomes NaN.
        seeds: Seeds of the first arm, in the order of its values.
        second: Values of the second arm.
        other_seeds: Seeds of the second arm, in the order of its values.

    Returns:
        The values of both arms, in the same order of seeds.

    Examples:
        >>> common_seeds([1.0, 2.0], [0, 1], [3.0, None], [1, 2])
        ([2.0], [3.0])
    """
    a, b = dict(zip(seeds, first, strict=True)), dict(zip(other_seeds, second, strict=True))
    common = [s for s in a if s in b]
    return [_number(a[s]) for s in common], [_number(b[s]) for s in common]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def as_dict(difference: Difference) -> dict[str, Any]:
    """The difference as JSON has it."""
    return {**difference._asdict(), "mean": difference.mean._asdict()}


def _measures(runs: Sequence[Result], k: int) -> Values:
    """The measures of an arm, with one value for each run."""
    return {
        f"mean@{k}": [r["after"][f"mean@{k}"] for r in runs],
        f"pass@{k}": [r["after"][f"pass@{k}"] for r in runs],
        f"best@{k} (official bootstrap)": [
            best_of_bootstrap(np.asarray(r["rewards"], dtype=np.float64), k) for r in runs
        ],
        "entropy": [r["after"]["entropy"] for r in runs],
        "speed": [float(np.mean(cast("list[float]", r["reward"]))) for r in runs],
        "rare clipped": [_rare_clipped(r) for r in runs],
        # A run that diverged has collapsed too: its samples are no longer those of its policy.
        "collapsed": [
            float(diverged(r) or r["after"][f"mean@{k}"] < _COLLAPSED * r["before"][f"mean@{k}"]) for r in runs
        ],
    }


def _rare_clipped(run: Result) -> float:
    """The share of tokens with p < 0.1 that are above their upper bound with A > 0."""
    tokens = sum(run["tokens"][b] for b in _RARE)
    return sum(run["clip"]["high"][b] * run["tokens"][b] for b in _RARE) / tokens if tokens else 0.0


def _curves(runs: Sequence[Result]) -> dict[str, list[list[float]]]:
    """The mean over runs and its 95% t-interval, at each rollout."""
    curves: dict[str, list[list[float]]] = {}
    for name in ("reward", "entropy"):
        x = np.array([r[name] for r in runs])
        half = t_half_width(x) if len(x) > 1 else np.zeros(x.shape[1])
        curves[name] = [x.mean(0).tolist(), (x.mean(0) - half).tolist(), (x.mean(0) + half).tolist()]
    return curves


def _clip_map(runs: Sequence[Result]) -> dict[str, list[float]]:
    """The share of clipped tokens in each bin of p, where a run weighs as much as its tokens there, and the share of tokens."""
    weight = np.array([[r["tokens"][b] for b in PROB_BINS] for r in runs])
    found: dict[str, list[float]] = {"tokens": weight.mean(0).tolist()}
    for side in ("low", "high"):
        x = np.array([[r["clip"][side][b] for b in PROB_BINS] for r in runs])
        found[side] = ((x * weight).sum(0) / np.maximum(weight.sum(0), 1e-12)).tolist()
    return found


def _robustness(study: Study, plan: Plan, task: str) -> dict[str, Any]:
    """The gain in mean@k over the start in each cell, and the share of cells in which the objective learns."""
    maps: dict[str, list[float | None]] = {}
    for (name, _, _), jobs in robust_jobs(plan, task).items():
        found = [study.result(job) for job in jobs]
        gains = [
            next(r["after"][m] - r["before"][m] for m in r["after"] if m.startswith("mean@"))
            for r in found
            if r is not None
        ]
        maps.setdefault(name, []).append(float(np.mean(gains)) if len(gains) == len(jobs) else None)
    shape = (len(plan.robust_rates), len(plan.robust_reuse))
    return {
        name: {
            "gain": [cells[i * shape[1] : (i + 1) * shape[1]] for i in range(shape[0])],
            "learns": sum(c is not None and c > _LEARNS for c in cells) / len(cells),
        }
        for name, cells in maps.items()
    }


def write_tables(summary: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write summary.json, table.csv and table.md.

    Args:
        summary: The summary of `summarise`.
        folder: Folder of the comparison.

    Returns:
        The summary as it was written, so that pages made now and pages made later from the file agree.
    """
    write_json(folder / "summary.json", finite_or_null(summary, digits=_DIGITS), indent=None)
    summary = parse_json(read_regular(folder / "summary.json"), str(folder / "summary.json"))
    write_text(folder / "table.csv", _csv(summary))
    write_text(folder / "table.md", markdown(summary))
    return summary


def _csv(summary: Mapping[str, Any]) -> str:
    """The main table of each task, one row for each arm."""
    rows: list[dict[str, Any]] = [
        {
            "task": task,
            "arm": label,
            "runs": row["runs"],
            "missing": row["missing"],
            "diverged": row["diverged"],
            "learning_rate": row["arm"]["rate"],
            "width": row["arm"]["width"],
            **{
                f"{m}{end}": value[part]
                for m, value in row.items()
                if isinstance(value, dict) and "value" in value
                for part, end in (("value", ""), ("low", " low"), ("high", " high"))
            },
        }
        for task, found in summary["tasks"].items()
        for label, row in found.get("table", {}).items()
    ]
    text = io.StringIO()
    if rows:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def markdown(summary: Mapping[str, Any]) -> str:
    """The main table of each task, in Markdown."""
    parts: list[str] = []
    for task, found in summary["tasks"].items():
        if not found:
            continue
        measures = [m for m, v in next(iter(found["table"].values())).items() if isinstance(v, dict) and "value" in v]
        parts.append(f"### {task}\n\n| arm | runs | {' | '.join(measures)} |\n|---|---|{'---|' * len(measures)}")
        for label, row in found["table"].items():
            cells = [f"{number(row[m]['value'])} [{number(row[m]['low'])}, {number(row[m]['high'])}]" for m in measures]
            parts.append(f"| {label} | {runs_of(row)} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts) + "\n"


def runs_of(row: Mapping[str, Any]) -> str:
    """The number of runs behind a row of a table, with those that are missing and those that diverged.

    Args:
        row: A row of a task's `table`.

    Examples:
        >>> runs_of({"runs": 10}), runs_of({"runs": 3, "missing": 1, "diverged": 2})
        ('10', '3 of 4, 2 diverged')
    """
    missing, gone = row.get("missing", 0), row.get("diverged", 0)
    text = f"{row['runs']} of {row['runs'] + missing}" if missing else f"{row['runs']}"
    return f"{text}, {gone} diverged" if gone else text
