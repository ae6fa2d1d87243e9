"""The pairwise loss; the confidence and the calibrated rewards that it may take; and KTO for completions without pairs."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bandpo._inputs import check_tensor, check_values
from bandpo.preference._checks import check_column, check_number
from bandpo.preference.links import LOG, Link
from bandpo.preference.objectives import PairObjective, get_pair_objective


def pair_loss(
    *,
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor | None = None,
    ref_rejected_logprobs: Tensor | None = None,
    objective: PairObjective | str = "chipo",
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    reward_gap: Tensor | None = None,
    confidence: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each pair, and detached 0-d metrics. The table of formulas is in `PairObjective`.

    "Chosen" is the first completion of the pair; with a reward gap or a confidence it need not be the better one. A pair with a
    log-prob that is not finite has loss 0 and gradient 0, is left out of the metrics, and is counted in `nonfinite_fraction`.

    Args:
        chosen_logprobs: Log-prob of the first completion, summed over its tokens, `(pairs,)`, with gradient.
        rejected_logprobs: Log-prob of the second completion, `(pairs,)`, with gradient.
        ref_chosen_logprobs: Log-prob of the first completion under the reference, `(pairs,)`; required unless the objective
            has reference "none".
        ref_rejected_logprobs: Log-prob of the second completion under the reference, `(pairs,)`.
        objective: A `PairObjective`, or a name in `PREFERENCES`.
        chosen_lengths: Number of tokens of the first completion, `(pairs,)`, at least 1, for objectives with length "mean".
        rejected_lengths: Number of tokens of the second completion, `(pairs,)`.
        reward_gap: Reward of the first completion less that of the second, `(pairs,)`, finite; for "squared" targets, and for
            "soft" ones through `σ(label_scale·gap)`.
        confidence: Probability that the first completion is preferred, `(pairs,)`, for "soft" targets; without gradient.

    Returns:
        The loss, `(pairs,)` in at least float32, and metrics; `rewards/*` are implicit rewards βφ. A mean over no pair is NaN.

    Raises:
        TypeError: If an input is not a tensor of a fitting dtype.
        ValueError: If shapes differ, a value is out of range, an input that the objective needs is missing, or an input that
            it would ignore is given. Values are checked on a CPU; on an accelerator a device assertion stops the process.

    Examples:
        >>> new = torch.tensor([-3.0, -4.0]), torch.tensor([-3.5, -3.0])
        >>> old = torch.tensor([-3.0, -3.0]), torch.tensor([-3.0, -3.0])
        >>> loss, metrics = pair_loss(chosen_logprobs=new[0], rejected_logprobs=new[1], ref_chosen_logprobs=old[0],
        ...                           ref_rejected_logprobs=old[1], objective="dpo")
        >>> loss
        tensor([0.6685, 0.7444])
        >>> metrics["rewards/accuracies"]
        tensor(0.5000)
    """
    objective = get_pair_objective(objective)
    check_column("chosen_logprobs", chosen_logprobs)
    check_column("rejected_logprobs", rejected_logprobs, chosen_logprobs, like_name="chosen_logprobs")
    sides = [
        _log_ratio(objective, new, ref, lengths, side)
        for side, new, ref, lengths in (
            ("chosen", chosen_logprobs, ref_chosen_logprobs, chosen_lengths),
            ("rejected", rejected_logprobs, ref_rejected_logprobs, rejected_lengths),
        )
    ]
    finite = sides[0].isfinite() & sides[1].isfinite()
    sides = [torch.where(finite, side, 0.0) for side in sides]
    target = _target(objective, reward_gap, confidence, like=sides[0])
    scores = [objective.beta * objective.link(side) for side in sides]
    difference = scores[0] - scores[1]
    h = difference
    clipped = torch.zeros_like(h)
    if objective.r_max is not None:
        h = h.clamp(-2 * objective.r_max, 2 * objective.r_max)
        clipped = (difference.detach() != h.detach()).to(h.dtype)
    h = h - objective.margin
    columns = {
        "rewards/chosen": scores[0],
        "rewards/rejected": scores[1],
        "rewards/margins": difference,
        "rewards/accuracies": (difference > 0).to(h.dtype),
        "log_ratio/chosen": sides[0],
        "log_ratio/rejected": sides[1],
        "clipped": clipped,
    }
    count = finite.sum()
    metrics = {name: torch.where(finite, x.detach(), 0.0).sum() / count for name, x in columns.items()}
    metrics["nonfinite_fraction"] = 1 - finite.to(h.dtype).mean()
    return torch.where(finite, _loss(objective, h, target), 0.0), metrics


def _log_ratio(objective: PairObjective, new: Tensor, ref: Tensor | None, lengths: Tensor | None, side: str) -> Tensor:
    extras = (
        (f"ref_{side}_logprobs", ref, objective.reference != "none", "log-ratios to a reference"),
        (f"{side}_lengths", lengths, objective.length == "mean", "means over tokens"),
    )
    for name, value, used, what in extras:
        if used and value is None:
            raise ValueError(f"objective {objective.name!r} needs {name}: it compares {what}")
    for name, value, used, what in extras:
        if value is not None and not used:
            raise ValueError(f"objective {objective.name!r} does not compare {what}, so it makes no use of {name}")
    wide = new.float() if new.dtype in (torch.float16, torch.bfloat16) else new
    if ref is not None:
        check_column(f"ref_{side}_logprobs", ref, new, like_name=f"{side}_logprobs")
        wide = wide - ref.detach().to(wide.dtype)
    if lengths is not None:
        check_column(f"{side}_lengths", lengths, new, like_name=f"{side}_logprobs", floating=False)
        check_values(lengths >= 1, lengths, f"{side}_lengths must be at least 1: a completion has a token")
        wide = wide / lengths
    return wide


def _target(objective: PairObjective, gap: Tensor | None, confidence: Tensor | None, *, like: Tensor) -> Tensor | None:
    """The target of h: a probability, a reward gap, or None."""
    for name, value, used in (
        ("reward_gap", gap, objective.needs_gap),
        ("confidence", confidence, objective.target == "soft"),
    ):
        if value is not None and not used:
            raise ValueError(
                f"objective {objective.name!r} has target {objective.target!r}, which makes no use of {name}"
            )
    if gap is not None and confidence is not None:
        raise ValueError("reward_gap and confidence are both given; a soft target is one of them")
    if confidence is not None:
        check_column("confidence", confidence, like, like_name="chosen_logprobs", floating=False)
        check_values((confidence >= 0) & (confidence <= 1), confidence, "confidence must be a probability, in [0, 1]")
        return confidence.detach().to(like.dtype)
    if gap is not None:
        check_column("reward_gap", gap, like, like_name="chosen_logprobs", floating=False)
        check_values(gap.isfinite(), gap, "reward_gap must be finite", fix="leave pairs without a score out")
        scaled = objective.label_scale * gap.detach().to(like.dtype)
        return scaled.sigmoid() if objective.target == "soft" else scaled
    if objective.target == "squared":
        raise ValueError(f"objective {objective.name!r} needs reward_gap")
    if objective.target == "soft":
        if not objective.label_smoothing:
            raise ValueError(f"objective {objective.name!r} needs confidence, reward_gap, or a label_smoothing")
        return torch.full_like(like, 1 - objective.label_smoothing)
    return None


def _loss(objective: PairObjective, h: Tensor, target: Tensor | None) -> Tensor:
    match objective.target:
        case "hard":
            return -logsigmoid(h)
        case "hinge":
            return (1 - h).clamp(min=0)
        case "ipo":
            return (h / objective.beta - 1 / (2 * objective.beta)).square()
        case "robust":
            e = objective.label_smoothing
            return (-(1 - e) * logsigmoid(h) + e * logsigmoid(-h)) / (1 - 2 * e)
        case "squared":
            assert target is not None
            return (h - target).square()
        case "soft":
            assert target is not None
            return -target * logsigmoid(h) - (1 - target) * logsigmoid(-h)


def preference_confidence(
    chosen_rewards: Tensor, rejected_rewards: Tensor, *, alpha: float = 7.5, level: str = "batch", floor: float = 0.5
) -> Tensor:
    """Confidence that the first of a pair is the better one, from a probe's rewards (RBRM, arXiv:2503.10093).

    Computes `max(σ(α(mean σ(R₁) - mean σ(R₂))), floor)`. The batch mean, α = 7.5 and floor ½ follow the authors' code; the
    definition in the paper was not established. level="pair" uses the σ(R) of each pair in place of the means.

    Args:
        chosen_rewards: Rewards R₁ of the first completions, `(pairs,)`.
        rejected_rewards: Rewards R₂ of the second completions, `(pairs,)`.
        alpha: Sharpness α > 0.
        level: "batch" for one value for all pairs, or "pair".
        floor: Smallest confidence, in [0, 1); at ½ a doubtful pair pulls towards the reference.

    Returns:
        `(pairs,)`, detached.

    Raises:
        TypeError: If rewards are not float tensors.
        ValueError: If shapes differ, or a value is out of range or NaN.

    Examples:
        >>> preference_confidence(torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0]), level="pair")
        tensor([0.9967, 0.5000])
    """
    check_column("chosen_rewards", chosen_rewards)
    check_column("rejected_rewards", rejected_rewards, chosen_rewards, like_name="chosen_rewards")
    if level not in ("batch", "pair"):
        raise ValueError(f"level must be batch or pair, got {level!r}")
    check_number("alpha", alpha, low=0, open_low=True)
    check_number("floor", floor, low=0)
    if floor >= 1:
        raise ValueError(f"floor must be below 1, got {floor}")
    for name, x in (("chosen_rewards", chosen_rewards), ("rejected_rewards", rejected_rewards)):
        check_values(~x.isnan(), x, f"{name} must not be NaN")
    gap = chosen_rewards.detach().sigmoid() - rejected_rewards.detach().sigmoid()
    if level == "batch":
        gap = gap.mean().expand_as(gap)
    return (alpha * gap).sigmoid().clamp(min=floor)


def reward_calibration(rewards: Tensor, log_ratio: Tensor, calibration: float) -> Tensor:
    """Reward of reward calibration, `r - γ_c log(π_k/π₀)` (arXiv:2601.08421, algorithm 3).

    With reference π_k and step β, `u = log(π/π₀)` obeys `u ← (1 - γ_c/β) u + r/β`. It tends to r/γ_c, and grows without limit
    for γ_c = 0 (REBEL). So γ_c is the final temperature and β the size of the step.

    Args:
        rewards: Rewards of completions, or reward gaps of pairs, any shape.
        log_ratio: `log π_k - log π₀` of the same completions, or the gap of pairs, the same shape.
        calibration: γ_c >= 0.

    Returns:
        The calibrated rewards, the same shape and dtype as `rewards`.

    Raises:
        TypeError: If `rewards` or `log_ratio` is not a float tensor.
        ValueError: If shapes differ, a log-ratio is not finite, or γ_c is below 0.

    Examples:
        >>> reward_calibration(torch.tensor([1.0]), torch.tensor([2.0]), 0.1)
        tensor([0.8000])
    """
    check_number("calibration", calibration, low=0)
    check_tensor("rewards", rewards)
    check_tensor("log_ratio", log_ratio)
    if rewards.shape != log_ratio.shape:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} and log_ratio of {tuple(log_ratio.shape)} differ")
    check_values(log_ratio.isfinite(), log_ratio, "log_ratio must be finite")
    return rewards - calibration * log_ratio.detach().to(rewards.dtype)


def kto_loss(
    log_ratio: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    link: Link = LOG,
) -> Tensor:
    """KTO loss of single completions that are labelled good or bad (arXiv:2402.01306).

    Computes `w_d (1 - σ(β(Δ - z₀)))` for desirable completions and `w_u (1 - σ(β(z₀ - Δ)))` for others, with z₀ an estimate of
    KL(π ‖ π_ref) from mismatched pairs, which the caller keeps >= 0 and without gradient. For training use TRL's `KTOTrainer`,
    which has the same formula.

    Args:
        log_ratio: Δ = `log π - log π_ref` of each completion, `(batch,)`. A value that is not finite gives loss 0 and
            gradient 0.
        desirable: Whether each completion is good, bool, `(batch,)`.
        kl: z₀ >= 0, 0-d.
        beta: β > 0.
        desirable_weight: w_d >= 0.
        undesirable_weight: w_u >= 0.
        link: Only `LOG` is allowed: the loss is not a difference within a prompt, so the Z(x) of another link would not cancel.

    Returns:
        `(batch,)` in at least float32.

    Raises:
        TypeError: If an input is not a tensor of a fitting dtype; convert labels of 0 and 1 to bool.
        ValueError: If `link` is not `LOG`, shapes differ, or a value is out of range.

    Examples:
        >>> kto_loss(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), torch.tensor(0.0))
        tensor([0.4750, 0.5250])
    """
    if link is not LOG:
        raise ValueError(f"kto_loss: link {link.name!r} leaves Z(x) in a loss without pairs; use LOG")
    check_column("log_ratio", log_ratio)
    check_tensor("desirable", desirable, floating=False)
    if desirable.dtype != torch.bool:
        raise TypeError(f"desirable must be bool, got {desirable.dtype}; convert labels of 0 and 1 with .bool()")
    if log_ratio.shape != desirable.shape:
        raise ValueError(
            f"log_ratio of shape {tuple(log_ratio.shape)} and desirable of {tuple(desirable.shape)} differ"
        )
    check_tensor("kl", kl)
    if kl.dim():
        raise ValueError(f"kl must be a single value, 0-d, got shape {tuple(kl.shape)}")
    check_values((kl >= 0) & kl.isfinite(), kl.reshape(1), "kl must be finite and >= 0")
    check_number("beta", beta, low=0, open_low=True)
    check_number("desirable_weight", desirable_weight, low=0)
    check_number("undesirable_weight", undesirable_weight, low=0)
    wide = log_ratio.float() if log_ratio.dtype in (torch.float16, torch.bfloat16) else log_ratio
    finite = wide.isfinite()
    margin = beta * (torch.where(finite, wide, 0.0) - kl.detach())
    each = torch.where(desirable, desirable_weight * (-margin).sigmoid(), undesirable_weight * margin.sigmoid())
    return torch.where(finite, each, 0.0)
