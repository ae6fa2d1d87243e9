"""The regimes and the arms of `bandpo lab forks`."""

from collections.abc import Mapping

from bandpo.bounds import Band, Clip
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
