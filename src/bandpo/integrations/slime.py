"""The objectives as slime's custom loss, by import path.

    --loss-type custom_loss --custom-loss-function-path bandpo.integrations.slime.policy_loss
    --custom-config-path bandpo.yaml      # bandpo: {objective: bandpo-kl, radius: 0.05}; without it: bandpo-kl as it is

slime's own code computes the log-probs (temperature, top-p replay, tensor and context parallelism) and reduces the loss: a
mean over the tokens of a rollout and over rollouts, or a mean over tokens with `--calculate-per-token-loss`, whatever the
objective's own aggregation. Its entropy bonus and KL loss are added as slime does. With `--use-rollout-logprobs` the ratio is
taken against the sampler.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bandpo._inputs import fill
from bandpo.integrations._host import attributes, evaluate, host_objective, refuse_ignored
from bandpo.integrations.names import OWN_PREFIX, metrics_of
from bandpo.objective import Objective

_NAMES = metrics_of("slime")
# Besides eps_clip_high, which slime sets to eps_clip.
_DEFAULTS = {
    "eps_clip": 0.2, "eps_clip_c": None, "use_tis": False, "use_opsm": False, "get_mismatch_metrics": False,
    "custom_pg_loss_reducer_function_path": None, "custom_tis_function_path": None,
}  # fmt: skip


def policy_loss(
    args: Any, batch: Mapping[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss as slime calls it.

    Args:
        args: slime's arguments; `args.bandpo` holds `objective` and the options of its region.
        batch: Of it `log_probs` or `rollout_log_probs`, `advantages`, `loss_masks` and `ref_log_probs`, a tensor a sample.
        logits: `(1, tokens, vocabulary)`.
        sum_of_sample_mean: slime's reduction of a value for each token.

    Returns:
        The loss, and metrics in the form that slime divides by the number of rollouts or tokens.

    Raises:
        ValueError: If an option would be ignored, or the objective needs what slime does not give a loss.
    """
    from megatron.core import mpu
    from slime.backends.megatron_utils import loss as host
    from slime.backends.megatron_utils.cp_utils import slice_log_prob_with_cp

    lengths = batch["total_lengths"], batch["response_lengths"]
    _, found = host.get_log_probs_and_entropy(
        logits, args=args, unconcat_tokens=batch["unconcat_tokens"], total_lengths=lengths[0],
        response_lengths=lengths[1], with_entropy=True, **host.get_rollout_top_p_logprob_kwargs(args, batch),
    )  # fmt: skip
    masks = [slice_log_prob_with_cp(m, *n) for m, *n in zip(batch["loss_masks"], *lengths, strict=True)]
    return megatron_loss(
        "slime", args, batch, logits, sum_of_sample_mean, logprobs=found["log_probs"], entropy=found["entropy"],
        masks=masks, context_parallel=mpu.get_context_parallel_world_size(), approx_kl=host.compute_approx_kl,
    )  # fmt: skip


def megatron_loss(
    host: str, args: Any, batch: Mapping[str, Any], logits: Tensor, reduce: Callable[[Tensor], Tensor], *,
    logprobs: Sequence[Tensor], entropy: Sequence[Tensor] | None, masks: Sequence[Tensor], context_parallel: int,
    approx_kl: Callable[..., Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The loss of slime and of its forks, from what each of them computes in its own way.

    Args:
        host: For messages.
        args: The host's arguments.
        batch: The host's batch.
        logits: To keep the graph where there are no tokens.
        reduce: The host's `sum_of_sample_mean`.
        logprobs: Of each sample's response, this rank's part of it.
        entropy: The same; None where the host did not compute it.
        masks: The same.
        context_parallel: Ranks that share a sequence.
        approx_kl: The host's `compute_approx_kl`.
    """
    refuse_ignored(host, attributes(args, _DEFAULTS), _DEFAULTS)
    objective = _configured(host, args, context_parallel)
    names = ("rollout_log_probs", "log_probs")
    sampler, old = ([x.detach() for x in batch[name]] if batch.get(name) else None for name in names)
    if args.use_rollout_logprobs:
        old = sampler
    elif old is None:  # the host reuses the log-probs of this very pass: π is still π_old
        old = [x.detach() for x in logprobs]
    lengths = [len(x) for x in logprobs]

    def row(tensors: Sequence[Tensor]) -> Tensor:
        return pad_sequence(list(tensors), batch_first=True)

    mask = row(masks)
    found = evaluate(
        objective, logprobs=row(logprobs), old_logprobs=row(old), advantages=row(batch["advantages"]), mask=mask,
        rollout_logprobs=None if sampler is None else row(sampler),
    )  # fmt: skip

    def tokens(x: Tensor) -> Tensor:
        return torch.cat([part[:n] for part, n in zip(x, lengths, strict=True)])

    valid = tokens(mask) != 0
    policy = reduce(-tokens(found.value))
    loss, report = policy, {_NAMES["loss/policy"]: policy}
    if entropy is not None:
        report[_NAMES["entropy"]] = mean_entropy = reduce(fill(torch.cat(list(entropy)), valid))
        loss = loss - args.entropy_coef * mean_entropy
    if args.use_kl_loss:
        new, reference, before = (fill(torch.cat(list(x)), valid) for x in (logprobs, batch["ref_log_probs"], old))
        ratio = torch.exp(new - before) if args.use_unbiased_kl else None
        kl = reduce(approx_kl(new, reference, kl_loss_type=args.kl_loss_type, importance_ratio=ratio))
        report[_NAMES["kl/ref"]] = kl
        loss = loss + args.kl_loss_coef * kl
    if not sum(lengths):
        loss = loss + 0 * logits.sum()
    share = reduce(valid.to(policy.dtype))  # what the host divides by, so that its quotient is the mean over all tokens
    report |= {
        _NAMES["loss"]: loss,
        _NAMES["clip_fraction/any"]: reduce(tokens(found.clipped).to(policy.dtype)),
        _NAMES["kl/old_new_k1"]: reduce(-tokens(found.log_ratio)),
    }
    report |= {
        f"{OWN_PREFIX['slime']}{name}": x * share for name, x in found.metrics.items() if not name.endswith("_max")
    }
    return loss, {name: x.detach().clone() for name, x in report.items()}


def _configured(host: str, args: Any, context_parallel: int) -> Objective:
    if args.advantage_estimator in ("gspo", "cispo"):
        raise ValueError(
            f"{host}: --advantage-estimator {args.advantage_estimator} would choose the host's loss, which is not used; set "
            f"grpo and objective: {args.advantage_estimator}"
        )
    if getattr(args, "eps_clip_high", None) not in (None, args.eps_clip):
        raise ValueError(
            f"{host}: eps_clip_high={args.eps_clip_high!r} would be ignored; choose an objective such as dapo, or epsilon_high"
        )
    given = getattr(args, "bandpo", None) or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{host}: bandpo: {given!r} must be a mapping such as {{objective: bandpo-kl, radius: 0.05}}")
    return _objective(host, json.dumps(dict(given)), bool(args.use_rollout_logprobs), context_parallel > 1)


@functools.lru_cache(maxsize=16)
def _objective(host: str, text: str, against_sampler: bool, split: bool) -> Objective:
    given = json.loads(text)
    name = given.pop("objective", "bandpo-kl")
    rows = "packed" if split else "whole"
    return host_objective(host, name, given, sampler="only" if against_sampler else "beside", rows=rows)
