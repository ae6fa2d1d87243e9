"""The line that a run prints when it ends early resumes it: after SIGTERM, ctrl-C and a reward that fails."""

import json
import os
import shlex
from pathlib import Path

import pytest
import yaml

from command_line import warm_bandpo

REWARD = """
import os, signal
from pathlib import Path
from bandpo.toy.tasks import TASKS
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
calls = 0

def score(prompts, completions, **_):
    global calls
    calls += 1
    what, at = Path("session").read_text().split()
    if calls == int(at):
        if what == "raise":
            raise RuntimeError("my bug")
        os.kill(os.getpid(), getattr(signal, what))
    return [float(len(c) % 2) for c in completions]
"""


def the_line(error):
    """What the run told, and the words of its command line."""
    lines = error.splitlines()
    return lines[-2], shlex.split(lines[-1])


@pytest.mark.slow
def test_the_printed_line_resumes_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "ends_early.py").write_text(REWARD)
    file = {
        "task": "countdown", "reward": "ends_early:score", "max_steps": 6, "per_device_train_batch_size": 16,
        "num_generations": 4, "warm_up_steps": 100, "eval_prompts": 6, "eval_samples": 4, "logging_steps": 2,
        "save_steps": 2, "use_cpu": True, "bf16": False, "threads": 1, "report_to": "none", "output_dir": "my run",
        "max_completion_length": 10, "gradient_checkpointing": False, "steps_per_generation": 1,
        "per_device_eval_batch_size": 24,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(file))
    words = ["bandpo", "train", "--config", "run.yaml"]
    # In the first session, call 1 is the evaluation, and a step makes a call each.
    sessions = [
        ("SIGTERM 2", 143, "there is no checkpoint yet (save_steps); to begin again:"),
        ("SIGINT 4", 130, "to continue after step 2, the last checkpoint:"),
        ("raise 3", 1, "to continue after step 4, the last checkpoint:"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for session, status, place in sessions:
        (tmp_path / "session").write_text(session)
        done = warm_bandpo(*words[1:], cwd=tmp_path, env=environment)
        assert done.returncode == status, done.stderr
        told, words = the_line(done.stderr)
        assert told == f"bandpo: {place}"
        assert words == shlex.split(
            "bandpo train --config 'my run/config.yaml' --output_dir 'my run' --resume_from_checkpoint latest"
        )
    assert "my bug" in done.stderr and "--resume_from_checkpoint" in done.stderr.splitlines()[-1]
    (tmp_path / "session").write_text("raise 99")
    last = warm_bandpo(*words[1:], cwd=tmp_path, env=environment)
    assert last.returncode == 0, last.stderr
    assert "step    5/6  0:0" in last.stdout
    rows = [json.loads(line) for line in Path(tmp_path, "my run", "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6] and not any("unfinished" in row for row in rows)
