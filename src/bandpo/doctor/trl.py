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
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
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

FLAGS = frozenset(
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
_READ = FLAGS | _WHOLE | _NUMBERS | _NAMES | {"objective", "pruning"}
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
COUNTED = frozenset(
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
_MOST_PROCESSES = 4096
_MAX_CONFIG_BYTES = 1 << 20
_NOTHING: Mapping[str, str] = {}
_BESIDE = frozenset({"learning_rate", "dtype", "torch_dtype", "model_init_kwargs", "generation_kwargs"})
"""Keys that rules look at, although the configuration is not given them."""
_BATCHES = frozenset(
    {
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "steps_per_generation",
        "generation_batch_size",
        "num_generations",
        "num_generations_eval",
    }
)
"""The keys that TRL checks against each other and against the number of processes."""

CHANGED_DEFAULTS: Mapping[str, tuple[str, object]] = {
    "beta": ("0.19", 0.04),
    "loss_type": ("0.22", "bnpo"),
    "temperature": ("0.18", 0.9),
    "top_k": ("0.18", 50),
    "vllm_importance_sampling_correction": ("0.23", False),
    "use_bias_correction_kl": ("1.10", False),
}
"""Defaults of older versions of TRL (its repository, tags 0.14 to 1.9), with the version until which they held."""
_REMOVED: Mapping[str, str] = {"max_prompt_length": "0.28", "vllm_device": "0.18"}
_FORMER: Mapping[str, str] = {
    **{key: f" (it was before TRL {version})" for key, version in _REMOVED.items()},
    "torch_dtype": "; it is named dtype now",
    "warmup_ratio": "; transformers 5 has warmup_steps in its place",
}

UNSLOTH_READ = "015bdef0, 2026-08-22"
UNSLOTH_DEFAULTS: Mapping[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 8,
    "loss_type": "bnpo",
    "beta": 0.001,
    "vllm_importance_sampling_correction": False,
}
"""Defaults that unsloth puts in place of TRL's (its repository at the commit and date of `UNSLOTH_READ`)."""
_UNSLOTH_DAPO_HIGH = 0.28
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
    unknown: Mapping[str, str] = _NOTHING,
    opened: Sequence[str] = (),
    notes: Sequence[str] = (),
    unsloth: bool = False,
) -> Setup:
    """The settings in a TRL configuration. With an `objective` or another option of bandpo it is a `BandGRPOConfig`.

    Args:
        given: Keys and values of the file.
        run_keys: For a file of `bandpo train`, the keys of that command.
        processes: Number of processes that will train.
        vocabulary: Number of tokens in the model's vocabulary; None reads it from config.json in the model's folder.
        unknown: Keys that the file sets to what cannot be determined, with a text that says so.
        opened: What may set any key, as texts; then only the keys in `given` are known.
        notes: More lines about what is not read.
        unsloth: Whether unsloth is loaded, which has its own defaults and its own loss.

    Raises:
        ValueError: If a key of a `bandpo train` file is unknown, or TRL or bandpo refuses a value.
    """
    own = {f.name for f in fields(BandGRPOConfig)} - {f.name for f in fields(GRPOConfig)}
    ours = bool(run_keys) or not own.isdisjoint([*given, *unknown])
    known = {f.name for f in fields(BandGRPOConfig if ours else GRPOConfig)} | run_keys | _script_keys()
    unread, doubtful = _unknown_keys([*given, *unknown], known, own if ours else set(), bool(run_keys))
    unread += [*notes, *_not_resolved(unknown, known, opened)]
    doubtful |= (_READ if opened else frozenset(unknown)) & known - set(given)
    kept = {key: _plain(key, value) for key, value in given.items() if key in _READ & known}
    kept |= _generation(given, unread, doubtful)
    assumed = _assumed_by_unsloth(kept, doubtful, ours, processes) if unsloth else []
    objective: Objective | None = None
    imported = ours and isinstance(kept.get("objective"), str) and ":" in kept["objective"]
    if imported:
        named_objective(kept["objective"], unread)
        kept = {key: value for key, value in kept.items() if key not in own and key not in _REGION}
    args = _accepted(BandGRPOConfig if ours and not imported else GRPOConfig, kept, processes, doubtful, assumed)
    if not (imported or doubtful & (_REGION | own) - {"scale_rewards"}):
        objective = args.resolve() if ours else _objective(args, unread)
    if vocabulary is None:
        vocabulary, missing = _vocabulary(given)
        unread += missing
    unread += [] if unsloth else _older(given, unknown)
    set_already = {*given, *doubtful, *(UNSLOTH_DEFAULTS if unsloth else ())}
    assumed = [f"{k}={getattr(args, k)}" for k in _ASSUMED if k not in set_already] + assumed
    host: Host = "bandpo train" if run_keys else "unsloth" if unsloth and not ours else "TRL"
    setup = _setup(args, given, host=host, objective=objective, ours=ours, doubtful=doubtful)
    if unsloth:
        setup = _with_unsloth(setup)
    return replace(setup, vocabulary=vocabulary, assumed=tuple(assumed), unread=tuple(unread))


def setup_of(config: object, *, vocabulary: int | None = None) -> Setup:
    """The settings in a `GRPOConfig` or `BandGRPOConfig` that exists as an object.

    Args:
        config: The object; it is not changed.
        vocabulary: Number of tokens in the model's vocabulary; None if it is not known.

    Raises:
        TypeError: If it is another object.

    Examples:
        >>> from bandpo.integrations.trl import BandGRPOConfig
        >>> config = BandGRPOConfig(objective="bandpo-kl", num_generations=4, per_device_train_batch_size=8, use_cpu=True)
        >>> setup = setup_of(config)
        >>> setup.ours, setup.steps, setup.group
        (True, 1.0, 4)
    """
    if not isinstance(config, GRPOConfig):
        raise TypeError(
            f"the doctor reads objects of TRL's GRPOConfig and of BandGRPOConfig, got {type(config).__name__}"
        )
    ours = isinstance(config, BandGRPOConfig)
    given = {f.name: getattr(config, f.name) for f in fields(config)}
    unread: list[str] = []
    doubtful: set[str] = set()
    sampling = _generation(given, unread, doubtful)
    objective = config.resolve() if ours else _objective(config, unread)
    unsloth = "unsloth" in type(config).__module__.lower() or type(config).__name__.startswith("Unsloth")
    host: Host = "unsloth" if unsloth else "TRL"
    setup = _setup(config, given, host=host, objective=objective, ours=ours, doubtful=doubtful)
    setup = _with_unsloth(setup) if unsloth else setup
    if "top_k" in sampling:
        sampling["top_k"] = sampling["top_k"] or 0
    return replace(setup, **sampling, vocabulary=vocabulary, unread=tuple(unread))


def _not_resolved(unknown: Mapping[str, str], known: set[str], opened: Sequence[str]) -> list[str]:
    """Lines about keys whose value cannot be determined, and about what may set any key."""
    looked_at = [key for key in unknown if key in known and (key in _READ or key in _BESIDE)]
    lines = [f"{key}={unknown[key]} is not resolved" for key in looked_at[:_LISTED]]
    if len(looked_at) > _LISTED:
        lines.append(f"{len(looked_at) - _LISTED} more values are not resolved")
    return lines + [f"{what} may set anything" for what in list(dict.fromkeys(opened))[:_LISTED]]


def _older(given: Mapping[Any, Any], unknown: Mapping[str, str]) -> list[str]:
    """A line about older defaults, where the file has keys that only older versions of TRL have."""
    old = [key for key in _REMOVED if key in given or key in unknown]
    changed = [
        f"{key}={value} (before {version})"
        for key, (version, value) in CHANGED_DEFAULTS.items()
        if key not in given and key not in unknown
    ]
    if not old or not changed:
        return []
    return [
        f"{old[0]} is a key of TRL before {_REMOVED[old[0]]}; if the run uses such a version, "
        f"the defaults of older ones may hold: {', '.join(changed)}"
    ]


def _accepted(cls: type, kept: Mapping[str, Any], processes: int, doubtful: set[str], assumed: list[str]) -> Any:
    """The configuration with these values; where TRL needs more processes for them, with the fewest that it takes."""
    if doubtful & _BATCHES:
        return _without_batches(cls, kept, processes)
    try:
        args = _build(cls, kept, processes)
        if processes == 1 and kept.get("generation_batch_size") is not None:
            assumed.append("processes=1 (they share generation_batch_size; --processes N)")
        return args
    except ValueError as error:
        if "divisible" not in str(error) or processes > 1:
            raise
        needed = _processes(cls, kept)
        if needed < 2:
            raise
        args = _build(cls, kept, needed)
        assumed.append(f"processes={needed} (TRL refuses fewer with these batches; --processes N)")
        return args


def _processes(cls: type, kept: Mapping[str, Any]) -> int:
    """The fewest processes for which the groups fill the batches; 0 if that is not a reasonable number."""
    default = {f.name: cast("int", f.default) for f in fields(cls)}
    values = {name: int(kept.get(name) or default.get(name) or 0) for name in _BATCHES}
    group, micro = values["num_generations"], values["per_device_train_batch_size"]
    batch = values["generation_batch_size"] or micro * (
        values["steps_per_generation"] or values["gradient_accumulation_steps"]
    )
    if min(group, micro, batch) < 1:
        return 0
    needed = 1 if values["generation_batch_size"] else group // math.gcd(group, batch)
    if kept.get("eval_strategy", "no") != "no":
        evaluated, size = values["num_generations_eval"] or group, values["per_device_eval_batch_size"]
        needed = math.lcm(needed, evaluated // math.gcd(evaluated, size)) if size > 0 else 0
    return needed if needed <= _MOST_PROCESSES else 0


def _without_batches(cls: type, kept: Mapping[str, Any], processes: int) -> Any:
    """A configuration in which the sizes of batches are set afterwards, because TRL cannot check what is not known."""
    left = {key: value for key, value in kept.items() if key not in _BATCHES and key != "eval_strategy"}
    args = _build(cls, left | {"num_generations": 2, "per_device_train_batch_size": 2}, processes)
    default = {f.name: f.default for f in fields(cls)}
    for name in sorted(_BATCHES & default.keys()):
        setattr(args, name, kept.get(name, default[name]))
    if args.steps_per_generation is None:
        size = args.per_device_train_batch_size * processes
        whole = args.generation_batch_size
        args.steps_per_generation = args.gradient_accumulation_steps if not whole else max(1, whole // max(1, size))
    return args


def _assumed_by_unsloth(kept: dict[str, Any], doubtful: set[str], ours: bool, processes: int) -> list[str]:
    """Set unsloth's defaults, and what it changes when it creates its configuration; the texts of both."""
    if ours:
        return []
    defaults = {key: value for key, value in UNSLOTH_DEFAULTS.items() if key not in kept and key not in doubtful}
    kept.update(defaults)
    texts = [f"{key}={value}" for key, value in defaults.items()]
    if kept.get("loss_type") == "dapo" and kept.get("epsilon_high") != _UNSLOTH_DAPO_HIGH:
        kept["epsilon_high"] = _UNSLOTH_DAPO_HIGH
        doubtful.discard("epsilon_high")
        texts.append(f"epsilon_high={_UNSLOTH_DAPO_HIGH} (unsloth sets it for loss_type=dapo)")
    sizes = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations")
    free = kept.get("steps_per_generation") is None and kept.get("generation_batch_size") is None
    if free and not doubtful & _BATCHES and all(kept[name] for name in sizes):
        micro, steps, group = (kept[name] for name in sizes)
        if micro * steps * processes % group:
            kept["per_device_train_batch_size"] = group
            texts.append(f"per_device_train_batch_size={group} (unsloth changes {micro}, which does not fill a group)")
    return texts


def _with_unsloth(setup: Setup) -> Setup:
    """The settings as unsloth's own trainer uses them."""
    if setup.ours:
        return replace(
            setup,
            bypassed=setup.bypassed or "unsloth is loaded: it puts its own GRPOTrainer and loss in place of TRL's",
        )
    return replace(
        setup,
        bypassed="",
        kl="k3",
        kl_from=f"{setup.kl_from.partition(',')[0]}, in unsloth's loss",
        fused_head=True,
        knobs={**setup.knobs, "use": "BandGRPOTrainer and BandGRPOConfig, without importing unsloth"},
        defaults_of=f"unsloth's ({UNSLOTH_READ}) and then TRL's",
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


def _unknown_keys(given: Sequence[Any], known: set[str], own: set[str], refused: bool) -> tuple[list[str], set[str]]:
    """Lines about unknown keys, and the settings that may have been meant."""
    unread: list[str] = []
    doubtful: set[str] = set()
    unknown = [key for key in given if key not in known]
    if len(unknown) > _MOST_UNKNOWN:
        raise ValueError(f"{len(unknown)} keys are none of TRL's GRPOConfig, {short(str(unknown[0]))} for example")
    for key in unknown:
        word = str(key)[:80]
        near = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.7)
        hint = _FORMER.get(word) or (f"; did you mean {near[0]!r}?" if near else "")
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
    if key in FLAGS and isinstance(value, bool):
        return value
    if key == "pruning" and (isinstance(value, Mapping) or (isinstance(value, str) and len(value) < 1000)):
        return parse_json(value, "pruning", unique=True) if isinstance(value, str) else cast("Mapping[str, Any]", value)
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
    kind = "true or false" if key in FLAGS else "a number" if key in _WHOLE | _NUMBERS else "a name"
    raise ValueError(f"{key}: {short(value)} is not {kind}")


def _setup(
    args: Any, given: Mapping[Any, Any], *, host: Host, objective: Objective | None, ours: bool, doubtful: set[str]
) -> Setup:
    """The settings of a configuration, without those that are not known."""
    version = _version()
    steps, steps_from = _steps(args)
    uncounted = sorted(doubtful & COUNTED)

    def sure(name: str, value: Any) -> Any:
        return None if name in doubtful else value

    corrected = args.use_vllm and args.vllm_importance_sampling_correction
    return Setup(
        host=host,
        objective=objective,
        ours=ours,
        kl_coef=sure("beta", args.beta),
        kl=None if doubtful & {"use_bias_correction_kl", "kl"} else _kl(args)[0],
        kl_from=f"beta={args.beta:g}, {_kl(args)[1]}",
        bypassed=_bypassed(args, version),
        steps=None if uncounted else steps,
        steps_from=f"{', '.join(uncounted)} not known" if uncounted else steps_from,
        engine=sure("use_vllm", "vLLM" if args.use_vllm else ""),
        corrected=None if doubtful & {"use_vllm", "vllm_importance_sampling_correction"} else corrected,
        temperature=sure("temperature", args.temperature),
        top_p=sure("top_p", args.top_p),
        top_k=sure("top_k", args.top_k or 0),
        min_p=sure("min_p", args.min_p or 0.0),
        group=sure("num_generations", args.num_generations),
        tokens=0
        if doubtful & {"per_device_train_batch_size", "max_completion_length"}
        else args.per_device_train_batch_size * args.max_completion_length,
        fused_head=version >= (1, 16),
        weights=_weights(given),
        learning_rate=_rate(given),
        knobs=TRL_KNOBS | {"fused head": "TRL 1.16 or newer"},
        defaults_of=f"TRL {importlib.metadata.version('trl')}'s",
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
    found = {f.name for cls in (ScriptArguments, ModelConfig) for f in fields(cls)}
    return frozenset(found | {"reward_funcs", "reward_model_name_or_path"})
