"""What all readers of logs share: the rows with what was noticed while reading, their limits, and numbers written as text."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

MAX_ROWS = 2_000_000
MAX_LINE_BYTES = 1 << 18  # bytes of a row; a row of metrics has some thousand
MAX_VALUES, MAX_INNER = 5000, 100  # values in a row; lists and objects in a row

Row = Mapping[str, Any]
_PLAIN = re.compile(r"[+-]?(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})(?:[eE][+-]?\d{1,9})?", re.ASCII)
_NOT_FINITE = frozenset({"nan", "inf", "infinity"})
_WRAPPED = re.compile(r"(?:np\.float(?:16|32|64)|np\.int(?:32|64)|tensor)\(([^(),]{1,400})(?:,[^()]{0,100})?\)")


class LogRows:
    """The rows of a log. They are read from the file each time that they are iterated over, and are not kept.

    Args:
        name: Name of the log, for messages.
        kind: What the log is, in the words of a message.
        read: Reads the rows; it is given a list to which it appends what the user should know.
    """

    def __init__(self, name: str, kind: str, read: Callable[[list[str]], Iterable[Row]]) -> None:
        self.name, self.kind, self._read = name, kind, read
        self.said: list[str] = []
        """What was noticed, complete after the last row."""
        self.part = 0
        """How many files of several were read before the one of the last row."""

    def __iter__(self) -> Iterator[Row]:
        self.said.clear()
        self.part = 0
        for count, row in enumerate(self._read(self.said)):
            if count == MAX_ROWS:
                raise ValueError(f"{self.name} has more than {MAX_ROWS:,} rows; examine its end: tail -n 1000000")
            yield row


def number_in(text: str) -> float | None:
    """The number that a text is, None for another text.

    NumPy's and torch's way to write a number is read, as verl's console has it.

    Args:
        text: The text.

    Examples:
        >>> number_in(" -1.5e-3"), number_in("NaN"), number_in("np.float64(0.25)"), number_in("1_000"), number_in("high")
        (-0.0015, nan, 0.25, None, None)
    """
    text = text.strip() if len(text) < 1000 else ""
    if _PLAIN.fullmatch(text) or text.lower().lstrip("+-") in _NOT_FINITE:
        return float(text)
    wrapped = _WRAPPED.fullmatch(text)
    return number_in(wrapped[1]) if wrapped else None


def as_cell(text: str) -> bytes | str:
    """A text as a value of a row: a plain number as bytes, as `number_texts` reads it from JSON, which takes less time to use.

    Args:
        text: The text, as in a cell of a table.
    """
    return text.encode() if text.isascii() and _PLAIN.fullmatch(text) else text
