"""`bandpo report RUN`: a page from the files of a run, at any time, and whoever made the folder."""

import json
import os

import pytest
import yaml

from bandpo.cli import main
from bandpo.plots.curves import SPEED, Curves
from bandpo.plots.figures import drawn_interval, plot_bounds, training_panels
from bandpo.train.record import Parts, read_evaluation, read_record, shown_scores
from bandpo.train.report import evaluation_table, score_rows
from bandpo.zoo import OBJECTIVES
from run_folders import metrics_row, run_folder


def test_the_report_of_a_finished_run(tmp_path, capsys):
    folder = run_folder(tmp_path / "run", learning_rate=1e-3)
    (folder / "report.html").unlink(missing_ok=True)
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"report: {folder / 'report.html'}\n"
    page = (folder / "report.html").read_text()
    assert len(page) < 2_000_000
    assert "not finished" not in page
    assert page.count("<svg") == 5 + 2 and len(list((folder / "figures").glob("*.svg"))) == 7
    assert page.count("mean@2</td>") == 1 and "pass@1</td>" not in page  # the same number
    assert "pass@1 is the same number as mean@2" in page
    assert "<th><code>torch</code></th><td><code>2.13.0</code></td>" in page  # a table, no dictionary of Python
    assert "{'" not in page and "{&#39;" not in page
    for rule in ("inert", "clipping"):  # of the configuration, and of the log
        assert f"<strong>{rule}</strong>" in page
    assert page.index("<code>learning_rate</code>") < page.index("all 18 options")


def test_an_unfinished_run_says_where_it_is(tmp_path, capsys):
    folder = run_folder(tmp_path / "run", finished=False, steps=4)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')  # what a run that is being written looks like
    assert main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 0
    said = "this run is not finished: step 4 of 8 is the last in its log"
    assert said in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert said.capitalize() in page
    assert "0.500" in page and '<th class="number">after' not in page  # the first model's scores are known
    assert not (folder / "report.html").exists() and not (folder / "figures").exists()


def test_a_run_that_has_logged_nothing_yet(tmp_path, capsys):
    folder = run_folder(tmp_path / "run", finished=False)
    for name in ("metrics.jsonl", "timings.jsonl", "samples.jsonl"):
        (folder / name).write_text("")
    assert main(["report", str(folder)]) == 0
    assert "no step is logged yet" in capsys.readouterr().out
    (folder / "report.json").unlink()
    (folder / "timings.jsonl").unlink()
    (folder / "env.json").unlink()
    assert main(["report", str(folder)]) == 0


def test_a_resumed_run_is_not_finished_though_it_has_the_scores_of_its_earlier_end(tmp_path, capsys):
    folder = run_folder(tmp_path / "run", after=[(1.0, 1.0)] * 4)
    Parts("again").write(folder)  # as a session writes it when it begins
    assert main(["report", str(folder)]) == 0
    assert "not finished" in capsys.readouterr().out
    assert '<th class="number">after' not in (folder / "report.html").read_text()


def test_a_line_of_the_log_that_is_damaged_is_named_and_left_out(tmp_path):
    folder = run_folder(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([lines[0], '{"step": 4, "re', *lines[2:]]) + "\n")
    assert main(["report", str(folder)]) == 0
    assert (
        "1 lines of the log cannot be read and are left out, the first is line 2"
        in (folder / "report.html").read_text()
    )


def test_a_preference_run(tmp_path, capsys):
    folder = run_folder(tmp_path / "run", method="dpo", rounds=3, objective="dpo")
    rows = [{"step": i, "rewards/accuracies": 0.5, "rewards/chosen": 0.1, "rewards/rejected": 0.0} for i in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    Parts("dpo on countdown, seed 0", name="dpo").write(folder)
    assert main(["report", str(folder)]) == 0
    assert "round 2 of 3" in capsys.readouterr().out
    page = (folder / "report.html").read_text()
    assert "Rounds</h2>" in page and "The trust region" not in page


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("evaluation.json", '{"before": {"mean@2": "<b>"}, "after": {}}', "must map names of scores to numbers"),
        ("evaluation.json", "[1]", "must hold a JSON object"),
        ("evaluation.json", '{"before": {}, "after": {}, "prompts": "many"}', "prompts must be a number"),
        ("samples.jsonl", '{"stage": "before", "prompt": "a", "completions": "x", "rewards": [1]}\n', "line 1"),
        ("samples.jsonl", '{"stage": "other"}\n', "line 1"),
        ("report.json", '{"band": {"lower": [1], "upper": [1]}}', "a band has 1000"),
        ("report.json", '{"tokens": {"p": [1], "ratio": [], "clipped": []}}', "columns of different lengths"),
        ("report.json", '{"tokens": {"p": ["x"]}}', "finite numbers"),
        ("resumes.jsonl", '{"step": 3, "changed": [1]}\n', "line 1"),
        ("config.yaml", "!!python/object/apply:os.system [x]", "is not YAML"),
        ("config.resolved.yaml", "- 1", "must hold keys and values"),
    ],
)
def test_a_file_that_is_not_what_a_run_writes_is_refused_with_its_name(name, content, said, tmp_path, capsys):
    folder = run_folder(tmp_path / "run", finished=name != "samples.jsonl")
    (folder / name).write_text(content)
    assert main(["report", str(folder)]) == 2
    error = capsys.readouterr().err
    assert name in error and said in error and "Traceback" not in error


@pytest.mark.parametrize(
    "name", ["config.yaml", "env.json", "evaluation.json", "samples.jsonl", "metrics.jsonl", "report.json"]
)
def test_a_link_in_the_folder_is_not_followed(name, tmp_path, capsys):
    folder = run_folder(tmp_path / "run")
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert main(["report", str(folder)]) == 2
    assert "symbolic link" in capsys.readouterr().err


def test_a_pipe_in_the_folder_does_not_block(tmp_path, capsys):
    folder = run_folder(tmp_path / "run")
    (folder / "samples.jsonl").unlink()
    os.mkfifo(folder / "samples.jsonl")
    assert main(["report", str(folder)]) == 2
    assert "pipe" in capsys.readouterr().err


def test_nothing_that_a_file_names_is_imported(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath('ran').touch()\nobjective = reward = None\n")
    monkeypatch.chdir(tmp_path)
    folder = run_folder(tmp_path / "run", objective="evil:objective", reward=["evil:reward"], given=("reward",))
    assert main(["report", str(folder)]) == 0
    assert not (tmp_path / "ran").exists()
    assert "evil:objective" in (folder / "report.html").read_text()


def test_what_is_no_run_is_refused_with_what_was_expected(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("a: 1\n")
    assert main(["report", str(tmp_path)]) == 2
    assert "it has no config.resolved.yaml and no metrics.jsonl" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nope")]) == 2
    assert "no such folder" in capsys.readouterr().err
    folder = run_folder(tmp_path / "run")
    assert main(["report", str(folder), "--output", str(tmp_path)]) == 2
    assert main(["report", str(folder), "--output", str(tmp_path / "no" / "page.html")]) == 2


def test_scores_are_shown_once():
    same = {"mean@4": 0.25, "pass@1": 0.25, "pass@4": 0.5, "unscored": 0.0}
    other = {**same, "mean@4": 0.3}
    assert shown_scores(same, same) == ["mean@4", "pass@4", "unscored"]
    assert shown_scores(same, other) == list(same)  # rewards that are not 0 or 1
    evaluation = {"before": same, "after": {**same, "pass@4": None}, "prompts": 3}
    assert score_rows(evaluation) == [
        ("mean@4", "0.250", "0.250", "+0.000"), ("pass@4", "0.500", "–", "–"), ("unscored", "0", "0", "+0"),
    ]  # fmt: skip
    assert evaluation_table("t", evaluation).row_count == 3


@pytest.mark.parametrize("logging", [1, 2, 4, 8])
def test_the_speed_is_tokens_of_a_rollout_over_the_seconds_of_its_steps(logging):
    """A rollout of 1000 tokens is used for four steps: sampling takes 3 s in the first of them, each update 1 s."""
    rows = []
    for end in range(logging, 17, logging):
        steps = range(end - logging + 1, end + 1)
        seconds = sum(4.0 if step % 4 == 1 else 1.0 for step in steps) / logging
        rows.append({"step": end, "num_tokens": 1000.0 * (1 + (end - 1) // 4), "step_time": seconds})
    _, speeds = Curves(rows).curve(SPEED).points()
    assert speeds == pytest.approx([1000 / 7] * len(speeds)) and len(speeds) == 16 // max(4, logging)


def test_a_speed_needs_times_and_a_whole_rollout():
    rows = [{"step": i, "num_tokens": 100.0 * (1 + (i - 1) // 4), "step_time": 1.0} for i in range(1, 10)]
    assert Curves(rows).curve(SPEED).points() == ([4.0, 8.0], [25.0, 25.0])  # the third has one step of four so far
    bare = [row if i % 4 == 0 else {k: v for k, v in row.items() if k != "num_tokens"} for i, row in enumerate(rows)]
    assert Curves(bare).curve(SPEED).points() == ([4.0, 8.0], [25.0, 25.0])  # TRL names them only after a rollout
    assert Curves([{"step": 1, "num_tokens": 5.0}]).curve(SPEED).count == 0
    assert Curves([{"step": 1, "step_time": 5.0}]).curve(SPEED).count == 0
    again = [*rows, {"step": 4, "num_tokens": 100.0, "step_time": 1.0}]  # steps that go back
    assert Curves(again).curve(SPEED).count == 2


def test_times_are_joined_by_step(tmp_path):
    folder = run_folder(tmp_path / "run")
    (folder / "timings.jsonl").write_text(
        '{"step": 1, "step_time": 9.0}\n{"step": 4, "step_time": 2.5}\n{"step": 8, "train_runtime": 3}\n'
    )
    rows = list(read_record(folder).rows())
    assert [row.get("step_time") for row in rows] == [None, b"2.5", None, None]


def test_a_figure_without_a_point_is_left_out():
    rows = [{"step": 1, "reward": 0.5}]
    assert list(training_panels(rows)) == ["Reward"]
    full = training_panels([metrics_row(2, step_time=1.0), metrics_row(4, step_time=1.0)])
    assert list(full) == ["Reward", "Entropy", "Clipped gradient", "Completion length", "Speed"]


def test_a_drawn_interval_is_that_of_the_bounds():
    bounds = OBJECTIVES["bandpo-kl"].bounds
    ends = drawn_interval(bounds)
    assert ends is not None and len(ends.lower) == 1000
    for kept, own in zip(
        plot_bounds(ends, "x").axes[0].lines[:2], plot_bounds(bounds, "x").axes[0].lines[:2], strict=True
    ):
        assert kept.get_ydata() == pytest.approx(own.get_ydata(), rel=1e-5)
    assert drawn_interval(lambda logp: (logp * float("nan"), logp.exp())) is None
    assert drawn_interval(lambda logp: (logp - logp, logp.exp() + float("inf"))).upper == [1e6] * 1000


def test_parts_of_a_report_are_read_as_they_were_written(tmp_path):
    parts = Parts("t", finished=True, notes=["n"], told=["d"], band=drawn_interval(OBJECTIVES["grpo"].bounds), name="o",
                  tokens={"p": [0.5], "ratio": [1.25], "clipped": [1.0]})  # fmt: skip
    parts.write(tmp_path)
    assert Parts.read(tmp_path) == parts
    assert Parts.read(tmp_path / "nowhere") is None
    Parts("t", tokens={"p": [0.5, 0.5], "ratio": [float("inf"), 1.0], "clipped": [1.0, 0.0]}).write(tmp_path)
    assert Parts.read(tmp_path).tokens == {"p": [0.5], "ratio": [1.0], "clipped": [0.0]}  # a run that diverged


def test_figures_follow_light_and_dark(tmp_path):
    folder = run_folder(tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    for figure in (folder / "figures").glob("*.svg"):
        text = figure.read_text()
        assert (
            "@media(prefers-color-scheme:dark)" in text
            and "fill: #ffffff" not in text
            and "stroke: #000000" not in text
        )


def test_a_name_is_no_mathematics_of_a_figure(tmp_path):
    folder = run_folder(tmp_path / "run")
    Parts("t", finished=True, name="$\\frac{$ \x1b[2J").write(folder)
    assert main(["report", str(folder)]) == 0


def test_settings_have_those_of_the_user_first(tmp_path):
    folder = run_folder(tmp_path / "run")
    given = {"task": "countdown", "reward": ["a", "b"], "system_prompt": "x" * 5000, "bf16": False}
    (folder / "config.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "[&#34;a&#34;, &#34;b&#34;]" in page and "<code>false</code>" in page and "3,000 more characters" in page


def test_an_evaluation_that_is_not_there_yet(tmp_path):
    assert read_evaluation(tmp_path) is None
