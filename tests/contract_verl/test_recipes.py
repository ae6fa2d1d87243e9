"""The recipes compose with verl's own schema, differ where they should, and their losses can be called."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("verl", reason="verl has an environment of its own; `make test` runs this file there (.venv-verl)")
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf, open_dict
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import ActorConfig, RolloutConfig

from bandpo.integrations.verl import BandPolicyLossConfig
from batches import batch

RECIPES = Path(__file__).parents[2] / "src" / "bandpo" / "recipes" / "verl"
METHODS = sorted(p.stem for p in (RECIPES / "config" / "method").iterdir())
MODELS = sorted(p.stem for p in (RECIPES / "config" / "model").iterdir())


def recipe(*overrides):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(RECIPES / "config"), version_base=None):
        config = compose("paper", overrides=list(overrides), return_hydra_config=True)
    from hydra.core.hydra_config import HydraConfig

    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    return config


def plain(config):
    return OmegaConf.to_container(config, resolve=True)


def differences(a, b, path=""):
    if isinstance(a, dict) and isinstance(b, dict):
        return {p for k in a.keys() | b.keys() for p in differences(a.get(k), b.get(k), f"{path}.{k}" if path else k)}
    return set() if a == b else {path}


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_is_verl_s_and_its_loss_runs(method):
    config = recipe(f"method={method}", "seed=3")
    assert config.trainer.experiment_name == f"{method}-qwen2.5-3b-seed3"
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert isinstance(actor, ActorConfig) and isinstance(actor.policy_loss, BandPolicyLossConfig)
    assert isinstance(omega_conf_to_dataclass(config.actor_rollout_ref.rollout), RolloutConfig)
    assert isinstance(omega_conf_to_dataclass(config.algorithm), AlgoConfig)
    actor.validate(8, config.data.train_batch_size)
    data = batch(0, spread=1.0)
    x = data["logprobs"].clone().requires_grad_()
    loss, metrics = get_policy_loss_fn(actor.policy_loss.loss_mode)(
        old_log_prob=data["old_logprobs"], log_prob=x, advantages=data["advantages"].unsqueeze(1).expand(x.shape),
        response_mask=data["mask"], loss_agg_mode=actor.loss_agg_mode, config=actor, rollout_is_weights=None,
    )  # fmt: skip
    loss.backward()
    assert torch.isfinite(x.grad).all()
    if method != "no-clip":
        assert metrics["actor/band/clip_fraction/any"] > 0
    else:
        assert metrics["actor/band/clip_fraction/any"] == 0


def test_methods_differ_in_their_region_alone():
    base = plain(recipe("method=grpo", "trainer.experiment_name=x"))
    for method in METHODS:
        changed = differences(base, plain(recipe(f"method={method}", "trainer.experiment_name=x")))
        allowed = {"algorithm.rollout_correction.bypass_mode", "actor_rollout_ref.actor.clip_ratio_c"}
        assert all(p in allowed or p.startswith("actor_rollout_ref.actor.policy_loss.") for p in changed), changed
        assert ("algorithm.rollout_correction.bypass_mode" in changed) == method.startswith("dppo")


@pytest.mark.parametrize("model", MODELS)
def test_models_differ_in_their_path_alone(model):
    base, other = (plain(recipe(f"model={m}", "trainer.experiment_name=x")) for m in ("qwen2.5-3b", model))
    where = {"actor_rollout_ref.model.path", "actor_rollout_ref.rollout.prometheus.served_model_name"}
    assert differences(base, other) == (set() if model == "qwen2.5-3b" else where)


def test_the_paper_s_numbers():
    config = recipe("seed=7")
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert (config.data.train_batch_size, rollout.n, actor.ppo_mini_batch_size, actor.ppo_epochs) == (256, 16, 64, 1)
    assert (config.data.max_prompt_length, config.data.max_response_length) == (1024, 4096)
    assert (actor.optim.lr, actor.optim.weight_decay, actor.grad_clip, actor.entropy_coeff) == (1e-6, 0.01, 1.0, 0)
    assert (actor.use_kl_loss, actor.kl_loss_coef, actor.kl_loss_type) == (True, 0.001, "low_var_kl")
    assert (actor.loss_agg_mode, actor.clip_ratio_c) == ("seq-mean-token-mean", 10.0)
    assert (rollout.temperature, rollout.top_p, rollout.val_kwargs.n) == (1.0, 1.0, 32)
    assert (config.algorithm.adv_estimator, config.trainer.total_epochs, config.trainer.test_freq) == ("grpo", 10, 5)
    assert {config.data.seed, actor.data_loader_seed, rollout.seed, actor.fsdp_config.seed} == {7}


def test_nothing_unknown_passes():
    with pytest.raises(ConfigCompositionException, match="raduis"):
        recipe("actor_rollout_ref.actor.policy_loss.raduis=0.1")
    config = recipe("+actor_rollout_ref.actor.policy_loss.raduis=0.1")
    with pytest.raises(Exception, match="unexpected keyword argument 'raduis'"):
        omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    with pytest.raises(Exception, match="method/ppo"):
        recipe("method=ppo")
    dppo = recipe("method=dppo-kl", "algorithm.rollout_correction.bypass_mode=False")
    with pytest.raises(Exception, match=r"algorithm\.rollout_correction\.bypass_mode=True"):
        omega_conf_to_dataclass(dppo.actor_rollout_ref.actor)


def test_rows_of_the_data_script():
    spec = importlib.util.spec_from_file_location("prepare_data", RECIPES / "prepare_data.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    row = script.convert(
        {"problem": " 1+1? ", "level": "Level 5", "solution": r"So \boxed{\frac{4}{2}} ."}, "math", 0, "train"
    )
    assert row["reward_model"]["ground_truth"] == r"\frac{4}{2}"
    assert row["prompt"][0]["content"].startswith("1+1?\n\n")
    assert row["data_source"] == "math_dapo"
    assert script.convert({"problem": "1+1?", "level": "Level 2", "solution": r"\boxed{2}"}, "math", 0, "train") is None
    assert script.convert({"problem": "1+1?", "solution": r"\boxed{2"}, "math", 0, "train") is None
    held_out = script.convert({"prompt": "x?", "answer": 33}, "aime_2025", 1, "test")
    assert (held_out["data_source"], held_out["reward_model"]["ground_truth"]) == ("aime_2025", "33")
    assert script.key(row) == script.key(script.convert({"prompt": "1 + 1?", "answer": "2"}, "dapo", 0, "train"))
    with pytest.raises(KeyError, match="has the dataset changed"):
        script.convert({"text": "x"}, "math", 0, "train")
    from verl.utils.reward_score import default_compute_score

    right = default_compute_score("aime_2025", "so it is\nAnswer: 33", "33")
    assert (right["score"] if isinstance(right, dict) else right) == 1.0
