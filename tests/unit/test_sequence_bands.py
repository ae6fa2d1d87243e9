"""Bands at the level of a sequence: against loops in numpy, whose edges scipy finds from the divergence itself."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from bandpo import (
    CHI2,
    DCPO,
    KL,
    OBJECTIVES,
    REVERSE_KL,
    TV,
    Band,
    Clip,
    Objective,
    match_radius,
    policy_loss,
    token_objective,
)
from bandpo.bounds import BySign, Intersection, Sides, TopK
from bandpo.experimental import Balanced, Elastic
from bandpo.losses import compiled
from bandpo.metrics import policy_metrics
from bandpo.surrogates import clip, mask, two_sided
from bandpo.terms import level_logprobs
from batches import B, T, batch

AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"]
GENERATORS = {
    "KL": lambda u: -np.log(u) + u - 1 if u > 0 else math.inf,
    "REVERSE_KL": lambda u: u * np.log(u) - u + 1 if u > 0 else 1.0,
    "TV": lambda u: abs(u - 1) / 2,
    "CHI2": lambda u: (u - 1) ** 2,
}


def edges(divergence, p, radius):
    """The two ends of `{r : p f(r) + (1-p) f((1-pr)/(1-p)) <= δ}` by bisection."""
    f = GENERATORS[divergence.name]

    def excess(r):
        return p * f(r) + (1 - p) * f((1 - p * r) / (1 - p)) - radius

    low = 0.0 if excess(1e-300) <= 0 else brentq(excess, 1e-300, 1.0, xtol=1e-15)
    high = 1 / p if excess((1 / p) * (1 - 1e-15)) <= 0 else brentq(excess, 1.0, (1 / p) * (1 - 1e-15), xtol=1e-15)
    return low, high


def holes(seed, spread):
    data = batch(seed, spread=spread)
    data["mask"][0, 3] = data["mask"][4, 0] = data["mask"][4, 7] = False
    data["mask"][1] = False
    return data


def weights(valid, aggregation):
    """What each token's value is multiplied by."""
    lengths, rows = np.maximum(valid.sum(1, keepdims=True), 1), valid.any(1).sum()
    return valid * {"token-mean": 1 / valid.sum(), "token-sum": 1.0, "seq-mean-token-sum": 1 / rows,
                    "seq-mean-token-mean": 1 / lengths / rows}[aggregation]  # fmt: skip


def by_numpy(data, divergence, radius, aggregation, level):
    """Loss and gradient of the clipped objective whose ratio and probability are those of the sequence."""
    new, old, a, valid = (data[k].numpy() for k in ("logprobs", "old_logprobs", "advantages", "mask"))
    per_token = a.ndim == 2
    c, loss, gradient = weights(valid, aggregation), 0.0, np.zeros((B, T))
    for i in range(B):
        places = np.flatnonzero(valid[i])
        if not len(places):
            continue
        n = len(places)
        share = 1 / n if level == "sequence" else 1.0
        s, p = np.exp(share * (new[i] - old[i])[places].sum()), np.exp(share * old[i][places].sum())
        low, high = edges(divergence, p, radius)
        for t in places:
            advantage = a[i, t] if per_token else a[i]
            kept = not ((advantage > 0 and s > high) or (advantage < 0 and s < low))
            loss -= c[i, t] * (s if kept else np.clip(s, low, high)) * advantage
            if kept and per_token:  # GSPO-token: each token moves by its own advantage
                gradient[i, t] -= c[i, t] * s * advantage * share * n
            elif kept:
                gradient[i, places] -= c[i, t] * s * advantage * share
    return loss, gradient


def ours(data, objective):
    x = data["logprobs"].clone().requires_grad_()
    loss, metrics = policy_loss(**{**data, "logprobs": x}, objective=objective, metrics="full")
    (gradient,) = torch.autograd.grad(loss, x)
    return loss.item(), gradient.numpy(), metrics


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("divergence", [KL, REVERSE_KL, TV, CHI2], ids=lambda d: d.name)
@pytest.mark.parametrize("level", ["sequence", "product"])
def test_value_and_gradient_against_numpy(level, divergence, per_token):
    left = 0
    for seed, spread, radius in ((0, 0.6, 0.01), (1, 0.3, 0.002), (2, 0.05, 1e-4)):
        data = holes(seed, spread)
        if per_token:
            g = torch.Generator().manual_seed(seed)
            data["advantages"] = torch.randn(B, T, generator=g, dtype=torch.float64)
        for aggregation in AGGREGATIONS:
            objective = Objective(
                bounds=Band(divergence, radius, max_ratio=None), ratio_level=level, aggregation=aggregation
            )
            loss, gradient, metrics = ours(data, objective)
            want, want_gradient = by_numpy(data, divergence, radius, aggregation, level)
            assert loss == pytest.approx(want, rel=1e-9)
            np.testing.assert_allclose(gradient, want_gradient, rtol=1e-9, atol=1e-14)
            assert (gradient[~data["mask"].numpy()] == 0).all()
        left += (gradient[data["mask"].numpy()] == 0).sum()
        assert metrics["clip_fraction/any"].item() == pytest.approx(
            (gradient[data["mask"].numpy()] == 0).mean(), abs=1e-6
        )
    assert left > 0, "the test must see clipped sequences"


def test_equal_tokens_give_the_band_of_the_token():
    """All tokens of a sequence with one p and one ratio: value and gradient are those of the token-level band."""
    g = torch.Generator().manual_seed(0)
    old = (-torch.rand(B, 1, generator=g, dtype=torch.float64) * 4 - 1e-2).expand(B, T)
    new = torch.minimum(old + 0.5 * torch.randn(B, 1, generator=g, dtype=torch.float64), torch.tensor(-1e-6))
    data = {**batch(), "old_logprobs": old, "logprobs": new}
    for bounds in (
        Band(KL, 0.01),
        DCPO(),
        Sides(Clip(0.1), Band(TV, 0.02)),
        Intersection(Band(KL, 0.05), Band(REVERSE_KL, 0.05)),
    ):
        for surrogate in (clip, mask, two_sided):
            # A mean over tokens: of a sequence, every token has the same gradient.
            token = Objective(bounds=bounds, surrogate=surrogate, aggregation="seq-mean-token-mean")
            found, want = ours(data, replace(token, ratio_level="sequence")), ours(data, token)
            assert found[0] == pytest.approx(want[0], rel=1e-12)
            np.testing.assert_allclose(found[1], want[1], rtol=1e-9, atol=1e-14)
            for key in ("band/saturated_fraction", "band/cap_fraction", "clip_fraction/any", "band/upper_mean"):
                torch.testing.assert_close(found[2][key], want[2][key], rtol=1e-6, atol=1e-6)
            if isinstance(bounds, Band):
                torch.testing.assert_close(found[2]["band/divergence_mean"], want[2]["band/divergence_mean"])


def test_one_token_has_one_level():
    data = {**batch(), "mask": torch.zeros(B, T, dtype=torch.bool)}
    data["mask"][:, 4] = True
    losses = [ours(data, Objective(bounds=Band(KL, 0.02), ratio_level=x))[0] for x in ("token", "sequence", "product")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12) == pytest.approx(losses[2], rel=1e-12)


def test_the_scale_is_the_reciprocal_of_the_perplexity():
    """p̄ = 1/perplexity, s = perplexity before over perplexity after, and s·p̄ is the geometric mean of the new ones, <= 1."""
    data = holes(3, 0.6)
    objective = Objective(bounds=Band(KL, 0.05, max_ratio=None), ratio_level="sequence")
    terms = token_objective(objective, **data)
    used = data["mask"]
    scale = level_logprobs(objective, terms.anchor_logprobs, used)
    for i in range(B):
        if not used[i].any():
            continue
        before, after = (math.exp(-data[k][i][used[i]].mean().item()) for k in ("old_logprobs", "logprobs"))
        assert scale[i].exp().tolist() == pytest.approx([1 / before] * T)
        assert terms.log_ratio[i].exp().item() == pytest.approx(before / after)
        assert before / after / before <= 1
        assert (terms.bounds.upper[i] <= before * (1 + 1e-12)).all()
    whole = level_logprobs(replace(objective, ratio_level="product"), terms.anchor_logprobs, used)
    torch.testing.assert_close(whole[:, 0], terms.anchor_logprobs.sum(1))


def test_the_band_of_a_whole_sequence_is_exact():
    """Product level: at the edge, the closest policy over all 9 sequences of two tokens is at a KL of δ, by enumeration."""
    rng = np.random.default_rng(0)
    first, second = rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(3), 3)
    table = first[:, None] * second
    for i, j in ((0, 0), (1, 2), (2, 1)):
        old = torch.tensor([[np.log(first[i]), np.log(second[i, j])]])
        terms = token_objective(
            Objective(bounds=Band(KL, 0.03, max_ratio=None), ratio_level="product"), logprobs=old, old_logprobs=old,
            advantages=torch.ones(1), mask=torch.ones(1, 2),
        )  # fmt: skip
        for edge in (terms.bounds.lower[0, 0].item(), terms.bounds.upper[0, 0].item()):
            moved = table * (1 - table[i, j] * edge) / (1 - table[i, j])
            moved[i, j] = table[i, j] * edge
            assert moved.sum() == pytest.approx(1)
            assert (table * np.log(table / moved)).sum() == pytest.approx(0.03, rel=1e-9)


def test_metrics_use_the_scale_of_the_region():
    """Two tokens of p = 0.99 and 0.01: the simplex of the sequence is 1/p̄ = 10.05; the bins are the tokens'."""
    old = torch.tensor([[0.99, 0.01]], dtype=torch.float64).log()
    data = {
        "old_logprobs": old,
        "logprobs": old,
        "advantages": torch.ones(1, dtype=torch.float64),
        "mask": torch.ones(1, 2),
    }
    for bounds, saturated in (
        (Clip(0.2), 0),
        (Clip(1.0, 9.0), 0),
        (Clip(1.0, 9.2), 1),
        (Band(TV, 0.95, max_ratio=None), 1),
    ):
        found = policy_metrics(token_objective(Objective(bounds=bounds, ratio_level="sequence"), **data))
        assert found["band/saturated_fraction"] == saturated, bounds
        assert found["token_fraction_by_prob/>=0.99"] == found["token_fraction_by_prob/0.01:0.1"] == 0.5
    band = Band(KL, 0.05)
    moved = {**data, "logprobs": old - 0.1}
    terms = token_objective(Objective(bounds=band, ratio_level="sequence"), **moved)
    p, q = math.sqrt(0.99 * 0.01), math.sqrt(0.99 * 0.01) * math.exp(-0.1)
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert policy_metrics(terms)["band/divergence_mean"].item() == pytest.approx(kl / 0.05, rel=1e-9)


def test_nothing_of_a_clip_has_changed():
    """A Clip is given the log-probs of the tokens, whose values it does not read: bounds of each token, as before."""
    for name in ("gspo", "luspo"):
        terms = token_objective(OBJECTIVES[name], **holes(0, 0.1))
        assert terms.bounds.lower.shape == (B, T)
        assert terms.bounds.lower.unique().numel() == 1


def test_other_regions_at_the_level_of_a_sequence():
    data = holes(0, 0.3)
    p = level_logprobs(
        Objective(bounds=Band(), ratio_level="sequence"),
        data["old_logprobs"].masked_fill(~data["mask"], 0),
        data["mask"],
    )
    x = (data["logprobs"] - data["old_logprobs"]).masked_fill(~data["mask"], 0)
    s = x.sum(1, keepdim=True) / data["mask"].sum(1, keepdim=True).clamp_min(1)
    a = data["advantages"].unsqueeze(1)
    signal = {"signal": torch.rand(B, dtype=torch.float64)}
    for bounds, want, extras in (
        (DCPO(), DCPO()(p), None),
        (BySign(Band(KL, 0.02), Clip(0.1)), BySign(Band(KL, 0.02), Clip(0.1))(p, advantages=a), None),
        (Elastic(), Elastic()(p, advantages=a, signal=signal["signal"].unsqueeze(1)), signal),
        (Balanced(), Balanced()(p, log_ratio=s.expand(B, T), advantages=a, mask=data["mask"]), None),
    ):
        for shaped in (data["advantages"], a.expand(B, T)):
            found = token_objective(
                Objective(bounds=bounds, ratio_level="sequence"), **{**data, "advantages": shaped}, extras=extras
            ).bounds
            for side in ("lower", "upper"):
                both = torch.broadcast_tensors(getattr(found, side), getattr(want, side))
                assert torch.equal(*(v[data["mask"]] for v in both)), (bounds, side)


def test_what_has_no_meaning_for_a_sequence_is_refused():
    for bounds, what in (
        (TopK("tv", 0.15), "ask for logprobs"), (Intersection(Clip(0.2), TopK()), "ask for logprobs"),
        (lambda old, *, old_logprobs: Clip()(old), "ask for old_logprobs"),
    ):  # fmt: skip
        for level in ("sequence", "product"):
            with pytest.raises(
                ValueError, match=f"ratio_level='{level}' has one ratio for a sequence, and bounds=.*{what}"
            ):
                Objective(bounds=bounds, surrogate=mask, ratio_level=level)


@pytest.mark.parametrize("level", ["sequence", "product"])
def test_one_graph_and_narrow_dtypes(level):
    objective = Objective(bounds=Band(KL, 0.01), ratio_level=level, aggregation="seq-mean-token-mean")
    fast = compiled(backend="eager")
    want = policy_loss(**batch(), objective=objective)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        data = batch(dtype=dtype)
        plain = policy_loss(**data, objective=objective)
        torch.testing.assert_close(fast(**data, objective=objective)[0], plain[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(plain[0].double(), want[0], rtol=tolerance, atol=tolerance)


def test_a_radius_for_gspo_s_widths():
    """The ratio of a sequence averages its tokens: the ball that gives GSPO's 4e-4 at p̄ = 0.5 has δ = 8e-8, not 0.05."""
    radius = match_radius("kl", like=Clip(3e-4, 4e-4), by="upper@0.5")
    assert radius == pytest.approx(8e-8, rel=1e-3)
    bounds = Band(KL, radius)(torch.tensor([0.5]).log())
    assert bounds.upper.item() == pytest.approx(1 + 4e-4, abs=1e-6)
