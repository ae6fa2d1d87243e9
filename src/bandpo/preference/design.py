"""Which pairs to ask about: coverage of features, and the preferential G-optimal design (arXiv:2601.08421)."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bandpo._inputs import check_int, check_tensor, check_values
from bandpo.preference._checks import check_number

PromptMarginal = Literal["design", "uniform"]


class Design(NamedTuple):
    """A distribution over prompts and actions to sample pairs from, made before training."""

    prompts: Tensor
    """μ_X, `(prompts,)`."""
    actions: Tensor
    """π^cg, `(prompts, actions)`: sums to 1 for each prompt."""
    conditional: Tensor
    """`max_a ‖φ(x, a) - E φ‖²_{V⁻¹}` of each prompt, `(prompts,)`; the optimum is the rank d."""
    leverage: Tensor
    """`max_{x,a} φᵍᵀ V(π^g)⁻¹ φᵍ`, at most d² with prompts="design" (proposition 4.2)."""


def preferential_g_optimal(
    features: Tensor, *, prompts: PromptMarginal = "design", tolerance: float = 1e-3, steps: int = 100_000
) -> Design:
    """Preferential G-optimal design of arXiv:2601.08421, algorithm 2.

    For each prompt π^cg minimises `max_a ‖φ(x,a) - E_π φ‖_{V(x,π)⁻¹}`; μ is the G-optimal design of the φ centred so, and its
    marginal weighs the prompts. Neither changes when features are scaled or moved, and features far from 0 or of any size are
    as good as others. A centred G-optimal design of φ is a D-optimal one of (1, φ), found by multiplicative updates
    `w ← w·leverage/rank`; they stop where the optimality gap (Kiefer and Wolfowitz) is below the tolerance.

    Args:
        features: φ, `(prompts, actions, d)`; directions that no two actions differ in are left out.
        prompts: "design" takes μ's marginal; "uniform" weighs all prompts alike.
        tolerance: Relative gap to the optimum, positive.
        steps: At most so many updates of each design, at least 1.

    Returns:
        A `Design` in float64.

    Raises:
        TypeError: If features are no tensor of real numbers.
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
    weights = (
        marginal.unsqueeze(1) * actions
    ).flatten()  # of π^g; the rows are centred by it, so V is their second moment
    leverage = _leverage(flat, weights).max() if flat.shape[1] else flat.new_zeros(())
    return Design(marginal, actions, conditional, leverage)


def _standard(phi: Tensor) -> Tensor:
    """Features moved to mean 0 over each prompt's actions, and scaled to 1; differences of rounding are set to 0."""
    size = phi.abs().amax((0, 1)).clamp(min=torch.finfo(phi.dtype).tiny)
    scaled = phi / size
    centred = scaled - scaled.mean(1, keepdim=True)
    spread = centred.abs().amax(1, keepdim=True)  # of each prompt's actions
    rounding = 8 * phi.shape[1] * torch.finfo(phi.dtype).eps * scaled.abs().amax(1, keepdim=True)
    centred = torch.where(spread > rounding, centred, 0.0)
    return centred / centred.abs().amax((0, 1)).clamp(min=torch.finfo(phi.dtype).tiny)


def _independent(x: Tensor) -> Tensor:
    """Rows in an orthonormal base of the directions that they have, `(rows, rank)`."""
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    return u[:, s > 1e-9 * s[0]] if len(s) and s[0] > 0 else x[:, :0]


def _with_constant(x: Tensor) -> Tensor:
    """(1, φ) in a base of its directions: the constant is one of them, whatever the size of φ."""
    return torch.cat([torch.ones_like(x[:, :1]), _independent(x)], 1)


def _leverage(x: Tensor, weights: Tensor) -> Tensor:
    """`xᵀ (Σ w x xᵀ)⁻¹ x` of each row; infinite where the weights leave a direction of the rows out."""
    root = torch.linalg.cholesky_ex((x * weights.unsqueeze(1)).T @ x)
    if root.info:
        return x.new_full((len(x),), math.inf)
    return torch.linalg.solve_triangular(root.L, x.T, upper=False).square().sum(0)


def _d_optimal(x: Tensor, tolerance: float, steps: int) -> tuple[Tensor, Tensor]:
    """Weights of the rows, of full rank, that minimise the largest leverage, and that leverage."""
    rank = x.shape[1]
    weights = torch.full((len(x),), 1 / len(x), dtype=x.dtype)
    leverage = weights
    for _ in range(steps):
        leverage = _leverage(x, weights)
        if leverage.max() <= rank * (1 + tolerance):
            return weights, leverage.max()
        weights = weights * leverage / rank
    raise ValueError(f"the design is not optimal after {steps} steps: leverage {leverage.max():.4f}, optimum {rank}; "
                     "raise steps or tolerance")  # fmt: skip


def feature_covariance(policy: Tensor, features: Tensor, prompt_probs: Tensor) -> Tensor:
    """`V(π) = E_{x,a~π}[(φ - E_π φ)(φ - E_π φ)ᵀ]`, `(..., d, d)`.

    Args:
        policy: Probabilities, `(..., prompts, actions)`.
        features: `(prompts, actions, d)`.
        prompt_probs: `(prompts,)`.
    """
    mean = torch.einsum("...xa,xai->...xi", policy, features)
    second = torch.einsum("x,...xa,xai,xaj->...ij", prompt_probs, policy, features, features)
    return second - torch.einsum("x,...xi,...xj->...ij", prompt_probs, mean, mean)


def feature_coverage(policy: Tensor, target: Tensor, features: Tensor, prompt_probs: Tensor) -> Tensor:
    """`C_{π→π'} = inf{C : V(π') ⪯ C V(π)}` of arXiv:2601.08421, `(...)`: how well samples of π tell about π'.

    At most `max π'/π`. Directions in which `V(π')` vanishes are left out; it is inf where `V(π)` vanishes and `V(π')` does not.

    Args:
        policy: π, `(..., prompts, actions)`, probabilities.
        target: π', `(prompts, actions)`.
        features: `(prompts, actions, d)`.
        prompt_probs: `(prompts,)`.

    Examples:
        >>> two, x = torch.eye(2).unsqueeze(0), torch.ones(1)
        >>> feature_coverage(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]]), two, x)
        tensor(2.7778)
    """
    wanted, seen = (feature_covariance(p, features, prompt_probs) for p in (target, policy))
    values, vectors = torch.linalg.eigh(wanted)
    keep = values > 1e-9 * values.max()
    root = vectors[:, keep] * values[keep].sqrt()
    # sup over those directions of uᵀV'u/uᵀVu, with V restricted to the span of V'
    least = torch.linalg.eigvalsh(_whiten(seen, root))[..., 0]
    return torch.where(least > 0, 1 / least, torch.inf)


def _whiten(seen: Tensor, root: Tensor) -> Tensor:
    inverse = torch.linalg.pinv(root)
    return inverse @ seen @ inverse.T


def mad_coverage(policy: Tensor, target: Tensor, functions: Tensor, prompt_probs: Tensor) -> Tensor:
    """`max_f MAD_π'(f)/MAD_π(f)` over given functions, with `MAD_π(f) = E_π|f - E_π f|` (arXiv:2601.08421, section 5).

    Args:
        policy: π, `(prompts, actions)`, probabilities.
        target: π'.
        functions: `(functions, prompts, actions)`, the class or a net of it.
        prompt_probs: `(prompts,)`.
    """

    def deviation(p: Tensor) -> Tensor:
        mean = (p * functions).sum(-1, keepdim=True)
        return (prompt_probs * (p * (functions - mean).abs()).sum(-1)).sum(-1)

    return (deviation(target) / deviation(policy)).max()
