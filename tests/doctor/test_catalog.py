"""The doctor's catalogue: every rule that is emitted has an entry, a case in which it fires, and one in which it is quiet."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from bandpo import OBJECTIVES
from bandpo.cli import main
from bandpo.integrations.trl import BandGRPOConfig
from bandpo.monitoring.catalog import RULES, Reads
from doctor_cases import CASES

ROOT = Path(__file__).parents[2]
INFORMING = {"interval", "assumed", "unread", "reward", "radius", "clipping", "cap", "columns", "length bias"}
"""Rules that report a note where nothing is wrong."""


def emitted():
    """Rules named in a `Finding(...)` in the doctor's source, or handed to a function that makes one."""
    found = {}
    source = ROOT / "src" / "bandpo"
    for path in sorted([*(source / "doctor").glob("*.py"), *(source / "monitoring").glob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("Finding", "_unknown")
            ):
                first = node.args[0] if node.args else next(k.value for k in node.keywords if k.arg == "rule")
                if isinstance(first, ast.Constant):
                    found.setdefault(first.value, path.name)
    return found


def test_every_rule_that_is_emitted_is_in_the_catalogue():
    assert len(emitted()) > 20
    assert {name: file for name, file in emitted().items() if name not in RULES} == {}
    through_a_variable = {"groups", "length", "cap"}  # by `_share`
    assert set(RULES) <= set(emitted()) | through_a_variable


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.rule}-{'fires' if c.fires else 'quiet'}-{c.reads}")
def test_a_case(case):
    found = case.run()
    assert {f.rule for f in found} <= set(RULES)
    levels = {f.level for f in found if f.rule == case.rule}
    if case.fires:
        assert levels and levels != {"ok"}
    else:
        assert levels <= (
            {"ok", "note"} if case.rule in ("kl", "kl estimate", "clipping", "effective size") else {"ok"}
        )


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_a_case_of_both_kinds(rule):
    assert {c.fires for c in CASES if c.rule == rule} == {True, False} or rule in INFORMING
    assert any(c.fires for c in CASES if c.rule == rule)
    assert {c.reads for c in CASES if c.rule == rule} == set(RULES[rule].reads)


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda r: r.name)
def test_an_entry_is_whole(rule):
    assert re.fullmatch(r"[a-z][a-z0-9-]*( [a-z0-9-]+)*", rule.name)
    assert rule.reads and set(rule.reads) <= set(get_args(Reads))
    for text in (rule.sees, rule.why, rule.healthy):
        assert text[0].isupper() or text[0].isdigit() or re.match(r"\w", text)
        assert text.endswith(".") and "  " not in text
    assert rule.source and all(rule.knobs.values())
    if "log" in rule.reads and rule.name not in ("reward", "unscored", "age", "log"):
        assert {"TRL", "verl", "bandpo train"} <= set(rule.knobs)


def test_objectives_and_options_that_the_advice_names_exist():
    advice = " ".join(knob for rule in RULES.values() for knob in rule.knobs.values())
    named = set(re.findall(r"(?:objective=|bandpo:)([a-z][\w-]*)", advice)) - {"..."}
    assert "bandpo-kl-upper" in named
    assert named <= set(OBJECTIVES)
    fields = set(BandGRPOConfig.__dataclass_fields__) | {"use_vllm", "dtype"}
    options = {name for rule in RULES.values() for name in re.findall(r"\b([a-z_]+)=", rule.knobs.get("TRL", ""))}
    assert options <= fields, options - fields


def test_the_advice_against_collapse_is_what_the_evidence_shows():
    [case] = [c for c in CASES if c.rule == "entropy" and c.fires and "actor" not in c.what]
    [found] = [f for f in case.run() if f.rule == "entropy"]
    assert found.knob.startswith("a higher upper edge")
    assert "bandpo-kl-upper" in found.knob and "Clip-Higher" in found.knob and "tighter lower edge" in found.knob
    assert "Not the whole band" in found.knob
    assert "bandpo-kl)" not in found.knob
    # tests/lab/test_evidence_pages.py compares these with the verdicts
    assert RULES["entropy"].rests_on == {
        "upper-entropy": "mixed",
        "band-entropy": "mixed",
        "lower-entropy": "mixed",
        "upper-price": "holds",
    }


def test_the_page_is_fresh_and_is_linked():
    ran = subprocess.run(
        [sys.executable, ROOT / "tools" / "rules.py", "--check"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    page = (ROOT / "docs" / "rules.md").read_text()
    assert all(f"\n## {name}\n" in page for name in RULES)
    assert max(map(len, (line for line in page.splitlines() if not line.startswith("|")))) <= 120
    assert "quiet on ." not in page and "ArXiv" not in page and "docs/" not in page
    assert "rules.md" in (ROOT / "docs" / "doctor.md").read_text()
    assert "rules.md" in (ROOT / "mkdocs.yml").read_text()


def test_explain(capsys):
    assert main(["doctor", "--explain", "inert"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("inert, of a configuration\n looks at: How many optimiser steps")
    assert "set, verl: data.train_batch_size a multiple" in out and "set, TRL: num_iterations=2" in out
    assert main(["doctor", "--explain"]) == 0
    listed = capsys.readouterr().out
    assert [re.split("  +", line)[0] for line in listed.splitlines() if not line.startswith(" ")] == sorted(RULES)
    assert main(["doctor", "--explain", "entropi"]) == 2
    assert "there is no rule 'entropi'; did you mean 'entropy'?" in capsys.readouterr().err
    assert main(["doctor", "--explain", "\x1b[31m"]) == 2
    error = capsys.readouterr().err
    assert "choose one of age, anchor, assumed" in error and "\x1b" not in error
