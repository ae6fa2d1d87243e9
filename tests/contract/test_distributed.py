"""Two CPU processes (gloo) are one process with the same global batch, to the rounding of their sums."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RECIPE = Path(__file__).parents[2] / "recipes" / "trl" / "two_cpus.yaml"
SCRIPT = Path(__file__).parents[1] / "distributed_run.py"


def launch(tmp_path, objective, processes, **options):
    out = tmp_path / f"{processes}.pt"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    how = ["--config_file", str(RECIPE)] if processes == 2 else ["--cpu", "--num_processes", "1", "--num_machines", "1",
           "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    command = [
        sys.executable, "-m", "accelerate.commands.launch", *how, "--main_process_port", str(port), str(SCRIPT), str(out),
        str(tmp_path / f"run{processes}"),
    ]  # fmt: skip
    environment = {**os.environ, "OBJECTIVE": objective, "OPTIONS": json.dumps(options), "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": str(SCRIPT.parent)}  # fmt: skip
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["bandpo-kl", "dapo"])
def test_two_processes_are_one(tmp_path, objective):
    one, two = (launch(tmp_path, objective, n) for n in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one["logs"]) == len(two["logs"]) == 6
    for a, b in zip(one["logs"], two["logs"], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], abs=2e-4), name  # TRL logs four digits
    for name, w in one["weights"].items():
        # float32 sums of 16 sequences in another order, over six steps of rate 0.5
        torch.testing.assert_close(two["weights"][name], w, rtol=0, atol=6 * 0.5 * 16 * 2**-24 * 4)
    assert any(row["loss"] != one["logs"][0]["loss"] for row in one["logs"])


@pytest.mark.slow
def test_pruning_over_two_processes_has_one_history(tmp_path):
    found = launch(
        tmp_path, "bandpo-kl", 2, pruning={"prompts": 0.5, "completions": 0.5}, max_steps=40, num_iterations=1
    )
    one, other = found["history"]
    assert one == other and len(one) == 64  # every prompt, whichever process sampled it
    kept = [row["selection/prompts_kept"] for row in found["logs"] if "selection/prompts_kept" in row]
    assert min(kept) < 1 and all(row["selection/kept"] <= 1 for row in found["logs"])
