"""The rules of a log while the run goes: each finding is told once, in memory that does not grow with the run."""

import math
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from typing import Any

from bandpo._system.jsonl import as_number
from bandpo.monitoring.catalog import RULES as CATALOGUE
from bandpo.monitoring.findings import Finding, Level
from bandpo.monitoring.series import NOTHING, Running, Stats, Symptomatic
from bandpo.monitoring.symptoms import NAMES, RANKS, RULES, is_broken

_AT_ONCE = frozenset({"nonfinite"})
"""Rules whose findings are certain from one row on."""
_TOLD: tuple[Level, ...] = ("warning", "problem")
_MOST_BROKEN = 10_000  # names of metrics that are NaN or infinite somewhere; more are not counted


@dataclass(frozen=True)
class Told:
    """A finding and the step at which it was told.

    Args:
        step: The step; the number of the row where the metrics have none.
        finding: The finding.
    """

    step: int
    finding: Finding

    def __str__(self) -> str:
        f = self.finding
        return f"step {self.step}, doctor: {f.rule}: {f.seen}. Why: {f.cause}. Set: {f.knob}"


class _RunSoFar(Symptomatic):
    """The series of a run so far, by the most preferred of their names that the run has."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[str, int, Running]] = {}
        self._lost: dict[str, int] = {}
        self._stats: dict[tuple[str, bool], Stats] = {}
        self.recent = False
        """Whether the ends of the series are taken over the newest values only, to notice a change early."""

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of a step.

        Args:
            metrics: Metrics by name.
        """
        self._stats.clear()
        for name, value in metrics.items():
            number = as_metric(value)
            if number is None:
                continue
            if not math.isfinite(number) and (name in self._lost or len(self._lost) < _MOST_BROKEN):
                self._lost[name] = self._lost.get(name, 0) + 1
            if name not in RANKS:
                continue
            what, rank = RANKS[name]
            if what not in self._found or rank < self._found[what][1]:
                self._found[what] = (name, rank, Running())
            if rank == self._found[what][1]:
                self._found[what][2].add(number)

    def others_lost(self) -> Mapping[str, int]:
        in_use = {name for name, _, _ in self._found.values()}
        return {name: count for name, count in self._lost.items() if name not in in_use}

    def known(self) -> Set[str]:
        return self._found.keys()

    def series(self, what: str) -> tuple[str, Stats]:
        if what not in self._found:
            return NAMES[what][0], NOTHING
        name, _, values = self._found[what]
        if (what, self.recent) not in self._stats:
            self._stats[what, self.recent] = values.stats(recent=self.recent)
        return name, self._stats[what, self.recent]

    def lost(self, what: str) -> tuple[int, int]:
        values = self._found[what][2]
        return values.lost, values.lost + values.count


class Doctor:
    """Watches a run by its metrics, and tells each warning and problem once.

    A finding is told when it was seen in three rows in succession, from the row `patience` on; a value that is NaN or infinite
    is told at once. A rule speaks again only if its finding becomes worse: a problem after a warning.

    The memory is bounded: of each metric some sums and at most 2048 sums of blocks are kept. `findings` gives what
    `examine_log` gives for the same rows. For more than 2048 rows the means over the first and the last tenth may differ from
    those by the part of one block, less than a hundredth of the tenth's values.

    Args:
        patience: Rows before the first finding.
        stop: What `should_stop` reacts to: true for each problem, or the names of rules, whose warnings count too.

    Raises:
        ValueError: If `patience` is below 1 or a name is that of no rule.

    Examples:
        >>> doctor = Doctor()
        >>> for step in range(1, 41):
        ...     for told in doctor.observe({"entropy": 0.9**step, "clip_ratio/region_mean": 0.01}, step=step):
        ...         print(told.step, told.finding.rule, told.finding.level)
        21 entropy warning
    """

    def __init__(self, *, patience: int = 20, stop: bool | Collection[str] = False) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1 row, got {patience}")
        self.stop = checked_stop(stop)
        self.patience = patience
        self.rows = 0
        """How many rows were observed."""
        self.told: list[Told] = []
        """What was told so far."""
        self._run = _RunSoFar()
        self._held: dict[tuple[str, Level], int] = {}

    def observe(self, metrics: Mapping[str, Any], step: int | None = None) -> list[Told]:
        """Take the metrics of a step.

        Args:
            metrics: Metrics by the names of TRL, verl or bandpo; others are only looked at for NaN. Numbers, or tensors of one.
            step: The step; by default `metrics["step"]`, else the number of the row.

        Returns:
            The findings that are new.
        """
        self.rows += 1
        self._run.add(metrics)
        at = as_metric(metrics.get("step")) if step is None else step
        at = self.rows if at is None or not math.isfinite(at) else int(at)
        self._run.recent = True
        found = [f for rule in RULES if (f := rule(self._run)) is not None and f.level in _TOLD]
        self._run.recent = False
        self._held = {(f.rule, f.level): self._held.get((f.rule, f.level), 0) + 1 for f in found}
        new = [Told(at, f) for f in found if self._is_due(f)]
        self.told += new
        return new

    def findings(self) -> list[Finding]:
        """What the rules find in the run so far, as `examine_log` does; empty if it had none of the metrics."""
        if not self._run.known() and not self._run.others_lost():
            return []
        return [f for rule in RULES if (f := rule(self._run)) is not None]

    @property
    def should_stop(self) -> bool:
        """Whether something was told for which `stop` asks to end the run."""
        if isinstance(self.stop, bool):
            return self.stop and any(t.finding.level == "problem" for t in self.told)
        return any(t.finding.rule in self.stop for t in self.told)

    def _is_due(self, finding: Finding) -> bool:
        levels = {told.finding.level for told in self.told if told.finding.rule == finding.rule}
        if finding.level in levels or "problem" in levels:
            return False
        if finding.rule in _AT_ONCE:
            return True
        return self.rows >= self.patience and self._held[finding.rule, finding.level] >= min(3, self.patience)


def checked_stop(stop: bool | Collection[str]) -> bool | frozenset[str]:
    """The `stop` of a `Doctor`, checked.

    Args:
        stop: True, false, or names of rules.

    Raises:
        ValueError: If a name is that of no rule of a log.
    """
    if isinstance(stop, bool):
        return stop
    names = frozenset({stop} if isinstance(stop, str) else stop)
    of_logs = [name for name, rule in CATALOGUE.items() if "log" in rule.reads]
    for name in sorted(names):
        if name not in of_logs:
            raise ValueError(f"stop: {name!r} is no rule of a log; choose True, or of {', '.join(of_logs)}")
    return names


def as_metric(value: object) -> float | None:
    """A metric as a number: of a number, a tensor or array of one value, or the text of NaN or infinity; None for others.

    Args:
        value: The value in a row of metrics.

    Examples:
        >>> import torch
        >>> as_metric(2), as_metric(torch.tensor(0.5)), as_metric("NaN"), as_metric(torch.zeros(2)), as_metric("high")
        (2.0, 0.5, nan, None, None)
    """
    if isinstance(value, str):
        return float(value) if is_broken(value) else None
    item = getattr(value, "item", None)
    if callable(item):
        try:
            value = item()
        except (ValueError, RuntimeError, TypeError):  # several values
            return None
    return as_number(value)
