"""Figures of bands, training curves and the zoo.

The names are imported from `bandpo.plots.figures` on first use: `bandpo bounds --no-figure` needs no matplotlib.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bandpo.plots.figures import BLACK as BLACK
    from bandpo.plots.figures import BLUE as BLUE
    from bandpo.plots.figures import GREEN as GREEN
    from bandpo.plots.figures import GREY as GREY
    from bandpo.plots.figures import ORANGE as ORANGE
    from bandpo.plots.figures import PINK as PINK
    from bandpo.plots.figures import STYLE as STYLE
    from bandpo.plots.figures import plot_bounds as plot_bounds
    from bandpo.plots.figures import plot_clip_by_probability as plot_clip_by_probability
    from bandpo.plots.figures import plot_convergence as plot_convergence
    from bandpo.plots.figures import plot_families as plot_families
    from bandpo.plots.figures import plot_preference as plot_preference
    from bandpo.plots.figures import plot_training as plot_training
    from bandpo.plots.figures import preference_panels as preference_panels
    from bandpo.plots.figures import training_panels as training_panels

__all__ = [
    *("BLACK", "BLUE", "GREEN", "GREY", "ORANGE", "PINK", "STYLE"),
    *("plot_bounds", "plot_clip_by_probability", "plot_convergence", "plot_families", "plot_preference"),
    *("plot_training", "preference_panels", "training_panels"),
]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module("bandpo.plots.figures"), name)
    raise AttributeError(f"module 'bandpo.plots' has no attribute {name!r}")
