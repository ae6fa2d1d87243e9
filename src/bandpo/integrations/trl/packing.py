"""Packed forward passes in TRL, for models that are known and measured to keep packed sequences apart."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bandpo.integrations.trl.host import GRPOHost, split
from bandpo.selection.packing import PackedBatch, mixes_sequences, pack_rows, packing_error

# Layers that attend within the mask that transformers makes from the positions, and feed-forward layers. Layers of any other
# kind (linear or compressed attention, convolutions, recurrences, new kinds) may carry a state from one sequence to the next.
_APART = {"full_attention", "sliding_attention", "chunked_attention", "mlp", "moe"}
_WINDOWS = ("sliding_window", "attention_chunk_size")
_PROBE_WINDOW = 8
_PROBE_TEXT = "Packed rows hold several texts: 12 + 30 = 42, and none of them may see another one (that is the point)."
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
        return _rows(model(**_inputs(packed, config)).logits, packed)

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


def _inputs(packed: PackedBatch, config: Any) -> dict[str, Any]:
    """Arguments of a packed forward pass. Flash attention takes all rows as one row, with the borders of the sequences."""
    inputs: dict[str, Any] = {"input_ids": packed.input_ids, "position_ids": packed.position_ids}
    if _is_flash(config):
        inputs = {name: packed.flat(x) for name, x in inputs.items()} | packed.varlen()
    return {**inputs, "attention_mask": None, "use_cache": False}


def _rows(values: Tensor, packed: PackedBatch) -> Tensor:
    """Values of the model's tokens `(rows, tokens, ...)` in the packed layout, `(bins, width, ...)`."""
    if values.shape[:2] == packed.input_ids.shape:
        return values
    out = values.new_zeros(*packed.input_ids.shape, *values.shape[2:])
    out[packed.sequence_ids >= 0] = values[0]
    return out


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
        labels = packed.flat(labels) if _is_flash(config) else labels
        with trainer.accelerator.autocast():
            out = model(**_inputs(packed, config), labels=labels, fused_lm_head=True)
        # The model returns the value of the next token at each place; shifted by one, each token has its own value.
        logps.append(packed.unpack(_rows(pad(out.log_probs, (1, 0)), packed))[:, -logits_to_keep:])
        if compute_entropy:
            entropies.append(packed.unpack(_rows(pad(out.entropy, (1, 0)), packed))[:, -logits_to_keep:])
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
        out = model(**_inputs(packed, config))
    logits = _rows(out.logits, packed).flatten(0, 1)
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


def _log_density(trainer: GRPOHost, densities: list[float], attention_mask: Tensor) -> None:
    log = trainer.current_log
    log["packing/density"].append(sum(densities) / len(densities))
    log["packing/padded_density"].append(float(attention_mask.float().mean()))
