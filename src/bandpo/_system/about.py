"""What a reader needs to trust or repeat a result: command, versions, revision, machine."""

import importlib.util
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

import torch

from bandpo._system.secrets import redact_arguments

_PACKAGES = ("bandpo", "torch", "transformers", "trl", "accelerate", "datasets", "reasoning-gym", "math-verify")


# The folder may be a stranger's: its settings must not name a program to run.
_GIT = ["git", "-c", "core.fsmonitor=false", "describe", "--always", "--dirty"]


def command_line() -> str:
    """The command as it was typed, for reports, without the secrets in it."""
    return " ".join(["bandpo", *redact_arguments(sys.argv[1:])])


def about(**more: Any) -> dict[str, Any]:
    """Command, versions, git revision of the working folder, Python and platform, and what else the caller knows.

    Args:
        **more: Such as the seed.
    """
    return {
        "command": command_line(), **more, "threads": torch.get_num_threads(), "platform": platform.platform(),
        "python": platform.python_version(), "versions": _versions(), "git": git_revision(),
    }  # fmt: skip


def git_revision() -> str | None:
    """Revision of the working folder, where it is a git checkout."""
    try:
        found = subprocess.run(_GIT, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def _versions() -> dict[str, str]:
    return {
        name: metadata.version(name)
        for name in _PACKAGES
        if importlib.util.find_spec(name.replace("-", "_")) is not None
    }
