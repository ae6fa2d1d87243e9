"""What a run that ends early tells: the command line that resumes it. SIGTERM ends a run as ctrl-C does."""

import os
import shlex
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState

from bandpo._system.errors import Terminated, advise
from bandpo._system.files import SEAL
from bandpo._system.secrets import HIDDEN, redact


@contextmanager
def resumable(folder: Path, given: dict[str, Any], *, own_sigterm: bool = True) -> Generator[None]:
    """A context for the work of a run after its folder was made: an error from it has the line that resumes the run.

    Args:
        folder: Folder of the run.
        given: The settings that the user gave.
        own_sigterm: Whether SIGTERM raises `Terminated` here; another handler may be asked for, and with several processes the
            launcher decides.
    """
    before = _take_sigterm() if own_sigterm and PartialState().num_processes == 1 else None
    try:
        yield
    except BaseException as error:
        if PartialState().is_main_process:
            advise(error, resume_line(folder, given, processes=cast("int", PartialState().num_processes)))
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def resume_line(folder: Path, given: dict[str, Any], *, processes: int = 1) -> str:
    """The line that tells how to resume a run, and from where.

    Args:
        folder: Folder of the run.
        given: The settings that the user gave; those with a secret have to be given again.
        processes: Number of processes of the run.
    """
    words = ["--config", str(folder / "config.yaml"), "--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
    hidden = [f"--{name}" for name, value in redact(given).items() if HIDDEN in str(value)]
    launch = "bandpo train" if processes == 1 else "accelerate launch [ITS OPTIONS] -m bandpo train"
    line = " ".join([launch, *map(shlex.quote, words), *(f"{option} VALUE" for option in hidden)])
    return f"{_place(folder)}:\n  {line}"


def _place(folder: Path) -> str:
    """Where the run would continue, as far as the names of its complete checkpoints tell."""
    steps = [_number(path.parent.name) for path in folder.glob(f"checkpoint-*/{SEAL}")]
    rounds = [_number(path.parent.name) for path in folder.glob(f"rounds/*/{SEAL}")]
    if steps:
        return f"to continue after step {max(steps)}, the last checkpoint"
    if rounds:
        return f"to continue after round {max(rounds) + 1}, the last whole one"
    return "there is no checkpoint yet (save_steps); to begin again"


def _number(name: str) -> int:
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 0


def _take_sigterm() -> Any:
    """Let the first SIGTERM raise `Terminated`, and the next one end the process at once; the handler before, or None."""
    if threading.current_thread() is not threading.main_thread():
        return None
    before, process = signal.getsignal(signal.SIGTERM), os.getpid()
    if before is not signal.SIG_DFL:  # ignored, or somebody else's
        return None

    def end(number: int, _: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != process:  # a process that was forked has nothing to tell
            os.kill(os.getpid(), number)
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    return before
