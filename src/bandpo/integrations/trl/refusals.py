"""Options of a GRPO run that TRL would silently not honour; each of them is refused before the model is loaded."""

import warnings

from trl import GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]

from bandpo.integrations._host import weighs_sampler
from bandpo.integrations.trl.config import BandGRPOConfig
from bandpo.integrations.trl.sampler import MEAN
from bandpo.integrations.trl.top import learns_from_top
from bandpo.objective import Objective


def refuse_patched_loss() -> None:
    """Refuse a `GRPOTrainer` whose loss another library has replaced.

    Raises:
        ValueError: If the loss is not TRL's.
    """
    module = GRPOTrainer._compute_loss.__module__  # pyright: ignore[reportPrivateUsage]
    if not module.startswith("trl."):
        raise ValueError(
            f"GRPOTrainer._compute_loss comes from {module}: a patched loss (unsloth?) would bypass the trust region. Import "
            "bandpo.integrations.trl without the patch."
        )


def refuse_sampler(objective: Objective, args: BandGRPOConfig, *, own_sampler: bool) -> None:
    """Refuse samplers that do not fit the objective; warn about a correction that cannot change anything.

    Args:
        objective: The objective of the run.
        args: The options of the run.
        own_sampler: Whether the trainer has a `rollout_func`.

    Raises:
        ValueError: If the difference between sampler and trainer would be corrected twice, or if the objective needs log-probs
            that the sampler does not give.
    """
    corrects = weighs_sampler(objective)
    if (corrects or objective.anchor == "rollout") and args.use_vllm and args.vllm_importance_sampling_correction:
        raise ValueError(
            f"objective {objective.name!r} accounts for the sampler itself; TRL's correction on top would count the mismatch "
            "twice: set vllm_importance_sampling_correction=False"
        )
    if corrects and not args.use_vllm and not own_sampler:
        warnings.warn(
            f"Objective {objective.name!r} corrects for a sampler that differs from the trainer. Without use_vllm the trainer "
            "samples itself, and its recomputed log-probs are taken for those of the sampler: all weights are 1, and the "
            f"difference that rounding makes in 16 bits ({MEAN} in the log) is not corrected.",
            stacklevel=3,
        )
    idle = [rule for rule in objective.filters if rule.action == "drop" and rule.policies == "old/rollout"]
    if idle and not args.use_vllm and not own_sampler:
        warnings.warn(
            f"Objective {objective.name!r} has a filter for a sampler that differs from the trainer "
            "(policies='old/rollout'). Without use_vllm the trainer samples itself, and its recomputed log-probs are taken for "
            "those of the sampler: every log-ratio is 0. Set policies='policy/rollout' to filter by the drift of the policy.",
            stacklevel=3,
        )
    # Against π_old, the trainer makes the top-K log-probs itself: it has the weights of π_old at the time of the rollout.
    needs_top_k = objective.top_k is not None and objective.anchor == "rollout"
    if needs_top_k and args.use_vllm:
        raise ValueError(
            f"objective {objective.name!r} needs the sampler's top-K log-probs, which TRL does not pass on from vLLM; choose "
            "dppo-kl or dppo-tv, or use_vllm=False"
        )
    if needs_top_k and own_sampler:
        raise ValueError(
            f"objective {objective.name!r} needs the sampler's top-K log-probs, which TRL does not take from a rollout_func; "
            "choose dppo-kl or dppo-tv"
        )
    if learns_from_top(objective) and getattr(args, "cast_lm_head_to_fp32", False):
        raise ValueError(
            f"cast_lm_head_to_fp32=True would be ignored: it acts on TRL's own scores, and objective {objective.name!r} is "
            "computed from the model's logits; leave it out, or load the model in float32"
        )


def warn_if_never_binding(objective: Objective, args: BandGRPOConfig) -> None:
    """Warn if each rollout is used for one optimiser step, so that every ratio is 1.

    Args:
        objective: The objective of the run.
        args: The options of the run, completed by TRL.

    Raises:
        ValueError: If a KL penalty shall follow a target: a KL that is always 0 would halve its β after each rollout.
    """
    accumulation, per_rollout = args.gradient_accumulation_steps, args.steps_per_generation
    if per_rollout is not None and accumulation % (per_rollout * args.num_iterations) == 0:
        if args.kl_penalty_target is not None:
            raise ValueError(
                f"kl_penalty_target={args.kl_penalty_target} with one optimiser step for each rollout: the KL is always 0, and "
                "β would be halved after each rollout. Set num_iterations >= 2, or steps_per_generation to a multiple of "
                "gradient_accumulation_steps"
            )
        warnings.warn(
            f"The trust region of {objective.name!r} can never bind: with num_iterations={args.num_iterations}, "
            f"steps_per_generation={per_rollout} and gradient_accumulation_steps={accumulation} each rollout is used for one "
            "optimiser step, where every ratio is 1. Set num_iterations >= 2, or steps_per_generation to a multiple of "
            "gradient_accumulation_steps.",
            stacklevel=3,
        )
