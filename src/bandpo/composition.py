"""An objective as a composition: bounds x surrogate x aggregation, and what it expects around it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from torch import Tensor

from bandpo._inputs import PROVIDED, inputs_of
from bandpo._values import ByValue
from bandpo.advantages import AdvantageKind
from bandpo.bounds import Band, Bounds, Clip, Radius
from bandpo.corrections import Correction
from bandpo.regions import TopK
from bandpo.surrogates import Surrogate, clip

Aggregation = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
RatioLevel = Literal["token", "sequence", "product"]
Anchor = Literal["old", "rollout"]
# Rewards and advantages of the groups, both `(groups, group_size)` -> named tensors that broadcast to that shape.
GroupStats = Callable[[Tensor, Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Objective(ByValue):
    """A policy objective as `bounds x surrogate x aggregation`, and what it expects around it.

    Args:
        bounds: Maps the anchor's log-probs to `RatioBounds` (or to a bool tensor, "inside"): `Band`, `Clip`, `DCPO`, one of
            `bandpo.regions`, or a function of yours.
        surrogate: What happens at the edge, `(log_ratio, advantages, bounds) -> per-token objective`.
        ratio_level: Ratio of the token; length-normalised of the sequence (GSPO); or the sequence's product of token ratios
            (TOPR, QUATRO). The last two take `Clip` bounds.
        aggregation: How tokens become one number; see `bandpo.aggregate`.
        advantage: How rewards become advantages; see `bandpo.group_advantages`. Used by the trainers, not by `policy_loss`.
        anchor: The policy the ratio is taken against: recomputed π_old, or the sampler (rollout).
        correction: Weights for the sampler's mismatch with π_old: `bandpo.corrections.TIS` or `IcePop`.
        group_stats: Makes extras from the rewards and advantages of a group; called by `group_inputs`.
        name: For messages and tables.
        formula: One line.
        paper: Where it comes from.

    Raises:
        ValueError: If a name is unknown, token-wise bounds meet a sequence ratio, or a correction meets the rollout anchor.
        TypeError: If `bounds` or `surrogate` cannot be called.

    Examples:
        >>> Objective(bounds=Band("js", 0.02)).aggregation
        'token-mean'
    """

    bounds: Bounds
    surrogate: Surrogate = clip
    ratio_level: RatioLevel = "token"
    aggregation: Aggregation = "token-mean"
    advantage: AdvantageKind = "std"
    anchor: Anchor = "old"
    correction: Correction | None = None
    group_stats: GroupStats | None = None
    name: str = "custom"
    formula: str = ""
    paper: str = ""
    bounds_inputs: tuple[str, ...] = field(init=False, repr=False, compare=False)
    surrogate_inputs: tuple[str, ...] = field(init=False, repr=False, compare=False)
    extras: tuple[str, ...] = field(init=False, repr=False, compare=False)
    """Names that `policy_loss` must be given in its `extras`."""

    def __post_init__(self) -> None:
        for name, kind in (
            ("ratio_level", RatioLevel),
            ("aggregation", Aggregation),
            ("advantage", AdvantageKind),
            ("anchor", Anchor),
        ):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"Objective: {name} is {getattr(self, name)!r}; choose one of {', '.join(get_args(kind))}"
                )
        for name in ("bounds", "surrogate"):
            if not callable(getattr(self, name)):
                raise TypeError(f"Objective: {name} must be callable, got {getattr(self, name)!r}")
        if self.ratio_level != "token" and not isinstance(self.bounds, Clip):
            raise ValueError(
                f"Objective: ratio_level={self.ratio_level!r} needs Clip bounds, got {self.bounds!r}: bounds of one token's "
                "probability say nothing about the ratio of a sequence"
            )
        if self.correction is not None and self.anchor == "rollout":
            raise ValueError(
                f"Objective: correction={self.correction!r} weighs π_old against the sampler, and with anchor='rollout' the "
                "ratio does so already; use one of the two"
            )
        asked = inputs_of(self.bounds), inputs_of(self.surrogate)
        extras = dict.fromkeys(name for names in asked for name in names if name not in PROVIDED)
        for name, value in (("bounds_inputs", asked[0]), ("surrogate_inputs", asked[1]), ("extras", tuple(extras))):
            object.__setattr__(self, name, value)

    def group_inputs(self, rewards: Tensor, advantages: Tensor, group_size: int) -> dict[str, Tensor]:
        """The extras that come from groups of completions, one row for each completion; empty where there are none.

        Args:
            rewards: `(prompts * group_size,)`, the groups consecutive.
            advantages: The same shape, as the objective will be given them.
            group_size: Completions per prompt.

        Raises:
            ValueError: If the two shapes differ or do not split into groups.

        Examples:
            >>> import torch
            >>> from bandpo import OBJECTIVES, group_advantages
            >>> rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
            >>> OBJECTIVES["etr-reading"].group_inputs(rewards, group_advantages(rewards, 4), 4)
            {'signal': tensor([0.7500, 0.7500, 0.7500, 0.7500])}
        """
        if rewards.dim() != 1 or rewards.shape != advantages.shape or group_size < 1 or rewards.numel() % group_size:
            raise ValueError(
                f"rewards {tuple(rewards.shape)} and advantages {tuple(advantages.shape)} must have one and the same shape "
                f"(prompts * group_size,); group_size is {group_size}"
            )
        if self.group_stats is None:
            return {}
        shape = (-1, group_size)
        stats = self.group_stats(rewards.view(shape), advantages.view(shape))
        return {name: x.expand(rewards.view(shape).shape).flatten() for name, x in stats.items()}

    def with_radius(self, radius: Radius | tuple[Radius, Radius]) -> "Objective":
        """The same objective with another radius of its ball, a 0-d tensor say that a schedule moves.

        Raises:
            ValueError: If its trust region is no ball.
        """
        if not isinstance(self.bounds, Band | TopK):
            raise ValueError(f"objective {self.name!r} has no radius: its bounds are {self.bounds!r}")
        return replace(self, bounds=replace(self.bounds, radius=radius))
