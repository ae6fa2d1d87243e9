"""bandpo as its user runs it: another process, either new or forked from one that has its imports behind it."""

import atexit
import functools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

LIMIT = 300
"""Seconds after which a command counts as hanging."""


def bandpo(*arguments, **kwargs):
    """`python -m bandpo ARGUMENTS` in a new process."""
    return subprocess.run(
        [sys.executable, "-m", "bandpo", *arguments],
        capture_output=True, text=True, check=False, timeout=LIMIT, **kwargs,
    )  # fmt: skip


def warm_bandpo(*arguments, cwd, env=None):
    """The same command, in a fork of a process that has imported what `bandpo train` imports: seconds less for each."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        environment = {**os.environ, **(env or {})}
        request = {"arguments": arguments, "cwd": str(cwd), "env": environment, "out": str(out), "err": str(err)}
        server = _server()
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        with selectors.DefaultSelector() as ready:
            ready.register(server.stdout, selectors.EVENT_READ)
            answered = ready.select(LIMIT)
        if not answered:
            _end()
            raise subprocess.TimeoutExpired(arguments, LIMIT)
        return subprocess.CompletedProcess(arguments, int(server.stdout.readline()), out.read_text(), err.read_text())


@functools.cache
def _server():
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("warm_process.py"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    atexit.register(server.stdin.close)  # at the end of its input the process ends
    return server


def _end():
    os.killpg(_server().pid, signal.SIGKILL)
    _server().wait()
    _server.cache_clear()
