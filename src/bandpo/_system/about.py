"""What a reader needs in order to trust or repeat a result: command, versions, revision, machine."""

import importlib.util
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any, cast

import torch

from bandpo._system.secrets import redact_arguments

_PACKAGES = ("bandpo", "torch", "transformers", "trl", "accelerate", "datasets", "reasoning-gym", "math-verify")

_GIT = ["git", "-c", "core.fsmonitor=false", "describe", "--always", "--dirty"]
"""The working folder may be a stranger's: `core.fsmonitor` in its settings would name a program that git runs."""


def command_line() -> str:
    """The command as it was typed, for reports, without the secrets in it."""
    return " ".join(["bandpo", *redact_arguments(sys.argv[1:])])


def about(**more: Any) -> dict[str, Any]:
    """Command, versions, git revision of the working folder, Python and platform, and further fields of the caller.

    Args:
        **more: Further fields, for example the seed.
    """
    return {
        "command": command_line(),
        **more,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
        "git": git_revision(),
    }


def git_revision() -> str | None:
    """The revision of the working folder, None where it is no git checkout."""
    try:
        found = subprocess.run(_GIT, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def plain(value: object) -> Any:
    """A copy of settings that JSON and YAML can hold: a value of another type is written as its text.

    Args:
        value: Dictionaries, lists and values in any nesting.

    Examples:
        >>> from pathlib import PurePosixPath
        >>> plain({"folder": PurePosixPath("a/b"), 1: (2, None)})
        {'folder': 'a/b', '1': [2, None]}
    """
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in cast("dict[object, object]", value).items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in cast("list[object]", value)]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def versions() -> dict[str, str]:
    """The versions of bandpo and of the packages that it builds on, as far as they are installed."""
    return {
        name: metadata.version(name)
        for name in _PACKAGES
        if importlib.util.find_spec(name.replace("-", "_")) is not None
    }
