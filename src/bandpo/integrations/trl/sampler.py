"""How far the log-probs of the sampler are from those that the trainer computes for the same tokens.

The sampler reads one token after the other from a cache, and the trainer scores whole sequences. In float32 both give the same
log-probs up to rounding. In bfloat16 and float16 they do not: each rounds other intermediate results.
"""

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from bandpo._inputs import is_logprob
from bandpo.integrations.trl.host import Accelerator, Batch
from bandpo.integrations.trl.rollout import PREFIX, mask_of
from bandpo.metrics import PooledSum
from bandpo.monitoring.names import TRL_NAMES

SAMPLED = f"{PREFIX}sampled_logps"
"""Name of the sampler's log-probs in a rollout, `(completions, time)`, float32; NaN for tokens without one."""

MEAN = TRL_NAMES["rollout/difference"]
"""TRL's name of the mean of |log π_rollout - log π_old| over the valid tokens, which it logs with vLLM alone."""

LARGEST = MEAN.replace("/mean", "/max")
"""TRL's name of the largest of these differences."""


class _Output(Protocol):
    logits: Tensor


class SamplerLogprobs:
    """Collects the log-probs that a sampler of transformers gives to its own tokens, from its own forward passes.

    A forward pass of `generate` gives the logits of the next token, and the pass after it has that token as its last input.
    So no pass is added: each one costs a log-sum-exp over the vocabulary more.

    Args:
        temperature: Temperature of the log-probs, which is that of the trainer's. Other options of the sampler, such as
            `top_p`, change neither these log-probs nor the trainer's.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self._tokens: list[Tensor] = []
        self._logprobs: list[Tensor] = []
        self._next: tuple[Tensor, Tensor] | None = None
        self._widths: list[int] = []
        self._lost = False

    @contextmanager
    def listening(self, model: nn.Module) -> Generator[None]:
        """A context in which the forward passes of a model are those of one call of `generate`.

        Args:
            model: A causal LM, with an adapter around it if there is one.
        """
        inner = cast("nn.Module", cast("Any", model).get_base_model()) if hasattr(model, "get_base_model") else model
        handle = inner.register_forward_hook(self._after_pass, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def of(self, completions: Tensor) -> Tensor:
        """The sampler's log-probs of the tokens of its completions.

        Args:
            completions: Token ids of the completions, `(completions, time)`, padded on the right.

        Returns:
            Log-probs, `(completions, time)`, float32. NaN where the sampler did not draw that token at that place, as in the
            padding, and everywhere if it did not sample one token after the other (beams, drafts of several tokens).
        """
        rows, width = completions.shape
        if self._next is not None and len(self._tokens) < width and len(self._next[0]) == rows:
            self._note(completions[:, len(self._tokens)])
        found = completions.new_full((rows, width), torch.nan, dtype=torch.float32)
        count = min(len(self._tokens), width)
        if not count or self._lost or len(self._tokens[0]) != rows:
            return found
        tokens, logprobs = (torch.stack(x[:count], 1) for x in (self._tokens, self._logprobs))
        found[:, :count] = torch.where(tokens == completions[:, :count], logprobs, torch.nan)
        return found

    def _after_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: _Output) -> None:
        del module
        ids = cast("Tensor | None", kwargs.get("input_ids", args[0] if args else None))
        if ids is None or self._lost:
            self._lost = True
            return
        # With a cache each pass after the first reads one token, and without one everything again.
        self._widths.append(ids.shape[1])
        first, count = self._widths[0], len(self._widths) - 1
        with_cache, without = count == 0 or self._widths[1] == 1, first + count
        self._lost = count > 0 and ids.shape[1] != (1 if with_cache else without)
        if self._next is not None:
            self._note(ids[:, -1])
        # A copy, where a view would keep the logits of a whole prompt.
        logits = out.logits[:, -1].to(torch.float32, copy=out.logits.shape[1] > 1)
        logits = logits if self.temperature == 1 else logits / self.temperature
        self._next = logits, logits.logsumexp(-1)

    def _note(self, tokens: Tensor) -> None:
        """Take down the tokens that were drawn after the last pass, with their log-probs; both are `(completions,)`."""
        assert self._next is not None
        logits, total = self._next
        self._tokens.append(tokens)
        self._logprobs.append(logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - total)
        self._next = None


def mismatch(batch: Batch, logprobs: Tensor) -> Mapping[str, PooledSum]:
    """Mean and largest |log π_rollout - log π_old| over the valid tokens of a batch, under TRL's names.

    Tokens for which one of both is not known, or is no log-probability, are left out.

    Args:
        batch: TRL's inputs.
        logprobs: Log-probs of the policy in training, `(batch, time)`; they are the old ones where TRL has left those out.

    Returns:
        The two sums, without gradient; none where the sampler's log-probs are not in the batch.
    """
    sampled = cast("Tensor | None", batch.get("sampling_per_token_logps", batch.get(SAMPLED)))
    if sampled is None:
        return {}
    old = cast("Tensor", batch.get("old_per_token_logps", logprobs.detach()))
    counted = (mask_of(batch) != 0) & is_logprob(sampled) & is_logprob(old)
    difference = torch.where(counted, (sampled - old).abs(), 0.0)
    count = counted.sum(dtype=difference.dtype)
    return {MEAN: PooledSum(difference.sum(), count), LARGEST: PooledSum(difference.amax(), count, "max")}


def cast_once(accelerator: Accelerator) -> AbstractContextManager[None]:
    """A context for a call of `generate` on a CPU, in which mixed precision rounds each weight once, not once for each token.

    Around each forward pass the accelerator has a context of its own, at whose end torch forgets the rounded weights. It keeps
    them until the end of the outer context, in memory of half the size of the weights. The samples are the same.

    Args:
        accelerator: The trainer's accelerator.
    """
    return accelerator.autocast() if accelerator.device.type == "cpu" else nullcontext()
