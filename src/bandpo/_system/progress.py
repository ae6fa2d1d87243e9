"""Messages of a command on the terminal: one place that makes them printable and hides secrets in them."""

import sys
import warnings

from rich.console import Console, RenderableType

from bandpo._system.errors import LINES, printable
from bandpo._system.secrets import redact_text


def quiet_hosts() -> None:
    """Silence the log messages and bars of transformers, TRL and datasets; bandpo's own and all other warnings stay."""
    import transformers  # some commands print messages and need no transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if (datasets := sys.modules.get("datasets")) is not None:  # a command that needs none does not import it here
        datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)


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
        self.console.print(printable(redact_text(text), keep=LINES), markup=False)

    def show(self, table: RenderableType) -> None:
        """Print a table.

        Args:
            table: A table of rich.
        """
        self.console.print(table)
