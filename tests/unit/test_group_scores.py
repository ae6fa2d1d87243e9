"""Groups of rewards: unscored ones take no part, equal ones give exactly 0, groups may be uneven and in any order."""

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bandpo import OBJECTIVES, Objective, group_advantages, policy_loss
from bandpo.bounds import Clip
from bandpo.groups import AdvantageKind, Groups, group_signal, informative, kl_dual
from bandpo.lab.comparison.exact import Tree, run_tree
from bandpo.selection import Informative

KINDS = AdvantageKind.__args__
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
nan = math.nan


def by_statistics(group, kind, eps=1e-4):
    """Advantages of one group by Python's statistics module, in exact fractions where it can."""
    known = [x for x in group if math.isfinite(x)]
    if len(set(known)) < 2:
        return [0.0] * len(group)
    mean = statistics.mean(known)
    out = []
    for x in group:
        if not math.isfinite(x):
            out.append(0.0)
        elif kind == "std":
            out.append((x - mean) / (statistics.stdev(known) + eps))
        elif kind == "mean":
            out.append(x - mean)
        else:
            out.append(x - (sum(known) - x) / (len(known) - 1))
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3, 5, 7, 16, 63])
def test_equal_rewards_have_no_advantage_at_any_magnitude(size, kind, dtype):
    top = torch.finfo(dtype).max
    values = [0.0, 0.1, -1 / 3, 10.0, 100.0, 1e3, 12345.678, -0.7e-7, 1e10, 1e37, top, -top, torch.finfo(dtype).tiny]
    for value in values:
        rewards = torch.full((size,), value).to(dtype) if abs(value) < 3e38 else torch.full((size,), value, dtype=dtype)
        if rewards.isfinite().all():
            assert (group_advantages(rewards, size, kind=kind) == 0).all(), value
            assert group_signal(rewards).item() == 0
            assert not informative(rewards, size).any()
            dual, baseline = kl_dual(rewards)
            assert dual == 0 and baseline == rewards[0]


def test_the_numbers_of_the_report():
    """Equal rewards of 12345.678 gave -0.846 each; [1, nan, 0, 0] gave NaN for all."""
    assert (group_advantages(torch.full((7,), 12345.678), 7) == 0).all()
    got = group_advantages(torch.tensor([1.0, nan, 0.0, 0.0]), 4)
    assert got.tolist() == pytest.approx(by_statistics([1.0, nan, 0.0, 0.0], "std"), rel=1e-6)
    assert got[1] == 0
    assert not informative(torch.tensor([nan, nan, 1.0, nan]), 4).any()
    assert not informative(torch.tensor([nan] * 4), 4).any()
    assert informative(torch.tensor([nan, 2.0, 1.0, nan]), 4).all()


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.floats(-1e6, 1e6).map(lambda x: float(np.float32(x))), st.sampled_from([0.0, 1.0, nan, math.inf, -math.inf])
        ),
        min_size=2, max_size=9,
    ),
    st.sampled_from(KINDS),
)  # fmt: skip
def test_scored_ones_are_a_group_of_their_own(group, kind):
    x = torch.tensor(group, dtype=torch.float64)
    got = group_advantages(x, len(group), kind=kind)
    scale = max([abs(v) for v in group if math.isfinite(v)], default=0.0)
    np.testing.assert_allclose(got.numpy(), by_statistics(group, kind), rtol=1e-9, atol=1e-12 * (1 + scale))
    known = x.isfinite()
    assert (got[~known] == 0).all()
    if known.sum() >= 2:
        alone = group_advantages(x[known], int(known.sum()), kind=kind)
        torch.testing.assert_close(got[known], alone, rtol=1e-12, atol=1e-12 * (1 + scale))
        assert torch.equal(informative(x, len(group)).all(), informative(x[known], int(known.sum())).all())
        torch.testing.assert_close(
            group_signal(x, reward_range=1e6), group_signal(x[known], reward_range=1e6), rtol=1e-12, atol=0
        )
        for a, b in zip(kl_dual(x), kl_dual(x[known]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    else:
        assert (got == 0).all() and group_signal(x) == 0 and not informative(x, len(group)).any()


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(KINDS))
def test_ids_in_any_order_are_the_groups_by_themselves(data, kind):
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    values = [st.one_of(st.floats(-9, 9), st.just(nan)) for _ in range(sum(sizes))]
    rewards = torch.tensor([data.draw(v) for v in values], dtype=torch.float64)
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    order = torch.tensor(data.draw(st.permutations(range(len(ids)))))
    want = torch.cat([
        group_advantages(part, len(part), kind=kind) if len(part) > 1 else torch.zeros_like(part)
        for part in rewards.split(sizes)
    ])  # fmt: skip
    for shuffled in (ids[order] * 7 - 3, [f"prompt {i}" for i in ids[order].tolist()], ids[order].numpy()):
        got = group_advantages(rewards[order], group_ids=shuffled, kind=kind)
        torch.testing.assert_close(got, want[order], rtol=1e-12, atol=1e-14)
        one = informative(rewards[order], group_ids=shuffled)
        assert torch.equal(one, torch.cat([informative(p, len(p)) for p in rewards.split(sizes)])[order])


def test_groups_of_4_2_and_3():
    rewards = torch.tensor([1.0, 0, 0, 1, 5, 7, 2, 2, 2])
    ids = [0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert group_advantages(rewards, group_ids=ids, kind="mean").tolist() == [0.5, -0.5, -0.5, 0.5, -1, 1, 0, 0, 0]
    assert informative(rewards, group_ids=ids).tolist() == [True] * 6 + [False] * 3
    even = group_advantages(rewards[:8], 2)
    assert torch.equal(even, group_advantages(rewards[:8], group_ids=torch.arange(8) // 2))
    assert group_advantages(torch.empty(0), group_ids=[]).shape == (0,)
    assert group_advantages(torch.empty(0), 4).shape == (0,)
    assert group_advantages(torch.tensor([5.0, 1.0]), group_ids=["a", "b"]).tolist() == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_difference_on_a_large_reward_is_kept(kind):
    """In float32 the mean of rewards near 1e6 is off by more than their difference."""
    group = [1e6 + 0.0625 * i for i in (0, 1, 1, 3, 7)]
    got = group_advantages(torch.tensor(group), 5, kind=kind)
    np.testing.assert_allclose(got.double().numpy(), by_statistics(group, kind), rtol=1e-6)


@pytest.mark.parametrize("value", [1e-30, 1e30, 1e200, 1e-200])
def test_signal_survives_squares_that_overflow_or_vanish(value):
    got = group_advantages(torch.tensor([value, 0.0, 0.0], dtype=torch.float64), 3, eps=0.0)
    assert got.tolist() == pytest.approx(by_statistics([1.0, 0.0, 0.0], "std", eps=0.0), rel=1e-12)


@pytest.mark.parametrize("kwargs", [{"group_size": 4}, {"group_ids": [0, 0, 1, 1, 0, 0, 1, 1]}])
def test_extras_of_groups(kwargs):
    """Unscored completions take no part, and their own extras are 0, so that a Lagrangian does not move them."""
    rewards = torch.tensor([1.0, 0.0, nan, 0.0, 1.0, 1.0, nan, 1.0])
    advantages = group_advantages(rewards, **kwargs)
    ids = torch.tensor(kwargs.get("group_ids", [0, 0, 0, 0, 1, 1, 1, 1]))
    dual = OBJECTIVES["quatro-reading"].group_inputs(rewards, advantages, **kwargs)
    signal = OBJECTIVES["etr-reading"].group_inputs(rewards, advantages, **kwargs)["signal"]
    for i in (0, 1):
        mine = ids == i
        known = mine & rewards.isfinite()
        alone = kl_dual(advantages[known].unsqueeze(0))
        torch.testing.assert_close(dual["dual"][known], alone.dual[0].expand(int(known.sum())))
        torch.testing.assert_close(dual["baseline"][known], alone.baseline[0].expand(int(known.sum())))
        torch.testing.assert_close(signal[known], group_signal(rewards[known].unsqueeze(0))[0].expand(int(known.sum())))
    unscored = rewards.isnan()
    assert (
        (dual["dual"][unscored] == 0).all()
        and (dual["baseline"][unscored] == 0).all()
        and (signal[unscored] == 0).all()
    )
    x = torch.full((8, 3), -1.0, requires_grad=True)
    for name, extras in (("quatro-reading", dual), ("etr-reading", {"signal": signal})):
        loss, metrics = policy_loss(
            logprobs=x, old_logprobs=torch.full((8, 3), -1.1), advantages=advantages, mask=torch.ones(8, 3), objective=name,
            extras=extras,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss.isfinite() and (gradient[unscored] == 0).all() and metrics["nonfinite_fraction"] == 0


def test_statistics_of_a_user_see_nan_where_nothing_is_scored():
    seen = {}

    def stats(rewards, advantages):
        seen["rewards"], seen["advantages"] = rewards, advantages
        return {"top": rewards.nan_to_num(-1.0).amax(1, keepdim=True)}

    objective = Objective(bounds=Clip(), group_stats=stats)
    out = objective.group_inputs(
        torch.tensor([2.0, nan, 1.0]), torch.tensor([1.0, 0.0, 0.0]), group_ids=["a", "a", "b"]
    )
    assert out["top"].tolist() == [2.0, 0.0, 1.0]
    assert seen["rewards"].isnan().tolist() == [[False, True], [False, True]]
    assert seen["advantages"].isnan().tolist() == [[False, True], [False, True]]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda r: group_advantages(r), ValueError, "group_size=None.*or group_ids"),
        (lambda r: group_advantages(r, 4, group_ids=[0] * 8), ValueError, "not both"),
        (lambda r: group_advantages(r, group_ids=[0] * 7), ValueError, "8 completions need as many ids.*got 7"),
        (lambda r: group_advantages(r, group_ids=torch.zeros(8)), TypeError, "integer dtype, got torch.float32"),
        (lambda r: group_advantages(r, group_ids=torch.zeros(4, 2, dtype=torch.int64)), ValueError, "one dimension"),
        (lambda r: group_advantages(r, group_ids="abcdefgh"), TypeError, "list with an id for each"),
        (lambda r: group_advantages(r, group_ids=5), TypeError, "list with an id for each"),
        (lambda r: group_advantages(r, group_ids=[0] * 7 + [nan]), ValueError, r"group_ids\[7\] is nan"),
        (lambda r: group_advantages(r, group_ids=[None] + [0] * 7), ValueError, r"group_ids\[0\] is None"),
        (lambda r: group_advantages(r, group_ids=[[0]] * 8), TypeError, "hashable"),
        (lambda r: group_advantages(r, 4, eps=-1.0), ValueError, "eps.*-1"),
        (lambda r: group_advantages(r, 4, eps=nan), ValueError, "eps.*nan"),
        (lambda r: group_advantages(r.view(2, 4), 4), ValueError, r"shape \(2, 4\)"),
        (lambda r: group_advantages(r.long(), 4), TypeError, "float"),
        (lambda r: informative(r), ValueError, "group_size=None"),
        (lambda r: OBJECTIVES["etr-reading"].group_inputs(r, r), ValueError, "group_size=None"),
        (
            lambda r: OBJECTIVES["etr-reading"].group_inputs(r.long(), r, 4),
            TypeError,
            "rewards must have a float dtype",
        ),
    ],
)
def test_mistakes_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.ones(8))


def test_tables_and_back():
    x = torch.arange(6.0)
    groups = Groups(6, group_ids=[3, 1, 3, 3, 2, 1])
    assert groups.table(x).nan_to_num(-1).tolist() == [[0, 2, 3], [1, 5, -1], [4, -1, -1]]
    assert torch.equal(groups.flat(groups.table(x)), x)
    assert groups.flat(torch.tensor([[10.0], [20.0], [30.0]])).tolist() == [10, 20, 10, 10, 30, 20]


def test_a_selector_leaves_unscored_ones_out_of_the_comparison():
    rewards = torch.tensor([[1.0, nan, 1.0], [1.0, nan, 0.0]])
    assert Informative()(rewards, rewards).keep.tolist() == [[False] * 3, [True] * 3]


def test_the_lab_s_tree_does_not_move_without_signal():
    """Every way has the same reward: no group has signal, and the policy stays where it is."""
    tree = Tree(best=0.2, weak=0.2, other=0.2)
    outcome = run_tree(tree, OBJECTIVES["no-clip"], batches=5, seeds=20, group=7)
    torch.testing.assert_close(outcome.curve[-1], torch.full((20,), 0.01), rtol=1e-5, atol=0)


def test_the_lab_s_tree_takes_the_objective_s_own_advantage():
    kinds = [
        run_tree(Tree(), Objective(bounds=Clip(), advantage=kind), batches=4, seeds=30, optimizer="sgd").curve
        for kind in ("mean", "leave-one-out")
    ]
    assert not torch.equal(*kinds)
