"""The hook for verl's logger, on a class with its method; tests/contract_verl runs it in verl's own training loop."""

import inspect

import pytest

from bandpo._system.errors import RunError
from bandpo.integrations.verl_doctor import read_options, watch


def tracking():
    class Tracking:
        def __init__(self):
            self.rows = []

        def log(self, data, step, backend=None):
            self.rows.append((step, dict(data), backend))

    return Tracking


def test_each_row_is_logged_and_each_finding_told_once():
    cls, said = tracking(), []
    watch(cls, "patience=3", said.append)
    watch(cls, "patience=1", said.append)  # a second call changes nothing
    first, second = cls(), cls()
    for step in range(1, 7):
        first.log(data={"actor/pg_clipfrac": 0.0, "actor/entropy": 1.0 - 0.01 * step}, step=step)
        second.log({"actor/pg_clipfrac": 0.1}, step, backend=["console"])
    assert [row[0] for row in first.rows] == [row[0] for row in second.rows] == list(range(1, 7))
    assert second.rows[0][2] == ["console"]
    assert len(said) == 1  # each logger has its own doctor
    assert said[0].startswith("step 3, doctor: clipping: actor/pg_clipfrac is 0 in all 3 rows")
    assert list(inspect.signature(cls.log).parameters) == ["self", "data", "step", "backend"]


def test_it_ends_the_run_if_asked_after_the_row_is_logged():
    cls = tracking()
    watch(cls, "stop", lambda _: None)
    logger = cls()
    logger.log({"actor/entropy": 1.0}, step=1)
    with pytest.raises(RunError, match="step 2: BANDPO_DOCTOR=stop ends the run at the first problem: nonfinite"):
        logger.log({"actor/entropy": float("nan")}, step=2)
    assert [row[0] for row in logger.rows] == [1, 2]


@pytest.mark.parametrize("text", ["", "0", " "])
def test_it_is_off(text):
    cls = tracking()
    before = cls.log
    watch(cls, text)
    assert cls.log is before


@pytest.mark.parametrize("text", ["yes", "patience=0", "patience=", "stop=1", "1,often", ","])
def test_options_that_are_refused(text):
    with pytest.raises(ValueError, match="is none of 1, stop and patience=N"):
        read_options(text)
