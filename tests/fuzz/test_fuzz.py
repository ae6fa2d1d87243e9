"""A taste of `make fuzz` in the suite: some hundred inputs of each target."""

import pytest
from targets import TARGETS

from fuzz import run


@pytest.mark.parametrize("name", TARGETS)
def test_target(name):
    outcomes = run(name, examples=25 if TARGETS[name].slow else 200, start=1)
    assert sum(outcomes.values()) >= 20
    assert outcomes["refused"] or not TARGETS[name].bad


def test_a_target_that_lets_a_bad_input_pass_fails(monkeypatch):
    monkeypatch.setitem(TARGETS, "lax", TARGETS["any log-probs"]._replace(bad=True))
    with pytest.raises(AssertionError, match="a bad input passed as good"):
        run("lax", examples=5, start=0)
