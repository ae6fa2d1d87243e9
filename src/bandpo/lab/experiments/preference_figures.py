"""The figures of the preference experiments, one for each."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from bandpo.plots import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, STYLE
from bandpo.statistics import interval

Result = dict[str, Any]


def plot_links(found: Result) -> Figure:
    """The weights of both sides of a pair by link, over the log-ratio of the side that moves."""
    looks = {
        "log": ("log z (DPO)", ORANGE, "-"),
        "chi2-kl": ("z + log z (χPO)", BLUE, "-"),
        "chi2": ("z - 1", BLUE, "--"),
        "js": ("log(2z/(1 + z))", PINK, "-"),
        "forward-kl": ("1 - 1/z", GREEN, "-"),
    }
    with mpl.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
        for name, curves in found["links"].items():
            label, colour, style = looks[name]
            for axes, side in ((left, "chosen"), (right, "rejected")):
                axes.plot(found["delta"], curves[side], style, color=colour, lw=1.8, label=label)
        for axes, title in ((left, "Pull up at the chosen one"), (right, "Pull down at the rejected one")):
            axes.axvline(0, color=GREY, lw=0.8)
            axes.set(
                yscale="log", ylim=(1e-3, 30), xlabel="its log-ratio Δ = log π/π_ref, the other one at 0", title=title
            )
        left.set(ylabel="gradient weight over DPO's at Δ = 0")
        figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=len(looks))
    return figure


def plot_regret(found: Result) -> Figure:
    """Regret at the best β against n."""
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.8, 3.4), layout="constrained")
        n = np.array(found["n"])
        for name, label, colour in (("dpo", "DPO, φ = log z", ORANGE), ("chipo", "χPO, φ = z + log z", BLUE)):
            axes.loglog(n, found[name], "o-", color=colour, label=label)
        axes.loglog(n, found["dpo"][0] * np.log(n[0]) / np.log(n), ":", color=BLACK, label="1 / log n")
        axes.loglog(n, found["chipo"][0] * (n[0] / n) ** 0.5, "--", color=GREY, label="1 / √n")
        axes.set(xlabel="comparisons, n", ylabel="regret at the best β", title="A rare arm whose reward is not known")
        axes.legend(fontsize=8)
    return figure


def plot_concentrability(found: Result) -> Figure:
    """C^π and gain over steps of offline training."""
    with mpl.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
        for curve in found["curves"]:
            colour = ORANGE if curve["objective"] == "dpo" else BLUE
            style = "-" if curve["beta"] == max(c["beta"] for c in found["curves"]) else "--"
            label = f"{'DPO' if curve['objective'] == 'dpo' else 'χPO'}, β = {curve['beta']:g}"
            for axes, key in ((left, "concentrability"), (right, "gain")):
                _band(axes, found["epochs"], curve[key], colour, label, style)
        for axes in (left, right):
            axes.set(xscale="log", xlabel="full-batch steps of Adam on the same pairs")
            _plain(axes.xaxis, found["epochs"])
        left.set(yscale="log", ylabel="C^π = E[π/π_ref]", title="Distance from the reference")
        right.set(ylabel="true reward above the reference's", title="What it gains")
        left.legend(fontsize=8)
    return figure


def plot_coverage(found: Result) -> Figure:
    """Error and coverage over rounds, for each skew."""
    with mpl.rc_context(STYLE):
        figure, grid = plt.subplots(
            2, len(found["settings"]), figsize=(10, 6), layout="constrained", sharex=True, squeeze=False
        )
        settings = cast("list[dict[str, Any]]", found["settings"])
        rounds = range(1, found["rounds"] + 1)
        columns = cast("Sequence[tuple[Axes, Axes]]", cast("Any", grid).T)
        for column, setting in zip(columns, settings, strict=True):
            for arm, colour, style in (("off-policy", ORANGE, "-"), ("on-policy", BLUE, "-"), ("hybrid", GREEN, "--")):
                label = {
                    "off-policy": "off-policy, all pairs so far",
                    "on-policy": "on-policy, newest pairs only",
                    "hybrid": "half policy, half design, newest only",
                }[arm]
                _band(column[0], rounds, setting["error"][arm], colour, label, style)
                _band(column[1], rounds, setting["coverage"][arm], colour, label, style)
            column[0].set(
                ylabel="‖θ̂ - θ*‖",
                ylim=(0, None),
                title=f"skew {setting['skew']:g}, {setting['pairs_per_round']} pairs a round",
            )
            column[1].set(ylabel="coverage C of the sampler", yscale="log", xlabel="round", xticks=list(rounds))
            _plain(column[1].yaxis, [1, 2, 5, 10, 20, 40])
        grid[0, 0].legend(fontsize=8)
    return figure


def plot_distillation(found: Result) -> Figure:
    """KL to the target against n."""
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.8, 3.4), layout="constrained")
        _band(axes, found["n"], found["labels"], ORANGE, "sampled labels (DPO)")
        axes.plot(
            found["n"],
            [max(_mean(v), 1e-17) for v in found["distillation"]],
            "s-",
            color=BLUE,
            label="probabilities (PD): rounding",
        )
        first = _mean(found["labels"][0])
        axes.plot(found["n"], [first * found["n"][0] / n for n in found["n"]], ":", color=BLACK, label="1/n")
        axes.set(xscale="log", yscale="log", xlabel="pairs, n", ylabel="KL(π* ‖ π̂), nats", title="What labels cost")
        axes.legend(fontsize=8)
    return figure


def plot_calibration(found: Result) -> Figure:
    """KL to the target over rounds."""
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.8, 3.4), layout="constrained")
        rounds = range(1, found["rounds"] + 1)
        for (name, curve), colour in zip(found["curves"].items(), (ORANGE, PINK, BLUE), strict=True):
            label = "REBEL, γ_c = 0" if name == "rebel" else name.replace("rdrc", "RDRC,")
            _band(axes, rounds, curve, colour, label)
        axes.set(
            xlabel="round",
            ylabel="KL(π_k ‖ π*), nats",
            title="Moving reference: who stops at the target",
            ylim=(0, None),
        )
        axes.legend(fontsize=8)
    return figure


def plot_design(found: Result) -> Figure:
    """Leverage of designs against the bounds d and d²."""
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.8, 3.4), layout="constrained")
        rows = found["designs"]
        x = np.arange(len(rows))
        for i, (key, label, colour) in enumerate(
            (
                ("conditional", "conditional optimum (theory: d)", GREEN),
                ("leverage", "preferential, designed prompts", BLUE),
                ("leverage_uniform", "preferential, uniform prompts", PINK),
                ("bound", "bound d²", GREY),
            )
        ):
            axes.bar(x + 0.2 * (i - 1.5), [r[key] for r in rows], 0.2, color=colour, label=label)
        axes.set_xticks(
            x,
            [f"{r['prompts']} prompt{'s' * (r['prompts'] != 1)}\n{r['actions']} actions, d={r['d']}" for r in rows],
            fontsize=8,
        )
        axes.set(ylabel="largest leverage", title="Preferential G-optimal design")
        axes.legend(fontsize=8)
    return figure


def plot_reranking(found: Result) -> Figure:
    """Safety against generated tokens."""
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.8, 3.4), layout="constrained")
        colours = {"stale": ORANGE, "re-ranked": PINK, "re-ranked, confidence": GREEN, "online": BLUE}
        for i, (name, rows) in enumerate(found["arms"].items()):
            centre = interval(rows["after"], np.mean)
            tokens = _mean(rows["tokens"]) / 1000 * (1 + 0.04 * (i - 1))  # side by side where they spent the same
            axes.errorbar(
                tokens,
                centre[0],
                yerr=[[centre[0] - centre[1]], [centre[2] - centre[0]]],
                fmt="o",
                color=colours[name],
                capsize=3,
                label=name,
            )
        axes.axhline(_mean(found["arms"]["stale"]["before"]), color=GREY, ls=":", label="before training")
        axes.set(
            xscale="log",
            xlabel="thousand tokens generated in training",
            ylabel="share of safe letters, held out",
            title="Fresh samples, or old ones ranked anew",
        )
        _plain(axes.xaxis, [20, 50, 100])
        axes.legend(fontsize=8)
    return figure


FIGURES: dict[str, Callable[[Result], Figure]] = {
    "links": plot_links,
    "regret": plot_regret,
    "concentrability": plot_concentrability,
    "coverage": plot_coverage,
    "distillation": plot_distillation,
    "calibration": plot_calibration,
    "design": plot_design,
    "reranking": plot_reranking,
}
"""The functions that draw the figures, by the name of the experiment."""


def _band(
    axes: Axes, x: Sequence[float] | range, rows: Sequence[Sequence[float]], colour: str, label: str, style: str = "-"
) -> None:
    centre, low, high = (np.array(v) for v in zip(*(interval(r, np.mean) for r in rows), strict=True))
    axes.plot(list(x), centre, style, color=colour, label=label, marker="o", ms=3)
    axes.fill_between(list(x), low, high, color=colour, alpha=0.15, lw=0)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _plain(axis: Axis, ticks: Sequence[float]) -> None:
    """Give a logarithmic axis ticks with plain numbers."""
    axis.set_ticks(list(ticks), [f"{tick:g}" for tick in ticks])
    axis.set_minor_formatter(NullFormatter())
