"""An estimate of the memory that a run needs at its peak, from the configuration of its model and the sizes of its batches."""

import math
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from bandpo.train.compute import Machine

_TILE = (4096, 32768)
"""Tokens and words of the vocabulary for which TRL's fused head computes logits at once."""
_HEAD_COPIES = {"cpu": 9, "cuda": 2}
"""Tensors of the size of such a tile that exist at once: many where torch computes them, few where one kernel does."""
_SAMPLER_COPIES = 4
"""Tensors of the size of the logits of the next tokens that exist at once in sampling."""
_PER_WIDTH, _PER_INNER, _PER_HEAD = 10, 4, 3
"""Numbers that the backward pass of one layer keeps for a token, in multiples of the width (inputs of norms and of products,
residuals), of the inner width (gate, up, their product) and of the width of queries, keys and values."""
_CGROUP = Path("/sys/fs/cgroup/memory.max")


class Shape(NamedTuple):
    """The sizes of a model that decide about its memory.

    Args:
        parameters: Number of parameters.
        trained: Number of trained parameters: all, or those of an adapter.
        width: Width of the hidden states.
        layers: Number of layers.
        inner: Width inside of the feed-forward part of a layer.
        attention: Width of the queries of all heads.
        keys: Width of the keys of all heads, which is that of the values.
        vocabulary: Number of rows of the embedding.
    """

    parameters: int
    trained: int
    width: int
    layers: int
    inner: int
    attention: int
    keys: int
    vocabulary: int


class Load(NamedTuple):
    """What a process of a run computes at once.

    Args:
        sequences: Sequences of one micro-batch of training; a pair is two.
        length: Tokens of the longest sequence, prompt and completion.
        sampled: Sequences that are sampled at once; 0 for none.
        checkpointing: Whether activations are computed again in the backward pass.
        half: Whether it computes in 16 bits, with weights in float32.
        reference: Whether a copy of the weights is the reference.
        on_cpu: Whether it computes on the CPU.
    """

    sequences: int
    length: int
    sampled: int
    checkpointing: bool = False
    half: bool = False
    reference: bool = False
    on_cpu: bool = True


def shape_of(model: torch.nn.Module, config: Any, *, lora_rank: int = 0) -> Shape:
    """The sizes of a model, which may be on the device "meta", without weights.

    Args:
        model: The model.
        config: Configuration of the model.
        lora_rank: Rank of the adapters that are trained; 0 where all weights are.
    """
    text = config.get_text_config()
    width, heads = int(text.hidden_size), int(text.num_attention_heads)
    head = int(getattr(text, "head_dim", None) or width // heads)
    keys = head * int(getattr(text, "num_key_value_heads", None) or heads)
    inner = int(getattr(text, "intermediate_size", None) or 4 * width)
    parameters = sum(p.numel() for p in model.parameters())
    return Shape(
        parameters=parameters,
        trained=_adapters(model, lora_rank) if lora_rank else parameters,
        width=width,
        layers=int(text.num_hidden_layers),
        inner=inner * int(getattr(text, "num_experts_per_tok", None) or 1),
        attention=head * heads,
        keys=keys,
        vocabulary=int(text.vocab_size),
    )


def _adapters(model: torch.nn.Module, rank: int) -> int:
    """The parameters of adapters on all linear layers but the head, as `target_modules="all-linear"` places them."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def estimate(shape: Shape, load: Load) -> dict[str, float]:
    """The parts of the memory of one process at the peak of a run, in bytes.

    | part | bytes |
    |---|---|
    | weights | 4 P; 8 P with a reference; and 2 P where copies in 16 bits are kept |
    | gradients | 4 T |
    | Adam | 8 T |
    | training | activations and head |
    | activations | N S L (10 w + 4 i + 3 (q + 2 k)) b; with checkpointing N S L w b and those of one layer |
    | head | 4 c min(N S, 4096) min(V, 32768), of TRL's fused head, which makes the logits in tiles |
    | sampling | 2 G S L k b + 16 G V |

    P are the parameters, T the trained ones, N the sequences of a micro-batch, S their tokens, L the layers, w the width, i the
    inner width, q and k the widths of queries and keys, V the vocabulary, G the sequences that are sampled at once, b the bytes
    of a number (4, or 2 in 16 bits), and c the copies of a tile of logits (9 on a CPU, 2 with Triton). Gradients exist in
    training only, so the peak is the larger one of gradients and training, and of sampling.

    Args:
        shape: The sizes of the model.
        load: What a process computes at once.

    Returns:
        Bytes by part; "peak" is the total.

    Examples:
        >>> shape = Shape(1_000_000, 1_000_000, width=64, layers=2, inner=128, attention=64, keys=64, vocabulary=1000)
        >>> found = estimate(shape, Load(sequences=8, length=32, sampled=16))
        >>> found["weights"], found["gradients"], found["Adam"]
        (4000000, 4000000, 8000000)
        >>> found["training"] == 256 * 2 * (10 * 64 + 4 * 128 + 3 * 192) * 4 + 36 * 256 * 1000
        True
    """
    number = 2 if load.half else 4
    tokens = load.sequences * load.length
    layer = _PER_WIDTH * shape.width + _PER_INNER * shape.inner + _PER_HEAD * (shape.attention + 2 * shape.keys)
    kept = shape.layers * shape.width + layer if load.checkpointing else shape.layers * layer
    copies = _HEAD_COPIES["cpu" if load.on_cpu else "cuda"]
    weights = 4 * shape.parameters * (1 + load.reference) + 2 * shape.parameters * load.half
    parts: dict[str, float] = {
        "weights": weights,
        "gradients": 4 * shape.trained,
        "Adam": 8 * shape.trained,
        "training": tokens * kept * number + 4 * copies * min(tokens, _TILE[0]) * min(shape.vocabulary, _TILE[1]),
        "sampling": 2 * load.sampled * load.length * shape.layers * shape.keys * number
        + 4 * _SAMPLER_COPIES * load.sampled * shape.vocabulary,
    }
    moving = max(parts["gradients"] + parts["training"], parts["sampling"])
    return parts | {"peak": parts["weights"] + parts["Adam"] + moving}


def memory_of(machine: Machine, *, use_cpu: bool) -> tuple[str, float] | None:
    """The memory that a run can use on a machine, with its name: that of the GPU, or that of the machine or its container.

    Args:
        machine: The machine.
        use_cpu: Whether the run computes on the CPU.

    Returns:
        Name and bytes; None where it is not known.
    """
    if not use_cpu and machine.accelerator == "cuda":
        return machine.name, float(cast("Any", torch.cuda.get_device_properties(0)).total_memory)
    if not use_cpu and machine.accelerator is not None:
        return None
    import psutil

    total = float(psutil.virtual_memory().total)
    try:
        limit = float(_CGROUP.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no container, or "max"
        limit = math.inf
    return "this machine" if limit >= total else "this container", min(limit, total)


def size(number: float) -> str:
    """A number of bytes for a message.

    Args:
        number: The number.

    Examples:
        >>> size(3 * 2**20), size(23.5 * 2**30)
        ('3 MiB', '23.5 GiB')
    """
    if number >= 2**29:
        return f"{number / 2**30:.3g} GiB"
    mebibytes = number / 2**20
    return f"{mebibytes:.0f} MiB" if mebibytes >= 10 else f"{mebibytes:.2g} MiB"
