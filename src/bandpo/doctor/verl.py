"""Reads verl's settings without verl: from a YAML configuration, or from a script or list of overrides `key=value`.

Nothing is executed. A value that depends on a shell, an environment or another file is `UNKNOWN`: it is listed, and no rule
uses it. For settings that are not in the file, verl's defaults are used where verl would use them, and they are listed too.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from bandpo._system.bounded import parse_yaml, read_regular
from bandpo._system.files import read_yaml
from bandpo.bounds import Clip
from bandpo.doctor.hosts import host_of_keys, not_readable
from bandpo.doctor.launch import Dialect, parse_script, settings_of
from bandpo.doctor.settings import MAX_KEY, UNKNOWN, Settings, Text, flat
from bandpo.doctor.setup import VERL_KNOBS, Setup, named_objective, short
from bandpo.doctor.shell import Script
from bandpo.integrations.options import RegionOptions, parse_options
from bandpo.integrations.verl_options import (
    ACTOR_DEFAULTS,
    DEFAULT_OBJECTIVE,
    DUAL_CLIP,
    KL_OF,
    OPTIONS,
    POLICY_LOSS_DEFAULTS,
    REGION,
    name_in,
    objective_of,
)
from bandpo.monitoring.findings import Level
from bandpo.objective import Objective
from bandpo.zoo import OBJECTIVES

_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
DEFAULTS: Mapping[str, Any] = {
    "data.train_batch_size": 1024,
    "data.max_response_length": 512,
    "algorithm.adv_estimator": "gae",
    "algorithm.rollout_correction.bypass_mode": False,
    "algorithm.rollout_correction.loss_type": "ppo_clip",
    "algorithm.rollout_correction.rollout_is": None,
    "actor_rollout_ref.model.use_fused_kernels": False,
    f"{_ACTOR}.ppo_mini_batch_size": 256,
    f"{_ACTOR}.ppo_micro_batch_size_per_gpu": None,
    f"{_ACTOR}.ppo_epochs": 1,
    f"{_ACTOR}.use_dynamic_bsz": False,
    f"{_ACTOR}.ppo_max_token_len_per_gpu": 16384,
    f"{_ACTOR}.clip_ratio_low": 0.2,
    f"{_ACTOR}.clip_ratio_high": 0.2,
    f"{_ACTOR}.loss_agg_mode": "token-mean",
    f"{_ACTOR}.use_kl_loss": False,
    f"{_ACTOR}.kl_loss_coef": 0.001,
    f"{_ACTOR}.kl_loss_type": "low_var_kl",
    f"{_ACTOR}.policy_loss.loss_mode": "vanilla",
    f"{_ROLLOUT}.temperature": 1.0,
    f"{_ROLLOUT}.top_p": 1,
    f"{_ROLLOUT}.top_k": -1,
    f"{_ROLLOUT}.n": 1,
}
"""The defaults of verl 0.9.1; a test compares them with verl's own configuration."""

_MAX_DEFAULTS, _MAX_GROUP_BYTES = 40, 1 << 16  # entries of Hydra's defaults, and bytes of a file that an entry names
_ZOO = {
    "gspo": "gspo",
    "sapo": "sapo",
    "geo_mean": "gmpo",
    "cispo": "cispo",
    "clip_cov": "clip-cov",
    "kl_cov": "kl-cov",
    "dppo_tv": "dppo-tv",
    "dppo_kl": "dppo-kl",
}
_MAX_LINE = 400  # characters of a message
_YAML = (".yaml", ".yml")
_TARGET = "bandpo.integrations.verl.BandPolicyLossConfig"
_NAME = re.compile(r"[\w-]+(?:\.[\w-]+)*")
_VERL_DEFAULTS = ("ppo_trainer", "ppo_megatron_trainer")
DIALECT = Dialect(
    host="verl",
    defaults=DEFAULTS,
    program=re.compile(r"(.*[./])?main_ppo(\.py)?"),
    called="main_ppo",
    own=("actor_rollout_ref.",),
    config_options=("--config-name", "-cn"),
    configs=_VERL_DEFAULTS,
)
"""How verl's main_ppo is started."""

# The advantage of a prompt's only completion (verl 0.9.1, core_algos.py); other estimators compare no completions.
_ALONE: Mapping[str, tuple[Level, str]] = {
    "grpo": ("problem", "advantages compare the completions of a prompt: the advantage of a single one is its reward"),
    "grpo_vectorized": (
        "problem",
        "advantages compare the completions of a prompt: the advantage of a single one is its reward",
    ),
    "grpo_passk": ("problem", "verl's grpo_passk refuses groups of less than two completions"),
    "gdpo": ("problem", "advantages compare the completions of a prompt, and there is nothing to compare"),
    "rloo": ("warning", "without other completions there is no baseline: the advantage is the reward"),
    "rloo_vectorized": ("warning", "without other completions verl's rloo_vectorized gives advantages of 0"),
    "opo": ("warning", "without other completions there is no baseline: the advantage is the reward"),
    "gpg": ("warning", "without other completions there is no baseline: the advantage is the reward"),
    "reinforce_plus_plus_baseline": ("warning", "without other completions there is no baseline within a prompt"),
}
_NO_GROUPS = ("gae", "remax", "reinforce_plus_plus")


def read_verl(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    tree: Mapping[Any, Any] | None = None,
    script: Script | None = None,
    vocabulary: int | None = None,
) -> Setup:
    """The settings in a verl configuration.

    Args:
        path: A YAML file, or a text with `key=value`.
        overrides: More settings `key=value`, which replace those of the file; `group=name` chooses a file of a group beside
            the YAML.
        tree: Content of the YAML file where it has been read already; None reads the file.
        script: The commands of a script, where it has been read already.
        vocabulary: Number of tokens in the model's vocabulary, for the memory of the logits; None if it is not known.

    Raises:
        ValueError: If it belongs to another framework, cannot be read, or has a value that is not valid.
    """
    chosen: dict[str, Any] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        chosen[key.lstrip("+~")] = Text(value)
    if tree is None and path.suffix in _YAML:
        tree = read_yaml(path, follow=False)
    if tree is None:
        settings = settings_of(path, script or parse_script(path), DIALECT)
    else:
        settings = _from_yaml(path, tree, chosen)
    settings.given |= {k: v for k, v in chosen.items() if "." in k}
    return setup_of(settings, vocabulary)


def is_verl(given: Mapping[Any, Any]) -> bool:
    """Whether a YAML file is a configuration of verl's main_ppo: it has keys that only verl has, or extends verl's file.

    Args:
        given: Keys and values of the file.
    """
    defaults: Any = given.get("defaults")
    return any(str(key).partition(".")[0] == "actor_rollout_ref" for key in given) or (
        isinstance(defaults, list) and any(entry in _VERL_DEFAULTS for entry in cast("list[Any]", defaults))
    )


def _from_yaml(path: Path, tree: Mapping[Any, Any], chosen: Mapping[str, Any]) -> Settings:
    settings = Settings(DEFAULTS)
    if not is_verl(tree):
        raise not_readable(path, host_of_keys(tree))
    own = flat({k: v for k, v in tree.items() if k not in ("defaults", "hydra")})
    found: Any = tree.get("defaults") or []
    if not isinstance(found, list):
        raise ValueError(f"{path}: defaults must be a list, got {type(found).__name__}")
    entries = cast("list[Any]", found)
    if len(entries) > _MAX_DEFAULTS:
        raise ValueError(f"{path}: defaults has {len(entries)} entries")
    for entry in entries if "_self_" in entries else [*entries, "_self_"]:  # later ones win
        settings.given |= own if entry == "_self_" else _default(entry, path.parent, chosen, settings)
    return settings


def _default(entry: Any, folder: Path, chosen: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The settings that an entry of Hydra's `defaults` adds: those of a file beside the configuration."""
    if isinstance(entry, str) and entry in _VERL_DEFAULTS:
        return {}
    if isinstance(entry, str):
        _leave_out(settings, f"{entry} is not read, and what it sets is not known")
        return {}
    pairs = [*cast("Mapping[Any, Any]", entry).items()] if isinstance(entry, Mapping) else []
    if len(pairs) != 1:
        raise ValueError(f"defaults: {short(cast('object', entry))} is neither a name nor a pair group: name")
    [(key, value)] = pairs
    group = str(key).removeprefix("override ").removeprefix("optional ")
    name = str(chosen.get(group, value))
    if group.startswith("hydra/"):  # options of Hydra itself, not of the run
        return {}
    if not (_NAME.fullmatch(group) and _NAME.fullmatch(name)):  # a stranger's file must not lead out of its folder
        _leave_out(settings, f"{short(group)}={short(name)} is not read: it is no plain name")
        return {}
    file = folder / group / f"{name}.yaml"
    try:
        if not file.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{file} leads out of the folder")
        data = read_regular(file, _MAX_GROUP_BYTES, follow=False)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a loop
        why = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        _leave_out(settings, f"{group}={name} is not read: {why}")
        return {}
    tree = parse_yaml(data, str(file))
    if not isinstance(tree, dict):
        raise ValueError(f"{file} must hold keys and values, got {type(tree).__name__}")
    if "defaults" in tree:
        _leave_out(settings, f"those of {group}={name} are not read, and what they set is not known")
    keys = flat({k: v for k, v in cast("dict[Any, Any]", tree).items() if k != "defaults"})
    return keys if b"@package _global_" in data else {f"{group}.{k}": x for k, x in keys.items()}


def _leave_out(settings: Settings, what: str) -> None:
    """Note that an entry of `defaults` is not read, so that settings which are not in the file are not known."""
    settings.unread.append(f"defaults: {what}")
    settings.defaults = False


def setup_of(s: Settings, vocabulary: int | None) -> Setup:
    """The settings that the rules look at.

    Args:
        s: The settings of verl in a file.
        vocabulary: Number of tokens in the model's vocabulary; None if it is not known.
    """
    loss = _loss(s)
    steps, steps_from = _steps(s)
    top_k = s.whole(f"{_ROLLOUT}.top_k")
    corrected = s.get("algorithm.rollout_correction.rollout_is")
    engine = s.get(f"{_ROLLOUT}.name")
    kl_coef, kl, kl_from = _kl(s)
    return Setup(
        host="verl",
        objective=loss.objective,
        ours=loss.ours,
        kl_coef=kl_coef,
        kl=kl,
        kl_from=kl_from,
        bypassed=loss.bypassed,
        refused=loss.refused,
        steps=steps,
        steps_from=steps_from,
        engine="the rollout engine" if engine is UNKNOWN or not engine else str(engine)[:MAX_KEY],
        corrected=None if corrected is UNKNOWN else corrected is not None,
        old_is_rollout=s.flag("algorithm.rollout_correction.bypass_mode"),
        temperature=s.number(f"{_ROLLOUT}.temperature"),
        top_p=s.number(f"{_ROLLOUT}.top_p"),
        top_k=None if top_k is None else max(0, top_k),
        group=s.whole(f"{_ROLLOUT}.n"),
        alone=_alone(s),
        tokens=_tokens(s),
        vocabulary=vocabulary,
        fused_head=bool(s.flag("actor_rollout_ref.model.use_fused_kernels")),
        weights=s.dtype(f"{_ACTOR}.fsdp_config.model_dtype"),
        learning_rate=s.rate(f"{_ACTOR}.optim.lr"),
        knobs=VERL_KNOBS | {"fused head": "actor_rollout_ref.model.use_fused_kernels=True"},
        assumed=s.taken(),
        unread=s.lines(),
    )


def _kl(s: Settings) -> tuple[float | None, str | None, str]:
    """Coefficient and term of the KL loss, and where they are from."""
    used = s.flag(f"{_ACTOR}.use_kl_loss")
    if not used:
        return None if used is None else 0.0, "", ""
    coefficient, kind = s.number(f"{_ACTOR}.kl_loss_coef"), s.get(f"{_ACTOR}.kl_loss_type")
    return coefficient, None if kind is UNKNOWN else KL_OF.get(str(kind), ""), f"kl_loss_type={short(kind)}"


def _steps(s: Settings) -> tuple[float | None, str]:
    keys = ("data.train_batch_size", f"{_ACTOR}.ppo_mini_batch_size", f"{_ACTOR}.ppo_epochs")
    batch, mini, epochs = (s.number(key) for key in keys)
    names = [s.label(key) for key in keys]
    if any(x is not None and x < 0 for x in (batch, mini, epochs)) or 0 in (mini, epochs):
        raise ValueError(f"{', '.join(names)} must be positive")
    counted = f"{names[0]} / {names[1]} x {names[2]}"
    if batch == 0:
        return (
            None,
            "train_batch_size=0, as in fully asynchronous runs: other settings decide how often a rollout is used",
        )
    if batch is None or mini is None or epochs is None:
        return None, counted
    return batch / mini * epochs, counted


def _alone(s: Settings) -> tuple[Level, str] | None:
    estimator = s.get("algorithm.adv_estimator")
    if estimator is UNKNOWN:
        return "note", "whether the advantages compare the completions of a prompt is not known"
    if estimator in _NO_GROUPS:
        return None
    if estimator in _ALONE:
        return _ALONE[estimator]
    s.unread.append(f"algorithm.adv_estimator={short(estimator)} is not known: whether it needs groups is not judged")
    return None


def _tokens(s: Settings) -> int:
    """Number of tokens in a micro-batch, 0 if it is not known."""
    dynamic = s.flag(f"{_ACTOR}.use_dynamic_bsz")
    if dynamic is None:
        return 0
    if dynamic:
        return s.whole(f"{_ACTOR}.ppo_max_token_len_per_gpu") or 0
    if s.get(f"{_ACTOR}.ppo_micro_batch_size_per_gpu") is None:
        return 0
    return (s.whole(f"{_ACTOR}.ppo_micro_batch_size_per_gpu") or 0) * (s.whole("data.max_response_length") or 0)


class _Loss(NamedTuple):
    """What the settings say about the loss."""

    objective: Objective | None
    """The objective that the loss equals, None if it is not known."""
    ours: bool = False
    """Whether bandpo computes it."""
    bypassed: str = ""
    """Why another loss would run; "" if it would not."""
    refused: str = ""
    """The error that bandpo's adapter would raise; "" for none."""


def _loss(s: Settings) -> _Loss:
    """The loss that verl would use with these settings."""
    prefix = f"{_ACTOR}.policy_loss."
    mode = s.get(f"{prefix}loss_mode")
    if mode is UNKNOWN:
        return _Loss(None)
    mode = str(mode)
    if mode == "bandpo" or mode.startswith("bandpo:"):
        return _ours(s, mode, prefix)
    if mode not in _ZOO and mode != "vanilla":
        s.unread.append(f"policy_loss.loss_mode={short(mode)} is not known here")
        return _Loss(None)
    return _Loss(_loss_of_verl(s, mode))


def _loss_of_verl(s: Settings, mode: str) -> Objective | None:
    """The objective that equals verl's own loss, None if it is not known."""
    bypass = s.flag("algorithm.rollout_correction.bypass_mode")
    if bypass is None:
        return None
    if mode in _ZOO and (not bypass or OBJECTIVES[_ZOO[mode]].anchor == "rollout"):
        return OBJECTIVES[_ZOO[mode]]
    low, high = s.number(f"{_ACTOR}.clip_ratio_low"), s.number(f"{_ACTOR}.clip_ratio_high")
    aggregation = s.get(f"{_ACTOR}.loss_agg_mode")
    if low is None or high is None:
        return None
    aggregation = "token-mean" if aggregation is UNKNOWN else aggregation
    if not bypass:
        return Objective(bounds=Clip(low, high), name=mode, aggregation=aggregation)
    # verl's bypass mode replaces the configured loss by one of its own, which takes its ratio against the sampler.
    kind = s.get("algorithm.rollout_correction.loss_type")
    if kind != "ppo_clip":
        what = "not known" if kind is UNKNOWN else short(kind)
        s.unread.append(f"bypass_mode=True puts verl's loss_type ({what}) in place of {mode}; its region is not shown")
        return None
    name = "ppo_clip of verl's bypass mode, in place of loss_mode=" + mode
    return Objective(bounds=Clip(low, high), name=name, aggregation=aggregation, anchor="rollout")


def _ours(s: Settings, mode: str, prefix: str) -> _Loss:
    """The objective of bandpo that the settings ask for, and what the adapter would refuse."""
    given = {option: s.get(f"{prefix}{option}") for option in OPTIONS if s.has(f"{prefix}{option}")}
    name = mode.partition(":")[2] or given.get("objective", DEFAULT_OBJECTIVE)
    region = {option: given[option] for option in REGION if option in given}
    if name is UNKNOWN or any(value is UNKNOWN for value in region.values()):
        return _Loss(None, ours=True)
    name = str(name)
    named = named_objective(name, s.unread)
    if named is None:
        return _Loss(None, ours=True)
    target = s.get(f"{prefix}_target_") if s.has(f"{prefix}_target_") else None
    if given and target is not UNKNOWN and target != _TARGET:
        options = ", ".join(given)
        return _Loss(
            named,
            ours=True,
            bypassed=f"policy_loss has {options} without _target_={_TARGET}: verl refuses unknown keys",
        )
    try:
        objective = RegionOptions(**parse_options(region)).apply(named, name)
    except ValueError as error:
        raise ValueError(str(error)[:_MAX_LINE]) from None
    return _Loss(objective, ours=True, refused=_refused(s, mode, given, named))


def _refused(s: Settings, mode: str, given: Mapping[str, Any], named: Objective) -> str:
    """The error that the adapter would raise for these settings, "" for none; what is not known is taken to be right."""
    options = {option: value for option, value in given.items() if value is not UNKNOWN}
    if "objective" in options:
        options["objective"] = str(options["objective"])
    if given.get("bypass_mode", None if s.defaults else UNKNOWN) is UNKNOWN:
        options["bypass_mode"] = named.anchor == "rollout"
    theirs = _known(s, f"{_ACTOR}.", ACTOR_DEFAULTS) | _known(s, f"{_ACTOR}.policy_loss.", POLICY_LOSS_DEFAULTS)
    dual = _known(s, f"{_ACTOR}.", {"clip_ratio_c": DUAL_CLIP}).get("clip_ratio_c", DUAL_CLIP)
    try:
        objective_of(name_in(mode), options, theirs, dual, _kl_options(s, named))
    except ValueError as error:
        return str(error)[:_MAX_LINE]
    return ""


def _kl_options(s: Settings, named: Objective) -> dict[str, Any]:
    """Verl's options of its KL loss; what is not known is taken to be what the objective needs."""
    right = next((name for name, kl in KL_OF.items() if kl == named.kl), "")
    found: dict[str, Any] = {"use_kl_loss": True, "kl_loss_coef": named.kl_coef, "kl_loss_type": right}
    if not named.kl_coef:
        return found
    given = {name: s.get(f"{_ACTOR}.{name}") for name in found}
    if given["kl_loss_coef"] is not UNKNOWN:
        given["kl_loss_coef"] = s.number(f"{_ACTOR}.kl_loss_coef")
    return found | {name: value for name, value in given.items() if value is not UNKNOWN}


def _known(s: Settings, prefix: str, names: Iterable[str]) -> dict[str, float | None]:
    """The numbers that the file sets, by name without prefix; None for null."""
    found: dict[str, float | None] = {}
    for name in names:
        value = s.get(f"{prefix}{name}") if s.has(f"{prefix}{name}") else UNKNOWN
        if value is not UNKNOWN:
            found[name] = None if value is None else s.number(f"{prefix}{name}")
    return found
