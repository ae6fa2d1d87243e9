"""What the adapters share: the objective for a host's options, its value for each token, and the check of ignored options."""

import dataclasses
import functools
import os
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from bandpo._inputs import as_mask, fill
from bandpo._system.bounded import parse_json
from bandpo.experimental import Balanced, sum_over_ranks
from bandpo.integrations._host_metrics import mean_proof
from bandpo.integrations.options import RegionOptions, parse_options
from bandpo.metrics import Detail, policy_sums
from bandpo.objective import Objective
from bandpo.terms import token_objective
from bandpo.zoo import get_objective

METRICS = "BANDPO_METRICS"
"""Environment variable with the level of detail of the metrics in a host: basic (the default) or full."""

ENVIRONMENT = "BANDPO_LOSS"
"""Environment variable with objective and options as JSON, for hosts whose configuration cannot pass them to the workers."""

Rows = Literal["whole", "one", "packed"]
"""What a row of the host's tensors contains: one sequence, the only sequence of the call, or several (parts of) sequences."""


def checked_detail(detail: str, option: str = METRICS) -> Detail:
    """The level of detail of the metrics, which is the same in every process and step of a run.

    Hosts average metrics over micro-batches and ranks by their names, and several stop where these differ. So there is no
    choice by step, and the basic ones are always reported.

    Args:
        detail: What the user chose.
        option: Where, for the message.

    Raises:
        ValueError: If it is neither basic nor full.
    """
    if detail not in ("basic", "full"):
        raise ValueError(f"{option}={detail!r}: choose basic, or full for the metrics by probability and of the region")
    return cast("Detail", detail)


def host_objective(
    host: str,
    objective: Objective | str,
    options: Mapping[str, Any],
    *,
    sampler: Literal["beside", "only", "none"],
    rows: Rows = "whole",
    scaled: bool = False,
    kl: str | None = None,
) -> Objective:
    """The objective with its options, if this host provides the inputs that the objective needs.

    Args:
        host: Name of the host, for error messages.
        objective: A name of `bandpo objectives`, "package.module:NAME", or an `Objective`.
        options: Changes of the objective's region: fields of `RegionOptions`, by name.
        sampler: Which log-probs the host provides: `beside` for those of the sampler and the old ones, `only` for those of
            the sampler, `none` for the old ones. With `only`, the ratio of every objective is taken against the sampler.
        rows: What a row of the host's tensors contains.
        scaled: Whether the host multiplies the advantages by the loss's weights before it calls the loss.
        kl: The host's options for a KL to the reference, which a warning names where the objective has one; "" where the
            adapter adds that term or checks the options itself (`check_host_kl`); None where the host has no such term.

    Raises:
        ValueError: If an option would be ignored, or the host does not provide an input that the objective needs.
    """
    chosen = get_objective(objective)
    name = objective if isinstance(objective, str) else chosen.name
    chosen = RegionOptions(**parse_options(options)).apply(chosen, name)
    refuse_denominators(host, chosen)
    why = _missing(chosen, sampler) or _not_in(rows, chosen)
    if scaled and not why and not proportional(chosen):
        why = "advantages as the estimator made them, and this host scales them before the loss"
    if why:
        raise ValueError(f"objective {name!r} needs {why}; {host} does not give this to a loss")
    if chosen.kl_coef and kl != "":
        _tell_kl(host, chosen, kl)
    return dataclasses.replace(chosen, anchor="rollout") if sampler == "only" else chosen


def check_host_kl(host: str, objective: Objective, coefficient: float, options: str) -> None:
    """Require that the host adds the KL to the reference that belongs to an objective.

    Args:
        host: Name of the host, for error messages.
        objective: The objective.
        coefficient: The coefficient of the KL loss that the host adds, 0 if it adds none.
        options: The host's options for it, for the message.

    Raises:
        ValueError: If the objective has a KL with another coefficient.
    """
    if objective.kl_coef and coefficient != objective.kl_coef:
        raise ValueError(
            f"{_has_kl(objective)}, which {host} computes, and its coefficient there is {coefficient:g}: set {options}, or "
            "make an Objective with kl_coef=0"
        )


def _has_kl(objective: Objective) -> str:
    return (
        f"objective {objective.name!r} has a KL to the reference (kl_coef={objective.kl_coef:g}, kl={objective.kl!r})"
    )


def _tell_kl(host: str, objective: Objective, options: str | None) -> None:
    if options is None:
        raise ValueError(
            f"{_has_kl(objective)}, and {host} gives no log-probs of a reference to a loss; make an Objective with kl_coef=0"
        )
    warnings.warn(f"{_has_kl(objective)}, which {host} computes: set {options}", stacklevel=3)


def over_ranks(objective: Objective) -> Objective:
    """The objective, whose sums over the batch are those of all ranks, if it takes such sums and has no hook for them yet.

    For hosts in which every process computes the loss of the same number of micro-batches.

    Args:
        objective: The objective of the run.
    """
    bounds = objective.bounds
    if not isinstance(bounds, Balanced) or bounds.reduce is not None:
        return objective
    return dataclasses.replace(objective, bounds=dataclasses.replace(bounds, reduce=sum_over_ranks))


def options_of_environment(host: str) -> dict[str, Any]:
    """Objective and options that the launcher put into `BANDPO_LOSS`; empty if the variable is not set.

    Args:
        host: Name of the host, for error messages.

    Raises:
        ValueError: If the variable is not a JSON object, or has a key twice.
    """
    text = os.environ.get(ENVIRONMENT, "{}")
    try:
        given = parse_json(text, f"{ENVIRONMENT}={text!r}", unique=True)
    except ValueError as error:
        raise ValueError(f"{error}; {host} reads its objective from there") from None
    if not isinstance(given, dict):
        raise ValueError(f'{ENVIRONMENT}={text!r} must be a JSON object such as {{"objective": "bandpo-kl"}}')
    return cast("dict[str, Any]", given)


def refuse_ignored(host: str, found: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Require the host's defaults for those of its own options that the objective would ignore.

    Args:
        host: Name of the host, for error messages.
        found: Values of the host's options by name; an option that is missing does not exist in this version of the host.
        defaults: The host's defaults by name.

    Raises:
        ValueError: If a value differs from its default.
    """
    for name, default in defaults.items():
        if name in found and found[name] != default and not (not found[name] and not default):
            raise ValueError(
                f"{host}: {name}={found[name]!r} would be ignored, because bandpo's objective takes the place of the host's "
                f"loss; leave it at {default!r} and choose an objective or its options instead (see docs/hosts.md)"
            )


def refuse_denominators(host: str, objective: Objective) -> None:
    """Refuse filters that take dropped tokens out of denominators which the host has counted before the loss.

    Args:
        host: Name of the host, for error messages.
        objective: The objective to check.

    Raises:
        ValueError: If a filter of the objective has `counts="kept"`.
    """
    if any(rule.counts == "kept" for rule in objective.filters):
        raise ValueError(
            f"objective {objective.name!r} has a filter with counts='kept', whose dropped tokens leave the denominators of the "
            f"loss; {host} counts these before the loss. Set counts='all'"
        )


def attributes(config: Any, names: Mapping[str, Any]) -> dict[str, Any]:
    """The named options that a configuration object has.

    Args:
        config: A configuration object of the host.
        names: Names to look for; their values are not used.
    """
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


class Evaluated(NamedTuple):
    """The result of `evaluate`, in the shape of the mask."""

    value: Tensor
    """Objective of each token, to be maximised; 0 where the mask is off."""
    metrics: dict[str, Tensor]
    """Detached 0-d tensors that a host may average."""
    log_ratio: Tensor
    """Log-ratio of each token, detached; 0 where the mask is off."""
    clipped: Tensor
    """Whether the surrogate takes the token's gradient away, bool; False where the mask is off."""
    used: Tensor
    """Whether the token is valid and all of its numbers are finite."""


def evaluate(
    objective: Objective,
    *,
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    rollout_logprobs: Tensor | None = None,
    weights: Tensor | None = None,
    detail: str | None = None,
) -> Evaluated:
    """The objective of each token and its metrics.

    Args:
        objective: The objective to evaluate.
        logprobs: Log-probs `(batch, time)` of the policy in training, with gradient.
        old_logprobs: Log-probs `(batch, time)` of the policy before the update, None where the host has none.
        advantages: Advantages, `(batch, 1)` or `(batch, time)`.
        mask: Mask of valid tokens, `(batch, time)`.
        rollout_logprobs: Log-probs `(batch, time)` of the sampler, None where the host has none.
        weights: The host's weights `(batch, time)`, by which the objective of each token is multiplied. A token whose weight
            is NaN or infinite is left out.
        detail: Level of detail of the metrics; None for that of the environment variable `BANDPO_METRICS`.
    """
    chosen = checked_detail(os.environ.get(METRICS, "basic") if detail is None else detail)
    valid = as_mask(mask)
    terms = token_objective(
        objective,
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        rollout_logprobs=rollout_logprobs,
        advantages=advantages,
        mask=valid,
        both_edges=chosen == "full",
    )
    stopped = terms.stopped
    if stopped is None:
        raise TypeError(
            f"objective {objective.name!r}: under torch.compile and in inference mode it is not known which tokens the "
            "surrogate takes the gradient from; mark the surrogate with bandpo.surrogates.stops"
        )
    if weights is not None:
        finite = weights.isfinite()
        value = terms.value * torch.where(finite, weights, 0.0)
        terms = terms._replace(value=value, nonfinite=terms.nonfinite | (valid & ~finite))
    log_ratio = fill(terms.log_ratio.detach().expand(valid.shape), valid)
    used = valid & ~terms.nonfinite
    return Evaluated(terms.value, mean_proof(policy_sums(terms, detail=chosen)), log_ratio, stopped & used, used)


@functools.lru_cache(maxsize=64)
def proportional(objective: Objective) -> bool:
    """Whether the objective is proportional to the advantages, tested on a few tokens.

    Args:
        objective: The objective to test.

    Examples:
        >>> from bandpo import OBJECTIVES
        >>> proportional(OBJECTIVES["bandpo-kl"]), proportional(OBJECTIVES["ppo-kl"])
        (True, False)
    """
    old = torch.linspace(-6.0, -0.05, 24, dtype=torch.float64).view(2, 12)
    new = (old + torch.linspace(-0.9, 0.9, 12, dtype=torch.float64)).clamp(max=-1e-3).flip(1)
    advantages = torch.tensor([1.5, -0.5], dtype=torch.float64).repeat(6).expand(2, 12)

    def value(scale: float) -> Tensor:
        terms = token_objective(
            objective,
            logprobs=new,
            old_logprobs=old,
            rollout_logprobs=old,
            advantages=scale * advantages,
            mask=torch.ones_like(old),
        )
        return terms.value / scale

    return torch.allclose(value(1.0), value(2.0**-10), rtol=1e-9, atol=1e-12)


def extras_of(objective: Objective) -> str:
    """The extras of an objective, as an error message names them."""
    names = ", ".join(objective.extras)
    if objective.top_k is None:
        return names
    return f"the log-probs of the {objective.top_k} most likely tokens at each place ({names})"


def _missing(objective: Objective, sampler: str) -> str:
    if objective.extras:
        return extras_of(objective)
    if objective.correction is not None and sampler != "beside":
        return "log-probs of the sampler beside the old ones"
    if objective.anchor == "rollout" and sampler == "none":
        return "log-probs of the sampler"
    for rule in objective.filters:
        known = {"beside": ("old", "rollout"), "only": ("rollout",), "none": ("old",)}[sampler]
        if unknown := [name for name in rule.needs if name not in ("policy", *known)]:
            what = {
                "old": "log-probs before the update beside those of the sampler",
                "rollout": "log-probs of the sampler",
            }
            return f"{what[unknown[0]]}, for a filter with policies={rule.policies!r}"
    return ""


def weighs_sampler(objective: Objective) -> bool:
    """Whether an objective weighs the sampler's mismatch with π_old itself, by a correction or by a filter that weighs.

    Args:
        objective: The objective to check.
    """
    return objective.correction is not None or any(rule.action == "weight" for rule in objective.filters)


def of_sequences(objective: Objective) -> bool:
    """Whether an objective looks at whole sequences, and needs to know where they begin.

    Args:
        objective: The objective to check.
    """
    looks = objective.ratio_level != "token" or "mask" in (*objective.bounds_inputs, *objective.surrogate_inputs)
    weighs = getattr(objective.correction, "level", "token") != "token"
    return looks or weighs or any(rule.reduction not in ("token", "batch-mean") for rule in objective.filters)


def _not_in(rows: Rows, objective: Objective) -> str:
    """What an objective that looks beyond a single token would need and does not have with such rows; "" for nothing."""
    if rows == "packed" and of_sequences(objective):
        return "whole sequences, one in a row"
    if rows == "one" and "of_batch" in objective.traits:
        return "the other sequences of the batch"
    return ""
