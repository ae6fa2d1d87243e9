# %% [markdown]
# # 4. When a region cannot act
#
# *What you will learn: how often a region acts with one step for each rollout, with more, and with samples of an older
# policy; and how to let the doctor read the metrics. You need `pip install bandpo` and ten minutes.*
#
# The ratio compares the policy in training with the one that sampled. At the first step on a rollout the two are the
# same, so that all ratios are 1 and no region can act. This page makes a tiny run to see it: a policy over ten actions,
# of which one is rewarded.

# %%
import textwrap

import torch

from bandpo import policy_loss
from bandpo.doctor import examine


def train(
    steps_per_rollout: int, lag: int = 0, rate: float = 1.0, rollouts: int = 30
) -> list[dict[str, float]]:
    """Metrics of each rollout; `lag` is the age of the sampler, in rollouts."""
    random = torch.Generator().manual_seed(0)
    logits = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    history, rows = [], []
    for _ in range(rollouts):
        history.append(logits.detach().clone())
        sampler = history[-1 - min(lag, len(history) - 1)].log_softmax(-1)
        actions = torch.multinomial(
            sampler.exp(), 64, replacement=True, generator=random
        )
        rewards = (actions == 3).double()
        for _ in range(steps_per_rollout):
            logprobs = logits.log_softmax(-1)
            loss, metrics = policy_loss(
                logprobs=logprobs[actions].view(64, 1),
                old_logprobs=sampler[actions].view(64, 1),
                advantages=rewards - rewards.mean(),
                mask=torch.ones(64, 1),
                objective="grpo",
            )
            (gradient,) = torch.autograd.grad(loss, logits)
            with torch.no_grad():
                logits -= rate * gradient
        # those of the last step on the rollout
        row = {name: value.item() for name, value in metrics.items()}
        row["entropy"] = -(logprobs.exp() * logprobs).sum().item()
        row["reward"] = rewards.mean().item()
        rows.append(row)
    return rows


def mean(rows: list[dict[str, float]], name: str) -> float:
    """The mean of a metric over the rollouts."""
    return sum(row[name] for row in rows) / len(rows)


for label, options in {
    "one step for each rollout": {"steps_per_rollout": 1},
    "4 steps for each rollout": {"steps_per_rollout": 4},
    "one step, 3 rollouts late": {"steps_per_rollout": 1, "lag": 3},
}.items():
    rows = train(**options)
    print(
        f"{label:<26} clipped {mean(rows, 'clip_fraction/any'):6.1%}"
        f"   reward at the end {rows[-1]['reward']:.2f}"
    )

# %% [markdown]
# With one step for each rollout the clip fraction is exactly 0: whichever region you choose, you get the same plain
# policy gradient. We call such a region **inert**. Reusing a rollout for more steps lets it act, and so does a sampler
# that lags behind, as in asynchronous training.
#
# One step is also the default of TRL. [Concepts](../concepts.md#when-a-region-cannot-act) has the settings of each host,
# and the **doctor** finds an inert region before you pay for the run. Here are the settings of a verl run:

# %%
settings = {
    "data": {"train_batch_size": 1024},
    "actor_rollout_ref": {"actor": {"ppo_mini_batch_size": 1024, "ppo_epochs": 1}},
}
for finding in examine(settings):
    if finding.rule == "inert":
        told = (
            f"{finding.level}: {finding.seen}",
            f"why: {finding.cause}",
            f"set: {finding.knob}",
        )
        print(
            "\n".join(textwrap.fill(x, 84, subsequent_indent="     ") for x in told)
        )

# %% [markdown]
# ## Reading a log
#
# The doctor also reads the metrics of a run. These are the rows of a run whose steps are too large:

# %%
for finding in examine(train(steps_per_rollout=8, rate=6.0)):
    if finding.level in ("warning", "problem"):
        print(f"{finding.level}: {finding.rule}: {finding.seen}")

# %% [markdown]
# `bandpo doctor FILE` prints the same from the shell, for configurations and logs of many hosts
# ([the doctor's page](../doctor.md)). [The page of rules](../rules.md) has the healthy range of each metric.
#
# ## Exercise
#
# Change one number in `settings` so that the region can act, and let `examine` confirm it. How many optimiser steps
# does each rollout get then? There are two ways.

# %% solution
for change in (
    {"ppo_mini_batch_size": 256, "ppo_epochs": 1},
    {"ppo_mini_batch_size": 1024, "ppo_epochs": 2},
):
    found = examine(
        {"data": {"train_batch_size": 1024}, "actor_rollout_ref": {"actor": change}}
    )
    seen = next(f"{f.level}: {f.seen}" for f in found if f.rule == "inert")
    print(textwrap.fill(seen, 84, subsequent_indent="    "))
