"""Names of models that mean a folder which does not exist, and the folders that are named alike; needs no torch."""

import difflib
import os
from pathlib import Path


def missing_folder(name: str) -> str | None:
    """A message for the name of a model that can only be a folder, where there is no such folder.

    Args:
        name: The name, as the user gave it.

    Returns:
        The message with the nearest folder; None for a folder, a file, or what may be a name on the Hub.

    Examples:
        >>> missing_folder("./nowhere/model")
        'model ./nowhere/model: there is no such folder, and no folder nowhere'
        >>> missing_folder("Qwen/Qwen2.5-3B-Instruct")
    """
    if not _is_path(name) or os.path.exists(name):
        return None
    if name.startswith("~"):
        whole = os.path.expanduser(name)
        return f"model {name}: ~ is read by the shell alone; in a file or in quotes write {whole}"
    parent = Path(name).parent
    if not parent.is_dir():
        return f"model {name}: there is no such folder, and no folder {parent}"
    near = near_folder(name)
    return f"model {name}: there is no such folder{'' if near is None else f'; did you mean {near}?'}"


def near_folder(name: str) -> str | None:
    """The folder beside the place that a name means whose own name is the nearest; None where none is alike.

    Args:
        name: Name of a folder that does not exist.
    """
    path = Path(name)
    try:
        folders = [entry.name for entry in os.scandir(path.parent) if entry.is_dir()]
    except OSError:
        return None
    near = difflib.get_close_matches(path.name, folders, n=1)
    if not near:
        return None
    begins = "./" if name.startswith("./") else ""
    return f"{begins}{path.with_name(near[0])}"


def _is_path(name: str) -> bool:
    """Whether a name means a folder: no name on the Hub has two slashes or begins like this, and an owner is no folder here."""
    if name.startswith((".", "/", "~")) or name.endswith("/") or os.path.isabs(name) or "\\" in name:
        return True
    owner, slash, rest = name.partition("/")
    return "/" in rest or (bool(slash) and os.path.isdir(owner))
