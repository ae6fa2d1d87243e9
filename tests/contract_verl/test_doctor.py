"""What the doctor assumes of verl is what verl has."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("verl", reason="verl has an environment of its own; `make test` runs this file there (.venv-verl)")

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from bandpo.doctor import examine_setup
from bandpo.doctor.verl import _ALONE, _NO_GROUPS, DEFAULTS, read_verl

RECIPES = Path(__file__).parents[2] / "src" / "bandpo" / "recipes" / "verl" / "config"


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

    expected = BandPolicyLossConfig(**options).resolve()
    setup = read_verl(RECIPES / "paper.yaml", [f"method={method}"])
    assert not setup.refused
    assert setup.objective.bounds == expected.bounds
    assert setup.objective.anchor == expected.anchor
    assert setup.old_is_rollout == config.algorithm.rollout_correction.bypass_mode
    assert setup.steps == config.data.train_batch_size / config.actor_rollout_ref.actor.ppo_mini_batch_size


@pytest.mark.parametrize("estimator", [*_ALONE, *_NO_GROUPS])
def test_what_a_group_of_one_does_is_what_verl_s_estimator_does(estimator, tmp_path):
    """A problem where advantages are 0 or verl refuses; a warning at most where the reward itself teaches."""
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    path = tmp_path / "run.sh"
    path.write_text(
        f"python -m verl.trainer.main_ppo algorithm.adv_estimator={estimator} actor_rollout_ref.rollout.n=1\n"
    )
    found = [f for f in examine_setup(read_verl(path)) if f.rule == "group"]
    if estimator in _NO_GROUPS:
        assert not found
        return
    [finding] = found
    if estimator == "gdpo":  # it takes several rewards by name: not called here
        return
    rewards = torch.zeros(6, 3)
    rewards[:, -1] = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 3.0])
    arguments = {"token_level_rewards": rewards.clone(), "response_mask": torch.ones(6, 3), "index": np.arange(6)}
    try:
        advantages, _ = get_adv_estimator_fn(estimator)(**arguments, config={})
    except ValueError:
        assert finding.level == "problem" and "refuses" in finding.cause
        return
    silent = not advantages.any()
    assert ("0" in finding.cause.split()) == silent, (estimator, advantages)
