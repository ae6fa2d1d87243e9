"""Every rule of the doctor over a configuration: one that it fires on, and one that it passes."""

import dataclasses
import json
import math
import re

import pytest
import torch

from bandpo import KL, OBJECTIVES, Band
from bandpo.doctor import Finding, examine_setup
from bandpo.doctor.rules import PROBABILITIES, cap_threshold
from doctor_cases import GOOD, SETUPS_THAT_FIRE, SETUPS_THAT_PASS


def finding(setup, rule):
    [found] = [f for f in examine_setup(setup) if f.rule == rule]
    return found


@pytest.mark.parametrize(("rule", "changes", "level", "words"), SETUPS_THAT_FIRE)
def test_rule_fires(rule, changes, level, words):
    found = finding(dataclasses.replace(GOOD, **changes), rule)
    assert found.level == level
    assert re.search(words, found.seen)
    assert level in ("ok", "note") or (found.cause and (found.knob or rule == "refused"))


@pytest.mark.parametrize(("rule", "changes"), SETUPS_THAT_PASS)
def test_rule_passes(rule, changes):
    assert finding(dataclasses.replace(GOOD, **changes), rule).level == "ok"


def test_rules_without_anything_to_say_are_silent():
    rules = {f.rule for f in examine_setup(dataclasses.replace(GOOD, objective=OBJECTIVES["grpo"]))}
    assert not rules & {"group", "cap", "memory", "unread"}


def test_the_table_has_the_bounds_and_what_sets_them():
    table = finding(GOOD, "interval").details
    lower, upper = GOOD.objective.bounds(torch.tensor(PROBABILITIES, dtype=torch.float64).log())
    for row, p, low, high in zip(table[1:], PROBABILITIES, lower.tolist(), upper.tolist(), strict=True):
        cells = row.replace(",", " ").split()
        assert [float(c) for c in cells[:5]] == pytest.approx([p, low, high, 1 - low, high - 1], abs=5e-5)
        assert cells[6] == ("cap" if p < 0.00714 else "region")
    tv = dataclasses.replace(GOOD, objective=OBJECTIVES["bandpo-tv"])
    assert [row.split()[-2:] for row in finding(tv, "interval").details[1:4]] == [["simplex,", "cap"]] * 2 + [
        ["simplex,", "region"]
    ]
    assert (
        "clip of 0.2 below and 0.28 above"
        in finding(dataclasses.replace(GOOD, objective=OBJECTIVES["dapo"]), "interval").seen
    )
    for name in ("gspo", "dppo-topk-kl", "bapo"):
        assert not finding(dataclasses.replace(GOOD, objective=OBJECTIVES[name]), "interval").details


@pytest.mark.parametrize("ratio", [2.0, 10.0, 100.0])
def test_where_the_cap_takes_over_the_ball_has_its_very_bound(ratio):
    p = cap_threshold(Band(KL, 0.05, max_ratio=ratio))
    # the binary divergence of (p, ratio·p), in plain floats: the definition
    divergence = p * -math.log(ratio) + (1 - p) * (math.log1p(-p) - math.log1p(-ratio * p))
    assert divergence == pytest.approx(0.05, rel=1e-9)
    assert cap_threshold(Band(KL, 0.05, max_ratio=1e40)) is None


def test_findings_are_json_and_levels_are_checked():
    assert json.dumps([dataclasses.asdict(f) for f in examine_setup(GOOD)])
    with pytest.raises(ValueError, match="level: got 'bad'; choose one of ok, note, warning, problem"):
        Finding("x", "bad", "y")
