"""Equality, hashes and pickles of the library's immutable objects, which compare by the values of their fields."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from bandpo._deprecations import renamed

T = TypeVar("T")


class ByValue:
    """Equality for a dataclass (made with `eq=False`) whose fields may hold tensors or `functools.partial`.

    The comparison of a plain dataclass fails for tensors, whose equality is a tensor, and finds two partials of one function
    different. Two equal objects have one hash; it leaves out the values of tensors, because a schedule may change them.
    """

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(other) is not type(self):
            return NotImplemented
        return all(same(getattr(self, name), getattr(other, name)) for name in _compared(self))

    def __hash__(self) -> int:
        return hash((type(self), *(_hash(getattr(self, name)) for name in _compared(self))))


class Registry(Mapping[str, T]):
    """A read-only mapping of named objects, which is pickled and copied by the name of its module variable.

    Args:
        module: `__name__` of the module that defines the mapping.
        variable: Name of the variable in that module.
        entries: The named objects.
        kind: What an entry is, in the warning of a former name.
        former: Former names, which find their entry with a warning and are not among the keys; see
            `bandpo._deprecations.RENAMED_OBJECTIVES`.
    """

    def __init__(
        self,
        module: str,
        variable: str,
        entries: Mapping[str, T],
        *,
        kind: str = "entry",
        former: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        self.__module__ = module
        self._variable = variable
        self._entries = dict(entries)
        self._kind, self._former = kind, dict(former or {})

    def __getitem__(self, name: str) -> T:
        if name in self._former:
            name = renamed(self._kind, name, self._former)
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._former

    def __repr__(self) -> str:
        return f"{self._variable}({', '.join(self._entries)})"

    def __reduce__(self) -> str:
        return self._variable


def _compared(value: object) -> list[str]:
    return [f.name for f in fields(cast("Any", value)) if f.compare]


def same(a: object, b: object) -> bool:
    """Equality that looks into tensors, tuples and `functools.partial`, as in `ByValue`.

    Args:
        a: A value of a field.
        b: Another one.
    """
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return False
        return (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape) and torch.equal(a, b)
    if isinstance(a, partial) and isinstance(b, partial):
        return same((a.func, a.args, *sorted(a.keywords.items())), (b.func, b.args, *sorted(b.keywords.items())))
    if isinstance(a, tuple) and isinstance(b, tuple):
        a, b = cast("tuple[object, ...]", a), cast("tuple[object, ...]", b)
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def _hash(value: object) -> int:
    if isinstance(value, Tensor):
        return hash((value.dtype, value.shape))
    if isinstance(value, partial):
        return _hash((value.func, value.args, *sorted(value.keywords.items())))
    if isinstance(value, tuple):
        return hash(tuple(_hash(v) for v in cast("tuple[object, ...]", value)))
    return hash(value)
