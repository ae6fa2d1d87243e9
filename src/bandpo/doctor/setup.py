"""A run's settings as far as the trust region cares, in one form for every host."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from bandpo.composition import Objective

Host = Literal["bandpo train", "TRL", "verl"]


@dataclass(frozen=True)
class Setup:
    """What the rules of `examine_setup` look at.

    Args:
        host: Which one; decides the names in advice.
        objective: What is optimised, the host's own loss as the objective it equals.
        ours: Whether bandpo computes it; false for the host's own loss.
        steps: Optimiser steps for each rollout.
        steps_from: How that number came about, in the host's names.
        engine: Sampler other than the trainer itself ("vllm", "sglang"), "" for none.
        corrected: Whether the host weighs for the difference between sampler and trainer.
        old_is_rollout: Whether the host puts the sampler's log-probs where the old ones are.
        temperature: Of sampling.
        top_p: Of sampling.
        top_k: Of sampling; 0 for off.
        min_p: Of sampling; 0 for off.
        group: Completions of a prompt.
        bypassed: Why the loss that is configured would not be the one that runs; "" if it is.
        tokens: Completion tokens whose logits exist at once, at most.
        vocabulary: Of the model; None if not known.
        fused_head: Whether the host computes log-probs without the logits.
        knobs: The host's name of what the rules advise.
        unread: What in the configuration could not be looked into.
    """

    host: Host
    objective: Objective
    ours: bool = True
    steps: float = 1.0
    steps_from: str = ""
    engine: str = ""
    corrected: bool = False
    old_is_rollout: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    group: int = 8
    bypassed: str = ""
    tokens: int = 0
    vocabulary: int | None = None
    fused_head: bool = False
    knobs: Mapping[str, str] = field(default_factory=dict[str, str])
    unread: tuple[str, ...] = ()

    def knob(self, name: str) -> str:
        """The host's spelling of a piece of advice, the name itself where it has none."""
        return self.knobs.get(name, name)


TRL_KNOBS: Mapping[str, str] = {
    "more steps": "num_iterations=2 or more, or steps_per_generation a multiple of gradient_accumulation_steps",
    "no truncation": "top_p=1.0, top_k=0, min_p unset",
    "correction": "vllm_importance_sampling_correction=True, or an objective with the rollout anchor (dppo-kl)",
    "group": "num_generations=2 or more",
    "use": "BandGRPOTrainer and BandGRPOConfig in place of GRPOTrainer and GRPOConfig, objective=...",
}
VERL_KNOBS: Mapping[str, str] = {
    "more steps": "data.train_batch_size a multiple of actor_rollout_ref.actor.ppo_mini_batch_size, or ppo_epochs=2",
    "no truncation": "actor_rollout_ref.rollout.top_p=1.0 and top_k=-1",
    "correction": "algorithm.rollout_correction.rollout_is=token, or an objective with the rollout anchor (dppo-kl)",
    "group": "actor_rollout_ref.rollout.n=8, say",
    "use": "actor_rollout_ref.actor.policy_loss.loss_mode=bandpo",
}
