"""Deterministic PPO-Clip on a small MDP: how fast it converges, and where it does not (arXiv:2512.16565).

    python examples/tabular_ppo_clip.py [FIGURE]

Prints the distance to the optimal regularised value along each run, and draws it.
"""

import sys

import torch

from bandpo import KL, Band, Clip
from bandpo.lab.experiments.tabular import Problem, ppo_clip, random_mdp
from bandpo.plots import plot_convergence

OUTER = 300
AT = (0, 10, 50, 100, 200, OUTER - 1)


def gaps() -> dict[str, dict[str, list[float]]]:
    """The gap to the optimal value after each outer step, of all arms on one MDP and reference policy."""
    mdp = random_mdp(states=5, actions=4, discount=0.8, seed=0)
    reference = torch.randn(5, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64).softmax(-1)
    cornered = torch.zeros(5, 4, dtype=torch.float64)
    cornered[torch.arange(5), mdp.reward.argmin(-1)] = 12.0  # nearly all probability on the worst action
    arms = {
        "clip 0.2/0.28, η = 0.5": {"bounds": Clip(0.2, 0.28)},
        "KL band 0.05, η = 0.5": {"bounds": Band(KL, 0.05)},
        "clip, η = 5": {"bounds": Clip(0.2, 0.28), "step_size": 5.0},
        "clip, η = 0.5, start in a corner": {"bounds": Clip(0.2, 0.28), "start": cornered},
    }
    groups = {}
    for regularizer in ("forward", "reverse"):
        problem = Problem(mdp, reference, 0.2, regularizer)
        best = problem.optimum()[0].item()
        groups[f"{regularizer} KL"] = {
            label: [best - step.value for step in ppo_clip(problem, outer=OUTER, **options)[0]]
            for label, options in arms.items()
        }
    return groups


def table(groups: dict[str, dict[str, list[float]]]) -> str:
    """The gaps at some of the steps."""
    lines = ["gap to the optimal value after n outer steps of 8 inner ones, λ = 0.2"]
    lines.append(" " * 34 + "".join(f"{n:>8}" for n in AT))
    for group, arms in groups.items():
        lines.append(group)
        lines += [f"  {label:<32}" + "".join(f"{values[n]:>8.1e}" for n in AT) for label, values in arms.items()]
    return "\n".join(lines)


def main(path: str = "tabular-ppo-clip.png") -> None:
    """Run all arms, print the table and draw the figure."""
    torch.set_num_threads(1)
    groups = gaps()
    print(table(groups))
    plot_convergence(groups, title="PPO-Clip with exact gradients").savefig(path, dpi=150)
    print(f"\nfigure: {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
