"""Weights of 16 bits that an optimiser cannot move: updates below half of their spacing are rounded away."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_SAMPLE = 4096
# Their step is about the learning rate for every weight, and they write it straight into the weights.
_STEP_IS_RATE = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_hf", "adamw_apex_fused", "adamw_bnb_8bit",
                 "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "lion_32bit", "lion_8bit", "paged_lion_32bit",
                 "paged_lion_8bit")  # fmt: skip


def moved_share(parameters: Iterable[Tensor], learning_rate: float) -> float | None:
    """The share of bfloat16 and float16 weights that a step of one learning rate changes; None where there are none.

    A step u is lost where `w + u` rounds back to w. An Adam step is about the learning rate, and the share is exact for steps
    of that size; each parameter is looked at in up to 4096 places.

    Args:
        parameters: Those in training.
        learning_rate: Size of the step.

    Examples:
        >>> moved_share([torch.ones(8, dtype=torch.bfloat16)], 1e-6)
        0.0
        >>> moved_share([torch.ones(8)], 1e-6) is None
        True
    """
    moved = seen = 0.0
    for p in parameters:
        if p.dtype not in (torch.bfloat16, torch.float16) or not p.numel():
            continue
        flat = p.detach().flatten()
        part = flat[:: max(1, flat.numel() // _SAMPLE)]
        wide = part.float()
        step = torch.where(wide > 0, -learning_rate, learning_rate)  # towards 0, where the spacing is finer
        away = (wide + step).to(p.dtype)
        moved += (away != part).float().mean().item() * p.numel()
        seen += p.numel()
    return moved / seen if seen else None


def lost_updates(parameters: Iterable[Tensor], learning_rate: float, optimizer: str) -> str | None:
    """A sentence where most updates would be rounded away, None where they are not, or where the step is not known.

    Args:
        parameters: Those in training.
        learning_rate: Of the run.
        optimizer: transformers' name of it.
    """
    if optimizer not in _STEP_IS_RATE or not learning_rate > 0:
        return None
    share = moved_share(parameters, learning_rate)
    if share is None or share >= 0.5:
        return None
    return (
        f"the weights are 16-bit numbers, and a step of learning_rate={learning_rate:g} changes {share:.1%} of them: the "
        "others are rounded back to what they were. Train float32 weights (model_init_kwargs={'dtype': 'float32'}, with "
        "bf16=True for speed), or raise the learning rate"
    )


def lost_updates_of(trainer: Any) -> str | None:
    """`lost_updates` of a trainer of transformers, before it trains; None where it was given an optimizer of its own."""
    # Sharded training in lower precision keeps float32 weights beside these.
    if trainer.optimizer is not None or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    optimizer = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    trained = (p for p in trainer.model.parameters() if p.requires_grad)
    return lost_updates(trained, trainer.args.learning_rate, optimizer)
