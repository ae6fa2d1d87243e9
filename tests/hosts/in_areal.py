"""AReaL: its `grpo_loss_fn`, packed and padded, with its rejection sampling and its weighing of micro-batches."""

import importlib
import math
import os
from functools import partial
from types import SimpleNamespace

import cases
import pytest
import torch
from isolation import stub, without_init

from bandpo import Clip, Objective, token_objective
from bandpo.experimental import second_moment
from bandpo.integrations import areal as ours
from bandpo.integrations._host import ENVIRONMENT
from conftest import HOST

without_init(
    HOST, "areal", "areal.utils", "areal.api", "areal.infra", "areal.trainer", "areal.trainer.ppo", "areal.engine"
)
stub("uvloop", "numba", "einops", "areal.experimental", "areal.infra.platforms", "areal.infra.rpc")
import areal.api
import areal.infra

for name in ("TrainEngine",):
    setattr(areal.api, name, type(name, (), {}))
areal.infra.TrainController = type("TrainController", (), {})
areal.utils.logging = importlib.import_module("areal.utils.logging")

import areal.trainer.ppo.actor as actor
from areal.api.cli_args import RejectionSamplingConfig
from areal.infra.platforms import current_platform
from areal.utils import stats_tracker

current_platform.device_type = "cpu"
current_platform.current_device.return_value = "cpu"

THEIRS = actor.ppo_actor_loss_fn
RECORD = stats_tracker.stat


def stat(denominator, reduce_type=None, **values):
    """AReaL's statistics take float32 alone; the tests are in float64."""
    RECORD(denominator=denominator, reduce_type=reduce_type, **{name: x.float() for name, x in values.items()})


stats_tracker.stat = stat


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(actor, "ppo_actor_loss_fn", THEIRS)
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    yield
    stats_tracker.export_all()


def exchange(monkeypatch, objective):
    monkeypatch.setenv(ENVIRONMENT, f'{{"objective": "{objective}"}}')
    ours.exchange()


def call(data, x, part, packed, rejection=None):
    """AReaL's own loss of the actor, which calls the function that `exchange` replaced."""
    rows = cases.rows(data, part)
    given = {
        "logprobs": rows["rollout_logprobs"], "advantages": rows["advantages"],
        "loss_mask": rows["mask"], "attention_mask": torch.ones_like(rows["mask"]),
        "prox_logp": rows["old_logprobs"].nan_to_num(),  # AReaL itself stops at a NaN there, under the mask too
    }  # fmt: skip
    new = x[part]
    if packed:
        given = {name: v.flatten() for name, v in given.items()}
        given["cu_seqlens"] = torch.arange(0, rows["mask"].numel() + 1, cases.T)
        new = new.flatten()
    return actor.grpo_loss_fn(
        new, torch.zeros_like(new), given, eps_clip=0.2, eps_clip_higher=None, c_clip=None, rejection_sampling=rejection,
        use_decoupled_loss=True,
    )  # fmt: skip


def train(data, ranks, packed, rejection=None):
    """The engines weigh each micro-batch by its valid tokens, over all ranks."""
    x = data["logprobs"].clone().requires_grad_()
    total = data["mask"].sum()
    loss = sum(
        call(data, x, part, packed, rejection) * data["mask"][part].sum() / total for parts in ranks for part in parts
    )
    (gradient,) = torch.autograd.grad(loss, x)
    return loss.detach(), gradient


@pytest.mark.parametrize("objective", [*cases.OBJECTIVES, "dppo-kl", "icepop"])
@pytest.mark.parametrize("packed", [True, False])
def test_it_is_policy_loss_as_a_token_mean(monkeypatch, objective, packed):
    data = cases.mini_batch(1)
    exchange(monkeypatch, objective)
    want = cases.wanted(data, objective, "token-mean")
    for ranks in (cases.RANKS, (cases.HALVES,)):
        cases.same(train(data, ranks, packed), want)


@pytest.mark.parametrize("action", ["mask", "clamp"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_clip_and_rejection_are_areal_s_own(monkeypatch, action, level):
    data = cases.mini_batch(2, poison=False)
    rejection = RejectionSamplingConfig(level=level, action=action, metric="ratio", upper=1.2, lower=0.8)
    for given in (None, rejection):
        monkeypatch.setattr(actor, "ppo_actor_loss_fn", THEIRS)
        want = train(data, cases.RANKS, True, given)
        exchange(monkeypatch, "grpo")
        cases.same(train(data, cases.RANKS, True, given), want, cases.FLOAT32)
        poisoned = cases.mini_batch(2)
        cases.same(train(poisoned, cases.RANKS, True, given), want, cases.FLOAT32)


@pytest.mark.parametrize("budget", [0.001, 0.01, 0.04, 1.0])
def test_m2po_with_every_token_is_areal_s(budget):
    """AReaL's own mask of loss, from the recomputed policy against the sampler; ours leaves out what it masks."""
    data = cases.mini_batch(6, poison=False)
    on = data["mask"]
    want = actor._apply_m2po_masking(data["rollout_logprobs"], data["old_logprobs"], on.bool(), budget)
    terms = token_objective(
        Objective(bounds=Clip(1.0, math.inf), surrogate=partial(second_moment, budget=budget, every_token=True)),
        logprobs=data["old_logprobs"], old_logprobs=data["rollout_logprobs"], advantages=data["advantages"], mask=on,
    )  # fmt: skip
    kept = on.bool() & (terms.value != 0)
    moved = data["advantages"].expand(on.shape) if data["advantages"].dim() > 1 else data["advantages"].unsqueeze(1)
    assert torch.equal(kept, want & (moved != 0))
    assert budget == 1.0 or (~want & on.bool()).any()


def test_the_statistics_of_each_token_are_areal_s(monkeypatch):
    data = cases.mini_batch(3, poison=False)
    x = data["logprobs"].clone().requires_grad_()
    found = []
    for change in (False, True):
        stats_tracker.export_all()
        if change:
            exchange(monkeypatch, "grpo")
        call(data, x, slice(0, 6), True)
        found.append({k: v for k, v in stats_tracker.export_all().items() if "clip_ratio" in k or "approx_kl" in k})
    assert found[0] and found[1] == pytest.approx(found[0], rel=1e-5)
    assert any("clip_ratio" in k and v > 0 for k, v in found[1].items())


def test_whole_sequences_need_their_borders(monkeypatch):
    data = cases.mini_batch(4)
    exchange(monkeypatch, "gspo")
    with pytest.raises(ValueError, match="looks at whole sequences, and cu_seqlens is missing"):
        actor.ppo_actor_loss_fn(
            data["logprobs"].flatten(), data["old_logprobs"].flatten(), data["rollout_logprobs"].flatten(),
            data["advantages"].flatten(), 0.2, data["mask"].flatten(),
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"eps_clip=0.3 would be ignored"):
        actor.ppo_actor_loss_fn(*[data["logprobs"]] * 4, 0.3, data["mask"])


def config(**changes):
    spec = SimpleNamespace(env_vars={})
    values = {
        "eps_clip": 0.2, "eps_clip_higher": None, "c_clip": None, "importance_sampling_level": "token",
        "use_sapo_loss": False, "use_decoupled_loss": False, "rejection_sampling": None, "scheduling_spec": (spec,),
    }  # fmt: skip
    return SimpleNamespace(actor=SimpleNamespace(**{**values, **changes})), spec


def test_install_reaches_the_engine_that_a_worker_imports_by_path(monkeypatch):
    import areal.engine

    class FSDPPPOActor:
        def __init__(self, config):
            self.config = config

    FSDPPPOActor.__module__ = "areal.engine.fsdp_engine"
    monkeypatch.setattr(areal.engine, "FSDPPPOActor", FSDPPPOActor, raising=False)
    made, spec = config()
    ours.install(made, "bandpo-tv", radius=0.2)
    assert spec.env_vars[ENVIRONMENT] == os.environ[ENVIRONMENT] == '{"objective": "bandpo-tv", "radius": 0.2}'
    engine = areal.engine.FSDPPPOActor
    monkeypatch.setattr(areal.engine, "FSDPPPOActor", FSDPPPOActor)  # a worker starts from AReaL's own
    by_path = getattr(importlib.import_module(engine.__module__), engine.__name__)
    assert issubclass(by_path, FSDPPPOActor)
    assert by_path("x").config == "x" and actor.ppo_actor_loss_fn is not THEIRS


@pytest.mark.parametrize(
    ("objective", "changes", "words"),
    [
        ("dppo-kl", {}, "set actor.use_decoupled_loss=true"),
        ("bandpo-kl", {"eps_clip_higher": 0.28}, "eps_clip_higher=0.28 would be ignored"),
        ("bandpo-kl", {"use_sapo_loss": True}, "use_sapo_loss=True would be ignored"),
        ("icepop", {"use_decoupled_loss": True, "rejection_sampling": "x"}, "accounts for the sampler itself"),
        ("cases:WEIGHING", {"use_decoupled_loss": True, "rejection_sampling": "x"}, "accounts for the sampler itself"),
        ("etr-reading", {}, "signal; AReaL does not give"),
    ],
)
def test_refused(objective, changes, words):
    with pytest.raises(ValueError, match=words):
        ours.install(config(**changes)[0], objective)
