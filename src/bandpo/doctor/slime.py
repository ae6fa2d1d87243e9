"""Reads slime's settings from a script that starts its train.py. Needs no slime.

Facts are from slime's public source at commit 624b824a898ab0ec1fcb4d373004c7f3852bf515 of 2026-08-21: the options of
`slime/utils/arguments.py`, the loss and the estimators of `slime/backends/megatron_utils/loss.py`, and the rewards of a
group in `slime/ray/rollout.py`.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bandpo.doctor.hosts import host_of_script, not_readable
from bandpo.doctor.launch import Dialect, note_unknown, parse_script, settings_of
from bandpo.doctor.settings import Settings, clip_of
from bandpo.doctor.setup import SLIME_KNOBS, Setup, short
from bandpo.doctor.shell import Script
from bandpo.monitoring.findings import Level
from bandpo.objective import Objective
from bandpo.surrogates import clip, detach, dual_clip
from bandpo.surrogates.corrections import TIS

DEFAULTS: Mapping[str, Any] = {
    "rollout-batch-size": None,
    "n-samples-per-prompt": 1,
    "global-batch-size": None,
    "num-steps-per-rollout": None,
    "micro-batch-size": 1,
    "use-dynamic-batch-size": False,
    "max-tokens-per-gpu": None,
    "rollout-max-response-len": None,
    "rollout-temperature": 1.0,
    "rollout-top-p": 1.0,
    "rollout-top-k": -1,
    "advantage-estimator": "grpo",
    "rewards-normalization": True,
    "eps-clip": 0.2,
    "eps-clip-high": None,
    "eps-clip-c": None,
    "loss-type": "policy_loss",
    "custom-loss-function-path": None,
    "calculate-per-token-loss": False,
    "use-kl-loss": False,
    "kl-loss-coef": 0.0,
    "kl-loss-type": "k1",
    "use-unbiased-kl": False,
    "use-rollout-logprobs": False,
    "use-tis": False,
    "tis-clip": 2.0,
    "tis-clip-low": 0.0,
    "custom-tis-function-path": None,
    "use-opsm": False,
    "lr": 1e-6,
}
"""slime's defaults; None for an option without one."""

# Options without a value. Those that this reader does not look at are here so that no word after them is taken as their value.
_PLAIN_FLAGS = (
    "colocate offload offload-train no-offload-train offload-rollout no-offload-rollout release-train "
    "update-weight-disk-keep-files recompute-loss-function freeze-indexer allgather-cp rollout-skip-special-tokens "
    "rollout-shuffle partial-rollout mask-offpolicy-in-partial-rollout keep-old-actor use-fault-tolerance "
    "disable-rollout-global-dataset apply-chat-template balance-data balance-by-flops skip-eval-before-train async-save "
    "no-save-optim disable-compute-advantages-and-returns normalize-advantages disable-grpo-std-normalization "
    "use-rollout-entropy get-mismatch-metrics reset-optimizer-states use-stateless-adam use-routing-replay "
    "use-rollout-routing-replay use-opd use-wandb disable-wandb-random-suffix wandb-always-use-train-step log-multi-turn "
    "log-passrate log-correct-samples use-tensorboard record-memory-history check-weight-update-equal use-distributed-post "
    "group-rm enable-mtp-training ci-test ci-disable-kl-checker debug-rollout-only debug-train-only "
    # Megatron's
    "sequence-parallel accumulate-allreduce-grads-in-fp32 attention-softmax-in-fp32 no-load-optim no-load-rng finetune bf16 "
    "fp16 swiglu disable-bias-linear group-query-attention untie-embeddings-and-output-weights qk-layernorm "
    "optimizer-cpu-offload overlap-cpu-optimizer-d2h-h2d use-precision-aware-optimizer use-distributed-optimizer "
    "no-check-for-nan"
)
_FLAGS: dict[str, tuple[str, Any]] = {
    **{name: (name, True) for name in _PLAIN_FLAGS.split()},
    **{name: (name, True) for name, value in DEFAULTS.items() if value is False},
    "disable-rewards-normalization": ("rewards-normalization", False),
}
_NOT_OF_THE_REGION = (
    "kl-coef",
    "loss-mask-type",
    "opsm-delta",
    "custom-config-path",
    "custom-advantage-function-path",
    "custom-rm-path",
    "custom-generate-function-path",
    "custom-eval-rollout-log-function-path",
    "custom-reward-post-process-path",
    "custom-rollout-log-function-path",
    "custom-model-provider-path",
)
DIALECT = Dialect(
    host="slime",
    defaults=DEFAULTS,
    program=re.compile(r"(.*/)?train(_async)?\.py"),
    called="train.py",
    own=("rollout-batch-size", "num-rollout", "hf-checkpoint", "n-samples-per-prompt"),
    options=True,
    flags=_FLAGS,
    watched=(
        "eps-",
        "kl-",
        "tis-",
        "custom-",
        "loss-",
        "use-tis",
        "use-kl",
        "use-opsm",
        "rollout-top",
        "rollout-temperature",
    ),
    known=frozenset(_NOT_OF_THE_REGION),
    needs_own=True,
)
"""How slime's train.py is started."""

_COMPARING = ("grpo", "gspo", "cispo", "reinforce_plus_plus_baseline")
_ALONE: tuple[Level, str] = (
    "problem",
    "slime takes the mean of a prompt's rewards away: the advantage of a single one is 0",
)
_NO_GROUPS = ("ppo", "reinforce_plus_plus")
_OURS = "bandpo.integrations.slime"
_KINDS = {"k1": "k1", "k2": "k2", "k3": "k3", "low_var_kl": "k3"}


def read_slime(
    path: Path, overrides: Sequence[str] = (), *, script: Script | None = None, vocabulary: int | None = None
) -> Setup:
    """The settings in a script that starts slime.

    Args:
        path: The script.
        overrides: Settings `option=value`, which replace those of the script.
        script: The commands of the script, where it has been read already.
        vocabulary: Number of tokens in the model's vocabulary; None if it is not known.

    Raises:
        ValueError: If it belongs to another host, cannot be read, has a value that is not valid, or is no RL run.
    """
    script = script or parse_script(path)
    if host_of_script(script) == "miles":  # a fork of slime, whose options and defaults are not checked here
        raise not_readable(path, "miles")
    s = settings_of(path, script, DIALECT, overrides)
    if s.get("loss-type") == "sft_loss":
        raise ValueError(f"{path}: this is slime with loss-type sft_loss, which has no trust region")
    note_unknown(s, DIALECT)
    if s.has("custom-config-path"):
        s.unread.append(
            "custom-config-path: that file may replace any option; it is taken to replace none that is read here"
        )
    objective, ours = _objective(s)
    steps, steps_from = _steps(s)
    kl_coef, kl, kl_from = _kl(s)
    top_k = s.whole("rollout-top-k")
    return Setup(
        host="slime",
        objective=objective,
        ours=ours,
        steps=steps,
        steps_from=steps_from,
        lag=None if "async" in s.program else 0.0,
        engine="SGLang",
        corrected=_corrected(s),
        old_is_rollout=s.flag("use-rollout-logprobs"),
        temperature=s.number("rollout-temperature"),
        top_p=_top_p(s),
        top_k=None if top_k is None else max(0, top_k),
        group=s.whole("n-samples-per-prompt"),
        alone=_alone(s),
        kl_coef=kl_coef,
        kl=kl,
        kl_from=kl_from,
        tokens=_tokens(s),
        vocabulary=vocabulary,
        learning_rate=s.rate("lr"),
        knobs=SLIME_KNOBS,
        assumed=s.taken(),
        unread=s.lines(),
    )


def _steps(s: Settings) -> tuple[float | None, str]:
    given = s.get("num-steps-per-rollout")
    if given is not None:
        return s.positive("num-steps-per-rollout"), s.label("num-steps-per-rollout")
    keys = ("rollout-batch-size", "n-samples-per-prompt", "global-batch-size")
    missing = [key for key in keys if s.get(key) is None]
    if missing:
        return None, f"{' and '.join(missing)} not set"
    prompts, group, batch = (s.positive(key) for key in keys)
    a, b, c = (s.label(key) for key in keys)
    counted = f"{a} x {b} / {c}"
    if prompts is None or group is None or batch is None:
        return None, counted
    return prompts * group / batch, counted


def _objective(s: Settings) -> tuple[Objective | None, bool]:
    """The objective that equals the configured loss (None if it is not known), and whether bandpo computes it."""
    kind, path = s.text("loss-type"), s.text("custom-loss-function-path")
    if kind is None:
        return None, False
    if kind != "policy_loss":
        ours = path is not None and path.startswith(_OURS)
        s.unread.append(
            "bandpo computes the loss, and its objective is in the file of custom-config-path"
            if ours
            else f"loss-type={short(kind)}: the loss of {short(path)} is not known here"
        )
        return None, ours
    estimator, per_token = s.text("advantage-estimator"), s.flag("calculate-per-token-loss")
    low, high, dual = s.number("eps-clip"), s.optional("eps-clip-high"), s.optional("eps-clip-c", 0.0)
    bounds = clip_of(low, low if high != high else high)
    at_sampler = s.flag("use-rollout-logprobs")
    if estimator is None or per_token is None or bounds is None or dual is None or at_sampler is None:
        return None, False
    surrogate = detach if estimator == "cispo" else partial(dual_clip, c=dual) if dual else clip
    return Objective(
        name=estimator,
        bounds=bounds,
        surrogate=surrogate,
        ratio_level="sequence" if estimator == "gspo" else "token",
        aggregation="token-mean" if per_token else "seq-mean-token-mean",
        anchor="rollout" if at_sampler else "old",
        correction=None if at_sampler else _tis(s),
    ), False


def _tis(s: Settings) -> TIS | None:
    """The correction, where one of ours equals it: slime's may have a lower bound, or be a function of the user's."""
    if not s.flag("use-tis") or s.get("custom-tis-function-path") is not None:
        return None
    low, cap = s.number("tis-clip-low"), s.number("tis-clip")
    return TIS(cap) if low == 0 and cap is not None and cap > 0 else None


def _corrected(s: Settings) -> bool | None:
    if s.flag("use-opsm"):
        s.unread.append(
            "use-opsm masks sequences that are far from the policy before the update; no rule looks at that"
        )
    return s.flag("use-tis")


def _top_p(s: Settings) -> float | None:
    """The nucleus as the rules see it: slime's trainer takes its log-probs among the tokens that the sampler kept."""
    found = s.number("rollout-top-p")
    if found is None or found == 1:
        return found
    s.unread.append(
        f"rollout-top-p={found:g}: slime takes log-probs among the tokens that the sampler kept, so p is right"
    )
    return 1.0


def _kl(s: Settings) -> tuple[float | None, str | None, str]:
    """Coefficient and term of the KL loss, and where they are from."""
    used, unbiased = s.flag("use-kl-loss"), s.flag("use-unbiased-kl")
    if not used:
        return None if used is None else 0.0, "", ""
    coefficient, kind = s.number("kl-loss-coef"), s.text("kl-loss-type")
    term = None if kind is None or unbiased is None else _KINDS.get(kind, "")
    return (
        coefficient,
        f"{term}-ratio" if term and unbiased else term,
        f"kl-loss-type={kind}, use-unbiased-kl={unbiased}",
    )


def _alone(s: Settings) -> tuple[Level, str] | None:
    estimator, compared = s.text("advantage-estimator"), s.flag("rewards-normalization")
    if estimator is None or compared is None:
        return "note", "whether the advantages compare the completions of a prompt is not known"
    if s.has("custom-advantage-function-path"):
        s.unread.append("custom-advantage-function-path: whether it needs groups is not judged")
        return None
    if estimator in _COMPARING:
        return _ALONE if compared else None
    if estimator not in _NO_GROUPS:
        s.unread.append(f"advantage-estimator={short(estimator)} is not known: whether it needs groups is not judged")
    return None


def _tokens(s: Settings) -> int:
    """Number of tokens in a micro-batch, 0 if it is not known."""
    dynamic = s.flag("use-dynamic-batch-size")
    if dynamic is None:
        return 0
    keys = ("max-tokens-per-gpu",) if dynamic else ("micro-batch-size", "rollout-max-response-len")
    product = 1
    for key in keys:
        product *= 0 if s.get(key) is None else s.whole(key) or 0
    return product
