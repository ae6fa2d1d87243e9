"""Errors that are nobody's mistake in the input: they end a run, and what it had is kept."""

import traceback
import unicodedata
from collections.abc import Generator
from contextlib import contextmanager


class RunError(RuntimeError):
    """A run cannot continue; the message says why, and how to continue it."""


@contextmanager
def exits_are_errors() -> Generator[None]:
    """Code that a run was given, such as an objective or a callback, cannot end the process without a message.

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
    return printable(text[:500])


def place_of(error: BaseException) -> str:
    """File, line and function where an exception was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}" if frames else "an unknown place"


LINES = "\n\t"
"""What a message of several lines keeps."""


def printable(text: str, *, keep: str = "") -> str:
    r"""The text with what a terminal would act on written out: control characters, marks of direction, line ends.

    Args:
        text: With what a file, a model or a user's code put into it.
        keep: Characters that are left as they are, such as `LINES`.

    Returns:
        Text that a terminal only prints.

    Examples:
        >>> printable("\x1b[2Jgone\r\u202e")
        '\\x1b[2Jgone\\r\\u202e'
    """
    if text.isprintable():
        return text
    return "".join(c if _is_shown(c) or c in keep else c.encode("unicode_escape").decode() for c in text)


def _is_shown(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"  # the wide space of Chinese and Japanese
