"""Noise and kept mass of a model on the tokens of a batch, and that a stranger's folder runs nothing."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bandpo import OBJECTIVES
from bandpo.cli import main
from bandpo.doctor import examine_model, measure_noise
from bandpo.doctor.scoring import load_model, score
from bandpo.doctor.truncation import SETTINGS, KeptMass, Truncation, kept_mass

WORDS = 50


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    found = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in found.parameters():
            weight.mul_(4)
    return found


@pytest.fixture(scope="module")
def tokens():
    """Prompts padded on the left, completions on the right, one without a completion."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, WORDS, (11, 18), generator=g)
    attention = torch.zeros_like(ids)
    for i in range(11):
        attention[i, 6 - i % 5 : 7 + i] = 1
    mask = attention.clone()
    mask[:, :6] = 0
    return ids, attention, mask


def plain(model, ids, attention, temperature=1.0):
    """One sequence at a time, cut out by hand, in float64."""
    wide = type(model)(model.config).double()
    wide.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    wide.eval()
    found = torch.full(ids.shape, torch.nan, dtype=torch.float64)
    for i in range(len(ids)):
        places = attention[i].nonzero().flatten()
        with torch.no_grad():
            logp = wide(ids[i : i + 1, places]).logits[0, :-1].div(temperature).log_softmax(-1)
        found[i, places[1:]] = logp.gather(-1, ids[i, places[1:]][:, None]).squeeze(-1)
    return found


@pytest.mark.parametrize("given", [{}, {"rows": 3}, {"padding": "left"}, {"padding": "left", "rows": 4}])
def test_scores_are_those_of_single_sequences(model, tokens, given):
    ids, attention, _ = tokens
    model.train()
    found = score(model, ids, attention, **given)
    assert model.training
    torch.testing.assert_close(found.double(), plain(model, ids, attention), equal_nan=True, rtol=2e-5, atol=2e-5)
    cold = score(model, ids, attention, temperature=0.5, **given)
    torch.testing.assert_close(cold.double(), plain(model, ids, attention, 0.5), equal_nan=True, rtol=2e-5, atol=5e-5)
    with pytest.raises(ValueError, match="token ids must be from 0 to 49"):
        score(model, ids + 1, attention)


def test_models_with_absolute_positions_are_given_the_right_ones(tokens):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    ids, attention, _ = tokens
    for padding in ("left", "right"):
        found = score(model, ids, attention, padding=padding)
        torch.testing.assert_close(found.double(), plain(model, ids, attention), equal_nan=True, rtol=2e-5, atol=2e-5)


def test_noise_of_a_model_is_that_of_its_dtypes(model, tokens):
    ids, attention, mask = tokens
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kept = KeptMass()
    found = measure_noise(model, ids, mask, attention_mask=attention, objectives=[OBJECTIVES["bandpo-kl"]], kept=kept)
    assert list(found) == ["one sequence at a time, float32", "left padding, float32", "bfloat16 against float32",
                           "one sequence at a time, bfloat16", "left padding, bfloat16"]  # fmt: skip
    counted = int((mask.bool() & ~score(model, ids, attention).isnan()).sum())  # a first token has no context
    assert counted < int(mask.sum()) and all(n.tokens == counted for n in found.values())
    assert found["left padding, float32"].total.largest < 1e-4
    assert 1e-3 < found["bfloat16 against float32"].total.at(0.99) < 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert kept.tokens == counted
    for wrong in (mask[:, 1:], mask[0]):
        with pytest.raises(ValueError, match="must be"):
            measure_noise(model, ids, wrong)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_is_on_the_side_that_is_asked_for(padding, model, tokens, monkeypatch):
    ids, attention, _ = tokens
    given, forward = [], LlamaForCausalLM.forward

    def spy(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        given.append((attention_mask, position_ids))
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", spy)
    score(model, ids, attention, padding=padding, rows=4)
    assert [len(mask) for mask, _ in given] == [3, 4, 3]  # a sequence of one token is not scored
    for mask, positions in given:
        assert mask[:, -1 if padding == "left" else 0].all() and not mask.all()
        assert all(p[m.bool()].tolist() == list(range(int(m.sum()))) for m, p in zip(mask, positions, strict=True))


class Sloppy(LlamaForCausalLM):
    """Its numbers depend on how many sequences a pass has."""

    def forward(self, input_ids=None, **kwargs):
        out = super().forward(input_ids=input_ids, **kwargs)
        out.logits = out.logits * (1 + 0.05 * (len(input_ids) - 1))
        return out


def test_a_model_whose_numbers_depend_on_the_batch_is_a_problem(model, tokens):
    ids, attention, mask = tokens
    sloppy = Sloppy(model.config)
    sloppy.load_state_dict(model.state_dict())
    b = batch_of(ids, attention, mask)
    [good] = [f for f in examine_model(model, b, objectives=[OBJECTIVES["grpo"]]) if f.rule == "noise"]
    [bad] = [f for f in examine_model(sloppy, b, objectives=[OBJECTIVES["grpo"]]) if f.rule == "noise"]
    assert good.level in ("ok", "warning") and "one sequence at a time, float32/all/q0.99" in good.numbers
    assert bad.level == "problem" and "one sequence at a time" in bad.seen and "half of grpo at p = " in bad.seen


def batch_of(ids, attention, mask):
    logp = -torch.rand(ids[:, 6:].shape, generator=torch.Generator().manual_seed(1)) - 0.1
    return {"logprobs": logp, "old_logprobs": logp - 0.1, "advantages": torch.linspace(-1, 1, len(ids)), "mask": mask[:, 6:],
            "input_ids": ids, "attention_mask": attention}  # fmt: skip


def test_kept_mass_of_a_model_is_that_of_its_distributions(model, tokens):
    ids, attention, mask = tokens
    [_, found] = examine_model(model, batch_of(ids, attention, mask))
    rows = []
    for i in range(len(ids)):
        places = attention[i].nonzero().flatten()
        with torch.no_grad():
            logp = model(ids[i : i + 1, places]).logits[0, :-1].double().log_softmax(-1)
        rows.append(logp[mask[i, places[1:]].bool()])
    whole = torch.cat(rows)
    for cut in SETTINGS:
        kept, _ = kept_mass(whole, cut)
        assert found.numbers[f"{cut}/kept"] == pytest.approx(kept.mean().item(), rel=1e-5)
    [_, cut] = examine_model(model, batch_of(ids, attention, mask), truncation=Truncation(top_p=0.5))
    assert cut.level == "warning"


def test_prompts_and_completions_are_put_together(model, tokens):
    ids, attention, mask = tokens
    b = batch_of(ids, attention, mask)
    apart = {**{k: v for k, v in b.items() if k not in ("input_ids", "attention_mask")}, "prompt_ids": ids[:, :6],
             "prompt_mask": attention[:, :6], "completion_ids": ids[:, 6:]}  # fmt: skip
    assert examine_model(model, apart) == examine_model(model, b)
    [none] = examine_model(model, {k: v for k, v in apart.items() if k != "prompt_ids"})
    assert none.seen.startswith("not known: the batch has no token ids")
    many = {k: v.repeat(10, 1) if v.ndim == 2 else v.repeat(10) for k, v in b.items()}
    assert examine_model(model, many)[0].seen.startswith("64 sequences")


def test_the_command_scores_a_batch_by_a_folder(model, tokens, tmp_path, capsys):
    folder, file = tmp_path / "model", tmp_path / "batch.safetensors"
    model.save_pretrained(folder)
    save_file({k: v.contiguous() for k, v in batch_of(*tokens).items()}, file)
    main(["doctor", str(file), "--model", str(folder), "--vocabulary", "50", "--json"])
    [section] = json.loads(capsys.readouterr().out)
    found = {f["rule"]: f for f in section["findings"]}
    assert {"noise", "kept mass", "memory", "gradient"} <= found.keys()
    loaded = load_model(folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(score(loaded, *tokens[:2]), score(model, *tokens[:2]), equal_nan=True)


def test_folders_that_would_run_something_are_refused(model, tmp_path):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "modeling_evil.py").write_text("open('pwned', 'w')")
    for change, message in (
        (
            {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}},
            "auto_map in config.json: it needs code of its own",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "it is quantised"),
        ({"model_type": "of-nobody"}, "cannot be loaded"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            load_model(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="is no object"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(folder)
    weights.unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has no \.safetensors"):
        load_model(folder)
    shutil.rmtree(folder)
    for name in (folder, "Qwen/Qwen2.5-0.5B"):
        with pytest.raises(ValueError, match="must be a local folder"):
            load_model(tmp_path / name)
    assert not (tmp_path / "pwned").exists()
