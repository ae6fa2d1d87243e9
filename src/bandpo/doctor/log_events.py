"""Reads the scalars of TensorBoard's event files, a record at a time, without TensorBoard.

TensorBoard's own reader holds a record of any length, and imports TensorFlow where it is installed. A record is a message of
protocol buffers between its length and two checksums; its fields are those of TensorFlow's event.proto and summary.proto.
"""

import functools
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bandpo._system.bounded import open_regular
from bandpo.monitoring.log_rows import MAX_VALUES, Row

_MOST_BYTES = 1 << 20  # of a record that is read; those of pictures and histograms may be larger, and are skipped
_LONGEST_TAG = 500
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_EVENT_STEP, _EVENT_SUMMARY, _SUMMARY_VALUE = 2, 5, 1
_VALUE_TAG, _VALUE_SIMPLE, _VALUE_TENSOR = 1, 2, 8
_TENSOR_TYPE, _TENSOR_CONTENT, _TENSOR_FLOATS, _TENSOR_DOUBLES = 1, 4, 5, 6
_FORMATS = {1: "<f", 2: "<d"}  # DT_FLOAT and DT_DOUBLE


def event_rows(path: Path, said: list[str]) -> Iterator[Row]:
    """The scalars of an event file, in a row for each step that follows another one.

    Args:
        path: The file.
        said: Notes about the file are appended to it.

    Raises:
        ValueError: If it is not an event file, or is damaged before its end.
    """
    row: dict[str, float] = {}
    with os.fdopen(open_regular(path, follow=False), "rb") as file:
        for data in _records(file, path, said):
            try:
                step, values = _event(data)
            except (ValueError, IndexError, struct.error) as error:
                raise ValueError(f"{path} has a damaged record before byte {file.tell():,}: {error}") from None
            for tag, value in values:
                if row and (row["step"] != step or tag in row):
                    yield row
                    row = {}
                row["step"] = step
                row[tag] = value
                if len(row) > MAX_VALUES:
                    raise ValueError(f"{path} has more than {MAX_VALUES:,} scalars at step {step:g}")
    if row:
        yield row


def _records(file: BinaryIO, path: Path, said: list[str]) -> Iterator[bytes]:
    """The data of each record that is not too large; the checksum of each length is checked."""
    size, place, large = os.fstat(file.fileno()).st_size, 0, 0
    while header := file.read(12):
        length = int.from_bytes(header[:8], "little")
        if len(header) == 12 and _checksum(header[:8]) != int.from_bytes(header[8:], "little"):
            at = f"is damaged at byte {place:,}" if place else "is not an event file of TensorBoard"
            raise ValueError(f"{path} {at}: the checksum of a record's length is wrong")
        end = place + 12 + length + 4
        if len(header) < 12 or end > size:  # it is still written
            said.append("its last record is not finished, and is left out")
            break
        if length <= _MOST_BYTES:
            data = file.read(length)
            file.seek(4, os.SEEK_CUR)
            yield data
        else:
            large += 1
            file.seek(end)
        place = end
    if large:
        said.append(f"{large} of its records have more than {_MOST_BYTES:,} bytes, and are left out")


def _event(data: bytes) -> tuple[float, list[tuple[str, float]]]:
    """Step and scalars of an event."""
    step, values = 0, list[tuple[str, float]]()
    for field, kind, number, content in _fields(data):
        if field == _EVENT_STEP and kind == _VARINT:
            step = number - (1 << 64 if number >> 63 else 0)
        elif field == _EVENT_SUMMARY and kind == _LENGTH:
            for inner, kind_, _, one in _fields(content):
                if inner == _SUMMARY_VALUE and kind_ == _LENGTH:
                    values += _scalar(one)
    return float(step), values


def _scalar(data: bytes) -> list[tuple[str, float]]:
    """The tag and the number of a value of a summary, nothing if it is no single number."""
    tag, scalar = "", None
    for field, kind, _, content in _fields(data):
        if field == _VALUE_TAG and kind == _LENGTH:
            tag = content[:_LONGEST_TAG].decode("utf-8", "replace")
        elif field == _VALUE_SIMPLE and kind == _FIXED32:
            [scalar] = struct.unpack("<f", content)
        elif field == _VALUE_TENSOR and kind == _LENGTH:
            scalar = _of_tensor(content)
    return [] if scalar is None or not tag or tag == "step" else [(tag, scalar)]


def _of_tensor(data: bytes) -> float | None:
    """The number of a tensor that has one, in float32 or float64."""
    dtype, numbers = 0, b""
    for field, kind, number, content in _fields(data):
        if field == _TENSOR_TYPE and kind == _VARINT:
            dtype = number
        elif (field == _TENSOR_CONTENT and kind == _LENGTH) or field in (_TENSOR_FLOATS, _TENSOR_DOUBLES):
            numbers = content
    form = _FORMATS.get(dtype, "")
    return struct.unpack(form, numbers)[0] if form and len(numbers) == struct.calcsize(form) else None


def _fields(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """The fields of a message: number, kind, and the value as a whole number or as bytes."""
    place, end = 0, len(data)
    while place < end:
        key, place = _varint(data, place)
        field, kind = key >> 3, key & 7
        if kind == _VARINT:
            number, place = _varint(data, place)
            yield field, kind, number, b""
            continue
        if kind == _LENGTH:
            length, place = _varint(data, place)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"a field has the kind {kind}")
        if place + length > end:
            raise ValueError("a field is longer than its record")
        yield field, kind, 0, data[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & ((1 << 64) - 1), place
    raise ValueError("a number has more than ten bytes")


@functools.cache
def _table() -> tuple[int, ...]:
    table: list[int] = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


def _checksum(data: bytes) -> int:
    """The masked CRC-32C of some bytes."""
    value, table = 0xFFFFFFFF, _table()
    for byte in data:
        value = table[(value ^ byte) & 255] ^ value >> 8
    value ^= 0xFFFFFFFF
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF
