"""Results of evaluations as lines and tables: one by itself, several side by side, and what a reader must know."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from bandpo._system.errors import printable
from bandpo.statistics import Interval, number
from bandpo.train.evaluate_results import Result
from bandpo.train.measures import RIGHT_FROM

_LABEL = 38  # characters of a model's name in a table


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
    """Label of the model."""
    value: str
    """The estimate."""
    interval: str
    """The ends of its 95% interval."""
    change: str
    """The paired difference to the first model; empty for that one."""
    change_interval: str
    """The ends of its 95% interval."""


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
    precisions = dict.fromkeys(str(r.settings.get("computed_in")) for r in results)
    if len(precisions) > 1:
        found.append(f"the models computed in different precisions ({', '.join(precisions)}): --bf16 gives one to all")
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


def scored_on(result: Result, *, several: bool = False) -> str:
    """On what and how a model was scored, for the terminal."""
    told = result.settings
    names = ("top_k", "min_p", "repetition_penalty", "generation_kwargs", "chat_template_kwargs")
    further = [f", {name} {told[name]}" for name in names if told.get(name) not in (None, 0, 1.0, {})]
    folder = told.get("held_out_by")
    held_out = "" if folder is None else ", held out" if several else f", held out by the run in {folder}"
    return (
        f" on {told['prompts']} prompts of {told['data']}{held_out}; reward {told['reward']}; {told['samples']} samples each "
        f"at temperature {_short(told.get('temperature'))}, top_p {_short(told.get('top_p'))}{''.join(further)}, "
        f"up to {told.get('max_new_tokens')} tokens"
    )


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)
