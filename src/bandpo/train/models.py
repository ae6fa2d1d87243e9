"""What a model is named as, and the folder or Hub name that transformers loads for it."""

from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState

from bandpo.train import gguf, wheels


def loadable(name: str, say: Callable[[str], object]) -> str:
    """The folder or Hub name that transformers loads for the name of a model; GGUF files and wheels become folders.

    One process of each machine makes the folder, the others wait for it.

    Args:
        name: Hub name or folder of a causal LM, GGUF file, or `wheel:NAME`.
        say: Called with messages.

    Returns:
        The name itself if it is a Hub name or a folder, else the folder in the cache.

    Raises:
        ValueError: If the file or the name of the wheel cannot be used.
    """
    if name.startswith(wheels.PREFIX):
        return str(_made(lambda: wheels.folder_of(name.removeprefix(wheels.PREFIX), say)))
    if gguf.is_gguf(name) or Path(name).is_file():
        return str(_made(lambda: gguf.folder_of(Path(name), say)))
    return name


def _made(make: Callable[[], Path]) -> Path:
    """What every process finds after the first one of each machine has made it."""
    with PartialState().local_main_process_first():
        return make()
