"""Runs `bandpo train` again and again and kills it, then lets it end, twice: `python killed_runs.py KILLS SEED train ...`.

One process imports everything and forks a child for each try: imports take ten times as long as the runs. The child gets
SIGKILL in one of three ways, in turn: some time after its start, some time after its first logged step, and in the middle of a
checkpoint (or a round). Every try resumes.
"""

import gc
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import reasoning_gym

import bandpo.train.command
from bandpo.cli import main
from bandpo.toy.tasks import TASKS, make_splits

SEAL = "bandpo_files.json"


def half_checkpoints(folder: Path) -> list[Path]:
    return [p for p in [*folder.glob("checkpoint-*"), *folder.glob("rounds/[0-9]*")] if not (p / SEAL).exists()]


def attempt(arguments: list[str], ready: Callable[[], bool] | None, delay: float) -> int:
    """One try; killed `delay` seconds after `ready()`, or left alone where that is None."""
    child = os.fork()
    if child == 0:
        os._exit(main(arguments))
    if ready is not None:
        while not ready():
            if os.waitpid(child, os.WNOHANG)[0]:
                raise RuntimeError("the run ended before it was killed: raise max_steps")
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(kills: int, seed: int, arguments: list[str]) -> int:
    assert bandpo.train.command.train and reasoning_gym  # imported before the first fork
    make_splits(TASKS["countdown"])  # drawn once, as the imports
    gc.freeze()  # no search for garbage visits the imports
    folder = Path(arguments[arguments.index("--output_dir") + 1])
    draw = random.Random(seed)
    arguments = [*arguments, "--resume_from_checkpoint", "latest"]
    for i in range(kills):
        began, known = time.time(), set(half_checkpoints(folder))
        log = folder / "metrics.jsonl"
        when, ready, longest = (
            ("after its start", lambda: True, 1.5),
            ("after a step", lambda log=log, t=began: log.exists() and log.stat().st_mtime > t and log.stat().st_size > 0, 0.5),
            ("in a checkpoint", lambda known=known: bool(set(half_checkpoints(folder)) - known), 0.01),
        )[i % 3]  # fmt: skip
        delay = draw.uniform(0.0, longest)
        code = attempt(arguments, ready, delay)
        print(
            f"try {i + 1}: status {code}, killed {delay:.3f} s {when}, {len(half_checkpoints(folder))} half", flush=True
        )
    finished = attempt(arguments, None, 0.0)
    return finished or attempt(arguments, None, 0.0)  # a finished run that is gone on with stays as it is


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
