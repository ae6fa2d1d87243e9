"""Backends that spread work over processes of this machine or over a Ray cluster, and yield each outcome once it is made."""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from types import MappingProxyType
from typing import Any, TypeVar, cast

from bandpo._system.errors import RunError
from bandpo._system.secrets import redact_text

Work = TypeVar("Work")
Made = TypeVar("Made")
Outcomes = Iterator[tuple[Work, Made | Exception]]
Say = Callable[[str], Any]
Backend = Callable[[Sequence[Any], Callable[[Any], Any], int, Say], Iterator[tuple[Any, Any]]]

_TRIES = 2  # how often work is tried whose process dies
_PATIENCE = 5.0  # seconds in which a process whose pipe is closed may end by itself


class WorkError(Exception):
    """The error of work that raised, or whose process died.

    Args:
        message: The error in one line.
        trace: Traceback in the worker process, kept as a note of the error; empty if the process died.
    """

    __notes__: list[str]

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        if trace:
            self.__notes__ = [trace]  # `add_note` without the need for Python 3.11


def full_traceback(error: Exception) -> str:
    """The traceback of an error with its notes, which Python prints by itself from 3.11 on."""
    lines = traceback.format_exception(error)
    if sys.version_info < (3, 11):
        lines += getattr(error, "__notes__", [])
    return "".join(lines)


def processes(
    work: Sequence[Work], make: Callable[[Work], Made], workers: int, say: Say = print
) -> Outcomes[Work, Made]:
    """Spread work over spawned processes, each with a session of its own.

    If a process dies, for example because it was killed for its memory, only its own work is affected: it is tried once more in
    a new process. However the calling process ends, no worker process is left running.

    Args:
        work: The items of work.
        make: Function of a module that makes one item.
        workers: Number of processes.
        say: Function that is called with a message for each process that dies.

    Yields:
        Each item with its outcome, or with the error that it met.
    """
    waiting, tries = deque(range(len(work))), Counter[int]()
    busy: list[_Worker] = []
    idle: list[_Worker] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                number = waiting.popleft()
                tries[number] += 1
                busy.append(worker := idle.pop() if idle else _Worker(make))
                worker.give(number, work[number])
            ready = wait([x for w in busy for x in (w.pipe, w.process.sentinel)])
            for worker in [w for w in busy if w.pipe in ready or w.process.sentinel in ready]:
                busy.remove(worker)
                try:
                    outcome = worker.take()
                except EOFError:  # the process is dead
                    how = worker.end(patience=_PATIENCE)
                    if tries[worker.number] < _TRIES:
                        say(f"  a process {how}: its work is tried once more")
                        waiting.append(worker.number)
                        continue
                    outcome = WorkError(f"its process {how}, {_TRIES} times; with fewer --jobs each has more memory")
                else:
                    idle.append(worker)
                yield work[worker.number], outcome
    finally:
        for worker in (*busy, *idle):
            worker.end()


class _Worker:
    """A process that makes one item after the other.

    Args:
        make: Function that makes one item.
    """

    def __init__(self, make: Callable[[Any], Any]) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        self.process.start()
        theirs.close()  # now only the process has this end, so that its death is seen as the end of the pipe
        self.number = 0

    def give(self, number: int, item: Any) -> None:
        """Send an item of work to the process."""
        self.number = number
        with contextlib.suppress(OSError):  # the process has died; `take` reports it
            self.pipe.send(item)

    def take(self) -> Any:
        """The outcome of the last item, or the error that it met.

        Raises:
            EOFError: If the process is dead.
        """
        try:
            made, error, trace = self.pipe.recv()
        except EOFError:
            raise
        except OSError as broken:
            raise EOFError from broken
        except Exception as broken:  # the outcome cannot be unpickled here
            return broken
        return made if error is None else WorkError(error, trace)

    def end(self, patience: float = 0.0) -> str:
        """Kill the process and the processes that it started.

        Args:
            patience: Seconds in which it may end by itself.

        Returns:
            How it ended, for a message.
        """
        wait([self.process.sentinel], patience)
        if hasattr(os, "killpg"):  # before `join`: until then the system gives its process number to no other
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it has not made its session yet
                os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        code = self.process.exitcode or 0
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _serve(pipe: Connection, make: Callable[[Any], Any]) -> None:
    """The main loop of a worker process."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C goes to the parent only, and what this process starts can be killed with it
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        try:
            outcome = (make(item), None, "")
        except BaseException as error:  # also sys.exit: it is the outcome of this item alone
            outcome = (None, redact_text(repr(error)), redact_text(traceback.format_exc()))
        try:
            pipe.send(outcome)
        except OSError:
            return
        except Exception as error:  # the outcome cannot be pickled
            pipe.send((None, redact_text(repr(error)), redact_text(traceback.format_exc())))


def _end_with_the_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def ray_cluster(
    work: Sequence[Work], make: Callable[[Work], Made], workers: int, say: Say = print, *, gpus: float = 0.0
) -> Outcomes[Work, Made]:
    """Spread work over tasks of one CPU on the cluster of `RAY_ADDRESS`, or on a local one with as many CPUs as workers.

    Results come back to the driver, so that nodes need no common disk. A task whose process or node dies is tried again. A task
    runs in the folder of the driver where its node has one of that path, and finds the modules there.

    Args:
        work: The items of work.
        make: Function that makes one item; bandpo must be installed on every node.
        workers: Number of CPUs of a local cluster; the size of a real one is its own.
        say: Function that is called with a message for each task that Ray gives up.
        gpus: Share of a GPU that each task reserves; Ray hides all GPUs from a task that reserves none.

    Yields:
        Each item with its outcome, or with the error that it met.

    Raises:
        ImportError: If Ray is not installed.
        RunError: If Ray cannot be started or reached, or has no GPU to reserve.
    """
    try:
        ray = cast(Any, import_module("ray"))
    except ImportError as error:
        raise ImportError(f"--backend ray needs Ray: pip install 'bandpo[ray]' ({error})") from error
    own = not ray.is_initialized()
    if own:
        address = os.environ.get("RAY_ADDRESS")
        local: dict[str, Any] = {} if address else {"num_cpus": workers, "include_dashboard": False}
        try:
            ray.init(log_to_driver=False, **local)
        except Exception as error:  # Ray raises errors of many types
            where = f"reach the cluster at RAY_ADDRESS={address}" if address else "start on this machine"
            raise RunError(
                f"Ray could not {where} ({type(error).__name__}: {' '.join(str(error).split())[:300]}); repair that, or use "
                "--backend processes"
            ) from error
    try:
        if gpus > ray.cluster_resources().get("GPU", 0):  # the tasks would wait for ever
            raise RunError(
                f"each task asks for {gpus:g} of a GPU, and Ray's cluster has none; start it on nodes with a GPU, or use "
                "--device cpu"
            )
        folder = os.getcwd()

        def make_there(item: Work) -> Made:
            with contextlib.suppress(OSError):  # another node may not have it
                os.chdir(folder)
            return make(item)

        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(make_there)
        waiting = {task.remote(item): item for item in work}
        while waiting:
            [ready], _ = ray.wait(list(waiting))
            item = waiting.pop(ready)
            try:
                yield item, ray.get(ready)
            except ray.exceptions.RayTaskError as error:  # the work raised
                yield item, error
            except ray.exceptions.RayError as error:
                say(f"  Ray gave a task up after its retries: {type(error).__name__}")
                yield item, error
    finally:
        if own:
            ray.shutdown()


BACKENDS: Mapping[str, Backend] = MappingProxyType({"processes": processes, "ray": ray_cluster})
"""The backends by name."""
