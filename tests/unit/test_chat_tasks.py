"""Built-in tasks as chats for a language model, the presets of `bandpo train`, and the change of an evaluation."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from bandpo.cli import main
from bandpo.toy.tasks import TASKS, in_chat, make_splits, score
from bandpo.train.config import PRESETS, RunConfig, parse, read
from bandpo.train.data import checked_shots, load_task
from bandpo.train.evaluate import Evaluation
from bandpo.train.options import declared_in, load_table
from bandpo.train.report import change_line


@pytest.mark.parametrize("task", list(TASKS))
def test_solved_examples_are_right_and_not_trained_on(task):
    train, held_out = load_task(task, 5, shots=2)
    whole, _ = make_splits(TASKS[task], evaluation=5)
    assert len(train) == len(whole) - 2 and train[0]["answer"] == whole[2]["answer"]
    for row in (train[0], held_out[0]):
        messages = row["prompt"]
        assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
        assert messages[1:5] == train[1]["prompt"][1:5] and messages[-1]["content"] not in (
            m["content"] for m in messages[:-1]
        )
    for example, message in zip(whole, messages[2:5:2], strict=False):
        assert score(task, message["content"], example["metadata"]) == 1
    assert isinstance(load_task(task, 5)[0][0]["prompt"], str)  # the compact text, where no number of examples is set
    assert len(in_chat(whole[:3], TASKS[task], [])[0]["prompt"]) == 2


@pytest.mark.parametrize("task", ["sums", "chain_sum"])
def test_a_sum_is_scored_alone_or_in_its_own_equation(task):
    _, [row] = make_splits(TASKS[task], 1, 1)
    expression, right = json.loads(row["metadata"])["expression"], row["answer"]
    for text in (right, f" {right}\n", f"{expression} = {right}", f"{expression.replace(' ', '')}={right} "):
        assert score(task, text, row["metadata"]) == 1, text
    wrong = (f"{right}1", f"1 + 1 = {right}", f"= {right}", f"{expression} = {right} = {right}", f"{expression} = 7{right}",
             f"the answer is {right}", expression, "")  # fmt: skip
    for text in wrong:
        assert score(task, text, row["metadata"]) == 0, text


def test_sums_are_right_and_of_one_difficulty_in_both_splits():
    """No sum is in both splits with its terms exchanged, and both splits draw from the same numbers."""
    splits = make_splits(TASKS["sums"], evaluation=512)
    terms = []
    for rows in splits:
        parts = [json.loads(row["metadata"])["expression"].split() for row in rows]
        values = np.array([int(f"{sign}{second}") + int(first) for first, sign, second in parts])
        assert (values == [int(row["answer"]) for row in rows]).all() and values.min() >= 0
        assert max(int(first) for first, _, _ in parts) == 60
        terms.append({(sign, frozenset((first, second))) for first, sign, second in parts})
        shares = np.mean([[sign == "+", int(first) < 10 and int(second) < 10] for first, sign, second in parts], axis=0)
        assert shares == pytest.approx([0.5, 0.07], abs=0.06)
    assert not terms[0] & terms[1]


def test_shots_are_refused_where_they_would_be_ignored():
    with pytest.raises(ValueError, match=r"shots=1 needs task and model"):
        RunConfig(task="letter_counting", shots=1)
    with pytest.raises(ValueError, match=r"shots=1 needs task and model"):
        RunConfig(dataset="data.jsonl", model="x", reward="math", shots=1)
    with pytest.raises(ValueError, match=r"shots must be in \[0, 64\], got 65"):
        RunConfig(task="letter_counting", model="x", shots=65)
    without = type("Tokenizer", (), {"chat_template": None})
    with pytest.raises(ValueError, match="model 'x' has no chat template"):
        checked_shots(RunConfig(task="letter_counting", model="x", shots=0), without)
    assert checked_shots(RunConfig(task="letter_counting", model="x"), without) is None


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_can_be_read_and_the_command_line_wins(name):
    run, args, given = parse(["--preset", name, "--max_steps", "7", "--use_cpu", "true"])[:3]
    assert run.model == "wheel:smollm2" and run.shots == 1
    assert (args.max_steps, args.num_iterations, args.objective) == (7, 2, "bandpo-kl")
    assert "preset" not in given and given["model"] == "wheel:smollm2"  # config.yaml repeats the run without the preset


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "smol"], "--preset: got 'smol'; did you mean 'smollm2'"),
        (["--preset"], "--preset needs a name"),
        (["--preset=smollm2", "--config", "x.yaml"], "--config x.yaml and --preset smollm2 are both given; choose one"),
    ],
)
def test_mistakes_in_presets(arguments, message, capsys):
    table = load_table()
    with pytest.raises(ValueError, match=message):
        read(arguments, lambda method: declared_in(table, method))
    assert main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err


def evaluation(rewards):
    return Evaluation([str(i) for i in range(len(rewards))], [[""] * len(r) for r in rewards], rewards)


def test_the_change_is_paired_over_prompts_with_a_bca_interval():
    draw = np.random.default_rng(0)
    before = draw.binomial(1, 0.3, (40, 8)).astype(float)
    after = np.maximum(before, draw.binomial(1, 0.2, (40, 8)))
    change = evaluation(before.tolist()).change_to(evaluation(after.tolist()))
    differences = after.mean(1) - before.mean(1)
    expected = stats.bootstrap(
        (differences,), np.mean, n_resamples=9999, rng=np.random.default_rng(0)
    ).confidence_interval
    assert change.value == pytest.approx(differences.mean(), rel=1e-12)
    assert (change.low, change.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    line = change_line({"change": change._asdict(), "prompts": 40, "samples": 8})
    assert line is not None and f"mean@8 changed by {change.value:+.3f}, 95% interval [{change.low:+.3f}" in line


def test_the_change_leaves_out_what_was_not_scored():
    nan = math.nan
    first = evaluation([[0.0, nan], [1.0, 1.0], [nan, nan], [0.0, 0.0]])
    second = evaluation([[1.0, 1.0], [1.0, nan], [1.0, 1.0], [0.0, 1.0]])
    assert first.change_to(second).value == pytest.approx((1 + 0 + 0.5) / 3)
    none = evaluation([[nan, nan]])
    for other in (none, evaluation([[1.0], [1.0]])):
        change = none.change_to(other)
        assert all(map(math.isnan, change))
        assert change_line({"change": change._asdict(), "prompts": 1, "samples": 2}) is None
    assert change_line({"prompts": 1, "samples": 2}) is None  # a folder of an older version
