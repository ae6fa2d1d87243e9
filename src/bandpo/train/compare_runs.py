"""`bandpo compare RUN RUN ...`: runs of `bandpo train` against each other, in one report."""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bandpo._system.about import about
from bandpo._system.errors import printable
from bandpo._system.files import write_json, write_text
from bandpo._system.locks import claim_output, released
from bandpo._system.pages import save_svg, template
from bandpo.metrics import PROB_BINS
from bandpo.plots.compared import COMPARED, clip_shares, compared_clips, compared_panels, legend, thinned
from bandpo.plots.curves import Curves
from bandpo.statistics import Interval, number
from bandpo.train.record import Record, Scores, read_record, resume_lines
from bandpo.train.run_groups import OTHER_METHOD, Group, differing, grouped, warnings
from bandpo.train.run_scores import Measured, measures

_FORMAT = 1
_WIDEST = 100
_UNITS = {"step": "optimiser step", "round": "round"}


@dataclass(frozen=True)
class Run:
    """A run that was read: its settings, its curves and the rewards of its evaluations."""

    record: Record
    curves: Curves
    scores: dict[str, Scores]

    @property
    def state(self) -> str | None:
        """Where an unfinished run is; None for a finished one."""
        return self.record.state(self.curves.last)


def compare_runs(options: argparse.Namespace) -> int:
    """Compare runs, and write report.html, comparison.json and figures/.

    A run that cannot be read is named, and the others are compared.

    Args:
        options: The options of `bandpo compare`.

    Returns:
        Exit status: 1 if a run cannot be read, else 0.

    Raises:
        ValueError: If a folder is named twice, there is only one, or the results would be written into a run.
    """
    folders: list[Path] = options.runs
    if len(folders) < 2:
        raise ValueError(f"compare: {folders[0]} is a single run; name two or more, or see `bandpo report`")
    places = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"compare: {folder} is named twice")
    output: Path = options.output or Path("runs") / "compared"
    if output.resolve() in places or (output / "config.resolved.yaml").exists():
        raise ValueError(f"--output: {output} is the folder of a run; name another one")
    if (output / "plan.json").exists():
        raise ValueError(f"--output: {output} holds a comparison of objectives; name another folder")
    runs, unread = _read(folders)
    for line in unread:
        print(printable(f"cannot be read: {line}"))
    if len(runs) < 2:
        print("fewer than two runs can be read: there is nothing to compare")
        return 1
    with released(claim_output(output)):
        page = _compare(runs, unread, output)
    print(printable(f"report: {page}"))
    return int(bool(unread))


def _read(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs that can be read, and why the others cannot."""
    runs: list[Run] = []
    unread: list[str] = []
    for folder in folders:
        try:
            record = read_record(folder)
            rows = (r for r in record.rows() if record.learns_preferences or "reward" in r or "entropy" in r)
            runs.append(Run(record, Curves(rows), record.scores()))
        except (ValueError, OSError) as error:
            unread.append(str(error) if str(folder) in str(error) else f"{folder}: {error}")
    return runs, unread


def _compare(runs: Sequence[Run], unread: Sequence[str], output: Path) -> Path:
    groups = grouped([run.record for run in runs])
    of = {run.record.folder: run for run in runs}
    settings = differing(groups)
    lines = warnings(groups, settings, {folder: run.scores for folder, run in of.items()})
    unfinished = [f"{run.record.folder}: {run.state}" for run in runs if run.state is not None]
    resumed = [f"{run.record.folder}: {line}" for run in runs for line in resume_lines(run.record.folder)]
    results = measures({g.label: [of[r.folder].scores for r in g.records] for g in groups}, [g.seeds for g in groups])
    curves = {g.label: [of[r.folder].curves for r in g.records] for g in groups}
    write_json(
        output / "comparison.json",
        {
            "format": _FORMAT,
            "about": about(),
            "not read": list(unread),
            "not finished": unfinished,
            "not comparable": lines,
            "resumed": resumed,
            "settings that differ": [setting._asdict() for setting in settings],
            "groups": [_described(g, of) for g in groups],
            "evaluations": {name: {k: m.plain() for k, m in found.items()} for name, found in results.items()},
            "clipped by probability": _clips(curves),
        },
    )
    page = template("bandpo.train", "compare_runs.html.j2", {"number": number}).render(
        title="Runs compared: " + ", ".join(g.label for g in groups),
        about=about(),
        unread=unread,
        unfinished=unfinished,
        warnings=lines,
        resumed=resumed,
        groups=groups,
        settings=settings,
        other_method=OTHER_METHOD,
        results=results,
        figures=_figures(groups, curves, output),
    )
    write_text(output / "report.html", page)
    _print(groups, results, [*lines, *resumed, *unfinished])
    return output / "report.html"


def _described(group: Group, of: Mapping[Path, Run]) -> dict[str, Any]:
    runs = [of[record.folder] for record in group.records]
    return {
        "label": group.label,
        "runs": [
            {
                "folder": str(run.record.folder),
                "title": run.record.title,
                "seed": run.record.resolved.get("seed"),
                "finished": run.record.finished,
                "set": run.record.given,
                "evaluation": run.record.evaluation,
                "curves": {
                    name: dict(zip(("step", "value"), thinned(*run.curves.curve(name).points()), strict=True))
                    for name in COMPARED
                    if run.curves.curve(name).count
                },
            }
            for run in runs
        ],
    }


def _clips(curves: Mapping[str, Sequence[Curves]]) -> dict[str, Any]:
    found: dict[str, Any] = {"bins": list(PROB_BINS)}
    for label, runs in curves.items():
        known = [c for c in runs if c.by_probability]
        if known:
            sides = {"low": "low", "high": "high", "tokens": None}
            found[label] = {name: clip_shares(known, side) for name, side in sides.items()}
    return found


def _figures(
    groups: Sequence[Group], curves: Mapping[str, Sequence[Curves]], output: Path
) -> dict[str, dict[str, str]]:
    """The figures as SVG by headings and titles; runs in steps and runs in rounds have axes of their own."""
    found: dict[str, dict[str, Any]] = {"": {"The runs": legend([printable(g.label) for g in groups])}}
    for unit, what in _UNITS.items():
        # A group of the other unit keeps its place, and so its colour.
        own = {g.label: curves[g.label] if g.records[0].unit == unit else () for g in groups}
        found[f"Curves over {what}s"] = compared_panels(own, what)
    found["Who is clipped"] = compared_clips(curves)
    drawn: dict[str, dict[str, str]] = {}
    count = 0
    for heading, inside in found.items():
        for name, figure in inside.items():
            count += 1
            drawn.setdefault(heading, {})[name] = save_svg(figure, output / "figures" / f"{count}.svg")
    return drawn


def _print(groups: Sequence[Group], results: Mapping[str, Mapping[str, Measured]], lines: Sequence[str]) -> None:
    console = Console()
    console = Console(width=min(console.width, _WIDEST) if console.is_terminal else _WIDEST)
    for line in lines:
        console.print(printable(line), markup=False, highlight=False, style="yellow")
    for name, found in results.items():
        table = Table(box=box.SIMPLE, title=f"{name} on held-out prompts", padding=(0, 1, 0, 0))
        table.add_column("runs", overflow="fold", ratio=1)
        for column in ("seeds", "before", "after", "change", f"against {escape(_short(groups[0].label))}"):
            table.add_column(column, justify="right", overflow="fold")
        for group in groups:
            row = found[group.label]
            values = (number(row.before.value), number(row.after.value), _change(row.change), _change(row.difference))
            table.add_row(escape(printable(group.label)), str(len(group.records)), *values)
        console.print(table)
        console.print(f"intervals at 95%: {_over(found)}", markup=False, highlight=False)


def _short(label: str) -> str:
    return printable(label if len(label) <= 14 else f"{label[:13]}…")


def _change(found: Interval | None) -> str:
    if found is None:
        return ""
    if math.isnan(found.low):  # not known, or of two seeds
        return number(found.value, "+.3f")
    return f"{number(found.value, '+.3f')} [{number(found.low, '+.3f')}, {number(found.high, '+.3f')}]"


def _over(found: Mapping[str, Measured]) -> str:
    """What the intervals of a table are over."""
    changes = dict.fromkeys(row.over for row in found.values() if row.over)
    pairs = dict.fromkeys(row.paired for row in found.values() if row.paired)
    return "; ".join([*(f"change over {x}" for x in changes), *(f"difference {x}" for x in pairs)]) or "none"
