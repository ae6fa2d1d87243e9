"""Reads rLLM's settings from a script that starts its trainer with the verl backend. Needs neither of them.

rLLM copies its own settings to those of verl, so this reader does the same and leaves the rest to verl's reader. Facts are from
rLLM's public source at commit 9beb6e0f676a46d38858991fd79ac5f8e0b16d4c of 2026-08-15: `rllm/trainer/config/rllm/base.yaml`,
`sync_config` in `rllm/trainer/verl/utils.py`, the estimators of `rllm/trainer/algorithms`. It pins verl 0.8.0.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bandpo.doctor import verl
from bandpo.doctor.hosts import not_readable
from bandpo.doctor.launch import Dialect, parse_script, settings_of
from bandpo.doctor.settings import UNKNOWN, Settings
from bandpo.doctor.setup import RLLM_KNOBS, Setup, short
from bandpo.doctor.shell import Script
from bandpo.monitoring.findings import Level

_R, _ACTOR, _ROLLOUT = "rllm.algorithm", "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
_CORRECTION = "algorithm.rollout_correction"
OWN_DEFAULTS: Mapping[str, Any] = {
    f"{_R}.adv_estimator": "grpo",
    f"{_R}.loss_fn": None,
    f"{_R}.loss_agg_mode": None,
    f"{_R}.kl_beta": 0.0,
    f"{_R}.eps_clip": 0.2,
    f"{_R}.eps_clip_high": None,
    f"{_R}.rollout_correction.bypass_mode": False,
    f"{_R}.rollout_correction.tis_mode": None,
    "rllm.rollout.n": 8,
    "rllm.rollout.train.temperature": 1.0,
    "rllm.rollout.train.top_p": 1.0,
    "rllm.rollout.train.top_k": None,
    "rllm.data.train_batch_size": 64,
    "rllm.data.max_response_length": 30720,
    "rllm.async_training.enable": False,
}
"""rLLM's defaults; None leaves verl's."""

_SHARED: Mapping[str, str] = {
    "algorithm.adv_estimator": f"{_R}.adv_estimator",
    f"{_CORRECTION}.bypass_mode": f"{_R}.rollout_correction.bypass_mode",
    f"{_CORRECTION}.rollout_is": f"{_R}.rollout_correction.tis_mode",
    f"{_ACTOR}.kl_loss_coef": f"{_R}.kl_beta",
    f"{_ACTOR}.policy_loss.loss_mode": f"{_R}.loss_fn",
    f"{_ACTOR}.loss_agg_mode": f"{_R}.loss_agg_mode",
    f"{_ACTOR}.clip_ratio_low": f"{_R}.eps_clip",
    f"{_ACTOR}.clip_ratio_high": f"{_R}.eps_clip_high",
    f"{_ROLLOUT}.n": "rllm.rollout.n",
    f"{_ROLLOUT}.temperature": "rllm.rollout.train.temperature",
    f"{_ROLLOUT}.top_p": "rllm.rollout.train.top_p",
    f"{_ROLLOUT}.top_k": "rllm.rollout.train.top_k",
    "data.train_batch_size": "rllm.data.train_batch_size",
    "data.max_response_length": "rllm.data.max_response_length",
}
"""Settings of verl, and those of rLLM that they are copied from."""

DIALECT = Dialect(
    host="rLLM",
    defaults={**verl.DEFAULTS, **OWN_DEFAULTS},
    program=re.compile(r"(.*/)?train\w*\.py|(examples|cookbooks|rllm)\.(\w+\.)*train\w*"),
    called="trainer",
    own=("rllm.", "rllm/"),
    config_options=("--config-name", "-cn"),
    configs=("unified",),
    needs_own=True,
)
"""How rLLM's trainer is started."""

_ALONE: Mapping[str, tuple[Level, str]] = {
    "grpo": ("problem", "advantages compare the completions of a prompt: the advantage of a single one is its reward"),
    "rloo": ("warning", "without other completions there is no baseline: the advantage is the reward"),
    "reinforce_plus_plus_baseline": ("problem", "rLLM takes the mean of a prompt's rewards away: that of one gives 0"),
}
_NO_GROUPS = ("reinforce", "prpo")


def read_rllm(
    path: Path, overrides: Sequence[str] = (), *, script: Script | None = None, vocabulary: int | None = None
) -> Setup:
    """The settings in a script that starts rLLM with its verl backend.

    Args:
        path: The script.
        overrides: Settings `key=value`, which replace those of the script.
        script: The commands of the script, where it has been read already.
        vocabulary: Number of tokens in the model's vocabulary; None if it is not known.

    Raises:
        ValueError: If it belongs to another host or backend, cannot be read, or has a value that is not valid.
    """
    s = settings_of(path, script or parse_script(path), DIALECT, overrides)
    backend = s.get("rllm/backend")
    if s.has("rllm/backend") and backend is not UNKNOWN and backend != "verl":
        raise not_readable(path, f"rLLM with its backend {short(backend)}")
    if not s.has("rllm/backend") and s.defaults:
        s.unread.append(
            "without rllm/backend=verl it is not known which of rLLM's configurations this is, nor its defaults"
        )
        s.defaults = False
    estimator, asynchronous = _copied(s)
    alone = _alone(s, estimator)
    bypass = s.flag(f"{_CORRECTION}.bypass_mode")
    if bypass:  # rLLM keeps the configured loss, and gives it the sampler's log-probs
        s.given[f"{_CORRECTION}.bypass_mode"] = False
    found = verl.setup_of(s, vocabulary)
    objective = found.objective
    if bypass and objective is not None:
        objective = dataclasses.replace(objective, anchor="rollout")
    known = asynchronous is False
    uncounted = "async_training decides how often a rollout is used"
    return dataclasses.replace(
        found,
        host="rLLM",
        objective=objective,
        old_is_rollout=bypass,
        steps=found.steps if known else None,
        steps_from=found.steps_from if known else uncounted if asynchronous else f"whether {uncounted} is not known",
        lag=0.0 if known else None,
        alone=alone,
        knobs=RLLM_KNOBS,
    )


def _copied(s: Settings) -> tuple[str | None, bool | None]:
    """Copy rLLM's settings to verl's, in rLLM's order of precedence; its estimator, and whether it is asynchronous."""
    low, high = f"{_ACTOR}.clip_ratio_low", f"{_ACTOR}.clip_ratio_high"
    for theirs, own in _SHARED.items():
        if s.has(own) or (not s.has(theirs) and s.get(own) is not None):
            s.given[theirs] = s.get(own)
    if not s.has(high):
        s.given[high] = s.get(low)
    used = f"{_ACTOR}.use_kl_loss"
    if not s.has(used):
        beta = s.number(f"{_ACTOR}.kl_loss_coef")
        s.given[used] = UNKNOWN if beta is None else beta > 0
    estimator = s.text("algorithm.adv_estimator")
    s.given["algorithm.adv_estimator"] = "gae"  # whether it needs groups is judged here, and not by verl's reader
    return estimator, s.flag("rllm.async_training.enable")


def _alone(s: Settings, estimator: str | None) -> tuple[Level, str] | None:
    if estimator is None:
        return "note", "whether the advantages compare the completions of a prompt is not known"
    if estimator not in (*_ALONE, *_NO_GROUPS):
        s.unread.append(f"adv_estimator={short(estimator)} is not known: whether it needs groups is not judged")
    return _ALONE.get(estimator)
