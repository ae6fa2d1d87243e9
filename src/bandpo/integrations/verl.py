"""The objectives as policy losses of verl, found by its plug-in mechanism: nothing to import, nothing to fork.

`pip install bandpo` puts an entry point into verl's group `verl.plugins` (verl >= 0.9). Every worker loads it, and it registers
`bandpo` and `bandpo:NAME` for each objective of the zoo. verl 0.7.1 and 0.8.0, which know no plug-ins, take it from the
environment variable `VERL_USE_EXTERNAL_MODULES=bandpo.integrations.verl` in every process. verl does not say when a plug-in
fails to load; `python -c "import bandpo.integrations.verl"` does.

    actor_rollout_ref.actor.policy_loss.loss_mode=bandpo
    actor_rollout_ref.actor.policy_loss._target_=bandpo.integrations.verl.BandPolicyLossConfig   # for the options below
    +actor_rollout_ref.actor.policy_loss.radius=0.03
"""

import dataclasses
import functools
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

try:
    from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
    from verl.workers.config import ActorConfig
    from verl.workers.config.actor import PolicyLossConfig
except ImportError as error:
    raise ImportError(f"bandpo.integrations.verl needs verl >= 0.7.1: pip install 'bandpo[verl]' ({error})") from error

from bandpo._inputs import as_mask
from bandpo.integrations._host import OPTIONS, attributes, parse_options, refuse_ignored
from bandpo.integrations._host_metrics import as_floats, mean_proof
from bandpo.integrations.options import Overrides
from bandpo.metrics import policy_sums
from bandpo.objective import Objective
from bandpo.surrogates import clip, dual_clip
from bandpo.terms import TokenObjective, token_objective
from bandpo.zoo import OBJECTIVES, get_objective

_DUAL_CLIP = 3.0
# verl's options of its own losses, at verl's defaults. `clip_ratio_c` belongs to them for objectives that do not clip.
_ACTOR = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "tau_pos": 1.0, "tau_neg": 1.05}
_POLICY_LOSS = {
    "clip_cov_ratio": 0.0002, "clip_cov_lb": 1.0, "clip_cov_ub": 5.0, "kl_cov_ratio": 0.0002, "ppo_kl_coef": 0.1,
    "dro_beta": None,
}  # fmt: skip


@dataclass
class BandPolicyLossConfig(PolicyLossConfig):
    """verl's options of a policy loss, and the region's.

    `loss_agg_mode`, `clip_ratio_c` (dual clip, of objectives that clip) and the KL loss stay verl's, in `actor`.

    Args:
        loss_mode: `bandpo`, or `bandpo:NAME`, which is the same with `objective=NAME`. verl's own configuration has `vanilla`
            there, so it must be set.
        objective: A name of `bandpo objectives`, or "package.module:NAME" of an `Objective`.
        divergence: Of a band.
        radius: δ of a ball.
        radius_upper: Of its upper side.
        max_ratio: Cap of a band; .inf for none.
        relax: Widen a band to at least [0.8, 1.28].
        epsilon: Width of a fixed interval below 1.
        epsilon_high: Above 1.
        bypass_mode: Whether verl takes the rollout's log-probs for the old ones. Say
            `${algorithm.rollout_correction.bypass_mode}`; a worker cannot find it out. Objectives with `anchor="rollout"`
            need it true, the others false.

    Raises:
        ValueError: If an option would be ignored or is of another type, `loss_mode` names a loss of verl, or the objective
            needs what verl does not give a loss.
    """

    loss_mode: str = "bandpo"
    objective: str = "bandpo-kl"
    divergence: str | None = None
    radius: float | None = None
    radius_upper: float | None = None
    max_ratio: float | None = None
    relax: bool = False
    epsilon: float | None = None
    epsilon_high: float | None = None
    bypass_mode: bool | None = None

    def __post_init__(self) -> None:
        _resolve(self)


def loss(
    name: str | None, old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
    loss_agg_mode: str = "token-mean", config: ActorConfig | None = None, rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """A policy loss as verl calls it.

    Args:
        name: Of the objective; None takes the configuration's.
        old_log_prob: `(batch, time)`, of the policy before the update, or of the rollout in verl's bypass mode.
        log_prob: With gradient.
        advantages: Per token.
        response_mask: Of valid tokens.
        loss_agg_mode: verl's aggregation.
        config: verl's.
        rollout_is_weights: verl's weights for the sampler, multiplied in.

    Returns:
        The loss as `agg_loss` scales it for data parallelism, and metrics: floats under `actor/band/`, and verl's own two.
    """
    if config is None:
        raise ValueError(
            "config is None: the objective, its radius and verl's scaling come from the actor's configuration. verl passes it; "
            "a call of your own needs config=ActorConfig(...)"
        )
    objective = _objective(config, name)
    valid = as_mask(response_mask, "response_mask")
    terms = token_objective(
        objective, logprobs=log_prob, old_logprobs=old_log_prob, rollout_logprobs=old_log_prob, advantages=advantages,
        mask=valid,
    )  # fmt: skip
    value = terms.value
    if rollout_is_weights is not None:  # NaN or infinite: left out, as every number of a token
        finite = rollout_is_weights.isfinite()
        value = value * torch.where(finite, rollout_is_weights, 0.0)
        terms = terms._replace(nonfinite=terms.nonfinite | (valid & ~finite))
    total = agg_loss(-value, response_mask, loss_agg_mode, **config.global_batch_info)
    return total, _metrics(terms, ranks=config.global_batch_info.get("dp_size") or 1)


def register() -> None:
    """Register `bandpo` and `bandpo:NAME` with verl; done when this module is imported."""
    register_policy_loss("bandpo")(partial(loss, None))
    for name, objective in OBJECTIVES.items():
        if not _missing(objective):
            register_policy_loss(f"bandpo:{name}")(partial(loss, name))


def _metrics(terms: TokenObjective, *, ranks: int) -> dict[str, float]:
    """Metrics of this micro-batch; verl averages them over micro-batches and ranks.

    A micro-batch without a valid token reports nothing. On several ranks verl refuses that, each must report the same names:
    there it counts as 0.
    """
    sums, valid = policy_sums(terms), terms.mask
    log_ratio = terms.log_ratio.detach().expand(valid.shape)
    used = valid & ~terms.nonfinite
    report = {f"band/{name}": value for name, value in mean_proof(sums).items()} | {
        "pg_clipfrac": sums["clip_fraction/any"].value().nan_to_num(),
        "ppo_kl": (-torch.where(used, log_ratio, 0.0).sum() / used.sum()).nan_to_num(),
    }
    found = as_floats(report | {"tokens": valid.sum()}, "actor/")
    return found if found.pop("actor/tokens") or ranks > 1 else {}


def _objective(config: ActorConfig, name: str | None) -> Objective:
    """The objective of a configuration; the same one each step, so it is kept."""
    options = config.policy_loss
    own = isinstance(options, BandPolicyLossConfig)
    asked = tuple((f, getattr(options, f)) for f in _OPTIONS) if own else ()
    theirs = {**attributes(options, _POLICY_LOSS), **attributes(config, _ACTOR)}
    return _kept(name, asked, tuple(theirs.items()), config.clip_ratio_c)


@functools.lru_cache(maxsize=64)
def _kept(
    name: str | None, options: tuple[tuple[str, Any], ...], theirs: tuple[tuple[str, Any], ...], dual: float | None
) -> Objective:
    given = dict(options)
    if given and name is not None and given["objective"] not in (name, BandPolicyLossConfig.objective):
        raise ValueError(f"policy_loss: loss_mode=bandpo:{name} and objective={given['objective']}; set one of them")
    refuse_ignored("verl", dict(theirs), {**_ACTOR, **_POLICY_LOSS})
    objective = _build(name or given.get("objective", BandPolicyLossConfig.objective), given)
    if objective.surrogate is not clip:
        refuse_ignored("verl", {"clip_ratio_c": dual}, {"clip_ratio_c": _DUAL_CLIP} if dual is not None else {})
        return objective
    if dual is None:
        return objective
    if not dual > 1:
        raise ValueError(
            f"verl: clip_ratio_c={dual!r} must be greater than 1, it is the largest ratio of a bad token (dual clip)"
        )
    return dataclasses.replace(objective, surrogate=partial(dual_clip, c=dual))


def _resolve(options: BandPolicyLossConfig) -> Objective:
    mode, colon, name = options.loss_mode.partition(":")
    if mode != "bandpo" or bool(colon) != bool(name):
        raise ValueError(
            f"policy_loss: loss_mode={options.loss_mode!r} would train without bandpo, whose options are set beside it; "
            "set actor_rollout_ref.actor.policy_loss.loss_mode=bandpo (or bandpo:NAME)"
        )
    refuse_ignored("verl", attributes(options, _POLICY_LOSS), _POLICY_LOSS)
    return _build(name or options.objective, {field: getattr(options, field) for field in _OPTIONS})


def _build(name: str, given: dict[str, Any]) -> Objective:
    objective = get_objective(name)
    missing = _missing(objective)
    if missing:
        raise ValueError(f"objective {name!r} needs {missing}, which verl does not give a policy loss")
    bypass = given.get("bypass_mode")
    if isinstance(bypass, str):
        if bypass.lower() not in ("true", "false"):
            raise ValueError(f"policy_loss: bypass_mode={bypass!r} must be true or false")
        bypass = bypass.lower() == "true"
    if objective.anchor == "rollout" and bypass is not True:
        raise ValueError(
            f"objective {name!r} takes its ratio against the rollout's log-probs (anchor='rollout'), but "
            f"policy_loss.bypass_mode is {bypass}. Set algorithm.rollout_correction.bypass_mode=True, "
            "actor_rollout_ref.rollout.calculate_log_probs=True and "
            "+actor_rollout_ref.actor.policy_loss.bypass_mode='${algorithm.rollout_correction.bypass_mode}'"
        )
    if objective.anchor == "old" and bypass:
        raise ValueError(
            f"objective {name!r} takes its ratio against the policy before the update (anchor='old'), but verl's bypass "
            "mode puts the rollout's log-probs there. Set algorithm.rollout_correction.bypass_mode=False, or choose an "
            "objective with anchor='rollout'"
        )
    return Overrides(**parse_options({name: given[name] for name in OPTIONS if name in given})).apply(objective, name)


def _missing(objective: Objective) -> str:
    if objective.extras:
        return ", ".join(objective.extras)
    if objective.correction is not None:
        return "rollout log-probs beside the old ones (for the correction use algorithm.rollout_correction.rollout_is)"
    return ""


_OPTIONS = ("objective", *OPTIONS, "bypass_mode")

register()
