"""`bandpo lab evidence` and its pages. Made-up values stand for the runs where these would take long."""

import argparse
import importlib.util
import itertools
import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree

import numpy as np
import pytest

from bandpo.lab.evidence import command
from bandpo.lab.evidence import study as study_module
from bandpo.lab.evidence.figures import SENSES, draw, latest, place_title
from bandpo.lab.evidence.judge import came_out, judge, verdict_of
from bandpo.lab.evidence.protocol import read
from bandpo.lab.evidence.study import (
    EXPERIMENTS,
    Outcome,
    explored,
    forks_preset,
    measured,
    restricted,
    study,
)
from bandpo.lab.experiments.arguments import add_arguments, run
from bandpo.monitoring.catalog import RULES, CameOut
from bandpo.statistics import t_interval
from evidence_samples import few_seeds, made_up_values

ROOT = Path(__file__).parents[2]
INTERVAL = r"\[[+-]\d\.\d+, [+-]\d"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("tools_evidence", ROOT / "tools" / "evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def protocol():
    """The smoke preset with the transformers of the quick one, so that all parts of the pages have something to show."""
    smoke, quick = few_seeds(read("smoke")), few_seeds(read("quick"))
    return replace(smoke, experiments={**smoke.experiments, "transformers": quick.experiments["transformers"]})


def made_up(values):
    return {name: lambda protocol, folder, jobs, say, name=name: Outcome(values[name], {}, 3600.0) for name in values}


@pytest.fixture(scope="module")
def evidence(protocol):
    """The content of evidence.json with made-up values."""
    patch = pytest.MonkeyPatch()
    patch.setattr(study_module, "EXPERIMENTS", made_up(made_up_values(protocol)))
    found = study(protocol, Path("nowhere"), 1, lambda _: None)
    patch.undo()
    return json.loads(json.dumps(found))


def options(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["evidence", *words])


def test_the_command_writes_the_result_and_the_figures(tmp_path, monkeypatch, protocol, capsys):
    monkeypatch.setattr(command, "read", lambda preset: protocol)
    monkeypatch.setattr(study_module, "EXPERIMENTS", made_up(made_up_values(protocol)))
    assert run(options("--preset", "smoke", "--only", "forks", "--output", str(tmp_path))) == 0
    found = json.loads((tmp_path / "evidence.json").read_text())
    assert found["protocol"]["sha256"] == protocol.sha256 and list(found["values"]) == ["forks"]
    assert {p.stem for p in tmp_path.glob("*.svg")} == set(draw(found)) >= {"evidence-claims", "evidence-halves"}
    said = capsys.readouterr().out
    primary = [claim for claim in found["judged"] if claim["kind"] == "primary"]
    assert "part 1 of 1: forks" in said and all(claim["text"] in said for claim in primary)


def test_a_command_that_is_given_again_makes_no_run_again(tmp_path, monkeypatch):
    """Real runs, of one rollout."""
    monkeypatch.setattr(command, "read", lambda preset: few_seeds(read(preset), 3))
    monkeypatch.setitem(study_module.PRESETS, "smoke", replace(study_module.PRESETS["smoke"], rollouts=1))
    words = (
        "--preset",
        "smoke",
        "--only",
        "forks/diversity/confirmation",
        "--arms",
        "bandpo-kl",
        "--output",
        str(tmp_path),
    )
    found = []
    for _ in range(2):
        assert run(options(*words, "--jobs", "1")) == 0
        content = json.loads((tmp_path / "evidence.json").read_text())
        made = {path: path.stat().st_mtime_ns for path in (tmp_path / "forks" / "cells").iterdir()}
        found.append((made, {name: content[name] for name in ("judged", "explored", "means", "values")}))
    assert found[0] == found[1] and len(found[0][0]) >= 4
    assert set(found[0][1]["values"]["forks"]["diversity/confirmation"]) == {"grpo", "bandpo-kl"}


def test_a_folder_of_another_protocol_or_preset_is_named(tmp_path, monkeypatch, protocol, capsys):
    monkeypatch.setattr(command, "read", lambda preset: protocol)
    monkeypatch.setattr(study_module, "EXPERIMENTS", made_up(made_up_values(protocol)))
    words = ("--preset", "smoke", "--only", "forks", "--output", str(tmp_path))
    assert run(options(*words)) == run(options(*words)) == 0
    assert "is of another protocol" not in (said := capsys.readouterr().out) and "is of the preset" not in said
    path = tmp_path / "evidence.json"
    found = json.loads(path.read_text())
    for change, expected in (
        (
            {"protocol": {**found["protocol"], "sha256": "ab" * 32}},
            "is of another protocol (SHA-256 abababababab…, now ",
        ),
        (
            {"preset": "full"},
            "is of the preset full, and is replaced by that of smoke; runs that both ask for are used again",
        ),
        ({"protocol": None}, "cannot be read"),
    ):
        path.write_text(json.dumps({**found, **change}))
        assert run(options(*words)) == 0
        assert f"{path} {expected}" in capsys.readouterr().out
        assert json.loads(path.read_text())["protocol"]["sha256"] == protocol.sha256


def test_the_pages_are_not_made_from_another_protocol(tool, evidence, tmp_path, monkeypatch, capsys):
    path = tmp_path / "evidence.json"
    before = tool.DATA.read_bytes()
    path.write_text(json.dumps({**evidence, "protocol": {**evidence["protocol"], "sha256": "0" * 64}}))
    monkeypatch.setattr("sys.argv", ["evidence.py", "--from", str(path)])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    assert ended.value.code == 1 and tool.DATA.read_bytes() == before
    assert f"{path} is of another protocol (SHA-256 000000000000…)" in capsys.readouterr().err


def test_runs_that_diverged_are_in_the_result(protocol, monkeypatch):
    """An arm without any number, and one with a single measure that was not computed."""
    values = made_up_values(protocol)
    arms = values["forks"]["diversity/confirmation"]
    arms["bandpo-kl-upper"] = {m: [math.nan] * len(row) for m, row in arms["bandpo-kl-upper"].items()}
    arms["grpo"]["mean"][0] = math.nan
    monkeypatch.setattr(study_module, "EXPERIMENTS", made_up(values))
    found = study(protocol, Path("nowhere"), 1, lambda _: None)
    assert found["diverged"] == {"forks": {"diversity/confirmation": {"bandpo-kl-upper": list(range(8))}}}
    row = found["explored"]["forks"]["diversity/confirmation"]
    assert row["bandpo-kl-upper - grpo"]["passed"][0] == pytest.approx(
        -np.mean(arms["grpo"]["passed"])
    )  # the worst is 0
    assert row["bandpo-kl-upper - grpo"]["mean"][0] is None and row["bandpo-kl - grpo"]["mean"][0] is None


@pytest.mark.slow
def test_the_smoke_preset_from_the_runs_to_the_pages(tmp_path, tool):
    """All parts of the protocol with few seeds, as the command makes them: half a minute of a core."""
    assert run(options("--preset", "smoke", "--jobs", "1", "--output", str(tmp_path))) == 0
    found = json.loads((tmp_path / "evidence.json").read_text())
    places = {name: set(experiment.places) for name, experiment in read("smoke").experiments.items()}
    assert {name: set(found["values"][name]) for name in places} == places
    judged = {x["verdict"] for claim in found["judged"] if claim["kind"] == "primary" for x in claim["contrasts"]}
    assert judged - {"not measured"}
    page, data = tool.pages(tool.compact(found)).values()
    assert "Preset `smoke`" in page and "### forks: diversity/confirmation" in data


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "fork"], "--only: got 'fork'; did you mean 'forks'"),
        (["--only", "forks/x*"], "--only: got 'forks/x"),
        (["--arms", "bandpo"], "--arms: got 'bandpo'"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--device", "cuda"], "--device cuda: .* choose --device cpu"),
    ],
)
def test_wrong_options_are_refused(words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(options(*words, "--output", str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_only_names_experiments_and_places():
    quick = read("quick")
    some = restricted(quick, ["forks/n*/confirmation", "transformers"])
    assert list(some.experiments["forks"].places) == ["needle/confirmation", "noisy/confirmation", "noise/confirmation"]
    assert some.experiments["transformers"] == quick.experiments["transformers"] and some.claims == quick.claims
    assert not restricted(quick, ["forks"]).experiments["transformers"].places
    few = restricted(quick, None, ["bandpo-kl"]).experiments["forks"]
    assert few.places["noisy/confirmation"].arms == ("grpo", "bandpo-kl")
    assert few.places["width/noisy"] == quick.experiments["forks"].places["width/noisy"]


def test_the_study_of_forks_has_the_places_of_the_protocol():
    full = read("full")
    preset, parts = forks_preset(restricted(full, ["forks/*/adam", "forks/moves/*"]))
    assert set(preset.arms) == set(full.experiments["forks"].places["noisy/adam"].arms)
    assert preset.optimizers == ("adam",) and parts == ("regimes",) and preset.seeds == full.experiments["forks"].seeds
    preset, parts = forks_preset(restricted(full, ["forks/width/noisy"]))
    assert preset.width_regimes == ("noisy",) and parts == ("widths",)
    for name in ("smoke", "quick", "full"):  # what is registered can be made
        protocol = read(name)
        preset, parts = forks_preset(protocol)
        assert {"regimes", "drift", "map"} <= set(parts)
        assert set(protocol.experiments["forks"].arms) - {"radius", "upper", "eps", "two"} <= set(preset.arms)


def test_values_that_the_protocol_asks_for_and_that_are_missing_are_named(protocol):
    experiment = protocol.experiments["forks"]
    values = made_up_values(protocol)["forks"]
    extra = {**values, "other/confirmation": {"grpo": {"mean": [0.0]}}}
    assert measured(experiment, extra) == values
    del extra["noise/confirmation"]["grpo"]["right"]
    with pytest.raises(ValueError, match="no right of grpo at noise/confirmation"):
        measured(experiment, extra)


def test_seeds_of_the_runs_are_those_of_the_protocol(protocol, tmp_path):
    forks = protocol.experiments["forks"]
    places = {place: replace(has, report_seed=77_000) for place, has in forks.places.items()}
    forks = replace(forks, places=places)
    other = replace(protocol, experiments={**protocol.experiments, "forks": forks})
    with pytest.raises(ValueError, match=r"registers the first seeds \(77000, .* must agree"):
        EXPERIMENTS["forks"](other, tmp_path, 1, lambda _: None)


def test_exploratory_differences_hold_alone_and_a_diverged_run_is_no_number(protocol):
    values = made_up_values(protocol)
    row = values["transformers"]["detours/confirmation"]["no-clip"]
    row["entropy"][0] = math.nan
    found = explored(protocol, values, {})["transformers"]["detours/confirmation"]
    upper = values["transformers"]["detours/confirmation"]["bandpo-kl-upper"]["mean"]
    base = values["transformers"]["detours/confirmation"]["grpo"]["mean"]
    expected = t_interval(np.subtract(upper, base).tolist())  # Student's, of one comparison
    assert found["bandpo-kl-upper - grpo"]["mean"][:3] == pytest.approx(list(expected))
    assert found["no-clip - grpo"]["entropy"] == [None, None, None, "undecided"]
    assert "bandpo-kl-upper - bandpo-kl-lower" in found


def test_the_page_counts_what_the_claims_say(tool, evidence):
    page = {p.name: text for p, text in tool.pages(tool.compact(evidence)).items()}
    claims, data = page["evidence.md"], page["evidence-data.md"]
    primary = [claim for claim in evidence["judged"] if claim["kind"] == "primary"]
    for claim in primary:
        assert f"{claim['text']} ({claim['source']}) | **{claim['verdict']}**" in claims
        for x in claim["contrasts"]:
            if x["verdict"] != "not measured":
                assert f"{x['value']:+.3f} [{x['low']:+.3f}, {x['high']:+.3f}]" in data
    ours = Counter(x["sense"] for claim in primary if claim["source"] == "ours" for x in claim["contrasts"])
    assert f"ours ({sum(c['source'] == 'ours' for c in primary)}): {ours['holds']} as claimed" in claims.replace(
        "\n", " "
    )
    assert not re.search(INTERVAL, claims) and re.search(INTERVAL, data)
    assert "Preset `smoke`" in claims  # few runs say so themselves


@pytest.mark.parametrize("part", ["forks", "transformers"])
def test_the_pages_of_one_experiment_alone(tool, protocol, part, monkeypatch):
    monkeypatch.setattr(study_module, "EXPERIMENTS", made_up(made_up_values(protocol)))
    found = study(restricted(protocol, [part]), Path("nowhere"), 1, lambda _: None)
    page, data = tool.pages(tool.compact(json.loads(json.dumps(found)))).values()
    assert ("## Transformers" in page) == (part == "transformers") and f"### {part}: " in data


def test_what_was_not_run_is_named(tool):
    quick = read("quick")
    data = {"preset": "quick", "means": made_up_values(quick)}
    assert set(tool.missing_sentences(data).values()) == {"Everything that is registered was run."}
    data["means"] = made_up_values(restricted(quick, ["forks"], ["bandpo-kl"]))
    del data["means"]["transformers"], data["means"]["forks"]["noise/confirmation"]
    places, arms = tool.missing(data)
    assert places == ["`forks/noise/confirmation`", "`transformers/detours/confirmation`"]
    assert arms == ["`clip-higher`", "`bandpo-kl-upper`", "`bandpo-kl-lower`", "`no-clip`"]
    assert "2 places and 4 arms of it were not run yet" in tool.missing_sentences(data)["missing"]


def test_a_decided_difference_moves_the_sentence_on_the_halves(tool, evidence):
    def said(verdict, value):
        changed = json.loads(json.dumps(evidence))
        changed["explored"]["forks"]["diversity/confirmation"]["bandpo-kl-upper - grpo"]["passed"] = [
            value,
            value,
            value,
            verdict,
        ]
        changed["explored"]["transformers"] = {}
        lines = tool.halves_sentences(changed).splitlines()
        return next(line for line in lines if line.startswith("* **Upper half**"))

    assert "pass@16 is higher in 1 and lower in 0 of 1 places (diversity +0.300)" in said("better", 0.3)
    assert "pass@16 is higher in 0 and lower in 1 of 1 places (diversity -0.300)" in said("worse", -0.3)
    assert "pass@16 is higher in 0 and lower in 0 of 1 places;" in said("undecided", -0.3)


def test_both_measures_of_the_bottleneck_are_side_by_side(tool, evidence):
    changed = json.loads(json.dumps(evidence))
    pairs = changed["explored"]["forks"]["moves/diversity"]
    for measure, row in (("moved_up", [0.1, 0.05, 0.15, "better"]), ("beyond_up", [-0.1, -0.15, -0.05, "worse"])):
        pairs["bandpo-kl - grpo"][measure] = row
    words = tool.moved(changed)
    means = changed["means"]["forks"]["moves/diversity"]
    numbers = [
        f"{means[arm][m][0]:{form}}"
        for m, form in (("moved_up", "+.3f"), ("beyond_up", ".3f"))
        for arm in ("grpo", "bandpo-kl")
    ]
    assert f"| diversity | {numbers[0]} | {numbers[1]} | better | {numbers[2]} | {numbers[3]} | worse |" in words
    assert "The two say the opposite of each other in diversity." in words
    pairs["bandpo-kl - grpo"]["beyond_up"] = [0.1, 0.05, 0.15, "better"]
    assert "the opposite of each other" not in tool.moved(changed)
    del changed["means"]["forks"]["moves/diversity"]
    assert "was not measured" in tool.moved(changed)


def test_the_page_says_whose_time_the_core_hours_are(tool, evidence):
    assert "Tuning counts, and warm-ups that were not in the cache." in tool.hours_sentence(evidence)
    with_parts = {**evidence, "transformers": {"core_parts": {"warm-up": 90.0, "updates": 1000.0}}}
    assert "in the cache (1.5 minutes)." in tool.hours_sentence(with_parts)


def test_what_a_claim_did_not_measure_is_not_counted(tool, evidence):
    found = {"source": "ours", "kind": "primary", "text": "T", "verdict": "not measured", "counts": {"not measured": 2}}
    assert tool.counted(found) == "–"
    found["counts"] = {"holds": 1, "opposite": 0, "not measured": 2}
    assert tool.counted(found) == "1 as claimed"
    missing = [claim for claim in evidence["judged"] if claim["counts"]["not measured"]]
    assert missing and all(x["verdict"] == "not measured" for x in missing[0]["contrasts"] if not x["pairs"])


def test_the_figures_are_pictures_with_colours_for_light_and_dark(evidence):
    for name, picture in draw(evidence).items():
        root = ElementTree.fromstring(picture)
        assert "prefers-color-scheme: dark" in picture and root.get("aria-label"), name
        left, _, width, height = map(float, root.get("viewBox").split())
        for element in root.iter():
            for key in ("x", "x1", "x2", "cx"):
                assert left <= float(element.get(key, 0)) <= width, (name, element.attrib)
            for key in ("y", "y1", "y2", "cy"):
                assert 0 <= float(element.get(key, 0)) <= height, (name, element.attrib)


def test_a_diverged_arm_has_a_word_in_place_of_a_dot(evidence):
    changed = json.loads(json.dumps(evidence))
    row = changed["explored"]["transformers"]["detours/confirmation"]["no-clip - grpo"]
    row["entropy"] = [None, None, None, "undecided"]
    assert draw(changed)["evidence-transformers"].count(">diverged<") == 1


def test_places_have_short_names():
    names = {
        "noisy/confirmation": "noisy",
        "noisy/adam": "noisy, first seeds",
        "noisy/sgd": "noisy, SGD",
        "moves/noisy": "noisy",
        "detours/lag16": "detours, lag 16",
        "detours/confirmation": "detours, lag 0",
        "detours/lag0": "detours, lag 0, first seeds",
        "traps/lag0": "traps, lag 0",
    }
    assert {place: place_title(place) for place in names} == names


def test_fresh_seeds_take_the_position_of_the_first_ones():
    first = {"detours/lag0": 1, "detours/lag4": 2, "traps/lag0": 3}
    assert list(latest(first)) == list(first)
    both = latest({**first, "detours/confirmation": 4})
    assert list(both.items()) == [("detours/confirmation", 4), ("detours/lag4", 2), ("traps/lag0", 3)]
    assert latest({"detours/confirmation": 4}) == {"detours/confirmation": 4}


# ---- the committed pages ----


@pytest.fixture(scope="module")
def committed(tool):
    return json.loads(tool.DATA.read_text())


def test_the_pages_are_what_the_data_give(tool, committed):
    """If it fails: `python tools/evidence.py`."""
    for path, text in tool.pages(committed).items():
        assert path.read_text() == text, path.name
    pictures = draw(committed)
    page = (ROOT / "docs" / "evidence.md").read_text()
    assert all(page.count(f"](assets/evidence/{name}.svg)") == 1 for name in pictures)
    assert {p.stem for p in tool.FIGURES.iterdir()} == set(pictures)
    for name, picture in pictures.items():
        assert (tool.FIGURES / f"{name}.svg").read_text() == picture, name
    assert tool.DATA.stat().st_size < tool.LARGEST


def test_the_page_is_two_screens_of_prose(tool):
    page = (ROOT / "docs" / "evidence.md").read_text()
    prose = [block for block in page.split("\n\n") if not block.startswith(("|", "#", "!", "```"))]
    words = sum(len(re.sub(r"\(https?://\S+\)", "", block).split()) for block in prose)
    assert words < 1100


def as_measured(protocol, values):
    """The protocol with the places and arms that there are values of."""
    experiments = {
        name: replace(
            experiment,
            places={
                place: replace(has, arms=tuple(arm for arm in has.arms if arm in values[name][place]))
                for place, has in experiment.places.items()
                if place in values.get(name, {})
            },
        )
        for name, experiment in protocol.experiments.items()
    }
    return replace(protocol, experiments=experiments)


def test_the_verdicts_follow_from_the_committed_values(committed):
    """Judged again, with what rounding to 5 digits may change."""
    protocol = read(committed["preset"])
    assert committed["protocol"] == {
        "sha256": protocol.sha256,
        "registered": protocol.registered,
        "amendments": list(protocol.amendments),
    }
    claims = tuple(claim for claim in protocol.claims if claim.kind == "primary")
    primary = replace(as_measured(protocol, committed["values"]), claims=claims)
    values = {
        name: {
            place: {
                arm: {m: [math.nan if x is None else x for x in row] for m, row in rows.items()}
                for arm, rows in arms.items()
            }
            for place, arms in places.items()
        }
        for name, places in committed["values"].items()
    }
    again = {claim.id: claim.as_json() for claim in judge(primary, values, committed["diverged"])}
    for claim in committed["judged"]:
        if claim["kind"] != "primary":
            continue
        found = again[claim["id"]]
        assert found["verdict"] == claim["verdict"] and found["counts"] == claim["counts"]
        for x, y in zip(found["contrasts"], claim["contrasts"], strict=True):
            assert x["verdict"] == y["verdict"]
            if x["value"] is not None:
                ends = [[c["value"], c["low"], c["high"]] for c in (x, y)]
                assert ends[0] == pytest.approx(ends[1], abs=2e-4)


def test_every_sense_has_a_colour_and_a_word(committed):
    senses = {x["sense"] for claim in committed["judged"] for x in claim["contrasts"]}
    assert senses <= {*SENSES, "not measured"}


def test_every_contrast_is_counted_by_whose_claim_it_is(tool, committed):
    """Also those that were not measured: the counts add up to the registered ones."""
    words = tool.outcome_sentence(committed)
    (total,) = map(int, re.findall(r"with (\d+) contrasts", words))
    counted = re.findall(r"(\d+) (?:as claimed|the opposite|no difference|undecided|not measured)", words)
    assert sum(map(int, counted)) == total


# ---- advice that rests on claims ----

MARK = re.compile(r"<!-- rests on: (.*?) -->")
ADVICE = [
    *((f"rule {rule.name}", claim, how) for rule in RULES.values() for claim, how in rule.rests_on.items()),
    *(
        (page.name, *pair.split(maxsplit=1))
        for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
        for found in MARK.findall(page.read_text())
        for pair in found.split("; ")
    ),
]
"""Where, the id of a claim, and how it came out (see `Rule.rests_on`), for each advice that names one."""

LIMITS = {
    "in part": r"\b(one|two|three|four|five|\d) of (two|three|four|five|six|seven|\d)\b|[Ww]here|some|not shown",
    "mixed": r"\b(one|two|three|four|five|\d) of (two|three|four|five|six|seven|\d)\b|[Ww]here|some",
    "opposite": r"\b(lower|less|worse|higher)\b",
    "no difference": r"no difference|as much as|equal",
    "open": r"not shown|not known|undecided",
}
"""Words of which a paragraph has one if it rests on a claim that came out so: it must not read as if the claim held."""


@pytest.mark.parametrize(("where", "claim", "how"), ADVICE)
def test_an_advice_names_what_the_evidence_says(where, claim, how, committed):
    """If a new run overturns it, the advice has to change."""
    claims = {found["id"]: found["counts"] for found in committed["judged"]}
    assert claim in claims, f"{where}: choose from {', '.join(claims)}"
    assert how == came_out(claims[claim]), f"{where}: {claim} {claims[claim]}"


def test_a_paragraph_that_rests_on_a_claim_is_as_strong_as_its_class():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for paragraph in re.split(r"\n\s*\n|\n\* ", page.read_text()):
            for pair in [pair for mark in MARK.findall(paragraph) for pair in mark.split("; ")]:
                claim, how = pair.split(maxsplit=1)
                words = " ".join(MARK.sub("", paragraph).split())
                assert re.search(LIMITS.get(how, ""), words), f"{page.name}, {claim} ({how}): {words}"


NUMBERS = dict(zip(("one", "two", "three", "four", "five", "six"), range(1, 7), strict=True))
OF = re.compile(rf"\b({'|'.join(NUMBERS)}) of ({'|'.join(NUMBERS)})\b")


def test_numbers_of_problems_beside_a_mark_are_those_of_the_claims(committed):
    claims = {found["id"]: found["counts"] for found in committed["judged"]}
    compared = 0
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for paragraph in re.split(r"\n\s*\n|\n\* ", page.read_text()):
            counts = [claims[pair.split()[0]] for mark in MARK.findall(paragraph) for pair in mark.split("; ")]
            totals = [sum(x.values()) - x["not measured"] for x in counts]
            known = {(x[how], n) for x, n in zip(counts, totals, strict=True) for how in ("holds", "opposite")}
            for few, all_ in OF.findall(" ".join(paragraph.split())) if counts else ():
                assert (NUMBERS[few], NUMBERS[all_]) in known, f"{page.name}: {few} of {all_}, {known}"
                compared += 1
    assert compared >= 5


def test_the_classes_of_advice_are_those_of_the_judge():
    counts = [
        dict(zip(("holds", "opposite", "equivalent", "undecided"), x, strict=True))
        for x in itertools.product(range(3), repeat=4)
    ]
    assert {came_out(x) for x in counts} == set(get_args(CameOut))
    for x in counts:
        assert (came_out(x) == "holds") == (verdict_of(x) == "holds")
        assert ("the opposite" in verdict_of(x)) == (came_out(x) in ("mixed", "opposite"))
