"""The KL to the reference as a batch estimates it: three estimators, their noise, and what the gradient of each descends."""

import math

from bandpo._inputs import is_logprob
from bandpo.doctor.columns import Part
from bandpo.doctor.streams import Moments, rounded
from bandpo.monitoring.findings import Finding
from bandpo.reference import DESCENDS, ReferenceKL, k1, k2, k3
from bandpo.surrogates import hold

DECIDED = 0.1
"""Share of the estimate that one token may have before it is told as decided by few."""
_PLAIN: tuple[ReferenceKL, ...] = ("k1", "k2", "k3")


class KLEstimates:
    """Means of k1, k2, k3 over the valid tokens with a reference, and of r·k3, which is right for tokens of π_old."""

    def __init__(self) -> None:
        self._moments: dict[ReferenceKL, Moments] = {name: Moments() for name in (*_PLAIN, "k3-ratio")}

    def add(self, part: Part) -> None:
        """Take the tokens of a part.

        Args:
            part: The part.
        """
        if not part.has("ref_logprobs"):
            return
        reference = part.columns["ref_logprobs"]
        valid = part.valid & is_logprob(reference)
        new = part.columns["logprobs"][valid]
        x = reference[valid] - new
        ratio = hold(new - part.columns["old_logprobs"][valid]).exp()
        values = {"k1": k1(x), "k2": k2(x), "k3": k3(x)}
        for name in _PLAIN:
            self._moments[name].add(values[name])
        self._moments["k3-ratio"].add(ratio * values["k3"])

    def findings(self) -> list[Finding]:
        """The finding, if the batch has log-probs of a reference."""
        count = self._moments["k1"].count
        if not count:
            return []
        rows = [f"{'':<9} {'mean':>10} {'± error':>10} {'sd':>10}  its expected gradient, on tokens of the policy"]
        numbers: dict[str, float] = {"tokens": count}
        for name, found in self._moments.items():
            error, sd = found.standard_error, math.sqrt(found.variance) if count > 1 else math.nan
            rows.append(f"{name:<9} {found.mean:>10.3g} {error:>10.2g} {sd:>10.3g}  {DESCENDS[name].on_policy}")
            numbers |= {f"{name}/mean": found.mean, f"{name}/error": error, f"{name}/variance": found.variance}
        best = self._moments["k3-ratio"]
        heaviest = best.largest / (best.mean * count) if best.mean > 0 else 0.0
        numbers["largest_share"] = heaviest
        numbers = {key: rounded(value) for key, value in numbers.items() if not math.isnan(value)}
        seen = (
            f"KL to the reference is {best.mean:.3g} ± {best.standard_error:.1g} nats a token by r·k3 (k1 says "
            f"{self._moments['k1'].mean:.3g})"
        )
        if heaviest > DECIDED and count >= 1 / DECIDED**2:
            return [
                Finding(
                    "kl estimate",
                    "warning",
                    f"{seen}; one token has {heaviest:.0%} of it",
                    "e^x grows without a bound where the reference likes a token much more than the policy does, so few tokens "
                    "decide the estimate and its gradient",
                    "more tokens in a step, a smaller kl_coef, a newer reference; see docs/kl.md",
                    tuple(rows),
                    numbers,
                )
            ]
        return [Finding("kl estimate", "note", seen, details=tuple(rows), numbers=numbers)]
