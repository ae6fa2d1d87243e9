"""Symptoms in a log of metrics, in the names of TRL, of verl, or our own."""

import math
import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

from bandpo._system.jsonl import as_number
from bandpo.monitoring import trends
from bandpo.monitoring.findings import Finding
from bandpo.monitoring.log_rows import LogRows, number_in
from bandpo.monitoring.names import STEPS, logged_names, own_names
from bandpo.monitoring.series import Stats, Symptomatic, stats_of


def _hosts(*ours: str) -> tuple[str, ...]:
    """The names that the hosts have for a metric, those of TRL and verl first."""
    return tuple(dict.fromkeys(name for metric in ours for name in logged_names(metric)))


NAMES: Mapping[str, tuple[str, ...]] = {
    "entropy": _hosts("entropy"),
    "clip": own_names("clip_fraction/any"),
    "outside": own_names("outside_fraction/any"),
    "ratio": own_names("ratio/mean"),
    "spent": (*own_names("band/divergence_mean"), "actor/band/band/divergence_mean"),
    "divergence": (*own_names("band/divergence_max"), "actor/band/band/divergence_max"),
    "cap": (*own_names("band/cap_fraction"), "actor/band/band/cap_fraction"),
    "edgeless": (*own_names("band/saturated_fraction"), "actor/band/band/saturated_fraction"),
    "nonfinite": own_names("nonfinite_fraction"),
    "reward": _hosts("reward/mean", "reward/mean_with_kl"),
    "zero variance": _hosts("reward/zero_variance"),
    "spread": _hosts("reward/std"),
    "largest advantage": _hosts("advantages/max"),
    "smallest advantage": _hosts("advantages/min"),
    "mismatch": _hosts("rollout/difference"),
    "cut off": _hosts("length/cut_off"),
    "unscored": ("reward/unscored", "train/reward/unscored"),
    "gradient": _hosts("grad_norm"),
    "loss": _hosts("loss", "loss/policy"),
    "clip low": own_names("clip_fraction/low"),
    "clip high": own_names("clip_fraction/high"),
    "effective size": own_names("correction/effective_sample_size"),
    "age": ("async/staleness_mean", "off_policy_level/all/mean", "batch/off_policy_level/mean", "staleness/mean"),
}
"""What the rules look at, and the names of it in logs; the first name that a log has is used."""

MEANINGS: Mapping[str, str] = {
    "entropy": "entropy",
    "clip": "share of clipped tokens",
    "outside": "share of tokens outside the region",
    "ratio": "mean ratio",
    "spent": "mean divergence over the radius",
    "divergence": "largest divergence over the radius",
    "cap": "share of edges set by the cap",
    "edgeless": "share of tokens that no edge of the region holds",
    "nonfinite": "share of tokens that are not finite",
    "reward": "mean reward",
    "zero variance": "share of groups without signal",
    "spread": "standard deviation of the rewards in a group",
    "largest advantage": "largest advantage",
    "smallest advantage": "smallest advantage",
    "mismatch": "mean difference between sampler and trainer",
    "cut off": "share of completions cut off",
    "unscored": "share of samples without a reward",
    "gradient": "norm of the gradient",
    "loss": "loss",
    "clip low": "share of tokens clipped below",
    "clip high": "share of tokens clipped above",
    "effective size": "effective sample size",
    "age": "age of the samples",
}
"""What each series of `NAMES` means."""
RANKS = {name: (what, rank) for what, names in NAMES.items() for rank, name in enumerate(names)}
"""What each name of a log is, and its place among the names of that."""
_MOST_BROKEN = 10_000  # different names of metrics that are NaN or infinite somewhere
_MOST_NAMES = 10_000  # different names that are counted
_MOST_PLANS = 64
_LARGE = re.compile(rb"[eE]\+?[0-9]{3}")  # the exponent of a number that may be too large for a float
_LONG = 300  # digits of one that may be

_OF_THE_UPDATE = re.compile(r"(^|[/_])(kl|loss|grad_norm|entropy|ratio|logps?|log_?probs?)($|[/_])")
_UNBOUNDED = re.compile(r"(^|/)band/upper_mean$")
"""A metric that is rightly infinite: the mean upper edge of a region that has none."""
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


class _Series:
    """The numbers of a metric with the rows that they are from, under the most preferred of its names that the log has.

    Args:
        name: The name in the log.
        rank: Place of the name in `NAMES`.
    """

    __slots__ = ("name", "places", "rank", "values")

    def __init__(self, name: str, rank: int) -> None:
        self.name, self.rank = name, rank
        self.values, self.places = array("d"), array("i")


class Log(Symptomatic):
    """The series of a log, by their meaning: 12 bytes for each value that a rule looks at, and 8 for each row.

    Where steps go back, because a run was resumed or its rows were shuffled, the series are by step, and of two values for
    the same step the one of the later part of the log counts. A part ends where the steps of the metric go back, and with a
    file. Values of the same step within a part are all kept.

    Args:
        rows: Metrics by name, one row for each logging step; also as `number_texts` or `read_log` read them.

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
        self.columns: set[str] = set()
        """Every name in the log, up to 10,000."""
        self.replaced = 0
        """How many values of a metric were replaced by later ones of the same step, at most."""
        self.back: list[tuple[float, float]] = []
        """The first steps that are smaller than the step before, with that step."""
        self.reordered = False
        """Whether the steps of a metric go back."""
        file = rows if isinstance(rows, LogRows) else None
        self.kind = file.kind if file else ""
        """What the log is, where it was read from a file."""
        self._steps, self._files = array("d"), [0]  # the step of each row; the first row of each file
        self._plans: dict[tuple[str, ...], list[tuple[str, str, int]]] = {}
        series: dict[str, _Series] = {}
        for row in rows:
            if file and file.part == len(self._files):
                self._files.append(self.rows)
            self._add(row, series)
            self.rows += 1
            if self.rows == _SEARCHED and not series and not self.broken:
                break
        for what in NAMES:
            if what in series:
                self.found[what] = (series[what].name, self._in_order(series[what]))
        looked_at = {name for name, _ in self.found.values()}
        self.broken = {name: count for name, count in self.broken.items() if name not in looked_at}
        self._finite = {what: _finite(values) for what, (_, values) in self.found.items()}
        self.said = tuple(file.said) if file else ()
        """What the reader of the file noticed."""
        self._stats: dict[str, Stats] = {}

    def _add(self, row: Mapping[str, Any], series: dict[str, _Series]) -> None:
        """Take the numbers of a row, of each metric under its most preferred name."""
        place, keys = self.rows, tuple(row)
        self._steps.append(self._step_of(row))
        plan = self._plans.get(keys)
        if plan is None:
            plan = self._plan(keys)
        for name, what, rank in plan:
            value = row[name]
            number = float(value) if value.__class__ is bytes else _number(value)
            if number is None:
                continue
            one = series.get(what)
            if one is None or rank < one.rank:
                one = series[what] = _Series(name, rank)
            elif rank > one.rank:
                continue
            one.values.append(number)
            one.places.append(place)
        if _may_be_broken(row):
            for name, value in row.items():
                if is_broken(value):
                    self.broken[str(name)] = self.broken.get(str(name), 0) + 1
                    if len(self.broken) > _MOST_BROKEN:
                        raise ValueError(f"more than {_MOST_BROKEN:,} different metrics of the log are NaN or infinite")

    def _plan(self, keys: tuple[str, ...]) -> list[tuple[str, str, int]]:
        """The names in a row that rules look at, with their meaning and rank. Most rows have the same names as another."""
        if len(self._plans) == _MOST_PLANS:
            self._plans.clear()
        plan = self._plans[keys] = [(name, *RANKS[name]) for name in keys if name in RANKS]
        if len(self.columns) < _MOST_NAMES:
            self.columns.update(keys)
        return plan

    def _step_of(self, row: Mapping[str, Any]) -> float:
        """The step of a row; that of the row before it where it has none."""
        last = self._steps[-1] if self._steps else -math.inf
        for name in STEPS:
            if name in row:
                value = row[name]
                number = float(value) if value.__class__ is bytes else _number(value)
                if number is not None and math.isfinite(number):
                    if number < last and len(self.back) < _SHOWN:
                        self.back.append((number, last))
                    return number
        return last

    def _in_order(self, series: _Series) -> "array[float]":
        """The values of a series by step, without those that later ones replace."""
        if not self.back and len(self._files) == 1:
            return series.values
        steps = array("d", (self._steps[place] for place in series.places))
        firsts = {bisect_left(series.places, first) for first in self._files}
        part = array("i", [0])
        for i in range(1, len(steps)):
            part.append(part[-1] + (steps[i] < steps[i - 1] or i in firsts))
        if all(steps[i] > steps[i - 1] for i in range(1, len(steps)) if part[i] > part[i - 1]):
            return series.values
        self.reordered = True
        kept: list[int] = []
        order = sorted(range(len(steps)), key=steps.__getitem__)  # stable: of a step, the latest part last
        for i in reversed(order):
            if not kept or steps[kept[-1]] != steps[i] or part[kept[-1]] == part[i]:
                kept.append(i)
        self.replaced = max(self.replaced, len(steps) - len(kept))
        return array("d", (series.values[i] for i in reversed(kept)))

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
        >>> [(f.rule, f.level) for f in examine_log(rows) if f.level == "warning"]
        [('entropy', 'warning')]
    """
    log = Log(rows)
    if not log.found and not log.broken:
        raise ValueError(
            f"the log has {log.rows}{' or more' * (log.rows == _SEARCHED)} rows and none of the metrics that are looked for: "
            f"{_listed([names[0] for names in NAMES.values()])}, or another host's names for these"
            + (f"; it has {_listed(sorted(map(str, log.columns)))}" if log.columns else "")
        )
    found = [f for rule in RULES if (f := rule(log)) is not None]
    return [*found, *([note] if (note := reading(log)) is not None else []), columns(log)]


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
            "learning rate, fewer steps for each rollout. Not the whole band: its lower half lets rare tokens fall. An "
            "upper half needs rewards that can be trusted on the whole: noise alone spreads tokens that were nearly certain",
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
    if values.largest == 0 and log.always("edgeless", 1):
        why = f"{log.series('edgeless')[0]} is 1: the objective has no region"
        return Finding(
            "clipping", "note", nowhere, why, "an objective with a region, to limit how far a token may move"
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
    others = {other: count for other, count in log.others_lost().items() if not _UNBOUNDED.search(other)}
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


def reading(log: Log) -> Finding | None:
    """What the user should know about how the log was read, such as a last row that is not finished."""
    seen = [*log.said]
    if log.reordered:
        at = f": step {log.back[0][0]:g} comes after {log.back[0][1]:g}" if log.back else ""
        seen.append(
            f"its steps go back{at}; the metrics are taken by step"
            + (f", and of each up to {log.replaced} values were replaced by later ones" if log.replaced else "")
        )
    return Finding("log", "note", "; ".join(seen), numbers={"replaced": log.replaced}) if seen else None


def columns(log: Log) -> Finding:
    """Which columns were understood, and as what."""
    known = {name: MEANINGS[what] for what, (name, _) in log.found.items()}
    others = len(log.columns.difference(known, STEPS))
    kind = f" ({log.kind})" if log.kind else ""
    more = " or more" * (len(log.columns) >= _MOST_NAMES)
    return Finding(
        "columns",
        "note",
        f"{len(known)} of {len(known) + others}{more} columns{kind} looked at: "
        + (", ".join(f"{name} = {meaning}" for name, meaning in known.items()) or "none"),
        numbers={"understood": len(known), "others": others},
    )


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
    trends.entropy_cause,
    trends.effective_size,
    trends.age,
)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(name[:80] for name in names[:_SHOWN]) + (
        f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN)
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


def _may_be_broken(row: Mapping[str, Any]) -> bool:
    """Whether a value of a row may be NaN or infinite; in JSON's texts of numbers, only by an exponent or by many digits."""
    try:
        text = b" ".join(row.values())
    except TypeError:
        return True
    return bool(text) and (_LARGE.search(text) is not None or len(max(row.values(), key=len)) > _LONG)


def _number(value: Any) -> float | None:
    """A value of a log as a number, None for other values; a number may be written as text, as NaN is in strict JSON."""
    if value.__class__ is bytes:
        return float(value)
    return number_in(value) if isinstance(value, str) else as_number(value)


def _finite(values: "array[float]") -> "array[float]":
    """The finite values; the same object if all are."""
    return values if math.isfinite(sum(values)) else array("d", filter(math.isfinite, values))
