"""`bandpo doctor`: reads files and prints the findings of the rules.

Every file may come from a stranger. The command reads regular files only and limits their size; it executes, imports and
downloads nothing that they name; and it prints none of their characters that a terminal would act on.
"""

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bandpo._system.errors import printable
from bandpo._system.files import read_yaml
from bandpo._system.secrets import redact_text
from bandpo.doctor.findings import Finding
from bandpo.doctor.hosts import not_readable
from bandpo.doctor.logs import KINDS, is_log, log_files, read_log, read_logs
from bandpo.doctor.symptoms import examine_log

if TYPE_CHECKING:  # a log needs no torch
    from bandpo.doctor.setup import Setup
    from bandpo.objective import Objective

_CONFIGS = (".yaml", ".yml", ".toml", ".json", ".txt", ".sh", ".cfg", ".py", ".ipynb")
_BATCHES = (".safetensors", ".pt", ".npz", ".parquet")
_MARKS = {"ok": "ok", "note": "--", "warning": "??", "problem": "!!"}
_COLOURS = {"ok": "32", "note": "36", "warning": "33", "problem": "31"}


def doctor(options: argparse.Namespace) -> int:
    """Examine configurations, logs, batches and run folders.

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
    overrides = [str(p) for p in options.paths if "=" in str(p)]
    paths = [Path(p) for p in options.paths if "=" not in str(p)]
    if not paths:
        raise ValueError("nothing to examine: name a configuration, a run's folder, a metrics.jsonl or a saved batch")
    for name, value in (("processes", options.processes), ("vocabulary", options.vocabulary)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    sections: list[tuple[str, list[Finding]]] = []
    objectives: list[Objective] = []
    setup: Setup | None = None
    expanded = _expand(paths)
    logs = [path for path in expanded if is_log(path)]
    if options.one_run and len(logs) > 1:
        sections.append((" + ".join(map(str, logs)), examine_log(read_logs(logs, run=options.run))))
        expanded = [path for path in expanded if path not in logs]
    for path in expanded:
        if path in logs:
            sections.append((str(path), examine_log(read_log(path, run=options.run))))
        elif path.suffix in _CONFIGS:
            from bandpo.doctor.rules import examine_setup

            setup = read_config(path, overrides, processes=options.processes, vocabulary=options.vocabulary)
            objectives += [] if setup.objective is None else [setup.objective]
            sections.append((f"{path} ({setup.host})", examine_setup(setup)))
        else:
            from bandpo.doctor.batch import column_names
            from bandpo.doctor.batch_files import columns_of
            from bandpo.doctor.scoring import examine_saved

            found = examine_saved(
                path,
                objectives=objectives,
                target=options.target,
                vocabulary=options.vocabulary,
                setup=setup,
                model=options.model,
            )
            sections.append((str(path), [*found, columns_of(path, column_names())]))
    if overrides and not any(path.suffix in _CONFIGS for path in paths):
        raise ValueError(f"{overrides[0]}: overrides change a configuration, and none is given")
    if options.json:
        print(
            json.dumps(
                [{"file": _shown(name), "findings": [_plain(f) for f in found]} for name, found in sections], indent=1
            )
        )
    else:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print("\n\n".join(_section(name, found, colour=colour) for name, found in sections))
    return int(any(f.level == "problem" for _, found in sections for f in found))


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
    given = read_yaml(path, follow=False) if path.suffix in (".yaml", ".yml", ".json") else None
    from bandpo.doctor.programs import read_program
    from bandpo.doctor.readers import read_launch, read_tree
    from bandpo.doctor.trl_launch import with_overrides

    if given is None:
        found = read_program(path, overrides, processes=processes, vocabulary=vocabulary)
        return found or read_launch(path, overrides, vocabulary=vocabulary)
    found = read_tree(path, given, overrides, vocabulary=vocabulary)
    if found is not None:
        return found
    from bandpo.doctor.trl import is_run, is_trl, read_trl

    if not is_trl(given):
        raise not_readable(path, "")
    given = with_overrides(given, overrides)
    if not is_run(given):
        return read_trl(given, processes=processes, vocabulary=vocabulary)
    from bandpo.train.config import check_run, run_keys

    return read_trl(check_run(given), run_keys=run_keys(), processes=processes, vocabulary=vocabulary)


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
            if path / "metrics.jsonl" not in inside and log_files(path):
                inside.append(path)  # read_log finds its logs
            if not inside:
                raise ValueError(
                    f"{path} has no config.yaml, metrics.jsonl, trainer_state.json, checkpoint, event file of TensorBoard or "
                    "batch.safetensors: it is no run's folder"
                )
            found += [p for p in inside if p.stat().st_size]
        elif not path.exists():
            raise FileNotFoundError(f"{path}: no such file")
        elif path.name == "training_args.bin":
            raise ValueError(
                f"{path} is a pickle, which could run code, and is not read; give the script or YAML of the run, or its "
                "GRPOConfig object in Python: bandpo.doctor.trl.setup_of(args)"
            )
        elif path.suffix not in (*_CONFIGS, *_BATCHES, ".jsonl") and not is_log(path):
            raise ValueError(
                f"{path}: use {', '.join(_CONFIGS)} (configuration), {KINDS} (log) or {', '.join(_BATCHES)} (batch)"
                + ("; a pickle runs code when it is read, and is not" if path.suffix in (".pkl", ".pickle") else "")
            )
        else:
            found.append(path)
    return found


def _section(name: str, findings: Sequence[Finding], *, colour: bool) -> str:
    lines = [_shown(name)]
    for f in findings:
        mark = f"\x1b[{_COLOURS[f.level]}m{_MARKS[f.level]}\x1b[0m" if colour else _MARKS[f.level]
        lines.append(f" {mark} {_wrap(f'{f.rule}: {f.seen}')}")
        if f.cause:
            lines.append(f"      {_wrap(f'why: {f.cause}')}")
        if f.knob:
            lines.append(f"      {_wrap(f'set: {f.knob}')}")
        lines += [f"      {_shown(row)}" for row in f.details]
    counts = [
        f"{n} {level}{'s' if n > 1 else ''}" for level in ("problem", "warning") if (n := _count(findings, level))
    ]
    open_questions = sum(f.seen.startswith("not known") for f in findings)
    if open_questions:
        counts.append(f"{open_questions} {'rule' if open_questions == 1 else 'rules'} without an answer")
    return "\n".join([*lines, f"    {', '.join(counts) or 'nothing wrong found'}"])


def _plain(finding: Finding) -> dict[str, Any]:
    """A finding for JSON, with the same texts as on a terminal."""
    return {
        name: [_shown(row) for row in finding.details] if name == "details" else _shown(str(value))
        for name, value in asdict(finding).items()
    }


def _shown(text: str) -> str:
    """A text from a file, without secrets and without characters that a terminal would act on."""
    return printable(redact_text(text))


def _count(findings: Sequence[Finding], level: str) -> int:
    return sum(f.level == level for f in findings)


def _wrap(text: str) -> str:
    text = _shown(text)
    return textwrap.fill(text, 84, subsequent_indent=" " * 11, break_long_words=False, break_on_hyphens=False)
