"""The reward of RBRM, a probe over the layers' hidden states, and re-ranking by this reward (arXiv:2503.10093)."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from bandpo._inputs import as_mask, check_int, check_tensor
from bandpo.preference._checks import check_column, check_count, check_finite, check_no_nan, check_number

Pooling = Literal["last", "mean"]
Matching = Literal["ordered", "all"]


class LayerProbe(nn.Module):
    """Reward of RBRM (arXiv:2503.10093) over the hidden states of L layers, `R(h) = Σ_l v_l t_l`.

    Here `t_l = w_lᵀh_l + b_l`, with votes `v = σ(U t)`. The form of the reward, the margin loss and the optimiser's settings
    follow the authors' code.

    Args:
        layers: Number of layers, L.
        width: Size of a hidden state.
        seed: Seed of the initial weights.

    Raises:
        TypeError: If `layers` or `width` is not an integer.
        ValueError: If `layers` or `width` is below 1.

    Examples:
        >>> LayerProbe(3, 8)(torch.zeros(5, 3, 8)).shape
        torch.Size([5])
    """

    def __init__(self, layers: int, width: int, *, seed: int = 0) -> None:
        super().__init__()
        check_int("LayerProbe: layers", layers)
        check_int("LayerProbe: width", width)
        if layers < 1 or width < 1:
            raise ValueError(f"LayerProbe: layers and width must be at least 1, got {layers} and {width}")
        draw = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(layers, width, generator=draw, dtype=torch.float32) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(layers, dtype=torch.float32))
        self.vote = nn.Parameter(torch.randn(layers, layers, generator=draw, dtype=torch.float32) / layers**0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        """Rewards of hidden states, `(...)`, float32.

        Args:
            hidden: Hidden states, `(..., layers, width)`.

        Raises:
            TypeError: If `hidden` is not a float tensor.
            ValueError: If the last two dimensions do not fit.
        """
        check_tensor("hidden", hidden)
        if hidden.shape[-2:] != self.weight.shape:
            raise ValueError(
                f"hidden has shape {tuple(hidden.shape)}; this probe takes (..., {len(self.weight)}, {self.weight.shape[1]})"
            )
        terms = (hidden.float() * self.weight).sum(-1) + self.bias
        return ((terms @ self.vote.T).sigmoid() * terms).sum(-1)

    def loss(self, chosen: Tensor, rejected: Tensor, *, margin: float = 1.0) -> Tensor:
        """The mean over pairs of `-log σ(R_chosen - R_rejected - margin)`, 0-d.

        Args:
            chosen: Hidden states of the better completions, `(pairs, layers, width)`.
            rejected: Hidden states of the worse completions, `(pairs, layers, width)`.
            margin: Margin of the rewards.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If shapes differ or do not fit the probe, or the margin is not finite.
        """
        check_number("margin", margin)
        if chosen.shape != rejected.shape:
            raise ValueError(f"chosen has shape {tuple(chosen.shape)} but rejected has {tuple(rejected.shape)}")
        return -logsigmoid(self(chosen) - self(rejected) - margin).mean()

    def fit(
        self,
        chosen: Tensor,
        rejected: Tensor,
        *,
        epochs: int = 50,
        batch_size: int = 8,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        held_out: float = 0.1,
        seed: int = 0,
    ) -> float:
        """Train on pairs and keep the weights of the epoch with the best accuracy on held-out pairs.

        Args:
            chosen: Hidden states of the better completions, `(pairs, layers, width)`.
            rejected: Hidden states of the worse completions, `(pairs, layers, width)`.
            epochs: Number of epochs, at least 1.
            batch_size: Pairs in a step, at least 1.
            learning_rate: Learning rate of Adam, positive.
            weight_decay: Weight decay of Adam, at least 0.
            held_out: Share of the pairs that are held out to choose the epoch, in [0, 1]; at least one pair is.
            seed: Seed of the split and of the batches.

        Returns:
            The best accuracy on the held-out pairs.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If shapes differ, there are fewer than 4 pairs, a hidden state is not finite, an option is out of range,
                or `held_out` leaves no pair to train on.
        """
        check_count("epochs", epochs)
        check_count("batch_size", batch_size)
        check_number("learning_rate", learning_rate, low=0, open_low=True)
        check_number("weight_decay", weight_decay, low=0)
        check_number("held_out", held_out, low=0, high=1)
        check_tensor("chosen", chosen)
        check_tensor("rejected", rejected)
        if chosen.shape != rejected.shape or len(chosen) < 4:
            raise ValueError(
                f"fit: at least 4 pairs of one shape, got {tuple(chosen.shape)} and {tuple(rejected.shape)}"
            )
        check_finite("chosen", chosen)
        check_finite("rejected", rejected)
        draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(chosen), generator=draw)
        aside = max(1, int(held_out * len(chosen)))
        test, train = order[:aside], order[aside:]
        if not len(train):
            raise ValueError(f"held_out={held_out}: none of {len(chosen)} pairs is left to train on")
        optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate, weight_decay=weight_decay)
        best, kept = -1.0, {name: p.detach().clone() for name, p in self.state_dict().items()}
        for _ in range(epochs):
            shuffled = train[torch.randperm(len(train), generator=draw)]
            for rows in torch.split(shuffled, batch_size):
                optimizer.zero_grad()
                self.loss(chosen[rows], rejected[rows]).backward()
                optimizer.step()
            accuracy = pair_accuracy(self(chosen[test]), self(rejected[test]))
            if accuracy > best:
                best, kept = accuracy, {name: p.detach().clone() for name, p in self.state_dict().items()}
        self.load_state_dict(kept)
        return best


def pair_accuracy(chosen: Tensor, rejected: Tensor) -> float:
    """Share of pairs whose first reward is the higher one.

    Args:
        chosen: Rewards of the first completions, `(pairs,)`.
        rejected: Rewards of the second completions, `(pairs,)`.

    Raises:
        TypeError: If rewards are not float tensors.
        ValueError: If shapes differ, there is no pair, or a reward is NaN.
    """
    _check_rewards("chosen", chosen, "rejected", rejected)
    if not len(chosen):
        raise ValueError("chosen and rejected have no pair")
    return (chosen > rejected).double().mean().item()


def pool_hidden(hidden_states: Sequence[Tensor], mask: Tensor, how: Pooling = "last") -> Tensor:
    """One hidden state of each layer for each sequence, with padding on either side.

    Args:
        hidden_states: Hidden states of the layers, each `(batch, time, width)`, without the embedding layer as in the
            authors' code.
        mask: `(batch, time)`, 1 at the tokens that count: the whole text, or the completion.
        how: "last" for the last of these tokens, "mean" for their mean. Use the same value for fitting and scoring.

    Returns:
        `(batch, layers, width)`, float32, detached.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `how` is unknown, there is no layer, a shape does not fit, or the mask of a sequence is empty.

    Examples:
        >>> h = torch.arange(6.0).view(1, 3, 2)
        >>> pool_hidden([h], torch.tensor([[1, 1, 0]]))
        tensor([[[2., 3.]]])
    """
    if how not in ("last", "mean"):
        raise ValueError(f"pooling must be last or mean, got {how!r}")
    mask = as_mask(mask)
    if not hidden_states:
        raise ValueError("hidden_states has no layer; ask the model for them with output_hidden_states=True")
    for h in hidden_states:
        check_tensor("hidden_states", h)
        if h.dim() != 3 or h.shape[:2] != mask.shape:
            raise ValueError(
                f"hidden_states have shape {tuple(h.shape)} with a mask of {tuple(mask.shape)}; they must be "
                "(batch, time, width) and (batch, time)"
            )
    if not mask.any(1).all():
        raise ValueError(f"sequence {int((~mask.any(1)).nonzero()[0])} of the batch has no token that counts")
    if how == "mean":
        weights = mask.float() / mask.sum(1, keepdim=True)
        return torch.stack([(h.detach().float() * weights.unsqueeze(-1)).sum(1) for h in hidden_states], 1)
    last = (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(1)
    rows = torch.arange(len(mask), device=mask.device)
    return torch.stack([h.detach().float()[rows, last] for h in hidden_states], 1)


class RankedPairs(NamedTuple):
    """Pairs from groups of completions."""

    group: Tensor
    """Index of the group, `(pairs,)`."""
    chosen: Tensor
    """Index of the better completion in the group, `(pairs,)`."""
    rejected: Tensor
    """Index of the worse completion in the group, `(pairs,)`."""
    gap: Tensor
    """Score of the chosen completion less that of the rejected one, `(pairs,)`."""


def rerank(
    scores: Tensor, *, top: int = 1, bottom: int = 1, matching: Matching = "ordered", ties: bool = False
) -> RankedPairs:
    """Pairs of the best and the worst of each group of completions of one prompt.

    The authors of arXiv:2503.10093 sample 8 and keep 4: top=4, bottom=4.

    Args:
        scores: Scores of the completions, `(groups, size)`; a NaN is a completion without a score, which is never chosen.
        top: Number of the best completions to use.
        bottom: Number of the worst completions to use.
        matching: "ordered" pairs the best with the worst, the second best with the second worst, and so on; "all" pairs each
            of the best with each of the worst.
        ties: Whether to keep pairs of equal scores, which carry no preference.

    Returns:
        The pairs, in the order of the groups.

    Raises:
        TypeError: If the scores are not a float tensor, or a number is not an integer.
        ValueError: If a group is too small, the matching is unknown, or "ordered" has different numbers of best and worst.

    Examples:
        >>> rerank(torch.tensor([[0.1, 0.9, 0.5, 0.3]]), top=2, bottom=2).chosen
        tensor([1, 2])
    """
    check_tensor("scores", scores)
    check_int("top", top)
    check_int("bottom", bottom)
    if scores.dim() != 2 or top < 1 or bottom < 1 or top + bottom > scores.shape[1]:
        raise ValueError(f"rerank: top={top} and bottom={bottom} of scores {tuple(scores.shape)} must fit into a group")
    if matching not in ("ordered", "all"):
        raise ValueError(f"matching must be ordered or all, got {matching!r}")
    if matching == "ordered" and top != bottom:
        raise ValueError(f"matching='ordered' needs equal numbers of best and worst, got top={top} and bottom={bottom}")
    best = scores.nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True)[:, :top]
    worst = scores.nan_to_num(nan=torch.inf).argsort(dim=1, stable=True)[:, :bottom]
    if matching == "all":
        best, worst = best.repeat_interleave(bottom, 1), worst.repeat(1, top)
    gap = scores.gather(1, best) - scores.gather(1, worst)
    keep = gap >= 0 if ties else gap > 0
    keep &= best != worst
    return RankedPairs(keep.nonzero()[:, 0], best[keep], worst[keep], gap[keep])


def relabel(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Whether the reward would flip each pair of a data set, `R_rejected > R_chosen`.

    Args:
        chosen_rewards: Rewards of the chosen completions, `(pairs,)`.
        rejected_rewards: Rewards of the rejected completions, `(pairs,)`.

    Returns:
        Bool, `(pairs,)`.

    Raises:
        TypeError: If rewards are not float tensors.
        ValueError: If shapes differ, or a reward is NaN.

    Examples:
        >>> relabel(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
        tensor([False,  True])
    """
    _check_rewards("chosen_rewards", chosen_rewards, "rejected_rewards", rejected_rewards)
    return rejected_rewards > chosen_rewards


def _check_rewards(chosen_name: str, chosen: Tensor, rejected_name: str, rejected: Tensor) -> None:
    check_column(chosen_name, chosen)
    check_column(rejected_name, rejected, chosen, like_name=chosen_name)
    for name, rewards in ((chosen_name, chosen), (rejected_name, rejected)):
        check_no_nan(name, rewards, fix="leave such pairs out")
