"""Symptoms in a log that need more than one metric, or one that few hosts write: entropy with its cause, ages, weights."""

from bandpo.monitoring.findings import Finding
from bandpo.monitoring.series import Symptomatic

FEW = 0.5
"""Effective share of the samples below which their weights are told as too unequal."""
OLD = 8.0
"""Age in updates above which samples count as old."""
MOVED = 0.25
"""Relative change of the entropy above which its cause is looked for."""
ONE_SIDE = 2.0
"""How many times as often one side must clip to be told as the side that clips."""
_FEWEST = 5  # rows


def entropy_cause(log: Symptomatic) -> Finding | None:
    """Which edge the entropy's course agrees with.

    An upper edge holds down the probability of rare tokens, which lowers the entropy; a lower edge holds it up, which raises
    the entropy (arXiv:2509.26114; docs/evidence.md).
    """
    (name, entropy), (low_name, low), (high_name, high) = (log.series(k) for k in ("entropy", "clip low", "clip high"))
    if entropy.count < _FEWEST or not (low and high):
        return None
    start, end, below, above = entropy.start, entropy.end, low.mean, high.mean
    numbers = {"start": start, "end": end, "clips_below": below, "clips_above": above}
    side = (
        "the lower edge"
        if below > ONE_SIDE * above
        else "the upper edge"
        if above > ONE_SIDE * below
        else "both edges alike"
    )
    seen = f"{name} went from {start:.3f} to {end:.3f} while {low_name} was {below:.4f} and {high_name} {above:.4f}"
    if below == above == 0 or not start > 0 or abs(end - start) <= MOVED * start:
        state = (
            "it is steady" if abs(end - start) <= MOVED * abs(start) else "nothing was clipped, so no edge is its cause"
        )
        return Finding("entropy cause", "ok", f"{seen}: {state}", numbers=numbers)
    fell = end < start
    agrees = side == ("the upper edge" if fell else "the lower edge")
    seen = f"{seen}: {side} {'clip' if side.startswith('both') else 'clips'}"
    if agrees and fell:
        cause = "an upper edge keeps rare tokens with A > 0 from rising, which lowers the entropy"
        knob = "a higher upper edge (epsilon_high=0.28, or the upper half of a band), or a tighter lower side"
        return Finding("entropy cause", "warning", seen, cause, knob, numbers=numbers)
    if agrees:
        cause = "a lower edge keeps rare tokens with A < 0 from falling, which raises the entropy"
        knob = "a looser lower side, a lower upper edge, a smaller learning rate"
        return Finding("entropy cause", "warning", seen, cause, knob, numbers=numbers)
    cause = f"that side would have {'raised' if fell else 'lowered'} the entropy, so its cause is not the clip"
    if side.startswith("both"):
        cause = "the effects of the two edges on the entropy are opposite, so neither is its cause alone"
    knob = "look at the learning rate, the steps for each rollout, the KL to the reference, and the rewards"
    return Finding("entropy cause", "note", seen, cause, knob, numbers=numbers)


def effective_size(log: Symptomatic) -> Finding | None:
    """How many of the samples the weights for the sampler's mismatch leave in effect."""
    name, values = log.series("effective size")
    if not values:
        return None
    end = values.end
    numbers = {"start": values.start, "end": end, "least": values.smallest}
    seen = f"{name} is {end:.3f} at the end, {values.smallest:.3f} at least"
    if end > 1 + 1e-6:
        return Finding("effective size", "note", f"{seen}: a number of samples, not a share", numbers=numbers)
    if end < FEW:
        return Finding(
            "effective size",
            "warning",
            seen,
            "a few large weights decide the gradient: sampler and trainer have moved far from each other",
            "fresher samples, fewer steps for each rollout, a lower cap of the weights",
            numbers=numbers,
        )
    return Finding("effective size", "ok", seen, numbers=numbers)


def age(log: Symptomatic) -> Finding | None:
    """How many updates old the samples are."""
    name, values = log.series("age")
    if not values:
        return None
    end = values.end
    numbers = {"end": end, "most": values.largest}
    seen = f"{name} is {end:.2f} updates at the end, {values.largest:.2f} at most"
    if end > OLD:
        return Finding(
            "age",
            "warning",
            seen,
            "the policy has moved for many updates since these tokens were sampled",
            "fewer rollouts in flight (a smaller staleness limit), or an objective with the rollout anchor (dppo-kl)",
            numbers=numbers,
        )
    return Finding("age", "ok", seen, numbers=numbers)
