"""Named recipes: which bounds, surrogate, ratio level, aggregation, advantage and anchor make a published objective."""

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from bandpo.advantages import AdvantageKind
from bandpo.bounds import DCPO, Band, Bounds, Clip
from bandpo.divergences import CHI2, KL, TV
from bandpo.surrogates import Surrogate, clip

Aggregation = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
RatioLevel = Literal["token", "sequence"]
Anchor = Literal["old", "rollout"]


@dataclass(frozen=True)
class Objective:
    """A policy objective as `bounds x surrogate x aggregation`, and what it expects around it.

    Args:
        bounds: Maps the anchor's log-probs to `RatioBounds`: `Band`, `Clip`, `DCPO` or a function of yours.
        surrogate: What happens at the edge, `(log_ratio, advantages, bounds) -> per-token objective`.
        ratio_level: Ratio of the token, or length-normalised of the sequence (GSPO); the latter takes `Clip` bounds.
        aggregation: How tokens become one number; see `bandpo.aggregate`.
        advantage: How rewards become advantages; see `bandpo.group_advantages`. Used by the trainers, not by `policy_loss`.
        anchor: The policy the ratio is taken against: recomputed π_old, or the sampler (rollout).
        name: For messages and tables.
        formula: One line.
        paper: Where it comes from.

    Raises:
        ValueError: If a name is unknown, or token-wise bounds meet a sequence ratio.
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
    name: str = "custom"
    formula: str = ""
    paper: str = ""

    def __post_init__(self) -> None:
        for field, kind in (
            ("ratio_level", RatioLevel),
            ("aggregation", Aggregation),
            ("advantage", AdvantageKind),
            ("anchor", Anchor),
        ):
            if getattr(self, field) not in get_args(kind):
                raise ValueError(
                    f"Objective: {field} is {getattr(self, field)!r}; choose one of {', '.join(get_args(kind))}"
                )
        for field in ("bounds", "surrogate"):
            if not callable(getattr(self, field)):
                raise TypeError(f"Objective: {field} must be callable, got {getattr(self, field)!r}")
        if self.ratio_level == "sequence" and not isinstance(self.bounds, Clip):
            raise ValueError(
                f"Objective: ratio_level='sequence' needs Clip bounds, got {self.bounds!r}: bounds of one token's "
                "probability say nothing about the mean ratio of a sequence"
            )


_BANDPO = "BandPO, arXiv:2603.04918"

OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        o.name: o
        for o in (
            Objective(
                name="grpo",
                bounds=Clip(0.2),
                aggregation="seq-mean-token-mean",
                formula="min(r·A, clip(r, 0.8, 1.2)·A), mean over tokens then sequences, A = (R - mean)/std",
                paper="GRPO, arXiv:2402.03300; PPO clip, arXiv:1707.06347",
            ),
            Objective(
                name="dr_grpo",
                bounds=Clip(0.2),
                aggregation="seq-mean-token-sum-norm",
                advantage="mean",
                formula="min(r·A, clip(r, 0.8, 1.2)·A), token sum / max length, A = R - mean",
                paper="Dr.GRPO, arXiv:2503.20783",
            ),
            Objective(
                name="dapo",
                bounds=Clip(0.2, 0.28),
                formula="min(r·A, clip(r, 0.8, 1.28)·A), mean over all tokens (Clip-Higher)",
                paper="DAPO, arXiv:2503.14476",
            ),
            Objective(
                name="dcpo",
                bounds=DCPO(0.16, 0.20),
                aggregation="seq-mean-token-mean",
                formula="clip r to ½ + ½√max(1 - 0.64/p, 0) … min(½ + ½√(1 + 0.8/p), 10)",
                paper="DCPO (its clipping; aggregation as in the BandPO paper's runs), arXiv:2509.02333",
            ),
            Objective(
                name="bandpo-kl",
                bounds=Band(KL, 0.05),
                aggregation="seq-mean-token-mean",
                formula="clip r to {r : KL(Bern(p) ‖ Bern(pr)) ≤ 0.05}, upper side at most 10",
                paper=_BANDPO,
            ),
            Objective(
                name="bandpo-tv",
                bounds=Band(TV, 0.05),
                aggregation="seq-mean-token-mean",
                formula="clip r to 1 ∓ 0.05/p within [0, 1/p], upper side at most 10",
                paper=f"{_BANDPO}; with another radius and anchor DPPO-TV's gradient, arXiv:2602.04879",
            ),
            Objective(
                name="bandpo-chi2",
                bounds=Band(CHI2, 0.05),
                aggregation="seq-mean-token-mean",
                formula="clip r to 1 ∓ √(0.05(1-p)/p) within [0, 1/p], upper side at most 10",
                paper=_BANDPO,
            ),
            Objective(
                name="no-clip",
                bounds=Clip(1.0, float("inf")),
                aggregation="seq-mean-token-mean",
                formula="r·A: no trust region, the arm every comparison needs",
                paper="importance-weighted policy gradient",
            ),
            Objective(
                name="gspo",
                bounds=Clip(3e-4, 4e-4),
                ratio_level="sequence",
                aggregation="seq-mean-token-mean",
                formula="s = exp(mean_t log r_t); min(s·A, clip(s, 1 - 3e-4, 1 + 4e-4)·A)",
                paper="GSPO, arXiv:2507.18071",
            ),
        )
    }
)
"""The named objectives, read-only. Yours is an `Objective` object, or the string "package.module:NAME" of one."""


def get_objective(objective: Objective | str) -> Objective:
    """The `Objective` behind a name in `OBJECTIVES`, a "package.module:NAME" string, or itself.

    Raises:
        ValueError: If the name is unknown; the message names the nearest one.
        TypeError: If what is found is no `Objective`.
    """
    if isinstance(objective, str) and ":" in objective:
        module, _, attribute = objective.partition(":")
        try:
            objective = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"objective {module}:{attribute} could not be imported: {error}") from error
    if isinstance(objective, Objective):
        return objective
    if not isinstance(objective, str):
        raise TypeError(f"objective: pass a name, an Objective or 'package.module:NAME', got {objective!r}")
    if objective not in OBJECTIVES:
        near = difflib.get_close_matches(objective, OBJECTIVES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"objective {objective!r} is unknown: {hint}The names are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[objective]
