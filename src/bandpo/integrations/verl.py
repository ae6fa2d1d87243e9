"""The objectives as policy losses of verl, found by its plug-in mechanism: nothing to import, nothing to fork.

`pip install bandpo` adds an entry point to verl's group `verl.plugins` (verl >= 0.9). Every worker loads it, and it registers
`bandpo` and `bandpo:NAME` for each objective of the zoo. verl 0.7.1 and 0.8.0 have no plug-ins: there, set the environment
variable `VERL_USE_EXTERNAL_MODULES=bandpo.integrations.verl` in every process. verl prints no error when a plug-in fails to
load; `python -c "import bandpo.integrations.verl"` shows the error.

    actor_rollout_ref.actor.policy_loss.loss_mode=bandpo
    actor_rollout_ref.actor.policy_loss._target_=bandpo.integrations.verl.BandPolicyLossConfig   # for the options below
    +actor_rollout_ref.actor.policy_loss.radius=0.03
"""

import functools
import os
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

try:
    from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
    from verl.utils.tracking import Tracking
    from verl.workers.config import ActorConfig
    from verl.workers.config.actor import PolicyLossConfig
except ImportError as error:
    raise ImportError(f"bandpo.integrations.verl needs verl >= 0.7.1: pip install 'bandpo[verl]' ({error})") from error

from bandpo._deprecations import RENAMED_OBJECTIVES
from bandpo._inputs import as_mask
from bandpo.integrations._host import Evaluated, attributes, checked_detail, evaluate, over_ranks, refuse_ignored
from bandpo.integrations._host_metrics import as_floats
from bandpo.integrations.options import RegionOptions
from bandpo.integrations.verl_doctor import VARIABLE as DOCTOR
from bandpo.integrations.verl_doctor import watch
from bandpo.integrations.verl_options import (
    ACTOR_DEFAULTS,
    DEFAULT_OBJECTIVE,
    KL_DEFAULTS,
    OPTIONS,
    POLICY_LOSS_DEFAULTS,
    missing_inputs,
    name_in,
    objective_of,
    with_region,
)
from bandpo.monitoring.names import OWN_PREFIX, VERL_NAMES
from bandpo.objective import Objective
from bandpo.zoo import OBJECTIVES

_ALL_RANKS = ("fsdp", "fsdp2")
"""Strategies in which every rank computes the loss of each micro-batch. With a pipeline only the last stage does."""


@dataclass
class BandPolicyLossConfig(RegionOptions, PolicyLossConfig):
    """verl's options of a policy loss, with an `objective` and the options of its region (fields of `RegionOptions`).

    `loss_agg_mode`, `clip_ratio_c` (dual clip, for objectives that clip) and the KL loss remain options of verl's `actor`.
    With verl's default `kl_loss_type=low_var_kl` the KL loss has, on-policy, the gradient of KL(π_ref ‖ π); with `low_var_kl+`
    it has that of KL(π ‖ π_ref). An objective with a `kl_coef` requires verl's KL loss with the same coefficient and type.
    Each field has its description in `metadata["help"]`.

    Raises:
        ValueError: If an option would be ignored or has the wrong type, `loss_mode` names a loss of verl, or the objective
            needs an input that verl does not pass to a policy loss.
    """

    loss_mode: str = field(
        default="bandpo",
        metadata={
            "help": "`bandpo`, or `bandpo:NAME`, which is the same with `objective=NAME`. verl's own configuration sets "
            "`vanilla`, so this option must be set."
        },
    )
    objective: str = field(
        default=DEFAULT_OBJECTIVE,
        metadata={"help": "Named objective (see `bandpo objectives`) or 'package.module:NAME' of an Objective."},
    )
    bypass_mode: bool | None = field(
        default=None,
        metadata={
            "help": "Whether verl puts the rollout's log-probs in the place of the old ones. Set it to "
            "`${algorithm.rollout_correction.bypass_mode}`, because a worker cannot find this out. It must be true for "
            "objectives with `anchor='rollout'` and false for all others."
        },
    )

    metrics: str | None = field(
        default=None,
        metadata={
            "help": "Metrics of each micro-batch: basic, or full for those by probability and of the region as well. Default: "
            "that of the environment variable BANDPO_METRICS, else basic."
        },
    )

    def __post_init__(self) -> None:
        if self.metrics is not None:
            checked_detail(self.metrics, "policy_loss: metrics")
        self.resolve()

    def resolve(self) -> Objective:
        """The objective with the options of its region.

        Raises:
            ValueError: As for the class.
        """
        name = name_in(self.loss_mode)
        refuse_ignored("verl", attributes(self, POLICY_LOSS_DEFAULTS), POLICY_LOSS_DEFAULTS)
        return with_region(name or self.objective, {option: getattr(self, option) for option in OPTIONS})


def loss(
    name: str | None,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """A policy loss as verl calls it.

    Args:
        name: Name of the objective; None for the one in the configuration.
        old_log_prob: Log-probs `(batch, time)` of the policy before the update, or of the rollout in verl's bypass mode.
        log_prob: Log-probs `(batch, time)` of the policy in training, with gradient.
        advantages: Advantage of each token, `(batch, time)`.
        response_mask: Mask of valid tokens, `(batch, time)`.
        loss_agg_mode: verl's aggregation.
        config: verl's configuration of the actor.
        rollout_is_weights: verl's importance weights `(batch, time)` for the difference to the sampler; the objective of each
            token is multiplied by them.

    Returns:
        The loss as `agg_loss` scales it for data parallelism, and metrics: floats under `actor/band/`, and two of verl's own.

    Raises:
        ValueError: If `config` is None, an option would be ignored, or verl does not pass what the objective needs.
    """
    if config is None:
        raise ValueError(
            "config is None: the objective, its radius and verl's scaling come from the actor's configuration. verl passes it; "
            "a call of your own needs config=ActorConfig(...)"
        )
    objective = _objective(config, name)
    valid = as_mask(response_mask, "response_mask")
    found = evaluate(
        objective,
        logprobs=log_prob,
        old_logprobs=old_log_prob,
        rollout_logprobs=old_log_prob,
        advantages=advantages,
        mask=valid,
        weights=rollout_is_weights,
        detail=getattr(config.policy_loss, "metrics", None),
    )
    total = agg_loss(-found.value, response_mask, loss_agg_mode, **config.global_batch_info)
    return total, _metrics(found, valid, ranks=config.global_batch_info.get("dp_size") or 1)


def register() -> None:
    """Register `bandpo` and `bandpo:NAME` with verl; this runs when the module is imported."""
    register_policy_loss("bandpo")(partial(loss, None))
    for name, objective in OBJECTIVES.items():
        if not missing_inputs(objective):
            register_policy_loss(f"bandpo:{name}")(partial(loss, name))
    for former in RENAMED_OBJECTIVES:  # configurations that name them still train, with a warning
        register_policy_loss(f"bandpo:{former}")(partial(loss, former))


def _metrics(found: Evaluated, valid: Tensor, *, ranks: int) -> dict[str, float]:
    """Metrics of this micro-batch; verl averages them over micro-batches and ranks.

    A micro-batch without a valid token reports nothing. On several ranks, verl requires the same names from each: there such a
    micro-batch reports zeros.
    """
    log_ratio = found.log_ratio.masked_fill(~found.used, 0.0)
    report = {f"{OWN_PREFIX['verl']}{name}": value for name, value in found.metrics.items()} | {
        VERL_NAMES["clip_fraction/any"]: found.metrics["clip_fraction/any"],
        VERL_NAMES["kl/old_new_k1"]: (-log_ratio.sum() / found.used.sum()).nan_to_num(),
    }
    floats = as_floats(report | {"tokens": valid.sum()})
    return floats if floats.pop("tokens") or ranks > 1 else {}


def _objective(config: ActorConfig, name: str | None) -> Objective:
    """The objective of a configuration, which is the same in each step and therefore cached."""
    options = config.policy_loss
    own = isinstance(options, BandPolicyLossConfig)
    asked = tuple((option, getattr(options, option)) for option in OPTIONS) if own else ()
    theirs = {**attributes(options, POLICY_LOSS_DEFAULTS), **attributes(config, ACTOR_DEFAULTS)}
    kl_loss = tuple((option, getattr(config, option)) for option in KL_DEFAULTS)
    objective = _cached(name, asked, tuple(theirs.items()), config.clip_ratio_c, kl_loss)
    return over_ranks(objective) if config.strategy in _ALL_RANKS else objective


@functools.lru_cache(maxsize=64)
def _cached(
    name: str | None,
    options: tuple[tuple[str, Any], ...],
    theirs: tuple[tuple[str, Any], ...],
    clip_ratio_c: float | None,
    kl_loss: tuple[tuple[str, Any], ...],
) -> Objective:
    return objective_of(name, dict(options), dict(theirs), clip_ratio_c, dict(kl_loss))


register()
try:
    watch(Tracking, os.environ.get(DOCTOR, ""))
except ValueError as error:  # verl reports a plug-in that fails only at log level DEBUG
    print(f"bandpo: {error}", flush=True)
    raise
