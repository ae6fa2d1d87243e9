"""Which transformers models the stack can hold, and the constants that their weights alone do not give."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types of transformers whose forward pass the stack has."""

_ROPES = ("default", "linear", "llama3")  # frequencies that do not depend on the length, and no factor on the attention
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Shape(NamedTuple):
    """The constants of the architecture that the weights alone do not give.

    Args:
        layers: Number of layers.
        heads: Number of attention heads.
        epsilon: Constant of the RMS norms.
        theta: Base of the rotary position embedding.
        key_heads: Number of heads of keys and values, a divisor of `heads`; None means `heads`.
        size: Size of a head; None means the width divided by `heads`.
        frequencies: Angle of each pair of channels from one position to the next; None means `theta ** (-2 i / size)`.
    """

    layers: int
    heads: int
    epsilon: float
    theta: float
    key_heads: int | None = None
    size: int | None = None
    frequencies: tuple[float, ...] | None = None


def shape_of(models: Sequence[Any]) -> Shape:
    """The constants of models of one architecture.

    Args:
        models: Causal models of transformers.

    Raises:
        ValueError: If the stack does not have the architecture, or the models do not share it.
    """
    if not models:
        raise ValueError("a stack needs at least one model")
    found = [_shape(model) for model in models]
    if len(set(found)) > 1:
        other = next(shape for shape in found if shape != found[0])
        raise ValueError(f"the models of a stack must have one architecture, got {found[0]} and {other}")
    return found[0]


def weights_of(models: Sequence[Any], device: torch.device | None) -> dict[str, Tensor]:
    """The weights of models of one architecture, stacked along a first dimension. A tied LM head is not repeated.

    Args:
        models: Causal models of transformers.
        device: Device of the stack; None keeps that of the models.

    Raises:
        ValueError: If a weight is quantised, or the models do not have the same weights.
    """
    states = [cast("dict[str, Tensor]", model.state_dict()) for model in models]
    shapes = [{name: (w.shape, w.dtype) for name, w in state.items()} for state in states]
    if any(other != shapes[0] for other in shapes[1:]):
        raise ValueError("the models of a stack must have the same weights, of the same shapes and dtypes")
    for name, weight in states[0].items():
        if not weight.is_floating_point():
            raise ValueError(f"the stack has no path for quantised weights: {name} is {weight.dtype}")
    tied = models[0].config.tie_word_embeddings
    names = [name for name in states[0] if not (tied and name == _HEAD)]
    return {name: torch.stack([state[name].detach().to(device=device) for state in states]) for name in names}


def model_state(weights: dict[str, Tensor], run: int, model: Any) -> dict[str, Tensor]:
    """The state dictionary that gives a model one run's weights.

    Args:
        weights: The weights of a stack.
        run: Number of the run.
        model: A model of the stack's architecture.
    """
    state = {name: w[run].detach() for name, w in weights.items()}
    if model.config.tie_word_embeddings:
        state[_HEAD] = state[_EMBEDDING]
    return state


def _shape(model: Any) -> Shape:
    """The constants of one model."""
    config = model.config
    _refuse_others(config)
    rope = config.rope_parameters
    frequencies = None if rope["rope_type"] == "default" else tuple(model.model.rotary_emb.inv_freq.tolist())
    return Shape(
        config.num_hidden_layers,
        config.num_attention_heads,
        config.rms_norm_eps,
        rope["rope_theta"],
        config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        frequencies,
    )


def _refuse_others(config: Any) -> None:
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"the stack has no forward pass for models of type {config.model_type!r}; it has one for {', '.join(FAMILIES)}"
        )
    if config.hidden_act != "silu":
        raise ValueError(f"the stack has the activation silu only, got hidden_act={config.hidden_act!r}")
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if window is not None or kinds:
        raise ValueError(f"the stack has full attention only, got sliding_window={window} and layers {sorted(kinds)}")
    rope = config.rope_parameters
    if rope["rope_type"] not in _ROPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"the stack has the rotary embeddings {', '.join(_ROPES)} of whole heads only, got {rope}")
