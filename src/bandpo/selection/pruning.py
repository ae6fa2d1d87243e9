"""Dynamic pruning: the choice of prompts and completions to train on, with weights that keep the expected gradient.

This follows arXiv:2603.04135, of which we know the abstract and the accounts of others: rates r_q and r_o, prompts pruned by
history before they are sampled, completions pruned by |A| afterwards, and weights C/(1-P). How the paper computes P is not
known to us. The strata below are our reading, after InfoBatch (arXiv:2303.04947): entries that score below the mean are
thinned at random, and the others are kept.
"""

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args

import torch
from torch import Tensor

from bandpo.groups import informative, scored
from bandpo.objective import Objective

Mode = Literal["fixed_count", "bernoulli", "topk_biased"]
_KEY_BYTES = 16


class Selection(NamedTuple):
    """The choice of entries to train on; the three tensors have the same shape."""

    keep: Tensor
    """Whether each entry is kept, bool."""
    weight: Tensor
    """Weight of each entry, `1/(1-P)` if it is kept and 0 if not, for sums over the *unpruned* count. For means over the kept
    entries, multiply by C, the kept share."""
    dropping: Tensor
    """Probability P with which each entry was dropped."""


class Selector(Protocol):
    """A choice of completions within groups; `rewards` and `advantages` are `(groups, group_size)`, NaN without a score."""

    def __call__(self, rewards: Tensor, advantages: Tensor, *, generator: torch.Generator | None = None) -> Selection:
        """The selection, `(groups, group_size)`."""
        ...


def stratified(
    scores: Tensor, low: Tensor, rate: float, *, mode: Mode = "fixed_count", generator: torch.Generator | None = None
) -> Selection:
    """Drop entries from the low stratum of each row.

    "fixed_count" drops exactly `floor(rate·m)` of a row's m low entries, uniformly at random, so P = floor(rate·m)/m, and
    both `Σ w·x` and the mean over the kept entries times C are unbiased. "bernoulli" drops each low entry with P = rate: only
    the sum is unbiased; a mean over a random number of entries is not. "topk_biased" always drops the lowest scores, without
    weights: a baseline (as in CPPO, arXiv:2503.22342), which no weight can correct.

    Args:
        scores: `(..., n)`; only "topk_biased" uses the values.
        low: Whether each entry may be dropped, bool, the same shape.
        rate: Share of the low entries to drop, in [0, 1).
        mode: "fixed_count", "bernoulli" or "topk_biased".
        generator: Source of randomness.

    Returns:
        The selection, of the same shape.

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
    """Check that completions with advantage 0 have no gradient, so that they can be dropped with probability 1.

    Args:
        objective: The objective of the loss.
        kl_coef: Coefficient of a KL term to a reference in the loss.
        fix: The advice at the end of the message.

    Raises:
        ValueError: If such completions have a gradient.

    Examples:
        >>> from bandpo import OBJECTIVES
        >>> check_nothing_lost(OBJECTIVES["grpo"], fix="set zeros=False")
    """
    if "without_advantage" in objective.traits or kl_coef:
        term = f"the KL term (kl_coef={kl_coef})" if kl_coef else f"objective {objective.name!r}"
        raise ValueError(
            f"completions with advantage 0 are left out for certain, but {term} has a gradient there, which no weight brings "
            f"back: {fix}"
        )


@dataclass(frozen=True)
class Informative:
    """DAPO's dynamic sampling as a selector: groups whose scores are all equal are dropped (arXiv:2503.14476).

    The advantages of these groups are 0. If the loss has no other term, they have no gradient, so that no weights are needed;
    see `check_nothing_lost`.

    Examples:
        >>> rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> Informative()(rewards, rewards).keep
        tensor([[ True,  True],
                [False, False]])
    """

    def __call__(self, rewards: Tensor, advantages: Tensor, *, generator: torch.Generator | None = None) -> Selection:
        """The selection of the groups with signal, `(groups, group_size)`."""
        keep = informative(rewards.flatten(), rewards.shape[-1]).view(rewards.shape)
        weight = keep.to(torch.float32)
        return Selection(keep, weight, 1 - weight)


class PromptScores(Mapping[bytes, float]):
    """Scores of prompts, without the prompts: a key is the BLAKE2b hash of the text, of 16 bytes.

    Two of n different prompts share a key with a probability below n² / 2^129: 2e-21 for a billion prompts. They would share a
    score; nothing else depends on the keys. A checkpoint holds 24 bytes for each prompt.

    Args:
        scores: Scores by prompt or by key. A score that is not finite is not a measurement, and is left out.

    Examples:
        >>> scores = PromptScores({"1 + 1 =": 0.5})
        >>> scores["1 + 1 ="], scores[PromptScores.key("1 + 1 =")], "2 + 2 =" in scores
        (0.5, 0.5, False)
    """

    def __init__(self, scores: Mapping[str, float] | Mapping[bytes, float] | None = None) -> None:
        self._places: dict[bytes, int] = {}
        self._scores = array("d")
        self.update((scores or {}).items())

    @staticmethod
    def key(prompt: str | bytes) -> bytes:
        """The key of a prompt.

        Args:
            prompt: Text of the prompt; 16 bytes are a key already, and are returned.

        Raises:
            TypeError: If it is neither.
        """
        if isinstance(prompt, str):
            return blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=_KEY_BYTES).digest()
        if not isinstance(prompt, bytes) or len(prompt) != _KEY_BYTES:
            raise TypeError(f"a prompt is known by its text, or by a key of {_KEY_BYTES} bytes; got {prompt!r}")
        return prompt

    def __getitem__(self, prompt: str | bytes) -> float:
        return self._scores[self._places[self.key(prompt)]]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        scores = cast("Mapping[Any, Any]", other)
        return len(scores) == len(self) and all(k in self and self[k] == score for k, score in scores.items())

    __hash__ = None

    def update(self, scores: Iterable[tuple[str | bytes, float]]) -> None:
        """Set scores; one that is not finite leaves what was known of its prompt.

        Args:
            scores: Pairs of a prompt, or its key, and its score.
        """
        for prompt, score in scores:
            if not math.isfinite(score):
                continue
            place = self._places.setdefault(self.key(prompt), len(self._scores))
            if place == len(self._scores):
                self._scores.append(score)
            else:
                self._scores[place] = score

    def mean(self) -> float:
        """The mean of all scores; NaN if there are none."""
        return torch.frombuffer(self._scores, dtype=torch.float64).mean().item() if self._scores else math.nan

    def state_dict(self) -> dict[str, Tensor]:
        """Keys, `(prompts, 16)`, uint8, and scores, `(prompts,)`, float64, in the order in which the prompts came."""
        keys = torch.tensor(bytearray(b"".join(self._places)), dtype=torch.uint8).view(-1, _KEY_BYTES)
        return {"keys": keys, "scores": torch.tensor(self._scores, dtype=torch.float64)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "PromptScores":
        """The scores that `state_dict` gave.

        Args:
            state: The result of `state_dict`, on any device: keys `(prompts, 16)` and scores `(prompts,)`.

        Returns:
            The scores.
        """
        keys, scores = state["keys"].cpu().numpy().tobytes(), cast("list[float]", state["scores"].tolist())
        found = cls()
        found.update((keys[i * _KEY_BYTES : (i + 1) * _KEY_BYTES], score) for i, score in enumerate(scores))
        return found


@dataclass
class Pruning:
    """Dynamic pruning (our reading of arXiv:2603.04135): low-signal prompts before sampling, completions of low |A| after.

    The score of a prompt is the mean |A| of the completions when it was last sampled; it is low if it is below the mean of all
    known scores. A completion is low if |A| is below the group's mean. Advantages are those of the whole group.

    The weights make any sum over samples unbiased, clipped or with a KL per sample, if the choice does not depend on the
    policy in training. This does not extend to Adam's steps, nor to a denominator that is counted after pruning. `check`
    refuses the objectives for which there is no such sum. A completion without a score (reward or advantage NaN) has no
    gradient, and is left out of the means.

    Args:
        prompts: r_q, the share of low prompts to leave out, in [0, 1).
        completions: r_o, the share of low completions to leave out, in [0, 1).
        mode: How entries are dropped, see `stratified`.
        zeros: Whether to drop every completion with A = 0, which has no gradient. Set it to False if the loss has another term,
            such as a KL per sample; see `check`.
        until: Share of the run after which nothing is pruned; InfoBatch stops at 0.875.
        history: Scores by the hash of the prompt, which `state_dict` saves; a dictionary by prompt is converted.

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
    history: PromptScores = field(default_factory=PromptScores, repr=False)

    def __post_init__(self) -> None:
        for name in ("prompts", "completions"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise ValueError(f"Pruning: {name} must be a number in [0, 1), got {value!r}")
        if self.mode not in get_args(Mode):
            raise ValueError(f"Pruning: mode is {self.mode!r}; choose one of {', '.join(get_args(Mode))}")
        if not 0 < self.until <= 1:
            raise ValueError(f"Pruning: until must be in (0, 1], got {self.until!r}")
        if not isinstance(self.history, PromptScores):
            self.history = PromptScores(self.history)

    def check(self, objective: Objective, *, kl_coef: float | None = None) -> None:
        """Refuse an objective for which the weights cannot keep the expected gradient.

        Args:
            objective: The objective of the loss.
            kl_coef: Coefficient of a KL term to a reference, with the weights of the samples (as in `policy_loss`); None for
                that of the objective.

        Raises:
            ValueError: If the objective is refused; the message has the reason and the fix.

        Examples:
            >>> from bandpo import OBJECTIVES
            >>> Pruning(completions=0.5).check(OBJECTIVES["bandpo-kl"])
        """
        if (self.prompts or self.completions) and "of_batch" in objective.traits:
            raise ValueError(
                f"pruning with objective {objective.name!r}: it looks at the whole batch, so that leaving samples out changes "
                "the terms of the others, which no weight can correct; turn pruning off, or choose another objective"
            )
        if self.completions and self.zeros and self.mode != "topk_biased":
            kl_coef = objective.kl_coef if kl_coef is None else kl_coef
            check_nothing_lost(objective, kl_coef=kl_coef, fix="set zeros=False")

    def __call__(self, rewards: Tensor, advantages: Tensor, *, generator: torch.Generator | None = None) -> Selection:
        """The selection of completions by |A|; if all |A| of a group are equal, none is low, and all stay unless they are 0.

        Raises:
            ValueError: If the shapes differ.
        """
        if rewards.shape != advantages.shape:
            raise ValueError(
                f"rewards {tuple(rewards.shape)} and advantages {tuple(advantages.shape)} must have the same shape "
                "(groups, group_size)"
            )
        size, counts, mean = _sizes(rewards, advantages)
        nothing = (size == 0) & self.zeros & (self.completions > 0) & (self.mode != "topk_biased")
        # The factor is for rounding: equal |A| are not below their mean.
        low = (size < mean * (1 - 1e-6)) & counts & ~nothing
        found = stratified(size, low, self.completions, mode=self.mode, generator=generator)
        keep = found.keep & ~nothing
        return Selection(keep, found.weight.masked_fill(nothing, 0.0), found.dropping.masked_fill(nothing, 1.0))

    def select_prompts(
        self, keys: Sequence[str] | Sequence[bytes], *, generator: torch.Generator | None = None
    ) -> Selection:
        """The selection of prompts by their history, `(prompts,)`; prompts without a known score are kept.

        Args:
            keys: The text of each prompt, or its key from `PromptScores.key`.
            generator: Source of randomness.
        """
        scores = torch.tensor([self.history.get(PromptScores.key(k), math.inf) for k in keys], dtype=torch.float64)
        low = scores < self.history.mean() * (1 - 1e-6)  # nothing is below NaN
        return stratified(scores, low, self.prompts, mode=self.mode, generator=generator)

    def update(self, keys: Sequence[str] | Sequence[bytes], advantages: Tensor, rewards: Tensor | None = None) -> None:
        """Update the scores of prompts that were sampled; a prompt without a new score keeps the old one.

        Args:
            keys: The prompt of each group, or its key from `PromptScores.key`.
            advantages: Advantages of whole groups, `(groups, group_size)`; NaN without a score.
            rewards: Rewards, the same shape; NaN without a score. They are needed if unscored completions have advantage 0, as
                in the result of `group_advantages`: such a 0 is not a measurement of the prompt.

        Raises:
            ValueError: If the numbers of keys and groups differ.
        """
        if len(keys) != len(advantages):
            raise ValueError(f"{len(keys)} prompts and {len(advantages)} groups of advantages do not match")
        _, counts, mean = _sizes(advantages if rewards is None else rewards, advantages)
        scores = cast("list[float]", mean.squeeze(-1).tolist())
        measured = cast("list[bool]", counts.any(-1).tolist())
        self.history.update((k, s) for k, s, known in zip(keys, scores, measured, strict=True) if known)

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"history": self.history.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint.

        Args:
            state: The result of `state_dict`. That of versions that kept the prompts themselves is converted.
        """
        saved = state["history"]
        is_hashed = set(saved) == {"keys", "scores"} and isinstance(saved["keys"], Tensor)
        self.history = PromptScores.from_state_dict(saved) if is_hashed else PromptScores(saved)


def _sizes(rewards: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """|A| of groups (0 without a score), whether each has a score, and the mean |A| of the scored ones, `(groups, 1)`."""
    counts = scored(rewards) & scored(advantages)
    size = torch.where(counts, advantages.detach().abs(), 0.0)
    return size, counts, size.sum(-1, keepdim=True) / counts.sum(-1, keepdim=True).clamp_min(1)


def effective_sample_size(weight: Tensor) -> Tensor:
    """Kish's effective sample size `(Σw)²/Σw²` over the number of kept entries, 0-d; 1 if all their weights are equal.

    Args:
        weight: Weights, any shape; 0 for dropped entries.

    Examples:
        >>> effective_sample_size(torch.tensor([1.0, 1.0, 2.0, 0.0]))
        tensor(0.8889)
    """
    kept = weight[weight > 0]
    return kept.sum().square() / kept.square().sum().clamp(min=1e-12) / max(1, kept.numel())
