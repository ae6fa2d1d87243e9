"""What pruning and packing cost and save on the main job: whole runs of `bandpo train`, one folder each."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bandpo._files import read_jsonl

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
"""Options of `bandpo train`. The last two drop the lowest for certain, and weigh nothing: the biased way."""


def selection_on_the_main_job(
    folder: Path, *, seeds: int = 3, jobs: int = 2, arms: Sequence[str] = tuple(ARMS), options: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Train every arm on every seed, and collect reward, tokens and seconds; a run whose folder is complete is not made again.

    Args:
        folder: A folder for the runs.
        seeds: Of each arm, paired: 0, 1, ...
        jobs: Runs at once.
        arms: Names in `ARMS`.
        options: More options of `bandpo train`, for all.
        say: Takes a line for each run that ends.

    Returns:
        For each arm and seed: mean@k before and after, update tokens, sampled tokens, seconds of the update phase.
    """
    todo = [(arm, seed) for seed in range(seeds) for arm in arms]

    def run(job: tuple[str, int]) -> dict[str, Any]:
        arm, seed = job
        place = folder / f"{arm.replace(' ', '-').replace(',', '')}-{seed}"
        if not (place / "evaluation.json").exists():
            command = [
                sys.executable,
                "-m",
                "bandpo",
                "train",
                "--seed",
                str(seed),
                "--output_dir",
                str(place),
                *options,
            ]
            for name, value in ARMS[arm].items():
                command += [f"--{name}", json.dumps(value)]
            quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        found = measure(place)
        say(f"{arm}, seed {seed}: {found['before']:.3f} -> {found['after']:.3f}, {found['tokens'] / 1e3:.0f}k update tokens, "
            f"{found['update_seconds']:.0f} s of updates")  # fmt: skip
        return found

    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(run, todo))
    table: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for (arm, _), found in zip(todo, results, strict=True):
        table[arm].append(found)
    return {"seeds": seeds, "jobs": jobs, "options": list(options), "arms": table}


def measure(place: Path) -> dict[str, Any]:
    """A run's numbers from its folder.

    Update tokens are completion tokens that went through a backward pass; a rollout's are counted once for each of its uses.

    Args:
        place: Folder of a `bandpo train` run.
    """
    evaluation = json.loads((place / "evaluation.json").read_text())
    score = next(name for name in evaluation["after"] if name.startswith("mean@"))
    seconds = {row["step"]: row["update_time"] for row in read_jsonl(place / "timings.jsonl") if "update_time" in row}
    rows = [row for row in read_jsonl(place / "metrics.jsonl") if row["step"] in seconds]
    steps = np.diff([0, *(row["step"] for row in rows)])
    completions = 256  # of an optimiser step of the main job, before pruning
    kept = [row.get("selection/prompts_kept", 1.0) * row.get("selection/tokens", 1.0) for row in rows]
    tokens = steps * completions * np.array(kept) * [row["completions/mean_length"] for row in rows]
    return {
        "before": evaluation["before"][score], "after": evaluation["after"][score], "tokens": float(tokens.sum()),
        "sampled_share": float(np.mean([row.get("selection/prompts_kept", 1.0) for row in rows])),
        "update_seconds": float(sum(n * seconds[row["step"]] for n, row in zip(steps, rows, strict=True))),
        "density": float(np.mean([row.get("packing/density", np.nan) for row in rows])),
        "effective_sample_size": float(np.mean([row.get("selection/effective_sample_size", 1.0) for row in rows])),
        "curve": [[float(x), row["reward"]] for x, row in zip(tokens.cumsum(), rows, strict=True)],
    }  # fmt: skip
