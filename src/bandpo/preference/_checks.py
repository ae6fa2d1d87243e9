"""Checks of arguments that the preference losses, designs and samplers share."""

import math

import torch
from torch import Tensor

from bandpo._inputs import check_all, check_tensor


def check_number(
    name: str, value: object, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> None:
    """An argument must be a finite number between two bounds; True is none.

    Args:
        name: Of the argument, for the message.
        value: It.
        low: Least value.
        high: Largest value.
        open_low: Whether `low` itself is refused.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is out of range or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and low <= value <= high) or (open_low and value == low):
        least = "a number" if low == -math.inf else f"a number {'>' if open_low else '>='} {low:g}"
        most = "" if high == math.inf else f" and <= {high:g}"
        raise ValueError(f"{name} must be {least}{most}, got {value}")


def check_column(name: str, value: object, like: Tensor | None = None, *, like_name: str = "") -> None:
    """An argument must be a float tensor with one value for each item, as many as `like` has.

    Args:
        name: Of the argument, for the message.
        value: It.
        like: What it goes with.
        like_name: Name of that.

    Raises:
        TypeError: If it is no float tensor.
        ValueError: If it has another shape.
    """
    check_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.dim() != 1:
        raise ValueError(
            f"{name} must have one dimension, one value for each item, got shape {tuple(value.shape)}; sum log-probs over time"
        )
    if like is not None and value.shape != like.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} but {like_name} has {tuple(like.shape)}; they must be equal"
        )


def check_values(fits: Tensor, values: Tensor, message: str) -> None:
    """All values must fit. The host waits for the answer on a CPU alone; elsewhere the device checks, and stops.

    Args:
        fits: Bool, of each value.
        values: The values, for the message.
        message: What they must be.

    Raises:
        ValueError: With the first value that does not fit; on an accelerator and under `torch.compile` a RuntimeError.
    """
    check_all(fits, values, message + ", got {}")


def check_distribution(name: str, value: object) -> None:
    """An argument must be a float tensor of probabilities, which sum to 1 along the last dimension.

    Args:
        name: Of the argument, for the message.
        value: It.

    Raises:
        TypeError: If it is no float tensor.
        ValueError: If it is negative somewhere, or does not sum to 1.
    """
    check_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.dim() < 1:
        raise ValueError(f"{name} must have at least one dimension, got a single value")
    total = value.detach().double().sum(-1)
    slack = (
        4 * value.shape[-1] ** 0.5 * torch.finfo(value.dtype).eps + 1e-6
    )  # of probabilities that softmax has rounded
    check_values(value >= 0, value, f"{name} must hold probabilities, none below 0")
    check_values((total - 1).abs() <= slack, total, f"{name} must sum to 1 along its last dimension")
