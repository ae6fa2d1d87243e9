"""Reads a YAML file of TRL's `GRPOConfig`, or of `bandpo train`. Needs TRL, which checks the values.

Creating a `GRPOConfig` can load files, start DeepSpeed, join a process group and choose a device. It is given only the plain
numbers, flags and names that the rules look at; nothing else in the file is used.
"""

import difflib
import importlib.metadata
import math
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TrainingArguments
from transformers.utils import logging as hosts_logging
from trl import GRPOConfig, ModelConfig, ScriptArguments  # pyright: ignore[reportPrivateImportUsage]

from bandpo._system.bounded import parse_json, read_regular
from bandpo.bounds import Clip
from bandpo.doctor.setup import TRL_KNOBS, Host, Setup, named_objective, short
from bandpo.integrations.trl.config import AGGREGATION_OF, BandGRPOConfig
from bandpo.objective import Objective
from bandpo.zoo import OBJECTIVES

_FLAGS = frozenset(
    {
        "use_vllm",
        "vllm_importance_sampling_correction",
        "use_liger_kernel",
        "auto_find_batch_size",
        "do_eval",
        "mask_truncated_completions",
        "relax",
        "packing",
        "use_bias_correction_kl",
    }
)
_WHOLE = frozenset(
    {
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "steps_per_generation",
        "generation_batch_size",
        "num_iterations",
        "num_generations",
        "num_generations_eval",
        "max_completion_length",
        "top_k",
        "divergence_top_k",
        "dynamic_sampling",
        "packing_tokens",
        "packing_window",
    }
)
_NUMBERS = frozenset(
    {
        "temperature",
        "top_p",
        "min_p",
        "epsilon",
        "epsilon_high",
        "delta",
        "beta",
        "vllm_importance_sampling_cap",
        "radius",
        "vllm_importance_sampling_clip_min",
        "vllm_importance_sampling_clip_max",
        "radius_upper",
        "max_ratio",
        "radius_end",
        "kl_penalty_target",
    }
)
_NAMES = frozenset(
    {
        "loss_type",
        "scale_rewards",
        "importance_sampling_level",
        "vllm_importance_sampling_mode",
        "eval_strategy",
        "divergence",
        "radius_schedule",
        "radius_target",
        "kl",
    }
)
_READ = _FLAGS | _WHOLE | _NUMBERS | _NAMES | {"objective", "pruning"}
"""The keys that are given to the configuration. None of them makes it open a file, load a module or start anything."""

_ASSUMED = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_iterations",
    "num_generations",
    "use_vllm",
    "temperature",
    "top_p",
    "top_k",
    "max_completion_length",
)
_COUNTED = frozenset(
    {
        "steps_per_generation",
        "num_iterations",
        "gradient_accumulation_steps",
        "generation_batch_size",
        "per_device_train_batch_size",
    }
)
"""The keys that the number of optimiser steps for each rollout depends on."""

_MAY_BE_INFINITE = frozenset({"max_ratio", "epsilon_high", "delta"})
_SHARED = frozenset(
    {
        "beta",
        "loss_type",
        "temperature",
        "use_vllm",
        "packing",
        "model_init_kwargs",
        "max_prompt_length",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "generation_kwargs",
        "cache_implementation",
        "chat_template_kwargs",
        "disable_dropout",
        "ds3_gather_for_generation",
        "log_completions",
        "max_completion_length",
        "num_completions_to_print",
        "pad_to_multiple_of",
        "ref_model_mixup_alpha",
        "ref_model_sync_steps",
        "router_aux_loss_coef",
        "shuffle_dataset",
        "sync_ref_model",
        "trust_remote_code",
    }
)
"""Keys that other trainers of TRL or other frameworks have too: they do not tell whose file it is."""
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_REGION = frozenset({"epsilon", "epsilon_high", "loss_type", "scale_rewards", "importance_sampling_level"})
_ZOO = {"cispo": "cispo", "sapo": "sapo", "gmpo": "gmpo", "vespo": "vespo"}
_LARGEST = 10**12
_LISTED, _MOST_UNKNOWN = 12, 100  # unknown keys that are named, and that a file may have
_MAX_CONFIG_BYTES = 1 << 20
_RUN_ONLY = frozenset({"task", "dataset"})


def is_trl(given: Mapping[Any, Any]) -> bool:
    """Whether a YAML file belongs to `bandpo train`, or has a key that only the GRPO trainer has among TRL's trainers.

    Args:
        given: Keys and values of the file.
    """
    names = {f.name for f in fields(BandGRPOConfig)} - {f.name for f in fields(TrainingArguments)} - _SHARED
    names = {name for name in names if not name.startswith("vllm_") or name.startswith("vllm_importance_sampling_")}
    return is_run(given) or not names.isdisjoint(given) or "reward_funcs" in given


def is_run(given: Mapping[Any, Any]) -> bool:
    """Whether a YAML file belongs to `bandpo train`: it names a task or a dataset with that command's keys.

    Args:
        given: Keys and values of the file.
    """
    return not _RUN_ONLY.isdisjoint(given)


def read_trl(
    given: Mapping[Any, Any],
    *,
    run_keys: frozenset[str] = frozenset(),
    processes: int = 1,
    vocabulary: int | None = None,
) -> Setup:
    """The settings in a TRL configuration. With an `objective` or another option of bandpo it is a `BandGRPOConfig`.

    Args:
        given: Keys and values of the file.
        run_keys: For a file of `bandpo train`, the keys of that command.
        processes: Number of processes that will train.
        vocabulary: Number of tokens in the model's vocabulary; None reads it from config.json in the model's folder.

    Raises:
        ValueError: If a key of a `bandpo train` file is unknown, or TRL or bandpo refuses a value.
    """
    own = {f.name for f in fields(BandGRPOConfig)} - {f.name for f in fields(GRPOConfig)}
    ours = bool(run_keys) or not own.isdisjoint(given)
    known = {f.name for f in fields(BandGRPOConfig if ours else GRPOConfig)} | run_keys | _script_keys()
    unread, doubtful = _unknown_keys(given, known, own if ours else set(), bool(run_keys))
    kept = {key: _plain(key, value) for key, value in given.items() if key in _READ & known}
    kept |= _generation(given, unread, doubtful)
    objective: Objective | None = None
    imported = ours and isinstance(kept.get("objective"), str) and ":" in kept["objective"]
    if imported:
        named_objective(kept["objective"], unread)
        kept = {key: value for key, value in kept.items() if key not in own and key not in _REGION}
    args = _build(BandGRPOConfig if ours and not imported else GRPOConfig, kept, processes)
    if not imported:
        objective = args.resolve() if ours else _objective(args, unread)
    if vocabulary is None:
        vocabulary, missing = _vocabulary(given)
        unread += missing
    return _setup(
        args, given, objective, ours, "bandpo train" if run_keys else "TRL", vocabulary, tuple(unread), doubtful
    )


def _build(cls: type, kept: Mapping[str, Any], processes: int) -> Any:
    """The configuration with these values, without a device and a process group."""
    hosts_logging.set_verbosity_error()
    alone = {
        "world_size": property(lambda _: processes),
        "device": property(lambda _: torch.device("cpu")),
        "n_gpu": property(lambda _: 0),
    }
    environment = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("ACCELERATE_")}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return type(cls.__name__, (cls,), alone)(
                output_dir="doctor", use_cpu=True, bf16=False, report_to="none", **kept
            )
    except (ValueError, TypeError):
        raise
    except Exception as error:  # zero completions, for example, are a division by zero
        raise ValueError(f"TRL cannot work with these settings: {error!r}"[:300]) from None
    finally:
        os.environ.update(environment)


def _generation(given: Mapping[Any, Any], unread: list[str], doubtful: set[str]) -> dict[str, Any]:
    """The sampling options in generation_kwargs, which in TRL replace the options of the same names."""
    options = given.get("generation_kwargs")
    if not options:
        return {}
    if not isinstance(options, Mapping):
        unread.append("generation_kwargs is text here, and may change the sampling")
        doubtful.update(_SAMPLING)
        return {}
    named = cast("Mapping[str, Any]", options)
    return {name: _plain(name, named[name]) for name in _SAMPLING if name in named}


def _unknown_keys(
    given: Mapping[Any, Any], known: set[str], own: set[str], refused: bool
) -> tuple[list[str], set[str]]:
    """Lines about unknown keys, and the settings that may have been meant."""
    unread: list[str] = []
    doubtful: set[str] = set()
    unknown = [key for key in given if key not in known]
    if len(unknown) > _MOST_UNKNOWN:
        raise ValueError(f"{len(unknown)} keys are none of TRL's GRPOConfig, {short(str(unknown[0]))} for example")
    for key in unknown:
        word = str(key)[:80]
        near = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        if refused or difflib.get_close_matches(word, own, n=1, cutoff=0.8):
            raise ValueError(f"unknown key {word!r}{hint}")
        doubtful.update(difflib.get_close_matches(word, _READ & known, n=1, cutoff=0.8))
        if len(unread) < _LISTED:
            unread.append(f"{word!r} is no key of TRL's GRPOConfig{hint}")
    if len(unknown) > _LISTED:
        unread.append(f"{len(unknown) - _LISTED} more keys are none of TRL's GRPOConfig")
    return unread, doubtful


def _plain(key: str, value: Any) -> Any:
    """A value with the type of its key. In YAML, 1e-6 without a dot is text."""
    if value is None:
        return None
    if key in _NAMES | {"objective"} and (
        isinstance(value, str) or (key == "scale_rewards" and isinstance(value, bool))
    ):
        return value
    if key in _FLAGS and isinstance(value, bool):
        return value
    if key == "pruning" and (isinstance(value, Mapping) or (isinstance(value, str) and len(value) < 1000)):
        return parse_json(value, "pruning") if isinstance(value, str) else cast("Mapping[str, Any]", value)
    if key in _WHOLE | _NUMBERS and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isinf(number) and key in _MAY_BE_INFINITE:
            return number
        if not math.isfinite(number) or abs(number) > _LARGEST:
            raise ValueError(f"{key}: {short(value)} is not a number of a run")
        if key in _NUMBERS:
            return number
        if number != number // 1:
            raise ValueError(f"{key}: {short(value)} is not a whole number")
        return int(number)
    kind = "true or false" if key in _FLAGS else "a number" if key in _WHOLE | _NUMBERS else "a name"
    raise ValueError(f"{key}: {short(value)} is not {kind}")


def _setup(
    args: Any,
    given: Mapping[Any, Any],
    objective: Objective | None,
    ours: bool,
    host: Host,
    vocabulary: int | None,
    unread: tuple[str, ...],
    doubtful: set[str],
) -> Setup:
    """The settings of a configuration, without those that an unknown key may have been meant for."""
    version = _version()
    steps, steps_from = _steps(args)

    def sure(name: str, value: Any) -> Any:
        return None if name in doubtful else value

    return Setup(
        host=host,
        objective=objective,
        ours=ours,
        kl_coef=sure("beta", args.beta),
        kl=None if doubtful & {"use_bias_correction_kl", "kl"} else _kl(args)[0],
        kl_from=f"beta={args.beta:g}, {_kl(args)[1]}",
        bypassed=_bypassed(args, version),
        steps=None if doubtful & _COUNTED else steps,
        steps_from=steps_from,
        engine=sure("use_vllm", "vLLM" if args.use_vllm else ""),
        corrected=args.use_vllm and args.vllm_importance_sampling_correction,
        temperature=sure("temperature", args.temperature),
        top_p=sure("top_p", args.top_p),
        top_k=sure("top_k", args.top_k or 0),
        min_p=sure("min_p", args.min_p or 0.0),
        group=sure("num_generations", args.num_generations),
        tokens=args.per_device_train_batch_size * args.max_completion_length,
        vocabulary=vocabulary,
        fused_head=version >= (1, 16),
        weights=_weights(given),
        learning_rate=_rate(given),
        knobs=TRL_KNOBS | {"fused head": "TRL 1.16 or newer"},
        assumed=tuple(f"{name}={getattr(args, name)}" for name in _ASSUMED if name not in given),
        unread=unread,
    )


def _kl(args: Any) -> tuple[str, str]:
    """The KL term of the loss, "" for none of ours, and the option that it is from.

    TRL multiplies the KL of each token by the ratio of its sequence, where its loss takes that one.
    """
    if isinstance(args, BandGRPOConfig):
        return args.kl_term, f"kl={args.kl}"
    corrected: bool = args.use_bias_correction_kl
    term = "k3" if not corrected else "" if args.importance_sampling_level == "sequence" else "k3-ratio"
    return term, f"use_bias_correction_kl={corrected}"


def _steps(args: Any) -> tuple[float, str]:
    """Optimiser steps for each rollout, and how they were computed."""
    parts = {name: getattr(args, name) for name in ("steps_per_generation", "num_iterations")}
    accumulation = args.gradient_accumulation_steps
    if min(accumulation, *parts.values()) < 1:
        raise ValueError(
            f"gradient_accumulation_steps={accumulation}, steps_per_generation={args.steps_per_generation} and "
            f"num_iterations={args.num_iterations} must be at least 1"
        )
    product = " x ".join(f"{name}={value}" for name, value in parts.items())
    steps = max(1.0, math.prod(parts.values()) / accumulation)
    return steps, f"{product} / gradient_accumulation_steps={accumulation}"


def _version() -> tuple[int, ...]:
    return tuple(int(x) for x in importlib.metadata.version("trl").split(".")[:2])


def _bypassed(args: Any, version: tuple[int, ...]) -> str:
    trainer = sys.modules.get("trl.trainer.grpo_trainer")  # a module that is not imported cannot have been patched
    if trainer is not None:
        module = trainer.GRPOTrainer._compute_loss.__module__
        if not module.startswith("trl."):
            return f"GRPOTrainer._compute_loss is patched by {module} (unsloth?)"
    if args.use_liger_kernel and version < (1, 16):
        return "use_liger_kernel=True: before TRL 1.16 its fused loss takes the place of GRPOTrainer's"
    return ""


def _objective(args: Any, unread: list[str]) -> Objective | None:
    """The objective that equals TRL's own loss, None if it is not known here."""
    if args.loss_type in _ZOO:
        return OBJECTIVES[_ZOO[args.loss_type]]
    if args.loss_type not in AGGREGATION_OF:
        unread.append(f"loss_type {short(args.loss_type)} is not known here: its region is not shown")
        return None
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    return Objective(
        bounds=Clip(args.epsilon, high),
        ratio_level="sequence" if args.importance_sampling_level == "sequence" else "token",
        aggregation=AGGREGATION_OF[args.loss_type],
        name=args.loss_type,
    )


def _weights(given: Mapping[Any, Any]) -> str | None:
    """The dtype of the trained weights, where the file sets it; None with adapters, whose weights are float32."""
    if given.get("use_peft") or given.get("lora_rank"):
        return None
    options = given.get("model_init_kwargs")
    places = [cast("Mapping[Any, Any]", options), given] if isinstance(options, Mapping) else [given]
    for place in places:
        for key in ("dtype", "torch_dtype"):
            value = place.get(key)
            if isinstance(value, str):
                return value.removeprefix("torch.")
    return None


def _rate(given: Mapping[Any, Any]) -> float | None:
    try:
        rate = float(given["learning_rate"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return rate if 0 < rate < math.inf else None


def _vocabulary(given: Mapping[Any, Any]) -> tuple[int | None, list[str]]:
    """The size of the vocabulary in a model's config.json, which is read as plain JSON, without its code or the network."""
    name = given.get("model") or given.get("model_name_or_path")
    if not isinstance(name, str) or not name:
        return None, []
    try:
        config = parse_json(read_regular(_config_of(name[:300]), _MAX_CONFIG_BYTES), "config.json")
        text = config.get("text_config") or config
        size = text.get("vocab_size")
        if isinstance(size, int) and not isinstance(size, bool) and 0 < size < _LARGEST:
            return size, []
    except (OSError, ValueError, AttributeError):
        pass
    return None, [f"the vocabulary of {name[:300]} is not known here; --vocabulary N shows the memory of its logits"]


def _config_of(name: str) -> Path:
    folder = Path(name)
    if folder.is_dir():
        return folder / "config.json"
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    if not isinstance(found, str):
        raise FileNotFoundError(name)
    return Path(found)


def _script_keys() -> frozenset[str]:
    return frozenset(f.name for cls in (ScriptArguments, ModelConfig) for f in fields(cls))


def setup_of(config: object, *, vocabulary: int | None = None) -> Setup:
    """The settings in a `GRPOConfig` or `BandGRPOConfig` that exists as an object.

    Args:
        config: The configuration.
        vocabulary: Number of tokens in the model's vocabulary; None if it is not known.

    Raises:
        TypeError: If it is another object.
    """
    if not isinstance(config, GRPOConfig):
        raise TypeError(
            f"the doctor reads objects of TRL's GRPOConfig and of BandGRPOConfig, got {type(config).__name__}"
        )
    ours, unread = isinstance(config, BandGRPOConfig), list[str]()
    given = {f.name: getattr(config, f.name) for f in fields(type(config))}
    objective = config.resolve() if isinstance(config, BandGRPOConfig) else _objective(config, unread)
    return _setup(config, given, objective, ours, "TRL", vocabulary, tuple(unread), set())
