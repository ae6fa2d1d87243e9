"""Fingerprints of objectives: two definitions that compute the same way have one, and another number or other code has another.

A fingerprint is a hash of the values of an objective's parts and of the code that they run: the compiled functions, their
defaults and closures, and the functions, classes and values of the user's own modules that they name. Comments, line numbers
and a function's documentation string do not count, nor do an objective's name, formula and paper. Code of this library, of
Python and of other installed packages is named, but not followed.
"""

import dataclasses
import enum
import functools
import hashlib
import inspect
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from bandpo._values import same
from bandpo.objective import Objective
from bandpo.surrogates import clip

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
"""The version of Python, which decides how code is compiled."""

_IN_WORDS = ("name", "formula", "paper")  # fields of an objective that change no number
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_LONGEST = 600  # characters
_OF_A_CLASS = re.compile(r"__(?!(call|init|getattr|post_init|new|getitem)__)\w+__|_abc_impl")  # made by Python


def fingerprint(objective: Objective, path: str = "") -> str:
    """The fingerprint of an objective, 20 hexadecimal digits, the same in every process of one version of Python.

    Args:
        objective: The objective.
        path: Where it was imported from, "package.module:NAME"; the code of that package is followed although it is installed.

    Examples:
        >>> from bandpo import Clip
        >>> fingerprint(Objective(bounds=Clip(0.2))) == fingerprint(Objective(bounds=Clip(0.2), name="mine"))
        True
        >>> fingerprint(Objective(bounds=Clip(0.2))) == fingerprint(Objective(bounds=Clip(0.3)))
        False
    """
    digest = hashlib.sha256()
    for word in _Walk(_top(path.partition(":")[0])).words(objective):
        digest.update(word.encode("utf-8", "backslashreplace") + b"\0")
    return digest.hexdigest()[:20]


def in_words(value: object) -> str:
    """A value as Python writes it, without addresses in memory; of an objective, only the fields that differ from the usual.

    Args:
        value: An objective, for example. What is longer than some lines is cut.

    Examples:
        >>> from bandpo import Clip
        >>> in_words(Objective(bounds=Clip(0.2), advantage="mean"))
        "Objective(bounds=Clip(low=0.2, high=0.2), advantage='mean')"
    """
    text = repr(value)
    if isinstance(value, Objective):
        usual = Objective(bounds=value.bounds, surrogate=value.surrogate)
        changed = [f.name for f in dataclasses.fields(value) if f.init and f.name not in ("bounds", "surrogate")]
        changed = [name for name in changed if not same(getattr(value, name), getattr(usual, name))]
        shown = ["bounds", *(["surrogate"] if value.surrogate is not clip else []), *changed]
        text = f"Objective({', '.join(f'{name}={getattr(value, name)!r}' for name in shown)})"
    text = _ADDRESS.sub("", text)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


class _Walk:
    """The words that describe a value. What was met before is named by its number, so that a walk ends.

    Args:
        top: The installed package whose code is followed, "" for none.
    """

    def __init__(self, top: str) -> None:
        self._top = top
        self._met: dict[int, int] = {}
        self._kept: list[object] = []  # so that no other object gets the address of one that was met

    def words(self, value: object) -> Iterator[str]:
        """The words of a value and of all that it is made of."""
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | enum.Enum):
            yield f"{type(value).__name__} {value!r}"
        elif id(value) in self._met:
            yield f"met {self._met[id(value)]}"
        else:
            self._met[id(value)] = len(self._met)
            self._kept.append(value)
            yield from self._code_of(value) if _is_code(value) else self._data(value)

    def _data(self, value: object) -> Iterator[str]:
        kind, whole = _path(type(value)), cast("Any", value)
        if isinstance(value, Tensor | np.ndarray):
            yield _array(whole)
        elif isinstance(value, Mapping):
            yield kind
            yield from self._named(cast("Mapping[object, object]", whole))
        elif isinstance(value, tuple | list):
            yield kind
            yield from self._all(cast("Iterable[object]", whole))
        elif isinstance(value, AbstractSet):  # its order differs between processes
            yield kind
            yield from sorted(" ".join(_Walk(self._top).words(x)) for x in cast("Iterable[object]", whole))
        elif dataclasses.is_dataclass(value):
            left_out = _IN_WORDS if isinstance(value, Objective) else ()
            yield from self.words(cast("object", type(whole)))
            names = [f.name for f in dataclasses.fields(whole) if f.init and f.name not in left_out]
            yield from self._named({name: getattr(whole, name) for name in names})
        elif self._is_own(type(value).__module__):
            yield from self.words(cast("object", type(whole)))
            slots = {name for c in type(whole).__mro__ for name in _slots(c) if hasattr(value, name)}
            yield from self._named({**{name: getattr(whole, name) for name in slots}, **getattr(value, "__dict__", {})})
        else:
            yield f"{kind} {in_words(whole)}"

    def _code_of(self, value: object) -> Iterator[str]:
        """The words of something that is called, or whose code is: a function, a class, a module."""
        whole = cast("Any", value)
        if isinstance(value, functools.partial):
            yield "partial"
            yield from self._all((whole.func, whole.args, whole.keywords))
        elif isinstance(value, types.CodeType):
            yield from self._compiled(value, None)
        elif isinstance(value, types.MethodType | staticmethod | classmethod):
            yield type(whole).__name__
            yield from self._all((whole.__func__, getattr(whole, "__self__", None)))
        elif isinstance(value, property):
            yield from self._all(("property", whole.fget, whole.fset))
        elif isinstance(value, type):
            yield from self._class(value)
        else:
            yield f"{type(whole).__name__} {_path(value)}"
            if isinstance(value, types.FunctionType) and self._is_own(value.__module__):
                yield from self._function(value)
        if "__wrapped__" in getattr(whole, "__dict__", {}):
            yield from self.words(whole.__wrapped__)

    def _function(self, function: types.FunctionType) -> Iterator[str]:
        yield from self._compiled(function.__code__, function.__doc__)
        yield from self._all((function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            try:
                yield from self.words(cell.cell_contents)
            except ValueError:  # a variable that has no value yet
                yield "empty"
        yield from self._named({k: v for k, v in vars(function).items() if k != "__wrapped__"})  # its marks
        yield from self._found_in(function.__globals__, sorted(set(_names(function.__code__))))

    def _found_in(self, space: Mapping[str, object], names: Iterable[str]) -> Iterator[str]:
        """The values of a module that code names, also those that it takes from other modules of the user."""
        for name in names:
            if name in space:
                value = space[name]
                known = id(value) in self._met
                yield f"{name} ="
                yield from self.words(value)
                if isinstance(value, types.ModuleType) and not known and self._is_own(value.__name__):
                    yield from self._found_in(vars(value), names)

    def _compiled(self, code: types.CodeType, text: str | None) -> Iterator[str]:
        """The compiled code without its place in the file and without its documentation string `text`."""
        yield f"{code.co_code.hex()} {getattr(code, 'co_exceptiontable', b'').hex()} {code.co_flags}"
        yield " ".join((*code.co_names, "|", *code.co_varnames, "|", *code.co_freevars, "|", *code.co_cellvars))
        yield f"{code.co_argcount} {code.co_posonlyargcount} {code.co_kwonlyargcount}"
        documented = text is not None and code.co_consts[:1] == (text,)
        yield from self._all(code.co_consts[1:] if documented else code.co_consts)

    def _class(self, found: type) -> Iterator[str]:
        yield f"class {_path(found)}"
        if self._is_own(found.__module__):
            yield from self._all(found.__bases__)
            yield from self._named({k: v for k, v in vars(found).items() if not _OF_A_CLASS.fullmatch(k)})

    def _all(self, values: Iterable[object]) -> Iterator[str]:
        yield "("
        for value in values:
            yield from self.words(value)
        yield ")"

    def _named(self, values: Mapping[Any, object]) -> Iterator[str]:
        for name in sorted(values, key=str):
            yield f"{name}:"
            yield from self.words(values[name])
        yield "end"

    def _is_own(self, module: str | None) -> bool:
        """Whether code of a module belongs to the user: not to this library, Python, or another installed package."""
        top = _top(module or "")
        if top in ("", "bandpo") or (top in sys.stdlib_module_names and top != "__main__"):
            return False
        return top == self._top or not _is_installed(module or "")


def _is_code(value: object) -> bool:
    code = (types.CodeType, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
    kinds: Any = (functools.partial, staticmethod, classmethod, property, type, *code)
    return isinstance(value, kinds) or "__wrapped__" in getattr(value, "__dict__", {})


@functools.cache
def _is_installed(module: str) -> bool:
    try:
        path = inspect.getfile(sys.modules[module])
    except (KeyError, TypeError):  # a module without a file
        return False
    return bool({"site-packages", "dist-packages"} & set(re.split(r"[/\\]", path)))


def _top(module: str) -> str:
    return module.partition(".")[0]


def _path(value: object) -> str:
    return f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', getattr(value, '__name__', ''))}"


def _slots(kind: type) -> tuple[str, ...]:
    found = vars(kind).get("__slots__", ())
    return (found,) if isinstance(found, str) else tuple(found)


def _names(code: types.CodeType) -> Iterator[str]:
    """The global names and the attributes that code names, with the functions inside of it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _array(value: Tensor | np.ndarray[Any, Any]) -> str:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    else:
        data = repr(value.tolist()).encode()
    return f"{type(value).__name__} {value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"
