"""Options that change the trust region of an objective, declared once for all hosts."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from bandpo.bounds import Band, Bounds, Clip
from bandpo.bounds.combined import Combination, change_leaves, leaves
from bandpo.bounds.regions import Sides, TopK, common_radius
from bandpo.objective import Objective
from bandpo.projection import Direction
from bandpo.surrogates import Projected, clip


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class RegionOptions:
    """Changes of an objective's trust region. An option that is None, or `relax=False`, keeps the objective's own value.

    Each field has its description in `metadata["help"]`. The configurations of TRL and verl inherit the fields, and the
    command lines and keyword arguments of the other adapters are made from them.

    Examples:
        >>> from bandpo import OBJECTIVES
        >>> RegionOptions(radius=0.1).apply(OBJECTIVES["bandpo-kl"], "bandpo-kl").bounds.radius
        0.1
    """

    divergence: str | None = _option(
        None,
        "Divergence of a band: kl, reverse_kl, tv, chi2, neyman, hellinger, le_cam, js, ... Of a projection: reverse_kl, kl.",
    )
    radius: float | None = _option(
        None, "Radius δ of a band, a dppo-topk-* region or troll's projection, in the units of its divergence."
    )
    radius_upper: float | None = _option(None, "Radius for ratios above 1, where it differs from `radius`.")
    max_ratio: float | None = _option(
        None, "Largest upper bound of a band; inf for no such limit. The paper's runs use 10."
    )
    relax: bool = _option(False, "Widen a band to at least the interval [0.8, 1.28], as in the paper's ablation.")
    divergence_top_k: int | None = _option(
        None,
        "Number of the most likely tokens before the update that a dppo-topk-* objective or troll stores (K). "
        "Default: 20, for troll 64.",
    )
    epsilon: float | None = _option(
        None, "Width of a fixed interval below 1, for objectives with fixed bounds. Default: the objective's."
    )
    epsilon_high: float | None = _option(
        None,
        "Width of a fixed interval above 1. Default: the objective's, or `epsilon` where its two widths are equal.",
    )

    def apply(self, objective: Objective, name: str) -> Objective:
        """The objective with these changes of its region.

        Args:
            objective: The objective to change.
            name: How the user spelled the objective; used in error messages.

        Raises:
            ValueError: If the objective would ignore an option.
        """
        bounds, projection = objective.bounds, objective.projection
        options = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(RegionOptions)
        }  # a subclass has more fields
        given = {k: v for k, v in options.items() if v is not None and v is not False}
        moved = {k: given.pop(k) for k in ("epsilon", "epsilon_high") if k in given}
        if projection is not None:
            _refuse_ignored(moved, name, "has no fixed bounds; set radius")
            return dataclasses.replace(objective, surrogate=_projection(projection, given, name))
        if isinstance(bounds, Clip):
            _refuse_ignored(given, name, "has fixed bounds; set epsilon and epsilon_high, or a bandpo-* objective")
            if bounds == Clip(1.0, math.inf) and objective.surrogate is not clip:
                _refuse_ignored(moved, name, "has no interval")
            bounds = _interval(bounds, moved)
        elif isinstance(bounds, Band | TopK):
            _refuse_ignored(moved, name, "has no fixed bounds; set radius")
            bounds = _ball(bounds, given, name)
        elif isinstance(bounds, Combination):
            bounds = _combination(bounds, given, moved, name)
        else:
            _refuse_ignored(given | moved, name, "has bounds of its own; make an Objective with the bounds you want")
        return dataclasses.replace(objective, bounds=bounds)


OPTIONS = tuple(f.name for f in dataclasses.fields(RegionOptions) if f.name != "divergence_top_k")
"""Names of the options that every host accepts. Only TRL's trainer stores the sampler's Top-K, so only it accepts K."""

HELP: Mapping[str, str] = {f.name: f.metadata["help"] for f in dataclasses.fields(RegionOptions)}
"""Description of each option."""


def parse_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with their types checked; options that are None are left out.

    A string that spells a number or a truth value is converted: command lines and YAML 1.1 (`1e-3`) give such strings.

    Args:
        options: Values of fields of `RegionOptions`, by name.

    Raises:
        ValueError: If a name is unknown or a value has the wrong type.

    Examples:
        >>> parse_options({"radius": "1e-3", "relax": "False", "max_ratio": None})
        {'radius': 0.001, 'relax': False}
    """
    kinds: dict[str, Any] = {f.name: (*get_args(f.type), f.type)[0] for f in dataclasses.fields(RegionOptions)}
    if unknown := set(options) - set(kinds):
        raise ValueError(
            f"unknown options {', '.join(sorted(unknown))}; choose from objective, {', '.join(sorted(OPTIONS))}"
        )
    return {name: _parsed(name, kinds[name], value) for name, value in options.items() if value is not None}


def parse_flag(name: str, value: object) -> bool:
    """A truth value, or a string that spells one.

    Args:
        name: Name of the option, for the error message.
        value: What the configuration holds.

    Raises:
        ValueError: If the value is neither.
    """
    if str(value).lower() not in ("true", "false"):
        raise ValueError(f"{name}={value!r} must be true or false")
    return str(value).lower() == "true"


def _parsed(name: str, kind: type, value: Any) -> Any:
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(f"{name}={value!r} must be a name such as 'kl'")
        return value
    if kind is bool:
        return parse_flag(name, value)
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number) or (kind is int and not number.is_integer()):
        raise ValueError(f"{name}={value!r} must be a {'whole ' if kind is int else ''}number")
    return int(number) if kind is int else number


def _interval(interval: Clip, moved: dict[str, Any]) -> Clip:
    """The fixed interval with other widths."""
    low = moved.get("epsilon", interval.low)
    return Clip(low, moved.get("epsilon_high", low if interval.low == interval.high else interval.high))


def _combination(region: Combination, given: dict[str, Any], moved: dict[str, Any], name: str) -> Bounds:
    """The region with other parameters of its balls, which must agree, and of its only fixed interval."""
    parts = leaves(region)
    if given and common_radius(region) is None:
        _refuse_ignored(
            given, name, "has no ball, or balls of different radii; make an Objective with the bounds you want"
        )
    if "divergence" in given and sum(isinstance(part, Band | TopK) for part in parts) > 1:
        _refuse_ignored({"divergence": given["divergence"]}, name, "has balls of several divergences")
    if moved and sum(isinstance(part, Clip) for part in parts) != 1:
        _refuse_ignored(moved, name, "has not exactly one fixed interval; make an Objective with the bounds you want")
    if isinstance(region, Sides):
        unused = {"epsilon": region.lower, "epsilon_high": region.upper}
        _refuse_ignored(
            {k: v for k, v in moved.items() if not any(isinstance(part, Clip) for part in leaves(unused[k]))},
            name,
            "has no fixed bound on that side",
        )

    def changed(part: Bounds) -> Bounds:
        if isinstance(part, Clip):
            return _interval(part, moved)
        return _ball(part, given, name) if isinstance(part, Band | TopK) else part

    return change_leaves(region, changed)


def _ball(ball: Band | TopK, given: dict[str, Any], name: str) -> Band | TopK:
    """The band or Top-K region with other parameters."""
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


_DIRECTIONS: Mapping[str, Direction] = {"reverse_kl": "reverse", "kl": "forward"}


def _projection(ball: Projected, given: dict[str, Any], name: str) -> Projected:
    """The projection with other parameters. For two outcomes, its interval is that of the band of the same divergence."""
    foreign = ("radius_upper", "max_ratio", "relax")
    _refuse_ignored({k: given[k] for k in foreign if k in given}, name, "projects onto a ball, which has one radius")
    changes: dict[str, Any] = {"radius": given["radius"]} if "radius" in given else {}
    if "divergence_top_k" in given:
        changes["k"] = given["divergence_top_k"]
    if "divergence" in given:
        if given["divergence"] not in _DIRECTIONS:
            raise ValueError(
                f"divergence={given['divergence']!r}: objective {name!r} projects onto a ball of {' or '.join(_DIRECTIONS)}"
            )
        changes["direction"] = _DIRECTIONS[given["divergence"]]
    return dataclasses.replace(ball, **changes)


def _refuse_ignored(given: dict[str, Any], name: str, why: str) -> None:
    if given:
        options = ", ".join(f"{k}={v}" for k, v in given.items())
        raise ValueError(f"{options} would be ignored: objective {name!r} {why}")
