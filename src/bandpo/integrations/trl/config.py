"""The options of `BandGRPOTrainer`: those of TRL's `GRPOConfig` and those of the trust region."""

import copy
import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

try:
    from trl import GRPOConfig  # pyright: ignore[reportPrivateImportUsage]
except ImportError as error:
    raise ImportError(f"bandpo.integrations.trl needs TRL: pip install 'bandpo[trl]' ({error})") from error

from bandpo._inputs import check_int
from bandpo._system.bounded import parse_json
from bandpo._system.secrets import HidesSecrets
from bandpo.bounds import Band
from bandpo.integrations.options import RegionOptions
from bandpo.objective import Aggregation, Objective
from bandpo.reference import ReferenceKL, check_kl
from bandpo.schedules import Adaptive, Schedule
from bandpo.selection.pruning import Pruning
from bandpo.zoo import OBJECTIVES, get_objective

_LOSS_TYPE_OF: dict[str, str] = {
    "seq-mean-token-mean": "grpo",
    "token-mean": "dapo",
    "seq-mean-token-sum-norm": "dr_grpo",
    "seq-mean-token-sum": "luspo",
}
"""TRL's `loss_type` for each aggregation that it has."""

AGGREGATION_OF: dict[str, Aggregation] = {
    "grpo": "seq-mean-token-mean",
    "dapo": "token-mean",
    "bnpo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "luspo": "seq-mean-token-sum",
}
"""The aggregation of each `loss_type` of TRL that only says how tokens are averaged."""

SCALE_REWARDS_OF = {"std": "group", "mean": "none"}
"""TRL's `scale_rewards` for each kind of advantages that it has."""

_FOLLOWING = (
    "loss_type",
    "scale_rewards",
    "importance_sampling_level",
    "beta",
    "kl",
    "use_bias_correction_kl",
)
"""Fields that follow the objective where they are left at None."""

_OF_OTHER_LOSSES = {
    "sapo": ("sapo_temperature_pos", "sapo_temperature_neg"),
    "vespo": ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
}
"""Options that act in no loss but TRL's own of this `loss_type`, in whose place bandpo computes the objective of this name."""

_PRUNING_OPTIONS = ("prompts", "completions", "mode", "zeros", "until")
_PACKING_WINDOW = 8
_PACKING_MASK_GIB = 4.0


class _Follows(HidesSecrets):
    """What a configuration knows besides its fields: an objective that is an object, and which fields follow the objective."""

    _given: Objective | None = None
    _adopted: Mapping[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        # An own objective may hold functions that have no pickle; a file of a configuration keeps the name alone.
        return {name: value for name, value in super().__getstate__().items() if name != "_given"}


@dataclass
class BandGRPOConfig(_Follows, RegionOptions, GRPOConfig):  # pyright: ignore[reportIncompatibleVariableOverride]
    """TRL's `GRPOConfig` with an `objective` and the options of its trust region (`RegionOptions`).

    `loss_type`, `scale_rewards` and `importance_sampling_level` follow the objective unless they are set. `epsilon` and
    `epsilon_high` change the interval of an objective with fixed bounds (grpo, dapo, ...). TRL's `delta` adds a dual clip.

    `objective` may also be an `Objective` object, as the trainer's argument of this name. It decides all that it says itself:
    these fields follow it, and an option that is set to something else is refused. The field then holds its name alone.

    TRL's `beta` adds a KL to the reference, and `kl` says which one; both follow the objective unless they are set. TRL's
    `use_bias_correction_kl` is another spelling: true is `k3-ratio`, false is `k3`. See `bandpo.reference` for what each
    descends.

    Raises:
        ValueError: If an option is set that the objective would ignore, or that no loss of TRL can express.
    """

    objective: str = field(
        default="bandpo-kl",
        metadata={"help": "Named objective (see `bandpo objectives`) or 'package.module:NAME' of an Objective."},
    )
    beta: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Coefficient of the KL to the reference, 0 for none. Default: the objective's, mostly 0."},
    )
    kl: str | None = field(
        default=None,
        metadata={
            "help": "How that KL is estimated and differentiated: k1, k2 or k3, alone (the estimator is differentiated) or "
            "with -unbiased (the score function) or -ratio (also for older tokens). Default: the objective's, mostly k3-ratio."
        },
    )
    use_bias_correction_kl: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "TRL's spelling of kl: true is k3-ratio, false is k3. Default: what kl says."}
    )
    radius_schedule: str = field(
        default="constant",
        metadata={"help": "How the radius changes to radius_end over the run: constant, linear, cosine."},
    )
    radius_end: float | None = field(default=None, metadata={"help": "Radius at the end of the schedule."})
    radius_target: str | None = field(
        default=None,
        metadata={
            "help": "Adapt the radius after each rollout: "
            "outside_fraction=VALUE (or clip_fraction, the same) or divergence=VALUE, "
            "the mean over its tokens."
        },
    )
    kl_penalty_target: float | None = field(
        default=None,
        metadata={
            "help": "Adapt the β of ppo-kl after each rollout towards this mean KL(π_old ‖ π), in nats per token: β doubles "
            "above 1.5 times the target and halves below the target / 1.5 (PPO, arXiv:1707.06347, sec. 4)."
        },
    )
    dynamic_sampling: int = field(
        default=0,
        metadata={
            "help": "Rounds of sampling other prompts in place of groups whose rewards are all equal (DAPO); 0 for none."
        },
    )
    pruning: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Train on fewer samples without bias, as {prompts: 0.5, completions: 0.5}: shares of the prompts with "
            "little signal (not sampled) and of the completions with small |A| (not trained on). Also mode, zeros, until."
        },
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Score several sequences in one row without padding; no sequence attends to another one."},
    )
    packing_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens that a packed row can hold. Default: four times the padded width of the batch."},
    )
    packing_mask_gib: float = field(
        default=_PACKING_MASK_GIB,
        metadata={
            "help": "Largest attention mask of a packed forward pass in GiB; a larger one is refused. Only eager attention and "
            "windows of attention need one."
        },
    )
    packing_window: int = field(
        default=_PACKING_WINDOW, metadata={"help": "Number of sequences from which the packer chooses the next one."}
    )
    full_metrics_every: int = field(
        default=10,
        metadata={
            "help": "Optimizer steps between two that measure the full metrics (probability bins, outside_fraction, band/*); "
            "the others measure the basic ones. 1: every step, 0: none. A radius_target follows them: every step measures them."
        },
    )
    loss_type: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "TRL's normalisation: grpo, dapo, bnpo, dr_grpo or luspo. Default: the objective's."},
    )
    scale_rewards: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "TRL's advantage scaling: group, batch or none. Default: the objective's."}
    )
    importance_sampling_level: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "token or sequence. Default: the objective's."}
    )

    def __post_init__(self) -> None:
        if isinstance(cast("object", self.objective), Objective):
            self._give(cast("Objective", self.objective))
        self._follow({name: getattr(self, name) for name in _FOLLOWING})
        if self.dynamic_sampling < 0:
            raise ValueError(f"dynamic_sampling must be >= 0 rounds, got {self.dynamic_sampling}")
        check_int("full_metrics_every", self.full_metrics_every)
        if self.full_metrics_every < 0:
            raise ValueError(
                f"full_metrics_every must be >= 0 steps (1 for every step, 0 for none), got {self.full_metrics_every}"
            )
        for name in ("packing_tokens", "packing_window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
            if not self.packing and value not in (None, _PACKING_WINDOW):
                raise ValueError(f"{name}={value} would be ignored: set packing")
        if not self.packing_mask_gib > 0:
            raise ValueError(f"packing_mask_gib must be a positive number of GiB, got {self.packing_mask_gib}")
        if not self.packing and self.packing_mask_gib != _PACKING_MASK_GIB:
            raise ValueError(f"packing_mask_gib={self.packing_mask_gib} would be ignored: set packing")
        self._refuse_options_of_other_losses()
        super().__post_init__()

    def _refuse_options_of_other_losses(self) -> None:
        defaults = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
        for loss_type, names in _OF_OTHER_LOSSES.items():
            given = [f"{n}={getattr(self, n)}" for n in names if n in defaults and getattr(self, n) != defaults[n]]
            if given:
                raise ValueError(
                    f"{', '.join(given)} would be ignored: only TRL's own loss_type={loss_type!r} reads it, and bandpo "
                    "computes the objective; give the trainer an Objective whose surrogate has the constants you want: "
                    f"dataclasses.replace(OBJECTIVES[{loss_type!r}], surrogate=...)"
                )

    def following(self, objective: Objective) -> "BandGRPOConfig":
        """A copy of these options for an objective that is given as an object instead of the one they name.

        Fields of TRL that were left open follow the object, whatever the named objective has put there.

        Args:
            objective: The objective of the run.

        Raises:
            ValueError: If an option was set to something else than the objective has, or cannot act on it.
        """
        new = copy.copy(self)
        new._give(objective)
        new._follow({name: None if self._follows(name) else getattr(self, name) for name in _FOLLOWING})
        return new

    def _give(self, objective: Objective) -> None:
        """Take an objective that is an object. Files and trackers get its name, which says so."""
        self._given = objective
        same = objective.name in OBJECTIVES and OBJECTIVES[objective.name] == objective
        self.objective = objective.name if same else f"{objective.name} (an Objective object)"

    def _follows(self, name: str) -> bool:
        """Whether a field has the value that the objective put there, so that nobody has set it, also not later."""
        return name in self._adopted and getattr(self, name) == self._adopted[name]

    def _follow(self, asked: Mapping[str, Any]) -> None:
        """Fill the fields that follow the objective, and check the others, and what else depends on the objective.

        Args:
            asked: The value of each of these fields, None where it was left open.
        """
        for name, value in asked.items():
            setattr(self, name, value)
        objective = self.resolve()
        if self._given is not None:
            self._refuse_contradictions(objective)
        self._adopt(objective)
        self._adopted = {name: getattr(self, name) for name, value in asked.items() if value is None}
        self.radius_rule(objective, steps=1)
        self.penalty_rule(objective)
        self._check_pruning(objective)

    def _check_pruning(self, objective: Objective) -> None:
        pruning = self.selector()
        if pruning is None:
            return
        if pruning.completions:
            _refuse_terms_without_weights(self)
        pruning.check(objective, kl_coef=cast("float", self.beta))
        if pruning.mode == "bernoulli":
            raise ValueError(
                "pruning mode 'bernoulli': TRL splits rollouts into equal parts, which takes a fixed count"
            )
        if self.loss_type == "bnpo":
            raise ValueError(
                "pruning with loss_type='bnpo': its denominator is counted after pruning, a bias; use dapo"
            )

    @property
    def kl_term(self) -> ReferenceKL:
        """The KL term of the run, a name of `bandpo.reference`."""
        return check_kl(self.kl)

    def selector(self) -> Pruning | None:
        """The rule that chooses prompts and completions to train on; None if all are used.

        Raises:
            ValueError: If `pruning` cannot be read, or is set together with `dynamic_sampling`.
        """
        options = self.pruning
        if options is None:
            return None
        if isinstance(options, str):
            options = parse_json(options, f"pruning={self.pruning!r}", unique=True)
        if not isinstance(options, dict) or set(cast("dict[str, Any]", options)) - set(_PRUNING_OPTIONS):
            raise ValueError(f"pruning={self.pruning!r}: use a mapping with {', '.join(_PRUNING_OPTIONS)}")
        if self.dynamic_sampling:
            raise ValueError(
                f"pruning={options} and dynamic_sampling={self.dynamic_sampling} both choose samples; set one"
            )
        return Pruning(**cast("dict[str, Any]", options))

    def resolve(self) -> Objective:
        """The objective with the options of its trust region; an object, which takes no such option, as it was given.

        Raises:
            ValueError: If the objective is unknown or would ignore an option.
        """
        if self._given is not None:
            return self._given
        return self.apply(get_objective(self.objective), self.objective)

    def radius_rule(self, objective: Objective, steps: int) -> Schedule | Adaptive | None:
        """The rule that changes the radius during training; None for a constant radius.

        Args:
            objective: The objective of the run.
            steps: Optimiser steps of the run.

        Raises:
            ValueError: If the options contradict each other, or the objective has no single radius.
        """
        if self.radius_schedule == "constant" and self.radius_end is None and self.radius_target is None:
            return None
        radius = objective.radius
        if not isinstance(radius, int | float):
            raise ValueError(
                f"radius_schedule, radius_end and radius_target move one number, and objective {self.objective!r} has "
                f"{'no radius' if radius is None else f'the radius {radius}'}"
            )
        if self.radius_target is None:
            return Schedule(radius, self.radius_end, steps, self.radius_schedule)  # type: ignore[arg-type]
        if self.radius_schedule != "constant" or self.radius_end is not None:
            raise ValueError(f"radius_target={self.radius_target!r} and a radius_schedule are both set; choose one")
        if objective.projection is not None:
            raise ValueError(
                f"radius_target={self.radius_target!r} is measured by an interval or a region, and objective "
                f"{self.objective!r} projects onto its ball; use a radius_schedule"
            )
        name, _, value = self.radius_target.partition("=")
        try:
            target = float(value)
        except ValueError:
            target = math.nan
        if name not in ("outside_fraction", "clip_fraction", "divergence") or not target > 0:
            raise ValueError(f"radius_target={self.radius_target!r}: write outside_fraction=0.01 or divergence=0.001")
        if name == "divergence" and not isinstance(objective.bounds, Band):
            raise ValueError(f"radius_target={self.radius_target!r}: only a Band reports its realised divergence")
        return Adaptive(radius, target, rises=name == "divergence", factor=1.25)

    def penalty_rule(self, objective: Objective) -> Adaptive | None:
        """The rule that changes the β of a KL penalty to π_old during training; None for a constant β.

        Args:
            objective: The objective of the run.

        Raises:
            ValueError: If the target is out of range, or the objective has no such penalty.
        """
        if self.kl_penalty_target is None:
            return None
        if not 0 < self.kl_penalty_target < math.inf:
            raise ValueError(f"kl_penalty_target must be a positive number of nats, got {self.kl_penalty_target}")
        if not objective.penalty:
            what = "none" if objective.penalty is None else "β = 0, which cannot be doubled"
            raise ValueError(
                f"kl_penalty_target={self.kl_penalty_target} moves the β of a KL penalty to the policy before the update, and "
                f"objective {self.objective!r} has {what}; "
                "use objective='ppo-kl' (TRL's beta is that of a KL to the reference model)"
            )
        return Adaptive(float(objective.penalty), self.kl_penalty_target, rises=False)

    def _refuse_contradictions(self, objective: Objective) -> None:
        """Refuse options that were set to something else than the objective, an object, has."""
        found = [*_other_region(self, objective), *_other_fields(self, objective)]
        if not found:
            return
        pairs = "; ".join(f"{one.configured}, and the objective has {one.has}" for one in found)
        fixes = ", ".join(one.fix for one in found if one.fix)
        change = f"dataclasses.replace(objective, {fixes})" if fixes else "make it with the bounds you want"
        raise ValueError(
            f"the configuration and objective {objective.name!r}, which was given as an object, contradict each other: "
            f"{pairs}. Leave {', '.join(dict.fromkeys(one.option for one in found))} out of the BandGRPOConfig, so that the "
            f"objective decides; or change the objective: {change}"
        )

    def _adopt(self, objective: Objective) -> None:
        """Fill TRL's fields from the objective where the user left them, and check those that were set."""
        if self.loss_type is None:
            if objective.aggregation not in _LOSS_TYPE_OF:
                raise ValueError(
                    f"objective {self.objective!r} aggregates by {objective.aggregation!r}, which no TRL loss_type does; "
                    + (
                        f"set loss_type to one of {', '.join(AGGREGATION_OF)}"
                        if self._given is None
                        else f"give it an aggregation that TRL has: {', '.join(_LOSS_TYPE_OF)}"
                    )
                )
            self.loss_type = _LOSS_TYPE_OF[objective.aggregation]  # pyright: ignore[reportIncompatibleVariableOverride]
        if self.loss_type not in AGGREGATION_OF:
            raise ValueError(
                f"loss_type={self.loss_type!r} replaces the objective; with BandGRPOTrainer it only says how tokens are "
                f"averaged: {', '.join(AGGREGATION_OF)}"
            )
        if self.scale_rewards is None:
            if objective.advantage not in SCALE_REWARDS_OF:
                raise ValueError(
                    f"objective {self.objective!r}: TRL has no {objective.advantage!r} advantages; "
                    + (
                        f"set scale_rewards to {' or '.join(sorted(SCALE_REWARDS_OF.values()))}"
                        if self._given is None
                        else f"give it advantage={' or '.join(map(repr, SCALE_REWARDS_OF))}"
                    )
                )
            self.scale_rewards = SCALE_REWARDS_OF[objective.advantage]  # pyright: ignore[reportIncompatibleVariableOverride]
        level = _level(objective)
        if self.importance_sampling_level is None:
            self.importance_sampling_level = level  # pyright: ignore[reportIncompatibleVariableOverride]
        if self.importance_sampling_level != level:
            raise ValueError(
                f"importance_sampling_level={self.importance_sampling_level!r}, but objective {self.objective!r} takes its "
                f"ratio at {objective.ratio_level!r} level; leave it unset or choose another objective"
            )
        self._adopt_kl(objective)

    def _adopt_kl(self, objective: Objective) -> None:
        """Coefficient and kind of the KL to the reference, and TRL's flag for it."""
        if self.beta is None:
            self.beta = objective.kl_coef  # pyright: ignore[reportIncompatibleVariableOverride]
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta must be a number >= 0, the coefficient of the KL to the reference, got {self.beta}")
        flag = self.use_bias_correction_kl
        if self.kl is None:
            self.kl = objective.kl if flag is None else _kl_of(flag)
        chosen = check_kl(self.kl)
        multiplies = trl_computes_kl(chosen, objective) and chosen == "k3-ratio"
        if flag and not multiplies and chosen == "k3-ratio":
            raise ValueError(
                f"use_bias_correction_kl=True: TRL would multiply the KL of a token by the ratio that objective "
                f"{self.objective!r} does not use for it; leave it unset, kl='k3-ratio' takes the ratio of the token to the "
                "policy that it was drawn from"
            )
        if flag not in (None, multiplies):
            raise ValueError(
                f"use_bias_correction_kl={flag} and kl={self.kl!r} contradict each other; set one of them (true is "
                "kl='k3-ratio', false is kl='k3')"
            )
        self.use_bias_correction_kl = multiplies  # pyright: ignore[reportIncompatibleVariableOverride]


class _Contradiction(NamedTuple):
    """An option that is set to something else than an objective has."""

    option: str
    """Names of the options, with commas."""
    configured: str
    has: str
    fix: str = ""
    """The argument of `dataclasses.replace` that makes the objective as the option has it; "" if there is no single one."""


def _other_region(args: BandGRPOConfig, objective: Objective) -> list[_Contradiction]:
    """Options of a region that would change the objective, or that it would ignore."""
    options = {f.name: getattr(args, f.name) for f in dataclasses.fields(RegionOptions)}
    given = {name: value for name, value in options.items() if value not in (None, False)}
    try:
        changed = args.apply(objective, objective.name) != objective
    except ValueError:
        changed = True
    if not given or not changed:
        return []
    part = f"bounds={objective.bounds!r}" if objective.projection is None else f"surrogate={objective.surrogate!r}"
    configured = ", ".join(f"{name}={value}" for name, value in given.items())
    return [_Contradiction(", ".join(given), configured, re.sub(r" at 0x[0-9a-f]+", "", part))]


def _other_fields(args: BandGRPOConfig, objective: Objective) -> list[_Contradiction]:
    """Fields of TRL that are set and say something else than the objective."""
    found: list[_Contradiction] = []
    loss_type, scale, level = args.loss_type, args.scale_rewards, args.importance_sampling_level
    averages = AGGREGATION_OF.get(str(loss_type))
    if averages is not None and averages != objective.aggregation:  # _adopt refuses a name that is none of these
        configured, has = (
            f"loss_type={loss_type!r} (aggregation={averages!r})",
            f"aggregation={objective.aggregation!r}",
        )
        found.append(_Contradiction("loss_type", configured, has, f"aggregation={averages!r}"))
    scale = {True: "group", False: "none"}.get(cast("Any", scale), scale)  # as TRL reads truth values
    if scale not in (None, "batch", SCALE_REWARDS_OF.get(objective.advantage)):
        kinds = {theirs: ours for ours, theirs in SCALE_REWARDS_OF.items()}
        fix = f"advantage={kinds[scale]!r}" if scale in kinds else ""
        has = f"advantage={objective.advantage!r}"
        found.append(_Contradiction("scale_rewards", f"scale_rewards={scale!r}", has, fix))
    if level not in (None, _level(objective)):
        configured, has = f"importance_sampling_level={level!r}", f"ratio_level={objective.ratio_level!r}"
        fix = f"ratio_level={level!r}"
        found.append(_Contradiction("importance_sampling_level", configured, has, fix))
    if not objective.kl_coef:  # then the configuration may add a KL to the reference
        return found
    if args.beta not in (None, objective.kl_coef):
        configured, has = f"beta={args.beta}", f"kl_coef={objective.kl_coef:g}"
        found.append(_Contradiction("beta", configured, has, f"kl_coef={args.beta}"))
    flag = args.use_bias_correction_kl
    option, kl = ("kl", args.kl) if flag is None or args.kl is not None else ("use_bias_correction_kl", _kl_of(flag))
    if kl not in (None, objective.kl):
        configured, has = f"{option}={getattr(args, option)!r}", f"kl={objective.kl!r}"
        found.append(_Contradiction(option, configured, has, f"kl={kl!r}"))
    return found


def _level(objective: Objective) -> str:
    """TRL's `importance_sampling_level` for an objective."""
    return "sequence" if objective.ratio_level == "sequence" else "token"


def _kl_of(flag: bool) -> str:
    """The KL that TRL's `use_bias_correction_kl` spells."""
    return "k3-ratio" if flag else "k3"


def trl_computes_kl(kl: ReferenceKL, objective: Objective) -> bool:
    """Whether TRL's own loss has this KL term: the plain k3, and k3 times the ratio that TRL's objective takes.

    Args:
        kl: The KL term.
        objective: The objective of the run.
    """
    token = objective.ratio_level != "sequence" and objective.anchor == "old" and objective.correction is None
    return kl == "k3" or (kl == "k3-ratio" and token)


def _refuse_terms_without_weights(args: BandGRPOConfig) -> None:
    """Refuse other terms of the loss beside pruned completions: they have no weights, so they would be biased."""
    off = {"beta": 0.0, "entropy_coef": 0.0, "use_adaptive_entropy": False, "top_entropy_quantile": 1.0}
    what = {
        "beta": "KL term",
        "entropy_coef": "entropy bonus",
        "use_adaptive_entropy": "entropy bonus",
        "top_entropy_quantile": "quantile of the entropies",
    }
    for name, neutral in off.items():
        value = getattr(args, name, neutral)
        if value != neutral:
            raise ValueError(
                f"pruning completions with {name}={value}: TRL's {what[name]} has no weights and would be that of the kept "
                f"completions; set {name}={neutral}, or prune prompts only"
            )
