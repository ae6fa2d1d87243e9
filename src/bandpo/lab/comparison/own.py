"""Objectives of a comparison by name, those of the user ("package.module:NAME") among them.

Only names that the caller gives are imported, never one that a file has. Every process imports them anew, also from the current
folder, and compares their fingerprints with those of the process that planned the comparison.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from bandpo._system.bounded import parse_json, read_regular
from bandpo.lab.comparison.definitions import PYTHON, fingerprint, in_words
from bandpo.lab.comparison.top import has_inputs
from bandpo.objective import Objective
from bandpo.zoo import get_objective

Item = TypeVar("Item")
Made = TypeVar("Made")

RECORDS = "own_objectives"
"""The key of plan.json under which the definitions of the user's objectives are."""

_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_LARGEST_PLAN = 1 << 22  # bytes of plan.json


class Definition(NamedTuple):
    """What an own objective is, to notice that it has changed.

    Args:
        words: The objective as Python writes it.
        fingerprint: See `bandpo.lab.comparison.definitions`.
        python: The version of Python, which fingerprints of code depend on.
    """

    words: str
    fingerprint: str
    python: str


def is_own(name: str) -> bool:
    """Whether a name is the import path of an objective of the user, "package.module:NAME"."""
    return ":" in name


@functools.cache
def objective_of(name: str) -> Objective:
    """The objective of a name or import path, with inputs that the lab has. The code of the user's module runs.

    Args:
        name: A name in `bandpo.OBJECTIVES`, or "package.module:NAME", which is also found in the current folder.

    Raises:
        ValueError: If the name is unknown, what it names cannot be imported or is no objective, or needs inputs that the lab
            does not have.
    """
    if is_own(name) and not _IMPORT_PATH.fullmatch(name):
        raise ValueError(f"objectives: {name!r} is no import path; write package.module:NAME")
    try:
        objective = get_objective(name)
    except TypeError as error:
        raise ValueError(f"objectives: {name} is no Objective ({error})") from error
    except ValueError as error:
        raise ValueError(f"objectives: {error}") from error
    if not has_inputs(objective):
        raise ValueError(f"objectives: {name!r} needs {objective.extras}, which the lab does not have")
    return objective


@functools.cache
def definition_of(name: str) -> Definition:
    """The definition of an own objective, as it was when this process first asked for it.

    Args:
        name: The import path, "package.module:NAME".
    """
    objective = objective_of(name)
    return Definition(in_words(objective), fingerprint(objective, name), PYTHON)


def definitions_of(names: Iterable[str]) -> dict[str, Definition]:
    """The definitions of the own objectives among some names, by import path.

    Args:
        names: Names of objectives.
    """
    return {name: definition_of(name) for name in names if is_own(name)}


def with_definitions(make: Callable[[Item], Made], names: Iterable[str]) -> Callable[[Item], Made]:
    """The function `make`, which first checks in its process that own objectives are those of this process.

    Args:
        make: Function of a module.
        names: Names of objectives; without own ones among them, `make` itself is returned.
    """
    expected = {name: found.fingerprint for name, found in definitions_of(names).items()}
    return functools.partial(_make_checked, make, expected) if expected else make


def _make_checked(make: Callable[[Item], Made], expected: Mapping[str, str], item: Item) -> Made:
    for name, known in expected.items():
        if definition_of(name).fingerprint != known:
            raise ValueError(f"{name} was changed while the comparison was running; start the command again")
    return make(item)


def recorded(folder: Path) -> dict[str, Definition]:
    """The definitions of own objectives that plan.json of a comparison records, by import path. Nothing is imported.

    Args:
        folder: Folder of the comparison; without a plan, or with one that cannot be read, nothing is recorded.
    """
    path = folder / "plan.json"
    try:
        plan = parse_json(read_regular(path, _LARGEST_PLAN), str(path))
        records = cast("dict[str, dict[str, Any]]", plan.get(RECORDS, {}))
        return {str(name): Definition(*(str(r[key]) for key in Definition._fields)) for name, r in records.items()}
    except (FileNotFoundError, ValueError, AttributeError, TypeError, KeyError):
        return {}


def check_unchanged(names: Iterable[str], before: Mapping[str, Definition], folder: Path) -> None:
    """Check that own objectives are what they were when a comparison began.

    Args:
        names: Names of the objectives that are compared now.
        before: The definitions that were recorded.
        folder: Folder of the comparison, for the message.

    Raises:
        ValueError: If one has changed; the message has both definitions.
    """
    for name, now in definitions_of(names).items():
        then = before.get(name)
        if then is None or then.fingerprint == now.fingerprint:
            continue
        how = f"it was {then.words}, and is {now.words}"
        if then.words == now.words:
            how = "the code that it runs is another one"
            if then.python != now.python:
                how = f"it was compiled by Python {then.python}, and is by Python {now.python} now, whose code differs"
        raise ValueError(
            f"objectives: {name} is not the objective that the results in {folder} were made with: {how}. Choose another "
            "--output, or put the definition back"
        )
