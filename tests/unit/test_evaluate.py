"""`bandpo evaluate`: several models side by side, what is refused before sampling, and what is written where."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml

from bandpo.cli import main

REWARDS = """
def half(completions, **_):
    return [0.25 if len(c) % 2 else 0.75 for c in completions]
def voted(completions, **_):
    return [float(len(c) % 2) for c in completions]
voted.answer_of = lambda text: str(len(text)) if text else None
"""
SETTINGS = {
    "task": "sums", "model": None, "method": "grpo", "eval_prompts": 8, "eval_samples": 4, "seed": 0, "temperature": 1.0,
    "top_p": 1.0, "max_completion_length": 4, "per_device_eval_batch_size": 64, "bf16": False,
}  # fmt: skip


def as_run(name, **changed):
    """The folder of a run as far as `bandpo evaluate` reads it."""
    Path(name, "model").mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in {**SETTINGS, **changed}.items() if v is not ...}
    Path(name, "config.resolved.yaml").write_text(yaml.safe_dump(settings))
    Path(name, "evaluation.json").write_text('{"before": {}}')


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models with random weights, each with the folder of its run, and data; tests work in this folder."""
    from bandpo.toy.models import WarmUp, build_model, build_tokenizer

    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.syspath_prepend(str(folder))
        (folder / "evaluate_rewards.py").write_text(REWARDS)
        tokenizer = build_tokenizer()
        for seed, name in enumerate(("runs/a", "runs/b")):
            as_run(name)
            build_model(WarmUp(hidden_size=16, layers=1, seed=seed), tokenizer).save_pretrained(f"{name}/model")
            tokenizer.save_pretrained(f"{name}/model")
        rows = [{"prompt": f"{i}+{i}:", "answer": str(2 * i)} for i in range(12)]
        Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        shutil.copytree("runs/b/model", "other")
        yield folder


@pytest.fixture(scope="module")
def compared(place):
    """What the comparison of two runs and a model of no run printed."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["evaluate", "runs/a", "runs/b", "other", "--plot", "found.svg", "--output", "found.json"]) == 0
    return out.getvalue()


def content(path):
    return json.loads(Path(path).read_text())


def refusal(capsys, *arguments):
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bandpo: ") and len(error.splitlines()) == 1
    return error


def test_the_table_has_every_model_and_fits(compared):
    table = [line for line in compared.splitlines() if re.match(r"(mean|pass|maj)@|  +[A-Zm]", line)]
    assert len(table) == 1 + 3 * 4  # mean@4, pass@2, pass@4, maj@4; pass@1 is mean@4 here
    assert all(len(line) <= 100 for line in table)
    assert [line.split()[0] for line in table[1::3]] == ["mean@4", "pass@2", "pass@4", "maj@4"]
    assert [line[10:].split()[:2] for line in table[1:4]] == [["A", "runs/a"], ["B", "runs/b"], ["C", "other"]]
    assert "3 models on 8 prompts of sums, held out; reward sums; 4 samples each at temperature 1" in compared
    assert "of differences paired by prompt" in compared
    assert "the result of other, a model of no run, is not written" not in compared  # --output does


def test_the_file_has_all_that_the_table_has(compared):
    found = content("found.json")
    assert [model["model"] for model in found["models"]] == ["runs/a/model", "runs/b/model", "other"]
    first, second, third = found["models"]
    for model in found["models"]:
        assert {"mean@4", "pass@1", "pass@2", "pass@4", "maj@4", "groups with signal", "unscored"} <= set(model)
        assert len(model["counts"]) == model["prompts"] == 8 and model["seed"] == 1234
        mean = sum(row["mean"] for row in model["counts"]) / 8
        assert model["measures"]["mean@4"]["value"] == pytest.approx(mean) == pytest.approx(model["mean@4"])
    assert second["measures"] == third["measures"]  # the same weights, the same seed
    assert [d["minus"] for d in found["differences"]] == ["runs/a/model"] * 2
    change = found["differences"][0]["measures"]["pass@4"]["value"]
    assert change == pytest.approx(second["pass@4"] - first["pass@4"], abs=1e-9)
    assert found["about"]["options"]["models"] == ["runs/a", "runs/b", "other"]


def test_results_are_beside_their_runs_and_a_repetition_replaces_its_own(compared):
    (path,) = Path("runs/a/evaluations").iterdir()
    assert re.fullmatch(r"model-sums-[0-9a-f]{8}\.json", path.name)
    assert not Path("other/evaluations").exists()
    assert content("runs/a/evaluation.json") == {"before": {}}
    before = content(path)
    path.write_text("{}")
    assert main(["evaluate", "runs/a"]) == 0
    assert content(path)["counts"] == before["counts"] and content(path)["measures"] == before["measures"]
    shutil.copytree("runs/a/model", "runs/a/checkpoint-3")
    assert main(["evaluate", "runs/a/checkpoint-3", "--temperature", "0.5", "--top_k", "3"]) == 0
    names = sorted(p.name for p in Path("runs/a/evaluations").iterdir())
    assert len(names) == 2 and names[0].startswith("checkpoint-3-sums-")
    assert (content(f"runs/a/evaluations/{names[0]}")["top_k"], len(os.listdir("runs/b/evaluations"))) == (3, 1)


@pytest.mark.parametrize("obstacle", ["file", "link"])
def test_a_result_that_cannot_be_written_is_printed_all_the_same(place, obstacle, capsys):
    as_run("closed")
    shutil.copytree("runs/a/model", "closed/model", dirs_exist_ok=True)
    Path("elsewhere").mkdir(exist_ok=True)
    target = Path("closed/evaluations")
    target.symlink_to(Path("elsewhere").resolve()) if obstacle == "link" else target.touch()
    assert main(["evaluate", "closed", "--prompts", "3", "--samples", "1"]) == 0
    out = capsys.readouterr().out
    assert "mean@1" in out and "the result is not written beside the run" in out and "--output" in out
    assert not list(Path("elsewhere").iterdir())
    target.unlink()


def test_files_of_results_are_compared_without_sampling(compared, monkeypatch, capsys):
    import bandpo.train.evaluate_command as commands

    monkeypatch.setattr(commands, "_load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    files = [str(next(p for p in Path(f"runs/{n}/evaluations").iterdir() if p.name.startswith("model"))) for n in "ab"]
    assert main(["evaluate", *files, "--output", "again.json", "--plot", "again.html"]) == 0
    out = capsys.readouterr().out
    assert "A runs/a/model" in out and "B runs/b/model" in out
    again, found = content("again.json"), content("found.json")
    assert again["differences"][0]["measures"] == found["differences"][0]["measures"]
    page = Path("again.html").read_text()
    assert page.count("<svg") == 1 and not re.search(r"""(src|href)=["'](?!#)|url\((?!#)|<script""", page)
    assert "--samples would be ignored" in refusal(capsys, *files, "--samples", "3")
    changed = content(files[0])
    Path("changed.json").write_text(json.dumps({**changed, "computed_in": "bfloat16"}))
    assert main(["evaluate", files[1], "changed.json"]) == 0
    assert "different precisions (float32, bfloat16)" in capsys.readouterr().out
    Path("changed.json").write_text(json.dumps({**changed, "alike": {**changed["alike"], "temperature": 0.3}}))
    assert "were scored differently (temperature: 1.0 and 0.3)" in refusal(capsys, files[0], "changed.json")
    changed["counts"][0]["prompt"] = "another"
    Path("changed.json").write_text(json.dumps(changed))
    assert "scored on different prompts: 7 of 8 and 8 are the same" in refusal(capsys, files[0], "changed.json")


@pytest.mark.parametrize(
    ("changed", "values", "fix"),
    [
        ({"temperature": 0.7}, "temperature: 1.0 and 0.7", "--temperature T"),
        ({"eval_temperature": 0.0}, "temperature: 1.0 and 0.0", "--temperature T"),
        ({"eval_samples": 8}, "samples: 4 and 8", "--samples N"),
        ({"eval_prompts": 9}, "number of prompts: 8 and 9", "--prompts N"),
        ({"max_completion_length": 9}, "max_new_tokens: 4 and 9", "--max-new-tokens N"),
        ({"top_k": 5}, "top_k: 0 and 5", "--top-k N"),
        ({"reward": ["countdown"]}, "reward: sums and countdown", "--reward NAME"),
        ({"task": "chain_sum"}, "prompts: sums and chain_sum, reward: sums and chain_sum", "--task NAME"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs: None and", "--as RUN"),
    ],
    ids=str,
)
def test_runs_that_differ_are_not_mixed(place, changed, values, fix, capsys):
    as_run("differs", **changed)
    error = refusal(capsys, "runs/a", "differs")
    assert "runs/a and differs would be scored differently" in error and values in error and fix in error


def test_runs_that_held_out_other_prompts_are_scored_as_one_of_them(place, capsys):
    own = {
        "task": ...,
        "dataset": "data.jsonl",
        "reward": ["evaluate_rewards:voted"],
        "model": "other",
        "eval_prompts": 5,
    }
    for seed in (0, 1):
        as_run(f"held-{seed}", **own, seed=seed)
        shutil.copytree("runs/a/model", f"held-{seed}/model", dirs_exist_ok=True)
    options = ["held-0", "held-1", "--reward", "evaluate_rewards:voted"]
    assert "data.jsonl, held out with seed 0 and data.jsonl, held out with seed 1" in refusal(capsys, *options)
    assert main(["evaluate", *options, "--as", "held-1", "--output", "as.json"]) == 0
    found = content("as.json")["models"]
    assert found[0]["counts"] == found[1]["counts"] and found[0]["held_out_by"] == "held-1"
    assert {row["votes"] is None for row in found[0]["counts"]} == {False}
    assert "there is no run of bandpo" in refusal(capsys, "runs/a", "--as", "other")
    # One of them has lost a row that was held out since: the numbers agree, the prompts do not.
    shutil.copytree("held-1", "held-2", dirs_exist_ok=True)
    Path("fewer.jsonl").write_text("".join(Path("data.jsonl").read_text().splitlines(keepends=True)[:9]))
    as_run("held-2", **{**own, "dataset": "fewer.jsonl"}, seed=1)
    error = refusal(capsys, "held-1", "held-2", "--reward", "evaluate_rewards:voted")
    assert "prompts: data.jsonl, held out with seed 1 and fewer.jsonl, held out with seed 1" in error


def test_a_model_that_cannot_be_loaded_is_found_before_the_first_is_sampled(place, monkeypatch, capsys):
    import bandpo.train.evaluate_command as commands

    monkeypatch.setattr(commands, "evaluate", lambda *_, **__: pytest.fail("a model was sampled"))
    assert "model runs/nope/model: there is no such folder" in refusal(capsys, "runs/a", "runs/nope/model")
    shutil.copytree("runs/b/model", "cut", dirs_exist_ok=True)
    weights = Path("cut/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors: it is damaged" in refusal(capsys, "runs/a", "cut")
    weights.unlink()
    assert "cannot load cut: it has no weights" in refusal(capsys, "runs/a", "cut")
    Path("cut/model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1-of-2.safetensors"}}')
    Path("cut/pytorch_model.bin").touch()
    assert "model-1-of-2.safetensors is missing" in refusal(capsys, "runs/a", "cut")
    Path("cut/config.json").unlink()
    assert "cannot load cut: Unrecognized model" in refusal(capsys, "runs/a", "cut")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runs/a", "runs/a/model"], "runs/a/model is the same model as runs/a"),
        (["runs/a", "runs/a/"], "is the same model as runs/a"),
        (["runs/a", "--plot", "found.doc"], "must end in .png, .svg, .pdf or .html"),
        (["runs/a", "--top-k", "-1"], "top_k must be 0"),
        (["runs/a", "--min_p", "2"], "min_p must be in"),
        (["runs/a", "--repetition-penalty", "0"], "repetition_penalty must be a positive number"),
    ],
)
def test_mistakes_in_the_options(place, arguments, words, capsys):
    assert words in refusal(capsys, *arguments)


def test_rewards_that_are_not_0_and_1_say_what_pass_means(place, capsys):
    assert main(["evaluate", "runs/a", "runs/b", "--reward", "evaluate_rewards:half", "--samples", "3"]) == 0
    out = capsys.readouterr().out
    assert "a sample is right from 0.5 on" in out and "no maj@k: reward evaluate_rewards:half gives scores" in out
    assert "pass@1" in out and "maj@" not in out.replace("no maj@k", "").replace("pass@k and maj@k", "")


def test_what_an_option_of_several_models_leaves_open_is_the_first_run_s(place, capsys):
    assert main(["evaluate", "other", "runs/a", "--prompts", "2", "--samples", "1", "--output", "o.json"]) == 0
    first, second = content("o.json")["models"]
    same = ("data", "reward", "max_new_tokens", "temperature", "held_out_by")
    assert [first[name] for name in same] == [second[name] for name in same]
    assert "the interval" not in capsys.readouterr().out


def test_files_that_are_no_results_are_refused(compared, tmp_path, capsys):
    path = next(p for p in Path("runs/b/evaluations").iterdir() if p.name.startswith("model-sums-"))
    whole = content(path)

    def row(**changed):
        return {**whole, "counts": [{**whole["counts"][0], **changed}, *whole["counts"][1:]]}

    cases = [
        "", "[1]", "{}", '"\x1b"', "[" * 10**5,
        row(samples=-1), row(right=9), row(samples=True), row(votes=[[9, 1.0]]), row(votes=[[1, 2.0]]), row(votes="\x1b["),
        row(prompt=None), {**whole, "samples": 10**9}, {**whole, "counts": []}, {**whole, "alike": []}, {**whole, "samples": 2},
    ]  # fmt: skip
    for i, case in enumerate(cases):
        (tmp_path / "x.json").write_text(case if isinstance(case, str) else json.dumps(case))
        assert main(["evaluate", str(tmp_path / "x.json"), str(path)]) == 2, case if i else ""
        error = capsys.readouterr().err
        assert "Traceback" not in error and "\x1b" not in error and len(error.splitlines()) == 1


def test_names_are_shortened_and_lettered():
    from bandpo.train.evaluate_tables import labels

    many = labels([f"m{i}" for i in range(28)])
    assert many["m0"] == "A m0" and many["m27"] == "B1 m27"
    long = labels(["x" * 50 + "/end", "b\x1b"])
    assert len(long["x" * 50 + "/end"]) == 40 and long["x" * 50 + "/end"].endswith("/end")
    assert long["b\x1b"] == "B b\\x1b"


def test_prompts_of_a_chat_model_and_of_a_text_model_are_paired():
    from bandpo.train.evaluate_results import digest

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    assert digest(messages, "2") == digest("Be brief.\n\n1+1?", "2") != digest("1+1?", "2")
    assert digest("1+1?", "2") != digest("1+1?", "3")


def test_the_figure_has_a_curve_for_each_model():
    from bandpo.plots.evaluations import plot_evaluations
    from bandpo.statistics import Interval

    nan = Interval(math.nan, math.nan, math.nan)
    one = {"mean@4": Interval(0.2, 0.1, 0.3), "pass@1": Interval(0.2, 0.1, 0.3), "pass@2": Interval(0.3, 0.2, 0.4)}
    two = {**one, "pass@4": Interval(0.5, 0.4, 0.6), "maj@4": Interval(0.3, math.nan, math.nan)}
    figure = plot_evaluations({"A": {**one, "pass@4": nan}, "B": two})
    top, bottom = figure.axes
    assert [list(line.get_xdata()) for line in top.lines] == [[1, 2], [1, 2, 4]] and top.get_xscale() == "log"
    assert len(top.collections) == 2  # the bands
    assert [label.get_text() for label in bottom.get_yticklabels()] == ["mean@4", "maj@4"]
    with pytest.raises(ValueError, match="no model"):
        plot_evaluations({})


def test_options_are_checked_before_torch_is_needed():
    from bandpo._system.options import Parser
    from bandpo.train.arguments import add_evaluate_arguments

    parser = Parser()
    add_evaluate_arguments(parser)
    options = parser.parse_args(["a", "b", "--max_new_tokens", "3", "--as", "c"])
    assert (options.models, options.as_run, options.max_new_tokens) == (["a", "b"], "c", 3)
    assert "95%" in parser.format_help() and "%%" not in parser.format_help()
