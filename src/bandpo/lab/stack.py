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

_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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
        x = self._embed(ids)
        turn = self._turn(torch.arange(ids.shape[-1]))
        for layer in range(self.shape.layers):
            q, k, v = self._project(layer, x, turn)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = self._finish_layer(layer, x, mixed)
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
    def sample(self, prompts: Tensor, noise: Tensor, *, end: int, pad: int, temperature: float = 1.0) -> Rollout:
        """Completions drawn by inverting the distribution function at `noise`.

        Args:
            prompts: `(runs, sequences, time)`, all of one length.
            noise: `(runs, sequences, new)`, uniform in [0, 1): the same noise gives the same completions.
            end: Token that ends a completion.
            pad: Token after it.
            temperature: Of sampling; the log-probs are those at this temperature.
        """
        runs, sequences, start = prompts.shape
        new = noise.shape[-1]
        width = self.weights["model.embed_tokens.weight"].shape[-1]
        size = (runs * sequences, self.shape.heads, start + new, width // self.shape.heads)
        caches = [(torch.empty(size), torch.empty(size)) for _ in range(self.shape.layers)]
        tokens = torch.full((runs, sequences, new), pad)
        logprobs = torch.zeros(runs, sequences, new)
        mask = torch.zeros(runs, sequences, new, dtype=torch.bool)
        going = torch.ones(runs, sequences, dtype=torch.bool)
        ids, seen = prompts, 0
        for t in range(new):
            x = self._embed(ids)
            turn = self._turn(torch.arange(seen, seen + ids.shape[-1]))
            for layer, (keys, values) in enumerate(caches):
                q, k, v = self._project(layer, x, turn)
                keys[:, :, seen : seen + ids.shape[-1]], values[:, :, seen : seen + ids.shape[-1]] = k, v
                now = seen + ids.shape[-1]
                mixed = F.scaled_dot_product_attention(q, keys[:, :, :now], values[:, :, :now], is_causal=t == 0)
                x = self._finish_layer(layer, x, mixed)
            seen += ids.shape[-1]
            scores = (self._head(x[..., -1, :]) / temperature).log_softmax(-1)
            below = scores.exp().cumsum(-1) <= noise[..., t : t + 1]
            drawn = below.sum(-1).clamp_max(scores.shape[-1] - 1)  # rounding may leave the sum below 1
            tokens[..., t] = torch.where(going, drawn, pad)
            logprobs[..., t] = scores.gather(-1, drawn.unsqueeze(-1)).squeeze(-1).where(going, 0.0)
            mask[..., t] = going
            going = going & (drawn != end)
            if not going.any():
                break
            ids = tokens[..., t : t + 1]
        return Rollout(tokens, logprobs, mask)

    def _embed(self, ids: Tensor) -> Tensor:
        table = self.weights["model.embed_tokens.weight"]
        runs, rows, width = table.shape
        offset = (torch.arange(runs) * rows).view(-1, *([1] * (ids.dim() - 1)))
        return F.embedding(ids + offset, table.reshape(runs * rows, width))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[name]
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        return torch.bmm(flat, weight.transpose(1, 2)).view(*x.shape[:-1], weight.shape[1])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        scale = self.weights[name]
        scale = scale.view(scale.shape[0], *([1] * (x.dim() - 2)), -1)
        return x * (x.square().mean(-1, keepdim=True) + self.shape.epsilon).rsqrt() * scale

    def _turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        size = self.weights["model.embed_tokens.weight"].shape[-1] // self.shape.heads
        angle = positions.unsqueeze(-1) * self.shape.theta ** (-torch.arange(0, size, 2) / size)
        return torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)

    def _project(self, layer: int, x: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        prefix = f"model.layers.{layer}"
        h = self._norm(f"{prefix}.input_layernorm.weight", x)

        def split(name: str) -> Tensor:  # (runs * sequences, heads, time, size)
            y = self._linear(f"{prefix}.self_attn.{name}.weight", h)
            return y.view(-1, x.shape[2], self.shape.heads, y.shape[-1] // self.shape.heads).transpose(1, 2)

        def rotate(y: Tensor) -> Tensor:
            first, second = y.chunk(2, -1)
            return y * turn[0] + torch.cat([-second, first], -1) * turn[1]

        return rotate(split("q_proj")), rotate(split("k_proj")), split("v_proj")

    def _finish_layer(self, layer: int, x: Tensor, mixed: Tensor) -> Tensor:
        prefix = f"model.layers.{layer}"
        x = x + self._linear(f"{prefix}.self_attn.o_proj.weight", mixed.transpose(1, 2).reshape(x.shape))
        h = self._norm(f"{prefix}.post_attention_layernorm.weight", x)
        gate = F.silu(self._linear(f"{prefix}.mlp.gate_proj.weight", h))
        return x + self._linear(
            f"{prefix}.mlp.down_proj.weight", gate * self._linear(f"{prefix}.mlp.up_proj.weight", h)
        )

    def _head(self, x: Tensor) -> Tensor:
        return self._linear("lm_head.weight", self._norm("model.norm.weight", x))


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
