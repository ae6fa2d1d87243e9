"""Dense packing: sequences of different lengths in rows of a fixed size, without attention between sequences.

The packer is greedy within a window of pending sequences, after arXiv:2603.04135 (whose rule is not known to us).

The model gets the packed tokens and their positions, which start at 0 with each sequence, and no attention mask: from the
positions, transformers derives the mask of each layer, block-diagonal and with the layer's window. Some models do not separate
the sequences (recurrent layers, learned positions, ALiBi), and no model reports that: `packing_error` measures it.
"""

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from bandpo._inputs import as_mask
from bandpo._values import ByValue


def window_pack(lengths: Sequence[int], capacity: int, window: int = 8) -> list[list[int]]:
    """Bins of at most `capacity` tokens: the oldest pending sequence first, then the largest of the window that fits.

    The oldest sequence starts each bin, so that no sequence waits without limit, and the order is kept up to the window. Of
    sequences of the same length the oldest is taken. The time is of the order of n log n for n sequences, whatever the window.

    Args:
        lengths: Number of tokens of each sequence, at least 1.
        capacity: Largest number of tokens in a bin.
        window: Number of pending sequences to choose from; 1 packs in order.

    Returns:
        Indices of the sequences in each bin.

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
    sizes = sorted(set(lengths))
    places = {length: i for i, length in enumerate(sizes)}
    ranks = [places[length] for length in lengths]
    waiting: list[deque[int]] = [deque() for _ in sizes]  # the pending sequences of each size, the oldest first
    present = _Members(len(sizes))
    packed = bytearray(len(lengths))
    coming = min(window, len(lengths))
    for i in range(coming):
        waiting[ranks[i]].append(i)
        present.add(ranks[i])
    bins: list[list[int]] = []
    oldest = packed.find(0)
    while oldest >= 0:
        chosen: list[int] = []
        room = capacity
        at = ranks[oldest]  # the oldest of all pending sequences is the oldest of its size
        while at >= 0:
            i = waiting[at].popleft()
            if not waiting[at]:
                present.remove(at)
            packed[i] = 1
            chosen.append(i)
            room -= sizes[at]
            if coming < len(lengths):
                new = ranks[coming]
                if not waiting[new]:
                    present.add(new)
                waiting[new].append(coming)
                coming += 1
            at = present.last(bisect_right(sizes, room) - 1)
        bins.append(chosen)
        oldest = packed.find(0, oldest)
    return bins


class _Members:
    """A set of small integers that is asked for its largest member up to a limit.

    A tree of words of 64 bits: a bit of an upper word says whether the word below it has a member. Each call visits at most one
    word up and one word down on each level, of which there are log64(size).

    Args:
        size: One more than the largest integer.
    """

    def __init__(self, size: int) -> None:
        self._levels: list[list[int]] = []
        while not self._levels or size > 1:
            size = (size + 63) >> 6
            self._levels.append([0] * size)

    def add(self, member: int) -> None:
        """Add an integer."""
        for words in self._levels:
            at = member >> 6
            before = words[at]
            words[at] = before | 1 << (member & 63)
            if before:
                return
            member = at

    def remove(self, member: int) -> None:
        """Remove a member."""
        for words in self._levels:
            at = member >> 6
            words[at] ^= 1 << (member & 63)
            if words[at]:
                return
            member = at

    def last(self, limit: int) -> int:
        """The largest member that is at most `limit`; -1 if there is none."""
        for level, words in enumerate(self._levels):
            if limit < 0:
                return -1
            found = words[limit >> 6] & ((2 << (limit & 63)) - 1)
            if found:
                member = (limit >> 6 << 6) + found.bit_length() - 1
                for lower in reversed(self._levels[:level]):
                    member = (member << 6) + lower[member].bit_length() - 1
                return member
            limit = (limit >> 6) - 1
        return -1


def density(lengths: Sequence[int], bins: Sequence[Sequence[int]], capacity: int) -> float:
    """Share of the bins' places that hold a token, in [0, 1].

    Args:
        lengths: Number of tokens of each sequence.
        bins: Indices of the sequences in each bin.
        capacity: Places in a bin.

    Examples:
        >>> density([6, 5, 4, 3, 2], [[0, 2], [1, 3, 4]], 10)
        1.0
    """
    return sum(lengths[i] for b in bins for i in b) / (len(bins) * capacity)


@dataclass(frozen=True, eq=False)
class PackedBatch(ByValue):
    """The sequences of a padded batch in the packed layout, and the place of each token.

    Args:
        input_ids: Tokens, `(bins, width)`; 0 at empty places.
        position_ids: Position of each token in the sequence, from 0, `(bins, width)`.
        sequence_ids: Row of each token in the padded batch, `(bins, width)`; -1 at empty places.
        places: Flat packed places of the padded batch's real tokens, in the order of that batch, `(tokens,)`.
        mask: Real tokens of the padded batch, `(batch, time)`, bool.

    Examples:
        >>> packed = pack_rows(torch.tensor([[5, 6], [7, 0]]), torch.tensor([[1, 1], [1, 0]]), capacity=3)
        >>> packed.input_ids, packed.unpack(packed.input_ids)
        (tensor([[5, 6, 7]]), tensor([[5, 6],
                [7, 0]]))
    """

    input_ids: Tensor
    position_ids: Tensor
    sequence_ids: Tensor
    places: Tensor
    mask: Tensor

    def pack(self, values: Tensor, fill: float) -> Tensor:
        """Values in the packed layout, `(bins, width)`.

        Args:
            values: Values in the padded layout, `(batch, time)`.
            fill: Value of the empty places.
        """
        out = values.new_full(self.input_ids.shape, fill)
        out.view(-1)[self.places] = values[self.mask]
        return out

    def unpack(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Values in the padded layout, `(batch, time)`, with gradient.

        Args:
            values: Values in the packed layout, `(bins, width)`.
            fill: Value of the padding.
        """
        out = values.new_full(self.mask.shape, fill)
        return out.masked_scatter(self.mask, values.reshape(-1)[self.places])

    def varlen(self) -> dict[str, Tensor | int]:
        """The arguments of flash attention's varlen call, for all bins as one row without gaps; see `flat`."""
        lengths = self.mask.sum(1)[self._order()]
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        longest = int(lengths.max())
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}

    def flat(self, packed: Tensor) -> Tensor:
        """Packed values as one row without the empty places, `(1, tokens)`.

        Args:
            packed: Values in the packed layout, `(bins, width)`.
        """
        return packed[self.sequence_ids >= 0].unsqueeze(0)

    def _order(self) -> Tensor:
        """Indices of the sequences in the order of the bins."""
        return self.sequence_ids[self.position_ids.eq(0) & (self.sequence_ids >= 0)]


def pack_rows(input_ids: Tensor, attention_mask: Tensor, *, capacity: int, window: int = 8) -> PackedBatch:
    """Pack the rows of a padded batch, with padding on either side or on both.

    Args:
        input_ids: Tokens, `(batch, time)`.
        attention_mask: 1 at real tokens and 0 elsewhere, `(batch, time)`; each row has a real token.
        capacity: Largest number of tokens in a bin. The width of the result is that of the fullest bin.
        window: Number of pending sequences to choose from, as in `window_pack`.

    Returns:
        The packed batch.

    Raises:
        ValueError: If shapes differ, the mask holds values other than 0 and 1, or a row is empty or longer than a bin.

    Examples:
        >>> pack_rows(torch.tensor([[5, 6], [7, 0]]), torch.tensor([[1, 1], [1, 0]]), capacity=3).sequence_ids
        tensor([[0, 0, 1]])
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
    model: Callable[..., Tensor],
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    capacity: int,
    window: int = 8,
    check: bool = True,
) -> Tensor:
    """Log-probs of a padded batch's tokens from a packed forward pass.

    Args:
        model: Called with `input_ids` and `position_ids`, `(bins, width)`; returns logits `(bins, width, vocabulary)`. It must
            separate sequences where positions start at 0 again, as most of transformers' decoders do when they are called
            with `use_cache=False`.
        input_ids: Tokens, `(batch, time)`.
        attention_mask: 1 at real tokens and 0 elsewhere, `(batch, time)`.
        capacity: Largest number of tokens in a bin, as in `pack_rows`.
        window: Number of pending sequences to choose from, as in `pack_rows`.
        check: Whether to measure first, by `packing_error`, that the model separates sequences. One check per model is enough.

    Returns:
        `(batch, time)`; 0 at the first token of each sequence and at padding.

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
    """The message about a model whose `packing_error` is above the limit.

    Args:
        model: Name of the model.
        error: The error that `packing_error` returned.
        limit: The limit that `packing_error` returned.
    """
    return (
        f"packing: {model} gives packed sequences other logits than the same sequences alone (relative difference {error:.2g}, "
        f"rounding stays below {limit:.2g}): its layers see neighbours or ignore positions. Switch packing off for it"
    )


@torch.no_grad()
def packing_error(
    alone: Callable[[Tensor], Tensor], together: Callable[[PackedBatch], Tensor], tokens: Tensor
) -> tuple[float, float]:
    """Error of a model's logits for packed sequences, measured against the same sequences alone.

    Short sequences of the given tokens are run one by one, and packed into two rows that end in empty places. The error of a
    sequence is `‖packed - alone‖ / ‖alone - mean over the vocabulary‖` (our own measure).

    Args:
        alone: Maps token ids `(1, time)` to logits `(1, time, vocabulary)`, by the model in eval mode.
        together: Maps a packed batch to logits `(bins, width, vocabulary)`.
        tokens: Token ids to choose from, `(n,)`.

    Returns:
        The largest error of a sequence (NaN if a logit is NaN), and the largest error that rounding explains. Rounding is of
        the order of eps, and the effect of a neighbour or a wrong position is of the order of 1: the limit is √eps, halfway
        in orders of magnitude, with eps of the logits' dtype or of float32, in which models compute softmax and norms. In a
        deep model of half precision rounding accumulates. It is measured by tokens after a single sequence, which change
        nothing else in a causal model; if four times this rounding is larger than √eps, it is the limit, up to 4 √eps.

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
