"""The settings of a run that matter for its trust region, in one form for every host."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from bandpo._system.secrets import redact_text
from bandpo.monitoring.findings import Level
from bandpo.objective import Objective
from bandpo.zoo import get_objective

Host = Literal[
    "bandpo train", "TRL", "unsloth", "ms-swift", "verl", "OpenRLHF", "SkyRL", "slime", "NeMo-RL", "prime-rl", "rLLM"
]


@dataclass(frozen=True)
class Setup:
    """What the rules of `examine_setup` look at. A value of None is not known, and no rule uses it.

    Args:
        host: The host; it determines the names in the advice.
        objective: The objective; for a loss of the host, the objective that equals it.
        ours: Whether bandpo computes the loss; false for the host's own loss.
        steps: Optimiser steps for each rollout.
        steps_from: How that number was computed, in the names of the host; or why it is not known.
        lag: Optimiser steps by which the sampler may be older than the policy whose update begins; None if it is not known.
        engine: The sampler if it is not the trainer itself ("vllm", "sglang"), "" if it is.
        corrected: Whether the host applies weights for the difference between sampler and trainer.
        old_is_rollout: Whether the host uses the sampler's log-probs as the old ones.
        temperature: Temperature of sampling.
        top_p: Nucleus of sampling; 1 for off.
        top_k: Number of most likely tokens that are sampled from; 0 for off.
        min_p: Smallest probability in sampling, relative to the largest one; 0 for off.
        group: Completions of a prompt.
        alone: How bad a group of one completion is for the advantages, and why; None where they do not need groups.
        kl_coef: Coefficient of the KL to the reference in the loss, 0 for none.
        kl: The KL term, a name of `bandpo.reference`; "" if it is none of them.
        kl_from: The host's options that determine it.
        bypassed: Why another loss than the configured one would run; "" if the configured one runs.
        refused: The error that bandpo's adapter would raise for these settings; "" for none.
        tokens: Completion tokens whose logits exist at once, at most.
        vocabulary: Number of tokens in the model's vocabulary; None if it is not known.
        fused_head: Whether the host computes log-probs without the logits.
        weights: dtype of the trained weights, where the configuration sets it.
        learning_rate: Learning rate of the optimiser, where the configuration sets it.
        knobs: The host's names for what the rules advise.
        assumed: Settings that are not in the file, as `name=value`, with the host's defaults.
        unread: What in the configuration could not be read.
        defaults_of: Whose defaults these are ("TRL 1.16.0's"); "" for the host's.
    """

    host: Host
    objective: Objective | None
    ours: bool = True
    steps: float | None = 1.0
    steps_from: str = ""
    lag: float | None = 0.0
    engine: str | None = ""
    corrected: bool | None = False
    old_is_rollout: bool | None = False
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    top_k: int | None = 0
    min_p: float | None = 0.0
    group: int | None = 8
    alone: tuple[Level, str] | None = ("problem", "advantages compare the completions of a prompt: all are 0")
    kl_coef: float | None = 0.0
    kl: str | None = ""
    kl_from: str = ""
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
    defaults_of: str = ""

    def knob(self, name: str) -> str:
        """The host's spelling of a piece of advice.

        Args:
            name: Name of the advice; it is returned where the host has no spelling of its own.
        """
        return self.knobs.get(name, name)


TRL_KNOBS: dict[str, str] = {
    "more steps": "num_iterations=2 or more, or steps_per_generation a multiple of gradient_accumulation_steps",
    "no truncation": "top_p=1.0, top_k=0, min_p unset",
    "correction": "vllm_importance_sampling_correction=True, or an objective with the rollout anchor (dppo-kl)",
    "group": "num_generations=2 or more",
    "precision": "dtype float32 (bf16: true computes in bfloat16 and keeps the weights in float32)",
    "kl": "kl=k3-ratio (in a plain GRPOConfig use_bias_correction_kl=True, with importance_sampling_level=token)",
    "use": "BandGRPOTrainer and BandGRPOConfig in place of GRPOTrainer and GRPOConfig, objective=...",
}
SWIFT_KNOBS: dict[str, str] = {
    "more steps": "--steps_per_generation a multiple of --gradient_accumulation_steps, or --num_iterations 2",
    "no truncation": "--top_p 1.0 --top_k -1 --min_p 0",
    "correction": "--rollout_importance_sampling_mode token_truncate",
    "group": "--num_generations 8, for example",
    "precision": "--torch_dtype float32 --bf16 true",
    "kl": "--beta 0 (ms-swift has no form that is right for older tokens)",
    "fused head": "--use_liger_kernel true",
    "use": "bandpo has no adapter for ms-swift: train with TRL (BandGRPOTrainer) or with verl",
}
VERL_KNOBS: dict[str, str] = {
    "more steps": "data.train_batch_size a multiple of actor_rollout_ref.actor.ppo_mini_batch_size, or ppo_epochs=2",
    "no truncation": "actor_rollout_ref.rollout.top_p=1.0 and top_k=-1",
    "correction": "algorithm.rollout_correction.rollout_is=token, or an objective with the rollout anchor (dppo-kl)",
    "group": "actor_rollout_ref.rollout.n=8, for example",
    "precision": "actor_rollout_ref.actor.fsdp_config.model_dtype=fp32",
    "kl": "actor_rollout_ref.actor.kl_loss_type=low_var_kl+ (verl has no form that is right for older tokens)",
    "use": "actor_rollout_ref.actor.policy_loss.loss_mode=bandpo",
}
OPENRLHF_KNOBS: dict[str, str] = {
    "more steps": "--rollout.batch_size x --rollout.n_samples_per_prompt a multiple of --train.batch_size, "
    "or --train.max_epochs 2",
    "no truncation": "--rollout.top_p 1.0",
    "correction": "--algo.advantage.is_correction_enable, or an objective with the rollout anchor (dppo-kl)",
    "group": "--rollout.n_samples_per_prompt 8, for example",
    "kl": "--algo.kl.use_loss --algo.kl.estimator k2 (right for new tokens; OpenRLHF has no form that is right for older ones)",
    "use": "python -m bandpo.integrations.openrlhf --objective ... -- and the options of train_ppo_ray",
}
SKYRL_KNOBS: dict[str, str] = {
    "more steps": "trainer.train_batch_size a multiple of trainer.policy_mini_batch_size, "
    "or trainer.update_epochs_per_batch=2",
    "no truncation": "generator.sampling_params.top_p=1.0, top_k=-1 and min_p=0.0",
    "correction": "trainer.algorithm.off_policy_correction.tis_ratio_type=token, "
    "or policy_loss_type=dppo, which takes its ratio against the sampler",
    "group": "generator.n_samples_per_prompt=8, for example",
    "kl": "trainer.algorithm.kl_estimator_type=k2 (right for new tokens; SkyRL has no form that is right for older ones)",
    "use": "bandpo.integrations.skyrl.register(...) in the entry point, and trainer.algorithm.policy_loss_type",
    "fused head": "trainer.fused_lm_head_logprob=true (Megatron)",
}
SLIME_KNOBS: dict[str, str] = {
    "more steps": "--num-steps-per-rollout 2 or more, "
    "or --rollout-batch-size x --n-samples-per-prompt a multiple of --global-batch-size",
    "no truncation": "--rollout-top-k -1",
    "correction": "--use-tis, or --use-rollout-logprobs, which takes the ratio against the sampler",
    "group": "--n-samples-per-prompt 8, for example",
    "kl": "--use-unbiased-kl --kl-loss-type low_var_kl",
    "use": "--loss-type custom_loss --custom-loss-function-path bandpo.integrations.slime.policy_loss",
}
NEMO_RL_KNOBS: dict[str, str] = {
    "more steps": "grpo.num_prompts_per_step x grpo.num_generations_per_prompt a multiple of policy.train_global_batch_size",
    "no truncation": "policy.generation.top_p=1.0 and top_k=null",
    "correction": "loss_fn.use_importance_sampling_correction=true, "
    "with truncated_importance_sampling_type=tis and truncated_importance_sampling_ratio=2",
    "group": "grpo.num_generations_per_prompt=8, for example",
    "kl": "loss_fn.reference_policy_kl_type=k3 and loss_fn.use_on_policy_kl_approximation=true",
    "use": "bandpo.integrations.nemo_rl.BandLoss(loss_fn, objective=...) between setup and grpo_train",
    "fused head": "policy.megatron_cfg.use_fused_linear_logprobs=true (Megatron)",
}
PRIME_RL_KNOBS: dict[str, str] = {
    "more steps": "prime-rl uses each batch once; larger batches in several steps are not offered",
    "no truncation": "no top_k or min_p in orchestrator.train.sampling.extra_body",
    "group": "orchestrator.group_size = 8, for example",
    "precision": 'trainer.model.optimization_dtype = "float32"',
    "use": 'trainer.loss: type = "custom", import_path = "bandpo.integrations.prime_rl.policy_loss"',
    "fused head": "trainer.model.fused_lm_head_token_chunk_size = 8192",
}
RLLM_KNOBS: dict[str, str] = {
    "more steps": "rllm.data.train_batch_size a multiple of actor_rollout_ref.actor.ppo_mini_batch_size, or ppo_epochs=2",
    "no truncation": "rllm.rollout.train.top_p=1.0 and actor_rollout_ref.rollout.top_k=-1",
    "correction": "rllm.algorithm.rollout_correction.tis_mode=token, "
    "or rollout_correction.bypass_mode=true, which takes the ratio against the sampler",
    "group": "rllm.rollout.n=8, for example",
    "precision": "actor_rollout_ref.actor.fsdp_config.model_dtype=fp32",
    "kl": "actor_rollout_ref.actor.kl_loss_type=low_var_kl+ (verl has no form that is right for older tokens)",
    "use": "rllm.algorithm.loss_fn=bandpo, and VERL_USE_EXTERNAL_MODULES=bandpo.integrations.rllm on every node",
    "fused head": "actor_rollout_ref.model.use_fused_kernels=True",
}


def named_objective(name: str, unread: list[str]) -> Objective | None:
    """An objective of the zoo. The path of an import is not followed, because a stranger's file could run code.

    Args:
        name: Name of the objective, as in the file.
        unread: Lines about what is not read; a line about such a path is appended.

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
    """A value for a message, without secrets, shortened to 80 characters.

    Args:
        value: The value.
    """
    text = redact_text(repr(value)) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."
