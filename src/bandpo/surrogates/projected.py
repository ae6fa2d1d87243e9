"""The surrogate that projects a position's distribution onto a KL ball instead of clipping the sampled token (TROLL)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bandpo._inputs import as_mask, check_int, traits
from bandpo._values import ByValue
from bandpo.bounds import Radius, RatioBounds, in_band
from bandpo.bounds.band import radius_of_sides
from bandpo.bounds.regions import topk_divergence, with_rest
from bandpo.divergences import KL, REVERSE_KL
from bandpo.projection import Direction, projection
from bandpo.surrogates.stops import never, stops
from bandpo.surrogates.token import ratio


def _stopped(
    log_ratio: Tensor,
    advantages: Tensor,
    bounds: RatioBounds,
    radius: Radius = 0.05,
    direction: Direction = "reverse",
    weight: float = 1.0,
    *,
    old_logprobs: Tensor,
    topk_logprobs: Tensor,
) -> Tensor:
    """None, but for two outcomes without the regression: the projected one is then a constant outside of the ball."""
    if weight or topk_logprobs.shape[-1]:
        return never(log_ratio, advantages, bounds)
    return ~in_band(log_ratio, old_logprobs, REVERSE_KL if direction == "reverse" else KL, radius)


@traits("without_advantage", "extras_with_gradient")
@stops(_stopped)
@dataclass(frozen=True, eq=False)
class Projected(ByValue):
    """`A·q/π_old - α·KL(π ‖ sg(q))`, with `q` the projection of the policy onto the KL ball around π_old (TROLL).

    The formula of arXiv:2510.03817 is known to us from two secondary sources that agree, the gradient through the
    projection is our derivation. `q` is `bandpo.projection.project` of the old policy's top K tokens, the sampled one and
    all others together. Inside of the ball it is the policy itself, `w = 1` and the second term is 0. Outside, the first
    term moves the policy along the surface, and the second pulls it back, also where A = 0. The bounds are not used.

    For two outcomes `w = -α·p/A·(logit(pr) - logit(edge))` outside, with the edge of `Band(REVERSE_KL)`: the sampled token is
    pulled to the edge from both sides, and pushed no further.

    Args:
        radius: ε > 0 in nats, a number or a tensor that broadcasts to the tokens. 0.05 in re-implementations.
        k: How many tokens the trainers store. 64 in the paper's notes, where fewer are kept if they hold 99.999%.
        direction: "reverse" (TROLL's) or "forward"; see `bandpo.projection.project`.
        weight: α >= 0, in objective per nat. 1 in a re-implementation.

    Raises:
        TypeError: If the radius is a pair, or an argument has the wrong type.
        ValueError: If a number is out of range, or the direction is unknown.

    Examples:
        >>> x, none = torch.tensor([[0.9]]).log(), torch.zeros(1, 1, 0)
        >>> Projected(weight=0.0)(
        ...     x - torch.tensor([[0.5]]).log(), torch.ones(1, 1), None, logprobs=x, old_logprobs=torch.tensor([[0.5]]).log(),
        ...     mask=torch.ones(1, 1), topk_logprobs=none, old_topk_logprobs=none, sampled_in_topk=torch.tensor([[False]]),
        ... )
        tensor([[1.3136]])
    """

    radius: Radius = 0.05
    k: int = 64
    direction: Direction = "reverse"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.radius, tuple):
            raise TypeError(f"Projected: a ball has one radius for both sides, got the pair {self.radius!r}")
        radius_of_sides(self.radius)
        check_int("Projected: k", self.k)
        if self.k < 1:
            raise ValueError(f"Projected: k must be a whole number >= 1, got {self.k!r}")
        if self.direction not in ("reverse", "forward"):
            raise ValueError(f"Projected: direction is {self.direction!r}; choose one of reverse, forward")
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float):
            raise TypeError(f"Projected: weight must be a number, got {self.weight!r}")
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"Projected: weight must be a finite number >= 0, got {self.weight}")

    def divergence(
        self,
        *,
        logprobs: Tensor,
        old_logprobs: Tensor,
        topk_logprobs: Tensor,
        old_topk_logprobs: Tensor,
        sampled_in_topk: Tensor,
    ) -> Tensor:
        """KL divergence of each position before the projection, in the direction of the ball, for the metrics.

        Args:
            logprobs: As a surrogate is given them, `(batch, time)`.
            old_logprobs: As a surrogate is given them, `(batch, time)`.
            topk_logprobs: As in `bandpo.bounds.TopK`, `(batch, time, K)`.
            old_topk_logprobs: As in `bandpo.bounds.TopK`, `(batch, time, K)`.
            sampled_in_topk: As in `bandpo.bounds.TopK`, `(batch, time)`.

        Returns:
            float64 tensor `(batch, time)` without gradient.
        """
        return topk_divergence(
            REVERSE_KL if self.direction == "reverse" else KL,
            logprobs=logprobs,
            old_logprobs=old_logprobs,
            topk_logprobs=topk_logprobs,
            old_topk_logprobs=old_topk_logprobs,
            sampled_in_topk=sampled_in_topk,
        )

    def __call__(
        self,
        log_ratio: Tensor,
        advantages: Tensor,
        bounds: RatioBounds | Tensor | None,
        *,
        logprobs: Tensor,
        old_logprobs: Tensor,
        mask: Tensor,
        topk_logprobs: Tensor,
        old_topk_logprobs: Tensor,
        sampled_in_topk: Tensor,
    ) -> Tensor:
        del bounds
        used = as_mask(mask).unsqueeze(-1)
        new, old = (
            with_rest(
                sampled,
                torch.where(used, top, -torch.inf),  # so that a NaN there reaches no gradient
                sampled_in_topk,
                rounding=torch.finfo(old_logprobs.dtype).eps,
            )
            for sampled, top in ((logprobs, topk_logprobs), (old_logprobs, old_topk_logprobs.detach()))
        )
        found = projection(new, old, self.radius, self.direction)
        # Where the sampled token is among the K, its own log-prob is put into the mixture as well: the sum of both gradients
        # is that of the token.
        shift = new.logsumexp(-1, keepdim=True), old.logsumexp(-1, keepdim=True)
        sampled = [x.unsqueeze(-1) - y for x, y in zip((logprobs, old_logprobs), shift, strict=True)]
        moved = (found.log_mixture(*sampled) - sampled[1]).squeeze(-1).to(log_ratio.dtype)
        value = ratio(torch.where(found.outside, moved, log_ratio)) * advantages
        if not self.weight:
            return value
        possible = found.new > -torch.inf
        gap = torch.where(possible, found.new - found.log_mixture(found.new, found.old).detach(), 0.0)
        gap = torch.where(gap < torch.inf, gap, 0.0)
        pull = torch.where(found.outside, (found.new.exp() * gap).sum(-1), 0.0)
        return value - self.weight * pull.to(value.dtype)
