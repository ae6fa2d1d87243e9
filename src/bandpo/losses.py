"""From log-probabilities to a loss: `policy_loss` = bounds x surrogate x aggregation."""

import math
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar, get_args

import torch
from torch import Tensor

from bandpo._deprecations import moved_within
from bandpo._eager import Fill
from bandpo._inputs import as_mask, check_int, check_shapes, check_tensor, is_logprob, widened
from bandpo.metrics import Detail, masked_mean, policy_metrics
from bandpo.objective import Aggregation, Objective
from bandpo.reference import ReferenceKL, check_kl, check_kl_coef, reference_kl
from bandpo.terms import token_objective
from bandpo.zoo import get_objective

P = ParamSpec("P")
R = TypeVar("R")

__getattr__ = moved_within(__name__, {"compile": "losses.compiled"})


def policy_loss(
    *,
    logprobs: Tensor,
    old_logprobs: Tensor | None = None,
    advantages: Tensor,
    mask: Tensor,
    objective: Objective | str = "bandpo-kl",
    rollout_logprobs: Tensor | None = None,
    extras: Mapping[str, Tensor] | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float | None = None,
    kl: ReferenceKL | None = None,
    entropy: Tensor | None = None,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    max_length: int | None = None,
    metrics: Detail = "basic",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy loss to minimise, and detached 0-d metrics.

    `-agg_t w_t s(log r_t, A_t, b(log p_t)) + β agg_t KL_t`, with the bounds `b`, surrogate `s`, ratio level, anchor,
    correction `w` and aggregation of the objective, and `r = π / π_anchor`. The KL to the reference is that of `kl`: by default
    `w_t r_t (e^x - x - 1)` with the ratio of the token and `x = log π_ref - log π`, whose expected gradient is that of
    KL(π ‖ π_ref) of the next token, also for tokens of an older policy (DeepSeek-V3.2, arXiv:2512.02556, sec. 3.1).
    Arguments are keyword-only: hosts disagree on the order of new and old.

    A token that a filter drops adds 0 to the policy term. It stays in the denominators, unless the filter has `counts="kept"`:
    then it leaves them, and the KL term as well. A `normalizer` replaces the count in either case.

    Both log-ratios are held within ±40; beyond, they have no gradient. A valid token with a number that is NaN or infinite
    (its advantage, its sequence's weight, a log-prob that the loss uses, or an extra that is NaN) adds exactly 0 to loss and
    gradient, counts in the denominators, and is reported in `nonfinite_fraction`. A log-prob below -1e9 counts as -inf.

    Args:
        logprobs: Log-probs of the sampled tokens under the policy in training, `(batch, time)`, with gradient.
        old_logprobs: The same under the policy before the update, `(batch, time)`; no gradient flows into it. None is allowed
            for objectives with `anchor="rollout"`, which then need no second forward pass.
        advantages: `(batch,)`, `(batch, 1)` or `(batch, time)`, float; no gradient flows into them. Advantages per token move
            each token by its own, also where the ratio is that of a sequence (GSPO-token, arXiv:2507.18071, sec. 4.3).
        mask: `(batch, time)`, bool or 0/1: the tokens that count. Values elsewhere never matter, NaN included. Another
            number, such as a label of -100, is refused: on a CPU by a ValueError; on an accelerator, where the host does not
            wait for it, by a failed assertion of the device.
        objective: A name in `OBJECTIVES`, an `Objective`, or "package.module:NAME" of one.
        rollout_logprobs: Log-probs under the sampler, `(batch, time)`; required by objectives with `anchor="rollout"` or a
            correction, or a filter that measures the sampler.
        extras: What else the objective needs, named in `Objective.extras`, one for each sequence or token; see
            `Objective.group_inputs` and `bandpo.bounds.TopK`.
        ref_logprobs: Log-probs under the reference policy, `(batch, time)`, for the KL term; no gradient flows into them.
        kl_coef: Coefficient of the KL term, β >= 0; None for that of the objective.
        kl: How the KL is estimated and differentiated, a name of `bandpo.reference` such as "k3" (the plain k3); None for that
            of the objective.
        entropy: Entropy of each token in nats, `(batch, time)`, for the metrics only.
        sample_weight: `(batch,)`, multiplies all terms of a sequence; of a pruned batch (`bandpo.selection`), with the
            `normalizer` of the batch before pruning. Refused with objectives that look at the whole batch.
        normalizer: Number of tokens (`token-mean`) or sequences (`seq-mean-*`) of the whole batch, a number or a 0-d tensor,
            when this call sees a part of it (gradient accumulation, data parallelism): the losses of the parts then add up to
            that of the whole. Objectives that look at the whole batch see their part alone. See `loss_normalizer`.
        max_length: The constant length of `seq-mean-token-sum-norm`.
        metrics: "basic" for the few that everybody reads, "full" for those by probability and of the region as well, which cost
            several times as much, "none" for none; see `bandpo.metrics.policy_metrics`.

    Returns:
        The loss, a 0-d tensor in float32 (float64 for float64 input), and metrics as 0-d tensors (no host sync).

    Raises:
        TypeError: If a dtype or the objective's type does not fit.
        ValueError: If shapes, names or numbers do not fit, the objective needs an input that is missing, or weights meet an
            objective that looks at the whole batch.

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
    check_shapes(
        logprobs,
        old_logprobs=old_logprobs,
        mask=mask,
        rollout_logprobs=rollout_logprobs,
        ref_logprobs=ref_logprobs,
        entropy=entropy,
    )
    kl_coef, kl = _chosen_kl(objective, kl_coef, kl, given=ref_logprobs is not None)

    valid = as_mask(mask)
    usable, weight, counted = valid, None, valid
    if sample_weight is not None:
        _check_sample_weight(sample_weight, objective, len(logprobs))
        finite = sample_weight.detach().isfinite()
        usable = usable & finite.unsqueeze(-1)
        weight = torch.where(finite, sample_weight.detach(), 0.0).unsqueeze(-1)
    if kl_coef and ref_logprobs is not None:
        usable = usable & is_logprob(ref_logprobs)

    _check_aggregation(objective.aggregation, normalizer, max_length)

    def reduce(x: Tensor) -> Tensor:  # x is 0 where a token is not used
        x = x if weight is None else x * weight
        return _reduced(x, counted, objective.aggregation, normalizer, max_length)

    terms = token_objective(
        objective,
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=usable,
        rollout_logprobs=rollout_logprobs,
        extras=extras,
        both_edges=metrics == "full",
    )
    value = terms.value
    if terms.counted is not None:
        counted = valid & terms.counted
        value = Fill(counted)(value)
    loss = -reduce(value)
    if usable is not valid:  # tokens without a weight or a reference are left out as well
        usable = usable ^ terms.nonfinite
        nonfinite = valid ^ usable
        sums = (
            None if terms.sums is None else terms.sums._replace(mask=valid, nonfinite=nonfinite)
        )  # of the same tokens
        terms = terms._replace(mask=valid, nonfinite=nonfinite, sums=sums)
    report = policy_metrics(terms, entropy=entropy, detail=metrics)
    report["loss/policy"] = loss.detach()
    if ref_logprobs is not None:
        known = valid & ~terms.nonfinite & is_logprob(ref_logprobs)
        plain = reference_kl(logprobs, ref_logprobs, "k3", mask=known)
        report["kl/ref"] = masked_mean(plain.detach(), known)
        if kl_coef:
            term = plain
            if kl != "k3":
                old = terms.anchor_logprobs
                term = reference_kl(logprobs, ref_logprobs, kl, old_logprobs=old, mask=known, weights=terms.weights)
            loss = loss + kl_coef * reduce(Fill(known & counted)(term))
    return loss, report


def compiled(
    function: Callable[P, R] = policy_loss,
    *,
    dynamic: bool | None = True,
    backend: str = "inductor",
    mode: str | None = None,
) -> Callable[P, R]:
    """`policy_loss`, or another function of the core, fused by `torch.compile` into a few passes over the tokens.

    One graph for each kind of call: objective, dtypes, which arguments there are. The first call of a kind compiles
    (seconds), and takes batches of any shape. The third radius of a ball makes the radius an input of the graph; a warning
    says so, once, and also what else compiles again and again. Nothing is refused for having too many variants.

    Args:
        function: `policy_loss`, `ratio_bounds`, `in_band`, a `Band`, or a function of yours that calls them.
        dynamic: As in `torch.compile`; False makes faster code for batches of one shape.
        backend: As in `torch.compile`.
        mode: As in `torch.compile`.

    Returns:
        A function of the same signature.

    Examples:
        >>> fast_loss = compiled()  # call it as policy_loss
    """
    from bandpo._compiled import Compiled  # which imports the compiler, and that takes a second

    def compiler(function: Callable[..., R]) -> Callable[..., R]:
        return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend, mode=mode)

    return Compiled(function, compiler, by_shape=dynamic is False)


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
        normalizer: Replaces the number of tokens or sequences found in `mask`, a number or a 0-d tensor; see `loss_normalizer`.
        max_length: The constant of `seq-mean-token-sum-norm`, and of it alone.

    Returns:
        0-d tensor in float32 (float64 for float64); 0 for an empty mask, also where the normalizer is 0.

    Raises:
        TypeError: If an argument is no tensor or number.
        ValueError: If the name is unknown, an argument does not belong to it, or a number is out of range.

    Examples:
        >>> import torch
        >>> x, m = torch.tensor([[1.0, 2.0], [4.0, 9.0]]), torch.tensor([[1, 1], [1, 0]])
        >>> [round(aggregate(x, m, a).item(), 3) for a in ("token-mean", "token-sum", "seq-mean-token-mean")]
        [2.333, 7.0, 2.75]
    """
    _check_aggregation(aggregation, normalizer, max_length)
    check_tensor("values", values)
    check_tensor("mask", mask, floating=False)
    valid = as_mask(mask)
    # Float16 has no number for the tokens of a batch, and would divide by infinity.
    return _reduced(Fill(valid)(widened(values).expand(valid.shape)), valid, aggregation, normalizer, max_length)


def _reduced(
    values: Tensor, valid: Tensor, aggregation: Aggregation, normalizer: Tensor | float | None, max_length: int | None
) -> Tensor:
    """`aggregate` of values that are 0 where the mask is off."""
    if aggregation == "token-sum":
        return values.sum()
    # Not as an int64 of eight bytes for each token, which torch makes to add up bools.
    lengths = None if aggregation == "token-mean" else valid.sum(-1, dtype=torch.int32)
    count = valid.count_nonzero() if lengths is None else lengths.count_nonzero()
    if lengths is not None and aggregation == "seq-mean-token-mean":
        values = values.sum(-1) / lengths.clamp_min(1)
    # A part without a token adds 0, also where the whole has none: there, and only there, the divisor may be 0.
    if normalizer is None:
        whole = count.clamp_min(1)
    else:
        whole = _checked_normalizer(normalizer) + (count == 0).to(values.dtype)
    total = values.sum() / whole
    return total if max_length is None else total / max_length


def loss_normalizer(mask: Tensor, aggregation: Aggregation) -> Tensor:
    """What `aggregate` divides by: valid tokens for `token-mean`, sequences with a valid token for `seq-mean-*`.

    Add it up over micro-batches and ranks and pass the sum as `normalizer`. It is 0 where no token is valid.

    Args:
        mask: `(batch, time)`, bool or 0/1.
        aggregation: As in `aggregate`.

    Returns:
        0-d integer tensor.

    Raises:
        ValueError: If the name is unknown.

    Examples:
        >>> import torch
        >>> loss_normalizer(torch.tensor([[1, 1], [0, 0]]), "seq-mean-token-mean")
        tensor(1)
    """
    _check_name(aggregation)
    valid = as_mask(mask)
    return valid.sum() if aggregation.startswith("token") else valid.any(-1).sum()


def _check_name(aggregation: str) -> None:
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"aggregation: got {aggregation!r}; choose one of {', '.join(get_args(Aggregation))}")


def _check_aggregation(aggregation: str, normalizer: Tensor | float | None, max_length: int | None) -> None:
    _check_name(aggregation)
    if (max_length is None) == (aggregation == "seq-mean-token-sum-norm"):
        raise ValueError(
            f"max_length={max_length} with aggregation {aggregation!r}: 'seq-mean-token-sum-norm' needs it "
            "(the maximal completion length of the run), the others do not use it"
        )
    if max_length is not None:
        check_int("max_length", max_length)
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
    if aggregation == "token-sum" and normalizer is not None:
        raise ValueError("aggregation 'token-sum' divides by nothing: leave normalizer out")


def _checked_normalizer(normalizer: Tensor | float) -> Tensor | float:
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer must be one number, got a tensor of shape {tuple(normalizer.shape)}")
        return normalizer.detach().reshape(())
    if isinstance(normalizer, bool) or not isinstance(normalizer, int | float):
        raise TypeError(f"normalizer must be a number or a 0-d tensor, got {normalizer!r}")
    if not 0 <= normalizer < math.inf:
        raise ValueError(f"normalizer must be a finite number >= 0, got {normalizer}")
    return normalizer


def _chosen_kl(
    objective: Objective, kl_coef: float | None, kl: ReferenceKL | None, *, given: bool
) -> tuple[float, ReferenceKL]:
    """Coefficient and kind of the KL term: those of the call, else those of the objective."""
    chosen = objective.kl_coef if kl_coef is None else kl_coef
    check_kl_coef(chosen)
    if chosen and not given:
        whose = f" of objective {objective.name!r}" if kl_coef is None else ""
        raise ValueError(
            f"kl_coef={chosen}{whose} needs ref_logprobs, the log-probs under the reference policy; kl_coef=0 leaves the KL out"
        )
    return chosen, objective.kl if kl is None else check_kl(kl)


def _check_sample_weight(sample_weight: Tensor, objective: Objective, sequences: int) -> None:
    check_tensor("sample_weight", sample_weight)
    if sample_weight.shape != (sequences,):
        raise ValueError(f"sample_weight has shape {tuple(sample_weight.shape)}; one for each of {sequences} sequences")
    if "of_batch" in objective.traits:
        raise ValueError(
            f"objective {objective.name!r} looks at the whole batch, so that no sample_weight makes the gradient of a part of "
            "it unbiased; train on the whole batch, or choose an objective of single tokens or sequences"
        )
