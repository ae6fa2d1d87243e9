"""Policy gradients on a fork, vectorised over seeds, in float64, with the loss of the library."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from bandpo.bounds import RatioBounds
from bandpo.groups import group_advantages
from bandpo.lab.comparison.top import top_extras, top_tokens
from bandpo.lab.forks.policy import Fork
from bandpo.losses import aggregate
from bandpo.objective import Objective
from bandpo.terms import token_objective

Optimizer = Literal["adam", "sgd"]
MEASURES = ("mean", "passed", "entropy", "token_entropy", "right", "speed")
"""The measures of what a run reached: those of the policy at its end, and the mean over training."""

MOVES = ("moved_up", "moved_down", "beyond_up", "beyond_down")
"""The measures of how far the updates moved rare tokens: the mean of log(new probability / old one) of the sampled tokens with
A > 0 and with A < 0, and the share of them that ended above 1.2 and below 0.8 of their probability."""
TRACKED = 10
"""Rollouts, from the first one on, that `MOVES` count."""
RARE = 0.1
"""A token is rare below this probability under the policy that sampled it."""


@dataclass(frozen=True)
class Schedule:
    """How a policy is trained.

    Args:
        rollouts: Number of rollouts.
        queries: Groups of a rollout, each with a prompt of its own.
        group: Completions of a group.
        epochs: Passes over a rollout.
        minibatches: Optimiser steps of a pass.
        optimizer: `adam` (β 0.9 and 0.95) or `sgd`.

    Raises:
        ValueError: If a number is below 1, the rollout cannot be split, or the optimiser is unknown.
    """

    rollouts: int = 60
    queries: int = 32
    group: int = 8
    epochs: int = 2
    minibatches: int = 8
    optimizer: Optimizer = "adam"

    def __post_init__(self) -> None:
        numbers = (self.rollouts, self.queries, self.epochs, self.minibatches)
        if min(numbers) < 1 or self.group < 2 or self.rows % self.minibatches:
            raise ValueError(
                "Schedule: all numbers must be at least 1, a group needs 2 completions, and the completions of a rollout must "
                f"split into equal mini-batches; got {self!r}"
            )
        if self.optimizer not in ("adam", "sgd"):
            raise ValueError(f"optimizer: got {self.optimizer!r}; choose adam or sgd")

    @property
    def rows(self) -> int:
        """Completions of a rollout."""
        return self.queries * self.group

    @property
    def steps(self) -> int:
        """Optimiser steps on one rollout."""
        return self.epochs * self.minibatches


class Outcome(NamedTuple):
    """What training reached on each seed.

    Args:
        final: Each of `MEASURES` and `MOVES`, `(seeds,)`. A move is NaN on a seed without such a token.
        curve: `(rollouts + 1, seeds)`, the exact mean before each rollout and at the end.
        entropies: The same for the entropy of the fork.
        moves: Each of `MOVES` in each of the tracked rollouts, over the tokens of all seeds together.
    """

    final: dict[str, Tensor]
    curve: Tensor
    entropies: Tensor
    moves: dict[str, list[float]]

    def as_json(self) -> dict[str, Any]:
        """The values of each seed, and the curves as means over seeds."""
        return {
            "final": {name: x.tolist() for name, x in self.final.items()},
            "curve": self.curve.mean(1).tolist(),
            "entropies": self.entropies.mean(1).tolist(),
            "moves": self.moves,
        }


def train(
    fork: Fork, objective: Objective, schedule: Schedule, *, rate: float, seeds: int = 64, seed: int = 0
) -> Outcome:
    """Train one policy for each seed. The same seeds see the same random numbers under every objective.

    Args:
        fork: The problem.
        objective: An objective with the ratio of single tokens, and no extra inputs but top-K tokens.
        schedule: How the policy is trained.
        rate: Learning rate.
        seeds: Number of independent seeds.
        seed: Seed of the one generator that all of them share.

    Returns:
        The outcome of every seed.
    """
    generator = torch.Generator().manual_seed(seed)
    theta = fork.start().expand(seeds, -1, -1).clone().requires_grad_()
    optimizer = _optimizer(schedule.optimizer, theta, rate)
    solves = fork.solves()
    curve: list[Tensor] = []
    entropies: list[Tensor] = []
    counted: list[Tensor] = []
    for _ in range(schedule.rollouts):
        before = theta.detach().log_softmax(-1)
        found = fork.measure(before)
        curve.append(found.mean)
        entropies.append(found.entropy)
        batch = sample(fork, before, schedule, generator, solves)
        edges = _edges(objective, before)
        for _ in range(schedule.epochs):
            order = torch.rand(seeds, schedule.rows, generator=generator).argsort(-1)
            for part in order.chunk(schedule.minibatches, 1):
                optimizer.zero_grad()
                loss(objective, theta, before, batch.part(part), edges).backward()
                optimizer.step()
        if len(counted) < TRACKED:
            counted.append(count_moves(before, theta.detach().log_softmax(-1), batch))
    last = fork.measure(theta.detach())
    curve.append(last.mean)
    entropies.append(last.entropy)
    means = torch.stack(curve)
    counts = torch.stack(counted, -1)  # (2, 3, seeds, rollouts)
    final = {**last._asdict(), "speed": means.mean(0), **_moves(counts.sum(-1))}
    moves = {name: cast("list[float]", x.tolist()) for name, x in _moves(counts.sum(-2)).items()}
    return Outcome(final, means, torch.stack(entropies), moves)


def count_moves(before: Tensor, after: Tensor, batch: "Batch") -> Tensor:
    """How far the updates on one rollout moved its rare tokens, with A > 0 and with A < 0.

    Args:
        before: Log-probs of the policies that the batch was drawn from, `(seeds, places, options)`.
        after: The same after the updates.
        batch: The completions.

    Returns:
        For each sign the number of tokens, the sum of their log-ratios, and the number beyond 1.2 or below 0.8,
        `(2, 3, seeds)`.
    """
    at = batch.tokens.transpose(1, 2)
    old, new = (x.gather(2, at).transpose(1, 2) for x in (before, after))
    moved, rare = new - old, old.exp() < RARE
    sides: list[Tensor] = []
    for sign, beyond in ((1, moved > math.log(1.2)), (-1, moved < math.log(0.8))):
        chosen = rare & (batch.advantages * sign > 0).unsqueeze(-1)
        sides.append(torch.stack([x.flatten(1).sum(-1) for x in (chosen, moved * chosen, beyond & chosen)]))
    return torch.stack([x.double() for x in sides])


def _moves(counts: Tensor) -> dict[str, Tensor]:
    """Each of `MOVES`, `(n,)`, from counts `(2, 3, n)`; NaN where no token was counted."""
    (up, down), (far_up, far_down) = (counts[:, i] / counts[:, 0] for i in (1, 2))
    return dict(zip(MOVES, (up, down, far_up, far_down), strict=True))


class Batch(NamedTuple):
    """Completions of every seed.

    Args:
        tokens: `(seeds, rows, places)`, int64.
        advantages: `(seeds, rows)`, float64.
    """

    tokens: Tensor
    advantages: Tensor

    def part(self, rows: Tensor) -> "Batch":
        """The completions of the row numbers `(seeds, n)`."""
        chosen = rows.unsqueeze(-1).expand(-1, -1, self.tokens.shape[-1])
        return Batch(self.tokens.gather(1, chosen), self.advantages.gather(1, rows))


def sample(fork: Fork, logp: Tensor, schedule: Schedule, generator: torch.Generator, solves: Tensor) -> Batch:
    """One rollout of each seed, drawn from the exact policy by inversion, with advantages within groups of one prompt.

    Args:
        fork: The problem.
        logp: Log-probs of the policies, `(seeds, places, options)`.
        schedule: Sizes of the rollout.
        generator: Random numbers.
        solves: The table of `Fork.solves`.
    """
    seeds, rows = len(logp), schedule.rows
    uniform = torch.rand(seeds, fork.places, rows, generator=generator, dtype=torch.float64)
    total = logp.exp().cumsum(-1)
    tokens = torch.searchsorted(total / total[..., -1:], uniform, right=True).clamp_max(fork.options - 1)
    kinds = torch.randint(fork.types, (seeds, schedule.queries), generator=generator)
    kinds = kinds.repeat_interleave(schedule.group, 1)
    right = solves[kinds, tokens[:, 0]] & (tokens[:, 1:] == 0).all(1)
    flipped = torch.rand(seeds, rows, generator=generator) < fork.flip
    rewards = (right ^ flipped).double()
    advantages = group_advantages(rewards.flatten(), schedule.group, kind="std").view(seeds, rows)
    return Batch(tokens.transpose(1, 2), advantages)


def _edges(objective: Objective, before: Tensor) -> RatioBounds | None:
    """The interval of every option, found once for a rollout; None where the bounds ask for more than the old log-probs."""
    if objective.bounds_inputs or objective.top_k is not None:
        return None
    found = objective.bounds(before)
    return found if isinstance(found, RatioBounds) else None


def loss(objective: Objective, theta: Tensor, before: Tensor, batch: Batch, edges: RatioBounds | None = None) -> Tensor:
    """The sum over seeds of their losses, so that each seed's own logits get its own gradient.

    Args:
        objective: The objective.
        theta: Logits, `(seeds, places, options)`, with gradient.
        before: Log-probs of the policy that the batch was drawn from, the same shape.
        batch: The completions.
        edges: The intervals of all options, the same shape; None has them computed for the tokens of the batch.
    """
    logp, at = theta.log_softmax(-1), batch.tokens.transpose(1, 2)

    def of_batch(table: Tensor) -> Tensor:
        return table.gather(2, at).transpose(1, 2).flatten(0, 1)

    new, old = of_batch(logp), of_batch(before)
    mask = torch.ones(new.shape, dtype=torch.bool)
    terms = token_objective(
        objective,
        logprobs=new,
        old_logprobs=old,
        rollout_logprobs=old,
        advantages=batch.advantages.flatten(),
        mask=mask,
        extras=_top(objective, logp, before, batch.tokens),
        bounds=None if edges is None else RatioBounds(*map(of_batch, edges)),
    )
    return -aggregate(terms.value, mask, objective.aggregation, normalizer=float(batch.tokens.shape[1]))


def _top(objective: Objective, logp: Tensor, before: Tensor, tokens: Tensor) -> Mapping[str, Tensor]:
    """The extras of an objective that asks for the top K tokens; none for any other one."""
    if not objective.extras or objective.top_k is None:
        return {}
    old, new = (x.unsqueeze(1).expand(-1, tokens.shape[1], -1, -1).flatten(0, 1) for x in (before, logp))
    return top_extras(top_tokens(old, tokens.flatten(0, 1), objective.top_k), new)


def _optimizer(name: Optimizer, theta: Tensor, rate: float) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam([theta], lr=rate, betas=(0.9, 0.95))
    return torch.optim.SGD([theta], lr=rate)
