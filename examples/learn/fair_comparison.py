# %% [markdown]
# # 6. A training run, compared honestly
#
# *What you will learn: how to compare two objectives over paired seeds, how to read an interval, and what a few
# seeds can tell. You need `pip install bandpo scipy` and ten minutes.*
#
# The task: a policy over ten actions, of which the rewarded one has a probability of 0.01 at the beginning. Each rollout
# has 32 samples and is used for eight steps. We ask: is the KL band better than PPO's clip here? The task was made so
# that there is a difference to see, because a rare action must rise ([page 2](rare_tokens.md)). It does not tell what
# your task would show.

# %%
import torch

from bandpo import OBJECTIVES, policy_loss
from bandpo.statistics import t_interval, verdict

# the first action is rewarded
START = torch.tensor([0.01, *[0.11] * 9], dtype=torch.float64)


def train(objective: str, seed: int, rate: float = 1.0, rollouts: int = 15) -> float:
    """The exact chance of the rewarded action after training."""
    random = torch.Generator().manual_seed(seed)
    logits = START.log().requires_grad_()
    for _ in range(rollouts):
        old = logits.detach().log_softmax(-1)
        draws = torch.rand(32, generator=random, dtype=torch.float64)
        actions = torch.searchsorted(old.exp().cumsum(-1), draws).clamp(max=9)
        rewards = (actions == 0).double()
        for _ in range(8):
            loss, _ = policy_loss(
                logprobs=logits.log_softmax(-1)[actions].view(-1, 1),
                old_logprobs=old[actions].view(-1, 1),
                advantages=rewards - rewards.mean(),
                mask=torch.ones(32, 1),
                objective=objective,
                metrics="none",
            )
            (gradient,) = torch.autograd.grad(loss, logits)
            logits = (logits - rate * gradient).detach().requires_grad_()
    return logits.softmax(-1)[0].item()


print(f"one seed: clip {train('grpo', 0):.2f}, band {train('bandpo-kl', 0):.2f}")

# %% [markdown]
# One seed tells little. Both objectives draw the same random numbers for the same seed, so that each seed gives a
# **pair**. What luck does to both arms cancels in the difference, which makes its interval narrower. The measure is the
# exact chance of the rewarded action, so that no noise of an evaluation is added.

# %%
SEEDS = range(20)
result = {
    name: [train(name, seed) for seed in SEEDS] for name in ("grpo", "bandpo-kl")
}
differences = [
    band - clip
    for band, clip in zip(result["bandpo-kl"], result["grpo"], strict=True)
]
for count in (3, 20):
    found = t_interval(differences[:count])
    print(f"{count:>2} seeds: band - clip {found}: {verdict(found, smallest=0.02)}")

# %% [markdown]
# The brackets hold the 95% t-interval of the mean difference. `verdict` has four answers: *better* or *worse* if the
# interval excludes 0, *equivalent* if all of it is closer to 0 than the smallest effect that you care about (0.02 here,
# chosen before the run), and *undecided* otherwise. "Undecided" does not mean that there is no difference.
#
# Rules for a comparison that others can trust:
#
# 1. Choose measure, seeds, settings and the smallest effect before you look.
# 2. Tune each arm equally, on other seeds than those of the report. We tuned nothing here: both arms have the same rate,
#    so the result holds for this rate and this task alone.
# 3. Report all that you ran. With several comparisons, widen the intervals: `t_interval(..., comparisons=3)`.
#
# [The evidence](../evidence.md) is made by these rules, and `bandpo compare` does it for real tasks
# ([page](../compare.md)).
#
# ## Exercise
#
# Which half of the band makes the difference? Train `bandpo-kl-upper` and `bandpo-kl-lower` on the same seeds and
# compare each with `grpo`. There are two comparisons now: let their intervals hold together.

# %% solution
for name in ("bandpo-kl-upper", "bandpo-kl-lower"):
    assert name in OBJECTIVES
    pairs = zip((train(name, seed) for seed in SEEDS), result["grpo"], strict=True)
    found = t_interval([half - clip for half, clip in pairs], comparisons=2)
    print(f"{name} - clip {found}: {verdict(found, smallest=0.02)}")
