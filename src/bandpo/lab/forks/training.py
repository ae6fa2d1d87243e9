"""Policy gradients on a fork, vectorised over seeds, in float64, with the loss of the library."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bandpo.groups import group_advantages
from bandpo.lab.comparison.top import top_extras, top_tokens
from bandpo.lab.forks.policy import Fork
from bandpo.losses import aggregate
from bandpo.objective import Objective
from bandpo.terms import token_objective

Optimizer = Literal["adam", "sgd"]
MEASURES = ("mean", "passed", "entropy", "token_entropy", "right", "speed")
"""The measures of a run: those of the policy at its end, and the mean over training."""


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
        final: Each of `MEASURES`, `(seeds,)`.
        curve: `(rollouts + 1, seeds)`, the exact mean before each rollout and at the end.
        entropies: The same for the entropy of the fork.
    """

    final: dict[str, Tensor]
    curve: Tensor
    entropies: Tensor

    def as_json(self) -> dict[str, Any]:
        """The values of each seed, and the curves as means over seeds."""
        return {
            "final": {name: x.tolist() for name, x in self.final.items()},
            "curve": self.curve.mean(1).tolist(),
            "entropies": self.entropies.mean(1).tolist(),
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
    for _ in range(schedule.rollouts):
        before = theta.detach().log_softmax(-1)
        found = fork.measure(before)
        curve.append(found.mean)
        entropies.append(found.entropy)
        batch = sample(fork, before, schedule, generator, solves)
        for _ in range(schedule.epochs):
            order = torch.rand(seeds, schedule.rows, generator=generator).argsort(-1)
            for part in order.chunk(schedule.minibatches, 1):
                optimizer.zero_grad()
                loss(objective, theta, before, batch.part(part)).backward()
                optimizer.step()
    last = fork.measure(theta.detach())
    curve.append(last.mean)
    entropies.append(last.entropy)
    means = torch.stack(curve)
    return Outcome({**last._asdict(), "speed": means.mean(0)}, means, torch.stack(entropies))


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


def loss(objective: Objective, theta: Tensor, before: Tensor, batch: Batch) -> Tensor:
    """The sum over seeds of their losses, so that each seed's own logits get its own gradient.

    Args:
        objective: The objective.
        theta: Logits, `(seeds, places, options)`, with gradient.
        before: Log-probs of the policy that the batch was drawn from, the same shape.
        batch: The completions.
    """
    logp, at = theta.log_softmax(-1), batch.tokens.transpose(1, 2)
    new, old = (x.gather(2, at).transpose(1, 2).flatten(0, 1) for x in (logp, before))
    mask = torch.ones(new.shape, dtype=torch.bool)
    terms = token_objective(
        objective,
        logprobs=new,
        old_logprobs=old,
        rollout_logprobs=old,
        advantages=batch.advantages.flatten(),
        mask=mask,
        extras=_top(objective.top_k, logp, before, batch.tokens),
    )
    return -aggregate(terms.value, mask, objective.aggregation, normalizer=float(batch.tokens.shape[1]))


def _top(k: int | None, logp: Tensor, before: Tensor, tokens: Tensor) -> Mapping[str, Tensor]:
    """The extras of an objective that asks for the top K tokens; none for any other one."""
    if k is None:
        return {}
    old, new = (x.unsqueeze(1).expand(-1, tokens.shape[1], -1, -1).flatten(0, 1) for x in (before, logp))
    return top_extras(top_tokens(old, tokens.flatten(0, 1), k), new)


def _optimizer(name: Optimizer, theta: Tensor, rate: float) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam([theta], lr=rate, betas=(0.9, 0.95))
    return torch.optim.SGD([theta], lr=rate)
