"""Which groups of a rollout have signal, rewards that differ, and the warning for a run in which none ever had."""

import math
from typing import Any

import torch
from torch import Tensor

from bandpo.groups import group_advantages, informative

PATIENCE = 20


def without_signal(per_function: Tensor, weights: Tensor, size: int, *, summed_first: bool) -> Tensor:
    """Groups in which all scored rewards are equal, so that every advantage is 0.

    Args:
        per_function: `(completions, functions)`, NaN where a function gave no reward; the groups are consecutive.
        weights: The functions' weights.
        size: Completions of a group.
        summed_first: Whether the advantages come from the weighted sum (TRL's "sum_then_normalize"), or from each function's
            rewards by themselves ("normalize_then_sum"), where rewards whose sums are equal still teach.

    Returns:
        Bool, `(groups,)`.

    Examples:
        >>> nan = float("nan")
        >>> rewards = torch.tensor([[nan], [1.0], [1.0], [0.0], [1.0], [1.0]])
        >>> without_signal(rewards, torch.ones(1), 3, summed_first=True)
        tensor([ True, False])
    """
    if summed_first:
        columns = [total_rewards(per_function, weights)]
    else:  # a function of weight 0 has no share in the advantages
        columns = per_function.masked_fill(weights.to(per_function.device) == 0, math.nan).unbind(1)
    signal = torch.stack([informative(column, size).view(-1, size)[:, 0] for column in columns])
    return ~signal.any(0)


def normalized_then_summed(per_function: Tensor, weights: Tensor, size: int) -> Tensor:
    """Advantages by TRL's "normalize_then_sum", in float64: each function's rewards by their groups, then the sum by the batch.

    In float32 the mean of equal rewards is off by its rounding, which TRL divides by the 1e-4 that keeps it from dividing by 0:
    seven rewards of 12345.678 count as -0.85 each.

    Args:
        per_function: `(completions, functions)`, NaN where a function gave no reward; the groups are consecutive.
        weights: Of the functions.
        size: Completions of a group, at least 2.

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
    """Weighted sum of the rewards of each completion; NaN where no function gave one."""
    total = (per_function * weights.to(per_function.device)).nansum(1)
    return total.masked_fill(per_function.isnan().all(1), math.nan)


class SignalWatch:
    """Counts the rollouts with signal, a group whose rewards differ, and words the warning for a run without any.

    Args:
        patience: Consecutive rollouts without signal after which it warns.
    """

    def __init__(self, patience: int = PATIENCE) -> None:
        self.patience = patience
        self.rollouts = self.with_signal = self.since = 0
        self.lowest, self.highest = math.inf, -math.inf

    def note(self, groups_without_signal: Tensor, rewards: Tensor) -> str | None:
        """Count a rollout; the warning, if it is the last of `patience` without signal.

        Args:
            groups_without_signal: Bool, `(groups,)`, of all processes.
            rewards: Of all completions, NaN where unscored.
        """
        self.rollouts += 1
        if scored := [x for x in rewards.tolist() if not math.isnan(x)]:
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
        """The warning at the end of a run in which no group ever had signal, None for other runs."""
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
        """Take it back."""
        found = {name: type(value)(state[name]) for name, value in self.state_dict().items()}
        vars(self).update(found)


_ADVICE = (
    "Check the reward on a few completions; start from a model that sometimes succeeds, choose prompts it solves now and then, "
    "or sample more completions per prompt (num_generations)"
)
