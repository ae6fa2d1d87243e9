"""What a run writes about itself, and what `bandpo evaluate` makes of its folder: one small run on own data, from all sides."""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from bandpo.cli import main

GOLDS = [r"2\sqrt{3}", r"\frac{1}{2}", "1331 and 1728", r"10\pi", "3 hours 20 minutes", "72", r"1\pm\sqrt{19}"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, data, rewards and a run in it; tests work in it, and leave it as it was."""
    from bandpo.toy.models import WarmUp, build_model, build_tokenizer

    folder = tmp_path_factory.mktemp("says")
    tokenizer = build_tokenizer()
    build_model(WarmUp(hidden_size=16, layers=1), tokenizer).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    rows = [{"question": f"what is {i}+1?", "solution": GOLDS[i % len(GOLDS)]} for i in range(42)]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "says_rewards.py").write_text(REWARDS)
    (folder / "run.yaml").write_text(
        "model: tiny\ndataset: data.jsonl\nprompt_column: question\nanswer_column: solution\nreward: math\nbad_rows: skip\n"
        "system_prompt: Be brief.\nmax_completion_length: 6\nper_device_train_batch_size: 8\nper_device_eval_batch_size: 16\n"
        "num_generations: 4\nsteps_per_generation: 2\nmax_steps: 3\nseed: 3\nlogging_steps: 10\nuse_cpu: true\nbf16: false\n"
        "gradient_checkpointing: false\nreport_to: none\neval_prompts: 6\neval_samples: 4\n"
        "temperature: 0.7\ntop_p: 0.9\ntop_k: 20\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("BANDPO_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        yield folder


REWARDS = """
import os, sys
from pathlib import Path
Path("imported").touch()
def length(completions, **_):
    return [len(c) / 10 for c in completions]
def leaves(completions, **_):
    sys.exit(0)
calls = 0
def once(completions, **_):
    global calls
    calls += 1
    if calls == int(os.environ["FAILS_AT"]):
        raise KeyboardInterrupt if os.environ["HOW"] == "pressed" else ValueError("once")
    return [len(c) / 10 for c in completions]
"""


@pytest.fixture(scope="module")
def said(place):
    """What the run said."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["train", "--config", "run.yaml", "--output_dir", "run"]) == 0
    return out.getvalue()


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def scored(*options, status=0):
    assert main(["evaluate", *options, "--output", "scored.json"]) == status
    return json.loads(Path("scored.json").read_text())


def test_answers_that_cannot_be_read_are_counted_before_training(said, capsys):
    assert "6 rows have an answer that math-verify cannot read as a whole ('3 hours 20 minutes'" in said
    assert "they are left out, 36 are kept" in said
    assert said.index("cannot read") < said.index("before training")
    assert main(["train", "--config", "run.yaml", "--output_dir", "strict", "--bad_rows", "error"]) == 2
    assert "set bad_rows: skip" in capsys.readouterr().err
    assert not Path("strict").exists()
    Path("prose.jsonl").write_text(
        '{"question": "a", "solution": "see above, where it is shown that 3 divides n"}\n' * 9
    )
    options = ["--config", "run.yaml", "--dataset", "prose.jsonl", "--output_dir", "strict"]
    assert main(["train", *options]) == 2
    assert "none is left" in capsys.readouterr().err


def test_a_run_shorter_than_logging_steps_has_its_metrics(said):
    metrics = rows_of("run/metrics.jsonl")
    assert [row["step"] for row in metrics] == [3]
    assert {"reward", "entropy", "loss", "frac_reward_zero_std"} <= set(metrics[0])
    assert not any("train_runtime" in row for row in metrics)


def test_a_run_in_which_no_group_had_signal_says_so_at_its_end(said):
    """The model is random: no box, so every reward is 0."""
    line = "no group of this run ever had rewards that differ (every reward was 0, in 2 rollouts)"
    assert line in said
    assert line in Path("run/report.html").read_text()


def test_training_and_evaluation_sample_alike(said):
    evaluation = json.loads(Path("run/evaluation.json").read_text())
    assert (evaluation["temperature"], evaluation["top_p"]) == (0.7, 0.9)


@pytest.mark.parametrize("model", ["run", "run/model", "run/"])
def test_evaluate_scores_a_run_as_the_run_did(said, model, capsys):
    found = scored(model)
    evaluation = json.loads(Path("run/evaluation.json").read_text())
    assert found["prompts"] == 6 and found["reward"] == "math" and found["data"] == "data.jsonl"
    assert (found["temperature"], found["top_p"], found["max_new_tokens"], found["samples"]) == (0.7, 0.9, 6, 4)
    assert all(found[k] == v for k, v in evaluation["after"].items())
    assert (
        "6 prompts of data.jsonl, held out by the run in run; reward math; 4 samples each at temperature 0.7, top_p 0.9, "
        "top_k 20" in " ".join(capsys.readouterr().out.split())
    )


def test_the_same_samples_and_the_system_prompt(said, monkeypatch):
    import bandpo.train.evaluate_command as commands

    kept = {}
    real = commands.evaluate

    def look(*args, **kwargs):
        kept["result"] = real(*args, **kwargs)
        return kept["result"]

    monkeypatch.setattr(commands, "evaluate", look)
    scored("run")
    after = [row for row in rows_of("run/samples.jsonl") if row["stage"] == "after"]
    assert kept["result"].prompts == [row["prompt"] for row in after]
    assert kept["result"].completions == [row["completions"] for row in after]
    assert all(prompt.startswith("Be brief.\n\n") for prompt in kept["result"].prompts)


def test_options_that_are_given_win(said):
    options = ["--samples", "2", "--prompts", "3", "--temperature", "0", "--top-p", "1", "--max-new-tokens", "4"]
    found = scored("run", "--reward", "says_rewards:length", *options)
    assert (found["prompts"], found["samples"], found["temperature"], found["top_p"]) == (3, 2, 0, 1)
    assert found["reward"] == "says_rewards:length" and 0 < found["mean@2"] < 0.41
    other = scored("run", "--task", "chain_sum", "--prompts", "2", "--samples", "1")
    assert (other["data"], other["reward"], other["prompts"]) == ("chain_sum", "chain_sum", 2)
    shutil.copy("data.jsonl", "other.jsonl")
    other = scored(
        "run", "--dataset", "other.jsonl", "--prompts", "4", "--samples", "1"
    )  # its columns and reward are the run's
    assert (other["data"], other["reward"], other["prompts"]) == ("other.jsonl", "math", 4)


def test_a_model_of_no_run_is_scored_on_what_is_named_only(said, capsys):
    assert main(["evaluate", "tiny"]) == 2
    assert "--task, or prompts with --dataset and --reward" in capsys.readouterr().err
    assert main(["evaluate", "tiny", "--dataset", "data.jsonl"]) == 2
    assert "needs --reward" in capsys.readouterr().err
    assert scored("tiny", "--task", "countdown", "--prompts", "2", "--samples", "1")["data"] == "countdown"


@pytest.fixture
def foreign(said):
    """A copy of the run, whose configuration a stranger may have written."""
    shutil.rmtree("foreign", ignore_errors=True)
    shutil.copytree("run", "foreign", ignore=shutil.ignore_patterns("checkpoint-*"))

    def change(**values):
        path = Path("foreign/config.resolved.yaml")
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **values}))

    return change


def test_a_run_s_own_code_is_imported_only_when_it_is_named_again(foreign, capsys, monkeypatch):
    foreign(reward="says_rewards:length")
    monkeypatch.delitem(sys.modules, "says_rewards", raising=False)
    Path("imported").unlink(missing_ok=True)
    assert main(["evaluate", "foreign"]) == 2
    assert "repeat it with --reward says_rewards:length" in capsys.readouterr().err
    assert not Path("imported").exists()
    assert scored("foreign", "--reward", "says_rewards:length")["mean@4"] > 0
    assert Path("imported").exists()


def test_a_dataset_that_a_run_names_is_not_fetched(foreign, capsys, monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append(a))
    foreign(dataset="stranger/data")
    assert main(["evaluate", "foreign"]) == 2
    assert "repeat it with --dataset stranger/data" in capsys.readouterr().err
    foreign(dataset="data.jsonl", eval_dataset="stranger/\x1b[2Jdata")
    assert main(["evaluate", "foreign"]) == 2
    error = capsys.readouterr().err
    assert "stranger/" in error and "\x1b" not in error
    assert not asked


PWN = "from pathlib import Path\nPath('pwned').touch()\n"


@pytest.mark.parametrize("which", ["config", "tokenizer", "kernel", "adapter"])
def test_a_stranger_s_model_folder_runs_and_fetches_nothing(foreign, which, capsys, monkeypatch):
    """transformers asks y/N for such code where nobody said no."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    model = Path("foreign/model")
    config = json.loads((model / "config.json").read_text())
    if which == "config":
        (model / "pwn.py").write_text(PWN)
        names = {"AutoConfig": "pwn.C", "AutoModelForCausalLM": "pwn.M"}
        (model / "config.json").write_text(json.dumps({**config, "model_type": "stranger", "auto_map": names}))
    if which == "tokenizer":
        (model / "pwn.py").write_text(PWN)
        path = model / "tokenizer_config.json"
        content = {
            **json.loads(path.read_text()),
            "tokenizer_class": "StrangeTokenizer",
            "auto_map": {"AutoTokenizer": ["pwn.T", None]},
        }
        path.write_text(json.dumps(content))
    if which == "kernel":
        (model / "config.json").write_text(json.dumps({**config, "attn_implementation": "stranger/attention"}))
    if which == "adapter":
        monkeypatch.delenv("HF_HUB_OFFLINE")
        (model / "config.json").unlink()
        (model / "adapter_config.json").write_text(
            json.dumps(
                {"peft_type": "LORA", "base_model_name_or_path": "stranger/base", "r": 2, "target_modules": ["q_proj"]}
            )
        )
    main(["evaluate", "foreign/model", "--prompts", "1", "--samples", "1"])
    assert not Path("pwned").exists()
    if which != "tokenizer":  # a tokenizer may be loaded as one that transformers knows
        assert "bandpo:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "values",
    [
        {"eval_prompts": "many"},
        {"eval_prompts": 0},
        {"eval_samples": [4]},
        {"task": "chess"},
        {"task": "countdown"},
        {"seed": "a"},
        {"temperature": "hot"},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_p": 7.0},
        {"top_p": math.nan},
        {"max_completion_length": "x"},
        {"max_completion_length": -5},
        {"max_completion_length": True},
        {"prompt_column": 3},
        {"prompt_column": "nowhere"},
        {"dataset": None},
        {"dataset": {"a": 1}},
        {"dataset": "../nowhere.jsonl"},
        {"reward": "\x1b[2J"},
        {"reward": 7},
        {"method": "magic"},
        {"bad_rows": "maybe"},
        {"reward_timeout": -1.0},
        {"per_device_eval_batch_size": 0},
        {"eval_temperature": math.inf},
    ],
    ids=str,
)
def test_odd_settings_of_a_run_are_refused_in_words(foreign, values, capsys):
    foreign(**values)
    assert main(["evaluate", "foreign"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bandpo: ") and "Traceback" not in error and "\x1b" not in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("content", ["", "[1]", "a: [", "a: &a [*a]\n", "\x00"])
def test_a_damaged_configuration_is_refused(foreign, content, capsys):
    Path("foreign/config.resolved.yaml").write_text(content)
    assert main(["evaluate", "foreign"]) == 2
    assert "Traceback" not in capsys.readouterr().err


SHORT = ["--config", "run.yaml", "--max_steps", "5", "--save_steps", "2", "--reward", "says_rewards:once"]


@pytest.fixture(scope="module")
def whole(place, said):
    """An uninterrupted run of five steps; how many times it asked for rewards before them."""
    os.environ["FAILS_AT"], os.environ["HOW"] = "-1", ""
    assert main(["train", *SHORT, "--output_dir", "whole"]) == 0
    import says_rewards

    evaluations = 2 * 2  # two batches before and after
    return says_rewards.calls - evaluations


@pytest.mark.parametrize("how", ["pressed", "raised"])
def test_the_rows_since_the_last_log_survive_an_interruption_and_a_failure(whole, how, monkeypatch, capsys):
    """Rollouts are of two steps: the third one fails at step 5. A resumed run makes the rows again, and ends as a whole one."""
    import says_rewards

    monkeypatch.setattr(says_rewards, "calls", 0)
    monkeypatch.setenv("HOW", how)
    monkeypatch.setenv("FAILS_AT", str(2 + whole))
    folder = Path(f"cut-{how}")
    assert main(["train", *SHORT, "--output_dir", str(folder)]) == 1
    error = capsys.readouterr().err
    assert "says_rewards.py" in error and "Traceback" in error
    (row,) = rows_of(folder / "metrics.jsonl")
    assert row["step"] == 4 and row["unfinished"] is True and 0 < row["reward"] < 1
    monkeypatch.setenv("FAILS_AT", "-1")
    assert main(["train", *SHORT, "--output_dir", str(folder), "--resume_from_checkpoint", "latest"]) == 0
    for name in ("metrics.jsonl", "model/model.safetensors", "samples.jsonl"):
        assert (folder / name).read_bytes() == Path("whole", name).read_bytes(), name


def test_a_reward_that_exits_is_status_1_with_its_place(said, capsys):
    assert main(["train", "--config", "run.yaml", "--reward", "says_rewards:leaves", "--output_dir", "left"]) == 1
    error = capsys.readouterr().err
    assert "called sys.exit(0)" in error and "says_rewards.py" in error and "in leaves" in error
    assert not Path("left/model").exists()
    assert (
        main(
            [
                "train",
                "--config",
                "run.yaml",
                "--reward",
                "says_rewards:leaves",
                "--output_dir",
                "l2",
                "--reward_errors",
                "skip",
            ]
        )
        == 2
    )
    assert "none of the 6 held-out prompts could be scored" in capsys.readouterr().err


EXITS = """
import sys
from bandpo import Band, KL, Objective
def surrogate(log_ratio, advantages, bounds):
    sys.exit(0)
OBJ = Objective(bounds=Band(KL, 0.05), surrogate=surrogate, name="exits")
"""


def test_an_objective_that_exits_is_status_1_with_its_place(said, capsys):
    Path("says_exits.py").write_text(EXITS)
    Path("says_exits_at_once.py").write_text("import sys\nsys.exit(0)\n")
    assert main(["train", "--config", "run.yaml", "--objective", "says_exits:OBJ", "--output_dir", "exits"]) == 1
    error = capsys.readouterr().err
    assert "called sys.exit(0)" in error and "says_exits.py" in error
    assert (
        main(["train", "--config", "run.yaml", "--objective", "says_exits_at_once:OBJ", "--output_dir", "exits"]) == 2
    )
    assert "could not be imported" in capsys.readouterr().err


def test_unscored_samples_take_no_part_in_an_evaluation(tmp_path):
    """By hand: prompts with 2 of 4 right, 1 of 2 right of 4 (two unscored), none scored."""
    from bandpo.train.evaluate import Evaluation

    nan = math.nan
    rewards = [[1.0, 0.0, 1.0, 0.0], [nan, 1.0, 0.0, nan], [nan] * 4, [0.25, 0.25, nan, 0.25]]
    found = Evaluation(["a", "b", "c", "d"], [["x"] * 4] * 4, rewards)
    summary = found.summary()
    assert summary["mean@4"] == pytest.approx((0.5 + 0.5 + 0.25) / 3, abs=1e-12)
    assert summary["pass@1"] == pytest.approx((0.5 + 0.5 + 0) / 3, abs=1e-12)
    assert summary["pass@2"] == pytest.approx((5 / 6 + 1 + 0) / 3, abs=1e-12)
    assert summary["pass@4"] == 1.0  # of the one prompt with four scores
    assert summary["groups with signal"] == pytest.approx(2 / 3)
    assert summary["unscored"] == 7
    found.write(tmp_path / "samples.jsonl", "after")
    assert "NaN" not in (tmp_path / "samples.jsonl").read_text()
    again = Evaluation.read(tmp_path / "samples.jsonl", "after")
    assert again is not None and again.summary() == summary
    short = Evaluation(["a"], [["x"] * 2], [[1.0, nan]]).summary()
    assert short["pass@1"] == 1 and math.isnan(short["pass@2"])
    with pytest.raises(ValueError, match="none of the 1 held-out prompts could be scored"):
        Evaluation(["a"], [["x"] * 2], [[nan, nan]]).summary()
