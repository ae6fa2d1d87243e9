"""Reads the tensors of a saved batch, a part at a time where the format allows it.

A saved batch may be a stranger's file: time and memory to read it depend on its size, not on what its header says. The memory
for a .safetensors file is bounded, whatever the size.
"""

import io
import itertools
import math
import os
import pickletools
import weakref
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bandpo._system.bounded import open_regular, parse_json
from bandpo.monitoring.findings import Finding

SMALL = 1 << 20
"""Numbers that a tensor may have even if the file contains fewer."""

_SHOWN = 12  # names of columns in a line
_MAX_HEADER = 1 << 18  # bytes; that of a batch has some hundred
_MOST_COMPRESSED = 50  # times that a file may grow when it is unpacked
_ROWS = 4096  # rows of a Parquet file that are read at a time
_MAPPED = 1 << 28  # bytes from which a .pt file is mapped into memory instead of read
# What torch.save writes for a dict of tensors.
_GLOBALS = frozenset({"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch Size"})
_OPCODES_WITHOUT_GLOBALS = frozenset(
    {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD", "EXT1", "EXT2", "EXT4"}
)
_LONGEST_LINE, _MOST_LISTS = 1 << 24, 1000  # bytes and lists of a line of JSON
SAVE = "save the tensors alone: torch.save({'logprobs': ..., 'old_logprobs': ..., 'advantages': ...}, 'batch.pt')"
"""What to do with a file that holds objects."""
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip


class Stored:
    """A tensor in a file, of which parts can be read.

    Args:
        file: The open file.
        place: Where its numbers begin in the file.
        dtype: Their dtype.
        shape: Their shape.
    """

    def __init__(self, file: "_File", place: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.file, self.place, self.dtype, self.shape = file, place, dtype, torch.Size(shape)
        self.ndim = len(shape)

    def unsqueeze(self, dim: int) -> "Stored":
        """The same numbers with another dimension of size 1.

        Args:
            dim: -1, at the end.
        """
        assert dim == -1
        return Stored(self.file, self.place, self.dtype, (*self.shape, 1))

    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def flat(self, start: int, stop: int) -> Tensor:
        """The numbers from one to another place of the flattened tensor.

        Args:
            start: The first number.
            stop: The number after the last one.

        Raises:
            ValueError: If the file has become shorter.
        """
        dtype = torch.uint8 if self.dtype == torch.bool else self.dtype
        data = self.file.read(self.place + start * dtype.itemsize, (stop - start) * dtype.itemsize)
        found = torch.frombuffer(data, dtype=dtype)
        return found != 0 if self.dtype == torch.bool else found


class _File:
    """A regular file that stays open as long as a tensor in it is used."""

    def __init__(self, path: Path) -> None:
        descriptor = open_regular(path, follow=False)
        weakref.finalize(self, os.close, descriptor)
        self.path = path
        self.size = os.fstat(descriptor).st_size
        self.raw = io.FileIO(descriptor, closefd=False)

    def read(self, place: int, size: int) -> bytearray:
        data = bytearray(size)
        self.raw.seek(place)
        filled, view = 0, memoryview(data)
        while filled < size:
            count = self.raw.readinto(view[filled:])
            if not count:
                raise ValueError(f"{self.path} became shorter while it was read")
            filled += count
        return data


def read_tensors(path: Path, names: frozenset[str]) -> Mapping[str, Tensor | Stored]:
    """The tensors of a file by their names. Nothing in it is executed.

    Args:
        path: A file .safetensors, .pt (a dict of tensors), .npz or .parquet.
        names: The names that are looked for; others may be left out.

    Raises:
        ValueError: If it cannot be read.
    """
    found = _read(path, names)
    masks = [found[name].shape for name in ("loss_mask", "response_mask") if name in found]
    if len(masks) == 2 and masks[0] == masks[1]:  # the loss mask leaves out what tools returned
        return {name: value for name, value in found.items() if name != "response_mask"}
    return found


def names_in(path: Path) -> tuple[str, ...]:
    """The names of all tensors and columns of a file, whatever they hold.

    Args:
        path: As in `read_tensors`.

    Raises:
        ValueError: If it cannot be read.
    """
    return tuple(_read(path, None))


def columns_of(path: Path, looked_at: Collection[str]) -> Finding:
    """Which tensors of a file are looked at, and which are not.

    Args:
        path: As in `read_tensors`.
        looked_at: Every name that is.

    Raises:
        ValueError: If the file cannot be read.
    """
    names = names_in(path)
    known = [name for name in names if name in looked_at]
    others = [name for name in names if name not in looked_at]
    more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    return Finding(
        "columns",
        "note",
        f"{len(known)} of {len(names)} columns looked at: {', '.join(known)}"
        + (f"; not {', '.join(name[:80] for name in others[:_SHOWN])}{more}" if others else ""),
        numbers={"understood": len(known), "others": len(others)},
    )


def _read(path: Path, names: frozenset[str] | None) -> Mapping[str, Any]:
    """The tensors of these names; for None, all names with whatever is at hand for each."""
    if path.suffix not in FORMATS:
        advice = f"; {_PICKLED}" if path.suffix in (".pkl", ".pickle") else ""
        raise ValueError(f"{path}: a batch ends in {', '.join(FORMATS)}{advice}")
    read, limit = FORMATS[path.suffix]
    file = _File(path)
    if file.size > limit:
        raise ValueError(f"{path} is too large: it has more than {limit:,} bytes")
    try:
        return read(file, names)
    except (Exception, RecursionError, MemoryError) as error:  # each format has its own
        message = " ".join(str(error).split())[:400] or type(error).__name__
        raise ValueError(f"{path} cannot be read as a batch: {message}") from None


def _read_safetensors(file: _File, names: frozenset[str] | None) -> Mapping[str, Any]:
    """The entries of the header, each of which must lie in the file and have the size of its shape."""
    if file.size < 8:
        raise ValueError("it has no header")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(_MAX_HEADER, file.size - 8):
        raise ValueError(f"its header has {length:,} bytes")
    header = parse_json(bytes(file.read(8, length)), "its header")
    if names is None:
        return {name: None for name in header if name != "__metadata__"}
    found: dict[str, Stored] = {}
    for name, entry in header.items():
        if name not in names:
            continue
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name} has the dtype {entry['dtype']}")
        dtype = _DTYPES[entry["dtype"]]
        if not all(isinstance(n, int) and n >= 0 for n in (begin, end, *shape)) or len(shape) > 8:
            raise ValueError(f"{name} has no shape or no place")
        if end > file.size - 8 - length or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} does not fit into the file with the shape {shape}")
        found[name] = Stored(file, 8 + length + begin, dtype, shape)
    return found


def _read_pt(file: _File, names: frozenset[str] | None) -> dict[str, Any]:
    """A zip file of torch.save with tensors alone; the rest of the format and all older formats are refused."""
    if file.read(0, min(file.size, 1)) == bytearray(b"\x80"):
        raise ValueError(_PICKLED)
    with _archive(file) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} is compressed, which torch.save never does")
        pickles = [entry for entry in archive.infolist() if entry.filename.endswith(".pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _MAX_HEADER:
            raise ValueError("it is not a file of torch.save with a dict of tensors")
        _check_pickle(archive.read(pickles[0]))
    opened = Path(f"/dev/fd/{file.raw.fileno()}")  # the file that was checked, also if another one has its name by now
    if file.size >= _MAPPED and opened.exists():
        found = torch.load(str(opened), map_location="cpu", weights_only=True, mmap=True)
    else:
        found = torch.load(io.BytesIO(file.read(0, file.size)), map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not a dict of tensors")
    return {name: value for name, value in cast("dict[str, Any]", found).items() if names is None or name in names}


def _check_pickle(data: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(data):
        name = f"{argument}".replace("\n", " ")
        if opcode.name in _OPCODES_WITHOUT_GLOBALS:
            raise ValueError(f"it holds something else than tensors ({opcode.name}); {SAVE}")
        if (
            opcode.name == "GLOBAL"
            and name not in _GLOBALS
            and not (name.startswith("torch ") and name.endswith("Storage"))
        ):
            advice = _TENSORDICT if name.startswith("tensordict.") else SAVE
            raise ValueError(f"it holds something else than tensors ({name[:80]}); {advice}")


def _read_npz(file: _File, names: frozenset[str] | None) -> dict[str, Any]:
    import numpy as np

    with _archive(file) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(member)
            if dtype.hasobject:
                raise ValueError(f"{entry.filename} holds Python objects")
            if math.prod(shape) * dtype.itemsize > entry.file_size:
                raise ValueError(f"{entry.filename} says it has the shape {shape}, and holds {entry.file_size:,} bytes")
        if names is None:
            return dict.fromkeys(entry.filename.removesuffix(".npy") for entry in archive.infolist())
    with np.load(io.BytesIO(file.read(0, file.size)), allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in arrays.files if name in names}
    return {name: torch.from_numpy(array) for name, array in found.items() if array.dtype.kind in "fiub"}


def _read_parquet(file: _File, names: frozenset[str] | None) -> Mapping[str, Any]:
    """Columns of numbers, or of lists of numbers with a row for each sequence, flattened to one number for each token.

    Beside lists, a column with one number in a row has it for each token of the row's list.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError(f"Parquet files need pyarrow: pip install 'bandpo[trl]' ({error})") from None
    table: Any = parquet.ParquetFile(io.FileIO(file.raw.fileno(), closefd=False))
    if names is None:
        return dict.fromkeys(cast("list[str]", table.schema_arrow.names))
    wanted: list[str] = [name for name in table.schema_arrow.names if name in names]
    allowed, values = max(SMALL, _MOST_COMPRESSED * file.size), 0
    parts: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for rows in table.iter_batches(batch_size=_ROWS, columns=wanted):
        columns: dict[str, Any] = dict(zip(rows.schema.names, rows.columns, strict=True))
        lengths = {n: _as_tensor(c.value_lengths()) for n, c in columns.items() if hasattr(c, "value_lengths")}
        counted = next(iter(lengths.values()), None)
        for name, column in columns.items():
            if name in lengths and not torch.equal(lengths[name], cast("Tensor", counted)):
                raise ValueError(f"{name} has lists of other lengths than another column")
            found = _as_tensor(column.flatten() if name in lengths else column)
            if counted is not None and name not in lengths:
                found = found.repeat_interleave(counted)
            parts[name].append(found)
            values += len(found)
            if values > allowed:
                raise ValueError(f"it has more than {allowed:,} values")
    return {name: torch.cat(tensors) for name, tensors in parts.items() if tensors}


def _read_jsonl(file: _File, names: frozenset[str] | None) -> Mapping[str, Any]:
    """A JSON object on each line, with a list of numbers for the tokens of a sequence, as prime-rl exports its tokens.

    A number beside lists is that of each token of the line.
    """
    parts: dict[str, list[Tensor]] = {}
    seen: dict[str, None] = {}
    raw = io.BufferedReader(cast("Any", io.FileIO(file.raw.fileno(), closefd=False)))
    raw.seek(0)
    for number in itertools.count(1):
        line = raw.readline(_LONGEST_LINE + 1)
        if not line:
            break
        if len(line) > _LONGEST_LINE or line.count(b"[") + line.count(b"{") > _MOST_LISTS:
            raise ValueError(f"line {number} has more than {_LONGEST_LINE:,} bytes or {_MOST_LISTS:,} lists")
        row = parse_json(line, f"line {number}")
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no object like {{...}}")
        if names is None:
            seen |= dict.fromkeys(cast("dict[str, Any]", row))
            continue
        for name, found in _tokens_of(cast("dict[str, Any]", row), names, number).items():
            parts.setdefault(name, []).append(found)
    if names is None:
        return seen
    counts = {sum(map(len, tensors)) for tensors in parts.values()}
    if len(counts) > 1:
        raise ValueError("some of its lines lack a list that others have")
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def _tokens_of(row: Mapping[str, Any], names: frozenset[str], number: int) -> dict[str, Tensor]:
    given = {name: value for name, value in row.items() if name in names}
    lengths = {len(cast("list[Any]", value)) for value in given.values() if isinstance(value, list)}
    if len(lengths) != 1:
        raise ValueError(f"line {number} has no list of numbers, or lists of different lengths")
    [length] = lengths
    return {
        name: _of_numbers(cast("list[Any]", value) if isinstance(value, list) else [value] * length)
        for name, value in given.items()
        if isinstance(value, list | int | float)
    }


def _of_numbers(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64 if values and isinstance(values[0], float) else None)


def _as_tensor(column: Any) -> Tensor:
    """A column of Arrow as a tensor."""
    if column.null_count:
        raise ValueError("it has empty cells")
    return torch.from_numpy(column.to_numpy(zero_copy_only=False).copy())


def _archive(file: _File) -> zipfile.ZipFile:
    """A zip file, if it has few entries that are not larger than such data can be."""
    end = bytes(file.read(file.size - 22, 22)) if file.size >= 22 else b""
    if not end.startswith(b"PK\x05\x06"):  # without a comment: every reader then finds the same list of files
        raise ValueError("it is no zip file, or not complete")
    archive = zipfile.ZipFile(io.FileIO(file.raw.fileno(), closefd=False))
    entries = archive.infolist()
    unpacked = sum(entry.file_size for entry in entries)
    if len(entries) > 1000 or unpacked > max(8 * SMALL, _MOST_COMPRESSED * file.size) or unpacked > _MAX_UNPACKED:
        raise ValueError(f"it has {len(entries)} entries and {unpacked:,} bytes unpacked")
    return archive


_MAX_UNPACKED = 1 << 33
_PICKLED = f"a pickle runs code when it is read, also verl's DataProto.save_to_disk; {SAVE}"
_TENSORDICT = (
    "of a TensorDict, such as the batch of verl's DataProto, save torch.save(data.batch.to_dict(), 'batch.pt')"
)
FORMATS: Mapping[str, tuple[Callable[[_File, frozenset[str] | None], Mapping[str, Any]], int]] = {
    ".safetensors": (_read_safetensors, 1 << 34),
    ".pt": (_read_pt, 1 << 32),
    ".npz": (_read_npz, 1 << 30),
    ".parquet": (_read_parquet, 1 << 30),
    ".jsonl": (_read_jsonl, 1 << 30),
}
"""How each format is read, and the largest file in bytes."""
