"""FSDP2 through TRL: two CPU processes with a sharded model are one process, by the recipe's own accelerate configuration."""

import pytest
import torch

from launch import ONE_PROCESS, RECIPES, launch

TWO = ("--config_file", str(RECIPES / "fsdp2.yaml"), "--num_processes", "2", "--mixed_precision", "no")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["bandpo-kl", "bandpo-kl-soft", "troll"])
def test_a_sharded_model_trains_as_a_whole_one(tmp_path, objective):
    """`bandpo-kl` goes through TRL's clip, `bandpo-kl-soft` through our own term, `troll` through scores of our own."""
    one = launch(tmp_path, "distributed_run.py", ONE_PROCESS, objective, max_steps=3)
    two = launch(tmp_path, "fsdp2_on_cpus.py", TWO, objective, max_steps=3)
    assert (one["processes"], two["processes"]) == (1, 2)
    for a, b in zip(one["logs"], two["logs"], strict=True):
        assert a == pytest.approx(b, abs=2e-4)  # TRL logs four digits
    for name, w in one["weights"].items():
        # float32 sums of 16 sequences in another order, over three steps of rate 0.5
        torch.testing.assert_close(two["weights"][name], w, rtol=0, atol=3 * 0.5 * 16 * 2**-24 * 4)
    assert any(row["loss"] != one["logs"][0]["loss"] for row in one["logs"])
