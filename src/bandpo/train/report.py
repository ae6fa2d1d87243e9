"""The results of a run: one self-contained report.html from the files in its folder, and a table for the terminal."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from matplotlib.figure import Figure
from rich.table import Table

from bandpo._system.files import read_yaml, write_text
from bandpo._system.pages import save_svg, template
from bandpo._system.secrets import redact
from bandpo.doctor.output import Examined, for_page
from bandpo.statistics import number
from bandpo.train.record import read_evaluation, read_object, sample_rows, shown_scores

_SHOWN_PROMPTS, _SHOWN_COMPLETIONS, _SHOWN_CHARACTERS = 12, 4, 4000
"""Prompts in the report's table of samples, completions of each before and after training, and characters of each text."""
_SHOWN_SETTING = 2000
"""Characters of a setting in the report."""


def write_report(
    folder: Path,
    *,
    title: str,
    figures: Mapping[str, Figure | Mapping[str, Figure]],
    notes: Sequence[str] = (),
    examined: Sequence[Examined] = (),
    told: Sequence[str] = (),
    state: str | None = None,
    started: Mapping[str, float] | None = None,
    output: Path | None = None,
) -> Path:
    """Write report.html and its figures (SVG) into the folder of a run.

    The page is made from evaluation.json, samples.jsonl, config.yaml and env.json in that folder, as far as they are there. It
    needs no network, it runs no script, and completions in it are escaped. Its size does not grow with the run: below 2 MB, and
    what config.yaml and the notes have.

    Args:
        folder: Folder of the run.
        title: Heading of the page.
        figures: Figures by their headings, or several of one heading by their titles; they are closed.
        notes: What a reader must know before the numbers, for example that a run had no learning signal.
        examined: What the doctor finds in the files of the run.
        told: What the doctor told while the run trained.
        state: Where an unfinished run is; None for a finished one.
        started: Scores of the model that an unfinished run began with; None where they are not known.
        output: The page to write, without files of figures; None for report.html in the folder of the run.

    Returns:
        Path of the page.
    """
    evaluation = read_evaluation(folder) if state is None else None
    page = template("bandpo.train", "report.html.j2").render(
        title=title,
        state=state,
        evaluation=evaluation,
        scores=[] if not (evaluation or started) else score_rows(evaluation or {"before": started}),
        change=None if evaluation is None else change_line(evaluation),
        figures=_drawn(figures, None if output is not None else folder / "figures"),
        notes=list(notes),
        findings=_findings(examined, folder),
        told=list(told),
        samples=_pairs(_samples(folder, ended=state is None)),
        config=_table(_settings(folder / "config.yaml")),
        options=_table(_settings(folder / "config.resolved.yaml")),
        environment=_environment(folder / "env.json"),
    )
    path = output or folder / "report.html"
    write_text(path, page)
    return path


def evaluation_table(title: str, evaluation: Mapping[str, Any]) -> Table:
    """The results on the held-out prompts before and after training, for the terminal.

    Args:
        title: Title of the table.
        evaluation: Content of evaluation.json.
    """
    table = Table(title=title)
    table.add_column(f"{evaluation['prompts']} held-out prompts")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for row in score_rows(evaluation):
        table.add_row(row.name, row.before, row.after, row.change)
    return table


class ScoreRow(NamedTuple):
    """A score before and after training, as texts; a dash where there is no number.

    Args:
        name: Name of the score, such as mean@8.
        before: The score before training.
        after: The score after training.
        change: The difference.
    """

    name: str
    before: str
    after: str
    change: str


def score_rows(evaluation: Mapping[str, Any]) -> list[ScoreRow]:
    """The scores to show, each once: pass@1 is left out where it is mean@k, as for rewards of 0 and 1.

    Args:
        evaluation: Content of evaluation.json; "after" may be missing.
    """
    before: Mapping[str, float | None] = evaluation["before"]
    after: Mapping[str, float | None] = evaluation.get("after", {})
    names = shown_scores(*(scores for scores in (before, after) if scores))
    rows: list[ScoreRow] = []
    for name in names:
        old, new = before.get(name), after.get(name)
        form = ".0f" if name == "unscored" else ".3f"
        change = None if old is None or new is None else new - old
        rows.append(ScoreRow(name, number(old, form), number(new, form), number(change, f"+{form}")))
    return rows


def change_line(evaluation: Mapping[str, Any]) -> str | None:
    """The change of the mean reward with its interval; None if there are no ends of one, or the run is of an older version.

    Args:
        evaluation: Content of evaluation.json.
    """
    change: Mapping[str, float | None] = evaluation.get("change", {})
    value, low, high = (change.get(name) for name in ("value", "low", "high"))
    if value is None or low is None or high is None or math.isnan(low) or math.isnan(high):
        return None
    return (
        f"mean@{evaluation['samples']} changed by {value:+.3f}, 95% interval [{low:+.3f}, {high:+.3f}] over the "
        f"{evaluation['prompts']} prompts (BCa bootstrap of the paired changes; one run, so without the noise of other seeds)"
    )


def _drawn(figures: Mapping[str, Figure | Mapping[str, Figure]], folder: Path | None) -> dict[str, dict[str, str]]:
    """The figures as SVG: those of each heading by their titles, and a single one by the empty title."""
    found: dict[str, dict[str, str]] = {}
    count = 0
    for heading, inside in figures.items():
        for name, figure in ({"": inside} if isinstance(inside, Figure) else inside).items():
            count += 1
            path = None if folder is None else folder / f"{count}.svg"
            found.setdefault(heading, {})[name] = save_svg(figure, path)
    return found


def _findings(examined: Sequence[Examined], folder: Path) -> list[dict[str, Any]]:
    """The findings of each file, those that ask for an action apart from the others."""
    files: list[dict[str, Any]] = []
    for file in for_page(examined):
        found: list[dict[str, Any]] = file["findings"]
        asks = [f for f in found if f["level"] in ("problem", "warning")]
        name = str(file["name"]).replace(f"{folder}/", "")
        files.append({**file, "name": name, "asks": asks, "others": [f for f in found if f not in asks]})
    return files


def _settings(path: Path) -> dict[str, Any]:
    return redact(read_yaml(path, follow=False)) if path.exists() else {}


def _environment(path: Path) -> dict[str, Any]:
    """The parts of env.json: the lines at the top, a table, and the table of versions."""
    found: dict[str, Any] = redact(read_object(path)) if path.exists() else {}
    versions: Any = found.pop("versions", {})
    named = cast("dict[str, Any]", versions) if isinstance(versions, dict) else {"versions": versions}
    top = [found.get("command"), f"bandpo {named['bandpo']}" if "bandpo" in named else None]
    seconds, device = found.get("seconds"), found.get("device")
    if isinstance(seconds, int | float) and math.isfinite(seconds):
        top.append(f"{seconds:.0f} s on {device}")
    return {
        "line": " · ".join(str(part) for part in top if part),
        "table": _table(found),
        "versions": _table(named),
    }


def _holds(value: Any, key: str) -> bool:
    return isinstance(value, dict) and key in value


def _table(values: Mapping[str, Any]) -> dict[str, str]:
    """Settings as texts, in YAML's spelling of true, false and null; lists and mappings in that of JSON."""
    return {str(name): _cut_to(_spelled(value), _SHOWN_SETTING) for name, value in values.items()}


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _samples(folder: Path, *, ended: bool) -> Iterator[dict[str, Any]]:
    """The rows of samples.jsonl; of a run that has not ended, those of the model that it began with."""
    if (folder / "samples.jsonl").exists():
        yield from (row for row in sample_rows(folder / "samples.jsonl") if ended or row["stage"] == "before")


def _pairs(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first prompts with their completions before and after training; of each row only what is shown is kept."""
    found: dict[str, dict[str, Any]] = {}
    ended = False
    for row in rows:
        ended = ended or row["stage"] == "after"
        key = json.dumps(row["prompt"])
        if key not in found and len(found) >= 4 * _SHOWN_PROMPTS:  # more than enough, if a few have one stage only
            continue
        kept = found.setdefault(key, {"prompt": row["prompt"], "before": None, "after": None})
        kept[row["stage"]] = _scored(row)
    pairs = [kept for kept in found.values() if kept["before"] is not None and (kept["after"] is not None or not ended)]
    return [{**kept, "prompt": _cut(_last_message(kept["prompt"]))} for kept in pairs[:_SHOWN_PROMPTS]]


def _last_message(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    last: Any = prompt[-1] if prompt else ""
    return str(last["content"] if _holds(last, "content") else last)


def _scored(row: dict[str, Any]) -> list[tuple[str, float | None]]:
    """The first completions of a row with their rewards."""
    shown = [_cut(text) for text in row["completions"][:_SHOWN_COMPLETIONS]]
    return list(zip(shown, row["rewards"], strict=False))


def _cut(text: str) -> str:
    """A text with at most `_SHOWN_CHARACTERS` of its characters."""
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[:_SHOWN_CHARACTERS]}… ({len(text) - _SHOWN_CHARACTERS:,} more characters in samples.jsonl)"


def _cut_to(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most:,} more characters)"
