"""The command line: one table of commands, and the exit status of each error.

The modules of a command are imported when it is chosen, those with torch when it runs: `bandpo --help` needs none of them.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import bandpo
from bandpo._system.errors import LINES, RunError, Terminated, advice_in, printable
from bandpo._system.extras import how_to_install
from bandpo._system.options import Parser, add_examples
from bandpo._system.secrets import redact_text, remember

_SECTIONS = {
    "train and score": ("train", "evaluate", "check-reward"),
    "look at a run or a configuration": ("doctor", "report"),
    "compare and choose": ("compare", "objectives", "bounds", "recipes", "lab"),
    "the command line itself": ("env", "completion"),
}
"""The sections of `bandpo --help` with their commands, by what users do; a command that none has is in the last one."""

_EXAMPLES = (
    "train                           # a small model on the CPU, in about two minutes",
    "train --config run.yaml         # any Hugging Face causal LM and dataset",
    "train --method dpo              # preference learning: dpo, chipo, online-dpo, pdfr, rebel, rdrc, rbrm",
    "doctor run.yaml                 # does the trust region act?",
    "evaluate RUN RUN                # mean@k, pass@k and maj@k of the models of runs, side by side",
    "report RUN                      # the report of a run, also while it trains",
    "compare RUN RUN                 # finished runs against each other, in one report",
)


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
    extra: str | None = None
    """The extra that has all packages of the command, as in `pip install 'bandpo[lab]'`; None where the core is enough."""

    def run(self, options: Any) -> object:
        """Import the function, and call it with the options."""
        return _load(self.function)(options)


COMMANDS = (
    Command(
        "train",
        "train a language model with a trust region, or on preferences",
        None,
        "bandpo.train.start:train",
        extra="lab",
    ),
    Command(
        "evaluate",
        "mean@k, pass@k and maj@k of models on held-out prompts, side by side",
        "bandpo.train.arguments:add_evaluate_arguments",
        "bandpo.train.arguments:run_evaluate",
        extra="lab",
    ),
    Command(
        "check-reward",
        "what a reward gives for the reference answers themselves",
        "bandpo.train.arguments:add_check_reward_arguments",
        "bandpo.train.arguments:run_check_reward",
        extra="lab",
    ),
    Command(
        "report",
        "the report of a run from its folder, also while it trains",
        "bandpo.train.arguments:add_report_arguments",
        "bandpo.train.report_command:report",
        extra="lab",
    ),
    Command(
        "compare",
        "runs against each other; or objectives on small models, with intervals",
        "bandpo.lab.comparison.arguments:add_arguments",
        "bandpo.lab.comparison.arguments:run",
        extra="lab",
    ),
    Command(
        "lab",
        "experiments that show one thing each, as a figure and JSON",
        "bandpo.lab.experiments.arguments:add_arguments",
        "bandpo.lab.experiments.arguments:run",
        extra="lab",
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
    Command(
        "recipes",
        "configurations and scripts of whole runs, to read or to copy",
        "bandpo.recipes.command:add_arguments",
        "bandpo.recipes.command:run",
    ),
    Command(
        "env",
        "versions, devices and paths of this machine, to paste into a report",
        "bandpo._system.environment:add_arguments",
        "bandpo._system.environment:run",
    ),
    Command(
        "completion",
        "completion of commands, options and names in bash, zsh and fish",
        "bandpo.cli:add_completion_arguments",
        "bandpo.cli:print_completion",
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
    # torch warns so where numpy is not installed, which no command of the core needs.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    command = next((c for c in COMMANDS if argv[:1] == [c.name]), None)
    if command is not None and command.arguments is None:
        return _guarded(command.run, argv[1:], command)
    parser = _parser(command)
    options = parser.parse_args(argv)
    if command is None:
        parser.print_help()
        return 0
    return _guarded(command.run, options, command)


class _Overview(Parser):
    """The parser of all commands, whose help lists them in sections."""

    def format_help(self) -> str:
        """The commands in sections, the options, and examples."""
        listed = {name for names in _SECTIONS.values() for name in names}
        rest = tuple(command.name for command in COMMANDS if command.name not in listed)
        *sections, (last, others) = _SECTIONS.items()
        lines = [self.format_usage(), f"{self.description}\n"]
        for title, names in [*sections, (last, (*rest, *others))]:
            named = [c for name in names for c in COMMANDS if c.name == name]
            lines += [f"{title}:", *(f"  bandpo {c.name:<14}{c.help}" for c in named), ""]
        lines += ["options:", "  -h, --help           this text; bandpo COMMAND --help shows the options of a command"]
        return "\n".join([*lines, "  --version            the version\n", str(self.epilog), ""])


def _parser(chosen: Command | None) -> Parser:
    """The parser of all commands, with the options of the chosen one."""
    parser = _Overview("bandpo", description="Trust regions for LLM reinforcement learning.")
    parser.add_argument("--version", action="version", version=f"bandpo {bandpo.__version__}", help="the version")
    add_examples(parser, *_EXAMPLES)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS:
        own = subparsers.add_parser(command.name)
        if command is chosen and command.arguments is not None:
            _load(command.arguments)(own)
    return parser


def add_completion_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bandpo completion`.

    Args:
        parser: Parser of the command.
    """
    from bandpo._system.completion import SHELLS

    parser.description = (
        "Prints a script that completes the commands of bandpo, their options, and the names of objectives, tasks, methods and "
        "presets. The script starts no Python."
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    add_examples(
        parser,
        "completion bash > ~/.local/share/bash-completion/completions/bandpo",
        'completion zsh > "${fpath[1]}/_bandpo"                # a folder of your fpath, before compinit',
        "completion fish > ~/.config/fish/completions/bandpo.fish",
    )


def print_completion(options: argparse.Namespace) -> None:
    """Print the script of a shell, from the parsers of the commands and the table of the options of `bandpo train`.

    Args:
        options: The options of the command.
    """
    from bandpo._system.completion import Completed, completed, script
    from bandpo.train.completion import actions_of_train, known_values

    known = known_values()
    found: list[Completed] = []
    for command in COMMANDS:
        if command.arguments is None:
            actions = actions_of_train()
        else:
            parser = Parser(command.name)
            _load(command.arguments)(parser)
            actions = parser._actions
        found.append(completed(command.name, command.help, actions, known))
    print(script(options.shell, found), end="")


def _load(path: str) -> Callable[[Any], object]:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def _guarded(run: Callable[[Any], object], options: Any, command: Command | None = None) -> int:
    """The exit status of a command: 2 for a mistake in the input, 1 for a run that could not continue, or for a bug."""
    try:
        found = run(options)
    except BrokenPipeError:  # the reader (head, less) has closed the pipe; Python would complain when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ImportError as error:
        name, extra = ("bandpo", None) if command is None else (f"bandpo {command.name}", command.extra)
        return _failed(error, 2, how_to_install(error, name, extra))
    except FileNotFoundError as error:
        return _failed(error, 2)
    except (ValueError, TypeError) as error:
        return _failed(error, 2) if _was_raised(error) else _unexpected(error)
    except (RunError, OSError) as error:  # a reward that fails, a full disk: no mistake in the input
        return _failed(error, 1)
    except KeyboardInterrupt as error:
        print("bandpo: interrupted", file=sys.stderr)
        _print_advice(error)
        return 130
    except Terminated as error:
        print("bandpo: ended by SIGTERM", file=sys.stderr)
        _print_advice(error)
        return 143
    except Exception as error:
        if type(error).__name__ == "UnpicklingError":
            return _failed(error, 1, f"a file of the run is refused, since loading it could run code: {error}")
        return _unexpected(error)
    return found if isinstance(found, int) else 0


def _failed(error: Exception, status: int, text: str | None = None) -> int:
    """Report an error in one line, or another text for it; with BANDPO_DEBUG=1 also its traceback."""
    where = ""
    if os.environ.get("BANDPO_DEBUG"):
        _print_traceback()
    elif isinstance(error, ValueError | TypeError) and not _is_ours(_origin(error)):
        where = " (BANDPO_DEBUG=1 shows which library says so)"
    said = text or str(error) or type(error).__name__
    print(f"bandpo: {printable(redact_text(said), keep=LINES)}{where}", file=sys.stderr)
    _print_advice(error)
    return status


def _print_advice(error: BaseException) -> None:
    """Print what the user can do after an error."""
    for line in advice_in(error):
        print(f"bandpo: {printable(redact_text(line), keep=LINES)}", file=sys.stderr)


def _unexpected(error: Exception) -> int:
    """Report an error that nobody raised for the user to read, so that it does not look like a mistake in the input."""
    _print_traceback()
    print(
        f"bandpo: unexpected {type(error).__name__}. This is a bug in bandpo, or in a library that it calls; please report it "
        "with the lines above and what `bandpo env` prints",
        file=sys.stderr,
    )
    _print_advice(error)
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
