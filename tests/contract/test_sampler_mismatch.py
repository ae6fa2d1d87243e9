"""The sampler's own log-probs beside the trainer's: listened to without a further pass, and measured in the log."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import GenerationConfig

from bandpo.integrations.trl import BandGRPOConfig, BandGRPOTrainer, grpo
from bandpo.integrations.trl.sampler import LARGEST, MEAN, SAMPLED, SamplerLogprobs, cast_once, mismatch
from bandpo.toy.models import WarmUp, build_model
from trl_runs import band_trainer, reward, settings

PROMPTS = ["1+2=", "3*5=1", "7", "22-9="] * 3


@pytest.fixture
def prompts():
    """Prompts of several lengths: padding is one of the things that move the rounding."""
    return Dataset.from_list([{"prompt": f"{a}+{b}=" * (1 + b % 4), "answer": ""} for a in range(8) for b in range(8)])


@pytest.fixture
def make_model(tokenizer):
    """Models whose distributions are far from uniform, so that rounding shows."""

    def make():
        model = build_model(WarmUp(hidden_size=64, layers=2, seed=0), tokenizer)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(6 if p.dim() > 1 else 1)
        return model

    return make


def named(folder, model, tokenizer, prompts, peft_config=None, **changes):
    args = BandGRPOConfig(**settings(folder, **changes))
    return BandGRPOTrainer(
        model, reward, args, train_dataset=prompts, processing_class=tokenizer, peft_config=peft_config
    )


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_they_are_those_of_transformers_own_logits(precision, temperature, use_cache, make_model, tokenizer):
    """Against `output_logits`, which keeps every row of logits: with rows that end early, and left-padded prompts."""
    model = make_model().eval()
    given = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    config = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, max_new_tokens=7, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.eos_token_id, 5, 9, 20], return_dict_in_generate=True, output_logits=True, use_cache=use_cache,
    )  # fmt: skip
    sampler = SamplerLogprobs(temperature)
    torch.manual_seed(0)
    half = torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32)
    with torch.no_grad(), sampler.listening(model), half:
        out = model.generate(**given, generation_config=config)
    completions = out.sequences[:, given["input_ids"].shape[1] :]
    logits = torch.stack(out.logits, 1).float() / temperature
    expected = logits.log_softmax(-1).gather(-1, completions.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(sampler.of(completions), expected, rtol=1e-5, atol=1e-5)
    assert not model._forward_hooks
    # Another token than the sampled one has no log-prob, a wider padding neither, and other rows have none at all.
    changed = completions.clone()
    changed[0, 1] += 1
    assert sampler.of(changed).isnan().nonzero().tolist() == [[0, 1]]
    wider = torch.nn.functional.pad(completions, (0, 3))
    assert sampler.of(wider)[:, -3:].isnan().all() and not sampler.of(wider)[:, :-3].isnan().any()
    assert sampler.of(completions[:-1]).isnan().all()


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=["beams", "drafts"])
def test_another_way_of_sampling_has_none(options, make_model, tokenizer):
    model, sampler = make_model().eval(), SamplerLogprobs(1.0)
    given = tokenizer(["7=7=7=7=7="], return_tensors="pt")
    with torch.no_grad(), sampler.listening(model):
        config = GenerationConfig(max_new_tokens=8, pad_token_id=tokenizer.pad_token_id, eos_token_id=None, **options)
        out = model.generate(**given, generation_config=config)
    assert sampler.of(out[:, given["input_ids"].shape[1] :]).isnan().all()


def test_before_any_pass_nothing_is_known():
    assert SamplerLogprobs(1.0).of(torch.zeros(2, 3, dtype=torch.long)).isnan().all()


@pytest.mark.parametrize("with_old", [True, False])
def test_mean_and_largest_are_those_of_numpy(with_old):
    rng = np.random.default_rng(0)
    old, sampled = -rng.exponential(size=(2, 5, 8)).astype(np.float32)
    mask = rng.random((5, 8)) < 0.7
    sampled[0, 0], sampled[1, 2], old[2, 1], sampled[3, 3] = np.nan, -np.inf, np.nan, -1e30
    mask[0, 0] = mask[1, 2] = mask[2, 1] = mask[3, 3] = True
    apart = np.abs(sampled - old)
    apart[~mask | ~np.isfinite(sampled) | ~np.isfinite(old) | (np.abs(sampled) > 1e29)] = np.nan
    batch = {"completion_mask": torch.tensor(mask).long(), SAMPLED: torch.tensor(sampled)}
    logprobs = torch.tensor(old, requires_grad=True)
    if with_old:
        batch["old_per_token_logps"], logprobs = torch.tensor(old), torch.zeros(5, 8, requires_grad=True)
    found = mismatch(batch, logprobs)
    assert found[MEAN].value().item() == pytest.approx(np.nanmean(apart), rel=1e-6)
    assert found[LARGEST].value().item() == pytest.approx(np.nanmax(apart), rel=1e-6)
    assert found[MEAN].denominator == np.isfinite(apart).sum()
    assert not found[MEAN].numerator.requires_grad
    nothing = mismatch({**batch, "completion_mask": torch.zeros(5, 8)}, logprobs)
    assert all(x.value().isnan() for x in nothing.values())
    assert mismatch({"completion_mask": batch["completion_mask"]}, logprobs) == {}


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_iterations": 1, "steps_per_generation": 1}, {"objective": "dppo-kl"}, {"dynamic_sampling": 1},
     {"pruning": {"prompts": 0.5, "completions": 0.5}, "per_device_train_batch_size": 16}],
    ids=["reuse", "on-policy", "other loss", "refilled", "pruned"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The trust region of .* can never bind", "ignore:.*16 bits")
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_each_line_of_the_log_has_it(bf16, changes, make_model, tokenizer, prompts, tmp_path):
    trainer = named(tmp_path, make_model(), tokenizer, prompts, bf16=bf16, **changes)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows and all(0 < row[MEAN] <= row[LARGEST] for row in rows)
    assert all((row[MEAN] > 1e-4) == bf16 and (row[LARGEST] < 1e-3) == (not bf16) for row in rows)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_the_run_is_the_same_with_and_without(bf16, make_model, tokenizer, prompts, tmp_path, monkeypatch):
    """Weights and log, bit for bit, and as many forward passes: listening and casting once change nothing else."""
    found = []
    for listens in (True, False):
        if not listens:
            monkeypatch.setattr(SamplerLogprobs, "listening", lambda self, model: nullcontext())
            monkeypatch.setattr(grpo, "cast_once", lambda accelerator: nullcontext())
        trainer = band_trainer(tmp_path / str(listens), make_model, tokenizer, prompts, bf16=bf16)
        passes = []
        trainer.model.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        trainer.train()
        log = [
            {k: v for k, v in row.items() if "logp_difference" not in k and "time" not in k and "per_second" not in k}
            for row in trainer.state.log_history
        ]
        found.append((torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), log, len(passes)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


def test_mixed_precision_rounds_a_weight_once_for_a_rollout(make_model, tokenizer, prompts, tmp_path, monkeypatch):
    """Counted on torch's own casts: without the outer context each pass rounds all weights anew."""
    counts = {}
    for once in (True, False):
        if not once:
            monkeypatch.setattr(grpo, "cast_once", lambda accelerator: nullcontext())
        trainer = band_trainer(tmp_path / str(once), make_model, tokenizer, prompts, bf16=True)
        weights = {p.numel() for p in trainer.model.parameters() if p.dim() == 2}
        trainer.model = trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
        torch.manual_seed(0)
        with torch.profiler.profile(record_shapes=True) as profile:
            trainer._generate_single_turn([[5, 6, 7]] * 8, None, {}, 4)
        casts = [e for e in profile.events() if e.name == "aten::_to_copy" and e.input_shapes and e.input_shapes[0]]
        counts[once] = sum(np.prod(e.input_shapes[0]) in weights for e in casts)
    assert counts[True] * 3 <= counts[False]
    gpu = SimpleNamespace(device=torch.device("cuda"), autocast=lambda: pytest.fail("memory of a GPU"))
    with cast_once(gpu):
        pass


def test_an_adapter_is_listened_to(make_model, tokenizer, prompts, tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="CAUSAL_LM")
    trainer = named(tmp_path, make_model(), tokenizer, prompts, peft_config=lora)
    trainer.train()
    assert all(0 < row[MEAN] < 1e-4 for row in trainer.state.log_history if "loss" in row)


def test_a_samplers_own_numbers_come_first_and_vllms_are_left_to_trl(make_model, tokenizer, prompts, tmp_path):
    batch = {"completion_mask": torch.ones(1, 2), SAMPLED: torch.tensor([[-1.0, -1.0]]),
             "sampling_per_token_logps": torch.tensor([[-1.5, torch.nan]])}  # fmt: skip
    assert mismatch(batch, torch.full((1, 2), -1.0))[MEAN].value() == 0.5
    trainer = band_trainer(tmp_path, make_model, tokenizer, prompts)
    heard = []

    @contextmanager
    def listening(self, model):
        heard.append(model)
        yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SamplerLogprobs, "listening", listening)
        patch.setattr("trl.GRPOTrainer._generate_single_turn", lambda self, *_: ([[5]], [[-1.0]]))
        trainer.use_vllm = True
        trainer._generate_single_turn([[5]], None, {}, 1)
        assert not heard and trainer._sampler is None
        trainer.use_vllm = False
        trainer._generate_single_turn([[5]], None, {}, 1)
        assert heard
