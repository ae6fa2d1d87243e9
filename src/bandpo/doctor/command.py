"""`bandpo doctor`: reads files and prints the findings of the rules.

Every file may come from a stranger. The command reads regular files only and limits their size; it executes, imports and
downloads nothing that they name; and it prints none of their characters that a terminal would act on.
"""

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bandpo._system.errors import printable
from bandpo._system.files import read_yaml
from bandpo._system.jsonl import number_texts
from bandpo._system.secrets import redact_text
from bandpo.doctor.findings import Finding
from bandpo.doctor.hosts import host_of_keys, not_readable
from bandpo.doctor.symptoms import examine_log

if TYPE_CHECKING:  # a log needs no torch
    from bandpo.doctor.setup import Setup
    from bandpo.objective import Objective

_CONFIGS = (".yaml", ".yml", ".json", ".txt", ".sh", ".cfg", ".py", ".ipynb")
_BATCHES = (".safetensors", ".pt", ".npz", ".parquet")
_MAX_LOG_BYTES, _MAX_ROWS = 1 << 33, 2_000_000
_MAX_LINE_BYTES = 1 << 18  # bytes of a row of a log; a row of metrics has some thousand
_MAX_VALUES, _MAX_INNER = 5000, 100  # values in a row; lists and objects in a row
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
    for path in _expand(paths):
        if path.suffix in _CONFIGS:
            from bandpo.doctor.rules import examine_setup

            setup = read_config(path, overrides, processes=options.processes, vocabulary=options.vocabulary)
            objectives += [] if setup.objective is None else [setup.objective]
            sections.append((f"{path} ({setup.host})", examine_setup(setup)))
        elif path.suffix == ".jsonl":
            sections.append((str(path), examine_log(read_log(path))))
        else:
            from bandpo.doctor.batch import examine_batch, load_batch

            sections.append((str(path), examine_batch(load_batch(path), objectives=objectives, target=options.target)))
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
    """The settings in a configuration of TRL, verl or `bandpo train`, which are told apart by their keys.

    Args:
        path: The file.
        overrides: Settings `key=value`, which replace those of the file.
        processes: Number of processes that will train (TRL).
        vocabulary: Number of tokens in the model's vocabulary; None if it is not known.

    Raises:
        ValueError: If the file is none of these.
    """
    given = read_yaml(path, follow=False) if path.suffix in (".yaml", ".yml", ".json") else None
    from bandpo.doctor.trl_launch import with_overrides
    from bandpo.doctor.programs import read_program
    from bandpo.doctor.swift import is_swift, read_swift
    from bandpo.doctor.verl import is_verl, read_verl

    if given is None:
        found = read_program(path, overrides, processes=processes, vocabulary=vocabulary)
        return found or read_verl(path, overrides, vocabulary=vocabulary)
    if is_swift(given):
        return read_swift(with_overrides(given, overrides), vocabulary=vocabulary)
    if is_verl(given):
        return read_verl(path, overrides, tree=given, vocabulary=vocabulary)
    host = host_of_keys(given)
    if host:
        raise not_readable(path, host)
    from bandpo.doctor.trl import is_run, is_trl, read_trl

    if not is_trl(given):
        raise not_readable(path, "")
    given = with_overrides(given, overrides)
    if not is_run(given):
        return read_trl(given, processes=processes, vocabulary=vocabulary)
    from bandpo.train.config import check_run, run_keys

    return read_trl(check_run(given), run_keys=run_keys(), processes=processes, vocabulary=vocabulary)


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
        elif path.name == "training_args.bin":
            raise ValueError(
                f"{path} is a pickle, which could run code, and is not read; give the script or YAML of the run, or its "
                "GRPOConfig object in Python: bandpo.doctor.trl.setup_of(args)"
            )
        elif path.suffix not in (*_CONFIGS, *_BATCHES, ".jsonl"):
            raise ValueError(
                f"{path}: use {', '.join(_CONFIGS)} (configuration), .jsonl (log) or {', '.join(_BATCHES)} (batch)"
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
