"""The dual of the KL ball against scipy and its own KKT conditions; the other statistics of groups by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from bandpo import OBJECTIVES, group_advantages, policy_loss
from bandpo.groups import group_signal, informative, kl_dual, soft_overlong

groups = st.lists(st.floats(-3, 3).map(lambda x: round(x, 3)), min_size=2, max_size=12)
radii = st.floats(1e-4, 1.0)


def log_mean_exp(x):
    return np.log(np.mean(np.exp(x - x.max()))) + x.max()


@settings(deadline=None, max_examples=60)
@given(groups, radii)
def test_dual_is_optimal_and_satisfies_kkt(values, radius):
    a = np.array(values)
    dual, baseline = (x.item() for x in kl_dual(torch.tensor(values, dtype=torch.float64), radius))
    spread = a.max() - a.min()
    if spread == 0:
        assert (dual, baseline) == (0, a[0])
        return
    rho = np.exp((a - baseline) / dual)
    assert np.mean(rho) == pytest.approx(1, rel=1e-9)  # primal: a distribution
    kl = np.mean(rho * np.log(rho))
    slack = math.log(len(a) / (a == a.max()).sum()) <= radius
    floor = 0.05 * spread
    if dual > floor * (1 + 1e-9):
        assert not slack
        assert kl == pytest.approx(radius, rel=1e-8)  # complementary slackness
        # dual: no λ does better (a minimum is seen to √ε only, so compare values, not places)
        value = dual * radius + dual * log_mean_exp(a / dual)
        best = minimize_scalar(
            lambda t: math.exp(t) * (radius + log_mean_exp(a / math.exp(t))), bounds=(-8, 8), method="bounded",
            options={"xatol": 1e-10},
        )  # fmt: skip
        assert value <= best.fun + 1e-12 * max(1, abs(best.fun))
        assert value == pytest.approx(np.mean(rho * a), rel=1e-7, abs=1e-9)  # strong duality
    else:  # the constraint is slack, or nearly so: λ stands at its floor and the ball is respected
        assert dual == pytest.approx(floor, rel=1e-9)
        assert kl <= radius * (1 + 1e-9)


@settings(deadline=None, max_examples=40)
@given(groups, radii, st.floats(0.01, 100), st.floats(-10, 10))
def test_dual_scales_with_rewards_and_ignores_a_shift(values, radius, scale, shift):
    a = torch.tensor(values, dtype=torch.float64)
    if a.max() - a.min() < 0.1:  # else rounding of the shift is not small
        return
    dual, baseline = kl_dual(a, radius)
    other, moved = kl_dual(scale * a + shift, radius)
    torch.testing.assert_close(other, scale * dual, rtol=1e-9, atol=0)
    torch.testing.assert_close(moved, scale * baseline + shift, rtol=1e-9, atol=1e-9)


def test_known_values():
    """G = 8, radius 0.05, k right answers: numbers from an independent derivation."""
    for k, want in ((1, 1.255), (2, 1.497), (4, 1.541), (7, 0.729)):
        rewards = torch.tensor([1.0] * k + [0.0] * (8 - k), dtype=torch.float64)
        for advantages in (rewards, rewards - rewards.mean()):
            assert kl_dual(advantages, 0.05).dual.item() == pytest.approx(want, abs=6e-4)


def test_small_radius_is_the_std_normalisation_of_grpo():
    g = torch.Generator().manual_seed(0)
    rewards = torch.rand(16, generator=g, dtype=torch.float64)
    std = rewards.std(correction=0)
    for radius, within in ((1e-4, 2e-2), (1e-6, 2e-3), (1e-8, 2e-4)):
        dual = kl_dual(rewards, radius).dual
        assert (dual * math.sqrt(2 * radius) / std).item() == pytest.approx(1, abs=within)
    # hence the step of the first gradient, A/λ, is GRPO's up to one factor
    normalised = group_advantages(rewards, 16, kind="std")
    step = (rewards - rewards.mean()) / dual
    torch.testing.assert_close(step / step.norm(), normalised / normalised.norm(), rtol=1e-6, atol=0)


def test_infeasible_groups():
    one = kl_dual(torch.tensor([[1.0, 0, 0, 0], [2, 2, 2, 2], [0, 0, 0, -1]]), 5.0)
    assert one.dual.flatten().tolist() == pytest.approx([0.05, 0.0, 0.05])  # slack: λ at its floor
    assert one.baseline[1] == 2
    assert kl_dual(torch.tensor([1.0, 0.0]), 0.05, floor=3.0).dual == 3
    for bad in ({"radius": 0.0}, {"radius": math.nan}, {"floor": -1.0}):
        with pytest.raises(ValueError, match="positive numbers"):
            kl_dual(torch.ones(4), **bad)


def test_gradient_ascent_on_the_reading_of_quatro_finds_the_solution():
    """A softmax over the group's own samples, π_old uniform: the stationary point is ρ* = exp((A - b)/λ), and in the ball."""
    rewards = torch.tensor([1.0, 0.6, 0.1, 0.0, 0.0, 0.3], dtype=torch.float64)
    advantages, n = rewards - rewards.mean(), len(rewards)
    objective = OBJECTIVES["quatro-reading"]
    extras = objective.group_inputs(rewards, advantages, n)
    theta = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([theta], max_iter=200, tolerance_grad=1e-13, tolerance_change=1e-16)
    old = torch.full((n, 1), -math.log(n), dtype=torch.float64)

    def closure():
        optimiser.zero_grad()
        loss, _ = policy_loss(
            logprobs=theta.log_softmax(0).unsqueeze(1), old_logprobs=old, advantages=advantages, mask=torch.ones(n, 1),
            objective=objective, extras=extras,
        )  # fmt: skip
        loss.backward()
        return loss

    optimiser.step(closure)
    rho = (theta.log_softmax(0).exp() * n).detach()
    want = ((advantages - extras["baseline"]) / extras["dual"]).exp()
    torch.testing.assert_close(rho, want, rtol=1e-6, atol=0)
    assert (rho * rho.log()).mean().item() == pytest.approx(0.05, rel=1e-6)


def test_signal_informative_and_overlong():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    q = rewards.mean(1)
    torch.testing.assert_close(group_signal(rewards).flatten(), 4 * q * (1 - q))
    torch.testing.assert_close(group_signal(10 * rewards, reward_range=10.0), group_signal(rewards))
    assert (group_signal(10 * rewards) <= 1).all()
    assert informative(rewards.flatten(), 4).view(3, 4)[:, 0].tolist() == [True, True, False]
    lengths = torch.tensor([0, 16384, 16385, 18432, 20480, 30000])
    penalty = soft_overlong(lengths, max_length=20480, buffer=4096)
    assert penalty.tolist() == pytest.approx([0, 0, -1 / 4096, -0.5, -1, -1])
    for call, words in (
        (lambda: soft_overlong(lengths, max_length=10, buffer=11), "buffer=11"),
        (lambda: informative(torch.ones(7), 4), "groups of 4"),
        (lambda: group_signal(rewards, reward_range=0.0), "reward_range"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_soft_overlong_is_trl_s():
    from trl.rewards import get_soft_overlong_punishment

    theirs = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    lengths = list(range(0, 130, 7))
    want = theirs(completion_ids=[[0] * n for n in lengths])
    assert soft_overlong(torch.tensor(lengths), max_length=100, buffer=20).tolist() == pytest.approx(want)
