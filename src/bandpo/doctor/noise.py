"""The noise floor of the ratio: the same tokens scored twice by one model, against the width of a trust region."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bandpo._inputs import as_mask, is_logprob
from bandpo.bounds import RatioBounds
from bandpo.doctor.streams import Quantiles, rounded
from bandpo.metrics import PROB_BINS, PROB_EDGES
from bandpo.monitoring.findings import Finding
from bandpo.objective import Objective

NARROW = 3.0
"""Half the width of a region over the 0.99 quantile of the noise, below which the region is told as narrow."""
SHARES = (0.5, 0.9, 0.99)
_EDGES = torch.tensor(PROB_EDGES, dtype=torch.float64)


class Noise:
    """The distribution of `|log r|` in bins of p between two scorings of the same tokens, and regions told against it.

    Quantiles are exact up to 524,288 tokens of a bin, and within a relative error of 2⁻¹⁰ beyond; see
    `bandpo.doctor.streams.Quantiles`. Counts are exact.

    Args:
        regions: Objectives whose regions are compared; those whose interval does not depend on p alone are left out.

    Examples:
        >>> from bandpo import OBJECTIVES
        >>> found = Noise([OBJECTIVES["grpo"]])
        >>> found.add(torch.full((4,), -0.1), torch.tensor([-0.1, -0.11, -0.12, -0.13]))
        >>> found.tokens, round(found.quantiles("0.9:0.99", 0.5), 3), found.crossed["grpo"]
        (4, 0.015, 0)
    """

    def __init__(self, regions: Sequence[Objective] = ()) -> None:
        self.regions = [o for o in regions if _of_p_alone(o)]
        self.tokens = 0
        """Number of tokens that both scorings have."""
        self.crossed = {o.name: 0 for o in self.regions}
        """Number of tokens that the noise alone puts outside of each region, on either side."""
        self.total = Quantiles()
        """The noise of all tokens."""
        self._bins = [Quantiles() for _ in PROB_BINS]
        self._logp = [0.0] * len(PROB_BINS)

    def add(self, first: Tensor, second: Tensor, mask: Tensor | None = None) -> None:
        """Take further tokens.

        Args:
            first: Log-probs of the tokens, any shape and float dtype; p is that of these.
            second: The same tokens scored again, the same shape.
            mask: The tokens that count, bool or 0/1; None for all. Tokens of which one is not finite count nowhere.

        Raises:
            ValueError: If the shapes differ.
        """
        if first.shape != second.shape or (mask is not None and mask.shape != first.shape):
            shapes = [tuple(x.shape) for x in (first, second, *([] if mask is None else [mask]))]
            raise ValueError(f"noise: two scorings (and a mask) of the same tokens have one shape, got {shapes}")
        valid = is_logprob(first) & is_logprob(second)
        valid = valid if mask is None else valid & as_mask(mask)
        a, b = (x.detach()[valid].to(torch.float64).clamp(max=0.0) for x in (first, second))
        self.tokens += len(a)
        apart = (b - a).abs()
        self.total.add(apart)
        bins = torch.bucketize(a.exp(), _EDGES.to(a.device), right=True)
        for i, quantiles in enumerate(self._bins):
            inside = bins == i
            quantiles.add(apart[inside])
            self._logp[i] += a[inside].sum().item()
        for objective in self.regions:
            low, high = edges(objective, a)
            self.crossed[objective.name] += int(((b - a > high) | (b - a < -low)).sum())

    def quantiles(self, at: str, share: float) -> float:
        """A quantile of `|log r|` in a bin, in nats; NaN in an empty one.

        Args:
            at: Name of the bin, of `bandpo.metrics.PROB_BINS`.
            share: Between 0 and 1.
        """
        return self._bins[PROB_BINS.index(at)].at(share)

    def widths(self, objective: Objective) -> Mapping[str, float]:
        """Half the width of a region over the 0.99 quantile of the noise, for each bin with tokens; infinite without noise.

        Half the width is the mean of the distances in log r from 1 to both edges, taken at the geometric mean of the bin's p.
        An edge that no policy can cross, because it is 0 or 1/p, is left out; where both are, the width is infinite.

        Args:
            objective: One of the regions.
        """
        found: dict[str, float] = {}
        for i, at in enumerate(PROB_BINS):
            if self._bins[i].count:
                low, high = edges(objective, torch.tensor([self._mean_logp(i)], dtype=torch.float64))
                sides = [x for x in (low.item(), high.item()) if math.isfinite(x)]
                width = sum(sides) / len(sides) if sides else math.inf
                noise = self._bins[i].at(0.99)
                found[at] = width / noise if noise > 0 else math.inf
        return found

    def narrowest(self) -> list[tuple[float, str, float]]:
        """For each region its least width as a multiple of the noise, its name, and p there; only where that is finite."""
        found: list[tuple[float, str, float]] = []
        for objective in self.regions:
            width, at = min(((w, at) for at, w in self.widths(objective).items()), default=(math.inf, ""))
            if math.isfinite(width):
                found.append((width, objective.name, math.exp(self._mean_logp(PROB_BINS.index(at)))))
        return found

    def numbers(self) -> dict[str, float]:
        """What was measured, by name: quantiles in nats, widths as multiples of the noise."""
        found: dict[str, float] = {"tokens": self.tokens}
        for at, quantiles in (("all", self.total), *zip(PROB_BINS, self._bins, strict=True)):
            if quantiles.count:
                found |= {f"{at}/tokens": quantiles.count, f"{at}/max": quantiles.largest}
                found |= {f"{at}/q{share}": quantiles.at(share) for share in SHARES}
        for objective in self.regions:
            found[f"{objective.name}/crossed"] = self.crossed[objective.name] / max(1, self.tokens)
            found |= {f"{objective.name}/width/{at}": w for at, w in self.widths(objective).items() if math.isfinite(w)}
        return {name: rounded(value) for name, value in found.items()}

    def table(self) -> list[str]:
        """Lines of a table: a row for each bin, with half the width of each region as a multiple of the noise."""
        widths = {o.name: self.widths(o) for o in self.regions}
        header = f"{'p':>9} {'tokens':>8} {'median':>8} {'.9':>8} {'.99':>8} {'most':>8}"
        rows = [header + "".join(f"  {name:>9}" for name in widths)]
        for i, at in enumerate(PROB_BINS):
            q = self._bins[i]
            if q.count:
                cells = "".join(f" {x:>8.2g}" for x in (*(q.at(share) for share in SHARES), q.largest))
                multiples = "".join(f"  {_times(w[at]):>9}" for w in widths.values())
                rows.append(f"{at:>9} {q.count:>8}{cells}{multiples}")
        return rows

    def finding(self, what: str = "the same tokens scored twice") -> Finding:
        """The finding of the doctor.

        Args:
            what: How the two scorings differ.
        """
        if not self.tokens:
            return Finding("noise", "note", f"not known: {what}, and no token has two finite log-probs")
        seen = f"{what}: |log r| is {self.total.at(0.5):.2g} in the median, {self.total.at(0.99):.2g} at .99, "
        seen += f"{self.total.largest:.2g} at most"
        error = max(q.error for q in (self.total, *self._bins))
        seen += f" (quantiles to {error:.1%})" if error else ""
        narrowest = self.narrowest()
        seen += "".join(f"; half of {name} at p = {p:.2g} is {_times(width)} that" for width, name, p in narrowest)
        least = min(narrowest)[0] if narrowest else math.inf
        level = "problem" if least < 1 else "warning" if least < NARROW else "ok"
        if level == "ok":
            return Finding("noise", "ok", seen, details=tuple(self.table()), numbers=self.numbers())
        crossed = max(self.crossed.values()) / self.tokens
        return Finding(
            "noise",
            level,
            seen,
            f"the region is {'smaller than' if level == 'problem' else 'hardly wider than'} what rounding alone does to a "
            f"ratio: noise puts {crossed:.2%} of the tokens outside before any weight has moved",
            "float32 (or float16) log-probs and head, the same kernels, batch shape and padding for both scorings; a larger "
            "radius",
            tuple(self.table()),
            self.numbers(),
        )

    def _mean_logp(self, i: int) -> float:
        return self._logp[i] / max(1, self._bins[i].count)


def noise(first: Tensor, second: Tensor, mask: Tensor | None = None, *, objectives: Sequence[Objective] = ()) -> Noise:
    """The noise floor of the ratio from two scorings of the same tokens by the same weights.

    Args:
        first: Log-probs of the tokens, any shape and float dtype.
        second: The same tokens scored again, for example in other batches, with other padding, or in another dtype.
        mask: The tokens that count, the same shape, bool or 0/1; None for all.
        objectives: Objectives whose regions are told against the noise.

    Returns:
        Its distribution by bins of p. `Noise.finding` says what it means.

    Raises:
        ValueError: If the shapes differ.

    Examples:
        >>> from bandpo import OBJECTIVES
        >>> logp = torch.linspace(-3, -0.01, 500)
        >>> found = noise(logp, logp + 0.3, objectives=[OBJECTIVES["grpo"]])
        >>> found.finding().level
        'problem'
    """
    found = Noise(objectives)
    found.add(first, second, mask)
    return found


def edges(objective: Objective, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Distances in `log r` from 1 to the lower and to the upper edge; infinite for an edge that no policy can cross.

    Args:
        objective: An objective whose interval depends on p alone.
        logprobs: Log-probs, float64, `(n,)`.
    """
    found = objective.bounds(logprobs)
    assert isinstance(found, RatioBounds)
    lower, upper = (x.to(torch.float64).expand(logprobs.shape) for x in found)
    low, high = -lower.log(), upper.log()
    return low, high.masked_fill(high >= -logprobs - 1e-9, math.inf)


def _of_p_alone(objective: Objective) -> bool:
    if objective.bounds_inputs or objective.ratio_level != "token" or "of_batch" in objective.traits:
        return False
    return isinstance(objective.bounds(torch.tensor([-0.5], dtype=torch.float64)), RatioBounds)


def _times(multiple: float) -> str:
    return "-" if math.isinf(multiple) else f"{multiple:.3g}x"
