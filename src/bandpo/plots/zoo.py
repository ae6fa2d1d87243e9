"""The gradient weight w(r, p, A) of every objective, as small multiples. This module needs the extra `plot`."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import QuadMesh
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from bandpo.bounds import Clip
from bandpo.bounds.regions import log_clip
from bandpo.experimental import Balanced, clip_cov, kl_cov, second_moment
from bandpo.groups import kl_dual
from bandpo.objective import Objective
from bandpo.plots.figures import BLACK, STYLE
from bandpo.surrogates import clip
from bandpo.terms import gradient_weight
from bandpo.zoo import OBJECTIVES, get_objective

_LOGITS = torch.linspace(-7.5, 5.5, 90, dtype=torch.float64)
_LOG_RATIOS = torch.linspace(-1.6, 1.6, 90, dtype=torch.float64)
_NORM = TwoSlopeNorm(vmin=-1.0, vcenter=0.0, vmax=2.0)
_COLOURS = LinearSegmentedColormap.from_list(
    "weights",
    [(0.0, "#8f5bb8"), (0.5, "#8f5bb800"), (0.5, "#d55e0000"), (0.75, "#d55e0099"), (1.0, "#d55e00")],
).with_extremes(bad="#80808090")  # π > 1
"""Violet for a negative weight, orange for a positive one, and the paper for 0: the figure is legible on light and on dark."""


def plot_weight(objective: Objective | str) -> Figure:
    """The gradient weight of one objective over p and r, for A = 1 and A = -1.

    Args:
        objective: Objective or its name.
    """
    with plt.rc_context({"font.size": 7}):
        figure = Figure(figsize=(2.7, 1.45), layout="constrained")
        pair = cast("Sequence[Axes]", figure.subplots(1, 2, sharey=True))
        _draw_pair(pair, get_objective(objective), labels=True)
    return figure


def plot_key(objective: Objective | str = "bandpo-kl") -> Figure:
    """How to read the pictures of weights: one objective with its axes named and the scale of the colours.

    Args:
        objective: Objective or its name.
    """
    objective = get_objective(objective)
    with plt.rc_context(STYLE), plt.rc_context({"axes.grid": False}):
        figure = Figure(figsize=(7.6, 3.6), layout="constrained")
        pair = cast("Sequence[Axes]", figure.subplots(1, 2, sharey=True))
        picture = _draw_pair(pair, objective, labels=False)
        for axes, title in zip(pair, ("A > 0", "A < 0"), strict=True):
            axes.set(title=f"{objective.name}, {title}", xlabel="probability p")
            axes.set_xticks([math.log(p / (1 - p)) for p in (0.001, 0.01, 0.1, 0.5, 0.9, 0.99)])
            axes.set_xticklabels(["0.001", "0.01", "0.1", "0.5", "0.9", "0.99"])
        pair[0].set(ylabel="ratio r (log scale)")
        pair[0].set_yticks([math.log(r) for r in (0.25, 0.5, 1, 2, 4)], ["¼", "½", "1", "2", "4"])
        bar = figure.colorbar(picture, ax=pair, label="weight w", ticks=[-1, 0, 1, 2])
        cast("QuadMesh", bar.solids).set(edgecolor="none", rasterized=True)
        pair[1].text(0.97, 0.95, "π > 1", transform=pair[1].transAxes, ha="right", va="top")
    return figure


def plot_zoo() -> Figure:
    """The gradient weights of all named objectives in one figure."""
    columns = 6
    rows = math.ceil(len(OBJECTIVES) / columns)
    with plt.rc_context({"font.size": 7}):
        figure = Figure(figsize=(2.35 * columns, 1.55 * rows + 1.0), layout="constrained")
        upper, lower = cast("Sequence[SubFigure]", figure.subfigures(2, 1, height_ratios=[1.55 * rows, 1.0]))
        grid: Any = upper.subfigures(rows, columns, wspace=0.02, hspace=0.02)
        pictures: list[ScalarMappable] = []
        for part, objective in zip(cast("Sequence[SubFigure]", grid.flat), OBJECTIVES.values(), strict=False):
            part.suptitle(objective.name, fontsize=9, fontweight="bold")
            pair = cast("Sequence[Axes]", part.subplots(1, 2, sharey=True))
            pictures.append(_draw_pair(pair, objective, labels=False))
        bar = figure.colorbar(pictures[0], cax=lower.add_axes((0.2, 0.7, 0.6, 0.16)), orientation="horizontal")
        bar.set_label(
            "weight w of the token's gradient, A·r·w·∇log π\nleft A > 0, right A < 0; across: probability p from 0.0006 to "
            "0.996; up: ratio r from 0.2 to 5; grey: π > 1",
            fontsize=9,
        )
    return figure


def _draw_pair(pair: Sequence[Axes], objective: Objective, *, labels: bool) -> ScalarMappable:
    pictures = [_draw(axes, objective, advantage) for axes, advantage in zip(pair, (1.0, -1.0), strict=True)]
    if labels:
        for axes, title in zip(pair, ("A > 0", "A < 0"), strict=True):
            axes.set_title(title, fontsize=7, pad=2)
            axes.set_xlabel("p", labelpad=0)
            axes.set_xticks([-6.9, -2.2, 2.2], ["0.001", "0.1", "0.9"])
        pair[0].set_ylabel("r", labelpad=0)
    return pictures[0]


def _draw(axes: Axes, objective: Objective, advantage: float) -> ScalarMappable:
    r, logit = torch.meshgrid(_LOG_RATIOS.exp(), _LOGITS, indexing="ij")
    shown = _of_one_token(objective)
    weight = gradient_weight(shown, r, logit.sigmoid(), advantage, _extras(shown, r.numel(), advantage))
    axes.set_facecolor("none")
    grid = (x.numpy() for x in (_LOGITS, _LOG_RATIOS, weight.clamp(-1, 2)))
    picture = axes.pcolormesh(*grid, cmap=_COLOURS, norm=_NORM, rasterized=True)
    axes.axhline(0, color=BLACK, lw=0.4)
    axes.set_xticks([])
    axes.set_yticks([math.log(x) for x in (0.25, 1, 4)], ["¼", "1", "4"])
    axes.tick_params(length=2, pad=1)
    return picture


def _of_one_token(objective: Objective) -> Objective:
    """The objective; for one that chooses tokens in the whole batch, its rule for a single token."""
    if objective.surrogate is clip_cov:
        return dataclasses.replace(objective, surrogate=clip)
    if objective.surrogate is kl_cov:
        return dataclasses.replace(objective, surrogate=partial(kl_cov, share=1.0))
    if (
        objective.surrogate is second_moment
    ):  # alone in its batch, it is left out where (log r)² is above the budget of 0.04
        return dataclasses.replace(objective, bounds=log_clip(0.2), surrogate=clip)
    if isinstance(objective.bounds, Balanced):
        return dataclasses.replace(objective, bounds=Clip(1 - objective.bounds.low[0], objective.bounds.high[0] - 1))
    return objective


def _extras(objective: Objective, n: int, advantage: float) -> Mapping[str, Tensor]:
    """Further inputs: a group with half of the answers right, and no tokens stored besides the sampled one."""
    if not objective.extras:
        return {}
    halves = torch.tensor([1.0, -1.0], dtype=torch.float64) * abs(advantage)
    dual = kl_dual(halves, 0.05)
    known = {
        "signal": torch.ones(n, dtype=torch.float64),
        "dual": dual.dual.expand(n),
        "baseline": dual.baseline.expand(n),
        "topk_logprobs": torch.zeros(n, 1, 0, dtype=torch.float64),
        "old_topk_logprobs": torch.zeros(n, 1, 0, dtype=torch.float64),
        "sampled_in_topk": torch.zeros(n, 1, dtype=torch.bool),
    }
    return {name: known[name] for name in objective.extras}
