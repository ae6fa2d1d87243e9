"""Reads prime-rl's settings from the TOML of its `rl` command. Needs no prime-rl.

Facts are from prime-rl's public source at commit 559b44772e471d1538537b8805cc77f3824a5e64 of 2026-08-21: the classes of
`packages/prime-rl-configs`, the losses in `src/prime_rl/trainer/rl/loss.py` and the algorithms in
`src/prime_rl/orchestrator/algo`. Its losses take the ratio against the sampler, and each batch is used for one optimiser step.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from bandpo._system.bounded import read_regular
from bandpo.bounds import Band
from bandpo.divergences import TV
from bandpo.doctor.hosts import not_readable
from bandpo.doctor.launch import Dialect, given_by, note_unknown
from bandpo.doctor.settings import UNKNOWN, Settings, flat
from bandpo.doctor.setup import PRIME_RL_KNOBS, Setup, short
from bandpo.monitoring.findings import Level
from bandpo.objective import Objective
from bandpo.surrogates import mask, two_sided

_ORCHESTRATOR, _LOSS = "orchestrator", "trainer.loss"
DEFAULTS: Mapping[str, Any] = {
    "seq_len": 2048,
    f"{_ORCHESTRATOR}.batch_size": 128,
    f"{_ORCHESTRATOR}.group_size": 1,
    f"{_ORCHESTRATOR}.max_off_policy_steps": 8,
    f"{_ORCHESTRATOR}.algo.type": "grpo",
    f"{_ORCHESTRATOR}.train.sampling.temperature": 1.0,
    f"{_LOSS}.type": "default",
    f"{_LOSS}.dppo_mask_low": 0.2,
    f"{_LOSS}.dppo_mask_high": 0.2,
    f"{_LOSS}.ipo_threshold": 0.1,
    f"{_LOSS}.kl_tau": 1e-3,
    f"{_LOSS}.import_path": "",
    "trainer.model.optimization_dtype": "float32",
    "trainer.model.fused_lm_head_token_chunk_size": 8192,
    "trainer.optim.lr": 1e-6,
}
"""prime-rl's defaults."""

DIALECT = Dialect(
    host="prime-rl",
    defaults=DEFAULTS,
    program=re.compile(r"rl"),
    called="rl",
    own=(f"{_ORCHESTRATOR}.",),
    names={f"{_ORCHESTRATOR}.rollouts_per_example": f"{_ORCHESTRATOR}.group_size"},
    watched=(f"{_LOSS}.",),
    known=frozenset({f"{_LOSS}.adv_tau", f"{_LOSS}.kwargs"}),
)
"""Names of prime-rl's settings. A command line of its own (`rl @ FILE --a.b VALUE`) is not read."""

_MAX_BYTES = 1 << 18
_ALONE: tuple[Level, str] = ("problem", "advantages compare the completions of a prompt: all are 0")
_COMPARING, _NO_GROUPS = ("grpo", "max_rl", "echo", "hierarchical_grpo"), ("rae",)
_WITHOUT_RL = {"opd": "distils a teacher", "opsd": "distils itself", "sft": "trains on a teacher's tokens"}
_OURS = "bandpo.integrations.prime_rl"


def read_toml(path: Path) -> dict[str, Any]:
    """Keys and values of a TOML file.

    Args:
        path: The file.

    Raises:
        ValueError: If it is no TOML, too large, no regular file, or this is Python 3.10, which cannot read TOML.
    """
    if sys.version_info < (3, 11):
        raise ValueError(f"{path}: reading TOML needs Python 3.11 or newer")
    import tomllib

    try:
        return tomllib.loads(read_regular(path, _MAX_BYTES, follow=False).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {str(error)[:200]}") from None


def read_prime_rl(
    path: Path, overrides: Sequence[str] = (), *, tree: Mapping[str, Any] | None = None, vocabulary: int | None = None
) -> Setup:
    """The settings in the TOML of prime-rl's `rl` command.

    Args:
        path: The file.
        overrides: Settings `key=value`, which replace those of the file.
        tree: Content of the file, where it has been read already.
        vocabulary: Number of tokens in the model's vocabulary; None if it is not known.

    Raises:
        ValueError: If it is another file, cannot be read, or has a value that is not valid.
    """
    tree = read_toml(path) if tree is None else tree
    if not isinstance(tree.get(_ORCHESTRATOR), Mapping):
        raise not_readable(
            path, "a part of prime-rl (the doctor reads the TOML of its rl command)" if _is_part(tree) else ""
        )
    s = Settings(DEFAULTS, {DIALECT.names.get(key, key): value for key, value in flat(tree).items()})
    s.given |= given_by(overrides, DIALECT)
    _look_at_sources(s)
    _look_at_older_names(s)
    note_unknown(s, DIALECT)
    lag = s.number(f"{_ORCHESTRATOR}.max_off_policy_steps")
    objective, ours = _objective(s)
    return Setup(
        host="prime-rl",
        objective=objective,
        ours=ours,
        steps=1.0,
        steps_from="prime-rl uses each batch once",
        lag=lag,
        engine="vLLM",
        corrected=False,
        old_is_rollout=True,
        temperature=s.number(f"{_ORCHESTRATOR}.train.sampling.temperature"),
        group=s.whole(f"{_ORCHESTRATOR}.group_size"),
        alone=_alone(s),
        tokens=s.whole("seq_len") or 0,
        vocabulary=vocabulary,
        fused_head=s.get("trainer.model.fused_lm_head_token_chunk_size") not in (UNKNOWN, "disabled"),
        weights=s.dtype("trainer.model.optimization_dtype"),
        learning_rate=s.rate("trainer.optim.lr"),
        knobs=PRIME_RL_KNOBS,
        assumed=s.taken(),
        unread=s.lines(),
    )


def _is_part(tree: Mapping[str, Any]) -> bool:
    """Whether a file is a configuration of prime-rl's trainer, orchestrator, inference or SFT alone."""
    return "model" in tree and any(
        key in tree for key in ("monitors", "optim", "train", "weight_broadcast", "deployment", "vllm")
    )


def _look_at_sources(s: Settings) -> None:
    """Settings that an environment of the run has for itself, in place of those of all."""
    sources: Any = s.given.get(f"{_ORCHESTRATOR}.train.source")
    if not isinstance(sources, list):
        return
    for key in ("group_size", "algo.type", "sampling.temperature"):
        whole = f"{_ORCHESTRATOR}.train.{key}" if key.startswith("sampling") else f"{_ORCHESTRATOR}.{key}"
        own = [
            flat(cast("Mapping[str, Any]", x)).get(key) for x in cast("list[Any]", sources) if isinstance(x, Mapping)
        ]
        if any(value is not None and value != s.get(whole) for value in own):
            s.given[whole] = UNKNOWN
            s.unread.append(f"train.source has a {key} of its own, which differs from that of the run")


def _look_at_older_names(s: Settings) -> None:
    """Where older versions had the sampler: what the run samples with is then not known."""
    temperature = f"{_ORCHESTRATOR}.train.sampling.temperature"
    older = sorted(key for key in s.given if key.startswith(f"{_ORCHESTRATOR}.sampling."))
    if older and temperature not in s.given:
        s.given[temperature] = UNKNOWN
        s.unread.append(
            f"{', '.join(short(key)[1:-1] for key in older[:4])}: no setting of this version; it has "
            f"{_ORCHESTRATOR}.train.sampling"
        )


def _objective(s: Settings) -> tuple[Objective | None, bool]:
    """The objective that equals the configured loss (None if it is not known), and whether bandpo computes it."""
    algorithm, kind = s.text(f"{_ORCHESTRATOR}.algo.type"), s.text(f"{_LOSS}.type")
    if algorithm in _WITHOUT_RL:
        s.unread.append(f"algo.type={algorithm} {_WITHOUT_RL[str(algorithm)]}: trainer.loss is not used")
        return None, False
    if algorithm is None or kind is None:
        return None, False
    if kind == "custom":
        return None, _is_ours(s)
    if kind not in ("default", "ipo"):
        raise ValueError(f"trainer.loss.type: {short(kind)} is none of prime-rl's: default, ipo, custom")
    tau = s.number(f"{_LOSS}.kl_tau")
    if tau is None or tau > 0:
        s.unread.append(
            f"kl_tau={'not known' if tau is None else f'{tau:g}'} adds (log π/μ)² for all tokens; no rule looks at it"
        )
    names = ("ipo_threshold",) if kind == "ipo" else ("dppo_mask_low", "dppo_mask_high")
    widths = [s.positive(f"{_LOSS}.{name}") for name in names]
    if None in widths:
        return None, False
    radius: Any = widths[0] if len(set(widths)) == 1 else tuple(widths)
    surrogate = two_sided if kind == "ipo" else mask
    name = "ipo" if kind == "ipo" else "default (dppo-tv)"
    return Objective(name=name, bounds=Band(TV, radius, max_ratio=None), surrogate=surrogate, anchor="rollout"), False


def _is_ours(s: Settings) -> bool:
    path = s.text(f"{_LOSS}.import_path") or ""
    if not path.startswith(_OURS):
        s.unread.append(f"trainer.loss.import_path={short(path)} is not imported: its region is not known")
    return path.startswith(_OURS)


def _alone(s: Settings) -> tuple[Level, str] | None:
    algorithm = s.text(f"{_ORCHESTRATOR}.algo.type")
    if algorithm is None:
        return "note", "whether the advantages compare the completions of a prompt is not known"
    if algorithm in _COMPARING:
        return _ALONE
    if algorithm not in (*_NO_GROUPS, *_WITHOUT_RL):
        s.unread.append(f"algo.type={short(algorithm)} is not known: whether it needs groups is not judged")
    return None
