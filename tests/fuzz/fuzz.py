"""Nightly fuzzing, `make fuzz`: `python tests/fuzz/fuzz.py --refused 1000000`, until so many bad inputs were refused.

Targets and their checks are in targets.py; hypothesis makes the inputs and shrinks what fails. Two processes, each with seeds
of its own. A failure is printed with its input and ends with status 1; an input that takes over a minute counts as hanging.
"""

import argparse
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path.append(str(Path(__file__).parents[1]))  # the oracle that the tests share; pytest has it on its path already
from targets import TARGETS


def run(name: str, examples: int, start: int) -> Counter:
    """One target with one seed: how many inputs came out how."""
    target, outcomes = TARGETS[name], Counter()

    @settings(
        max_examples=examples, deadline=60_000, database=None, phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    @seed(start)
    @given(target.inputs)
    def check(value):
        outcome = target.check(value)
        assert not target.bad or outcome == "refused", "a bad input passed as good"
        outcomes[outcome] += 1

    check()
    return outcomes


def work(job: tuple[str, int, int]) -> tuple[str, Counter, str]:
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (libraries talk to it)
    try:
        return job[0], run(*job), ""
    except BaseException as error:  # a failing input comes as the exception that it caused, or as a group of them
        notes = "\n".join(getattr(error, "__notes__", []))
        return job[0], Counter(), f"{type(error).__name__}: {str(error)[:2000]}\n{notes[:2000]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--refused", type=int, default=1_000_000, help="bad inputs to refuse in all (default: 1000000)")
    parser.add_argument("--minutes", type=float, default=60.0, help="give up after this long (default: 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    began, totals, failures = time.monotonic(), {name: Counter() for name in TARGETS}, []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for turn in range(10_000):
            jobs = [
                (name, 100 if target.slow else 20_000 if target.bad else 2000, options.seed + 1000 * turn)
                for name, target in TARGETS.items() if not (target.slow and turn % 4)
            ]  # fmt: skip
            for name, outcomes, failure in pool.map(work, jobs):
                totals[name] += outcomes
                if failure:
                    failures.append(name)
                    print(f"FAILED {name}, seed {options.seed + 1000 * turn}\n{failure}", flush=True)
            refused = sum(c["refused"] for c in totals.values())
            made, minutes = sum(sum(c.values()) for c in totals.values()), (time.monotonic() - began) / 60
            print(
                f"turn {turn + 1}: {made} inputs, {refused} refused, {len(failures)} failures, {minutes:.1f} min",
                flush=True,
            )
            if failures or refused >= options.refused or minutes > options.minutes:
                break
    for name, outcomes in totals.items():
        print(f"{name:<32} {outcomes['refused']:>9} refused {outcomes['fine']:>9} fine")
    if refused < options.refused:
        print(f"{refused} of {options.refused} bad inputs refused")
    return int(bool(failures) or refused < options.refused)


if __name__ == "__main__":
    sys.exit(main())
