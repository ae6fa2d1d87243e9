"""Files that are whole even if the writing process is killed, and folders that record when they are complete."""

import json
import math
import os
import secrets
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, cast

from bandpo._system.bounded import MAX_YAML_BYTES, parse_yaml, read_regular
from bandpo._system.jsonl import objects
from bandpo._system.secrets import hide, hide_in

SEAL = "bandpo_files.json"
"""The file in a complete folder that lists the other files with their sizes and checksums."""
_CHUNK = 1 << 22  # bytes that are read at a time for a checksum


def write_text(path: Path, text: str) -> None:
    """Write a file so that at any time either the old content or the whole new content exists, also with several writers.

    A symbolic link at the path is replaced, not followed. Values of secret environment variables and options are hidden.

    Args:
        path: The file; its folder must exist.
        text: The whole content.
    """
    aside = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        # Models and JSON files may contain a surrogate without its pair, which is not Unicode: written as JSON's escape.
        with aside.open("x", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(hide(text))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, content: Any, *, indent: int | None = 1) -> None:
    """Write a file of strict JSON as `write_text` does; NaN and infinities become null.

    Args:
        path: The file; its folder must exist.
        content: Dictionaries, lists and plain values.
        indent: Spaces for each level of nesting; None writes a single line.
    """
    text = json.dumps(finite_or_null(hide_in(content)), indent=indent, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write a file with a JSON value on each line, as `write_text` does.

    Args:
        path: The file; its folder must exist.
        rows: The values, one for each line. NaN stays NaN.
    """
    write_text(path, "".join(json.dumps(hide_in(row), ensure_ascii=False) + "\n" for row in rows))


def write_checked_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON with a CRC-32 of the content under the key `crc32`, so that a reader detects damage. NaN stays NaN.

    Args:
        path: The file; its folder must exist.
        content: The object, not empty.
    """
    text = json.dumps(hide_in(content))
    write_text(path, f'{{"crc32": {zlib.crc32(text.encode())}, {text[1:]}\n')


def read_checked_json(path: Path, *, required: bool = False) -> dict[str, Any]:
    """The object that `write_checked_json` wrote.

    Args:
        path: The file.
        required: Whether a file without a checksum is refused; otherwise it is accepted, as older versions wrote them.

    Raises:
        ValueError: If the file is not such an object, has changed since it was written, or lacks the checksum that is
            required; the message says which.
    """
    try:
        content: object = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    found = cast("dict[str, Any]", content) if isinstance(content, dict) else {}
    if not found:
        raise ValueError(f"{path} must hold a JSON object with a result, got {type(cast('object', content)).__name__}")
    expected = found.pop("crc32", None)
    if required and expected is None:
        raise ValueError(f"{path} has no checksum")
    if expected is not None and expected != zlib.crc32(json.dumps(found).encode()):
        raise ValueError(f"{path} has changed since it was written: its checksum is another one")
    return found


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file that was appended to; an unfinished last line, which a killed process leaves, is ignored.

    Args:
        path: The file.

    Raises:
        ValueError: If another line is not a JSON object (the message has its number), or the file is not a regular file.
    """
    return list(objects(path))


def read_yaml(path: Path, *, follow: bool = True) -> dict[str, Any]:
    """The keys and values of a YAML file, which may hold plain values only.

    Args:
        path: The file.
        follow: Whether the file may be a symbolic link.

    Raises:
        ValueError: If the file does not hold such keys and values, or exceeds the limits of `_system.bounded`; one line.
    """
    found: object = parse_yaml(read_regular(path, MAX_YAML_BYTES, follow=follow), str(path))
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold keys and values, got {type(found).__name__}")
    return cast("dict[str, Any]", found)


def seal(folder: Path) -> None:
    """Mark a folder as complete: write the sizes and CRC-32 of its files, after they have been flushed to the disk."""
    files = {str(p.relative_to(folder)): _fingerprint(p, sync=True) for p in _files(folder)}
    write_json(folder / SEAL, files)


def unseal(folder: Path) -> None:
    """Remove the mark of completeness, before a folder is written to again."""
    (folder / SEAL).unlink(missing_ok=True)


def damage(folder: Path) -> str | None:
    """The damage of a sealed folder, in a message's words; None if the folder is complete and unchanged."""
    try:
        expected = json.loads((folder / SEAL).read_bytes())
        if not expected:
            return f"{SEAL} is damaged (it lists no files)"
        for name, fingerprint in expected.items():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                return f"{SEAL} is damaged ({name!r} is not in the folder)"
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != fingerprint[0]:
                return f"{name} has {path.stat().st_size} bytes instead of {fingerprint[0]}"
            if _fingerprint(path) != fingerprint:
                return f"{name} has changed"
    except FileNotFoundError:
        return "it was not written to its end"
    except (ValueError, AttributeError, TypeError, LookupError, RecursionError, OSError) as error:
        return f"{SEAL} is damaged ({error})"
    return None


def latest_whole(folders: Iterable[Path], number: Callable[[Path], int], say: Callable[[str], None]) -> Path | None:
    """The complete folder of the highest number, None if there is none; damaged ones of higher numbers are reported.

    Args:
        folders: The candidates.
        number: Maps a folder to its number.
        say: Called with a message for each damaged folder.
    """
    for folder in sorted(folders, key=number, reverse=True):
        wrong = damage(folder)
        if wrong is None:
            return folder
        say(f"{folder} is not used: {wrong}")
    return None


def finite_or_null(value: object, *, digits: int | None = None) -> Any:
    """A copy of dictionaries and lists in which NaN and infinities are None, as strict JSON requires.

    Args:
        value: The value, with dictionaries and lists of any depth.
        digits: Significant digits of the floats; None keeps all.

    Examples:
        >>> finite_or_null({"a": (1, float("inf"), 0.1234)}, digits=2)
        {'a': [1, None, 0.12]}
    """
    if isinstance(value, dict):
        return {k: finite_or_null(v, digits=digits) for k, v in cast("dict[object, object]", value).items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(v, digits=digits) for v in cast("Iterable[object]", value)]
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return value if digits is None else float(f"{value:.{digits}g}")


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL)


def _fingerprint(path: Path, *, sync: bool = False) -> list[int]:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
        if sync:
            os.fsync(file.fileno())
        return [file.tell(), checksum]
