"""Imports an object that the user named as "package.module:NAME"."""

import importlib
import os
import sys
from typing import Any


def imported(path: str) -> Any:
    """The object that a path names. The code of its module runs, and may raise anything.

    A module is also found in the current folder, as with `python -m`, after the installed ones. The folder is on the path only
    meanwhile: a folder such as `wandb/` in it must not look like an installed package afterwards.

    Args:
        path: "package.module:NAME"; NAME may have dots.

    Examples:
        >>> imported("math:pi")
        3.141592653589793
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
        found = getattr(found, name)
    return found
