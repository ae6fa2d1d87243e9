"""The objectives as the custom loss of miles (radixark's fork of slime), by import path.

    --loss-type custom_loss --custom-loss-function-path bandpo.integrations.miles.policy_loss
    --custom-config-path bandpo.yaml      # bandpo: {objective: bandpo-kl, radius: 0.05}; default: bandpo-kl

As in slime (`bandpo.integrations.slime`): miles computes the log-probs and reduces the loss.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from bandpo.integrations.slime import megatron_loss


def policy_loss(
    args: Any, batch: Mapping[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss as miles calls it; result and errors are those of `bandpo.integrations.slime.policy_loss`.

    Args:
        args: miles's arguments; `args.bandpo` contains `objective` and the options of its region.
        batch: miles's batch, with the same entries as in slime.
        logits: Logits `(1, tokens, vocabulary)`.
        sum_of_sample_mean: miles's reduction of one value for each token.
    """
    from miles.backends.training_utils.cp_utils import get_local_response_loss_masks
    from miles.backends.training_utils.loss_hub.logit_processors import get_log_probs_and_entropy
    from miles.backends.training_utils.loss_hub.math_utils import compute_approx_kl
    from miles.backends.training_utils.parallel import get_parallel_state

    longest = batch.get("max_seq_lens")
    lengths = {"total_lengths": batch["total_lengths"], "response_lengths": batch["response_lengths"]}
    with_entropy = args.entropy_coef != 0 or args.observe_training_entropy
    found = get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        with_entropy=with_entropy,
        entropy_requires_grad=args.entropy_coef != 0,
        max_seq_lens=longest,
        **lengths,
    )
    masks = get_local_response_loss_masks(
        **lengths, loss_masks=batch["loss_masks"], qkv_format=args.qkv_format, max_seq_lens=longest
    )
    return megatron_loss(
        "miles",
        args,
        batch,
        logits,
        sum_of_sample_mean,
        logprobs=found["log_probs"],
        entropy=found.get("entropy"),
        masks=[m.to(logits.device) for m in masks],
        context_parallel=get_parallel_state().cp.size,
        approx_kl=compute_approx_kl,
    )
