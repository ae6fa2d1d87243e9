"""Trust regions that are more than a function of one log-prob, and constant ones with a formula.

What they need besides the old log-probs (advantages, the sampler's top tokens) are keyword-only parameters, which
`policy_loss` fills by name.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bandpo._deprecations import moved_within
from bandpo._inputs import traits
from bandpo._values import ByValue, same
from bandpo.bounds.band import Band, Bounds, Clip, Radius, RatioBounds, as_divergence, radius_of_sides
from bandpo.bounds.combined import MARK, Combination, change_leaves, leaves
from bandpo.divergences import KL, MAX_LOG, FDivergence

__getattr__ = moved_within(__name__, {"Balanced": "experimental.Balanced", "Elastic": "experimental.Elastic"})


def log_clip(low: float = 0.4, high: float | None = None) -> Clip:
    """The interval `[e^-low, e^high]`, fixed in log r (GMPO, arXiv:2507.20673, uses 0.4).

    Args:
        low: Width below 0, positive.
        high: Width above 0; None means the same as `low`.

    Raises:
        ValueError: If a width is not positive or not finite.

    Examples:
        >>> edges = log_clip(0.4)
        >>> round(1 - edges.low, 4), round(1 + edges.high, 4)
        (0.6703, 1.4918)
    """
    high = low if high is None else high
    if not (0 < low < math.inf and 0 < high < math.inf):
        raise ValueError(f"log_clip: low and high must be positive numbers, got {low} and {high}")
    return Clip(-math.expm1(-low), math.expm1(high))


def kl3_clip(delta: float = 0.05) -> Clip:
    """The interval `{r : r - 1 - log r <= δ}`, a bound on Schulman's k3 estimator (KL3, arXiv:2602.05494).

    From `-W₀(-e^(-1-δ))` to `-W₋₁(-e^(-1-δ))`, Lambert's W; the same for every token. It is the limit `p -> 0` of the KL band
    of radius `δp`. The paper's δ could not be established.

    Args:
        delta: δ > 0, in nats.

    Raises:
        ValueError: If δ is not positive or not finite.

    Examples:
        >>> edges = kl3_clip(0.05)
        >>> round(1 - edges.low, 4), round(1 + edges.high, 4)
        (0.7162, 1.3504)
    """
    if not 0 < delta < math.inf:
        raise ValueError(f"kl3_clip: delta must be a positive number, got {delta}")
    edges: list[float] = []
    for t in (
        -delta - math.sqrt(2 * delta),
        math.sqrt(2 * delta),
    ):  # both outside: e^t - 1 - t is convex, Newton monotone
        for _ in range(50):
            t -= (math.expm1(t) - t - delta) / math.expm1(t)
        edges.append(t)
    return Clip(-math.expm1(edges[0]), math.expm1(edges[1]))


@dataclass(frozen=True, eq=False)
class BySign(Combination):
    """One region for tokens with A > 0 and another for the rest (ABC-GRPO's four widths, arXiv:2601.03895).

    Args:
        positive: Bounds for A > 0, of any kind.
        negative: Bounds for A <= 0, of any kind.

    Raises:
        TypeError: If one of the two cannot be called as a region.
        ValueError: If both are `TopK` regions, of different `k`.

    Examples:
        >>> bounds = BySign(Clip(0.2, 0.3), Clip(0.1, 0.2))
        >>> bounds(torch.zeros(1, 2), advantages=torch.tensor([[1.0, -1.0]])).upper
        tensor([[1.3000, 1.2000]])
    """

    positive: Bounds
    negative: Bounds

    def __post_init__(self) -> None:
        self._prepare("advantages")

    @property
    def parts(self) -> tuple[Bounds, ...]:
        """The regions for A > 0 and for the rest."""
        return self.positive, self.negative

    def _cap(self, caps: tuple[float | None, ...]) -> float | None:
        return caps[0]  # of A > 0, whose tokens are pushed up

    def __call__(self, old_logprobs: Tensor, **inputs: Tensor) -> RatioBounds | Tensor:
        edges, inside = self._of_parts(old_logprobs, inputs)
        positive = inputs["advantages"] > 0
        if inside:
            return torch.where(positive, inside[0], inside[1])
        lower, upper = (torch.where(positive, a, b) for a, b in zip(*edges, strict=True))
        return RatioBounds(lower, upper)


@dataclass(frozen=True, eq=False)
class Sides(Combination):
    """The lower side of one region and the upper side of another, to see what each half does.

    Of two intervals, the lower bound of one and the upper bound of the other. Where one of the two only says which tokens are
    inside (`TopK`), it says so of the tokens on its side of r = 1.

    Args:
        lower: Bounds whose lower side counts, of any kind.
        upper: Bounds whose upper side counts, of any kind.

    Raises:
        TypeError: If one of the two cannot be called as a region.
        ValueError: If both are `TopK` regions, of different `k`.

    Examples:
        >>> from bandpo import Band
        >>> Sides(lower=Clip(0.2), upper=Band("tv", 0.05))(torch.tensor([0.1]).log())
        RatioBounds(lower=tensor([0.8000]), upper=tensor([1.5000]))
    """

    lower: Bounds
    upper: Bounds

    def __post_init__(self) -> None:
        self._prepare(by_side=True)

    @property
    def parts(self) -> tuple[Bounds, ...]:
        """The region below r = 1 and the region above."""
        return self.lower, self.upper

    def _cap(self, caps: tuple[float | None, ...]) -> float | None:
        return caps[1]

    def __call__(self, old_logprobs: Tensor, **inputs: Tensor) -> RatioBounds | Tensor:
        edges, inside = self._of_parts(old_logprobs, inputs)
        if inside:
            if "log_ratio" not in inputs:  # parts that return memberships and are not marked so
                raise TypeError(f"Sides: mark the regions that return a bool tensor with {MARK}")
            return torch.where(inputs["log_ratio"] < 0, inside[0], inside[1])
        return RatioBounds(edges[0].lower, edges[1].upper)


@traits("membership")
@dataclass(frozen=True, eq=False)
class TopK(ByValue):
    """Whether a token is within a divergence ball of the sampler's top K tokens, itself and the rest (DPPO, arXiv:2602.04879).

    `D = Σ μ_i f(π_i/μ_i)` over `TopK(μ) ∪ {sampled} ∪ {rest}` (eq. 15-16): a lower bound of the full divergence that rises with
    K, and for K = 0 the binary divergence. Gives a bool tensor, for the surrogate `mask`.

    Args:
        divergence: As in `Band`.
        radius: δ, or `(lower, upper)`.
        k: How many tokens the trainers store; vLLM returned at most 20 when the paper was written.

    Raises:
        ValueError: If the radius or `k` is out of range.

    Examples:
        >>> TopK("tv", 0.15).k
        20
    """

    divergence: FDivergence | str = KL
    radius: Radius | tuple[Radius, Radius] = 0.05
    k: int = 20

    def __post_init__(self) -> None:
        object.__setattr__(self, "divergence", as_divergence(self.divergence))
        radius_of_sides(self.radius)
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"TopK: k must be a whole number >= 1, got {self.k!r}")

    def __call__(
        self,
        old_logprobs: Tensor,
        *,
        topk_logprobs: Tensor,
        old_topk_logprobs: Tensor,
        sampled_in_topk: Tensor,
        logprobs: Tensor,
    ) -> Tensor:
        assert isinstance(self.divergence, FDivergence)
        distance = topk_divergence(
            self.divergence,
            logprobs=logprobs,
            old_logprobs=old_logprobs,
            topk_logprobs=topk_logprobs,
            old_topk_logprobs=old_topk_logprobs,
            sampled_in_topk=sampled_in_topk,
        )
        down, up = radius_of_sides(self.radius)
        return distance <= torch.where(logprobs < old_logprobs, down, up)


def common_radius(bounds: Bounds) -> Radius | tuple[Radius, Radius] | None:
    """The radius of the balls (`Band`, `TopK`) of a region; None where there is no ball, or where their radii differ.

    Args:
        bounds: Any region.

    Examples:
        >>> from bandpo import Clip
        >>> common_radius(Sides(Clip(0.2), Band("kl", 0.05))), common_radius(Clip(0.2))
        (0.05, None)
    """
    radii = [leaf.radius for leaf in leaves(bounds) if isinstance(leaf, Band | TopK)]
    return radii[0] if radii and all(same(radii[0], radius) for radius in radii) else None


def with_radius(bounds: Bounds, radius: Radius | tuple[Radius, Radius], owner: str = "with_radius") -> Bounds:
    """The region with another radius of its ball; of several balls, whose radii must be equal, of all of them.

    Args:
        bounds: Any region.
        radius: δ > 0, a number or a tensor that broadcasts to the tokens, or `(lower, upper)`.
        owner: What has the region, for the message.

    Raises:
        ValueError: If the region has no ball, or balls of different radii.

    Examples:
        >>> from bandpo import Clip
        >>> with_radius(Sides(Clip(0.2), Band("kl", 0.05)), 0.1).upper.radius
        0.1
    """
    balls = [leaf for leaf in leaves(bounds) if isinstance(leaf, Band | TopK)]
    if not balls:
        raise ValueError(f"{owner} has no radius: its bounds are {bounds!r}")
    if common_radius(bounds) is None:
        listed = " and ".join(str(ball.radius) for ball in balls)
        raise ValueError(
            f"{owner} has balls of the radii {listed}, and one radius was given for all of them; make a region with the radii "
            "that you want"
        )
    return change_leaves(bounds, lambda leaf: replace(leaf, radius=radius) if isinstance(leaf, Band | TopK) else leaf)


def topk_divergence(
    divergence: FDivergence,
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    topk_logprobs: Tensor,
    old_topk_logprobs: Tensor,
    sampled_in_topk: Tensor,
) -> Tensor:
    """Divergence over the old policy's top K tokens, the sampled one and the rest (DPPO, arXiv:2602.04879, eq. 15-16).

    Args:
        divergence: Which one.
        logprobs: log π of the sampled token, `(...)`.
        old_logprobs: log μ of the sampled token, `(...)`.
        topk_logprobs: log π of the K tokens that μ ranks highest, `(..., K)`.
        old_topk_logprobs: log μ of these, `(..., K)`.
        sampled_in_topk: Whether the sampled token is one of them, bool, `(...)`.

    Returns:
        float64 tensor `(...)` without gradient.

    Examples:
        >>> from bandpo import TV
        >>> one, q = torch.zeros(1, 0), torch.tensor([0.5])
        >>> topk_divergence(TV, logprobs=(q + 0.1).log(), old_logprobs=q.log(), topk_logprobs=one, old_topk_logprobs=one,
        ...                 sampled_in_topk=torch.tensor([False]))
        tensor([0.1000], dtype=torch.float64)
    """
    with torch.no_grad():
        parts = [
            with_rest(sampled, top, sampled_in_topk, rounding=torch.finfo(old_logprobs.dtype).eps)
            for sampled, top in ((logprobs, topk_logprobs), (old_logprobs, old_topk_logprobs))
        ]
        new, old = parts
        new, old = new.clamp_min(-MAX_LOG), old.clamp_min(-MAX_LOG)  # as in `binary_divergence`
        return (old.exp() * divergence.of_log(new - old)).sum(-1)


def with_rest(logprobs: Tensor, topk_logprobs: Tensor, sampled_in_topk: Tensor, *, rounding: float) -> Tensor:
    """Log-probs of K tokens, of the sampled one (-inf where it is among them) and of all others together.

    Args:
        logprobs: Log-prob of the sampled token, `(...)`.
        topk_logprobs: Log-probs of the K tokens, `(..., K)`.
        sampled_in_topk: Whether the sampled token is one of them, bool, `(...)`.
        rounding: The mass of the others below which it is noise; less than that counts as that.

    Returns:
        float64 tensor `(..., K + 2)`, with gradient.

    Examples:
        >>> with_rest(torch.tensor([0.2]).log(), torch.tensor([[0.5, 0.1]]).log(), torch.tensor([False]), rounding=1e-7).exp()
        tensor([[0.5000, 0.1000, 0.2000, 0.2000]], dtype=torch.float64)
    """
    own = logprobs.masked_fill(sampled_in_topk != 0, -math.inf).unsqueeze(-1)
    known = torch.cat([topk_logprobs, own], -1).to(torch.float64)
    mass = known.logsumexp(-1, keepdim=True).clamp(max=-1e-300)
    # The branch that is not taken must have a finite derivative too.
    common = mass > -math.log(2)
    rest = torch.where(
        common, (-torch.where(common, mass, -1.0).expm1()).log(), (-torch.where(common, -1.0, mass).exp()).log1p()
    )
    return torch.cat([known, rest.clamp_min(math.log(rounding))], -1)
