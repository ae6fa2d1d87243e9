"""Which runs are the same but for their seed, which settings of the others differ, and whether their scores can be compared."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from bandpo.train.record import Record, Scores

SEED = frozenset({"seed", "data_seed"})
"""The settings in which the runs of a group may differ."""
NO_EFFECT = frozenset(
    (
        *(
            "output_dir",
            "run_name",
            "logging_dir",
            "resume_from_checkpoint",
            "dry_run",
            "report_to",
            "project",
            "threads",
        ),
        *("save_steps", "save_strategy", "save_total_limit", "logging_steps", "logging_strategy", "logging_first_step"),
        *("hub_model_id", "push_to_hub", "hub_strategy", "hub_private_repo", "trackio_space_id", "disable_tqdm"),
        *("reward_workers", "reward_timeout", "per_device_eval_batch_size", "log_level", "log_completions"),
    )
)
"""Settings that change where a run writes and how often it logs, and not what it learns."""
KINDS: Mapping[str, tuple[str, ...]] = {
    "data": (
        *("task", "shots", "dataset", "dataset_config", "dataset_split", "pairs", "prompt_column", "answer_column"),
        *("system_prompt", "bad_rows", "chat_template_kwargs"),
    ),
    "reward": ("reward", "reward_weights", "reward_errors"),
    "model": ("model", "warm_up_steps", "model_init_kwargs"),
    "evaluation": (
        *("eval_dataset", "eval_dataset_split", "eval_prompts", "eval_samples", "eval_temperature"),
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_completion_length"),
    ),
}
"""Settings without which scores cannot be compared, by what they are about."""
_SENTENCES = {
    "data": "the runs are on different data",
    "reward": "the runs have different rewards",
    "model": "the runs begin with different models",
    "evaluation": "the runs are evaluated or sampled differently",
}
OTHER_METHOD = "no option of every method"
"""The kind of a setting that some of the groups do not have at all."""
_ABSENT = "–"
_LONGEST_LABEL = 48
_MOST_SHOWN = 200


class Setting(NamedTuple):
    """A setting that differs between groups of runs.

    Args:
        name: The name.
        kind: What it is about: data, reward, model, evaluation, training, seed, machine, "no effect", or `OTHER_METHOD`.
        values: The value in each group, by its label; where the runs of a group differ, all of theirs.
    """

    name: str
    kind: str
    values: dict[str, str]


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only.

    Args:
        label: What sets them apart from the other groups.
        records: The runs.
    """

    label: str
    records: tuple[Record, ...]

    @property
    def seeds(self) -> tuple[Any, ...]:
        """The seed of each run."""
        return tuple(record.resolved.get("seed") for record in self.records)


def grouped(records: Sequence[Record]) -> list[Group]:
    """The runs in groups that differ in the seed only, in the order of their first runs.

    A second run with the same seed begins a group of its own: it would not be another draw.

    Args:
        records: The runs.
    """
    groups: list[list[Record]] = []
    for record in records:
        key, seed = _decisive(record), record.resolved.get("seed")
        fits = (g for g in groups if _decisive(g[0]) == key and seed not in [r.resolved.get("seed") for r in g])
        found = next(fits, None)
        if found is None:
            groups.append([record])
        else:
            found.append(record)
    labels = _labels(groups)
    return [Group(label, tuple(group)) for label, group in zip(labels, groups, strict=True)]


def differing(groups: Sequence[Group]) -> list[Setting]:
    """The settings that differ between the groups, with defaults, and what differs of the machine.

    The most important come first, and of a kind those that a user has set.

    Args:
        groups: The groups.
    """
    columns = {g.label: [_flat(record) for record in g.records] for g in groups}
    names = dict.fromkeys(name for rows in columns.values() for row in rows for name in row)
    found: list[Setting] = []
    for name in names:
        values = {label: _joined(row.get(name, _ABSENT) for row in rows) for label, rows in columns.items()}
        if len(set(values.values())) > 1:
            kind = OTHER_METHOD if _ABSENT in values.values() and _kind(name) != "machine" else _kind(name)
            found.append(Setting(name, kind, values))
    order = [*KINDS, "training", "seed", "machine", "no effect", OTHER_METHOD]
    given = {str(name) for g in groups for record in g.records for name in record.given}
    return sorted(found, key=lambda s: (order.index(s.kind), s.name not in given))


def warnings(
    groups: Sequence[Group], settings: Sequence[Setting], scores: Mapping[Path, Mapping[str, Scores]]
) -> list[str]:
    """Why the scores of the runs cannot be compared, or only in part, in sentences; empty if they can.

    Args:
        groups: The groups.
        settings: The settings that differ.
        scores: The evaluations of each run, by its folder.
    """
    lines: list[str] = []
    for kind, sentence in _SENTENCES.items():
        names = [s.name for s in settings if s.kind == kind]
        if names:
            lines.append(f"{sentence} ({', '.join(names)})")
    if len({record.unit for g in groups for record in g.records}) > 1:
        lines.append("some runs count optimiser steps and some count rounds, so their curves have different axes")
    before = [found["before"] for found in scores.values() if "before" in found]
    if len({frozenset(one.prompts) for one in before}) > 1:
        lines.append("the held-out prompts differ, so scores are paired over the common ones")
    if len({one.rewards.shape[1] for one in before}) > 1:
        lines.append("the runs have different numbers of samples for each held-out prompt")
    seeds = {frozenset(map(str, g.seeds)) for g in groups}
    if len(seeds) > 1:
        lines.append(f"the groups have different seeds ({'; '.join(f'{g.label}: {_listed(g.seeds)}' for g in groups)})")
    elif all(len(g.records) == 1 for g in groups) and len(groups) > 1:
        lines.append("each has one seed, so a difference may be that of two seeds")
    return lines


def text_of(value: Any) -> str:
    """A setting as text.

    Args:
        value: The value in config.resolved.yaml.

    Examples:
        >>> text_of(None), text_of("a"), text_of([1, 2])
        ('null', 'a', '[1, 2]')
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


def _decisive(record: Record) -> str:
    """The settings that the runs of a group share, as one text."""
    kept = {k: v for k, v in record.resolved.items() if k not in SEED | NO_EFFECT}
    return json.dumps(kept, sort_keys=True, default=str)


def _flat(record: Record) -> dict[str, str]:
    """The settings of a run and its machine, by name."""
    found = {str(name): text_of(value) for name, value in record.resolved.items() if name not in ("output_dir",)}
    versions: Any = record.environment.get("versions")
    packages = cast("dict[str, Any]", versions) if isinstance(versions, dict) else {}
    more = {f"version of {name}": text_of(value) for name, value in packages.items()}
    return (
        found
        | more
        | {f"machine: {k}": text_of(record.environment.get(k)) for k in ("device", "processes", "platform")}
    )


def _kind(name: str) -> str:
    kind = next((kind for kind, names in KINDS.items() if name in names), None)
    if kind is not None:
        return kind
    if name.startswith(("version of ", "machine: ")):
        return "machine"
    return "seed" if name in SEED else "no effect" if name in NO_EFFECT else "training"


def _labels(groups: Sequence[Sequence[Record]]) -> list[str]:
    """What sets the groups apart: the settings that differ, the objective by its name alone; else the folders."""
    rows = [{k: text_of(v) for k, v in g[0].resolved.items() if k not in SEED | NO_EFFECT} for g in groups]
    names = [name for name in dict.fromkeys(k for row in rows for k in row) if len({row.get(name) for row in rows}) > 1]
    named = len(groups) == 1 or not {"method", "objective"}.isdisjoint(names)
    found: list[str] = []
    for group, row in zip(groups, rows, strict=True):
        method = row.get("method", "grpo")
        parts = [row.get("objective", "?") if method == "grpo" else method] if named else []
        # A preference method has other options than a policy-gradient one: their names alone say enough.
        rest = [] if "method" in names else [n for n in names if n not in ("method", "objective")]
        parts += [f"{name}={row.get(name, _ABSENT)}" for name in rest]
        label = ", ".join(parts)
        found.append(label if label and len(label) <= _LONGEST_LABEL else group[0].folder.name)
    names = [g[0].folder.name for g in groups]
    places = [name if names.count(name) == 1 else str(g[0].folder) for name, g in zip(names, groups, strict=True)]
    return [
        f"{label} ({place})" if found.count(label) > 1 else label for label, place in zip(found, places, strict=True)
    ]


def _joined(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(text_of(value) for value in values)
