"""Where the stacks of a study run: processes of this machine, or a Ray cluster. Both yield outcomes as they come."""

import contextlib
import os
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from types import MappingProxyType
from typing import Any, TypeVar

from bandpo._system.errors import RunError
from bandpo._system.secrets import redact_text

Work = TypeVar("Work")
Made = TypeVar("Made")
Outcomes = Iterator[tuple[Work, Made | Exception]]
Say = Callable[[str], Any]
Backend = Callable[[Sequence[Any], Callable[[Any], Any], int, Say], Iterator[tuple[Any, Any]]]

_TRIES = 2  # of work whose process dies


class WorkError(Exception):
    """Work that raised, with the traceback of its process as a note; or whose process died."""


def processes(
    work: Sequence[Work], make: Callable[[Work], Made], workers: int, say: Say = print
) -> Outcomes[Work, Made]:
    """Spawned processes, each with a session of its own.

    A process that dies, such as one killed for memory, affects its own work only, which is tried once more in a new process. No
    process is left running, however this one ends.

    Args:
        work: What to make.
        make: Makes one; a function of a module.
        workers: Processes.
        say: Takes a message for each process that dies.
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
                except EOFError:  # it is dead
                    how = worker.end(patience=5.0)
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
    """A process that makes one thing after the other.

    Args:
        make: Makes one.
    """

    def __init__(self, make: Callable[[Any], Any]) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        self.process.start()
        theirs.close()  # now only the process has it, and its end is seen as the end of the pipe
        self.number = 0

    def give(self, number: int, item: Any) -> None:
        """Work to do."""
        self.number = number
        with contextlib.suppress(OSError):  # it has died; `take` says so
            self.pipe.send(item)

    def take(self) -> Any:
        """What it made, or the error that it met.

        Raises:
            EOFError: If it is dead.
        """
        try:
            made, error, trace = self.pipe.recv()
        except EOFError:
            raise
        except OSError as broken:
            raise EOFError from broken
        except Exception as broken:  # what it made cannot be read here
            return broken
        if error is None:
            return made
        found = WorkError(error)
        found.add_note(trace)
        return found

    def end(self, patience: float = 0.0) -> str:
        """Kill it, and what it started; how it ended.

        Args:
            patience: Seconds that it has to end by itself.
        """
        wait([self.process.sentinel], patience)
        if hasattr(os, "killpg"):  # before it is waited for: until then its number is not given to another
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it had not made its session yet
                os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        code = self.process.exitcode or 0
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _serve(pipe: Connection, make: Callable[[Any], Any]) -> None:
    """The life of a worker."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C is the parent's; what this process starts can be ended with it
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        try:
            outcome = (make(item), None, "")
        except BaseException as error:  # of any kind, sys.exit too: it is the outcome of this item alone
            outcome = (None, redact_text(repr(error)), redact_text(traceback.format_exc()))
        try:
            pipe.send(outcome)
        except OSError:
            return
        except Exception as error:  # what was made cannot be sent
            pipe.send((None, redact_text(repr(error)), redact_text(traceback.format_exc())))


def _end_with_the_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def ray_cluster(
    work: Sequence[Work], make: Callable[[Work], Made], workers: int, say: Say = print
) -> Outcomes[Work, Made]:
    """Tasks of one CPU on the cluster of `RAY_ADDRESS`, or on a local one with as many CPUs as workers.

    Results come back to the driver, so nodes need no common disk; a task whose process or node dies is tried again.

    Args:
        work: What to make.
        make: Makes one; bandpo must be installed on every node.
        workers: CPUs of a local cluster; at most so many tasks wait on a real one.
        say: Takes a message for each task that Ray gives up.

    Raises:
        RunError: If Ray cannot be started or reached.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"--backend ray needs Ray: pip install 'bandpo[ray]' ({error})") from error
    own = not ray.is_initialized()
    if own:
        address = os.environ.get("RAY_ADDRESS")
        local = {} if address else {"num_cpus": workers, "include_dashboard": False}
        try:
            ray.init(log_to_driver=False, **local)
        except Exception as error:  # Ray raises many kinds
            where = f"reach the cluster at RAY_ADDRESS={address}" if address else "start on this machine"
            raise RunError(
                f"Ray could not {where} ({type(error).__name__}: {' '.join(str(error).split())[:300]}); mend that, or use "
                "--backend processes"
            ) from error
    try:
        task = ray.remote(num_cpus=1, max_retries=3)(make)
        waiting = {task.remote(item): item for item in work}
        while waiting:
            [ready], _ = ray.wait(list(waiting))
            item = waiting.pop(ready)
            try:
                yield item, ray.get(ready)
            except ray.exceptions.RayTaskError as error:  # it raised
                yield item, error
            except ray.exceptions.RayError as error:
                say(f"  Ray gave a task up after its retries: {type(error).__name__}")
                yield item, error
    finally:
        if own:
            ray.shutdown()


BACKENDS: Mapping[str, Backend] = MappingProxyType({"processes": processes, "ray": ray_cluster})
