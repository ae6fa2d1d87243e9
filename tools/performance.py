"""Writes docs/performance.md from tools/performance.md and the record of `make bench`: `python tools/performance.py`.

`--check` changes nothing; status 1 if the page is not what the record gives.

The text has the prose. `<!-- table FILE... -->` becomes the table of the rows of benchmark files, whose lines are patterns:
the rows of `PATTERN` one by one, those of `PATTERN => LABEL` as one line, from the least to the greatest. Without patterns, all
rows. `<!-- others -->` becomes sections for the files that no table names, so that no row is left out.
"""

import argparse
import importlib.util
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PAGE, TEXT, BASELINES, GPU = (
    ROOT / "docs" / "performance.md",
    ROOT / "tools" / "performance.md",
    ROOT / "benchmarks" / "baselines",
    ROOT / "benchmarks" / "gpu.json",
)
WIDTH = 120
FASTER = 0.15  # beyond linear, and beyond the growth of the equivalent; the noise of three sizes is half of it

_TABLE = re.compile(r"<!-- table ([\w ]+?)(?:\n(.*?))?\s*-->", re.DOTALL)
_NUMBER = re.compile(r"\d[\d.,]* ?(?:ns|ms|µs|us|s|GiB|GB|MB|%|times|x|tokens/s)\b|\d[\d.,]*%")
Row = dict[str, Any]


class Line(NamedTuple):
    """A line of a table: one row, or several under one label."""

    label: str
    rows: list[Row]

    @property
    def missed(self) -> int:
        """How many of its rows miss their aim."""
        return sum(row["met"] == "no" for row in self.rows)


def record() -> Any:
    """The module `benchmarks/record.py`."""
    spec = importlib.util.spec_from_file_location("record", ROOT / "benchmarks" / "record.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chosen(folder: Path = BASELINES) -> dict[str, Any]:
    """The record that the page shows: that with the most rows."""
    records = [record().load(path) for path in sorted(folder.glob("*.json"))]
    return max(records, key=lambda found: sum(map(len, found["files"].values())))


def page(text: str, found: dict[str, Any]) -> str:
    """The page from the text and a record."""
    files: dict[str, list[Row]] = found["files"]
    lines = list[Line]()
    named = {name for match in _TABLE.finditer(text) for name in match[1].split()}

    def table(match: re.Match[str]) -> str:
        rows = [row for name in match[1].split() for row in files.get(name, [])]
        mine = list(_lines(rows, match[2]))
        lines.extend(mine)
        return _table(mine, rows)

    text = _TABLE.sub(table, text)
    sections = list[str]()
    for name in sorted(set(files) - named):
        mine = list(_lines(files[name], None))
        lines.extend(mine)
        sections.append(
            f"## {name.removeprefix('bench_').replace('_', ' ').capitalize()}\n\n{_table(mine, files[name])}\n\n"
        )
    text = text.replace("<!-- others -->\n\n", "".join(sections))
    filled = {
        "machine": _machine(found),
        "missed": _missed(lines),
        "faster": _faster(lines),
        "noise": f"{FASTER:g}",
        "unmeasured": _unmeasured(files),
        "cuda": cuda(),
    }
    for name, value in filled.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    return "\n".join(_wrapped(line) for line in text.splitlines()) + "\n"


def cuda(path: Path = GPU) -> str:
    """The tables of `make gpu`, or that there is no record of a GPU yet."""
    if not path.exists():
        return (
            "**Not measured yet: nothing of this has run on a GPU.** `make gpu` measures it on one in under nine minutes "
            "(`benchmarks/gpu/README.md`); CI runs all of it on a CPU at sizes that say nothing about speed."
        )
    found = json.loads(path.read_text(encoding="utf-8"))
    about = found["machine"]
    if about["tiny"] or about["device"] != "cuda":
        raise ValueError(f"{path} is the record of a run at a tiny size or on a CPU; run make gpu on a GPU")
    text = [
        f"Measured by `make gpu` on one {about['card']} (driver {about['driver']}, CUDA {about['cuda']}, "
        f"torch {about['torch']}, Triton {about['triton']}), commit {about['commit'][:12]}, on {about['date']}."
    ]
    for part in found["parts"]:
        rows = [row for row in found["rows"] if row["part"] == part["part"] and "what" in row]
        text.append(f"### {part['part'].capitalize()}")
        if part["outcome"] != "done":
            text.append(f"**This part did not end by itself ({part['outcome']}: {part['reason']}).**")
        body = [f"| {_cell(row['what'])} | {_cuda_value(row)} | {_cuda_aim(row)} |" for row in rows]
        text.append("\n".join(["| | measured | aim |", "|---|---|---|", *body]) if body else "No rows.")
    return "\n\n".join(text)


def _cuda_value(row: Row) -> str:
    if row["value"] is None:
        return _cell(row["note"] or "not a number")
    unit = {"x": " times"}.get(row["unit"], f" {row['unit']}" if row["unit"] else "")
    spread = row.get("quartiles")
    return f"{_number(row['value'])}{unit}" + (f" ({_number(spread[0])} to {_number(spread[1])})" if spread else "")


def _cuda_aim(row: Row) -> str:
    aim = row["aim"].replace("<=", "at most").replace(">=", "at least")
    return f"{aim}: **missed**" if row["met"] == "no" else aim


def _unmeasured(files: dict[str, list[Row]]) -> str:
    """The benchmarks that the record has nothing of, as a paragraph; "" where it has all."""
    here = sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py"))
    names = ", ".join(f"`{name}.py`" for name in here if name not in files)
    return f"This record has no rows yet of {names}.\n\n" if names else ""


def typed(text: str) -> list[str]:
    """Numbers with a unit in the prose, which should be rows instead."""
    return _NUMBER.findall(_TABLE.sub("", text))


def _lines(rows: list[Row], patterns: str | None) -> Iterator[Line]:
    left = list(rows)
    for entry in (patterns or "*").strip().splitlines():
        pattern, _, label = (part.strip() for part in entry.partition(" => "))
        found = [row for row in left if fnmatchcase(row["what"], pattern)]
        left = [row for row in left if row not in found]
        if label and found:
            yield Line(label, found)
        elif not label:
            yield from (Line(row["what"], [row]) for row in found)
    if left:
        raise ValueError(f"no pattern has the row {left[0]['what']!r}; end the patterns with *")


def _table(lines: list[Line], rows: list[Row]) -> str:
    if not lines:
        return "*Not measured for this record.*"
    head = ["| | measured | aim | growth |", "|---|---|---|---|"]
    body = [f"| {_cell(x.label)} | {_measured(x.rows)} | {_aim(x)} | {_growth(x.rows)} |" for x in lines]
    notes = [f"* {x.label}: {note}." for x in lines if len(x.rows) == 1 and (note := _note(x.rows[0]))]
    parts = ["\n".join(head + body), f"Measured on {_range(sorted({row['date'] for row in rows}))}."]
    return "\n\n".join([*parts, "\n".join(notes)] if notes else parts)


def _measured(rows: list[Row]) -> str:
    unit = {"x": " times", "": "", "exponent": ""}.get(rows[0]["unit"], f" {rows[0]['unit']}")
    if rows[0]["unit"] == "exponent":
        return ""
    if len(rows) > 1:
        values = [row["value"] for row in rows]
        return f"{_number(min(values))} to {_number(max(values))}{unit}"
    value, spread = _number(rows[0]["value"]), rows[0].get("quartiles")
    return f"{value}{unit}" + (f" ({_number(spread[0])} to {_number(spread[1])})" if spread else "")


def _aim(line: Line) -> str:
    targets = sorted({row["target"] for row in line.rows})
    if targets == [""]:
        return ""
    text = " or ".join(target.replace("<=", "at most").replace(">=", "at least") for target in targets if target)
    if not line.missed:
        return text
    return f"{text}: **missed**" + ("" if len(line.rows) == 1 else f" by {line.missed} of {len(line.rows)}")


def _growth(rows: list[Row]) -> str:
    found = [row["growth"] for row in rows if row.get("growth") is not None]
    if not found:
        return ""
    return _number(found[0]) if len(rows) == 1 else f"{_number(min(found))} to {_number(max(found))}"


def _note(row: Row) -> str:
    parts = list[str]()
    if len(row.get("ratios") or []) > 1:
        sizes = ", ".join(f"{_number(r)} at {_size(n)}" for n, r in zip(row["sizes"], row["ratios"], strict=True))
        parts.append(sizes + (f", beside {row['equivalent']}" if row.get("equivalent") else ""))
    elif row.get("sizes"):
        parts.append(f"sizes {', '.join(map(_size, row['sizes']))}")
    return "; ".join(part for part in [*parts, row["note"]] if part)


def _missed(lines: list[Line]) -> str:
    found = [f"* {x.label}: {_measured(x.rows) or _growth(x.rows)}, {_aim(x)}." for x in lines if x.missed]
    with_aim = sum(bool(row["target"]) for line in lines for row in line.rows)
    missed = sum(line.missed for line in lines)
    head = (
        f"{missed} of the {with_aim} rows with an aim miss it"
        if missed
        else f"None of the {with_aim} rows with an aim misses it."
    )
    return head + (":\n\n" + "\n".join(found) if found else "")


def _faster(lines: list[Line]) -> str:
    found = list[str]()
    for row in (row for line in lines for row in line.rows):
        slope, theirs = row.get("growth"), row.get("equivalent_growth")
        if slope is not None and slope > 1 + FASTER and (theirs is None or slope > theirs + FASTER):
            beside = "" if theirs is None else f", beside {_number(theirs)} of its equivalent"
            found.append(f"* {row['what']}: growth {_number(slope)}{beside}.")
    return "\n".join(found) or "None."


def _machine(found: dict[str, Any]) -> str:
    about, rows = found["machine"], [row for rows in found["files"].values() for row in rows]
    versions = ", ".join(sorted({row["torch"] for row in rows}))
    return (
        f"This is the record of one kind of machine: {about['processor']}, {about['cores']} cores that other work shares, "
        f"torch {versions}, Python {about['python']}, measured on {_range(sorted({row['date'] for row in rows}))}."
    )


def _range(values: list[str]) -> str:
    return values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _size(value: float) -> str:
    return f"{value:,.0f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _wrapped(line: str) -> str:
    if len(line) <= WIDTH or line.startswith("|"):
        return line
    indent = "  " if line.startswith("* ") else ""
    return textwrap.fill(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def main() -> int:
    """Writes the page, or compares it."""
    parser = argparse.ArgumentParser(description="The performance page from the record of make bench.")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if the page is out of date")
    options = parser.parse_args()
    text = page(TEXT.read_text(encoding="utf-8"), chosen())
    if options.check:
        stale = not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text
        print("docs/performance.md is out of date; run python tools/performance.py" if stale else "up to date")
        return int(stale)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
