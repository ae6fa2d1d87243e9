"""Reads programs that train: Python scripts, notebooks, and shell scripts that start TRL or ms-swift."""

from collections.abc import Sequence
from pathlib import Path

from bandpo._system.bounded import read_regular
from bandpo.doctor.setup import Setup
from bandpo.doctor.trl_launch import OWN, read_launch
from bandpo.doctor.trl_source import read_source

MAX_SCRIPT_BYTES = 1 << 18
_MARKS = (b"rlhf", *(name.encode() for name in OWN), *(name.replace("_", "-").encode() for name in OWN))


def read_program(
    path: Path, overrides: Sequence[str] = (), *, processes: int = 1, vocabulary: int | None = None
) -> Setup | None:
    """The settings of a script or notebook in Python, or of the commands of a shell script; None where it has none of these.

    Args:
        path: The file.
        overrides: Settings `key=value`, which replace those of the file.
        processes: Number of processes that will train, where the file does not tell.
        vocabulary: Number of tokens in the model's vocabulary; None if it is not known.

    Raises:
        ValueError: If it cannot be read, or trains with another trainer.
    """
    if path.suffix in (".py", ".ipynb"):
        return read_source(path, overrides, processes=processes, vocabulary=vocabulary)
    data = read_regular(path, MAX_SCRIPT_BYTES, follow=False)
    if not any(mark in data for mark in _MARKS) and not (b"trl" in data and b"grpo" in data):
        return None
    try:
        text = data.decode("utf-8", errors="replace").replace("\x00", "\ufffd")
        return read_launch(text, overrides, processes=processes, vocabulary=vocabulary)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
