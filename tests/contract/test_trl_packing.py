"""Packing in the trainer: models with windows train as unpacked, others are refused before anything is sampled."""

import pytest
import torch
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from bandpo.integrations.trl import BandGRPOConfig, BandGRPOTrainer
from trl_runs import loss_and_gradient, reward, rollout, settings

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip


def trainer(folder, model, tokenizer, prompts, **changes):
    return BandGRPOTrainer(
        model=model, reward_funcs=reward, args=BandGRPOConfig(**settings(folder, **changes)), train_dataset=prompts,
        processing_class=tokenizer,
    )  # fmt: skip


def windowed(tokenizer):
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(vocab_size=len(tokenizer), sliding_window=4, **SMALL))


def test_a_model_with_a_window_packed_is_the_model_padded(tmp_path, tokenizer, prompts):
    inputs = rollout(tokenizer)  # prompts of 4 tokens, completions of up to 6: longer than the window
    loss, gradient = loss_and_gradient(trainer(tmp_path, windowed(tokenizer), tokenizer, prompts), inputs)[:2]
    packed = trainer(tmp_path, windowed(tokenizer), tokenizer, prompts, packing=True)
    found, found_gradient = loss_and_gradient(packed, inputs)[:2]
    torch.testing.assert_close(found, loss, rtol=1e-4, atol=1e-6)  # float32, other orders of addition in attention
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())


def test_a_model_with_convolutions_is_refused_at_the_start(tmp_path, tokenizer, prompts):
    config = Lfm2Config(vocab_size=len(tokenizer), layer_types=["conv", "full_attention"], **SMALL)
    with pytest.raises(ValueError, match=r"Lfm2ForCausalLM has layers of the kind conv.*packing off"):
        trainer(tmp_path, Lfm2ForCausalLM(config), tokenizer, prompts, packing=True)


def test_a_router_loss_is_refused_at_the_start(tmp_path, tokenizer, prompts):
    config = MixtralConfig(vocab_size=len(tokenizer), num_local_experts=2, **SMALL)
    with pytest.raises(ValueError, match="router_aux_loss_coef=0"):
        trainer(tmp_path, MixtralForCausalLM(config), tokenizer, prompts, packing=True)
    trainer(tmp_path, MixtralForCausalLM(config), tokenizer, prompts, packing=True, router_aux_loss_coef=0.0)


def test_tokens_before_each_row_are_refused(tmp_path, tokenizer, prompts):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(windowed(tokenizer), config)
    with pytest.raises(ValueError, match="tokens of its own"):
        trainer(tmp_path, model, tokenizer, prompts, packing=True)
