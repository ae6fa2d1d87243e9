"""`bandpo doctor` on a stranger's files: it runs nothing, hangs on nothing, and prints nothing that a terminal acts on."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from bandpo._system.bounded import MAX_DEPTH, parse_json, parse_yaml, read_regular
from bandpo._system.errors import printable
from faults.hostile import ESCAPES, RUN, SECRET, TRL, VERL, listed, plant

# CPU time: the slowest file takes 1.4 s alone, and up to half as long again on a busy machine.
SECONDS, MEGABYTES = 3.0, 200.0


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Each file examined twice, as text and as JSON, in one process after a benign file of each kind."""
    folder, benign = tmp_path_factory.mktemp("hostile"), tmp_path_factory.mktemp("benign")
    hostile = plant(folder)
    (benign / "trl.yaml").write_text(yaml.safe_dump({**TRL, "model_name_or_path": "gpt2"}))
    (benign / "run.yaml").write_text(yaml.safe_dump(RUN))
    (benign / "verl.sh").write_text(f"{VERL}\n")
    (benign / "metrics.jsonl").write_text('{"entropy": 1.0}\n')
    (benign / "a.csv").write_text("entropy,reward\n1,2\n")
    (benign / "a.json").write_text('[{"entropy": 1.0}]')
    (benign / "a.log").write_text("step:1 - entropy:1.0\n")
    database = sqlite3.connect(benign / "a.db")
    database.execute("CREATE TABLE metrics (id INTEGER PRIMARY KEY, run_name TEXT, step INTEGER, metrics TEXT)")
    database.execute("INSERT INTO metrics VALUES (1, 'r', 1, '{\"entropy\": 1}')")
    database.commit()
    database.close()
    (benign / "a.parquet").write_bytes(b"PAR1")
    x = torch.linspace(-2, -1, 12).view(3, 4)
    batch = {"logprobs": x, "old_logprobs": x - 0.1, "advantages": torch.tensor([1.0, -1.0, 0.5])}
    torch.save(batch, benign / "batch.pt")
    import numpy as np
    from safetensors.torch import save_file

    save_file(batch, benign / "batch.safetensors")
    np.savez_compressed(benign / "batch.npz", **{k: v.numpy() for k, v in batch.items()})
    before = sorted(str(p) for p in folder.rglob("*"))
    jobs = {
        "first": [["doctor", str(p)] for p in sorted(benign.iterdir())] * 2,
        "then": [["doctor", str(h.path), *json_] for h in hostile for json_ in ([], ["--json"])],
    }
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_TOKEN")} | {
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRL_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "watched.py"), str(folder)],
        input=json.dumps(jobs), capture_output=True, text=True, cwd=tmp_path_factory.mktemp("elsewhere"), env=environment,
        timeout=900,
    )  # fmt: skip
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(lines) == len(jobs["then"]), (len(lines), jobs["then"][len(lines)], ran.stderr[-2000:])
    assert sorted(str(p) for p in folder.rglob("*")) == before  # no `pwned`, no output_dir
    return {h.name: (h, lines[2 * i], lines[2 * i + 1]) for i, h in enumerate(hostile)}


NAMES = [hostile.name for hostile in listed(Path("somewhere"))]


def test_there_are_enough_of_them():
    assert len(NAMES) == len(set(NAMES))
    assert len(NAMES) > 150


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_file(name, results):
    hostile, text, as_json = results[name]
    for result in (text, as_json):
        assert result["status"] in (0, 1, 2), result["status"]
        assert result["events"] == []
        assert result["seconds"] < SECONDS
        assert result["megabytes"] < MEGABYTES
        printed = result["out"] + result["error"]
        assert all(c.isprintable() or c == "\n" for c in printed)
        assert "Traceback" not in printed and SECRET not in printed
        assert len(printed) < 100_000
    assert text["status"] == as_json["status"]
    if text["status"] == 2:
        assert text["out"] == ""
        assert text["error"].startswith("bandpo: ") and text["error"].count("\n") == 1
    else:
        assert text["error"] == ""
        for section in json.loads(as_json["out"]):
            for finding in section["findings"]:
                assert all(line.isprintable() for line in [finding["seen"], finding["cause"], *finding["details"]])
    if hostile.kind == "special":
        assert text["status"] == 2


def test_a_named_import_is_unread_and_its_region_not_judged(results):
    for name in ("trl_objective", "run_objective", "sh_loss_mode", "sh_objective", "run_code"):
        _, text, _ = results[name]
        assert "is the path of an import, and nothing is imported" in " ".join(text["out"].split())
        assert "not known: which loss runs" in text["out"]
        assert "ok interval" not in text["out"]


def test_of_a_model_only_the_number_of_words_is_read(results):
    """That of config.json as plain JSON: with a micro-batch of 8 x 256 tokens, 2048 x 1000 logits."""
    for name in ("trl_model_name_or_path", "run_model"):
        _, text, _ = results[name]
        assert "x 1000 words" in " ".join(text["out"].split())


def test_what_is_no_regular_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for path, follow, message in (
        (tmp_path / "pipe", True, "is a pipe"), (tmp_path, True, "is a folder"), (Path("/dev/zero"), True, "is a device"),
        (tmp_path / "link", False, "is a symbolic link, not a regular file; name the file"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            read_regular(path, 10, follow=follow)
    assert read_regular(tmp_path / "link", 10) == b"x"
    (tmp_path / "file").write_text("xx")
    with pytest.raises(ValueError, match="more than 1 bytes"):
        read_regular(tmp_path / "file", 1)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "nowhere")


def test_what_people_write_in_yaml_is_read_as_before():
    assert parse_yaml("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}\nf: [*x, *x]", "t") == {
        "a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}, "f": [{"b": 1}, {"b": 1}],
    }  # fmt: skip
    assert parse_yaml("a: 1e-6\nb: 1.0e-6\nc: 0x10\nd: 2024-05-01\ne: .inf\nf: ~", "t") == {
        "a": "1e-6", "b": 1e-6, "c": 16, "d": "2024-05-01", "e": float("inf"), "f": None,
    }  # fmt: skip
    assert parse_yaml("a: " + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1), "t")
    with pytest.raises(ValueError, match="t has values nested deeper than 50"):
        parse_yaml("a: " + "[" * MAX_DEPTH + "]" * MAX_DEPTH, "t")
    assert parse_json('{"a": 12345678901234567890}', "t") == {"a": 12345678901234567890}
    assert parse_json("9" * 4000, "t") == float("inf")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "t, line 3: the key 'a' is there twice (first in line 1); keep one of the two"),
        ("x:\n  - {b: 1, c: 2,\n     b: 1}\n", "t, line 3: the key 'b' is there twice (first in line 2)"),
        ("'a': 1\na: 1\n", "line 2: the key 'a' is there twice"),
        ("1: a\n0x1: b\n", "line 2: the key '0x1' is there twice"),
        ("x: &x {a: 1}\ny:\n  <<: *x\n  a: 2\n  a: 3\n", "line 5: the key 'a' is there twice (first in line 4)"),
        ("? {a: 1, a: 2}\n: b\n", "the key 'a' is there twice"),
    ],
)  # fmt: skip
def test_a_key_that_is_there_twice_is_refused_with_its_line(text, message):
    """YAML's own reader keeps the last value in silence."""
    with pytest.raises(ValueError, match=r"^t, line \d+: the key ") as error:
        parse_yaml(text, "t")
    assert message in str(error.value)


def test_the_same_key_in_another_mapping_and_a_key_that_replaces_a_merged_one_are_read():
    text = "a: &a {k: 1, x: 1}\nb: &b {<<: *a, k: 2}\nc: {<<: *b, k: 3}\nd: {<<: *a, <<: *b}\n"
    text += "e: [{k: 1}, {k: 2}]\n1: i\n'1': s\n"
    assert parse_yaml(text, "t") == {
        "a": {"k": 1, "x": 1}, "b": {"k": 2, "x": 1}, "c": {"k": 3, "x": 1}, "d": {"k": 2, "x": 1},
        "e": [{"k": 1}, {"k": 2}], 1: "i", "1": "s",
    }  # fmt: skip


def test_json_of_a_configuration_has_each_key_once():
    text = '{"a": {"delta": 0.1, "b": 2, "delta": 0.1}}'
    with pytest.raises(ValueError, match=r"^t: the key 'delta' is there twice; keep one of the two$"):
        parse_json(text, "t", unique=True)
    assert parse_json(text, "t") == {"a": {"delta": 0.1, "b": 2}}
    assert parse_json('{"a": {"k": 1}, "b": [{"k": 2}, {"k": 3}]}', "t", unique=True) == {
        "a": {"k": 1}, "b": [{"k": 2}, {"k": 3}],
    }  # fmt: skip


def test_escapes_are_written_out():
    assert printable(ESCAPES).isprintable()
    assert printable("δ ≤ 0.05 日本 é") == "δ ≤ 0.05 日本 é"
    assert printable("a\nb", keep="\n") == "a\nb"
