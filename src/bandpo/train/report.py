"""One self-contained report.html from the files of a run."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from bandpo._system.files import read_jsonl, read_yaml, write_text
from bandpo._system.secrets import hide


def write_report(folder: Path, *, title: str, figures: Mapping[str, Figure], notes: Sequence[str] = ()) -> Path:
    """Write report.html and its figures (SVG) into a run's folder.

    Reads evaluation.json, samples.jsonl, config.yaml and env.json there. The page needs no network and runs
    no script; completions are escaped.

    Args:
        folder: The run's folder.
        title: Heading.
        figures: By their headings; they are closed.
        notes: What a reader must know before the numbers, such as a run without signal.
    """
    samples = read_jsonl(folder / "samples.jsonl")
    pictures = {
        name: save_svg(figure, folder / "figures" / f"{i}.svg") for i, (name, figure) in enumerate(figures.items(), 1)
    }
    page = _environment().get_template("report.html.j2").render(
        title=title,
        evaluation=json.loads((folder / "evaluation.json").read_text()),
        figures=pictures,
        notes=list(notes),
        samples=_pairs(samples),
        config=read_yaml(folder / "config.yaml"),
        environment=json.loads((folder / "env.json").read_text()),
    )  # fmt: skip
    path = folder / "report.html"
    write_text(path, page)
    return path


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("bandpo.run"), autoescape=True, undefined=jinja2.StrictUndefined
    )


def save_svg(figure: Figure, path: Path) -> str:
    """Save a figure, close it, and return it as markup for the page.

    Args:
        figure: What to save.
        path: Where; its folder is made.
    """
    path.parent.mkdir(exist_ok=True)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = hide(buffer.getvalue())
    write_text(path, text)
    return text[text.index("<svg") :]


def _pairs(samples: list[dict[str, Any]], count: int = 12) -> list[dict[str, Any]]:
    """The first prompts with their completions before and after training."""
    after = {json.dumps(row["prompt"]): row for row in samples if row.get("stage") == "after"}
    before = [row for row in samples if row.get("stage") == "before"]
    pairs = [(b, after[json.dumps(b["prompt"])]) for b in before if json.dumps(b["prompt"]) in after]
    return [
        {
            "prompt": b["prompt"] if isinstance(b["prompt"], str) else b["prompt"][-1]["content"],
            "before": list(zip(b["completions"][:4], b["rewards"], strict=False)),
            "after": list(zip(a["completions"][:4], a["rewards"], strict=False)),
        }
        for b, a in pairs[:count]
    ]
