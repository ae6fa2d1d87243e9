"""math-verify in separate processes: its time limit holds in every thread, and a failure is not taken for a score of 0."""

import atexit
import functools
import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from multiprocessing import get_context
from typing import Any

from pebble import ProcessPool

from bandpo._system.errors import Terminated
from bandpo.train.answers import boxed_answer, is_plain_number, reference, stated_answer, with_variables

SECONDS = 10.0
"""Limit for one completion, to read both sides and to compare them. A process that exceeds it is killed."""

_MOST_WORKERS = 16
"""Most processes that are started where nobody gave a number: each takes about 150 MB."""
_MANY = 200
"""From this number of references on, they are read by as many processes as there are CPUs."""
_BATCH = 32
"""Most pairs that a process gets at once. One pair takes about 2 ms, and handing it over about a fifth of that."""


def default_workers() -> int:
    """The number of processes that verify completions: this process's share of the CPUs, at least 1 and at most 16.

    The CPUs are those that the process may run on; they are shared among the processes of the run on this machine.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MOST_WORKERS, _cpus() // max(1, ranks)))


def verify_all(
    pairs: Sequence[tuple[str, Any]], *, seconds: float = SECONDS, workers: int | None = None, lenient: bool = False
) -> list[float | None]:
    r"""1 or 0 for each (completion, answer); None where the answer cannot be read, or math-verify raised or took too long.

    The result is in the order of the pairs, and does not depend on the number of processes.

    Args:
        pairs: Pairs of a completion and a reference answer.
        seconds: Limit for each pair.
        workers: Number of processes; None for `default_workers`.
        lenient: Read a completion without a box as `stated_answer` does.

    Examples:
        >>> verify_all([(r"\boxed{0.5}", r"\frac{1}{2}"), (r"\boxed{3}", "2"), (r"\boxed{3}", "for all n that 3 divides")])
        [1.0, 0.0, None]
    """
    count = workers or default_workers()
    return _in_batches(_pool(count), verify_leniently if lenient else verify_one, pairs, seconds, count)


def same_answers(
    pairs: Sequence[tuple[str, str]], *, seconds: float = SECONDS, workers: int | None = None
) -> list[bool]:
    r"""Whether two answers are equal as mathematics; False where math-verify cannot read one, raised or took too long.

    Args:
        pairs: Pairs of answers as LaTeX in a box.
        seconds: Limit for each pair.
        workers: Number of processes; None for `default_workers`.

    Examples:
        >>> same_answers([(r"\boxed{0.5}", r"\boxed{\frac{1}{2}}"), (r"\boxed{x}", r"\boxed{y}")])
        [True, False]
    """
    if not pairs:
        return []
    count = workers or default_workers()
    return [value == 1.0 for value in _in_batches(_pool(count), same_answer, pairs, seconds, count)]


def unreadable(answers: Sequence[Any], *, seconds: float = SECONDS) -> list[int]:
    r"""The positions of the reference answers that cannot be read, so that no completion could be scored against them.

    Args:
        answers: Reference answers, as the dataset holds them.
        seconds: Limit for each answer.

    Examples:
        >>> unreadable(["72", r"2\sqrt{3}", "for all n that 3 divides", ["7"]])
        [2, 3]
    """
    asked = {str(a): (a,) for a in answers if isinstance(a, str | float | bool) and not is_plain_number(a)}
    count = default_workers() if len(asked) < _MANY else _cpus()
    with nullcontext(_pool(count)) if len(asked) < _MANY else _new_pool(count) as pool:
        values = _in_batches(pool, is_readable, list(asked.values()), seconds, count)
    found = dict(zip(asked, values, strict=True))
    return [i for i, a in enumerate(answers) if not (is_plain_number(a) or found.get(str(a)))]


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_batches(
    pool: ProcessPool, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], seconds: float, workers: int
) -> list[Any]:
    """The result of each call; None for one that failed or took too long.

    A process gets several calls at once, which together may take a third of the limit of one: that is long for calls of
    milliseconds. The calls of a batch that takes longer, or whose process dies, are made again, each by itself and with its own
    limit. So the results are those of single calls.
    """
    size = max(1, min(_BATCH, len(calls) // (4 * workers)))  # four batches for each process, to share the work evenly
    starts = range(0, len(calls), size)
    limit = seconds if size == 1 else seconds / 3
    futures = [pool.schedule(_each, args=(function, calls[i : i + size]), timeout=limit) for i in starts]
    found: list[Any] = [None] * len(calls)
    alone: dict[int, Any] = {}
    for start, future in zip(starts, futures, strict=True):
        values = _unless_killed(future)
        if values is not None:
            found[start : start + size] = values
        elif size > 1:
            for i, call in enumerate(calls[start : start + size], start):
                alone[i] = pool.schedule(_each, args=(function, [call]), timeout=seconds)
    for i, future in alone.items():
        [found[i]] = _unless_killed(future) or [None]
    return found


def _each(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The result of each call, None for one that raises or gives no number."""
    found: list[Any] = []
    for call in calls:
        try:
            value = function(*call)
        except BaseException:  # math-verify and sympy may raise anything on LaTeX that a model wrote
            value = None
        found.append(value if value is None or math.isfinite(value) else None)
    return found


def _unless_killed(future: Any) -> list[Any] | None:
    """The result of a batch; None if its process was ended, for its time or its memory."""
    try:
        return future.result()
    except (KeyboardInterrupt, Terminated):
        raise
    except BaseException:
        return None


def is_readable(answer: Any) -> bool:
    """Whether a reference answer can be read, in this process and without a limit.

    Args:
        answer: Reference answer, as the dataset holds it.
    """
    return _read_reference(answer) is not None


def verify_one(completion: str, answer: Any) -> float | None:
    """Verify one completion in this process, without a limit.

    Args:
        completion: Text that should hold the answer in LaTeX, best in a box.
        answer: Reference answer.

    Returns:
        1 or 0; None where the reference cannot be read.
    """
    gold = _read_reference(answer)
    return None if gold is None else _compare(gold, boxed_answer(completion))


def verify_leniently(completion: str, answer: Any) -> float | None:
    """As `verify_one`, with the answer of a completion without a box read by `stated_answer`.

    Args:
        completion: Text that states an answer.
        answer: Reference answer.

    Returns:
        1 or 0; None where the reference cannot be read.
    """
    gold = _read_reference(answer)
    return None if gold is None else _compare(gold, stated_answer(completion))


def same_answer(first: str, second: str) -> float:
    """Compare two answers in this process, without a limit.

    Args:
        first: An answer as LaTeX in a box.
        second: Another one.

    Returns:
        1 if they are equal as mathematics, else 0.
    """
    found = [x for x in _parse(with_variables(first), anchored=True) if not isinstance(x, str)]
    return _compare(found, second) if found else 0.0


@functools.lru_cache(maxsize=4096)
def _read_reference(answer: Any) -> list[Any] | None:
    """A reference as math-verify's expressions; None if it finds none, or if it would not accept the same text in a box."""
    text = reference(answer)
    if text is None:
        return None
    text = with_variables(text)
    gold = [g for g in _parse(text, anchored=False) if not isinstance(g, str)]  # a text is what it could not parse
    own = text[1:-1] if text.startswith("$") and text.count("$") == 2 and text.endswith("$") else None
    if not gold or (own is not None and not _compare(gold, rf"\boxed{{{own}}}")):
        return None
    return gold


def _compare(gold: list[Any], answer: str | None) -> float:
    from math_verify import verify

    if answer is None:
        return 0.0
    if any(getattr(g, "free_symbols", None) for g in gold):
        answer = with_variables(answer)
    found = _parse(answer, anchored=True)
    digits = max(_digits(g) for g in gold)
    return float(
        verify(
            gold, found, float_rounding=digits, numeric_precision=digits + 9, timeout_seconds=None, raise_on_error=True
        )
    )


def _digits(gold: Any) -> int:
    """The decimal places of the comparison: math-verify's 6, or as many as show four digits of the smallest number."""
    parts = list(gold.args) if type(gold).__name__ in ("FiniteSet", "Tuple") else [gold]
    sizes = [abs(float(p)) for p in parts if getattr(p, "is_number", False) and getattr(p, "is_real", False)]
    small = min((s for s in sizes if 0 < s < 1), default=1.0)
    return max(6, 4 + math.floor(-math.log10(small)))


def _parse(text: str, *, anchored: bool) -> list[Any]:
    """The expressions in a text; in a completion they are in a box, or in `$...$` after the word "answer"."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    latex = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=not anchored)
    whole = anchored or text.startswith(("$", r"\boxed"))
    return parse(
        text,
        extraction_config=[latex] if whole else [latex, ExprExtractionConfig()],
        extraction_mode="first_match" if anchored else "any_match",
        parsing_timeout=None,  # type: ignore[arg-type]
        raise_on_error=True,
    )


@functools.cache
def _pool(workers: int) -> ProcessPool:
    pool = _new_pool(workers)
    atexit.register(_close, pool)
    return pool


def _new_pool(workers: int) -> ProcessPool:
    return ProcessPool(max_workers=workers, context=get_context("spawn"), initializer=_quiet)


def _close(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


def _quiet() -> None:
    import importlib
    import logging
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    importlib.import_module("math_verify")  # takes seconds, which no call should pay for
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
