"""The start of `bandpo train`: help and mistakes in names and in bandpo's own options take no time; a run imports TRL."""

from pathlib import Path

from bandpo.train.config import Request, RunConfig, read, run_keys
from bandpo.train.options import declared_in, load_table, parsed


def train(arguments: list[str]) -> Path | int:
    """Run `bandpo train`: print the help or refuse what needs no TRL to be refused, then train or make a dry run.

    Args:
        arguments: Command line after `bandpo train`.

    Returns:
        Folder of the results; for a dry run its exit status.

    Raises:
        ValueError: If a name is unknown or a value is refused.
    """
    table = load_table()
    request = read(arguments, lambda method: declared_in(table, method))
    if _asks_for_dry_run(request):
        from bandpo.train.validate import dry_run  # transformers, TRL and torch

        return dry_run(arguments)
    _check_values(request)
    from bandpo.train import command

    return command.train(arguments)


def _asks_for_dry_run(request: Request) -> bool:
    """Whether a dry run is asked for, which names all mistakes and not the first one only."""
    asked: object = request.given.get("dry_run", False)
    for i, argument in enumerate(request.arguments):
        name, _, text = argument.partition("=")
        if name in ("--dry_run", "--dry-run"):
            after = request.arguments[i + 1 : i + 2]
            asked = text or (after[0] if after and not after[0].startswith("--") else True)
    return asked is True or str(asked).lower() in ("yes", "true", "t", "y", "1")


def _check_values(request: Request) -> None:
    """Check bandpo's own options; those of TRL are checked by TRL."""
    request.set_defaults()
    values = parsed(request.declared, request.arguments)
    if values is not None:
        RunConfig(**{name: values[name] for name in run_keys()})
