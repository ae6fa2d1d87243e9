"""The bounds against bisection, and against what reading one tensor and writing two costs."""

import time

import pytest
import torch

from bandpo import KL, alpha, in_band, ratio_bounds
from bandpo.bounds.table import _build, table_for
from bandpo.divergences import DIVERGENCES
from bisection import bisection_bounds

RADIUS = 0.05
ALL = [*DIVERGENCES.values(), alpha(3.0)]


@pytest.fixture(scope="module")
def logp(tokens):
    return -torch.rand(tokens, generator=torch.Generator().manual_seed(0)) * 8


@torch.compile(fullgraph=True)
def one_read_two_writes(x):
    return x * 2, x + 1


@torch.compile(fullgraph=True)
def gathers_alone(columns, row):
    return tuple(c[row] for c in columns.unbind())


@pytest.mark.parametrize("divergence", ALL, ids=lambda d: d.name)
def test_ratio_bounds(divergence, logp, paired, report):
    compiled = torch.compile(lambda x: ratio_bounds(x, divergence, RADIUS), fullgraph=True)
    fast = paired(
        {
            "compiled": lambda: compiled(logp),
            "floor": lambda: one_read_two_writes(logp),
            "eager": lambda: ratio_bounds(logp, divergence, RADIUS),
        }
    )
    slow = paired({"bisection": lambda: bisection_bounds(logp, divergence, RADIUS)}, rounds=3)["bisection"]
    name, n = divergence.name, len(logp)
    report(f"bisection / ratio_bounds compiled, {name}", slow / fast["compiled"], "x", ">= 200")
    report(f"bisection / ratio_bounds eager, {name}", slow / fast["eager"], "x", ">= 30")
    note = f"{fast['compiled'] / n * 1e9:.2f} against {fast['floor'] / n * 1e9:.2f} ns a token"
    report(f"ratio_bounds compiled / one read, two writes, {name}", fast["compiled"] / fast["floor"], "x", "<= 3", note)


def test_floor_of_the_table(logp, paired, report):
    """What the table's eight reads cost by themselves, in rows as they come, so that nothing else is computed."""
    table = table_for(KL, RADIUS, RADIUS, logp.device)
    row = (logp * -16).to(torch.int32) + table.uniform
    compiled = torch.compile(lambda x: ratio_bounds(x, KL, RADIUS), fullgraph=True)
    t = paired({"bounds": lambda: compiled(logp), "gathers": lambda: gathers_alone(table.coefficients, row)})
    report("ratio_bounds compiled / its eight table reads alone", t["bounds"] / t["gathers"], "x")


def test_larger_than_the_cache(paired, report):
    """At 16M tokens nothing stays in the cache, as in a step whose activations pass through it."""
    logp = -torch.rand(1 << 24) * 8
    compiled = torch.compile(lambda x: ratio_bounds(x, KL, RADIUS), fullgraph=True)
    t = paired({"bounds": lambda: compiled(logp), "floor": lambda: one_read_two_writes(logp)}, rounds=5)
    report(
        "the same at 16M tokens, KL", t["bounds"] / t["floor"], "x", "<= 3", f"floor {t['floor'] / 2**24 * 1e9:.2f} ns"
    )


def test_in_band(logp, paired, report):
    log_ratio = torch.randn(len(logp), generator=torch.Generator().manual_seed(1)) * 0.1
    compiled, exp = torch.compile(lambda x, y: in_band(y, x), fullgraph=True), torch.compile(torch.exp)
    t = paired({"in_band": lambda: compiled(logp, log_ratio), "exp": lambda: exp(logp)})
    note = f"exp {t['exp'] / len(logp) * 1e9:.2f} ns a token"
    report("in_band compiled / exp compiled, KL", t["in_band"] / t["exp"], "x", "<= 12", note)


@pytest.mark.parametrize("divergence", ALL, ids=lambda d: d.name)
def test_building_a_table(divergence, report):
    start = time.perf_counter()
    _build(divergence, RADIUS, RADIUS)
    report(f"building a table, {divergence.name}", time.perf_counter() - start, "s")


def test_tensor_radius(logp, paired, report):
    """Where no table serves: the solver, in float64."""
    part = logp[: 1 << 16].contiguous()
    radius = torch.full_like(part, RADIUS)
    for name in ("kl", "tv", "js"):
        t = paired({"solver": lambda name=name: ratio_bounds(part, name, radius)}, rounds=3)["solver"]
        report(f"tensor radius, eager, {name}", t / len(part) * 1e9, "ns/token")
