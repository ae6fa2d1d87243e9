"""Many models at once: weights stacked along a first dimension, one forward pass for all of them.

The lab trains dozens of runs (methods x seeds) of a tiny model. For a single run, a step is mostly overhead; for a stack of
runs, every matrix product is a batched one. On the CPU, a large stack is processed in parts whose activations fit its cache.
With a multiple of 32 sequences a run, as in every preset, that changes no bit, else the last one at most. Weights and log-probs
are those of transformers' Llama, Mistral, Qwen2 and Qwen3, also with grouped heads, a tied LM head, biases and prompts that are
padded (tests/lab/test_stack.py and test_architectures.py).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from bandpo.lab.comparison.architecture import Shape, model_state, shape_of, weights_of
from bandpo.lab.comparison.decoding import Cache, FixedStep, GrowingStep, Place

_PART = 1 << 17
"""Elements of one activation, `runs * rows * width`, up to which runs are processed together: half a megabyte."""

_LARGE_PART = 1 << 28
"""The same on other devices than the CPU, with the width or the vocabulary, whichever is larger: a gigabyte."""

_CHECK_EVERY = 8
"""Tokens after which the host asks another device whether all completions have ended, and waits for the answer."""


class Joined(NamedTuple):
    """The weights of a layer that read the same input, joined into one matrix.

    Args:
        attention: `(runs, (heads + 2 key heads) * size, width)`, projections to queries, keys and values.
        mlp: `(runs, 2 * inner width, width)`, the two projections into the MLP.
        attention_bias: `(runs, (heads + 2 key heads) * size)`, or None.
        mlp_bias: `(runs, 2 * inner width)`, or None.
        scale: `(runs, heads + key heads, size)`, scales of the norms of queries and keys, or None.
    """

    attention: Tensor
    mlp: Tensor
    attention_bias: Tensor | None = None
    mlp_bias: Tensor | None = None
    scale: Tensor | None = None


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
    def load(cls, models: Sequence[Any], device: torch.device | None = None) -> "Stack":
        """A stack with one run for each model.

        Args:
            models: Causal models of transformers of one architecture, of a type in `FAMILIES`; the same one may come twice.
            device: Device of the stack; None keeps that of the models.

        Raises:
            ValueError: If the stack does not have the architecture, or the models do not share it.
        """
        shape = shape_of(models)
        return cls(weights_of(models, device), shape)

    def write(self, run: int, model: Any) -> None:
        """Copy one run's weights into a model.

        Args:
            run: Number of the run.
            model: A model of the stack's architecture, on any device.
        """
        model.load_state_dict(model_state(self.weights, run, model))

    @property
    def runs(self) -> int:
        """The number of models."""
        return next(iter(self.weights.values())).shape[0]

    @property
    def width(self) -> int:
        """The width of the models."""
        return self._table.shape[-1]

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._table.device

    @property
    def _table(self) -> Tensor:
        """The embedding, `(runs, vocabulary, width)`."""
        return self.weights["model.embed_tokens.weight"]

    def parts(self, rows: int) -> list[slice]:
        """Consecutive runs that are best processed together.

        Args:
            rows: Tokens of each run that are in one forward pass: sequences, times tokens of a sequence.

        Returns:
            Slices of the runs, in order.
        """
        room, each = (_PART, self.width) if self.device.type == "cpu" else (_LARGE_PART, max(self._table.shape[1:]))
        size = max(1, room // max(1, rows * each))
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

    def select(self, runs: Sequence[int]) -> "Stack":
        """A stack with copies of some of the runs' weights, without gradient.

        Args:
            runs: Numbers of the runs; one may come twice.
        """
        return Stack({name: torch.stack([w.detach()[i] for i in runs]) for name, w in self.weights.items()}, self.shape)

    def logits(self, ids: Tensor, keep: int, mask: Tensor | None = None) -> Tensor:
        """Logits after each of the last `keep` positions.

        Args:
            ids: `(runs, sequences, time)` tokens.
            keep: Number of positions.
            mask: `(runs, sequences, time)`, bool: False at padding, to which nothing attends and which has no position; the
                logits after it mean nothing. None without padding.

        Returns:
            `(runs, sequences, keep, vocabulary)`, with gradient.
        """
        x, joined = self._embed(ids), self._joined()
        positions, attends = _places(ids, mask)
        turn = _turn(self._speed(ids.device), positions, x.dtype)
        for layer in range(self.shape.layers):
            q, k, v = self._project(layer, x, turn, joined)
            x = self._finish_layer(layer, x, self._attend(q, k, v, attends), joined)
        return self._head(x[..., -keep:, :])

    def logprobs(
        self, prompts: Tensor, completions: Tensor, temperature: float = 1.0, prompt_mask: Tensor | None = None
    ) -> Tensor:
        """Log-probs of completions.

        Args:
            prompts: `(runs, sequences, prompt time)` tokens.
            completions: `(runs, sequences, time)` tokens.
            temperature: Temperature of the policy.
            prompt_mask: `(runs, sequences, prompt time)`, bool: False at padding; None without.

        Returns:
            `(runs, sequences, time)`, with gradient.
        """
        scores = self.distributions(prompts, completions, temperature, prompt_mask)
        return scores.gather(-1, completions.unsqueeze(-1)).squeeze(-1)

    def distributions(
        self, prompts: Tensor, completions: Tensor, temperature: float = 1.0, prompt_mask: Tensor | None = None
    ) -> Tensor:
        """Log-probs of every token of the vocabulary at each place of completions.

        Args:
            prompts: `(runs, sequences, prompt time)` tokens.
            completions: `(runs, sequences, time)` tokens.
            temperature: Temperature of the policy.
            prompt_mask: `(runs, sequences, prompt time)`, bool: False at padding; None without.

        Returns:
            `(runs, sequences, time, vocabulary)`, with gradient.
        """
        ids = torch.cat([prompts, completions], -1)[..., :-1]
        mask = None
        if prompt_mask is not None:
            _check_prompt_mask(prompt_mask)
            mask = torch.cat([prompt_mask, torch.ones_like(completions, dtype=torch.bool)], -1)[..., :-1]
        logits = self.logits(ids, completions.shape[-1], mask)
        return (logits if temperature == 1 else logits / temperature).log_softmax(-1)

    @torch.no_grad()
    def sample(
        self,
        prompts: Tensor,
        noise: Tensor,
        *,
        end: int,
        pad: int,
        repeats: int = 1,
        temperature: float = 1.0,
        prompt_mask: Tensor | None = None,
        fixed: bool = False,
    ) -> Rollout:
        """Completions drawn by inverting the distribution function at `noise`.

        Args:
            prompts: `(runs, prompts, time)`; each is read once, whatever `repeats`.
            noise: `(runs, prompts * repeats, new)`, uniform in [0, 1): the same noise gives the same completions.
            end: Token that ends a completion.
            pad: Token that fills the places after the end.
            repeats: Completions of each prompt, consecutive.
            temperature: Sampling temperature; the log-probs are those at this temperature.
            prompt_mask: `(runs, prompts, time)`, bool: False at padding, which is on the left; None without.
            fixed: Whether every new token is computed with the same shapes and addresses, on a CUDA card by a CUDA graph. The
                log-probs differ by rounding.

        Returns:
            Tokens, log-probs and mask, `(runs, prompts * repeats, new)` each.
        """
        parts = self.parts(noise.shape[1])
        if len(parts) > 1:
            made = [
                self.part(part).sample(
                    prompts[part],
                    noise[part],
                    end=end,
                    pad=pad,
                    repeats=repeats,
                    temperature=temperature,
                    prompt_mask=None if prompt_mask is None else prompt_mask[part],
                    fixed=fixed,
                )
                for part in parts
            ]
            return Rollout(*(torch.cat(x) for x in zip(*made, strict=True)))
        if prompt_mask is not None:
            _check_prompt_mask(prompt_mask)
        every = 1 if self.device.type == "cpu" else _CHECK_EVERY
        new = noise.shape[2]
        scores, step = self._read_prompts(prompts, repeats, new, prompt_mask, fixed)
        tokens = torch.full(noise.shape, pad, device=noise.device)
        logprobs = torch.zeros(noise.shape, dtype=scores.dtype, device=noise.device)
        mask = torch.zeros(noise.shape, dtype=torch.bool, device=noise.device)
        going = torch.ones(noise.shape[:2], dtype=torch.bool, device=noise.device)
        for t in range(new):
            drawn, chosen = _draw(scores, noise[..., t : t + 1], temperature)
            tokens[..., t] = torch.where(going, drawn, pad)
            logprobs[..., t] = torch.where(going, chosen, 0.0)
            mask[..., t] = going
            going = going & (drawn != end)
            if t + 1 == new or (t % every == every - 1 and not going.any()):
                break
            scores = step(tokens[..., t : t + 1])
        return Rollout(tokens, logprobs, mask)

    def _read_prompts(
        self, prompts: Tensor, repeats: int, new: int, mask: Tensor | None, fixed: bool
    ) -> tuple[Tensor, GrowingStep | FixedStep]:
        """Logits after the prompts, and the step that computes those after each of `new` more tokens."""
        caches: list[Cache] = []
        x, joined = self._embed(prompts), self._joined()
        positions, attends = _places(prompts, mask)
        speed = self._speed(prompts.device)
        turn = _turn(speed, positions, x.dtype)
        hidden = None if mask is None else ~mask.flatten(0, 1)
        groups = self.shape.heads // self._key_heads
        for layer in range(self.shape.layers):
            q, k, v = self._project(layer, x, turn, joined)
            x = self._finish_layer(layer, x, self._attend(q, k, v, attends), joined)
            caches.append(Cache(k, v, x.shape[:2], repeats, new, groups=groups, hidden=hidden, fixed=fixed))

        def forward(tokens: Tensor, positions: Tensor, at: Place) -> Tensor:
            return self._next_scores(tokens, _turn(speed, positions, x.dtype), at, caches, joined)

        start = prompts.shape[-1]
        after = positions[..., -1:] + 1 if mask is None else positions[..., -1:].repeat_interleave(repeats, 1) + 1
        first = prompts[..., -1:].repeat_interleave(repeats, 1)
        step = FixedStep(forward, start, after, first) if fixed else GrowingStep(forward, start, after)
        return self._head(x[..., -1, :]).repeat_interleave(repeats, 1), step

    def _next_scores(
        self, tokens: Tensor, turn: tuple[Tensor, Tensor], at: Place, caches: list[Cache], joined: list[Joined]
    ) -> Tensor:
        """Logits after the tokens `(runs, sequences, 1)`, whose keys and values are added to the caches at a place."""
        x = self._embed(tokens)
        for layer, cache in enumerate(caches):
            q, k, v = self._project(layer, x, turn, joined)
            x = self._finish_layer(layer, x, cache.attend(at, q, k, v), joined)
        return self._head(x[..., 0, :])

    @property
    def _key_heads(self) -> int:
        return self.shape.key_heads or self.shape.heads

    @property
    def _size(self) -> int:
        """The size of a head."""
        return self.shape.size or self.width // self.shape.heads

    def _joined(self) -> list[Joined]:
        """The weights that read the same input, joined into one matrix, for each layer."""
        return [self._join(f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp") for i in range(self.shape.layers)]

    def _join(self, attention: str, mlp: str) -> Joined:
        w = self.weights
        queries = torch.cat([w[f"{attention}.{n}_proj.weight"] for n in "qkv"], 1)
        inner = torch.cat([w[f"{mlp}.{n}_proj.weight"] for n in ("gate", "up")], 1)
        attention_bias = mlp_bias = scale = None
        if f"{attention}.q_proj.bias" in w:
            attention_bias = torch.cat([w[f"{attention}.{n}_proj.bias"] for n in "qkv"], 1)
        if f"{mlp}.gate_proj.bias" in w:
            mlp_bias = torch.cat([w[f"{mlp}.{n}_proj.bias"] for n in ("gate", "up")], 1)
        if f"{attention}.q_norm.weight" in w:
            counts = {"q": self.shape.heads, "k": self._key_heads}
            scale = torch.cat(
                [w[f"{attention}.{n}_norm.weight"].unsqueeze(1).expand(-1, count, -1) for n, count in counts.items()], 1
            )
        return Joined(queries, inner, attention_bias, mlp_bias, scale)

    def _embed(self, ids: Tensor) -> Tensor:
        table = self._table
        runs, rows, width = table.shape
        offset = (torch.arange(runs, device=ids.device) * rows).view(-1, *([1] * (ids.dim() - 1)))
        return F.embedding(ids + offset, table.reshape(runs * rows, width))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        scale = self.weights[name]
        return F.rms_norm(x, x.shape[-1:], eps=self.shape.epsilon) * _per_run(scale, x)

    def _speed(self, device: torch.device) -> Tensor:
        """The angle of each pair of channels from one position to the next, `(size / 2,)` float32."""
        if self.shape.frequencies is not None:
            return torch.tensor(self.shape.frequencies, device=device)
        return self.shape.theta ** (-torch.arange(0, self._size, 2, device=device) / self._size)

    def _project(
        self, layer: int, x: Tensor, turn: tuple[Tensor, Tensor], joined: list[Joined]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `(runs * sequences, heads, time, size)`, and keys and values, which may have fewer heads."""
        given, count, keys = joined[layer], self.shape.heads, self._key_heads
        mixed = _product(self._norm(f"model.layers.{layer}.input_layernorm.weight", x), given.attention)
        if given.attention_bias is not None:
            mixed = mixed + _per_run(given.attention_bias, mixed)
        heads = mixed.view(-1, x.shape[2], count + 2 * keys, self._size).transpose(1, 2)
        both, v = cast(
            "tuple[Tensor, Tensor]", heads.split([count + keys, keys], 1)
        )  # the gradient of a split is one concatenation
        if given.scale is not None:
            normal = F.rms_norm(both, both.shape[-1:], eps=self.shape.epsilon)
            by_run = normal.reshape(len(given.scale), -1, *both.shape[1:])
            both = (by_run * given.scale.unsqueeze(1).unsqueeze(3)).view(both.shape)
        first, second = cast("tuple[Tensor, Tensor]", both.chunk(2, -1))
        turned = both * turn[0] + torch.cat([second, first], -1) * turn[1]
        q, k = cast("tuple[Tensor, Tensor]", turned.split([count, keys], 1))
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attends: Tensor | None) -> Tensor:
        """Causal attention of whole sequences; `attends` says which tokens may see which, where some are padding."""
        grouped = q.shape[1] != k.shape[1]
        if attends is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attends, enable_gqa=grouped)

    def _finish_layer(self, layer: int, x: Tensor, mixed: Tensor, joined: list[Joined]) -> Tensor:
        prefix, given = f"model.layers.{layer}", joined[layer]
        x = x + self._linear(f"{prefix}.self_attn.o_proj", mixed.transpose(1, 2).reshape(*x.shape[:-1], -1))
        h = _product(self._norm(f"{prefix}.post_attention_layernorm.weight", x), given.mlp)
        if given.mlp_bias is not None:
            h = h + _per_run(given.mlp_bias, h)
        gate, up = h.chunk(2, -1)
        return x + self._linear(f"{prefix}.mlp.down_proj", F.silu(gate) * up)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        made, bias = _product(x, self.weights[f"{name}.weight"]), self.weights.get(f"{name}.bias")
        return made if bias is None else made + _per_run(bias, made)

    def _head(self, x: Tensor) -> Tensor:
        """Logits, in float32 where the weights have less."""
        head = self.weights.get("lm_head.weight", self._table)
        logits = _product(self._norm("model.norm.weight", x), head)
        return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _draw(scores: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The tokens that `noise` picks from the softmax of logits `(..., vocabulary)`, and their log-probs."""
    scores = scores - scores.amax(-1, keepdim=True)
    scores = scores / temperature if temperature != 1 else scores
    sums = scores.exp().cumsum(-1)
    total = sums[..., -1:]
    drawn = (sums <= noise * total).sum(-1).clamp_max(scores.shape[-1] - 1)
    return drawn, (scores.gather(-1, drawn.unsqueeze(-1)) - total.log()).squeeze(-1)


def _per_run(vector: Tensor, x: Tensor) -> Tensor:
    """Vectors `(runs, width)` in the shape that multiplies or adds to `(runs, ..., width)`."""
    return vector.view(len(vector), *([1] * (x.dim() - 2)), -1)


def _places(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Positions of tokens `(runs, sequences, time)`, and which tokens may attend to which; None stands for causal attention.

    With a mask, padding has no position. It attends to itself alone: a softmax over nothing would be NaN.
    """
    time = ids.shape[-1]
    if mask is None:
        return torch.arange(time, device=ids.device), None
    causal = torch.ones(time, time, dtype=torch.bool, device=ids.device).tril()
    itself = torch.eye(time, dtype=torch.bool, device=ids.device)
    return (mask.cumsum(-1) - 1).clamp_min(0), (causal & mask.flatten(0, 1).unsqueeze(1) | itself).unsqueeze(1)


def _turn(speed: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of the rotary embedding, computed in float32 as transformers does.

    They have shape `(time, size)` for positions `(time,)`, and `(runs * sequences, 1, time, size)` for positions
    `(runs, sequences, time)`.
    """
    angle = positions.unsqueeze(-1) * speed
    if angle.dim() > 2:
        angle = angle.flatten(0, 1).unsqueeze(1)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos] * 2, -1), torch.cat([-sin, sin], -1)


def _check_prompt_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"prompt_mask: a bool tensor is required, got {mask.dtype}")
    if not mask[..., -1].all():
        raise ValueError("prompt_mask: the last token of every prompt must be a real one; pad prompts on the left")


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

    Raises:
        ValueError: If a weight has less than float32, in which a small update would be rounded away.
    """

    def __init__(
        self, weights: dict[str, Tensor], rates: Tensor, betas: tuple[float, float] = (0.9, 0.95), max_norm: float = 1.0
    ) -> None:
        for name, w in weights.items():
            if w.dtype in (torch.bfloat16, torch.float16):
                raise ValueError(
                    f"Adam updates weights of float32 or float64 in place, but {name} is {w.dtype}; use .float()"
                )
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
