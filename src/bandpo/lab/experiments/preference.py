"""The experiments of `bandpo lab preference` without a language model: bandits whose rewards and optima are known."""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from bandpo.preference.design import feature_coverage, preferential_g_optimal
from bandpo.preference.links import CHI2_KL, LINKS, LOG, Link
from bandpo.preference.losses import pair_loss, reward_calibration
from bandpo.preference.objectives import PREFERENCES, PairObjective
from bandpo.preference.sampling import HybridDesign, OnPolicy, Pairs
from bandpo.preference.tabular import concentrability, fit_pairs, linear_softmax, tabular_optimum

Result = dict[str, Any]


def best_beta_regret(sizes: Sequence[float] = (1e2, 1e3, 1e4, 1e6, 1e8)) -> Result:
    """Regret of the optima of DPO and χPO at the best β, over the number n of comparisons: 1/log n against a power of n.

    The bandit is our own, since the one of the paper's figure 1 was not found: π_ref = (½, ½ - 1/2n, 1/2n) and
    r = (1, 1 - 1/log n, 0). The third arm is so rare that n comparisons do not determine its reward: with probability ½ the fit
    sees r, else it sees 2 there. The regret is exact, so there are no seeds. It is averaged over both fits, and is the least
    over β.

    Args:
        sizes: Numbers n of comparisons.

    Returns:
        `n`, and the regret of `dpo` and `chipo` for each n.
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
    """Distance C^π of offline training from its reference, and its gain: DPO and χPO on the same pairs, by Adam.

    Args:
        seeds: Number of problems, all trained at once.
        betas: Values of β.
        prompts: Number of prompts of a problem.
        actions: Number of actions of each prompt.
        pairs: Number of comparisons of a problem, drawn from the reference and labelled by Bradley-Terry.
        epochs: Full-batch steps after which C^π is measured.
        learning_rate: Learning rate of Adam.

    Returns:
        The epochs, and for each objective and β the curves of `concentrability` and `gain`, by epoch and seed.
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
            coverage: list[list[float]] = []
            gain: list[list[float]] = []
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
                losses.view(seeds, -1).mean(
                    -1
                ).sum().backward()  # each seed's own mean, so that Adam treats the seeds apart
                optimizer.step()
                if step in epochs:
                    now = logits.detach().log_softmax(-1)
                    coverage.append(_floats(concentrability(now, ref).mean(-1)))
                    gain.append(_floats(((now.exp() - ref.exp()) * reward).sum(-1).mean(-1)))
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

    π₀ is skewed to one arm, and π* is about uniform. The fit of DPO is exact, within a ball (`fit_pairs`).

    Args:
        seeds: Number of problems, each with its own draws.
        settings: (skew of π₀'s logits, comparisons in each round) of each setting.
        rounds: Number of rounds.
        arms: Number of arms, with one feature for each.

    Returns:
        For each setting the `error` and the `coverage` of each sampler, by round and seed.
    """
    found = [_coverage_of_a_setting(skew, n, seeds=seeds, rounds=rounds, arms=arms) for skew, n in settings]
    return {"seeds": seeds, "rounds": rounds, "settings": found}


def _coverage_of_a_setting(skew: float, n: int, *, seeds: int, rounds: int, arms: int) -> Result:
    """The curves of the three samplers for one skew and one number of comparisons in a round."""
    g = torch.Generator().manual_seed(0)
    base = torch.zeros(1, arms, dtype=torch.float64)
    base[0, 0] = skew
    theta = -base + 0.3 * torch.randn(seeds, arms, generator=g, dtype=torch.float64)
    problem = _Linear(base.log_softmax(-1), theta - theta.mean(-1, keepdim=True))
    one = torch.ones(1, dtype=torch.float64)
    hybrid = HybridDesign(one, preferential_g_optimal(problem.features))
    samplers = {"on-policy": OnPolicy(one), "off-policy": OnPolicy(one), "hybrid": hybrid}
    found = {name: _coverage_curves(problem, s, name == "off-policy", n, rounds, g) for name, s in samplers.items()}
    return {
        "skew": skew,
        "pairs_per_round": n,
        "error": {name: errors for name, (errors, _) in found.items()},
        "coverage": {name: coverages for name, (_, coverages) in found.items()},
    }


class _Linear:
    """Bandits with one feature for each arm: a reference `(1, arms)` of log-probs, and true parameters `(seeds, arms)`."""

    def __init__(self, ref: Tensor, theta: Tensor) -> None:
        self.ref, self.theta = ref, theta
        self.seeds, self.arms = theta.shape
        self.features = torch.eye(self.arms, dtype=torch.float64).unsqueeze(0)
        norms = cast(Tensor, theta.norm(dim=-1))
        self.beta: float = 1 / norms.mean().item()
        self.radius: float = 2 * norms.max().item()

    def policy(self, theta: Tensor) -> Tensor:
        """The probabilities `(seeds, 1, arms)` under some parameters."""
        return linear_softmax(theta, self.features, self.ref).exp()


def _coverage_curves(
    problem: _Linear, sampler: OnPolicy | HybridDesign, keep: bool, n: int, rounds: int, g: torch.Generator
) -> tuple[list[list[float]], list[list[float]]]:
    """Errors and coverages, a list of `rounds` lists of one number for each seed.

    With `keep`, the reference policy samples in all rounds, and all comparisons so far are fitted.
    """
    arms, one = problem.arms, torch.ones(1, dtype=torch.float64)
    best, start = problem.policy(problem.theta), problem.ref.exp().expand(problem.seeds, 1, arms)
    policy = start
    wins = losses = torch.zeros(problem.seeds, arms * arms, dtype=torch.float64)
    errors: list[list[float]] = []
    coverages: list[list[float]] = []
    for _ in range(rounds):
        source = start if keep else policy
        coverages.append(
            [feature_coverage(source[s], best[s], problem.features, one).item() for s in range(problem.seeds)]
        )
        won, lost = _label(sampler(source, n, g), problem.beta * problem.theta, arms, g)
        wins, losses = (wins + won, losses + lost) if keep else (won, lost)
        fit = fit_pairs(_differences(arms), wins, losses, beta=problem.beta, radius=problem.radius)
        policy = problem.policy(fit)
        errors.append(_floats(cast(Tensor, (fit - fit.mean(-1, keepdim=True) - problem.theta).norm(dim=-1))))
    return errors, coverages


def labels_against_distillation(
    *, seeds: int = 20, sizes: Sequence[int] = (100, 1000, 10_000), arms: int = 5
) -> Result:
    """KL to the target after n pairs: about 1/n with sampled labels, and only rounding with the probabilities themselves (PD).

    Args:
        seeds: Number of targets, each with its own draws.
        sizes: Numbers n of pairs.
        arms: Number of arms of the bandit, whose reference is uniform.

    Returns:
        `n`, and the KL of `labels` and of `distillation`, by n and seed.
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

    Each round fits squared distillation on pairs of the current policy. Arms that are no longer sampled keep their values.

    Args:
        seeds: Number of reward tables, each with its own draws.
        rounds: Number of rounds.
        pairs: Number of pairs of each round.
        arms: Number of arms of the bandit, whose reference is uniform.

    Returns:
        The `step`, and the `curves` of each method, by round and seed.
    """
    step = 0.5
    g = torch.Generator().manual_seed(0)
    reward = torch.randn(seeds, arms, generator=g, dtype=torch.float64)
    target = (reward / step).log_softmax(-1)
    out: Result = {"seeds": seeds, "rounds": rounds, "step": step, "curves": {}}
    for name, calibration in (("rebel", 0.0), ("rdrc γ_c = γ/5", step / 5), ("rdrc γ_c = γ", step)):
        u = torch.zeros(seeds, arms, dtype=torch.float64)
        curve: list[list[float]] = []
        for _ in range(rounds):
            policy = u.log_softmax(-1).exp().unsqueeze(1)
            drawn = OnPolicy(torch.ones(1, dtype=torch.float64))(policy, pairs, g)
            wanted = reward_calibration(reward, u, calibration)
            u = u + torch.stack(
                [_least_squares(drawn.first[s], drawn.second[s], wanted[s], step) for s in range(seeds)]
            )
            now = u.log_softmax(-1)
            curve.append(_floats((now.exp() * (now - target)).sum(-1).clamp(min=0)))
        out["curves"][name] = curve
    return out


def design_checks(shapes: Sequence[tuple[int, int, int]] = ((1, 8, 3), (5, 10, 3), (6, 12, 4), (8, 20, 5))) -> Result:
    """Preferential G-optimal designs of random features: the conditional optimum is d, the preferential bound is d².

    Args:
        shapes: (prompts, actions, d) of each design.

    Returns:
        `designs`, the leverages and the bound of each.
    """
    rows: list[Result] = []
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


def link_weights(*, beta: float = 0.1, reach: float = 8.0, points: int = 65) -> Result:
    """How strongly a pair pulls at each of its two completions, by link, and how far each must move until the pull has ended.

    The gradient of the hard loss is `-β w₁ ∇log π(y₁) + β w₂ ∇log π(y₂)`, with `w = σ(-h) φ'(Δ)` of each side. It is drawn
    relative to DPO's at the reference, ½. One completion moves and the other one stays at its reference.

    Args:
        beta: β of all links.
        reach: Largest |Δ| of the curves, in nats.
        points: Points of each curve.

    Returns:
        The log-ratios `delta`; for each link `chosen` and `rejected`, the weights of the side that moves at each Δ; and `end`,
        the log-ratio of each side at which its weight is 1% of DPO's at the reference for the rest of the way, None if the
        pull never ends.
    """
    delta = torch.linspace(-reach, reach, points, dtype=torch.float64)
    far = 10 ** torch.linspace(-3, 3.3, 20_001, dtype=torch.float64)
    out: Result = {"beta": beta, "delta": _floats(delta), "links": {}}
    for link in LINKS.values():
        ends: dict[str, float | None] = {}
        for side, away in (("chosen", far), ("rejected", -far)):
            pulls = _pull(link, beta, away, side) > 0.01
            last = int(pulls.nonzero().max()) if pulls.any() else -1
            ends[side] = None if last == len(away) - 1 else away[last + 1].item()
        curves = {side: _floats(_pull(link, beta, delta, side)) for side in ("chosen", "rejected")}
        out["links"][link.name] = {"formula": link.formula, **curves, "end": ends}
    return out


def _pull(link: Link, beta: float, delta: Tensor, side: str) -> Tensor:
    """The weight of one completion of a pair at its log-ratio, with the other one at 0, over DPO's at the reference."""
    moving = delta.clone().requires_grad_()
    still = torch.zeros_like(delta)
    pair = (moving, still) if side == "chosen" else (still, moving)
    losses, _ = pair_loss(
        chosen_logprobs=pair[0],
        rejected_logprobs=pair[1],
        ref_chosen_logprobs=still,
        ref_rejected_logprobs=still,
        objective=PairObjective("hard", link, beta=beta),
    )
    (gradient,) = torch.autograd.grad(losses.sum(), moving)
    return gradient.abs() / (beta / 2)


EXPERIMENTS: dict[str, Callable[[], Result]] = {
    "links": link_weights,
    "regret": best_beta_regret,
    "concentrability": concentrability_over_epochs,
    "coverage": coverage_by_round,
    "distillation": labels_against_distillation,
    "calibration": calibration_by_round,
    "design": design_checks,
}
"""The experiments without a language model, by name; each takes seconds."""


def _at(table: Tensor, prompts: Tensor, actions: Tensor) -> Tensor:
    """The entries `table[s, prompts[s, i], actions[s, i]]` of a table `(seeds, prompts, actions)`."""
    return table.flatten(-2).gather(-1, prompts * table.shape[-1] + actions)


def _floats(x: Tensor) -> list[float]:
    return cast("list[float]", x.tolist())


def _differences(arms: int) -> Tensor:
    """The differences `e_i - e_j` of unit vectors, for every ordered pair of arms: `(arms², arms)`."""
    eye = torch.eye(arms, dtype=torch.float64)
    return (eye.unsqueeze(1) - eye.unsqueeze(0)).flatten(0, 1)


def _label(
    pairs: Pairs, reward: Tensor, arms: int, generator: torch.Generator, *, soft: bool = False
) -> tuple[Tensor, Tensor]:
    """The wins and losses of the first arm, `(seeds, arms²)`: counts, or with `soft` sums of their probabilities."""
    probability = (reward.gather(-1, pairs.first) - reward.gather(-1, pairs.second)).sigmoid()
    if not soft:
        probability = (torch.rand(probability.shape, generator=generator, dtype=torch.float64) < probability).double()
    cell = pairs.first * arms + pairs.second
    empty = torch.zeros(*cell.shape[:-1], arms * arms, dtype=torch.float64)
    return empty.scatter_add(-1, cell, probability), empty.scatter_add(-1, cell, 1 - probability)


def _least_squares(first: Tensor, second: Tensor, reward: Tensor, step: float) -> Tensor:
    """The `argmin_w Σ (γ(w_i - w_j) - (r_i - r_j))²` of least norm."""
    arms = len(reward)
    rows = _differences(arms)
    counts = torch.bincount(first * arms + second, minlength=arms * arms).double().sqrt().unsqueeze(1)
    gap = rows @ reward
    least_squares = cast("Callable[..., tuple[Tensor, ...]]", torch.linalg.lstsq)
    return least_squares(step * counts * rows, counts.squeeze(1) * gap, driver="gelsd")[0]
