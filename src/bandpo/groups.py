"""What a trainer makes of the groups of a batch besides advantages: duals, signal, which to keep, penalties of length."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_STEPS = 100  # halvings of log λ: to the last bit of float64 from any bracket


class KLDual(NamedTuple):
    """Multiplier and baseline of a KL ball, one of each for a group."""

    dual: Tensor
    """λ >= 0, in the units of the advantages; 0 for a group without spread."""
    baseline: Tensor
    """`b = λ log mean exp(A/λ)`; the solution is `ρ = exp((A - b)/λ)`."""


def kl_dual(advantages: Tensor, radius: float = 0.05, *, floor: float = 0.05) -> KLDual:
    """Multiplier of the KL trust region of each prompt, `max_ρ mean ρA  s.t.  mean ρ log ρ <= δ, mean ρ = 1`.

    The convex dual `g(λ) = λδ + λ log mean exp(A/λ)` (as in REPS and MPO) is least where KL(softmax(A/λ) ‖ uniform) = δ. That
    KL falls from log(G/k), for k completions that share the maximum, to 0: one root, found by bisection in log λ. Where
    δ >= log(G/k) the ball holds the best completions alone, the constraint is slack, and λ is `floor` times the spread; where
    all advantages are equal there is nothing to gain, and λ = 0. For small δ, `λ -> std(A)/√(2δ)`: dividing by the group's
    std, as GRPO does, is this trust region to first order. Part of our own reading of QUATRO, arXiv:2602.04620.

    Args:
        advantages: `(..., group_size)`; a constant added to a group changes its baseline only.
        radius: δ > 0, in nats for each sequence.
        floor: Smallest λ, in units of `max A - min A`.

    Returns:
        λ and b, `(..., 1)`, in the dtype of `advantages`; solved in float64. No gradient.

    Raises:
        ValueError: If `radius` or `floor` is not positive.

    Examples:
        >>> kl_dual(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])).dual
        tensor([[1.4973],
                [0.0000]])
    """
    if not (0 < radius < math.inf and 0 < floor < math.inf):
        raise ValueError(f"kl_dual: radius and floor must be positive numbers, got {radius} and {floor}")
    with torch.no_grad():
        a = advantages.detach().to(torch.float64)
        top = a.amax(-1, keepdim=True)
        spread = top - a.amin(-1, keepdim=True)
        unit = torch.where(spread > 0, spread, 1.0)
        x = (a - top) / unit  # in [-1, 0]: what follows does not depend on the scale of rewards
        # KL <= 1/(8λ²) by Hoeffding's lemma, so the root is below √(1/(8δ)).
        low, high = (torch.full_like(top, math.log(v)) for v in (floor, max(floor, math.sqrt(0.125 / radius))))
        for _ in range(_STEPS):
            middle = (low + high) / 2
            too_far = _tilted_kl(x, middle) > radius
            low, high = torch.where(too_far, middle, low), torch.where(too_far, high, middle)
        # `high` is feasible; where the floor is, the bisection closes in on it.
        dual = torch.where(spread > 0, high.exp() * unit, 0.0)
        log_mean = (x / high.exp()).logsumexp(-1, keepdim=True) - math.log(a.shape[-1])
        return KLDual(*(v.to(advantages.dtype) for v in (dual, top + dual * log_mean)))


def group_signal(rewards: Tensor, *, reward_range: float = 1.0) -> Tensor:
    """How much a group can teach, in [0, 1]: its variance over the largest one, `4·var/range²`.

    For rewards of 0 and 1 it is `4q(1-q)` at a share q of right answers: 1 where half are right, 0 where all agree.

    Args:
        rewards: `(..., group_size)`.
        reward_range: Largest less smallest possible reward.

    Returns:
        `(..., 1)`.

    Examples:
        >>> group_signal(torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
        tensor([[1.],
                [0.]])
    """
    if not 0 < reward_range < math.inf:
        raise ValueError(f"group_signal: reward_range must be a positive number, got {reward_range}")
    variance = rewards.var(-1, correction=0, keepdim=True)
    return (4 * variance / reward_range**2).clamp(max=1.0)


def informative(rewards: Tensor, group_size: int) -> Tensor:
    """Which completions stand in a group whose rewards differ, the ones that DAPO's dynamic sampling keeps (arXiv:2503.14476).

    Args:
        rewards: `(prompts * group_size,)`, the groups consecutive.
        group_size: Completions per prompt.

    Returns:
        Bool tensor of the shape of `rewards`.

    Examples:
        >>> informative(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2)
        tensor([ True,  True, False, False])
    """
    if rewards.dim() != 1 or group_size < 1 or rewards.numel() % group_size:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} do not split into groups of {group_size}")
    groups = rewards.view(-1, group_size)
    differs = (groups != groups[:, :1]).any(1, keepdim=True)
    return differs.expand(groups.shape).flatten()


def soft_overlong(lengths: Tensor, *, max_length: int, buffer: int) -> Tensor:
    """DAPO's penalty of long completions, added to the reward (arXiv:2503.14476, eq. 13).

    0 up to `max_length - buffer`, then falling linearly to -1 at `max_length`, and -1 beyond.

    Args:
        lengths: Tokens of each completion, integer or float.
        max_length: L_max, 20480 in the paper.
        buffer: L_cache, 4096 in the paper; `0 < buffer <= max_length`.

    Returns:
        float32 tensor of the shape of `lengths`.

    Examples:
        >>> soft_overlong(torch.tensor([10, 18, 20, 25]), max_length=20, buffer=4)
        tensor([ 0.0000, -0.5000, -1.0000, -1.0000])
    """
    if not 0 < buffer <= max_length:
        raise ValueError(
            f"soft_overlong: 0 < buffer <= max_length is required, got buffer={buffer}, max_length={max_length}"
        )
    return ((max_length - buffer - lengths.to(torch.float32)) / buffer).clamp(-1.0, 0.0)


def _tilted_kl(x: Tensor, log_dual: Tensor) -> Tensor:
    """KL(softmax(x/λ) ‖ uniform) along the last dimension, in nats."""
    z = (x / log_dual.exp()).log_softmax(-1)
    return (z.exp() * z).sum(-1, keepdim=True) + math.log(x.shape[-1])
