"""The realised divergence of tokens whose probability rounds to 1, against its definition in many digits (tests/oracle.py)."""

import itertools
import math

import mpmath as mp
import pytest
import torch

import oracle
from bandpo import KL, Band, alpha, policy_loss
from bandpo.divergences import DIVERGENCES, divergence_of_two, measured_divergence
from bandpo.losses import compiled
from bandpo.metrics import policy_sums
from bandpo.objective import Objective
from bandpo.terms import token_objective

ALL = [*DIVERGENCES.values(), *(alpha(a) for a in (3.0, 1.5, 0.5, 1e-9, -1.5))]
NAMED = pytest.mark.parametrize("divergence", ALL, ids=lambda d: d.name)
EPSILON = {torch.float32: 2.0**-25, torch.float64: 2.0**-54}
SURE = (0.0, -1e-42, -1e-12, -(2.0**-26), -(2.0**-25), -(2.0**-24), -3e-7, -1e-5)
"""Log-probs of tokens that are certain or nearly so; the second is a subnormal float32 number."""
OTHERS = (*SURE, -0.1, -3.0)


def exact(divergence, x, logp, epsilon):
    """The divergence after min(p, 1 - ε) and min(q, 1 - ε), of the very numbers that are given."""
    with mp.workdps(80):
        surest = mp.log1p(-mp.mpf(epsilon))
        p, q = min(mp.mpf(logp), surest), min(mp.mpf(logp) + mp.mpf(x), surest)
        return float(oracle.divergence(divergence.name, p, q - p))


def pairs(dtype):
    """Log-ratios and log-probs before the update, of pairs with a token that is nearly certain."""
    old, new = zip(*(pair for pair in itertools.product(OTHERS, OTHERS) if max(pair) > -0.05), strict=True)
    old, new = torch.tensor(old, dtype=dtype), torch.tensor(new, dtype=dtype)
    return new - old, old


@NAMED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_certain_token_has_the_divergence_of_what_the_dtype_can_tell(divergence, dtype):
    x, old = pairs(dtype)
    found = measured_divergence(x, old, divergence)
    assert found.dtype == dtype and found.isfinite().all()
    want = [exact(divergence, a, b, EPSILON[dtype]) for a, b in zip(x.tolist(), old.tolist(), strict=True)]
    # After a large step up, 1 - q comes from 1 - (r-1)/odds, whose last digit is 2^-24 (2^-53): most of it where q is near 1.
    known = (x + old < -(2.0**12) * EPSILON[dtype]) | (x < 0.05)
    assert 0.7 < known.double().mean() < 1
    tight = 2e-3 if dtype == torch.float32 else 1e-4
    for which, tolerance in ((known, tight), (~known, 0.3)):
        expected = torch.tensor(want, dtype=torch.float64)[which]
        torch.testing.assert_close(found[which].double(), expected, rtol=tolerance, atol=EPSILON[dtype] ** 2)


@NAMED
def test_the_divergence_of_the_numbers_themselves_is_never_exceeded(divergence):
    x, old = pairs(torch.float32)
    found = measured_divergence(x, old, divergence).double()
    for value, a, b in zip(found.tolist(), x.tolist(), old.tolist(), strict=True):
        with mp.workdps(80):
            whole = oracle.divergence(divergence.name, mp.mpf(b), mp.mpf(a)) if a + b < 0 and b < 0 else mp.inf
        rounding = 1.01 if a < 0.05 or a + b < -(2.0**-13) else 1.3
        assert value <= float(whole) * rounding + 1e-14, (a, b)


@NAMED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_tokens_have_the_same_bits_as_the_definition(divergence, dtype):
    draw, uncertain = torch.Generator().manual_seed(5), math.log1p(-4 * EPSILON[dtype])
    old = -(10 ** (torch.rand(20000, generator=draw, dtype=dtype) * 7 - 5.5))
    new = (old + torch.randn(20000, generator=draw, dtype=dtype)).clamp_max(-(2**10) * EPSILON[dtype])
    old[:2000] = uncertain  # nearly certain on both sides
    new[:2000] = old[:2000] * (1 + torch.rand(2000, generator=draw, dtype=dtype))
    x = (new - old).clamp(-30, 40)
    want = divergence_of_two(torch.minimum(x, -old), old, divergence)
    usual = want < 1e20  # an alpha of a high order leaves float32
    assert usual.double().mean() > 0.95
    assert torch.equal(measured_divergence(x, old, divergence)[usual], want[usual])


@NAMED
def test_what_did_not_move_has_no_divergence(divergence):
    for dtype in EPSILON:
        old = torch.tensor(OTHERS, dtype=dtype)
        assert (measured_divergence(torch.zeros_like(old), old, divergence) == 0).all()
        below = torch.tensor([0.0, -EPSILON[dtype] / 4], dtype=dtype)  # nothing tells these apart
        assert (measured_divergence(below.flip(0) - below, below, divergence) == 0).all()


EXTREMES = (*OTHERS, -39.0, -100.0, -1e4, -1e30)


@NAMED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("level", ["token", "sequence", "product"])
def test_the_metrics_are_finite_for_all_finite_logprobs(divergence, dtype, level):
    old, new = (x.to(dtype) for x in torch.tensor(list(itertools.product(EXTREMES, EXTREMES))).double().t())
    shape = (-1, 2) if level != "token" else (-1, 1)
    old, new = old.view(shape), new.view(shape)
    objective = Objective(bounds=Band(divergence, 0.05, max_ratio=None), ratio_level=level)
    _, metrics = policy_loss(
        logprobs=new.requires_grad_(), old_logprobs=old, advantages=torch.ones(len(old)), mask=torch.ones(old.shape),
        objective=objective, metrics="full",
    )  # fmt: skip
    assert metrics["band/divergence_mean"].isfinite() and metrics["band/divergence_max"].isfinite()
    assert metrics["band/divergence_max"] >= metrics["band/divergence_mean"] > 0


def saturated():
    x, old = pairs(torch.float32)
    return {
        "logprobs": (x + old).clamp_max(0).view(-1, 2).requires_grad_(), "old_logprobs": old.view(-1, 2),
        "advantages": torch.ones(len(x) // 2), "mask": torch.ones(len(x) // 2, 2, dtype=torch.bool),
    }  # fmt: skip


NAMES = ("band/divergence_mean", "band/divergence_max")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_the_numbers_are_the_same(backend):
    given = saturated()
    objective = Objective(bounds=Band(KL, 0.05))
    plain = policy_loss(objective=objective, metrics="full", **given)[1]
    fast = compiled(backend=backend)(objective=objective, metrics="full", **given)[1]
    for name in NAMES:
        assert plain[name].isfinite() and fast[name] == plain[name]


def test_in_parts_the_numbers_are_those_of_the_whole():
    given = saturated()
    objective = Objective(bounds=Band(KL, 0.05))

    def sums(rows):
        return policy_sums(token_objective(objective, **{name: x[rows] for name, x in given.items()}))

    whole, parts = sums(slice(None)), [sums(slice(0, 5)), sums(slice(5, None))]
    mean = sum(part[NAMES[0]].numerator for part in parts) / sum(part[NAMES[0]].denominator for part in parts)
    assert whole[NAMES[0]].value() == pytest.approx(mean.item(), rel=1e-6)
    assert whole[NAMES[1]].numerator == max(part[NAMES[1]].numerator for part in parts)


def test_on_another_device_nothing_waits():
    x = torch.empty(3, 4, device="meta")
    assert measured_divergence(x, x, KL).device.type == "meta"


def test_nan_stays_nan():
    nan, some = torch.tensor([math.nan]), torch.tensor([-0.5])
    for x, old in ((nan, some), (some, nan)):
        assert measured_divergence(x, old, KL).isnan().all()
