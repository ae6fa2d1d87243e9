"""Processes of a comparison: one that is killed takes nothing else with it, and none is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bandpo._system.errors import RunError
from bandpo.lab.backends import WorkError, full_traceback, processes, ray_cluster


def make(item):
    """What a worker does: `square`, or what goes wrong."""
    what, value, place = item
    if what == "square":
        return value**2
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "die once":
        mark = Path(place) / "died"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return "second try"
    if what == "raise":
        raise KeyError("mine")
    if what == "exit":
        sys.exit(0)
    if what == "end":
        os._exit(5)
    if what == "unsendable":
        return lambda: None
    if what == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        (Path(place) / f"{os.getpid()}.pid").touch()
        (Path(place) / f"{child.pid}.pid").touch()
        time.sleep(300)
    raise AssertionError(what)


def test_each_failure_stays_where_it_happened(tmp_path):
    kinds = ("square", "die", "raise", "exit", "die once", "end", "unsendable", "square")
    work = [(kind, i, str(tmp_path)) for i, kind in enumerate(kinds)]
    said = []
    found = {item[1]: made for item, made in processes(work, make, 2, said.append)}
    assert (found[0], found[7], found[4]) == (0, 49, "second try")
    messages = {i: str(made) for i, made in found.items() if isinstance(made, WorkError)}
    assert set(messages) == {1, 2, 3, 5, 6}
    assert messages[1] == "its process was killed by SIGKILL, 2 times; with fewer --jobs each has more memory"
    assert messages[5].startswith("its process ended with status 5, 2 times")
    assert messages[2] == "KeyError('mine')" and "in make" in found[2].__notes__[0]
    assert "in make" in full_traceback(found[2])
    assert messages[3] == "SystemExit(0)"
    assert "pickle" in messages[6]
    assert len(said) == 3 and "its work is tried once more" in said[0]


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
sys.path[:0] = [{place!r}]
from test_backends import make
from bandpo.lab.backends import processes
if __name__ == "__main__":
    list(processes([("child", i, sys.argv[1]) for i in range(2)], make, 2))
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nobody_is_left_when_the_parent_ends(tmp_path, ending):
    """Two workers, each with a process of its own, and a parent that is killed, interrupted or asked to end."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(place=str(Path(__file__).parent)))
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while len(list(tmp_path.glob("*.pid"))) < 4:
        assert parent.poll() is None and time.monotonic() - began < 120
        time.sleep(0.05)
    children = [int(p.stem) for p in tmp_path.glob("*.pid")]
    assert all(map(alive, children))
    parent.send_signal(ending)
    assert parent.wait(timeout=60) != 0
    while any(map(alive, children)):
        assert time.monotonic() - began < 180
        time.sleep(0.05)


def reserved(item):
    """The GPUs that Ray gives to a task."""
    import ray

    return item, len(ray.get_gpu_ids()), ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0)


def test_ray_reserves_a_share_of_a_gpu_and_refuses_where_there_is_none():
    """A resource is a number to Ray, so that a cluster can claim a GPU on a machine without one."""
    ray = pytest.importorskip("ray")
    with pytest.raises(RunError, match=r"asks for 0\.5 of a GPU, and Ray's cluster has none.*--device cpu"):
        next(ray_cluster([1], reserved, 1, gpus=0.5))
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    try:
        found = [made for _, made in ray_cluster([1, 2], reserved, 2, gpus=0.5)]
        assert sorted(found) == [(1, 1, 0.5), (2, 1, 0.5)]
    finally:
        ray.shutdown()


def test_work_is_done_in_the_folder_of_the_caller(tmp_path, monkeypatch):
    """So that a module in the current folder is found in every process."""
    monkeypatch.chdir(tmp_path)
    assert [made for _, made in processes(["."], os.path.abspath, 1)] == [str(tmp_path)]
    ray = pytest.importorskip("ray")
    monkeypatch.chdir("/")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)  # its workers start in another folder
    try:
        monkeypatch.chdir(tmp_path)
        assert [made for _, made in ray_cluster(["."], os.path.abspath, 1)] == [str(tmp_path)]
    finally:
        ray.shutdown()


def test_ray_that_does_not_start_is_one_clear_error(monkeypatch):
    ray = pytest.importorskip("ray")

    def fail(**_):
        raise ConnectionError("no cluster\nat all")

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(RunError, match=r"Ray could not start on this machine \(ConnectionError: no cluster at all\)"):
        next(ray_cluster([1], abs, 1))
    monkeypatch.setenv("RAY_ADDRESS", "ray://nowhere:1")
    with pytest.raises(RunError, match=r"reach the cluster at RAY_ADDRESS=ray://nowhere:1 .*--backend processes"):
        next(ray_cluster([1], abs, 1))
