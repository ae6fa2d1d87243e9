"""Group-relative advantages: rewards of one prompt's completions, measured against each other."""

from typing import Literal, get_args

import torch
from torch import Tensor

from bandpo._inputs import check_int, check_tensor
from bandpo.groups import GroupIds, Groups, centred

AdvantageKind = Literal["std", "mean", "leave-one-out"]


def group_advantages(
    rewards: Tensor,
    group_size: int | None = None,
    *,
    group_ids: GroupIds | None = None,
    kind: AdvantageKind = "std",
    eps: float = 1e-4,
) -> Tensor:
    """Advantages of completions within their group, one group for each prompt.

    `std`: `(R - mean) / (std + eps)` with the unbiased std (GRPO, arXiv:2402.03300). `mean`: `R - mean` (Dr.GRPO,
    arXiv:2503.20783). `leave-one-out`: `R - mean of the others` (RLOO, arXiv:2402.14740).

    A reward that is NaN or infinite is no score: its advantage is 0, and mean and std are those of the scored completions of
    the group. Where these all have one reward, or there is a single one, every advantage is exactly 0.

    Args:
        rewards: `(completions,)`, float.
        group_size: Completions per prompt, at least 2, where the groups are consecutive and of one size.
        group_ids: Instead, an id for each completion, for groups of different sizes or in any order: an integer tensor
            `(completions,)`, or a sequence such as a list of the prompts' names.
        kind: Which of the three.
        eps: At least 0; TRL's 1e-4.

    Returns:
        Tensor of the shape and dtype of `rewards`, computed in float64.

    Raises:
        ValueError: If not exactly one of `group_size` and `group_ids` is given, or it does not fit, or the kind is unknown.
        TypeError: If `rewards` is no float tensor, the group size no integer, or an id cannot be compared.

    Examples:
        >>> import torch
        >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, kind="mean")
        tensor([ 0.7500, -0.2500, -0.2500, -0.2500])
        >>> group_advantages(torch.tensor([1.0, 5.0, 0.0, float("nan")]), group_ids=[7, 8, 7, 7], kind="mean")
        tensor([ 0.5000,  0.0000, -0.5000,  0.0000])
    """
    if kind not in get_args(AdvantageKind):
        raise ValueError(f"kind: got {kind!r}; choose one of {', '.join(get_args(AdvantageKind))}")
    check_tensor("rewards", rewards)
    if not isinstance(eps, int | float) or not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be a number >= 0, got {eps!r}")
    if group_size is not None:
        check_int("group_size", group_size)
        if group_size < 2:
            raise ValueError(
                f"group_size must be at least 2 (one completion has nothing to be compared to), got {group_size}"
            )
    if rewards.dim() != 1:
        raise ValueError(f"rewards must be (completions,), got shape {tuple(rewards.shape)}")
    groups = Groups(len(rewards), group_size, group_ids)
    differences, n = centred(groups.table(rewards))
    others = (n - 1).clamp_min(1)
    if kind == "std":
        # In units of the largest difference, whose square neither overflows nor vanishes.
        unit = differences.abs().amax(1, keepdim=True)
        x = differences / unit
        std = (x.square().sum(1, keepdim=True) / others).sqrt()
        differences = torch.where(unit > 0, x / (std + eps / unit), 0.0)
    elif kind == "leave-one-out":
        differences = differences * (n / others)
    return groups.flat(differences).to(rewards.dtype)
