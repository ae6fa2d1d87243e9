"""Links, which map log-ratios to scores in a preference loss: the trust region of DPO and related objectives.

A policy that maximises `E_π[r] - β D_f(π ‖ π_ref)` has `r(x, y) = β f'(π(y|x)/π_ref(y|x)) + Z(x)`. The link is `φ = f'`, as a
function of `Δ = log π - log π_ref`; a difference of two link values does not contain `Z`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from bandpo._inputs import check_tensor
from bandpo._values import ByValue, Registry
from bandpo.preference._checks import check_number

# e^88 is the largest power in the range of float32 and bfloat16; arXiv:2407.13399's experiments stop the exponential at 20.
_LOW, _HIGH = -88.0, 20.0
_MAX = 80.0  # TRL's limit for the α-divergence in float32
_NEWTON = 12  # steps of `log_wright_omega`

Elementwise = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Link(ByValue):
    """A link `φ(π/π_ref)` as a function of the log-ratio, and the inverse of the link (f-DPO, arXiv:2309.16240).

    Args:
        name: Name in messages and tables.
        formula: Formula in one line, with `z` for the ratio.
        of_log: `Δ -> φ(e^Δ)`, elementwise, increasing, for float32 or float64.
        inverse_log: `u -> log φ⁻¹(u)`, elementwise; -inf or +inf if `u` is outside of the range of φ.

    Examples:
        >>> CHI2_KL(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.6321,  1.0000,  3.7183])
    """

    name: str
    formula: str
    of_log: Elementwise
    inverse_log: Elementwise

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        """A built-in link is pickled and copied as itself."""
        if LINKS.get(self.name) is self:
            return self.name.upper().replace("-", "_")
        return super().__reduce_ex__(protocol)

    def __call__(self, log_ratio: Tensor) -> Tensor:
        """φ at the log-ratio, in the dtype of the log-ratio; half-precision input gives a float32 result.

        Raises:
            TypeError: If the log-ratio is not a float tensor.
        """
        check_tensor(f"link {self.name!r}: log_ratio", log_ratio)
        wide = log_ratio.float() if log_ratio.dtype in (torch.float16, torch.bfloat16) else log_ratio
        return self.of_log(wide)


def chi2_kl(alpha: float = 1.0, gamma: float = 1.0) -> Link:
    """Mixed chi-squared and KL link of χPO, `φ(z) = z^α + γ log z`.

    In arXiv:2407.13399, α = γ = 1 is the method (f(z) = ½(z-1)² + z log z), and γ < 1 is theorem H.1; the experiments use
    α and γ in {¼, 1} x {0.1, 1} and compute `exp(clip(α log z, -88, 20)) + γ log z`. The exponent `α log z` is our reading:
    no other one gives φ at α = γ = 1. The KL part keeps a gradient where the exponential is clipped. The inverse is that of
    the link without the clip, by Lambert's W: `(γ/α) ω(αu/γ - log(γ/α))` for z^α.

    Args:
        alpha: α > 0, the power of the ratio.
        gamma: γ > 0, the weight of the KL part.

    Raises:
        TypeError: If `alpha` or `gamma` is not a number.
        ValueError: If `alpha` or `gamma` is not positive. For γ = 0 use `CHI2`, whose inverse obeys the constraint π >= 0.

    Examples:
        >>> chi2_kl(gamma=0.1)(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.2679, 1.0000, 2.8183])
    """
    for name, value in (("alpha", alpha), ("gamma", gamma)):
        check_number(f"chi2_kl: {name}", value, low=0, open_low=True)
    name = "chi2-kl" if alpha == gamma == 1 else f"chi2-kl({alpha:g},{gamma:g})"
    return Link(
        name,
        f"z^{alpha:g} + {gamma:g} log z".replace("z^1 + 1 log", "z + log"),
        partial(_chi2_kl, alpha=alpha, gamma=gamma),
        partial(_inverse_chi2_kl, alpha=alpha, gamma=gamma),
    )


def _chi2_kl(log_ratio: Tensor, alpha: float, gamma: float) -> Tensor:
    return (alpha * log_ratio).clamp(_LOW, _HIGH).exp() + gamma * log_ratio


def _inverse_chi2_kl(u: Tensor, alpha: float, gamma: float) -> Tensor:
    share = gamma / alpha
    return (math.log(share) + log_wright_omega(u / share - math.log(share))) / alpha


def alpha_link(a: float) -> Link:
    """Link of the α-divergence as in TRL and f-DPO (arXiv:2309.16240), `φ(z) = (z^(a-1) - 1)/(a - 1)`.

    The limit at a = 1 is log z, and a = 2 gives z - 1.

    Args:
        a: The order α, a finite number other than 1.

    Raises:
        TypeError: If `a` is not a number.
        ValueError: If `a` is not finite or is 1, which is `LOG`.

    Examples:
        >>> alpha_link(2.0)(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 1.7183])
    """
    if isinstance(a, bool) or not isinstance(a, int | float):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"alpha_link: a must be a number, got {a!r}")
    if not math.isfinite(a) or a == 1:
        raise ValueError(f"alpha_link: a must be a finite number other than 1 (which is LOG), got {a}")
    k = a - 1
    return Link(f"alpha({a:g})", f"(z^{k:g} - 1)/{k:g}", partial(_alpha, k=k), partial(_inverse_alpha, k=k))


def _alpha(log_ratio: Tensor, k: float) -> Tensor:
    return (k * log_ratio).clamp(max=_MAX).expm1() / k


def _inverse_alpha(u: Tensor, k: float) -> Tensor:
    return (k * u).clamp(min=-1).log1p() / k


def log_wright_omega(x: Tensor) -> Tensor:
    """`log ω(x)` for Wright's ω, the root of `w + log w = x`; so `ω(x) = W₀(e^x)` without overflow.

    Newton's method on `y + e^y = x` from `min(x, log max(x, 1))`, from where it converges from above without overshooting.

    Args:
        x: A float tensor, any shape; solved in float64. NaN stays NaN.

    Raises:
        TypeError: If `x` is not a float tensor.

    Examples:
        >>> log_wright_omega(torch.tensor([-50.0, 2.0, 10.0], dtype=torch.float64))
        tensor([-50.0000,   0.4429,   2.0706], dtype=torch.float64)
    """
    check_tensor("x", x)
    wide = x.to(torch.float64)
    y = torch.where(wide > 1, wide.clamp(min=1).log(), wide)
    for _ in range(_NEWTON):
        y = y - (y + y.exp() - wide) / (1 + y.exp())
    return torch.where(wide.isinf(), wide, y).to(x.dtype)


def _js(log_ratio: Tensor) -> Tensor:
    return math.log(2) + torch.nn.functional.logsigmoid(log_ratio)


LOG = Link("log", "log z", lambda d: d * 1.0, lambda u: u * 1.0)
"""Reverse KL, D(π ‖ π_ref), the link of DPO."""
CHI2_KL = chi2_kl()
"""Chi-squared and KL, the link of χPO, arXiv:2407.13399."""
CHI2 = Link("chi2", "z - 1", lambda d: d.clamp(max=_MAX).expm1(), lambda u: u.clamp(min=-1).log1p())
"""Pure chi-squared, ½(z-1)²; the optimal policy may give an action probability 0."""
FORWARD_KL = Link(
    "forward-kl", "1 - 1/z", lambda d: -(-d).clamp(max=_MAX).expm1(), lambda u: -(-u.clamp(max=1)).log1p()
)
"""D(π_ref ‖ π)."""
JS = Link(
    "js", "log(2z/(1 + z))", _js, lambda u: torch.where(u < math.log(2), u - (2 - u.exp()).clamp(min=0).log(), math.inf)
)
"""Jensen-Shannon, in TRL's units."""

LINKS: Mapping[str, Link] = Registry(
    __name__, "LINKS", {link.name: link for link in (LOG, CHI2_KL, CHI2, FORWARD_KL, JS)}
)
"""The links without parameters, by name."""


def as_link(link: Link | str) -> Link:
    """The link of that name, or the link itself.

    Args:
        link: A link, or its name: log, chi2-kl, chi2, forward-kl, js, alpha:A or chi2-kl:ALPHA,GAMMA.

    Raises:
        ValueError: If the name is unknown.

    Examples:
        >>> as_link("alpha:0.5").formula
        '(z^-0.5 - 1)/-0.5'
    """
    if isinstance(link, Link):
        return link
    if link in LINKS:
        return LINKS[link]
    kind, _, values = str(link).partition(":")
    makers: dict[str, tuple[Callable[..., Link], int]] = {"alpha": (alpha_link, 1), "chi2-kl": (chi2_kl, 2)}
    if kind in makers and values:
        maker, count = makers[kind]
        try:
            numbers = [float(v) for v in values.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) == count:
            return maker(*numbers)
    raise ValueError(f"link {link!r} is unknown: use {', '.join(LINKS)}, alpha:A or chi2-kl:ALPHA,GAMMA")
