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


def plot_map(cells: Sequence[Mapping[str, Any]]) -> str:
    """Who wins where: share of good options among the rare ones, steps for each rollout, and wrong rewards.

    Args:
        cells: Summary of the map.
    """
    shares = sorted({c["share"] for c in cells})
    rows = sorted({(c["flip"], c["steps"]) for c in cells})
    parts = [
        _text(8, 20, "Who wins where", "title"),
        _text(8, 38, "coloured: the best arm, clearly better than the fixed clip", "note"),
        _text(8, 54, "grey: no arm clearly better; each at its best rate", "note"),
    ]
    shown = [*dict.fromkeys(cast("str", w) for c in cells for w in c["winners"].values() if w is not None)]
    for i, arm in enumerate(shown):
        x, y = 8 + 118 * (i % 4), 66 + 20 * (i // 4)
        parts += [f'<rect x="{x}" y="{y}" width="14" height="14" class="tinted {_CLASS.get(arm, "c7")}"/>']
        parts.append(_text(x + 19, y + 12, _SHORT.get(arm, arm), "note"))
    y = 66 + 20 * math.ceil(len(shown) / 4) + 20
    width, tall = 330 / max(1, len(shares)), 24
    found = {(c["share"], c["flip"], c["steps"]): c for c in cells}
    for measure, title in _ALL.items():
        parts.append(_text(138, y, title, ""))
        y += 8
        for flip, steps in rows:
            label = f"{steps} steps" + (f", {flip:.0%} wrong" if flip else "")
            parts.append(_text(132, y + 16, label, "note end"))
            for i, share in enumerate(shares):
                cell = found[share, flip, steps]
                winner: str | None = cell["winners"][measure]
                style = "none" if winner is None else f"tinted {_CLASS.get(winner, 'c7')}"
                x = 138 + width * i
                parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{tall}" class="tile {style}"/>')
                text = "" if winner is None else _SHORT.get(winner, winner)
                parts.append(_text(x + width / 2, y + 16, text, "mid on"))
            y += tall
        y += 26
    y -= 10
    parts += [_text(138 + width * (i + 0.5), y, f"{share:.0%}", "mid note") for i, share in enumerate(shares)]
    parts.append(_text(303, y + 17, "of the rare options are good", "mid note"))
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
