"""PPO-Clip with a KL regulariser on a finite MDP, with exact gradients: the deterministic algorithm of arXiv:2512.16565.

Policies are softmax tables, the horizon is infinite and discounted, and the regularised value is
`V(ρ) = E[Σ γ^t (r - λ D(π(s), π_ref(s)))]`, where D is the forward KL(π_ref ‖ π) or the reverse KL(π ‖ π_ref). Everything is
float64 and nothing is sampled, so that convergence can be read to the last digits. We knew the paper from its abstract and a
description of its contents; which KL it calls forward is inferred from its constants.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from bandpo.bounds import Bounds, Clip, RatioBounds, outside
from bandpo.surrogates import clip

Regularizer = Literal["forward", "reverse"]


class MDP(NamedTuple):
    """A finite Markov decision process.

    Args:
        transition: `(states, actions, states)`, float64, the probabilities of the next state.
        reward: `(states, actions)`, float64.
        start: `(states,)`, float64, the probabilities of the first state.
        discount: γ, from 0 to below 1.
    """

    transition: Tensor
    reward: Tensor
    start: Tensor
    discount: float


class Evaluated(NamedTuple):
    """The values of a policy in a regularised MDP.

    Args:
        value: 0-d tensor, V(ρ).
        q: `(states, actions)`, the action values without the regulariser of the state itself.
        visits: `(states,)`, the discounted visits; they add up to 1/(1-γ).
    """

    value: Tensor
    q: Tensor
    visits: Tensor


@dataclass(frozen=True)
class Problem:
    """A regularised MDP.

    Args:
        mdp: The decision process.
        reference: `(states, actions)`, float64, the positive probabilities π_ref.
        strength: λ > 0.
        regularizer: `forward` for KL(π_ref ‖ π), `reverse` for KL(π ‖ π_ref).

    Raises:
        ValueError: If the regulariser is unknown, or λ is not positive.
    """

    mdp: MDP
    reference: Tensor
    strength: float = 0.2
    regularizer: Regularizer = "forward"

    def __post_init__(self) -> None:
        if self.regularizer not in get_args(Regularizer):
            raise ValueError(f"regularizer: got {self.regularizer!r}; choose forward or reverse")
        if not self.strength > 0:
            raise ValueError(f"strength must be positive, got {self.strength}")

    def divergence(self, log_policy: Tensor) -> Tensor:
        """The divergence `D(π(s), π_ref(s))` of each state, `(states,)`, for log-probs `(states, actions)`."""
        log_reference = self.reference.log()
        if self.regularizer == "forward":
            return (self.reference * (log_reference - log_policy)).sum(-1)
        return (log_policy.exp() * (log_policy - log_reference)).sum(-1)

    def evaluate(self, log_policy: Tensor) -> Evaluated:
        """The values and visits of a policy of log-probs `(states, actions)`, from two linear systems."""
        policy = log_policy.exp()
        chain = torch.einsum("sa,sat->st", policy, self.mdp.transition)
        system = torch.eye(len(chain), dtype=chain.dtype) - self.mdp.discount * chain
        gain = (policy * self.mdp.reward).sum(-1) - self.strength * self.divergence(log_policy)
        solve = cast("Callable[[Tensor, Tensor], Tensor]", torch.linalg.solve)
        values = solve(system, gain)
        q = self.mdp.reward + self.mdp.discount * self.mdp.transition @ values
        return Evaluated(self.mdp.start @ values, q, solve(system.T, self.mdp.start))

    def optimum(self, iterations: int = 400) -> tuple[Tensor, Tensor]:
        """The optimum by value iteration, with each state's maximiser in closed form.

        Reverse: `π ∝ π_ref exp(Q/λ)`. Forward: `π(a) = λ π_ref(a)/(ν - Q(a))`, with ν from `Σ π = 1` by bisection.

        Args:
            iterations: Number of value iterations.

        Returns:
            The optimal value at the start, a 0-d tensor, and the optimal policy `(states, actions)`.
        """
        values = torch.zeros(len(self.mdp.reward), dtype=torch.float64)
        policy = self.reference
        for _ in range(iterations):
            q = self.mdp.reward + self.mdp.discount * self.mdp.transition @ values
            policy = self._best(q)
            values = (policy * q).sum(-1) - self.strength * self.divergence(policy.log())
        return self.mdp.start @ values, policy

    def _best(self, q: Tensor) -> Tensor:
        if self.regularizer == "reverse":
            return (self.reference.log() + q / self.strength).softmax(-1)
        # Σ λ π_ref/(ν - Q) falls in ν; it is at least 1 at ν = max (Q + λ π_ref) and at most 1 at max Q + λ.
        low = (q + self.strength * self.reference).amax(-1, keepdim=True)
        high = q.amax(-1, keepdim=True) + self.strength
        for _ in range(100):
            middle = (low + high) / 2
            above = (self.strength * self.reference / (middle - q)).sum(-1, keepdim=True) > 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        policy = self.strength * self.reference / (high - q)
        return policy / policy.sum(-1, keepdim=True)


class Step(NamedTuple):
    """The measurements of one outer step.

    Args:
        value: V(ρ) of the frozen policy.
        squared_gradient: ‖∇_θ V(ρ)‖² at the frozen policy.
        clip_fraction: Share of state-action pairs that are clipped after the last inner step.
        smallest: The smallest probability π(a|s) of the frozen policy.
    """

    value: float
    squared_gradient: float
    clip_fraction: float
    smallest: float


def random_mdp(states: int = 5, actions: int = 4, discount: float = 0.8, seed: int = 0) -> MDP:
    """An MDP with random transitions (softmax of normals), rewards uniform in [0, 1] and a uniform start.

    Args:
        states: Number of states.
        actions: Number of actions.
        discount: γ.
        seed: Seed of transitions and rewards.
    """
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(states, actions, states, generator=g, dtype=torch.float64)
    reward = torch.rand(states, actions, generator=g, dtype=torch.float64)
    return MDP(logits.softmax(-1), reward, torch.full((states,), 1 / states, dtype=torch.float64), discount)


def ppo_clip(
    problem: Problem,
    *,
    outer: int = 100,
    inner: int = 8,
    step_size: float = 0.5,
    bounds: Bounds = Clip(0.2, 0.28),  # noqa: B008 (frozen)
    start: Tensor | None = None,
) -> tuple[list[Step], Tensor]:
    """Deterministic actor-only PPO: `inner` gradient steps on the clipped surrogate of each frozen policy.

    This is Algorithm 1 of arXiv:2512.16565. The surrogate is
    `L_n(θ) = Σ_s d_n(s) [Σ_a π_n min(r A, clip(r) A) - λ D(π_θ, π_ref)]`, with the exact advantages A and visits d_n of π_n. At
    θ_n, its gradient is the gradient of the regularised value.

    Args:
        problem: The regularised MDP.
        outer: Number of frozen policies.
        inner: K, the gradient steps for each frozen policy.
        step_size: η.
        bounds: Bounds of the ratio, an interval such as `Clip` or `Band`. `Clip(1, inf)` does not clip.
        start: `(states, actions)`, float64, the logits to start from; π_ref by default.

    Returns:
        A `Step` for each outer step, and the last logits `(states, actions)`.
    """
    theta = (problem.reference.log() if start is None else start).clone().requires_grad_()
    steps: list[Step] = []
    for _ in range(outer):
        old = theta.detach().log_softmax(-1)
        frozen = problem.evaluate(old)
        advantages = frozen.q - (old.exp() * frozen.q).sum(-1, keepdim=True)
        interval = bounds(old)
        assert isinstance(interval, RatioBounds)
        squared_gradient = 0.0
        for k in range(inner):
            new = theta.log_softmax(-1)
            gain = (old.exp() * clip(new - old, advantages, interval)).sum(-1)
            surrogate = (frozen.visits * (gain - problem.strength * problem.divergence(new))).sum()
            (gradient,) = torch.autograd.grad(surrogate, theta)
            if k == 0:
                squared_gradient = gradient.square().sum().item()
            theta = (theta.detach() + step_size * gradient).requires_grad_()
        clipped = outside(theta.detach().log_softmax(-1) - old, advantages, interval)
        steps.append(
            Step(frozen.value.item(), squared_gradient, clipped.double().mean().item(), old.exp().min().item())
        )
    return steps, theta.detach()


def safe_step_sum(problem: Problem, log_policy: Tensor, *, low: float, high: float) -> float:
    """The largest sum S_max of inner step sizes that the forward-KL theorem of arXiv:2512.16565 allows at a policy.

    It is `min{(1-γ)/(8C), (1-γ) log 2/(4 A_max + 8λ), 1/(4L)}` with
    `C = √2 A_max (1/log(1+ε_h) - 1/log(1-ε_l)) + 3 A_max + λ` and `L = 8 (r_max + λ ‖log π‖_∞)/(1-γ)³`, which has no uniform
    bound over policies. The constants come from a description of the paper.

    Args:
        problem: The regularised MDP.
        log_policy: `(states, actions)`, float64, log-probs of the policy.
        low: ε_l of the clip.
        high: ε_h of the clip.
    """
    rest, r_max = 1 - problem.mdp.discount, problem.mdp.reward.abs().max().item()
    worst = log_policy.abs().max().item()
    # |A| <= (range of the regularised return): rewards and the regulariser of one step, over a horizon 1/(1-γ)
    a_max = (r_max + problem.strength * problem.divergence(log_policy).max().item()) / rest
    c = math.sqrt(2) * a_max * (1 / math.log1p(high) - 1 / math.log1p(-low)) + 3 * a_max + problem.strength
    smooth = 8 * (r_max + problem.strength * worst) / rest**3
    return min(rest / (8 * c), rest * math.log(2) / (4 * a_max + 8 * problem.strength), 1 / (4 * smooth))
