"""Checks of arguments that the preference losses and designs share."""

import math

import torch
from torch import Tensor

from bandpo._inputs import check_tensor


def check_number(
    name: str, value: object, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> None:
    """An argument must be a finite number between two bounds; True is none.

    Args:
        name: The argument's name, for the message.
        value: The argument.
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


def check_column(
    name: str, value: object, like: Tensor | None = None, *, like_name: str = "", floating: bool = True
) -> None:
    """An argument must be a tensor with one number for each item, as many as `like` has.

    Args:
        name: The argument's name, for the message.
        value: The argument.
        like: Another argument, whose shape it must have.
        like_name: The name of the other argument.
        floating: Whether it must have a float dtype; otherwise integers will do.

    Raises:
        TypeError: If it is no tensor of such numbers.
        ValueError: If it has another shape.
    """
    check_tensor(name, value, floating=floating)
    assert isinstance(value, Tensor)
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name} must hold numbers, got {value.dtype}")
    if like is None and value.dim() != 1:
        raise ValueError(
            f"{name} must have one dimension, one value for each item, got shape {tuple(value.shape)}; sum log-probs over time"
        )
    if like is not None and value.shape != like.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} but {like_name} has {tuple(like.shape)}; they must be equal"
        )
