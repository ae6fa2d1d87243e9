"""Reads OpenRLHF's settings from a script that starts `openrlhf.cli.train_ppo_ray`. Needs no OpenRLHF.

Facts are from OpenRLHF's public source at commit 3c3be6234e0cb353e76bb8019947db9dfe99fca7 of 2026-08-13: the options of
`openrlhf/cli/train_ppo_ray.py`, the losses of `models/loss.py`, the estimators of `trainer/ppo_utils/experience_maker.py`. The
options without dots are those of its last commit before they were renamed, 76351db1ffe8e12db632a5bf450bbafb3e2031ed of
2026-04-17.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bandpo.doctor.launch import Dialect, note_unknown, parse_script, settings_of
from bandpo.doctor.settings import UNKNOWN, Settings, clip_of
from bandpo.doctor.setup import OPENRLHF_KNOBS, Setup, short
from bandpo.doctor.shell import Script
from bandpo.monitoring.findings import Level
from bandpo.objective import Objective
from bandpo.surrogates import clip, dual_clip
from bandpo.surrogates.corrections import IcePop

DEFAULTS: Mapping[str, Any] = {
    "rollout.batch_size": 1024,
    "rollout.n_samples_per_prompt": 1,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "train.batch_size": 128,
    "train.micro_batch_size": 1,
    "train.max_epochs": 1,
    "train.dynamic_batch_enable": False,
    "train.max_tokens_per_gpu": 16192,
    "data.max_len": 2048,
    "actor.eps_clip": 0.2,
    "actor.eps_clip_low_high": None,
    "actor.dual_clip": None,
    "actor.policy_loss_type": "ppo",
    "actor.adam.lr": 1e-6,
    "algo.kl.init_coef": 0.01,
    "algo.kl.use_loss": False,
    "algo.kl.estimator": "k1",
    "algo.kl.target": None,
    "algo.advantage.estimator": "gae",
    "algo.advantage.is_correction_enable": False,
    "algo.advantage.is_correction_threshold": (0.5, 5.0),
    "algo.advantage.is_correction_type": "tis",
}
"""OpenRLHF's defaults."""

_NAMES = {
    "rollout_batch_size": "rollout.batch_size",
    "n_samples_per_prompt": "rollout.n_samples_per_prompt",
    "temperature": "rollout.temperature",
    "top_p": "rollout.top_p",
    "train_batch_size": "train.batch_size",
    "micro_train_batch_size": "train.micro_batch_size",
    "max_epochs": "train.max_epochs",
    "train_max_tokens_per_gpu": "train.max_tokens_per_gpu",
    "max_len": "data.max_len",
    "eps_clip": "actor.eps_clip",
    "eps_clip_low_high": "actor.eps_clip_low_high",
    "dual_clip": "actor.dual_clip",
    "policy_loss_type": "actor.policy_loss_type",
    "actor_learning_rate": "actor.adam.lr",
    "init_kl_coef": "algo.kl.init_coef",
    "kl_estimator": "algo.kl.estimator",
    "kl_target": "algo.kl.target",
    "advantage_estimator": "algo.advantage.estimator",
    "vllm_is_truncated_threshold": "algo.advantage.is_correction_threshold",
    "vllm_is_correction_type": "algo.advantage.is_correction_type",
}
# Options without a value. Those that this reader does not look at are here so that no word after them is taken as their value.
_PLAIN_FLAGS = (
    "actor.freeze_visual_encoder actor.gradient_checkpointing_enable actor.gradient_checkpointing_reentrant "
    "actor.muon.nesterov actor.muon.no_nesterov critic.muon.nesterov critic.muon.no_nesterov algo.advantage.no_std_norm "
    "algo.dynamic_filtering_enable ckpt.disable_ds ckpt.load_enable ckpt.save_hf critic.save_value_network "
    "data.apply_chat_template data.disable_fast_tokenizer ds.adam_offload ds.deepcompile ds.enable_sleep ds.load_in_4bit "
    "ds.overlap_comm ds.packing_samples ds.use_liger_kernel ds.use_universal_ckpt ref.offload reward.normalize_enable "
    "reward.offload train.async_enable train.colocate_actor_ref train.colocate_all train.colocate_critic_reward "
    "train.enable_ema train.full_determinism_enable train.partial_rollout_enable use_ms vllm.enable_prefix_caching "
    "vllm.enable_sleep vllm.enforce_eager vllm.sync_with_ray "
    "actor_init_on_gpu perf adam_offload apply_chat_template async_train bf16 colocate_actor_ref colocate_all_models "
    "colocate_critic_reward deepcompile deepspeed_enable_sleep disable_ds_ckpt disable_fast_tokenizer dynamic_filtering "
    "enable_ema enable_prefix_caching enforce_eager flash_attn freeze_visual_encoder full_determinism gradient_checkpointing "
    "gradient_checkpointing_use_reentrant "
    "load_checkpoint load_in_4bit no_advantage_std_norm normalize_reward overlap_comm packing_samples partial_rollout "
    "ref_reward_offload save_hf_ckpt save_value_network use_ds_universal_ckpt use_liger_kernel vllm_enable_sleep "
    "vllm_sync_with_ray"
)
_FLAGS: dict[str, tuple[str, Any]] = {
    **{name: (name, True) for name in _PLAIN_FLAGS.split()},
    "train.dynamic_batch_enable": ("train.dynamic_batch_enable", True),
    "use_dynamic_batch": ("train.dynamic_batch_enable", True),
    "algo.kl.use_loss": ("algo.kl.use_loss", True),
    "use_kl_loss": ("algo.kl.use_loss", True),
    "algo.advantage.is_correction_enable": ("algo.advantage.is_correction_enable", True),
    "enable_vllm_is_correction": ("algo.advantage.is_correction_enable", True),
}
DIALECT = Dialect(
    host="OpenRLHF",
    defaults=DEFAULTS,
    program=re.compile(r"(.*[./])?train_ppo_ray(\.py)?"),
    called="train_ppo_ray",
    own=("algo.advantage.", "actor.eps_clip_low_high"),
    options=True,
    names=_NAMES,
    flags=_FLAGS,
    watched=("algo.kl.", "algo.advantage.is_", "actor.eps_", "actor.policy_loss"),
    known=frozenset({"algo.kl.horizon"}),
)
"""How OpenRLHF's train_ppo_ray is started."""

_COMPARING = ("rloo", "reinforce_baseline", "group_norm", "dr_grpo")
_ALONE: tuple[Level, str] = (
    "problem",
    "advantages compare the completions of a prompt, and OpenRLHF refuses a single one",
)
_NO_GROUPS = ("gae", "reinforce")


def read_openrlhf(
    path: Path, overrides: Sequence[str] = (), *, script: Script | None = None, vocabulary: int | None = None
) -> Setup:
    """The settings in a script that starts OpenRLHF.

    Args:
        path: The script.
        overrides: Settings `option=value`, which replace those of the script.
        script: The commands of the script, where it has been read already.
        vocabulary: Number of tokens in the model's vocabulary; None if it is not known.

    Raises:
        ValueError: If it belongs to another host, cannot be read, or has a value that is not valid.
    """
    s = settings_of(path, script or parse_script(path), DIALECT, overrides)
    note_unknown(s, DIALECT)
    steps, steps_from = _steps(s)
    kl_coef, kl, kl_from = _kl(s)
    return Setup(
        host="OpenRLHF",
        objective=_objective(s),
        ours=False,
        steps=steps,
        steps_from=steps_from,
        lag=None if s.given.get("train.async_enable", s.given.get("async_train")) else 0.0,
        engine="vLLM",
        corrected=s.flag("algo.advantage.is_correction_enable"),
        old_is_rollout=False,
        temperature=s.number("rollout.temperature"),
        top_p=s.number("rollout.top_p"),
        group=s.whole("rollout.n_samples_per_prompt"),
        alone=_alone(s),
        kl_coef=kl_coef,
        kl=kl,
        kl_from=kl_from,
        tokens=_tokens(s),
        vocabulary=vocabulary,
        learning_rate=s.rate("actor.adam.lr"),
        knobs=OPENRLHF_KNOBS,
        assumed=s.taken(),
        unread=s.lines(),
    )


def _steps(s: Settings) -> tuple[float | None, str]:
    keys = ("rollout.batch_size", "rollout.n_samples_per_prompt", "train.batch_size", "train.max_epochs")
    prompts, group, batch, epochs = (s.positive(key) for key in keys)
    a, b, c, d = (s.label(key, whole=True) for key in keys)
    counted = f"{a} x {b} / {c} x {d}"
    if prompts is None or group is None or batch is None or epochs is None:
        return None, counted
    return max(1.0, prompts * group / batch) * epochs, counted


def _objective(s: Settings) -> Objective | None:
    """The objective that equals the configured loss, None if it is not known."""
    kind, low_high = s.text("actor.policy_loss_type"), s.get("actor.eps_clip_low_high")
    edges = s.numbers("actor.eps_clip_low_high", 2) if low_high is not None else [s.number("actor.eps_clip")] * 2
    corrected, dual = s.flag("algo.advantage.is_correction_enable"), s.optional("actor.dual_clip", 0.0)
    bounds = None if edges is None else clip_of(*edges)
    if kind is None or bounds is None or corrected is None or dual is None:
        return None
    surrogate = partial(dual_clip, c=dual) if dual else clip
    if kind == "gspo":  # its correction takes the ratio against the sampler
        return Objective(
            name="gspo",
            bounds=bounds,
            surrogate=surrogate,
            ratio_level="sequence",
            aggregation="seq-mean-token-mean",
            anchor="rollout" if corrected else "old",
        )
    if kind != "ppo":
        raise ValueError(f"actor.policy_loss_type: {short(kind)} is none of OpenRLHF's: ppo, gspo")
    return Objective(name="ppo", bounds=bounds, surrogate=surrogate, correction=_icepop(s) if corrected else None)


def _icepop(s: Settings) -> IcePop | None:
    """The correction, where one of ours equals it: `tis` has a lower bound, and `seq-mask-tis` a mask of sequences."""
    if s.get("algo.advantage.is_correction_type") != "icepop":
        return None
    edges = s.numbers("algo.advantage.is_correction_threshold", 2)
    return None if edges is None else IcePop(edges[0], edges[1])


def _kl(s: Settings) -> tuple[float | None, str | None, str]:
    """Coefficient and term of the KL loss, and where they are from. Without `use_loss` the KL is part of the reward."""
    used, coefficient, kind = s.flag("algo.kl.use_loss"), s.number("algo.kl.init_coef"), s.text("algo.kl.estimator")
    if s.get("algo.kl.target") not in (None, UNKNOWN):
        s.unread.append("algo.kl.target moves the coefficient of the KL during the run; the first one is examined")
    if not used:
        return None if used is None else 0.0, "", ""
    return coefficient, kind if kind in (None, "k1", "k2", "k3") else "", f"algo.kl.estimator={kind}"


def _alone(s: Settings) -> tuple[Level, str] | None:
    estimator = s.text("algo.advantage.estimator")
    if estimator is None:
        return "note", "whether the advantages compare the completions of a prompt is not known"
    if estimator in _COMPARING:
        return _ALONE
    if estimator not in _NO_GROUPS:
        s.unread.append(f"advantage estimator {short(estimator)} is not known: whether it needs groups is not judged")
    return None


def _tokens(s: Settings) -> int:
    """Number of tokens in a micro-batch, 0 if it is not known."""
    dynamic = s.flag("train.dynamic_batch_enable")
    if dynamic is None:
        return 0
    if dynamic:
        return s.whole("train.max_tokens_per_gpu") or 0
    if s.has("generate_max_len") or s.has("prompt_max_len"):  # of older versions
        return 0
    return (s.whole("train.micro_batch_size") or 0) * (s.whole("data.max_len") or 0)
