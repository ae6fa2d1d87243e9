"""Packing of tiny models of the architectures that transformers offers: right to float32 rounding, or refused before a run.

Sequences are longer than every window, a short one stands behind a long one, and the reference is each sequence by itself.
"""

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from bandpo.integrations.trl.packing import Layout, probe_packing, refuse_packing
from bandpo.selection import pack_rows, packing_error

WINDOW, LENGTHS = 8, (45, 5, 41, 1, 16)
# Names of sizes as the configurations have them; each takes those that it knows.
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "moe_intermediate_size": 24, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_embd": 32, "n_layer": 4, "n_head": 4,
    "n_inner": 48, "n_positions": 256, "d_model": 32, "n_layers": 4, "n_heads": 4, "ffn_hidden_size": 48, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "shared_expert_intermediate_size": 24, "mamba_d_state": 8,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_d_ssm": 64, "mamba_chunk_size": 8,
    "mamba_dt_rank": 4, "state_size": 8, "n_groups": 1, "chunk_size": 8, "time_step_rank": 4, "lru_width": 32,
    "attention_window_size": WINDOW, "attention_hidden_size": 32, "conv_dim": 32, "block_dim": 32, "rotary_dim": 8,
    "ffn_dim": 48, "word_embed_proj_dim": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOWED = {"sliding_window": WINDOW}
SWITCHED = {**WINDOWED, "use_sliding_window": True, "max_window_layers": 1}
LATENT = {
    "head_dim": None,
    "num_key_value_heads": 4,
}  # multi-head latent attention: its head size is the sum of two others
STATE = {"expand": 2, "num_heads": 8, "head_dim": 8, "n_groups": 1}
PLAIN = (
    "apertus arcee codegen cohere cohere2 cwm diffllama dots1 ernie4_5 ernie4_5_moe exaone4 flex_olmo gemma gemma2 gemma3_text "
    "glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox gptj granite granitemoe helium hunyuan_v1_dense jetmoe llama mimo_v2_flash "
    "minimax_m2 ministral mistral mixtral modernbert-decoder nanochat nemotron olmo olmo2 olmo3 olmoe persimmon phi phi3 "
    "phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2 vaultgemma"
)
RIGHT = {name: {} for name in PLAIN.split()} | {
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "llama4_text": {"attention_chunk_size": WINDOW},
    "mistral (no window)": {"sliding_window": None},
    "mistral (sees itself alone)": {"sliding_window": 1},
    "mixtral (window)": WINDOWED,
    "phi3 (window)": WINDOWED,
    "qwen2 (window)": SWITCHED,
    "qwen3 (window)": SWITCHED,
    "starcoder2 (window)": WINDOWED,
}
MIXING = (
    "afmoe bailing_hybrid bamba biogpt bloom falcon_h1 falcon_mamba gpt_oss granitemoehybrid jamba kimi_linear lfm3 mamba "
    "minimax mpt nemotron_h olmo_hybrid opt qwen3_5_text qwen3_next recurrent_gemma rwkv xglm xlstm"
)
REFUSED = {name: {} for name in MIXING.split()} | {
    "deepseek_v32": LATENT,
    "falcon": {"head_dim": None},
    "falcon (alibi)": {"head_dim": None, "alibi": True},
    "glm_moe_dsa": LATENT,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": STATE,
}


def tiny(name, attention, changes):
    cls = CONFIG_MAPPING[name.split(" ")[0]]
    known = cls().to_dict() | dict.fromkeys(getattr(cls, "attribute_map", {}))
    options = {k: v for k, v in SIZES.items() if k in known}
    if known.get("sliding_window"):
        options["sliding_window"] = WINDOW
    options |= changes
    torch.manual_seed(0)
    config = cls(**{k: v for k, v in options.items() if not (k == "head_dim" and v is None)})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(3)  # far from uniform, so that what is seen matters
    return model


def tokenizer(text, **_):
    return {"input_ids": [4 + ord(c) % 50 for c in text]}


def decide(model):
    refuse_packing(model, router_loss=False)
    probe_packing(model, tokenizer, torch.device("cpu"))


def logprobs(logits, ids):
    return logits[:-1].log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)


def both_ways(model):
    """Log-probs, and the gradient of a weighted sum of them, of sequences alone and packed."""
    g = torch.Generator().manual_seed(1)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)
    ids = torch.randint(4, 60, mask.shape, generator=g) * mask
    packed = pack_rows(ids, mask, capacity=60)
    weights = torch.randn(mask.shape, generator=g)
    out = []
    for together in (True, False):
        model.zero_grad()
        if together:
            layout = Layout(packed, model.config.get_text_config())
            logits = layout.rows(layout.forward(model).logits)
            rows = [logits[packed.sequence_ids == i] for i in range(len(ids))]
        else:
            alone = (row[real].unsqueeze(0) for row, real in zip(ids, mask, strict=True))
            rows = [model(input_ids=row, use_cache=False).logits[0] for row in alone]
        found = [logprobs(x, row[real]) for x, row, real in zip(rows, ids, mask, strict=True)]
        sum((x * w[: len(x)]).sum() for x, w in zip(found, weights, strict=True)).backward()
        out.append(
            (torch.cat(found).detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        )
    return out


def _has_sdpa(name):
    return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name.split(" ")[0]]]._supports_sdpa


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", RIGHT)
def test_packed_is_alone_in_value_and_gradient(name, attention):
    if attention == "sdpa" and not _has_sdpa(name):
        return
    model = tiny(name, attention, RIGHT[name])
    decide(model)
    (packed, gradient), (alone, expected) = both_ways(model)
    # Rounding: eps of float32 at some hundred operations on the way, relative to the size of the log-probs and the gradient.
    rounding = 200 * torch.finfo(torch.float32).eps
    assert (packed - alone).abs().max() <= rounding * alone.abs().max()
    assert (gradient - expected).norm() <= 10 * rounding * expected.norm()


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_mixed_is_refused(name):
    model = tiny(name, "eager", REFUSED[name])
    with pytest.raises(ValueError, match=rf"packing: .*{type(model).__name__}.*packing off"):
        decide(model)


@pytest.mark.parametrize("name", ["flex_attention", "paged|sdpa", "paged|flash_attention_2", "ulysses", None])
def test_unknown_attention_is_refused_by_name(name):
    model = tiny("llama", "sdpa", {})
    model.config._attn_implementation_internal = name
    with pytest.raises(ValueError, match=r"attn_implementation=.*use sdpa.*packing off"):
        refuse_packing(model, router_loss=False)


@pytest.mark.parametrize(
    "name",
    ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2", "kernels-community/vllm-flash-attn3"],
)
def test_every_flash_attention_gets_one_row_with_borders(name):
    model = tiny("llama", "sdpa", {})
    model.config._attn_implementation_internal = name
    refuse_packing(model, router_loss=False)
    packed = pack_rows(
        torch.ones(3, 4, dtype=torch.long), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]), capacity=6
    )
    inputs = Layout(packed, model.config).inputs()
    assert inputs["input_ids"].shape == (1, 9) and inputs["cu_seq_lens_q"].tolist() == [0, 2, 6, 9]
    assert inputs["attention_mask"] is None and inputs["use_cache"] is False


def test_a_router_loss_is_refused_with_its_remedy():
    with pytest.raises(ValueError, match="router_aux_loss_coef=0"):
        refuse_packing(tiny("mixtral", "sdpa", {}), router_loss=True)


def test_the_probe_shortens_windows_and_puts_them_back():
    """A model whose window is far longer than the probe's sequences, and whose masks forget where sequences begin."""
    model = tiny("gpt_oss", "eager", {"sliding_window": 100_000, "layer_types": ["sliding_attention"] * 4})
    seen = []
    forward = model.model.forward
    model.model.forward = lambda *args, **kwargs: seen.append(model.config.sliding_window) or forward(*args, **kwargs)
    model.train()
    with pytest.raises(ValueError, match="GptOssForCausalLM gives packed sequences other logits"):
        probe_packing(model, tokenizer, torch.device("cpu"))
    assert set(seen) == {WINDOW} and model.config.sliding_window == 100_000 and model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "qwen2 (window)"])
def test_rounding_is_not_taken_for_mixing(name, dtype):
    probe_packing(tiny(name, "eager", RIGHT[name]).to(dtype), tokenizer, torch.device("cpu"))


@pytest.mark.parametrize("name", ["mamba2", "lfm2", "opt", "rwkv"])
def test_mixing_is_not_taken_for_rounding_in_half_precision(name):
    with pytest.raises(ValueError, match="packing"):
        decide(tiny(name, "eager", REFUSED[name]).to(torch.bfloat16))


def test_logits_that_are_no_numbers_are_no_proof():
    model = tiny("llama", "sdpa", {})
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="relative difference nan"):
        decide(model)


def test_rounding_that_adds_up_is_measured_and_no_excuse_for_mixing():
    """Noise above √eps, of the size of what tokens behind a sequence change, passes; four times √eps never does."""
    for noise, passes in ((0.05, True), (0.15, True), (1.0, False)):
        g = torch.Generator().manual_seed(0)
        table = torch.randn(60, 60, generator=g)

        def logits(ids, noise=noise, table=table):
            clean = table[ids]
            return (
                clean + noise * torch.randn(clean.shape, generator=torch.Generator().manual_seed(ids.numel()))
            ).bfloat16()

        error, limit = packing_error(logits, lambda packed: logits(packed.input_ids), torch.arange(60))
        assert (error <= limit) == passes
        assert limit <= 4 * torch.finfo(torch.bfloat16).eps ** 0.5
