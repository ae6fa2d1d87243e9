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


def main(path: str = "tabular-ppo-clip.png") -> None:
    """Run all arms on one MDP and reference policy."""
    torch.set_num_threads(1)
    mdp = random_mdp(states=5, actions=4, discount=0.8, seed=0)
    reference = torch.randn(5, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64).softmax(-1)
    cornered = torch.zeros(5, 4, dtype=torch.float64)
    cornered[torch.arange(5), mdp.reward.argmin(-1)] = 12.0  # nearly all probability on the worst action

    print(
        f"gap to the optimal value after n outer steps of 8 inner ones, λ = 0.2\n{'':<50}"
        + "".join(f"{n:>10}" for n in AT)
    )
    groups = {}
    for regularizer in ("forward", "reverse"):
        problem = Problem(mdp, reference, 0.2, regularizer)
        best = problem.optimum()[0].item()
        runs = groups[f"{regularizer} KL"] = {}
        for label, options in {
            "clip 0.2/0.28, η = 0.5": {"bounds": Clip(0.2, 0.28)},
            "KL band 0.05, η = 0.5": {"bounds": Band(KL, 0.05)},
            "clip, η = 5": {"bounds": Clip(0.2, 0.28), "step_size": 5.0},
            "clip, η = 0.5, start in a corner": {"bounds": Clip(0.2, 0.28), "start": cornered},
        }.items():
            steps, _ = ppo_clip(problem, outer=OUTER, **options)
            runs[label] = gaps = [best - step.value for step in steps]
            print(f"{f'{regularizer} KL, {label}':<50}" + "".join(f"{gaps[n]:>10.1e}" for n in AT))
    plot_convergence(groups, title="PPO-Clip with exact gradients").savefig(path, dpi=150)
    print(f"\nfigure: {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
