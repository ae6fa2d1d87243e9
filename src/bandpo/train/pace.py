"""How fast a run trains and how long it will take, from the steps of this session."""

import time
from collections import deque
from collections.abc import Callable

from bandpo._system.progress import clock_time

_STEPS_KEPT = 50
"""The last steps of each kind that an estimate uses."""


class Pace:
    """The speed of a session, and the time that the rest of the run will take.

    In a run with a policy gradient, one step of a cycle samples the completions that the others train on. So the durations of
    steps that sample and of those that do not are averaged apart. A resumed run counts from its first step in this session.

    Args:
        total: Number of steps of the run.
        done: Number of steps that were done before this session.
        cycle: Number of optimiser steps for each rollout; 1 where every step is alike.
        tokens: Number of tokens that were counted before this session.
        clock: A function that gives seconds.

    Examples:
        >>> seconds = iter([0.0, 5.0, 6.0, 7.0])
        >>> pace = Pace(6, cycle=3, clock=lambda: next(seconds))
        >>> for step in (1, 2, 3):
        ...     pace.step(step, tokens=700)
        >>> pace.left, pace.tokens_per_second
        (7.0, 100.0)
    """

    def __init__(
        self, total: int, done: int = 0, *, cycle: int = 1, tokens: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.done, self.cycle = total, done, max(1, cycle)
        self._clock = clock
        self._began = self._last = clock()
        self._sampling: deque[float] = deque(maxlen=_STEPS_KEPT)
        self._other: deque[float] = deque(maxlen=_STEPS_KEPT)
        whole = done % self.cycle == 0
        self._base: tuple[float, int] | None = (self._began, tokens) if whole else None
        self._mark: tuple[float, int] | None = None

    def step(self, number: int, tokens: int = 0) -> None:
        """Note the end of a step.

        Args:
            number: Number of steps that are done now.
            tokens: Number of tokens that were counted so far.
        """
        now = self._clock()
        samples = (number - 1) % self.cycle == 0
        (self._sampling if samples else self._other).append(now - self._last)
        self.done, self._last = number, now
        if number % self.cycle == 0:  # in the middle of a cycle, the tokens of steps to come are counted already
            self.mark(tokens, now)

    def mark(self, tokens: int, now: float | None = None) -> None:
        """Note how many tokens were counted at a moment.

        Args:
            tokens: Number of tokens that were counted so far.
            now: The moment; now by default.
        """
        place = (self._clock() if now is None else now, tokens)
        if self._base is None:
            self._base = place
        else:
            self._mark = place

    @property
    def elapsed(self) -> float:
        """Seconds from the beginning of this session to its last step."""
        return self._last - self._began

    @property
    def left(self) -> float | None:
        """Seconds until the last step; after steps of one kind, those of the other kind count alike. None before any step."""
        if not self._sampling and not self._other:
            return None
        rest = max(0, self.total - self.done)
        before, by_then = (-(-n // self.cycle) for n in (self.done, self.total))  # rollouts, the begun ones included
        sampling = by_then - before
        means = [sum(x) / len(x) if x else None for x in (self._sampling, self._other)]
        known = next(x for x in means if x is not None)
        first, other = (known if x is None else x for x in means)
        return sampling * first + (rest - sampling) * other

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of the whole cycles of this session, divided by their time; None before the first one or without a count."""
        if self._base is None or self._mark is None:
            return None
        (began, before), (now, tokens) = self._base, self._mark
        return (tokens - before) / (now - began) if tokens > before and now > began else None

    def told(self) -> str:
        """Time and time left for a message, as in "0:42, 3:10 left"."""
        left = self.left
        if left is None:
            return clock_time(self.elapsed)
        bound = ""
        if self.cycle > 1 and not (self._sampling and self._other):  # the steps that sample take longer
            bound = "at most " if self._sampling else "at least "
        return f"{clock_time(self.elapsed)}, {bound}{clock_time(left)} left"
