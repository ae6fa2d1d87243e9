"""Files and sealed folders: whole or not there, and any damage is seen."""

import json
import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bandpo._system.files import (
    SEAL,
    damage,
    latest_whole,
    read_jsonl,
    seal,
    unseal,
    write_json,
    write_jsonl,
    write_text,
)


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "checkpoint-3"
    (made / "deep").mkdir(parents=True)
    (made / "weights").write_bytes(random.Random(0).randbytes(100_000))
    (made / "deep" / "state.json").write_text('{"step": 3}')
    (made / "empty").touch()
    seal(made)
    return made


def test_a_sealed_folder_is_whole(folder):
    assert damage(folder) is None
    assert set(json.loads((folder / SEAL).read_text())) == {"weights", "deep/state.json", "empty"}
    unseal(folder)
    assert damage(folder) == "it was not written to its end"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda d: (d / "weights").write_bytes((d / "weights").read_bytes()[:-1]), "99999 bytes instead of 100000"),
        (lambda d: (d / "deep" / "state.json").write_text('{"step": 4}'), r"state\.json has changed"),
        (lambda d: (d / "empty").unlink(), "empty is missing"),
        (lambda d: (d / SEAL).write_text('{"weights": [1'), "is damaged"),
        (lambda d: (d / SEAL).write_text("[1, 2]"), "is damaged"),
        (lambda d: (d / SEAL).write_text('{"weights": 7}'), "is damaged"),
        (lambda d: (d / SEAL).write_bytes(b"\xff\x00"), "is damaged"),
    ],
)
def test_damage_is_named(harm, message, folder):
    import re

    harm(folder)
    assert re.search(message, damage(folder))


def test_any_flipped_bit_of_the_weights_is_seen(folder):
    data, draw = bytearray((folder / "weights").read_bytes()), random.Random(1)
    for _ in range(50):
        place, bit = draw.randrange(len(data)), 1 << draw.randrange(8)
        data[place] ^= bit
        (folder / "weights").write_bytes(data)
        assert damage(folder) == "weights has changed"
        data[place] ^= bit
    (folder / "weights").write_bytes(data)
    assert damage(folder) is None


def test_the_last_whole_folder_is_found_and_others_are_named(folder):
    later = folder.with_name("checkpoint-10")
    later.mkdir()
    said = []
    candidates = list(folder.parent.iterdir())
    assert latest_whole(candidates, lambda p: int(p.name.rpartition("-")[2]), said.append) == folder
    assert said == [f"{later} is not used: it was not written to its end"]
    (later / "weights").touch()  # a seal of no files is none
    seal(later)
    assert latest_whole(candidates, lambda p: int(p.name.rpartition("-")[2]), said.append) == later


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_text(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_strict(tmp_path):
    write_json(tmp_path / "a.json", {"x": [float("nan"), float("inf"), 1.5], "y": (1, -float("inf"))})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, None, 1.5], "y": [1, None]}


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=20)), max_size=5),
    cut=st.integers(0, 400),
)
def test_an_appended_file_that_was_cut_anywhere_has_the_rows_before_the_cut(rows, cut, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"cut-{os.getpid()}.jsonl"
    write_jsonl(path, rows)
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    assert read_jsonl(path) == rows[: data[:cut].count(b"\n")]


@pytest.mark.parametrize(
    ("text", "message"),
    [(b'{"a": 1}\nnonsense\n', "line 2 is not JSON"), (b"[1]\n", r"line 1: a row is an object like \{...\}, got list"),
     (b"\xff\xfe\n", "line 1 is not JSON"), (b"[" * 100_000 + b"\n", "line 1 is not JSON")],
)  # fmt: skip
def test_other_lines_must_be_rows(text, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read_jsonl(path)
