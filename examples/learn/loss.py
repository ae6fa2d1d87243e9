# %% [markdown]
# # 3. From log-probs to a loss
#
# *What you will learn: how sampled completions become one number to minimise: log-probs, groups, mask, aggregation. You
# need `pip install bandpo` and ten minutes.*
#
# We begin where your own loop would: with the hidden states of a model, the weight of its last layer, and completions of
# different lengths. Two prompts have two completions each; numbers drawn at random take the place of a model.

# %%
from dataclasses import replace

import torch

from bandpo import (
    OBJECTIVES,
    group_advantages,
    loss_normalizer,
    policy_loss,
    token_logprobs,
)

random = torch.Generator().manual_seed(0)
# (completions, tokens, features) and (words, features)
hidden = torch.randn(4, 6, 8, generator=random, dtype=torch.float64)
head = 0.3 * torch.randn(20, 8, generator=random, dtype=torch.float64)
head.requires_grad_()
tokens = torch.randint(20, (4, 6), generator=random)
lengths = torch.tensor([2, 6, 3, 4])
rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])

# True where a token belongs to the completion
mask = torch.arange(6) < lengths.unsqueeze(1)
logprobs = token_logprobs(hidden, head, tokens).logprobs
# as if a step had raised the tokens
old_logprobs = logprobs.detach() - 0.1 * torch.rand(4, 6, generator=random)
advantages = group_advantages(rewards, group_size=2)
print("advantages", [round(a, 3) for a in advantages.tolist()])
print("tokens that count", mask.sum(1).tolist())

# %% [markdown]
# * `token_logprobs` is log softmax at the sampled token, without keeping all logits in memory.
# * `group_advantages` compares each completion with the others of its prompt. Where all rewards of a group are equal,
#   the advantages are 0 and the group teaches nothing.
# * The mask leaves padding out. Values outside of the mask never matter, not even NaN.
#
# Now the loss. How the tokens become one number is the **aggregation**. It has nothing to do with the trust region, and
# decides how much a token of a long completion counts.


# %%
def share_of_long(aggregation: str) -> float:
    """The share of the gradient, in absolute values, of the longest completion."""
    new = logprobs.detach().requires_grad_()
    loss, _ = policy_loss(
        logprobs=new,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        objective=replace(OBJECTIVES["bandpo-kl"], aggregation=aggregation),
    )
    loss.backward()
    return (new.grad[1].abs().sum() / new.grad.abs().sum()).item()


for aggregation in ("token-mean", "seq-mean-token-mean"):
    print(
        f"{aggregation:<20} the longest completion has"
        f" {share_of_long(aggregation):.1%} of the gradient"
    )

# %% [markdown]
# With `token-mean` (DAPO) each token counts the same, so that the completion with 6 of 15 tokens has about 6/15 of
# the gradient. With `seq-mean-token-mean` (GRPO) each completion counts the same, and its tokens share about a quarter.
#
# In a training loop you would now call `loss.backward()` and the optimiser:

# %%
loss, metrics = policy_loss(
    logprobs=logprobs,
    old_logprobs=old_logprobs,
    advantages=advantages,
    mask=mask,
    objective="bandpo-kl",
)
loss.backward()
print(f"loss {loss.item():.4f}, gradient of the head {head.grad.norm().item():.4f}")
print("\n".join(f"  {name} {value.item():.4f}" for name, value in metrics.items()))

# %% [markdown]
# The metrics are tensors on the device, so that nothing waits for them until you print them. [Objectives and
# metrics](../objectives.md#metrics) has them all.
#
# ## Exercise
#
# Your batch does not fit into memory, so you split it into the first three completions and the last one, and add up
# the two losses. The sum is wrong, because each call divides by its own number of completions (`bandpo-kl` has the
# aggregation `seq-mean-token-mean`). Use the argument `normalizer` of `policy_loss`, and `loss_normalizer`, to make the
# sum of the parts equal to the loss of the whole batch.

# %% solution
whole = loss_normalizer(mask, OBJECTIVES["bandpo-kl"].aggregation)
naive, right = 0.0, 0.0
for part in (slice(0, 3), slice(3, 4)):
    batch = {
        "logprobs": logprobs[part],
        "old_logprobs": old_logprobs[part],
        "advantages": advantages[part],
        "mask": mask[part],
        "objective": "bandpo-kl",
    }
    naive += policy_loss(**batch)[0].item()
    right += policy_loss(**batch, normalizer=whole)[0].item()
print(
    f"whole batch {loss.item():.4f}, parts without a normalizer {naive:.4f}, "
    f"with it {right:.4f}"
)
assert abs(right - loss.item()) < 1e-9
