"""Self-contained pages: one set-up of Jinja, one HTML frame with one style sheet, and figures as SVG inside of the page."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import jinja2
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from bandpo._system.files import write_text
from bandpo._system.secrets import hide

_FRAME = "bandpo._system"
"""The package whose templates every page may extend: `page.html.j2`."""


def template(package: str, name: str, filters: Mapping[str, Callable[..., object]] | None = None) -> jinja2.Template:
    """A template of a package. What it is given is escaped, except in Markdown (`.md.j2`); a missing value is an error.

    Args:
        package: Package with a folder `templates`.
        name: File name in that folder; it may extend `page.html.j2`.
        filters: More filters by name.
    """
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package), jinja2.PackageLoader(_FRAME)]),
        autoescape=not name.endswith(".md.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters or {})
    return environment.get_template(name)


def save_svg(figure: Figure, path: Path) -> str:
    """Save a figure as SVG, without secrets and without a date, and close it.

    Args:
        figure: Figure to save.
        path: Where to write it; its folder is made.

    Returns:
        The `<svg>` element, for a page.
    """
    path.parent.mkdir(exist_ok=True)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = hide(buffer.getvalue())
    write_text(path, text)
    return text[text.index("<svg") :]
