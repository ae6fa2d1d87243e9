"""The runs of a comparison and their results: every arm goes through the same code, with the same budget and the same seeds.

Work is cut into stacks of runs that share a setting. Each run leaves one JSON file, named by the hash of its configuration, so
that a comparison that was interrupted or is extended makes only the missing runs. A stack that fails is made again arm by arm;
an arm that fails leaves a file with its error, and the others are still made.
"""

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bandpo._system.files import read_checked_json, write_checked_json, write_text
from bandpo._system.secrets import redact_text
from bandpo.lab.backends import BACKENDS, full_traceback, ray_cluster
from bandpo.lab.comparison.devices import device_kind
from bandpo.lab.comparison.loop import Loop, Run, Setting
from bandpo.lab.comparison.own import is_own, with_definitions
from bandpo.lab.comparison.plan import TUNING_SEEDS, Arm, Job, Plan, jobs_of, tuning_arms
from bandpo.objective import Objective

_STACK = 12  # the most runs in one stack


class Study:
    """Makes the runs of a comparison and reads their results.

    Args:
        folder: Folder of the comparison; the results are in its subfolder `runs`, one file for each run.
        workers: Number of worker processes.
        say: Function that is called with each line of the progress.
        backend: A name in `BACKENDS`.
    """

    def __init__(
        self, folder: Path, workers: int = 2, say: Callable[[str], None] = print, backend: str = "processes"
    ) -> None:
        self.folder, self.workers, self.say, self.backend = folder, workers, say, BACKENDS[backend]
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        self.failures: list[str] = []

    def result(self, job: Job) -> dict[str, Any] | None:
        """The result of a run, or None if the run is still to be made."""
        found = self._read(job)
        return found["result"] if found else None

    def core_parts(self, jobs: Iterable[Job]) -> dict[str, float]:
        """The core seconds of the existing results of these jobs by part, over all sessions in which they were made.

        Args:
            jobs: The runs.

        Returns:
            Seconds of the parts of `run_stack`; those of results that an earlier version made are under `not recorded`.
        """
        total: dict[str, float] = {}
        for job in dict.fromkeys(jobs):
            if (found := self._read(job)) is not None:
                for name, seconds in (found["parts"] or {"not recorded": found["seconds"]}).items():
                    total[name] = total.get(name, 0.0) + seconds
        return total

    def core_seconds(self, jobs: Iterable[Job]) -> float:
        """The seconds that the existing results of these jobs took, over all sessions in which they were made."""
        return sum(self.core_parts(jobs).values())

    def _read(self, job: Job) -> dict[str, Any] | None:
        path = self.folder / "runs" / f"{job.key}.json"
        if not path.exists():
            return None
        try:
            found = read_checked_json(path)
            return {"result": found["result"], "seconds": found["seconds"], "parts": found.get("parts")}
        except (ValueError, KeyError, TypeError):
            self.say(f"  {path} is damaged: the run is made again")
            path.unlink()
            return None

    def run(self, jobs: Sequence[Job], what: str) -> None:
        """Make the results that are missing.

        Args:
            jobs: The runs that shall have a result.
            what: Name of this part of the comparison, for the progress.
        """
        if not jobs:
            return
        missing = [job for job in dict.fromkeys(jobs) if self.result(job) is None]
        self.say(f"{what}: {len(jobs)} runs, {len(missing)} to make")
        started, done = time.monotonic(), 0
        stacks = self._stacks(missing)
        while stacks:
            again: list[list[Job]] = []
            for stack, made in self._made(stacks):
                arms = _by_arm(stack)
                if isinstance(made, Exception) and len(arms) > 1:
                    self.say(
                        redact_text(
                            f"  {stack[0].arm.label} and others failed ({made}); they are made again arm by arm"
                        )
                    )
                    again += arms
                    continue
                self._keep(stack, made, what)
                done += len(stack)
                left = (time.monotonic() - started) * (len(missing) - done) / done
                self.say(f"  {done}/{len(missing)} runs, about {left / 60:.1f} min left")
            stacks = again

    def _stacks(self, jobs: Sequence[Job]) -> list[list[Job]]:
        """Jobs that share a setting, cut into stacks; an own objective is in no stack with another objective."""
        groups: dict[tuple[Setting, str], list[Job]] = {}
        for job in jobs:
            alone = job.arm.objective if is_own(job.arm.objective) else ""
            groups.setdefault((job.setting, alone), []).append(job)
        stacks: list[list[Job]] = []
        for group in groups.values():
            size = min(_STACK, math.ceil(len(group) / self.workers))
            stacks += [group[i : i + size] for i in range(0, len(group), size)]
        return stacks

    def _made(self, stacks: list[list[Job]]) -> Iterator[tuple[list[Job], list[dict[str, Any]] | Exception]]:
        """Each stack with its results, or with the error that it met."""
        jobs = [job for stack in stacks for job in stack]
        make = with_definitions(run_stack, {job.arm.objective for job in jobs})
        backend = self.backend
        if backend is ray_cluster and any(device_kind(job.setting.device) == "cuda" for job in jobs):
            backend = functools.partial(ray_cluster, gpus=1 / self.workers)  # processes of this machine share its cards
        yield from backend(stacks, make, self.workers, self.say)

    def _keep(self, stack: list[Job], made: list[dict[str, Any]] | Exception, what: str) -> None:
        if isinstance(made, Exception):
            error = self.folder / "runs" / f"{stack[0].key}.error"
            write_text(error, redact_text(full_traceback(made)))
            self.failures.append(redact_text(f"{what}, {stack[0].arm.label}: {made}; traceback: {error}"))
            self.say(f"  failed: {self.failures[-1]}")
            return
        for job, row in zip(stack, made, strict=True):
            path = self.folder / "runs" / f"{job.key}.json"
            write_checked_json(path, {"config": asdict(job), **row})
            path.with_suffix(".error").unlink(missing_ok=True)

    def tuned(self, plan: Plan, task: str, objective: str) -> Arm | None:
        """The arm of the grid with the best mean@k over the tuning seeds, the first of equals.

        An arm is left out if one of its runs is missing or diverged.

        Args:
            plan: The plan of the comparison.
            task: Name of the task.
            objective: Name of the objective whose grid is searched.

        Returns:
            The arm, or None if every arm of the grid is left out.
        """
        seeds = range(TUNING_SEEDS, TUNING_SEEDS + plan.tuning_seeds)
        means: dict[Arm, float] = {}
        for arm in tuning_arms(plan, objective):
            found = [self.result(job) for job in jobs_of(plan, task, [arm], list(seeds))]
            if found and all(r is not None and not diverged(r) for r in found):
                means[arm] = float(np.mean([score(r) for r in found if r is not None]))
        return max(means, key=means.__getitem__) if means else None


def _by_arm(stack: Sequence[Job]) -> list[list[Job]]:
    """The jobs of each arm."""
    arms: dict[Arm, list[Job]] = {}
    for job in stack:
        arms.setdefault(job.arm, []).append(job)
    return list(arms.values())


def score(result: Mapping[str, Any]) -> float:
    """The mean@k at the end of a run, which tuning maximises."""
    return next(v for k, v in result["after"].items() if k.startswith("mean@"))


def diverged(result: Mapping[str, Any]) -> bool:
    """Whether NaN or an infinity is in a run's curves or in its final evaluation."""
    numbers = [*result.get("reward", ()), *result.get("entropy", ()), *result["after"].values()]
    return not all(math.isfinite(x) for x in numbers)


def run_stack(jobs: list[Job]) -> list[dict[str, Any]]:
    """Train the runs of one setting together.

    Args:
        jobs: Runs that share a setting.

    Returns:
        `{"result": ..., "seconds": ..., "parts": ...}` for each run, with an equal share of the seconds. The parts, which
        add up to the seconds, are `warm-up` (with the making of the problem), `evaluation`, `rollouts`, `updates` and the rest.
    """
    torch.set_num_threads(1)
    runs = [Run(_objective(job.arm), job.learning_rate, job.seed, job.warm_up, job.arm.kl_target) for job in jobs]
    loop = Loop(jobs[0].setting, runs)
    results = [asdict(result) for result in loop.train()]
    parts = {name: seconds / len(jobs) for name, seconds in loop.clock.parts().items()}
    return [{"result": result, "seconds": sum(parts.values()), "parts": parts} for result in results]


@functools.lru_cache
def _objective(arm: Arm) -> Objective:
    return arm.build()
