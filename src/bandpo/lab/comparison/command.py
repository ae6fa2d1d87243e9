"""The command `bandpo compare`: tuning, report runs, robustness maps, exact experiments, and one self-contained report."""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import bandpo
from bandpo._system.about import about, command_line, git_revision
from bandpo._system.errors import printable
from bandpo._system.files import read_checked_json, write_checked_json, write_json
from bandpo._system.locks import claim_output, released
from bandpo._system.options import not_one_of
from bandpo._system.progress import Progress
from bandpo.lab.comparison.clock import Clock
from bandpo.lab.comparison.devices import device_kind, device_title, find_device
from bandpo.lab.comparison.own import RECORDS, check_unchanged, definitions_of, is_own, objective_of, recorded
from bandpo.lab.comparison.plan import (
    PRESETS,
    Job,
    Plan,
    describe,
    jobs_of,
    left_out,
    report_arms,
    robust_jobs,
    tuning_jobs,
)
from bandpo.lab.comparison.problems import PROBLEMS
from bandpo.lab.comparison.report import write_report
from bandpo.lab.comparison.study import Study
from bandpo.lab.comparison.summary import summarise, write_tables
from bandpo.lab.comparison.sweeps import bandit, sweep
from bandpo.lab.comparison.terminal import show
from bandpo.lab.comparison.trial import check_computable, why_not_on_bandits
from bandpo.statistics import wilson

_FORMAT = 1  # of the sweeps' file: raise it when the same configuration gives other numbers


class Comparison(NamedTuple):
    """The outcome of a comparison.

    Args:
        report: Path of report.html.
        complete: Whether every run of the plan has a result.
    """

    report: Path
    complete: bool


def compare(options: argparse.Namespace) -> Comparison:
    """Run a comparison, or make what is missing of one.

    The output folder holds plan.json, runs/ (one file for each run), summary.json, table.csv, table.md, report.html and
    time.json (where the time of this command went, and the core seconds of its runs). Only one comparison at a time uses it.

    Args:
        options: The options of `bandpo compare`.

    Returns:
        The path of the report, and whether the comparison is complete.

    Raises:
        ValueError: If an option has a value that is not allowed.
        RunError: If this machine does not have the device.
    """
    clock = Clock()
    plan = _plan(options)
    for name in plan.objectives:
        if is_own(name):
            check_computable(name)
    if options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {options.jobs}")
    find_device(plan.device)
    folder = options.output or Path("runs") / f"compare-{options.preset}"
    with released(claim_output(folder)):
        return _compare(options, plan, folder, clock)


def _compare(options: argparse.Namespace, plan: Plan, folder: Path, clock: Clock) -> Comparison:
    progress = Progress()
    where = "" if plan.device == "cpu" else f" ({plan.device})"
    count = len(plan.objectives)
    progress.say(f"{count} objective{'s' if count > 1 else ''} on {', '.join(plan.tasks)}{where} -> {folder}")
    study = Study(folder, options.jobs, progress.say, options.backend)
    records = _own_objectives(plan, folder, progress.say)
    write_json(folder / "plan.json", {**describe(plan), **({RECORDS: records} if records else {})})
    torch.set_num_threads(1)
    objectives = list(dict.fromkeys((*plan.objectives, "no-clip")))
    with clock.part("runs"):
        made = [jobs for task in plan.tasks for jobs in _make_runs(study, plan, task, objectives)]
    with clock.part("statistics"):
        summary = summarise(study, plan)
    with clock.part("exact experiments"):
        exact = _on_bandits(objectives, progress.say) if plan.exact_seeds or plan.sweep_seeds else []
        summary["exact"] = _exact(exact, plan) if plan.exact_seeds else {}
    with clock.part("sweeps"):
        summary["sweeps"] = _sweeps(exact, plan, folder, options.jobs, progress.say) if plan.sweep_seeds else {}
    with clock.part("tables"):
        summary["about"] = _about(study, plan, made)
        summary = write_tables(summary, folder)
    report = write_report(folder, summary, clock)
    show(summary, progress)
    seconds = clock.parts()
    total = sum(seconds.values())
    times = {
        "seconds": seconds,
        "total": total,
        "core seconds of the runs": summary["about"]["core_seconds"],
    }
    write_json(folder / "time.json", times)
    progress.say(f"report: {report}, {total / 60:.1f} min")
    if summary["incomplete"]:
        count = len(summary["incomplete"])
        progress.say(
            f"{count} part{'s are' if count > 1 else ' is'} missing (named above, and in {folder / 'summary.json'}); the same "
            "command makes what is missing"
        )
    return Comparison(report, not summary["incomplete"])


def _own_objectives(plan: Plan, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The records of own objectives for plan.json by import path, with those of earlier commands.

    Raises:
        ValueError: If an own objective is not what it was when the results of the folder were made.
    """
    before = recorded(folder)
    now = definitions_of(plan.objectives)
    check_unchanged(plan.objectives, before, folder)
    for name, found in now.items():
        say(f"{name} is imported, since --objectives names it: {printable(found.words)}")
    for line in left_out(plan):
        say(f"  {line}")
    if others := [printable(name) for name in before if name not in now]:
        say(f"plan.json names {', '.join(others)} too; an own objective is imported only if --objectives names it")
    return {name: found._asdict() for name, found in {**before, **now}.items()}


def _on_bandits(names: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """The objectives that the exact experiments have; the others are told with the reason."""
    why = {name: why_not_on_bandits(name) for name in names}
    for name, reason in why.items():
        if reason:
            say(f"{name} is not in the exact experiments: {reason}")
    return [name for name in names if not why[name]]


def _make_runs(study: Study, plan: Plan, task: str, objectives: Sequence[str]) -> list[list[Job]]:
    """Make the runs of a task, with its tuning first; the runs that the results rest on."""
    tuning = tuning_jobs(plan, task)
    study.run(tuning, f"{task}, tuning")
    tuned = [arm for o in objectives if (arm := study.tuned(plan, task, o)) is not None]
    report = jobs_of(plan, task, [*report_arms(plan), *tuned], plan.seeds)
    study.run(report, f"{task}, report")
    robust = [job for jobs in robust_jobs(plan, task).values() for job in jobs]
    study.run(robust, f"{task}, robustness")
    return [tuning, report, robust]


def _plan(options: argparse.Namespace) -> Plan:
    changes: dict[str, Any] = {}
    for name in ("objectives", "tasks"):
        given = getattr(options, name)
        if given is not None:
            changes[name] = tuple(x.strip() for x in given.split(","))
    for task in changes.get("tasks", ()):
        if task not in PROBLEMS:
            raise ValueError(not_one_of("--tasks", task, PROBLEMS))
    if options.seeds is not None:
        changes["seeds"] = _seeds(options.seeds)
    if options.updates is not None:
        changes["updates"] = options.updates
    return dataclasses.replace(PRESETS[options.preset], **changes, device=options.device, sampler=options.sampler)


def _seeds(text: str) -> tuple[int, ...]:
    """The seeds that `0-9` or `0,3,5` stands for."""
    try:
        first, dash, last = text.partition("-")
        return tuple(range(int(first), int(last) + 1)) if dash else tuple(int(x) for x in text.split(","))
    except ValueError:
        raise ValueError(f"--seeds {text}: write 0-9, or 0,3,5") from None


def _exact(names: list[str], plan: Plan) -> dict[str, Any]:
    """The results of the bandit, with each objective's default width."""
    found: dict[str, Any] = {}
    seeds = plan.exact_seeds
    for name in names:
        outcome = bandit(objective_of(name), seeds, device=plan.device)
        commits = int(outcome.commits.sum())
        found[name] = {
            "commit": [commits / seeds, *wilson(commits, seeds)],
            "curve": outcome.curve.mean(1).tolist(),
            "value": outcome.value.mean().item(),
            "entropy": outcome.entropy.mean().item(),
            "discovery": outcome.discovery.float().median().item(),
        }
    return found


def _sweeps(names: list[str], plan: Plan, folder: Path, workers: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The results of the sweeps, kept in a file of the folder."""
    seeds, kind = plan.sweep_seeds, device_kind(plan.device)
    decides: list[Any] = [_FORMAT, names, seeds] if kind == "cpu" else [_FORMAT, names, seeds, kind]
    if own := definitions_of(names):
        decides.append({name: found.fingerprint for name, found in own.items()})
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:20]
    path = folder / f"sweeps-{key}.json"
    if path.exists():
        try:
            return read_checked_json(path)
        except ValueError as error:
            say(f"  {error}; it is made again")
    write_checked_json(path, json.loads(json.dumps(sweep(names, seeds, workers, plan.device))))
    return read_checked_json(path)


def _about(study: Study, plan: Plan, sets: list[list[Job]]) -> dict[str, Any]:
    seconds = study.core_parts([job for jobs in sets for job in jobs])
    own = {name: found._asdict() for name, found in definitions_of(plan.objectives).items()}
    return {
        "command": command_line(),
        "bandpo": bandpo.__version__,
        "torch": torch.__version__,
        "device": device_title(plan.device),
        "git": git_revision() or "",
        "environment": about(),
        "plan": describe(plan),
        "runs": len({job for jobs in sets for job in jobs}),
        "core_minutes": round(sum(seconds.values()) / 60, 1),
        "core_seconds": seconds,
        **({RECORDS: own} if own else {}),
    }
