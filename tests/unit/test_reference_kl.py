"""What each KL term descends, by exact sums over the actions of tabular policies, against closed forms in numpy."""

import dataclasses
import math
from typing import get_args

import numpy as np
import pytest
import torch

from bandpo import KL, OBJECTIVES, Band, Clip, Objective, approx_kl, policy_loss
from bandpo.reference import DESCENDS, ReferenceKL, k1, k2, k3, reference_kl
from bandpo.selection import Pruning
from bandpo.surrogates.corrections import TIS

NAMES = get_args(ReferenceKL)
EXACT = {"rtol": 1e-9, "atol": 1e-14}


def policies(n, seed):
    """π, π_ref, π_old and the sampler, far from each other, as float64 probabilities."""
    g = np.random.default_rng(seed)
    return [g.dirichlet(np.ones(n)) for _ in range(4)]


def tabular(weights, pi):
    """Gradient by the logits of Σ_a π_b(a) log π(a) w(a), where `weights` are π_b(a) w(a): Σ_a weights_a (e_a - π)."""
    return weights - pi * weights.sum()


def kl_gradients(pi, ref, old):
    """Closed forms: what `DESCENDS` promises, by its words."""
    d = np.log(pi / ref)
    half_square = d**2 / 2

    def of_mean(values, slopes):  # the gradient of E_π[values], whose derivatives by log π are the slopes
        return pi * (values - pi @ values) + tabular(pi * slopes, pi)

    return {
        "0": np.zeros_like(pi),
        "that of KL(π ‖ π_ref)": pi * (d - pi @ d),
        "that of KL(π_ref ‖ π)": pi - ref,
        "minus that of KL(π_old ‖ π)": old - pi,
        "that of the mean of k2 over tokens of π": of_mean(half_square, d),
        "that of the mean of k2 over tokens of π_old": tabular(old * d, pi),
        "that of the mean of k3 over tokens of π_old": tabular(old * (1 - ref / pi), pi),
        "that of the mean of k1 + k2 over tokens of π_old": tabular(old * (1 + d), pi),
        "that of the mean of k2 - x³/6 over tokens of π_old": tabular(old * (d + half_square), pi),
    }


def logits_of(p):
    return torch.tensor(np.log(p)).requires_grad_()


def expected_gradient(kl, pi, ref, behaviour):
    """The mean over actions of `behaviour` of the term's gradient, by autograd of `reference_kl`."""
    theta = logits_of(pi)
    old = torch.tensor(behaviour)
    term = reference_kl(theta.log_softmax(0), torch.tensor(ref).log(), kl, old_logprobs=old.log())
    return torch.autograd.grad((old * term).sum(), theta)[0].numpy()


@pytest.mark.parametrize("kl", NAMES)
@pytest.mark.parametrize("n", [2, 5, 9])
def test_on_policy_and_off_policy_gradients(kl, n):
    for seed in range(5):
        pi, ref, old, _ = policies(n, seed)
        want = kl_gradients(pi, ref, old)
        np.testing.assert_allclose(expected_gradient(kl, pi, ref, pi), want[DESCENDS[kl].on_policy], **EXACT)
        off = expected_gradient(kl, pi, ref, old)
        np.testing.assert_allclose(off, want[DESCENDS[kl].off_policy], **EXACT)
        right = np.abs(off - want["that of KL(π ‖ π_ref)"]).max() < 1e-12
        assert right == (kl in ("k1-ratio", "k3-ratio"))


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_values(name):
    x = torch.linspace(-5, 5, 41, dtype=torch.float64)
    new, ref = torch.full_like(x, -6.0), x - 6.0
    function = {"k1": k1, "k2": k2, "k3": k3}[name]
    want = {"k1": -x, "k2": x**2 / 2, "k3": torch.expm1(x) - x}[name]
    torch.testing.assert_close(function(x), want, rtol=1e-12, atol=1e-14)
    for kl, factor in ((name, 1.0), (f"{name}-unbiased", 1.0), (f"{name}-ratio", math.exp(0.7))):
        torch.testing.assert_close(
            reference_kl(new, ref, kl, old_logprobs=new - 0.7), factor * want, rtol=1e-12, atol=1e-14
        )


def test_expected_values():
    """The mean of k1 and k3 over tokens of π is KL(π ‖ π_ref), also with the ratio over tokens of π_old; that of k2 is not."""
    pi, ref, old, _ = (torch.tensor(p) for p in policies(6, 3))
    true = (pi * (pi / ref).log()).sum()
    for name in ("k1", "k3"):
        for suffix, behaviour in (("", pi), ("-unbiased", pi), ("-ratio", pi), ("-ratio", old)):
            term = reference_kl(pi.log(), ref.log(), name + suffix, old_logprobs=behaviour.log())
            torch.testing.assert_close((behaviour * term).sum(), true)
    assert ((pi * reference_kl(pi.log(), ref.log(), "k2")).sum() - true).abs() > 0.01


def test_the_numbers_of_the_finding():
    """Five actions, exact: the plain k3 has the first gradient, the second one is right."""
    pi = np.array([0.2568, 0.1595, 0.3190, 0.1931, 0.0716])
    ref = np.array([0.1768, 0.2695, 0.1340, 0.2201, 0.1996])
    pi, ref = pi / pi.sum(), ref / ref.sum()
    wrong, right = [0.080, -0.110, 0.185, -0.027, -0.128], [0.047, -0.114, 0.216, -0.062, -0.087]
    np.testing.assert_allclose(expected_gradient("k3", pi, ref, pi), wrong, atol=6e-4)
    for kl in ("k1-unbiased", "k3-unbiased", "k1-ratio", "k3-ratio", "k2"):
        np.testing.assert_allclose(expected_gradient(kl, pi, ref, pi), right, atol=6e-4)


def test_the_gradient_of_r_times_k_is_that_of_autograd():
    """DeepSeek-V3.2's form, written down and differentiated as it is."""
    for name in ("k1", "k2", "k3"):
        new = torch.tensor([-1.3, -0.2, -4.0], dtype=torch.float64, requires_grad=True)
        old, ref = torch.tensor([-1.0, -0.9, -2.0]).double(), torch.tensor([-2.0, -0.1, -3.0]).double()
        x = ref - new
        k = {"k1": -x, "k2": x**2 / 2, "k3": x.exp() - x - 1}[name]
        want_value = (new - old).exp() * k
        (want,) = torch.autograd.grad(want_value.sum(), new)
        term = reference_kl(new, ref, f"{name}-ratio", old_logprobs=old)
        torch.testing.assert_close(term, want_value)
        torch.testing.assert_close(torch.autograd.grad(term.sum(), new)[0], want)


def through_policy_loss(objective, pi, ref, old, behaviour, **more):
    """Expected gradient of the KL term of `policy_loss`: each action is a sequence of one token, with its probability."""
    theta = logits_of(pi)
    n = len(pi)
    columns = [torch.tensor(p).log().unsqueeze(1) for p in (old, behaviour, ref)]
    loss, metrics = policy_loss(
        logprobs=theta.log_softmax(0).unsqueeze(1), old_logprobs=columns[0], rollout_logprobs=columns[1],
        ref_logprobs=columns[2], advantages=torch.zeros(n, dtype=torch.float64), mask=torch.ones(n, 1, dtype=torch.bool),
        objective=objective, sample_weight=torch.tensor(behaviour) * n, **more,
    )  # fmt: skip
    return torch.autograd.grad(loss, theta)[0].numpy(), metrics


@pytest.mark.parametrize(
    "objective",
    [
        OBJECTIVES["bandpo-kl"], OBJECTIVES["dapo"], OBJECTIVES["cispo"], OBJECTIVES["gspo"], OBJECTIVES["topr"],
        dataclasses.replace(OBJECTIVES["bandpo-kl"], kl_coef=1.0),
    ], ids=lambda o: f"{o.name}-{o.kl_coef:g}",
)  # fmt: skip
def test_the_default_of_policy_loss_is_the_gradient_of_the_kl(objective):
    pi, ref, old, _ = policies(5, 11)
    coefficient = {} if objective.kl_coef else {"kl_coef": 1.0}
    want = kl_gradients(pi, ref, old)["that of KL(π ‖ π_ref)"]
    for behaviour in (pi, old):
        found, metrics = through_policy_loss(objective, pi, ref, behaviour, behaviour, **coefficient)
        np.testing.assert_allclose(found, want, **EXACT)
        x = np.log(ref / pi)
        assert metrics["kl/ref"].item() == pytest.approx((np.exp(x) - x - 1).mean(), rel=1e-12)
    plain, _ = through_policy_loss(objective, pi, ref, old, old, kl_coef=1.0, kl="k3")
    np.testing.assert_allclose(
        plain, kl_gradients(pi, ref, old)["that of the mean of k3 over tokens of π_old"], **EXACT
    )


def test_the_ratio_is_that_to_the_policy_of_the_tokens():
    """The sampler with a rollout anchor; π_old and the weights of the correction with a correction for the sampler."""
    pi, ref, old, mu = policies(5, 12)
    want = kl_gradients(pi, ref, old)["that of KL(π ‖ π_ref)"]
    rollout = dataclasses.replace(OBJECTIVES["bandpo-kl"], anchor="rollout")
    corrected = dataclasses.replace(OBJECTIVES["bandpo-kl"], correction=TIS(math.inf))
    for objective in (rollout, corrected):
        np.testing.assert_allclose(through_policy_loss(objective, pi, ref, old, mu, kl_coef=1.0)[0], want, **EXACT)
    uncorrected = through_policy_loss(OBJECTIVES["bandpo-kl"], pi, ref, old, mu, kl_coef=1.0)[0]
    assert np.abs(uncorrected - want).max() > 0.01


def test_later_tokens_are_in_no_term():
    """Two steps of three actions, all nine ways: terms have E_old Σ_t ∇KL_t, not how the first token moves the second.

    Also with a sequence level, where the ratio of the KL term is that of the token.
    """
    g = np.random.default_rng(4)
    first, second = g.normal(size=3), g.normal(size=(3, 3))
    ref, old = ([g.dirichlet(np.ones(3)), np.stack([g.dirichlet(np.ones(3)) for _ in range(3)])] for _ in range(2))
    ways = [(a, b) for a in range(3) for b in range(3)]

    def rows(p0, p1):
        return torch.stack([torch.stack([p0[a], p1[a, b]]) for a, b in ways])

    def on_tokens(name, behaviour):
        theta = [torch.tensor(x, requires_grad=True) for x in (first, second)]
        before = rows(*(torch.tensor(x).log() for x in behaviour))
        chance = before.sum(1).exp()
        loss, _ = policy_loss(
            logprobs=rows(theta[0].log_softmax(0), theta[1].log_softmax(1)), old_logprobs=before,
            ref_logprobs=rows(*(torch.tensor(x).log() for x in ref)), advantages=torch.zeros(9, dtype=torch.float64),
            mask=torch.ones(9, 2), kl_coef=1.0, sample_weight=9 * chance,
            objective=Objective(bounds=Clip(), ratio_level=name, aggregation="seq-mean-token-sum"),
        )  # fmt: skip
        return [x.numpy() for x in torch.autograd.grad(loss, theta)]

    pi = [np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (first, second)]
    d = [np.log(p / r) for p, r in zip(pi, ref, strict=True)]
    kl1 = (pi[1] * d[1]).sum(1)  # of the second token, after each first one
    own = [pi[0] * (d[0] - pi[0] @ d[0]), pi[1] * (d[1] - kl1[:, None])]
    for behaviour in (pi, old):
        for level in ("token", "sequence", "product"):
            found = on_tokens(level, behaviour)
            np.testing.assert_allclose(found[0], own[0], **EXACT)
            np.testing.assert_allclose(found[1], behaviour[0][:, None] * own[1], **EXACT)
    # The KL of whole ways is KL_0 + Σ_a π(a) KL_1(a): its gradient by the first logits has one more term.
    theta = [torch.tensor(x, requires_grad=True) for x in (first, second)]
    p = theta[0].softmax(0).unsqueeze(1) * theta[1].softmax(1)
    q = torch.tensor(ref[0]).unsqueeze(1) * torch.tensor(ref[1])
    whole = [x.numpy() for x in torch.autograd.grad((p * (p / q).log()).sum(), theta)]
    missing = pi[0] * (kl1 - pi[0] @ kl1)
    assert np.abs(missing).max() > 0.01
    np.testing.assert_allclose(whole[0], own[0] + missing, rtol=1e-9)
    np.testing.assert_allclose(whole[1], pi[0][:, None] * own[1], rtol=1e-9)


@pytest.mark.parametrize("kl", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_extreme_log_ratios_stay_finite(kl, dtype):
    ends = torch.tensor([-1e9, -500.0, -200.0, -41.0, -39.0, -1.0, -1e-3, 0.0], dtype=dtype)
    new, old, ref = (x.unsqueeze(1) for x in torch.cartesian_prod(ends, ends, ends).unbind(1))
    new = new.clone().requires_grad_()
    term = reference_kl(new, ref, kl, old_logprobs=old)
    term.sum().backward()
    assert term.isfinite().all() and new.grad.isfinite().all()
    x = (ref - new).detach().float()
    assert (new.grad[x.abs() > 40.5] == 0).all()  # 16-bit log-probs are rounded
    if kl.endswith("ratio"):
        assert (new.grad[(new - old).float().abs() > 40.5] == 0).all()


def test_a_large_log_ratio_keeps_its_digits():
    """k3 + dk3/dlog π in float32 at x = 20 is a difference of numbers of 4.9e8, whose spacing is 32; the weight is -20."""
    new = torch.tensor([-25.0], requires_grad=True)
    for kl in ("k3-unbiased", "k3-ratio"):
        (gradient,) = torch.autograd.grad(
            reference_kl(new, torch.tensor([-5.0]), kl, old_logprobs=torch.tensor([-25.0])).sum(), new
        )
        assert gradient.item() == -20.0


@pytest.mark.parametrize("kl", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -3e38])
def test_a_token_without_a_reference_is_left_out(kl, value):
    g = torch.Generator().manual_seed(0)
    new, old, ref = (-torch.rand(3, 4, generator=g) * 3 - 0.1 for _ in range(3))
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1, 2:] = False
    found = []
    for x, on in ((value, mask), (-1.0, mask & ~torch.nn.functional.one_hot(torch.tensor([1, 0, 3]), 4).bool())):
        ref[torch.arange(3), torch.tensor([1, 0, 3])] = x
        leaf = new.clone().requires_grad_()
        loss, metrics = policy_loss(
            logprobs=leaf, old_logprobs=old, ref_logprobs=ref, advantages=torch.tensor([1.0, -1.0, 0.5]), mask=on,
            objective="dapo", kl_coef=0.3, kl=kl, normalizer=10.0,
        )  # fmt: skip
        loss.backward()
        found.append((loss.detach(), leaf.grad, metrics["kl/ref"], metrics["nonfinite_fraction"].item()))
    for a, b in zip(found[0][:3], found[1][:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert (found[0][3], found[1][3]) == (pytest.approx(0.3), 0)


def test_the_plain_k3_is_what_it_was():
    g = torch.Generator().manual_seed(1)
    new, old, ref = (-torch.rand(4, 6, generator=g) * 5 for _ in range(3))
    leaf = new.clone().requires_grad_()
    (want,) = torch.autograd.grad(approx_kl(ref - leaf).mean(), leaf)
    loss, _ = policy_loss(
        logprobs=leaf, old_logprobs=old, ref_logprobs=ref, advantages=torch.zeros(4), mask=torch.ones(4, 6),
        objective="dapo", kl_coef=1.0, kl="k3",
    )  # fmt: skip
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], want, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, approx_kl(ref - new).mean(), rtol=1e-6, atol=1e-7)


def test_the_setting_of_the_paper_s_runs():
    """A = -1, r = 20, p = 0.01: a dual clip of 10 stops the token, whose gradient is -20 in bandpo-kl."""
    paper, plain = OBJECTIVES["bandpo-kl-paper"], OBJECTIVES["bandpo-kl"]
    assert (paper.kl_coef, paper.kl, paper.aggregation, paper.bounds) == (
        0.001,
        "k3",
        "seq-mean-token-mean",
        Band(KL, 0.05),
    )
    assert (plain.kl_coef, plain.aggregation) == (0.0, paper.aggregation)
    old = torch.tensor([[0.01]], dtype=torch.float64).log()
    found = {}
    for objective in (paper, plain):
        for shift in (0.0, 0.5):
            new = (old + math.log(20)).requires_grad_()
            loss, _ = policy_loss(
                logprobs=new, old_logprobs=old, advantages=-torch.ones(1), mask=torch.ones(1, 1), objective=objective,
                ref_logprobs=new.detach() + shift,
            )  # fmt: skip
            found[objective.name, shift] = -torch.autograd.grad(loss, new)[0].item()
    assert found["bandpo-kl-paper", 0.0] == 0
    assert found["bandpo-kl", 0.0] == found["bandpo-kl", 0.5] == pytest.approx(-20)
    assert found["bandpo-kl-paper", 0.5] == pytest.approx(0.001 * math.expm1(0.5), rel=1e-12)  # plain k3: e^x - 1


def test_an_objective_s_kl_is_honoured_or_refused():
    x = torch.full((1, 2), -1.0)
    given = {"logprobs": x, "old_logprobs": x, "advantages": torch.ones(1), "mask": torch.ones(1, 2)}
    with pytest.raises(ValueError, match=r"kl_coef=0.001 of objective 'bandpo-kl-paper' needs ref_logprobs"):
        policy_loss(**given, objective="bandpo-kl-paper")
    without, _ = policy_loss(**given, objective="bandpo-kl-paper", kl_coef=0.0)
    ref = x - 0.5
    own, _ = policy_loss(**given, objective="bandpo-kl-paper", ref_logprobs=ref)
    more, _ = policy_loss(**given, objective="bandpo-kl-paper", ref_logprobs=ref, kl_coef=0.01, kl="k2")
    assert (own - without).item() == pytest.approx(0.001 * (math.exp(-0.5) - 0.5), rel=1e-3)
    assert (more - without).item() == pytest.approx(0.01 * 0.125, rel=1e-3)
    for wrong, words in (
        ({"kl": "k4"}, "kl: got 'k4'"),
        ({"kl_coef": -1.0}, "kl_coef must be"),
        ({"kl_coef": True}, "True"),
    ):
        with pytest.raises(ValueError, match=words):
            Objective(bounds=Clip(), **wrong)
        with pytest.raises(ValueError, match=words):
            policy_loss(**given, ref_logprobs=ref, **wrong)
    with pytest.raises(ValueError, match="needs old_logprobs"):
        reference_kl(x, ref)
    with pytest.raises(ValueError, match=r"the KL term \(kl_coef=0.001\)"):
        Pruning(completions=0.5).check(OBJECTIVES["bandpo-kl-paper"])
    Pruning(completions=0.5).check(OBJECTIVES["bandpo-kl-paper"], kl_coef=0.0)
