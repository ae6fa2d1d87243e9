"""Where pairs come from and who labels them, for finite policies; and how large the batches of the rounds are.

A sampler maps the current policy to pairs, a label source maps the pairs' reward gaps to winners: any goes with any.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from bandpo._values import ByValue
from bandpo.preference.design import Design

Pairing = Literal["iid_conditional", "same_component"]


class Pairs(NamedTuple):
    """Indices `(..., n)` of prompts and of the two actions."""

    prompts: Tensor
    first: Tensor
    second: Tensor


class PairSampler(Protocol):
    """Draws n pairs; `policy` are the probabilities of the current one, `(..., prompts, actions)`."""

    def __call__(self, policy: Tensor, n: int, generator: torch.Generator) -> Pairs:
        """The pairs."""
        ...


@dataclass(frozen=True, eq=False)
class OnPolicy(ByValue):
    """Both actions from the current policy (arXiv:2601.08421, algorithm 1).

    Args:
        prompt_probs: `(prompts,)`.
    """

    prompt_probs: Tensor

    def __call__(self, policy: Tensor, n: int, generator: torch.Generator) -> Pairs:
        """Draw pairs."""
        x = draw(self.prompt_probs.expand(*policy.shape[:-2], n, -1), generator)
        actions = _rows(policy, x)
        return Pairs(x, draw(actions, generator), draw(actions, generator))


@dataclass(frozen=True, eq=False)
class Offline(ByValue):
    """Both actions from a fixed policy, whatever the current one is.

    Args:
        prompt_probs: `(prompts,)`.
        behaviour: `(prompts, actions)`, probabilities.
    """

    prompt_probs: Tensor
    behaviour: Tensor

    def __call__(self, policy: Tensor, n: int, generator: torch.Generator) -> Pairs:
        """Draw pairs."""
        return OnPolicy(self.prompt_probs)(self.behaviour.expand_as(policy), n, generator)


@dataclass(frozen=True, eq=False)
class HybridDesign(ByValue):
    """Part from the current policy, part from a preferential G-optimal design (arXiv:2601.08421, algorithm 2).

    Args:
        prompt_probs: `(prompts,)`.
        design: From `preferential_g_optimal`.
        mix: Share of the design; the paper's is ½.
        pairing: "iid_conditional" draws both actions from the mixture given the prompt (the literal reading of "from the
            joint"); "same_component" both from the policy or both from the design. The proof covers either.
    """

    prompt_probs: Tensor
    design: Design
    mix: float = 0.5
    pairing: Pairing = "iid_conditional"

    def __post_init__(self) -> None:
        if not 0 <= self.mix <= 1:
            raise ValueError(f"HybridDesign: mix must be in [0, 1], got {self.mix}")
        if self.pairing not in ("iid_conditional", "same_component"):
            raise ValueError(f"HybridDesign: pairing must be iid_conditional or same_component, got {self.pairing!r}")

    def __call__(self, policy: Tensor, n: int, generator: torch.Generator) -> Pairs:
        """Draw pairs."""
        design = self.design.prompts.unsqueeze(-1) * self.design.actions
        joint = torch.stack([(self.prompt_probs.unsqueeze(-1) * policy), design.expand_as(policy)], -3)
        share = torch.tensor([1 - self.mix, self.mix], dtype=policy.dtype)
        if self.pairing == "iid_conditional":
            mixed = (share.view(2, 1, 1) * joint).sum(-3)
            x = draw(mixed.sum(-1).unsqueeze(-2).expand(*policy.shape[:-2], n, -1), generator)
            actions = _rows(mixed, x)
        else:
            component = draw(share.expand(*policy.shape[:-2], n, 2), generator)
            x = draw(_rows(joint.sum(-1), component), generator)
            flat = joint.flatten(-3, -2)
            actions = _rows(flat, component * policy.shape[-2] + x)
        return Pairs(x, draw(actions, generator), draw(actions, generator))


def draw(weights: Tensor, generator: torch.Generator) -> Tensor:
    """One index for each row of non-negative weights, along the last dimension."""
    edges = weights.cumsum(-1)
    u = torch.rand(edges.shape[:-1], generator=generator, dtype=weights.dtype).unsqueeze(-1) * edges[..., -1:]
    return (
        torch.searchsorted(edges.contiguous(), u.contiguous(), right=True).squeeze(-1).clamp(max=weights.shape[-1] - 1)
    )


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """`table[..., index, :]`, batch dimensions together."""
    return table.gather(-2, index.unsqueeze(-1).expand(*index.shape, table.shape[-1]))


def first_wins(reward_gap: Tensor, *, stochastic: bool = True, generator: torch.Generator | None = None) -> Tensor:
    """Bradley-Terry labels: whether the first of each pair wins, with probability σ(gap); or always where the gap is positive.

    Args:
        reward_gap: Reward of the first less that of the second, any shape.
        stochastic: False gives the better one the win; a tie then goes to the second.
        generator: Of the labels.

    Examples:
        >>> first_wins(torch.tensor([2.0, -2.0]), stochastic=False)
        tensor([ True, False])
    """
    if not stochastic:
        return reward_gap > 0
    return torch.rand(reward_gap.shape, generator=generator, dtype=reward_gap.dtype) < reward_gap.sigmoid()


def batch_schedule(first: int, rounds: int, *, last: int, growth: float = 0.5, power: float = 1.0) -> list[int]:
    """Pairs of each round, large early and large last (arXiv:2601.08421, corollary 3.6): `first·η^(αk)`, then one batch `last`.

    Args:
        first: n_i, pairs of round 0.
        rounds: Rounds in all, at least 2.
        last: n_f, pairs of the last.
        growth: η in (0, 1], by which the error shrinks in a round.
        power: α >= 0.

    Examples:
        >>> batch_schedule(4000, 4, last=6000)
        [4000, 2000, 1000, 6000]
    """
    if first < 1 or last < 1 or rounds < 2:
        raise ValueError(f"batch_schedule: first and last at least 1, rounds at least 2; got {first}, {last}, {rounds}")
    if not (0 < growth <= 1 and power >= 0):
        raise ValueError(f"batch_schedule: growth in (0, 1] and power >= 0, got {growth} and {power}")
    return [max(1, math.ceil(first * growth ** (power * k))) for k in range(rounds - 1)] + [last]
