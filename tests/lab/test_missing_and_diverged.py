"""A comparison whose runs are missing or diverged says so, in its status and its tables."""

import dataclasses
import json
import math
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from bandpo import OBJECTIVES
from bandpo._system.progress import Progress
from bandpo.cli import main
from bandpo.lab.comparison.figures import plot_clip_maps, plot_curves, plot_forest
from bandpo.lab.comparison.loop import Loop, Run
from bandpo.lab.comparison.plan import PRESETS, jobs_of, report_arms, tuning_arms
from bandpo.lab.comparison.report import _forests
from bandpo.lab.comparison.study import Study, diverged
from bandpo.lab.comparison.summary import markdown, runs_of, summarise, write_tables
from bandpo.lab.comparison.terminal import show
from bandpo.metrics import PROB_BINS
from bandpo.statistics import compare, holm, interval, iqm

PLAN = dataclasses.replace(
    PRESETS["smoke"],
    objectives=("grpo", "bandpo-kl"),
    seeds=tuple(range(8)),
    tuning_seeds=1,
    ablations=False,
    updates=2,
)


def result(level, *, gone=False):
    bins = dict.fromkeys(PROB_BINS, 0.1)
    end = {
        "mean@4": 0.0 if gone else level,
        "pass@4": level,
        "entropy": math.nan if gone else 1.0,
        "groups with signal": 0.5,
    }
    before = {"mean@4": 0.2, "pass@4": 0.3, "entropy": 1.2, "groups with signal": 0.5}
    return {
        "reward": [level, level],
        "entropy": [1.0, math.nan if gone else 1.0],
        "clip": {"low": bins, "high": bins},
        "tokens": bins,
        "before": before,
        "after": end,
        "rewards": [[0.0, 1.0]],
        "samples": [["p", ["c"]]],
    }


def study_of(folder, plan=PLAN, missing=(), gone=()):
    """A study whose results lie there: `missing` and `gone` are (label, seed)."""
    study = Study(folder, say=lambda _: None)
    arms = [*report_arms(plan), *(a for n in (*plan.objectives, "no-clip") for a in tuning_arms(plan, n))]
    for arm in dict.fromkeys(arms):
        seeds = plan.seeds if arm.variant != "tuned" else [1000]
        for job in jobs_of(plan, "paths", [arm], [*seeds, *plan.seeds]):
            if (arm.label, job.seed) in missing:
                continue
            # exact in binary, so that differences are
            value = 0.25 + job.seed % 16 / 64 + (0.125 if arm.objective == "bandpo-kl" else 0.0)
            made = {"result": result(value, gone=(arm.label, job.seed) in gone), "seconds": 1.0}
            study._keep([job], [made], "x")
    return study


def test_what_is_missing_is_named_and_the_rest_is_compared_on_common_seeds(tmp_path):
    """Seed 3 of grpo and seed 5 of the band, all of no-clip: 6 pairs are left, each with the difference that was put in."""
    none = {("no-clip", s) for s in PLAN.seeds}
    study = study_of(tmp_path, missing={("grpo", 3), ("bandpo-kl", 5), *none})
    summary = summarise(study, PLAN)
    assert "paths: grpo, no result of seed 3" in summary["incomplete"]
    assert "paths: bandpo-kl, no result of seed 5" in summary["incomplete"]
    assert "paths: no-clip, no result of any seed" in summary["incomplete"]
    found = summary["tasks"]["paths"]
    difference = found["differences"]["mean@4"]["bandpo-kl"]
    assert difference["pairs"] == 6 and difference["mean"]["value"] == 0.125
    assert runs_of(found["table"]["grpo"]) == "7 of 8" and "no-clip" not in found["table"]
    assert summary["diverged"] == []
    text = write_tables(summary, tmp_path) and (tmp_path / "table.md").read_text()
    assert "| grpo | 7 of 8 |" in text
    again = json.loads((tmp_path / "summary.json").read_text())
    d = again["tasks"]["paths"]["differences"]["mean@4"]["bandpo-kl"]
    assert (d["pairs"], d["clusters"], d["mean"]) == (6, None, {"value": 0.125, "low": 0.125, "high": 0.125})


def test_a_run_that_diverged_is_a_result_and_no_mean_hides_it(tmp_path):
    study = study_of(tmp_path, gone={("bandpo-kl", 2)})
    summary = write_tables(summarise(study, PLAN), tmp_path)
    assert summary["incomplete"] == [] and summary["diverged"] == ["paths: bandpo-kl, seed 2"]
    row = summary["tasks"]["paths"]["table"]["bandpo-kl"]
    assert (row["runs"], row["diverged"]) == (8, 1)
    assert row["entropy"] == {"value": None, "low": None, "high": None}
    assert row["collapsed"]["value"] is not None
    assert summary["tasks"]["paths"]["values"]["bandpo-kl"]["collapsed"] == [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    line = next(x for x in markdown(summary).splitlines() if x.startswith("| bandpo-kl |"))
    assert "| 8, 1 diverged |" in line and "– [–, –]" in line
    task = summary["tasks"]["paths"]
    forest = plot_forest(task["differences"]["entropy"], "grpo", "entropy")
    for figure in (forest, plot_curves(task["curves"]), plot_clip_maps(task["clip"])):
        figure.canvas.draw()


def test_the_page_says_it_too(tmp_path):
    from bandpo.lab.comparison.report import write_report

    study = study_of(tmp_path, gone={("bandpo-kl", 2)}, missing={("grpo", 3)})
    summary = summarise(study, PLAN)
    plan = {"warm_ups": None, "seeds": [0], "exact_seeds": 0}
    about = {
        "command": "bandpo compare",
        "bandpo": "0",
        "torch": "0",
        "git": "",
        "plan": plan,
        "runs": 1,
        "core_minutes": 1,
    }
    summary = write_tables({**summary, "exact": {}, "sweeps": {}, "about": about}, tmp_path)
    page = write_report(tmp_path, summary).read_text()
    for words in ("7 of 8", "8, 1 diverged", "paths: bandpo-kl, seed 2", "paths: grpo, no result of seed 3"):
        assert words in page, words


def test_runs_that_share_warm_ups_count_as_many_as_there_are_warm_ups(tmp_path):
    """Against Student's interval of the means by warm-up, written out; seed 3 of grpo is missing."""
    own = dataclasses.replace(PLAN, seeds=tuple(range(8)))
    shared = dataclasses.replace(own, warm_ups=3)
    assert [shared.warm_up_of(s) for s in shared.seeds] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [own.warm_up_of(s) for s in own.seeds] == list(own.seeds)
    found = summarise(study_of(tmp_path, shared, missing={("grpo", 3)}), shared)["tasks"]["paths"]
    difference = found["differences"]["mean@4"]["bandpo-kl"]
    assert (difference["pairs"], difference["clusters"]) == (7, 3)
    means = [np.mean([0.25 + s / 64 for s in range(8) if s % 3 == c and s != 3]) for c in range(3)]
    half = 4.302652729911275 * np.std(means, ddof=1) / np.sqrt(3)  # the 97.5% quantile of t with 2 degrees of freedom
    row = found["table"]["grpo"]["mean@4"]
    assert (row["low"], row["high"]) == pytest.approx((np.mean(means) - half, np.mean(means) + half))
    with pytest.raises(ValueError, match="warm_ups: at least 1"):
        dataclasses.replace(PLAN, warm_ups=0)


def test_no_collapsed_run_of_eight_leaves_room_for_some(tmp_path):
    found = summarise(study_of(tmp_path), PLAN)["tasks"]["paths"]["table"]["grpo"]["collapsed"]
    assert (found["value"], found["low"]) == (0.0, 0.0) and found["high"] == pytest.approx(1 - 0.025 ** (1 / 8))


def test_tuning_does_not_choose_what_diverged_or_what_is_missing(tmp_path):
    study = Study(tmp_path, say=lambda _: None)
    first, second = tuning_arms(PLAN, "grpo")
    for arm, made in ((first, result(math.nan)), (second, result(0.25))):
        study._keep(jobs_of(PLAN, "paths", [arm], [1000]), [{"result": made, "seconds": 1.0}], "x")
    assert study.tuned(PLAN, "paths", "grpo") == second
    assert "paths: grpo tuned, 1 of 2 runs of its grid" in summarise(study, PLAN)["diverged"]
    assert "paths: bandpo-kl tuned, 2 of 2 runs of its grid" in summarise(study, PLAN)["incomplete"]


def test_a_run_whose_weights_are_no_numbers_is_told_and_its_neighbour_is_as_alone():
    setting = PLAN.setting_of("paths", warm_up_steps=1)
    runs = [Run(OBJECTIVES["grpo"], 1e-3, seed=seed) for seed in (0, 1)]
    stacked, alone = Loop(setting, runs), Loop(setting, runs[:1])
    with torch.no_grad():
        next(iter(stacked.stack.weights.values()))[1] = math.nan
    found = [dataclasses.asdict(r) for r in stacked.train()]
    assert [diverged(r) for r in found] == [False, True]
    assert found[0]["rewards"] == dataclasses.asdict(alone.train()[0])["rewards"]


def test_statistics_of_what_is_no_number():
    x = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    assert math.isnan(iqm([*x, math.nan])) and math.isnan(iqm([*x, math.inf])) and iqm(x) == pytest.approx(0.45)
    assert np.isnan(iqm(np.array([x, [*x[:-1], np.nan]]))).tolist() == [False, True]
    assert all(map(math.isnan, interval([*x, math.nan])))
    found = compare({"a": x, "b": [v + 1 for v in x], "c": [*x[:-1], math.nan]}, "a")
    assert math.isnan(found["c"].p) and math.isnan(found["c"].p_holm) and math.isnan(found["c"].mean.value)
    assert found["b"].p_holm == pytest.approx(2 * 2 / 2**8)  # corrected over both tests that were made
    assert holm([math.nan, 0.5, 0.01]) == pytest.approx([math.nan, 1.0, 0.03], nan_ok=True)


def test_a_killed_stack_is_said_and_the_status_is_not_zero(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bandpo.lab.comparison.study.run_stack", killed_for_one)
    small = dataclasses.replace(PLAN, seeds=(0, 1), tuning_seeds=0, exact_seeds=0, objectives=("grpo",))
    monkeypatch.setattr("bandpo.lab.comparison.command.PRESETS", {"smoke": small})
    assert main(["compare", "--preset", "smoke", "--jobs", "1", "--output_dir", "c"]) == 1
    said = capsys.readouterr().out
    assert "a process was killed by SIGKILL: its work is tried once more" in said
    assert "grpo and others failed (its process was killed by SIGKILL, 2 times; with fewer --jobs each" in said
    assert "they are made again arm by arm" in said
    assert "failed: paths, report, no-clip: its process was killed by SIGKILL, 2 times" in said
    assert "missing: paths: no-clip, no result of any seed" in said
    assert re.search(r"^grpo +2 ", said, re.MULTILINE)  # it was made
    assert "what is missing" in (Path("c") / "report.html").read_text().lower()
    assert "1 part is missing (named above, and in c/summary.json); the same command makes what is missing" in said


def killed_for_one(jobs):
    """A stack with no-clip in it is killed, every time."""
    if any(job.arm.objective == "no-clip" for job in jobs):
        os.kill(os.getpid(), signal.SIGKILL)
    return [{"result": result(0.25), "seconds": 0.1} for _ in jobs]


def test_the_terminal_has_a_table_that_fits(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    plan = dataclasses.replace(PLAN, objectives=("grpo", "bandpo-kl", "own_objective:MINE"))
    summary = write_tables(summarise(study_of(tmp_path, plan), plan), tmp_path)
    show({**summary, "exact": {}, "sweeps": {}}, Progress())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    head = next(line for line in lines if line.startswith("arm "))
    assert head.split() == ["arm", "runs", "mean@4", "less", "grpo", "p", "pass@4", "entropy", "speed"]
    [row] = [line for line in lines if line.startswith("bandpo-kl  ")]
    assert "+0.125 " in row
    assert any(line.startswith("own_objective:MINE  ") for line in lines)


def test_few_arms_are_one_forest_and_what_has_no_number_is_none():
    d = {"mean": {"value": 0.1, "low": 0.0, "high": 0.2}, "p_holm": 0.01}
    nothing = {"mean": {"value": None, "low": None, "high": None}, "p_holm": None}
    few = {m: {"a": d, "b": nothing} for m in ("mean@4", "pass@4", "entropy")}
    [one] = _forests("paths", few, "grpo", "against grpo")
    assert one.title == "mean@4, pass@4, entropy, against grpo" and len(one.figure.axes) == 4
    one.figure.canvas.draw()
    assert list(_forests("paths", {"mean@4": {"a": nothing}, "pass@4": {}}, "grpo", "against grpo")) == []
    many = {m: {str(i): d for i in range(7)} for m in ("mean@4", "pass@4")}
    assert [p.title for p in _forests("t", many, "grpo", "against grpo")] == [
        "mean@4, against grpo",
        "pass@4, against grpo",
    ]
