"""Which gradients a surrogate takes away: the rule of every objective against automatic differentiation, and its metrics."""

import dataclasses
import math
from functools import partial, wraps

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bandpo import KL, OBJECTIVES, Band, Clip, Objective, RatioBounds, policy_loss, policy_metrics, token_objective
from bandpo.bounds import outside
from bandpo.experimental import clip_cov, second_moment
from bandpo.metrics import PROB_BINS
from bandpo.surrogates import aspo, clip, dual_clip, future_weighted, mask, reinsert, stops, two_sided
from bandpo.surrogates.stops import stop_rule_of
from batches import complete, run

B, T = 8, 24


def holed(seed=0, per_token=False, zeros=True, dtype=torch.float64):
    """Masks with holes, an empty row, advantages of 0, ratios up to a factor of four or so."""
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(B, T, generator=g, dtype=torch.float64).pow(-0.7) + 1 - 1e-3
    new = torch.minimum(old + 0.5 * torch.randn(B, T, generator=g, dtype=torch.float64), torch.tensor(-1e-6))
    a = torch.randn(B, T if per_token else 1, generator=g, dtype=torch.float64)
    if zeros:
        a[::3] = 0
    valid = torch.rand(B, T, generator=g) < 0.7
    valid[5] = False
    data = {"logprobs": new, "old_logprobs": old, "advantages": a, "mask": valid}
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in data.items()}


def evaluated(objective, data):
    """Terms, and the gradient of each token's log-prob, both of one call."""
    x = data["logprobs"].clone().requires_grad_()
    terms = token_objective(objective, **{**data, "logprobs": x})
    (gradient,) = torch.autograd.grad(terms.value.sum(), x)
    return terms, gradient


def taken(terms, gradient):
    """Tokens with A != 0 and no gradient, by autograd; a weight of 0 is the correction's work and not the surrogate's."""
    weighted = terms.mask if terms.weights is None else terms.mask & (terms.weights != 0)
    return (gradient == 0) & (terms.advantages != 0) & weighted


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_stopped_has_no_gradient_and_the_rest_has_one(name, per_token, seed):
    objective = OBJECTIVES[name]
    terms, gradient = evaluated(objective, complete(objective, holed(seed, per_token), seed))
    moved = terms.weights is None or (terms.weights != 0).expand(B, T)
    assert torch.equal(terms.stopped & moved, taken(terms, gradient))
    assert terms.stopped.dtype == torch.bool and terms.stopped.shape == (B, T)
    metrics = policy_metrics(terms)
    assert metrics["clip_fraction/any"].item() == pytest.approx(
        (terms.stopped.sum() / terms.mask.sum()).item(), abs=1e-6
    )


STOPPING = [
    "grpo", "dual-clip", "dppo-tv", "ipo", "abc-grpo", "aspo", "clip-cov", "gspo", "gmpo", "bapo", "fipo", "m2po",
]  # fmt: skip


@pytest.mark.parametrize("name", STOPPING)
def test_the_batches_of_these_tests_have_something_to_stop(name):
    objective = OBJECTIVES[name]
    assert evaluated(objective, complete(objective, holed()))[0].stopped.any()


@pytest.mark.parametrize(
    "surrogate",
    [
        partial(dual_clip, c=1.3), partial(partial(dual_clip, c=9.0), c=1.3), partial(reinsert, beta_low=0.0),
        partial(reinsert, beta_high=0.0), partial(mask, truncate=1.1), partial(aspo, c=1.2),
        partial(clip_cov, share=0.2, low=0.1), partial(second_moment, budget=0.1), partial(second_moment, capped=True),
        partial(second_moment, every_token=True), partial(future_weighted, c=1.3, limit=math.inf),
        partial(future_weighted, c=1.3), partial(future_weighted, c=1.3, limit=3),
    ],
)  # fmt: skip
def test_a_rule_is_given_the_keywords_that_partial_has_fixed(surrogate):
    terms, gradient = evaluated(Objective(bounds=Clip(0.2), surrogate=surrogate), holed())
    assert terms.stopped.any() and torch.equal(terms.stopped, taken(terms, gradient))


def test_clip_cov_is_judged_by_the_draw_that_it_used():
    objective = Objective(bounds=Clip(0.2), surrogate=partial(clip_cov, share=0.05, low=0.1))
    seen = set()
    for seed in range(4):
        torch.manual_seed(seed)
        terms, gradient = evaluated(objective, holed(zeros=False))
        assert torch.equal(terms.stopped, taken(terms, gradient))
        seen.add(tuple(terms.stopped.flatten().tolist()))
    assert len(seen) > 1


def of_a_user(log_ratio, advantages, bounds, *, logprobs):
    """A gradient through the ratio for A > 0, through the log-prob for A < 0, and none where it is drawn or far away."""
    drawn = torch.rand_like(log_ratio) < 0.3
    value = torch.where(advantages > 0, log_ratio.exp(), logprobs) * advantages
    return value.masked_fill(drawn | (log_ratio.abs() > 0.5), 0.0)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("per_token", [False, True])
def test_an_unmarked_surrogate_is_found_out_by_autograd(per_token, level):
    objective = Objective(bounds=Clip(0.2), surrogate=of_a_user, ratio_level=level)
    torch.manual_seed(3)
    terms, gradient = evaluated(objective, holed(per_token=per_token))
    if level == "token":
        assert torch.equal(terms.stopped, taken(terms, gradient))
    assert 0.1 < (terms.stopped.sum() / terms.mask.sum()).item() < 0.9
    left = terms.stopped | ~terms.mask
    torch.manual_seed(3)
    data = holed(per_token=per_token)
    with torch.no_grad():
        again = token_objective(objective, **data)
    assert torch.equal(again.value, terms.value) and torch.equal(again.stopped | ~terms.mask, left)
    assert not again.value.requires_grad


def test_an_unmarked_surrogate_keeps_its_value_gradient_and_random_numbers():
    """Finding out costs a backward pass and changes nothing: the same numbers as with a mark."""
    found = []
    for surrogate in (of_a_user, stops(outside)(lambda *a, logprobs: of_a_user(*a, logprobs=logprobs))):
        torch.manual_seed(0)
        loss, gradient, _ = run(Objective(bounds=Clip(0.2), surrogate=surrogate), holed())
        found.append((loss, gradient, torch.rand(3)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tracked", [True, False])
def test_a_held_ratio_is_not_stopped_by_an_unmarked_surrogate(tracked):
    """As with a mark: in training and in evaluation, a ratio at e^±40 does not count."""
    data = {
        "logprobs": torch.tensor([[-1.0, -1.0, -60.0]]).requires_grad_(tracked),
        "old_logprobs": torch.tensor([[-1.0, -60.0, -1.0]]),
        "advantages": torch.ones(1),
        "mask": torch.ones(1, 3),
    }
    terms = token_objective(Objective(bounds=Clip(), surrogate=lambda x, a, b: x.exp() * a), **data)
    assert not terms.stopped.any()


def test_a_rule_is_given_an_input_as_partial_has_fixed_it():
    def rule(log_ratio, advantages, bounds, *, limit):
        return log_ratio > limit

    @stops(rule)
    def surrogate(log_ratio, advantages, bounds, *, limit):
        return (log_ratio.exp() * advantages).masked_fill(log_ratio > limit, 0.0)

    data = holed()
    fixed = Objective(bounds=Clip(), surrogate=partial(surrogate, limit=torch.tensor(0.1)))
    terms, gradient = evaluated(fixed, data)
    assert fixed.extras == () and terms.stopped.any() and torch.equal(terms.stopped, taken(terms, gradient))
    limits = torch.full((len(data["mask"]),), 0.1)
    passed, _ = evaluated(Objective(bounds=Clip(), surrogate=surrogate), {**data, "extras": {"limit": limits}})
    assert torch.equal(passed.stopped, terms.stopped)


def test_a_surrogate_without_any_gradient_stops_all():
    terms = token_objective(Objective(bounds=Clip(), surrogate=lambda x, a, b: x.detach() * a), **grad(holed()))
    assert torch.equal(terms.stopped, terms.mask & (terms.advantages != 0))


def grad(data):
    return {**data, "logprobs": data["logprobs"].clone().requires_grad_()}


def test_a_wrapper_does_not_inherit_a_rule_that_it_may_break():
    @wraps(clip)
    def other(log_ratio, advantages, bounds):
        return clip(log_ratio, advantages, bounds).masked_fill(advantages > 0, 0.0)

    assert stop_rule_of(other)[0] is None and stop_rule_of(clip)[0] is not None
    assert stop_rule_of(partial(clip, torch.zeros(1)))[0] is None
    terms, gradient = evaluated(Objective(bounds=Clip(0.2), surrogate=other), holed())
    assert torch.equal(terms.stopped, taken(terms, gradient))


def test_the_metric_of_an_unmarked_surrogate_is_left_out_where_it_cannot_be_found():
    def own(log_ratio, advantages, bounds):
        return clip(log_ratio, advantages, bounds)

    data = holed(dtype=torch.float32)
    objective = Objective(bounds=Clip(0.2), surrogate=own)

    def step(x):
        return policy_loss(**{**data, "logprobs": x}, objective=objective, metrics="full")[1]

    want = step(data["logprobs"])
    by_func = torch.func.grad_and_value(lambda x: _loss_and_metrics(data, objective, x), has_aux=True)(data["logprobs"])
    with torch.inference_mode():
        inference = step(data["logprobs"])
    for found in (torch.compile(step, fullgraph=True, backend="aot_eager")(data["logprobs"]), by_func[1][1], inference):
        assert not any(key.startswith("clip_fraction") for key in found)
        assert set(want) - set(found) == {key for key in want if key.startswith("clip_fraction")}
        torch.testing.assert_close(found["outside_fraction/any"], want["clip_fraction/any"])
        assert not any(value.isnan() for key, value in found.items() if key.startswith("outside"))


def _loss_and_metrics(data, objective, x):
    return policy_loss(**{**data, "logprobs": x}, objective=objective, metrics="full")


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31), surrogate=st.sampled_from([clip, two_sided, mask, reinsert]), per_token=st.booleans()
)
def test_the_shares_are_counted_by_the_side_of_the_ratio(seed, surrogate, per_token):
    """An oracle by boolean arithmetic from the definitions."""
    objective = Objective(bounds=Band(KL, 0.05), surrogate=surrogate)
    data = holed(seed, per_token)
    metrics = policy_metrics(token_objective(objective, **data))
    on, x = data["mask"], data["logprobs"] - data["old_logprobs"]
    r, a = x.exp(), data["advantages"].expand(B, T)
    lower, upper = Band(KL, 0.05)(torch.where(on, data["old_logprobs"], 0.0))
    past = ((a > 0) & (r > upper)) | ((a < 0) & (r < lower))
    gone = {clip: past, mask: past, reinsert: past & False, two_sided: ((r > upper) | (r < lower)) & (a != 0)}[
        surrogate
    ]
    for name, where in (("outside_fraction", past), ("clip_fraction", gone)):
        for side, of_side in (("low", x < 0), ("high", x > 0), ("any", x == x)):
            want = (where & of_side & on).sum() / on.sum()
            assert metrics[f"{name}/{side}"].item() == pytest.approx(want.item(), abs=1e-6)
    shares = [(metrics[f"clip_fraction_by_prob/any/{b}"], metrics[f"token_fraction_by_prob/{b}"]) for b in PROB_BINS]
    total = sum(share.nan_to_num() * of_all for share, of_all in shares).item()
    assert total == pytest.approx(metrics["clip_fraction/any"].item(), abs=1e-6)


def test_a_token_is_outside_on_the_side_that_its_advantage_pushes_to():
    edge = RatioBounds(torch.tensor(0.8), torch.tensor(1.2))
    x = torch.tensor([0.5, 0.79, 0.8, 1.0, 1.2, 1.21, math.inf, math.nan]).log()
    up, down = torch.ones(8), -torch.ones(8)
    assert outside(x, up, edge).tolist() == [False] * 5 + [True, True, False]
    assert outside(x, down, edge).tolist() == [True, True] + [False] * 6
    assert not outside(x, 0 * up, edge).any()
    assert not outside(x, up * math.nan, edge).any()
    inside = torch.tensor([False, True])
    for a, moved, want in ((1.0, 0.1, True), (1.0, -0.1, False), (-1.0, -0.1, True), (0.0, 0.1, False)):
        assert outside(torch.full((2,), moved), torch.full((2,), a), inside).tolist() == [want, False]


def test_a_stopped_ratio_of_exactly_1_counts_by_the_sign_of_its_advantage():
    @stops(lambda log_ratio, advantages, bounds: log_ratio == 0)
    def still(log_ratio, advantages, bounds):
        return (log_ratio.exp() * advantages).masked_fill(log_ratio == 0, 0.0)

    x = torch.full((3, 2), -1.0)
    found = policy_metrics(token_objective(Objective(bounds=Clip(), surrogate=still), logprobs=x, old_logprobs=x,
                                           advantages=torch.tensor([1.0, -1.0, 0.0]), mask=x < 0))  # fmt: skip
    shares = [round(found[f"clip_fraction/{side}"].item(), 4) for side in ("low", "high", "any")]
    assert shares == [0.3333, 0.3333, 0.6667]


def test_a_token_without_a_weight_is_in_no_share():
    data = holed(zeros=False)
    weight = torch.ones(B, dtype=torch.float64)
    weight[0] = math.nan
    _, metrics = policy_loss(**data, objective="grpo", sample_weight=weight, metrics="full")
    _, want = policy_loss(**{name: x[1:] for name, x in data.items()}, objective="grpo", metrics="full")
    for key in ("clip_fraction/any", "outside_fraction/any", "ratio/mean"):
        torch.testing.assert_close(metrics[key], want[key])


def test_the_bounds_may_be_known_already():
    data = holed()
    terms = token_objective(OBJECTIVES["bandpo-kl"], **data)
    again = token_objective(OBJECTIVES["bandpo-kl"], **data, bounds=terms.bounds)
    assert torch.equal(again.value, terms.value) and again.bounds is terms.bounds
    other = token_objective(OBJECTIVES["bandpo-kl"], **data, bounds=Clip(0.5)(data["old_logprobs"]))
    assert not torch.equal(other.value, terms.value)


def test_the_old_keywords_of_the_metrics_work_with_a_warning():
    data = holed(dtype=torch.float32)
    objective = dataclasses.replace(OBJECTIVES["bandpo-kl"])
    terms = token_objective(objective, **data)
    with pytest.warns(FutureWarning, match=r"policy_metrics\(log_ratio=.*is now policy_metrics\(terms\)"):
        found = policy_metrics(
            log_ratio=terms.log_ratio, old_logprobs=terms.anchor_logprobs, advantages=terms.advantages, mask=data["mask"],
            bounds=terms.bounds, bounds_of=objective.bounds, nonfinite=terms.nonfinite, entropy=-data["old_logprobs"],
        )  # fmt: skip
    want = policy_metrics(terms, entropy=-data["old_logprobs"])
    assert list(found) == list(want)
    for key, value in want.items():
        assert torch.equal(found[key].nan_to_num(-7), value.nan_to_num(-7)), key
    assert terms.objective is objective and torch.equal(terms.mask, data["mask"])
