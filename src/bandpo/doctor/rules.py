"""Rules over a configuration."""

import dataclasses
from collections.abc import Callable
from typing import cast

import torch

from bandpo.bounds import Band, RatioBounds
from bandpo.doctor.setup import Setup
from bandpo.integrations.trl.precision import largest_moved
from bandpo.monitoring.findings import Finding
from bandpo.reference import DESCENDS, check_kl

PROBABILITIES = (1e-4, 1e-3, 1e-2, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
# Peak memory of the plain path in multiples of its logits, and that of `bandpo.token_logprobs` over it. Both are measured by
# `make bench` (docs/performance.md), and tests/unit/test_bench.py compares these numbers with its record.
_PLAIN = 4.0
_CHUNKED = 0.112
_LARGE = 1.0  # GiB of logits; less gets no advice
_TYPICAL_WEIGHT = 0.02  # standard deviation that language models' weights are initialised with


def examine_setup(setup: Setup) -> list[Finding]:
    """What the settings of a run mean for its trust region.

    Args:
        setup: The settings of the run.

    Examples:
        >>> from bandpo import OBJECTIVES
        >>> found = examine_setup(Setup("TRL", OBJECTIVES["bandpo-kl"], steps=1.0, steps_from="num_iterations=1"))
        >>> [(f.rule, f.level) for f in found if f.level == "problem"]
        [('inert', 'problem')]
    """
    found = [rule(setup) for rule in RULES]
    if setup.assumed:
        whose = setup.defaults_of or f"{setup.host}'s"
        values = ", ".join(setup.assumed)
        found.append(Finding("assumed", "note", f"not in the file, so {whose} defaults are assumed: {values}"))
    unread = [Finding("unread", "note", what) for what in setup.unread]
    return [f for f in found if f is not None] + unread


def loss_in_use(s: Setup) -> Finding:
    """Whether the configured loss is the one that runs, and who computes it."""
    if s.bypassed:
        return Finding("bypass", "problem", s.bypassed, "another loss than the configured one would run", s.knob("use"))
    if s.refused:
        return Finding(
            "refused",
            "problem",
            s.refused,
            f"bandpo raises this error in {s.host}'s workers, before the first update",
        )
    if s.objective is None:
        return _unknown("bypass", "which loss runs")
    if not s.ours:
        return Finding(
            "bypass",
            "note",
            f"the loss is {s.host}'s own ({s.objective.name}); bandpo has no part in it",
            "the other findings are about that loss",
            s.knob("use"),
        )
    return Finding("bypass", "ok", f"bandpo computes the loss: {s.objective.name}, {s.objective.formula or 'your own'}")


def can_bind(s: Setup) -> Finding:
    """Whether any ratio can differ from 1."""
    if s.steps is None:
        return _unknown("inert", "how many optimiser steps each rollout is used for", s.steps_from)
    if s.steps > 1:
        return Finding("inert", "ok", f"{s.steps:g} optimiser steps for each rollout ({s.steps_from})")
    seen = f"one optimiser step for each rollout ({s.steps_from})"
    against_sampler = s.old_is_rollout or (s.objective is not None and s.objective.anchor == "rollout")
    if s.objective is None or (s.engine is None and against_sampler) or (s.old_is_rollout is None and s.engine):
        return Finding("inert", "note", f"{seen}; whether ratios are taken against the sampler is not known")
    if against_sampler and s.engine and s.lag:
        return Finding("inert", "ok", f"{seen}; ratios are taken against a sampler that may be {s.lag:g} steps older")
    if against_sampler and s.engine:
        only = "only by" if s.lag == 0 else "by the age of the samples, which is not known, and by"
        return Finding(
            "inert",
            "note",
            seen,
            f"ratios differ from 1 {only} the difference between {s.engine} and the trainer",
            s.knob("more steps"),
        )
    return Finding(
        "inert",
        "problem",
        f"{seen}: the trust region can never bind",
        "the policy in training is the one that the ratio is taken against, so every ratio is 1 and no token is clipped",
        s.knob("more steps"),
    )


def anchor(s: Setup) -> Finding:
    """Which policy the ratio is taken against, and whether the host gives that one."""
    if s.objective is None or s.old_is_rollout is None:
        return _unknown("anchor", "which policy the ratio is taken against")
    wanted = s.objective.anchor
    if (wanted == "rollout") != s.old_is_rollout and s.host == "verl":
        given = "the sampler's log-probs" if s.old_is_rollout else "recomputed log-probs"
        return Finding(
            "anchor",
            "problem",
            f"{s.objective.name} takes its ratio against the {wanted} policy, and verl gives {given}",
            "algorithm.rollout_correction.bypass_mode determines which log-probs verl uses as the old ones",
            f"algorithm.rollout_correction.bypass_mode={wanted == 'rollout'}"
            + (", and policy_loss.bypass_mode with the same value" if s.ours else ""),
        )
    if wanted == "rollout":
        whose = f"{s.engine}'s" if s.engine else "its"
        source = "which is the trainer itself" if s.engine == "" else f"{whose} log-probs"
        return Finding("anchor", "ok", f"ratios are taken against the sampler, {source}")
    if s.corrected is None or (s.engine is None and not s.corrected):
        return _unknown("anchor", "whether the difference between sampler and trainer is corrected")
    if s.engine and not s.corrected:
        return Finding(
            "anchor",
            "warning",
            f"ratios are taken against recomputed log-probs, and the difference to {s.engine} is not weighed",
            f"{s.engine} and the trainer give the same token different probabilities, which makes the gradient biased",
            s.knob("correction"),
        )
    return Finding("anchor", "ok", "ratios are taken against the policy before the update (recomputed log-probs)")


def reference(s: Setup) -> Finding | None:
    """What the gradient of the KL to the reference descends."""
    if s.kl_coef is None or (s.kl_coef and s.kl is None):
        return _unknown("kl", "whether the loss has a KL to the reference, and which one")
    if not s.kl_coef:
        return None
    seen = f"a KL to the reference of {s.kl_coef:g} ({s.kl_from})"
    if not s.kl:
        return Finding(
            "kl",
            "warning",
            f"{seen}: none of the terms of docs/kl.md",
            "what its gradient descends is not known",
            s.knob("kl"),
        )
    found = DESCENDS[check_kl(s.kl)]
    what = f"its expected gradient is {found.on_policy} on tokens of the policy, {found.off_policy} on older tokens"
    if s.kl == "k1":
        return Finding("kl", "warning", f"{seen}, a plain k1: it does not pull to the reference", what, s.knob("kl"))
    if found.on_policy != found.off_policy or "KL(π ‖ π_ref)" not in found.on_policy:
        return Finding("kl", "note", f"{seen}, the {s.kl}", what, s.knob("kl"))
    return Finding("kl", "ok", f"{seen}, the {s.kl}: {what}")


def sampling(s: Setup) -> Finding:
    """What temperature and truncation do to p and to the ratio."""
    if s.temperature is not None and s.temperature <= 0:
        return Finding(
            "sampling",
            "problem",
            f"temperature={s.temperature:g} samples greedily",
            "all completions of a prompt are the same, so every advantage is 0",
            "temperature=1.0",
        )
    cut = [
        f"{name}={value:g}"
        for name, value, on in (
            ("top_p", s.top_p, s.top_p is not None and s.top_p < 1),
            ("top_k", s.top_k, s.top_k is not None and s.top_k > 0),
            ("min_p", s.min_p, s.min_p is not None and s.min_p > 0),
        )
        if on
    ]
    if cut:
        return Finding(
            "sampling",
            "warning",
            f"{', '.join(cut)} cut the sampler's distribution",
            "the log-probs are those of the whole distribution: a sampled token was more likely than its p, a token that is "
            "cut is never sampled and can only lose probability, and the ratio is biased",
            s.knob("no truncation"),
        )
    settings = {"temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k, "min_p": s.min_p}
    missing = [name for name, value in settings.items() if value is None]
    if missing:
        return _unknown("sampling", " and ".join(missing))
    if s.temperature != 1:
        return Finding(
            "sampling",
            "note",
            f"temperature={s.temperature:g}: p is the policy's probability at that temperature",
            "the trust region is that of the policy at this temperature; evaluate at the same temperature, or report both",
        )
    return Finding(
        "sampling", "ok", "temperature 1 and no truncation: p is the probability with which a token was sampled"
    )


def groups(s: Setup) -> Finding | None:
    """What a group of one completion means for advantages that compare the completions of a prompt."""
    if s.alone is None:
        return None
    if s.group is None:
        return _unknown("group", "how many completions a prompt has")
    if s.group > 1:
        return None
    level, cause = s.alone
    return Finding("group", level, "one completion for each prompt", cause, s.knob("group"))


def precision(s: Setup) -> Finding | None:
    """Whether the optimiser's steps are smaller than the spacing of 16-bit weights.

    A configuration gives only the dtype of the weights, so the rule uses a typical size of weights. The trainers count the
    weights themselves (`bandpo.integrations.trl.precision`).
    """
    largest = None if s.learning_rate is None else largest_moved(s.weights or "", s.learning_rate)
    if largest is None:
        return None
    seen = f"weights are kept in {s.weights}, at learning rate {s.learning_rate:g}"
    if largest < _TYPICAL_WEIGHT:
        return Finding(
            "precision",
            "warning",
            f"{seen}: most updates are lost",
            f"an update of about the learning rate is below the spacing of {s.weights} numbers for weights above {largest:.2g}",
            s.knob("precision"),
        )
    return Finding("precision", "ok", f"{seen}: weights up to {largest:.2g} can move")


def interval(s: Setup) -> Finding | None:
    """The interval at several p, and the fixed clip with the same edges there."""
    if s.objective is None:
        return _unknown("interval", "the region")
    table = _intervals(s)
    if table is None:
        return Finding("interval", "note", f"the region of {s.objective.name} depends on more than p: no table")
    lower, upper = table
    if bool((lower == lower[0]).all() and (upper == upper[0]).all()):
        seen = (
            f"the interval is a clip of {1 - lower[0].item():.3g} below and {upper[0].item() - 1:.3g} above for every p"
        )
        return Finding("interval", "note", seen)
    rows = [f"{'p':>7}  {'lower':>8}  {'upper':>9}  as a clip (below, above)   set by (below, above)"]
    edges = [cast("list[float]", side.tolist()) for side in (lower, upper)]
    for p, low, high in zip(PROBABILITIES, *edges, strict=True):
        rows.append(
            f"{p:>7g}  {low:>8.4f}  {high:>9.4f}  {1 - low:>8.4f}, {high - 1:<9.4f}      "
            f"{'simplex' if low <= 0 else 'region'}, {_set_by(s, p, high)}"
        )
    middle = PROBABILITIES.index(0.5)
    below, above = 1 - lower[middle].item(), upper[middle].item() - 1
    return Finding(
        "interval",
        "note",
        f"at p = 0.5 the interval is that of a clip of {below:.3g} below and {above:.3g} above",
        details=tuple(rows),
    )


def cap(s: Setup) -> Finding | None:
    """Below which probability the cap, and not the radius, sets the upper bound."""
    bounds = None if s.objective is None else s.objective.bounds
    if not isinstance(bounds, Band) or bounds.max_ratio is None:
        return None
    threshold = cap_threshold(bounds)
    if threshold is None:
        return Finding(
            "cap", "ok", f"max_ratio={bounds.max_ratio:g} never sets the upper bound: the radius is tighter for every p"
        )
    return Finding(
        "cap",
        "note",
        f"for tokens of p < {threshold:.3g} max_ratio={bounds.max_ratio:g} sets the upper bound, not the radius",
        "for rarer tokens the radius alone would allow ratios above the cap",
        "max_ratio=inf for no cap",
    )


def logits(s: Setup) -> Finding | None:
    """How much memory the logits need."""
    if s.vocabulary is None or not s.tokens:
        return None
    size = s.tokens * s.vocabulary * 4 / 2**30
    seen = f"logits of {s.tokens} tokens x {s.vocabulary} words are {size:.2f} GiB in float32"
    if s.fused_head:
        return Finding(
            "memory", "ok", f"{seen}, and {s.host} does not make them: its fused head computes the log-probs in chunks"
        )
    if size < _LARGE:
        return Finding("memory", "ok", f"{seen}, about {_PLAIN * size:.2f} with log-softmax and gradients")
    return Finding(
        "memory",
        "warning",
        f"{seen}, about {_PLAIN * size:.1f} GiB with log-softmax and gradients",
        "each step makes the whole matrix",
        f"{s.knob('fused head')}; in your own loop use bandpo.token_logprobs, which needs about "
        f"{_CHUNKED * _PLAIN * size:.1f} GiB (ratio measured at 4096 x 151936)",
    )


RULES: tuple[Callable[[Setup], Finding | None], ...] = (
    loss_in_use,
    can_bind,
    anchor,
    reference,
    sampling,
    groups,
    precision,
    interval,
    cap,
    logits,
)
"""The rules, in the order in which their findings are printed."""


def cap_threshold(band: Band) -> float | None:
    """The probability below which the cap sets the upper bound, None if there is none.

    The upper bound of the radius falls with p (docs/theory.md), so there is one such p, found by bisection of its logarithm.

    Args:
        band: A band with a `max_ratio`.

    Examples:
        >>> from bandpo import KL
        >>> round(cap_threshold(Band(KL, 0.05, max_ratio=10.0)), 5)
        0.00714
    """
    limit = band.max_ratio
    assert limit is not None
    free = dataclasses.replace(band, max_ratio=None)

    def capped(logp: float) -> bool:
        return free(torch.tensor([logp], dtype=torch.float64)).upper.item() > limit

    low, high = -80.0, -1e-9
    if not capped(low):
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if capped(middle) else (low, middle)
    return torch.tensor(low, dtype=torch.float64).exp().item()


def _unknown(rule: str, what: str, why: str = "") -> Finding:
    return Finding(rule, "note", f"not known: {what}", why or "see the lines `unread`")


def _intervals(s: Setup) -> RatioBounds | None:
    objective = s.objective
    if objective is None or objective.bounds_inputs or objective.ratio_level != "token":
        return None
    if objective.top_k is not None:
        return None
    found = objective.bounds(torch.tensor(PROBABILITIES, dtype=torch.float64).log())
    return found if isinstance(found, RatioBounds) else None


def _set_by(s: Setup, p: float, upper: float) -> str:
    bounds = None if s.objective is None else s.objective.bounds
    if isinstance(bounds, Band) and bounds.max_ratio is not None and upper == bounds.max_ratio:
        return "cap"
    return "simplex" if upper >= (1 / p) * (1 - 1e-12) else "region"
