"""The start of `bandpo train`: help and mistakes in names and in bandpo's own options take no time; a run imports TRL."""

from pathlib import Path

from bandpo.train.config import Request, RunConfig, read, run_keys
from bandpo.train.options import declared_in, load_table, parsed


def train(arguments: list[str]) -> Path:
    """Run `bandpo train`: print the help or refuse what needs no TRL to be refused, then train.

    Args:
        arguments: Command line after `bandpo train`.

    Returns:
        Folder of the results.

    Raises:
        ValueError: If a name is unknown or a value is refused.
    """
    table = load_table()
    request = read(arguments, lambda method: declared_in(table, method))
    _check_values(request)
    from bandpo.train import command  # transformers, TRL and torch

    return command.train(arguments)


def _check_values(request: Request) -> None:
    """Check bandpo's own options; those of TRL are checked by TRL."""
    request.set_defaults()
    values = parsed(request.declared, request.arguments)
    if values is not None:
        RunConfig(**{name: values[name] for name in run_keys()})
