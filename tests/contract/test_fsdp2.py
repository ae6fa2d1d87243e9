"""FSDP2 through TRL: two CPU processes with a sharded model are one process, by the recipe's own accelerate configuration."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
RECIPE = TESTS.parent / "recipes" / "trl" / "fsdp2.yaml"
ONE = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
TWO = ["--config_file", str(RECIPE), "--num_processes", "2", "--mixed_precision", "no"]


def launch(tmp_path, objective, script, how):
    out = tmp_path / f"{Path(script).stem}.pt"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", *how, "--main_process_port", str(port),
               str(TESTS / script), str(out), str(tmp_path / "run")]  # fmt: skip
    environment = {**os.environ, "OBJECTIVE": objective, "OPTIONS": json.dumps({"max_steps": 3}), "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}  # fmt: skip
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["bandpo-kl", "bandpo-kl-soft"])
def test_a_sharded_model_trains_as_a_whole_one(tmp_path, objective):
    """`bandpo-kl` goes through TRL's clip, `bandpo-kl-soft` through our own term."""
    one = launch(tmp_path, objective, "distributed_run.py", ONE)
    two = launch(tmp_path, objective, "fsdp2_on_cpus.py", TWO)
    assert (one["processes"], two["processes"]) == (1, 2)
    for a, b in zip(one["logs"], two["logs"], strict=True):
        assert a == pytest.approx(b, abs=2e-4)  # TRL logs four digits
    for name, w in one["weights"].items():
        # float32 sums of 16 sequences in another order, over three steps of rate 0.5
        torch.testing.assert_close(two["weights"][name], w, rtol=0, atol=3 * 0.5 * 16 * 2**-24 * 4)
    assert any(row["loss"] != one["logs"][0]["loss"] for row in one["logs"])
