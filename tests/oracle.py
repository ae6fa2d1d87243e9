"""The bounds by high-precision bisection on their definition. Independent of the library: other formula, other numbers."""

from collections.abc import Callable
from functools import cache

import mpmath as mp

Real = mp.mpf


def _xlogx(u: Real) -> Real:
    return u * mp.log(u) if u > 0 else mp.mpf(0)


def _alpha(a: float) -> Callable[[Real], Real]:
    order = mp.mpf(a)
    return lambda u: (u**order - order * u - (1 - order)) / (order * (order - 1))


GENERATORS: dict[str, Callable[[Real], Real]] = {
    "KL": lambda u: -mp.log(u) + u - 1,
    "REVERSE_KL": lambda u: _xlogx(u) - u + 1,
    "TV": lambda u: abs(u - 1) / 2,
    "CHI2": lambda u: (u - 1) ** 2,
    "NEYMAN": lambda u: (u - 1) ** 2 / u,
    "HELLINGER": lambda u: (mp.sqrt(u) - 1) ** 2,
    "LE_CAM": lambda u: (u - 1) ** 2 / (u + 1),
    "JS": lambda u: (_xlogx(u) - (u + 1) * mp.log((u + 1) / 2)) / 2,
    "JEFFREYS": lambda u: (u - 1) * mp.log(u),
    **{f"ALPHA({a:g})": _alpha(a) for a in (3.0, 2.0, 1.5, 1.001, 0.999, 0.5, 0.3, 0.001, -1.0, -1.5)},
}
_INFINITE_AT_ZERO = {"KL", "NEYMAN", "JEFFREYS", "ALPHA(-1)", "ALPHA(-1.5)"}


@cache
def log_bounds(name: str, logp: float, radius: float) -> tuple[Real, Real]:
    """`(log lower, log upper)`, right to more than 50 digits."""
    f = GENERATORS[name]
    with mp.workdps(140):  # f(1 ± 1e-35) loses 70 digits
        p, delta = mp.e ** mp.mpf(logp), mp.mpf(radius)
        rest = 1 - p

        def inside(q: Real, other: Real) -> bool:
            return p * f(q / p) + rest * f(other / rest) <= delta

        lower = upper = None
        if name not in _INFINITE_AT_ZERO:
            lower = -mp.inf if inside(mp.mpf(0), mp.mpf(1)) else None
            upper = -mp.log(p) if inside(mp.mpf(1), mp.mpf(0)) else None
        if lower is None:  # q = p e^-y
            lower = -_last(lambda y: inside(p * mp.e**-y, 1 - p * mp.e**-y))
        if upper is None:  # 1 - q = (1-p) e^-y
            y = _last(lambda y: inside(1 - rest * mp.e**-y, rest * mp.e**-y))
            upper = mp.log((1 - rest * mp.e**-y) / p)
        return lower, upper


def _last(inside: Callable[[Real], bool]) -> Real:
    """Largest y with `inside(y)`, by bisection on log y."""
    low, high = mp.mpf(-190), mp.mpf(100)
    for _ in range(190):  # 290 / 2^190 < 1e-54
        middle = (low + high) / 2
        if inside(mp.e**middle):
            low = middle
        else:
            high = middle
    return mp.e**low
