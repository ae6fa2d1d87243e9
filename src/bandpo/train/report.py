"""The results of a run: one self-contained report.html from the files in its folder, and a table for the terminal."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from bandpo._system.files import read_jsonl, read_yaml, write_text
from bandpo._system.pages import save_svg, template

_SHOWN_PROMPTS, _SHOWN_COMPLETIONS = 12, 4
"""Prompts in the report's table of samples, and completions of each before and after training."""


def write_report(folder: Path, *, title: str, figures: Mapping[str, Figure], notes: Sequence[str] = ()) -> Path:
    """Write report.html and its figures (SVG) into the folder of a run.

    The page is made from evaluation.json, samples.jsonl, config.yaml and env.json in that folder. It needs no network, it runs
    no script, and completions in it are escaped.

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
    page = template("bandpo.train", "report.html.j2").render(
        title=title,
        evaluation=json.loads((folder / "evaluation.json").read_text()),
        figures=pictures,
        notes=list(notes),
        samples=_pairs(read_jsonl(folder / "samples.jsonl")),
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


def _pairs(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first prompts with their completions before and after training."""
    after = {json.dumps(row["prompt"]): row for row in samples if row.get("stage") == "after"}
    before = [row for row in samples if row.get("stage") == "before"]
    pairs = [(b, after[json.dumps(b["prompt"])]) for b in before if json.dumps(b["prompt"]) in after]
    return [
        {
            "prompt": b["prompt"] if isinstance(b["prompt"], str) else b["prompt"][-1]["content"],
            "before": _scored(b),
            "after": _scored(a),
        }
        for b, a in pairs[:_SHOWN_PROMPTS]
    ]


def _scored(row: dict[str, Any]) -> list[tuple[str, float | None]]:
    """The first completions of a row with their rewards."""
    return list(zip(row["completions"][:_SHOWN_COMPLETIONS], row["rewards"], strict=False))
