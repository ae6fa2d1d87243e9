"""An objective tried on a small batch before hours of runs: can it be computed, and does it look at other sequences?"""

from collections.abc import Mapping
from typing import Any, cast

import torch

from bandpo._system.errors import exits_are_errors, place_of, what_happened
from bandpo.groups import group_advantages
from bandpo.lab.comparison.exact import on_bandits
from bandpo.lab.comparison.own import objective_of
from bandpo.lab.comparison.top import top_extras, top_tokens
from bandpo.losses import policy_loss
from bandpo.objective import Objective
from bandpo.terms import token_objective

_HALVES = (slice(0, 8), slice(8, 16))


def check_computable(name: str) -> None:
    """Compute the loss of an objective and its gradient on a small batch, so that a mistake in it ends the command at once.

    Args:
        name: Name or import path.

    Raises:
        ValueError: If its code raises, the loss is no finite number, or it has no gradient; the message has the place.
    """
    objective = objective_of(name)
    length = 3 if objective.aggregation == "seq-mean-token-sum-norm" else None
    try:
        with exits_are_errors():
            batch = _small_batch(objective, rows=8, time=3)
            loss, _ = policy_loss(objective=objective, max_length=length, ref_logprobs=batch["old_logprobs"], **batch)
            (gradient,) = cast("tuple[torch.Tensor]", torch.autograd.grad(loss, batch["logprobs"]))
    except Exception as error:
        raise ValueError(
            f"objectives: {name} cannot be computed on a small batch: its code {what_happened(error)} at {place_of(error)}"
        ) from error
    gone = int((~gradient.isfinite()).sum())
    if gone or not loss.isfinite():
        raise ValueError(
            f"objectives: {name} gives no number on a small batch: the loss is {loss.item()}, and {gone} of {gradient.numel()} "
            "numbers of its gradient are not finite"
        )


def why_not_on_bandits(name: str) -> str:
    """Why an objective cannot be tried on the exact bandit, "" if it can.

    Args:
        name: Name or import path.

    Examples:
        >>> why_not_on_bandits("grpo"), why_not_on_bandits("gspo")
        ('', 'it needs a ratio of single choices and no extras of groups')
    """
    objective = objective_of(name)
    if not on_bandits(objective):
        return "it needs a ratio of single choices and no extras of groups"
    if looks_at_neighbours(objective):
        return (
            "what it does to a token depends on other sequences or on chance, and a call has the sequences of all seeds"
        )
    return ""


def looks_at_neighbours(objective: Objective) -> bool:
    """Whether what an objective does to a sequence depends on other sequences of the call, or on chance.

    The exact bandit gives the sequences of all seeds in one call: such an objective would mix the seeds.

    Args:
        objective: An objective for which `bandpo.lab.comparison.exact.on_bandits` is true.

    Examples:
        >>> from bandpo import OBJECTIVES
        >>> looks_at_neighbours(OBJECTIVES["grpo"]), looks_at_neighbours(OBJECTIVES["m2po"])
        (False, True)
    """
    if "of_batch" in objective.traits:
        return True
    batch = _small_batch(objective, rows=16, time=1)
    whole = _values(objective, batch)
    return any(not torch.allclose(_values(objective, _rows(batch, at)), whole[at], atol=1e-5) for at in _HALVES)


def _values(objective: Objective, batch: Mapping[str, Any]) -> torch.Tensor:
    return token_objective(objective, **batch).value.detach()


def _rows(batch: Mapping[str, Any], at: slice) -> dict[str, Any]:
    return {
        name: {k: x[at] for k, x in cast("dict[str, Any]", value).items()} if isinstance(value, dict) else value[at]
        for name, value in batch.items()
    }


def _small_batch(objective: Objective, rows: int, time: int) -> dict[str, Any]:
    """A batch of groups of 4 whose later rows have larger ratios and advantages, with what the objective asks for."""
    g = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.1, 2.0, rows).view(-1, 1, 1)
    old = torch.randn(rows, time, 5, generator=g).log_softmax(-1)
    new = (old + scale * torch.randn(old.shape, generator=g)).log_softmax(-1)
    tokens = torch.randint(5, (rows, time, 1), generator=g)
    rewards = torch.rand(rows, generator=g) * scale.flatten()
    advantages = group_advantages(rewards, 4, kind=objective.advantage)
    extras = objective.group_inputs(rewards, advantages, 4)
    before = old.gather(-1, tokens).squeeze(-1)
    if objective.top_k is not None:
        extras |= top_extras(top_tokens(old, tokens.squeeze(-1), objective.top_k), new)
    return {
        "logprobs": new.gather(-1, tokens).squeeze(-1).requires_grad_(),
        "old_logprobs": before,
        "rollout_logprobs": before,
        "advantages": advantages,
        "mask": torch.ones(rows, time, dtype=torch.bool),
        "extras": extras,
    }
