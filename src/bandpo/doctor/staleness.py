"""How far the tokens are from the policy in training: effective sample size of the ratios, age of the samples."""

import math
from typing import cast

import torch
from torch import Tensor

from bandpo._inputs import is_logprob
from bandpo.bounds import outside
from bandpo.doctor.columns import Part
from bandpo.doctor.streams import LogSum, rounded
from bandpo.monitoring.findings import Finding
from bandpo.objective import Objective

FEW = 0.5
"""Effective share of the tokens below which their weights are told as too unequal."""
OLD = 8.0
"""Age in updates above which samples count as old."""
_MOST_AGES = 1000  # different ages; a batch with more has something else in that column
_SHOWN = 8  # rows of the table of ages


class EffectiveSize:
    """Kish's effective sample size (Σw)²/Σw² of the weights π/π_old, and π/μ where the sampler μ is known.

    Weights are those of tokens, and those of sequences: the product of their tokens' ratios. Sums are taken of logarithms, so
    that no weight overflows. A sequence with a token that is not finite is left out.
    """

    def __init__(self) -> None:
        self._sums = {
            (level, name): (LogSum(), LogSum()) for level in ("tokens", "sequences") for name in ("π_old", "μ")
        }
        self._differs = False  # whether the sampler's log-probs are others than the old ones

    def add(self, part: Part) -> None:
        """Take the tokens of a part.

        Args:
            part: The part.
        """
        self._add("π_old", part, part.columns["old_logprobs"])
        if part.has("rollout_logprobs"):
            old, sampler = part.columns["old_logprobs"], part.columns["rollout_logprobs"]
            self._differs = self._differs or bool(((old != sampler) & part.valid).any())
            self._add("μ", part, sampler)

    def _add(self, name: str, part: Part, anchor: Tensor) -> None:
        valid = part.valid & is_logprob(anchor)
        x = (part.columns["logprobs"] - anchor).masked_fill(~valid, 0.0)
        found = {"tokens": x[valid]}
        if part.by_sequence:
            whole = valid.any(-1) & ~(part.mask & ~valid).any(-1)
            found["sequences"] = x.sum(-1)[whole]
        for level, exponents in found.items():
            once, twice = self._sums[level, name]
            once.add(exponents)
            twice.add(2 * exponents)

    def findings(self) -> list[Finding]:
        """The finding, if there was a token."""
        numbers: dict[str, float] = {}
        said: list[str] = []
        for name, key in (("π_old", "old"), ("μ", "sampler")):
            shares: list[str] = []
            for level in ("tokens", "sequences"):
                once, twice = self._sums[level, name]
                if not once.count or (name == "μ" and not self._differs):
                    continue
                share = min(1.0, math.exp(2 * once.value - twice.value) / once.count)
                numbers[f"{level}/{key}"] = rounded(share)
                numbers[f"{level}/{key}/largest"] = rounded(math.exp(once.largest - once.value))
                shares.append(f"{share:.3f} of the {once.count} {level}")
            if shares:
                said.append(f"{' and '.join(shares)} by π/{name}")
        if not said:
            return []
        seen = f"effective sample size: {'; '.join(said)}"
        least = min(value for key, value in numbers.items() if key in ("tokens/old", "tokens/sampler"))
        if least < FEW:
            heaviest = max(numbers[k] for k in numbers if k.startswith("tokens/") and k.endswith("/largest"))
            return [
                Finding(
                    "effective size",
                    "warning",
                    f"{seen}; one token has {heaviest:.1%} of the weight",
                    "a few large ratios have most of the weight: the policy has moved far from the one that sampled, or "
                    "sampler and trainer differ",
                    "fewer steps for each rollout, a smaller learning rate, fresher samples; against the sampler a correction "
                    "(tis) or an objective with the rollout anchor",
                    numbers=numbers,
                )
            ]
        return [Finding("effective size", "ok", seen, numbers=numbers)]


class Age:
    """How many updates old the samples are, and what part of each age is outside of a region.

    Where the batch has the version of the policy instead of an age, the newest version has the age 0.

    Args:
        objective: Whose region; None for none.
    """

    def __init__(self, objective: Objective | None) -> None:
        self._objective = objective
        self._counts: dict[float, list[float]] = {}  # age or version: tokens, tokens outside, sum of |log r|
        self._of_versions = False
        self._too_many = False

    def add(self, part: Part) -> None:
        """Take the tokens of a part.

        Args:
            part: The part.
        """
        if self._too_many or not (part.has("age") or part.has("version")):
            return
        self._of_versions = not part.has("age")
        given = part.columns["version" if self._of_versions else "age"]
        valid = part.valid & (given.to(torch.float64).isfinite())
        ages, places = cast("tuple[Tensor, Tensor]", torch.unique(given[valid].to(torch.float64), return_inverse=True))
        if len(ages) > _MOST_AGES:
            self._too_many = True
            return
        x = (part.columns["logprobs"] - part.columns["old_logprobs"])[valid].abs()
        columns = [torch.ones_like(x), self._outside(part)[valid].double(), x]
        sums = torch.stack([torch.zeros_like(ages).index_add_(0, places, c) for c in columns], 1)
        for age, row in zip(cast("list[float]", ages.tolist()), cast("list[list[float]]", sums.tolist()), strict=True):
            known = self._counts.setdefault(age, [0.0, 0.0, 0.0])
            self._counts[age] = [a + b for a, b in zip(known, row, strict=True)]
        self._too_many = len(self._counts) > _MOST_AGES

    def _outside(self, part: Part) -> Tensor:
        if self._objective is None:
            return torch.zeros_like(part.valid)
        terms, _ = part.terms(self._objective)
        with torch.no_grad():
            left = outside(terms.log_ratio, terms.advantages, terms.bounds) & terms.mask & ~terms.nonfinite
        return left.expand(terms.mask.shape).reshape(part.valid.shape)

    def findings(self) -> list[Finding]:
        """The finding, if the batch has ages or versions."""
        if self._too_many:
            return [
                Finding(
                    "age",
                    "note",
                    f"not known: the column of ages or versions has more than {_MOST_AGES} different numbers",
                )
            ]
        if not self._counts:
            return []
        newest = max(self._counts) if self._of_versions else 0.0
        rows = sorted((newest - at if self._of_versions else at, c) for at, c in self._counts.items())
        tokens = sum(c[0] for _, c in rows)
        mean = sum(age * c[0] for age, c in rows) / tokens
        oldest = rows[-1][0]
        late = sum(c[0] for age, c in rows if age > OLD) / tokens
        numbers = {"mean": mean, "oldest": oldest, "share_above_8": late}
        for age, (count, left, moved) in rows[:_MOST_AGES]:
            numbers |= {f"share/{age:g}": count / tokens, f"moved/{age:g}": moved / count}
            numbers |= {f"outside/{age:g}": left / count} if self._objective is not None else {}
        whose = "" if self._objective is None else f"  outside {self._objective.name}"
        table = [f"{'age':>7}  tokens   |log r|{whose}"]
        for age, (count, left, moved) in _few(rows):
            share = "" if self._objective is None else f"  {left / count:.4f}"
            table.append(f"{age:>7}  {count / tokens:<7.4f}  {moved / count:<7.4f}{share}")
        newest_is_0 = "; the newest version counts as age 0" if self._of_versions else ""
        seen = f"samples are {mean:.2f} updates old on average, {oldest:g} at most{newest_is_0}"
        details = tuple(table)
        numbers = {name: rounded(value) for name, value in numbers.items()}
        if rows[0][0] < 0:
            return [Finding("age", "warning", f"{seen}; {rows[0][0]:g} at least", "no sample can be younger than its policy",
                            "look at the column of ages", details, numbers)]  # fmt: skip
        if mean > OLD:
            return [
                Finding(
                    "age",
                    "warning",
                    seen,
                    "the policy has moved for many updates since these tokens were sampled",
                    "fewer rollouts in flight (a smaller staleness limit), more trainer time for each rollout; or an objective "
                    "with the rollout anchor (dppo-kl)",
                    details,
                    numbers,
                )
            ]
        return [Finding("age", "ok", seen, details=details, numbers=numbers)]


def _few(rows: list[tuple[float, list[float]]]) -> list[tuple[str, list[float]]]:
    """The rows of the table: of many ages, the older ones together."""
    shown = [(f"{age:g}", counts) for age, counts in rows[:_SHOWN]]
    rest = rows[_SHOWN:]
    if rest:
        together = [math.fsum(column) for column in zip(*(counts for _, counts in rest), strict=True)]
        shown.append((f">={rest[0][0]:g}", together))
    return shown
