# %% [markdown]
# # 2. Why rare tokens are different
#
# *What you will learn: what one interval for all tokens means for a rare token, how a band differs from it, and what its
# upper and its lower half do. You need `pip install bandpo` and ten minutes.*
#
# PPO's clip [0.8, 1.2] is the same for all tokens. But a ratio of 1.2 is another step for each p: it moves a token of
# probability 0.5 to 0.6, and one of 0.001 to 0.0012. A **band** asks for something else: that the policy stays within a
# ball around the old one, for instance within 0.05 nats of KL divergence. For each token the ball leaves an interval of
# ratios, which depends on p.

# %%
import torch

from bandpo import OBJECTIVES, ratio_bounds

p = torch.tensor([0.001, 0.01, 0.1, 0.5, 0.9], dtype=torch.float64)
lower, upper = ratio_bounds(p.log(), "kl", radius=0.05)
print("      p     clip: falls to, rises to     band: falls to, rises to")
for x, a, b in zip(p, lower, upper, strict=True):
    print(
        f"{x:7.3f}     {0.8 * x:14.4f}, {1.2 * x:8.4f}"
        f"     {a * x:14.4f}, {b * x:8.4f}"
    )

# %% [markdown]
# The clip lets the rare token of 0.001 rise to 0.0012: after an update in which it led to the reward, it is still hardly
# ever sampled. The band lets it rise to about 0.05. For the common token of 0.9 the clip allows a rise above 1, which is
# no limit at all, while the band allows 0.97. (The band's lower edge of 0.0000 for the rarest token means that it may
# lose everything.)
#
# ## The two halves
#
# A band is wider than the clip for rare tokens in both directions, and the two directions have different effects. The
# **upper half** lets a rare token with A > 0 rise. The **lower half** lets a rare token with A < 0 fall. The library
# has both alone: `bandpo-kl-upper` has the clip's lower edge, and `bandpo-kl-lower` the clip's upper one.
#
# We follow one rare token (p = 0.001, beside one token of 0.999) through 2000 small steps of its own gradient, once
# with A = +1 and once with A = -1, and stop where the interval ends.


# %%
def reach(
    objective: str, advantage: float, p: float = 0.001, steps: int = 2000
) -> float:
    """The probability to which a token's own gradient moves it; rate x steps is 1."""
    old = torch.tensor([p], dtype=torch.float64).log()
    lower, upper = OBJECTIVES[objective].bounds(old)
    logits = torch.tensor([p, 1 - p], dtype=torch.float64).log()
    for _ in range(steps):
        new = logits.softmax(-1)
        ratio = new[0] / p
        if (ratio >= upper if advantage > 0 else ratio <= lower).item():
            break  # here the clip takes the gradient away
        logits += advantage * ratio / steps * (torch.tensor([1.0, 0.0]) - new)
    return new[0].item()


print("objective         A = +1    A = -1")
for name in ("grpo", "bandpo-kl", "bandpo-kl-upper", "bandpo-kl-lower"):
    print(f"{name:<16}{reach(name, 1.0):8.5f}  {reach(name, -1.0):8.5f}")

# %% [markdown]
# With the upper half open the rare token rises to 0.01 in one rollout (the paper's runs cap the ratio at 10). With the
# lower half open it falls to a third.
#
# What follows for a run? Beside one common token, a rare token that rises makes the policy more diverse, and one that
# falls makes it less so. In comparison with the clip, the upper half then raises the entropy and the lower half lowers
# it, also where the rewards are noise. [The two halves](../halves.md) has the theory with its limits, the proofs and
# the experiments, and [how to choose](../choose.md) what to do about a falling entropy.
#
# ## Exercise
#
# `Band("kl", 0.05, max_ratio=10.0)` has a cap on the ratio. Below which p does the cap, and not the ball, decide the
# upper edge? Find it to three digits with `ratio_bounds`. Then halve the radius: does the cap decide for more tokens or
# for fewer?


# %% solution
def cap_decides_below(radius: float, cap: float = 10.0) -> float:
    """The p at which the ball's upper edge is the cap: the edge falls as p grows."""
    low, high = 1e-6, 0.1
    while high / low > 1.0001:
        middle = (low * high) ** 0.5
        edge = ratio_bounds(
            torch.tensor(middle, dtype=torch.float64).log(), "kl", radius
        ).upper.item()
        low, high = (middle, high) if edge > cap else (low, middle)
    return low


for radius in (0.05, 0.025):
    print(
        f"radius {radius}: the cap decides "
        f"for p below {cap_decides_below(radius):.5f}"
    )
# A smaller ball allows less, so that it takes a rarer token before the cap is what
# limits it: for fewer tokens.
