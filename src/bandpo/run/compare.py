"""`bandpo compare`: tuning, report runs, robustness maps, exact experiments, and one self-contained report."""

import argparse
import dataclasses
import io
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import jinja2
import torch
from matplotlib.figure import Figure

import bandpo
from bandpo.lab.exact import Tree, run_tree, wilson
from bandpo.lab.figures import plot_clip_maps, plot_curves, plot_exact, plot_forest, plot_robustness
from bandpo.lab.plan import PRESETS, Plan, describe, jobs_of, report_arms, robust_jobs, tuning_jobs
from bandpo.lab.problems import PROBLEMS
from bandpo.lab.study import Study
from bandpo.lab.summary import summarise, write_tables
from bandpo.objectives import OBJECTIVES
from bandpo.run.config import command_line
from bandpo.run.progress import Progress


def compare(options: argparse.Namespace) -> Path:
    """Run a comparison; its report.

    The folder holds plan.json, runs/ (one file for each run), summary.json, table.csv, table.md and report.html.

    Args:
        options: The options of `bandpo compare`.
    """
    started = time.monotonic()
    plan = _plan(options)
    if options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {options.jobs}")
    folder = options.output or Path("runs") / f"compare-{options.preset}"
    progress = Progress()
    progress.say(f"{len(plan.objectives)} objectives on {', '.join(plan.tasks)} -> {folder}")
    study = Study(folder, options.jobs, progress.say)
    (folder / "plan.json").write_text(json.dumps(describe(plan), indent=1) + "\n")
    torch.set_num_threads(1)
    objectives = list(dict.fromkeys((*plan.objectives, "no-clip")))
    for task in plan.tasks:
        study.run(tuning_jobs(plan, task), f"{task}, tuning")
        tuned = [arm for o in objectives if (arm := study.tuned(plan, task, o)) is not None]
        study.run(jobs_of(plan, task, [*report_arms(plan), *tuned], plan.seeds), f"{task}, report")
        study.run([j for jobs in robust_jobs(plan, task).values() for j in jobs], f"{task}, robustness")
    summary = summarise(study, plan)
    summary["exact"] = _exact(objectives, plan.exact_seeds) if plan.exact_seeds else {}
    write_tables(summary, folder)
    report = _write_report(folder, summary, plan, minutes=(time.monotonic() - started) / 60)
    progress.say((folder / "table.md").read_text())
    for line in [*study.failures, *summary["incomplete"]]:
        progress.say(f"missing: {line}")
    progress.say(f"report: {report}")
    return report


def _plan(options: argparse.Namespace) -> Plan:
    changes: dict[str, Any] = {}
    for name in ("objectives", "tasks"):
        given = getattr(options, name)
        if given is not None:
            changes[name] = tuple(x.strip() for x in given.split(","))
    for task in changes.get("tasks", ()):
        if task not in PROBLEMS:
            raise ValueError(f"--tasks: {task!r} is unknown; choose from {', '.join(PROBLEMS)}")
    if options.seeds is not None:
        changes["seeds"] = _seeds(options.seeds)
    if options.updates is not None:
        changes["updates"] = options.updates
    return dataclasses.replace(PRESETS[options.preset], **changes)


def _seeds(text: str) -> tuple[int, ...]:
    """`0-9` or `0,3,5`."""
    try:
        first, dash, last = text.partition("-")
        return tuple(range(int(first), int(last) + 1)) if dash else tuple(int(x) for x in text.split(","))
    except ValueError:
        raise ValueError(f"--seeds {text}: write 0-9, or 0,3,5") from None


def _exact(names: list[str], seeds: int) -> dict[str, Any]:
    """The bandit of the bottleneck, at each objective's default width."""
    found: dict[str, Any] = {}
    for name in names:
        objective = OBJECTIVES[name]
        if objective.extras or objective.ratio_level != "token":
            continue
        outcome = run_tree(Tree(), dataclasses.replace(objective, advantage="std"), seeds=seeds)
        commits = int(outcome.commits.sum())
        found[name] = {
            "commit": [commits / seeds, *wilson(commits, seeds)],
            "curve": outcome.curve.mean(1).tolist(),
            "value": outcome.value.mean().item(),
            "entropy": outcome.entropy.mean().item(),
            "discovery": outcome.discovery.float().median().item(),
        }
    return found


def _write_report(folder: Path, summary: dict[str, Any], plan: Plan, *, minutes: float) -> Path:
    tasks: dict[str, Any] = {}
    for task, found in summary["tasks"].items():
        if not found:
            tasks[task] = {}
            continue
        table = next(iter(found["table"].values()))
        default = {label: c for label, c in found["curves"].items() if " " not in label}
        figures = {"Learning curves, default widths": plot_curves(default)}
        figures |= {
            f"{measure}, against {found['baseline']}": plot_forest(d, found["baseline"], measure)
            for measure, d in found["differences"].items()
        }
        figures["Who is clipped"] = plot_clip_maps(found["clip"])
        if found["robustness"]:
            figures["Robustness"] = plot_robustness(found["robustness"], plan.robust_rates, plan.robust_reuse)
        start = ", ".join(f"{name} {value:.3f}" for name, value in found["before"].items())
        tasks[task] = {
            **found,
            "measures": [m for m, v in table.items() if isinstance(v, dict) and "value" in v],
            "figures": {
                name: _svg(figure, folder / "figures" / f"{task}-{i}.svg")
                for i, (name, figure) in enumerate(figures.items())
            },
            "text": f"{PROBLEMS[task]().description}. Before training: {start}.",
        }
    exact = None
    if summary["exact"]:
        exact = {
            "text": "Ten arms; the best has probability 0.01 at the start and reward 1, a common one (0.40) pays 0.6, the "
            "others 0.2. Adam, rate 0.1, 60 batches of 8 groups of 8, 2 epochs of 4 mini-batches, "
            f"{plan.exact_seeds} seeds, default widths.",
            "figure": _svg(plot_exact(summary["exact"]), folder / "figures" / "exact.svg"),
        }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bandpo.run"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    revision = git.stdout.strip() if git.returncode == 0 else ""
    about = {
        "command": command_line(), "bandpo": bandpo.__version__, "torch": torch.__version__, "minutes": f"{minutes:.1f}",
        "git": revision,
    }  # fmt: skip
    page = environment.get_template("compare.html.j2").render(
        title="Trust regions compared: " + ", ".join(plan.tasks), summary={**summary, "tasks": tasks}, exact=exact,
        plan=describe(plan), environment=about,
    )  # fmt: skip
    path = folder / "report.html"
    path.write_text(page)
    return path


def _svg(figure: Figure, path: Path) -> str:
    path.parent.mkdir(exist_ok=True)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    path.write_text(buffer.getvalue())
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
