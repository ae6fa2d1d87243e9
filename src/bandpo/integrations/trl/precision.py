"""16-bit weights that an optimiser cannot change: updates below half of their spacing are rounded away."""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_SAMPLE = 4096  # weights of a parameter that are looked at
_BITS = {"bfloat16": 8, "float16": 11}  # significant bits
_STEP_IS_RATE = (  # optimisers whose step is about the learning rate for every weight, written straight into the weights
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_torch_xla",
    "adamw_hf",
    "adamw_apex_fused",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
)


class Optimised(Protocol):
    """What is used of transformers' `Trainer`."""

    args: Any
    model: nn.Module
    optimizer: Any
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool


def largest_moved(dtype: str, learning_rate: float) -> float | None:
    """The largest weight of a 16-bit dtype that a step of one learning rate can change; None for other dtypes.

    A number w of f significant bits changes only by a step above half of its spacing, which is more than `|w|·2^-(f+1)`.

    Args:
        dtype: Name of the dtype, without "torch.".
        learning_rate: Size of the step.

    Examples:
        >>> largest_moved("bfloat16", 1e-6)
        0.000512
        >>> largest_moved("float32", 1e-6) is None
        True
    """
    return learning_rate * 2.0 ** (_BITS[dtype] + 1) if dtype in _BITS else None


def moved_share(parameters: Iterable[Tensor], learning_rate: float) -> float | None:
    """The share of bfloat16 and float16 weights that a step of one learning rate changes; None if there are no such weights.

    A step u is lost if `w + u` rounds back to w. A step of Adam is about the learning rate, and the share is exact for steps of
    that size. Up to 4096 weights of each parameter are looked at.

    Args:
        parameters: Parameters in training, float tensors of any shape.
        learning_rate: Size of the step.

    Examples:
        >>> moved_share([torch.ones(8, dtype=torch.bfloat16)], 1e-6)
        0.0
        >>> moved_share([torch.ones(8)], 1e-6) is None
        True
    """
    moved = seen = 0.0
    for p in parameters:
        if str(p.dtype).removeprefix("torch.") not in _BITS or not p.numel():
            continue
        flat = p.detach().flatten()
        part = flat[:: max(1, flat.numel() // _SAMPLE)]
        wide = part.float()
        step = torch.where(wide > 0, -learning_rate, learning_rate)  # towards 0, where the spacing is smaller
        away = (wide + step).to(p.dtype)
        moved += (away != part).float().mean().item() * p.numel()
        seen += p.numel()
    return moved / seen if seen else None


def lost_updates(parameters: Iterable[Tensor], learning_rate: float, optimizer: str) -> str | None:
    """A message if most updates would be rounded away; None if they are not, or if the size of the steps is not known.

    Args:
        parameters: Parameters in training, float tensors of any shape.
        learning_rate: Learning rate of the run.
        optimizer: Name of the optimiser in transformers.
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


def lost_updates_of(trainer: Optimised) -> str | None:
    """`lost_updates` of a trainer of transformers before it trains; None if it has an optimiser already.

    Args:
        trainer: The trainer.
    """
    # Sharded training in lower precision keeps float32 weights too.
    if trainer.optimizer is not None or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    optimizer = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    trained = (p for p in trainer.model.parameters() if p.requires_grad)
    return lost_updates(trained, trainer.args.learning_rate, optimizer)
