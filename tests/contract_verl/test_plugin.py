"""The plug-in in verl: discovery, values and gradients against verl's own losses, its scaling, its configuration."""

import subprocess
import sys
from functools import partial

import pytest
import torch

pytest.importorskip("verl", reason="verl has an environment of its own; `make test` runs this file there (.venv-verl)")
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import ActorConfig
from verl.workers.config.actor import PolicyLossConfig

from bandpo import OBJECTIVES, policy_loss
from bandpo.experimental import sum_over_ranks
from bandpo.integrations.verl import BandPolicyLossConfig
from bandpo.surrogates import clip, dual_clip
from batches import batch

TARGET = "bandpo.integrations.verl.BandPolicyLossConfig"


def actor(options, strategy="fsdp", **fields):
    return ActorConfig(strategy=strategy, rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=options, **fields)


def call(config, data, weights=None, aggregation="token-mean"):
    x = data["logprobs"].clone().requires_grad_()
    loss, metrics = get_policy_loss_fn(config.policy_loss.loss_mode)(
        old_log_prob=data["old_logprobs"], log_prob=x, advantages=data["advantages"].unsqueeze(1).expand(x.shape),
        response_mask=data["mask"], loss_agg_mode=aggregation, config=config, rollout_is_weights=weights,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, x)
    return loss.detach(), gradient, metrics


def test_a_fresh_process_finds_the_losses_without_an_import():
    script = (
        "import verl; from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as r; "
        "print('bandpo' in r, 'bandpo:dapo' in r)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip().endswith("True True")


def test_a_ray_worker_finds_them_too():
    import ray

    @ray.remote
    def names():
        import verl  # noqa: F401
        from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as registry

        return sorted(n for n in registry if n.startswith("bandpo"))

    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
    try:
        assert ray.get(names.remote(), timeout=600) == sorted(n for n in POLICY_LOSS_REGISTRY if n.startswith("bandpo"))
    finally:
        ray.shutdown()


def test_all_that_verl_can_feed_is_registered_and_nothing_else():
    names = {n.removeprefix("bandpo:") for n in POLICY_LOSS_REGISTRY if n.startswith("bandpo:")}
    assert names == {n for n, o in OBJECTIVES.items() if not o.extras and o.correction is None} | {"bapo-reading"}
    assert not {"dppo-topk-kl", "troll"} & set(names)


def test_bapo_is_summed_over_the_ranks_where_each_computes_the_loss():
    """With a pipeline (Megatron) only the last stage does, and a sum over all ranks would never end."""
    from bandpo.integrations.verl import _objective

    for strategy, hook in (("fsdp", sum_over_ranks), ("fsdp2", sum_over_ranks), ("megatron", None)):
        config = actor(PolicyLossConfig(), strategy)
        assert _objective(config, "bapo").bounds.reduce is hook
        assert _objective(config, "bandpo-kl") == _objective(actor(PolicyLossConfig()), "bandpo-kl")
    with pytest.warns(FutureWarning, match="'bapo-reading' is now 'bapo'"):
        assert _objective(actor(PolicyLossConfig(loss_mode="bandpo")), "bapo-reading").name == "bapo"


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("dual", [3.0, 10.0])
def test_the_clip_is_verl_s_own_with_its_dual_clip_weights_and_scaling(aggregation, dual):
    """Same registry, same call: `vanilla` on one side, `bandpo:grpo` on the other."""
    for seed in range(3):
        data = batch(seed, spread=1.0)
        weights = torch.rand(data["mask"].shape, dtype=torch.float64) + 0.5
        scale = {"dp_size": 2, "batch_num_tokens": 100, "global_batch_size": 16, "loss_scale_factor": 12}
        found = []
        for mode in ("vanilla", "bandpo:grpo"):
            config = actor(PolicyLossConfig(loss_mode=mode), clip_ratio_c=dual)
            config.global_batch_info.update(scale)
            found.append(call(config, data, weights, aggregation))
        torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-7, atol=3e-8)  # as in test_verl.py
        torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-7, atol=1e-15)
        assert found[1][2]["actor/ppo_kl"] == pytest.approx(found[0][2]["actor/ppo_kl"], abs=1e-6)


def test_the_band_is_the_library_s():
    data = batch(0, spread=0.6)
    objective = OBJECTIVES["bandpo-kl"]
    x = data["logprobs"].clone().requires_grad_()
    want, report = policy_loss(
        logprobs=x, old_logprobs=data["old_logprobs"], advantages=data["advantages"], mask=data["mask"],
        objective=objective,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(want, x)
    for options in (PolicyLossConfig(loss_mode="bandpo"), BandPolicyLossConfig(radius=0.05)):
        loss, found, metrics = call(actor(options, clip_ratio_c=1e9), data, aggregation=objective.aggregation)
        torch.testing.assert_close(loss, want.detach(), rtol=1e-7, atol=3e-8)
        torch.testing.assert_close(found, gradient, rtol=1e-7, atol=1e-15)
        assert metrics["actor/band/clip_fraction/high"] == pytest.approx(
            report["clip_fraction/high"].item(), nan_ok=True
        )
        assert all(isinstance(v, float) for v in metrics.values())
    narrow = call(actor(BandPolicyLossConfig(radius=0.001), clip_ratio_c=1e9), data)[2]
    assert narrow["actor/band/clip_fraction/any"] > metrics["actor/band/clip_fraction/any"]


def test_dual_clip_is_for_objectives_that_clip():
    from bandpo.integrations.verl import _objective

    clipped = _objective(actor(PolicyLossConfig(loss_mode="bandpo"), clip_ratio_c=10.0), None)
    assert isinstance(clipped.surrogate, partial)
    assert clipped.surrogate.func is dual_clip
    assert clipped.surrogate.keywords == {"c": 10.0}
    assert OBJECTIVES["bandpo-kl"].surrogate is clip
    assert _objective(actor(PolicyLossConfig()), "cfpo").surrogate is OBJECTIVES["cfpo"].surrogate


def test_the_typed_config_is_made_by_verl_from_overrides_and_knows_all_its_keys():
    given = {"_target_": TARGET, "loss_mode": "bandpo", "objective": "bandpo-tv", "radius": 0.1, "max_ratio": 5.0}
    made = omega_conf_to_dataclass(OmegaConf.create(given))
    assert isinstance(made, BandPolicyLossConfig)
    assert (made.radius, made.clip_cov_ratio) == (0.1, 0.0002)
    with pytest.raises(InstantiationException, match="unexpected keyword argument 'raduis'"):
        omega_conf_to_dataclass(OmegaConf.create({**given, "raduis": 0.1}))
    with pytest.raises(InstantiationException, match=r"epsilon=0.1 would be ignored"):
        omega_conf_to_dataclass(OmegaConf.create({**given, "epsilon": 0.1}))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BandPolicyLossConfig(objective="dppo-kl"), "algorithm.rollout_correction.bypass_mode=True"),
        (lambda: BandPolicyLossConfig(loss_mode="bandpo:dppo-tv", bypass_mode=False), "bypass_mode is False"),
        (lambda: BandPolicyLossConfig(bypass_mode=True), "bypass mode puts the rollout's log-probs there"),
        (lambda: BandPolicyLossConfig(objective="dppo-topk-kl"), "topk_logprobs.*which verl does not give"),
        (lambda: BandPolicyLossConfig(objective="troll"), "'troll'.*topk_logprobs.*which verl does not give"),
        (lambda: BandPolicyLossConfig(objective="bandpo"), "is unknown: did you mean"),
        (lambda: BandPolicyLossConfig(objective="grpo", radius=0.1), "radius=0.1 would be ignored"),
        (lambda: call(actor(PolicyLossConfig(loss_mode="bandpo"), clip_ratio_high=0.28), batch(0)), "clip_ratio_high=0.28"),
        (lambda: call(actor(PolicyLossConfig(loss_mode="bandpo:dppo-kl")), batch(0)), "bypass_mode is None"),
        (
            lambda: call(actor(BandPolicyLossConfig(loss_mode="bandpo:dapo", objective="grpo")), batch(0)),
            "loss_mode=bandpo:dapo and objective=grpo",
        ),
    ],
)  # fmt: skip
def test_what_would_be_ignored_or_silently_another_thing_is_an_error(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_dppo_in_bypass_mode_is_verl_s_dppo():
    data = batch(3, spread=0.6)
    theirs = actor(PolicyLossConfig(loss_mode="dppo_kl"), clip_ratio=0.05, clip_ratio_low=0.05, clip_ratio_high=0.05)
    ours = actor(BandPolicyLossConfig(loss_mode="bandpo:dppo-kl", bypass_mode=True))
    torch.testing.assert_close(call(ours, data)[1], call(theirs, data)[1], rtol=1e-7, atol=1e-15)


def test_agg_loss_scales_as_verl_does():
    """Two halves of a batch on two ranks, averaged as FSDP does, are the whole."""
    data = batch(1, spread=0.6)
    whole = call(actor(PolicyLossConfig(loss_mode="bandpo")), data)[0]
    tokens = int(data["mask"].sum())
    half = len(data["mask"]) // 2
    parts = []
    for rows in (slice(0, half), slice(half, None)):
        config = actor(PolicyLossConfig(loss_mode="bandpo"))
        config.global_batch_info.update({"dp_size": 2, "batch_num_tokens": tokens})
        parts.append(call(config, {k: v[rows] for k, v in data.items()})[0])
    torch.testing.assert_close(sum(parts) / 2, whole)
