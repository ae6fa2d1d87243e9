"""Which groups of a rollout have signal, that is, rewards that differ; and the warning for a run without any signal."""

import math
from typing import Any, cast

import torch
from torch import Tensor

from bandpo.groups import group_advantages, informative

PATIENCE = 20
"""Consecutive rollouts without signal after which a run is warned."""


def without_signal(per_function: Tensor, weights: Tensor, size: int, *, summed_first: bool) -> Tensor:
    """Groups in which all scored rewards are equal, so that every advantage is 0.

    Args:
        per_function: Rewards, `(completions, functions)`, NaN where a function gave none; the groups are consecutive.
        weights: Weights of the functions, `(functions,)`.
        size: Completions of a group.
        summed_first: Whether the advantages are those of the weighted sum (TRL's "sum_then_normalize"). Otherwise each function
            is normalised by itself ("normalize_then_sum"), and rewards whose sums are equal still have signal.

    Returns:
        Whether each group is without signal, bool, `(groups,)`.

    Examples:
        >>> nan = float("nan")
        >>> rewards = torch.tensor([[nan], [1.0], [1.0], [0.0], [1.0], [1.0]])
        >>> without_signal(rewards, torch.ones(1), 3, summed_first=True)
        tensor([ True, False])
    """
    if summed_first:
        columns = [total_rewards(per_function, weights)]
    else:  # a function of weight 0 does not change the advantages
        columns = list(per_function.masked_fill(weights.to(per_function.device) == 0, math.nan).unbind(1))
    signal = torch.stack([informative(column, size).view(-1, size)[:, 0] for column in columns])
    return ~signal.any(0)


def normalized_then_summed(per_function: Tensor, weights: Tensor, size: int) -> Tensor:
    """Advantages by TRL's "normalize_then_sum": each function is normalised by its groups, then their sum by the batch.

    In float32 the mean of equal rewards has a rounding error, which TRL divides by the 1e-4 that prevents a division by 0:
    seven rewards of 12345.678 get advantages of -0.85 each.

    Args:
        per_function: Rewards, `(completions, functions)`, NaN where a function gave none; the groups are consecutive.
        weights: Weights of the functions, `(functions,)`.
        size: Completions of a group, at least 2.

    Returns:
        Advantages, float64, `(completions,)`.

    Examples:
        >>> rewards = torch.tensor([[1.0, 12345.678], [0.0, 12345.678]])
        >>> normalized_then_summed(rewards, torch.ones(2), 2)
        tensor([ 0.7070, -0.7070], dtype=torch.float64)
    """
    wide = per_function.to(torch.float64)
    each = torch.stack([group_advantages(rewards, size) for rewards in wide.unbind(1)], 1)
    total = (each * weights.to(wide)).sum(1)
    return group_advantages(total.masked_fill(wide.isnan().all(1), math.nan), len(total))


def total_rewards(per_function: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the rewards of each completion, `(completions,)`; NaN where no function gave a reward.

    Args:
        per_function: Rewards, `(completions, functions)`, NaN where a function gave none.
        weights: Weights of the functions, `(functions,)`.
    """
    total = (per_function * weights.to(per_function.device)).nansum(1)
    return total.masked_fill(per_function.isnan().all(1), math.nan)


class SignalWatch:
    """Counts the rollouts with signal, that is, with a group whose rewards differ, and warns about a run without any.

    Args:
        patience: Consecutive rollouts without signal after which it warns.
    """

    def __init__(self, patience: int = PATIENCE) -> None:
        self.patience = patience
        self.rollouts = self.with_signal = self.since = 0
        self.lowest, self.highest = math.inf, -math.inf

    def note(self, groups_without_signal: Tensor, rewards: Tensor) -> str | None:
        """Count a rollout.

        Args:
            groups_without_signal: Whether each group of all processes is without signal, bool, `(groups,)`.
            rewards: Rewards of all completions, NaN where unscored.

        Returns:
            A warning if the last `patience` rollouts were without signal, otherwise None.
        """
        self.rollouts += 1
        if scored := [x for x in cast("list[float]", rewards.tolist()) if not math.isnan(x)]:
            self.lowest, self.highest = min(self.lowest, *scored), max(self.highest, *scored)
        if not groups_without_signal.all():
            self.with_signal, self.since = self.with_signal + 1, 0
            return None
        self.since += 1
        if self.since != self.patience:
            return None
        return (
            f"the last {self.since} rollouts had no group whose rewards differ, so every advantage was 0 and the policy did "
            f"not change. {_ADVICE}"
        )

    def verdict(self) -> str | None:
        """The warning at the end of a run in which no group ever had signal; None for other runs."""
        if not self.rollouts or self.with_signal:
            return None
        if self.lowest > self.highest:
            seen = "no completion was scored"
        elif self.lowest == self.highest:
            seen = f"every reward was {self.lowest:g}"
        else:
            seen = f"rewards from {self.lowest:g} to {self.highest:g} differed between prompts only"
        return (
            f"no group of this run ever had rewards that differ ({seen}, in {self.rollouts} rollouts): every advantage was 0 "
            f"and nothing was learned. {_ADVICE}"
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {k: v for k, v in vars(self).items() if k != "patience"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: A mapping with the keys of `state_dict`.
        """
        found = {name: type(value)(state[name]) for name, value in self.state_dict().items()}
        vars(self).update(found)


_ADVICE = (
    "Check the reward on a few completions; start from a model that sometimes succeeds, choose prompts it solves now and then, "
    "or sample more completions per prompt (num_generations)"
)
