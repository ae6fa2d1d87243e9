"""Surrogates that look at the whole sequence of a token: GMPO, TOPR, VESPO, FIPO and PMD-mean.

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

import torch
from torch import Tensor

from bandpo._deprecations import moved_within
from bandpo._inputs import as_mask, traits
from bandpo.bounds import RatioBounds, outside
from bandpo.surrogates.stops import never, stops
from bandpo.surrogates.token import dual_clip, ratio

__getattr__ = moved_within(__name__, {"clip_cov": "experimental.clip_cov", "kl_cov": "experimental.kl_cov"})

_HELD = 20.0  # VESPO and FIPO hold the log-ratio of a token within ±20


def _outside_in_logs(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds) -> Tensor:
    """The rule of `outside` with both sides as logarithms, as the surrogate compares them."""
    return outside(log_ratio, advantages, RatioBounds(bounds.lower.log(), bounds.upper.log()), ratio=log_ratio)


@stops(_outside_in_logs)
def geometric_mean(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds, *, mask: Tensor) -> Tensor:
    """`exp(mean_t c_t)·A`, `c_t` the log-ratio clamped on the side A pushes to (GMPO, arXiv:2507.20673, eq. 4).

    One value for a sequence where it has one advantage. With advantages per token, a token's value is the geometric mean times
    its own advantage, with the gradient of that product, as in GSPO-token (arXiv:2507.18071, sec. 4.3). The bounds are
    `[e^-ε, e^ε]`; `w` of `clip` times the geometric mean over `r`.

    Returns:
        `(batch, 1)` for one advantage per sequence, else `(batch, time)`.

    Examples:
        >>> edge = RatioBounds(torch.tensor(0.5), torch.tensor(2.0))
        >>> x = torch.tensor([[4.0, 0.25]]).log()
        >>> geometric_mean(x, torch.ones(1, 1), edge, mask=torch.ones(1, 2))
        tensor([[0.7071]])
    """
    valid = as_mask(mask)
    count = valid.sum(-1, keepdim=True).clamp_min(1)
    clamped = log_ratio.clamp(bounds.lower.log(), bounds.upper.log())
    pessimistic = torch.where(advantages < 0, torch.maximum(log_ratio, clamped), torch.minimum(log_ratio, clamped))
    own = torch.where(valid, pessimistic, 0.0)
    mean = own.sum(-1, keepdim=True) / count
    if advantages.shape[-1] == 1:
        return ratio(mean) * torch.where(valid, advantages, 0.0).sum(-1, keepdim=True) / count
    return ratio(mean.detach() + own - own.detach()) * advantages


@stops(never)
def tapered(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds, *, logprobs: Tensor, mask: Tensor) -> Tensor:
    """`A·log π` for A >= 0, `min(ρ, 1)·A·log π` for A < 0, ρ the sequence's product ratio (TOPR, arXiv:2503.14286).

    Good sequences are imitated however unlikely they have become; bad ones weigh less as they vanish. Equation 8 of the paper,
    known to us from two secondary sources that agree. The bounds are not used.

    Returns:
        The value of each token, `(batch, time)`.

    Examples:
        >>> edge, one = RatioBounds(torch.tensor(0.0), torch.tensor(9.0)), torch.ones(1, 2)
        >>> tapered(torch.tensor([[0.5, 0.5]]).log(), -one, edge, logprobs=-one, mask=one)
        tensor([[0.2500, 0.2500]])
    """
    del bounds
    whole = _log_product(log_ratio, mask)
    return torch.where(advantages < 0, whole.clamp(max=0.0).exp(), 1.0) * advantages * logprobs


@stops(never)
def gamma_weighted(
    log_ratio: Tensor,
    advantages: Tensor,
    bounds: RatioBounds,
    *,
    logprobs: Tensor,
    mask: Tensor,
    positive: tuple[float, float] = (2.0, 3.0),
    negative: tuple[float, float] = (3.0, 2.0),
) -> Tensor:
    """`sg(φ(W))·A·log π` with `φ(W) = W^k e^(λ(1 - W))`, W the sequence's product ratio (VESPO, arXiv:2602.10693).

    φ is 1 on policy, has its maximum at `W = k/λ`, and falls to 0 on both sides, so that no sequence weighs much more than
    one on policy. As in the authors' code and in TRL, log r is held within ±20 for each token and log W within
    [log 1e-8, 20]. `w = φ(W)/r`. The bounds are not used. A `correction` of the objective multiplies φ; in the authors'
    code it is part of W.

    Args:
        positive: k and λ for `A >= 0`, both positive.
        negative: k and λ for `A < 0`, both positive.

    Returns:
        The value of each token, `(batch, time)`.

    Raises:
        ValueError: If `log_ratio` is not that of tokens.

    Examples:
        >>> edge, one = RatioBounds(torch.tensor(0.0), torch.tensor(9.0)), torch.ones(1, 2)
        >>> gamma_weighted(torch.tensor([[0.5, -0.5]]), one, edge, logprobs=-one, mask=one)
        tensor([[-1., -1.]])
        >>> gamma_weighted(torch.tensor([[0.5, 0.5]]), one, edge, logprobs=-one, mask=one)
        tensor([[-0.0426, -0.0426]])
    """
    del bounds
    log_w = _log_product(log_ratio.clamp(-_HELD, _HELD), mask).clamp(math.log(1e-8), _HELD)
    k, rate = (
        torch.where(advantages < 0, torch.full_like(advantages, bad), good)
        for good, bad in zip(positive, negative, strict=True)
    )
    return (rate + k * log_w - rate * log_w.exp()).exp() * advantages * logprobs


def _exploded(log_ratio: Tensor, advantages: Tensor, mask: Tensor, c: float) -> Tensor:
    """Tokens that the dual clip stops."""
    return as_mask(mask) & (advantages < 0) & (ratio(log_ratio) > c)


def _outside_or_exploded(
    log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds, c: float = 10.0, limit: float = 1.0, *, mask: Tensor
) -> Tensor:
    exploded = _exploded(log_ratio, advantages, mask, c)
    return outside(log_ratio, advantages, bounds) | exploded | (exploded.sum(-1, keepdim=True) > limit)


@stops(_outside_or_exploded)
def future_weighted(
    log_ratio: Tensor,
    advantages: Tensor,
    bounds: RatioBounds,
    *,
    mask: Tensor,
    half_life: float = 32.0,
    low: float = 1.0,
    high: float = 1.2,
    safe: float = 10.0,
    c: float = 10.0,
    limit: float = 1.0,
) -> Tensor:
    """`dual_clip`, each token weighed by how the tokens from it on have moved since sampling (FIPO, arXiv:2603.19835).

    `f_t = clamp(exp(Σ_{k >= t} γ^(k-t) log r_k), low, high)` with `γ = 2^(-1/half_life)`, a constant of the update. The sum is
    over the used tokens whose ratio is at most c, each log r held within ±20; `k - t` counts all positions between, used or
    not, as the authors' code and ms-swift do. For `A < 0, r > safe` the weight is held within [0.8, 1]. A sequence with more
    than `limit` tokens that the dual clip stops has no gradient; here it keeps its place in the denominators. `w` of
    `dual_clip`, times f. The defaults are those of the authors' 32B run; ms-swift has `safe = 4`, no `limit`, and `low = 0.8`
    as an option.

    Args:
        half_life: Tokens after which the weight of a later token is halved, positive and finite.
        low: Smallest f, at least 0.
        high: Largest f.
        safe: Ratio of a token of `A < 0` above which it is not weighed more than 1.
        c: Ratio above which a token of `A < 0` stops, and above which no token is in the sum; at least 1.
        limit: Number of stopped tokens (`A < 0, r > c`) that a sequence may have; infinite for any number.

    Returns:
        The value of each token, `(batch, time)`.

    Raises:
        ValueError: If `half_life` is not a positive, finite number, or `log_ratio` is not that of tokens.

    Examples:
        >>> edge, one = RatioBounds(torch.tensor(0.0), torch.tensor(9.0)), torch.ones(1, 2)
        >>> future_weighted(torch.tensor([[0.0, 0.1]]), one, edge, mask=one, half_life=1.0)
        tensor([[1.0513, 1.2214]])
    """
    if not 0 < half_life < math.inf:
        raise ValueError(f"future_weighted: half_life must be a positive, finite number of tokens, got {half_life}")
    valid = _of_tokens(log_ratio, mask)
    r = ratio(log_ratio).detach()
    drift = torch.where(valid & (r <= c), log_ratio.detach().clamp(-_HELD, _HELD), 0.0)
    weight = _discounted(drift, half_life).exp().clamp(low, high)
    weight = torch.where((advantages < 0) & (r > safe), weight.clamp(0.8, 1.0), weight)
    left_out = _exploded(log_ratio, advantages, valid, c).sum(-1, keepdim=True) > limit
    return (weight * dual_clip(log_ratio, advantages, bounds, c)).masked_fill(left_out, 0.0)


@traits("without_advantage")
@stops(never)
def mirror_descent(
    log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds, *, mask: Tensor, tau: float = 0.01
) -> Tensor:
    """`Aℓ - τℓ²/2`, `ℓ = Σ_t log r_t`: regression of the sequence's log-ratio on A/τ (PMD-mean, arXiv:2602.05933).

    It is `-τ(A/τ - ℓ)²/2` without a constant of the policy: the loss of Kimi k1.5 (arXiv:2501.12599, eq. 3), in which the
    mean reward of a prompt takes the place of the log-partition. The value is spread over the tokens of a sequence, so that
    their sum is that of the sequence, and a mean over tokens divides it by the length, as in the authors' code. The gradient
    of a token is `(A - τℓ)∇log π`, with its own A where advantages are per token: `w = (1 - τℓ/A)/r`. The bounds are not
    used.

    Args:
        tau: τ >= 0, in advantage per nat of a sequence; 0.01 in the authors' runs with rewards of 0 and 1.

    Returns:
        The value of each token, `(batch, time)`.

    Raises:
        ValueError: If `log_ratio` is not that of tokens.

    Examples:
        >>> edge, one = RatioBounds(torch.tensor(0.0), torch.tensor(9.0)), torch.ones(1, 2)
        >>> mirror_descent(torch.tensor([[0.5, 1.5]]), one, edge, mask=one, tau=0.1)
        tensor([[0.4500, 1.3500]])
    """
    del bounds
    pull = tau * _log_product(log_ratio, mask)
    # The value takes half of the pull, whose gradient is whole: ℓ is a square's factor.
    return (advantages - pull) * log_ratio + 0.5 * pull * log_ratio.detach()


def _of_tokens(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """The mask as bool; a log-ratio of sequences, which has no tokens to add up, is refused."""
    valid = as_mask(mask)
    if log_ratio.shape != valid.shape:
        raise ValueError(
            f"log_ratio has shape {tuple(log_ratio.shape)} and the mask {tuple(valid.shape)}: this surrogate adds up the "
            "log-ratios of a sequence itself; use it with ratio_level='token'"
        )
    return valid


def _log_product(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """`log Π_t r_t` of each sequence, `(batch, 1)`, without gradient."""
    return torch.where(_of_tokens(log_ratio, mask), log_ratio, 0.0).sum(-1, keepdim=True).detach()


def _discounted(x: Tensor, half_life: float) -> Tensor:
    """`Σ_{k >= t} 2^(-(k-t)/half_life) x_k` along the last dimension.

    Windows that double, until what is beyond weighs 2^-64: the number of passes does not depend on the length.
    """
    places, shift = torch.arange(x.shape[-1], device=x.device), 1
    while shift < 64 * half_life:
        later = places + shift
        beyond = later >= x.shape[-1]
        x = x + 2.0 ** (-shift / half_life) * x[:, later.masked_fill(beyond, 0)].masked_fill(beyond, 0.0)
        shift *= 2
    return x
