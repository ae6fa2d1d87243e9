"""torchtune: its GRPO recipe's call, and its own losses where the source is at hand."""

import dataclasses
import sys

import cases
import pytest
import torch
from records import SOURCE, own_source

from bandpo import Clip, Objective
from bandpo.integrations.torchtune import BandLoss


def call(loss_fn, data):
    """As grpo_step calls it, with one advantage for a sequence."""
    x = data["logprobs"].clone().requires_grad_()
    out = loss_fn(data["old_logprobs"], x, data["ref_logprobs"], data["advantages"][:, 0], padding_masks=data["mask"])
    (gradient,) = torch.autograd.grad(out[0], x)
    return (out[0].detach(), gradient), out[1:]


def example(seed, poison=True):
    data = cases.mini_batch(seed, poison=poison)
    a = torch.randn(cases.B, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {**data, "advantages": a.expand(cases.B, cases.T)}


@pytest.mark.parametrize("objective", cases.OBJECTIVES)
def test_it_is_policy_loss_with_the_objective_s_own_aggregation(objective):
    data = example(1)
    found, rest = call(BandLoss(objective), data)
    loss_fn = BandLoss(objective)
    cases.same(found, cases.wanted(data, objective, loss_fn.objective.aggregation))
    assert len(rest) == 4 and all(x.dim() == 0 and x.isfinite() and not x.requires_grad for x in rest)
    torch.testing.assert_close(rest[0], -found[0])


def test_options_reach_the_objective_and_wrong_ones_are_refused():
    assert BandLoss("bandpo-tv", radius=0.2).objective.bounds.radius == 0.2
    assert BandLoss("dr_grpo", max_length=128).max_length == 128
    for given, words in (
        ({"objective": "dapo", "radius": 0.1}, r"radius=0\.1 would be ignored"),
        ({"objective": "dppo-kl", "max_length": 9}, "log-probs of the sampler; torchtune does not give"),
        ({"objective": "icepop"}, "sampler beside the old ones"),
        ({"objective": "dr_grpo"}, "max_length=None with objective 'dr_grpo'"),
        ({"max_length": 9}, "max_length=9 with objective 'bandpo-kl'"),
    ):
        with pytest.raises(ValueError, match=words):
            BandLoss(**given)


def test_the_kl_term():
    """Ours is torchtune's: exp(x) - x - 1 at x = log π_ref - log π."""
    data = example(2, poison=False)
    plain, with_kl = (call(BandLoss("dapo", kl_coeff=c, kl="k3"), data) for c in (0.0, 0.3))
    x = data["ref_logprobs"] - data["logprobs"]
    kl = ((x.exp() - x - 1) * data["mask"]).sum() / data["mask"].sum()
    torch.testing.assert_close(with_kl[0][0], plain[0][0] + 0.3 * kl)
    torch.testing.assert_close(with_kl[1][1], kl)
    r = (data["logprobs"] - data["old_logprobs"]).exp()
    default = call(BandLoss("dapo", kl_coeff=0.3), data)
    weighted = (r * (x.exp() - x - 1) * data["mask"]).sum() / data["mask"].sum()
    torch.testing.assert_close(default[0][0], plain[0][0] + 0.3 * weighted)
    gradient = default[0][1] - plain[0][1]
    torch.testing.assert_close(gradient, torch.where(data["mask"] != 0, -0.3 * r * x, 0.0) / data["mask"].sum())
    torch.testing.assert_close(default[1][1], kl)
    paper = BandLoss("bandpo-kl-paper")
    cases.same(
        call(paper, data)[0],
        call(BandLoss(dataclasses.replace(paper.objective, kl_coef=0.0), kl_coeff=0.001, kl="k3"), data)[0],
    )
    with pytest.raises(ValueError, match="kl: got 'k9'"):
        BandLoss("dapo", kl="k9")


@pytest.mark.skipif(not SOURCE, reason="BANDPO_SOURCE names no checkout of torchtune")
def test_with_a_clip_it_is_torchtune_s_own():
    if "torchtune" not in sys.modules:
        own_source(SOURCE, ("torchtune", "torchtune.dev", "torchtune.dev.grpo", "torchtune.rlhf"), ("torchao",))
        import torchtune.rlhf
        from torchtune.rlhf import rewards

        torchtune.rlhf.__dict__.update({n: x for n, x in vars(rewards).items() if n.startswith("masked")})
    from torchtune.dev.grpo.loss import GRPOLoss

    data = example(3, poison=False)
    theirs = call(GRPOLoss(epsilon=0.2, kl_coeff=0.1), data)
    ours = call(BandLoss("dapo", epsilon_high=0.2, kl_coeff=0.1, kl="k3"), data)
    cases.same(ours[0], theirs[0], 1e-7)
    torch.testing.assert_close(ours[1][0], theirs[1][0], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(ours[1][1], theirs[1][1], rtol=1e-7, atol=1e-9)


def test_a_compiled_loss_trains_with_a_surrogate_without_a_mark():
    """Its share of clipped tokens is not known there, and only that is NaN."""
    objective = Objective(bounds=Clip(), surrogate=lambda x, a, b: x.clamp(max=0.1).exp() * a)
    data = {name: x.float() if x.is_floating_point() else x for name, x in example(3, poison=False).items()}
    compiled = torch.compile(BandLoss(objective), backend="eager", fullgraph=True)
    found, rest = call(compiled, data)
    cases.same(found, call(BandLoss(objective), data)[0])
    assert rest[-1].isnan() and all(x.isfinite() for x in rest[:-1])
