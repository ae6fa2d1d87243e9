"""What a reward function may raise and return: a score, unscored, or an error with its place; never a silent end."""

import itertools
import json
import math
import os
import signal
import threading
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from bandpo._system.errors import LINES, RunError, exits_are_errors, printable
from bandpo.train.rewards import CheckedReward, RewardError, get_reward


class Unspeakable(Exception):
    def __repr__(self):
        raise RuntimeError("no repr")


class Base(BaseException):
    pass


ENDS = [
    SystemExit(0), SystemExit(None), SystemExit(3), SystemExit("done"), KeyboardInterrupt(), GeneratorExit(), Base("odd"),
    StopIteration(), MemoryError(), RecursionError(), Unspeakable(), Exception("\x1b[2J\x1b]0;owned\x07"), AssertionError(),
]  # fmt: skip


def checked(function, **options):
    said = []
    return CheckedReward(function, "mine", say=said.append, **options), said


def raising(error):
    def my_reward(completions, **_):
        if any(c == "bad" for c in completions):
            raise error
        return [1.0] * len(completions)

    return my_reward


@pytest.mark.parametrize(
    "error", ENDS, ids=lambda e: f"{type(e).__name__}-{e!s:.6}".encode("ascii", "replace").decode()
)
def test_whatever_is_raised_is_a_failing_reward_with_its_place(error, tmp_path):
    reward, _ = checked(raising(error), folder=tmp_path)
    with pytest.raises(RewardError) as found:
        reward(["p", "q"], ["good", "bad"])
    message = str(found.value)
    assert isinstance(found.value, RunError)  # status 1 and one message
    assert "test_reward_ends.py" in message and "in my_reward" in message
    assert "raise error" in message  # the traceback, with the line
    assert "\x1b" not in message and "\x07" not in message
    rows = [json.loads(line) for line in (tmp_path / "failed_reward.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in rows] == ["good", "bad"]
    assert all("raise error" in row["traceback"] and "\x1b" not in row["traceback"] for row in rows)

    reward, said = checked(raising(error), errors="skip")
    assert reward(["p"] * 3, ["good", "bad", "good"]) == [1.0, None, 1.0]
    assert (reward.unscored, reward.failed) == (1, 1)
    assert "raise error" in said[0] and "\x1b" not in "".join(said)


@pytest.mark.parametrize("errors", ["stop", "skip"])
def test_a_ctrl_c_is_the_user_s_and_no_failure(errors):
    def pressed(completions, **_):
        os.kill(os.getpid(), signal.SIGINT)
        return [1.0]

    reward, _ = checked(pressed, errors=errors, limit=60)
    # A process in the background, and with it its children, ignores the signal unless it says otherwise.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            reward(["p"], ["a"])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_a_thread_it_is_the_same():
    found = []

    def run():
        reward, _ = checked(raising(SystemExit(0)), errors="skip")
        found.append(reward(["p"] * 2, ["good", "bad"]))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [[1.0, None]]


@pytest.mark.parametrize(
    "values",
    [
        (1, 0.5),
        [True, np.float32(0.5)],
        np.array([1.0, 0.5]),
        torch.tensor([1.0, 0.5]),
        torch.tensor([1.0, 0.5], requires_grad=True),
        torch.tensor([1.0, 0.5], dtype=torch.bfloat16),
        [torch.tensor(1), torch.tensor([0.5])],
        [Fraction(1), Decimal("0.5")],
        (x for x in (1.0, 0.5)),
        iter([1, 0.5]),
    ],
    ids=lambda v: f"{type(v).__name__}",
)
def test_numbers_of_every_make_are_scores(values):
    reward, _ = checked(lambda **_: values)
    assert reward(["p", "q"], ["a", "b"]) == [1.0, 0.5]


@pytest.mark.parametrize(
    "value",
    [
        None,
        math.nan,
        math.inf,
        -math.inf,
        1e300,
        -1e19,
        10**400,
        np.float32("nan"),
        torch.tensor(math.inf),
        np.ma.masked,
    ],
)
def test_what_could_not_be_learnt_from_is_unscored(value):
    """float32 squares of rewards make the advantages: from 1e19 on these would be infinite."""
    reward, said = checked(lambda **_: [value, 0.5])
    assert reward(["p", "q"], ["a", "b"]) == [None, 0.5]
    assert (reward.scored, reward.unscored) == (1, 1)
    assert "1 of 2 samples unscored" in said[0]


def broken():
    yield 1.0
    raise ValueError("in the middle")


@pytest.mark.parametrize(
    "values",
    [
        None,
        3,
        1.0,
        torch.tensor(1.0),
        "12",
        b"12",
        {"a": 1, "b": 2},
        {1.0, 0.5},
        {1: 0, 2: 0}.keys(),
        ["1", "0"],
        ["a", "b"],
        [1.0],
        [1.0] * 3,
        [],
        torch.ones(2, 2),
        np.ones((2, 2)),
        [1.0, [2.0]],
        [1.0, {}],
        [1j, 1.0],
        object(),
        lambda: [1, 1],
    ],
    ids=lambda v: f"{type(v).__name__}",
)
@pytest.mark.parametrize("errors", ["stop", "skip"])
def test_what_is_no_list_of_numbers_is_an_error_in_words(values, errors):
    reward, _ = checked(lambda **_: values, errors=errors)
    with pytest.raises(RewardError, match=r"reward 'mine' (must return a number or None|returned \d+ values for 2)"):
        reward(["p", "q"], ["a", "b"])


def test_a_generator_s_own_error_and_its_time_are_the_function_s():
    reward, _ = checked(lambda **_: broken())
    with pytest.raises(RewardError, match=r"raised ValueError.*in the middle"):
        reward(["p", "q"], ["a", "b"])
    reward, _ = checked(lambda **_: (1.0 for _ in itertools.count()))  # it would fill the memory
    with pytest.raises(RewardError, match="returned 3 values for 2 completions"):
        reward(["p", "q"], ["a", "b"])


def test_a_module_that_exits_at_import_is_a_mistake_in_the_input(tmp_path, monkeypatch):
    (tmp_path / "exits_at_import.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"could not be imported: its module called sys\.exit\(0\)"):
        get_reward("exits_at_import:f")
    from bandpo.zoo import get_objective

    with pytest.raises(ValueError, match="could not be imported"):
        get_objective("exits_at_import:f")


@pytest.mark.parametrize("error", [SystemExit(0), GeneratorExit(), Base("odd")])
def test_code_of_a_run_cannot_end_it_in_silence(error):
    with pytest.raises(RunError, match=r"test_reward_ends\.py:\d+, in test_code"), exits_are_errors():
        raise error
    with pytest.raises(KeyboardInterrupt), exits_are_errors():
        raise KeyboardInterrupt


def test_what_a_terminal_would_obey_is_written_out():
    attack = "a\x1b[31mb\x9b2J\x07\x00\r\x7f\u202eé\ud800\n\t中"
    assert printable(attack, keep=LINES) == r"a\x1b[31mb\x9b2J\x07\x00\r\x7f\u202eé\ud800" + "\n\t中"
    assert printable("plain") == "plain"
