"""f-divergences: which ball a trust region is. One generator per divergence, and the binary form every bound rests on."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from bandpo._inputs import check_tensor

# exp(±700) is still a normal float64: beyond it a probability, or its complement, is treated as e^-700.
MAX_LOG = 700.0
MAX_LOG_FLOAT32 = 80.0  # the same for statistics in float32

LogBounds = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class FDivergence:
    """An f-divergence `D_f(π ‖ π_old) = Σ π_old f(π / π_old)`, given by its generator.

    A user's own divergence needs `name` and `f` only; check it once with `bandpo.testing.check_divergence`. Make it once, too:
    bounds are tabulated for each divergence object, and a new one with an equal-looking lambda is another divergence.

    Args:
        name: Name in messages, tables and plots.
        f: Generator, elementwise on a float64 tensor of ratios `u > 0`: convex, `f(1) = 0`, `f >= 0`
            (add `c·(u - 1)` to reach `f'(1) = 0`; that changes no divergence).
        f_exp: The same generator as a function of `t = log u`, `f(exp(t))`, written so that nothing cancels near `t = 0`
            and nothing overflows to NaN for `t` in `[-inf, 700]`. Without it `f(exp(t))` is used as it stands: bounds are
            then as exact as `f` itself near 1, and ratios below 1e-308 count as 0.
        slope_at_infinity: `lim f(u)/u` as `u → ∞`, which may be `inf`. It decides the lower bound of a certain token
            (`p = 1`). Without it `f(e^700)/e^700` is used.
        closed_form: Maps float64 `log p <= 0` and the radius to `(log lower, log upper)` where an inverse to full precision
            is known. The caller clips the result to the simplex; `-inf` and `+inf` are fine.

    Raises:
        TypeError: If `f` is not callable.

    Examples:
        >>> import torch
        >>> alpha_half = FDivergence("mine", lambda u: 2 * (1 + u) - 4 * u.sqrt())
        >>> alpha_half(torch.tensor([0.25, 1.0, 4.0], dtype=torch.float64))
        tensor([0.5000, 0.0000, 2.0000], dtype=torch.float64)
    """

    name: str
    f: Callable[[Tensor], Tensor] = field(repr=False)
    f_exp: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    slope_at_infinity: float | None = field(default=None, repr=False)
    closed_form: Callable[[Tensor, Tensor], LogBounds] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not callable(self.f):
            raise TypeError(f"FDivergence({self.name!r}): f must be a function of a tensor of ratios, got {self.f!r}")
        if self.slope_at_infinity is None:
            edge = torch.tensor(MAX_LOG, dtype=torch.float64)
            object.__setattr__(self, "slope_at_infinity", float(self.of_log(edge) * (-edge).exp()))

    def __call__(self, u: Tensor) -> Tensor:
        """The generator at ratio `u`."""
        return self.f(u)

    def of_log(self, t: Tensor) -> Tensor:
        """The generator at log-ratio `t`: `f(exp(t))`."""
        return self.f(t.exp()) if self.f_exp is None else self.f_exp(t)

    @property
    def recession(self) -> float:
        """`lim f(u)/u` for `u → ∞`: what probability costs where the old policy had none."""
        assert self.slope_at_infinity is not None
        return self.slope_at_infinity


def binary_divergence(log_ratio: Tensor, old_logprobs: Tensor, divergence: FDivergence) -> Tensor:
    """Divergence of the two-event policies {token, anything else}, the quantity that every bound inverts.

    `g_f(p, r) = p f(r) + (1-p) f((1-pr)/(1-p))` (BandPO, arXiv:2603.04918, Thm. 1), the smallest `D_f` of any policy
    that gives the token the ratio `r`.

    Args:
        log_ratio: `log r`, any float dtype; ratios above `1/p` give NaN (no such policy).
        old_logprobs: `log p <= 0`, same shape.
        divergence: The divergence.

    Returns:
        float64 tensor of the broadcast shape, in the units of the divergence (nats for KL).

    Raises:
        TypeError: If one of the two is no float tensor.

    Examples:
        >>> p, r = torch.tensor([0.5]), torch.tensor([1.308484])
        >>> binary_divergence(r.log(), p.log(), KL)
        tensor([0.0500], dtype=torch.float64)
    """
    check_tensor("log_ratio", log_ratio)
    check_tensor("old_logprobs", old_logprobs)
    return divergence_of_two(log_ratio.to(torch.float64), old_logprobs.to(torch.float64), divergence)


def divergence_of_two(x: Tensor, logp: Tensor, divergence: FDivergence) -> Tensor:
    """`binary_divergence` in the dtype of its input; in float32 it is off by about `p·2^-24·|x|`, for statistics."""
    logp = logp.clamp(-MAX_LOG if logp.dtype == torch.float64 else -MAX_LOG_FLOAT32, 0.0)
    p, odds = logp.exp(), (-logp).expm1()  # odds = (1-p)/p, from expm1: 1-p of a rounded p has lost the digits
    gain = x.expm1()
    rest = p * odds * divergence.of_log((-gain / odds).log1p())  # its ratio is (1-pr)/(1-p) = 1 - (r-1)/odds
    # p = 1: what the token loses lands where there was nothing, and there is nothing to gain.
    lost = torch.where(gain == 0, 0.0, torch.where(gain > 0, math.nan, -gain * divergence.recession))
    return p * divergence.of_log(x) + torch.where(logp < 0, rest, lost)


# Closed forms, in float64 (derivations: docs/theory.md). Each avoids the difference of nearly equal numbers: of the two roots
# of a quadratic, the one that cancels is the product of both over the other.


def _log_of_shifts(down: Tensor, up: Tensor) -> LogBounds:
    """Bounds of `log r` from `1 - r_lower` and `r_upper - 1`; a shift down by more than 1 leaves the simplex."""
    return (-down.clamp_max(1.0)).log1p(), up.log1p()


def _tv_bounds(logp: Tensor, radius: Tensor) -> LogBounds:
    """`r = 1 ∓ δ/p`."""
    shift = radius * (-logp).exp()
    return _log_of_shifts(shift, shift)


def _chi2_bounds(logp: Tensor, radius: Tensor) -> LogBounds:
    """`r = 1 ∓ √(δ(1-p)/p)`: the Wald interval."""
    shift = (radius * (-logp).expm1()).sqrt()
    return _log_of_shifts(shift, shift)


def _neyman_bounds(logp: Tensor, radius: Tensor) -> LogBounds:
    """`q = [2p + δ ± √(δ² + 4p(1-p)δ)] / (2(1+δ))`: the Wilson score interval, with `q₋ q₊ = p²/(1+δ)`."""
    p, rest = logp.exp(), -logp.expm1()
    root, tilt = (radius * (radius + 4 * p * rest)).sqrt(), radius * (1 - 2 * p)
    up = torch.where(p < 0.5, root + tilt, 4 * (1 + radius) * radius * p * rest / (root - tilt))
    log_upper = (up / (2 * (1 + radius)) * (-logp).exp()).log1p()
    return -radius.log1p() - log_upper, log_upper


def _hellinger_bounds(logp: Tensor, radius: Tensor) -> LogBounds:
    """`√r = b ∓ √(odds (1-b²))` with `b = 1 - δ/2`: an arc on the sphere of √π, which ends where it leaves the simplex."""
    b = (1 - radius / 2).clamp_min(0.0)
    step = ((-logp).expm1() * radius * (1 - radius / 4).clamp_min(0.0)).sqrt()
    upper = (2 * (b + step).log()).masked_fill(logp >= 2 * b.log(), math.inf)
    lower = 2 * (b - step).clamp_min(0.0).log()
    return lower, upper


def _le_cam_bounds(logp: Tensor, radius: Tensor) -> LogBounds:
    """Roots of `(2+δ)d² - 2δ(1-2p)d - 4δp(1-p) = 0` in `d = q - p`."""
    p, rest = logp.exp(), -logp.expm1()
    root, tilt = (radius * (radius + 8 * p * rest)).sqrt(), radius * (1 - 2 * p)
    product = 4 * radius * p * rest
    up = torch.where(p < 0.5, (root + tilt) / (2 + radius), product / (root - tilt))
    down = torch.where(p < 0.5, product / (root + tilt), (root - tilt) / (2 + radius))
    inverse_p = (-logp).exp()
    return _log_of_shifts(down * inverse_p, up * inverse_p)


# The residual of KL's two equations after two Halley steps is 2^-23 relative, after three 2^-51 (tests/unit/test_bounds.py).
_KL_STEPS = 3


def _kl_bounds(logp: Tensor, radius: Tensor) -> LogBounds:
    """Three Halley steps for each of two scalar equations, from starts that are exact to second order in δ.

    With `m, M` the smaller and larger of `p, 1-p`: the event `m` grows until the other has `M e^-y`, where
    `y - m log(1 + (e^y - 1)/m) = δ`; the event `M` grows until the other has `m e^-z`, where
    `m z - M log(1 + m/M (1 - e^-z)) = δ`. If the token is `m`, its upper bound comes from `y` and its lower one is `e^-z`;
    else the other way round.
    """
    p, rest = logp.exp(), -logp.expm1()
    m, large = torch.minimum(p, rest).clamp_min(math.exp(-MAX_LOG)), torch.maximum(p, rest)
    twice = radius + (radius * (radius + 8 * m * large)).sqrt()
    y, z = twice / (2 * large), (twice / (2 * m)).clamp_max(1e300)
    for _ in range(_KL_STEPS):
        e = y.expm1()
        gap = y - m * (e / m).clamp_max(1e300).log1p() - radius
        y = y - gap * (m + e) * e / (large * e * e - 0.5 * gap * m * (1 + e))
    for _ in range(_KL_STEPS):
        d = -(-z).expm1()
        gap = m * z - large * (m / large * d).log1p() - radius
        z = z - gap * (large + m * d) * d / (m * d * d - 0.5 * gap * large * (1 - d))
    shrink_rest, shrink_token = torch.where(p <= rest, y, z), torch.where(p <= rest, z, y)
    return -shrink_token, log_upper_of(logp, shrink_rest)


def log_upper_of(logp: Tensor, shrink: Tensor) -> Tensor:
    """Log-ratio of a token when everything else keeps `(1-p) e^-shrink`: `log[(1 - (1-p) e^-shrink) / p]`."""
    return ((-logp).expm1() * -(-shrink).expm1()).log1p()


def _entropy_term(t: Tensor) -> Tensor:
    """`u log u` at `u = e^t`, with its limit 0 at `t = -inf`."""
    return t.clamp_min(-2 * MAX_LOG) * t.exp()


def _js_exp(t: Tensor) -> Tensor:
    """Jensen-Shannon at `t <= 0`; the other half by `f(u) = u f(1/u)`."""
    s = -t.abs()
    half = 0.5 * (_entropy_term(s) - (s.exp() + 1) * (s.expm1() / 2).log1p())
    return half * t.clamp_min(0).exp()


KL = FDivergence(
    "KL",
    f=lambda u: -u.log() + u - 1,
    f_exp=lambda t: t.expm1() - t,
    slope_at_infinity=1.0,
    closed_form=_kl_bounds,
)
"""D(π_old ‖ π), the direction of TRPO and of BandPO (arXiv:2603.04918)."""

REVERSE_KL = FDivergence(
    "REVERSE_KL",
    f=lambda u: torch.xlogy(u, u) - u + 1,
    f_exp=lambda t: _entropy_term(t) - t.expm1(),
    slope_at_infinity=math.inf,
)
"""D(π ‖ π_old)."""

TV = FDivergence(
    "TV",
    f=lambda u: 0.5 * (u - 1).abs(),
    f_exp=lambda t: 0.5 * t.expm1().abs(),
    slope_at_infinity=0.5,
    closed_form=_tv_bounds,
)
"""Total variation, ½ Σ |π - π_old|."""

CHI2 = FDivergence(
    "CHI2",
    f=lambda u: (u - 1).square(),
    f_exp=lambda t: t.expm1().square(),
    slope_at_infinity=math.inf,
    closed_form=_chi2_bounds,
)
"""Pearson's χ², Σ (π - π_old)² / π_old."""

NEYMAN = FDivergence(
    "NEYMAN",
    f=lambda u: (u - 1).square() / u,
    f_exp=lambda t: -t.expm1() * (-t).expm1(),
    slope_at_infinity=1.0,
    closed_form=_neyman_bounds,
)
"""Neyman's χ², Σ (π - π_old)² / π."""

HELLINGER = FDivergence(
    "HELLINGER",
    f=lambda u: (u.sqrt() - 1).square(),
    f_exp=lambda t: (t / 2).expm1().square(),
    slope_at_infinity=1.0,
    closed_form=_hellinger_bounds,
)
"""Squared Hellinger distance, Σ (√π - √π_old)², at most 2."""

LE_CAM = FDivergence(
    "LE_CAM",
    f=lambda u: (u - 1).square() / (u + 1),
    f_exp=lambda t: t.expm1() * (t / 2).tanh(),
    slope_at_infinity=1.0,
    closed_form=_le_cam_bounds,
)
"""Le Cam's (triangular) divergence, Σ (π - π_old)² / (π + π_old), at most 2."""

JS = FDivergence(
    "JS",
    f=lambda u: 0.5 * (torch.xlogy(u, u) - (u + 1) * ((u + 1) / 2).log()),
    f_exp=_js_exp,
    slope_at_infinity=0.5 * math.log(2),
)
"""Jensen-Shannon divergence in nats, at most log 2."""

JEFFREYS = FDivergence(
    "JEFFREYS",
    f=lambda u: (u - 1) * u.log(),
    f_exp=lambda t: t.expm1() * t,
    slope_at_infinity=math.inf,
)
"""Jeffreys' divergence, KL + REVERSE_KL."""


def alpha(a: float) -> FDivergence:
    """The α-divergence with generator `(u^α - αu - (1-α)) / (α(α-1))`.

    `alpha(0)` is KL, `alpha(1)` is REVERSE_KL, `alpha(2)` is ½ CHI2, `alpha(0.5)` is 2 HELLINGER and `alpha(-1)` is
    ½ NEYMAN; those three use their closed forms with the radius rescaled. A Rényi ball is an α-ball of another radius.

    Args:
        a: The order α, any finite float.

    Raises:
        ValueError: If `a` is not finite.

    Examples:
        >>> alpha(0.0) is KL, alpha(3).name
        (True, 'ALPHA(3)')
    """
    if not isinstance(a, int | float) or not math.isfinite(a):
        raise ValueError(f"alpha: the order must be a finite number, got {a!r}")
    a = float(a)
    if a == 0:
        return KL
    if a == 1:
        return REVERSE_KL

    def f_exp(t: Tensor) -> Tensor:
        if a < 0.5:  # divide by α before subtracting: nothing blows up as α → 0
            return (t.expm1() - (a * t).expm1() / a) / (1 - a)
        b = a - 1  # and here as α → 1
        t = t.clamp_min(-2 * MAX_LOG)
        return (t.exp() * (b * t).expm1() / b - t.expm1()) / a

    multiple_of = {2.0: (CHI2, 2.0), 0.5: (HELLINGER, 0.5), -1.0: (NEYMAN, 2.0)}.get(a)

    def closed_form(logp: Tensor, radius: Tensor) -> LogBounds:
        assert multiple_of is not None and multiple_of[0].closed_form is not None
        return multiple_of[0].closed_form(logp, multiple_of[1] * radius)

    return FDivergence(
        f"ALPHA({a:g})",
        f=lambda u: (u.pow(a) - a * u - (1 - a)) / (a * (a - 1)),
        f_exp=f_exp,
        slope_at_infinity=math.inf if a > 1 else 1 / (1 - a),
        closed_form=closed_form if multiple_of else None,
    )


DIVERGENCES: Mapping[str, FDivergence] = MappingProxyType(
    {d.name.lower(): d for d in (KL, REVERSE_KL, TV, CHI2, NEYMAN, HELLINGER, LE_CAM, JS, JEFFREYS)}
)
"""The named divergences, by lower-case name."""
