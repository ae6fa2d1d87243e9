"""The costs and savings of pruning and packing on the main job, measured on whole runs of `bandpo train`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from bandpo._system.bounded import parse_json, read_regular
from bandpo._system.errors import RunError
from bandpo._system.files import write_json
from bandpo._system.jsonl import objects
from bandpo._system.secrets import redact_arguments
from bandpo.lab.backends import processes

_OPTIONS = "options.json"
_MEASURED = (
    *("step", "reward", "completions/mean_length", "packing/density"),
    *("selection/prompts_kept", "selection/tokens", "selection/effective_sample_size"),
)  # what `measure` keeps of the rows of a run
_COMPLETIONS = 256  # of an optimiser step of the main job, before pruning
_RESULT = "evaluation.json"  # the file that `bandpo train` writes at the end of a run; a report may be written before

ARMS: dict[str, dict[str, Any]] = {
    "full": {},
    "packed": {"packing": True},
    "pruned 0.3": {"pruning": {"completions": 0.3}},
    "pruned 0.5": {"pruning": {"completions": 0.5}},
    "pruned 0.7": {"pruning": {"completions": 0.7}},
    "pruned 0.5, packed": {"pruning": {"completions": 0.5}, "packing": True},
    "both 0.5, packed": {"pruning": {"prompts": 0.5, "completions": 0.5}, "packing": True},
    "CPPO-like 0.5": {"pruning": {"completions": 0.5, "mode": "topk_biased"}},
    "GRESO-like 0.5": {"pruning": {"prompts": 0.5, "mode": "topk_biased"}},
}
"""The arms by name, as options of `bandpo train`. The last two always drop the lowest scores, without weights: biased."""


def selection_on_the_main_job(
    folder: Path,
    *,
    seeds: int = 3,
    jobs: int = 2,
    arms: Sequence[str] = tuple(ARMS),
    options: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train every arm on every seed, and collect reward, tokens and seconds.

    A run that has its result is not made again, and a run that was killed is resumed. If a run fails, its error is reported and
    the other runs are still made.

    Args:
        folder: Folder for the runs.
        seeds: Number of seeds of each arm; the arms are paired by seed.
        jobs: Number of runs at the same time.
        arms: Names in `ARMS`.
        options: More options of `bandpo train`, for all runs.
        say: Function that is called with a line for each run that ends.

    Returns:
        For each arm and seed: mean@k before and after, update tokens, sampled tokens, seconds of the update phase; and under
        `failures` a line for each run without a result.

    Raises:
        ValueError: If the folder has runs of other options.
    """
    todo = [_run(folder, arm, seed, options) for seed in range(seeds) for arm in arms]
    for run in todo:
        _check_options(run)
    found: dict[tuple[str, int], dict[str, Any]] = {}
    failures: list[str] = []
    for run, made in processes(todo, train_and_measure, jobs, say):
        name = f"{run['arm']}, seed {run['seed']}"
        if isinstance(made, Exception):
            failures.append(f"{name}: {made}")
            say(f"failed: {failures[-1]}")
            continue
        found[run["arm"], run["seed"]] = made
        say(
            f"{name}: {made['before']:.3f} -> {made['after']:.3f}, {made['tokens'] / 1e3:.0f}k update tokens, "
            f"{made['update_seconds']:.0f} s of updates"
        )
    table = {arm: [found[arm, seed] for seed in range(seeds) if (arm, seed) in found] for arm in arms}
    return {"seeds": seeds, "jobs": jobs, "options": list(options), "arms": table, "failures": failures}


def _run(folder: Path, arm: str, seed: int, options: Sequence[str]) -> dict[str, Any]:
    place = folder / f"{arm.replace(' ', '-').replace(',', '')}-{seed}"
    command = ["--seed", str(seed), *options]
    for name, value in ARMS[arm].items():
        command += [f"--{name}", json.dumps(value)]
    return {"arm": arm, "seed": seed, "place": place, "options": command}


def _check_options(run: dict[str, Any]) -> None:
    """Refuse a folder whose run has other options, which would be taken for the wanted one."""
    kept: Path = run["place"] / _OPTIONS
    wanted = redact_arguments(run["options"])
    if kept.exists() and (found := parse_json(read_regular(kept), str(kept))) != wanted:
        shown = " ".join(map(str, cast(list[object], found))) if isinstance(found, list) else found
        raise ValueError(
            f"{run['place']} has a run with the options {shown}, and not {' '.join(wanted)}: choose another --output, "
            "or delete it"
        )


def train_and_measure(run: dict[str, Any]) -> dict[str, Any]:
    """Make one run in a process of its own, or resume it, unless its result exists.

    Args:
        run: The `place` of the run, a folder, and its `options` of `bandpo train`.

    Returns:
        The numbers of `measure`.

    Raises:
        RunError: If `bandpo train` failed.
    """
    place: Path = run["place"]
    if not (place / _RESULT).exists():
        place.mkdir(parents=True, exist_ok=True)
        write_json(place / _OPTIONS, redact_arguments(run["options"]))
        folder = ["--output_dir", str(place), "--resume_from_checkpoint", "latest"]
        command = [sys.executable, "-m", "bandpo", "train", *run["options"], *folder]
        quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet)
        if done.returncode:
            raise RunError(f"`bandpo train` ended with status {done.returncode}: {done.stderr[-2000:].strip()}")
    return measure(place)


def measure(place: Path) -> dict[str, Any]:
    """The numbers of a run from its folder.

    Update tokens are completion tokens that went through a backward pass, counted once for each use of their rollout.

    Args:
        place: Folder of a `bandpo train` run.

    Returns:
        mean@k `before` and `after`, update `tokens`, `update_seconds`, shares, and the `curve` of reward over tokens.
    """
    evaluation = parse_json(read_regular(place / "evaluation.json"), str(place / "evaluation.json"))
    score = next(name for name in evaluation["after"] if name.startswith("mean@"))
    seconds = {row["step"]: row["update_time"] for row in objects(place / "timings.jsonl") if "update_time" in row}
    metrics = objects(place / "metrics.jsonl")
    rows = [{name: row[name] for name in _MEASURED if name in row} for row in metrics if row["step"] in seconds]
    steps = np.diff([0, *(row["step"] for row in rows)])
    kept = [row.get("selection/prompts_kept", 1.0) * row.get("selection/tokens", 1.0) for row in rows]
    tokens = steps * _COMPLETIONS * np.array(kept) * [row["completions/mean_length"] for row in rows]
    return {
        "before": evaluation["before"][score],
        "after": evaluation["after"][score],
        "tokens": float(tokens.sum()),
        "sampled_share": float(np.mean([row.get("selection/prompts_kept", 1.0) for row in rows])),
        "update_seconds": float(sum(n * seconds[row["step"]] for n, row in zip(steps, rows, strict=True))),
        "density": float(np.mean([row.get("packing/density", np.nan) for row in rows])),
        "effective_sample_size": float(np.mean([row.get("selection/effective_sample_size", 1.0) for row in rows])),
        "curve": [[float(x), row["reward"]] for x, row in zip(tokens.cumsum(), rows, strict=True)],
    }
