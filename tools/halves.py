"""Writes docs/halves.md from docs/halves.json and the text in tools/halves.md: `python tools/halves.py`.

* `--from FILE...`: take forks.json of `bandpo lab forks` as docs/halves.json, and draw the figures from it. Of several files,
  each later one adds the parts that the first one has not.
* `--check`: changes nothing; status 1 if the page or a figure is not what the JSON file gives.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bandpo.lab.forks.figures import draw
from bandpo.lab.forks.plan import PRESETS
from bandpo.lab.forks.regimes import FACTORS, WHAT
from bandpo.lab.forks.study import PARTS
from bandpo.lab.forks.summary import smallest_of
from bandpo.lab.pages import WIDTH, render, table
from bandpo.statistics import unseen_share

ROOT = Path(__file__).parents[1]
TEXT, PAGE, DATA = ROOT / "tools" / "halves.md", ROOT / "docs" / "halves.md", ROOT / "docs" / "halves.json"
FIGURES = ROOT / "docs" / "assets" / "halves"
NAMES = {"speed": "reward in training", "mean": "mean", "passed": "pass@16", "entropy": "entropy"}
UPPER, LOWER, BAND, CLIP = "bandpo-kl-upper", "bandpo-kl-lower", "bandpo-kl", "grpo"
Row = dict[str, Any]


def signed(found: Row) -> str:
    """A difference with its interval."""
    return f"{found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def cell(found: Row) -> str:
    """A difference with its interval and its verdict; a clear one in bold."""
    text = f"{signed(found)} {found['verdict']}"
    return f"**{text}**" if found["verdict"] in ("better", "worse") else text


def regimes_of(data: Row) -> Row:
    """The summaries of the regimes under Adam, by regime."""
    return {key.partition("/")[0]: found for key, found in data["regimes"].items() if key.endswith("/adam")}


def sentence(data: Row, pair: str, measure: str, what: str) -> str:
    """How one comparison came out in every regime with something to learn."""
    found = {r: x["differences"]["own"][pair][measure] for r, x in regimes_of(data).items() if r != "noise"}
    count = {word: sum(x["verdict"] == word for x in found.values()) for word in ("better", "worse")}
    parts = [f"{r} {signed(x)} ({x['verdict']})" for r, x in found.items()]
    summed = f"better in {count['better']} and worse in {count['worse']} of {len(found)} regimes"
    return f"{what}: {summed} ({'; '.join(parts)})."


def factor(found: Row) -> str:
    """A mean log-ratio as a factor of the probability, with its interval."""
    return "{:.2g} [{:.2g}, {:.2g}]".format(*(math.exp(found[x]) for x in ("value", "low", "high")))


def moves_of(data: Row) -> Row:
    """How far updates move rare tokens under Adam, by regime; `noise` has nothing that is worth a move."""
    places = data["moves"]["places"].items() if "moves" in data else ()
    return {k.partition("/")[0]: x for k, x in places if k.endswith("/adam") and not k.startswith("noise")}


def moved(data: Row) -> dict[str, str]:
    """The sentences and the table of how far updates move rare tokens."""
    places = moves_of(data)
    if not places:
        return {"moves_finding": "", "moves_text": "", "moves_table": ""}
    arms = [*next(iter(places.values()))["values"]]

    def told(arm: str) -> str:
        verdicts = [x["differences"][f"{arm} - {CLIP}"]["moved_up"]["verdict"] for x in places.values()]
        counts = ", ".join(f"{name} in {n}" for name, word in MOVED.items() if (n := verdicts.count(word)))
        return f"under `{arm}` {counts}"

    registered = {r: x for r, x in places.items() if r != "race"}  # as in the protocol and the figure
    values = {
        arm: ", ".join(f"{math.exp(x['values'][arm]['moved_up']['value']):.2f} in {r}" for r, x in registered.items())
        for arm in (CLIP, BAND, UPPER)
    }
    text = (
        f"A rewarded rare token moves, compared with the fixed clip and counted over {len(places)} regimes, {told(BAND)}; "
        f"{told(UPPER)}. A clip takes away a token's own gradient beyond the edge and no more: other tokens, momentum and the "
        "last step move it too."
    )
    beyond = ", ".join(f"{x['values'][CLIP]['beyond_up']['value']:.0%} in {r}" for r, x in places.items())
    return {
        "moves_finding": "**The bottleneck, measured**: updates on a rollout multiply the probability of a rewarded rare token "
        f"by {values[CLIP]} under the fixed clip, by {values[BAND]} under the whole band, and by {values[UPPER]} under the "
        "upper half, all at one rate (geometric means).",
        "moves_text": f"{text} Under the fixed clip the share of rewarded rare tokens that end above 1.2 is {beyond}.",
        "moves_table": table(
            [
                "regime",
                "arm",
                "rewarded: new over old",
                "punished: new over old",
                "rewarded, above 1.2",
                "punished, below 0.8",
            ],
            [
                [
                    r,
                    f"`{arm}`",
                    *(factor(x["values"][arm][m]) for m in ("moved_up", "moved_down")),
                    *(f"{x['values'][arm][m]['value']:.0%}" for m in ("beyond_up", "beyond_down")),
                ]
                for r, x in places.items()
                for arm in arms
            ],
        ),
    }


MOVED = {"further": "better", "less far": "worse", "the same": "equivalent", "undecided": "undecided"}
FAMILIES = {
    "radius": "one radius, the band",
    "upper": "one radius, its upper half",
    "eps": "one epsilon",
    "two": "two epsilons",
}


def widened(data: Row) -> dict[str, str]:
    """The sentences and the table of one radius against one and two epsilons."""
    if "widths" not in data:
        return {"widths_finding": "", "widths_text": "", "widths_table": ""}
    places = {k.partition("/")[0]: x for k, x in data["widths"]["places"].items()}
    area = "; ".join(
        f"{r} " + ", ".join(f"{x['values'][f]['area']['value']:.2f} ({FAMILIES[f]})" for f in ("radius", "eps", "two"))
        for r, x in places.items()
    )
    found = {
        f: {r: x["differences"][f"{f} - eps"]["area"]["verdict"] for r, x in places.items()}
        for f in FAMILIES
        if f != "eps"
    }
    verdicts = "; ".join(f"{FAMILIES[f]} is {', '.join(f'{v} in {r}' for r, v in x.items())}" for f, x in found.items())
    cells = next(iter(places.values()))["cells"]
    return {
        "widths_finding": f"**One radius against two epsilons**, share of the grid of rate and width that learns: {area}.",
        "widths_text": f"There are {cells['radius']} cells for one radius or one epsilon and {cells['two']} for two. "
        f"The area against that of one epsilon: {verdicts}.",
        "widths_table": table(
            [
                "regime",
                "region",
                "cells",
                "area",
                "best of a few",
                "area - that of one epsilon",
                "best - that of one epsilon",
            ],
            [
                [
                    r,
                    FAMILIES[f],
                    str(x["cells"][f]),
                    *("{value:.3f} [{low:.3f}, {high:.3f}]".format(**x["values"][f][m]) for m in ("area", "best")),
                    *("–" if f == "eps" else cell(x["differences"][f"{f} - eps"][m]) for m in ("area", "best")),
                ]
                for r, x in places.items()
                for f in FAMILIES
            ],
        ),
    }


def mapped(data: Row) -> dict[str, str]:
    """How often each arm wins on the map."""
    tiles = data.get("map", [])
    counts = [
        f"{NAMES[m]}: {', '.join(f'{arm} {n}' for arm, n in Counter(t['winners'][m] or 'nobody' for t in tiles).most_common())}"
        for m in NAMES
    ]
    return {"map_text": f"The winners of the {len(tiles)} tiles: {'; '.join(counts)}."}


def under_sgd(data: Row) -> str:
    """The halves under SGD, or nothing."""
    found = {k.partition("/")[0]: x for k, x in data["regimes"].items() if k.endswith("/sgd")}
    if not found:
        return ""
    return table(
        ["regime", "arm", "rate", *(NAMES[m] for m in NAMES)],
        [
            [
                r,
                f"`{arm}`",
                f"{x['rates'][arm]:g}",
                *(cell(x["differences"]["own"][f"{arm} - {CLIP}"][m]) for m in NAMES),
            ]
            for r, x in found.items()
            for arm in x["rates"]
            if arm != CLIP
        ],
    )


def findings(data: Row) -> dict[str, str]:
    """The sentences whose numbers come from the data."""
    right = {arm: x["right"]["value"] for arm, x in regimes_of(data)["noise"]["values"]["own"].items()}
    drift, start = data["drift"]["ends"]["sgd 1"], data["drift"]["start"]
    theory = data["theory"]["drift"]
    kinds = data["drift"]["ends"]
    agree = {k: sum((rows[x]["value"] > start) == (theory[x] > 0) for x in rows) for k, rows in kinds.items()}
    others = "; ".join(f"{k}: {n}" for k, n in agree.items() if k != "sgd 1")
    ends = ", ".join(f"{rows['[0.8, 1.2]']['value']:.2f} ({k})" for k, rows in kinds.items())
    goal = {"needle": 1.0, "race": 0.75}
    means = {r: [x["mean"]["value"] for x in regimes_of(data)[r]["values"]["own"].values()] for r in goal}
    order = sorted(drift, key=lambda x: theory[x])
    pairs = [(a, b) for i, a in enumerate(order) for b in order[i + 1 :] if theory[a] != theory[b]]
    ordered = sum(drift[a]["value"] < drift[b]["value"] for a, b in pairs)
    return {
        "upper_finding": sentence(
            data, f"{UPPER} - {CLIP}", "passed", "**Upper half against the fixed clip**, pass@16 under Adam"
        ),
        "lower_finding": sentence(
            data, f"{LOWER} - {CLIP}", "passed", "**Lower half against the fixed clip**, pass@16"
        ),
        "band_finding": sentence(data, f"{BAND} - {CLIP}", "passed", "**Whole band against the fixed clip**, pass@16"),
        "price_finding": "**The price of the upper half**: on coin-flip rewards the nearly certain tokens of a completion stay "
        f"right with chance {right[UPPER]:.2f} under the upper half and {right[BAND]:.2f} under the whole band, against "
        f"{right[CLIP]:.2f} under the fixed clip and {right[LOWER]:.2f} under the lower half.",
        "drift_agreement": f"The theory has the sign of SGD at rate 1 for {agree['sgd 1']} of {len(drift)} intervals, and the "
        f"order for {ordered} of {len(pairs)} pairs of intervals. Of the runs that it does not cover it has fewer signs "
        f"({others}).",
        "cancel_finding": f"For one token and T = 0.25 they cancel near [0.8, {data['theory']['neutral']['0.9'][1]:.2f}]; "
        f"after the runs with [0.8, 1.2] the entropy, {start:.2f} at the beginning, is {ends}.",
        "ceiling_finding": "At the end the mean of the arms is "
        + ", and ".join(
            f"from {min(x):.2f} to {max(x):.2f} in `{r}`, where one option reaches {goal[r]:g}"
            for r, x in means.items()
        )
        + ".",
        "neutral_finding": sentence(data, f"neutral - {CLIP}", "passed", "Against the fixed clip, pass@16")
        + " "
        + sentence(data, f"neutral - {CLIP}", "speed", "Reward in training"),
        "undone": undone(data),
    }


def undone(data: Row) -> str:
    """What the full study has and these numbers have not."""
    full, regimes = PRESETS["full"], data["regimes"]
    arms = [arm for arm in full.arms if not any(arm in x["rates"] for x in regimes.values())]
    places = [f"{r} under {o.upper()}" for o in full.optimizers for r in full.regimes if f"{r}/{o}" not in regimes]
    widths = [r for r in full.width_regimes if f"{r}/adam" not in data.get("widths", {}).get("places", {})]
    tiles = len(full.shares) * len(full.reuse) * len(full.flips)
    parts = [
        f"the arms {', '.join(f'`{arm}`' for arm in arms)}" if arms else "",
        f"the regimes {', '.join(places)}" if places else "",
        f"the widths in {', '.join(widths)}" if widths else "",
        f"{tiles - len(data.get('map', []))} of {tiles} tiles of the map" if len(data.get("map", [])) < tiles else "",
    ]
    missing = "; ".join(part for part in parts if part)
    return (
        f"`--preset full` has more than these numbers: {missing}."
        if missing
        else "All parts of `--preset full` are here."
    )


def _shown(found: Row, regime: str, pair: str, measure: str) -> str:
    if regime == "noise" and measure == "passed":
        return "–"  # there is nothing to pass
    return cell(found["differences"]["own"][pair][measure])


def same_agreement(data: Row) -> str:
    """In how many of the decided verdicts the sign at the baseline's rate is that at the own rate."""
    agree = total = 0
    for regime, found in regimes_of(data).items():
        if regime == "noise":  # one rate in both ways
            continue
        for pair, row in found["differences"]["own"].items():
            for measure, x in row.items():
                if x["verdict"] in ("better", "worse"):
                    total += 1
                    agree += found["differences"]["same"][pair][measure]["value"] * x["value"] > 0
    return f"{agree} of {total}"


def tables(data: Row) -> dict[str, str]:
    """The tables of the page."""
    regimes, theory, drift = regimes_of(data), data["theory"], data["drift"]
    learn = [r for r in regimes if r != "noise"]
    arms = [arm for arm in regimes["noisy"]["rates"] if arm != CLIP]
    measures = ("speed", "mean", "passed", "entropy")
    pairs = [f"{UPPER} - {BAND}", f"{UPPER} - {LOWER}", f"{LOWER} - {BAND}"]
    kinds = list(drift["ends"])
    return {
        "reach_table": table(
            ["region", *(f"p = {p}" for p in ("0.0001", "0.01", "0.5", "0.99"))],
            [
                [f"`{name}`", *(f"{u:.4g}, {d:.3g}" for u, d in zip(found["up"], found["down"], strict=True))]
                for name, found in theory["reach"].items()
            ],
        ),
        "neutral_table": table(
            ["probability of the common token", "T = 0.1", "T = 0.25", "T = 0.5", "T = 1"],
            [[p, *("–" if u is None else f"{u:.3f}" for u in row)] for p, row in theory["neutral"].items()],
        ),
        "drift_table": table(
            ["interval", "theory, one rollout of one token, 10⁻³ nats", *(f"end, {kind}" for kind in kinds)],
            [
                [
                    label,
                    f"{theory['drift'][label]:+.2f}",
                    *("{value:.2f} [{low:.2f}, {high:.2f}]".format(**drift["ends"][kind][label]) for kind in kinds),
                ]
                for label in drift["ends"][kinds[0]]
            ],
        ),
        "regimes_table": table(
            ["regime", "arm", *(NAMES[m] for m in measures)],
            [
                [r, f"`{arm}`", *(cell(regimes[r]["differences"]["own"][f"{arm} - {CLIP}"][m]) for m in measures)]
                for r in learn
                for arm in arms
                if f"{arm} - {CLIP}" in regimes[r]["differences"]["own"]
            ],
        ),
        "halves_table": table(
            ["regime", "difference", "pass@16", "entropy"],
            [
                [r, pair, *(_shown(regimes[r], r, pair, m) for m in ("passed", "entropy"))]
                for r in regimes
                for pair in pairs
            ],
        ),
        "right_table": table(
            ["arm", "right, 95% interval", "entropy of the fork"],
            [
                [
                    f"`{arm}`",
                    "{value:.3f} [{low:.3f}, {high:.3f}]".format(**x["right"]),
                    "{value:.2f} [{low:.2f}, {high:.2f}]".format(**x["entropy"]),
                ]
                for arm, x in regimes["noise"]["values"]["own"].items()
            ],
        ),
        "what_list": "\n".join(f"* **{name}**: {text}" for name, text in WHAT.items()),
    }


def page(data: Row) -> str:
    """The page."""
    regimes, preset = regimes_of(data), PRESETS[data["preset"]]
    reward, passed, entropy = (f"{smallest_of(measure):g}" for measure in ("speed", "passed", "entropy"))
    shown = f"{reward} in reward, {passed} in pass@16, {entropy} nats in entropy"
    numbers = {
        "theory": data["theory"],
        "tuning_seeds": preset.tuning_seeds,
        "seeds": regimes["noisy"]["seeds"],
        "family": regimes["noisy"]["family"],
        "smallest": shown,
        "bandpo": data["bandpo"],
        "drift_seeds": data["drift"]["seeds"],
        "start": f"{data['drift']['start']:.3f}",
        "noise_rate": f"{regimes['noise']['rates'][CLIP]:g}",
        "neutral_drift": f"{data['theory']['drift']['[0.5, 1.755]']:+.2f}",
        "same_agreement": same_agreement(data),
        "flat_upper": f"{data['theory']['flat'][UPPER]:+.1f}",
        "flat_clip": f"{data['theory']['flat'][CLIP]:+.1f}",
        "unseen": f"{100 * unseen_share(regimes['noisy']['seeds'], regimes['noisy']['family']):.1f}",
        "moves": data.get("moves"),
        "widths": data.get("widths"),
        "map": data.get("map"),
        "factors": ", ".join(f"{x:g}" for x in FACTORS),
        "sgd_table": under_sgd(data),
        "commands": "\n".join([*commands(data), "python tools/halves.py --from runs/lab-forks/forks.json"]),
    }
    made = {**findings(data), **moved(data), **widened(data), **mapped(data), **tables(data)}
    return render(TEXT.read_text(encoding="utf-8"), {**numbers, **made})


_FOLDER = re.compile(r" --output[ =][^ \"]+")
"""The folder of a command, which is that of one machine."""


def commands(data: Row) -> list[str]:
    """The commands that made the data, without their folder, in lines that fit the page."""
    made = [re.sub(r" --(output|output-dir|jobs)[ =]\S+", "", x["command"]) for x in (data, *data.get("also", []))]
    return [x if len(x) <= WIDTH else re.sub(r" --(only|arms)", r" \\\n    --\1", x) for x in made]


def merged(files: Sequence[Path]) -> Row:
    """The content of several files as one: later ones add the parts that the first one has not, and what made them."""
    first, *others = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    for other in others:
        parts = {key: other[key] for key in PARTS if key in other and key not in first}
        made_by = {key: x for key, x in other.items() if key not in (*PARTS, "theory", "moves")}
        first = {**first, **parts, "also": [*first.get("also", []), made_by]}
    return first


def main() -> int:
    """Writes the page, or compares it."""
    parser = argparse.ArgumentParser(description="The page of the two halves from docs/halves.json.")
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        nargs="+",
        help="forks.json of bandpo lab forks; several ones of different parts",
    )
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if something is out of date")
    options = parser.parse_args()
    data = merged(options.source or [DATA])
    made = {PAGE: page(data), **{FIGURES / f"{name}.svg": picture for name, picture in draw(data).items()}}
    if options.check:
        stale = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date; run python tools/halves.py")
        return int(bool(stale))
    FIGURES.mkdir(parents=True, exist_ok=True)
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
    if options.source:
        DATA.write_text(_FOLDER.sub("", json.dumps(data)) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
