"""Sequence filters against verl's rejection sampling (`rollout_rs`): its masks, its loss and gradient, and in verl's place."""

import dataclasses
import math

import pytest
import torch

pytest.importorskip("verl", reason="verl has an environment of its own; `make test` runs this file there (.venv-verl)")
from verl.trainer.ppo.rollout_corr_helper import (
    SUPPORTED_ROLLOUT_RS_OPTIONS,
    compute_rollout_correction_and_rejection_mask,
    compute_rollout_correction_weights,
    compute_rollout_rejection_mask,
)
from verl.workers.config import ActorConfig

import bandpo.integrations.verl as adapter
from bandpo import OBJECTIVES, policy_loss, token_objective
from bandpo.surrogates.corrections import TIS
from bandpo.surrogates.filters import geometric_mask, opsm, rollout_rs, seq_mis, trust_region_mask
from batches import B, T, batch, run
from verl_losses import clip, verl_loss

THRESHOLDS = {"token": (0.02, 0.05), "seq_sum": (0.1, 0.25), "seq_mean": (0.03, 0.04), "seq_max": (0.1, 0.2)}
RATIOS = {"token": ("0.9_1.15", 1.2), "seq_sum": ("0.5_1.6", 1.5), "seq_mean": ("0.9_1.15", 1.2)}
CASES = [
    (name, limit)
    for name in sorted(SUPPORTED_ROLLOUT_RS_OPTIONS)
    for limit in (RATIOS if name.endswith("k1") else THRESHOLDS)[name[:-3]]
]
CASES += [("token_k1,seq_mean_k3", "0.7_1.4,0.04"), ("seq_max_k2,seq_mean_k1", "0.2,1.1"), ("token_k3,seq_max_k3", 0.2)]


def data_of(seed, spread=0.25):
    data, g = batch(seed), torch.Generator().manual_seed(40 + seed)
    data["mask"] = data["mask"] & (torch.rand(B, T, generator=g) > 0.2)
    data["mask"][3] = seed % 2 == 0  # a row without tokens
    data["rollout_logprobs"] = data["old_logprobs"] + spread * torch.randn(B, T, generator=g, dtype=torch.float64)
    return data


@pytest.mark.parametrize(("options", "limit"), CASES)
def test_every_mode_of_rollout_rs_is_verl_s(options, limit):
    """The mask, and the loss with it: verl takes dropped tokens out of the response mask, and with that of the denominators."""
    seen = set()
    for seed in range(6):
        data = data_of(seed)
        want, _ = compute_rollout_rejection_mask(
            data["old_logprobs"] - data["rollout_logprobs"], data["mask"].double(), options, limit
        )
        objective = dataclasses.replace(OBJECTIVES["dapo"], filter=rollout_rs(options, limit))
        keep = token_objective(objective, **data).filter_weights.expand(B, T).bool() & data["mask"]
        assert torch.equal(keep, want.bool())
        seen |= set(keep[data["mask"]].tolist())
        if not want.any():  # verl's mean over nothing is NaN, ours is 0
            continue
        for aggregation in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"):
            host = verl_loss("vanilla", {**data, "mask": want.bool()}, aggregation, **clip(0.2, 0.28))
            loss, gradient, metrics = run(dataclasses.replace(objective, aggregation=aggregation), data)
            torch.testing.assert_close(loss, host[0], rtol=1e-7, atol=3e-8)
            torch.testing.assert_close(gradient, host[1], rtol=1e-7, atol=1e-15)
            assert metrics["filter/kept_fraction"].item() == pytest.approx((want.sum() / data["mask"].sum()).item())
    assert seen == {True, False}


def test_the_recipes_are_verl_s_presets():
    """Geo-RS, Seq-MIS and TRM by verl's own names; its ratios of k1 are those of the sampler to the old policy."""
    data = data_of(1)
    x, mask = data["old_logprobs"] - data["rollout_logprobs"], data["mask"].double()

    def ours(filters):
        terms = token_objective(dataclasses.replace(OBJECTIVES["dapo"], filter=filters), **data)
        weights = 1.0 if terms.weights is None else terms.weights
        return (terms.filter_weights * weights * mask).expand(B, T)

    for filters, options, limit in (
        (geometric_mask(0.9, 1.25), "seq_mean_k1", f"{1 / 1.25}_{1 / 0.9}"),
        (trust_region_mask(0.1, 0.03, policies="old/rollout"), "seq_max_k3,seq_mean_k3", "0.1,0.03"),
        (trust_region_mask(0.1, estimator="k2", policies="old/rollout"), "seq_max_k2", 0.1),
    ):
        want, _ = compute_rollout_rejection_mask(x, mask, options, limit)
        torch.testing.assert_close(ours(filters), want, rtol=0, atol=0)
        assert 0 < want.sum() < mask.sum()
    kept, _ = compute_rollout_rejection_mask(x, mask, "seq_sum_k1", f"{1 / 1.5}_{1 / 0.6}")
    weights, _ = compute_rollout_correction_weights(x, mask, "sequence", 1.5)
    torch.testing.assert_close(ours(seq_mis(0.6, 1.5)), kept * weights, rtol=1e-12, atol=0)


def test_the_effective_sample_size_is_verl_s():
    data = data_of(2)
    _, _, theirs = compute_rollout_correction_and_rejection_mask(
        data["old_logprobs"],
        data["rollout_logprobs"],
        data["mask"].double(),
        rollout_is="token",
        rollout_is_threshold=1.2,
    )
    _, metrics = policy_loss(objective=dataclasses.replace(OBJECTIVES["tis"], correction=TIS(1.2)), **data)
    # verl adds 1e-8 to the mean weight
    want = theirs["rollout_corr/rollout_is_eff_sample_size"]
    assert metrics["correction/effective_sample_size"].item() == pytest.approx(want, rel=1e-6)
    assert want < 1


DRIFT = dataclasses.replace(OBJECTIVES["dapo"], filter=opsm(0.05, policies="policy/old"))
SAMPLER = dataclasses.replace(OBJECTIVES["dppo-kl"], filter=opsm(0.05))


def in_verl(objective, data, **options):
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_c=None,
        policy_loss=adapter.BandPolicyLossConfig(objective=f"{__name__}:{objective}", **options),
    )  # fmt: skip
    x = data["logprobs"].clone().requires_grad_()
    loss, metrics = adapter.loss(
        None,
        data["old_logprobs"],
        x,
        data["advantages"].unsqueeze(1).expand(x.shape),
        data["mask"],
        "token-mean",
        config,
    )
    return loss.detach(), torch.autograd.grad(loss, x)[0], metrics


@pytest.mark.parametrize(("name", "options"), [("DRIFT", {}), ("SAMPLER", {"bypass_mode": True})])
def test_in_verl_it_is_policy_loss_beside_rollout_rs(name, options):
    """verl's rejection sampling has changed the mask before; the filter judges the tokens that are left."""
    data = data_of(4)
    rejected, _ = compute_rollout_rejection_mask(
        data["old_logprobs"] - data.pop("rollout_logprobs"), data["mask"].double(), "token_k3", 0.05
    )
    for mask in (data["mask"], rejected.bool()):
        given = {**data, "mask": mask}
        objective = globals()[name]
        want = {**given, "rollout_logprobs": data["old_logprobs"]} if name == "SAMPLER" else given
        loss, gradient, ours = run(dataclasses.replace(objective, aggregation="token-mean"), want)
        got = in_verl(name, given, **options)
        torch.testing.assert_close(got[0], loss, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(got[1], gradient, rtol=1e-6, atol=1e-12)
        assert got[2]["actor/band/filter/kept_fraction"] == pytest.approx(ours["filter/kept_fraction"].item())
        assert 0 < got[2]["actor/band/filter/kept_fraction"] < 1 and math.isfinite(loss)
