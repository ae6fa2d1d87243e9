"""Fuzz targets of the numerical core: the promise of the bounds, default dtypes, and values that pickle.

`(inputs, check, bad, slow)` for each name, as in targets.py.
"""

import math
import pickle
from typing import Any

import mpmath as mp
import torch
from hypothesis import strategies as st

import oracle
from bandpo import CHI2, KL, TV, Band, Clip, Objective, alpha, in_band, ratio_bounds
from bandpo.divergences import DIVERGENCES, FDivergence
from bandpo.surrogates import clip, mask

ORACLES = [*DIVERGENCES.values(), *(alpha(a) for a in (1.5, 0.999, 0.5, 0.3, -1.0, -1.5))]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
exponents = st.floats(-290, 290)
radii = st.one_of(
    exponents.map(lambda x: 10.0**x), st.floats(1e-9, 100), st.sampled_from([5e-324, 1e300, 1.7976931348623157e308])
)
logps = st.one_of(
    st.floats(-60, -1e-3), st.floats(-30, 2.8).map(lambda x: -(10.0**x)), st.floats(-300, 0).map(lambda x: -(10.0**x)),
    st.sampled_from([0.0, -0.0, -math.inf, -5e-324, -1e308, -700.0, -709.0]),
)  # fmt: skip
BOUNDS = st.tuples(
    st.sampled_from(ORACLES), st.lists(logps, min_size=1, max_size=4), radii, st.sampled_from(DTYPES), st.booleans()
)


def any_bounds(draw: tuple[FDivergence, list[float], float, torch.dtype, bool]) -> str:
    """Bounds at any radius are no NaN, bracket 1 inside the simplex, and are wider for a larger radius and a rarer token."""
    divergence, logp, radius, dtype, log = draw
    x = torch.tensor(logp, dtype=torch.float64).to(dtype)
    delta = torch.tensor(radius, dtype=torch.float64)  # a tensor: a table of its own for each input would take too long
    lower, upper = (b.double() for b in ratio_bounds(x, divergence, delta, log=log))
    one, zero = (0.0, -math.inf) if log else (1.0, 0.0)
    edge = -x.double() if log else (-x.double()).exp()
    assert not (lower.isnan() | upper.isnan()).any()
    assert ((zero <= lower) & (lower <= one) & (one <= upper) & (upper <= edge * (1 + 1e-15))).all()
    wide = ratio_bounds(x, divergence, delta.clamp_max(1e307) * 2, log=log)
    assert _at_most(wide.lower.double(), lower, dtype)
    assert _at_most(upper, wide.upper.double(), dtype)
    rare = ratio_bounds((x.double() * 1.5).to(dtype), divergence, delta, log=log)
    assert _at_most(rare.lower.double(), lower, dtype)
    assert _at_most(upper, rare.upper.double(), dtype)
    return "fine"


def _at_most(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    # 1e-12 of a log-bound, which is 700 at most where its exponential is not 0 or infinite; and where that crosses a number of
    # a narrow dtype, rounding makes a unit in the last place of it.
    tolerance = 1e-9 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    tiny = 2 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return bool(((a <= b) | ((a - b).abs() <= tolerance * b.abs() + tiny)).all())


def true_bounds(draw: tuple[FDivergence, list[float], float, torch.dtype, bool]) -> str:
    """Float64 log-bounds hold their promise, by the divergence there in hundreds of digits; narrower ones lie inside."""
    divergence, logps, radius, dtype, _ = draw
    order = float(divergence.name[6:-1]) if divergence.name.startswith("ALPHA") else 1.0
    for logp in logps:
        x = torch.tensor(logp, dtype=torch.float64)
        bounds = ratio_bounds(x, divergence, torch.tensor(radius, dtype=torch.float64), log=True)
        narrow = ratio_bounds(x.to(dtype), divergence, torch.tensor(radius, dtype=torch.float64), log=True)
        exact = ratio_bounds(x.to(dtype).double(), divergence, torch.tensor(radius, dtype=torch.float64), log=True)
        for a, b in zip(narrow, exact, strict=True):
            assert a.double().abs() <= b.abs() or a.double() == b
        if not (-700 <= logp <= -1e-300 and 1e-290 <= radius <= 1e290):
            continue
        size = max(-logp, -math.log(-logp)) if order > 0 else -logp + max(0.0, math.log(radius))
        if size * max(1.0, abs(order)) >= 690:
            continue
        for bound in bounds:
            assert oracle.is_log_bound(divergence.name, logp, radius, bound.item(), 1e-12), (logp, bound)
    return "fine"


def tabulated_bounds(draw: tuple[int, list[float]]) -> str:
    """Float32 bounds of a float radius are inward of the float64 ones and within four units; `in_band` decides as they do."""
    which, logps = draw
    divergence, radius = (KL, TV, CHI2, DIVERGENCES["jeffreys"])[which % 4], (1e-9, 1e-3, 0.05, 0.7, 300.0)[which % 5]
    x = torch.tensor(logps, dtype=torch.float64).float()
    lower, upper = ratio_bounds(x, divergence, radius)
    exact = ratio_bounds(torch.where(x > -(2.0**-126), 0.0, x).double(), divergence, radius)
    held = exact.upper.clamp_max(1e37)  # beyond, one row of the table holds
    assert ((lower.double() >= exact.lower - 1e-12) & (lower.double() <= exact.lower + 4 * 2**-24)).all()
    assert ((upper.double() <= exact.upper * (1 + 1e-12)) & (upper.double() >= held * (1 - 4 * 2**-23))).all()
    r = torch.linspace(-3, 3, len(logps))
    assert torch.equal(in_band(r, x, divergence, radius), (r.exp() >= lower) & (r.exp() <= upper))
    return "fine"


def any_default_dtype(draw: tuple[list[float], torch.dtype, torch.dtype]) -> str:
    """The default dtype changes no bit of the bounds."""
    logp, dtype, default = draw
    x = torch.tensor(logp, dtype=torch.float64).to(dtype)
    want = [
        *ratio_bounds(x, KL, 0.05),
        *ratio_bounds(x, TV, 0.05, log=True, max_ratio=3.0),
        *Band(CHI2, 0.1, relax=Clip())(x),
    ]
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        got = [
            *ratio_bounds(x, KL, 0.05),
            *ratio_bounds(x, TV, 0.05, log=True, max_ratio=3.0),
            *Band(CHI2, 0.1, relax=Clip())(x),
        ]
    finally:
        torch.set_default_dtype(before)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))
    return "fine"


def one_less_root(u):
    return 1 - u.sqrt()


divergences = st.one_of(
    st.sampled_from(list(DIVERGENCES.values())),
    st.floats(-50, 50).map(alpha),
    st.just(FDivergence("root", one_less_root)),
)
any_radius = st.one_of(
    st.floats(1e-6, 10), st.tuples(st.floats(1e-6, 10), st.floats(1e-6, 10)),
    st.lists(st.floats(1e-6, 10), min_size=1, max_size=3).map(torch.tensor),
)  # fmt: skip
values = st.one_of(
    divergences, st.builds(Band, divergences, any_radius),
    st.builds(Objective, bounds=st.builds(Band, divergences, any_radius), surrogate=st.sampled_from([clip, mask]),
              name=st.text()),
)  # fmt: skip


def any_pickle(value: Any) -> str:
    """A value that went through pickle is equal, has the same hash, and gives the same bits."""
    again = pickle.loads(pickle.dumps(value))
    assert again == value
    assert hash(again) == hash(value)
    if isinstance(value, FDivergence):
        u = torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64)
        assert torch.equal(again(u), value(u))
        assert torch.equal(again.of_log(u), value.of_log(u))
    return "fine"


TARGETS = {
    "any radius and log-prob": (BOUNDS, any_bounds, False, False),
    "bounds against hundreds of digits": (BOUNDS, true_bounds, False, False),
    "bounds from a table": (st.tuples(st.integers(0, 19), st.lists(logps, min_size=1, max_size=30)), tabulated_bounds,
                          False, False),
    "any default dtype": (
        st.tuples(st.lists(logps, min_size=1, max_size=4), st.sampled_from(DTYPES), st.sampled_from(DTYPES)), any_default_dtype,
        False, False,
    ),
    "any value through pickle": (values, any_pickle, False, False),
}  # fmt: skip

mp.mp.dps = 30
