"""Folders and caches that one process holds at a time: killed holders, threads, file systems without locks."""

import errno
import json
import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bandpo._system import locks as _locks
from bandpo._system.files import read_jsonl, write_jsonl, write_text
from bandpo._system.locks import LOCK, Claim, InUseError, released, waiting_claim

HOLD = """
import sys, time
from pathlib import Path
from bandpo._system.locks import Claim
claim = Claim(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_another_process_is_refused_by_name_and_a_killed_one_blocks_nobody(holder, tmp_path):
    with pytest.raises(InUseError, match=rf"run is in use by process {holder.pid}; wait until it has ended, or choose"):
        Claim(tmp_path / "run")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK).exists()  # it had no time to tidy up
    with released(Claim(tmp_path / "run")):
        pass
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_claim_that_nothing_came_of_leaves_no_folder(tmp_path):
    claim = Claim(tmp_path / "a" / "b" / "run")
    assert (tmp_path / "a" / "b" / "run").is_dir()
    claim.release()
    claim.release()
    assert list(tmp_path.iterdir()) == []
    with released(Claim(tmp_path / "a" / "run")):
        (tmp_path / "a" / "run" / "config.yaml").touch()
    assert [p.name for p in (tmp_path / "a" / "run").iterdir()] == ["config.yaml"]


def test_threads_of_one_process_see_each_other_and_wait(tmp_path):
    inside, most, waits = [], [], []

    def work():
        claim = waiting_claim(tmp_path, ".x.lock", lambda: waits.append(1))
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.02)
        inside.pop()
        claim.release()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=30)
    assert most == [1] * 6
    assert waits  # some had to wait
    with released(Claim(tmp_path)), pytest.raises(InUseError):
        Claim(tmp_path)


def test_a_child_that_is_forked_holds_nothing(tmp_path):
    with released(Claim(tmp_path)):
        child = os.fork()
        if child == 0:
            try:
                Claim(tmp_path)
            except InUseError:
                os._exit(3)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


@pytest.fixture
def no_locks(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(_locks.fcntl, "lockf", refuse)


def me(**changes):
    return {**_locks._myself(), **changes}


@pytest.mark.parametrize(
    ("holder", "free"),
    [
        ({"process": 2**22 + 7}, True),  # no such process
        ({"boot": "another"}, True),  # the machine was started again
        ({"started": "1"}, True),  # the number was given to another process
        ({"host": "elsewhere"}, False),  # cannot be told from here
        ({}, False),
    ],
)
def test_without_locks_of_the_system_the_file_says_who_holds_it(no_locks, holder, free, tmp_path):
    (tmp_path / LOCK).write_text(json.dumps(me(**holder)))
    if free:
        with released(Claim(tmp_path)):
            assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    else:
        with pytest.raises(InUseError, match="in use by process"):
            Claim(tmp_path)
    if "host" in holder:
        with pytest.raises(InUseError, match="on 'elsewhere'"):
            Claim(tmp_path)
    assert platform.node() == me()["host"]


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic links"):
        Claim(tmp_path / "run")
    assert (tmp_path / "target").read_text() == "precious"


RACE = """
import sys, time
from pathlib import Path
from bandpo._system.locks import Claim, InUseError
folder = Path(sys.argv[1])
while not (folder.parent / "go").exists():
    pass
wins = 0
while wins < 40:
    try:
        claim = Claim(folder)
    except InUseError:
        continue
    (folder / "inside").mkdir()  # fails if another is inside
    (folder / "inside").rmdir()
    wins += 1
    claim.release()
"""


def test_of_several_processes_one_is_inside_and_the_folder_may_come_and_go(tmp_path):
    command = [sys.executable, "-c", RACE, str(tmp_path / "run")]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    (tmp_path / "go").touch()
    found = [r.communicate(timeout=60) for r in racers]
    assert [r.returncode for r in racers] == [0, 0, 0], found
    assert not list((tmp_path / "run").glob("*"))


WRITE = """
import sys
from pathlib import Path
from bandpo._system.files import write_text
for i in range(150):
    write_text(Path(sys.argv[1]), sys.argv[2] * 5000)
"""


def test_writers_of_one_file_do_not_meet(tmp_path):
    """Two processes, then eight threads: each file is one writer's whole text, no error, nothing left beside it."""
    path = tmp_path / "a.txt"
    writers = [subprocess.Popen([sys.executable, "-c", WRITE, str(path), x], stderr=subprocess.PIPE) for x in "ab"]
    found = [w.communicate(timeout=60) for w in writers]
    assert [w.returncode for w in writers] == [0, 0], found
    errors = []

    def write(letter):
        try:
            for _ in range(40):
                write_text(path, letter * 5000)
                assert len(set(path.read_text())) == 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(x,)) for x in "abcdefgh"]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=60)
    assert errors == []
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_in_the_place_of_a_file_is_replaced_and_a_lone_surrogate_is_kept(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "target")
    rows = [{"text": "half \ud83d of a pair", "other": "\u2028"}]  # what JSON files of others, and models, have
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert (tmp_path / "target").read_text() == "precious"
    assert read_jsonl(Path(tmp_path / "rows.jsonl")) == rows


def test_a_folder_that_is_taken_away_between_two_looks_is_made_again(tmp_path, monkeypatch):
    """Found by fuzzing: mkdir says that it exists, and by the next look its last holder has removed it."""
    folder, calls, mkdir = tmp_path / "folder", [], Path.mkdir

    def first_time_there(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 1:
            raise FileExistsError(17, "File exists", str(self))
        return mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", first_time_there)
    claim = Claim(folder)
    assert folder.is_dir() and len(calls) == 2
    claim.release()
    folder.write_text("a file")
    with pytest.raises(FileExistsError):
        Claim(folder)
    folder.unlink()
    folder.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="leads nowhere"):
        Claim(folder)
