"""The theorems of the band as properties: monotonicity, mirror, saturation, limits, Theorem 1 (docs/theory.md)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bandpo import CHI2, HELLINGER, JS, KL, LE_CAM, NEYMAN, OBJECTIVES, REVERSE_KL, TV, FDivergence, alpha, ratio_bounds
from bandpo.divergences import DIVERGENCES, binary_divergence
from bandpo.terms import token_objective
from bandpo.testing import check_bounds, check_divergence, check_logprobs, check_surrogate

ALL = [*DIVERGENCES.values(), alpha(3.0), alpha(1.5), alpha(0.3), alpha(-1.5)]
divergences = st.sampled_from(ALL)
logps = st.floats(-80, -1e-12)
radii = st.floats(1e-6, 10)
log_ratios = st.floats(-5, 5)
# Log-bounds are promised within 1e-12; two of them may differ by two errors.
EPS = 4e-12
many = settings(max_examples=300, deadline=None)


def log_bounds(divergence, logp, radius):
    lower, upper = ratio_bounds(torch.tensor([logp], dtype=torch.float64), divergence, radius, log=True)
    return lower.item(), upper.item()


def at_most(a, b):
    return a <= b or abs(a - b) <= EPS * max(1, abs(a), abs(b))


@many
@given(divergences, logps, radii)
def test_brackets_one_inside_the_simplex(divergence, logp, radius):
    lower, upper = log_bounds(divergence, logp, radius)
    assert lower <= 0 <= upper <= -logp


@many
@given(divergences, logps, radii, radii)
def test_widens_with_the_radius(divergence, logp, a, b):
    small, large = log_bounds(divergence, logp, min(a, b)), log_bounds(divergence, logp, max(a, b))
    assert at_most(large[0], small[0])
    assert at_most(small[1], large[1])


@many
@given(divergences, logps, logps, radii)
def test_intervals_are_nested_in_p(divergence, a, b, radius):
    rare, common = log_bounds(divergence, min(a, b), radius), log_bounds(divergence, max(a, b), radius)
    assert at_most(rare[0], common[0])
    assert at_most(common[1], rare[1])


@many
@given(divergences, st.floats(0.001, 0.999), radii)
def test_mirror_identity(divergence, p, radius):
    lower = ratio_bounds(torch.tensor(p, dtype=torch.float64).log(), divergence, radius).lower
    upper = ratio_bounds(torch.tensor(-p, dtype=torch.float64).log1p(), divergence, radius).upper
    assert p * lower.item() + (1 - p) * upper.item() == pytest.approx(1, abs=1e-11)


@many
@given(divergences, st.floats(0.001, 0.999), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_binary_divergence_is_convex_in_r_with_its_minimum_at_1(divergence, p, a, b):
    """g itself, from f and plain ratios: what the bounds invert is compared with it."""
    r = torch.tensor([a / p, b / p, (a + b) / (2 * p), 1.0], dtype=torch.float64)
    g = p * divergence(r) + (1 - p) * divergence((1 - p * r) / (1 - p))
    noise = 1e-12 * (1 + g[:2].sum()) + 1e-9 * g[2].abs()
    assert g[2] <= (g[0] + g[1]) / 2 + noise
    assert (g >= g[3] - 1e-13).all() and abs(g[3]) <= 1e-13
    found = binary_divergence(r[:3].log(), torch.full((3,), p, dtype=torch.float64).log(), divergence)
    torch.testing.assert_close(found, g[:3], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("divergence", "rare", "common"), [(KL, 0.049, 0.154), (TV, 0.05, 0.05)])
def test_the_shift_of_the_probability_has_no_order(divergence, rare, common):
    """`p(r_up - 1)` rises and falls with p where r_up only falls; under TV it is δ everywhere but at the end."""
    p = torch.tensor([1e-9, 0.5, 1 - 1e-9], dtype=torch.float64)
    shift = p * (ratio_bounds(p.log(), divergence, 0.05).upper - 1)
    assert shift.tolist() == pytest.approx([rare, common, 0.0], abs=5e-4)


SATURATION = {  # p_sat(δ): the upper side is free from there on
    "REVERSE_KL": (REVERSE_KL, lambda d: math.exp(-d)),
    "TV": (TV, lambda d: 1 - d),
    "CHI2": (CHI2, lambda d: 1 / (1 + d)),
    "HELLINGER": (HELLINGER, lambda d: (1 - d / 2) ** 2),
    "LE_CAM": (LE_CAM, lambda d: (2 - d) / (2 + d)),
    "ALPHA(3)": (alpha(3.0), lambda d: (1 + 6 * d) ** (-1 / 2)),
    "ALPHA(0.3)": (alpha(0.3), lambda d: (1 - 0.21 * d) ** (1 / 0.7)),
}


@pytest.mark.parametrize("name", SATURATION)
@given(radius=st.floats(0.001, 0.9))
@settings(max_examples=50, deadline=None)
def test_saturation_thresholds(name, radius):
    divergence, threshold = SATURATION[name]
    p_sat = threshold(radius)
    step = 1e-6 * min(p_sat, 1 - p_sat)
    p = torch.tensor([p_sat - step, p_sat + step], dtype=torch.float64)
    upper = ratio_bounds(p.log(), divergence, radius).upper
    assert upper[1].item() == pytest.approx(1 / p[1].item(), rel=1e-14)
    assert upper[0] <= 1 / p[0] * (1 + 2**-50)  # exp(-log p) and 1/p differ by their rounding
    lower = ratio_bounds((1 - p).log(), divergence, radius).lower
    assert lower[1] == 0
    assert lower[0] > 0


@pytest.mark.parametrize("divergence", [KL, NEYMAN, DIVERGENCES["jeffreys"], alpha(-1.5)], ids=lambda d: d.name)
def test_infinite_at_zero_never_saturates(divergence):
    lower, _ = ratio_bounds(-torch.logspace(-6, 1.3, 50, dtype=torch.float64), divergence, 10.0, log=True)
    assert (lower > -math.inf).all()


LIMITS = {  # q0 = lim p·r_up as p → 0, and r* = 1 - q0
    "KL": (KL, lambda d: 1 - math.exp(-d)),
    "TV": (TV, lambda d: d),
    "CHI2": (CHI2, lambda d: 0.0),
    "NEYMAN": (NEYMAN, lambda d: d / (1 + d)),
    "HELLINGER": (HELLINGER, lambda d: d - d * d / 4),
    "LE_CAM": (LE_CAM, lambda d: 2 * d / (2 + d)),
    "ALPHA(0.3)": (alpha(0.3), lambda d: 1 - (1 - 0.21 * d) ** (1 / 0.3)),
}


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("radius", [0.01, 0.05, 0.3])
def test_limits_of_rare_and_certain_tokens(name, radius):
    divergence, limit = LIMITS[name]
    rare = torch.tensor([-200.0], dtype=torch.float64)
    q0 = (rare + ratio_bounds(rare, divergence, radius, log=True).upper).exp().item()
    assert q0 == pytest.approx(limit(radius), rel=1e-9, abs=1e-12)
    certain = ratio_bounds(torch.tensor([0.0], dtype=torch.float64), divergence, radius).lower.item()
    assert certain == pytest.approx(1 - limit(radius), abs=1e-12)


LARGEST = {  # f(0) + lim f(u)/u, the largest value of the divergence
    "TV": (TV, 1.0), "HELLINGER": (HELLINGER, 2.0), "LE_CAM": (LE_CAM, 2.0), "JS": (JS, math.log(2)),
    "ALPHA(0.3)": (alpha(0.3), 1 / 0.3 + 1 / 0.7),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGEST)
def test_a_certain_token_has_no_lower_limit_in_a_large_ball(name):
    divergence, largest = LARGEST[name]
    certain = torch.zeros(1, dtype=torch.float64)
    assert ratio_bounds(certain, divergence, largest * (1 + 1e-9)).lower.item() == 0
    inside = ratio_bounds(certain, divergence, largest * (1 - 1e-3)).lower.item()
    assert inside > 0
    cost = divergence(torch.tensor(inside, dtype=torch.float64)) + (1 - inside) * divergence.recession
    assert cost.item() == pytest.approx(largest * (1 - 1e-3), rel=1e-9)


def test_without_a_limit_of_f_over_u_a_certain_token_cannot_move():
    for divergence in (REVERSE_KL, CHI2, DIVERGENCES["jeffreys"], alpha(1.5)):
        assert ratio_bounds(torch.zeros(1, dtype=torch.float64), divergence, 5.0).lower.item() == 1


def test_js_limit_has_no_formula_but_a_value():
    certain = ratio_bounds(torch.zeros(1, dtype=torch.float64), JS, 0.05).lower.item()
    assert 1 - certain == pytest.approx(0.1370, abs=5e-5)


@pytest.mark.parametrize("divergence", ALL, ids=lambda d: d.name)
def test_theorem_1_no_feasible_policy_leaves_the_interval(divergence):
    """Random Q in the ball D_f(Q ‖ P) <= δ over a vocabulary keep the token's ratio inside; the rescaled Q reaches the edge."""
    g = torch.Generator().manual_seed(3)
    size, radius = 6, 0.05
    p = torch.rand(4000, size, generator=g, dtype=torch.float64).pow(3)
    p = p / p.sum(1, keepdim=True)
    direction = torch.rand(4000, size, generator=g, dtype=torch.float64).pow(3)
    direction = direction / direction.sum(1, keepdim=True)

    def cost(t):
        q = p + t.unsqueeze(1) * (direction - p)
        return (p * divergence(q / p)).sum(1)

    low, high = torch.zeros(4000, dtype=torch.float64), torch.ones(4000, dtype=torch.float64)
    for _ in range(60):  # walk from P towards the random policy until the ball's surface
        mid = (low + high) / 2
        inside = cost(mid) <= radius
        low, high = torch.where(inside, mid, low), torch.where(inside, high, mid)
    ratio = 1 + low * (direction[:, 0] / p[:, 0] - 1)
    lower, upper = ratio_bounds(p[:, 0].log(), divergence, radius)
    assert (ratio <= upper * (1 + 1e-9)).all()
    assert (ratio >= lower * (1 - 1e-9) - 1e-12).all()
    assert ((ratio / upper > 0.9) | (ratio < lower * 1.1 + 1e-3)).any()  # the test reaches the edge

    for r in (lower, upper):
        rest = (1 - p[:, 0] * r) / (1 - p[:, 0])
        q = torch.cat([(p[:, 0] * r).unsqueeze(1), p[:, 1:] * rest.unsqueeze(1)], 1)
        used = (p * divergence((q / p).clamp_min(1e-300))).sum(1)
        # r = 0 also where e^-y underflows; there, as at 1/p, the divergence of the rounded r is not that of the bound
        saturated = (r < 1e-290) | (r * p[:, 0] >= 1 - 1e-12)
        assert ((used - radius).abs() <= 1e-9)[~saturated].all()
        assert (used <= radius + 1e-9)[saturated].all()


NOT_MEANT = {"clip-cov": "drops random tokens", "quatro-reading": "its own baseline and a whole sequence's ratio"}


@pytest.mark.parametrize("per_token", [False, True], ids=["column", "per token"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_on_policy_every_objective_has_the_policy_gradient(name, per_token):
    """No. 10: at r = 1 the gradient of a token's term is A, for every named objective that is not an exception."""
    objective, (rows, time) = OBJECTIVES[name], (6, 8)
    g = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(rows, time, generator=g, dtype=torch.float64) - 0.01
    mask = torch.rand(rows, time, generator=g) > 0.2
    advantages = 2 * torch.randn(rows, time if per_token else 1, generator=g, dtype=torch.float64)
    extras = {}
    if objective.group_stats is not None:
        rewards = torch.rand(rows, generator=g, dtype=torch.float64)
        extras = objective.group_inputs(rewards, rewards - rewards.mean(), 3)
    if "topk_logprobs" in objective.extras:
        others = torch.full((rows, time, 2), -5.0, dtype=torch.float64)
        unseen = torch.zeros(rows, time, dtype=torch.bool)
        extras = {"topk_logprobs": others, "old_topk_logprobs": others, "sampled_in_topk": unseen}
    new = old.clone().requires_grad_()
    value = token_objective(
        objective, logprobs=new, old_logprobs=old, rollout_logprobs=old, advantages=advantages, mask=mask, extras=extras
    ).value
    (gradient,) = torch.autograd.grad(value.sum(), new)
    policy_gradient = torch.where(mask, advantages.expand(rows, time), 0.0)
    assert torch.allclose(gradient, policy_gradient, rtol=1e-9) == (name not in NOT_MEANT)


@pytest.mark.parametrize("divergence", ALL, ids=lambda d: d.name)
def test_check_divergence_accepts_the_built_in(divergence):
    check_divergence(divergence)


@pytest.mark.parametrize(
    ("f", "words"),
    [
        (lambda u: u.log().square() / 2, "convex"),
        (lambda u: u - 1, "linear"),
        (lambda u: (u - 1).square().float(), "dtype"),
        (lambda u: torch.where(u < 1e-5, math.nan, (u - 1).square()), "NaN|zero|0"),
    ],
)
def test_check_divergence_rejects(f, words):
    with pytest.raises(AssertionError, match=words):
        check_divergence(FDivergence("wrong", f))


def test_check_divergence_rejects_wrong_closed_form_and_wrong_f_exp():
    wrong = FDivergence("wrong", TV.f, TV.f_exp, 0.5, closed_form=lambda lp, d: TV.closed_form(lp, 1.01 * d))
    with pytest.raises(AssertionError, match="radius"):
        check_divergence(wrong)
    with pytest.raises(AssertionError, match="f_exp"):
        check_divergence(FDivergence("wrong", KL.f, lambda t: 1.001 * (t.expm1() - t)))


def test_checks_of_bounds_surrogates_and_inputs_reject():
    from bandpo import RatioBounds

    with pytest.raises(AssertionError, match="neighbours"):
        check_bounds(lambda x: RatioBounds(torch.full_like(x.detach(), 0.5), 1 - x.detach().mean().expand(x.shape)))
    with pytest.raises(AssertionError, match="gradient"):
        check_bounds(lambda x: RatioBounds(x.exp() * 0, 2 - x))
    with pytest.raises(AssertionError, match="on policy"):
        check_surrogate(lambda x, a, b: (2 * x).exp() * a)
    with pytest.raises(AssertionError, match="at log r = 40"):
        check_surrogate(lambda x, a, b: (x.exp() * a) + (x - 39).clamp_min(0) / (x < 39) * 0)
    check_logprobs(torch.tensor([1e-7, -1.0, math.nan]), torch.tensor([1, 1, 0]))
    with pytest.raises(ValueError, match="NaN"):
        check_logprobs(torch.tensor([math.nan]))
