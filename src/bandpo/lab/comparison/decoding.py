"""One new token after the other: keys and values of the tokens so far, and a step of fixed shapes for a CUDA graph."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

LONG = 64
"""Tokens of prompt and completion from which the cache is laid out by sequence; the lab's problems have at most 36."""

Place = int | Tensor
"""The place of a new token in the caches: a number, or a tensor `(1,)` that a graph reads anew each time."""

Forward = Callable[[Tensor, Tensor, Place], Tensor]
"""A function of tokens `(runs, sequences, 1)`, their positions and their place in the caches that returns the next logits."""


class Cache:
    """Keys and values of a layer, with room for the tokens to come: nothing is copied when a token is added.

    With few tokens, time is the first dimension and attention is two elementwise products. From `LONG` tokens on, where
    attention heads share keys, with padding and in a graph, each sequence has its own block, and attention is two matrix
    products.

    Args:
        keys: Keys of the prompts, `(runs * prompts, heads, time, size)`.
        values: Values of the prompts, of the same shape.
        shape: Numbers of runs and of prompts.
        repeats: Completions of each prompt, consecutive.
        new: Number of tokens to come.
        groups: Attention heads that share a head of keys and values.
        hidden: `(runs * prompts, time)`, bool: True at padding, to which nothing attends; None without padding.
        fixed: Whether attention always reads the whole room, with a mask, so that shapes and addresses never change.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        shape: Sequence[int],
        repeats: int,
        new: int,
        *,
        groups: int = 1,
        hidden: Tensor | None = None,
        fixed: bool = False,
    ) -> None:
        start = keys.shape[2]
        self.groups, self.fixed = groups, fixed
        self.long = start + new >= LONG or groups > 1 or hidden is not None or fixed
        self.hidden: Tensor | None = None
        if hidden is not None:
            later = torch.zeros(len(hidden), new, dtype=torch.bool, device=hidden.device)
            self.hidden = torch.cat([hidden, later], 1).repeat_interleave(repeats, 0)
        self.places = torch.arange(start + new, device=keys.device) if fixed else None
        self.keys, self.values = (self._room(x, start + new, shape[0] * shape[1] * repeats) for x in (keys, values))
        for room, given in ((self.keys, keys), (self.values, values)):
            if self.long:
                room.view(-1, repeats, *room.shape[1:])[:, :, :, :start] = given.unsqueeze(1)
            else:
                room.view(len(room), -1, repeats, *room.shape[2:])[:start] = given.permute(2, 0, 1, 3).unsqueeze(2)

    def _room(self, given: Tensor, time: int, count: int) -> Tensor:
        """`(count, heads, time, size)` for long completions, else `(time, count, heads, size)`."""
        _, heads, _, size = given.shape
        make = given.new_zeros if self.fixed else given.new_empty  # what is masked must be a number: 0 x NaN is NaN
        return make(count, heads, time, size) if self.long else make(time, count, heads, size)

    def attend(self, at: Place, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Add a token's keys and values at a place; the attention of its queries to all tokens so far.

        Args:
            at: The place, a tensor where the cache is fixed.
            q: Queries, `(runs * sequences, heads, 1, size)`.
            k: Keys, `(runs * sequences, key heads, 1, size)`.
            v: Values, of the same shape.

        Returns:
            A tensor of the shape of `q`.
        """
        query = q / math.sqrt(q.shape[-1])
        if self.long:
            return self._attend_by_sequence(at, query, k, v)
        self.keys[at], self.values[at] = k.squeeze(2), v.squeeze(2)
        keys, values = self.keys[: cast(int, at) + 1], self.values[: cast(int, at) + 1]
        weight = cast(Tensor, torch.linalg.vecdot(keys, query.squeeze(2))).softmax(0)
        return (weight.unsqueeze(-1) * values).sum(0).unsqueeze(2)

    def _attend_by_sequence(self, at: Place, query: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values, unseen = self.keys, self.values, self.hidden
        if isinstance(at, int):
            keys[:, :, at], values[:, :, at] = k.squeeze(2), v.squeeze(2)
            keys, values = keys[:, :, : at + 1], values[:, :, : at + 1]
            unseen = None if unseen is None else unseen[:, : at + 1]
        else:
            keys.index_copy_(2, at, k)
            values.index_copy_(2, at, v)
            later = (cast(Tensor, self.places) > at).unsqueeze(0)
            unseen = later if unseen is None else later | unseen
        count, _, _, size = query.shape
        weight = torch.bmm(query.reshape(-1, self.groups, size), keys.flatten(0, 1).transpose(1, 2))
        if unseen is not None:
            by_head = weight.view(count, -1, weight.shape[-1])
            weight = by_head.masked_fill(unseen.unsqueeze(1), -math.inf).view(weight.shape)
        return torch.bmm(weight.softmax(-1), values.flatten(0, 1)).view(query.shape)


class GrowingStep:
    """The forward pass of one new token, with caches that are read as far as they are filled.

    Args:
        forward: The forward pass.
        at: Place of the first new token in the caches.
        positions: Positions of the first new tokens, `(1,)` or `(runs, sequences, 1)`.
    """

    def __init__(self, forward: Forward, at: int, positions: Tensor) -> None:
        self._forward, self._at, self._positions = forward, at, positions.clone()

    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits after tokens `(runs, sequences, 1)`."""
        scores = self._forward(tokens, self._positions, self._at)
        self._at += 1
        self._positions += 1
        return scores


class FixedStep:
    """The forward pass of one new token with the same shapes and addresses each time, which a CUDA graph replays.

    The first token is computed operation by operation, which makes what the libraries make once; with the second one, the
    graph is captured. A graph starts some hundred kernels with one call, and is worth it where starting them takes longer than
    they do. On the CPU, and where the capture fails, every token is computed operation by operation. Not measured yet.

    Args:
        forward: The forward pass, whose caches are fixed.
        at: Place of the first new token in the caches.
        positions: Positions of the first new tokens, `(1,)` or `(runs, sequences, 1)`.
        tokens: Tokens whose shape, device and dtype those to come have, `(runs, sequences, 1)`.
    """

    def __init__(self, forward: Forward, at: int, positions: Tensor, tokens: Tensor) -> None:
        self._forward, self._positions, self._tokens = forward, positions.clone(), torch.empty_like(tokens)
        self._at = torch.full((1,), at, device=tokens.device)
        self._graph: Any = None
        self._scores: Tensor | None = None
        self._captures = tokens.device.type == "cuda"

    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits after tokens `(runs, sequences, 1)`, overwritten by the next call where a graph computes them."""
        self._tokens.copy_(tokens)
        if self._captures and self._graph is None and self._scores is not None:
            self._capture()
        if self._graph is None:
            self._advance()
        else:
            self._graph.replay()
        return cast(Tensor, self._scores)

    def _advance(self) -> None:
        self._scores = self._forward(self._tokens, self._positions, self._at)
        self._at += 1
        self._positions += 1

    def _capture(self) -> None:
        """Record `_advance`, which is not executed while it is recorded."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._advance()
        except RuntimeError as error:
            self._captures = False
            warnings.warn(f"no CUDA graph could be captured, so the sampler runs without one: {error}", stacklevel=4)
            return
        self._graph = graph
