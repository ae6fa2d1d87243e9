"""Which prompts and completions to train on, and the weights that keep the expected gradient: dynamic pruning.

After arXiv:2603.04135, of which we know the abstract and accounts by others: rates r_q and r_o, prompts pruned by history
before they are sampled, completions by |A| after, weights C/(1-P). How its P are made is not known to us; the strata below are
our reading, after InfoBatch (arXiv:2303.04947): what scores below the mean is thinned at random, the rest is kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args

import torch
from torch import Tensor

from bandpo.groups import informative, scored
from bandpo.objective import Objective

Mode = Literal["fixed_count", "bernoulli", "topk_biased"]


class Selection(NamedTuple):
    """What to train on, all of one shape."""

    keep: Tensor
    """Bool."""
    weight: Tensor
    """`1/(1-P)` of what is kept, 0 of the rest; for sums over the *unpruned* count. For means over the kept ones
    multiply by C, the kept share."""
    dropping: Tensor
    """P, the probability with which each was dropped."""


class Selector(Protocol):
    """Chooses completions of groups: `rewards` and `advantages` are `(groups, group_size)`; a reward of NaN is no score."""

    def __call__(self, rewards: Tensor, advantages: Tensor, *, generator: torch.Generator | None = None) -> Selection:
        """The choice."""
        ...


def stratified(
    scores: Tensor, low: Tensor, rate: float, *, mode: Mode = "fixed_count", generator: torch.Generator | None = None
) -> Selection:
    """Thin the low stratum of each row.

    "fixed_count" drops exactly `floor(rate·m)` of a row's m low entries, uniformly at random, so P = floor(rate·m)/m, and
    both `Σ w·x` and the mean over the kept ones times C are unbiased. "bernoulli" drops each with P = rate: only the sum is
    unbiased, a mean over a random number of survivors is not. "topk_biased" drops the lowest scores with certainty and
    weighs nothing: a baseline (as in CPPO, arXiv:2503.22342), which no weight can correct.

    Args:
        scores: `(..., n)`; decides only which entries "topk_biased" drops.
        low: Bool, the entries that may be dropped.
        rate: Share of them, in [0, 1).
        mode: See above.
        generator: Of the draw.

    Raises:
        ValueError: If the rate or the mode is not allowed.

    Examples:
        >>> low = torch.tensor([[True, True, False, False]])
        >>> stratified(torch.zeros(1, 4), low, 0.5, generator=torch.Generator().manual_seed(0)).weight
        tensor([[2., 0., 1., 1.]])
    """
    if not 0 <= rate < 1:
        raise ValueError(f"pruning rate must be in [0, 1): what is never kept cannot be weighted; got {rate}")
    if mode not in get_args(Mode):
        raise ValueError(f"pruning mode is {mode!r}; choose one of {', '.join(get_args(Mode))}")
    zero = torch.zeros(scores.shape, dtype=torch.float32, device=scores.device)
    noise = torch.rand(scores.shape, generator=generator, dtype=torch.float64).to(scores.device)
    if mode == "bernoulli":
        dropped, dropping = low & (noise < rate), torch.where(low, rate, zero)
    else:
        size = low.sum(-1, keepdim=True)
        count = (rate * size.to(torch.float64) + 1e-9).floor()
        order = scores.to(torch.float64) if mode == "topk_biased" else noise
        rank = order.masked_fill(~low, math.inf).argsort(dim=-1, stable=True).argsort(dim=-1)
        dropped = low & (rank < count)
        dropping = torch.where(low, (count / size.clamp(min=1)).to(zero.dtype), zero)
    weight = torch.ones_like(zero) if mode == "topk_biased" else 1 / (1 - dropping)
    return Selection(~dropped, weight.masked_fill(dropped, 0.0), dropping)


def check_nothing_lost(objective: Objective, *, kl_coef: float = 0.0, fix: str) -> None:
    """Completions with advantage 0 may be left out for certain only where they have no gradient.

    Args:
        objective: Of the loss.
        kl_coef: Coefficient of a KL term to a reference in the loss.
        fix: What to do about it, for the message.

    Raises:
        ValueError: If they have one.
    """
    if "without_advantage" in objective.traits or kl_coef:
        term = f"the KL term (kl_coef={kl_coef})" if kl_coef else f"objective {objective.name!r}"
        raise ValueError(
            f"completions with advantage 0 are left out for certain, but {term} has a gradient there, which no weight brings "
            f"back: {fix}"
        )


@dataclass(frozen=True)
class Informative:
    """DAPO's dynamic sampling as a selector: groups whose scores are all equal go (arXiv:2503.14476).

    Their advantages are 0, so nothing is lost and nothing weighted, where the loss has no other term; see
    `check_nothing_lost`.
    """

    def __call__(self, rewards: Tensor, advantages: Tensor, *, generator: torch.Generator | None = None) -> Selection:
        """The groups with signal."""
        keep = informative(rewards.flatten(), rewards.shape[-1]).view(rewards.shape)
        weight = keep.to(torch.float32)
        return Selection(keep, weight, 1 - weight)


@dataclass
class Pruning:
    """Dynamic pruning (arXiv:2603.04135; our reading): low-signal prompts before they are sampled, low |A| after.

    A prompt's score is the mean |A| of its completions when it was last sampled; low is a known score below the mean of all
    known ones. A completion is low where |A| is below its group's mean. Advantages are those of the whole group.

    The weights make any sum over samples unbiased, clipped or with a KL per sample, as long as the choice does not look at the
    policy in training. Not through Adam, and not through a denominator that is counted after pruning. `check` refuses the
    objectives for which there is no such sum. A completion without a score (reward or advantage NaN) has no gradient, and takes
    no part in the means.

    Args:
        prompts: r_q, the share of low prompts to leave out.
        completions: r_o, the share of low completions.
        mode: See `stratified`.
        zeros: Drop every completion with A = 0 for certain: it has no gradient, so nothing is lost. False where the loss has
            another term, such as a KL per sample; see `check`.
        until: Share of the run after which nothing is pruned any more; InfoBatch stops at 0.875.
        history: Scores by prompt; survives in `state_dict`.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> prune = Pruning(completions=0.5)
        >>> A = torch.tensor([[2.0, -0.1, 0.1, -2.0]])
        >>> prune(A, A, generator=torch.Generator().manual_seed(0)).keep
        tensor([[ True,  True, False,  True]])
    """

    prompts: float = 0.0
    completions: float = 0.0
    mode: Mode = "fixed_count"
    zeros: bool = True
    until: float = 1.0
    history: dict[str, float] = field(default_factory=dict[str, float], repr=False)

    def __post_init__(self) -> None:
        for name in ("prompts", "completions"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise ValueError(f"Pruning: {name} must be a number in [0, 1), got {value!r}")
        if self.mode not in get_args(Mode):
            raise ValueError(f"Pruning: mode is {self.mode!r}; choose one of {', '.join(get_args(Mode))}")
        if not 0 < self.until <= 1:
            raise ValueError(f"Pruning: until must be in (0, 1], got {self.until!r}")

    def check(self, objective: Objective, *, kl_coef: float = 0.0) -> None:
        """Refuse an objective whose gradient the weights cannot keep.

        Args:
            objective: Of the loss.
            kl_coef: Coefficient of a KL term to a reference, with the weights of its samples (as in `policy_loss`).

        Raises:
            ValueError: With the reason and the fix.

        Examples:
            >>> from bandpo import OBJECTIVES
            >>> Pruning(completions=0.5).check(OBJECTIVES["bandpo-kl"])
        """
        if (self.prompts or self.completions) and "of_batch" in objective.traits:
            raise ValueError(
                f"pruning with objective {objective.name!r}: it looks at the whole batch, so that leaving samples out changes "
                "what it does to the others, which no weight can mend; turn pruning off, or choose another objective"
            )
        if self.completions and self.zeros and self.mode != "topk_biased":
            check_nothing_lost(objective, kl_coef=kl_coef, fix="set zeros=False")

    def __call__(self, rewards: Tensor, advantages: Tensor, *, generator: torch.Generator | None = None) -> Selection:
        """Completions by |A|; equal ones are not below their mean, and all stay unless they are 0."""
        if rewards.shape != advantages.shape:
            raise ValueError(
                f"rewards {tuple(rewards.shape)} and advantages {tuple(advantages.shape)} must have one and the same shape "
                "(groups, group_size)"
            )
        size, counts, mean = _sizes(rewards, advantages)
        nothing = (size == 0) & self.zeros & (self.completions > 0) & (self.mode != "topk_biased")
        # Against rounding: equal |A| are not below their own mean.
        low = (size < mean * (1 - 1e-6)) & counts & ~nothing
        found = stratified(size, low, self.completions, mode=self.mode, generator=generator)
        keep = found.keep & ~nothing
        return Selection(keep, found.weight.masked_fill(nothing, 0.0), found.dropping.masked_fill(nothing, 1.0))

    def select_prompts(self, keys: Sequence[str], *, generator: torch.Generator | None = None) -> Selection:
        """Prompts by their history, `(prompts,)`; one that was never sampled, or never scored, is kept."""
        # A checkpoint of an older version may hold NaN.
        known = {key: score for key, score in self.history.items() if math.isfinite(score)}
        scores = torch.tensor([known.get(key, math.inf) for key in keys], dtype=torch.float64)
        low = scores < (sum(known.values()) / len(known) * (1 - 1e-6) if known else 0.0)
        return stratified(scores, low, self.prompts, mode=self.mode, generator=generator)

    def update(self, keys: Sequence[str], advantages: Tensor, rewards: Tensor | None = None) -> None:
        """Note what the prompts gave this time. A prompt without a score keeps what was known of it.

        Args:
            keys: One for each group.
            advantages: `(groups, group_size)`, of whole groups; NaN where there is no score.
            rewards: The same shape, NaN where there is no score. Needed where unscored completions have advantage 0, as
                `group_advantages` makes them: their 0 says nothing about the prompt.
        """
        if len(keys) != len(advantages):
            raise ValueError(f"{len(keys)} prompts and {len(advantages)} groups of advantages do not match")
        _, counts, mean = _sizes(advantages if rewards is None else rewards, advantages)
        scores = cast("list[float]", mean.squeeze(-1).tolist())
        measured = cast("list[bool]", counts.any(-1).tolist())
        self.history.update((k, s) for k, s, known in zip(keys, scores, measured, strict=True) if known)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"history": dict(self.history)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.history = dict(state["history"])


def _sizes(rewards: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """|A| of groups, 0 where nothing is scored; what is scored; and the mean |A| of the scored ones, `(groups, 1)`."""
    counts = scored(rewards) & scored(advantages)
    size = torch.where(counts, advantages.detach().abs(), 0.0)
    return size, counts, size.sum(-1, keepdim=True) / counts.sum(-1, keepdim=True).clamp_min(1)


def effective_sample_size(weight: Tensor) -> Tensor:
    """Kish's `(Σw)²/Σw²`, over the number kept: 1 where all weights are equal; 0-d.

    Examples:
        >>> effective_sample_size(torch.tensor([1.0, 1.0, 2.0, 0.0]))
        tensor(0.8889)
    """
    kept = weight[weight > 0]
    return kept.sum().square() / kept.square().sum().clamp(min=1e-12) / max(1, kept.numel())
