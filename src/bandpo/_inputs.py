"""What a bounds object or a surrogate takes beyond its fixed arguments."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

# `policy_loss` has these for every objective; every other name is an extra that the caller passes.
PROVIDED = ("logprobs", "old_logprobs", "log_ratio", "advantages", "mask")

T = TypeVar("T", bound=Callable[..., Any])


def needs(*names: str) -> Callable[[T], T]:
    """Mark a surrogate (function) or bounds (class or function) as taking these keyword arguments as well.

    `logprobs`, `old_logprobs`, `log_ratio`, `advantages` and `mask` are those of the batch, filled with 0 where the mask is
    off; `advantages` are columns or per token. Any other name becomes an extra of the objective.

    Examples:
        >>> @needs("old_logprobs")
        ... def surrogate(log_ratio, advantages, bounds, *, old_logprobs):
        ...     return log_ratio.exp() * advantages * (old_logprobs > -5)
        >>> from bandpo import Objective, Clip
        >>> Objective(bounds=Clip(), surrogate=surrogate).surrogate_inputs
        ('old_logprobs',)
    """

    def mark(component: T) -> T:
        component.needs = names  # type: ignore[attr-defined]
        return component

    return mark


def inputs_of(component: Callable[..., Any]) -> tuple[str, ...]:
    """The names given to `needs`, also through `functools.partial`."""
    while isinstance(component, partial):
        component = component.func
    return tuple(getattr(component, "needs", ()))


def check_tensor(name: str, value: object, *, floating: bool = True) -> None:
    """An argument must be a tensor, of a float dtype unless that is said.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if floating and not value.is_floating_point():
        raise TypeError(f"{name} must have a float dtype, got {value.dtype}; convert with .float()")


def check_int(name: str, value: object) -> None:
    """An argument must be an integer, and True is none.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
