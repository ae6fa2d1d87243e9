"""Figures of bands, training curves and the zoo."""

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
