"""Symptoms in a log of metrics, in the names of TRL, of verl, or our own."""

import math
import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bandpo._system.jsonl import as_number
from bandpo.doctor import trends
from bandpo.doctor.findings import Finding
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
    "clip low": _own("clip_fraction/low"),
    "clip high": _own("clip_fraction/high"),
    "effective size": _own("correction/effective_sample_size"),
    "age": ("async/staleness_mean", "off_policy_level/all/mean", "batch/off_policy_level/mean", "staleness/mean"),
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
FAR = 10.0  # realised divergence over the radius
MISMATCH = 0.02  # mean |log-prob difference| between sampler and trainer, nats
MANY = 0.5  # share of groups without signal, of completions cut off, of edges set by the cap


class Log:
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

    def series(self, what: str) -> tuple[str, Sequence[float]]:
        """The name of a metric in the log, and its finite values.

        Args:
            what: A key of `NAMES`.
        """
        return self.found[what][0] if what in self.found else NAMES[what][0], self._finite.get(what, _NONE)

    def always(self, what: str, value: float) -> bool:
        """Whether a metric is in some row, and has this value in every row in which it is.

        Args:
            what: A key of `NAMES`.
            value: The value to compare with.
        """
        _, values = self.found.get(what, ("", _NONE))
        return bool(values) and values.count(value) == len(values)

    def no_signal(self) -> str:
        """The evidence that every advantage was 0 in every row, "" if there is none."""
        if self.always("zero variance", 1):
            return f"{self.found['zero variance'][0]} is 1"
        if self.always("largest advantage", 0) and self.always("smallest advantage", 0):
            return "every advantage is 0"
        if self.always("spread", 0):
            return f"{self.found['spread'][0]} is 0"
        return ""


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


def entropy(log: Log) -> Finding | None:
    """Whether the entropy collapsed or exploded."""
    name, values = log.series("entropy")
    if len(values) < 5:
        return None
    start, end = _ends(values)
    seen = f"{name} went from {start:.3f} to {end:.3f} nats"
    if end < COLLAPSE * start and end < LOW_ENTROPY + COLLAPSE * start and start > LOW_ENTROPY:
        return Finding(
            "entropy",
            "warning",
            f"{seen}: collapse",
            "the policy has become nearly deterministic; rare tokens that led to rewards can no longer be sampled",
            "a band (bandpo-kl) or a higher epsilon_high, a smaller learning rate, fewer steps for each rollout, a larger beta",
        )
    if end > EXPLOSION * start and end > start + LOW_ENTROPY:
        return Finding(
            "entropy",
            "warning",
            f"{seen}: explosion",
            "updates move probability to tokens that were not sampled, often because of noise in the advantages or a sampler "
            "that differs from the trainer",
            "a smaller radius or learning rate, max_ratio=10, top_p=1; look at the sampler mismatch",
        )
    return Finding("entropy", "ok", seen)


def clipping(log: Log) -> Finding | None:
    """Whether the region clips no token at all, or too many."""
    name, values = log.series("clip")
    if not values:
        return None
    mean, largest = sum(values) / len(values), max(values)
    ratio, ratios = log.series("ratio")
    if largest == 0 and log.no_signal():
        return Finding(
            "clipping", "note", f"{name} is 0 in all {len(values)} rows", "no group had a signal: see `signal`"
        )
    outside_name, outside = log.series("outside")
    if largest == 0 and max(outside, default=0.0) > 0:  # a surrogate such as `soft_edge`, which takes no gradient away
        return Finding(
            "clipping",
            "ok",
            f"{name} is 0, because the surrogate keeps the gradient of tokens outside the region; {outside_name} is "
            f"{sum(outside) / len(outside):.4f} on average, {max(outside):.4f} at most",
        )
    if largest == 0:
        inert = bool(ratios) and max(abs(r - 1) for r in ratios) < 1e-6
        return Finding(
            "clipping",
            "problem" if inert else "warning",
            f"{name} is 0 in all {len(values)} rows" + (f", and {ratio} is 1: the region is inert" if inert else ""),
            "each rollout is used for one optimiser step, so nothing can be clipped"
            if inert
            else "the updates are too small to reach the edge, or each rollout is used for one optimiser step",
            "num_iterations=2 or more"
            if inert
            else "a smaller radius, a higher learning rate, or more steps for each rollout",
        )
    if mean > TIGHT:
        return Finding(
            "clipping",
            "warning",
            f"{name} is {mean:.3f} on average, {largest:.3f} at most",
            "many tokens have left the region: it is tight for this learning rate and reuse",
            "a larger radius (bandpo doctor BATCH --target 0.02 computes one), a smaller learning rate, fewer steps for each "
            "rollout",
        )
    return Finding("clipping", "ok", f"{name} is {mean:.4f} on average, {largest:.4f} at most")


def overshoot(log: Log) -> Finding | None:
    """Whether tokens are far outside of the region: a clip removes their gradients, but does not move them back."""
    name, values = log.series("divergence")
    if not values:
        return None
    mean = sum(values) / len(values)
    seen = f"the furthest token of a step is {mean:.2f} radii out on average, {max(values):.2f} at most ({name})"
    if mean > FAR:
        return Finding(
            "overshoot",
            "warning",
            seen,
            "a clip stops the gradient of a token outside, and does not bring it back: one step was large enough to move "
            "tokens far outside",
            "a smaller learning rate, a smaller max_grad_norm, more samples in a step",
        )
    return Finding("overshoot", "ok", seen)


def mismatch(log: Log) -> Finding | None:
    """Whether sampler and trainer differ."""
    name, values = log.series("mismatch")
    if not values:
        return None
    _, end = _ends(values)
    seen = f"{name} is {end:.4f} at the end"
    if end > MISMATCH:
        return Finding(
            "mismatch",
            "warning",
            seen,
            "the sampler gives tokens other probabilities than the trainer: precision, kernels, stale weights or truncated "
            "sampling",
            "an objective with the rollout anchor (dppo-kl) or a correction (tis, icepop), in TRL with use_vllm; the same "
            "dtype on both sides, in TRL without use_vllm bf16=False; top_p=1 and top_k off",
        )
    return Finding("mismatch", "ok", seen)


def signal(log: Log) -> Finding | None:
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
    if any(what in log.found for what in ("zero variance", "spread", "largest advantage")):
        return Finding("signal", "ok", "some groups had rewards that differ")
    return None


def still(log: Log) -> Finding | None:
    """Whether any metric changes from row to row."""
    series = [values for what in log.found if len(values := log.series(what)[1]) >= 5]
    name, norms = log.series("gradient")
    if len(norms) >= 5 and not any(norms):
        return Finding(
            "still",
            "problem",
            f"{name} is 0 in all {len(norms)} rows: no weight moves",
            "no advantage, an empty loss mask, or parameters that do not require a gradient",
            "look at rewards and loss mask",
        )
    if len(series) > 1 and all(values.count(values[0]) == len(values) for values in series):
        return Finding(
            "still",
            "warning",
            f"each of the {len(series)} metrics looked at has one value in all rows",
            "a run that does not learn at all, or a log that does not come from a run",
            "look at learning rate and rewards",
        )
    return Finding("still", "ok", "metrics move from row to row") if series else None


def zero_variance(log: Log) -> Finding | None:
    """How many groups have rewards that are all equal."""
    if log.no_signal():
        return None
    return _share(
        log,
        "zero variance",
        "groups",
        "their completions all have the same reward, so their advantages are 0 and nothing is learned from them",
        "prompts of medium difficulty, more num_generations, dynamic_sampling=2 or pruning",
    )


def cut_off(log: Log) -> Finding | None:
    """How many completions end at the maximal length."""
    return _share(
        log,
        "cut off",
        "length",
        "completions end at the maximal length before they are done, and are then scored as wrong",
        "a larger max_completion_length (data.max_response_length)",
    )


def cap(log: Log) -> Finding | None:
    """How many upper edges are set by the cap."""
    return _share(log, "cap", "cap", "most upper edges are set by max_ratio and not by the radius", "max_ratio")


def nonfinite(log: Log) -> Finding | None:
    """Whether log-probs, or the value of any metric, are NaN or infinite."""
    name, values = log.series("nonfinite")
    seen = [f"{name} is not 0 in {sum(v != 0 for v in values)} rows"] if any(values) else []
    for other, numbers in log.found.values():
        broken = sum(not math.isfinite(v) for v in numbers)
        if broken:
            seen.append(f"{other} is not finite in {broken} of {len(numbers)} rows")
    update = {other: count for other, count in log.broken.items() if _OF_THE_UPDATE.search(other)}
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
    if log.broken:
        names = [*log.broken]
        return Finding(
            "nonfinite",
            "warning",
            f"not finite in some rows: {', '.join(names[:_SHOWN])}"
            + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""),
            "a mean over nothing, such as the score of a reward that gave no number; or a value that overflowed",
            "look at these metrics",
        )
    return Finding("nonfinite", "ok", f"{name} is 0 throughout") if values else None


def unscored(log: Log) -> Finding | None:
    """How many samples have no reward."""
    name, values = log.series("unscored")
    if not values:
        return None
    mean = sum(values) / len(values)
    if mean > 0.01:
        return Finding(
            "unscored",
            "warning",
            f"{name} is {mean:.3f} on average",
            "the reward function gave no number: it failed, took too long, or could not read the reference answer",
            "failed_reward.jsonl has samples; reward_timeout, or mend the function",
        )
    return Finding("unscored", "ok", f"{name} is {mean:.4f} on average")


def reward(log: Log) -> Finding | None:
    """How the reward changed."""
    name, values = log.series("reward")
    if len(values) < 5:
        return None
    start, end = _ends(values)
    return Finding("reward", "note", f"{name} went from {start:.3f} to {end:.3f}")


RULES: tuple[Callable[[Log], Finding | None], ...] = (
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
    trends.entropy_cause,
    trends.effective_size,
    trends.age,
)


def _share(log: Log, what: str, rule: str, cause: str, knob: str) -> Finding | None:
    name, values = log.series(what)
    if not values:
        return None
    _, end = _ends(values)
    if end > MANY:
        return Finding(rule, "warning", f"{name} is {end:.2f} at the end", cause, knob)
    return Finding(rule, "ok", f"{name} is {end:.2f} at the end")


def _ends(values: Sequence[float]) -> tuple[float, float]:
    size = max(1, len(values) // 10)
    return sum(values[:size]) / size, sum(values[-size:]) / size


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
