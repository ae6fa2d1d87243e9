"""Reads verl's settings without verl: from a YAML configuration, or from a script or list of overrides `key=value`.

Nothing is executed. A value that depends on a shell, an environment or another file is `UNKNOWN`: it is listed, and no rule
uses it. For settings that are not in the file, verl's defaults are used where verl would use them, and they are listed too.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

from bandpo._system.bounded import parse_yaml, read_regular
from bandpo._system.files import read_yaml
from bandpo._system.secrets import redact_arguments, redact_text
from bandpo.bounds import Clip
from bandpo.doctor.findings import Level
from bandpo.doctor.hosts import host_of_keys, host_of_script, not_readable
from bandpo.doctor.setup import VERL_KNOBS, Setup, named_objective, short
from bandpo.doctor.shell import Script, Word, read_script
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

MAX_SCRIPT_BYTES = 1 << 18
_OWN = "actor_rollout_ref."  # only verl's settings begin with this
_MAX_DEFAULTS, _MAX_GROUP_BYTES = 40, 1 << 16  # entries of Hydra's defaults, and bytes of a file that an entry names
_MAX_KEY, _MAX_UNREAD = 200, 30  # characters of a key, longer than any of verl's; lines about what is unread
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
_MAX_LINE = 400  # characters of a message or of a line about what is unread
_YAML = (".yaml", ".yml")
_TARGET = "bandpo.integrations.verl.BandPolicyLossConfig"
_DTYPES = {
    "fp32": "float32",
    "float32": "float32",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
}
_KEY = re.compile(r"[+~]{0,2}([A-Za-z_][\w-]*(?:[./@][\w-]+)*)=")
_NAME = re.compile(r"[\w-]+(?:\.[\w-]+)*")
_PRINTING = ("echo", "printf", "cat")
_VERL_DEFAULTS = ("ppo_trainer", "ppo_megatron_trainer")

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


class _Unknown:
    def __repr__(self) -> str:
        return "not known"


UNKNOWN = _Unknown()
"""A value that the file sets or may set, and that cannot be determined from it."""


@dataclass
class Settings:
    """The settings of verl in a file.

    Args:
        given: Values by dotted key, as they are in the file; `UNKNOWN` where they cannot be determined.
        defaults: Whether verl's defaults hold for all other keys; if not, their values are not known.
        unread: Lines about what could not be read.
        assumed: Keys whose default was used.
    """

    given: dict[str, Any] = field(default_factory=dict[str, Any])
    defaults: bool = True
    unread: list[str] = field(default_factory=list[str])
    assumed: dict[str, Any] = field(default_factory=dict[str, Any])

    def get(self, key: str) -> Any:
        """The value of a key with references resolved, or verl's default for it; `UNKNOWN` if neither is known.

        Args:
            key: A dotted key, like the other methods.
        """
        value: Any = self._plain(key)
        for _ in range(10):
            match = re.fullmatch(r"\$\{([\w.]{1,200})\}", value) if isinstance(value, str) else None
            if match is None:
                break
            value = self._plain(match[1])
        if isinstance(value, str) and ("${" in value or value == "???"):
            return UNKNOWN
        return value

    def has(self, key: str) -> bool:
        """Whether the file sets the `key`."""
        return key in self.given

    def number(self, key: str) -> float | None:
        """The value of `key` as a finite number, None if it is not known.

        Raises:
            ValueError: If the value is something else.
        """
        value = self.get(key)
        if value is UNKNOWN:
            return None
        try:
            if isinstance(value, bool):
                raise ValueError
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{key}: {short(value)} is not a number") from None
        if not math.isfinite(number):
            raise ValueError(f"{key}: {number} is not a finite number")
        return number

    def whole(self, key: str) -> int | None:
        """The value of `key` as a whole number, None if it is not known.

        Raises:
            ValueError: If the value is something else.
        """
        value = self.number(key)
        if value is not None and value != value // 1:
            raise ValueError(f"{key}: {short(self.get(key))} is not a whole number")
        return None if value is None else int(value)

    def flag(self, key: str) -> bool | None:
        """The value of `key` as true or false, None if it is not known.

        Raises:
            ValueError: If the value is something else.
        """
        value = self.get(key)
        if value is UNKNOWN:
            return None
        if not isinstance(value, bool):
            raise ValueError(f"{key}: {short(value)} is neither true nor false")
        return value

    def label(self, key: str) -> str:
        """The number at `key` as `name=value`, for a finding."""
        value = self.number(key)
        shown = "not known" if value is None else f"{value:g} (assumed)" if key in self.assumed else f"{value:g}"
        return f"{key.rpartition('.')[2]}={shown}"

    def _plain(self, key: str) -> Any:
        if key not in self.given:
            parts = key.split(".")
            whole_group = any(".".join(parts[:i]) in self.given for i in range(1, len(parts)))
            if whole_group or not self.defaults:
                return UNKNOWN
            if key in DEFAULTS:
                self.assumed[key] = DEFAULTS[key]
                return DEFAULTS[key]
            return UNKNOWN
        value = self.given[key]
        return parsed(value) if isinstance(value, Text) else value


class Text(str):
    """A value from a command line: YAML that is parsed when it is used."""


def parsed(text: str) -> Any:
    """The value that Hydra reads from a text of the command line; the text itself if it is not YAML.

    Args:
        text: The text after `key=`.
    """
    try:
        return parse_yaml(str(text), "a value") if text else None
    except ValueError:
        return str(text)


def read_verl(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    tree: Mapping[Any, Any] | None = None,
    vocabulary: int | None = None,
) -> Setup:
    """The settings in a verl configuration.

    Args:
        path: A YAML file, or a text with `key=value`.
        overrides: More settings `key=value`, which replace those of the file; `group=name` chooses a file of a group beside
            the YAML.
        tree: Content of the YAML file where it has been read already; None reads the file.
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
    settings = _from_script(path) if tree is None else _from_yaml(path, tree, chosen)
    settings.given |= {k: v for k, v in chosen.items() if "." in k}
    return _setup(settings, vocabulary)


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
    settings = Settings()
    if not is_verl(tree):
        raise not_readable(path, host_of_keys(tree))
    own = _flat({k: v for k, v in tree.items() if k not in ("defaults", "hydra")})
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
    keys = _flat({k: v for k, v in cast("dict[Any, Any]", tree).items() if k != "defaults"})
    return keys if b"@package _global_" in data else {f"{group}.{k}": x for k, x in keys.items()}


def _leave_out(settings: Settings, what: str) -> None:
    """Note that an entry of `defaults` is not read, so that settings which are not in the file are not known."""
    settings.unread.append(f"defaults: {what}")
    settings.defaults = False


def _from_script(path: Path) -> Settings:
    text = read_regular(path, MAX_SCRIPT_BYTES, follow=False).decode("utf-8", errors="replace")
    try:
        script = read_script(text.replace("\x00", "\ufffd"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    runs = [command for command in script.commands if _runs_verl(command)]
    bare = [command for command in script.commands if all(_key(word) is not None for word in command)]
    listed = bool(bare) and len(bare) == len(script.commands)
    if listed:  # a list of overrides, without a command that takes them
        runs, bare = [[word for command in bare for word in command]], []
    elsewhere = _elsewhere(script, runs, bare)
    keys = {_key(word) for command in runs for word in command}.union(*elsewhere.values())
    if not any(_is_main_ppo(w) for c in runs for w in c) and not any(k and k.startswith(_OWN) for k in keys):
        host = host_of_script(script)
        if host or any(_key(word) for command in script.commands for word in command):
            raise not_readable(path, host)
        raise ValueError(f"{path}: no override of the form key=value in it")
    settings = _merged([_from_command(command, listed=listed) for command in runs])
    for name, keys in elsewhere.items():
        settings.unread.append(f"{name} sets {_some(keys)}, which is not resolved")
        settings.given |= dict.fromkeys(keys, UNKNOWN)
    settings.unread += [f"{short(what)} may set any variable" for what in script.opened]
    settings.unread += [f"the here-document that ends with {name} is not read" for name in script.here]
    if "@" in script.assumed:
        settings.unread.append("$@ (the arguments of the script) is taken as empty")
    unset = [name for name in script.assumed if name != "@"]
    if unset:
        settings.unread.append(f"taken as not set in the environment: {_some(unset)}")
    return settings


def _elsewhere(
    script: Script, runs: Sequence[Sequence[Word]], bare: Sequence[Sequence[Word]]
) -> dict[str, tuple[str, ...]]:
    """Keys of settings that are not words of a command which runs verl, by where they are."""
    spoken = [
        w
        for command in script.commands
        if command[0].text not in _PRINTING
        for w in command
        if _key(w) is None and len(w.text.split()) > 1
    ]
    found = {
        "a quoted text": _held(spoken),
        "a line outside of the command": _held([word for command in bare for word in command]),
    }
    # A word that is not resolved may be the value of any variable.
    if not runs or any(not word.literal and _key(word) is None for command in runs for word in _arguments(command)):
        found = {name: _held(words) for name, words in script.variables.items()} | found
    return {name: keys for name, keys in found.items() if keys}


def _arguments(command: Sequence[Word]) -> list[Word]:
    """The words after the program."""
    at = next((i for i, word in enumerate(command) if _is_main_ppo(word)), None)
    return list(command[0 if at is None else at + 1 :])


def _from_command(command: Sequence[Word], *, listed: bool) -> Settings:
    """The settings of one command."""
    runs_verl = any(_is_main_ppo(word) for word in command)
    settings = Settings(defaults=listed or runs_verl)
    unresolved: list[str] = []
    words = _arguments(command)
    shown = redact_arguments([word.text for word in words])
    for i, word in enumerate(words):
        key = _key(word)
        if key is not None:
            known = word.literal
            settings.given[key] = Text(word.text.partition("=")[2]) if known else UNKNOWN
            if not known:
                unresolved.append(shown[i].lstrip("+~") + _on(word))
        elif word.text.startswith(("--config", "-cn", "-cp", "-cd")):
            option, equals, value = word.text.partition("=")
            value = value if equals else words[i + 1].text if i + 1 < len(words) else ""
            if option not in ("--config-name", "-cn") or value.removesuffix(".yaml") not in _VERL_DEFAULTS:
                settings.unread.append(f"{option} {value}: that configuration is not read; examine it as a YAML file")
                settings.defaults = False
        elif not word.literal:
            settings.unread.append(f"{shown[i]}{_on(word)} is not resolved and may set anything")
            settings.defaults = False
    if unresolved:
        settings.unread.append(f"not resolved: {_some(unresolved)}")
    if not settings.defaults and not runs_verl and not listed:
        settings.unread.append("the program that this runs is not verl's main_ppo: its defaults are not known")
    return settings


def _on(word: Word) -> str:
    return f" (line {word.line})" if word.line else ""


def _merged(parts: Sequence[Settings]) -> Settings:
    """The settings that all commands of a script have in common."""
    if not parts:
        return Settings(defaults=False)
    first, *others = parts
    if not others:
        return first
    keys = {key for part in parts for key in part.given}
    same = {
        k: first.given[k] for k in first.given if all(k in p.given and p.given[k] == first.given[k] for p in others)
    }
    unread = list(dict.fromkeys(what for part in parts for what in part.unread))
    differing = sorted(keys - set(same))
    unread.append(
        f"{len(parts)} commands run verl"
        + (f", and differ in {_some(differing)}: examine them one by one" if differing else "")
    )
    return Settings({k: same.get(k, UNKNOWN) for k in keys}, all(p.defaults for p in parts), unread)


def _runs_verl(command: Sequence[Word]) -> bool:
    keys = [_key(word) for word in command]
    return any(_is_main_ppo(word) for word in command) or (
        None in keys and any(key is not None and key.startswith(_OWN) for key in keys)
    )


def _is_main_ppo(word: Word) -> bool:
    return word.literal and len(word.text) < _MAX_KEY and bool(re.fullmatch(r"(.*[./])?main_ppo(\.py)?", word.text))


def _held(words: Iterable[Word]) -> tuple[str, ...]:
    """The keys of settings that texts contain (the value of a variable, a quoted text), each once."""
    found: dict[str, None] = {}
    for word in words:
        for part in word.text.split():
            match = _KEY.match(part)
            if match is not None and "." in match[1] and len(match[1]) <= _MAX_KEY:
                found[match[1]] = None
    return tuple(found)


def _key(word: Word) -> str | None:
    """The key of an override, None if the word is not an override."""
    match = _KEY.match(word.text)
    if match is None or match.end() > word.known or len(match[1]) > _MAX_KEY:
        return None
    return match[1]


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{str(key)[:_MAX_KEY]}"
        if len(name) > _MAX_KEY:
            continue
        if isinstance(value, Mapping):
            found |= _flat(cast("Mapping[Any, Any]", value), f"{name}.")
        else:
            found[name] = value
    return found


def _setup(s: Settings, vocabulary: int | None) -> Setup:
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
        engine="the rollout engine" if engine is UNKNOWN or not engine else str(engine)[:_MAX_KEY],
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
        weights=_weights(s),
        learning_rate=s.number(f"{_ACTOR}.optim.lr") if s.has(f"{_ACTOR}.optim.lr") else None,
        knobs=VERL_KNOBS | {"fused head": "actor_rollout_ref.model.use_fused_kernels=True"},
        assumed=tuple(f"{key}={value}" for key, value in s.assumed.items()),
        unread=_lines(s.unread),
    )


def _kl(s: Settings) -> tuple[float | None, str | None, str]:
    """Coefficient and term of the KL loss, and where they are from."""
    used = s.flag(f"{_ACTOR}.use_kl_loss")
    if not used:
        return None if used is None else 0.0, "", ""
    coefficient, kind = s.number(f"{_ACTOR}.kl_loss_coef"), s.get(f"{_ACTOR}.kl_loss_type")
    return coefficient, None if kind is UNKNOWN else KL_OF.get(str(kind), ""), f"kl_loss_type={short(kind)}"


def _lines(unread: Iterable[str]) -> tuple[str, ...]:
    whole = [redact_text(line) for line in dict.fromkeys(unread)]
    lines = [line if len(line) <= _MAX_LINE else line[: _MAX_LINE - 3] + "..." for line in whole]
    more = len(lines) - _MAX_UNREAD
    return (*lines[:_MAX_UNREAD], *([f"and {more} more lines that are not read"] if more > 0 else ()))


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


def _weights(s: Settings) -> str | None:
    key = f"{_ACTOR}.fsdp_config.model_dtype"
    if not s.has(key):
        return None
    return _DTYPES.get(str(s.get(key)))


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


def _some(names: Iterable[str]) -> str:
    """The first eight of the names, for a message."""
    names = list(names)
    shown = [redact_text(name) for name in names[:8]]
    shown = [name if len(name) <= 80 else name[:77] + "..." for name in shown]
    return ", ".join(shown) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
