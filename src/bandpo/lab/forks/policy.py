"""A policy with a language model's token profile, whose measures are sums and not samples.

A completion is one fork, a token of many options of which one is common and the rest rare, and then near-certain tokens. A
prompt has a hidden type, uniform among several. Each option of the fork solves some types; a completion is right if its option
solves the prompt's type and every near-certain token is the usual one. So a policy that keeps several good options has a higher
pass@k than one that keeps one of them, at the same mean.
"""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fork:
    """A fork policy and its problem. Option 0 is the common one, options 1 to `good` are the good ones, all others are bad.

    Args:
        options: Vocabulary of the fork, and of every near-certain token.
        common: Initial probability of the common option.
        good: Number of good options.
        rare: Initial probability of each good option.
        common_solves: Types that the common option solves: the first so many.
        good_solves: Types that each good option solves: so many, from its own number on, around the circle of types.
        types: Number of hidden types of a prompt.
        certain: Number of near-certain tokens after the fork.
        certainty: Initial probability of their usual token.
        flip: Chance that a reward of 0 or 1 is exchanged for the other; 0.5 is pure noise.
        even: Whether the bad options share the rest equally; otherwise by Zipf's law.

    Raises:
        ValueError: If a number is out of its range, or the probabilities leave nothing to the bad options.
    """

    options: int = 64
    common: float = 0.9
    good: int = 8
    rare: float = 0.002
    common_solves: int = 1
    good_solves: int = 4
    types: int = 8
    certain: int = 3
    certainty: float = 0.995
    flip: float = 0.0
    even: bool = False

    def __post_init__(self) -> None:
        if not (self.options >= 3 and 1 <= self.good <= self.options - 2 and self.certain >= 0 and self.types >= 1):
            raise ValueError(
                f"Fork: at least 3 options, 1 to options - 2 good ones, certain >= 0, types >= 1; got {self!r}"
            )
        if not (0 < self.common < 1 and 0 < self.certainty < 1 and self.rare > 0 and self.rest > 0):
            raise ValueError(
                f"Fork: the common option and {self.good} good ones of {self.rare} each must leave some probability to the "
                f"bad ones, got common={self.common}"
            )
        if not (0 <= self.common_solves <= self.types and 0 <= self.good_solves <= self.types):
            raise ValueError(f"Fork: an option solves 0 to {self.types} types, got {self!r}")
        if not 0 <= self.flip <= 0.5:
            raise ValueError(f"Fork: flip must be from 0 to 0.5, got {self.flip}")

    @property
    def rest(self) -> float:
        """Initial probability of all bad options together."""
        return 1 - self.common - self.good * self.rare

    @property
    def places(self) -> int:
        """Tokens of a completion."""
        return 1 + self.certain

    def start(self) -> Tensor:
        """The initial logits, `(places, options)`, float64."""
        bad = torch.arange(1, self.options - self.good, dtype=torch.float64) ** (0.0 if self.even else -1.0)
        first = [
            torch.tensor([self.common] + [self.rare] * self.good, dtype=torch.float64),
            bad / bad.sum() * self.rest,
        ]
        other = torch.full((self.options,), (1 - self.certainty) / (self.options - 1), dtype=torch.float64)
        other[0] = self.certainty
        return torch.stack([torch.cat(first), *[other] * self.certain]).log()

    def solves(self) -> Tensor:
        """Which option of the fork solves which type, bool, `(types, options)`."""
        kind, option = torch.arange(self.types).unsqueeze(-1), torch.arange(self.options)
        good = (option >= 1) & (option <= self.good) & ((kind - (option - 1)) % self.types < self.good_solves)
        return torch.where(option == 0, kind < self.common_solves, good)

    def measure(self, logits: Tensor, k: int = 16) -> "Measures":
        """The exact measures of policies.

        Args:
            logits: `(..., places, options)`, float64.
            k: Samples of pass@k.
        """
        p = logits.softmax(-1)
        right = p[..., 1:, 0].prod(-1)
        chance = (p[..., 0, :] @ self.solves().to(p.dtype).T) * right.unsqueeze(-1)
        entropies = cast(Tensor, torch.special.entr(p)).sum(-1)
        return Measures(
            chance.mean(-1), (1 - (1 - chance) ** k).mean(-1), entropies[..., 0], entropies.sum(-1) / self.places, right
        )


class Measures(NamedTuple):
    """What a policy is worth, exactly: each is a sum over all completions and types, `(...)`."""

    mean: Tensor
    """Chance that a completion is right (mean@k for every k)."""
    passed: Tensor
    """pass@k: chance that one of k completions of a prompt is right."""
    entropy: Tensor
    """Entropy of the fork, in nats."""
    token_entropy: Tensor
    """Entropy of a token, the mean over the places of a completion, in nats."""
    right: Tensor
    """Chance that all near-certain tokens are the usual ones."""
