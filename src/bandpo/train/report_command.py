"""`bandpo report`: the report of a run from the files in its folder, at any time, also while the run trains."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from bandpo._system.errors import printable
from bandpo.doctor.command import examine_files
from bandpo.doctor.output import Examined
from bandpo.plots import plot_bounds, plot_clip_by_probability, preference_panels, training_panels
from bandpo.plots.curves import Curves
from bandpo.train.evaluate import Evaluation
from bandpo.train.record import Record, Scores, read_record, resume_lines
from bandpo.train.report import write_report

_WIDTH = 5.0
"""Inches of a figure of the trust region: two lie side by side on a wide page, and one fills that of a phone."""


def report(options: argparse.Namespace) -> None:
    """Write the report of a run, and print where it is and whether the run is finished.

    Args:
        options: The options of `bandpo report`.

    Raises:
        FileNotFoundError: If the folder of `--output` does not exist.
        ValueError: If the folder is none of a run, or a file of it cannot be read.
    """
    output: Path | None = options.output
    if output is not None and output.is_dir():
        raise ValueError(f"--output: {output} is a folder; name a file")
    if output is not None and not output.parent.is_dir():
        raise FileNotFoundError(f"--output: there is no folder {output.parent}")
    page, state = write_run_report(options.run, output)
    if state is not None:
        print(printable(state))
    print(printable(f"report: {page}"))


def write_run_report(folder: Path, output: Path | None = None) -> tuple[Path, str | None]:
    """Write the report of a run from the files in its folder. No model is loaded, and nothing that a file names is imported.

    Args:
        folder: Folder of the run.
        output: The page to write; None for report.html in the folder.

    Returns:
        The page, and where the run is; None for a finished one.

    Raises:
        ValueError: If the folder is none of a run, or a file of it cannot be read.
    """
    record = read_record(folder)
    broken: list[int] = []
    curves = Curves(
        row for row in record.rows(broken) if record.learns_preferences or "reward" in row or "entropy" in row
    )
    state = record.state(curves.last)
    parts = record.parts
    notes = [*(() if parts is None else parts.notes), *resume_lines(folder)]
    if broken:
        notes.append(f"{len(broken)} lines of the log cannot be read and are left out, the first is line {broken[0]}")
    before = None if record.finished else record.scores().get("before")
    page = write_report(
        folder,
        title=record.title,
        figures=figures_of(record, curves),
        notes=notes,
        examined=_examined(record, curves),
        told=() if parts is None else parts.told,
        state=state,
        started=None if before is None else _summary(before),
        output=output,
    )
    return page, state


def figures_of(record: Record, curves: Curves) -> dict[str, Figure | Mapping[str, Figure]]:
    """The figures of a run by their headings.

    Args:
        record: The run.
        curves: What its log has.
    """
    if record.learns_preferences:
        panels = preference_panels(curves, record.unit)
        return {"Rounds" if record.unit == "round" else "Training": panels} if panels else {}
    found: dict[str, Figure | Mapping[str, Figure]] = {}
    if panels := training_panels(curves):
        found["Training"] = panels
    region: dict[str, Figure] = {}
    if curves.by_probability:
        region["Who is clipped"] = plot_clip_by_probability(curves, width=_WIDTH)
    if (parts := record.parts) is not None:
        drawn = "The interval, with tokens of this run" if parts.tokens.get("p") else "The interval"
        label = printable(parts.name).replace("$", r"\$")  # no mathematics of matplotlib
        region[drawn] = plot_bounds(parts.band, label, tokens=parts.tokens or None, width=_WIDTH)
    for title, figure in region.items():
        figure.axes[0].set_title(title)
    return found | ({"The trust region": region} if region else {})


def _examined(record: Record, curves: Curves) -> list[Examined]:
    """The findings of the doctor; of a run that learns preferences only those about its log."""
    if not record.learns_preferences:
        return examine_files([record.folder])
    return examine_files([record.folder / "metrics.jsonl"]) if curves.rows else []


def _summary(scores: Scores) -> dict[str, float]:
    rewards = scores.rewards.tolist()
    return Evaluation([*scores.prompts], [[] for _ in rewards], rewards).summary()
