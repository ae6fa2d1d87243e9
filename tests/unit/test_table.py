"""The float32 table against the float64 bounds over the whole domain, and its life: built once, refused when it cannot hold."""

import math
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bandpo import CHI2, KL, REVERSE_KL, TV, Band, FDivergence, alpha, ratio_bounds
from bandpo.bounds import table as module
from bandpo.bounds.roots import log_bounds
from bandpo.divergences import DIVERGENCES
from sources import ROOT

ALPHAS = [alpha(a) for a in (3.0, 1.5, 1.001, 0.999, 0.5, 0.3, 0.001, -1.0, -1.5)]
USER = [FDivergence("user", lambda u: (u - 1).abs() ** 1.5)]
ALL = [*DIVERGENCES.values(), *ALPHAS, *USER]
RADII = (1e-6, 1e-3, 0.05, 0.3, 2.0, 10.0)


def hinge(u):
    """Kinks at 0.8 and 1.2, where the bounds have them too."""
    return ((u - 1).abs() - 0.2).clamp_min(0) + 0.05 * (u - 1).abs() + (u - 1).square()


def grid(centers, n=6000):
    """log p over the whole domain, evenly in log p and in log(-log p), and crowded around the points of saturation."""
    g = torch.Generator().manual_seed(0)
    parts = [
        -torch.logspace(-19, 2, n),
        -torch.rand(n, generator=g) * 4,
        -torch.rand(n, generator=g) * 110,
        -torch.zeros(1),
    ]
    for c in centers:
        x = torch.logspace(-12, 0.3, n // 6)
        neighbours = torch.tensor(c).nextafter(torch.tensor([0.0, math.inf]))
        parts += [-(c + x), -(c - x).clamp_min(0), -torch.tensor([c]), -neighbours]
    return torch.cat(parts)


@pytest.mark.parametrize("divergence", ALL, ids=lambda d: d.name)
def test_inward_and_within_four_units_everywhere(divergence):
    for radius in RADII:
        table = module.table_for(divergence, radius, radius, torch.device("cpu"))
        assert table is not None
        logp = grid([c for c, _, _ in table.centers])
        lower, upper = (b.double() for b in table.bounds(logp))
        delta = torch.tensor(radius, dtype=torch.float64)
        true_lower, true_upper = (b.exp() for b in log_bounds(divergence, logp.double(), delta, delta))
        # 1e-12 is what the float64 bounds are promised within
        assert (lower >= true_lower - 1e-12).all()
        assert (lower - true_lower <= 4 * 2**-24).all()
        assert (upper <= true_upper * (1 + 1e-12)).all()
        representable = true_upper < 1e38  # beyond, one row holds
        assert (upper >= true_upper * (1 - 4 * 2**-23))[representable].all()
        assert (upper >= 1e37)[~representable].all()


def test_sides_with_radii_of_their_own():
    logp = grid([])
    table = module.table_for(CHI2, 0.3, 0.01, torch.device("cpu"))
    for got, radius, side in zip(table.bounds(logp), (0.3, 0.01), (0, 1), strict=True):
        delta = torch.tensor(radius, dtype=torch.float64)
        want = log_bounds(CHI2, logp.double(), delta, delta)[side].exp()
        torch.testing.assert_close(got.double(), want, rtol=4 * 2**-23, atol=4 * 2**-24)


def test_kinks_are_refused_with_a_message_and_solved():
    kinked = FDivergence("kinked", hinge)
    logp = -torch.rand(50) * 5
    with pytest.warns(UserWarning, match="kinked.*too sharply.*solves"):
        bounds = ratio_bounds(logp, kinked, 0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        again = ratio_bounds(logp, kinked, 0.05)
    exact = ratio_bounds(logp.double(), kinked, 0.05)
    for first, second, wide in zip(bounds, again, exact, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first.double(), wide, rtol=2**-23, atol=2**-24)


def test_a_table_is_as_large_as_the_docs_tell():
    least, most = map(
        int, re.search(r"A table takes (\d+) to (\d+) KB", (ROOT / "docs/theory.md").read_text()).groups()
    )
    found = [
        module.table_for(d, radius, radius, torch.device("cpu")) for d, radius in ((KL, 1.0), (TV, 0.05), (CHI2, 1e-3))
    ]
    sizes = [(table.coefficients.nbytes + table.of_sides.nbytes) / 1000 for table in found]
    assert least <= min(sizes) < 1.1 * least and most / 1.1 < max(sizes) <= most


def test_built_once_by_threads_and_free_of_the_callers_modes():
    calls = []
    f = FDivergence("counted", lambda u: (calls.append(1), (u - 1).square())[1], slope_at_infinity=math.inf)
    logp = -torch.rand(1000) * 6
    with torch.inference_mode():
        first = ratio_bounds(logp, f, 0.05)
    assert calls
    calls.clear()
    with ThreadPoolExecutor(8) as pool:
        for bounds in pool.map(lambda _: ratio_bounds(logp, f, 0.05), range(64)):
            assert torch.equal(bounds.upper, first.upper)
    assert not calls
    table = module.table_for(f, 0.05, 0.05, torch.device("cpu"))
    assert not table.coefficients.is_inference()
    assert table.coefficients.device.type == "cpu"
    with torch.device("meta"):  # a default device must not decide where a table lives
        assert module.table_for(f, 0.06, 0.06, torch.device("cpu")).coefficients.device.type == "cpu"
    assert ratio_bounds(logp.to("meta"), f, 0.05).upper.shape == logp.shape


@pytest.mark.slow
def test_compiled_is_bit_identical_and_takes_other_radii():
    logp = -torch.rand(1003) * 8
    for divergence in (KL, TV, REVERSE_KL):
        compiled = torch.compile(lambda x, r, d=divergence: Band(d, r)(x), fullgraph=True)
        for radius in (0.05, 0.1):  # the second makes the radius a symbol
            for a, b in zip(compiled(logp, radius), Band(divergence, radius)(logp), strict=True):
                assert torch.equal(a, b)
