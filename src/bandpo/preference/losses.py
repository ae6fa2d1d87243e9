"""The one pairwise loss, and what stands before it: confidence, calibrated rewards; KTO for what comes without pairs."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

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

    "Chosen" is the first completion of the pair: where a reward gap or a confidence says so, it need not be the better one.

    Args:
        chosen_logprobs: Log-prob of the first completion, summed over its tokens, `(pairs,)`, with gradient.
        rejected_logprobs: The same of the second.
        ref_chosen_logprobs: Of the first under the reference; required unless the objective has reference "none".
        ref_rejected_logprobs: Of the second.
        objective: A `PairObjective`, or a name in `PREFERENCES`.
        chosen_lengths: Tokens of the first, for objectives with length "mean".
        rejected_lengths: Tokens of the second.
        reward_gap: Reward of the first less that of the second, for "squared" targets, and for "soft"
            ones through `σ(label_scale·gap)`.
        confidence: Probability that the first is preferred, for "soft" targets; no gradient flows into it.

    Returns:
        `(pairs,)` in at least float32, and metrics: `rewards/*` are implicit rewards βφ.

    Raises:
        ValueError: If shapes differ, or an input that the objective needs is missing, or one that it would ignore is given.

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
    sides = [
        _log_ratio(objective, new, ref, lengths, side)
        for side, new, ref, lengths in (
            ("chosen", chosen_logprobs, ref_chosen_logprobs, chosen_lengths),
            ("rejected", rejected_logprobs, ref_rejected_logprobs, rejected_lengths),
        )
    ]
    pairs = chosen_logprobs.shape
    for name, x in (("rejected_logprobs", rejected_logprobs), ("reward_gap", reward_gap), ("confidence", confidence)):
        if x is not None and x.shape != pairs:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, chosen_logprobs {tuple(pairs)}: one value for each pair"
            )
    target = _target(objective, reward_gap, confidence, like=sides[0])
    scores = [objective.beta * objective.link(side) for side in sides]
    difference = scores[0] - scores[1]
    h = difference
    clipped = torch.zeros((), dtype=h.dtype, device=h.device)
    if objective.r_max is not None:
        h = h.clamp(-2 * objective.r_max, 2 * objective.r_max)
        clipped = (difference.detach() != h.detach()).to(h.dtype).mean()
    h = h - objective.margin
    metrics = {
        "rewards/chosen": scores[0].mean(), "rewards/rejected": scores[1].mean(), "rewards/margins": difference.mean(),
        "rewards/accuracies": (difference > 0).to(h.dtype).mean(), "log_ratio/chosen": sides[0].mean(),
        "log_ratio/rejected": sides[1].mean(), "clipped": clipped,
    }  # fmt: skip
    return _loss(objective, h, target), {name: value.detach() for name, value in metrics.items()}


def _log_ratio(objective: PairObjective, new: Tensor, ref: Tensor | None, lengths: Tensor | None, side: str) -> Tensor:
    if not new.is_floating_point():
        raise TypeError(f"{side}_logprobs must be floating point, got {new.dtype}")
    wide = new.float() if new.dtype in (torch.float16, torch.bfloat16) else new
    if objective.reference != "none":
        if ref is None:
            raise ValueError(f"objective {objective.name!r} needs ref_{side}_logprobs")
        if ref.shape != new.shape:
            raise ValueError(f"ref_{side}_logprobs has shape {tuple(ref.shape)}, {side}_logprobs {tuple(new.shape)}")
        wide = wide - ref.detach().to(wide.dtype)
    if objective.length == "mean":
        if lengths is None:
            raise ValueError(f"objective {objective.name!r} needs {side}_lengths: it compares means over tokens")
        if lengths.shape != new.shape:
            raise ValueError(f"{side}_lengths has shape {tuple(lengths.shape)}, {side}_logprobs {tuple(new.shape)}")
        wide = wide / lengths.clamp(min=1)
    return wide


def _target(objective: PairObjective, gap: Tensor | None, confidence: Tensor | None, *, like: Tensor) -> Tensor | None:
    """What h is compared with: a probability, a gap, or nothing."""
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
        return confidence.detach().to(like.dtype)
    if gap is not None:
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

    `max(σ(α(mean σ(R₁) - mean σ(R₂))), floor)`. The batch mean, α = 7.5 and floor ½ are what the authors' code does; what the
    paper defines was not established. level="pair" takes each pair's own σ(R) in place of the means.

    Args:
        chosen_rewards: `(pairs,)`.
        rejected_rewards: `(pairs,)`.
        alpha: Sharpness.
        level: "batch", one value for all; or "pair".
        floor: Least confidence; ½ makes a doubtful pair pull towards the reference. 0 for none.

    Returns:
        `(pairs,)`, detached.

    Raises:
        ValueError: If shapes differ, or a value is out of range.

    Examples:
        >>> preference_confidence(torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0]), level="pair")
        tensor([0.9967, 0.5000])
    """
    if chosen_rewards.shape != rejected_rewards.shape:
        raise ValueError(
            f"rewards of shapes {tuple(chosen_rewards.shape)} and {tuple(rejected_rewards.shape)} do not pair"
        )
    if level not in ("batch", "pair"):
        raise ValueError(f"level must be batch or pair, got {level!r}")
    if not (alpha > 0 and 0 <= floor < 1):
        raise ValueError(f"alpha must be positive and floor in [0, 1), got {alpha} and {floor}")
    gap = chosen_rewards.detach().sigmoid() - rejected_rewards.detach().sigmoid()
    if level == "batch":
        gap = gap.mean().expand_as(gap)
    return (alpha * gap).sigmoid().clamp(min=floor)


def reward_calibration(rewards: Tensor, log_ratio: Tensor, calibration: float) -> Tensor:
    """Reward of reward calibration, `r - γ_c log(π_k/π₀)` (arXiv:2601.08421, algorithm 3).

    With reference π_k and step β, `u = log(π/π₀)` obeys `u ← (1 - γ_c/β) u + r/β`: it tends to r/γ_c, where γ_c = 0 (REBEL)
    grows without end. So γ_c is the final temperature and β the size of the step.

    Args:
        rewards: Of completions or of pairs' gaps, any shape.
        log_ratio: `log π_k - log π₀` of the same completions, or its gap.
        calibration: γ_c >= 0.

    Examples:
        >>> reward_calibration(torch.tensor([1.0]), torch.tensor([2.0]), 0.1)
        tensor([0.8000])
    """
    if not calibration >= 0:
        raise ValueError(f"calibration must be >= 0, got {calibration}")
    if rewards.shape != log_ratio.shape:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} and log_ratio of {tuple(log_ratio.shape)} differ")
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
    """KTO's loss of completions that are good or bad by themselves (arXiv:2402.01306).

    `w_d (1 - σ(β(Δ - z₀)))` for desirable ones, `w_u (1 - σ(β(z₀ - Δ)))` for others; z₀ an estimate of KL(π ‖ π_ref) from
    mismatched pairs, held at >= 0 by the caller, without gradient. Train with TRL's `KTOTrainer`; this is its formula.

    Args:
        log_ratio: `log π - log π_ref` of each completion, `(batch,)`.
        desirable: Bool, `(batch,)`.
        kl: z₀, 0-d.
        beta: β > 0.
        desirable_weight: w_d.
        undesirable_weight: w_u.
        link: Only `LOG`: the loss is no difference within a prompt, so another link's Z(x) would not cancel.

    Raises:
        ValueError: If `link` is not `LOG`, or shapes differ.

    Examples:
        >>> kto_loss(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), torch.tensor(0.0))
        tensor([0.4750, 0.5250])
    """
    if link is not LOG:
        raise ValueError(f"kto_loss: link {link.name!r} leaves Z(x) in a loss without pairs; use LOG")
    if log_ratio.shape != desirable.shape:
        raise ValueError(
            f"log_ratio of shape {tuple(log_ratio.shape)} and desirable of {tuple(desirable.shape)} differ"
        )
    margin = beta * (log_ratio - kl.detach())
    return torch.where(desirable, desirable_weight * (-margin).sigmoid(), undesirable_weight * margin.sigmoid())
