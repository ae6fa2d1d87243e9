"""Two CPU processes (gloo) are one process with the same global batch, to the rounding of their sums."""

import pytest
import torch

from launch import ONE_PROCESS, RECIPES, launch

SCRIPT = "distributed_run.py"
TWO = ("--config_file", str(RECIPES / "two_cpus.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["bandpo-kl", "dapo", "bapo"])
def test_two_processes_are_one(tmp_path, objective):
    # bapo looks at the micro-batch, which is 16 sequences on two ranks together: also on one.
    of_one = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "steps_per_generation": 1}
    one = launch(tmp_path, SCRIPT, ONE_PROCESS, objective, **(of_one if objective == "bapo" else {}))
    two = launch(tmp_path, SCRIPT, TWO, objective)
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
    pruning = {"prompts": 0.5, "completions": 0.5}
    found = launch(tmp_path, SCRIPT, TWO, "bandpo-kl", pruning=pruning, max_steps=40, num_iterations=1)
    one, other = found["history"]
    assert all(torch.equal(one[name], other[name]) for name in ("keys", "scores"))
    assert len(one["keys"]) == 64  # every prompt, whichever process sampled it
    kept = [row["selection/prompts_kept"] for row in found["logs"] if "selection/prompts_kept" in row]
    assert min(kept) < 1 and all(row["selection/kept"] <= 1 for row in found["logs"])
