"""The objectives in AReaL, one line before the trainer is made.

    import bandpo.integrations.areal as bandpo_areal

    bandpo_areal.install(config, objective="bandpo-kl", radius=0.05)  # config: the GRPOConfig of your script
    with PPOTrainer(config, ...) as trainer:
        ...

AReaL has no hook. `install` replaces its actor engines by subclasses that put our loss in the place of `ppo_actor_loss_fn` in
every process in which they run (AReaL's workers import the engine by its path). It sends the options to the actor's workers in
the environment variable BANDPO_LOSS. The reduction is AReaL's: a mean over the valid tokens of a micro-batch, weighted by their
number. The sampler's log-probs exist only with `actor.use_decoupled_loss`.
"""

import importlib
import json
import os
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bandpo._inputs import fill
from bandpo.integrations._host import (
    ENVIRONMENT,
    attributes,
    evaluate,
    host_objective,
    of_sequences,
    options_of_environment,
    refuse_ignored,
    weighs_sampler,
)
from bandpo.integrations.options import parse_options
from bandpo.losses import aggregate
from bandpo.objective import Objective

_DEFAULTS = {
    "eps_clip": 0.2,
    "eps_clip_higher": None,
    "c_clip": None,
    "importance_sampling_level": "token",
    "use_sapo_loss": False,
}
_ENGINES = {
    "BandFSDPPPOActor": ("areal.engine", "FSDPPPOActor"),
    "BandMegatronPPOActor": ("areal.engine", "MegatronPPOActor"),
    "BandArchonPPOActor": ("areal.experimental.engine.archon_engine", "ArchonPPOActor"),
}


def install(config: Any, objective: str = "bandpo-kl", *, backend: str = "fsdp", **options: Any) -> None:
    """Make AReaL's trainer use our loss; call it before `PPOTrainer(config, ...)`.

    Args:
        config: AReaL's configuration; its `actor` is trained.
        objective: A name of `bandpo objectives`, or "package.module:NAME".
        backend: Backend of the actor's engine: `fsdp`, `megatron` or `archon`.
        options: Changes of the objective's region: fields of `RegionOptions`, except `divergence_top_k`.

    Raises:
        ValueError: If an option would be ignored, or the objective needs an input that this configuration does not provide.
    """
    actor = config.actor
    refuse_ignored("AReaL", attributes(actor, _DEFAULTS), _DEFAULTS)
    chosen = _objective({"objective": objective, **options})
    of_sampler = any("rollout" in rule.needs for rule in chosen.filters)
    if (chosen.anchor == "rollout" or chosen.correction is not None or of_sampler) and not actor.use_decoupled_loss:
        raise ValueError(
            f"AReaL: objective {objective!r} needs the sampler's log-probs beside the recomputed ones: set "
            "actor.use_decoupled_loss=true"
        )
    if actor.rejection_sampling is not None and (chosen.anchor == "rollout" or weighs_sampler(chosen)):
        raise ValueError(
            f"AReaL: actor.rejection_sampling is set, and objective {objective!r} accounts for the sampler itself; use one"
        )
    names = {"fsdp": "BandFSDPPPOActor", "megatron": "BandMegatronPPOActor", "archon": "BandArchonPPOActor"}
    if backend not in names:
        raise ValueError(f"backend={backend!r}; choose one of {', '.join(names)}")
    text = json.dumps({"objective": objective, **parse_options(options)})
    os.environ[ENVIRONMENT] = text
    for spec in actor.scheduling_spec:
        spec.env_vars[ENVIRONMENT] = text
    module, name = _ENGINES[names[backend]]
    setattr(importlib.import_module(module), name, _engine(names[backend]))


def policy_loss(
    objective: Objective,
    *,
    logprobs: Tensor,
    proximal_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    rejection_sampling: Any = None,
    cu_seqlens: Tensor | None = None,
    **ignored: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """AReaL's `ppo_actor_loss_fn` with the objective: `-Σ s(log r_t, A_t, b_t) / valid tokens`.

    Args:
        objective: The objective to train on.
        logprobs: Log-probs of the policy in training, with gradient, padded `(batch, time)` or packed `(tokens,)`.
        proximal_logprobs: Log-probs of the policy before the update, in the same shape.
        old_logprobs: Log-probs of the sampler in the same shape, where the decoupled loss is on.
        advantages: Advantage of each token, in the same shape.
        loss_mask: Mask of valid tokens, in the same shape.
        rejection_sampling: AReaL's configuration of rejection sampling; its own function applies it.
        cu_seqlens: Positions at which packed sequences begin; required by objectives of whole sequences.
        ignored: AReaL's clip options, which must have their defaults.

    Returns:
        The loss, and AReaL's statistics of each token.

    Raises:
        ValueError: If an option would be ignored, or packed sequences cannot be told apart.
    """
    refuse_ignored("AReaL", ignored, _DEFAULTS)
    valid = loss_mask != 0
    count, kept = valid.sum().clamp_min(1), valid
    new, old, sampler = (fill(x, valid) for x in (logprobs, proximal_logprobs.detach(), old_logprobs.detach()))
    weight, stats = None, {}
    if rejection_sampling is not None:
        from areal.utils.functional.functional import apply_rejection_sampling

        found = apply_rejection_sampling(
            proximal_logprobs=old,
            old_logprobs=sampler,
            loss_mask=valid,
            cu_seqlens=cu_seqlens,
            config=rejection_sampling,
        )
        kept, weight = found.loss_mask.bool(), found.behave_imp_weight
        used = (weight > 0) & kept
        stats = {
            "behave_approx_kl": torch.where(used, old - sampler, 0.0),
            "behave_imp_weight": weight.detach(),
            "behave_mask": used,
            "filtered_fraction": found.filtered_fraction,
        }
    lengths = None if logprobs.dim() == 2 else _lengths(objective, cu_seqlens, len(logprobs))
    given = {"logprobs": new, "old_logprobs": old, "rollout_logprobs": sampler, "advantages": advantages, "mask": kept}
    result = evaluate(objective, **{name: _rows(x, lengths) for name, x in given.items()})
    value, log_ratio, clipped = (_tokens(x, lengths) for x in (result.value, result.log_ratio, result.clipped))
    term = -value if weight is None else -value * weight
    loss = aggregate(term.view(1, -1), kept.view(1, -1), "token-mean", normalizer=count)
    return loss, {
        "loss": term.detach(),
        "importance_weight": torch.where(kept, log_ratio.exp(), 0.0),
        "approx_kl": log_ratio,
        "clip_mask": clipped,
        "dual_clip_mask": torch.zeros_like(clipped),
        **stats,
    }


def exchange() -> None:
    """Put our loss in the place of AReaL's in this process; the engines call this when they are created."""
    import areal.trainer.ppo.actor as module

    given = options_of_environment("AReaL")
    objective = _objective(given)

    def ppo_actor_loss_fn(
        logprobs: Tensor,
        proximal_logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        eps_clip: float,
        loss_mask: Tensor,
        eps_clip_higher: float | None = None,
        c_clip: float | None = None,
        rejection_sampling: Any = None,
        importance_sampling_level: str = "token",
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        return policy_loss(
            objective,
            logprobs=logprobs,
            proximal_logprobs=proximal_logprobs,
            old_logprobs=old_logprobs,
            advantages=advantages,
            loss_mask=loss_mask,
            rejection_sampling=rejection_sampling,
            cu_seqlens=cu_seqlens,
            eps_clip=eps_clip,
            eps_clip_higher=eps_clip_higher,
            c_clip=c_clip,
            importance_sampling_level=importance_sampling_level,
        )

    module.ppo_actor_loss_fn = ppo_actor_loss_fn


def __getattr__(name: str) -> Any:
    """The engines, created when AReaL's workers import them by path."""
    if name in _ENGINES:
        return _engine(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _engine(name: str) -> type:
    module, base = _ENGINES[name]
    host = getattr(importlib.import_module(module), base)
    if host.__module__ == __name__:
        return host

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        host.__init__(self, *args, **kwargs)
        exchange()

    return type(name, (host,), {"__init__": __init__, "__module__": __name__})


def _objective(given: dict[str, Any]) -> Objective:
    options = dict(given)
    name = options.pop("objective", "bandpo-kl")
    return host_objective("AReaL", name, options, sampler="beside")


def _lengths(objective: Objective, cu_seqlens: Tensor | None, tokens: int) -> list[int]:
    """Lengths of the packed sequences; one row of all tokens where the objective does not look beyond a token."""
    if not of_sequences(objective):
        return [tokens]
    if cu_seqlens is None:
        raise ValueError(f"AReaL: objective {objective.name!r} looks at whole sequences, and cu_seqlens is missing")
    found = cu_seqlens.diff().tolist()
    return [*found, tokens - sum(found)] if sum(found) < tokens else found


def _rows(x: Tensor, lengths: list[int] | None) -> Tensor:
    return x if lengths is None else pad_sequence(list(x.split(lengths)), batch_first=True)


def _tokens(x: Tensor, lengths: list[int] | None) -> Tensor:
    return x if lengths is None else torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)])
