"""Which pairs to ask about: coverage of features, and the preferential G-optimal design (arXiv:2601.08421)."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

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
    marginal weighs the prompts. A centred G-optimal design of φ is a D-optimal one of (1, φ), found by multiplicative updates
    `w ← w·leverage/rank`; they stop where the optimality gap (Kiefer and Wolfowitz) is below the tolerance.

    Args:
        features: φ, `(prompts, actions, d)`; directions that no two actions differ in are left out.
        prompts: "design" takes μ's marginal; "uniform" weighs all prompts alike.
        tolerance: Relative gap to the optimum.
        steps: At most so many updates of each design.

    Returns:
        A `Design` in float64.

    Raises:
        ValueError: If the shape does not fit, or `steps` do not suffice.

    Examples:
        >>> design = preferential_g_optimal(torch.eye(3).unsqueeze(0))
        >>> design.actions
        tensor([[0.3333, 0.3333, 0.3333]], dtype=torch.float64)
        >>> design.conditional
        tensor([2.], dtype=torch.float64)
    """
    if features.dim() != 3 or features.shape[1] < 2:
        raise ValueError(f"features must be (prompts, actions >= 2, d), got shape {tuple(features.shape)}")
    if prompts not in ("design", "uniform"):
        raise ValueError(f"prompts must be design or uniform, got {prompts!r}")
    phi = features.to(torch.float64)
    found = [_d_optimal(torch.cat([torch.ones_like(x[:, :1]), x], 1), tolerance, steps) for x in phi]
    actions = torch.stack([weights for weights, _ in found])
    conditional = torch.stack([leverage for _, leverage in found]) - 1
    centred = phi - (actions.unsqueeze(-1) * phi).sum(1, keepdim=True)
    flat = centred.flatten(0, 1)
    if prompts == "design":
        joint, _ = _d_optimal(flat, tolerance, steps)
        marginal = joint.view(phi.shape[:2]).sum(1)
    else:
        marginal = torch.full((len(phi),), 1 / len(phi), dtype=torch.float64)
    covariance = feature_covariance(actions, phi, marginal)
    leverage = torch.einsum("ni,ij,nj->n", flat, torch.linalg.pinv(covariance, hermitian=True), flat).max()
    return Design(marginal, actions, conditional, leverage)


def _d_optimal(x: Tensor, tolerance: float, steps: int) -> tuple[Tensor, Tensor]:
    """Weights of the rows that minimise the largest leverage, and that leverage."""
    _, s, v = torch.linalg.svd(x, full_matrices=False)
    x = x @ v[s > 1e-9 * s[0]].T
    rank = x.shape[1]
    weights = torch.full((len(x),), 1 / len(x), dtype=x.dtype)
    leverage = weights
    for _ in range(steps):
        inverse = torch.linalg.inv((x * weights.unsqueeze(1)).T @ x)
        leverage = ((x @ inverse) * x).sum(1)
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
