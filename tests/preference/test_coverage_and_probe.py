"""Coverage, designs, samplers, the finite fit, probe and re-ranking."""

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bandpo.preference import (
    HybridDesign,
    LayerProbe,
    Offline,
    OnPolicy,
    batch_schedule,
    feature_covariance,
    feature_coverage,
    first_wins,
    fit_pairs,
    linear_softmax,
    mad_coverage,
    pool_hidden,
    preferential_g_optimal,
    relabel,
    rerank,
)  # fmt: skip
from bandpo.preference.probe import pair_accuracy

ONE = torch.ones(1, dtype=torch.float64)


def softmax_policy(seed, prompts, actions):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(prompts, actions, generator=g, dtype=torch.float64).softmax(-1)


# ---- coverage


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_coverage_of_two_arms(p, q):
    """C = p'(1 - p')/(p(1 - p))."""
    two = torch.eye(2, dtype=torch.float64).unsqueeze(0)
    pi, target = (torch.tensor([[x, 1 - x]], dtype=torch.float64) for x in (p, q))
    assert feature_coverage(pi, target, two, ONE).item() == pytest.approx(q * (1 - q) / (p * (1 - p)), rel=1e-9)


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_coverage_is_the_least_constant_and_below_the_largest_ratio(seed):
    g = torch.Generator().manual_seed(seed)
    phi = torch.randn(3, 5, 3, generator=g, dtype=torch.float64)
    x = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    pi, target = softmax_policy(seed, 3, 5), softmax_policy(seed + 1, 3, 5)
    c = feature_coverage(pi, target, phi, x)
    assert c <= (target / pi).max() + 1e-9
    gap = c * feature_covariance(pi, phi, x) - feature_covariance(target, phi, x)
    eigenvalues = torch.linalg.eigvalsh(gap)
    assert abs(eigenvalues[0]) < 1e-8 * eigenvalues[-1].clamp(min=1)  # V(π') ⪯ C V(π), and it touches


@given(st.integers(0, 10_000), st.floats(0.1, 3.0))
def test_coverage_near_the_optimum_is_bounded_by_the_distance(seed, r):
    """C*(r) <= e^{2r}, lemma B.8, with features of norm at most 1."""
    g = torch.Generator().manual_seed(seed)
    phi = torch.nn.functional.normalize(torch.randn(2, 4, 3, generator=g, dtype=torch.float64), dim=-1)
    x = torch.tensor([0.5, 0.5], dtype=torch.float64)
    base = softmax_policy(seed, 2, 4).log()
    theta = torch.randn(3, generator=g, dtype=torch.float64)
    step = torch.nn.functional.normalize(torch.randn(3, generator=g, dtype=torch.float64), dim=0) * r
    near, best = (linear_softmax(t, phi, base).exp() for t in (theta + step, theta))
    assert feature_coverage(near, best, phi, x) <= np.exp(2 * r) + 1e-9


def test_mad_coverage_by_hand():
    f = torch.tensor([[[0.0, 1.0]]], dtype=torch.float64)
    pi, target = (torch.tensor([[x, 1 - x]], dtype=torch.float64) for x in (0.9, 0.5))
    assert mad_coverage(pi, target, f, ONE).item() == pytest.approx(0.5 / 0.18)  # 2p(1-p)


# ---- design


@pytest.mark.parametrize(("prompts", "actions", "d", "seed"), [(1, 8, 3, 0), (5, 10, 3, 1), (6, 12, 4, 2)])
def test_designs_reach_kiefer_and_wolfowitz(prompts, actions, d, seed):
    phi = torch.randn(prompts, actions, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    design = preferential_g_optimal(phi)
    # Lifted leverage within (d+1)(1+1e-3) of the optimum d+1; it is at least d+1 for any design.
    assert (design.conditional >= d - 1e-9).all() and (design.conditional <= d + 1e-3 * (d + 1)).all()
    assert design.leverage <= d**2 * (1 + 1e-2)
    torch.testing.assert_close(design.actions.sum(1), torch.ones(prompts, dtype=torch.float64))
    assert design.prompts.sum().item() == pytest.approx(1)
    assert preferential_g_optimal(phi, prompts="uniform").prompts.tolist() == pytest.approx([1 / prompts] * prompts)


def test_design_of_one_prompt_agrees_with_direct_minimisation():
    phi = torch.randn(1, 6, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def worst(logits):
        w = torch.tensor(logits).softmax(0).unsqueeze(0)
        v = feature_covariance(w, phi, ONE)
        centred = phi[0] - (w.unsqueeze(-1) * phi).sum(1)
        return torch.einsum("ni,ij,nj->n", centred, torch.linalg.pinv(v), centred).max().item()

    best = min(
        scipy.optimize.minimize(worst, np.random.default_rng(s).normal(size=6), method="Nelder-Mead",
                                options={"maxiter": 4000}).fun
        for s in range(4)
    )  # fmt: skip
    assert preferential_g_optimal(phi).conditional.item() <= best + 3e-3


def test_directions_in_which_actions_do_not_differ_are_left_out():
    phi = torch.cat([torch.eye(4), torch.ones(4, 1)], 1).unsqueeze(0)
    assert preferential_g_optimal(phi).conditional.item() == pytest.approx(3.0, rel=1e-3)


def test_a_design_that_does_not_converge_says_so():
    phi = torch.randn(1, 9, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="not optimal after 2 steps"):
        preferential_g_optimal(phi, steps=2, tolerance=1e-9)


# ---- samplers


def frequencies(pairs, prompts, actions):
    cell = (pairs.prompts * actions + pairs.first) * actions + pairs.second
    return (
        torch.bincount(cell.flatten(), minlength=prompts * actions**2).double().view(prompts, actions, actions)
        / cell.numel()
    )


@pytest.mark.parametrize("pairing", ["iid_conditional", "same_component"])
def test_hybrid_sampler_draws_from_the_mixture(pairing):
    x = torch.tensor([0.3, 0.7], dtype=torch.float64)
    pi = softmax_policy(0, 2, 3)
    design = preferential_g_optimal(torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(1)))
    n = 200_000
    seen = frequencies(HybridDesign(x, design, 0.5, pairing)(pi, n, torch.Generator().manual_seed(0)), 2, 3)
    halves = (x, pi), (design.prompts, design.actions)
    if pairing == "same_component":
        expected = sum(0.5 * torch.einsum("x,xa,xb->xab", m, p, p) for m, p in halves)
    else:
        joint = sum(0.5 * m[:, None] * p for m, p in halves)
        marginal = joint.sum(1)
        expected = torch.einsum("x,xa,xb->xab", marginal, joint / marginal[:, None], joint / marginal[:, None])
    assert ((seen - expected).abs() <= 5 * (expected / n).sqrt() + 5 / n).all()


def test_on_policy_follows_the_policy_and_offline_does_not():
    x, g = ONE, torch.Generator().manual_seed(0)
    sure = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)  # two seeds, one prompt
    drawn = OnPolicy(x)(sure, 50, g)
    assert (drawn.first[0] == 0).all() and (drawn.second[1] == 1).all()
    assert (Offline(x, sure[0])(sure, 50, g).first == 0).all()


def test_labels_follow_bradley_terry():
    gap = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64).repeat_interleave(100_000)
    wins = first_wins(gap, generator=torch.Generator().manual_seed(0)).view(3, -1).double().mean(1)
    expected = gap.view(3, -1)[:, 0].sigmoid()
    assert ((wins - expected).abs() < 5 * (0.25 / 100_000) ** 0.5).all()


def test_fit_of_two_arms_is_the_logit_of_the_share_of_wins():
    theta = fit_pairs(torch.tensor([[1.0, -1.0]], dtype=torch.float64), torch.tensor([30.0]).double(),
                      torch.tensor([10.0]).double(), beta=0.5, radius=100.0)  # fmt: skip
    assert (0.5 * (theta[0] - theta[1])).item() == pytest.approx(np.log(3.0), rel=1e-6)


def test_fit_stays_in_the_ball_and_is_the_best_there():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, generator=g, dtype=torch.float64)
    wins = torch.randint(1, 30, (12,), generator=g).double()
    losses = torch.zeros(12, dtype=torch.float64)  # never lost: without the ball θ runs away
    theta = fit_pairs(x, wins, losses, beta=0.4, radius=2.0)

    def cost(t):
        return float((wins * torch.nn.functional.softplus(-0.4 * (x @ torch.tensor(t)))).sum() / wins.sum())

    best = scipy.optimize.minimize(cost, np.zeros(3), method="SLSQP", options={"ftol": 1e-14, "maxiter": 500},
                                   constraints={"type": "ineq", "fun": lambda t: 4 - t @ t})  # fmt: skip
    assert theta.norm() <= 2 + 1e-9
    assert cost(theta.numpy()) <= best.fun + 1e-7


def test_schedule_of_batches():
    assert batch_schedule(1000, 4, last=50, growth=0.5, power=2.0) == [1000, 250, 63, 50]
    with pytest.raises(ValueError, match="growth"):
        batch_schedule(1000, 4, last=50, growth=1.5)


# ---- probe and re-ranking


def planted(pairs, seed, layers=8, width=16, informative=(1, 4, 6)):
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(len(informative), width, generator=torch.Generator().manual_seed(99))
    hidden = torch.randn(2, pairs, layers, width, generator=g)
    for layer, direction in zip(informative, directions, strict=True):
        hidden[0, :, layer] += 0.5 * direction / direction.norm() * 2
        hidden[1, :, layer] -= 0.5 * direction / direction.norm() * 2
    return hidden[0], hidden[1]


def test_the_probe_finds_the_layers_that_know():
    probe = LayerProbe(8, 16)
    probe.fit(*planted(540, 0))
    chosen, rejected = planted(2000, 1)
    # The best any rule can do: three layers tell the sides apart by 2 each, in unit noise on both, Φ(6/√6) = 0.993.
    assert pair_accuracy(probe(chosen), probe(rejected)) > 0.993 - 0.02
    norms = probe.weight.detach().norm(dim=1)
    assert norms[[1, 4, 6]].min() > norms[[0, 2, 3, 5, 7]].max()


@pytest.mark.parametrize("how", ["last", "mean"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_does_not_see_padding(how, side):
    g = torch.Generator().manual_seed(0)
    real = [torch.randn(n, 4, generator=g) for n in (2, 5, 3)]
    hidden, mask = torch.full((3, 7, 4), 1e6), torch.zeros(3, 7)
    for i, h in enumerate(real):
        place = slice(0, len(h)) if side == "right" else slice(7 - len(h), 7)
        hidden[i, place], mask[i, place] = h, 1
    expected = torch.stack([h[-1] if how == "last" else h.mean(0) for h in real])
    torch.testing.assert_close(pool_hidden([hidden, 2 * hidden], mask, how), torch.stack([expected, 2 * expected], 1))


def test_a_sequence_without_tokens_is_named():
    with pytest.raises(ValueError, match="sequence 1"):
        pool_hidden([torch.zeros(2, 3, 4)], torch.tensor([[1, 1, 0], [0, 0, 0]]))


@given(st.integers(0, 10_000), st.integers(1, 4))
def test_reranking_pairs_the_best_with_the_worst(seed, k):
    scores = torch.randint(0, 6, (5, 8), generator=torch.Generator().manual_seed(seed)).double()
    scores[0, 3] = torch.nan
    found = rerank(scores, top=k, bottom=k)
    chosen, rejected = scores[found.group, found.chosen], scores[found.group, found.rejected]
    assert (chosen - rejected == found.gap).all() and (found.gap > 0).all()
    for g in range(5):
        values = sorted(v for v in scores[g].tolist() if v == v)
        expected = [a - b for a, b in zip(values[::-1][:k], values[:k], strict=False) if a > b]
        assert found.gap[found.group == g].tolist() == expected


def test_all_against_all_and_mistakes():
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    every = rerank(scores, top=2, bottom=2, matching="all")
    assert set(zip(every.chosen.tolist(), every.rejected.tolist(), strict=True)) == {(0, 3), (0, 1), (2, 3), (2, 1)}
    with pytest.raises(ValueError, match="fit into a group"):
        rerank(scores, top=3, bottom=2)
    assert relabel(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).tolist() == [False, True]
