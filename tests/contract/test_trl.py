"""BandGRPOTrainer against TRL's own trainer: equal where the bounds are TRL's, right where they are not."""

import json
import math
import warnings
from functools import partial

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from bandpo import KL, TV, Band, Clip, Objective, RatioBounds, policy_loss
from bandpo._system import citation
from bandpo.integrations.trl import BandGRPOConfig, BandGRPOTrainer
from bandpo.surrogates import dual_clip, mask
from trl_runs import (
    band_trainer,
    loss_and_gradient,
    named,
    reward,
    rollout,
    saved,
    settings,
    token_logprobs,
    trl_trainer,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning", "ignore:.*pin_memory", "ignore:The trust region of"
)


def constant(low, high):
    """Fixed bounds that go the way of per-token tensors (a `Clip` would be handed to TRL as two numbers)."""
    return lambda logp: RatioBounds(torch.full_like(logp, 1 - low), torch.full_like(logp, 1 + high))


CASES = [
    ("grpo", "grpo", "seq-mean-token-mean", 0.0), ("dapo", "dapo", "token-mean", 0.0), ("bnpo", "dapo", "token-mean", 0.04),
    ("dr_grpo", "dr_grpo", "seq-mean-token-sum-norm", 0.04), ("grpo", "grpo", "seq-mean-token-mean", 0.04),
]  # fmt: skip


@pytest.mark.parametrize(("loss_type", "name", "aggregation", "beta"), CASES)
@pytest.mark.parametrize("surrogate", ["clip", "own"])
def test_constant_bounds_are_trl_exactly(
    loss_type, name, aggregation, beta, surrogate, make_model, tokenizer, prompts, tmp_path
):
    make = saved(make_model, tmp_path)
    common = {"loss_type": loss_type, "beta": beta, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    theirs = trl_trainer(tmp_path, make, tokenizer, prompts, epsilon=0.2, epsilon_high=0.28, **common)
    same = partial(dual_clip, c=math.inf)  # the same function, but not the object that goes through epsilon
    objective = Objective(bounds=constant(0.2, 0.28), aggregation=aggregation, name=name)
    if surrogate == "own":
        objective = Objective(bounds=constant(0.2, 0.28), aggregation=aggregation, surrogate=same, name=name)
    ours = band_trainer(tmp_path, make, tokenizer, prompts, objective=objective, **common)
    inputs = rollout(tokenizer)
    want, want_gradient, want_metrics = loss_and_gradient(theirs, inputs)
    loss, gradient, metrics = loss_and_gradient(ours, inputs)
    assert 0 < want_metrics["clip_ratio/low_mean"] < 1
    assert 0 < want_metrics["clip_ratio/high_mean"] < 1
    if surrogate == "clip":
        assert loss == want
        assert torch.equal(gradient, want_gradient)
    else:  # the sums run in another order
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradient, want_gradient, rtol=1e-4, atol=1e-7)
    for key, value in want_metrics.items():
        if key in metrics:
            assert metrics[key] == pytest.approx(value, rel=1e-6), key
        else:
            assert surrogate == "own"
            assert key in ("clip_ratio/low_min", "clip_ratio/high_max")


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo", "no-clip"])
def test_named_objectives_with_fixed_bounds_are_trl_exactly(name, make_model, tokenizer, prompts, tmp_path):
    options = {
        "grpo": {"loss_type": "grpo"}, "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
        "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
        "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
        "no-clip": {"loss_type": "grpo", "epsilon": 1.0, "epsilon_high": math.inf},
    }[name]  # fmt: skip
    theirs = trl_trainer(tmp_path, make_model, tokenizer, prompts, **options)
    ours = named(tmp_path, make_model, tokenizer, prompts, name)
    assert ours.scale_rewards == theirs.scale_rewards
    inputs = rollout(tokenizer)
    want, got = loss_and_gradient(theirs, inputs), loss_and_gradient(ours, inputs)
    assert got[0] == want[0]
    assert torch.equal(got[1], want[1])
    assert {k: got[2][k] for k in want[2]} == want[2]
    # and the pure function is the same number without any trainer
    x = token_logprobs(theirs.model, inputs)
    loss, _ = policy_loss(
        logprobs=x, old_logprobs=inputs["old_per_token_logps"], advantages=inputs["advantages"],
        mask=inputs["completion_mask"], objective=name, max_length=6 if name == "dr_grpo" else None,
    )  # fmt: skip
    torch.testing.assert_close(loss.detach(), want[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bandpo-kl", "bandpo-tv", "bandpo-chi2", "dcpo"])
def test_band_in_trl_equals_policy_loss(name, make_model, tokenizer, prompts, tmp_path):
    """TRL with our bounds = our own loss on the same log-probs; kills swapped, ignored or rescaled bounds."""
    trainer = named(tmp_path, make_model, tokenizer, prompts, name)
    inputs = rollout(tokenizer)
    loss, gradient, metrics = loss_and_gradient(trainer, inputs)
    trainer.model.zero_grad()
    new = token_logprobs(trainer.model, inputs)
    want, ours = policy_loss(
        logprobs=new, old_logprobs=inputs["old_per_token_logps"], advantages=inputs["advantages"],
        mask=inputs["completion_mask"], objective=trainer.objective, normalizer=8, metrics="full",
    )  # fmt: skip
    want.backward()
    want_gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-4, atol=1e-6)
    assert metrics["clip_ratio/low_mean"] == pytest.approx(ours["clip_fraction/low"].item(), abs=1e-6)
    assert metrics["clip_ratio/high_mean"] == pytest.approx(ours["clip_fraction/high"].item(), abs=1e-6)
    assert metrics["clip_ratio/region_mean"] > 0
    for key in ("band/lower_mean", "band/upper_mean", "band/region_fraction", "kl/old_new", "nonfinite_fraction"):
        assert metrics[key] == pytest.approx(ours[key].item(), rel=1e-4, abs=1e-6)


def test_an_objective_given_as_an_object_decides_over_the_config(make_model, tokenizer, prompts, tmp_path):
    inputs = rollout(tokenizer)
    theirs = trl_trainer(tmp_path, make_model, tokenizer, prompts, loss_type="grpo", epsilon=0.1, epsilon_high=0.3)
    mine = Objective(bounds=Clip(0.1, 0.3), aggregation="seq-mean-token-mean")
    ours = band_trainer(tmp_path, make_model, tokenizer, prompts, objective=mine)
    want, got = loss_and_gradient(theirs, inputs), loss_and_gradient(ours, inputs)
    assert got[0] == want[0]
    assert torch.equal(got[1], want[1])


def test_other_surrogates_add_their_own_term(make_model, tokenizer, prompts, tmp_path):
    """The mask surrogate has the clip's gradient, through another technique (arXiv:2602.04879)."""
    inputs = rollout(tokenizer)
    make = saved(make_model, tmp_path)
    band = Band(KL, 0.02, max_ratio=None)
    options = {"loss_type": "grpo", "beta": 0.1}
    aggregation = "seq-mean-token-mean"
    through_epsilon = Objective(bounds=band, aggregation=aggregation)
    own = Objective(bounds=band, surrogate=mask, aggregation=aggregation)
    a, b = (
        loss_and_gradient(band_trainer(tmp_path, make, tokenizer, prompts, objective=o, **options), inputs)
        for o in (through_epsilon, own)
    )
    torch.testing.assert_close(a[1], b[1], rtol=1e-4, atol=1e-6)
    for key in ("clip_ratio/low_mean", "clip_ratio/high_mean", "kl", "entropy"):
        assert a[2][key] == pytest.approx(b[2][key])
    assert a[0] != b[0]


def test_bounds_are_rebuilt_for_each_token_and_epsilon_is_restored(make_model, tokenizer, prompts, tmp_path):
    trainer = named(tmp_path, make_model, tokenizer, prompts, "bandpo-kl")
    before = trainer.epsilon_low, trainer.epsilon_high
    loss_and_gradient(trainer, rollout(tokenizer))
    assert (trainer.epsilon_low, trainer.epsilon_high) == before
    with pytest.raises(KeyError):
        trainer._compute_loss(trainer.model, {"old_per_token_logps": torch.zeros(8, 6)})
    assert (trainer.epsilon_low, trainer.epsilon_high) == before


def test_config_follows_the_objective(tmp_path):
    def made(**changes):
        return BandGRPOConfig(**settings(tmp_path, **changes))

    assert (made().objective, made().loss_type, made().scale_rewards) == ("bandpo-kl", "grpo", "group")
    assert (made(objective="dr_grpo").loss_type, made(objective="dr_grpo").scale_rewards) == ("dr_grpo", "none")
    assert made(objective="gspo").importance_sampling_level == "sequence"
    assert made(objective="dapo").resolve().bounds == Clip(0.2, 0.28)
    assert made(objective="dapo", epsilon=0.1).resolve().bounds == Clip(0.1, 0.28)
    assert made(objective="grpo", epsilon=0.1).resolve().bounds == Clip(0.1, 0.1)
    assert made(objective="gspo", epsilon_high=0.2).resolve().bounds == Clip(3e-4, 0.2)
    assert made(objective="grpo", epsilon=0.1, epsilon_high=0.3).resolve().bounds == Clip(0.1, 0.3)
    assert made(loss_type="dapo").loss_type == "dapo"
    band = made(divergence="tv", radius=0.1, radius_upper=0.2, max_ratio=math.inf, relax=True).resolve().bounds
    assert band == Band(TV, (0.1, 0.2), max_ratio=None, relax=Clip(0.2, 0.28))
    assert made(objective="own_objective:MINE").resolve().name == "mine"
    # a config that went through its dict (checkpoints, `dataclasses.replace`) says the same
    first = made(objective="dapo", epsilon=0.1)
    again = made(
        objective="dapo", epsilon=first.epsilon, loss_type=first.loss_type, scale_rewards=first.scale_rewards,
        importance_sampling_level=first.importance_sampling_level,
    )  # fmt: skip
    assert again.resolve() == first.resolve()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epsilon": 0.3}, "epsilon=0.3.*would be ignored.*set radius"),
        ({"objective": "grpo", "radius": 0.1}, "radius=0.1 would be ignored.*fixed bounds"),
        ({"objective": "dcpo", "radius": 0.1}, "radius=0.1 would be ignored.*bounds of its own"),
        ({"objective": "bandpo"}, "bandpo.*did you mean"),
        ({"loss_type": "cispo"}, "cispo.*replaces the objective"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence'"),
        ({"radius": -1.0}, "radius.*-1.0"),
        ({"max_ratio": 0.5}, "max_ratio.*0.5"),
        ({"divergence": "js2"}, "js2"),
    ],
)
def test_config_refuses_what_would_be_ignored(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        BandGRPOConfig(**settings(tmp_path, **changes))


def test_trainer_refuses_what_it_cannot_honour(make_model, tokenizer, prompts, tmp_path, monkeypatch):
    make = partial(band_trainer, tmp_path, make_model, tokenizer, prompts)
    with pytest.raises(TypeError, match="BandGRPOConfig"):
        BandGRPOTrainer(model=make_model(), reward_funcs=reward, args=GRPOConfig(**settings(tmp_path)))
    for option in ({"delta": 4.0}, {"top_entropy_quantile": 0.2}, {"off_policy_mask_threshold": 0.5}):
        with pytest.raises(ValueError, match=next(iter(option))):
            make(objective=Objective(bounds=Band(), surrogate=mask), loss_type="dapo", **option)
    with pytest.raises(TypeError, match="learning_rat"):
        BandGRPOTrainer(model=make_model(), args=BandGRPOConfig(**settings(tmp_path)), learning_rat=1)
    patched = lambda self, model, inputs: None  # noqa: E731
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", patched)
    with pytest.raises(ValueError, match="patched loss"):
        make()


@pytest.mark.filterwarnings("default:The trust region of")
def test_warns_when_the_region_can_never_bind(make_model, tokenizer, prompts, tmp_path):
    with pytest.warns(UserWarning, match=r"can never bind.*num_iterations >= 2"):
        band_trainer(
            tmp_path,
            make_model,
            tokenizer,
            prompts,
            num_iterations=1,
            steps_per_generation=None,
            gradient_accumulation_steps=1,
        )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        band_trainer(tmp_path, make_model, tokenizer, prompts)
    assert not [w for w in seen if "never bind" in str(w.message)]


def train(folder, make_model, tokenizer, prompts, *, resume=None, **changes):
    trainer = named(folder, make_model, tokenizer, prompts, "bandpo-kl", **changes)
    trainer.train(resume_from_checkpoint=resume)
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return weights, trainer.state.log_history


@pytest.mark.parametrize("at", [8, 10, 11, 13], ids=lambda step: f"step{step}")
def test_resume_is_bit_exact_also_inside_a_rollout(at, make_model, tokenizer, prompts, tmp_path):
    """A rollout serves 4 optimiser steps here; step 8 ends one, 10, 11 and 13 fall inside the next ones."""
    common = {"max_steps": 20, "save_strategy": "steps", "save_steps": at, "learning_rate": 0.1}
    whole, log = train(tmp_path / "whole", make_model, tokenizer, prompts, **common)
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{at}")
    resumed, resumed_log = train(tmp_path / "resumed", make_model, tokenizer, prompts, resume=checkpoint, **common)
    assert torch.equal(whole, resumed)
    drop = (
        "train_runtime",
        "step_time",
        "update_time",
        "train_samples_per_second",
        "train_steps_per_second",
        "total_flos",
        "train_loss",
    )
    rows, resumed_rows = (
        [{k: v for k, v in row.items() if k not in drop} for row in rows if row["step"] > at]
        for rows in (log, resumed_log)
    )
    assert json.dumps(rows) == json.dumps(resumed_rows)
    clipped = [row["clip_ratio/region_mean"] for row in log if "clip_ratio/region_mean" in row]
    assert max(clipped) > 0  # the trust region acts in this test


def test_a_damaged_checkpoint_is_refused_and_true_takes_the_one_before(make_model, tokenizer, prompts, tmp_path):
    common = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, _ = train(tmp_path, make_model, tokenizer, prompts, **common)
    state = tmp_path / "checkpoint-4" / "bandpo_state_0.pt"
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"checkpoint-4 cannot be resumed: bandpo_state_0\.pt has \d+ bytes"):
        train(tmp_path, make_model, tokenizer, prompts, resume=str(tmp_path / "checkpoint-4"), **common)
    with pytest.warns(UserWarning, match=r"checkpoint-4 is not used: bandpo_state_0\.pt has"):
        resumed, log = train(tmp_path, make_model, tokenizer, prompts, resume=True, **common)
    assert torch.equal(whole, resumed)
    assert [row["step"] for row in log if "loss" in row] == [1, 2, 3, 4]


def test_model_card_names_the_paper(make_model, tokenizer, prompts, tmp_path):
    trainer = named(tmp_path, make_model, tokenizer, prompts, "bandpo-kl")
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert "2603.04918" in card
    assert "bandpo" in card
    assert f"[{citation.TITLE}](https://huggingface.co/papers/2603.04918)" in card
    assert citation.bibtex() in card and "Qiu, Xipeng" in card


def test_model_card_of_another_objective_names_its_own_paper(make_model, tokenizer, prompts, tmp_path):
    for name, paper in (("cispo", "2506.13585"), ("ipo", None)):
        trainer = named(tmp_path / name, make_model, tokenizer, prompts, name)
        trainer.create_model_card(model_name="tiny")
        card = (tmp_path / name / "README.md").read_text()
        assert f"trained with the objective '{name}' of bandpo" in card
        assert "2603.04918" not in card and "BandPO" not in card
        assert paper is None or f"](https://huggingface.co/papers/{paper})" in card


def test_lora_trains_only_adapters(make_model, tokenizer, prompts, tmp_path):
    from peft import LoraConfig

    trainer = BandGRPOTrainer(
        model=make_model(), reward_funcs=reward, args=BandGRPOConfig(**settings(tmp_path, max_steps=3)),
        train_dataset=prompts, processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("lora" in n for n in changed)


def test_eval_metrics_are_logged_apart(make_model, tokenizer, prompts, tmp_path):
    args = BandGRPOConfig(**settings(tmp_path, eval_strategy="no", per_device_eval_batch_size=8))
    trainer = BandGRPOTrainer(
        model=make_model(), reward_funcs=reward, args=args, train_dataset=prompts, processing_class=tokenizer,
        eval_dataset=prompts.select(range(2)),
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert any(k.startswith("eval_band/") for k in (metrics | trainer.state.log_history[-1]))
