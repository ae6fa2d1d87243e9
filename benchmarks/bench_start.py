"""CPU seconds until a command answers, its imports included, beside `python -c pass` and `python -c "import torch"`, in turn.

A help text, a mistake and a log are text: the least that they could take is the interpreter alone. A table of bounds and the
list of objectives need torch, whose import is the least that they could take.
"""

import json
import os
import resource
import statistics
import subprocess
import sys

import pytest

ROUNDS = 3
BANDPO = ["-m", "bandpo"]
BARE, TORCH = ["-c", "pass"], ["-c", "import torch"]

# What, command, target in CPU seconds
ANSWERS = [
    ("bandpo --help", ["--help"], "<= 0.2"),
    ("bandpo train --help", ["train", "--help"], "<= 1"),
    ("bandpo train --help-all", ["train", "--help-all"], "<= 1"),
    ("bandpo train, a misspelt option", ["train", "--radiu", "1"], "<= 1"),
    ("bandpo train, a missing file", ["train", "--config", "/no/such.yaml"], "<= 1"),
    ("bandpo evaluate, no such model", ["evaluate", "/no/such/model"], "<= 1"),
    ("bandpo compare --help", ["compare", "--help"], "<= 0.2"),
    ("bandpo doctor --help", ["doctor", "--help"], "<= 0.2"),
]
TABLES = [
    ("bandpo objectives", ["objectives"]),
    ("bandpo bounds, the table", ["bounds", "--no-figure"]),
    ("bandpo doctor, verl's YAML", ["doctor", "verl.yaml"]),
    ("import bandpo, all public names", None),
]


def cpu_seconds(arguments, folder):
    """CPU seconds of a new process, its children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, check=False, env={**os.environ})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def in_turn(cases, folder):
    """The median CPU seconds of each case; the cases run in turn."""
    times = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, arguments in cases.items():
            times[name].append(cpu_seconds(arguments, folder))
    return {name: statistics.median(values) for name, values in times.items()}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "verl.yaml").write_text("actor_rollout_ref: {actor: {policy_loss: {loss_mode: bandpo}}}\n")
    return tmp_path


def test_answers_without_torch(folder, report):
    cases = {what: [*BANDPO, *arguments] for what, arguments, _ in ANSWERS}
    times = in_turn({**cases, "pass": BARE, "torch": TORCH}, folder)
    for what, _, target in ANSWERS:
        note = f"python -c pass {times['pass']:.2f}, import torch {times['torch']:.2f} CPU s"
        more = {"equivalent": "import torch", "ratio": round(times[what] / times["torch"], 3)}
        report(what, times[what], "CPU s", target, note, **more)


def test_a_log(folder, report):
    rows = (10, 100, 1000)
    for n in rows:
        lines = (
            json.dumps({"step": i, "reward": i / n, "entropy": 2.0, "clip_ratio/region_mean": 0.01}) for i in range(n)
        )
        (folder / f"{n}.jsonl").write_text("\n".join(lines) + "\n")
    times = in_turn({**{n: [*BANDPO, "doctor", f"{n}.jsonl"] for n in rows}, "torch": TORCH}, folder)
    note = f"{', '.join(f'{times[n]:.2f}' for n in rows)} CPU s at {', '.join(map(str, rows))} rows"
    more = {"equivalent": "import torch", "ratio": round(times[rows[-1]] / times["torch"], 3)}
    report("bandpo doctor on a log", times[rows[-1]], "CPU s", "<= 0.5", note, **more)


def test_tables_of_numbers(folder, report):
    everything = ["-c", "import bandpo; [getattr(bandpo, name) for name in bandpo.__all__]"]
    cases = {what: everything if arguments is None else [*BANDPO, *arguments] for what, arguments in TABLES}
    times = in_turn({**cases, "torch": TORCH}, folder)
    for what, _ in TABLES:
        note = f"{times[what]:.2f} beside {times['torch']:.2f} CPU s of import torch"
        report(what, times[what] / times["torch"], "x", "<= 1.3", note, equivalent="import torch")
