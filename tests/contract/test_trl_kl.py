"""The KL to the reference in TRL: every term is that of `policy_loss`, whoever computes it; options are honoured or refused."""

import dataclasses
from typing import get_args

import pytest
import torch

from bandpo import OBJECTIVES, policy_loss
from bandpo.integrations.trl import BandGRPOConfig, BandGRPOTrainer
from bandpo.reference import ReferenceKL
from trl_runs import band_trainer, loss_and_gradient, named, reward, rollout, saved, settings, token_logprobs

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning", "ignore:.*pin_memory", "ignore:The trust region of",
    "ignore:Objective .* corrects for a sampler", "ignore:.*experimental", "ignore:The loss has a KL to the reference",
)  # fmt: skip
OURS = [("bandpo-kl", kl) for kl in get_args(ReferenceKL) if kl not in ("k3", "k3-ratio")] + [
    ("gspo", "k3-ratio"), ("luspo", "k1-unbiased"), ("dppo-tv", "k3-ratio"), ("tis", "k3-ratio"), ("dapo", "k1-ratio"),
]  # fmt: skip
THEIRS = [(name, kl) for name in ("bandpo-kl", "cispo", "topr") for kl in ("k3", "k3-ratio")] + [("gspo", "k3")]


@pytest.mark.parametrize(("name", "kl"), OURS + THEIRS)
def test_it_is_the_term_of_policy_loss(name, kl, make_model, tokenizer, prompts, tmp_path):
    trainer = named(tmp_path, saved(make_model, tmp_path), tokenizer, prompts, name, beta=0.3, kl=kl)
    assert trainer._own_kl == ((name, kl) in OURS)
    inputs = rollout(tokenizer)
    if name in ("dppo-tv", "tis"):
        noise = 0.5 * torch.randn(8, 6, generator=torch.Generator().manual_seed(3))
        inputs["sampling_per_token_logps"] = (inputs["old_per_token_logps"] + noise).clamp(max=-0.01)
    loss, gradient, log = loss_and_gradient(trainer, inputs)
    trainer.model.zero_grad()
    aggregation = trainer.objective.aggregation
    want, ours = policy_loss(
        logprobs=token_logprobs(trainer.model, inputs), old_logprobs=inputs["old_per_token_logps"],
        rollout_logprobs=inputs.get("sampling_per_token_logps"), ref_logprobs=inputs["ref_per_token_logps"],
        advantages=inputs["advantages"], mask=inputs["completion_mask"], objective=name, kl_coef=0.3, kl=kl,
        max_length=6 if aggregation == "seq-mean-token-sum-norm" else None,
    )  # fmt: skip
    want.backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    torch.testing.assert_close(loss, want.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=2e-5 * expected.abs().max().item())
    if kl != "k3-ratio" or (name, kl) in OURS:  # TRL logs what it adds, r·k3
        assert log["kl"] == pytest.approx(ours["kl/ref"].item(), rel=1e-4)
    assert trainer.beta == 0.3


@pytest.mark.parametrize("name", ["bandpo-kl", "gspo"])
def test_a_run_with_our_term_trains_and_logs_it(name, make_model, tokenizer, prompts, tmp_path):
    trainer = named(
        tmp_path, saved(make_model, tmp_path), tokenizer, prompts, name, beta=0.1, kl="k1-ratio", max_steps=3
    )
    trainer.train()
    logged = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert len(logged) == 3 and logged[0] == 0 and all(x >= 0 for x in logged) and logged[-1] > 0


def config(tmp_path, **changes):
    return BandGRPOConfig(**settings(tmp_path, **changes))


def test_the_options_follow_the_objective(tmp_path):
    own = config(tmp_path, objective="bandpo-kl-paper")
    assert (own.beta, own.kl, own.use_bias_correction_kl) == (0.001, "k3", False)
    assert config(tmp_path, objective="bandpo-kl-paper", beta=0.0).beta == 0
    assert config(tmp_path, objective="bandpo-kl-paper", beta=0.5).beta == 0.5
    plain = config(tmp_path)
    assert (plain.beta, plain.kl, plain.use_bias_correction_kl) == (0.0, "k3-ratio", True)
    for flag, kl in ((True, "k3-ratio"), (False, "k3")):
        assert config(tmp_path, use_bias_correction_kl=flag).kl == kl
    assert config(tmp_path, objective="gspo").use_bias_correction_kl is False  # we compute it
    for changes in ({}, {"kl": "k1"}, {"objective": "gspo"}, {"objective": "bandpo-kl-paper"}):
        first = config(tmp_path, **changes)
        again = dataclasses.replace(first, generation_batch_size=None)
        assert (again.beta, again.kl, again.use_bias_correction_kl) == (
            first.beta,
            first.kl,
            first.use_bias_correction_kl,
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl": "k4"}, "kl: got 'k4'; choose one of k1"),
        ({"kl": "k1", "use_bias_correction_kl": True}, "contradict"),
        ({"kl": "k3", "use_bias_correction_kl": True}, "contradict"),
        ({"kl": "k3-ratio", "use_bias_correction_kl": False}, "contradict"),
        ({"objective": "gspo", "use_bias_correction_kl": True}, "leave it unset"),
        ({"objective": "bandpo-kl-paper", "pruning": {"completions": 0.5}}, "KL term"),
        ({"objective": "bandpo-kl-paper", "pruning": {"completions": 0.5, "zeros": False}}, "beta=0.001.*KL term"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_an_objective_as_an_object_is_not_ignored(make_model, tokenizer, prompts, tmp_path):
    objective = dataclasses.replace(OBJECTIVES["bandpo-kl"], kl_coef=0.2, kl="k1-ratio", name="mine")
    source = saved(make_model, tmp_path)
    with pytest.raises(ValueError, match=r"beta=0.1, and the objective has kl_coef=0.2"):
        band_trainer(tmp_path, source, tokenizer, prompts, objective=objective, beta=0.1)
    for options in ({}, {"beta": 0.2, "kl": "k1-ratio"}):
        trainer = band_trainer(tmp_path, source, tokenizer, prompts, objective=objective, **options)
        assert trainer._own_kl and trainer.beta == 0.2 and trainer.args.kl == "k1-ratio"
    # A rollout anchor in the place of the old one: the ratio is no longer that of TRL.
    other = dataclasses.replace(OBJECTIVES["bandpo-kl"], anchor="rollout")
    assert band_trainer(tmp_path, source, tokenizer, prompts, objective=other, beta=0.2)._own_kl
    # The configuration names an objective whose KL is ours, and the object has one that TRL computes.
    args = BandGRPOConfig(**settings(tmp_path, objective="gspo", beta=0.2))
    assert args.use_bias_correction_kl is False
    own = BandGRPOTrainer(
        model=source(), reward_funcs=reward, args=args, train_dataset=prompts, processing_class=tokenizer,
        objective=OBJECTIVES["bandpo-kl"],
    )  # fmt: skip
    assert not own._own_kl and own.args.use_bias_correction_kl and args.use_bias_correction_kl is False


def test_a_kl_that_comes_with_the_objective_is_said(make_model, tokenizer, prompts, tmp_path):
    with pytest.warns(UserWarning, match=r"beta=0.001, the k3 of objective 'bandpo-kl-paper'.*that of KL\(π_ref ‖ π\)"):
        named(tmp_path, saved(make_model, tmp_path), tokenizer, prompts, "bandpo-kl-paper")
