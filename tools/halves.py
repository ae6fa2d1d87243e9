"""Writes docs/halves.md from docs/halves.json and the text in tools/halves.md: `python tools/halves.py`.

* `--from FILE`: take a forks.json of `bandpo lab forks` as docs/halves.json, and draw the figures from it.
* `--check`: changes nothing; status 1 if the page or a figure is not what the JSON file gives.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bandpo.lab.forks.figures import draw
from bandpo.lab.forks.plan import PRESETS
from bandpo.lab.forks.regimes import WHAT
from bandpo.lab.forks.summary import SMALLEST
from bandpo.lab.pages import render, table

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


def way(regime: str) -> str:
    """Which rates a regime is shown at: each arm's own, or one for all where no rate is better than another."""
    return "same" if regime == "noise" else "own"


def findings(data: Row) -> dict[str, str]:
    """The sentences whose numbers come from the data."""
    right = {arm: x["right"]["value"] for arm, x in regimes_of(data)["noise"]["values"]["same"].items()}
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
        "undone": (
            "The map (share of good rare options x steps for each rollout x wrong rewards), SGD in the regimes, the other "
            "balls, `dppo`, `cfpo` and `troll` are parts of `--preset full` and not in these numbers."
            if "map" not in data
            else "SGD in the regimes, the other balls, `dppo`, `cfpo` and `troll` are parts of `--preset full` and not in "
            "these numbers."
        ),
    }


def _shown(found: Row, regime: str, pair: str, measure: str) -> str:
    if regime == "noise" and measure == "passed":
        return "–"  # there is nothing to pass
    return cell(found["differences"][way(regime)][pair][measure])


def same_agreement(data: Row) -> str:
    """In how many of the decided verdicts the sign at the baseline's rate is that at the own rate."""
    agree = total = 0
    for regime, found in regimes_of(data).items():
        if way(regime) == "same":
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
                for arm, x in regimes["noise"]["values"]["same"].items()
            ],
        ),
        "what_list": "\n".join(f"* **{name}**: {text}" for name, text in WHAT.items()),
    }


def page(data: Row) -> str:
    """The page."""
    regimes, preset = regimes_of(data), PRESETS[data["preset"]]
    shown = (
        f"{SMALLEST['speed']:g} in reward, {SMALLEST['passed']:g} in pass@16, {SMALLEST['entropy']:g} nats in entropy"
    )
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
        "unseen": f"{100 * (1 - 0.05 ** (1 / regimes['noisy']['seeds'])):.1f}",
    }
    return render(TEXT.read_text(encoding="utf-8"), {**numbers, **findings(data), **tables(data)})


def main() -> int:
    """Writes the page, or compares it."""
    parser = argparse.ArgumentParser(description="The page of the two halves from docs/halves.json.")
    parser.add_argument("--from", dest="source", type=Path, help="a forks.json of bandpo lab forks")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if something is out of date")
    options = parser.parse_args()
    data = json.loads((options.source or DATA).read_text(encoding="utf-8"))
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
        DATA.write_text(json.dumps(data) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
