"""The core on a device beside the core on a CPU: `make gpu` runs it on the GPU, and CI on the CPU."""

import math

import pytest
import torch

from bandpo import KL, OBJECTIVES, TV, group_advantages, in_band, ratio_bounds, token_logprobs
from bandpo.divergences import DIVERGENCES
from bandpo.losses import aggregate, compiled
from batches import DEVICE, B, batch, complete, deterministic, run

pytestmark = pytest.mark.device


def moved(data):
    return {
        name: moved(x) if isinstance(x, dict) else x.to(DEVICE) if isinstance(x, torch.Tensor) else x
        for name, x in data.items()
    }


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_the_numbers_of_the_cpu(name):
    """The oracle is float64 on the CPU, which the kernel cannot serve."""
    objective = deterministic(name)
    exact = complete(objective, batch(seed=3))
    narrow = moved({
        key: {k: x.to(torch.float32) if x.is_floating_point() else x for k, x in value.items()}
        if isinstance(value, dict) else value.to(torch.float32) if value.is_floating_point() else value
        for key, value in exact.items()
    })  # fmt: skip
    loss, gradient, metrics = run(objective, exact, metrics="full")
    found, slope, counted = run(objective, narrow, metrics="full")
    assert found.device.type == slope.device.type == DEVICE
    torch.testing.assert_close(found.cpu().double(), loss, rtol=1e-4, atol=1e-6)
    near = 2e-4 if objective.projection is not None else 1e-6  # a projection divides by small divergences
    torch.testing.assert_close(slope.cpu().double(), gradient, rtol=1e-3, atol=near)
    assert list(counted) == list(metrics) and all(x.device.type == DEVICE for x in counted.values())
    for key, want in metrics.items():
        torch.testing.assert_close(
            counted[key].cpu().double(),
            want.double(),
            rtol=2e-3,
            atol=1e-5,
            equal_nan=True,
            msg=lambda m, k=key: f"{k}: {m}",
        )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_accuracy_of_the_bounds(name):
    """Within 4 units of float32 of those in float64, and never outside of them."""
    logp = -torch.logspace(-6, 1.9, 4001, dtype=torch.float64).float()
    narrow, wide = ratio_bounds(logp.to(DEVICE), name, 0.05), ratio_bounds(logp.double(), name, 0.05)
    assert (narrow.lower.cpu().double() >= wide.lower * (1 - 1e-15)).all()
    assert (narrow.upper.cpu().double() <= wide.upper * (1 + 1e-15)).all()
    torch.testing.assert_close(narrow.lower.cpu().double(), wide.lower, rtol=0, atol=4 * 2**-24)
    torch.testing.assert_close(narrow.upper.cpu().double(), wide.upper, rtol=4 * 2**-23, atol=0)
    on_device = ratio_bounds(logp.double().to(DEVICE), name, 0.05)
    torch.testing.assert_close(on_device.upper.cpu(), wide.upper, rtol=1e-10, atol=0)


def test_tensor_radii_and_membership():
    g = torch.Generator().manual_seed(0)
    logp, log_ratio = -torch.rand(500, generator=g) * 6, torch.randn(500, generator=g)
    radius = 0.02 + 0.1 * torch.rand(500, generator=g)
    for divergence in (KL, TV):
        here, there = (
            in_band(x.to(d), p.to(d), divergence, r.to(d))
            for x, p, r, d in ((log_ratio, logp, radius, "cpu"), (log_ratio, logp, radius, DEVICE))
        )
        assert torch.equal(here, there.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", [None, 0, math.inf])
def test_token_logprobs(dtype, memory):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 16, generator=g), 0.3 * torch.randn(300, 16, generator=g)
    targets, up = torch.randint(300, (40,), generator=g), torch.randn(40, generator=g)
    h, w = (x.to(DEVICE, dtype).requires_grad_() for x in (hidden, weight))
    found = token_logprobs(h, w, targets.to(DEVICE), chunk_size=7, memory=memory).logprobs
    (found * up.to(DEVICE)).sum().backward()
    a, b = (x.detach().cpu().double().requires_grad_() for x in (h, w))
    want = (a @ b.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    (want * up.double()).sum().backward()
    close = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-4}  # TF32 is off
    torch.testing.assert_close(found.detach().cpu().double(), want.detach(), **close)
    for x, y in ((h, a), (w, b)):
        torch.testing.assert_close(x.grad.cpu().double(), y.grad, **close)


def test_advantages_and_aggregations():
    rewards, mask = torch.arange(12.0) % 5, torch.arange(4) < torch.tensor([[4], [0], [2]])
    assert torch.allclose(group_advantages(rewards.to(DEVICE), 4).cpu(), group_advantages(rewards, 4), atol=1e-6)
    values = torch.arange(12.0).view(3, 4)
    for name in ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"):
        assert aggregate(values.to(DEVICE), mask.to(DEVICE), name).cpu() == pytest.approx(aggregate(values, mask, name))


@pytest.mark.skipif(DEVICE != "cuda", reason="the CPU's compiler is tested in test_losses")
@pytest.mark.parametrize("name", ["bandpo-kl", "grpo", "dppo-tv"])
def test_compiled_is_eager_on_cuda(name):
    objective = deterministic(name)
    data = moved(complete(objective, batch(dtype=torch.float32)))
    fast, results = compiled(), []
    from bandpo import policy_loss

    for function in (policy_loss, fast):
        x = data["logprobs"].clone().requires_grad_()
        loss, metrics = function(
            **{**data, "logprobs": x}, objective=objective, max_length=12 if "norm" in objective.aggregation else None
        )
        results.append([loss.detach(), *torch.autograd.grad(loss, x), *metrics.values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert len(data["advantages"]) == B
