"""The results of a run: one self-contained report.html from the files in its folder, and a table for the terminal."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from bandpo._system.files import read_yaml, write_text
from bandpo._system.jsonl import objects
from bandpo._system.pages import save_svg, template

_SHOWN_PROMPTS, _SHOWN_COMPLETIONS, _SHOWN_CHARACTERS = 12, 4, 4000
"""Prompts in the report's table of samples, completions of each before and after training, and characters of each text."""


def write_report(folder: Path, *, title: str, figures: Mapping[str, Figure], notes: Sequence[str] = ()) -> Path:
    """Write report.html and its figures (SVG) into the folder of a run.

    The page is made from evaluation.json, samples.jsonl, config.yaml and env.json in that folder. It needs no network, it runs
    no script, and completions in it are escaped. Its size does not grow with the run: below 2 MB, and what config.yaml and the
    notes have.

    Args:
        folder: Folder of the run.
        title: Heading of the page.
        figures: Figures by their headings; they are closed.
        notes: What a reader must know before the numbers, for example that a run had no learning signal.

    Returns:
        Path of the page.
    """
    pictures = {
        name: save_svg(figure, folder / "figures" / f"{i}.svg") for i, (name, figure) in enumerate(figures.items(), 1)
    }
    evaluation = json.loads((folder / "evaluation.json").read_text())
    page = template("bandpo.train", "report.html.j2").render(
        title=title,
        evaluation=evaluation,
        change=change_line(evaluation),
        figures=pictures,
        notes=list(notes),
        samples=_pairs(objects(folder / "samples.jsonl")),
        config=read_yaml(folder / "config.yaml"),
        environment=json.loads((folder / "env.json").read_text()),
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def evaluation_table(title: str, evaluation: Mapping[str, Any]) -> Table:
    """The results on the held-out prompts before and after training, for the terminal.

    Args:
        title: Title of the table.
        evaluation: Content of evaluation.json.
    """
    table = Table(title=title)
    table.add_column(f"{evaluation['prompts']} held-out prompts")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for name, before in evaluation["before"].items():
        after = evaluation["after"][name]
        table.add_row(name, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
    return table


def change_line(evaluation: Mapping[str, Any]) -> str | None:
    """The change of the mean reward with its interval; None if there are no ends of one, or the run is of an older version.

    Args:
        evaluation: Content of evaluation.json.
    """
    change: Mapping[str, float | None] = evaluation.get("change", {})
    value, low, high = (change.get(name) for name in ("value", "low", "high"))
    if value is None or low is None or high is None or math.isnan(low) or math.isnan(high):
        return None
    return (
        f"mean@{evaluation['samples']} changed by {value:+.3f}, 95% interval [{low:+.3f}, {high:+.3f}] over the "
        f"{evaluation['prompts']} prompts (BCa bootstrap of the paired changes; one run, so without the noise of other seeds)"
    )


def _pairs(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first prompts with their completions before and after training; of each row only what is shown is kept."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.get("stage") in ("before", "after"):
            kept = found.setdefault(json.dumps(row["prompt"]), {"prompt": row["prompt"]})
            kept.setdefault("before", None)
            kept[row["stage"]] = _scored(row)
    pairs = [kept for kept in found.values() if kept["before"] is not None and "after" in kept]
    return [{**kept, "prompt": _cut(_last_message(kept["prompt"]))} for kept in pairs[:_SHOWN_PROMPTS]]


def _last_message(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _scored(row: dict[str, Any]) -> list[tuple[str, float | None]]:
    """The first completions of a row with their rewards."""
    shown = [_cut(text) for text in row["completions"][:_SHOWN_COMPLETIONS]]
    return list(zip(shown, row["rewards"], strict=False))


def _cut(text: Any) -> Any:
    """A text with at most `_SHOWN_CHARACTERS` of its characters."""
    if not isinstance(text, str) or len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[:_SHOWN_CHARACTERS]}… ({len(text) - _SHOWN_CHARACTERS:,} more characters in samples.jsonl)"
