"""Statistics of runs are resampled in batches: the numbers are those of all resamples at once, and memory does not grow."""

import tracemalloc

import numpy as np
import pytest

from bandpo import statistics as stats


@pytest.mark.parametrize("at_once", [1, 700, 1 << 18])
@pytest.mark.parametrize("runs", [3, 14, 40])
def test_batches_change_no_number(runs, at_once, monkeypatch):
    rng = np.random.default_rng(runs)
    first, second = list(rng.normal(size=runs)), list(rng.normal(size=runs) + 0.3)
    monkeypatch.setattr(stats, "RESAMPLES", 999)
    found = []
    for values in (1 << 40, at_once):
        monkeypatch.setattr(stats, "_AT_ONCE", values)
        found.append(repr((stats.interval(first), stats.paired({"a": (first, second)}))))
    assert found[0] == found[1]


def test_memory_does_not_grow_with_the_runs():
    peaks = []
    for runs in (100, 400):
        values = list(np.random.default_rng(0).normal(size=runs))
        tracemalloc.start()
        stats.interval(values)
        stats.paired({"a": (values, [0.0] * runs)})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
    assert peaks[1] < 60 * 2**20
