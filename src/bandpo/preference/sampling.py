"""Samplers of pairs and a source of labels for finite policies, and the sizes of the rounds' batches.

A sampler maps the current policy, a number of pairs and a generator to `Pairs`; a label source maps the pairs' reward gaps to
winners. Every sampler can be combined with every label source.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bandpo._inputs import check_int, check_tensor, check_values
from bandpo._values import ByValue
from bandpo.preference._checks import check_count, check_no_nan, check_weights
from bandpo.preference.design import Design

Pairing = Literal["iid_conditional", "same_component"]


class Pairs(NamedTuple):
    """Indices of prompts and of two actions each."""

    prompts: Tensor
    """Index of the prompt, `(..., n)`."""
    first: Tensor
    """Index of the first action, `(..., n)`."""
    second: Tensor
    """Index of the second action, `(..., n)`."""


@dataclass(frozen=True, eq=False)
class OnPolicy(ByValue):
    """Both actions from the current policy (arXiv:2601.08421, algorithm 1).

    Args:
        prompt_probs: Probabilities of the prompts, `(prompts,)`.

    Raises:
        TypeError: If the probabilities are not a float tensor.
        ValueError: If they have another shape, or one is negative or not finite.

    Examples:
        >>> policy = torch.tensor([[0.0, 1.0]])
        >>> OnPolicy(torch.ones(1))(policy, 3, torch.Generator().manual_seed(0)).first
        tensor([1, 1, 1])
    """

    prompt_probs: Tensor

    def __post_init__(self) -> None:
        _check_prompt_probs(self.prompt_probs)

    def __call__(self, policy: Tensor, n: int, generator: torch.Generator) -> Pairs:
        """Draw pairs."""
        check_weights("policy", policy, (len(self.prompt_probs), None))
        check_count("n", n, low=0)
        x = draw(self.prompt_probs.expand(*policy.shape[:-2], n, -1), generator)
        actions = _rows(policy, x)
        return Pairs(x, draw(actions, generator), draw(actions, generator))


@dataclass(frozen=True, eq=False)
class Offline(ByValue):
    """Both actions from a fixed policy, independent of the current one.

    Args:
        prompt_probs: Probabilities of the prompts, `(prompts,)`.
        behaviour: Probabilities of the fixed policy, `(prompts, actions)`.

    Raises:
        TypeError: If the probabilities are not float tensors.
        ValueError: If they have another shape, or one is negative or not finite.

    Examples:
        >>> fixed, policy = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> Offline(torch.ones(1), fixed)(policy, 3, torch.Generator().manual_seed(0)).first
        tensor([0, 0, 0])
    """

    prompt_probs: Tensor
    behaviour: Tensor

    def __post_init__(self) -> None:
        _check_prompt_probs(self.prompt_probs)
        check_weights("behaviour", self.behaviour, (len(self.prompt_probs), None))

    def __call__(self, policy: Tensor, n: int, generator: torch.Generator) -> Pairs:
        """Draw pairs."""
        check_weights("policy", policy, (len(self.prompt_probs), self.behaviour.shape[-1]))
        return OnPolicy(self.prompt_probs)(self.behaviour.expand_as(policy), n, generator)


@dataclass(frozen=True, eq=False)
class HybridDesign(ByValue):
    """A mixture of the current policy and a preferential G-optimal design (arXiv:2601.08421, algorithm 2).

    Args:
        prompt_probs: Probabilities of the prompts, `(prompts,)`.
        design: The result of `preferential_g_optimal`.
        mix: Share of the design, ½ in the paper.
        pairing: "iid_conditional" draws both actions from the mixture given the prompt (the literal reading of "from the
            joint"); "same_component" draws both from the policy or both from the design. The proof covers either.

    Raises:
        TypeError: If the probabilities are not a float tensor.
        ValueError: If `mix` is not in [0, 1], the pairing is unknown, or the probabilities do not fit the design.

    Examples:
        >>> from bandpo.preference import preferential_g_optimal
        >>> sample = HybridDesign(torch.ones(1), preferential_g_optimal(torch.eye(2).unsqueeze(0)), mix=1.0)
        >>> sample(torch.tensor([[1.0, 0.0]]), 4, torch.Generator().manual_seed(0)).prompts
        tensor([0, 0, 0, 0])
    """

    prompt_probs: Tensor
    design: Design
    mix: float = 0.5
    pairing: Pairing = "iid_conditional"

    def __post_init__(self) -> None:
        _check_prompt_probs(self.prompt_probs)
        if len(self.design.prompts) != len(self.prompt_probs):
            raise ValueError(
                f"HybridDesign: the design has {len(self.design.prompts)} prompts, prompt_probs {len(self.prompt_probs)}"
            )
        if not 0 <= self.mix <= 1:
            raise ValueError(f"HybridDesign: mix must be in [0, 1], got {self.mix}")
        if self.pairing not in ("iid_conditional", "same_component"):
            raise ValueError(f"HybridDesign: pairing must be iid_conditional or same_component, got {self.pairing!r}")

    def __call__(self, policy: Tensor, n: int, generator: torch.Generator) -> Pairs:
        """Draw pairs."""
        check_weights("policy", policy, tuple(self.design.actions.shape))
        check_count("n", n, low=0)
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


def _check_prompt_probs(prompt_probs: object) -> None:
    check_weights("prompt_probs", prompt_probs, (None,))
    assert isinstance(prompt_probs, Tensor)
    if prompt_probs.dim() != 1:
        raise ValueError(f"prompt_probs must be (prompts,), got shape {tuple(prompt_probs.shape)}")


def draw(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Sample one index for each row of non-negative weights, along the last dimension.

    Args:
        weights: `(..., n)`; rows need not be normalised.
        generator: Source of randomness.

    Returns:
        Indices, `(...)`.

    Raises:
        TypeError: If the weights are not a float tensor.
        ValueError: If a weight is negative or not finite, or a row has nothing to sample.
    """
    check_weights("weights", weights, (None,))
    edges = weights.cumsum(-1)
    check_values(edges[..., -1] > 0, edges[..., -1], "a row of weights must have a positive sum")
    u = torch.rand(edges.shape[:-1], generator=generator, dtype=weights.dtype).unsqueeze(-1) * edges[..., -1:]
    return (
        torch.searchsorted(edges.contiguous(), u.contiguous(), right=True).squeeze(-1).clamp(max=weights.shape[-1] - 1)
    )


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """`table[..., index, :]` with shared batch dimensions."""
    return table.gather(-2, index.unsqueeze(-1).expand(*index.shape, table.shape[-1]))


def first_wins(reward_gap: Tensor, *, stochastic: bool = True, generator: torch.Generator | None = None) -> Tensor:
    """Bradley-Terry labels: whether the first of each pair wins, with probability σ(gap).

    Args:
        reward_gap: Reward of the first less that of the second, any shape.
        stochastic: If False, the one with the higher reward always wins, and the second wins a tie.
        generator: Source of randomness of the labels.

    Returns:
        Bool, the same shape.

    Raises:
        TypeError: If the gap is not a float tensor.
        ValueError: If a gap is NaN.

    Examples:
        >>> first_wins(torch.tensor([2.0, -2.0]), stochastic=False)
        tensor([ True, False])
    """
    check_tensor("reward_gap", reward_gap)
    check_no_nan("reward_gap", reward_gap, fix="leave pairs without a score out")
    if not stochastic:
        return reward_gap > 0
    return torch.rand(reward_gap.shape, generator=generator, dtype=reward_gap.dtype) < reward_gap.sigmoid()


def batch_schedule(first: int, rounds: int, *, last: int, growth: float = 0.5, power: float = 1.0) -> list[int]:
    """Number of pairs in each round: `first·η^(αk)` in round k, then `last` (arXiv:2601.08421, corollary 3.6).

    Args:
        first: n_i, pairs of round 0.
        rounds: Number of rounds, at least 2.
        last: n_f, pairs of the last round.
        growth: η in (0, 1], the factor by which the error shrinks in a round.
        power: α >= 0.

    Raises:
        TypeError: If a number of pairs or rounds is not an integer.
        ValueError: If a number is out of range.

    Examples:
        >>> batch_schedule(4000, 4, last=6000)
        [4000, 2000, 1000, 6000]
    """
    for name, value in (("first", first), ("rounds", rounds), ("last", last)):
        check_int(f"batch_schedule: {name}", value)
    if first < 1 or last < 1 or rounds < 2:
        raise ValueError(f"batch_schedule: first and last at least 1, rounds at least 2; got {first}, {last}, {rounds}")
    if not (0 < growth <= 1 and power >= 0):
        raise ValueError(f"batch_schedule: growth in (0, 1] and power >= 0, got {growth} and {power}")
    return [max(1, math.ceil(first * growth ** (power * k))) for k in range(rounds - 1)] + [last]
