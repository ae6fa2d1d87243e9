"""The objectives against verl's own losses, in value and gradient. verl needs other versions than TRL: `make test-verl`."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("verl", reason="verl has an environment of its own; `make test` runs this file there (.venv-verl)")
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

from bandpo import OBJECTIVES, aggregate, group_advantages
from bandpo.experimental import clip_cov, kl_cov
from bandpo.surrogates.corrections import TIS, IcePop
from batches import batch, max_length, run
from verl_losses import clip, verl_loss

AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


CASES = {
    # our name: verl's, its options, whether the value is the same function (a mask's is not: verl logs A·r·log π)
    "grpo": ("vanilla", clip(0.2, 0.2), True),
    "dr_grpo": ("vanilla", clip(0.2, 0.2), True),
    "dapo": ("vanilla", clip(0.2, 0.28), True),
    "dual-clip": ("vanilla", clip(0.2, 0.2, c=3.0), True),
    "gspo": ("gspo", clip(3e-4, 4e-4), True),
    "sapo": ("sapo", {"tau_pos": 1.0, "tau_neg": 1.05}, True),
    "gmpo": ("geo_mean", clip(0.4, 0.4), True),
    "cispo": ("cispo", clip(1.0, 4.0), True),
    "dppo-tv": ("dppo_tv", clip(0.15, 0.15), False),
    "dppo-kl": ("dppo_kl", clip(0.05, 0.05), False),
    "dro": ("dro", {"policy_loss_dro_beta": 0.05}, True),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("spread", [0.6, 1e-3])
def test_objective_is_verl_s(name, spread):
    mode, options, same_value = CASES[name]
    objective = OBJECTIVES[name]
    for seed in range(5):
        data = batch(seed, spread=spread)
        want, want_gradient, theirs = verl_loss(mode, data, objective.aggregation, **options)
        ours = {**data, "rollout_logprobs": data["old_logprobs"]}
        loss, gradient, metrics = run(objective, ours)
        # verl divides by lengths + 1e-8, and its KL adds 1e-8 inside the logs, next to probabilities of 1e-6 here
        torch.testing.assert_close(gradient, want_gradient, rtol=1e-7, atol=1e-15)
        if same_value:
            torch.testing.assert_close(loss, want, rtol=1e-7, atol=3e-8)  # a sum of rows of size 1 that nearly cancel
        if name in ("grpo", "dapo", "gspo", "dppo-tv", "dppo-kl"):
            assert metrics["clip_fraction/any"].item() == pytest.approx(theirs["actor/pg_clipfrac"], abs=1e-6)


def with_holes(seed, spread):
    """Holes as tool calls leave them, a row of one token, and an advantage for each token."""
    data = batch(seed, spread=spread)
    data["mask"][0, 3] = data["mask"][4, 0] = data["mask"][4, 7] = data["mask"][3, 2] = False
    g = torch.Generator().manual_seed(100 + seed)
    return {**data, "advantages": torch.randn(data["mask"].shape, generator=g, dtype=torch.float64)}


PER_TOKEN = [(name, how) for name in ("grpo", "dual-clip", "cispo", "dro", "gspo", "luspo") for how in AGGREGATIONS]


@pytest.mark.parametrize(("name", "aggregation"), [*PER_TOKEN, ("sapo", "seq-mean-token-mean")])  # sapo has no other
@pytest.mark.parametrize("spread", [0.6, 1e-3])
def test_advantages_per_token_and_holes_are_verl_s(name, aggregation, spread):
    """verl's `gspo` is GSPO-token (arXiv:2507.18071, sec. 4.3); with LUSPO's widths it is the ratio of `luspo`."""
    mode, options, _ = CASES["gspo"] if name == "luspo" else CASES[name]
    options = clip(2e-3, 2.5e-3) if name == "luspo" else options
    objective = dataclasses.replace(OBJECTIVES[name], aggregation=aggregation)
    for seed in range(3):
        data = with_holes(seed, spread)
        want, want_gradient, _ = verl_loss(mode, data, aggregation, **options)
        loss, gradient, _ = run(objective, data)
        torch.testing.assert_close(loss, want, rtol=1e-7, atol=3e-8)
        torch.testing.assert_close(gradient, want_gradient, rtol=1e-7, atol=1e-15)
        assert (gradient[~data["mask"]] == 0).all()


def test_gmpo_is_verl_s_with_holes_and_has_advantages_of_its_own():
    """verl's `geo_mean` takes the mean advantage of a sequence; ours moves each token by its own, with the same loss."""
    for seed in range(3):
        data = with_holes(seed, 0.6)
        data["advantages"] = data["advantages"].abs()  # the side of each clip is the same for both
        objective = OBJECTIVES["gmpo"]
        want, want_gradient, _ = verl_loss("geo_mean", data, objective.aggregation, **CASES["gmpo"][1])
        loss, gradient, _ = run(objective, data)
        torch.testing.assert_close(loss, want, rtol=1e-7, atol=3e-8)
        a, valid = data["advantages"], data["mask"]
        mean = (a * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True)
        torch.testing.assert_close(gradient, want_gradient * a / mean, rtol=1e-7, atol=1e-15)
        one = {**data, "advantages": data["advantages"][:, 0]}
        want, want_gradient, _ = verl_loss("geo_mean", one, objective.aggregation, **CASES["gmpo"][1])
        loss, gradient, _ = run(objective, one)
        torch.testing.assert_close(gradient, want_gradient, rtol=1e-7, atol=1e-15)


def test_clip_cov_is_verl_s_where_all_candidates_are_taken():
    for seed in range(5):
        data = batch(seed, spread=0.1)
        options = {"policy_loss_clip_cov_ratio": 1.0, "policy_loss_clip_cov_lb": 0.2, "policy_loss_clip_cov_ub": 5.0}
        want, want_gradient, theirs = verl_loss("clip_cov", data, "token-mean", **clip(0.2, 0.2), **options)
        objective = dataclasses.replace(OBJECTIVES["clip-cov"], surrogate=partial(clip_cov, share=1.0, low=0.2))
        loss, gradient, _ = run(objective, data)
        assert theirs["actor/pg_clipfrac"] > 0
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient, want_gradient, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("share", [2e-4, 0.1, 0.5])
def test_kl_cov_is_verl_s(share):
    for seed in range(1, 6):  # batch 0 has ties in its third place
        data = batch(seed)
        options = {"policy_loss_kl_cov_ratio": share, "policy_loss_ppo_kl_coef": 0.1}
        want, want_gradient, _ = verl_loss("kl_cov", data, "token-mean", **options)
        objective = dataclasses.replace(OBJECTIVES["kl-cov"], surrogate=partial(kl_cov, share=share, beta=0.1))
        loss, gradient, _ = run(objective, data)
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient, want_gradient, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", ["tis", "icepop"])
def test_corrections_are_verl_s(name, level):
    correction = TIS(2.0, level) if name == "tis" else IcePop(0.5, 5.0, level)
    threshold = 2.0 if name == "tis" else "0.5_5.0"
    data = batch()
    noise = 0.7 * torch.randn(data["logprobs"].shape, generator=torch.Generator().manual_seed(1)).double()
    weights, _ = compute_rollout_correction_weights(-noise, data["mask"].double(), level, threshold)
    ours = correction(-noise, data["mask"]).expand(weights.shape)
    torch.testing.assert_close(ours[data["mask"]], weights[data["mask"]], rtol=1e-12, atol=0)
    objective = dataclasses.replace(OBJECTIVES[name], correction=correction)
    want, want_gradient, _ = verl_loss("vanilla", data, objective.aggregation, weights=weights, **clip(0.2, 0.2))
    loss, gradient, metrics = run(objective, {**data, "rollout_logprobs": data["old_logprobs"] + noise})
    torch.testing.assert_close(loss, want, rtol=1e-7, atol=3e-8)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-7, atol=1e-15)
    assert (metrics["correction/zero_fraction"] > 0) == (name == "icepop")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations_are_verl_s(aggregation):
    data = batch()
    values, valid = data["logprobs"], data["mask"]
    factor = max_length(aggregation)
    want = core_algos.agg_loss(values, valid.double(), aggregation, loss_scale_factor=factor)
    torch.testing.assert_close(aggregate(values, valid, aggregation, max_length=factor), want, rtol=1e-7, atol=0)


@pytest.mark.parametrize(("kind", "scaled"), [("std", True), ("mean", False)])
def test_group_advantages_are_verl_s(kind, scaled):
    rewards = torch.rand(24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    want, _ = core_algos.compute_grpo_outcome_advantage(
        rewards.unsqueeze(1),
        torch.ones(24, 1),
        np.repeat(np.arange(6), 4),
        epsilon=1e-6,
        norm_adv_by_std_in_grpo=scaled,
    )
    ours = group_advantages(rewards, 4, kind=kind, eps=1e-6)
    torch.testing.assert_close(ours, want.squeeze(1).double(), rtol=1e-6, atol=1e-7)
