"""Literal values in Python source, found by parsing alone: nothing is compiled, imported or executed.

A name counts as known where it is bound to a literal once, or several times by statements that follow each other. Whatever
depends on a condition, a loop, an argument, the environment or another module is `UNKNOWN`. `exec`, `globals()`, `import *` and
the like may bind any name, so that what was bound before them is not known after them.
"""

import ast
import math
import operator
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, TypeAlias, cast

MAX_SOURCE_BYTES = 1 << 18
_MAX_STEPS = 20_000  # names, operators and values that are followed for one file
_MAX_DEPTH = 40  # names and operators within each other
_MAX_BINDINGS = 200  # places that bind one name
_LARGEST, _LARGEST_POWER = 10**15, 64  # of numbers that arithmetic works with, and of exponents
_MAX_NODES = 200  # of an expression in a message
_MAX_SHOWN = 60  # characters of an expression in a message

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


_untyped: Any = operator


def _raised(base: Any, exponent: Any) -> Any:
    return base**exponent


_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: _untyped.add,
    ast.Sub: _untyped.sub,
    ast.Mult: _untyped.mul,
    ast.Div: _untyped.truediv,
    ast.FloorDiv: _untyped.floordiv,
    ast.Mod: _untyped.mod,
    ast.Pow: _raised,
}
_UNARY: Mapping[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
}
_DTYPES = frozenset({"float32", "float16", "bfloat16", "float64", "half", "float", "double"})
_CHANGING = frozenset({"update", "pop", "popitem", "clear", "setdefault", "append", "extend", "insert", "remove"})
_BINDS_ANY = frozenset({"exec", "globals", "locals", "vars", "eval"})


_TRY = (ast.Try, getattr(ast, "TryStar", ast.Try))  # Python 3.11


class _Unknown:
    def __repr__(self) -> str:
        return "not known"


UNKNOWN = _Unknown()
"""A value that is not a literal, and that cannot be determined from the source."""


@dataclass(frozen=True)
class Binding:
    """A place where a name gets a value.

    Args:
        value: The expression, or the class or function; None for anything else (a parameter, an import, a loop).
        time: Position among all statements of the file.
        direct: Whether the statement always runs when the statements around it do.
    """

    value: ast.expr | ast.ClassDef | Function | None
    time: int
    direct: bool


@dataclass(frozen=True)
class Change:
    """A place where what a name stands for is changed: `name.key = value`, `name[key] = value` or `name.update(...)`.

    Args:
        key: The attribute or the constant key; None where it may be any, "" for another name of the same object.
        value: The new value; None where it is not an expression of its own.
        time: Position among all statements of the file.
        direct: Whether the statement always runs when the statements around it do.
        scope: Where the statement is.
        line: Line of the statement.
    """

    key: str | None
    value: ast.expr | None
    time: int
    direct: bool
    scope: "Scope"
    line: int


@dataclass(eq=False)
class Scope:
    """The names of a module, a function or a class.

    Args:
        node: The module, function or class.
        parent: The scope around it; None for the module.
        bindings: Where each name is bound.
        changes: Where what a name stands for is changed.
        opened: Positions of statements that may bind any name.
        shared: Names that belong to a scope further out (`global`, `nonlocal`).
    """

    node: ast.AST
    parent: "Scope | None" = None
    bindings: dict[str, list[Binding]] = field(default_factory=dict[str, list[Binding]])
    changes: dict[str, list[Change]] = field(default_factory=dict[str, list[Change]])
    opened: list[int] = field(default_factory=list[int])
    shared: dict[str, "Scope"] = field(default_factory=dict[str, "Scope"])


@dataclass(frozen=True, eq=False)
class Call:
    """A call in the source.

    Args:
        node: The call.
        name: What is called, with imported names resolved: "trl.GRPOConfig".
        scope: Where it is.
        time: Position among all statements of the file.
        direct: Whether its statement always runs when the statements around it do.
    """

    node: ast.Call
    name: str
    scope: Scope
    time: int
    direct: bool


@dataclass
class Given:
    """The keyword arguments of a call, or the items of a mapping.

    Args:
        values: The literal ones.
        unread: Expressions that are no literals, as text with their line.
        opened: Texts of what may set any key, such as `**options`.
    """

    values: dict[str, Any] = field(default_factory=dict[str, Any])
    unread: dict[str, str] = field(default_factory=dict[str, str])
    opened: list[str] = field(default_factory=list[str])

    def set(self, key: str, value: Any, text: str | Callable[[], str] = "") -> None:
        """Set a key to a literal, or to the text of an expression that is `UNKNOWN`.

        Args:
            key: The key.
            value: The value.
            text: The expression with its line, or a function that gives it.
        """
        self.values.pop(key, None)
        self.unread.pop(key, None)
        if value is UNKNOWN:
            self.unread[key] = text if isinstance(text, str) else text()
        else:
            self.values[key] = value

    def add(self, other: "Given") -> None:
        """Set all that another one sets.

        Args:
            other: The later one.
        """
        if other.opened:  # what was set before may be replaced
            self.unread |= {key: f"{self.values.pop(key)!r} (or what replaces it)" for key in [*self.values]}
        for key, value in other.values.items():
            self.set(key, value)
        for key, text in other.unread.items():
            self.set(key, UNKNOWN, text)
        self.opened += other.opened


class Source:
    """The scopes, calls and literal values of Python source.

    Args:
        parts: Name and text of each part, such as the cells of a notebook; the name is "" where there is only one.
        skipped: Called with the part and the error where a part is no Python; None raises the error.

    Raises:
        ValueError: If the source is not Python, is too long or nested too deeply.
    """

    def __init__(self, parts: Sequence[tuple[str, str]], skipped: Callable[[str, str], None] | None = None) -> None:
        if sum(len(text) for _, text in parts) > MAX_SOURCE_BYTES:
            raise ValueError(f"it has more than {MAX_SOURCE_BYTES:,} characters of Python")
        self.module = Scope(ast.Module([], []))
        self.calls: list[Call] = []
        self.classes: dict[str, list[tuple[ast.ClassDef, Scope]]] = {}
        self.imports: dict[str, str] = {}
        self.stored: set[str] = set()
        self.deep: dict[str, tuple[str, ast.AST]] = {}  # attributes of attributes that are set: whose, and where
        self._starts: list[int] = [1]
        self._parts = [name for name, _ in parts]
        self._time = self._steps = 0
        for name, text in parts:
            body: list[ast.stmt] = []
            try:
                tree = parse(text)
                if len(self._starts) > 1:
                    ast.increment_lineno(tree, self._starts[-1] - 1)
                body = tree.body
            except ValueError as error:
                if skipped is None:
                    raise
                skipped(name, str(error))
                self._time += 1
                self.module.opened.append(self._time)
            self._starts.append(self._starts[-1] + text.count("\n") + 1)
            try:
                self._statements(body, self.module, direct=True)
            except RecursionError:
                raise ValueError("its statements are nested too deeply") from None

    def line(self, node: ast.AST | int) -> str:
        """Where something is, for a message: "line 3" or "cell 2, line 3".

        Args:
            node: A node of the source, or its line in all parts together.
        """
        number = node if isinstance(node, int) else cast("int", getattr(node, "lineno", 1))
        part = max(0, min(bisect_right(self._starts, number) - 1, len(self._parts) - 1))
        place = f"line {number - self._starts[part] + 1}"
        return f"{self._parts[part]}, {place}" if self._parts[part] else place

    def text(self, node: ast.AST) -> str:
        """An expression with its line, for a message.

        Args:
            node: The expression.
        """
        try:
            is_long = sum(1 for _ in islice(ast.walk(node), _MAX_NODES)) == _MAX_NODES
            shown = "an expression" if is_long else " ".join(ast.unparse(node).split())
        except (RecursionError, ValueError):
            shown = "an expression"
        shown = shown if len(shown) <= _MAX_SHOWN else shown[: _MAX_SHOWN - 3] + "..."
        return f"{shown} ({self.line(node)})"

    # ---- what is where ----

    def _statements(self, body: Iterable[ast.stmt], scope: Scope, *, direct: bool) -> None:
        for statement in body:
            self._time += 1
            self._statement(statement, scope, direct=direct)

    def _statement(self, node: ast.stmt, scope: Scope, *, direct: bool) -> None:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self._bind(node.name, node, scope, direct=direct)
                self._expressions([*node.decorator_list, node.args], scope, direct=direct)
                self._statements(node.body, self._function(node, scope), direct=True)
            case ast.ClassDef():
                self._bind(node.name, node, scope, direct=direct)
                self._expressions([*node.decorator_list, *node.bases, *node.keywords], scope, direct=direct)
                inner = Scope(node, scope)
                self.classes.setdefault(node.name, []).append((node, inner))
                self._statements(node.body, inner, direct=True)
            case ast.Import() | ast.ImportFrom():
                self._import(node, scope, direct=direct)
            case ast.Global() | ast.Nonlocal():
                outer = self.module if isinstance(node, ast.Global) else scope.parent or self.module
                scope.shared |= dict.fromkeys(node.names, outer)
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign() | ast.Delete():
                self._assignment(node, scope, direct=direct)
            case ast.If():
                self._expressions([node.test], scope, direct=direct)
                is_main = direct and "__name__" in {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
                self._statements(node.body, scope, direct=is_main)
                self._statements(node.orelse, scope, direct=False)
            case ast.With() | ast.AsyncWith():
                self._expressions(node.items, scope, direct=direct)
                for item in node.items:
                    self._targets(item.optional_vars, None, scope, direct=direct)
                self._statements(node.body, scope, direct=direct)
            case ast.For() | ast.AsyncFor():
                self._expressions([node.iter], scope, direct=direct)
                self._targets(node.target, None, scope, direct=False)
                self._statements([*node.body, *node.orelse], scope, direct=False)
            case ast.While():
                self._expressions([node.test], scope, direct=False)
                self._statements([*node.body, *node.orelse], scope, direct=False)
            case ast.Match():
                self._expressions([node.subject], scope, direct=direct)
                for case in node.cases:
                    for pattern in ast.walk(case.pattern):
                        name = getattr(pattern, "name", None) or getattr(pattern, "rest", None)
                        if isinstance(name, str):
                            self._bind(name, None, scope, direct=False)
                    self._statements(case.body, scope, direct=False)
            case _ if isinstance(node, _TRY):
                self._try(cast("ast.Try", node), scope, direct=direct)
            case _:
                self._expressions([node], scope, direct=direct)

    def _try(self, node: ast.Try, scope: Scope, *, direct: bool) -> None:
        self._statements(node.body, scope, direct=direct and not node.handlers)
        for handler in node.handlers:
            if handler.name:
                self._bind(handler.name, None, scope, direct=False)
            self._statements(handler.body, scope, direct=False)
        self._statements(node.orelse, scope, direct=False)
        self._statements(node.finalbody, scope, direct=direct)

    def _function(self, node: Function, scope: Scope) -> Scope:
        inner = Scope(node, scope)
        given = node.args
        for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg):
            if argument is not None:
                inner.bindings.setdefault(argument.arg, []).append(Binding(None, self._time, direct=True))
        return inner

    def _assignment(
        self, node: ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Delete, scope: Scope, *, direct: bool
    ) -> None:
        targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [node.target]
        value = None if isinstance(node, ast.Delete) else node.value
        self._expressions([x for x in (*targets, value) if x is not None], scope, direct=direct)
        if isinstance(node, ast.AnnAssign) and value is None:
            return
        for target in targets:
            self._targets(target, None if isinstance(node, ast.AugAssign) else value, scope, direct=direct)

    def _targets(self, target: ast.expr | None, value: ast.expr | None, scope: Scope, *, direct: bool) -> None:
        match target:
            case ast.Name():
                if isinstance(value, ast.Name):  # what is changed through one of the names changes both
                    self._change(value, "", None, scope, target, direct=direct)
                self._bind(target.id, value, scope, direct=direct)
            case ast.Tuple() | ast.List():
                several = isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts)
                parts = cast("ast.Tuple", value).elts if several else [None] * len(target.elts)
                starred = any(isinstance(part, ast.Starred) for part in [*target.elts, *(p for p in parts if p)])
                for inner, part in zip(target.elts, parts, strict=True):
                    self._targets(inner, None if starred else part, scope, direct=direct)
            case ast.Starred():
                self._targets(target.value, None, scope, direct=direct)
            case ast.Attribute():
                self.stored.add(target.attr)
                self._change(target.value, target.attr, value, scope, target, direct=direct)
            case ast.Subscript():
                key = target.slice.value if isinstance(target.slice, ast.Constant) else None
                self._change(target.value, key if isinstance(key, str) else None, value, scope, target, direct=direct)
            case _:
                pass

    def _change(
        self,
        owner: ast.expr,
        key: str | None,
        value: ast.expr | None,
        scope: Scope,
        node: ast.AST,
        *,
        direct: bool,
    ) -> None:
        if isinstance(owner, ast.Attribute) and key:  # self.args.beta = 0.1
            self.deep.setdefault(key, (owner.attr, node))
        if isinstance(owner, ast.Name):
            home = self._home(owner.id, scope) or scope
            change = Change(key, value, self._time, direct, scope, getattr(node, "lineno", 1))
            home.changes.setdefault(owner.id, []).append(change)

    def _bind(self, name: str, value: ast.expr | ast.ClassDef | Function | None, scope: Scope, *, direct: bool) -> None:
        home = scope.shared.get(name)
        binding = Binding(value, self._time, direct and home is None)
        (home or scope).bindings.setdefault(name, []).append(binding)

    def _import(self, node: ast.Import | ast.ImportFrom, scope: Scope, *, direct: bool) -> None:
        module = "" if isinstance(node, ast.Import) else "." * node.level + (node.module or "")
        for alias in node.names:
            if alias.name == "*":
                scope.opened.append(self._time)
                self.imports.setdefault(f"{module}.*", module)
                continue
            full = f"{module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
            name = alias.asname or (alias.name if isinstance(node, ast.ImportFrom) else alias.name.partition(".")[0])
            self.imports[name] = full if alias.asname or isinstance(node, ast.ImportFrom) else name
            self._bind(name, None, scope, direct=direct)

    def _expressions(self, nodes: Iterable[ast.AST], scope: Scope, *, direct: bool) -> None:
        """The calls in expressions, and the names that they bind."""
        pending: list[tuple[ast.AST, Scope]] = [(node, scope) for node in nodes]
        while pending:
            node, place = pending.pop()
            match node:
                case ast.Name() | ast.Constant():
                    continue
                case ast.Lambda():
                    place = self._function(node, place)
                case ast.NamedExpr():
                    self._targets(node.target, node.value, place, direct=False)
                case ast.comprehension():
                    self._targets(node.target, None, place, direct=False)
                case ast.Call():
                    self._call(node, place, direct=direct)
                case _:
                    pass
            pending += [(inner, place) for inner in ast.iter_child_nodes(node)]

    def _call(self, node: ast.Call, scope: Scope, *, direct: bool) -> None:
        name = self.dotted(node.func)
        self.calls.append(Call(node, name, scope, self._time, direct))
        if name in _BINDS_ANY and not (name == "vars" and node.args) and name != "eval":
            self.module.opened.append(self._time)
        if name == "setattr" and len(node.args) == 3:
            key = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
            self.stored.add(str(key))
            self._change(node.args[0], key if isinstance(key, str) else None, node.args[2], scope, node, direct=direct)
        elif name in ("setattr", "vars") and node.args:
            self._change(node.args[0], None, None, scope, node, direct=direct)
        if isinstance(node.func, ast.Attribute) and (node.func.attr in _CHANGING or node.func.attr.startswith("set_")):
            self._change(node.func.value, None, None, scope, node, direct=direct)

    # ---- what a name stands for ----

    def dotted(self, node: ast.AST) -> str:
        """The dotted name of an expression with imported names resolved, "" for another expression.

        Args:
            node: An expression.
        """
        names: list[str] = []
        while isinstance(node, ast.Attribute) and len(names) < _MAX_DEPTH:
            names.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return ""
        return ".".join([self.imports.get(node.id, node.id), *reversed(names)])

    def _home(self, name: str, scope: Scope) -> Scope | None:
        """The scope to which a name belongs."""
        place: Scope | None = scope.shared.get(name, scope)
        first = place
        while place is not None:
            if name in place.bindings and (place is first or not isinstance(place.node, ast.ClassDef)):
                return place
            place = place.parent
        return None

    def bound(self, name: str, scope: Scope, time: int) -> tuple[list[Binding], Scope | None]:
        """The bindings that a name may have at a place, and the scope to which it belongs.

        Args:
            name: The name.
            scope: Where it is used.
            time: When it is used.
        """
        home = self._home(name, scope)
        if home is None:
            return [], None
        found = home.bindings[name]
        if home is scope and len(found) <= _MAX_BINDINGS and all(b.direct for b in found):
            found = [b for b in found if b.time < time][-1:]
        last = bisect_right(home.opened, time - 1)
        opened = home.opened[last - 1] if last else 0
        if len(found) > _MAX_BINDINGS or any(b.time < opened for b in found):
            return [Binding(None, time, direct=False)], home
        return found, home

    def changes(self, name: str, scope: Scope, since: int) -> list[Change]:
        """The places after a statement where what a name stands for is changed, in order.

        Args:
            name: The name.
            scope: The scope to which it belongs.
            since: Position of the statement.
        """
        return [change for change in scope.changes.get(name, []) if change.time >= since]

    def values(self, node: ast.AST, scope: Scope, time: int) -> Any:
        """The value of an expression if it is a literal, or made of literals; else `UNKNOWN`.

        Args:
            node: The expression.
            scope: Where it is.
            time: When it is computed.
        """
        return self._value(node, scope, time, 0)

    def _value(self, node: ast.AST | None, scope: Scope, time: int, depth: int) -> Any:
        self._steps += 1
        if node is None or depth > _MAX_DEPTH or self._steps > _MAX_STEPS:
            return UNKNOWN

        def inner(part: ast.AST | None) -> Any:
            return self._value(part, scope, time, depth + 1)

        match node:
            case ast.Constant():
                return node.value if isinstance(node.value, str | int | float | bool | None) else UNKNOWN
            case ast.Name():
                return self._named(node.id, scope, time, depth)
            case ast.UnaryOp(op, operand):
                return _computed(_UNARY.get(type(op)), inner(operand))
            case ast.BinOp(left, op, right):
                return _computed(_BINARY.get(type(op)), inner(left), inner(right))
            case ast.Tuple(elts) | ast.List(elts):
                return _whole([inner(part) for part in elts])
            case ast.Dict(keys, values):
                names, found = [inner(key) for key in keys], [inner(value) for value in values]
                known = all(isinstance(name, str) for name in names) and _whole(found) is not UNKNOWN
                return dict(zip(names, found, strict=True)) if known else UNKNOWN
            case ast.IfExp(test, body, orelse):
                chosen = inner(test)
                return UNKNOWN if chosen is UNKNOWN else inner(body if chosen else orelse)
            case ast.Subscript(value, index):
                return _item(inner(value), inner(index))
            case ast.Attribute():
                return self._attribute(node, scope, time, depth)
            case ast.Call():
                return self._built(node, scope, time, depth)
            case _:
                return UNKNOWN

    def _named(self, name: str, scope: Scope, time: int, depth: int) -> Any:
        bindings, home = self.bound(name, scope, time)
        if home is None:
            return UNKNOWN
        found = [self._value(b.value, home, b.time, depth + 1) for b in bindings]
        if not found or any(value is UNKNOWN or type(value) is not type(found[0]) for value in found):
            return UNKNOWN
        if any(value != found[0] for value in found[1:]):
            return UNKNOWN
        first: object = found[0]
        is_changed = isinstance(first, dict | list) and self.changes(name, home, min(b.time for b in bindings))
        return UNKNOWN if is_changed else cast("Any", first)

    def _attribute(self, node: ast.Attribute, scope: Scope, time: int, depth: int) -> Any:
        """A dtype of torch, or an attribute of a class of this file that has plain values."""
        name = self.dotted(node)
        if name in ("math.inf", "numpy.inf", "torch.inf"):
            return math.inf
        module, _, attribute = name.rpartition(".")
        if module == "torch" and attribute in _DTYPES:
            return attribute
        if not isinstance(node.value, ast.Name) or node.attr in self.stored or "None" in self.stored:
            return UNKNOWN
        bindings, home = self.bound(node.value.id, scope, time)
        if home is None or len(bindings) != 1:
            return UNKNOWN
        value = bindings[0].value
        options: ast.Call | None = None
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and not value.args:
            options = value
            bindings, home = self.bound(value.func.id, home, bindings[0].time)
            value = bindings[0].value if len(bindings) == 1 and home else None
        if (
            not isinstance(value, ast.ClassDef)
            or value.bases
            or any(isinstance(s, ast.FunctionDef) for s in value.body)
        ):
            return UNKNOWN
        if options and any(keyword.arg in (None, node.attr) for keyword in options.keywords):
            given = [k.value for k in options.keywords if k.arg == node.attr]
            return self._value(given[0], scope, time, depth + 1) if len(given) == 1 else UNKNOWN
        inner = next((s for c, s in self.classes.get(value.name, []) if c is value), None)
        found = inner.bindings.get(node.attr, []) if inner else []
        return self._value(found[0].value, inner or scope, time, depth + 1) if len(found) == 1 else UNKNOWN

    def _built(self, node: ast.Call, scope: Scope, time: int, depth: int) -> Any:
        """The value of `dict(...)`, `int(...)`, `float(...)` and `field(default=...)`."""
        name = self.dotted(node.func)
        given = [self._value(argument, scope, time, depth + 1) for argument in node.args]
        if self._home(name, scope) is not None and name not in self.imports:
            return UNKNOWN  # a function of this file
        if name in ("int", "float", "str", "bool") and len(given) == 1 and not node.keywords:
            try:
                kinds: dict[str, Callable[[Any], Any]] = {"int": int, "float": float, "str": str, "bool": bool}
                plain = isinstance(given[0], str | int | float | bool) and len(str(given[0])) < 100
                return kinds[name](given[0]) if plain else UNKNOWN
            except (ValueError, OverflowError):
                return UNKNOWN
        if name == "dict" and not node.args and all(keyword.arg for keyword in node.keywords):
            found = {str(k.arg): self._value(k.value, scope, time, depth + 1) for k in node.keywords}
            return UNKNOWN if _whole([*found.values()]) is UNKNOWN else found
        if name in ("field", "dataclasses.field") and not node.args:
            default = [k.value for k in node.keywords if k.arg == "default"]
            return self._value(default[0], scope, time, depth + 1) if default else UNKNOWN
        return UNKNOWN

    # ---- keyword arguments ----

    def given(self, call: Call) -> Given:
        """The keyword arguments of a call.

        Args:
            call: The call.
        """
        return self._keywords(call.node, call.scope, call.time, 0)

    def _keywords(self, node: ast.Call, scope: Scope, time: int, depth: int) -> Given:
        found = Given()
        for keyword in node.keywords:
            if keyword.arg is None:
                found.add(self._mapping(keyword.value, scope, time, depth + 1))
            else:
                value = self._value(keyword.value, scope, time, depth + 1)
                found.set(keyword.arg, value, partial(self.text, keyword.value))
        return found

    def _mapping(self, node: ast.AST | None, scope: Scope, time: int, depth: int) -> Given:
        """The items of a mapping that a call takes with `**`."""
        self._steps += 1
        found = Given()
        if node is None or depth > _MAX_DEPTH or self._steps > _MAX_STEPS:
            found.opened.append("an expression")
            return found
        match node:
            case ast.Dict():
                for key, value in zip(node.keys, node.values, strict=True):
                    name = None if key is None else self._value(key, scope, time, depth + 1)
                    if key is None:
                        found.add(self._mapping(value, scope, time, depth + 1))
                    elif isinstance(name, str):
                        found.set(name, self._value(value, scope, time, depth + 1), partial(self.text, value))
                    elif not found.opened:
                        found.add(Given(opened=[self.text(node)]))
                return found
            case ast.Call() if self.dotted(node.func) == "dict" and len(node.args) <= 1:
                for argument in node.args:
                    found.add(self._mapping(argument, scope, time, depth + 1))
                found.add(self._keywords(node, scope, time, depth + 1))
                return found
            case ast.BinOp(left, ast.BitOr(), right):
                found.add(self._mapping(left, scope, time, depth + 1))
                found.add(self._mapping(right, scope, time, depth + 1))
                return found
            case ast.Name():
                bindings, home = self.bound(node.id, scope, time)
                value = bindings[0].value if len(bindings) == 1 else None
                if home is not None and isinstance(value, ast.expr) and not isinstance(value, ast.Name):
                    found = self._mapping(bindings[0].value, home, bindings[0].time, depth + 1)
                    self.apply(found, node.id, home, bindings[0].time, (scope, time))
                    if changed := self._changed_by(node.id, scope):
                        found.add(Given(opened=changed))
                    return found
            case _:
                pass
        found.opened.append(self.text(node))
        return found

    def _changed_by(self, name: str, scope: Scope) -> list[str]:
        """The calls of functions of this file that get a mapping and change one."""
        found: list[str] = []
        for call in self.calls:
            given = [*call.node.args, *(k.value for k in call.node.keywords if k.arg)]
            if not isinstance(call.node.func, ast.Name) or not any(
                isinstance(a, ast.Name) and a.id == name for a in given
            ):
                continue
            functions, _ = self.bound(call.node.func.id, scope, call.time)
            if any(_changes_a_mapping(binding.value) for binding in functions[:1]):
                found.append(self.text(call.node))
        return found[:_MAX_NODES]

    def apply(self, given: Given, name: str, home: Scope, since: int, until: tuple[Scope, int]) -> None:
        """Apply the changes to what a name stands for, between two statements.

        Args:
            given: What was set before.
            name: The name.
            home: The scope to which it belongs.
            since: Position of the first statement.
            until: Scope and position of the last one.
        """
        scope, time = until
        shared = ""
        for change in self.changes(name, home, since):
            self._steps += 1
            if self._steps > _MAX_STEPS:
                given.add(Given(opened=[f"what changes {name}"]))
                return
            in_order = change.direct and change.scope is home is scope
            if in_order and change.time >= time:
                continue
            place = f" ({self.line(change.line)})"
            if change.key == "":
                shared = f"another name of {name}{place}"
            elif change.key is None:
                given.add(Given(opened=[f"a change of {name}{place}"]))
            elif change.value is None or not in_order:
                what = f"a change of {name}{place}" if change.value is None else self.text(change.value)
                given.set(change.key, UNKNOWN, f"{what}, if it runs,")
            else:
                value = self._value(change.value, change.scope, change.time, 0)
                given.set(change.key, value, partial(self.text, change.value))
        if shared:  # what is set through either name after that is set for both
            given.add(Given(opened=[shared]))


def _changes_a_mapping(function: object) -> bool:
    """Whether a function sets an item of something, or calls a method such as `update`."""
    if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    return any(
        (isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load))
        or (isinstance(node, ast.Attribute) and node.attr in _CHANGING)
        for node in ast.walk(function)
    )


def parse(text: str) -> ast.Module:
    """The syntax tree of a text.

    Args:
        text: Python source.

    Raises:
        ValueError: If it is not Python, is too long or nested too deeply.
    """
    if len(text) > MAX_SOURCE_BYTES:
        raise ValueError(f"it has more than {MAX_SOURCE_BYTES:,} characters of Python")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except SyntaxError as error:
        raise ValueError(f"it is not Python: {error.msg} (line {error.lineno or 1})") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"it is not Python that can be read: {error or 'nested too deeply'}") from None


def _computed(function: Callable[..., Any] | None, *values: Any) -> Any:
    if function is None or any(not isinstance(value, int | float) for value in values):
        is_not = function is operator.not_ and values[0] is None
        return True if is_not else UNKNOWN
    if any(abs(value) > _LARGEST for value in values) or (
        len(values) == 2 and function is _BINARY[ast.Pow] and abs(values[1]) > 64
    ):
        return UNKNOWN
    try:
        found = function(*values)
    except (ArithmeticError, ValueError):
        return UNKNOWN
    return found if isinstance(found, int | float) and abs(found) <= _LARGEST**2 else UNKNOWN


def _whole(values: list[Any]) -> Any:
    return UNKNOWN if any(value is UNKNOWN for value in values) else values


def _item(value: Any, index: Any) -> Any:
    if index is UNKNOWN or value is UNKNOWN:
        return UNKNOWN
    try:
        return cast("Any", value)[index] if isinstance(value, dict | list) else UNKNOWN
    except (KeyError, IndexError, TypeError):
        return UNKNOWN
