"""The figures of a comparison. They need the extra `plot`."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from bandpo.metrics import PROB_BINS
from bandpo.plots import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, STYLE

_COLOURS = (BLUE, BLACK, ORANGE, GREEN, PINK, GREY, "#E69F00", "#56B4E9", "#B8A800", "#7B3294", "#A6611A")


def plot_curves(curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Reward and entropy over the rollouts: mean and 95% t-interval over runs.

    Args:
        curves: `{"reward": [mean, low, high], "entropy": [mean, low, high]}` of each arm.

    Returns:
        The figure.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 4.0), layout="constrained")
        axes = figure.subplots(1, 2)
        for panel, (name, title, unit) in zip(
            axes,
            (("reward", "Training reward", "mean reward of the rollout"), ("entropy", "Entropy", "nats per token")),
            strict=True,
        ):
            for (label, found), colour in zip(curves.items(), cycle(_COLOURS)):
                mean, low, high = np.array(found[name], dtype=float)  # None, which JSON has for NaN, becomes NaN
                panel.plot(mean, color=colour, lw=1.5, label=label)
                panel.fill_between(range(len(mean)), low, high, color=colour, alpha=0.12, lw=0)
            panel.set(title=title, ylabel=unit, xlabel="rollout")
        axes[0].legend(fontsize=8)
    return figure


def plot_forest(differences: Mapping[str, Mapping[str, Any]], baseline: str, measure: str) -> Figure:
    """Paired differences with a baseline: mean and Student's 95% interval, filled where Holm's p is below 0.05.

    Args:
        differences: `{"mean": {"value", "low", "high"}, "p_holm": ...}` of each arm.
        baseline: Name of the baseline.
        measure: Name of the measure.

    Returns:
        The figure.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 0.9 + 0.28 * len(differences)), layout="constrained")
        axes = figure.subplots()
        _draw_forest(axes, differences, list(differences))
        axes.invert_yaxis()
        axes.set(xlabel=f"{measure}: paired difference with {baseline}, mean and 95% interval")
    return figure


def plot_forests(by_measure: Mapping[str, Mapping[str, Mapping[str, Any]]], baseline: str) -> Figure:
    """The paired differences of few arms with a baseline in several measures, one panel for each measure.

    Args:
        by_measure: The differences of each measure, as `plot_forest` takes them.
        baseline: Name of the baseline.

    Returns:
        The figure.
    """
    arms = list(dict.fromkeys(arm for differences in by_measure.values() for arm in differences))
    columns = min(2, len(by_measure))
    rows = -(-len(by_measure) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.6 + 4.2 * columns, (0.8 + 0.28 * len(arms)) * rows + 0.4), layout="constrained")
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for axes, (measure, differences) in zip(panels, by_measure.items(), strict=False):
            _draw_forest(axes, differences, arms)
            axes.set_ylim(len(arms) - 0.5, -0.5)
            axes.set_title(measure, fontsize=10)
        for axes in panels[len(by_measure) :]:
            axes.set_axis_off()
        figure.supxlabel(f"paired difference with {baseline}, mean and 95% interval", fontsize=9)
    return figure


def _draw_forest(axes: Axes, differences: Mapping[str, Mapping[str, Any]], arms: Sequence[str]) -> None:
    for i, arm in enumerate(arms):
        if (found := differences.get(arm)) is None:
            continue
        mean, clear = found["mean"], (found["p_holm"] or 0.0) < 0.05 and found["p_holm"] is not None
        if mean["value"] is None:  # a run diverged
            axes.text(0.0, i, "no number: a run diverged", color=ORANGE, va="center", fontsize=7)
            continue
        colour = GREY if not clear else BLUE if mean["value"] > 0 else ORANGE
        axes.plot([mean["low"], mean["high"]], [i, i], color=colour, lw=2)
        axes.plot(mean["value"], i, "o", color=colour, mfc=colour if clear else "white")
    axes.axvline(0, color=BLACK, lw=0.8)
    axes.set_yticks(range(len(arms)), arms)
    axes.grid(visible=False, axis="y")


def plot_clip_maps(clip: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Share of tokens whose gradient is clipped, by probability of the token, for each arm.

    Args:
        clip: `{"low": [share of each bin], "high": [share of each bin]}` of each arm.

    Returns:
        The figure.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 1.1 + 0.27 * len(clip)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        shares = np.array([[found[side] for side in ("high", "low")] for found in clip.values()], dtype=float)
        top = np.nanmax([0.3, *shares.ravel()])
        pictures: list[AxesImage] = []
        for axes, side, title in zip(
            panels, ("high", "low"), ("A > 0, above the upper bound", "A < 0, below the lower bound"), strict=True
        ):
            grid = np.array([found[side] for found in clip.values()], dtype=float)
            pictures.append(axes.imshow(grid, cmap="Blues", vmin=0, vmax=top, aspect="auto"))
            for i, j, value in _cells(grid):
                if value >= 0.005:
                    colour = "white" if value > 0.6 * top else BLACK
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
            axes.set_xticks(
                range(len(PROB_BINS)), [b.replace(":", " to ") for b in PROB_BINS], rotation=30, ha="right", fontsize=8
            )
            axes.set_yticks(range(len(clip)), list(clip), fontsize=8)
            axes.set_title(title, fontsize=10)
            axes.grid(visible=False)
        figure.colorbar(pictures[-1], ax=panels, label="share of the bin", shrink=0.8)
        figure.supxlabel("probability of the token under the sampler", fontsize=9)
    return figure


def plot_robustness(
    maps: Mapping[str, Mapping[str, Any]], rates: Sequence[float], reuse: Sequence[tuple[int, int]]
) -> Figure:
    """Gain in mean@k over the plane of learning rate and reuse, one panel for each objective.

    Args:
        maps: `{"gain": [[gain of each reuse] of each rate], "learns": share}` of each objective.
        rates: Multiples of the learning rate.
        reuse: (epochs, lag) pairs.

    Returns:
        The figure.
    """
    with mpl.rc_context(STYLE):
        columns = min(5, len(maps))
        rows = -(-len(maps) // columns)
        figure = Figure(figsize=(2.4 * columns + 0.6, 2.1 * rows + 0.6), layout="constrained")
        panels = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
        limit = (
            max((abs(c) for m in maps.values() for row in m["gain"] for c in row if c is not None), default=0.1) or 0.1
        )
        for axes in panels[len(maps) :]:
            axes.set_axis_off()
        pictures: list[AxesImage] = []
        for axes, (label, found) in zip(panels, maps.items(), strict=False):
            grid = np.array([[np.nan if c is None else c for c in row] for row in found["gain"]])
            pictures.append(axes.imshow(grid, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto", origin="lower"))
            axes.set_title(f"{label}: {found['learns']:.0%} learn", fontsize=9)
            axes.set_xticks(
                range(len(reuse)),
                [f"K{k}" + (f", lag {lag}" if lag else "") for k, lag in reuse],
                rotation=45,
                ha="right",
                fontsize=7,
            )
            axes.set_yticks(range(len(rates)), [f"x{r:g}" for r in rates], fontsize=7)
            axes.grid(visible=False)
        figure.colorbar(pictures[-1], ax=list(panels), label="gain in mean@k", shrink=0.8)
        figure.supylabel("learning rate", fontsize=9)
    return figure


def plot_exact(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The bandit: probability of the best arm over the batches, and the share of seeds that commit to it with its interval.

    Args:
        found: `{"curve": [...], "commit": [value, low, high]}` of each objective.

    Returns:
        The figure.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        for i, ((label, row), colour) in enumerate(zip(found.items(), cycle(_COLOURS))):
            left.plot(row["curve"], color=colour, lw=1.5, label=label)
            value, low, high = row["commit"]
            right.plot([low, high], [i, i], color=colour, lw=2)
            right.plot(value, i, "o", color=colour)
        left.set(xlabel="batch", ylabel="P(best arm), mean over seeds", title="A rare best arm")
        right.set_yticks(range(len(found)), list(found))
        right.invert_yaxis()
        right.set(xlabel="share of seeds that commit to it, Wilson's 95%", xlim=(0, 1))
        left.legend(fontsize=7)
    return figure


def plot_regimes(found: Mapping[str, Any]) -> Figure:
    """Difference in commitment with the baseline over rarity and reuse, one panel for each objective.

    Args:
        found: Result of `bandpo.lab.comparison.sweeps.regimes`.

    Returns:
        The figure.
    """
    panels = {name: (np.array(cells)[..., 0], "") for name, cells in found["against"].items()}
    return _grids(
        panels,
        [f"{p:g}" for p in found["rarities"]],
        [f"K{k} M{m}" for k, m in found["reuse"]],
        ("probability of the best arm at the start", "reuse", f"commits, less {found['baseline']}'s share"),
        "PuOr_r",
        None,
    )


def plot_planes(found: Mapping[str, Any]) -> Figure:
    """Mean reward over learning rate and width, one panel for each objective.

    Args:
        found: Result of `bandpo.lab.comparison.sweeps.planes`.

    Returns:
        The figure.
    """
    panels = {name: (np.array(cells), f": best {np.max(cells):.3f}") for name, cells in found["value"].items()}
    return _grids(
        panels,
        [f"x{w:g}" for w in found["widths"]],
        [f"{lr:g}" for lr in found["rates"]],
        ("multiple of ε or δ", "learning rate", "mean reward"),
        "Blues",
        (0.4, 0.95),
    )


def _grids(
    panels: Mapping[str, tuple[NDArray[np.float64], str]],
    across: Sequence[str],
    up: Sequence[str],
    names: tuple[str, str, str],
    colours: str,
    limits: tuple[float, float] | None,
) -> Figure:
    with mpl.rc_context(STYLE):
        columns = min(4, len(panels))
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(2.6 * columns + 0.6, 2.0 * rows + 0.6), layout="constrained")
        axes_of = figure.subplots(rows, columns, squeeze=False).ravel()
        largest = max(np.abs(grid).max() for grid, _ in panels.values()) or 1.0
        low, high = limits or (-largest, largest)
        for axes in axes_of[len(panels) :]:
            axes.set_axis_off()
        pictures: list[AxesImage] = []
        for axes, (label, (grid, note)) in zip(axes_of, panels.items(), strict=False):
            pictures.append(axes.imshow(grid, cmap=colours, vmin=low, vmax=high, aspect="auto", origin="lower"))
            for i, j, value in _cells(grid):
                far = value > (low + 2 * high) / 3 if limits else abs(value) > 0.6 * largest
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color="white" if far else BLACK)
            axes.set_title(label + note, fontsize=9)
            shown = across if grid.shape[1] == len(across) else [""] * grid.shape[1]
            axes.set_xticks(range(len(shown)), shown, fontsize=7)
            axes.set_yticks(range(len(up)), up, fontsize=7)
            axes.grid(visible=False)
        figure.colorbar(pictures[-1], ax=list(axes_of), label=names[2], shrink=0.8)
        figure.supxlabel(names[0], fontsize=9)
        figure.supylabel(names[1], fontsize=9)
    return figure


def _cells(grid: NDArray[np.float64]) -> Iterator[tuple[int, int, float]]:
    """The row, the column and the value of each cell."""
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            yield i, j, float(value)


def plot_staleness(found: Mapping[str, Any], width: Mapping[str, Any], tuning: Mapping[str, Any]) -> Figure:
    """The bandit: reward over the sampler's lag, over δ for each cap, and of the best of n random settings.

    Args:
        found: Result of `bandpo.lab.comparison.sweeps.staleness`.
        width: Result of `bandpo.lab.comparison.sweeps.radius_and_cap`.
        tuning: Result of `bandpo.lab.comparison.sweeps.ease_of_tuning`.

    Returns:
        The figure.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12.5, 3.8), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        for (label, values), colour in zip(found["value"].items(), cycle(_COLOURS)):
            left.plot(found["lags"], values, "o-", color=colour, lw=1.5, ms=4, label=label)
        left.set(xlabel="batches the sampler is behind", ylabel="mean reward", title="Staleness")
        left.legend(fontsize=7)
        for cap, values, colour, style in zip(
            width["caps"], width["value"], (ORANGE, BLUE, BLACK), ("-", "--", ":"), strict=True
        ):
            label = "no cap" if cap is None else f"cap {cap:g}"
            middle.plot(width["radii"], values, style, color=colour, lw=2, label=label)
        middle.set(xscale="log", xlabel="δ of the KL band", ylabel="mean reward", title="Radius and cap")
        middle.legend(fontsize=8)
        for (label, values), colour in zip(tuning["expected"].items(), (BLUE, ORANGE), strict=True):
            right.plot(tuning["trials"], values, "o-", color=colour, lw=1.5, label=label)
        right.set(
            xlabel="random settings tried", ylabel="mean reward of the best, expected", title="Tuning", xscale="log"
        )
        right.set_xticks(tuning["trials"], [str(n) for n in tuning["trials"]])
        right.minorticks_off()
        right.legend(fontsize=8)
    return figure
