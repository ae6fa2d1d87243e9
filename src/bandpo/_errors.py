"""Errors that are nobody's mistake in the input: they end a run, and what it had is kept."""


class RunError(RuntimeError):
    """A run cannot go on; the message says why and how to go on."""
