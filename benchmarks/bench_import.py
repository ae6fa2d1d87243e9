"""The import of the package beside that of torch."""

import os
import subprocess
import sys

import pytest


def children_seconds():
    """CPU seconds of the processes that ended."""
    spent = os.times()
    return spent.children_user + spent.children_system


@pytest.mark.full_only
def test_import(paired, report):
    """Each in a process of its own, less what an empty one takes."""

    def python(source):
        return lambda: subprocess.run([sys.executable, "-c", source], check=True)

    cases = {
        "nothing": "pass",
        "torch": "import torch",
        "bandpo": "import bandpo",
        "policy_loss": "from bandpo import policy_loss",
    }
    t = paired({name: python(source) for name, source in cases.items()}, rounds=3, clock=children_seconds)
    for what, name, target in (
        ("import bandpo / import torch", "bandpo", "<= 0.1"),
        ("from bandpo import policy_loss / import torch", "policy_loss", "<= 1.1"),
    ):
        beyond = [s - t["nothing"] for s in (t[name], t["torch"])]
        report(what, beyond[0] / beyond[1], "x", target, f"{beyond[0]:.2f} against {beyond[1]:.2f} s of CPU time")
