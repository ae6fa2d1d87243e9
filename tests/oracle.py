"""The bounds by high-precision bisection on their definition. Independent of the library: other formula, other numbers.

The tests read the bounds from `golden/oracle.csv`; a test computes a random sample of that file again. This makes it anew:

    python tests/oracle.py
"""

import csv
import math
import struct
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

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
DIGITS = 30
"""Significant digits of the values in the golden file."""

GOLDEN = Path(__file__).parent / "golden" / "oracle.csv"
LOGPS = (-80.0, -40.5, -12.3, -5.0, -2.0, -0.7, -0.3, -0.01, -1e-4, -1e-8, -1e-12)
RADII = (1e-6, 1e-3, 0.05, 0.7, 10.0)
_INFINITE_AT_ZERO = {"KL", "NEYMAN", "JEFFREYS", "ALPHA(-1)", "ALPHA(-1.5)"}


def generator(name: str) -> Callable[[Real], Real]:
    """The generator of a divergence, by its name in the library."""
    return GENERATORS[name] if name in GENERATORS else _alpha(float(name[6:-1]))


def divergence(name: str, logp: float, log_ratio: Real) -> Real:
    """Binary divergence of a ratio, with the digits that its cancellations need; infinite past the simplex."""
    if log_ratio == 0:
        return mp.mpf(0)
    sizes = (abs(logp), -math.log(-logp) if logp else 0.0, -float(mp.log(abs(log_ratio))))
    with mp.workdps(60 + int(sum(max(s, 0.0) for s in sizes))):  # twice their decimal digits
        f, p, rest = generator(name), mp.e ** mp.mpf(logp), -mp.expm1(mp.mpf(logp))
        q = p * mp.e**log_ratio
        other = 1 - q
        infinite = name in _INFINITE_AT_ZERO or (name.startswith("ALPHA") and float(name[6:-1]) <= 0)
        if other < 0 or (infinite and 0 in (q, other)):
            return mp.inf
        return +(p * f(q / p) + rest * f(other / rest))


def is_log_bound(name: str, logp: float, radius: float, bound: float, tolerance: float) -> bool:
    """Whether a log-bound (lower if negative) is within a relative tolerance of that of a radius within it of `radius`."""
    with mp.workdps(400):
        tol, delta, free = mp.mpf(tolerance), mp.mpf(radius), mp.mpf(-(10**6))
        inner = max(mp.mpf(bound) * (1 - tol), free)
        outer = mp.mpf(bound) * (1 + tol)
    ends_there = outer <= free or outer >= -logp  # 0 in all but name, or the edge of the simplex
    return divergence(name, logp, inner) <= delta * (1 + tol) and (
        ends_there or divergence(name, logp, outer) >= delta * (1 - tol)
    )


def as_float32(value: float) -> float:
    """The nearest float32 number: what the library is given in float32."""
    return struct.unpack("f", struct.pack("f", value))[0]


SINGLE_POINTS = (
    *(("JEFFREYS", as_float32(logp), 0.3) for logp in (-1e-30, -3e-38)),
    *((name, -0.7, 1e-12) for name in ("KL", "REVERSE_KL", "JS", "HELLINGER")),
    *((name, -3.0, 1e-12) for name in ("ALPHA(1.5)", "ALPHA(0.3)")),
    *(("HELLINGER", -3.5e-8, radius) for radius in (1e-3, 0.05)),
)
"""Points of the golden file beside the grid: nearly certain tokens and tiny radii."""


def points() -> Iterator[tuple[str, float, float]]:
    """Every `(name, log p, radius)` of the golden file, each once."""
    logps = dict.fromkeys((*LOGPS, *map(as_float32, LOGPS)))
    yield from ((name, logp, radius) for name in GENERATORS for radius in RADII for logp in logps)
    yield from SINGLE_POINTS


@cache
def golden() -> dict[tuple[str, float, float], tuple[str, str]]:
    """The golden file: `(log lower, log upper)` as text for each `(name, log p, radius)`."""
    with GOLDEN.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return {(name, float(logp), float(radius)): (lower, upper) for name, logp, radius, lower, upper in rows}


@cache
def log_bounds(name: str, logp: float, radius: float) -> tuple[Real, Real]:
    """`(log lower, log upper)` to `DIGITS` digits, from the golden file."""
    lower, upper = golden()[name, logp, radius]
    with mp.workdps(2 * DIGITS):
        return mp.mpf(lower), mp.mpf(upper)


def compute_log_bounds(name: str, logp: float, radius: float) -> tuple[Real, Real]:
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


def as_text(value: Real) -> str:
    """A value as it is written in the golden file."""
    with mp.workdps(2 * DIGITS):
        return mp.nstr(value, DIGITS, strip_zeros=False)


def write_golden() -> None:
    """Compute the golden file anew; takes about a minute."""
    with GOLDEN.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("divergence", "log p", "radius", "log lower", "log upper"))
        for name, logp, radius in points():
            bounds = compute_log_bounds(name, logp, radius)
            writer.writerow((name, repr(logp), repr(radius), *map(as_text, bounds)))


if __name__ == "__main__":
    write_golden()
