"""The options of `BandGRPOTrainer`: those of TRL's `GRPOConfig` and those of the trust region."""

import json
import math
from dataclasses import dataclass, field
from typing import Any, cast

try:
    from trl import GRPOConfig  # pyright: ignore[reportPrivateImportUsage]
except ImportError as error:
    raise ImportError(f"bandpo.integrations.trl needs TRL: pip install 'bandpo[trl]' ({error})") from error

from bandpo._inputs import check_int
from bandpo._system.secrets import HidesSecrets
from bandpo.bounds import Band
from bandpo.integrations.options import RegionOptions
from bandpo.objective import Aggregation, Objective
from bandpo.reference import ReferenceKL, check_kl
from bandpo.schedules import Adaptive, Schedule
from bandpo.selection.pruning import Pruning
from bandpo.zoo import get_objective

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

_PRUNING_OPTIONS = ("prompts", "completions", "mode", "zeros", "until")
_PACKING_WINDOW = 8
_PACKING_MASK_GIB = 4.0


@dataclass
class BandGRPOConfig(HidesSecrets, RegionOptions, GRPOConfig):  # pyright: ignore[reportIncompatibleVariableOverride]
    """TRL's `GRPOConfig` with an `objective` and the options of its trust region (`RegionOptions`).

    `loss_type`, `scale_rewards` and `importance_sampling_level` follow the objective unless they are set. `epsilon` and
    `epsilon_high` change the interval of an objective with fixed bounds (grpo, dapo, ...). TRL's `delta` adds a dual clip.

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
        objective = self.resolve()
        self._adopt(objective)
        self.radius_rule(objective, steps=1)
        self.penalty_rule(objective)
        if self.dynamic_sampling < 0:
            raise ValueError(f"dynamic_sampling must be >= 0 rounds, got {self.dynamic_sampling}")
        check_int("full_metrics_every", self.full_metrics_every)
        if self.full_metrics_every < 0:
            raise ValueError(
                f"full_metrics_every must be >= 0 steps (1 for every step, 0 for none), got {self.full_metrics_every}"
            )
        pruning = self.selector()
        if pruning is not None and pruning.completions:
            _refuse_terms_without_weights(self)
        if pruning is not None:
            pruning.check(objective, kl_coef=cast("float", self.beta))
        if pruning is not None and pruning.mode == "bernoulli":
            raise ValueError(
                "pruning mode 'bernoulli': TRL splits rollouts into equal parts, which takes a fixed count"
            )
        if pruning is not None and self.loss_type == "bnpo":
            raise ValueError(
                "pruning with loss_type='bnpo': its denominator is counted after pruning, a bias; use dapo"
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
        super().__post_init__()

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
            try:
                options = json.loads(options)
            except json.JSONDecodeError as error:
                raise ValueError(f"pruning={self.pruning!r} is not JSON: {error}") from None
        if not isinstance(options, dict) or set(cast("dict[str, Any]", options)) - set(_PRUNING_OPTIONS):
            raise ValueError(f"pruning={self.pruning!r}: use a mapping with {', '.join(_PRUNING_OPTIONS)}")
        if self.dynamic_sampling:
            raise ValueError(
                f"pruning={options} and dynamic_sampling={self.dynamic_sampling} both choose samples; set one"
            )
        return Pruning(**cast("dict[str, Any]", options))

    def resolve(self) -> Objective:
        """The objective with the options of its trust region.

        Raises:
            ValueError: If the objective is unknown or would ignore an option.
        """
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

    def _adopt(self, objective: Objective) -> None:
        """Fill TRL's fields from the objective where the user left them, and check those that were set."""
        if self.loss_type is None:
            if objective.aggregation not in _LOSS_TYPE_OF:
                raise ValueError(
                    f"objective {self.objective!r} aggregates by {objective.aggregation!r}, which no TRL loss_type does; "
                    f"set loss_type to one of {', '.join(AGGREGATION_OF)}"
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
                    f"objective {self.objective!r}: TRL has no {objective.advantage!r} advantages; set scale_rewards"
                )
            self.scale_rewards = SCALE_REWARDS_OF[objective.advantage]  # pyright: ignore[reportIncompatibleVariableOverride]
        level = "sequence" if objective.ratio_level == "sequence" else "token"
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
            self.kl = objective.kl if flag is None else "k3-ratio" if flag else "k3"
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
