"""What TRL computes around our objective where exponentials overflow, under the mask, and in groups of several rewards."""

import math
import statistics

import pytest
import torch

from bandpo.integrations.trl import BandGRPOConfig, BandGRPOTrainer
from bandpo.integrations.trl.signal import normalized_then_summed, without_signal
from trl_runs import loss_and_gradient, rollout, settings, token_logprobs

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning", "ignore:.*pin_memory", "ignore:The trust region of"
)

NAN = math.nan


@pytest.fixture
def make(make_model, tokenizer, prompts, tmp_path):
    def make(reward_funcs=lambda completions, **_: [0.0] * len(completions), **changes):
        path = str(tmp_path / "reference")
        make_model().save_pretrained(path)
        return BandGRPOTrainer(
            model=path, reward_funcs=reward_funcs, train_dataset=prompts, processing_class=tokenizer,
            args=BandGRPOConfig(**settings(tmp_path / "run", **changes)),
        )  # fmt: skip

    return make


def k3(ref, new):
    return (ref - new).exp() - (ref - new) - 1


@pytest.mark.parametrize("objective", ["bandpo-kl", "dapo", "cispo", "gmpo"])
@pytest.mark.parametrize("far", [-300.0, 90.0])
def test_a_ratio_that_overflows_has_no_gradient(make, tokenizer, objective, far):
    """The gradient is that of the batch in which the two tokens have advantage 0; their KL stays."""
    trainer = make(objective=objective, beta=0.04, use_bias_correction_kl=False)
    inputs = rollout(tokenizer)
    inputs["old_per_token_logps"][0, 1] = inputs["old_per_token_logps"][3, 0] = far
    loss, gradient, _ = loss_and_gradient(trainer, inputs)
    assert loss.isfinite() and gradient.isfinite().all()
    trainer.model.zero_grad()
    new, old, ref = token_logprobs(trainer.model, inputs), inputs["old_per_token_logps"], inputs["ref_per_token_logps"]
    mask, a = inputs["completion_mask"].bool(), inputs["advantages"].unsqueeze(1)
    bounds = trainer.objective.bounds(old)
    held = (new - old).clamp(-40, 40)
    if objective == "gmpo":
        clamped = held.clamp(bounds.lower.log(), bounds.upper.log())
        x = torch.where(a < 0, torch.maximum(held, clamped), torch.minimum(held, clamped))
        value = (torch.where(mask, x, 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True)).exp() * a
    elif objective == "cispo":
        value = held.detach().exp().clamp(max=5.0) * a * new
    else:
        value = torch.minimum(held.exp() * a, held.exp().clamp(bounds.lower, bounds.upper) * a)
    per_token = torch.where(mask, 0.04 * k3(ref, new) - value, 0.0)
    whole = trainer.loss_type == "dapo"
    (per_token.sum() / mask.sum() if whole else (per_token.sum(1) / mask.sum(1)).mean()).backward()
    want = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradient, want, rtol=1e-3, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("objective", ["bandpo-kl", "gspo", "cispo"])
def test_a_kl_term_that_overflows_has_no_gradient(make, tokenizer, objective):
    """exp(ref - new) is finite up to 88: one token far from the reference must not decide the step, nor end it."""
    trainer = make(objective=objective, beta=0.1)
    clean = rollout(tokenizer)
    far = {**clean, "ref_per_token_logps": clean["ref_per_token_logps"].clone()}
    far["ref_per_token_logps"][0, 1] = 200.0
    loss, gradient, log = loss_and_gradient(trainer, far)
    assert loss.isfinite() and gradient.isfinite().all() and math.isfinite(log["kl"])
    new = token_logprobs(trainer.model, clean).detach()
    clean["ref_per_token_logps"] = clean["ref_per_token_logps"].clone()
    clean["ref_per_token_logps"][0, 1] = new[0, 1]  # where k3 has no gradient
    _, want, _ = loss_and_gradient(trainer, clean)
    torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-6 * want.abs().max().item())


@pytest.mark.parametrize("objective", ["bandpo-kl", "gspo", "cispo"])
@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_what_stands_in_padding_never_matters(make, tokenizer, objective, value):
    trainer = make(objective=objective, beta=0.1)
    clean = rollout(tokenizer)
    padding = clean["completion_mask"] == 0
    dirty = dict(clean)
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        dirty[name] = clean[name].masked_fill(padding, value)
    want, want_gradient, want_log = loss_and_gradient(trainer, clean)
    loss, gradient, log = loss_and_gradient(trainer, dirty)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-5, atol=1e-6 * want_gradient.abs().max().item())
    assert log["nonfinite_fraction"] == 0
    for name in ("kl", "clip_ratio/region_mean", "ratio/mean"):
        if name in want_log:
            assert log[name] == pytest.approx(want_log[name], rel=1e-5)


def test_equal_rewards_of_one_function_have_no_share_in_the_advantages(make, prompts):
    """Seven rewards of 12345.678 counted as -0.85 each, beside the signal of the other function, and moved the other group."""
    half = lambda completions, **_: [float(i % 2) for i in range(len(completions))]  # noqa: E731
    found = {}
    for value in (0.0, 12345.678):
        trainer = make(
            objective="grpo", num_generations=7, per_device_train_batch_size=7, reward_weights=[1.0, 3.0],
            multi_objective_aggregation="normalize_then_sum",
            reward_funcs=[half, lambda completions, value=value, **_: [value] * 7 + [0.0] * 7],
        )  # fmt: skip
        trainer.model.train()
        found[value] = trainer._generate_and_score_completions([prompts[i] for i in range(2) for _ in range(7)])[
            "advantages"
        ]
    torch.testing.assert_close(found[12345.678], found[0.0], rtol=0, atol=1e-6)
    assert found[0.0].abs().min() > 0.5


def test_normalised_then_summed_by_the_statistics_module():
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(12, 3, generator=g, dtype=torch.float64)
    rewards[torch.rand(12, 3, generator=g) < 0.2] = NAN
    rewards[4] = NAN
    weights = torch.tensor([1.0, 0.5, -2.0])
    total = [0.0] * 12
    for k in range(3):
        for start in range(0, 12, 4):
            known = [x for x in rewards[start : start + 4, k].tolist() if x == x]
            for i in range(start, start + 4):
                x = rewards[i, k].item()
                if x == x and len(known) > 1:
                    total[i] += weights[k].item() * (x - statistics.mean(known)) / (statistics.stdev(known) + 1e-4)
    known = [t for i, t in enumerate(total) if i != 4]
    mean, std = statistics.mean(known), statistics.stdev(known)
    want = [0.0 if i == 4 else (t - mean) / (std + 1e-4) for i, t in enumerate(total)]
    torch.testing.assert_close(normalized_then_summed(rewards, weights, 4), torch.tensor(want, dtype=torch.float64))


def test_a_function_of_weight_0_gives_no_signal():
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    for first in (True, False):
        assert without_signal(rewards, torch.tensor([1.0, 0.0]), 2, summed_first=first).tolist() == [True, False]
