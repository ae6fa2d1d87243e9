"""A run's settings as far as the trust region cares, in one form for every host."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from bandpo._system.secrets import redact_text
from bandpo.doctor.findings import Level
from bandpo.objective import Objective
from bandpo.zoo import get_objective

Host = Literal["bandpo train", "TRL", "verl"]


@dataclass(frozen=True)
class Setup:
    """What the rules of `examine_setup` look at. A value of None was not read, and no rule judges by it.

    Args:
        host: Which one; decides the names in advice.
        objective: What is optimised, the host's own loss as the objective that it equals.
        ours: Whether bandpo computes it; false for the host's own loss.
        steps: Optimiser steps for each rollout.
        steps_from: How that number came about, in the host's names; or why it is not known.
        engine: Sampler other than the trainer itself ("vllm", "sglang"), "" for none.
        corrected: Whether the host weighs for the difference between sampler and trainer.
        old_is_rollout: Whether the host puts the sampler's log-probs where the old ones are.
        temperature: Of sampling.
        top_p: Of sampling.
        top_k: Of sampling; 0 for off.
        min_p: Of sampling; 0 for off.
        group: Completions of a prompt.
        alone: What a group of one does to the advantages, and how bad that is; None where they do not need groups.
        bypassed: Why the loss that is configured would not be the one that runs; "" if it is.
        refused: The error that bandpo's adapter would raise for these settings; "" for none.
        tokens: Completion tokens whose logits exist at once, at most.
        vocabulary: Of the model; None if not known.
        fused_head: Whether the host computes log-probs without the logits.
        weights: dtype that the trained weights are kept in, where the configuration says so.
        learning_rate: Of the optimiser, where the configuration says so.
        knobs: The host's name of what the rules advise.
        assumed: Settings that the file does not have, as `name=value`, with the host's defaults.
        unread: What in the configuration could not be looked into.
    """

    host: Host
    objective: Objective | None
    ours: bool = True
    steps: float | None = 1.0
    steps_from: str = ""
    engine: str | None = ""
    corrected: bool | None = False
    old_is_rollout: bool | None = False
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    top_k: int | None = 0
    min_p: float | None = 0.0
    group: int | None = 8
    alone: tuple[Level, str] | None = ("problem", "advantages compare the completions of a prompt: all are 0")
    bypassed: str = ""
    refused: str = ""
    tokens: int = 0
    vocabulary: int | None = None
    fused_head: bool = False
    weights: str | None = None
    learning_rate: float | None = None
    knobs: Mapping[str, str] = field(default_factory=dict[str, str])
    assumed: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    def knob(self, name: str) -> str:
        """The host's spelling of a piece of advice, the name itself where it has none."""
        return self.knobs.get(name, name)


TRL_KNOBS: Mapping[str, str] = {
    "more steps": "num_iterations=2 or more, or steps_per_generation a multiple of gradient_accumulation_steps",
    "no truncation": "top_p=1.0, top_k=0, min_p unset",
    "correction": "vllm_importance_sampling_correction=True, or an objective with the rollout anchor (dppo-kl)",
    "group": "num_generations=2 or more",
    "precision": "dtype float32 (bf16: true computes in bfloat16 and keeps the weights in float32)",
    "use": "BandGRPOTrainer and BandGRPOConfig in place of GRPOTrainer and GRPOConfig, objective=...",
}
VERL_KNOBS: Mapping[str, str] = {
    "more steps": "data.train_batch_size a multiple of actor_rollout_ref.actor.ppo_mini_batch_size, or ppo_epochs=2",
    "no truncation": "actor_rollout_ref.rollout.top_p=1.0 and top_k=-1",
    "correction": "algorithm.rollout_correction.rollout_is=token, or an objective with the rollout anchor (dppo-kl)",
    "group": "actor_rollout_ref.rollout.n=8, say",
    "precision": "actor_rollout_ref.actor.fsdp_config.model_dtype=fp32",
    "use": "actor_rollout_ref.actor.policy_loss.loss_mode=bandpo",
}


def named_objective(name: str, unread: list[str]) -> Objective | None:
    """An objective of the zoo. The path of an import is not followed: a stranger's file would run code.

    Args:
        name: As the file has it.
        unread: Takes the line that says so.

    Raises:
        ValueError: If there is no objective of that name.

    Examples:
        >>> unread = []
        >>> named_objective("their.module:OBJ", unread), unread
        (None, ["objective 'their.module:OBJ' is the path of an import, and nothing is imported: its region is not known"])
    """
    if ":" in name:
        unread.append(
            f"objective {short(name)} is the path of an import, and nothing is imported: its region is not known"
        )
        return None
    if len(name) > 80:
        raise ValueError(f"objective {short(name)} is unknown")
    return get_objective(name)


def short(value: object) -> str:
    """A value in a message, without secrets, cut where it is long."""
    text = redact_text(repr(value)) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."
