"""One mini-batch as hosts have it, and what `policy_loss` says about it in float64."""

import dataclasses

import torch

from bandpo import OBJECTIVES as ZOO
from bandpo import policy_loss
from bandpo.surrogates.filters import SequenceFilter
from bandpo.zoo import get_objective

B, T = 6, 9
FLOAT32 = 8 * torch.finfo(torch.float32).eps  # for hosts that leave float64 on their way; a few roundings
HALVES = (slice(0, 3), slice(3, 6))
RANKS = ((slice(0, 2), slice(2, 3)), (slice(3, 5), slice(5, 6)))  # two data-parallel ranks, two micro-batches each
OBJECTIVES = ("bandpo-kl", "dapo", "gspo", "cispo", "bandpo-kl-soft")
WEIGHING = dataclasses.replace(
    ZOO["bandpo-kl"], filter=SequenceFilter("log_ratio", "sum", low=-1.0, high=1.0, action="weight"), name="weighing"
)
"""It weighs the sampler's mismatch by a filter, as `tis` does by a correction."""


def mini_batch(seed=0, *, poison=True, dtype=torch.float64):
    """Six sequences with tool tokens in the middle, an advantage for each token, and NaN wherever the mask is off."""
    g = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(B, T, generator=g, dtype=torch.float64)

    old = -torch.rand(B, T, generator=g, dtype=torch.float64).pow(-0.7) + 1 - 1e-3
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 3:5] = mask[1, 0] = mask[2, 2:7] = mask[4, ::2] = False  # tool tokens
    mask[1, 6:] = mask[3, 4:] = mask[5, 1:] = False  # padding
    data = {
        "logprobs": torch.minimum(old + 0.6 * normal(), torch.tensor(-1e-6)),
        "old_logprobs": old,
        "rollout_logprobs": torch.minimum(old + 0.3 * normal(), torch.tensor(-1e-6)),
        "ref_logprobs": torch.minimum(old + 0.3 * normal(), torch.tensor(-1e-6)),
        "advantages": normal(),
    }
    if poison:
        data = {name: x.masked_fill(~mask, torch.nan) for name, x in data.items()}
    return {**{name: x.to(dtype) for name, x in data.items()}, "mask": mask}


def rows(data, part):
    return {name: x[part] for name, x in data.items()}


def wanted(data, objective, aggregation, *, anchor=None, weights=None, **kwargs):
    """Loss and gradient of the library's own `policy_loss`, with the reduction of the host.

    `weights` multiply the terms of single tokens, for which the advantages stand in: the objectives used here are
    proportional to them.
    """
    spec = dataclasses.replace(get_objective(objective), aggregation=aggregation)
    if anchor is not None:
        spec = dataclasses.replace(spec, anchor=anchor)
    x = data["logprobs"].clone().requires_grad_()
    a = data["advantages"] if weights is None else data["advantages"] * weights
    loss, _ = policy_loss(
        logprobs=x, old_logprobs=data["old_logprobs"], rollout_logprobs=data["rollout_logprobs"], advantages=a,
        mask=data["mask"], objective=spec, **kwargs,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, x)
    return loss.detach(), gradient


def same(found, want, tolerance=1e-12):
    """Loss and gradient agree to rounding, and no gradient is NaN."""
    for a, b in zip(found, want, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)
