"""Reads files that a stranger may have written: bounded in size, depth and work, and nothing in them is executed."""

import functools
import json
import os
import stat
from pathlib import Path
from typing import Any

MAX_YAML_BYTES = 1 << 20
MAX_NODES = 20_000
"""Values of a YAML file, aliases counted as often as they are used."""
MAX_DEPTH = 50
MAX_DIGITS = 100
"""Digits of a whole number. Longer ones cost quadratic time, or are too large for a float."""
_MAX_CHARACTERS = 4 * MAX_YAML_BYTES  # of the texts of a YAML file, aliases counted as often as they are used
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a symbolic link"}


def read_regular(path: Path, limit: int | None = None, *, follow: bool = True) -> bytes:
    """The content of a regular file: never of a pipe or device, which could block or have no end.

    Args:
        path: The file.
        limit: Bytes that it may have; None for any number.
        follow: Whether it may be a symbolic link. In a stranger's folder it may not: the link could lead to any file.

    Returns:
        All of its bytes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no regular file, is larger than the limit, or cannot be read.
    """
    try:
        mode = (path.stat() if follow else path.lstat()).st_mode
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "a device")
            advice = "; name the file that it leads to" if stat.S_ISLNK(mode) else ""
            raise ValueError(f"{path} is {kind}, not a regular file{advice}")
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags if follow else flags | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # it was exchanged in between
                raise ValueError(f"{path} is not a regular file")
            data = file.read(-1 if limit is None else limit + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    if limit is not None and len(data) > limit:
        raise ValueError(f"{path} is too large: it has more than {limit:,} bytes")
    return data


def parse_yaml(text: str | bytes, where: str) -> Any:
    """The plain values of a YAML document: null, true, false, numbers, texts, lists and mappings of these.

    Dates stay text. Aliases and merge keys work, and count as often as they are used.

    Args:
        text: The document.
        where: Its name, for messages.

    Returns:
        What it holds.

    Raises:
        ImportError: If PyYAML is not installed.
        ValueError: If it is not YAML, has a tag that makes an object, or more or deeper values than any configuration.

    Examples:
        >>> parse_yaml("a: [1, 2.5, x]", "example")
        {'a': [1, 2.5, 'x']}
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
            found = loader.get_single_data()
        finally:
            loader.dispose()
    except _Excess as error:
        raise ValueError(str(error)) from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # PyYAML's own constructors stumble over a tag on a text that is none of its kind, "!!int ''" for one
        raise ValueError(f"{where} is not YAML: {' '.join(str(error).split())[:200]}") from None
    _check_values(found, where)
    return found


def parse_json(text: str | bytes, where: str) -> Any:
    """A JSON value; a whole number of more digits than any count has becomes a float, which may be infinite.

    Args:
        text: The JSON.
        where: Its name, for messages.

    Returns:
        What it holds.

    Raises:
        ValueError: If it is not JSON, or nested too deep.
    """
    try:
        return json.loads(text, parse_int=_whole)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{where} is not JSON: {error}") from None


class _Excess(ValueError):
    """More than is read; its message is complete."""


def _check_events(text: str, where: str) -> None:
    """Refuses depth and number of values before anything is built: building recurses."""
    import yaml

    nodes = depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
            continue
        nodes += 1
        depth += isinstance(event, yaml.CollectionStartEvent)
        if nodes > MAX_NODES:
            raise _Excess(f"{where} has more than {MAX_NODES:,} values")
        if depth > MAX_DEPTH:
            raise _Excess(f"{where} has values nested deeper than {MAX_DEPTH}")


def _check_values(found: Any, where: str) -> None:
    """Refuses values that grow or never end when aliases are followed: YAML builds each alias once, but readers follow all."""
    nodes = characters = 0
    pending = [(found, 1)]
    while pending:
        value, depth = pending.pop()
        nodes += 1
        if isinstance(value, str):
            characters += len(value)
        inside = (
            [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        )
        if nodes + len(pending) + len(inside) > 2 * MAX_NODES or characters > _MAX_CHARACTERS:
            raise ValueError(f"{where} has more than {MAX_NODES:,} values when its aliases are followed")
        if depth > MAX_DEPTH + 1:
            raise ValueError(f"{where} has values nested deeper than {MAX_DEPTH} when its aliases are followed")
        pending += [(x, depth + 1) for x in inside]


@functools.cache
def _loader() -> Any:
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        """YAML's safe loader without merges that grow, numbers that take long, dates and binary data."""

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

    def number(kind: str) -> Any:
        build = getattr(yaml.SafeLoader, f"construct_yaml_{kind}")

        def construct(loader: Any, node: Any) -> Any:
            if len(loader.construct_scalar(node)) > MAX_DIGITS:
                raise yaml.constructor.ConstructorError(
                    None, None, f"a number of more than {MAX_DIGITS} digits", node.start_mark
                )
            return build(loader, node)

        return construct

    for kind in ("int", "float"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", number(kind))
    Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: loader.construct_scalar(node))
    for kind in ("binary", "omap", "pairs", "set"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", Loader.construct_undefined)
    return Loader


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)
