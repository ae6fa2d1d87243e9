"""f-divergences, the balls of trust regions: one generator per divergence, and the binary form that every bound inverts."""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from bandpo._inputs import check_tensor
from bandpo._values import ByValue, Registry

__all__ = [
    "CHI2",
    "DIVERGENCES",
    "HELLINGER",
    "JEFFREYS",
    "JS",
    "KL",
    "LE_CAM",
    "NEYMAN",
    "REVERSE_KL",
    "TV",
    "FDivergence",
    "alpha",
    "binary_divergence",
]

# exp(±700) is still a normal float64: beyond it a probability, or its complement, is treated as e^-700.
MAX_LOG = 700.0
MAX_LOG_FLOAT32 = 80.0  # the same for statistics in float32
# A radius below the first is treated as 0, and one above the second as the second: squares and δ/p then fit into float64.
SMALLEST_RADIUS, LARGEST_RADIUS = 1e-300, 1e300

LogBounds = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class FDivergence(ByValue):
    """An f-divergence (Csiszár, 1967), `D_f(π ‖ π_old) = Σ π_old f(π / π_old)`, given by its generator.

    A new divergence needs `name` and `f` only; check it once with `bandpo.testing.check_divergence`. Create the object once
    and reuse it: bounds are tabulated for each divergence, and a second object with the same lambda counts as a different
    divergence. If the functions are defined at the top level of a module, the object can be pickled for worker processes.

    `f(u) + c(u - 1)` is the same divergence for every c, because both policies sum to 1. So `u log u` may be given as it is:
    if `f` has a slope at 1, `tilt`, then `f(u) - tilt·(u - 1)` is used, which is at least 0.

    Args:
        name: Name in messages, tables and plots.
        f: Generator, elementwise on a float64 tensor of ratios `u > 0`: convex, `f(1) = 0`.
        f_exp: The same generator as a function of `t = log u`, `f(exp(t))`, written so that nothing cancels near `t = 0`
            and nothing overflows to NaN for `t` in `[-inf, 700]`. Without it `f(exp(t))` is evaluated directly: bounds are
            then as exact as `f` itself near 1, and ratios below 1e-308 count as 0.
        slope_at_infinity: `lim f(u)/u` as `u → ∞`, which may be `inf`. It decides the lower bound of a certain token
            (`p = 1`). Without it `f(e^700)/e^700` is used.
        closed_form: Maps float64 `log p <= 0` and the radius to `(log lower, log upper)`, for a divergence whose inverse is
            known to full precision. The caller clips the result to the simplex; `-inf` and `+inf` are allowed.

    Raises:
        TypeError: If `f` is not callable.
        ValueError: If `f(1)` is a number other than 0.

    Examples:
        >>> import torch
        >>> alpha_half = FDivergence("mine", lambda u: 2 * (1 + u) - 4 * u.sqrt())
        >>> alpha_half(torch.tensor([0.25, 1.0, 4.0], dtype=torch.float64))
        tensor([0.5000, 0.0000, 2.0000], dtype=torch.float64)
        >>> FDivergence("mine", lambda u: 2 - 2 * u.sqrt())(torch.tensor([0.25, 1.0, 4.0], dtype=torch.float64))
        tensor([0.2500, 0.0000, 1.0000], dtype=torch.float64)
    """

    name: str
    f: Callable[[Tensor], Tensor] = field(repr=False)
    f_exp: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    slope_at_infinity: float | None = field(default=None, repr=False)
    closed_form: Callable[[Tensor, Tensor], LogBounds] | None = field(default=None, repr=False)
    tilt: float = field(init=False, default=0.0, repr=False, compare=False)
    """The slope of `f` at 1 that is taken off, 0 for an `f` that is at least 0; of a kink, the mean of both slopes."""
    smallest: float = field(init=False, default=0.0, repr=False, compare=False)
    """The ratio at which `f` is evaluated in place of smaller ones: 0, or e^-700 where `f(0)` is NaN, as `u * u.log()` is."""

    def __post_init__(self) -> None:
        if not callable(self.f):
            raise TypeError(f"FDivergence({self.name!r}): f must be a function of a tensor of ratios, got {self.f!r}")
        if type(torch.empty(0, device="cpu")) is Tensor:
            self._probe()
        else:  # a mode of the caller makes tensors without numbers; a new thread has none of its modes
            with ThreadPoolExecutor(max_workers=1) as pool:
                pool.submit(self._probe).result()

    def _probe(self) -> None:
        """Evaluate the generator at 0, next to 1 and far out, for what was not given."""
        if self.slope_at_infinity is None:
            edge = torch.tensor(MAX_LOG, dtype=torch.float64, device="cpu")
            object.__setattr__(self, "slope_at_infinity", float(self.of_log(edge) * (-edge).exp()))
        object.__setattr__(self, "tilt", _slope_at_one(self.name, self.f))
        at_zero = float(self.f(torch.zeros(1, dtype=torch.float64, device="cpu")))
        object.__setattr__(self, "smallest", math.exp(-MAX_LOG) if math.isnan(at_zero) else 0.0)

    def __hash__(self) -> int:
        return hash(
            self.name
        )  # computed at each call; hashing the other fields would cost more than it would distinguish

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        """A built-in divergence is pickled and copied as itself."""
        return self.name if DIVERGENCES.get(self.name.lower()) is self else super().__reduce_ex__(protocol)

    def __call__(self, u: Tensor) -> Tensor:
        """The generator at ratio `u`, elementwise, without the slope that `f` may have at 1."""
        u = u.clamp_min(self.smallest) if self.smallest else u
        return self.f(u) - self.tilt * (u - 1) if self.tilt else self.f(u)

    def of_log(self, t: Tensor) -> Tensor:
        """The generator at a log-ratio, `f(exp(t))`, without the slope that `f` may have at 1.

        Args:
            t: Log-ratio, any shape, float64 (or float32 for statistics).
        """
        if self.f_exp is None:
            return self(t.exp())  # the slope is taken off at the same rounded ratio, whose rounding then cancels
        return self.f_exp(t) - self.tilt * t.expm1() if self.tilt else self.f_exp(t)

    @property
    def recession(self) -> float:
        """`lim f(u)/u` for `u → ∞`, less `tilt`: the cost of probability where the old policy had none."""
        assert self.slope_at_infinity is not None
        return self.slope_at_infinity - self.tilt


_PROBE = 2.0**-17  # 1 + _PROBE and 1 - _PROBE are float64 numbers, and their differences are exact


def _slope_at_one(name: str, f: Callable[[Tensor], Tensor]) -> float:
    """The slope of a generator at 1, and exactly 0 where both chords next to 1 have the signs of a minimum there.

    A convex function has its minimum at 1 unless one of the two chords falls towards or away from 1 on the wrong side. What
    remains of the slope after this is of the order of `_PROBE`², and it cancels in every divergence.
    """
    around = torch.tensor([1 - _PROBE, 1.0, 1 + _PROBE], dtype=torch.float64, device="cpu")
    below, one, above = (float(x) for x in f(around))
    if math.isfinite(one) and abs(one) > 1e-12:
        raise ValueError(
            f"FDivergence({name!r}): f(1) must be 0, got {one:g}: the divergence of a policy from itself; subtract it from f"
        )
    left, right = (one - below) / _PROBE, (above - one) / _PROBE
    noise = 1e-8  # f rounds by about 1e-16, a chord by 1e-16 / _PROBE
    if left - right > noise:
        raise ValueError(
            f"FDivergence({name!r}): f must be convex, but its slope falls at 1, from {left:.3g} to {right:.3g}: a policy "
            "would get nearer by moving away; check the sign of f"
        )
    if not (left > noise or right < -noise):
        return 0.0
    return (left + right) / 2


def binary_divergence(log_ratio: Tensor, old_logprobs: Tensor, divergence: FDivergence) -> Tensor:
    """Divergence of the two-event policies {token, anything else}, the quantity that every bound inverts.

    `g_f(p, r) = p f(r) + (1-p) f((1-pr)/(1-p))` (BandPO, arXiv:2603.04918, Thm. 1), the smallest `D_f` of any policy
    that gives the token the ratio `r`.

    Args:
        log_ratio: `log r`, any shape and float dtype; ratios above `1/p` give NaN, because there is no such policy.
        old_logprobs: `log p <= 0`, the same shape.
        divergence: The divergence.

    Returns:
        float64 tensor of the broadcast shape, in the units of the divergence (nats for KL).

    Raises:
        TypeError: If one of the two tensors does not have a float dtype.

    Examples:
        >>> p, r = torch.tensor([0.5]), torch.tensor([1.308484])
        >>> binary_divergence(r.log(), p.log(), KL)
        tensor([0.0500], dtype=torch.float64)
    """
    check_tensor("log_ratio", log_ratio)
    check_tensor("old_logprobs", old_logprobs)
    return divergence_of_two(log_ratio.to(torch.float64), old_logprobs.to(torch.float64), divergence)


def divergence_of_two(x: Tensor, logp: Tensor, divergence: FDivergence) -> Tensor:
    """`binary_divergence` in the dtype of its input.

    Args:
        x: `log r`.
        logp: `log p <= 0`, of a shape that broadcasts.
        divergence: The divergence.
    """
    logp = logp.clamp(-MAX_LOG if logp.dtype == torch.float64 else -MAX_LOG_FLOAT32, 0.0)
    p, odds = logp.exp(), (-logp).expm1()  # odds = (1-p)/p, from expm1: 1-p of a rounded p has lost the digits
    gain = x.expm1()
    rest = p * odds * divergence.of_log((-gain / odds).log1p())  # its ratio is (1-pr)/(1-p) = 1 - (r-1)/odds
    # p = 1: the mass that the token loses goes where the old policy had none, and the token cannot gain.
    lost = torch.where(gain == 0, 0.0, torch.where(gain > 0, math.nan, -gain * divergence.recession))
    return p * divergence.of_log(x) + torch.where(logp < 0, rest, lost)


def measured_divergence(x: Tensor, logp: Tensor, divergence: FDivergence) -> Tensor:
    """`binary_divergence` for statistics: in the dtype of its input, and finite for all log-probs that are finite.

    What the dtype cannot tell is left out. Numbers just below 1 are 2^-24 apart in float32, so each probability p with
    `1-p <= 2^-25` is 1 there, and a softmax that adds up `1 + (1-p)/p` loses it as well. A log-prob of 0 then says
    `1-p <= ε = 2^-25`, not `1-p = 0`, where many divergences are infinite. So 1-p and 1-q, with `q = p r`, count as ε where
    they are less (2^-54 in float64; 16-bit log-probs are computed with in float32).

    The result is never more than the divergence of the numbers themselves. For a convex f with its minimum at 1, the
    divergence of two events falls if p or q moves towards the other one, and `min(·, 1-ε)` moves only such a probability that
    is the larger one, or both to the same point, where it is 0. Where p and q are at most 1-ε, as computed, nothing changes.

    A divergence beyond the range of the dtype counts as 2^-28 of its largest number, so that 2^28 of them still add up to a
    number. Otherwise the error in float32 is about `p·2^-24·|x|`, and where a token rises from a smaller p to a q near 1, 1-q
    is known to a few 2^-24.

    Args:
        x: `log r`, held within ±80 by the caller; an r above `1/p`, which no policy can reach, counts as `1/p`.
        logp: `log p`, of the same shape; above 0 by rounding counts as 0.
        divergence: The divergence.

    Returns:
        A tensor of the shape of `x`.

    Examples:
        >>> zero, one = torch.zeros(1), torch.ones(1)
        >>> measured_divergence(zero, zero, KL), measured_divergence(one, -one, KL)
        (tensor([0.]), tensor([10.2960]))
    """
    epsilon = max(torch.finfo(x.dtype).eps, torch.finfo(logp.dtype).eps) / 4
    surest = math.log1p(-epsilon)
    held = logp.clamp(-MAX_LOG if logp.dtype == torch.float64 else -MAX_LOG_FLOAT32, surest)
    p, odds = held.exp(), (-held).expm1()
    # q stays what it is where p is lowered. Below the smallest p, r stays, as the caller measures it.
    x = torch.minimum(x + (logp - logp.clamp_max(surest)), surest - held)
    away = p * odds
    # In the dtype, 1 - (r-1)/odds may round to 0, or to less where both came from different loops over the tokens.
    kept = (-x.expm1() / odds).clamp_min(-1.0).log1p()
    least = (epsilon / away).log()
    found = p * divergence.of_log(x) + away * divergence.of_log(torch.maximum(kept, least))
    return found.clamp_max(torch.finfo(found.dtype).max * 2.0**-28)


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
    shift = _root(radius, (-logp).expm1())
    return _log_of_shifts(shift, shift)


def _neyman_bounds(logp: Tensor, radius: Tensor) -> LogBounds:
    """`q = [2p + δ ± √(δ² + 4p(1-p)δ)] / (2(1+δ))`: the Wilson score interval, with `q₋ q₊ = p²/(1+δ)`."""
    p, rest, h = logp.exp(), -logp.expm1(), radius.sqrt()
    root, tilt = (radius + 4 * p * rest).sqrt(), h * (1 - 2 * p)  # both over √δ
    up = torch.where(p < 0.5, 0.5 * h * (root + tilt) / (1 + radius), 2 * p * rest * (h / (root - tilt)))
    log_upper = (up * (-logp).exp()).log1p()
    return -radius.log1p() - log_upper, log_upper


def _hellinger_bounds(logp: Tensor, radius: Tensor) -> LogBounds:
    """`√r = b ∓ √(odds (1-b²))` with `b = 1 - δ/2`: an arc on the sphere of √π, which ends where it leaves the simplex."""
    radius = radius.clamp_max(2.0)  # reaches the whole sphere
    turn = -radius / 2
    step = _root(radius * (1 - radius / 4), (-logp).expm1())
    upper = (2 * (turn + step).log1p()).masked_fill(logp >= 2 * turn.log1p(), math.inf)
    lower = 2 * (turn - step).clamp_min(-1.0).log1p()
    return lower, upper


def _le_cam_bounds(logp: Tensor, radius: Tensor) -> LogBounds:
    """Roots of `(2+δ)d² - 2δ(1-2p)d - 4δp(1-p) = 0` in `d = q - p`."""
    radius = radius.clamp_max(2.0)  # the divergence of two policies that share no token
    p, rest, h = logp.exp(), -logp.expm1(), radius.sqrt()
    root, tilt = (radius + 8 * p * rest).sqrt(), h * (1 - 2 * p)  # both over √δ
    up = torch.where(p < 0.5, h * (root + tilt) / (2 + radius), 4 * p * rest * (h / (root - tilt)))
    down = torch.where(p < 0.5, 4 * p * rest * (h / (root + tilt)), h * (root - tilt) / (2 + radius))
    inverse_p = (-logp).exp()
    return _log_of_shifts(down * inverse_p, up * inverse_p)


def _root(a: Tensor, b: Tensor) -> Tensor:
    """`√(ab)` where the product would leave the range of float64."""
    return a.sqrt() * b.sqrt()


# Two Halley steps leave 1e-13, the rounding of the equation's terms (tests/unit/test_accuracy.py).
_KL_STEPS = 2


def _kl_bounds(logp: Tensor, radius: Tensor) -> LogBounds:
    """Two Halley steps for the fall of one event's log-prob, from a start that is exact to second order in δ.

    An event of probability `a` that falls to `a e^-y`, the other one having `b = 1 - a`, costs
    `a y - b log(1 + a/b (1 - e^-y)) = a (y - w) + b (x - log(1 + x))` with `w = 1 - e^-y` and `x = a w / b`: two terms that
    are both positive, so that nothing cancels. The token falls to the lower bound; everything else, to leave room for the
    upper one.
    """
    events = torch.stack([logp.exp(), -logp.expm1()]).clamp_min(math.exp(-MAX_LOG))
    a, b = events, events.flip(0)
    y = ((radius + _root(radius, radius + 8 * a * b)) / (2 * a)).clamp_max(LARGEST_RADIUS)
    for _ in range(_KL_STEPS):
        w = -(-y).expm1()
        other = b + a * w
        gap = a * exp_remainder(-y) + b * _log1p_remainder(a * w / b) - radius
        slope, bend_over_slope = a * w / other, b / other * (-y).exp() / w
        y = (y - gap / (slope - 0.5 * gap * bend_over_slope)).clamp_max(LARGEST_RADIUS)
    shrink_token, shrink_rest = y.unbind()
    return -shrink_token, log_upper_of(logp, shrink_rest)


def log_upper_of(logp: Tensor, shrink: Tensor) -> Tensor:
    """Log-ratio of a token when everything else keeps `(1-p) e^-shrink`: `log[(1 - (1-p) e^-shrink) / p]`."""
    return ((-logp).expm1() * -(-shrink).expm1()).log1p()


# Near 0 the generators are differences of numbers that agree in all but their second order. Below this |t| a few terms of a
# series are exact to rounding, and above it the plain difference is right within 1e-13.
_NEAR = 0.003


def _series(t: Tensor, *coefficients: float) -> Tensor:
    """`t² (c₀ + c₁ t + …)`."""
    total = torch.full_like(t, coefficients[-1])
    for c in coefficients[-2::-1]:
        total = total.mul_(t).add_(c)
    return total.mul_(t).mul_(t)


def exp_remainder(t: Tensor) -> Tensor:
    """`e^t - 1 - t`, with all digits near 0 in float64."""
    plain = t.expm1() - t
    if t.dtype != torch.float64:
        return plain  # float32 is for statistics, whose tokens are many
    return torch.where(t.abs() < _NEAR, _series(t, 1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720), plain)


def _log1p_remainder(x: Tensor) -> Tensor:
    """`x - log(1 + x)` for x >= 0, with all digits near 0."""
    return torch.where(x < _NEAR, _series(x, 1 / 2, -1 / 3, 1 / 4, -1 / 5, 1 / 6), x - x.log1p())


def _entropy_term(t: Tensor) -> Tensor:
    """`u log u` at `u = e^t`, with its limit 0 at `t = -inf`."""
    return t.clamp_min(-2 * MAX_LOG) * t.exp()


def _reverse_kl_exp(t: Tensor) -> Tensor:
    """`t e^t - e^t + 1`."""
    plain = _entropy_term(t) - t.expm1()
    if t.dtype != torch.float64:
        return plain
    return torch.where(t.abs() < _NEAR, _series(t, 1 / 2, 1 / 3, 1 / 8, 1 / 30, 1 / 144), plain)


def _js_exp(t: Tensor) -> Tensor:
    """Jensen-Shannon at `s = -|t|`; the other half by `f(u) = u f(1/u)`.

    `½[s e^s - (1 + e^s) l]` with `l = log((1 + e^s)/2)`. Near 0 these terms cancel, and `¼[s (e^s - 1) + (1 + e^s) l]` with
    `l = log(1 - tanh²(s/2))` is the same.
    """
    s = -t.abs().clamp_max(2 * MAX_LOG)
    lost = s.expm1()
    near = s > -0.5
    log = torch.where(near, -(lost / (2 + lost)).square(), lost / 2).log1p()
    half = torch.where(near, 0.25, -0.5).to(t.dtype) * (2 + lost) * log + s * torch.where(
        near, lost / 4, 0.5 + lost / 2
    )
    return half * t.clamp_min(0).exp()


KL = FDivergence(
    "KL",
    f=lambda u: -u.log() + u - 1,
    f_exp=exp_remainder,
    slope_at_infinity=1.0,
    closed_form=_kl_bounds,
)
"""D(π_old ‖ π), the direction of TRPO and of BandPO (arXiv:2603.04918)."""

REVERSE_KL = FDivergence(
    "REVERSE_KL",
    f=lambda u: torch.xlogy(u, u) - u + 1,
    f_exp=_reverse_kl_exp,
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
    ½ NEYMAN; the last three use those closed forms with a rescaled radius. A Rényi ball is an α-ball of another radius.

    Args:
        a: The order α, any finite float.

    Returns:
        KL or REVERSE_KL itself for α of 0 or 1, otherwise a new divergence.

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
    multiple_of = {2.0: (CHI2, 2.0), 0.5: (HELLINGER, 0.5), -1.0: (NEYMAN, 2.0)}.get(a)
    return FDivergence(
        f"ALPHA({a:g})",
        f=partial(_alpha, order=a),
        f_exp=partial(_alpha_exp, order=a),
        slope_at_infinity=math.inf if a > 1 else 1 / (1 - a),
        closed_form=partial(_multiple, of=multiple_of[0], factor=multiple_of[1]) if multiple_of else None,
    )


def _alpha(u: Tensor, order: float) -> Tensor:
    return _alpha_exp(u.log(), order)


def _alpha_exp(t: Tensor, order: float) -> Tensor:
    """The generator of `alpha` at `log u`; near 0 as `Σ c_n t^n/n!` with `c_n = 1 + α + … + α^(n-2)`."""
    a, b = order, order - 1
    if a < 0.5:  # divide by α before subtracting: nothing blows up as α → 0
        plain = (t.expm1() - (t if abs(a) < 1e-20 else (a * t).expm1() / a)) / -b
    else:  # and here as α → 1
        held = t.clamp_min(-2 * MAX_LOG)
        plain = (held.exp() * (b * held).expm1() / b - held.expm1()) / a
    if t.dtype != torch.float64:
        return plain
    sums = [1.0]
    for _ in range(4):
        sums.append(1 + a * sums[-1])
    series = _series(t, *(c / math.factorial(n) for n, c in enumerate(sums, start=2)))
    return torch.where(t.abs() * max(1.0, abs(a)) < _NEAR, series, plain)


def _multiple(logp: Tensor, radius: Tensor, of: FDivergence, factor: float) -> LogBounds:
    """Closed form of a divergence that is the divergence `of` divided by `factor`."""
    assert of.closed_form is not None
    return of.closed_form(logp, factor * radius)


_BUILT_IN = (KL, REVERSE_KL, TV, CHI2, NEYMAN, HELLINGER, LE_CAM, JS, JEFFREYS)
DIVERGENCES: Mapping[str, FDivergence] = Registry(__name__, "DIVERGENCES", {d.name.lower(): d for d in _BUILT_IN})
"""The named divergences, by lower-case name."""
