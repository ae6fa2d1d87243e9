"""Normalisers of any split, masks that are masks, and the checks of an objective's components and inputs."""

import dataclasses
import functools
import importlib.util
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bandpo import (
    KL,
    OBJECTIVES,
    Band,
    Clip,
    Objective,
    RatioBounds,
    aggregate,
    loss_normalizer,
    policy_loss,
)
from bandpo import terms as tokens
from bandpo.bounds.regions import BySign, TopK
from bandpo.experimental import Balanced, Elastic, clip_cov, kl_cov, log_stabilized, second_moment
from bandpo.surrogates import (
    clip,
    detach,
    dual_clip,
    kl_penalty,
    log_quadratic,
    mask,
    quadratic_tv,
    reinsert,
    soft,
    traits,
    two_sided,
)  # fmt: skip
from bandpo.surrogates.sequence import future_weighted, gamma_weighted, geometric_mean, mirror_descent, tapered
from bandpo.terms import sequence_log_ratio
from bandpo.testing import check_bounds, check_surrogate
from batches import B, T, batch, complete, max_length, run

AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(AGGREGATIONS), st.integers(1, 7), st.floats(0.0, 1.0), st.booleans())
def test_parts_add_up_for_any_split(seed, aggregation, rows, share, masked_first):
    """Rows in any order and parts of any size, with rows and whole parts that are masked."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 5, generator=g, dtype=torch.float64, requires_grad=True)
    valid = torch.rand(rows, 5, generator=g) < share
    if masked_first:
        valid[0] = False
    cuts = sorted(torch.randint(0, rows + 1, (3,), generator=g).tolist())
    parts = [torch.arange(rows)[a:b] for a, b in zip([0, *cuts], [*cuts, rows], strict=True)]
    length = 12 if aggregation == "seq-mean-token-sum-norm" else None
    whole = aggregate(x, valid, aggregation, max_length=length)
    total = sum(loss_normalizer(valid[p], aggregation) for p in parts)
    assert total == loss_normalizer(valid, aggregation)
    for normalizer in (total, float(total)):
        given_ = None if aggregation == "token-sum" else normalizer
        added = sum(aggregate(x[p], valid[p], aggregation, normalizer=given_, max_length=length) for p in parts)
        torch.testing.assert_close(added, whole, rtol=1e-12, atol=1e-15)
        (a,), (b,) = (torch.autograd.grad(v, x, retain_graph=True) for v in (added, whole))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-16)
        assert a.isfinite().all() and whole.isfinite()


def test_the_numbers_of_the_report():
    """Four rows, one of them fully masked and a micro-batch of its own: grpo was -0.239 instead of -0.319."""
    data = batch()
    data["mask"][2] = False
    whole = run("grpo", data)[0]
    parts = [{k: v[i : i + 1] for k, v in data.items()} for i in range(B)]
    normalizer = sum(loss_normalizer(p["mask"], "seq-mean-token-mean") for p in parts)
    assert normalizer == 5
    assert sum(run("grpo", p, normalizer=normalizer)[0] for p in parts).item() == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "luspo", "topr", "bandpo-kl"])
@pytest.mark.parametrize("normalizer", [None, 0, 0.0, torch.tensor(0), torch.tensor(0.0), torch.tensor([0])])
def test_nothing_at_all_is_zero(name, normalizer):
    data = {**batch(), "mask": torch.zeros(B, T)}
    with torch.autograd.detect_anomaly(check_nan=True):
        loss, gradient, _ = run(name, data, normalizer=normalizer, ref_logprobs=data["old_logprobs"], kl_coef=0.1)
    assert loss == 0 and loss.dim() == 0 and (gradient == 0).all()


def test_a_normalizer_of_zero_beside_valid_tokens_shows():
    assert aggregate(torch.ones(1, 2), torch.ones(1, 2), normalizer=torch.tensor(0)).isinf()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_normalizer_does_not_depend_on_the_default_dtype(dtype):
    x, valid = torch.ones(1, 70_000), torch.ones(1, 70_000, dtype=torch.bool)
    torch.set_default_dtype(dtype)
    try:
        got = [aggregate(x, valid, normalizer=n) for n in (None, 70_000, 70_000.0, torch.tensor(70_000))]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(v == 1 and v.dtype == torch.float32 for v in got)


@pytest.mark.parametrize(
    ("normalizer", "error"),
    [(-1.0, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("4", TypeError), (True, TypeError),
     (torch.ones(2), ValueError)],
)  # fmt: skip
def test_a_wrong_normalizer_is_refused(normalizer, error):
    with pytest.raises(error, match="normalizer must be"):
        run("grpo", batch(), normalizer=normalizer)
    with pytest.raises(ValueError, match="aggregation: got 'mean'"):
        loss_normalizer(torch.ones(1, 1), "mean")


# ---- masks


DTYPES = [torch.int64, torch.int32, torch.uint8, torch.int8, torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_of_0_and_1_are_the_bool_ones(dtype):
    data = batch()
    assert torch.equal(run("grpo", {**data, "mask": data["mask"].to(dtype)})[0], run("grpo", data)[0])


@pytest.mark.parametrize("value", [-100, 2, -1, 0.5, math.nan, math.inf])
def test_any_other_number_is_refused(value):
    data = batch()
    odd = data["mask"].double()
    odd[1, 5] = value  # beyond the end of its row: labels have -100 there
    if float(value).is_integer():
        odd = odd.long()
    calls = [
        lambda: run("grpo", {**data, "mask": odd}),
        lambda: run("gspo", {**data, "mask": odd}),
        lambda: tokens.token_objective(OBJECTIVES["grpo"], **{**data, "mask": odd}),
        lambda: aggregate(data["logprobs"], odd),
        lambda: loss_normalizer(odd, "token-mean"),
        lambda: sequence_log_ratio(data["logprobs"], odd),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"mask must be bool, or 0 and 1, got .*labels != -100"):
            call()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_also_where_it_is_compiled(backend):
    data = batch(dtype=torch.float32)

    def step(valid):
        return policy_loss(**{**data, "mask": valid}, objective="grpo")[0]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(data["mask"].long()), step(data["mask"]))
    with pytest.raises(RuntimeError, match="mask must be bool, or 0 and 1"):
        compiled(data["mask"].long() * -100)


def test_no_host_waits_for_a_mask_of_integers():
    """On a device the check is an assertion of the device: fake tensors have no value to read."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(B, T)
        loss, _ = policy_loss(logprobs=x, old_logprobs=x, advantages=x, mask=(x > 0).long(), objective="grpo")
    assert loss.shape == ()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_holes_rows_of_one_token_and_masked_rows(name):
    """A token that is masked may be taken out of the batch altogether."""
    data = batch()
    data["mask"][0, 2] = data["mask"][4, 0] = data["mask"][4, 8] = False
    data["mask"][3] = False
    objective = OBJECTIVES[name]
    if "of_batch" in objective.traits:
        objective = dataclasses.replace(
            objective, surrogate=clip if objective.surrogate is clip_cov else objective.surrogate
        )
    data = complete(objective, data)
    loss, gradient, _ = run(objective, data)
    assert loss.isfinite() and gradient.isfinite().all() and (gradient[~data["mask"]] == 0).all()
    if name == "fipo":  # it weighs a token by those that come after it
        return
    order = torch.arange(T).roll(4)  # each row's tokens in another order, holes elsewhere
    moved = {k: v[:, order] if v.dim() > 1 else v for k, v in data.items() if k != "extras"}
    if "extras" in data:
        moved["extras"] = {k: v[:, order] if v.dim() > 1 else v for k, v in data["extras"].items()}
    again, again_gradient, _ = run(objective, moved)
    assert again.item() == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(again_gradient, gradient[:, order], rtol=1e-12, atol=1e-16)


# ---- what an objective is made of


def wrapped(surrogate):
    @functools.wraps(surrogate)
    def call(*args, **kwargs):
        return surrogate(*args, **kwargs)

    return call


@dataclasses.dataclass(frozen=True)
class Both:
    """A surrogate of two."""

    first: object
    second: object

    def __call__(self, log_ratio, advantages, bounds):
        return self.first(log_ratio, advantages, bounds) + self.second(log_ratio, advantages, bounds)


@traits("of_batch")
def centred(log_ratio, advantages, bounds):
    return log_ratio.exp() * (advantages - advantages.mean())


@pytest.mark.parametrize(
    "objective",
    [
        OBJECTIVES["bapo"], OBJECTIVES["clip-cov"], OBJECTIVES["kl-cov"], Objective(bounds=Balanced()),
        Objective(bounds=Clip(), surrogate=partial(partial(clip_cov, share=0.1), low=0.2)),
        Objective(bounds=Clip(), surrogate=wrapped(kl_cov)), Objective(bounds=Clip(), surrogate=centred),
        Objective(bounds=Clip(), surrogate=partial(wrapped(centred))), Objective(bounds=Clip(), surrogate=Both(clip, centred)),
        Objective(bounds=partial(Balanced(), ), surrogate=two_sided),
    ],
    ids=lambda o: o.name,
)  # fmt: skip
def test_an_objective_of_the_batch_is_found_and_refuses_weights(objective):
    assert "of_batch" in objective.traits
    data = batch()
    with pytest.raises(ValueError, match=r"looks at the whole batch.*no sample_weight"):
        policy_loss(**data, objective=objective, sample_weight=torch.ones(B))


def test_the_others_are_not_of_the_batch():
    named = {n for n, o in OBJECTIVES.items() if "of_batch" in o.traits}
    assert named == {"bapo", "clip-cov", "kl-cov", "m2po"}
    assert {n for n, o in OBJECTIVES.items() if "without_advantage" in o.traits} == {
        "ppo-kl",
        "quatro-reading",
        "kl-cov",
        "dro",
        "pmd-mean",
        "troll",
    }
    assert {n for n, o in OBJECTIVES.items() if "membership" in o.traits} >= {"dppo-topk-kl", "dppo-topk-tv"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_not_marked_treats_each_sequence_alone(name):
    """By experiment: the values of a sequence do not depend on the others, but for the marked ones."""
    objective = OBJECTIVES[name]
    data = complete(objective, batch(spread=1.5))
    first = {k: v[:2] for k, v in data.items() if k != "extras"}
    if "extras" in data:
        first["extras"] = {k: v[:2] for k, v in data["extras"].items()}
    whole, alone = (tokens.token_objective(objective, **d).value[:2] for d in (data, first))
    if "of_batch" not in objective.traits:
        torch.testing.assert_close(whole, alone, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_not_marked_has_no_gradient_without_advantage(name):
    objective = OBJECTIVES[name]
    data = complete(objective, {**batch(spread=1.0), "advantages": torch.zeros(B, dtype=torch.float64)})
    if "dual" in objective.extras:
        data["extras"] = {"dual": torch.ones(B, dtype=torch.float64), "baseline": torch.ones(B, dtype=torch.float64)}
    if name == "kl-cov":
        objective = dataclasses.replace(objective, surrogate=partial(kl_cov, share=0.5))
    _, gradient, _ = run(objective, data)
    assert bool((gradient != 0).any()) == ("without_advantage" in objective.traits)


def test_a_trait_has_a_name():
    with pytest.raises(ValueError, match=r"of_batches.*choose one of of_batch"):
        traits("of_batches")


def test_the_inputs_are_the_keyword_only_parameters_without_default():
    def mine(log_ratio, advantages, bounds, *, old_logprobs, bonus, scale=1.0):
        return log_ratio.exp() * advantages + bonus * old_logprobs * scale

    good = Objective(bounds=Clip(), surrogate=mine)
    assert (good.surrogate_inputs, good.extras) == (("old_logprobs", "bonus"), ("bonus",))
    assert Objective(bounds=Clip(), surrogate=partial(mine, bonus=0.5)).extras == ()
    assert Objective(bounds=Clip(), surrogate=functools.wraps(mine)(lambda *a, **k: mine(*a, **k))).extras == ("bonus",)

    @dataclasses.dataclass(frozen=True)
    class Region:
        width: float

        def __call__(self, old_logprobs, *, advantages, signal):
            return Clip(self.width)(old_logprobs)

    made = Objective(bounds=Region(0.2))
    assert (made.bounds_inputs, made.extras) == (("advantages", "signal"), ("signal",))

    class Module(torch.nn.Module):
        def forward(self, log_ratio, advantages, bounds, *, mask):
            return log_ratio * mask

    assert Objective(bounds=Clip(), surrogate=Module()).surrogate_inputs == ("mask",)

    def region(old_logprobs, advantages):
        return Clip(0.2)(old_logprobs)

    with pytest.raises(
        TypeError, match=r"bounds region .*takes advantages as well.*region\(old_logprobs, \*, advantages\)"
    ):
        Objective(bounds=region)
    with pytest.raises(TypeError, match=r"surrogate <lambda> .*takes bonus as well: make further inputs keyword-only"):
        Objective(bounds=Clip(), surrogate=lambda log_ratio, advantages, bounds, bonus: log_ratio)
    with pytest.raises(TypeError, match=r"must take \(log_ratio, advantages, bounds\)"):
        Objective(bounds=Clip(), surrogate=lambda log_ratio, advantages: log_ratio)
    with pytest.raises(TypeError, match=r"must take \(old_logprobs\)"):
        Objective(bounds=lambda: None)
    Objective(bounds=Clip(), surrogate=lambda *args, **more: args[0])


SURROGATES = {
    "clip": clip,
    "two_sided": two_sided,
    "dual_clip": partial(dual_clip, c=3.0),
    "reinsert": reinsert,
    "detach": detach,
    "soft": soft,
}


@pytest.mark.parametrize("surrogate", SURROGATES.values(), ids=SURROGATES)
def test_a_region_without_edges_needs_a_surrogate_that_takes_it(surrogate):
    with pytest.raises(ValueError, match=r"says which tokens are inside and has no edges.*bandpo.surrogates.mask"):
        Objective(bounds=TopK(KL, 0.05), surrogate=surrogate)
    for kept in (mask, partial(mask, truncate=2.0), wrapped(mask)):
        Objective(bounds=TopK(KL, 0.05), surrogate=kept)

    @traits("membership")
    def mine(log_ratio, advantages, bounds):
        return log_ratio.exp() * advantages * bounds

    Objective(bounds=TopK(KL, 0.05), surrogate=mine)


def test_bounds_that_are_none_are_named():
    data = batch()
    for made, words in (
        (lambda old: (old, old), "returned tuple.*RatioBounds"), (lambda old: old, "returned Tensor.*bool tensor"),
        (lambda old: old < -1, "surrogate needs edges"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=words):
            run(Objective(bounds=made), data)
    inside = run(Objective(bounds=lambda old: old < -1, surrogate=mask), data)[0]
    assert inside.isfinite()


def test_a_surrogate_of_another_shape_is_named():
    def flat(log_ratio, advantages, bounds):
        return (log_ratio * advantages).sum(1)

    with pytest.raises(ValueError, match=r"surrogate returned shape \(6,\).*\(6, 9\)"):
        run(Objective(bounds=Clip(), surrogate=flat), batch())


@pytest.mark.parametrize("field", ["old_logprobs", "rollout_logprobs", "mask"])
def test_an_adapter_s_shapes_are_checked_too(field):
    data = complete("tis", batch())
    with pytest.raises(ValueError, match=rf"{field} has shape \(6, 1\) but logprobs has \(6, 9\)"):
        tokens.token_objective(OBJECTIVES["tis"], **{**data, field: data[field][:, :1]})


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_extras_are_checked_before_any_fast_path(monkeypatch):
    """As on CUDA, where a wrong extra passed in silence."""
    data = batch(dtype=torch.float32)
    monkeypatch.setattr(tokens, "_runs_triton", lambda device: True)
    with pytest.raises(ValueError, match=r"'grpo' takes the extras none, got \['signal'\]"):
        run("grpo", data, extras={"signal": torch.ones(B)})
    with pytest.raises(TypeError, match=r"extras\['signal'\] must be a torch.Tensor, got float"):
        run("etr-reading", data, extras={"signal": 1.0})
    monkeypatch.setattr(tokens, "_fused", lambda *args: pytest.fail("the fast path ran first"))
    for call in (
        lambda: run("grpo", data, extras={"signal": torch.ones(B)}),
        lambda: run("grpo", {**data, "mask": data["mask"].long() * -100}),
        lambda: run("tis", data),
    ):
        with pytest.raises(ValueError):
            call()


SURROGATES = [
    clip, detach, quadratic_tv, kl_penalty, log_stabilized, mask, soft, geometric_mean, tapered, clip_cov, kl_cov,
    partial(dual_clip, c=3.0), log_quadratic, gamma_weighted, future_weighted, mirror_descent, second_moment,
]  # fmt: skip


@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda s: getattr(s, "__name__", "partial"))
def test_the_library_s_own_surrogates_pass_their_check(surrogate):
    if surrogate is soft:
        surrogate = partial(soft, tau_negative=1.0)
    check_surrogate(surrogate)


@pytest.mark.parametrize(
    "bounds", [Clip(0.2), Band(KL, 0.05), Elastic(), BySign(Clip(0.2), Band(KL, 0.1)), Balanced()], ids=repr
)
def test_the_library_s_own_bounds_pass_their_check(bounds):
    check_bounds(bounds)


def test_checks_take_extras():
    def mine(old_logprobs, *, edge):
        return RatioBounds(torch.zeros_like(old_logprobs), edge)

    with pytest.raises(AssertionError, match="upper must be >= 1"):
        check_bounds(mine)
    check_bounds(mine, extras={"edge": torch.tensor(2.0)})
    with pytest.raises(AssertionError, match="on policy the gradient must be A"):
        check_surrogate(log_stabilized, extras={"baseline": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="wrong is not asked for; choose from dual, baseline"):
        check_surrogate(log_stabilized, extras={"wrong": torch.tensor(1.0)})
    check_bounds(TopK())


def test_lengths_of_the_norm_are_numpy_s():
    data = batch()
    x = data["logprobs"].numpy()
    rows = [x[i][data["mask"][i].numpy()].sum() / 12 for i in range(B)]
    got = aggregate(
        data["logprobs"], data["mask"], "seq-mean-token-sum-norm", max_length=max_length("seq-mean-token-sum-norm")
    )
    assert got.item() == pytest.approx(np.mean(rows), rel=1e-12)
