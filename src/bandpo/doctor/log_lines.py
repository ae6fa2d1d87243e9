"""Reads logs that are lines of text: JSON, CSV, and what a run printed. Memory does not grow with the file."""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from bandpo._system.bounded import open_regular, parse_json
from bandpo._system.jsonl import lines, number_texts
from bandpo.monitoring.log_rows import MAX_INNER, MAX_LINE_BYTES, MAX_VALUES, Row, as_cell

UNFINISHED = "its last line is not finished, and is left out"
_CHUNK = 1 << 16
_ANSI = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")
_VERL = re.compile(r"(?:^|[\s):\]])step:(-?\d{1,15}) - ")
_DICT = re.compile(r"(Global step|step|rollout) (\d{1,15}): \{'")
_PAIR = re.compile(r"'([^'\\]{1,200})': (?:'([^'\\]{0,80})'|([^,'{}\[\]]{1,80}))(?=[,}])")
_MOST_CUT = 50  # rows that kills have cut off; more are no log of a run
_MOST_OBJECTS = 4  # in such a line, that are tried
_RUN = " - "  # what W&B's page puts between the names of run and metric


def json_rows(path: Path, said: list[str]) -> Iterator[Row]:
    """The rows of a JSONL file, of verl's file logger without the object `data` around the metrics.

    Args:
        path: The file.
        said: Notes about the file are appended to it.

    Raises:
        ValueError: If a line is not a JSON object.
    """
    rest: list[bytes] = []
    cut: list[int] = []

    def without_fragment(number: int, line: bytes) -> dict[str, Any] | None:
        if not line.startswith(b'{"') or len(cut) == _MOST_CUT:
            return None
        cut.append(number)
        return _row_behind(line)

    found = number_texts(
        path,
        follow=False,
        longest=MAX_LINE_BYTES,
        is_row=may_be_metrics,
        unfinished=rest.append,
        broken=without_fragment,
    )
    for count, row in enumerate(found):
        if not count:
            _check_generations(row, path)
        yield _unwrapped(row) if row.get("data").__class__ is dict else row
    for line in rest:  # complete, if the writer puts line breaks between rows only
        try:
            row = parse_json(line, "") if may_be_metrics(line) else None
        except ValueError:
            row = None
        if isinstance(row, dict):
            yield _unwrapped(cast("dict[str, Any]", row))
        else:
            said.append(UNFINISHED)
    if cut:
        shown = ", ".join(map(str, cut[:3])) + (", ..." if len(cut) > 3 else "")
        said.append(f"{len(cut)} rows were cut off, as by a kill, and are left out (line {shown})")


def _row_behind(line: bytes) -> dict[str, Any]:
    """The whole row behind a fragment on the same line, which a resumed run appended; empty if there is none."""
    at = line.find(b'{"', 1)
    for _ in range(_MOST_OBJECTS):
        if at < 0:
            break
        try:
            row = parse_json(line[at:], "")
        except ValueError:
            row = None
        if isinstance(row, dict):
            return cast("dict[str, Any]", row)
        at = line.find(b'{"', at + 1)
    return {}


def _unwrapped(row: dict[str, Any]) -> dict[str, Any]:
    """A row of verl's file logger with the metrics outside of `data`; it writes NaN and infinities as null."""
    data: object = row.pop("data", None)
    metrics = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
    return {**row, **{name: "NaN" if value is None else value for name, value in metrics.items()}}


def may_be_metrics(line: bytes) -> bool:
    """Whether a line has no more values, and no more lists and objects, than a row of metrics may have.

    Args:
        line: The line.
    """
    values = line.count(b",") if len(line) > MAX_VALUES else 0
    return values <= MAX_VALUES and line.count(b"[") + line.count(b"{") <= MAX_INNER


def _check_generations(row: Row, path: Path) -> None:
    if {"input", "output", "score"} <= row.keys():
        raise ValueError(
            f"{path} has generated texts with their scores, as verl's trainer.rollout_data_dir, and no metrics; examine the "
            "log of the run (trainer.logger=[console,file]) or a saved batch"
        )


def csv_rows(path: Path, said: list[str], run: str = "") -> Iterator[Row]:
    """The rows of a CSV file with a header, of W&B's page without the name of the run in each column.

    Args:
        path: The file.
        said: Notes about the file are appended to it.
        run: The run to read, where the file has several.

    Raises:
        ValueError: If the file is not CSV, or has several runs and none of them is chosen.
    """
    rest: list[bytes] = []

    def texts() -> Iterator[str]:
        for number, line in lines(path, follow=False, longest=MAX_LINE_BYTES, unfinished=rest.append):
            yield line.decode("utf-8-sig" if number == 1 else "utf-8", "replace") + "\n"
        yield from (line.decode("utf-8", "replace") for line in rest)

    table = csv.reader(texts())
    ragged = 0
    try:
        header = next(table, list[str]())
        if len(header) > MAX_VALUES:
            raise ValueError(f"{path} has more than {MAX_VALUES:,} columns")
        columns = _columns(header, path, run)
        for cells in table:
            ragged += len(cells) != len(header)
            row = {name: as_cell(cells[i]) for i, name in columns if i < len(cells) and cells[i]}
            if rest and len(cells) < len(header):
                said.append(UNFINISHED)
                ragged -= 1
            elif row:
                yield row
    except csv.Error as error:
        raise ValueError(f"{path}, line {table.line_num} is not CSV: {error}") from None
    if ragged:
        said.append(f"{ragged} of its rows have another number of cells than its first line")


def _columns(header: Sequence[str], path: Path, run: str) -> list[tuple[int, str]]:
    """The columns to read, with the names of their metrics."""
    named = [(i, name.strip()) for i, name in enumerate(header) if not name.endswith(("__MIN", "__MAX"))]
    of_runs = [(i, *name.rpartition(_RUN)[::2]) for i, name in named if _RUN in name]
    if not of_runs or len(of_runs) < len(named) - 2:  # Step, and perhaps a time
        return [(i, "step" if name == "Step" else name) for i, name in named if name]
    chosen = choose(run, list(dict.fromkeys(name for _, name, _ in of_runs)), path)
    others = [(i, "step" if name == "Step" else name) for i, name in named if _RUN not in name]
    return others + [(i, metric) for i, name, metric in of_runs if name == chosen]


def choose(run: str, runs: Sequence[str], path: Path) -> str:
    """The run to read.

    Args:
        run: The name that the user gave; "" for none.
        runs: The runs in the file.
        path: The file, for the message.

    Raises:
        ValueError: If no run is chosen.
    """
    if run in runs or (not run and len(runs) == 1):
        return run or runs[0]
    shown = ", ".join(name[:80] for name in runs[:8]) + (f" and {len(runs) - 8} more" if len(runs) > 8 else "")
    raise ValueError(
        f"{path} has no run {run[:80]!r}, but {shown}"
        if run
        else f"{path} has {len(runs)} runs ({shown}); choose one with --run"
    )


def console_rows(path: Path, said: list[str]) -> Iterator[Row]:
    """The rows in what a run printed: lines of verl's console, and dictionaries of TRL, OpenRLHF or slime.

    Colours and the names that Ray puts before a line are left out.

    Args:
        path: The file.
        said: Notes about the file are appended to it.
    """
    for line in _printed(path, said):
        if b"step:" in line or b"{'" in line:
            text = (_ANSI.sub(b"", line) if b"\x1b" in line else line).decode("utf-8", "replace")
            row = _of_verl(text) or _of_dictionary(text)
            if row:
                yield row


def is_console(head: bytes) -> bool:
    """Whether a text is what a run printed, and not a script or a list of settings.

    Args:
        head: The beginning of the text.
    """
    texts = (_ANSI.sub(b"", line).decode("utf-8", "replace") for line in re.split(rb"[\r\n]+", head))
    return any(_of_verl(text) or _of_dictionary(text) for text in texts)


def _printed(path: Path, said: list[str]) -> Iterator[bytes]:
    """The lines of a text, also those that a progress bar overwrote; an endless one is left out."""
    long = 0
    rest, cut = b"", False
    with os.fdopen(open_regular(path, follow=False), "rb") as file:
        while chunk := file.read(_CHUNK):
            *whole, rest = re.split(rb"[\r\n]+", rest + chunk)
            if cut and whole:
                whole, cut = whole[1:], False
            yield from whole
            if len(rest) > MAX_LINE_BYTES:
                long, rest, cut = long + (not cut), b"", True
    if _VERL.search(rest.decode("utf-8", "replace")) or rest.find(b"{'") >= 0:
        said.append(UNFINISHED)
    if long:
        said.append(f"{long} of its lines have more than {MAX_LINE_BYTES:,} bytes, and are left out")


def _of_verl(text: str) -> dict[str, Any]:
    found = _VERL.search(text)
    if not found:
        return {}
    row: dict[str, Any] = {"step": found[1].encode()}
    for part in text[found.end() :].split(" - ", MAX_VALUES)[:MAX_VALUES]:
        name, _, value = part.rpartition(":")
        words = value.split(None, 1)
        if name and words and " " not in name and len(name) <= 200:
            row[name] = as_cell(words[0])
    return row if len(row) > 1 else {}


def _of_dictionary(text: str) -> dict[str, Any]:
    numbered = _DICT.search(text)
    start = numbered.end() - 2 if numbered else text.find("{'")
    inside = text[start : text.find("}", start) + 1] if start >= 0 else ""
    if not numbered and "'epoch': " not in inside:
        return {}
    prefix = "train/" if numbered and numbered[1] == "Global step" else ""
    row: dict[str, Any] = {"step": numbered[2].encode()} if numbered else {}
    for count, (name, quoted, plain) in enumerate(_PAIR.findall(inside)):
        if count < MAX_VALUES:
            row[f"{prefix}{name}"] = as_cell(quoted or plain.strip())
    return row
