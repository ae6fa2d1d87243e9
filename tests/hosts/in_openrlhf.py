"""OpenRLHF: its loss class, its aggregation over ranks, what its caller unpacks, and the way into its Ray workers."""

import ast
import inspect
import sys
from pathlib import Path

import cases
import pytest
import torch
from isolation import stub, without_init

from bandpo.integrations import _workers
from bandpo.integrations import openrlhf as ours
from bandpo.integrations._host import ENVIRONMENT
from conftest import HOST

CHILD = """
import sys
sys.path[:0] = {path!r}
from isolation import stub, without_init
without_init({host!r}, "openrlhf", "openrlhf.models")
stub("deepspeed")
"""

NEW = "is_correction_level" in Path(HOST, "openrlhf/models/loss.py").read_text()  # 0.11.2 and later
SEQUENCE = {"is_correction_level": "seq"} if NEW else {
    "enable_vllm_is_correction": True, "vllm_is_correction_type": "seq-mask-tis", "vllm_is_truncated_threshold": [0.5, 5.0],
}  # fmt: skip


def correction(mode, low, high):
    """A correction of single tokens for the sampler, in the words of this version."""
    if NEW:
        return {"is_correction_level": "token", "is_correction_mode": mode, "is_correction_threshold": [low, high]}
    return {
        "enable_vllm_is_correction": True, "vllm_is_correction_type": {"mask": "icepop", "clip": "tis"}[mode],
        "vllm_is_truncated_threshold": [low, high],
    }  # fmt: skip


@pytest.fixture
def host(monkeypatch):
    """`openrlhf.models.loss` with our class in the place of its own."""
    monkeypatch.setenv(ENVIRONMENT, '{"objective": "bandpo-kl"}')
    for name in [n for n in sys.modules if n.startswith("openrlhf")]:
        monkeypatch.delitem(sys.modules, name)
    without_init(HOST, "openrlhf", "openrlhf.models")
    stub("deepspeed")
    ours.patch()
    import openrlhf.models.loss as module

    return module


def train(module, data, ranks, token_level, steps=1, **options):
    """Two ranks with their micro-batches; DeepSpeed averages the gradients over ranks, so the loss carries `dp_size`."""
    loss_fn = module.PolicyLoss(
        clip_eps_low=0.2,
        clip_eps_high=0.2,
        dual_clip=None,
        token_level_loss=token_level,
        policy_loss_type="ppo",
        **options,
    )
    mask = data["mask"].double()
    x = data["logprobs"].clone().requires_grad_()
    total, outputs = 0.0, []
    for parts in ranks:
        for part in parts:
            out = loss_fn(
                x[part], data["old_logprobs"][part], data["advantages"][part], action_mask=mask[part],
                rollout_log_probs=data["rollout_logprobs"][part], dp_size=len(ranks), batch_num_tokens=mask.sum(),
                global_batch_size=torch.tensor(float(cases.B)),
            )  # fmt: skip
            outputs.append(out)
            total = total + out[0] / len(ranks)
    (gradient,) = torch.autograd.grad(total, x)
    return (total.detach(), gradient), outputs


@pytest.mark.parametrize("objective", [*cases.OBJECTIVES, "dppo-kl", "icepop"])
@pytest.mark.parametrize("token_level", [True, False])
def test_it_is_policy_loss_with_openrlhf_s_aggregation(monkeypatch, host, objective, token_level):
    data = cases.mini_batch(1)
    module = with_objective(monkeypatch, objective)
    aggregation = "token-mean" if token_level else "seq-mean-token-mean"
    normalizer = int(data["mask"].sum()) if token_level else cases.B
    want = cases.wanted(data, objective, aggregation, normalizer=normalizer)
    for ranks in (cases.RANKS, (cases.HALVES,)):
        cases.same(train(module, data, ranks, token_level)[0], want, 1e-8)  # theirs divides by tokens + 1e-8


def with_objective(monkeypatch, objective):
    monkeypatch.setenv(ENVIRONMENT, f'{{"objective": "{objective}"}}')
    for name in [n for n in sys.modules if n.startswith("openrlhf.models.")]:
        monkeypatch.delitem(sys.modules, name)
    ours.patch()
    import importlib

    return importlib.import_module("openrlhf.models.loss")


def test_the_clip_is_openrlhf_s_own(monkeypatch, host):
    data = cases.mini_batch(2, poison=False)
    module = with_objective(monkeypatch, "grpo")
    theirs = type(
        "Module", (), {"PolicyLoss": inspect.getclosurevars(module.PolicyLoss.__init__).nonlocals["host_loss"]}
    )
    for options in ({}, correction("mask", 0.8, 1.25), correction("clip", 0.0, 1.1)):
        found = [train(m, data, cases.RANKS, True, **options) for m in (module, theirs)]
        cases.same(found[0][0], found[1][0])
        for ours_out, their_out in zip(found[0][1], found[1][1], strict=True):
            assert len(ours_out) == len(their_out)
            torch.testing.assert_close(ours_out[1:3], their_out[1:3], check_dtype=False)


def test_the_caller_unpacks_as_many_values_as_we_return(host):
    """Read from the caller's source: the number of names on the left of `self.actor_loss_fn(...)`."""
    tree = ast.parse(Path(HOST, "openrlhf/trainer/ray/ppo_actor.py").read_text())
    (call,) = [
        n for n in ast.walk(tree)
        if isinstance(n, ast.Assign) and isinstance(n.value, ast.Call)
        and getattr(n.value.func, "attr", "") == "actor_loss_fn"
    ]  # fmt: skip
    out = train(host, cases.mini_batch(0), cases.RANKS, True)[1][0]
    assert len(out) == len(call.targets[0].elts)
    keywords = {k.arg for k in call.value.keywords} - {None}
    assert keywords <= set(inspect.signature(host.PolicyLoss.forward).parameters)
    assert out[0].dim() == 0 and out[1].isfinite() and out[2].isfinite() and not any(x is not None for x in out[3:])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip_eps_high": 0.28}, "clip_eps_high=0.28 would be ignored"),
        ({"dual_clip": 3.0}, "dual_clip=3.0 would be ignored"),
        ({"policy_loss_type": "gspo"}, "policy_loss_type='gspo' would be ignored"),
        (SEQUENCE, "cannot be expressed"),
        (correction("clip", 0.5, 5.0), "cannot be expressed"),
    ],
)
def test_options_that_would_be_ignored(host, options, words):
    with pytest.raises(ValueError, match=words):
        host.PolicyLoss(**options)


def test_both_accounting_for_the_sampler(monkeypatch, host):
    module = with_objective(monkeypatch, "dppo-kl")
    with pytest.raises(ValueError, match="accounts for the sampler itself; use one"):
        module.PolicyLoss(**correction("mask", 0.5, 5.0))


def test_the_exchange_reaches_a_ray_worker(monkeypatch, host, tmp_path):
    """The host's own `ray.init` call, through our wrapper; the worker imports OpenRLHF's module and tells its class."""
    import ray

    monkeypatch.setenv(ENVIRONMENT, '{"objective": "bandpo-tv", "radius": 0.2}')
    monkeypatch.setattr(ray, "init", ray.init)
    _workers.carry_to_ray_workers("bandpo.integrations.openrlhf.patch")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    path = [str(Path(__file__).parent), *[p for p in sys.path if p.endswith("src")], HOST]
    ray.init(
        num_cpus=1, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": ":".join(path), "TOKENIZERS_PARALLELISM": "true"}},
    )  # fmt: skip
    try:
        found = ray.get(ray.remote(_in_a_worker).remote(CHILD.format(path=path, host=HOST)), timeout=500)
    finally:
        ray.shutdown()
    assert found == ("TV", 0.2)


def _in_a_worker(setup):
    exec(setup)
    from openrlhf.models.loss import PolicyLoss

    bounds = PolicyLoss().objective.bounds
    return bounds.divergence.name, bounds.radius
