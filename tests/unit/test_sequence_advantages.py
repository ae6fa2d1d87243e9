"""Advantages per token where the ratio is a sequence's: each token moves by its own (GSPO-token), against loops in autograd."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bandpo import OBJECTIVES, Clip, Objective, policy_loss
from bandpo.experimental import log_stabilized
from bandpo.surrogates import clip, dual_clip, two_sided
from bandpo.surrogates.corrections import TIS
from bandpo.zoo import get_objective
from batches import B, T, batch, complete, max_length, run

AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def per_token(seed=0, spread=0.3):
    """Sequences with holes, one of one token, one fully masked; advantages of each token."""
    data = batch(seed, spread=spread)
    data["mask"][0, 3] = data["mask"][4, 0] = data["mask"][4, 7] = False
    data["mask"][1] = False
    data["advantages"] = torch.randn(B, T, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return data


def coefficients(mask, aggregation):
    """What each token's value is multiplied by."""
    valid = mask.double()
    lengths, rows = valid.sum(1, keepdim=True).clamp_min(1), mask.any(1).sum().double()
    return valid * {
        "token-mean": 1 / valid.sum(), "token-sum": 1.0, "seq-mean-token-sum": 1 / rows,
        "seq-mean-token-mean": 1 / lengths / rows, "seq-mean-token-sum-norm": 1 / rows / 12,
    }[aggregation]  # fmt: skip


def by_loops(data, aggregation, term):
    """Loss and gradient of `Σ c_t term(i, t)`, token by token."""
    x = data["logprobs"].clone().requires_grad_()
    weight = coefficients(data["mask"], aggregation)
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(B):
        places = data["mask"][i].nonzero().flatten().tolist()
        for t in places:
            loss = loss - weight[i, t] * term(i, t, x, places)
    (gradient,) = torch.autograd.grad(loss, x)
    return loss.detach(), gradient


def gspo_token(data, low, high):
    old, a = data["old_logprobs"], data["advantages"]

    def term(i, t, x, places):
        mean = torch.stack([x[i, u] - old[i, u] for u in places]).mean()
        s = (x[i, t] - x[i, t].detach() + mean.detach()).exp()
        return torch.minimum(s * a[i, t], s.clamp(low, high) * a[i, t])

    return term


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("name", "low", "high"), [("gspo", 1 - 3e-4, 1 + 4e-4), ("luspo", 1 - 2e-3, 1 + 2.5e-3)])
def test_sequence_ratios_are_gspo_token(name, low, high, aggregation):
    for seed, spread in ((0, 0.3), (1, 1e-3), (2, 1e-3)):
        data = per_token(seed, spread)
        objective = dataclasses.replace(OBJECTIVES[name], aggregation=aggregation)
        loss, gradient, _ = run(objective, data)
        want, want_gradient = by_loops(data, aggregation, gspo_token(data, low, high))
        assert loss.item() == pytest.approx(want.item(), rel=1e-12)
        torch.testing.assert_close(gradient, want_gradient, rtol=1e-12, atol=1e-15)
        assert (gradient[~data["mask"]] == 0).all()


def test_by_hand():
    """old = new = [-1, -1], A = [2, -1]: dL/dlogp is [-1, 0.5]; the gradient of mean(A) would be -0.25 twice."""
    for name in ("gspo", "luspo"):
        x = torch.full((1, 2), -1.0, requires_grad=True)
        loss, _ = policy_loss(
            logprobs=x, old_logprobs=torch.full((1, 2), -1.0), advantages=torch.tensor([[2.0, -1.0]]),
            mask=torch.ones(1, 2), objective=dataclasses.replace(OBJECTIVES[name], aggregation="seq-mean-token-mean"),
        )  # fmt: skip
        loss.backward()
        assert x.grad.tolist() == [[-1.0, 0.5]]
        assert loss.item() == -0.5


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_product_ratio(aggregation):
    """Each token's score is weighed by the whole product: the gradient is Σ_t ρ A_t ∇log π_t for a mean over tokens."""
    data = per_token(spread=0.1)
    old, a = data["old_logprobs"], data["advantages"]

    def term(i, t, x, places):
        total = torch.stack([x[i, u] - old[i, u] for u in places]).sum()
        s = (len(places) * (x[i, t] - x[i, t].detach()) + total.detach()).exp()
        return torch.minimum(s * a[i, t], s.clamp(0.8, 1.2) * a[i, t])

    objective = Objective(bounds=Clip(0.2), ratio_level="product", aggregation=aggregation)
    loss, gradient, _ = run(objective, data)
    want, want_gradient = by_loops(data, aggregation, term)
    assert loss.item() == pytest.approx(want.item(), rel=1e-12)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-12, atol=1e-15)
    if aggregation == "seq-mean-token-mean":
        r = ((data["logprobs"] - old) * data["mask"]).sum(1, keepdim=True).exp()
        inside = ~(((a > 0) & (r > 1.2)) | ((a < 0) & (r < 0.8)))
        torch.testing.assert_close(gradient, -(r * a * inside * data["mask"]) / 5, rtol=1e-12, atol=1e-15)


def test_the_reading_of_quatro():
    data = per_token(spread=0.1)
    g = torch.Generator().manual_seed(4)
    extras = {"dual": torch.rand(B, generator=g).double() + 0.1, "baseline": 0.1 * torch.randn(B, generator=g).double()}
    loss, gradient, _ = run("quatro-reading", {**data, "extras": extras})
    x = ((data["logprobs"] - data["old_logprobs"]) * data["mask"]).sum(1, keepdim=True)
    dual, base = (extras[k].unsqueeze(1) for k in ("dual", "baseline"))
    value = x.exp() * (data["advantages"] - base) - dual * (x.exp() * x - x.exp() + 1)
    c = coefficients(data["mask"], "seq-mean-token-mean")
    assert loss.item() == pytest.approx(-(c * value).sum().item(), rel=1e-12)
    # the multiplier pulls by λ log ρ, each token is pushed by its own A
    want = -(data["mask"] * x.exp() * (data["advantages"] - base - dual * x)) / 5
    torch.testing.assert_close(gradient, want, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_geometric_means(aggregation):
    data = per_token(spread=0.6)
    old, a = data["old_logprobs"], data["advantages"]

    def held(x, i, t):
        c = (x[i, t] - old[i, t]).clamp(-0.4, 0.4)
        return torch.minimum(x[i, t] - old[i, t], c) if a[i, t] >= 0 else torch.maximum(x[i, t] - old[i, t], c)

    def term(i, t, x, places):
        mean = torch.stack([held(x, i, u) for u in places]).mean()
        return (held(x, i, t) - held(x, i, t).detach() + mean.detach()).exp() * a[i, t]

    objective = dataclasses.replace(OBJECTIVES["gmpo"], aggregation=aggregation)
    loss, gradient, _ = run(objective, data)
    want, want_gradient = by_loops(data, aggregation, term)
    assert loss.item() == pytest.approx(want.item(), rel=1e-12)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-12, atol=1e-15)


def test_topr_tapers_each_bad_token_by_its_sequence():
    data = per_token(spread=0.3)
    _, gradient, _ = run("topr", data)
    rho = ((data["logprobs"] - data["old_logprobs"]) * data["mask"]).sum(1, keepdim=True).exp()
    a = data["advantages"]
    want = -torch.where(a < 0, rho.clamp(max=1), torch.ones_like(a)) * a * data["mask"] / 5
    torch.testing.assert_close(gradient, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_with_a_correction_for_the_sampler(level):
    data = per_token(spread=1e-3)
    mismatch = 0.3 * torch.randn(B, T, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    objective = dataclasses.replace(OBJECTIVES["gspo"], correction=TIS(2.0, level))
    loss, gradient, _ = run(objective, {**data, "rollout_logprobs": data["old_logprobs"] - mismatch})
    whole = (mismatch * data["mask"]).sum(1, keepdim=True).expand(B, T)
    w = (mismatch if level == "token" else whole).exp().clamp(max=2)
    plain = gspo_token(data, 1 - 3e-4, 1 + 4e-4)
    want, want_gradient = by_loops(data, objective.aggregation, lambda i, t, x, at: w[i, t] * plain(i, t, x, at))
    assert loss.item() == pytest.approx(want.item(), rel=1e-12)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-12, atol=1e-15)


SEQUENCES = [
    "gspo", "luspo", "gmpo", "topr", "quatro-reading",
    Objective(bounds=Clip(0.2), ratio_level="product"),
    Objective(bounds=Clip(3e-4), ratio_level="sequence", surrogate=two_sided),
    Objective(bounds=Clip(3e-4), ratio_level="sequence", surrogate=partial(dual_clip, c=3.0)),
    Objective(bounds=Clip(1.0, math.inf), ratio_level="sequence", surrogate=log_stabilized),
]  # fmt: skip


@pytest.mark.parametrize("objective", SEQUENCES, ids=lambda o: o if isinstance(o, str) else o.ratio_level)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_equal_advantages_per_token_are_one_per_sequence(objective, aggregation):
    objective = dataclasses.replace(get_objective(objective), aggregation=aggregation)
    data = batch(spread=0.05)
    data["mask"][0, 3] = False
    if objective.extras:
        g = torch.Generator().manual_seed(4)
        data["extras"] = {k: torch.rand(B, generator=g, dtype=torch.float64) + 0.1 for k in objective.extras}
    loss, gradient, _ = run(objective, data)
    spread = {**data, "advantages": data["advantages"].unsqueeze(1).expand(B, T)}
    got, got_gradient, _ = run(objective, spread)
    assert got.item() == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(got_gradient, gradient, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gspo", "luspo", "gmpo"])
def test_one_advantage_per_sequence_is_bit_for_bit_what_it_was(name, dtype):
    """The formula before advantages per token were told apart, written out."""
    objective, data = OBJECTIVES[name], batch(dtype=dtype, spread=2e-3)
    loss, gradient, _ = run(objective, data)
    x, valid = data["logprobs"].clone().requires_grad_(), data["mask"]
    new, old, a = (
        torch.where(valid, v if dtype == torch.float64 else v.float(), 0.0)
        for v in (x, data["old_logprobs"], data["advantages"].unsqueeze(1))
    )
    count = valid.sum(-1, keepdim=True)
    bounds = objective.bounds(old)
    if name == "gmpo":
        clamped = (new - old).clamp(bounds.lower.log(), bounds.upper.log())
        c = torch.where(a < 0, torch.maximum(new - old, clamped), torch.minimum(new - old, clamped))
        mean = torch.where(valid, c, 0.0).sum(-1, keepdim=True) / count
        value = mean.exp() * torch.where(valid, a, 0.0).sum(-1, keepdim=True) / count
    else:
        value = clip((new - old).sum(-1, keepdim=True) / count, a, bounds)
    value = value.expand(valid.shape).masked_fill(~valid, 0.0)
    total = (value.sum(-1) / valid.sum(-1)).sum() / B if name != "luspo" else value.sum() / B
    assert torch.equal(loss, -total.detach())
    assert torch.equal(gradient, torch.autograd.grad(-total, x)[0])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["gspo", "luspo", "gmpo", "topr", "quatro-reading"]))
def test_a_token_without_advantage_has_no_gradient_and_moves_no_other(seed, name):
    """On policy the gradient of each token is that of its own advantage alone."""
    data = per_token(seed)
    data["logprobs"] = data["old_logprobs"].clone()
    data = complete(name, data)
    if "extras" in data:
        data["extras"] = {k: torch.zeros(B, dtype=torch.float64) for k in data["extras"]}
    zero = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 0.4
    _, gradient, _ = run(name, data, max_length=max_length(OBJECTIVES[name].aggregation))
    _, some, _ = run(name, {**data, "advantages": data["advantages"].masked_fill(zero, 0.0)})
    assert (some[zero] == 0).all()
    torch.testing.assert_close(some[~zero], gradient[~zero], rtol=1e-12, atol=1e-16)
