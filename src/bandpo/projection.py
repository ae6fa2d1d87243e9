"""The policy closest to the new one inside of a KL ball around the old one: a region that holds for the whole distribution.

A clip takes the gradient from a token that has left its interval; it bounds no update, and nothing but the sampled token. A
projection replaces the new distribution of each position by the nearest one in the ball, with a gradient through it.
`docs/projection.md` has the derivations.
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from bandpo._inputs import check_int, check_tensor, widened
from bandpo.bounds import Radius
from bandpo.bounds.band import radius_of_sides
from bandpo.divergences import MAX_LOG, REVERSE_KL

Direction = Literal["reverse", "forward"]

# Newton's steps in the variables below: 99.9% of random pairs are at the root after 12, the rest are bisected meanwhile
# (tests/unit/test_projection.py measures what is left).
_STEPS = 20


def project(logprobs: Tensor, old_logprobs: Tensor, radius: Radius, *, direction: Direction = "reverse") -> Tensor:
    """The distribution closest to the new policy inside of a KL ball around the old one, at each position.

    * "reverse": `min KL(q ‖ π)` with `KL(q ‖ π_old) <= ε`, TROLL's projection (arXiv:2510.03817), which gives
      `q ∝ (π_old^η · π)^(1/(1+η))`. For two outcomes it is the interval of `Band(REVERSE_KL)`.
    * "forward": `min KL(π ‖ q)` with `KL(π_old ‖ q) <= ε`, which gives the mixture `q = (π + η·π_old)/(1+η)` (our derivation).
      For two outcomes it is the interval of `Band(KL)`, without its cap.

    `η >= 0` makes the constraint an equality. The number of steps that find it does not depend on the data, and nothing is
    read by the host. A position that is inside of the ball keeps its log-probs bit by bit. After the projection no
    position is outside, with the rounding of the result counted (for a radius above `(2^-24 log p)²` in float32).

    A token that the old policy cannot sample (a log-prob of -inf) has probability 0 in the reverse projection, and keeps a
    share of its own in the forward one. A log-prob of the new policy below -700 counts as -700 in the projection.

    Args:
        logprobs: Log-probs of the new policy over the outcomes of a position, `(..., n)`, float; they should be normalised.
        old_logprobs: The same of the old policy, in the same order and shape; no gradient flows into it.
        radius: ε > 0 in nats, a number or a tensor that broadcasts to the positions, `(...)`. An entry that is not
            positive gives NaN.
        direction: Which of the two.

    Returns:
        Log-probs of the projection, `(..., n)`, in float64 for float64 input and otherwise in float32. The gradient is exact,
        by the implicit function theorem.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If the shapes differ, the radius is out of range, or the direction is unknown.

    Examples:
        >>> old, new = torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([[0.6, 0.4], [0.9, 0.1]])
        >>> project(new.log(), old.log(), 0.05).exp()
        tensor([[0.6000, 0.4000],
                [0.6568, 0.3432]])
    """
    check_tensor("logprobs", logprobs)
    check_tensor("old_logprobs", old_logprobs)
    if logprobs.shape != old_logprobs.shape or logprobs.dim() == 0:
        raise ValueError(
            f"logprobs has shape {tuple(logprobs.shape)} and old_logprobs {tuple(old_logprobs.shape)}; both must be (..., n), "
            "the log-probs of the same n outcomes"
        )
    new = widened(logprobs)
    found = projection(new, old_logprobs, radius, direction, unit=torch.finfo(new.dtype).eps / 2)
    projected = found.log_mixture(found.new, found.old).to(new.dtype)
    return torch.where(found.outside.unsqueeze(-1), projected, new)


def sparse_support(
    logits: Tensor, old_logits: Tensor, sampled: Tensor, k: int = 64, *, either: bool = False
) -> dict[str, Any]:
    """The inputs of `policy_loss` for the sparse set of `troll` and `TopK`, from the logits of both policies.

    The set is the top K tokens of the old policy, the sampled one and all others together. With `k` the size of the
    vocabulary it is the whole distribution.

    Args:
        logits: Logits or log-probs of the policy in training, `(batch, time, vocabulary)`, with gradient.
        old_logits: The same of the old policy; no gradient flows into it.
        sampled: Ids of the sampled tokens, integers, `(batch, time)`.
        k: K, at least 1; more than the vocabulary counts as the vocabulary.
        either: Whether the top K tokens of the new policy are in the set as well. The second entry of a token that is in
            both has a log-prob of -inf.

    Returns:
        `logprobs` and `old_logprobs` of the sampled tokens, and under `extras` the three that the objective takes.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the shapes do not fit, or `k` is below 1.

    Examples:
        >>> from bandpo import policy_loss
        >>> logits = torch.zeros(1, 2, 5, requires_grad=True)
        >>> inputs = sparse_support(logits, logits + 1, torch.tensor([[0, 3]]), k=3)
        >>> inputs["extras"]["topk_logprobs"].shape
        torch.Size([1, 2, 3])
        >>> loss, _ = policy_loss(**inputs, advantages=torch.ones(1), mask=torch.ones(1, 2), objective="troll")
        >>> loss.item()
        -1.0
    """
    for name, x in (("logits", logits), ("old_logits", old_logits)):
        check_tensor(name, x)
    check_tensor("sampled", sampled, floating=False)
    check_int("k", k)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if logits.dim() != 3 or logits.shape != old_logits.shape or sampled.shape != logits.shape[:2]:
        raise ValueError(
            f"logits {tuple(logits.shape)} and old_logits {tuple(old_logits.shape)} must be (batch, time, vocabulary), and "
            f"sampled {tuple(sampled.shape)} (batch, time)"
        )
    new, old = widened(logits).log_softmax(-1), widened(old_logits.detach()).log_softmax(-1)
    ids = old.topk(min(k, old.shape[-1])).indices
    top, old_top = new.gather(-1, ids), old.gather(-1, ids)
    if either:
        more = new.detach().topk(ids.shape[-1]).indices
        twice = (more.unsqueeze(-1) == ids.unsqueeze(-2)).any(-1)
        top = torch.cat([top, new.gather(-1, more).masked_fill(twice, -math.inf)], -1)
        old_top = torch.cat([old_top, old.gather(-1, more).masked_fill(twice, -math.inf)], -1)
        ids = torch.cat([ids, more], -1)
    chosen = sampled.unsqueeze(-1)
    return {
        "logprobs": new.gather(-1, chosen).squeeze(-1),
        "old_logprobs": old.gather(-1, chosen).squeeze(-1),
        "extras": {
            "topk_logprobs": top,
            "old_topk_logprobs": old_top,
            "sampled_in_topk": (ids == chosen).any(-1),
        },
    }


class Projection(NamedTuple):
    """The projection of each position as a mixture of its new and its old policy."""

    new: Tensor
    """Log-probs of the new policy, normalised over the outcomes, float64, `(..., n)`, with gradient."""
    old: Tensor
    """Log-probs of the old policy, normalised, float64, `(..., n)`."""
    outside: Tensor
    """Whether the new policy is outside of the ball, bool, `(...)`."""
    divergence: Tensor
    """KL divergence of the new policy, in the direction of the ball, float64, `(...)`, without gradient."""
    position: Tensor
    """Where the mixture is: the logarithm of the weight of the new policy (reverse), or its logit (forward), `(..., 1)`."""
    direction: Direction
    """Which projection it is."""

    def log_mixture(self, new: Tensor, old: Tensor) -> Tensor:
        """Log-probs of the projection for outcomes whose log-probs are given; without meaning inside of the ball.

        Args:
            new: Normalised log-probs of the new policy, `(..., m)`, for any m of the outcomes.
            old: The same of the old policy.

        Returns:
            float64 tensor `(..., m)`, with gradient.
        """
        if self.direction == "reverse":
            weight = self.position.exp()
            whole = _geometric(self.new, self.old, weight).logsumexp(-1, keepdim=True)
            return _geometric(new, old, weight) - whole
        possible = (new > -math.inf) | (old > -math.inf)
        log_weight, log_rest = (torch.nn.functional.logsigmoid(x) for x in (self.position, -self.position))
        mixed = torch.logaddexp(log_weight + _held(new), torch.where(possible, log_rest + old, 0.0))
        return torch.where(possible, mixed, -math.inf)


def projection(
    logprobs: Tensor, old_logprobs: Tensor, radius: Radius, direction: Direction, *, unit: float = 2.0**-53
) -> Projection:
    """What `project` does, before outcomes are put together: the mixture of each position.

    Args:
        logprobs: As in `project`.
        old_logprobs: As in `project`.
        radius: As in `project`.
        direction: As in `project`.
        unit: Relative rounding of log-probs that the result will have, for which room is left in the ball.

    Raises:
        TypeError: As in `project`.
        ValueError: As in `project`.
    """
    if direction not in get_args(Direction):
        raise ValueError(f"direction: got {direction!r}; choose one of {', '.join(get_args(Direction))}")
    if isinstance(radius, tuple):
        raise TypeError(f"radius: a projection has one for both sides, got the pair {radius!r}")
    radius_of_sides(radius)
    new, old = logprobs.to(torch.float64), old_logprobs.detach().to(torch.float64)
    new, old = (x - x.logsumexp(-1, keepdim=True) for x in (new, old))
    if isinstance(radius, torch.Tensor):
        epsilon = radius.detach().to(new).expand(new.shape[:-1]).unsqueeze(-1)
    else:
        epsilon = torch.full_like(new[..., :1], radius, requires_grad=False)
    with torch.no_grad():
        solve = _one_node if torch.compiler.is_compiling() else _solve
        position, outside, divergence, by_new = solve(new.detach(), old, epsilon, direction == "reverse", unit)
    # Its value is `position`; its derivative that of the implicit function theorem.
    moving = torch.where(new > -math.inf, new, 0.0)
    position = position + (by_new * (moving - moving.detach())).sum(-1, keepdim=True)
    return Projection(new, old, outside.squeeze(-1), divergence.squeeze(-1), position, direction)


def _held(new: Tensor) -> Tensor:
    return new.clamp_min(-MAX_LOG)


def _geometric(new: Tensor, old: Tensor, weight: Tensor) -> Tensor:
    """`log(π_old^(1-s) π^s)`, -inf where π_old is 0."""
    possible = old > -math.inf
    base = torch.where(possible, old, 0.0)
    return torch.where(possible, base + weight * (_held(new) - base), -math.inf)


class _Point(NamedTuple):
    """The divergence of a mixture at some position."""

    kl: Tensor
    slope: Tensor
    """The derivative of the divergence by the position."""
    blur: Tensor
    """How much a relative error of 1 in every log-prob of the mixture could add to it, to first order."""
    by_new: Tensor
    """Derivative of the position by the log-probs of the new policy on the ball's surface, times `slope`."""


def _reverse(new: Tensor, old: Tensor, position: Tensor) -> _Point:
    """`KL(q ‖ π_old) = Σ π_old h(x)` with `x = log(q/π_old)` and `h(x) = x e^x - e^x + 1 >= 0`: nothing cancels."""
    possible = old > -math.inf
    weight = position.exp()
    log_q = _geometric(new, old, weight)
    log_q = log_q - log_q.logsumexp(-1, keepdim=True)
    x, q = torch.where(possible, log_q - old, 0.0), log_q.exp()
    kl = (old.exp() * REVERSE_KL.of_log(x)).sum(-1, keepdim=True)
    centred = q * (x - kl)
    held = torch.where(possible, log_q, 0.0)
    blur = (centred * held).abs().sum(-1, keepdim=True)
    return _Point(kl, (centred * (x - kl)).sum(-1, keepdim=True), blur, -weight * centred)


def _forward(new: Tensor, old: Tensor, position: Tensor) -> _Point:
    """`KL(π_old ‖ q) = Σ π_old (y - log(1 + y))` with `y = q/π_old - 1 = s (π/π_old - 1)`: nothing cancels.

    Where π_old is 0, `q` has the mass `s π`, which the rest lacks; it is added.
    """
    possible = old > -math.inf
    log_weight, log_rest = (torch.nn.functional.logsigmoid(v) for v in (position, -position))
    d = torch.where(possible, _held(new) - old, 0.0)
    log_ratio = torch.logaddexp(log_rest, log_weight + d)
    y, p = log_weight.exp() * d.expm1(), old.exp()
    near = y.abs() < 0.003
    small = torch.where(near, y, 0.0)
    series = small.square() * (1 / 2 + small * (-1 / 3 + small * (1 / 4 + small * (-1 / 5 + small / 6))))
    elsewhere = log_weight.exp() * torch.where(possible, 0.0, new.exp()).sum(-1, keepdim=True)
    kl = (p * torch.where(near, series, y - log_ratio)).sum(-1, keepdim=True) + elsewhere
    slope = log_rest.exp() * ((p * y * (y * (-log_ratio).exp())).sum(-1, keepdim=True) + elsewhere)
    log_q = torch.where(possible, old, 0.0) + log_ratio
    blur = (p * y * log_q).abs().sum(-1, keepdim=True) + elsewhere * -log_weight
    return _Point(kl, slope, blur, torch.where(possible, p * (log_weight + d - log_ratio).exp(), 0.0))


def _solve(
    new: Tensor, old: Tensor, radius: Tensor, reverse: bool, unit: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Position, whether the new policy is outside, its divergence, and the position's derivative by its log-probs."""
    at = _reverse if reverse else _forward
    end = torch.zeros_like(radius) if reverse else torch.full_like(radius, MAX_LOG)
    impossible = (old == -math.inf) & (new > -math.inf)
    whole = at(new, old, end if reverse else torch.full_like(radius, math.inf)).kl
    binding = whole > radius
    outside = binding | impossible.any(-1, keepdim=True) if reverse else binding
    share = torch.where(binding, radius / whole, 1.0)
    if reverse:  # KL <= s²/2 · max variance of d, at most (its range)²/4
        d = torch.where(old > -math.inf, _held(new) - old, 0.0)
        spread = d.amax(-1, keepdim=True) - d.amin(-1, keepdim=True)
        low = ((8 * radius).sqrt() / spread.clamp_min(1e-300)).log().clamp(max=0.0)
        start = 0.5 * share.log()
    else:  # KL is convex in s and 0 at s = 0
        low = _logit(share)
        start = _logit(share.sqrt())
    position = _root(at, new, old, radius, low=low, high=end, start=torch.maximum(low, start), unit=unit)
    divergence = torch.where(outside & ~binding, math.inf, whole)
    position = torch.where(binding, position, end)
    point = at(new, old, position)
    return position, outside, divergence, torch.where(binding, point.by_new / point.slope, 0.0)


@torch.library.custom_op("bandpo::position_in_ball", mutates_args=())
def _one_node(
    new: Tensor, old: Tensor, radius: Tensor, reverse: bool, unit: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_solve` as one node of a compiled graph: its unrolled steps would take minutes to compile."""
    return _solve(new, old, radius, reverse, unit)


@_one_node.register_fake
def _(new: Tensor, old: Tensor, radius: Tensor, reverse: bool, unit: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del old, reverse, unit
    number = torch.empty_like(radius, memory_format=torch.contiguous_format)
    return (
        number,
        torch.empty_like(number, dtype=torch.bool),
        torch.empty_like(number),
        torch.empty_like(new, memory_format=torch.contiguous_format),
    )


def _logit(share: Tensor) -> Tensor:
    return (share.log() - (-share).log1p()).clamp(-MAX_LOG, MAX_LOG)


def _root(
    at: Any, new: Tensor, old: Tensor, radius: Tensor, *, low: Tensor, high: Tensor, start: Tensor, unit: float
) -> Tensor:
    """Where the divergence reaches the radius, less the room for rounding: Newton's method for its logarithm, bracketed."""
    x, target = torch.minimum(start, high), radius
    point = at(new, old, x)
    for step in range(_STEPS):
        gap = (point.kl / target).log()
        fits = gap <= 0
        low, high = torch.where(fits, x, low), torch.where(fits, high, x)
        newton = x - gap * point.kl / point.slope
        inside = (newton >= low) & (newton <= high)
        if step % 4 == 3:  # where Newton's method creeps
            inside = inside & (gap.abs() < 1e-3)
        x = torch.where(inside, newton, 0.5 * (low + high))
        point = at(new, old, x)
    # 2e-13 is the rounding of the divergence itself.
    room = 2 * (unit * point.blur + 2e-13 * radius) + unit * unit * MAX_LOG
    aimed = x - (point.kl - radius + room) / point.slope
    near = ((point.kl / radius).log().abs() < 1e-3) & aimed.isfinite()
    return torch.where(near, aimed, low)
