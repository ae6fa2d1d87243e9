"""A tiny llama in a GGUF file, written by gguf's own writer: 2 layers, grouped heads, tied embeddings, a chat template."""

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

HEADS, GROUPS, WIDTH, INNER, LAYERS = 4, 2, 64, 96, 2
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]


def tokens():
    """The special tokens, and one for each byte as byte-level BPE writes it."""
    others = [b for b in range(256) if b not in _BYTES]
    return [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *map(chr, _BYTES),
        *(chr(256 + i) for i in range(len(others))),
        "ab",
    ]


def weights(seed=0):
    """The tensors in float32 by their names in GGUF, as llama.cpp orders them."""
    draw = np.random.default_rng(seed)
    head = WIDTH // HEADS
    shapes = {"token_embd": (len(tokens()), WIDTH), "output_norm": (WIDTH,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_q": (WIDTH, WIDTH), f"blk.{i}.attn_k": (GROUPS * head, WIDTH),
            f"blk.{i}.attn_v": (GROUPS * head, WIDTH), f"blk.{i}.attn_output": (WIDTH, WIDTH),
            f"blk.{i}.ffn_gate": (INNER, WIDTH), f"blk.{i}.ffn_up": (INNER, WIDTH), f"blk.{i}.ffn_down": (WIDTH, INNER),
            f"blk.{i}.attn_norm": (WIDTH,), f"blk.{i}.ffn_norm": (WIDTH,),
        }  # fmt: skip
    # Scales of the norms lie around 1.
    drawn = {name: draw.standard_normal(shape) for name, shape in shapes.items()}
    return {f"{name}.weight": (1 + x / 10 if x.ndim == 1 else x / 8).astype(np.float32) for name, x in drawn.items()}


def write(path, kind="Q4_1", *, architecture="llama", embedding="Q8_0", seed=0):
    """Write the file.

    Args:
        path: The file.
        kind: Type of the matrices.
        architecture: What the file says about it.
        embedding: Type of the embeddings.
        seed: Seed of the weights.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens()))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens())
    writer.add_token_types([3] * 3 + [1] * (len(tokens()) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT)
    for name, x in weights(seed).items():
        chosen = gguf.GGMLQuantizationType["F32" if x.ndim == 1 else embedding if "embd" in name else kind]
        writer.add_tensor(name, gguf.quants.quantize(x, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantised(path):
    """The weights as transformers names them, by gguf's own dequantisation and numpy alone."""
    names = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        x = gguf.dequantize(tensor.data, tensor.tensor_type)
        whole, _, layer = tensor.name.removesuffix(".weight").partition("blk.")
        if whole:
            found[{"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[whole]] = x
            continue
        number, _, part = layer.partition(".")
        if (heads := {"attn_q": HEADS, "attn_k": GROUPS}.get(part)) is not None:
            # llama.cpp interleaves the two halves of a head that rotate together.
            rows = np.arange(len(x)).reshape(heads, -1, 2)
            x = x[np.concatenate([rows[..., 0], rows[..., 1]], axis=1).ravel()]
        found[f"model.layers.{number}.{names[part]}.weight"] = x
    return found
