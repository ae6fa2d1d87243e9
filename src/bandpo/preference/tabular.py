"""Finite policies: exact optima for every link, concentrability, and the preference fit of a linear softmax policy."""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from bandpo._inputs import check_tensor, check_values
from bandpo.preference._checks import (
    check_features,
    check_finite,
    check_logprobs,
    check_number,
    check_same_shape,
    check_weights,
)
from bandpo.preference.links import CHI2_KL, LOG, Link

_BISECTIONS = 200  # of Z in `tabular_optimum`
_NEWTON, _HALVINGS, _RIDGE_BISECTIONS = 30, 8, 40  # in `fit_pairs`
_LOG_RIDGES = math.log(1e-9), math.log(1e3)  # the range of the ridge's weight in `fit_pairs`

_solve = cast("Any", torch.linalg).solve  # has no types in torch's stubs


def tabular_optimum(rewards: Tensor, ref_logprobs: Tensor, *, beta: float | Tensor, link: Link = CHI2_KL) -> Tensor:
    """Log-probs of the policy that maximises `E_π[r] - β D_f(π ‖ π_ref)`, with `f' = φ`.

    The optimum is `π = π_ref φ⁻¹((r - Z)/β)`, with Z by bisection; for χPO, φ⁻¹ is Lambert's W (arXiv:2407.13399, eq. 7 and
    lemma F.2), and for `LOG` the optimum is π_ref exp(r/β) normalised.

    Args:
        rewards: Reward of each action, `(..., actions)`.
        ref_logprobs: Log-probs of the reference, the same shape; -inf is an action that the reference never takes.
        beta: β > 0; a tensor broadcasts with the leading dimensions of `rewards`.
        link: The link φ.

    Returns:
        Log-probs in float64, `(..., actions)`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `beta` is not positive and finite, shapes differ, a reward is not finite, or the reference has no action.

    Examples:
        >>> r, uniform = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]).log()
        >>> tabular_optimum(r, uniform, beta=0.1).exp()
        tensor([9.9967e-01, 3.3490e-04], dtype=torch.float64)
    """
    check_same_shape("rewards", rewards, "ref_logprobs", ref_logprobs)
    if isinstance(beta, Tensor):
        check_values((beta > 0) & beta.isfinite(), beta, "beta must be positive and finite")
    else:
        check_number("beta", beta, low=0, open_low=True)
    if not isinstance(link, Link):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"link must be a Link (see bandpo.preference.as_link), got {link!r}")
    check_finite("rewards", rewards)
    check_logprobs("ref_logprobs", ref_logprobs)
    check_values(~ref_logprobs.isinf().all(-1), ref_logprobs[..., 0], "the reference must have an action in each row")
    r, ref = rewards.to(torch.float64), ref_logprobs.to(torch.float64)
    beta = torch.as_tensor(beta, dtype=torch.float64).unsqueeze(-1)
    if link is LOG:
        return (ref + r / beta).log_softmax(-1)
    at_one = beta * link(torch.zeros((), dtype=torch.float64))
    # At Z = max r - βφ(1) no ratio exceeds 1, at min r - βφ(1) none is below: the mass falls from >= 1 to <= 1 between them.
    low, high = r.amin(-1, keepdim=True) - at_one, r.amax(-1, keepdim=True) - at_one  # broadcast with beta
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        too_much = _policy(r, ref, middle, beta, link).logsumexp(-1, keepdim=True) > 0
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return _policy(r, ref, high, beta, link).log_softmax(-1)


def _policy(r: Tensor, ref: Tensor, z: Tensor, beta: Tensor, link: Link) -> Tensor:
    return torch.where(ref.isinf(), -math.inf, ref + link.inverse_log((r - z) / beta))


def concentrability(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Concentrability of tabular policies, `C^π = E_π[π/π_ref] = 1 + 2 D_χ²(π ‖ π_ref)` (arXiv:2407.13399).

    Args:
        logprobs: Log-probs of π, `(..., actions)`.
        ref_logprobs: Log-probs of π_ref, the same shape.

    Returns:
        `(...)`, in the dtype of the log-probs; infinite where π takes an action that π_ref never takes.

    Raises:
        TypeError: If an argument is not a float tensor.
        ValueError: If shapes differ, or an entry cannot be a log-prob.

    Examples:
        >>> concentrability(torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log())
        tensor(1.6400)
    """
    check_same_shape("logprobs", logprobs, "ref_logprobs", ref_logprobs)
    check_logprobs("logprobs", logprobs)
    check_logprobs("ref_logprobs", ref_logprobs)
    never = logprobs == -math.inf  # an action without probability adds nothing, also where the reference never takes it
    return torch.where(never, -math.inf, 2 * logprobs - ref_logprobs).logsumexp(-1).exp()


class ConcentrabilityEstimate(NamedTuple):
    """Estimates of C^π from a sample, each 0-d; the mean alone is heavy-tailed."""

    mean: Tensor
    """`mean e^Δ`, which is unbiased but dominated by a few completions."""
    maximum: Tensor
    """`max e^Δ`."""
    log_mean: Tensor
    """`mean Δ`, an estimate of KL(π ‖ π_ref), which is a lower bound of log C^π."""
    nonfinite: Tensor
    """Share of the completions that are left out, because their Δ is NaN or infinite."""


def estimate_concentrability(log_ratio: Tensor) -> ConcentrabilityEstimate:
    """Estimates of the concentrability C^π (arXiv:2407.13399) from completions that were sampled from π.

    For completions of another policy the means estimate something else: on samples of π_ref, `mean e^Δ` is 1 for every π, and
    `mean Δ` is -KL(π_ref ‖ π), below 0. The same holds for samples at another temperature than that of the log-probs.

    Args:
        log_ratio: Δ = `log π - log π_ref` of the completions, any shape; exponents are clipped at 80.

    Returns:
        The estimates in float32. They are NaN where no Δ is finite.

    Raises:
        TypeError: If the log-ratio is not a float tensor.

    Examples:
        >>> estimate_concentrability(torch.tensor([0.0, 1.0])).mean
        tensor(1.8591)
    """
    check_tensor("log_ratio", log_ratio)
    delta = log_ratio.detach().float().flatten()
    finite = delta.isfinite()
    count = finite.sum()
    known = torch.where(finite, delta, 0.0)
    ratio = torch.where(finite, known.clamp(max=80.0).exp(), 0.0)
    largest = torch.where(count > 0, ratio.max(), torch.nan) if len(delta) else ratio.new_tensor(torch.nan)
    left_out = 1 - count.to(ratio.dtype) / max(1, len(delta))
    return ConcentrabilityEstimate(ratio.sum() / count, largest, known.sum() / count, left_out)


def linear_softmax(theta: Tensor, features: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Log-probs of `π_θ(a|x) ∝ π₀(a|x) exp(θᵀφ(x, a))` (arXiv:2601.08421).

    Args:
        theta: Parameters θ, `(..., d)`.
        features: φ, `(prompts, actions, d)`.
        ref_logprobs: log π₀, `(prompts, actions)`.

    Returns:
        `(..., prompts, actions)`.

    Raises:
        TypeError: If an argument is not a float tensor.
        ValueError: If shapes do not fit, or a number is not finite.

    Examples:
        >>> linear_softmax(torch.tensor([1.0]), torch.tensor([[[1.0], [0.0]]]), torch.zeros(1, 2)).exp()
        tensor([[0.7311, 0.2689]])
    """
    shape = check_features(features)
    check_tensor("theta", theta)
    check_tensor("ref_logprobs", ref_logprobs)
    if ref_logprobs.shape != shape or theta.shape[-1:] != features.shape[-1:]:
        raise ValueError(
            f"theta {tuple(theta.shape)} and ref_logprobs {tuple(ref_logprobs.shape)} do not fit features "
            f"{tuple(features.shape)}: theta must be (..., d), ref_logprobs (prompts, actions)"
        )
    check_finite("theta", theta)
    check_values(ref_logprobs < math.inf, ref_logprobs, "ref_logprobs must be numbers or -inf")
    return (ref_logprobs + torch.einsum("...d,xad->...xa", theta, features)).log_softmax(-1)


def fit_pairs(differences: Tensor, wins: Tensor, losses: Tensor, *, beta: float, radius: float) -> Tensor:
    """θ in a ball that minimises the DPO loss (arXiv:2305.18290) to π₀ on counted pairs.

    The result is `argmin_{‖θ‖ <= R} Σ -log σ(±β θᵀ(φ₁ - φ₂))`. Without the ball there is no minimum if a pair was never lost,
    which happens when only the newest batch counts. The fit is Newton's method with a ridge; if the minimum without a ridge
    is outside of the ball, the weight of the ridge is found by bisection. Fractions of wins and losses are soft labels.

    Args:
        differences: `φ₁ - φ₂` of each kind of pair, `(kinds, d)`, float64.
        wins: Number of pairs that the first won, `(..., kinds)`.
        losses: Number of pairs that the second won, `(..., kinds)`.
        beta: β > 0 (γ in arXiv:2601.08421).
        radius: R > 0.

    Returns:
        θ, `(..., d)`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `beta` or `radius` is not positive and finite, shapes do not fit, or a count is negative or not finite.

    Examples:
        >>> wins, losses = torch.tensor([3.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
        >>> fit_pairs(torch.ones(1, 1, dtype=torch.float64), wins, losses, beta=1.0, radius=10.0)  # log 3
        tensor([1.0986], dtype=torch.float64)
    """
    check_number("fit_pairs: beta", beta, low=0, open_low=True)
    check_number("fit_pairs: radius", radius, low=0, open_low=True)
    check_tensor("differences", differences)
    if differences.dim() != 2:
        raise ValueError(f"differences must be (kinds, d), got shape {tuple(differences.shape)}")
    check_finite("differences", differences)
    check_same_shape("wins", wins, "losses", losses)
    for name, counts in (("wins", wins), ("losses", losses)):
        check_weights(name, counts, (len(differences),))
    x = beta * differences
    scale = (wins + losses).sum(-1, keepdim=True).clamp(min=1)
    won, lost = wins / scale, losses / scale

    def ridge(log_weight: Tensor) -> Tensor:
        theta = torch.zeros(*won.shape[:-1], x.shape[1], dtype=x.dtype)
        eye = torch.eye(x.shape[1], dtype=x.dtype)
        weight = log_weight.exp()

        def loss(theta: Tensor) -> Tensor:
            h = theta @ x.T
            fit = (won * torch.nn.functional.softplus(-h) + lost * torch.nn.functional.softplus(h)).sum(-1)
            return fit + (weight.squeeze(-1) * theta.square().sum(-1)) / 2

        for _ in range(_NEWTON):
            s = (theta @ x.T).sigmoid()
            gradient = ((won + lost) * s - won) @ x + weight * theta
            curvature = torch.einsum("...p,pi,pj->...ij", (won + lost) * s * (1 - s), x, x) + weight.unsqueeze(-1) * eye
            step = cast("Tensor", _solve(curvature, gradient))
            length, now = torch.ones_like(scale), loss(theta)
            for _ in range(_HALVINGS):  # of a step that would raise the loss
                worse = loss(theta - length * step) > now
                length = torch.where(worse.unsqueeze(-1), length / 2, length)
            theta = theta - length * step
        return theta

    low, high = (torch.full_like(scale, limit) for limit in _LOG_RIDGES)
    free = ridge(low)
    inside = _norm(free) <= radius
    for _ in range(_RIDGE_BISECTIONS):
        middle = (low + high) / 2
        outside = _norm(ridge(middle)) > radius
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    return torch.where(inside, free, ridge(high))


def _norm(theta: Tensor) -> Tensor:
    return cast("Tensor", cast("Any", theta).norm(dim=-1, keepdim=True))  # torch's stub is incomplete
