"""Who pays: the share of the gradient of each bin of p, of both signs of the advantage, and what the region takes away."""

import dataclasses
import math

import torch
from torch import Tensor

from bandpo.doctor.columns import Part
from bandpo.doctor.streams import rounded
from bandpo.metrics import PROB_BINS, PROB_EDGES
from bandpo.monitoring.findings import Finding
from bandpo.objective import Objective
from bandpo.surrogates import MAX_LOG_RATIO
from bandpo.terms import TokenObjective
from bandpo.zoo import OBJECTIVES

MUCH = 0.5
"""Share of the gradient of one half that a region takes away, above which it is told as tight."""
_EDGES = torch.tensor(PROB_EDGES, dtype=torch.float64)
_RARE = 4  # bins of tokens that count as rare: p < 0.1


class Payers:
    """The gradient mass `|dJ/dlog π|` of the tokens under objectives, by automatic differentiation of the library's own code.

    A token's mass has the weight that the aggregation gives to its sequence: 1 for means and sums over tokens, 1 over its
    length for `seq-mean-token-mean`. The mass without a region is that of `r·A`; what an objective falls short of it is taken
    away. Tokens with A > 0 can lose gradient at the upper edge (the upper half of a region), those with A < 0 at the lower one.
    Tokens with A = 0 belong to neither half and are left out.

    Args:
        objectives: The objectives; those that need more than a batch has are left out, with a reason in the table.
        tokens: Number of tokens of the batch.
        size: Tokens of a part.
    """

    def __init__(self, objectives: list[Objective], tokens: int, size: int) -> None:
        self._left_out: dict[str, str] = {}
        self._objectives: list[Objective] = []
        for objective in objectives:
            reason = _unfit(objective, whole=tokens <= size)
            if reason:
                self._left_out[objective.name] = reason
            else:
                self._objectives.append(objective)
        self._unbounded = [_without_region(objective) for objective in self._objectives]
        shape = (len(self._objectives), 2, 2, len(PROB_BINS))  # of an objective: kept or taken; A > 0 or < 0; bin of p
        self._mass = torch.zeros(shape, dtype=torch.float64)
        self._by_token = False

    def add(self, part: Part) -> None:
        """Take the tokens of a part.

        Args:
            part: The part.
        """
        self._by_token |= not part.by_sequence
        cells: dict[str, Tensor] = {}
        for i, objective in enumerate(self._objectives):
            if needs_sampler(objective) and not part.has("rollout_logprobs"):
                self._left_out[objective.name] = "it needs the sampler's log-probs"
                continue
            if not part.by_sequence and objective.ratio_level != "token":
                self._left_out[objective.name] = "it needs whole sequences"
                continue
            terms, new = part.terms(objective)
            if objective.anchor not in cells:
                bins = torch.bucketize(terms.anchor_logprobs.exp(), _EDGES.to(terms.anchor_logprobs), right=True)
                cells[objective.anchor] = (bins + len(PROB_BINS) * (terms.advantages < 0)).flatten()
            weights = _weights(terms, part)
            (slope,) = torch.autograd.grad(terms.value.sum(), new, retain_graph=True)
            kept = slope.abs() * weights
            taken = (self._free(i, part) * weights - kept).clamp_min(0.0)
            for side, mass in enumerate((kept, taken)):
                self._mass[i, side] += (
                    cells[objective.anchor].bincount(mass.flatten().double(), 2 * len(PROB_BINS)).view(2, -1).cpu()
                )

    def _free(self, i: int, part: Part) -> Tensor:
        """The gradient of r·A at the level of an objective, without the weight of its aggregation."""
        objective = self._objectives[i]
        if objective.ratio_level == "token" and objective.correction is None:
            terms, _ = part.terms(objective)
            x = terms.log_ratio.detach()
            # Beyond the limit of the log-ratio there is no gradient.
            return terms.advantages.abs() * torch.where(x.abs() < MAX_LOG_RATIO, x.exp(), 0.0)
        terms, new = part.terms(self._unbounded[i])
        (slope,) = torch.autograd.grad(terms.value.sum(), new, retain_graph=True)
        return slope.abs()

    def findings(self) -> list[Finding]:
        """The finding, if an objective could be evaluated and some token has a gradient."""
        rows: list[str] = []
        numbers: dict[str, float] = {}
        said: list[str] = []
        tight: list[str] = []
        for objective, (kept, taken) in zip(self._objectives, self._mass, strict=True):
            if objective.name in self._left_out or not (kept + taken).sum() > 0:
                continue
            name = objective.name
            lost: list[float] = []
            for side, half in enumerate(("upper", "lower")):
                found = _half(kept[side], taken[side], kept.sum().item())
                lost.append(found["taken"])
                numbers |= {f"{name}/{half}/{key}": value for key, value in found.items()}
                if found["taken"] > MUCH:
                    tight.append(f"{name}, {half}")
            said.append(
                f"{name} takes {_percent(lost[0])} of the upper half (A > 0) and {_percent(lost[1])} of the lower"
            )
            rows += _table(name, kept, taken)
        rows += [f"left out: {name}, because {reason}" for name, reason in self._left_out.items()]
        if not said:
            return []
        seen = f"of the gradient, {'; '.join(said)}"
        if self._by_token:
            seen += " (sequences are not known: every token has the same weight)"
        numbers = {name: rounded(value) for name, value in numbers.items() if not math.isnan(value)}
        if tight:
            return [
                Finding(
                    "gradient",
                    "warning",
                    f"{seen}; more than half is gone: {', '.join(tight)}",
                    "most of what these tokens would teach is clipped away before it reaches a weight",
                    "a larger radius on that side, a smaller learning rate, fewer steps for each rollout",
                    tuple(rows),
                    numbers,
                )
            ]
        return [Finding("gradient", "ok", seen, details=tuple(rows), numbers=numbers)]


def _weights(terms: TokenObjective, part: Part) -> Tensor:
    """The weight of a token in the loss, up to one factor for the batch; 0 where its advantage is 0 or it counts nowhere."""
    counted = terms.mask if terms.counted is None else terms.mask & terms.counted
    weights = (counted & ~terms.nonfinite & (terms.advantages != 0)).to(terms.value.dtype)
    if terms.objective.aggregation == "seq-mean-token-mean" and part.by_sequence:
        weights = weights / counted.sum(-1, keepdim=True).clamp_min(1)
    return weights


def _without_region(objective: Objective) -> Objective:
    """The objective r·A at the same level, with the same aggregation, anchor and correction."""
    free = OBJECTIVES["no-clip"]
    return dataclasses.replace(
        objective, bounds=free.bounds, surrogate=free.surrogate, filter=None, group_stats=None, name="free"
    )


def _unfit(objective: Objective, *, whole: bool) -> str:
    """Why an objective cannot be evaluated on a batch in parts, "" if it can."""
    if objective.extras:
        return f"it needs {', '.join(objective.extras)}"
    if "of_batch" in objective.traits and not whole:
        return "it depends on the whole batch"
    return ""


def needs_sampler(objective: Objective) -> bool:
    """Whether an objective needs the log-probs of the sampler.

    Args:
        objective: The objective.
    """
    of_filters = any("rollout" in rule.needs for rule in objective.filters)
    return objective.anchor == "rollout" or objective.correction is not None or of_filters


def _half(kept: Tensor, taken: Tensor, total: float) -> dict[str, float]:
    """What one sign of the advantage has: its share of all that is kept, and the share that it loses; also by bins."""
    found: dict[str, float] = {}
    pieces = {"": slice(None), "/rare": slice(_RARE)} | {f"/{at}": slice(b, b + 1) for b, at in enumerate(PROB_BINS)}
    for name, piece in pieces.items():
        k, t = kept[piece].sum().item(), taken[piece].sum().item()
        found[f"kept_share{name}"] = _over(k, total)
        found[f"taken{name}"] = _over(t, k + t)
    return found


def _table(name: str, kept: Tensor, taken: Tensor) -> list[str]:
    """What each bin of p has of the gradient that is kept, and what it loses, for both signs of the advantage."""
    total = kept.sum().item()
    rows = [f"{'p':>14}  A > 0: kept    taken    A < 0: kept    taken  ({name})"]
    for b, at in enumerate(PROB_BINS):
        if not (kept[:, b] + taken[:, b]).sum() > 0:
            continue
        cells = [
            (_over(kept[s, b].item(), total), _over(taken[s, b].item(), (kept + taken)[s, b].item())) for s in (0, 1)
        ]
        (up, up_lost), (down, down_lost) = cells
        rows.append(
            f"{at:>14}      {_percent(up):>7}  {_percent(up_lost):>7}         {_percent(down):>7}  {_percent(down_lost):>7}"
        )
    return rows


def _over(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"
