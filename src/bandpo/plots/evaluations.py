"""The figure of evaluations: pass@k over k, and mean@k and maj@k, of one or several models."""

from collections.abc import Mapping
from itertools import product

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bandpo.plots.figures import BLACK, BLUE, GREEN, ORANGE, PINK, STYLE
from bandpo.statistics import Interval

_LOOKS = [(colour, line) for line, colour in product(("-", "--", ":"), (BLUE, ORANGE, GREEN, PINK, BLACK))]
_MARKS = {"mean": "o", "maj": "s"}


def plot_evaluations(models: Mapping[str, Mapping[str, Interval]]) -> Figure:
    """pass@k over k on a logarithmic axis, and below it mean@k and maj@k of all samples, with 95% intervals.

    The figure is as narrow as the page of a phone: its two panels are below each other.

    Args:
        models: For the name of each model its measures, `mean@N`, `pass@1`, `pass@2` ..., `maj@1` ..., with their intervals, as
            `Result.measures` has them.

    Returns:
        The figure.

    Raises:
        ValueError: If there is no model.
    """
    if not models:
        raise ValueError("plot_evaluations: no model to draw")
    with mpl.rc_context(STYLE):
        rows = len(models) * max(len(_points(measures)) for measures in models.values())
        height = 0.9 + 0.24 * rows
        figure, (top, bottom) = plt.subplots(
            2, 1, figsize=(5.2, 3.6 + height), layout="constrained", height_ratios=[3.0, height]
        )
        looks = {name: _LOOKS[i % len(_LOOKS)] for i, name in enumerate(models)}
        for name, measures in models.items():
            _draw_curve(top, measures, name, *looks[name])
        ks = sorted({k for measures in models.values() for k in _curve(measures)})
        top.set_xscale("log", base=2)
        top.set_xticks(ks, [str(k) for k in ks])
        top.minorticks_off()
        top.set(xlabel="k", ylabel="pass@k, 95% interval")
        _draw_points(bottom, models, looks)
        figure.legend(*top.get_legend_handles_labels(), loc="outside lower left", fontsize=8)
    return figure


def _curve(measures: Mapping[str, Interval]) -> dict[int, Interval]:
    """pass@k by k, without those that no prompt has enough samples for."""
    found = {int(name.removeprefix("pass@")): value for name, value in measures.items() if name.startswith("pass@")}
    return {k: value for k, value in sorted(found.items()) if value.value == value.value}


def _points(measures: Mapping[str, Interval]) -> dict[str, Interval]:
    """mean@k and maj@k of all samples."""
    mean = next((name for name in measures if name.startswith("mean@")), None)
    names = [] if mean is None else [mean, mean.replace("mean@", "maj@")]
    return {name: measures[name] for name in names if name in measures and measures[name].value == measures[name].value}


def _draw_curve(axes: Axes, measures: Mapping[str, Interval], name: str, colour: str, line: str) -> None:
    curve = _curve(measures)
    x, y = list(curve), [found.value for found in curve.values()]
    axes.plot(x, y, color=colour, ls=line, marker="o", ms=4, lw=1.6, label=name)
    axes.fill_between(
        x,
        [found.low for found in curve.values()],
        [found.high for found in curve.values()],
        color=colour,
        alpha=0.14,
        lw=0,
    )


def _draw_points(
    axes: Axes, models: Mapping[str, Mapping[str, Interval]], looks: Mapping[str, tuple[str, str]]
) -> None:
    """A row for each measure and model: the value as a mark, its interval as a line."""
    measures = list(dict.fromkeys(name for found in models.values() for name in _points(found)))
    ticks: list[float] = []
    row = 0
    for measure in measures:
        first = row
        for name, found in models.items():
            if measure in found:
                value = found[measure]
                colour = looks[name][0]
                axes.plot([value.low, value.high], [row, row], color=colour, lw=1.6)
                axes.plot([value.value], [row], _MARKS[measure.partition("@")[0]], color=colour, ms=6)
            row += 1
        ticks.append((first + row - 1) / 2)
        row += 1
    axes.set_yticks(ticks, measures)
    axes.set_ylim(row - 1.3, -0.7)
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="mean over the prompts, 95% interval")
