"""The baseline: bounds by bisection, re-created from a description of the official implementation. No line of it is used.

50 halvings of a bracket for each side, in the dtype of the input; after each the host asks whether all tokens are done.
"""

import torch
from torch import Tensor

from bandpo import FDivergence, RatioBounds

STEPS = 50


def bisection_bounds(old_logprobs: Tensor, divergence: FDivergence, radius: float) -> RatioBounds:
    eps = 1e-7 if old_logprobs.dtype == torch.float32 else 1e-12
    p = old_logprobs.exp().clamp(1e-12, 1 - eps)

    def inside(r: Tensor) -> Tensor:
        rest = ((1 - p * r) / (1 - p)).clamp_min(1e-12)
        return p * divergence.f(r) + (1 - p) * divergence.f(rest) <= radius

    found = list[Tensor]()
    for feasible, infeasible in (
        (torch.ones_like(p), torch.full_like(p, 1e-12)),
        (torch.ones_like(p), (1 - eps) / p),
    ):
        for _ in range(STEPS):
            middle = 0.5 * (feasible + infeasible)
            ok = inside(middle)
            feasible, infeasible = torch.where(ok, middle, feasible), torch.where(ok, infeasible, middle)
            if (feasible - infeasible).abs().max().item() < 1e-12:  # the host waits here
                break
        found.append(feasible)
    return RatioBounds(*found)
