"""Paired timings: the cases of a comparison run in turn, round by round, in one process; medians of their ratios are reported.

Every row that can grow has at least three sizes: the ratio to the simplest equivalent at each, and the exponent of growth,
the slope of log time over log size (1 is linear). CPU time is used, because the machines are shared.

Each row is printed beside the committed one of this kind of machine (`record.py`, `baselines/`); `--update` writes it anew.

pytest-benchmark times one case after the other, so that a neighbour's load falls on one and not on the next: hence this.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's messages of start and stop

import pytest
import torch

import record
from seconds import Seconds

TOKENS, FEW_TOKENS = 1 << 20, 1 << 12
BUDGET = 0.5  # seconds that short cases are repeated for, beyond the rounds that were asked for


_SMALL = {"compare", "tokens", "logp", "quick"}  # fixtures that choose smaller sizes in a quick run


class Run:
    """What one session measures: rows by file, tests by file, and the tests that failed."""

    def __init__(self) -> None:
        self.rows: dict[str, list[record.Row]] = {}
        self.tests: dict[str, list[str]] = {}
        self.failed: set[tuple[str, str]] = set()

    def passed(self) -> dict[str, list[record.Row]]:
        return {
            name: kept
            for name, rows in self.rows.items()
            if (kept := [row for row in rows if (name, row["test"]) not in self.failed])
        }


_RUN = Run()


def pytest_addoption(parser):
    parser.addoption("--json", default="", help="write the rows of this run to a file")
    parser.addoption("--update", action="store_true", help="put the rows of this run into the committed record")
    parser.addoption("--baseline", default="", help="a record to compare with (default: that of this kind of machine)")
    parser.addoption(
        "--fail-on-worse", action="store_true", help="status 1 if a row became worse by more than its margin"
    )
    parser.addoption("--quick", action="store_true", help="tiny sizes, one round, nothing compiled: does it still run?")
    parser.addoption("--tokens", type=int, default=0, help="tokens in the operator's benchmarks (default: 2^20)")


def pytest_configure(config):
    config.addinivalue_line("markers", "full_only: is left out by --quick, because even its smallest size takes long")
    option = config.getoption
    if option("--update") and (option("--quick") or option("--tokens")):
        raise pytest.UsageError("--update records a run at the usual sizes: leave out --quick and --tokens")


def pytest_itemcollected(item):
    _RUN.tests.setdefault(*_of(item)[:1], []).append(_of(item)[1])


def pytest_collection_modifyitems(config, items):
    """A quick run leaves out what has no small size: tests that ask for none of the fixtures that choose one."""
    if config.getoption("--quick"):
        skip = pytest.mark.skip(reason="has no small size")
        for item in items:
            used = {name for mark in item.iter_markers("usefixtures") for name in mark.args}
            used |= set(signature(item.function).parameters)
            if item.get_closest_marker("full_only") or not used & _SMALL:
                item.add_marker(skip)


def pytest_runtest_logreport(report):
    if report.failed:
        file, _, test = report.nodeid.partition("::")
        _RUN.failed.add((Path(file).stem, test))


def _of(item) -> tuple[str, str]:
    return item.path.stem, item.nodeid.partition("::")[2]


@pytest.fixture(scope="session")
def quick(request):
    """Whether to take the smallest sizes that still run everything."""
    return request.config.getoption("--quick")


@pytest.fixture(scope="session")
def tokens(request, quick):
    return request.config.getoption("--tokens") or (FEW_TOKENS if quick else TOKENS)


@pytest.fixture(autouse=True)
def one_thread_and_a_fresh_compiler(quick):
    torch.set_num_threads(1)
    torch._dynamo.reset()
    with torch.compiler.set_stance("force_eager" if quick else "default"):
        yield


@pytest.fixture
def paired(quick):
    """Time zero-argument functions in turn; returns the median seconds of each, as `Seconds`."""

    def run(
        cases: Mapping[str, Callable[[], object]],
        rounds: int = 15,
        clock: Callable[[], float] = time.process_time,
    ) -> Seconds:
        for case in cases.values():
            case()
        times = {name: list[float]() for name in cases}
        rounds = 1 if quick else rounds
        end = clock() + (0 if quick else BUDGET)
        while rounds > 0 or (clock() < end and len(next(iter(times.values()))) < 200):
            for name, case in cases.items():
                start = clock()
                case()
                times[name].append(clock() - start)
            rounds -= 1
        return Seconds(times)

    return run


@pytest.fixture
def report(request):
    """One line of the table: what, measured, unit, target (a pair of a comparison and a number), and notes.

    `more` is recorded with it: `quartiles`, `better="higher"` for a row without target, `exact=True` where the value does
    not depend on the machine.
    """
    file, test = _of(request.node)

    def add(what: str, value: float, unit: str, target: str = "", note: str = "", **more: object) -> None:
        if any(row["what"] == what for rows in _RUN.rows.values() for row in rows):
            raise ValueError(f"there is a row {what!r} already: each needs a name of its own")
        if isinstance(more.get("quartiles"), list):
            more["quartiles"] = [float(f"{x:.4g}") for x in more["quartiles"]]
        value = float(f"{value:.4g}")
        met = {True: "yes", False: "no", None: ""}[record.is_met(value, target)]
        row = {"what": what, "value": value, "unit": unit, "target": target, "met": met, "note": note, **more}
        row |= {"test": test, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
        _RUN.rows.setdefault(file, []).append(row)

    return add


@pytest.fixture
def compare(report, paired, quick):
    """Ours beside the simplest equivalent at several sizes; one row with the ratio at each size and the growth of ours.

    `make(size)` gives the zero-argument functions `{"ours": f, "<name of the equivalent>": g}`; without an equivalent the row
    has the growth alone, and `target` is that of the exponent. `clock` is CPU time of the process; pass `time.perf_counter`
    where other processes do the work. The value of the row is the ratio at the size `at`, or else at the largest one.
    With `speedup` it is the equivalent over ours.
    """

    def run(
        what: str,
        make: Callable[[int], Mapping[str, Callable[[], object]]],
        sizes: Sequence[int],
        *,
        target: str = "",
        rounds: int = 7,
        clock: Callable[[], float] = time.process_time,
        note: str = "",
        at: int | None = None,
        speedup: bool = False,
    ) -> dict[str, list[float]]:
        sizes = sorted(sizes)[:2] if quick else list(sizes)
        found = [paired(make(size), rounds, clock) for size in sizes]
        names = list(found[0])
        seconds = {name: [each[name] for each in found] for name in names}
        slopes = [record.growth(sizes, seconds[name]) for name in names[:2]]
        rounded = [None if slope is None else round(slope, 2) for slope in slopes]
        more: dict[str, object] = {
            "equivalent": names[1] if len(names) > 1 else "",
            "sizes": sizes,
            "growth": rounded[0],
            "ours_s": [float(f"{s:.3g}") for s in seconds["ours"]],
        }
        if len(names) == 1:
            report(what, slopes[0] or 0.0, "exponent", target, note, **more)
            return seconds
        pair = (names[1], "ours") if speedup else ("ours", names[1])
        ratios = [each.ratio(*pair) for each in found]
        place = sizes.index(at) if at in sizes else len(sizes) - 1
        more |= {
            "ratios": [float(f"{ratio:.4g}") for ratio in ratios],
            "at": sizes[place],
            "equivalent_growth": rounded[1],
            "quartiles": found[place].quartiles(*pair),
            **({"better": "higher"} if speedup else {}),
        }
        report(what, ratios[place], "x", target, note, **more)
        return seconds

    return run


@pytest.fixture
def peak_memory():
    """Peak bytes that a script adds in a process of its own after its line `START()`, and what it prints (as JSON, or None)."""

    def run(script: str, *arguments: object) -> tuple[int, object]:
        source = f"{_PEAK}\n{script}\nprint(json.dumps([_peak() - _before[-1], globals().get('RESULT')]))"
        command = [sys.executable, "-c", source, *map(str, arguments)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peak, result = json.loads(out.splitlines()[-1])
        return peak, result

    return run


# ru_maxrss would start from the parent's peak. Writing 5 to clear_refs sets the peak back to what is in use.
_PEAK = """
import json, re
_before = [0]
def _peak(): return 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])
def START():
    open('/proc/self/clear_refs', 'w').write('5')
    _before.append(_peak())
"""


# ---- the table, and the record ----


def pytest_sessionfinish(session, exitstatus):
    option = session.config.getoption
    if exitstatus or option("--update"):  # which is asked for where a change is meant
        return
    changes = _changes(session.config)
    worse = option("--fail-on-worse") and any(c.worse for *_, c in changes)
    if worse or any(record.regression(row, before) for row, before, _ in changes):
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter, config):
    if not _RUN.rows:
        return
    write = terminalreporter.write_line
    terminalreporter.section("results")
    write(_beside(config))
    write(f"{'what':58} {'now':>9} {'unit':8} {'before':>9} {'now/before':>10} {'target':8} {'met':4}")
    changes = _changes(config)
    for row, before, change in changes:
        was = f"{before['value']:g}" if before else "-"
        ratio = f"{change.ratio:.2f}" if change.ratio else "-"
        line = (
            f"{row['what']:58} {row['value']:>9g} {row['unit']:8} {was:>9} {ratio:>10} {row['target']:8} {row['met']:4}"
        )
        write(f"{line} {record.regression(row, before) or change.worse}".rstrip())
        details = _details(row)
        if details:
            write(f"    {details}")
    worse, missed = [r["what"] for r, _, c in changes if c.worse], [r["what"] for r, *_ in changes if r["met"] == "no"]
    regressions = sum(bool(record.regression(row, before)) for row, before, _ in changes)
    write(
        f"{len(changes)} rows; {len(worse)} worse than before, {regressions} of them regressions; "
        f"{len(missed)} miss their target"
    )
    _write_records(config, write)


def _details(row: record.Row) -> str:
    parts = []
    if row.get("ratios") and len(row["ratios"]) > 1:
        by_size = ", ".join(f"{ratio:g} at {size:g}" for size, ratio in zip(row["sizes"], row["ratios"], strict=True))
        parts.append(f"{by_size}" + (f" (beside {row['equivalent']})" if row.get("equivalent") else ""))
    if row.get("growth") is not None:
        theirs = row.get("equivalent_growth")
        parts.append(f"growth {row['growth']:g}" + (f", of the equivalent {theirs:g}" if theirs is not None else ""))
    return "; ".join([*parts, *([row["note"]] if row["note"] else [])])


def _baseline(config) -> Path:
    return Path(config.getoption("--baseline") or record.nearest(record.machine()))


def _is_own(config) -> bool:
    """Whether the record is that of this kind of machine, or a file that was named."""
    return bool(config.getoption("--baseline")) or _baseline(config).stem == record.kind(record.machine())


def _beside(config) -> str:
    path, own = _baseline(config), record.kind(record.machine())
    if not path.exists():
        return f"no record yet: --update writes {own}.json"
    if _is_own(config):
        return f"beside {path}"
    return f"beside {path}, of another kind of machine: ratios alone are compared; --update writes {own}.json"


def _changes(config) -> list[tuple[record.Row, record.Row | None, record.Change]]:
    files, own = record.load(_baseline(config))["files"], _is_own(config)
    found = []
    for name, rows in _RUN.rows.items():
        known = {row["what"]: row for row in files.get(name, [])}
        for row in rows:
            before = known.get(row["what"])
            if config.getoption("--quick") or (before is not None and not own and not record.is_ratio(before)):
                before = None  # tiny sizes, or a time of another machine: nothing to compare
            found.append((row, before, record.change(row, before)))
    return found


def _write_records(config, write) -> None:
    about, rows = record.machine(), _RUN.passed()
    if config.getoption("--json"):
        path = Path(config.getoption("--json"))
        path.write_text(record.dump(record.merged({"files": {}}, about, rows, {})), encoding="utf-8")
        write(f"written to {path}")
    if config.getoption("--update"):
        partial = any("::" in str(argument) for argument in config.args)
        path = record.BASELINES / f"{record.kind(about)}.json"
        path.parent.mkdir(exist_ok=True)
        tests = {} if partial else _RUN.tests
        path.write_text(record.dump(record.merged(record.load(path), about, rows, tests)), encoding="utf-8")
        write(f"written to {path}; docs/performance.md is made from it: python tools/performance.py")
