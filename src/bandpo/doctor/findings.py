"""What a rule of the doctor says."""

from dataclasses import dataclass
from typing import Literal, get_args

Level = Literal["ok", "note", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One rule's answer.

    Args:
        rule: Its name, the same in every output.
        level: ok (checked and fine), note (worth knowing), warning (often a mistake), problem (the run does not do what it
            says).
        seen: What was seen, with numbers.
        cause: Why that is so.
        knob: What to set, in the host's names.
        details: Lines of a table, where there is one.

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

    def __post_init__(self) -> None:
        if self.level not in get_args(Level):
            raise ValueError(f"level: got {self.level!r}; choose one of {', '.join(get_args(Level))}")
