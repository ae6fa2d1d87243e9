"""What verl's configuration may not say beside a bandpo objective, and what survives verl's reduction of metrics."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch

pytest.importorskip("verl", reason="verl has an environment of its own; `make test` runs this file there (.venv-verl)")
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.metric import reduce_metrics
from verl.workers.config import ActorConfig
from verl.workers.config.actor import PolicyLossConfig

from bandpo.integrations.options import RegionOptions
from bandpo.integrations.verl import BandPolicyLossConfig
from bandpo.integrations.verl_options import ACTOR_DEFAULTS, DUAL_CLIP, POLICY_LOSS_DEFAULTS
from batches import batch

TARGET = "bandpo.integrations.verl.BandPolicyLossConfig"


def actor(options, **fields):
    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=options, **fields)


def call(config, data=None, weights=None):
    data = data or batch(0)
    x = data["logprobs"].clone().requires_grad_()
    loss, metrics = get_policy_loss_fn(config.policy_loss.loss_mode)(
        old_log_prob=data["old_logprobs"], log_prob=x, advantages=data["advantages"].unsqueeze(1).expand(x.shape),
        response_mask=data["mask"], loss_agg_mode="token-mean", config=config, rollout_is_weights=weights,
    )  # fmt: skip
    return loss.detach(), torch.autograd.grad(loss, x)[0], metrics


def composed(*overrides):
    """As on verl's command line."""
    GlobalHydra.instance().clear()
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=["actor_rollout_ref.rollout.name=vllm", *overrides])
    return omega_conf_to_dataclass(OmegaConf.create(OmegaConf.to_container(config.actor_rollout_ref.actor.policy_loss)))


def test_the_defaults_are_verl_s():
    theirs = actor(PolicyLossConfig())
    assert {name: getattr(theirs, name) for name in ACTOR_DEFAULTS} == ACTOR_DEFAULTS
    assert {name: getattr(theirs.policy_loss, name) for name in POLICY_LOSS_DEFAULTS} == POLICY_LOSS_DEFAULTS
    assert theirs.clip_ratio_c == DUAL_CLIP


def test_options_without_the_loss_mode_do_not_train_vanilla():
    """verl's own configuration has loss_mode=vanilla: the command below used to compose, and to train without bandpo."""
    path = "actor_rollout_ref.actor.policy_loss"
    options = (f"{path}._target_={TARGET}", f"+{path}.objective=bandpo-tv", f"+{path}.radius=0.1")
    with pytest.raises(Exception, match=r"loss_mode='vanilla' would train without bandpo"):
        composed(*options)
    made = composed(*options, f"{path}.loss_mode=bandpo")
    assert (made.objective, made.radius, made.loss_mode) == ("bandpo-tv", 0.1, "bandpo")


@pytest.mark.parametrize("mode", ["vanilla", "gspo", "", "bandpo:", "bandpo-kl", "Bandpo", "xbandpo:dapo"])
def test_a_loss_mode_is_bandpo_or_bandpo_with_a_name(mode):
    with pytest.raises(ValueError, match="would train without bandpo"):
        BandPolicyLossConfig(loss_mode=mode)


@pytest.mark.parametrize(
    ("name", "value"),
    [("clip_cov_ratio", 0.1), ("clip_cov_lb", 0.5), ("clip_cov_ub", 2.0), ("kl_cov_ratio", 0.1), ("ppo_kl_coef", 0.5),
     ("dro_beta", 0.1)],
)  # fmt: skip
def test_options_of_verl_s_losses_are_not_ignored(name, value):
    words = rf"{name}={value} would be ignored"
    with pytest.raises(ValueError, match=words):
        BandPolicyLossConfig(**{name: value})
    with pytest.raises(ValueError, match=words):  # without our configuration, in the worker
        call(actor(PolicyLossConfig(loss_mode="bandpo", **{name: value})))


@pytest.mark.parametrize(
    ("objective", "fields", "words"),
    [
        ("bandpo-kl", {"tau_pos": 2.0}, r"tau_pos=2.0 would be ignored"),
        ("sapo", {"tau_neg": 2.0}, r"tau_neg=2.0 would be ignored"),
        ("bandpo-kl", {"clip_ratio": 0.1}, r"clip_ratio=0.1 would be ignored"),
        ("cfpo", {"clip_ratio_c": 10.0}, r"clip_ratio_c=10.0 would be ignored"),
        ("cispo", {"clip_ratio_c": 2.0}, r"clip_ratio_c=2.0 would be ignored"),
        ("dual-clip", {"clip_ratio_c": 10.0}, r"clip_ratio_c=10.0 would be ignored"),
        ("bandpo-kl", {"clip_ratio_c": 1.0}, r"clip_ratio_c=1.0 must be greater than 1"),
        ("bandpo-kl", {"clip_ratio_c": 0.5}, r"clip_ratio_c=0.5 must be greater than 1"),
        ("bandpo-kl", {"clip_ratio_c": float("nan")}, r"clip_ratio_c=nan must be greater than 1"),
    ],
)
def test_options_of_the_actor_are_not_ignored(objective, fields, words):
    with pytest.raises(ValueError, match=words):
        call(actor(BandPolicyLossConfig(objective=objective), **fields))


def test_truth_values_and_numbers_are_read_strictly():
    wide, narrow = (call(actor(BandPolicyLossConfig(relax=relax)))[2] for relax in ("True", "False"))
    plain = call(actor(BandPolicyLossConfig()))[2]
    assert narrow == plain != wide  # relax='False' used to relax
    assert call(actor(BandPolicyLossConfig(radius="5e-2")))[0] == call(actor(BandPolicyLossConfig(radius=0.05)))[0]
    for given, words in (
        ({"relax": "no"}, "relax='no' must be true or false"), ({"relax": 1}, "relax=1 must be true or false"),
        ({"radius": "wide"}, "radius='wide' must be a number"), ({"radius": True}, "radius=True must be a number"),
        ({"bypass_mode": "yes"}, "bypass_mode='yes' must be true or false"),
        ({"objective": "dppo-kl", "bypass_mode": "False"}, "bypass_mode is False"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            BandPolicyLossConfig(**given)
    assert BandPolicyLossConfig(objective="dppo-kl", bypass_mode="True")


def test_the_options_of_a_region_are_those_of_every_host():
    theirs = {f.name: f for f in dataclasses.fields(BandPolicyLossConfig)}
    for ours in dataclasses.fields(RegionOptions):
        assert (theirs[ours.name].default, theirs[ours.name].metadata) == (ours.default, ours.metadata)
    assert all(theirs[name].metadata["help"] for name in ("loss_mode", "objective", "bypass_mode"))
    with pytest.raises(ValueError, match="divergence_top_k=5 would be ignored"):  # used to be an unknown keyword
        BandPolicyLossConfig(divergence_top_k=5)


def test_metrics_survive_verl_s_mean_over_micro_batches():
    """Each micro-batch has the same names and finite numbers, also for a bin of p without a token."""
    data = batch(2)
    config = actor(BandPolicyLossConfig(radius=0.01))
    parts = [
        call(config, {name: x[rows] for name, x in data.items()})[2] for rows in (slice(0, 2), slice(2, 3), slice(3, 6))
    ]
    assert len({tuple(found) for found in parts}) == 1
    reduced = reduce_metrics({name: [found[name] for found in parts] for name in parts[0]})
    assert all(math.isfinite(v) for v in reduced.values())
    assert reduced["actor/band/divergence_max"] == max(found["actor/band/divergence_max"] for found in parts)
    assert reduced["actor/band/clip_fraction_by_prob_of_all/any/0.01:0.1"] > 0
    assert not any("band/band" in name for name in reduced)


def test_a_weight_that_is_nan_under_the_mask_does_not_matter():
    data = batch(1)
    weights = torch.rand(data["mask"].shape, dtype=torch.float64) + 0.5
    poisoned = weights.masked_fill(~data["mask"], torch.nan)
    config = actor(PolicyLossConfig(loss_mode="bandpo"))
    for a, b in zip(call(config, data, weights)[:2], call(config, data, poisoned)[:2], strict=True):
        assert torch.equal(a, b)


def test_how_to_see_why_a_plug_in_did_not_load(tmp_path):
    """verl swallows the error; the check of docs/verl.md shows it."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['verl.workers.config'] = None\n")
    environment = {"PYTHONPATH": f"{tmp_path}:{':'.join(p for p in sys.path if p)}", "PATH": "/usr/bin:/bin"}
    check = [sys.executable, "-c", "import bandpo.integrations.verl"]
    broken = subprocess.run(check, capture_output=True, text=True, env=environment, timeout=120)
    assert broken.returncode and "bandpo.integrations.verl needs verl >= 0.7.1" in broken.stderr
    environment["PYTHONPATH"] = ":".join(p for p in sys.path if p)
    assert subprocess.run(check, capture_output=True, env=environment, timeout=120).returncode == 0
