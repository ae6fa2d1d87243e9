"""Recognises the framework of a file by keys and programs that only it has; most of them have no reader."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bandpo.doctor.shell import Script, Word

READABLE = (
    "the doctor reads files of TRL's GRPOConfig, of verl's main_ppo (actor_rollout_ref. ...), of ms-swift's rlhf_type grpo, of "
    "bandpo train, and launch scripts and configurations of OpenRLHF, SkyRL, slime, NeMo-RL, prime-rl and rLLM"
)

# In YAML: keys that must all be on the top level.
_BY_KEYS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("NeMo-RL", ("grpo", "policy")),
    ("NeMo-RL", ("loss_fn", "policy")),
    ("NeMo-RL", ("grpo", "checkpointing")),
    ("NeMo-RL", ("grpo", "loss_fn")),
    ("SkyRL", ("trainer", "generator")),
    ("prime-rl", ("orchestrator",)),
    ("EasyR1", ("worker", "algorithm")),
    ("verl's SFT trainer", ("data", "model", "optim", "trainer")),
    ("AReaL", ("gconfig", "actor")),
    ("AReaL", ("allocation_mode",)),
    ("open-instruct", ("num_unique_prompts_rollout",)),
    ("ROLL", ("actor_train",)),
    ("OpenRLHF", ("pretrain", "rollout_batch_size")),
    ("OpenRLHF", ("actor_num_nodes",)),
    ("slime", ("hf_checkpoint", "rollout_batch_size")),
    ("LLaMA-Factory", ("finetuning_type",)),
    ("LLaMA-Factory", ("stage", "do_train")),
    ("Axolotl", ("base_model", "datasets")),
    ("Axolotl", ("base_model", "rl")),
    ("TRL's RLOOTrainer", ("normalize_advantages",)),
    ("TRL's RLOOTrainer", ("reward_clip_range",)),
    ("one of TRL's distillation trainers", ("teacher_model_name_or_path",)),
    ("ms-swift", ("rlhf_type",)),
    ("accelerate", ("compute_environment",)),
    ("accelerate", ("distributed_type",)),
    ("DeepSpeed", ("zero_optimization",)),
)

# In a script: a word must contain one of these.
_BY_WORD: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("rLLM", ("rllm/backend=",)),
    ("SkyRL", ("skyrl", "trainer.algorithm.advantage_estimator=", "generator.n_samples_per_prompt=")),
    ("OpenRLHF", ("openrlhf",)),
    ("NeMo-RL", ("nemo_rl", "nemo-rl", "run_grpo_", "loss_fn.", "grpo.num_prompts_per_step=", "policy.generation.")),
    ("prime-rl", ("prime_rl", "prime-rl")),
    ("AReaL", ("areal",)),
    ("open-instruct", ("open_instruct",)),
    ("EasyR1", ("worker.actor.", "worker.rollout.")),
    ("LLaMA-Factory", ("llamafactory",)),
    ("Axolotl", ("axolotl",)),
    ("verl's SFT trainer", ("sft_trainer", "model.partial_pretrain=")),
    ("miles", ("/miles",)),
    ("slime", ("slime", "--rollout-batch-size", "--num-rollout")),
)
_BY_PROGRAM = {
    "swift": "ms-swift",
    "tune": "torchtune",
    "trl": "a launch line of TRL",
    "accelerate": "a launch line of accelerate",
    "deepspeed": "a launch line of DeepSpeed",
}


def not_readable(path: Path, host: str) -> ValueError:
    """The error for a file that the doctor cannot read.

    Args:
        path: The file.
        host: The framework that it belongs to; "" if that is not known.
    """
    if host:
        return ValueError(f"{path}: this looks like {host}; {READABLE}")
    return ValueError(f"{path} is not recognised: it has no setting that only one of these has; {READABLE}")


def host_of_keys(given: Mapping[Any, Any]) -> str:
    """The framework whose configuration this is, "" if it is not known.

    Args:
        given: Keys and values of a YAML file.

    Examples:
        >>> host_of_keys({"defaults": "grpo_math_1B.yaml", "grpo": {}, "policy": {}})
        'NeMo-RL'
    """
    keys = {str(key).partition(".")[0] for key in given}
    for host, needed in _BY_KEYS:
        if keys.issuperset(needed):
            return host
    if any(isinstance(value, Mapping) and "_component_" in value for value in given.values()):
        return "torchtune"
    if isinstance(given.get("defaults"), str):  # Hydra's is a list
        return "NeMo-RL"
    return ""


def host_of_script(script: Script) -> str:
    """The framework that a script runs, with the configuration that it names; "" if it is not known.

    Args:
        script: The words of the script.
    """
    words = [word for command in script.commands for word in command]
    texts = [word.text.lower() for word in [*words, *(w for value in script.variables.values() for w in value)]]
    for host, marks in _BY_WORD:
        if any(mark in text for text in texts for mark in marks):
            return host
    programs = {text.rpartition("/")[2] for text in texts}
    for program, host in _BY_PROGRAM.items():
        if program in programs:
            return f"{host}{_config(words)}"
    return ""


def _config(words: list[Word]) -> str:
    """The YAML file that a launch line names."""
    for i, word in enumerate(words):
        name, equals, value = word.text.partition("=")
        if name != "--config":
            continue
        file = word if equals else words[i + 1] if i + 1 < len(words) else word
        if file.literal and file.text != "--config":
            return f"; examine {value or file.text}, which it names"
    return ""
