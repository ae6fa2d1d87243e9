"""Runs `bandpo` on files and writes what each run did: `python watched.py FOLDER < list of argument lists > results`.

An audit hook of Python sees imports, opened files, processes and connections, whoever makes them. CPU time and memory are those
beyond what a first run of each kind has loaded. A run that hangs is killed with the process.
"""

import contextlib
import io
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

FORBIDDEN = (
    "socket.connect", "socket.getaddrinfo", "socket.bind", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn",
    "os.fork",
    "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "shutil.rmtree", "urllib.Request", "pty.spawn",
)  # fmt: skip
LIMIT = 4 << 30  # bytes of address space beyond what is taken at the start: 8 TB are refused, not granted lazily


def watched(arguments: list[str], folder: str, main) -> dict:
    """One run: its status, what it printed, what it did, seconds and MiB."""
    events: list[str] = ACTIVE
    events.clear()
    out, error = io.StringIO(), io.StringIO()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory starts anew
    before, began = _memory("VmRSS"), time.process_time()
    signal.alarm(120)
    STATE["on"] = True
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            status = main(arguments)
    except BaseException as raised:  # what a shell would see as a traceback
        status = f"{type(raised).__name__}: {str(raised)[:200]}"
    finally:
        STATE["on"] = False
        signal.alarm(0)
    return {
        "status": status, "out": out.getvalue(), "error": error.getvalue(), "events": sorted(set(events))[:5],
        "seconds": time.process_time() - began, "megabytes": max(0, _memory("VmHWM") - before),
    }  # fmt: skip


ACTIVE: list[str] = []
STATE = {"on": False, "folder": ""}


def _hook(event: str, arguments: tuple) -> None:
    if not STATE["on"]:
        return
    if event == "import":
        name, file = str(arguments[0]), str(arguments[1] or "")
        if name.startswith(("planted_module", "evil", "configuration_x", "modeling_x")) or STATE["folder"] in file:
            ACTIVE.append(f"import {name}")
    elif event == "open":
        path, mode, flags = arguments
        writes = isinstance(mode, str) and any(c in mode for c in "wax+")
        if writes or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            ACTIVE.append(f"write {path}")
    elif event in FORBIDDEN:
        ACTIVE.append(f"{event} {str(arguments)[:100]}")


def _memory(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _bound() -> None:
    taken = int(_memory("VmSize") * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (taken + LIMIT, taken + LIMIT))


if __name__ == "__main__":
    import torch

    from bandpo.cli import main

    torch.set_num_threads(1)
    STATE["folder"] = sys.argv[1]
    sys.path.insert(0, sys.argv[1])
    sys.dont_write_bytecode = True
    sys.addaudithook(_hook)
    jobs = json.load(sys.stdin)
    for warm_up in jobs["first"]:
        watched(warm_up, sys.argv[1], main)
    _bound()
    for job in jobs["then"]:
        sys.__stdout__.write(json.dumps(watched(job, sys.argv[1], main)) + "\n")
        sys.__stdout__.flush()
