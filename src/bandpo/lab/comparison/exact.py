"""Policy gradients on bandits and token trees, vectorised over thousands of seeds, and where a token's gradient stops.

The problems isolate the effect of a trust region: the policy is a softmax table, all rewards are known, and the best way is
rare. A bandit is a tree of depth 1.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from bandpo._deprecations import warn_moved
from bandpo.bounds import Bounds, RatioBounds
from bandpo.groups import group_advantages
from bandpo.lab.comparison.devices import find_device, seeded
from bandpo.lab.comparison.top import top_extras, top_tokens
from bandpo.objective import Objective
from bandpo.reference import reference_kl
from bandpo.terms import token_objective


@dataclass(frozen=True)
class Tree:
    """A chain of `depth` choices among `arms`; a way is a sequence of choices. The best way takes the rare first arm each time.

    The reward is `best` for the way of first arms, `weak` for the way of second arms, and `other` for every other way. The
    policy has a softmax table for each prefix of a way.

    Args:
        arms: Number of arms at each choice.
        depth: Number of choices.
        rare: Initial probability of the first arm at each choice.
        common: Initial probability of the second arm; the other arms share the rest equally.
        best: Reward of the way of first arms.
        weak: Reward of the way of second arms.
        other: Reward of every other way.

    Raises:
        ValueError: If there are fewer than 3 arms, the depth is not 1 to 4, or the probabilities leave nothing to the others.
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
        """The number of the policy's tables, one for each prefix of a way."""
        return sum(self.arms**d for d in range(self.depth))

    def start(self, device: torch.device | None = None) -> Tensor:
        """The initial logits, `(prefixes, arms)`.

        Args:
            device: Their device; None is PyTorch's default.
        """
        rest = (1 - self.rare - self.common) / (self.arms - 2)
        p = torch.tensor([self.rare, self.common] + [rest] * (self.arms - 2), device=device)
        return p.log().expand(self.prefixes, -1).clone()

    def rewards(self, ways: Tensor) -> Tensor:
        """The rewards of ways `(..., depth)`, of shape `(...)`."""
        best, weak = (ways == 0).all(-1), (ways == 1).all(-1)
        return torch.where(best, self.best, torch.where(weak, self.weak, self.other))

    def chance_of_best(self, logits: Tensor) -> Tensor:
        """The probability of the way of first arms under logits `(..., prefixes, arms)`, of shape `(...)`."""
        logp = logits.log_softmax(-1)[..., 0]
        total, at = logp[..., 0], 0
        for d in range(1, self.depth):
            at += self.arms ** (d - 1)  # the first table of level d is that of the prefix of first arms
            total = total + logp[..., at]
        return total.exp()


class Outcome(NamedTuple):
    """What a training run of each seed reached.

    Args:
        commits: `(seeds,)`, bool: whether the best way has more than half of the probability at the end.
        value: `(seeds,)`, the reward averaged over the batches (the area under the learning curve).
        entropy: `(seeds,)`, entropy of the first choice at the end, in nats.
        discovery: `(seeds,)`, the first batch in which the best way was drawn; the number of batches if it never was.
        curve: `(batches, seeds)`, the probability of the best way after each batch.
    """

    commits: Tensor
    value: Tensor
    entropy: Tensor
    discovery: Tensor
    curve: Tensor


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
    device: str = "cpu",
) -> Outcome:
    """Policy gradients on a tree, thousands of seeds at once; the same seeds see the same noise under every objective.

    Args:
        tree: The problem.
        objective: An objective whose only extra inputs, if any, are top-K tokens; a `sequence` ratio is that of a whole way.
        learning_rate: Learning rate of the optimiser.
        batches: Number of rollouts.
        queries: Groups of a rollout.
        group: Ways of a group.
        epochs: Passes over a rollout.
        minibatches: Optimiser steps of a pass.
        lag: How many batches the sampler is behind the policy.
        seeds: Number of independent seeds.
        seed: Seed of the one generator that all of them share.
        optimizer: `adam` or `sgd`.
        noise: Chance that a reward is exchanged for 1 - reward.
        device: `cpu`, `cuda` or `cuda:0`. Another kind of device draws other random numbers.

    Returns:
        The outcome of every seed, on the device.

    Raises:
        ValueError: If the lag is negative, or the optimiser or the device is unknown.
        RunError: If this machine does not have the device.
    """
    if lag < 0:
        raise ValueError(f"lag must be at least 0, got {lag}")
    place = find_device(device)
    g = seeded(place, seed)
    theta = tree.start(place).expand(seeds, -1, -1).clone().requires_grad_()
    optimiser = _optimizer(optimizer, theta, learning_rate)
    start = theta.detach().log_softmax(-1) if objective.kl_coef else None  # the reference
    rows = queries * group
    total, discovery = torch.zeros(seeds, device=place), torch.full((seeds,), batches, device=place)
    curve: list[Tensor] = []
    past: deque[Tensor] = deque(maxlen=lag + 1)
    for batch in range(batches):
        past.append(theta.detach().log_softmax(-1))
        ways, tables = _draw(tree, past[0].exp(), torch.rand(seeds, rows, tree.depth, generator=g, device=place))
        old = _scores(past[0], tables, ways)
        rewards = tree.rewards(ways)
        total += rewards.mean(1)
        drawn = (ways == 0).all(-1).any(1)
        discovery = torch.where(drawn & (discovery == batches), batch, discovery)
        if noise:
            flipped = torch.rand(rewards.shape, generator=g, device=place) < noise
            rewards = torch.where(flipped, 1 - rewards, rewards)
        advantages = group_advantages(rewards.flatten(), group, kind=objective.advantage).view(seeds, rows)
        order = torch.rand(seeds, epochs, rows, generator=g, device=place).argsort(-1)
        for epoch in range(epochs):
            for part in order[:, epoch].chunk(minibatches, 1):
                chosen = part.unsqueeze(-1).expand(-1, -1, tree.depth)
                at, taken, logp = tables.gather(1, chosen), ways.gather(1, chosen), theta.log_softmax(-1)
                new = _scores(logp, at, taken)
                extras = _top(objective.top_k, logp, past[0], at, taken)
                optimiser.zero_grad()
                ref = None if start is None else _scores(start, at, taken)
                _loss(objective, new, old.gather(1, chosen), advantages.gather(1, part), extras, ref).backward()
                optimiser.step()
        curve.append(tree.chance_of_best(theta.detach()))
    logp = theta.detach()[:, 0].log_softmax(-1)
    return Outcome(curve[-1] > 0.5, total / batches, -(logp.exp() * logp).sum(-1), discovery, torch.stack(curve))


def on_bandits(objective: Objective) -> bool:
    """Whether an objective has what it needs on a bandit: a ratio of single choices, and no extra inputs but top-K arms.

    Args:
        objective: The objective. One that looks at the whole batch also mixes the seeds, which are one batch in `run_tree`.
    """
    return objective.ratio_level == "token" and (not objective.extras or objective.top_k is not None)


def _optimizer(name: str, theta: Tensor, learning_rate: float) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam([theta], lr=learning_rate, betas=(0.9, 0.95))
    if name == "sgd":
        return torch.optim.SGD([theta], lr=learning_rate)
    raise ValueError(f"optimizer: got {name!r}; choose adam or sgd")


def _top(k: int | None, new: Tensor, old: Tensor, tables: Tensor, ways: Tensor) -> dict[str, Tensor]:
    """The extras of an objective that asks for the top K arms, for choices `(seeds, rows, depth)`; none for any other one.

    `new` and `old` are log-probs `(seeds, prefixes, arms)`.
    """
    if k is None:
        return {}
    seed = torch.arange(len(ways), device=ways.device).view(-1, 1, 1)
    top = top_tokens(old[seed, tables].flatten(0, 1), ways.flatten(0, 1), k)
    return top_extras(top, new[seed, tables].flatten(0, 1))


def _loss(
    objective: Objective, new: Tensor, old: Tensor, advantages: Tensor, extras: dict[str, Tensor], ref: Tensor | None
) -> Tensor:
    """The sum over seeds of their mean losses, so that each seed's own tables get its own gradient.

    `new`, `old` and `ref` are log-probs `(seeds, rows, depth)`, the advantages are `(seeds, rows)`; `ref` is that of the
    reference, for objectives with a KL to it.
    """
    logprobs, before = new.flatten(0, 1), old.flatten(0, 1)
    value = token_objective(
        objective,
        logprobs=logprobs,
        old_logprobs=before,
        rollout_logprobs=before,
        advantages=advantages.flatten(),
        mask=torch.ones(new.shape[0] * new.shape[1], new.shape[2], device=new.device),
        extras=extras,
    ).value
    if ref is not None:
        value = value - objective.kl_coef * reference_kl(logprobs, ref.flatten(0, 1), objective.kl, old_logprobs=before)
    return -value.mean(-1).sum() / new.shape[1]


def largest_shift(bounds: Bounds, probabilities: Sequence[float]) -> list[float]:
    """How far a token's probability has risen where its own gradient stops: `min(p·r_up, 1) - p`.

    Under a fixed clip this is `ε·p`, next to nothing for a rare token (the bottleneck of arXiv:2603.04918). In a ball it tends
    to a constant as p tends to 0: `1 - e^(-δ)` for KL, δ for TV. It bounds no update: the step that crosses the edge, momentum
    and the gradients of other tokens move the policy further (`bandpo.lab.comparison.sweeps.realised`; docs/theory.md, no. 8).

    Args:
        bounds: Bounds that are a function of the old log-probs alone.
        probabilities: Old probabilities p of tokens.

    Returns:
        The shift of each probability.

    Raises:
        TypeError: If the bounds are no interval of the ratio.

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
    return cast("list[float]", (torch.minimum(p * found.upper, torch.ones_like(p)) - p).tolist())


def updates_to_common(bounds: Bounds, rare: float, common: float = 0.5, limit: int = 10_000) -> int:
    """The rollouts in which a token rises from probability `rare` to `common`, if each moves it to its edge and no further.

    No bound on training, for the reason that `largest_shift` gives.

    Args:
        bounds: Bounds that are a function of the old log-probs alone.
        rare: Initial probability.
        common: Probability to reach.
        limit: The largest number of updates that is tried, returned where the token cannot rise so far.

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
    """Ways `(seeds, rows, depth)`, and the number of the table from which each choice is drawn."""
    seeds, rows, depth = noise.shape
    ways = torch.zeros(seeds, rows, depth, dtype=torch.int64, device=noise.device)
    tables = torch.zeros_like(ways)
    prefix, first = torch.zeros_like(ways[..., 0]), 0
    for d in range(depth):
        tables[..., d] = first + prefix
        table = policy.gather(1, tables[..., d].unsqueeze(-1).expand(-1, -1, tree.arms))
        drawn = (table.cumsum(-1) <= noise[..., d : d + 1]).sum(-1).clamp_max(tree.arms - 1)
        ways[..., d] = drawn
        first, prefix = first + tree.arms**d, prefix * tree.arms + drawn
    return ways, tables


def _scores(logp: Tensor, tables: Tensor, ways: Tensor) -> Tensor:
    """The log-probs of the choices of ways, `(seeds, rows, depth)`."""
    seeds, _, arms = logp.shape
    flat = logp.reshape(seeds, -1)
    return flat.gather(1, (tables * arms + ways).flatten(1)).view(ways.shape)


def __getattr__(name: str) -> object:
    if name == "wilson":
        from bandpo.statistics import wilson

        warn_moved(f"{__name__}.wilson", "bandpo.statistics.wilson")
        return wilson
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
