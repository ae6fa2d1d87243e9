"""Packed forward passes in TRL, for models that are known and measured to keep packed sequences apart."""

import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from bandpo.integrations.trl.apart import Apart, refuse_mask, sequences_apart
from bandpo.integrations.trl.host import GRPOHost, split
from bandpo.selection.packing import PackedBatch, mixes_sequences, pack_rows, packing_error

# Layers that attend within the mask that transformers makes from the positions, and feed-forward layers. Layers of any other
# kind (linear or compressed attention, convolutions, recurrences, new kinds) may carry a state from one sequence to the next.
_APART = {"full_attention", "sliding_attention", "chunked_attention", "mlp", "moe"}
_WINDOWS = ("sliding_window", "attention_chunk_size")
_PROBE_WINDOW = 8
_PROBE_TEXT = "Packed rows hold several texts: 12 + 30 = 42, and none of them may see another one (that is the point)."
_FLOAT_BYTES = 4  # eager attention adds a mask of numbers
_REMEDY = "Switch packing off for this model"


def refuse_packing(model: Any, *, router_loss: bool) -> None:
    """Refuse a model that packing would make wrong, as far as its configuration tells.

    Args:
        model: A causal LM of transformers, or of PEFT.
        router_loss: Whether an auxiliary loss of a mixture of experts is trained on.

    Raises:
        ValueError: If packing would be wrong; the message has the reason and a remedy.
    """
    config = model.config.get_text_config()
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ("eager", "sdpa") and not _is_flash(config):
        raise ValueError(
            f"packing: nothing is known of attn_implementation={attention!r}; use sdpa, eager or a flash attention, or switch "
            "packing off"
        )
    kinds = {k for name in ("layer_types", "layers_block_type") for k in getattr(config, name, None) or ()}
    if unknown := sorted(str(k) for k in kinds - _APART):
        raise ValueError(
            f"packing: {type(model).__name__} has layers of the kind {', '.join(unknown)}, which may carry one sequence into "
            f"the next. {_REMEDY}"
        )
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(f"packing: the adapter puts tokens of its own before each row, not each sequence. {_REMEDY}")
    if router_loss:
        raise ValueError(
            f"packing: the router loss of {type(model).__name__} is not computed on packed rows; set router_aux_loss_coef=0, "
            "or switch packing off"
        )


def probe_packing(model: Any, tokenizer: Any, device: torch.device) -> None:
    """Run a few short sequences packed and alone, with windows of attention shorter than the model's, and compare.

    Args:
        model: A causal LM that `refuse_packing` accepts.
        tokenizer: The tokenizer of the model.
        device: Device of the model's inputs.

    Raises:
        ValueError: If the model mixes them.
    """
    config = model.config.get_text_config()
    tokens = torch.tensor(tokenizer(_PROBE_TEXT, add_special_tokens=False)["input_ids"], device=device)

    def alone(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits

    def together(packed: PackedBatch) -> Tensor:
        layout = Layout(packed, config)
        return layout.rows(layout.forward(model).logits)

    was_training = model.training
    model.eval()
    try:
        with _short_windows(config):
            error, limit = packing_error(alone, together, tokens)
    finally:
        model.train(was_training)
    if not error <= limit:
        raise ValueError(mixes_sequences(type(model).__name__, error, limit))


@contextmanager
def _short_windows(config: Any) -> Generator[None, None, None]:
    """Windows of attention that a few tokens exceed. A model makes its masks from the configuration at each call."""
    saved = {name: value for name in _WINDOWS if (value := getattr(config, name, None))}
    try:
        for name, value in saved.items():
            setattr(config, name, min(value, _PROBE_WINDOW))
        yield
    finally:
        for name, value in saved.items():
            setattr(config, name, value)


def _is_flash(config: Any) -> bool:
    """Whether attention is a flash attention, also one of a kernel repository such as kernels-community/flash-attn2."""
    name = getattr(config, "_attn_implementation", None) or ""
    return "flash" in name and not name.startswith("paged")


class Layout:
    """How a packed batch is given to a model: as rows, or as one row of all sequences without gaps.

    Flash attention gets one row with the borders of the sequences. SDPA gets one row too, and attends to each sequence by
    itself (`bandpo.integrations.trl.apart`), so that it needs no mask. Eager attention gets rows and the positions, from which
    transformers makes a mask of `bins x width x width`.

    Args:
        packed: The packed batch.
        config: Configuration of the model.
        limit: Largest mask in bytes.

    Raises:
        ValueError: If the mask would be larger.
    """

    def __init__(self, packed: PackedBatch, config: Any, limit: float = math.inf) -> None:
        self.packed = packed
        self._apart: Apart | None = None
        self._flash = _is_flash(config)
        lengths = cast("list[int]", packed.mask.sum(1).tolist())
        if self._flash:
            self._places = (packed.sequence_ids >= 0).flatten().nonzero().squeeze(1)
        elif config._attn_implementation == "sdpa":
            order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
            parts = cast("tuple[Tensor, ...]", packed.places.split(lengths))
            self._places = torch.cat([parts[i] for i in order])
            self._apart = Apart(tuple(lengths[i] for i in order), limit)
        else:
            self._places = None
            bins, width = packed.input_ids.shape
            refuse_mask(bins, width, _FLOAT_BYTES, limit, f"{bins} rows of {width} tokens")

    def put(self, values: Tensor) -> Tensor:
        """Packed values in the layout of the model.

        Args:
            values: `(bins, width)`.
        """
        return values if self._places is None else values.reshape(-1)[self._places].unsqueeze(0)

    def rows(self, values: Tensor) -> Tensor:
        """Values of the model's tokens in the packed layout, `(bins, width, ...)`.

        Args:
            values: `(rows, tokens, ...)` in the layout of the model.
        """
        if self._places is None:
            return values
        out = values.new_zeros(self.packed.input_ids.numel(), *values.shape[2:])
        return out.index_copy(0, self._places, values[0]).view(*self.packed.input_ids.shape, *values.shape[2:])

    def inputs(self) -> dict[str, Any]:
        """The arguments of the forward pass."""
        inputs = {"input_ids": self.put(self.packed.input_ids), "position_ids": self.put(self.packed.position_ids)}
        borders = self.packed.varlen() if self._flash else {}
        return {**inputs, **borders, "attention_mask": None, "use_cache": False}

    def forward(self, model: Any, **options: Any) -> Any:
        """The output of the model.

        Args:
            model: The model.
            **options: Further arguments of its forward pass.
        """
        with sequences_apart(self._apart):
            return model(**self.inputs(), **options)


def packed_scores(
    trainer: GRPOHost,
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
    batch_size: int | None,
    compute_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies of completions by packed forward passes, as in TRL's `_get_per_token_logps_and_entropies`.

    Args:
        trainer: The trainer.
        model: The policy to score with.
        input_ids: Prompts and completions, `(batch, width)`.
        attention_mask: 1 for tokens and 0 for padding, `(batch, width)`.
        logits_to_keep: Width of the completions.
        batch_size: Sequences of one forward pass; None for all.
        compute_entropy: Whether to compute entropies.

    Returns:
        Log-probs and entropies, `(batch, logits_to_keep)`; None in place of entropies that are not computed.
    """
    logps: list[Tensor] = []
    entropies: list[Tensor] = []
    densities: list[float] = []
    config = model.config.get_text_config()
    at_once = batch_size or len(input_ids)
    for ids, attention in zip(split(input_ids, at_once), split(attention_mask, at_once), strict=True):
        packed = _pack(trainer, ids, attention)
        counted = attention.new_zeros(attention.shape).to(torch.bool)
        counted[:, -logits_to_keep:] = attention[:, -logits_to_keep:] != 0
        labels = packed.pack(ids.masked_fill(~counted, -100), -100)
        labels[packed.position_ids == 0] = -100  # the first token of a sequence follows nothing
        layout = Layout(packed, config, _mask_limit(trainer))
        with trainer.accelerator.autocast():
            out = layout.forward(model, labels=layout.put(labels), fused_lm_head=True)
        # The model returns the value of the next token at each place; shifted by one, each token has its own value.
        logps.append(packed.unpack(layout.rows(pad(out.log_probs, (1, 0))))[:, -logits_to_keep:])
        if compute_entropy:
            entropies.append(packed.unpack(layout.rows(pad(out.entropy, (1, 0))))[:, -logits_to_keep:])
        densities.append(float(attention.sum()) / packed.input_ids.numel())
    _log_density(trainer, densities, attention_mask)
    return torch.cat(logps), torch.cat(entropies) if compute_entropy else None


def packed_logits(
    trainer: GRPOHost, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int
) -> tuple[Tensor, Tensor]:
    """Logits of the completions' tokens by one packed forward pass, with gradient.

    Args:
        trainer: The trainer.
        model: The policy to score with.
        input_ids: Prompts and completions, `(batch, width)`.
        attention_mask: 1 for tokens and 0 for padding, `(batch, width)`.
        logits_to_keep: Width of the completions.

    Returns:
        The logits that each token was drawn from, `(tokens, vocabulary)`, and the places of these tokens,
        `(batch, logits_to_keep)`, bool. The first token of a sequence follows nothing and has none.
    """
    config = model.config.get_text_config()
    packed = _pack(trainer, input_ids, attention_mask)
    with trainer.accelerator.autocast():
        layout = Layout(packed, config, _mask_limit(trainer))
        logits = layout.rows(layout.forward(model).logits).flatten(0, 1)
    at = torch.zeros_like(input_ids)
    at[packed.mask] = packed.places
    real = attention_mask != 0
    counted = (real & (real.cumsum(1) > 1))[:, -logits_to_keep:]
    _log_density(trainer, [float(attention_mask.sum()) / packed.input_ids.numel()], attention_mask)
    return logits[at[:, -logits_to_keep:][counted] - 1], counted


def _pack(trainer: GRPOHost, input_ids: Tensor, attention_mask: Tensor) -> PackedBatch:
    capacity = trainer.args.packing_tokens or 4 * input_ids.shape[1]
    longest = int(attention_mask.sum(1).max())
    return pack_rows(input_ids, attention_mask, capacity=max(capacity, longest), window=trainer.args.packing_window)


def _mask_limit(trainer: GRPOHost) -> float:
    return trainer.args.packing_mask_gib * 2**30


def _log_density(trainer: GRPOHost, densities: list[float], attention_mask: Tensor) -> None:
    log = trainer.current_log
    log["packing/density"].append(sum(densities) / len(densities))
    log["packing/padded_density"].append(float(attention_mask.float().mean()))
