"""Exact and near-exact experiments, vectorised over thousands of seeds: bandits, token trees, the bottleneck itself.

They show what a trust region does where nothing else happens: a softmax policy, rewards that are known, and a rare best way.
The bandit and the tree are one thing, a tree of depth 1 being a bandit.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bandpo.bounds import Bounds, RatioBounds
from bandpo.groups import group_advantages
from bandpo.objective import Objective
from bandpo.terms import token_objective


@dataclass(frozen=True)
class Tree:
    """A chain of `depth` choices among `arms`; the best way takes the rare first arm each time.

    A way's reward is `best` for the rare way, `weak` for the way that takes the second arm each time, else `other`: at
    depth 1, a bandit. Policies are softmax tables, one for each prefix.

    Args:
        arms: At each choice.
        depth: Choices.
        rare: Probability of the rare arm at each choice, at the start.
        common: Probability of the weak arm; the others share the rest.
        best: Reward of the rare way.
        weak: Reward of the weak way.
        other: Reward of every other way.
    """

    arms: int = 10
    depth: int = 1
    rare: float = 0.01
    common: float = 0.4
    best: float = 1.0
    weak: float = 0.6
    other: float = 0.2

    def __post_init__(self) -> None:
        if self.arms < 3 or not 1 <= self.depth <= 4:
            raise ValueError(f"Tree: at least 3 arms and a depth of 1 to 4, got {self.arms} and {self.depth}")
        if not (self.rare > 0 and self.common > 0 and self.rare + self.common < 1):
            raise ValueError(
                f"Tree: rare and common must be positive and below 1 together, got {self.rare}, {self.common}"
            )

    @property
    def prefixes(self) -> int:
        """Tables of the policy: one for each beginning of a way."""
        return sum(self.arms**d for d in range(self.depth))

    def start(self) -> Tensor:
        """Logits `(prefixes, arms)`."""
        rest = (1 - self.rare - self.common) / (self.arms - 2)
        p = torch.tensor([self.rare, self.common] + [rest] * (self.arms - 2))
        return p.log().expand(self.prefixes, -1).clone()

    def rewards(self, ways: Tensor) -> Tensor:
        """Of ways `(..., depth)`."""
        best, weak = (ways == 0).all(-1), (ways == 1).all(-1)
        return torch.where(best, self.best, torch.where(weak, self.weak, self.other))

    def chance_of_best(self, logits: Tensor) -> Tensor:
        """Probability of the rare way, of logits `(..., prefixes, arms)`."""
        logp = logits.log_softmax(-1)[..., 0]
        total, at = logp[..., 0], 0
        for d in range(1, self.depth):
            at += self.arms ** (d - 1)  # the first table of level d belongs to the prefix of rare arms
            total = total + logp[..., at]
        return total.exp()


class Outcome(NamedTuple):
    """What the seeds did, `(seeds,)` each."""

    commits: Tensor  # whether P(best way) > 1/2 at the end
    value: Tensor  # reward averaged over the batches (area under the curve)
    entropy: Tensor  # of the first choice at the end, nats
    discovery: Tensor  # first batch in which the best way was drawn; the number of batches if never
    curve: Tensor  # (batches, seeds): P(best way)


def run_tree(
    tree: Tree,
    objective: Objective,
    *,
    learning_rate: float = 0.1,
    batches: int = 60,
    queries: int = 8,
    group: int = 8,
    epochs: int = 2,
    minibatches: int = 4,
    lag: int = 0,
    seeds: int = 1000,
    seed: int = 0,
    optimizer: str = "adam",
    noise: float = 0.0,
) -> Outcome:
    """Policy gradients on a tree, thousands of seeds at once; the same seeds see the same noise under every objective.

    Args:
        tree: The problem.
        objective: Its extras must be none; `sequence` ratios are those of a whole way.
        learning_rate: Of Adam (or of SGD).
        batches: Rollouts.
        queries: Groups of a rollout.
        group: Ways of a group.
        epochs: Passes over a rollout.
        minibatches: Steps of a pass.
        lag: Batches that the sampler is behind.
        seeds: How many.
        seed: Of all of them.
        optimizer: `adam` or `sgd`.
        noise: Chance that a reward is exchanged for 1 - reward.
    """
    if optimizer not in ("adam", "sgd"):
        raise ValueError(f"optimizer: got {optimizer!r}; choose adam or sgd")
    if lag < 0:
        raise ValueError(f"lag must be at least 0, got {lag}")
    g = torch.Generator().manual_seed(seed)
    theta = tree.start().expand(seeds, -1, -1).clone().requires_grad_()
    step = (
        torch.optim.Adam([theta], lr=learning_rate, betas=(0.9, 0.95))
        if optimizer == "adam"
        else torch.optim.SGD([theta], lr=learning_rate)
    )
    rows = queries * group
    total, discovery = torch.zeros(seeds), torch.full((seeds,), batches)
    curve: list[Tensor] = []
    past: deque[Tensor] = deque(maxlen=lag + 1)
    for batch in range(batches):
        with torch.no_grad():
            past.append(theta.log_softmax(-1))
            policy = past[0]
            ways, tables = _draw(tree, policy.exp(), torch.rand(seeds, rows, tree.depth, generator=g))
            old = _scores(policy, tables, ways)
            rewards = tree.rewards(ways)
            total += rewards.mean(1)
            discovery = torch.where((ways == 0).all(-1).any(1) & (discovery == batches), batch, discovery)
            if noise:
                rewards = torch.where(torch.rand(rewards.shape, generator=g) < noise, 1 - rewards, rewards)
            advantages = group_advantages(rewards.flatten(), group, kind=objective.advantage).view(seeds, rows)
            order = torch.rand(seeds, epochs, rows, generator=g).argsort(-1)
        for epoch in range(epochs):
            for part in order[:, epoch].chunk(minibatches, 1):
                chosen = part.unsqueeze(-1).expand(-1, -1, tree.depth)
                new = _scores(theta.log_softmax(-1), tables.gather(1, chosen), ways.gather(1, chosen))
                value = token_objective(
                    objective,
                    logprobs=new.flatten(0, 1),
                    old_logprobs=old.gather(1, chosen).flatten(0, 1),
                    rollout_logprobs=old.gather(1, chosen).flatten(0, 1),
                    advantages=advantages.gather(1, part).flatten(),
                    mask=torch.ones(new.shape[0] * new.shape[1], tree.depth),
                ).value
                step.zero_grad()
                (-value.mean(-1).sum() / part.shape[1]).backward()  # a mean for each seed, whose tables are its own
                step.step()
        curve.append(tree.chance_of_best(theta.detach()))
    logp = theta.detach()[:, 0].log_softmax(-1)
    return Outcome(curve[-1] > 0.5, total / batches, -(logp.exp() * logp).sum(-1), discovery, torch.stack(curve))


def largest_shift(bounds: Bounds, probabilities: Sequence[float]) -> list[float]:
    """How far one update may raise a token's probability before its gradient stops: `min(p·r_up, 1) - p`. The bottleneck.

    Under a fixed clip it is `ε·p`, next to nothing for rare tokens; under a ball it tends to q₀: `1 - e^(-δ)` for KL, δ for TV.
    The policy can still move further by momentum and through other tokens; this is what its own gradient may do.

    Args:
        bounds: A function of the old log-probs alone.
        probabilities: p.

    Examples:
        >>> from bandpo import KL, Band, Clip
        >>> [round(x, 5) for x in largest_shift(Clip(0.2), [0.001, 0.5])]
        [0.0002, 0.1]
        >>> [round(x, 5) for x in largest_shift(Band(KL, 0.05, max_ratio=None), [0.001, 0.5])]
        [0.05255, 0.15424]
    """
    p = torch.tensor(probabilities, dtype=torch.float64)
    found = bounds(p.log())
    if not isinstance(found, RatioBounds):
        raise TypeError(f"{bounds!r} is no interval for the ratio")
    return (torch.minimum(p * found.upper, torch.ones_like(p)) - p).tolist()


def updates_to_common(bounds: Bounds, rare: float, common: float = 0.5, limit: int = 10_000) -> int:
    """Fewest updates in which a token can rise from probability `rare` to `common`, each as far as its bound lets it.

    Examples:
        >>> from bandpo import KL, Band, Clip
        >>> updates_to_common(Clip(0.2), 1e-3), updates_to_common(Band(KL, 0.05), 1e-3)
        (35, 6)
    """
    p, count = rare, 0
    while p < common and count < limit:
        [shift] = largest_shift(bounds, [p])
        p, count = p + shift, count + 1
        if shift <= 0:
            return limit
    return count


def _draw(tree: Tree, policy: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Ways `(seeds, rows, depth)`, and the table that each choice is made from."""
    seeds, rows, depth = noise.shape
    ways, tables = (
        torch.zeros(seeds, rows, depth, dtype=torch.int64),
        torch.zeros(seeds, rows, depth, dtype=torch.int64),
    )
    prefix, first = torch.zeros(seeds, rows, dtype=torch.int64), 0
    for d in range(depth):
        tables[..., d] = first + prefix
        table = policy.gather(1, tables[..., d].unsqueeze(-1).expand(-1, -1, tree.arms))
        drawn = (table.cumsum(-1) <= noise[..., d : d + 1]).sum(-1).clamp_max(tree.arms - 1)
        ways[..., d] = drawn
        first, prefix = first + tree.arms**d, prefix * tree.arms + drawn
    return ways, tables


def _scores(logp: Tensor, tables: Tensor, ways: Tensor) -> Tensor:
    """Log-probs of choices `(seeds, rows, depth)`."""
    seeds, _, arms = logp.shape
    flat = logp.reshape(seeds, -1)
    return flat.gather(1, (tables * arms + ways).flatten(1)).view(ways.shape)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share.

    Examples:
        >>> [round(x, 3) for x in wilson(90, 100)]
        [0.826, 0.945]
    """
    z, p = 1.959963984540054, successes / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
