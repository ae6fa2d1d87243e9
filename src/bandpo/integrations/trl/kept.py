"""The objective of a run as its checkpoints keep it, so that a run that resumes with another one says it or is refused."""

import re
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor

from bandpo.integrations.trl.config import BandGRPOConfig
from bandpo.objective import Objective
from bandpo.terms import token_objective

_OF_CONFIG = ("loss_type", "scale_rewards", "beta", "kl", "delta", "top_entropy_quantile", "off_policy_mask_threshold")
_NOT_IN_THE_LOSS = ("formula", "paper", "kl_coef", "kl")  # the last two are those of the configuration
_PLACES = 12


class KeptObjective:
    """The objective of a run: its parts as text, and what it computes for a few fixed tokens.

    The numbers find changes that no text shows, such as another body of the same function. They are values and gradients in
    float32, on the CPU; with a tolerance, so that another machine or version does not change them.

    Args:
        objective: The objective at the beginning of the run: a radius or a penalty that moves is in the state of its rule.
        args: The options of the run.
    """

    def __init__(self, objective: Objective, args: BandGRPOConfig) -> None:
        self._objective, self._args = objective, args
        self._state: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain values."""
        if self._state is None:
            names = [f.name for f in fields(Objective) if f.init and f.name not in _NOT_IN_THE_LOSS]
            parts = {name: _text(getattr(self._objective, name)) for name in names}
            parts |= {name: _text(getattr(self._args, name)) for name in _OF_CONFIG}
            self._state = {
                "parts": parts,
                "inputs": [*self._objective.extras, f"top {self._objective.top_k}"],
                "numbers": _numbers(self._objective),
            }
        return self._state

    def changed_since(self, state: object, half_used: bool) -> str | None:
        """What the user is told when a run resumes with another objective; None where it is the same one.

        Args:
            state: The `state_dict` of the checkpoint; None in a checkpoint of an earlier version.
            half_used: Whether the checkpoint holds a rollout of which steps are left.

        Raises:
            ValueError: If the rollout in use has not the inputs that this objective asks for, or the state is damaged.
        """
        if state is None:
            return None
        then, now = _checked(state), self.state_dict()
        asked, had = set(now["inputs"]) - {"top None"}, set(then["inputs"])
        name = self._objective.name
        if half_used and not asked <= had:
            raise ValueError(
                f"it was written with objective {then['parts'].get('name')}, and objective {name!r} asks for inputs that its "
                f"half-used rollout does not have ({', '.join(sorted(asked - had))}); resume with the objective of the "
                "checkpoint"
            )
        changed = {
            part: (then["parts"].get(part), text)
            for part, text in now["parts"].items()
            if then["parts"].get(part, text) != text  # a checkpoint of an earlier version has fewer parts
        }
        if changed:
            pairs = "; ".join(f"{part} {old} -> {new}" for part, (old, new) in changed.items())
            return f"The checkpoint was written with another objective: {pairs}. The run continues with the new one"
        if then["numbers"] and now["numbers"] and not _close(then["numbers"], now["numbers"]):
            return (
                f"Objective {name!r} computes other numbers for the same tokens than when the checkpoint was written: the code "
                "of its bounds, its divergence or its surrogate has changed. The run continues with the new code"
            )
        return None


def _text(value: object) -> str:
    """A part of an objective as text that is the same in every process."""
    if isinstance(value, partial):
        given = [*map(_text, value.args), *(f"{k}={_text(v)}" for k, v in value.keywords.items())]
        return f"{_text(value.func)}({', '.join(given)})"
    if isinstance(value, FunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _numbers(objective: Objective) -> list[float]:
    """Values and gradients of a few tokens, inside and outside of any region; empty where they cannot be computed."""
    old = torch.linspace(-6.0, -0.05, 2 * _PLACES).view(2, _PLACES)
    new = (old + torch.linspace(-0.9, 0.9, _PLACES)).clamp(max=-1e-3).flip(1).requires_grad_()
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():  # an own part may draw numbers
            torch.manual_seed(0)
            terms = token_objective(
                objective,
                logprobs=new,
                old_logprobs=old,
                rollout_logprobs=(old + torch.linspace(1.2, -1.2, _PLACES)).clamp(max=-1e-3),
                advantages=torch.tensor([1.5, -0.5]).repeat(_PLACES // 2).expand(2, _PLACES),
                mask=torch.ones(2, _PLACES, dtype=torch.bool),
                extras=_extras(objective, new.detach(), old),
            )
            (slope,) = torch.autograd.grad(terms.value.sum(), new)
    except Exception:  # an own part may fail here for reasons that the run's batches do not have; its text is kept
        return []
    return cast("list[float]", torch.cat([terms.value.detach().flatten(), slope.flatten()]).tolist())


def _extras(objective: Objective, new: Tensor, old: Tensor) -> dict[str, Tensor]:
    """The extras of the objective: the same number for each token, and for the top K shares of what the token leaves."""
    found = {name: torch.full_like(old, 0.5) for name in objective.extras}
    if objective.top_k is not None:
        shares = -0.7 * torch.arange(1, objective.top_k + 1, dtype=old.dtype)
        for name, logprobs in (("old_topk_logprobs", old), ("topk_logprobs", new)):
            found[name] = (-logprobs.expm1()).log().unsqueeze(-1) + shares
        found["sampled_in_topk"] = torch.zeros_like(old, dtype=torch.bool)
    return found


def _close(then: list[float], now: list[float]) -> bool:
    a, b = torch.tensor(then), torch.tensor(now)
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)


def _checked(state: object) -> dict[str, Any]:
    """The state of a checkpoint, if it has the form of a `state_dict`."""
    kinds: Mapping[str, type] = {"parts": dict, "inputs": list, "numbers": list}
    given = cast("dict[str, Any]", state) if isinstance(state, dict) else {}
    if not all(isinstance(given.get(name), kind) for name, kind in kinds.items()):
        raise ValueError("the objective is not as it was saved")
    return given
