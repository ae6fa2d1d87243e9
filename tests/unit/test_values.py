"""Every public object survives pickle, copy and worker processes; what is equal has one hash."""

import copy
import importlib
import math
import multiprocessing
import pickle
import pkgutil
from functools import partial

import pytest
import torch

import bandpo
from bandpo import (
    CHI2,
    DCPO,
    KL,
    OBJECTIVES,
    TV,
    Band,
    Clip,
    FDivergence,
    Objective,
    _deprecations,
    alpha,
    group_advantages,
    policy_loss,
    ratio_bounds,
)
from bandpo.bounds import Intersection, Union
from bandpo.bounds.regions import BySign, Sides, TopK, kl3_clip, log_clip
from bandpo.divergences import DIVERGENCES
from bandpo.doctor.output import Examined
from bandpo.doctor.setup import TRL_KNOBS, Setup
from bandpo.doctor.truncation import Truncation
from bandpo.experimental import Balanced, Elastic
from bandpo.monitoring.catalog import RULES
from bandpo.monitoring.findings import Finding
from bandpo.monitoring.live import Told
from bandpo.monitoring.series import stats_of
from bandpo.preference import LINKS, PREFERENCES, PairObjective, alpha_link, chi2_kl
from bandpo.preference.sampling import OnPolicy
from bandpo.schedules import Adaptive, Schedule
from bandpo.selection import Informative, Pruning
from bandpo.surrogates import Projected, dual_clip, mask, soft
from bandpo.surrogates.corrections import TIS, IcePop
from bandpo.surrogates.filters import opsm


def own_f(u):
    return 2 * (1 + u) - 4 * u.sqrt()


ALPHAS = [alpha(a) for a in (3.0, 2, 1.5, 0.999, 0.5, 0.3, -1.0, -1.5)]
OWN = FDivergence("own", own_f)
RADII = torch.tensor([[0.05], [0.1]])
VALUES = [
    *DIVERGENCES.values(), *ALPHAS, OWN,
    *OBJECTIVES.values(), *LINKS.values(), *PREFERENCES.values(),
    Band(), Band("js", (0.1, 0.2), max_ratio=None, relax=Clip(0.2, 0.28)), Band(OWN, 0.1), Band(KL, RADII),
    Band(KL, (0.1, RADII)),
    Clip(), DCPO(), BySign(Clip(0.2), Band()), Sides(Clip(), Band(TV)), Elastic(), Balanced(), TopK("kl", RADII),
    Projected(torch.tensor(0.1), 8, "forward", 0.5),
    Intersection(Clip(), Band(KL, RADII), Elastic()), Union(TopK("kl", RADII), BySign(Clip(), DCPO())),
    log_clip(), kl3_clip(), TIS(), IcePop(), opsm(0.1), Schedule(0.1, 0.02, steps=9, shape="cosine"),
    Adaptive(0.05, target=0.01, rises=True),
    OBJECTIVES["bandpo-kl"].with_radius(RADII), OBJECTIVES["bandpo-kl"].with_radius(torch.tensor(0.05)),
    Objective(bounds=Band(alpha(0.3)), surrogate=partial(soft, tau_positive=2.0)),
    chi2_kl(0.25, 0.1), chi2_kl(), alpha_link(0.5), PairObjective("hard", chi2_kl(0.25), beta=0.2),
    OnPolicy(torch.tensor([0.5, 0.5])), Informative(), Pruning(completions=0.5, history={"a": 1.0}),
    Finding("inert", "problem", "seen"), Told(3, Finding("inert", "note", "seen", numbers={"x": 1.0})), stats_of([1.0, 2.0]),
    RULES["inert"], Examined("a.yaml"), Truncation(0.9, 0, 0.0),
    Setup("TRL", OBJECTIVES["dapo"], knobs=TRL_KNOBS), partial(dual_clip, c=3.0),
]  # fmt: skip
NAMES = [f"{i}-{type(v).__name__}-{getattr(v, 'name', '')}" for i, v in enumerate(VALUES)]


def same(a, b):
    if isinstance(a, partial):
        return (a.func, a.args, a.keywords) == (b.func, b.args, b.keywords)
    return a == b


@pytest.mark.parametrize("value", VALUES, ids=NAMES)
def test_pickle_copy_and_deepcopy_give_an_equal_value(value):
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert same(value, pickle.loads(pickle.dumps(value, protocol)))
    again = copy.deepcopy(value)
    assert same(value, again)
    assert same(value, copy.copy(value))
    if type(value).__hash__ is not None and not isinstance(value, partial | Setup):
        assert hash(value) == hash(again)
        assert len({value, again}) == 1


def test_built_in_divergences_and_links_stay_the_same_objects():
    for value in (*DIVERGENCES.values(), *LINKS.values(), DIVERGENCES, OBJECTIVES, LINKS, PREFERENCES):
        for again in (pickle.loads(pickle.dumps(value)), copy.copy(value), copy.deepcopy(value)):
            assert again is value


def test_every_public_name_can_be_pickled():
    modules = [bandpo, *(importlib.import_module(f"bandpo.{name}") for name in _deprecations._SUBMODULES)]
    names = {(m.__name__, n) for m in modules for n in dir(m) if not n.startswith("_")}
    assert len(names) > 200
    for module, name in names:
        value = getattr(importlib.import_module(module), name)
        if isinstance(value, type(math)) or type(value).__module__ == "typing":
            continue  # modules, and aliases of types
        pickle.loads(pickle.dumps(value))


def test_every_dataclass_of_the_library_is_one_of_those_above():
    """A new one must be added to VALUES, or named here as one that only lives inside a process or a command."""
    from dataclasses import is_dataclass

    elsewhere = (
        "bandpo.lab", "bandpo.train", "bandpo.toy", "bandpo.doctor.shell", "bandpo.doctor.launch", "bandpo.doctor.settings",
        "bandpo.doctor.trl_launch", "bandpo.doctor.trl_source", "bandpo.doctor.python_source", "bandpo.doctor.swift",
        "bandpo.integrations",
        "bandpo.plots", "bandpo.cli", "bandpo.surrogates.kernel",
    )  # fmt: skip
    found = set()
    for info in pkgutil.walk_packages(bandpo.__path__, "bandpo."):
        if info.name.startswith(elsewhere) or info.name == "bandpo.__main__":
            continue
        module = importlib.import_module(info.name)
        found |= {
            c for c in vars(module).values() if isinstance(c, type) and is_dataclass(c) and c.__module__ == info.name
        }
    left = {c.__name__ for c in found} - {type(v).__name__ for v in VALUES}
    assert left <= {"Offline", "HybridDesign", "PackedBatch"}  # made of tensors, like OnPolicy


def test_equality_looks_into_tensors_and_partials():
    a, b = Band(KL, torch.tensor([0.1, 0.2])), Band(KL, torch.tensor([0.1, 0.2]))
    assert a == b
    assert hash(a) == hash(b)
    for other in (Band(KL, torch.tensor([0.1, 0.3])), Band(KL, 0.1), Band(TV, torch.tensor([0.1, 0.2])), "band",
                  Band(KL, torch.tensor([0.1, 0.2], dtype=torch.float64)), Band(KL, torch.tensor([0.1]))):  # fmt: skip
        assert a != other
        assert other != a
    moved = OBJECTIVES["bandpo-kl"].with_radius(RADII)
    assert moved == OBJECTIVES["bandpo-kl"].with_radius(RADII.clone())
    assert moved != OBJECTIVES["bandpo-kl"].with_radius(RADII + 1)
    assert moved != OBJECTIVES["bandpo-kl"]
    one, two, three = (Objective(bounds=Clip(), surrogate=partial(dual_clip, c=c)) for c in (3.0, 3.0, 4.0))
    assert one == two
    assert hash(one) == hash(two)
    assert one != three
    assert one != Objective(bounds=Clip(), surrogate=dual_clip)
    assert alpha(0.3) == alpha(0.3)
    assert alpha(0.3) != alpha(0.30000001)
    assert alpha(2) != CHI2
    assert chi2_kl(0.25) == chi2_kl(0.25) != chi2_kl(0.5)
    assert FDivergence("x", lambda u: u - 1) != FDivergence("x", lambda u: u - 1)


def test_equal_divergences_share_a_table(monkeypatch):
    from bandpo.bounds import table as _table

    built = []
    monkeypatch.setattr(_table, "_build", lambda *args: built.append(args) or "nothing")
    with pytest.warns(UserWarning, match="float32 table"):  # noqa: PT031
        for _ in range(3):
            ratio_bounds(torch.tensor([-1.0]), alpha(0.123456), 0.0712)
    assert len(built) == 1


def work(job):
    """Something to do in another process: a loss, bounds and advantages, with objects that came by pickle."""
    objective, divergence = job
    g = torch.Generator().manual_seed(0)
    new, old = -torch.rand(2, 3, 4, generator=g).mul(4)
    loss, _ = policy_loss(
        logprobs=new, old_logprobs=old, advantages=torch.ones(3), mask=torch.ones(3, 4), objective=objective
    )
    bounds = ratio_bounds(old, divergence, 0.05)
    return loss.item(), bounds.lower.tolist(), bounds.upper.tolist(), group_advantages(new[0], 2).tolist(), divergence


@pytest.mark.slow
def test_in_spawned_workers():
    jobs = [
        (OBJECTIVES["bandpo-kl"], KL), (Objective(bounds=Band(alpha(0.3), 0.1), surrogate=mask), alpha(0.3)),
        (OBJECTIVES["dual-clip"], OWN), (OBJECTIVES["bandpo-chi2"].with_radius(torch.tensor(0.1)), DIVERGENCES["js"]),
    ]  # fmt: skip
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(work, jobs) == [work(job) for job in jobs]
