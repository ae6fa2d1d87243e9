"""Symptoms in a log of metrics, in the names of TRL, of verl, or our own."""

import math
import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

from bandpo._system.jsonl import as_number
from bandpo.doctor.findings import Finding
from bandpo.doctor.series import Stats, Symptomatic, stats_of
from bandpo.integrations.names import METRICS, OWN_PREFIX, TRL_NAMES, VERL_NAMES, averaged_name


def _hosts(*ours: str) -> tuple[str, ...]:
    """The names that TRL and verl have for a metric."""
    return tuple(METRICS[name][host] for name in ours for host in ("TRL", "verl") if host in METRICS[name])


def _own(ours: str, *old: str) -> tuple[str, ...]:
    """The names that a metric of bandpo has in a log of TRL, of verl, and in one of another loop.

    Args:
        ours: A name of `bandpo.metrics`.
        old: Names that earlier versions of bandpo wrote.
    """
    reported = f"{OWN_PREFIX['verl']}{averaged_name(ours)}"
    names = (TRL_NAMES.get(ours, ours), reported, VERL_NAMES.get(ours, reported), ours, *old)
    return tuple(dict.fromkeys(names))


NAMES: Mapping[str, tuple[str, ...]] = {
    "entropy": _hosts("entropy"),
    "clip": _own("clip_fraction/any"),
    "outside": _own("outside_fraction/any"),
    "ratio": _own("ratio/mean"),
    "spent": _own("band/divergence_mean", "actor/band/band/divergence_mean"),
    "divergence": _own("band/divergence_max", "actor/band/band/divergence_max"),
    "cap": _own("band/cap_fraction", "actor/band/band/cap_fraction"),
    "nonfinite": _own("nonfinite_fraction"),
    "reward": _hosts("reward/mean", "reward/mean_with_kl"),
    "zero variance": _hosts("reward/zero_variance"),
    "spread": _hosts("reward/std"),
    "largest advantage": _hosts("advantages/max"),
    "smallest advantage": _hosts("advantages/min"),
    "mismatch": _hosts("rollout/difference"),
    "cut off": _hosts("length/cut_off"),
    "unscored": ("reward/unscored",),
    "gradient": _hosts("grad_norm"),
    "loss": (TRL_NAMES["loss"], VERL_NAMES["loss/policy"]),
}
"""What the rules look at, and the names of it in logs; the first name that a log has is used."""
_MOST_BROKEN = 10_000  # different names of metrics that are NaN or infinite somewhere

_OF_THE_UPDATE = re.compile(r"(^|[/_])(kl|loss|grad_norm|entropy|ratio|logps?|log_?probs?)($|[/_])")
_SEARCHED = 100_000  # rows after which a log without any of the metrics is given up
_NONE = array("d")
_SHOWN = 8  # names of metrics in a line

COLLAPSE, EXPLOSION = 0.2, 2.0
"""Entropy at the end over that at the start, below and above which it counts as collapsed or exploded."""
LOW_ENTROPY = 0.05  # nats; a fall that ends above is no collapse
TIGHT = 0.2  # share of clipped tokens
FAR = 1.0  # realised divergence over the radius, mean over tokens
MISMATCH = 0.02  # mean |log-prob difference| between sampler and trainer, nats
MANY = 0.5  # share of completions cut off, of edges set by the cap
SILENT = 0.8  # share of groups without signal; runs that learn well come to 0.6, where many prompts are solved
UNSCORED = 0.01  # share of samples without a reward


class Log(Symptomatic):
    """The series of a log, by their meaning: 8 bytes for each value that a rule looks at, and nothing else of its rows.

    Args:
        rows: Metrics by name, one row for each logging step; also as `number_texts` reads them.

    Raises:
        ValueError: If more different metrics than a run has are NaN or infinite.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.rows = 0
        """How many rows the log has."""
        self.found: dict[str, tuple[str, array[float]]] = {}
        """The name of each metric in the log, and its values."""
        self.broken: dict[str, int] = {}
        """Other metrics that are NaN or infinite, with the number of rows."""
        wanted = {what: (names, array("d")) for what, names in NAMES.items()}
        for row in rows:
            self.rows += 1
            self._add(row, wanted)
            if self.rows == _SEARCHED and not self.found and not self.broken:
                break
        looked_at = {name for name, _ in self.found.values()}
        self.broken = {name: count for name, count in self.broken.items() if name not in looked_at}
        self._finite = {what: _finite(values) for what, (_, values) in self.found.items()}
        self._stats: dict[str, Stats] = {}

    def _add(self, row: Mapping[str, Any], wanted: "dict[str, tuple[tuple[str, ...], array[float]]]") -> None:
        """Take the numbers of a row; `wanted` loses the names that are less preferred than one that was found."""
        for what, (names, values) in wanted.items():
            for name in names:
                value = row.get(name)
                if value is None:
                    continue
                number = float(value) if value.__class__ is bytes else _number(value)
                if number is None:
                    continue
                if not values or name is not names[-1]:  # the first number under this name
                    values = array("d")
                    wanted[what] = (names[: names.index(name) + 1], values)
                    self.found[what] = (name, values)
                values.append(number)
                break
        for name, value in row.items():
            # A text of a number can only be infinite by its exponent, or by hundreds of digits.
            finite = value.__class__ is bytes and not (b"e" in value or b"E" in value or len(value) > 300)
            if not finite and is_broken(float(value) if value.__class__ is bytes else value):
                self.broken[str(name)] = self.broken.get(str(name), 0) + 1
                if len(self.broken) > _MOST_BROKEN:
                    raise ValueError(f"more than {_MOST_BROKEN:,} different metrics of the log are NaN or infinite")

    def known(self) -> Set[str]:
        return self.found.keys()

    def others_lost(self) -> Mapping[str, int]:
        return self.broken

    def series(self, what: str) -> tuple[str, Stats]:
        if what not in self._stats:
            self._stats[what] = stats_of(self._finite.get(what, _NONE))
        return self.found[what][0] if what in self.found else NAMES[what][0], self._stats[what]

    def lost(self, what: str) -> tuple[int, int]:
        values = self.found[what][1]
        return len(values) - len(self._finite[what]), len(values)


def examine_log(rows: Iterable[Mapping[str, Any]]) -> list[Finding]:
    """Symptoms of a run, each with the metric, the cause and what to set.

    The start and the end of a metric are its means over the first and the last tenth of the log.

    Args:
        rows: The rows of metrics.jsonl, or of another log with the names of TRL or verl. A metric may be missing in some rows.

    Raises:
        ValueError: If the log has none of the metrics, or more than 10,000 different ones that are NaN or infinite.

    Examples:
        >>> rows = [{"entropy": 1.0 * 0.8**i, "clip_ratio/region_mean": 0.01} for i in range(20)]
        >>> [(f.rule, f.level) for f in examine_log(rows) if f.level != "ok"]
        [('entropy', 'warning')]
    """
    log = Log(rows)
    if not log.found and not log.broken:
        raise ValueError(
            f"the log has {log.rows}{' or more' * (log.rows == _SEARCHED)} rows and none of the metrics that are looked for: "
            f"{', '.join(name for names in NAMES.values() for name in names)}"
        )
    return [f for rule in RULES if (f := rule(log)) is not None]


def entropy(log: Symptomatic) -> Finding | None:
    """Whether the entropy collapsed or exploded."""
    name, values = log.series("entropy")
    if values.count < 5:
        return None
    start, end = values.start, values.end
    seen, numbers = f"{name} went from {start:.3f} to {end:.3f} nats", {"start": start, "end": end}
    if end < COLLAPSE * start and end < LOW_ENTROPY + COLLAPSE * start and start > LOW_ENTROPY:
        return Finding(
            "entropy",
            "warning",
            f"{seen}: collapse",
            "the policy has become nearly deterministic: common tokens take all probability, and rare tokens that led to "
            "rewards can no longer be sampled",
            "a higher upper edge for rare tokens: the upper half of a band (objective=bandpo-kl-upper) or Clip-Higher "
            "(epsilon_high=0.28, clip_ratio_high=0.28); or a tighter lower edge (a smaller epsilon, clip_ratio_low), a smaller "
            "learning rate, fewer steps for each rollout. Not the whole band: its lower half lets rare tokens fall",
            numbers=numbers,
        )
    if end > EXPLOSION * start and end > start + LOW_ENTROPY:
        return Finding(
            "entropy",
            "warning",
            f"{seen}: explosion",
            "updates move probability to tokens that were not sampled, often because of noise in the advantages or a sampler "
            "that differs from the trainer",
            "a smaller radius (epsilon_high) or learning rate, a cap (max_ratio=10), top_p=1; look at the sampler mismatch",
            numbers=numbers,
        )
    return Finding("entropy", "ok", seen, numbers=numbers)


def clipping(log: Symptomatic) -> Finding | None:
    """Whether the region clips no token at all, or too many."""
    name, values = log.series("clip")
    if not values:
        return None
    numbers = {"mean": values.mean, "largest": values.largest}
    nowhere = f"{name} is 0 in all {values.count} rows"
    if values.largest == 0 and log.no_signal():
        return Finding("clipping", "note", nowhere, "no group had a signal: see `signal`", numbers=numbers)
    outside_name, outside = log.series("outside")
    if values.largest == 0 and outside.largest > 0:  # a surrogate such as `soft_edge`, which takes no gradient away
        return Finding(
            "clipping",
            "ok",
            f"{name} is 0, because the surrogate keeps the gradient of tokens outside the region; {outside_name} is "
            f"{outside.mean:.4f} on average, {outside.largest:.4f} at most",
            numbers={"mean": outside.mean, "largest": outside.largest},
        )
    if values.largest == 0:
        ratio, ratios = log.series("ratio")
        inert = bool(ratios) and max(abs(ratios.largest - 1), abs(ratios.smallest - 1)) < 1e-6
        return Finding(
            "clipping",
            "problem" if inert else "warning",
            nowhere + (f", and {ratio} is 1: the region is inert" if inert else ""),
            "each rollout is used for one optimiser step, so nothing can be clipped"
            if inert
            else "the updates are too small to reach the edge, or each rollout is used for one optimiser step",
            "num_iterations=2 or more (ppo_epochs=2)"
            if inert
            else "a smaller radius, a higher learning rate, or more steps for each rollout",
            numbers=numbers,
        )
    if values.mean > TIGHT:
        return Finding(
            "clipping",
            "warning",
            f"{name} is {values.mean:.3f} on average, {values.largest:.3f} at most",
            "many tokens have left the region: it is tight for this learning rate and reuse",
            "a larger radius (bandpo doctor BATCH --target 0.02 computes one), a smaller learning rate, fewer steps for each "
            "rollout",
            numbers=numbers,
        )
    seen = f"{name} is {values.mean:.4f} on average, {values.largest:.4f} at most"
    return Finding("clipping", "ok", seen, numbers=numbers)


def overshoot(log: Symptomatic) -> Finding | None:
    """Whether tokens are far outside of the region: a clip removes their gradients, but does not move them back.

    The mean over tokens decides. The furthest token of a batch is the further out the more tokens the batch has, and is as far
    in runs that learn as in runs that a large learning rate has broken.
    """
    (name, spent), (furthest, most) = log.series("spent"), log.series("divergence")
    if not spent:
        seen = f"the furthest token of a step is {most.mean:.2f} radii out on average, {most.largest:.2f} at most ({furthest})"
        return Finding("overshoot", "ok", seen, numbers={"furthest": most.largest}) if most else None
    numbers = {"mean": spent.mean, "largest": spent.largest}
    seen = f"tokens are {spent.mean:.2f} radii from the old policy on average, {spent.largest:.2f} in the worst row ({name})"
    if spent.largest > FAR:
        return Finding(
            "overshoot",
            "warning",
            seen,
            "a clip stops the gradient of a token outside, and does not bring it back: a step was so large that the average "
            "token left the region",
            "a smaller learning rate, a smaller max_grad_norm (grad_clip), more samples in a step",
            numbers=numbers,
        )
    return Finding("overshoot", "ok", seen, numbers=numbers)


def mismatch(log: Symptomatic) -> Finding | None:
    """Whether sampler and trainer differ."""
    name, values = log.series("mismatch")
    if not values:
        return None
    seen = f"{name} is {values.end:.4f} at the end"
    if values.end > MISMATCH:
        return Finding(
            "mismatch",
            "warning",
            seen,
            "the sampler gives tokens other probabilities than the trainer: precision, kernels, stale weights or truncated "
            "sampling",
            "an objective with the rollout anchor (dppo-kl) or a correction (tis, icepop), in TRL with use_vllm; the same "
            "dtype on both sides, in TRL without use_vllm bf16=False; top_p=1 and top_k off",
            numbers={"end": values.end},
        )
    return Finding("mismatch", "ok", seen, numbers={"end": values.end})


def signal(log: Symptomatic) -> Finding | None:
    """Whether any group ever had rewards that differ."""
    silent = log.no_signal()
    if silent:
        return Finding(
            "signal",
            "problem",
            f"no group ever had a signal: {silent} in all rows",
            "all completions of each prompt had the same reward, or none was scored: every advantage is 0, no weight moves "
            "and every ratio stays 1",
            "prompts of medium difficulty, more completions of each; look at the reward",
        )
    if not log.known().isdisjoint(("zero variance", "spread", "largest advantage")):
        return Finding("signal", "ok", "some groups had rewards that differ")
    return None


def still(log: Symptomatic) -> Finding | None:
    """Whether any metric changes from row to row."""
    series = [values for what in log.known() if (values := log.series(what)[1]).count >= 5]
    name, norms = log.series("gradient")
    if norms.count >= 5 and norms.zeros == norms.count:
        return Finding(
            "still",
            "problem",
            f"{name} is 0 in all {norms.count} rows: no weight moves",
            "no advantage, an empty loss mask, or parameters that do not require a gradient",
            "look at rewards and loss mask",
        )
    if len(series) > 1 and all(values.constant for values in series):
        return Finding(
            "still",
            "warning",
            f"each of the {len(series)} metrics looked at has one value in all rows",
            "a run that does not learn at all, or a log that does not come from a run",
            "look at learning rate and rewards",
        )
    return Finding("still", "ok", "metrics move from row to row") if series else None


def zero_variance(log: Symptomatic) -> Finding | None:
    """How many groups have rewards that are all equal."""
    if log.no_signal():
        return None
    return _share(
        log,
        "zero variance",
        "groups",
        "their completions all have the same reward, so their advantages are 0 and nothing is learned from them",
        "prompts of medium difficulty, more num_generations (rollout.n), dynamic_sampling=2 or pruning",
        most=SILENT,
    )


def cut_off(log: Symptomatic) -> Finding | None:
    """How many completions end at the maximal length."""
    return _share(
        log,
        "cut off",
        "length",
        "completions end at the maximal length before they are done, and are then scored as wrong",
        "a larger max_completion_length (data.max_response_length)",
    )


def cap(log: Symptomatic) -> Finding | None:
    """How many upper edges are set by the cap."""
    return _share(log, "cap", "cap", "most upper edges are set by max_ratio and not by the radius", "max_ratio")


def nonfinite(log: Symptomatic) -> Finding | None:
    """Whether log-probs, or the value of any metric, are NaN or infinite."""
    name, values = log.series("nonfinite")
    others = log.others_lost()
    rows = values.count - values.zeros
    seen = [f"{name} is not 0 in {rows} rows"] if rows else []
    seen += [f"{other} is not finite in {broken} of {count} rows" for other, broken, count in log.not_finite()]
    update = {other: count for other, count in others.items() if _OF_THE_UPDATE.search(other)}
    seen += [f"{other} is not finite in {count} rows" for other, count in [*update.items()][:_SHOWN]]
    if seen:
        return Finding(
            "nonfinite",
            "problem",
            "; ".join(seen),
            "log-probs of NaN or infinity: 16-bit overflow, a broken checkpoint, a token of probability 0 in the sampler; or "
            "weights that are NaN",
            "float32 log-probs, a smaller learning rate, an earlier checkpoint",
        )
    if others:
        names = [*others]
        return Finding(
            "nonfinite",
            "warning",
            f"not finite in some rows: {', '.join(names[:_SHOWN])}"
            + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""),
            "a mean over nothing, such as the score of a reward that gave no number; or a value that overflowed",
            "look at these metrics",
        )
    return Finding("nonfinite", "ok", f"{name} is 0 throughout") if values else None


def unscored(log: Symptomatic) -> Finding | None:
    """How many samples have no reward."""
    name, values = log.series("unscored")
    if not values:
        return None
    if values.mean > UNSCORED:
        return Finding(
            "unscored",
            "warning",
            f"{name} is {values.mean:.3f} on average",
            "the reward function gave no number: it failed, took too long, or could not read the reference answer",
            "failed_reward.jsonl has samples; reward_timeout, or mend the function",
            numbers={"mean": values.mean},
        )
    return Finding("unscored", "ok", f"{name} is {values.mean:.4f} on average", numbers={"mean": values.mean})


def reward(log: Symptomatic) -> Finding | None:
    """How the reward changed."""
    name, values = log.series("reward")
    if values.count < 5:
        return None
    seen = f"{name} went from {values.start:.3f} to {values.end:.3f}"
    return Finding("reward", "note", seen, numbers={"start": values.start, "end": values.end})


RULES: tuple[Callable[[Symptomatic], Finding | None], ...] = (
    nonfinite,
    signal,
    clipping,
    entropy,
    overshoot,
    mismatch,
    zero_variance,
    cut_off,
    cap,
    unscored,
    still,
    reward,
)


def _share(log: Symptomatic, what: str, rule: str, cause: str, knob: str, *, most: float = MANY) -> Finding | None:
    name, values = log.series(what)
    if not values:
        return None
    seen, numbers = f"{name} is {values.end:.2f} at the end", {"end": values.end}
    if values.end > most:
        return Finding(rule, "warning", seen, cause, knob, numbers=numbers)
    return Finding(rule, "ok", seen, numbers=numbers)


def is_broken(value: Any) -> bool:
    """Whether a value of a log is NaN or infinite, as a number or as text.

    Args:
        value: The value in a row of the log.
    """
    number = _number(value)
    return number is not None and not math.isfinite(number)


def _number(value: Any) -> float | None:
    """A value of a log as a number, None for other values; strict JSON contains NaN and infinities as text."""
    if value.__class__ is bytes:
        return float(value)
    if isinstance(value, str) and value.strip().lower().lstrip("+-") in ("nan", "inf", "infinity"):
        return float(value)
    return as_number(value)


def _finite(values: "array[float]") -> "array[float]":
    """The finite values; the same object if all are."""
    return values if math.isfinite(sum(values)) else array("d", filter(math.isfinite, values))
