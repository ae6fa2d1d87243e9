"""The registered protocol of the evidence: what is run, what is claimed, and what counts as an effect.

The reader is strict, since a protocol in which a misspelt arm is ignored registers nothing: what it does not know is refused
with the nearest name that it knows.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, cast, get_args

from bandpo._system.bounded import parse_yaml, read_regular
from bandpo._system.options import not_one_of

FILE = Path(__file__).with_name("protocol.yaml")
"""The registered protocol."""

Claimed = Literal["better", "worse", "equivalent"]
"""What a claim says of the difference of two arms. `better` is larger."""

Kind = Literal["primary", "exploratory"]
Method = Literal["bounded", "t"]
Missing = Literal["worst", "undecided", "left out"]
_LEVEL = 0.95  # the level of all intervals of bandpo.statistics


@dataclass(frozen=True)
class Measure:
    """A number that each run of a place has.

    Args:
        what: Short description.
        smallest: The smallest effect of interest, > 0.
        range: The smallest and the largest value that are possible; None if the measure has no such range.
        missing: What a value that is not a number counts as.
    """

    what: str
    smallest: float
    range: tuple[float, float] | None
    missing: Missing


@dataclass(frozen=True)
class Place:
    """Where arms are compared: a problem with a way of training.

    Args:
        arms: The arms.
        measures: The measures of each of their runs by name, with the ranges that they have here.
        seeds: Number of seeds of the report.
        report_seed: The first of them.
    """

    arms: tuple[str, ...]
    measures: Mapping[str, Measure]
    seeds: int
    report_seed: int


@dataclass(frozen=True)
class Experiment:
    """The runs of an experiment.

    Args:
        interval: Interval of the mean of paired differences where the measure has a range; Student's where it has none.
        seeds: Number of seeds of the report, where a place has no number of its own.
        report_seed: The first of them, in the same way.
        tuning_seeds: Number of seeds on which learning rates are chosen.
        tuning_seed: The first of them.
        places: The places by name.
    """

    interval: Method
    seeds: int
    report_seed: int
    tuning_seeds: int
    tuning_seed: int
    places: Mapping[str, Place]

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms of all places, each once."""
        return tuple(dict.fromkeys(arm for place in self.places.values() for arm in place.arms))


@dataclass(frozen=True)
class Contrast:
    """A comparison of two arms that a claim rests on.

    Args:
        experiment: Name of the experiment.
        place: Name of the place.
        first: The arm whose values are on the left of the difference.
        second: The arm whose values are taken away.
        measure: Name of the measure.
        claimed: What the claim says of first - second.
    """

    experiment: str
    place: str
    first: str
    second: str
    measure: str
    claimed: Claimed


@dataclass(frozen=True)
class Claim:
    """A claim with its contrasts.

    Args:
        id: Short name for links and tests.
        text: The claim in one sentence.
        source: Who makes it.
        kind: `primary`, or `exploratory`.
        contrasts: The contrasts, whose intervals hold together.
    """

    id: str
    text: str
    source: str
    kind: Kind
    contrasts: tuple[Contrast, ...]


@dataclass(frozen=True)
class Calculation:
    """A power calculation.

    Args:
        experiment: Name of the experiment.
        measure: Name of the measure.
        deviation: Standard deviation of paired differences that was assumed.
        comparisons: Intervals that hold together.
        needed: Seeds that find the smallest effect of interest.
        detectable: The effect that the seeds of the report find.
        source: Where the deviation comes from.
    """

    experiment: str
    measure: str
    deviation: float
    comparisons: int
    needed: int
    detectable: float
    source: str


@dataclass(frozen=True)
class Protocol:
    """A protocol, reduced to a preset.

    Args:
        registered: Date of the registration, YYYY-MM-DD.
        amendments: Changes after the registration, with reasons.
        preset: Name of the preset.
        power: The power of the calculations.
        baseline: The arm that the others are compared with.
        measures: The measures by name.
        experiments: The experiments by name.
        claims: The claims, all of them, also those of which the preset has no runs.
        calculations: The power calculations.
        sha256: Hash of the file.
    """

    registered: str
    amendments: tuple[str, ...]
    preset: str
    power: float
    baseline: str
    measures: Mapping[str, Measure]
    experiments: Mapping[str, Experiment]
    claims: tuple[Claim, ...]
    calculations: tuple[Calculation, ...]
    sha256: str


def read(preset: str = "full", path: Path = FILE) -> Protocol:
    """Read a protocol and reduce its experiments to a preset.

    Args:
        preset: A preset of the protocol: `full`, `quick`, `smoke`.
        path: The file.

    Returns:
        The protocol.

    Raises:
        ValueError: If the file has a key, an arm, a measure or a place that is not known, a value that is not allowed, or seeds
            of the report among those of tuning; or if the preset is unknown.

    Examples:
        >>> protocol = read()
        >>> protocol.claims[0].id, protocol.measures["mean"].smallest
        ('upper-passed', 0.02)
    """
    content = read_regular(path)
    top = _Node(parse_yaml(content, str(path)), path.name)
    level = top.number("level")
    if level != _LEVEL:
        raise ValueError(f"{path.name}: level: got {level}; the intervals of bandpo.statistics have {_LEVEL}")
    measures = {name: _measure(node) for name, node in top.node("measures").children()}
    full = {name: _experiment(node, measures) for name, node in top.node("experiments").children()}
    presets = dict(top.node("presets").children())
    if preset not in presets:
        raise ValueError(not_one_of("preset", preset, presets))
    reduced = {name: _reductions(node, full) for name, node in presets.items()}
    protocol = Protocol(
        registered=top.day("registered"),
        amendments=top.texts("amendments"),
        preset=preset,
        power=top.number("power", below=1.0),
        baseline=top.text("baseline"),
        measures=measures,
        experiments={name: reduced[preset].get(name, experiment) for name, experiment in full.items()},
        claims=tuple(_claim(node, full) for node in top.items("claims")),
        calculations=tuple(_calculation(node, full) for node in top.items("calculations")),
        sha256=sha256(content).hexdigest(),
    )
    top.done()
    ids = [claim.id for claim in protocol.claims]
    if twice := sorted({x for x in ids if ids.count(x) > 1}):
        raise ValueError(f"{path.name}: claims: {', '.join(twice)} is there twice; give each claim an id of its own")
    for name, experiment in full.items():
        if protocol.baseline not in experiment.arms:
            raise ValueError(not_one_of(f"{path.name}: baseline of {name}", protocol.baseline, experiment.arms))
    return protocol


class _Node:
    """A mapping of the file with the path to it; a key that nobody took is refused at the end."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: got {value!r}; give a mapping of names to values")
        self.where = where
        self._values = cast("dict[str, Any]", value)
        self._taken: list[str] = []

    def take(self, key: str) -> Any:
        self._taken.append(key)
        if key not in self._values:
            near = [k for k in self._values if k not in self._taken]
            hint = f"; it has {', '.join(map(str, near))}" if near else ""
            raise ValueError(f"{self.where}: {key} is missing{hint}")
        return self._values[key]

    def names(self) -> list[str]:
        return list(map(str, self._values))

    def has(self, key: str) -> bool:
        return key in self._values

    def fail(self, key: str, allowed: str) -> ValueError:
        return ValueError(f"{self.where}: {key}: got {self._values[key]!r}; {allowed}")

    def text(self, key: str) -> str:
        value = self.take(key)
        if not (isinstance(value, str) and value):
            raise self.fail(key, "give a text")
        return value

    def day(self, key: str) -> str:
        value = self.text(key)
        try:
            return date.fromisoformat(value).isoformat()
        except ValueError:
            raise self.fail(key, "give a day as YYYY-MM-DD") from None

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.take(key)
        if not (isinstance(value, list) and all(isinstance(x, str) for x in cast("list[Any]", value))):
            raise self.fail(key, "give a list of names")
        found = tuple(cast("list[str]", value))
        if len(set(found)) < len(found):
            raise self.fail(key, "name each one once")
        return found

    def number(self, key: str, *, above: float = 0.0, below: float = math.inf) -> float:
        value = self.take(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < below:
            limit = "" if below == math.inf else f" and below {below:g}"
            raise self.fail(key, f"give a number above {above:g}{limit}")
        return float(value)

    def count(self, key: str, least: int = 1) -> int:
        value = self.take(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.fail(key, f"give a whole number of at least {least}")
        return value

    def choice(self, key: str, known: Iterable[str]) -> Any:
        value = self.text(key)
        if value not in (names := list(known)):
            raise ValueError(not_one_of(f"{self.where}: {key}", value, names))
        return value

    def choices(self, key: str, known: Iterable[str]) -> tuple[str, ...]:
        names = list(known)
        values = self.texts(key)
        for value in values:
            if value not in names:
                raise ValueError(not_one_of(f"{self.where}: {key}", value, names))
        return values

    def range(self, key: str) -> tuple[float, float]:
        value = self.take(key)
        numbers = cast("list[Any]", value) if isinstance(value, list) else []
        if len(numbers) != 2 or not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers):
            raise self.fail(key, "give the smallest and the largest value, [low, high]")
        low, high = map(float, numbers)
        if not low < high:
            raise self.fail(key, "the first number must be the smaller one")
        return low, high

    def node(self, key: str) -> "_Node":
        return _Node(self.take(key), f"{self.where}: {key}")

    def children(self) -> list[tuple[str, "_Node"]]:
        return [(str(key), self.node(key)) for key in self._values]

    def items(self, key: str) -> list["_Node"]:
        value = self.take(key)
        if not isinstance(value, list) or not value:
            raise self.fail(key, "give a list")
        return [_Node(x, f"{self.where}: {key}[{i}]") for i, x in enumerate(cast("list[Any]", value))]

    def done(self) -> None:
        for key in self._values:
            if key not in self._taken:
                raise ValueError(not_one_of(self.where, key, dict.fromkeys(self._taken)))


def _measure(node: _Node) -> Measure:
    found = Measure(
        what=node.text("what"),
        smallest=node.number("smallest"),
        range=node.range("range") if node.has("range") else None,
        missing=node.choice("missing", get_args(Missing)),
    )
    node.done()
    if found.missing == "worst" and found.range is None:
        raise ValueError(f"{node.where}: missing: worst needs a range, whose lower end is the worst value")
    return found


def _experiment(node: _Node, measures: Mapping[str, Measure]) -> Experiment:
    places: dict[str, Place] = {}
    seeds, report_seed = node.count("seeds", 2), node.count("report_seed", 0)
    for part in node.items("places"):
        names = part.texts("names")
        arms = part.texts("arms")
        here = {name: measures[name] for name in part.choices("measures", measures)}
        if part.has("ranges"):
            ranges = part.node("ranges")
            for name in ranges.names():
                if name not in here:
                    raise ValueError(not_one_of(ranges.where, name, here))
                here[name] = replace(here[name], range=ranges.range(name))
        count = part.count("seeds", 2) if part.has("seeds") else seeds
        start = part.count("report_seed", 0) if part.has("report_seed") else report_seed
        part.done()
        if twice := [name for name in names if name in places]:
            raise ValueError(f"{part.where}: names: {', '.join(twice)} is there twice; name each place once")
        places.update({name: Place(arms, here, count, start) for name in names})
    found = Experiment(
        interval=node.choice("interval", get_args(Method)),
        seeds=seeds,
        report_seed=report_seed,
        tuning_seeds=node.count("tuning_seeds"),
        tuning_seed=node.count("tuning_seed", 0),
        places=places,
    )
    node.done()
    return _apart(found, node.where)


def _at_most(node: _Node, key: str, most: int) -> int:
    value = node.count(key, 2)
    if value > most:
        raise node.fail(key, f"the experiment has {most} seeds; give at most so many")
    return value


def _apart(experiment: Experiment, where: str) -> Experiment:
    """The experiment, whose seeds of the report and of tuning have none in common."""
    second = experiment.tuning_seed, experiment.tuning_seed + experiment.tuning_seeds
    reports = [(x.report_seed, x.report_seed + x.seeds) for x in (experiment, *experiment.places.values())]
    for first in reports:
        if first[0] < second[1] and second[0] < first[1]:
            raise ValueError(
                f"{where}: seeds {first[0]} to {first[1] - 1} of the report and {second[0]} to {second[1] - 1} of tuning "
                "overlap; what is tuned on must not enter the report, so move report_seed or tuning_seed"
            )
    return experiment


def _reductions(node: _Node, full: Mapping[str, Experiment]) -> dict[str, Experiment]:
    """The experiments that a preset reduces."""
    found: dict[str, Experiment] = {}
    for name, part in node.children():
        if name not in full:
            raise ValueError(not_one_of(node.where, name, full))
        before = full[name]
        names = part.choices("places", before.places) if part.has("places") else tuple(before.places)
        arms = part.choices("arms", before.arms) if part.has("arms") else before.arms
        seeds = _at_most(part, "seeds", before.seeds) if part.has("seeds") else before.seeds
        places = {
            n: replace(p, arms=tuple(a for a in p.arms if a in arms), seeds=min(p.seeds, seeds))
            for n, p in before.places.items()
            if n in names
        }
        if part.has("seeds_of"):
            counts = part.node("seeds_of")
            for place in counts.names():
                if place not in places:
                    raise ValueError(not_one_of(counts.where, place, places))
                places[place] = replace(places[place], seeds=_at_most(counts, place, places[place].seeds))
        tuning = part.count("tuning_seeds") if part.has("tuning_seeds") else before.tuning_seeds
        found[name] = _apart(replace(before, places=places, seeds=seeds, tuning_seeds=tuning), part.where)
        part.done()
    return found


def _claim(node: _Node, experiments: Mapping[str, Experiment]) -> Claim:
    found = Claim(
        id=node.text("id"),
        text=node.text("text"),
        source=node.text("source"),
        kind=node.choice("kind", get_args(Kind)),
        contrasts=tuple(x for part in node.items("contrasts") for x in _contrasts(part, experiments)),
    )
    node.done()
    return found


def _contrasts(node: _Node, experiments: Mapping[str, Experiment]) -> list[Contrast]:
    name: str = node.choice("experiment", experiments)
    places = node.choices("places", experiments[name].places)
    claimed: Claimed = node.choice("claimed", get_args(Claimed))
    found: list[Contrast] = []
    for place in places:
        has = experiments[name].places[place]
        first, second = (node.choice(key, has.arms) for key in ("first", "second"))
        if first == second:
            raise ValueError(f"{node.where}: first and second are both {first!r}; name two arms")
        found.append(Contrast(name, place, first, second, node.choice("measure", has.measures), claimed))
    node.done()
    return found


def _calculation(node: _Node, experiments: Mapping[str, Experiment]) -> Calculation:
    name: str = node.choice("experiment", experiments)
    measures: Sequence[str] = list(dict.fromkeys(m for p in experiments[name].places.values() for m in p.measures))
    found = Calculation(
        experiment=name,
        measure=node.choice("measure", measures),
        deviation=node.number("deviation"),
        comparisons=node.count("comparisons"),
        needed=node.count("needed"),
        detectable=node.number("detectable"),
        source=node.text("source"),
    )
    node.done()
    return found
