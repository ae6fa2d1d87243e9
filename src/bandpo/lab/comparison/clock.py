"""Where the time of a run and of a comparison goes."""

import time
from collections.abc import Generator
from contextlib import contextmanager

REST = "rest"
"""The name of the time that is in no part."""


class Clock:
    """Seconds of each part of what happens from now on; a part within another one would be counted twice.

    Examples:
        >>> clock = Clock()
        >>> with clock.part("sums"):
        ...     total = sum(range(1000))
        >>> list(clock.parts())
        ['sums', 'rest']
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Generator[None]:
        """Count the time of the block.

        Args:
            name: Name of the part. Blocks of one name are added up.

        Returns:
            A context for the block.
        """
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - started

    def parts(self) -> dict[str, float]:
        """The seconds of each part and the rest, which together are the time since the clock was made."""
        total = time.monotonic() - self._started
        return {**self._seconds, REST: total - sum(self._seconds.values())}
