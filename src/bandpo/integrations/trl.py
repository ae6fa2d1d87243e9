"""bandpo in TRL: `BandGRPOTrainer` is `GRPOTrainer` with the trust region of any `Objective`, and nothing copied.

A region that is an interval for the ratio reaches TRL through the tensors it clamps with; any other surrogate adds its own
term to what TRL computes around it. Both are exact (tests/contract/test_trl.py).
"""

import dataclasses
import math
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise ImportError(f"bandpo.integrations.trl needs TRL: pip install 'bandpo[trl]' ({error})") from error

from bandpo.bounds import Band, Clip, RatioBounds
from bandpo.losses import aggregate, sequence_log_ratio
from bandpo.metrics import TRL_NAMES, policy_metrics
from bandpo.objectives import Aggregation, Objective, get_objective
from bandpo.surrogates import clip

_LOSS_TYPE_OF: dict[str, str] = {
    "seq-mean-token-mean": "grpo",
    "token-mean": "dapo",
    "seq-mean-token-sum-norm": "dr_grpo",
}
_AGGREGATION_OF: dict[str, Aggregation] = {
    "grpo": "seq-mean-token-mean",
    "dapo": "token-mean",
    "bnpo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
}
_SCALE_REWARDS_OF = {"std": "group", "mean": "none"}
_ROLLOUT_FILE = "bandpo_rollout_{rank}.pt"


@dataclass
class BandGRPOConfig(GRPOConfig):
    """`GRPOConfig` with an `objective`; its fields and defaults are TRL's except for the ones below.

    `loss_type`, `scale_rewards` and `importance_sampling_level` follow the objective unless they are set. `epsilon` and
    `epsilon_high` move the interval of an objective with fixed bounds (grpo, dapo, ...). Dual clip is TRL's `delta`, the KL to
    a reference its `beta`.

    Raises:
        ValueError: If an option is set that the objective would ignore, or that no TRL loss can express.
    """

    objective: str = field(
        default="bandpo-kl",
        metadata={"help": "Named objective (see `bandpo objectives`) or 'package.module:NAME' of an Objective."},
    )
    divergence: str | None = field(
        default=None,
        metadata={"help": "Divergence of the band: kl, reverse_kl, tv, chi2, neyman, hellinger, le_cam, js, ..."},
    )
    radius: float | None = field(
        default=None, metadata={"help": "Radius δ of the band, in the units of the divergence."}
    )
    radius_upper: float | None = field(
        default=None, metadata={"help": "Radius of the upper side, where it differs from `radius`."}
    )
    max_ratio: float | None = field(
        default=None, metadata={"help": "Cap on the band's upper bound; inf for none. The paper's runs use 10."}
    )
    relax: bool = field(
        default=False, metadata={"help": "Widen the band to at least [0.8, 1.28], the paper's ablation."}
    )
    loss_type: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "TRL's normalisation: grpo, dapo, bnpo or dr_grpo. Default: the objective's."}
    )
    scale_rewards: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "TRL's advantage scaling: group, batch or none. Default: the objective's."}
    )
    epsilon: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Width below 1 of an objective with fixed bounds. Default: the objective's."}
    )
    epsilon_high: float | None = field(
        default=None, metadata={"help": "Its width above 1. Default: the objective's, or epsilon where both are equal."}
    )
    importance_sampling_level: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "token or sequence. Default: the objective's."}
    )

    def __post_init__(self) -> None:
        self._adopt(self.resolve())
        super().__post_init__()

    def resolve(self) -> Objective:
        """The objective with the overrides of this config applied."""
        objective = get_objective(self.objective)
        bounds = objective.bounds
        given = {
            k: getattr(self, k)
            for k in ("divergence", "radius", "radius_upper", "max_ratio")
            if getattr(self, k) is not None
        }
        if self.relax:
            given["relax"] = True
        moved = {k: getattr(self, k) for k in ("epsilon", "epsilon_high") if getattr(self, k) is not None}
        if isinstance(bounds, Clip):
            _refuse_ignored(
                given, self.objective, "has fixed bounds; set epsilon and epsilon_high, or a bandpo-* objective"
            )
            low = moved.get("epsilon", bounds.low)
            bounds = Clip(low, moved.get("epsilon_high", low if bounds.low == bounds.high else bounds.high))
        elif isinstance(bounds, Band):
            _refuse_ignored(moved, self.objective, "has no fixed bounds; set radius")
            bounds = _override_band(bounds, given)
        else:
            given |= moved
            _refuse_ignored(
                given, self.objective, "has bounds of its own; pass an Objective to BandGRPOTrainer instead"
            )
        return dataclasses.replace(objective, bounds=bounds)

    def _adopt(self, objective: Objective) -> None:
        """Fill TRL's fields from the objective where the user left them, and check those that were set."""
        if self.loss_type is None:
            if objective.aggregation not in _LOSS_TYPE_OF:
                raise ValueError(
                    f"objective {self.objective!r} aggregates by {objective.aggregation!r}, which no TRL loss_type does; "
                    f"set loss_type to one of {', '.join(_AGGREGATION_OF)}"
                )
            self.loss_type = _LOSS_TYPE_OF[objective.aggregation]
        if self.loss_type not in _AGGREGATION_OF:
            raise ValueError(
                f"loss_type={self.loss_type!r} replaces the objective; with BandGRPOTrainer it only says how tokens are "
                f"averaged: {', '.join(_AGGREGATION_OF)}"
            )
        if self.scale_rewards is None:
            if objective.advantage not in _SCALE_REWARDS_OF:
                raise ValueError(
                    f"objective {self.objective!r}: TRL has no {objective.advantage!r} advantages; set scale_rewards"
                )
            self.scale_rewards = _SCALE_REWARDS_OF[objective.advantage]
        if self.importance_sampling_level is None:
            self.importance_sampling_level = objective.ratio_level
        if self.importance_sampling_level != objective.ratio_level:
            raise ValueError(
                f"importance_sampling_level={self.importance_sampling_level!r}, but objective {self.objective!r} takes its "
                f"ratio at {objective.ratio_level!r} level; leave it unset or choose another objective"
            )


class BandGRPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` with the trust region of a bandpo objective; everything else is inherited.

    Args:
        model: As in `GRPOTrainer`; so are all other arguments.
        reward_funcs: As in `GRPOTrainer`.
        args: A `BandGRPOConfig`.
        objective: An `Objective` to use instead of `args.objective`, whose bounds and surrogate may be anything.
        **kwargs: The other arguments of `GRPOTrainer`, by name; a wrong one is refused there.

    Raises:
        TypeError: If `args` is no `BandGRPOConfig`.
        ValueError: If TRL could not honour the objective together with another option.

    Examples:
        >>> BandGRPOTrainer._paper["id"]
        '2603.04918'
    """

    _tag_names = ["trl", "grpo", "bandpo"]  # noqa: RUF012 (TRL's convention)
    _name = "BandPO"
    _paper = {  # noqa: RUF012
        "title": "BandPO",
        "id": "2603.04918",
        "citation": textwrap.dedent("""\
            @article{bandpo2026,
                title  = {{BandPO}},
                year   = 2026,
                eprint = {arXiv:2603.04918},
            }"""),
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: BandGRPOConfig | None = None,
        *,
        objective: Objective | None = None,
        **kwargs: Any,
    ) -> None:
        args = BandGRPOConfig("BandPO") if args is None else args
        if not isinstance(args, BandGRPOConfig):
            raise TypeError(
                f"args: pass a BandGRPOConfig (its fields are GRPOConfig's and more), got {type(args).__name__}"
            )
        self.objective = args.resolve() if objective is None else objective
        self._goes_through_epsilon = self.objective.surrogate is clip
        self._last_logprobs: Tensor | None = None
        _refuse_unsupported(self.objective, args, given=objective is not None)
        super().__init__(model, reward_funcs, args, **kwargs)
        if args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) == 0:
            warnings.warn(
                f"The trust region of {self.objective.name!r} can never bind: with num_iterations={args.num_iterations}, "
                f"steps_per_generation={args.steps_per_generation} and gradient_accumulation_steps="
                f"{args.gradient_accumulation_steps} each rollout is used for one optimiser step, where every ratio is 1. "
                "Set num_iterations >= 2, or steps_per_generation to a multiple of gradient_accumulation_steps.",
                stacklevel=2,
            )

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        out = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._last_logprobs = out[0]
        return out

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        old = inputs.get("old_per_token_logps")
        bounds = None if old is None else self.objective.bounds(old)
        self._last_logprobs = None
        theirs = inputs
        if not self._goes_through_epsilon:
            # With advantages 0 what is left is TRL's own: KL to the reference, entropy bonus, auxiliary losses, their metrics.
            theirs = {**inputs, "advantages": torch.zeros_like(inputs["advantages"])}
        with self._as_epsilon(bounds):
            loss = super()._compute_loss(model, theirs)
        new = self._last_logprobs
        if new is None:
            raise RuntimeError(
                "GRPOTrainer._compute_loss did not call _get_per_token_logps_and_entropies: this version of TRL is not "
                "supported (pip install 'bandpo[trl]'), or a patch replaced the loss"
            )
        if old is None or bounds is None:  # TRL leaves them out where every ratio is 1
            old = new.detach()
            bounds = self.objective.bounds(old)
        if not self._goes_through_epsilon:
            loss = loss + self._policy_term(new, old, bounds, inputs)
        self._log_band(new.detach(), old, bounds, inputs)
        return loss

    @contextmanager
    def _as_epsilon(self, bounds: RatioBounds | None) -> Iterator[None]:
        """TRL clamps the ratio to `[1 - epsilon_low, 1 + epsilon_high]`; both may be tensors of one entry per token."""
        saved = self.epsilon_low, self.epsilon_high
        if isinstance(self.objective.bounds, Clip):  # one number for all tokens, and for whole sequences
            self.epsilon_low, self.epsilon_high = self.objective.bounds.low, self.objective.bounds.high
        elif bounds is None:  # every ratio is 1
            self.epsilon_low, self.epsilon_high = 1.0, math.inf
        else:
            self.epsilon_low, self.epsilon_high = 1 - bounds.lower, bounds.upper - 1
        try:
            yield
        finally:
            self.epsilon_low, self.epsilon_high = saved

    def _policy_term(self, new: Tensor, old: Tensor, bounds: RatioBounds, inputs: dict[str, Any]) -> Tensor:
        """The policy loss of a surrogate that TRL does not know, normalised as TRL's `loss_type` is."""
        mask, advantages = _mask_of(inputs), _column(inputs["advantages"])
        log_ratio = torch.where(mask != 0, new - old, 0.0)
        if self.objective.ratio_level == "sequence":
            log_ratio = sequence_log_ratio(log_ratio, mask)
        per_token = -self.objective.surrogate(log_ratio, advantages, bounds)
        if self.use_vllm and self.vllm_importance_sampling_correction:
            per_token = per_token * inputs["importance_sampling_ratio"]
        training = self.model.training
        accumulation = self.current_gradient_accumulation_steps if training else 1
        if self.loss_type == "dapo":
            # num_items_in_batch spans the generation batch over all processes; one accumulation window is its share of it
            normalizer = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            normalizer = normalizer * accumulation / self.args.steps_per_generation if training else normalizer
        elif self.loss_type == "bnpo":
            normalizer = mask.sum().clamp(min=1.0) * accumulation
        else:
            normalizer = mask.size(0) * accumulation
        return aggregate(
            per_token,
            mask,
            _AGGREGATION_OF[self.loss_type],
            normalizer=normalizer,
            max_length=self.max_completion_length if self.loss_type == "dr_grpo" else None,
        )

    @torch.no_grad()
    def _log_band(self, new: Tensor, old: Tensor, bounds: RatioBounds, inputs: dict[str, Any]) -> None:
        """Our metrics into TRL's log, averaged over processes, with one transfer to the host."""
        mask = _mask_of(inputs) != 0
        log_ratio, old = torch.where(mask, new - old, 0.0).float(), torch.where(mask, old, 0.0).float()
        if self.objective.ratio_level == "sequence":
            log_ratio = sequence_log_ratio(log_ratio, mask)
        report = policy_metrics(
            log_ratio=log_ratio, old_logprobs=old, advantages=_column(inputs["advantages"]), mask=mask, bounds=bounds,
            bounds_of=self.objective.bounds,
        )  # fmt: skip
        log = self._metrics["train" if self.model.training else "eval"]
        if not self._goes_through_epsilon:  # TRL counted clips under advantages of 0
            for name in ("clip_ratio/low_min", "clip_ratio/high_max"):
                log.pop(name, None)
        gathered = self.accelerator.gather(torch.stack(list(report.values())).unsqueeze(0))
        means, maxima = gathered.nanmean(0), gathered.amax(0)
        values = torch.where(
            torch.tensor([n.endswith("_max") for n in report], device=means.device), maxima, means
        ).tolist()
        for name, value in zip(report, values, strict=True):
            if name not in TRL_NAMES:
                log[name].append(value)
            elif not self._goes_through_epsilon and log[TRL_NAMES[name]]:
                log[TRL_NAMES[name]][-1] = value

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        # TRL alone forgets the rollout that is being reused; a resumed run would go on with another one.
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        state = {"step": self._step, "rollout": self._buffered_inputs, "metrics": dict(self._metrics["train"])}
        torch.save(state, folder / _ROLLOUT_FILE.format(rank=self.accelerator.process_index))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / _ROLLOUT_FILE.format(rank=self.accelerator.process_index)
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: the checkpoint was not written by BandGRPOTrainer with this number of processes. "
                "Start a new run from its weights instead (model=CHECKPOINT)."
            )
        state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
        self._step, self._buffered_inputs = state["step"], state["rollout"]
        self._metrics["train"].update(state["metrics"])


def _override_band(band: Band, given: dict[str, Any]) -> Band:
    """A band with the fields of a config put over it; `max_ratio=inf` is no cap."""
    changes: dict[str, Any] = {k: given[k] for k in ("divergence", "radius") if k in given}
    if "radius_upper" in given:
        lower = given.get("radius", band.radius[0] if isinstance(band.radius, tuple) else band.radius)
        changes["radius"] = (lower, given["radius_upper"])
    if "max_ratio" in given:
        changes["max_ratio"] = None if math.isinf(given["max_ratio"]) else given["max_ratio"]
    if given.get("relax"):
        changes["relax"] = Clip(0.2, 0.28)
    return dataclasses.replace(band, **changes)


def _refuse_ignored(given: dict[str, Any], objective: str, why: str) -> None:
    if given:
        options = ", ".join(f"{k}={v}" for k, v in given.items())
        raise ValueError(f"{options} would be ignored: objective {objective!r} {why}")


def _refuse_unsupported(objective: Objective, args: BandGRPOConfig, *, given: bool) -> None:
    """What TRL would silently not do is an error."""
    if not GRPOTrainer._compute_loss.__module__.startswith("trl."):
        raise ValueError(
            f"GRPOTrainer._compute_loss comes from {GRPOTrainer._compute_loss.__module__}: a patched loss (unsloth?) would "
            "bypass the trust region. Import bandpo.integrations.trl without the patch."
        )
    if objective.anchor != "old":
        raise ValueError(
            f"objective {objective.name!r} has anchor={objective.anchor!r}; BandGRPOTrainer measures against 'old'"
        )
    # An objective given as an object can no longer set TRL's fields: they must say the same.
    for name, ours, option, theirs in (
        ("ratio_level", objective.ratio_level, "importance_sampling_level", args.importance_sampling_level),
        ("aggregation", objective.aggregation, "loss_type", _AGGREGATION_OF[args.loss_type]),
    ):
        if ours != theirs and given:
            raise ValueError(
                f"the objective's {name}={ours!r} differs from {option}={getattr(args, option)!r} ({theirs}); "
                f"set {option} in the BandGRPOConfig"
            )
    if given and args.scale_rewards not in ("batch", _SCALE_REWARDS_OF.get(objective.advantage)):
        raise ValueError(
            f"the objective's advantage={objective.advantage!r} differs from scale_rewards={args.scale_rewards!r}; "
            "set scale_rewards in the BandGRPOConfig"
        )
    if objective.surrogate is not clip:
        unsupported = {
            "delta": args.delta is not None,
            "top_entropy_quantile": args.top_entropy_quantile < 1,
            "off_policy_mask_threshold": args.off_policy_mask_threshold is not None,
        }
        for name, is_set in unsupported.items():
            if is_set:
                raise ValueError(
                    f"{name}={getattr(args, name)} acts on TRL's own clipped loss, which this surrogate replaces"
                )


def _mask_of(inputs: dict[str, Any]) -> Tensor:
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def _column(advantages: Tensor) -> Tensor:
    return advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
