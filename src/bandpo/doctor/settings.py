"""Settings of a run in a file: what it sets, what its host would assume, and what cannot be known from the file."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from bandpo._system.bounded import parse_yaml
from bandpo._system.secrets import redact_text
from bandpo.bounds import Clip
from bandpo.doctor.setup import short

MAX_KEY = 200
"""Characters of a key, more than any host's has."""
_MAX_LINE, _MAX_UNREAD = 400, 30  # characters of a line about what is unread, and number of such lines
_DTYPES = {
    "fp32": "float32",
    "float32": "float32",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
}


class _Unknown:
    def __repr__(self) -> str:
        return "not known"


UNKNOWN = _Unknown()
"""A value that the file sets or may set, and that cannot be determined from it."""


class Text(str):
    """A value from a command line: YAML that is parsed when it is used."""


def parsed(text: str) -> Any:
    """The value that Hydra reads from a text of the command line; the text itself if it is not YAML.

    Args:
        text: The text after `key=`.
    """
    try:
        return parse_yaml(str(text), "a value") if text else None
    except ValueError:
        return str(text)


@dataclass
class Settings:
    """The settings in a file.

    Args:
        table: The host's defaults by dotted key, for the keys that its reader looks at.
        given: Values by dotted key, as they are in the file; `UNKNOWN` where they cannot be determined.
        defaults: Whether the host's defaults hold for all other keys; if not, their values are not known.
        unread: Lines about what could not be read.
        assumed: Keys whose default was used.
        program: The program that a script runs, "" if there is none.
    """

    table: Mapping[str, Any]
    given: dict[str, Any] = field(default_factory=dict[str, Any])
    defaults: bool = True
    unread: list[str] = field(default_factory=list[str])
    assumed: dict[str, Any] = field(default_factory=dict[str, Any])
    program: str = ""

    def get(self, key: str) -> Any:
        """The value of a key with references resolved, or the host's default for it; `UNKNOWN` if neither is known.

        Args:
            key: A dotted key, like the other methods.
        """
        value: Any = self._plain(key)
        for _ in range(10):
            match = re.fullmatch(r"\$\{([\w.]{1,200})\}", value) if isinstance(value, str) else None
            if match is None:
                break
            value = self._plain(match[1])
        if isinstance(value, str) and ("${" in value or value == "???"):
            return UNKNOWN
        return value

    def has(self, key: str) -> bool:
        """Whether the file sets the `key`."""
        return key in self.given

    def number(self, key: str) -> float | None:
        """The value of `key` as a finite number, None if it is not known.

        Raises:
            ValueError: If the value is something else.
        """
        value = self.get(key)
        return None if value is UNKNOWN else _number(key, value)

    def optional(self, key: str, unset: float = math.nan) -> float | None:
        """The value of `key` as a finite number, `unset` where it is null, and None if it is not known.

        Raises:
            ValueError: If the value is something else.
        """
        return unset if self.get(key) is None else self.number(key)

    def numbers(self, key: str, count: int) -> list[float] | None:
        """The value of `key` as finite numbers, None if they are not known.

        Args:
            key: A dotted key.
            count: How many numbers it must have.

        Raises:
            ValueError: If the value is something else, or another number of them.
        """
        value = self.get(key)
        if value is UNKNOWN:
            return None
        parts: list[Any] = [value]
        if isinstance(value, str):
            parts = [*value.split()]
        elif type(value) in (list, tuple):
            parts = [*cast("Iterable[Any]", value)]
        if len(parts) != count:
            raise ValueError(f"{key}: {short(value)} is not {count} numbers")
        return [_number(key, part) for part in parts]

    def whole(self, key: str) -> int | None:
        """The value of `key` as a whole number, None if it is not known.

        Raises:
            ValueError: If the value is something else.
        """
        value = self.number(key)
        if value is not None and value != value // 1:
            raise ValueError(f"{key}: {short(self.get(key))} is not a whole number")
        return None if value is None else int(value)

    def flag(self, key: str) -> bool | None:
        """The value of `key` as true or false, None if it is not known.

        Raises:
            ValueError: If the value is something else.
        """
        value = self.get(key)
        if value is UNKNOWN:
            return None
        if not isinstance(value, bool):
            raise ValueError(f"{key}: {short(value)} is neither true nor false")
        return value

    def text(self, key: str) -> str | None:
        """The value of `key` as a name, None if it is not known; "" for null."""
        value = self.get(key)
        return None if value is UNKNOWN else "" if value is None else str(value)[:MAX_KEY]

    def positive(self, key: str) -> float | None:
        """The value of `key` as a number above 0, None if it is not known.

        Raises:
            ValueError: If the value is something else.
        """
        value = self.number(key)
        if value is not None and value <= 0:
            raise ValueError(f"{key}={value:g} must be positive")
        return value

    def label(self, key: str, *, whole: bool = False) -> str:
        """The number at `key` as `name=value`, for a finding.

        Args:
            key: A dotted key.
            whole: Whether the name is the whole key, and not only what is after its last dot.
        """
        value = self.number(key)
        shown = "not known" if value is None else f"{value:g} (assumed)" if key in self.assumed else f"{value:g}"
        return f"{key if whole else key.rpartition('.')[2]}={shown}"

    def dtype(self, key: str) -> str | None:
        """The number format that the file names at `key`, None where it names none that is known."""
        return _DTYPES.get(str(self.get(key))) if self.has(key) else None

    def rate(self, key: str) -> float | None:
        """The learning rate that the file sets at `key`, None where it sets none."""
        return self.number(key) if self.has(key) else None

    def lines(self) -> tuple[str, ...]:
        """The lines about what is unread, each once, without secrets and of bounded length."""
        found = list(dict.fromkeys(self.unread))
        shown = [redact_text(line) for line in found[:_MAX_UNREAD]]
        shown = [line if len(line) <= _MAX_LINE else line[: _MAX_LINE - 3] + "..." for line in shown]
        more = len(found) - _MAX_UNREAD
        return (*shown, *([f"and {more} more lines that are not read"] if more > 0 else ()))

    def taken(self) -> tuple[str, ...]:
        """The defaults that were used, as `key=value`."""
        return tuple(f"{key}={value}" for key, value in self.assumed.items())

    def _plain(self, key: str) -> Any:
        if key not in self.given:
            parts = key.split(".")
            whole_group = any(".".join(parts[:i]) in self.given for i in range(1, len(parts)))
            if whole_group or not self.defaults:
                return UNKNOWN
            if key in self.table:
                self.assumed[key] = self.table[key]
                return self.table[key]
            return UNKNOWN
        value = self.given[key]
        return parsed(value) if isinstance(value, Text) else value


def flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested mapping by dotted key.

    Args:
        tree: The mapping.
        prefix: What all keys begin with.

    Examples:
        >>> flat({"a": {"b": 1}, "c": 2})
        {'a.b': 1, 'c': 2}
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{str(key)[:MAX_KEY]}"
        if len(name) > MAX_KEY:
            continue
        if isinstance(value, Mapping):
            found |= flat(cast("Mapping[Any, Any]", value), f"{name}.")
        else:
            found[name] = value
    return found


def some(names: Iterable[str]) -> str:
    """The first eight of the names, for a message.

    Args:
        names: The names.
    """
    names = list(names)
    shown = [redact_text(name) for name in names[:8]]
    shown = [name if len(name) <= 80 else name[:77] + "..." for name in shown]
    return ", ".join(shown) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def clip_of(low: float | None, high: float | None) -> Clip | None:
    """The fixed interval from `1 - low` to `1 + high`, None if one of the two is not known.

    Args:
        low: Width below 1; above 1 there is no lower bound, because no ratio is negative.
        high: Width above 1.

    Raises:
        ValueError: If a width is negative, or both are 0.
    """
    return None if low is None or high is None else Clip(min(low, 1.0), high)


def _number(key: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{key}: {short(value)} is not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{key}: {number} is not a finite number")
    return number
