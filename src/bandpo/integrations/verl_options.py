"""The objective that verl's settings ask for, and the settings that would contradict it. Needs no verl.

The adapter (`bandpo.integrations.verl`) raises these errors in verl's workers; `bandpo doctor` reports them before training.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from bandpo.integrations._host import extras_of, refuse_denominators, refuse_ignored
from bandpo.integrations.options import RegionOptions, parse_flag, parse_options
from bandpo.objective import Objective
from bandpo.reference import ReferenceKL
from bandpo.surrogates import clip, dual_clip
from bandpo.zoo import get_objective

DEFAULT_OBJECTIVE = "bandpo-kl"

REGION = tuple(f.name for f in dataclasses.fields(RegionOptions))
OPTIONS = ("objective", *REGION, "bypass_mode", "metrics")
"""The options that bandpo adds to `actor_rollout_ref.actor.policy_loss`."""

DUAL_CLIP = 3.0
"""verl's default of `clip_ratio_c`."""

ACTOR_DEFAULTS: Mapping[str, Any] = {
    "clip_ratio": 0.2,
    "clip_ratio_low": 0.2,
    "clip_ratio_high": 0.2,
    "tau_pos": 1.0,
    "tau_neg": 1.05,
}
"""Options in `actor` of verl's own losses, with verl's defaults. An objective of bandpo would ignore them."""

POLICY_LOSS_DEFAULTS: Mapping[str, Any] = {
    "clip_cov_ratio": 0.0002,
    "clip_cov_lb": 1.0,
    "clip_cov_ub": 5.0,
    "kl_cov_ratio": 0.0002,
    "ppo_kl_coef": 0.1,
    "dro_beta": None,
}
"""Options in `actor.policy_loss` of verl's own losses, with verl's defaults. An objective of bandpo would ignore them."""


KL_DEFAULTS: Mapping[str, Any] = {"use_kl_loss": False, "kl_loss_coef": 0.001, "kl_loss_type": "low_var_kl"}
"""Options in `actor` of verl's KL loss, with verl's defaults. verl adds this loss to that of any objective."""

KL_OF: Mapping[str, ReferenceKL] = {
    "low_var_kl": "k3",
    "k3": "k3",
    "low_var_kl+": "k3-unbiased",
    "k3+": "k3-unbiased",
    "k2": "k2",
    "mse": "k2",
    "k1": "k1",
    "kl": "k1",
}
"""The KL term of each `kl_loss_type` that has one. verl clamps k3 at 10, where its plain form loses its gradient; none of its
types has an importance ratio."""


def name_in(loss_mode: str) -> str | None:
    """The objective that `bandpo:NAME` names, None for `bandpo`.

    Args:
        loss_mode: verl's `policy_loss.loss_mode`.

    Raises:
        ValueError: If it is a loss of verl.
    """
    mode, colon, name = loss_mode.partition(":")
    if mode != "bandpo" or bool(colon) != bool(name):
        raise ValueError(
            f"policy_loss: loss_mode={loss_mode!r} would train without bandpo, whose options are set beside it; "
            "set actor_rollout_ref.actor.policy_loss.loss_mode=bandpo (or bandpo:NAME)"
        )
    return name or None


def objective_of(
    name: str | None,
    options: Mapping[str, Any],
    theirs: Mapping[str, Any],
    clip_ratio_c: float | None,
    kl_loss: Mapping[str, Any] = KL_DEFAULTS,
) -> Objective:
    """The objective that verl trains with.

    Args:
        name: The objective that `loss_mode` names, None if it names none.
        options: Values of `OPTIONS`; empty without bandpo's configuration class.
        theirs: verl's options of its own losses, from `actor` and `actor.policy_loss`.
        clip_ratio_c: verl's largest ratio of a token with a negative advantage (dual clip), None for no such limit.
        kl_loss: verl's options of its KL loss, by the names of `KL_DEFAULTS`.

    Raises:
        ValueError: If an option would be ignored, two options contradict each other, or verl does not pass an input that the
            objective needs.
    """
    named = options.get("objective", DEFAULT_OBJECTIVE)
    if name is not None and named not in (name, DEFAULT_OBJECTIVE):
        raise ValueError(f"policy_loss: loss_mode=bandpo:{name} and objective={named}; set one of them")
    refuse_ignored("verl", theirs, {**ACTOR_DEFAULTS, **POLICY_LOSS_DEFAULTS})
    objective = with_region(name or named, options)
    _check_kl(objective, kl_loss)
    if objective.surrogate is not clip:
        refuse_ignored(
            "verl",
            {"clip_ratio_c": clip_ratio_c},
            {"clip_ratio_c": DUAL_CLIP} if clip_ratio_c is not None else {},
        )
        return objective
    if clip_ratio_c is None:
        return objective
    if not clip_ratio_c > 1:
        raise ValueError(
            f"verl: clip_ratio_c={clip_ratio_c!r} must be greater than 1, it is the largest ratio of a token with a negative "
            "advantage (dual clip)"
        )
    return dataclasses.replace(objective, surrogate=partial(dual_clip, c=clip_ratio_c))


def with_region(name: str, options: Mapping[str, Any]) -> Objective:
    """The named objective with the region of the options, if verl passes what it needs.

    Args:
        name: A name of `bandpo objectives`, or "package.module:NAME".
        options: Values of `OPTIONS`, by name.

    Raises:
        ValueError: If the objective would ignore an option, needs an input that verl does not pass to a policy loss, or takes
            its ratio against another policy than verl gives in this mode.
    """
    objective = get_objective(name)
    missing = missing_inputs(objective)
    if missing:
        raise ValueError(f"objective {name!r} needs {missing}, which verl does not give to a policy loss")
    refuse_denominators("verl", objective)
    bypass = options.get("bypass_mode")
    _check_anchor(
        objective, name, parse_flag("policy_loss: bypass_mode", bypass) if isinstance(bypass, str) else bypass
    )
    region = {option: options[option] for option in REGION if option in options}
    return RegionOptions(**parse_options(region)).apply(objective, name)


def missing_inputs(objective: Objective) -> str:
    """The inputs of an objective that verl does not pass to a policy loss, "" if there are none.

    Args:
        objective: The objective to check.
    """
    if objective.extras:
        return extras_of(objective)
    if objective.correction is not None:
        return "rollout log-probs beside the old ones (for the correction use algorithm.rollout_correction.rollout_is)"
    known = "policy/rollout" if objective.anchor == "rollout" else "policy/old"
    for rule in objective.filters:
        if rule.policies != known:
            return (
                f"both policies of a filter with policies={rule.policies!r} (set {known!r}, or filter by the sampler with "
                "algorithm.rollout_correction.rollout_rs)"
            )
    return ""


def _check_kl(objective: Objective, kl_loss: Mapping[str, Any]) -> None:
    """An objective with a KL to the reference needs verl's KL loss, with the same coefficient and gradient."""
    if not objective.kl_coef:
        return
    names = [name for name, kl in KL_OF.items() if kl == objective.kl]
    has = f"objective {objective.name!r} has a KL to the reference (kl_coef={objective.kl_coef:g}, kl={objective.kl!r})"
    if not names:
        raise ValueError(
            f"{has}, which no kl_loss_type of verl computes: make an Objective with kl='k3-unbiased' (verl's low_var_kl+, the "
            "same on-policy), or with kl_coef=0 and set verl's KL loss yourself"
        )
    if kl_loss["use_kl_loss"] and kl_loss["kl_loss_coef"] == objective.kl_coef and kl_loss["kl_loss_type"] in names:
        return
    found = ", ".join(f"{name}={value}" for name, value in kl_loss.items())
    raise ValueError(
        f"{has}, which verl computes, and its options are {found}: set actor_rollout_ref.actor.use_kl_loss=True, "
        f"kl_loss_coef={objective.kl_coef:g} and kl_loss_type={names[0]}, or make an Objective with kl_coef=0"
    )


def _check_anchor(objective: Objective, name: str, bypass: bool | None) -> None:
    """Refuse an objective whose ratio verl would take against another policy."""
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
