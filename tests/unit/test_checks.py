"""`bandpo.testing` accepts every part of the library, and refuses broken ones; wrong extras are told before any kernel."""

import math

import pytest
import torch

import bandpo.bounds.regions as regions
import bandpo.surrogates as surrogates
import bandpo.terms as terms
from bandpo import DCPO, OBJECTIVES, Band, Clip, FDivergence, Objective, RatioBounds, alpha, policy_loss, traits
from bandpo.bounds import outside
from bandpo.divergences import CHI2, DIVERGENCES, KL, TV
from bandpo.experimental import Balanced, Elastic, clip_cov, kl_cov, log_stabilized
from bandpo.testing import check_bounds, check_divergence, check_surrogate

BOUNDS = [
    *dict.fromkeys(o.bounds for o in OBJECTIVES.values()),
    *(Band(d, 0.05, max_ratio=cap) for d in DIVERGENCES.values() for cap in (None, 10.0)),
    Band(KL, (0.01, 0.1), relax=Clip(0.2, 0.28)),
    *(Clip(), Clip(1.0, math.inf), DCPO(), Elastic(), Elastic(1.0, 5.0), Balanced()),
    *(regions.log_clip(), regions.kl3_clip(), regions.TopK(), regions.TopK("tv", (0.1, 0.2), k=1)),
    *(regions.BySign(Clip(0.2), Band()), regions.Sides(Clip(0.2), Band("tv", 0.05))),
]
NAMED = [  # functions: troll's is an object of a class
    x
    for x in vars(surrogates).values()
    if not isinstance(x, type) and callable(getattr(getattr(x, "stops", None), "rule", None))
]
SURROGATES = [*dict.fromkeys(o.surrogate for o in OBJECTIVES.values()), *NAMED, clip_cov, kl_cov, log_stabilized]


@pytest.mark.parametrize("divergence", [*DIVERGENCES.values(), *map(alpha, (-2.0, 0.7, 4.0))], ids=lambda d: d.name)
def test_every_divergence_is_accepted(divergence):
    check_divergence(divergence)


@pytest.mark.parametrize("bounds", BOUNDS, ids=repr)
def test_every_region_is_accepted(bounds):
    check_bounds(bounds)


def test_every_surrogate_is_accepted():
    assert len(NAMED) >= 12  # the module's own, found by their rules
    for surrogate in SURROGATES:
        check_surrogate(surrogate)


def _like(x, value):
    return torch.full_like(x.detach(), value)


def _no_log(x):
    return RatioBounds(1 - 0.2 * x.exp(), _like(x, 1.2))


def _leaky(x):
    return RatioBounds(_like(x, 0.8), 1.2 - 0 * x)


def _of_neighbours(x):
    return RatioBounds(_like(x, 0.8), _like(x, 1.0) - x.detach().mean())


def _of_batch_without_mark(x, *, log_ratio):
    return RatioBounds(_like(x, 0.8), _like(x, 1.0) + log_ratio.detach().numel())


BROKEN_BOUNDS = {
    "above one": (lambda x: RatioBounds(_like(x, 1.1), _like(x, 1.2)), "lower must be in"),
    "below zero": (lambda x: RatioBounds(_like(x, -0.1), _like(x, 1.2)), "lower must be in"),
    "below one": (lambda x: RatioBounds(_like(x, 0.8), _like(x, 0.9)), "upper must be >= 1"),
    "NaN": (lambda x: RatioBounds(_like(x, math.nan), _like(x, 1.2)), "lower must be in"),
    "dtype": (lambda x: RatioBounds(_like(x, 0.8).double(), _like(x, 1.2).double()), "dtype"),
    "shape": (lambda x: RatioBounds(torch.tensor(0.8), torch.tensor(1.2)), "shape"),
    "gradient, lower": (_no_log, "gradient"),
    "gradient, upper": (_leaky, "gradient"),
    "neighbours": (_of_neighbours, "neighbours"),
    "neighbours by an input": (_of_batch_without_mark, "neighbours"),
    "membership unmarked": (lambda x: x.detach() < 0, "membership"),
    "edges marked as membership": (traits("membership")(lambda x: Clip()(x)), "one bool tensor"),
    "outside on policy": (traits("membership")(lambda x: x.detach() < -1), "must be inside"),
    "membership of another shape": (traits("membership")(lambda x: torch.ones(1, dtype=torch.bool)), "shape"),
}


@pytest.mark.parametrize("name", BROKEN_BOUNDS)
def test_broken_regions_are_refused(name):
    bounds, words = BROKEN_BOUNDS[name]
    with pytest.raises(AssertionError, match=words):
        check_bounds(bounds)


def _step(x, a, b):
    return (x.exp() * a).masked_fill(outside(x, a, b), 0.0)


BROKEN_SURROGATES = {
    "twice": (lambda x, a, b: (2 * x).exp() * a, "on policy"),
    "sign": (lambda x, a, b: -x.exp() * a, "on policy"),
    "absolute": (lambda x, a, b: x.exp() * a.abs(), "on policy"),
    "shifted": (lambda x, a, b: (x + 0.01).exp() * a, "on policy"),
    "constant": (lambda x, a, b: a + 0 * x, "on policy"),
    "sum": (lambda x, a, b: (x.exp() * a).sum(), "shape"),
    "column lost": (lambda x, a, b: (x.exp() * a).squeeze(-1), "shape"),
    "overflow": (lambda x, a, b: (x * 1.0).exp().pow(30) ** (1 / 30) * a, "at log r = "),
    "NaN slope": (lambda x, a, b: x.exp() * a + 0 * (x + 1).clamp_min(0).sqrt(), "at log r"),
    "bounds moved to 1": (lambda x, a, b: surrogates.clip(x, a, RatioBounds(b.lower + 0.3, b.upper)), "on policy"),
}


def test_a_hand_written_mask_is_accepted():
    check_surrogate(_step)


@pytest.mark.parametrize("name", BROKEN_SURROGATES)
def test_broken_surrogates_are_refused(name):
    surrogate, words = BROKEN_SURROGATES[name]
    with pytest.raises(AssertionError, match=words):
        check_surrogate(surrogate)


BROKEN_DIVERGENCES = {
    "below 0": (lambda: FDivergence("x", lambda u: (u - 1).square() - (u - 1).abs() ** 3), "must be >= 0"),
    "not convex": (lambda: FDivergence("x", lambda u: u.log().square()), "convex"),
    "linear": (lambda: FDivergence("x", lambda u: 3 * (u - 1)), "linear"),
    "nothing": (lambda: FDivergence("x", lambda u: 0 * u), "linear"),
    "float32": (lambda: FDivergence("x", lambda u: (u - 1).square().float()), "dtype"),
    "another f_exp": (lambda: FDivergence("x", KL.f, lambda t: 1.001 * (t.expm1() - t)), "f_exp"),
    "f_exp of another slope": (lambda: FDivergence("x", KL.f, lambda t: -t), "f_exp"),
    "closed form too wide": (
        lambda: FDivergence("x", TV.f, TV.f_exp, 0.5, closed_form=lambda lp, d: TV.closed_form(lp, 1.01 * d)),
        "radius",
    ),
    "closed form too narrow": (
        lambda: FDivergence("x", TV.f, TV.f_exp, 0.5, closed_form=lambda lp, d: TV.closed_form(lp, 0.99 * d)),
        "not the largest",
    ),
    "slope at infinity": (lambda: FDivergence("x", KL.f, KL.f_exp, 2.0), "slope_at_infinity"),
    "finite slope of an infinite one": (lambda: FDivergence("x", CHI2.f, CHI2.f_exp, 5.0), "slope_at_infinity"),
    "infinite slope of a finite one": (lambda: FDivergence("x", KL.f, KL.f_exp, math.inf), "slope_at_infinity"),
}


@pytest.mark.parametrize("name", BROKEN_DIVERGENCES)
def test_broken_divergences_are_refused(name):
    made, words = BROKEN_DIVERGENCES[name]
    with pytest.raises(AssertionError, match=words):
        check_divergence(made())


def test_a_region_of_the_top_k_is_given_tokens_that_have_not_moved():
    @traits("membership")
    class Reversed:
        def __call__(self, old_logprobs, *, topk_logprobs, old_topk_logprobs, sampled_in_topk):
            assert topk_logprobs.shape == old_topk_logprobs.shape == (*old_logprobs.shape, 2)
            return (topk_logprobs.exp() - old_topk_logprobs.exp()).abs().sum(-1) > 0

    with pytest.raises(AssertionError, match="must be inside"):
        check_bounds(Reversed())


@pytest.mark.parametrize(
    ("objective", "extras"),
    [
        (OBJECTIVES["grpo"], {"signal": torch.zeros(2)}),
        (OBJECTIVES["bandpo-kl"], {"typo": torch.zeros(2, 3)}),
        (Objective(bounds=Elastic()), {}),
        (Objective(bounds=Elastic()), {"signal": torch.zeros(3)}),
    ],
)
def test_wrong_extras_are_told_before_the_fused_kernel_could_run(objective, extras, monkeypatch):
    """On CUDA a clip is one kernel that takes no extras: they are checked although it would not miss them."""
    ran = []

    def fused(logprobs, old, advantages, valid, objective):
        ran.append(objective)
        return logprobs * 0, RatioBounds(old, old), valid, None

    monkeypatch.setattr(terms, "_by_kernel", lambda *given: True)
    monkeypatch.setattr(terms, "_fused", fused)
    x = torch.full((2, 3), -1.0)
    given = {"old_logprobs": x, "advantages": torch.ones(2), "mask": torch.ones(2, 3)}
    with pytest.raises(ValueError, match="extras"):
        policy_loss(logprobs=x.clone().requires_grad_(), objective=objective, extras=extras, **given)
    assert not ran
    policy_loss(logprobs=x.clone().requires_grad_(), objective=OBJECTIVES["grpo"], **given)
    assert ran == [OBJECTIVES["grpo"]]


def test_a_surrogate_without_a_gradient_is_named():
    with pytest.raises(AssertionError, match="no gradient by the log-ratio"):
        check_surrogate(lambda log_ratio, advantages, bounds: (log_ratio.exp() * advantages).detach())
