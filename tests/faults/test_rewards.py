"""Reward functions that raise, hang, or give no number."""

import json
import math
import signal
import subprocess
import sys
import threading
import time

import pytest

from bandpo.train import verification
from bandpo.train.config import RunConfig
from bandpo.train.rewards import CheckedReward, RewardError, get_reward, time_limit, unscored_line
from bandpo.train.verification import verify_all, verify_one


def checked(function, **options):
    said = []
    return CheckedReward(function, "mine", say=said.append, **options), said


def test_what_is_no_number_is_unscored_and_counted():
    reward, said = checked(lambda completions, **_: [1, None, math.nan, math.inf, -math.inf, 0.5])
    assert reward([""] * 6, list("abcdef")) == [1.0, None, None, None, None, 0.5]
    assert (reward.scored, reward.unscored, reward.failed) == (2, 4, 0)
    assert len(said) == 1
    assert "left 4 of 6 samples unscored" in said[0]
    assert unscored_line(reward) == "reward 'mine' left 4 of 6 samples unscored"
    reward([""] * 6, list("abcdef"))
    assert len(said) == 1  # once, not in every step


@pytest.mark.parametrize(
    ("values", "message"),
    [([1.0], "returned 1 values for 2 completions"), ("12", "returned 2 values|must give one"), (None, "got 'None'"),
     (3.0, "got '3.0'"), (["a", "b"], "must return a number or None for each completion"), ({"a": 1, "b": 2}, "must"),
     ([1.0, [2.0]], "must return a number")],
)  # fmt: skip
@pytest.mark.parametrize("errors", ["stop", "skip"])
def test_a_function_of_another_form_always_stops_the_run(values, message, errors):
    reward, _ = checked(lambda completions, **_: values, errors=errors)
    with pytest.raises(RewardError, match=message):
        reward(["p", "q"], ["a", "b"])


def divide(completions, answer, **_):
    return [1 / int(c) for c in completions]


def test_the_first_error_stops_the_run_and_keeps_the_samples(tmp_path):
    reward, _ = checked(divide, folder=tmp_path)
    with pytest.raises(
        RewardError, match=r"raised ZeroDivisionError.*on 2 completions.*failed_reward\.jsonl.*reward_errors"
    ):
        reward(["p", "q"], ["2", "0"], answer=["", ""])
    rows = [json.loads(line) for line in (tmp_path / "failed_reward.jsonl").read_text().splitlines()]
    assert [(r["prompt"], r["completion"]) for r in rows] == [("p", "2"), ("q", "0")]


def test_skip_scores_one_by_one_and_leaves_out_only_what_fails():
    logged = {}
    reward, said = checked(divide, errors="skip")
    values = reward(["p"] * 4, ["2", "0", "x", "4"], answer=["1", "2", "3", "4"], log_metric=logged.__setitem__)
    assert values == [0.5, None, None, 0.25]
    assert (reward.unscored, reward.failed) == (2, 2)
    assert logged == {"reward/failed": 2.0}
    assert "scored one by one" in said[0]
    assert unscored_line(reward).endswith("2 of them because it failed")


@pytest.mark.parametrize("hang", ["sleep", "spin"])
def test_a_function_that_hangs_is_interrupted(hang):
    def slow(completions, **_):
        for c in completions:
            if c == "hang":
                if hang == "sleep":
                    time.sleep(60)
                while hang == "spin":
                    pass
        return [1.0] * len(completions)

    started = time.monotonic()
    reward, _ = checked(slow, limit=0.2)
    with pytest.raises(RewardError, match=r"took over 0\.2 s"):
        reward(["p"] * 2, ["ok", "hang"])
    reward, _ = checked(slow, limit=0.2, errors="skip")
    assert reward(["p"] * 3, ["ok", "hang", "ok"]) == [1.0, None, 1.0]
    assert time.monotonic() - started < 30
    time.sleep(0.3)  # no signal comes later


REGEX = """
import re, threading
from bandpo.train.rewards import time_limit
def run():
    with time_limit(0.2, grace=0.2):
        re.match("(a+)+$", "a" * 40 + "b")
"""


@pytest.mark.parametrize("where", ["run()", "t = threading.Thread(target=run); t.start(); t.join()"])
def test_what_cannot_be_interrupted_ends_the_process_and_says_where(where):
    """A regular expression that backtracks does not look at signals, and other threads get none."""
    code = [sys.executable, "-c", REGEX + where]
    result = subprocess.run(code, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "Timeout (0:00:00.4" in result.stderr
    assert "in match" in result.stderr  # the traceback says where


def test_nothing_is_left_behind():
    before = signal.getsignal(signal.SIGUSR1), threading.active_count()
    for _ in range(20):
        with time_limit(10):
            pass
    with pytest.raises(KeyError), time_limit(10):
        raise KeyError
    assert (signal.getsignal(signal.SIGUSR1), threading.active_count()) == before


def test_async_functions_are_refused():
    async def reward(completions, **_):
        return [1.0]

    with pytest.raises(ValueError, match="is async"):
        checked(reward)


def test_a_module_that_raises_at_import_is_a_clear_error(tmp_path, monkeypatch):
    (tmp_path / "broken_reward.py").write_text("raise OSError('no key')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"'broken_reward:f' could not be imported.*no key"):
        get_reward("broken_reward:f")


TOWER = (r"\boxed{10^{10^{10^{10}}}}", "$1$")


@pytest.mark.slow
def test_math_has_a_time_limit_in_any_thread_and_its_failures_are_no_zeros():
    """The tower of powers keeps sympy busy for ever; TRL's own reward gives it 0."""
    pairs = [(r"\boxed{2}", "$2$"), TOWER, (r"\boxed{3}", "$2$"), (r"\boxed{3}", "")]
    found = []
    thread = threading.Thread(target=lambda: found.append(verify_all(pairs, seconds=3)))
    thread.start()
    thread.join(timeout=60)
    assert found == [[1.0, None, 0.0, None]]
    assert verify_all(pairs[:1]) == [1.0]  # the pool goes on after it killed a worker


@pytest.mark.slow
def test_math_agrees_with_trl_where_trl_can_tell():
    from trl.rewards import accuracy_reward

    completions = [
        *(
            r"\boxed{0.5}",
            r"so $x=\frac{2}{4}$",
            "0.5",
            "",
            r"\boxed{}",
            r"\boxed{1,2}",
            r"\boxed{50\%}",
            r"\boxed{x^2+1}",
        ),
        *(r"\boxed{\frac{1}{2}", r"$\{1, 2\}$", "\\boxed{" * 50, r"\boxed{-\frac12}", r"\text{no}"),
    ]
    for answer in ("$0.5$", r"$\{1,2\}$", "$x^2+1$", "", r"\boxed{\frac12}"):
        expected = accuracy_reward([[{"content": c}] for c in completions], [answer] * len(completions))
        assert [verify_one(c, answer) for c in completions] == expected


@pytest.mark.slow
def test_one_that_hangs_costs_its_batch_nothing_but_time():
    pairs = [(rf"\boxed{{{i}}}", f"${i % 5}$") for i in range(40)]
    expected = [float(i == i % 5) for i in range(40)]
    pairs[17], expected[17] = TOWER, None
    pairs[18], expected[18] = (r"\boxed{1}", "for all n that 3 divides"), None
    assert verify_all(pairs, seconds=3, workers=1) == expected
    assert verify_all(pairs[:17] * 2, workers=2) == expected[:17] * 2


def test_workers_are_this_process_s_share_of_the_cpus(monkeypatch):
    monkeypatch.setattr(verification, "_cpus", lambda: 12)
    for ranks, workers in (("1", 12), ("5", 2), ("64", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert verification.default_workers() == workers
    monkeypatch.setattr(verification, "_cpus", lambda: 256)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert verification.default_workers() == 16
    with pytest.raises(ValueError, match="reward_workers=2 would be ignored"):
        get_reward("countdown", workers=2)


def test_the_option_is_for_reward_math():
    options = {"model": "m", "dataset": "d"}
    assert RunConfig(**options, reward="math", reward_workers=3).reward_workers == 3
    with pytest.raises(ValueError, match="reward_workers=3 would be ignored: only math and math-lenient"):
        RunConfig(**options, reward="mine:f", reward_workers=3)
    with pytest.raises(ValueError, match="reward_workers must be at least 1, got 0"):
        RunConfig(**options, reward="math", reward_workers=0)
