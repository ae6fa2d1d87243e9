"""The bounds against bisection, and against what reading one tensor and writing two costs."""

import time

import pytest
import torch

from bandpo import KL, alpha, in_band, ratio_bounds
from bandpo.bounds.table import _build, table_for
from bandpo.divergences import DIVERGENCES
from bisection import bisection_bounds

RADIUS = 0.05
SIZES = [1 << 14, 1 << 16, 1 << 18]
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
def test_ratio_bounds(divergence, logp, compare, paired, report):
    name = divergence.name
    compiled = torch.compile(lambda x: ratio_bounds(x, divergence, RADIUS), fullgraph=True, dynamic=True)
    for mode, ours, target in (
        ("compiled", compiled, ">= 200"),
        ("eager", lambda x: ratio_bounds(x, divergence, RADIUS), ">= 30"),
    ):

        def make(tokens, ours=ours):
            part = logp[:tokens].contiguous()
            return {"ours": lambda: ours(part), "bisection": lambda: bisection_bounds(part, divergence, RADIUS)}

        what = f"bisection / ratio_bounds {mode}, {name}"
        compare(what, make, SIZES, target=target, rounds=3, speedup=True)
    t = paired({"compiled": lambda: compiled(logp), "floor": lambda: one_read_two_writes(logp)})
    note = f"{t['compiled'] / len(logp) * 1e9:.2f} against {t['floor'] / len(logp) * 1e9:.2f} ns a token"
    report(
        f"ratio_bounds compiled / one read, two writes, {name}",
        t.ratio("compiled", "floor"),
        "x",
        "<= 3",
        note,
        quartiles=t.quartiles("compiled", "floor"),
    )


def test_floor_of_the_table(logp, paired, report):
    """What the table's eight reads cost by themselves, in rows as they come, so that nothing else is computed."""
    table = table_for(KL, RADIUS, RADIUS, logp.device)
    row = (logp * -16).to(torch.int32) + table.uniform
    compiled = torch.compile(lambda x: ratio_bounds(x, KL, RADIUS), fullgraph=True)
    t = paired({"bounds": lambda: compiled(logp), "gathers": lambda: gathers_alone(table.coefficients, row)})
    pair = ("bounds", "gathers")
    what = "ratio_bounds compiled / its eight table reads alone"
    report(what, t.ratio(*pair), "x", quartiles=t.quartiles(*pair))


def test_larger_than_the_cache(compare):
    """At 16M tokens nothing stays in the cache, as in a step whose activations pass through it."""
    compiled = torch.compile(lambda x: ratio_bounds(x, KL, RADIUS), fullgraph=True, dynamic=True)

    def make(tokens):
        logp = -torch.rand(tokens) * 8
        return {"ours": lambda: compiled(logp), "one read, two writes": lambda: one_read_two_writes(logp)}

    what = "ratio_bounds compiled / one read, two writes, KL, to 16M tokens"
    compare(what, make, [1 << 16, 1 << 20, 1 << 24], target="<= 3", rounds=5)


def test_in_band(logp, paired, report):
    log_ratio = torch.randn(len(logp), generator=torch.Generator().manual_seed(1)) * 0.1
    compiled, exp = torch.compile(lambda x, y: in_band(y, x), fullgraph=True), torch.compile(torch.exp)
    t = paired({"in_band": lambda: compiled(logp, log_ratio), "exp": lambda: exp(logp)})
    pair, note = ("in_band", "exp"), f"exp {t['exp'] / len(logp) * 1e9:.2f} ns a token"
    what = "in_band compiled / exp compiled, KL"
    report(what, t.ratio(*pair), "x", "<= 12", note, quartiles=t.quartiles(*pair))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("divergence", ALL, ids=lambda d: d.name)
def test_building_a_table(divergence, report):
    start = time.process_time()
    _build(divergence, RADIUS, RADIUS)
    report(f"building a table, {divergence.name}", time.process_time() - start, "s")


@pytest.mark.parametrize("name", ["kl", "tv", "js"])
def test_tensor_radius(name, logp, compare):
    """Where no table serves: the solver, in float64."""

    def make(tokens):
        part = logp[:tokens].double()
        radius, divergence = torch.full_like(part, RADIUS), DIVERGENCES[name]
        return {
            "ours": lambda: ratio_bounds(part, name, radius),
            "bisection": lambda: bisection_bounds(part, divergence, RADIUS),
        }

    compare(f"ratio_bounds with a tensor radius, eager, {name}", make, [1 << 12, 1 << 14, 1 << 16], rounds=3)
