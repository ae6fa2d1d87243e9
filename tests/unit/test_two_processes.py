"""`bandpo train` under a launcher: two CPU processes (gloo) share one run."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29613",
        "-m",
        "bandpo",
    ]
    options = [
        "train", "--max_steps", "4", "--per_device_train_batch_size", "8", "--num_generations", "4", "--warm_up_steps", "5",
        "--eval_prompts", "7", "--eval_samples", "4", "--logging_steps", "1", "--save_steps", "2", "--output_dir", "out",
    ]  # fmt: skip
    result = subprocess.run(
        [*launch, *options], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("before training: mean@") == 1  # only the main process speaks
    folder = tmp_path / "out"
    assert json.loads((folder / "env.json").read_text())["processes"] == 2
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [s["stage"] for s in samples] == ["before"] * 7 + ["after"] * 7
    assert len({s["prompt"] for s in samples}) == 7
    assert {p.name for p in (folder / "checkpoint-4").glob("bandpo_state_*")} == {
        "bandpo_state_0.pt",
        "bandpo_state_1.pt",
    }
    assert (folder / "model" / "model.safetensors").exists()
