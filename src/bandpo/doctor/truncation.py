"""What truncated sampling removes: the mass that top-k, top-p and min-p keep, and the bias of the ratio where it is ignored."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bandpo.doctor.batch_files import Stored
from bandpo.doctor.columns import flat
from bandpo.doctor.streams import Moments, Quantiles, rounded
from bandpo.monitoring.findings import Finding

BIASED = 0.01
"""Mean of -log(kept mass), in nats, above which truncation is told as a bias of the ratio."""
_AT_A_TIME = 1 << 22  # log-probs of a chunk
_FIRST = 256  # likeliest tokens that are sorted first; all are where these do not reach top_p


@dataclass(frozen=True)
class Truncation:
    """How a sampler cuts its distribution, in the order in which transformers does: top-k, then top-p of the rest, then min-p.

    Args:
        top_p: Smallest mass of the likeliest tokens that are kept, 0 < top_p <= 1; 1 for off.
        top_k: Number of the likeliest tokens that are kept; 0 for off. Tokens as likely as the last one are kept as well.
        min_p: Smallest probability that is kept, relative to the largest one; 0 for off.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> str(Truncation(top_p=0.9, top_k=50)), Truncation().active
        ('top_k=50 top_p=0.9', False)
    """

    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"truncation needs 0 < top_p <= 1, top_k >= 0 and 0 <= min_p <= 1, got top_p={self.top_p}, "
                f"top_k={self.top_k}, min_p={self.min_p}"
            )

    @property
    def active(self) -> bool:
        """Whether anything is cut."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    def __str__(self) -> str:
        given = (
            ("top_k", self.top_k, self.top_k > 0),
            ("top_p", self.top_p, self.top_p < 1),
            ("min_p", self.min_p, self.min_p > 0),
        )
        return " ".join(f"{name}={value:g}" for name, value, on in given if on) or "no truncation"


SETTINGS = (
    Truncation(top_p=0.99),
    Truncation(top_p=0.95),
    Truncation(top_p=0.9),
    Truncation(top_k=50),
    Truncation(top_k=20),
    Truncation(min_p=0.05),
)
"""What a batch is measured for where the configuration of the sampler is not known."""


def kept_mass(logprobs: Tensor, truncation: Truncation) -> tuple[Tensor, Tensor]:
    """The mass of the next-token distribution that truncation keeps, and the log-prob of the last token that is kept.

    The sampler draws from p/Z with the kept mass Z, so where the log-prob of the whole distribution is taken for that of the
    sampler, each log-ratio is too large by -log Z.

    Args:
        logprobs: Log-probs of all tokens, `(..., vocabulary)`, any float dtype.
        truncation: What is cut.

    Returns:
        Z and the log-prob, each `(...)`, float64.

    Examples:
        >>> kept, last = kept_mass(torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), Truncation(top_p=0.75))
        >>> round(kept.item(), 3), round(last.exp().item(), 3)
        (0.8, 0.3)
    """
    [found] = _kept_masses(logprobs.to(torch.float64), (truncation,))
    return found


def _kept_masses(x: Tensor, settings: Sequence[Truncation]) -> list[tuple[Tensor, Tensor]]:
    """`kept_mass` for several settings; only the likeliest tokens are sorted where these are enough."""
    first = x.topk(min(_FIRST, x.shape[-1]), -1).values
    complete = first.shape[-1] == x.shape[-1]
    found: list[tuple[Tensor, Tensor]] = []
    for cut in settings:
        kept, last, known = _kept(first, cut, complete=complete)
        if not known.all():
            ordered = x[~known].sort(-1, descending=True).values
            kept[~known], last[~known], _ = _kept(ordered, cut, complete=True)
        found.append((kept, last))
    return found


def _kept(ordered: Tensor, cut: Truncation, *, complete: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Kept mass, last kept log-prob, and whether they are known, from the likeliest tokens in descending order.

    Args:
        ordered: Log-probs of the likeliest tokens.
        cut: What is cut.
        complete: Whether these are all tokens of the vocabulary.
    """
    p = ordered.exp()
    keep = torch.ones_like(p, dtype=torch.bool)
    known = torch.full(p.shape[:-1], complete, device=p.device)
    total = torch.ones_like(p[..., :1])
    if cut.top_k:
        at = min(cut.top_k, p.shape[-1]) - 1
        keep = ordered >= ordered[..., at : at + 1]
        known = known | ~keep[..., -1]  # tokens as likely as the k-th one may lie beyond those that are stored
        total = (p * keep).sum(-1, keepdim=True)
    certain = known | (cut.top_k == 0) | (cut.top_p == 1)  # whether the total is known that top_p refers to
    if cut.top_p < 1:
        before = (p * keep).cumsum(-1) - p * keep
        # A token stays if what is above it has not reached top_p yet; rounding of the sum must not let one more stay.
        keep = keep & (before < cut.top_p * total * (1 - 1e-12))
        known = known | ~keep[..., -1]
    if cut.min_p > 0:
        keep = keep & (p >= cut.min_p * p[..., :1])
        known = known | ~keep[..., -1]
    return (p * keep).sum(-1), ordered.masked_fill(~keep, math.inf).amin(-1), known & certain


class KeptMass:
    """Kept mass over the tokens of a batch, for several settings at once.

    Args:
        configured: How the sampler is configured; None where that is not known.
    """

    def __init__(self, configured: Truncation | None = None) -> None:
        self._configured = configured if configured is not None and configured.active else None
        known_off = configured is not None and not configured.active
        self.settings = (self._configured,) if self._configured is not None else SETTINGS
        self._off = known_off
        self._kept = [Moments() for _ in self.settings]
        self._bias = [(Moments(), Quantiles()) for _ in self.settings]
        self._cut = [0] * len(self.settings)
        self._open = [0] * len(self.settings)
        self.tokens = self.broken = 0

    def add(self, logprobs: Tensor, sampled: Tensor | None = None, *, whole: bool = True) -> None:
        """Take further tokens.

        Args:
            logprobs: Log-probs of the vocabulary, `(n, vocabulary)`, or of the likeliest tokens in any order.
            sampled: Log-prob of the token that was sampled, `(n,)`.
            whole: Whether these are all tokens of the vocabulary.
        """
        finite = ~logprobs.isnan().any(-1) & (logprobs < 1e-3).all(-1)
        self.broken += int((~finite).sum())
        x = logprobs[finite].to(torch.float64)
        chosen = None if sampled is None else sampled[finite].to(torch.float64)
        self.tokens += len(x)
        ordered = None if whole else x.sort(-1, descending=True).values
        masses = _kept_masses(x, self.settings) if ordered is None else []
        for i, cut in enumerate(self.settings):
            if ordered is None:
                (kept, last), known = masses[i], torch.ones(len(x), dtype=torch.bool, device=x.device)
            else:
                kept, last, known = _kept(ordered, cut, complete=False)
            self._open[i] += int((~known).sum())
            kept = kept[known].clamp(max=1.0)
            self._kept[i].add(kept)
            self._bias[i][0].add(-kept.log())
            self._bias[i][1].add((-kept.log()).abs())
            if chosen is not None:
                # The log-prob may have been computed once more elsewhere, and differ in its last digits.
                self._cut[i] += int((chosen[known] < last[known] - 1e-3).sum())

    def findings(self) -> list[Finding]:
        """The finding, if there was a token."""
        rows = [f"{'':<20} {'kept':>7} {'bias':>8} {'.9':>8} {'.99':>8} {'most':>8}  sampled tokens cut"]
        numbers: dict[str, float] = {"tokens": self.tokens}
        for i, cut in enumerate(self.settings):
            kept, (bias, spread) = self._kept[i], self._bias[i]
            numbers[f"{cut}/not_known"] = self._open[i]
            if not kept.count:
                rows.append(f"{cut!s:<20} not known: the stored tokens do not reach so far")
                continue
            share = self._cut[i] / kept.count
            open_ones = f", {self._open[i]} tokens not known" if self._open[i] else ""
            rows.append(
                f"{cut!s:<20} {kept.mean:>7.4f} {bias.mean:>8.2g} {spread.at(0.9):>8.2g} {spread.at(0.99):>8.2g} "
                f"{spread.largest:>8.2g}  {share:.2%}{open_ones}"
            )
            numbers |= {f"{cut}/kept": kept.mean, f"{cut}/bias": bias.mean, f"{cut}/sampled_cut": share}
            numbers |= {f"{cut}/bias/q{q}": spread.at(q) for q in (0.5, 0.9, 0.99)}
            numbers[f"{cut}/bias/max"] = spread.largest
        if self.broken:
            rows.append(f"{self.broken} tokens are left out: their numbers are NaN, or no log-probs")
        if all(not m.count for m in self._kept):
            return [Finding("kept mass", "note", "not known: no token has log-probs that reach far enough", details=tuple(rows))
                    ] if self.tokens + self.broken else []  # fmt: skip
        numbers = {name: rounded(value) for name, value in numbers.items()}
        return [self._finding(tuple(rows), numbers)]

    def _finding(self, rows: tuple[str, ...], numbers: Mapping[str, float]) -> Finding:
        i = next(i for i, m in enumerate(self._kept) if m.count)
        if self._configured is None:
            i = min((i for i, m in enumerate(self._kept) if m.count), key=lambda i: self._kept[i].mean)
        cut, kept, bias = self.settings[i], self._kept[i].mean, self._bias[i][0].mean
        if self._configured is None:
            state = "the sampler cuts nothing; " if self._off else ""
            seen = f"{state}{cut} would keep {kept:.1%} of the mass on average, and shift log r by {bias:.2g} where ignored"
            return Finding("kept mass", "ok" if self._off else "note", seen, details=rows, numbers=numbers)
        seen = (
            f"{cut} keeps {kept:.1%} of the mass on average: log r against the sampler is {bias:.2g} too large where that is "
            "ignored"
        )
        if bias > BIASED:
            return Finding(
                "kept mass",
                "warning",
                seen,
                "the sampler draws from the renormalised rest, and the log-probs are those of the whole distribution",
                "top_p=1, top_k off, min_p off; or log-probs of the truncated distribution on both sides",
                rows,
                numbers,
            )
        return Finding("kept mass", "ok", seen, details=rows, numbers=numbers)


def from_columns(
    columns: Mapping[str, Tensor | Stored],
    old_logprobs: Tensor | Stored,
    mask: Tensor | Stored | None,
    measure: KeptMass,
) -> None:
    """Measure the kept mass of a batch that has logits, or log-probs of the sampler's likeliest tokens.

    Args:
        columns: Further columns of the batch.
        old_logprobs: Log-probs of the sampled tokens; with logits the ids of the tokens tell these.
        mask: The tokens that count; None for all.
        measure: What takes the tokens.
    """
    whole = "logits" in columns
    value = columns.get("logits", columns.get("old_topk_logprobs"))
    if value is None:
        return
    tokens, width = old_logprobs.numel(), value.shape[-1]
    step = max(1, _AT_A_TIME // width)
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        rows = flat(value, start * width, stop * width).view(-1, width).to(torch.float64)
        rows = rows.log_softmax(-1) if whole else rows
        chosen = None if whole else flat(old_logprobs, start, stop)
        if whole and "completion_ids" in columns:
            ids = flat(columns["completion_ids"], start, stop).to(torch.int64).clamp(0, width - 1)
            chosen = rows.gather(-1, ids[:, None]).squeeze(-1)
        if mask is not None:
            used = flat(mask, start, stop) != 0
            rows, chosen = rows[used], None if chosen is None else chosen[used]
        if len(rows):
            measure.add(rows, chosen, whole=whole)
