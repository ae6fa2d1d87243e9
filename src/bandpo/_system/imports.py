"""Imports an object that the user named as "package.module:NAME"."""

import difflib
import importlib
import os
import sys
from typing import Any


class UnknownNameError(AttributeError):
    """A module was imported, and it has nothing of the name that was asked for."""


def imported(path: str) -> Any:
    """The object that a path names. The code of its module runs, and may raise anything.

    A module is also found in the current folder, as with `python -m`, after the installed ones. The folder is on the path only
    meanwhile: a folder such as `wandb/` in it must not look like an installed package afterwards.

    Args:
        path: "package.module:NAME"; NAME may have dots.

    Raises:
        UnknownNameError: If the module has no such name; the message has the nearest one.

    Examples:
        >>> imported("math:pi")
        3.141592653589793
        >>> imported("math:sqtr")
        Traceback (most recent call last):
        bandpo._system.imports.UnknownNameError: math has no 'sqtr'; did you mean 'sqrt'?
    """
    module, _, names = path.partition(":")
    here = os.getcwd()
    sys.path.append(here)
    try:
        found: Any = importlib.import_module(module)
    finally:
        if here in sys.path:  # the module may have changed it
            sys.path.reverse()
            sys.path.remove(here)  # the last one
            sys.path.reverse()
    for name in names.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            near = difflib.get_close_matches(name, dir(found), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UnknownNameError(f"{module} has no {name!r}{hint}") from error
    return found
