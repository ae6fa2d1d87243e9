"""What the tests of the house read from the source: modules, public names, signatures and prose, without importing any."""

import ast
import importlib.util
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Module:
    """One file of `src/bandpo`."""

    name: str
    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def room(self) -> str:
        """The part after `bandpo.`, such as `bounds` for `bandpo.bounds.band`; `bandpo` for the package itself."""
        return self.name.split(".")[1] if "." in self.name else self.name

    def statements(self) -> Iterator[ast.stmt]:
        """Top-level statements, and those under `if TYPE_CHECKING:`."""
        for node in self.tree.body:
            yield from node.body if isinstance(node, ast.If) else [node]


@cache
def tool(name) -> ModuleType:
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def modules() -> dict[str, Module]:
    """All modules of bandpo by name."""
    found = {}
    for path in sorted((SRC / "bandpo").rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Module(name, path)
    return found


_PROMISED = """bounds divergences experimental groups logprobs losses metrics objective preference schedules selection
    surrogates terms testing zoo"""
CORE = [name for name in (f"bandpo.{room}" for room in _PROMISED.split()) if name in modules()]
"""The modules whose names are promised."""


def imports(module: Module) -> Iterator[tuple[str, str | None, int]]:
    """Each import of bandpo's own: the module, the name taken from it (None for the module itself), and the line."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "bandpo":
                    yield alias.name, None, node.lineno
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parent = module.name.split(".")
                parent = parent[: len(parent) - node.level + module.is_package]
                source = ".".join([*parent, *filter(None, [node.module])])
            if source.partition(".")[0] == "bandpo":
                for alias in node.names:
                    inner = f"{source}.{alias.name}"
                    yield (inner, None, node.lineno) if inner in modules() else (source, alias.name, node.lineno)


def _bound(node: ast.stmt) -> list[str]:
    if isinstance(node, (*FUNCTION, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    names = [t.elts if isinstance(t, ast.Tuple) else [t] for t in targets]
    return [t.id for group in names for t in group if isinstance(t, ast.Name)]


def public_names(module: str) -> list[str]:
    """`__all__` where it is a literal; otherwise what is defined, or imported `as` itself, without an underscore."""
    found = []
    for node in modules()[module].statements():
        if _bound(node) == ["__all__"] and isinstance(node.value, ast.List | ast.Tuple):
            plain = [e.value.elts if isinstance(e, ast.Starred) else [e] for e in node.value.elts]
            return sorted(ast.literal_eval(e) for group in plain for e in group)
        if isinstance(node, ast.ImportFrom):
            found += [a.asname for a in node.names if a.asname == a.name]
        found += _bound(node)
    return sorted({name for name in found if not name.startswith("_")})


def definition(module: str, name: str) -> tuple[Module, Definition]:
    """Where a name is made, through any number of re-exports."""
    home = modules()[module]
    for node in home.statements():
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
            original = next(a.name for a in node.names if (a.asname or a.name) == name)
            return definition(str(node.module), original)
        if name in _bound(node):
            return home, node
    raise LookupError(f"{module} has no {name}")


def decorators(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> set[str]:
    return {ast.unparse(d).partition("(")[0].rpartition(".")[2] for d in node.decorator_list}


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef, *, bound: bool = False) -> list[ast.arg]:
    """All parameters of a function, without `self` where it is a method."""
    a = node.args
    found = [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]
    return found[1:] if bound and "staticmethod" not in decorators(node) else found


def fields(node: ast.ClassDef) -> list[ast.AnnAssign]:
    """The public fields of a dataclass or NamedTuple that its constructor takes."""
    return [
        n
        for n in node.body
        if isinstance(n, ast.AnnAssign)
        and isinstance(n.target, ast.Name)
        and not n.target.id.startswith("_")
        and not (n.value is not None and "init=False" in ast.unparse(n.value))
        and "ClassVar" not in ast.unparse(n.annotation)
    ]


def has_fields(node: ast.ClassDef) -> bool:
    """Whether the fields of a class are the parameters of its constructor."""
    return "dataclass" in decorators(node) or any(ast.unparse(b) == "NamedTuple" for b in node.bases)


def methods(node: ast.ClassDef) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Public methods and `__call__`."""
    return [n for n in node.body if isinstance(n, FUNCTION) and (not n.name.startswith("_") or n.name in ("__call__",))]


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef, *, bound: bool = False) -> list[str]:
    """One text for each parameter, the markers `/` and `*` among them, and `-> type` last."""
    a = node.args
    positional = [*a.posonlyargs, *a.args]
    plain: list[ast.expr | None] = [None] * (len(positional) - len(a.defaults))
    found = [_parameter(x, d) for x, d in zip(positional, [*plain, *a.defaults], strict=True)]
    if a.posonlyargs:
        found.insert(len(a.posonlyargs), "/")
    if bound and "staticmethod" not in decorators(node):
        found = found[1:]
    if a.vararg:
        found.append(f"*{_parameter(a.vararg, None)}")
    elif a.kwonlyargs:
        found.append("*")
    found += [_parameter(x, d) for x, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    if a.kwarg:
        found.append(f"**{_parameter(a.kwarg, None)}")
    return [*found, f"-> {ast.unparse(node.returns)}" if node.returns else ""]


def _parameter(x: ast.arg, default: ast.expr | None) -> str:
    kind = f": {ast.unparse(x.annotation)}" if x.annotation else ""
    return f"{x.arg}{kind}" + (
        "" if default is None else f" = {ast.unparse(default)}" if kind else f"={ast.unparse(default)}"
    )


@dataclass(frozen=True)
class Prose:
    """A docstring, a comment or a text that a user may see."""

    kind: str
    line: int
    text: str


def prose(module: Module) -> Iterator[Prose]:
    """Everything in a module that is written for people."""
    seen: set[ast.AST] = set()
    for node in ast.walk(module.tree):  # parents come before what they hold
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            text = statement.value if isinstance(statement, ast.Expr) else None
            if _is_text(text):
                seen.add(text)
                first = statement is body[0] and not isinstance(node, ast.If)
                yield Prose("docstring" if first else "attribute", statement.lineno, text.value)
        if isinstance(node, ast.JoinedStr):
            seen.update(node.values)
            yield Prose("message", node.lineno, "".join(v.value if _is_text(v) else "{}" for v in node.values))
        elif _is_text(node) and node not in seen and re.search(r"[a-z] [a-z]", node.value):
            yield Prose("message", node.lineno, node.value)
    for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
        if token.type == tokenize.COMMENT:
            yield Prose("comment", token.start[0], token.string.lstrip("# "))


def _is_text(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
