r"""The objectives in open-instruct, by its own training script with another loss.

    python -m bandpo.integrations.open_instruct --objective bandpo-kl --radius 0.05 -- \
        --loss_fn dapo ...  # the arguments of open_instruct/grpo_fast.py, as before

open-instruct has no hook, and its loss runs inside Ray workers. This command starts `open_instruct.grpo_fast` and makes every
worker exchange `open_instruct.grpo_utils.compute_grpo_loss` (Ray's `worker_process_setup_hook`). The reduction
(`--loss_denominator`), the KL term, and the weights for the sampler (`--use_rho_correction`) stay open-instruct's. Its rows
hold several responses side by side, so objectives of whole sequences are refused.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bandpo.integrations._host import attributes, evaluate, host_objective, options_of_environment, refuse_ignored
from bandpo.integrations._workers import launch, when_imported
from bandpo.objective import Objective

# open-instruct's own value for the log-prob of a token that is off; it hands a loss no mask.
_INVALID = 1.0
_DEFAULTS = {"clip_lower": 0.2, "clip_higher": 0.272, "loss_fn": "dapo"}
_CHECK: dict[str, Any] = {"sampler": "none", "rows": "packed"}


def compute_grpo_loss(
    new_logprobs: Tensor, ratio: Tensor, advantages: Tensor, ref_logprobs: Tensor | None, config: Any,
    rho_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """open-instruct's function with the objective that `BANDPO_LOSS` names.

    Args:
        new_logprobs: `(batch, time)`, with gradient; 1.0 where the mask is off.
        ratio: exp(new - old).
        advantages: Per token.
        ref_logprobs: Of the reference policy, or None.
        config: open-instruct's.
        rho_weights: Its weights for the sampler.

    Returns:
        Loss of each token without the KL term, whether it is clipped, and its KL.

    Raises:
        ValueError: If an option would be ignored.
    """
    return _loss(_objective(), new_logprobs, ratio, advantages, ref_logprobs, config, rho_weights)


def patch() -> None:
    """Exchange the loss in this process, when open-instruct is imported; called in every worker."""
    when_imported("open_instruct.grpo_utils", _exchange)


def main() -> None:
    """open-instruct's `grpo_fast` with our loss in every worker."""
    launch("open-instruct", "open_instruct.grpo_fast", "bandpo.integrations.open_instruct.patch", _CHECK)


def _exchange(module: ModuleType) -> None:
    objective = _objective()

    def exchanged(**given: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _loss(objective, **given)

    module.compute_grpo_loss = exchanged  # type: ignore[attr-defined]


def _objective() -> Objective:
    given = options_of_environment("open-instruct")
    return host_objective("open-instruct", given.pop("objective", "bandpo-kl"), given, **_CHECK)


def _loss(
    objective: Objective, new_logprobs: Tensor, ratio: Tensor, advantages: Tensor, ref_logprobs: Tensor | None,
    config: Any, rho_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from open_instruct.model_utils import estimate_kl

    refuse_ignored("open-instruct", attributes(config, _DEFAULTS), _DEFAULTS)
    valid = new_logprobs != _INVALID
    old = new_logprobs.detach() - ratio.detach().log()
    found = evaluate(objective, logprobs=new_logprobs, old_logprobs=old, advantages=advantages, mask=valid)
    loss = -found.value * rho_weights
    clipped = (found.clipped & (rho_weights != 0)).to(loss.dtype)
    if ref_logprobs is None:
        return loss, clipped, torch.zeros_like(loss)
    difference = (new_logprobs - ref_logprobs).clamp(-40.0, 40.0)
    return loss, clipped, estimate_kl(difference, ratio)[config.kl_estimator]


if __name__ == "__main__":
    main()
