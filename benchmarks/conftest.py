"""Paired timings: the cases of a comparison run in turn, round by round, in one process; medians and their ratios are reported.

pytest-benchmark times one case after the other, so that a neighbour's load falls on one and not on the next: hence this.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
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

    def add(what: str, value: float, unit: str, target: str = "", note: str = "") -> None:
        met = ""
        if target:
            sign, limit = target.split()
            met = "yes" if (value <= float(limit) if sign == "<=" else value >= float(limit)) else "no"
        _ROWS.append({"what": what, "value": round(value, 3), "unit": unit, "target": target, "met": met, "note": note})

    return add


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
