"""The bounds in float32 at the speed of memory: cubics in log p, from a table that is built once for each region.

A table belongs to one divergence, one pair of radii and one device. Both bounds are functions of `t = -log p` alone,
smooth except at `t = 0` and at the (at most two) points where a side saturates. With `x` the distance of `t` to the
nearest of these *centers*, the domain is cut into 16 pieces per power of two of `x < 1`, on either side of a center, and
into 16 pieces per unit of `t` elsewhere; a piece is found from the bits of `x`, without a search. On each piece a cubic
interpolates the float64 bounds at the Chebyshev nodes.

Why the error is small. Interpolation misses by at most `max|b⁗| h⁴ / 192`, with `h` half a piece. A bound that behaves like
`x^½` or `x log x` at a center has `|b⁗| <= x^-4` times the bound, so pieces of `x/16` have a relative error of 5e-9; elsewhere
`|b⁗|` is of the order of 1 (relative to the upper bound), and `h = 1/32` gives the same 5e-9, a twelfth of a unit of float32
in the last place. Evaluation adds half a unit for the last addition, and a little for the products. The sum of these errors
is added to the constant term, inward, so that no result exceeds the true bound. A build evaluates every row at the points
where the error of a cubic interpolant peaks, and refuses a function with an error above 4 units; the caller then solves for
the bounds. tests/unit/test_table.py compares 19 divergences with the float64 bounds over the whole domain.
"""

import functools
import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from bandpo._eager import is_plain
from bandpo.bounds.roots import largest_feasible, log1mexp, log_bounds
from bandpo.divergences import MAX_LOG, FDivergence, binary_divergence

F = TypeVar("F", bound=Callable[..., Any])

PIECES = 16  # for each power of two of the distance to a center, and for each unit of t
SHIFT = 23 - 4  # leaves the exponent and the first four bits of a float32's mantissa
FRACTION = (1 << SHIFT) - 1
_SMALLEST = -126  # of float32's normal numbers; a token with -log p below 2^-126 counts as certain, p = 1
FIRST_OCTAVE = ((127 + _SMALLEST) << 4) - 1  # the bits above SHIFT of 2^-126, less one for the row of x = 0
_HALF_UNIT = 2.0**-24  # of float32 from 1 on, and a whole unit below
_BLOCK = 1 << 15  # tokens at once on a CPU, whose temporaries fit its cache
_BITS_OF_ONE = 0x3F800000  # of the float32 1.0
_LARGEST_LOG = 3e38  # beyond -log p of any token
_LARGEST = math.log(torch.finfo(torch.float32).max) - 1e-6


class Table(NamedTuple):
    """Coefficients and the few numbers that find their row."""

    coefficients: Tensor
    """c0, c1, c2, c3 of the lower bound, then of the upper bound, `(8, rows)` float32."""
    of_sides: Tensor
    """The same as `(4, 2·rows)`: the rows of the lower bound, then those of the upper one, so that the row chooses the side."""
    centers: tuple[tuple[float, int, int], ...]
    """For each center: the float32 center in t, the first row on the left, and the first row on the right."""
    uniform: int
    """The first row of the uniform pieces, less the row that t = 0 would have."""
    end: float
    """The last row is used from this t on."""
    last: int
    """The number of rows, less one."""

    def bounds(self, logp: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bound of the ratio, rounded inward.

        Args:
            logp: `log p`, float32, any shape; NaN gives NaN bounds.

        Returns:
            Two float32 tensors of the same shape.
        """
        flat = logp.flatten()
        if not is_plain(flat) or flat.device.type != "cpu" or flat.numel() <= _BLOCK:
            lower, upper = self._bounds(flat)
            return lower.view_as(logp), upper.view_as(logp)
        bounds = torch.empty_like(flat), torch.empty_like(flat)
        for start in range(0, flat.numel(), _BLOCK):
            block = slice(start, start + _BLOCK)
            for x, found in zip(bounds, self._bounds(flat[block]), strict=True):
                x[block] = found
        return bounds[0].view_as(logp), bounds[1].view_as(logp)

    def pushed(self, logp: Tensor, advantages: Tensor, cap: float) -> Tensor:
        """`s·b`, with s the sign of A and the bound b of one side for each token as `bounds` has it: half of the reads.

        Args:
            logp: `log p`, float32, `(batch, time)`, finite; NaN gives NaN.
            advantages: A, float, `(batch, 1)` or `(batch, time)`: above 0 for the upper bound, below 0 for the lower one.
            cap: The largest upper bound, finite.

        Returns:
            A float32 tensor of the shape of `logp`; 0 where A = 0.
        """
        if not is_plain(logp) or logp.device.type != "cpu" or logp.numel() <= _BLOCK:
            return self._pushed(logp, advantages, cap)
        found = torch.empty_like(logp)
        rows, width = max(_BLOCK // logp.shape[1], 1), min(_BLOCK, logp.shape[1])
        for top in range(0, len(logp), rows):
            for left in range(0, logp.shape[1], width):
                block = slice(top, top + rows), slice(left, left + width)
                found[block] = self._pushed(
                    logp[block], advantages[block if advantages.shape[1] > 1 else block[:1]], cap
                )
        return found

    def _pushed(self, logp: Tensor, advantages: Tensor, cap: float) -> Tensor:
        signs = advantages.sign().to(logp.dtype)
        up = signs.clamp_min(0.0)
        first, highest = (up * (self.last + 1)).to(torch.int32), up * cap  # s·b is between s and the cap, or -1 and 0
        row, u = self._places(logp.neg())
        index = (row + first).flatten()
        c0, c1, c2, c3 = (c.index_select(0, index).view_as(logp) for c in self.of_sides.unbind())
        return c3.mul_(u).add_(c2).mul_(u).add_(c1).mul_(u).add_(c0).mul_(signs).clamp(signs, highest)

    def _bounds(self, logp: Tensor) -> tuple[Tensor, Tensor]:
        negated = logp.neg()
        row, u = self._places(negated)
        a0, a1, a2, a3, b0, b1, b2, b3 = (c.index_select(0, row) for c in self.coefficients.unbind())
        impossible = negated.sub_(_LARGEST_LOG).clamp_min_(0.0)  # infinite for p = 0, and 0 for any p that is a number
        lower = a3.mul_(u).add_(a2).mul_(u).add_(a1).mul_(u).add_(a0).sub_(impossible).clamp(0.0, 1.0)
        upper = b3.mul_(u).add_(b2).mul_(u).add_(b1).mul_(u).add_(b0).add_(impossible).clamp_min_(1.0)
        return lower, upper

    def _places(self, negated: Tensor) -> tuple[Tensor, Tensor]:
        """The row of each `-log p`, int32, and the place in it, from 0 to 1."""
        t = negated.clamp(0.0, self.end)
        x, first = t, torch.zeros((), dtype=torch.int32, device=t.device)
        for center, left, right in self.centers:
            shift = t - center
            distance = shift.abs()
            side = _if_negative(shift).mul_(right - left).add_(right)
            first = _choose(_if_negative(distance - x), side, first)
            x = torch.minimum(x, distance)
        bits = x.abs().view(torch.int32)  # without the sign, which a NaN may have
        # All ones where x < 1: numbers that are not negative have the order of their bits.
        fine = bits.sub(_BITS_OF_ONE).bitwise_right_shift_(31)
        octave = (bits >> SHIFT).sub_(FIRST_OCTAVE).clamp_min_(0).add_(first)
        scaled = t * PIECES
        cell = scaled.to(torch.int32)
        # The dtype is named: an integer times a Python float would take torch's default dtype.
        u_fine = (bits & FRACTION).to(torch.float32).mul_(2.0**-SHIFT)
        u = _choose(fine, u_fine.view(torch.int32), scaled.sub_(cell).view(torch.int32)).view(torch.float32)
        return _choose(fine, octave, cell.add_(self.uniform)).clamp(0, self.last), u  # NaN has no row


# torch.where takes ten times as long as an operation on integers, on a CPU without torch.compile.
def _if_negative(x: Tensor) -> Tensor:
    """All ones, the int32 -1, where a float32 has its sign bit set, and else 0."""
    return x.view(torch.int32) >> 31


def _choose(flags: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """`yes` where the int32 flags are all ones, `no` where they are 0."""
    return (yes ^ no).bitwise_and_(flags).bitwise_xor_(no)


def table_for(divergence: FDivergence, radius_low: float, radius_high: float, device: torch.device) -> Table | None:
    """The table of a region, from the cache; None, with one warning, if no table is accurate enough for the bounds.

    Args:
        divergence: The divergence.
        radius_low: Radius of the lower side.
        radius_high: Radius of the upper side.
        device: The device that holds the coefficients.
    """
    # hex() pins a float that torch.compile has made symbolic (the same code was called with another radius before)
    low, high = (float.fromhex(float(r).hex()) for r in (radius_low, radius_high))
    return _constant_table(divergence, low, high, str(device))


def _constant(function: F) -> F:
    """Mark a function as `torch.compiler.assume_constant_result` does, which imports the compiler: two seconds more for all."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _constant_table(divergence: FDivergence, radius_low: float, radius_high: float, device: str) -> Table | None:
    return _cached_table(divergence, radius_low, radius_high, device)


# A schedule of radii makes a table for each; 64 of them are 50 MB.
@functools.lru_cache(maxsize=64)
def _cached_table(divergence: FDivergence, radius_low: float, radius_high: float, device: str) -> Table | None:
    # A new thread has none of the caller's modes: fake tensors, default device, inference, autocast.
    with ThreadPoolExecutor(max_workers=1) as pool:
        table = pool.submit(_build, divergence, radius_low, radius_high).result()
        if isinstance(table, Table):
            there = [pool.submit(x.to, device).result() for x in (table.coefficients, table.of_sides)]
            return table._replace(coefficients=there[0], of_sides=there[1])
    warnings.warn(
        f"The bounds of {divergence.name} at radius {(radius_low, radius_high)} bend too sharply for a float32 table: "
        f"{table}. Each call solves for them in float64 instead, which is slower and just as exact.",
        stacklevel=2,
    )
    return None


class _Pieces(NamedTuple):
    """The pieces of the domain: row `i` covers `t = center + sign·(start + u·width)`, `0 <= u < 1`."""

    start: Tensor
    width: Tensor
    center: Tensor
    sign: Tensor
    used: Tensor  # whether a float32 `t` leads to this row
    rounds: Tensor  # whether the distance to the center may have been rounded


def _build(divergence: FDivergence, radius_low: float, radius_high: float) -> Table | str:
    """The table, or the reason why there is none, for a message."""
    low, high = (torch.full((), r, dtype=torch.float64) for r in (radius_low, radius_high))

    def exact(t: Tensor) -> tuple[Tensor, Tensor]:
        log_lower, log_upper = log_bounds(divergence, -t, low, high)
        return log_lower.exp(), log_upper.exp()

    whole = torch.arange(1.0, MAX_LOG + 1, dtype=torch.float64)
    fits = log_bounds(divergence, -whole, low, high)[1] <= _LARGEST
    end = float(fits.sum().clamp_min(1))
    centers = [c for c in _saturation_points(divergence, low, high) if 0 < c < end]
    pieces, firsts, uniform = _lay_out(centers, end)

    u = (1 - (math.pi * torch.arange(9, dtype=torch.float64) / 8).cos()) / 2  # odd: nodes, even: where the error peaks
    t = (pieces.start.unsqueeze(1) + pieces.width.unsqueeze(1) * u) * pieces.sign.unsqueeze(
        1
    ) + pieces.center.unsqueeze(1)
    lower, upper = torch.zeros(2, *t.shape, dtype=torch.float64)
    lower[pieces.used], upper[pieces.used] = exact(t[pieces.used].clamp(0.0, end))
    at_end, _ = exact(torch.full((), end, dtype=torch.float64))
    if at_end > _HALF_UNIT:
        return f"the lower bound is {at_end:.3g} at log p = {-end:g}"
    above_lower, lower_error = _cover(lower, u, pieces)
    above_upper, upper_error = _cover(-upper, u, pieces)
    for name, error, unit in (
        ("lower", lower_error, 4 * _HALF_UNIT),
        ("upper", upper_error, 8 * _HALF_UNIT * upper.amin(1)),
    ):
        worst, row = torch.where(pieces.used, error / unit, 0.0).nan_to_num(nan=math.inf).max(0)
        if worst > 1:
            return f"the {name} one near log p = {-t[row, 4]:.4g} would be {4 * worst:.3g} units off, with 4 allowed"
    coefficients = torch.cat([above_lower, -above_upper]).contiguous()
    rows = tuple((c, left, right) for c, (left, right) in zip(centers, firsts, strict=True))
    of_sides = torch.cat(coefficients.chunk(2), dim=1)
    return Table(coefficients, of_sides, rows, uniform, end, last=coefficients.shape[1] - 1)


def _cover(values: Tensor, u: Tensor, pieces: _Pieces) -> tuple[Tensor, Tensor]:
    """Float32 cubics, `(4, rows)`, that evaluate to at least the `(rows, 9)` values, and the largest excess of each row."""
    powers = u.unsqueeze(0) ** torch.arange(4).unsqueeze(1)
    through_nodes = torch.inverse(powers[:, 1::2])
    slopes = (values[:, 1::2] @ through_nodes)[:, 1:].float()
    slopes[pieces.width == 0] = 0.0
    missing = values - slopes.double() @ powers[1:]
    least, most = missing.amin(1), missing.amax(1)
    # The last addition rounds by half a unit (a lower bound that rounds to more than 1, or an upper one to less, is held at 1);
    # each product by a share of the product; and the distance to a center by 2^-24, which is 16 times that in u.
    largest = values.abs().amax(1) * (1 + 2.0**-20)
    largest = torch.where(values.amax(1) > 0, largest.clamp_max(1 - 2.0**-30), largest)
    exponent: Tensor = torch.frexp(largest).exponent
    half_ulp = torch.ldexp(torch.ones_like(largest), exponent - 25).masked_fill(largest == 0, 0.0)
    products = slopes.double().abs().sum(1) * _HALF_UNIT * (3 + PIECES * pieces.rounds)
    margin = half_ulp + products + (most - least) / 4  # the last for peaks between the nine points
    wanted = most + margin
    constant = wanted.float()
    constant = torch.where(constant < wanted, constant.nextafter(torch.full_like(constant, math.inf)), constant)
    return torch.stack([constant, *slopes.unbind(1)]), constant - least + margin


def _saturation_points(divergence: FDivergence, low: Tensor, high: Tensor) -> list[float]:
    """`-log p` where the upper bound meets `1/p`, and where the lower bound meets 0, as float32 numbers."""

    def free_until(radius: Tensor) -> Tensor:  # largest t at which all the probability may go to the token
        return largest_feasible(lambda t: binary_divergence(t, -t, divergence) <= radius, like=radius)

    points = torch.stack([free_until(high), -log1mexp(-free_until(low))]).float()
    return sorted({float(p) for p in points})


def _lay_out(centers: list[float], end: float) -> tuple[_Pieces, list[tuple[int, int]], int]:
    """All pieces; the first rows on either side of each center; the offset of the uniform ones."""
    step = torch.arange(PIECES, dtype=torch.float64) / PIECES
    octaves = 2.0 ** torch.arange(_SMALLEST, 0, dtype=torch.float64).unsqueeze(1)
    zero = torch.zeros(1, dtype=torch.float64)
    start = torch.cat([zero, (octaves * (1 + step)).flatten()])
    width = torch.cat([zero, octaves.expand(-1, PIECES).flatten() / PIECES])
    points = torch.tensor([0.0, *centers], dtype=torch.float64)
    families = [(0.0, 1.0), *((c, sign) for c in centers for sign in (-1.0, 1.0))]
    parts = list[_Pieces]()
    for center, sign in families:
        to_nearest = (center + sign * start).unsqueeze(1).sub(points).abs().amin(1)
        # x is a multiple of the spacing of float32 numbers near half the center
        spacing = 2.0 ** (math.frexp(center)[1] - 27) if center else 0.0
        used = (to_nearest >= 0.875 * start) & ((start == 0) | (start >= spacing))
        at, signs = torch.full_like(start, center), torch.full_like(start, sign)
        parts.append(_Pieces(start, width, at, signs, used, used & (center > 0)))
    cells = torch.arange(PIECES, int(end * PIECES) + 1, dtype=torch.float64) / PIECES
    edges = torch.stack([cells, cells + 1 / PIECES])
    used = ((edges.unsqueeze(-1) - points).abs().amin(-1) >= 1).any(0)
    last = cells == end
    parts.append(
        _Pieces(
            torch.where(last, 0.0, cells),
            torch.where(last, 0.0, 1 / PIECES).double(),
            torch.where(last, end, 0.0).double(),
            torch.ones_like(cells),
            used | last,
            torch.zeros_like(last),
        )
    )
    pieces = _Pieces(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
    firsts = [((2 * k + 1) * len(start), (2 * k + 2) * len(start)) for k in range(len(centers))]
    return pieces, firsts, len(families) * len(start) - PIECES
