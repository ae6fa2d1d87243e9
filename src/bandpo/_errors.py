"""Errors that are nobody's mistake in the input: they end a run, and what it had is kept."""

import traceback
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager


class RunError(RuntimeError):
    """A run cannot go on; the message says why and how to go on."""


@contextmanager
def exits_are_errors() -> Iterator[None]:
    """Code that a run was given, an objective or a callback, cannot end the process in silence.

    `sys.exit`, whatever its status, and everything else that is no `Exception` becomes a `RunError` with the place; only a
    `KeyboardInterrupt` passes. `os._exit` ends a process before any code can see it.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise RunError(
            f"code of this run {what_happened(error)} at {place_of(error)}; a run is not ended that way. Raise an exception "
            "there instead"
        ) from error


def what_happened(error: BaseException) -> str:
    """An exception in words, for one line of a message.

    Examples:
        >>> what_happened(SystemExit(0)), what_happened(ValueError("odd"))
        ('called sys.exit(0)', "raised ValueError('odd')")
    """
    try:
        text = f"called sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"raised {error!r}"
    except Exception:  # a user's exception has a repr of its own
        text = f"raised {type(error).__name__}"
    return printable(text[:500]).replace("\n", r"\n")


def place_of(error: BaseException) -> str:
    """File, line and function where an exception was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}" if frames else "an unknown place"


def printable(text: str) -> str:
    r"""A text that a terminal shows and does not obey: control characters are written out, but for ends of lines and tabs.

    Args:
        text: With what a model, a dataset or a user's code put into it.

    Examples:
        >>> print(printable("a\x1b[2Jb"))
        a\x1b[2Jb
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c in "\n\t" or (unicodedata.category(c) not in ("Cc", "Cs") and c not in _DIRECTIONS) else _written_out(c)
        for c in text
    )


_DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def _written_out(character: str) -> str:
    return (
        character.encode("ascii", "backslashreplace").decode() if ord(character) > 127 else f"\\x{ord(character):02x}"
    )
