"""Results of `bandpo evaluate`: what was measured and how, as a file, as lines for the terminal, and compared."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, cast

from bandpo._system.bounded import parse_json, read_regular
from bandpo._system.errors import printable
from bandpo._system.files import finite_or_null
from bandpo._system.secrets import hide_in
from bandpo.statistics import Interval, number
from bandpo.train.measures import RIGHT_FROM, Tally, by_prompt, differences, estimates

LARGEST_FILE = 1 << 28
"""Largest number of bytes of a file of results that is read."""

MOST_SAMPLES = 1 << 14
"""Largest number of samples of a prompt in such a file: the time of pass@k grows with its square."""

_LABEL = 38  # characters of a model's name in a table


@dataclass(frozen=True)
class Result:
    """The evaluation of one model.

    Args:
        settings: What was evaluated and how, as it is written to files: model, data, reward, samples, sampler.
        summary: Summary of the evaluation, as in `Evaluation.summary`.
        alike: What must be the same where models are compared, by its name.
        tallies: Counts of each prompt.
        prompts: A digest of each prompt with its answer, by which evaluations are paired.
    """

    settings: Mapping[str, Any]
    summary: Mapping[str, float]
    alike: Mapping[str, object]
    tallies: Sequence[Tally]
    prompts: Sequence[str]

    @property
    def samples(self) -> int:
        """The number of samples of each prompt."""
        return int(self.settings["samples"])

    @cached_property
    def values(self) -> dict[str, list[float]]:
        """The measures of each prompt, as in `measures.by_prompt`."""
        return by_prompt(self.tallies, self.samples)

    @cached_property
    def measures(self) -> dict[str, Interval]:
        """mean@k, pass@k and maj@k with their 95% intervals over the prompts."""
        return estimates(self.values)

    @property
    def is_binary(self) -> bool:
        """Whether every reward is 0 or 1, so that pass@1 is mean@k."""
        scored = (t for t in self.tallies if t.samples)
        return all(abs(t.mean * t.samples - t.right) < 1e-9 for t in scored)

    def differences_to(self, first: "Result") -> dict[str, Interval]:
        """The measures minus those of another result, paired by prompt, with 95% intervals.

        Args:
            first: A result of the same prompts in the same order.

        Raises:
            ValueError: If the prompts differ.
        """
        if list(first.prompts) != list(self.prompts):
            raise ValueError("results of different prompts cannot be paired")
        return differences(first.values, self.values)

    def content(self) -> dict[str, Any]:
        """The result as JSON: settings, summary, measures with their intervals, and the counts of each prompt."""
        counts = [
            {"prompt": p, "mean": t.mean, "samples": t.samples, "right": t.right, "votes": t.votes}
            for p, t in zip(self.prompts, self.tallies, strict=True)
        ]
        return {
            **self.settings,
            **self.summary,
            "measures": {name: found._asdict() for name, found in self.measures.items()},
            "alike": dict(self.alike),
            "counts": counts,
        }

    @classmethod
    def read(cls, path: Path) -> "Result":
        """Read a file of `bandpo evaluate` about one model; nothing in it is executed, and no file that it names is opened.

        Args:
            path: A file of RUN/evaluations, or of `--output`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no such file; the message says what is wrong.
        """
        content: object = parse_json(read_regular(path, LARGEST_FILE), str(path))
        if not isinstance(content, dict):
            raise ValueError(f"{path} is no result of bandpo evaluate: it holds no JSON object")
        found = cast("dict[str, Any]", content)
        try:
            tallies = [_tally(row) for row in found["counts"]]
            prompts = [_text(row["prompt"]) for row in found["counts"]]
            alike = {_text(name): value for name, value in found["alike"].items()}
            samples, _ = _count(found["samples"]), [_text(found[name]) for name in ("model", "data", "reward")]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = printable(str(error))[:100]
            raise ValueError(f"{path} is no result of bandpo evaluate about one model: {what}") from None
        if not tallies or not 1 <= samples <= MOST_SAMPLES or max(t.samples for t in tallies) > samples:
            raise ValueError(f"{path} is no result of bandpo evaluate: its counts do not fit {samples} samples")
        names = {**by_prompt(tallies[:1], samples), "groups with signal": 0, "unscored": 0}
        summary = {n: float(v) for n in names if isinstance(v := found.get(n), int | float)}
        others = {*names, "measures", "alike", "counts", "about"}
        settings = {name: value for name, value in found.items() if name not in others}
        return cls(settings, summary, alike, tallies, prompts)


def digest(prompt: Any, answer: object) -> str:
    """A digest of a prompt and its answer, the same for text and for the messages that a chat model gets in its place.

    Args:
        prompt: Text, or messages.
        answer: The reference answer.
    """
    texts = [prompt] if isinstance(prompt, str) else [str(m["content"]) for m in cast("list[dict[str, Any]]", prompt)]
    both = "\n\n".join(texts) + f"\0{answer!r}"
    return blake2b(both.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def file_name(result: Result, stem: str) -> str:
    """The name of the file of a result: the same for the same evaluation, another one for other settings or prompts.

    Args:
        result: The result.
        stem: What was evaluated, such as model or checkpoint-10.
    """
    decides = finite_or_null(
        {**result.settings, "model": None, "prompts": list(result.prompts), "alike": dict(result.alike)}
    )
    key = blake2b(repr(hide_in(decides)).encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    data = "".join(
        c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in Path(str(result.settings["data"])).name
    )
    return f"{stem}-{data[:40]}-{key}.json"


def lines_of(result: Result) -> Iterator[str]:
    """The measures of one result with their intervals, and the rest of its summary, as lines.

    Args:
        result: The result.
    """
    for name, found in result.measures.items():
        value = result.summary.get(name, found.value)
        if name in result.summary or not name.startswith("maj@"):
            yield f"  {name:<20} {value:.4f}  {_ends(found, '.4f')}".rstrip()
    for name, value in result.summary.items():
        if name not in result.measures:
            yield f"  {name:<20} {value:.4f}"


class Row(NamedTuple):
    """A row of a table: one measure of one model, as text."""

    measure: str
    """Name of the measure in its first row, else empty."""
    model: str
    value: str
    interval: str
    change: str
    """The paired difference to the first model; empty for that one."""
    change_interval: str


def rows_of(results: Mapping[str, Result]) -> list[Row]:
    """Results of the same prompts side by side.

    Args:
        results: The results by the names of their models; the others are compared with the first one.

    Raises:
        ValueError: If the prompts differ.
    """
    first = next(iter(results.values()))
    changes = {name: result.differences_to(first) for name, result in results.items() if result is not first}
    rows: list[Row] = []
    for measure in shown(list(results.values())):
        for name, label in labels(results).items():
            found, change = results[name].measures[measure], changes.get(name, {}).get(measure)
            rows.append(
                Row(
                    measure if results[name] is first else "",
                    label,
                    number(found.value),
                    _ends(found, ".3f"),
                    "" if change is None else number(change.value, "+.3f"),
                    "" if change is None else _ends(change, "+.3f"),
                )
            )
    return rows


def labels(names: Iterable[str]) -> dict[str, str]:
    """Short names of models for tables and figures: a letter, and the end of the name; of one model only its name.

    Args:
        names: The names as they were given.

    Examples:
        >>> labels(["runs/a", "runs/b"])
        {'runs/a': 'A runs/a', 'runs/b': 'B runs/b'}
    """
    names = list(names)
    if len(names) == 1:
        return {names[0]: _shortened(names[0])}
    return {name: f"{letter} {_shortened(name)}" for name, letter in zip(names, _letters(), strict=False)}


def table(results: Mapping[str, Result]) -> list[str]:
    """The rows of `rows_of` as lines of at most 100 characters.

    Args:
        results: The results by the names of their models.
    """
    rows = rows_of(results)
    width = max(len("model"), *(len(row.model) for row in rows))
    head = Row("", "model", "value", "95% interval", "minus A", "95% interval")
    return [
        f"{r.measure:<9} {r.model:<{width}}  {r.value:>5}  {r.interval:<14}  {r.change:>7}  {r.change_interval}".rstrip()
        for r in (head, *rows)
    ]


def shown(results: Sequence[Result]) -> list[str]:
    """The measures that a table shows: pass@1 is left out where it is mean@k, and of maj@k only that of all samples is shown.

    Args:
        results: Results with the same number of samples.
    """
    samples = results[0].samples
    common = [name for name in results[0].measures if all(name in r.measures for r in results)]
    left_out = {"pass@1"} if all(r.is_binary for r in results) else set[str]()
    voted = f"maj@{samples}" if samples > 2 else ""
    return [name for name in common if name not in left_out and (not name.startswith("maj@") or name == voted)]


def notes(results: Sequence[Result]) -> list[str]:
    """What a reader of the table must know, as sentences.

    Args:
        results: The results.
    """
    found: list[str] = []
    if any(not math.isnan(m.low) for r in results for m in r.measures.values()):
        paired = ", of differences paired by prompt" if len(results) > 1 else ""
        found.append(f"95% intervals over the prompts{paired} (BCa bootstrap), not over seeds of training")
    if not all(r.is_binary for r in results):
        found.append(f"the rewards are not only 0 and 1: for pass@k and maj@k a sample is right from {RIGHT_FROM:g} on")
    if any(t.votes is None for r in results for t in r.tallies[:1]):
        found.append(
            f"no maj@k: reward {results[0].settings['reward']} gives scores and no answers (docs/train.md: answer_of)"
        )
    return found


def _letters() -> Iterator[str]:
    """A, B ... Z, A1, B1 ..."""
    round_ = 0
    while True:
        yield from (f"{chr(ord('A') + i)}{round_ or ''}" for i in range(26))
        round_ += 1


def _shortened(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _LABEL else f"…{name[1 - _LABEL :]}"


def _ends(found: Interval, form: str) -> str:
    """The ends of an interval; empty where there are none."""
    return "" if math.isnan(found.low) or math.isnan(found.high) else f"[{found.low:{form}}, {found.high:{form}}]"


def _tally(row: Any) -> Tally:
    mean, votes = row["mean"], row["votes"]
    samples, right = _count(row["samples"]), _count(row["right"])
    if right > samples:
        raise ValueError(f"{right} right samples of {samples}")
    if votes is not None:
        votes = tuple((_count(n), float(share)) for n, share in votes)
        if sum(n for n, _ in votes) > samples or not all(0 <= share <= 1 and n for n, share in votes):
            raise ValueError(f"votes that do not fit {samples} samples")
    return Tally(math.nan if mean is None else float(mean), samples, right, votes)


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 1 << 30:
        raise ValueError(f"{value!r} is no count")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value
