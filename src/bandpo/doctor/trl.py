"""Reads a YAML of TRL's `GRPOConfig`, or of `bandpo train`. Needs TRL, which checks what is in it."""

import difflib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments

from bandpo.bounds import Clip
from bandpo.composition import Objective
from bandpo.doctor.setup import TRL_KNOBS, Host, Setup
from bandpo.integrations._trl_config import AGGREGATION_OF, BandGRPOConfig
from bandpo.objectives import OBJECTIVES

# What only a GPU machine accepts, and what needs its own launcher: not what the region depends on.
_ELSEWHERE = (
    "bf16",
    "fp16",
    "tf32",
    "use_cpu",
    "deepspeed",
    "fsdp",
    "fsdp_config",
    "torch_compile",
    "report_to",
    "push_to_hub",
)
_ZOO = {"cispo": "cispo", "sapo": "sapo", "gmpo": "gmpo"}


def read_trl(
    given: Mapping[str, Any],
    *,
    other_keys: frozenset[str] = frozenset(),
    processes: int = 1,
    vocabulary: int | None = None,
) -> Setup:
    """The settings in a TRL configuration; with an `objective` (or another option of ours) it is one of `BandGRPOConfig`.

    Args:
        given: Keys and values.
        other_keys: Known keys of whoever reads the file besides TRL.
        processes: That will train.
        vocabulary: Of the model; None looks into the model's folder.

    Raises:
        ValueError: If a key is unknown, or TRL or bandpo refuses a value.
    """
    own = {f.name for f in fields(BandGRPOConfig)} - {f.name for f in fields(GRPOConfig)}
    ours = bool((own | (other_keys - _script_keys())) & set(given))
    cls = BandGRPOConfig if ours else GRPOConfig
    names = {f.name for f in fields(cls)}
    for key in given:
        if key not in names | other_keys | _script_keys():
            near = difflib.get_close_matches(str(key), sorted(names | other_keys), n=1, cutoff=0.5)
            raise ValueError(f"unknown key {key!r}{f'; did you mean {near[0]!r}?' if near else ''}")
    kept = {k: v for k, v in given.items() if k in names and k not in _ELSEWHERE}
    sized = type(cls.__name__, (cls,), {"world_size": property(lambda _: processes)})
    args = sized(**{"output_dir": "doctor", **kept}, use_cpu=True, bf16=False, report_to="none")
    objective = args.resolve() if ours else _objective(args)
    if vocabulary is None:
        vocabulary, unread = _vocabulary(given)
    else:
        unread = ()
    return _setup(args, objective, ours, "bandpo train" if ours and other_keys else "TRL", vocabulary, unread)


def _setup(
    args: Any, objective: Objective, ours: bool, host: Host, vocabulary: int | None, unread: tuple[str, ...]
) -> Setup:
    accumulation, reuse = args.gradient_accumulation_steps, args.steps_per_generation * args.num_iterations
    version = tuple(int(x) for x in importlib.metadata.version("trl").split(".")[:2])
    return Setup(
        host=host, objective=objective, ours=ours, bypassed=_bypassed(args, version), steps=max(1.0, reuse / accumulation),
        steps_from=f"steps_per_generation={args.steps_per_generation} x num_iterations={args.num_iterations} / "
        f"gradient_accumulation_steps={accumulation}",
        engine="vLLM" if args.use_vllm else "", corrected=args.use_vllm and args.vllm_importance_sampling_correction,
        temperature=args.temperature, top_p=args.top_p, top_k=args.top_k or 0, min_p=args.min_p or 0.0,
        group=args.num_generations, tokens=args.per_device_train_batch_size * args.max_completion_length,
        vocabulary=vocabulary, fused_head=version >= (1, 16),
        knobs=TRL_KNOBS | {"fused head": "TRL 1.16 or newer"}, unread=unread,
    )  # fmt: skip


def _bypassed(args: Any, version: tuple[int, ...]) -> str:
    if not GRPOTrainer._compute_loss.__module__.startswith("trl."):
        return f"GRPOTrainer._compute_loss is patched by {GRPOTrainer._compute_loss.__module__} (unsloth?)"
    if args.use_liger_kernel and version < (1, 16):
        return "use_liger_kernel=True: before TRL 1.16 its fused loss takes the place of GRPOTrainer's"
    return ""


def _objective(args: Any) -> Objective:
    """TRL's own loss as the objective that it equals."""
    level = "sequence" if args.importance_sampling_level == "sequence" else "token"
    if args.loss_type in _ZOO:
        return OBJECTIVES[_ZOO[args.loss_type]]
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    known = args.loss_type in AGGREGATION_OF
    return Objective(
        bounds=Clip(args.epsilon, high), ratio_level=level, aggregation=AGGREGATION_OF.get(args.loss_type, "token-mean"),
        name=args.loss_type if known else f"{args.loss_type} (unknown here: shown as a clip)",
    )  # fmt: skip


def _vocabulary(given: Mapping[str, Any]) -> tuple[int | None, tuple[str, ...]]:
    name = given.get("model") or given.get("model_name_or_path")
    if not name:
        return None, ()
    try:
        config = AutoConfig.from_pretrained(str(name), local_files_only=not Path(str(name)).is_dir())
        return config.get_text_config().vocab_size, ()
    except (OSError, ValueError, AttributeError):
        return None, (f"the vocabulary of {name} is not known here; --vocabulary N shows the memory of its logits",)


def _script_keys() -> frozenset[str]:
    return frozenset(f.name for cls in (ScriptArguments, ModelConfig) for f in fields(cls))
