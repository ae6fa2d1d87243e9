"""One sampler: a model's generation_config changes neither what is trained on nor what is measured, its end tokens apart."""

import pytest
import torch
from transformers import GenerationConfig

from bandpo.integrations.trl import BandGRPOConfig, BandGRPOTrainer
from bandpo.integrations.trl.generate import end_tokens, pad_token, sample_batches, sampler_of
from bandpo.integrations.trl.online import OnlinePreferenceConfig, OnlinePreferenceTrainer
from bandpo.toy.models import build_tokenizer
from trl_runs import reward, settings


@pytest.fixture
def tokenizer():
    return build_tokenizer()  # of its own: some tests change it


PROMPTS = ["1+2=", "abc", "7", "3*5=1"]
OWN = [
    {"repetition_penalty": 1.8},
    {"no_repeat_ngram_size": 1},
    {"do_sample": True, "min_p": 0.5},
    {"do_sample": True, "typical_p": 0.2},
    {"do_sample": True, "epsilon_cutoff": 0.015},
    {"do_sample": True, "eta_cutoff": 0.3},
    {"do_sample": True, "top_k": 3},
    {"do_sample": True, "top_p": 0.3},
    {"do_sample": True, "temperature": 0.2},
    {"do_sample": True, "top_h": 0.3},
    {"suppress_tokens": list(range(3, 40))},
    {"begin_suppress_tokens": list(range(3, 40))},
    {"bad_words_ids": [[i] for i in range(3, 40)]},
    {"sequence_bias": [[[7], 9.0]]},
    {"forced_bos_token_id": 5},
    {"forced_eos_token_id": 6},
    {"num_beams": 3},
    {"num_beams": 2, "length_penalty": 3.0, "early_stopping": True},
    {"exponential_decay_length_penalty": (1, 3.0)},
    {"min_length": 9},
    {"min_new_tokens": 6},
    {"max_length": 3},
    {"max_new_tokens": 2},
    {"max_time": 1e-9},
    {"stop_strings": ["1", "2", "a"]},
    {"guidance_scale": 3.0},
    {"renormalize_logits": True, "repetition_penalty": 0.5},
    {"num_return_sequences": 2, "do_sample": True},
    {"return_dict_in_generate": True, "output_scores": True},
    {"watermarking_config": {"greenlist_ratio": 0.25, "bias": 5.0}},
    {"prompt_lookup_num_tokens": 2},
    {"remove_invalid_values": True, "encoder_repetition_penalty": 2.0},
]


def with_own(model, changes):
    model.generation_config = GenerationConfig(**changes)
    return model


def completions(model, tokenizer, **options):
    options = {"samples": 4, "max_new_tokens": 6, "seed": 3, **options}
    return [c for _, _, part in sample_batches(model, tokenizer, PROMPTS, **options) for c in part]


@pytest.mark.filterwarnings("ignore:.*generation flags.*")
@pytest.mark.parametrize("temperature", [1.0, 0.0], ids=["sampled", "greedy"])
@pytest.mark.parametrize("own", OWN, ids=lambda own: "-".join(own))
def test_a_models_own_options_do_not_change_what_is_measured(own, temperature, make_model, tokenizer):
    expected = completions(make_model(), tokenizer, temperature=temperature)
    model = with_own(make_model(), own)
    config = model.generation_config
    assert completions(model, tokenizer, temperature=temperature) == expected
    assert model.generation_config is config  # as it was


@pytest.mark.parametrize("own", OWN, ids=lambda own: "-".join(own))
def test_nor_what_is_trained_on(own, make_model, tokenizer, prompts, tmp_path):
    found = []
    for changes in ({}, own):
        model = with_own(make_model(), changes)
        args = BandGRPOConfig(**settings(tmp_path))
        trainer = BandGRPOTrainer(model, reward, args, train_dataset=prompts, processing_class=tokenizer)
        config = model.generation_config
        torch.manual_seed(0)
        rollout = trainer._generate_and_score_completions(
            [{"prompt": p, "answer": ""} for p in PROMPTS for _ in range(4)]
        )
        found.append(rollout["completion_ids"])
        assert model.generation_config is config
    assert torch.equal(*found)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_training_and_evaluation_hand_transformers_one_and_the_same_config(
    lora, make_model, tokenizer, prompts, tmp_path, monkeypatch
):
    peft = pytest.importorskip("peft") if lora else None
    options = {"temperature": 0.7, "top_p": 0.9, "top_k": 11, "min_p": 0.01, "repetition_penalty": 1.1,
               "generation_kwargs": {"no_repeat_ngram_size": 3}}  # fmt: skip
    model = with_own(make_model(), {"eos_token_id": [7, 9], "suppress_tokens": [4], "num_beams": 2, "typical_p": 0.3})
    args = BandGRPOConfig(**settings(tmp_path, **options))
    trainer = BandGRPOTrainer(
        model, reward, args, train_dataset=prompts, processing_class=tokenizer,
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM") if lora else None,
    )  # fmt: skip
    seen = []
    cls = type(model)
    prepare = cls._prepare_generation_config

    def note(self, *args, **kwargs):
        config, rest = prepare(self, *args, **kwargs)
        seen.append(config.to_dict())
        return config, rest

    monkeypatch.setattr(cls, "_prepare_generation_config", note)
    trainer._generate_and_score_completions([{"prompt": p, "answer": ""} for p in PROMPTS for _ in range(4)])
    completions(trainer.model, tokenizer, temperature=args.temperature, top_p=args.top_p, **sampler_of(args))
    trained, measured = seen
    assert trained == measured
    assert trained["eos_token_id"] == [tokenizer.eos_token_id, 7, 9]
    assert trained["suppress_tokens"] is None and trained["num_beams"] == 1 and trained["typical_p"] == 1.0


def test_the_first_token_is_drawn_from_the_models_own_distribution(make_model, tokenizer):
    """Against the softmax of the logits, whatever the model's file asks for."""
    model = with_own(make_model(), {"repetition_penalty": 2.0, "do_sample": True, "top_k": 5, "min_p": 0.3})
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)  # far from uniform
        probs = model(torch.tensor([tokenizer("12+")["input_ids"]])).logits[0, -1].double().softmax(-1)
    n = 20_000
    (batch,) = sample_batches(model, tokenizer, ["12+"], samples=n, max_new_tokens=1, batch_size=n, seed=1)
    counts = torch.bincount(torch.tensor([c[0] for c in batch[2]]), minlength=len(probs)).double()
    chi2 = ((counts - n * probs).square() / (n * probs)).sum().item()
    df = len(probs) - 1
    assert abs(chi2 - df) < 6 * (2 * df) ** 0.5


def test_every_end_token_ends_a_completion(make_model, tokenizer):
    ends = [tokenizer.eos_token_id, *range(20, 40)]
    model = with_own(make_model(), {"eos_token_id": ends[1:]})
    assert end_tokens(model, tokenizer) == ends
    found = completions(model, tokenizer, max_new_tokens=40, samples=16)
    stopped = [c for c in found if c[-1] in ends]
    assert len(stopped) > len(found) / 2  # a third of the vocabulary
    assert all(set(c[:-1]).isdisjoint(ends) for c in found) and all(len(c) == 40 for c in found if c[-1] not in ends)


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}<|end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_the_chat_templates_end_of_turn_counts_and_is_trained_with(make_model, tokenizer, prompts, tmp_path):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer.chat_template = TEMPLATE
    turn = tokenizer.convert_tokens_to_ids("<|end|>")
    model = make_model()
    model.resize_token_embeddings(len(tokenizer))
    assert end_tokens(model, tokenizer) == [tokenizer.eos_token_id, turn]
    trainer = BandGRPOTrainer(
        model, reward, BandGRPOConfig(**settings(tmp_path)), train_dataset=prompts, processing_class=tokenizer
    )
    assert trainer.eos_token_ids == trainer.generation_config.eos_token_id == [tokenizer.eos_token_id, turn]
    tokenizer.chat_template = "{{ raise_exception('only users speak') }}"
    assert end_tokens(model, tokenizer) == [tokenizer.eos_token_id]


def test_options_of_the_chat_template_reach_the_prompts(make_model, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if think %}1{% else %}2{% endif %}"
    )
    messages = [[{"role": "user", "content": "7+"}], [{"role": "user", "content": "9+8+"}]]
    asked = [
        next(sample_batches(make_model(), tokenizer, messages, samples=1, max_new_tokens=1, **more))[1]
        for more in ({}, {"chat_template_kwargs": {"think": True}})
    ]
    texts = [tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in asked]
    assert [t.replace(" ", "") for t in texts[0]] == ["7+2", "9+8+2"]
    assert [t.replace(" ", "") for t in texts[1]] == ["7+1", "9+8+1"]


def test_a_tokenizer_without_pad_token_samples_the_same(make_model, tokenizer, prompts, tmp_path):
    expected = completions(make_model(), tokenizer)
    tokenizer.pad_token = None
    assert pad_token(tokenizer) == tokenizer.eos_token_id
    assert completions(make_model(), tokenizer) == expected
    assert tokenizer.pad_token is None
    args = OnlinePreferenceConfig(
        str(tmp_path), rounds=1, prompts_per_round=6, samples_per_prompt=4, max_completion_length=5, objective="dpo",
        per_device_train_batch_size=4, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    assert len(OnlinePreferenceTrainer(make_model(), reward, args, prompts, tokenizer).train()) == 1
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither"):
        pad_token(tokenizer)


def test_a_full_length_completion_keeps_a_pad_token_that_was_sampled(make_model, tokenizer):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.pad_token_id] = 0  # greedy takes token 0 everywhere: all logits are 0
    found = completions(model, tokenizer, temperature=0.0)
    assert tokenizer.pad_token_id != 0 or all(c == [0] * 6 for c in found)
    assert all(len(c) == 6 for c in found)


def test_the_model_is_as_it_was_after_an_error(make_model, tokenizer):
    model = with_own(make_model(), {"num_beams": 2}).train()
    config = model.generation_config
    batches = sample_batches(model, tokenizer, PROMPTS, samples=1, max_new_tokens=2, batch_size=1)
    next(batches)
    batches.close()
    assert model.training and model.generation_config is config


def test_vllms_own_options_cannot_be_measured(tmp_path):
    args = BandGRPOConfig(**settings(tmp_path, generation_kwargs={"stop": ["x"]}))
    args.use_vllm = True
    with pytest.raises(ValueError, match=r"generation_kwargs=.*another sampler"):
        sampler_of(args)
