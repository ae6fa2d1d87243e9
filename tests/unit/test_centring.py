"""An f that is given with a slope at 1, or without a value at 0, against the same divergence written out."""

import dataclasses
import math
import pickle

import mpmath
import pytest
import torch

from bandpo import CHI2, KL, NEYMAN, REVERSE_KL, TV, FDivergence, alpha, in_band, ratio_bounds
from bandpo.bounds.table import table_for
from bandpo.divergences import DIVERGENCES, binary_divergence
from bandpo.testing import check_divergence


def entropy(u):
    return u * u.log()  # NaN at 0


GIVEN = {  # f with a slope at 1: the built-in divergence, and the slope
    "u log u": (entropy, REVERSE_KL, 1.0),
    "xlogy": (lambda u: torch.xlogy(u, u), REVERSE_KL, 1.0),
    "-log u": (lambda u: -u.log(), KL, -1.0),
    "u² - 1": (lambda u: u * u - 1, CHI2, 2.0),
    "1/u - 1": (lambda u: 1 / u - 1, NEYMAN, -1.0),
    "tilted TV": (lambda u: 0.5 * (u - 1).abs() - 3 * (u - 1), TV, -3.0),
    "max(u - 1, 0)": (lambda u: (u - 1).clamp_min(0), TV, 0.0),  # 0 is a slope of it at 1: nothing is taken off
}
LOGPS = -torch.logspace(-9, 2, 500, dtype=torch.float64)


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("radius", [1e-6, 1e-3, 0.05, 0.4])
def test_bounds_are_those_of_the_divergence_without_the_slope(name, radius):
    f, built_in, slope = GIVEN[name]
    given = FDivergence(name, f)
    assert given.tilt == pytest.approx(slope, abs=1e-9)
    found = ratio_bounds(LOGPS, given, radius, log=True)
    want = ratio_bounds(LOGPS, built_in, radius, log=True)
    # f alone is exact to about 1e-16/δ, and the promise next to saturation is about δ (docs/theory.md)
    nearby = [ratio_bounds(LOGPS, built_in, radius * (1 + s * (2e-12 + 2e-16 / radius)), log=True) for s in (-1, 1)]
    for side in (0, 1):
        low, high = torch.minimum(nearby[0][side], nearby[1][side]), torch.maximum(nearby[0][side], nearby[1][side])
        slack = (2e-12 + 2e-16 / radius) * want[side].abs()
        slack = torch.where(slack.isfinite(), slack, 0.0)
        ok = (found[side] >= low - slack) & (found[side] <= high + slack)
        # f is evaluated at u = e^t, which float64 cannot hold below e^-745: such a ratio counts as 0
        assert (ok | ((want[side] < -700) & (found[side] <= -700))).all()


@pytest.mark.parametrize("name", [n for n in GIVEN if n != "max(u - 1, 0)"])
def test_it_gets_a_table_whose_bounds_are_inside_the_exact_ones(name):
    f, built_in, _ = GIVEN[name]
    given = FDivergence(name, f)
    assert table_for(given, 0.05, 0.05, torch.device("cpu")) is not None
    logp = LOGPS.float()
    lower, upper = ratio_bounds(logp, given, 0.05)
    want_lower, want_upper = ratio_bounds(logp.double(), built_in, 0.05)
    unit = 2.0**-24
    assert ((lower >= want_lower - 1e-13) & (lower <= want_lower + 4 * unit)).all()
    held = torch.isfinite(upper) & (want_upper < 1e38)
    assert ((upper <= want_upper * (1 + 1e-13)) & (upper >= want_upper * (1 - 8 * unit)))[held].all()


def test_the_bound_solves_the_equation_in_many_digits():
    """`p r log r + (1-p) s log s = δ` has no slope term: an oracle that never centres anything."""
    mpmath.mp.dps = 40
    given = FDivergence("u log u", entropy)
    for p in (1e-6, 0.03, 0.5, 0.97):
        logp = torch.tensor([p], dtype=torch.float64).log()
        for bound in ratio_bounds(logp, given, 0.05, log=True):
            x = mpmath.mpf(bound.item())
            if math.isinf(bound.item()) or bound.item() == -logp.item():
                continue
            q = mpmath.exp(mpmath.mpf(logp.item()))
            r = mpmath.exp(x)
            s = (1 - q * r) / (1 - q)
            spent = q * r * mpmath.log(r) + (1 - q) * s * mpmath.log(s)
            assert abs(spent - mpmath.mpf(0.05)) < 1e-13


def test_f_exp_and_the_slope_at_infinity_may_have_the_slope_too():
    """`p (e^t - 1 - t) + …` from `-log u` given as `-t`, whose slope at infinity is 0."""
    given = FDivergence("-log u", lambda u: -u.log(), f_exp=lambda t: -t, slope_at_infinity=0.0)
    assert given.recession == pytest.approx(1.0, abs=1e-9)
    check_divergence(given)
    for radius in (1e-8, 0.05):
        for found, want in zip(*(ratio_bounds(LOGPS, d, radius, log=True) for d in (given, KL)), strict=True):
            torch.testing.assert_close(found, want, rtol=1e-12 + 1e-16 / radius, atol=0)
    x, logp = torch.tensor([0.3, -2.0]), torch.tensor([-1.0, -0.2])
    torch.testing.assert_close(binary_divergence(x, logp, given), binary_divergence(x, logp, KL), rtol=1e-9, atol=0)
    assert torch.equal(in_band(x, logp, given, 0.05), in_band(x, logp, KL, 0.05))


def test_the_built_in_ones_and_the_written_out_ones_are_untouched():
    written = (
        FDivergence("hinge", lambda u: ((u - 1).abs() - 0.1).clamp_min(0)),
        FDivergence("quartic", lambda u: (u - 1).pow(4)),
        FDivergence("TV", lambda u: 0.5 * (u - 1).abs()),
        FDivergence("KL", lambda u: -u.log() + u - 1),
    )
    for divergence in (*DIVERGENCES.values(), *map(alpha, (-6.0, -1.0, 0.3, 0.5, 0.999, 1.001, 2.0, 7.0)), *written):
        assert (divergence.tilt, divergence.smallest) == (0.0, 0.0), divergence.name
        u = torch.logspace(-3, 3, 7, dtype=torch.float64)
        assert torch.equal(divergence(u), divergence.f(u))


def test_copies_replacements_and_pickles_take_the_slope_off_once():
    given = FDivergence("u log u", entropy, slope_at_infinity=math.inf)
    finite = FDivergence("-log u", minus_log, slope_at_infinity=0.0)
    for divergence in (given, finite):
        renamed = dataclasses.replace(divergence, name="other")
        for copy in (renamed, dataclasses.replace(renamed, name=divergence.name)):
            assert (copy.tilt, copy.recession) == (divergence.tilt, divergence.recession)
    assert pickle.loads(pickle.dumps(finite)) == finite
    assert pickle.loads(pickle.dumps(finite)).tilt == finite.tilt


def minus_log(u):
    return -u.log()


def test_a_value_at_1_is_refused():
    with pytest.raises(ValueError, match=r"'shifted'.*f\(1\) must be 0, got 0\.1.*subtract it"):
        FDivergence("shifted", lambda u: (u - 1).square() + 0.1)


def test_a_divergence_made_under_fake_tensors_is_probed_with_numbers():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        given = FDivergence("u log u", entropy)
    assert given.tilt == FDivergence("u log u", entropy).tilt
    with torch.device("meta"):
        assert FDivergence("u log u", entropy).tilt == given.tilt
