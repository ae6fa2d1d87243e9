"""How far a token's own gradient reaches, and what an interval of the ratio does to the entropy under pure reward noise.

The policy is a softmax over logits θ, `π = softmax(θ)`, and one token `a` is sampled from it. Its term of the loss moves θ
along `s = e_a - π` alone. Three facts follow, with proofs in docs/halves.md:

* the clock: with small steps, `d(1/r)/dt = -A·|s|²`: the reciprocal of the ratio moves at a nearly constant speed until the
  edge stops it;
* the end of the update depends on nothing but the ratio at which it stops, so that the expected entropy under noise is a sum
  over tokens of their two ends;
* without an edge, and for any number of tokens, the second order in the step size has a closed form.

All functions take one policy `(tokens,)` in float64, of positive probabilities that add up to 1.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from bandpo.bounds import Bounds, RatioBounds

_POINTS = 200
"""Runge-Kutta steps of a token's own path from r = 1 to where it ends."""


def speed(policy: Tensor) -> Tensor:
    """The speed `|e_a - π|² = 1 - 2p_a + Σ p²` of each token's clock: how fast log r moves for each unit of `A·r·dt`.

    It lies between `(1-p)²` and `2(1-p)²`: a nearly certain token hardly moves by its own gradient.

    Args:
        policy: `(tokens,)`, float64.

    Returns:
        `(tokens,)`.

    Examples:
        >>> speed(torch.tensor([0.9, 0.1], dtype=torch.float64))
        tensor([0.0200, 1.6200], dtype=torch.float64)
    """
    return 1 - 2 * policy + policy.square().sum(-1, keepdim=True)


def entropy(policy: Tensor) -> Tensor:
    """Entropy in nats over the last dimension; a probability of 0 adds 0.

    Args:
        policy: `(..., tokens)`.

    Returns:
        `(...)`.
    """
    return cast(Tensor, torch.special.entr(policy)).sum(-1)


class Reach(NamedTuple):
    """How far a token's own gradient moves it in one rollout.

    Args:
        up: Ratio at which a token with A > 0 ends, `(probabilities,)`.
        down: Ratio at which a token with A < 0 ends, `(probabilities,)`.
        edge_up: Whether it was the edge that stopped it on its way up, and not the budget, bool.
        edge_down: The same on its way down.
    """

    up: Tensor
    down: Tensor
    edge_up: Tensor
    edge_down: Tensor


def reach(bounds: Bounds, probabilities: Tensor, budget: float) -> Reach:
    """How far the own gradient of a token moves it against one other outcome, the rest of the policy.

    Args:
        bounds: An interval of the ratio that is a function of the old log-probs alone.
        probabilities: p of tokens, `(probabilities,)`, float64, in (0, 1).
        budget: T = |A|·η·K.

    Returns:
        The ratios at the two ends.

    Raises:
        TypeError: If the bounds are no interval of the ratio.

    Examples:
        >>> from bandpo import Clip
        >>> found = reach(Clip(0.2), torch.tensor([0.01, 0.9], dtype=torch.float64), 1.0)
        >>> found.up.round(decimals=3), found.edge_up
        (tensor([1.2000, 1.0170], dtype=torch.float64), tensor([ True, False]))
    """
    ends: list[Ends] = []
    edges = _interval(bounds, probabilities.log())
    for edge in (edges.upper.log(), edges.lower.log()):
        paths = [
            own_path(torch.stack([p, 1 - p]), torch.stack([x, x]), budget)
            for p, x in zip(probabilities, edge, strict=True)
        ]
        ends.append(Ends(*(torch.stack([getattr(path, name)[0] for path in paths]) for name in Ends._fields)))
    return Reach(ends[0].log_ratio.exp(), ends[1].log_ratio.exp(), ends[0].stopped, ends[1].stopped)


def _interval(bounds: Bounds, old_logprobs: Tensor) -> RatioBounds:
    found = bounds(old_logprobs)
    if not isinstance(found, RatioBounds):
        raise TypeError(f"{bounds!r} is no interval for the ratio")
    return found


class Along(NamedTuple):
    """How the entropy changes along each token's own gradient, in units of `x = log r`.

    Args:
        slope: `dH/dx` at r = 1, `(tokens,)`. Positive where the rise of the token raises the entropy.
        curvature: `d²H/dx²` at r = 1, `(tokens,)`.
    """

    slope: Tensor
    curvature: Tensor

    @property
    def exponent(self) -> Tensor:
        """γ = curvature/slope of each token: `u^γ + l^γ = 2` is neutral for it to second order."""
        return self.curvature / self.slope


def along_own_gradient(policy: Tensor) -> Along:
    """Slope and curvature of the entropy along the path that a token's own gradient takes.

    With `s = e_a - π`, `F = diag(π) - ππᵀ`, `g = -π(log π + H)` the gradient of the entropy by the logits and M its Hessian:
    the slope is `g·s/|s|²`, and the curvature `(sᵀMs - gᵀFs)/|s|⁴ + 2 (g·s)(sᵀFs)/|s|⁶`.

    Args:
        policy: `(tokens,)`, float64.

    Returns:
        Slope and curvature of each token.

    Examples:
        >>> along_own_gradient(torch.tensor([0.9, 0.1], dtype=torch.float64)).slope.sign()
        tensor([-1.,  1.], dtype=torch.float64)
    """
    p, log_p, h = policy, policy.log(), entropy(policy)
    g = -p * (log_p + h)
    s = torch.eye(len(p), dtype=p.dtype) - p  # one row for each token
    through = p * s - p * (s @ p).unsqueeze(-1)  # F s
    bent = -through * (log_p + h) - p * (s - (s @ p).unsqueeze(-1) + (s @ g).unsqueeze(-1))  # M s
    n, rise = s.square().sum(-1), s @ g
    second = (s * bent).sum(-1) - through @ g
    slope = rise / n
    return Along(slope, second / n**2 + 2 * rise * (s * through).sum(-1) / n**3)


def second_order_drift(policy: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Expected change of the entropy when one sampled token is moved up to log-ratio `up` or down to `down`, equally likely.

    `½ Σ p [H'(x⁺ + x⁻) + ½H''(x⁺² + x⁻²)]`, exact to second order in x.

    Args:
        policy: `(tokens,)`, float64.
        up: `x⁺ >= 0` of each token, where the path of an advantage above 0 ends.
        down: `x⁻ <= 0` of each token.

    Returns:
        0-d tensor, in nats.
    """
    found = along_own_gradient(policy)
    first, second = found.slope * (up + down), found.curvature * (up.square() + down.square())
    return 0.5 * (policy * (first + 0.5 * second)).sum()


_LARGEST = 4.0
"""The largest upper edge that `neutral_upper` looks at."""


class Ends(NamedTuple):
    """Where the path of each token's own gradient ends.

    Args:
        log_ratio: log r at the end, `(tokens,)`.
        entropy: Entropy of the policy there, `(tokens,)`.
        stopped: Whether the edge stopped it, bool, `(tokens,)`; otherwise the budget did.
    """

    log_ratio: Tensor
    entropy: Tensor
    stopped: Tensor


class _Walk(NamedTuple):
    """The points of each token's path, from r = 1 to a goal.

    Args:
        goal: Last log-ratio of each token, `(tokens,)`.
        times: The budget that is used up at each point, `(tokens, points)`.
        entropies: Entropy of the policy at each point, `(tokens, points)`.
    """

    goal: Tensor
    times: Tensor
    entropies: Tensor

    def until(self, edge: Tensor, budget: float) -> Ends:
        """Where the paths end, linear between the points: at the edge, at the goal, or where the budget is used up."""
        at_edge = torch.where(self.goal == edge, _POINTS, edge / self.goal * _POINTS).clamp(max=_POINTS)
        k = (self.times < budget).sum(-1).clamp(1, _POINTS).unsqueeze(-1)
        t0, t1 = (self.times.gather(1, i).squeeze(-1) for i in (k - 1, k))
        at_budget = k.squeeze(-1) - 1 + ((budget - t0) / (t1 - t0).clamp_min(1e-300)).clamp(0, 1)
        place = torch.where(self.times[:, -1] <= budget, at_edge, torch.minimum(at_edge, at_budget))
        low = place.floor().long().clamp(0, _POINTS - 1).unsqueeze(-1)
        h0, h1 = (self.entropies.gather(1, i).squeeze(-1) for i in (low, low + 1))
        inside = edge.abs() <= self.goal.abs()
        x = torch.where(inside & (place == at_edge), edge, self.goal * place / _POINTS)
        return Ends(x, h0 + (place - low.squeeze(-1)) * (h1 - h0), inside & (place == at_edge))


def own_path(policy: Tensor, edge: Tensor, budget: float) -> Ends:
    """Follow `dθ/dx = s/|s|²` of every token, until the edge or until `∫ dx / (r|s|²)` has used up the budget.

    Args:
        policy: `(tokens,)`, float64.
        edge: log of the ratio at which the gradient of each token stops, `(tokens,)`: all of them >= 0, or all <= 0; infinite
            where there is no edge.
        budget: T = |A|·η·K, advantage times learning rate times steps, for a loss that is the mean over one token.

    Returns:
        The end of each path.
    """
    return _walk(policy, edge, budget).until(edge, budget)


def _walk(policy: Tensor, edge: Tensor, budget: float) -> _Walk:
    """The paths to the edges, by the method of Runge and Kutta; a path may end earlier, where the budget does not reach."""
    upward = bool((edge >= 0).all())
    farthest = _farthest(policy, budget, upward=upward)
    goal = torch.minimum(edge, farthest) if upward else torch.maximum(edge, farthest)
    step = (goal / _POINTS).unsqueeze(-1)
    eye = torch.eye(len(policy), dtype=policy.dtype)
    theta, used = policy.log().expand(len(policy), -1).clone(), torch.zeros_like(policy)
    times, entropies = [used], [entropy(policy).expand(len(policy))]

    def slopes(logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        s = eye - logits.softmax(-1)
        n = s.square().sum(-1)
        return s / n.unsqueeze(-1), (-x).exp() / n

    for i in range(_POINTS):
        x, h = step.squeeze(-1) * i, step.squeeze(-1)
        d1, t1 = slopes(theta, x)
        d2, t2 = slopes(theta + step / 2 * d1, x + h / 2)
        d3, t3 = slopes(theta + step / 2 * d2, x + h / 2)
        d4, t4 = slopes(theta + step * d3, x + h)
        theta = theta + step / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
        used = used + (h / 6 * (t1 + 2 * t2 + 2 * t3 + t4)).abs()
        times.append(used)
        entropies.append(entropy(theta.softmax(-1)))
    return _Walk(goal, torch.stack(times, -1), torch.stack(entropies, -1))


def _farthest(policy: Tensor, budget: float, *, upward: bool) -> Tensor:
    """A log-ratio that the budget does not reach: the speed of a token of probability q is at most 2(1-q)²."""
    if not upward:
        least = policy / (1 + 2 * budget)
        return -torch.log1p(2 * budget * (1 - least).square())
    left = 1 - 2 * budget * (1 - policy).square()
    return torch.minimum(-left.clamp_min(1e-300).log(), (1 - 1e-9) * -policy.log())


def one_token_drift(policy: Tensor, bounds: Bounds, budget: float) -> Tensor:
    """Expected change of the entropy in one rollout of one token under pure noise, exact for small steps and any interval.

    The token is drawn from the policy, its advantage is +1 or -1 with equal chance, and K steps of the rate `budget/K` are made
    on PPO's clipped objective, in the limit of many small steps.

    Args:
        policy: `(tokens,)`, float64.
        bounds: An interval of the ratio that is a function of the old log-probs alone.
        budget: T = η·K.

    Returns:
        0-d tensor, in nats.

    Raises:
        TypeError: If the bounds are no interval of the ratio.

    Examples:
        >>> from bandpo import Clip
        >>> p = torch.tensor([0.9, 0.05, 0.05], dtype=torch.float64)
        >>> [round(one_token_drift(p, Clip(0.2, high), 1.0).item(), 4) for high in (0.1, 0.2, 0.3)]
        [0.0022, 0.0031, 0.004]
    """
    found = _interval(bounds, policy.log())
    ends = [own_path(policy, edge.log(), budget).entropy for edge in (found.upper, found.lower)]
    return (policy * (0.5 * (ends[0] + ends[1]) - entropy(policy))).sum()


def free_drift(policy: Tensor, *, rate: float, steps: int, tokens: int = 1) -> Tensor:
    """Expected change of the entropy in one rollout under pure noise while no edge is reached, to second order in the rate.

    `η²/N·[K(K-1)·Σ g p (Σp² - p) + ½K² tr(M F)]`, for N sampled tokens, advantages of mean 0 and variance 1 that know nothing
    of the tokens, and K gradient steps of rate η on the mean of r·A. The first term comes from reuse; the second one
    is there with one step as well.

    Args:
        policy: `(tokens,)`, float64.
        rate: η.
        steps: K.
        tokens: N.

    Returns:
        0-d tensor, in nats.
    """
    p, log_p, h = policy, policy.log(), entropy(policy)
    g, eye = -p * (log_p + h), torch.eye(len(policy), dtype=policy.dtype)
    fisher = p.diag() - p.outer(p)
    hessian = -fisher * (log_p + h).unsqueeze(-1) - p.unsqueeze(-1) * (eye - p + g)
    reuse = steps * (steps - 1) * (g * p * (p.square().sum() - p)).sum()
    return rate**2 / tokens * (reuse + 0.5 * steps**2 * (hessian * fisher.T).sum())


def neutral_upper(policy: Tensor, lower: float, budget: float) -> float:
    """The fixed upper edge u that leaves the expected entropy unchanged in `one_token_drift`, for a fixed lower edge.

    Args:
        policy: `(tokens,)`, float64.
        lower: l, in (0, 1).
        budget: T = η·K.

    Returns:
        The largest neutral u below 4; NaN if there is none.

    Raises:
        ValueError: If `lower` is not between 0 and 1.
    """
    if not 0 < lower < 1:
        raise ValueError(f"neutral_upper: lower must be between 0 and 1, got {lower}")
    down = own_path(policy, torch.full_like(policy, math.log(lower)), budget).entropy
    path = _walk(policy, torch.full_like(policy, math.log(_LARGEST)), budget)

    def drift(upper: float) -> float:
        return (
            (
                policy
                * (
                    0.5 * (path.until(torch.full_like(policy, math.log(upper)), budget).entropy + down)
                    - entropy(policy)
                )
            )
            .sum()
            .item()
        )

    return _root(drift, 1.0, _LARGEST)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """The last place where a function crosses 0 from below; NaN if there is none between the two."""
    if function(high) <= 0:
        return math.nan
    points = [low + (high - low) * (i / 100) ** 2 for i in range(101)]
    below = [i for i, x in enumerate(points) if function(x) <= 0]
    if not below:
        return math.nan
    low, high = points[below[-1]], points[below[-1] + 1]
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return (low + high) / 2


def neutral_edge(lower: float, exponent: float) -> float:
    """The upper edge with `u^γ + l^γ = 2`: γ = 1 is symmetric in the ratio, and γ → 0 in its logarithm.

    Args:
        lower: l, in (0, 1].
        exponent: γ >= 0.

    Examples:
        >>> round(neutral_edge(0.8, 1.0), 4), round(neutral_edge(0.8, 0.5), 4), round(neutral_edge(0.8, 0.0), 4)
        (1.2, 1.2223, 1.25)
    """
    if exponent == 0:
        return 1 / lower
    return (2 - lower**exponent) ** (1 / exponent)
