"""The figures of a study of forks, as SVG text with colours for light and dark pages, narrow enough for a phone."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, cast

import torch

from bandpo.bounds import Band, Clip
from bandpo.divergences import KL
from bandpo.lab.forks.regimes import BASELINE, DRIFT, WHAT
from bandpo.lab.forks.theory import reach

_WIDTH = 480
_STYLE = """\
<style>
  text { font: 13px system-ui, sans-serif; fill: #1f2430 }
  .title { font-weight: 600; font-size: 15px }
  .note { fill: #525a6b; font-size: 12px }
  .mid { text-anchor: middle } .end { text-anchor: end }
  .axis { stroke: #8892a6; stroke-width: 1; fill: none } .zero { stroke: #525a6b; stroke-width: 1.4 }
  .tile { stroke: #ffffff; stroke-width: 2 }
  .none { fill: #e3e6ee } .on { fill: #ffffff; font-weight: 600; font-size: 12px }
  .c0 { --c: #6f7b95 } .c1 { --c: #0b7a75 } .c2 { --c: #b54708 } .c3 { --c: #2f55d4 } .c4 { --c: #8a3ffc } .c5 { --c: #a61b4a }
  .c6 { --c: #7a5c00 } .c7 { --c: #1f2430 }
  .dot { fill: var(--c) } .line { stroke: var(--c); stroke-width: 2; fill: none } .open { fill: #ffffff; stroke: var(--c);
    stroke-width: 1.6 } .tinted { fill: var(--c) } .dash { stroke-dasharray: 5 4 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e8eaf0 } .note { fill: #aab2c4 } .axis { stroke: #6f7b95 } .zero { stroke: #aab2c4 }
    .tile { stroke: #1b1f2b } .none { fill: #2d3344 } .open { fill: #1b1f2b } .on { fill: #ffffff }
    .line, .dot, .open { --c: var(--d, var(--c)) }
    .c0 { --d: #aab2c4 } .c1 { --d: #4fd1c5 } .c2 { --d: #ffa94d } .c3 { --d: #8ea2ff } .c4 { --d: #c9a2ff }
    .c5 { --d: #ff8fab } .c6 { --d: #e0c060 } .c7 { --d: #e8eaf0 }
  }
</style>"""
_CLASS = {
    "grpo": "c0",
    "bandpo-kl-upper": "c1",
    "bandpo-kl-lower": "c2",
    "bandpo-kl": "c3",
    "clip-higher": "c4",
    "no-clip": "c5",
    "neutral": "c6",
    "dcpo": "c7",
}
_SHORT = {
    "grpo": "fixed clip",
    "bandpo-kl-upper": "upper half",
    "bandpo-kl-lower": "lower half",
    "bandpo-kl": "whole band",
    "clip-higher": "Clip-Higher",
    "no-clip": "no clip",
}
_SHOWN = ("bandpo-kl-lower", "bandpo-kl", "bandpo-kl-upper", "clip-higher", "no-clip")
_MEASURES = {"speed": "reward in training", "passed": "pass@16", "entropy": "entropy, nats"}
_NOISE = "noise"  # nothing to learn there, so that reward and pass@k say nothing
_ALL = {"speed": "reward over training", "mean": "reward at the end", "passed": "pass@16", "entropy": "entropy"}


def draw(found: Mapping[str, Any]) -> dict[str, str]:
    """All figures for which a study has the numbers, by name.

    Args:
        found: Summaries of the parts, as `bandpo.lab.forks.study.study` gives them.
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


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" role="img"'
    return "\n".join([f'{head} aria-label="{escape(title)}">', _STYLE, *parts, "</svg>", ""])


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}">{escape(text)}</text>'


def _line(x0: float, y0: float, x1: float, y1: float, style: str) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" class="{style}"/>'


def _dot(x: float, y: float, style: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="{style}"/>'


def _scale(low: float, high: float, left: float, right: float) -> Callable[[float], float]:
    return lambda value: left + (min(max(value, low), high) - low) / (high - low) * (right - left)


def plot_regimes(regimes: Mapping[str, Any]) -> str:
    """Differences from the fixed clip in each regime, each arm at its own rate: three measures side by side.

    A filled dot is better or worse by the rule of `bandpo.statistics.verdict`, an open one equivalent or undecided.

    Args:
        regimes: Summary of each regime, of one optimiser.
    """
    parts = [
        _text(8, 20, "Against PPO's fixed clip, each at its best rate", "title"),
        _text(8, 38, "left: lower, right: higher; 95% intervals; filled: clearly so", "note"),
    ]
    columns = [(118 + 122 * i, 118 + 122 * i + 106) for i in range(3)]
    limits = {m: _largest(regimes, m) for m in _MEASURES}
    y = 64.0
    for (left, right), (measure, title) in zip(columns, _MEASURES.items(), strict=True):
        parts += [_text((left + right) / 2, y, title, "mid"), _text(left, y + 15, f"-{limits[measure]:.2g}", "note")]
        parts.append(_text(right, y + 15, f"+{limits[measure]:.2g}", "note end"))
    y += 26
    top = y
    last = y
    for regime, summary in regimes.items():
        y += 18
        rate = ", one rate for all" if regime == _NOISE else ""
        parts.append(_text(8, y, f"{regime}: {WHAT[regime]}{rate}", ""))
        for arm in _SHOWN:
            found = summary["differences"][_way(regime)].get(f"{arm} - {BASELINE}")
            if found is None:
                continue
            y += 17
            parts.append(_text(112, y + 4, _SHORT[arm], "note end"))
            if regime == _NOISE:
                kept = [summary["values"]["same"][name]["right"]["value"] for name in (BASELINE, arm)]
                parts.append(_text(122, y + 4, f"certain tokens intact: {kept[0]:.0%} → {kept[1]:.0%}", "note"))
            for (left, right), measure in zip(columns, _MEASURES, strict=True):
                if regime == _NOISE and measure != "entropy":
                    continue
                parts += _interval(found[measure], _scale(-limits[measure], limits[measure], left, right), y, arm)
        y += 8
        last = y if regime != _NOISE else last
    ends = [last, last, y]
    parts += [_line((a + b) / 2, top, (a + b) / 2, end, "zero") for (a, b), end in zip(columns, ends, strict=True)]
    return _svg("Differences from the fixed clip by regime", y + 12, parts)


def _way(regime: str) -> str:
    return "same" if regime == _NOISE else "own"


def _largest(regimes: Mapping[str, Any], measure: str) -> float:
    """The end of the scale of a measure: the largest end of an interval that is shown."""
    found = [
        summary["differences"][_way(regime)][f"{arm} - {BASELINE}"][measure]
        for regime, summary in regimes.items()
        for arm in _SHOWN
        if f"{arm} - {BASELINE}" in summary["differences"]["own"] and (regime != _NOISE or measure == "entropy")
    ]
    return max((max(abs(x["low"]), abs(x["high"])) for x in found), default=1.0)


def _interval(found: Mapping[str, Any], place: Callable[[float], float], y: float, arm: str) -> list[str]:
    clear = found["verdict"] in ("better", "worse")
    ends = place(found["low"]), place(found["high"])
    dot = _dot(place(found["value"]), y, f"{'dot' if clear else 'open'} {_CLASS[arm]}")
    return [_line(ends[0], y, ends[1], y, f"line {_CLASS[arm]}"), dot]


def plot_drift(drift: Mapping[str, Any]) -> str:
    """The entropy after training on coin flips, for each interval and optimiser.

    Args:
        drift: Summary of the study of drift.
    """
    highest = max(row["value"] for rows in drift["ends"].values() for row in rows.values())
    place = _scale(0, 1.05 * max(highest, drift["start"]), 120, 468)
    labels = [x.label for x in DRIFT]
    parts = [
        _text(8, 20, "Rewards are coin flips: the interval alone decides", "title"),
        _text(8, 38, "entropy after training, nats; the line is where it began", "note"),
    ]
    top, y = 78.0, 78.0
    for i, name in enumerate(drift["ends"]):
        parts += [
            _dot(126 + 115 * i, 58, f"dot c{(1, 3, 2)[i % 3]}"),
            _text(135 + 115 * i, 62, _optimizer(name), "note"),
        ]
    for i, label in enumerate(labels):
        y += 20 + 8 * (i > 0 and DRIFT[i].lower != DRIFT[i - 1].lower)
        parts += [_text(112, y + 4, label, "end"), _line(120, y, 468, y, "axis")]
        for j, rows in enumerate(drift["ends"].values()):
            if label in rows:
                parts.append(_dot(place(rows[label]["value"]), y, f"dot c{(1, 3, 2)[j % 3]}"))
    x = place(drift["start"])
    parts += [_line(x, top, x, y + 10, "zero"), _text(x - 4, y + 24, "◂ falls", "note end")]
    parts += [_text(x + 4, y + 24, "rises ▸", "note"), _text(8, top + 4, "interval", "note")]
    return _svg("Entropy under pure noise by interval", y + 34, parts)


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
        _text(8, 20, "How far updates really move rare tokens", "title"),
        _text(8, 38, f"after one rollout, mean of the first {tracked}, one learning rate for all arms", "note"),
        _dot(14, 54, "open c2"),
        _text(24, 58, "punished (A < 0)", "note"),
        _dot(144, 54, "dot c1"),
        _text(154, 58, "rewarded (A > 0)", "note"),
        _text(284, 58, "zone: the fixed clip, 0.8 to 1.2", "note"),
    ]
    shown = ("grpo", *_SHOWN)
    rows = [(regime, row) for regime, row in places.items() if regime in _MOVED]
    ends = [
        row["values"][arm][m][end]
        for _, row in rows
        for arm in shown
        if arm in row["values"]
        for m, end in (("moved_up", "high"), ("moved_down", "low"))
    ]
    limits = [min([x for x in ends if x is not None], default=-1), max([x for x in ends if x is not None], default=1)]
    place = _scale(min(limits[0], -0.3) - 0.05, max(limits[1], 0.3) + 0.05, 120, 468)
    y = 76.0
    for regime, row in rows:
        present = [arm for arm in shown if arm in row["values"]]
        edges = place(math.log(0.8)), place(math.log(1.2))
        height = 17 * len(present) + 6
        parts.append(
            f'<rect x="{edges[0]:.1f}" y="{y + 8:.1f}" width="{edges[1] - edges[0]:.1f}" height="{height}" class="none"/>'
        )
        parts += [
            _text(8, y + 4, f"{regime}: {WHAT[regime]}", ""),
            _line(place(0), y + 8, place(0), y + 8 + height, "zero"),
        ]
        for arm in present:
            y += 17
            parts.append(_text(112, y + 4, _SHORT.get(arm, arm), "note end"))
            for measure, style in (("moved_down", "open c2"), ("moved_up", "dot c1")):
                found = row["values"][arm][measure]
                if None in found.values() or math.isnan(found["value"]):
                    continue
                parts.append(_line(place(found["low"]), y, place(found["high"]), y, f"line {style[-2:]}"))
                parts.append(_dot(place(found["value"]), y, style))
        y += 34
    for ratio in (0.05, 0.1, 0.2, 0.5, 0.8, 1.0, 1.2, 2, 5, 10):
        if limits[0] - 0.05 <= math.log(ratio) <= limits[1] + 0.05 or ratio in (0.8, 1.0, 1.2):
            parts.append(_text(place(math.log(ratio)), y - 6, f"{ratio:g}", "mid note"))
    parts.append(_text(294, y + 11, "new probability over old", "mid note"))
    return _svg("How far updates move rare tokens", y + 22, parts)


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
        _text(8, 20, "Which region is easier to tune?", "title"),
        _text(8, 38, "grid of learning rates and widths from a quarter to 4 times the default", "note"),
    ]
    for (left, right), lines in zip(columns, titles.values(), strict=True):
        parts += [_text((left + right) / 2, 62 + 15 * i, text, "mid note") for i, text in enumerate(lines)]
    y = 84.0
    for place, row in widths["places"].items():
        y += 22
        regime = place.partition("/")[0]
        parts.append(_text(8, y, f"{regime}: learns if its reward at the end is above {row['needed']:g}", ""))
        for name, (label, colour) in _FAMILIES.items():
            y += 18
            parts.append(_text(150, y + 4, label, "note end"))
            for (left, right), measure in zip(columns, titles, strict=True):
                at = _scale(0, 1, left, right)
                found = row["values"][name][measure]
                parts += [_line(left, y, right, y, "axis"), _dot(at(found["value"]), y, f"dot {colour}")]
                parts.append(_line(at(found["low"]), y, at(found["high"]), y, f"line {colour}"))
                parts.append(_text(right + 2, y - 4, f"{found['value']:.2f}", "note end"))
        y += 8
    for left, right in columns:
        parts += [_text(left, y + 14, "0", "mid note"), _text(right, y + 14, "1", "mid note")]
    return _svg("One radius against one and two epsilons", y + 24, parts)


def plot_map(cells: Sequence[Mapping[str, Any]]) -> str:
    """Who wins where: share of good options among the rare ones, steps for each rollout, and wrong rewards.

    Args:
        cells: Summary of the map.
    """
    shares = sorted({c["share"] for c in cells})
    rows = sorted({(c["flip"], c["steps"]) for c in cells})
    parts = [
        _text(8, 20, "Who wins where", "title"),
        _text(8, 38, "tile: the best arm, and its lead over the fixed clip where that is clear", "note"),
        _text(8, 54, "grey: no arm is clearly better than the fixed clip; each at its best rate", "note"),
    ]
    y = 84.0
    width, tall = 330 / max(1, len(shares)), 36
    found = {(c["share"], c["flip"], c["steps"]): c for c in cells}
    for measure, title in _ALL.items():
        parts.append(_text(138, y, title, ""))
        y += 8
        for flip, steps in rows:
            parts.append(_text(132, y + 15, f"{steps} steps a rollout", "note end"))
            parts.append(_text(132, y + 29, f"{flip:.0%} of rewards wrong", "note end"))
            for i, share in enumerate(shares):
                cell = found[share, flip, steps]
                winner: str | None = cell["winners"][measure]
                style = "none" if winner is None else f"tinted {_CLASS.get(winner, 'c7')}"
                x = 138 + width * i
                parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{tall}" class="tile {style}"/>')
                if winner is not None:
                    parts.append(_text(x + width / 2, y + 15, _SHORT.get(winner, winner), "mid on"))
                    lead = cell["differences"].get(f"{winner} - {BASELINE}")
                    parts.append(
                        _text(x + width / 2, y + 29, "" if lead is None else f"{lead[measure]['value']:+.2f}", "mid on")
                    )
            y += tall
        y += 26
    y -= 10
    parts += [_text(138 + width * (i + 0.5), y, f"{share:.0%}", "mid note") for i, share in enumerate(shares)]
    parts.append(_text(303, y + 17, "of the rare options are better than the common one", "mid note"))
    return _svg("Which arm wins where", y + 28, parts)


def plot_reach(budget: float = 1.0) -> str:
    """How far a token's own gradient moves it in one rollout, by its probability, on both sides.

    Args:
        budget: T = |A|·η·K.
    """
    p = torch.logspace(-4, math.log10(0.995), 25, dtype=torch.float64)
    across, up = _scale(-4, 0, 60, 466), _scale(-2.4, 4.4, 300, 70)
    parts = [
        _text(8, 20, "How far a token moves itself in one rollout", "title"),
        _text(8, 38, "new probability over old, by the old one; up: A > 0, down: A < 0", "note"),
    ]
    for value in (0.2, 0.5, 1, 2, 5, 10, 20):
        y = up(math.log2(value))
        parts += [_line(60, y, 466, y, "zero" if value == 1 else "axis"), _text(54, y + 4, f"{value:g}x", "note end")]
    parts += [_text(across(math.log10(x)), 318, f"{x:g}", "mid note") for x in (1e-4, 1e-3, 1e-2, 0.1, 1)]
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
        parts += [_line(8 + 165 * i, 342, 34 + 165 * i, 342, style), _text(40 + 165 * i, 346, name, "note")]
    return _svg("Reach of a token's own gradient", 356, parts)
