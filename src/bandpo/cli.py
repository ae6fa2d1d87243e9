"""The command line: one table of commands, and the exit status of each error.

The modules of a command are imported when it is chosen, those with torch when it runs: `bandpo --help` needs none of them.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, cast

import bandpo
from bandpo._system.errors import LINES, RunError, printable
from bandpo._system.secrets import redact_text, remember

_DESCRIPTION = """\
Trust regions for LLM reinforcement learning.

  bandpo train                 train a small language model with BandPO on the CPU, in about two minutes
  bandpo train --config FILE   the same on any Hugging Face causal LM and dataset
  bandpo evaluate MODEL        mean@k and pass@k of a saved model
  bandpo check-reward          what would a reward leave unscored? before a run
  bandpo train --method NAME   preference learning: dpo, chipo, online-dpo, pdfr, rebel, rdrc, rbrm
  bandpo compare               objectives against each other, over seeds, with intervals
  bandpo lab preference        what links, samplers and labels do in preference learning, as figures
  bandpo lab selection         what pruning and packing save, and cost
  bandpo doctor FILE...        does the trust region act? a configuration, a log, a batch, a run's folder
  bandpo bounds                the interval of a trust region, as a table and a figure
  bandpo objectives            the named objectives: formula and paper
"""


class Command(NamedTuple):
    """A command: its line of help, and where its options and its function are, both as `module:function`."""

    name: str
    """The name of the command."""
    help: str
    """One line for the list of commands."""
    arguments: str | None
    """Declares the options in a parser; None for a command that reads its part of the command line itself."""
    function: str
    """Is given the options, and returns the exit status, or something else for status 0."""
    uses: str | None = None
    """A function of another room, which the function is given as well; it is imported when it is called."""

    def run(self, options: Any) -> object:
        """Import the function, and call it with the options."""
        function = _load(self.function)
        return function(options) if self.uses is None else function(options, _later(self.uses))


COMMANDS = (
    Command(
        "train",
        "train a language model (bandpo train --help)",
        None,
        "bandpo.train.start:train",
        "bandpo.doctor.entry:examine",
    ),
    Command(
        "evaluate",
        "mean@k and pass@k of a model on held-out prompts",
        "bandpo.train.arguments:add_evaluate_arguments",
        "bandpo.train.arguments:run_evaluate",
    ),
    Command(
        "check-reward",
        "what a reward gives for the reference answers themselves",
        "bandpo.train.arguments:add_check_reward_arguments",
        "bandpo.train.arguments:run_check_reward",
    ),
    Command(
        "compare",
        "objectives against each other on small models, with intervals",
        "bandpo.lab.comparison.arguments:add_arguments",
        "bandpo.lab.comparison.arguments:run",
    ),
    Command(
        "lab",
        "experiments that show one thing each, as a figure and JSON",
        "bandpo.lab.experiments.arguments:add_arguments",
        "bandpo.lab.experiments.arguments:run",
    ),
    Command(
        "doctor",
        "does the trust region act, and does the run look well?",
        "bandpo.doctor.arguments:add_arguments",
        "bandpo.doctor.command:doctor",
    ),
    Command(
        "bounds",
        "table and figure of a trust region's interval",
        "bandpo.plots.arguments:add_bounds_arguments",
        "bandpo.plots.command:show_bounds",
    ),
    Command(
        "objectives",
        "the named objectives: formula and paper",
        "bandpo.plots.arguments:add_objectives_arguments",
        "bandpo.plots.command:show_objectives",
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. A mistake in the input is reported in one line.

    BANDPO_DEBUG=1 in the environment shows the traceback of every error.

    Args:
        arguments: Command line without the program's name; by default that of the process.

    Returns:
        Exit status: 0 for success, 1 for a run that could not continue, 2 for a mistake in the input.
    """
    argv = list(sys.argv[1:] if arguments is None else arguments)
    remember(argv)
    command = next((c for c in COMMANDS if argv[:1] == [c.name]), None)
    if command is not None and command.arguments is None:
        return _guarded(command.run, argv[1:])
    parser = _parser(command)
    options = parser.parse_args(argv)
    if command is None:
        parser.print_help()
        return 0
    return _guarded(command.run, options)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors, which repeat what was typed, show no secrets."""

    def error(self, message: str) -> NoReturn:
        super().error(redact_text(message))


def _parser(chosen: Command | None) -> argparse.ArgumentParser:
    """The parser of all commands, with the options of the chosen one."""
    parser = _Parser("bandpo", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"bandpo {bandpo.__version__}")
    subparsers = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    for command in COMMANDS:
        own = subparsers.add_parser(command.name, help=command.help)
        if command is chosen and command.arguments is not None:
            _load(command.arguments)(own)
    return parser


def _later(path: str) -> Callable[..., object]:
    """A function that imports another one when it is called."""

    def call(*arguments: object, **options: object) -> object:
        return cast("Callable[..., object]", _load(path))(*arguments, **options)

    return call


def _load(path: str) -> Callable[[Any], object]:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def _guarded(run: Callable[[Any], object], options: Any) -> int:
    """The exit status of a command: 2 for a mistake in the input, 1 for a run that could not continue, or for a bug."""
    try:
        found = run(options)
    except BrokenPipeError:  # the reader (head, less) has closed the pipe; Python would complain when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (FileNotFoundError, ImportError) as error:
        return _failed(error, 2)
    except (ValueError, TypeError) as error:
        return _failed(error, 2) if _was_raised(error) else _unexpected(error)
    except (RunError, OSError) as error:  # a reward that fails, a full disk: no mistake in the input
        return _failed(error, 1)
    except KeyboardInterrupt:
        print("bandpo: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__name__ == "UnpicklingError":
            return _failed(f"a file of the run is refused, since loading it could run code: {error}", 1)
        return _unexpected(error)
    return found if isinstance(found, int) else 0


def _failed(error: Exception | str, status: int) -> int:
    """Report an error in one line; with BANDPO_DEBUG=1 also its traceback."""
    where = ""
    if os.environ.get("BANDPO_DEBUG"):
        _print_traceback()
    elif isinstance(error, ValueError | TypeError) and not _is_ours(_origin(error)):
        where = " (BANDPO_DEBUG=1 shows which library says so)"
    print(f"bandpo: {printable(redact_text(str(error) or type(error).__name__), keep=LINES)}{where}", file=sys.stderr)
    return status


def _unexpected(error: Exception) -> int:
    """Report an error that nobody raised for the user to read, so that it does not look like a mistake in the input."""
    _print_traceback()
    print(
        f"bandpo: unexpected {type(error).__name__}. This is a bug in bandpo, or in a library that it calls; please report it "
        "with the lines above",
        file=sys.stderr,
    )
    return 1


def _print_traceback() -> None:
    import traceback

    print(printable(redact_text(traceback.format_exc()), keep=LINES), end="", file=sys.stderr)


def _was_raised(error: BaseException) -> bool:
    """Whether an error was raised by a `raise` statement, with a message for people, and did not come out of an expression.

    `int(None)` and `None + 1` have no `raise` statement at the place where they fail: in bandpo's code they are bugs. Errors
    of libraries count as raised, since libraries check their inputs in other ways.
    """
    import dis

    origin = _origin(error)
    if origin is None or not _is_ours(origin):
        return True
    return dis.opname[origin.tb_frame.f_code.co_code[origin.tb_lasti]] in ("RAISE_VARARGS", "RERAISE")


def _origin(error: BaseException) -> TracebackType | None:
    """The innermost entry of the traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def _is_ours(trace: TracebackType | None) -> bool:
    place = Path(bandpo.__file__).parent
    return trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(place)


if __name__ == "__main__":
    raise SystemExit(main())
