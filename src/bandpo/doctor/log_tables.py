"""Reads logs that are tables in one file: trainer states of transformers, W&B's JSON and Parquet, databases of trackio."""

import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from bandpo._system.bounded import open_regular, parse_json, read_regular
from bandpo.doctor.log_lines import choose, may_be_metrics
from bandpo.monitoring.log_rows import MAX_LINE_BYTES, MAX_VALUES, Row

_MOST_JSON, _MOST_COMMAS, _MOST_OBJECTS = 1 << 27, 8_000_000, 1_000_000
_MOST_PARQUET, _MOST_GROWTH = 1 << 30, 50  # times that a Parquet file may grow when it is unpacked
_SMALL = 1 << 20  # values that a Parquet file may have, however small it is
_CELLS = 1 << 18  # of a Parquet file that are read at a time
_MOST_COPIED = 1 << 28  # bytes of a database that is copied to read what its run has not merged into it yet
_STEPS, _MOST_STEPS = 1_000_000, 2000  # instructions of SQLite between two looks, and looks, before a query is given up
_MOST_RUNS = 10_000


def json_table_rows(path: Path, said: list[str]) -> Iterator[Row]:
    """The rows of a JSON file: `log_history` of a `trainer_state.json`, a list of rows, or an object of columns.

    Args:
        path: The file.
        said: Notes about the file are appended to it.

    Raises:
        ValueError: If the file is none of these, or too large.
    """
    data = read_regular(path, _MOST_JSON, follow=False)
    if data.count(b",") > _MOST_COMMAS or data.count(b"{") + data.count(b"[") > _MOST_OBJECTS:
        raise ValueError(f"{path} has more values than a log of metrics")
    found = parse_json(data, str(path))
    del data
    if isinstance(found, dict):
        given = cast("dict[str, Any]", found)
        found = given["log_history"] if "log_history" in given else _of_columns(given)
    if not isinstance(found, list):
        raise ValueError(f"{path} is no log: it has no log_history, no list of rows, and no columns")
    rows = [cast("dict[str, Any]", row) for row in cast("list[Any]", found) if isinstance(row, dict)]
    if len(rows) < len(cast("list[Any]", found)):
        said.append(f"{len(cast('list[Any]', found)) - len(rows)} of its rows are no objects, and are left out")
    yield from rows


def _of_columns(given: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of an object whose values are lists, or objects with the numbers of the rows, as pandas writes it."""
    columns = {
        name: list(cast("dict[str, Any]", column).values()) if isinstance(column, dict) else cast("list[Any]", column)
        for name, column in given.items()
        if isinstance(column, dict | list)
    }
    lengths = {len(column) for column in columns.values()}
    if len(lengths) != 1 or not columns:
        return None
    return [{name: column[i] for name, column in columns.items()} for i in range(lengths.pop())]


def parquet_names(path: Path) -> list[str]:
    """The columns of a Parquet file.

    Args:
        path: The file.

    Raises:
        ValueError: If it cannot be read.
        ImportError: If pyarrow is not installed.
    """
    with _parquet(path) as table:
        return list(table.schema_arrow.names)


def parquet_rows(path: Path, said: list[str]) -> Iterator[Row]:
    """The rows of a Parquet file with a column for each metric, as W&B exports a run.

    Args:
        path: The file.
        said: Columns that are not read are appended to it.

    Raises:
        ValueError: If it cannot be read, or unpacks to more than such a file has.
        ImportError: If pyarrow is not installed.
    """
    with _parquet(path) as table:
        names, types = table.schema_arrow.names, table.schema_arrow.types
        if len(names) > MAX_VALUES:
            raise ValueError(f"{path} has more than {MAX_VALUES:,} columns")
        numbers = [name for name, kind in zip(names, types, strict=True) if _is_number(str(kind))]
        if len(numbers) < len(names):
            said.append(f"{len(names) - len(numbers)} of its columns are not numbers, and are not read")
        allowed = max(_SMALL, _MOST_GROWTH * path.stat().st_size)
        if table.metadata.num_rows * len(numbers) > allowed:
            raise ValueError(f"{path} has more than {allowed:,} values")
        for part in table.iter_batches(batch_size=max(1, _CELLS // max(1, len(numbers))), columns=numbers):
            yield from cast("list[dict[str, Any]]", part.to_pylist())


def _is_number(kind: str) -> bool:
    return kind.startswith(("int", "uint", "float", "double", "halffloat", "string", "large_string"))


@contextmanager
def _parquet(path: Path) -> Generator[Any]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError(f"Parquet files need pyarrow: pip install 'bandpo[trl]' ({error})") from None
    with os.fdopen(open_regular(path, follow=False), "rb") as file:
        if os.fstat(file.fileno()).st_size > _MOST_PARQUET:
            raise ValueError(f"{path} is too large: it has more than {_MOST_PARQUET:,} bytes")
        try:
            yield parquet.ParquetFile(file)
        except (OSError, ValueError, MemoryError, TypeError, KeyError) as error:  # pyarrow's own errors are among these
            message = " ".join(str(error).split())[:200]
            raise ValueError(
                message if str(path) in message else f"{path} cannot be read as Parquet: {message}"
            ) from None


def trackio_rows(path: Path, said: list[str], run: str = "") -> Iterator[Row]:
    """The rows of a run in trackio's database; those of the newest run, if none is chosen.

    The database is opened so that SQLite neither writes nor locks. What a run has written to the file `-wal` beside it is
    read from a copy.

    Args:
        path: The database of a project.
        said: Notes about the file are appended to it.
        run: Name of the run to read.

    Raises:
        ValueError: If it is not such a database, or has no such run.
    """
    try:
        with _copied(path, said) as place, closing(_connect(place)) as database:
            columns = [row[1] for row in database.execute("PRAGMA table_info(metrics)")]
            [made] = database.execute("SELECT sql FROM sqlite_master WHERE name = 'metrics'").fetchone() or [""]
            if not str(made).upper().startswith("CREATE TABLE") or not {"run_name", "step", "metrics"} <= set(columns):
                raise ValueError(
                    f"{path} is not a database of trackio: it has no table metrics with run_name, step, metrics"
                )
            _guard(database)
            key = "run_id" if "run_id" in columns else "run_name"
            yield from _metrics(database, path, key, said, run)
    except (sqlite3.Error, OverflowError) as error:
        raise ValueError(
            f"{path} cannot be read as a database of trackio: {' '.join(str(error).split())[:200]}"
        ) from None


def _metrics(database: sqlite3.Connection, path: Path, key: str, said: list[str], run: str) -> Iterator[Row]:
    latest: dict[Any, tuple[str, int]] = {}  # of each run, its name and its last row
    for number, identity, name in database.execute(f"SELECT id, {key}, run_name FROM metrics ORDER BY id"):
        latest[identity] = (str(name), number)
        if len(latest) > _MOST_RUNS:
            raise ValueError(f"{path} has more than {_MOST_RUNS:,} runs")
    if not latest:
        raise ValueError(f"{path} has no metrics")
    newest = max(latest, key=lambda identity: latest[identity][1])
    if run:
        choose(run, list(dict.fromkeys(name for name, _ in latest.values())), path)
        newest = max((i for i in latest if latest[i][0] == run), key=lambda identity: latest[identity][1])
    elif len(latest) > 1:
        said.append(f"it has {len(latest)} runs; the newest, {latest[newest][0]}, is read; --run chooses another")
    query = f"SELECT step, metrics FROM metrics WHERE {key} IS ? ORDER BY id"
    for step, text in database.execute(query, (newest,)):
        if not isinstance(text, str | bytes) or len(text) > MAX_LINE_BYTES:
            raise ValueError(
                f"{path} has a row of metrics that is no text, or has more than {MAX_LINE_BYTES:,} characters"
            )
        line = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
        row = parse_json(line, f"{path}, step {step}") if may_be_metrics(line) else None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, step {step}: a row of metrics is an object like {{...}}")
        yield {**cast("dict[str, Any]", row), "step": step}


def _connect(path: Path) -> sqlite3.Connection:
    """A connection that cannot write, for a file whose schema and texts may be a stranger's."""
    database = sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1", uri=True)
    looks = [0]

    def look() -> int:
        looks[0] += 1
        return looks[0] > _MOST_STEPS

    database.set_progress_handler(look, _STEPS)
    if sys.version_info >= (3, 11):
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 4 * MAX_LINE_BYTES)
    for pragma in ("query_only=ON", "trusted_schema=OFF", "cell_size_check=ON", "mmap_size=0"):
        database.execute(f"PRAGMA {pragma}")
    return database


def _guard(database: sqlite3.Connection) -> None:
    """From here on only columns of the table `metrics` may be read: no function, no view, no other table."""
    allowed = {sqlite3.SQLITE_SELECT: None, sqlite3.SQLITE_READ: "metrics"}

    def decide(action: int, first: str | None, *_: object) -> int:
        right = action in allowed and (allowed[action] is None or allowed[action] == first)
        return sqlite3.SQLITE_OK if right else sqlite3.SQLITE_DENY

    database.set_authorizer(decide)


@contextmanager
def _copied(path: Path, said: list[str]) -> Generator[Path]:
    """The database, or a copy of it together with its `-wal` if that has something."""
    with os.fdopen(open_regular(path, follow=False), "rb") as file:
        if file.read(16) != b"SQLite format 3\0":
            raise ValueError(f"{path} is not a database of SQLite")
    beside = path.with_name(f"{path.name}-wal")
    waiting = beside.lstat().st_size if beside.is_file() and not beside.is_symlink() else 0
    if not waiting:
        yield path
    elif waiting + path.stat().st_size > _MOST_COPIED:
        said.append(f"what its run has not merged into it yet ({waiting:,} bytes in {beside.name}) is not read")
        yield path
    else:
        with tempfile.TemporaryDirectory(prefix="bandpo-doctor-") as folder:
            copies = [Path(folder) / "copy.db", Path(folder) / "copy.db-wal"]
            _copy((path, beside), copies)
            with closing(sqlite3.connect(copies[0])) as database:  # merges the -wal
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            yield copies[0]


def _copy(sources: Sequence[Path], copies: Sequence[Path]) -> None:
    """Copy files that belong together; again, if one changed meanwhile."""
    for _ in range(3):
        before = [os.stat(source).st_mtime_ns for source in sources]
        for source, copy in zip(sources, copies, strict=True):
            with os.fdopen(open_regular(source, follow=False), "rb") as file, copy.open("wb") as out:
                shutil.copyfileobj(file, out)
        if before == [os.stat(source).st_mtime_ns for source in sources]:
            return
    raise ValueError(f"{sources[0]} changes while it is read; try again")
