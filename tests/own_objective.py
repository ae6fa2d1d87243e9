"""Objectives of a user, found by their import path."""

from bandpo import JS, Band, Clip, FDivergence, Objective

MINE = Objective(bounds=Band(JS, 0.02), name="mine")
NOT_ONE = Band(JS, 0.02)


def own_divergence(u):
    """Four times the Hellinger divergence, as a user would write it."""
    return 2 * (1 + u) - 4 * u.sqrt()


def own_surrogate(log_ratio, advantages, bounds):
    """The gradient fades outside of the interval instead of ending there."""
    ratio = log_ratio.exp()
    inside = ratio.clamp(bounds.lower, bounds.upper)
    return advantages * (inside + 0.1 * (ratio - inside))


BAND = Objective(bounds=Band(FDivergence("four-hellinger", own_divergence), 0.02), advantage="mean", name="own-band")
FADES = Objective(
    bounds=Band(FDivergence("four-hellinger", own_divergence), 0.02),
    surrogate=own_surrogate,
    aggregation="seq-mean-token-sum-norm",
    advantage="mean",
    name="fades",
)
OF_SEQUENCES = Objective(
    bounds=Clip(0.1, 0.3), ratio_level="sequence", aggregation="seq-mean-token-mean", name="of-sequences"
)
