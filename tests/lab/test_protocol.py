"""The registered protocol: the reader refuses what it does not know, and no data of tuning can enter the report."""

import re
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from bandpo.lab.comparison.problems import PROBLEMS
from bandpo.lab.evidence.protocol import FILE, Protocol, read
from bandpo.lab.evidence.transformers import CONFIRMED, plan_of
from bandpo.lab.forks import plan as forks_plan
from bandpo.lab.forks.regimes import ARMS, REGIMES
from bandpo.statistics import pairs_needed, smallest_detectable

PRESETS = ("full", "quick", "smoke")


def changed(tmp_path: Path, change: Any) -> Protocol:
    content = yaml.safe_load(FILE.read_text())
    change(content)
    path = tmp_path / "protocol.yaml"
    path.write_text(yaml.safe_dump(content))
    return read("full", path)


def test_the_registered_protocol_is_read_and_its_claims_are_complete() -> None:
    protocol = read()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", protocol.registered) and len(protocol.sha256) == 64
    primary = [claim for claim in protocol.claims if claim.kind == "primary"]
    assert len(primary) == 12 and sum(claim.source == "arXiv:2603.04918" for claim in primary) == 7
    assert all(claim.contrasts for claim in protocol.claims)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_arms_and_places_are_those_of_the_experiments(preset: str) -> None:
    forks = read(preset).experiments["forks"]
    for name, place in forks.places.items():
        regime = name.partition("/")[2] if name.startswith(("moves/", "width/")) else name.partition("/")[0]
        assert regime in REGIMES
        assert set(place.arms) <= (set(ARMS) if not name.startswith("width/") else {"radius", "upper", "eps", "two"})
        assert len(place.arms) > 1


@pytest.mark.parametrize("preset", PRESETS)
def test_no_seed_of_tuning_is_one_of_the_report(preset: str) -> None:
    for experiment in read(preset).experiments.values():
        tuning = range(experiment.tuning_seed, experiment.tuning_seed + experiment.tuning_seeds)
        for place in (experiment, *experiment.places.values()):
            assert not set(range(place.report_seed, place.report_seed + place.seeds)) & set(tuning)


def test_no_seed_of_the_confirmation_had_been_seen() -> None:
    experiments = read().experiments
    places = experiments["forks"].places
    fresh = {place: has for place, has in places.items() if place.endswith("/confirmation")}
    blocks = {
        place: set(range(has.report_seed, has.report_seed + -(-has.seeds // 64))) for place, has in places.items()
    }
    seen = set().union(*(found for place, found in blocks.items() if place not in fresh))
    assert fresh and not any(blocks[place] & seen for place in fresh)
    judged = {x.place for claim in read().claims if claim.kind == "primary" for x in claim.contrasts}
    assert not judged & {place for place in places if place.endswith("/adam")}, "these had been seen"
    seeds = {
        p: set(range(x.report_seed, x.report_seed + x.seeds)) for p, x in experiments["transformers"].places.items()
    }
    for place, first in CONFIRMED.items():
        assert not seeds[place] & set().union(*(found for p, found in seeds.items() if p not in CONFIRMED))
        assert place in judged and first not in judged, "its seeds had been seen"


def test_presets_only_leave_out() -> None:
    full = read()
    for preset in PRESETS[1:]:
        protocol = read(preset)
        assert protocol.claims == full.claims and protocol.sha256 == full.sha256
        for name, experiment in protocol.experiments.items():
            assert set(experiment.places) <= set(full.experiments[name].places)
            assert experiment.seeds <= full.experiments[name].seeds
            for place, found in experiment.places.items():
                assert set(found.arms) <= set(full.experiments[name].places[place].arms)
                assert found.measures == full.experiments[name].places[place].measures


def test_the_power_calculations_are_those_of_the_numbers_beside_them() -> None:
    protocol = read()
    for row in protocol.calculations:
        smallest = protocol.measures[row.measure].smallest
        contrasts = [x for claim in protocol.claims if claim.kind == "primary" for x in claim.contrasts]
        judged = {x.place for x in contrasts if (x.experiment, x.measure) == (row.experiment, row.measure)}
        confirmed = [place for place in judged if place.endswith("/confirmation")]
        assert judged - set(confirmed) <= {"detours/lag16"}  # one contrast of 24 seeds, as its amendment tells
        (seeds,) = {protocol.experiments[row.experiment].places[place].seeds for place in confirmed}
        assert row.needed == pairs_needed(row.deviation, smallest, row.comparisons, power=protocol.power)
        assert row.detectable == pytest.approx(
            smallest_detectable(seeds, row.deviation, row.comparisons, power=protocol.power), abs=6e-5
        )
        sizes = [
            len(claim.contrasts)
            for claim in protocol.claims
            if claim.kind == "primary"
            and any((c.experiment, c.measure) == (row.experiment, row.measure) for c in claim.contrasts)
        ]
        assert row.comparisons == max(sizes)


REFUSED = {
    "a key": (lambda c: c.update(alpha=0.05), "got 'alpha'"),
    "a missing key": (lambda c: c.pop("power"), "power is missing"),
    "a power above 1": (lambda c: c.update(power=5), "above 0 and below 1"),
    "a power of 1": (lambda c: c.update(power=1.0), "above 0 and below 1"),
    "a word for the day": (lambda c: c.update(registered="soon"), "give a day as YYYY-MM-DD"),
    "another level": (lambda c: c.update(level=0.9), "level: got 0.9"),
    "an arm": (
        lambda c: c["claims"][0]["contrasts"][0].update(first="bandpo-kl-uper"),
        "did you mean 'bandpo-kl-upper'",
    ),
    "a place": (
        lambda c: c["claims"][0]["contrasts"][0].update(places=["diversty/adam"]),
        "did you mean 'diversity/adam'",
    ),
    "a measure": (lambda c: c["claims"][0]["contrasts"][0].update(measure="pased"), "did you mean 'passed'"),
    "a measure that the place has not": (
        lambda c: c["claims"][0]["contrasts"][0].update(measure="moved_up"),
        "got 'moved_up'",
    ),
    "a direction": (lambda c: c["claims"][0]["contrasts"][0].update(claimed="bigger"), "got 'bigger'"),
    "an arm against itself": (lambda c: c["claims"][0]["contrasts"][0].update(first="grpo"), "both 'grpo'"),
    "a claim twice": (lambda c: c["claims"].append(c["claims"][0]), "upper-passed is there twice"),
    "an experiment": (lambda c: c["claims"][0]["contrasts"][0].update(experiment="fork"), "did you mean 'forks'"),
    "seeds of tuning in the report": (lambda c: c["experiments"]["forks"].update(tuning_seed=30100), "overlap"),
    "seeds of tuning in a place": (lambda c: c["experiments"]["forks"].update(tuning_seed=40100), "overlap"),
    "too many seeds in a preset": (lambda c: c["presets"]["quick"]["forks"].update(seeds=500), "has 192 seeds"),
    "a place of a preset": (lambda c: c["presets"]["quick"]["forks"].update(places=["race/adm"]), "did you mean"),
    "an effect of 0": (lambda c: c["measures"]["mean"].update(smallest=0), "above 0"),
    "a range that is turned": (lambda c: c["measures"]["mean"].update(range=[1, 0]), "must be the smaller one"),
    "worst without a range": (lambda c: c["measures"]["moved_up"].update(missing="worst"), "needs a range"),
    "a text for a number": (lambda c: c["experiments"]["forks"].update(seeds="many"), "whole number"),
    "true for a number": (lambda c: c["experiments"]["forks"].update(seeds=True), "whole number"),
    "no baseline": (lambda c: c.update(baseline="gpo"), "did you mean 'grpo'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_reader_refuses(what: str, tmp_path: Path) -> None:
    change, message = REFUSED[what]
    with pytest.raises(ValueError, match=re.escape(message)):
        changed(tmp_path, change)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'quick'"):
        read("quik")


@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_of_the_forks_are_those_of_the_protocol(preset: str) -> None:
    protocol, plan = read(preset).experiments["forks"], forks_plan.PRESETS[preset]
    assert (protocol.report_seed, protocol.tuning_seed) == (forks_plan.REPORT_SEED, forks_plan.TUNING_SEED)
    assert (protocol.seeds, protocol.tuning_seeds) == (plan.seeds, plan.tuning_seeds)
    for name, place in protocol.places.items():
        first, _, second = name.partition("/")
        if first == "width":
            assert second in plan.width_regimes and place.seeds == plan.width_seeds
            continue
        if second == "confirmation":
            assert first in plan.confirmation_regimes and set(place.arms) <= set(plan.confirmation_arms)
            assert (place.seeds, place.report_seed) == (plan.confirmation_seeds, forks_plan.CONFIRMATION_SEED)
            continue
        regime, optimizer = (second, "adam") if first == "moves" else (first, second)
        assert regime in plan.regimes and optimizer in plan.optimizers and place.seeds == plan.seeds
        assert set(place.arms) <= set(plan.arms)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_runs_of_the_transformers_are_those_of_the_protocol(preset: str) -> None:
    protocol = read(preset)
    found = protocol.experiments["transformers"]
    plan = plan_of(protocol)
    assert set(plan.places) == set(found.places) and set(plan.arms) == set(found.arms)
    for place, arms in found.places.items():
        for arm in arms.arms:
            report = plan.jobs(place, arm, 1e-3, plan.seeds_of(place))
            assert [job.seed for job in report] == list(range(arms.report_seed, arms.report_seed + arms.seeds))
            tuning = plan.tuning_jobs(place, arm, 1e-3)
            # Neither a seed, nor a warm-up, nor a set of prompts is in both.
            assert not {job.seed for job in report} & {job.seed for job in tuning}
            assert {job.setting.split for job in report} == {"report"} and {job.setting.split for job in tuning} == {
                "tuning"
            }


@pytest.mark.parametrize("task", ["detours", "traps"])
def test_the_prompts_of_tuning_and_of_the_report_have_none_in_common(task: str) -> None:
    problem = PROBLEMS[task]()
    tuning = problem.for_tuning()
    sets = [
        set(map(tuple, cast("list[list[int]]", x.tolist())))
        for x in (problem.prompts, problem.held_out, tuning.prompts, tuning.held_out)
    ]
    assert all(sets) and sum(map(len, sets)) == len(set.union(*sets))
