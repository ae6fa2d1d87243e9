"""The figures of pruning and packing."""

from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from bandpo.plots import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, STYLE

_COLOURS = {
    "full": BLACK,
    "packed": GREY,
    "pruned 0.3": "#56B4E9",
    "pruned 0.5": BLUE,
    "pruned 0.7": "#332288",
    "pruned 0.5, packed": GREEN,
    "both 0.5, packed": "#117733",
    "CPPO-like 0.5": ORANGE,
    "GRESO-like 0.5": PINK,
}


def plot_selection(found: dict[str, Any]) -> Figure:
    """Reward against update tokens, and the final reward and the tokens of every arm, with a point for each seed.

    Args:
        found: Result of `selection_on_the_main_job`.

    Returns:
        The figure.
    """
    arms = found["arms"]
    with mpl.rc_context(STYLE):
        figure, (left, middle, right) = plt.subplots(
            1, 3, figsize=(13, 4), layout="constrained", width_ratios=[1.3, 1, 1]
        )
        for name, rows in arms.items():
            colour = _COLOURS.get(name, GREY)
            tokens = np.mean([[x for x, _ in row["curve"]] for row in rows], axis=0)
            reward = np.mean([[y for _, y in row["curve"]] for row in rows], axis=0)
            left.plot(tokens / 1e3, _smooth(reward), color=colour, label=name)
        order = list(arms)
        for axes, key, scale in ((middle, "after", 1), (right, "tokens", 1e3)):
            for i, name in enumerate(order):
                values = [row[key] / scale for row in arms[name]]
                axes.plot(values, [i] * len(values), "o", color=_COLOURS.get(name, GREY), alpha=0.7)
                axes.plot(np.mean(values), i, "|", color=BLACK, ms=14)
            axes.set_yticks(range(len(order)), order if axes is middle else [""] * len(order), fontsize=8)
            axes.invert_yaxis()
        left.set(
            xlabel="thousand completion tokens in updates",
            ylabel="mean reward of the rollout (smoothed)",
            title="Learning against tokens",
        )
        left.legend(fontsize=7)
        middle.set(xlabel="mean@8 on held-out prompts", title="Where it ends")
        right.set(xlabel="thousand completion tokens in updates", title="What it was trained on", xlim=(0, None))
    return figure


def _smooth(x: np.ndarray, width: int = 5) -> np.ndarray:
    """The running mean of the last `width` values, of the length of the data."""
    return np.array([x[max(0, i - width + 1) : i + 1].mean() for i in range(len(x))])
