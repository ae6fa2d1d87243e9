"""The regimes of `bandpo lab forks`, and the objectives that are trained on them: arms, intervals, grids of widths."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bandpo.bounds import Band, Bounds, Clip
from bandpo.bounds.regions import Sides
from bandpo.lab.comparison.aligned import aligned
from bandpo.lab.forks.policy import Fork
from bandpo.lab.forks.theory import neutral_edge
from bandpo.objective import Objective
from bandpo.zoo import OBJECTIVES

REGIMES: Mapping[str, Fork] = {
    "needle": Fork(rare=0.0005, common_solves=0, good_solves=8),
    "diversity": Fork(rare=0.002, common_solves=1, good_solves=4),
    "noisy": Fork(rare=0.002, common_solves=1, good_solves=4, flip=0.25),
    "race": Fork(rare=0.001, common_solves=3, good_solves=6),
    "noise": Fork(rare=0.002, common_solves=8, good_solves=8, flip=0.5),
}
"""The problems by name. In `noise` the rewards are coin flips; there the mean counts the intact near-certain tokens and good
options."""

WHAT: Mapping[str, str] = {
    "needle": "only rare options are right",
    "diversity": "each rare good option solves half of the prompts",
    "noisy": "diversity, and a quarter of the rewards is wrong",
    "race": "the common option solves 3 of 8, each good one 6 of 8",
    "noise": "rewards are coin flips",
}
"""One line for each regime."""

PEAK: Mapping[str, float] = {"needle": 1.0, "diversity": 0.5, "noisy": 0.5, "race": 0.75}
"""The mean reward of a policy that always takes one of the best options, in each regime with something to learn."""

BASELINE = "grpo"
"""The arm that the others are compared with."""

NEUTRAL = Clip(0.5, neutral_edge(0.5, 1 / 3) - 1)
"""A wide interval that the theory calls nearly neutral for rare tokens: [0.5, 1.755]."""


def _arms() -> dict[str, Objective]:
    zoo = ("grpo", "dcpo", "bandpo-kl", "bandpo-tv", "bandpo-chi2", "bandpo-kl-upper", "bandpo-tv-upper")
    zoo = (*zoo, "bandpo-chi2-upper", "bandpo-kl-lower", "dppo-tv", "dppo-kl", "cfpo", "troll", "no-clip")
    arms = {name: OBJECTIVES[name] for name in zoo}
    arms["clip-higher"] = OBJECTIVES["dapo"]
    for ball in ("tv", "chi2"):
        arms[f"bandpo-{ball}-lower"] = Objective(bounds=Sides(lower=Band(ball, 0.05), upper=Clip(0.2)))
    arms["neutral"] = Objective(bounds=NEUTRAL)
    return {name: aligned(objective, name) for name, objective in arms.items()}


ARMS: Mapping[str, Objective] = _arms()
"""The arms by name: bounds and surrogate of the zoo, one aggregation, one advantage, one anchor. `neutral` and the lower halves
of the TV and χ² balls are ours, and not in the zoo."""


class Interval(NamedTuple):
    """A fixed interval of the ratio in the study of drift.

    Args:
        lower: l.
        upper: u.
    """

    lower: float
    upper: float

    @property
    def label(self) -> str:
        """The interval as it is printed."""
        return f"[{self.lower:g}, {'∞' if math.isinf(self.upper) else f'{self.upper:g}'}]"

    def objective(self) -> Objective:
        """PPO's clip to the interval."""
        return aligned(Objective(bounds=Clip(1 - self.lower, self.upper - 1)), self.label)


DRIFT = tuple(
    Interval(*edges)
    for edges in (
        *((0.8, u) for u in (1.1, 1.15, 1.2, 1.25, 1.28, 1.5, math.inf)),
        *((0.5, u) for u in (1.5, 1.755, 2.0)),
        *((0.0, u) for u in (1.2, math.inf)),
    )
)
"""The intervals of the study of drift."""

NOISE = Fork(certain=0, good=1, rare=0.1 / 63, common_solves=8, good_solves=8, flip=0.5, even=True)
"""One fork and rewards that are coin flips: the problem of the study of drift."""

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Widths as multiples of the default, which is 0.05 for a radius and 0.2 for an epsilon."""


def families(factors: Sequence[float] = FACTORS) -> dict[str, dict[str, Bounds]]:
    """The widths of each way to set a trust region, by family and label, on grids that match.

    `radius` is the KL band and `upper` its upper half, of one radius; `eps` is PPO's clip of one epsilon; `two` has an epsilon
    for each side, all pairs of them, which contain those of `eps`.

    Args:
        factors: Multiples of the default width.
    """
    bands = {f"{0.05 * x:g}": Band("kl", 0.05 * x) for x in factors}
    clips = {f"{0.2 * low:g}, {0.2 * high:g}": Clip(0.2 * low, 0.2 * high) for low in factors for high in factors}
    return {
        "radius": {f"radius {label}": band for label, band in bands.items()},
        "upper": {f"upper radius {label}": Sides(lower=Clip(0.2), upper=band) for label, band in bands.items()},
        "eps": {f"eps {label}": clip for label, clip in clips.items() if clip.low == clip.high},
        "two": {f"eps {label}": clip for label, clip in clips.items()},
    }


def objective_of(name: str) -> Objective:
    """The objective of an arm, of an interval of the study of drift, or of a width.

    Args:
        name: A name in `ARMS`, the label of one of `DRIFT`, or a label of `families`.

    Raises:
        KeyError: If there is none of this name.
    """
    return _NAMED[name]


def _named() -> dict[str, Objective]:
    widths = {label: bounds for family in families().values() for label, bounds in family.items()}
    return {
        **ARMS,
        **{x.label: x.objective() for x in DRIFT},
        **{label: aligned(Objective(bounds=bounds), label) for label, bounds in widths.items()},
    }


_NAMED = _named()


def mixed(share: float, flip: float) -> Fork:
    """The problem of one cell of the map: rare options of equal probability, a share of which is better than the common one.

    The common option solves 4 of 8 types, each good one 7, each bad one none.

    Args:
        share: Share of the rare options that is good, more than 0 and less than 1.
        flip: Chance that a reward is exchanged.
    """
    rare = 63
    good = round(share * rare)
    return Fork(good=good, rare=0.1 / rare, common_solves=4, good_solves=7, flip=flip, even=True)
