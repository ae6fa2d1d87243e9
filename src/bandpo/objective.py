"""An objective as a composition: bounds x surrogate x aggregation, and what it expects around it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from bandpo._inputs import PROVIDED, check_component, check_tensor, inputs_of, traits_of
from bandpo._values import ByValue
from bandpo.bounds import Bounds, Radius
from bandpo.bounds.regions import common_radius, with_radius
from bandpo.groups import AdvantageKind, GroupIds, Groups, scored
from bandpo.reference import ReferenceKL, check_kl, check_kl_coef
from bandpo.surrogates import Surrogate, clip, kl_penalty
from bandpo.surrogates.corrections import Correction
from bandpo.surrogates.filters import SequenceFilter, as_filters
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
            (TOPR, QUATRO). The bounds are given the log-probs of the anchor at the same level: of each token, their mean over
            the sequence, or their sum; see `bandpo.terms.level_logprobs`.
        aggregation: How tokens become one number; see `bandpo.aggregate`.
        advantage: How rewards become advantages; see `bandpo.group_advantages`. Used by the trainers, not by `policy_loss`.
        anchor: The policy the ratio is taken against: recomputed π_old, or the sampler (rollout).
        correction: Weights for the sampler's mismatch with π_old: `bandpo.surrogates.corrections.TIS` or `IcePop`.
        kl_coef: Coefficient β >= 0 of a KL to the reference policy that belongs to the objective; 0 for none. `policy_loss` and
            the trainers add it unless they are given another coefficient.
        kl: How that KL is estimated and differentiated, a name of `bandpo.reference`.
        filter: Drops or weighs sequences by the mismatch of two policies: a filter of `bandpo.surrogates.filters`, or a tuple
            of them, of which all must keep a token.
        group_stats: Makes extras from the rewards and advantages of a group; called by `group_inputs`.
        name: For messages and tables.
        formula: One line.
        paper: Where it comes from.

    Raises:
        ValueError: If a name is unknown, `kl_coef` is no number >= 0, bounds that ask for log-probs of tokens meet a sequence
            ratio, a correction meets the rollout anchor, bounds without edges meet a surrogate that needs some, or a filter
            measures a policy that the objective has not.
        TypeError: If `bounds` or `surrogate` cannot be called with what it is given, or `filter` is no filter.

    Examples:
        >>> from bandpo import Band, Clip
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
    kl_coef: float = 0.0
    kl: ReferenceKL = "k3-ratio"
    filter: SequenceFilter | tuple[SequenceFilter, ...] | None = None
    group_stats: GroupStats | None = None
    name: str = "custom"
    formula: str = ""
    paper: str = ""
    bounds_inputs: tuple[str, ...] = field(init=False, repr=False, compare=False)
    """Names of the inputs that the bounds ask for besides the log-probs of the anchor."""
    surrogate_inputs: tuple[str, ...] = field(init=False, repr=False, compare=False)
    """Names of the inputs that the surrogate asks for besides log-ratio, advantages and bounds."""
    filters: tuple[SequenceFilter, ...] = field(init=False, repr=False, compare=False)
    """The filters as a tuple, empty where there are none."""
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
        check_kl(self.kl)
        check_kl_coef(self.kl_coef)
        check_component("bounds", self.bounds, ("old_logprobs",))
        check_component("surrogate", self.surrogate, ("log_ratio", "advantages", "bounds"))
        if "membership" in traits_of(self.bounds) and "membership" not in traits_of(self.surrogate):
            name = getattr(self.surrogate, "__name__", self.surrogate)
            raise ValueError(
                f"Objective: bounds={self.bounds!r} says which tokens are inside and has no edges, which surrogate {name} "
                "needs; use bandpo.surrogates.mask, or mark one of yours that takes a bool tensor with @traits('membership') "
                "(from bandpo.surrogates import traits)"
            )
        of_token = [name for name in inputs_of(self.bounds) if name in ("logprobs", "old_logprobs")]
        if self.ratio_level != "token" and of_token:
            raise ValueError(
                f"Objective: ratio_level={self.ratio_level!r} has one ratio for a sequence, and bounds={self.bounds!r} ask for "
                f"{' and '.join(of_token)}, those of single tokens; use Clip, Band, DCPO or a combination of these"
            )
        if self.correction is not None and self.anchor == "rollout":
            raise ValueError(
                f"Objective: correction={self.correction!r} weighs π_old against the sampler, and with anchor='rollout' the "
                "ratio does so already; use one of the two"
            )
        self._check_top_k()
        asked = inputs_of(self.bounds), inputs_of(self.surrogate)
        extras = dict.fromkeys(name for names in asked for name in names if name not in PROVIDED)
        filters = as_filters(self.filter, anchor=self.anchor, corrected=self.correction is not None)
        parts = (self.bounds, self.surrogate, self.correction, *filters)
        marks = {name for part in parts for name in traits_of(part)}
        for name, value in (
            ("bounds_inputs", asked[0]),
            ("surrogate_inputs", asked[1]),
            ("filters", filters),
            ("extras", tuple(extras)),
            ("traits", tuple(sorted(marks))),
        ):
            object.__setattr__(self, name, value)

    def __setstate__(self, state: Mapping[str, object]) -> None:
        self.__dict__.update(state)
        if "filters" not in state:  # a pickle of bandpo 0.1, as in the checkpoints of trainers
            self.__post_init__()

    @property
    def projection(self) -> Projected | None:
        """The surrogate where it projects the policy onto a ball; None for any other one."""
        return self.surrogate if isinstance(self.surrogate, Projected) else None

    @property
    def radius(self) -> Radius | tuple[Radius, Radius] | None:
        """The radius δ of its ball; None where there is none, or several of different radii."""
        return common_radius(self.bounds) if self.projection is None else self.projection.radius

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

        A region that combines several balls takes the radius for all of them, if their radii are equal (`kpop`).

        Args:
            radius: δ > 0, a number or a tensor that broadcasts to the tokens, or `(lower, upper)`.

        Raises:
            ValueError: If its trust region has no ball, or balls of different radii.
            TypeError: If a projection is given a pair.
        """
        if self.projection is not None:
            return replace(self, surrogate=replace(self.projection, radius=radius))  # pyright: ignore[reportArgumentType]
        return replace(self, bounds=with_radius(self.bounds, radius, f"objective {self.name!r}"))

    @property
    def penalty(self) -> float | Tensor | None:
        """β of PPO's KL penalty to π_old (`bandpo.surrogates.kl_penalty`), in objective per nat; None without such a term."""
        surrogate, beta = self.surrogate, 1.0
        if isinstance(surrogate, partial):
            surrogate, beta = surrogate.func, surrogate.keywords.get("beta", beta)
        return beta if surrogate is kl_penalty else None

    def with_penalty(self, beta: float | Tensor) -> "Objective":
        """The same objective with another β of its KL penalty, such as one that `bandpo.schedules.Adaptive` moves.

        Args:
            beta: β >= 0, in objective per nat: a number, or a 0-d float tensor, whose value is not looked at.

        Raises:
            ValueError: If its surrogate is not `bandpo.surrogates.kl_penalty`, or β is out of range or a tensor of another
                kind.

        Examples:
            >>> from bandpo import OBJECTIVES
            >>> OBJECTIVES["ppo-kl"].penalty, OBJECTIVES["ppo-kl"].with_penalty(0.5).penalty
            (1.0, 0.5)
        """
        if self.penalty is None:
            raise ValueError(f"objective {self.name!r} has no KL penalty to π_old; ppo-kl has one")
        if isinstance(beta, Tensor):
            if beta.dim() or not beta.is_floating_point():
                raise ValueError(
                    f"with_penalty: beta must be a number >= 0 or a 0-d float tensor, got a tensor {tuple(beta.shape)} of "
                    f"{beta.dtype}"
                )
        elif not 0 <= beta < math.inf:
            raise ValueError(f"with_penalty: beta must be a number >= 0, got {beta}")
        return replace(self, surrogate=partial(kl_penalty, beta=beta))


def _asks_for_top_k(part: object) -> bool:
    return callable(part) and "topk_logprobs" in inputs_of(part)
