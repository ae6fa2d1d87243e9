"""Folders that are made once and used by many: sealed, checked whenever they are used, and made by one process at a time."""

import os
import secrets
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from bandpo._system.errors import RunError
from bandpo._system.files import damage, seal
from bandpo._system.locks import waiting_claim

Say = Callable[[str], object]


def cache_root() -> Path:
    """The user's cache directory, or $BANDPO_CACHE."""
    return Path(os.environ.get("BANDPO_CACHE") or platformdirs.user_cache_dir("bandpo"))


def is_usable(path: Path, say: Say) -> bool:
    """Whether a folder of the cache is there and as it was written.

    Args:
        path: The folder.
        say: Takes a message if it is there and cannot be used.
    """
    if not path.exists():
        return False
    wrong = damage(path)
    if wrong is not None:
        say(f"{path} is not used: {wrong}; it is made again")
    return wrong is None


@contextmanager
def sole_maker(path: Path, say: Say) -> Generator[None]:
    """For as long as the block runs no other process makes this folder; what a killed one left of it is cleared away.

    Args:
        path: A folder of the cache.
        say: Takes a message if another process is making it now; this one waits.

    Raises:
        RunError: If the cache cannot be written.
    """
    try:
        claim = waiting_claim(
            path.parent, f".{path.name}.lock", lambda: say(f"another process is making {path}; this one waits for it")
        )
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        for left in path.parent.glob(f"{_aside(path)}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        claim.release()


def store(path: Path, save: Callable[[Path], object]) -> None:
    """Write a folder of the cache, whole or not at all, in place of a damaged one.

    Args:
        path: The folder; call this within `sole_maker(path)`.
        save: Writes the files into the folder that it is given.

    Raises:
        RunError: If they cannot be written; nothing is left behind.
    """
    aside, old = (path.with_name(_aside(path) + secrets.token_hex(4)) for _ in range(2))
    try:
        aside.mkdir(parents=True)
        save(aside)
        seal(aside)
        if path.exists():
            path.rename(old)
        aside.rename(path)
    except Exception as error:  # each library has its own for a full disk
        if damage(path) is not None:  # else another has made it meanwhile, where locks do not hold
            raise _cannot_write(path, error) from error
    finally:
        for left in (aside, old):
            shutil.rmtree(left, ignore_errors=True)


def _aside(path: Path) -> str:
    return f".making-{path.name}-"


def _cannot_write(path: Path, error: Exception) -> RunError:
    return RunError(
        f"cannot write {path} ({type(error).__name__}: {error}); make room there, or set BANDPO_CACHE to a folder that can "
        "be written"
    )
