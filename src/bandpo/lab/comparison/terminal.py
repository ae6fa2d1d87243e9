"""What `bandpo compare` prints at its end: a table of each task, and what diverged, failed or is missing."""

import os
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bandpo._system.errors import printable
from bandpo._system.progress import Progress
from bandpo.lab.comparison.summary import runs_of
from bandpo.statistics import number

WIDTH = 100
"""Columns of the tables where the output is no terminal."""


def show(summary: Mapping[str, Any], progress: Progress) -> None:
    """Print the tables of a comparison, and what is not there.

    Args:
        summary: The content of summary.json.
        progress: Where to print.
    """
    wide = not progress.console.is_terminal and "COLUMNS" not in os.environ
    console = Console(width=WIDTH, highlight=False) if wide else progress.console
    tables = [task_table(task, found) for task, found in summary["tasks"].items() if found]
    for table in tables:
        console.print()
        console.print(table)
    console.print()
    for line in missing_lines(summary):
        progress.say(line)


def task_table(task: str, found: Mapping[str, Any]) -> Table:
    """The arms of a task with mean@k, its difference with the baseline, and some other measures.

    Args:
        task: Name of the task.
        found: The tables of the task, of `bandpo.lab.comparison.summary.summarise`.
    """
    rows: Mapping[str, Mapping[str, Any]] = found["table"]
    first = next(iter(rows.values()))
    main, other = (next(m for m in first if m.startswith(start)) for start in ("mean@", "pass@"))
    differences = found["differences"].get(main, {})
    title = f"{task}: means over runs, with 95% intervals"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("arm", overflow="fold")
    table.add_column("runs")
    headers = [f"{main}"]
    if differences:
        headers += [f"less {_cut(found['baseline'])}", "p"]
    for header in (*headers, other, "entropy", "speed"):
        table.add_column(header, justify="right", overflow="fold")
    for label, row in rows.items():
        cells = [_interval(row[main])]
        if differences:
            d = differences.get(label)
            cells += ["", ""] if d is None else [_interval(d["mean"], "+.3f"), number(d["p_holm"], ".2g")]
        cells += [number(row[m]["value"]) for m in (other, "entropy", "speed")]
        table.add_row(Text(printable(label)), runs_of(row), *cells)
    return table


def missing_lines(summary: Mapping[str, Any]) -> list[str]:
    """The runs that diverged, those that failed in this session, and the parts that are missing, one line each.

    Args:
        summary: The content of summary.json.
    """
    kinds = (("diverged", "diverged"), ("failed", "failures"), ("missing", "incomplete"))
    return [f"{kind}: {line}" for kind, key in kinds for line in summary[key]]


def _interval(value: Mapping[str, Any], form: str = ".3f") -> str:
    center, low, high = (number(value[part], form) for part in ("value", "low", "high"))
    return center if low == high == center else f"{center} [{low}, {high}]"


def _cut(text: str) -> str:
    return text if len(text) <= 20 else text[:19] + "…"
