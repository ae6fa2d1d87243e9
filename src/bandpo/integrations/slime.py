"""The objectives as slime's custom loss, by import path.

    --loss-type custom_loss --custom-loss-function-path bandpo.integrations.slime.policy_loss
    --custom-config-path bandpo.yaml      # bandpo: {objective: bandpo-kl, radius: 0.05}; default: bandpo-kl

slime's own code computes the log-probs (temperature, top-p replay, tensor and context parallelism) and reduces the loss: a
mean over the tokens of a rollout and over rollouts, or a mean over tokens with `--calculate-per-token-loss`. The objective's
own aggregation is not used. The entropy bonus and the KL loss are added in the same way as in slime. With
`--use-rollout-logprobs` the ratio is taken against the sampler.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bandpo._inputs import fill
from bandpo.integrations._host import attributes, check_host_kl, evaluate, host_objective, refuse_ignored
from bandpo.monitoring.names import OWN_PREFIX, metrics_of
from bandpo.objective import Objective

_NAMES = metrics_of("slime")
# The check of eps_clip_high is in `_configured`, because slime sets it to eps_clip.
_DEFAULTS = {
    "eps_clip": 0.2,
    "eps_clip_c": None,
    "use_tis": False,
    "use_opsm": False,
    "get_mismatch_metrics": False,
    "custom_pg_loss_reducer_function_path": None,
    "custom_tis_function_path": None,
}


def policy_loss(
    args: Any, batch: Mapping[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss as slime calls it.

    Args:
        args: slime's arguments; `args.bandpo` contains `objective` and the options of its region.
        batch: slime's batch; used are `log_probs` or `rollout_log_probs`, `advantages`, `loss_masks` and `ref_log_probs`, each
            with one tensor `(tokens,)` for each sample.
        logits: Logits `(1, tokens, vocabulary)`.
        sum_of_sample_mean: slime's reduction of one value for each token.

    Returns:
        The loss, and metrics in the form that slime divides by the number of rollouts or tokens.

    Raises:
        ValueError: If an option would be ignored, or the objective needs an input that slime does not pass to a loss.
    """
    from megatron.core import mpu
    from slime.backends.megatron_utils import loss as host
    from slime.backends.megatron_utils.cp_utils import slice_log_prob_with_cp

    lengths = batch["total_lengths"], batch["response_lengths"]
    _, found = host.get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=lengths[0],
        response_lengths=lengths[1],
        with_entropy=True,
        **host.get_rollout_top_p_logprob_kwargs(args, batch),
    )
    masks = [slice_log_prob_with_cp(m, *n) for m, *n in zip(batch["loss_masks"], *lengths, strict=True)]
    return megatron_loss(
        "slime",
        args,
        batch,
        logits,
        sum_of_sample_mean,
        logprobs=found["log_probs"],
        entropy=found["entropy"],
        masks=masks,
        context_parallel=mpu.get_context_parallel_world_size(),
        approx_kl=host.compute_approx_kl,
    )


class _Tokens(NamedTuple):
    """What was evaluated for the response tokens of this rank, one after the other, `(tokens,)`."""

    value: Tensor
    log_ratio: Tensor
    clipped: Tensor
    valid: Tensor


def megatron_loss(
    host: str,
    args: Any,
    batch: Mapping[str, Any],
    logits: Tensor,
    reduce: Callable[[Tensor], Tensor],
    *,
    logprobs: Sequence[Tensor],
    entropy: Sequence[Tensor] | None,
    masks: Sequence[Tensor],
    context_parallel: int,
    approx_kl: Callable[..., Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of slime and of its forks, from what each of them computes in its own way.

    Args:
        host: Name of the host, for error messages.
        args: The host's arguments.
        batch: The host's batch.
        logits: Logits of the model; they keep the graph connected where there are no tokens.
        reduce: The host's `sum_of_sample_mean`.
        logprobs: Log-probs of each sample's response, this rank's part, `(tokens,)` each.
        entropy: Entropies in the same form; None where the host did not compute them.
        masks: Masks of valid tokens in the same form.
        context_parallel: Number of ranks that share a sequence.
        approx_kl: The host's `compute_approx_kl`.

    Returns:
        The loss, and metrics in the form that the host divides by the number of rollouts or tokens.

    Raises:
        ValueError: If an option would be ignored, or the objective needs an input that the host does not pass to a loss.
    """
    refuse_ignored(host, attributes(args, _DEFAULTS), _DEFAULTS)
    objective = _configured(host, args, context_parallel)
    _check_kl(host, args, objective)
    old, sampler = _references(args, batch, logprobs)
    tokens, metrics = _evaluated(
        objective, logprobs=logprobs, old=old, sampler=sampler, advantages=batch["advantages"], masks=masks
    )
    policy = reduce(-tokens.value)
    loss, report = policy, {_NAMES["loss/policy"]: policy}
    if entropy is not None:
        report[_NAMES["entropy"]] = mean_entropy = reduce(fill(torch.cat(list(entropy)), tokens.valid))
        loss = loss - args.entropy_coef * mean_entropy
    if args.use_kl_loss:
        all_logprobs = (logprobs, batch["ref_log_probs"], old)
        new, reference, before = (fill(torch.cat(list(x)), tokens.valid) for x in all_logprobs)
        ratio = torch.exp(new - before) if args.use_unbiased_kl else None
        kl = reduce(approx_kl(new, reference, kl_loss_type=args.kl_loss_type, importance_ratio=ratio))
        report[_NAMES["kl/ref"]] = kl
        loss = loss + args.kl_loss_coef * kl
    if not sum(len(x) for x in logprobs):
        loss = loss + 0 * logits.sum()
    # The host divides by this share, so that its quotient is the mean over all tokens.
    share = reduce(tokens.valid.to(policy.dtype))
    report |= {
        _NAMES["loss"]: loss,
        _NAMES["clip_fraction/any"]: reduce(tokens.clipped.to(policy.dtype)),
        _NAMES["kl/old_new_k1"]: reduce(-tokens.log_ratio),
    }
    report |= {f"{OWN_PREFIX['slime']}{name}": x * share for name, x in metrics.items() if not name.endswith("_max")}
    return loss, {name: x.detach().clone() for name, x in report.items()}


def _check_kl(host: str, args: Any, objective: Objective) -> None:
    """The host's KL loss must be that of the objective, where it has one."""
    kind = objective.kl.partition("-")[0]
    ratio = objective.kl.endswith("-ratio")
    options = f"--use-kl-loss --kl-loss-coef {objective.kl_coef:g} --kl-loss-type {kind}"
    check_host_kl(
        host,
        objective,
        args.kl_loss_coef if args.use_kl_loss else 0.0,
        options + (" --use-unbiased-kl" if ratio else ""),
    )
    theirs = {"low_var_kl": "k3"}.get(args.kl_loss_type, args.kl_loss_type)
    if objective.kl_coef and (
        theirs != kind or bool(args.use_unbiased_kl) != ratio or objective.kl.endswith("-unbiased")
    ):
        raise ValueError(
            f"{host}: objective {objective.name!r} has kl={objective.kl!r}, and --kl-loss-type {args.kl_loss_type} with "
            f"use_unbiased_kl={args.use_unbiased_kl} is another term; the host has k1, k2 and k3, and with --use-unbiased-kl "
            "these times the ratio"
        )


def _references(
    args: Any, batch: Mapping[str, Any], logprobs: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Log-probs of the policy that the ratio is taken against, and of the sampler where the host has them."""
    names = ("rollout_log_probs", "log_probs")
    sampler, old = ([x.detach() for x in batch[name]] if batch.get(name) else None for name in names)
    if args.use_rollout_logprobs:
        assert sampler is not None, "the host gives rollout_log_probs with --use-rollout-logprobs"
        return sampler, sampler
    if old is None:  # the host reuses the log-probs of this very pass: the policy is still the old one
        old = [x.detach() for x in logprobs]
    return old, sampler


def _evaluated(
    objective: Objective,
    *,
    logprobs: Sequence[Tensor],
    old: Sequence[Tensor],
    sampler: Sequence[Tensor] | None,
    advantages: Sequence[Tensor],
    masks: Sequence[Tensor],
) -> tuple[_Tokens, dict[str, Tensor]]:
    """The objective of each token and the metrics, from one tensor for each sample."""

    def rows(tensors: Sequence[Tensor]) -> Tensor:
        return pad_sequence(list(tensors), batch_first=True)

    def tokens(x: Tensor) -> Tensor:
        return torch.cat([row[: len(sample)] for row, sample in zip(x, logprobs, strict=True)])

    mask = rows(masks)
    found = evaluate(
        objective,
        logprobs=rows(logprobs),
        old_logprobs=rows(old),
        rollout_logprobs=None if sampler is None else rows(sampler),
        advantages=rows(advantages),
        mask=mask,
    )
    return _Tokens(
        tokens(found.value), tokens(found.log_ratio), tokens(found.clipped), tokens(mask) != 0
    ), found.metrics


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
    return host_objective(host, name, given, sampler="only" if against_sampler else "beside", rows=rows, kl="")
