"""`bandpo compare`: the protocol's parts, and the smoke preset end to end."""

import contextlib
import csv
import dataclasses
import json
import math
import pickle
import re
import subprocess
import sys

import pytest

from bandpo import DCPO, KL, OBJECTIVES, TV, Band, Clip
from bandpo.cli import main
from bandpo.lab.backends import BACKENDS
from bandpo.lab.comparison import study as study_module
from bandpo.lab.comparison.clock import REST, Clock
from bandpo.lab.comparison.plan import (
    ABLATIONS,
    PRESETS,
    Arm,
    Job,
    Plan,
    describe,
    jobs_of,
    matched,
    report_arms,
    robust_jobs,
    scaled,
    tuning_arms,
)
from bandpo.lab.comparison.problems import DESCRIPTIONS, PROBLEMS
from bandpo.lab.comparison.study import Study, run_stack
from bandpo.lab.comparison.summary import summarise


def test_widths_scale_epsilon_or_delta_and_leave_the_rest():
    assert scaled(OBJECTIVES["bandpo-kl"], 0.5).bounds == Band(KL, 0.025)
    assert scaled(OBJECTIVES["dapo"], 2.0).bounds == Clip(0.4, 0.56)
    assert scaled(OBJECTIVES["grpo"], 8.0).bounds == Clip(1.0, 1.6)
    assert scaled(OBJECTIVES["dcpo"], 0.5).bounds == DCPO(0.08, 0.1)
    assert scaled(OBJECTIVES["no-clip"], 0.5) == OBJECTIVES["no-clip"]


def test_matched_radii_have_ppo_s_upper_bound_at_one_half():
    import torch

    half = torch.tensor([0.5], dtype=torch.float64).log()
    for name in ("bandpo-kl", "bandpo-tv", "bandpo-chi2", "dppo-kl"):
        objective = matched(OBJECTIVES[name])
        assert objective.bounds(half).upper.item() == pytest.approx(1.2, rel=1e-9)
    assert matched(OBJECTIVES["bandpo-tv"]).bounds.radius == pytest.approx(0.1)
    assert matched(OBJECTIVES["bandpo-tv"]).bounds.divergence is TV


def test_arms_of_the_report_and_equal_budgets_of_the_tuning():
    plan = Plan()
    labels = [a.label for a in report_arms(plan)]
    assert {"no-clip", "bandpo-kl upper", "bandpo-kl lower", "bandpo-kl matched", "dppo-kl matched"} <= set(labels)
    assert len(labels) == len(set(labels))
    assert {len(set(tuning_arms(plan, name))) for name in plan.objectives} == {6}
    assert [a.rate for a in tuning_arms(plan, "no-clip")] == [0.5, 0.758, 1.149, 1.741, 2.639, 4.0]
    assert set(ABLATIONS) == {a.variant for a in report_arms(plan)} - {"default", "matched"}
    assert "bandpo-kl relax" not in [a.label for a in report_arms(dataclasses.replace(plan, ablations=False))]
    upper, lower = (Arm("bandpo-kl", side).build().bounds for side in ("upper", "lower"))
    assert (upper.lower, upper.upper) == (Clip(0.2), Band(KL, 0.05))
    assert (lower.lower, lower.upper) == (Band(KL, 0.05), Clip(0.2))
    no_clip = dataclasses.replace(plan, objectives=("grpo",))
    assert "no-clip" in [a.label for a in report_arms(no_clip)]


def test_jobs_are_paired_and_their_keys_say_what_they_are():
    plan = Plan()
    a, b = (jobs_of(plan, "paths", [Arm(n)], plan.seeds) for n in ("grpo", "bandpo-kl"))
    assert [(j.seed, j.warm_up) for j in a] == [(j.seed, j.warm_up) for j in b]
    assert {j.warm_up for j in a} == set(plan.seeds)  # every seed has its own
    assert len({j.key for j in a + b}) == 20
    assert a[0].key == jobs_of(plan, "paths", [Arm("grpo")], [0])[0].key
    assert a[0].key != jobs_of(plan, "paths", [Arm("grpo")], [0], lag=1)[0].key


def test_a_task_has_its_own_size_and_only_some_have_maps():
    full = PRESETS["full"]
    assert (full.setting_of("paths").prompts, full.setting_of("addition").prompts) == (64, 32)
    assert full.setting_of("countdown", lag=2).lag == 2
    assert robust_jobs(full, "paths") == {}
    cells = robust_jobs(full, "addition")
    assert len(cells) == 10 * 3 * 3
    assert {len(jobs) for jobs in cells.values()} == {2}
    with pytest.raises(ValueError, match="do not split into 7 mini-batches"):
        dataclasses.replace(full, sizes={"addition": {"minibatches": 7}})


def test_tuning_takes_the_best_on_the_tuning_seeds(tmp_path):
    plan, study = PRESETS["smoke"], Study(tmp_path)
    arms = tuning_arms(plan, "grpo")
    assert study.tuned(plan, "paths", "grpo") is None
    for arm, value in zip(arms, (0.3, 0.6), strict=True):
        for job in jobs_of(plan, "paths", [arm], [1000]):
            (tmp_path / "runs" / f"{job.key}.json").write_text(
                json.dumps({"result": {"after": {"mean@4": value}}, "seconds": 1.0})
            )
    assert study.tuned(plan, "paths", "grpo") == arms[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_failure_stays_where_it_happened_and_backends_agree(tmp_path, backend):
    plan = dataclasses.replace(PRESETS["smoke"], updates=1)
    study = Study(tmp_path, workers=1, say=lambda _: None, backend=backend)
    bad = jobs_of(plan, "paths", [Arm("grpo", width=-1.0)], [0])
    good = jobs_of(plan, "paths", [Arm("grpo")], [0], epochs=1)
    study.run([*bad, *good], "both")
    assert study.result(bad[0]) is None
    assert len(study.failures) == 1 and "-0.2" in study.failures[0]
    assert "-0.2" in (tmp_path / "runs" / f"{bad[0].key}.error").read_text()
    [alone] = run_stack(good)
    assert study.result(good[0]) == json.loads(json.dumps(alone["result"]))
    assert 0 < study.core_seconds(good) < 600
    study.run(good, "again")  # nothing is missing, so nothing is started


@pytest.mark.slow
def test_smoke_preset_end_to_end_and_again(tmp_path):
    command = [sys.executable, "-m", "bandpo", "compare", "--preset", "smoke", "--output", str(tmp_path / "out")]
    first = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert first.returncode == 0, first.stderr
    assert "paths, report: 36 runs, 36 to make" in first.stdout
    folder = tmp_path / "out"
    summary = json.loads((folder / "summary.json").read_text())
    times = json.loads((folder / "time.json").read_text())
    assert sum(times["seconds"].values()) == pytest.approx(times["total"])
    assert 0 <= times["seconds"]["rest"] < 0.2 * times["total"]
    assert set(times["core seconds of the runs"]) == {"warm-up", "evaluation", "rollouts", "updates", "rest"}
    assert summary["failures"] == summary["incomplete"] == []
    found = summary["tasks"]["paths"]
    assert set(found["table"]) == {
        "grpo",
        "bandpo-kl",
        "no-clip",
        "bandpo-kl matched",
        "bandpo-kl upper",
        "bandpo-kl lower",
        "grpo tuned",
        "bandpo-kl tuned",
        "no-clip tuned",
    }
    for row in found["table"].values():
        assert row["mean@4"]["low"] <= row["mean@4"]["value"] <= row["mean@4"]["high"]
    for difference in found["differences"]["mean@4"].values():
        assert 0 < difference["p"] <= difference["p_holm"] <= 1
        assert difference["pairs"] == 4
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert len(rows) == 9 and math.isfinite(float(rows[0]["mean@4"]))
    assert set(summary["exact"]) == {"grpo", "bandpo-kl", "no-clip"}
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == page.count("<figure>") == 5  # exact, curves, a forest of arms, one of parts, clip map
    assert page.count("<figcaption") == 5
    assert "<script" not in page and not re.search(r'(src|href)="http', page)
    assert "bandpo compare" in page or "compare --preset smoke" in page
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert "36 runs, 0 to make" in again.stdout
    assert json.loads((folder / "summary.json").read_text()) == summary


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--objectives", "grpo,foo"], "'foo' is unknown"),
        (["--objectives", "grop"], "'grop' is unknown: did you mean 'grpo'"),
        (["--tasks", "chess"], "--tasks: got 'chess'; choose one of paths"),
        (["--tasks", "path"], "--tasks: got 'path'; did you mean 'paths'"),
        (["--seeds", "x"], "write 0-9"),
        (["--seeds", "0-2000"], "from 0 to 999"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--updates", "0"], "updates must be at least 1"),
    ],
)
def test_mistakes_end_with_one_line(arguments, words, capsys, tmp_path):
    assert main(["compare", *arguments, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "word", "near"), [("--preset", "quik", "quick"), ("--backend", "process", "processes")]
)
def test_a_choice_that_is_unknown_names_the_nearest(option, word, near, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["compare", option, word])
    assert f"{word!r}; did you mean {near!r}?" in capsys.readouterr().err


def test_a_plan_can_be_pickled():
    plan = PRESETS["smoke"]
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan and describe(again) == describe(plan) and again.setting_of("paths") == plan.setting_of("paths")


def test_the_keys_of_results_stay_and_earlier_results_are_found():
    """Raise `_FORMAT` on purpose only: with another key, hours of runs are made again."""
    setting = PRESETS["quick"].setting_of("paths")
    keys = {name: Job(setting, Arm(name), 4e-4, 0, 0).key for name in ("grpo", "bandpo-kl", "cfpo")}
    assert keys == {
        "grpo": "3478400d10d1fc243619",
        "bandpo-kl": "331ede03489aed51d278",
        "cfpo": "c7accf62cc067db0f510",
    }


def test_the_parts_of_a_clock_add_up_to_the_time(monkeypatch):
    now = [10.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock()
    for name, seconds in (("a", 1.0), ("b", 2.0), ("a", 4.0)):
        now[0] += 0.5
        with clock.part(name):
            now[0] += seconds
    with contextlib.suppress(ZeroDivisionError), clock.part("b"):
        now[0] += 8.0
        raise ZeroDivisionError
    assert clock.parts() == {"a": 5.0, "b": 10.0, REST: 1.5}


def test_the_parts_of_a_run_add_up_to_its_seconds(tmp_path):
    plan = dataclasses.replace(PRESETS["smoke"], updates=2)
    jobs = jobs_of(plan, "paths", [Arm("grpo"), Arm("bandpo-kl")], [0, 1])
    rows = run_stack(jobs)
    for row in rows:
        assert set(row["parts"]) == {"warm-up", "evaluation", "rollouts", "updates", REST}
        assert sum(row["parts"].values()) == pytest.approx(row["seconds"])
        assert 0 <= row["parts"][REST] < 0.1 * row["seconds"] + 0.05  # another process may stop this one for a moment
    study = Study(tmp_path)
    study._keep(jobs, rows, "")
    found = study.core_parts([*jobs, jobs[0]])
    assert sum(found.values()) == pytest.approx(study.core_seconds(jobs)) == pytest.approx(4 * rows[0]["seconds"])
    path = tmp_path / "runs" / f"{jobs[0].key}.json"
    path.write_text(json.dumps({"result": rows[0]["result"], "seconds": 3.0}))  # as version 0.2 wrote it, without parts
    assert study.core_parts(jobs[:1]) == {"not recorded": 3.0}


def test_each_result_is_read_a_constant_number_of_times(tmp_path, monkeypatch):
    """The work after the runs is linear in their number: so many readings a run, whatever the number."""
    [row] = run_stack(jobs_of(dataclasses.replace(PRESETS["smoke"], updates=1), "paths", [Arm("grpo")], [0]))
    reads = []
    inner = study_module.read_checked_json
    monkeypatch.setattr(study_module, "read_checked_json", lambda path: reads.append(path.name) or inner(path))
    most = []
    for seeds in (3, 12):
        plan = dataclasses.replace(PRESETS["smoke"], seeds=tuple(range(seeds)), tuning_seeds=0)
        study = Study(tmp_path / str(seeds), say=lambda _: None)
        jobs = jobs_of(plan, "paths", report_arms(plan), plan.seeds)
        for job in jobs:
            study._keep([job], [row], "")
        reads.clear()
        study.run(jobs, "report")
        assert summarise(study, plan)["incomplete"] == []
        study.core_parts(jobs)
        assert set(reads) == {f"{job.key}.json" for job in jobs}
        most.append(max(map(reads.count, set(reads))))
    assert most == [3, 3]


@pytest.mark.parametrize("name", PROBLEMS)
def test_descriptions_are_those_of_the_problems(name):
    assert DESCRIPTIONS[name] == PROBLEMS[name]().description
