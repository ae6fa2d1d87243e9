"""Radii (and other coefficients) that change during training: by the step, or by a measurement of the last updates."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from bandpo._inputs import check_int

Shape = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """A value that moves from `start` to `end` over a run.

    With x the completed fraction of the run, `linear` is `start + (end - start)·x`, and `cosine` is
    `end + (start - end)(1 + cos πx)/2` (SGDR, arXiv:1608.03983, eq. 5).

    Args:
        start: Value at step 0.
        end: Value at the last step and beyond; None means `start`.
        steps: Length of the run, at least 1.
        shape: "constant", which is `start` throughout, "linear" or "cosine".

    Raises:
        TypeError: If `steps` is not an integer.
        ValueError: If the shape is unknown, `steps` is below 1, or `end` does not fit the shape.

    Examples:
        >>> schedule = Schedule(0.1, 0.02, steps=100, shape="linear")
        >>> [round(schedule(step), 3) for step in (0, 50, 100, 200)]
        [0.1, 0.06, 0.02, 0.02]
    """

    start: float
    end: float | None = None
    steps: int = 1
    shape: Shape = "constant"

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise ValueError(f"Schedule: shape is {self.shape!r}; choose one of {', '.join(get_args(Shape))}")
        check_int("Schedule: steps", self.steps)
        if self.steps < 1:
            raise ValueError(f"Schedule: steps must be at least 1, got {self.steps}")
        if self.end is None and self.shape != "constant":
            raise ValueError(f"Schedule: shape={self.shape!r} needs an end")
        if self.end is not None and self.shape == "constant" and self.end != self.start:
            raise ValueError(f"Schedule: end={self.end} would be ignored by shape='constant'; choose linear or cosine")

    def __call__(self, step: int) -> float:
        """The value at a step, counted from 0."""
        end = self.start if self.end is None else self.end
        x = min(max(step / self.steps, 0.0), 1.0)
        if self.shape == "linear":
            return self.start + (end - self.start) * x
        return end + (self.start - end) * (1 + math.cos(math.pi * x)) / 2


@dataclass
class Adaptive:
    """A value that follows a measurement, by PPO's rule for its KL coefficient (arXiv:1707.06347, section 4).

    If the measurement is above `tolerance` times the target, the value changes by `factor` in the direction that lowers the
    measurement; below the target over `tolerance`, in the other direction.

    Args:
        value: The initial value, positive; later the current value.
        target: Desired measurement, positive.
        rises: Whether the measurement rises with the value: False for a clip fraction by the radius and for the KL by PPO's β,
            True for the realised divergence by the radius.
        factor: Factor of one change, above 1; the paper's 2 is coarse for a radius.
        tolerance: At least 1; 1.5 in the paper.
        low: Smallest value.
        high: Largest value.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> radius = Adaptive(0.05, target=0.01, rises=False)
        >>> radius.update(0.10), radius.update(0.012), radius.update(0.0)
        (0.1, 0.1, 0.05)
    """

    value: float
    target: float
    rises: bool
    factor: float = 2.0
    tolerance: float = 1.5
    low: float = 1e-6
    high: float = 1e6

    def __post_init__(self) -> None:
        if not (0 < self.low <= self.value <= self.high < math.inf):
            raise ValueError(f"Adaptive: 0 < low <= value <= high is required, got {self!r}")
        if not 0 < self.target < math.inf:
            raise ValueError(f"Adaptive: target must be a positive number, got {self.target}")
        if not (self.factor > 1 and self.tolerance >= 1):
            raise ValueError(f"Adaptive: factor > 1 and tolerance >= 1 are required, got {self!r}")

    def update(self, measured: float) -> float:
        """Update the value from a measurement.

        Args:
            measured: The measurement; NaN, for no measurement, is ignored.

        Returns:
            The new value.
        """
        direction = (measured > self.tolerance * self.target) - (measured < self.target / self.tolerance)
        if self.rises:
            direction = -direction
        self.value = min(max(self.value * self.factor**direction, self.low), self.high)
        return self.value

    def state_dict(self) -> dict[str, float]:
        """The state for a checkpoint."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the state of a checkpoint.

        Args:
            state: The result of `state_dict`.
        """
        self.value = state["value"]
