"""SkyRL: its registry, its scaling of the advantages, its reduction, its call."""

from types import SimpleNamespace

import cases
import pytest
import torch
from isolation import stub, without_init

from bandpo import OBJECTIVES
from bandpo.integrations import skyrl as ours
from conftest import HOST

PACKAGES = ("", ".backends", ".backends.skyrl_train", ".backends.skyrl_train.utils", ".backends.skyrl_train.workers",
            ".train", ".train.utils")  # fmt: skip
without_init(HOST, *(f"skyrl{name}" for name in PACKAGES))
stub("jaxtyping", "loguru", "skyrl_gym", "skyrl.backends.skyrl_train.distributed", "skyrl.train.dataset")

import cloudpickle
from skyrl.backends.skyrl_train.utils import ppo_utils
from skyrl.backends.skyrl_train.workers.worker_utils import reduce_metrics
from skyrl.train.config import AlgorithmConfig

REDUCTIONS = {
    "token_mean": ("token-mean", {}),
    "sequence_mean": ("seq-mean-token-mean", {"normalizer": cases.B}),
    "seq_mean_token_sum_norm": ("seq-mean-token-sum-norm", {"normalizer": cases.B, "max_length": 32}),
}


@pytest.fixture
def registry():
    yield ppo_utils.PolicyLossRegistry
    for name in [n for n in ppo_utils.PolicyLossRegistry.list_available() if n.startswith("bandpo")]:
        ppo_utils.PolicyLossRegistry.unregister(name)


def train(data, parts, reduction, config=None, name="bandpo"):
    """One mini-batch over ranks and micro-batches, as SkyRL's worker calls the loss and sums it."""
    config = config or AlgorithmConfig(policy_loss_type=name)
    loss_fn = cloudpickle.loads(cloudpickle.dumps(ppo_utils.PolicyLossRegistry.get(name)))  # how it reaches a worker
    mask = data["mask"].double()
    scaled = ppo_utils.apply_loss_reduction_to_advantages_minibatch(
        data["advantages"], mask, reduction, micro_batch_size=2, max_seq_len=32
    )
    x = data["logprobs"].clone().requires_grad_()
    total, metrics = 0.0, []
    for part in parts:
        loss, found = loss_fn(
            x[part], data["old_logprobs"][part], scaled[part], config=config, loss_mask=mask[part],
            rollout_logprobs=data["rollout_logprobs"][part],
        )  # fmt: skip
        total = total + loss
        metrics.append(found)
    (gradient,) = torch.autograd.grad(total, x)
    return (total.detach(), gradient), metrics


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("objective", [*cases.OBJECTIVES, "dppo-kl"])
def test_it_is_policy_loss_with_skyrl_s_reduction(registry, objective, reduction):
    data = cases.mini_batch(1)
    ours.register(objective)
    aggregation, more = REDUCTIONS[reduction]
    want = cases.wanted(data, objective, aggregation, **more)
    for parts in (cases.HALVES, [p for rank in cases.RANKS for p in rank]):
        cases.same(train(data, parts, reduction)[0], want)


def test_its_clip_is_skyrl_s_own(registry):
    """Theirs and ours through the same scaling: `regular` clips at [0.8, 1.2], as grpo does."""
    data = cases.mini_batch(2, poison=False)
    ours.register("grpo")
    config = AlgorithmConfig(policy_loss_type="regular")
    found = [train(data, cases.HALVES, "token_mean", c, n)[0] for c, n in ((None, "bandpo"), (config, "regular"))]
    cases.same(*found, cases.FLOAT32)  # SkyRL takes the exponential in float32


def test_off_policy_correction_is_skyrl_s(registry):
    data = cases.mini_batch(3, poison=False)
    ours.register("grpo")
    found = []
    for name in ("bandpo", "regular"):
        config = AlgorithmConfig(policy_loss_type=name)
        config.off_policy_correction.tis_ratio_type = "token"
        config.off_policy_correction.token_tis_ratio_clip_high = 1.2
        config.off_policy_correction.sequence_mask_metric = "geometric"
        config.off_policy_correction.geo_mask_high, config.off_policy_correction.geo_mask_low = 1.2, 0.9
        found.append(train(data, cases.HALVES, "sequence_mean", config, name)[0])
    cases.same(*found, cases.FLOAT32)  # SkyRL takes the exponential in float32
    assert not torch.allclose(found[0][1], train(data, cases.HALVES, "sequence_mean")[0][1])  # it did something
    poisoned = cases.mini_batch(3)
    config.policy_loss_type = "bandpo"
    again = train(poisoned, cases.HALVES, "sequence_mean", config)[0]
    cases.same(again, found[0])
    for name, objective in (("bandpo-dppo", "dppo-kl"), ("bandpo-weighing", cases.WEIGHING)):
        ours.register(objective, name=name)
        with pytest.raises(ValueError, match="accounts for the sampler itself; use one"):
            train(data, cases.HALVES, "sequence_mean", config, name)


def test_metrics_survive_skyrl_s_mean(registry):
    data = cases.mini_batch(4)
    ours.register("bandpo-kl", radius=0.01)
    _, metrics = train(data, [p for rank in cases.RANKS for p in rank], "token_mean")
    reduced = reduce_metrics({name: [m[name] for m in metrics] for name in metrics[0]}, sum_loss_metrics=True)
    assert all(isinstance(v, float) and torch.tensor(v).isfinite() for m in metrics for v in m.values())
    assert reduced["clip_ratio"] > 0
    worst = "band/divergence_max"
    assert reduced[worst] == max(m[worst] for m in metrics)
    assert not any(name.startswith("band/band/") for name in reduced)


def test_refused():
    with pytest.raises(ValueError, match=r"radius=0.1 would be ignored"):
        ours.register("dapo", radius=0.1)
    with pytest.raises(ValueError, match=r"topk_logprobs.*SkyRL does not give"):
        ours.register("dppo-topk-kl")
    for name in ("ppo-kl", "kl-cov"):
        with pytest.raises(ValueError, match=r"as the estimator made them, and this host scales them"):
            ours.register(name)
    data = cases.mini_batch(5)
    with pytest.raises(ValueError, match=r"eps_clip_high=0.28 would be ignored"):
        ours.policy_loss(
            OBJECTIVES["bandpo-kl"], data["logprobs"], data["old_logprobs"], data["advantages"],
            SimpleNamespace(eps_clip_high=0.28), data["mask"],
        )  # fmt: skip
