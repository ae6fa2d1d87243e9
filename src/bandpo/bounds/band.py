"""The interval that a token's ratio may occupy: `old_logprobs -> RatioBounds`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from bandpo._inputs import check_tensor
from bandpo._system.options import not_one_of
from bandpo._values import ByValue
from bandpo.bounds.roots import log_bounds
from bandpo.bounds.table import Table, table_for
from bandpo.divergences import DIVERGENCES, KL, FDivergence, binary_divergence

Radius = float | Tensor
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INT_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class RatioBounds(NamedTuple):
    """Elementwise interval for the ratio `r = π(a|s) / π_old(a|s)`, with `0 <= lower <= 1 <= upper`."""

    lower: Tensor
    """Lower bounds, the same shape as the old log-probs."""
    upper: Tensor
    """Upper bounds, the same shape as the old log-probs."""


# Maps the old log-probs of tokens, and the further inputs that it asks for by name, to their intervals, or to a bool tensor
# that says which tokens are inside.
Bounds = Callable[..., RatioBounds | Tensor]


def ratio_bounds(
    old_logprobs: Tensor,
    divergence: FDivergence | str = KL,
    radius: Radius | tuple[Radius, Radius] = 0.05,
    *,
    max_ratio: float | None = None,
    log: bool = False,
) -> RatioBounds:
    """Widest interval of the sampled token's ratio inside an f-divergence ball.

    The two solutions of `p f(r) + (1-p) f((1-pr)/(1-p)) = δ` around `r = 1`, with `p = π_old(a|s)`,
    saturated at the simplex, `0 <= r <= 1/p` (BandPO, arXiv:2603.04918, Thm. 1 and Prop. 3).

    Args:
        old_logprobs: `log p` of the sampled tokens under the old policy, `<= 0` (rounding above 0 counts as 0); any shape;
            float32, float64, bfloat16 or float16.
        divergence: An `FDivergence`, or the name of a built-in one ("kl", "tv", "chi2", ...).
        radius: δ > 0 in the units of the divergence (nats for KL); a float, a tensor that broadcasts to `old_logprobs`,
            or a pair `(lower, upper)` of these. Tensor entries that are not positive give NaN bounds.
        max_ratio: Cap on the upper bound, `>= 1`; None for no cap.
        log: Whether to return the bounds of `log r`.

    Returns:
        Bounds of the shape, dtype and device of `old_logprobs`, rounded inward. No gradient flows through them; NaN in gives
        NaN out. Float64 input, tensor radii and `log=True` are solved in float64 and rounded once (log-bounds within a relative
        1e-12; docs/theory.md states the domain of this promise, and the accuracy outside). All other input reads a float32
        table of the float64 bounds (within 4 units of 2^-24 of the lower and of 2^-23 of the upper bound), which the first
        call for a divergence, radius and device makes; 16-bit results are the float32 ones rounded inward.

    Raises:
        TypeError: If `old_logprobs` is not a tensor of one of the four dtypes, or another argument has the wrong type.
        ValueError: If `radius` or `max_ratio` is out of range, or `radius` does not broadcast.

    Examples:
        >>> import torch
        >>> logp = torch.tensor([0.01, 0.5, 0.99]).log()
        >>> ratio_bounds(logp, KL, radius=0.05).upper
        tensor([7.8098, 1.3085, 1.0101])
        >>> ratio_bounds(logp, KL, radius=0.05).lower
        tensor([0.0025, 0.6915, 0.9312])
    """
    _check_logprobs(old_logprobs)
    divergence = as_divergence(divergence)
    _check_max_ratio(max_ratio)
    radii = radius_of_sides(radius)
    with torch.no_grad():
        # Contiguous, because strided kernels may round differently: a token's bounds must not depend on its layout.
        logp = old_logprobs.detach().contiguous()
        if logp.dtype != torch.float64 and not log:
            bounds = _tabulated(logp.float(), divergence, radii)
            if bounds is not None:
                return _finish(*bounds, logp.dtype, max_ratio)
        logp = logp.to(torch.float64).clamp(max=0.0)
        log_lower, log_upper = log_bounds(divergence, logp, *_as_radii(radii, logp))
        if log:
            cap = None if max_ratio is None else math.log(max_ratio)
            return _finish(log_lower, log_upper, old_logprobs.dtype, cap)
        return _finish(log_lower.exp(), log_upper.exp(), old_logprobs.dtype, max_ratio)


def in_band(
    log_ratio: Tensor,
    old_logprobs: Tensor,
    divergence: FDivergence | str = KL,
    radius: Radius | tuple[Radius, Radius] = 0.05,
) -> Tensor:
    """Whether each ratio lies inside the band, without solving for the bounds.

    Evaluates `p f(r) + (1-p) f((1-pr)/(1-p)) <= δ` (arXiv:2603.04918, Thm. 1) once, in float64; for float32 and 16-bit input
    with a float radius it compares `r` with the tabulated bounds, so that the result agrees with a clip to `ratio_bounds`.

    Args:
        log_ratio: `log r`, any shape; a float dtype.
        old_logprobs: `log p`, the same shape.
        divergence: The f-divergence or its name, as in `ratio_bounds`.
        radius: The radius δ, as in `ratio_bounds`; of a pair, the radius of the side that the ratio is on counts.

    Returns:
        Bool tensor of the same shape; False where an input is NaN or `r > 1/p`.

    Raises:
        TypeError: If an argument has the wrong type or dtype, as in `ratio_bounds`.
        ValueError: If the radius is out of range, as in `ratio_bounds`, or the two shapes differ.

    Examples:
        >>> p, r = torch.tensor([0.5, 0.5, 0.01]), torch.tensor([1.30, 1.31, 7.8])
        >>> in_band(r.log(), p.log(), KL, radius=0.05)
        tensor([ True, False,  True])
    """
    _check_logprobs(old_logprobs)
    check_tensor("log_ratio", log_ratio)
    if log_ratio.shape != old_logprobs.shape:
        raise ValueError(
            f"in_band: log_ratio has shape {tuple(log_ratio.shape)} and old_logprobs {tuple(old_logprobs.shape)}; "
            "pass one ratio per token"
        )
    divergence, radii = as_divergence(divergence), radius_of_sides(radius)
    with torch.no_grad():
        log_ratio, old_logprobs = log_ratio.detach(), old_logprobs.detach()
        if torch.float64 not in (log_ratio.dtype, old_logprobs.dtype):
            bounds = _tabulated(old_logprobs.float().contiguous(), divergence, radii)
            if bounds is not None:
                r = log_ratio.float().exp()
                inside = (r >= bounds[0]) & (r <= bounds[1])
                if torch.compiler.is_compiling():  # inductor stores bytes six times faster than bools, on a CPU
                    inside = torch.where(inside, 1, 0).to(torch.uint8).view(torch.bool)
                return inside
        down, up = _as_radii(radii, old_logprobs)
        return binary_divergence(log_ratio, old_logprobs, divergence) <= torch.where(log_ratio < 0, down, up)


@dataclass(frozen=True, eq=False)
class Band(ByValue):
    """The trust region of BandPO: the f-divergence ball projected to each token's ratio (arXiv:2603.04918).

    Args:
        divergence: An `FDivergence` or the name of a built-in one.
        radius: δ > 0; a float, a tensor that broadcasts to the tokens, or a pair `(lower, upper)`.
        max_ratio: Cap on the upper bound. The paper's runs use 10, which for KL and δ = 0.05 decides every token with
            `p < 0.00714`; None is the pure theory.
        relax: A fixed interval that the band always contains, the paper's ablation (`Clip(0.2, 0.28)`), which the paper
            reports as worse.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the divergence's name is unknown, or the radius or the cap is out of range.

    Examples:
        >>> Band(KL, 0.05)(torch.tensor([0.001, 0.5]).log()).upper
        tensor([10.0000,  1.3085])
    """

    divergence: FDivergence | str = KL
    radius: Radius | tuple[Radius, Radius] = 0.05
    max_ratio: float | None = 10.0
    relax: "Clip | None" = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "divergence", as_divergence(self.divergence))
        _check_max_ratio(self.max_ratio)
        radius_of_sides(self.radius)
        if self.relax is not None and not isinstance(self.relax, Clip):
            raise TypeError(f"relax: pass a Clip such as Clip(0.2, 0.28), or None; got {self.relax!r}")

    def __call__(self, old_logprobs: Tensor) -> RatioBounds:
        lower, upper = ratio_bounds(old_logprobs, self.divergence, self.radius, max_ratio=self.max_ratio)
        if self.relax is None:
            return RatioBounds(lower, upper)
        fixed = self.relax(old_logprobs)
        return RatioBounds(torch.minimum(lower, fixed.lower), torch.maximum(upper, fixed.upper))


@dataclass(frozen=True)
class Clip:
    """PPO's fixed interval `[1 - low, 1 + high]` (arXiv:1707.06347, eq. 7); `Clip(0.2, 0.28)` is DAPO's Clip-Higher.

    Args:
        low: Width below 1, in `[0, 1]`; 1 leaves the lower side free.
        high: Width above 1, `>= 0`; `inf` leaves the upper side free, None means the same as `low`.

    Raises:
        ValueError: If a width is out of range.

    Examples:
        >>> Clip(0.2, 0.28)(torch.zeros(2))
        RatioBounds(lower=tensor([0.8000, 0.8000]), upper=tensor([1.2800, 1.2800]))
    """

    low: float = 0.2
    high: float | None = None

    def __post_init__(self) -> None:
        if self.high is None:
            object.__setattr__(self, "high", self.low)
        if not 0 <= self.low <= 1:
            raise ValueError(f"Clip: low must be in [0, 1] (1 leaves the side free), got {self.low}")
        if not (self.high is not None and self.high >= 0):
            raise ValueError(f"Clip: high must be >= 0 (inf leaves the side free), got {self.high}")

    def __call__(self, old_logprobs: Tensor) -> RatioBounds:
        assert self.high is not None
        _check_logprobs(old_logprobs)
        # One number each, repeated without memory: a pass over the tokens reads nothing for them.
        edges = (
            old_logprobs.detach().new_full((), edge).expand_as(old_logprobs) for edge in (1 - self.low, 1 + self.high)
        )
        return RatioBounds(*edges)


@dataclass(frozen=True)
class DCPO:
    """Dynamic-adaptive clipping of DCPO (arXiv:2509.02333), from `|(r - 1)·π| <= ε`.

    `r` from `½ + ½√max(1 - 4ε_l/p, 0)` to `½ + ½√(1 + 4ε_h/p)`, with a cap on the upper bound. The upper bound may exceed
    `1/p`: for common tokens it allows ratios that no policy reaches.

    Args:
        low: ε_l, 0.16 in the paper.
        high: ε_h, 0.20 in the paper.
        max_ratio: Cap on the upper bound, 10 in the paper; None for no cap.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> DCPO()(torch.tensor([0.01, 0.5]).log())
        RatioBounds(lower=tensor([0.5000, 0.5000]), upper=tensor([5.0000, 1.3062]))
    """

    low: float = 0.16
    high: float = 0.20
    max_ratio: float | None = 10.0

    def __post_init__(self) -> None:
        if not (0 < self.low < math.inf and 0 < self.high < math.inf):
            raise ValueError(f"DCPO: low and high must be positive numbers, got {self.low} and {self.high}")
        _check_max_ratio(self.max_ratio)

    def __call__(self, old_logprobs: Tensor) -> RatioBounds:
        _check_logprobs(old_logprobs)
        inverse_p = (-old_logprobs.detach().to(torch.float64).clamp(max=0.0)).exp()
        lower = 0.5 + 0.5 * (1 - 4 * self.low * inverse_p).clamp_min(0).sqrt()
        upper = 0.5 + 0.5 * (1 + 4 * self.high * inverse_p).sqrt()
        return _finish(lower, upper, old_logprobs.dtype, self.max_ratio)


def _tabulated(logp: Tensor, divergence: FDivergence, radii: tuple[Radius, Radius]) -> tuple[Tensor, Tensor] | None:
    """Float32 bounds from the table of the region; None for tensor radii, and for an f with kinks."""
    table = _table(logp, divergence, radii)
    return None if table is None else table.bounds(logp)


def _table(logp: Tensor, divergence: FDivergence, radii: tuple[Radius, Radius]) -> Table | None:
    low, high = radii
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return None
    if isinstance(logp, FakeTensor) and not torch.compiler.is_compiling() and not logp.fake_mode.allow_non_fake_inputs:
        return None  # a table is a real tensor, which cannot be combined with a fake one
    return table_for(divergence, low, high, logp.device)


def pushed_edge(bounds: object, old_logprobs: Tensor, advantages: Tensor) -> Tensor | None:
    """`s·b`, with s the sign of A, and b the edge that A pushes to: upper for A > 0, lower for A < 0.

    Times s, each token has an upper edge alone: it is `outside` exactly where `s·r > s·b`.

    Args:
        bounds: The bounds of an objective.
        old_logprobs: `log p`, `(batch, time)`, float32 or float64, finite where it matters.
        advantages: A, finite, `(batch, 1)` or `(batch, time)`.

    Returns:
        A tensor that broadcasts to the tokens, 0 where A = 0, without NaN where `log p` is finite; of the same edges as the
        bounds, to the last bit. None where one edge alone saves nothing: bounds that are neither a `Clip` nor a `Band` that
        reads its table, or are relaxed.

    Examples:
        >>> logp, a = torch.tensor([[0.5], [0.5]]).log(), torch.tensor([[3.0], [-3.0]])
        >>> pushed_edge(Band("kl", 0.05), logp, a), pushed_edge(Clip(0.2), logp, a)
        (tensor([[ 1.3085],
                [-0.6915]]), tensor([[ 1.2000],
                [-0.8000]]))
    """
    dtype = old_logprobs.dtype
    if type(bounds) is Clip:
        assert bounds.high is not None
        signs = advantages.sign().to(dtype)
        up = signs.clamp_min(0.0)
        # No ratio comes near the largest number, and 0 times an infinite edge would be NaN.
        return (signs - up) * (1 - bounds.low) + up * min(1 + bounds.high, torch.finfo(dtype).max)
    if type(bounds) is not Band or bounds.relax is not None or dtype != torch.float32:
        return None
    table = _table(old_logprobs, as_divergence(bounds.divergence), radius_of_sides(bounds.radius))
    if table is None:
        return None
    cap = torch.finfo(dtype).max if bounds.max_ratio is None else _rounded_down(bounds.max_ratio, dtype)
    return table.pushed(old_logprobs.contiguous(), advantages, cap)


def _finish(lower: Tensor, upper: Tensor, dtype: torch.dtype, cap: float | None) -> RatioBounds:
    """Bounds in float64 or float32 as the caller's dtype, rounded inward and capped."""
    lower, upper = round_inward(lower, dtype, up=True), round_inward(upper, dtype, up=False)
    return RatioBounds(lower, upper if cap is None else upper.clamp_max(_rounded_down(cap, dtype)))


def _rounded_down(number: float, dtype: torch.dtype) -> float:
    """The largest number of a dtype that is at most this one."""
    number = float.fromhex(float(number).hex())  # pins a float that torch.compile has made symbolic
    numbers = torch.finfo(dtype)
    spacing = max(math.ldexp(numbers.eps / 2, math.frexp(number)[1]), numbers.tiny * numbers.eps)
    return math.floor(number / spacing) * spacing


def round_inward(x: Tensor, dtype: torch.dtype, *, up: bool) -> Tensor:
    """Cast to a narrower dtype and round in one direction; 16-bit dtypes are reached through float32.

    Args:
        x: Float64 or float32, any shape.
        dtype: The float dtype of the result.
        up: Whether the result is at least `x`; otherwise it is at most `x`.

    Returns:
        Tensor of the same shape.
    """
    if x.dtype == dtype:
        return x
    if x.dtype == torch.float64 and dtype != torch.float32:
        x = round_inward(x, torch.float32, up=up)
    rounded = x.to(dtype)
    # One unit in the last place is one step of the bit pattern, away from 0 or towards it.
    away = rounded < 0 if not up else rounded >= 0
    bits = rounded.view(_INT_OF_SIZE[dtype.itemsize])
    stepped = (bits + torch.where(away, 1, -1).to(bits.dtype)).view(dtype)
    overshot = (rounded < x) if up else (rounded > x)
    return torch.where(overshot, stepped, rounded)


def _check_logprobs(logprobs: Tensor) -> None:
    if not isinstance(logprobs, Tensor):
        raise TypeError(f"old_logprobs must be a torch.Tensor, got {type(logprobs).__name__}")
    if logprobs.dtype not in _DTYPES:
        raise TypeError(
            f"old_logprobs must be float32, float64, bfloat16 or float16, got {logprobs.dtype}; convert with .float()"
        )


def as_divergence(divergence: FDivergence | str) -> FDivergence:
    """The divergence of that name, or the divergence itself.

    Args:
        divergence: An f-divergence, or the name of a built-in one in any case.

    Raises:
        TypeError: If the argument is neither a divergence nor a text.
        ValueError: If the name is unknown.
    """
    if isinstance(divergence, FDivergence):
        return divergence
    if isinstance(divergence, str) and divergence.lower() in DIVERGENCES:
        return DIVERGENCES[divergence.lower()]
    raise (ValueError if isinstance(divergence, str) else TypeError)(
        f"{not_one_of('divergence', divergence, DIVERGENCES)}, or pass an FDivergence"
    )


def radius_of_sides(radius: Radius | tuple[Radius, Radius]) -> tuple[Radius, Radius]:
    """The radius of the lower side and of the upper side, checked.

    Args:
        radius: δ for both sides, or a pair `(lower, upper)`.

    Raises:
        TypeError: If a radius is neither a number nor a float tensor.
        ValueError: If a tuple does not have two entries, or a number is not positive and finite.
    """
    if not isinstance(radius, tuple):
        radius = (radius, radius)
    if len(radius) != 2:
        raise ValueError(f"radius: a tuple must be (lower, upper), got {len(radius)} values")
    for side in radius:
        _check_radius(side)
    return radius


def _check_radius(radius: Radius) -> None:
    if isinstance(radius, Tensor):
        if not radius.is_floating_point():
            raise TypeError(f"radius: a tensor must have a float dtype, got {radius.dtype}")
    elif isinstance(radius, bool) or not isinstance(radius, (int, float)):
        raise TypeError(f"radius: pass a float, a float tensor or a pair (lower, upper), got {radius!r}")
    elif not 0 < radius < math.inf:
        raise ValueError(
            f"radius: must be a positive finite number, got {radius}; for no trust region use the objective 'no-clip'"
        )


def _as_radii(radii: tuple[Radius, Radius], like: Tensor) -> tuple[Tensor, Tensor]:
    low = _as_radius(radii[0], like)
    return low, low if radii[1] is radii[0] else _as_radius(radii[1], like)


def _as_radius(radius: Radius, like: Tensor) -> Tensor:
    """The radius as a float64 tensor that broadcasts to `like`; NaN where a tensor entry is not a radius."""
    if not isinstance(radius, Tensor):
        return torch.full((), radius, dtype=torch.float64, device=like.device)
    ours, theirs = radius.shape[::-1], like.shape[::-1]
    if len(ours) > len(theirs) or any(a not in (1, b) for a, b in zip(ours, theirs, strict=False)):
        raise ValueError(f"radius: shape {tuple(radius.shape)} does not broadcast to old_logprobs {tuple(like.shape)}")
    radius = radius.detach().to(like.device, torch.float64)
    return torch.where((radius > 0) & (radius < math.inf), radius, math.nan)


def _check_max_ratio(max_ratio: float | None) -> None:
    if max_ratio is None:
        return
    if isinstance(max_ratio, bool) or not isinstance(max_ratio, (int, float)):
        raise TypeError(f"max_ratio: pass a number >= 1 or None, got {max_ratio!r}")
    if not 1 <= max_ratio < math.inf:
        raise ValueError(f"max_ratio: must be a finite number >= 1, or None for no cap; got {max_ratio}")
