"""From the results of a comparison to its tables: intervals, paired differences, clip maps, robustness."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bandpo._system.files import write_text
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
from bandpo.lab.stats import Difference, best_of_bootstrap, interval, iqm, number, paired
from bandpo.metrics import PROB_BINS

BASELINE = "grpo"
ABLATED = "bandpo-kl"
_COLLAPSED = 0.5  # a run that loses half of the mean@k it started with
_RARE = ("<1e-4", "1e-4:1e-3", "1e-3:0.01", "0.01:0.1")


def summarise(study: Study, plan: Plan) -> dict[str, Any]:
    """All tables of a comparison, as JSON.

    Whatever is missing is named in `incomplete`: an arm of which no run has a result is left out, one of which some have is
    shown on those, and compared on the seeds that both arms have. Runs that diverged (a number of theirs is NaN or infinite)
    are results: they are counted, named in `diverged`, and a mean that one of them is in is no number.

    Args:
        study: Where the results lie.
        plan: What was run.
    """
    tasks: dict[str, Any] = {}
    incomplete: list[str] = []
    diverging: list[str] = []
    for task in plan.tasks:
        tuned: list[Arm] = []
        for name in dict.fromkeys((*plan.objectives, "no-clip")):
            seeds = range(TUNING_SEEDS, TUNING_SEEDS + plan.tuning_seeds)
            grid = list(dict.fromkeys(jobs_of(plan, task, tuning_arms(plan, name), seeds)))
            missing, gone = _missing_and_diverged(study, grid)
            if missing:
                incomplete.append(f"{task}: {name} tuned, {missing} of {len(grid)} runs of its grid")
            if gone:
                diverging.append(f"{task}: {name} tuned, {gone} of {len(grid)} runs of its grid")
            if (best := study.tuned(plan, task, name)) is not None:
                tuned.append(best)
        results: dict[str, dict[int, dict[str, Any]]] = {}
        chosen: dict[str, Arm] = {}
        for arm in [*report_arms(plan), *tuned]:
            jobs = jobs_of(plan, task, [arm], plan.seeds)
            found = {job.seed: r for job in jobs if (r := study.result(job)) is not None}
            if len(found) < len(jobs):
                without = [job.seed for job in jobs if job.seed not in found]
                incomplete.append(f"{task}: {arm.label}, no result of {_seeds(without) if found else 'any seed'}")
            if found:
                results[arm.label], chosen[arm.label] = found, arm
            if ends := [seed for seed, r in found.items() if diverged(r)]:
                diverging.append(f"{task}: {arm.label}, {_seeds(ends)}")
        tasks[task] = _task(results, chosen, plan, study, task) if results else {}
        for (name, rate, reuse), jobs in robust_jobs(plan, task).items():
            cell = f"{task}: {name}, robustness at rate x{rate:g}, (epochs, lag) {reuse}"
            missing, gone = _missing_and_diverged(study, jobs)
            incomplete += [f"{cell}, {missing} of {len(jobs)} runs"] if missing else []
            diverging += [f"{cell}, {gone} of {len(jobs)} runs"] if gone else []
    return {"tasks": tasks, "incomplete": incomplete, "diverged": diverging, "failures": study.failures}


def _missing_and_diverged(study: Study, jobs: Sequence[Job]) -> tuple[int, int]:
    found = [study.result(job) for job in jobs]
    return sum(r is None for r in found), sum(r is not None and diverged(r) for r in found)


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _task(
    results: dict[str, dict[int, dict[str, Any]]], arms: dict[str, Arm], plan: Plan, study: Study, task: str
) -> dict[str, Any]:
    first = next(iter(next(iter(results.values())).values()))
    k = max(int(name.split("@")[1]) for name in first["after"] if name.startswith("mean@"))
    runs = {label: list(found.values()) for label, found in results.items()}
    seeds = {label: list(found) for label, found in results.items()}
    values = {label: _measures(found, k) for label, found in runs.items()}
    measures = list(next(iter(values.values())))
    main = {label: v for label, v in values.items() if arms[label].variant not in ABLATIONS}
    parts = {label: v for label, v in values.items() if label not in main or label == ABLATED}
    baseline = BASELINE if BASELINE in results else next(iter(results))
    table = {
        label: {
            "arm": {
                "objective": arms[label].objective,
                "variant": arms[label].variant,
                "width": arms[label].width,
                "rate": plan.rates[task] * arms[label].rate,
            },
            "runs": len(runs[label]),
            "missing": len(plan.seeds) - len(runs[label]),
            "diverged": sum(diverged(r) for r in runs[label]),
            **{m: interval(v[m])._asdict() for m in measures},
        }
        for label, v in values.items()
    }
    compared = [m for m in (f"mean@{k}", f"pass@{k}", "entropy", "speed") if len(plan.seeds) > 1]
    differences = {m: _differences(main, seeds, baseline, m) for m in compared}
    ablations = {}
    if len(parts) > 1 and ABLATED in parts:
        ablations = {m: _differences(parts, seeds, ABLATED, m) for m in compared}
    before = runs[baseline]
    return {
        "baseline": baseline,
        "before": {
            m: iqm([r["before"][m] for r in before])
            for m in (f"mean@{k}", f"pass@{k}", "entropy", "groups with signal")
        },
        "table": table,
        "differences": differences,
        "ablations": ablations,
        "values": values,
        "seeds": seeds,
        "curves": {label: _curves(found) for label, found in runs.items()},
        "clip": {label: _clip_map(found) for label, found in runs.items()},
        "samples": {label: found[0]["samples"] for label, found in runs.items()},
        "robustness": _robustness(study, plan, task),
    }


def _differences(
    values: dict[str, dict[str, list[float]]], seeds: dict[str, list[int]], baseline: str, measure: str
) -> dict[str, Any]:
    pairs = {
        label: common_seeds(v[measure], seeds[label], values[baseline][measure], seeds[baseline])
        for label, v in values.items()
        if label != baseline
    }
    return {label: as_dict(d) for label, d in paired({n: p for n, p in pairs.items() if p[0]}).items()}


def common_seeds(
    first: Sequence[Any], seeds: Sequence[int], second: Sequence[Any], other_seeds: Sequence[int]
) -> tuple[list[float], list[float]]:
    """The values of two arms on the seeds that both have; None, as JSON has NaN, is NaN.

    Examples:
        >>> common_seeds([1.0, 2.0], [0, 1], [3.0, None], [1, 2])
        ([2.0], [3.0])
    """
    a, b = dict(zip(seeds, first, strict=True)), dict(zip(other_seeds, second, strict=True))
    common = [s for s in a if s in b]
    return tuple([math.nan if x[s] is None else x[s] for s in common] for x in (a, b))  # type: ignore[return-value]


def as_dict(difference: Difference) -> dict[str, Any]:
    """For JSON."""
    return {**difference._asdict(), "mean": difference.mean._asdict()}


def _measures(runs: Sequence[dict[str, Any]], k: int) -> dict[str, list[float]]:
    """One value for each run."""
    return {
        f"mean@{k}": [r["after"][f"mean@{k}"] for r in runs],
        f"pass@{k}": [r["after"][f"pass@{k}"] for r in runs],
        f"best@{k} (official bootstrap)": [best_of_bootstrap(np.array(r["rewards"]), k) for r in runs],
        "entropy": [r["after"]["entropy"] for r in runs],
        "speed": [float(np.mean(r["reward"])) for r in runs],
        "rare clipped": [_rare_clipped(r) for r in runs],
        # A run that diverged has collapsed too: what it samples is no longer its policy's.
        "collapsed": [
            float(diverged(r) or r["after"][f"mean@{k}"] < _COLLAPSED * r["before"][f"mean@{k}"]) for r in runs
        ],
    }


def _rare_clipped(run: dict[str, Any]) -> float:
    """Share of tokens of p < 0.1 that are above their upper bound with A > 0."""
    tokens = sum(run["tokens"][b] for b in _RARE)
    return sum(run["clip"]["high"][b] * run["tokens"][b] for b in _RARE) / tokens if tokens else 0.0


def _curves(runs: Sequence[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Mean over runs and its 95% t-interval, at each rollout."""
    from scipy import stats

    curves: dict[str, list[list[float]]] = {}
    for name in ("reward", "entropy"):
        x = np.array([r[name] for r in runs])
        half = (
            stats.t.ppf(0.975, len(x) - 1) * x.std(0, ddof=1) / np.sqrt(len(x)) if len(x) > 1 else np.zeros(x.shape[1])
        )
        curves[name] = [x.mean(0).tolist(), (x.mean(0) - half).tolist(), (x.mean(0) + half).tolist()]
    return curves


def _clip_map(runs: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Share of clipped tokens in each bin of p, runs weighted by their tokens there, and the share of tokens."""
    weight = np.array([[r["tokens"][b] for b in PROB_BINS] for r in runs])
    found = {"tokens": weight.mean(0).tolist()}
    for side in ("low", "high"):
        x = np.array([[r["clip"][side][b] for b in PROB_BINS] for r in runs])
        found[side] = ((x * weight).sum(0) / np.maximum(weight.sum(0), 1e-12)).tolist()
    return found


def _robustness(study: Study, plan: Plan, task: str) -> dict[str, Any]:
    """Gain in mean@k over the start in each cell, and the share of cells where the method still learns."""
    maps: dict[str, Any] = {}
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
            "learns": sum(c is not None and c > 0.02 for c in cells) / len(cells),
        }
        for name, cells in maps.items()
    }


def write_tables(summary: dict[str, Any], folder: Path) -> dict[str, Any]:
    """summary.json, table.csv and table.md; the summary as it was written, so that pages made now and later agree."""
    text = json.dumps(_strict(summary), allow_nan=False)
    write_text(folder / "summary.json", text + "\n")
    summary = json.loads(text)
    rows = [
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
    write_text(folder / "table.csv", text.getvalue())
    write_text(folder / "table.md", markdown(summary))
    return summary


def markdown(summary: dict[str, Any]) -> str:
    """The main table of each task."""
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
    """How many runs a row of a table is of, and what is to be known of them.

    Examples:
        >>> runs_of({"runs": 10}), runs_of({"runs": 3, "missing": 1, "diverged": 2})
        ('10', '3 of 4, 2 diverged')
    """
    missing, gone = row.get("missing", 0), row.get("diverged", 0)
    text = f"{row['runs']} of {row['runs'] + missing}" if missing else f"{row['runs']}"
    return f"{text}, {gone} diverged" if gone else text


def _strict(value: Any) -> Any:
    """As JSON has it, six digits: an interval that too few runs cannot give is null, not NaN."""
    if isinstance(value, dict):
        return {k: _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value
