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
from bandpo.experimental import Balanced, Elastic, clip_cov, kl_cov, second_moment
from bandpo.surrogates import clip, mask, quadratic, quadratic_tv, soft_edge, two_sided
from bandpo.surrogates.sequence import geometric_mean
from bandpo.zoo import get_objective
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


def halves(distance, cap=10):
    """The band above r = 1 and PPO's edge below."""
    return lambda r, p, a, **_: np.where(a > 0, (r <= 1) | (distance(p, p * r) <= 0) & (r <= cap), r >= 0.8)


def below(weight, c):
    """A dual clip: nothing for A < 0 and r > c."""
    return lambda r, p, a, **more: np.where((a < 0) & (r > c), 0.0, weight(r, p, a, **more))


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


def gamma(r, p, a, **_):
    k, rate = np.where(a < 0, 3, 2), np.where(a < 0, 2, 3)
    w = np.clip(r, 1e-8, np.exp(20))
    return np.exp(rate + k * np.log(w) - rate * w) / r


def aspo_of_the_authors(r, p, a, **_):
    """The gradient is A times this over r: 1/r up to 3 for A > 0; r up to 3 for A < 0; nothing past the edge."""
    good = np.minimum(1 / r, 3) * (r <= 1.2)
    bad = np.minimum(r, 3) * (r >= 0.8)
    return np.where(a > 0, good, bad) / r


def ce_gppo_of_the_authors(r, p, a, **_):
    kept = np.where(outside(r, a, 0.8, 1.2), np.where(a > 0, 1.0 * 1.2, 0.75 * 0.8), r)
    return np.where((a < 0) & (r > 10), 0.0, kept) / r


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
    "bandpo-kl-paper": below(ball(lambda p, q: binary_kl(p, q) - 0.05, cap=10), 10),
    "bandpo-kl": ball(lambda p, q: binary_kl(p, q) - 0.05, cap=10),
    "bandpo-tv": ball(lambda p, q: abs(p - q) - 0.05, cap=10),
    "bandpo-chi2": ball(lambda p, q: (p - q) ** 2 / p / (1 - p) - 0.05, cap=10),
    "bandpo-kl-soft": soft_band,
    "bandpo-kl-upper": halves(lambda p, q: binary_kl(p, q) - 0.05),
    "bandpo-tv-upper": halves(lambda p, q: abs(p - q) - 0.05),
    "bandpo-chi2-upper": halves(lambda p, q: (p - q) ** 2 / p / (1 - p) - 0.05),
    "bandpo-kl-lower": lambda r, p, a, **_: np.where(a > 0, r <= 1.2, (r >= 1) | (binary_kl(p, p * r) <= 0.05)),
    "dppo-tv": ball(lambda p, q: abs(p - q) - 0.15),
    "dppo-kl": ball(lambda p, q: binary_kl(p, q) - 0.05),
    "dppo-topk-tv": topk(lambda p, q: 0.5 * abs(p - q), 0.15),
    "dppo-topk-kl": topk(lambda p, q: p * np.log(p / q), 0.05),
    "troll": projected,
    "ipo": lambda r, p, a, **_: (abs(p * r - p) <= 0.1).astype(float),
    "kpop": lambda r, p, a, **_: (np.maximum(binary_kl(p, p * r), binary_kl(p * r, p)) <= 0.1).astype(float),
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
    "aspo": aspo_of_the_authors,
    "ce-gppo": ce_gppo_of_the_authors,
    "ppo-kl": lambda r, p, a, **_: 1 - (1 - 1 / r) / a,
    "gspo": hard(1 - 3e-4, 1 + 4e-4),
    "luspo": hard(1 - 2e-3, 1 + 2.5e-3),
    "gmpo": hard(math.exp(-0.4), math.exp(0.4)),
    "topr": lambda r, p, a, **_: np.where(a < 0, np.minimum(r, 1), 1) / r,
    "icepop-ratio": lambda r, p, a, **_: ((r >= 0.2) & (r <= 5)).astype(float),
    "dro": lambda r, p, a, **_: (a - 0.05 * np.log(r)) / (a * r),
    "vespo": gamma,
    "fipo": lambda r, p, a, **_: (
        hard(0.8, 1.28)(r, p, a) * ~((a < 0) & (r > 10)) * np.where(r > 10, 1.0, np.clip(r, 1, 1.2))
    ),
    "pmd-mean": lambda r, p, a, **_: (a - 0.01 * np.log(r)) / (a * r),
    "tis": corrected(lambda w: np.minimum(w, 2)),
    "icepop": corrected(lambda w: w * (w >= 0.5) * (w <= 5)),
}
OF_THE_BATCH = {"bapo", "clip-cov", "kl-cov", "m2po"}  # tested by themselves below


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


def test_the_three_rules_of_the_authors_on_one_exploded_token():
    """r = 8 and r = 12 with A = -1, as the findings have them: aspo -3 (it was -8), ce-gppo -8 and 0, bapo 0."""
    for name, r, want in (
        ("aspo", 8, 3),
        ("aspo", 2, 2),
        ("ce-gppo", 8, 8),
        ("ce-gppo", 12, 0),
        ("bapo", 2.9, 2.9),
        ("bapo", 8, 0),
    ):
        old = torch.tensor([[math.log(0.05)]], dtype=torch.float64)
        data = {"old_logprobs": old, "logprobs": old + math.log(r), "advantages": -old.new_ones(1), "mask": old < 0}
        loss, gradient, metrics = run(name, data)
        assert gradient.item() == pytest.approx(want, rel=1e-12), (name, r)
        assert loss.item() == pytest.approx(min(r, {"ce-gppo": 10}.get(name, 3)), rel=1e-12), (name, r)
        assert metrics["clip_fraction/any"] == (want == 0), (name, r)


@pytest.mark.parametrize("name", ["aspo", "ce-gppo"])
def test_the_dual_clips_can_be_left_out(name):
    """Without them the objective is the one that it was before, also in its value."""
    data = tokens()
    free = {"aspo": {"c_negative": math.inf}, "ce-gppo": {"c": math.inf}}[name]
    surrogate = OBJECTIVES[name].surrogate
    old = dataclasses.replace(OBJECTIVES[name], surrogate=partial(surrogate, **free))
    r, a = (data["logprobs"] - data["old_logprobs"]).exp().flatten(), data["advantages"]
    (loss, gradient, _), (_, limited, _) = run(old, data), run(name, data)
    far = (a < 0) & (r > (3 if name == "aspo" else 10))
    assert 10 < far.sum() < N / 10
    assert torch.equal(gradient.flatten()[~far], limited.flatten()[~far])
    torch.testing.assert_close(gradient.flatten()[far], (-a * r)[far] / N, rtol=1e-12, atol=0)
    assert loss.isfinite() and gradient.isfinite().all()


def bapo_of_the_authors(log_ratio, advantages, mask):
    """Loss and gradient of the authors' rule by its steps: one pair after the other, then PPO's clip and a dual clip at 3."""
    r, a = np.exp(log_ratio), advantages * np.ones_like(log_ratio)
    low, high = 0.6, 1.2

    def share():
        kept = np.where(a >= 0, np.minimum(r, high), np.maximum(r, low)) * a * mask
        good, bad = kept[kept > 0].sum(), -kept[kept < 0].sum()
        return np.inf if bad == 0 else good / bad

    while share() < 1 and low < 0.9 - 1e-9:
        low = min(low + 0.05, 0.9)
    while share() < 1 and high < 3 - 1e-9:
        high = min(high + 0.05, 3.0)
    value = np.minimum(r * a, np.clip(r, low, high) * a)
    slope = np.where(((a > 0) & (r > high)) | ((a < 0) & ((r < low) | (r > 3))), 0.0, r * a)
    value = np.where(a < 0, np.maximum(value, 3 * a), value)
    return -(value * mask).sum() / mask.sum(), -slope * mask / mask.sum(), (low, high)


def test_bapo_is_the_rule_of_the_authors():
    g = np.random.default_rng(0)
    seen = set()
    for trial in range(400):
        b, t = g.integers(2, 9), g.integers(3, 9)
        old = -g.exponential(2.0, (b, t)) - 0.01
        new = old + g.normal(0, 1.0, (b, t))
        a = g.normal(g.uniform(-0.7, 0.1), 1.0, (b, t if trial % 2 else 1))
        mask = g.random((b, t)) < 0.8
        mask[0, 0] = True
        loss, gradient, pair = bapo_of_the_authors(new - old, a, mask)
        seen.add(tuple(np.round(pair, 2)))
        data = {"logprobs": new, "old_logprobs": old, "advantages": a}
        got, grads, _ = run(
            "bapo", {**{k: torch.from_numpy(v) for k, v in data.items()}, "mask": torch.from_numpy(mask)}
        )
        assert got.item() == pytest.approx(loss, rel=1e-9, abs=1e-12)
        np.testing.assert_allclose(grads.numpy(), gradient, rtol=1e-9, atol=1e-12)
    assert {(0.6, 1.2), (0.9, 3.0)} < seen and len(seen) > 15


def test_a_former_name_finds_the_objective_and_warns():
    with pytest.warns(
        FutureWarning, match=r"objective 'bapo-reading' is now 'bapo', which has the authors' dual clip"
    ) as said:
        assert OBJECTIVES["bapo-reading"] is OBJECTIVES["bapo"]
    assert said[0].filename == __file__
    with pytest.warns(FutureWarning, match="is now 'bapo'"):
        assert get_objective("bapo-reading").name == "bapo"
    with pytest.warns(FutureWarning, match="is now 'bapo'"):
        assert OBJECTIVES.get("bapo-reading") is OBJECTIVES["bapo"]
    with pytest.warns(FutureWarning, match="is now 'bapo'"):
        assert run("bapo-reading", batch())[0] == run("bapo", batch())[0]
    assert "bapo-reading" in OBJECTIVES and "bapo-reading" not in list(OBJECTIVES)
    assert len(OBJECTIVES) == len(list(OBJECTIVES)) and "bapo-reading" not in repr(OBJECTIVES)
    with pytest.raises(KeyError):
        OBJECTIVES["nothing"]


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


def test_sides_are_the_edges_of_two_regions():
    old = batch()["old_logprobs"]
    both = Sides(lower=Clip(0.2), upper=Band(KL, 0.05))(old)
    assert torch.equal(both.lower, Clip(0.2)(old).lower)
    assert torch.equal(both.upper, Band(KL, 0.05)(old).upper)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [-1.5, -0.5])
def test_parts_of_a_batch_choose_the_pair_of_the_whole_from_its_sums(shift, dtype):
    """A first pass adds up the sums of the parts; the parts alone would choose differently."""
    data = batch(spread=1.5)
    x = (data["logprobs"] - data["old_logprobs"]).to(dtype)
    a, valid = (data["advantages"] + shift).unsqueeze(1).to(dtype), data["mask"]
    parts = [slice(0, 1), slice(1, 3), slice(3, B)]

    def choose(region, rows):
        return region(data["old_logprobs"][rows].to(dtype), log_ratio=x[rows], advantages=a[rows], mask=valid[rows])

    total = sum(Balanced().sums(x[rows], a[rows], valid[rows]) for rows in parts)
    torch.testing.assert_close(total, Balanced().sums(x, a, valid))
    assert total.shape == (1 + 6 + 36, 2) and (total >= 0).all()
    want = choose(Balanced(), slice(0, B))
    told = Balanced(reduce=lambda own: total.to(own))
    for rows in parts:
        got = choose(told, rows)
        assert (got.lower[0, 0], got.upper[0, 0]) == (want.lower[0, 0], want.upper[0, 0])
    alone = {tuple(v[0, 0].item() for v in choose(Balanced(), rows)) for rows in parts}
    assert len(alone) > 1, "the parts must differ for this test to see anything"


def test_a_hook_that_does_not_fit_is_refused():
    with pytest.raises(TypeError, match="reduce must be a function of the sums, or None, got 3"):
        Balanced(reduce=3)
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"reduce returned shape \(2,\), it must be \(43, 2\)"):
        Balanced(reduce=lambda sums: sums.sum(0))(x, log_ratio=x, advantages=x, mask=x == 0)


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


def moved(data):
    """log r and A of the valid tokens, and whether A pushes further where they have moved."""
    x = (data["logprobs"] - data["old_logprobs"])[data["mask"]].numpy()
    a = data["advantages"].unsqueeze(1).expand(B, T)[data["mask"]].numpy()
    return x, a, a * x > 0


def left_out_by(surrogate, data):
    objective = Objective(bounds=Clip(1.0, math.inf), surrogate=surrogate)
    terms = token_objective(objective, **data)
    x, a, _ = moved(data)
    out = terms.stopped[data["mask"]].numpy()
    np.testing.assert_allclose(terms.value[data["mask"]].numpy(), np.where(out, 0.0, np.exp(x) * a), rtol=1e-12)
    return out


@pytest.mark.parametrize("spread", [0.05, 0.3, 0.6, 2.0])
@pytest.mark.parametrize("every_token", [False, True])
@pytest.mark.parametrize("budget", [0.04, 0.3, 0.0])
def test_m2po_takes_the_largest_out_one_by_one(spread, every_token, budget):
    """The paper's text as a loop: the largest goes, until the mean of what is left is in the budget."""
    counts = set()
    for seed in range(4):
        data = batch(seed, spread=spread)
        x, _, pushed = moved(data)
        rest = [int(i) for i in range(len(x)) if every_token or pushed[i]]
        while rest and sum(x[i] ** 2 for i in rest) / len(rest) > budget:
            rest.remove(max(rest, key=lambda i: x[i] ** 2))
        want = np.array([(every_token or bool(pushed[i])) and i not in rest for i in range(len(x))])
        got = left_out_by(partial(second_moment, budget=budget, every_token=every_token), data)
        assert (got == want).all()
        counts.add(int(want.sum()))
    assert max(counts) > 0 or spread == 0.05 or (spread, budget) == (0.3, 0.3)


@pytest.mark.parametrize("spread", [0.05, 0.3, 0.6, 2.0])
def test_m2po_with_the_limit_of_the_authors_code(spread):
    """They look for the first (log r)², rising, at which the mean capped there leaves the budget, and clip one before it."""
    for seed in range(6):
        data = batch(seed, spread=spread)
        x, _, pushed = moved(data)
        squares = sorted(x[pushed] ** 2)
        limit = math.inf
        if np.mean(squares) > 0.04:
            first = next(k for k, v in enumerate(squares) if np.mean(np.minimum(squares, v)) >= 0.04)
            limit = squares[first - 1] if first else 0.0
        got = left_out_by(partial(second_moment, capped=True), data)
        assert (got == (pushed & (x**2 >= limit))).all()
        assert spread < 0.1 or got.any()


def test_m2po_leaves_all_of_equal_size_out_or_none():
    data = batch(spread=0.3)
    data["logprobs"] = data["old_logprobs"] + torch.where(data["logprobs"] > data["old_logprobs"], 0.25, -0.25)
    _, _, pushed = moved(data)
    assert (left_out_by(second_moment, data) == pushed).all()
    assert not left_out_by(partial(second_moment, budget=0.0626), data).any()
    for bare in (torch.zeros(0, 4), torch.zeros(3, 0)):
        assert second_moment(bare, torch.ones(len(bare), 1), None, mask=bare > 0).shape == bare.shape


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
