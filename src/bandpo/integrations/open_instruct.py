r"""The objectives in open-instruct, by its own training script with another loss.

    python -m bandpo.integrations.open_instruct --objective bandpo-kl --radius 0.05 -- \
        --loss_fn dapo ...  # the arguments of open_instruct/grpo_fast.py, as before

open-instruct has no hook, and its loss runs inside Ray workers. This command starts `open_instruct.grpo_fast` and makes every
worker replace `open_instruct.grpo_utils.compute_grpo_loss` (Ray's `worker_process_setup_hook`). open-instruct itself applies
the reduction (`--loss_denominator`), the KL term, and the weights for the sampler (`--use_rho_correction`). A row of its batch
contains several responses, so objectives of whole sequences are refused.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bandpo.integrations._host import attributes, evaluate, host_objective, options_of_environment, refuse_ignored
from bandpo.integrations._workers import launch, when_imported
from bandpo.objective import Objective

# open-instruct sets the log-prob of a masked token to this value; it passes no mask to the loss.
_INVALID = 1.0
_DEFAULTS = {"clip_lower": 0.2, "clip_higher": 0.272, "loss_fn": "dapo"}
_CHECK: dict[str, Any] = {"sampler": "none", "rows": "packed", "kl": "beta and kl_estimator"}


def compute_grpo_loss(
    new_logprobs: Tensor,
    ratio: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    config: Any,
    rho_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """open-instruct's function with the objective that `BANDPO_LOSS` names.

    Args:
        new_logprobs: Log-probs `(batch, time)` of the policy in training, with gradient; 1.0 where the mask is off.
        ratio: The ratio exp(new - old), `(batch, time)`.
        advantages: Advantage of each token, `(batch, time)`.
        ref_logprobs: Log-probs `(batch, time)` of the reference policy, or None.
        config: open-instruct's configuration.
        rho_weights: open-instruct's importance weights for the difference to the sampler, `(batch, time)`.

    Returns:
        For each token: the loss without the KL term, 1 if it is clipped and 0 if not, and its KL.

    Raises:
        ValueError: If an option would be ignored.
    """
    return _loss(_objective(), new_logprobs, ratio, advantages, ref_logprobs, config, rho_weights)


def patch() -> None:
    """Replace the loss in this process as soon as open-instruct is imported; every worker calls this."""
    when_imported("open_instruct.grpo_utils", _exchange)


def main() -> None:
    """Run open-instruct's `grpo_fast` with our loss in every worker."""
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
    objective: Objective,
    new_logprobs: Tensor,
    ratio: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    config: Any,
    rho_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
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
