"""Groups of completions: how many have a signal, completions that are equal, and what the length of a completion decides."""

import hashlib
import math
from collections import defaultdict
from typing import cast

import torch
from torch import Tensor

from bandpo.doctor.columns import Part
from bandpo.doctor.streams import rounded
from bandpo.monitoring.findings import Finding

SILENT = 0.5
"""Share of the groups without a signal above which they are told as too many."""
SAME = 0.25
"""Share of completions that repeat another one of their group above which they are told as too many."""
_MOST = 1 << 20  # sequences that are looked at; each needs some hundred bytes


class Groups:
    """Groups whose advantages are all 0, and completions that are equal token by token to an earlier one of their group."""

    def __init__(self) -> None:
        self._signal: dict[int, bool] = {}
        self._sizes: defaultdict[int, int] = defaultdict(int)
        self._seen: dict[int, set[bytes]] = {}
        self._repeated = self._compared = self._sequences = 0
        self._cut = False

    def add(self, part: Part) -> None:
        """Take the sequences of a part; those without a valid token count nowhere.

        Args:
            part: The part.
        """
        if not (part.has("group") and part.by_sequence):
            return
        group = part.columns["group"].to(torch.int64)
        used = part.valid.any(-1)
        signal = ((part.columns["advantages"] != 0) & part.valid).any(-1)
        first = part.valid.int().argmax(-1, keepdim=True)  # the group of a sequence is that of its first valid token
        groups = cast("list[int]", group.gather(-1, first).squeeze(-1).tolist())
        signals = cast("list[bool]", signal.tolist())
        ids = part.columns.get("completion_ids")
        for row in cast("list[int]", used.nonzero().flatten().tolist()):
            if self._sequences == _MOST:
                self._cut = True
                return
            self._sequences += 1
            at = groups[row]
            self._sizes[at] += 1
            self._signal[at] = self._signal.get(at, False) or signals[row]
            if ids is not None:
                self._compare(at, ids[row][part.mask[row]])

    def _compare(self, group: int, ids: Tensor) -> None:
        digest = hashlib.blake2b(ids.to(torch.int64).contiguous().cpu().numpy().tobytes(), digest_size=16).digest()
        known = self._seen.setdefault(group, set())
        self._repeated += digest in known
        self._compared += 1
        known.add(digest)

    def findings(self) -> list[Finding]:
        """The findings, if the batch says which group a sequence belongs to."""
        if not self._signal:
            return []
        count, silent = len(self._signal), sum(not s for s in self._signal.values())
        share = silent / count
        numbers = {"groups": count, "without_signal": share, "sequences": self._sequences}
        alone = sum(n == 1 for n in self._sizes.values())
        at_first = f"; of the first {_MOST:,} sequences alone" if self._cut else ""
        seen = f"{silent} of {count} groups have no signal: every advantage is 0{at_first}"
        if alone:
            seen += f"; {alone} have one completion"
        found = [
            Finding("groups", "ok", seen, numbers={**numbers, "of_one": alone})
            if share <= SILENT
            else Finding(
                "groups",
                "warning",
                seen,
                "their completions all have the same reward, so nothing is learned from them",
                "prompts of medium difficulty, more completions of each prompt, dynamic sampling or pruning",
                numbers={**numbers, "of_one": alone},
            )
        ]
        if self._compared:
            found.append(self._duplicates(at_first))
        return found

    def _duplicates(self, at_first: str) -> Finding:
        share = self._repeated / self._compared
        seen = f"{self._repeated} of {self._compared} completions repeat another one of their group, token by token{at_first}"
        numbers = {"repeated": rounded(share)}
        if share > SAME:
            return Finding(
                "duplicates",
                "warning",
                seen,
                "equal completions have equal rewards: they add nothing to the comparison, and a group of them alone has no "
                "signal",
                "a higher temperature, no truncation of the sampler, longer or harder prompts; a policy that has collapsed "
                "needs an earlier checkpoint",
                numbers=numbers,
            )
        return Finding("duplicates", "ok", seen, numbers=numbers)


class Lengths:
    """Whether long completions are rewarded, and what part of the gradient they have under two aggregations.

    The mass of a token is |A|·r. With `token-mean` each token has the same weight, with `seq-mean-token-mean` each sequence.
    The longest quarter is a quarter of the sequences; of sequences of one length at its edge, each has the same part.
    """

    def __init__(self) -> None:
        # length: sequences, gradient mass of tokens, the same over the length, sum of advantages
        self._by_length: dict[int, list[float]] = {}
        self._advantages = _Correlation()

    def add(self, part: Part) -> None:
        """Take the sequences of a part; those without a valid token count nowhere.

        Args:
            part: The part.
        """
        if not part.by_sequence:
            return
        valid = part.valid
        used = valid.any(-1)
        lengths = part.mask.sum(-1)[used]
        x = (part.columns["logprobs"] - part.columns["old_logprobs"]).masked_fill(~valid, 0.0).clamp(-40.0, 40.0)
        advantages = part.columns["advantages"].masked_fill(~valid, 0.0)
        mass = (advantages.abs() * x.exp()).masked_fill(~valid, 0.0).sum(-1)[used]
        mean = (advantages.sum(-1) / valid.sum(-1).clamp_min(1))[used]
        self._advantages.add(lengths.double(), mean)
        distinct, places = cast("tuple[Tensor, Tensor]", torch.unique(lengths, return_inverse=True))
        columns = (torch.ones_like(mass), mass, mass / lengths)
        sums = torch.stack([torch.zeros(len(distinct), dtype=torch.float64, device=mass.device).index_add_(0, places, c)
                            for c in columns], 1)  # fmt: skip
        for length, row in zip(
            cast("list[int]", distinct.tolist()), cast("list[list[float]]", sums.tolist()), strict=True
        ):
            known = self._by_length.setdefault(length, [0.0, 0.0, 0.0])
            self._by_length[length] = [a + b for a, b in zip(known, row, strict=True)]

    def findings(self) -> list[Finding]:
        """The finding, if there are four sequences of different lengths with a gradient."""
        rows = sorted(self._by_length.items(), reverse=True)
        sequences = sum(row[0] for _, row in rows)
        totals = [sum(row[i] for _, row in rows) for i in (1, 2)]
        if sequences < 4 or len(rows) < 2 or not min(totals) > 0:
            return []
        left, masses = sequences / 4, [0.0, 0.0]
        for _, (n, by_token, by_sequence) in rows:
            part = min(1.0, left / n)
            masses = [masses[0] + part * by_token, masses[1] + part * by_sequence]
            left -= part * n
            if left <= 0:
                break
        of_tokens, of_sequences = (m / t for m, t in zip(masses, totals, strict=True))
        correlation = self._advantages.value
        numbers = {"longest_quarter/token-mean": of_tokens, "longest_quarter/seq-mean-token-mean": of_sequences}
        numbers |= {} if math.isnan(correlation) else {"correlation": correlation}
        related = "" if math.isnan(correlation) else f"; advantage and length have a correlation of {correlation:+.2f}"
        return [
            Finding(
                "length bias",
                "note",
                f"the longest quarter of the sequences has {of_tokens:.0%} of the gradient with token-mean, "
                f"{of_sequences:.0%} with seq-mean-token-mean{related}",
                "token-mean weighs a sequence by its length; seq-mean-token-mean lets a token of a long one count less, so "
                "long wrong answers cost less for each token",
                numbers={name: rounded(value) for name, value in numbers.items()},
            )
        ]


class _Correlation:
    """Pearson's correlation of pairs that come in parts."""

    def __init__(self) -> None:
        self._count = 0
        self._means = torch.zeros(2, dtype=torch.float64)
        self._products = torch.zeros(2, 2, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        n = len(x)
        if not n:
            return
        pairs = torch.stack([x, y]).cpu()
        means = pairs.mean(1)
        apart, total = means - self._means, self._count + n
        centred = pairs - means[:, None]
        self._products += centred @ centred.T + torch.outer(apart, apart) * (self._count * n / total)
        self._means += apart * (n / total)
        self._count = total

    @property
    def value(self) -> float:
        """The correlation; NaN where one of the two does not vary."""
        (xx, xy), (_, yy) = cast("list[list[float]]", self._products.tolist())
        scale = math.sqrt(xx * yy)
        # What is left of the variance of equal numbers is rounding.
        varies = xx > 1e-24 * self._count and yy > 1e-24 * self._count
        return xy / scale if varies and scale > 0 else math.nan
