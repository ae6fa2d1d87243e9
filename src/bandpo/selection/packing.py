"""Dense packing: sequences of different lengths side by side in rows of a fixed size, with attention kept apart.

A greedy packer that looks at a window of pending sequences, after arXiv:2603.04135 (whose own rule is not known to us).

A model is given the packed tokens and their positions, which start anew with each sequence, and no attention mask: from the
positions transformers makes each layer's own mask, block-diagonal and with the layer's window. Not every model does so
(recurrent layers, learned positions, ALiBi), and none says so: `packing_error` measures it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from bandpo._inputs import as_mask
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
        attention_mask: `(batch, time)`, 1 at real tokens and 0 elsewhere; each row has some.
        capacity: Tokens of a bin. Rows are cut to the fullest bin.
        window: See `window_pack`.

    Raises:
        ValueError: If shapes differ, the mask holds anything but 0 and 1, or a row is empty or longer than a bin.
    """
    if input_ids.dim() != 2 or attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"pack_rows: input_ids and attention_mask must be (batch, time) both, got {tuple(input_ids.shape)} and "
            f"{tuple(attention_mask.shape)}"
        )
    mask = as_mask(attention_mask, "attention_mask")
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
    check: bool = True,
) -> Tensor:  # fmt: skip
    """Log-probs of a padded batch's tokens from a packed forward pass: `(batch, time)`, 0 at each first token and at padding.

    Args:
        model: Called with `input_ids` and `position_ids`; returns logits. It must keep sequences apart where positions start
            anew, as most of transformers' decoders do when they are called with `use_cache=False`.
        input_ids: `(batch, time)`.
        attention_mask: 1 at real tokens, 0 elsewhere.
        capacity: See `pack_rows`.
        window: See `pack_rows`.
        check: Measure first, by `packing_error`, that the model does so. One check is enough for a model.

    Raises:
        ValueError: If the model mixes packed sequences.

    Examples:
        >>> model = lambda input_ids, position_ids: torch.zeros(*input_ids.shape, 4)
        >>> packed_logprobs(model, torch.tensor([[1, 2, 3], [0, 3, 1]]), torch.tensor([[1, 1, 1], [0, 1, 1]]), capacity=5)
        tensor([[ 0.0000, -1.3863, -1.3863],
                [ 0.0000,  0.0000, -1.3863]])
    """
    packed = pack_rows(input_ids, attention_mask, capacity=capacity, window=window)
    if check:
        error, limit = packing_error(
            lambda ids: model(input_ids=ids, position_ids=torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)),
            lambda probe: model(input_ids=probe.input_ids, position_ids=probe.position_ids),
            input_ids[packed.mask],
        )
        if not error <= limit:
            raise ValueError(mixes_sequences("this model", error, limit))
    logits = model(input_ids=packed.input_ids, position_ids=packed.position_ids)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, packed.input_ids[:, 1:, None]).squeeze(-1)
    logprobs = torch.nn.functional.pad(chosen, (1, 0)).masked_fill(packed.position_ids == 0, 0.0)
    return packed.unpack(logprobs)


def mixes_sequences(model: str, error: float, limit: float) -> str:
    """What to say of a model whose `packing_error` is above the limit.

    Args:
        model: Its name.
        error: From `packing_error`.
        limit: From `packing_error`.
    """
    return (
        f"packing: {model} gives packed sequences other logits than the same sequences alone (relative difference {error:.2g}, "
        f"rounding stays below {limit:.2g}): its layers see neighbours or ignore positions. Switch packing off for it"
    )


@torch.no_grad()
def packing_error(
    alone: Callable[[Tensor], Tensor], together: Callable[[PackedBatch], Tensor], tokens: Tensor
) -> tuple[float, float]:
    """How far a model's logits of packed sequences are from those of the same sequences alone.

    Short sequences of the given tokens are run by themselves, and packed into two rows that end in empty places. The error
    of a sequence is `‖packed - alone‖ / ‖alone - mean over the vocabulary‖`.

    Args:
        alone: Logits `(1, time, vocabulary)` of token ids `(1, time)`, by the model in eval mode.
        together: Logits `(bins, width, vocabulary)` of a packed batch.
        tokens: Token ids to choose from, `(n,)`.

    Returns:
        The largest error of a sequence, NaN if logits are; and the limit of what rounding explains. Rounding is of the order of
        eps and what a neighbour or a wrong position changes of the order of 1: the limit is √eps, halfway in orders of
        magnitude, with eps of the logits' dtype or of float32, in which models take softmax and norms whatever their dtype. In
        a deep model of half precision rounding adds up. So it is measured, by tokens put behind a sequence alone, which change
        nothing else in a causal model, and four times that is the limit where it is more, up to 4 √eps.

    Examples:
        >>> apart = lambda ids: torch.nn.functional.one_hot(ids, 9).float()
        >>> packing_error(apart, lambda packed: apart(packed.input_ids), torch.arange(1, 9))[0]
        0.0
        >>> mixed = lambda ids: apart(ids).cumsum(1)
        >>> packing_error(mixed, lambda packed: mixed(packed.input_ids), torch.arange(1, 9))[0] > 0.1
        True
    """
    lengths = torch.tensor([19, 2, 11, 1, 13])  # a short one after a long one shows what leaks over the border
    mask = (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).to(tokens.device)
    places = torch.randint(len(tokens), tuple(mask.shape), generator=torch.Generator().manual_seed(0))
    ids = tokens[places.to(tokens.device)] * mask
    packed = pack_rows(ids, mask, capacity=34)
    logits = together(packed)
    errors: list[float] = []
    rounding = 0.0
    for row, real in enumerate(mask):
        sequence = ids[row, real]
        expected = alone(sequence.unsqueeze(0))[0].double()
        found = logits[packed.sequence_ids == row].double()
        followed = alone(torch.cat([sequence, ids[row - 1, mask[row - 1]]]).unsqueeze(0))[0, : len(sequence)].double()
        size = max(_norm(expected - expected.mean(-1, keepdim=True)), 1e-12)
        errors.append(_norm(found - expected) / size)
        rounding = max(rounding, _norm(followed - expected) / size)
    worst = math.nan if any(math.isnan(e) for e in errors) else max(errors)
    halfway = math.sqrt(max(torch.finfo(d).eps for d in (logits.dtype, torch.float32)))
    return worst, min(max(halfway, 4 * rounding), 4 * halfway)


def _norm(x: Tensor) -> float:
    return float(x.square().sum().sqrt())
