"""What happens at the edge of the interval: `(log_ratio, advantages, bounds) -> per-token objective` to be maximised.

Every gradient has one form, `A·r·w·∇log π`, with the weight `w(r, p, A)` that each docstring gives: 1 is the plain
importance-weighted policy gradient, 0 a token that does not move. Fix a keyword by `functools.partial`.

Args:
    log_ratio: `log r` at the ratio level of the objective, with gradient: `(batch, time)`, or `(batch, 1)` for sequences.
    advantages: A, `(batch, 1)` or `(batch, time)`.
    bounds: The interval of each token, two tensors of the shape of `log_ratio` or 0-d.
    mask: The tokens that are used, bool or 0/1, `(batch, time)`.
    logprobs: `log π` of the sampled tokens, with gradient, `(batch, time)`.
    old_logprobs: `log p` of the policy that the ratio is taken against, `(batch, time)`.

Returns:
    Objective of each token, to be maximised, of the shape of `log_ratio`.
"""

# ruff: noqa: D417 (the module's docstring describes the arguments that all functions take)

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bandpo._deprecations import moved_within
from bandpo._eager import ByHand
from bandpo._inputs import traits as traits
from bandpo.bounds import RatioBounds, outside
from bandpo.bounds.edges import past_the_edge
from bandpo.surrogates.stops import never, stops

Surrogate = Callable[..., Tensor]

__getattr__ = moved_within(__name__, {"log_stabilized": "experimental.log_stabilized"})

# exp(40) = 2e17: squares of such ratios, and sums of these, stay finite in float32.
MAX_LOG_RATIO = 40.0


def hold(log_ratio: Tensor) -> Tensor:
    """A log-ratio within ±40, in the shape of `log_ratio`; beyond, it stays there and has no gradient.

    One exploded token then cannot turn the batch's loss or gradient into NaN.

    Examples:
        >>> hold(torch.tensor([-200.0, 0.5, 90.0]))
        tensor([-40.0000,   0.5000,  40.0000])
    """
    return torch.nn.functional.hardtanh(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)  # a clamp with one backward operation


def ratio(log_ratio: Tensor) -> Tensor:
    """The ratio `r`, held within e^±40: `exp` of `hold`, in the shape of `log_ratio`.

    Examples:
        >>> ratio(torch.tensor([0.0, 0.5]))
        tensor([1.0000, 1.6487])
    """
    return hold(log_ratio).exp()


def _clip_by_hand(ratio: Tensor, advantages: Tensor, bounds: RatioBounds) -> ByHand:
    clamped = ratio.clamp(bounds.lower, bounds.upper)
    left = past_the_edge(ratio, clamped, advantages)
    value = torch.minimum(ratio * advantages, clamped * advantages)
    return ByHand(value, ratio, _inside(left), left > 0)


def _inside(left: Tensor) -> Tensor:
    """0 where `left` is positive, else 1: a product with such numbers is faster than a choice."""
    return 1 - left.sign().clamp_min_(0)


@stops(outside, slopes=_clip_by_hand)
def clip(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds) -> Tensor:
    """The pessimistic surrogate of PPO (arXiv:1707.06347, eq. 7): `min(r·A, r̃·A)` with `r̃` the ratio clamped to the bounds.

    `w = 1`, and 0 where the ratio has left on the side the advantage pushes to: `A > 0, r > upper` or `A < 0, r < lower`.

    Returns:
        The value of each token, in the shape of `log_ratio`.

    Examples:
        >>> edge = RatioBounds(torch.tensor(0.8), torch.tensor(1.2))
        >>> clip(torch.tensor([1.5, 0.5]).log(), torch.tensor([1.0, -1.0]), edge)
        tensor([ 1.2000, -0.8000])
    """
    r = ratio(log_ratio)
    return torch.minimum(r * advantages, r.clamp(bounds.lower, bounds.upper) * advantages)


def _outside_or_below(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds, c: float = 3.0) -> Tensor:
    r = ratio(log_ratio)
    return outside(log_ratio, advantages, bounds, ratio=r) | ((advantages < 0) & (r > c))


def _dual_clip_by_hand(ratio: Tensor, advantages: Tensor, bounds: RatioBounds, c: float = 3.0) -> ByHand:
    clamped = ratio.clamp(bounds.lower, bounds.upper)
    negative = (-advantages).sign().clamp_min_(0)
    left = torch.maximum(past_the_edge(ratio, clamped, advantages), (ratio - ratio.clamp(max=c)) * negative)
    least = torch.where(advantages < 0, c * advantages, -math.inf)
    value = torch.minimum(ratio * advantages, clamped * advantages).maximum(least)
    return ByHand(value, ratio, _inside(left), left > 0)


@stops(_outside_or_below, slopes=_dual_clip_by_hand)
def dual_clip(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds, c: float = 3.0) -> Tensor:
    """As `clip`, and for `A < 0` at least `c·A`: a bad token whose ratio explodes stops weighing (arXiv:1912.09729, eq. 5).

    `w` of `clip`, and 0 where `A < 0, r > c`. The BandPO paper's runs use `c = 10`, verl's default is 3.

    Args:
        c: The ratio above which a token of `A < 0` stops, at least 1.

    Returns:
        The value of each token, in the shape of `log_ratio`.

    Examples:
        >>> edge = RatioBounds(torch.tensor(0.8), torch.tensor(1.2))
        >>> dual_clip(torch.tensor([9.0]).log(), torch.tensor([-1.0]), edge, c=3.0)
        tensor([-3.])
    """
    pessimistic = clip(log_ratio, advantages, bounds)
    return torch.where(advantages < 0, torch.maximum(pessimistic, c * advantages), pessimistic)


def _mask_by_hand(ratio: Tensor, advantages: Tensor, bounds: RatioBounds, truncate: float | None = None) -> ByHand:
    left = past_the_edge(ratio, ratio.clamp(bounds.lower, bounds.upper), advantages)
    kept, inside = ratio if truncate is None else ratio.clamp(max=truncate), _inside(left)
    # In this order 0 stays 0, where the product of ratio and advantage would be infinite.
    return ByHand(kept * inside * advantages, kept, inside, left > 0)


@traits("membership")
@stops(outside, slopes=_mask_by_hand)
def mask(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds | Tensor, truncate: float | None = None) -> Tensor:
    """`r·A` inside, 0 where the ratio has left on the side the advantage pushes to (DPPO, arXiv:2602.04879, eq. 12).

    Its gradient is that of `clip` with the same bounds; the value differs by a constant of the policy. With `truncate`, C,
    the weight is `w = min(r, C)/r` inside (eq. 23). For the gradient alone nothing needs to be solved: pass the result of
    `in_band`, or of `TopK`, instead of bounds.

    Args:
        bounds: The interval of each token, or a bool tensor of the shape of `log_ratio`, True where a token is inside.
        truncate: C, the largest weight; None for no limit.

    Returns:
        The value of each token, in the shape of `log_ratio`.

    Examples:
        >>> edge = RatioBounds(torch.tensor(0.8), torch.tensor(1.2))
        >>> mask(torch.tensor([1.5, 1.1]).log(), torch.tensor([1.0, 1.0]), edge)
        tensor([0.0000, 1.1000])
        >>> mask(torch.tensor([1.5, 1.1]).log(), torch.tensor([1.0, 1.0]), torch.tensor([False, True]))
        tensor([0.0000, 1.1000])
    """
    r = ratio(log_ratio)
    left = outside(log_ratio, advantages, bounds, ratio=r)
    if truncate is not None:
        r = torch.where(r > truncate, _score(r.clamp(max=truncate), log_ratio), r)
    return (r * advantages).masked_fill(left, 0.0)


def _off_the_interval(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds) -> Tensor:
    del advantages
    r = ratio(log_ratio)
    return (r < bounds.lower) | (r > bounds.upper)


def _two_sided_by_hand(ratio: Tensor, advantages: Tensor, bounds: RatioBounds) -> ByHand:
    clamped = ratio.clamp(bounds.lower, bounds.upper)
    off = (ratio - clamped).abs()
    return ByHand(clamped * advantages, ratio, _inside(off), off * advantages.sign().abs() > 0)


@stops(_off_the_interval, slopes=_two_sided_by_hand)
def two_sided(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds) -> Tensor:
    """`r̃·A`, clamped on both sides whatever the sign of A (ABC-GRPO, arXiv:2601.03895), without PPO's minimum.

    `w = 1[lower <= r <= upper]`. With `Band("tv", 0.1)` its gradient is that of prime-rl's sign-blind mask,
    `|π - μ| <= 0.1`; the values differ by a constant of the policy. Other widths for A < 0: `bandpo.bounds.regions.BySign`.

    Returns:
        The value of each token, in the shape of `log_ratio`.

    Examples:
        >>> edge = RatioBounds(torch.tensor(0.8), torch.tensor(1.2))
        >>> two_sided(torch.tensor([1.5, 0.5]).log(), torch.tensor([-1.0, 1.0]), edge)
        tensor([-1.2000,  0.8000])
    """
    return ratio(log_ratio).clamp(bounds.lower, bounds.upper) * advantages


@stops(never)
def soft_edge(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds, temperature: float = 0.25) -> Tensor:
    """As `clip`, but past the edge the slope decays instead of vanishing; a smooth edge for any bounds (our own design).

    `w = sech²(x/T)` at the relative overshoot `x = r/edge - 1`, 1 inside; `T -> 0` is `clip`, `T -> ∞` no edge at all.

    Args:
        temperature: T > 0, in units of the relative overshoot.

    Returns:
        The value of each token, in the shape of `log_ratio`.

    Examples:
        >>> edge = RatioBounds(torch.tensor(0.8), torch.tensor(1.2))
        >>> soft_edge(torch.tensor([1.1, 1.5]).log(), torch.tensor([1.0, 1.0]), edge)
        tensor([1.1000, 1.4285])
    """
    r = ratio(log_ratio)
    edge = torch.where(advantages > 0, bounds.upper, bounds.lower)
    left = outside(log_ratio, advantages, bounds, ratio=r)
    # The branch that is not taken must be finite too: its gradient is multiplied by 0.
    safe = torch.where(left, edge, 1.0)
    past = safe * (1 + temperature * ((r / safe - 1) / temperature).tanh())
    return torch.where(left, past, r) * advantages


@stops(never)
def detach(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds, *, logprobs: Tensor) -> Tensor:
    """`sg(r̃)·A·log π`: the clamped ratio weighs, and no token is lost (CISPO, arXiv:2506.13585, eq. 4).

    `w = r̃/r`. `Clip(1, C - 1)` caps the weight at C.

    Returns:
        The value of each token, in the shape of `log_ratio`.

    Examples:
        >>> edge = RatioBounds(torch.tensor(0.0), torch.tensor(5.0))
        >>> detach(torch.tensor([8.0]).log(), torch.tensor([1.0]), edge, logprobs=torch.tensor([-0.5]))
        tensor([-2.5000])
    """
    return ratio(log_ratio).clamp(bounds.lower, bounds.upper).detach() * advantages * logprobs


@stops(never)
def soft(
    log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds, tau_positive: float = 1.0, tau_negative: float = 1.05
) -> Tensor:
    """`(4/τ) σ(τ(r - 1))·A`, a soft gate around r = 1 in place of an interval (SAPO, arXiv:2511.20347).

    `w = sech²(τ(r - 1)/2)`, with τ by the sign of A. The bounds are not used.

    Args:
        tau_positive: τ for `A > 0`, positive.
        tau_negative: τ for `A <= 0`, positive.

    Returns:
        The value of each token, in the shape of `log_ratio`.

    Examples:
        >>> soft(torch.tensor([0.0]), torch.tensor([1.0]), RatioBounds(torch.tensor(0.0), torch.tensor(9.0)))
        tensor([2.])
    """
    del bounds
    tau = torch.where(advantages > 0, torch.full_like(advantages, tau_positive), tau_negative)
    return torch.sigmoid(tau * (ratio(log_ratio) - 1)) * (4 / tau) * advantages


@stops(never)
def quadratic(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds) -> Tensor:
    """`r·A - |A|(r - 1)²/(2ε)`, ε the width on the side of the advantage (SPO, arXiv:2401.16025; CFPO, arXiv:2601.22801).

    `w = 1 - sign(A)(r - 1)/ε`: 0 at the edge, and past it the token is pulled back. CFPO derives it from a TV
    constraint and has SPO's formula (known to us from re-implementations). Its abstract counts no hyper-parameter besides
    those of the clip that it replaces: ε is the clip's. For A > 0 and large r the pull grows like `r²/ε`.

    Returns:
        The value of each token, in the shape of `log_ratio`.

    Examples:
        >>> edge = RatioBounds(torch.tensor(0.8), torch.tensor(1.2))
        >>> quadratic(torch.tensor([1.2]).log(), torch.tensor([1.0]), edge)
        tensor([1.1000])
    """
    r = ratio(log_ratio)
    width = torch.where(advantages > 0, bounds.upper - 1, 1 - bounds.lower)
    width = width.clamp_min(torch.finfo(width.dtype).eps)  # a token of p = 1 has none
    return r * advantages - advantages.abs() * (r - 1).square() / (2 * width)


@stops(never)
def quadratic_tv(
    log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds, *, old_logprobs: Tensor, delta: float = 12.5
) -> Tensor:
    """`r·A - |A|·p(r - 1)²/(2δ)`: `quadratic` with `ε = δ/p`, the width of a TV ball (DRPO, arXiv:2606.09821).

    `w = 1 - sign(A)(π - p)/δ`, which changes sign exactly on the boundary of DPPO's TV mask. With δ = 12.5, which the code of
    the authors' institution quotes from section 4 of the paper, it stays within [0.92, 1.08]. The bounds are not used.

    Args:
        delta: δ > 0, in units of probability.

    Returns:
        The value of each token, in the shape of `log_ratio`.

    Examples:
        >>> edge = RatioBounds(torch.tensor(0.0), torch.tensor(9.0))
        >>> half = torch.tensor([0.5]).log()
        >>> quadratic_tv(torch.tensor([1.2]).log(), torch.tensor([1.0]), edge, old_logprobs=half, delta=0.1)
        tensor([1.1000])
    """
    del bounds
    r, p = ratio(log_ratio), old_logprobs.clamp(max=0.0).exp()  # p <= 1 as for the bounds: inf · 0 would be NaN
    return r * advantages - advantages.abs() * p * (r - 1).square() / (2 * delta)


@traits("without_advantage")
@stops(never)
def kl_penalty(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds, beta: float | Tensor = 1.0) -> Tensor:
    """`r·A - β(r - 1 - log r)`: PPO's KL penalty in place of a clip (arXiv:1707.06347, eq. 8).

    The second term is an unbiased, non-negative estimate of KL(π_old ‖ π) from samples of π_old. `w = 1 - β(1 - 1/r)/A`. The
    bounds are not used. `Objective.with_penalty` changes β; `bandpo.schedules.Adaptive` says how, by the paper's rule.

    Args:
        beta: β >= 0, in objective per nat, a number or a 0-d tensor.

    Returns:
        The value of each token, in the shape of `log_ratio`.

    Examples:
        >>> kl_penalty(torch.tensor([0.1]), torch.tensor([1.0]), RatioBounds(torch.tensor(0.0), torch.tensor(9.0)))
        tensor([1.1000])
    """
    del bounds
    held = hold(log_ratio)
    r = held.exp()
    return r * advantages - beta * (r - 1 - held)


@traits("without_advantage")
@stops(never)
def log_quadratic(
    log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds, *, logprobs: Tensor, beta: float = 0.05
) -> Tensor:
    """`A·log π - β(log r)²/2`: a quadratic pull back to the old policy in place of a clip (DRO, arXiv:2405.19107).

    Each token is regressed on `log r = A/β`, which does not need samples of the current policy. `w = (1 - β log r/A)/r`. The
    bounds are not used. This is the form per token that verl and Tinker have (both `dro`); β is that of an example of
    Tinker, and verl has no default.

    Args:
        beta: β >= 0, in objective per squared nat.

    Returns:
        The value of each token, in the shape of `log_ratio`.

    Examples:
        >>> edge = RatioBounds(torch.tensor(0.0), torch.tensor(9.0))
        >>> log_quadratic(torch.tensor([2.0]), torch.tensor([1.0]), edge, logprobs=torch.tensor([-0.5]), beta=0.1)
        tensor([-0.7000])
    """
    del bounds
    return advantages * logprobs - 0.5 * beta * hold(log_ratio).square()


@stops(outside)
def aspo(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds, c: float = 3.0, c_negative: float = 3.0) -> Tensor:
    """For A > 0 the inverse ratio weighs, `min(1/r, c)`; for A < 0 PPO's clip, with `min(r, c)` (ASPO, arXiv:2510.06062).

    Rare tokens of good answers are raised more, not less. A > 0: `w = min(1/r, c)/r` for `r <= upper`, else 0. A < 0: `w` of
    `clip`, times `min(r, c_negative)/r`: past the dual clip a token keeps a constant gradient, where `dual_clip` takes it
    away. Both rules, and c = 3 for both signs, are those of the authors' code (Archer 2.0), without its mask by entropy.

    Args:
        c: Largest inverse ratio that weighs for A > 0, positive.
        c_negative: Largest ratio that weighs for A < 0, at least 1; `math.inf` for no such limit.

    Returns:
        The value of each token, in the shape of `log_ratio`.

    Examples:
        >>> edge = RatioBounds(torch.tensor(0.8), torch.tensor(1.2))
        >>> aspo(torch.tensor([0.5, 0.1, 1.3]).log(), torch.ones(3), edge)
        tensor([2., 3., 0.])
        >>> aspo(torch.tensor([0.5, 2.0, 8.0]).log(), -torch.ones(3), edge)
        tensor([-0.8000, -2.0000, -3.0000])
    """
    r = ratio(log_ratio)
    inverse = _score(ratio(-log_ratio).clamp(max=c), log_ratio)
    positive = (inverse * advantages).masked_fill(outside(log_ratio, advantages, bounds, ratio=r), 0.0)
    negative = clip(log_ratio, advantages, bounds)
    if c_negative < math.inf:
        limit = _score(torch.full_like(log_ratio, c_negative), log_ratio)
        negative = torch.where(r > c_negative, limit * advantages, negative)
    return torch.where(advantages > 0, positive, negative)


def _outside_without_rest(
    log_ratio: Tensor,
    advantages: Tensor,
    bounds: RatioBounds,
    beta_low: float = 0.75,
    beta_high: float = 1.0,
    c: float = math.inf,
) -> Tensor:
    below = (advantages < 0) & (ratio(log_ratio) > c)
    if beta_low and beta_high:
        return below
    return below | outside(log_ratio, advantages, bounds) & torch.where(advantages > 0, beta_high == 0, beta_low == 0)


@stops(_outside_without_rest)
def reinsert(
    log_ratio: Tensor,
    advantages: Tensor,
    bounds: RatioBounds,
    beta_low: float = 0.75,
    beta_high: float = 1.0,
    c: float = math.inf,
) -> Tensor:
    """As `clip`, but clipped tokens keep a constant gradient, `β·edge·A` (CE-GPPO, arXiv:2509.20712).

    `w = β_low·lower/r` for `A < 0, r < lower`, `β_high·upper/r` for `A > 0, r > upper`, 0 for `A < 0, r > c`, and 1 elsewhere.
    The authors' scripts use β = (0.75, 1) for 7 billion weights and (0.5, 1) for 1.5 billion, with c = 10.

    Args:
        beta_low: β at the lower edge, at least 0; 0 is `clip` there.
        beta_high: β at the upper edge, at least 0.
        c: The ratio above which a token of `A < 0` stops, at least 1, as in `dual_clip`; `math.inf` for no such limit.

    Returns:
        The value of each token, in the shape of `log_ratio`.

    Examples:
        >>> edge = RatioBounds(torch.tensor(0.8), torch.tensor(1.2))
        >>> reinsert(torch.tensor([0.5, 12.0]).log(), torch.tensor([-1.0, -1.0]), edge, c=10.0)
        tensor([ -0.6000, -10.0000])
    """
    r = ratio(log_ratio)
    edge = torch.where(advantages > 0, beta_high * bounds.upper, beta_low * bounds.lower)
    left = outside(log_ratio, advantages, bounds, ratio=r)
    # A free side has no edge, and inf times a gradient of 0 would be NaN.
    kept = torch.where(left, _score(torch.where(left, edge, 1.0), log_ratio), r) * advantages
    return kept if c == math.inf else torch.where((advantages < 0) & (r > c), c * advantages, kept)


def _score(weight: Tensor, log_ratio: Tensor) -> Tensor:
    """Value `weight`, gradient `weight·∇log π`: the score-function form of a weight that is a constant of the update."""
    return weight.detach() * (1 + log_ratio - log_ratio.detach())
