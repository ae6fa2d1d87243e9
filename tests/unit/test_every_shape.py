"""Every named objective on every shape of input, in value and gradient, against numpy in float64 and closed-form weights.

Groups of 4, 2 and 3 completions in mixed order, with advantages of each sequence or each token, and masks that are dense, have
holes as tool calls leave them, one token, or none in a row. Objectives that look at the whole batch are held to invariances,
and to their definitions in `test_zoo.py`.
"""

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch

from bandpo import OBJECTIVES, Objective, policy_loss, token_objective
from bandpo.surrogates import (
    clip,
    detach,
    dual_clip,
    kl_penalty,
    log_quadratic,
    mask,
    quadratic,
    quadratic_tv,
    soft,
    soft_edge,
    two_sided,
)  # fmt: skip
from batches import deterministic, max_length, run
from unit.test_zoo import OF_THE_BATCH, WEIGHTS

IDS = [7, 7, 3, 9, 7, 3, 9, 9, 7]  # groups of 4, 2 and 3
B, T, K = len(IDS), 6, 3
SHAPES = ("(B,)", "(B, 1)", "(B, T)")
MASKS = ("dense", "mixed", "one token")
# Rounding of the input is no error, since the reference is given what was rounded. A float32 number is off by 6e-8, and a ratio
# by that times its log-probs; a gradient in bfloat16 is rounded to 8 bits.
TOLERANCES = {torch.float64: (1e-10, 1e-10), torch.float32: (2e-5, 2e-5), torch.bfloat16: (2e-5, 2**-8)}


def mask_of(kind):
    valid = torch.ones(B, T, dtype=torch.bool)
    if kind == "mixed":
        valid[1, [0, 3]] = valid[4, 2:5] = valid[5, [1, 5]] = valid[8, ::2] = False  # tool calls
        valid[2, 1:] = valid[6, :-1] = False  # one token, at the start or at the end
        valid[3] = valid[7] = False
    if kind == "one token":
        valid = torch.zeros(B, T, dtype=torch.bool)
        valid[torch.arange(B), torch.arange(B) % T] = True
    return valid


def inputs(objective, *, shape="(B,)", masked="mixed", dtype=torch.float64, seed=0):
    """A batch with all that the objective asks for; ratios near 1 for ratios of a sequence, far from it for tokens."""
    g = torch.Generator().manual_seed(seed)
    spread = 0.6 if objective.ratio_level == "token" and objective.surrogate_inputs != ("mask",) else 0.2
    spread = 2e-3 if objective.ratio_level == "sequence" else spread
    old = -3 * torch.rand(B, T, generator=g, dtype=torch.float64) - 0.05
    new = torch.minimum(old + spread * torch.randn(B, T, generator=g, dtype=torch.float64), torch.tensor(-0.01))
    a = torch.randn(B, T, generator=g, dtype=torch.float64)
    a[4], a[:, 2] = 0, 0  # a group without signal, and tokens without advantage
    a = {"(B,)": a[:, 0], "(B, 1)": a[:, :1], "(B, T)": a}[shape]
    data = {"logprobs": new, "old_logprobs": old, "advantages": a}
    if objective.anchor == "rollout":
        data["rollout_logprobs"] = old
    elif objective.correction is not None:
        data["rollout_logprobs"] = old + 0.9 * torch.randn(B, T, generator=g, dtype=torch.float64)
    rewards = torch.rand(B, generator=g, dtype=torch.float64)
    column = a if shape == "(B,)" else a[:, 0]
    extras = objective.group_inputs(rewards, column, group_ids=IDS)
    if "topk_logprobs" in objective.extras:
        logits = torch.randn(2, B, T, K, generator=g, dtype=torch.float64)
        shares = (logits[0].softmax(-1), (logits[0] + 0.8 * logits[1]).softmax(-1))
        kept = [0.9 * s * -torch.expm1(x).unsqueeze(-1) for s, x in zip(shares, (old, new), strict=True)]
        extras |= {
            "old_topk_logprobs": kept[0].log(), "topk_logprobs": kept[1].log(),
            "sampled_in_topk": torch.zeros(B, T, dtype=torch.bool),
        }  # fmt: skip
    data = {k: v.to(dtype) for k, v in data.items()} | {"mask": mask_of(masked)}
    extras = {k: v.to(dtype) if v.is_floating_point() else v for k, v in extras.items()}
    return {**data, "extras": extras} if extras else data


def in_numpy(data):
    """All numbers in float64, advantages and extras of a sequence repeated for its tokens."""
    valid = data["mask"].numpy()
    new, old = (data[k].double().numpy() for k in ("logprobs", "old_logprobs"))
    a = np.broadcast_to(data["advantages"].double().reshape(B, -1).numpy(), (B, T))
    extras = {k: v.double().numpy() for k, v in data.get("extras", {}).items()}
    return valid, new, old, a, {k: np.repeat(v[:, None], T, 1) if v.ndim == 1 else v for k, v in extras.items()}


def coefficients(valid, aggregation):
    lengths, rows = np.maximum(valid.sum(1, keepdims=True), 1), max(valid.any(1).sum(), 1)
    return valid * {
        "token-mean": 1 / max(valid.sum(), 1), "seq-mean-token-sum": 1 / rows,
        "seq-mean-token-mean": 1 / lengths / rows, "seq-mean-token-sum-norm": 1 / rows / 12,
    }[aggregation]  # fmt: skip


# ---- values of the surrogates of single tokens, from r, p, A, log π and the interval


def pessimistic(r, a, low, high):
    return np.minimum(r * a, np.clip(r, low, high) * a)


def past(r, a, low, high):
    return ((a > 0) & (r > high)) | ((a < 0) & (r < low))


def soft_value(r, a, low, high):
    edge = np.where(a > 0, high, low)
    with np.errstate(divide="ignore", invalid="ignore"):
        over = edge * (1 + 0.25 * np.tanh((r / edge - 1) / 0.25))
    return np.where(past(r, a, low, high), over, r) * a


def quadratic_value(r, a, low, high):
    return r * a - np.abs(a) * (r - 1) ** 2 / (2 * np.where(a > 0, high - 1, 1 - low))


def tau(a):
    return np.where(a > 0, 1.0, 1.05)


VALUES = {
    clip: lambda r, p, a, x, low, high: pessimistic(r, a, low, high),
    dual_clip: lambda r, p, a, x, low, high: np.where(
        a < 0, np.maximum(pessimistic(r, a, low, high), 3 * a), pessimistic(r, a, low, high)
    ),
    two_sided: lambda r, p, a, x, low, high: np.clip(r, low, high) * a,
    mask: lambda r, p, a, x, low, high: r * a * ~past(r, a, low, high),
    soft_edge: lambda r, p, a, x, low, high: soft_value(r, a, low, high),
    detach: lambda r, p, a, x, low, high: np.clip(r, low, high) * a * x,
    soft: lambda r, p, a, x, low, high: 4 / tau(a) / (1 + np.exp(-tau(a) * (r - 1))) * a,
    quadratic: lambda r, p, a, x, low, high: quadratic_value(r, a, low, high),
    quadratic_tv: lambda r, p, a, x, low, high: r * a - np.abs(a) * p * (r - 1) ** 2 / 25,
    kl_penalty: lambda r, p, a, x, low, high: r * a - (r - 1 - np.log(r)),
    log_quadratic: lambda r, p, a, x, low, high: a * x - 0.025 * np.log(r) ** 2,
}


def surrogate_of(objective):
    return objective.surrogate.func if isinstance(objective.surrogate, partial) else objective.surrogate


def of_tokens(name, data):
    """Value and gradient of each token from the weight w(r, p, A); the interval is that of tokens in a single column."""
    objective = OBJECTIVES[name]
    _, new, old, a, extras = in_numpy(data)
    r, p = np.exp(new - old), np.exp(old)
    flat = {k: v.reshape(B * T, 1, K) if v.ndim == 3 else v.reshape(-1) for k, v in extras.items()}
    more = {"extras": flat}
    weights = np.ones((B, T))
    if objective.correction is not None:
        mismatch = old - data["rollout_logprobs"].double().numpy()
        more["mismatch"] = mismatch.ravel()
        weights = np.exp(mismatch)
        weights = np.minimum(weights, 2) if name == "tis" else weights * (weights >= 0.5) * (weights <= 5)
    a_safe = np.where(a == 0, 1.0, a)  # some weights divide by A
    w = WEIGHTS[name](r.ravel(), p.ravel(), a_safe.ravel(), **more).reshape(B, T)
    gradient = a * r * w
    if "without_advantage" in objective.traits:  # A·r·w is a finite limit there
        tiny = np.where(a == 0, 1e-200, a)
        gradient = tiny * r * WEIGHTS[name](r.ravel(), p.ravel(), tiny.ravel(), **more).reshape(B, T)
    value = value_of_tokens(objective, data, (new, old, a, flat))
    return None if value is None else value * weights, gradient


def value_of_tokens(objective, data, arrays):
    new, old, a, flat = arrays
    value = VALUES.get(surrogate_of(objective))
    if (
        value is None or "topk_logprobs" in objective.extras
    ):  # compared by `test_a_token_is_the_same_in_a_batch_and_alone`
        return None
    given = {k: torch.from_numpy(v.reshape(-1, 1).copy()) for k, v in (flat | {"advantages": a}).items()}
    column = torch.from_numpy(old.reshape(-1, 1).copy())
    bounds = objective.bounds(column, **{k: given[k] for k in objective.bounds_inputs})
    low, high = (np.broadcast_to(x.double().numpy(), (B * T, 1)).reshape(B, T) for x in bounds)
    return value(np.exp(new - old), np.exp(old), a, new, low, high)


# ---- sequences, row by row


def row_of_gspo(low, high):
    def row(x, new, a, extras):
        s = np.exp(x.mean())
        return pessimistic(s, a, low, high), s * a * ~past(s, a, low, high)

    return row


def row_of_gmpo(x, new, a, extras):
    held = np.clip(x, -0.4, 0.4)
    held = np.where(a < 0, np.maximum(x, held), np.minimum(x, held))
    mean = np.exp(held.mean())
    stopped = ((a > 0) & (x > 0.4)) | ((a < 0) & (x < -0.4))
    return mean * a, mean * a * ~stopped


def row_of_topr(x, new, a, extras):
    weight = np.where(a < 0, min(np.exp(x.sum()), 1), 1)
    return weight * a * new, weight * a


def row_of_quatro(x, new, a, extras):
    rho, b, dual = np.exp(x.sum()), extras["baseline"], extras["dual"]
    value = rho * (a - b) - dual * (rho * np.log(rho) - rho + 1)
    return value, len(x) * rho * (a - b - dual * np.log(rho))  # each score weighs the whole product


def row_of_vespo(x, new, a, extras):
    k, rate, w = np.where(a < 0, 3, 2), np.where(a < 0, 2, 3), np.exp(x.sum())
    phi = w**k * np.exp(rate * (1 - w))
    return phi * a * new, phi * a


def row_of_pmd(x, new, a, extras):
    whole = x.sum()
    return a * x - 0.005 * whole * x, a - 0.01 * whole


def row_of_fipo(x, new, a, extras, places):
    drift = np.where(x > math.log(10), 0, x)
    weight = np.array(
        [sum(2 ** (-(u - t) / 32) * d for u, d in zip(places, drift, strict=True) if u >= t) for t in places]
    )
    weight = np.clip(np.exp(weight), 1, 1.2)
    r = np.exp(x)
    return weight * pessimistic(r, a, 0.8, 1.28), weight * a * r * ~past(r, a, 0.8, 1.28)


ROWS = {
    "gspo": row_of_gspo(1 - 3e-4, 1 + 4e-4), "luspo": row_of_gspo(1 - 2e-3, 1 + 2.5e-3), "gmpo": row_of_gmpo,
    "topr": row_of_topr, "quatro-reading": row_of_quatro, "vespo": row_of_vespo, "pmd-mean": row_of_pmd,
    "fipo": row_of_fipo,
}  # fmt: skip


def of_rows(name, data):
    valid, new, old, a, extras = in_numpy(data)
    value, gradient = np.zeros((B, T)), np.zeros((B, T))
    for i in range(B):
        at = np.flatnonzero(valid[i])
        if at.size:
            given = {"places": at} if name == "fipo" else {}
            own = {k: v[i, at] for k, v in extras.items()}
            value[i, at], gradient[i, at] = ROWS[name]((new - old)[i, at], new[i, at], a[i, at], own, **given)
    return value, gradient


REFERENCED = [n for n in OBJECTIVES if n not in OF_THE_BATCH and (n in WEIGHTS or n in ROWS)]


@pytest.mark.parametrize("name", REFERENCED)
def test_value_and_gradient_of_every_shape(name):
    objective = OBJECTIVES[name]
    cases = [(s, m, torch.float64) for s in SHAPES for m in MASKS]
    cases += [(s, "mixed", d) for s in SHAPES for d in (torch.float32, torch.bfloat16)]
    for shape, masked, dtype in cases:
        data = inputs(objective, shape=shape, masked=masked, dtype=dtype)
        loss, gradient, metrics = run(objective, data)
        value, slope = of_rows(name, data) if name in ROWS else of_tokens(name, data)
        c = coefficients(data["mask"].numpy(), objective.aggregation)
        of_loss, of_gradient = TOLERANCES[dtype]
        where = f"{shape}, {masked}, {dtype}"
        assert gradient.dtype == dtype and loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        want = -c * np.where(c > 0, slope, 0.0)
        scale = np.abs(want).max()
        np.testing.assert_allclose(
            gradient.double().numpy(), want, rtol=of_gradient, atol=of_loss * scale, err_msg=where
        )
        if value is not None:
            terms = np.where(c > 0, c * value, 0.0)
            assert loss.item() == pytest.approx(-terms.sum(), abs=of_loss * np.abs(terms).sum()), where
        assert metrics["nonfinite_fraction"] == 0


def test_every_objective_is_here():
    assert set(REFERENCED) | OF_THE_BATCH == set(OBJECTIVES)
    # troll takes the mask to leave positions out, and adds nothing up.
    assert {n for n, o in OBJECTIVES.items() if "mask" in o.surrogate_inputs or o.ratio_level != "token"} <= (
        set(ROWS) | OF_THE_BATCH | {"troll"}
    ), "what adds up a sequence has a weight for sequences of one token, and its rows here"


TOKENS = [n for n, o in OBJECTIVES.items() if n not in {*ROWS, *OF_THE_BATCH}]


@pytest.mark.parametrize("name", TOKENS)
def test_a_token_is_the_same_in_a_batch_and_alone(name):
    """For objectives of single tokens: each valid token as a sequence of its own, value and gradient."""
    objective = OBJECTIVES[name]
    for shape in SHAPES:
        data = inputs(objective, shape=shape)
        on = data["mask"]
        alone = {k: data[k][on].unsqueeze(1) for k in data if k not in ("advantages", "extras")}
        alone["advantages"] = data["advantages"].reshape(B, -1).expand(B, T)[on]
        if "extras" in data:
            alone["extras"] = {
                k: v.unsqueeze(1).expand(B, T)[on] if v.dim() == 1 else v[on].unsqueeze(1)
                for k, v in data["extras"].items()
            }
        for found, want in zip(each_token(objective, data), each_token(objective, alone), strict=True):
            torch.testing.assert_close(found[on], want[:, 0], rtol=1e-12, atol=1e-15)


def each_token(objective, data):
    x = data["logprobs"].clone().requires_grad_()
    value = token_objective(objective, **{**data, "logprobs": x}).value
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def both(objective, data):
    return run(objective, data)[:2]


def same(found, want, pick=slice(None)):
    assert found[0].item() == pytest.approx(want[0].item(), rel=1e-11, abs=1e-15)
    torch.testing.assert_close(found[1], want[1][pick], rtol=1e-11, atol=1e-15)


def by_rows(data, change):
    """A change of every tensor of the batch, extras included."""
    new = {k: change(v) for k, v in data.items() if k != "extras"}
    return {**new, "extras": {k: change(v) for k, v in data["extras"].items()}} if "extras" in data else new


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_in_another_order_and_rows_of_padding(name, shape):
    objective = deterministic(name)
    data = inputs(objective, shape=shape, seed=1)
    want = both(objective, data)
    order = torch.tensor([4, 0, 8, 2, 7, 1, 6, 3, 5])
    same(both(objective, by_rows(data, lambda x: x[order])), want, order)
    longer = by_rows(data, lambda x: torch.cat([x, x[:2]]))
    longer["mask"][B:] = False
    loss, gradient = both(objective, longer)
    same((loss, gradient[:B]), want)
    assert (gradient[B:] == 0).all()

    def wider(x):  # padding on the right
        return torch.cat([x, x[:, :2]], 1) if x.dim() > 1 and x.shape[1] == T else x

    data = by_rows(data, wider)
    data["mask"][:, T:] = False
    loss, gradient = both(objective, data)
    same((loss, gradient[:, :T]), want)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_masked_never_matters(name):
    objective = deterministic(name)
    for shape in SHAPES:
        data = inputs(objective, shape=shape)
        want, off = run(objective, data), ~data["mask"]
        for garbage in (math.nan, math.inf, -math.inf, 1e30):

            def spoil(x, garbage=garbage, off=off):
                if not x.is_floating_point() or x.shape[:2] != off.shape:
                    return x
                return x.masked_fill(off if x.dim() == 2 else off.unsqueeze(-1), garbage)

            found = run(objective, by_rows(data, spoil))
            assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1]), (shape, garbage)
            for key, value in want[2].items():
                assert torch.equal(found[2][key].nan_to_num(-7), value.nan_to_num(-7)), (shape, garbage, key)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_advantage_in_three_shapes(name, dtype):
    objective = deterministic(name)
    data = inputs(objective, dtype=dtype)
    loss, gradient = both(objective, data)
    column = {**data, "advantages": data["advantages"].unsqueeze(1)}
    found = both(objective, column)
    assert torch.equal(found[0], loss) and torch.equal(found[1], gradient)
    tokens = both(objective, {**column, "advantages": column["advantages"].expand(B, T)})
    of_loss, of_gradient = TOLERANCES[dtype]
    torch.testing.assert_close(tokens[0], loss, rtol=of_loss, atol=of_loss)
    scale = gradient.abs().max().item()
    torch.testing.assert_close(tokens[1], gradient, rtol=of_gradient, atol=of_loss * scale)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_without_a_valid_token(name):
    objective = deterministic(name)
    for shape in SHAPES:
        data = inputs(objective, shape=shape)
        data["mask"] = torch.zeros(B, T, dtype=torch.bool)
        loss, gradient, metrics = run(objective, data)
        assert loss == 0 and (gradient == 0).all() and metrics["nonfinite_fraction"].nan_to_num() == 0


@pytest.mark.parametrize("name", ["gspo", "luspo"])
def test_the_numbers_of_the_report(name):
    """old = new = [-1, -1], A = [2, -1]: the gradient is [-1, +0.5], and not that of mean(A) twice, [-0.25, -0.25]."""
    objective = dataclasses.replace(OBJECTIVES[name], aggregation="seq-mean-token-mean")
    for padded in (False, True):  # the same with a hole between the two tokens
        at = [0, 2] if padded else [0, 1]
        a, valid = torch.full((1, 3), math.nan), torch.zeros(1, 3, dtype=torch.bool)
        a[0, at], valid[0, at] = torch.tensor([2.0, -1.0]), True
        x = torch.full((1, 3), -1.0, requires_grad=True)
        loss, _ = policy_loss(
            logprobs=x, old_logprobs=x.detach(), advantages=a, mask=valid, objective=objective,
            max_length=max_length(objective.aggregation),
        )  # fmt: skip
        loss.backward()
        assert loss.item() == -0.5 and x.grad[0, at].tolist() == [-1.0, 0.5] and x.grad[~valid].tolist() == [0.0]


def test_a_sequence_s_ratio_has_no_tokens_to_add_up():
    for name in ("topr", "vespo", "fipo", "pmd-mean"):
        objective = dataclasses.replace(OBJECTIVES[name], ratio_level="product")
        data = inputs(OBJECTIVES[name])
        with pytest.raises(ValueError, match=r"has shape \(9, 1\) and the mask \(9, 6\).*ratio_level='token'"):
            run(objective, data)
    assert isinstance(objective, Objective)


@pytest.mark.parametrize("name", sorted({*ROWS, "m2po"} - {"gspo", "luspo", "quatro-reading"}))
def test_a_surrogate_by_itself_uses_its_mask(name):
    """Without `token_objective`, which sets what is masked to 0: other numbers there change no value of a used token."""
    objective = OBJECTIVES[name]
    data = inputs(objective, shape="(B, T)")
    on, x = data["mask"], data["logprobs"] - data["old_logprobs"]
    edges = objective.bounds(data["old_logprobs"])
    found = []
    for noise in (0.0, 3.0):
        given = {"logprobs": data["logprobs"], "mask": on}
        y = torch.where(on, x, noise)
        value = objective.surrogate(
            y, data["advantages"], edges, **{k: given[k] for k in objective.surrogate_inputs if k in given}
        )
        found.append(value[on])
    assert torch.equal(*found)
