"""`bandpo doctor`: reads files and prints the findings of the rules.

Every file may come from a stranger. The command reads regular files only and limits their size; it executes, imports and
downloads nothing that they name; and it prints none of their characters that a terminal would act on.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bandpo._system.errors import printable
from bandpo._system.files import read_yaml, write_text
from bandpo.doctor.hosts import not_readable
from bandpo.doctor.logs import KINDS, is_log, log_files, read_log, read_logs
from bandpo.doctor.output import Examined, as_json, as_page, as_text, exit_status, explained
from bandpo.monitoring.symptoms import examine_log

if TYPE_CHECKING:  # a log needs no torch
    from bandpo.doctor.setup import Setup
    from bandpo.objective import Objective

_CONFIGS = (".yaml", ".yml", ".toml", ".json", ".txt", ".sh", ".cfg", ".py", ".ipynb")
_BATCHES = (".safetensors", ".pt", ".npz", ".parquet")


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
    except BrokenPipeError:  # the reader of the output is gone, which is no mistake in a file
        raise
    except (ValueError, TypeError, OSError) as error:
        # A name with a line end must not look like a message of ours; the mistakes of a configuration have lines of their own.
        mistakes: list[str] = [printable(one) for one in getattr(error, "mistakes", (str(error),))]
        raise (type(error) if len(mistakes) > 1 else ValueError)(
            mistakes if len(mistakes) > 1 else mistakes[0]
        ) from None


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
    names = ("processes", "vocabulary", "target", "model", "run", "one_run")
    examined = examine_files(paths, overrides, **{name: getattr(options, name) for name in names})
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
    model: Path | None = None,
    run: str = "",
    one_run: bool = False,
) -> list[Examined]:
    """The findings for each file, or why it cannot be examined. The tokens of a batch are counted for the configurations too.

    Args:
        paths: Configurations, logs, batches, and folders of runs.
        overrides: Settings `key=value`, which replace those of the configurations.
        processes: Number of processes that will train.
        vocabulary: Number of tokens in the model's vocabulary; None if it is not known.
        target: Share of tokens that the radius recommended for a batch clips.
        model: Folder of a model that scores the tokens of batches again; None for none.
        run: The run to read from a log that has several; "" where it has one.
        one_run: Whether the logs are parts of one run.
    """
    examined: list[Examined] = []
    objectives: list[Objective] = []
    setups: list[Setup] = []

    def attempt(name: str, examine: Callable[[], Examined]) -> None:
        try:
            examined.append(examine())
        except (ValueError, TypeError, OSError) as error:
            examined.append(Examined(name, error=str(error)))

    def examine_config(path: Path) -> Examined:
        from bandpo.doctor.rules import examine_setup

        setup = read_config(path, overrides, processes=processes, vocabulary=vocabulary)
        objectives.extend([] if setup.objective is None else [setup.objective])
        setups.append(setup)
        return Examined(f"{path} ({setup.host})", tuple(examine_setup(setup)))

    def examine_tensors(path: Path) -> Examined:
        from bandpo.doctor.batch import column_names
        from bandpo.doctor.batch_files import columns_of
        from bandpo.doctor.scoring import examine_saved

        found = examine_saved(
            path,
            objectives=objectives,
            target=target,
            vocabulary=vocabulary,
            setup=setups[-1] if setups else None,
            model=model,
        )
        return Examined(str(path), (*found, columns_of(path, column_names())))

    def examine_logs(*logs: Path) -> Examined:
        rows = read_log(logs[0], run=run) if len(logs) == 1 else read_logs(logs, run=run)
        return Examined(" + ".join(map(str, logs)), tuple(examine_log(rows)))

    files, logs = list[Path](), list[Path]()
    for path in paths:
        try:
            files += _expand(path)
        except (ValueError, OSError) as error:
            examined.append(Examined(str(path), error=str(error)))
    for path in [*files]:
        try:
            if is_log(path):
                logs.append(path)
        except (ValueError, OSError) as error:
            examined.append(Examined(str(path), error=str(error)))
            files.remove(path)
    if one_run and len(logs) > 1:
        attempt(" + ".join(map(str, logs)), partial(examine_logs, *logs))
        files = [path for path in files if path not in logs]
    for path in files:
        kind = examine_logs if path in logs else examine_config if path.suffix in _CONFIGS else examine_tensors
        attempt(str(path), partial(kind, path))
    return examined


def read_config(
    path: Path, overrides: Sequence[str] = (), *, processes: int = 1, vocabulary: int | None = None
) -> "Setup":
    """The settings in a configuration of a host or of `bandpo train`, which are told apart by their keys.

    Args:
        path: The file.
        overrides: Settings `key=value`, which replace those of the file.
        processes: Number of processes that will train (TRL).
        vocabulary: Number of tokens in the model's vocabulary; None if it is not known.

    Raises:
        ValueError: If the file is none of these.
    """
    if path.suffix in (".yaml", ".yml", ".json"):
        return setup_in(read_yaml(path, follow=False), path, overrides, processes=processes, vocabulary=vocabulary)
    from bandpo.doctor.programs import read_program
    from bandpo.doctor.readers import read_launch

    found = read_program(path, overrides, processes=processes, vocabulary=vocabulary)
    return found or read_launch(path, overrides, vocabulary=vocabulary)


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
    from bandpo.doctor.readers import read_tree

    found = read_tree(path, given, overrides, vocabulary=vocabulary)
    if found is not None:
        return found
    from bandpo.doctor.trl import is_run, is_trl, read_trl
    from bandpo.doctor.trl_launch import with_overrides

    if not is_trl(given):
        raise not_readable(path, "")
    changed = with_overrides(given, overrides)
    if not is_run(changed):
        return read_trl(changed, processes=processes, vocabulary=vocabulary)
    from bandpo.train.config import check_run, run_keys

    return read_trl(check_run(changed), run_keys=run_keys(), processes=processes, vocabulary=vocabulary)


def _expand(path: Path) -> list[Path]:
    """The files to examine: a file itself, or those in the folder of a run.

    Raises:
        ValueError: If the file cannot be examined, or the folder is no run's.
    """
    if path.is_dir():
        inside = [
            path / name for name in ("config.yaml", "metrics.jsonl", "batch.safetensors") if (path / name).exists()
        ]
        if path / "metrics.jsonl" not in inside and log_files(path):
            inside.append(path)  # read_log finds its logs
        if not inside:
            raise ValueError(
                f"{path} has no config.yaml, metrics.jsonl, trainer_state.json, checkpoint, event file of TensorBoard or "
                "batch.safetensors: it is no run's folder"
            )
        return [p for p in inside if p.stat().st_size]
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.name == "training_args.bin":
        raise ValueError(
            f"{path} is a pickle, which could run code, and is not read; give the script or YAML of the run, or its "
            "GRPOConfig object in Python: bandpo.doctor.examine(args)"
        )
    if path.suffix not in (*_CONFIGS, *_BATCHES, ".jsonl") and not is_log(path):
        raise ValueError(
            f"{path}: use {', '.join(_CONFIGS)} (configuration), {KINDS} (log) or {', '.join(_BATCHES)} (batch)"
            + ("; a pickle runs code when it is read, and is not" if path.suffix in (".pkl", ".pickle") else "")
        )
    return [path]
