# %% [markdown]
# # 5. A region and an objective of your own
#
# *What you will learn: how to write a trust region, a divergence and a surrogate, how the checks of `bandpo.testing` find
# a mistake, and how to use all of it in a loss. You need `pip install bandpo` and ten minutes.*
#
# A region is any function from the old log-probs to an interval of ratios, one for each token. This one limits the
# **shift** of the probability, |π - π_old| ≤ δ, the same for rare and common tokens.

# %%
import torch
from torch import Tensor

from bandpo import Band, FDivergence, Objective, RatioBounds, policy_loss
from bandpo.testing import check_bounds, check_divergence, check_surrogate


def shift(old_logprobs: Tensor, radius: float = 0.1) -> RatioBounds:
    """The probability may move by the radius, and not out of [0, 1]."""
    p = old_logprobs.detach().exp()
    return RatioBounds(
        (1 - radius / p).clamp(min=0), torch.minimum(1 + radius / p, 1 / p)
    )


check_bounds(shift)
logp = torch.linspace(-6, -0.01, 50, dtype=torch.float64)
known = Band("tv", radius=0.1, max_ratio=None)(logp)
same = all(
    torch.allclose(a, b, rtol=1e-10) for a, b in zip(shift(logp), known, strict=True)
)
print("the interval of the TV band:", same)

# %% [markdown]
# This region is known: it is the ball of the total variation, which the library has as `Band("tv")`. Compare what you
# write with something that you did not write, wherever there is such a thing.
#
# `check_bounds` tests what every region must fulfil: the interval contains 1, depends on no neighbour, and carries no
# gradient. It tells what is wrong:


# %%
def forgotten(old_logprobs: Tensor) -> RatioBounds:
    """The same with a mistake: p still carries its gradient."""
    p = old_logprobs.exp()
    return RatioBounds((1 - 0.1 / p).clamp(min=0), torch.minimum(1 + 0.1 / p, 1 / p))


try:
    check_bounds(forgotten)
except AssertionError as error:
    print("refused:", error)

# %% [markdown]
# ## A divergence
#
# For the ball of an f-divergence you need no interval: give the function f, and the library finds the bounds.

# %%
power = FDivergence("power", lambda u: (u**1.5 - 1.5 * u + 0.5) / 0.75)
check_divergence(power)
lower, upper = Band(power, radius=0.05)(torch.tensor([0.01, 0.5]).log())
print(
    "p = 0.01 and 0.5: from",
    [round(x, 3) for x in lower.tolist()],
    "to",
    [round(x, 3) for x in upper.tolist()],
)

# %% [markdown]
# ## An objective
#
# An `Objective` is a region, a **surrogate** (what happens at the edge of the interval), an aggregation and a kind of
# advantage. What you do not give has its default: the surrogate is PPO's clip.

# %%
old = torch.full((1, 4), 0.2).log()


def weights(objective: Objective | str) -> list[float]:
    """The weights of four tokens of probability 0.2 and A = +1, at four ratios."""
    new = (old + torch.tensor([[0.8, 1.2, 1.4, 1.8]]).log()).requires_grad_()
    loss, _ = policy_loss(
        logprobs=new,
        old_logprobs=old,
        advantages=torch.ones(1),
        mask=torch.ones(1, 4),
        objective=objective,
    )
    loss.backward()
    return [round(x, 2) + 0.0 for x in (-4 * new.grad[0]).tolist()]


ours = {
    "grpo": "grpo",
    "shift": Objective(bounds=shift),
    "power": Objective(bounds=Band(power)),
}
for name, objective in ours.items():
    print(f"{name:<6} weights at the ratios 0.8, 1.2, 1.4, 1.8: {weights(objective)}")

# %% [markdown]
# `objective=` of `policy_loss` and of the trainer for TRL takes such an object. The command line and verl take its import
# path, `"package.module:NAME"`. [The page on migration](../migrate_trl.md#an-objective-of-your-own) shows where it goes in
# TRL, and `examples/own_objective.py` in the repository trains with one.
#
# ## Exercise
#
# Write a surrogate that keeps a tenth of the weight outside of the interval, where the clip has 0. A surrogate is a
# function `(log_ratio, advantages, bounds)` that returns the value of each token; PPO's clip is
# `min(A·r, A·clamp(r, lower, upper))`. Check it with `check_surrogate`, and print its weights with `shift`.


# %% solution
def fades(log_ratio: Tensor, advantages: Tensor, bounds: RatioBounds) -> Tensor:
    """A·r inside, and a tenth of the slope where the clip would stop the token."""
    ratio = log_ratio.exp()
    inside = ratio.clamp(bounds.lower, bounds.upper)
    return torch.minimum(
        advantages * ratio, advantages * (inside + 0.1 * (ratio - inside))
    )


check_surrogate(fades)
print(
    "weights with a tenth outside:", weights(Objective(bounds=shift, surrogate=fades))
)
