"""One step from log-probabilities to the objective of each token: anchor, ratio, bounds, surrogate, correction."""

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bandpo._eager import Fill, is_plain
from bandpo._inputs import LOWEST_LOGPROB, as_columns, as_mask, check_shapes, check_tensor, traits_of, widened
from bandpo.bounds import Clip, RatioBounds
from bandpo.bounds.band import pushed_edge
from bandpo.objective import Objective
from bandpo.surrogates import MAX_LOG_RATIO, clip, hold
from bandpo.surrogates.clipped import clipped_to_edge
from bandpo.surrogates.stops import stop_rule_of, value_and_stopped


class TokenSums(NamedTuple):
    """What the fused kernel has added up over the tokens that are used, for the default metrics; float32, 0-d."""

    tokens: Tensor
    """Number of tokens."""
    stopped: Tensor
    """Number of those whose gradient the surrogate takes away."""
    stopped_above: Tensor
    """Number of those with a ratio above 1."""
    ratio: Tensor
    """Sum of r."""
    k3: Tensor
    """Sum of `r - log r - 1`."""
    mask: Tensor
    """The mask that the sums belong to, the same object as that of the terms."""
    nonfinite: Tensor
    """The tokens that were left out, the same object as that of the terms."""


class UsedTokens(NamedTuple):
    """The fill of the tokens that are used, with the tensors that it belongs to, so that metrics need not make another one."""

    fill: Fill
    """Sets tensors to 0 where a token is not used."""
    mask: Tensor
    """The mask that it belongs to, the same object as that of the terms."""
    nonfinite: Tensor
    """The tokens that were left out, the same object as that of the terms."""


class TokenObjective(NamedTuple):
    """What one evaluation of an objective produced for each token; the result of `token_objective`."""

    value: Tensor
    """Objective to maximise, `(batch, time)`; 0 where the mask is off and where a token is left out."""
    log_ratio: Tensor
    """`log r` at the objective's ratio level, held within ±40, with gradient; 0 where the mask is off or a token left out."""
    bounds: RatioBounds | Tensor
    """What the surrogate was given: an interval, or whether the token is inside. With `both_edges=False` it may be a float
    tensor, the edge that each advantage pushes to, times the advantage's sign."""
    anchor_logprobs: Tensor
    """Log-probs of the policy that the ratio is taken against; 0 where the mask is off or a token is left out. With
    `both_edges=False` they may be as given: any number, or none, is then at those tokens."""
    advantages: Tensor
    """As a column or per token; 0 where they are not finite, and per token also where the mask is off or a token left out."""
    weights: Tensor | None
    """Weights for the sampler's mismatch, of the correction or of a filter with `action="weight"`, `(batch, time)` or
    `(batch, 1)`; None where the objective has none."""
    nonfinite: Tensor
    """Valid tokens that are left out because a number of theirs is NaN or infinite, bool, `(batch, time)`."""
    stopped: Tensor | None
    """Tokens whose gradient the surrogate takes away, bool, `(batch, time)`; False where the mask is off, a token is left out
    or its advantage is 0. None where that is not known: an own surrogate without the mark `bandpo.surrogates.stops`, under
    `torch.compile` or `torch.func`."""
    mask: Tensor
    """The mask, bool, `(batch, time)`."""
    objective: Objective
    """What was evaluated."""
    filter_weights: Tensor | None = None
    """What the filters drop, which `value` contains, `(batch, time)` or `(batch, 1)`: 0 where a token is dropped, else 1. None
    without a filter."""
    counted: Tensor | None = None
    """Whether a token stays in the denominators of a loss, bool, in the shape of `filter_weights`: False where a filter with
    `counts="kept"` has dropped it. None where the objective has no such filter."""
    divergence: Tensor | None = None
    """KL divergence of each position from the anchor, before its projection, `(batch, time)`; None without a projection."""
    ratio: Tensor | None = None
    """`exp(log_ratio)` without gradient; None where it was not needed."""
    sums: TokenSums | None = None
    """Sums of the fused kernel on CUDA, which metrics use while `mask` and `nonfinite` are the tensors that they belong to;
    None where the terms come from the plain path."""
    used: UsedTokens | None = None
    """The tokens that are used, for metrics while `mask` and `nonfinite` are the tensors that it belongs to."""


def token_objective(
    objective: Objective,
    *,
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    rollout_logprobs: Tensor | None = None,
    extras: Mapping[str, Tensor] | None = None,
    bounds: RatioBounds | Tensor | None = None,
    both_edges: bool = True,
) -> TokenObjective:
    """Per-token objective before aggregation, `w_t s(log r_t, A_t, b_t)`, for adapters that aggregate as their host does.

    The weight `w_t` is that of the correction times those of the filters.

    A valid token is left out where its advantage or a log-prob that the objective uses is NaN or infinite, or an extra is
    NaN: its value and gradient are 0, and statistics of its sequence or batch do not include it.

    Args:
        objective: What to evaluate.
        logprobs: Log-probs of the sampled tokens under the policy in training, `(batch, time)`, with gradient.
        old_logprobs: The same under the policy before the update, `(batch, time)`; None for objectives with `anchor="rollout"`.
        advantages: `(batch,)`, `(batch, 1)` or `(batch, time)`, float.
        mask: `(batch, time)`, bool or 0/1: the tokens that count.
        rollout_logprobs: Log-probs under the sampler, `(batch, time)`; required by objectives with `anchor="rollout"` or a
            correction, or a filter that measures the sampler.
        extras: What else the objective needs, named in `Objective.extras`, one for each sequence or token.
        bounds: The result of `objective.bounds` for these tokens, `(batch, time)`, where it is known already; None computes it.
        both_edges: Whether the terms must have both edges, which the full set of metrics reads. False saves time and memory
            where the surrogate is a clip, because the edge that the advantage pushes to decides alone. Values, gradients and
            the basic metrics are the same to the last bit.

    Returns:
        The value of each token, and what it was made from.

    Raises:
        TypeError: If a dtype does not fit, or the bounds give something else than an interval or a bool tensor.
        ValueError: If shapes do not fit, an input that the objective needs is missing, or an extra is not used by it.

    Examples:
        >>> from bandpo import OBJECTIVES
        >>> terms = token_objective(
        ...     OBJECTIVES["grpo"], logprobs=torch.tensor([[-0.5, -1.0]]), old_logprobs=torch.tensor([[-1.0, -1.0]]),
        ...     advantages=torch.ones(1), mask=torch.ones(1, 2),
        ... )
        >>> terms.value, terms.stopped
        (tensor([[1.2000, 1.0000]]), tensor([[ True, False]]))
    """
    anchor = _anchor(objective, old_logprobs, rollout_logprobs).detach()
    check_shapes(logprobs, old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs, mask=mask)
    check_tensor("advantages", advantages)
    columns = widened(as_columns(advantages.detach(), logprobs))
    own = _own_inputs(extras, objective, mask)

    valid = as_mask(mask)
    needed = [logprobs, anchor]
    if _needs_rollout(objective) and rollout_logprobs is not None:
        needed.append(rollout_logprobs)
    usable = valid & _usable(needed, columns)
    for x in own.values():
        nan = x.isnan()
        usable = usable & ~(nan if nan.dim() == 2 else nan.flatten(2).any(-1))
    nonfinite = valid ^ usable
    fill = Fill(usable)
    used = UsedTokens(fill, valid, nonfinite)

    per_token = columns.shape[1] > 1
    # At token level a column stays one: a surrogate tells by it that a sequence has one advantage.
    as_column = not per_token and objective.ratio_level == "token"
    advantages = columns.nan_to_num(0.0, 0.0, 0.0) if as_column else fill(columns)
    if (
        not both_edges
        and bounds is None
        and _is_decided_by_one_edge(objective, logprobs)
        and not _by_kernel(logprobs, anchor, objective)
    ):
        edge = pushed_edge(objective.bounds, widened(anchor), advantages)
        if edge is not None:
            log_ratio = fill.difference(widened(logprobs), widened(anchor), MAX_LOG_RATIO)
            ratio = log_ratio.detach().exp()
            value, stopped = clipped_to_edge(log_ratio, advantages, edge, fill, ratio)
            return TokenObjective(
                value,
                log_ratio,
                edge,
                anchor,
                advantages,
                None,
                nonfinite,
                stopped,
                valid,
                objective,
                ratio=ratio,
                used=used,
            )

    new, old = fill(widened(logprobs)), fill(widened(anchor))
    # In place where nobody asks for the log-probs themselves.
    reads_new = _reads_logprobs(objective) or not is_plain(new)
    difference = (new - old).to(new.dtype) if reads_new else new.sub_(old)
    log_ratio = hold(_at_level(difference, usable, objective, per_token=per_token))
    fused = _fused(logprobs, anchor, advantages, usable, objective) if bounds is None else None
    if fused is not None:
        value, bounds, stopped, sums = fused
        sums = None if sums is None else TokenSums(*sums.unbind(), mask=valid, nonfinite=nonfinite)
        terms = TokenObjective(
            value, log_ratio, bounds, old, advantages, None, nonfinite, stopped, valid, objective, sums=sums
        )
        return _filtered(terms, new, rollout_logprobs, fill) if objective.filters else terms

    inputs = {"old_logprobs": old, "log_ratio": log_ratio, "advantages": advantages, "mask": usable}
    inputs |= {"logprobs": new} if reads_new else {}
    inputs |= {name: _fill_any(x, usable) for name, x in own.items()}
    if bounds is None:
        bounds = _bounds(objective, old, inputs, usable)
    _check_bounds(bounds, objective)
    ratio = log_ratio.detach().exp()
    value, stopped = value_and_stopped(
        objective.surrogate, log_ratio, advantages, bounds, ratio=ratio, inputs=inputs, asked=objective.surrogate_inputs
    )
    weights = None
    if objective.correction is not None and rollout_logprobs is not None:
        weights = objective.correction(old - fill(widened(rollout_logprobs.detach())), usable)
        value = value * weights
    # Expanded first: one value of a sequence counts once for each of its tokens, but not for one that is left out.
    value = fill(_per_token(value, objective, usable))
    stopped = None if stopped is None else stopped & usable
    divergence = None
    if objective.projection is not None:
        given = (*objective.extras, "logprobs", "old_logprobs")
        divergence = objective.projection.divergence(**{name: inputs[name].detach() for name in given})
    terms = TokenObjective(
        value,
        log_ratio,
        bounds,
        old,
        advantages,
        weights,
        nonfinite,
        stopped,
        valid,
        objective,
        divergence=divergence,
        ratio=ratio,
        used=used,
    )
    return _filtered(terms, new, rollout_logprobs, fill) if objective.filters else terms


def _usable(logprobs: Sequence[Tensor], columns: Tensor) -> Tensor:
    """Tokens whose log-probs can be used and whose advantage is finite, by one comparison."""
    largest = widened(logprobs[0].detach()).abs()
    for x in logprobs[1:]:
        largest = torch.maximum(largest, widened(x.detach()).abs())
    return largest + (columns - columns) <= -LOWEST_LOGPROB  # A - A is NaN where A is not finite


def _reads_logprobs(objective: Objective) -> bool:
    """Whether a part of the objective is given the log-probs of the policy in training, beside the log-ratio."""
    mark, _ = stop_rule_of(objective.surrogate)
    if mark is None or objective.filters or objective.projection is not None:
        return True
    return "logprobs" in (*objective.surrogate_inputs, *objective.bounds_inputs, *mark.inputs)


def _needs_rollout(objective: Objective) -> bool:
    """Whether the objective needs the log-probs of the sampler beside those of the anchor."""
    return objective.correction is not None or any("rollout" in rule.needs for rule in objective.filters)


def _filtered(terms: TokenObjective, new: Tensor, rollout_logprobs: Tensor | None, fill: Fill) -> TokenObjective:
    """The terms with the weights of the filters, which judge the tokens that are used, and have no gradient.

    A weight for the sampler's mismatch, of which an objective has one at most, takes the place of a correction's.
    """
    anchor = terms.anchor_logprobs
    logprobs = {"policy": new.detach(), terms.objective.anchor: anchor}
    if rollout_logprobs is not None:
        logprobs["rollout"] = fill(widened(rollout_logprobs.detach()))
    kept, counted, weights = torch.ones_like(anchor[:, :1]), None, terms.weights
    value = terms.value
    for rule in terms.objective.filters:
        first, second = rule.needs
        found = rule(logprobs[first] - logprobs[second], terms.advantages, fill.mask)
        value = value * found
        if rule.action == "weight":
            weights = found
            continue
        kept = kept * found
        if rule.counts == "kept":
            counted = (found != 0) if counted is None else counted & (found != 0)
    return terms._replace(value=value, weights=weights, filter_weights=kept, counted=counted)


def _anchor(objective: Objective, old_logprobs: Tensor | None, rollout_logprobs: Tensor | None) -> Tensor:
    """Log-probs of the policy that the ratio is taken against."""
    anchor = rollout_logprobs if objective.anchor == "rollout" else old_logprobs
    if anchor is None:
        what = (
            "the sampler (anchor='rollout'): pass rollout_logprobs"
            if objective.anchor == "rollout"
            else "the policy before the update (anchor='old'): pass old_logprobs"
        )
        raise ValueError(f"objective {objective.name!r} measures its ratio against {what}")
    if _needs_rollout(objective) and rollout_logprobs is None:
        how = f"corrects for the sampler by {objective.correction}"
        if objective.correction is None:
            how = f"filters by the sampler, {objective.filter}"
        raise ValueError(f"objective {objective.name!r} {how}: pass rollout_logprobs")
    return anchor


def gradient_weight(
    objective: Objective,
    ratios: Tensor,
    probabilities: Tensor,
    advantage: float,
    extras: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The weight w in `∇ = A·r·w(r, p, A)·∇log π` of tokens that are sequences of their own; see `bandpo.surrogates.token`.

    Args:
        objective: Whose weight.
        ratios: r > 0, any shape.
        probabilities: p of the anchor, the same shape, in (0, 1); `p·r > 1` gives NaN, there is no such policy.
        advantage: A, not 0.
        extras: Extras of the objective, one for each token.

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
        objective,
        logprobs=new,
        old_logprobs=p.log(),
        rollout_logprobs=p.log(),
        advantages=a,
        mask=torch.ones_like(r),
        extras=extras,
    ).value
    (gradient,) = torch.autograd.grad(value.sum(), new)
    weight = torch.where(p * r > 1, torch.nan, gradient / (a * r))
    return weight.view(ratios.shape)


def sequence_log_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Length-normalised log-ratio of each sequence, `mean_t log r_t`, `(batch, 1)` (GSPO, arXiv:2507.18071, eq. 7).

    The mean is over the valid tokens whose log-ratio is finite; 0 where there is none.

    Args:
        log_ratio: `log r` of each token, `(batch, time)`.
        mask: `(batch, time)`, bool or 0/1.

    Examples:
        >>> import torch
        >>> sequence_log_ratio(torch.tensor([[0.1, 0.3, 9.0]]), torch.tensor([[1, 1, 0]]))
        tensor([[0.2000]])
    """
    usable = as_mask(mask) & log_ratio.isfinite()
    total = log_ratio.masked_fill(~usable, 0.0).sum(-1, keepdim=True)
    return total / usable.sum(-1, keepdim=True).clamp_min(1)


def level_logprobs(objective: Objective, logprobs: Tensor, usable: Tensor) -> Tensor:
    """Log-probs at the ratio level of an objective, in which its bounds are functions.

    * `sequence`: the mean over the sequence, `log p̄ = mean_t log p_t`. p̄ is the geometric mean of the probabilities of its
      tokens, the reciprocal of its perplexity. The ratio s of the sequence times p̄ is the geometric mean of the new
      probabilities, so that `s <= 1/p̄` takes the place of the simplex' `r <= 1/p`. This scale is our own choice: p̄ is no
      probability of an event, and a ball around p̄ is no ball around the policy. It treats the sequence as one average token,
      and is the region of the token where all tokens have one p and one ratio.
    * `product`: the sum, the log-prob of the whole sequence. That is the probability of an event, for which the band is exact
      (BandPO, arXiv:2603.04918, Thm. 1). It is so small that a band leaves sequences of more than a few tokens free.

    Args:
        objective: Whose ratio level.
        logprobs: Log-probs of the anchor, `(batch, time)`, 0 where a token is not used.
        usable: The tokens that are used, bool, `(batch, time)`.

    Returns:
        A tensor of the shape of `logprobs`; at the two levels of a sequence, each row has one value.

    Examples:
        >>> from bandpo import Band
        >>> sequence = Objective(bounds=Band("kl", 0.001), ratio_level="sequence")
        >>> level_logprobs(sequence, torch.tensor([[-0.1, -0.3, 0.0]]), torch.tensor([[True, True, False]]))
        tensor([[-0.2000, -0.2000, -0.2000]])
    """
    if objective.ratio_level == "token":
        return logprobs
    whole = logprobs.sum(-1, keepdim=True)
    if objective.ratio_level == "sequence":
        whole = whole / usable.sum(-1, keepdim=True).clamp_min(1)
    return whole.expand(logprobs.shape)


def _bounds(objective: Objective, old: Tensor, inputs: Mapping[str, Tensor], usable: Tensor) -> RatioBounds | Tensor:
    """What the objective's bounds give for each token, without gradient; one value of a sequence is repeated."""
    with torch.no_grad():
        given = {name: inputs[name].detach() for name in objective.bounds_inputs}
        if objective.ratio_level != "token" and not isinstance(objective.bounds, Clip):
            old = level_logprobs(objective, old, usable)
            given |= {"log_ratio": given["log_ratio"].expand(old.shape)} if "log_ratio" in given else {}
        return objective.bounds(old, **given)


def _at_level(token_log_ratio: Tensor, usable: Tensor, objective: Objective, *, per_token: bool) -> Tensor:
    """The log-ratio that the surrogate is given, of tokens whose own is 0 where they are not used.

    With advantages per token, the ratio of a sequence stays what it is, but each token's term has the gradient of its own
    log-prob alone, so that it is moved by its own advantage (GSPO-token, arXiv:2507.18071, sec. 4.3). Times the length for a
    product, that adds up to the gradient of the sequence's ratio where all its advantages are equal.
    """
    if objective.ratio_level == "token":
        return token_log_ratio
    count = usable.sum(-1, keepdim=True).clamp_min(1)
    whole = token_log_ratio.sum(-1, keepdim=True)
    whole = whole / count if objective.ratio_level == "sequence" else whole
    if not per_token:
        return whole
    own = token_log_ratio - token_log_ratio.detach()
    return whole.detach() + (own if objective.ratio_level == "sequence" else own * count)


def _own_inputs(extras: Mapping[str, Tensor] | None, objective: Objective, mask: Tensor) -> dict[str, Tensor]:
    """The objective's own inputs, beginning with a column or with tokens; without gradient unless a part asks for it."""
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
        check_tensor(f"extras[{name!r}]", x, floating=False)
        if x.shape[:1] != mask.shape[:1] or (x.dim() > 1 and x.shape[1] not in (1, mask.shape[1])):
            raise ValueError(
                f"extras[{name!r}] has shape {tuple(x.shape)}; it must begin with ({mask.shape[0]},), ({mask.shape[0]}, 1) "
                f"or {tuple(mask.shape)}"
            )
        x = x if "extras_with_gradient" in objective.traits else x.detach()
        given[name] = x.unsqueeze(-1) if x.dim() == 1 else x
    return given


def _fill_any(x: Tensor, usable: Tensor) -> Tensor:
    """An extra in its own dtype, 0 where a token is not used; more dimensions than tokens have stay as they are."""
    return torch.where(usable, x, torch.zeros((), dtype=x.dtype, device=x.device)) if x.dim() == 2 else x


def _check_bounds(bounds: RatioBounds | Tensor, objective: Objective) -> None:
    if isinstance(bounds, RatioBounds):
        return
    if not (isinstance(bounds, Tensor) and bounds.dtype == torch.bool):
        raise TypeError(
            f"objective {objective.name!r}: bounds={objective.bounds!r} returned {type(bounds).__name__}; they must return "
            "RatioBounds(lower, upper), or a bool tensor that says which tokens are inside"
        )
    if "membership" not in traits_of(objective.surrogate):
        raise TypeError(
            f"objective {objective.name!r}: bounds={objective.bounds!r} say which tokens are inside, and the surrogate needs "
            "edges; use bandpo.surrogates.mask, or mark yours with bandpo.surrogates.traits('membership')"
        )


def _per_token(value: Tensor, objective: Objective, usable: Tensor) -> Tensor:
    if value.dim() != 2 or value.shape[0] != usable.shape[0] or value.shape[1] not in (1, usable.shape[1]):
        raise ValueError(
            f"objective {objective.name!r}: the surrogate returned shape {tuple(value.shape)}; it must be "
            f"{tuple(usable.shape)}, or ({usable.shape[0]}, 1) for one value of each sequence"
        )
    return value.expand(usable.shape)


def _fused(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, valid: Tensor, objective: Objective
) -> tuple[Tensor, RatioBounds, Tensor, Tensor | None] | None:
    """Objective, bounds, which tokens are outside, and sums, by one Triton kernel on CUDA; None where it cannot be used."""
    if not _by_kernel(logprobs, old_logprobs, objective):
        return None
    from bandpo.surrogates.kernel import clipped_objective

    return clipped_objective(logprobs, old_logprobs.detach(), advantages, valid, objective.bounds)


def _by_kernel(logprobs: Tensor, old_logprobs: Tensor, objective: Objective) -> bool:
    fits = objective.surrogate is clip and objective.ratio_level == "token" and objective.correction is None
    plain = is_plain(logprobs) and is_plain(old_logprobs)  # first: torch.compile does not look into a cached function
    return fits and plain and _runs_triton(logprobs.device.type)


def _is_decided_by_one_edge(objective: Objective, logprobs: Tensor) -> bool:
    """Whether an objective is the clip of each token's ratio alone, and one edge is less work than both."""
    alone = objective.correction is None and len(objective.filters) == 0
    if type(objective.bounds) is Clip and not is_plain(logprobs):
        return False  # two numbers are no work at all, and the compiler makes faster code of both edges
    return objective.surrogate is clip and objective.ratio_level == "token" and alone


@functools.cache
def _runs_triton(device: str) -> bool:
    """Whether the kernel can run; without Triton CUDA tensors take the plain path."""
    return device == "cuda" and importlib.util.find_spec("triton") is not None
