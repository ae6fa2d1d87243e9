"""Radii that compare: which δ of one divergence does what another trust region does."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bandpo._deprecations import moved_within, warn_moved
from bandpo._inputs import as_mask, inputs_of, is_logprob
from bandpo.bounds.band import DCPO, Band, Bounds, Clip, RatioBounds, as_divergence, radius_of_sides
from bandpo.bounds.edges import outside
from bandpo.divergences import FDivergence, binary_divergence

__getattr__ = moved_within(__name__, {"clip_fraction": "bounds.outside_fraction"})

_MARGIN = 1e-5
_FEW = 1 << 15
_LOWEST_SURE = -80.0  # log-probs below it are always solved in float64
_GRID = 4097
_GOLDEN = (math.sqrt(5) - 1) / 2


def match_radius(
    divergence: FDivergence | str,
    *,
    like: Bounds,
    by: str = "max_shift",
    batch: Mapping[str, Tensor] | None = None,
) -> float:
    """Radius at which the ball of a divergence does what another trust region does, by one measure of it.

    Radii of different divergences are not comparable: at δ = 0.05 a token of p = 0.001 may grow 53-fold under KL and 8-fold
    under χ². Nothing is searched for: the radius is the divergence of the very point that `like` allows.

    * `upper@P` or `lower@P`: the same bound at probability P, `δ = D(P, r_like(P))`.
    * `max_shift`: the same largest rise of a token's probability, `s = max_p p(r_up - 1)` (see `max_shift`); the ball that
      reaches it first has `δ = min_p D(p, 1 + s/p)`.
    * `outside_fraction`: the same number of tokens of `batch` outside, on the side that their advantage pushes to; δ lies
      between the divergence of the last token that is and of the first that is not.

    Args:
        divergence: Whose radius to find, an `FDivergence` or a name.
        like: The trust region to match, such as `Band(KL, 0.05)` or `Clip(0.2)`; a function of the old log-probs alone; for
            `outside_fraction` also one that asks for inputs that the batch has.
        by: The measure.
        batch: For `outside_fraction`: `log_ratio`, `old_logprobs`, `advantages` of tokens (any one shape, or advantages that
            broadcast), and `mask` where some do not count.

    Returns:
        δ, for both sides of the ball and without a `max_ratio`.

    Raises:
        TypeError: If `by` is no string, `like` returns no interval, or it asks for more than it can be given.
        ValueError: If the measure is unknown or cannot be met: a bound that no ball gives, no token of the batch to clip.

    Examples:
        >>> from bandpo import KL, TV, Band, Clip
        >>> round(match_radius("tv", like=Band(KL, 0.05), by="upper@0.01"), 4)
        0.0681
        >>> round(match_radius("kl", like=Clip(0.2), by="max_shift"), 4)
        0.0559
    """
    divergence = as_divergence(divergence)
    if not isinstance(by, str):
        raise TypeError(f"match_radius: by must be a string, got {by!r}")
    kind, at, where = by.partition("@")
    if kind in ("upper", "lower") and at:
        return _match_bound(divergence, like, kind, where)
    if by == "max_shift":
        return _match_shift(divergence, like)
    if by == "clip_fraction":
        warn_moved("match_radius(by='clip_fraction')", "match_radius(by='outside_fraction')")
        by = "outside_fraction"
    if by == "outside_fraction":
        if batch is None:
            raise ValueError("match_radius: by='outside_fraction' counts tokens: pass batch=")
        return _match_outside_fraction(divergence, like, batch)
    raise ValueError(
        f"match_radius: by={by!r}; choose 'upper@P', 'lower@P' (P a probability), 'max_shift' or 'outside_fraction'"
    )


def max_shift(bounds: Bounds) -> float:
    """Largest rise of a token's probability that the bounds allow, `max_p p·(min(r_up, 1/p) - 1)`; see `match_radius`.

    Args:
        bounds: A function of the old log-probs alone.

    Raises:
        TypeError: If the bounds ask for more, or return no interval.

    Examples:
        >>> from bandpo import TV, Band
        >>> round(max_shift(Band(TV, 0.05, max_ratio=None)), 6)
        0.05
    """

    def shift(logp: Tensor) -> Tensor:
        upper = _interval(bounds, logp).upper
        return (logp.exp() * (upper - 1)).minimum(-logp.expm1())

    return _maximum(lambda x: shift(torch.nn.functional.logsigmoid(x)), -30.0, 30.0)


def _match_bound(divergence: FDivergence, like: Bounds, side: str, where: str) -> float:
    try:
        p = float(where)
    except ValueError:
        p = math.nan
    if not 0 < p < 1:
        raise ValueError(f"match_radius: by='{side}@{where}' needs a probability between 0 and 1 after the @")
    logp = torch.tensor([math.log(p)], dtype=torch.float64)
    bound = getattr(_interval(like, logp), side)
    radius = binary_divergence(bound.log(), logp, divergence).item()
    if not (0 < radius < math.inf) or bound.item() * p >= 1 - 1e-12:
        raise ValueError(
            f"match_radius: the {side} bound of {like!r} at p = {p:g} is {bound.item():g}, which is the simplex' edge or "
            f"beyond it: no single radius of {divergence.name} gives it. Choose a smaller P, or another measure."
        )
    return radius


def _match_shift(divergence: FDivergence, like: Bounds) -> float:
    shift = max_shift(like)
    if not 0 < shift < 1 - 1e-9:
        raise ValueError(f"match_radius: {like!r} lets probabilities rise by {shift:g}; there is no ball to match")

    # p from 0 to 1 - s, by its logit there; D(p, 1 + s/p) is convex in p for every f, so it has one minimum.
    def cost(x: Tensor) -> Tensor:
        p = (1 - shift) * torch.sigmoid(x)
        return -binary_divergence((shift / p).log1p(), p.log(), divergence)

    return -_maximum(cost, -30.0, 30.0)


def radius_for(divergence: FDivergence | str, target: float, batch: Mapping[str, Tensor]) -> float:
    """Radius at which a given share of a batch's tokens is outside the ball, on the side that their advantage pushes to.

    δ lies between the divergence of the last token that is outside and of the first that is not.

    Args:
        divergence: An `FDivergence` or a name.
        target: Share of the valid tokens, between 0 and 1.
        batch: `log_ratio`, `old_logprobs`, `advantages` of tokens (any one shape, or advantages that broadcast), and
            `mask` where some do not count.

    Raises:
        ValueError: If the batch has no token to clip, or not that many.

    Examples:
        >>> x = torch.linspace(-0.5, 0.5, 1001)
        >>> batch = {"log_ratio": x, "old_logprobs": torch.full_like(x, -0.7), "advantages": x.sign()}
        >>> round(radius_for("kl", 0.1, batch), 4)
        0.136
    """
    if not 0 < target < 1:
        raise ValueError(f"radius_for: target must be between 0 and 1, got {target}")
    tally = Tally(divergences=[divergence])
    tally.add(batch)
    return tally.radius_for(0, target).radius


def outside_fraction(bounds: Bounds, batch: Mapping[str, Tensor]) -> float:
    """Share of a batch's valid tokens that are outside a trust region on the side that their advantage pushes to.

    Args:
        bounds: A region that asks for nothing, or for `advantages`, `log_ratio` and `mask` of the batch (`BySign`).
        batch: `log_ratio`, `old_logprobs` and `advantages` of tokens (any one shape, or advantages that broadcast), and `mask`
            where some do not count.

    Raises:
        ValueError: If a name of the batch is missing or unknown.
        TypeError: If the bounds ask for more than the batch has.

    Examples:
        >>> from bandpo import Clip
        >>> x = torch.tensor([0.1, 0.3, -0.3, -0.1])
        >>> outside_fraction(Clip(0.2), {"log_ratio": x, "old_logprobs": x - 1, "advantages": torch.ones(4)})
        0.25
    """
    tally = Tally([bounds])
    tally.add(batch)
    return tally.outside[0] / max(1, tally.valid)


class Split(NamedTuple):
    """A radius, and how many tokens it leaves outside."""

    radius: float
    """δ, in the units of the divergence."""
    outside: int
    """Number of tokens whose divergence is larger than the radius."""
    error: float
    """Largest relative distance between the radius and the exact one; 0 if it is exact."""


class Tally:
    """Counts over the tokens of a batch that comes in parts: who is outside of each region, and the largest divergences.

    Every count is exact, and the same for any division into parts. Memory does not grow with the number of tokens where
    `most` is given: see `Largest` for when a radius is then exact.

    Args:
        regions: Trust regions, as in `outside_fraction`.
        divergences: Divergences, by name or as objects, whose radii will be asked for.
        most: Largest number of tokens that a radius will have to leave outside; None keeps all divergences.

    Examples:
        >>> from bandpo import Clip
        >>> x = torch.linspace(-0.5, 0.5, 1001)
        >>> tally = Tally([Clip(0.2)], ["kl"])
        >>> for part in x.split(100):
        ...     tally.add({"log_ratio": part, "old_logprobs": torch.full_like(part, -0.7), "advantages": part.sign()})
        >>> tally.valid, tally.outside, round(tally.radius_for(0, 0.1).radius, 4)
        (1001, [595], 0.136)
    """

    def __init__(
        self, regions: Sequence[Bounds] = (), divergences: Sequence[FDivergence | str] = (), *, most: int | None = None
    ) -> None:
        self.regions = regions
        self.divergences = [as_divergence(divergence) for divergence in divergences]
        self.valid = 0
        """Number of valid tokens."""
        self.pushed = 0
        """Number of valid tokens that moved the way that their advantage pushes."""
        self.outside = [0] * len(regions)
        """Number of these that are outside of each region."""
        self._largest = [Largest(most) for _ in self.divergences]

    def add(self, batch: Mapping[str, Tensor]) -> None:
        """Count the tokens of a part.

        Args:
            batch: `log_ratio`, `old_logprobs` and `advantages` of tokens (any one shape, or advantages that broadcast), and
                `mask` where some do not count.

        Raises:
            ValueError: If a name of the batch is missing or unknown.
            TypeError: If a region asks for more than the batch has.
        """
        names = {"log_ratio", "old_logprobs", "advantages"}
        if not names <= set(batch) <= names | {"mask"}:
            raise ValueError(f"batch needs {sorted(names)} and may have 'mask', got {sorted(batch)}")
        x, logp = (batch[k].detach().to(torch.float64) for k in ("log_ratio", "old_logprobs"))
        a = batch["advantages"].detach().to(torch.float64).expand(x.shape)
        valid = (
            is_logprob(logp) & is_logprob(x) & a.isfinite()
        )  # as in `policy_metrics`: the others are in no statistic
        if "mask" in batch:
            valid = valid & as_mask(batch["mask"])
        pushed = valid & (a * x > 0)
        moved = x[pushed], a[pushed], logp[pushed]
        self.valid += int(valid.sum())
        self.pushed += len(moved[0])
        for i, bounds in enumerate(self.regions):
            if _by_token(bounds):
                self.outside[i] += _count_outside(bounds, *moved)
            else:
                given = {"log_ratio": x, "advantages": a, "mask": valid}
                self.outside[i] += int((pushed & outside(x, a, _called(bounds, logp, given))).sum())
        reached = torch.minimum(moved[0], -moved[2])  # rounding may put π above 1
        for divergence, largest in zip(self.divergences, self._largest, strict=True):
            largest.add(binary_divergence(reached, moved[2], divergence))

    def radius_for(self, index: int, target: float) -> Split:
        """The radius that leaves a share of the valid tokens outside.

        Args:
            index: Which divergence, by its place in `divergences`.
            target: Share of the valid tokens.

        Raises:
            ValueError: If no token is to be clipped, or not that many.
        """
        count = round(target * self.valid)
        if not 0 < count < self.pushed:
            raise ValueError(
                f"radius_for: {target:g} of {self.valid} valid tokens are {count}, and {self.pushed} moved "
                f"the way they are "
                "pushed. Take more tokens, a batch further off policy, or another target."
            )
        split = self.split(index, count)
        if not 0 < split.radius < math.inf:
            raise ValueError(
                f"radius_for: the tokens at {target:g} moved by {split.radius:g}, which is no radius; choose another target"
            )
        return split

    def split(self, index: int, count: int) -> Split:
        """The radius between the `count` largest divergences and the others.

        Args:
            index: Which divergence, by its place in `divergences`.
            count: From 1 to less than `pushed`.
        """
        return self._largest[index].split(count)


class Largest:
    """The largest numbers of a stream, to find the one of a given rank.

    Up to 2²² numbers are kept, and the answer is exact, where the stream has no more, or where `most` is at most half of that:
    smaller ones are then dropped. For other streams they are counted in bins of relative width 2⁻¹⁰, and the answer is less
    than that away from the exact one; the count beyond it is exact.

    Args:
        most: Largest rank that will be asked for; None keeps all numbers.
        kept: How many numbers are kept, in place of 2²².
    """

    KEPT = 1 << 22
    """Numbers that are kept, 34 MB of them."""
    _BITS = 42  # of a float64 that are dropped for its bin: of the 52 of its mantissa 10 are left

    def __init__(self, most: int | None = None, *, kept: int | None = None) -> None:
        self.most = most
        self._kept = kept
        self._parts: list[Tensor] = []
        self._size = 0
        self._least: float | None = None  # numbers up to it have been dropped
        self._bins: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Take further numbers.

        Args:
            values: Float64, `(n,)`, none of them negative but for rounding.
        """
        if self._least is not None:
            values = values[~(values <= self._least)]
        if self._bins is not None:
            self._count(values)
            return
        self._parts.append(values)
        self._size += len(values)
        if self.most is not None and self._size > (self._kept or self.KEPT):
            self._shrink(self.most + 1)

    def split(self, rank: int) -> Split:
        """The number between the `rank` largest and the others, and how many are larger than it.

        Args:
            rank: From 1 to less than the number of values.
        """
        if self._bins is not None:
            return self._split_bins(rank)
        values = torch.cat(self._parts)
        n = len(values)
        above, below = (values.kthvalue(n - k + 1).values.item() for k in (rank, rank + 1))
        radius = (above + below) / 2
        return Split(radius, int((values > radius).sum()), 0.0)

    def _shrink(self, needed: int) -> None:
        values = torch.cat(self._parts)
        if needed > (self._kept or self.KEPT) // 2:
            self._bins = torch.zeros(1 << (63 - self._BITS), dtype=torch.int64, device=values.device)
            self._parts, self._size = [], 0
            self._count(values)
            return
        kept = values.topk(needed, sorted=False).values
        self._parts, self._size, self._least = [kept], needed, kept.min().item()

    def _count(self, values: Tensor) -> None:
        assert self._bins is not None
        # The bits of positive floats are in their order; -0.0, which a clamp leaves, would be a negative number.
        places = values.clamp(min=0.0).abs().view(torch.int64) >> self._BITS
        self._bins += places.bincount(minlength=len(self._bins))

    def _split_bins(self, rank: int) -> Split:
        assert self._bins is not None
        beyond = self._bins.flip(0).cumsum(0).flip(0)  # numbers in a bin and above it
        place = int((beyond >= rank).sum()) - 1
        # The lower edge of that bin, or its upper one, whichever leaves a number outside that is nearer to the rank.
        above = int(beyond[place + 1]) if place + 1 < len(beyond) else 0
        if rank - above < int(beyond[place]) - rank and above > 0:
            place += 1
        radius = math.nextafter(self._edge(place), 0.0)
        if int(beyond[place]) == rank and place > 0:  # nothing between it and the next bin with numbers: their middle
            below = int((beyond > rank).sum()) - 1
            radius = min((self._edge(place) + self._edge(below + 1)) / 2, radius)
        return Split(radius, int(beyond[place]), 2.0 ** (self._BITS - 52))

    def _edge(self, place: int) -> float:
        """The smallest number of a bin."""
        return torch.tensor(place << self._BITS, dtype=torch.int64).view(torch.float64).item()


def _match_outside_fraction(divergence: FDivergence, like: Bounds, batch: Mapping[str, Tensor]) -> float:
    tally = Tally([like], [divergence])
    tally.add(batch)
    [count] = tally.outside
    if not 0 < count < tally.pushed:
        raise ValueError(
            f"match_radius: {count} of the {tally.pushed} tokens that moved the way they are pushed are outside {like!r}; "
            "to match the share, some of them must be outside and not all. Take a batch further off policy, or more of them."
        )
    return tally.split(0, count).radius


def _by_token(bounds: Bounds) -> bool:
    """Whether the interval of a token is known to depend on its old log-prob alone, and not on its place."""
    if isinstance(bounds, Band):
        return not any(isinstance(side, Tensor) for side in radius_of_sides(bounds.radius))
    return isinstance(bounds, Clip | DCPO)


def _count_outside(bounds: Bounds, x: Tensor, a: Tensor, logp: Tensor) -> int:
    """The number of tokens outside, as in float64, `(n,)`.

    The bounds of a band are read from its float32 table, six times as fast as the float64 solver. They are within 2⁻²¹ of the
    truth at the rounded log-prob, whose rounding moves a bound by less than 2⁻²⁴·|log p| (of 1 or, above 1, of itself). Only
    tokens within `_MARGIN` of their bound are solved in float64, so the count is that of float64.
    """
    if not isinstance(bounds, Band) or len(x) < _FEW:  # a table takes longer to make than a few tokens to solve
        return int(outside(x, a, _called(bounds, logp, {})).sum())
    lower, upper = bounds(logp.float())
    r = x.exp()
    edge = torch.where(a > 0, upper, lower).to(torch.float64)
    left = torch.where(a > 0, r > edge, r < edge)
    unsure = ~((r - edge).abs() > _MARGIN * edge.clamp(min=1.0)) | (logp < _LOWEST_SURE)
    if not unsure.any():
        return int(left.sum())
    x, a, logp = x[unsure], a[unsure], logp[unsure]
    return int((left & ~unsure).sum()) + int(outside(x, a, bounds(logp)).sum())


def _interval(bounds: Bounds, logp: Tensor) -> RatioBounds:
    found = _called(bounds, logp, {})
    if not isinstance(found, RatioBounds):
        raise TypeError(f"{bounds!r} is no interval for the ratio")
    return found


def _called(bounds: Bounds, logp: Tensor, given: Mapping[str, Tensor]) -> RatioBounds | Tensor:
    """The region at some log-probs, with those inputs that it asks for."""
    asked = inputs_of(bounds)
    if missing := [name for name in asked if name not in given]:
        raise TypeError(
            f"{bounds!r} is no interval of the old log-probs alone: it asks for {', '.join(missing)}, which cannot be given "
            "here"
        )
    return bounds(logp, **{name: given[name] for name in asked})


def _maximum(function: Callable[[Tensor], Tensor], low: float, high: float) -> float:
    """Largest value of a function of one variable: a grid, then golden sections around its best point."""
    x = torch.linspace(low, high, _GRID, dtype=torch.float64)
    best = int(function(x).argmax())
    a, b = x[max(best - 1, 0)].item(), x[min(best + 1, _GRID - 1)].item()
    for _ in range(60):
        inner = torch.tensor([b - _GOLDEN * (b - a), a + _GOLDEN * (b - a)], dtype=torch.float64)
        value = function(inner)
        a, b = (a, inner[1].item()) if value[0] >= value[1] else (inner[0].item(), b)
    return function(torch.tensor([(a + b) / 2], dtype=torch.float64)).item()
