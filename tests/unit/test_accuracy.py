"""The promise of accuracy over its whole domain, by the divergence at the bounds in hundreds of digits (tests/oracle.py)."""

import math
import random
from itertools import product

import mpmath as mp
import pytest
import torch

import oracle
from bandpo import HELLINGER, JEFFREYS, KL, REVERSE_KL, Band, alpha, in_band, ratio_bounds
from bandpo.divergences import DIVERGENCES

ALL = [*DIVERGENCES.values(), *(alpha(a) for a in (3.0, 2.0, 1.5, 1.001, 0.999999, 0.5, 0.3, 1e-9, -1.0, -1.5, -20.0))]
NAMED = pytest.mark.parametrize("divergence", ALL, ids=lambda d: d.name)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
PROMISE = 1e-12
# A steep f at a radius far from any use is solved for, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:The bounds of ALPHA.-20. at")
LARGEST = 1.7976931348623157e308
SMALLEST_FLOAT32 = 2.0**-126


def in_range(divergence, logp, radius):
    """A generator that grows like u^α, or u^-α, leaves float64 where its argument is beyond e^(700/α)."""
    order = float(divergence.name[6:-1]) if divergence.name.startswith("ALPHA") else 1.0
    size = max(abs(logp), -math.log(-logp)) if order > 0 else abs(logp) + max(0.0, math.log(radius))
    return size * max(1.0, abs(order)) < 690


def points(seed, count, least=1e-300):
    """log p from rare to certain, radii from moderate to extreme."""
    draw = random.Random(seed)
    for _ in range(count):
        kind = draw.random()
        if kind < 0.4:
            logp = -(10 ** draw.uniform(-30, 2.84))
        elif kind < 0.6:
            logp = -(10 ** draw.uniform(math.log10(least), 0))
        else:
            logp = -draw.uniform(1e-3, 60)
        yield logp, 10 ** (draw.uniform(-12, 6) if draw.random() < 0.5 else draw.uniform(-290, 290))


@NAMED
def test_float64_log_bounds_hold_their_promise_everywhere(divergence):
    checked = 0
    for logp, radius in points(divergence.name, 60):
        if not in_range(divergence, logp, radius):
            continue
        bounds = ratio_bounds(torch.tensor(logp, dtype=torch.float64), divergence, radius, log=True)
        for bound in bounds:
            assert oracle.is_log_bound(divergence.name, logp, radius, bound.item(), PROMISE), (logp, radius, bounds)
            checked += 1
    assert checked > 50


@NAMED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_log_bounds_are_rounded_once_and_inward(divergence, dtype):
    for logp, radius in points(divergence.name, 25, least=SMALLEST_FLOAT32):
        given = torch.tensor(logp).to(dtype)
        if given == 0 or not given.isfinite() or not in_range(divergence, given.item(), radius):
            continue
        narrow = ratio_bounds(given, divergence, radius, log=True)
        wide = ratio_bounds(given.double(), divergence, radius, log=True)
        for a, b, towards in zip(narrow, wide, (-math.inf, math.inf), strict=True):
            assert a.double().abs() <= b.abs()
            further = a.nextafter(torch.tensor(towards, dtype=dtype)).double()
            assert further.abs() > b.abs() or a.double() == b


@NAMED
def test_float32_table_is_inward_and_within_four_units_of_the_truth(divergence):
    logps = [max(logp, -88.0) for logp, _ in points(divergence.name + "32", 12, least=SMALLEST_FLOAT32)]
    # few radii: each makes a table
    for logp, radius in product(torch.tensor(logps), (1e-12, 10 ** random.Random(divergence.name).uniform(-9, 4))):
        given, logp = logp, logp.item()
        if not in_range(divergence, logp, radius):
            continue
        lower, upper = (b.item() for b in ratio_bounds(given, divergence, radius))
        with mp.workdps(100):
            delta, at = mp.mpf(radius), lambda r, x=logp: oracle.divergence(divergence.name, x, mp.log(r))
            # the float64 bounds beneath are promised within 1e-12
            assert at(min(mp.mpf(lower) + mp.mpf(PROMISE), 1)) <= delta * (1 + PROMISE), (logp, radius, lower)
            assert at(max(mp.mpf(upper) * (1 - mp.mpf(PROMISE)), 1)) <= delta * (1 + PROMISE), (logp, radius, upper)
            further = mp.mpf(lower) - 4 * mp.mpf(2) ** -24
            assert further <= 0 or at(further) >= delta * (1 - PROMISE), (logp, radius, lower)
            further = mp.mpf(upper) * (1 + 4 * mp.mpf(2) ** -23)
            assert mp.log(further) >= -logp or at(further) >= delta * (1 - PROMISE), (logp, radius, upper)


@NAMED
@DTYPES
@pytest.mark.parametrize("log", [False, True])
def test_every_large_radius_saturates(divergence, dtype, log):
    logp = torch.tensor([0.9, 0.5, 0.01]).log().to(dtype)
    p = logp.double()
    tensors = [torch.tensor(r, dtype=torch.float64) for r in (200.0, 1000.0, 1e6, 1e100, 1e200, 1e300, LARGEST)]
    for given in (200.0, (1e6, LARGEST), *tensors):
        radius = given[1] if isinstance(given, tuple) else float(given)
        lower, upper = (b.double() for b in ratio_bounds(logp, divergence, given, log=log))
        edge = -p if log else (-p).exp()
        assert (upper <= edge * (1 + 1e-15)).all()
        assert (lower <= (0 if log else 1)).all()
        assert not (lower.isnan() | upper.isnan()).any()
        # Enough to give the token everything. Where f(u) is of the order of u^α near 0, α < 0, that takes longest.
        order = {"NEYMAN": -1.0}.get(divergence.name, float(divergence.name[6:-1] if "(" in divergence.name else 1))
        if radius >= (1e6 if order > 0 else 10 ** (30 * -order) if order > -10 else math.inf) or divergence in (
            KL,
            HELLINGER,
        ):
            assert (upper >= edge * (1 - 4 * torch.finfo(dtype).eps)).all(), (radius, upper)


@NAMED
@DTYPES
def test_the_smallest_radii_leave_hardly_any_room(divergence, dtype):
    logp = torch.tensor([0.9, 0.5, 0.01]).log().to(dtype)
    tensors = [torch.tensor(r, dtype=torch.float64) for r in (5e-324, 1e-310, 1e-300, 1e-290, 1e-200)]
    for radius, log in [(1e-200, False), *product(tensors, (False, True))]:
        for bound in ratio_bounds(logp, divergence, radius, log=log):
            assert (bound - (0 if log else 1)).abs().max() <= 1e-98


def test_almost_certain_tokens_in_float32():
    # δ = 0.3 moves a probability of 1 - 1e-30 by the s with s log(s/1e-30)·(1 + o(1)) = 0.3, worked out by mpmath
    logp = torch.tensor([-1e-30, -3e-38])
    lower = ratio_bounds(logp, JEFFREYS, 0.3).lower
    for got, x in zip(lower.tolist(), logp.tolist(), strict=True):
        assert got == pytest.approx(float(mp.exp(oracle.log_bounds("JEFFREYS", x, 0.3)[0])), abs=4 * 2**-24)
    assert lower[0] == pytest.approx(0.9953, abs=5e-5)
    assert ratio_bounds(torch.tensor([-1e-39]), JEFFREYS, 0.3).lower == 1  # below 2^-126 a token counts as certain


def test_log_bounds_at_tiny_radii_and_next_to_certainty():
    for divergence, logp, radius in (
        (KL, -0.7, 1e-12), (REVERSE_KL, -0.7, 1e-12), (DIVERGENCES["js"], -0.7, 1e-12), (HELLINGER, -0.7, 1e-12),
        (alpha(1.5), -3.0, 1e-12), (alpha(0.3), -3.0, 1e-12), (HELLINGER, -3.5e-8, 1e-3), (HELLINGER, -3.5e-8, 0.05),
    ):  # fmt: skip
        bounds = ratio_bounds(torch.tensor(logp, dtype=torch.float64), divergence, radius, log=True)
        for got, true in zip(bounds, oracle.log_bounds(divergence.name, logp, radius), strict=True):
            assert abs(got.item() / true - 1) <= 1e-12, (divergence.name, logp, radius)


def test_what_float64_cannot_hold_is_the_narrower_neighbour():
    for divergence in ALL:
        certain, nearly, rare, rarer = (
            ratio_bounds(torch.tensor(x, dtype=torch.float64), divergence, 0.05, log=True)
            for x in (0.0, -1e-310, -700.0, -5000.0)
        )
        assert nearly.lower == certain.lower
        assert rarer.lower == rare.lower
        assert rarer.upper == rare.upper  # less than what p = e^-5000 would allow
        lower, upper = ratio_bounds(torch.tensor(-math.inf, dtype=torch.float64), divergence, 0.05)
        assert (lower, upper) == (0, math.inf)


def test_large_radii_in_band_and_capped():
    logp, x = torch.tensor([-0.7, -5.0]), torch.tensor([0.5, -30.0])
    for radius in (200.0, 1e200, LARGEST):
        assert Band(KL, radius)(logp).upper.tolist() == pytest.approx([math.exp(0.7), 10.0])
        for dtype in (torch.float32, torch.float64):
            assert in_band(x.to(dtype), logp.to(dtype), KL, radius).all()


def test_kl_has_converged_on_a_dense_grid():
    logp, radius = -torch.logspace(-12, 2.5, 300, dtype=torch.float64), torch.logspace(-8, 3, 200, dtype=torch.float64)
    logp, radius = (x.expand(200, 300) for x in (logp, radius.unsqueeze(1)))
    lower, upper = ratio_bounds(logp, KL, radius, log=True)
    # the equation of each side, y p - (1-p) log(1 + p/(1-p) (1 - e^-y)) = δ, in the place where float64 can check it
    p, rest, fall = logp.exp(), -logp.expm1(), -lower
    residual = p * fall - rest * (p / rest * -(-fall).expm1()).log1p() - radius
    assert (residual.abs() <= 1e-12 * radius + 4e-16 * p * fall).all()
    # and the divergence a little inside and a little outside of the upper bound
    free = upper >= -logp * (1 - 1e-12)
    for factor, inside in ((1 - 1e-11, True), (1 + 1e-11, False)):
        found = in_band(upper * factor, logp, KL, radius)
        sharp = ~free & (radius > 1e-3)  # below, `in_band` itself is no sharper than this
        assert (found == inside)[sharp].all()
