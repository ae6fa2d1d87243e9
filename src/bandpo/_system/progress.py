"""Messages of a command on the terminal: one place that makes them printable and hides secrets in them."""

import sys
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from bandpo._system.errors import LINES, printable
from bandpo._system.secrets import redact_text

_SILENCE = 60
"""Seconds after which a long stage prints another line where there is no terminal."""


def clock_time(seconds: float) -> str:
    """A duration as hours, minutes and seconds.

    Args:
        seconds: The duration.

    Examples:
        >>> [clock_time(s) for s in (0.4, 59.6, 3725, 90_061)]
        ['0:00', '1:00', '1:02:05', '1 d 1:01:01']
    """
    days, rest = divmod(round(seconds), 86_400)
    hours, rest = divmod(rest, 3600)
    text = f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours or days else f"{rest // 60}:{rest % 60:02}"
    return f"{days} d {text}" if days else text


def quiet_hosts() -> None:
    """Silence the log messages and bars of transformers, TRL and datasets; bandpo's own and all other warnings stay."""
    import transformers  # some commands print messages and need no transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if (datasets := sys.modules.get("datasets")) is not None:  # a command that needs none does not import it here
        datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)


def bar_on(console: Console, *, transient: bool = False) -> Bar:
    """A live bar on a terminal: description, bar, count, time, and the field `left` of its task.

    Args:
        console: The terminal.
        transient: Whether the bar disappears at its end.
    """
    columns = (
        "{task.description}",
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        "{task.fields[left]}",
    )
    return Bar(*columns, console=console, transient=transient)


class Progress:
    """Prints messages in the main process; in the other processes it prints nothing.

    Args:
        main: Whether this is the main process.
    """

    def __init__(self, *, main: bool = True) -> None:
        self.console = Console(quiet=not main, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print a message.

        Args:
            text: The message; control characters in it are escaped, and secrets are hidden.
        """
        self.console.print(printable(redact_text(text), keep=LINES), markup=False, highlight=False)

    @contextmanager
    def stage(self, title: str, total: int, unit: str) -> Generator[Callable[[int], None]]:
        """A part of a run that takes its time: a bar on a terminal, elsewhere a line at its beginning and one every minute.

        Args:
            title: What is being done.
            total: Number of things to do.
            unit: Noun for the things.

        Yields:
            A function that is called with the number of things that were done since the last call.
        """
        began = told = time.monotonic()
        done = 0
        bar = bar_on(self.console, transient=True) if self.console.is_terminal else None
        if bar is None:
            self.say(f"{title}: {total} {unit}")
        else:
            bar.add_task(title, total=total, left="")
            bar.start()

        def advance(count: int) -> None:
            nonlocal done, told
            done = min(total, done + count)
            now = time.monotonic()
            left = f"{clock_time((now - began) / max(1, done) * (total - done))} left"
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done, left=left)
            elif now - told >= _SILENCE and done < total:
                told = now
                self.say(f"  {done}/{total} {unit}  {clock_time(now - began)}, {left}")

        try:
            yield advance
        finally:
            if bar is not None:
                bar.stop()

    def show(self, table: RenderableType) -> None:
        """Print a table.

        Args:
            table: A table of rich.
        """
        self.console.print(table)
