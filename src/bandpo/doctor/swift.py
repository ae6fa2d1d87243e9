"""Reads the settings of ms-swift (`swift rlhf --rlhf_type grpo`) from its options: a command line, YAML or JSON.

The defaults and what the options do are those of its repository (github.com/modelscope/ms-swift) at commit 3602360a of
2026-08-22. ms-swift is not imported.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from bandpo._system.secrets import redact_text
from bandpo.bounds import Clip
from bandpo.doctor.setup import SWIFT_KNOBS, Setup, short
from bandpo.monitoring.findings import Level
from bandpo.objective import Aggregation, Objective
from bandpo.zoo import OBJECTIVES

READ_AT = "3602360a, 2026-08-22"
DEFAULTS: Mapping[str, Any] = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": None,
    "generation_batch_size": None,
    "num_iterations": 1,
    "num_generations": 8,
    "max_completion_length": 512,
    "use_vllm": False,
    "async_generate": False,
    "temperature": 0.9,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "loss_type": "grpo",
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "beta": 0.04,
    "kl_in_reward": None,
    "importance_sampling_level": "token",
    "rollout_importance_sampling_mode": None,
    "advantage_estimator": "grpo",
    "use_liger_kernel": False,
    "tuner_type": "lora",
    "torch_dtype": None,
    "learning_rate": None,
}
"""The defaults of `swift rlhf --rlhf_type grpo`."""
MEGATRON: Mapping[str, Any] = {
    "micro_batch_size": 1,
    "global_batch_size": 16,
    "use_vllm": True,
    "tuner_type": "full",
    "lr": None,
}
"""What is different in `megatron rlhf --rlhf_type grpo`."""

_ALIASES = {
    "train_type": "tuner_type",
    "sft_type": "tuner_type",
    "max_new_tokens": "max_completion_length",
    "response_length": "max_completion_length",
}
_AGGREGATION: Mapping[str, Aggregation] = {
    "grpo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
}
_ZOO = {"cispo": "cispo", "sapo": "sapo"}
_ASSUMED = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_iterations",
    "num_generations",
    "temperature",
    "loss_type",
    "epsilon",
    "beta",
    "use_vllm",
    "max_completion_length",
)
_BESIDE_THE_LOSS = {
    "delta": None,
    "top_entropy_quantile": 1.0,
    "off_policy_sequence_mask_delta": None,
    "advantage_reweight": None,
    "sdar_loss_coef": 0.0,
    "teacher_model": None,
    "teacher_model_server": None,
}
"""Options that add something to the loss which the rules do not look at, with the values that add nothing."""
# Other options of ms-swift whose names are near to those that are read.
_LIKE = frozenset(
    {"num_generations_eval", "per_device_eval_batch_size", "max_length", "loss_scale", "vllm_mode", "model_type"}
)
_LARGEST = 10**12
_TEACHERS = ("teacher_model", "teacher_model_server")
_SECTIONS = ("train", "rollout")  # of the YAML for Ray
_ALONE: tuple[Level, str] = (
    "problem",
    "ms-swift refuses groups of one completion, unless a teacher gives the advantages",
)


def is_swift(given: Mapping[Any, Any]) -> bool:
    """Whether keys and values are options of ms-swift's `rlhf`.

    Args:
        given: Keys and values of a file.
    """
    return isinstance(given.get("rlhf_type"), str)


@dataclass
class _Options:
    """The options with ms-swift's defaults; a value of None is not known, or is the default that means "none"."""

    values: dict[str, Any]
    unknown: set[str]
    defaults: Mapping[str, Any]
    assumed: bool
    unread: list[str] = field(default_factory=list[str])

    def known(self, *names: str) -> bool:
        """Whether all of these options are known."""
        return not any(name in self.unknown or not (self.assumed or name in self.values) for name in names)

    def get(self, name: str) -> Any:
        """The value of an option; the options that are not known give None."""
        if not self.known(name):
            return None
        value = self.values.get(name)
        return self.defaults.get(name) if value is None else value

    def number(self, name: str) -> float | None:
        """An option as a number.

        Raises:
            ValueError: If it is something else.
        """
        value = self.get(name)
        if value is None:
            return None
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) <= _LARGEST:
            raise ValueError(f"{name}: {short(value)} is not a number of a run")
        return number

    def whole(self, name: str, least: int) -> int | None:
        """An option as a whole number.

        Raises:
            ValueError: If it is something else, or too small.
        """
        number = self.number(name)
        if number is not None and (number != number // 1 or number < least):
            raise ValueError(f"{name}: {short(self.get(name))} is not a whole number of at least {least}")
        return None if number is None else int(number)

    def flag(self, name: str) -> bool | None:
        """An option as true or false.

        Raises:
            ValueError: If it is something else.
        """
        value = self.get(name)
        if value is None or isinstance(value, bool):
            return value
        found = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(str(value).lower())
        if found is None:
            raise ValueError(f"{name}: {short(value)} is neither true nor false")
        return found

    def name(self, name: str) -> str | None:
        """An option as a name.

        Raises:
            ValueError: If it is something else.
        """
        given: object = self.get(name)
        several = cast("list[object]", given) if isinstance(given, list) else [given]
        if given is None or (len(several) == 1 and isinstance(several[0], str)):
            return cast("str | None", several[0])
        raise ValueError(f"{name}: {short(several[0])} is not a name")


def read_swift(
    given: Mapping[Any, Any],
    *,
    unknown: Mapping[str, str] | None = None,
    opened: Sequence[str] = (),
    notes: Sequence[str] = (),
    megatron: bool = False,
    vocabulary: int | None = None,
) -> Setup:
    """The settings in the options of ms-swift.

    Args:
        given: Options and their values, as texts or as values of YAML.
        unknown: Options whose value cannot be determined, with a text that says so.
        opened: What may set any option, as texts.
        notes: More lines about what is not read.
        megatron: Whether the command is `megatron rlhf`.
        vocabulary: Number of tokens in the model's vocabulary; None if it is not known.

    Raises:
        ValueError: If it trains with another algorithm than GRPO, or a value is none of an option.
    """
    unknown = unknown or {}
    values = _flat(given)
    megatron = megatron or any(name in values for name in ("micro_batch_size", "global_batch_size"))
    kind = values.get("rlhf_type")
    named = values.get("config") or unknown.get("config")
    if kind is None and named:
        raise ValueError(f"a launch line of ms-swift; examine {short(named)[1:-1]}, which it names")
    if kind != "grpo" and "rlhf_type" not in unknown:
        raise ValueError(f"ms-swift with rlhf_type={short(kind)}; the doctor reads rlhf_type grpo")
    config = [str(values.get("config"))] if "config" in values else []
    defaults = {**DEFAULTS, **MEGATRON} if megatron else DEFAULTS
    doubtful = {_ALIASES.get(key, key) for key in unknown}
    s = _Options(values, doubtful, defaults, assumed=not opened and not config)
    s.unread += [
        *notes,
        *(f"{k}={text} is not resolved" for k, text in unknown.items() if _ALIASES.get(k, k) in defaults),
    ]
    s.unread += [f"{what} may set anything" for what in opened]
    s.unread += [f"{short(name)}, which the command names, is not read: examine it too" for name in config]
    _near(s)
    return _setup(s, megatron=megatron, vocabulary=vocabulary)


def _flat(given: Mapping[Any, Any]) -> dict[str, Any]:
    """The options with the sections of a YAML for Ray, under their present names; null is not set."""
    found: dict[str, Any] = {}
    places = [given, *(given[name] for name in _SECTIONS if isinstance(given.get(name), Mapping))]
    for place in places:
        for key, value in cast("Mapping[Any, Any]", place).items():
            if value is not None and not isinstance(value, dict):
                found[_ALIASES.get(str(key), str(key))[:100]] = value
    return found


def _near(s: _Options) -> None:
    """Options that may have been meant are not known, where an option has a name that is near to theirs."""
    for key in [key for key in s.values if key not in s.defaults and key not in _LIKE][:500]:
        for meant in difflib.get_close_matches(key, list(s.defaults), n=1, cutoff=0.88):
            if meant not in s.values:
                s.unknown.add(meant)
                s.unread.append(f"{key!r} is not known here; did you mean {meant!r}?")


def _setup(s: _Options, *, megatron: bool, vocabulary: int | None) -> Setup:
    steps, steps_from = _steps(s, megatron=megatron)
    kl_coef, kl, kl_from = _kl(s)
    use_vllm = s.flag("use_vllm")
    top_k = s.whole("top_k", -1)
    micro = s.whole("micro_batch_size" if megatron else "per_device_train_batch_size", 1)
    length = s.whole("max_completion_length", 1)
    known = [name for name in _ASSUMED if s.assumed and s.known(name) and name not in s.values and name in s.defaults]
    if megatron:
        known = [name for name in known if name not in ("per_device_train_batch_size", "gradient_accumulation_steps")]
    mode = s.name("rollout_importance_sampling_mode")
    return Setup(
        host="ms-swift",
        objective=_objective(s),
        ours=False,
        steps=steps,
        steps_from=steps_from,
        engine=None if use_vllm is None else "vLLM" if use_vllm else "",
        corrected=(mode not in (None, "none")) if s.known("rollout_importance_sampling_mode") else None,
        temperature=s.number("temperature"),
        top_p=s.number("top_p"),
        top_k=None if top_k is None else max(0, top_k),
        min_p=s.number("min_p"),
        group=s.whole("num_generations", 1),
        alone=None if any(s.values.get(name) or name in s.unknown for name in _TEACHERS) else _ALONE,
        kl_coef=kl_coef,
        kl=kl,
        kl_from=kl_from,
        tokens=(micro or 0) * (length or 0),
        vocabulary=vocabulary,
        fused_head=bool(s.flag("use_liger_kernel")),
        weights=s.name("torch_dtype") if s.get("tuner_type") == "full" else None,
        learning_rate=s.number("lr" if megatron else "learning_rate"),
        knobs=SWIFT_KNOBS,
        assumed=tuple(f"{name}={s.get(name)}" for name in known),
        unread=tuple(redact_text(line)[:400] for line in dict.fromkeys(s.unread)),
        defaults_of=f"ms-swift's ({READ_AT})",
    )


def _steps(s: _Options, *, megatron: bool) -> tuple[float | None, str]:
    """Optimiser steps for each rollout, and how they were computed."""
    if s.flag("async_generate"):
        return None, "async_generate=true samples with the weights before the last update"
    names = ["steps_per_generation", "generation_batch_size", "num_iterations"]
    names += ["global_batch_size"] if megatron else ["gradient_accumulation_steps"]
    if not s.known(*names):
        return None, f"{', '.join(name for name in names if not s.known(name))} not known"
    micro, whole = s.whole("steps_per_generation", 1), s.whole("generation_batch_size", 1)
    repeats = s.whole("num_iterations", 1) or 1
    if megatron:
        size = s.whole("global_batch_size", 1) or 1
        count = micro or (whole / size if whole else 1)
        return count * repeats, f"steps_per_generation={count:g} x num_iterations={repeats}"
    accumulation = s.whole("gradient_accumulation_steps", 1) or 1
    if micro is None and whole is not None:
        return None, f"generation_batch_size={whole} is shared by the processes, whose number is not known"
    micro = micro or accumulation
    counted = f"steps_per_generation={micro} x num_iterations={repeats} / gradient_accumulation_steps={accumulation}"
    return max(1.0, micro * repeats / accumulation), counted


def _kl(s: _Options) -> tuple[float | None, str | None, str]:
    """Coefficient and term of the KL in the loss, and where they are from."""
    beta = s.number("beta")
    estimator, in_reward = s.name("advantage_estimator"), s.flag("kl_in_reward")
    if not s.known("kl_in_reward", "advantage_estimator") and beta:
        return None, None, ""
    if in_reward is None:
        in_reward = estimator in ("rloo", "reinforce_plus_plus")
    if in_reward:
        return 0.0, "", "kl_in_reward"
    return beta, "k3", f"beta={beta:g}, ms-swift's loss" if beta is not None else ""


def _objective(s: _Options) -> Objective | None:
    """The objective that equals ms-swift's loss; None if it is not known here."""
    names = ("loss_type", "epsilon", "epsilon_high", "importance_sampling_level")
    if not s.known(*names):
        return None
    for name, nothing in _BESIDE_THE_LOSS.items():
        value = s.values.get(name)
        if value is not None and str(value) not in (str(nothing), str(nothing).removesuffix(".0"), ""):
            s.unread.append(f"{name}={short(value)} changes the loss, and the table of the interval is without it")
    kind, level = s.name("loss_type"), s.name("importance_sampling_level")
    if kind in _ZOO and level == "token":
        return OBJECTIVES[_ZOO[kind]]
    if kind is None or kind not in _AGGREGATION or level not in ("token", "sequence", "sequence_token"):
        s.unread.append(f"loss_type {short(kind)} with importance_sampling_level {short(level)} is not known here")
        return None
    low, high = s.number("epsilon"), s.number("epsilon_high")
    assert low is not None
    return Objective(
        bounds=Clip(low, low if high is None else high),
        ratio_level="token" if level == "token" else "sequence",
        aggregation=_AGGREGATION[kind],
        name=kind,
    )
