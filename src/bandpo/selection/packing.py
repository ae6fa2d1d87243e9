"""Dense packing: sequences of different lengths side by side in rows of a fixed size, with attention kept apart.

A greedy packer that looks at a window of pending sequences, after arXiv:2603.04135 (whose own rule is not known to us).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from bandpo._values import ByValue


def window_pack(lengths: Sequence[int], capacity: int, window: int = 8) -> list[list[int]]:
    """Bins of at most `capacity` tokens: the oldest pending sequence first, then the largest of the window that fits.

    The oldest one opens each bin, so that none waits longer than those before it, and order is kept up to the window.

    Args:
        lengths: Tokens of each sequence, at least 1.
        capacity: Tokens of a bin.
        window: Pending sequences to choose from; 1 packs in order.

    Returns:
        Indices of each bin's sequences.

    Raises:
        ValueError: If a sequence does not fit into a bin, or a number is below 1.

    Examples:
        >>> window_pack([6, 5, 4, 3, 2], capacity=10, window=4)
        [[0, 2], [1, 3, 4]]
    """
    if capacity < 1 or window < 1:
        raise ValueError(f"window_pack: capacity and window must be at least 1, got {capacity} and {window}")
    for i, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(f"window_pack: sequence {i} has {length} tokens; 1 to {capacity} fit into a bin")
    pending = list(range(min(window, len(lengths))))
    coming = len(pending)
    bins: list[list[int]] = []
    while pending:
        chosen: list[int] = []
        room = capacity
        pick: int | None = 0
        while pick is not None:
            i = pending.pop(pick)
            chosen.append(i)
            room -= lengths[i]
            if coming < len(lengths):
                pending.append(coming)
                coming += 1
            fitting = [j for j, k in enumerate(pending) if lengths[k] <= room]
            pick = max(fitting, key=lambda j: (lengths[pending[j]], -j)) if fitting else None
        bins.append(chosen)
    return bins


def density(lengths: Sequence[int], bins: Sequence[Sequence[int]], capacity: int) -> float:
    """Share of the bins' places that hold a token.

    Examples:
        >>> density([6, 5, 4, 3, 2], [[0, 2], [1, 3, 4]], 10)
        1.0
    """
    return sum(lengths[i] for b in bins for i in b) / (len(bins) * capacity)


@dataclass(frozen=True, eq=False)
class PackedBatch(ByValue):
    """Sequences of a padded batch, packed: `(bins, width)`, and where each of its tokens went.

    Args:
        input_ids: Tokens, 0 where there is none.
        position_ids: From 0 for each sequence.
        sequence_ids: Number of the sequence in the padded batch, -1 where there is none.
        places: `(tokens,)`, flat places of the padded batch's real tokens, in its order.
        mask: `(batch, time)`, bool: the real tokens of the padded batch.
    """

    input_ids: Tensor
    position_ids: Tensor
    sequence_ids: Tensor
    places: Tensor
    mask: Tensor

    def pack(self, values: Tensor, fill: float) -> Tensor:
        """Values `(batch, time)` in the packed layout."""
        out = values.new_full(self.input_ids.shape, fill)
        out.view(-1)[self.places] = values[self.mask]
        return out

    def unpack(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Values `(bins, width)` in the padded layout, with gradient."""
        out = values.new_full(self.mask.shape, fill)
        return out.masked_scatter(self.mask, values.reshape(-1)[self.places])

    def attention_bias(self, dtype: torch.dtype) -> Tensor:
        """Additive causal mask `(bins, 1, width, width)`, block-diagonal: for eager attention and SDPA.

        An empty place sees itself alone, so that no row is without a key.
        """
        s = self.sequence_ids
        same = s.unsqueeze(-1) == s.unsqueeze(-2)
        width = s.shape[-1]
        causal = torch.ones(width, width, dtype=torch.bool, device=s.device).tril()
        itself = torch.eye(width, dtype=torch.bool, device=s.device)
        allowed = (same & causal & (s >= 0).unsqueeze(-1)) | itself
        return torch.zeros(allowed.shape, dtype=dtype, device=s.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        ).unsqueeze(1)  # fmt: skip

    def varlen(self) -> dict[str, Tensor | int]:
        """Arguments of flash attention's varlen call, for all bins as one row without gaps; see `flat`."""
        lengths = self.mask.sum(1)[self._order()]
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        longest = int(lengths.max())
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}

    def flat(self, packed: Tensor) -> Tensor:
        """Packed values as one row without the empty places, `(1, tokens)`."""
        return packed[self.sequence_ids >= 0].unsqueeze(0)

    def _order(self) -> Tensor:
        """Sequences as they follow each other through the bins."""
        return self.sequence_ids[self.position_ids.eq(0) & (self.sequence_ids >= 0)]


def pack_rows(input_ids: Tensor, attention_mask: Tensor, *, capacity: int, window: int = 8) -> PackedBatch:
    """Pack the rows of a padded batch; padding may stand on either side, or on both.

    Args:
        input_ids: `(batch, time)`.
        attention_mask: 1 at real tokens; each row has some.
        capacity: Tokens of a bin. Rows are cut to the fullest bin.
        window: See `window_pack`.
    """
    mask = attention_mask != 0
    lengths = mask.sum(1)
    bins = window_pack(cast("list[int]", lengths.tolist()), capacity, window)
    start = torch.zeros_like(lengths)
    home = torch.zeros_like(lengths)
    width = 0
    for b, rows in enumerate(bins):
        at = 0
        for row in rows:
            start[row], home[row] = at, b
            at += int(lengths[row])
        width = max(width, at)
    within = mask.long().cumsum(1) - 1
    places = (home.unsqueeze(1) * width + start.unsqueeze(1) + within)[mask]
    shape = (len(bins), width)
    empty = torch.zeros(shape, dtype=input_ids.dtype, device=input_ids.device)
    batch = PackedBatch(empty, empty, empty, places, mask)
    rows = torch.arange(len(mask), device=mask.device).unsqueeze(1).expand(mask.shape)
    return PackedBatch(batch.pack(input_ids, 0), batch.pack(within, 0), batch.pack(rows, -1), places, mask)


def packed_logprobs(
    model: Callable[..., Tensor], input_ids: Tensor, attention_mask: Tensor, *, capacity: int, window: int = 8,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Log-probs of a padded batch's tokens from a packed forward pass: `(batch, time)`, 0 at each first token and at padding.

    Args:
        model: Called with `input_ids`, `position_ids` and `attention_mask` (the additive mask); returns logits.
        input_ids: `(batch, time)`.
        attention_mask: 1 at real tokens.
        capacity: See `pack_rows`.
        window: See `pack_rows`.
        dtype: Of the mask: the model's.

    Examples:
        >>> model = lambda input_ids, position_ids, attention_mask: torch.zeros(*input_ids.shape, 4)
        >>> packed_logprobs(model, torch.tensor([[1, 2, 3], [0, 3, 1]]), torch.tensor([[1, 1, 1], [0, 1, 1]]), capacity=5)
        tensor([[ 0.0000, -1.3863, -1.3863],
                [ 0.0000,  0.0000, -1.3863]])
    """
    packed = pack_rows(input_ids, attention_mask, capacity=capacity, window=window)
    logits = model(
        input_ids=packed.input_ids, position_ids=packed.position_ids, attention_mask=packed.attention_bias(dtype)
    )
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, packed.input_ids[:, 1:, None]).squeeze(-1)
    logprobs = torch.nn.functional.pad(chosen, (1, 0)).masked_fill(packed.position_ids == 0, 0.0)
    return packed.unpack(logprobs)
