"""One step from log-probabilities to the objective of each token: anchor, ratio, bounds, surrogate, correction."""

import functools
import importlib.util
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from bandpo._inputs import check_tensor
from bandpo.bounds import RatioBounds
from bandpo.composition import Objective
from bandpo.surrogates import clip


class TokenObjective(NamedTuple):
    """What `token_objective` returns."""

    value: Tensor
    """Objective to maximise, `(batch, time)`, or `(batch, 1)` where a sequence has one value."""
    log_ratio: Tensor
    """`log r` at the objective's ratio level, with gradient."""
    bounds: RatioBounds | Tensor
    """What the surrogate was given: an interval, or whether the token is inside."""
    anchor_logprobs: Tensor
    """Log-probs of the policy that the ratio is taken against, 0 where the mask is off."""
    advantages: Tensor
    """As columns or per token, 0 where the mask is off."""
    weights: Tensor | None
    """Of the correction for the sampler, where the objective has one."""


def token_objective(
    objective: Objective,
    *,
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    rollout_logprobs: Tensor | None = None,
    extras: Mapping[str, Tensor] | None = None,
) -> TokenObjective:
    """Per-token objective before aggregation, `w_t s(log r_t, A_t, b_t)`, for adapters that aggregate as their host does.

    Args:
        objective: What to evaluate.
        logprobs: As in `policy_loss`; so are the others.
        old_logprobs: As there.
        advantages: As there.
        mask: As there.
        rollout_logprobs: As there.
        extras: As there.

    Raises:
        ValueError: If an input that the objective needs is missing, or an extra is not used by it.
    """
    anchor = rollout_logprobs if objective.anchor == "rollout" else old_logprobs
    if anchor is None:
        what = "the sampler (anchor='rollout'): pass rollout_logprobs" if objective.anchor == "rollout" else (
            "the policy before the update (anchor='old'): pass old_logprobs"
        )  # fmt: skip
        raise ValueError(f"objective {objective.name!r} measures its ratio against {what}")
    check_tensor("advantages", advantages)
    valid = mask != 0
    new, old = fill(logprobs, valid), fill(anchor.detach(), valid)
    advantages = fill(as_columns(advantages.detach(), logprobs), valid)
    log_ratio = _at_level(new - old, valid, objective)
    fused = _fused(logprobs, anchor, advantages, valid, objective)
    if fused is not None:
        return TokenObjective(fused[0], log_ratio, fused[1], old, advantages, None)
    inputs = {
        "logprobs": new, "old_logprobs": old, "log_ratio": log_ratio, "advantages": advantages, "mask": valid,
        **_checked(extras, objective, valid),
    }  # fmt: skip
    with torch.no_grad():
        bounds = objective.bounds(old, **{name: inputs[name].detach() for name in objective.bounds_inputs})
    value = objective.surrogate(
        log_ratio, advantages, bounds, **{name: inputs[name] for name in objective.surrogate_inputs}
    )
    if objective.correction is None:
        return TokenObjective(value, log_ratio, bounds, old, advantages, None)
    if rollout_logprobs is None:
        raise ValueError(
            f"objective {objective.name!r} corrects for the sampler by {objective.correction}: pass rollout_logprobs"
        )
    weights = objective.correction(old - fill(rollout_logprobs.detach(), valid), valid)
    return TokenObjective(value * weights, log_ratio, bounds, old, advantages, weights)


def gradient_weight(
    objective: Objective,
    ratios: Tensor,
    probabilities: Tensor,
    advantage: float,
    extras: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The weight w in `∇ = A·r·w(r, p, A)·∇log π` of tokens that are sequences of their own; the form all objectives share.

    Args:
        objective: Whose weight.
        ratios: r > 0, any shape.
        probabilities: p of the anchor, the same shape, in (0, 1); `p·r > 1` gives NaN, there is no such policy.
        advantage: A, not 0.
        extras: Extras of the objective, one row for each token.

    Returns:
        float64 tensor of the shape of `ratios`.

    Examples:
        >>> from bandpo import OBJECTIVES
        >>> gradient_weight(OBJECTIVES["grpo"], torch.tensor([1.1, 1.3]), torch.tensor([0.5, 0.5]), 1.0)
        tensor([1., 0.], dtype=torch.float64)
    """
    r, p = ratios.detach().to(torch.float64).reshape(-1, 1), probabilities.detach().to(torch.float64).reshape(-1, 1)
    new = (p * r).log().requires_grad_()
    a = torch.full_like(r, advantage)
    value = token_objective(
        objective, logprobs=new, old_logprobs=p.log(), rollout_logprobs=p.log(), advantages=a, mask=torch.ones_like(r),
        extras=extras,
    ).value  # fmt: skip
    (gradient,) = torch.autograd.grad(value.sum(), new)
    weight = torch.where(p * r > 1, torch.nan, gradient / (a * r))
    return weight.view(ratios.shape)


def sequence_log_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Length-normalised log-ratio of each sequence, `mean_t log r_t`, `(batch, 1)` (GSPO, arXiv:2507.18071, eq. 7).

    Examples:
        >>> import torch
        >>> sequence_log_ratio(torch.tensor([[0.1, 0.3, 9.0]]), torch.tensor([[1, 1, 0]]))
        tensor([[0.2000]])
    """
    valid = mask != 0
    total = log_ratio.masked_fill(~valid, 0.0).sum(-1, keepdim=True)
    return total / valid.sum(-1, keepdim=True).clamp_min(1)


def fill(x: Tensor, valid: Tensor) -> Tensor:
    """At least float32, and 0 where the mask is off, so that nothing there (NaN included) reaches value or gradient."""
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.where(valid, wide, 0.0)


def as_columns(advantages: Tensor, like: Tensor) -> Tensor:
    """`(batch,)` as `(batch, 1)`; the other two shapes as they are.

    Raises:
        ValueError: If it is none of the three.
    """
    column = advantages.unsqueeze(-1) if advantages.dim() == 1 else advantages
    if column.dim() != 2 or column.shape[0] != like.shape[0] or column.shape[1] not in (1, like.shape[1]):
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)}; with logprobs {tuple(like.shape)} it must be "
            f"({like.shape[0]},), ({like.shape[0]}, 1) or {tuple(like.shape)}"
        )
    return column


def _at_level(token_log_ratio: Tensor, valid: Tensor, objective: Objective) -> Tensor:
    if objective.ratio_level == "token":
        return token_log_ratio
    if objective.ratio_level == "sequence":
        return sequence_log_ratio(token_log_ratio, valid)
    return token_log_ratio.sum(-1, keepdim=True)  # "product": 0 where the mask is off


def _checked(extras: Mapping[str, Tensor] | None, objective: Objective, valid: Tensor) -> dict[str, Tensor]:
    """The objective's own inputs, in the shape of columns or tokens and 0 where the mask is off."""
    given = dict(extras or {})
    if set(given) != set(objective.extras):
        raise ValueError(
            f"objective {objective.name!r} takes the extras {sorted(objective.extras) or 'none'}, got {sorted(given) or 'none'}"
            + (
                "; objective.group_inputs(rewards, advantages, group_size) makes those of a group"
                if objective.group_stats is not None
                else ""
            )
        )
    for name, x in given.items():
        if x.shape[:1] != valid.shape[:1] or (x.dim() > 1 and x.shape[1] not in (1, valid.shape[1])):
            raise ValueError(
                f"extras[{name!r}] has shape {tuple(x.shape)}; it must begin with ({valid.shape[0]},), ({valid.shape[0]}, 1) "
                f"or {tuple(valid.shape)}"
            )
        x = x.detach().unsqueeze(-1) if x.dim() == 1 else x.detach()
        given[name] = torch.where(valid, x, torch.zeros((), dtype=x.dtype, device=x.device)) if x.dim() == 2 else x
    return given


def _fused(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, valid: Tensor, objective: Objective
) -> tuple[Tensor, RatioBounds] | None:
    """Objective and bounds from one Triton kernel, on CUDA; None where it does not serve."""
    serves = objective.surrogate is clip and objective.ratio_level == "token" and objective.correction is None
    if not serves or torch.compiler.is_compiling() or not _runs_triton(logprobs.device.type):
        return None
    from bandpo._kernel import clipped_objective

    return clipped_objective(logprobs, old_logprobs.detach(), advantages, valid, objective.bounds)


@functools.cache
def _runs_triton(device: str) -> bool:
    """Whether the kernel can run; without Triton CUDA tensors take the plain path."""
    return device == "cuda" and importlib.util.find_spec("triton") is not None
