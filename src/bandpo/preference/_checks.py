"""Checks of arguments for the preference losses and designs."""

import math

import torch
from torch import Tensor

from bandpo._inputs import check_tensor


def check_number(
    name: str, value: object, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> None:
    """Check that an argument is a finite number between two bounds; a bool is not a number.

    Args:
        name: Name of the argument in messages.
        value: The argument.
        low: Smallest allowed value.
        high: Largest allowed value.
        open_low: Whether `low` itself is refused.

    Raises:
        TypeError: If the argument is not a number.
        ValueError: If the argument is out of range or not finite.
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
    """Check that an argument is a tensor with one number for each item, in the shape of `like` if that is given.

    Args:
        name: Name of the argument in messages.
        value: The argument.
        like: Another argument with the required shape, or None for any number of items.
        like_name: Name of that other argument.
        floating: Whether the dtype must be a float dtype; otherwise integers are allowed.

    Raises:
        TypeError: If the argument is not a tensor of such numbers.
        ValueError: If the shape is another one.
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
