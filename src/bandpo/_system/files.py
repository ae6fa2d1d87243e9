"""Files that a killed process leaves whole: written aside and moved in one step; folders that say when they are complete."""

import json
import math
import os
import secrets
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from bandpo._system.bounded import MAX_YAML_BYTES, parse_json, parse_yaml, read_regular
from bandpo._system.secrets import hide, hide_in

SEAL = "bandpo_files.json"
_CHUNK = 1 << 22


def write_text(path: Path, text: str) -> None:
    """Write a file so that either the old one or the whole new one exists, also if other processes write it at the same time.

    A symbolic link in its place is replaced, not followed. Values of secret environment variables and options are hidden.

    Args:
        path: Where; its folder exists.
        text: All of it.
    """
    aside = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        # A surrogate without its pair is no Unicode, but models and JSON files have them: kept as JSON's own escape.
        with aside.open("x", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(hide(text))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, content: Any, *, indent: int | None = 1) -> None:
    """Write a file of strict JSON as `write_text` does; NaN and infinities become null."""
    text = json.dumps(strict(hide_in(content)), indent=indent, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write a file with a JSON value on each line, as `write_text` does."""
    write_text(path, "".join(json.dumps(hide_in(row), ensure_ascii=False) + "\n" for row in rows))


def write_checked_json(path: Path, content: dict[str, Any]) -> None:
    """JSON with its own CRC-32, under the key `crc32`, so that damage is seen when it is read. NaN stays NaN."""
    text = json.dumps(hide_in(content))
    write_text(path, f'{{"crc32": {zlib.crc32(text.encode())}, {text[1:]}\n')


def read_checked_json(path: Path) -> dict[str, Any]:
    """What `write_checked_json` wrote; a file without a checksum, as older versions wrote it, is read as it is.

    Raises:
        ValueError: If it is no such file, or has changed since; the message says which.
    """
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path} must hold a JSON object with a result, got {type(found).__name__}")
    expected = found.pop("crc32", None)
    if expected is not None and expected != zlib.crc32(json.dumps(found).encode()):
        raise ValueError(f"{path} has changed since it was written: its checksum is another one")
    return found


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file that was appended to; a last line without its end, as a killed process leaves it, is no row.

    Args:
        path: The file.

    Raises:
        ValueError: If another line is not a JSON object (the message has its number), or if it is no regular file.
    """
    data = read_regular(path)
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        row = parse_json(line, f"{path}, line {number}")
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a row is an object like {{...}}, got {type(row).__name__}")
        rows.append(row)
    return rows


def read_yaml(path: Path, *, follow: bool = True) -> dict[str, Any]:
    """The keys and values of a YAML file, which can hold plain values only.

    Args:
        path: The file.
        follow: Whether it may be a symbolic link.

    Raises:
        ValueError: If it is something else, or larger or deeper than any configuration; one line.
    """
    found = parse_yaml(read_regular(path, MAX_YAML_BYTES, follow=follow), str(path))
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold keys and values, got {type(found).__name__}")
    return found


def seal(folder: Path) -> None:
    """Mark a folder as complete: sizes and CRC-32 of its files, written last, once they are on the disk."""
    files = {str(p.relative_to(folder)): _fingerprint(p, sync=True) for p in _files(folder)}
    write_json(folder / SEAL, files)


def unseal(folder: Path) -> None:
    """Before a folder is written to again."""
    (folder / SEAL).unlink(missing_ok=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, None for nothing."""
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
    """The folder of the highest number that is complete; those passed over are named.

    Args:
        folders: Candidates.
        number: Of a folder.
        say: Takes a message for each that is damaged.
    """
    for folder in sorted(folders, key=number, reverse=True):
        wrong = damage(folder)
        if wrong is None:
            return folder
        say(f"{folder} is not used: {wrong}")
    return None


def strict(value: Any, *, digits: int | None = None) -> Any:
    """A value of strict JSON: NaN and infinities are None, and tuples are lists.

    Args:
        value: The value, with dictionaries and lists of any depth.
        digits: Significant digits of the floats; None keeps all.
    """
    if isinstance(value, dict):
        return {k: strict(v, digits=digits) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [strict(v, digits=digits) for v in value]
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
