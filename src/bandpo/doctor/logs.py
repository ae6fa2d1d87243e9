"""Reads the logs of a run, one row at a time: memory does not grow with the file."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bandpo._system.jsonl import number_texts

_MAX_LOG_BYTES, _MAX_ROWS = 1 << 33, 2_000_000
_MAX_LINE_BYTES = 1 << 18  # bytes of a row of a log; a row of metrics has some thousand
_MAX_VALUES, _MAX_INNER = 5000, 100  # values in a row; lists and objects in a row


def read_log(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a log, one at a time; their numbers are texts (`number_texts`), of which the rules read those they need.

    A last line without a line break is left out, because it may be incomplete.

    Args:
        path: A JSONL file.

    Raises:
        ValueError: If a line is not a JSON object, or the file is larger than a log of metrics.
    """
    if path.lstat().st_size > _MAX_LOG_BYTES:
        raise ValueError(f"{path} is too large: it has more than {_MAX_LOG_BYTES:,} bytes")
    rows = number_texts(path, follow=False, longest=_MAX_LINE_BYTES, is_row=_may_be_metrics)
    for count, row in enumerate(rows):
        if count == _MAX_ROWS:
            raise ValueError(f"{path} has more than {_MAX_ROWS:,} rows; examine its end: tail -n 1000000")
        yield row


def _may_be_metrics(line: bytes) -> bool:
    """Whether a line has no more values, and no more lists and objects, than a row of metrics may have."""
    values = line.count(b",") if len(line) > _MAX_VALUES else 0
    return values <= _MAX_VALUES and line.count(b"[") + line.count(b"{") <= _MAX_INNER
