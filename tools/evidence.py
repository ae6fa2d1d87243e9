"""Writes docs/evidence.md and docs/evidence-data.md from docs/evidence.json and the text in tools/: `python tools/evidence.py`.

* `--from FILE`: take an evidence.json of `bandpo lab evidence` as docs/evidence.json, and draw the figures from it. A file of
  another protocol than the committed one is refused.
* `--check`: changes nothing; status 1 if a page or a figure is not what the JSON file gives.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bandpo._system.files import finite_or_null
from bandpo.lab.comparison.problems import DESCRIPTIONS
from bandpo.lab.drawing import NAMES
from bandpo.lab.evidence.figures import HALVES, MEASURES, OTHERS, SENSES, draw, latest, place_title, shown
from bandpo.lab.evidence.judge import NOT_MEASURED
from bandpo.lab.evidence.protocol import Experiment, read
from bandpo.lab.evidence.transformers import CONFIRMED
from bandpo.lab.forks.regimes import BASELINE, WHAT
from bandpo.lab.pages import render, table

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {DOCS / name: ROOT / "tools" / name for name in ("evidence.md", "evidence-data.md")}
"""Each page with its template."""
DATA, FIGURES = DOCS / "evidence.json", DOCS / "assets" / "evidence"
DIGITS = 5
LARGEST = 1_000_000
"""Bytes that the committed file may have."""
Row = dict[str, Any]

DECIDED = ("better", "worse")


def compact(evidence: Row) -> Row:
    """What the pages and their readers need of the result of `bandpo lab evidence`, with fewer digits.

    The values of each seed that a primary claim rests on stay, so that its verdict can be computed again; those of exploratory
    differences, and what docs/halves.json has, are left out.

    Raises:
        ValueError: If the result is too large to be committed.
    """
    forks = evidence.get("forks", {})
    kept = {name: forks[name] for name in ("preset", "runs", "cpu_seconds") if name in forks}
    kept["rates"] = {place: found["rates"] for place, found in forks.get("regimes", {}).items()}
    command = re.sub(r" --output[ =]\S+", "", evidence.get("command", ""))  # the folder is that of one machine
    found = finite_or_null(
        {
            **evidence,
            "command": command,
            "forks": kept,
            "transformers": evidence.get("transformers", {}),
            "values": claimed_values(evidence),
        },
        digits=DIGITS,
    )
    size = len(json.dumps(found))
    if size > LARGEST:
        raise ValueError(
            f"docs/evidence.json would have {size:,} bytes, more than {LARGEST:,}; keep fewer values in it"
        )
    return found


def check_protocol(evidence: Row, where: Path) -> None:
    """Check that a result is of the committed protocol.

    Raises:
        ValueError: If it is not.
    """
    now, then = read(evidence["preset"]).sha256, evidence["protocol"]["sha256"]
    if then != now:
        raise ValueError(
            f"{where} is of another protocol (SHA-256 {then[:12]}…) than the committed one ({now[:12]}…). Give the command "
            "that made it again: finished runs are used again, and the claims are judged by the committed protocol"
        )


def claimed_values(evidence: Row) -> Row:
    """The values that the measured contrasts of the primary claims are computed from, `[experiment][place][arm][measure]`."""
    found: Row = {}
    for claim in primary(evidence):
        for x in claim["contrasts"]:
            if x["verdict"] == NOT_MEASURED:
                continue
            for arm in (x["first"], x["second"]):
                row = found.setdefault(x["experiment"], {}).setdefault(x["place"], {}).setdefault(arm, {})
                row[x["measure"]] = evidence["values"][x["experiment"]][x["place"]][arm][x["measure"]]
    return found


def number(value: float | None, *, sign: bool = True) -> str:
    """A number as the pages print it; a run that diverged has none."""
    return "diverged" if value is None else f"{value:+.3f}" if sign else f"{value:.3f}"


def interval(found: Sequence[Any], *, sign: bool = True) -> str:
    """A value with its interval."""
    value, low, high = found[:3]
    if value is None or low is None or high is None:
        return number(value, sign=sign)
    return f"{number(value, sign=sign)} [{number(low, sign=sign)}, {number(high, sign=sign)}]"


def cell(found: Sequence[Any]) -> str:
    """A difference with its interval and verdict, a decided one in bold."""
    words = f"{interval(found)} {found[3]}"
    return f"**{words}**" if found[3] in DECIDED else words


def arm_name(arm: str) -> str:
    """An arm as the page names it."""
    return NAMES.get(arm, f"`{arm}`")


def primary(data: Row) -> list[Row]:
    """The registered claims."""
    return [claim for claim in data["judged"] if claim["kind"] == "primary"]


def counted(claim: Row) -> str:
    """How the contrasts of a claim came out."""
    return (
        ", ".join(f"{claim['counts'][sense]} {word}" for sense, word in SENSES.items() if claim["counts"].get(sense))
        or "–"
    )


def claims_table(data: Row) -> str:
    """The registered claims with their verdicts."""
    rows = [
        [f"{i + 1}", f"{claim['text']} ({claim['source']})", f"**{claim['verdict']}**", counted(claim)]
        for i, claim in enumerate(primary(data))
    ]
    return table(["", "claim", "verdict", "contrasts"], rows)


def listed(words: Sequence[str]) -> str:
    """A list as a sentence has it."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def outcome_sentence(data: Row) -> str:
    """How the contrasts of the registered claims came out, by whose claims they are."""
    parts: list[str] = []
    for whose in dict.fromkeys(claim["source"] for claim in primary(data)):
        claims = [claim for claim in primary(data) if claim["source"] == whose]
        count: Counter[str] = Counter()
        for claim in claims:
            count.update(claim["counts"])
        words = {**SENSES, NOT_MEASURED: NOT_MEASURED}
        found = [f"{count[sense]} {word}" for sense, word in words.items() if count[sense]]
        parts.append(f"{whose} ({len(claims)}): {', '.join(found)}")
    return (
        f"{len(primary(data))} claims were registered, with {sum(len(x['contrasts']) for x in primary(data))} contrasts, which "
        f"came out as follows, by whose claims they are: {'; '.join(parts)}."
    )


def places(data: Row) -> dict[str, Row]:
    """The differences at each place of the page: the confirmation of the exact regimes, and the transformers."""
    forks = data["explored"].get("forks", {})
    return {
        **{place: rows for place, rows in forks.items() if place.endswith("/confirmation")},
        **latest(data["explored"].get("transformers", {})),
    }


def against_clip(data: Row, arm: str, measure: str) -> str:
    """In how many places an arm is better and worse than the fixed clip, and by how much at the extremes."""
    found = {
        place: rows[f"{arm} - {BASELINE}"][measure]
        for place, rows in places(data).items()
        if measure in rows.get(f"{arm} - {BASELINE}", {}) and shown(place, measure)
    }
    count = Counter(x[3] for x in found.values())
    decided = sorted((x[0], place) for place, x in found.items() if x[3] in DECIDED)
    ends = [f"{place_title(place)} {number(value)}" for value, place in dict.fromkeys([*decided[:1], *decided[-1:]])]
    where = f" ({' to '.join(ends)})" if ends else ""
    return f"higher in {count['better']} and lower in {count['worse']} of {len(found)} places{where}"


def halves_sentences(data: Row) -> str:
    """What each half and the whole band do to pass@16 and to the entropy."""
    arms = [arm for arm in reversed(HALVES) if any(f"{arm} - {BASELINE}" in rows for rows in places(data).values())]
    return "\n".join(
        f"* **{arm_name(arm).capitalize()}**, against the fixed clip: pass@16 is {against_clip(data, arm, 'passed')}; the "
        f"entropy is {against_clip(data, arm, 'entropy')}."
        for arm in arms
    )


def price_sentence(data: Row) -> str:
    """What noise does to the tokens that were nearly certain."""
    found = data["means"].get("forks", {}).get("noise/confirmation", {})
    right = {arm: row["right"][0] for arm, row in found.items() if "right" in row and arm in (BASELINE, *HALVES)}
    if not right:
        return "The price of each half was not measured here."
    shares = [f"{number(x, sign=False)} under the {arm_name(arm)}" for arm, x in right.items()]
    return (
        "Where rewards are coin flips, the nearly certain tokens of a completion all stay right with chance "
        f"{listed(shares)}."
    )


def winners_table(data: Row) -> str:
    """Which of the main arms are better and worse than the fixed clip, place by place."""
    measures = ("mean", "passed", "entropy")
    rows: list[list[str]] = []
    for place, pairs in places(data).items():
        what = WHAT.get(place.partition("/")[0])
        cells = [f"**{place_title(place)}**" + (f": {what}" if what else "")]
        for measure in measures:
            if not shown(place, measure):
                cells.append("–")
                continue
            found = {
                verdict: [
                    arm_name(arm)
                    for arm in OTHERS
                    if measure in (row := pairs.get(f"{arm} - {BASELINE}", {})) and row[measure][3] == verdict
                ]
                for verdict in DECIDED
            }
            words = {"better": "above", "worse": "below"}
            cells.append("; ".join(f"{words[v]}: {', '.join(arms)}" for v, arms in found.items() if arms) or "nobody")
        rows.append(cells)
    return table(["", "mean reward", "pass@16", "entropy"], rows)


def first_place(place: str) -> str:
    """The place that has the first seeds of a place of the confirmation; any other place is its own."""
    return CONFIRMED.get(place, place.replace("/confirmation", "/adam"))


def first_seeds(data: Row, contrast: Row) -> list[Any] | None:
    """The difference of a contrast of the confirmation on the seeds that had been seen before it; None if there are none."""
    place = first_place(contrast["place"])
    found = {} if place == contrast["place"] else data["explored"].get(contrast["experiment"], {}).get(place, {})
    return found.get(f"{contrast['first']} - {contrast['second']}", {}).get(contrast["measure"])


def first_seeds_sentence(data: Row) -> str:
    """How many registered contrasts of the confirmation have the verdict that the first seeds gave."""
    both = [
        (x["verdict"], found[3])
        for claim in primary(data)
        for x in claim["contrasts"]
        if (found := first_seeds(data, x)) is not None and x["verdict"] != NOT_MEASURED
    ]
    if not both:
        return ""
    decided = [(now, before) for now, before in both if before in DECIDED]
    kept = sum(now == before for now, before in decided)
    turned = sum({now, before} == set(DECIDED) for now, before in decided)
    return (
        "After a first run with fewer seeds, the claims on what forks and transformers without lag reach are judged on fresh "
        f"seeds (registered in commits 9c056b15 and e54e1c57). Of the {len(decided)} contrasts that were better or worse on "
        f"the first seeds, {kept} are so again, and {turned} turned into their opposite."
    )


def named(contrast: Row) -> str:
    """A contrast as sentences name it: where, between which arms, in which measure."""
    arms = f"{arm_name(contrast['first'])} - {arm_name(contrast['second'])}"
    return f"{place_title(contrast['place'])}, {arms}, {MEASURES[contrast['measure']]}"


def same_rate(data: Row, contrast: Row) -> list[Any] | None:
    """The difference of a contrast with every arm at the rate of the fixed clip, as `explored` has it; None if not run."""
    found = data.get("same_rate", {}).get(contrast["experiment"], {}).get(contrast["place"], {})
    return found.get(f"{contrast['first']} - {contrast['second']}", {}).get(contrast["measure"])


def same_rate_sentence(data: Row) -> str:
    """Which registered verdicts of better or worse are not those at one rate."""
    both = [
        (x, found)
        for claim in primary(data)
        for x in claim["contrasts"]
        if x["verdict"] in DECIDED and (found := same_rate(data, x)) is not None and not x["place"].startswith("noise/")
    ]
    if not both:
        return ""
    changed = [
        f"{named(x)}: {number(x['value'])}, at one rate {number(found[0])}, {found[3]}"
        for x, found in both
        if found[3] != x["verdict"]
    ]
    return (
        f"At one rate for all, {len(both) - len(changed)} of {len(both)} registered contrasts that are better or worse are so "
        "too" + (f"; the others: {'; '.join(changed)}." if changed else ".")
    )


def opposite_rate_sentence(data: Row) -> str:
    """Which registered contrasts are better at the arms' own rates and worse at one rate, or the other way round."""
    turned = [
        f"{named(x)} ({number(x['value'])}, at one rate {number(found[0])})"
        for claim in primary(data)
        for x in claim["contrasts"]
        if x["verdict"] in DECIDED and (found := same_rate(data, x)) is not None
        if {x["verdict"], found[3]} == set(DECIDED)
    ]
    return f"The learning rate, and not the edge alone, decides the sign of {listed(turned)}." if turned else ""


def small_sentence(data: Row) -> str:
    """Which registered contrasts are better or worse by less than the smallest effect of interest."""
    decided = [x for claim in primary(data) for x in claim["contrasts"] if x["verdict"] in DECIDED]
    small = [f"{named(x)} {number(x['value'])}" for x in decided if abs(x["value"]) < x["smallest"]]
    if not small:
        return ""
    return (
        f"Of the {len(decided)} contrasts that are better or worse, {len(small)} have a value below the smallest effect of "
        f"interest: {'; '.join(small)}."
    )


def hidden_sentence(data: Row) -> str:
    """Which registered contrasts are undecided only because so many seeds may not show a failure."""
    hidden = [f"{named(x)} {number(x['value'])}" for claim in primary(data) for x in claim["contrasts"] if x["hidden"]]
    if not hidden:
        return ""
    return (
        "Undecided, although Student's interval is closer to 0 than the smallest effect, because so many seeds can miss a "
        f"rare failure: {'; '.join(hidden)}."
    )


def contrasts_table(data: Row, kind: str) -> str:
    """Every contrast of the claims of one kind."""
    head = [
        "claim",
        "where",
        "difference",
        "measure",
        "claimed",
        "value, interval",
        "verdict",
        "first seeds",
        "at one rate",
    ]
    head += ["pairs", "would need"]
    rows = [
        [
            str(claim["id"]),
            place_title(x["place"]),
            f"{arm_name(x['first'])} - {arm_name(x['second'])}",
            MEASURES.get(x["measure"], x["measure"]),
            x["claimed"],
            "–" if x["verdict"] == "not measured" else interval([x["value"], x["low"], x["high"]]),
            f"**{x['verdict']}**" if x["verdict"] in DECIDED else x["verdict"],
            "–" if (found := first_seeds(data, x)) is None else f"{interval(found)} {found[3]}",
            "–" if (found := same_rate(data, x)) is None else f"{interval(found)} {found[3]}",
            str(x["pairs"]),
            (x.get("reason") or "–") if x["needed"] is None else f"{x['needed']:,}",
        ]
        for claim in data["judged"]
        if claim["kind"] == kind
        for x in claim["contrasts"]
    ]
    return table(head, rows) if rows else "There are no such claims."


def differences_tables(data: Row) -> str:
    """The differences of every arm from the fixed clip, and of the halves, at each place."""
    parts: list[str] = []
    for experiment, found in data["explored"].items():
        for place, pairs in found.items():
            measures = [m for m in MEASURES if any(m in row for row in pairs.values()) and shown(place, m)]
            rows = [
                [
                    " - ".join(arm_name(x) for x in pair.split(" - ")),
                    *(cell(row[m]) if m in row else "–" for m in measures),
                ]
                for pair, row in pairs.items()
            ]
            parts += [f"### {experiment}: {place}", table(["difference", *(MEASURES[m] for m in measures)], rows)]
    return "\n\n".join(parts)


def means_tables(data: Row) -> str:
    """The mean of every arm in every measure at each place."""
    parts: list[str] = []
    for experiment, found in data["means"].items():
        for place, arms in found.items():
            measures = [m for m in MEASURES if any(m in row for row in arms.values())]
            rows = [
                [arm_name(arm), *(interval(row[m], sign=False) if m in row else "–" for m in measures)]
                for arm, row in arms.items()
            ]
            parts += [f"### {experiment}: {place}, values", table(["arm", *(MEASURES[m] for m in measures)], rows)]
    return "\n\n".join(parts)


def rates_table(data: Row) -> str:
    """The learning rates that tuning chose."""
    rates = {**data["forks"].get("rates", {}), **data["transformers"].get("rates", {})}
    if not rates:
        return "Nothing was tuned."
    arms = list(dict.fromkeys(arm for row in rates.values() for arm in row))
    rows = [[place, *(f"{row[arm]:g}" if arm in row else "–" for arm in arms)] for place, row in rates.items()]
    return table(["place", *(arm_name(arm) for arm in arms)], rows)


def moved(data: Row) -> str:
    """How far updates move rare rewarded tokens under the fixed clip and under the band: the mean, and the share beyond 1.2."""
    found = {
        key: (rows[BASELINE], rows["bandpo-kl"], pairs[f"bandpo-kl - {BASELINE}"])
        for key, rows in data["means"].get("forks", {}).items()
        if key.startswith("moves/")
        and {BASELINE, "bandpo-kl"} <= set(rows)
        and f"bandpo-kl - {BASELINE}" in (pairs := data["explored"]["forks"].get(key, {}))
    }
    if not found:
        return "How far updates move rare tokens was not measured for these arms."
    rows = [
        [
            place_title(key),
            *(
                words
                for measure, sign in (("moved_up", True), ("beyond_up", False))
                for words in (
                    number(clip[measure][0], sign=sign),
                    number(band[measure][0], sign=sign),
                    difference[measure][3],
                )
            ),
        ]
        for key, (clip, band, difference) in found.items()
    ]
    head = ["", "mean, fixed clip", "mean, band", "verdict", "beyond 1.2, fixed clip", "beyond 1.2, band", "verdict"]
    apart = [
        place_title(key)
        for key, (_, _, difference) in found.items()
        if {difference[m][3] for m in ("moved_up", "beyond_up")} == set(DECIDED)
    ]
    against = f" The two say the opposite of each other in {listed(apart)}." if apart else ""
    return (
        "The paper's bottleneck, for rare rewarded tokens of one rollout: their mean log-ratio (the claim) and "
        "the share that ends beyond ratio 1.2 (log 0.182), the edge of the fixed clip. Each interval holds alone."
        f"\n\n{table(head, rows)}\n\n"
        f"The edge stops a token's own gradient only.{against}"
    )


def hours_sentence(data: Row) -> str:
    """Whose time the core hours are."""
    warm_up = data["transformers"].get("core_parts", {}).get("warm-up")
    counted = "" if warm_up is None else f" ({warm_up / 60:.1f} minutes)"
    return f"Tuning counts, and warm-ups that were not in the cache{counted}."


def missing(data: Row) -> tuple[list[str], list[str]]:
    """The places and the arms that the preset of the protocol has and these numbers have not."""
    experiments, values = read(data["preset"]).experiments, data["means"]
    places = [
        f"`{name}/{place}`"
        for name, x in experiments.items()
        for place in x.places
        if place not in values.get(name, {})
    ]
    arms = [
        f"`{arm}`"
        for name, found in values.items()
        for arm in experiments[name].arms
        if not any(arm in rows for rows in found.values()) and not _of_widths(experiments[name], arm)
    ]
    return places, arms


def missing_sentences(data: Row) -> dict[str, str]:
    """What is registered and was not run: how much, for the page, and which, for the page of the data."""
    places, arms = missing(data)
    if not (places or arms):
        return dict.fromkeys(("missing", "missing_list"), "Everything that is registered was run.")
    parts = [f"{len(names)} {word}" for names, word in ((places, "places"), (arms, "arms")) if names]
    named = [f"{word}: {listed(names)}" for names, word in ((places, "places"), (arms, "arms")) if names]
    return {
        "missing": f"{' and '.join(parts)} of it were not run yet ([list](evidence-data.md#not-yet-run)).",
        "missing_list": f"Registered, and not in these numbers. {'; '.join(named)}.",
    }


def _of_widths(experiment: Experiment, arm: str) -> bool:
    """Whether an arm is a family of widths, whose places are named already."""
    return all(place.startswith("width/") for place, has in experiment.places.items() if arm in has.arms)


def widths_sentence(data: Row) -> str:
    """In which share of a grid of learning rates and widths each way to set a region learns."""
    found = {key: rows for key, rows in data["means"].get("forks", {}).items() if key.startswith("width/")}
    families = {"radius": "one radius, band", "upper": "one radius, upper half", "eps": "one ε", "two": "two ε"}
    if not found:
        return "How easy a width is to tune was not measured."
    rows = [
        [place_title(key), *(number(rows[name]["area"][0], sign=False) for name in families)]
        for key, rows in found.items()
    ]
    return "The share of a grid of learning rate and width in which a policy learns:\n\n" + table(
        ["", *families.values()], rows
    )


def transformers_sentences(data: Row) -> str:
    """The tasks, the tokens of the warmed-up models, and how the main arms came out."""
    found = data["explored"].get("transformers", {})
    if not found:
        return ""
    return f"{_tokens(data)} {_plateau(data)}"


def _tokens(data: Row) -> str:
    """What the tasks are, and which tokens the warmed-up models sample."""
    profiles = {place.partition("/")[0]: found for place, found in data["transformers"].get("profile", {}).items()}
    tasks = [
        f"in `{task}` ({DESCRIPTIONS[task]}) {x['rewarded']:.0%} are rewarded and {x['punished']:.0%} punished"
        for task, x in profiles.items()
    ]
    if not tasks:
        return ""
    certain, rare = (
        {f"{x[name]:{form}}" for x in profiles.values()} for name, form in (("near-certain", ".0%"), ("rare", ".1%"))
    )
    return (
        f"At the start of training, {' to '.join(sorted(certain))} of the sampled tokens have p ≥ 0.99 and "
        f"{' to '.join(sorted(rare))} have p < 0.1, of which {listed(tasks)}."
    )


def _plateau(data: Row) -> str:
    """In how many cells the reward has stopped to change."""
    found = latest(data["transformers"].get("plateau", {}))
    cells = [x["reached"] for arms in found.values() for x in arms.values()]
    allowed = data["transformers"].get("allowed_change")
    if not cells:
        return ""
    return (
        f"In {sum(cells)} of {len(cells)} cells of arm, task and lag the mean reward changes by at most {allowed:g} over the "
        "last third of the rollouts."
    )


def numbers(data: Row) -> Row:
    """The single numbers of the pages."""
    seeds = {
        name: sorted(
            {place.seeds for key, place in read(data["preset"]).experiments[name].places.items() if key in found}
        )
        for name, found in data["means"].items()
    }
    seconds = data.get("core_seconds", {})
    return {
        "preset": data["preset"],
        "registered": data["protocol"]["registered"],
        "sha": data["protocol"]["sha256"][:12],
        "amended": f" (amendments since: {len(amended)})" if (amended := data["protocol"]["amendments"]) else "",
        "amendments": "\n".join(f"* {words}" for words in amended) or "There are no amendments.",
        "bandpo": data["bandpo"],
        "git": data.get("git") or "no checkout",
        "torch": data["versions"]["torch"],
        "platform": data["platform"],
        "same_rate": same_rate_sentence(data),
        "first_seeds": first_seeds_sentence(data),
        "opposite_rate": opposite_rate_sentence(data),
        "small": small_sentence(data),
        "hidden": hidden_sentence(data),
        "claims": len(primary(data)),
        "contrasts": sum(len(claim["contrasts"]) for claim in primary(data)),
        "seeds": "paired seeds: " + ", ".join(f"{listed(list(map(str, x)))} ({name})" for name, x in seeds.items()),
        "core_hours": f"{sum(seconds.values()) / 3600:.1f}",
        "smallest": ", ".join(f"{MEASURES[m]} {x:g}" for m, x in data["smallest"].items() if m in MEASURES),
    }


def pages(data: Row) -> dict[Path, str]:
    """The text of each page, by its file."""
    values = {
        **numbers(data),
        "claims_table": claims_table(data),
        "outcome": outcome_sentence(data),
        "halves": halves_sentences(data),
        "price": price_sentence(data),
        "winners_table": winners_table(data),
        "primary_table": contrasts_table(data, "primary"),
        "exploratory_table": contrasts_table(data, "exploratory"),
        "differences_tables": differences_tables(data),
        "means_tables": means_tables(data),
        "rates_table": rates_table(data),
        "moved": moved(data),
        "hours": hours_sentence(data),
        "widths": widths_sentence(data),
        **missing_sentences(data),
        "transformers": transformers_sentences(data),
        "figures": sorted(draw(data)),
    }
    return {path: render(template.read_text(encoding="utf-8"), values) for path, template in PAGES.items()}


def main() -> int:
    """Writes the pages, or compares them."""
    parser = argparse.ArgumentParser(description="The pages of the evidence from docs/evidence.json.")
    parser.add_argument("--from", dest="source", type=Path, help="an evidence.json of bandpo lab evidence")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if something is out of date")
    options = parser.parse_args()
    data = json.loads((options.source or DATA).read_text(encoding="utf-8"))
    if options.source:
        try:
            check_protocol(data, options.source)
        except ValueError as error:
            parser.exit(1, f"{error}\n")
        data = compact(data)
    made = {**pages(data), **{FIGURES / f"{name}.svg": figure for name, figure in draw(data).items()}}
    extra = [path for path in FIGURES.glob("*") if path not in made]
    if options.check:
        stale = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
        for path in [*stale, *extra]:
            print(f"{path.relative_to(ROOT)} is out of date; run python tools/evidence.py")
        return int(bool(stale or extra))
    FIGURES.mkdir(parents=True, exist_ok=True)
    for path in extra:
        path.unlink()
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
    if options.source:
        DATA.write_text(json.dumps(data) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
