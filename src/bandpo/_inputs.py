"""What a bounds object or a surrogate takes and is, and the checks of arguments that all of the core shares."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor

from bandpo._deprecations import needs as needs

PROVIDED = ("logprobs", "old_logprobs", "log_ratio", "advantages", "mask")
"""Inputs that `policy_loss` has for every objective; any other name that a component asks for is an extra."""

Trait = Literal["of_batch", "membership", "without_advantage", "extras_with_gradient"]

LOWEST_LOGPROB = -1e9
"""A log-prob below it counts as -inf: the lowest number of a dtype means "impossible" in many models."""

T = TypeVar("T", bound=Callable[..., Any])


def traits(*names: Trait) -> Callable[[T], T]:
    """Mark a surrogate (function) or bounds (class or function) with what an objective must know of it.

    * `of_batch`: what it does to one token depends on other sequences of the call, as in Clip-Cov. No weight can mend such
      an objective on a part of its batch, so it is refused where samples are left out (`bandpo.selection`).
    * `membership`: bounds that have no edges and return a bool tensor, which tokens are inside; a surrogate that takes such.
    * `without_advantage`: it has a gradient where the advantage is 0, such as that of a penalty.
    * `extras_with_gradient`: its extras keep their gradient, as the log-probs of other tokens than the sampled one do.

    An objective finds the marks through `functools.partial`, `functools.wraps` and the fields of a dataclass.

    Args:
        *names: Any of the four.

    Raises:
        ValueError: If a name is unknown.

    Examples:
        >>> from bandpo import Clip, Objective
        >>> @traits("of_batch")
        ... def surrogate(log_ratio, advantages, bounds):
        ...     return log_ratio.exp() * (advantages - advantages.mean())
        >>> Objective(bounds=Clip(), surrogate=surrogate).traits
        ('of_batch',)
    """
    for name in names:
        if name not in get_args(Trait):
            raise ValueError(f"traits: got {name!r}; choose one of {', '.join(get_args(Trait))}")

    def mark(component: T) -> T:
        component.traits = names  # type: ignore[attr-defined]
        return component

    return mark


def inputs_of(component: Callable[..., Any]) -> tuple[str, ...]:
    """The inputs that a component asks for: its keyword-only parameters without a default, also through `functools.partial`.

    A component made of others, which takes `**inputs` and passes on what each of them asks for, names all of these in an
    attribute `inputs`; see `bandpo.bounds.Intersection`.

    Args:
        component: Bounds, a surrogate, or a rule of `bandpo.surrogates.stops`.

    Examples:
        >>> def surrogate(log_ratio, advantages, bounds, c=3.0, *, old_logprobs, bonus, share=0.5): ...
        >>> inputs_of(surrogate), inputs_of(partial(surrogate, bonus=1.0))
        (('old_logprobs', 'bonus'), ('old_logprobs',))
    """
    parameters = _parameters(component) or []
    names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        names += _passed_on(component)
    return tuple(dict.fromkeys(names))


def _passed_on(component: object) -> list[str]:
    """The names in the attribute `inputs` of a component, less those that a `functools.partial` has fixed."""
    if isinstance(component, partial):
        inner = cast("partial[Any]", component)
        return [name for name in _passed_on(inner.func) if name not in inner.keywords]
    return list(getattr(component, "inputs", ()))


def _parameters(component: Callable[..., Any]) -> list[inspect.Parameter] | None:
    if isinstance(component, torch.nn.Module):  # its __call__ takes anything
        component = component.forward
    try:
        return list(inspect.signature(component).parameters.values())
    except (TypeError, ValueError):  # written in C: nothing is known of it
        return None


def traits_of(component: object) -> tuple[str, ...]:
    """The names given to `traits`, of a component and of the components that it is made of."""
    found = {name for part in _parts(component, set()) for name in getattr(part, "traits", ())}
    return tuple(name for name in get_args(Trait) if name in found)


def _parts(component: object, seen: set[int]) -> Iterator[object]:
    """A component, and what it wraps: by `partial`, by `functools.wraps`, or in the fields of a dataclass."""
    if not callable(component) or id(component) in seen:
        return
    seen.add(id(component))
    yield component
    inner: list[object] = [getattr(component, "__wrapped__", None)]
    if isinstance(component, partial):
        inner += [component.func, *component.args, *component.keywords.values()]
    elif dataclasses.is_dataclass(component) and not isinstance(component, type):
        for f in dataclasses.fields(component):
            value = getattr(component, f.name)
            inner += cast("tuple[object, ...]", value) if isinstance(value, tuple) else (value,)
    for part in inner:
        yield from _parts(part, seen)


def check_component(role: str, component: object, arguments: tuple[str, ...], owner: str = "Objective") -> None:
    """A bounds object or surrogate must be callable with its fixed arguments, and ask for the rest by keyword alone.

    Args:
        role: What it is, for the message.
        component: The object.
        arguments: Names of what it is given in any case, by position.
        owner: The class that it is given to, for the message.

    Raises:
        TypeError: If it cannot be called so; the message names the fix.
    """
    if not callable(component):
        raise TypeError(f"{owner}: {role} must be callable, got {component!r}")
    parameters = _parameters(component)
    if parameters is None:
        return
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(by_place) < len(arguments) and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise TypeError(f"{owner}: {role} {_name(component)} must take ({', '.join(arguments)})")
    more = [p.name for p in by_place[len(arguments) :] if p.default is p.empty]
    if more:
        listed = ", ".join(more)
        raise TypeError(
            f"{owner}: {role} {_name(component)} is called with ({', '.join(arguments)}), and takes {listed} as well: make "
            f"further inputs keyword-only, {_name(component)}({', '.join(arguments)}, *, {listed}), or give them a default"
        )


def _name(component: object) -> str:
    return getattr(component, "__name__", None) or repr(component)


def as_mask(mask: Tensor, name: str = "mask") -> Tensor:
    """The mask as bool. Any number but 0 and 1 is refused: a label such as -100 must not count as a valid token.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If an entry is neither 0 nor 1; on an accelerator and under `torch.compile` a RuntimeError.
    """
    check_tensor(name, mask, floating=False)
    if mask.dtype == torch.bool:
        return mask
    on = mask == 1
    check_values(
        on | (mask == 0),
        mask,
        f"{name} must be bool, or 0 and 1",
        fix="for labels, in which -100 marks what does not count, pass labels != -100",
    )
    return on


def check_values(fits: Tensor, values: Tensor, what: str, *, fix: str = "") -> None:
    """All values must fit. The host reads the answer on a CPU alone; an accelerator checks by itself, and stops.

    Args:
        fits: Bool, of each value.
        values: The values, for the message.
        what: What they must be.
        fix: What to do about one that does not fit.

    Raises:
        ValueError: With the first value that does not fit; on an accelerator and under `torch.compile` a RuntimeError.
    """
    end = f"; {fix}" if fix else ""
    # torch.func hands over its own tensors, which nothing can be read from; what they wrap can be.
    readable = fits.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable:
        fits, values = _unwrapped(fits), _unwrapped(values)
    tracing: bool = readable and torch._C._len_torch_dispatch_stack() > 0  # type: ignore[attr-defined]
    if not readable or type(fits) is not Tensor or tracing:  # a fake tensor, or a trace
        torch._assert_async(fits.all(), f"{what}{end}")  # type: ignore[attr-defined]
    elif not fits.all():
        raise ValueError(f"{what}, got {values[~fits].flatten()[0].item()}{end}")


def _unwrapped(x: Tensor) -> Tensor:
    functorch = cast("Any", torch._C)._functorch  # type: ignore[attr-defined]
    while functorch.is_functorch_wrapped_tensor(x):
        x = cast("Tensor", functorch.get_unwrapped(x))
    return x


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
    """An argument must be an integer, and not a bool.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")


def check_shapes(logprobs: Tensor, **others: Tensor | None) -> None:
    """`logprobs` must be `(batch, time)`, and the others, where given, tensors of its shape.

    Raises:
        TypeError: If one is no tensor, or, but for `mask`, has no float dtype.
        ValueError: If a shape does not fit.
    """
    check_tensor("logprobs", logprobs)
    if logprobs.dim() != 2:
        raise ValueError(f"logprobs must be (batch, time), got shape {tuple(logprobs.shape)}")
    for name, value in others.items():
        if value is None:
            continue
        check_tensor(name, value, floating=name != "mask")
        if value.shape != logprobs.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} but logprobs has {tuple(logprobs.shape)}; they must be equal"
            )


def is_logprob(x: Tensor) -> Tensor:
    """Where a tensor holds log-probs that can be used: numbers that are neither NaN nor infinite, as bool."""
    return widened(x.detach()).abs() <= -LOWEST_LOGPROB


def widened(x: Tensor) -> Tensor:
    """In float64 as it is, else in float32."""
    return x if x.dtype == torch.float64 else x.float()


def fill(x: Tensor, valid: Tensor) -> Tensor:
    """At least float32, and 0 where the mask is off, so that nothing there (NaN included) reaches value or gradient."""
    return torch.where(valid, widened(x), 0.0)


def as_columns(advantages: Tensor, like: Tensor) -> Tensor:
    """`(batch,)` as `(batch, 1)`; the other two shapes as they are.

    Raises:
        ValueError: If it is none of the three.
    """
    column = advantages.unsqueeze(-1) if advantages.dim() == 1 else advantages
    if column.dim() != 2 or column.shape[0] != like.shape[0] or column.shape[1] not in (1, like.shape[1]):
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)}; with logprobs {tuple(like.shape)} it must be "
            f"({like.shape[0]},), ({like.shape[0]}, 1) or {tuple(like.shape)}"
        )
    return column
