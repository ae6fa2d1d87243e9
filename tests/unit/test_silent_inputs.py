"""Inputs that gave a wrong number without a word: ids without order or value, labels as masks, float16 sums, torch.func."""

import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from bandpo import OBJECTIVES, Clip, aggregate, group_advantages, match_radius, policy_loss, radius_for
from bandpo.bounds.calibration import outside_fraction
from bandpo.experimental import Balanced
from bandpo.preference.losses import kto_loss
from bandpo.preference.probe import pool_hidden
from bandpo.surrogates.corrections import TIS
from bandpo.surrogates.sequence import future_weighted, geometric_mean

NAN = math.nan


@pytest.mark.parametrize(
    "ids",
    [list(torch.tensor([0, 0, 1, 1])), {0: 0, 1: 0, 2: 1, 3: 1}, {1, 2, 3, 4}, {0: 0, 1: 0, 2: 1, 3: 1}.keys()],
    ids=["list of tensors", "dict", "set", "keys"],
)
def test_ids_that_make_every_completion_a_group_of_its_own_are_refused(ids):
    """Equal tensors have different hashes, and a set has no order: every advantage was 0."""
    with pytest.raises(TypeError, match="group_ids"):
        group_advantages(torch.tensor([1.0, 0.0, 3.0, 1.0]), group_ids=ids)


def tokens():
    x = torch.linspace(-0.5, 0.5, 1001)
    return {"log_ratio": x, "old_logprobs": torch.full_like(x, -0.7), "advantages": x.sign()}


MEASURES = {
    "radius_for": lambda batch: radius_for("kl", 0.1, batch),
    "outside_fraction": lambda batch: outside_fraction(Clip(0.2), batch),
    "match_radius": lambda batch: match_radius("tv", like=Clip(0.2), by="outside_fraction", batch=batch),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_calibration_refuses_labels_as_a_mask(measure):
    batch = tokens()
    with pytest.raises(ValueError, match="labels != -100"):
        MEASURES[measure]({**batch, "mask": torch.where(torch.arange(1001) % 2 == 0, -100, 1)})


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", ["log_ratio", "old_logprobs", "advantages"])
@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf, -3e38])
def test_calibration_leaves_out_what_policy_metrics_leaves_out(measure, name, value):
    if (name, value) == ("advantages", -3e38):
        pytest.skip("an advantage of any size is a number")
    batch = tokens()
    batch[name] = batch[name].clone()
    strange = torch.arange(1001) % 7 == 3
    batch[name][strange] = value
    kept = {k: v[~strange] for k, v in batch.items()}
    assert MEASURES[measure](batch) == pytest.approx(MEASURES[measure](kept), rel=1e-12)


def test_labels_are_no_mask_for_the_parts_either():
    labels, x = torch.tensor([[1, -100]]), torch.zeros(1, 2)
    bounds = Clip(0.2)(x)
    for call in (
        lambda: TIS(2.0, "sequence")(x, labels),
        lambda: Balanced()(x, log_ratio=x, advantages=x, mask=labels),
        lambda: geometric_mean(x, x, bounds, mask=labels),
        lambda: pool_hidden([torch.zeros(1, 2, 3)], labels),
    ):
        with pytest.raises(ValueError, match="labels != -100"):
            call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "token-sum"])
def test_sums_of_16_bit_values_have_float32_s_range(dtype, aggregation):
    """140,000 tokens are infinity in float16: the mean was 0."""
    values, mask = torch.full((2, 70_000), 1.5, dtype=dtype), torch.ones(2, 70_000)
    found = aggregate(values, mask, aggregation)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(aggregate(values.double(), mask, aggregation).item(), rel=1e-6)


def test_kl_to_the_reference_is_a_mean_over_tokens_that_have_one():
    logp = torch.full((1, 4), -1.0)
    ref = torch.tensor([[-1.5, NAN, -1.5, -math.inf]])
    for kl_coef in (0.0, 0.1):
        _, metrics = policy_loss(
            logprobs=logp, old_logprobs=logp, advantages=torch.ones(1), mask=torch.ones(1, 4), ref_logprobs=ref,
            kl_coef=kl_coef,
        )  # fmt: skip
        assert metrics["kl/ref"].item() == pytest.approx(math.exp(-0.5) - 0.5, rel=1e-6)


def per_sample(mask):
    old = torch.tensor([[[-1.0, -2.0, -0.5]], [[-3.0, -0.1, -1.0]]])

    def loss(logp, old, mask):
        return policy_loss(
            logprobs=logp, old_logprobs=old, advantages=torch.ones(1), mask=mask, objective="bandpo-kl"
        )[0]  # fmt: skip

    return loss, old + 0.1, old, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool], ids=str)
def test_gradients_by_sample_take_masks_of_0_and_1(dtype):
    mask = torch.tensor([[[1, 0, 1]], [[1, 1, 1]]]).to(dtype)
    loss, new, old, mask = per_sample(mask)
    found = torch.func.vmap(torch.func.grad(loss))(new, old, mask)
    for i in range(2):
        leaf = new[i].clone().requires_grad_()
        (want,) = torch.autograd.grad(loss(leaf, old[i], mask[i]), leaf)
        torch.testing.assert_close(found[i], want)
    if dtype != torch.bool:
        with pytest.raises(ValueError, match="got -100"):
            torch.func.vmap(torch.func.grad(loss))(new, old, torch.where(mask == 0, -100, mask))
    traced = make_fx(loss)(new[0], old[0], mask[0])
    torch.testing.assert_close(traced(new[1], old[1], mask[1]), loss(new[1], old[1], mask[1]))


def test_preference_losses_by_sample():
    x, good = torch.tensor([1.0, -2.0]), torch.tensor([True, False])

    def loss(x, good, kl):
        return kto_loss(x.unsqueeze(0), good.unsqueeze(0), kl).sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(0, 0, None))(x, good, torch.tensor(0.1))
    for i in range(2):
        leaf = x[i].clone().requires_grad_()
        (want,) = torch.autograd.grad(loss(leaf, good[i], torch.tensor(0.1)), leaf)
        torch.testing.assert_close(found[i], want)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_log_prob_above_0_is_held_at_0_and_no_nan(name):
    """Found by fuzzing: exp(88.7) is infinite in float32, and infinity times a distance of 0 is NaN."""
    objective = OBJECTIVES[name]
    if objective.extras:
        pytest.skip("its extras are of another kind")
    logp = torch.full((2, 3), -1.0)
    logp[0, 1] = 88.73
    new = logp.clone().requires_grad_()
    loss, _ = policy_loss(
        logprobs=new, old_logprobs=logp, rollout_logprobs=logp, ref_logprobs=logp, advantages=torch.ones(2, 3),
        mask=torch.ones(2, 3, dtype=torch.bool), objective=objective,
        max_length=3 if objective.aggregation == "seq-mean-token-sum-norm" else None,
    )  # fmt: skip
    loss.backward()
    assert loss.isfinite() and new.grad.isfinite().all()


@pytest.mark.parametrize("half_life", [math.inf, 0.0, NAN])
def test_a_half_life_that_the_discount_cannot_have_is_refused(half_life):
    """An infinite one doubled its window until an integer overflowed."""
    x = torch.zeros(1, 2)
    edges = Clip(0.2)(x)
    with pytest.raises(ValueError, match="half_life must be a positive, finite number"):
        future_weighted(x, x + 1, edges, mask=x == 0, half_life=half_life)
