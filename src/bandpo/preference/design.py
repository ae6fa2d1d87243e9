"""The choice of pairs to label: coverage of features, and the preferential G-optimal design (arXiv:2601.08421)."""

import math
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from bandpo._inputs import check_int, check_tensor, check_values
from bandpo.preference._checks import check_features, check_number, check_weights

PromptMarginal = Literal["design", "uniform"]

_linalg = cast("Any", torch.linalg)  # has no types in torch's stubs
_RANK_TOLERANCE = 1e-9  # singular values and eigenvalues below this share of the largest one count as 0


class Design(NamedTuple):
    """A distribution over prompts and actions from which pairs are sampled; it is made before training."""

    prompts: Tensor
    """μ_X, `(prompts,)`."""
    actions: Tensor
    """π^cg, `(prompts, actions)`; each row sums to 1."""
    conditional: Tensor
    """`max_a ‖φ(x, a) - E φ‖²_{V⁻¹}` of each prompt, `(prompts,)`; the optimum is the rank d."""
    leverage: Tensor
    """`max_{x,a} φᵍᵀ V(π^g)⁻¹ φᵍ`, 0-d; at most d² with prompts="design" (proposition 4.2)."""


def preferential_g_optimal(
    features: Tensor, *, prompts: PromptMarginal = "design", tolerance: float = 1e-3, steps: int = 100_000
) -> Design:
    """Preferential G-optimal design of arXiv:2601.08421, algorithm 2.

    For each prompt π^cg minimises `max_a ‖φ(x,a) - E_π φ‖_{V(x,π)⁻¹}`; μ is the G-optimal design of the features that are
    centred in this way, and its marginal weighs the prompts. Neither depends on a scale or an offset of the features. A centred
    G-optimal design of φ is a D-optimal design of (1, φ), found by multiplicative updates `w ← w·leverage/rank`, which stop
    when the optimality gap (Kiefer and Wolfowitz) is below the tolerance.

    Args:
        features: φ, `(prompts, actions, d)`; directions in which no two actions differ are left out.
        prompts: "design" weighs the prompts by the marginal of μ; "uniform" weighs all prompts alike.
        tolerance: Relative gap to the optimum, positive.
        steps: Largest number of updates for each design, at least 1.

    Returns:
        A `Design` in float64.

    Raises:
        TypeError: If `features` is not a tensor of real numbers.
        ValueError: If the shape does not fit, a feature is not finite, an option is out of range, or `steps` do not suffice.

    Examples:
        >>> design = preferential_g_optimal(torch.eye(3).unsqueeze(0))
        >>> design.actions
        tensor([[0.3333, 0.3333, 0.3333]], dtype=torch.float64)
        >>> design.conditional
        tensor([2.0000], dtype=torch.float64)
    """
    check_tensor("features", features, floating=False)
    if features.is_complex():
        raise TypeError(f"features must be real numbers, got {features.dtype}")
    if features.dim() != 3 or features.shape[1] < 2 or not features.shape[0] or not features.shape[2]:
        raise ValueError(f"features must be (prompts >= 1, actions >= 2, d >= 1), got shape {tuple(features.shape)}")
    if prompts not in ("design", "uniform"):
        raise ValueError(f"prompts must be design or uniform, got {prompts!r}")
    check_number("tolerance", tolerance, low=0, open_low=True)
    check_int("steps", steps)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    phi = features.detach().to(torch.float64)
    check_values(phi.isfinite(), phi, "features must be finite")
    phi = _standard(phi)
    found = [_d_optimal(_with_constant(x), tolerance, steps) for x in phi]
    actions = torch.stack([weights for weights, _ in found])
    conditional = torch.stack([leverage for _, leverage in found]) - 1
    centred = phi - (actions.unsqueeze(-1) * phi).sum(1, keepdim=True)
    flat = _independent(centred.flatten(0, 1))
    if prompts == "design" and flat.shape[1]:
        joint, _ = _d_optimal(flat, tolerance, steps)
        marginal = joint.view(phi.shape[:2]).sum(1)
    else:
        marginal = torch.full((len(phi),), 1 / len(phi), dtype=torch.float64)
    weights = (marginal.unsqueeze(1) * actions).flatten()  # π^g, which centres the rows: V is their second moment
    leverage = _leverage(flat, weights).max() if flat.shape[1] else flat.new_zeros(())
    return Design(marginal, actions, conditional, leverage)


def _standard(phi: Tensor) -> Tensor:
    """Features with mean 0 over each prompt's actions, scaled to at most 1; differences within rounding are set to 0."""
    size = phi.abs().amax((0, 1)).clamp(min=torch.finfo(phi.dtype).tiny)
    scaled = phi / size
    centred = scaled - scaled.mean(1, keepdim=True)
    spread = centred.abs().amax(1, keepdim=True)  # over each prompt's actions
    rounding = 8 * phi.shape[1] * torch.finfo(phi.dtype).eps * scaled.abs().amax(1, keepdim=True)
    centred = torch.where(spread > rounding, centred, 0.0)
    return centred / centred.abs().amax((0, 1)).clamp(min=torch.finfo(phi.dtype).tiny)


def _independent(x: Tensor) -> Tensor:
    """The rows in an orthonormal base of their span, `(rows, rank)`."""
    u, s = cast("tuple[Tensor, Tensor]", _linalg.svd(x, full_matrices=False)[:2])
    return u[:, s > _RANK_TOLERANCE * s[0]] if len(s) and s[0] > 0 else x[:, :0]


def _with_constant(x: Tensor) -> Tensor:
    """(1, φ) with φ in an orthonormal base, so that the constant column does not depend on the scale of φ."""
    return torch.cat([torch.ones_like(x[:, :1]), _independent(x)], 1)


def _leverage(x: Tensor, weights: Tensor) -> Tensor:
    """`xᵀ (Σ w x xᵀ)⁻¹ x` of each row; infinite if the weights leave out a direction of the rows."""
    root = _linalg.cholesky_ex((x * weights.unsqueeze(1)).T @ x)
    if root.info:
        return x.new_full((len(x),), math.inf)
    return cast("Tensor", _linalg.solve_triangular(root.L, x.T, upper=False)).square().sum(0)


def _d_optimal(x: Tensor, tolerance: float, steps: int) -> tuple[Tensor, Tensor]:
    """Weights of the rows (which have full rank) that minimise the largest leverage, and that leverage."""
    rank = x.shape[1]
    weights = torch.full((len(x),), 1 / len(x), dtype=x.dtype)
    leverage = weights
    for _ in range(steps):
        leverage = _leverage(x, weights)
        if leverage.max() <= rank * (1 + tolerance):
            return weights, leverage.max()
        weights = weights * leverage / rank
    raise ValueError(
        f"the design is not optimal after {steps} steps: leverage {leverage.max():.4f}, optimum {rank}; "
        "raise steps or tolerance"
    )


def feature_covariance(policy: Tensor, features: Tensor, prompt_probs: Tensor) -> Tensor:
    """Covariance of the features within prompts, `V(π) = E_{x,a~π}[(φ - E_π φ)(φ - E_π φ)ᵀ]` (arXiv:2601.08421).

    Args:
        policy: π, probabilities `(..., prompts, actions)`.
        features: φ, `(prompts, actions, d)`.
        prompt_probs: Probabilities of the prompts, `(prompts,)`.

    Returns:
        `(..., d, d)`.

    Raises:
        TypeError: If an argument is not a float tensor.
        ValueError: If shapes do not fit, a feature is not finite, or a probability is negative or not finite.

    Examples:
        >>> feature_covariance(torch.tensor([[0.5, 0.5]]), torch.tensor([[[1.0], [-1.0]]]), torch.ones(1))
        tensor([[1.]])
    """
    prompts, actions = check_features(features)
    check_weights("policy", policy, (prompts, actions))
    check_weights("prompt_probs", prompt_probs, (prompts,))
    mean = torch.einsum("...xa,xai->...xi", policy, features)
    second = torch.einsum("x,...xa,xai,xaj->...ij", prompt_probs, policy, features, features)
    return second - torch.einsum("x,...xi,...xj->...ij", prompt_probs, mean, mean)


def feature_coverage(policy: Tensor, target: Tensor, features: Tensor, prompt_probs: Tensor) -> Tensor:
    """Coverage of a target policy π' by samples of π, `C_{π→π'} = inf{C : V(π') ⪯ C V(π)}` (arXiv:2601.08421).

    The coverage is at most `max π'/π`. Directions in which `V(π')` vanishes are left out; the coverage is infinite if `V(π)`
    vanishes in a direction in which `V(π')` does not.

    Args:
        policy: π, probabilities `(..., prompts, actions)`.
        target: π', probabilities `(prompts, actions)`.
        features: φ, `(prompts, actions, d)`.
        prompt_probs: Probabilities of the prompts, `(prompts,)`.

    Returns:
        `(...)`.

    Raises:
        TypeError: If an argument is not a float tensor.
        ValueError: As for `feature_covariance`.

    Examples:
        >>> two, x = torch.eye(2).unsqueeze(0), torch.ones(1)
        >>> feature_coverage(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]]), two, x)
        tensor(2.7778)
    """
    wanted, seen = (feature_covariance(p, features, prompt_probs) for p in (target, policy))
    values, vectors = cast("tuple[Tensor, Tensor]", _linalg.eigh(wanted))
    keep = values > _RANK_TOLERANCE * values.max()
    root = vectors[:, keep] * values[keep].sqrt()
    # the supremum of uᵀV'u/uᵀVu over these directions, with V restricted to the span of V'
    least = cast("Tensor", _linalg.eigvalsh(_whiten(seen, root)))[..., 0]
    return torch.where(least > 0, 1 / least, torch.inf)


def _whiten(seen: Tensor, root: Tensor) -> Tensor:
    """`R⁺ V R⁺ᵀ`: the matrix V in coordinates in which the target's covariance `R Rᵀ` is the identity."""
    inverse = cast("Tensor", _linalg.pinv(root))
    return inverse @ seen @ inverse.T


def mad_coverage(policy: Tensor, target: Tensor, functions: Tensor, prompt_probs: Tensor) -> Tensor:
    """Coverage for a class of functions, `max_f MAD_π'(f)/MAD_π(f)` with `MAD_π(f) = E_π|f - E_π f|`.

    This is section 5 of arXiv:2601.08421.

    Args:
        policy: π, probabilities `(prompts, actions)`.
        target: π', probabilities `(prompts, actions)`.
        functions: The functions of the class, or of a net that covers the class, `(functions, prompts, actions)`.
        prompt_probs: Probabilities of the prompts, `(prompts,)`.

    Returns:
        The largest ratio, 0-d. A function that is constant under both policies has no ratio and is left out.

    Raises:
        TypeError: If an argument is not a float tensor.
        ValueError: If shapes do not fit, a value is not finite, or a probability is negative.

    Examples:
        >>> skewed, even = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
        >>> mad_coverage(skewed, even, torch.tensor([[[1.0, 0.0]]]), torch.ones(1))
        tensor(2.7778)
    """
    prompts, actions = check_features(functions.movedim(0, -1) if isinstance(functions, Tensor) else functions)
    check_weights("policy", policy, (prompts, actions))
    check_weights("target", target, (prompts, actions))
    check_weights("prompt_probs", prompt_probs, (prompts,))

    def deviation(p: Tensor) -> Tensor:
        mean = (p * functions).sum(-1, keepdim=True)
        return (prompt_probs * (p * (functions - mean).abs()).sum(-1)).sum(-1)

    wanted, seen = deviation(target), deviation(policy)
    return torch.where((wanted == 0) & (seen == 0), 0.0, wanted / seen).max()
