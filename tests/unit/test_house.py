"""The house: who may import whom, and that its prose is plain English. Read from the source; nothing is imported."""

import re
from collections.abc import Iterator

import pytest

from sources import SRC, Module, imports, modules, prose

VERSION = ("bandpo", "__version__")
"""Reading the version is no arrow: it is a constant at the top of the package."""


def arrows() -> Iterator[tuple[Module, str, str | None, int]]:
    for module in modules().values():
        for target, name, line in imports(module):
            if (target, name) != VERSION:
                yield module, target, name, line


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else name


def test_no_circle_between_modules():
    """Imports within functions count: they only hide a circle."""
    graph: dict[str, set[str]] = {}
    for module, target, _, _ in arrows():
        graph.setdefault(module.name, set()).add(target)
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(graph.get(name, ())):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_private_modules_and_names_stay_in_their_package():
    """`a._b` is imported only inside of package `a`, and a private name only inside of the room that has it."""
    wrong = []
    for module, target, name, line in arrows():
        parts = target.split(".")
        private = [i for i, part in enumerate(parts) if part.startswith("_")]
        home = ".".join(parts[: private[0]]) if private else ""
        inside = module.name == home or module.name.startswith(f"{home}.")
        if (private and not inside) or (name and name.startswith("_") and room_of(target) != module.room):
            wrong.append(f"{module.path.relative_to(SRC)}:{line} imports {target}.{name or ''}")
    assert not wrong, "\n".join(wrong)


def test_the_lab_is_known_to_the_command_line_alone():
    assert {m.room for m, target, _, _ in arrows() if room_of(target) == "lab"} - {"lab"} <= {"cli"}


def test_no_import_of_ours_uses_an_old_path():
    """An old path would warn; that `import bandpo` itself does not, each test checks, because warnings are errors in tests."""
    old = [f"{m.path.relative_to(SRC)}:{line}: {target}" for m, target, _, line in arrows() if target not in modules()]
    assert not old, "\n".join(old)


IDIOMS = (
    r"(?:go|goes|gone|going|went) on",
    r"(?:has|had|have) go",
    r"(?:[;,:.]|no part) of it",
    r"(?:take|takes|taken) (?:it|them) back",
    r"(?<!there )(?:is|are) none(?! of| yet)",
    r"and so (?:are|is|do|does)",
    r"as there(?= *[.,;:)]| *$)",
    r"begun again",
    r"in words",
    r"nobody(?:'s| here)",
    r"none of its kind",
    r"one and the same",
    r"(?<=[`)\d] )say,",
    r", say",
    r"serves?",
    r"so are the others",
    r"stands(?! for)",
    r"stood",
    r"turns? round",
    r"will do",
    r"(?:there|where)(?:of|in|upon)",
)
"""Idioms that only we use, or that only native readers know: patterns of whole words."""

OPENINGS = r"(?:Of|It|Its|Takes|Such as|As there|As above|So|With which|That|Them|They)\b"
"""What no docstring and no entry of one begins with: the noun is missing."""


def english(module: Module) -> list[str]:
    """What a reader whose first language is another would stumble over, one line for each."""
    place = module.path.relative_to(SRC)
    found = []
    for piece in prose(module):
        flat = " ".join(piece.text.split())
        for idiom in IDIOMS:
            for match in re.finditer(rf"(?<![\w`'-]){idiom}(?![\w`'-])", flat.replace("None", "`None`"), re.IGNORECASE):
                around = flat[max(0, match.start() - 40) : match.end() + 40]
                found.append(f"{place}:{piece.line}: {piece.kind}: {match[0]!r} in ...{around}...")
        if piece.kind in ("docstring", "attribute"):
            opens = [flat, *re.findall(r"^\s+\w+: (.*)$", piece.text, re.MULTILINE)]
            for text in opens:
                if re.match(OPENINGS, text):
                    found.append(f"{place}:{piece.line}: {piece.kind} begins: {text[:60]!r}")
    return found


@pytest.mark.parametrize("room", sorted({m.room for m in modules().values()}))
def test_plain_english(room):
    found = [line for m in modules().values() if m.room == room for line in english(m)]
    assert not found, "\n".join(found)
