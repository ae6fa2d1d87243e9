"""Messages about a word that is none of the allowed ones, with the nearest."""

import argparse
import difflib
from collections.abc import Callable, Sequence


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """A type of an option with choices, whose message names the nearest one.

    Args:
        names: The choices.

    Examples:
        >>> one_of(("smoke", "quick"))("quik")
        Traceback (most recent call last):
        argparse.ArgumentTypeError: 'quik' is unknown: did you mean 'quick'? Choose from smoke, quick
    """

    def check(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(unknown(text, names))
        return text

    return check


def unknown(text: str, names: Sequence[str]) -> str:
    """A message about a word that is none of the names.

    Args:
        text: The word.
        names: The names that are known.

    Examples:
        >>> unknown("chess", ["paths", "sums"])
        "'chess' is unknown; choose from paths, sums"
    """
    near = difflib.get_close_matches(text, names, n=1)
    hint = f": did you mean {near[0]!r}? Choose" if near else "; choose"
    return f"{text!r} is unknown{hint} from {', '.join(names)}"
