"""What a run shows while it works: the time that is left, the short row, bars on a terminal, and how to resume."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from bandpo._system import progress as shown
from bandpo._system.errors import RunError, Terminated, advice_in, exits_are_errors
from bandpo._system.progress import Progress, clock_time
from bandpo.cli import main
from bandpo.train.interrupted import resumable, resume_line
from bandpo.train.pace import Pace
from bandpo.train.progress import RoundsProgress, TrainingProgress, counting, shown_row

ARGS = SimpleNamespace(
    logging_strategy="steps", steps_per_generation=4, num_iterations=1, gradient_accumulation_steps=1
)
"""A rollout for four optimiser steps."""


class Clock:
    """Seconds that a test moves."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("done", [0, 4, 5, 7, 8])
@pytest.mark.parametrize("cycle", [1, 4])
def test_the_time_left_is_exact_where_steps_repeat(done, cycle):
    """The steps that sample take 7 s, the others 1 s: after both were seen the rest is known to the second."""
    clock, total = Clock(), 22
    duration = {step: 7 if (step - 1) % cycle == 0 else 1 for step in range(1, total + 1)}
    pace = Pace(total, done, cycle=cycle, clock=clock)
    assert pace.left is None and pace.told() == "0:00"
    for step in range(done + 1, total + 1):
        clock.now += duration[step]
        pace.step(step)
        rest = sum(duration[s] for s in range(step + 1, total + 1))
        seen = {duration[s] for s in range(done + 1, step + 1)}
        if len(seen) == len(set(duration.values())):
            assert pace.left == rest and pace.told() == f"{clock_time(pace.elapsed)}, {clock_time(rest)} left"
        else:
            assert pace.left >= rest if 7 in seen else pace.left <= rest
            assert ("at most" if 7 in seen else "at least") in pace.told()
    assert pace.elapsed == sum(duration[s] for s in range(done + 1, total + 1)) and pace.left == 0


@pytest.mark.parametrize("done", [0, 2, 4])
def test_tokens_of_a_rollout_count_once_and_with_its_whole_time(done):
    """400 tokens every four steps, 10 s for a cycle: 40 a second, in whatever step the session began."""
    clock, counted = Clock(), 400 * -(-done // 4)
    pace = Pace(20, done, cycle=4, tokens=counted, clock=clock)
    for step in range(done + 1, 17):
        clock.now += 7 if (step - 1) % 4 == 0 else 1
        counted += 400 if (step - 1) % 4 == 0 else 0
        pace.step(step, counted)
        first_whole = -(-done // 4) * 4 + 4
        assert pace.tokens_per_second == (None if step < first_whole else 40.0)
    assert Pace(3).tokens_per_second is None


def test_a_count_of_tokens_that_stays_zero_is_no_speed():
    pace = Pace(3, clock=Clock())
    pace.step(1, 0)
    assert pace.tokens_per_second is None


def run_of(tmp_path, *, terminal, steps=8, begin=0, logging=4):
    """The output of a run of eight steps, one second each, with a log every four steps."""
    progress = Progress()
    progress.console = Console(file=io.StringIO(), force_terminal=terminal, width=100, soft_wrap=True)
    callback = TrainingProgress(progress, tmp_path)
    state = TrainerState(max_steps=steps, global_step=begin, is_world_process_zero=True)
    control = TrainerControl()
    callback.on_train_begin(ARGS, state, control)
    clock = Clock()
    callback.pace = Pace(steps, begin, cycle=4, tokens=100 * -(-begin // 4), clock=clock)
    frames = []
    for step in range(begin + 1, steps + 1):
        clock.now += 1
        state.global_step, state.num_input_tokens_seen = step, 100 * -(-step // 4)
        control.should_log = step % logging == 0
        callback.on_step_end(ARGS, state, control)
        frames.append(
            None if callback.bar is None else (callback.bar.tasks[0].completed, dict(callback.bar.tasks[0].fields))
        )
        if control.should_log:
            callback.on_log(
                ARGS, state, control, logs={"reward": 0.25, "learning_rate": 4e-4, "ratio/mean": 1.0, "step_time": 1.0}
            )
    callback.on_log(ARGS, state, control, logs={"train_runtime": 3.0, "train_loss": 1.0})
    callback.on_train_end(ARGS, state, control)
    return progress.console.file.getvalue(), frames


def test_plain_output_has_an_early_line_and_one_at_each_log(tmp_path):
    text, _ = run_of(tmp_path, terminal=False)
    assert text.splitlines() == [
        "step    1/8  0:01, at most 0:07 left",
        "step    4/8  reward 0.250  lr 0.0004  25 tokens/s  0:04, 0:04 left",
        "step    8/8  reward 0.250  lr 0.0004  25 tokens/s  0:08, 0:00 left",
    ]
    timings = [json.loads(line) for line in (tmp_path / "timings.jsonl").read_text().splitlines()]
    assert timings[:2] == [{"step": s, "step_time": 1.0, "tokens_per_second": 25.0} for s in (4, 8)]
    rows = (tmp_path / "metrics.jsonl").read_text()
    assert "tokens_per_second" not in rows and '"ratio/mean": 1.0' in rows


def test_a_log_at_the_first_step_is_the_early_line(tmp_path):
    text, _ = run_of(tmp_path, terminal=False, logging=1)
    assert text.splitlines()[0].startswith("step    1/8  reward") and len(text.splitlines()) == 8


def test_a_resumed_run_counts_from_its_first_step(tmp_path):
    text, _ = run_of(tmp_path, terminal=False, begin=4)
    assert text.splitlines() == [
        "step    5/8  0:01, at most 0:03 left",
        "step    8/8  reward 0.250  lr 0.0004  25 tokens/s  0:04, 0:00 left",
    ]


def test_the_bar_moves_at_every_step(tmp_path):
    text, frames = run_of(tmp_path, terminal=True)
    assert [count for count, _ in frames] == list(range(1, 9))
    assert frames[4][1]["left"] == "0:03 left  25 tokens/s"
    assert "training" in text and "8/8" in text and "step    4/8  reward 0.250" in text


def test_a_failed_run_takes_its_bar_away(tmp_path):
    progress = Progress()
    progress.console = Console(file=io.StringIO(), force_terminal=True, width=100)
    callback = TrainingProgress(progress, tmp_path)
    callback.on_train_begin(ARGS, TrainerState(max_steps=4, is_world_process_zero=True), TrainerControl())
    assert callback.bar is not None
    trainer = SimpleNamespace(accelerator=SimpleNamespace(num_processes=1), _metrics={"train": {}})
    callback.log_unfinished(trainer)
    assert callback.bar is None
    progress.console.print("after")  # no live display is left that this would conflict with


def test_a_row_is_short():
    names = ("reward", "entropy", "clip_ratio/region_mean", "band/divergence_mean", "completions/mean_length", "kl")
    values = {
        **dict.fromkeys(names, 0.123456),
        "grad_norm": 1234.5,
        "learning_rate": 1e-6,
        "loss": 1.0,
        "reward_std": None,
    }
    row = shown_row({**values, **{f"clip_fraction_by_prob/{i}": 0.1 for i in range(70)}})
    assert row == (
        "reward 0.123  entropy 0.123  clipped 0.123  div/radius 0.123  length 0.1  kl 0.123  grad 1.2e+03  lr 1e-06"
    )
    assert shown_row({"reward": None, "entropy": float("nan")}) == "entropy nan"


@pytest.mark.parametrize("terminal", [False, True])
def test_rounds_say_what_they_do(terminal):
    progress = Progress()
    progress.console = Console(file=io.StringIO(), force_terminal=terminal, width=100, soft_wrap=True)
    rounds = RoundsProgress(progress, 4)
    for number in (2, 3):  # a resumed run
        rounds.doing(number, "sampling")
        rounds.doing(number, "fitting 8 pairs")
        rounds.on_step_end(ARGS, TrainerState(global_step=1, max_steps=2), TrainerControl())
        if terminal:
            left = rounds.bar.tasks[0].fields["left"]
            assert left.endswith("fitting, step 1/2") and ("left" in left) == (number > 2)
        rounds.done(number, "pairs 8", 100)
    rounds.stop()
    text = progress.console.file.getvalue()
    if not terminal:
        lines = text.splitlines()
        assert lines[:2] == ["round   2/4  sampling", "round   2/4  fitting 8 pairs"] and len(lines) == 4
        assert lines[2].startswith("round   2/4  pairs 8  ") and lines[3].startswith("round   3/4  pairs 8  ")
    assert "round   3/4  pairs 8" in text and "tokens/s" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_a_stage_says_what_runs(terminal, monkeypatch):
    progress = Progress()
    progress.console = Console(file=io.StringIO(), force_terminal=terminal, width=100, soft_wrap=True)
    clock = Clock()
    monkeypatch.setattr(shown, "time", SimpleNamespace(monotonic=clock))
    with progress.stage("evaluating the model", 40, "completions") as advance:
        reward = counting(lambda prompts, completions, **_: [1.0 for _ in completions], advance)
        for _ in range(4):
            clock.now += 40
            assert reward(["p"] * 10, ["c"] * 10, answer=[""]) == [1.0] * 10
    text = progress.console.file.getvalue()
    if terminal:
        assert "evaluating the model" in text
    else:
        assert text.splitlines() == ["evaluating the model: 40 completions", "  20/40 completions  1:20, 1:20 left"]


# ---- how to resume


def test_the_line_that_resumes_names_the_last_whole_checkpoint(tmp_path):
    folder = tmp_path / "my run"
    folder.mkdir()
    given = {"task": "countdown", "hub_token": "hf_secretsecretsecret"}
    line = resume_line(folder, given)
    assert line.startswith("there is no checkpoint yet (save_steps); to begin again:\n  bandpo train --config '")
    assert line.endswith("my run' --resume_from_checkpoint latest --hub_token VALUE") and "secret" not in line
    for step, whole in ((9, True), (10, True), (11, False)):
        (folder / f"checkpoint-{step}").mkdir()
        if whole:
            (folder / f"checkpoint-{step}" / "bandpo_files.json").touch()
    assert resume_line(folder, {}).startswith("to continue after step 10, the last checkpoint:\n")
    assert "accelerate launch" in resume_line(folder, {}, processes=2)
    (folder / "rounds" / "1").mkdir(parents=True)
    (folder / "rounds" / "1" / "bandpo_files.json").touch()
    for path in folder.glob("checkpoint-*/bandpo_files.json"):
        path.unlink()
    assert resume_line(folder, {}).startswith("to continue after round 2, the last whole one:\n")


@pytest.mark.parametrize("error", [RunError("the disk is full"), KeyboardInterrupt(), SystemExit(3), ValueError("x")])
def test_every_error_of_a_run_has_the_line_once(error, tmp_path, capsys, monkeypatch):
    from bandpo.train import start

    def run(_):
        with exits_are_errors(), resumable(tmp_path, {}):
            raise error

    monkeypatch.setattr(start, "train", run)
    status = main(["train"])
    assert status == {RunError: 1, KeyboardInterrupt: 130, SystemExit: 1, ValueError: 2}[type(error)]
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("  bandpo train --config") and said[-2].startswith("bandpo: there is no checkpoint yet")
    assert sum("--resume_from_checkpoint" in line for line in said) == 1


def test_sigterm_ends_a_run_as_ctrl_c_does(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    if before is not signal.SIG_DFL:
        pytest.skip("SIGTERM is handled already")

    def work(*, own_sigterm):
        with exits_are_errors(), resumable(tmp_path, {}, own_sigterm=own_sigterm):
            if not own_sigterm:
                assert signal.getsignal(signal.SIGTERM) is before
                raise ZeroDivisionError
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(Terminated) as ended:
        work(own_sigterm=True)
    assert signal.getsignal(signal.SIGTERM) is before
    assert "--resume_from_checkpoint latest" in advice_in(ended.value)[0]
    with pytest.raises(ZeroDivisionError):
        work(own_sigterm=False)
    assert signal.getsignal(signal.SIGTERM) is before


STUBBORN = """
import signal, sys, time
from pathlib import Path
from bandpo.train.interrupted import resumable
with resumable(Path("run"), {}):
    while True:
        try:
            print("ready", flush=True)
            time.sleep(60)
        except BaseException as error:  # as a reward may
            print("caught", type(error).__name__, flush=True)
"""


def test_a_second_sigterm_ends_the_process_at_once(tmp_path):
    command = [sys.executable, "-c", STUBBORN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "caught Terminated\n" and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM


def test_a_reward_does_not_take_sigterm_for_its_own_failure():
    from bandpo.train.rewards import CheckedReward

    def reward(prompts, completions, **_):
        raise Terminated

    with pytest.raises(Terminated):
        CheckedReward(reward, "mine", errors="skip")(["p"], ["c"])
