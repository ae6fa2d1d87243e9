"""The result of a rule of the doctor."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Level = Literal["ok", "note", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """The result of one rule.

    Args:
        rule: Name of the rule, the same in every output.
        level: ok (checked and fine), note (worth knowing), warning (often a mistake), problem (the run does not do what its
            configuration says).
        seen: What was found, with numbers.
        cause: Why this is so.
        knob: What to set, in the names of the host.
        details: Lines of a table, where there is one.
        numbers: What was measured, for programs.

    Raises:
        ValueError: If the level is none of these.

    Examples:
        >>> Finding("inert", "problem", "one step for each rollout", knob="num_iterations=2").level
        'problem'
    """

    rule: str
    level: Level
    seen: str
    cause: str = ""
    knob: str = ""
    details: tuple[str, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict[str, float], hash=False)

    def __post_init__(self) -> None:
        if self.level not in get_args(Level):
            raise ValueError(f"level: got {self.level!r}; choose one of {', '.join(get_args(Level))}")
