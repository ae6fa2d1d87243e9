"""Several rewards, columns within columns, and `bandpo check-reward`."""

import json

import datasets
import pytest

from bandpo.cli import main
from bandpo.train.config import RunConfig
from bandpo.train.data import load_prompts
from bandpo.train.rewards import checked_rewards

COMMON = {"config": None, "split": "train", "prompt_column": "prompt", "system_prompt": None, "chat": False}


def rewards(reward, **changes):
    return RunConfig(**{"model": "m", "dataset": "d", "reward": reward, **changes}).rewards


def test_names_of_rewards():
    assert rewards("math") == ["math"] and rewards(["math", "my:f"]) == ["math", "my:f"]
    assert RunConfig(task="countdown").rewards == ["countdown"]
    for wrong in ([], ["math", 3], {"math": 1}, ["math", ""]):
        with pytest.raises(ValueError, match="give a name, or a list of names"):
            rewards(wrong)
    with pytest.raises(ValueError, match="a name twice"):
        rewards(["math", "math"])
    with pytest.raises(ValueError, match="labels its samples with one reward, got math, my:f"):
        rewards(["math", "my:f"], method="online-dpo")
    assert rewards(["my:f", "math-lenient"], reward_workers=2)
    with pytest.raises(ValueError, match="reward_workers=2 would be ignored"):
        rewards(["my:f"], reward_workers=2)


def test_weights_must_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["train", "--model", "m", "--dataset", "d", "--reward", "math", "math-lenient", "--reward_weights", "1"]
    assert main(given) == 2
    assert "got 1 (1) for 2 rewards (math, math-lenient); give one for each" in capsys.readouterr().err


def test_two_functions_of_one_name_have_two_names_in_the_log(tmp_path, monkeypatch):
    for module in ("one_reward", "other_reward"):
        (tmp_path / f"{module}.py").write_text("def score(completions, **_):\n    return [0.0] * len(completions)\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = RunConfig(model="m", dataset="d", reward=["one_reward:score", "other_reward:score", "math"])
    found = [reward.__name__ for reward in checked_rewards(run, folder=None, say=print)]
    assert found == ["one_reward:score", "other_reward:score", "math_reward"]


@pytest.fixture(params=["jsonl", "parquet"])
def nested(request, tmp_path):
    rows = [
        {
            "prompt": f"{i}+1?",
            "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
            "info": {"deep": {"x": i}},
            "answer": "?",
        }
        for i in range(5)
    ]
    path = tmp_path / f"rows.{request.param}"
    if request.param == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def test_a_part_of_a_column_is_the_answer(nested):
    said = []
    data = load_prompts(str(nested), answer_column="reward_model.ground_truth", say=said.append, **COMMON)
    assert list(data["answer"]) == ["1", "2", "3", "4", "5"] and "reward_model" in data.column_names
    [line] = said
    assert "column 'reward_model.ground_truth' is used as the answer, and its column 'answer' is left out" in line
    assert list(load_prompts(str(nested), answer_column="info.deep.x", say=said.append, **COMMON)["answer"]) == [
        0,
        1,
        2,
        3,
        4,
    ]
    for wrong in ("reward_model.nothing", "info.deep.x.y", "nothing", "info."):
        with pytest.raises(ValueError, match=r"answer_column to one of .*reward_model\.ground_truth.*info\.deep\.x"):
            load_prompts(str(nested), answer_column=wrong, **COMMON)


def test_a_name_with_a_dot_of_its_own_comes_first(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "b.c": "own", "b": {"c": "inner"}}) + "\n")
    assert load_prompts(str(path), answer_column="b.c", **COMMON)["answer"][0] == "own"


@pytest.fixture
def answers(tmp_path, monkeypatch):
    texts = ["2", "for all n that 3 divides", r"2\sqrt{3}", "so #### 1,450", r"it is $\frac{1}{2}$", r"so \boxed{7}"]
    path = tmp_path / "answers.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{i}?", "answer": t, "part": {"x": i}}) + "\n" for i, t in enumerate(texts))
    )
    (tmp_path / "check_rewards.py").write_text(
        "def boxed(completions, **_):\n    return [float('boxed' in str(c)) for c in completions]\n\n\n"
        "def broken(completions, **_):\n    raise RuntimeError('my bug')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return path


def test_check_reward_lists_what_would_be_unscored(answers, capsys):
    assert main(["check-reward", "--dataset", str(answers), "--reward", "math", "check_rewards:boxed"]) == 1
    said = capsys.readouterr().out
    assert "!! reward math: of the 6 first rows' own answers 5 score 1, 1 unscored" in said
    assert "row 2: the reference 'for all n that 3 divides' cannot be read" in said
    assert "ok reward check_rewards:boxed: of the 6 first rows' own answers 4 score 1, 2 score 0" in said
    assert main(["check-reward", "--dataset", str(answers), "--reward", "math", "--rows", "1"]) == 0
    assert main(["check-reward", "--dataset", str(answers), "--reward", "math", "--answer_column", "part.x"]) == 0


def test_check_reward_shows_the_failure_of_a_function(answers, capsys):
    assert main(["check-reward", "--dataset", str(answers), "--reward", "check_rewards:broken", "--rows", "2"]) == 1
    said = capsys.readouterr().out
    assert "raised RuntimeError('my bug')" in said and "check_rewards.py" in said and "line 6" in said
    assert "none has a score, 2 unscored (2 of them because the function raised or hung)" in said


def test_check_reward_leaves_out_bad_rows_if_asked(answers, capsys):
    with answers.open("a") as file:
        file.write(json.dumps({"prompt": "?", "answer": "", "part": {"x": 6}}) + "\n")
    assert main(["check-reward", "--dataset", str(answers), "--reward", "check_rewards:boxed"]) == 2
    assert "set bad_rows: skip" in capsys.readouterr().err
    arguments = ["--dataset", str(answers), "--reward", "check_rewards:boxed", "--bad_rows", "skip"]
    assert main(["check-reward", *arguments]) == 0
    assert "of the 6 first rows' own answers" in capsys.readouterr().out


def test_a_secret_in_the_error_of_a_reward_is_not_printed(answers, capsys):
    path = answers.parent / "secret_rewards.py"
    path.write_text("def f(completions, **_):\n    raise RuntimeError('token=' + 'hf_' + 'a' * 34)\n")
    assert main(["check-reward", "--dataset", str(answers), "--reward", "secret_rewards:f", "--rows", "2"]) == 1
    said = capsys.readouterr()
    assert "RuntimeError" in said.out and "aaaaaaaa" not in said.out + said.err


def test_check_reward_reads_the_file_of_a_run(answers, capsys):
    config = answers.parent / "run.yaml"
    config.write_text(f"model: m\ndataset: {answers}\nreward: [math]\nmax_steps: 3\nlora_rank: 4\n")
    assert main(["check-reward", "--config", str(config), "--rows", "1"]) == 0
    assert "ok reward math" in capsys.readouterr().out
    config.write_text(f"model: m\ndataset: {answers}\nreward: [math]\nanswer_colum: x\n")
    assert main(["check-reward", "--config", str(config)]) == 2
    assert "unknown key 'answer_colum'; did you mean 'answer_column'?" in capsys.readouterr().err
    assert main(["check-reward"]) == 2
    assert "name a dataset" in capsys.readouterr().err
