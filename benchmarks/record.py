"""The committed record of `make bench`, a file for each kind of machine, and a new run beside it.

`baselines/<kind>.json` has the rows of each benchmark file, in the order of its tests. A row is known by its file and its
`what`. It tells its test and the date, because files may be run one by one.

A row became worse when its value is worse than before by more than a margin. Ratios of paired timings carry the quartiles of
their rounds: those must lie apart as well, so that a neighbour's load on some rounds is no finding.

A regression is what no noise and no other machine explains: a ratio that is three times worse, or a cost that grows with the
size by half a power faster. Times are not looked at. `make bench` fails on one; on a kind of machine without a record of its
own, the ratios of the fullest record are the ones to compare with.
"""

import json
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

BASELINES = Path(__file__).parent / "baselines"
Row = dict[str, Any]

# Worse than before by this factor, or by this difference where a value may be near 0, is worth a look. Two runs of
# bench_loss in one state, on two cores that seven other processes shared, differed by 1.15 in the median and 1.58 at most.
FACTOR, FACTORS = 1.8, {"s": 2.0, "CPU s": 2.0, "ns/token": 2.0}  # a time alone says less than a ratio
PAIRED, EXACT = 1.5, 1.05  # ratios with quartiles; counts and bytes, which do not depend on the machine
DIFFERENCES = {"exponent": 0.25, "%": 2.0}
GROWTH = 0.25  # exponent of a row that has one beside its ratio
WIDE, WIDE_GROWTH = 3.0, 0.5  # of a regression; the greatest ratio of two runs in one state was 1.58 (see above)


class Change(NamedTuple):
    """A row beside the same one before."""

    ratio: float | None  # now / before; None where there is nothing before
    worse: str  # why it is worse, or nothing


def is_met(value: float, target: str) -> bool | None:
    """Whether a value fulfils a target such as "<= 1.2"; None without one."""
    if not target:
        return None
    sign, limit = target.split()
    if sign not in ("<=", ">="):
        raise ValueError(f"target must begin with <= or >=, got {target!r}")
    return value <= float(limit) if sign == "<=" else value >= float(limit)


def higher_is_better(row: Row) -> bool:
    """From the target, else from the row's own word."""
    return row["target"].startswith(">=") or row.get("better") == "higher"


def change(now: Row, before: Row | None) -> Change:
    """The ratio now / before, and whether the row became worse."""
    if before is None or now["unit"] != before["unit"]:
        return Change(None, "")
    a, b = now["value"], before["value"]
    ratio = a / b if b and a / b > 0 else None
    return Change(ratio, _worse_value(now, before, ratio) or _worse_growth(now, before))


def _worse_value(now: Row, before: Row, ratio: float | None) -> str:
    up = higher_is_better(now)
    if now["unit"] in DIFFERENCES:
        difference = (now["value"] - before["value"]) * (-1 if up else 1)
        return "WORSE" if difference > DIFFERENCES[now["unit"]] else ""
    if ratio is None:
        return ""
    factor = 1 / ratio if up else ratio
    both = "quartiles" in now and "quartiles" in before
    margin = EXACT if now.get("exact") else PAIRED if both else FACTORS.get(now["unit"], FACTOR)
    if factor <= margin:
        return ""
    if both:
        (low, high), (low_before, high_before) = now["quartiles"], before["quartiles"]
        if not (high < low_before if up else low > high_before):
            return ""
    return "WORSE"


def _worse_growth(now: Row, before: Row) -> str:
    a, b = now.get("growth"), before.get("growth")
    return "GROWS FASTER" if a is not None and b is not None and a > b + GROWTH else ""


def regression(now: Row, before: Row | None) -> str:
    """Why a row is a regression on any machine, or nothing; rows that are times are none."""
    if before is None or now["unit"] != before["unit"] or not is_ratio(now):
        return ""
    up = higher_is_better(now)
    a, b = now["value"], before["value"]
    if now["unit"] == "exponent":
        worse = (b - a if up else a - b) > WIDE_GROWTH
    else:
        ratio = a / b if b and a / b > 0 else 1.0
        worse = (1 / ratio if up else ratio) > WIDE
    if worse and "quartiles" in now and "quartiles" in before:
        (low, high), (low_before, high_before) = now["quartiles"], before["quartiles"]
        worse = high < low_before if up else low > high_before
    grown = (
        now.get("growth") is not None
        and before.get("growth") is not None
        and now["growth"] > before["growth"] + WIDE_GROWTH
    )
    return "REGRESSION" if worse or grown else ""


def is_ratio(row: Row) -> bool:
    """Whether a row compares two costs, or the costs at several sizes, so that it says something about other machines too."""
    return row["unit"] in ("x", "exponent")


def nearest(about: Mapping[str, Any], folder: Path | None = None) -> Path:
    """The record to compare with: that of this kind of machine, else the fullest one; of the own kind if there is none at all.

    Args:
        about: The machine, as `machine` tells it.
        folder: Folder of the records.
    """
    folder = BASELINES if folder is None else folder
    own = folder / f"{kind(about)}.json"
    others = sorted(folder.glob("*.json"))
    return (
        own if own.exists() or not others else max(others, key=lambda path: sum(map(len, load(path)["files"].values())))
    )


def machine() -> dict[str, Any]:
    """What a reader must know about the machine that a run is made on."""
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads used": 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def kind(about: Mapping[str, Any]) -> str:
    """The name of the record: processor and cores, "amd-epyc-2-cores"."""
    name = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", str(about["processor"]).lower())).strip("-")
    return f"{name}-{about['cores']}-cores"


def load(path: Path) -> dict[str, Any]:
    """A record; an empty one if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"machine": {}, "files": {}}


def dump(record: Mapping[str, Any]) -> str:
    """A record as JSON, with a line for each row."""
    files = [
        f" {json.dumps(name)}: [\n" + ",\n".join("  " + _json(row) for row in rows) + "\n ]"
        for name, rows in sorted(record["files"].items())
    ]
    return f'{{"machine": {_json(record["machine"])},\n"files": {{\n' + ",\n".join(files) + "\n}}\n"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def merged(
    record: Mapping[str, Any], about: Mapping[str, Any], runs: Mapping[str, list[Row]], tests: Mapping[str, list[str]]
) -> dict[str, Any]:
    """The record with the rows of a run in the place of those of the same tests.

    Args:
        record: What there was; it stays as it is.
        about: The machine of the run.
        runs: The rows of each file, of tests that passed.
        tests: All tests of the files that were collected as a whole, in their order. Rows of other tests of these files are
            dropped: their tests are gone.
    """
    files = {name: list(rows) for name, rows in record["files"].items()}
    for name in {*runs, *tests}:
        new = runs.get(name, [])
        measured = {row["test"] for row in new}
        rows = [row for row in files.get(name, []) if row["test"] not in measured] + new
        if name in tests:
            place = {test: i for i, test in enumerate(tests[name])}
            rows = sorted((row for row in rows if row["test"] in place), key=lambda row: place[row["test"]])
        if rows:
            files[name] = rows
        else:
            files.pop(name, None)
    return {"machine": dict(about), "files": files}


def growth(sizes: Iterable[float], costs: Iterable[float]) -> float | None:
    """The slope of log cost over log size, by least squares; None for fewer than two sizes."""
    points = [(math.log(n), math.log(c)) for n, c in zip(sizes, costs, strict=True)]
    if len(points) < 2:
        return None
    x, y = (sum(column) / len(points) for column in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
