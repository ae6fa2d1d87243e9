"""What the adapters share: the objective of a host's options, its value for each token, and what the host ignores."""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bandpo._inputs import as_mask, fill
from bandpo.integrations._host_metrics import mean_proof
from bandpo.integrations.options import Overrides
from bandpo.metrics import policy_sums
from bandpo.objective import Objective
from bandpo.terms import token_objective
from bandpo.zoo import get_objective

OPTIONS = tuple(f.name for f in dataclasses.fields(Overrides) if f.name != "divergence_top_k")
"""Names of the options of a region that every host takes."""

ENVIRONMENT = "BANDPO_LOSS"
"""Variable that carries objective and options, as JSON, into the worker processes of hosts without a place for them."""

Rows = Literal["whole", "one", "packed"]
"""What a row of the host's tensors is: a sequence, the only sequence of the call, or several sequences (or parts of them)."""


def parse_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a region with their types checked; those that are None are left out.

    Strings that spell a number or a truth value are read, as command lines and YAML 1.1 (`1e-3`) hand them over.

    Args:
        options: Any of `OPTIONS`.

    Raises:
        ValueError: If a name is unknown or a value is not of its type.

    Examples:
        >>> parse_options({"radius": "1e-3", "relax": "False", "max_ratio": None})
        {'radius': 0.001, 'relax': False}
    """
    if unknown := set(options) - set(OPTIONS):
        raise ValueError(
            f"unknown options {', '.join(sorted(unknown))}; choose from objective, {', '.join(sorted(OPTIONS))}"
        )
    return {name: _parsed(name, value) for name, value in options.items() if value is not None}


def host_objective(
    host: str, objective: Objective | str, options: Mapping[str, Any], *, sampler: Literal["beside", "only", "none"],
    rows: Rows = "whole", scaled: bool = False,
) -> Objective:  # fmt: skip
    """The objective with its options, if this host can feed it.

    Args:
        host: For messages.
        objective: A name, a "package.module:NAME", or an `Objective`.
        options: Changes of its region, see `OPTIONS`.
        sampler: Whether the host gives the sampler's log-probs `beside` the old ones, `only` them, or `none`. With `only`,
            the ratio of every objective is taken against the sampler.
        rows: What a row of the host's tensors is.
        scaled: Whether the host multiplies the advantages by the loss's weights beforehand.

    Raises:
        ValueError: If an option would be ignored, or the host does not give what the objective needs.
    """
    chosen = get_objective(objective)
    name = objective if isinstance(objective, str) else chosen.name
    chosen = Overrides(**parse_options(options)).apply(chosen, name)
    why = _missing(chosen, sampler) or _not_in(rows, chosen)
    if scaled and not why and not proportional(chosen):
        why = "advantages as the estimator made them, and this host scales them before the loss"
    if why:
        raise ValueError(f"objective {name!r} needs {why}; {host} does not give a loss that")
    return dataclasses.replace(chosen, anchor="rollout") if sampler == "only" else chosen


def options_of_environment(host: str) -> dict[str, Any]:
    """Objective and options that the launcher put into `BANDPO_LOSS`; empty where it is not set.

    Raises:
        ValueError: If the variable holds no JSON object.
    """
    text = os.environ.get(ENVIRONMENT, "{}")
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{ENVIRONMENT}={text!r} is no JSON ({error}); {host} reads its objective from there"
        ) from error
    if not isinstance(given, dict):
        raise ValueError(f'{ENVIRONMENT}={text!r} must be a JSON object such as {{"objective": "bandpo-kl"}}')
    return given


def refuse_ignored(host: str, found: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """The host's own options that the objective would ignore must be at the host's defaults.

    Args:
        host: For messages.
        found: Values by name; those that are not there do not exist in this version of the host.
        defaults: The host's own.

    Raises:
        ValueError: If one differs; the message says which option of bandpo takes its place.
    """
    for name, default in defaults.items():
        if name in found and found[name] != default and not (not found[name] and not default):
            raise ValueError(
                f"{host}: {name}={found[name]!r} would be ignored, because bandpo's objective takes the place of the host's "
                f"loss; leave it at {default!r} and choose an objective or its options instead (see docs/hosts.md)"
            )


def attributes(config: Any, names: Mapping[str, Any]) -> dict[str, Any]:
    """The named options that a configuration object has."""
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


class Evaluated(NamedTuple):
    """What `evaluate` returns."""

    value: Tensor
    """Objective of each token, to maximise, 0 where the mask is off."""
    metrics: dict[str, Tensor]
    """Detached 0-d tensors that a host may average."""
    log_ratio: Tensor
    """Detached, of each token, 0 where the mask is off."""
    clipped: Tensor
    """Whether the surrogate takes the token's gradient away, bool; False where the mask is off."""


def evaluate(
    objective: Objective, *, logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor, mask: Tensor,
    rollout_logprobs: Tensor | None = None,
) -> Evaluated:  # fmt: skip
    """`token_objective` and its metrics, in the shape of the mask."""
    valid = as_mask(mask)
    terms = token_objective(
        objective, logprobs=logprobs, old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs,
        advantages=advantages, mask=valid,
    )  # fmt: skip
    if terms.stopped is None:
        raise TypeError(
            f"objective {objective.name!r}: in a compiled loss it is not known which tokens the surrogate takes the gradient "
            "from; mark the surrogate with bandpo.surrogates.stops"
        )
    log_ratio = fill(terms.log_ratio.detach().expand(valid.shape), valid)
    return Evaluated(terms.value, mean_proof(policy_sums(terms)), log_ratio, terms.stopped)


@functools.lru_cache(maxsize=64)
def proportional(objective: Objective) -> bool:
    """Whether the objective is proportional to the advantages, tried out on a few tokens.

    Examples:
        >>> from bandpo import OBJECTIVES
        >>> proportional(OBJECTIVES["bandpo-kl"]), proportional(OBJECTIVES["ppo-kl"])
        (True, False)
    """
    old = torch.linspace(-6.0, -0.05, 24, dtype=torch.float64).view(2, 12)
    new = (old + torch.linspace(-0.9, 0.9, 12, dtype=torch.float64)).clamp(max=-1e-3).flip(1)
    advantages = torch.tensor([1.5, -0.5], dtype=torch.float64).repeat(6).expand(2, 12)

    def value(scale: float) -> Tensor:
        given = {"logprobs": new, "old_logprobs": old, "rollout_logprobs": old, "mask": torch.ones_like(old)}
        return token_objective(objective, advantages=scale * advantages, **given).value / scale

    return torch.allclose(value(1.0), value(2.0**-10), rtol=1e-9, atol=1e-12)


def _missing(objective: Objective, sampler: str) -> str:
    if objective.extras:
        return ", ".join(objective.extras)
    if objective.correction is not None and sampler != "beside":
        return "log-probs of the sampler beside the old ones"
    if objective.anchor == "rollout" and sampler == "none":
        return "log-probs of the sampler"
    return ""


def _not_in(rows: Rows, objective: Objective) -> str:
    """What an objective that looks beyond its token cannot have there."""
    looks = "mask" in (*objective.bounds_inputs, *objective.surrogate_inputs)
    if rows == "packed" and (
        looks or objective.ratio_level != "token" or getattr(objective.correction, "level", "token") != "token"
    ):
        return "whole sequences, one in a row"
    if rows == "one" and "of_batch" in objective.traits:
        return "the other sequences of the batch"
    return ""


def _parsed(name: str, value: Any) -> Any:
    if name == "divergence":
        if not isinstance(value, str):
            raise ValueError(f"divergence={value!r} must be a name such as 'kl'")
        return value
    if name == "relax":
        if str(value).lower() not in ("true", "false"):
            raise ValueError(f"relax={value!r} must be true or false")
        return str(value).lower() == "true"
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise ValueError(f"{name}={value!r} must be a number")
    return number
