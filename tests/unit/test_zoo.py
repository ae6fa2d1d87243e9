"""Each objective against its closed-form gradient weight, `∇ = A·r·w(r, p, A)·∇log π`, and the identities between them."""

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import lambertw

from bandpo import KL, OBJECTIVES, TV, Band, Clip, Objective, policy_loss, ratio_bounds, token_objective
from bandpo.bounds.regions import BySign, Sides, kl3_clip
from bandpo.experimental import Balanced, Elastic, clip_cov, kl_cov
from bandpo.surrogates import clip, mask, quadratic, quadratic_tv, soft_edge, two_sided
from bandpo.surrogates.sequence import geometric_mean
from batches import B, T, batch, complete, run

N = 20_000


def tokens(seed=0):
    """Sequences of one token, so that every ratio level is the token's."""
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(N, 1, generator=g, dtype=torch.float64) * 7 - 1e-3
    new = torch.minimum(old + torch.randn(N, 1, generator=g, dtype=torch.float64), torch.tensor(-1e-7))
    return {
        "logprobs": new, "old_logprobs": old, "advantages": torch.randn(N, generator=g, dtype=torch.float64),
        "mask": torch.ones(N, 1, dtype=torch.bool),
    }  # fmt: skip


def outside(r, a, low, high):
    return ((a > 0) & (r > high)) | ((a < 0) & (r < low))


def hard(low, high):
    return lambda r, p, a, **_: np.where(outside(r, a, low, high), 0.0, 1.0)


def binary_kl(p, q):
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def dcpo(r, p, a, **_):
    low = 0.5 + 0.5 * np.sqrt(np.maximum(1 - 0.64 / p, 0))
    return hard(low, np.minimum(0.5 + 0.5 * np.sqrt(1 + 0.8 / p), 10))(r, p, a)


def ball(distance, cap=np.inf):
    """DPPO's mask, from the distance of two policies and no bound; `cap` on the ratio."""

    def weight(r, p, a, **_):
        masked = (a * (r - 1) > 0) & (distance(p, p * r) > 0) | ((a > 0) & (r > cap))
        return np.where(masked, 0.0, 1.0)

    return weight


def topk(divergence, radius):
    """From the whole distribution: three tokens carry what is not the sampled one."""

    def weight(r, p, a, extras, **_):
        old = np.concatenate([np.exp(extras["old_topk_logprobs"][:, 0]), p[:, None]], 1)
        new = np.concatenate([np.exp(extras["topk_logprobs"][:, 0]), (p * r)[:, None]], 1)
        old, new = (np.concatenate([x, 1 - x.sum(1, keepdims=True)], 1) for x in (old, new))
        distance = divergence(old, new).sum(1)
        return np.where((a * (r - 1) > 0) & (distance > radius), 0.0, 1.0)

    return weight


def soft_band(r, p, a, **_):
    bounds = ratio_bounds(torch.from_numpy(np.log(p)), KL, 0.05, max_ratio=10.0)
    edge = np.where(a > 0, bounds.upper.numpy(), bounds.lower.numpy())
    x = np.where(outside(r, a, bounds.lower.numpy(), bounds.upper.numpy()), (r / edge - 1) / 0.25, 0.0)
    return 1 / np.cosh(x) ** 2


def elastic(r, p, a, extras, **_):
    s = np.minimum((1 + 0.5 * np.tanh(np.abs(a))) * (1 + 0.5 * extras["signal"]), 3.0)
    return hard(1 - 0.2 * s, 1 + 0.2 * s)(r, p, a)


def reading_of_quatro(r, p, a, extras, **_):
    return (a - extras["baseline"] - extras["dual"] * np.log(r)) / a


def corrected(inside):
    def weight(r, p, a, mismatch, **_):
        return hard(0.8, 1.2)(r, p, a) * inside(np.exp(mismatch))

    return weight


def projected(r, p, a, extras, **_):
    """TROLL: s by bisection of KL(q ‖ old), its derivative from the constraint, and the gradient of KL(π ‖ sg(q))."""
    old = np.concatenate([np.exp(extras["old_topk_logprobs"][:, 0]), p[:, None]], 1)
    new = np.concatenate([np.exp(extras["topk_logprobs"][:, 0]), (p * r)[:, None]], 1)
    old, new = (np.concatenate([x, 1 - x.sum(1, keepdims=True)], 1) for x in (old, new))
    d = np.log(new / old)

    def at(s):
        q = old * np.exp(s * d)
        q = q / q.sum(1, keepdims=True)
        return q, (q * np.log(q / old)).sum(1, keepdims=True)

    outside = at(1.0)[1] > 0.05
    low, high = np.zeros_like(outside, dtype=float), np.ones_like(outside, dtype=float)
    for _ in range(100):
        middle = (low + high) / 2
        fits = at(middle)[1] <= 0.05
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    s = np.where(outside, low, 1.0)
    q, _ = at(s)
    # the sampled token's log-prob moves, and with it the rest's
    dn = np.zeros_like(old)
    dn[:, -2], dn[:, -1] = 1.0, -new[:, -2] / new[:, -1]
    mean = (q * d).sum(1, keepdims=True)
    covariance = (q * (d - mean) * dn).sum(1, keepdims=True)
    ds = np.where(outside, -s * covariance / (q * (d - mean) ** 2).sum(1, keepdims=True), 0.0)
    by_new = s * (dn - (q * dn).sum(1, keepdims=True)) + ds * (d - mean)
    gain = a * q[:, -2] / p * np.where(outside, by_new, dn)[:, -2]
    pull = (new * dn * np.log(new / q)).sum(1) * outside[:, 0]
    return (gain - pull) / (a * r)


W0, W1 = (1 + float((-lambertw(-math.exp(-1.05), k)).real) - 1 for k in (0, -1))

WEIGHTS = {
    "grpo": hard(0.8, 1.2),
    "dr_grpo": hard(0.8, 1.2),
    "dapo": hard(0.8, 1.28),
    "dual-clip": lambda r, p, a, **_: hard(0.8, 1.2)(r, p, a) * ~((a < 0) & (r > 3)),
    "no-clip": lambda r, p, a, **_: np.ones_like(r),
    "bandpo-kl": ball(lambda p, q: binary_kl(p, q) - 0.05, cap=10),
    "bandpo-tv": ball(lambda p, q: abs(p - q) - 0.05, cap=10),
    "bandpo-chi2": ball(lambda p, q: (p - q) ** 2 / p / (1 - p) - 0.05, cap=10),
    "bandpo-kl-soft": soft_band,
    "dppo-tv": ball(lambda p, q: abs(p - q) - 0.15),
    "dppo-kl": ball(lambda p, q: binary_kl(p, q) - 0.05),
    "dppo-topk-tv": topk(lambda p, q: 0.5 * abs(p - q), 0.15),
    "dppo-topk-kl": topk(lambda p, q: p * np.log(p / q), 0.05),
    "troll": projected,
    "ipo": lambda r, p, a, **_: (abs(p * r - p) <= 0.1).astype(float),
    "quatro-reading": reading_of_quatro,
    "dcpo": dcpo,
    "kl3": hard(W0, W1),
    "abc-grpo": lambda r, p, a, **_: ((r >= 0.8) & (r <= 1.2)).astype(float),
    "etr-reading": elastic,
    "spo": lambda r, p, a, **_: 1 - np.sign(a) * (r - 1) / 0.2,
    "cfpo": lambda r, p, a, **_: 1 - np.sign(a) * (r - 1) / 0.2,
    "drpo": lambda r, p, a, **_: 1 - np.sign(a) * (p * r - p) / 12.5,
    "cispo": lambda r, p, a, **_: np.minimum(r, 5) / r,
    "sapo": lambda r, p, a, **_: 1 / np.cosh(np.where(a > 0, 1.0, 1.05) * (r - 1) / 2) ** 2,
    "aspo": lambda r, p, a, **_: np.where(a > 0, np.minimum(1 / r, 3) / r * (r <= 1.2), r >= 0.8),
    "ce-gppo": lambda r, p, a, **_: np.where(outside(r, a, 0.8, 1.2), np.where(a > 0, 1.2, 0.75 * 0.8) / r, 1.0),
    "ppo-kl": lambda r, p, a, **_: 1 - (1 - 1 / r) / a,
    "gspo": hard(1 - 3e-4, 1 + 4e-4),
    "luspo": hard(1 - 2e-3, 1 + 2.5e-3),
    "gmpo": hard(math.exp(-0.4), math.exp(0.4)),
    "topr": lambda r, p, a, **_: np.where(a < 0, np.minimum(r, 1), 1) / r,
    "tis": corrected(lambda w: np.minimum(w, 2)),
    "icepop": corrected(lambda w: w * (w >= 0.5) * (w <= 5)),
}
OF_THE_BATCH = {"bapo-reading", "clip-cov", "kl-cov"}  # tested by themselves below


def test_every_objective_has_its_weight_here():
    assert set(WEIGHTS) | OF_THE_BATCH == set(OBJECTIVES)


@pytest.mark.parametrize("name", WEIGHTS)
def test_gradient_is_the_closed_form_weight(name):
    objective = OBJECTIVES[name]
    data = complete(objective, tokens())
    if "topk_logprobs" in objective.extras:  # room for the sampled token: scaled to what it leaves
        free, left = (torch.log1p(-data[k].exp()).unsqueeze(-1) for k in ("old_logprobs", "logprobs"))
        data["extras"]["old_topk_logprobs"] = data["extras"]["old_topk_logprobs"] + 2.9 + free
        data["extras"]["topk_logprobs"] = data["extras"]["topk_logprobs"] + 2.9 + left
    _, gradient, _ = run(objective, data)
    new, old, a = (data[k].flatten().numpy() for k in ("logprobs", "old_logprobs", "advantages"))
    r, p = np.exp(new - old), np.exp(old)
    more = {"extras": {k: v.numpy() for k, v in data.get("extras", {}).items()}}
    if objective.correction is not None:
        more["mismatch"] = (data["old_logprobs"] - data["rollout_logprobs"]).flatten().numpy()
    w = WEIGHTS[name](r, p, a, **more)
    scale = N * (12 if objective.aggregation == "seq-mean-token-sum-norm" else 1)
    want = -a * r * w / scale
    if name != "no-clip":
        assert ((w != 1).mean() > 0.02) and ((w > 0.02).mean() > 0.02), "the test must see both sides of the edge"
    if name == "troll":  # the mass of the rest is 1 less a sum, off by 2^-53 over that mass; the two terms may cancel
        rest = 1 - np.exp(new) - np.exp(more["extras"]["topk_logprobs"][:, 0]).sum(1)
        certain = rest < 0.01
        assert certain.mean() < 0.2
        want, gradient = want[~certain], gradient[torch.from_numpy(~certain)]
    # r is a difference of logs that are off by 2^-53 of 7: 1e-15; tanh and cosh amplify it by the overshoot
    np.testing.assert_allclose(gradient.flatten().numpy(), want, rtol=1e-9, atol=1e-17)


HARD = [name for name, o in OBJECTIVES.items() if o.surrogate in (clip, mask) and o.correction is None]


@pytest.mark.parametrize("name", HARD)
def test_clip_fraction_of_the_hard_methods_is_the_share_of_zero_weights(name):
    objective = OBJECTIVES[name]
    _, gradient, metrics = run(objective, complete(objective, tokens()))
    assert metrics["clip_fraction/any"].item() == pytest.approx((gradient == 0).double().mean().item(), abs=1e-6)


def test_cfpo_is_spo_up_to_aggregation():
    a, b = OBJECTIVES["cfpo"], OBJECTIVES["spo"]
    same = dataclasses.replace(a, aggregation=b.aggregation)
    assert run(same, batch())[0] == run(b, batch())[0]


def test_drpo_is_spo_with_the_width_of_a_tv_ball_and_turns_at_dppo_s_boundary():
    data, delta = tokens(), 0.3
    x, old = data["logprobs"] - data["old_logprobs"], data["old_logprobs"]
    a = data["advantages"].unsqueeze(1)
    drpo = quadratic_tv(x, a, None, old_logprobs=old, delta=delta)
    wide = Band(TV, delta, max_ratio=None)(old)
    free = (wide.lower > 0) & (wide.upper * old.exp() < 1 - 1e-9)  # elsewhere the simplex is narrower than δ/p
    assert 0.1 < free.double().mean() < 0.9
    torch.testing.assert_close(drpo[free], quadratic(x, a, wide)[free], rtol=1e-9, atol=1e-9)
    objective = Objective(bounds=Clip(1.0, math.inf), surrogate=partial(quadratic_tv, delta=delta))
    masked = Objective(bounds=Band(TV, delta, max_ratio=None), surrogate=mask)
    forward = -torch.sign(run(objective, data)[1]) == torch.sign(a)
    assert torch.equal(forward, run(masked, data)[1] != 0)


def test_abc_clamp_has_the_gradient_of_the_sign_blind_mask():
    data = tokens()
    _, gradient, _ = run(Objective(bounds=Band(TV, 0.1, max_ratio=None), surrogate=two_sided), data)
    new, old = data["logprobs"].exp(), data["old_logprobs"].exp()
    keep = ((new - old).abs() <= 0.1).double()
    want = -keep * (new / old) * data["advantages"].unsqueeze(1) / N
    torch.testing.assert_close(gradient, want, rtol=1e-12, atol=0)


def test_kl3_edges_are_lambert_w():
    for delta in (1e-4, 0.05, 0.5, 3.0):
        edges = kl3_clip(delta)
        w = [float((-lambertw(-math.exp(-1 - delta), k)).real) for k in (0, -1)]
        assert (1 - edges.low, 1 + edges.high) == pytest.approx(w, rel=1e-7)  # W near its branch point: √ε
        for r in (1 - edges.low, 1 + edges.high):
            assert r - 1 - math.log(r) == pytest.approx(delta, rel=1e-10)


def test_truncation_is_a_cap_on_the_weight():
    data = tokens()
    bounds = Band(KL, 0.05, max_ratio=None)
    plain, gradient, _ = run(Objective(bounds=bounds, surrogate=mask), data)
    _, truncated, _ = run(Objective(bounds=bounds, surrogate=partial(mask, truncate=1.5)), data)
    r = (data["logprobs"] - data["old_logprobs"]).exp()
    torch.testing.assert_close(truncated, gradient * (r.clamp(max=1.5) / r), rtol=1e-12, atol=0)
    assert run(Objective(bounds=bounds, surrogate=partial(mask, truncate=math.inf)), data)[0] == plain


def test_soft_edge_goes_from_clip_to_no_clip():
    data = tokens()
    x, a = data["logprobs"] - data["old_logprobs"], data["advantages"].unsqueeze(1)
    edge = Band(KL, 0.05)(data["old_logprobs"])
    torch.testing.assert_close(soft_edge(x, a, edge, temperature=1e-9), clip(x, a, edge), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(soft_edge(x, a, edge, temperature=1e6), x.exp() * a, rtol=1e-8, atol=0)
    free = Clip(1.0, math.inf)(data["old_logprobs"])
    assert torch.equal(soft_edge(x, a, free), x.exp() * a)


def test_soft_edge_and_quadratic_survive_a_certain_token_and_an_exploded_ratio():
    """p = 1 leaves no width; log r = 1000 no float."""
    for surrogate in (soft_edge, quadratic):
        for name, new, old in (("certain", 0.0, 0.0), ("exploded", 0.0, -1000.0), ("vanished", -1000.0, -0.1)):
            for a in (1.0, -1.0):
                x = torch.tensor([[new]], requires_grad=True)
                loss, _ = policy_loss(
                    logprobs=x, old_logprobs=torch.tensor([[old]]), advantages=torch.tensor([a]), mask=torch.ones(1, 1),
                    objective=Objective(bounds=Band(KL, 0.05), surrogate=surrogate),
                )  # fmt: skip
                loss.backward()
                assert loss.isfinite(), (surrogate, name, a)
                assert x.grad.isfinite().all(), (surrogate, name, a)


def test_by_sign_is_either_region():
    data = batch()
    four = Objective(bounds=BySign(Clip(0.1, 0.3), Band(KL, 0.02)))
    for sign, alone in ((1.0, Clip(0.1, 0.3)), (-1.0, Band(KL, 0.02))):
        pushed = {**data, "advantages": sign * data["advantages"].abs()}
        assert run(four, pushed)[0] == run(Objective(bounds=alone), pushed)[0]
    with pytest.raises(ValueError, match="needs more than the old log-probs"):
        BySign(Clip(0.2), Elastic())


def test_sides_are_the_edges_of_two_regions():
    old = batch()["old_logprobs"]
    both = Sides(lower=Clip(0.2), upper=Band(KL, 0.05))(old)
    assert torch.equal(both.lower, Clip(0.2)(old).lower)
    assert torch.equal(both.upper, Band(KL, 0.05)(old).upper)
    with pytest.raises(ValueError, match="needs more than the old log-probs"):
        Sides(Clip(0.2), Elastic())


def test_elastic_without_signal_is_the_plain_clip_and_widens_with_it():
    old = torch.full((3, 4), -1.0)
    none = Elastic(0.2, 0.28)(old, advantages=torch.zeros(3, 1), signal=torch.zeros(3, 1))
    plain = Clip(0.2, 0.28)(old)
    torch.testing.assert_close(none, plain, rtol=0, atol=1e-7)
    off = Elastic(0.2, 0.28, micro=0.0, macro=0.0)(old, advantages=torch.ones(3, 1), signal=torch.ones(3, 1))
    torch.testing.assert_close(off, plain, rtol=0, atol=1e-7)
    a = torch.tensor([[0.1], [1.0], [-5.0]])
    some = Elastic()(old, advantages=a, signal=torch.full((3, 1), 0.3))
    assert some.upper[0, 0] < some.upper[1, 0] < some.upper[2, 0] <= 1 + 0.2 * 3
    assert Elastic()(old, advantages=a, signal=torch.ones(3, 1)).upper[0, 0] > some.upper[0, 0]
    wild = Elastic(0.9, 0.9, micro=100.0)(old, advantages=a, signal=torch.ones(3, 1))
    assert (wild.lower == 0).all() and wild.upper[0, 0] == pytest.approx(1 + 0.9 * 3)


@pytest.mark.parametrize("shift", [-2.0, -0.3, 0.0, 0.3, 2.0])
def test_balanced_takes_the_first_pair_that_suffices(shift):
    data = batch(spread=1.5)
    x, valid = data["logprobs"] - data["old_logprobs"], data["mask"]
    a = (data["advantages"] + shift).unsqueeze(1)
    region = Balanced(low=(0.5, 0.9), high=(1.1, 2.0), step=0.1)
    r, weights = x.exp()[valid].numpy(), a.expand(B, T)[valid].numpy()
    pairs = [(0.5 + 0.1 * i, 1.1) for i in range(5)] + [(0.9, 1.1 + 0.1 * i) for i in range(1, 10)]
    for low, high in pairs:  # the last one stands if none suffices
        kept = np.minimum(r * weights, np.clip(r, low, high) * weights)
        if kept[kept > 0].sum() >= 0.5 * np.abs(kept).sum():
            break
    bounds = region(data["old_logprobs"], log_ratio=x, advantages=a, mask=valid)
    assert (bounds.lower[0, 0].item(), bounds.upper[0, 0].item()) == pytest.approx((low, high), rel=1e-12)
    assert (bounds.lower == bounds.lower[0, 0]).all()


def test_kl_cov_penalises_the_top_tokens():
    data = batch()
    objective = Objective(bounds=Clip(1.0, math.inf), surrogate=partial(kl_cov, share=0.1, beta=0.7))
    value = token_objective(objective, **data).value
    valid = data["mask"]
    new, old = data["logprobs"][valid].numpy(), data["old_logprobs"][valid].numpy()
    a = data["advantages"].unsqueeze(1).expand(B, T)[valid].numpy()
    covariance = (a - a.mean()) * (new - new.mean())
    chosen = np.argsort(-covariance)[: int(0.1 * len(a))]
    want = np.exp(new - old) * a
    want[chosen] -= 0.7 * np.abs(new - old)[chosen]
    np.testing.assert_allclose(value[valid].numpy(), want, rtol=1e-12)
    assert len(chosen) == 3


def test_clip_cov_takes_a_random_few_of_the_candidates_out():
    g = torch.Generator().manual_seed(3)
    old = -torch.rand(40, 50, generator=g, dtype=torch.float64) * 6
    data = {
        "logprobs": old + 0.02, "old_logprobs": old, "advantages": torch.randn(40, generator=g).double(),
        "mask": torch.rand(40, 50, generator=g) < 0.9,
    }  # fmt: skip
    plain = token_objective(Objective(bounds=Clip(0.2)), **data).value
    objective = Objective(bounds=Clip(0.2), surrogate=partial(clip_cov, share=0.02))
    taken = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        value = token_objective(objective, **data).value
        out = (value == 0) & (plain != 0)
        assert torch.equal(value[~out], plain[~out])
        taken.append(out)
        new, a = data["logprobs"], data["advantages"].unsqueeze(1).expand(40, 50)
        valid = data["mask"]
        covariance = (a - a[valid].mean()) * (new - new[valid].mean())
        assert out.sum() == int(0.02 * valid.sum())
        assert (valid & (covariance > 1) & (covariance < 5))[out].all()
    assert torch.equal(taken[0], taken[2]) and not torch.equal(taken[0], taken[1])


def test_geometric_mean_of_a_sequence():
    data = batch()
    objective = dataclasses.replace(OBJECTIVES["gmpo"], surrogate=geometric_mean)
    loss, _, _ = run(objective, data)
    rows = []
    for i in range(B):
        x = (data["logprobs"] - data["old_logprobs"])[i][data["mask"][i]].numpy()
        a = data["advantages"][i].item()
        c = np.minimum(x, np.clip(x, -0.4, 0.4)) if a > 0 else np.maximum(x, np.clip(x, -0.4, 0.4))
        rows.append(-math.exp(c.mean()) * a)
    assert loss.item() == pytest.approx(np.mean(rows), rel=1e-12)


@pytest.mark.parametrize("name", ["topr", "quatro-reading"])
def test_product_of_a_long_sequence(name):
    """Sequences of many tokens: the ratio is the product of theirs."""
    data = complete(name, batch(spread=0.1))
    _, gradient, _ = run(name, data)
    for i in range(B):
        valid = data["mask"][i]
        x = (data["logprobs"] - data["old_logprobs"])[i][valid].sum().item()
        a = data["advantages"][i].item()
        if name == "topr":
            weight = a if a > 0 else min(math.exp(x), 1) * a
        else:
            dual, base = (data["extras"][k][i].item() for k in ("dual", "baseline"))
            weight = math.exp(x) * (a - base - dual * x)
        torch.testing.assert_close(gradient[i][valid], torch.full((int(valid.sum()),), -weight / B).double())


def test_extras_are_checked():
    data = batch()
    with pytest.raises(ValueError, match=r"takes the extras \['signal'\], got none; objective.group_inputs"):
        run("etr-reading", data)
    with pytest.raises(ValueError, match=r"takes the extras none, got \['signal'\]"):
        run("grpo", data, extras={"signal": torch.ones(B)})
    with pytest.raises(ValueError, match=r"extras\['signal'\] has shape \(3,\)"):
        run("etr-reading", data, extras={"signal": torch.ones(3)})
    with pytest.raises(ValueError, match=r"anchor='old'.*old_logprobs"):
        run("grpo", {k: v for k, v in data.items() if k != "old_logprobs"})
    with pytest.raises(ValueError, match=r"corrects for the sampler.*rollout_logprobs"):
        run("tis", data)
    without = {k: v for k, v in data.items() if k != "old_logprobs"}
    assert run("dppo-kl", {**without, "rollout_logprobs": data["old_logprobs"]})[0].isfinite()
    with pytest.raises(ValueError, match="does so already"):
        dataclasses.replace(OBJECTIVES["tis"], anchor="rollout")
    for rewards, advantages, size in ((7, 7, 4), (8, 4, 4), (8, 8, 0)):
        with pytest.raises(ValueError, match=f"group_size is {size}"):
            OBJECTIVES["etr-reading"].group_inputs(torch.ones(rewards), torch.ones(advantages), size)
    with pytest.raises(ValueError, match="has no radius"):
        OBJECTIVES["grpo"].with_radius(0.1)
    assert OBJECTIVES["dppo-kl"].with_radius(0.1).bounds == Band(KL, 0.1, max_ratio=None)


def test_a_surrogate_of_a_user_gets_what_it_needs():
    def mine(log_ratio, advantages, bounds, *, old_logprobs, bonus):
        return log_ratio.exp() * advantages + bonus * old_logprobs

    data = batch()
    objective = Objective(bounds=Clip(), surrogate=mine)
    assert objective.extras == ("bonus",)
    value = token_objective(objective, **data, extras={"bonus": torch.arange(B).double()}).value
    r = (data["logprobs"] - data["old_logprobs"]).exp()
    want = r * data["advantages"].unsqueeze(1) + torch.arange(B).double().unsqueeze(1) * data["old_logprobs"]
    torch.testing.assert_close(value[data["mask"]], want[data["mask"]])
