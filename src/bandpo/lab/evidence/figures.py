"""The figures of the evidence page, as SVG text for light and dark pages."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bandpo.lab.drawing import COLOURS, NAMES, box, dot, line, picture, scale, text
from bandpo.lab.evidence.transformers import CONFIRMED
from bandpo.lab.forks.regimes import BASELINE, WHAT

HALVES = ("bandpo-kl-lower", "bandpo-kl", "bandpo-kl-upper")
"""The band in two parts and as a whole."""

OTHERS = ("clip-higher", *HALVES, "no-clip")
"""The main arms beside the baseline."""

MEASURES: Mapping[str, str] = {
    "mean": "mean reward",
    "passed": "pass@16",
    "entropy": "entropy of the fork",
    "token_entropy": "entropy of a token",
    "speed": "reward in training",
    "right": "near-certain tokens intact",
    "moved_up": "log-ratio of rare tokens, A > 0",
    "moved_down": "log-ratio of rare tokens, A < 0",
    "beyond_up": "rare tokens above 1.2, A > 0",
    "beyond_down": "rare tokens below 0.8, A < 0",
    "area": "share of settings that learn",
    "best": "mean of the best of 4 settings",
}
"""The measures as pages name them."""

_SHORT = {"mean": "mean reward", "passed": "pass@16", "entropy": "entropy, nats"}
_DECIDED = ("better", "worse")
_LARGEST = 60.0
Differences = Mapping[str, Mapping[str, Mapping[str, Sequence[Any]]]]


def draw(evidence: Mapping[str, Any]) -> dict[str, str]:
    """All figures for which the evidence has the numbers, by name.

    Args:
        evidence: The content of evidence.json.
    """
    found: dict[str, str] = {}
    explored: Mapping[str, Differences] = evidence["explored"]
    if primary := [claim for claim in evidence["judged"] if claim["kind"] == "primary"]:
        found["evidence-claims"] = plot_claims(primary)
    forks = {key: rows for key, rows in explored.get("forks", {}).items() if key.endswith("/confirmation")}
    tasks = latest(explored.get("transformers", {}))
    if groups := {**forks, **{key: rows for key, rows in tasks.items() if key.endswith(("/lag0", "/confirmation"))}}:
        head = "The two halves against PPO's fixed clip"
        found["evidence-halves"] = plot_differences(head, groups, HALVES, evidence["smallest"])
    if tasks:
        head = "Small transformers against PPO's fixed clip"
        found["evidence-transformers"] = plot_differences(head, tasks, OTHERS, evidence["smallest"])
    if curves := evidence.get("transformers", {}).get("curves"):
        found["evidence-curves"] = plot_curves(latest(curves))
    return found


def latest(places: Mapping[str, Any]) -> dict[str, Any]:
    """The places of transformers; one that was confirmed on fresh seeds has these, at the position of its first seeds.

    Args:
        places: What each place has.
    """
    confirmed = {first: place for place, first in CONFIRMED.items() if place in places}
    names = dict.fromkeys(confirmed.get(place, place) for place in places)
    return {place: places[place] for place in names}


_FIRST = ", first seeds"


def place_title(place: str) -> str:
    """A place as it is printed: `noisy/confirmation` and `moves/noisy` are `noisy`, `NAME/lag4` is `NAME, lag 4`.

    Args:
        place: The name of the place.
    """
    if place in CONFIRMED:
        return place_title(CONFIRMED[place]).removesuffix(_FIRST)
    name, _, rest = place.partition("/")
    if name in ("moves", "width"):
        return rest
    if rest.startswith("lag"):
        return f"{name}, lag {rest.removeprefix('lag')}{_FIRST if place in CONFIRMED.values() else ''}"
    if rest == "adam":
        return f"{name}{_FIRST}"
    return name if rest in ("", "confirmation") else f"{name}, {rest.upper()}"


def plot_differences(head: str, places: Differences, arms: Sequence[str], smallest: Mapping[str, float]) -> str:
    """Differences from the fixed clip, place by place and arm by arm: mean reward, pass@16 and entropy side by side.

    Args:
        head: Title of the figure.
        places: `[place][pair][measure]`, each a value, its interval and its verdict.
        arms: The arms, from top to bottom.
        smallest: The smallest effect of interest of each measure, which is shaded.
    """
    parts = [
        text(8, 20, head, "title"),
        text(8, 38, "left: lower, right: higher; filled: the 95% interval excludes 0;", "note"),
        text(8, 54, "shaded: too small to matter", "note"),
    ]
    columns = [(118 + 122 * i, 118 + 122 * i + 106) for i in range(3)]
    limits = {m: _end_of_scale(places, arms, m) for m in _SHORT}
    across = {m: scale(-limits[m], limits[m], *ends) for m, ends in zip(_SHORT, columns, strict=True)}
    y = 80.0
    for (left, right), (measure, title) in zip(columns, _SHORT.items(), strict=True):
        parts += [text((left + right) / 2, y, title, "mid"), text(left, y + 15, f"-{limits[measure]:.2g}", "note")]
        parts.append(text(right, y + 15, f"+{limits[measure]:.2g}", "note end"))
    y += 20
    for place, pairs in places.items():
        here = [arm for arm in arms if f"{arm} - {BASELINE}" in pairs]
        y += 20
        what = WHAT.get(place.partition("/")[0])
        parts.append(text(8, y, f"{place_title(place)}: {what}" if what else place_title(place)))
        for measure, to in across.items():
            if shown(place, measure):
                parts += _ground(
                    to, {-smallest[measure]: "", 0.0: "zero", smallest[measure]: ""}, y + 7, 17 * len(here)
                )
        for arm in here:
            y += 17
            parts.append(text(112, y + 4, NAMES.get(arm, arm), "note end"))
            found = pairs[f"{arm} - {BASELINE}"]
            for measure, to in across.items():
                if measure in found and shown(place, measure):
                    parts += _interval(found[measure], to, y, COLOURS[arm])
        y += 6
    return picture(head, y + 10, parts)


def _ground(to: Callable[[float], float], lines: Mapping[float, str], y: float, height: float) -> list[str]:
    """The shaded width between the two lines next to 0, and the lines that have a class, behind the rows of one block."""
    low, high = max(x for x in lines if x < 0), min(x for x in lines if x > 0)
    zone = box(to(low), y, to(high) - to(low), height, "zone")
    return [zone, *(line(to(x), y, to(x), y + height, style) for x, style in lines.items() if style)]


def shown(place: str, measure: str) -> bool:
    """Whether a measure says something at a place: where rewards are coin flips, nothing can be learnt or passed.

    Args:
        place: The name of the place.
        measure: The name of the measure.
    """
    return not place.startswith("noise/") or measure not in ("mean", "passed", "speed")


def _end_of_scale(places: Differences, arms: Sequence[str], measure: str) -> float:
    ends = [
        abs(end)
        for place, pairs in places.items()
        for arm in arms
        if measure in pairs.get(f"{arm} - {BASELINE}", {}) and shown(place, measure)
        for end in pairs[f"{arm} - {BASELINE}"][measure][1:3]
        if end is not None
    ]
    return max(ends, default=0.0) or 1.0


def _interval(found: Sequence[Any], place: Callable[[float], float], y: float, colour: str) -> list[str]:
    value, low, high, verdict = found[:4]
    if None in (value, low, high):
        return [text(place(0), y + 4, "diverged", "note mid")]
    style = "dot" if verdict in _DECIDED else "open"
    return [line(place(low), y, place(high), y, f"line {colour}"), dot(place(value), y, f"{style} {colour}")]


SENSES: Mapping[str, str] = {
    "holds": "as claimed",
    "opposite": "the opposite",
    "equivalent": "no difference",
    "undecided": "undecided",
}
"""What a contrast says of its claim, as pages name it; the order is that of the legend."""
_STYLES = {"holds": "dot c1", "opposite": "dot c2", "equivalent": "dot c0", "undecided": "open c0"}


def plot_claims(claims: Sequence[Mapping[str, Any]]) -> str:
    """Every contrast of the registered claims, in units of the smallest effect of interest of its measure.

    Args:
        claims: Judged claims; contrasts that were not measured are left out.
    """
    parts = [
        text(8, 20, "Every registered contrast", "title"),
        text(8, 38, "difference over the smallest effect of interest, with the interval", "note"),
    ]
    for i, (sense, word) in enumerate(SENSES.items()):
        parts += [dot(14 + 116 * i, 56, _STYLES[sense]), text(23 + 116 * i, 60, word, "note")]
    far = math.asinh(_LARGEST)
    across = scale(-far, far, 214, 470)

    def place(units: float) -> float:
        return across(math.asinh(units))

    ticks = (-30, -10, -3, -1, 0, 1, 3, 10, 30)
    ground = {float(x): "zero" if x == 0 else "axis" for x in ticks}
    y = 84.0
    parts += [text(place(x), y, f"{x:+d}" if x else "0", "mid note") for x in ticks]
    for i, claim in enumerate(claims):
        contrasts = [x for x in claim["contrasts"] if x["sense"] in SENSES]
        if not contrasts:
            continue
        y += 22
        for words in textwrap.wrap(f"{i + 1}. {claim['text']}", 64):
            parts.append(text(8, y, words))
            y += 16
        y -= 2
        parts += _ground(place, ground, y - 9, 17 * len(contrasts))
        for contrast in contrasts:
            parts += [text(206, y + 4, _label(claim, contrast), "note end"), *_in_units(contrast, place, y)]
            y += 17
        y -= 8
    return picture("Every registered contrast in units of the smallest effect of interest", y + 14, parts)


def _label(claim: Mapping[str, Any], contrast: Mapping[str, Any]) -> str:
    """What tells a contrast from the others of its claim."""
    others = claim["contrasts"]
    words = [place_title(contrast["place"])]
    if len({x["measure"] for x in others}) > 1 or len(others) == 1:
        words.append(_SHORT.get(contrast["measure"], MEASURES.get(contrast["measure"], contrast["measure"])))
    if len({(x["first"], x["second"]) for x in others}) > 1:
        words = [NAMES.get(contrast["first"], contrast["first"]), *words]
    return ", ".join(words).replace(", nats", "")


def _in_units(contrast: Mapping[str, Any], place: Callable[[float], float], y: float) -> list[str]:
    value, low, high = (contrast[name] for name in ("value", "low", "high"))
    if None in (value, low, high):
        return [text(place(0), y + 4, "a run diverged", "note mid")]
    units, style = contrast["smallest"], _STYLES[contrast["sense"]]
    colour = style.split()[1]
    return [
        line(place(low / units), y, place(high / units), y, f"line {colour}"),
        dot(place(value / units), y, style),
    ]


def plot_curves(places: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> str:
    """The mean reward of each rollout, over all seeds, by place and arm.

    Args:
        places: `[place][arm]["reward"]`, one number for each rollout.
    """
    names = list(next(iter(places.values())))
    parts = [
        text(8, 20, "Mean reward of each rollout", "title"),
        text(8, 38, "mean over the seeds; each arm at its own learning rate", "note"),
    ]
    for i, arm in enumerate(names):
        x, y = 8 + 118 * (i % 4), 58 + 20 * (i // 4)
        parts += [line(x, y - 4, x + 20, y - 4, f"line {COLOURS[arm]}"), text(x + 25, y, NAMES.get(arm, arm), "note")]
    y = 68.0 + 20 * ((len(names) - 1) // 4)
    for place, arms in places.items():
        highest = max(max(row["reward"]) for row in arms.values()) or 1.0
        top, bottom = y + 30, y + 140
        up = scale(0, highest, bottom, top)
        parts += [text(8, y + 18, place_title(place)), text(44, top + 6, f"{highest:.2g}", "note end")]
        parts += [
            text(44, bottom + 4, "0", "note end"),
            line(50, bottom, 470, bottom, "axis"),
            line(50, top, 470, top, "axis"),
        ]
        for arm, row in arms.items():
            across = scale(0, max(1, len(row["reward"]) - 1), 50, 470)
            points = " ".join(f"{across(i):.1f},{up(value):.1f}" for i, value in enumerate(row["reward"]))
            parts.append(f'<polyline points="{points}" class="line {COLOURS[arm]}"/>')
        y = bottom + 12
    count = len(next(iter(next(iter(places.values())).values()))["reward"])
    parts.append(text(470, y + 8, f"{count} rollouts", "note end"))
    return picture("Mean reward of each rollout", y + 18, parts)
