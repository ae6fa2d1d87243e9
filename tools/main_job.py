"""Measures the default job of `bandpo train` under several objectives, and writes the table in docs/start.md.

* `python tools/main_job.py`: the table, from docs/main_job.json.
* `python tools/main_job.py --measure FOLDER`: runs every objective with every seed, one after the other, each into a folder
  of its own below FOLDER, and writes docs/main_job.json and the table. Runs that FOLDER has are not repeated.
* `python tools/main_job.py --check`: changes nothing; status 1 if the table is not what the JSON file gives.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from bandpo._system.about import about
from bandpo._system.files import read_yaml
from bandpo._system.jsonl import objects
from bandpo.doctor import examine
from bandpo.statistics import interval, t_half_width

DOCS = Path(__file__).parents[1] / "docs"
DATA, PAGE = DOCS / "main_job.json", DOCS / "start.md"
ARMS = ("bandpo-kl", "bandpo-kl-upper", "bandpo-kl-lower", "grpo", "dapo", "no-clip")
SEEDS = (0, 1, 2, 3, 4)
COMMAND = "python tools/main_job.py --measure FOLDER"
BEGIN, END = "<!-- main job: begin, written by tools/main_job.py -->", "<!-- main job: end -->"

Row = dict[str, Any]


def job() -> Row:
    """The settings of the default job, which the results belong to."""
    return read_yaml(Path(str(files("bandpo.configs") / "main_job.yaml")))


def measured(folder: Path) -> list[Row]:
    """The results of all runs, which are made where they are missing."""
    rows: list[Row] = []
    for arm, seed in track([(arm, seed) for seed in SEEDS for arm in ARMS], description="runs"):
        run = folder / f"{arm}-{seed}"
        if not (run / "evaluation.json").is_file():
            command = [sys.executable, "-m", "bandpo", "train", "--objective", arm, "--seed", str(seed)]
            done = subprocess.run(
                [*command, "--output_dir", str(run)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise SystemExit(f"{arm} with seed {seed} failed:\n{done.stderr[-2000:]}")
        rows.append({"objective": arm, "seed": seed, **result(run)})
    return rows


def result(run: Path) -> Row:
    """What a finished run gave."""
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    log = [row for row in objects(run / "metrics.jsonl") if "entropy" in row]
    before, after = (solved(run, stage) for stage in ("before", "after"))
    change = interval((after - before).tolist(), np.mean)
    return {
        "before": {name: evaluation["before"][name] for name in ("mean@8", "pass@8")},
        "after": {name: evaluation["after"][name] for name in ("mean@8", "pass@8")},
        "change of pass@8": change._asdict(),
        "entropy": log[-1]["entropy"],
        "clipped": float(np.mean([row.get("clip_ratio/region_mean", 0.0) for row in log])),
        "doctor": [finding.rule for finding in examine(run) if finding.level in ("warning", "problem")],
    }


def solved(run: Path, stage: str) -> Any:
    """For each held-out prompt, 1 if one of its samples is right, else 0."""
    rows = [row["rewards"] for row in objects(run / "samples.jsonl") if row.get("stage") == stage]
    return np.array([float(max(rewards) > 0) for rewards in rows])


def table(data: dict[str, Any]) -> str:
    """The table with the lines below it."""
    rows = data["runs"]
    start = rows[0]["before"]
    lines = [
        "| objective | mean@8 | pass@8 | seeds in which pass@8 fell clearly | entropy at the end | clipped tokens |",
        "|---|---|---|---|---|---|",
        f"| warmed-up model, before | {start['mean@8']:.3f} | {start['pass@8']:.3f} | | | |",
    ]
    for arm in ARMS:
        own = [row for row in rows if row["objective"] == arm]
        fell = sum(row["change of pass@8"]["high"] < 0 for row in own)
        cells = [with_interval([row["after"][name] for row in own]) for name in ("mean@8", "pass@8")]
        cells += [f"{fell} of {len(own)}", with_interval([row["entropy"] for row in own])]
        clipped = float(np.mean([row["clipped"] for row in own]))
        lines.append(f"| `{arm}` | {' | '.join(cells)} | {clipped:.1%} |")
    return "\n".join(lines)


def with_interval(values: list[float]) -> str:
    """The mean over seeds with its 95% t-interval."""
    x = np.array(values)
    half = float(t_half_width(x[:, None])[0]) if len(x) > 1 else math.nan
    return f"{x.mean():.3f} ± {half:.3f}"


def page(text: str, made: str) -> str:
    """The page with the table brought up to date."""
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"docs/start.md has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def main() -> int:
    """Measures, and writes the table or compares it."""
    parser = argparse.ArgumentParser(description="The default job of bandpo train under several objectives.")
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help="make the runs that FOLDER does not have")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if the table is out of date")
    options = parser.parse_args()
    if options.measure is not None and not options.check:
        found = {"job": job(), "runs": measured(options.measure), "about": about(command=COMMAND, seeds=list(SEEDS))}
        DATA.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    old = PAGE.read_text(encoding="utf-8")
    new = page(old, table(json.loads(DATA.read_text(encoding="utf-8"))))
    if options.check and old != new:
        print("docs/start.md is out of date; run python tools/main_job.py")
        return 1
    if old != new:
        PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
