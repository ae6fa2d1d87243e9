"""The contract of the public API: names and signatures as in tests/golden/api.txt, docstrings that say what a user must know.

`python tests/unit/test_api.py --write` writes the golden file anew, for a change that is meant.
"""

import ast
import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
from sources import (
    CORE,
    FUNCTION,
    ROOT,
    Module,
    definition,
    fields,
    has_fields,
    methods,
    modules,
    parameters,
    public_names,
    signature,
)

GOLDEN = ROOT / "tests" / "golden" / "api.txt"
WRITE = "python tests/unit/test_api.py --write"

# ---------------------------------------------------------------- names and signatures


def laid_out(head: str, parts: list[str], indent: str) -> Iterator[str]:
    """`head(parameters) -> type` on one line if it is short, else a line for each parameter, for diffs."""
    *inside, returns = parts
    line = f"{indent}{head}({', '.join(inside)}) {returns}".rstrip()
    if len(line) <= 100:
        yield line
        return
    yield f"{indent}{head}("
    yield from (f"{indent}    {part}," for part in inside)
    yield f"{indent}) {returns}".rstrip()


def described(module: str, name: str) -> Iterator[str]:
    """A public name as text, with its methods."""
    _, node = definition(module, name)
    if isinstance(node, FUNCTION):
        yield from laid_out(f"def {name}", signature(node), "  ")
    elif isinstance(node, ast.ClassDef):
        made = next((n for n in node.body if isinstance(n, FUNCTION) and n.name == "__init__"), None)
        parts = [*(ast.unparse(n) for n in fields(node)), ""] if has_fields(node) else [""]
        if made is not None:
            parts = [*signature(made, bound=True)[:-1], ""]
        bases = ", ".join(ast.unparse(b) for b in node.bases)
        yield from laid_out(f"class {name}{f'[{bases}]' if bases else ''}", parts, "  ")
        for method in sorted(methods(node), key=lambda n: n.name):
            if any("property" in ast.unparse(d) for d in method.decorator_list):
                yield f"    property {method.name}: {ast.unparse(method.returns) if method.returns else ''}"
            else:
                yield from laid_out(f"def {method.name}", signature(method, bound=True), "    ")
    elif isinstance(node, ast.AnnAssign):
        yield f"  {name}: {ast.unparse(node.annotation)}"
    else:
        yield f"  {name}"


def api() -> str:
    """The public API as text."""
    lines = [f"# Made by `{WRITE}`; a change of this file is a change of the public API.", "", "bandpo"]
    lines += [f"  {name} ({definition('bandpo._public', name)[0].name})" for name in public_names("bandpo._public")]
    for module in CORE:
        lines += ["", module]
        for name in public_names(module):
            lines += described(module, name)
    return "\n".join(lines) + "\n"


def test_the_api_is_the_golden_one():
    expected, found = GOLDEN.read_text(), api()
    diff = "\n".join(difflib.unified_diff(expected.splitlines(), found.splitlines(), "golden", "now", lineterm="", n=1))
    assert found == expected, (
        f"the public API has changed:\n{diff}\nIf that is meant: `{WRITE}`, and say in CHANGELOG.md how to migrate"
    )


@pytest.mark.parametrize("module", ["bandpo", *CORE])
def test_the_names_read_from_the_source_are_those_at_run_time(module):
    loaded = importlib.import_module(module)
    names = public_names("bandpo._public" if module == "bandpo" else module)
    assert names
    assert [n for n in names if not hasattr(loaded, n)] == []
    if module == "bandpo":
        assert sorted(loaded.__all__) == sorted([*names, "__version__"])
        assert all(getattr(loaded, n) is not None for n in loaded.__all__)


@pytest.mark.parametrize("module", CORE)
def test_the_signatures_read_from_the_source_are_those_at_run_time(module):
    loaded = importlib.import_module(module)
    for name in public_names(module):
        _, node = definition(module, name)
        if isinstance(node, FUNCTION):
            found = inspect.signature(getattr(loaded, name)).parameters
            assert [p.arg for p in parameters(node)] == list(found), name


# ---------------------------------------------------------------- docstrings

SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Examples?|Attributes|Note):$", re.MULTILINE)
SHAPE = re.compile(r"`\(.*?\)`|any shape|same shape|shape of|broadcast|0-d|scalar|elementwise|one for each|each of")
FORMULA = re.compile(r"`[^`\n]*(?:[√Σ∇²·∝∞≤≥]|[a-z0-9_)] [=/*+] [a-z0-9_(])[^`\n]*`", re.IGNORECASE)
SOURCE = re.compile(
    r"arXiv:|Csiszár|docs/\w+|\bsee `|https?://|Schulman|Kish|Wilson|Wald|Kiefer|Bradley|Hoeffding|Pearson|Neyman"
    r"|Jeffreys|Le Cam|Hellinger|Rényi|REPS|PPO|TRPO|DPO|Dr\.GRPO|our own"
)
VERBS = """Add Apply Ask Attach Build Call Cast Check Choose Collect Compare Compute Copy Count Create Decide Do Draw Estimate
    Evaluate Examine Fill Find Fit Format Gather Generate Get Give Hold Keep Kill Load Look Make Map Mark Measure Merge Open
    Pack Parse Pick Print Put Raise Read Record Register Remove Replace Report Return Run Sample Save Score Search Select Send
    Set Show Solve Sort Spawn Split Start Store Sum Take Test Thin Train Turn Update Wait Walk Write"""
"""A summary that begins with one of these says what a function does; any other names the value, and needs no `Returns:`."""


@dataclass(frozen=True)
class Doc:
    """A docstring in parts: the text before the first section, and the sections by name."""

    body: str
    sections: dict[str, str]

    @classmethod
    def of(cls, node: ast.AST) -> "Doc | None":
        text = ast.get_docstring(node)  # type: ignore[arg-type]
        if text is None:
            return None
        body, *rest = SECTION.split(text)
        return cls(body.strip(), dict(zip(rest[::2], rest[1::2], strict=True)))

    @property
    def summary(self) -> str:
        return self.body.split("\n\n")[0]

    def entries(self, section: str) -> dict[str, str]:
        """Name to text of `Args:` or `Raises:`."""
        found: dict[str, str] = {}
        name = ""
        for line in self.sections.get(section, "").splitlines():
            if new := re.match(r"    \*{0,2}([\w., ]+):(?: (.*)|$)", line):
                name = new[1]
                found[name] = new[2] or ""
            elif name:
                found[name] += f" {line.strip()}"
        return found


EXCEPTIONS: dict[str, str] = {
    "logprobs.token_logprobs: a formula without a source": "the definitions of a log-prob and of the entropy",
    "testing.check_surrogate: a formula without a source": "the definition of on-policy",
}
"""What is allowed, `module.name: fault` without `bandpo.`, or the beginning of it, and the reason."""


@cache
def our_classes() -> frozenset[str]:
    return frozenset(n.name for m in modules().values() for n in m.tree.body if isinstance(n, ast.ClassDef))


def raised(node: ast.AST) -> set[str]:
    """Names of the exceptions that a function raises itself."""
    found: set[str] = set()
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, (*FUNCTION, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(inner, ast.Raise) and inner.exc is not None:
            call = inner.exc.func if isinstance(inner.exc, ast.Call) else inner.exc
            if isinstance(call, ast.Name) and call.id[0].isupper() and call.id != "NotImplementedError":
                found.add(call.id)
        found |= raised(inner)
    return found


def arguments_missing(
    doc: Doc, given: list[tuple[str, str]], *, core: bool, shared: Mapping[str, str]
) -> Iterator[str]:
    """Parameters without an entry, and entries without a parameter.

    Outside of the core the text may name a parameter in backticks, the type may be a class of ours, which has a docstring, and
    one parameter of a function whose docstring is one sentence needs no entry.
    """
    entries = doc.entries("Args")
    all_given, given = given, [g for g in given if not g[0].startswith("_")]
    if not core:
        by_type = our_classes()
        given = [
            (name, kind)
            for name, kind in given
            if name in entries or (kind.strip("'") not in by_type and name not in ("args", "kwargs"))
        ]
        if len(given) == 1 and not doc.sections and "\n\n" not in doc.body:
            return
    for name, kind in given:
        if name in shared and name not in entries:
            entries[name] = shared[name]
        if not core and re.search(rf"`{name}\b", doc.body):
            continue
        if not entries.get(name, "").strip():
            yield f"no Args entry for {name}"
        elif core and re.search(r"\bTensor\b", kind) and "Callable" not in kind and not SHAPE.search(entries[name]):
            yield f"Args: {name} is a tensor and has no shape"
    known = {name for name, _ in all_given}
    yield from (f"Args: there is no parameter {name}" for name in doc.entries("Args") if name not in known)


def raises_missing(doc: Doc, raised_here: set[str]) -> Iterator[str]:
    named = " ".join(doc.entries("Raises"))
    yield from (f"Raises: {name} is missing" for name in sorted(raised_here) if name not in named)


def function_faults(
    node: ast.FunctionDef | ast.AsyncFunctionDef, *, bound: bool, core: bool, shared: Mapping[str, str]
) -> Iterator[str]:
    """What a function's docstring lacks."""
    doc = Doc.of(node)
    if node.name == "__call__" and doc is None:
        return  # the class says what it does
    if doc is None or not doc.summary:
        yield "no docstring"
        return
    if node.name != "__call__":
        given = [(p.arg, ast.unparse(p.annotation) if p.annotation else "") for p in parameters(node, bound=bound)]
        yield from arguments_missing(doc, given, core=core, shared=shared)
    returns = ast.unparse(node.returns) if node.returns else "None"
    said = doc.sections.get("Returns", doc.sections.get("Yields", ""))
    is_property = any("property" in ast.unparse(d) for d in node.decorator_list)
    quiet = returns in ("None", "NoReturn", "Self") or is_property or node.name == "__call__"
    if not quiet and not said and doc.summary.split()[0].rstrip(",:") in VERBS.split():
        yield "no Returns"
    if core and not bound and re.fullmatch(r"(?:torch\.)?Tensor", returns) and not SHAPE.search(said + doc.summary):
        yield "Returns: a tensor without a shape"
    yield from raises_missing(doc, raised(node))


def class_faults(node: ast.ClassDef, *, core: bool, shared: Mapping[str, str]) -> Iterator[str]:
    """What the docstrings of a class and of its public methods lack."""
    doc = Doc.of(node)
    if doc is None or not doc.summary:
        yield "no docstring"
        return
    inside = [n for n in node.body if isinstance(n, FUNCTION)]
    made = next((n for n in inside if n.name == "__init__"), None)
    if made is not None:
        given = [(p.arg, ast.unparse(p.annotation) if p.annotation else "") for p in parameters(made, bound=True)]
    elif has_fields(node):
        attributes = set(documented_fields(node))
        given = [(n.target.id, ast.unparse(n.annotation)) for n in fields(node) if n.target.id not in attributes]
    else:
        given = []
    yield from arguments_missing(doc, given, core=core, shared=shared)
    for start in inside:
        if start.name in ("__init__", "__post_init__"):
            yield from raises_missing(doc, raised(start))
    for method in methods(node):
        if "override" not in {ast.unparse(d) for d in method.decorator_list}:
            if node.bases and Doc.of(method) is None:
                continue  # a method of the base, which has the docstring
            found = function_faults(method, bound=True, core=core, shared=shared)
            yield from (f"{method.name}: {fault}" for fault in found)


def documented_fields(node: ast.ClassDef) -> Iterator[str]:
    """Fields that have a text of their own behind them, or the text that a command line shows, `metadata={"help": ...}`."""
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        options = {k.arg: k.value for k in field.value.keywords} if isinstance(field.value, ast.Call) else {}
        data = options.get("metadata")
        keys = [k.value for k in data.keys if isinstance(k, ast.Constant)] if isinstance(data, ast.Dict) else []
        texts = (
            field.value.args if isinstance(field.value, ast.Call) and ast.unparse(field.value.func) == "_option" else []
        )
        if isinstance(after, ast.Expr) or "help" in keys or texts:
            yield field.target.id


def core_faults(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> Iterator[str]:
    """What names of the core have besides: an example, and the source of a formula."""
    doc = Doc.of(node)
    if doc is None:
        return
    bases = {ast.unparse(b) for b in node.bases} if isinstance(node, ast.ClassDef) else set()
    if ">>>" not in ast.get_docstring(node, clean=False) and not bases & {"NamedTuple", "Protocol"}:  # type: ignore[operator]
        yield "no example"
    if FORMULA.search(doc.body) and not SOURCE.search(doc.body):
        yield f"a formula without a source: {FORMULA.search(doc.body)[0]}"  # type: ignore[index]


def faults(module: str, name: str, *, core: bool) -> list[str]:
    """What the documentation of a public name lacks."""
    home, node = definition(module, name)
    top = Doc.of(home.tree)
    shared = top.entries("Args") if top else {}  # what all functions of a module take is said once, at its top
    if isinstance(node, ast.ClassDef):
        found = [*class_faults(node, core=core, shared=shared), *(core_faults(node) if core else ())]
    elif isinstance(node, FUNCTION):
        found = [*function_faults(node, bound=False, core=core, shared=shared), *(core_faults(node) if core else ())]
    else:
        return []
    where = home.name.removeprefix("bandpo.")
    return [f for f in (f"{where}.{name}: {fault}" for fault in found) if not f.startswith(tuple(EXCEPTIONS))]


def public_in(module: Module) -> list[str]:
    """Functions and classes that a module itself defines, without an underscore and in its `__all__` if it has one."""
    public = public_names(module.name)
    return [n.name for n in module.tree.body if isinstance(n, (*FUNCTION, ast.ClassDef)) and n.name in public]


def all_faults() -> dict[str, list[str]]:
    """By room, what the documentation of all public names lacks."""
    core = {(home.name, name) for m in CORE for name in public_names(m) for home in [definition(m, name)[0]]}
    found: dict[str, list[str]] = {}
    for module in modules().values():
        if not any(part.startswith("_") for part in module.name.split(".")):
            for name in public_in(module):
                found.setdefault(module.room, []).extend(faults(module.name, name, core=(module.name, name) in core))
    return found


@pytest.mark.parametrize("room", sorted({m.room for m in modules().values()}))
def test_docstrings_say_what_a_user_must_know(room):
    found = all_faults().get(room, [])
    assert not found, "\n".join(found)


if __name__ == "__main__":
    if "--write" in sys.argv:
        GOLDEN.write_text(api())
        print(f"written: {GOLDEN}")
    elif "--faults" in sys.argv:
        for room, lines in sorted(all_faults().items()):
            if lines:
                print(f"== {room}: {len(lines)}", *lines, "", sep="\n")
    else:
        print(api(), end="")
