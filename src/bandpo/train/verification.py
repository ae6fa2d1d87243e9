"""math-verify in separate processes: its time limit holds in every thread, and a failure is not taken for a score of 0."""

import atexit
import functools
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from multiprocessing import get_context
from typing import Any

from pebble import ProcessPool

from bandpo.train.answers import boxed_answer, is_plain_number, reference, with_variables

SECONDS = 10.0
"""Limit for one completion, to read both sides and to compare them. A process that exceeds it is killed."""

_WORKERS = 2
"""Processes that verify completions."""
_MANY = 200
"""From this number of references on, they are read by as many processes as there are CPUs."""


def verify_all(pairs: Sequence[tuple[str, Any]], *, seconds: float = SECONDS) -> list[float | None]:
    r"""1 or 0 for each (completion, answer); None where the answer cannot be read, or math-verify raised or took too long.

    Args:
        pairs: Pairs of a completion and a reference answer.
        seconds: Limit for each pair.

    Examples:
        >>> verify_all([(r"\boxed{0.5}", r"\frac{1}{2}"), (r"\boxed{3}", "2"), (r"\boxed{3}", "for all n that 3 divides")])
        [1.0, 0.0, None]
    """
    futures = [_pool().schedule(verify_one, args=pair, timeout=seconds) for pair in pairs]
    return [_result(future) for future in futures]


def unreadable(answers: Sequence[Any], *, seconds: float = SECONDS) -> list[int]:
    r"""The positions of the reference answers that cannot be read, so that no completion could be scored against them.

    Args:
        answers: Reference answers, as the dataset holds them.
        seconds: Limit for each answer.

    Examples:
        >>> unreadable(["72", r"2\sqrt{3}", "for all n that 3 divides", ["7"]])
        [2, 3]
    """
    asked = {str(a): a for a in answers if isinstance(a, str | float | bool) and not is_plain_number(a)}
    with nullcontext(_pool()) if len(asked) < _MANY else _new_pool(os.cpu_count() or 1) as pool:
        futures = {text: pool.schedule(is_readable, args=(a,), timeout=seconds) for text, a in asked.items()}
        found = {text: _result(future) for text, future in futures.items()}
    return [i for i, a in enumerate(answers) if not (is_plain_number(a) or found.get(str(a)))]


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


def _result(future: Any) -> float | None:
    try:
        value = future.result()
    except KeyboardInterrupt:
        raise
    except BaseException:  # math-verify and sympy may raise anything on LaTeX that a model wrote
        return None
    return value if value is None or math.isfinite(value) else None


@functools.cache
def _pool() -> ProcessPool:
    pool = _new_pool(_WORKERS)
    atexit.register(_close, pool)
    return pool


def _new_pool(workers: int) -> ProcessPool:
    return ProcessPool(max_workers=workers, context=get_context("spawn"), initializer=_quiet)


def _close(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


def _quiet() -> None:
    import logging
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
