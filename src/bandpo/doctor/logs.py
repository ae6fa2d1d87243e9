"""Finds and reads the logs of a run, whatever wrote them.

Each kind of file has its reader in `log_lines`, `log_events` or `log_tables`.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from bandpo._system.bounded import open_regular
from bandpo.doctor.log_events import event_rows
from bandpo.doctor.log_lines import console_rows, csv_rows, is_console, json_rows
from bandpo.doctor.log_tables import json_table_rows, parquet_names, parquet_rows, trackio_rows
from bandpo.monitoring.log_rows import LogRows, Row
from bandpo.monitoring.names import TENSORS

KINDS = ".jsonl, .json, .csv, .parquet, .log, .out, trackio's .db, TensorBoard's events.out.tfevents.*"
"""The files that are read as logs, for messages."""
_MAX_LOG_BYTES = 1 << 33
_HEAD = 1 << 22  # bytes by which two kinds of file with the same ending are told apart
_MOST_ENTRIES = 10_000  # of a folder
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,15})")
_OF_SWIFT = b'"rlhf_type"'  # args.json, the configuration that ms-swift writes
_OF_A_BATCH = re.compile(
    "|".join(
        f'"{re.escape(name)}": ?\\['
        for ours, theirs in TENSORS.items()
        if ours.endswith("logprobs")
        for name in (ours, *theirs.values())
    ).encode()
)


def read_log(path: Path, *, run: str = "") -> LogRows:
    r"""The rows of a log, one at a time; numbers are texts of type bytes where the file has texts (`number_texts`).

    Args:
        path: A file of one of `KINDS`, a text that a run printed, or the folder of a run.
        run: The run to read, from a file with several: a table from W&B's page, or trackio's database.

    Raises:
        ValueError: If the file is not such a log, or is too large. What is wrong within a file is raised when its rows are
            read.

    Examples:
        >>> import json, tempfile
        >>> path = Path(tempfile.mkdtemp()) / "run.jsonl"
        >>> _ = path.write_text(json.dumps({"step": 1, "data": {"actor/entropy": 0.5}}) + "\n")
        >>> [row["actor/entropy"] for row in read_log(path)]
        [b'0.5']
    """
    if path.is_dir():
        files = log_files(path)
        if not files:
            raise ValueError(f"{path} has no log: no metrics.jsonl, trainer_state.json, checkpoint or event file")
        return read_logs(files, name=str(path), run=run)
    if path.lstat().st_size > _MAX_LOG_BYTES:
        raise ValueError(f"{path} is too large: it has more than {_MAX_LOG_BYTES:,} bytes")
    kind, read = _reader(path, run)
    return LogRows(str(path), kind, partial(read, path))


def read_logs(paths: Sequence[Path], *, name: str = "", run: str = "") -> LogRows:
    """The rows of several logs of one run, one after the other.

    Where they have the same steps, the later file counts (see `Log`).

    Args:
        paths: The files, in the order in which they were written.
        name: A name for all of them, for messages.
        run: The run to read, as in `read_log`.

    Raises:
        ValueError: As in `read_log`.
    """
    logs = [read_log(path, run=run) for path in paths]
    if len(logs) == 1:
        return logs[0]

    def rows(said: list[str]) -> Iterator[Row]:
        said.append(f"{len(logs)} files are read as one run: {_listed([path.name for path in paths])}")
        for path, log in zip(paths, logs, strict=True):
            yield from log
            said += [f"{path.name}: {note}" for note in log.said]
            joined.part += 1

    joined = LogRows(name or f"{paths[0]} and {len(paths) - 1} more", logs[0].kind, rows)
    return joined


def is_log(path: Path) -> bool:
    """Whether a file is read as a log, by its name, and by its content where batches or scripts have the same ending.

    Args:
        path: A file, or a folder.

    Raises:
        ValueError: If the content has to be looked at, and cannot be read.
    """
    if path.is_dir():
        return bool(log_files(path))
    if path.suffix == ".parquet":
        batch = {name for ours, theirs in TENSORS.items() for name in (ours, *theirs.values())} - {"kl"}
        try:
            return not batch.intersection(parquet_names(path))
        except ValueError:  # the reader of batches says what is wrong
            return False
    if path.suffix in (".jsonl", ".ndjson"):
        return not _OF_A_BATCH.search(_head(path).partition(b"\n")[0])
    if path.suffix == ".txt":
        return is_console(_head(path))
    if path.suffix == ".json":
        return _OF_SWIFT not in _head(path)
    return path.suffix in (".csv", ".log", ".out", ".db", ".sqlite") or "tfevents" in path.name


def log_files(folder: Path) -> list[Path]:
    """The logs of the run in a folder.

    These are the first that exists of metrics.jsonl (ms-swift: logging.jsonl), the trainer state of transformers, that of its
    newest checkpoint, and TensorBoard's event files.

    Args:
        folder: The folder of a run, its checkpoint, or a folder of event files.
    """
    for name in ("metrics.jsonl", "logging.jsonl", "trainer_state.json"):
        if (folder / name).is_file():
            return [folder / name]
    inside = _entries(folder)
    steps = {int(found[1]): path for path in inside if (found := _CHECKPOINT.fullmatch(path.name))}
    states = [steps[step] / "trainer_state.json" for step in sorted(steps, reverse=True)]
    whole = next((state for state in states if state.is_file()), None)
    if whole is not None:
        return [whole]
    places = [
        folder,
        *(path for name in ("runs", "tensorboard", "tensorboard_log") for path in _entries(folder / name)),
    ]
    events = [path for place in places for path in _entries(place) if "tfevents" in path.name]
    return sorted(events, key=lambda path: path.name)


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, without links; nothing for another path."""
    if not folder.is_dir() or folder.is_symlink():
        return []
    with os.scandir(folder) as entries:
        found = [folder / entry.name for entry in islice(entries, _MOST_ENTRIES) if not entry.is_symlink()]
    return sorted(found)


def _reader(path: Path, run: str) -> tuple[str, Callable[[Path, list[str]], Iterator[Row]]]:
    """What a file is, and how it is read."""
    if "tfevents" in path.name:
        return "TensorBoard's events", event_rows
    if path.suffix == ".json":
        first, _, rest = _head(path).partition(b"\n")
        several = first.strip().startswith(b"{") and first.strip().endswith(b"}") and rest.lstrip().startswith(b"{")
        return ("JSON lines", json_rows) if several else ("JSON", json_table_rows)
    readers: dict[str, tuple[str, Callable[[Path, list[str]], Iterator[Row]]]] = {
        ".jsonl": ("JSON lines", json_rows),
        ".ndjson": ("JSON lines", json_rows),
        ".csv": ("CSV", partial(csv_rows, run=run)),
        ".parquet": ("Parquet", parquet_rows),
        ".db": ("trackio's database", partial(trackio_rows, run=run)),
        ".sqlite": ("trackio's database", partial(trackio_rows, run=run)),
        ".log": ("console", console_rows),
        ".out": ("console", console_rows),
        ".txt": ("console", console_rows),
    }
    if path.suffix not in readers:
        raise ValueError(f"{path} is no log: the doctor reads {KINDS}, and .txt with the console of a run")
    return readers[path.suffix]


def _head(path: Path) -> bytes:
    with os.fdopen(open_regular(path, follow=False), "rb") as file:
        return file.read(_HEAD)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
