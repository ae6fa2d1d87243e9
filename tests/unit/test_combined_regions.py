"""Regions made of regions: intersections, unions, halves and signs, of intervals, of memberships, and of both."""

import copy
import math
import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from bandpo import (
    CHI2,
    DCPO,
    KL,
    OBJECTIVES,
    TV,
    Band,
    Clip,
    Objective,
    RatioBounds,
    match_radius,
    policy_loss,
    token_objective,
)
from bandpo.bounds import BySign, Intersection, Sides, TopK, Union, in_band, max_shift, outside_fraction
from bandpo.bounds.combined import change_leaves, leaves
from bandpo.bounds.regions import common_radius, with_radius
from bandpo.experimental import Balanced, Elastic
from bandpo.integrations.options import RegionOptions
from bandpo.losses import compiled
from bandpo.metrics import policy_metrics
from bandpo.surrogates import clip, mask, soft_edge, traits, two_sided
from bandpo.testing import check_bounds
from batches import B, T, batch, complete, run

N = 200_000


@traits("membership")
def near(old_logprobs, *, log_ratio):
    """A membership that is no interval, and holds r = 1 in it: |log r| below 0.1 or above 0.3."""
    del old_logprobs
    return (log_ratio.abs() <= 0.1) | (log_ratio.abs() > 0.3)


def tokens(n=N, seed=0):
    rng = np.random.default_rng(seed)
    old = -rng.exponential(1.5, n) - 1e-4
    return old, np.minimum(old + 0.7 * rng.standard_normal(n), -1e-6), rng.standard_normal(n)


def gradient_of(objective, old, new, a):
    """The gradient of the sum of the objective, times -1 for ascent, of tokens that are sequences of their own."""
    x = torch.tensor(new).unsqueeze(1).requires_grad_()
    fixed = torch.tensor(old).unsqueeze(1)
    loss, _ = policy_loss(
        logprobs=x, old_logprobs=fixed, rollout_logprobs=fixed, advantages=torch.tensor(a), mask=torch.ones_like(fixed),
        objective=replace(objective, aggregation="token-sum"),
    )  # fmt: skip
    loss.backward()
    return -x.grad.flatten().numpy()


def binary_kl(p, q):
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def inside(part, p, r, a):
    """Membership by hand, without the bounds of the library."""
    if part == "clip":
        return (r >= 0.8) & (r <= 1.2)
    if part == "tv":
        return abs(p * r - p) <= 0.05
    if part == "kl":
        return binary_kl(p, p * r) <= 0.05
    if part == "near":
        return (abs(np.log(r)) <= 0.1) | (abs(np.log(r)) > 0.3)
    return np.where(a > 0, r <= 1.5, r >= 0.9)  # "signs"


PARTS = {
    "clip": Clip(0.2), "tv": Band(TV, 0.05, max_ratio=None), "kl": Band(KL, 0.05, max_ratio=None), "near": near,
    "signs": BySign(Clip(1.0, 0.5), Clip(0.1, math.inf)),
}  # fmt: skip
PAIRS = [(a, b) for i, a in enumerate(PARTS) for b in list(PARTS)[i + 1 :]]


@pytest.mark.parametrize(("one", "other"), PAIRS)
@pytest.mark.parametrize("make", [Intersection, Union, Sides])
def test_a_masked_gradient_is_that_of_the_two_memberships(make, one, other):
    """With `mask`, what is outside on the side that A pushes to has no gradient: by hand, on 200,000 tokens."""
    old, new, a = tokens()
    p, r = np.exp(old), np.exp(new - old)
    first, second = inside(one, p, r, a), inside(other, p, r, a)
    joined = {Intersection: first & second, Union: first | second, Sides: np.where(r < 1, first, second)}[make]
    out = ~joined & (a * (r - 1) > 0)
    assert 0.02 < out.mean() < 0.98
    found = gradient_of(Objective(bounds=make(PARTS[one], PARTS[other]), surrogate=mask), old, new, a)
    np.testing.assert_allclose(found, np.where(out, 0.0, a * r), rtol=1e-12, atol=0)


@pytest.mark.parametrize("make", [Intersection, Union, Sides])
def test_a_membership_made_of_intervals_masks_as_the_interval_does(make):
    """`in_band` is the membership of a band: with a mask, the mix is the combination of the intervals."""
    band = Band(KL, 0.05, max_ratio=None)

    @traits("membership")
    def member(old_logprobs, *, log_ratio):
        return in_band(log_ratio, old_logprobs, KL, 0.05)

    old, new, a = tokens()
    whole, mixed = (Objective(bounds=make(Clip(0.2, 0.28), part), surrogate=mask) for part in (band, member))
    assert mixed.bounds_inputs == ("log_ratio",)
    assert (mixed.traits, whole.traits) == (("membership",), ("membership",))  # the surrogate has the mark too
    np.testing.assert_array_equal(gradient_of(mixed, old, new, a), gradient_of(whole, old, new, a))


def test_kpop_is_its_two_divergences():
    """Keep iff KL(π‖μ) <= 0.1 and KL(μ‖π) <= 0.1, whatever A; the weight is r. By numpy, on 200,000 tokens."""
    old, new, a = tokens()
    p, q = np.exp(old), np.exp(new)
    keep = (binary_kl(q, p) <= 0.1) & (binary_kl(p, q) <= 0.1)
    assert 0.2 < keep.mean() < 0.9
    for one in (binary_kl(q, p) <= 0.1, binary_kl(p, q) <= 0.1):
        assert (one != keep).mean() > 0.005, "each of the two decides some tokens"
    found = gradient_of(OBJECTIVES["kpop"], old, new, a)
    np.testing.assert_array_equal(found != 0, keep)
    np.testing.assert_allclose(found[keep], (a * q / p)[keep], rtol=1e-12)


def test_icepop_of_prime_rl_is_a_mask_of_the_ratio_with_its_edges():
    old, new, a = tokens()
    r = np.exp(3 * (new - old))
    new = np.minimum(old + 3 * (new - old), -1e-6)
    r = np.exp(new - old)
    found = gradient_of(OBJECTIVES["icepop-ratio"], old, new, a)
    np.testing.assert_allclose(found, np.where((r >= 0.2) & (r <= 5), a * r, 0.0), rtol=1e-12)
    assert 0.01 < (found == 0).mean() < 0.5
    # A ratio of an edge is kept, in float64 up to a unit of 0.2 = 1 - 0.8.
    at_edge = gradient_of(
        OBJECTIVES["icepop-ratio"], np.full(2, -3.0), np.log([0.2 * (1 + 1e-15), 5.0]) - 3, np.ones(2)
    )
    np.testing.assert_allclose(at_edge, [0.2, 5.0], rtol=1e-12)


def test_the_two_forms_of_icepop_differ():
    """verl's corrects a clipped objective for π_old/μ; prime-rl's masks π/μ. Both keep a token, with other weights."""
    x = torch.tensor([[-1.0]], requires_grad=True)
    given = {"old_logprobs": torch.tensor([[-1.3]]), "rollout_logprobs": torch.tensor([[-1.6]])}
    slopes = []
    for name in ("icepop", "icepop-ratio"):
        loss, _ = policy_loss(logprobs=x, advantages=torch.ones(1), mask=torch.ones(1, 1), objective=name, **given)
        slopes.append(torch.autograd.grad(loss, x)[0].item())
    assert slopes[0] == 0  # π/π_old = 1.35 is past PPO's edge
    assert slopes[1] == pytest.approx(-math.exp(0.6), rel=1e-6)


@pytest.mark.parametrize("name", ["kl", "tv", "chi2"])
def test_halves_of_a_band_and_ppo_s_other_edge(name):
    whole, upper = OBJECTIVES[f"bandpo-{name}"], OBJECTIVES[f"bandpo-{name}-upper"]
    old, new, a = tokens(20_000)
    band, ppo = gradient_of(whole, old, new, a), gradient_of(OBJECTIVES["grpo"], old, new, a)
    np.testing.assert_array_equal(gradient_of(upper, old, new, a), np.where(a > 0, band, ppo))
    assert (upper.aggregation, upper.anchor, upper.advantage) == (whole.aggregation, whole.anchor, whole.advantage)
    assert upper.bounds.upper == whole.bounds
    if name == "kl":
        lower = gradient_of(OBJECTIVES["bandpo-kl-lower"], old, new, a)
        np.testing.assert_array_equal(lower, np.where(a > 0, ppo, band))


def test_edges_of_combined_intervals():
    logp = torch.linspace(-9, -1e-3, 500, dtype=torch.float64)
    parts = [Clip(0.2, 0.28), Band(KL, 0.02), DCPO(), Clip(0.5, 0.05)]
    low, high = (torch.stack([getattr(part(logp), side) for part in parts]) for side in ("lower", "upper"))
    met, joined = Intersection(*parts)(logp), Union(*parts)(logp)
    assert torch.equal(met.lower, low.amax(0)) and torch.equal(met.upper, high.amin(0))
    assert torch.equal(joined.lower, low.amin(0)) and torch.equal(joined.upper, high.amax(0))
    for region in (met, joined):
        assert ((region.lower <= 1) & (region.upper >= 1)).all()
    assert Intersection(Clip(0.2))(logp).upper.equal(Clip(0.2)(logp).upper)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert Intersection(*parts)(logp.to(dtype)).lower.dtype == dtype
    # inside both exactly where inside the intersection, inside one exactly where inside the union
    r = torch.linspace(0.4, 1.6, 500, dtype=torch.float64).unsqueeze(1)
    each = torch.stack([(r >= part(logp).lower) & (r <= part(logp).upper) for part in parts])
    assert torch.equal((r >= met.lower) & (r <= met.upper), each.all(0))
    assert torch.equal((r >= joined.lower) & (r <= joined.upper), each.any(0))


def test_a_region_asks_for_what_its_parts_ask_for():
    deep = Intersection(Clip(0.3), Union(Elastic(), Balanced()), BySign(Clip(0.2), Elastic()))
    assert set(deep.inputs) == {"advantages", "signal", "log_ratio", "mask"}
    objective = Objective(bounds=deep)
    assert (objective.extras, objective.traits) == (("signal",), ("of_batch",))
    data = {**batch(), "extras": {"signal": torch.rand(B, dtype=torch.float64)}}
    x = data["logprobs"] - data["old_logprobs"]
    a, signal = data["advantages"].unsqueeze(1), data["extras"]["signal"].unsqueeze(1)
    old, x = (v.masked_fill(~data["mask"], 0.0) for v in (data["old_logprobs"], x))
    wide = Elastic()(old, advantages=a, signal=signal)
    balanced = Balanced()(old, log_ratio=x, advantages=a, mask=data["mask"])
    want = torch.minimum(torch.minimum(Clip(0.3)(old).upper, torch.maximum(wide.upper, balanced.upper)),
                         torch.where(a > 0, Clip(0.2)(old).upper, wide.upper))  # fmt: skip
    found = token_objective(objective, **data).bounds
    assert torch.equal(found.upper[data["mask"]], want[data["mask"]])
    for signs in (BySign(Elastic(), Clip(0.2)), Sides(Elastic(), Clip(0.2)), Sides(Clip(0.2), BySign(Clip(), Band()))):
        assert run(Objective(bounds=signs), data if "signal" in Objective(bounds=signs).extras else batch())[
            0
        ].isfinite()


def test_a_fixed_input_of_a_part_is_no_input():
    fixed = partial(Intersection(Clip(0.2), Elastic()), signal=torch.zeros(1, 1))
    assert Objective(bounds=fixed).bounds_inputs == ("advantages",)
    assert run(Objective(bounds=fixed), batch())[0].isfinite()
    assert Objective(bounds=Union(Clip(0.1), partial(Elastic(), signal=torch.ones(1, 1)))).extras == ()


def test_topk_in_a_combination():
    name = "dppo-topk-tv"
    data = complete(name, batch(spread=1.0))
    plain = token_objective(OBJECTIVES[name], **data).bounds
    for make, joins in ((Intersection, torch.logical_and), (Union, torch.logical_or)):
        objective = replace(OBJECTIVES[name], bounds=make(TopK(TV, 0.15), Clip(0.2)))
        assert objective.extras == OBJECTIVES[name].extras
        assert objective.bounds.k == 20
        r = (data["logprobs"] - data["old_logprobs"]).masked_fill(~data["mask"], 0).exp()
        found = token_objective(objective, **data).bounds
        assert torch.equal(found, joins(plain, (r >= 0.8) & (r <= 1.2)))
        for surrogate in (clip, two_sided, soft_edge):
            with pytest.raises(ValueError, match="says which tokens are inside and has no edges"):
                Objective(bounds=make(Clip(0.2), TopK()), surrogate=surrogate)
    for bounds in (Sides(TopK(), Clip()), BySign(Clip(), Union(TopK(), Clip()))):
        with pytest.raises(ValueError, match="has no edges"):
            Objective(bounds=bounds)
    with pytest.raises(ValueError, match="its TopK parts have k = 5 and 20, and all of them are given the same tokens"):
        Intersection(TopK(k=5), Sides(Clip(), TopK(k=20)))
    sides = token_objective(replace(OBJECTIVES[name], bounds=Sides(TopK(TV, 0.15), Clip(0.2))), **data).bounds
    assert torch.equal(sides, torch.where(r < 1, plain, r <= 1.2))
    signs = token_objective(replace(OBJECTIVES[name], bounds=BySign(TopK(TV, 0.15), Clip(0.2))), **data).bounds
    assert torch.equal(signs, torch.where(data["advantages"].unsqueeze(1) > 0, plain, (r >= 0.8) & (r <= 1.2)))


def test_what_a_combination_cannot_be_made_of_is_named():
    for make in (Intersection, Union):
        with pytest.raises(ValueError, match=f"{make.__name__}: pass one region or more"):
            make()
        with pytest.raises(TypeError, match=f"{make.__name__}: a part must be callable, got 0.2"):
            make(Clip(0.2), 0.2)
    with pytest.raises(TypeError, match="Sides: a part must be callable"):
        Sides(Clip(0.2), 0.2)
    with pytest.raises(TypeError, match=r"BySign: a part .* keyword-only"):
        BySign(Clip(0.2), lambda old, advantages: Clip(0.2)(old))
    unmarked = Intersection(Clip(0.2), lambda old: old < -1)
    with pytest.raises(TypeError, match="one part returned an interval and another one which tokens are inside; mark"):
        unmarked(torch.zeros(2))
    with pytest.raises(TypeError, match="Union: a part returned int"):
        Union(Clip(0.2), lambda old: 3)(torch.zeros(2))
    with pytest.raises(TypeError, match=r"Intersection takes the inputs advantages, signal, got advantages"):
        Intersection(Clip(0.2), Elastic())(torch.zeros(2), advantages=torch.zeros(2))
    with pytest.raises(TypeError, match="Sides: mark the regions that return a bool tensor"):
        Sides(lambda old: old < -1, lambda old: old < -2)(torch.zeros(2))
    both = Intersection(lambda old: old < -1, lambda old: old > -3)(torch.tensor([-4.0, -2.0, 0.0]))
    assert both.tolist() == [False, True, False]


def test_nan_of_a_part_is_not_lost():
    """A radius of 0 in a tensor gives NaN bounds; the token is counted as not finite, whatever the other part says."""
    broken = Band(KL, torch.tensor([0.05, 0.0]))
    for region in (Intersection(Clip(0.2), broken), Union(broken, Clip(0.2)), Sides(Clip(0.2), broken)):
        upper = region(torch.tensor([-1.0, -1.0])).upper
        assert upper[0].isfinite() and upper[1].isnan()


REGIONS = [
    Intersection(Clip(0.2), Band(KL, 0.05)), Union(Clip(0.2), Sides(Band(TV), DCPO())),
    BySign(Intersection(Clip()), Union(Band())),
    Intersection(Band(KL, torch.tensor([0.05])), Elastic()), Union(TopK(), Clip()), Sides(Elastic(), TopK()),
]  # fmt: skip


@pytest.mark.parametrize("region", REGIONS, ids=repr)
def test_regions_are_values(region):
    again = pickle.loads(pickle.dumps(region))
    for other in (again, copy.copy(region), copy.deepcopy(region)):
        assert other == region
        assert hash(other) == hash(region)
        assert other.inputs == region.inputs
    assert change_leaves(region, lambda leaf: leaf) == region
    assert change_leaves(region, lambda leaf: Clip(0.7)) != region
    assert type(region).__name__ in repr(region)
    assert Intersection(*region.parts) != Union(*region.parts)
    if not any(isinstance(leaf, Band) and isinstance(leaf.radius, torch.Tensor) for leaf in leaves(region)):
        assert all(repr(part) in repr(region) for part in region.parts)
    assert eval(repr(Intersection(Clip(0.2), DCPO()))) == Intersection(Clip(0.2), DCPO())


def test_a_pickle_of_the_first_release_loads():
    """There the state had the two parts alone."""
    for old in (BySign(Clip(0.1), Band()), Sides(Clip(0.1), Band())):
        again = object.__new__(type(old))
        state = {k: v for k, v in vars(old).items() if k not in ("inputs", "_asked", "k", "max_ratio")}
        again.__setstate__(state)
        assert again == old and again.inputs == old.inputs and again.k is None


def test_radius_of_a_combination():
    one = OBJECTIVES["bandpo-kl-upper"].with_radius(0.1)
    assert one.bounds == Sides(Clip(0.2), Band(KL, 0.1))
    two = OBJECTIVES["kpop"].with_radius(0.2)
    assert [leaf.radius for leaf in leaves(two.bounds)] == [0.2, 0.2]
    tensor = torch.tensor(0.3)
    assert common_radius(two.with_radius(tensor).bounds) is tensor
    assert common_radius(Union(Band(KL, tensor), Band(TV, tensor.clone()))) is tensor
    deep = Objective(bounds=Intersection(Clip(0.5), BySign(Clip(0.1), Band("js", (0.1, 0.2)))))
    assert deep.with_radius((0.3, 0.4)).bounds.bounds[1].negative.radius == (0.3, 0.4)
    for bounds in (Intersection(Clip(0.2), DCPO()), Clip(0.2)):
        assert common_radius(bounds) is None
        with pytest.raises(ValueError, match="objective 'custom' has no radius"):
            Objective(bounds=bounds).with_radius(0.1)
    with pytest.raises(
        ValueError, match=r"objective 'x' has balls of the radii 0\.05 and 0\.1, and one radius was given"
    ):
        Objective(bounds=Union(Band(KL, 0.05), Band(TV, 0.1)), name="x").with_radius(0.1)
    with pytest.raises(ValueError, match="with_radius has no radius"):
        with_radius(DCPO(), 0.1)


def test_options_of_hosts_reach_the_parts():
    def applied(name, **options):
        return RegionOptions(**options).apply(OBJECTIVES[name], name).bounds

    assert applied("bandpo-kl-upper") == OBJECTIVES["bandpo-kl-upper"].bounds
    assert applied("bandpo-kl-upper", radius=0.1, max_ratio=5.0, epsilon=0.3) == Sides(
        Clip(0.3), Band(KL, 0.1, max_ratio=5.0)
    )
    assert applied("bandpo-kl-upper", divergence="tv") == Sides(Clip(0.2), Band(TV, 0.05))
    assert applied("bandpo-kl-lower", epsilon_high=0.28) == Sides(Band(KL, 0.05), Clip(0.2, 0.28))
    assert [b.radius for b in applied("kpop", radius=0.2, radius_upper=0.3).parts] == [(0.2, 0.3)] * 2
    for name, options, words in (
        ("bandpo-kl-upper", {"epsilon_high": 0.3}, "epsilon_high=0.3 would be ignored.*no fixed bound on that side"),
        ("bandpo-kl-lower", {"epsilon": 0.3}, "epsilon=0.3 would be ignored.*no fixed bound on that side"),
        ("kpop", {"divergence": "tv"}, "divergence=tv would be ignored.*balls of several divergences"),
        ("kpop", {"epsilon": 0.1}, "epsilon=0.1 would be ignored.*not exactly one fixed interval"),
        ("abc-grpo", {"epsilon": 0.1}, "epsilon=0.1 would be ignored.*not exactly one fixed interval"),
        ("abc-grpo", {"radius": 0.1}, "radius=0.1 would be ignored.*no ball"),
        ("bandpo-kl-upper", {"divergence_top_k": 5}, "divergence_top_k=5 would be ignored.*has a Band region"),
    ):
        with pytest.raises(ValueError, match=words):
            applied(name, **options)


def test_what_binds_in_a_combination():
    """The cap is that of the part that sets the edge to which A > 0 pushes."""
    logp = torch.tensor([[1e-4, 0.5]]).log()
    data = {"logprobs": logp, "old_logprobs": logp, "advantages": torch.ones(1), "mask": torch.ones(1, 2)}

    def cap(bounds):
        return policy_metrics(token_objective(Objective(bounds=bounds), **data))["band/cap_fraction"].item()

    band = Band(KL, 0.05, max_ratio=10.0)
    assert cap(band) == cap(Sides(Clip(0.2), band)) == cap(BySign(band, Clip())) == 0.5
    assert cap(Intersection(band, Clip(1.0, 20.0))) == cap(Union(Clip(0.2), band)) == 0.5
    assert cap(Sides(band, Clip(0.2))) == cap(BySign(Clip(), band)) == cap(Intersection(band, Clip(1.0, 5.0))) == 0
    assert (
        cap(Union(band, Band(KL, 0.05, max_ratio=20.0)))
        == cap(Intersection(band, Band(KL, 0.05, max_ratio=9.0)))
        == 0.5
    )


def test_matching_takes_combinations_of_intervals():
    upper = Sides(Clip(0.2), Band(TV, 0.05, max_ratio=None))
    assert match_radius(TV, like=upper, by="upper@0.1") == pytest.approx(0.05, rel=1e-9)
    assert match_radius(TV, like=upper, by="lower@0.1") == pytest.approx(0.02, rel=1e-9)  # p·0.2
    assert max_shift(Intersection(upper, Clip(0.2, 0.0))) == pytest.approx(0, abs=1e-12)
    assert max_shift(upper) == pytest.approx(0.05, rel=1e-6)
    old, new, a = (torch.tensor(x) for x in tokens(5000))
    data = {"log_ratio": new - old, "old_logprobs": old, "advantages": a}
    signs = BySign(Band(KL, 0.05), Clip(0.3))
    half = [outside_fraction(part, data | {"mask": sign}) * sign.sum() for part, sign in
            ((Band(KL, 0.05), a > 0), (Clip(0.3), a <= 0))]  # fmt: skip
    assert outside_fraction(signs, data) == pytest.approx(float(sum(half)) / 5000)
    assert outside_fraction(Intersection(near, Clip(0.2)), data) == outside_fraction(
        lambda old: RatioBounds(torch.full_like(old, math.exp(-0.1)), torch.full_like(old, math.exp(0.1))), data
    )
    for bounds, what in ((Elastic(), "advantages, signal"), (signs, "advantages"), (TopK(KL), "topk_logprobs")):
        with pytest.raises(TypeError, match=f"is no interval of the old log-probs alone: it asks for {what}"):
            match_radius(KL, like=bounds, by="max_shift")


def test_the_checks_of_components_accept_them():
    for bounds in (
        Intersection(Clip(0.2), Band(CHI2)),
        Union(Band(), DCPO()),
        BySign(Clip(), Band()),
        Sides(Band(), Clip()),
    ):
        check_bounds(bounds)


@pytest.mark.parametrize("name", ["bandpo-kl-upper", "kpop", "icepop-ratio", "mixed", "deep"])
def test_one_graph_gives_the_same_numbers(name):
    made = {
        "mixed": Objective(bounds=Union(near, Clip(0.2)), surrogate=mask),
        "deep": Objective(bounds=Intersection(BySign(Elastic(), Clip(0.3)), Union(Band(KL, 0.02), Clip(0.1)))),
    }
    objective = made[name] if name in made else OBJECTIVES[name]
    data = complete(objective, batch(dtype=torch.float32))
    if name == "deep":
        data["extras"] = {"signal": torch.rand(B)}
    fast = compiled(backend="eager")
    for again in (objective, pickle.loads(pickle.dumps(objective))):
        loss, metrics = fast(**data, objective=again)
        want, other = policy_loss(**data, objective=objective)
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        for key in other:
            torch.testing.assert_close(metrics[key], other[key], rtol=1e-4, atol=1e-5, equal_nan=True, msg=key)
    assert len(fast._graphs) == 1


def test_a_changing_radius_of_a_combination_becomes_an_input():
    name, fast = "bandpo-tv-upper", compiled(backend="eager")
    data = batch(dtype=torch.float32)

    def losses(radius):
        objective = OBJECTIVES[name].with_radius(radius)
        return fast(**data, objective=objective)[0], policy_loss(**data, objective=objective)[0]

    with pytest.warns(UserWarning, match="has seen radius"):
        found = [losses(radius) for radius in (0.1, 0.2, 0.3, 0.4, 0.5)]
    torch.testing.assert_close(*map(torch.stack, zip(*found, strict=True)), rtol=1e-5, atol=1e-6)
    assert len(fast._graphs) == 3


@pytest.mark.parametrize("name", ["bandpo-kl-upper", "bandpo-kl-lower", "kpop", "icepop-ratio"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_masks_and_advantages_of_every_shape(name, dtype):
    """Holes, an all-masked row, NaN under the mask; advantages per token that are equal give what those of a sequence give."""
    data = complete(name, batch(dtype=dtype))
    data["mask"][0, 3] = False
    data["mask"][1] = False
    poisoned = {
        k: v.masked_fill(~data["mask"], torch.nan) if v.dim() == 2 and k != "mask" else v for k, v in data.items()
    }
    loss, gradient, _ = run(name, data)
    again, same_gradient, metrics = run(name, poisoned)
    assert loss == again and torch.equal(gradient, same_gradient) and metrics["nonfinite_fraction"] == 0
    assert (gradient[~data["mask"]] == 0).all()
    column, per_token = data["advantages"].unsqueeze(1), data["advantages"].unsqueeze(1).expand(B, T)
    for shaped in (column, per_token):
        other = run(name, {**data, "advantages": shaped})
        torch.testing.assert_close(other[0], loss)
        torch.testing.assert_close(other[1], gradient)
