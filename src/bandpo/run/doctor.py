"""`bandpo doctor`: reads what it is given, and prints what the rules say."""

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bandpo._files import read_jsonl, read_yaml
from bandpo.composition import Objective
from bandpo.doctor import Finding, Setup, examine_batch, examine_log, examine_setup
from bandpo.doctor.batch import load_batch
from bandpo.doctor.verl import is_verl, read_verl

_CONFIGS, _BATCHES = (".yaml", ".yml", ".txt", ".sh", ".cfg"), (".safetensors", ".pt", ".npz")
_MARKS = {"ok": "ok", "note": "--", "warning": "??", "problem": "!!"}
_COLOURS = {"ok": "32", "note": "36", "warning": "33", "problem": "31"}


def doctor(options: argparse.Namespace) -> int:
    """Examine configurations, logs, batches and run folders; 1 if there is a problem, else 0.

    Args:
        options: The options of `bandpo doctor`.
    """
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
            setup = read_config(path, overrides, processes=options.processes, vocabulary=options.vocabulary)
            objectives.append(setup.objective)
            sections.append((f"{path} ({setup.host})", examine_setup(setup)))
        elif path.suffix == ".jsonl":
            sections.append((str(path), examine_log(read_jsonl(path))))
        else:
            sections.append((str(path), examine_batch(load_batch(path), objectives=objectives, target=options.target)))
    if overrides and not any(path.suffix in _CONFIGS for path in paths):
        raise ValueError(f"{overrides[0]}: overrides change a configuration, and none is given")
    if options.json:
        print(
            json.dumps([{"file": name, "findings": [asdict(f) for f in found]} for name, found in sections], indent=1)
        )
    else:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print("\n\n".join(_section(name, found, colour=colour) for name, found in sections))
    return int(any(f.level == "problem" for _, found in sections for f in found))


def read_config(
    path: Path, overrides: Sequence[str] = (), *, processes: int = 1, vocabulary: int | None = None
) -> Setup:
    """The settings in a configuration of TRL, verl or `bandpo train`; what is in it tells which.

    Args:
        path: The file.
        overrides: `key=value`, which win.
        processes: That will train (TRL).
        vocabulary: Of the model.
    """
    if path.suffix not in (".yaml", ".yml"):
        return read_verl(path, overrides, vocabulary=vocabulary)
    given = read_yaml(path)
    if is_verl(given):
        return read_verl(path, overrides, vocabulary=vocabulary)
    from bandpo.run.progress import quiet_hosts

    quiet_hosts()
    from bandpo.doctor.trl import read_trl
    from bandpo.run.config import check_run, read_value, run_keys

    for override in overrides:
        key, _, value = override.partition("=")
        given[key] = read_value(key, value)
    keys = run_keys()
    if set(given) & keys:
        given = check_run(given)
    return read_trl(given, other_keys=keys, processes=processes, vocabulary=vocabulary)


def _expand(paths: Sequence[Path]) -> list[Path]:
    """Folders of runs as the files in them; what cannot be examined is refused."""
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


def _section(name: str, findings: Sequence[Finding], *, colour: bool) -> str:
    lines = [name]
    for f in findings:
        mark = f"\x1b[{_COLOURS[f.level]}m{_MARKS[f.level]}\x1b[0m" if colour else _MARKS[f.level]
        lines.append(f" {mark} {_wrap(f'{f.rule}: {f.seen}')}")
        if f.cause:
            lines.append(f"      {_wrap(f'why: {f.cause}')}")
        if f.knob:
            lines.append(f"      {_wrap(f'set: {f.knob}')}")
        lines += [f"      {row}" for row in f.details]
    counts = [
        f"{n} {level}{'s' if n > 1 else ''}" for level in ("problem", "warning") if (n := _count(findings, level))
    ]
    return "\n".join([*lines, f"    {', '.join(counts) or 'nothing wrong found'}"])


def _count(findings: Sequence[Finding], level: str) -> int:
    return sum(f.level == level for f in findings)


def _wrap(text: str) -> str:
    return textwrap.fill(text, 84, subsequent_indent=" " * 11, break_long_words=False, break_on_hyphens=False)
