"""math-verify in processes of its own: a time limit that holds in every thread, and failures that are no zeros."""

import atexit
import functools
import math
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from multiprocessing import get_context
from typing import Any

from pebble import ProcessExpired, ProcessPool

SECONDS = 10.0
"""Limit for one completion: reading both sides and comparing them. The process that exceeds it is killed."""

_WORKERS = 2


def verify_all(pairs: Sequence[tuple[str, str]], *, seconds: float = SECONDS) -> list[float | None]:
    r"""1 or 0 for each (completion, answer); None where the answer cannot be read, or math-verify raised or took too long.

    Args:
        pairs: Completion and reference answer.
        seconds: Limit for each.

    Examples:
        >>> verify_all([(r"\boxed{0.5}", r"$\frac{1}{2}$"), (r"\boxed{3}", "$2$"), (r"\boxed{3}", "no number at all")])
        [1.0, 0.0, None]
    """
    futures = [_pool().schedule(verify_one, args=pair, timeout=seconds) for pair in pairs]
    return [_result(future) for future in futures]


def verify_one(completion: str, answer: str) -> float | None:
    """One verification in this process, without a limit; extraction as in TRL's `accuracy_reward`.

    Args:
        completion: Text that should hold the answer in LaTeX, in a box for preference.
        answer: The reference.
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    gold = parse(answer, parsing_timeout=None, raise_on_error=True)  # type: ignore[arg-type]
    if not gold:
        return None
    latex = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
    )
    found = parse(
        completion,
        extraction_config=[latex],
        extraction_mode="first_match",
        parsing_timeout=None,  # type: ignore[arg-type]
        raise_on_error=True,
    )
    return float(verify(gold, found, timeout_seconds=None, raise_on_error=True))


def _result(future: Any) -> float | None:
    try:
        value = future.result()
    except (FutureTimeout, ProcessExpired, Exception):  # math-verify and sympy raise what they like on a model's LaTeX
        return None
    return value if value is None or math.isfinite(value) else None


@functools.cache
def _pool() -> ProcessPool:
    pool = ProcessPool(max_workers=_WORKERS, context=get_context("spawn"), initializer=_quiet)
    atexit.register(_close, pool)
    return pool


def _close(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


def _quiet() -> None:
    import logging
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
