"""verl before 0.9, which has no plug-ins: registered by VERL_USE_EXTERNAL_MODULES, called as its workers call a loss."""

import os
import subprocess
import sys

import pytest
import torch
from isolation import stub

os.environ.setdefault("VERL_USE_EXTERNAL_MODULES", "")
stub("mindspeed", "vllm")
import cases
import verl
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import ActorConfig
from verl.workers.config.actor import PolicyLossConfig

import bandpo.integrations.verl as ours
from conftest import HOST


def test_it_is_this_version():
    assert verl.__file__.startswith(HOST) and verl.__version__ in HOST


@pytest.mark.parametrize("module", ["bandpo.integrations.verl", "bandpo.integrations.rllm"])
def test_a_fresh_process_registers_the_losses_by_the_environment(module):
    script = (
        "import verl; from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as r; "
        "print('bandpo' in r, 'bandpo:dapo' in r)"
    )
    environment = {**os.environ, "VERL_USE_EXTERNAL_MODULES": module,
                   "PYTHONPATH": ":".join([HOST, *[p for p in sys.path if p]])}  # fmt: skip
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=600)
    assert found.stdout.strip().endswith("True True"), found.stderr[-2000:]


def actor(options, **fields):
    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=options, **fields)


def train(data, config, aggregation, weights=None):
    """Two ranks with two micro-batches, averaged over ranks; the counts of the whole batch come in the configuration."""
    tokens = int(data["mask"].sum())
    config.global_batch_info.update({"dp_size": 2, "batch_num_tokens": tokens, "global_batch_size": cases.B})
    x = data["logprobs"].clone().requires_grad_()
    total, metrics = 0.0, []
    for parts in cases.RANKS:
        for part in parts:
            loss, found = get_policy_loss_fn(config.policy_loss.loss_mode)(
                old_log_prob=data["old_logprobs"][part], log_prob=x[part], advantages=data["advantages"][part],
                response_mask=data["mask"][part], loss_agg_mode=aggregation, config=config,
                rollout_is_weights=None if weights is None else weights[part],
            )  # fmt: skip
            total = total + loss / 2
            metrics.append(found)
    (gradient,) = torch.autograd.grad(total, x)
    return (total.detach(), gradient), metrics


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("objective", cases.OBJECTIVES)
def test_it_is_policy_loss_with_verl_s_reduction(objective, aggregation):
    data = cases.mini_batch(1)
    config = actor(ours.BandPolicyLossConfig(objective=objective), clip_ratio_c=3.0)
    spec = ours._objective(config, None)
    normalizer = int(data["mask"].sum()) if aggregation == "token-mean" else cases.B
    want = cases.wanted(data, spec, aggregation, normalizer=normalizer)
    cases.same(train(data, config, aggregation)[0], want, cases.FLOAT32)


def test_the_clip_is_verl_s_own():
    data = cases.mini_batch(2, poison=False)
    weights = torch.rand(cases.B, cases.T, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    found = [
        train(data, actor(PolicyLossConfig(loss_mode=m)), "token-mean", weights)[0] for m in ("bandpo:grpo", "vanilla")
    ]
    cases.same(*found, cases.FLOAT32)


def test_the_typed_configuration_and_what_it_refuses():
    target = "bandpo.integrations.verl.BandPolicyLossConfig"
    made = omega_conf_to_dataclass(OmegaConf.create({"_target_": target, "loss_mode": "bandpo", "radius": 0.1}))
    assert isinstance(made, ours.BandPolicyLossConfig) and made.radius == 0.1
    for given in ({"loss_mode": "vanilla"}, {"kl_cov_ratio": 0.1}, {"objective": "dppo-kl"}):
        with pytest.raises(ValueError):
            ours.BandPolicyLossConfig(**given)
    assert "bandpo:bandpo-tv" in POLICY_LOSS_REGISTRY and "bandpo:dppo-topk-kl" not in POLICY_LOSS_REGISTRY
