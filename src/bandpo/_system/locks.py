"""Locks for folders and files that one process uses at a time; a killed process does not leave them locked.

A lock is a file that the operating system locks for its holder and frees when the holder ends, in whatever way. So a killed
run does not block the next one, on this machine or on another that shares the disk. On a file system without such locks, the
process number, the machine and the start time, which are written in the file, show whether the holder is still alive.
"""

import contextlib
import errno
import json
import os
import platform
import stat
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from bandpo._system.secrets import redact_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".bandpo.lock"
"""Name of the lock file in a folder that is in use."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)

_TRIES = 100  # to make a folder that other processes remove at the same time

_held: set[str] = set()  # the system's locks belong to the process, so threads of one process see each other here
_guard = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_held.clear)  # a child does not inherit the locks of its parent


class InUseError(ValueError):
    """Another process, or another thread of this one, uses the folder or file."""


class Claim:
    """An exclusive claim of this process on a folder, until it is released or the process ends.

    Args:
        folder: The folder. It is made if it does not exist; then it is removed on release if it is still empty.
        name: Name of the lock file in the folder.

    Raises:
        InUseError: If another process or thread holds the lock; the message says who.
        OSError: If the folder or the lock file cannot be made.
    """

    def __init__(self, folder: Path, name: str = LOCK) -> None:
        self.path = folder / name
        self._file: int | None = None
        self._made: list[Path] = []
        try:
            while self._file is None:
                _make(folder, self._made)
                self._key = str(self.path.resolve())
                with _guard:
                    if self._key in _held:
                        raise InUseError(_in_use(self.path, {"process": os.getpid()}))
                    with contextlib.suppress(
                        FileNotFoundError
                    ):  # the process that had made the folder has just removed it
                        self._file = _lock(self.path)
                        _held.add(self._key)
        except BaseException:
            _unmake(self._made)
            raise

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        with _guard:
            if self._file is None or self._key not in _held:
                return
            self.path.unlink(missing_ok=True)  # before it is unlocked, so that a waiting process sees the replacement
            os.close(self._file)
            self._file = None
            _held.discard(self._key)
        _unmake(self._made)


def waiting_claim(folder: Path, name: str, say: Callable[[], object] = lambda: None) -> Claim:
    """A `Claim`, after a wait until the present holder has released the lock.

    Args:
        folder: The folder, as in `Claim`.
        name: Name of the lock file.
        say: Called once if there is a wait.
    """
    waited = False
    while True:
        try:
            return Claim(folder, name)
        except InUseError:
            if not waited:
                say()
            waited = True
            time.sleep(0.1)


def claim_output(folder: Path) -> Claim:
    """A claim on a folder for results; a folder with a link that leads out of it, which others may have put there, is refused.

    Args:
        folder: The folder for results.

    Raises:
        ValueError: If another process uses the folder, it is a file, or a link in it leads out of it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the output folder {folder} is a file; choose another")
    claim = Claim(folder)
    try:
        inside = folder.resolve()
        for place, folders, files in os.walk(folder):
            for path in (Path(place, name) for name in (*folders, *files)):
                if path.is_symlink() and not path.resolve().is_relative_to(inside):
                    raise ValueError(
                        f"{path} is a link that leads out of the folder, to {path.resolve()}; remove it, or choose another "
                        f"folder ({folder} itself may be a link)"
                    )
    except BaseException:
        claim.release()
        raise
    return claim


def claim_file(path: Path) -> Claim:
    """A claim on a file that will be written; the folder of the file is made.

    Args:
        path: The file.

    Raises:
        InUseError: If another process is about to write it.
    """
    return Claim(path.parent, f".{path.name}.lock")


@contextmanager
def released(claim: Claim) -> Generator[Claim]:
    """Release a claim at the end of the block."""
    try:
        yield claim
    finally:
        claim.release()


def _make(folder: Path, made: list[Path]) -> None:
    """Make a folder and the ones above it, and note those that were not there before."""
    for _ in range(_TRIES):  # other processes remove their empty folders when they release a claim
        try:
            folder.mkdir()
        except FileNotFoundError:
            if folder.parent == folder:
                raise
            _make(folder.parent, made)
        except FileExistsError:
            if _is_folder(folder):
                return
        except OSError:
            if not folder.is_dir():
                raise
            return
        else:
            made.append(folder)
            return
    raise FileNotFoundError(errno.ENOENT, "the folder cannot be made, or others keep taking it away", str(folder))


def _is_folder(place: Path) -> bool:
    """Whether a path is a folder; False if it does not exist any more.

    Raises:
        FileExistsError: If it is something else.
    """
    try:
        found = place.stat()
    except FileNotFoundError:
        if place.is_symlink():
            raise FileExistsError(errno.EEXIST, "a link that leads nowhere", str(place)) from None
        return False
    if not stat.S_ISDIR(found.st_mode):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place))
    return True


def _unmake(made: list[Path]) -> None:
    for place in reversed(made):
        try:
            place.rmdir()
        except OSError:  # it is not empty any more
            return


def _lock(path: Path) -> int:
    """An open, locked file that names this process.

    Raises:
        InUseError: If another process holds it.
    """
    while True:
        file, new = _open(path)
        try:
            holder = _read(file)
            taken = _take(file)
            if (
                taken is None
            ):  # no locks on this file system: the process that makes the file holds it, and leaves it if killed
                taken = new
                if not new and holder and not _lives(holder):
                    _set_aside(path, holder)
                    continue
            if not taken:
                raise InUseError(_in_use(path, holder))
            if _is_at(path, file):
                _write(file, _myself())
                held, file = file, -1
                return held
        finally:
            if file >= 0:
                os.close(file)
        # The holder removed the file while we opened it: the next try makes a new one.


def _open(path: Path) -> tuple[int, bool]:
    """The open lock file, and whether this call made it."""
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    while True:
        try:
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644), True
        except FileExistsError:
            pass
        try:
            return os.open(path, flags), False
        except FileNotFoundError:  # the file or its folder was removed between the two calls
            if not path.parent.is_dir():
                raise


def _take(file: int) -> bool | None:
    """Whether we hold the system's lock now; None on a file system without locks."""
    if fcntl is None:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _set_aside(path: Path, dead: dict[str, Any]) -> None:
    """Remove the lock file of a dead process, unless a living process has replaced it by now."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if json.loads(aside.read_bytes() or b"null") != dead:
        aside.rename(path)
    else:
        aside.unlink()


def _myself() -> dict[str, Any]:
    return {"process": os.getpid(), "host": platform.node(), "boot": _boot(), "started": _started(os.getpid())}


def _lives(holder: dict[str, Any]) -> bool:
    """Whether the process of a lock file is alive; a process on another machine counts as alive."""
    process = holder.get("process")
    if not isinstance(process, int) or process <= 0:
        return False
    if holder.get("host") != platform.node():
        return True
    if holder.get("boot") != _boot():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # the process belongs to another user
        pass
    return holder.get("started") == _started(process)  # otherwise a new process has the same number


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return ""


def _started(process: int) -> str:
    """The start time of a process in the kernel's ticks; empty if it is not known."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _read(file: int) -> dict[str, Any]:
    os.lseek(file, 0, os.SEEK_SET)
    try:
        found: Any = json.loads(os.read(file, 10_000))
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _write(file: int, content: dict[str, Any]) -> None:
    os.ftruncate(file, 0)
    os.lseek(file, 0, os.SEEK_SET)
    os.write(file, json.dumps(content).encode())


def _in_use(path: Path, holder: dict[str, Any]) -> str:
    process, host = holder.get("process"), holder.get("host")
    who = f"process {process}" if isinstance(process, int) else "another process"
    where = f" on {redact_text(host)[:100]!r}" if isinstance(host, str) and host != platform.node() else ""
    place = path.parent if path.name == LOCK else path.with_name(path.name.removeprefix(".").removesuffix(".lock"))
    return f"{place} is in use by {who}{where}; wait until it has ended, or choose another"
