"""Paired timings: the cases of a comparison run in turn, round by round, in one process; medians of their ratios are reported.

Every row that can grow has at least three sizes: the ratio to the simplest equivalent at each, and the exponent of growth,
the slope of log time over log size (1 is linear). CPU time is used, because the machines are shared.

pytest-benchmark times one case after the other, so that a neighbour's load falls on one and not on the next: hence this.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

Rows = list[dict[str, object]]
_ROWS: Rows = []


def pytest_addoption(parser):
    parser.addoption("--json", default="benchmarks/results.json", help="where the results go")
    parser.addoption("--tokens", type=int, default=1 << 20, help="tokens in the operator's and the loss's benchmarks")


@pytest.fixture(scope="session")
def tokens(request):
    return request.config.getoption("--tokens")


@pytest.fixture(autouse=True)
def one_thread_and_a_fresh_compiler():
    torch.set_num_threads(1)
    torch._dynamo.reset()


@pytest.fixture
def paired():
    """Time zero-argument functions in turn; returns the median seconds of each."""

    def run(cases: dict[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
        for case in cases.values():
            case()
        times = {name: list[float]() for name in cases}
        for _ in range(rounds):
            for name, case in cases.items():
                start = time.perf_counter()
                case()
                times[name].append(time.perf_counter() - start)
        return {name: statistics.median(values) for name, values in times.items()}

    return run


@pytest.fixture
def report():
    """One line of the table: what, measured, unit, target (a pair of a comparison and a number), and notes."""

    def add(what: str, value: float, unit: str, target: str = "", note: str = "", **more: object) -> None:
        met = ""
        if target:
            sign, limit = target.split()
            met = "yes" if (value <= float(limit) if sign == "<=" else value >= float(limit)) else "no"
        _ROWS.append({"what": what, "value": round(value, 3), "unit": unit, "target": target, "met": met, "note": note})
        _ROWS[-1] |= more

    return add


@pytest.fixture
def compare(report):
    """Ours beside the simplest equivalent at several sizes; one row with the ratio at each size and the growth of ours.

    `make(size)` gives the zero-argument functions `{"ours": f, "<name of the equivalent>": g}`; without an equivalent the row
    has the growth alone, and `target` is that of the exponent. `clock` is CPU time of the process; pass `time.perf_counter`
    where other processes do the work. The value of the row is the ratio at the largest size.
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
    ) -> dict[str, list[float]]:
        seconds, ratios, names = dict[str, list[float]](), list[float](), list[str]()
        for size in sizes:
            cases = make(size)
            names = list(cases)
            for case in cases.values():
                case()
            times = {name: list[float]() for name in cases}
            for _ in range(rounds):
                for name, case in cases.items():
                    start = clock()
                    case()
                    times[name].append(clock() - start)
            for name in cases:
                seconds.setdefault(name, []).append(statistics.median(times[name]))
            if len(names) > 1:
                ratios.append(statistics.median(a / b for a, b in zip(times["ours"], times[names[1]], strict=True)))
        growth = _growth(sizes, seconds["ours"])
        more = {
            "equivalent": names[1] if len(names) > 1 else "",
            "sizes": list(sizes),
            "ratios": [round(ratio, 3) for ratio in ratios],
            "growth": round(growth, 2),
            "ours_s": [float(f"{s:.3g}") for s in seconds["ours"]],
        }
        value, unit = (ratios[-1], "x") if ratios else (growth, "exponent")
        report(what, value, unit, target, note, **more)
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


def _growth(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The slope of log time over log size, by least squares; NaN for fewer than two sizes."""
    if len(sizes) < 2:
        return math.nan
    return statistics.linear_regression([math.log(n) for n in sizes], [math.log(s) for s in seconds]).slope


def pytest_terminal_summary(terminalreporter, config):
    if not _ROWS:
        return
    write = terminalreporter.write_line
    terminalreporter.section("results")
    write(f"{'what':58} {'measured':>10} {'unit':10} {'target':10} {'met':4} note")
    for row in _ROWS:
        write(f"{row['what']:58} {row['value']:>10g} {row['unit']:10} {row['target']:10} {row['met']:4} {row['note']}")
    machine = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads used": 1,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "tokens": config.getoption("--tokens"),
        "date": time.strftime("%Y-%m-%d"),
    }
    path = Path(config.getoption("--json"))
    path.write_text(json.dumps({"machine": machine, "results": _ROWS}, indent=1) + "\n")
    write(f"written to {path}")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
