"""Many small Llama models at once: weights stacked along a first dimension, one forward pass for all of them.

The lab trains dozens of runs (methods x seeds) of a tiny model. For a single run, a step is mostly overhead; for a stack of
runs, every matrix product is a batched one. A large stack is processed in parts whose activations fit the processor's cache.
With a multiple of 32 sequences a run, as in every preset, that changes no bit, else the last one at most. Weights and log-probs
are those of a transformers `LlamaForCausalLM` (tests/lab/test_stack.py).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

Fused = list[tuple[Tensor, Tensor]]
"""For each layer, the joined weights of queries, keys and values, and those of the two projections into the MLP."""

_PART = 1 << 17
"""Elements of one activation, `runs * rows * width`, up to which runs are processed together: half a megabyte."""

_LONG = 64
"""Tokens of prompt and completion from which the cache is laid out by sequence; the lab's problems have at most 36."""


class Shape(NamedTuple):
    """The constants of the architecture that the weights alone do not give.

    Args:
        layers: Number of layers.
        heads: Number of attention heads.
        epsilon: Constant of the RMS norms.
        theta: Base of the rotary position embedding.
    """

    layers: int
    heads: int
    epsilon: float
    theta: float


class Rollout(NamedTuple):
    """Completions of every run.

    Args:
        tokens: `(runs, sequences, time)`.
        logprobs: `(runs, sequences, time)`, the log-probs with which the sampler drew the tokens.
        mask: `(runs, sequences, time)`, bool: True up to the end token and at it.
    """

    tokens: Tensor
    logprobs: Tensor
    mask: Tensor


class Stack:
    """Weights of `runs` models, in one dictionary of `(runs, ...)` tensors.

    Args:
        weights: `(runs, ...)` tensors by their names in a `LlamaForCausalLM`, as `load` makes them.
        shape: Constants of the architecture.
    """

    def __init__(self, weights: dict[str, Tensor], shape: Shape) -> None:
        self.weights, self.shape = weights, shape

    @classmethod
    def load(cls, models: Sequence[Any]) -> "Stack":
        """A stack with one run for each model.

        Args:
            models: Models of type `LlamaForCausalLM` and of one architecture; the same one may come twice.

        Raises:
            ValueError: If the architecture shares attention heads or ties the LM head to the embedding.
        """
        config = models[0].config
        states = [m.state_dict() for m in models]
        weights = {name: torch.stack([s[name].detach() for s in states]) for name in states[0]}
        if config.num_attention_heads != config.num_key_value_heads or config.tie_word_embeddings:
            raise ValueError("the lab's stack takes Llama models with full attention heads and an LM head of their own")
        theta = config.rope_parameters["rope_theta"]
        return cls(weights, Shape(config.num_hidden_layers, config.num_attention_heads, config.rms_norm_eps, theta))

    def write(self, run: int, model: Any) -> None:
        """Copy one run's weights into a model.

        Args:
            run: Number of the run.
            model: A `LlamaForCausalLM` of the stack's architecture.
        """
        model.load_state_dict({name: w[run].detach() for name, w in self.weights.items()})

    @property
    def runs(self) -> int:
        """The number of models."""
        return next(iter(self.weights.values())).shape[0]

    @property
    def width(self) -> int:
        """The width of the models."""
        return self.weights["model.embed_tokens.weight"].shape[-1]

    def parts(self, rows: int) -> list[slice]:
        """Consecutive runs that are best processed together.

        Args:
            rows: Tokens of each run that are in one forward pass: sequences, times tokens of a sequence.

        Returns:
            Slices of the runs, in order.
        """
        size = max(1, _PART // max(1, rows * self.width))
        return [slice(first, min(first + size, self.runs)) for first in range(0, self.runs, size)]

    def part(self, runs: slice) -> "Stack":
        """A stack of some of the runs, with views of their weights.

        Args:
            runs: The runs.

        Returns:
            The stack. Its weights are leaves: where the whole stack's require a gradient, so do they.
        """
        views = {name: w.detach()[runs].requires_grad_(w.requires_grad) for name, w in self.weights.items()}
        return Stack(views, self.shape)

    def logits(self, ids: Tensor, keep: int) -> Tensor:
        """Logits after each of the last `keep` positions.

        Args:
            ids: `(runs, sequences, time)` tokens without padding.
            keep: Number of positions.

        Returns:
            `(runs, sequences, keep, vocabulary)`, with gradient.
        """
        x, fused = self._embed(ids), self._fused()
        turn = self._turn(torch.arange(ids.shape[-1]))
        for layer in range(self.shape.layers):
            q, k, v = self._project(layer, x, turn, fused)
            x = self._finish_layer(layer, x, F.scaled_dot_product_attention(q, k, v, is_causal=True), fused)
        return self._head(x[..., -keep:, :])

    def logprobs(self, prompts: Tensor, completions: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probs of completions.

        Args:
            prompts: `(runs, sequences, prompt time)` tokens without padding.
            completions: `(runs, sequences, time)` tokens.
            temperature: Temperature of the policy.

        Returns:
            `(runs, sequences, time)`, with gradient.
        """
        scores = self.distributions(prompts, completions, temperature)
        return scores.gather(-1, completions.unsqueeze(-1)).squeeze(-1)

    def distributions(self, prompts: Tensor, completions: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probs of every token of the vocabulary at each place of completions.

        Args:
            prompts: `(runs, sequences, prompt time)` tokens without padding.
            completions: `(runs, sequences, time)` tokens.
            temperature: Temperature of the policy.

        Returns:
            `(runs, sequences, time, vocabulary)`, with gradient.
        """
        ids = torch.cat([prompts, completions], -1)[..., :-1]
        logits = self.logits(ids, completions.shape[-1])
        return (logits if temperature == 1 else logits / temperature).log_softmax(-1)

    @torch.no_grad()
    def sample(
        self, prompts: Tensor, noise: Tensor, *, end: int, pad: int, repeats: int = 1, temperature: float = 1.0
    ) -> Rollout:
        """Completions drawn by inverting the distribution function at `noise`.

        Args:
            prompts: `(runs, prompts, time)`, all of one length; each is read once, whatever `repeats`.
            noise: `(runs, prompts * repeats, new)`, uniform in [0, 1): the same noise gives the same completions.
            end: Token that ends a completion.
            pad: Token that fills the places after the end.
            repeats: Completions of each prompt, consecutive.
            temperature: Sampling temperature; the log-probs are those at this temperature.

        Returns:
            Tokens, log-probs and mask, `(runs, prompts * repeats, new)` each.
        """
        parts = self.parts(noise.shape[1])
        if len(parts) > 1:
            made = [
                self.part(part).sample(
                    prompts[part], noise[part], end=end, pad=pad, repeats=repeats, temperature=temperature
                )
                for part in parts
            ]
            return Rollout(*(torch.cat(x) for x in zip(*made, strict=True)))
        runs, sequences, new = noise.shape
        start, fused = prompts.shape[-1], self._fused()
        scores, caches = self._read_prompts(prompts, repeats, new, fused)
        tokens = torch.full((runs, sequences, new), pad)
        logprobs = torch.zeros(runs, sequences, new)
        mask = torch.zeros(runs, sequences, new, dtype=torch.bool)
        going = torch.ones(runs, sequences, dtype=torch.bool)
        for t in range(new):
            drawn, chosen = _draw(scores, noise[..., t : t + 1], temperature)
            tokens[..., t] = torch.where(going, drawn, pad)
            logprobs[..., t] = torch.where(going, chosen, 0.0)
            mask[..., t] = going
            going = going & (drawn != end)
            if t + 1 == new or not going.any():
                break
            scores = self._next_scores(tokens[..., t : t + 1], start + t, caches, fused)
        return Rollout(tokens, logprobs, mask)

    def _read_prompts(self, prompts: Tensor, repeats: int, new: int, fused: Fused) -> tuple[Tensor, list["_Cache"]]:
        """Logits after the prompts, and each layer's keys and values with room for `new` more tokens."""
        caches: list[_Cache] = []
        x = self._embed(prompts)
        turn = self._turn(torch.arange(prompts.shape[-1]))
        for layer in range(self.shape.layers):
            q, k, v = self._project(layer, x, turn, fused)
            x = self._finish_layer(layer, x, F.scaled_dot_product_attention(q, k, v, is_causal=True), fused)
            caches.append(_Cache(k, v, x.shape[:2], repeats, new))
        return self._head(x[..., -1, :]).repeat_interleave(repeats, 1), caches

    def _next_scores(self, tokens: Tensor, at: int, caches: list["_Cache"], fused: Fused) -> Tensor:
        """Logits after the tokens `(runs, sequences, 1)` at position `at`, whose keys and values are added to the caches."""
        x = self._embed(tokens)
        turn = self._turn(torch.arange(at, at + 1))
        for layer, cache in enumerate(caches):
            q, k, v = self._project(layer, x, turn, fused)
            x = self._finish_layer(layer, x, cache.attend(at, q, k, v), fused)
        return self._head(x[..., 0, :])

    def _fused(self) -> Fused:
        """The weights that read the same input, joined into one matrix, for each layer."""
        w = self.weights
        return [
            (
                torch.cat([w[f"model.layers.{i}.self_attn.{n}_proj.weight"] for n in "qkv"], 1),
                torch.cat([w[f"model.layers.{i}.mlp.{n}_proj.weight"] for n in ("gate", "up")], 1),
            )
            for i in range(self.shape.layers)
        ]

    def _embed(self, ids: Tensor) -> Tensor:
        table = self.weights["model.embed_tokens.weight"]
        runs, rows, width = table.shape
        offset = (torch.arange(runs) * rows).view(-1, *([1] * (ids.dim() - 1)))
        return F.embedding(ids + offset, table.reshape(runs * rows, width))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        scale = self.weights[name]
        return F.rms_norm(x, x.shape[-1:], eps=self.shape.epsilon) * scale.view(len(scale), *([1] * (x.dim() - 2)), -1)

    def _turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine of the rotary embedding, `(time, size)` each."""
        size = self.width // self.shape.heads
        angle = positions.unsqueeze(-1) * self.shape.theta ** (-torch.arange(0, size, 2) / size)
        return torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1)

    def _project(
        self, layer: int, x: Tensor, turn: tuple[Tensor, Tensor], fused: Fused
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, `(runs * sequences, heads, time, size)`."""
        mixed = _product(self._norm(f"model.layers.{layer}.input_layernorm.weight", x), fused[layer][0])
        count = self.shape.heads
        heads = mixed.view(-1, x.shape[2], 3 * count, mixed.shape[-1] // 3 // count).transpose(1, 2)
        both, v = cast(
            "tuple[Tensor, Tensor]", heads.split([2 * count, count], 1)
        )  # the gradient of a split is one concatenation
        first, second = cast("tuple[Tensor, Tensor]", both.chunk(2, -1))
        turned = both * turn[0] + torch.cat([second, first], -1) * turn[1]
        q, k = cast("tuple[Tensor, Tensor]", turned.chunk(2, 1))
        return q, k, v

    def _finish_layer(self, layer: int, x: Tensor, mixed: Tensor, fused: Fused) -> Tensor:
        prefix = f"model.layers.{layer}"
        x = x + _product(mixed.transpose(1, 2).reshape(x.shape), self.weights[f"{prefix}.self_attn.o_proj.weight"])
        h = _product(self._norm(f"{prefix}.post_attention_layernorm.weight", x), fused[layer][1])
        gate, up = h.chunk(2, -1)
        return x + _product(F.silu(gate) * up, self.weights[f"{prefix}.mlp.down_proj.weight"])

    def _head(self, x: Tensor) -> Tensor:
        return _product(self._norm("model.norm.weight", x), self.weights["lm_head.weight"])


class _Cache:
    """Keys and values of a layer, with room for the tokens to come: nothing is copied when a token is added.

    With few tokens, time is the first dimension and attention is two elementwise products; from `_LONG` tokens on, each
    sequence has its own block, and attention is two matrix products.

    Args:
        keys: Keys of the prompts, `(runs * prompts, heads, time, size)`.
        values: Values of the prompts, of the same shape.
        shape: Numbers of runs and of prompts.
        repeats: Completions of each prompt, consecutive.
        new: Number of tokens to come.
    """

    def __init__(self, keys: Tensor, values: Tensor, shape: Sequence[int], repeats: int, new: int) -> None:
        start = keys.shape[2]
        self.long = start + new >= _LONG
        self.keys, self.values = (self._room(x, start + new, shape[0] * shape[1] * repeats) for x in (keys, values))
        for room, given in ((self.keys, keys), (self.values, values)):
            if self.long:
                room.view(-1, repeats, *room.shape[1:])[:, :, :, :start] = given.unsqueeze(1)
            else:
                room.view(len(room), -1, repeats, *room.shape[2:])[:start] = given.permute(2, 0, 1, 3).unsqueeze(2)

    def _room(self, given: Tensor, time: int, count: int) -> Tensor:
        """`(count, heads, time, size)` for long completions, else `(time, count, heads, size)`."""
        _, heads, _, size = given.shape
        return given.new_empty(count, heads, time, size) if self.long else given.new_empty(time, count, heads, size)

    def attend(self, at: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Add a token's keys and values at position `at`; the attention of its queries to all tokens so far.

        `q`, `k`, `v` and the result have shape `(runs * sequences, heads, 1, size)`.
        """
        query = q / math.sqrt(q.shape[-1])
        if self.long:
            self.keys[:, :, at], self.values[:, :, at] = k.squeeze(2), v.squeeze(2)
            keys, values = (x.flatten(0, 1)[:, : at + 1] for x in (self.keys, self.values))
            weight = torch.bmm(query.flatten(0, 1), keys.transpose(1, 2)).softmax(-1)
            return torch.bmm(weight, values).view(q.shape)
        self.keys[at], self.values[at] = k.squeeze(2), v.squeeze(2)
        keys, values = self.keys[: at + 1], self.values[: at + 1]
        weight = cast(Tensor, torch.linalg.vecdot(keys, query.squeeze(2))).softmax(0)
        return (weight.unsqueeze(-1) * values).sum(0).unsqueeze(2)


def _draw(scores: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The tokens that `noise` picks from the softmax of logits `(..., vocabulary)`, and their log-probs."""
    scores = scores - scores.amax(-1, keepdim=True)
    scores = scores / temperature if temperature != 1 else scores
    sums = scores.exp().cumsum(-1)
    total = sums[..., -1:]
    drawn = (sums <= noise * total).sum(-1).clamp_max(scores.shape[-1] - 1)
    return drawn, (scores.gather(-1, drawn.unsqueeze(-1)) - total.log()).squeeze(-1)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """The product `x Wᵀ` of each run."""
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    return torch.bmm(flat, weight.transpose(1, 2)).view(*x.shape[:-1], weight.shape[1])


class Adam:
    """Adam (arXiv:1412.6980) with a learning rate and a gradient norm for each run of a stack.

    Args:
        weights: `(runs, ...)` tensors of a stack, updated in place.
        rates: `(runs,)`, learning rates.
        betas: Decay rates of the first and the second moment.
        max_norm: Largest gradient norm of a run; a larger gradient is scaled down to it.
    """

    def __init__(
        self, weights: dict[str, Tensor], rates: Tensor, betas: tuple[float, float] = (0.9, 0.95), max_norm: float = 1.0
    ) -> None:
        self.weights, self.rates, self.betas, self.max_norm = list(weights.values()), rates, betas, max_norm
        self.steps = 0
        self.moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in self.weights]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> Tensor:
        """Take one step. A run whose gradient is not finite keeps its weights.

        Args:
            gradients: `(runs, ...)` tensors, in the order of the weights.

        Returns:
            `(runs,)`, the norm of each run's gradient before it was scaled.
        """
        norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
        scale = (self.max_norm / (norms + 1e-6)).clamp_max(1.0)
        self.steps += 1
        first, second = self.betas
        correction = math.sqrt(1 - second**self.steps) / (1 - first**self.steps)
        for w, g, (m, v) in zip(self.weights, gradients, self.moments, strict=True):
            shape = (-1, *([1] * (w.dim() - 1)))
            g = torch.where(norms.isfinite().view(shape), g * scale.view(shape), 0.0)
            m.lerp_(g, 1 - first)
            v.lerp_(g.square(), 1 - second)
            w -= (self.rates * correction).view(shape) * m / (v.sqrt() + 1e-8 * math.sqrt(1 - second**self.steps))
        return norms
