"""What makes the library's immutable objects values: equality, hashes and pickles that hold for all of their parts."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")


class ByValue:
    """Equality of a dataclass (made with `eq=False`) whose fields may hold tensors or `functools.partial`.

    A dataclass's own comparison asks a tensor for its truth, and takes two partials of one function for different things.
    Two equal objects have one hash; the hash leaves out what a tensor holds, because a schedule may write to it.
    """

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(other) is not type(self):
            return NotImplemented
        return all(_same(getattr(self, name), getattr(other, name)) for name in _compared(self))

    def __hash__(self) -> int:
        return hash((type(self), *(_hash(getattr(self, name)) for name in _compared(self))))


class Registry(Mapping[str, T]):
    """A read-only mapping of named objects, pickled and copied as the module's variable that it is.

    Args:
        module: `__name__` of its module.
        variable: Its name there.
        entries: What it holds.
    """

    def __init__(self, module: str, variable: str, entries: Mapping[str, T]) -> None:
        self.__module__ = module
        self._variable = variable
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __repr__(self) -> str:
        return f"{self._variable}({', '.join(self._entries)})"

    def __reduce__(self) -> str:
        return self._variable


def _compared(value: object) -> list[str]:
    return [f.name for f in fields(cast("Any", value)) if f.compare]


def _same(a: object, b: object) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return False
        return (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape) and torch.equal(a, b)
    if isinstance(a, partial) and isinstance(b, partial):
        return _same((a.func, a.args, *sorted(a.keywords.items())), (b.func, b.args, *sorted(b.keywords.items())))
    if isinstance(a, tuple) and isinstance(b, tuple):
        a, b = cast("tuple[object, ...]", a), cast("tuple[object, ...]", b)
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _hash(value: object) -> int:
    if isinstance(value, Tensor):
        return hash((value.dtype, value.shape))
    if isinstance(value, partial):
        return _hash((value.func, value.args, *sorted(value.keywords.items())))
    if isinstance(value, tuple):
        return hash(tuple(_hash(v) for v in cast("tuple[object, ...]", value)))
    return hash(value)
