"""RBRM's reward, a probe over the layers' hidden states, and re-ranking by it (arXiv:2503.10093)."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from bandpo._inputs import as_mask

Pooling = Literal["last", "mean"]
Matching = Literal["ordered", "all"]


class LayerProbe(nn.Module):
    """`R(h) = Σ_l v_l t_l` with `t_l = w_lᵀh_l + b_l` and votes `v = σ(U t)`, over the hidden states of L layers.

    The shape of the reward, its margin loss and the optimiser's settings follow the authors' code.

    Args:
        layers: L.
        width: Size of a hidden state.
        seed: Of the weights.

    Examples:
        >>> LayerProbe(3, 8)(torch.zeros(5, 3, 8)).shape
        torch.Size([5])
    """

    def __init__(self, layers: int, width: int, *, seed: int = 0) -> None:
        super().__init__()
        if layers < 1 or width < 1:
            raise ValueError(f"LayerProbe: layers and width must be at least 1, got {layers} and {width}")
        draw = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(layers, width, generator=draw, dtype=torch.float32) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(layers, dtype=torch.float32))
        self.vote = nn.Parameter(torch.randn(layers, layers, generator=draw, dtype=torch.float32) / layers**0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        """Rewards `(...)` of hidden states `(..., layers, width)`, in float32."""
        if hidden.shape[-2:] != self.weight.shape:
            raise ValueError(
                f"hidden has shape {tuple(hidden.shape)}; this probe takes (..., {len(self.weight)}, {self.weight.shape[1]})"
            )
        terms = (hidden.float() * self.weight).sum(-1) + self.bias
        return ((terms @ self.vote.T).sigmoid() * terms).sum(-1)

    def loss(self, chosen: Tensor, rejected: Tensor, *, margin: float = 1.0) -> Tensor:
        """`-log σ(R_chosen - R_rejected - margin)`, averaged over pairs of hidden states `(pairs, layers, width)`."""
        return -logsigmoid(self(chosen) - self(rejected) - margin).mean()

    def fit(
        self, chosen: Tensor, rejected: Tensor, *, epochs: int = 50, batch_size: int = 8, learning_rate: float = 1e-3,
        weight_decay: float = 0.01, held_out: float = 0.1, seed: int = 0,
    ) -> float:  # fmt: skip
        """Train on pairs, keep the best epoch by accuracy on held-out pairs, and return that accuracy.

        Args:
            chosen: Hidden states of the better completions, `(pairs, layers, width)`.
            rejected: Of the worse ones.
            epochs: At most so many.
            batch_size: Pairs in a step.
            learning_rate: Adam's.
            weight_decay: Adam's.
            held_out: Share of the pairs that only choose the epoch.
            seed: Of the split and the batches.

        Raises:
            ValueError: If shapes differ, or fewer than 4 pairs are there.
        """
        if chosen.shape != rejected.shape or len(chosen) < 4:
            raise ValueError(
                f"fit: at least 4 pairs of one shape, got {tuple(chosen.shape)} and {tuple(rejected.shape)}"
            )
        draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(chosen), generator=draw)
        aside = max(1, int(held_out * len(chosen)))
        test, train = order[:aside], order[aside:]
        optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate, weight_decay=weight_decay)
        best, kept = -1.0, {name: p.detach().clone() for name, p in self.state_dict().items()}
        for _ in range(epochs):
            for rows in train[torch.randperm(len(train), generator=draw)].split(batch_size):
                optimizer.zero_grad()
                self.loss(chosen[rows], rejected[rows]).backward()
                optimizer.step()
            accuracy = pair_accuracy(self(chosen[test]), self(rejected[test]))
            if accuracy > best:
                best, kept = accuracy, {name: p.detach().clone() for name, p in self.state_dict().items()}
        self.load_state_dict(kept)
        return best


def pair_accuracy(chosen: Tensor, rejected: Tensor) -> float:
    """Share of pairs whose first reward is the higher one."""
    return (chosen > rejected).double().mean().item()


def pool_hidden(hidden_states: Sequence[Tensor], mask: Tensor, how: Pooling = "last") -> Tensor:
    """One vector of each layer for each sequence, whichever side the padding is on.

    Args:
        hidden_states: Of the layers, each `(batch, time, width)`; leave the embedding layer out, as the authors do.
        mask: `(batch, time)`, 1 at the tokens that count: the whole text, or the completion.
        how: "last" takes the last of them, "mean" their mean. Use the same for fitting and scoring.

    Returns:
        `(batch, layers, width)`, float32, detached.

    Raises:
        ValueError: If a sequence has no token that counts.

    Examples:
        >>> h = torch.arange(6.0).view(1, 3, 2)
        >>> pool_hidden([h], torch.tensor([[1, 1, 0]]))
        tensor([[[2., 3.]]])
    """
    if how not in ("last", "mean"):
        raise ValueError(f"pooling must be last or mean, got {how!r}")
    mask = as_mask(mask)
    if not mask.any(1).all():
        raise ValueError(f"sequence {int((~mask.any(1)).nonzero()[0])} of the batch has no token that counts")
    if how == "mean":
        weights = mask.float() / mask.sum(1, keepdim=True)
        return torch.stack([(h.detach().float() * weights.unsqueeze(-1)).sum(1) for h in hidden_states], 1)
    last = (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(1)
    rows = torch.arange(len(mask), device=mask.device)
    return torch.stack([h.detach().float()[rows, last] for h in hidden_states], 1)


class RankedPairs(NamedTuple):
    """Pairs from groups of completions; all `(pairs,)`."""

    group: Tensor
    chosen: Tensor
    rejected: Tensor
    gap: Tensor
    """Score of the chosen less that of the rejected."""


def rerank(
    scores: Tensor, *, top: int = 1, bottom: int = 1, matching: Matching = "ordered", ties: bool = False
) -> RankedPairs:
    """Pairs of the best and the worst of each group of completions of one prompt.

    The authors sample 8 and keep 4: top=4, bottom=4.

    Args:
        scores: `(groups, size)`; NaN is a completion without a score and is never taken.
        top: How many of the best.
        bottom: How many of the worst.
        matching: "ordered" sets the best against the worst, the second best against the second worst, ...; "all" sets every
            one of the best against every one of the worst.
        ties: Keep pairs of equal scores, which teach nothing.

    Raises:
        ValueError: If a group is too small, or "ordered" meets different numbers.

    Examples:
        >>> rerank(torch.tensor([[0.1, 0.9, 0.5, 0.3]]), top=2, bottom=2).chosen
        tensor([1, 2])
    """
    if scores.dim() != 2 or top < 1 or bottom < 1 or top + bottom > scores.shape[1]:
        raise ValueError(f"rerank: top={top} and bottom={bottom} of scores {tuple(scores.shape)} must fit into a group")
    if matching not in ("ordered", "all"):
        raise ValueError(f"matching must be ordered or all, got {matching!r}")
    if matching == "ordered" and top != bottom:
        raise ValueError(f"matching='ordered' pairs as many best as worst, got top={top} and bottom={bottom}")
    best = scores.nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True)[:, :top]
    worst = scores.nan_to_num(nan=torch.inf).argsort(dim=1, stable=True)[:, :bottom]
    if matching == "all":
        best, worst = best.repeat_interleave(bottom, 1), worst.repeat(1, top)
    gap = scores.gather(1, best) - scores.gather(1, worst)
    keep = gap >= 0 if ties else gap > 0
    keep &= best != worst
    return RankedPairs(keep.nonzero()[:, 0], best[keep], worst[keep], gap[keep])


def relabel(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Which pairs of a data set the reward would turn round: `R_rejected > R_chosen`, bool."""
    return rejected_rewards > chosen_rewards
