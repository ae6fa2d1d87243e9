"""Named recipes: which bounds, surrogate, ratio level, aggregation, advantage and anchor make a published objective."""

import difflib
from collections.abc import Mapping
from functools import partial

from torch import Tensor

from bandpo._deprecations import RENAMED_OBJECTIVES
from bandpo._system.imports import imported
from bandpo._values import Registry
from bandpo.bounds import DCPO, Band, Clip
from bandpo.bounds.combined import Intersection
from bandpo.bounds.regions import BySign, Sides, TopK, kl3_clip, log_clip
from bandpo.divergences import CHI2, KL, REVERSE_KL, TV
from bandpo.experimental import Balanced, Elastic, clip_cov, kl_cov, log_stabilized, second_moment
from bandpo.groups import group_signal, kl_dual
from bandpo.objective import Objective
from bandpo.surrogates import (
    Projected,
    aspo,
    detach,
    dual_clip,
    kl_penalty,
    log_quadratic,
    mask,
    quadratic,
    quadratic_tv,
    reinsert,
    soft,
    soft_edge,
    two_sided,
)
from bandpo.surrogates.corrections import TIS, IcePop
from bandpo.surrogates.sequence import future_weighted, gamma_weighted, geometric_mean, mirror_descent, tapered

_BANDPO = "BandPO, arXiv:2603.04918"
_DPPO = "DPPO, arXiv:2602.04879"
_FREE = Clip(1.0, float("inf"))


def _signal(rewards: Tensor, advantages: Tensor) -> Mapping[str, Tensor]:
    del advantages
    return {"signal": group_signal(rewards)}


def _kl_dual(rewards: Tensor, advantages: Tensor) -> Mapping[str, Tensor]:
    del rewards
    return kl_dual(advantages, 0.05)._asdict()


_RECIPES = (
    # PPO's clip and its aggregations
    Objective(
        name="grpo",
        bounds=Clip(0.2),
        aggregation="seq-mean-token-mean",
        formula="min(r·A, clip(r, 0.8, 1.2)·A), mean over tokens then sequences, A = (R - mean)/std",
        paper="GRPO, arXiv:2402.03300; PPO clip, arXiv:1707.06347",
    ),
    Objective(
        name="dr_grpo",
        bounds=Clip(0.2),
        aggregation="seq-mean-token-sum-norm",
        advantage="mean",
        formula="min(r·A, clip(r, 0.8, 1.2)·A), token sum / max length, A = R - mean",
        paper="Dr.GRPO, arXiv:2503.20783",
    ),
    Objective(
        name="dapo",
        bounds=Clip(0.2, 0.28),
        formula="min(r·A, clip(r, 0.8, 1.28)·A), mean over all tokens (Clip-Higher)",
        paper="DAPO, arXiv:2503.14476",
    ),
    Objective(
        name="dual-clip",
        bounds=Clip(0.2),
        surrogate=partial(dual_clip, c=3.0),
        formula="PPO's clip, and at least 3·A for A < 0; mean over all tokens",
        paper="dual clip, arXiv:1912.09729",
    ),
    Objective(
        name="no-clip",
        bounds=_FREE,
        aggregation="seq-mean-token-mean",
        formula="r·A: no trust region, the arm every comparison needs",
        paper="importance-weighted policy gradient",
    ),
    # f-divergence balls
    Objective(
        name="bandpo-kl",
        bounds=Band(KL, 0.05),
        aggregation="seq-mean-token-mean",
        formula="clip r to {r : KL(Bern(p) ‖ Bern(pr)) ≤ 0.05}, upper side at most 10",
        paper=_BANDPO,
    ),
    Objective(
        name="bandpo-kl-paper",
        bounds=Band(KL, 0.05),
        surrogate=partial(dual_clip, c=10.0),
        aggregation="seq-mean-token-mean",
        kl_coef=0.001,
        kl="k3",
        formula="bandpo-kl, for A < 0 at least 10·A, and 0.001 times the plain k3 to the reference",
        paper=f"{_BANDPO} (settings of the authors' training scripts)",
    ),
    Objective(
        name="bandpo-tv",
        bounds=Band(TV, 0.05),
        aggregation="seq-mean-token-mean",
        formula="clip r to 1 ∓ 0.05/p within [0, 1/p], upper side at most 10",
        paper=f"{_BANDPO}; with another radius and anchor DPPO-TV's gradient, arXiv:2602.04879",
    ),
    Objective(
        name="bandpo-chi2",
        bounds=Band(CHI2, 0.05),
        aggregation="seq-mean-token-mean",
        formula="clip r to 1 ∓ √(0.05(1-p)/p) within [0, 1/p], upper side at most 10",
        paper=_BANDPO,
    ),
    Objective(
        name="bandpo-kl-soft",
        bounds=Band(KL, 0.05),
        surrogate=soft_edge,
        aggregation="seq-mean-token-mean",
        formula="bandpo-kl, but past the edge the slope decays as sech²(4(r/edge - 1))",
        paper=f"our own edge on {_BANDPO}",
    ),
    *(
        Objective(
            name=f"bandpo-{ball.lower()}-upper",
            bounds=Sides(lower=Clip(0.2), upper=Band(ball, 0.05)),
            aggregation="seq-mean-token-mean",
            formula=f"clip r to 0.8 … the upper bound of bandpo-{ball.lower()}",
            paper=f"our own half of {_BANDPO}, with PPO's lower bound",
        )
        for ball in ("KL", "TV", "CHI2")
    ),
    Objective(
        name="bandpo-kl-lower",
        bounds=Sides(lower=Band(KL, 0.05), upper=Clip(0.2)),
        aggregation="seq-mean-token-mean",
        formula="clip r to the lower bound of bandpo-kl … 1.2",
        paper=f"our own half of {_BANDPO}, with PPO's upper bound",
    ),
    Objective(
        name="dppo-tv",
        bounds=Band(TV, 0.15, max_ratio=None),
        surrogate=mask,
        aggregation="seq-mean-token-sum-norm",
        advantage="mean",
        anchor="rollout",
        formula="r·A, masked where |π - μ| > 0.15 on the side A pushes to; μ the sampler",
        paper=f"{_DPPO}, eq. 12-13",
    ),
    Objective(
        name="dppo-kl",
        bounds=Band(KL, 0.05, max_ratio=None),
        surrogate=mask,
        aggregation="seq-mean-token-sum-norm",
        advantage="mean",
        anchor="rollout",
        formula="r·A, masked where KL(Bern(μ) ‖ Bern(π)) > 0.05 on the side A pushes to; μ the sampler",
        paper=f"{_DPPO}, eq. 12, 14",
    ),
    Objective(
        name="dppo-topk-tv",
        bounds=TopK(TV, 0.15),
        surrogate=mask,
        aggregation="seq-mean-token-sum-norm",
        advantage="mean",
        anchor="rollout",
        formula="as dppo-tv, with the TV of the sampler's top 20 tokens, the sampled one and the rest",
        paper=f"{_DPPO}, eq. 15",
    ),
    Objective(
        name="dppo-topk-kl",
        bounds=TopK(KL, 0.05),
        surrogate=mask,
        aggregation="seq-mean-token-sum-norm",
        advantage="mean",
        anchor="rollout",
        formula="as dppo-kl, with the KL of the sampler's top 20 tokens, the sampled one and the rest",
        paper=f"{_DPPO}, eq. 16",
    ),
    Objective(
        name="ipo",
        bounds=Band(TV, 0.1, max_ratio=None),
        surrogate=two_sided,
        advantage="mean",
        anchor="rollout",
        formula="r clamped to |π - μ| ≤ 0.1 on both sides, whatever the sign of A; μ the sampler",
        paper="prime-rl's sign-blind mask (its gradient, without its extra log² term)",
    ),
    Objective(
        name="kpop",
        bounds=Intersection(Band(KL, 0.1, max_ratio=None), Band(REVERSE_KL, 0.1, max_ratio=None)),
        surrogate=two_sided,
        advantage="mean",
        anchor="rollout",
        formula="r clamped to {r : KL(Bern(π) ‖ Bern(μ)) ≤ 0.1 and KL(Bern(μ) ‖ Bern(π)) ≤ 0.1} on both sides; μ the sampler",
        paper="KPop, as in prime-rl's pull request 3283 (its gradient, without its extra log² term)",
    ),
    Objective(
        name="quatro-reading",
        bounds=_FREE,
        surrogate=log_stabilized,
        ratio_level="product",
        aggregation="seq-mean-token-mean",
        advantage="mean",
        group_stats=_kl_dual,
        formula="ρ(A - b) - λ(ρ log ρ - ρ + 1), λ and b of the KL ball of 0.05 nats around each prompt's samples",
        paper="our own reading of QUATRO, arXiv:2602.04620 (its equations could not be established)",
    ),
    Objective(
        name="troll",
        bounds=_FREE,
        surrogate=Projected(radius=0.05, k=64, weight=1.0),
        aggregation="seq-mean-token-mean",
        formula="A·q/π_old - KL(π ‖ sg(q)), q the policy nearest to π with KL(q ‖ π_old) ≤ 0.05, on the top 64 tokens",
        paper="TROLL, arXiv:2510.03817 (formula from notes on the paper; the gradient is our derivation)",
    ),
    # other intervals
    Objective(
        name="dcpo",
        bounds=DCPO(0.16, 0.20),
        aggregation="seq-mean-token-mean",
        formula="clip r to ½ + ½√max(1 - 0.64/p, 0) … min(½ + ½√(1 + 0.8/p), 10)",
        paper="DCPO (its clipping; aggregation as in the BandPO paper's runs), arXiv:2509.02333",
    ),
    Objective(
        name="kl3",
        bounds=kl3_clip(0.05),
        formula="clip r to {r : r - 1 - log r ≤ 0.05} = [0.716, 1.350]",
        paper="KL3, arXiv:2602.05494 (its δ could not be established)",
    ),
    Objective(
        name="abc-grpo",
        bounds=BySign(Clip(0.2), Clip(0.2)),
        surrogate=two_sided,
        aggregation="seq-mean-token-mean",
        formula="clip(r, 0.8, 1.2)·A on both sides; four widths of their own, by the sign of A",
        paper="ABC-GRPO, arXiv:2601.03895",
    ),
    Objective(
        name="etr-reading",
        bounds=Elastic(0.2, 0.2),
        aggregation="seq-mean-token-mean",
        group_stats=_signal,
        formula="clip r to 1 ∓ 0.2·s, s = (1 + ½ tanh|A|)(1 + ½ v), v = 4 var(R) of the group",
        paper="our own reading of ETR, arXiv:2601.03723 (its equations could not be established)",
    ),
    Objective(
        name="bapo",
        bounds=Balanced(),
        surrogate=partial(dual_clip, c=3.0),
        formula="clip r to the first of [0.6 … 0.9, 1.2 … 3] that gives good tokens half; at least 3·A for A < 0",
        paper="BAPO, arXiv:2510.18927, as in the authors' code with the constants of its README",
    ),
    # other edges
    Objective(
        name="spo",
        bounds=Clip(0.2),
        surrogate=quadratic,
        formula="r·A - |A|(r - 1)²/0.4, mean over all tokens",
        paper="SPO, arXiv:2401.16025",
    ),
    Objective(
        name="cfpo",
        bounds=Clip(0.2),
        surrogate=quadratic,
        aggregation="seq-mean-token-mean",
        formula="r·A - |A|(r - 1)²/0.4, mean over tokens then sequences",
        paper="CFPO, arXiv:2601.22801 (formula from re-implementations; ε is the clip's, here GRPO's 0.2)",
    ),
    Objective(
        name="drpo",
        bounds=_FREE,
        surrogate=partial(quadratic_tv, delta=12.5),
        aggregation="seq-mean-token-sum-norm",
        advantage="mean",
        anchor="rollout",
        formula="r·A - |A|·μ(r - 1)²/25, r = π/μ, μ the sampler, A = R - mean",
        paper="DRPO, arXiv:2606.09821 (δ = 12.5 of its section 4, quoted by its institution's code)",
    ),
    Objective(
        name="cispo",
        bounds=Clip(1.0, 4.0),
        surrogate=detach,
        formula="sg(min(r, 5))·A·log π, mean over all tokens",
        paper="CISPO, arXiv:2506.13585; the cap as in TRL's docs",
    ),
    Objective(
        name="sapo",
        bounds=_FREE,
        surrogate=partial(soft, tau_positive=1.0, tau_negative=1.05),
        aggregation="seq-mean-token-mean",
        formula="(4/τ)·σ(τ(r - 1))·A, τ = 1 for A > 0, else 1.05",
        paper="SAPO, arXiv:2511.20347",
    ),
    Objective(
        name="aspo",
        bounds=Clip(0.2),
        surrogate=partial(aspo, c=3.0, c_negative=3.0),
        formula="A > 0: sg(min(1/r, 3))·A·log π for r ≤ 1.2; A < 0: PPO's clip to r = 3, then 3·A·log π",
        paper="ASPO, arXiv:2510.06062, as in the authors' code without its entropy mask",
    ),
    Objective(
        name="ce-gppo",
        bounds=Clip(0.2),
        surrogate=partial(reinsert, beta_low=0.75, beta_high=1.0, c=10.0),
        formula="PPO's clip, clipped tokens keep the gradient 0.75·0.8·A (A < 0) or 1.2·A (A > 0); at least 10·A for A < 0",
        paper="CE-GPPO, arXiv:2509.20712, as in the authors' code with the β of their 7B runs",
    ),
    Objective(
        name="ppo-kl",
        bounds=_FREE,
        surrogate=partial(kl_penalty, beta=1.0),
        formula="r·A - β(r - 1 - log r), β = 1; bandpo.schedules.Adaptive moves β",
        paper="PPO with a KL penalty, arXiv:1707.06347, eq. 8",
    ),
    Objective(
        name="clip-cov",
        bounds=Clip(0.2),
        surrogate=clip_cov,
        formula="PPO's clip without 0.02% of the tokens, drawn from those of covariance 1 to 5",
        paper="Clip-Cov, arXiv:2505.22617",
    ),
    Objective(
        name="kl-cov",
        bounds=_FREE,
        surrogate=kl_cov,
        formula="r·A - 0.1|log r| on the 0.02% of tokens of highest covariance, r·A elsewhere",
        paper="KL-Cov, arXiv:2505.22617",
    ),
    Objective(
        name="dro",
        bounds=_FREE,
        surrogate=partial(log_quadratic, beta=0.05),
        formula="A·log π - β(log r)²/2, β = 0.05",
        paper="DRO, arXiv:2405.19107, per token as in verl and Tinker (β of an example of Tinker)",
    ),
    Objective(
        name="m2po",
        bounds=_FREE,
        surrogate=second_moment,
        formula="r·A without the tokens of the largest (log r)² where A pushes, until the mean of the rest is at most 0.04",
        paper="M2PO, arXiv:2510.01161 (the authors' code has another limit: `capped`)",
    ),
    # sequences
    Objective(
        name="gspo",
        bounds=Clip(3e-4, 4e-4),
        ratio_level="sequence",
        aggregation="seq-mean-token-mean",
        formula="s = exp(mean_t log r_t); min(s·A, clip(s, 1 - 3e-4, 1 + 4e-4)·A)",
        paper="GSPO, arXiv:2507.18071",
    ),
    Objective(
        name="luspo",
        bounds=Clip(2e-3, 2.5e-3),
        ratio_level="sequence",
        aggregation="seq-mean-token-sum",
        formula="gspo with [1 - 2e-3, 1 + 2.5e-3], each sequence times its length",
        paper="LUSPO, as in TRL",
    ),
    Objective(
        name="gmpo",
        bounds=log_clip(0.4),
        surrogate=geometric_mean,
        aggregation="seq-mean-token-mean",
        formula="exp(mean_t clip(log r, ∓0.4, on the side A pushes to))·A",
        paper="GMPO, arXiv:2507.20673",
    ),
    Objective(
        name="topr",
        bounds=_FREE,
        surrogate=tapered,
        aggregation="seq-mean-token-sum",
        advantage="mean",
        formula="A·log π for A ≥ 0, sg(min(Π r, 1))·A·log π for A < 0",
        paper="TOPR, arXiv:2503.14286, eq. 8 (by two secondary sources; with R - mean for its reward)",
    ),
    Objective(
        name="vespo",
        bounds=_FREE,
        surrogate=gamma_weighted,
        formula="sg(W^k e^(λ(1 - W)))·A·log π, W = Π r; k = 2, λ = 3 for A ≥ 0, k = 3, λ = 2 for A < 0",
        paper="VESPO, arXiv:2602.10693",
    ),
    Objective(
        name="fipo",
        bounds=Clip(0.2, 0.28),
        surrogate=future_weighted,
        formula="dapo with dual clip 10, times sg(clip(exp(Σ_{k ≥ t} γ^(k-t) log r_k), 1, 1.2)), γ = 2^(-1/32)",
        paper="FIPO, arXiv:2603.19835 (constants of the authors' 32B run)",
    ),
    Objective(
        name="pmd-mean",
        bounds=_FREE,
        surrogate=partial(mirror_descent, tau=0.01),
        aggregation="seq-mean-token-mean",
        advantage="mean",
        formula="-τ(A/τ - Σ log r)²/2 / length, τ = 0.01",
        paper="PMD-mean, arXiv:2602.05933; Kimi k1.5, arXiv:2501.12599, eq. 3",
    ),
    # corrections for the sampler, and masks of it
    Objective(
        name="icepop-ratio",
        bounds=Clip(0.8, 4.0),
        surrogate=two_sided,
        advantage="mean",
        anchor="rollout",
        formula="r·A within 0.2 ≤ r ≤ 5, no gradient outside, whatever the sign of A; r = π/μ, μ the sampler",
        paper="IcePop, arXiv:2510.18855, as in prime-rl (its gradient)",
    ),
    Objective(
        name="tis",
        bounds=Clip(0.2),
        aggregation="seq-mean-token-mean",
        correction=TIS(2.0),
        formula="grpo times min(π_old/μ, 2), μ the sampler",
        paper="truncated importance sampling, as in verl and TRL",
    ),
    Objective(
        name="icepop",
        bounds=Clip(0.2),
        aggregation="seq-mean-token-mean",
        correction=IcePop(0.5, 5.0),
        formula="grpo times π_old/μ within [0.5, 5], 0 outside, μ the sampler",
        paper="IcePop, arXiv:2510.18855, as in verl",
    ),
)

OBJECTIVES: Mapping[str, Objective] = Registry(
    __name__, "OBJECTIVES", {o.name: o for o in _RECIPES}, kind="objective", former=RENAMED_OBJECTIVES
)
"""The named objectives, read-only. Yours is an `Objective` object, or the string "package.module:NAME" of one. A former name
still finds its objective, with a warning; it is not among the keys."""


def get_objective(objective: Objective | str) -> Objective:
    """The `Objective` behind a name in `OBJECTIVES`, a "package.module:NAME" string, or itself.

    Args:
        objective: The name, the string or the object.

    Raises:
        ValueError: If the name is unknown; the message names the nearest one.
        TypeError: If what is found is no `Objective`.

    Examples:
        >>> get_objective("grpo").paper
        'GRPO, arXiv:2402.03300; PPO clip, arXiv:1707.06347'
    """
    if isinstance(objective, str) and ":" in objective:
        path = objective
        try:
            objective = imported(path)
        except (Exception, SystemExit) as error:  # the module's own code runs, and may raise anything, or exit
            raise ValueError(f"objective {path} could not be imported: {error!r}") from error
    if isinstance(objective, Objective):
        return objective
    if not isinstance(objective, str):
        raise TypeError(f"objective: pass a name, an Objective or 'package.module:NAME', got {objective!r}")
    if objective not in OBJECTIVES:
        near = [
            name for name in OBJECTIVES if name.startswith(f"{objective}-")
        ]  # 'bandpo' is 'bandpo-kl' rather than 'bapo'
        near = near or difflib.get_close_matches(objective, OBJECTIVES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"objective {objective!r} is unknown: {hint}The names are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[objective]
