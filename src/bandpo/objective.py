"""An objective as a composition: bounds x surrogate x aggregation, and what it expects around it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from bandpo._inputs import PROVIDED, check_component, check_tensor, inputs_of, traits_of
from bandpo._values import ByValue
from bandpo.bounds import Band, Bounds, Clip, Radius
from bandpo.bounds.regions import TopK
from bandpo.groups import AdvantageKind, GroupIds, Groups, scored
from bandpo.surrogates import Surrogate, clip
from bandpo.surrogates.corrections import Correction
from bandpo.surrogates.projected import Projected

Aggregation = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
RatioLevel = Literal["token", "sequence", "product"]
Anchor = Literal["old", "rollout"]
# Rewards and advantages of the groups, both `(groups, largest group)` and NaN where nothing is scored -> named tensors that
# broadcast to that shape.
GroupStats = Callable[[Tensor, Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Objective(ByValue):
    """A policy objective as `bounds x surrogate x aggregation`, and what it expects around it.

    Bounds and surrogate may ask for more than their fixed arguments: each keyword-only parameter without a default is filled
    by its name. `logprobs`, `old_logprobs`, `log_ratio`, `advantages` and `mask` are those of the batch (0 where a token is
    not used, `mask` True where it is); any other name becomes an extra, which the caller of `policy_loss` passes.

    Args:
        bounds: Maps the anchor's log-probs to `RatioBounds` (or to a bool tensor, "inside"): `Band`, `Clip`, `DCPO`, one of
            `bandpo.bounds.regions`, or a function of yours.
        surrogate: What happens at the edge, `(log_ratio, advantages, bounds) -> per-token objective`; mark one of your own
            with `bandpo.surrogates.stops` and `bandpo.traits`.
        ratio_level: Ratio of the token; length-normalised of the sequence (GSPO); or the sequence's product of token ratios
            (TOPR, QUATRO). The last two take `Clip` bounds.
        aggregation: How tokens become one number; see `bandpo.aggregate`.
        advantage: How rewards become advantages; see `bandpo.group_advantages`. Used by the trainers, not by `policy_loss`.
        anchor: The policy the ratio is taken against: recomputed π_old, or the sampler (rollout).
        correction: Weights for the sampler's mismatch with π_old: `bandpo.surrogates.corrections.TIS` or `IcePop`.
        group_stats: Makes extras from the rewards and advantages of a group; called by `group_inputs`.
        name: For messages and tables.
        formula: One line.
        paper: Where it comes from.

    Raises:
        ValueError: If a name is unknown, token-wise bounds meet a sequence ratio, a correction meets the rollout anchor, or
            bounds without edges meet a surrogate that needs some.
        TypeError: If `bounds` or `surrogate` cannot be called with what it is given.

    Examples:
        >>> Objective(bounds=Band("js", 0.02)).aggregation
        'token-mean'
        >>> def surrogate(log_ratio, advantages, bounds, *, old_logprobs, bonus):
        ...     return log_ratio.exp() * (advantages + bonus) * (old_logprobs > -5)
        >>> Objective(bounds=Clip(), surrogate=surrogate).extras
        ('bonus',)
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
    """Names of the inputs that the bounds ask for besides the log-probs of the anchor."""
    surrogate_inputs: tuple[str, ...] = field(init=False, repr=False, compare=False)
    """Names of the inputs that the surrogate asks for besides log-ratio, advantages and bounds."""
    extras: tuple[str, ...] = field(init=False, repr=False, compare=False)
    """Names that `policy_loss` must be given in its `extras`."""
    traits: tuple[str, ...] = field(init=False, repr=False, compare=False)
    """What its parts are marked with; see `bandpo.surrogates.traits`."""

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
        check_component("bounds", self.bounds, ("old_logprobs",))
        check_component("surrogate", self.surrogate, ("log_ratio", "advantages", "bounds"))
        if "membership" in traits_of(self.bounds) and "membership" not in traits_of(self.surrogate):
            name = getattr(self.surrogate, "__name__", self.surrogate)
            raise ValueError(
                f"Objective: bounds={self.bounds!r} says which tokens are inside and has no edges, which surrogate {name} "
                "needs; use bandpo.surrogates.mask, or mark one of yours that takes a bool tensor with @traits('membership') "
                "(from bandpo.surrogates import traits)"
            )
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
        self._check_top_k()
        asked = inputs_of(self.bounds), inputs_of(self.surrogate)
        extras = dict.fromkeys(name for names in asked for name in names if name not in PROVIDED)
        marks = {name for part in (self.bounds, self.surrogate, self.correction) for name in traits_of(part)}
        for name, value in (
            ("bounds_inputs", asked[0]),
            ("surrogate_inputs", asked[1]),
            ("extras", tuple(extras)),
            ("traits", tuple(sorted(marks))),
        ):
            object.__setattr__(self, name, value)

    @property
    def ball(self) -> "Band | TopK | Projected | None":
        """The part that has the radius of its trust region; None where the region is no ball."""
        parts = (part for part in (self.bounds, self.surrogate) if isinstance(part, Band | TopK | Projected))
        return next(parts, None)

    @property
    def radius(self) -> Radius | tuple[Radius, Radius] | None:
        """The radius δ of its ball; None where the region is no ball."""
        return None if self.ball is None else self.ball.radius

    @property
    def top_k(self) -> int | None:
        """How many of the sampler's tokens a trainer stores for it at each position; None where none is asked for."""
        counts = (getattr(part, "k", None) for part in (self.bounds, self.surrogate) if _asks_for_top_k(part))
        return next(counts, None)

    def _check_top_k(self) -> None:
        parts = [part for part in (self.bounds, self.surrogate) if _asks_for_top_k(part)]
        if len({getattr(part, "k", None) for part in parts}) > 1:
            raise ValueError(f"Objective: {parts[0]!r} and {parts[1]!r} ask for different numbers of tokens; use one k")
        if parts and self.ratio_level != "token":
            raise ValueError(
                f"Objective: ratio_level={self.ratio_level!r} has no distribution of one position, which {parts[0]!r} looks "
                "at; use ratio_level='token'"
            )

    def group_inputs(
        self, rewards: Tensor, advantages: Tensor, group_size: int | None = None, *, group_ids: GroupIds | None = None
    ) -> dict[str, Tensor]:
        """The extras that come from groups of completions, one row for each completion; empty where there are none.

        A completion whose reward is NaN or infinite takes no part in its group's statistics, and its extras are 0.

        Args:
            rewards: `(completions,)`, float.
            advantages: The same shape, as the objective will be given them.
            group_size: Completions per prompt, where the groups are consecutive and of one size.
            group_ids: Instead, an id for each completion; see `bandpo.group_advantages`.

        Raises:
            ValueError: If the two shapes differ or do not split into groups.
            TypeError: If one of the two is no float tensor.

        Examples:
            >>> import torch
            >>> from bandpo import OBJECTIVES, group_advantages
            >>> rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
            >>> OBJECTIVES["etr-reading"].group_inputs(rewards, group_advantages(rewards, 4), 4)
            {'signal': tensor([0.7500, 0.7500, 0.7500, 0.7500])}
        """
        check_tensor("rewards", rewards)
        check_tensor("advantages", advantages)
        if rewards.dim() != 1 or rewards.shape != advantages.shape:
            raise ValueError(
                f"rewards {tuple(rewards.shape)} and advantages {tuple(advantages.shape)} must have the same shape "
                f"(completions,); group_size is {group_size}"
            )
        groups = Groups(len(rewards), group_size, group_ids)
        if self.group_stats is None:
            return {}
        counts = scored(rewards)
        tables = [groups.table(x.masked_fill(~counts, torch.nan)) for x in (rewards, advantages)]
        stats = self.group_stats(*tables)
        return {name: groups.flat(x).masked_fill(~counts, 0) for name, x in stats.items()}

    def with_radius(self, radius: Radius | tuple[Radius, Radius]) -> "Objective":
        """The same objective with another radius of its ball, such as a 0-d tensor that a schedule moves.

        Args:
            radius: δ > 0, a number or a tensor that broadcasts to the tokens, or `(lower, upper)`.

        Raises:
            ValueError: If its trust region is no ball.
            TypeError: If a projection is given a pair.
        """
        ball = self.ball
        if ball is None:
            raise ValueError(f"objective {self.name!r} has no radius: its bounds are {self.bounds!r}")
        if isinstance(ball, Projected):
            return replace(self, surrogate=replace(ball, radius=radius))  # pyright: ignore[reportArgumentType]
        return replace(self, bounds=replace(ball, radius=radius))


def _asks_for_top_k(part: object) -> bool:
    return callable(part) and "topk_logprobs" in inputs_of(part)
