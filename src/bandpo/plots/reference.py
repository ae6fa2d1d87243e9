"""The figure of docs/kl.md: the expected gradient of each KL term against that of KL(π ‖ π_ref)."""

from typing import get_args

import torch
from torch import Tensor

from bandpo.plots.figures import BLUE, GREEN, ORANGE, STYLE, Figure, mpl, plt
from bandpo.reference import ReferenceKL, reference_kl

POLICIES = {
    "π": (0.26, 0.16, 0.32, 0.19, 0.07),
    "π_ref": (0.18, 0.27, 0.13, 0.22, 0.20),
    "π_old": (0.10, 0.30, 0.15, 0.15, 0.30),
}
"""Probabilities of the five actions of the figure."""


def expected_gradient(kl: ReferenceKL, policy: Tensor, reference: Tensor, behaviour: Tensor) -> Tensor:
    """Expected gradient of a KL term by the logits of a softmax policy, as an exact sum over its actions.

    Args:
        kl: Name of the term.
        policy: Probabilities of the actions under the policy in training, `(actions,)`, float.
        reference: The same under the reference.
        behaviour: The same under the policy that the tokens are drawn from; all positive.

    Returns:
        `(actions,)`, in nats.

    Examples:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.8, 0.2])
        >>> expected_gradient("k3", p, q, p)  # of KL(π_ref ‖ π), π - π_ref
        tensor([-0.3000,  0.3000])
    """
    theta = policy.log().requires_grad_()
    term = reference_kl(theta.log_softmax(0), reference.log(), kl, old_logprobs=behaviour.log())
    (gradient,) = torch.autograd.grad((behaviour * term).sum(), theta)
    return gradient


def plot_reference_kl() -> Figure:
    """The nine KL terms on five actions, for tokens of the policy and of an older one; the bars are the gradient of the KL."""
    new, ref, old = (torch.tensor(p, dtype=torch.float64) for p in POLICIES.values())
    gap = (new / ref).log()
    true = new * (gap - (new * gap).sum())
    with mpl.rc_context(STYLE):
        figure, grid = plt.subplots(3, 2, figsize=(8.6, 7.2), sharex=True, sharey=True, layout="constrained")
        for row, (suffix, kind) in enumerate((("", "plain"), ("-unbiased", "unbiased"), ("-ratio", "with the ratio"))):
            for column, (tokens, behaviour) in enumerate((("tokens of π", new), ("tokens of π_old", old))):
                axes = grid[row, column]
                axes.bar(range(5), true.tolist(), 0.8, color="#dcdcdc", label="∇KL(π ‖ π_ref)")
                for i, (name, colour, marker) in enumerate(
                    (("k1", BLUE, "v"), ("k2", GREEN, "s"), ("k3", ORANGE, "o"))
                ):
                    kl = next(x for x in get_args(ReferenceKL) if x == name + suffix)
                    found = expected_gradient(kl, new, ref, behaviour)
                    at = [a + 0.22 * (i - 1) for a in range(5)]
                    axes.plot(at, found.tolist(), ls="", marker=marker, ms=6, color=colour, label=name)
                axes.axhline(0, color="#222222", lw=0.6)
                axes.set_title(f"{kind}, {tokens}", fontsize=10)
                axes.set_xticks(range(5), [f"action {a + 1}" for a in range(5)])
                axes.grid(visible=False, axis="x")
            grid[row, 0].set_ylabel("expected gradient\nby the logit, nats")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    return figure
