"""KL to a reference policy from sampled tokens: three estimators of its value, each with three gradients.

For a token that was drawn from π_old, `x = log π_ref - log π`. An estimator `k(x)` is a number whose mean over tokens of π is,
or is near, KL(π ‖ π_ref) of the next token. What a loss with this number *descends* depends on how it is differentiated:

* `k1`, `k2`, `k3` (plain): the number itself is differentiated, as most code does. Its gradient is the mean of ∇k, which lacks
  that the tokens are drawn from π; only k2 happens to be right, and only on-policy.
* `k1-unbiased`, ...: the value stays, and the gradient is `k·∇log π + ∇k` (the score function and the plain gradient), which
  is that of the mean of k over tokens of π. It is right on-policy alone.
* `k1-ratio`, ...: the same, times the ratio `r = π/π_old` of the token, without a clip: the gradient of `r·k`. It is right for
  tokens of any π_old that gives no token of π a probability of 0. `k3-ratio` is the form of DeepSeek-V3.2 (arXiv:2512.02556,
  sec. 3.1), TRL's `use_bias_correction_kl` and slime's `--use-unbiased-kl`.

Each gradient has the form `w·∇log π`:

| | plain | unbiased | ratio |
|---|---|---|---|
| k1 | 1 | 1 - x | r·(1 - x) |
| k2 | -x | x²/2 - x | r·(x²/2 - x) |
| k3 | 1 - e^x | -x | -r·x |

All are about the next token alone: that an early token changes which contexts come later is in none of them (docs/kl.md).
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from bandpo._inputs import fill
from bandpo.surrogates.token import MAX_LOG_RATIO, hold

ReferenceKL = Literal["k1", "k2", "k3", "k1-unbiased", "k2-unbiased", "k3-unbiased", "k1-ratio", "k2-ratio", "k3-ratio"]
"""Names of the estimators with their gradients."""


class Descends(NamedTuple):
    """A description of the expected gradient of a KL term."""

    on_policy: str
    """For tokens of the policy in training."""
    off_policy: str
    """For tokens of the policy before the update."""


DESCENDS: Mapping[ReferenceKL, Descends] = {
    "k1": Descends("0", "minus that of KL(π_old ‖ π)"),
    "k2": Descends("that of KL(π ‖ π_ref)", "that of the mean of k2 over tokens of π_old"),
    "k3": Descends("that of KL(π_ref ‖ π)", "that of the mean of k3 over tokens of π_old"),
    "k1-unbiased": Descends("that of KL(π ‖ π_ref)", "that of the mean of k1 + k2 over tokens of π_old"),
    "k2-unbiased": Descends(
        "that of the mean of k2 over tokens of π", "that of the mean of k2 - x³/6 over tokens of π_old"
    ),
    "k3-unbiased": Descends("that of KL(π ‖ π_ref)", "that of the mean of k2 over tokens of π_old"),
    "k1-ratio": Descends("that of KL(π ‖ π_ref)", "that of KL(π ‖ π_ref)"),
    "k2-ratio": Descends("that of the mean of k2 over tokens of π", "that of the mean of k2 over tokens of π"),
    "k3-ratio": Descends("that of KL(π ‖ π_ref)", "that of KL(π ‖ π_ref)"),
}
"""Expected gradient of each term, on-policy and off-policy; proved by exact sums in tests/unit/test_reference_kl.py."""


def k1(log_ratio: Tensor) -> Tensor:
    """Schulman's k1, `-x`: its mean over tokens of π is KL(π ‖ π_ref); single values may be negative.

    `x` is held within ±40; beyond, it has no gradient.

    Args:
        log_ratio: `x = log π_ref - log π`, any shape.

    Returns:
        A tensor of the shape of `log_ratio`, in nats.

    Examples:
        >>> k1(torch.tensor([0.0, 0.1]))
        tensor([-0.0000, -0.1000])
    """
    return -hold(log_ratio)


def k2(log_ratio: Tensor) -> Tensor:
    """Schulman's k2, `x²/2`: never negative, and near KL(π ‖ π_ref) in the mean where the two policies are close.

    `x` is held within ±40; beyond, it has no gradient.

    Args:
        log_ratio: `x = log π_ref - log π`, any shape.

    Returns:
        A tensor of the shape of `log_ratio`, in nats.

    Examples:
        >>> k2(torch.tensor([0.0, 0.1]))
        tensor([0.0000, 0.0050])
    """
    return hold(log_ratio).square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """Schulman's k3, `e^x - x - 1`: never negative, and its mean over tokens of π is KL(π ‖ π_ref).

    `x` is held within ±40; beyond, it has no gradient.

    Args:
        log_ratio: `x = log π_ref - log π`, any shape.

    Returns:
        A tensor of the shape of `log_ratio`, in nats.

    Examples:
        >>> k3(torch.tensor([0.0, 0.1]))
        tensor([0.0000, 0.0052])
    """
    held = hold(log_ratio)
    return held.exp() - held - 1


_VALUES: Mapping[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
# k + dk/dlog π in closed form: for k3 the sum of e^x - x - 1 and 1 - e^x would be rounding alone where e^x is large.
_SCORES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda x: 1 - x,
    "k2": lambda x: x.square() / 2 - x,
    "k3": torch.neg,
}


def reference_kl(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    kl: ReferenceKL = "k3-ratio",
    *,
    old_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """The KL term of each token, to be minimised: its value is `k(x)` or `r·k(x)`, its gradient that of its name.

    Both log-ratios are held within ±40; beyond, they have no gradient.

    Args:
        logprobs: Log-probs of the sampled tokens under the policy in training, with gradient, any shape.
        ref_logprobs: The same under the reference; no gradient flows into them.
        kl: Name of the term.
        old_logprobs: The same under the policy that the tokens were drawn from, for the terms with the ratio; no gradient flows
            into them.
        mask: The tokens that are used, bool; None for all. The others get 0, whatever they hold.
        weights: Further factors of the ratio, such as those of a correction for the sampler.

    Returns:
        A tensor of the shape of `logprobs`, at least float32, in nats.

    Raises:
        ValueError: If the name is unknown, or a term with the ratio lacks `old_logprobs`.

    Examples:
        >>> new = torch.tensor([-1.0], requires_grad=True)
        >>> reference_kl(new, torch.tensor([-1.5]), old_logprobs=torch.tensor([-1.0])).backward()
        >>> new.grad  # log(π/π_ref)
        tensor([0.5000])
    """
    estimator, _, gradient = check_kl(kl).partition("-")
    if mask is None:
        mask = torch.ones_like(logprobs, dtype=torch.bool)
    x = fill(ref_logprobs.detach(), mask) - fill(logprobs, mask)
    if not gradient:
        return _VALUES[estimator](x)
    held = hold(x)
    value, weight = _VALUES[estimator](x.detach()), _SCORES[estimator](held.detach())
    if gradient == "ratio":
        if old_logprobs is None:
            raise ValueError(
                f"kl={kl!r} needs old_logprobs, the log-probs under the policy that the tokens were drawn from"
            )
        log_ratio = fill(logprobs.detach(), mask) - fill(old_logprobs.detach(), mask)
        ratio = hold(log_ratio).exp() if weights is None else hold(log_ratio).exp() * weights
        value = ratio * value
        weight = torch.where(log_ratio.abs() > MAX_LOG_RATIO, 0.0, ratio * weight)
    # The last factor is 0 and has the gradient of log π, but none where x is held.
    return value + weight * (held.detach() - held)


def check_kl(kl: object) -> ReferenceKL:
    """The name of a KL term, if it is one.

    Args:
        kl: The name.

    Raises:
        ValueError: If it is not.

    Examples:
        >>> check_kl("k3")
        'k3'
    """
    for name in get_args(ReferenceKL):
        if name == kl:
            return name
    raise ValueError(
        f"kl: got {kl!r}; choose one of {', '.join(get_args(ReferenceKL))} (the estimator, and how it is differentiated)"
    )


def check_kl_coef(kl_coef: object) -> None:
    """The coefficient of a KL term must be a finite number >= 0.

    Args:
        kl_coef: The coefficient.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(kl_coef, bool) or not isinstance(kl_coef, int | float) or not 0 <= kl_coef < math.inf:
        raise ValueError(f"kl_coef must be a number >= 0, got {kl_coef!r}")
