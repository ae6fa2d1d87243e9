# %% [markdown]
# # 1. One token, one ratio, one clip
#
# *What you will learn: what the ratio of a token is, what PPO's clip does to the gradient of the token, and what a clip
# does not do. You need `pip install bandpo` and ten minutes.*
#
# A language model samples a token with probability p under the **old** policy. Then we change the weights, and the same
# token has another probability. The **ratio** r is the new probability over the old one. The **advantage** A tells
# whether the completion was better (A > 0) or worse (A < 0) than the others of its prompt. A policy gradient without a
# clip adds A · r · ∇log π for each token. The function below measures the factor in front of ∇log π for one token of
# probability 0.25. We call it the **weight** of the token.

# %%
import torch

from bandpo import policy_loss

old = torch.tensor([[0.25]]).log()  # (batch, time): one completion of one token


def weight(ratio: float, advantage: float, objective: str = "grpo") -> float:
    """The factor in front of ∇log π; `policy_loss` is minimised, hence the minus."""
    new = (old + torch.tensor(ratio).log()).requires_grad_()
    loss, _ = policy_loss(
        logprobs=new,
        old_logprobs=old,
        advantages=torch.tensor([advantage]),
        mask=torch.ones(1, 1),
        objective=objective,
    )
    loss.backward()
    return -new.grad.item() + 0.0  # no minus sign before a zero


print("ratio   A = +1   A = -1")
for ratio in (0.7, 0.9, 1.0, 1.1, 1.3):
    print(f"{ratio:5.1f}  {weight(ratio, 1.0):7.1f}  {weight(ratio, -1.0):7.1f}")

# %% [markdown]
# Read the table row by row. The objective `grpo` has PPO's clip, whose interval is [0.8, 1.2].
#
# * Inside of the interval the weight is A · r.
# * A good token (A = +1) that has risen to 1.3 gets no more gradient: it was pushed far enough.
# * A good token that has fallen to 0.7 keeps its gradient, because this gradient pulls it back. For a bad token (A = -1)
#   it is the other way round. A clip only ever stops a token on the side to which its advantage pushes.
#
# ## A clip is not a wall
#
# Now we let the token take steps. The policy is a softmax over four tokens of probability 0.25 each, and we sampled the
# first one, with A = +1.


# %%
def ratios(rate: float, steps: int, advantage: float = 1.0) -> list[float]:
    """The ratio of the sampled token after each step of plain gradient descent."""
    logits, found = torch.zeros(4, requires_grad=True), []
    for _ in range(steps):
        loss, _ = policy_loss(
            logprobs=logits.log_softmax(-1)[:1].view(1, 1),
            old_logprobs=old,
            advantages=torch.tensor([advantage]),
            mask=torch.ones(1, 1),
            objective="grpo",
        )
        (gradient,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= rate * gradient
        found.append(logits.softmax(-1)[0].item() / 0.25)
    return found


for rate in (0.1, 0.3, 1.0):
    print(f"rate {rate}:", " ".join(f"{r:.2f}" for r in ratios(rate, steps=5)))

# %% [markdown]
# With the rate 0.1 the ratio passes 1.2 in the third step and then stays: the gradient is gone. With the rate 1.0 the
# first step alone takes it to about 1.9. Nothing brings it back, because the clip removes a gradient and adds none. A
# clip therefore limits how far a token moves only if single steps are small. Momentum, and the gradients of other
# tokens, can move it as well ([measured](../theory.md#own-gradient)).
#
# ## Exercise
#
# The objective `dapo` is known as Clip-Higher: its interval has another upper edge. Use `weight` to find both edges,
# to two decimals, without reading its formula. Which side of which advantage do you have to look at?

# %% solution
# An upper edge stops tokens with A > 0, a lower edge stops tokens with A < 0.
grid = [i / 1000 + 0.0005 for i in range(500, 1500)]
upper = max(r for r in grid if weight(r, 1.0, "dapo") != 0)
lower = min(r for r in grid if weight(r, -1.0, "dapo") != 0)
print(
    f"dapo: the weight is 0 below {lower:.2f} for A < 0, "
    f"and above {upper:.2f} for A > 0"
)
