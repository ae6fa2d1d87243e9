"""From log-probabilities to a loss: `policy_loss` = bounds x surrogate x aggregation."""

import functools
import importlib.util
from collections.abc import Callable
from typing import ParamSpec, TypeVar, get_args

import torch
from torch import Tensor

from bandpo.bounds import RatioBounds
from bandpo.metrics import approx_kl, masked_mean, policy_metrics
from bandpo.objectives import Aggregation, Objective, get_objective
from bandpo.surrogates import clip

P = ParamSpec("P")
R = TypeVar("R")


def policy_loss(
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    objective: Objective | str = "bandpo-kl",
    rollout_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    entropy: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    max_length: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy loss to minimise, and detached 0-d metrics.

    `-agg_t s(log r_t, A_t, b(log p_t)) + β agg_t k3_t`, with the bounds `b`, surrogate `s`, ratio level, anchor and
    aggregation of the objective, `r = π / π_anchor` and `k3 = e^x - x - 1` at `x = log π_ref - log π`. Arguments are
    keyword-only: hosts disagree on the order of new and old.

    Args:
        logprobs: Log-probs of the sampled tokens under the policy in training, `(batch, time)`, with gradient.
        old_logprobs: The same under the policy before the update; no gradient flows into it.
        advantages: `(batch,)`, `(batch, 1)` or `(batch, time)`.
        mask: `(batch, time)`, bool or 0/1: the tokens that count. What stands elsewhere never matters, NaN included.
        objective: A name in `OBJECTIVES`, an `Objective`, or "package.module:NAME" of one.
        rollout_logprobs: Log-probs under the sampler; required by objectives with `anchor="rollout"`.
        ref_logprobs: Log-probs under the reference policy, for the KL term.
        kl_coef: Its coefficient β >= 0.
        entropy: Per-token entropy, for the metrics only.
        normalizer: Tokens (`token-mean`) or sequences (`seq-mean-*`) of the whole batch when this call sees a part of it
            (gradient accumulation, data parallelism): the parts' losses then add up to the whole's. See
            `loss_normalizer`.
        max_length: The constant length of `seq-mean-token-sum-norm`.

    Returns:
        The loss, a 0-d tensor in float32 (float64 for float64 input), and metrics as 0-d tensors (no host sync).

    Raises:
        TypeError: If a dtype or the objective's type does not fit.
        ValueError: If shapes or names do not fit, or the objective needs an input that is missing.

    Examples:
        >>> import torch
        >>> logp = torch.tensor([[-0.7, -2.0, 0.0]], requires_grad=True)
        >>> loss, metrics = policy_loss(
        ...     logprobs=logp,
        ...     old_logprobs=torch.tensor([[-0.7, -3.0, 0.0]]),
        ...     advantages=torch.tensor([1.0]),
        ...     mask=torch.tensor([[True, True, False]]),
        ... )
        >>> loss
        tensor(-1.8591, grad_fn=<NegBackward0>)
        >>> metrics["clip_fraction/high"]
        tensor(0.)
    """
    objective = get_objective(objective)
    _check_shapes(logprobs, old_logprobs=old_logprobs, mask=mask, rollout_logprobs=rollout_logprobs,
                  ref_logprobs=ref_logprobs, entropy=entropy)  # fmt: skip
    if objective.anchor == "rollout":
        if rollout_logprobs is None:
            raise ValueError(
                f"objective {objective.name!r} measures its ratio against the sampler (anchor='rollout'): pass rollout_logprobs"
            )
        old_logprobs = rollout_logprobs
    if not kl_coef >= 0:
        raise ValueError(f"kl_coef must be >= 0, got {kl_coef}")
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logprobs, the log-probs under the reference policy")

    valid = mask != 0
    new, old = (_fill(x, valid) for x in (logprobs, old_logprobs.detach()))
    advantages = _fill(_as_tokens(advantages.detach(), logprobs), valid)
    token_log_ratio = new - old
    log_ratio = sequence_log_ratio(token_log_ratio, valid) if objective.ratio_level == "sequence" else token_log_ratio
    fused = _fused(logprobs, old_logprobs, advantages, valid, objective)
    if fused is None:
        bounds = objective.bounds(old)
        per_token = objective.surrogate(log_ratio, advantages, bounds)
    else:
        per_token, bounds = fused

    def reduce(x: Tensor) -> Tensor:
        return aggregate(x, valid, objective.aggregation, normalizer=normalizer, max_length=max_length)

    loss = -reduce(per_token)
    report = policy_metrics(
        log_ratio=log_ratio.detach(), old_logprobs=old, advantages=advantages, mask=valid, bounds=bounds,
        bounds_of=objective.bounds, entropy=entropy,
    )  # fmt: skip
    report["loss/policy"] = loss.detach()
    if ref_logprobs is not None:
        kl = approx_kl(_fill(ref_logprobs.detach(), valid) - new)
        report["kl/ref"] = masked_mean(kl.detach(), valid)
        if kl_coef:
            loss = loss + kl_coef * reduce(kl)
    return loss, report


def compile(
    function: Callable[P, R] = policy_loss,
    *,
    dynamic: bool | None = True,
    backend: str = "inductor",
    mode: str | None = None,
) -> Callable[P, R]:
    """`policy_loss`, or another function of the core, fused by `torch.compile` into a few passes over the tokens.

    One graph, for batches of any shape. The first call compiles (seconds); so does the first one with another objective.

    Args:
        function: `policy_loss`, `ratio_bounds`, `in_band`, a `Band`, or a function of yours that calls them.
        dynamic: As in `torch.compile`; False makes faster code for batches of one shape.
        backend: As in `torch.compile`.
        mode: As in `torch.compile`.

    Returns:
        A function of the same signature.

    Examples:
        >>> fast_loss = compile()  # call it as policy_loss
    """
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend, mode=mode)


def _fused(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, valid: Tensor, objective: Objective
) -> tuple[Tensor, RatioBounds] | None:
    """Objective and bounds from one Triton kernel, on CUDA; None where it does not serve."""
    on_cuda = logprobs.device.type == "cuda" and _has_triton()
    if not on_cuda or torch.compiler.is_compiling():
        return None
    if objective.surrogate is not clip or objective.ratio_level != "token":
        return None
    from bandpo._kernel import clipped_objective

    return clipped_objective(logprobs, old_logprobs.detach(), advantages, valid, objective.bounds)


@functools.cache
def _has_triton() -> bool:
    """Whether Triton is installed; without it CUDA tensors take the plain path."""
    return importlib.util.find_spec("triton") is not None


def aggregate(
    values: Tensor,
    mask: Tensor,
    aggregation: Aggregation = "token-mean",
    *,
    normalizer: Tensor | float | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Per-token values to one number, with the aggregations of verl by their names.

    `token-mean`: sum over valid tokens / their number. `token-sum`: their sum. `seq-mean-token-sum`: sum in each sequence,
    mean over sequences. `seq-mean-token-mean`: mean in each sequence, mean over sequences (GRPO, arXiv:2402.03300).
    `seq-mean-token-sum-norm`: as `seq-mean-token-sum`, divided by `max_length` (Dr.GRPO, arXiv:2503.20783). A sequence
    without a valid token counts nowhere.

    Args:
        values: `(batch, time)`, or `(batch, 1)` to repeat along a sequence.
        mask: `(batch, time)`, bool or 0/1.
        aggregation: One of the five names.
        normalizer: Replaces the number of tokens or sequences found in `mask`; see `loss_normalizer`.
        max_length: The constant of `seq-mean-token-sum-norm`, and of it alone.

    Returns:
        0-d tensor; 0 for an empty mask.

    Raises:
        ValueError: If the name is unknown, or an argument does not belong to it.

    Examples:
        >>> import torch
        >>> x, m = torch.tensor([[1.0, 2.0], [4.0, 9.0]]), torch.tensor([[1, 1], [1, 0]])
        >>> [round(aggregate(x, m, a).item(), 3) for a in ("token-mean", "token-sum", "seq-mean-token-mean")]
        [2.333, 7.0, 2.75]
    """
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"aggregation: got {aggregation!r}; choose one of {', '.join(get_args(Aggregation))}")
    if (max_length is None) == (aggregation == "seq-mean-token-sum-norm"):
        raise ValueError(
            f"max_length={max_length} with aggregation {aggregation!r}: 'seq-mean-token-sum-norm' needs it "
            "(the maximal completion length of the run), the others do not use it"
        )
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    if aggregation == "token-sum" and normalizer is not None:
        raise ValueError("aggregation 'token-sum' divides by nothing: leave normalizer out")
    valid = mask != 0
    values = values.expand(valid.shape).masked_fill(~valid, 0.0)
    if aggregation == "token-sum":
        return values.sum()
    count = loss_normalizer(valid, aggregation) if normalizer is None else normalizer
    if aggregation == "seq-mean-token-mean":
        return (values.sum(-1) / valid.sum(-1).clamp_min(1)).sum() / count
    total = values.sum() / count
    return total if max_length is None else total / max_length


def loss_normalizer(mask: Tensor, aggregation: Aggregation) -> Tensor:
    """What `aggregate` divides by: valid tokens for `token-mean`, sequences with a valid token for `seq-mean-*`.

    Add it up over micro-batches and ranks and pass the sum as `normalizer`.

    Examples:
        >>> import torch
        >>> loss_normalizer(torch.tensor([[1, 1], [0, 0]]), "seq-mean-token-mean")
        tensor(1)
    """
    valid = mask != 0
    count = valid.sum() if aggregation.startswith("token") else valid.any(-1).sum()
    return count.clamp_min(1)


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


def _fill(x: Tensor, valid: Tensor) -> Tensor:
    """At least float32, and 0 where the mask is off, so that nothing there (NaN included) reaches value or gradient."""
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.where(valid, wide, 0.0)


def _as_tokens(advantages: Tensor, like: Tensor) -> Tensor:
    column = advantages.unsqueeze(-1) if advantages.dim() == 1 else advantages
    if column.dim() != 2 or column.shape[0] != like.shape[0] or column.shape[1] not in (1, like.shape[1]):
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)}; with logprobs {tuple(like.shape)} it must be "
            f"({like.shape[0]},), ({like.shape[0]}, 1) or {tuple(like.shape)}"
        )
    return column


def _check_shapes(logprobs: Tensor, **others: Tensor | None) -> None:
    if logprobs.dim() != 2:
        raise ValueError(f"logprobs must be (batch, time), got shape {tuple(logprobs.shape)}")
    for name, value in {"logprobs": logprobs, **others}.items():
        if value is None:
            continue
        if value.shape != logprobs.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} but logprobs has {tuple(logprobs.shape)}; they must be equal"
            )
        if name != "mask" and not value.is_floating_point():
            raise TypeError(f"{name} must have a float dtype, got {value.dtype}")
