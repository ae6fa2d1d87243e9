"""Sequence filters in TRL: TRL's own off-policy mask and sequence mask, the loss of `policy_loss`, and the log."""

import dataclasses
import math

import pytest
import torch
from trl import GRPOTrainer

from bandpo import OBJECTIVES, policy_loss
from bandpo.integrations.trl.strategy import HostComputes, WeCompute
from bandpo.surrogates.filters import SequenceFilter, geometric_mask, opsm, seq_mis, trust_region_mask, vaco
from trl_runs import band_trainer, loss_and_gradient, rollout, token_logprobs, trl_trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning", "ignore:.*pin_memory", "ignore:The trust region of",
    "ignore:Objective .* corrects for a sampler", "ignore:Objective .* has a filter", "ignore:.*experimental",
)  # fmt: skip

DELTA = 0.3


def sampled(tokenizer, seed=0, *, per_token=False):
    """A batch with log-probs of a sampler that is not the old policy, and a hole in a mask (a tool's tokens)."""
    g, inputs = torch.Generator().manual_seed(10 + seed), rollout(tokenizer, seed)
    inputs["sampling_per_token_logps"] = inputs["old_per_token_logps"] + 0.3 * torch.randn(8, 6, generator=g)
    inputs["tool_mask"] = torch.ones(8, 6, dtype=torch.long)
    inputs["tool_mask"][0, 2:4] = 0
    if per_token:
        inputs["advantages"] = torch.randn(8, 6, generator=g)
    return inputs


def close(got, want):
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    scale = want[1].abs().max().item()
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("name", ["grpo", "dapo", "cispo"])
def test_opsm_is_trl_s(name, per_token, make_model, tokenizer, prompts, tmp_path):
    """Value and gradient; dropped sequences stay in the denominators."""
    theirs = trl_trainer(
        tmp_path, make_model, tokenizer, prompts, loss_type=name, off_policy_mask_threshold=DELTA,
        **({"epsilon_high": 0.28} if name == "dapo" else {"epsilon_high": 5.0} if name == "cispo" else {}),
    )  # fmt: skip
    objective = dataclasses.replace(OBJECTIVES[name], filter=opsm(DELTA))
    changes = {"objective": objective, "loss_type": "grpo" if name == "grpo" else "dapo"}
    if name == "cispo":
        changes["scale_rewards"] = "group"
    ours = band_trainer(tmp_path, make_model, tokenizer, prompts, **changes)
    assert isinstance(ours._strategy, WeCompute)
    seen = []
    for seed in range(3):
        inputs = sampled(tokenizer, seed, per_token=per_token)
        want, got = loss_and_gradient(theirs, inputs), loss_and_gradient(ours, inputs)
        close(got, want)
        seen.append(got[2]["filter/kept_fraction"])
        mask = inputs["completion_mask"] * inputs["tool_mask"]
        a = inputs["advantages"]
        keep = GRPOTrainer.get_off_policy_mask(
            a if per_token else a.unsqueeze(1), token_logprobs(ours.model, inputs).detach(),
            inputs["sampling_per_token_logps"], mask, DELTA,
        )  # fmt: skip
        assert seen[-1] == pytest.approx(((keep * mask).sum() / mask.sum()).item(), rel=1e-6)
    assert min(seen) < 1 and max(seen) > 0


def test_opsm_measures_the_old_policy_where_there_is_no_sampler(make_model, tokenizer, prompts, tmp_path):
    theirs = trl_trainer(tmp_path, make_model, tokenizer, prompts, loss_type="grpo", off_policy_mask_threshold=DELTA)
    for policies in ("policy/rollout", "policy/old"):
        objective = dataclasses.replace(OBJECTIVES["grpo"], filter=opsm(DELTA, policies=policies))
        ours = band_trainer(tmp_path, make_model, tokenizer, prompts, objective=objective, loss_type="grpo")
        inputs = rollout(tokenizer, 1)
        got = loss_and_gradient(ours, inputs)
        close(got, loss_and_gradient(theirs, inputs))
        assert 0 < got[2]["filter/kept_fraction"] < 1


@pytest.mark.parametrize("filters", [seq_mis(0.0, 3.0), geometric_mask(0.95, 1.05), trust_region_mask(12.0), vaco(0.2)])
def test_a_filter_in_trl_is_that_of_policy_loss(filters, make_model, tokenizer, prompts, tmp_path):
    objective = dataclasses.replace(OBJECTIVES["bandpo-kl"], filter=filters)
    trainer = band_trainer(tmp_path, make_model, tokenizer, prompts, objective=objective)
    inputs = sampled(tokenizer, 4)
    loss, gradient, metrics = loss_and_gradient(trainer, inputs)
    trainer.model.zero_grad()
    want, ours = policy_loss(
        logprobs=token_logprobs(trainer.model, inputs), old_logprobs=inputs["old_per_token_logps"],
        advantages=inputs["advantages"], mask=inputs["completion_mask"] * inputs["tool_mask"], objective=objective,
        rollout_logprobs=inputs["sampling_per_token_logps"],
    )  # fmt: skip
    want.backward()
    want_gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    close((loss, gradient), (want.detach(), want_gradient))
    for key in (k for k in ours if k.startswith(("filter/", "correction/"))):
        assert metrics[key] == pytest.approx(ours[key].item(), rel=1e-5), key
    assert 0 < ours["filter/kept_fraction"] < 1 or filters == seq_mis(0.0, 3.0)


def test_seq_mis_is_trl_s_sequence_mask(make_model, tokenizer, prompts, tmp_path):
    """TRL computes its weights with the rollout: here by its formula, `exp(Σ log π_old - log μ)`, 0 above the limit."""
    theirs = trl_trainer(tmp_path, make_model, tokenizer, prompts, loss_type="grpo")
    theirs.use_vllm = theirs.vllm_importance_sampling_correction = True
    objective = dataclasses.replace(OBJECTIVES["grpo"], filter=seq_mis(0.0, 1.2))
    ours = band_trainer(tmp_path, make_model, tokenizer, prompts, objective=objective, loss_type="grpo")
    inputs = sampled(tokenizer, 2)
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    ratio = ((inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]) * mask).sum(-1, keepdim=True).exp()
    inputs["importance_sampling_ratio"] = ratio.masked_fill(ratio > 1.2, 0.0)
    got = loss_and_gradient(ours, inputs)
    close(got, loss_and_gradient(theirs, inputs))
    assert 0 < got[2]["filter/kept_sequence_fraction"] < 1


def test_the_log_pools_micro_batches_and_training_runs(make_model, tokenizer, prompts, tmp_path):
    objective = dataclasses.replace(OBJECTIVES["bandpo-kl"], filter=opsm(1e-3, policies="policy/old"))
    trainer = band_trainer(
        tmp_path, make_model, tokenizer, prompts, objective=objective, max_steps=4, gradient_accumulation_steps=2,
        steps_per_generation=4,
    )  # fmt: skip
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 4 and all(math.isfinite(row["loss"]) for row in rows)
    for row in rows:  # with weights of 0 and 1 the two shares are the same
        assert row["correction/effective_sample_size"] == pytest.approx(row["filter/kept_fraction"], abs=1e-6)
    assert any(row["filter/kept_fraction"] < 1 for row in rows)


def test_a_token_that_vllm_could_not_score_is_measured_against_the_old_policy(make_model, tokenizer, prompts, tmp_path):
    objective = dataclasses.replace(OBJECTIVES["grpo"], filter=geometric_mask(0.9, 1.1))
    trainer = band_trainer(tmp_path, make_model, tokenizer, prompts, objective=objective, loss_type="grpo")
    inputs = sampled(tokenizer, 3)
    scored = dict(inputs, sampling_per_token_logps=inputs["sampling_per_token_logps"].clone())
    scored["sampling_per_token_logps"][0, 0] = inputs["old_per_token_logps"][0, 0]
    inputs["sampling_per_token_logps"][0, 0] = math.nan
    close(loss_and_gradient(trainer, inputs), loss_and_gradient(trainer, scored))


def test_what_trl_cannot_do_is_refused_or_said(make_model, tokenizer, prompts, tmp_path):
    def make(filters, **changes):
        objective = dataclasses.replace(OBJECTIVES["bandpo-kl"], filter=filters)
        return band_trainer(tmp_path, make_model, tokenizer, prompts, objective=objective, **changes)

    with pytest.raises(ValueError, match="counts='kept'"):
        make(geometric_mask(counts="kept"))
    with pytest.raises(ValueError, match=r"off_policy_mask_threshold=0.1 .*filters.opsm"):
        make(opsm(0.1), off_policy_mask_threshold=0.1)
    with pytest.raises(ValueError, match="count the mismatch twice"):
        make(seq_mis(0.5, 2.0), use_vllm=True)
    with pytest.raises(ValueError, match="looks at the whole batch"):
        make(vaco(0.1, over="batch"), pruning={"completions": 0.5})
    with pytest.warns(UserWarning, match="every log-ratio is 0"):
        make(geometric_mask())
    assert HostComputes.can_compute(OBJECTIVES["bandpo-kl"])
    assert not HostComputes.can_compute(
        dataclasses.replace(OBJECTIVES["bandpo-kl"], filter=SequenceFilter("k3", "max", high=0.1))
    )
