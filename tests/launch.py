"""A training script of this folder under `accelerate launch`, as one CPU process or by a recipe's configuration."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parent
RECIPES = TESTS.parent / "src" / "bandpo" / "recipes" / "trl"
ONE_PROCESS = (
    *("--cpu", "--num_processes", "1", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)


def launch(tmp_path, script, how, objective, **options):
    """What the script saved; `how` is what `accelerate launch` is told about the processes."""
    name = "one" if how is ONE_PROCESS else "more"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out = tmp_path / f"{name}.pt"
    arguments = ["--main_process_port", port, TESTS / script, out, tmp_path / f"run_{name}"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *how, *map(str, arguments)]
    environment = {
        **os.environ,
        "OBJECTIVE": objective,
        "OPTIONS": json.dumps(options),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    return torch.load(out, weights_only=True)
