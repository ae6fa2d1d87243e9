"""verl's KL losses are the terms that docs/kl.md says, and an objective with a KL of its own is not ignored."""

import dataclasses

import pytest
import torch

pytest.importorskip("verl", reason="verl has an environment of its own; `make test` runs this file there (.venv-verl)")
from verl.trainer.ppo.core_algos import get_policy_loss_fn, kl_penalty
from verl.workers.config import ActorConfig
from verl.workers.config.actor import PolicyLossConfig

from bandpo import KL, Band, Objective
from bandpo.integrations.verl import BandPolicyLossConfig
from bandpo.integrations.verl_options import KL_DEFAULTS, KL_OF
from bandpo.reference import reference_kl
from batches import batch

OWN = Objective(bounds=Band(KL, 0.05), kl_coef=0.01, kl="k3-unbiased", name="mine")
RATIO = dataclasses.replace(OWN, kl="k3-ratio")


def actor(options, **fields):
    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=options, **fields)


def call(config):
    data = batch(0)
    x = data["logprobs"].clone().requires_grad_()
    loss, _ = get_policy_loss_fn("bandpo")(
        old_log_prob=data["old_logprobs"], log_prob=x, advantages=data["advantages"].unsqueeze(1).expand(x.shape),
        response_mask=data["mask"], loss_agg_mode="token-mean", config=config, rollout_is_weights=None,
    )  # fmt: skip
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def both(function):
    x = batch(2)["logprobs"].clone().requires_grad_()
    value = function(x, batch(2)["old_logprobs"])
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def test_the_defaults_are_verl_s():
    theirs = actor(PolicyLossConfig())
    assert {name: getattr(theirs, name) for name in KL_DEFAULTS} == KL_DEFAULTS


@pytest.mark.parametrize("kind", KL_OF)
def test_verl_s_terms_are_those_of_the_table(kind):
    try:
        theirs = both(lambda new, ref: kl_penalty(new, ref, kind))
    except NotImplementedError:  # the forms with a plus are new in verl 0.8
        pytest.skip(f"this verl has no {kind}")
    ours = both(lambda new, ref: reference_kl(new, ref, KL_OF[kind]))
    inside = ours[0] < 10 if "k3" in KL_OF[kind] else torch.ones_like(ours[0], dtype=torch.bool)
    assert inside.float().mean() > 0.8
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a[inside], b[inside], rtol=1e-9, atol=1e-12)


def test_verl_s_clamp_takes_the_gradient_of_a_plain_k3_away():
    new = torch.tensor([-4.0], requires_grad=True)
    (theirs,) = torch.autograd.grad(kl_penalty(new, torch.tensor([-0.1]), "low_var_kl").sum(), new)
    (ours,) = torch.autograd.grad(reference_kl(new, torch.tensor([-0.1]), "k3").sum(), new)
    assert theirs == 0 and ours < -40


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("bandpo-kl-paper", {}, r"kl_coef=0.001, kl='k3'.*use_kl_loss=False.*set actor_rollout_ref.actor.use_kl_loss=True"),
        ("bandpo-kl-paper", {"use_kl_loss": True, "kl_loss_coef": 0.01}, r"kl_loss_coef=0.01.*kl_loss_coef=0.001"),
        ("bandpo-kl-paper", {"use_kl_loss": True, "kl_loss_type": "low_var_kl+"}, r"kl_loss_type=low_var_kl,"),
        (f"{__name__}:OWN", {"use_kl_loss": True, "kl_loss_coef": 0.01}, r"kl_loss_type=low_var_kl\+"),
        (f"{__name__}:RATIO", {"use_kl_loss": True, "kl_loss_coef": 0.01}, r"no kl_loss_type of verl computes"),
    ],
)  # fmt: skip
def test_an_objective_s_kl_needs_that_of_verl(name, fields, words):
    with pytest.raises(ValueError, match=words):
        call(actor(BandPolicyLossConfig(objective=name), **fields))


def test_with_verl_s_options_it_trains():
    """The dual clip of the paper's runs is the objective's; the KL is added by verl, after this loss."""
    paper = actor(BandPolicyLossConfig(objective="bandpo-kl-paper"), use_kl_loss=True)
    plain = actor(BandPolicyLossConfig(), clip_ratio_c=10.0)
    for a, b in zip(call(paper), call(plain), strict=True):
        assert torch.equal(a, b)
    own = actor(
        BandPolicyLossConfig(objective=f"{__name__}:OWN"), use_kl_loss=True, kl_loss_coef=0.01, kl_loss_type="k3+"
    )
    assert call(own)[0].isfinite()
