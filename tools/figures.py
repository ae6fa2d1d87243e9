"""Draws the figures of the documentation that are made from formulas, or from numbers that are committed.

* `python tools/figures.py`: draws all of them, as SVG that follows the reader's light or dark setting.
* `python tools/figures.py --check`: changes nothing; status 1 if a figure is out of date.
* `python tools/figures.py --measure`: first runs the example of tabular PPO-Clip, whose numbers are in docs/tabular.json.
* `python tools/figures.py NAME ...`: draws only those whose path contains a name, for example `zoo/grpo` or `preference/`.

The picture of the README is a PNG too, because package indexes show no SVG.
"""

import argparse
import base64
import io
import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import image
from matplotlib.figure import Figure

from bandpo._system.pages import save_svg
from bandpo.bounds import Band
from bandpo.bounds.calibration import match_radius
from bandpo.lab.experiments.preference_figures import FIGURES as PREFERENCE
from bandpo.lab.experiments.selection_figures import plot_selection
from bandpo.plots import STYLE, plot_bounds, plot_convergence, plot_families
from bandpo.plots.reference import plot_reference_kl
from bandpo.plots.zoo import plot_key, plot_weight
from bandpo.zoo import OBJECTIVES

DOCS = Path(__file__).parents[1] / "docs"
ASSETS = DOCS / "assets"
TABULAR = DOCS / "tabular.json"
"""The gaps of all runs of examples/tabular_ppo_clip.py, with five digits."""
README = "band-kl.svg"
"""The figure that the README shows, as a PNG."""
_NAMED = re.compile(
    r'(?<=["#])[a-z][0-9a-f]{10}(?=[")])'
)  # hashes of clip paths and markers, of the last bits of a layout
_EMBEDDED = re.compile(r'"data:image/png;base64,([^"]+)"')


def band() -> Figure:
    """The KL band of the paper: `bandpo bounds --divergence kl --radius 0.05 --max-ratio 10`."""
    return plot_bounds(Band("kl", 0.05, max_ratio=10.0), "band: KL, radius 0.05")


def families() -> Figure:
    """Five divergences: `bandpo bounds --divergence kl,tv,chi2,js,hellinger --radius 0.05 --match max_shift`."""
    first = Band("kl", 0.05, max_ratio=None)
    bands = {f"kl, radius {0.05:.4g}": first}
    for name in ("tv", "chi2", "js", "hellinger"):
        radius = match_radius(name, like=first, by="max_shift")
        bands[f"{name}, radius {radius:.4g}"] = Band(name, radius, max_ratio=None)
    return plot_families(bands, matched="max_shift")


def _numbers(file: str) -> dict[str, object]:
    return json.loads((DOCS / file).read_text(encoding="utf-8"))


def figures() -> dict[str, Callable[[], Figure]]:
    """What draws each figure, by its path below docs/assets."""
    found: dict[str, Callable[[], Figure]] = {
        "band-kl.svg": band,
        "families.svg": families,
        "kl-gradients.svg": plot_reference_kl,
        "selection.svg": lambda: plot_selection(_numbers("selection.json")),
        "tabular-ppo-clip.svg": lambda: plot_convergence(
            _numbers("tabular.json"), title="PPO-Clip with exact gradients"
        ),
        "zoo-key.svg": plot_key,
    }
    found |= {f"zoo/{name}.svg": partial(plot_weight, name) for name in OBJECTIVES}
    data = _numbers("preference.json")
    found |= {f"preference/{name}.svg": partial(draw, data[name]) for name, draw in PREFERENCE.items()}
    return found


def current(name: str) -> bool:
    """Whether the file of a figure is what would be drawn now.

    Args:
        name: Path of the figure below docs/assets.
    """
    path = ASSETS / name
    return path.exists() and same(path.read_text(encoding="utf-8"), svg(name))


def svg(name: str) -> str:
    """A figure as SVG, the same text each time.

    Args:
        name: Path of the figure below docs/assets.
    """
    with mpl.rc_context({key: STYLE[key] for key in ("svg.fonttype", "svg.hashsalt")}):
        return save_svg(figures()[name]())


def same(one: str, other: str) -> bool:
    """Whether two figures agree: everything that is text, and the pixels of what is embedded.

    Args:
        one: A figure as SVG.
        other: The other one.
    """
    texts = (_NAMED.sub("", _EMBEDDED.sub("", svg)) for svg in (one, other))
    if len(set(texts)) == 2:
        return False
    pairs = zip(_pixels(one), _pixels(other), strict=True)
    return all(a.shape == b.shape and np.abs(a - b).max() < 0.01 for a, b in pairs)


def _pixels(svg: str) -> Iterator[np.ndarray]:
    for data in _EMBEDDED.findall(svg):
        yield image.imread(io.BytesIO(base64.b64decode(data)))


def main() -> int:
    """Draws the figures, or compares them with the files."""
    parser = argparse.ArgumentParser(description="The figures of the documentation.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only figures whose path contains this (default: all)")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if a figure is out of date")
    parser.add_argument("--measure", action="store_true", help="run the example of tabular PPO-Clip first")
    options = parser.parse_args()
    if options.measure and options.check:
        parser.error("--measure writes numbers, and --check changes nothing; choose one")
    if options.measure:
        gaps = runpy.run_path(str(DOCS.parent / "examples/tabular_ppo_clip.py"))["gaps"]()
        rounded = {g: {k: [float(f"{x:.5g}") for x in v] for k, v in arms.items()} for g, arms in gaps.items()}
        TABULAR.write_text(json.dumps(rounded, ensure_ascii=False) + "\n", encoding="utf-8")
    chosen = [name for name in figures() if not options.names or any(part in name for part in options.names)]
    if not chosen:
        parser.error(f"no figure has {' or '.join(options.names)} in its path; there are {', '.join(figures())}")
    stale = [name for name in chosen if not current(name)]
    for name in stale:
        if options.check:
            print(f"docs/assets/{name} is out of date; run python tools/figures.py {name}")
            continue
        (ASSETS / name).write_text(svg(name), encoding="utf-8")
        if name == README:
            figures()[name]().savefig((ASSETS / name).with_suffix(".png"), dpi=150)
        print(f"figure: docs/assets/{name}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
