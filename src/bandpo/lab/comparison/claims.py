"""BandPO's claims one by one: holds, holds in part, does not hold, no verdict, or not testable here, each with its numbers.

A claim about training is a paired difference on every task, and the tests of all tasks are corrected together (Holm). It holds
if the difference has the claimed sign on all tasks at 5%, and in part if it has the claimed sign on some and the opposite sign
on no task. Otherwise it does not hold: the absence of a difference counts against a claim, and the interval shows how large a
difference was not seen. There is no verdict where the seeds are too few for p < 0.05, or a run diverged.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from bandpo.lab.comparison.summary import common_seeds
from bandpo.statistics import Difference, number, paired

HOLDS, PARTLY, FAILS, OPPOSED, UNDECIDED, UNTESTABLE, UNMEASURED = (
    "holds",
    "holds in part",
    "does not hold",
    "does not hold, the opposite is seen",
    "no verdict",
    "not testable here",
    "not measured in this run",
)
BANDS, RIVALS = ("bandpo-kl", "bandpo-tv", "bandpo-chi2"), ("grpo", "dapo", "dcpo", "dppo-kl", "no-clip")


_PAPER = "arXiv:2603.04918"
_LEVEL = 0.05  # of all tests, after Holm's correction


class Claim(NamedTuple):
    """A claim with what this comparison found.

    Args:
        text: The claim in one sentence.
        source: Who makes it.
        verdict: One of the verdicts of this module.
        evidence: The numbers behind the verdict, one line each.
    """

    text: str
    source: str
    verdict: str
    evidence: list[str]


class _Trained(NamedTuple):
    """A claim that the difference of two arms in a measure has a sign."""

    text: str
    measure: str
    first: str
    second: str
    sign: int = +1
    source: str = _PAPER


_TRAINED = (
    _Trained(
        "Fixed clipping cuts rare tokens (p < 0.1, A > 0) that the KL band leaves alone",
        *("rare clipped", "bandpo-kl", "grpo", -1),
    ),
    _Trained("BandPO's mean@k is better than GRPO's", "mean@", "bandpo-kl", "grpo"),
    _Trained("BandPO's mean@k is better than Clip-Higher's", "mean@", "bandpo-kl", "dapo"),
    _Trained("BandPO's pass@k is better than GRPO's", "pass@", "bandpo-kl", "grpo"),
    _Trained("BandPO keeps the entropy higher than GRPO does", "entropy", "bandpo-kl", "grpo"),
    _Trained("The TV ball's mean@k is better than GRPO's", "mean@", "bandpo-tv", "grpo"),
    _Trained("The χ² ball's mean@k is better than GRPO's", "mean@", "bandpo-chi2", "grpo"),
    _Trained("Relaxing the band to Clip-Higher where that is wider hurts", "mean@", "bandpo-kl relax", "bandpo-kl", -1),
    _Trained(
        "A trust region is needed: BandPO's mean@k is better than no clip's",
        *("mean@", "bandpo-kl", "no-clip", +1, "the field's premise"),
    ),
)

_UNTESTABLE = (
    Claim(
        "mean@32 rises by 2 points and more on AIME and AMC with models of 1.5B to 8B parameters",
        *(_PAPER, UNTESTABLE, ["this needs those models and GPUs"]),
    ),
    Claim(
        "Solving for the KL bounds costs little of a training step",
        *(_PAPER, UNTESTABLE),
        ["this depends on GPUs; docs/performance.md has the CPU timings of this library's bounds"],
    ),
)


def claims(summary: Mapping[str, Any]) -> list[Claim]:
    """All claims, judged on a summary of `bandpo.lab.comparison.summary.summarise`.

    Args:
        summary: The summary, with the `values` of each arm of each task; `exact`, `sweeps` and `realised` may be empty.
    """
    moved = cast("Mapping[str, Any]", summary.get("realised") or {})
    sweeps = cast("Mapping[str, Any]", summary.get("sweeps") or {})
    trained = [_judge(summary, claim) for claim in _TRAINED]
    return [
        _gain_under_a_clip(moved),
        _gain_under_the_band(moved),
        *trained,
        _rare_arm(sweeps),
        _tuning(sweeps),
        *_UNTESTABLE,
    ]


def duels(summary: Mapping[str, Any], variant: str = "") -> dict[str, dict[str, dict[tuple[str, str], Difference]]]:
    """The difference of each band from each rival, with Holm's correction over the pairs of a measure.

    Args:
        summary: A summary of `bandpo.lab.comparison.summary.summarise`.
        variant: `""` for the default arms, `" tuned"` for the tuned ones.

    Returns:
        `{task: {measure: {(band, rival): difference}}}`.
    """
    found: dict[str, dict[str, dict[tuple[str, str], Difference]]] = {}
    for task, results in summary["tasks"].items():
        values: dict[str, dict[str, list[Any]]] = results.get("values", {})
        measures = next(iter(values.values())) if values else {}
        for measure in [m for m in measures if m.startswith(("mean@", "pass@"))]:
            pairs = {
                (band, rival): _pair(results, measure, band + variant, rival + variant)
                for band in BANDS
                for rival in RIVALS
                if band + variant in values and rival + variant in values
            }
            if pairs := {names: pair for names, pair in pairs.items() if pair[0]}:
                found.setdefault(task, {})[measure] = paired(pairs)
    return found


def verdict(differences: Mapping[Any, Difference], sign: int) -> str:
    """The verdict on a claim that all differences have a sign.

    Args:
        differences: The difference of each task.
        sign: The claimed sign, +1 or -1.

    Returns:
        One of the verdicts of this module.

    Examples:
        >>> from bandpo.statistics import paired
        >>> up = [1.0, 1.1, 1.2, 1.1, 1.0, 1.3, 1.2, 1.1]
        >>> flat = [0.1, -0.1, 0.2, -0.2, 0.1, -0.1, 0.0, 0.0]
        >>> found = paired({"a": (up, [0.0] * 8), "b": (flat, [0.0] * 8)})
        >>> verdict(found, +1), verdict({"a": found["a"]}, +1), verdict(found, -1)
        ('holds in part', 'holds', 'does not hold, the opposite is seen')
    """
    signs = [0 if not d.p_holm < _LEVEL else 1 if d.mean.value > 0 else -1 for d in differences.values()]
    if all(s == sign for s in signs):
        return HOLDS
    if sign in signs:
        return FAILS if -sign in signs else PARTLY
    return OPPOSED if -sign in signs else FAILS


def _judge(summary: Mapping[str, Any], claim: _Trained) -> Claim:
    """The verdict on a claim about training."""
    text, measure, first, second, sign, source = claim
    found = _on_tasks(summary, measure, first, second)
    if not found:
        return Claim(text, source, UNMEASURED, [f"needs {first} and {second} on more than one seed"])
    evidence = [_line(f"{task}, {name}", d) for (task, name), d in found.items()]
    if any(math.isnan(d.mean.value) for d in found.values()):
        return Claim(text, source, UNDECIDED, [f"a run of {first} or {second} diverged", *evidence])
    tuned = _on_tasks(summary, measure, f"{first} tuned", f"{second} tuned")
    evidence += [_line(f"{task}, {name}, both tuned", d) for (task, name), d in tuned.items()]
    fewest = min(d.pairs for d in found.values())
    if len(found) * 2.0 ** (1 - fewest) >= _LEVEL:  # the smallest p that a sign-flip test can give, corrected
        return Claim(text, source, UNDECIDED, [f"{fewest} seeds cannot reach p < {_LEVEL}", *evidence])
    return Claim(text, source, verdict(found, sign), evidence)


def _on_tasks(summary: Mapping[str, Any], measure: str, first: str, second: str) -> dict[tuple[str, str], Difference]:
    pairs: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for task, results in summary["tasks"].items():
        values = results.get("values", {})
        if first in values and second in values:
            name = next(m for m in values[first] if m.startswith(measure))
            pair = _pair(results, name, first, second)
            if len(pair[0]) > 1:
                pairs[task, name] = pair
    return paired(pairs)


def _pair(results: Mapping[str, Any], measure: str, first: str, second: str) -> tuple[list[float], list[float]]:
    """The values of two arms of a task on the seeds that both have."""
    values = results["values"]
    seeds = results.get("seeds") or {arm: range(len(values[arm][measure])) for arm in (first, second)}
    return common_seeds(values[first][measure], seeds[first], values[second][measure], seeds[second])


def _line(where: str, d: Difference) -> str:
    value, low, high = (number(x, "+.3f") for x in (d.mean.value, d.mean.low, d.mean.high))
    return f"{where}: {value} [{low}, {high}], p = {number(d.p_holm, '.2g')}"


_OFTEN = 0.05  # the share of tokens beyond an edge that refutes the edge as a bound


def _gain_under_a_clip(moved: Mapping[str, Any]) -> Claim:
    """A claim about every setting: one setting in which tokens often pass the edge refutes it."""
    text = "A fixed clip lets a rare token gain at most ε·p in an update, the steps on one rollout"
    if not moved:
        return Claim(text, _PAPER, UNMEASURED, ["needs the exact experiments on more seeds"])
    cells = _cells(moved, moved["beyond"]["grpo"])
    passed = [(where, share) for where, share in cells if share[1] > _OFTEN]
    medians, highs = (dict(_cells(moved, moved[name]["grpo"])) for name in ("median", "high"))
    evidence = [
        f"bandit, Adam, ε = 0.2: in {len(passed)} of {len(cells)} settings of rarity, rate and reuse more than {_OFTEN:.0%} of "
        f"the tokens end beyond 1.2·p ({moved['seeds']} seeds, {moved['versions']})"
    ]
    for where, share in (min(cells, key=lambda c: highs[c[0]]), max(cells, key=lambda c: highs[c[0]])):
        evidence.append(
            f"{_setting(moved, where)}: ratio {medians[where]:.3g} in the median, {highs[where]:.3g} at 95%; "
            f"{share[0]:.1%} [{share[1]:.1%}, {share[2]:.1%}] beyond 1.2"
        )
    return Claim(text, _PAPER, FAILS if passed else HOLDS, evidence)


def _gain_under_the_band(moved: Mapping[str, Any]) -> Claim:
    text = "A rare good token gains more in an update under the band than under the clip"
    source = f"{_PAPER}, as its mechanism predicts"
    if not moved:
        return Claim(text, source, UNMEASURED, ["needs the exact experiments on more seeds"])
    cells = [
        (where, d)
        for where, d in _cells(moved, moved["against"]["bandpo-kl"])
        if tuple(moved["reuse"][where[2]]) != (1, 1)
    ]
    more, less = [c for c in cells if c[1][1] > 0], [c for c in cells if c[1][2] < 0]
    evidence = [
        f"bandit, Adam: more in {len(more)} of {len(cells)} settings with several steps on a rollout, less in {len(less)}, by "
        f"intervals of single cells ({moved['seeds']} seeds, {moved['versions']})"
    ]
    evidence += [
        f"{_setting(moved, where)}: log-ratio {d[0]:+.3f} [{d[1]:+.3f}, {d[2]:+.3f}] against the clip's"
        for where, d in (max(cells, key=lambda c: c[1][0]), min(cells, key=lambda c: c[1][0]))
    ]
    mixed = bool(more and less)
    state = (
        HOLDS if len(more) == len(cells) else PARTLY if more and not less else FAILS if mixed or not less else OPPOSED
    )
    return Claim(text, source, state, evidence)


_Cell = tuple[int, int, int]  # indices of rarity, rate and reuse


def _cells(moved: Mapping[str, Any], table: Sequence[Sequence[Sequence[Any]]]) -> list[tuple[_Cell, Any]]:
    axes = (range(len(moved[axis])) for axis in ("rarities", "rates", "reuse"))
    return [((i, j, k), table[i][j][k]) for i, j, k in itertools.product(*axes)]


def _setting(moved: Mapping[str, Any], where: _Cell) -> str:
    epochs, steps = moved["reuse"][where[2]]
    return (
        f"p = {moved['rarities'][where[0]]:g}, rate {moved['rates'][where[1]]:g}, "
        f"{epochs} epoch{'s' * (epochs != 1)} of {steps} step{'s' * (steps != 1)}"
    )


def _rare_arm(sweeps: Mapping[str, Any]) -> Claim:
    text = "A policy finds and keeps a rare best action more often under the band than under the clip"
    if (
        not sweeps
        or sweeps["regimes"].get("baseline", "grpo") != "grpo"
        or "bandpo-kl" not in sweeps["regimes"]["against"]
    ):
        why = "needs --preset paper or full, with grpo as the first of --objectives, and bandpo-kl"
        return Claim(text, f"{_PAPER}, as its mechanism predicts", UNMEASURED, [why])
    found = sweeps["regimes"]
    cells = [
        (d, rare, reuse)
        for reuse, row in zip(found["reuse"], found["against"]["bandpo-kl"], strict=True)
        for rare, d in zip(found["rarities"], row, strict=True)
    ]
    better, worse = [c for c in cells if c[0][1] > 0], [c for c in cells if c[0][2] < 0]
    evidence = [
        f"bandit, radius matched to ε = 0.2, {sweeps['seeds']} seeds: better in {len(better)} of {len(cells)} cells "
        f"of rarity and reuse, worse in {len(worse)}, by intervals of single cells"
    ]
    evidence += [
        f"p = {rare:g}, {k} epoch{'s' * (k != 1)} of {m} step{'s' * (m != 1)}: "
        f"{d[0]:+.3f} [{d[1]:+.3f}, {d[2]:+.3f}] of the seeds commit"
        for d, rare, (k, m) in (max(cells, key=lambda c: c[0][0]), min(cells, key=lambda c: c[0][0]))
    ]
    state = HOLDS if len(better) == len(cells) else PARTLY if better and not worse else FAILS
    return Claim(text, f"{_PAPER}, as its mechanism predicts", state, evidence)


def _tuning(sweeps: Mapping[str, Any]) -> Claim:
    text = "One radius is easier to tune than two ε's"
    if not sweeps:
        return Claim(text, _PAPER, UNMEASURED, ["needs --preset paper or full"])
    found = sweeps["tuning"]
    evidence = [
        f"bandit, mean reward of the best of {n} random settings, δ against (ε low, ε high): {d:+.4f} [{low:+.4f}, {high:+.4f}]"
        for n, (d, low, high) in zip(found["trials"], found["difference"], strict=True)
    ]
    better = [low > 0 for _, low, _ in found["difference"]]
    worse = any(high < 0 for _, _, high in found["difference"])
    return Claim(text, _PAPER, HOLDS if all(better) else PARTLY if any(better) and not worse else FAILS, evidence)
