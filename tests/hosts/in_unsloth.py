"""unsloth: its own rewriting of TRL's GRPOTrainer, before and after ours is imported; each order in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = r"""
import json, os, sys
order, host = sys.argv[1:]
from isolation import stub, without_init
import trl
pristine = trl.GRPOTrainer
if order == "bandpo first":
    import bandpo.integrations.trl.grpo as ours
without_init(host, "unsloth", "unsloth.models", "unsloth_zoo")
stub("bitsandbytes", "unsloth_zoo.device_type", "unsloth.device_type", "unsloth.kernels", "xformers", "unsloth_zoo.hf_utils")
import unsloth.device_type, unsloth_zoo, unsloth_zoo.device_type
facts = {"DEVICE_TYPE": "cuda", "DEVICE_TYPE_TORCH": "cuda", "DEVICE_COUNT": 1, "ALLOW_PREQUANTIZED_MODELS": True,
         "cuda_visible_capabilities": lambda: []}
for module in (unsloth_zoo, unsloth.device_type, unsloth_zoo.device_type):
    vars(module).update(facts)
import unsloth.models.rl as rl
rl._patch_trl_rl_trainers_impl("grpo_trainer")
if order == "unsloth first":
    import bandpo.integrations.trl.grpo as ours
from bandpo.integrations.trl import refusals
try:
    refusals.refuse_patched_loss()  # called when a trainer is made
    refused = ""
except ValueError as error:
    refused = str(error)
first = next(c for c in ours.BandGRPOTrainer.__mro__ if "_compute_loss" in vars(c))
print(json.dumps({
    "patched": trl.GRPOTrainer.__module__, "base is TRL's": pristine in ours.BandGRPOTrainer.__mro__, "refused": refused,
    "loss": first.__name__,
    "TRL's loss": pristine._compute_loss.__module__,
}))
"""


def run(order, tmp_path):
    environment = {**os.environ, "UNSLOTH_IS_PRESENT": "1", "UNSLOTH_COMPILE_LOCATION": str(tmp_path / "cache"),
                   "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}  # fmt: skip
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, order, os.environ["BANDPO_HOST"]], capture_output=True, text=True, cwd=tmp_path,
        env=environment, timeout=900,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_unsloth_before_us_is_refused(tmp_path):
    """BandGRPOTrainer is then made of unsloth's rewritten trainer, whose loss has no place for our bounds."""
    found = run("unsloth first", tmp_path)
    assert found["patched"].startswith("Unsloth") and not found["base is TRL's"]
    assert "a patched loss (unsloth?) would bypass the trust region" in found["refused"]


@pytest.mark.slow
def test_unsloth_after_us_leaves_our_trainer_alone(tmp_path):
    """unsloth puts another class under TRL's name; BandGRPOTrainer keeps TRL's own, whose loss is as it was."""
    found = run("bandpo first", tmp_path)
    assert found["patched"].startswith("Unsloth") and found["base is TRL's"] and not found["refused"]
    assert found["loss"] == "BandGRPOTrainer" and found["TRL's loss"] == "trl.trainer.grpo_trainer"
