"""Losses written anew from their definitions, in plain torch, with the clip metrics that TRL logs beside them.

Each is a function of the log-probs `x` and a batch with `old`, `rollout`, `advantages` `(rows, 1)` and an integer `mask`, and
gives the loss and the metrics. `bench_loss.py` and `gpu/` compare `policy_loss` with them.
"""

import torch


def mean(x, mask):
    return (x * mask).sum() / mask.sum().clamp(min=1)


def sequence_mean(x, mask):
    return ((x * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def clip_metrics(ratio, advantages, mask, low, high):
    under, over = (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)
    parts = {"low": under, "high": over, "region": under | over}
    with torch.no_grad():
        if ratio.shape[1] == 1:  # one value of each sequence
            return {name: x.float().mean() for name, x in parts.items()}
        return {name: mean(x.float(), mask) for name, x in parts.items()}


def clipped(ratio, advantages, low=0.8, high=1.2):
    return torch.min(ratio * advantages, ratio.clamp(low, high) * advantages)


def grpo(x, b):
    ratio = (x - b.old).exp()
    loss = sequence_mean(-clipped(ratio, b.advantages), b.mask)
    return loss, clip_metrics(ratio, b.advantages, b.mask, 0.8, 1.2)


def dual_clip(x, b):
    ratio = (x - b.old).exp()
    value = clipped(ratio, b.advantages)
    value = torch.where(b.advantages < 0, torch.max(value, 3 * b.advantages), value)
    return mean(-value, b.mask), clip_metrics(ratio, b.advantages, b.mask, 0.8, 1.2)


def gspo(x, b):
    low, high = 1 - 3e-4, 1 + 4e-4
    ratio = (((x - b.old) * b.mask).sum(-1, keepdim=True) / b.mask.sum(-1, keepdim=True).clamp(min=1)).exp()
    return -clipped(ratio, b.advantages, low, high).mean(), clip_metrics(ratio, b.advantages, b.mask, low, high)


def cispo(x, b):
    ratio = (x - b.old).exp()
    over = (ratio > 5) & (b.advantages > 0)
    return mean(-ratio.clamp(max=5).detach() * b.advantages * x, b.mask), {"high": mean(over.float(), b.mask)}


def kl_cov(x, b):
    log_ratio, valid = x - b.old, b.mask.bool()
    value = log_ratio.exp() * b.advantages
    with torch.no_grad():
        covariance = (b.advantages - mean(b.advantages, b.mask)) * (x - mean(x, b.mask))
        count = max(1, int(2e-4 * valid.sum()))
        chosen = covariance[valid].topk(count).indices
    penalty = 0.1 * log_ratio[valid][chosen].abs().sum() / b.mask.sum()
    return mean(-value, b.mask) + penalty, {}


def tis(x, b):
    ratio = (x - b.old).exp()
    weight = (b.old - b.rollout).exp().clamp(max=2)
    loss = sequence_mean(-clipped(ratio, b.advantages) * weight, b.mask)
    return loss, clip_metrics(ratio, b.advantages, b.mask, 0.8, 1.2) | {"weight": mean(weight, b.mask)}
