"""Checks for a user's own divergences, bounds, surrogates and inputs; an AssertionError or ValueError says what is wrong."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bandpo._inputs import PROVIDED, as_mask, inputs_of, traits_of
from bandpo.bounds import Bounds, RatioBounds, ratio_bounds
from bandpo.divergences import FDivergence, binary_divergence
from bandpo.surrogates import Surrogate

_RADII = (1e-4, 0.01, 0.05, 0.3, 2.0)
_LOGPS = (-50.0, -20.0, -7.0, -3.0, -1.0, -math.log(2), -0.3, -0.05, -1e-3, -1e-6, -1e-10)


def check_divergence(divergence: FDivergence) -> None:
    """Check that a divergence is an f-divergence, and that its bounds are right (docs/theory.md has the proofs).

    The generator: convex, `f(1) = 0`, not linear; `f_exp(t) = f(exp(t))` if given;
    `slope_at_infinity` is the limit of `f(u)/u`. The bounds, over a grid of p and δ:
    bracket 1 within `[0, 1/p]`; lie on the ball's surface or at the simplex' edge (the residual); widen with δ, narrow
    with p; mirror, `p·r_low(p) + (1-p)·r_up(1-p) = 1`; tend to `(0, ∞)` as `p → 0` and to `(r*, 1)` as `p → 1`, where
    `f(r*) + (1-r*)·lim f(u)/u = δ`.

    Args:
        divergence: The divergence to check.

    Raises:
        AssertionError: If a property does not hold; the message has the property, the place and the value.

    Examples:
        >>> check_divergence(FDivergence("mine", lambda u: 2 * (1 + u) - 4 * u.sqrt()))
        >>> check_divergence(FDivergence("below", lambda u: (u - 1).square() - (u - 1).abs() ** 3))
        Traceback (most recent call last):
        AssertionError: below: f must be >= 0, but f(2.04) = -0.0453
    """
    _check_generator(divergence)
    _check_slope_at_infinity(divergence)
    logp = torch.tensor(_LOGPS, dtype=torch.float64)
    previous = None
    for radius in _RADII:
        lower, upper = ratio_bounds(logp, divergence, radius, log=True)
        where = f"{divergence.name}, radius {radius:g}: "
        assert not (lower.isnan() | upper.isnan()).any(), f"{where}NaN bounds; f must be defined on all of u > 0"
        assert (lower <= 0).all(), f"{where}a lower bound is above 1"
        assert (upper >= 0).all(), f"{where}an upper bound is below 1"
        assert (upper <= -logp).all(), f"{where}an upper bound leaves the simplex"
        _check_residual(divergence, logp, lower, radius)
        assert _at_most(lower[:-1], lower[1:]), f"{where}the lower bound must grow with p"
        assert _at_most(upper[1:], upper[:-1]), f"{where}the upper bound must fall with p"
        if previous is not None:
            widens = _at_most(lower, previous[0]) and _at_most(previous[1], upper)
            assert widens, f"{where}the interval must widen with the radius"
        previous = lower, upper
        _check_mirror(divergence, radius)
        _check_limits(divergence, radius)


def check_bounds(bounds: Bounds, extras: Mapping[str, Tensor] | None = None) -> None:
    """Check that a bounds object maps log-probs to `0 <= lower <= 1 <= upper`, elementwise and without a gradient.

    Bounds that say which tokens are inside, without edges, must say so of every token whose ratio is 1. If the bounds ask for
    further inputs, they get a ratio and an advantage of 1, and the sampler's two most likely other tokens as its top K; other
    extras are 0 unless they are given. Bounds that are marked `of_batch` may depend on a token's neighbours.

    Args:
        bounds: The bounds to check.
        extras: Extras by name, each a 0-d tensor.

    Raises:
        AssertionError: If a property does not hold; the message names it.

    Examples:
        >>> from bandpo import Clip
        >>> check_bounds(Clip(0.2, 0.28))
    """
    logp = torch.tensor([-30.0, -3.0, -0.5, -0.01, -1e-6, 0.0], requires_grad=True)

    def call(logp: Tensor) -> tuple[Tensor, ...]:
        found = bounds(logp, **_needed(bounds, torch.zeros_like(logp), torch.ones_like(logp), logp, extras))
        return (found,) if isinstance(found, Tensor) else tuple(found)

    found = call(logp)
    if "membership" in traits_of(bounds):
        _check_membership(found, logp)
    else:
        _check_edges(found, logp)
    if "of_batch" in traits_of(bounds):
        return
    for i in range(len(logp)):
        alone = call(logp[i : i + 1])
        same = all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone, found, strict=True))
        assert same, f"the bounds of log p = {logp[i].item():g} depend on its neighbours"


def _check_edges(found: tuple[Tensor, ...], logp: Tensor) -> None:
    assert len(found) == 2, (
        "bounds return RatioBounds(lower, upper); if they say which tokens are inside, mark them with "
        "bandpo.traits('membership')"
    )
    lower, upper = found
    for name, b in (("lower", lower), ("upper", upper)):
        assert b.shape == logp.shape, f"{name} has shape {tuple(b.shape)}, the input {tuple(logp.shape)}"
        assert b.dtype == logp.dtype, f"{name} has dtype {b.dtype}, the input {logp.dtype}"
        assert not b.requires_grad, f"{name} carries a gradient: bounds are constants of the update"
    assert ((lower >= 0) & (lower <= 1)).all(), f"lower must be in [0, 1], got {lower.tolist()}"
    assert (upper >= 1).all(), f"upper must be >= 1, got {upper.tolist()}"


def _check_membership(found: tuple[Tensor, ...], logp: Tensor) -> None:
    inside = found[0]
    assert len(found) == 1 and inside.dtype == torch.bool, (
        f"bounds that are marked 'membership' return one bool tensor, got {len(found)} of {inside.dtype}"
    )
    assert inside.shape == logp.shape, f"the result has shape {tuple(inside.shape)}, the input {tuple(logp.shape)}"
    assert inside.all(), f"a token whose ratio is 1 must be inside, got {inside.tolist()}"


def check_surrogate(surrogate: Surrogate, extras: Mapping[str, Tensor] | None = None) -> None:
    """Check that a surrogate is elementwise, finite, and on policy (`r = 1`) has the policy gradient, `A`.

    The surrogate gets sequences of one token with old probability 0.5; other extras are 0 unless they are given.

    Args:
        surrogate: The surrogate to check.
        extras: Extras by name, each a 0-d tensor.

    Raises:
        AssertionError: If a property does not hold; the message names it.

    Examples:
        >>> from bandpo.surrogates import clip
        >>> check_surrogate(clip)
    """
    advantages = torch.tensor([[-2.0], [-0.5], [0.0], [0.5], [2.0]], dtype=torch.float64)
    edge = RatioBounds(torch.full_like(advantages, 0.8), torch.full_like(advantages, 1.2))
    old = torch.full_like(advantages, 0.5).log()

    def call(x: Tensor) -> Tensor:
        return surrogate(x, advantages, edge, **_needed(surrogate, x, advantages, old, extras))

    x = torch.zeros_like(advantages, requires_grad=True)
    value = call(x)
    assert value.shape == x.shape, f"the value has shape {tuple(value.shape)}, the input {tuple(x.shape)}"
    assert value.requires_grad, (
        "the value has no gradient by the log-ratio: it was detached, or made from other numbers"
    )
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert torch.allclose(slope, advantages), (
        f"on policy the gradient must be A = {advantages.flatten().tolist()}, got {slope.flatten().tolist()}"
    )
    for log_ratio in (-40.0, -1.0, -0.3, 0.1, 0.3, 2.0, 40.0):
        x = torch.full_like(advantages, log_ratio, requires_grad=True)
        value = call(x)
        (slope,) = torch.autograd.grad(value.sum(), x)
        assert value.isfinite().all(), f"at log r = {log_ratio} the value is {value.flatten().tolist()}"
        assert slope.isfinite().all(), f"at log r = {log_ratio} the gradient is {slope.flatten().tolist()}"


def check_logprobs(logprobs: Tensor, mask: Tensor | None = None, *, name: str = "logprobs") -> None:
    """Check the values of log-probs; the hot path leaves these checks out because they would stall the device.

    Args:
        logprobs: Log-probabilities, any shape.
        mask: The entries to check, the same shape, bool or 0 and 1; all by default.
        name: Name of the log-probs in messages.

    Raises:
        ValueError: If a value is NaN or above 0 by more than rounding (1e-6).

    Examples:
        >>> check_logprobs(torch.tensor([0.3, -1.0]), name="old_logprobs")
        Traceback (most recent call last):
        ValueError: old_logprobs: 1 of 2 values are above 0 (the largest is 0.3); pass log-probabilities, not logits
    """
    values = logprobs.detach() if mask is None else logprobs.detach()[as_mask(mask)]
    if nans := int(values.isnan().sum()):
        raise ValueError(f"{name}: {nans} of {values.numel()} values are NaN")
    if above := int((values > 1e-6).sum()):
        raise ValueError(
            f"{name}: {above} of {values.numel()} values are above 0 (the largest is {values.max():.3g}); "
            "pass log-probabilities, not logits"
        )


def _needed(
    component: Callable[..., Any],
    log_ratio: Tensor,
    advantages: Tensor,
    old: Tensor,
    extras: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """The further inputs that a component asks for, in the shape of its tokens."""
    given = {name: torch.zeros_like(old).detach() for name in inputs_of(component) if name not in PROVIDED}
    if unknown := set(extras or {}) - set(given):
        raise ValueError(
            f"extras: {', '.join(sorted(unknown))} is not asked for; choose from {', '.join(given) or 'none'}"
        )
    given |= {name: x.to(old.dtype).expand_as(old) for name, x in (extras or {}).items()}
    given |= {name: x for name, x in _top_k(old, log_ratio).items() if name in given and name not in (extras or {})}
    batch = {
        "logprobs": old + log_ratio,
        "old_logprobs": old,
        "log_ratio": log_ratio,
        "advantages": advantages,
        "mask": torch.ones_like(old, dtype=torch.bool),
    }
    return {name: batch[name] if name in PROVIDED else given[name] for name in inputs_of(component)}


def _top_k(old: Tensor, log_ratio: Tensor) -> dict[str, Tensor]:
    """Two other tokens with 1/2 and 1/4 of what the sampled token leaves, before and after its ratio changed."""
    shares = torch.tensor([0.5, 0.25], dtype=old.dtype).log()
    rest = [(-(x.detach().clamp(max=0.0)).expm1()).log().unsqueeze(-1) + shares for x in (old, old + log_ratio)]
    return {
        "old_topk_logprobs": rest[0],
        "topk_logprobs": rest[1],
        "sampled_in_topk": torch.zeros_like(old, dtype=torch.bool),
    }


def _at_most(a: Tensor, b: Tensor) -> bool:
    """Whether `a <= b` up to the accuracy that is promised for log-bounds, with some room for a less exact f."""
    return bool(((a <= b) | torch.isclose(a, b, rtol=1e-11, atol=1e-11)).all())


def _check_generator(divergence: FDivergence) -> None:
    name = divergence.name
    u = torch.logspace(-3, 3, 601, dtype=torch.float64)
    f = divergence(u)
    assert f.shape == u.shape and f.dtype == u.dtype, f"{name}: f must be elementwise and keep the dtype"
    one = divergence(torch.ones(1, dtype=torch.float64)).item()
    assert abs(one) <= 1e-12, f"{name}: f(1) must be 0, got {one:g}"
    lowest = int(f.argmin()) if f.min() < -1e-12 else None
    first = int((f < -1e-12).to(torch.int8).argmax())
    assert lowest is None, f"{name}: f must be >= 0, but f({u[first]:.3g}) = {f[first]:.3g}"
    assert f.max() > 1e-12, f"{name}: f must not be linear: every policy would have the divergence 0"
    slope = f.diff() / u.diff()
    bend = slope.diff()
    worst = int(bend.argmin())
    scale = slope[1:].abs() + slope[:-1].abs()
    noise = 1e-9 * scale + 1e-15 * (f[1:-1] + 1) / u.diff()[:-1]
    assert (bend >= -noise).all(), f"{name}: f must be convex, but its slope falls near u = {u[worst + 1]:.3g}"
    if divergence.f_exp is not None:
        # f in its plain form loses |f'|·ulp(u) and the rounding of the terms that cancel, each of order 1 + u + 1/u.
        gap = (divergence.f_exp(u.log()) - divergence.f(u)).abs()
        worst = int((gap / (f + 1)).argmax())
        assert (gap <= 1e-12 * (f + 1 + u)).all(), f"{name}: f_exp(log u) differs from f(u) at u = {u[worst]:.3g}"


def _check_slope_at_infinity(divergence: FDivergence) -> None:
    """Check `lim f(u)/u` against f(u)/u at e^150 and e^300, which rises to it, where these are numbers."""
    at = torch.tensor([150.0, 300.0], dtype=torch.float64)
    near, far = (float(x) for x in divergence.of_log(at) * (-at).exp())
    if not (math.isfinite(near) and math.isfinite(far)):
        return
    slope = divergence.recession
    reached = math.isclose(near, far, rel_tol=1e-6)
    right = math.isclose(slope, far, rel_tol=1e-5) if reached else slope >= far
    assert right, (
        f"{divergence.name}: slope_at_infinity, less the slope at 1, is {slope:g}, but f(u)/u is {near:g} at e^150 and {far:g} "
        "at e^300"
    )


def _check_residual(divergence: FDivergence, logp: Tensor, lower: Tensor, radius: float) -> None:
    """Check that the divergence is at most δ inside, and more a little further, unless the bound is the simplex' edge."""
    inner = binary_divergence(lower * (1 - 1e-9), logp, divergence)
    outer = binary_divergence(lower * (1 + 1e-9) - 1e-12, logp, divergence)
    where = f"{divergence.name}, radius {radius:g}, lower bound: "
    assert (inner <= radius * (1 + 1e-9) + 1e-12).all(), f"{where}the divergence there is above the radius"
    at_edge = lower.exp() == 0
    missed = (outer < radius * (1 - 1e-6) - 1e-12) & ~at_edge
    assert not missed.any(), f"{where}not the largest: log p = {logp[missed].tolist()}"


def _check_mirror(divergence: FDivergence, radius: float) -> None:
    p = torch.tensor([0.03, 0.2, 0.5, 0.8, 0.97], dtype=torch.float64)
    lower, _ = ratio_bounds(p.log(), divergence, radius)
    _, upper = ratio_bounds((1 - p).log(), divergence, radius)
    gap = (p * lower + (1 - p) * upper - 1).abs().max().item()
    assert gap <= 1e-11, f"{divergence.name}, radius {radius:g}: p·r_low(p) + (1-p)·r_up(1-p) is off 1 by {gap:.2g}"


def _check_limits(divergence: FDivergence, radius: float) -> None:
    where = f"{divergence.name}, radius {radius:g}: "
    rare, certain = torch.tensor([-600.0, 0.0], dtype=torch.float64).unsqueeze(-1)
    lower, upper = ratio_bounds(rare, divergence, radius)
    # r_low ≤ ε needs f(ε) ≤ δ/p, which a slowly growing f reaches only at a very small p, here e^-600.
    assert lower.item() < 1e-6, f"{where}the lower bound must tend to 0 as p → 0, got {lower.item():g}"
    assert upper.item() > 1e3, f"{where}the upper bound must grow without limit as p → 0, got {upper.item():g}"
    lower, upper = ratio_bounds(certain, divergence, radius)
    assert upper.item() == 1, f"{where}the upper bound of a certain token must be 1, got {upper.item():g}"
    shift = 1 - lower.item()
    cost = divergence(lower).item() + (shift * divergence.recession if shift else 0.0)
    free = lower.item() == 0 and cost <= radius
    full = math.isclose(cost, radius, rel_tol=1e-6, abs_tol=1e-11)
    none = shift <= 1e-9 and divergence.recession * 1e-9 > radius
    assert free or full or none, (
        f"{where}the lower bound of a certain token is {lower.item():g}, where f costs {cost:g}"
    )
