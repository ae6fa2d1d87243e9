"""bandpo in hosts without a plug-in of ours: one short function for each host's documented hook.

Copy the function you need. tests/unit/test_hosts.py calls each with a stand-in of the host's signature; the hosts themselves
were not run. Signatures move: compare the arguments with your version's.
"""

from typing import Any

import torch
from torch import Tensor

from bandpo import policy_loss, token_objective
from bandpo.objectives import OBJECTIVES

OBJECTIVE = OBJECTIVES["bandpo-kl"]


def slime_loss(
    args: Any, batch: dict, logits: Tensor, sum_of_sample_mean: Any, log_probs: list[Tensor]
) -> tuple[Tensor, dict]:
    """slime: `--loss-type custom_loss --custom-loss-function-path recipes.hooks.hosts.slime_loss`, one tensor a sample.

    `log_probs` is what slime's own `get_log_probs_and_entropy(logits, ...)` returns; pass it in from a two-line wrapper.
    """
    values = [
        token_objective(
            OBJECTIVE, logprobs=new[None], old_logprobs=old[None], advantages=a[None], mask=torch.ones_like(new)[None]
        ).value[0]
        for new, old, a in zip(log_probs, batch["log_probs"], batch["advantages"], strict=True)
    ]
    loss = sum_of_sample_mean(-torch.cat(values))
    return loss, {"loss": loss.detach()}


def skyrl_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, config: Any, loss_mask: Tensor,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict]:  # fmt: skip
    """SkyRL: `PolicyLossRegistry.register("bandpo", skyrl_loss)` before training, then `policy_loss_type: bandpo`."""
    loss, metrics = policy_loss(
        logprobs=log_probs, old_logprobs=old_log_probs, advantages=advantages, mask=loss_mask, objective=OBJECTIVE,
        rollout_logprobs=rollout_logprobs,
    )  # fmt: skip
    return loss, {"clip_ratio": metrics["clip_fraction/any"].item()}


class OpenRLHFLoss(torch.nn.Module):
    """OpenRLHF: it has no hook; patch it before training, `openrlhf.models.PolicyLoss = OpenRLHFLoss`."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, None]:  # fmt: skip
        """Loss, clip fraction, approximate KL; OpenRLHF's correction for vLLM is the objective's `correction` here."""
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        loss, metrics = policy_loss(
            logprobs=log_probs, old_logprobs=old_log_probs, advantages=advantages, mask=mask, objective=OBJECTIVE,
            rollout_logprobs=rollout_log_probs,
        )  # fmt: skip
        kl = ((old_log_probs - log_probs.detach()) * mask).sum() / mask.sum()
        return loss, metrics["clip_fraction/any"], kl, None


class NeMoLoss:
    """NeMo-RL: a LossFunction, in the place of ClippedPGLossFn; log-probs carry a first token that is no prediction."""

    def __call__(
        self, next_token_logprobs: Tensor, data: dict, global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict]:
        """Normalised over the global batch, so that micro-batches add up."""
        mask = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
        loss, metrics = policy_loss(
            logprobs=next_token_logprobs, old_logprobs=data["prev_logprobs"][:, 1:],
            advantages=data["advantages"][:, 1:], mask=mask, objective=OBJECTIVE, normalizer=global_valid_seqs,
        )  # fmt: skip
        return loss, {
            "loss": loss.item(),
            "clip": metrics["clip_fraction/any"].item(),
            "tokens": global_valid_toks.item(),
        }


def tinker_loss(data: list[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Tinker: `training_client.forward_backward_custom(data, tinker_loss)`; each datum carries what it was sampled with."""
    values = []
    for datum, new in zip(data, logprobs, strict=True):
        old, a, mask = (datum.loss_fn_inputs[k].to_torch() for k in ("logprobs", "advantages", "mask"))
        value = token_objective(
            OBJECTIVE, logprobs=new[None], old_logprobs=old[None], advantages=a[None], mask=mask[None]
        ).value[0]
        values.append(value.masked_fill(mask == 0, 0.0).sum() / mask.sum().clamp_min(1))
    loss = -torch.stack(values).mean()
    return loss, {"loss": loss.item()}


def plain_step(model: Any, optimizer: Any, batch: dict[str, Tensor]) -> dict[str, float]:
    """Your own loop: one mini-batch with `ids`, `prompt_length`, `old_logprobs`, `advantages` and `mask`."""
    start = int(batch["prompt_length"])
    scores = model(batch["ids"]).logits[:, start - 1 : -1].log_softmax(-1)
    new = scores.gather(-1, batch["ids"][:, start:, None]).squeeze(-1)
    loss, metrics = policy_loss(
        logprobs=new, old_logprobs=batch["old_logprobs"], advantages=batch["advantages"], mask=batch["mask"],
        objective=OBJECTIVE,
    )  # fmt: skip
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"loss": loss.item(), "clipped": metrics["clip_fraction/any"].item()}
