"""Group-relative advantages: rewards of one prompt's completions, measured against each other."""

from typing import Literal, get_args

from torch import Tensor

from bandpo._inputs import check_int, check_tensor

AdvantageKind = Literal["std", "mean", "leave-one-out"]


def group_advantages(rewards: Tensor, group_size: int, *, kind: AdvantageKind = "std", eps: float = 1e-4) -> Tensor:
    """Advantages of completions that stand in consecutive groups of `group_size`, one group for each prompt.

    `std`: `(R - mean) / (std + eps)` with the unbiased std (GRPO, arXiv:2402.03300). `mean`: `R - mean` (Dr.GRPO,
    arXiv:2503.20783). `leave-one-out`: `R - mean of the others` (RLOO, arXiv:2402.14740).

    Args:
        rewards: `(prompts * group_size,)`, float.
        group_size: Completions per prompt, at least 2.
        kind: Which of the three.
        eps: Keeps groups of equal rewards at 0; TRL's 1e-4.

    Returns:
        Tensor of the shape of `rewards`.

    Raises:
        ValueError: If the group size does not fit or the kind is unknown.
        TypeError: If `rewards` is no float tensor, or the group size no integer.

    Examples:
        >>> import torch
        >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, kind="mean")
        tensor([ 0.7500, -0.2500, -0.2500, -0.2500])
    """
    if kind not in get_args(AdvantageKind):
        raise ValueError(f"kind: got {kind!r}; choose one of {', '.join(get_args(AdvantageKind))}")
    check_tensor("rewards", rewards)
    check_int("group_size", group_size)
    if group_size < 2:
        raise ValueError(
            f"group_size must be at least 2 (one completion has nothing to be compared to), got {group_size}"
        )
    if rewards.dim() != 1 or rewards.numel() % group_size:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} do not split into groups of {group_size}")
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if kind == "std":
        centred = centred / (groups.std(1, keepdim=True) + eps)
    elif kind == "leave-one-out":
        centred = centred * (group_size / (group_size - 1))
    return centred.flatten()
