"""What an update did: clip, divergence and entropy statistics, and pass@k."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar, cast, get_args

import torch
from torch import Tensor

from bandpo._deprecations import moved_within, warn_moved
from bandpo._eager import Fill
from bandpo._inputs import as_mask, check_int
from bandpo.bounds import Band, Bounds, Clip, RatioBounds, outside
from bandpo.bounds.band import radius_of_sides
from bandpo.divergences import FDivergence, measured_divergence
from bandpo.objective import Objective
from bandpo.reference import k3
from bandpo.surrogates.stops import stops_outside
from bandpo.surrogates.token import mask as clip_by_mask
from bandpo.terms import TokenObjective, TokenSums, UsedTokens, level_logprobs

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T", Tensor, float)

Detail = Literal["none", "basic", "full"]
"""How many statistics are computed: none, the few that everybody reads, or all of them (see `policy_metrics`)."""

EFFECTIVE_SAMPLE_SIZE = "correction/effective_sample_size"
"""Name of the metric that `policy_metrics` makes from the mean weight and the mean square."""

PROB_EDGES = (1e-4, 1e-3, 1e-2, 1e-1, 0.5, 0.9, 0.99)
"""Edges of the bins of p; log-spaced where BandPO and a fixed clip differ most."""

PROB_BINS = ("<1e-4", "1e-4:1e-3", "1e-3:0.01", "0.01:0.1", "0.1:0.5", "0.5:0.9", "0.9:0.99", ">=0.99")
"""Names of the bins of p, as they appear in metric keys."""


class PooledSum(NamedTuple):
    """A statistic that can be added up over micro-batches and ranks before it is divided: a mean of means is another number."""

    numerator: Tensor
    """Sum over the tokens that count, or their maximum; 0-d."""
    denominator: Tensor
    """Number of those tokens, 0-d; where it is 0 there is no number."""
    kind: Literal["mean", "max"] = "mean"
    """Numerators of means are added and divided by the added denominators; of maxima the largest one counts."""

    def value(self) -> Tensor:
        """The statistic; NaN where no token counts."""
        if self.kind == "mean":
            return self.numerator / self.denominator
        return torch.where(self.denominator > 0, self.numerator, torch.nan)


def _accepts_old_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """The statistics were called with nine keywords up to bandpo 0.1; these still work, with a warning."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "log_ratio" not in kwargs:
            return function(*args, **kwargs)
        given = dict(kwargs)
        entropy = given.pop("entropy", None)
        warn_moved(
            f"{function.__name__}(log_ratio=..., ...)", f"{function.__name__}(terms), terms from token_objective"
        )
        return cast("Callable[..., R]", function)(_terms_of_a_clip(**cast("Any", given)), entropy=entropy)

    return call


@_accepts_old_keywords
def policy_metrics(
    terms: TokenObjective, *, entropy: Tensor | None = None, detail: Detail = "full"
) -> dict[str, Tensor]:
    """Statistics of one batch over its valid tokens, as detached 0-d tensors, without a host sync.

    The basic ones cost a few passes over the tokens:

    * `clip_fraction/{low,high,any}`: the share of tokens with `A != 0` whose gradient the surrogate takes away, with a ratio
      below 1 (low) or above 1 (high), over all valid tokens. Left out where `terms.stopped` is None. A ratio that is held at
      e^±40, and a weight of 0 of a correction, do not count.
    * `ratio/mean`, `kl/old_new` (k3), `entropy` where given.
    * `projection/fraction`, `projection/kl_mean`: the share of projected positions and the mean KL after the projection, for
      `bandpo.surrogates.Projected`.
    * `correction/weight_mean`, `weight_square_mean`, `zero_fraction`, where there are weights: those of the correction, times
      those of the filters. `correction/effective_sample_size` is the square of the first over the second (Kish).
    * `filter/kept_fraction`, `filter/kept_sequence_fraction`, where there are filters: the share of tokens that they keep, and
      of sequences with such a token.
    * `nonfinite_fraction`: the share of valid tokens that are in no other statistic, because a log-prob, log-ratio, advantage
      or bound is NaN or infinite.

    The full set has also:

    * `clip_fraction_by_prob/{low,high,any}/BIN` over the tokens of a bin of p = π_old, and `token_fraction_by_prob/BIN`.
    * `outside_fraction/{low,high,any}`: the share of tokens outside the region on the side that A pushes to, see
      `bandpo.bounds.outside`. It is the clip fraction of a clip, and another number for surrogates that keep a gradient there.
    * `band/{region,saturated,cap}_fraction`: which of trust region, simplex (0 or 1/p) and `max_ratio` sets the edge on the
      side that the token's advantage pushes to; they add up to 1 over tokens with `A != 0`.
    * `band/divergence_mean`, `_max`: the token's realised binary divergence over the radius, for a `Band`. It is finite:
      probabilities that float32 cannot tell from 1 count as 1 - 2^-25 (`bandpo.divergences.measured_divergence`).
    * `band/lower_mean`, `band/upper_mean`.

    A statistic over no token at all is NaN. Where the region only says who is inside (`TopK`), there is no edge, and the
    `band/` metrics are left out.

    Args:
        terms: The result of `token_objective`.
        entropy: Entropy of each token in nats, `(batch, time)`.
        detail: "basic" or "full" as above; "none" gives an empty dict.

    Returns:
        Metrics by name, float 0-d tensors.

    Raises:
        ValueError: If `detail` is none of the three, or "full" with terms of `token_objective(both_edges=False)`.

    Examples:
        >>> from bandpo import OBJECTIVES, token_objective
        >>> terms = token_objective(
        ...     OBJECTIVES["grpo"], logprobs=torch.tensor([[-1.0, -1.5]]), old_logprobs=torch.tensor([[-1.0, -2.0]]),
        ...     advantages=torch.ones(1), mask=torch.ones(1, 2),
        ... )
        >>> policy_metrics(terms)["clip_fraction/high"]
        tensor(0.5000)
    """
    found = _values(policy_sums(terms, entropy=entropy, detail=detail))
    if "correction/weight_mean" in found:
        found[EFFECTIVE_SAMPLE_SIZE] = effective_size(
            found["correction/weight_mean"], found["correction/weight_square_mean"]
        )
    return found


@_accepts_old_keywords
def policy_sums(
    terms: TokenObjective, *, entropy: Tensor | None = None, detail: Detail = "full"
) -> dict[str, PooledSum]:
    """The statistics of `policy_metrics` before their division, so that parts of a batch add up to the whole.

    Args:
        terms: The result of `token_objective`.
        entropy: Entropy of each token in nats, `(batch, time)`.
        detail: "basic" or "full" as in `policy_metrics`; "none" gives an empty dict.

    Returns:
        Numerator and denominator of each statistic, detached, without a host sync.

    Raises:
        ValueError: If `detail` is none of the three, or "full" with terms of `token_objective(both_edges=False)`.

    Examples:
        >>> from bandpo import OBJECTIVES, token_objective
        >>> x = torch.zeros(1, 2)
        >>> terms = token_objective(OBJECTIVES["grpo"], logprobs=x, old_logprobs=x, advantages=x[:, 0], mask=x == 0)
        >>> policy_sums(terms)["ratio/mean"]
        PooledSum(numerator=tensor(2.), denominator=tensor(2.), kind='mean')
    """
    if detail not in get_args(Detail):
        raise ValueError(f"detail of the metrics: got {detail!r}; choose one of {', '.join(get_args(Detail))}")
    if detail == "full" and isinstance(terms.bounds, Tensor) and terms.bounds.is_floating_point():
        raise ValueError(
            "the full metrics need both edges, and these terms have one for each token; use token_objective(both_edges=True) "
            'or detail="basic"'
        )
    if detail == "none":
        return {}
    if detail == "basic" and terms.sums is not None and _belong(terms.sums, terms):
        return _of_kernel(terms.sums, terms, entropy)
    valid = terms.mask
    fill = _fill(terms)
    used = fill.mask
    count, total = _number(used), _number(valid)

    def mean(x: Tensor) -> PooledSum:
        return PooledSum(fill(x).sum(), count)

    log_ratio = terms.log_ratio.detach().expand(valid.shape)
    r = log_ratio.exp() if terms.ratio is None else terms.ratio.expand(valid.shape)
    sums = _clips(terms, used, count) if detail == "basic" else _by_probability(terms, used, r)
    sums |= {
        "ratio/mean": mean(r),
        "kl/old_new": PooledSum(fill.own((r - log_ratio).sub_(1)).sum(), count),
        "nonfinite_fraction": PooledSum(total - count, total),
    }
    if detail == "full":
        sums |= _of_region(terms, fill, count)
    ball = terms.objective.projection
    if terms.divergence is not None and ball is not None:
        sums["projection/fraction"] = mean((terms.divergence > ball.radius).to(r.dtype))
        sums["projection/kl_mean"] = mean(terms.divergence.clamp(max=ball.radius).to(r.dtype))
    if entropy is not None:
        sums["entropy"] = mean(entropy.detach().to(r.dtype))
    return sums | _of_weights(terms, fill, count)


def _fill(terms: TokenObjective) -> Fill:
    """Sets to 0 what is not in the statistics; its mask is True for the tokens that are."""
    bounds = terms.bounds
    if not isinstance(bounds, RatioBounds) or type(terms.objective.bounds) is Clip:
        if terms.used is not None and _belong(terms.used, terms):
            return terms.used.fill
        return Fill(terms.mask > terms.nonfinite)
    # Not where an edge is NaN. Edges that are crossed are an empty interval, outside of which each token is.
    return Fill((terms.mask > terms.nonfinite) & (bounds.lower + bounds.upper >= -torch.inf))


def _belong(found: TokenSums | UsedTokens, terms: TokenObjective) -> bool:
    """Whether what was found belongs to these terms: an adapter may have left out more tokens since."""
    return found.mask is terms.mask and found.nonfinite is terms.nonfinite


def _of_kernel(sums: TokenSums, terms: TokenObjective, entropy: Tensor | None) -> dict[str, PooledSum]:
    """The basic statistics from what the kernel has added up; a clip has neither a projection nor a correction."""
    count, total = sums.tokens, _number(terms.mask)
    found = {
        "clip_fraction/low": PooledSum(sums.stopped - sums.stopped_above, count),
        "clip_fraction/high": PooledSum(sums.stopped_above, count),
        "clip_fraction/any": PooledSum(sums.stopped, count),
        "ratio/mean": PooledSum(sums.ratio, count),
        "kl/old_new": PooledSum(sums.k3, count),
        "nonfinite_fraction": PooledSum(total - count, total),
    }
    if entropy is None and terms.weights is None and terms.filter_weights is None:
        return found
    fill = _fill(terms)
    if entropy is not None:
        found["entropy"] = PooledSum(fill(entropy.detach().to(sums.ratio.dtype)).sum(), count)
    return found | _of_weights(terms, fill, count)


def _values(sums: Mapping[str, PooledSum]) -> dict[str, Tensor]:
    """The value of each statistic, the means by one division."""
    means = {name: statistic for name, statistic in sums.items() if statistic.kind == "mean"}
    if not means:
        return {name: statistic.value() for name, statistic in sums.items()}
    wide = torch.float64 if any(s.numerator.dtype == torch.float64 for s in means.values()) else torch.float32
    above, below = (
        torch.stack([x.to(wide) for x in column]) for column in zip(*[s[:2] for s in means.values()], strict=True)
    )
    # A count over a count is a float32, also beside sums in float64.
    dtypes = [(s.numerator if s.numerator.is_floating_point() else s.denominator).dtype for s in means.values()]
    quotients = {name: x.to(d) for name, x, d in zip(means, (above / below).unbind(), dtypes, strict=True)}
    return {name: quotients[name] if name in quotients else statistic.value() for name, statistic in sums.items()}


def _number(flags: Tensor) -> Tensor:
    """How many are True, 0-d float32."""
    return flags.count_nonzero().to(torch.float32)


def _of_region(terms: TokenObjective, fill: Fill, count: Tensor) -> dict[str, PooledSum]:
    """Edges, what sets them, and the realised divergence of a band."""
    sums: dict[str, PooledSum] = {}
    bounds, region, used = terms.bounds, terms.objective.bounds, fill.mask
    shape = used.shape
    # An edge is set at the level of the ratio.
    of_region = level_logprobs(terms.objective, terms.anchor_logprobs, terms.mask & ~terms.nonfinite)
    if isinstance(bounds, RatioBounds):
        bounds = RatioBounds(bounds.lower.expand(shape), bounds.upper.expand(shape))
        sums |= {
            f"band/{side}_mean": PooledSum(fill(getattr(bounds, side)).sum(), count) for side in ("lower", "upper")
        }
        advantages = terms.advantages.expand(shape)
        pushed = (advantages > 0) & used, (advantages < 0) & used
        sums |= _what_binds(bounds, of_region.exp(), *pushed, getattr(region, "max_ratio", None))
    if isinstance(region, Band):
        log_ratio = terms.log_ratio.detach().expand(shape)
        spent = fill(_divergence_over_radius(region, log_ratio, of_region))
        sums["band/divergence_mean"] = PooledSum(spent.sum(), count)
        sums["band/divergence_max"] = PooledSum(spent.amax() if spent.numel() else spent.sum(), count, "max")
    return sums


def _of_weights(terms: TokenObjective, fill: Fill, count: Tensor) -> dict[str, PooledSum]:
    """Weights for the sampler's mismatch, and what the filters keep."""
    sums: dict[str, PooledSum] = {}
    weights, filters = terms.weights, terms.filter_weights
    if filters is not None:
        weights = filters if weights is None else weights * filters
        kept, used = fill.mask & (filters > 0), fill.mask
        sums["filter/kept_fraction"] = PooledSum(_number(kept), count)
        sums["filter/kept_sequence_fraction"] = PooledSum(_number(kept.any(-1)), _number(used.any(-1)))
    if weights is not None:
        parts = {
            "weight_mean": weights,
            "weight_square_mean": weights.square(),
            "zero_fraction": (weights == 0).to(weights.dtype),
        }
        sums |= {f"correction/{name}": PooledSum(fill(x).sum(), count) for name, x in parts.items()}
    return sums


def effective_size(mean: T, square_mean: T) -> T:
    """Kish's effective sample size over the number of weights, `(Σw)²/(n Σw²)`, from pooled means; NaN where each weight is 0.

    It is no sum itself, so `policy_sums` has the two means that it is made from.

    Args:
        mean: The mean of the weights, a 0-d tensor or a number.
        square_mean: The mean of their squares.

    Examples:
        >>> effective_size(0.5, 0.5)
        0.5
    """
    if isinstance(square_mean, Tensor):
        return mean * mean / square_mean
    return mean * mean / square_mean if square_mean else math.nan


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` where `mask` is on, 0-d; NaN for an empty mask. A NaN of `x` elsewhere does not matter.

    Args:
        x: Numbers or bools, any shape.
        mask: Bool, the same shape.

    Examples:
        >>> masked_mean(torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([True, True, False]))
        tensor(2.)
    """
    total = x.masked_fill(~mask, 0).sum(dtype=None if x.is_floating_point() else torch.float32)
    return total / mask.sum()


def approx_kl(log_ratio: Tensor) -> Tensor:
    """Schulman's k3 estimator `e^x - x - 1`, per token: with `x = log q - log p` and samples of `p`, of KL(p ‖ q).

    `x` is held within ±40; beyond, it has no gradient.

    Args:
        log_ratio: `x`, any shape.

    Returns:
        A tensor of the shape of `log_ratio`, in nats.

    Examples:
        >>> approx_kl(torch.tensor([0.0, 0.1]))
        tensor([0.0000, 0.0052])
    """
    return k3(log_ratio)


def pass_at_k(n: int, c: Tensor | int, k: int) -> Tensor:
    """Unbiased pass@k of a prompt with `c` of `n` samples right, `1 - C(n-c, k) / C(n, k)` (arXiv:2107.03374, eq. 1).

    Args:
        n: Samples per prompt.
        c: Right ones, an int or an integer tensor of any shape.
        k: Draws without replacement, `1 <= k <= n`.

    Returns:
        float64 tensor of the shape of `c`.

    Raises:
        ValueError: If `k` is not in `[1, n]` or `c` not in `[0, n]`.

    Examples:
        >>> pass_at_k(8, torch.tensor([0, 1, 8]), 4)
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    check_int("n", n)
    check_int("k", k)
    if not 1 <= k <= n:
        raise ValueError(f"pass_at_k: k must be between 1 and the number of samples n={n}, got k={k}")
    right = torch.as_tensor(c, dtype=torch.float64)
    if ((right < 0) | (right > n)).any():
        raise ValueError(f"pass_at_k: the number of right samples must be between 0 and n={n}, got {c}")
    all_wrong = torch.ones_like(right)
    for i in range(k):  # C(n-c, k) / C(n, k) as a product of ratios: no big binomials
        all_wrong = all_wrong * ((n - right - i) / (n - i)).clamp_min(0)
    return 1 - all_wrong


def pass_at_powers(right: Tensor, samples: Tensor, largest: int) -> dict[str, float]:
    """Mean unbiased pass@j over prompts for j = 1, 2, 4 … up to `largest`, with `pass_at_k`.

    Args:
        right: `(prompts,)` integers, the number of right samples of each prompt.
        samples: `(prompts,)` integers, the number of samples of each prompt; a prompt with fewer than j has no part in pass@j.
        largest: The largest j, where it is a power of two.

    Returns:
        `{"pass@1": mean, "pass@2": mean, ...}`; NaN where no prompt has j samples.

    Examples:
        >>> pass_at_powers(torch.tensor([0, 1, 2]), torch.tensor([4, 4, 2]), 4)
        {'pass@1': 0.4166666666666667, 'pass@2': 0.5, 'pass@4': 0.5}
    """
    report: dict[str, float] = {}
    j = 1
    while j <= largest:
        enough = samples >= j
        counts = cast("list[int]", samples[enough].unique().tolist())
        each = [pass_at_k(n, right[enough & (samples == n)], j) for n in counts]
        report[f"pass@{j}"] = torch.cat(each).mean().item() if each else math.nan
        j *= 2
    return report


def _clips(terms: TokenObjective, used: Tensor, count: Tensor) -> dict[str, PooledSum]:
    """Shares of tokens whose gradient is taken away."""
    if terms.stopped is None:
        return {}
    known = terms.used is not None and terms.used.fill.mask is used  # and what is not used is not stopped
    stopped = terms.stopped if known else terms.stopped & used
    high, both = _number(stopped & _above(terms)), _number(stopped)
    return {
        "clip_fraction/low": PooledSum(both - high, count),
        "clip_fraction/high": PooledSum(high, count),
        "clip_fraction/any": PooledSum(both, count),
    }


def _above(terms: TokenObjective) -> Tensor:
    """Whether a token's ratio counts as above 1."""
    log_ratio = terms.log_ratio.detach()
    if stops_outside(terms.objective.surrogate):
        return log_ratio > 0
    # What is outside lies on the side that A pushes to; another rule may stop a ratio of exactly 1.
    return (log_ratio > 0) | ((log_ratio == 0) & (terms.advantages > 0))


def _by_probability(terms: TokenObjective, used: Tensor, r: Tensor) -> dict[str, PooledSum]:
    """Shares of stopped tokens and of tokens outside, and of all tokens in the bins of p."""
    log_ratio, advantages = terms.log_ratio.detach().expand(used.shape), terms.advantages.expand(used.shape)
    stopped = terms.stopped
    # A clip stops exactly what is outside, and that has been computed.
    same = stopped is not None and stops_outside(terms.objective.surrogate)
    left = stopped if stopped is not None and same else outside(log_ratio, advantages, terms.bounds, ratio=r)
    above = _above(terms).expand(used.shape)
    counted = (left if stopped is None else stopped) & used
    n_low, n_high, n = _count_by_probability(counted, counted & above, used, terms.anchor_logprobs.exp())
    count = n.sum()
    sums: dict[str, PooledSum] = {}
    if stopped is not None:
        sums |= {
            "clip_fraction/low": PooledSum(n_low.sum(), count),
            "clip_fraction/high": PooledSum(n_high.sum(), count),
            "clip_fraction/any": PooledSum((n_low + n_high).sum(), count),
        }
    for i, name in enumerate(PROB_BINS):
        if stopped is not None:
            sums[f"clip_fraction_by_prob/low/{name}"] = PooledSum(n_low[i], n[i])
            sums[f"clip_fraction_by_prob/high/{name}"] = PooledSum(n_high[i], n[i])
            sums[f"clip_fraction_by_prob/any/{name}"] = PooledSum(n_low[i] + n_high[i], n[i])
        sums[f"token_fraction_by_prob/{name}"] = PooledSum(n[i], count)
    if same or stopped is None:
        low, high = n_low.sum(), n_high.sum()
    else:
        left = left & used
        high = (left & above).count_nonzero().to(torch.float32)
        low = left.count_nonzero().to(torch.float32) - high
    sums["outside_fraction/low"] = PooledSum(low, count)
    sums["outside_fraction/high"] = PooledSum(high, count)
    sums["outside_fraction/any"] = PooledSum(low + high, count)
    return sums


def _count_by_probability(counted: Tensor, above: Tensor, valid: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counted tokens with a ratio below 1, those above 1, and all valid tokens, in each bin of p, by one scatter."""
    # Counted edge by edge: a tensor of edges would be copied to the device, and the host would wait for it.
    cell = counted.to(torch.int32)
    cell = (cell + above + 3 * ~valid) * len(PROB_BINS)
    for edge in PROB_EDGES:
        cell += p >= edge
    ones = torch.ones((), dtype=torch.int64, device=p.device).expand(cell.numel())
    counts = ones.new_zeros(4 * len(PROB_BINS)).index_add(0, cell.flatten(), ones).to(torch.float32)
    inside, n_low, n_high, _ = counts.view(4, -1)
    return n_low, n_high, inside + n_low + n_high


def _what_binds(
    bounds: RatioBounds, p: Tensor, pushed_up: Tensor, pushed_down: Tensor, max_ratio: float | None
) -> dict[str, PooledSum]:
    """The pushed tokens whose edge is the cap, the simplex, or the region itself."""
    # A cap is met exactly; 1/p was rounded inward and here once more by exp and by the product.
    capped = bounds.upper == max_ratio
    saturated_up = ~capped & (bounds.upper * p >= 1 - 8 * torch.finfo(p.dtype).eps)
    pushed = (pushed_up | pushed_down).count_nonzero().to(torch.float32)
    cap = (pushed_up & capped).count_nonzero()
    saturated = ((pushed_up & saturated_up) | (pushed_down & (bounds.lower == 0))).count_nonzero()
    return {
        "band/cap_fraction": PooledSum(cap, pushed),
        "band/saturated_fraction": PooledSum(saturated, pushed),
        "band/region_fraction": PooledSum(pushed - cap - saturated, pushed),
    }


def _divergence_over_radius(band: Band, log_ratio: Tensor, old_logprobs: Tensor) -> Tensor:
    """Realised binary divergence in units of the radius of the side the ratio is on; finite, see `measured_divergence`."""
    assert isinstance(band.divergence, FDivergence)
    down, up = radius_of_sides(band.radius)
    used = measured_divergence(log_ratio, old_logprobs, band.divergence)
    return torch.where(log_ratio < 0, used / down, used / up)


def _terms_of_a_clip(
    *,
    log_ratio: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    bounds: RatioBounds | Tensor,
    bounds_of: Bounds | None = None,
    weights: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> TokenObjective:
    """The terms of an objective that takes the gradient from tokens outside, which the old keywords took for granted."""
    valid = as_mask(mask)
    strange = ~log_ratio.isfinite() | ~advantages.isfinite() | old_logprobs.isnan()
    left_out = strange.expand(valid.shape) if nonfinite is None else strange | nonfinite
    stopped = outside(log_ratio.detach(), advantages, bounds) & valid
    value = torch.where(valid & ~left_out, clip_by_mask(log_ratio, advantages, bounds), 0.0)
    objective = Objective(bounds=bounds_of or Clip(), surrogate=clip_by_mask)
    return TokenObjective(
        value, log_ratio, bounds, old_logprobs, advantages, weights, left_out, stopped, valid, objective
    )


__getattr__ = moved_within(__name__, {name: f"monitoring.names.{name}" for name in ("TRL_NAMES", "VERL_NAMES")})
