"""One Triton kernel for the clipped objective on CUDA: log-probs, advantages and mask in; value, gradient, bounds, sums out.

`policy_loss` uses it for CUDA tensors when Triton is installed and nothing is being compiled or transformed (`torch.compile`
fuses the plain path as well). It computes what the plain path computes, with the same table; tests/unit/test_kernel.py
compares the two, in Triton's interpreter or on a GPU.

Bytes that it moves for each token, with float32 log-probs and one advantage for each sequence: 9 read (two log-probs and the
mask) and 17 written (value, gradient, two bounds, one flag), so 26. The table is read from the cache.

The sums that the default metrics are made of are added up in the same pass: each block writes its five, and torch adds these
in float64. Nothing is added by atomics, so the sums are the same in each run.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.language.extra import libdevice

from bandpo.bounds import Band, Bounds, Clip, RatioBounds
from bandpo.bounds.band import round_inward
from bandpo.bounds.table import FIRST_OCTAVE, FRACTION, PIECES, SHIFT, Table, table_for
from bandpo.divergences import FDivergence
from bandpo.surrogates.token import MAX_LOG_RATIO

BLOCK = 1024
"""Tokens of one program, which `benchmarks/gpu` varies."""

WARPS = 4
"""Warps of one program, likewise."""

BYTES_PER_TOKEN = 26
"""What the kernel moves for a token in float32 with one advantage for each sequence."""

_INTERPRETED = triton.knobs.runtime.interpret  # when the kernel below is defined


class Fused(NamedTuple):
    """What one launch computes for `(batch, time)` tokens."""

    value: Tensor
    """`min(r·A, clamp(r)·A)` in float32, with gradient; 0 where the mask is off."""
    bounds: RatioBounds
    """The interval of each token, float32."""
    outside: Tensor
    """Which tokens have left it, bool, by the rule of `bandpo.bounds.outside`."""
    sums: Tensor | None
    """`(5,)` float32 over the tokens of the mask: their number, that of those outside, that of those outside with a ratio
    above 1, the sum of r, and the sum of `r - 1 - log r`. None where they were not asked for."""


def clipped_objective(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, bounds_of: Bounds, *, sums: bool = True
) -> Fused | None:
    """Per-token `min(r·A, clamp(r)·A)`, the bounds and which tokens are outside, in one pass that also makes the gradient.

    Args:
        logprobs: `(batch, time)`, float32 or 16-bit, with gradient.
        old_logprobs: The same shape.
        advantages: `(batch, 1)` or `(batch, time)`.
        mask: `(batch, time)`, bool: the tokens that are used, valid and finite; elsewhere value and gradient are 0.
        bounds_of: The objective's bounds.
        sums: Whether to add up what the default metrics are made of.

    Returns:
        Value, bounds, flags and sums; None where the kernel cannot be used: float64, tensor radii, kinked divergences,
        `relax`, bounds that are neither `Band` nor `Clip`.
    """
    if torch.float64 in (logprobs.dtype, old_logprobs.dtype, advantages.dtype):
        return None
    region = _region(bounds_of, logprobs.device)
    if region is None:
        return None
    value, lower, upper, outside, parts = _ClippedObjective.apply(
        logprobs, old_logprobs, advantages, mask, region, sums
    )  # type: ignore[no-untyped-call]
    # Counts of a block are exact in float32, those of a batch only in float64.
    found = parts.sum(1, dtype=torch.float64).float() if sums else None
    return Fused(value, RatioBounds(lower, upper), outside.view(torch.bool), found)


Region = tuple[Table | None, float, float]


def _region(bounds_of: Bounds, device: torch.device) -> Region | None:
    """Table and cap of a `Band`, or the two numbers of a `Clip`."""
    if isinstance(bounds_of, Clip):
        assert bounds_of.high is not None
        return None, 1 - bounds_of.low, 1 + bounds_of.high
    if not isinstance(bounds_of, Band) or bounds_of.relax is not None:
        return None
    low, high = bounds_of.radius if isinstance(bounds_of.radius, tuple) else (bounds_of.radius, bounds_of.radius)
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return None
    assert isinstance(bounds_of.divergence, FDivergence)
    table = table_for(bounds_of.divergence, low, high, device)
    return None if table is None else (table, 0.0, _float32_cap(bounds_of.max_ratio))


@functools.cache
def _float32_cap(max_ratio: float | None) -> float:
    if max_ratio is None:
        return float("inf")
    return float(round_inward(torch.tensor(max_ratio, dtype=torch.float64), torch.float32, up=False))


class _ClippedObjective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, region: Region, sums: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        table, fixed_lower, cap = region
        value, gradient, lower, upper = torch.empty((4, *logprobs.shape), dtype=torch.float32, device=logprobs.device)
        outside = torch.empty(logprobs.shape, dtype=torch.uint8, device=logprobs.device)
        centers = (*table.centers, (0.0, 0, 0), (0.0, 0, 0))[:2] if table else ((0.0, 0, 0),) * 2
        n = logprobs.numel()
        tensors = (x.contiguous() for x in (logprobs, old_logprobs, advantages, mask.view(torch.uint8)))
        programs = triton.cdiv(n, BLOCK)
        parts = torch.empty((5 if sums else 0, programs), dtype=torch.float32, device=logprobs.device)
        if n:
            with torch.cuda.device_of(logprobs):  # Triton launches on the current device, whatever the tensors are on
                _kernel[(programs,)](
                    *tensors, value, gradient, lower, upper, outside, parts, table.coefficients if table else value,
                    n, logprobs.shape[-1] if advantages.numel() < n else 1, fixed_lower, cap,
                    table.last + 1 if table else 0, table.uniform if table else 0, table.end if table else 0.0,
                    *centers[0], *centers[1],
                    TABULATED=table is not None, CENTERS=len(table.centers) if table else 0,
                    SUMS=sums, INTERPRETED=_INTERPRETED, BLOCK=BLOCK,
                    FIRST=FIRST_OCTAVE, BITS=SHIFT, FRACTION_BITS=FRACTION, PER_UNIT=PIECES, HOLD=MAX_LOG_RATIO,
                    num_warps=WARPS, enable_fp_fusion=False,  # each operation rounds by itself, as in the plain path
                )  # fmt: skip
        ctx.save_for_backward(gradient)
        ctx.dtype = logprobs.dtype
        ctx.mark_non_differentiable(lower, upper, outside, parts)
        ctx.set_materialize_grads(False)
        return value, lower, upper, outside, parts

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        return None if grads[0] is None else (grads[0] * gradient).to(ctx.dtype), *(None,) * 5


@triton.jit
def _kernel(
    new_ptr, old_ptr, advantage_ptr, mask_ptr, value_ptr, gradient_ptr, lower_ptr, upper_ptr, outside_ptr, parts_ptr,
    table_ptr, n, per_row, fixed_lower, cap, rows, uniform, end,
    center0, left0, right0, center1, left1, right1,
    TABULATED: tl.constexpr, CENTERS: tl.constexpr, SUMS: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr,
    FIRST: tl.constexpr, BITS: tl.constexpr, FRACTION_BITS: tl.constexpr, PER_UNIT: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    valid = tl.load(mask_ptr + at, mask=inside, other=0) != 0
    new = tl.load(new_ptr + at, mask=valid, other=0.0).to(tl.float32)
    old = tl.load(old_ptr + at, mask=valid, other=0.0).to(tl.float32)
    advantage = tl.load(advantage_ptr + at // per_row, mask=valid, other=0.0).to(tl.float32)
    if TABULATED:
        # The steps of Table.bounds. NaN must stay NaN, which a plain maximum would drop.
        t = tl.minimum(tl.maximum(-old, 0.0, propagate_nan=tl.PropagateNan.ALL), end, propagate_nan=tl.PropagateNan.ALL)
        x = t
        first = tl.full([BLOCK], 0, tl.int32)
        if CENTERS > 0:
            shift = t - center0
            nearer = tl.abs(shift) < x
            first = tl.where(nearer, tl.where(shift < 0, left0, right0), first)
            x = tl.where(nearer, tl.abs(shift), x)
        if CENTERS > 1:
            shift = t - center1
            nearer = tl.abs(shift) < x
            first = tl.where(nearer, tl.where(shift < 0, left1, right1), first)
            x = tl.where(nearer, tl.abs(shift), x)
        bits = x.to(tl.int32, bitcast=True)
        octave = tl.maximum((bits >> BITS) - FIRST, 0) + first
        scaled = t * PER_UNIT
        cell = tl.where(t == t, scaled, 0.0).to(tl.int32)
        fine = x < 1
        u = tl.where(
            fine, (bits & FRACTION_BITS).to(tl.float32) * (1.0 / (FRACTION_BITS + 1)), scaled - cell.to(tl.float32)
        )
        row = table_ptr + tl.minimum(tl.maximum(tl.where(fine, octave, cell + uniform), 0), rows - 1)
        lower = tl.load(row + 3 * rows) * u + tl.load(row + 2 * rows)
        lower = (lower * u + tl.load(row + rows)) * u + tl.load(row)
        upper = tl.load(row + 7 * rows) * u + tl.load(row + 6 * rows)
        upper = (upper * u + tl.load(row + 5 * rows)) * u + tl.load(row + 4 * rows)
        lower = tl.where(lower > 1.0, 1.0, lower)
        upper = tl.where(upper < 1.0, 1.0, upper)
        lower = tl.where(old == -float("inf"), 0.0, lower)
        upper = tl.where(old == -float("inf"), float("inf"), upper)
        upper = tl.where(upper > cap, cap, upper)
    else:
        lower = tl.full([BLOCK], 0.0, tl.float32) + fixed_lower
        upper = tl.full([BLOCK], 0.0, tl.float32) + cap
    log_ratio = new - old
    held = tl.abs(log_ratio) > HOLD
    x = tl.where(held, tl.where(log_ratio > 0, HOLD, -HOLD), log_ratio)
    # Triton's own exp is less accurate than torch's, which is this one; the interpreter has numpy's.
    if INTERPRETED:
        r = tl.exp(x)
    else:
        r = libdevice.exp(x)
    push = r * advantage
    clamped = tl.where(r < lower, lower, tl.where(r > upper, upper, r)) * advantage
    value = tl.where(clamped < push, clamped, push)
    value = tl.where(clamped == clamped, value, clamped)
    outside = ((advantage > 0) & (r > upper)) | ((advantage < 0) & (r < lower))  # the rule of bandpo.bounds.outside
    tl.store(value_ptr + at, value, mask=inside)
    tl.store(gradient_ptr + at, tl.where(outside | held, 0.0, push), mask=inside)
    tl.store(lower_ptr + at, lower, mask=inside)
    tl.store(upper_ptr + at, upper, mask=inside)
    tl.store(outside_ptr + at, outside.to(tl.uint8), mask=inside)
    if SUMS:
        used = valid & (lower == lower) & (upper == upper)  # not where one is NaN, as in bandpo.metrics
        stopped = outside & used
        part = parts_ptr + tl.program_id(0)
        step = tl.num_programs(0).to(tl.int64)
        tl.store(part, _sum(used.to(tl.float32), INTERPRETED))
        tl.store(part + step, _sum(stopped.to(tl.float32), INTERPRETED))
        tl.store(part + 2 * step, _sum((stopped & (log_ratio > 0)).to(tl.float32), INTERPRETED))
        tl.store(part + 3 * step, _sum(tl.where(used, r, 0.0), INTERPRETED))
        tl.store(part + 4 * step, _sum(tl.where(used, r - x - 1, 0.0), INTERPRETED))


@triton.jit
def _sum(x, INTERPRETED: tl.constexpr):
    # The interpreter cannot call tl.sum where Triton was imported before interpretation was chosen.
    if INTERPRETED:
        total = tl.reduce(x, 0, tl.standard._sum_combine)
    else:
        total = tl.sum(x, 0)
    return total
