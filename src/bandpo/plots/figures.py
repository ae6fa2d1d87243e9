"""The project's figures: the band, and what a run did. Needs the extra `plot`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch

try:
    import matplotlib as mpl
except ImportError as error:
    raise ImportError(f"bandpo.plots needs matplotlib: pip install 'bandpo[plot]' ({error})") from error
mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bandpo._inputs import inputs_of
from bandpo.bounds import DCPO, Bounds, Clip
from bandpo.metrics import PROB_BINS
from bandpo.plots.curves import MOST_POINTS, SPEED, Curves

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


class _Panel(NamedTuple):
    """Axes with some curves of a run."""

    title: str
    unit: str
    series: tuple[tuple[str, str, str], ...]
    """Metric, colour and label of each curve."""
    from_zero: bool = True


_ENTROPY = _Panel("Entropy", "nats per token", (("entropy", GREEN, "entropy"),))
_TRAINING = (
    _Panel("Reward", "mean reward of the rollout", (("reward", BLUE, "reward"),)),
    _ENTROPY,
    _Panel(
        "Clipped gradient",
        "share of tokens",
        (
            ("clip_ratio/high_mean", ORANGE, "A > 0, above the upper bound"),
            ("clip_ratio/low_mean", BLUE, "A < 0, below the lower bound"),
        ),
    ),
    _Panel(
        "Completion length",
        "tokens",
        (("completions/mean_length", BLUE, "mean"), ("completions/max_length", GREY, "longest")),
    ),
    _Panel("Speed", "tokens of the rollout per second", ((SPEED, PINK, "speed"),)),
)
_LOGIT_RANGE = (-11.5, 7.0)
"""Horizontal axis of a band, the logit of p: from p = 1e-5 to p = 0.999."""
_DRAWN_RATIOS = (1e-3, 1e6)
_NARROW = 6.0
"""Width in inches below which a figure of a whole run is laid out for a column or a phone."""


class Interval(NamedTuple):
    """The interval of the ratio at the probabilities that `plot_bounds` draws, for a file.

    Args:
        lower: Lower ends.
        upper: Upper ends.
    """

    lower: list[float]
    upper: list[float]

    POINTS = 1000
    """Number of ends: the logit of p goes from that of 1e-5 to that of 0.999 in equal steps."""


def drawn_interval(bounds: Bounds) -> Interval | None:
    """The interval of bounds, as `plot_bounds` draws it; None if they depend on more than p, or an end is NaN.

    Args:
        bounds: The bounds.
    """
    if inputs_of(bounds):
        return None
    lower, upper = (end.clamp(*_DRAWN_RATIOS).expand(Interval.POINTS) for end in bounds(_probabilities()[1]))
    if bool((lower + upper).isnan().any()):
        return None
    return Interval(*([float(f"{x:.6g}") for x in cast("list[float]", end.tolist())] for end in (lower, upper)))


def plot_bounds(
    bounds: Bounds | Interval | None,
    label: str,
    *,
    tokens: Mapping[str, Sequence[float]] | None = None,
    width: float = 7.6,
) -> Figure:
    """The interval of the ratio against p, over PPO's clip, Clip-Higher, DCPO and the simplex limit.

    Args:
        bounds: Bounds to draw, or their interval; they are left out if they depend on more than p, or are None.
        label: Name of the bounds in the legend.
        tokens: "p", "ratio" and "clipped" (0 or 1) of the tokens of a run, drawn as points.
        width: Width in inches. A narrow figure has its legend below.
    """
    logit, logp = _probabilities()
    narrow = width < _NARROW
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(width, 4.6), layout="constrained")
        if isinstance(bounds, Interval):
            own = (torch.tensor(end, dtype=torch.float64) for end in bounds)
            _draw_interval(axes, logit, own, BLUE, label, fill=True)
        elif bounds is not None and not inputs_of(bounds):
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
        if narrow:
            figure.legend(loc="outside lower center", fontsize=8, ncols=2)
        else:
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
    return _side_by_side(_read(log), _TRAINING[:3], "optimiser step", width=11)


def training_panels(log: Log) -> dict[str, Figure]:
    """Curves of a run over its optimiser steps, a figure for each: what `plot_training` has, completion length and speed.

    A figure without a point is left out. The speed needs rows with `step_time`, which is in timings.jsonl.

    Args:
        log: Rows of metrics.jsonl.

    Returns:
        The figures by their titles.
    """
    return _one_by_one(_read(log), _TRAINING, "optimiser step")


def plot_preference(log: Log, unit: str = "round") -> Figure:
    """Reward of the samples, distance from the reference and implicit rewards over a preference run.

    Args:
        log: Rows of metrics.jsonl.
        unit: What a row is about: "round", or "step" of a run on given pairs. A run that samples only once, so that its samples
            are those of the initial policy, is drawn without the two figures about samples; one without a measured distance is
            drawn without that figure.
    """
    log = _read(log)
    panels = _preference(log, unit)
    width = 11 if len(panels) == 3 else 7.6
    return _side_by_side(log, panels, "round" if unit == "round" else "optimiser step", width=width)


def preference_panels(log: Log, unit: str = "round") -> dict[str, Figure]:
    """The panels of `plot_preference` and the entropy, a figure for each; one without a point is left out.

    Args:
        log: Rows of metrics.jsonl.
        unit: What a row is about: "round", or "step" of a run on given pairs.

    Returns:
        The figures by their titles.
    """
    log = _read(log)
    return _one_by_one(log, [*_preference(log, unit), _ENTROPY], "round" if unit == "round" else "optimiser step")


def plot_clip_by_probability(log: Log, *, width: float = 7.6) -> Figure:
    """Share of tokens whose gradient is clipped in bins of p, and the share of tokens in each bin, over a whole run.

    Args:
        log: Rows of metrics.jsonl.
        width: Width in inches.
    """
    log = _read(log)
    low, high, share = ([log.clipped(side, b) for b in PROB_BINS] for side in ("low", "high", None))
    with mpl.rc_context(STYLE):
        figure, (top, bottom) = plt.subplots(
            2,
            1,
            figsize=(width, 4.6 if width < _NARROW else 4.4),
            sharex=True,
            layout="constrained",
            height_ratios=[2, 1],
        )
        x = range(len(PROB_BINS))
        top.bar([i - 0.2 for i in x], high, 0.4, color=ORANGE, label="A > 0, above the upper bound")
        top.bar([i + 0.2 for i in x], low, 0.4, color=BLUE, label="A < 0, below the lower bound")
        top.set(ylabel="share clipped\nin the bin")
        top.legend(fontsize=8)
        bottom.bar(x, share, 0.6, color=GREY)
        bottom.set(ylabel="share of\nall tokens", xlabel="probability of the token under the old policy, p")
        bottom.set_xticks(
            list(x), [b.replace(":", " to ") for b in PROB_BINS], rotation=45 if width < _NARROW else 20, ha="right"
        )
        for axes in (top, bottom):
            axes.grid(visible=False, axis="x")
    return figure


def _preference(log: Curves, unit: str) -> list[_Panel]:
    """The panels of a preference run, those that its log has."""
    sampled = unit == "round" and log.rows > 1 and log.curve("reward").count == log.rows
    panels = [_Panel("First preferred by β φ", "share of pairs", (("rewards/accuracies", BLUE, "accuracy"),), False)]
    if sampled:
        panels = [_Panel("Samples before each fit", "mean reward", (("reward", BLUE, "reward"),))]
    if sampled and log.curve("concentrability/log_mean").count:
        series = (("concentrability/log_mean", GREEN, "KL"),)
        panels.append(_Panel("Their KL to the start", "nats per completion", series, False))
    series = (("rewards/chosen", BLUE, "chosen"), ("rewards/rejected", ORANGE, "rejected"))
    return [*panels, _Panel("Implicit reward in training", "β φ", series, False)]


def _side_by_side(log: Curves, panels: Sequence[_Panel], unit: str, *, width: float) -> Figure:
    with mpl.rc_context(STYLE):
        figure = plt.figure(figsize=(width, 3.2), layout="constrained")
        for axes, panel in zip(cast("Sequence[Axes]", figure.subplots(1, len(panels))), panels, strict=True):
            _draw_panel(axes, log, panel, unit)
        _say_reduced(figure, log)
    return figure


def _one_by_one(log: Curves, panels: Sequence[_Panel], unit: str) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    for panel in panels:
        if not any(log.curve(key).count for key, _, _ in panel.series):
            continue
        with mpl.rc_context(STYLE):
            figures[panel.title] = figure = Figure(figsize=(4.2, 3.1), layout="constrained")
            _draw_panel(figure.subplots(), log, panel, unit)
    return figures


def _draw_panel(axes: Axes, log: Curves, panel: _Panel, unit: str) -> None:
    for key, colour, label in panel.series:
        x, y = log.curve(key).points()
        axes.plot(x, y, color=colour, lw=1.6, label=label, marker="o" if len(x) == 1 else None)
    axes.set(ylabel=panel.unit, title=panel.title, xlabel=unit)
    if unit == "round":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    if len(panel.series) > 1:
        axes.legend(fontsize=8)


def _probabilities() -> tuple[torch.Tensor, torch.Tensor]:
    """The horizontal axis of a band: logits and log-probabilities, `(1000,)`, float64."""
    logit = torch.linspace(*_LOGIT_RANGE, Interval.POINTS, dtype=torch.float64)
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
    lower, upper = (b.clamp(*_DRAWN_RATIOS) for b in bounds)
    if fill:
        axes.fill_between(x, lower, upper, color=colour, alpha=0.12, lw=0)
    axes.plot(x, upper, color=colour, ls=style, lw=2 if fill else 1.3, label=label)
    axes.plot(x, lower, color=colour, ls=style, lw=2 if fill else 1.3)


def _read(log: Log) -> Curves:
    return log if isinstance(log, Curves) else Curves(log)


def _say_reduced(figure: Figure, log: Curves) -> None:
    """Say under a figure that it does not have all points."""
    if log.reduced:
        figure.supxlabel(
            f"{log.rows:,} rows: of each curve at most {MOST_POINTS:,} points, the lowest and highest of their group",
            fontsize=8,
        )
