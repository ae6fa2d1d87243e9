"""The doctor's rules: what each looks at, why it matters, the healthy range, and what to set in each host."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Reads = Literal["configuration", "log", "batch"]


@dataclass(frozen=True)
class Rule:
    """A rule of the doctor, for `--explain` and for its page.

    Args:
        name: The stable name, as in `Finding.rule`.
        reads: What the rule looks at.
        sees: What is looked at, in one sentence.
        why: Why it matters, in one or two sentences.
        healthy: The healthy range, with its units.
        source: Where that range comes from: a paper with its number, or "our judgement".
        knobs: What to set, for each host that has a knob for it.
    """

    name: str
    reads: tuple[Reads, ...]
    sees: str
    why: str
    healthy: str
    source: str
    knobs: Mapping[str, str] = field(default_factory=dict[str, str])


RULES: Mapping[str, Rule] = {rule.name: rule for rule in ()}
"""All rules by name."""
