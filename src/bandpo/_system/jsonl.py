"""Files with a JSON object on each line, read one line at a time: memory does not grow with the file."""

import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from bandpo._system.bounded import open_regular, parse_json

# Most numbers of a row are never looked at, and reading a float64 from its digits takes longer than all the rest. So a number
# stays the text that it is, as bytes: JSON itself has none, so they cannot be confused with a string.
_DECODER = json.JSONDecoder(parse_float=str.encode, parse_int=str.encode)


def lines(
    path: Path,
    *,
    follow: bool = True,
    longest: int | None = None,
    unfinished: Callable[[bytes], object] | None = None,
) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that was appended to, with their numbers from 1.

    An unfinished last line, which a killed process leaves, is left out.

    Args:
        path: The file.
        follow: Whether the file may be a symbolic link.
        longest: Largest number of bytes in a line; None for any.
        unfinished: Called with an unfinished last line.

    Raises:
        ValueError: If the file is not a regular file, or a line is longer.
    """
    with os.fdopen(open_regular(path, follow=follow), "rb") as file:
        number = 0
        while line := file.readline(-1 if longest is None else longest + 1):
            number += 1
            if longest is not None and len(line) > longest:
                raise ValueError(f"{path}, line {number} has more than {longest:,} bytes")
            if line.endswith(b"\n"):
                yield number, line[:-1]
            elif unfinished is not None:
                unfinished(line)


def objects(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file that was appended to; an unfinished last line is left out.

    Args:
        path: The file.

    Raises:
        ValueError: If a line is not a JSON object (the message has its number), or the file is not a regular file.
    """
    for number, line in lines(path):
        where = f"{path}, line {number}"
        yield _as_object(parse_json(line, where), where)


def number_texts(
    path: Path,
    *,
    follow: bool = True,
    longest: int | None = None,
    is_row: Callable[[bytes], bool] | None = None,
    unfinished: Callable[[bytes], object] | None = None,
    broken: Callable[[int, bytes], dict[str, Any] | None] | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of a file as in `objects`, in half the time: their numbers are texts, of type bytes; see `as_number`.

    Args:
        path: The file.
        follow: Whether the file may be a symbolic link.
        longest: Largest number of bytes in a line; None for any.
        is_row: Whether a line may be parsed: called before that with each line.
        unfinished: Called with an unfinished last line.
        broken: Called with number and text of a line that is not JSON. It may return the row to use in its place, which is
            left out if it is empty; None makes the line an error.

    Raises:
        ValueError: As in `objects`, or because of `longest` or `is_row`.
    """
    decode = _DECODER.decode
    for number, line in lines(path, follow=follow, longest=longest, unfinished=unfinished):
        if is_row is not None and not is_row(line):
            raise ValueError(f"{path}, line {number} is no row of metrics: it has {len(line):,} bytes")
        try:
            row: object = decode(line.decode())
        except (ValueError, RecursionError):  # not JSON, or in one of its rarer spellings
            try:
                row = parse_json(line, f"{path}, line {number}")
            except ValueError:
                row = None if broken is None else broken(number, line)
                if row is None:
                    raise
                if not row:
                    continue
        if not isinstance(row, dict):
            row = _as_object(row, f"{path}, line {number}")
        yield cast("dict[str, Any]", row)


def as_number(value: object) -> float | None:
    """A number of a row of `number_texts` or of `objects`; None for anything else, such as a string or a bool.

    Args:
        value: The value in a row.

    Examples:
        >>> as_number(b"2.5"), as_number(3), as_number("2.5"), as_number(b"1e999")
        (2.5, 3.0, None, inf)
    """
    if isinstance(value, bool) or not isinstance(value, bytes | int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return float("inf") if cast("int", value) > 0 else float("-inf")


def keep_rows(path: Path, is_kept: Callable[[dict[str, Any]], bool], *, sure: Callable[[bytes], bool]) -> None:
    """Remove rows from a file, and an unfinished last line.

    The file is read line by line. It is shortened in place if all rows to remove are at its end, as after a killed run, and
    otherwise replaced: a process that is killed meanwhile leaves either the old file or the new one. A symbolic link is
    replaced by the file that it leads to.

    Args:
        path: The file.
        is_kept: Whether a row is kept.
        sure: Whether a line is kept without looking further, so that it is not parsed.

    Raises:
        ValueError: If a line that is parsed is not a JSON object, or the file is not a regular file.
    """

    def kept(number: int, line: bytes) -> bool:
        where = f"{path}, line {number}"
        return is_kept(_as_object(parse_json(line, where), where))

    end = kept_to = 0
    at_end = True  # whether only rows at the end are to go
    for number, line in lines(path):
        end += len(line) + 1
        if sure(line) or kept(number, line):
            at_end = at_end and kept_to + len(line) + 1 == end
            kept_to = end
    if path.is_symlink() or not at_end:
        aside = path.with_name(f".{secrets.token_hex(8)}.part")
        try:
            with aside.open("xb") as file:
                file.writelines(line + b"\n" for number, line in lines(path) if sure(line) or kept(number, line))
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    elif kept_to < path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(kept_to)
            os.fsync(file.fileno())


def _as_object(row: object, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row is an object like {{...}}, got {type(row).__name__}")
    return cast("dict[str, Any]", row)
