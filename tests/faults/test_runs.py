"""Whole runs that meet a fault: killed, a full disk, a reward that fails, rows that do not fit."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bandpo.cli import main
from command_line import bandpo

SMALL = [
    "--max_steps", "4", "--per_device_train_batch_size", "16", "--num_generations", "4", "--warm_up_steps", "100",
    "--eval_prompts", "4", "--eval_samples", "2", "--logging_steps", "1", "--save_steps", "2",
]  # fmt: skip
SAME = ("metrics.jsonl", "samples.jsonl", "evaluation.json", "model/model.safetensors", "config.yaml")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [[], ["--method", "online-dpo", "--rounds", "16", "--prompts_per_round", "64", "--max_steps", "-1"]]
)
def test_killed_at_twenty_random_times_a_run_ends_as_if_it_had_not_been(more, tmp_path):
    """SIGKILL at 20 (6 for rounds) random times, a third of them in the middle of a checkpoint; same files, byte for byte."""
    rounds = bool(more)
    steps = (
        []
        if rounds
        else ["--max_steps", "150", "--save_steps", "1", "--save_total_limit", "2", "--num_generations", "4"]
    )
    size = ["--warm_up_steps", "100", "--eval_prompts", "4", "--eval_samples", "2", "--logging_steps", "2"]
    options = ["train", *size, *steps, *more]
    if not rounds:
        options += ["--per_device_train_batch_size", "16"]
    assert bandpo(*options, "--output_dir", "whole").returncode == 0
    script = [sys.executable, str(Path(__file__).with_name("killed_runs.py")), "6" if rounds else "20", "1", *options]
    killed = subprocess.run(
        [*script, "--output_dir", "killed"], capture_output=True, text=True, check=False, timeout=900
    )
    assert killed.returncode == 0, killed.stderr[-3000:]
    assert len(re.findall("status -9", killed.stdout)) == (6 if rounds else 20)
    assert rounds or "is not used: it was not written to its end" in killed.stdout
    for name in SAME:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


def test_latest_takes_up_whatever_there_is(tmp_path, capsys):
    """Nothing yet, a damaged checkpoint, a finished run; and it says where the settings differ."""
    assert (
        main(["train", *SMALL, "--output_dir", "run", "--save_total_limit", "2", "--resume_from_checkpoint", "latest"])
        == 0
    )
    assert "run has no complete checkpoint yet: the run starts from its beginning" in capsys.readouterr().out
    before = {name: (tmp_path / "run" / name).read_bytes() for name in SAME}
    weights = tmp_path / "run" / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    changed = ["--save_total_limit", "7"]
    assert main(["train", *SMALL, *changed, "--output_dir", "run", "--resume_from_checkpoint", "latest"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"checkpoint-4 is not used: model\.safetensors has \d+ bytes instead of \d+", said)
    assert "this run began with other settings: save_total_limit 2 -> 7. It continues with the new ones" in said
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert config.startswith("# From step 2 on the run had other settings: save_total_limit 2 -> 7\n")
    assert config.partition("\n")[2] == before.pop("config.yaml").decode().replace("limit: 2", "limit: 7")
    assert before == {name: (tmp_path / "run" / name).read_bytes() for name in before}
    assert main(["train", *SMALL, "--output_dir", "run", "--resume_from_checkpoint", "run/checkpoint-2x"]) == 2


def test_latest_without_a_folder_goes_on_in_the_usual_one(tmp_path, capsys):
    options = ["train", *SMALL, "--max_steps", "2", "--resume_from_checkpoint", "latest"]
    for _ in range(2):
        assert main(options) == 0
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["bandpo-kl-countdown-seed0"]
    said = capsys.readouterr().out
    assert said.count("the run starts from its beginning") == 1
    assert "the run in runs/bandpo-kl-countdown-seed0 is finished" in said
    # killed after its last step, before the report: it makes no step too many
    folder = tmp_path / "runs" / "bandpo-kl-countdown-seed0"
    before = {name: (folder / name).read_bytes() for name in SAME}
    (folder / "report.html").unlink()
    assert main(options) == 0
    assert before == {name: (folder / name).read_bytes() for name in SAME}


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from bandpo.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_that_is_full_at_a_checkpoint_ends_with_a_message_and_loses_nothing(tmp_path):
    """A limit on the size of files stands in for the disk: the system's own error, in the middle of a checkpoint."""
    assert main(["train", *SMALL, "--output_dir", "whole"]) == 0
    options = ["train", *SMALL, "--output_dir", "run"]
    full = [sys.executable, "-c", FULL.format(limit=300_000), *options]
    result = subprocess.run(full, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 1
    assert re.search(
        r"bandpo: cannot write run/checkpoint-2 .*File too large.* MiB are free there\. There is no checkpoint",
        result.stderr,
    )
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "checkpoint-2").exists()  # what was half written takes no room
    assert main([*options, "--resume_from_checkpoint", "latest"]) == 0
    for name in SAME:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name


@pytest.mark.parametrize(("folder", "status"), [("/proc/run", 2), ("/dev/full/run", 1)])
def test_output_that_cannot_be_written_is_one_line(folder, status, capsys):
    assert main(["train", *SMALL, "--output_dir", folder]) == status
    assert folder in capsys.readouterr().err


REWARDS = """
import time
calls = 0
def odd(prompts, completions, **_):
    global calls
    calls += 1
    if calls == 4:
        time.sleep(60)
    if any(c.endswith("3") for c in completions):
        raise ValueError("one")
    return [float("nan") if c.endswith("9") else float(len(c) % 3) for c in completions]
"""


def test_a_reward_that_raises_hangs_and_gives_nan_is_counted_or_stops_the_run(tmp_path, capsys, monkeypatch):
    (tmp_path / "odd_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    options = ["train", "--task", "countdown", *SMALL, "--reward", "odd_rewards:odd", "--use_cpu", "true", "--bf16", "false",
               "--gradient_checkpointing", "false", "--reward_timeout", "0.5"]  # fmt: skip
    assert main([*options, "--output_dir", "stop"]) == 1
    error = capsys.readouterr().err
    assert re.search(
        r"bandpo: reward 'odd_rewards:odd' raised ValueError\('one'\).*kept in stop/failed_reward\.jsonl", error
    )
    assert main([*options, "--output_dir", "skip", "--reward_errors", "skip"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"left \d+ of \d+ samples unscored, \d+ of them because it failed", said)
    rows = [json.loads(line) for line in (tmp_path / "skip" / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("reward/unscored", 0) for row in rows) > 0
    assert max(row.get("reward/failed", 0) for row in rows) > 0
    assert all(row["grad_norm"] == row["grad_norm"] for row in rows)  # no NaN got into the weights
    assert "?" in (tmp_path / "skip" / "report.html").read_text()


@pytest.fixture
def model(tmp_path):
    from bandpo.toy.models import WarmUp, build_model, build_tokenizer

    tokenizer = build_tokenizer()
    build_model(WarmUp(hidden_size=16, layers=1), tokenizer).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return "tiny"


def test_rows_that_lack_something_or_do_not_fit_are_an_error_or_counted(model, tmp_path, capsys):
    rows = [{"prompt": f"{i}+1=", "answer": f"${i + 1}$"} for i in range(20)]
    rows[3]["answer"], rows[5]["prompt"], rows[7]["prompt"] = None, "", "9" * 125  # the model knows 128 positions
    Path("data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    options = ["train", "--model", model, "--dataset", "data.jsonl", "--reward", "math", "--max_steps", "1",
               "--eval_samples", "2", "--eval_prompts", "4", "--per_device_train_batch_size", "8", "--num_generations", "4",
               "--max_completion_length", "6",
               "--steps_per_generation", "2", "--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false",
               "--report_to", "none"]  # fmt: skip
    assert main([*options, "--output_dir", "a"]) == 2
    assert "1 rows have no 'prompt', the first is row 6; mend them, or set bad_rows: skip" in capsys.readouterr().err
    assert not Path("a").exists()
    assert main([*options, "--output_dir", "a", "--bad_rows", "skip"]) == 0
    said = capsys.readouterr().out
    for part in ("1 rows have no 'prompt', the first is row 6; they are left out, 19 are kept",
                 "1 rows have no 'answer', the first is row 4",
                 "prompts: 1 rows are longer than 122 tokens (window 128, max_completion_length 6), the first is"):  # fmt: skip
        assert part in said
    assert main([*options, "--output_dir", "b", "--bad_rows", "skip", "--max_completion_length", "200"]) == 2
    assert "max_completion_length=200 leaves no room" in capsys.readouterr().err


def test_an_empty_completion_has_a_reward_and_no_gradient():
    import torch

    from bandpo import policy_loss
    from bandpo.toy.tasks import TASKS, make_splits, score
    from bandpo.train.rewards import text_of
    from bandpo.train.verification import verify_one

    for task in TASKS.values():
        assert score(task.name, "", make_splits(task, 4)[1][0]["metadata"]) == 0
    assert verify_one("", "$1$") == 0
    assert text_of([]) == ""
    g = torch.Generator().manual_seed(0)
    old, advantages = -2 - torch.rand(3, 4, generator=g), torch.tensor([1.0, -1.0, 2.0])
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    for name in ("bandpo-kl", "grpo", "gspo"):
        new = (old + 1e-4).requires_grad_()
        loss, metrics = policy_loss(logprobs=new, old_logprobs=old, advantages=advantages, mask=mask, objective=name)
        loss.backward()
        assert loss.isfinite()
        assert (new.grad[1] == 0).all() and new.grad.abs().sum() > 0
        assert metrics["nonfinite_fraction"] == 0


@pytest.mark.slow
def test_a_killed_comparison_makes_only_what_is_missing(tmp_path):
    """SIGKILL in the middle, one result truncated: the second try makes what has no whole result, and no other."""
    import signal
    import time

    options = ["compare", "--preset", "smoke", "--tasks", "paths", "--objectives", "grpo,bandpo-kl", "--output", "c"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bandpo", *options], start_new_session=True, stdout=subprocess.DEVNULL
    )
    runs, began = tmp_path / "c" / "runs", time.monotonic()
    while len(list(runs.glob("*.json"))) < 2:
        assert process.poll() is None and time.monotonic() - began < 240
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {p: p.stat().st_mtime_ns for p in runs.glob("*.json")}
    damaged = sorted(kept)[0]
    damaged.write_text(damaged.read_text()[:50])
    del kept[damaged]
    again = bandpo(*options)
    assert again.returncode == 0, again.stderr
    assert f"{damaged.relative_to(tmp_path)} is damaged: the run is made again" in again.stdout
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items())
    assert json.loads(damaged.read_text())["result"]
    assert (tmp_path / "c" / "report.html").exists()
