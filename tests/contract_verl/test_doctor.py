"""What the doctor assumes of verl is what verl has."""

from pathlib import Path

import pytest

pytest.importorskip("verl", reason="verl has an environment of its own; `make test` runs this file there (.venv-verl)")

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from bandpo.doctor.verl import DEFAULTS, read_verl

RECIPES = Path(__file__).parents[2] / "recipes" / "verl" / "config"


def test_defaults_are_verl_s():
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=["actor_rollout_ref.rollout.name=vllm"])
    missing = object()
    for key, value in DEFAULTS.items():
        assert OmegaConf.select(config, key, default=missing) == value, key


@pytest.mark.parametrize("method", ["bandpo-kl", "dppo-kl", "grpo", "clip-higher", "no-clip"])
def test_a_recipe_has_the_objective_that_verl_s_worker_would_build(method):
    """Read without verl, and resolved by the plug-in from the configuration that Hydra composes."""
    from hydra import initialize_config_dir

    from bandpo.integrations.verl import BandPolicyLossConfig

    with initialize_config_dir(str(RECIPES), version_base=None):
        config = compose("paper", overrides=[f"method={method}", "data_dir=/tmp", "trainer.experiment_name=x"])
    options = {k: v for k, v in OmegaConf.to_container(config.actor_rollout_ref.actor.policy_loss, resolve=True).items()
               if k in BandPolicyLossConfig.__dataclass_fields__}  # fmt: skip
    from bandpo.integrations.verl import _resolve

    expected = _resolve(BandPolicyLossConfig(**options))
    setup = read_verl(RECIPES / "paper.yaml", [f"method={method}"])
    assert setup.objective.bounds == expected.bounds
    assert setup.objective.anchor == expected.anchor
    assert setup.old_is_rollout == config.algorithm.rollout_correction.bypass_mode
    assert setup.steps == config.data.train_batch_size / config.actor_rollout_ref.actor.ppo_mini_batch_size
