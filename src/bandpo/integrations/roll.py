"""The objectives in ROLL, by the class of the worker.

    actor_train:
      worker_cls: bandpo.integrations.roll.RLVRActorWorker        # or AgenticActorWorker, in the agentic pipeline
      system_envs:
        BANDPO_LOSS: '{"objective": "bandpo-kl", "radius": 0.05}'  # without it: bandpo-kl as it is

The workers are ROLL's with another `loss_func`. The reduction (`loss_agg_mode`), sample weights, KL loss, entropy bonus and the
correction for the sampler (`train_infer_correction`) stay ROLL's: its own function computes what is not ours, at advantages of
zero.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from bandpo._inputs import fill
from bandpo.integrations._host import attributes, evaluate, host_objective, options_of_environment, refuse_ignored
from bandpo.integrations._host_metrics import as_floats
from bandpo.integrations.names import OWN_PREFIX, metrics_of
from bandpo.objective import Objective
from bandpo.surrogates import MAX_LOG_RATIO

_DEFAULTS = {
    "pg_clip": 0.2, "use_pg_clip_range": False, "dual_clip_loss": False, "importance_sampling": "token",
    "ratio_type": "token",
}  # fmt: skip
_WORKERS = {
    "RLVRActorWorker": "roll.pipeline.rlvr.actor_worker",
    "AgenticActorWorker": "roll.pipeline.agentic.agentic_actor_worker",
}


def band_loss_func(self: Any, data: Any, output_tensor: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """`loss_func` of a ROLL actor: its own terms at advantages of zero, and ours.

    Args:
        self: The worker.
        data: ROLL's batch.
        output_tensor: Of the model.

    Raises:
        ValueError: If an option would be ignored, or the objective needs what ROLL does not give a loss.
    """
    from roll.utils.functionals import agg_loss

    config, batch = self.pipeline_config, data.batch
    refuse_ignored("ROLL", attributes(config, _DEFAULTS), _DEFAULTS)
    objective = _objective(config)
    score, strategy = self.strategy.op_compute_log_probs, self.strategy
    new = score(logits=output_tensor, input_ids=batch["input_ids"], attention_mask=batch["response_mask"])
    old = self.get_old_log_probs_with_cache(data, new)
    mask = batch["response_mask"][:, 1:]
    final = batch.get("final_response_mask", mask)
    keep, weights = _corrected(self, data, old, mask)
    kept = final * keep
    sampler = batch.get("infer_logprobs", None)
    if sampler is not None and not len(sampler):  # ROLL's way to say that there are none
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
    if hasattr(self, "compute_sample_weights"):  # of the RLVR pipeline
        how["weights"] = self.compute_sample_weights(data, mask.long() * keep)
    policy = agg_loss(loss_mat=-value, **how) * getattr(config, "rl_loss_coef", 1.0)

    valid = mask != 0
    held = fill(old, valid) + (fill(new, valid) - fill(old, valid)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    poisoned = ("old_log_probs", "ref_log_probs", "infer_logprobs", "train_infer_is_weight")
    there = {name: batch.get(name, None) for name in ("advantages", *poisoned)}
    saved = {name: x for name, x in there.items() if x is not None and len(x)}
    try:
        strategy.op_compute_log_probs = lambda **_: held
        for name, x in saved.items():
            batch[name] = torch.zeros_like(x) if name == "advantages" else fill(x, valid)
        rest, metrics = self.host_loss_func(data, output_tensor)
    finally:
        strategy.op_compute_log_probs = score
        for name, x in saved.items():
            batch[name] = x
    loss = rest + policy
    share = (kept != 0).sum() / counts["batch_num_tokens"]
    prefix, names = OWN_PREFIX["ROLL"], metrics_of("ROLL")
    own = {f"{prefix}{n}@sum": x * share for n, x in found.metrics.items() if not n.endswith("_max")}
    own |= {f"{prefix}{n}@max": x for n, x in found.metrics.items() if n.endswith("_max")}
    own |= {f"{names['loss/policy']}@sum": policy.detach(), f"{names['loss']}@sum": loss.detach()}
    dropped = (*names.values(), "clipfrac", "actor/weighted_pg_loss")
    return loss, {n: x for n, x in metrics.items() if not any(d in n for d in dropped)} | as_floats(own)


def __getattr__(name: str) -> Any:
    """The workers, made when ROLL imports them by path."""
    if name not in _WORKERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    host = importlib.import_module(_WORKERS[name]).ActorWorker
    own = {"loss_func": band_loss_func, "host_loss_func": host.loss_func, "__module__": __name__}
    return globals().setdefault(name, type(name, (host,), own))


def _objective(config: Any) -> Objective:
    given = options_of_environment("ROLL")
    chosen = host_objective("ROLL", given.pop("objective", "bandpo-kl"), given, sampler="beside")
    if config.train_infer_correction.is_weight.enabled and (
        chosen.anchor == "rollout" or chosen.correction is not None
    ):
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
        cfg=config.train_infer_correction, response_mask=mask.long(), old_log_probs=fill(old, valid),
        infer_log_probs=fill(sampler, valid), global_valid_samples=data.meta_info["global_valid_samples"]["response_mask"],
        global_valid_tokens=data.meta_info["batch_num_tokens"]["response_mask"],
    )  # fmt: skip
    return keep.long(), weights if use else None
