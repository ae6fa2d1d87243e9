"""Failures at run time that are not bad input: they end a run, and its results so far are kept."""

import traceback
import unicodedata
from collections.abc import Generator
from contextlib import contextmanager


class RunError(RuntimeError):
    """A run cannot continue; the message says why, and how to continue it."""


class Terminated(BaseException):
    """The process was asked to end, by SIGTERM."""


_ADVICE = "_bandpo_advice"


def advise(error: BaseException, line: str) -> None:
    """Attach what the user can do to an error; the command line prints it after the error, once.

    Args:
        error: The error, which is raised on.
        line: The advice.
    """
    lines = advice_in(error)
    if line not in lines:
        setattr(error, _ADVICE, [*lines, line])


def advice_in(error: BaseException) -> list[str]:
    """The advice that was attached to an error, or to one that it was raised from.

    Args:
        error: The error.

    Examples:
        >>> error = RunError("the disk is full")
        >>> advise(error, "remove a file")
        >>> advice_in(error)
        ['remove a file']
    """
    found: BaseException | None = error
    while found is not None:
        if lines := getattr(found, _ADVICE, None):
            return list(lines)
        found = found.__cause__
    return []


@contextmanager
def exits_are_errors() -> Generator[None]:
    """Turn an attempt of a user's code, such as an objective or a callback, to end the process into a `RunError`.

    `sys.exit`, with any status, and every other exception that is not an `Exception` becomes a `RunError` that names the
    place. A `KeyboardInterrupt` and a `Terminated` pass unchanged. `os._exit` cannot be intercepted.

    Raises:
        RunError: If the code in the block raises such an exception.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, Terminated):
        raise
    except BaseException as error:
        raise RunError(
            f"code of this run {what_happened(error)} at {place_of(error)}; a run is not ended that way. Raise an exception "
            "there instead"
        ) from error


def what_happened(error: BaseException) -> str:
    """A description of an exception that fits into one line of a message.

    Examples:
        >>> what_happened(SystemExit(0)), what_happened(ValueError("odd"))
        ('called sys.exit(0)', "raised ValueError('odd')")
    """
    try:
        text = f"called sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"raised {error!r}"
    except Exception:  # the exception is a user's, and its repr may fail
        text = f"raised {type(error).__name__}"
    return printable(text[:500])


def place_of(error: BaseException) -> str:
    """File, line and function where an exception was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}" if frames else "an unknown place"


LINES = "\n\t"
"""The control characters that a message of several lines keeps."""


def printable(text: str, *, keep: str = "") -> str:
    r"""The text with control characters, text-direction marks and line ends escaped, so that a terminal only prints it.

    Args:
        text: The text, which may come from a file, a model or a user's code.
        keep: Characters that are not escaped, such as `LINES`.

    Returns:
        The escaped text.

    Examples:
        >>> printable("\x1b[2Jgone\r\u202e")
        '\\x1b[2Jgone\\r\\u202e'
    """
    if text.isprintable():
        return text
    return "".join(c if _is_shown(c) or c in keep else c.encode("unicode_escape").decode() for c in text)


def _is_shown(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"  # the wide space of Chinese and Japanese
