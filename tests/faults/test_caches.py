"""Caches: damage is mended, two makers make one, a killed one leaves nothing that stays, a full or locked disk is said."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from bandpo._system.cache import is_usable, sole_maker, store
from bandpo._system.errors import RunError
from bandpo._system.files import SEAL, damage, read_checked_json, write_checked_json
from bandpo.cli import main
from bandpo.lab.comparison import warmup
from bandpo.lab.comparison.warmup import Checkpoint, warmed_up
from bandpo.toy import models
from bandpo.toy.models import WarmUp, warmed_up_model

TINY = WarmUp(steps=1, hidden_size=16, layers=1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A place for it, and no learning, which takes most of the time."""
    monkeypatch.setenv("BANDPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_learn", lambda *_: None)
    return tmp_path / "cache"


def entries(cache):
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_dir())


@pytest.mark.parametrize(
    "harm",
    [
        lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-10]),
        lambda p: (p / "tokenizer.json").unlink(),
        lambda p: (p / SEAL).write_text("{}"),
        lambda p: (p / SEAL).write_text("[" * 100_000),
        lambda p: (p / SEAL).unlink(),
        lambda p: (p / SEAL).write_text(json.dumps({"../other": [0, 0]})),
        lambda p: (p / "config.json").write_text((p / "config.json").read_text().replace("16", "32", 1)),
    ],
)
def test_a_damaged_model_is_made_again_with_a_message(harm, cache):
    said = []
    path = warmed_up_model(TINY, say=said.append)
    before = (path / "model.safetensors").read_bytes()
    assert said == ["warming up a small model on countdown by supervised learning (once; cached)"]
    harm(path)
    assert damage(path) is not None
    assert warmed_up_model(TINY, say=said.append) == path
    assert "is not used: " in said[1] and "it is made again" in said[1] and len(said) == 3
    assert damage(path) is None and (path / "model.safetensors").read_bytes() == before
    assert warmed_up_model(TINY, say=said.append) == path and len(said) == 3
    assert entries(cache) == ["warmup", f"warmup/{path.name}"]


def test_the_lab_s_checkpoints_are_checked_too(cache, monkeypatch):
    both = [Checkpoint("paths", seed, hidden_size=16, layers=1, steps=1) for seed in (0, 1)]
    first = warmed_up(both, lambda _: None).weights
    weights = both[1].path / "weights.pt"
    weights.write_bytes(weights.read_bytes()[:-100])
    learned, said = [], []
    learn = warmup._learn
    monkeypatch.setattr(
        warmup, "_learn", lambda stack, made, problem: learned.extend(made) or learn(stack, made, problem)
    )
    again = warmed_up([*both, both[1]], said.append).weights
    assert learned == [both[1]] and len(said) == 1 and "weights.pt has" in said[0]
    for name, w in first.items():
        assert torch.allclose(again[name][:2], w, atol=1e-6) and torch.equal(again[name][1], again[name][2])


def test_two_makers_make_it_once_and_the_second_waits(monkeypatch):
    made, said, found = [], [], []

    def slow(*_):
        made.append(1)
        time.sleep(0.3)

    monkeypatch.setattr(models, "_learn", slow)
    threads = [threading.Thread(target=lambda: found.append(warmed_up_model(TINY, say=said.append))) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=60)
    assert made == [1] and found == [TINY.path] * 3
    assert sum("another process is making" in line for line in said) == 2


KILLED = """
import sys, time
from bandpo.toy import models
from bandpo.toy.models import WarmUp, warmed_up_model
def save(self, folder):
    (folder / "half").write_text("x")
    print("saving", flush=True)
    time.sleep(60)
models.PreTrainedTokenizerFast.save_pretrained = save
models._learn = lambda *_: None
warmed_up_model(WarmUp(steps=1, hidden_size=16, layers=1))
"""


def test_a_killed_warm_up_leaves_nothing_that_stays(cache):
    process = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    assert "saving" in process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert any(".making-" in name for name in entries(cache))
    path = warmed_up_model(TINY)
    assert damage(path) is None
    assert [p.name for p in (cache / "warmup").iterdir()] == [path.name]


def test_a_full_disk_is_one_message_and_leaves_nothing(cache, monkeypatch, capsys, tmp_path):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models.PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(RunError, match=r"cannot write .*countdown-\w+ \(OSError: .*No space left.*set BANDPO_CACHE"):
        warmed_up_model(TINY)
    assert [p for p in cache.rglob("*") if p.is_file()] == []
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--warm_up_steps", "1", "--output_dir", "run"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("bandpo: cannot write")
    assert not (tmp_path / "run").exists()


def test_a_cache_that_cannot_be_written_is_used_if_it_has_the_model(cache, monkeypatch):
    path = warmed_up_model(TINY)

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied", str(cache))

    monkeypatch.setattr(
        "bandpo._system.cache.waiting_claim", denied
    )  # root may write anywhere: stands in for a read-only disk
    assert warmed_up_model(TINY) == path
    learned = []
    monkeypatch.setattr(models, "_learn", lambda *_: learned.append(1))
    with pytest.raises(RunError, match="BANDPO_CACHE"):
        warmed_up_model(WarmUp(steps=2, hidden_size=16, layers=1))
    assert learned == []  # said before the work, not after it


def test_where_locks_do_not_hold_the_loser_uses_the_winner_s(cache):
    path = cache / "x"
    said = []
    with sole_maker(path, said.append):

        def save(folder):
            (folder / "data").write_text("loser")
            path.mkdir()
            store_by_another(path)

        store(path, save)
    assert is_usable(path, said.append) and said == []
    assert (path / "data").read_text() in ("winner", "loser")
    assert entries(cache) == ["x"]


def store_by_another(path):
    from bandpo._system.files import seal

    (path / "data").write_text("winner")
    seal(path)


def test_results_of_a_comparison_are_checked(tmp_path):
    path = tmp_path / "a.json"
    content = {"result": {"after": {"mean@4": 0.25}, "reward": [float("nan"), 0.5]}, "seconds": 1.5}
    write_checked_json(path, content)
    assert repr(read_checked_json(path)) == repr(content)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"0.25", b"0.95"))
    with pytest.raises(ValueError, match="has changed since it was written"):
        read_checked_json(path)
    path.write_text(json.dumps(content))  # as older versions wrote it
    assert read_checked_json(path)["seconds"] == 1.5
    assert os.listdir(tmp_path) == ["a.json"]
    assert isinstance(path, Path)
