"""Preference objectives as link x target x reference, and the named ones."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from bandpo._values import Registry
from bandpo.preference.links import CHI2, CHI2_KL, FORWARD_KL, JS, LOG, Link

Target = Literal["hard", "soft", "robust", "hinge", "ipo", "squared"]
Reference = Literal["fixed", "previous", "none"]
Length = Literal["sum", "mean"]


@dataclass(frozen=True)
class PairObjective:
    """The loss of a pair of completions as link x target x reference; `PREFERENCES` has the papers of the named ones.

    With scores `s = φ(log π - log π_ref)` of both completions and `h = clip(β (s₁ - s₂), ±2 R_max) - margin` (χPO,
    arXiv:2407.13399, algorithm 1):

    | target | loss | data of the pair |
    |---|---|---|
    | hard | -log σ(h) | the first was preferred |
    | soft | -q log σ(h) - (1-q) log σ(-h) | q, the probability that the first is preferred |
    | robust | [(1-ε)·(-log σ(h)) - ε·(-log σ(-h))]/(1-2ε) | the first was preferred; labels flip with probability ε |
    | hinge | max(0, 1 - h) | the first was preferred |
    | ipo | (h/β - 1/(2β))² | the first was preferred |
    | squared | (h - g)² | g, the gap of the rewards |

    Args:
        target: The loss, see the table. For "soft", q is the `confidence`, or `σ(label_scale·g)` of a reward gap g, or `1 - ε`.
        link: The link φ; see `bandpo.preference.links`.
        beta: β > 0, the regularisation (γ in arXiv:2601.08421).
        reference: The policy of `ref_*_logprobs`: "fixed" is π₀, "previous" is the policy of the last round, and "none" means
            no reference. The trainer reads this; the loss does not compute it.
        r_max: Bound on |reward|: h is clipped to ±2 r_max, and a pair beyond has no gradient.
        length: "mean" divides each log-ratio by the length of the completion, as in SimPO, and in TRL for IPO; "sum" does not.
        margin: Number that is subtracted from h; γ in SimPO.
        label_smoothing: ε in [0, ½), of cDPO for "soft" and of robust DPO for "robust".
        label_scale: Scale of the reward gap: inside σ for "soft", a factor for "squared".
        calibration: γ_c >= 0: with reference "previous" the reward is corrected by -γ_c log(π_k/π₀), so that the policy
            tends to π₀ exp(r/γ_c) instead of collapsing (RDRC, arXiv:2601.08421).
        name: Name in messages and tables.
        formula: Formula in one line.
        paper: Source of the objective.

    Raises:
        TypeError: If `link` is not a `Link`, or a number has another type.
        ValueError: If a value is out of range, or a link is used in a loss in which `Z(x)` would not cancel.

    Examples:
        >>> PairObjective("hard", CHI2_KL, beta=0.1).link.name
        'chi2-kl'
    """

    target: Target = "hard"
    link: Link = LOG
    beta: float = 0.1
    reference: Reference = "fixed"
    r_max: float | None = None
    length: Length = "sum"
    margin: float = 0.0
    label_smoothing: float = 0.0
    label_scale: float = 1.0
    calibration: float = 0.0
    name: str = "custom"
    formula: str = ""
    paper: str = ""

    def __post_init__(self) -> None:
        for name, kind in (("target", Target), ("reference", Reference), ("length", Length)):
            if getattr(self, name) not in get_args(kind):
                allowed = ", ".join(get_args(kind))
                raise ValueError(f"PairObjective: {name} is {getattr(self, name)!r}; choose one of {allowed}")
        if not isinstance(self.link, Link):
            raise TypeError(f"PairObjective: link must be a Link (see bandpo.preference.as_link), got {self.link!r}")
        for name in ("beta", "label_scale", "r_max", "margin", "label_smoothing", "calibration"):
            value = getattr(self, name)
            if (isinstance(value, bool) or not isinstance(value, int | float)) and (name, value) != ("r_max", None):
                raise TypeError(f"PairObjective: {name} must be a number, got {value!r}")
        for name in ("beta", "label_scale"):
            if not (0 < getattr(self, name) < math.inf):
                raise ValueError(f"PairObjective: {name} must be a positive number, got {getattr(self, name)}")
        if self.r_max is not None and not (0 < self.r_max < math.inf):
            raise ValueError(f"PairObjective: r_max must be a positive number or None, got {self.r_max}")
        if not math.isfinite(self.margin):
            raise ValueError(f"PairObjective: margin must be a finite number, got {self.margin}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"PairObjective: label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.label_smoothing and self.target not in ("soft", "robust"):
            raise ValueError(f"PairObjective: label_smoothing acts on soft and robust targets, not on {self.target!r}")
        if not (0 <= self.calibration < math.inf):
            raise ValueError(f"PairObjective: calibration must be a number >= 0, got {self.calibration}")
        if self.calibration and (self.reference != "previous" or not self.needs_gap):
            raise ValueError(
                "PairObjective: calibration corrects reward gaps for a moving reference; it needs reference='previous' and a "
                f"soft or squared target, got reference={self.reference!r} and target={self.target!r}"
            )
        if self.link is not LOG and (self.length == "mean" or self.reference == "none"):
            raise ValueError(
                f"PairObjective: the link {self.link.name!r} is only valid where Z(x) cancels: in a difference of sums of "
                f"log-ratios to a reference, got length={self.length!r} and reference={self.reference!r}; use link LOG"
            )

    @property
    def needs_gap(self) -> bool:
        """Whether a pair may carry a reward gap."""
        return self.target in ("soft", "squared")

    def replace(self, **changes: object) -> "PairObjective":
        """A copy with some fields changed; the changed objective is checked.

        Args:
            changes: New values by field name.
        """
        return replace(self, **changes)  # type: ignore[arg-type]


def _named(*objectives: PairObjective) -> Mapping[str, PairObjective]:
    return Registry(__name__, "PREFERENCES", {o.name: o for o in objectives})


_DPO, _CHIPO, _ONLINE = "DPO, arXiv:2305.18290", "χPO, arXiv:2407.13399", "arXiv:2601.08421"

PREFERENCES: Mapping[str, PairObjective] = _named(
    PairObjective(name="dpo", formula="-log σ(β(Δ₁ - Δ₂))", paper=_DPO),
    PairObjective(
        name="chipo", link=CHI2_KL, formula="-log σ(β(φ₁ - φ₂)), φ = e^Δ + Δ", paper=f"{_CHIPO}, algorithm 1"
    ),
    PairObjective(
        name="chi2-dpo", link=CHI2, formula="-log σ(β(φ₁ - φ₂)), φ = e^Δ - 1", paper="f-DPO, arXiv:2309.16240"
    ),
    PairObjective(
        name="js-dpo", link=JS, formula="-log σ(β(φ₁ - φ₂)), φ = log(2/(1 + e^-Δ))", paper="f-DPO, arXiv:2309.16240"
    ),
    PairObjective(
        name="forward-kl-dpo",
        link=FORWARD_KL,
        formula="-log σ(β(φ₁ - φ₂)), φ = 1 - e^-Δ",
        paper="f-DPO, arXiv:2309.16240",
    ),
    PairObjective(
        name="cdpo",
        target="soft",
        label_smoothing=0.1,
        formula="-(1-ε) log σ(h) - ε log σ(-h)",
        paper="conservative DPO (E. Mitchell's note, 2023)",
    ),
    PairObjective(
        name="robust-dpo",
        target="robust",
        label_smoothing=0.1,
        formula="[-(1-ε) log σ(h) + ε log σ(-h)]/(1-2ε)",
        paper="robust DPO, arXiv:2403.00409",
    ),
    PairObjective(name="slic", target="hinge", formula="max(0, 1 - h)", paper="SLiC-HF, arXiv:2305.10425"),
    PairObjective(
        name="ipo",
        target="ipo",
        length="mean",
        formula="(Δ₁/|y₁| - Δ₂/|y₂| - 1/(2β))²",
        paper="IPO, arXiv:2310.12036, by mean log-ratios as in TRL",
    ),
    PairObjective(
        name="simpo",
        reference="none",
        length="mean",
        beta=2.0,
        margin=0.5,
        formula="-log σ(β(log π(y₁)/|y₁| - log π(y₂)/|y₂|) - γ)",
        paper="SimPO, arXiv:2405.14734",
    ),
    PairObjective(
        name="rbrm",
        target="soft",
        beta=0.15,
        formula="-c log σ(h) - (1-c) log σ(-h), c the probe's confidence",
        paper="RBRM, arXiv:2503.10093",
    ),
    PairObjective(
        name="pdfr", target="soft", formula="-q log σ(h) - (1-q) log σ(-h), q = σ(scale·gap)", paper=f"PDFR, {_ONLINE}"
    ),
    PairObjective(
        name="vcb",
        target="squared",
        formula="(h - gap)²",
        paper="reward distillation, arXiv:2405.19316; VCB in arXiv:2601.08421",
    ),
    PairObjective(
        name="rebel",
        target="squared",
        reference="previous",
        beta=1.0,
        formula="(h - gap)², ratio to the last round's policy",
        paper="REBEL, arXiv:2404.16767",
    ),
    PairObjective(
        name="rdrc",
        target="squared",
        reference="previous",
        beta=1.0,
        calibration=0.1,
        formula="(h - gap + γ_c[u₁ - u₂])², u = log π_k/π₀, ratio to π_k",
        paper=f"RDRC, {_ONLINE}",
    ),
)
"""The named preference objectives, read-only."""


def get_pair_objective(objective: PairObjective | str) -> PairObjective:
    """The objective of that name in `PREFERENCES`, or the objective itself.

    Args:
        objective: An objective or its name.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If the argument is neither an objective nor a name.

    Examples:
        >>> get_pair_objective("chipo").formula
        '-log σ(β(φ₁ - φ₂)), φ = e^Δ + Δ'
    """
    if isinstance(objective, PairObjective):
        return objective
    if not isinstance(objective, str):
        raise TypeError(f"objective must be a PairObjective or a name, got {type(objective).__name__}")
    if objective not in PREFERENCES:
        raise ValueError(f"preference objective {objective!r} is unknown; choose one of {', '.join(PREFERENCES)}")
    return PREFERENCES[objective]
