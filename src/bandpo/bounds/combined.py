"""Trust regions that are made of other trust regions: the base of all of them, `Intersection` and `Union`.

A part is an interval of the ratio, which contains 1, or a membership: a bool tensor that says which tokens are inside. If all
parts are intervals, the combination is an interval. If one part is a membership, the combination is a membership, and an
interval counts as "`lower <= r <= upper`".
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from bandpo._inputs import check_component, inputs_of, traits_of
from bandpo._values import ByValue
from bandpo.bounds.band import Bounds, RatioBounds

MARK = "bandpo.surrogates.traits('membership')"
"""The mark of a region that returns a bool tensor, for messages."""


class Combination(ByValue):
    """Base of a region that is made of others. It asks for what its parts ask for, and has their marks.

    A subclass is a dataclass (made with `eq=False`) whose constructor takes the parts by position.
    """

    inputs: tuple[str, ...]
    """Names of the inputs that the parts ask for besides the old log-probs, with those that the combination itself needs."""
    k: int | None
    """How many of the sampler's top tokens its `TopK` parts need; None where it has none."""
    max_ratio: float | None
    """The cap on the upper bound, from the caps of the parts; None where there is none."""
    _asked: tuple[tuple[str, ...], ...]

    @property
    @abstractmethod
    def parts(self) -> tuple[Bounds, ...]:
        """The regions that it is made of, in the order of the constructor's arguments."""

    @abstractmethod
    def __call__(self, old_logprobs: Tensor, **inputs: Tensor) -> RatioBounds | Tensor:
        """The interval of each token, or whether it is inside.

        Args:
            old_logprobs: Log-probs of the anchor, any shape.
            **inputs: What `inputs` names, tensors that broadcast to `old_logprobs`.

        Raises:
            TypeError: If an input is missing or not asked for, or a part returns no region.
        """

    @abstractmethod
    def _cap(self, caps: tuple[float | None, ...]) -> float | None:
        """The cap on the upper bound, from the caps of the parts."""

    def _prepare(self, *own: str, by_side: bool = False) -> None:
        """Check the parts and note what they ask for, once: nothing is inspected while a loss is computed.

        Args:
            *own: Inputs that the combination itself asks for by name.
            by_side: Whether a membership is asked on one side of r = 1 only, which the ratio decides.
        """
        for part in self.parts:
            check_component("a part", part, ("old_logprobs",), owner=type(self).__name__)
        asked = tuple(inputs_of(part) for part in self.parts)
        memberships = {"membership" in traits_of(part) for part in self.parts}
        ratio = ("log_ratio",) if True in memberships and (by_side or len(memberships) > 1) else ()
        names = dict.fromkeys(name for names in (own, ratio, *asked) for name in names)
        object.__setattr__(self, "inputs", tuple(names))
        object.__setattr__(self, "_asked", asked)
        sizes = {k for k in (getattr(part, "k", None) for part in self.parts) if k is not None}
        if len(sizes) > 1:
            raise ValueError(
                f"{type(self).__name__}: its TopK parts have k = {' and '.join(map(str, sorted(sizes)))}, and all of them are "
                "given the same tokens; use one k"
            )
        caps = tuple(getattr(part, "max_ratio", None) for part in self.parts)
        for name, value in (("k", sizes.pop() if sizes else None), ("max_ratio", self._cap(caps))):
            object.__setattr__(self, name, value)

    def __setstate__(self, state: Mapping[str, object]) -> None:
        self.__dict__.update(state)
        if "_asked" not in state:  # a pickle of bandpo 0.1, whose regions took parts without inputs
            self.__post_init__()

    def __post_init__(self) -> None:
        self._prepare()

    def _of_parts(self, old_logprobs: Tensor, inputs: Mapping[str, Tensor]) -> tuple[list[RatioBounds], list[Tensor]]:
        """What the parts give: intervals, or memberships; one of the two lists is empty.

        Args:
            old_logprobs: Log-probs of the anchor, any shape.
            inputs: What the attribute `inputs` names.
        """
        if set(inputs) != set(self.inputs):
            raise TypeError(
                f"{type(self).__name__} takes the inputs {', '.join(self.inputs) or 'none'}, got {', '.join(inputs) or 'none'}"
            )
        found = [
            part(old_logprobs, **{name: inputs[name] for name in names})
            for part, names in zip(self.parts, self._asked, strict=True)
        ]
        for x in found:
            if not isinstance(x, RatioBounds) and not (isinstance(x, Tensor) and x.dtype == torch.bool):
                raise TypeError(
                    f"{type(self).__name__}: a part returned {type(x).__name__}; a region returns RatioBounds(lower, upper), "
                    "or a bool tensor that says which tokens are inside"
                )
        edges = [x for x in found if isinstance(x, RatioBounds)]
        if len(edges) == len(found):
            return edges, []
        return [], [self._inside(x, inputs.get("log_ratio")) for x in found]

    def _inside(self, found: RatioBounds | Tensor, log_ratio: Tensor | None) -> Tensor:
        """What one part gave, as a membership."""
        if isinstance(found, Tensor):
            return found
        if log_ratio is None:
            raise TypeError(
                f"{type(self).__name__}: one part returned an interval and another one which tokens are inside; mark the "
                f"latter with {MARK}, so that the log-ratio is asked for"
            )
        r = log_ratio.exp()
        return (r >= found.lower) & (r <= found.upper)


class _OfSeveral(Combination):
    bounds: tuple[Bounds, ...]

    def __init__(self, *bounds: Bounds) -> None:
        if not bounds:
            raise ValueError(f"{type(self).__name__}: pass one region or more, for example Clip(0.2), Band('kl', 0.05)")
        object.__setattr__(self, "bounds", bounds)
        self.__post_init__()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.bounds))})"

    @property
    def parts(self) -> tuple[Bounds, ...]:
        """The regions that it is made of."""
        return self.bounds


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Intersection(_OfSeveral):
    """The tokens that are inside of every one of several regions.

    Of intervals, the largest lower and the smallest upper bound. As soon as one part only says which tokens are inside
    (`TopK`), so does the intersection.

    Args:
        *bounds: The regions, of any kind. What they ask for besides the old log-probs, the intersection asks for.

    Raises:
        ValueError: If there is no region, or there are `TopK` regions of different `k`.
        TypeError: If one of them cannot be called as a region.

    Examples:
        >>> from bandpo import Band, Clip
        >>> Intersection(Clip(0.2), Band("tv", 0.05))(torch.tensor([0.1, 0.5]).log())
        RatioBounds(lower=tensor([0.8000, 0.9000]), upper=tensor([1.2000, 1.1000]))
    """

    bounds: tuple[Bounds, ...]

    def _cap(self, caps: tuple[float | None, ...]) -> float | None:
        return min((cap for cap in caps if cap is not None), default=None)

    def __call__(self, old_logprobs: Tensor, **inputs: Tensor) -> RatioBounds | Tensor:
        edges, inside = self._of_parts(old_logprobs, inputs)
        if inside:
            return reduce(torch.logical_and, inside)
        return RatioBounds(
            reduce(torch.maximum, (e.lower for e in edges)), reduce(torch.minimum, (e.upper for e in edges))
        )


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Union(_OfSeveral):
    """The tokens that are inside of at least one of several regions.

    Of intervals, the smallest lower and the largest upper bound: all of them contain 1, so there is no gap. As soon as one part
    only says which tokens are inside (`TopK`), so does the union.

    Args:
        *bounds: The regions, of any kind. What they ask for besides the old log-probs, the union asks for.

    Raises:
        ValueError: If there is no region, or there are `TopK` regions of different `k`.
        TypeError: If one of them cannot be called as a region.

    Examples:
        >>> from bandpo import Band, Clip
        >>> Union(Clip(0.2), Band("tv", 0.05))(torch.tensor([0.1, 0.5]).log())
        RatioBounds(lower=tensor([0.5000, 0.8000]), upper=tensor([1.5000, 1.2000]))
    """

    bounds: tuple[Bounds, ...]

    def _cap(self, caps: tuple[float | None, ...]) -> float | None:
        return max((cap for cap in caps if cap is not None), default=None)

    def __call__(self, old_logprobs: Tensor, **inputs: Tensor) -> RatioBounds | Tensor:
        edges, inside = self._of_parts(old_logprobs, inputs)
        if inside:
            return reduce(torch.logical_or, inside)
        return RatioBounds(
            reduce(torch.minimum, (e.lower for e in edges)), reduce(torch.maximum, (e.upper for e in edges))
        )


def leaves(bounds: Bounds) -> tuple[Bounds, ...]:
    """The regions that a region is made of in the end; the region itself where it is made of no others.

    Args:
        bounds: Any region.

    Examples:
        >>> from bandpo import Band, Clip
        >>> leaves(Intersection(Clip(0.2), Union(Clip(0.1), Band("kl", 0.05))))[:2]
        (Clip(low=0.2, high=0.2), Clip(low=0.1, high=0.1))
    """
    if not isinstance(bounds, Combination):
        return (bounds,)
    return tuple(leaf for part in bounds.parts for leaf in leaves(part))


def change_leaves(bounds: Bounds, change: Callable[[Bounds], Bounds]) -> Bounds:
    """The same region with other leaves.

    Args:
        bounds: Any region.
        change: What replaces each of its `leaves`.

    Examples:
        >>> from bandpo import Clip
        >>> change_leaves(Intersection(Clip(0.2), Clip(0.1, 0.4)), lambda leaf: Clip(leaf.low, 0.3))
        Intersection(Clip(low=0.2, high=0.3), Clip(low=0.1, high=0.3))
    """
    if not isinstance(bounds, Combination):
        return change(bounds)
    make: Callable[..., Bounds] = type(bounds)
    return make(*(change_leaves(part, change) for part in bounds.parts))
