"""Links and pair losses against scipy, autograd, finite optimisation and TRL's own formulas."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from bandpo.preference import (
    CHI2,
    CHI2_KL,
    FORWARD_KL,
    JS,
    LINKS,
    LOG,
    PREFERENCES,
    PairObjective,
    alpha_link,
    as_link,
    chi2_kl,
    concentrability,
    estimate_concentrability,
    kto_loss,
    pair_loss,
    preference_confidence,
    reward_calibration,
    tabular_optimum,
)  # fmt: skip
from bandpo.preference.links import log_wright_omega

ALL = [*LINKS.values(), alpha_link(0.5), alpha_link(3.0), chi2_kl(0.25, 0.1), chi2_kl(1.0, 0.1), chi2_kl(0.25, 1.0)]


def test_wright_omega_is_scipys():
    x = torch.linspace(-700, 1e4, 4001, dtype=torch.float64)
    np.testing.assert_allclose(log_wright_omega(x).exp(), scipy.special.wrightomega(x.numpy()), rtol=1e-13)


def test_wright_omega_is_lambert_w_of_the_exponential():
    u = torch.linspace(-5, 5, 101, dtype=torch.float64)
    np.testing.assert_allclose(CHI2_KL.inverse_log(u).exp(), scipy.special.lambertw(np.exp(u.numpy())).real, rtol=1e-13)


@pytest.mark.parametrize("link", ALL, ids=lambda link: link.name)
def test_a_link_rises_and_its_inverse_undoes_it(link):
    # Inside ±4 the slope of every link is at least e^-16 (alpha 3 or 0.5 at the edge), which bounds what rounding costs.
    d = torch.linspace(-4, 4, 401, dtype=torch.float64)
    u = link(d)
    assert (u.diff() > 0).all()
    slope = torch.autograd.functional.jvp(link, d, torch.ones_like(d))[1]
    tolerance = 8 * torch.finfo(torch.float64).eps * (1 + u.abs() / slope + d.abs())
    assert ((link.inverse_log(u) - d).abs() <= tolerance).all()


GENERATORS = {
    "log": lambda z: z * z.log(),
    "chi2": lambda z: (z - 1) ** 2 / 2,
    "chi2-kl": lambda z: (z - 1) ** 2 / 2 + z * z.log(),
    "forward-kl": lambda z: z - z.log(),
    "js": lambda z: z * z.log() - (1 + z) * ((1 + z) / 2).log(),
    "alpha(0.5)": lambda z: (z**0.5 / 0.5 - z) / -0.5,
}


@pytest.mark.parametrize("name", GENERATORS)
def test_a_link_is_the_derivative_of_its_generator(name):
    """Up to a constant, which a difference of scores does not see."""
    link = {x.name: x for x in ALL}[name]
    z = torch.linspace(0.05, 8, 200, dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad(GENERATORS[name](z).sum(), z)
    difference = derivative - link(z.detach().log())
    assert (difference - difference[0]).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("link", ALL, ids=lambda link: link.name)
def test_links_are_finite_everywhere_in_every_dtype(link, dtype):
    d = torch.tensor([-1e4, -100, -1, 0, 1, 11.2, 88, 89, 100, 1e4], dtype=dtype, requires_grad=True)
    out = link(d)
    out.sum().backward()
    assert out.isfinite().all()
    # A slope of e^20 is no float16; in a loss the sigmoid's weight comes before it, see the test of the named objectives.
    assert d.grad is not None and (dtype == torch.float16 or d.grad.isfinite().all())


@given(st.floats(-15, 15), st.sampled_from([0.25, 1.0]), st.sampled_from([0.1, 1.0]))
def test_slope_of_the_mixed_link(delta, alpha, gamma):
    """Gradient β(α z^α + γ); only the KL part is left where the exponential is clipped."""
    d = torch.tensor(delta, dtype=torch.float64, requires_grad=True)
    chi2_kl(alpha, gamma)(d).backward()
    assert d.grad is not None
    assert d.grad.item() == pytest.approx(alpha * math.exp(alpha * delta) + gamma, rel=1e-12)
    far = torch.tensor(21 / alpha, dtype=torch.float64, requires_grad=True)
    chi2_kl(alpha, gamma)(far).backward()
    assert far.grad is not None and far.grad.item() == gamma


def test_trls_alpha_divergence_plus_the_log_is_chipo():
    """TRL's score for α = 2 is e^Δ - 1; χPO's is that, the log-ratio and a constant."""
    d = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(CHI2(d) + 1 + d, CHI2_KL(d))


def test_slope_at_the_reference_is_twice_that_of_dpo():
    d = torch.zeros(1, requires_grad=True)
    CHI2_KL(d).backward()
    assert d.grad is not None and d.grad.item() == 2.0


@pytest.mark.parametrize("name", ["nope", "alpha:", "alpha:x", "alpha:1,2", "chi2-kl:1", "alpha:1", "chi2-kl:0,1"])
def test_unknown_links_say_what_is_known(name):
    with pytest.raises(ValueError, match=r"link|alpha"):
        as_link(name)


def test_named_links_take_parameters():
    d = torch.linspace(-2, 2, 5)
    torch.testing.assert_close(as_link("alpha:2")(d), CHI2(d))
    torch.testing.assert_close(as_link("chi2-kl:1,1")(d), CHI2_KL(d))


# ---- tabular optimum


def random_problem(seed, actions=6):
    g = torch.Generator().manual_seed(seed)
    reward = torch.rand(actions, generator=g, dtype=torch.float64)
    return reward, torch.randn(actions, generator=g, dtype=torch.float64).log_softmax(-1)


PENALTY = {
    "chi2-kl": lambda p, q: (0.5 * (p - q) ** 2 / q + p * np.log(p / q)).sum(),
    "log": lambda p, q: (p * np.log(p / q)).sum(),
    "js": lambda p, q: (p * np.log(2 * p / (p + q)) + q * np.log(2 * q / (p + q))).sum(),
}


@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("link", [CHI2_KL, LOG, JS], ids=lambda link: link.name)
def test_tabular_optimum_is_the_maximiser(link, beta):
    reward, ref = random_problem(3)
    q = ref.exp().numpy()

    def cost(logits):
        p = scipy.special.softmax(logits)
        return -(p @ reward.numpy()) + beta * PENALTY[link.name](p, q)

    found = scipy.optimize.minimize(cost, ref.numpy(), method="BFGS", options={"gtol": 1e-9})
    ours = tabular_optimum(reward, ref, beta=beta, link=link).exp().numpy()
    # The cost is flat to second order: its rounding (1e-16) leaves 1e-8 of the policy open, finite differences some more.
    np.testing.assert_allclose(ours, scipy.special.softmax(found.x), atol=2e-6)
    assert cost(np.log(ours)) <= found.fun + 1e-12


@given(st.integers(0, 1000), st.floats(0.01, 3.0))
def test_optimum_of_the_mixed_link_satisfies_the_first_order_conditions(seed, beta):
    reward, ref = random_problem(seed)
    policy = tabular_optimum(reward, ref, beta=beta)
    z = reward - beta * CHI2_KL(policy - ref)
    # β φ rises with slope β(1 + z): rounding of log π (1e-16 x |log π|) times that is what is left.
    assert (z - z.mean()).abs().max() < 1e-9
    # Proposition 4.2 for rewards in [0, 1]: the ratio is bounded by a polynomial of 1/β, not by an exponential.
    ratio = (policy - ref).exp()
    assert ratio.max() <= 1 + 1 / beta + 1e-9 and ratio.min() >= math.exp(-1 / beta) * (1 - 1e-9)


@pytest.mark.parametrize("link", [CHI2_KL, LOG, FORWARD_KL, JS, chi2_kl(0.25, 0.1)], ids=lambda link: link.name)
def test_population_loss_is_least_at_the_optimum(link):
    """With every pair and true Bradley-Terry labels, the loss's minimiser is the regularised optimum."""
    reward, ref = random_problem(5, actions=4)
    beta = 0.7
    label = (reward[:, None] - reward[None, :]).sigmoid().flatten()
    logits = ref.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16,
                                  line_search_fn="strong_wolfe")  # fmt: skip
    first, second = (x.flatten() for x in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))

    def closure():
        optimizer.zero_grad()
        logp = logits.log_softmax(-1)
        losses, _ = pair_loss(
            chosen_logprobs=logp[first], rejected_logprobs=logp[second], ref_chosen_logprobs=ref[first],
            ref_rejected_logprobs=ref[second], confidence=label, objective=PairObjective("soft", link, beta=beta),
        )  # fmt: skip
        losses.mean().backward()
        return losses.mean()

    optimizer.step(closure)
    expected = tabular_optimum(reward, ref, beta=beta, link=link).exp()
    torch.testing.assert_close(logits.detach().softmax(-1), expected, atol=1e-6, rtol=0)


def test_concentrability_is_one_plus_twice_the_chi_squared_divergence():
    _, ref = random_problem(1)
    policy = random_problem(2)[1]
    chi2 = 0.5 * (ref.exp() * ((policy - ref).exp() - 1) ** 2).sum()
    torch.testing.assert_close(concentrability(policy, ref), 1 + 2 * chi2)
    draws = torch.multinomial(policy.exp(), 400_000, replacement=True, generator=torch.Generator().manual_seed(0))
    ratio = (policy - ref)[draws]
    spread = ratio.exp().std() / len(draws) ** 0.5
    assert abs(estimate_concentrability(ratio).mean - concentrability(policy, ref)) < 5 * spread


# ---- losses


def batch(seed=0, n=64, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    new = [(-20 + scale * torch.randn(n, generator=g, dtype=torch.float64)).requires_grad_(True) for _ in range(2)]
    ref = [-20 + scale * torch.randn(n, generator=g, dtype=torch.float64) for _ in range(2)]
    return new, ref, torch.randn(n, generator=g, dtype=torch.float64)


def call(new, ref, objective, **extras):
    references = (
        {} if objective.reference == "none" else {"ref_chosen_logprobs": ref[0], "ref_rejected_logprobs": ref[1]}
    )
    return pair_loss(chosen_logprobs=new[0], rejected_logprobs=new[1], objective=objective, **references, **extras)


def gradient(losses, new):
    return torch.stack(torch.autograd.grad(losses.sum(), new))


def test_cross_checks_between_targets():
    """Labels of 1 make distillation DPO, a confidence makes it RBRM and cDPO, an unclipped χPO is χ² + log."""
    new, ref, gap = batch()
    dpo, _ = call(new, ref, PREFERENCES["dpo"])
    soft = PairObjective("soft", beta=0.1)
    torch.testing.assert_close(call(new, ref, soft, confidence=torch.ones_like(gap))[0], dpo)
    confidence = torch.full_like(gap, 0.9)
    rbrm = call(new, ref, PREFERENCES["rbrm"].replace(beta=0.1), confidence=confidence)[0]
    torch.testing.assert_close(rbrm, call(new, ref, PREFERENCES["cdpo"])[0])
    pdfr = call(new, ref, PREFERENCES["pdfr"].replace(label_scale=2.0), reward_gap=gap)[0]
    torch.testing.assert_close(pdfr, call(new, ref, soft, confidence=(2 * gap).sigmoid())[0])
    rebel = call(new, ref, PREFERENCES["rebel"].replace(beta=0.1), reward_gap=gap)[0]
    torch.testing.assert_close(rebel, call(new, ref, PREFERENCES["vcb"], reward_gap=gap)[0])


def test_gradient_of_the_soft_target():
    """-β(q - σ(βh)), and its minimum at βh = logit q."""
    new, ref, gap = batch()
    q = gap.sigmoid()
    losses, _ = call(new, ref, PairObjective("soft", beta=0.15), confidence=q)
    h = 0.15 * ((new[0] - ref[0]) - (new[1] - ref[1])).detach()
    expected = -0.15 * (q - h.sigmoid())
    torch.testing.assert_close(gradient(losses, new), torch.stack([expected, -expected]))
    at = torch.zeros(len(gap), dtype=torch.float64), torch.zeros(len(gap), dtype=torch.float64)
    best = [torch.logit(q).div(0.15).requires_grad_(True), torch.zeros_like(q).requires_grad_(True)]
    assert gradient(call(best, at, PairObjective("soft", beta=0.15), confidence=q)[0], best).abs().max() < 1e-12


def test_robust_loss_is_unbiased_under_flipped_labels():
    new, ref, _ = batch()
    robust = PREFERENCES["robust-dpo"].replace(label_smoothing=0.2)
    clean = call(new, ref, PREFERENCES["dpo"])[0]
    flipped = call([new[1], new[0]], [ref[1], ref[0]], robust)[0]
    torch.testing.assert_close(0.8 * call(new, ref, robust)[0] + 0.2 * flipped, clean)


@given(st.floats(0.01, 5.0), st.floats(0.1, 3.0))
def test_the_clip_ends_the_gradient_beyond_twice_r_max(beta, r_max):
    new, ref, _ = batch(scale=1.0)
    objective = PREFERENCES["chipo"].replace(beta=beta, r_max=r_max)
    losses, metrics = call(new, ref, objective)
    difference = beta * (CHI2_KL(new[0] - ref[0]) - CHI2_KL(new[1] - ref[1])).detach()
    beyond = difference.abs() > 2 * r_max
    assert metrics["clipped"].item() == pytest.approx(beyond.double().mean().item())
    slopes = gradient(losses, new)
    assert (slopes[:, beyond] == 0).all() and (slopes[:, ~beyond] != 0).all()
    torch.testing.assert_close(losses, -logsigmoid(difference.clamp(-2 * r_max, 2 * r_max)))


def test_ipo_and_simpo_divide_by_length():
    new, ref, _ = batch()
    lengths = {"chosen_lengths": torch.arange(1, 65), "rejected_lengths": torch.arange(64, 0, -1)}
    mean = [(n - r) / size for n, r, size in zip(new, ref, lengths.values(), strict=True)]
    torch.testing.assert_close(call(new, ref, PREFERENCES["ipo"], **lengths)[0], (mean[0] - mean[1] - 5.0) ** 2)
    alone = [n / size for n, size in zip(new, lengths.values(), strict=True)]
    expected = -logsigmoid(2.0 * (alone[0] - alone[1]) - 0.5)
    torch.testing.assert_close(call(new, ref, PREFERENCES["simpo"], **lengths)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", sorted(PREFERENCES))
def test_every_named_objective_is_finite_in_every_dtype(name, dtype):
    objective = PREFERENCES[name]
    new = [torch.tensor([-1e4, -600.0, -3.0, -0.5], dtype=dtype, requires_grad=True) for _ in range(2)]
    ref = [torch.tensor([-0.5, -3.0, -600.0, -1e4], dtype=dtype) for _ in range(2)]
    extras = {"confidence": torch.full((4,), 0.9)} if name == "rbrm" else {}
    if objective.needs_gap and not objective.label_smoothing and not extras:
        extras = {"reward_gap": torch.tensor([1.0, -1.0, 0.0, 50.0])}
    if objective.length == "mean":
        extras |= {"chosen_lengths": torch.full((4,), 7), "rejected_lengths": torch.full((4,), 9)}
    losses, metrics = call([new[0], new[1].flip(0)], [ref[0], ref[1].flip(0)], objective, **extras)
    losses.sum().backward()
    assert losses.dtype == torch.float32 and losses.isfinite().all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in new)
    assert all(v.isfinite() and v.dim() == 0 for v in metrics.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "mystery"}, "target"), ({"beta": 0.0}, "beta"), ({"beta": math.nan}, "beta"), ({"r_max": -1.0}, "r_max"),
        ({"label_smoothing": 0.5}, "label_smoothing"), ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"link": CHI2_KL, "length": "mean"}, "cancels"), ({"link": JS, "reference": "none"}, "cancels"),
        ({"calibration": 0.1}, "calibration"), ({"reference": "moving"}, "reference"),
    ],
)  # fmt: skip
def test_objectives_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PairObjective(**changes)


@pytest.mark.parametrize(
    ("name", "extras", "message"),
    [
        ("dpo", {"reward_gap": torch.zeros(64)}, "no use of reward_gap"), ("rebel", {}, "needs reward_gap"),
        ("rbrm", {}, "needs confidence"), ("simpo", {}, "chosen_lengths"), ("dpo", {"ref_chosen_logprobs": None}, "ref_chosen"),
        ("pdfr", {"reward_gap": torch.zeros(64), "confidence": torch.zeros(64)}, "both given"),
        ("dpo", {"rejected_logprobs": torch.zeros(3)}, "shape"), ("nope", {}, "unknown"),
    ],
)  # fmt: skip
def test_wrong_input_is_named(name, extras, message):
    new, ref, _ = batch()
    given = {"chosen_logprobs": new[0], "rejected_logprobs": new[1], "ref_chosen_logprobs": ref[0],
             "ref_rejected_logprobs": ref[1]}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        pair_loss(**{**given, **extras}, objective=name)


def test_kto_refuses_links_and_weighs_sides():
    d = torch.tensor([0.5, -0.5])
    with pytest.raises(ValueError, match="leaves Z"):
        kto_loss(d, torch.tensor([True, False]), torch.tensor(0.0), link=CHI2_KL)
    out = kto_loss(d, torch.tensor([True, False]), torch.tensor(0.2), beta=0.3, desirable_weight=2.0)
    expected = [2 * (1 - 1 / (1 + math.exp(-0.3 * 0.3))), 1 - 1 / (1 + math.exp(-0.3 * 0.7))]
    assert out.tolist() == pytest.approx(expected)


def test_confidence_of_the_batch_and_of_the_pair():
    chosen, rejected = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 2.0])
    gap = 1 / (1 + np.exp(-chosen.numpy())) - 1 / (1 + np.exp(-rejected.numpy()))
    whole = preference_confidence(chosen, rejected)
    np.testing.assert_allclose(whole, 1 / (1 + np.exp(-7.5 * gap.mean())), rtol=1e-6)
    each = preference_confidence(chosen, rejected, level="pair")
    np.testing.assert_allclose(each, np.maximum(1 / (1 + np.exp(-7.5 * gap)), 0.5), rtol=1e-6)
    assert preference_confidence(rejected, chosen).tolist() == [0.5, 0.5]
    assert preference_confidence(rejected, chosen, floor=0.0)[0] < 0.5


def exact_step(log_ratio, reward, beta):
    """Squared distillation with full support: log π/π_ref = r/β up to a constant."""
    return log_ratio + reward / beta


@pytest.mark.parametrize(("calibration", "limit"), [(0.0, None), (0.1, 10.0), (0.5, 2.0)])
def test_calibrated_rewards_tend_to_the_final_temperature(calibration, limit):
    reward = torch.tensor([0.0, 1.0], dtype=torch.float64)
    beta, u = 0.5, torch.zeros(2, dtype=torch.float64)
    for k in range(1, 200):
        u = exact_step(u, reward_calibration(reward, u, calibration), beta)
        if limit is None:
            torch.testing.assert_close(u, k * reward / beta)  # REBEL: without end
    if limit is not None:
        torch.testing.assert_close(u[1] - u[0], torch.tensor(limit, dtype=torch.float64))
    if calibration == beta:  # reward calibration at γ_c = γ is regularisation to π₀
        once = exact_step(torch.zeros(2, dtype=torch.float64), reward, beta)
        torch.testing.assert_close(u, once)
