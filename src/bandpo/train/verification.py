"""math-verify in processes of its own: a time limit that holds in every thread, and failures that are no zeros."""

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
"""Limit for one completion: reading both sides and comparing them. The process that exceeds it is killed."""

_WORKERS = 2
_MANY = 200
"""References from which on all CPUs read them."""


def verify_all(pairs: Sequence[tuple[str, Any]], *, seconds: float = SECONDS) -> list[float | None]:
    r"""1 or 0 for each (completion, answer); None where the answer cannot be read, or math-verify raised or took too long.

    Args:
        pairs: Completion and reference answer.
        seconds: Limit for each.

    Examples:
        >>> verify_all([(r"\boxed{0.5}", r"\frac{1}{2}"), (r"\boxed{3}", "2"), (r"\boxed{3}", "for all n that 3 divides")])
        [1.0, 0.0, None]
    """
    futures = [_pool().schedule(verify_one, args=pair, timeout=seconds) for pair in pairs]
    return [_result(future) for future in futures]


def unreadable(answers: Sequence[Any], *, seconds: float = SECONDS) -> list[int]:
    r"""Which reference answers cannot be read, so that no completion could be scored against them.

    Args:
        answers: As in the dataset.
        seconds: Limit for each.

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
        answer: As in the dataset.
    """
    return _read_reference(answer) is not None


def verify_one(completion: str, answer: Any) -> float | None:
    """One verification in this process, without a limit.

    Args:
        completion: Text that should hold the answer in LaTeX, in a box for preference.
        answer: The reference.
    """
    gold = _read_reference(answer)
    return None if gold is None else _compare(gold, boxed_answer(completion))


@functools.lru_cache(maxsize=4096)
def _read_reference(answer: Any) -> list[Any] | None:
    """A reference as math-verify's expressions; None where it finds none, or the very same text in a box would not be right."""
    text = reference(answer)
    if text is None:
        return None
    text = with_variables(text)
    gold = [g for g in _parse(text, anchored=False) if not isinstance(g, str)]  # text alone is what it could not parse
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
    """Decimal places to compare to: math-verify's 6, or as many as show four digits of the smallest number."""
    parts = list(gold.args) if type(gold).__name__ in ("FiniteSet", "Tuple") else [gold]
    sizes = [abs(float(p)) for p in parts if getattr(p, "is_number", False) and getattr(p, "is_real", False)]
    small = min((s for s in sizes if 0 < s < 1), default=1.0)
    return max(6, 4 + math.floor(-math.log10(small)))


def _parse(text: str, *, anchored: bool) -> list[Any]:
    """Expressions of a text, of both sides alike; a completion's are in a box, or in `$...$` after the word "answer"."""
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
    except BaseException:  # math-verify and sympy raise what they like on a model's LaTeX
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

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
