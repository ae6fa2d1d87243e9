"""Preference learning where everything is known: the experiments behind `bandpo lab preference`, without a language model."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bandpo.preference.design import feature_coverage, preferential_g_optimal
from bandpo.preference.links import CHI2_KL, LOG
from bandpo.preference.losses import pair_loss, reward_calibration
from bandpo.preference.objectives import PREFERENCES
from bandpo.preference.sampling import HybridDesign, OnPolicy, Pairs
from bandpo.preference.tabular import concentrability, fit_pairs, linear_softmax, tabular_optimum

Result = dict[str, Any]


def best_beta_regret(sizes: Sequence[float] = (1e2, 1e3, 1e4, 1e6, 1e8)) -> Result:
    """Regret of DPO's and χPO's optimum at the best β, against the number n of comparisons: 1/log n against a power of n.

    A bandit of our own (the paper's, of figure 1, was not found): π_ref = (½, ½ - 1/2n, 1/2n), r = (1, 1 - 1/log n, 0). The
    third arm is so rare that n comparisons leave its reward open: with probability ½ the fit sees r, else it sees 2 there.
    No sampling, so no seeds: the regret is exact, averaged over both fits, and the least over β.

    Args:
        sizes: n.
    """
    betas = torch.logspace(-5, 3, 801, dtype=torch.float64)
    rows: dict[str, list[float]] = {"dpo": [], "chipo": []}
    for n in sizes:
        ref = torch.tensor([0.5, 0.5 - 0.5 / n, 0.5 / n], dtype=torch.float64).log()
        true = torch.tensor([1.0, 1.0 - 1 / math.log(n), 0.0], dtype=torch.float64)
        seen = true.clone()
        seen[2] = 2.0
        for name, link in (("dpo", LOG), ("chipo", CHI2_KL)):
            fits = [
                tabular_optimum(r.expand(len(betas), 3), ref.expand(len(betas), 3), beta=betas, link=link).exp() @ true
                for r in (true, seen)
            ]
            rows[name].append((1 - (fits[0] + fits[1]) / 2).min().item())
    return {"n": list(sizes), **rows}


def concentrability_over_epochs(
    *,
    seeds: int = 8,
    betas: Sequence[float] = (0.5, 0.05),
    prompts: int = 10,
    actions: int = 40,
    pairs: int = 400,
    epochs: Sequence[int] = (25, 50, 100, 200, 400, 800),
    learning_rate: float = 0.05,
) -> Result:
    """How far offline training goes from its reference, in C^π, and what it gains: DPO and χPO on the same pairs, by Adam.

    Args:
        seeds: Problems, all at once.
        betas: β.
        prompts: Of a problem.
        actions: Of each prompt.
        pairs: Comparisons in all, drawn from the reference, labelled by Bradley-Terry.
        epochs: Full-batch steps after which C^π is read.
        learning_rate: Adam's.
    """
    g = torch.Generator().manual_seed(0)
    reward = torch.rand(seeds, prompts, actions, generator=g, dtype=torch.float64)
    ref = (1.5 * torch.randn(seeds, prompts, actions, generator=g, dtype=torch.float64)).log_softmax(-1)
    x = torch.full((prompts,), 1 / prompts, dtype=torch.float64)
    drawn = OnPolicy(x)(ref.exp(), pairs, g)
    gap = _at(reward, drawn.prompts, drawn.first) - _at(reward, drawn.prompts, drawn.second)
    wins = torch.rand(gap.shape, generator=g, dtype=torch.float64) < gap.sigmoid()
    chosen, rejected = (torch.where(wins, a, b) for a, b in ((drawn.first, drawn.second), (drawn.second, drawn.first)))
    out: Result = {"epochs": list(epochs), "seeds": seeds, "curves": []}
    for name in ("dpo", "chipo"):
        for beta in betas:
            logits = ref.clone().requires_grad_(True)
            optimizer = torch.optim.Adam([logits], lr=learning_rate)
            coverage, gain = [], []
            for step in range(1, max(epochs) + 1):
                logp = logits.log_softmax(-1)
                losses, _ = pair_loss(
                    chosen_logprobs=_at(logp, drawn.prompts, chosen).flatten(),
                    rejected_logprobs=_at(logp, drawn.prompts, rejected).flatten(),
                    ref_chosen_logprobs=_at(ref, drawn.prompts, chosen).flatten(),
                    ref_rejected_logprobs=_at(ref, drawn.prompts, rejected).flatten(),
                    objective=PREFERENCES[name].replace(beta=beta),
                )
                optimizer.zero_grad()
                losses.view(seeds, -1).mean(-1).sum().backward()  # each seed's own mean: Adam sees them apart
                optimizer.step()
                if step in epochs:
                    now = logits.detach().log_softmax(-1)
                    coverage.append(concentrability(now, ref).mean(-1).tolist())
                    gain.append(((now.exp() - ref.exp()) * reward).sum(-1).mean(-1).tolist())
            out["curves"].append({"objective": name, "beta": beta, "concentrability": coverage, "gain": gain})
    return out


def coverage_by_round(
    *,
    seeds: int = 10,
    settings: Sequence[tuple[float, int]] = ((5.0, 4000), (4.0, 2000)),
    rounds: int = 6,
    arms: int = 5,
) -> Result:
    """Error and coverage over rounds: on-policy with the newest batch only, off-policy with all, and the hybrid of algorithm 2.

    π₀ is skewed to one arm, π* is about uniform; DPO's fit is exact, within a ball (`fit_pairs`).

    Args:
        seeds: Problems and draws.
        settings: (skew of π₀'s logits, comparisons in each round).
        rounds: Rounds.
        arms: One feature for each.
    """
    out: Result = {"seeds": seeds, "rounds": rounds, "settings": []}
    for skew, n in settings:
        g = torch.Generator().manual_seed(0)
        features = torch.eye(arms, dtype=torch.float64).unsqueeze(0)
        base = torch.zeros(1, arms, dtype=torch.float64)
        base[0, 0] = skew
        theta = -base + 0.3 * torch.randn(seeds, arms, generator=g, dtype=torch.float64)
        theta = theta - theta.mean(-1, keepdim=True)
        beta, radius = 1 / theta.norm(dim=-1).mean().item(), 2 * theta.norm(dim=-1).max().item()
        ref, one = base.log_softmax(-1), torch.ones(1, dtype=torch.float64)
        best = linear_softmax(theta, features, ref).exp()
        hybrid = HybridDesign(one, preferential_g_optimal(features))
        curves: dict[str, list[Any]] = {}
        for arm, sampler, keep in (
            ("on-policy", OnPolicy(one), False),
            ("off-policy", OnPolicy(one), True),
            ("hybrid", hybrid, False),
        ):
            policy = ref.exp().expand(seeds, 1, arms)
            wins = losses = torch.zeros(seeds, arms * arms, dtype=torch.float64)
            errors, coverages = [], []
            for _ in range(rounds):
                source = ref.exp().expand(seeds, 1, arms) if keep else policy
                coverages.append([feature_coverage(source[s], best[s], features, one).item() for s in range(seeds)])
                won, lost = _label(sampler(source, n, g), beta * theta, arms, g)
                wins, losses = (wins + won, losses + lost) if keep else (won, lost)
                fit = fit_pairs(_differences(arms), wins, losses, beta=beta, radius=radius)
                policy = linear_softmax(fit, features, ref).exp()
                errors.append((fit - fit.mean(-1, keepdim=True) - theta).norm(dim=-1).tolist())
            curves[arm] = [errors, coverages]
        out["settings"].append(
            {
                "skew": skew,
                "pairs_per_round": n,
                "error": {k: v[0] for k, v in curves.items()},
                "coverage": {k: v[1] for k, v in curves.items()},
            }
        )
    return out


def labels_against_distillation(
    *, seeds: int = 20, sizes: Sequence[int] = (100, 1000, 10_000), arms: int = 5
) -> Result:
    """KL to the target after n pairs: sampled labels leave 1/n of it, the probabilities themselves (PD) nothing.

    Args:
        seeds: Draws.
        sizes: n.
        arms: Of the bandit, whose reference is uniform.
    """
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(seeds, arms, generator=g, dtype=torch.float64)
    features, one = torch.eye(arms, dtype=torch.float64).unsqueeze(0), torch.ones(1, dtype=torch.float64)
    ref = torch.zeros(1, arms, dtype=torch.float64).log_softmax(-1)
    target = linear_softmax(theta, features, ref)
    out: Result = {"n": list(sizes), "seeds": seeds, "labels": [], "distillation": []}
    for n in sizes:
        pairs = OnPolicy(one)(ref.exp().expand(seeds, 1, arms), n, g)
        for name in ("labels", "distillation"):
            won, lost = _label(pairs, theta, arms, g, soft=name == "distillation")
            fit = linear_softmax(fit_pairs(_differences(arms), won, lost, beta=1.0, radius=20.0), features, ref)
            out[name].append((target.exp() * (target - fit)).sum(-1).squeeze(-1).clamp(min=0).tolist())
    return out


def calibration_by_round(*, seeds: int = 10, rounds: int = 12, pairs: int = 2000, arms: int = 5) -> Result:
    """KL(π_k ‖ π*) of REBEL, whose reference moves, and of reward calibration with a γ_c below and at the step's γ.

    Each round fits squared distillation on pairs of the current policy; arms that are no longer sampled stay where they are.

    Args:
        seeds: Rewards and draws.
        rounds: Rounds.
        pairs: Of each round.
        arms: Of the bandit, whose reference is uniform.
    """
    step = 0.5
    g = torch.Generator().manual_seed(0)
    reward = torch.randn(seeds, arms, generator=g, dtype=torch.float64)
    target = (reward / step).log_softmax(-1)
    out: Result = {"seeds": seeds, "rounds": rounds, "step": step, "curves": {}}
    for name, calibration in (("rebel", 0.0), ("rdrc γ_c = γ/5", step / 5), ("rdrc γ_c = γ", step)):
        u = torch.zeros(seeds, arms, dtype=torch.float64)
        curve = []
        for _ in range(rounds):
            policy = u.log_softmax(-1).exp().unsqueeze(1)
            drawn = OnPolicy(torch.ones(1, dtype=torch.float64))(policy, pairs, g)
            wanted = reward_calibration(reward, u, calibration)
            u = u + torch.stack(
                [_least_squares(drawn.first[s], drawn.second[s], wanted[s], step) for s in range(seeds)]
            )
            now = u.log_softmax(-1)
            curve.append((now.exp() * (now - target)).sum(-1).clamp(min=0).tolist())
        out["curves"][name] = curve
    return out


def design_checks(shapes: Sequence[tuple[int, int, int]] = ((1, 8, 3), (5, 10, 3), (6, 12, 4), (8, 20, 5))) -> Result:
    """Preferential G-optimal designs of random features: the conditional optimum is d, the preferential bound d².

    Args:
        shapes: (prompts, actions, d).
    """
    rows = []
    for seed, (prompts, actions, d) in enumerate(shapes):
        phi = torch.randn(prompts, actions, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        designs = {kind: preferential_g_optimal(phi, prompts=kind) for kind in ("design", "uniform")}
        rows.append(
            {
                "prompts": prompts,
                "actions": actions,
                "d": d,
                "conditional": designs["design"].conditional.max().item(),
                "leverage": designs["design"].leverage.item(),
                "leverage_uniform": designs["uniform"].leverage.item(),
                "bound": d * d,
            }
        )
    return {"designs": rows}


EXPERIMENTS: dict[str, Callable[[], Result]] = {
    "regret": best_beta_regret,
    "concentrability": concentrability_over_epochs,
    "coverage": coverage_by_round,
    "distillation": labels_against_distillation,
    "calibration": calibration_by_round,
    "design": design_checks,
}
"""The experiments without a language model, by name; each takes seconds."""


def _at(table: Tensor, prompts: Tensor, actions: Tensor) -> Tensor:
    """`table[s, prompts[s, i], actions[s, i]]` of `(seeds, prompts, actions)`."""
    return table.flatten(-2).gather(-1, prompts * table.shape[-1] + actions)


def _differences(arms: int) -> Tensor:
    """`e_i - e_j` of every ordered pair of arms."""
    eye = torch.eye(arms, dtype=torch.float64)
    return (eye.unsqueeze(1) - eye.unsqueeze(0)).flatten(0, 1)


def _label(
    pairs: Pairs, reward: Tensor, arms: int, generator: torch.Generator, *, soft: bool = False
) -> tuple[Tensor, Tensor]:
    """Counts `(seeds, arms²)` of wins and losses of the first; the probabilities themselves where `soft`."""
    probability = (reward.gather(-1, pairs.first) - reward.gather(-1, pairs.second)).sigmoid()
    if not soft:
        probability = (torch.rand(probability.shape, generator=generator, dtype=torch.float64) < probability).double()
    cell = pairs.first * arms + pairs.second
    empty = torch.zeros(*cell.shape[:-1], arms * arms, dtype=torch.float64)
    return empty.scatter_add(-1, cell, probability), empty.scatter_add(-1, cell, 1 - probability)


def _least_squares(first: Tensor, second: Tensor, reward: Tensor, step: float) -> Tensor:
    """`argmin_w Σ (γ(w_i - w_j) - (r_i - r_j))²`, of least norm."""
    arms = len(reward)
    rows = _differences(arms)
    counts = torch.bincount(first * arms + second, minlength=arms * arms).double().sqrt().unsqueeze(1)
    gap = rows @ reward
    return torch.linalg.lstsq(step * counts * rows, counts.squeeze(1) * gap, driver="gelsd").solution
