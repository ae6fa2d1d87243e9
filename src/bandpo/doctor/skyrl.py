"""Reads SkyRL's settings from a script that starts it, or from YAML. Needs no SkyRL.

Facts are from SkyRL's public source at commit a9564572eb8e91076be43c1bd5e4615e3de17265 of 2026-08-21: the dataclasses of
`skyrl/train/config/config.py`, and the losses and estimators of `skyrl/backends/skyrl_train/utils/ppo_utils.py`.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bandpo.bounds import Band, Clip
from bandpo.divergences import KL, TV
from bandpo.doctor.launch import Dialect, given_by, note_unknown, parse_script, settings_of
from bandpo.doctor.settings import UNKNOWN, Settings, clip_of, flat
from bandpo.doctor.setup import SKYRL_KNOBS, Setup, short
from bandpo.doctor.shell import Script
from bandpo.experimental import clip_cov, kl_cov
from bandpo.monitoring.findings import Level
from bandpo.objective import Aggregation, Objective
from bandpo.surrogates import clip, detach, dual_clip, mask, soft, two_sided
from bandpo.surrogates.corrections import TIS

_A, _SAMPLING, _ENGINE = "trainer.algorithm", "generator.sampling_params", "generator.inference_engine"
_OFF = f"{_A}.off_policy_correction"
DEFAULTS: Mapping[str, Any] = {
    "trainer.train_batch_size": 1024,
    "trainer.policy_mini_batch_size": 256,
    "trainer.update_epochs_per_batch": 1,
    "trainer.micro_train_batch_size_per_gpu": 1,
    "trainer.max_tokens_per_microbatch": -1,
    "trainer.fused_lm_head_logprob": False,
    f"{_A}.advantage_estimator": "grpo",
    f"{_A}.policy_loss_type": "regular",
    f"{_A}.loss_reduction": "token_mean",
    f"{_A}.eps_clip_low": 0.2,
    f"{_A}.eps_clip_high": 0.2,
    f"{_A}.clip_ratio_c": 3.0,
    f"{_A}.use_kl_loss": True,
    f"{_A}.kl_loss_coef": 0.001,
    f"{_A}.kl_estimator_type": "k3",
    f"{_A}.temperature": None,
    f"{_A}.use_tis": False,
    f"{_A}.tis_imp_ratio_cap": -1.0,
    f"{_A}.sapo.tau_pos": 1.0,
    f"{_A}.sapo.tau_neg": 1.05,
    f"{_A}.cispo.cispo_eps_clip_low": 1.0,
    f"{_A}.cispo.cispo_eps_clip_high": 4.0,
    f"{_A}.cispo.cispo_anchor": "old",
    f"{_A}.dppo.dppo_type": "binary_tv",
    f"{_A}.dppo.delta_low": 0.2,
    f"{_A}.dppo.delta_high": 0.2,
    f"{_A}.clip_cov.clip_ratio": 0.0002,
    f"{_A}.clip_cov.clip_cov_lb": 1.0,
    f"{_A}.clip_cov.clip_cov_ub": 5.0,
    f"{_A}.kl_cov.kl_cov_frac": 0.2,
    f"{_A}.kl_cov.ppo_kl_coef": 1.0,
    f"{_OFF}.tis_ratio_type": None,
    f"{_OFF}.token_tis_ratio_clip_high": 2.0,
    f"{_OFF}.sequence_tis_ratio_clip_high": 5.0,
    f"{_OFF}.sequence_mask_metric": None,
    f"{_OFF}.outlier_token_is_threshold_low": None,
    f"{_OFF}.outlier_token_is_threshold_high": None,
    f"{_OFF}.token_mask_is_threshold_low": None,
    f"{_OFF}.token_mask_is_threshold_high": None,
    "generator.n_samples_per_prompt": 5,
    f"{_ENGINE}.backend": "vllm",
    f"{_SAMPLING}.temperature": 1.0,
    f"{_SAMPLING}.top_p": 1.0,
    f"{_SAMPLING}.top_k": -1,
    f"{_SAMPLING}.min_p": 0.0,
    f"{_SAMPLING}.max_generate_length": 1024,
}
"""SkyRL's defaults."""

_OF_NO_WEIGHT = (
    "kl_ctrl.type kl_ctrl.kl_target kl_ctrl.horizon use_kl_in_reward use_entropy_loss entropy_loss_coef value_head_prefix "
    "advantage_batch_normalize grpo_norm_by_std zero_variance_filter zero_variance_filter_tol lambd gamma value_clip "
    "dynamic_sampling.type dynamic_sampling.max_sample_batches dynamic_sampling.min_replace_ratio max_seq_len "
    "overlong_buffer_len overlong_buffer_penalty_factor off_policy_correction.geo_mask_high off_policy_correction.geo_mask_low "
    "off_policy_correction.product_mask_high off_policy_correction.product_mask_low"
)
DIALECT = Dialect(
    host="SkyRL",
    defaults=DEFAULTS,
    program=re.compile(r"(skyrl|skyrl_train)\.(\w+\.)*entrypoints\.main_base"),
    called="main_base",
    likely=re.compile(r"(skyrl|skyrl_train|examples)\.(\w+\.)*main_(?!sft)\w+"),
    own=(f"{_A}.", "generator.n_samples_per_prompt", f"{_ENGINE}.", f"{_SAMPLING}."),
    names={"generator.backend": f"{_ENGINE}.backend"},
    watched=(f"{_A}.",),
    known=frozenset(f"{_A}.{name}" for name in _OF_NO_WEIGHT.split()),
)
"""How SkyRL's trainers are started."""

_AGGREGATION: Mapping[str, Aggregation] = {
    "token_mean": "token-mean",
    "token_mean_legacy": "token-mean",
    "sequence_mean": "seq-mean-token-mean",
    "seq_mean_token_sum_norm": "seq-mean-token-sum-norm",
}
_NEAR = {
    "token_mean_legacy": "averages over the tokens of each micro-batch",
    "prompt_mean": "averages over the tokens of each prompt, then over prompts",
}
_ALONE: Mapping[str, tuple[Level, str]] = {
    "grpo": ("problem", "advantages compare the completions of a prompt: the advantage of a single one is its reward"),
    "maxrl": ("problem", "advantages compare the completions of a prompt: the advantage of a single one is its reward"),
    "rloo": ("problem", "SkyRL gives the only completion of a prompt an advantage of 0"),
}
_NO_GROUPS = ("gae", "reinforce++")


def read_skyrl(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    tree: Mapping[Any, Any] | None = None,
    script: Script | None = None,
    vocabulary: int | None = None,
) -> Setup:
    """The settings in a script that starts SkyRL, or in its YAML.

    Args:
        path: The file.
        overrides: Settings `key=value`, which replace those of the file.
        tree: Content of a YAML file.
        script: The commands of a script, where it has been read already.
        vocabulary: Number of tokens in the model's vocabulary; None if it is not known.

    Raises:
        ValueError: If it belongs to another host, cannot be read, or has a value that is not valid.
    """
    if tree is None:
        s = settings_of(path, script or parse_script(path), DIALECT, overrides)
    else:
        s = Settings(DEFAULTS, flat({k: v for k, v in tree.items() if k != "defaults"}) | given_by(overrides, DIALECT))
        if tree.get("defaults") not in (None, ["_self_"]):
            s.unread.append(f"defaults: {short(str(tree['defaults']))} is not read, and what it sets is not known")
            s.defaults = False
    note_unknown(s, DIALECT)
    steps, steps_from = _steps(s)
    kl_coef, kl, kl_from = _kl(s)
    objective = _objective(s)
    top_k, engine = s.whole(f"{_SAMPLING}.top_k"), s.text(f"{_ENGINE}.backend")
    return Setup(
        host="SkyRL",
        objective=objective,
        ours=s.get(f"{_A}.policy_loss_type") == "bandpo",
        steps=steps,
        steps_from=steps_from,
        lag=None if "async" in s.program else 0.0,
        engine=engine or "the inference engine",
        corrected=_corrected(s),
        old_is_rollout=False,
        temperature=_temperature(s),
        top_p=s.number(f"{_SAMPLING}.top_p"),
        top_k=None if top_k is None else max(0, top_k),
        min_p=s.number(f"{_SAMPLING}.min_p"),
        group=s.whole("generator.n_samples_per_prompt"),
        alone=_alone(s),
        kl_coef=kl_coef,
        kl=kl,
        kl_from=kl_from,
        tokens=_tokens(s),
        vocabulary=vocabulary,
        fused_head=bool(s.flag("trainer.fused_lm_head_logprob")),
        learning_rate=s.rate("trainer.policy.optimizer_config.lr"),
        knobs=SKYRL_KNOBS,
        assumed=s.taken(),
        unread=s.lines(),
    )


def _steps(s: Settings) -> tuple[float | None, str]:
    keys = ("trainer.train_batch_size", "trainer.policy_mini_batch_size", "trainer.update_epochs_per_batch")
    batch, mini, epochs = (s.positive(key) for key in keys)
    a, b, c = (s.label(key) for key in keys)
    counted = f"{a} / {b} x {c}"
    if batch is None or mini is None or epochs is None:
        return None, counted
    return batch / mini * epochs, counted


def _objective(s: Settings) -> Objective | None:
    """The objective that equals the configured loss, None if it is not known."""
    kind = s.text(f"{_A}.policy_loss_type")
    found = None if kind is None else _loss(s, kind)
    reduction = s.text(f"{_A}.loss_reduction")
    if reduction in _NEAR:
        s.unread.append(f"loss_reduction={reduction} {_NEAR[reduction]}, which no aggregation of bandpo does")
    if found is None or reduction is None:
        return None
    bounds, surrogate, anchor = found
    level = "sequence" if kind == "gspo" else "token"
    aggregation = _AGGREGATION.get(reduction, "token-mean")
    correction = _correction(s) if anchor == "old" else None
    return Objective(
        name=str(kind),
        bounds=bounds,
        surrogate=surrogate,
        ratio_level=level,
        aggregation=aggregation,
        anchor=anchor,
        correction=correction,
    )


def _loss(s: Settings, kind: str) -> tuple[Any, Any, Any] | None:
    """Bounds, surrogate and anchor of a loss, None if one of them is not known."""
    edges = clip_of(s.number(f"{_A}.eps_clip_low"), s.number(f"{_A}.eps_clip_high"))
    if kind in ("regular", "gspo"):
        return None if edges is None else (edges, clip, "old")
    if kind == "rollout_is":
        return None if edges is None else (edges, two_sided, "rollout")
    if kind == "cispo":
        bounds = clip_of(s.number(f"{_A}.cispo.cispo_eps_clip_low"), s.number(f"{_A}.cispo.cispo_eps_clip_high"))
        anchor = s.text(f"{_A}.cispo.cispo_anchor")
        return None if bounds is None or anchor not in ("old", "rollout") else (bounds, detach, anchor)
    if kind == "importance_sampling":
        return Clip(1.0, float("inf")), clip, "old"
    if kind == "dppo":
        return _dppo(s)
    values = _VALUES.get(kind)
    if kind == "bandpo":
        s.unread.append("policy_loss_type=bandpo: the objective is in the program that registers it")
        return None
    if values is None:
        s.unread.append(f"policy_loss_type={short(kind)} is not known here")
        return None
    surrogate, names = values
    given = {name: s.number(f"{_A}.{key}") for name, key in names.items()}
    if None in given.values():
        return None
    free = kind in ("sapo", "kl_cov")
    bounds = Clip(1.0, float("inf")) if free else edges
    return None if bounds is None else (bounds, partial(surrogate, **given), "old")


_VALUES: Mapping[str, tuple[Any, Mapping[str, str]]] = {
    "dual_clip": (dual_clip, {"c": "clip_ratio_c"}),
    "sapo": (soft, {"tau_positive": "sapo.tau_pos", "tau_negative": "sapo.tau_neg"}),
    "clip_cov": (
        clip_cov,
        {"share": "clip_cov.clip_ratio", "low": "clip_cov.clip_cov_lb", "high": "clip_cov.clip_cov_ub"},
    ),
    "kl_cov": (kl_cov, {"share": "kl_cov.kl_cov_frac", "beta": "kl_cov.ppo_kl_coef"}),
}


def _dppo(s: Settings) -> tuple[Any, Any, Any] | None:
    kind = s.text(f"{_A}.dppo.dppo_type")
    low, high = s.positive(f"{_A}.dppo.delta_low"), s.positive(f"{_A}.dppo.delta_high")
    if kind not in ("binary_tv", "binary_kl") or low is None or high is None:
        return None
    divergence = TV if kind == "binary_tv" else KL
    return Band(divergence, low if low == high else (low, high), max_ratio=None), mask, "rollout"


def _correction(s: Settings) -> TIS | None:
    level = s.get(f"{_OFF}.tis_ratio_type")
    if s.flag(f"{_A}.use_tis"):
        cap = s.number(f"{_A}.tis_imp_ratio_cap")
        return TIS(cap) if cap is not None and cap > 0 else None
    if level not in ("token", "sequence"):
        return None
    cap = s.number(f"{_OFF}.{level}_tis_ratio_clip_high")
    return None if cap is None else TIS(cap, level)


def _corrected(s: Settings) -> bool | None:
    """Whether weights or masks account for the difference between sampler and trainer."""
    names = (
        "tis_ratio_type",
        "sequence_mask_metric",
        "outlier_token_is_threshold_low",
        "outlier_token_is_threshold_high",
    )
    names = (*names, "token_mask_is_threshold_low", "token_mask_is_threshold_high")
    values = [s.get(f"{_OFF}.{name}") for name in names]
    used = s.flag(f"{_A}.use_tis")
    if used or any(value is not None and value is not UNKNOWN for value in values):
        return True
    return None if used is None or UNKNOWN in values else False


def _kl(s: Settings) -> tuple[float | None, str | None, str]:
    """Coefficient and term of the KL loss, and where they are from."""
    used = s.flag(f"{_A}.use_kl_loss")
    if not used:
        return None if used is None else 0.0, "", ""
    coefficient, kind = s.number(f"{_A}.kl_loss_coef"), s.text(f"{_A}.kl_estimator_type")
    return coefficient, kind if kind in (None, "k1", "k2", "k3") else "", f"kl_estimator_type={kind}"


def _temperature(s: Settings) -> float | None:
    found, loss = s.number(f"{_SAMPLING}.temperature"), s.optional(f"{_A}.temperature")
    if loss is not None and found is not None and loss == loss and loss != found:
        s.unread.append(
            f"trainer.algorithm.temperature={loss:g} and sampling_params.temperature={found:g}: the loss takes "
            "probabilities at another temperature than the sampler, and no rule looks at that"
        )
    return found


def _alone(s: Settings) -> tuple[Level, str] | None:
    estimator = s.text(f"{_A}.advantage_estimator")
    if estimator is None:
        return "note", "whether the advantages compare the completions of a prompt is not known"
    if estimator not in (*_ALONE, *_NO_GROUPS):
        s.unread.append(f"advantage_estimator={short(estimator)} is not known: whether it needs groups is not judged")
    return _ALONE.get(estimator)


def _tokens(s: Settings) -> int:
    """Number of tokens in a micro-batch, 0 if it is not known."""
    most = s.whole("trainer.max_tokens_per_microbatch")
    if most is None or most > 0:
        return most or 0
    return (s.whole("trainer.micro_train_batch_size_per_gpu") or 0) * (s.whole(f"{_SAMPLING}.max_generate_length") or 0)
