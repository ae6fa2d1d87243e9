"""The report of a comparison: figures, and one self-contained page."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from bandpo._system.files import write_text
from bandpo._system.pages import save_svg, template
from bandpo.lab.comparison.clock import Clock
from bandpo.lab.comparison.figures import (
    plot_clip_maps,
    plot_curves,
    plot_exact,
    plot_forest,
    plot_forests,
    plot_planes,
    plot_regimes,
    plot_robustness,
    plot_staleness,
)
from bandpo.lab.comparison.own import RECORDS
from bandpo.lab.comparison.problems import DESCRIPTIONS
from bandpo.lab.comparison.summary import ABLATED, runs_of
from bandpo.statistics import number

_FEW = 6  # arms, up to which the differences of all measures are in one figure
_FILTERS = {"number": number, "runs_of": runs_of}


class Picture(NamedTuple):
    """A figure with its place in the report.

    Args:
        section: `exact`, or the name of a task.
        title: Title of the figure.
        figure: The figure.
    """

    section: str
    title: str
    figure: Figure


def pictures(summary: Mapping[str, Any]) -> Iterator[Picture]:
    """All figures of a summary, the exact experiments first."""
    if summary["exact"]:
        yield Picture("exact", "A rare best arm", plot_exact(summary["exact"]))
    if summary["sweeps"]:
        s = summary["sweeps"]
        yield Picture("exact", "Where the region decides: rarity and reuse", plot_regimes(s["regimes"]))
        yield Picture("exact", "Learning rate and width", plot_planes(s["planes"]))
        yield Picture(
            "exact",
            "Staleness, radius and cap, tuning",
            plot_staleness(s["staleness"], s["radius and cap"], s["tuning"]),
        )
    for task, found in summary["tasks"].items():
        if not found:
            continue
        default = {label: c for label, c in found["curves"].items() if " " not in label}
        yield Picture(task, "Learning curves, default widths", plot_curves(default))
        yield from _forests(task, found["differences"], found["baseline"], f"against {found['baseline']}")
        yield from _forests(task, found["ablations"], ABLATED, "parts of the KL band")
        yield Picture(task, "Who is clipped", plot_clip_maps(found["clip"]))
        if found["robustness"]:
            plan = summary["about"]["plan"]
            rates, reuse = plan["robust_rates"], [tuple(r) for r in plan["robust_reuse"]]
            yield Picture(task, "Robustness", plot_robustness(found["robustness"], rates, reuse))


def _forests(task: str, by_measure: Mapping[str, Any], baseline: str, what: str) -> Iterator[Picture]:
    """One figure of each measure; one of all measures where the arms are few, none where there is no number."""
    known = {
        measure: differences
        for measure, differences in by_measure.items()
        if any(d["mean"]["value"] is not None for d in differences.values())
    }
    if known and max(map(len, known.values())) <= _FEW:
        yield Picture(task, f"{', '.join(known)}, {what}", plot_forests(known, baseline))
        return
    for measure, differences in known.items():
        yield Picture(task, f"{measure}, {what}", plot_forest(differences, baseline, measure))


def write_report(folder: Path, summary: Mapping[str, Any], clock: Clock | None = None) -> Path:
    """Write report.html, and its figures in figures/.

    Args:
        folder: Folder of the comparison.
        summary: The summary that `write_tables` returned.
        clock: Clock of the comparison, for the table of where the time went; without it, the table has the runs alone.

    Returns:
        The path of report.html.
    """
    clock, figures = clock or Clock(), dict[str, dict[str, str]]()
    with clock.part("figures"):
        for i, picture in enumerate(pictures(summary)):
            path = folder / "figures" / f"{picture.section}-{i}.svg"
            figures.setdefault(picture.section, {})[picture.title] = save_svg(picture.figure, path)
    page = template("bandpo.lab.comparison", "compare.html.j2", _FILTERS).render(
        title="Trust regions compared: " + ", ".join(summary["tasks"]),
        summary=summary,
        figures=figures,
        tasks=_tasks(summary),
        own=summary["about"].get(RECORDS, {}),
        exact_text=_exact_text(summary),
        about=summary["about"],
        times=_times(summary, clock),
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def _times(summary: Mapping[str, Any], clock: Clock) -> dict[str, dict[str, float]]:
    """The seconds of each part of this command, up to the page, and the core seconds of the runs."""
    found = {"this command, seconds": clock.parts(), "the runs, core seconds": summary["about"].get("core_seconds", {})}
    return {title: parts for title, parts in found.items() if parts}


def _tasks(summary: Mapping[str, Any]) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for task, found in summary["tasks"].items():
        if found:
            table = next(iter(found["table"].values()))
            start = ", ".join(f"{name} {number(value)}" for name, value in found["before"].items())
            tasks[task] = {
                **found,
                "measures": [m for m, v in table.items() if isinstance(v, dict) and "value" in v],
                "text": f"{DESCRIPTIONS[task]}. Before training: {start}.",
            }
    return tasks


def _exact_text(summary: Mapping[str, Any]) -> str:
    plan = summary["about"]["plan"]
    text = (
        "Ten arms; the best has probability 0.01 at the start and reward 1, a common one (0.40) pays 0.6, the others 0.2.\n"
        "Adam, rate 0.1, 60 batches of 8 groups of 8, 2 epochs (K) of 4 mini-batches (M), default widths, "
        f"{plan['exact_seeds']} seeds."
    )
    if summary["sweeps"]:
        text += (
            f" The\nsweeps change one or two of these, with {plan['sweep_seeds']} seeds for each cell; the plane of rarity and "
            "reuse has balls\nmatched to ε = 0.2."
        )
    return text
