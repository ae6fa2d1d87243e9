"""Valid tokens with a NaN or an infinity: they add 0, are counted, and leave everything else as if they were masked."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from bandpo import KL, OBJECTIVES, Band, Clip, Objective, approx_kl, policy_loss, token_objective
from bandpo.surrogates import clip, hold, ratio
from bandpo.surrogates.corrections import TIS, IcePop
from bandpo.terms import sequence_log_ratio
from bandpo.zoo import get_objective
from batches import B, T, batch, complete, deterministic, max_length, run

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOKENS = [(0, 0), (0, 4), (3, 2), (5, 4)]  # valid ones, in rows with other valid tokens


def spoiled(objective, where, bad, dtype=torch.float64):
    """A batch with numbers that are none in some valid tokens of one input, and the tokens that it must leave out."""
    data = complete(objective, batch(dtype=dtype))
    out = torch.zeros(B, T, dtype=torch.bool)
    for i, t in TOKENS:
        out[i, t] = True
    if where == "advantage of a token":
        data["advantages"] = data["advantages"].unsqueeze(1).expand(B, T).clone()
        data["advantages"][out] = bad
    elif where == "advantage of a sequence":
        data["advantages"] = data["advantages"].clone()
        data["advantages"][0] = bad
        out = torch.zeros_like(out)
        out[0] = True
    else:
        data[where] = data[where].clone()
        data[where][out] = bad
    return data, out & data["mask"]


def as_if_masked(objective, data, out, repair):
    """Value of each token from a batch in which the tokens are masked and hold good numbers."""
    clean = {**data, "mask": data["mask"] & ~out}
    for name in repair:
        clean[name] = torch.where(data[name].isfinite(), data[name], -0.5)
    return token_objective(objective, **clean)


def by_definition(values, mask, aggregation):
    """Aggregated in numpy, over all valid tokens."""
    x, valid = values.detach().double().numpy(), mask.numpy()
    rows = [row[keep] for row, keep in zip(x, valid, strict=True) if keep.any()]
    tokens = np.concatenate(rows)
    return {
        "token-mean": lambda: tokens.mean(),
        "seq-mean-token-sum": lambda: np.mean([r.sum() for r in rows]),
        "seq-mean-token-mean": lambda: np.mean([r.mean() for r in rows]),
        "seq-mean-token-sum-norm": lambda: np.mean([r.sum() for r in rows]) / 12,
    }[aggregation]()


CASES = ["logprobs", "old_logprobs", "advantage of a token", "advantage of a sequence"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", CASES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_token_that_is_no_number_adds_nothing_and_counts_in_the_denominators(name, where, bad):
    objective = deterministic(name)
    if where == "old_logprobs" and objective.anchor == "rollout":
        where = "rollout_logprobs"
    data, out = spoiled(objective, where, bad)
    loss, gradient, metrics = run(objective, data)
    assert loss.isfinite() and gradient.isfinite().all()
    assert (gradient[out] == 0).all()
    assert metrics["nonfinite_fraction"].item() == pytest.approx(out.sum().item() / data["mask"].sum().item())
    clean = as_if_masked(objective, data, out, [where] if "logprobs" in where else ["advantages"])
    assert loss.item() == pytest.approx(-by_definition(clean.value, data["mask"], objective.aggregation), rel=1e-12)
    terms = token_objective(objective, **data)
    assert torch.equal(terms.nonfinite, out)
    assert torch.equal(terms.value, clean.value)
    assert torch.equal(terms.log_ratio.expand(B, T), clean.log_ratio.expand(B, T))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_its_gradient_is_that_of_a_masked_token(name):
    """Sums instead of means: masking then moves no denominator, and the two gradients are one."""
    objective = dataclasses.replace(deterministic(name), aggregation="token-sum")
    data, out = spoiled(objective, "logprobs", math.nan)
    _, gradient, _ = run(objective, data)
    _, want, _ = run(objective, {**data, "mask": data["mask"] & ~out})
    assert torch.equal(gradient, want)


@pytest.mark.parametrize("correction", [TIS(2.0), TIS(2.0, "sequence"), IcePop(), IcePop(level="sequence")], ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_sampler_s_log_probs_under_a_correction(correction, bad):
    objective = Objective(bounds=Clip(0.2), correction=correction)
    data, out = spoiled(objective, "rollout_logprobs", bad)
    loss, gradient, metrics = run(objective, data)
    clean = as_if_masked(objective, data, out, ["rollout_logprobs"])
    assert loss.item() == pytest.approx(-by_definition(clean.value, data["mask"], "token-mean"), rel=1e-12)
    assert (gradient[out] == 0).all() and gradient.isfinite().all()
    assert metrics["nonfinite_fraction"] > 0 and metrics["correction/weight_mean"].isfinite()
    # where nothing uses them, they do not matter
    plain = {k: v for k, v in data.items() if k != "rollout_logprobs"}
    assert run("grpo", data)[0] == run("grpo", plain)[0]


EXTRAS = [(n, e) for n, o in OBJECTIVES.items() for e in o.extras if e != "sampled_in_topk"]


@pytest.mark.parametrize(("name", "extra"), EXTRAS)
def test_an_extra_that_is_nan(name, extra):
    data = complete(name, batch())
    out = torch.zeros(B, T, dtype=torch.bool)
    x = data["extras"][extra].clone()
    if x.dim() == 1:
        x[0], out[0] = math.nan, True
    else:
        x[0, 4, 1], out[0, 4] = math.nan, True
    loss, gradient, metrics = run(name, {**data, "extras": {**data["extras"], extra: x}})
    assert loss.isfinite() and gradient.isfinite().all() and (gradient[out] == 0).all()
    assert metrics["nonfinite_fraction"].item() == pytest.approx(
        (out & data["mask"]).sum().item() / data["mask"].sum().item()
    )
    masked = token_objective(get_objective(name), **{**data, "mask": data["mask"] & ~out})
    assert loss.item() == pytest.approx(
        -by_definition(masked.value, data["mask"], OBJECTIVES[name].aggregation), rel=1e-12
    )


@pytest.mark.parametrize("name", ["grpo", "gspo", "gmpo", "topr", "quatro-reading", "bapo"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_no_number_leaves_its_sequence_out(name, bad):
    objective = OBJECTIVES[name]
    data = complete(name, batch())
    weight = torch.linspace(0.5, 1.5, B, dtype=torch.float64)
    if "of_batch" in objective.traits:
        with pytest.raises(ValueError, match="looks at the whole batch"):
            run(name, data, sample_weight=weight)
        return
    want = run(name, data, sample_weight=weight.index_fill(0, torch.tensor(2), 0.0))
    got = run(name, data, sample_weight=weight.index_fill(0, torch.tensor(2), bad))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert got[2]["nonfinite_fraction"].item() == pytest.approx(
        data["mask"][2].sum().item() / data["mask"].sum().item()
    )


def objective_ratio(objective, data, out):
    """The ratio of each token to the policy that it was drawn from, times the weights of a correction."""
    ratio = (data["logprobs"] - data["old_logprobs"]).exp()  # with a rollout anchor the sampler's are the old ones here
    if objective.correction is not None:
        gap = (data["old_logprobs"] - data["rollout_logprobs"]).masked_fill(out | ~data["mask"], 0.0)
        ratio = ratio * objective.correction(gap, data["mask"] & ~out)
    return ratio


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_reference_of_a_kl_term(name, bad):
    objective = deterministic(name)
    data = complete(objective, batch())
    out = torch.zeros(B, T, dtype=torch.bool)
    for i, t in TOKENS:
        out[i, t] = True
    ref = (data["old_logprobs"] - 0.3).masked_fill(out, bad)
    loss, gradient, metrics = run(objective, data, ref_logprobs=ref, kl_coef=0.7, kl="k3-ratio")
    terms = as_if_masked(objective, data, out, [])
    x = (ref - data["logprobs"]).masked_fill(out, 0.0)
    k3 = objective_ratio(objective, data, out) * (x.exp() - x - 1) * ~out
    want = -by_definition(terms.value, data["mask"], objective.aggregation)
    want += 0.7 * by_definition(k3, data["mask"], objective.aggregation)
    assert loss.item() == pytest.approx(want, rel=1e-11)
    assert gradient.isfinite().all() and (gradient[out] == 0).all()
    assert metrics["nonfinite_fraction"].item() == pytest.approx(out.sum().item() / data["mask"].sum().item())
    # a KL that is only reported takes nothing out of the loss
    alone = run(objective, data, ref_logprobs=ref, kl_coef=0.0)
    assert alone[0] == run(objective, data)[0] and alone[2]["kl/ref"].isfinite()
    assert alone[2]["nonfinite_fraction"] == 0


@pytest.mark.parametrize("name", ["grpo", "gspo", "gmpo"])
def test_an_entropy_that_is_no_number_moves_no_loss(name):
    data = batch()
    loss, gradient, _ = run(name, data)
    entropy = torch.full((B, T), math.nan)
    got = run(name, data, entropy=entropy)
    assert torch.equal(got[0], loss) and torch.equal(got[1], gradient)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_of_which_nothing_is_a_number(name):
    objective = deterministic(name)
    data = complete(objective, batch())
    data["logprobs"] = torch.full_like(data["logprobs"], math.nan)
    loss, gradient, metrics = run(objective, data, ref_logprobs=data["old_logprobs"], kl_coef=0.1)
    assert loss == 0 and (gradient == 0).all() and metrics["nonfinite_fraction"] == 1


EXTREMES = (0.0, -1e-30, -1.0, -39.0, -41.0, -88.0, -104.0, -200.0, -745.0, -6e4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_any_log_probs_give_a_finite_loss_and_gradient(name, dtype):
    """All pairs of extremes, with a KL term. In float16 a gradient over 65504 is inf, which its scaler must see."""
    objective = deterministic(name)
    lowest = [x for x in (-1e8, -1e9, -3e38) if abs(x) < torch.finfo(dtype).max]
    ends = torch.tensor([*EXTREMES, *lowest], dtype=torch.float64)
    new, old = (
        x.reshape(-1, 4).to(dtype) for x in torch.cartesian_prod(ends, ends)[: len(ends) ** 2 // 4 * 4].unbind(1)
    )
    g = torch.Generator().manual_seed(0)
    data = {
        "logprobs": new, "old_logprobs": old, "mask": torch.ones(new.shape, dtype=torch.bool),
        "advantages": torch.randn(len(new), generator=g).to(dtype),
    }  # fmt: skip
    data = complete(objective, data)
    if "rollout_logprobs" in data:
        data["rollout_logprobs"] = old
    loss, gradient, metrics = run(objective, data, ref_logprobs=old.flip(0), kl_coef=0.1)
    assert loss.isfinite() and metrics["kl/ref"].isfinite()
    assert not gradient.isnan().any()
    assert dtype == torch.float16 or gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_kl_term_is_held(dtype):
    """ref -1, new -200, kl_coef 0.1: the loss was inf and the gradient -inf."""
    for new, ref, value in ((-200.0, -1.0, math.exp(40) - 41), (-1.0, -200.0, math.exp(-40) + 39)):
        x = torch.tensor([[new]], dtype=dtype, requires_grad=True)
        loss, metrics = policy_loss(
            logprobs=x, old_logprobs=x.detach(), advantages=torch.zeros(1), mask=torch.ones(1, 1),
            ref_logprobs=torch.tensor([[ref]], dtype=dtype), kl_coef=0.1,
        )  # fmt: skip
        loss.backward()
        assert loss.item() == pytest.approx(0.1 * value, rel=1e-6)
        assert metrics["kl/ref"].item() == pytest.approx(value, rel=1e-6)
        assert x.grad.item() == 0
    inside = torch.tensor([39.0, -39.0, 0.5], dtype=torch.float64, requires_grad=True)
    approx_kl(inside).sum().backward()
    np.testing.assert_allclose(inside.grad.numpy(), np.expm1(inside.detach().numpy()), rtol=1e-12)


def test_ratios_are_held_on_both_sides():
    x = torch.tensor([-1e30, -41.0, -39.0, 39.0, 41.0, 1e30], dtype=torch.float64, requires_grad=True)
    ratio(x).sum().backward()
    assert hold(x).tolist() == [-40, -40, -39, 39, 40, 40]
    assert (x.grad != 0).tolist() == [False, False, True, True, False, False]


def test_a_statistic_of_a_sequence_leaves_out_what_is_no_number():
    x = torch.tensor([[0.1, math.nan, 0.3, 9.0], [math.inf, -math.inf, math.nan, 0.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]])
    assert sequence_log_ratio(x, mask).flatten().tolist() == pytest.approx([0.2, 0.0])


@pytest.mark.parametrize("bounds", [Clip(0.2), Band(KL, 0.05)], ids=repr)
def test_the_lowest_number_of_a_dtype_is_impossible_and_not_a_number(bounds):
    data = batch(dtype=torch.float32)
    want = run(
        Objective(bounds=bounds), {**data, "logprobs": data["logprobs"].index_fill(1, torch.tensor(1), math.nan)}
    )
    for lowest in (torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min):
        got = run(
            Objective(bounds=bounds), {**data, "logprobs": data["logprobs"].index_fill(1, torch.tensor(1), lowest)}
        )
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_gradient_flows_into_log_probs_alone():
    data = complete("tis", batch())
    leaves = {k: v.clone().requires_grad_() for k, v in data.items() if k != "mask"}
    ref, weight = data["old_logprobs"].clone().requires_grad_(), torch.ones(B, dtype=torch.float64, requires_grad=True)
    loss, _ = policy_loss(
        **leaves, mask=data["mask"], objective="tis", ref_logprobs=ref, kl_coef=0.1, sample_weight=weight,
        max_length=max_length("seq-mean-token-mean"),
    )  # fmt: skip
    loss.backward()
    assert leaves["logprobs"].grad is not None
    assert all(
        x.grad is None for x in (leaves["old_logprobs"], leaves["advantages"], leaves["rollout_logprobs"], ref, weight)
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_advantages_that_are_no_floats_are_refused(dtype):
    data = batch()
    with pytest.raises(TypeError, match=r"advantages must have a float dtype.*\.float\(\)"):
        run("grpo", {**data, "advantages": torch.ones(B, dtype=dtype)})


@pytest.mark.parametrize("name", ["grpo", "gspo", "bandpo-kl"])
def test_left_out_tokens_compile_to_one_graph(name):
    data, _ = spoiled(name, "logprobs", math.nan, torch.float32)

    def step(x):
        return policy_loss(**{**data, "logprobs": x}, objective=name)[0]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(data["logprobs"]), step(data["logprobs"]))


@pytest.mark.parametrize("name", ["grpo", "gspo", "quatro-reading"])
def test_weights_and_normalizers_compile_to_one_graph(name):
    data = complete(name, batch(dtype=torch.float32))

    def step(x, weight, normalizer):
        return policy_loss(
            **{**data, "logprobs": x}, objective=name, sample_weight=weight, normalizer=normalizer,
            ref_logprobs=data["old_logprobs"], kl_coef=0.1,
        )[0]  # fmt: skip

    torch._dynamo.reset()
    arguments = data["logprobs"], torch.linspace(0.5, 1.5, B), torch.tensor(7)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), step(*arguments))


def test_the_clip_alone_still_shows_a_nan():
    """A surrogate that is called by itself computes with what it is given."""
    edge = Clip(0.2)(torch.zeros(1))
    assert clip(torch.tensor([math.nan]), torch.ones(1), edge).isnan().all()
