"""What a run has left in its folder so far: read while it trains as well, and without trust in who made the folder."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from bandpo._system.bounded import parse_json, read_regular
from bandpo._system.files import read_jsonl, read_yaml, write_json
from bandpo._system.jsonl import as_number, lines, number_texts
from bandpo._system.secrets import redact
from bandpo.monitoring.log_rows import MAX_LINE_BYTES
from bandpo.plots.figures import Interval

EXPECTED = ("config.yaml", "config.resolved.yaml", "metrics.jsonl")
"""The files that every run of `bandpo train` has from its beginning."""
PARTS = "report.json"
"""The file with what the report shows and no other file of a run has."""
RESUMES = "resumes.jsonl"
"""The file that holds the settings that were changed at a resume, a row for each such resume."""
STAGES = ("before", "after")
"""The evaluations of a run: that of the model it began with, and that of the trained one."""

Changes = dict[str, tuple[Any, Any]]
"""Settings by name: the value before, and the value now."""

_MAX_JSON_BYTES = 1 << 24
_MAX_SAMPLE_BYTES = 1 << 26  # of a prompt with all of its samples
_TOKENS = ("p", "ratio", "clipped")


@dataclass(frozen=True)
class Parts:
    """What a run adds for its report: at its beginning title and band, at its end everything.

    Args:
        title: Title of the report.
        finished: Whether the run has trained to its end.
        notes: Messages that a reader must know before the numbers.
        told: What the doctor told while the run trained.
        band: The interval of the objective; None if it has none that depends on p alone.
        tokens: "p", "ratio" and "clipped" (0 or 1) of some of the last tokens.
        name: Name of the objective.
    """

    title: str
    finished: bool = False
    notes: Sequence[str] = ()
    told: Sequence[str] = ()
    band: Interval | None = None
    tokens: Mapping[str, Sequence[float]] = field(default_factory=dict[str, list[float]], hash=False)
    name: str = ""

    def write(self, folder: Path) -> None:
        """Write the file of a run. Tokens whose ratio is NaN or infinite, as in a run that diverged, are left out.

        Args:
            folder: Folder of the run.
        """
        kept = [row for row in zip(*self.tokens.values(), strict=True) if all(map(math.isfinite, row))]
        tokens = {name: [float(f"{row[i]:.5g}") for row in kept] for i, name in enumerate(self.tokens)}
        band = None if self.band is None else self.band._asdict()
        write_json(folder / PARTS, {**vars(self), "band": band, "tokens": tokens}, indent=None)

    @classmethod
    def read(cls, folder: Path) -> "Parts | None":
        """Read the file of a run; None where there is none, as in a folder of an older version.

        Args:
            folder: Folder of the run.

        Returns:
            The parts; None where there is no file.

        Raises:
            ValueError: If the file is not what `write` writes.
        """
        path = folder / PARTS
        if not path.exists() and not path.is_symlink():
            return None
        found = read_object(path)
        band, tokens = found.get("band"), found.get("tokens")
        tokens = cast("dict[str, Any]", tokens) if isinstance(tokens, dict) else {}
        columns = {name: _numbers(tokens.get(name, []), path) for name in _TOKENS}
        if len({len(values) for values in columns.values()}) > 1:
            raise ValueError(f"{path}: the tokens have columns of different lengths")
        return cls(
            title=str(found.get("title", folder.name)),
            finished=found.get("finished") is True,
            notes=_texts(found.get("notes")),
            told=_texts(found.get("told")),
            band=None if not isinstance(band, dict) else _interval(cast("dict[str, Any]", band), path),
            tokens=columns,
            name=str(found.get("name", "")),
        )


@dataclass(frozen=True)
class Scores:
    """The rewards of one evaluation: what `samples.jsonl` has of it, without the texts.

    Args:
        prompts: A checksum of each prompt, in their order.
        rewards: `(prompts, samples)`, NaN where a sample has no reward.
    """

    prompts: tuple[str, ...]
    rewards: NDArray[np.float64]

    def means(self) -> NDArray[np.float64]:
        """The mean reward of each prompt over its scored samples, `(prompts,)`; NaN where it has none."""
        known = ~np.isnan(self.rewards)
        with np.errstate(invalid="ignore"):
            return np.where(known, self.rewards, 0.0).sum(1) / known.sum(1)

    def solved(self) -> NDArray[np.float64]:
        """Whether some sample of each prompt is right, `(prompts,)`: pass@k for k samples; NaN if one has no reward."""
        return np.where(np.isnan(self.rewards).any(1), np.nan, (self.rewards >= 0.5).any(1))


@dataclass(frozen=True)
class Record:
    """A run, from the small files of its folder.

    Args:
        folder: The folder.
        given: What the user set, in the order of the file.
        resolved: Every setting.
        environment: Content of env.json; empty where there is none.
        evaluation: Content of evaluation.json; None for a run that has not come to its end.
        parts: What the run added for its report; None in a folder of an older version.
    """

    folder: Path
    given: dict[str, Any]
    resolved: dict[str, Any]
    environment: dict[str, Any]
    evaluation: dict[str, Any] | None
    parts: Parts | None

    @property
    def finished(self) -> bool:
        """Whether the run has trained to its end."""
        return self.evaluation is not None and (self.parts is None or self.parts.finished)

    @property
    def title(self) -> str:
        """Objective or method, data and seed."""
        if self.parts is not None:
            return self.parts.title
        method = self.resolved.get("method", "grpo")
        name = self.resolved.get("objective") if method == "grpo" else method
        data = self.resolved.get("task") or self.resolved.get("dataset")
        return f"{name} on {data}, seed {self.resolved.get('seed')}"

    @property
    def learns_preferences(self) -> bool:
        """Whether the method learns from pairs."""
        return self.resolved.get("method", "grpo") != "grpo"

    @property
    def unit(self) -> str:
        """What a row of metrics.jsonl is about: an optimiser "step", or a "round" of sampling and fitting."""
        return "round" if self.learns_preferences and self.resolved.get("pairs") is None else "step"

    @property
    def length(self) -> int | None:
        """The number of steps or rounds that were asked for; None where it is given in epochs."""
        asked = self.resolved.get("rounds" if self.unit == "round" else "max_steps")
        return asked if isinstance(asked, int) and asked > 0 else None

    def state(self, last: float | None) -> str | None:
        """Where an unfinished run is; None for a finished one.

        Args:
            last: The step of the last row of metrics.jsonl; None if there is none.
        """
        if self.finished:
            return None
        total = "" if self.length is None else f" of {self.length}"
        at = (
            f"no {self.unit} is logged yet" if last is None else f"{self.unit} {last:.0f}{total} is the last in its log"
        )
        return f"this run is not finished: {at}"

    def rows(self, broken: list[int] | None = None) -> Iterator[dict[str, Any]]:
        """The rows of metrics.jsonl with the times of timings.jsonl, read once; numbers are texts, see `number_texts`.

        Args:
            broken: Collects the numbers of lines that cannot be read, which are left out; None makes them an error.
        """
        timings = self.folder / "timings.jsonl"
        times = _rows(timings, broken) if timings.exists() else iter(())
        time = next(times, None)
        for row in _rows(self.folder / "metrics.jsonl", broken):
            step = as_number(row.get("step"))
            while time is not None and step is not None and (as_number(time.get("step")) or 0.0) < step:
                time = next(times, None)
            if time is not None and as_number(time.get("step")) == step and "step_time" in time:
                row["step_time"] = time["step_time"]
            yield row

    def scores(self) -> dict[str, Scores]:
        """The rewards of each evaluation that the run has made so far, by its stage.

        Raises:
            ValueError: If samples.jsonl is not what a run writes.
        """
        path = self.folder / "samples.jsonl"
        if not path.exists():
            return {}
        prompts: dict[str, list[str]] = {stage: [] for stage in STAGES}
        rewards: dict[str, list[list[float]]] = {stage: [] for stage in STAGES}
        for row in sample_rows(path):
            prompts[row["stage"]].append(hashlib.sha256(json.dumps(row["prompt"]).encode()).hexdigest()[:16])
            rewards[row["stage"]].append([math.nan if x is None else float(x) for x in row["rewards"]])
        found: dict[str, Scores] = {}
        for stage in STAGES:
            if len({len(row) for row in rewards[stage]}) > 1:
                raise ValueError(f"{path}: the prompts {stage} training have different numbers of samples")
            if rewards[stage]:
                found[stage] = Scores(tuple(prompts[stage]), np.array(rewards[stage], dtype=np.float64))
        return found


def read_record(folder: Path) -> Record:
    """Read the small files of a run. Nothing that they name is imported, loaded or followed.

    Args:
        folder: Folder of the run.

    Returns:
        What the files have.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it is no folder of a run, or a file of it cannot be read.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    lacking = [name for name in EXPECTED if not (folder / name).exists()]
    if lacking:
        raise ValueError(
            f"{folder} is no folder of a run: it has no {' and no '.join(lacking)}, which bandpo train writes when it begins"
        )
    given, resolved = (redact(read_yaml(folder / name, follow=False)) for name in EXPECTED[:2])
    environment = folder / "env.json"
    return Record(
        folder,
        given,
        resolved,
        redact(read_object(environment)) if environment.exists() else {},
        read_evaluation(folder),
        Parts.read(folder),
    )


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """The content of evaluation.json, checked; None where there is none yet.

    Args:
        folder: Folder of the run.

    Raises:
        ValueError: If it is not what a run writes.
    """
    path = folder / "evaluation.json"
    if not path.exists():
        return None
    found = read_object(path)
    for stage in STAGES:
        scores: object = found.get(stage)
        if not isinstance(scores, dict) or not all(
            x is None or _is_number(x) for x in cast("dict[str, Any]", scores).values()
        ):
            raise ValueError(f"{path}: {stage!r} must map names of scores to numbers")
    if (missing := [name for name in ("prompts", "samples", "temperature") if not _is_number(found.get(name))]) != []:
        raise ValueError(f"{path}: {missing[0]} must be a number")
    change: object = found.get("change", {})
    if not isinstance(change, dict) or not all(
        x is None or _is_number(x) for x in cast("dict[str, Any]", change).values()
    ):
        raise ValueError(f"{path}: 'change' must map value, low and high to numbers")
    return found


def sample_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a samples.jsonl, checked; an unfinished last line is left out.

    Args:
        path: The file.

    Raises:
        ValueError: If a row is not what a run writes; the message has its number.
    """
    for number, line in lines(path, follow=False, longest=_MAX_SAMPLE_BYTES):
        where = f"{path}, line {number}"
        row: object = parse_json(line, where)
        found = cast("dict[str, Any]", row) if isinstance(row, dict) else {}
        texts, rewards = found.get("completions"), found.get("rewards")
        if (
            found.get("stage") not in STAGES
            or not isinstance(found.get("prompt"), str | list)
            or not isinstance(texts, list)
            or not all(isinstance(x, str) for x in cast("list[Any]", texts))
            or not isinstance(rewards, list)
            or not all(x is None or _is_number(x) for x in cast("list[Any]", rewards))
        ):
            raise ValueError(
                f"{where}: a row has stage (before or after), prompt, completions (texts) and rewards (numbers)"
            )
        yield found


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of bounded size.

    Args:
        path: The file; a link is refused.

    Raises:
        ValueError: If it has no JSON object.
    """
    found: object = parse_json(read_regular(path, _MAX_JSON_BYTES, follow=False), str(path))
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return cast("dict[str, Any]", found)


def resumes(folder: Path) -> list[dict[str, Any]]:
    """What was changed at which step of a run: rows with `step` (None for a run in rounds) and `changed`.

    Args:
        folder: Folder of the run.

    Raises:
        ValueError: If the file has other rows.
    """
    path = folder / RESUMES
    rows = read_jsonl(path) if path.exists() else []
    for number, row in enumerate(rows, 1):
        changed: object = row.get("changed")
        pairs = list(cast("dict[str, Any]", changed).values()) if isinstance(changed, dict) else [None]
        if not isinstance(row.get("step"), int | None) or not all(
            isinstance(x, list) and len(cast("list[Any]", x)) == 2 for x in pairs
        ):
            raise ValueError(f"{path}, line {number}: a row has a step, and what was changed from what to what")
    return rows


def resume_lines(folder: Path) -> list[str]:
    """What was changed when a run was resumed, for its report, its configuration and the card of its model.

    Args:
        folder: Folder of the run.
    """
    lines: list[str] = []
    for row in resumes(folder):
        when = "After a resume" if row["step"] is None else f"From step {row['step']} on"
        changed = {name: (old, new) for name, (old, new) in row["changed"].items()}
        lines.append(f"{when} the run had other settings: {told(changed)}")
    return lines


def told(changed: Changes) -> str:
    """Changed settings for a message.

    Args:
        changed: The settings.

    Examples:
        >>> told({"max_steps": (4, 8)})
        'max_steps 4 -> 8'
    """
    return ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items())


def shown_scores(*evaluations: Mapping[str, float | None]) -> list[str]:
    """The names of the scores to show: without pass@1 where it is mean@k in all evaluations, as for rewards of 0 and 1.

    Args:
        evaluations: The scores of each by their names.

    Examples:
        >>> shown_scores({"mean@8": 0.25, "pass@1": 0.25, "pass@8": 0.5}, {"mean@8": 0.5, "pass@1": 0.5, "pass@8": 0.5})
        ['mean@8', 'pass@8']
        >>> shown_scores({"mean@8": 0.25, "pass@1": 0.5})
        ['mean@8', 'pass@1']
    """
    names = list(dict.fromkeys(name for scores in evaluations for name in scores))
    mean = next((name for name in names if name.startswith("mean@")), None)
    if mean is None or any(not _same(scores.get(mean), scores.get("pass@1")) for scores in evaluations):
        return names
    return [name for name in names if name != "pass@1"]


def _same(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)


def _rows(path: Path, broken: list[int] | None) -> Iterator[dict[str, Any]]:
    def left_out(number: int, _: bytes) -> dict[str, Any]:
        assert broken is not None
        broken.append(number)
        return {}

    return number_texts(path, follow=False, longest=MAX_LINE_BYTES, broken=None if broken is None else left_out)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _texts(value: object) -> list[str]:
    return [str(x) for x in cast("list[object]", value)] if isinstance(value, list) else []


def _numbers(values: object, path: Path) -> list[float]:
    if not isinstance(values, list) or not all(_is_number(x) and math.isfinite(x) for x in cast("list[Any]", values)):
        raise ValueError(f"{path}: the band and the tokens are lists of finite numbers")
    return [float(x) for x in cast("list[float]", values)]


def _interval(band: Mapping[str, Any], path: Path) -> Interval:
    found = Interval(*(_numbers(band.get(end), path) for end in Interval._fields))
    if not len(found.lower) == len(found.upper) == Interval.POINTS:
        raise ValueError(f"{path}: a band has {Interval.POINTS} lower and as many upper ends")
    return found
