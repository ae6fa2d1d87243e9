"""The answers that samples vote by for maj@k: what a completion states, and which of these are the same answer."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

from bandpo._system.errors import RunError, place_of, what_happened
from bandpo.toy.tasks import TASKS, stated
from bandpo.train.answers import marked_answer, stated_answer
from bandpo.train.config import MATH
from bandpo.train.measures import RIGHT_FROM
from bandpo.train.verification import same_answers

Voter = Callable[[str, Mapping[str, Any]], str | None]
"""A function of the text of a completion and the row of its prompt: the answer, or None where the completion states none."""

ATTRIBUTE = "answer_of"
"""The attribute of a reward function of a user that reads the answer of a completion's text."""

_NUMBER = re.compile(r"\\boxed\{\s*([+-]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?)\s*\}")


def voter_of(name: str, function: object) -> Voter | None:
    """How the samples of a reward vote.

    Args:
        name: Name of the reward.
        function: The reward function. One of a user may have an attribute `answer_of`: a function of the text of a completion
            that returns its answer as text, or None where there is none.

    Returns:
        The function that reads the answers; None where the reward has no answers, only scores.

    Raises:
        ValueError: If the attribute is no function.
    """
    if name in TASKS:
        return lambda text, row: _of_task(name, text, row["metadata"])
    if name in MATH:
        read = stated_answer if name == "math-lenient" else marked_answer
        return lambda text, _: read(text)
    own = getattr(function, ATTRIBUTE, None)
    if own is None:
        return None
    if not callable(own):
        raise ValueError(
            f"reward {name!r}: its attribute {ATTRIBUTE} must be a function of the text of a completion, got {own!r}"
        )
    return lambda text, _: _read_by(own, name, text)


def _of_task(task: str, text: str, metadata: str) -> str | None:
    return stated(task, text, metadata).replace(" ", "") or None


def _read_by(own: Callable[[str], object], name: str, text: str) -> str | None:
    """The answer that a user's function reads.

    Raises:
        RunError: If it raises; the message has the place.
    """
    try:
        answer = own(text)
        return None if answer is None else str(answer)
    except Exception as error:
        raise RunError(f"reward {name!r}: its {ATTRIBUTE} {what_happened(error)} at {place_of(error)}") from error


def merged(
    answers: Sequence[Sequence[str | None]], rewards: Sequence[Sequence[float]], *, workers: int | None = None
) -> list[list[str | None]]:
    r"""The answers of reward math with one text for those that are equal as mathematics.

    Samples that are right have the answer of the reference, so they are one answer. Others are compared with math-verify,
    except plain numbers, which are compared as numbers. Of many different answers of a prompt only the 16 most frequent ones
    are compared. A comparison that fails or takes too long counts as different.

    Args:
        answers: LaTeX of the answer of each sample of each prompt; None where it states none.
        rewards: The rewards of these samples.
        workers: Processes of math-verify.

    Returns:
        A text for each sample; the texts of a prompt are equal for equal answers.

    Examples:
        >>> merged([[r"\boxed{0.50}", r"\boxed{0.5}", r"\boxed{\frac{2}{4}}", None]], [[0.0, 0.0, 0.0, 0.0]])
        [['\\boxed{0.50}', '\\boxed{0.50}', '\\boxed{0.50}', None]]
    """
    kept = [_right_as_one(own, scores) for own, scores in zip(answers, rewards, strict=True)]
    distinct = [[a for a, _ in Counter(a for a in own if a is not None).most_common()] for own in kept]
    asked = [
        (row, first, second)
        for row, texts in enumerate(distinct)
        for first, second in combinations([text for text in texts if text != _RIGHT][:_MOST_COMPARED], 2)
        if not (_plain(first) and _plain(second))
    ]
    equal = same_answers([(first, second) for _, first, second in asked], workers=workers)
    same = {pair for pair, is_equal in zip(asked, equal, strict=True) if is_equal}
    return [_with_one_text(own, texts, row, same) for row, (own, texts) in enumerate(zip(kept, distinct, strict=True))]


_RIGHT = "the reference"
_MOST_COMPARED = 16


def _right_as_one(own: Sequence[str | None], rewards: Sequence[float]) -> list[str | None]:
    """Answers with one text for the right ones. Plain numbers that are equal get one text as well."""
    seen: dict[float, str] = {}
    found: list[str | None] = []
    for answer, reward in zip(own, rewards, strict=True):
        number = None if answer is None else _plain(answer)
        if reward >= RIGHT_FROM:
            found.append(_RIGHT)
        else:
            found.append(answer if answer is None or number is None else seen.setdefault(number[0], answer))
    return found


def _plain(answer: str) -> tuple[float] | None:
    """The value of an answer that is a number in digits, in a tuple because 0 is false."""
    match = _NUMBER.fullmatch(answer)
    return None if match is None else (float(match[1].replace(",", "")),)


def _with_one_text(
    own: list[str | None], texts: list[str], row: int, same: set[tuple[int, str, str]]
) -> list[str | None]:
    """Each answer as the first one that it equals, also by way of others."""
    name: dict[str | None, str | None] = {None: None}
    for i, text in enumerate(texts):
        equals = [name[first] for first in texts[:i] if (row, first, text) in same]
        name[text] = equals[0] if equals else text
        for other, named in list(name.items()):
            if named is not None and named in equals:
                name[other] = name[text]
    return [name[answer] for answer in own]
