"""Reads NeMo-RL's settings of GRPO, from YAML or from a script that starts `run_grpo.py`. Needs no NeMo-RL.

Facts are from NeMo-RL's public source at commit 7ea279abfbeb698b092856d0dab61e7cf39bc909 of 2026-08-22: the configurations in
`examples/configs`, the loss in `nemo_rl/algorithms/loss/loss_functions.py`, the estimators in
`nemo_rl/algorithms/advantage_estimator.py`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, cast

from bandpo._system.bounded import parse_yaml, read_regular
from bandpo.doctor.hosts import not_readable
from bandpo.doctor.launch import Dialect, given_by, note_unknown, parse_script, settings_of
from bandpo.doctor.settings import UNKNOWN, Settings, clip_of, flat
from bandpo.doctor.setup import NEMO_RL_KNOBS, Setup, short
from bandpo.doctor.shell import Script
from bandpo.monitoring.findings import Level
from bandpo.objective import Objective
from bandpo.surrogates import clip, detach, dual_clip
from bandpo.surrogates.corrections import TIS, IcePop

_GEN, _ADV = "policy.generation", "grpo.adv_estimator"
_LOSS_DEFAULTS: Mapping[str, Any] = {
    "loss_fn.ratio_clip_min": 0.2,
    "loss_fn.ratio_clip_max": 0.2,
    "loss_fn.ratio_clip_c": None,
    "loss_fn.disable_ppo_ratio": False,
    "loss_fn.use_cispo": False,
    "loss_fn.force_on_policy_ratio": False,
    "loss_fn.sequence_level_importance_ratios": False,
    "loss_fn.token_level_loss": True,
    "loss_fn.use_importance_sampling_correction": False,
    "loss_fn.truncated_importance_sampling_type": None,
    "loss_fn.truncated_importance_sampling_ratio": None,
    "loss_fn.truncated_importance_sampling_ratio_min": None,
    "loss_fn.reference_policy_kl_penalty": 0.01,
    "loss_fn.reference_policy_kl_type": "k3",
    "loss_fn.use_kl_in_reward": False,
    "loss_fn.use_on_policy_kl_approximation": False,
    f"{_ADV}.name": "grpo",
    f"{_ADV}.minus_baseline": True,
}
"""Defaults of NeMo-RL's classes: they hold for a configuration that extends no other one."""

DEFAULTS: Mapping[str, Any] = {
    **_LOSS_DEFAULTS,
    "grpo.num_prompts_per_step": 32,
    "grpo.num_generations_per_prompt": 16,
    "policy.train_global_batch_size": 512,
    "policy.train_micro_batch_size": 4,
    "policy.max_total_sequence_length": 512,
    "policy.megatron_cfg.use_fused_linear_logprobs": False,
    f"{_GEN}.backend": "vllm",
    f"{_GEN}.temperature": 1.0,
    f"{_GEN}.top_p": 1.0,
    f"{_GEN}.top_k": None,
}
"""The values of `examples/configs/grpo_math_1B.yaml`, which `run_grpo.py` takes by default."""

_8B: Mapping[str, Any] = {
    "grpo.num_prompts_per_step": 64,
    "grpo.num_generations_per_prompt": 32,
    "policy.train_micro_batch_size": 1,
    "policy.max_total_sequence_length": 4096,
}
_VLM: Mapping[str, Any] = {
    "grpo.num_prompts_per_step": 8,
    "policy.train_global_batch_size": 128,
    "policy.train_micro_batch_size": 1,
    "policy.max_total_sequence_length": 2048,
}
BASES: Mapping[str, Mapping[str, Any]] = {
    "grpo_math_1B": {},
    "grpo_math_1B_megatron": {},
    "grpo_math_1B_sglang": {f"{_GEN}.backend": "sglang"},
    "grpo_math_1B_trtllm": {f"{_GEN}.backend": "trtllm"},
    "grpo_multiple_datasets": {},
    "grpo_math_8B": _8B,
    "grpo_math_8B_megatron": _8B,
    "grpo_math_70B_megatron": _8B,
    "grpo_math_qwen30ba3b_megatron": _8B,
    "vlm_grpo_3B": _VLM,
    "vlm_grpo_3B_megatron": _VLM,
}
"""NeMo-RL's own configurations that others extend, and where they differ from `DEFAULTS`."""

DIALECT = Dialect(
    host="NeMo-RL",
    defaults=DEFAULTS,
    program=re.compile(r"(.*/)?run_(grpo|vlm_grpo)\w*\.py"),
    called="run_grpo.py",
    own=("grpo.", "loss_fn."),
    config_options=("--config",),
    configs=("grpo_math_1B", "grpo_math_1B_megatron", "grpo_multiple_datasets"),
    watched=("loss_fn.",),
    known=frozenset(
        {"loss_fn.kl_input_clamp_value", "loss_fn.kl_output_clamp_value", "loss_fn.positive_example_nll_weight"}
    ),
    needs_own=True,
)
"""How NeMo-RL's run_grpo.py is started."""

_ALONE: tuple[Level, str] = ("problem", "NeMo-RL gives the only completion of a prompt an advantage of 0")
_COMPARING, _NO_GROUPS = ("grpo", "gdpo"), ("raw_reward", "gae", "opd")
_DEEPEST, _MAX_BYTES = 5, 1 << 18  # configurations that extend each other, and bytes of one


def read_nemo_rl(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    tree: Mapping[Any, Any] | None = None,
    script: Script | None = None,
    vocabulary: int | None = None,
) -> Setup:
    """The settings in YAML of NeMo-RL's GRPO, or in a script that starts it.

    Args:
        path: The file. Configurations that it extends are read if they are in its folder or below.
        overrides: Settings `key=value`, which replace those of the file.
        tree: Content of a YAML file.
        script: The commands of a script, where it has been read already.
        vocabulary: Number of tokens in the model's vocabulary; None if it is not known.

    Raises:
        ValueError: If it belongs to another host or algorithm, cannot be read, or has a value that is not valid.
    """
    if tree is None:
        s = settings_of(path, script or parse_script(path), DIALECT, overrides)
    else:
        s = Settings(_LOSS_DEFAULTS)
        s.given = _extended(path, tree, s, 0)
        if any(key in tree for key in ("ppo", "distillation")) or any(key.startswith("ppo.") for key in s.given):
            raise not_readable(path, "NeMo-RL, but not its GRPO")
        if not any(key.startswith("grpo.") for key in s.given):
            missing = "; what it extends is not in its folder, and is not read" if not s.defaults else ""
            raise not_readable(path, f"NeMo-RL, and has no setting of GRPO{missing}")
        s.given |= given_by(overrides, DIALECT)
    note_unknown(s, DIALECT)
    steps, steps_from = _steps(s)
    kl_coef, kl, kl_from = _kl(s)
    top_p, top_k = _truncation(s)
    engine = s.text(f"{_GEN}.backend")
    return Setup(
        host="NeMo-RL",
        objective=_objective(s),
        ours=False,
        steps=steps,
        steps_from=steps_from,
        engine=engine or "the generation engine",
        corrected=s.flag("loss_fn.use_importance_sampling_correction"),
        old_is_rollout=False,
        temperature=s.number(f"{_GEN}.temperature"),
        top_p=top_p,
        top_k=top_k,
        group=s.whole("grpo.num_generations_per_prompt"),
        alone=_alone(s),
        kl_coef=kl_coef,
        kl=kl,
        kl_from=kl_from,
        tokens=(s.whole("policy.train_micro_batch_size") or 0) * (s.whole("policy.max_total_sequence_length") or 0),
        vocabulary=vocabulary,
        fused_head=_is_true(s, "policy.megatron_cfg.use_fused_linear_logprobs"),
        learning_rate=s.rate("policy.optimizer.kwargs.lr"),
        knobs=NEMO_RL_KNOBS,
        assumed=s.taken(),
        unread=s.lines(),
    )


def _is_true(s: Settings, key: str) -> bool:
    return bool(s.flag(key)) if s.has(key) or key in s.table else False


def _extended(path: Path, tree: Mapping[Any, Any], s: Settings, depth: int) -> dict[str, Any]:
    """The settings of a configuration with those of the ones that it extends."""
    own = flat({k: v for k, v in tree.items() if k != "defaults"})
    named: Any = tree.get("defaults") or []
    given: dict[str, Any] = {}
    for name in [named] if isinstance(named, str) else list(cast("list[Any]", named)):
        given |= _base(path, str(name), s, depth)
    replaced = tuple(key.removesuffix("_override_") for key in own if key.endswith("._override_"))
    return {k: UNKNOWN if replaced and k.startswith(replaced) else v for k, v in given.items()} | own


def _base(path: Path, name: str, s: Settings, depth: int) -> dict[str, Any]:
    """The settings of a configuration that another one extends."""
    file = path.parent / name
    data = _beside(file, path.parent) if depth < _DEEPEST and ".." not in PurePosixPath(name).parts else None
    if data is not None:
        found = parse_yaml(data, str(file))
        if not isinstance(found, dict):
            raise ValueError(f"{file} must hold keys and values, got {type(found).__name__}")
        return _extended(file, cast("dict[Any, Any]", found), s, depth + 1)
    known = BASES.get(PurePosixPath(name).stem)
    if known is not None:
        s.unread.append(f"defaults: {short(name)} is taken to be NeMo-RL's own file of that name")
        return {**DEFAULTS, **known}
    s.unread.append(f"defaults: {short(name)} is not read, and what it sets is not known")
    s.defaults = False
    return {}


def _beside(file: Path, folder: Path) -> bytes | None:
    """The content of a file in a folder or below, None where there is none or it leads out of the folder."""
    try:
        inside = file.suffix in (".yaml", ".yml") and file.resolve().is_relative_to(folder.resolve())
        return read_regular(file, _MAX_BYTES, follow=False) if inside else None
    except (OSError, RuntimeError, ValueError):  # RuntimeError: links in a loop; ValueError: no regular file
        return None


def _steps(s: Settings) -> tuple[float | None, str]:
    if s.flag("loss_fn.force_on_policy_ratio"):
        return 1.0, "force_on_policy_ratio=True sets every ratio to 1"
    keys = ("grpo.num_prompts_per_step", "grpo.num_generations_per_prompt", "policy.train_global_batch_size")
    prompts, group, batch = (s.positive(key) for key in keys)
    a, b, c = (s.label(key) for key in keys)
    counted = f"{a} x {b} / {c}"
    if prompts is None or group is None or batch is None:
        return None, counted
    return prompts * group / batch, counted


def _objective(s: Settings) -> Objective | None:
    """The objective that equals the configured loss, None if it is not known."""
    bounds = clip_of(s.number("loss_fn.ratio_clip_min"), s.number("loss_fn.ratio_clip_max"))
    dual = s.optional("loss_fn.ratio_clip_c", 0.0)
    flags = [s.flag(f"loss_fn.{name}") for name in ("disable_ppo_ratio", "use_cispo", "token_level_loss")]
    sequence = s.flag("loss_fn.sequence_level_importance_ratios")
    if bounds is None or dual is None or sequence is None or None in flags:
        return None
    without_ratio, cispo, per_token = flags
    if without_ratio:
        s.unread.append("disable_ppo_ratio=True: the loss has no ratio, and so no trust region")
        return None
    return Objective(
        name="cispo" if cispo else "gspo" if sequence else "clipped PG",
        bounds=bounds,
        surrogate=detach if cispo else partial(dual_clip, c=dual) if dual else clip,
        ratio_level="sequence" if sequence else "token",
        aggregation="token-mean" if per_token else "seq-mean-token-mean",
        correction=_correction(s, sequence=sequence),
    )


def _correction(s: Settings, *, sequence: bool) -> TIS | IcePop | None:
    """The correction, where one of ours equals it."""
    if not s.flag("loss_fn.use_importance_sampling_correction"):
        return None
    name = "loss_fn.truncated_importance_sampling"
    kind, low, cap = s.text(f"{name}_type"), s.optional(f"{name}_ratio_min", 0.0), s.optional(f"{name}_ratio", math.inf)
    if kind is None or low is None or cap is None:
        return None
    level = "sequence" if sequence else "token"
    if kind in ("", "tis") and low == 0:
        return TIS(cap, level)
    return IcePop(low, cap, level) if kind == "icepop" else None


def _kl(s: Settings) -> tuple[float | None, str | None, str]:
    """Coefficient and term of the KL loss, and where they are from.

    NeMo-RL multiplies the estimator by a weight of value 1 whose gradient is that of log π; or, with
    `use_on_policy_kl_approximation`, by the ratio against the sampler.
    """
    in_reward, at_sampler = s.flag("loss_fn.use_kl_in_reward"), s.flag("loss_fn.use_on_policy_kl_approximation")
    coefficient, kind = s.number("loss_fn.reference_policy_kl_penalty"), s.text("loss_fn.reference_policy_kl_type")
    if in_reward is None:
        return None, None, ""
    if in_reward:
        return 0.0, "", ""
    known = kind is not None and at_sampler is not None
    term = (f"{kind}-ratio" if at_sampler else f"{kind}-unbiased") if known and kind in ("k1", "k2", "k3") else ""
    source = f"reference_policy_kl_type={kind}, use_on_policy_kl_approximation={at_sampler}"
    return coefficient, term if known else None, source


def _truncation(s: Settings) -> tuple[float | None, int | None]:
    """Top-p and top-k as the rules see them: NeMo-RL's trainer filters its logits in the same way as its sampler."""
    top_p, top_k = s.number(f"{_GEN}.top_p"), s.optional(f"{_GEN}.top_k", 0.0)
    if (top_p is not None and top_p < 1) or (top_k is not None and top_k > 0):
        s.unread.append(
            f"top_p={top_p} and top_k={top_k}: NeMo-RL filters the trainer's logits in the same way, so p is right"
        )
    return None if top_p is None else 1.0, None if top_k is None else 0


def _alone(s: Settings) -> tuple[Level, str] | None:
    estimator, baseline = s.text(f"{_ADV}.name"), s.flag(f"{_ADV}.minus_baseline")
    if estimator is None or (estimator == "reinforce_plus_plus" and baseline is None):
        return "note", "whether the advantages compare the completions of a prompt is not known"
    if estimator in _COMPARING or (estimator == "reinforce_plus_plus" and baseline):
        return _ALONE
    if estimator not in (*_NO_GROUPS, "reinforce_plus_plus"):
        s.unread.append(f"adv_estimator.name={short(estimator)} is not known: whether it needs groups is not judged")
    return None
