"""Readers for untrusted files: size, depth and work are bounded, and nothing in a file is executed."""

import functools
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

MAX_YAML_BYTES = 1 << 20
MAX_NODES = 20_000
"""Limit for the number of values in a YAML file; an alias counts each time it is used."""
MAX_DEPTH = 50
MAX_DIGITS = 100
"""Limit for the digits of a number. Longer integers take quadratic time, or are too large for a float."""
_MAX_CHARACTERS = 4 * MAX_YAML_BYTES  # in all texts of a YAML file; an alias counts each time it is used
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a symbolic link"}


def read_regular(path: Path, limit: int | None = None, *, follow: bool = True) -> bytes:
    """The content of a regular file; pipes and devices, which could block or never end, are refused.

    Args:
        path: The file.
        limit: Largest allowed size in bytes; None for no limit.
        follow: Whether the file may be a symbolic link. Pass False in an untrusted folder: a link could lead to any file.

    Returns:
        The bytes of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a regular file, is larger than the limit, or cannot be read.
    """
    try:
        descriptor = open_regular(path, follow=follow)
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(-1 if limit is None else limit + 1)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    if limit is not None and len(data) > limit:
        raise ValueError(f"{path} is too large: it has more than {limit:,} bytes")
    return data


def open_regular(path: Path, *, follow: bool = True) -> int:
    """A descriptor to read a regular file, for files that are read in parts; other kinds are refused as in `read_regular`.

    Args:
        path: The file.
        follow: Whether the file may be a symbolic link.

    Returns:
        The descriptor, which the caller closes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a regular file, or cannot be opened.
    """
    try:
        mode = (path.stat() if follow else path.lstat()).st_mode
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "a device")
            advice = "; name the file that it leads to" if stat.S_ISLNK(mode) else ""
            raise ValueError(f"{path} is {kind}, not a regular file{advice}")
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags if follow else flags | getattr(os, "O_NOFOLLOW", 0))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # it was replaced after the first check
            os.close(descriptor)
            raise ValueError(f"{path} is not a regular file")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    return descriptor


def parse_yaml(text: str | bytes, where: str) -> Any:
    """The plain values of a YAML document: null, true, false, numbers, texts, lists and mappings of these.

    Dates are read as text. Aliases and merge keys work; their values count each time they are used. A key that a mapping has
    twice is refused, because YAML's own reader keeps the last value and drops the others without a message.

    Args:
        text: The document.
        where: Name of the document in messages.

    Returns:
        The values of the document.

    Raises:
        ImportError: If PyYAML is not installed.
        ValueError: If the text is not YAML, has a tag that creates an object, has a key twice in one mapping, or exceeds the
            limits of number or depth.

    Examples:
        >>> parse_yaml("a: [1, 2.5, x]", "example")
        {'a': [1, 2.5, 'x']}
        >>> parse_yaml("{beta: 0.1, beta: 0.2}", "example")
        Traceback (most recent call last):
        ValueError: example, line 1: the key 'beta' is there twice (first in line 1); keep one of the two
        >>> parse_yaml("a: " + "[" * 60 + "]" * 60, "example")
        Traceback (most recent call last):
        ValueError: example has values nested deeper than 50
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"YAML files need PyYAML: pip install 'bandpo[trl]' ({error})") from None
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        _check_events(text, where)
        loader = _loader()(text)
        try:
            node = loader.get_single_node()
            _check_keys(node, loader, where)  # before it is built, because a merge key adds to the keys of a node
            found = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except (_Excess, _Twice) as error:
        raise ValueError(str(error)) from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # PyYAML's constructors raise these for a tag that does not fit its text, for example "!!int ''"
        raise ValueError(f"{where} is not YAML: {' '.join(str(error).split())[:200]}") from None
    _check_values(found, where)
    return found


def parse_json(text: str | bytes, where: str, *, unique: bool = False) -> Any:
    """The value of a JSON text; an integer of more than `MAX_DIGITS` digits becomes a float, which may be infinite.

    Args:
        text: The JSON.
        where: Name of the text in messages.
        unique: Whether a key that an object has twice is refused, as configurations need it; otherwise the last value counts.

    Returns:
        The value.

    Raises:
        ValueError: If the text is not JSON, is nested too deep, or has a key twice where that is refused.

    Examples:
        >>> parse_json('{"delta": 0.1, "delta": 0.2}', "example", unique=True)
        Traceback (most recent call last):
        ValueError: example: the key 'delta' is there twice; keep one of the two
    """
    try:
        return json.loads(text, parse_int=_whole, object_pairs_hook=_unique if unique else None)
    except _Twice as error:
        raise ValueError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{where} is not JSON: {error}") from None


class _Excess(ValueError):
    """A limit was exceeded; the message is complete."""


class _Twice(ValueError):
    """A key is there twice; the message is complete but for the name of a JSON text."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose keys must differ."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise _Twice(f"the key {twice!r} is there twice; keep one of the two")
    return found


def _check_keys(root: Any, loader: Any, where: str) -> None:
    """Check that each mapping has a key once. A merge key `<<` may be there more than once, as its reader allows.

    Keys are the same if their values are: `1` and `0x1`, which the mapping that is built cannot tell apart.
    """
    import yaml

    pending, seen = [root] if root is not None else [], set[int]()
    while pending:
        node = pending.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending += node.value
        if not isinstance(node, yaml.MappingNode):
            continue
        first: dict[str, int] = {}
        for key, value in cast("list[tuple[Any, Any]]", node.value):
            pending += [key, value]
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = _as_text(loader.construct_object(key)), key.start_mark.line + 1
            if name in first:
                raise _Twice(
                    f"{where}, line {line}: the key {key.value[:100]!r} is there twice (first in line {first[name]}); keep one "
                    "of the two"
                )
            first[name] = line


def _as_text(key: object) -> str:
    """A key as text, the same for equal keys: numbers may be chosen so that all of their hashes collide, texts may not."""
    whole = isinstance(key, int) or (isinstance(key, float) and key.is_integer())
    return repr(int(cast("float", key))) if whole else repr(key)


def _check_events(text: str, where: str) -> None:
    """Check depth and number of values before any value is built, because building recurses."""
    import yaml

    nodes = depth = 0
    for event in cast("Iterable[object]", yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))):
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
            continue
        nodes += 1
        depth += isinstance(event, yaml.CollectionStartEvent)
        if nodes > MAX_NODES:
            raise _Excess(f"{where} has more than {MAX_NODES:,} values")
        if depth > MAX_DEPTH:
            raise _Excess(f"{where} has values nested deeper than {MAX_DEPTH}")


def _check_values(found: object, where: str) -> None:
    """Check the number and depth of values with all aliases followed: YAML builds each alias once, but readers follow all."""
    nodes = characters = 0
    pending: list[tuple[object, int]] = [(found, 1)]
    while pending:
        value, depth = pending.pop()
        nodes += 1
        if isinstance(value, str):
            characters += len(value)
        inside = _inside(value)
        if nodes + len(pending) + len(inside) > 2 * MAX_NODES or characters > _MAX_CHARACTERS:
            raise ValueError(f"{where} has more than {MAX_NODES:,} values when its aliases are followed")
        if depth > MAX_DEPTH + 1:
            raise ValueError(f"{where} has values nested deeper than {MAX_DEPTH} when its aliases are followed")
        pending += [(x, depth + 1) for x in inside]


def _inside(value: object) -> list[object]:
    """The values that a mapping (its keys among them) or a list holds."""
    if isinstance(value, dict):
        mapping = cast("dict[object, object]", value)
        return [*mapping, *mapping.values()]
    return list(cast("Iterable[object]", value)) if isinstance(value, list | tuple) else []


@functools.cache
def _loader() -> Any:
    import yaml

    safe: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(safe):
        """YAML's safe loader without exponential merges, slow numbers, dates and binary data."""

        merged = 0
        merging = 0

        def flatten_mapping(self, node: Any) -> None:
            self.merging += 1
            if self.merging > MAX_DEPTH:
                raise _Excess(f"a YAML document has merge keys nested deeper than {MAX_DEPTH}")
            for key, value in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                        if isinstance(part, yaml.MappingNode):
                            self.flatten_mapping(part)
                            self.merged += len(part.value)
                        if self.merged > MAX_NODES:
                            raise _Excess(f"a YAML document has more than {MAX_NODES:,} values in merge keys")
            super().flatten_mapping(node)
            self.merging -= 1

    def number(kind: str) -> Callable[[Any, Any], object]:
        build = getattr(yaml.SafeLoader, f"construct_yaml_{kind}")

        def construct(loader: Any, node: Any) -> object:
            if len(loader.construct_scalar(node)) > MAX_DIGITS:
                raise yaml.constructor.ConstructorError(
                    None, None, f"a number of more than {MAX_DIGITS} digits", node.start_mark
                )
            return build(loader, node)

        return construct

    for kind in ("int", "float"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", number(kind))
    Loader.add_constructor("tag:yaml.org,2002:timestamp", Loader.construct_scalar)  # stays text
    for kind in ("binary", "omap", "pairs", "set"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", Loader.construct_undefined)
    return Loader


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)
