"""Reads verl's overrides: a YAML configuration, or a file of `key=value` (a shell script will do), without verl."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bandpo._files import read_yaml
from bandpo.bounds import Clip
from bandpo.composition import Objective
from bandpo.doctor.setup import VERL_KNOBS, Setup
from bandpo.integrations._overrides import Overrides
from bandpo.objectives import OBJECTIVES, get_objective

_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
DEFAULTS: Mapping[str, Any] = {
    "data.train_batch_size": 1024,
    "data.max_response_length": 512,
    "algorithm.rollout_correction.bypass_mode": False,
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
    f"{_ACTOR}.policy_loss.loss_mode": "vanilla",
    f"{_ROLLOUT}.temperature": 1.0,
    f"{_ROLLOUT}.top_p": 1,
    f"{_ROLLOUT}.top_k": -1,
    f"{_ROLLOUT}.n": 1,
}
"""verl 0.9.1's own; a test composes its configuration and compares."""

_ZOO = {
    "gspo": "gspo", "sapo": "sapo", "geo_mean": "gmpo", "cispo": "cispo", "clip_cov": "clip-cov", "kl_cov": "kl-cov",
    "dppo_tv": "dppo-tv", "dppo_kl": "dppo-kl",
}  # fmt: skip
_OVERRIDE = re.compile(r"""(?<![\w$.])[+~]{0,2}([A-Za-z_][\w]*(?:\.[\w-]+)*)=("[^"]*"|'[^']*'|[^\s\\]*)""")
_TARGET = "bandpo.integrations.verl.BandPolicyLossConfig"


def read_verl(path: Path, overrides: Sequence[str] = (), *, vocabulary: int | None = None) -> Setup:
    """The settings in a verl configuration.

    Args:
        path: YAML, or a text with `key=value`.
        overrides: More of the latter, which win; `group=name` picks a file of a group beside the YAML.
        vocabulary: Of the model, for the memory of the logits.

    Raises:
        ValueError: If it cannot be read, or asks for what bandpo would refuse.
    """
    given, unread = read_overrides(path, overrides)
    values = {**DEFAULTS, **given}
    return _setup(values, given, unread, vocabulary)


def is_verl(given: Mapping[str, Any]) -> bool:
    """Whether a YAML file is a verl configuration."""
    return bool({"actor_rollout_ref", "defaults", "hydra"} & set(given)) or any(
        str(key).startswith(("actor_rollout_ref.", "algorithm.", "data.")) for key in given
    )


def read_overrides(path: Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Dotted keys and values, references resolved, and what could not be read.

    Args:
        path: As in `read_verl`.
        overrides: As in `read_verl`.
    """
    chosen = dict(_pairs(" ".join(overrides)))
    unread: list[str] = []
    if path.suffix in (".yaml", ".yml"):
        tree = read_yaml(path)
        found = _flat(tree)
        for entry in tree.get("defaults") or []:
            found, missing = _default(entry, path.parent, chosen, found)
            unread += missing
        found = {k: v for k, v in found.items() if not k.startswith(("defaults", "hydra."))}
    else:
        text = path.read_text(encoding="utf-8", errors="replace")
        found = dict(_pairs(re.sub(r"(?m)^\s*#.*$", "", text)))
        if not found:
            raise ValueError(f"{path}: no override of the form key=value in it")
    found |= {k: v for k, v in chosen.items() if "." in k}
    return {k: _resolve(v, found) for k, v in found.items()}, tuple(unread)


def _setup(v: Mapping[str, Any], given: Mapping[str, Any], unread: tuple[str, ...], vocabulary: int | None) -> Setup:
    objective, ours, bypassed = _objective(v, given)
    batch, mini, epochs = (
        _number(v, k) for k in ("data.train_batch_size", f"{_ACTOR}.ppo_mini_batch_size", f"{_ACTOR}.ppo_epochs")
    )
    if mini <= 0 or epochs <= 0 or batch <= 0:
        raise ValueError(
            f"train_batch_size={batch:g}, ppo_mini_batch_size={mini:g}, ppo_epochs={epochs:g} must be positive"
        )
    length = _whole(v, "data.max_response_length")
    micro = v[f"{_ACTOR}.ppo_micro_batch_size_per_gpu"]
    dynamic = bool(v[f"{_ACTOR}.use_dynamic_bsz"])
    if dynamic:
        tokens = _whole(v, f"{_ACTOR}.ppo_max_token_len_per_gpu")
    else:
        tokens = 0 if micro is None else _whole(v, f"{_ACTOR}.ppo_micro_batch_size_per_gpu") * length
    top_k = _whole(v, f"{_ROLLOUT}.top_k")
    return Setup(
        host="verl", objective=objective, ours=ours, bypassed=bypassed, steps=batch / mini * epochs,
        steps_from=f"train_batch_size={batch:g} / ppo_mini_batch_size={mini:g} x ppo_epochs={epochs:g}",
        engine=str(v.get(f"{_ROLLOUT}.name") or "the rollout engine"),
        corrected=v["algorithm.rollout_correction.rollout_is"] is not None,
        old_is_rollout=bool(v["algorithm.rollout_correction.bypass_mode"]),
        temperature=_number(v, f"{_ROLLOUT}.temperature"), top_p=_number(v, f"{_ROLLOUT}.top_p"), top_k=max(0, top_k),
        group=_whole(v, f"{_ROLLOUT}.n"), tokens=tokens, vocabulary=vocabulary,
        fused_head=bool(v["actor_rollout_ref.model.use_fused_kernels"]),
        knobs=VERL_KNOBS | {"fused head": "actor_rollout_ref.model.use_fused_kernels=True"}, unread=unread,
    )  # fmt: skip


def _objective(v: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[Objective, bool, str]:
    prefix = f"{_ACTOR}.policy_loss."
    mode = str(v[f"{prefix}loss_mode"])
    if mode == "bandpo" or mode.startswith("bandpo:"):
        options = {k.removeprefix(prefix): x for k, x in given.items() if k.startswith(prefix)}
        name = mode.partition(":")[2] or str(options.get("objective", "bandpo-kl"))
        fields = {k: x for k, x in options.items() if k in Overrides.__dataclass_fields__}
        if fields and options.get("_target_") != _TARGET:
            names = ", ".join(fields)
            return (
                get_objective(name),
                True,
                f"policy_loss has {names} without _target_={_TARGET}: verl refuses unknown keys",
            )
        return Overrides(**fields).apply(get_objective(name), name), True, ""
    if mode in _ZOO:
        return OBJECTIVES[_ZOO[mode]], False, ""
    low, high = _number(v, f"{_ACTOR}.clip_ratio_low"), _number(v, f"{_ACTOR}.clip_ratio_high")
    known = "" if mode == "vanilla" else " (unknown here: shown as verl's vanilla clip)"
    return Objective(bounds=Clip(low, high), name=f"{mode}{known}", aggregation=v[f"{_ACTOR}.loss_agg_mode"]), False, ""


def _default(
    entry: Any, folder: Path, chosen: Mapping[str, Any], found: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """What a line of Hydra's `defaults` brings: a file beside the configuration, whose keys the configuration wins over."""
    if entry == "_self_":
        return found, []
    if isinstance(entry, str):
        return found, [f"defaults: {entry} is not read; verl 0.9.1's own defaults are assumed"]
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ValueError(f"defaults: {entry!r} is neither a name nor a pair group: name")
    [(group, name)] = entry.items()
    group = str(group).removeprefix("override ").removeprefix("optional ")
    name = chosen.get(group, name)
    path = folder / group / f"{name}.yaml"
    if not path.is_file():
        return found, [f"defaults: {group}={name} is not read: {path} does not exist"]
    keys = _flat(read_yaml(path))
    if "@package _global_" not in path.read_text(encoding="utf-8"):
        keys = {f"{group}.{k}": x for k, x in keys.items()}
    return {**found, **keys}, []


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _pairs(text: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in _OVERRIDE.findall(text):
        plain = value.strip("\"'")
        try:
            found.append((key, yaml.safe_load(plain) if plain else None))
        except (yaml.YAMLError, RecursionError):
            found.append((key, plain))
    return found


def _resolve(value: Any, found: Mapping[str, Any]) -> Any:
    """`${a.b}` as the value of that key; other interpolations stay text."""
    for _ in range(10):
        match = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
        if match is None:
            return value
        value = found.get(match[1], DEFAULTS.get(match[1]))
    return value


def _number(v: Mapping[str, Any], key: str) -> float:
    value = v[key]
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{key}: {value!r} is not a number") from None


def _whole(v: Mapping[str, Any], key: str) -> int:
    value = _number(v, key)
    if value != value // 1:  # NaN and infinity are not whole either
        raise ValueError(f"{key}: {v[key]!r} is not a whole number")
    return int(value)
