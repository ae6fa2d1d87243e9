"""On an accelerator the loss and its metrics never make the host wait.

On a CPU it is shown with meta tensors, which take the accelerator's branches and have no values: a read raises. A dispatch mode
names the operations that would wait on CUDA: reads, results whose shape depends on values, and copies between devices. With
BANDPO_DEVICE=cuda the same calls run on the GPU, where CUDA itself raises.

Exceptions, which happen once and not in each call: the first call for a region copies its table to the device, and Triton
compiles its kernel at the first call. Callers that want numbers on the host (`.item()` of a metric in a log, `pass_at_k`, the
sizes of groups in `bandpo.groups`, packing in `bandpo.selection`) wait when they read them.
"""

import contextlib
import importlib
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bandpo import OBJECTIVES, Band, Clip, policy_loss, terms, token_logprobs
from bandpo.reference import ReferenceKL
from bandpo.surrogates import IcePop, clip
from bandpo.surrogates.filters import rollout_rs, seq_mis, vaco
from batches import DEVICE, B, K, T, max_length

WHERE = "cuda" if DEVICE == "cuda" else "meta"
WAITS = {
    "_local_scalar_dense", "item", "nonzero", "masked_select", "unique2", "_unique2", "unique_dim", "unique_consecutive",
    "equal", "is_nonzero", "lift_fresh", "repeat_interleave.Tensor", "bincount", "histc",
}  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """Raises at an operation after which, or for which, the host would wait for the device."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        name = function.overloadpacket._qualified_op_name.split("::")[-1]
        full = f"{name}.{function._overloadname}"
        if name in WAITS or full in WAITS:
            raise AssertionError(f"{full} makes the host wait")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            dtypes = [x.dtype for x in arguments[1] if x is not None]
            assert torch.bool not in dtypes and torch.uint8 not in dtypes, f"{full} with a mask makes the host wait"
        out = function(*arguments, **named)
        tensors = [x for x in torch.utils._pytree.tree_leaves((arguments, named)) if isinstance(x, torch.Tensor)]
        found = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        for x in tensors:  # a 0-d tensor of the host goes along with the launch
            assert x.device.type == WHERE or x.dim() == 0, f"{full} reads a tensor on {x.device}"
        if any(x.device.type == WHERE for x in tensors):
            assert all(x.device.type == WHERE for x in found), f"{full} copies to the host"
        return out


@contextlib.contextmanager
def nothing_waits():
    if WHERE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        with NoWaiting():
            yield


def batch(objective, dtype, mask_dtype):
    def full(value, *shape, dtype=dtype):
        return torch.full(shape or (B, T), value, dtype=dtype, device=WHERE)

    shapes = {"topk_logprobs": (B, T, K), "old_topk_logprobs": (B, T, K)}
    extras = {name: full(-1.0, *shapes.get(name, (B,))) for name in objective.extras}
    if "sampled_in_topk" in extras:
        extras["sampled_in_topk"] = full(False, B, T, dtype=torch.bool)
    return {
        "logprobs": full(-1.0).requires_grad_(), "old_logprobs": full(-1.1), "rollout_logprobs": full(-1.2),
        "ref_logprobs": full(-1.3), "advantages": full(0.5, B), "mask": full(1, dtype=mask_dtype), "extras": extras,
    }  # fmt: skip


def step(objective, detail, dtype, mask_dtype, **options):
    data = batch(objective, dtype, mask_dtype)
    options.setdefault("entropy", data["old_logprobs"])
    loss, metrics = policy_loss(
        **data,
        objective=objective,
        metrics=detail,
        kl_coef=0.1,
        max_length=max_length(objective.aggregation),
        **options,
    )
    loss.backward()
    assert all(x.device.type == WHERE and x.dim() == 0 for x in metrics.values())
    return data["logprobs"].grad


class Launched:
    """Stands for the kernel: what is around it is checked, on a device that cannot run it."""

    def __getitem__(self, grid):
        self.grid = grid
        return lambda *args, **kwargs: None


@pytest.fixture(params=["plain", "fused"])
def route(request, monkeypatch):
    if request.param == "fused":
        pytest.importorskip("triton")
        if WHERE == "meta":
            sys.modules.pop("bandpo.surrogates.kernel", None)
            kernel = importlib.import_module("bandpo.surrogates.kernel")
            monkeypatch.setattr(kernel, "_kernel", Launched())
    monkeypatch.setattr(terms, "_runs_triton", lambda device: request.param == "fused")
    yield request.param
    if WHERE == "meta":
        sys.modules.pop("bandpo.surrogates.kernel", None)


@pytest.mark.device
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_host_never_waits_for_the_loss(name, route):
    objective = OBJECTIVES[name]
    if route == "fused" and objective.surrogate is not clip:
        pytest.skip("the kernel is for the clip")
    step(objective, "none", torch.float32, torch.bool)  # makes the table, which is copied once
    for detail, dtype, mask_dtype in (
        ("none", torch.float32, torch.bool), ("basic", torch.bfloat16, torch.int64), ("full", torch.float32, torch.int64),
    ):  # fmt: skip
        with nothing_waits():
            gradient = step(objective, detail, dtype, mask_dtype)
        assert gradient.shape == (B, T) and gradient.dtype == dtype


MORE = {
    "budget of the batch": {"filter": vaco(0.5, over="batch")},
    "rejection by verl's names": {"filter": rollout_rs("token_k1,seq_mean_k3,seq_sum_k2", "0.5_2,0.1,0.1")},
    "sequence weights": {"filter": seq_mis(0.1, 3.0)},
    "sequence correction": {"correction": IcePop(0.5, 5.0, level="sequence")},
    "relaxed band": {"bounds": Band("kl", 0.05, relax=Clip(0.2, 0.28))},
    "solved bounds": {"bounds": Band("hellinger", torch.full((), 0.05, device=WHERE))},
    "sequence band": {"bounds": Band("kl", 0.001), "ratio_level": "sequence"},
    "own surrogate": {"surrogate": lambda log_ratio, advantages, bounds: log_ratio.exp().clamp(*bounds) * advantages},
}


@pytest.mark.device
@pytest.mark.parametrize("name", MORE)
def test_the_host_never_waits_for_other_components(name, monkeypatch):
    monkeypatch.setattr(terms, "_runs_triton", lambda device: False)
    objective = replace(OBJECTIVES["grpo"], **MORE[name])
    step(objective, "none", torch.float32, torch.bool)
    for detail in ("basic", "full"):
        with nothing_waits():
            step(objective, detail, torch.float32, torch.bool)


@pytest.mark.device
@pytest.mark.parametrize("kl", ReferenceKL.__args__)
def test_the_host_never_waits_for_options(kl, route):
    weight = torch.ones(B, device=WHERE)
    for normalizer in (7.0, torch.ones((), device=WHERE)):
        options = {"kl": kl, "sample_weight": weight, "normalizer": normalizer}
        step(OBJECTIVES["bandpo-kl"], "none", torch.float32, torch.bool, **options)
        with nothing_waits():
            step(OBJECTIVES["bandpo-kl"], "basic", torch.float32, torch.bool, **options)


@pytest.mark.device
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("memory", [None, 0, math.inf])
def test_the_host_never_waits_for_token_logprobs(trained, memory):
    def call():
        hidden = torch.ones(12, 8, device=WHERE, requires_grad=True)
        weight = torch.ones(50, 8, device=WHERE, requires_grad=trained)
        targets = torch.zeros(12, dtype=torch.int64, device=WHERE)
        out = token_logprobs(hidden, weight, targets, entropy=True, top_k=3, chunk_size=5, memory=memory)
        (out.logprobs.sum() + out.entropy.sum()).backward()

    call()
    with nothing_waits():
        call()


@pytest.mark.skipif(WHERE == "cuda", reason="about the dispatch mode")
@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(), lambda x: bool((x > 0).any()), lambda x: x[x > 0], lambda x: (x > 0).nonzero(),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]), lambda x: x.cpu(), lambda x: torch.tensor([1.0]).to(x.device),
        lambda x: torch.ones(3).to(x.device) + x,
    ],
)  # fmt: skip
def test_what_waits_is_found(wait):
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NoWaiting():
        wait(torch.ones(3, device=WHERE))
