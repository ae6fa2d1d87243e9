"""Components that may change in any release: readings of papers, and surrogates and regions of a whole batch.

* Readings: `log_stabilized` (QUATRO) and `Elastic` (ETR). The equations of their papers could not be established, so each is
  our own reading and not a reproduction.
* `clip_cov`, `kl_cov`, `second_moment` (M2PO) and `Balanced` (BAPO) treat a token by statistics of the whole call, so that
  micro-batches differ from the whole batch. `Balanced` can add its sums up over ranks (`sum_over_ranks`).

The objectives of the zoo that use them are `quatro-reading`, `etr-reading`, `bapo`, `clip-cov`, `kl-cov` and `m2po`. What is
outside of this module follows the usual rule: a public name is renamed with a warning first.

Args:
    log_ratio: `log r` at the ratio level of the objective, with gradient: `(batch, time)`, or `(batch, 1)` for sequences.
    advantages: A, `(batch, 1)` or `(batch, time)`.
    bounds: The interval of each token, two tensors of the shape of `log_ratio` or 0-d.
    mask: The tokens that are used, bool or 0/1, `(batch, time)`.
    logprobs: `log π` of the sampled tokens, with gradient, `(batch, time)`.
    old_logprobs: `log p` of the policy that the ratio is taken against, `(batch, time)`.

Returns:
    Objective of each token, to be maximised, of the shape of `log_ratio`.
"""

# ruff: noqa: D417 (the module's docstring describes the arguments that all functions take)

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed
from torch import Tensor

from bandpo._inputs import as_mask, traits
from bandpo.bounds import RatioBounds, outside
from bandpo.surrogates.stops import never, stops
from bandpo.surrogates.token import clip, hold, ratio


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

    Raises:
        ValueError: If a number is out of its range.

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
        s = (1 + self.micro * (advantages.abs() / self.scale).tanh()) * (
            1 + self.macro * signal.to(old_logprobs.dtype)  # a signal in bfloat16 would round s to 8 bits
        )
        s = s.clamp(max=self.limit).to(old_logprobs.dtype).expand_as(old_logprobs)
        return RatioBounds((1 - self.low * s).clamp_min(0), 1 + self.high * s)


def sum_over_ranks(sums: Tensor) -> Tensor:
    """The sum of a tensor over all processes of `torch.distributed`: a hook for `Balanced(reduce=...)`.

    Every process must call it, and the same number of times. Where a pipeline computes the loss on its last stage alone, it
    would wait forever: write a hook for the group of those processes.

    Args:
        sums: A tensor of the same shape and dtype on each process.

    Returns:
        A new tensor with the sum, in the shape of `sums`; the tensor itself where there is one process.

    Examples:
        >>> sum_over_ranks(torch.ones(2))
        tensor([1., 1.])
    """
    group = torch.distributed
    if not (group.is_available() and group.is_initialized()) or group.get_world_size() == 1:
        return sums
    total = sums.clone()
    group.all_reduce(total)
    return total


@traits("of_batch")
@dataclass(frozen=True)
class Balanced:
    """A clip that widens step by step until good tokens carry enough of the objective (BAPO, arXiv:2510.18927).

    Of the pairs (low edge, high edge) that start at the narrowest, raise the low edge to its end and then the high edge, the
    first is taken whose clipped objective has a share of at least `target` from tokens with A > 0; the last one if none has.
    Rule and order are those of the authors' code, with which a dual clip at c = 3 belongs (`bandpo.surrogates.dual_clip`).
    The defaults are the constants that its README gives as the paper's; its configuration and its script have others.

    The batch decides. Without `reduce` it is what this call sees, so that ranks may choose differently. With `sum_over_ranks`
    all ranks choose one pair for their micro-batches of the same turn, as in the authors' code. For one pair in all
    micro-batches of a batch, add up `sums` over them in a first pass without gradient, and let `reduce` return the total.

    Args:
        low: Smallest and largest lower edge, within [0, 1].
        high: Smallest and largest upper edge.
        step: Step of both edges, positive.
        target: ρ₀ in (0, 1), a share of the whole. The authors' code takes the ratio of good to bad, `ρ₀/(1 - ρ₀)`.
        reduce: Function of the `sums` of this call that returns those of the whole batch, in the same shape; None for those of
            the call. Name a function of a module, so that the object can be pickled.

    Raises:
        ValueError: If a number is out of its range.
        TypeError: If `reduce` cannot be called.

    Examples:
        >>> x, a = torch.tensor([[2.0, 0.5]]).log(), torch.tensor([[1.0, -1.0]])
        >>> Balanced()(x, log_ratio=x, advantages=a, mask=torch.ones(1, 2))
        RatioBounds(lower=tensor([[0.6000, 0.6000]]), upper=tensor([[1.2000, 1.2000]]))
    """

    low: tuple[float, float] = (0.6, 0.9)
    high: tuple[float, float] = (1.2, 3.0)
    step: float = 0.05
    target: float = 0.5
    reduce: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not (0 <= self.low[0] <= self.low[1] <= 1 <= self.high[0] <= self.high[1] < math.inf):
            raise ValueError(
                f"Balanced: 0 <= low <= 1 <= high in rising pairs is required, got {self.low}, {self.high}"
            )
        if not (self.step > 0 and 0 < self.target < 1):
            raise ValueError(f"Balanced: step must be positive and target in (0, 1), got {self.step} and {self.target}")
        if self.reduce is not None and not callable(self.reduce):
            raise TypeError(f"Balanced: reduce must be a function of the sums, or None, got {self.reduce!r}")

    def __call__(self, old_logprobs: Tensor, *, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> RatioBounds:
        sums = self.sums(log_ratio, advantages, mask)
        if self.reduce is not None:
            shape, sums = sums.shape, self.reduce(sums)
            if sums.shape != shape:
                raise ValueError(f"Balanced: reduce returned shape {tuple(sums.shape)}, it must be {tuple(shape)}")
        good, bad = sums.unbind(1)
        enough = good >= self.target * (good + bad)
        enough = torch.cat([enough[:-1], enough.new_ones(1)])  # the last pair is taken where none suffices
        first = enough.to(torch.int32).argmax().to(old_logprobs.dtype)
        raises, _ = self._steps()
        low = self.low[0] + self.step * first.clamp(max=raises)
        high = self.high[0] + self.step * (first - raises).clamp_min(0)
        return RatioBounds(low.expand(old_logprobs.shape), high.expand(old_logprobs.shape))

    def sums(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """What good and bad tokens add to the clipped objective, for each pair of edges in the order in which they are tried.

        Args:
            log_ratio: `log r`, `(batch, time)` or `(batch, 1)`.
            advantages: A, `(batch, 1)` or `(batch, time)`.
            mask: The tokens that are used, bool or 0/1, `(batch, time)`.

        Returns:
            `(pairs, 2)`: the sum over tokens with A > 0, and less the sum over those with A < 0.
        """
        raises, widens = self._steps()
        r = log_ratio.exp()
        a = torch.where(as_mask(mask), advantages, 0.0)
        found: list[Tensor] = []
        for low, high in (self._pair(i, raises) for i in range(raises + widens + 1)):
            kept = torch.minimum(r * a, r.clamp(low, high) * a)
            found.append(torch.stack([kept.clamp_min(0).sum(), kept.clamp_max(0).sum().neg()]))
        return torch.stack(found)

    def _steps(self) -> tuple[int, int]:
        """How often the lower edge is raised, and then the upper one."""
        raises, widens = (math.floor((end - start) / self.step + 1e-9) for start, end in (self.low, self.high))
        return raises, widens

    def _pair(self, step: int, raises: int) -> tuple[float, float]:
        return self.low[0] + self.step * min(step, raises), self.high[0] + self.step * max(step - raises, 0)


@traits("without_advantage")
@stops(never)
def log_stabilized(
    log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds, *, dual: Tensor, baseline: Tensor
) -> Tensor:
    """`ρ(A - b) - λ(ρ log ρ - ρ + 1)`: the Lagrangian of a KL ball around π_old for each prompt (our own reading of QUATRO).

    `max E_π[A]  s.t.  KL(π ‖ π_old) <= δ` has the multiplier λ and the solution `ρ = exp((A - b)/λ)`, with `b = λ log Z`;
    `bandpo.groups.kl_dual` solves for both. `w = 1 - (b + λ log ρ)/A`: no gradient at the solution, sample by sample, and
    past it a pull back that a clip does not have. QUATRO (arXiv:2602.04620) describes a per-prompt KL constraint, a dual
    variable for each prompt and a log-ratio stabiliser; its printed equations could not be established, and this is not a
    reproduction of it. The bounds are not used.

    Args:
        dual: λ of each token's prompt, `(batch, 1)` or `(batch, time)`.
        baseline: b of each token's prompt, the same shape.

    Returns:
        The value of each token, in the shape of `log_ratio`.

    Examples:
        >>> half = torch.tensor([[0.5]])
        >>> log_stabilized(torch.zeros(1, 1), torch.ones(1, 1), None, dual=half, baseline=half)
        tensor([[0.5000]])
    """
    del bounds
    held = hold(log_ratio)
    r = held.exp()
    return r * (advantages - baseline) - dual * (r * held - r + 1)


def _outside_or_drawn(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds, *, value: Tensor) -> Tensor:
    """Drawn tokens have the value 0, which no other token of `A != 0` has: the draw is not repeated."""
    return outside(log_ratio, advantages, bounds) | (value == 0)


@traits("of_batch")
@stops(_outside_or_drawn)
def clip_cov(
    log_ratio: Tensor,
    advantages: Tensor,
    bounds: RatioBounds,
    *,
    logprobs: Tensor,
    mask: Tensor,
    share: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
) -> Tensor:
    """`clip`, with a few random tokens of high covariance taken out (Clip-Cov, arXiv:2505.22617).

    Among the unclipped tokens with `low < (A - mean A)(log π - mean log π) < high`, a random `share` of the batch's tokens
    (at least one) gets no gradient. The draw is torch's: seed it by `torch.manual_seed`. Means and share are those of the call,
    so micro-batches differ from the whole batch.

    Args:
        share: Share of the tokens that are drawn, between 0 and 1.
        low: Lowest covariance of a token that can be drawn.
        high: Highest covariance of a token that can be drawn.

    Returns:
        The value of each token, in the shape of `log_ratio`.

    Examples:
        >>> edge, x = RatioBounds(torch.tensor(0.8), torch.tensor(1.2)), torch.tensor([[0.0, 0.0, 0.5]])
        >>> logp = torch.tensor([[-9.0, -0.1, -1.0]])
        >>> clip_cov(x, torch.tensor([[-1.0, 1.0, 1.0]]), edge, logprobs=logp, mask=x == x, low=4.0, high=9.0)
        tensor([[0.0000, 1.0000, 1.2000]])
    """
    valid = as_mask(mask)
    a = advantages.expand(valid.shape)
    covariance = _covariance(a, logprobs, valid)
    clipped = outside(log_ratio.detach(), torch.where(a == 0, -1.0, a), bounds)  # A = 0 counts as pushed down here
    candidate = valid & ~clipped & (covariance > low) & (covariance < high)
    order = torch.where(candidate, torch.rand_like(covariance), 2.0)
    chosen = candidate & (_rank(order) < _count(valid, share))
    return clip(log_ratio, advantages, bounds).masked_fill(chosen, 0.0)


@traits("of_batch", "without_advantage")
@stops(never)
def kl_cov(
    log_ratio: Tensor,
    advantages: Tensor,
    bounds: RatioBounds,
    *,
    logprobs: Tensor,
    mask: Tensor,
    share: float = 2e-4,
    beta: float = 0.1,
) -> Tensor:
    """`r·A`, less `β|log r|` on the tokens of the highest covariance of A and log π (KL-Cov, arXiv:2505.22617).

    A `share` of the batch's tokens, at least one, is penalised. Its mean is that of the call. The bounds are not used.

    Args:
        share: Share of the tokens that are penalised, between 0 and 1.
        beta: β >= 0, in objective per nat.

    Returns:
        The value of each token, in the shape of `log_ratio`.

    Examples:
        >>> edge, x = RatioBounds(torch.tensor(0.0), torch.tensor(9.0)), torch.tensor([[0.1, 0.2]])
        >>> kl_cov(x, torch.tensor([[-1.0, 1.0]]), edge, logprobs=x - 1, mask=x == x, share=1.0)
        tensor([[-1.1152,  1.2014]])
    """
    del bounds
    valid = as_mask(mask)
    covariance = _covariance(advantages.expand(valid.shape), logprobs, valid)
    chosen = valid & (_rank(torch.where(valid, -covariance, torch.inf)) < _count(valid, share))
    return ratio(log_ratio) * advantages - torch.where(chosen, beta * log_ratio.abs(), 0.0)


def _over_budget(
    log_ratio: Tensor,
    advantages: Tensor,
    bounds: RatioBounds,
    budget: float = 0.04,
    every_token: bool = False,
    capped: bool = False,
    *,
    mask: Tensor,
) -> Tensor:
    del bounds
    x = log_ratio.detach()
    pushed = ((advantages > 0) & (x > 0)) | ((advantages < 0) & (x < 0))
    counted = as_mask(mask) if every_token else as_mask(mask) & pushed
    moment = x.square()
    return counted & (moment >= _largest_moment(moment, counted, budget, capped=capped))


@traits("of_batch")
@stops(_over_budget)
def second_moment(
    log_ratio: Tensor,
    advantages: Tensor,
    bounds: RatioBounds,
    *,
    mask: Tensor,
    budget: float = 0.04,
    every_token: bool = False,
    capped: bool = False,
) -> Tensor:
    """`r·A` without the tokens of the largest (log r)², so that the mean of the rest is in the budget (M2PO, arXiv:2510.01161).

    Only tokens that have moved to the side A pushes to (`A > 0, r > 1`, or `A < 0, r < 1`) are counted and left out. `w = 1`,
    and 0 for a token that is left out. The mean is that of the call. The bounds are not used.

    This is the rule of the text. The authors' published code has another one (`capped`). AReaL has a third (`every_token`),
    which it applies to the recomputed policy against the sampler.

    Args:
        budget: Largest mean of (log r)², at least 0; 0.04 in all runs of the paper.
        every_token: Count all used tokens, and leave out the largest on both sides.
        capped: Find the limit from the mean that is left if the larger (log r)² are set to the limit, not left out.

    Returns:
        The value of each token, in the shape of `log_ratio`.

    Examples:
        >>> edge, x = RatioBounds(torch.tensor(0.0), torch.tensor(9.0)), torch.tensor([[0.1, 0.2, 0.5, -0.9]])
        >>> second_moment(x, torch.ones(1, 1), edge, mask=x == x)
        tensor([[1.1052, 1.2214, 0.0000, 0.4066]])
    """
    over = _over_budget(log_ratio, advantages, bounds, budget, every_token, capped, mask=mask)
    return (ratio(log_ratio) * advantages).masked_fill(over, 0.0)


def _largest_moment(moment: Tensor, counted: Tensor, budget: float, *, capped: bool) -> Tensor:
    """The value that the counted entries must be below, 0-d; infinite where their mean is in the budget."""
    n = counted.sum()
    rising = torch.where(counted, moment, torch.inf).flatten().sort().values
    rank = torch.arange(len(rising), device=rising.device)
    rising = torch.where(rank < n, rising, 0.0)
    total = rising.cumsum(0)
    if capped:
        over = (total + rising * (n - 1 - rank) >= budget * n) & (rising.sum() > budget * n)
        limit = rising.roll(1).masked_fill(rank == 0, 0.0)
    else:
        over, limit = total > budget * (rank + 1), rising
    limits = limit.masked_fill(~over | (rank >= n), torch.inf)
    return torch.cat([limits, limits.new_full((1,), torch.inf)]).amin()


def _covariance(advantages: Tensor, logprobs: Tensor, valid: Tensor) -> Tensor:
    """The token's term of the covariance of A and log π."""
    n = valid.sum().clamp_min(1)
    a, x = (torch.where(valid, v, 0.0) for v in (advantages, logprobs.detach()))
    return (a - a.sum() / n) * (x - x.sum() / n)


def _rank(x: Tensor) -> Tensor:
    """0 for the smallest entry, and so on."""
    return x.flatten().argsort(stable=True).argsort().view(x.shape)


def _count(valid: Tensor, share: float) -> Tensor:
    return (valid.sum().to(torch.float32) * share).floor().clamp_min(1)
