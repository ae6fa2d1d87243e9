"""SDPA for sequences in one row without a mask of the row: each sequence attends to itself, in batches of similar lengths.

transformers asks two of its registries for the mask and for the attention of SDPA. Both entries are replaced by functions that
do what they did, except within `sequences_apart`: there the place of the mask is taken by the lengths of the sequences, with
which the layers then come to the attention. The row is cut into its sequences, and these are padded to batches. Padding is on
the right, so that causal attention never sees it, and needs no mask.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_FILLED = 0.75
"""Sequences of one batch are at least so long, as a share of the longest of them ..."""
_SHORT = 16
"""... or the longest has at most so many tokens."""


@dataclass(frozen=True, eq=False)
class Apart:
    """The sequences of one row, in the place of an attention mask.

    Args:
        lengths: Number of tokens of each sequence, the longest first, which is their order in the row.
        limit: Largest mask in bytes.
        window: Number of tokens up to which causal attention sees the whole sequence; None if it always does.
        mask: What the longest sequence sees of itself, `(1, 1, longest, longest)`, bool; None with `window=None`.
    """

    lengths: tuple[int, ...]
    limit: float
    window: int | None = None
    mask: Tensor | None = None

    def batches(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """The sequences in batches of similar lengths: the place of the first token, and the lengths."""
        start = first = 0
        for i in range(1, len(self.lengths) + 1):
            longest = self.lengths[first]
            if i < len(self.lengths) and (longest <= _SHORT or self.lengths[i] >= _FILLED * longest):
                continue
            yield start, self.lengths[first:i]
            start, first = start + sum(self.lengths[first:i]), i


_APART: ContextVar[Apart | None] = ContextVar("bandpo_sequences_apart", default=None)


@contextmanager
def sequences_apart(apart: Apart | None) -> Generator[None]:
    """Let SDPA take the row of a forward pass for these sequences.

    A backward pass that computes layers again may run later, outside of this block.

    Args:
        apart: The sequences; None changes nothing.

    Yields:
        Once, for the forward pass.
    """
    if apart is not None:
        _install()
    token = _APART.set(apart)
    try:
        yield
    finally:
        _APART.reset(token)


def refuse_mask(rows: int, width: int, bytes_of_one: int, limit: float, what: str) -> None:
    """Refuse a mask that is too large.

    Args:
        rows: Number of masks.
        width: Number of tokens that each is for.
        bytes_of_one: Bytes of a value.
        limit: Largest number of bytes.
        what: What it is for, for the message.

    Raises:
        ValueError: If it is too large; the message has the remedies.
    """
    size = rows * width * width * bytes_of_one
    if size > limit:
        raise ValueError(
            f"packing: the attention mask for {what} would take {size / 2**30:.2g} GiB, and packing_mask_gib allows "
            f"{limit / 2**30:.2g}. Lower packing_tokens or max_completion_length; or choose attn_implementation sdpa or a "
            "flash attention, which need no such mask for layers without a window; or raise packing_mask_gib"
        )


@cache
def _install() -> None:
    """Replace the entries of SDPA once."""
    make_mask = cast("Callable[..., Tensor | None]", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    attend = cast("Callable[..., tuple[Tensor, Any]]", ALL_ATTENTION_FUNCTIONS["sdpa"])

    def mask(*args: Any, **options: Any) -> Any:
        apart = _APART.get()
        if apart is None:
            return make_mask(*args, **options)
        window: int | None = options.get("local_size")
        longest = apart.lengths[0]
        if window is None or window >= longest:
            return apart
        refuse_mask(1, longest, 1, apart.limit, f"windows of {window} in a sequence of {longest} tokens")
        alone = {**options, "batch_size": 1, "kv_length": longest, "q_length": longest}
        if "cache_position" in options:  # of older versions of transformers, in the place of q_length
            del alone["q_length"]
            alone["cache_position"] = options["cache_position"][:longest]
        return replace(apart, window=window, mask=make_mask(*args, **alone))

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **options: Any
    ) -> Any:
        if not isinstance(attention_mask, Apart):
            return attend(module, query, key, value, attention_mask, *args, **options)
        tokens = sum(attention_mask.lengths)
        if any(x.shape[0] != 1 or x.shape[2] != tokens for x in (query, key, value)):
            raise ValueError(f"packing: {type(module).__name__} attends to other tokens than those of its row")
        found: list[Tensor] = []
        for start, lengths in attention_mask.batches():
            places, real = _places(lengths, query.device)
            seen = None
            if attention_mask.mask is not None and attention_mask.window is not None:
                seen = (
                    attention_mask.mask[..., : lengths[0], : lengths[0]] if lengths[0] > attention_mask.window else None
                )
            rows = (x[0, :, start + places].transpose(0, 1) for x in (query, key, value))
            out = attend(module, *rows, seen, *args, **options)[0]
            found.append(out[real])
        return torch.cat(found).unsqueeze(0), None

    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = mask
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention


def _places(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Places of the tokens of successive sequences, padded on the right by their last token, and which of them are no padding.

    Returns:
        Two tensors `(sequences, longest)`, integers and bool.
    """
    size = torch.tensor(lengths, device=device).unsqueeze(1)
    at = torch.arange(lengths[0], device=device)
    first = size.cumsum(0) - size
    return first + torch.minimum(at, size - 1), at < size
