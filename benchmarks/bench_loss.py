"""policy_loss forward and backward, metrics included: the band against a fixed clip."""

from dataclasses import replace

import pytest
import torch

from bandpo import OBJECTIVES, Band, in_band, policy_loss, ratio_bounds


@pytest.mark.parametrize("mode", ["compiled", "eager"])
def test_policy_loss(mode, tokens, paired, report):
    g = torch.Generator().manual_seed(0)
    shape = (tokens // 1024, 1024)
    old = -torch.rand(shape, generator=g) * 6
    new = (old + 0.2 * torch.randn(shape, generator=g)).clamp_max(-1e-6)
    advantages = torch.randn(shape[0], 1, generator=g)
    mask = torch.rand(shape, generator=g) < 0.9

    def step(objective):
        def loss(x):
            return policy_loss(logprobs=x, old_logprobs=old, advantages=advantages, mask=mask, objective=objective)

        f = torch.compile(loss, fullgraph=True) if mode == "compiled" else loss

        def run():
            x = new.detach().requires_grad_()
            f(x)[0].backward()

        return run

    bare = replace(
        OBJECTIVES["bandpo-kl"], bounds=lambda x: Band("kl", 0.05)(x)
    )  # no Band to the metrics: no divergence
    cases = {"grpo": "grpo", "bandpo-kl": "bandpo-kl", "without its divergence statistics": bare}
    t = paired({name: step(objective) for name, objective in cases.items()})
    note = ", ".join(f"{name} {seconds / tokens * 1e9:.1f} ns a token" for name, seconds in t.items())
    report(
        f"the same without the divergence statistics, {mode}", t["without its divergence statistics"] / t["grpo"], "x"
    )
    ratio = t["bandpo-kl"] / t["grpo"]
    report(f"policy_loss bandpo-kl / grpo, {mode}", ratio, "x", "<= 1.25" if mode == "compiled" else "<= 1.6", note)


def test_mask_surrogate(tokens, paired, report):
    """The gradient of the clip alone: membership instead of bounds."""
    g = torch.Generator().manual_seed(0)
    logp = -torch.rand(tokens, generator=g) * 6
    log_ratio = 0.2 * torch.randn(tokens, generator=g)
    radius = torch.full_like(logp, 0.05)
    t = paired(
        {"solve": lambda: ratio_bounds(logp, "js", radius), "member": lambda: in_band(log_ratio, logp, "js", radius)},
        rounds=3,
    )
    report("bounds / membership with a tensor radius, JS, eager", t["solve"] / t["member"], "x")
