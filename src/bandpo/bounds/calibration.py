"""Radii that compare: which δ of one divergence does what another trust region does."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bandpo._deprecations import moved_within, warn_moved
from bandpo._inputs import as_mask, inputs_of, is_logprob
from bandpo.bounds.band import Bounds, RatioBounds, as_divergence
from bandpo.bounds.edges import outside
from bandpo.divergences import FDivergence, binary_divergence

__getattr__ = moved_within(__name__, {"clip_fraction": "bounds.outside_fraction"})

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
    distances, valid, _ = _pushed(as_divergence(divergence), batch)
    count = round(target * int(valid.sum()))
    if not 0 < count < len(distances):
        raise ValueError(
            f"radius_for: {target:g} of {int(valid.sum())} valid tokens are {count}, and {len(distances)} moved "
            f"the way they are "
            "pushed. Take more tokens, a batch further off policy, or another target."
        )
    radius = (distances[count - 1].item() + distances[count].item()) / 2
    if not 0 < radius < math.inf:
        raise ValueError(
            f"radius_for: the tokens at {target:g} moved by {radius:g}, which is no radius; choose another target"
        )
    return radius


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
    _, valid, left = _pushed(None, batch, bounds)
    return int(left.sum()) / max(1, int(valid.sum()))


def _match_outside_fraction(divergence: FDivergence, like: Bounds, batch: Mapping[str, Tensor]) -> float:
    distances, _, left = _pushed(divergence, batch, like)
    count = int(left.sum())
    if not 0 < count < len(distances):
        raise ValueError(
            f"match_radius: {count} of the {len(distances)} tokens that moved the way they are pushed are outside {like!r}; "
            "to match the share, some of them must be outside and not all. Take a batch further off policy, or more of them."
        )
    return (distances[count - 1].item() + distances[count].item()) / 2


def _pushed(
    divergence: FDivergence | None, batch: Mapping[str, Tensor], bounds: Bounds | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergences of the tokens that moved the way they are pushed, largest first; which tokens are valid, and outside."""
    names = {"log_ratio", "old_logprobs", "advantages"}
    if not names <= set(batch) <= names | {"mask"}:
        raise ValueError(f"batch needs {sorted(names)} and may have 'mask', got {sorted(batch)}")
    x, logp = (batch[k].detach().to(torch.float64) for k in ("log_ratio", "old_logprobs"))
    a = batch["advantages"].detach().to(torch.float64).expand(x.shape)
    valid = is_logprob(logp) & is_logprob(x) & a.isfinite()  # as in `policy_metrics`: the others are in no statistic
    if "mask" in batch:
        valid = valid & as_mask(batch["mask"])
    pushed = valid & (a * x > 0)
    left, distances = torch.zeros_like(pushed), x[:0]
    if bounds is not None:
        given = {"log_ratio": x, "advantages": a, "mask": valid}
        left = pushed & outside(x, a, _called(bounds, logp, given))
    if divergence is not None:
        reached = torch.minimum(x, -logp)  # rounding may put π above 1
        distances = binary_divergence(reached, logp, divergence)[pushed].sort(descending=True).values
    return distances, valid, left


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
