"""First steps with bandpo: bounds, a loss, a divergence of your own, a radius from a batch."""

# %% [markdown]
# # First steps with bandpo
#
# Trust regions for LLM reinforcement learning, as bounds x surrogate x aggregation. Install with `pip install 'bandpo[plot]'`.

# %%
import torch

from bandpo import KL, Band, Clip, FDivergence, Objective, match_radius, policy_loss, radius_for, ratio_bounds
from bandpo.bounds import outside_fraction
from bandpo.plots import plot_families
from bandpo.testing import check_divergence

# %% [markdown]
# ## The interval of a token
#
# A KL ball of radius 0.05 leaves a rare token much more room than a common one; a clip of 0.2 treats them alike.

# %%
p = torch.tensor([0.001, 0.01, 0.1, 0.5, 0.9, 0.99])
lower, upper = ratio_bounds(p.log(), KL, radius=0.05)
for row in zip(p, lower, upper, strict=True):
    print("p {:.3f}: ratio from {:.3f} to {:.3f}".format(*row))

# %% [markdown]
# ## The loss
#
# Log-probs under the new and the old policy, advantages and a mask; any named objective.

# %%
generator = torch.Generator().manual_seed(0)
old = -3 * torch.rand(32, 64, generator=generator) - 0.01
new = (old + 0.2 * torch.randn(32, 64, generator=generator)).clamp(max=-1e-4).requires_grad_()
batch = {
    "logprobs": new,
    "old_logprobs": old,
    "advantages": torch.randn(32, generator=generator),
    "mask": torch.ones(32, 64),
}
for name in ("grpo", "dapo", "bandpo-kl", "cispo"):
    loss, metrics = policy_loss(**batch, objective=name)
    print(f"{name:<10} loss {loss.item():+.4f}, clipped {metrics['clip_fraction/any'].item():.3f}")

# %% [markdown]
# ## A divergence of your own
#
# One convex function; the check tests what every bound relies on.

# %%
mine = FDivergence("mine", lambda u: 2 * (1 + u) - 4 * u.sqrt())
check_divergence(mine)
loss, metrics = policy_loss(**batch, objective=Objective(bounds=Band(mine, radius=0.02)))
print(f"mine       loss {loss.item():+.4f}, clipped {metrics['clip_fraction/any'].item():.3f}")

# %% [markdown]
# ## A radius
#
# One that does what a clip you trust does, or one that clips a given share of a batch.

# %%
tokens = {
    "log_ratio": (new - old).detach(),
    "old_logprobs": old,
    "advantages": batch["advantages"].unsqueeze(1),
}
matched = match_radius("kl", like=Clip(0.2), by="outside_fraction", batch=tokens)
wanted = radius_for("kl", 0.02, tokens)
print(f"as many tokens as a clip of 0.2: radius {matched:.4f}; 2% of them: {wanted:.4f}")
print(f"check: {outside_fraction(Band(KL, wanted, max_ratio=None), tokens):.4f}")

# %%
figure = plot_families({"radius as the clip": Band(KL, matched), "radius for 2%": Band(KL, wanted)})
figure.savefig("first-steps.png", dpi=110)
print("figure: first-steps.png")
