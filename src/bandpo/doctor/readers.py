"""Finds the host of a configuration, and reads it with that host's reader."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bandpo.doctor import nemo_rl, openrlhf, prime_rl, rllm, skyrl, slime, swift, verl
from bandpo.doctor.hosts import host_of_keys, host_of_script, not_readable
from bandpo.doctor.launch import Dialect, is_of, parse_script
from bandpo.doctor.setup import Setup
from bandpo.doctor.trl_launch import with_overrides

# The first one that a script belongs to reads it.
_OF_SCRIPTS: tuple[tuple[Dialect, Callable[..., Setup]], ...] = (
    (rllm.DIALECT, rllm.read_rllm),  # it has verl's settings too
    (verl.DIALECT, verl.read_verl),
    (openrlhf.DIALECT, openrlhf.read_openrlhf),
    (skyrl.DIALECT, skyrl.read_skyrl),
    (nemo_rl.DIALECT, nemo_rl.read_nemo_rl),
    (slime.DIALECT, slime.read_slime),
)
_OF_TREES: Mapping[str, Callable[..., Setup]] = {"SkyRL": skyrl.read_skyrl, "NeMo-RL": nemo_rl.read_nemo_rl}


def read_launch(path: Path, overrides: Sequence[str] = (), *, vocabulary: int | None = None) -> Setup:
    """The settings in a launch script, in a list of overrides, or in TOML.

    Args:
        path: The file.
        overrides: Settings `key=value`, which replace those of the file.
        vocabulary: Number of tokens in the model's vocabulary; None if it is not known.

    Raises:
        ValueError: If it belongs to no host with a reader, cannot be read, or has a value that is not valid.
    """
    if path.suffix == ".toml":
        return prime_rl.read_prime_rl(path, overrides, vocabulary=vocabulary)
    script = parse_script(path)
    for dialect, read in _OF_SCRIPTS:
        if is_of(script, dialect):
            return read(path, overrides, script=script, vocabulary=vocabulary)
    host = host_of_script(script)
    if host or any(verl.DIALECT.key(word) for command in script.commands for word in command):
        raise not_readable(path, host)
    raise ValueError(f"{path}: no override of the form key=value, and no option of a host, in it")


def read_tree(
    path: Path, tree: Mapping[Any, Any], overrides: Sequence[str] = (), *, vocabulary: int | None = None
) -> Setup | None:
    """The settings in YAML of a host other than TRL, None if it has no key that tells its host.

    Args:
        path: The file.
        tree: The keys and values of the file.
        overrides: Settings `key=value`, which replace those of the file.
        vocabulary: Number of tokens in the model's vocabulary; None if it is not known.

    Raises:
        ValueError: If its host has no reader, it cannot be read, or has a value that is not valid.
    """
    if swift.is_swift(tree):
        return swift.read_swift(with_overrides(tree, overrides), vocabulary=vocabulary)
    if verl.is_verl(tree):
        return verl.read_verl(path, overrides, tree=tree, vocabulary=vocabulary)
    host = host_of_keys(tree)
    if host in _OF_TREES:
        return _OF_TREES[host](path, overrides, tree=tree, vocabulary=vocabulary)
    if host:
        raise not_readable(path, host)
    return None
