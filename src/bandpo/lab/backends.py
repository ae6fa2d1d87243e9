"""Where the stacks of a study run: processes of this machine, or a Ray cluster. Both yield outcomes as they come."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from types import MappingProxyType
from typing import Any, TypeVar

Work = TypeVar("Work")
Made = TypeVar("Made")
Outcomes = Iterator[tuple[Work, Made | Exception]]
Backend = Callable[[Sequence[Any], Callable[[Any], Any], int], Iterator[tuple[Any, Any]]]


def processes(work: Sequence[Work], make: Callable[[Work], Made], workers: int) -> Outcomes[Work, Made]:
    """Spawned processes.

    Args:
        work: What to make.
        make: Makes one; a function of a module.
        workers: Processes.
    """
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(make, item): item for item in work}
        for future in as_completed(waiting):
            try:
                yield waiting[future], future.result()
            except Exception as error:  # of any kind: it belongs to this item, the others go on
                yield waiting[future], error


def ray_cluster(work: Sequence[Work], make: Callable[[Work], Made], workers: int) -> Outcomes[Work, Made]:
    """Tasks of one CPU on the cluster of `RAY_ADDRESS`, or on a local one with as many CPUs as workers.

    Results come back to the driver, so nodes need no common disk; a task whose node dies is tried again.

    Args:
        work: What to make.
        make: Makes one; bandpo must be installed on every node.
        workers: CPUs of a local cluster; at most so many tasks wait on a real one.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"--backend ray needs Ray: pip install 'bandpo[ray]' ({error})") from error
    own = not ray.is_initialized()
    if own:
        import os

        local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
        ray.init(log_to_driver=False, **local)
    try:
        task = ray.remote(num_cpus=1, max_retries=3)(make)
        waiting = {task.remote(item): item for item in work}
        while waiting:
            [ready], _ = ray.wait(list(waiting))
            item = waiting.pop(ready)
            try:
                yield item, ray.get(ready)
            except ray.exceptions.RayError as error:
                yield item, error
    finally:
        if own:
            ray.shutdown()


BACKENDS: Mapping[str, Backend] = MappingProxyType({"processes": processes, "ray": ray_cluster})
