"""Self-contained pages: one set-up of Jinja, one HTML frame with one style sheet, and figures as SVG inside of the page."""

import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import jinja2
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from bandpo._system.files import write_text
from bandpo._system.secrets import hide

_FRAME = "bandpo._system"
"""The package whose templates every page may extend: `page.html.j2`."""

_DARK = {
    "#ffffff": "#16181a",
    "#000000": "#e8e8e8",
    "#222222": "#e8e8e8",
    "#e6e6e6": "#34383c",
    "#8a8a8a": "#a3a3a3",
    "#0072b2": "#56b4e9",
    "#d55e00": "#f0915a",
    "#009e73": "#4fc3a0",
    "#cc79a7": "#e3a3c8",
    "#7b3294": "#b98bd0",
    "#a6611a": "#d3a06a",
    "#56b4e9": "#a6d8f5",
    "#332288": "#9a8fe0",
    "#117733": "#57b97a",
    "#dcdcdc": "#4a4f54",
}
"""Colours of the figures, and what takes their place on a dark page: paper, ink, grid, and the palette. Others stay."""
_COLOUR = re.compile(r"(fill|stroke|stop-color): (#[0-9a-f]{6})\b")


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


def save_svg(figure: Figure, path: Path | None = None) -> str:
    """Save a figure as SVG, without secrets and without a date, and close it.

    The colours follow the reader's setting, light or dark. A figure with an image in it, such as a heat map, stays light.

    Args:
        figure: Figure to save.
        path: Where to write it; its folder is made. None to write no file.

    Returns:
        The `<svg>` element, for a page.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    images = any(axes.images for axes in figure.axes)
    plt.close(figure)
    text = hide(buffer.getvalue())
    text = text if images else _themed(text)
    if path is not None:
        path.parent.mkdir(exist_ok=True)
        write_text(path, text)
    return text[text.index("<svg") :]


def _themed(svg: str) -> str:
    """The figure with its colours as variables of CSS, which have other values on a dark page."""
    start = svg.index("<svg")
    end = svg.index(">", start) + 1
    used = sorted({"#000000", *(colour for _, colour in _COLOUR.findall(svg) if colour in _DARK)})  # text is black
    light, dark = (";".join(f"--{c[1:]}:{look[c]}" for c in used) for look in ({c: c for c in used}, _DARK))
    style = f".themed{{{light};fill:var(--000000)}}@media(prefers-color-scheme:dark){{.themed{{{dark}}}}}"
    body = _COLOUR.sub(lambda m: f"{m[1]}: var(--{m[2][1:]})" if m[2] in used else m[0], svg[end:])
    return f'{svg[:start]}<svg class="themed"{svg[start + 4 : end]}\n <style>{style}</style>{body}'
