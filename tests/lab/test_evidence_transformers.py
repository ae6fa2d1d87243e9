"""The transformers of the evidence: tuning apart from the report, rates from a grid that grows, values by seed, resumption."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from bandpo import OBJECTIVES
from bandpo.lab.comparison.problems import PROBLEMS
from bandpo.lab.evidence import protocol, transformers
from bandpo.lab.evidence.transformers import (
    ARMS,
    CONFIRMED,
    Plan,
    change_at_the_end,
    plan_of,
    rates_of,
    run_plan,
    tune,
    values_of,
)

TINY = {
    "updates": 3,
    "prompts": 4,
    "group": 4,
    "epochs": 1,
    "minibatches": 2,
    "hidden_size": 16,
    "layers": 1,
    "eval_samples": 4,
    "warm_up_steps": 20,
}


def plan(**changes):
    base = Plan(("detours/lag0",), ("grpo", "bandpo-kl-upper"), (3000, 3001), (1000, 1001), (4e-4,), {}, TINY)
    return replace(base, **changes)


def result(reward=(0.1, 0.2), mean=0.3, passed=0.5, entropy=1.0, **changes):
    after = {"mean@16": mean, "pass@16": passed, "entropy of fork 1": entropy, "entropy": 0.2}
    before = {"mean@16": 0.1, "pass@16": 0.4}
    return {"reward": list(reward), "entropy": [0.2] * len(reward), "before": before, "after": after, **changes}


def test_arms_differ_in_the_trust_region_alone():
    shared = {(o.aggregation, o.advantage, o.anchor, o.kl_coef) for o in (arm.build() for arm in ARMS.values())}
    assert shared == {("seq-mean-token-mean", "std", "old", 0.0)}
    for name, arm in ARMS.items():
        zoo = OBJECTIVES["dapo" if name == "clip-higher" else name]
        assert (arm.build().bounds, arm.build().surrogate) == (zoo.bounds, zoo.surrogate)


@pytest.mark.parametrize("preset", ["full", "quick", "smoke"])
def test_a_protocol_is_a_plan_whose_tuning_shares_nothing_with_its_report(preset):
    registered = protocol.read(preset)
    found = plan_of(registered)
    experiment = registered.experiments["transformers"]
    assert (set(found.places), set(found.arms)) == (set(experiment.places), set(experiment.arms))
    assert len(found.seeds) == experiment.seeds and len(found.tuning_seeds) == experiment.tuning_seeds
    for place in found.places:
        seeds = found.seeds_of(place)
        report = [j for arm in found.arms for j in found.jobs(place, arm, 4e-4, seeds)]
        tuning = [j for arm in found.arms for j in found.tuning_jobs(place, arm, 4e-4)]
        for name in ("seed", "warm_up"):
            used, tuned = ({getattr(j, name) for j in jobs} for jobs in (report, tuning))
            assert not used & tuned and len(used) == experiment.places[place].seeds
        assert {j.setting.split for j in report} == {"report"} and {j.setting.split for j in tuning} == {"tuning"}
        problem = PROBLEMS[report[0].setting.problem]()
        other = problem.for_tuning()
        sets = [
            {tuple(k) for k in x.tolist()} for x in (problem.prompts, problem.held_out, other.prompts, other.held_out)
        ]
        assert not (sets[0] | sets[1]) & (sets[2] | sets[3])
        assert [j.seed for j in report[: len(seeds)]] == list(seeds)  # the same order in every arm: paired
        assert report[0].setting.lag == int(CONFIRMED.get(place, place).partition("/lag")[2])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"places": ("detours",)}, "write TASK/lagN"),
        ({"places": ("nowhere/lag0",)}, "nowhere"),
        ({"arms": ("grpo", "ppo")}, "'ppo' is unknown; choose from grpo"),
        ({"seeds": (999, 1000)}, r"seeds \[1000\] are in the report and in tuning"),
        ({"fresh": {"detours/lag0": (1001,)}}, r"seeds \[1001\] are in the report and in tuning"),
        ({"tuned_like": {"detours/lag0": "traps/lag0"}}, "takes the rates of traps/lag0, which is not tuned"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        plan(**changes)


class Faked:
    """A study whose speeds are a function of place, arm and rate."""

    failures = ()

    def __init__(self, speed):
        self.speed, self.asked = speed, []

    def run(self, jobs, what):
        self.asked += [(j.arm.objective, j.learning_rate, j.setting.split) for j in jobs]

    def result(self, job):
        value = self.speed(job.arm.objective, job.learning_rate)
        return result(reward=[value, value])


def test_the_grid_grows_until_the_best_rate_is_inside_for_every_arm_alike():
    best = {"grpo": 4e-4, "bandpo-kl-upper": 3.2e-3}
    study = Faked(lambda arm, rate: -abs(math.log(rate / best[arm])))
    wide = plan(rates=(2e-4, 4e-4, 8e-4))
    assert rates_of(wide, tune(wide, study)) == {"detours/lag0": best}
    tried = {arm: sorted({rate for a, rate, _ in study.asked if a == arm}) for arm in best}
    assert tried["grpo"] == pytest.approx([2e-4, 4e-4, 8e-4])
    assert tried["bandpo-kl-upper"] == pytest.approx([2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3])
    assert {split for _, _, split in study.asked} == {"tuning"}
    down = Faked(lambda arm, rate: -rate)
    assert rates_of(wide, tune(wide, down))["detours/lag0"]["grpo"] == pytest.approx(2e-4 / 2**5)  # five times at most


def test_a_rate_at_which_a_run_diverged_is_not_chosen_and_a_place_may_take_the_rates_of_another():
    study = Faked(lambda arm, rate: math.nan if rate > 3e-4 else rate)
    two = plan(
        places=("detours/lag0", "detours/lag4"), rates=(1e-4, 2e-4, 4e-4), tuned_like={"detours/lag4": "detours/lag0"}
    )
    rates = rates_of(two, tune(two, study))
    assert rates["detours/lag0"] == rates["detours/lag4"] == {"grpo": 2e-4, "bandpo-kl-upper": 2e-4}
    assert len(study.asked) == 2 * 2 * 3


def test_values_are_by_seed_and_a_run_that_diverged_is_nan_everywhere():
    found = values_of([result(mean=0.25), result(reward=(0.1, math.nan)), result(passed=0.75, entropy=2.0)])
    assert found["mean"][0] == 0.25 and found["passed"][2] == 0.75 and found["entropy"][2] == 2.0
    assert found["speed"][0] == pytest.approx(0.15)
    assert all(math.isnan(column[1]) for column in found.values())
    with pytest.raises(ValueError, match="run 1 has no numbers before its training: its warm-up is broken"):
        values_of([result(), result(before={"mean@16": math.nan})])


def test_the_change_at_the_end_is_that_of_a_line_over_the_last_third():
    assert change_at_the_end([5.0] * 40 + list(np.linspace(0.0, 0.19, 20))) == pytest.approx(0.2)
    assert change_at_the_end([0.3] * 60) == pytest.approx(0.0, abs=1e-12)


def test_runs_leave_files_are_found_again_and_give_the_same_values(tmp_path):
    said = []
    small = plan(places=("detours/lag0", "traps/lag0"))
    first = run_plan(small, tmp_path, 1, said.append)
    made = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()}
    again = run_plan(small, tmp_path, 1, said.append)
    assert again == first
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()} == made
    assert len(made) == 2 * (2 * 2 + 2)  # per place: 2 arms x 2 seeds, and the profile of 2 warm-ups
    (tmp_path / "runs" / next(iter(made))).unlink()
    assert run_plan(small, tmp_path, 1, said.append)["values"] == first["values"]
    for place in small.places:
        for arm in small.arms:
            assert {m: len(v) for m, v in first["values"][place][arm].items()} == dict.fromkeys(
                transformers.MEASURES, 2
            )
    summary = first["summary"]
    assert summary["rates"] == {place: dict.fromkeys(small.arms, 4e-4) for place in small.places}
    assert set(summary["profile"]["traps/lag0"]) >= {"near-certain", "rare", "rewarded", "punished", "mean", "passed"}
    assert set(summary["plateau"]["traps/lag0"]["grpo"]) == {"value", "low", "high", "reached"}
    assert len(summary["curves"]["traps/lag0"]["grpo"]["reward"]) == 3
    assert (
        first["values"]["traps/lag0/same-rate"] == first["values"]["traps/lag0"]
    )  # with one rate they are the same runs
    json.dumps(first, allow_nan=False)


def test_at_the_same_rate_every_arm_has_that_of_the_baseline(tmp_path, monkeypatch):
    rates = {"grpo": 4e-4, "bandpo-kl-upper": 8e-4}
    monkeypatch.setattr(transformers, "rates_of", lambda plan, speeds: dict.fromkeys(plan.places, rates))
    small = plan(seeds=(3000, 3001))
    values = run_plan(small, tmp_path, 1, lambda _: None)["values"]
    own, same = values["detours/lag0"], values["detours/lag0/same-rate"]
    assert own["grpo"] == same["grpo"]
    configs = [json.loads(p.read_text())["config"] for p in (tmp_path / "runs").iterdir()]
    made = {(c["arm"]["objective"], c["learning_rate"]) for c in configs if c["setting"]["split"] == "report"}
    assert made == {("grpo", 4e-4), ("bandpo-kl-upper", 8e-4), ("bandpo-kl-upper", 4e-4)}


def test_values_are_what_the_runs_have(tmp_path):
    small = plan()
    found = run_plan(small, tmp_path, 1, lambda _: None)
    for arm in small.arms:
        for at, job in enumerate(small.jobs("detours/lag0", arm, 4e-4, small.seeds)):
            kept = json.loads((tmp_path / "runs" / f"{job.key}.json").read_text())["result"]
            values = {m: v[at] for m, v in found["values"]["detours/lag0"][arm].items()}
            assert values == {
                "mean": kept["after"]["mean@4"],
                "passed": kept["after"]["pass@4"],
                "entropy": kept["after"]["entropy of fork 1"],
                "speed": pytest.approx(np.mean(kept["reward"])),
            }
