"""One entry to all rules: it tells what it is given, and calls the rules for that."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from bandpo.doctor.batch import examine_batch, our_names
from bandpo.doctor.batch_files import Stored
from bandpo.doctor.command import examine_files, setup_in
from bandpo.doctor.rules import examine_setup
from bandpo.doctor.setup import Setup
from bandpo.monitoring.findings import Finding
from bandpo.monitoring.symptoms import examine_log
from bandpo.objective import Objective


def examine(*what: object, processes: int = 1, vocabulary: int | None = None, target: float = 0.01) -> list[Finding]:
    """What the doctor finds in configurations, logs and batches.

    The tokens of a batch are also counted for the objectives of the configurations that come before it.

    Args:
        what: One or more of these. A path (`str` or `Path`) of a configuration, a log, a batch or a run's folder. A `Setup`,
            TRL's `GRPOConfig` or `BandGRPOConfig`, or a mapping with the keys of a configuration. An iterable of rows of
            metrics, each a mapping from names to numbers. A batch, which is a mapping from our or a host's names to tensors.
        processes: Number of processes that will train, for a configuration of TRL.
        vocabulary: Number of tokens in the model's vocabulary; None if it is not known.
        target: Share of tokens that the radius recommended for a batch clips.

    Returns:
        The findings, in the order of what was given and then of the rules.

    Raises:
        ValueError: If nothing is given, a file or a mapping cannot be read, or a row is none of metrics.
        TypeError: If something is given that the doctor does not examine.

    Examples:
        >>> rows = [{"entropy": 0.8**i, "clip_ratio/region_mean": 0.01} for i in range(20)]
        >>> config = {"objective": "bandpo-kl", "num_iterations": 1, "per_device_train_batch_size": 8}
        >>> [f.rule for f in examine(config, rows) if f.level in ("warning", "problem")]
        ['inert', 'entropy']
    """
    if not what:
        raise ValueError("nothing to examine: give a path, a configuration, rows of metrics or a batch")
    found: list[Finding] = []
    objectives: list[Objective] = []
    for one in what:
        if isinstance(one, str | Path):
            examined = examine_files([Path(one)], processes=processes, vocabulary=vocabulary, target=target)
            for file in examined:
                if file.error:
                    raise ValueError(file.error)
                found += file.findings
            continue
        if _is_batch(one):
            found += examine_batch(our_names(cast("Mapping[str, object]", one)), objectives=objectives, target=target)
            continue
        setup = _setup(one, processes, vocabulary)
        if setup is not None:
            objectives += [] if setup.objective is None else [setup.objective]
            found += examine_setup(setup)
        elif isinstance(one, Iterable):
            found += examine_log(_rows(cast("Iterable[Any]", one)))
        else:
            raise TypeError(
                f"the doctor examines paths, configurations, rows of metrics and batches of tensors, got {type(one).__name__}"
            )
    return found


def _setup(one: object, processes: int, vocabulary: int | None) -> Setup | None:
    """The settings in a configuration, None for something else."""
    if isinstance(one, Setup):
        return one
    if isinstance(one, Mapping):
        return setup_in(cast("Mapping[Any, Any]", one), Path("the mapping"), processes=processes, vocabulary=vocabulary)
    if hasattr(one, "per_device_train_batch_size"):
        from bandpo.doctor.trl import setup_of

        return setup_of(one, vocabulary=vocabulary)
    return None


def _is_batch(one: object) -> bool:
    return isinstance(one, Mapping) and any(
        isinstance(value, Tensor | Stored) for value in cast("Mapping[Any, Any]", one).values()
    )


def _rows(rows: Iterable[Any]) -> Iterable[Mapping[str, Any]]:
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {i} of the log is a mapping from names to numbers, got {type(row).__name__}")
        yield cast("Mapping[str, Any]", row)
