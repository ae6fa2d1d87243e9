"""What an update did: clip, divergence and entropy statistics, pass@k, and the hosts' names for them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from bandpo._inputs import check_int
from bandpo._values import Registry
from bandpo.bounds import Band, Bounds, RatioBounds, radius_of_sides
from bandpo.divergences import FDivergence, divergence_of_two

PROB_EDGES = (1e-4, 1e-3, 1e-2, 1e-1, 0.5, 0.9, 0.99)
"""Edges of the bins of p; log-spaced where BandPO and a fixed clip differ most."""

PROB_BINS = ("<1e-4", "1e-4:1e-3", "1e-3:0.01", "0.01:0.1", "0.1:0.5", "0.5:0.9", "0.9:0.99", ">=0.99")
"""Their names, as they appear in metric keys."""

# The word clip_ratio means three things across hosts; these are the ones that mean the same as ours.
TRL_NAMES: Mapping[str, str] = Registry(
    __name__,
    "TRL_NAMES",
    {
        "clip_fraction/low": "clip_ratio/low_mean",
        "clip_fraction/high": "clip_ratio/high_mean",
        "clip_fraction/any": "clip_ratio/region_mean",
        "kl/ref": "kl",
        "entropy": "entropy",
        "loss/policy": "policy_loss",
    },
)
VERL_NAMES: Mapping[str, str] = Registry(
    __name__,
    "VERL_NAMES",
    {
        "clip_fraction/any": "actor/pg_clipfrac",
        "kl/ref": "actor/kl_loss",
        "entropy": "actor/entropy",
        "loss/policy": "actor/pg_loss",
    },
)


def policy_metrics(
    *,
    log_ratio: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    bounds: RatioBounds | Tensor,
    bounds_of: Bounds | None = None,
    entropy: Tensor | None = None,
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """Statistics of one batch over its valid tokens, as detached 0-d tensors, without a host sync.

    A token counts as clipped where its gradient is: `A > 0` and `r > upper` (high), `A < 0` and `r < lower` (low).

    * `clip_fraction/{low,high,any}` over all valid tokens; `clip_fraction_by_prob/{low,high,any}/BIN` over those of a bin of
      p = π_old (NaN: no token there) and `token_fraction_by_prob/BIN`.
    * `band/{region,saturated,cap}_fraction`: which of trust region, simplex (0 or 1/p) and `max_ratio` sets the edge on the
      side that the token's advantage pushes to; they add up to 1 over tokens with `A != 0`.
    * `band/divergence_mean`, `_max`: the token's realised binary divergence over the radius, for a `Band`.
    * `band/lower_mean`, `band/upper_mean`, `ratio/mean`, `kl/old_new` (k3), `entropy` where given.
    * `correction/weight_mean`, `correction/zero_fraction`, where there are weights.
    * `nonfinite_fraction`: tokens with a log-ratio, advantage or bound that is NaN, or an infinite log-ratio.

    Where the region only says who is inside (`TopK`), there is no edge, and the `band/` metrics are left out.

    Args:
        log_ratio: `(batch, time)`, or `(batch, 1)` at sequence level.
        old_logprobs: `(batch, time)`, the anchor.
        advantages: `(batch, 1)` or `(batch, time)`.
        mask: `(batch, time)`.
        bounds: What the surrogate was given: an interval, or whether the token is inside.
        bounds_of: The object that made them; a `Band` adds its divergence and cap.
        entropy: `(batch, time)`.
        weights: Of a correction, `(batch, time)` or `(batch, 1)`.
    """
    valid = mask != 0
    log_ratio, advantages = log_ratio.expand(valid.shape), advantages.expand(valid.shape)
    r, p = log_ratio.exp(), old_logprobs.exp()
    pushed_up, pushed_down = (advantages > 0) & valid, (advantages < 0) & valid
    strange = ~log_ratio.isfinite() | advantages.isnan()
    if isinstance(bounds, RatioBounds):
        lower, upper = (b.expand(valid.shape) for b in bounds)
        strange = strange | lower.isnan() | upper.isnan()
        low, high = pushed_down & (r < lower), pushed_up & (r > upper)
    else:
        lower = upper = None
        low, high = pushed_down & (log_ratio < 0) & ~bounds, pushed_up & (log_ratio > 0) & ~bounds
    n_low, n_high, n = _count_by_probability(low, high, valid, p)
    total = n.sum().clamp_min(1)

    def mean(x: Tensor) -> Tensor:
        return torch.where(valid, x, 0.0).sum() / total

    report = {
        "clip_fraction/low": n_low.sum() / total,
        "clip_fraction/high": n_high.sum() / total,
        "clip_fraction/any": (n_low + n_high).sum() / total,
    }
    for i, name in enumerate(PROB_BINS):
        report[f"clip_fraction_by_prob/low/{name}"] = n_low[i] / n[i]
        report[f"clip_fraction_by_prob/high/{name}"] = n_high[i] / n[i]
        report[f"clip_fraction_by_prob/any/{name}"] = (n_low[i] + n_high[i]) / n[i]
        report[f"token_fraction_by_prob/{name}"] = n[i] / total
    report |= {
        "ratio/mean": mean(r),
        "kl/old_new": mean(r - log_ratio - 1),
        "nonfinite_fraction": (strange & valid).count_nonzero() / total,
    }
    if lower is not None and upper is not None:
        report |= {"band/lower_mean": mean(lower), "band/upper_mean": mean(upper)}
        report |= _what_binds(lower, upper, p, pushed_up, pushed_down, getattr(bounds_of, "max_ratio", None))
    if isinstance(bounds_of, Band):
        used = torch.where(valid, _divergence_over_radius(bounds_of, log_ratio, old_logprobs), 0.0)
        report["band/divergence_mean"] = used.sum() / total
        report["band/divergence_max"] = used.amax() if used.numel() else used.sum()
    if entropy is not None:
        report["entropy"] = mean(entropy.detach().to(r.dtype))
    if weights is not None:
        report["correction/weight_mean"] = mean(weights)
        report["correction/zero_fraction"] = mean((weights == 0).to(r.dtype))
    return report


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` where `mask` is on; 0 for an empty mask. NaN elsewhere does not matter."""
    total = x.masked_fill(~mask, 0).sum(dtype=None if x.is_floating_point() else torch.float32)
    return total / mask.sum().clamp_min(1)


def approx_kl(log_ratio: Tensor) -> Tensor:
    """Schulman's k3 estimator `e^x - x - 1`, per token: with `x = log q - log p` and samples of `p`, of KL(p ‖ q).

    Examples:
        >>> approx_kl(torch.tensor([0.0, 0.1]))
        tensor([0.0000, 0.0052])
    """
    return log_ratio.exp() - log_ratio - 1


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


def _count_by_probability(low: Tensor, high: Tensor, valid: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped low, clipped high and all valid tokens in each bin of p, by one scatter."""
    # Counted edge by edge: a tensor of edges would be copied to the device, and the host would wait for it.
    cell = low.to(torch.int32)
    cell = (cell + 2 * high + 3 * ~valid) * len(PROB_BINS)
    for edge in PROB_EDGES:
        cell += p >= edge
    ones = torch.ones((), dtype=torch.int64, device=p.device).expand(cell.numel())
    counts = ones.new_zeros(4 * len(PROB_BINS)).index_add(0, cell.flatten(), ones).to(torch.float32)
    inside, n_low, n_high, _ = counts.view(4, -1)
    return n_low, n_high, inside + n_low + n_high


def _what_binds(
    lower: Tensor, upper: Tensor, p: Tensor, pushed_up: Tensor, pushed_down: Tensor, max_ratio: float | None
) -> dict[str, Tensor]:
    """Shares of the pushed tokens whose edge is the cap, the simplex, or the region itself."""
    # A cap is met exactly; 1/p was rounded inward and here once more by exp and by the product.
    capped = upper == max_ratio
    saturated_up = ~capped & (upper * p >= 1 - 8 * torch.finfo(p.dtype).eps)
    saturated = (pushed_up & saturated_up) | (pushed_down & (lower == 0))
    # A quotient of two integers would have torch's default dtype.
    pushed, cap, simplex = (
        x.count_nonzero().to(torch.float32) for x in (pushed_up | pushed_down, pushed_up & capped, saturated)
    )
    cap, simplex = cap / pushed.clamp_min(1), simplex / pushed.clamp_min(1)
    return {
        "band/cap_fraction": cap,
        "band/saturated_fraction": simplex,
        "band/region_fraction": (pushed > 0).to(cap.dtype) - cap - simplex,
    }


def _divergence_over_radius(band: Band, log_ratio: Tensor, old_logprobs: Tensor) -> Tensor:
    """Realised binary divergence in units of the radius of the side the ratio is on; `inf` past the simplex."""
    assert isinstance(band.divergence, FDivergence)
    down, up = radius_of_sides(band.radius)
    # r > 1/p by rounding of the two log-probs, which no policy can reach: the divergence there is that of r = 1/p.
    reached = torch.minimum(log_ratio, -old_logprobs)
    used = divergence_of_two(reached, old_logprobs, band.divergence)
    return torch.where(log_ratio < 0, used / down, used / up)
