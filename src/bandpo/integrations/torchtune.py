"""The objectives as the loss of torchtune's GRPO recipe, in its configuration.

    loss:
      _component_: bandpo.integrations.torchtune.BandLoss
      objective: bandpo-kl
      radius: 0.05
      kl_coeff: 0.01

torchtune leaves the reduction to the loss, so the objective's own aggregation is used, over the sequences of a rank.
"""

from typing import Any

import torch
from torch import Tensor, nn

import bandpo.losses
from bandpo.integrations._host import host_objective
from bandpo.reference import ReferenceKL, check_kl


class BandLoss(nn.Module):
    """torchtune's `GRPOLoss` with a bandpo objective.

    Args:
        objective: A name of `bandpo objectives`, or "package.module:NAME".
        kl_coeff: Coefficient of the KL to the reference; None for that of the objective, mostly 0.
        kl: How it is estimated and differentiated, a name of `bandpo.reference`; torchtune's own losses have `k3`. None for
            that of the objective, mostly `k3-ratio`.
        max_length: The constant of objectives with `seq-mean-token-sum-norm`: the maximal completion length.
        options: Changes of the objective's region: fields of `RegionOptions`, except `divergence_top_k`.

    Raises:
        ValueError: If an option would be ignored, or the objective needs an input that torchtune does not pass to a loss.
    """

    def __init__(
        self,
        objective: str = "bandpo-kl",
        kl_coeff: float | None = None,
        max_length: int | None = None,
        kl: ReferenceKL | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.objective = host_objective("torchtune", objective, options, sampler="none", kl="")
        if (max_length is None) == (self.objective.aggregation == "seq-mean-token-sum-norm"):
            raise ValueError(
                f"torchtune: max_length={max_length} with objective {objective!r}, whose aggregation is "
                f"{self.objective.aggregation!r}; 'seq-mean-token-sum-norm' needs it, the others do not use it"
            )
        self.kl_coeff, self.max_length = kl_coeff, max_length
        self.kl: ReferenceKL | None = None if kl is None else check_kl(kl)

    def forward(
        self,
        pi_old_logprobs: Tensor,
        pi_logprobs: Tensor,
        ref_logprobs: Tensor,
        advantages: Tensor,
        padding_masks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The loss and the values that torchtune logs with it.

        Args:
            pi_old_logprobs: Log-probs `(batch, time)` of the policy before the update.
            pi_logprobs: Log-probs `(batch, time)` of the policy in training, with gradient.
            ref_logprobs: Log-probs `(batch, time)` of the reference policy.
            advantages: Advantage of each sequence, `(batch,)`.
            padding_masks: Mask of valid tokens, `(batch, time)`; None if all are valid.

        Returns:
            Loss, objective, KL, mean ratio and share of clipped tokens; the last four are for torchtune's log.
        """
        mask = pi_logprobs.new_ones(pi_logprobs.shape) if padding_masks is None else padding_masks
        loss, report = bandpo.losses.policy_loss(
            logprobs=pi_logprobs,
            old_logprobs=pi_old_logprobs,
            ref_logprobs=ref_logprobs,
            advantages=advantages,
            mask=mask,
            objective=self.objective,
            kl_coef=self.kl_coeff,
            kl=self.kl,
            max_length=self.max_length,
        )
        # torch.compile leaves it out for a surrogate of one's own without `bandpo.surrogates.stops`.
        clipped = report.get("clip_fraction/any", torch.full_like(loss.detach(), torch.nan))
        return loss, -report["loss/policy"], report["kl/ref"], report["ratio/mean"], clipped
