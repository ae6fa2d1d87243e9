"""Many small Llama models at once: weights stacked along a first dimension, one forward pass for all of them.

The lab trains dozens of runs (methods x seeds) of a tiny model. One at a time, a step is mostly overhead; stacked, every
matrix product is a batched one. The weights are those of a transformers `LlamaForCausalLM`, and so are the log-probs
(tests/lab/test_stack.py).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Shape(NamedTuple):
    """What the weights do not say."""

    layers: int
    heads: int
    epsilon: float
    theta: float


class Rollout(NamedTuple):
    """Completions of every run: `(runs, sequences, time)`."""

    tokens: Tensor
    logprobs: Tensor  # of the sampler, exactly those it drew with
    mask: Tensor  # up to the end token, that one included


class Stack:
    """Weights of `runs` models, in one dictionary of `(runs, ...)` tensors.

    Args:
        weights: As `load` makes them.
        shape: Layers, heads and constants.
    """

    def __init__(self, weights: dict[str, Tensor], shape: Shape) -> None:
        self.weights, self.shape = weights, shape

    @classmethod
    def load(cls, models: Sequence[Any]) -> "Stack":
        """A stack with one run for each `LlamaForCausalLM`, all of one architecture; the same one may come twice."""
        config = models[0].config
        states = [m.state_dict() for m in models]
        weights = {name: torch.stack([s[name].detach() for s in states]) for name in states[0]}
        if config.num_attention_heads != config.num_key_value_heads or config.tie_word_embeddings:
            raise ValueError("the lab's stack takes Llama models with full attention heads and an LM head of their own")
        theta = config.rope_parameters["rope_theta"]
        return cls(weights, Shape(config.num_hidden_layers, config.num_attention_heads, config.rms_norm_eps, theta))

    def write(self, run: int, model: Any) -> None:
        """Copy one run's weights into a model."""
        model.load_state_dict({name: w[run].detach() for name, w in self.weights.items()})

    @property
    def runs(self) -> int:
        """How many models."""
        return next(iter(self.weights.values())).shape[0]

    def logits(self, ids: Tensor, keep: int) -> Tensor:
        """Logits after each of the last `keep` positions of `(runs, sequences, time)` tokens without padding."""
        x, fused = self._embed(ids), self._fused()
        turn = self._turn(torch.arange(ids.shape[-1]))
        for layer in range(self.shape.layers):
            q, k, v = self._project(layer, x, turn, fused)
            x = self._finish_layer(layer, x, F.scaled_dot_product_attention(q, k, v, is_causal=True), fused)
        return self._head(x[..., -keep:, :])

    def logprobs(self, prompts: Tensor, completions: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probs of completions `(runs, sequences, time)`, with gradient."""
        time = completions.shape[-1]
        ids = torch.cat([prompts, completions], -1)[..., :-1]
        scores = (self.logits(ids, time) / temperature).log_softmax(-1)
        return scores.gather(-1, completions.unsqueeze(-1)).squeeze(-1)

    def entropy(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """Entropy of the policy at each place of the completions."""
        ids = torch.cat([prompts, completions], -1)[..., :-1]
        scores = self.logits(ids, completions.shape[-1]).log_softmax(-1)
        return -(scores.exp() * scores).sum(-1)

    @torch.no_grad()
    def sample(
        self, prompts: Tensor, noise: Tensor, *, end: int, pad: int, repeats: int = 1, temperature: float = 1.0
    ) -> Rollout:
        """Completions drawn by inverting the distribution function at `noise`.

        Args:
            prompts: `(runs, prompts, time)`, all of one length; each is read once, whatever `repeats`.
            noise: `(runs, prompts * repeats, new)`, uniform in [0, 1): the same noise gives the same completions.
            end: Token that ends a completion.
            pad: Token after it.
            repeats: Completions of each prompt, consecutive.
            temperature: Of sampling; the log-probs are those at this temperature.
        """
        runs, sequences, new = noise.shape
        start = prompts.shape[-1]
        fused = self._fused()
        caches: list[tuple[Tensor, Tensor]] = []
        x = self._embed(prompts)
        turn = self._turn(torch.arange(start))
        for layer in range(self.shape.layers):
            q, k, v = self._project(layer, x, turn, fused)
            x = self._finish_layer(layer, x, F.scaled_dot_product_attention(q, k, v, is_causal=True), fused)
            # Time first: what a step reads is contiguous.
            room = [torch.empty(start + new, runs * sequences, y.shape[1], y.shape[-1]) for y in (k, v)]
            for cache, y in zip(room, (k, v), strict=True):
                cache[:start] = y.permute(2, 0, 1, 3).repeat_interleave(repeats, 1)
            caches.append((room[0], room[1]))
        scores = self._head(x[..., -1, :]).repeat_interleave(repeats, 1)
        tokens = torch.full((runs, sequences, new), pad)
        logprobs = torch.zeros(runs, sequences, new)
        mask = torch.zeros(runs, sequences, new, dtype=torch.bool)
        going = torch.ones(runs, sequences, dtype=torch.bool)
        for t in range(new):
            scores = scores - scores.amax(-1, keepdim=True)
            scores = scores / temperature if temperature != 1 else scores
            sums = scores.exp().cumsum(-1)
            total = sums[..., -1:]
            drawn = (sums <= noise[..., t : t + 1] * total).sum(-1).clamp_max(scores.shape[-1] - 1)
            chosen = (scores.gather(-1, drawn.unsqueeze(-1)) - total.log()).squeeze(-1)
            tokens[..., t] = torch.where(going, drawn, pad)
            logprobs[..., t] = torch.where(going, chosen, 0.0)
            mask[..., t] = going
            going = going & (drawn != end)
            if t + 1 == new or not going.any():
                break
            at = start + t
            x = self._embed(tokens[..., t : t + 1])
            turn = self._turn(torch.arange(at, at + 1))
            for layer, (keys, values) in enumerate(caches):
                q, k, v = self._project(layer, x, turn, fused)
                keys[at], values[at] = k.squeeze(2), v.squeeze(2)
                query = q.squeeze(2) / math.sqrt(q.shape[-1])
                weight = torch.linalg.vecdot(keys[: at + 1], query).softmax(0)
                mixed = (weight.unsqueeze(-1) * values[: at + 1]).sum(0)
                x = self._finish_layer(layer, x, mixed.unsqueeze(2), fused)
            scores = self._head(x[..., 0, :])
        return Rollout(tokens, logprobs, mask)

    def _fused(self) -> list[tuple[Tensor, Tensor]]:
        """For each layer the weights that read the same input, side by side."""
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
        size = self.weights["model.embed_tokens.weight"].shape[-1] // self.shape.heads
        angle = positions.unsqueeze(-1) * self.shape.theta ** (-torch.arange(0, size, 2) / size)
        return torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)

    def _project(
        self, layer: int, x: Tensor, turn: tuple[Tensor, Tensor], fused: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, `(runs * sequences, heads, time, size)`."""
        mixed = _product(self._norm(f"model.layers.{layer}.input_layernorm.weight", x), fused[layer][0])
        heads = mixed.view(-1, x.shape[2], 3 * self.shape.heads, mixed.shape[-1] // 3 // self.shape.heads).transpose(
            1, 2
        )
        both, v = heads[:, : 2 * self.shape.heads], heads[:, 2 * self.shape.heads :]
        first, second = both.chunk(2, -1)
        both = both * turn[0] + torch.cat([-second, first], -1) * turn[1]
        return both[:, : self.shape.heads], both[:, self.shape.heads :], v

    def _finish_layer(self, layer: int, x: Tensor, mixed: Tensor, fused: list[tuple[Tensor, Tensor]]) -> Tensor:
        prefix = f"model.layers.{layer}"
        x = x + _product(mixed.transpose(1, 2).reshape(x.shape), self.weights[f"{prefix}.self_attn.o_proj.weight"])
        h = _product(self._norm(f"{prefix}.post_attention_layernorm.weight", x), fused[layer][1])
        gate, up = h.chunk(2, -1)
        return x + _product(F.silu(gate) * up, self.weights[f"{prefix}.mlp.down_proj.weight"])

    def _head(self, x: Tensor) -> Tensor:
        return _product(self._norm("model.norm.weight", x), self.weights["lm_head.weight"])


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Each run's `x Wᵀ`."""
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    return torch.bmm(flat, weight.transpose(1, 2)).view(*x.shape[:-1], weight.shape[1])


class Adam:
    """Adam (arXiv:1412.6980) with a learning rate and a gradient norm for each run of a stack.

    Args:
        weights: The stack's, updated in place.
        rates: `(runs,)`.
        betas: Of the moments.
        max_norm: Gradients of a run are scaled down to this norm.
    """

    def __init__(
        self, weights: dict[str, Tensor], rates: Tensor, betas: tuple[float, float] = (0.9, 0.95), max_norm: float = 1.0
    ) -> None:
        self.weights, self.rates, self.betas, self.max_norm, self.steps = (
            list(weights.values()),
            rates,
            betas,
            max_norm,
            0,
        )
        self.moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in self.weights]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> Tensor:
        """One step; the norm of each run's gradient before clipping. A run with a gradient that is not finite stands still."""
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
