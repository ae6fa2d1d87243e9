"""The objectives as a policy loss of SkyRL, registered before training starts.

    # train_bandpo.py, in the place of `python -m skyrl.train.entrypoints.main_base`
    from skyrl.train.entrypoints.main_base import main
    from bandpo.integrations.skyrl import register

    register("bandpo-kl", radius=0.05)
    main()

    python train_bandpo.py trainer.algorithm.policy_loss_type=bandpo ...  # and every other option as before

SkyRL copies its registry to every worker, and each worker needs bandpo installed. SkyRL scales the advantages for
`trainer.algorithm.loss_reduction` before it calls the loss, so this loss is a masked sum, like SkyRL's own losses. The
reduction is SkyRL's; the objective's own aggregation is not used.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bandpo._inputs import fill
from bandpo.integrations._host import (
    attributes,
    check_host_kl,
    evaluate,
    host_objective,
    refuse_ignored,
    weighs_sampler,
)
from bandpo.integrations._host_metrics import as_floats
from bandpo.monitoring.names import OWN_PREFIX, metrics_of
from bandpo.objective import Objective

_CLIPPED = "clip_fraction/any"
_DEFAULTS = {"eps_clip_low": 0.2, "eps_clip_high": 0.2, "clip_ratio_c": 3.0, "use_tis": False}


def register(objective: Objective | str = "bandpo-kl", *, name: str = "bandpo", **options: Any) -> None:
    """Register the objective with SkyRL as `trainer.algorithm.policy_loss_type=NAME`; call it before `main`.

    Args:
        objective: A name of `bandpo objectives`, "package.module:NAME", or an `Objective`.
        name: The name for `policy_loss_type`.
        options: Changes of the objective's region: fields of `RegionOptions`, except `divergence_top_k`.

    Raises:
        ValueError: If an option would be ignored, or the objective needs an input that SkyRL does not pass to a loss.
    """
    from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry

    chosen = host_objective("SkyRL", objective, options, sampler="beside", scaled=True, kl="")
    PolicyLossRegistry.register(name, partial(policy_loss, chosen))


def policy_loss(
    objective: Objective,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """A policy loss as SkyRL calls it, `-Σ m_t w_t s(log r_t, A_t, b_t)`, with advantages A that SkyRL has scaled.

    Args:
        objective: The objective to train on.
        log_probs: Log-probs `(batch, time)` of the policy in training, with gradient.
        old_log_probs: Log-probs `(batch, time)`, recomputed before the update.
        advantages: Advantage of each token, `(batch, time)`, scaled for the loss reduction.
        config: SkyRL's `AlgorithmConfig`; its `off_policy_correction` is applied by SkyRL's own function.
        loss_mask: Mask of valid tokens, `(batch, time)`; None if all are valid.
        rollout_logprobs: Log-probs `(batch, time)` of the sampler, or None.

    Returns:
        The sum, and metrics as floats. SkyRL averages them over micro-batches, and uses the maximum where the name ends in
        `_max`.

    Raises:
        ValueError: If SkyRL's options contradict the objective.
    """
    from skyrl.backends.skyrl_train.utils.off_policy_correction_utils import off_policy_correction_enabled
    from skyrl.backends.skyrl_train.utils.ppo_utils import apply_off_policy_correction, reduce_loss

    refuse_ignored("SkyRL", attributes(config, _DEFAULTS), _DEFAULTS)
    check_host_kl(
        "SkyRL",
        objective,
        config.kl_loss_coef if getattr(config, "use_kl_loss", False) else 0.0,
        f"trainer.algorithm.use_kl_loss=true, kl_loss_coef={objective.kl_coef:g} and kl_estimator_type",
    )
    corrected = off_policy_correction_enabled(config.off_policy_correction)
    if corrected and (objective.anchor == "rollout" or weighs_sampler(objective)):
        raise ValueError(
            f"SkyRL: off_policy_correction is on, and objective {objective.name!r} accounts for the sampler itself; use one"
        )
    mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
    found = evaluate(
        objective,
        logprobs=log_probs,
        old_logprobs=old_log_probs,
        rollout_logprobs=rollout_logprobs,
        advantages=advantages,
        mask=mask,
    )
    metrics = as_floats(found.metrics, OWN_PREFIX["SkyRL"])
    clipped = {metrics_of("SkyRL")[_CLIPPED]: metrics[f"{OWN_PREFIX['SkyRL']}{_CLIPPED}"]}
    loss = -found.value
    if corrected:
        valid = mask != 0
        sampler = None if rollout_logprobs is None else fill(rollout_logprobs, valid)
        loss, mask, more = apply_off_policy_correction(
            loss, fill(old_log_probs, valid), sampler, mask, config.off_policy_correction
        )
        metrics |= more
    return reduce_loss(loss, mask), clipped | metrics
