"""The project's figures: the band, and what a run did. Needs the extra `plot`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch

try:
    import matplotlib as mpl
except ImportError as error:
    raise ImportError(f"bandpo.plots needs matplotlib: pip install 'bandpo[plot]' ({error})") from error
mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bandpo._inputs import inputs_of
from bandpo.bounds import DCPO, Bounds, Clip
from bandpo.metrics import PROB_BINS
from bandpo.plots.curves import MOST_POINTS, Curves

BLUE, ORANGE, GREEN, PINK, GREY, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8a8a8a", "#222222"
"""The palette of Okabe and Ito: colour-blind readers can tell the colours apart, and in grey print their lightness differs."""
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "bandpo",
}
"""Settings of matplotlib for all figures."""
Log = Iterable[Mapping[str, Any]] | Curves
"""Rows of a metrics.jsonl, which are read once, or what was read of them."""

_LOGIT_RANGE = (-11.5, 7.0)
"""Horizontal axis of a band, the logit of p: from p = 1e-5 to p = 0.999."""


def plot_bounds(bounds: Bounds, label: str, *, tokens: Mapping[str, Sequence[float]] | None = None) -> Figure:
    """The interval of the ratio against p, over PPO's clip, Clip-Higher, DCPO and the simplex limit.

    Args:
        bounds: Bounds to draw; they are left out if they depend on more than p.
        label: Name of the bounds in the legend.
        tokens: "p", "ratio" and "clipped" (0 or 1) of the tokens of a run, drawn as points.
    """
    logit, logp = _probabilities()
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
        if not inputs_of(bounds):
            _draw_interval(axes, logit, bounds(logp), BLUE, label, fill=True)
        for other, colour, style, name in (
            (Clip(0.2), BLACK, ":", "PPO clip, 0.2"),
            (Clip(0.2, 0.28), ORANGE, "--", "Clip-Higher, 0.2/0.28"),
            (DCPO(), GREEN, "-.", "DCPO, 0.16/0.20"),
        ):
            _draw_interval(axes, logit, other(logp), colour, name, style=style)
        axes.plot(logit, (-logp).exp(), color=GREY, lw=1, label="simplex limit, 1/p")
        if tokens is not None and len(tokens["p"]):
            p, ratio, clipped = (torch.tensor(tokens[k], dtype=torch.float64) for k in ("p", "ratio", "clipped"))
            x = p.clamp(1e-5, 1 - 1e-3).logit()
            for chosen, colour, size, name in (
                (clipped == 0, PINK, 5, "tokens of this run"),
                (clipped == 1, ORANGE, 14, "… whose gradient is clipped"),
            ):
                axes.scatter(x[chosen], ratio[chosen], s=size, color=colour, alpha=0.6, lw=0, label=name, zorder=3)
        _probability_axes(axes)
        axes.legend(loc="upper right", fontsize=8)
    return figure


def plot_families(bands: Mapping[str, Bounds], *, matched: str | None = None) -> Figure:
    """The intervals of several balls over p, for radii that were matched by `match_radius`.

    Args:
        bands: Bounds by their labels.
        matched: What was matched, for the title; None if the radii are the same.
    """
    logit, logp = _probabilities()
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
        looks = [(c, s) for s in ("-", "--", ":") for c in (BLUE, ORANGE, GREEN, PINK, BLACK)]
        for (label, band), (colour, style) in zip(bands.items(), looks, strict=False):
            _draw_interval(axes, logit, band(logp), colour, label, style=style)
        axes.plot(logit, (-logp).exp(), color=GREY, lw=1, label="simplex limit, 1/p")
        axes.set_title("the same radius" if matched is None else f"radii matched by {matched}")
        _probability_axes(axes)
        axes.legend(loc="upper right", fontsize=8)
    return figure


def plot_convergence(groups: Mapping[str, Mapping[str, Sequence[float]]], *, title: str = "") -> Figure:
    """Distance to the optimal value over the outer steps of tabular PPO-Clip (`bandpo.lab.experiments.tabular`), log scale.

    Args:
        groups: Gaps of the runs of each group. Each group has a line style, and a run has the same colour in every group.
        title: Title of the figure.
    """
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
        for (group, runs), style in zip(groups.items(), ("-", "--", ":"), strict=False):
            for (label, gaps), colour in zip(runs.items(), (BLUE, ORANGE, GREEN, PINK, BLACK), strict=False):
                width = 3.0 if colour == BLUE else 1.5  # the second curve may lie on the first
                axes.plot([max(g, 1e-16) for g in gaps], color=colour, ls=style, lw=width, label=f"{group}, {label}")
        axes.set(yscale="log", xlabel="outer step n", ylabel="V* - V(π_n)", title=title)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(groups))
    return figure


def plot_training(log: Log) -> Figure:
    """Reward, entropy and clip fractions over the optimiser steps of a run.

    Args:
        log: Rows of metrics.jsonl.
    """
    log = _read(log)
    with mpl.rc_context(STYLE):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
        _draw_series(left, log, "reward", BLUE, "reward")
        left.set(ylabel="mean reward of the rollout", title="Reward")
        _draw_series(middle, log, "entropy", GREEN, "entropy")
        middle.set(ylabel="nats per token", title="Entropy")
        for key, colour, name in (
            ("clip_ratio/high_mean", ORANGE, "A > 0, above the upper bound"),
            ("clip_ratio/low_mean", BLUE, "A < 0, below the lower bound"),
        ):
            _draw_series(right, log, key, colour, name)
        right.set(ylabel="share of tokens", title="Clipped gradient")
        right.legend(fontsize=8)
        for axes in (left, middle, right):
            axes.set_xlabel("optimiser step")
            axes.set_ylim(bottom=0)
        _say_reduced(figure, log)
    return figure


def plot_preference(log: Log, unit: str = "round") -> Figure:
    """Reward of the samples, distance from the reference and implicit rewards over a preference run.

    Args:
        log: Rows of metrics.jsonl.
        unit: What a row is about: "round", or "step" of a run on given pairs. A run that samples only once, so that its samples
            are those of the initial policy, is drawn without the two figures about samples; one without a measured distance is
            drawn without that figure.
    """
    log = _read(log)
    with mpl.rc_context(STYLE):
        sampled = unit == "round" and log.rows > 1 and log.curve("reward").count == log.rows
        distance = sampled and log.curve("concentrability/log_mean").count > 0
        figure = plt.figure(figsize=(11 if distance else 7.6, 3.2), layout="constrained")
        axes = cast("Sequence[Axes]", figure.subplots(1, 3 if distance else 2))
        if sampled:
            _draw_series(axes[0], log, "reward", BLUE, "reward")
            axes[0].set(ylabel="mean reward", title="Samples before each fit")
            axes[0].set_ylim(bottom=0)
        else:
            _draw_series(axes[0], log, "rewards/accuracies", BLUE, "accuracy")
            axes[0].set(ylabel="share of pairs", title="First preferred by β φ")
        if distance:
            _draw_series(axes[1], log, "concentrability/log_mean", GREEN, "KL")
            axes[1].set(ylabel="nats per completion", title="Their KL to the start")
        for key, colour, name in (("rewards/chosen", BLUE, "chosen"), ("rewards/rejected", ORANGE, "rejected")):
            _draw_series(axes[-1], log, key, colour, name)
        axes[-1].set(ylabel="β φ", title="Implicit reward in training")
        axes[-1].legend(fontsize=8)
        for axis in axes:
            axis.set_xlabel("round" if unit == "round" else "optimiser step")
        _say_reduced(figure, log)
    return figure


def plot_clip_by_probability(log: Log) -> Figure:
    """Share of tokens whose gradient is clipped in bins of p, and the share of tokens in each bin, over a whole run.

    Args:
        log: Rows of metrics.jsonl.
    """
    log = _read(log)
    low, high, share = ([log.clipped(side, b) for b in PROB_BINS] for side in ("low", "high", None))
    with mpl.rc_context(STYLE):
        figure, (top, bottom) = plt.subplots(
            2, 1, figsize=(7.6, 4.4), sharex=True, layout="constrained", height_ratios=[2, 1]
        )
        x = range(len(PROB_BINS))
        top.bar([i - 0.2 for i in x], high, 0.4, color=ORANGE, label="A > 0, above the upper bound")
        top.bar([i + 0.2 for i in x], low, 0.4, color=BLUE, label="A < 0, below the lower bound")
        top.set(ylabel="share clipped\nin the bin")
        top.legend(fontsize=8)
        bottom.bar(x, share, 0.6, color=GREY)
        bottom.set(ylabel="share of\nall tokens", xlabel="probability of the token under the old policy, p")
        bottom.set_xticks(list(x), [b.replace(":", " to ") for b in PROB_BINS], rotation=20, ha="right")
        for axes in (top, bottom):
            axes.grid(visible=False, axis="x")
    return figure


def _probabilities() -> tuple[torch.Tensor, torch.Tensor]:
    """The horizontal axis of a band: logits and log-probabilities, `(1000,)`, float64."""
    logit = torch.linspace(*_LOGIT_RANGE, 1000, dtype=torch.float64)
    return logit, torch.nn.functional.logsigmoid(logit)


def _probability_axes(axes: Axes) -> None:
    axes.set(
        yscale="log",
        ylim=(0.02, 60),
        xlim=_LOGIT_RANGE,
        xlabel="probability of the token under the old policy, p",
        ylabel="ratio r = π/π_old",
    )
    ticks = torch.tensor([1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999], dtype=torch.float64)
    axes.set_xticks(
        cast("list[float]", ticks.logit().tolist()),
        ["1e-5", "1e-4", "0.001", "0.01", "0.1", "0.5", "0.9", "0.99", "0.999"],
    )
    axes.set_yticks([0.05, 0.2, 0.5, 1, 2, 5, 10, 50], ["0.05", "0.2", "0.5", "1", "2", "5", "10", "50"])
    axes.minorticks_off()


def _draw_interval(
    axes: Axes, x: torch.Tensor, bounds: Any, colour: str, label: str, *, style: str = "-", fill: bool = False
) -> None:
    lower, upper = (b.clamp(1e-3, 1e6) for b in bounds)
    if fill:
        axes.fill_between(x, lower, upper, color=colour, alpha=0.12, lw=0)
    axes.plot(x, upper, color=colour, ls=style, lw=2 if fill else 1.3, label=label)
    axes.plot(x, lower, color=colour, ls=style, lw=2 if fill else 1.3)


def _draw_series(axes: Axes, log: Curves, key: str, colour: str, label: str) -> None:
    axes.plot(*log.curve(key).points(), color=colour, lw=1.6, label=label)


def _read(log: Log) -> Curves:
    return log if isinstance(log, Curves) else Curves(log)


def _say_reduced(figure: Figure, log: Curves) -> None:
    """Say under a figure that it does not have all points."""
    if log.reduced:
        figure.supxlabel(
            f"{log.rows:,} rows: of each curve at most {MOST_POINTS:,} points, the lowest and highest of their group",
            fontsize=8,
        )
