"""Writes docs/rules.md, the page of the doctor's rules, from the catalogue and from the cases of the tests.

* `python tools/rules.py`: writes the page.
* `python tools/rules.py --check`: changes nothing; status 1 if the page is out of date.
"""

import argparse
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from bandpo.monitoring.catalog import RULES, Rule  # noqa: E402
from doctor_cases import CASES, Case  # noqa: E402

PAGE = ROOT / "docs" / "rules.md"
_ABOVE = """# The doctor's rules

What [`bandpo doctor`](doctor.md) looks at, why, the healthy range and where it comes from, what to set in each host,
and how each rule is tested. `bandpo doctor --explain RULE` prints the same. The names do not change. This page is made
by `python tools/rules.py` from `bandpo.monitoring.catalog`.

"Our judgement" means that no paper gives the range: it is what we saw in runs that learn and in runs that do not.
"""
_OF = {"configuration": "a configuration", "log": "a log", "batch": "a batch"}
_SHOWN = 2  # cases of each kind that are named


def page() -> str:
    """The text of the page."""
    rows = [
        f"| [`{name}`](#{anchor(name)}) | {', '.join(rule.reads)} | {_cell(rule.sees)} |" for name, rule in _sorted()
    ]
    table = ["| rule | of a | looks at |", "|---|---|---|", *rows]
    return "\n".join([_ABOVE, *table, "", *(_section(rule) for _, rule in _sorted())]).rstrip() + "\n"


def anchor(name: str) -> str:
    """The anchor of a rule on the page.

    Args:
        name: Name of the rule.
    """
    return name.lower().replace(" ", "-")


def _sorted() -> list[tuple[str, Rule]]:
    return sorted(RULES.items())


def _section(rule: Rule) -> str:
    fires, quiet = ([c for c in CASES if c.rule == rule.name and c.fires is kind] for kind in (True, False))
    lines = [
        f"## {rule.name}",
        "",
        _wrapped(f"Reads {' and '.join(_OF[x] for x in rule.reads)}. {rule.sees} {rule.why}"),
        "",
    ]
    lines += [_wrapped(f"**Healthy:** {rule.healthy} **From:** {_linked(_sentence(rule.source))}"), ""]
    lines += [_wrapped(f"**Tested** {_tests(fires, quiet)}"), ""]
    if rule.rests_on:
        claims = ", ".join(f"`{claim}` ({came_out})" for claim, came_out in rule.rests_on.items())
        lines += [_wrapped(f"**Rests on** registered claims of [the evidence](evidence-data.md): {claims}."), ""]
    if rule.knobs:
        lines += [
            "| host | set |",
            "|---|---|",
            *(f"| {host} | {_linked(_setting(_cell(knob)))} |" for host, knob in rule.knobs.items()),
            "",
        ]
    return "\n".join(lines)


def _tests(fires: list[Case], quiet: list[Case]) -> str:
    def some(cases: list[Case]) -> str:
        named = "; ".join(f"`{c.what}`" if c.reads != "batch" else c.what for c in cases[:_SHOWN])
        more = f"; and {len(cases) - _SHOWN} more" if len(cases) > _SHOWN else ""
        return f"{named}{more}"

    if not quiet:
        return f"to fire on {some(fires)}. The rule only informs, so it is never quiet."
    return f"to fire on {some(fires)}, and to be quiet on {some(quiet)}."


def _sentence(text: str) -> str:
    start = text if text.startswith("arXiv") else text[0].upper() + text[1:]
    return start + "." * (not text.endswith("."))


def _linked(text: str) -> str:
    """The text with links in place of the names of pages, which a terminal shows as they are."""
    return re.sub(r"docs/(\w+)\.md", r"[\1](\1.md)", text)


def _setting(text: str) -> str:
    """The text with names and values of settings as code, which a narrow table may break."""

    def marked(found: re.Match[str]) -> str:
        word = found[0].rstrip(",:")
        setting = re.search(r"[_=]|[a-z]\.[a-z]", word) and not word.startswith("docs/")
        return f"`{word}`{found[0][len(word) :]}" if setting else found[0]

    return re.sub(r"[^\s;()]+", marked, text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def _wrapped(text: str) -> str:
    safe = text.replace("<", "&lt;")
    return textwrap.fill(safe, 116, break_long_words=False, break_on_hyphens=False)


def main() -> int:
    """Writes the page, or compares it."""
    parser = argparse.ArgumentParser(description="The page of the doctor's rules.")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if the page is out of date")
    check = parser.parse_args().check
    new = page()
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == new:
        return 0
    if check:
        print("docs/rules.md is out of date; run python tools/rules.py")
        return 1
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
