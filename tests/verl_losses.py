"""verl's own losses and their gradients, for the tests that compare with them. Importing it needs verl."""

import torch
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig
from verl.workers.config.actor import PolicyLossConfig

from batches import max_length


def verl_loss(mode, data, aggregation, weights=None, **options):
    """verl's registered loss and its gradient; `options` are fields of ActorConfig or, with policy_loss_, of its loss."""
    of_loss = {k.removeprefix("policy_loss_"): v for k, v in options.items() if k.startswith("policy_loss_")}
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=PolicyLossConfig(loss_mode=mode, **of_loss),
        **{k: v for k, v in options.items() if not k.startswith("policy_loss_")},
    )  # fmt: skip
    if aggregation == "seq-mean-token-sum-norm":
        config.global_batch_info["loss_scale_factor"] = max_length(aggregation)
    x = data["logprobs"].clone().requires_grad_()
    advantages = data["advantages"].reshape(len(x), -1).expand(x.shape)
    loss, metrics = core_algos.get_policy_loss_fn(mode)(
        old_log_prob=data["old_logprobs"], log_prob=x, advantages=advantages, response_mask=data["mask"].double(),
        loss_agg_mode=aggregation, config=config, rollout_is_weights=weights,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, x)
    return loss.detach(), gradient, metrics


def clip(low, high, c=1e9):
    return {"clip_ratio": low, "clip_ratio_low": low, "clip_ratio_high": high, "clip_ratio_c": c}
