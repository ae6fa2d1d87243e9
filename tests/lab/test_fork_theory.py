"""The theory of docs/halves.md: proofs are on the page, and each statement is checked here against exact enumeration."""

import itertools
import math

import pytest
import torch

from bandpo import KL, OBJECTIVES, Band, Clip, Objective, policy_loss
from bandpo.bounds import RatioBounds
from bandpo.bounds.regions import Sides, TopK
from bandpo.lab.forks.theory import (
    along_own_gradient,
    entropy,
    free_drift,
    neutral_edge,
    neutral_upper,
    one_token_drift,
    own_path,
    reach,
    second_order_drift,
    speed,
)

POLICY = torch.tensor([0.6, 0.3, 0.08, 0.02], dtype=torch.float64)
PEAKED = torch.tensor([0.9] + [0.1 / 63] * 63, dtype=torch.float64)
FREE = Clip(1.0, float("inf"))


def updated(policy, tokens, advantages, bounds, rate, steps):
    """The logits after gradient steps on the library's own loss, `(rollouts, V)`, for rollouts `(rollouts, tokens)`."""
    tokens, advantages = torch.tensor(tokens), torch.tensor(advantages, dtype=torch.float64)
    theta = policy.log().expand(len(tokens), -1).clone().requires_grad_()
    old = policy.log()[tokens].view(-1, 1)
    for _ in range(steps):
        value, _ = policy_loss(
            logprobs=theta.log_softmax(-1).gather(1, tokens).view(-1, 1),
            old_logprobs=old,
            advantages=advantages.flatten(),
            mask=torch.ones(tokens.numel(), 1),
            objective=Objective(bounds=bounds),
            metrics="none",
        )
        (gradient,) = torch.autograd.grad(value * len(tokens), theta)
        theta = (theta.detach() - rate * gradient).requires_grad_()
    return theta.detach()


def enumerated(policy, bounds, *, rate, steps, tokens=1):
    """Expected change of the entropy under pure noise: every draw of tokens with every sign of their advantages."""
    draws = list(itertools.product(range(len(policy)), repeat=tokens))
    signs = list(itertools.product((1.0, -1.0), repeat=tokens))
    cases = list(itertools.product(draws, signs))
    weight = torch.stack([policy[list(drawn)].prod() for drawn, _ in cases]) / 2**tokens
    ends = updated(policy, *map(list, zip(*cases, strict=True)), bounds, rate, steps)
    return (weight * (entropy(ends.softmax(-1)) - entropy(policy))).sum().item()


def test_the_reciprocal_of_the_ratio_is_a_clock():
    """`1/r` falls by `A·|e_a - π|²` for each unit of rate x steps, by the library's loss; and the bounds of the speed."""
    policies = torch.softmax(
        4 * torch.randn(50, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64), -1
    )
    for p in policies:
        rest = (1 - p).square()
        assert (speed(p) >= rest * (1 + 1 / 8) - 1e-15).all() and (speed(p) <= 2 * rest + 1e-15).all()
    for a, advantage in itertools.product(range(4), (1.0, -2.0)):
        end = updated(POLICY, [[a]], [[advantage]], FREE, 1e-6, 1)[0].softmax(-1)
        moved = (POLICY[a] / end[a] - 1).item() / 1e-6
        assert moved == pytest.approx(-advantage * speed(POLICY)[a].item(), rel=1e-5)


@pytest.mark.parametrize("bounds", [Clip(0.2), Clip(0.2, 0.5), Band(KL, 0.05)], ids=repr)
def test_a_tokens_own_gradient_takes_it_to_its_edge_and_no_further(bounds):
    """Many small steps of the library's loss end where `own_path` says, at the edge or where the budget is used up."""
    edges, rate, steps = bounds(POLICY.log()), 4e-3, 200
    for advantage, edge in ((1.0, edges.upper), (-1.0, edges.lower)):
        found = own_path(POLICY, edge.log(), rate * steps)
        end = updated(POLICY, [[a] for a in range(4)], [[advantage]] * 4, bounds, rate, steps).log_softmax(-1)
        torch.testing.assert_close(end.diagonal() - POLICY.log(), found.log_ratio, rtol=0.01, atol=5e-3)
        torch.testing.assert_close(entropy(end.exp()), found.entropy, rtol=0.01, atol=5e-3)
    assert own_path(POLICY, torch.full((4,), 0.01).double(), 5.0).stopped.all()
    assert not own_path(POLICY, torch.full((4,), math.inf).double(), 0.1).stopped.any()


def test_reach_by_probability():
    """Rare: the fixed clip stops at its edges, the band on its way down never does; certain: nothing is reached."""
    p = torch.tensor([1e-4, 1e-2, 0.5, 0.99], dtype=torch.float64)
    clip, band = reach(Clip(0.2), p, 1.0), reach(Band(KL, 0.05, max_ratio=None), p, 1.0)
    assert clip.edge_up.tolist() == [True, True, True, False] and clip.edge_down.tolist() == [True, True, True, False]
    assert clip.up[:3].tolist() == pytest.approx([1.2] * 3) and clip.down[:3].tolist() == pytest.approx([0.8] * 3)
    assert not band.edge_down[:2].any() and band.down[0].item() == pytest.approx(1 / 3, rel=1e-2)  # 1/(1 + 2T)
    assert band.up[1].item() == pytest.approx(7.81, rel=1e-3)
    low = Band(KL, 0.05)(torch.tensor([1e-3, 1e-2], dtype=torch.float64).log())
    assert isinstance(low, RatioBounds)
    assert low.lower.log().tolist() == pytest.approx([-51, -6], rel=1e-2)  # -1 - δ/p
    with pytest.raises(TypeError, match="no interval"):
        reach(lambda logp: logp > 0, p, 1.0)


def test_slope_and_curvature_are_those_of_the_path():
    for policy in (POLICY, PEAKED):
        x, found = 5e-3, along_own_gradient(policy)
        up, down = (own_path(policy, torch.full_like(policy, y), 1e9).entropy for y in (x, -x))
        torch.testing.assert_close((up - down) / (2 * x), found.slope, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close((up + down - 2 * entropy(policy)) / x**2, found.curvature, rtol=1e-2, atol=1e-3)


def test_tokens_that_are_more_surprising_than_the_entropy_raise_it():
    """`p < e^-H` is sufficient for a slope above 0, and `p(log p + H)` below its mean is necessary and sufficient."""
    draws = 3 * torch.randn(200, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for p in draws.softmax(-1):
        slope, level = along_own_gradient(p).slope, p * (p.log() + entropy(p))
        assert (slope[p.log() < -entropy(p)] > 0).all()
        assert torch.equal(slope > 0, level < (p * level).sum())
        assert (p * slope * speed(p)).sum().abs() < 1e-12  # without clip and reuse the first order is 0


@pytest.mark.parametrize(
    ("bounds", "budget"),
    [(Clip(0.2), 1.0), (Clip(0.2, 0.5), 0.3), (Clip(0.7, 0.2), 1.0), (Band(KL, 0.05), 0.5), (FREE, 0.5)],
    ids=str,
)
def test_the_drift_of_one_token_is_that_of_enumeration(bounds, budget):
    exact = enumerated(POLICY, bounds, rate=budget / 200, steps=200)
    assert one_token_drift(POLICY, bounds, budget).item() == pytest.approx(exact, rel=0.05, abs=4e-4)


def test_the_second_order_is_the_second_order():
    """The error of the expansion falls by 8 where all moves are halved."""
    errors = []
    for x in (0.08, 0.04, 0.02):
        up, down = torch.full_like(PEAKED, x), torch.full_like(PEAKED, -2 * x)
        up[0], down[0] = x / 100, -x / 100
        exact = 0.5 * (own_path(PEAKED, up, 1e9).entropy + own_path(PEAKED, down, 1e9).entropy)
        drift = (PEAKED * (exact - entropy(PEAKED))).sum() - second_order_drift(PEAKED, up, down)
        errors.append(abs(drift.item()))
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.05) and errors[1] / errors[2] == pytest.approx(8, rel=0.05)


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (1, 4), (2, 1), (2, 3)])
def test_the_drift_without_an_edge_has_a_closed_form(tokens, steps):
    policy = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    exact = enumerated(policy, FREE, rate=1e-3, steps=steps, tokens=tokens)
    assert free_drift(policy, rate=1e-3, steps=steps, tokens=tokens).item() == pytest.approx(exact, rel=2e-4)


def test_the_limit_of_many_steps_agrees_with_the_closed_form():
    budget = 1e-3
    closed = free_drift(PEAKED, rate=budget / 10_000, steps=10_000)
    assert one_token_drift(PEAKED, FREE, budget).item() == pytest.approx(closed.item(), rel=1e-3)


def test_which_edge_drives_the_entropy_where():
    """For rare tokens a wider upper edge raises the entropy and a wider lower edge lowers it; for the common one they swap."""
    base = torch.full_like(PEAKED, 0.1)
    rare, common = torch.zeros_like(PEAKED), torch.zeros_like(PEAKED)
    rare[1:], common[0] = 0.05, 0.002
    start = torch.cat([torch.tensor([0.005]), base[1:]]).double()

    def drift(up, down):
        ends = own_path(PEAKED, up, 1e9).entropy + own_path(PEAKED, -down, 1e9).entropy
        return (PEAKED * (0.5 * ends - entropy(PEAKED))).sum().item()

    at = drift(start, start)
    assert drift(start + rare, start) > at > drift(start, start + rare)
    assert drift(start + common, start) < at < drift(start, start + common)


def test_the_order_holds_for_rollouts_of_two_tokens():
    """Exact enumeration of 2 tokens: the entropy rises with the upper edge, and falls as the lower edge opens."""
    policy = torch.tensor([0.9, 0.07, 0.03], dtype=torch.float64)
    found = [
        enumerated(policy, bounds, rate=0.03, steps=25, tokens=2)
        for bounds in (Clip(0.2, 0.05), Clip(0.2, 0.15), Clip(0.2, 0.4))
    ]
    assert found == sorted(found) and found[0] < 0 < found[-1]
    opened = enumerated(policy, Sides(lower=FREE, upper=Clip(0.2, 0.15)), rate=0.03, steps=25, tokens=2)
    assert opened < found[1]


def test_the_order_of_the_halves_is_no_law_for_every_policy():
    """One common and many rare tokens: upper half, clip, lower half. A flat policy: the upper half has the lowest drift."""
    arms = [OBJECTIVES[name].bounds for name in ("bandpo-kl-upper", "grpo", "bandpo-kl-lower")]
    peaked = [one_token_drift(PEAKED, bounds, 0.25).item() for bounds in arms]
    assert peaked == sorted(peaked, reverse=True) and peaked[0] > 0 > peaked[2]
    flat = torch.tensor([0.3] + [0.7 / 9] * 9, dtype=torch.float64)
    upper, clip = (one_token_drift(flat, bounds, 1.0).item() for bounds in arms[:2])
    assert upper < clip < 0


def test_neutral_edges():
    """`neutral_upper` is where the drift is 0; γ = 1 and 0 are the two symmetric intervals; no edge is neutral for some."""
    upper = neutral_upper(PEAKED, 0.8, 0.3)
    assert 1.19 < upper < 1.22
    assert one_token_drift(PEAKED, Clip(0.2, upper - 1), 0.3).item() == pytest.approx(0, abs=1e-6)
    assert neutral_edge(0.8, 1.0) == pytest.approx(1.2) and neutral_edge(0.8, 0.0) == pytest.approx(1.25)
    assert neutral_edge(0.8, 1e-7) == pytest.approx(1.25)
    assert math.isnan(neutral_upper(PEAKED, 0.8, 10.0))  # the common token alone raises the entropy by then
    gamma = along_own_gradient(PEAKED).exponent[1].item()
    up = torch.zeros_like(PEAKED)
    x = 0.02
    up[1:], down = math.log(neutral_edge(math.exp(-x), gamma)), up.clone()
    down[1:] = -x
    assert abs(second_order_drift(PEAKED, up, down).item()) < 1e-7 < abs(second_order_drift(PEAKED, -down, down).item())
    for bad in (0.0, 1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            neutral_upper(PEAKED, bad, 1.0)


def test_bounds_without_edges_are_refused():
    with pytest.raises(TypeError):
        one_token_drift(POLICY, TopK("tv", 0.1), 1.0)
