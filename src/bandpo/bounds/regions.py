"""Trust regions that are more than a function of one log-prob, and constant ones with a formula.

What they need besides the old log-probs (advantages, statistics of the group, the sampler's top tokens), they name by
`needs`; `policy_loss` hands it over.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bandpo._inputs import as_mask, inputs_of, needs, traits
from bandpo._values import ByValue
from bandpo.bounds.band import Bounds, Clip, Radius, RatioBounds, as_divergence, radius_of_sides
from bandpo.bounds.roots import log1mexp
from bandpo.divergences import KL, MAX_LOG, FDivergence


def log_clip(low: float = 0.4, high: float | None = None) -> Clip:
    """The interval `[e^-low, e^high]`, fixed in log r (GMPO, arXiv:2507.20673, uses 0.4).

    Args:
        low: Width below 0, positive.
        high: Width above 0; None means the same as `low`.

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


@needs("advantages")
@dataclass(frozen=True)
class BySign:
    """One region for tokens with A > 0 and another for the rest (ABC-GRPO's four widths, arXiv:2601.03895).

    Args:
        positive: Bounds for A > 0, a function of the old log-probs alone.
        negative: Bounds for A <= 0.

    Examples:
        >>> bounds = BySign(Clip(0.2, 0.3), Clip(0.1, 0.2))
        >>> bounds(torch.zeros(1, 2), advantages=torch.tensor([[1.0, -1.0]])).upper
        tensor([[1.3000, 1.2000]])
    """

    positive: Bounds
    negative: Bounds

    def __post_init__(self) -> None:
        for name in ("positive", "negative"):
            if inputs_of(getattr(self, name)):
                raise ValueError(f"BySign: {name}={getattr(self, name)!r} needs more than the old log-probs")

    def __call__(self, old_logprobs: Tensor, *, advantages: Tensor) -> RatioBounds:
        pairs = zip(self.positive(old_logprobs), self.negative(old_logprobs), strict=True)
        lower, upper = (torch.where(advantages > 0, a, b) for a, b in pairs)
        return RatioBounds(lower, upper)


@dataclass(frozen=True)
class Sides:
    """The lower edge of one region and the upper edge of another, to see what each half does.

    Args:
        lower: Bounds whose lower edge counts, a function of the old log-probs alone.
        upper: Bounds whose upper edge counts.

    Examples:
        >>> from bandpo import Band
        >>> Sides(lower=Clip(0.2), upper=Band("tv", 0.05))(torch.tensor([0.1]).log())
        RatioBounds(lower=tensor([0.8000]), upper=tensor([1.5000]))
    """

    lower: Bounds
    upper: Bounds

    def __post_init__(self) -> None:
        for name in ("lower", "upper"):
            if inputs_of(getattr(self, name)):
                raise ValueError(f"Sides: {name}={getattr(self, name)!r} needs more than the old log-probs")

    def __call__(self, old_logprobs: Tensor) -> RatioBounds:
        (lower, _), (_, upper) = self.lower(old_logprobs), self.upper(old_logprobs)
        return RatioBounds(lower, upper)


@needs("advantages", "signal")
@dataclass(frozen=True)
class Elastic:
    """A clip that widens with the size of the advantage and the group's variance: our own reading of ETR.

    `1 - ε_low·s` to `1 + ε_high·s` with `s = (1 + a·tanh(|A|/A₀))·(1 + b·v)`, `s <= limit`, and v in [0, 1] the group's
    `signal` (`bandpo.groups.group_signal`: for rewards of 0 and 1, `4q(1-q)` at a share q of right answers). Without
    signal, `A = 0` and `v = 0`, it is the plain clip. ETR (arXiv:2601.03723) describes such a micro and macro scaling; its
    equations and coefficients could not be established, and this is not a reproduction of it. With std-normalised rewards of
    0 and 1, |A| is large where v is small: the two factors pull against each other.

    Args:
        low: ε_low.
        high: ε_high.
        micro: a >= 0.
        macro: b >= 0.
        scale: A₀ > 0.
        limit: Largest s, >= 1.

    Examples:
        >>> half = torch.full((1, 1), 0.5)
        >>> Elastic()(half.log(), advantages=torch.zeros(1, 1), signal=torch.zeros(1, 1)).upper
        tensor([[1.2000]])
        >>> Elastic()(half.log(), advantages=2 * half, signal=torch.ones(1, 1)).upper
        tensor([[1.4142]])
    """

    low: float = 0.2
    high: float = 0.2
    micro: float = 0.5
    macro: float = 0.5
    scale: float = 1.0
    limit: float = 3.0

    def __post_init__(self) -> None:
        if not (0 <= self.low <= 1 and 0 <= self.high < math.inf):
            raise ValueError(f"Elastic: low must be in [0, 1] and high >= 0, got {self.low} and {self.high}")
        if not (self.micro >= 0 and self.macro >= 0 and self.scale > 0 and self.limit >= 1):
            raise ValueError(f"Elastic: micro, macro >= 0, scale > 0 and limit >= 1 are required, got {self!r}")

    def __call__(self, old_logprobs: Tensor, *, advantages: Tensor, signal: Tensor) -> RatioBounds:
        s = (1 + self.micro * (advantages.abs() / self.scale).tanh()) * (1 + self.macro * signal)
        s = s.clamp(max=self.limit).to(old_logprobs.dtype).expand_as(old_logprobs)
        return RatioBounds((1 - self.low * s).clamp_min(0), 1 + self.high * s)


@traits("of_batch")
@needs("log_ratio", "advantages", "mask")
@dataclass(frozen=True)
class Balanced:
    """A clip that widens step by step until good tokens carry enough of the objective: our own reading of BAPO.

    Of the pairs (low edge, high edge) that start at the narrowest, raise the low edge to its end and then the high edge, the
    first is taken whose clipped objective has a share of at least `target` from tokens with A > 0; the last one if none has.
    The batch decides: micro-batches and ranks that see a part of it may choose differently. BAPO (arXiv:2510.18927) publishes
    three sets of constants that disagree; these are its README's.

    Args:
        low: Smallest and largest lower edge.
        high: Smallest and largest upper edge.
        step: Of both.
        target: ρ₀ in (0, 1).

    Examples:
        >>> x, a = torch.tensor([[2.0, 0.5]]).log(), torch.tensor([[1.0, -1.0]])
        >>> Balanced()(x, log_ratio=x, advantages=a, mask=torch.ones(1, 2))
        RatioBounds(lower=tensor([[0.6000, 0.6000]]), upper=tensor([[1.2000, 1.2000]]))
    """

    low: tuple[float, float] = (0.6, 0.9)
    high: tuple[float, float] = (1.2, 3.0)
    step: float = 0.05
    target: float = 0.5

    def __post_init__(self) -> None:
        if not (0 <= self.low[0] <= self.low[1] <= 1 <= self.high[0] <= self.high[1] < math.inf):
            raise ValueError(
                f"Balanced: 0 <= low <= 1 <= high in rising pairs is required, got {self.low}, {self.high}"
            )
        if not (self.step > 0 and 0 < self.target < 1):
            raise ValueError(f"Balanced: step must be positive and target in (0, 1), got {self.step} and {self.target}")

    def __call__(self, old_logprobs: Tensor, *, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> RatioBounds:
        raises, widens = (math.floor((end - start) / self.step + 1e-9) for start, end in (self.low, self.high))
        pairs = [self._pair(i, raises) for i in range(raises + widens + 1)]
        r = log_ratio.exp()
        a = torch.where(as_mask(mask), advantages, 0.0)
        enough: list[Tensor] = []
        for low, high in pairs[:-1]:
            kept = torch.minimum(r * a, r.clamp(low, high) * a)
            good, bad = kept.clamp_min(0).sum(), kept.clamp_max(0).sum().neg()
            enough.append((good >= self.target * (good + bad)).to(torch.int32))
        last = torch.ones((), dtype=torch.int32, device=r.device)
        first = torch.stack([*enough, last]).argmax().to(old_logprobs.dtype)
        low = self.low[0] + self.step * first.clamp(max=raises)
        high = self.high[0] + self.step * (first - raises).clamp_min(0)
        return RatioBounds(low.expand(old_logprobs.shape), high.expand(old_logprobs.shape))

    def _pair(self, step: int, raises: int) -> tuple[float, float]:
        return self.low[0] + self.step * min(step, raises), self.high[0] + self.step * max(step - raises, 0)


@traits("membership")
@needs("topk_logprobs", "old_topk_logprobs", "sampled_in_topk", "logprobs")
@dataclass(frozen=True, eq=False)
class TopK(ByValue):
    """Whether a token is within a divergence ball of the sampler's top K tokens, itself and the rest (DPPO, arXiv:2602.04879).

    `D = Σ μ_i f(π_i/μ_i)` over `TopK(μ) ∪ {sampled} ∪ {rest}` (eq. 15-16): a lower bound of the full divergence that rises with
    K, and for K = 0 the binary divergence. Gives a bool tensor, for the surrogate `mask`.

    Args:
        divergence: As in `Band`.
        radius: δ, or `(lower, upper)`.
        k: How many tokens the trainers store; vLLM returned at most 20 when the paper was written.

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
        self, old_logprobs: Tensor, *, topk_logprobs: Tensor, old_topk_logprobs: Tensor, sampled_in_topk: Tensor,
        logprobs: Tensor,
    ) -> Tensor:  # fmt: skip
        assert isinstance(self.divergence, FDivergence)
        distance = topk_divergence(
            self.divergence, logprobs=logprobs, old_logprobs=old_logprobs, topk_logprobs=topk_logprobs,
            old_topk_logprobs=old_topk_logprobs, sampled_in_topk=sampled_in_topk,
        )  # fmt: skip
        down, up = radius_of_sides(self.radius)
        return distance <= torch.where(logprobs < old_logprobs, down, up)


def topk_divergence(
    divergence: FDivergence, *, logprobs: Tensor, old_logprobs: Tensor, topk_logprobs: Tensor, old_topk_logprobs: Tensor,
    sampled_in_topk: Tensor,
) -> Tensor:  # fmt: skip
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
    # Below the rounding of what came in, the rest is noise.
    floor = math.log(torch.finfo(old_logprobs.dtype).eps)
    with torch.no_grad():
        inside = sampled_in_topk != 0
        parts: list[Tensor] = []
        for sampled, top in ((logprobs, topk_logprobs), (old_logprobs, old_topk_logprobs)):
            known = torch.cat([top, sampled.masked_fill(inside, -math.inf).unsqueeze(-1)], -1).to(torch.float64)
            rest = log1mexp(known.logsumexp(-1, keepdim=True).clamp(max=-1e-300)).clamp_min(floor)
            parts.append(torch.cat([known, rest], -1))
        new, old = parts
        new, old = new.clamp_min(-MAX_LOG), old.clamp_min(-MAX_LOG)  # as in `binary_divergence`
        return (old.exp() * divergence.of_log(new - old)).sum(-1)
