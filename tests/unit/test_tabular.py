"""Deterministic tabular PPO-Clip (arXiv:2512.16565): exact gradients, its rates, and where it fails."""

import math

import numpy as np
import pytest
import torch

from bandpo import KL, Band, Clip
from bandpo.lab.experiments.tabular import Problem, ppo_clip, random_mdp, safe_step_sum


def problem(regularizer, seed=0, strength=0.2):
    g = torch.Generator().manual_seed(7)
    reference = torch.randn(5, 4, generator=g, dtype=torch.float64).softmax(-1)
    return Problem(random_mdp(seed=seed), reference, strength, regularizer)


def gaps(p, steps):
    best = p.optimum()[0].item()
    return np.array([best - s.value for s in steps])


@pytest.mark.parametrize("regularizer", ["forward", "reverse"])
def test_optimum_beats_its_neighbours_and_is_stationary(regularizer):
    p = problem(regularizer)
    best, policy = p.optimum()
    torch.testing.assert_close(policy.sum(-1), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(p.evaluate(policy.log()).value, best, rtol=1e-12, atol=0)
    g = torch.Generator().manual_seed(0)
    for scale in (1e-3, 0.1, 1.0):
        noise = scale * torch.randn(5, 4, generator=g, dtype=torch.float64)
        assert p.evaluate((policy.log() + noise).log_softmax(-1)).value < best
    steps, _ = ppo_clip(p, outer=1, inner=1, start=policy.log())
    assert steps[0].squared_gradient < 1e-20


@pytest.mark.parametrize("regularizer", ["forward", "reverse"])
def test_inner_gradient_is_the_gradient_of_the_value(regularizer):
    p = problem(regularizer)
    theta = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, moved = ppo_clip(p, outer=1, inner=1, step_size=1.0, start=theta)
    gradient = moved - theta
    h = 1e-6
    for s, a in ((0, 0), (2, 3), (4, 1)):
        unit = torch.zeros_like(theta)
        unit[s, a] = h
        up, down = (p.evaluate((theta + sign * unit).log_softmax(-1)).value for sign in (1, -1))
        assert gradient[s, a].item() == pytest.approx(((up - down) / (2 * h)).item(), rel=1e-6)


def test_a_single_inner_step_is_never_clipped():
    steps, _ = ppo_clip(problem("forward"), outer=30, inner=1, step_size=1e-4)
    assert {s.clip_fraction for s in steps} == {0.0}


@pytest.mark.slow
def test_forward_kl_converges_to_the_global_optimum_at_a_linear_rate():
    for seed in (0, 1):
        p = problem("forward", seed)
        steps, theta = ppo_clip(p, outer=350)
        gap = gaps(p, steps)
        assert (np.diff(gap) < 1e-14).all()  # monotone
        assert gap[-1] < 1e-8 < 0.4 < gap[0]
        tail = slice(200, None) if seed == 0 else slice(120, None)  # once the plateaus of the start are left
        logs = np.log(gap[tail])
        n = np.arange(len(logs))
        slope, intercept = np.polyfit(n, logs, 1)
        residual = logs - slope * n - intercept
        assert slope < 0
        assert 1 - residual.var() / logs.var() > 0.99
        torch.testing.assert_close(theta.softmax(-1), p.optimum()[1], rtol=1e-3, atol=1e-4)
        assert steps[0].clip_fraction > 0 == steps[-1].clip_fraction
        assert min(s.smallest for s in steps) > 1e-3
        best_gradient = np.minimum.accumulate([s.squared_gradient for s in steps])
        bound = 2 * gap[0] / (np.arange(1, len(gap) + 1) * 8 * 0.5)  # 2 (V* - V_0) / (N S_max)
        assert (best_gradient <= bound).all()


def test_within_the_theorem_s_steps_it_rises_and_the_gradient_bound_holds():
    p = problem("forward")
    total = safe_step_sum(p, p.reference.log(), low=0.2, high=0.28)
    assert 0 < total < 1e-2  # a theorem's constant: safe, and far from what works
    steps, _ = ppo_clip(p, outer=40, inner=4, step_size=total / 4)
    gap = gaps(p, steps)
    assert (np.diff(gap) < 0).all()
    best_gradient = np.minimum.accumulate([s.squared_gradient for s in steps])
    assert (best_gradient <= 2 * gap[0] / (np.arange(1, 41) * total)).all()
    assert all(s.clip_fraction == 0 for s in steps)


@pytest.mark.slow
def test_reverse_kl_becomes_stationary_and_is_slower():
    p = problem("reverse", 1)
    steps, _ = ppo_clip(p, outer=150)
    gap = gaps(p, steps)
    assert (np.diff(gap) < 1e-14).all()
    assert steps[-1].squared_gradient < 1e-4 * steps[0].squared_gradient
    assert 1e-6 < gap[-1] < 1e-3


@pytest.mark.slow
def test_large_steps_fail():
    """η = 5: forward KL settles above the optimum, on both MDPs; reverse KL on one of them, and converges on the other."""
    final = {}
    for regularizer in ("forward", "reverse"):
        for seed in (0, 1):
            p = problem(regularizer, seed)
            steps, _ = ppo_clip(p, outer=150, step_size=5.0)
            gap = gaps(p, steps)
            final[regularizer, seed] = gap[-1]
            if regularizer == "forward":
                assert (np.diff(gap) > 1e-6).any()  # not monotone
    assert final["forward", 0] > 0.1
    assert final["forward", 1] > 0.05
    assert final["reverse", 0] > 1e-3
    assert final["reverse", 1] < 1e-6


@pytest.mark.slow
def test_near_the_boundary_forward_kl_recovers_and_reverse_kl_stays():
    """All probability on the action of the worst reward: the reverse KL is bounded there and its gradient vanishes."""
    for regularizer in ("forward", "reverse"):
        p = problem(regularizer)
        start = torch.zeros(5, 4, dtype=torch.float64)
        start[torch.arange(5), p.mdp.reward.argmin(-1)] = 12.0
        steps, _ = ppo_clip(p, outer=120, start=start)
        gap = gaps(p, steps)
        if regularizer == "forward":
            assert gap[0] > 5 and gap[-1] < 0.01
        else:
            assert gap[-1] > 0.99 * gap[0]


def test_any_bounds_and_no_clip():
    p = problem("forward")
    final = {}
    for name, bounds in (("clip", Clip(0.2, 0.28)), ("band", Band(KL, 0.05)), ("free", Clip(1.0, math.inf))):
        steps, _ = ppo_clip(p, outer=60, bounds=bounds)
        final[name] = gaps(p, steps)[-1]
        assert 0 < final[name] < 0.1 * gaps(p, steps)[0]
        assert (steps[0].clip_fraction > 0) == (name == "clip")  # the band is wide where π is small
    with pytest.raises(ValueError, match="regularizer"):
        Problem(p.mdp, p.reference, 0.2, "js")
    with pytest.raises(ValueError, match="strength"):
        Problem(p.mdp, p.reference, 0.0)
