"""The figures of a study of forks, as SVG text with colours for light and dark pages, narrow enough for a phone."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from bandpo.bounds import Band, Clip
from bandpo.divergences import KL
from bandpo.lab.drawing import COLOURS, NAMES, box, dot, line, picture, scale, text
from bandpo.lab.forks.regimes import BASELINE, DRIFT, WHAT
from bandpo.lab.forks.theory import reach

_SHOWN = ("bandpo-kl-lower", "bandpo-kl", "bandpo-kl-upper", "clip-higher", "no-clip")
_MEASURES = {"speed": "reward in training", "passed": "pass@16", "entropy": "entropy, nats"}
_NOISE = "noise"  # nothing to learn there, so that reward and pass@k say nothing
_ALL = {"speed": "reward over training", "mean": "reward at the end", "passed": "pass@16", "entropy": "entropy"}


def draw(found: Mapping[str, Any]) -> dict[str, str]:
    """All figures for which a study has the numbers, by name.

    Args:
        found: Summaries of the parts, as `bandpo.lab.forks.study.summarise` gives them.
    """
    pictures = {"halves-reach": plot_reach()}
    if "drift" in found:
        pictures["halves-drift"] = plot_drift(found["drift"])
    for optimizer in ("adam", "sgd"):
        own = {k.partition("/")[0]: v for k, v in found.get("regimes", {}).items() if k.endswith(f"/{optimizer}")}
        if own:
            pictures[f"halves-regimes-{optimizer}"] = plot_regimes(own)
    if "moves" in found:
        own = {k.partition("/")[0]: v for k, v in found["moves"]["places"].items() if k.endswith("/adam")}
        pictures["halves-moves"] = plot_moves(own, found["moves"]["tracked"])
    if "widths" in found:
        pictures["halves-widths"] = plot_widths(found["widths"])
    if "map" in found:
        pictures["halves-map"] = plot_map(found["map"])
    return pictures


def plot_regimes(regimes: Mapping[str, Any]) -> str:
    """Differences from the fixed clip in each regime, each arm at its own rate: three measures side by side.

    A filled dot is better or worse by the rule of `bandpo.statistics.verdict`, an open one equivalent or undecided.

    Args:
        regimes: Summary of each regime, of one optimiser.
    """
    parts = [
        text(8, 20, "Against PPO's fixed clip, each at its best rate", "title"),
        text(8, 38, "left: lower, right: higher; 95% intervals; filled: clearly so", "note"),
    ]
    columns = [(118 + 122 * i, 118 + 122 * i + 106) for i in range(3)]
    limits = {m: _largest(regimes, m) for m in _MEASURES}
    y = 64.0
    for (left, right), (measure, title) in zip(columns, _MEASURES.items(), strict=True):
        parts += [text((left + right) / 2, y, title, "mid"), text(left, y + 15, f"-{limits[measure]:.2g}", "note")]
        parts.append(text(right, y + 15, f"+{limits[measure]:.2g}", "note end"))
    y += 26
    top = y
    last = y
    for regime, summary in regimes.items():
        y += 18
        rate = ", one rate for all" if regime == _NOISE else ""
        parts.append(text(8, y, f"{regime}: {WHAT[regime]}{rate}", ""))
        for arm in _SHOWN:
            found = summary["differences"]["own"].get(f"{arm} - {BASELINE}")
            if found is None:
                continue
            y += 17
            parts.append(text(112, y + 4, NAMES[arm], "note end"))
            if regime == _NOISE:
                kept = [summary["values"]["own"][name]["right"]["value"] for name in (BASELINE, arm)]
                parts.append(text(122, y + 4, f"certain tokens intact: {kept[0]:.0%} → {kept[1]:.0%}", "note"))
            for (left, right), measure in zip(columns, _MEASURES, strict=True):
                if regime == _NOISE and measure != "entropy":
                    continue
                parts += _interval(found[measure], scale(-limits[measure], limits[measure], left, right), y, arm)
        y += 8
        last = y if regime != _NOISE else last
    ends = [last, last, y]
    parts += [line((a + b) / 2, top, (a + b) / 2, end, "zero") for (a, b), end in zip(columns, ends, strict=True)]
    return picture("Differences from the fixed clip by regime", y + 12, parts)


def _largest(regimes: Mapping[str, Any], measure: str) -> float:
    """The end of the scale of a measure: the largest end of an interval that is shown."""
    found = [
        summary["differences"]["own"][f"{arm} - {BASELINE}"][measure]
        for regime, summary in regimes.items()
        for arm in _SHOWN
        if f"{arm} - {BASELINE}" in summary["differences"]["own"] and (regime != _NOISE or measure == "entropy")
    ]
    return max((max(abs(x["low"]), abs(x["high"])) for x in found), default=1.0)


def _interval(found: Mapping[str, Any], place: Callable[[float], float], y: float, arm: str) -> list[str]:
    clear = found["verdict"] in ("better", "worse")
    ends = place(found["low"]), place(found["high"])
    style = f"{'dot' if clear else 'open'} {COLOURS[arm]}"
    return [line(ends[0], y, ends[1], y, f"line {COLOURS[arm]}"), dot(place(found["value"]), y, style)]


def plot_drift(drift: Mapping[str, Any]) -> str:
    """The entropy after training on coin flips, for each interval and optimiser.

    Args:
        drift: Summary of the study of drift.
    """
    highest = max(row["value"] for rows in drift["ends"].values() for row in rows.values())
    place = scale(0, 1.05 * max(highest, drift["start"]), 120, 468)
    labels = [x.label for x in DRIFT]
    parts = [
        text(8, 20, "Rewards are coin flips: the interval alone decides", "title"),
        text(8, 38, "entropy after training, nats; the line is where it began", "note"),
    ]
    top, y = 78.0, 78.0
    for i, name in enumerate(drift["ends"]):
        parts += [
            dot(126 + 115 * i, 58, f"dot c{(1, 3, 2)[i % 3]}"),
            text(135 + 115 * i, 62, _optimizer(name), "note"),
        ]
    for i, label in enumerate(labels):
        y += 20 + 8 * (i > 0 and DRIFT[i].lower != DRIFT[i - 1].lower)
        parts += [text(112, y + 4, label, "end"), line(120, y, 468, y, "axis")]
        for j, rows in enumerate(drift["ends"].values()):
            if label in rows:
                parts.append(dot(place(rows[label]["value"]), y, f"dot c{(1, 3, 2)[j % 3]}"))
    x = place(drift["start"])
    parts += [line(x, top, x, y + 10, "zero"), text(x - 4, y + 24, "◂ falls", "note end")]
    parts += [text(x + 4, y + 24, "rises ▸", "note"), text(8, top + 4, "interval", "note")]
    return picture("Entropy under pure noise by interval", y + 34, parts)


def _optimizer(name: str) -> str:
    kind, _, rate = name.partition(" ")
    return f"{'Adam' if kind == 'adam' else 'SGD'}, rate {rate}"


def plot_moves(places: Mapping[str, Any], tracked: int) -> str:
    """How far the updates on a rollout move rare tokens, up and down, as factors of their probability, by arm.

    Args:
        places: The moves of each regime, by Adam.
        tracked: Number of rollouts.
    """
    parts = [
        text(8, 20, "How far updates really move rare tokens", "title"),
        text(8, 38, f"probability after the updates on a rollout over that before, first {tracked} rollouts", "note"),
        dot(14, 54, "open c2"),
        text(24, 58, "punished (A < 0)", "note"),
        dot(144, 54, "dot c1"),
        text(154, 58, "rewarded (A > 0)", "note"),
        text(284, 58, "zone: the fixed clip, 0.8 to 1.2", "note"),
    ]
    y = 80.0
    for regime in _MOVED:
        if regime in places:
            parts += _moves_of_regime(regime, places[regime], y)
            y += 17 * len(_with_baseline(places[regime]["values"])) + 54
    return picture("How far updates move rare tokens", y - 10, parts)


def _with_baseline(values: Mapping[str, Any]) -> list[str]:
    return [arm for arm in (BASELINE, *_SHOWN) if arm in values]


def _moves_of_regime(regime: str, row: Mapping[str, Any], y: float) -> list[str]:
    """One block of `plot_moves`, with a scale of its own."""
    measures = {"moved_down": "open c2", "moved_up": "dot c1"}
    shown = {
        (arm, measure): row["values"][arm][measure]
        for arm in _with_baseline(row["values"])
        for measure in measures
        if all(x is not None and math.isfinite(x) for x in row["values"][arm][measure].values())
    }
    low = min([-0.3, *(x["low"] for x in shown.values())])
    high = max([0.3, *(x["high"] for x in shown.values())])
    place = scale(low, high, 120, 468)
    height = 17 * len(_with_baseline(row["values"])) + 6
    edges = place(math.log(0.8)), place(math.log(1.2))
    parts = [
        text(8, y, f"{regime}: {WHAT[regime]}", ""),
        box(edges[0], y + 4, edges[1] - edges[0], height, "zone"),
        line(place(0), y + 4, place(0), y + 4 + height, "zero"),
    ]
    for i, arm in enumerate(_with_baseline(row["values"]), 1):
        parts.append(text(112, y + 17 * i + 4, NAMES.get(arm, arm), "note end"))
        for measure, style in measures.items():
            if found := shown.get((arm, measure)):
                parts.append(
                    line(place(found["low"]), y + 17 * i, place(found["high"]), y + 17 * i, f"line {style[-2:]}")
                )
                parts.append(dot(place(found["value"]), y + 17 * i, style))
    return [*parts, *_ratios(low, high, place, y + height + 18)]


def _ratios(low: float, high: float, place: Callable[[float], float], y: float) -> list[str]:
    """Labels of ratios below an axis of their logarithms, the simplest ones first, as many as have room."""
    parts: list[str] = []
    taken: list[float] = []
    for ratio in (1, 10, 0.1, 0.01, 0.001, 2, 0.5, 5, 0.2, 1.5, 0.7, 20, 0.05):
        x = place(math.log(ratio))
        if low <= math.log(ratio) <= high and all(abs(x - other) >= 34 for other in taken):
            taken.append(x)
            parts.append(text(x, y, f"{ratio:g}", "mid note"))
    return parts


_MOVED = ("needle", "diversity", "noisy")
_FAMILIES = {
    "radius": ("one radius, the band", "c3"),
    "upper": ("one radius, upper half", "c1"),
    "eps": ("one epsilon", "c0"),
    "two": ("two epsilons", "c4"),
}


def plot_widths(widths: Mapping[str, Any]) -> str:
    """The share of a grid of learning rate and width in which learning succeeds, and what a few random trials find.

    Args:
        widths: Summary of the study of widths.
    """
    columns = [(158, 300), (324, 466)]
    titles = {
        "area": ("share of the grid", "that learns"),
        "best": ("reward of the best", f"of {widths['trials']} random cells"),
    }
    parts = [
        text(8, 20, "Which region is easier to tune?", "title"),
        text(8, 38, "grid of learning rates and widths from a quarter to 4 times the default", "note"),
    ]
    for (left, right), lines in zip(columns, titles.values(), strict=True):
        parts += [text((left + right) / 2, 62 + 15 * i, words, "mid note") for i, words in enumerate(lines)]
    y = 84.0
    for place, row in widths["places"].items():
        y += 22
        regime = place.partition("/")[0]
        parts.append(text(8, y, f"{regime}: learns if its reward at the end is above {row['needed']:g}", ""))
        for name, (label, colour) in _FAMILIES.items():
            y += 18
            parts.append(text(150, y + 4, label, "note end"))
            for (left, right), measure in zip(columns, titles, strict=True):
                at = scale(0, 1, left, right)
                found = row["values"][name][measure]
                parts += [line(left, y, right, y, "axis"), dot(at(found["value"]), y, f"dot {colour}")]
                parts.append(line(at(found["low"]), y, at(found["high"]), y, f"line {colour}"))
                parts.append(text(right + 2, y - 4, f"{found['value']:.2f}", "note end"))
        y += 8
    for left, right in columns:
        parts += [text(left, y + 14, "0", "mid note"), text(right, y + 14, "1", "mid note")]
    return picture("One radius against one and two epsilons", y + 24, parts)


def plot_map(cells: Sequence[Mapping[str, Any]]) -> str:
    """Who wins where: share of good options among the rare ones, steps for each rollout, and wrong rewards.

    Args:
        cells: Summary of the map.
    """
    shares = sorted({c["share"] for c in cells})
    rows = sorted({(c["flip"], c["steps"]) for c in cells})
    parts = [
        text(8, 20, "Who wins where", "title"),
        text(8, 38, "tile: the best arm, and its lead over the fixed clip; each arm at its best rate", "note"),
        text(8, 54, "coloured: the lead is clear; grey: it may be chance, or too small to matter", "note"),
    ]
    y = 84.0
    width, tall = 330 / max(1, len(shares)), 36
    found = {(c["share"], c["flip"], c["steps"]): c for c in cells}
    for measure, title in _ALL.items():
        parts.append(text(138, y, title, ""))
        y += 8
        for flip, steps in rows:
            parts.append(text(132, y + 15, f"{steps} steps a rollout", "note end"))
            parts.append(text(132, y + 29, f"{flip:.0%} rewards wrong", "note end"))
            for i, share in enumerate(shares):
                parts += _tile(found[share, flip, steps], measure, 138 + width * i, y, width, tall)
            y += tall
        y += 26
    y -= 10
    parts += [text(138 + width * (i + 0.5), y, f"{share:.0%}", "mid note") for i, share in enumerate(shares)]
    parts.append(text(303, y + 17, "of the rare options are better than the common one", "mid note"))
    return picture("Which arm wins where", y + 28, parts)


def _tile(cell: Mapping[str, Any], measure: str, x: float, y: float, width: float, tall: float) -> list[str]:
    """The best arm of a cell of the map in one measure, coloured where it wins."""
    winner: str | None = cell["winners"][measure]
    means: Mapping[str, float] = cell["means"][measure]
    best = max(means, key=lambda arm: means[arm])
    style = "none" if winner is None else f"tinted {COLOURS.get(winner, 'c7')}"
    lead = "" if best == BASELINE else f"{means[best] - means[BASELINE]:+.2f}"
    words = "mid note" if winner is None else "mid on"
    middle = x + width / 2
    return [
        box(x, y, width, tall, f"tile {style}"),
        text(middle, y + 15, NAMES.get(best, best), words),
        text(middle, y + 29, lead, words),
    ]


def plot_reach(budget: float = 1.0) -> str:
    """How far a token's own gradient moves it in one rollout, by its probability, on both sides.

    Args:
        budget: T = |A|·η·K.
    """
    p = torch.logspace(-4, math.log10(0.995), 25, dtype=torch.float64)
    across, up = scale(-4, 0, 60, 466), scale(-2.4, 4.4, 300, 70)
    parts = [
        text(8, 20, "How far a token moves itself in one rollout", "title"),
        text(8, 38, "new probability over old, by the old one; up: A > 0, down: A < 0", "note"),
    ]
    for value in (0.2, 0.5, 1, 2, 5, 10, 20):
        y = up(math.log2(value))
        parts += [line(60, y, 466, y, "zero" if value == 1 else "axis"), text(54, y + 4, f"{value:g}x", "note end")]
    parts += [text(across(math.log10(x)), 318, f"{x:g}", "mid note") for x in (1e-4, 1e-3, 1e-2, 0.1, 1)]
    arms = {
        "fixed clip 0.8 … 1.2": (Clip(0.2), "line c0"),
        "KL band 0.05": (Band(KL, 0.05), "line c3"),
        "no clip": (Clip(1.0, math.inf), "line c5 dash"),
    }
    for i, (name, (bounds, style)) in enumerate(arms.items()):
        found = reach(bounds, p, budget)
        for ratio in (found.up, found.down):
            xs, ys = (cast("list[float]", t.tolist()) for t in (p.log10(), ratio.log2()))
            points = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in zip(xs, ys, strict=True))
            parts.append(f'<polyline points="{points}" class="{style}"/>')
        parts += [line(8 + 165 * i, 342, 34 + 165 * i, 342, style), text(40 + 165 * i, 346, name, "note")]
    return picture("Reach of a token's own gradient", 356, parts)
