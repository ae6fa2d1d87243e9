"""The objectives in ROLL, by the class of the worker.

    actor_train:
      worker_cls: bandpo.integrations.roll.RLVRActorWorker        # or AgenticActorWorker, in the agentic pipeline
      system_envs:
        BANDPO_LOSS: '{"objective": "bandpo-kl", "radius": 0.05}'  # default: bandpo-kl

The workers are ROLL's with another `loss_func`. ROLL itself computes the reduction (`loss_agg_mode`), sample weights, KL loss,
entropy bonus and the correction for the sampler (`train_infer_correction`): its own function is called with all advantages set
to zero, and our policy loss is added.
"""

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bandpo._inputs import fill
from bandpo.integrations._host import (
    Evaluated,
    attributes,
    check_host_kl,
    evaluate,
    host_objective,
    options_of_environment,
    refuse_ignored,
    weighs_sampler,
)
from bandpo.integrations._host_metrics import as_floats
from bandpo.monitoring.names import OWN_PREFIX, metrics_of
from bandpo.objective import Objective
from bandpo.surrogates import MAX_LOG_RATIO

_DEFAULTS = {
    "pg_clip": 0.2,
    "use_pg_clip_range": False,
    "dual_clip_loss": False,
    "importance_sampling": "token",
    "ratio_type": "token",
}
_MAY_BE_NONFINITE = ("old_log_probs", "ref_log_probs", "infer_logprobs", "train_infer_is_weight")
_WORKERS = {
    "RLVRActorWorker": "roll.pipeline.rlvr.actor_worker",
    "AgenticActorWorker": "roll.pipeline.agentic.agentic_actor_worker",
}


class _Policy(NamedTuple):
    """Our part of the loss."""

    loss: Tensor
    """The policy loss as ROLL reduces it, 0-d."""
    found: Evaluated
    share: Tensor
    """Valid tokens of the micro-batch over those of the global batch, 0-d."""


def band_loss_func(self: Any, data: Any, output_tensor: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """`loss_func` of a ROLL actor: ROLL's own terms with all advantages set to zero, plus our policy loss.

    Args:
        self: The worker of ROLL.
        data: ROLL's batch.
        output_tensor: Logits of the model.

    Returns:
        The loss, and ROLL's metrics with ours in the place of those of its policy loss.

    Raises:
        ValueError: If an option would be ignored, or the objective needs an input that ROLL does not pass to a loss.
    """
    config, batch = self.pipeline_config, data.batch
    refuse_ignored("ROLL", attributes(config, _DEFAULTS), _DEFAULTS)
    objective = _objective(config)
    new = self.strategy.op_compute_log_probs(
        logits=output_tensor, input_ids=batch["input_ids"], attention_mask=batch["response_mask"]
    )
    old = self.get_old_log_probs_with_cache(data, new)
    policy = _policy(self, objective, data, new, old)
    rest, metrics = _host_terms(self, data, output_tensor, new, old)
    loss = rest + policy.loss
    prefix, names = OWN_PREFIX["ROLL"], metrics_of("ROLL")
    own: dict[str, Tensor] = {}
    for name, x in policy.found.metrics.items():
        if name.endswith("_max"):
            own[f"{prefix}{name}@max"] = x
        else:
            own[f"{prefix}{name}@sum"] = x * policy.share
    own |= {f"{names['loss/policy']}@sum": policy.loss.detach(), f"{names['loss']}@sum": loss.detach()}
    dropped = (*names.values(), "clipfrac", "actor/weighted_pg_loss")
    return loss, {n: x for n, x in metrics.items() if not any(d in n for d in dropped)} | as_floats(own)


def _policy(self: Any, objective: Objective, data: Any, new: Tensor, old: Tensor) -> _Policy:
    """The policy loss with the objective, with ROLL's mask, weights and reduction."""
    from roll.utils.functionals import agg_loss

    config, batch = self.pipeline_config, data.batch
    mask = batch["response_mask"][:, 1:]
    keep, weights = _corrected(self, data, old, mask)
    kept = batch.get("final_response_mask", mask) * keep
    sampler = batch.get("infer_logprobs", None)
    if sampler is not None and not len(sampler):  # in ROLL, an empty tensor means that there are none
        sampler = None
    found = evaluate(
        objective, logprobs=new, old_logprobs=old, rollout_logprobs=sampler, advantages=batch["advantages"], mask=kept
    )
    value = found.value if weights is None else (found.value * weights).masked_fill(kept == 0, 0.0)
    counts = {
        name: data.meta_info[name].get("final_response_mask", data.meta_info[name]["response_mask"])
        for name in ("batch_num_tokens", "global_valid_samples")
    }
    how: dict[str, Any] = {"loss_mask": kept, "loss_agg_mode": config.loss_agg_mode, **counts}
    if hasattr(self, "compute_sample_weights"):  # only the RLVR pipeline has it
        how["weights"] = self.compute_sample_weights(data, mask.long() * keep)
    loss = agg_loss(loss_mat=-value, **how) * getattr(config, "rl_loss_coef", 1.0)
    return _Policy(loss, found, (kept != 0).sum() / counts["batch_num_tokens"])


def _host_terms(self: Any, data: Any, output_tensor: Tensor, new: Tensor, old: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The loss and metrics of ROLL's own function, with all advantages set to zero and finite log-probs."""
    batch, strategy = data.batch, self.strategy
    valid = batch["response_mask"][:, 1:] != 0
    held = fill(old, valid) + (fill(new, valid) - fill(old, valid)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    changed = {name: batch.get(name, None) for name in ("advantages", *_MAY_BE_NONFINITE)}
    saved = {name: x for name, x in changed.items() if x is not None and len(x)}
    score = strategy.op_compute_log_probs
    try:
        strategy.op_compute_log_probs = lambda **_: held
        for name, x in saved.items():
            batch[name] = torch.zeros_like(x) if name == "advantages" else fill(x, valid)
        return self.host_loss_func(data, output_tensor)
    finally:
        strategy.op_compute_log_probs = score
        for name, x in saved.items():
            batch[name] = x


def __getattr__(name: str) -> Any:
    """The workers, made when ROLL imports them by path."""
    if name not in _WORKERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    host = importlib.import_module(_WORKERS[name]).ActorWorker
    own = {"loss_func": band_loss_func, "host_loss_func": host.loss_func, "__module__": __name__}
    return globals().setdefault(name, type(name, (host,), own))


def _objective(config: Any) -> Objective:
    given = options_of_environment("ROLL")
    chosen = host_objective("ROLL", given.pop("objective", "bandpo-kl"), given, sampler="beside", kl="")
    check_host_kl(
        "ROLL",
        chosen,
        config.kl_loss_coef if config.use_kl_loss else 0.0,
        f"use_kl_loss: true and kl_loss_coef: {chosen.kl_coef:g}",
    )
    if config.train_infer_correction.is_weight.enabled and (chosen.anchor == "rollout" or weighs_sampler(chosen)):
        raise ValueError(
            f"ROLL: train_infer_correction is on, and objective {chosen.name!r} accounts for the sampler itself; use one"
        )
    return chosen


def _corrected(self: Any, data: Any, old: Tensor, mask: Tensor) -> tuple[Tensor | int, Tensor | None]:
    """What ROLL's correction for the sampler keeps, and its weights."""
    config, batch = self.pipeline_config, data.batch
    use = config.train_infer_correction.is_weight.enabled
    if config.enable_old_logprobs_recompute:
        return 1, batch["train_infer_is_weight"] if use else None
    from roll.utils.train_infer_corrections import compute_train_infer_correction

    valid = mask != 0
    sampler = batch.get("infer_logprobs", old)
    sampler = sampler if len(sampler) else old
    weights, keep, _ = compute_train_infer_correction(
        cfg=config.train_infer_correction,
        response_mask=mask.long(),
        old_log_probs=fill(old, valid),
        infer_log_probs=fill(sampler, valid),
        global_valid_samples=data.meta_info["global_valid_samples"]["response_mask"],
        global_valid_tokens=data.meta_info["batch_num_tokens"]["response_mask"],
    )
    return keep.long(), weights if use else None
