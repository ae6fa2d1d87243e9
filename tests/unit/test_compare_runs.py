"""`bandpo compare RUN RUN ...`: what differs, who is grouped, and how scores are paired."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from bandpo.cli import main
from bandpo.plots.compared import MOST_DRAWN, compared_clips, compared_panels, thinned
from bandpo.plots.curves import Curves
from bandpo.train.record import Scores, read_record
from bandpo.train.run_groups import OTHER_METHOD, differing, grouped, warnings
from bandpo.train.run_scores import measures
from run_folders import metrics_row, run_folder


def scores(rewards, prompts=None):
    return Scores(tuple(prompts or map(str, range(len(rewards)))), np.array(rewards, dtype=float))


def student(values):
    """The mean with its t-interval, by scipy."""
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    return {"value": np.mean(values), "low": low, "high": high}


def compared(tmp_path, *folders, output="out"):
    return main(["compare", *map(str, folders), "--output", str(tmp_path / output)])


def test_two_objectives(tmp_path, capsys):
    better, worse = [(1.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.0, 0.0)], [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]
    a = run_folder(tmp_path / "a", after=better)
    b = run_folder(tmp_path / "b", after=worse, objective="grpo")
    assert compared(tmp_path, a, b) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[:-1])) <= 100
    assert "each has one seed" in out
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [g["label"] for g in found["groups"]] == ["bandpo-kl", "grpo"]
    assert {s["name"] for s in found["settings that differ"]} == {"objective"}
    row = found["evaluations"]["mean@2"]["grpo"]
    assert row["before"]["value"] == 0.5 and row["after"]["value"] == pytest.approx(0.25)
    assert row["change"]["value"] == pytest.approx(-0.25) and row["over"] == "4 prompts"
    low, high = stats.t.interval(0.95, 3, -0.375, stats.sem([-1.0, 0.0, -0.5, 0.0]))  # prompt by prompt
    assert row["difference"] == pytest.approx({"value": -0.375, "low": low, "high": high})
    assert row["paired"] == "paired over 4 prompts"
    assert found["evaluations"]["pass@2"]["grpo"]["after"]["value"] == 0.5
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        "One seed" not in page and "Who is clipped" in page and page.index("Settings that differ") < page.index("<svg")
    )
    assert not found["not read"] and not found["not finished"]


def test_seeds_are_grouped_and_the_interval_is_over_them(tmp_path):
    ends = {0: [(1, 1), (1, 0)], 1: [(1, 1), (1, 1)], 2: [(1, 0), (1, 0)]}
    a = [run_folder(tmp_path / f"a{s}", seed=s, after=x, prompts=("p", "q")) for s, x in ends.items()]
    other = {2: [(1, 1), (1, 0)], 0: [(1, 1), (1, 1)], 1: [(0, 0), (1, 1)]}
    b = [
        run_folder(tmp_path / f"b{s}", seed=s, objective="grpo", after=x, prompts=("p", "q")) for s, x in other.items()
    ]
    assert compared(tmp_path, *a, *b) == 0
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [[r["seed"] for r in g["runs"]] for g in found["groups"]] == [[0, 1, 2], [2, 0, 1]]
    assert found["not comparable"] == []
    row = found["evaluations"]["mean@2"]["bandpo-kl"]
    assert row["over"] == "3 seeds" and row["after"] == pytest.approx(student([0.75, 1.0, 0.5]))
    other = found["evaluations"]["mean@2"]["grpo"]
    assert other["paired"] == "paired over 3 seeds"
    assert other["difference"] == pytest.approx(student([0.25, 0.25, -0.5]))  # by seed, not by place


def test_a_second_run_with_a_seed_is_no_further_seed(tmp_path):
    folders = [run_folder(tmp_path / name, logging_steps=n) for name, n in (("a", 2), ("b", 4))]
    groups = grouped([read_record(folder) for folder in folders])
    assert [g.label for g in groups] == ["bandpo-kl (a)", "bandpo-kl (b)"] or [g.label for g in groups] == ["a", "b"]
    assert [(s.name, s.kind) for s in differing(groups)] == [("logging_steps", "no effect")]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"task": "chain_sum"}, "on different data (task)"),
        ({"reward": ["mine:score"]}, "different rewards (reward)"),
        ({"model": "other"}, "begin with different models (model)"),
        ({"eval_samples": 4}, "evaluated or sampled differently (eval_samples)"),
        ({"seed": 5}, "the groups have different seeds"),
    ],
)
def test_a_reader_is_told_why_scores_cannot_be_compared(changed, said, tmp_path, capsys):
    a = run_folder(tmp_path / "a", learning_rate=1e-3)
    b = run_folder(tmp_path / "b", **changed)
    assert compared(tmp_path, a, b) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert said in out
    assert said in " ".join((tmp_path / "out" / "report.html").read_text().split()).lower()


def test_options_that_a_method_does_not_have_are_no_difference_of_data(tmp_path):
    a, b = run_folder(tmp_path / "a", chat_template_kwargs=None), run_folder(tmp_path / "b", objective="grpo")
    groups = grouped([read_record(folder) for folder in (a, b)])
    found = {s.name: s.kind for s in differing(groups)}
    assert found == {"objective": "training", "chat_template_kwargs": OTHER_METHOD}
    assert not any("data" in line for line in warnings(groups, differing(groups), {}))


def test_unfinished_and_missing_runs_are_named(tmp_path, capsys):
    a, b = run_folder(tmp_path / "a"), run_folder(tmp_path / "b", objective="grpo", finished=False, steps=4)
    assert compared(tmp_path, a, b) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"{b}: this run is not finished: step 4 of 8" in out
    assert compared(tmp_path, a, b, tmp_path / "nope") == 1
    assert "cannot be read" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "nope: no such folder" in page and "step 4 of 8" in page
    row = json.loads((tmp_path / "out" / "comparison.json").read_text())["evaluations"]["mean@2"]["grpo"]
    assert row["before"]["value"] == 0.5 and row["after"]["value"] is None and row["difference"]["value"] is None
    (b / "samples.jsonl").write_text('{"stage": 3}\n')
    assert compared(tmp_path, a, b) == 1
    assert "nothing to compare" in capsys.readouterr().out


def test_mistakes_are_refused(tmp_path, capsys):
    a, b = run_folder(tmp_path / "a"), run_folder(tmp_path / "b")
    for arguments, said in (
        ([a], "is a single run"),
        ([a, tmp_path / "b" / ".." / "a"], "is named twice"),
        ([a, b, "--jobs", "3"], "--jobs belongs to the comparison of objectives"),
        ([a, b, "--objectives", "grpo"], "--objectives belongs to the comparison of objectives"),
        ([a, b, "--output", a], "is the folder of a run"),
    ):
        assert main(["compare", *map(str, arguments)]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "plan.json").write_text("{}")
    assert compared(tmp_path, a, b, output="lab") == 2


def test_prompts_are_paired_by_their_text_and_not_by_their_place():
    first = scores([[1, 1], [0, 0], [1, 0]], ["a", "b", "c"])
    second = scores([[1, 0], [0, 0], [1, 1], [1, 1]], ["c", "b", "a", "d"])
    found = measures({"x": [{"after": first}], "y": [{"after": second}]}, [[0], [0]])["mean@2"]
    assert found["y"].paired == "paired over 3 prompts" and found["y"].difference == (0.0, 0.0, 0.0)
    assert found["x"].difference is None and math.isnan(found["x"].before.value)
    apart = measures({"x": [{"after": first}], "y": [{"after": scores([[1, 1]], ["z"])}]}, [[0], [0]])["mean@2"]
    assert apart["y"].paired == "" and math.isnan(apart["y"].difference.value)


def test_samples_without_a_score_are_left_out():
    nan = math.nan
    one = scores([[1, nan], [nan, nan], [0, 1]])
    assert one.means() == pytest.approx([1.0, nan, 0.5], nan_ok=True)
    assert one.solved() == pytest.approx([nan, nan, 1.0], nan_ok=True)
    found = measures({"x": [{"before": one, "after": one}]}, [[0]])
    assert found["mean@2"]["x"].after.value == 0.75 and found["mean@2"]["x"].change.value == 0.0
    assert measures({"x": [{}]}, [[0]]) == {}


def test_another_number_of_samples_leaves_pass_at_k_out():
    a, b = scores([[1, 0]] * 3), scores([[1, 0, 0, 0]] * 3)
    found = measures({"x": [{"after": a}], "y": [{"after": b}]}, [[0], [0]])
    assert list(found) == ["mean@k"]
    assert found["mean@k"]["y"].difference.value == pytest.approx(-0.25)


def test_curves_of_many_rows_are_means_of_groups():
    x, y = thinned(list(range(10_000)), [float(i % 2) for i in range(10_000)])
    assert len(x) == MOST_DRAWN and y == pytest.approx([0.5] * MOST_DRAWN, abs=0.02)
    assert thinned([1.0], [2.0]) == ([1.0], [2.0])


def test_figures_have_the_metrics_that_some_run_has():
    runs = {"a": [Curves([metrics_row(2), metrics_row(4)]), Curves([metrics_row(2), metrics_row(4)])], "b": []}
    panels = compared_panels(runs, "optimiser step")
    assert {"Reward", "Entropy", "Clipped, A > 0", "Completion length"} <= set(
        panels
    ) and "KL to the reference" not in panels
    lines = panels["Reward"].axes[0].lines
    assert len(lines) == 3 and lines[2].get_linewidth() > lines[0].get_linewidth()  # two runs and their mean
    assert len(compared_clips(runs)) == 2 and compared_clips({"a": [Curves([{"step": 1, "reward": 1.0}])]}) == {}


def test_a_hostile_run_is_shown_as_text(tmp_path):
    attack = "<script>alert(1)</script>\x1b[2J$x^2$"
    a = run_folder(tmp_path / "a", objective=attack, system_prompt=attack)
    b = run_folder(tmp_path / "b")
    assert compared(tmp_path, a, b) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
