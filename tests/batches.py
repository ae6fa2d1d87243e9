"""Random batches, completed with what an objective asks for, and one call that gives loss, gradient and metrics."""

import dataclasses
import os
from functools import partial

import torch

from bandpo import policy_loss
from bandpo.experimental import clip_cov
from bandpo.zoo import get_objective

B, T, K = 6, 9, 4
DEVICE = os.environ.get("BANDPO_DEVICE", "cpu")
"""Where the tests that are marked with `device` make their tensors; `benchmarks/gpu` sets it to "cuda"."""


def max_length(aggregation):
    return 12 if aggregation == "seq-mean-token-sum-norm" else None


def batch(seed=0, dtype=torch.float64, spread=0.6):
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(B, T, generator=g, dtype=torch.float64).pow(-0.7) + 1 - 1e-3
    new = torch.minimum(old + spread * torch.randn(B, T, generator=g, dtype=torch.float64), torch.tensor(-1e-6))
    lengths = torch.tensor([9, 3, 1, 7, 9, 5])
    return {
        "logprobs": new.to(dtype),
        "old_logprobs": old.to(dtype),
        "advantages": torch.randn(B, generator=g, dtype=torch.float64).to(dtype),
        "mask": torch.arange(T) < lengths.unsqueeze(1),
    }


def deterministic(objective):
    """The objective itself; Clip-Cov takes all candidates out instead of a random few."""
    objective = get_objective(objective)
    if objective.surrogate is clip_cov:
        return dataclasses.replace(objective, surrogate=partial(clip_cov, share=1.0))
    return objective


def complete(objective, data, seed=0):
    """The batch with the sampler's log-probs and the extras that the objective needs."""
    objective = get_objective(objective)
    g = torch.Generator().manual_seed(100 + seed)
    x = data["logprobs"]
    data = dict(data)
    if objective.anchor == "rollout":
        data["rollout_logprobs"] = data["old_logprobs"]
    elif objective.correction is not None:
        noise = 0.9 * torch.randn(x.shape, generator=g, dtype=torch.float64).to(x)
        data["rollout_logprobs"] = data["old_logprobs"] + noise
    rewards = torch.rand(len(x), generator=g, dtype=torch.float64).to(x)
    extras = objective.group_inputs(rewards, data["advantages"].reshape(len(x), -1)[:, 0], len(x))
    if "topk_logprobs" in objective.extras:
        logits = torch.randn(2, *x.shape, 50, generator=g, dtype=torch.float64)
        old, new = logits[0].log_softmax(-1), (logits[0] + 0.3 * logits[1]).log_softmax(-1)
        top, ids = (old - 3).topk(K)
        extras |= {
            "old_topk_logprobs": top.to(x), "topk_logprobs": (new - 3).gather(-1, ids).to(x),
            "sampled_in_topk": torch.zeros(x.shape, dtype=torch.bool, device=x.device),
        }  # fmt: skip
    return {**data, "extras": extras} if extras else data


def run(objective, data, **kwargs):
    x = data["logprobs"].clone().requires_grad_()
    resolved = get_objective(objective)
    kwargs.setdefault("max_length", max_length(resolved.aggregation))
    kwargs.setdefault("kl_coef", 0.0)  # an objective's own KL needs a reference
    loss, metrics = policy_loss(**{**data, "logprobs": x}, objective=resolved, **kwargs)
    (gradient,) = torch.autograd.grad(loss, x)
    return loss.detach(), gradient, metrics
