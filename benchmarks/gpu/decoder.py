"""Sampling from a Llama of `transformers` with a cache of fixed size, whose step is one CUDA graph."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CHECK = 8  # tokens between two looks at whether all rows have ended, for each of which the host waits


class Sample(NamedTuple):
    """Completions, one row each."""

    tokens: Tensor
    """`(rows, new)` int64, the padding token after the end."""
    logprobs: Tensor
    """Their log-probs under the sampler, float32, 0 after the end."""
    mask: Tensor
    """bool, True up to the token that ends the text."""


class Layer(NamedTuple):
    """Weights of one block, in the dtype of the sampler."""

    into: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    between: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


_NAMES = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


class Decoder:
    """A copy of the weights of a `LlamaForCausalLM`, and room for `rows` texts of `length` tokens."""

    def __init__(self, model: Any, rows: int, length: int, dtype: torch.dtype = torch.bfloat16) -> None:
        c = model.config
        if c.model_type != "llama" or getattr(c, "attention_bias", False) or getattr(c, "mlp_bias", False):
            raise ValueError(f"the sampler reads Llama models without biases, got model_type={c.model_type!r}")
        self.rows, self.length, self.device, self.dtype, self.eps = rows, length, model.device, dtype, c.rms_norm_eps
        self.heads, self.pairs = c.num_attention_heads, c.num_key_value_heads
        self.width = getattr(c, "head_dim", None) or c.hidden_size // self.heads
        self.copies = {name: p.detach().to(dtype).clone() for name, p in model.named_parameters()}
        w = self.copies
        self.layers = [
            Layer(*(w[f"model.layers.{i}.{name}.weight"] for name in _NAMES)) for i in range(c.num_hidden_layers)
        ]
        self.embedding, self.last = w["model.embed_tokens.weight"], w["model.norm.weight"]
        self.head = w.get("lm_head.weight", self.embedding)  # tied weights have one name
        shape = (len(self.layers), rows, self.pairs, length, self.width)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(2))
        # The inputs and the result of a step lie in fixed places, as a graph needs.
        self.hidden_places = torch.zeros(rows, 1, 1, length, dtype=dtype, device=self.device)
        self.token = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.place = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.position = torch.zeros(rows, 1, device=self.device)
        self.logits = torch.zeros(rows, c.vocab_size, device=self.device)
        rope = getattr(c, "rope_parameters", None) or {"rope_theta": c.rope_theta, "rope_type": "default"}
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"the sampler knows plain rotary positions, got {rope}")
        steps = torch.arange(0, self.width, 2, device=self.device, dtype=torch.float32)
        self.frequencies = rope["rope_theta"] ** (-steps / self.width)
        self.graph: Any = None

    def load(self, model: Any) -> None:
        """The weights that the model has now."""
        with torch.no_grad():
            torch._foreach_copy_(list(self.copies.values()), [p.detach() for p in model.parameters()])

    @torch.no_grad()
    def capture(self) -> bool:
        """Record the step as a CUDA graph; False where there is none, and each step is launched operation by operation."""
        if self.device.type != "cuda":
            return False
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.step()
                self.step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()
        except RuntimeError as error:
            print(f"the step of the sampler was not captured: {error}", flush=True)
            torch.cuda.synchronize()
            return False
        self.graph = graph
        return True

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(self.dtype)

    def step(self) -> None:
        """From `token` at `place` of the cache (at `position` of its own text) to `logits`."""
        angle = self.position * self.frequencies
        cosine, sine = (torch.cat([x, x], -1)[:, None].to(self.dtype) for x in (angle.cos(), angle.sin()))

        def turned(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cosine + torch.cat([-second, first], -1) * sine

        self.hidden_places.index_fill_(3, self.place, 0.0)
        x = F.embedding(self.token, self.embedding)
        for i, w in enumerate(self.layers):
            h = self._norm(x, w.into)
            q, k, v = (F.linear(h, m).view(self.rows, -1, self.width) for m in (w.q, w.k, w.v))
            self.keys[i].index_copy_(2, self.place, turned(k)[:, :, None])
            self.values[i].index_copy_(2, self.place, v[:, :, None])
            mixed = F.scaled_dot_product_attention(
                turned(q)[:, :, None], self.keys[i], self.values[i], attn_mask=self.hidden_places, enable_gqa=True
            )
            x = x + F.linear(mixed.reshape(self.rows, -1), w.o)
            h = self._norm(x, w.between)
            x = x + F.linear(F.silu(F.linear(h, w.gate)) * F.linear(h, w.up), w.down)
        self.logits.copy_(F.linear(self._norm(x, self.last), self.head))

    @torch.no_grad()
    def sample(self, model: Any, prompts: Tensor, attended: Tensor, group: int, new: int, eos: int, pad: int, seed: int) -> Sample:  # fmt: skip  # noqa: E501
        """`group` completions of at most `new` tokens for each left-padded prompt, at temperature 1.

        The model reads the prompts itself, once each. The decoder's weights must be the model's: `load` first.
        """
        width = prompts.shape[1]
        if len(prompts) * group != self.rows or width + new > self.length:
            raise ValueError(
                f"room for {self.rows} rows of {self.length}, got {len(prompts)} x {group} of {width + new}"
            )
        logits, position = self._read(model, prompts, attended, group)
        g = torch.Generator(device=self.device).manual_seed(seed)
        tokens = torch.full((self.rows, new), pad, dtype=torch.int64, device=self.device)
        logprobs = torch.zeros(self.rows, new, device=self.device)
        mask = torch.zeros(self.rows, new, dtype=torch.bool, device=self.device)
        alive = torch.ones(self.rows, dtype=torch.bool, device=self.device)
        for t in range(new):
            logp = logits.log_softmax(-1)
            # The largest p / e with e exponential is a draw from p.
            drawn = (logp.exp() / torch.empty_like(logp).exponential_(generator=g)).argmax(-1)
            tokens[:, t] = torch.where(alive, drawn, pad)
            logprobs[:, t] = torch.where(alive, logp.gather(1, drawn[:, None])[:, 0], 0.0)
            mask[:, t] = alive
            alive = alive & (drawn != eos)
            if t + 1 == new or (t % CHECK == CHECK - 1 and not bool(alive.any())):
                break
            self.token.copy_(drawn)
            self.place.fill_(width + t)
            self.position.copy_(position + 1 + t)
            if self.graph is None:
                self.step()
            else:
                self.graph.replay()
            logits = self.logits
        return Sample(tokens, logprobs, mask)

    def _read(self, model: Any, prompts: Tensor, attended: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Fill the cache with the prompts; the logits of the next token, and the position of the last, of each row."""
        width = prompts.shape[1]
        positions = (attended.cumsum(1) - 1).clamp_min(0)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            out = model(
                input_ids=prompts, attention_mask=attended, position_ids=positions, use_cache=True, logits_to_keep=1
            )
        self.hidden_places.fill_(-math.inf)
        seen = attended.repeat_interleave(group, 0, output_size=self.rows) != 0
        self.hidden_places[:, 0, 0, :width] = torch.where(seen, 0.0, -math.inf).to(self.dtype)
        for i, layer in enumerate(out.past_key_values.layers):
            self.keys[i, :, :, :width] = layer.keys.repeat_interleave(group, 0)
            self.values[i, :, :, :width] = layer.values.repeat_interleave(group, 0)
        logits = out.logits[:, -1].float().repeat_interleave(group, 0)
        return logits, positions[:, -1:].repeat_interleave(group, 0)
