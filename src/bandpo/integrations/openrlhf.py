r"""The objectives in OpenRLHF, by its own training command with another loss.

    python -m bandpo.integrations.openrlhf --objective bandpo-kl --radius 0.05 -- \
        --actor.model_name_or_path Qwen/Qwen2.5-3B ...  # the arguments of openrlhf.cli.train_ppo_ray, as before

OpenRLHF has no hook and builds its loss inside Ray workers, which a change in the driver does not reach. This command starts
`openrlhf.cli.train_ppo_ray` and makes every worker replace `openrlhf.models.loss.PolicyLoss` (Ray's
`worker_process_setup_hook`). OpenRLHF itself computes the reduction, data-parallel counts, KL loss and entropy bonus.
Its KL loss differentiates k1, k2 or k3 (docs/kl.md), unless a version has `--algo.kl.unbiased_gradient` and it is set.
"""

import dataclasses
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bandpo.integrations._host import evaluate, host_objective, options_of_environment, refuse_ignored
from bandpo.integrations._workers import launch, when_imported
from bandpo.objective import Objective
from bandpo.surrogates.corrections import TIS, Correction, IcePop

_DEFAULTS = {"clip_eps_low": 0.2, "clip_eps_high": 0.2, "dual_clip": None, "policy_loss_type": "ppo"}
_CHECK: dict[str, Any] = {
    "sampler": "beside",
    "kl": "OpenRLHF's own KL loss (algo.kl, in new versions with unbiased_gradient)",
}


class BandPolicyLoss(torch.nn.Module):
    """OpenRLHF's `PolicyLoss` with a bandpo objective.

    Args:
        objective: The objective to train on.
        host_loss: OpenRLHF's class in the version in use; it determines how many values the caller unpacks.
        aggregate: OpenRLHF's `aggregate_loss`.
        options: The arguments that OpenRLHF passes to its own class.

    Raises:
        ValueError: If an option would be ignored, or a correction for the sampler cannot be expressed.
    """

    def __init__(
        self, objective: Objective, host_loss: Callable[..., Any], aggregate: Callable[..., Tensor], **options: Any
    ) -> None:
        super().__init__()
        own = {name: p.default for name, p in inspect.signature(host_loss).parameters.items()}
        given = {**own, **options}
        refuse_ignored("OpenRLHF", given, _DEFAULTS)
        correction = _correction(given)
        if correction is not None:
            objective = _corrected(objective, correction)
        self.objective, self.aggregate = objective, aggregate
        self.token_level_loss = given["token_level_loss"]
        one = torch.zeros(1, 1)
        # OpenRLHF 0.11.2 unpacks five values, older versions four.
        self.more = len(host_loss()(one, one, one, action_mask=one + 1)) - 3

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: Any = None,
        global_batch_size: Any = None,
    ) -> tuple[Tensor | None, ...]:
        """The loss and the values that OpenRLHF logs with it.

        Args:
            log_probs: Log-probs `(batch, time)` of the policy in training, with gradient.
            old_log_probs: Log-probs `(batch, time)` of the policy before the update.
            advantages: Advantage of each token, `(batch, time)`.
            action_mask: Mask of valid tokens, `(batch, time)`; None if all are valid.
            rollout_log_probs: Log-probs `(batch, time)` of the sampler, or None.
            dp_size: Number of data-parallel ranks, for OpenRLHF's reduction.
            batch_num_tokens: Valid tokens of the global batch, for OpenRLHF's reduction.
            global_batch_size: Sequences of the global batch, for OpenRLHF's reduction.

        Returns:
            The loss as OpenRLHF aggregates it, the share of clipped tokens, the mean of old minus new log-probs, and None for
            each further value that OpenRLHF unpacks.
        """
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        found = evaluate(
            self.objective,
            logprobs=log_probs,
            old_logprobs=old_log_probs,
            rollout_logprobs=rollout_log_probs,
            advantages=advantages,
            mask=mask,
        )
        loss = self.aggregate(
            -found.value,
            mask,
            token_level_loss=self.token_level_loss,
            dp_size=dp_size,
            batch_num_tokens=batch_num_tokens,
            global_batch_size=global_batch_size,
        )
        kl = -found.log_ratio.sum() / (mask != 0).sum().clamp_min(1)
        return loss, found.metrics["clip_fraction/any"], kl, *[None] * self.more


def patch() -> None:
    """Replace the loss in this process as soon as OpenRLHF is imported; every worker calls this."""
    when_imported("openrlhf.models.loss", _exchange)


def main() -> None:
    """Run OpenRLHF's `train_ppo_ray` with our loss in every worker."""
    launch("OpenRLHF", "openrlhf.cli.train_ppo_ray", "bandpo.integrations.openrlhf.patch", _CHECK)


def _exchange(module: ModuleType) -> None:
    if issubclass(module.PolicyLoss, BandPolicyLoss):
        return
    given = options_of_environment("OpenRLHF")
    objective = host_objective("OpenRLHF", given.pop("objective", "bandpo-kl"), given, **_CHECK)
    host_loss, aggregate = module.PolicyLoss, module.aggregate_loss

    class PolicyLoss(BandPolicyLoss):
        def __init__(self, **options: Any) -> None:
            super().__init__(objective, host_loss, aggregate, **options)

    module.PolicyLoss = PolicyLoss  # type: ignore[attr-defined]


def _correction(given: dict[str, Any]) -> Correction | None:
    """OpenRLHF's weights for the sampler as one of ours."""
    if "is_correction_level" in given:  # 0.11.2
        kind = tuple(given[f"is_correction_{name}"] for name in ("level", "mode", "gating"))
        low, high = given["is_correction_threshold"]
        off, clamp, drop = kind[0] == "off", kind == ("token", "clip", "ratio"), kind == ("token", "mask", "ratio")
    else:
        kind = given["vllm_is_correction_type"]
        off = not given["enable_vllm_is_correction"]
        low, high = given["vllm_is_truncated_threshold"] or (0.0, 0.0)
        clamp, drop = kind == "tis", kind == "icepop"
    if off:
        return None
    if drop:
        return IcePop(low, high)
    if clamp and low == 0:
        return TIS(high)
    raise ValueError(
        f"OpenRLHF: the correction {kind} with thresholds {low}, {high} cannot be expressed; there are masking by the token's "
        "ratio, clipping it from above (lower threshold 0), and objectives with a correction of their own"
    )


def _corrected(objective: Objective, correction: Correction) -> Objective:
    if objective.correction is not None or objective.anchor == "rollout":
        raise ValueError(
            f"OpenRLHF: its correction for the sampler is on, and objective {objective.name!r} accounts for the sampler "
            "itself; use one"
        )
    return dataclasses.replace(objective, correction=correction)


if __name__ == "__main__":
    main()
