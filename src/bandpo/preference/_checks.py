"""Checks of arguments for the preference losses and designs."""

import math

import torch
from torch import Tensor

from bandpo._inputs import check_int, check_tensor, check_values


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


def check_count(name: str, value: object, *, low: int = 1) -> None:
    """Check that an argument is an integer of at least `low`.

    Args:
        name: Name of the argument in messages.
        value: The argument.
        low: Smallest allowed value.

    Raises:
        TypeError: If the argument is not an integer.
        ValueError: If the argument is too small.
    """
    check_int(name, value)
    assert isinstance(value, int)
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")


def check_same_shape(name: str, value: object, like_name: str, like: object) -> None:
    """Check that two arguments are float tensors of one shape.

    Args:
        name: Name of the one argument in messages.
        value: The one argument.
        like_name: Name of the other argument.
        like: The other argument.

    Raises:
        TypeError: If one is not a float tensor.
        ValueError: If the shapes differ.
    """
    check_tensor(name, value)
    check_tensor(like_name, like)
    assert isinstance(value, Tensor)
    assert isinstance(like, Tensor)
    if value.shape != like.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} but {like_name} has {tuple(like.shape)}; they must be equal"
        )


def check_no_nan(name: str, value: Tensor, *, fix: str = "") -> None:
    """Check that no entry of a tensor is NaN.

    Args:
        name: Name of the argument in messages.
        value: The argument.
        fix: What to do about an entry that is.

    Raises:
        ValueError: If an entry is NaN.
    """
    check_values(~value.isnan(), value, f"{name} must not be NaN", fix=fix)


def check_finite(name: str, value: Tensor) -> None:
    """Check that all entries of a tensor are finite.

    Args:
        name: Name of the argument in messages.
        value: The argument.

    Raises:
        ValueError: If an entry is not finite.
    """
    check_values(value.isfinite(), value, f"{name} must be finite")


def check_logprobs(name: str, value: Tensor) -> None:
    """Check that all entries of a tensor can be log-probs, up to rounding; -inf is the log of 0.

    Args:
        name: Name of the argument in messages.
        value: The argument.

    Raises:
        ValueError: If an entry is NaN or above 0.
    """
    check_values(value < 1e-3, value, f"{name} must be log-probs, not above 0")


def check_weights(name: str, value: object, shape: tuple[int | None, ...]) -> None:
    """Check that an argument is a float tensor of probabilities or of weights for sampling: finite and not negative.

    Args:
        name: Name of the argument in messages.
        value: The argument.
        shape: Sizes of its last dimensions, None for any size; more dimensions in front are allowed.

    Raises:
        TypeError: If the argument is not a float tensor.
        ValueError: If the shape does not fit, or an entry is negative or not finite.
    """
    check_tensor(name, value)
    assert isinstance(value, Tensor)
    ends = value.shape[-len(shape) :] if value.dim() >= len(shape) else None
    if ends is None or any(want not in (None, have) for want, have in zip(shape, ends, strict=True)):
        wanted = ", ".join("n" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must be (..., {wanted}), got shape {tuple(value.shape)}")
    check_values((value >= 0) & value.isfinite(), value, f"{name} must be finite and >= 0")


def check_features(features: object) -> tuple[int, int]:
    """Check that features are `(prompts, actions, d)`, float and finite.

    Args:
        features: The argument.

    Returns:
        The numbers of prompts and of actions.

    Raises:
        TypeError: If they are not a float tensor.
        ValueError: If the shape does not fit, or a value is not finite.
    """
    check_tensor("features", features)
    assert isinstance(features, Tensor)
    if features.dim() != 3:
        raise ValueError(f"features must be (prompts, actions, d), got shape {tuple(features.shape)}")
    check_finite("features", features)
    return features.shape[0], features.shape[1]
