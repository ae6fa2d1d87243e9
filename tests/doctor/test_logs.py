"""Logs of every kind: what the real writers wrote, and what people do to their files."""

import csv
import io
import json
import math
import os
import random
import re
import sqlite3
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bandpo.cli import main
from bandpo.doctor import examine_log
from bandpo.doctor.log_events import _checksum
from bandpo.doctor.log_tables import _connect, _guard
from bandpo.doctor.logs import is_log, log_files, read_log, read_logs
from bandpo.monitoring import names
from bandpo.monitoring.log_rows import LogRows, number_in
from bandpo.monitoring.symptoms import MEANINGS, NAMES, Log

DATA = Path(__file__).parent / "data"
WRITTEN = {  # what each real writer was given: rows 1 to 6
    "actor/entropy": [1.0 - 0.1 * i for i in range(6)],
    "actor/pg_clipfrac": [0.01 * i for i in range(6)],
    "actor/grad_norm": [0.5, 1.5, 2.5, 3.5, math.nan, 5.5],
    "critic/score/mean": [0.1 * i for i in range(6)],
}


def same(found, expected):
    return all(
        a == pytest.approx(b, rel=1e-6, abs=1e-9) or (a != a and b != b) for a, b in zip(found, expected, strict=True)
    )


def named(findings, rule):
    return [f for f in findings if f.rule == rule]


# ---- what real writers wrote


@pytest.mark.parametrize("file", ["verl-0.9.1-file.jsonl", "verl-0.9.1-console.txt", "events.out.tfevents.torch-2.13"])
def test_files_of_verl_s_own_loggers(file):
    """Written by verl's `Tracking` (0.9.1), of which TensorBoard's part is torch's SummaryWriter."""
    log = Log(read_log(DATA / file))
    assert {name for name, _ in log.found.values()} == {*WRITTEN, "critic/advantages/max"}
    for name, values in log.found.values():
        if name in WRITTEN:
            assert same(values, WRITTEN[name]), name
    assert any(
        "grad_norm is not finite in 1 of 6" in f.seen for f in named(examine_log(read_log(DATA / file)), "nonfinite")
    )


@pytest.fixture
def trackio(tmp_path):
    """A database that trackio 0.43.0 wrote, from its dump."""
    path = tmp_path / "tiny.db"
    database = sqlite3.connect(path)
    database.executescript((DATA / "trackio-0.43.0.sql").read_text())
    database.close()
    return path


def test_a_database_of_trackio(trackio):
    log = Log(rows := read_log(trackio))
    assert rows.said == ["it has 2 runs; the newest, second, is read; --run chooses another"]
    assert log.found["entropy"][0] == "train/entropy" and same(log.found["entropy"][1], WRITTEN["actor/entropy"])
    assert same(log.found["gradient"][1], WRITTEN["actor/grad_norm"])
    first = Log(read_log(trackio, run="first"))
    assert same(first.found["entropy"][1], WRITTEN["actor/entropy"][:3])
    with pytest.raises(ValueError, match="has no run 'third', but first, second"):
        list(read_log(trackio, run="third"))
    before = trackio.read_bytes(), sorted(trackio.parent.iterdir())
    list(read_log(trackio))
    assert (trackio.read_bytes(), sorted(trackio.parent.iterdir())) == before


def test_what_a_running_job_has_not_merged_into_its_database_is_read(trackio, monkeypatch):
    running = sqlite3.connect(trackio)
    running.execute("PRAGMA journal_mode=WAL")
    text = json.dumps({"train/entropy": 0.25})
    running.execute(
        "INSERT INTO metrics (timestamp, run_id, run_name, step, metrics) SELECT timestamp, run_id, run_name, 70, ? "
        "FROM metrics WHERE run_name = 'second' LIMIT 1",
        (text,),
    )
    running.commit()
    assert trackio.with_name("tiny.db-wal").stat().st_size
    before = {p.name: p.read_bytes() for p in trackio.parent.iterdir()}
    assert Log(read_log(trackio)).found["entropy"][1][-1] == 0.25
    assert {p.name: p.read_bytes() for p in trackio.parent.iterdir()} == before
    monkeypatch.setattr("bandpo.doctor.log_tables._MOST_COPIED", 10)
    log = Log(rows := read_log(trackio))
    assert len(log.found["entropy"][1]) == 6 and any("tiny.db-wal) is not read" in note for note in rows.said)
    running.close()


TABLE = "CREATE TABLE metrics (id INTEGER PRIMARY KEY, run_name TEXT, step INTEGER, metrics TEXT"
PUT = "); INSERT INTO metrics (run_name, step, metrics) VALUES ('r', 1, "
HOSTILE_SCHEMAS = {
    "a view": "CREATE VIEW metrics AS SELECT 1 AS id, 'r' AS run_name, 1 AS step, '{}' AS metrics",
    "another table": "CREATE TABLE metrics (a)",
    "no table": "CREATE TABLE x (a)",
    "an empty table": f"{TABLE})",
    "a computed column": "CREATE TABLE metrics (id INTEGER PRIMARY KEY, run_name TEXT, step INTEGER, metrics AS "
    "(hex(zeroblob(400000000)))); INSERT INTO metrics (run_name, step) VALUES ('r', 1)",
    "a huge text": f"{TABLE}{PUT}hex(zeroblob(3000000)))",
    "no JSON": f"{TABLE}{PUT}'[')",
    "a number": f"{TABLE}{PUT}5)",
    "a virtual table": "CREATE VIRTUAL TABLE metrics USING rtree(id, run_name, step, metrics, x)",
}


@pytest.mark.parametrize("name", HOSTILE_SCHEMAS)
def test_other_databases_are_refused(name, tmp_path):
    path = tmp_path / "x.db"
    database = sqlite3.connect(path)
    database.executescript(HOSTILE_SCHEMAS[name])
    database.commit()
    database.close()
    with pytest.raises(ValueError, match=re.escape(str(path))):
        list(read_log(path))


def test_a_trigger_of_a_database_does_not_run(trackio):
    database = sqlite3.connect(trackio)
    database.executescript("CREATE TRIGGER t AFTER INSERT ON metrics BEGIN DELETE FROM metrics; END")
    database.close()
    before = trackio.read_bytes()
    assert len(list(read_log(trackio))) == 6
    assert trackio.read_bytes() == before


# ---- TensorBoard's events


def record(data):
    header = struct.pack("<Q", len(data))
    return header + struct.pack("<I", _checksum(header)) + data + struct.pack("<I", _checksum(data))


def field(number, kind, value):
    key = bytes([number << 3 | kind])
    return key + (bytes([len(value)]) + value if kind == 2 else value)


def event(step, **scalars):
    values = b"".join(
        field(
            1,
            2,
            field(1, 2, tag.encode()) + (value if isinstance(value, bytes) else field(2, 5, struct.pack("<f", value))),
        )
        for tag, value in scalars.items()
    )
    return record(field(2, 0, bytes([step])) + field(5, 2, values))


VERSION = record(field(3, 2, b"brain.Event:2"))


def test_the_checksum_is_that_of_the_files():
    """CRC-32C of "123456789" is 0xE3069283, in the catalogue of checksums; masked as in the format of records."""
    value = 0xE3069283
    assert _checksum(b"123456789") == (((value >> 15) | (value << 17)) + 0xA282EAD8) & 0xFFFFFFFF
    assert _checksum(VERSION[12:-4]) == struct.unpack("<I", VERSION[-4:])[0]


def test_scalars_of_each_form_are_read(tmp_path):
    path = tmp_path / "events.out.tfevents.1.x"
    floats = field(8, 2, field(1, 0, b"\x01") + field(5, 2, struct.pack("<f", 0.5)))
    content = field(8, 2, field(1, 0, b"\x02") + field(4, 2, struct.pack("<d", 0.125)))
    two = field(8, 2, field(1, 0, b"\x01") + field(4, 2, struct.pack("<ff", 1, 2)))
    path.write_bytes(
        VERSION + event(1, entropy=1.0, reward=2.0) + event(1, loss=3.0) + event(2, entropy=floats, reward=content, other=two)
        + event(2, entropy=0.25)
    )  # fmt: skip
    assert list(read_log(path)) == [
        {"step": 1.0, "entropy": 1.0, "reward": 2.0, "loss": 3.0},
        {"step": 2.0, "entropy": 0.5, "reward": 0.125},
        {"step": 2.0, "entropy": 0.25},
    ]


def test_an_event_file_that_is_still_written_or_damaged(tmp_path, monkeypatch):
    path = tmp_path / "events.out.tfevents.1.x"
    whole = VERSION + event(1, entropy=1.0) + event(2, entropy=0.5)
    for cut in range(len(VERSION) + 1, len(whole)):
        path.write_bytes(whole[:cut])
        rows = read_log(path)
        assert len(list(rows)) == (cut >= len(VERSION + event(1, entropy=1.0)))
        assert bool(rows.said) == (cut != len(VERSION + event(1, entropy=1.0)))
    for broken, message in (
        (b"x" * 100, "is not an event file of TensorBoard"),
        (VERSION + b"y" * 100, f"is damaged at byte {len(VERSION)}"),
        (VERSION + record(b"\x2a\xff\xff\xff\x7f"), "a field is longer than its record"),
        (VERSION + record(b"\x10" + b"\xff" * 11), "a number has more than ten bytes"),
        (VERSION + record(b"\x0b"), "a field has the kind 3"),
        (VERSION + record(b"\x10"), "index out of range"),
    ):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=message):
            list(read_log(path))
    header = struct.pack("<Q", 1 << 62)  # a length that lies, with a right checksum
    path.write_bytes(VERSION + header + struct.pack("<I", _checksum(header)) + b"z" * 50)
    rows = read_log(path)
    assert list(rows) == [] and rows.said == ["its last record is not finished, and is left out"]
    monkeypatch.setattr("bandpo.doctor.log_events._MOST_BYTES", 20)
    path.write_bytes(VERSION + event(1, entropy=1.0, reward=1.0) + event(2, a=1.0))
    rows = read_log(path)
    assert list(rows) == [{"step": 2.0, "a": 1.0}]
    assert rows.said == ["1 of its records have more than 20 bytes, and are left out"]


# ---- consoles

RAY = "\x1b[36m(TaskRunner pid=1234, ip=10.0.0.1)\x1b[0m "


def test_the_console_of_verl_with_what_ray_and_others_print(tmp_path):
    plain = (DATA / "verl-0.9.1-console.txt").read_text().splitlines()
    lines = [
        "{'actor_rollout_ref': {'actor': {'clip_ratio': 0.2, 'entropy_coeff': 0.0, 'grad_norm': 9},",
        "Training Progress:  5%|▌  | 1/20\rTraining Progress: 10%|█",
        "step:x - no:1",
        "first step:",
        *(RAY + line for line in plain[:3]),
        RAY + plain[3] + " [repeated 2x across cluster]",
        "\x1b[1mWARNING\x1b[0m reward: 3 - loss:5",
        *(f"Training Progress: 50%\r{line}" for line in plain[4:]),
    ]
    (tmp_path / "run.log").write_text("\n".join(lines) + "\n")
    log = Log(rows := read_log(tmp_path / "run.log"))
    for name, values in log.found.values():
        if name in WRITTEN:
            assert same(values, WRITTEN[name]), name
    assert log.rows == 6 and rows.said == []
    (tmp_path / "run.log").write_text("\n".join(lines))  # its last line is not finished
    assert Log(rows := read_log(tmp_path / "run.log")).rows == 5
    assert rows.said == ["its last line is not finished, and is left out"]
    assert is_log(tmp_path / "run.log")
    (tmp_path / "run.txt").write_text("\n".join(lines))
    (tmp_path / "script.txt").write_text("trainer.total_epochs=3\n# step:3 - x:1 is what the run prints\n")
    assert is_log(tmp_path / "run.txt")
    (tmp_path / "script.txt").write_text("actor_rollout_ref.rollout.n=8\n")
    assert not is_log(tmp_path / "script.txt")


def test_the_dictionaries_that_trainers_print(tmp_path):
    path = tmp_path / "out.log"
    path.write_text(
        "  1%|▏  | 1/100 [00:03<05:12,  3.2s/it]{'loss': 0.1, 'grad_norm': nan, 'entropy': 0.5, 'epoch': 0.01}\n"
        "{'loss': '0.2', 'grad_norm': '1.5', 'learning_rate': '1e-06', 'entropy': '0.4', 'epoch': '0.02'}\n"
        "{'clip_ratio': 0.2, 'beta': 0.1}\n{'loss': 1\n"
    )
    log = Log(read_log(path))
    assert log.rows == 2 and list(log.found["entropy"][1]) == [0.5, 0.4]
    assert same(log.found["gradient"][1], [math.nan, 1.5]) and "clip" not in log.found
    path.write_text(
        "2026 INFO ✨ Global step 7: {'policy_loss': 0.1, 'ppo_clip_ratio': 0.02, 'kl': 0.1, 'actor_grad_norm': 2.0}\n"
    )
    log = Log(read_log(path))
    assert {what: (name, list(v)) for what, (name, v) in log.found.items()} == {
        "clip": ("train/ppo_clip_ratio", [0.02]), "gradient": ("train/actor_grad_norm", [2.0]),
        "loss": ("train/policy_loss", [0.1]),
    }  # fmt: skip
    path.write_text("model.py:880 - step 3: {'train/pg_clipfrac': 0.05, 'train/entropy_loss': 0.7, 'train/step': 3}\n")
    assert {name for name, _ in Log(read_log(path)).found.values()} == {"train/pg_clipfrac", "train/entropy_loss"}


def test_an_endless_line_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("bandpo.doctor.log_lines.MAX_LINE_BYTES", 1000)
    monkeypatch.setattr("bandpo.doctor.log_lines._CHUNK", 100)
    path = tmp_path / "a.log"
    path.write_bytes(b"step:1 - a:1\n" + b"x" * 5000 + b" step:9 - b:2\nstep:2 - a:2\n")
    rows = read_log(path)
    assert list(rows) == [{"step": b"1", "a": b"1"}, {"step": b"2", "a": b"2"}]
    assert rows.said == ["1 of its lines have more than 1,000 bytes, and are left out"]


# ---- tables


def test_a_table_from_w_and_b_s_page(tmp_path):
    path = tmp_path / "export.csv"
    path.write_text(
        '﻿"Step","my run - x - actor/entropy","my run - x - actor/entropy__MIN","my run - x - actor/entropy__MAX"\n'
        '"1","0.5","0.1","0.9"\n"2","NaN","NaN","NaN"\n"3","",""\n"4","4e-1","0","1"\n'
    )
    log = Log(rows := read_log(path))
    assert log.columns == {"step", "actor/entropy"}
    assert log.found["entropy"][0] == "actor/entropy" and same(log.found["entropy"][1], [0.5, math.nan, 0.4])
    assert rows.said == ["1 of its rows have another number of cells than its first line"]
    path.write_text('"Step","a - entropy","b - entropy","a - reward"\n"1","0.5","0.6","1"\n')
    with pytest.raises(ValueError, match=r"has 2 runs \(a, b\); choose one with --run"):
        list(read_log(path))
    assert list(read_log(path, run="b")) == [{"step": b"1", "entropy": b"0.6"}]
    assert list(read_log(path, run="a")) == [{"step": b"1", "entropy": b"0.5", "reward": b"1"}]
    path.write_text("_step,_runtime,train/entropy,train/global_step,note\n1,2.5,0.5,10,a\n2,3.5,0.4,20,b\n3,4.5,0.")
    log = Log(rows := read_log(path))
    assert list(log.found["entropy"][1]) == [0.5, 0.4] and rows.said == [
        "its last line is not finished, and is left out"
    ]
    path.write_text("entropy,reward\n1,2\n3,4")  # complete, without a last line break
    assert len(list(read_log(path))) == 2


def test_a_table_with_enormous_cells_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    for text, message in (
        ("entropy\n" + "1" * 300_000 + "\n", "line 2 has more than 262,144 bytes"),
        ("entropy\n" + "1" * 200_000 + "\n", "field larger than field limit"),
        ('entropy\n"' + "1\n" * 100_000, "field larger than field limit"),
        (",".join(["a"] * 6000) + "\n", "more than 5,000 columns"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            list(read_log(path))


ROWS = [{"_step": i, "actor/entropy": 1.0 / (i + 1), "actor/grad_norm": None if i == 2 else 2.0} for i in range(5)]


def test_json_of_each_form(tmp_path):
    path = tmp_path / "a.json"
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    pandas = {name: {str(i): value for i, value in enumerate(values)} for name, values in columns.items()}
    for content in (ROWS, {"log_history": ROWS, "best": None}, columns, pandas):
        path.write_text(json.dumps(content))
        log = Log(read_log(path))
        assert list(log.found["entropy"][1]) == columns["actor/entropy"] and len(log.found["gradient"][1]) == 4
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert Log(read_log(path)).rows == 5
    for content, message in (
        ({"a": 1}, "no log_history, no list of rows"), ({"a": [1], "b": [1, 2]}, "no columns"), (3, "is no log"),
        ({"log_history": 5}, "is no log"),
    ):  # fmt: skip
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            list(read_log(path))
    path.write_text("[" + "{}," * 1_100_000 + "{}]")
    with pytest.raises(ValueError, match="more values than a log of metrics"):
        list(read_log(path))
    path.write_text('{"log_history": [' + json.dumps(ROWS[0]))  # a process is killed while it writes
    with pytest.raises(ValueError, match="is not JSON"):
        list(read_log(path))


@pytest.mark.parametrize(
    ("torn", "rows"),
    [
        ('{"step": 3, "entr\n', [1, 2, 4]),
        ('{"step": 3, "entr{"step": 3, "entropy": 0.5}\n', [1, 2, 3, 4]),
        ('{"step": 3, "data": {"a": 1, "b{"step": 3, "data": {"actor/entropy": 0.5}}\n', [1, 2, 3, 4]),
    ],
)
def test_a_row_that_a_kill_cut_off_is_left_out(torn, rows, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        f'{{"step": 1, "entropy": 0.5}}\n{{"step": 2, "entropy": 0.5}}\n{torn}{{"step": 4, "entropy": 0.5}}\n'
    )
    assert [float(row["step"]) for row in read_log(path)] == rows
    [note] = [f for f in examine_log(read_log(path)) if f.rule == "log"]
    assert "1 rows were cut off, as by a kill, and are left out (line 3)" in note.seen
    path.write_text('{"step": 1, "entropy": 0.5}\nnonsense\n{"step": 2, "entropy": 0.5}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        list(read_log(path))
    path.write_text('{"step": 1, "entr\n' * 51)
    with pytest.raises(ValueError, match="line 51 is not JSON"):
        list(read_log(path))


def test_a_parquet_file_is_a_log_or_a_batch(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{**row, "name": "x", "list": [1]} for row in ROWS]), path)
    assert is_log(path)
    log = Log(rows := read_log(path))
    assert list(log.found["entropy"][1]) == [row["actor/entropy"] for row in ROWS]
    assert len(log.found["gradient"][1]) == 4 and rows.said == ["1 of its columns are not numbers, and are not read"]
    pq.write_table(pa.table({"logprobs": [-1.0], "advantages": [1.0], "old_logprobs": [-1.0]}), path)
    assert not is_log(path)
    path.write_bytes(b"PAR1junk")
    assert not is_log(path)
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        list(read_log(path))
    pq.write_table(pa.table({"entropy": pa.array([1.0] * 2_000_000)}), path)  # one value, two million times
    with pytest.raises(ValueError, match="has more than 1,048,576 values"):
        list(read_log(path))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"pip install 'bandpo\[trl\]'"):
        list(read_log(path))


# ---- order, resumed runs, several files


def written(path, steps, value=lambda s: float(s)):
    path.write_text("".join(json.dumps({"step": s, "entropy": value(s)}) + "\n" for s in steps))
    return path


def test_a_resumed_run_counts_its_later_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    before = [{"step": s, "entropy": 1.0} for s in range(1, 8)]
    after = [{"step": s, "entropy": 2.0} for s in range(5, 10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in before + after))
    log = Log(read_log(path))
    assert list(log.found["entropy"][1]) == [1.0] * 4 + [2.0] * 5
    assert (log.reordered, log.replaced, log.back) == (True, 3, [(5.0, 7.0)])
    [note] = named(examine_log(read_log(path)), "log")
    assert "step 5 comes after 7" in note.seen and "up to 3 values were replaced" in note.seen
    for rows in (before + after, [{**row, "step": str(row["step"])} for row in before + after]):
        assert list(Log(rows).found["entropy"][1]) == [1.0] * 4 + [2.0] * 5


def test_rows_of_the_same_step_are_all_kept_unless_the_run_was_resumed():
    """A loop may log each of the updates on a rollout under the rollout's step."""
    rows = [{"step": s // 3, "entropy": float(s)} for s in range(12)]
    log = Log(rows)
    assert list(log.found["entropy"][1]) == [float(s) for s in range(12)] and not log.reordered
    again = Log([*rows, {"step": 2, "entropy": 100.0}, {"step": 2, "entropy": 101.0}])
    assert list(again.found["entropy"][1]) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 100.0, 101.0, 9.0, 10.0, 11.0]


@settings(max_examples=80, deadline=None)
@given(steps=st.lists(st.integers(0, 12), max_size=30))
def test_the_order_of_steps_against_the_obvious_reading(steps):
    rows = [{"step": s, "entropy": float(i)} for i, s in enumerate(steps)]
    part, parts = 0, []
    for i, s in enumerate(steps):
        part += i > 0 and s < steps[i - 1]
        parts.append(part)
    expected = [
        float(i)
        for step in sorted(set(steps))
        for i, s in enumerate(steps)
        if s == step and parts[i] == max(p for p, t in zip(parts, steps, strict=True) if t == step)
    ]
    log = Log(rows)
    assert list(log.found["entropy"][1] if steps else []) == expected
    assert log.replaced == len(steps) - len(expected)


def test_a_metric_that_is_logged_late_does_not_reorder_the_others():
    rows = [{"step": s, "reward": float(s)} for s in range(5)] + [
        {"step": 2, "entropy": 1.0},
        {"step": 5, "reward": 5.0},
    ]
    log = Log(rows)
    assert list(log.found["reward"][1]) == [0, 1, 2, 3, 4, 5] and not log.reordered


def test_files_of_one_run_are_joined(tmp_path, capsys):
    first, second = (
        written(tmp_path / "a.jsonl", range(1, 60), lambda s: 1.0),
        written(tmp_path / "b.jsonl", range(50, 100)),
    )
    log = Log(read_logs([first, second]))
    assert list(log.found["entropy"][1]) == [1.0] * 49 + [float(s) for s in range(50, 100)]
    assert log.said[0] == "2 files are read as one run: a.jsonl, b.jsonl"
    assert main(["doctor", str(first), str(second), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    assert main(["doctor", str(first), str(second), "--one-run", "--json"]) == 0
    [section] = json.loads(capsys.readouterr().out)
    assert any(f["rule"] == "log" and "2 files" in f["seen"] for f in section["findings"])


def test_the_last_line_of_a_running_job_is_no_error(tmp_path):
    path = tmp_path / "a.jsonl"
    whole = json.dumps({"step": 2, "entropy": 0.5, "reward": 1})
    for cut in range(1, len(whole) + 1):
        path.write_text('{"step": 1, "entropy": 1.0}\n' + whole[:cut])
        log = Log(rows := read_log(path))
        complete = cut == len(whole)
        assert log.rows == 1 + complete
        assert rows.said == ([] if complete else ["its last line is not finished, and is left out"])


# ---- folders


def test_the_log_of_a_folder(tmp_path, capsys):
    state = {"log_history": [{"step": s, "entropy": 1.0 - 0.01 * s, "reward": 0.1, "loss": 0.0} for s in range(1, 31)]}
    for step in (5, 100, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        short = {"log_history": state["log_history"][: step // 4]}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(short))
    (tmp_path / "checkpoint-900").mkdir()  # without a state: it is still written
    (tmp_path / "checkpoint-x").mkdir()
    assert log_files(tmp_path) == [tmp_path / "checkpoint-100" / "trainer_state.json"]
    assert main(["doctor", str(tmp_path)]) == 0
    assert "entropy went from 0.9" in capsys.readouterr().out
    assert main(["doctor", str(tmp_path / "checkpoint-20")]) == 0
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert log_files(tmp_path) == [tmp_path / "trainer_state.json"]
    (tmp_path / "logging.jsonl").write_text('{"entropy": 1}\n')
    assert log_files(tmp_path) == [tmp_path / "logging.jsonl"]
    (tmp_path / "metrics.jsonl").write_text('{"entropy": 1}\n')
    assert log_files(tmp_path) == [tmp_path / "metrics.jsonl"]


def test_event_files_of_a_folder_are_one_run(tmp_path, capsys):
    for name, steps in (("Nov26", (1, 2, 3)), ("Nov27", (3, 4))):
        (tmp_path / "runs" / name).mkdir(parents=True)
        file = tmp_path / "runs" / name / f"events.out.tfevents.{name[-2:]}.host"
        file.write_bytes(VERSION + b"".join(event(s, **{"train/entropy": float(s + (name == "Nov27"))}) for s in steps))
    assert list(Log(read_log(tmp_path)).found["entropy"][1]) == [1.0, 2.0, 4.0, 5.0]
    assert main(["doctor", str(tmp_path)]) == 0
    assert "2 files are read as one run" in " ".join(capsys.readouterr().out.split())


def test_links_in_a_folder_are_not_followed(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "events.out.tfevents.1").write_bytes(VERSION)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "runs").symlink_to(tmp_path / "secret")
    (tmp_path / "run" / "events.out.tfevents.2").symlink_to(tmp_path / "secret" / "events.out.tfevents.1")
    assert log_files(tmp_path / "run") == []
    for name in ("a.jsonl", "a.csv", "a.json", "a.log", "a.db", "events.tfevents", "a.txt"):
        (tmp_path / name).symlink_to(tmp_path / "secret" / "events.out.tfevents.1")
        with pytest.raises(ValueError, match="symbolic link"):
            list(read_log(tmp_path / name))
        os.unlink(tmp_path / name)
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match="a pipe"):
            list(read_log(tmp_path / name))
        os.unlink(tmp_path / name)


# ---- names


def test_each_name_has_one_meaning_in_all_hosts_logs():
    """A log does not say which host wrote it."""
    meanings = {}
    for ours in {*names.METRICS, *names.LOGGED}:
        for name in names.logged_names(ours):
            assert meanings.setdefault(name, ours) == ours
    owners = {}
    for what, spellings in NAMES.items():
        for name in spellings:
            assert owners.setdefault(name, what) == what, name
    assert MEANINGS.keys() == NAMES.keys()


HOSTS = {
    "SkyRL": {"policy/policy_entropy": "entropy", "policy/loss_metrics/clip_ratio": "clip", "policy/grad_norm": "gradient",
              "reward/avg_raw_reward": "reward", "policy/rollout_train_logprobs_abs_diff_mean": "mismatch",
              "policy/loss_metrics/band/ratio/mean": "ratio"},
    "slime": {"train/entropy_loss": "entropy", "train/pg_clipfrac": "clip", "train/grad_norm": "gradient",
              "rollout/raw_reward": "reward", "rollout/truncated_ratio": "cut off", "train/band/ratio/mean": "ratio",
              "train/train_rollout_logprob_abs_diff": "mismatch"},
    "OpenRLHF": {"train/entropy_loss": "entropy", "train/ppo_clip_ratio": "clip", "train/actor_grad_norm": "gradient",
                 "train/reward": "reward", "train/group_reward_std": "spread", "train/rollout/truncated_rate": "cut off"},
    "NeMo-RL": {"train/approx_entropy": "entropy", "train/probs_ratio": "ratio", "train/grad_norm": "gradient",
                "train/reward": "reward", "train/loss": "loss", "train/band/cap_fraction_of_all": "cap"},
    "prime-rl": {"entropy/all/mean": "entropy", "is_masked/mean": "clip", "optim/grad_norm": "gradient", "loss/mean": "loss",
                 "band/ratio/mean/mean": "ratio"},
    "ms-swift": {"entropy/mean": "entropy", "clip_ratio/region_mean": "clip", "reward_std": "spread",
                 "completions/clipped_ratio": "cut off", "grad_norm": "gradient"},
    "TRL in TensorBoard": {"train/entropy": "entropy", "train/clip_ratio/region_mean": "clip", "train/reward": "reward",
                           "train/frac_reward_zero_std": "zero variance", "train/reward/unscored": "unscored"},
    "TRL 0.16": {"clip_ratio": "clip", "reward": "reward"},
    "verl 0.2": {"actor/entropy_loss": "entropy", "actor/pg_clipfrac": "clip", "critic/score/mean": "reward"},
}  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
def test_the_names_of_each_host_are_understood(host):
    log = Log([{"step": i, **dict.fromkeys(HOSTS[host], 0.1 * i), "else": 1} for i in range(9)])
    assert {name: what for what, (name, _) in log.found.items()} == HOSTS[host]
    [found] = named(
        examine_log([{"step": i, **dict.fromkeys(HOSTS[host], 0.1 * i), "else": 1} for i in range(9)]), "columns"
    )
    assert found.numbers == {"understood": len(HOSTS[host]), "others": 1}
    assert all(f"{name} = {MEANINGS[what]}" in found.seen for name, what in HOSTS[host].items())


def test_clip_ratios_that_are_something_else_are_not_taken():
    """Completions that were cut off, and settings."""
    log = Log([{"entropy": 1.0, "prompt_length/clip_ratio": 0.5, "actor/clip_ratio": 0.2, "eval_entropy": 3.0}])
    assert set(log.found) == {"entropy"}


def test_numbers_as_texts():
    for text, number in (("0.5", 0.5), (" 1e-3 ", 1e-3), ("-2", -2.0), ("Infinity", math.inf), ("-inf", -math.inf), (".5", 0.5),
                         ("np.float32(0.5)", 0.5), ("tensor(0.5, device='cuda:0')", 0.5), ("5.", 5.0)):  # fmt: skip
        assert number_in(text) == number
    assert number_in("nan") != number_in("nan")
    for text in ("", "1_000", "0x10", "high", "1,5", "True", "None", "1 2", "tensor([1])", "9" * 1001, "np.float64()"):
        assert number_in(text) is None
    assert named(examine_log([{"entropy": "0.5", "grad_norm": "nan"}]), "nonfinite")[0].level == "problem"


def test_what_has_no_metrics_is_told_apart(tmp_path):
    with pytest.raises(ValueError, match=r"none of the metrics .*; it has a, b"):
        examine_log([{"b": 1, "a": 2}])
    path = tmp_path / "5.jsonl"
    path.write_text(json.dumps({"input": "q", "output": "a", "gts": "1", "score": 1.0, "step": 5}) + "\n")
    with pytest.raises(ValueError, match="generated texts with their scores"):
        examine_log(read_log(path))
    with pytest.raises(ValueError, match=r"is no log: the doctor reads \.jsonl"):
        read_log(written(tmp_path / "x.doc", [1]))


def test_infinities_are_seen_in_texts_of_numbers():
    """By their exponent, or by their digits; in a metric that no rule looks at."""
    for value, infinite in ((b"1e999", True), (b"1E+400", True), (b"9" * 400, True), (b"1e-999", False), (b"1e5", False),
                            (b"9" * 200, False), (b"-1e309", True)):  # fmt: skip
        assert Log([{"entropy": b"1.0", "x": value, "y": b"1e-06"}]).broken == ({"x": 1} if infinite else {})


def test_rows_of_ever_other_columns_are_not_remembered():
    log = Log({"entropy": 1.0, f"x{i}": 1.0} for i in range(500))
    assert len(log.found["entropy"][1]) == 500 and len(log._plans) <= 64 and len(log.columns) == 501


def test_only_the_table_of_metrics_can_be_read(trackio):
    database = _connect(trackio)
    _guard(database)
    assert len(database.execute("SELECT step FROM metrics").fetchall()) == 9
    for query in ("SELECT * FROM configs", "SELECT hex(step) FROM metrics", "SELECT * FROM sqlite_master",
                  "PRAGMA table_info(metrics)", "DELETE FROM metrics", "ATTACH ':memory:' AS a"):  # fmt: skip
        with pytest.raises(sqlite3.DatabaseError, match=r"not authorized|prohibited"):
            database.execute(query)
    database.close()


# ---- growth


@pytest.mark.parametrize("suffix", [".jsonl", ".log", ".csv", ".tfevents", ".db"])
def test_memory_and_reads_do_not_grow_faster_than_the_file(suffix, tmp_path):
    """Twice the rows take twice the rows read, and no more memory than 16 bytes for each value that is looked at."""
    import tracemalloc

    def make(count):
        path = tmp_path / f"{count}{suffix}"
        draw = random.Random(0)
        rows = [{"step": s, "entropy": draw.random(), "x": draw.random()} for s in range(count)]
        if suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif suffix == ".log":
            path.write_text(
                "".join(f"noise {s}\nstep:{s} - entropy:{r['entropy']} - x:{r['x']}\n" for s, r in enumerate(rows))
            )
        elif suffix == ".csv":
            out = io.StringIO()
            table = csv.DictWriter(out, ["step", "entropy", "x"])
            table.writeheader()
            table.writerows(rows)
            path.write_text(out.getvalue())
        elif suffix == ".tfevents":
            path.write_bytes(
                VERSION + b"".join(event(s % 128, entropy=r["entropy"], x=r["x"]) for s, r in enumerate(rows))
            )
        else:
            database = sqlite3.connect(path)
            database.execute("CREATE TABLE metrics (id INTEGER PRIMARY KEY, run_name TEXT, step INTEGER, metrics TEXT)")
            every = [(s, json.dumps(r)) for s, r in enumerate(rows)]
            database.executemany("INSERT INTO metrics (run_name, step, metrics) VALUES ('r', ?, ?)", every)
            database.commit()
            database.close()
        return path

    peaks = []
    for count in (500, 4000):
        log = read_log(make(count))
        assert sum(1 for _ in log) == count
        tracemalloc.start()
        for _ in log:
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0] + 50_000


def test_rows_of_a_log_can_be_read_again(tmp_path):
    rows = read_log(written(tmp_path / "a.jsonl", range(3)))
    assert isinstance(rows, LogRows) and list(rows) == list(rows)
