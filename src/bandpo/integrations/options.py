"""Options of a host's configuration that change an objective's region, the same in every host."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from bandpo.bounds import Band, Clip
from bandpo.bounds.regions import TopK
from bandpo.objective import Objective
from bandpo.surrogates import clip


@dataclass(frozen=True)
class Overrides:
    """What a user set; None leaves the objective's own.

    Args:
        divergence: Of a band.
        radius: δ of a ball.
        radius_upper: Of its upper side.
        max_ratio: Cap of a band; inf for none.
        relax: Widen a band to at least [0.8, 1.28].
        divergence_top_k: K of a Top-K region.
        epsilon: Width of a fixed interval below 1.
        epsilon_high: Above 1.
    """

    divergence: str | None = None
    radius: float | None = None
    radius_upper: float | None = None
    max_ratio: float | None = None
    relax: bool = False
    divergence_top_k: int | None = None
    epsilon: float | None = None
    epsilon_high: float | None = None

    def apply(self, objective: Objective, name: str) -> Objective:
        """The objective with its region changed.

        Args:
            objective: What to change.
            name: For messages, as the user wrote it.

        Raises:
            ValueError: If an option would be ignored.
        """
        bounds = objective.bounds
        given: dict[str, Any] = {k: v for k, v in dataclasses.asdict(self).items() if v is not None and v is not False}
        moved = {k: given.pop(k) for k in ("epsilon", "epsilon_high") if k in given}
        if isinstance(bounds, Clip):
            _refuse_ignored(given, name, "has fixed bounds; set epsilon and epsilon_high, or a bandpo-* objective")
            if bounds == Clip(1.0, math.inf) and objective.surrogate is not clip:
                _refuse_ignored(moved, name, "has no interval")
            low = moved.get("epsilon", bounds.low)
            bounds = Clip(low, moved.get("epsilon_high", low if bounds.low == bounds.high else bounds.high))
        elif isinstance(bounds, Band | TopK):
            _refuse_ignored(moved, name, "has no fixed bounds; set radius")
            bounds = _ball(bounds, given, name)
        else:
            _refuse_ignored(given | moved, name, "has bounds of its own; make an Objective with the bounds you want")
        return dataclasses.replace(objective, bounds=bounds)


def _ball(ball: Band | TopK, given: dict[str, Any], name: str) -> Band | TopK:
    foreign = ("max_ratio", "relax") if isinstance(ball, TopK) else ("divergence_top_k",)
    _refuse_ignored({k: given[k] for k in foreign if k in given}, name, f"has a {type(ball).__name__} region")
    changes: dict[str, Any] = {k: given[k] for k in ("divergence", "radius") if k in given}
    if "radius_upper" in given:
        lower = given.get("radius", ball.radius[0] if isinstance(ball.radius, tuple) else ball.radius)
        changes["radius"] = (lower, given["radius_upper"])
    if "max_ratio" in given:
        changes["max_ratio"] = None if math.isinf(given["max_ratio"]) else given["max_ratio"]
    if "divergence_top_k" in given:
        changes["k"] = given["divergence_top_k"]
    if "relax" in given:
        changes["relax"] = Clip(0.2, 0.28)
    return dataclasses.replace(ball, **changes)


def _refuse_ignored(given: dict[str, Any], name: str, why: str) -> None:
    if given:
        options = ", ".join(f"{k}={v}" for k, v in given.items())
        raise ValueError(f"{options} would be ignored: objective {name!r} {why}")
