"""The problems with the token profile of a language model: what is right by enumeration, splits, and what models sample."""

import itertools
from dataclasses import replace

import pytest
import torch

from bandpo import OBJECTIVES
from bandpo.lab.comparison.loop import Loop, Run, Setting
from bandpo.lab.comparison.problems import END, FIRST, PAD, PROBLEMS, detours, hidden_type, traps
from bandpo.lab.comparison.stack import Rollout
from bandpo.lab.comparison.warmup import Checkpoint

NAMES = ("detours", "traps")
OPTIONS = 112
A, B = FIRST + 29, FIRST + 29 + OPTIONS  # the first options of both forks


def solved_by(name, kind):
    """The options of A that solve a type, from the description and not from the code."""
    common, good, each = {"detours": (3, 8, 4), "traps": (4, 2, 6)}[name]
    if kind >= 8:
        return {kind - 7}  # the types 8, 9, ... belong to the good options 1, 2, ... alone
    around = {option for option in range(1, good + 1) if (kind - (option - 1)) % 8 < each}
    return around | ({0} if kind < common else set())


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_both_forks_has_the_reward_of_an_enumeration(name):
    problem = PROBLEMS[name]()
    types = 8 + {"detours": 8, "traps": 2}[name]
    for key in problem.prompts[:12].tolist():
        kind = hidden_type(torch.tensor([key]), types).item()
        rows = [
            [A + a, *key[:2], B + b, *key[2:], END]
            for a, b in itertools.product(range(OPTIONS), (0, 1, 60, OPTIONS - 1))
        ]
        rewards = problem.rewards(torch.tensor([key] * len(rows)), torch.tensor(rows)).view(OPTIONS, 4)
        expected = torch.tensor([float(a in solved_by(name, kind)) for a in range(OPTIONS)])
        assert torch.equal(rewards, expected.unsqueeze(1).expand(-1, 4)), (name, key, kind)


@pytest.mark.parametrize("name", NAMES)
def test_a_single_wrong_token_makes_a_right_completion_wrong(name):
    problem = PROBLEMS[name]()
    types = 8 + {"detours": 8, "traps": 2}[name]
    key = problem.prompts[0]
    option = min(solved_by(name, hidden_type(key.unsqueeze(0), types).item()))
    right = torch.tensor([A + option, *key[:2].tolist(), B + 5, *key[2:].tolist(), END])
    assert problem.rewards(key.unsqueeze(0), right.unsqueeze(0)).item() == 1
    for place in range(7):
        others = torch.tensor([t for t in range(problem.vocabulary) if t != right[place]])
        rows = right.repeat(len(others), 1)
        rows[:, place] = others
        rewards = problem.rewards(key.expand(len(rows), -1), rows)
        if place == 0:
            allowed = {A + a for a in solved_by(name, hidden_type(key.unsqueeze(0), types).item())}
        else:
            allowed = set(range(B, B + OPTIONS)) if place == 3 else set()
        assert {t for t, r in zip(others.tolist(), rewards.tolist(), strict=True) if r} == allowed - {
            right[place].item()
        }
    assert problem.rewards(key.unsqueeze(0), torch.full((1, 7), PAD)).item() == 0


def test_types_are_even_and_tell_nothing_by_single_symbols():
    keys = detours().prompts
    kinds = hidden_type(keys, 16)
    count = torch.bincount(kinds, minlength=16)
    expected = len(keys) / 16
    # χ² with 15 degrees of freedom: 37.7 is its 99.9% quantile
    assert ((count - expected) ** 2 / expected).sum() < 37.7
    for place in range(4):
        table = torch.zeros(29, 16).index_put_((keys[:, place] - FIRST, kinds), torch.ones(len(keys)), accumulate=True)
        even = table.sum(1, keepdim=True) / 16
        assert ((table - even) ** 2 / even).sum() < 29 * 15 + 4 * (2 * 29 * 15) ** 0.5  # mean and 4 deviations of χ²


@pytest.mark.parametrize("name", NAMES)
def test_no_prompt_is_in_two_sets_and_the_demonstrations_know_no_reward(name):
    problem = PROBLEMS[name]()
    assert problem.tuning is not None
    tuning = problem.for_tuning()
    sets = [
        problem.prompts,
        problem.held_out,
        tuning.prompts,
        tuning.held_out,
        problem.demonstrations[:, :4].unique(dim=0),
    ]
    keys = [{tuple(key) for key in x.tolist()} for x in sets]
    assert [len(k) for k in keys] == [len(x) for x in sets] == [4096, 128, 4096, 128, 8192]
    assert sum(map(len, keys)) == len(set.union(*keys))
    assert torch.equal(traps().demonstrations, detours().demonstrations)
    first = torch.bincount(problem.demonstrations[:, 4] - A, minlength=OPTIONS) / len(problem.demonstrations)
    # four standard errors of a share: 24576 demonstrations
    assert abs(first[0] - 0.9) < 4 * (0.09 / 24576) ** 0.5
    assert abs(first[1:9].sum() - 0.064) < 4 * (0.064 / 24576) ** 0.5
    assert (first > 0).sum() > 80


def test_a_vocabulary_that_is_too_small_is_refused():
    with pytest.raises(
        ValueError, match=r"prompts has tokens from 3 to 31; with vocabulary=20, tokens are from 0 to 19"
    ):
        replace(detours(), vocabulary=20)


def test_only_problems_with_prompts_for_tuning_have_that_split():
    with pytest.raises(ValueError, match="paths has no prompts for tuning"):
        PROBLEMS["paths"]().for_tuning()
    with pytest.raises(ValueError, match="split: got 'tune'; choose report or tuning"):
        Setting("detours", split="tune")


def setting(**changes):
    small = {"updates": 3, "prompts": 8, "group": 4, "epochs": 1, "minibatches": 4, "hidden_size": 32, "layers": 1}
    return Setting(**{"problem": "detours", **small, "warm_up_steps": 20, **changes})


def runs(seeds, rate=4e-4, warm_up=None):
    return [Run(OBJECTIVES["grpo"], rate, s, s if warm_up is None else warm_up) for s in seeds]


@pytest.mark.filterwarnings("error")
def test_warmed_up_models_have_the_profile_of_a_language_model():
    shared = setting(prompts=64, group=8, updates=2, split="tuning", warm_up_steps=None)
    loop = Loop(shared, runs((0, 1), rate=0.0))
    for result in loop.train():
        assert 0.6 < result.tokens[">=0.99"] < 0.8  # 5 of 7 tokens can be
        rare = [b for b in result.tokens if b in ("<1e-4", "1e-4:1e-3", "1e-3:0.01", "0.01:0.1")]
        share = sum(result.tokens[b] for b in rare)
        up, down = (sum(result.tokens[b] * result.pushed[side][b] for b in rare) / share for side in ("up", "down"))
        assert share > 0.01 and up > 0.05 and down > 0.05
        assert 0 < result.after["pass@16"] < 1
        assert 0.4 < result.after["entropy of fork 1"] < 1.0
        assert result.after["near-certain"] > 0.6
        assert result.before == result.after  # a rate of 0 changes nothing


def test_every_seed_has_a_warm_up_and_a_noise_of_its_own_and_both_problems_share_them():
    loop = Loop(setting(updates=1), runs((0, 1)))
    first, second = (torch.cat([w[i].flatten() for w in loop.stack.weights.values()]) for i in (0, 1))
    assert (first - second).abs().max() > 0.01
    assert not torch.equal(loop._evaluation_noise(8, 0), loop._evaluation_noise(8, 1))
    assert torch.equal(loop._evaluation_noise(8, 1), loop._evaluation_noise(8, 1))
    other = Loop(setting(problem="traps", updates=1), runs((0, 1)))
    assert all(torch.equal(w, other.stack.weights[name]) for name, w in loop.stack.weights.items())
    assert Checkpoint("detours", 0).path != Checkpoint("detours", 1).path


def test_the_splits_of_a_setting_have_other_prompts():
    report, tuning = (Loop(setting(split=split), runs((0,))) for split in ("report", "tuning"))
    seen, other = ({tuple(p) for p in loop._prompts()[0].tolist()} for loop in (report, tuning))
    assert not seen & other
    assert not torch.equal(report.problem.held_out, tuning.problem.held_out)


def test_pushes_are_counted_by_the_sign_of_the_advantage():
    loop = Loop(setting(), runs((0,)))
    tokens = torch.zeros(1, 2, 2, dtype=torch.int64)
    logprobs = torch.tensor([[[0.05, 0.995], [0.0005, 0.05]]]).log()
    mask = torch.tensor([[[True, True], [True, False]]])
    loop._count_pushes(Rollout(tokens, logprobs, mask), torch.tensor([[1.0, -1.0]]))
    up, down, every = loop._pushes[0]
    assert up.tolist() == [0, 0, 0, 1, 0, 0, 0, 1]
    assert down.tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert torch.equal(every, up + down)


@pytest.mark.parametrize("lag", [0, 2])
def test_it_is_deterministic_resumes_bit_for_bit_and_uses_old_weights(lag):
    def loop():
        made = Loop(setting(lag=lag), runs((0, 1)))  # a model of 20 steps has no reward: even tokens get one here
        made.problem = replace(made.problem, grade=lambda _, completions: (completions[:, 0] % 2 == 0).float())
        return made

    def flat(weights):
        return torch.cat([w.detach().flatten() for w in weights.values()])

    whole, cut, again = loop(), loop(), loop()
    results = whole.train()
    cut._evaluate("before")
    cut.update()
    started = flat(cut.stack.weights).clone()  # after the first of three rollouts
    again.load_state_dict(cut.state_dict())
    assert [vars(r) for r in again.train()] == [vars(r) for r in results]
    assert torch.equal(flat(again.stack.weights), flat(whole.stack.weights))
    third = flat(whole._sampler_weights())  # with a lag of 2, the third rollout is drawn from the weights at the start
    fresh = flat(loop().stack.weights)
    assert torch.equal(third, fresh if lag else flat(whole.stack.weights))
    assert not torch.equal(started, fresh) and not torch.equal(flat(whole.stack.weights), started)
