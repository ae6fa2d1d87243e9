"""What the doctor prints: for a terminal, as JSON, as a page, and the explanation of a rule."""

import difflib
import json
import math
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, get_args

from bandpo._system.errors import printable
from bandpo._system.secrets import redact_text
from bandpo.monitoring.catalog import RULES, Rule
from bandpo.monitoring.findings import Finding, Level

SCHEMA = 1
"""Version of the form of `--json`. It rises when a field changes its meaning or is gone; a new field does not raise it."""
_WORST_FIRST: tuple[Level, ...] = ("problem", "warning", "note", "ok")
_MARKS: Mapping[Level, str] = {"ok": "ok", "note": "--", "warning": "??", "problem": "!!"}
_COLOURS: Mapping[Level, str] = {"ok": "32", "note": "36", "warning": "33", "problem": "31"}
_NARROWEST, _USUAL, _WIDEST = 40, 90, 120  # columns


@dataclass(frozen=True)
class Examined:
    """The findings for one file.

    Args:
        name: The file.
        findings: The findings, in the order of the rules.
        error: Why the file could not be examined; "" if it was.
    """

    name: str
    findings: tuple[Finding, ...] = ()
    error: str = ""


def exit_status(examined: Sequence[Examined]) -> int:
    """2 if a file could not be examined, else 1 if there is a problem, else 0.

    Args:
        examined: The files.

    Examples:
        >>> exit_status([Examined("a", (Finding("inert", "problem", "one step"),)), Examined("b", error="it is a pipe")])
        2
    """
    if any(one.error for one in examined):
        return 2
    return int(any(f.level == "problem" for one in examined for f in one.findings))


def as_text(examined: Sequence[Examined], *, colour: bool = False, width: int | None = None) -> str:
    """The findings for a terminal, of each file the worst first.

    Args:
        examined: The files; those that could not be examined are left out.
        colour: Whether to colour the marks.
        width: Columns; by default those of the terminal, at least 40 and at most 120.
    """
    if width is None:
        width = shutil.get_terminal_size((_USUAL, 24)).columns
    width = min(max(width, _NARROWEST), _WIDEST)
    return "\n\n".join(_section(one, colour=colour, width=width) for one in examined if not one.error)


def as_json(examined: Sequence[Examined]) -> str:
    """The findings for programs, in the form of `schema()`.

    Args:
        examined: The files.
    """
    sections: list[dict[str, Any]] = []
    for one in examined:
        section = {"schema": SCHEMA, "file": _shown(one.name), "findings": [_plain(f) for f in one.findings]}
        sections.append(section | ({"error": _shown(one.error)} if one.error else {}))
    return json.dumps(sections, indent=1)


def as_page(examined: Sequence[Examined]) -> str:
    """The findings as one self-contained page of HTML, without scripts.

    Args:
        examined: The files.

    Raises:
        ImportError: If Jinja is not installed (it comes with bandpo[lab]).
    """
    try:
        from bandpo._system.pages import template
    except ImportError as error:
        raise ImportError(f"--html needs a package of bandpo[lab]: pip install 'bandpo[lab]' ({error})") from error
    page = template("bandpo.doctor", "doctor.html.j2")
    return page.render(title="What the doctor found", files=for_page(examined), status=exit_status(examined))


def for_page(examined: Sequence[Examined]) -> list[dict[str, Any]]:
    """The findings for a page, of each file the worst first: name, error, counts, and findings with the entry of their rule.

    Args:
        examined: The files.
    """
    return [
        {
            "name": _shown(one.name),
            "error": _shown(one.error),
            "counts": _counts(one.findings),
            "findings": [
                _plain(f) | {"mark": _MARKS[f.level], "rule_name": RULES.get(f.rule)} for f in worst_first(one.findings)
            ],
        }
        for one in examined
    ]


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the output of `bandpo doctor --json`.

    Examples:
        >>> schema()["items"]["properties"]["schema"]
        {'const': 1}
    """
    return json.loads(files("bandpo.doctor").joinpath("findings.schema.json").read_text(encoding="utf-8"))


def explained(name: str, *, width: int = _USUAL) -> str:
    """What the catalogue has about a rule; of all rules a list.

    Args:
        name: Name of the rule; "" for the list.
        width: Columns.

    Raises:
        ValueError: If there is no rule of that name.
    """
    if not name:
        longest = max(map(len, RULES))
        return "\n".join(
            textwrap.fill(
                f"{rule.name:<{longest}}  {rule.sees}",
                width,
                subsequent_indent=" " * (longest + 2),
                break_on_hyphens=False,
            )
            for rule in sorted(RULES.values(), key=lambda rule: rule.name)
        )
    if name not in RULES:
        near = difflib.get_close_matches(name, RULES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(sorted(RULES))}"
        raise ValueError(f"there is no rule {name[:80]!r}; {hint}")
    rule = RULES[name]
    lines = [f"{rule.name}, of {_listed(rule)}"]
    parts = {"looks at": rule.sees, "why": rule.why, "healthy": rule.healthy, "from": rule.source}
    if rule.rests_on:
        parts["rests on"] = ", ".join(f"claim {claim} ({came_out})" for claim, came_out in rule.rests_on.items())
    parts |= {f"set, {host}": knob for host, knob in rule.knobs.items()}
    return "\n".join([*lines, *(_wrap(f"{what}: {text}", width, 1, 4) for what, text in parts.items())])


def worst_first(findings: Sequence[Finding]) -> list[Finding]:
    """The findings by level, in the order of the rules within a level.

    Args:
        findings: The findings.
    """
    assert set(_WORST_FIRST) == set(get_args(Level))
    return sorted(findings, key=lambda f: _WORST_FIRST.index(f.level))


def _section(one: Examined, *, colour: bool, width: int) -> str:
    lines = [_shown(one.name)]
    for f in worst_first(one.findings):
        mark = _MARKS[f.level]
        text = _wrap(f"{mark} {f.rule}: {f.seen}", width, 1, 11)
        lines.append(text.replace(mark, f"\x1b[{_COLOURS[f.level]}m{mark}\x1b[0m", 1) if colour else text)
        if f.cause:
            lines.append(_wrap(f"why: {f.cause}", width, 6, 11))
        if f.knob:
            lines.append(_wrap(f"set: {f.knob}", width, 6, 11))
        lines += [f"      {_shown(row)}" for row in f.details]
    return "\n".join([*lines, f"    {_counts(one.findings)}"])


def _counts(findings: Sequence[Finding]) -> str:
    counts = [
        f"{n} {level}{'s' * (n > 1)}"
        for level in ("problem", "warning")
        if (n := sum(f.level == level for f in findings))
    ]
    unanswered = sum(f.seen.startswith("not known") for f in findings)
    if unanswered:
        counts.append(f"{unanswered} {'rule' if unanswered == 1 else 'rules'} without an answer")
    return ", ".join(counts) or "nothing wrong found"


def _plain(f: Finding) -> dict[str, Any]:
    """A finding for JSON, with the same texts as on a terminal; a number that is not finite is null."""
    return {
        "rule": f.rule,
        "level": f.level,
        "seen": _shown(f.seen),
        "cause": _shown(f.cause),
        "knob": _shown(f.knob),
        "details": [_shown(row) for row in f.details],
        "numbers": {_shown(k): float(x) if math.isfinite(x) else None for k, x in f.numbers.items()},
    }


def _listed(rule: Rule) -> str:
    return " and ".join({"configuration": "a configuration", "log": "a log", "batch": "a batch"}[x] for x in rule.reads)


def _shown(text: str) -> str:
    """A text from a file, without secrets and without characters that a terminal would act on."""
    return printable(redact_text(text))


def _wrap(text: str, width: int, first: int, rest: int) -> str:
    return textwrap.fill(
        _shown(text),
        width,
        initial_indent=" " * first,
        subsequent_indent=" " * rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
