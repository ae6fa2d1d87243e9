"""`bandpo doctor`: reads files and prints the findings of the rules.

Every file may come from a stranger. The command reads regular files only and limits their size; it executes, imports and
downloads nothing that they name; and it prints none of their characters that a terminal would act on.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bandpo._system.bounded import parse_yaml
from bandpo._system.errors import printable
from bandpo._system.files import read_yaml, write_text
from bandpo._system.jsonl import number_texts
from bandpo.doctor.findings import Finding
from bandpo.doctor.hosts import host_of_keys, not_readable
from bandpo.doctor.output import Examined, as_json, as_page, as_text, exit_status, explained
from bandpo.doctor.symptoms import examine_log

if TYPE_CHECKING:  # a log needs no torch
    from bandpo.doctor.setup import Setup
    from bandpo.objective import Objective

_CONFIGS, _BATCHES = (".yaml", ".yml", ".txt", ".sh", ".cfg"), (".safetensors", ".pt", ".npz", ".parquet")
_MAX_LOG_BYTES, _MAX_ROWS = 1 << 33, 2_000_000
_MAX_LINE_BYTES = 1 << 18  # bytes of a row of a log; a row of metrics has some thousand
_MAX_VALUES, _MAX_INNER = 5000, 100  # values in a row; lists and objects in a row


def doctor(options: argparse.Namespace) -> int:
    """Examine configurations, logs, batches and run folders.

    A file that cannot be examined does not keep the others from it: their findings are printed, and the status is 2.

    Args:
        options: The options of `bandpo doctor`.

    Returns:
        The exit status: 1 if there is a problem, else 0.

    Raises:
        ValueError: If a file cannot be read or examined; the command then ends with status 2.
    """
    try:
        return _doctor(options)
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(printable(str(error))) from None


def _doctor(options: argparse.Namespace) -> int:
    if options.explain is not None:
        print(explained(options.explain, width=min(shutil.get_terminal_size((90, 24)).columns, 120)))
        return 0
    overrides = [str(p) for p in options.paths if "=" in str(p)]
    paths = [Path(p) for p in options.paths if "=" not in str(p)]
    if not paths:
        raise ValueError("nothing to examine: name a configuration, a run's folder, a metrics.jsonl or a saved batch")
    for name, value in (("processes", options.processes), ("vocabulary", options.vocabulary)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if overrides and not any(path.suffix in _CONFIGS for path in paths):
        raise ValueError(f"{overrides[0]}: overrides change a configuration, and none is given")
    if options.html is not None and options.html.is_dir():
        raise ValueError(f"--html: {options.html} is a folder; name a file")
    examined = examine_files(
        paths, overrides, processes=options.processes, vocabulary=options.vocabulary, target=options.target
    )
    if options.html is not None:
        write_text(options.html, as_page(examined))
    if options.json:
        print(as_json(examined))
    elif text := as_text(examined, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ):
        print(text)
    if errors := [one.error for one in examined if one.error]:
        sys.stdout.flush()
        raise ValueError("; ".join(errors))
    return exit_status(examined)


def examine_files(
    paths: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    processes: int = 1,
    vocabulary: int | None = None,
    target: float = 0.01,
) -> list[Examined]:
    """The findings for each file, or why it cannot be examined. The tokens of a batch are counted for the configurations too.

    Args:
        paths: Configurations, logs, batches, and folders of runs.
        overrides: Settings `key=value`, which replace those of the configurations.
        processes: Number of processes that will train.
        vocabulary: Number of tokens in the model's vocabulary; None if it is not known.
        target: Share of tokens that the radius recommended for a batch clips.
    """
    examined: list[Examined] = []
    objectives: list[Objective] = []

    def attempt(path: Path, run: Callable[[], Iterable[Examined]]) -> None:
        try:
            examined.extend(run())
        except (ValueError, TypeError, OSError) as error:
            examined.append(Examined(str(path), error=str(error)))

    def examine_one(path: Path) -> Iterable[Examined]:
        name, findings = str(path), list[Finding]()
        if path.suffix in _CONFIGS:
            from bandpo.doctor.rules import examine_setup

            setup = read_config(path, overrides, processes=processes, vocabulary=vocabulary)
            objectives.extend([] if setup.objective is None else [setup.objective])
            name, findings = f"{path} ({setup.host})", examine_setup(setup)
        elif path.suffix == ".jsonl":
            findings = examine_log(read_log(path))
        else:
            from bandpo.doctor.batch import examine_batch, load_batch

            findings = examine_batch(load_batch(path), objectives=objectives, target=target)
        yield Examined(name, tuple(findings))

    def examine_path(path: Path) -> Iterable[Examined]:
        for file in _expand([path]):
            attempt(file, partial(examine_one, file))
        return ()

    for path in paths:
        attempt(path, partial(examine_path, path))
    return examined


def read_config(
    path: Path, overrides: Sequence[str] = (), *, processes: int = 1, vocabulary: int | None = None
) -> "Setup":
    """The settings in a configuration of TRL, verl or `bandpo train`, which are told apart by their keys.

    Args:
        path: The file.
        overrides: Settings `key=value`, which replace those of the file.
        processes: Number of processes that will train (TRL).
        vocabulary: Number of tokens in the model's vocabulary; None if it is not known.

    Raises:
        ValueError: If the file is none of these.
    """
    if path.suffix in (".yaml", ".yml"):
        return setup_in(read_yaml(path, follow=False), path, overrides, processes=processes, vocabulary=vocabulary)
    from bandpo.doctor.verl import read_verl

    return read_verl(path, overrides, vocabulary=vocabulary)


def setup_in(
    given: Mapping[Any, Any],
    path: Path,
    overrides: Sequence[str] = (),
    *,
    processes: int = 1,
    vocabulary: int | None = None,
) -> "Setup":
    """The settings in the keys and values of a configuration.

    Args:
        given: The keys and values.
        path: Where they are from, for messages and for files that they name.
        overrides: Settings `key=value`, which replace those given.
        processes: Number of processes that will train (TRL).
        vocabulary: Number of tokens in the model's vocabulary; None if it is not known.

    Raises:
        ValueError: If they belong to no host that the doctor can read.
    """
    from bandpo.doctor.verl import is_verl, read_verl

    if is_verl(given):
        return read_verl(path, overrides, tree=given, vocabulary=vocabulary)
    host = host_of_keys(given)
    if host:
        raise not_readable(path, host)
    from bandpo.doctor.trl import is_run, is_trl, read_trl

    if not is_trl(given):
        raise not_readable(path, "")
    changed = dict(given)
    for override in overrides:
        key, _, value = override.partition("=")
        changed[key] = parse_yaml(value, override)
    if not is_run(changed):
        return read_trl(changed, processes=processes, vocabulary=vocabulary)
    from bandpo.train.config import check_run, run_keys

    return read_trl(check_run(changed), run_keys=run_keys(), processes=processes, vocabulary=vocabulary)


def read_log(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a log, one at a time; their numbers are texts (`number_texts`), of which the rules read those they need.

    A last line without a line break is left out, because it may be incomplete.

    Args:
        path: A JSONL file.

    Raises:
        ValueError: If a line is not a JSON object, or the file is larger than a log of metrics.
    """
    if path.lstat().st_size > _MAX_LOG_BYTES:
        raise ValueError(f"{path} is too large: it has more than {_MAX_LOG_BYTES:,} bytes")
    rows = number_texts(path, follow=False, longest=_MAX_LINE_BYTES, is_row=_may_be_metrics)
    for count, row in enumerate(rows):
        if count == _MAX_ROWS:
            raise ValueError(f"{path} has more than {_MAX_ROWS:,} rows; examine its end: tail -n 1000000")
        yield row


def _may_be_metrics(line: bytes) -> bool:
    """Whether a line has no more values, and no more lists and objects, than a row of metrics may have."""
    values = line.count(b",") if len(line) > _MAX_VALUES else 0
    return values <= _MAX_VALUES and line.count(b"[") + line.count(b"{") <= _MAX_INNER


def _expand(paths: Sequence[Path]) -> list[Path]:
    """The files to examine, with folders of runs replaced by the files in them.

    Raises:
        ValueError: If a file cannot be examined.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [
                path / name for name in ("config.yaml", "metrics.jsonl", "batch.safetensors") if (path / name).exists()
            ]
            if not inside:
                raise ValueError(
                    f"{path} has no config.yaml, metrics.jsonl or batch.safetensors: it is no run's folder"
                )
            found += [p for p in inside if p.stat().st_size]
        elif not path.exists():
            raise FileNotFoundError(f"{path}: no such file")
        elif path.suffix not in (*_CONFIGS, *_BATCHES, ".jsonl"):
            raise ValueError(
                f"{path}: use {', '.join(_CONFIGS)} (configuration), .jsonl (log) or {', '.join(_BATCHES)} (batch)"
            )
        else:
            found.append(path)
    return found
