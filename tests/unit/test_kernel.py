"""The Triton kernel against the plain path: on a CPU in Triton's interpreter, with BANDPO_DEVICE=cuda on the GPU."""

import dataclasses
import importlib
import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch

from bandpo import CHI2, HELLINGER, JS, KL, OBJECTIVES, REVERSE_KL, TV, Band, Clip, FDivergence, policy_loss
from bandpo import metrics as library
from bandpo import terms as tokens
from bandpo.bounds import outside
from bandpo.metrics import policy_metrics
from bandpo.surrogates import clip
from bandpo.surrogates.filters import vaco
from batches import DEVICE, complete, deterministic, run

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]
B, T = 7, 331


@pytest.fixture(scope="module")
def kernel():
    if DEVICE == "cuda":
        return importlib.import_module("bandpo.surrogates.kernel")
    # Triton reads the variable when a kernel is defined; its own functions were defined before, as in a suite.
    importlib.import_module("triton")
    sys.modules.pop("bandpo.surrogates.kernel", None)
    os.environ["TRITON_INTERPRET"] = "1"
    found = importlib.import_module("bandpo.surrogates.kernel")
    del os.environ["TRITON_INTERPRET"]
    return found


def batch(dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    old = -torch.rand(B, T, generator=g).pow(-0.7) + 0.999
    old[0, :5] = torch.tensor([0.0, -1e-9, -95.0, -2e-4, -30.0])
    new = (old + 0.7 * torch.randn(B, T, generator=g)).clamp_max(-1e-6)
    new[1, :3] += 80  # beyond the ratio that is held
    mask = torch.rand(B, T, generator=g) < 0.8
    new[~mask], old[~mask] = math.nan, -math.inf  # what is masked never matters
    advantages = torch.randn(B, T, generator=g).to(DEVICE)
    return new.to(DEVICE, dtype), old.to(DEVICE, dtype), advantages, mask.to(DEVICE)


REGIONS = [
    Band(KL, 0.05), Band(TV, 0.05), Band(CHI2, (0.02, 0.3), max_ratio=None), Band(JS, 0.01, max_ratio=4.0),
    Band(REVERSE_KL, 0.5), Band(HELLINGER, 3.0, max_ratio=None), Clip(0.2, 0.28), Clip(1.0, math.inf),
]  # fmt: skip


@pytest.mark.parametrize("bounds_of", REGIONS, ids=repr)
@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_gradient_and_bounds_are_the_plain_paths(kernel, bounds_of, per_sequence, dtype):
    new, old, advantages, mask = batch(dtype)
    advantages = advantages[:, :1] if per_sequence else advantages
    upstream = torch.randn(B, T, generator=torch.Generator().manual_seed(4)).to(DEVICE)

    x = new.clone().requires_grad_()
    value, bounds, left, _ = kernel.clipped_objective(x, old, advantages, mask, bounds_of)
    (gradient,) = torch.autograd.grad((value * upstream).sum(), x)

    y = new.clone().requires_grad_()
    filled_new, filled_old = (torch.where(mask, v.float(), 0.0) for v in (y, old))
    want_bounds = bounds_of(filled_old)
    want = clip(filled_new - filled_old, torch.where(mask, advantages, 0.0), want_bounds)
    (want_gradient,) = torch.autograd.grad((want * upstream).sum(), y)

    assert torch.equal(bounds.lower, want_bounds.lower)
    assert torch.equal(bounds.upper, want_bounds.upper)
    want_left = outside(filled_new - filled_old, torch.where(mask, advantages, 0.0), want_bounds)
    assert left.dtype == torch.bool and torch.equal(left, want_left)
    assert left.any() or bounds_of in (Clip(1.0, math.inf), Band(HELLINGER, 3.0, max_ratio=None))
    torch.testing.assert_close(value, want, rtol=1e-6, atol=1e-7)  # numpy's exp against torch's
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-7)
    assert ((gradient == 0) == (want_gradient == 0)).all()


def test_nan_and_impossible_tokens(kernel):
    old = torch.tensor([[math.nan, -math.inf, -1.0, 1e-7]], device=DEVICE)
    value, bounds, left, sums = kernel.clipped_objective(
        torch.tensor([[-1.0, -1.0, math.nan, 0.0]], device=DEVICE),
        old,
        torch.ones(1, 1, device=DEVICE),
        torch.ones(1, 4, dtype=torch.bool, device=DEVICE),
        Band(KL, 0.05),
    )
    plain = Band(KL, 0.05)(old)
    for a, b in zip(bounds, plain, strict=True):
        assert torch.equal(a.nan_to_num(nan=-7), b.nan_to_num(nan=-7))
    assert value.isnan().tolist() == [[True, False, True, False]]
    assert left.tolist() == [[False, True, False, False]]
    assert sums[0] == 3  # a token without bounds is in no statistic


def test_declines_what_it_does_not_serve(kernel):
    new, old, advantages, mask = batch()
    for bounds_of in (
        Band(KL, torch.full((T,), 0.05, device=DEVICE)), Band(KL, 0.05, relax=Clip(0.2)), lambda x: Clip(0.2)(x),
    ):  # fmt: skip
        assert kernel.clipped_objective(new, old, advantages, mask, bounds_of) is None
    assert kernel.clipped_objective(new.double(), old, advantages, mask, Clip(0.2)) is None
    kinked = Band(FDivergence("kinked too", lambda u: ((u - 1).abs() - 0.2).clamp_min(0) + (u - 1).abs() / 20), 0.05)
    with pytest.warns(UserWarning, match="too sharply"):
        assert kernel.clipped_objective(new, old, advantages, mask, kinked) is None
    empty = kernel.clipped_objective(new[:0], old[:0], advantages[:0], mask[:0], Clip(0.2))
    assert empty[0].shape == (0, T)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_policy_loss_with_the_kernel_is_policy_loss(kernel, name, monkeypatch):
    """As on CUDA: every objective the kernel serves gives the same loss, gradient and metrics; the others do not use it."""
    new, old, advantages, mask = batch()
    objective = deterministic(name)
    data = complete(objective, {"logprobs": new, "old_logprobs": old, "advantages": advantages, "mask": mask})
    served = []
    monkeypatch.setattr(kernel, "clipped_objective", spy(kernel.clipped_objective, served))
    results = []
    for fused in (False, True):
        monkeypatch.setattr(tokens, "_runs_triton", lambda device, fused=fused: fused)
        loss, gradient, metrics = run(objective, data)
        results.append([loss, gradient, *metrics.values()])
    hard = objective.surrogate is clip and objective.ratio_level == "token" and objective.correction is None
    assert bool(served) == (hard and isinstance(objective.bounds, Band | Clip))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("objective", ["grpo", "bandpo-kl", "no-clip"])
@pytest.mark.parametrize("where", ["logprobs", "old_logprobs", "advantages", "all"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -3e38])
def test_what_is_no_number_is_left_out_by_the_kernel_too(kernel, objective, where, bad, monkeypatch):
    new, old, advantages, mask = batch()
    data = {"logprobs": new, "old_logprobs": old, "advantages": advantages, "mask": mask}
    out = (torch.rand(B, T, generator=torch.Generator().manual_seed(8)) < 0.1).to(DEVICE) & mask
    for name in ("logprobs", "old_logprobs", "advantages") if where == "all" else (where,):
        data[name] = data[name].masked_fill(out, math.nan if name == "advantages" and bad == -3e38 else bad)
    results = []
    for fused in (False, True):
        monkeypatch.setattr(tokens, "_runs_triton", lambda device, fused=fused: fused)
        loss, gradient, metrics = run(objective, data)
        assert loss.isfinite() and gradient.isfinite().all() and (gradient[out] == 0).all()
        assert metrics["nonfinite_fraction"].item() == pytest.approx(out.sum().item() / mask.sum().item())
        results.append([loss, gradient, *metrics.values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-7, equal_nan=True)


def test_ratios_are_held_on_both_sides_by_the_kernel_too(kernel):
    x = torch.tensor([[-41.0, -39.0, 39.0, 41.0]], device=DEVICE, requires_grad=True)
    ones = torch.ones(1, 4, dtype=torch.bool, device=DEVICE)
    value, *_ = kernel.clipped_objective(x, torch.zeros_like(x), -torch.ones_like(x[:, :1]), ones, Clip(1.0, math.inf))
    value.sum().backward()
    want = -torch.tensor([-40.0, -39.0, 39.0, 40.0], device=DEVICE).exp()
    torch.testing.assert_close(value[0], want, rtol=1e-5, atol=0)
    assert (x.grad[0] != 0).tolist() == [False, True, True, False]
    below = torch.full((1, 2), -95.0, device=DEVICE)
    found = kernel.clipped_objective(below, torch.zeros_like(below), below[:, :1], ones[:, :2], Clip(0.2))
    assert found.sums.tolist() == pytest.approx([2, 2, 0, 2 * math.exp(-40), 2 * 39])


COUNTS = ("clip_fraction/low", "clip_fraction/high", "clip_fraction/any", "nonfinite_fraction")


def both_ways(monkeypatch, objective, data, **kwargs):
    """The metrics of the plain path, and those that the kernel has counted."""
    results = []
    for fused in (False, True):
        monkeypatch.setattr(tokens, "_runs_triton", lambda device, fused=fused: fused)
        results.append(run(objective, data, **kwargs)[2])
    return results


@pytest.mark.parametrize("name", ["grpo", "bandpo-kl", "dapo", "bandpo-chi2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["all", "holes", "one row", "one token", "none", "nan"])
def test_the_kernel_counts_the_default_metrics(kernel, name, dtype, case, monkeypatch):
    new, old, advantages, mask = batch(dtype)
    mask = {
        "all": torch.ones_like(mask), "one row": torch.zeros_like(mask), "one token": torch.zeros_like(mask),
        "none": torch.zeros_like(mask),
    }.get(case, mask)  # fmt: skip
    if case.startswith("one"):
        mask[2, 5 : 6 if case == "one token" else None] = True
    if case == "nan":
        for i, x in enumerate((new, old, advantages)):
            x[3 + i, ::7] = math.nan
    data = {"logprobs": new, "old_logprobs": old, "advantages": advantages, "mask": mask}
    calls = []
    monkeypatch.setattr(kernel, "clipped_objective", spy(kernel.clipped_objective, calls))
    plain, counted = both_ways(monkeypatch, name, data)
    assert calls and list(plain) == list(counted)
    assert case not in ("all", "holes") or plain["clip_fraction/low"] > 0 < plain["clip_fraction/high"]
    for key, want in plain.items():
        tolerance = {"rtol": 0, "atol": 0} if key in COUNTS else {"rtol": 3e-6, "atol": 3e-7}
        torch.testing.assert_close(
            counted[key], want, equal_nan=True, msg=lambda m, key=key: f"{key}: {m}", **tolerance
        )


@pytest.mark.parametrize("name", ["bandpo-kl", "bandpo-chi2"])
def test_the_divergence_of_certain_tokens_is_finite_beside_the_kernel(kernel, name, monkeypatch):
    old = torch.tensor([[0.0, 0.0, -1e-9, -1e-3, -0.5]], device=DEVICE)
    new = torch.tensor([[0.0, -0.3, 0.0, 0.0, 0.0]], device=DEVICE)
    data = {"logprobs": new, "old_logprobs": old, "advantages": torch.ones(1, 1, device=DEVICE), "mask": old <= 0}
    plain, counted = both_ways(monkeypatch, name, data, metrics="full")
    for key in ("band/divergence_mean", "band/divergence_max"):
        assert 0 < plain[key] < math.inf and plain[key] == counted[key]


def test_counted_metrics_beside_entropy_weights_and_filters(kernel, monkeypatch):
    new, old, advantages, mask = batch()
    data = {"logprobs": new, "old_logprobs": old, "advantages": advantages[:, 0], "mask": mask.long()}
    rollout = old.masked_fill(~mask, 0.0) + 0.02
    filtered = dataclasses.replace(OBJECTIVES["grpo"], filter=vaco(0.5, policies="policy/rollout"))
    weight = torch.linspace(0.5, 2.0, B, device=DEVICE)
    weight[1] = math.nan  # the tokens of a sequence are left out
    counted_by_kernel = []
    monkeypatch.setattr(library, "_of_kernel", spy(library._of_kernel, counted_by_kernel))
    for objective, more in (
        ("bandpo-kl", {"entropy": new.abs()}),
        ("bandpo-kl", {"sample_weight": weight, "ref_logprobs": old - 0.1, "normalizer": 5.0}),
        (filtered, {"rollout_logprobs": rollout, "entropy": -new}),
    ):
        plain, counted = both_ways(
            monkeypatch, objective, {**data, **more}, kl_coef=0.1 if "ref_logprobs" in more else 0.0
        )
        assert list(plain) == list(counted)
        for key, want in plain.items():
            torch.testing.assert_close(counted[key], want, rtol=2e-6, atol=2e-7, equal_nan=True)
    assert len(counted_by_kernel) == 3


def test_counted_sums_are_not_used_for_other_tokens(kernel, monkeypatch):
    """An adapter that leaves out more tokens, or changes the mask, has the statistics of what is left."""
    new, old, advantages, mask = batch()
    monkeypatch.setattr(tokens, "_runs_triton", lambda device: True)
    given = {"logprobs": new, "old_logprobs": old, "advantages": advantages, "mask": mask}
    terms = tokens.token_objective(OBJECTIVES["bandpo-kl"], **given)
    assert terms.sums is not None and terms.sums.tokens == mask.sum()
    fewer = terms.nonfinite.clone()
    fewer[0] = True
    for changed in (terms._replace(nonfinite=fewer), terms._replace(mask=mask & ~fewer)):
        want, got = policy_metrics(changed._replace(sums=None), detail="basic"), policy_metrics(changed, detail="basic")
        assert got == want != policy_metrics(terms, detail="basic")


def test_what_is_transformed_takes_the_plain_path(kernel, monkeypatch):
    """`torch.func` cannot look into a kernel."""
    new, old, advantages, mask = batch()
    new, old = (x.masked_fill(~mask, 0.0) for x in (new, old))
    monkeypatch.setattr(tokens, "_runs_triton", lambda device: True)

    def loss(x):
        return policy_loss(logprobs=x, old_logprobs=old, advantages=advantages, mask=mask, metrics="none")[0]

    x = new.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(new), torch.autograd.grad(loss(x), x)[0], rtol=1e-5, atol=1e-8)


def spy(function, served):
    def call(*args, **kwargs):
        out = function(*args, **kwargs)
        served.extend([] if out is None else [True])
        return out

    return call


def test_triton_is_never_imported_on_a_cpu():
    code = (
        "import sys, torch, bandpo; x = torch.zeros(1, 2, requires_grad=True);"
        "bandpo.policy_loss(logprobs=x, old_logprobs=x.detach(), advantages=torch.ones(1), mask=torch.ones(1, 2));"
        "print('bandpo.surrogates.kernel' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


COMPILE = """
import warnings
warnings.simplefilter("ignore")  # triton on its own defaults
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bandpo.surrogates import kernel as k
settings = dict(BLOCK=1024, FIRST=k.FIRST_OCTAVE, BITS=k.SHIFT, FRACTION_BITS=k.FRACTION, PER_UNIT=k.PIECES, HOLD=40.0)
floats = {"fixed_lower", "cap", "end", "center0", "center1"}
for tabulated, centers in ((True, 0), (True, 2), (False, 0)):
    constants = {**settings, "TABULATED": tabulated, "CENTERS": centers, "SUMS": True, "INTERPRETED": False}
    signature = {
        name: "constexpr" if name in constants else "*u8" if name in ("mask_ptr", "outside_ptr")
        else "*fp32" if name.endswith("_ptr") else "fp32" if name in floats else "i32"
        for name in k._kernel.arg_names
    }
    for capability in (80, 90):
        source = ASTSource(k._kernel, signature=signature, constexprs=constants)
        target = GPUTarget("cuda", capability, 32)
        ptx = triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm["ptx"]
        print(len(ptx))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="triton's assembler comes with its Linux wheels")
def test_compiles_for_ampere_and_hopper_without_a_gpu(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stderr
    assert all(int(size) > 1000 for size in out.stdout.split())
    assert len(out.stdout.split()) == 6
