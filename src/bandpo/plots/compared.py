"""Figures of several runs beside each other: one colour for each group of runs that differ in their seed only."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bandpo.metrics import PROB_BINS
from bandpo.plots.curves import SPEED, Curves
from bandpo.plots.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, STYLE

Groups = Mapping[str, Sequence[Curves]]
"""The curves of the runs of each group, by its label."""
COMPARED: Mapping[str, tuple[str, str]] = {
    "reward": ("Reward", "mean reward of the samples"),
    "entropy": ("Entropy", "nats per token"),
    "clip_ratio/high_mean": ("Clipped, A > 0", "share of tokens"),
    "clip_ratio/low_mean": ("Clipped, A < 0", "share of tokens"),
    "completions/mean_length": ("Completion length", "tokens"),
    "kl": ("KL to the reference", "nats per token"),
    "kl/old_new": ("KL of the update, old to new policy", "nats per token"),
    "rewards/accuracies": ("First preferred by β φ", "share of pairs"),
    "concentrability/log_mean": ("KL to the start", "nats per completion"),
    SPEED: ("Speed", "tokens per second"),
}
"""The metrics that are compared, with title and unit."""
MOST_DRAWN = 300
"""Points of a curve that are drawn; of more, means over groups of equal numbers of points."""

_COLOURS = (BLUE, ORANGE, GREEN, PINK, BLACK, "#7B3294", "#A6611A", GREY)
_LINES = ("-", "--", "-.", ":")


def compared_panels(groups: Groups, unit: str) -> dict[str, Figure]:
    """The curves of the runs, a figure for each metric that some run has.

    A group of several runs has its mean as a thick line, where its runs have the same steps, and each run as a thin line.

    Args:
        groups: The curves of the runs of each group.
        unit: What the horizontal axis counts.

    Returns:
        The figures by their titles.
    """
    figures: dict[str, Figure] = {}
    for name, (title, what) in COMPARED.items():
        if not any(curves.curve(name).count for runs in groups.values() for curves in runs):
            continue
        with mpl.rc_context(STYLE):
            figures[title] = figure = Figure(figsize=(4.2, 3.1), layout="constrained")
            axes = figure.subplots()
            for runs, (colour, line) in zip(groups.values(), _looks(), strict=False):
                _draw_group(axes, [curves.curve(name).points() for curves in runs], colour, line)
            axes.set(title=title, ylabel=what, xlabel=unit)
    return figures


def compared_clips(groups: Groups) -> dict[str, Figure]:
    """The share of tokens whose gradient is clipped in bins of p, over the whole runs, for both signs of the advantage.

    Args:
        groups: The curves of the runs of each group; a run without these shares is left out.

    Returns:
        The figures by their titles; empty if no run has the shares.
    """
    figures: dict[str, Figure] = {}
    for side, title in (("high", "A > 0, above the upper bound"), ("low", "A < 0, below the lower bound")):
        if not any(curves.by_probability for runs in groups.values() for curves in runs):
            continue
        with mpl.rc_context(STYLE):
            figures[title] = figure = Figure(figsize=(5.0, 3.4), layout="constrained")
            axes = figure.subplots()
            for runs, (colour, line) in zip(groups.values(), _looks(), strict=False):
                known = [curves for curves in runs if curves.by_probability]
                if known:
                    axes.plot(clip_shares(known, side), color=colour, ls=line, marker="o", ms=4)
            axes.set(title=title, ylabel="share clipped in the bin", xlabel="probability under the old policy, p")
            axes.set_ylim(bottom=0)
            axes.set_xticks(range(len(PROB_BINS)), [b.replace(":", " to ") for b in PROB_BINS], rotation=45, ha="right")
    return figures


def legend(labels: Sequence[str]) -> Figure:
    """The colours and lines of the groups, for all figures.

    Args:
        labels: The labels of the groups, in their order.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 0.15 + 0.24 * len(labels)))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, 1), ylim=(len(labels) - 0.5, -0.5))
        axes.axis("off")
        for i, (label, (colour, line)) in enumerate(zip(labels, _looks(), strict=False)):
            axes.plot([0.02, 0.13], [i, i], color=colour, ls=line, lw=2)
            axes.text(0.16, i, label.replace("$", r"\$"), va="center", fontsize=9)
    return figure


def clip_shares(runs: Sequence[Curves], side: str | None) -> list[float]:
    """The mean over runs of a share in each bin of p.

    Args:
        runs: The runs.
        side: "low" or "high" for the share that is clipped; None for the share of all tokens.
    """
    return [float(np.mean([curves.clipped(side, name) for curves in runs])) for name in PROB_BINS]


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """A curve with at most `MOST_DRAWN` points: means over groups of equal numbers of points.

    Args:
        x: Where the points are.
        y: The values there.

    Examples:
        >>> x, y = thinned(range(600), [1.0] * 600)
        >>> len(x), x[:2], set(y)
        (300, [0.5, 2.5], {1.0})
    """
    if len(x) <= MOST_DRAWN:
        return list(x), list(y)
    parts = [np.array_split(np.asarray(values, dtype=np.float64), MOST_DRAWN) for values in (x, y)]
    return tuple([float(part.mean()) for part in half] for half in parts)  # type: ignore[return-value]


def _looks() -> list[tuple[str, str]]:
    colours = len(_COLOURS)
    return [
        (colour, _LINES[i // colours]) for i, colour in zip(range(colours * len(_LINES)), cycle(_COLOURS), strict=False)
    ]


def _draw_group(axes: Axes, curves: Sequence[tuple[list[float], list[float]]], colour: str, line: str) -> None:
    drawn = [thinned(x, y) for x, y in curves if x]
    alone = len(drawn) == 1
    for x, y in drawn:
        one = "o" if len(x) == 1 else None
        axes.plot(
            x, y, color=colour, ls=line, lw=1.6 if alone else 0.8, alpha=None if alone else 0.45, marker=one, ms=4
        )
    if len(drawn) > 1 and all(x == drawn[0][0] for x, _ in drawn):
        axes.plot(drawn[0][0], np.mean([y for _, y in drawn], axis=0), color=colour, ls=line, lw=2)
