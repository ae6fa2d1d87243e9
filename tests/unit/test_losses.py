"""The loss against a plain numpy reference, and the identities that tie the objectives together."""

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch

from bandpo import (
    CHI2,
    JS,
    KL,
    OBJECTIVES,
    TV,
    Band,
    Clip,
    Objective,
    aggregate,
    group_advantages,
    in_band,
    loss_normalizer,
    losses,
    pass_at_k,
    policy_loss,
    ratio_bounds,
)
from bandpo.bounds import TopK
from bandpo.experimental import clip_cov
from bandpo.metrics import pass_at_powers
from bandpo.surrogates import clip, dual_clip, mask
from bandpo.terms import sequence_log_ratio
from bandpo.zoo import get_objective
from batches import B, T, batch, complete, deterministic, max_length, run

AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def reference(data, lower, upper, aggregation, c=None):
    """PPO's clipped loss in numpy, token by token, from its definition."""
    new, old, adv = (data[k].double().numpy() for k in ("logprobs", "old_logprobs", "advantages"))
    valid = data["mask"].numpy()
    rows = []
    for i in range(B):
        row = []
        for t in range(T):
            if valid[i, t]:
                r = math.exp(new[i, t] - old[i, t])
                value = min(r * adv[i], min(max(r, lower[i, t]), upper[i, t]) * adv[i])
                if c is not None and adv[i] < 0:
                    value = max(value, c * adv[i])
                row.append(-value)
        rows.append(row)
    tokens = [x for row in rows for x in row]
    return {
        "token-mean": np.mean(tokens),
        "token-sum": np.sum(tokens),
        "seq-mean-token-sum": np.mean([np.sum(r) for r in rows]),
        "seq-mean-token-mean": np.mean([np.mean(r) for r in rows]),
        "seq-mean-token-sum-norm": np.mean([np.sum(r) for r in rows]) / 12,
    }[aggregation]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("bounds", [Clip(0.2), Clip(0.2, 0.28), Band(KL, 0.05), Band(TV, 0.05)], ids=repr)
def test_value_against_numpy(bounds, aggregation):
    data = batch()
    lower, upper = (b.numpy() for b in bounds(data["old_logprobs"]))
    loss, _, _ = run(Objective(bounds=bounds, aggregation=aggregation), data)
    assert loss.item() == pytest.approx(reference(data, lower, upper, aggregation), rel=1e-12)
    dual = Objective(bounds=bounds, aggregation=aggregation, surrogate=partial(dual_clip, c=1.5))
    assert run(dual, data)[0].item() == pytest.approx(reference(data, lower, upper, aggregation, c=1.5), rel=1e-12)


@pytest.mark.parametrize("divergence", [KL, TV], ids=lambda d: d.name)
def test_band_clip_has_the_gradient_of_the_dppo_binary_mask(divergence):
    """100,000 random tokens, from DPPO's own definition (arXiv:2602.04879, eq. 12-14) and not from any bound."""
    n, radius = 100_000, 0.05
    g = torch.Generator().manual_seed(7)
    old = -torch.rand(1, n, generator=g, dtype=torch.float64) * 9 - 1e-4
    new = torch.minimum(old + torch.randn(1, n, generator=g, dtype=torch.float64), torch.tensor(-1e-7))
    advantages = torch.randn(1, n, generator=g, dtype=torch.float64)
    p, q = old.exp(), new.exp()
    if divergence is KL:
        distance = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    else:
        distance = (p - q).abs()
    r = q / p
    keep = ~((advantages * (r - 1) > 0) & (distance > radius))
    want = -(keep * r * advantages) / n
    data = {"logprobs": new, "old_logprobs": old, "advantages": advantages, "mask": torch.ones(1, n, dtype=torch.bool)}
    pure = Objective(bounds=Band(divergence, radius, max_ratio=None))
    _, gradient, metrics = run(pure, data)
    assert 0.05 < metrics["clip_fraction/any"] < 0.5
    assert ((gradient == 0) == (want == 0)).all()
    torch.testing.assert_close(gradient, want, rtol=1e-12, atol=0)
    # with the official cap 10 and dual clip 10: the same mask, or r > 10
    official = Objective(bounds=Band(divergence, radius, max_ratio=10.0), surrogate=partial(dual_clip, c=10.0))
    assert ((run(official, data)[1] == 0) == ((want == 0) | (r > 10))).all()
    masked = Objective(bounds=Band(divergence, radius, max_ratio=None), surrogate=mask)
    torch.testing.assert_close(run(masked, data)[1], gradient, rtol=1e-12, atol=0)


@pytest.mark.parametrize("divergence", [KL, TV, JS, CHI2], ids=lambda d: d.name)
def test_membership_gives_the_gradient_of_clip_without_a_solve(divergence):
    g = torch.Generator().manual_seed(8)
    old = -torch.rand(20_000, generator=g, dtype=torch.float64) * 9 - 1e-4
    x = torch.minimum(torch.randn(20_000, generator=g, dtype=torch.float64), -old - 1e-7).requires_grad_()
    advantages = torch.randn(20_000, generator=g, dtype=torch.float64)
    radius = torch.rand(20_000, generator=g, dtype=torch.float64) * 0.2 + 1e-3  # one for each token: no table for these
    clipped = clip(x, advantages, ratio_bounds(old, divergence, radius)).sum()
    masked = mask(x, advantages, in_band(x, old, divergence, radius)).sum()
    (a,), (b,) = (torch.autograd.grad(value, x) for value in (clipped, masked))
    assert 0.02 < (a == 0).double().mean() < 0.5
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_on_policy_gradient_is_reinforce(name):
    objective = OBJECTIVES[name]
    if name == "clip-cov":  # it drops tokens, also on policy
        objective = dataclasses.replace(objective, surrogate=partial(clip_cov, low=1e9, high=2e9))
    data = batch()
    data["logprobs"] = data["old_logprobs"].clone()
    data = complete(objective, data)
    _, gradient, metrics = run(objective, data)
    x = data["logprobs"].clone().requires_grad_()
    advantages = data["advantages"].unsqueeze(1)
    if name == "quatro-reading":  # a baseline of its own
        advantages = advantages - data["extras"]["baseline"].unsqueeze(1)
    weighted = advantages * x
    if objective.correction is not None:
        weighted = weighted * objective.correction(data["old_logprobs"] - data["rollout_logprobs"], data["mask"])
    if objective.ratio_level != "token":  # every token carries the mean or the sum of its sequence
        weighted = (weighted * data["mask"]).sum(1, keepdim=True)
        weighted = weighted / data["mask"].sum(1, keepdim=True) if objective.ratio_level == "sequence" else weighted
    reinforce = -aggregate(weighted, data["mask"], objective.aggregation, max_length=max_length(objective.aggregation))
    (want,) = torch.autograd.grad(reinforce, x)
    torch.testing.assert_close(gradient, want, rtol=1e-12, atol=1e-15)
    assert metrics["clip_fraction/any"] == 0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up_to_the_whole(aggregation):
    data = batch()
    objective = Objective(bounds=Band(KL, 0.05), aggregation=aggregation)
    whole, gradient, _ = run(objective, data, ref_logprobs=data["old_logprobs"] - 0.1, kl_coef=0.3)
    normalizer = None if aggregation == "token-sum" else loss_normalizer(data["mask"], aggregation)
    total, parts = 0.0, []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = {k: v[rows] for k, v in data.items()}
        ref = part["old_logprobs"] - 0.1
        loss, grad, _ = run(objective, part, normalizer=normalizer, ref_logprobs=ref, kl_coef=0.3)
        total = total + loss
        parts.append(grad)
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat(parts), gradient, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("garbage", [0.0, 7.0, math.nan, math.inf, -math.inf])
def test_padding_never_matters(name, garbage):
    name = deterministic(name)
    data = complete(name, batch())
    loss, gradient, metrics = run(name, data, ref_logprobs=data["old_logprobs"], entropy=torch.ones(B, T))

    def widen(x):
        if x.dim() < 2:  # one value for a row
            return x
        x = torch.cat([x, torch.zeros(B, 4, *x.shape[2:], dtype=x.dtype)], 1)
        if x.dtype != torch.bool:
            x[~wide["mask"]] = garbage
        return x

    wide = {"mask": torch.cat([data["mask"], torch.zeros(B, 4, dtype=torch.bool)], 1)}
    wide |= {k: widen(v) for k, v in data.items() if k not in ("mask", "extras")}
    if "extras" in data:
        wide["extras"] = {k: widen(v) for k, v in data["extras"].items()}
    entropy = torch.where(wide["mask"], 1.0, garbage)
    padded, padded_gradient, padded_metrics = run(name, wide, ref_logprobs=wide["old_logprobs"], entropy=entropy)
    torch.testing.assert_close(padded, loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(padded_gradient[:, :T], gradient, rtol=1e-13, atol=0)
    assert (padded_gradient[:, T:] == 0).all()
    for key, value in metrics.items():
        torch.testing.assert_close(padded_metrics[key], value, rtol=1e-6, atol=1e-7, equal_nan=True)
    # nor does a whole row of it
    rows = {k: torch.cat([v, v[:1]]) for k, v in data.items() if k != "extras"}
    if "extras" in data:
        rows["extras"] = {k: torch.cat([v, v[:1]]) for k, v in data["extras"].items()}
    rows["mask"][-1] = False
    torch.testing.assert_close(run(name, rows)[0], loss, rtol=1e-13, atol=0)


def test_all_masked_is_zero_with_zero_gradient():
    data = batch()
    data["mask"] = torch.zeros_like(data["mask"])
    for name in OBJECTIVES:
        loss, gradient, metrics = run(name, complete(name, data))
        assert loss == 0
        assert (gradient == 0).all()
        assert metrics["clip_fraction/any"].isnan()  # the mean of nothing is no number


def test_an_infinite_or_nan_token_leaves_no_nan_and_stays_visible():
    data = batch(dtype=torch.float32)
    data["logprobs"][0, 0], data["old_logprobs"][0, 0] = 0.0, -math.inf
    for sign in (1.0, -1.0, 0.0):
        data["advantages"][:] = sign
        for name in ("grpo", "bandpo-kl", "no-clip"):
            loss, gradient, metrics = run(name, data)
            assert loss.isfinite()
            assert gradient.isfinite().all()
            assert metrics["nonfinite_fraction"] == pytest.approx(1 / data["mask"].sum().item())
    data["logprobs"][0, 0] = math.nan
    loss, gradient, metrics = run("bandpo-kl", data)
    assert loss.isfinite() and gradient.isfinite().all()
    assert metrics["nonfinite_fraction"] == pytest.approx(1 / data["mask"].sum().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_float32(dtype):
    data = batch(dtype=dtype)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in data.items()}
    loss, gradient, _ = run("bandpo-kl", data)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss, run("bandpo-kl", wide)[0])


def test_kl_to_reference_is_k3():
    data = batch()
    ref = data["old_logprobs"] - 0.3
    plain, kl = run("grpo", data)[0], run("grpo", data, ref_logprobs=ref, kl_coef=0.1, kl="k3")
    x = (ref - data["logprobs"]).numpy()
    k3 = np.exp(x) - x - 1
    valid = data["mask"].numpy()
    want = np.mean([k3[i][valid[i]].mean() for i in range(B)])
    assert (kl[0] - plain).item() == pytest.approx(0.1 * want, rel=1e-12)
    assert kl[2]["kl/ref"].item() == pytest.approx(k3[valid].mean(), rel=1e-12)
    assert run("grpo", data, ref_logprobs=ref)[0] == plain  # coefficient 0: reported, not added


def test_sequence_level_is_gspo():
    data = batch(spread=1e-3)
    loss, _, metrics = run("gspo", data)
    new, old, adv = (data[k].numpy() for k in ("logprobs", "old_logprobs", "advantages"))
    rows, clipped, tokens = [], 0, 0
    for i in range(B):
        valid = data["mask"][i].numpy()
        s = math.exp((new[i] - old[i])[valid].mean())
        rows.append(-min(s * adv[i], min(max(s, 1 - 3e-4), 1 + 4e-4) * adv[i]))
        hit = (adv[i] > 0 and s > 1 + 4e-4) or (adv[i] < 0 and s < 1 - 3e-4)
        clipped, tokens = clipped + hit * valid.sum(), tokens + valid.sum()
    assert loss.item() == pytest.approx(np.mean(rows), rel=1e-12)
    assert metrics["clip_fraction/any"].item() == pytest.approx(clipped / tokens)
    assert 0 < clipped < tokens
    torch.testing.assert_close(
        sequence_log_ratio(torch.tensor([[0.2, 0.4, math.nan]]), torch.tensor([[1, 1, 0]])), torch.tensor([[0.3]])
    )


def test_anchor_is_explicit():
    data = batch()
    rollout = data["old_logprobs"] - 0.2
    objective = Objective(bounds=Clip(0.2), anchor="rollout")
    with pytest.raises(ValueError, match="pass rollout_logprobs"):
        run(objective, data)
    got = run(objective, data, rollout_logprobs=rollout)[0]
    assert got == run(Objective(bounds=Clip(0.2)), {**data, "old_logprobs": rollout})[0]
    assert got != run(Objective(bounds=Clip(0.2)), data)[0]


def test_advantages_per_row_column_and_token_agree():
    data = batch()
    loss = run("bandpo-kl", data)[0]
    column = data["advantages"].unsqueeze(1)
    assert run("bandpo-kl", {**data, "advantages": column})[0] == loss
    assert run("bandpo-kl", {**data, "advantages": column.expand(B, T)})[0] == loss


def test_metrics_by_hand():
    p = torch.tensor([[5e-5, 0.3, 0.95, 0.999, 0.3]])
    r = torch.tensor([[11.0, 0.5, 1.03, 0.5, 1.0]])
    a = torch.tensor([[1.0, -1.0, 1.0, 1.0, 0.0]])
    _, metrics = policy_loss(
        logprobs=(p * r).log(), old_logprobs=p.log(), advantages=a, mask=torch.ones(1, 5),
        objective=Objective(bounds=Band(KL, 0.05)), entropy=torch.full((1, 5), 0.7), metrics="full",
    )  # fmt: skip
    m = {k: v.item() for k, v in metrics.items()}
    # token 0: cap 10 < 11, A > 0: clipped high. token 1: 0.5 < 0.571, A < 0: clipped low. 2: inside. 3: low, but A > 0.
    assert m["clip_fraction/high"] == pytest.approx(0.2)
    assert m["clip_fraction/low"] == pytest.approx(0.2)
    assert m["clip_fraction/any"] == pytest.approx(0.4)
    assert m["clip_fraction_by_prob/high/<1e-4"] == 1
    assert m["clip_fraction_by_prob/low/0.1:0.5"] == 0.5
    assert m["clip_fraction_by_prob/any/0.1:0.5"] == 0.5
    assert math.isnan(m["clip_fraction_by_prob/any/1e-3:0.01"])
    assert m["token_fraction_by_prob/0.1:0.5"] == pytest.approx(0.4)
    # edges that advantages push to: cap (0), region (1, 2), simplex (3: KL's upper bound is 1/p to rounding at 0.999)
    assert m["band/cap_fraction"] == pytest.approx(0.25)
    assert m["band/region_fraction"] + m["band/saturated_fraction"] == pytest.approx(0.75)
    used = [
        (p_ * math.log(1 / r_) + (1 - p_) * math.log((1 - p_) / (1 - p_ * r_))) / 0.05
        for p_, r_ in zip(p[0].double().tolist(), r[0].double().tolist(), strict=True)
    ]
    assert m["band/divergence_mean"] == pytest.approx(np.mean(used), rel=1e-4)
    assert m["band/divergence_max"] == pytest.approx(max(used), rel=1e-4)
    assert m["entropy"] == pytest.approx(0.7)
    assert m["ratio/mean"] == pytest.approx(r.mean().item())
    assert m["kl/old_new"] == pytest.approx((r - r.log() - 1).mean().item(), rel=1e-5)
    assert m["nonfinite_fraction"] == 0
    shares = [v for k, v in m.items() if k.startswith("token_fraction_by_prob/")]
    assert sum(shares) == pytest.approx(1)


def test_saturated_edges_are_counted():
    p = torch.tensor([[0.97, 0.02, 0.5]])
    _, m = policy_loss(
        logprobs=p.log(), old_logprobs=p.log(), advantages=torch.tensor([[1.0, -1.0, 1.0]]), mask=torch.ones(1, 3),
        objective=Objective(bounds=Band(TV, 0.05, max_ratio=None)), metrics="full",
    )  # fmt: skip
    assert m["band/saturated_fraction"].item() == pytest.approx(2 / 3)
    assert m["band/region_fraction"].item() == pytest.approx(1 / 3)
    assert m["band/cap_fraction"] == 0


def test_group_advantages():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    groups = rewards.numpy().reshape(2, 4)
    std = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards, 4).numpy().reshape(2, 4), std, rtol=1e-6)
    others = (groups.sum(1, keepdims=True) - groups) / 3
    np.testing.assert_allclose(
        group_advantages(rewards, 4, kind="leave-one-out").numpy().reshape(2, 4), groups - others, rtol=1e-6, atol=1e-7
    )
    assert group_advantages(rewards, 4, kind="mean").tolist() == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]


def test_pass_at_k_against_binomials():
    for n in (1, 5, 16, 100):
        for c in range(0, n + 1, max(1, n // 7)):
            for k in {1, min(3, n), n}:
                want = 1 - math.comb(n - c, k) / math.comb(n, k)
                assert pass_at_k(n, c, k).item() == pytest.approx(want, abs=1e-12)
    assert pass_at_k(8, torch.tensor([2, 4]), 1).tolist() == pytest.approx([0.25, 0.5])
    found = pass_at_powers(torch.tensor([2, 1, 3]), torch.tensor([8, 8, 3]), 8)  # the last prompt has no part in pass@4
    assert found == pytest.approx({"pass@1": (0.25 + 0.125 + 1) / 3, "pass@2": (1 - 15 / 28 + 0.25 + 1) / 3,
                                   "pass@4": (1 - 15 / 70 + 0.5) / 2, "pass@8": 1.0})  # fmt: skip
    assert math.isnan(pass_at_powers(torch.tensor([1]), torch.tensor([3]), 4)["pass@4"])


def test_objectives_are_read_only_and_found_by_import_path():
    with pytest.raises(TypeError):
        OBJECTIVES["mine"] = OBJECTIVES["grpo"]
    assert get_objective("own_objective:MINE").bounds == Band(JS, 0.02)
    for name, objective in OBJECTIVES.items():
        assert objective.name == name
        assert objective.formula
        assert objective.paper


def test_unbounded_is_no_clip_and_unit_of_default():
    data = batch(spread=2.0)
    _, gradient, metrics = run("no-clip", data)
    r = (data["logprobs"] - data["old_logprobs"]).exp()
    want = -aggregate_weights(data) * r * data["advantages"].unsqueeze(1)
    torch.testing.assert_close(gradient, want, rtol=1e-12, atol=1e-16)
    assert metrics["clip_fraction/any"] == 0
    assert (
        run(Objective(bounds=Clip(0.2), surrogate=clip, aggregation="seq-mean-token-mean"), data)[0]
        == run("grpo", data)[0]
    )


def aggregate_weights(data):
    return data["mask"].double() / data["mask"].sum(1, keepdim=True) / B


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"objective": "bandpo_kl"}, ValueError, "bandpo_kl.*did you mean 'bandpo-kl'"),
        ({"objective": "nowhere:MINE"}, ValueError, "nowhere:MINE could not be imported"),
        ({"objective": "bandpo.bounds:Band"}, TypeError, "Objective"),
        ({"objective": 3}, TypeError, "objective"),
        ({"mask": torch.ones(B, T - 1)}, ValueError, "mask has shape.*logprobs has"),
        ({"old_logprobs": torch.zeros(B)}, ValueError, "old_logprobs has shape"),
        ({"old_logprobs": torch.zeros(B, T, dtype=torch.int64)}, TypeError, "old_logprobs.*float"),
        ({"advantages": torch.zeros(B, 3)}, ValueError, "advantages has shape"),
        ({"advantages": torch.zeros(T)}, ValueError, "advantages has shape"),
        ({"kl_coef": 0.1}, ValueError, "ref_logprobs"),
        ({"kl_coef": math.nan, "ref_logprobs": torch.zeros(B, T)}, ValueError, "kl_coef.*nan"),
        ({"kl_coef": -0.1}, ValueError, "kl_coef.*-0.1"),
        ({"max_length": 5}, ValueError, "max_length=5"),
        ({"normalizer": 5, "objective": Objective(bounds=Clip(), aggregation="token-sum")}, ValueError, "token-sum"),
        ({"objective": "dr_grpo"}, ValueError, "seq-mean-token-sum-norm.*needs it"),
        ({"beta": 0.1}, TypeError, "beta"),
    ],
)
def test_bad_input_is_named(change, error, words):
    with pytest.raises(error, match=words):
        policy_loss(**{**batch(), **change})


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"bounds": Clip(), "aggregation": "mean"}, ValueError, "aggregation is 'mean'"),
        ({"bounds": Clip(), "anchor": "ref"}, ValueError, "anchor"),
        ({"bounds": 0.2}, TypeError, "bounds must be callable"),
        (
            {"bounds": TopK(), "surrogate": mask, "ratio_level": "sequence"},
            ValueError,
            "one ratio for a sequence.*Clip, Band",
        ),
    ],
)
def test_bad_objective_is_named(kwargs, error, words):
    with pytest.raises(error, match=words):
        Objective(**kwargs)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: aggregate(torch.ones(2, 2), torch.ones(2, 2), "sum"), "sum.*token-mean"),
        (lambda: aggregate(torch.ones(2, 2), torch.ones(2, 2), "seq-mean-token-sum-norm", max_length=0), "at least 1"),
        (lambda: group_advantages(torch.ones(7), 4), "groups of 4"),
        (lambda: group_advantages(torch.ones(4), 1), "at least 2"),
        (lambda: group_advantages(torch.ones(4), 4, kind="max"), "max.*std"),
        (lambda: pass_at_k(4, 2, 5), "k=5"),
        (lambda: pass_at_k(4, 5, 2), "between 0 and n=4"),
    ],
)
def test_bad_helpers_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_compiles_to_one_graph(name):
    objective = deterministic(name)
    data = complete(objective, batch(dtype=torch.float32))
    length = max_length(objective.aggregation)

    def step(logprobs):
        ref = data["old_logprobs"] - 0.3
        return policy_loss(
            **{**data, "logprobs": logprobs}, objective=objective, max_length=length, ref_logprobs=ref, kl_coef=0.1
        )

    torch._dynamo.reset()  # one graph for each objective, and eight of them is its limit in a process
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (loss, metrics), (want, want_metrics) = compiled(data["logprobs"]), step(data["logprobs"])
    torch.testing.assert_close(loss, want)
    for key, value in want_metrics.items():
        torch.testing.assert_close(metrics[key], value, equal_nan=True)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_host_never_waits(name):
    """Fake tensors have no values: a read (`.item()`, `if tensor`) raises. A tensor made from Python numbers, which a GPU
    would have to be sent, shows as `lift_fresh`."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoTransfers(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten.lift_fresh.default, "a tensor was made from Python numbers"
            return func(*args, **(kwargs or {}))

    objective = OBJECTIVES[name]
    with FakeTensorMode(allow_non_fake_inputs=True), NoTransfers():  # the table is real
        x = torch.empty(B, T)
        shapes = {"topk_logprobs": (B, T, 4), "old_topk_logprobs": (B, T, 4), "sampled_in_topk": (B, T)}
        extras = {name: torch.empty(shapes.get(name, (B,))) for name in objective.extras}
        policy_loss(
            logprobs=x, old_logprobs=x, advantages=x, mask=x > 0, objective=objective, ref_logprobs=x, kl_coef=0.1,
            max_length=max_length(objective.aggregation), rollout_logprobs=x, extras=extras,
        )  # fmt: skip


def test_surrogates_gradcheck():
    x = torch.tensor([-0.5, -0.1, 0.1, 0.5], dtype=torch.float64, requires_grad=True)
    edge = Clip(0.2)(torch.zeros(4, dtype=torch.float64))
    for a in (1.0, -1.0):
        for surrogate in (clip, dual_clip, partial(dual_clip, c=1.05)):
            assert torch.autograd.gradcheck(lambda y, s=surrogate, a=a: s(y, torch.full((4,), a).double(), edge), (x,))


@pytest.mark.slow
def test_compile_is_policy_loss_for_batches_of_any_shape():
    fast = losses.compiled()
    for rows, columns in ((6, 9), (3, 17), (4, 5)):
        g = torch.Generator().manual_seed(rows)
        old = -torch.rand(rows, columns, generator=g) * 5
        data = {
            "old_logprobs": old, "advantages": torch.randn(rows, generator=g),
            "mask": torch.rand(rows, columns, generator=g) < 0.8,
        }  # fmt: skip
        results = []
        for loss_of in (fast, policy_loss):
            x = (old + 0.3).clamp_max(-1e-3).requires_grad_()
            loss, metrics = loss_of(logprobs=x, **data)
            results.append([loss.detach(), *torch.autograd.grad(loss, x), *metrics.values()])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
