"""Exact experiments against closed forms, and the statistics against scipy and known values."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats

from bandpo import DCPO, KL, OBJECTIVES, TV, Band, Clip, Objective, RatioBounds
from bandpo.bounds import topk_divergence
from bandpo.lab.comparison.exact import (
    Tree,
    _scores,
    _top,
    largest_shift,
    on_bandits,
    run_tree,
    updates_to_common,
)
from bandpo.lab.comparison.sweeps import REUSE, bandit, realised
from bandpo.statistics import best_of_bootstrap, compare, holm, interval, iqm, wilson
from bandpo.terms import gradient_weight, token_objective


def test_where_a_tokens_own_gradient_stops():
    """Under a fixed clip after a shift of εp; in a ball after one that tends to q₀, and it never leaves the simplex.

    The place is found from the gradient itself: that of a token with A > 0 just before and just after the shift.
    """
    for bounds in (Clip(0.2), Clip(0.2, 0.28), Band(KL, 0.05, None), Band(TV, 0.05, None), DCPO(max_ratio=None)):
        p = torch.tensor([1e-6, 1e-4, 1e-2, 0.2], dtype=torch.float64)
        shift = torch.tensor(largest_shift(bounds, p.tolist()), dtype=torch.float64)
        for beside, weight in ((1 - 1e-9, 1.0), (1 + 1e-9, 0.0)):
            ratios = (p + shift * beside) / p
            assert gradient_weight(Objective(bounds=bounds), ratios, p, 1.0).tolist() == pytest.approx([weight] * 4)
    p = [1e-6, 1e-4, 1e-2, 0.5, 0.99]
    assert largest_shift(Clip(0.2, 0.28), p) == pytest.approx([min(0.28 * x, 1 - x) for x in p])
    assert largest_shift(Band(TV, 0.05, None), p) == pytest.approx([0.05, 0.05, 0.05, 0.05, 0.01])
    kl = largest_shift(Band(KL, 0.05, None), p)
    assert kl[0] == pytest.approx(1 - math.exp(-0.05), rel=1e-3)
    assert kl[3] == pytest.approx(0.5 * math.sqrt(1 - math.exp(-0.1)), rel=1e-9)
    assert largest_shift(DCPO(max_ratio=None), [1e-6])[0] == pytest.approx(math.sqrt(0.2 * 1e-6), rel=1e-2)
    assert updates_to_common(Clip(0.2), 1e-3) == math.ceil(math.log(500) / math.log(1.2))
    assert updates_to_common(Band(TV, 0.05, None), 1e-3) == 10
    assert updates_to_common(Clip(0.2, 0.0), 1e-3) == 10_000
    with pytest.raises(TypeError, match="no interval"):
        largest_shift(lambda logp: logp > 0, [0.5])


def test_one_step_passes_the_edge():
    """One SGD step at rate 1 on one token of p = 0.001 and A = 1.5: the softmax in numpy, and the loss of the library."""
    p, others, advantage = 1e-3, 1000, 1.5
    logits = torch.tensor(
        [math.log(p), *[math.log((1 - p) / others)] * others], dtype=torch.float64, requires_grad=True
    )
    old = logits.detach().log_softmax(-1)[:1].unsqueeze(0)
    value = token_objective(
        Objective(bounds=Clip(0.2)),
        logprobs=logits.log_softmax(-1)[:1].unsqueeze(0),
        old_logprobs=old,
        advantages=torch.tensor([[advantage]], dtype=torch.float64),
        mask=torch.ones(1, 1),
    ).value
    (step,) = torch.autograd.grad(value.sum(), logits)
    after = (logits.detach() + step).softmax(-1)[0].item()
    raised = p * math.exp(advantage * (1 - p))
    lowered = (1 - p) * math.exp(-advantage * (1 - p) / others)
    assert after == pytest.approx(raised / (raised + lowered), rel=1e-12)
    assert after == pytest.approx(0.0045, abs=5e-5)
    assert after > 3 * 1.2 * p


def test_tree_starts_as_told_and_pays_as_told():
    tree = Tree(arms=4, depth=2, rare=0.02, common=0.5)
    start = tree.start().softmax(-1)
    assert start.shape == (5, 4)
    torch.testing.assert_close(start[3], torch.tensor([0.02, 0.5, 0.24, 0.24]))
    ways = torch.tensor([[0, 0], [1, 1], [0, 1], [2, 3]])
    assert tree.rewards(ways).tolist() == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert tree.chance_of_best(tree.start()).item() == pytest.approx(0.0004, rel=1e-5)
    deep = Tree(arms=3, depth=3, rare=0.1, common=0.3)
    assert deep.chance_of_best(deep.start()).item() == pytest.approx(1e-3, rel=1e-5)
    for bad in ({"arms": 2}, {"depth": 5}, {"rare": 0.7}):
        with pytest.raises(ValueError, match="Tree"):
            dataclasses.replace(Tree(), **bad)


def test_top_k_of_a_bandit_is_its_whole_distribution():
    """With K >= arms, the divergence of dppo-topk-tv is the total variation of the two tables of a choice."""
    tree, g = Tree(arms=6, depth=2), torch.Generator().manual_seed(0)
    old, new = (torch.randn(5, tree.prefixes, 6, generator=g, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    tables = torch.randint(0, tree.prefixes, (5, 8, 2), generator=g)
    ways = torch.randint(0, 6, (5, 8, 2), generator=g)
    extras = _top(20, new, old, tables, ways)
    assert extras["sampled_in_topk"].all() and extras["topk_logprobs"].shape == (40, 2, 6)
    found = topk_divergence(TV, logprobs=_scores(new, tables, ways).flatten(0, 1),
                            old_logprobs=_scores(old, tables, ways).flatten(0, 1), **extras)  # fmt: skip
    for s in range(5):
        for row in range(8):
            for d in range(2):
                p, q = (x[s, tables[s, row, d]].exp() for x in (old, new))
                assert found.view(5, 8, 2)[s, row, d] == pytest.approx(0.5 * (p - q).abs().sum().item(), abs=1e-12)
    assert _top(None, new, old, tables, ways) == {}
    few = _top(2, new, old, tables, ways)
    assert few["old_topk_logprobs"].shape == (40, 2, 2) and not few["sampled_in_topk"].all()


def test_top_k_objectives_run_on_bandits_and_those_of_groups_do_not():
    on = {name for name, objective in OBJECTIVES.items() if on_bandits(objective)}
    assert {"dppo-topk-tv", "dppo-topk-kl", "grpo"} <= on and not {"gspo", "quatro-reading", "etr-reading"} & on
    for name in ("dppo-topk-tv", "dppo-topk-kl"):
        outcome = run_tree(Tree(), dataclasses.replace(OBJECTIVES[name], advantage="std"), seeds=50, batches=40)
        assert outcome.curve[-1].mean() > outcome.curve[0].mean() and outcome.curve.isfinite().all()


def test_tree_runs_are_deterministic_and_paired():
    kwargs = {"seeds": 50, "batches": 12}
    a, b = (run_tree(Tree(depth=2), OBJECTIVES["grpo"], **kwargs) for _ in range(2))
    assert torch.equal(a.curve, b.curve)
    assert (a.discovery <= 12).all() and a.curve.shape == (12, 50)
    with pytest.raises(ValueError, match="optimizer"):
        run_tree(Tree(), OBJECTIVES["grpo"], optimizer="rmsprop")


def test_with_one_step_for_a_rollout_every_trust_region_is_inert():
    """And with eight steps it is not: the same runs tell the regions apart, so that the equality is no accident."""
    curves = {
        (name, epochs, steps): run_tree(
            Tree(),
            dataclasses.replace(OBJECTIVES[name], advantage="std"),
            seeds=40,
            batches=10,
            epochs=epochs,
            minibatches=steps,
        ).curve
        for name in ("grpo", "bandpo-kl", "bandpo-tv", "dual-clip", "spo", "sapo", "aspo", "ppo-kl", "no-clip")
        for epochs, steps in ((1, 1), (2, 4))
    }
    for (name, epochs, steps), curve in curves.items():
        gap = (curve - curves["no-clip", epochs, steps]).abs().max().item()
        if (epochs, steps) == (1, 1):
            assert gap < 2e-4, name  # sapo's and ppo-kl's gradients at 1 round differently, and Adam divides by them
        elif name != "no-clip":
            assert gap > 1e-3, name


def test_without_a_signal_nothing_moves():
    flat = Tree(best=0.5, weak=0.5, other=0.5)
    outcome = run_tree(flat, OBJECTIVES["bandpo-kl"], seeds=20, batches=5)
    torch.testing.assert_close(outcome.curve, torch.full((5, 20), 0.01))


@pytest.mark.slow
def test_a_rare_best_arm_is_found_more_often_under_a_tv_band():
    """A regression test of an ordering that was measured, by wide margins: the TV band over GRPO over no clip."""
    found = {
        name: run_tree(Tree(), OBJECTIVES[name], seeds=400).commits.float().mean().item()
        for name in ("grpo", "bandpo-tv", "no-clip")
    }
    assert found["bandpo-tv"] > found["grpo"] + 0.08 > found["no-clip"] + 0.16


def test_a_gradient_step_of_the_tree_is_the_closed_form():
    """One SGD step on one group: θ += lr · mean over ways of A (1[a] - π), exactly."""
    tree, lr = Tree(arms=3, rare=0.2, common=0.5), 0.5
    outcome = run_tree(
        tree,
        Objective(bounds=Clip(0.2), advantage="mean"),
        learning_rate=lr,
        batches=1,
        queries=1,
        group=16,
        epochs=1,
        minibatches=1,
        seeds=3,
        optimizer="sgd",
        seed=7,
    )
    g = torch.Generator().manual_seed(7)
    noise = torch.rand(3, 16, 1, generator=g)
    policy = tree.start()[0].softmax(-1)
    arms = (policy.cumsum(-1) <= noise).sum(-1).clamp_max(2)
    rewards = tree.rewards(arms.unsqueeze(-1))
    advantages = rewards - rewards.mean(1, keepdim=True)
    step = (advantages.unsqueeze(-1) * (torch.nn.functional.one_hot(arms, 3) - policy)).mean(1)
    want = (tree.start()[0] + lr * step).softmax(-1)[:, 0]
    torch.testing.assert_close(outcome.curve[0], want, rtol=1e-5, atol=1e-7)


def test_realised_ratios_are_those_of_the_runs_that_drew_the_arm():
    """Against a loop in numpy: sampling, group advantages, clipped gradients and Adam written out for one setting."""
    found = realised(60)
    k = REUSE.index((1, 4))
    ratios = np.array(_by_hand(seeds=60, rate=0.1, steps=4))
    assert found["rarities"][0] == 0.01 and found["drawn"][0] == len(ratios)
    assert found["median"]["grpo"][0][1][k] == pytest.approx(np.median(ratios), rel=1e-4)
    assert found["high"]["grpo"][0][1][k] == pytest.approx(np.quantile(ratios, 0.95), rel=1e-4)
    assert found["beyond"]["grpo"][0][1][k][0] == pytest.approx((ratios > 1.2).mean())
    one_step = [found["median"][name][0][2][0] for name in found["median"]]
    assert one_step[0] == pytest.approx(one_step[1]) == pytest.approx(one_step[2])  # nothing is clipped at r = 1
    assert found["edge"]["grpo"][0] == pytest.approx(1.2)
    assert found["edge"]["bandpo-kl"][0] == pytest.approx(7.8098, abs=1e-4)
    assert realised(3) == {}  # too few to have drawn either arm


def test_the_clip_on_common_tokens_is_what_lets_the_rare_one_gain():
    def median(rare, common):
        def bounds(old):
            clipped = torch.where(old < -3, rare, common) > 0
            return RatioBounds(torch.where(clipped, 0.8, 0.0), torch.where(clipped, 1.2, 1e9))

        objective = Objective(bounds=bounds)
        found = bandit(objective, 1000, rare=0.01, batches=1, learning_rate=0.1, epochs=4, minibatches=8)
        return (found.curve[0] / 0.01)[found.discovery == 0].median().item()

    assert median(rare=0, common=1) == pytest.approx(3.20, abs=0.02)
    assert median(rare=1, common=1) == pytest.approx(1.61, abs=0.02)
    assert median(rare=0, common=0) == pytest.approx(0.52, abs=0.02)
    assert median(rare=1, common=0) == pytest.approx(0.51, abs=0.02)


def _by_hand(seeds, rate, steps):
    """The realised ratio of the first arm under GRPO's clip after one epoch of a rollout, for the seeds that drew it."""
    g = torch.Generator().manual_seed(0)
    noise = torch.rand(seeds, 64, 1, generator=g)[..., 0].numpy()
    order = torch.rand(seeds, 1, 64, generator=g).argsort(-1)[:, 0].numpy()
    start = np.array([0.01, 0.4, *[0.59 / 8] * 8])
    made = []
    for s in range(seeds):
        arms = np.minimum((np.cumsum(start)[None] <= noise[s][:, None]).sum(1), 9)
        rewards = np.where(arms == 0, 1.0, np.where(arms == 1, 0.6, 0.2)).reshape(8, 8)
        centred = rewards - rewards.mean(1, keepdims=True)
        std = rewards.std(1, ddof=1, keepdims=True)
        advantages = np.where(std > 1e-7, centred / (std + 1e-4), 0.0).ravel()
        theta, m, v = np.log(start), np.zeros(10), np.zeros(10)
        for t, part in enumerate(np.split(order[s], steps), start=1):
            policy = np.exp(theta) / np.exp(theta).sum()
            r, a = policy[arms[part]] / start[arms[part]], advantages[part]
            weight = np.where(((a > 0) & (r > 1.2)) | ((a < 0) & (r < 0.8)), 0.0, r * a)
            gradient = -(weight[:, None] * (np.eye(10)[arms[part]] - policy)).mean(0)
            m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
            theta = theta - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        if (arms == 0).any():
            made.append(np.exp(theta[0]) / np.exp(theta).sum() / 0.01)
    return made


def test_wilson_is_scipy_s():
    for k, n in ((0, 10), (3, 10), (90, 100), (1000, 1000)):
        want = scipy_stats.binomtest(k, n).proportion_ci(method="wilson")
        assert wilson(k, n) == pytest.approx((want.low, want.high), abs=1e-9)


def test_iqm_interval_and_comparison():
    rng = np.random.default_rng(0)
    x = rng.normal(size=12)
    assert iqm(x) == pytest.approx(np.mean(np.sort(x)[3:9]))
    found = interval(list(x))
    want = scipy_stats.bootstrap((x,), iqm, n_resamples=9999, rng=np.random.default_rng(0)).confidence_interval
    assert (found.low, found.high) == pytest.approx((want.low, want.high))
    assert interval([0.5] * 5) == (0.5, 0.5, 0.5)
    assert math.isnan(interval([1.0, 2.0]).low)
    base = rng.normal(size=10)
    results = {
        "base": list(base),
        "same": list(base),
        "better": list(base + 1 + 0.1 * rng.normal(size=10)),
        "noise": list(base + rng.normal(size=10)),
    }
    found = compare(results, "base")
    assert found["same"].p == 1 and found["same"].mean.value == 0
    assert found["better"].p == pytest.approx(2 / 2**10)  # the smallest that ten sign flips can give
    assert found["better"].p_holm == pytest.approx(3 * found["better"].p)
    difference = np.array(results["noise"]) - base
    assert found["noise"].effect == pytest.approx(difference.mean() / difference.std(ddof=1))
    flips = np.array(np.meshgrid(*[[-1, 1]] * 10)).reshape(10, -1).T @ difference
    assert found["noise"].p == pytest.approx((np.abs(flips) >= abs(difference.sum()) - 1e-12).mean())
    with pytest.raises(ValueError, match="baseline 'x'"):
        compare(results, "x")
    with pytest.raises(ValueError, match="cannot be paired"):
        compare({"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0]}, "a")


def test_holm_and_best_of_bootstrap():
    from statistics import fmean

    assert holm([]) == []
    assert holm([0.9, 0.01, 0.02]) == pytest.approx([0.9, 0.03, 0.04])
    one_of_32 = np.zeros((1, 32))
    one_of_32[0, 0] = 1
    draws = fmean(best_of_bootstrap(one_of_32, 32, seed=s) for s in range(20))
    assert draws == pytest.approx(1 - (31 / 32) ** 32, abs=0.02)  # not 1, as pass@32 would be


def test_the_old_place_of_wilson_warns():
    from bandpo.lab.comparison import exact

    with pytest.warns(FutureWarning, match=r"wilson is now bandpo\.statistics\.wilson"):
        assert exact.wilson is wilson
