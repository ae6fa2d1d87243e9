"""`torch.compile` without a limit of variants: each kind of call has a graph, and a changing radius is an input."""

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit

from bandpo.bounds import Radius
from bandpo.bounds.regions import common_radius, with_radius
from bandpo.objective import Objective

Function = Callable[..., Any]

_CONSTANT_RADII = 2  # radii of one ball that are constants of their graphs, which read a table
_MANY = 8  # graphs, after which a warning says what makes a new one


class Compiled:
    """A function of the core, with a compiled graph for each kind of call.

    PyTorch keeps the graphs of a function in one list and stops compiling at the ninth. Here each kind of call (objective,
    dtypes, which arguments are given) has a copy of the function with a separate list, and a full list is replaced.

    Args:
        function: The function to compile.
        compiler: `torch.compile` with its options.
        by_shape: Whether calls with different shapes are of different kinds.
    """

    def __init__(self, function: Function, compiler: Callable[[Function], Function], *, by_shape: bool) -> None:
        functools.update_wrapper(self, function)
        self._function, self._compiler, self._by_shape = function, compiler, by_shape
        self._graphs = dict[object, Function]()
        self._radii = dict[object, list[object]]()
        self._said = set[str]()
        parameters = list(inspect.signature(function).parameters) if _is_ours(function) else []
        self._place = parameters.index("radius") if "radius" in parameters else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the call is part of a larger graph
            return self._function(*args, **kwargs)
        args = tuple(self._radius(a) if i == self._place else self._argument(a) for i, a in enumerate(args))
        kwargs = {
            name: self._radius(a) if name == "radius" and self._place is not None else self._argument(a)
            for name, a in kwargs.items()
        }
        kind = (self._kind(args), self._kind(kwargs), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if kind not in self._graphs:
            self._graphs[kind] = self._compiler(_copy(self._function))
            if len(self._graphs) > _MANY:
                self._say(
                    f"has compiled its graph no. {len(self._graphs)}: each new objective, dtype, gradient mode or set of "
                    "arguments needs a new graph, which takes seconds to compile. Reuse the objects that you pass, and the "
                    "compiled function, for the whole run"
                )
        try:
            return self._graphs[kind](*args, **kwargs)
        except FailOnRecompileLimitHit:
            self._say(
                "compiles repeatedly, because a number among its arguments, or the layout of a tensor, differs from call to "
                "call. Pass it as a tensor, keep it constant, or do not compile"
            )
            self._graphs[kind] = self._compiler(_copy(self._function))
            return self._graphs[kind](*args, **kwargs)

    def _argument(self, value: Any) -> Any:
        """An argument, with its β of a KL penalty, and a radius that has changed between calls, as tensors."""
        if isinstance(value, Objective) and value.penalty is not None:
            value = value.with_penalty(_as_input(value.penalty))  # a product, which is as fast with a tensor
        given = value.radius if isinstance(value, Objective) else common_radius(value)
        if given is None:
            return value
        if isinstance(value, Objective) and value.projection is not None:
            return value.with_radius(
                _as_input(value.projection.radius)
            )  # it reads no table, so that a constant radius is no faster
        radius = self._radius(given, _at_radius(value, 1.0))
        if radius is given:
            return value
        return _at_radius(value, radius)

    def _radius(self, radius: Radius | tuple[Radius, Radius], ball: object = None) -> Any:
        if not _is_constant(radius):
            return radius
        seen = self._radii.setdefault(ball, [])
        if radius in seen:
            return radius
        if len(seen) < _CONSTANT_RADII:
            seen.append(radius)
            return radius
        self._say(
            f"has seen radius {radius} after {' and '.join(map(str, seen))}: from now on the changing radius is an input of "
            "one graph, which solves for the bounds in float64 at each call; a constant radius is faster (read from a table)"
        )
        if isinstance(radius, tuple):
            return tuple(_as_input(side) for side in radius)
        return _as_input(radius)

    def _kind(self, value: Any) -> object:
        """The kind of call that a graph is made for, without numbers: PyTorch makes a changing number an input if it can."""
        if isinstance(value, Tensor):
            shape = tuple(value.shape) if self._by_shape else tuple(min(n, 2) for n in value.shape)
            return value.dtype, value.device, value.requires_grad, shape, value.is_contiguous()
        if isinstance(value, Mapping):
            items = cast("Mapping[str, Any]", value).items()
            return tuple((name, self._kind(item)) for name, item in sorted(items))
        if isinstance(value, Sequence) and not isinstance(value, str):
            return tuple(self._kind(item) for item in cast("Sequence[Any]", value))
        if isinstance(value, Objective) and value.penalty is not None:
            value = value.with_penalty(1.0)
        radius = value.radius if isinstance(value, Objective) else common_radius(cast("Any", value))
        if radius is not None and not _is_constant(radius):
            return _at_radius(value, 1.0), self._kind(radius)
        return type(value) if isinstance(value, int | float) else value

    def _say(self, what: str) -> None:
        start = what.split(" ", 1)[0]
        if start not in self._said:
            self._said.add(start)
            name = getattr(self._function, "__name__", repr(self._function))
            warnings.warn(f"The compiled {name} {what}.", stacklevel=2)


def _is_constant(radius: Radius | tuple[Radius, Radius]) -> bool:
    return all(isinstance(side, int | float) for side in (radius if isinstance(radius, tuple) else (radius,)))


def _as_input(radius: Radius) -> Tensor:
    return radius if isinstance(radius, Tensor) else torch.full((), radius, dtype=torch.float64)


def _is_ours(function: Function) -> bool:
    return getattr(function, "__module__", "").startswith("bandpo.")


def _copy(function: Function) -> Function:
    """A function that calls this one and has a new code object, by which PyTorch finds the graphs of a function."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)


def _at_radius(value: Any, radius: Any) -> Any:
    return value.with_radius(radius) if isinstance(value, Objective) else with_radius(value, radius)
