"""Folders that are made once and shared by runs: sealed, checked at each use, and made by one process at a time."""

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
    """The folder of all caches: $BANDPO_CACHE, or the user's cache directory."""
    return Path(os.environ.get("BANDPO_CACHE") or platformdirs.user_cache_dir("bandpo"))


def is_usable(path: Path, say: Say) -> bool:
    """Whether a folder of the cache exists and is unchanged since it was written.

    Args:
        path: The folder.
        say: Called with a message if the folder exists but cannot be used.
    """
    if not path.exists():
        return False
    wrong = damage(path)
    if wrong is not None:
        say(f"{path} is not used: {wrong}; it is made again")
    return wrong is None


@contextmanager
def sole_maker(path: Path, say: Say) -> Generator[None]:
    """Keep other processes from making this folder while the block runs, and remove what a killed process left behind.

    Args:
        path: A folder of the cache.
        say: Called with a message if another process is making the folder now; this process then waits.

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
    """Write a folder of the cache completely or not at all; a damaged folder is replaced.

    Args:
        path: The folder; call this within `sole_maker(path)`.
        save: A function that writes the files into the folder that it is given.

    Raises:
        RunError: If the files cannot be written; no partial folder is left.
    """
    aside, old = (path.with_name(_aside(path) + secrets.token_hex(4)) for _ in range(2))
    try:
        aside.mkdir(parents=True)
        save(aside)
        seal(aside)
        if path.exists():
            path.rename(old)
        aside.rename(path)
    except Exception as error:  # each library raises an exception of a different class when the disk is full
        if damage(path) is not None:  # otherwise another process has made it meanwhile, on a file system without locks
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
