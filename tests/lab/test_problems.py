"""The lab's problems: no leakage, rewards that know right from wrong."""

import json

import pytest
import torch

from bandpo.lab.comparison.problems import END, PAD, PROBLEMS, _countdown, addition, paths
from bandpo.toy.tasks import TASKS, make_splits, score

FORKS = ("detours", "traps")
"""Their tests are in test_fork_problems.py: nobody graded their demonstrations."""

GRADED = [name for name in PROBLEMS if name not in FORKS]


def reward(problem, prompt, walk):
    row = [*walk, END, *[PAD] * (problem.length - len(walk) - 1)]
    return problem.rewards(torch.tensor([prompt]), torch.tensor([row])).item()


@pytest.mark.parametrize("name", GRADED)
def test_splits_share_no_prompt_and_demonstrations_are_of_the_training_one(name):
    problem = PROBLEMS[name]()
    train, held_out = ({tuple(p) for p in x.tolist()} for x in (problem.prompts, problem.held_out))
    width = problem.prompts.shape[1]
    assert not train & held_out
    assert len(held_out) == len(problem.held_out) >= 150
    assert {tuple(d[:width]) for d in problem.demonstrations.tolist()} <= train
    lengths = (problem.demonstrations[:, width:] != PAD).sum(1)
    assert lengths.max() <= problem.length
    assert ((problem.demonstrations == END).sum(1) == 1).all()


@pytest.mark.parametrize("name", GRADED)
def test_rewards_of_demonstrations_and_of_noise(name):
    problem = PROBLEMS[name]()
    rows = problem.demonstrations[:300]
    width = problem.prompts.shape[1]
    rewards = problem.rewards(rows[:, :width], rows[:, width:])
    if name == "addition":
        assert 0.3 < rewards.mean() < 0.55
        strong = torch.tensor(["<" in problem.text(r.tolist()) for r in problem.demonstrations])
        sums = problem.demonstrations[strong]
        assert problem.rewards(sums[:, :width], sums[:, width:]).min() == 1
        assert 0.01 < strong.float().mean() < 0.03
    else:
        assert rewards.min() == 1
    shuffled = problem.rewards(rows[:, :width], rows.roll(150, 0)[:, width:])
    assert shuffled.mean() < (0.7 if name == "letter_counting" else 0.35)  # many letters stand there once
    endless = torch.full_like(rows[:, width:], 5)
    assert problem.rewards(rows[:, :width], endless).sum() == 0


def test_the_fast_scorer_of_countdown_is_reasoning_gym_s():
    train, _ = make_splits(TASKS["countdown"], 60)
    checked = 0
    for row in train:
        answer = row["answer"]
        for text in (answer, answer[::-1], answer + "+1", answer.replace("+", "-"), answer[1:], "", "x", f"({answer})"):
            if "(" not in text:  # sums of the numbers only: the model never learns brackets
                assert _countdown(row["prompt"], text) == score("countdown", text, row["metadata"]), (row, text)
                checked += 1
        json.loads(row["metadata"])
    assert checked > 300


def test_paths_need_edges_and_end_at_the_goal():
    problem = paths()
    prompt = tuple(problem.prompts[0].tolist())
    width = 2
    own = problem.demonstrations[(problem.demonstrations[:, :2] == problem.prompts[0]).all(1)][0, width:].tolist()
    walk = tuple(own[: own.index(END)])
    assert reward(problem, prompt, walk) == 1
    assert reward(problem, prompt, ()) == 0
    assert reward(problem, prompt, walk[:-1]) == 0 or len(walk) == 1
    assert reward(problem, prompt, (*walk[:-1], prompt[0])) == 0
    assert "→" in problem.text([5, 6])


def test_addition_takes_both_strategies():
    problem = addition()
    encoded = {c: i for i, c in enumerate("0123456789", 3)}
    prompt = problem.prompts[0].tolist()
    text = problem.text(prompt)
    a, b = map(int, text.split("+"))
    plus = prompt[3]
    total = str(a + b)
    equals, less = (
        problem.demonstrations[:, 7][[("=" in problem.text(r.tolist())) == want for r in problem.demonstrations]][
            0
        ].item()
        for want in (True, False)
    )
    digits = [encoded[c] for c in total]
    assert plus not in digits
    assert reward(problem, tuple(prompt), (equals, *digits)) == 1
    assert reward(problem, tuple(prompt), (less, *digits[::-1])) == 1
    assert reward(problem, tuple(prompt), (less, *digits)) == float(total == total[::-1])
    assert reward(problem, tuple(prompt), (equals, *digits[:-1])) == 0
