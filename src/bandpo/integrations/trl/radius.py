"""A radius, or the β of a KL penalty, that moves during training: by a schedule or by what the last updates measured."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from bandpo.integrations.trl.pooled import Total
from bandpo.schedules import Adaptive, Schedule


class MovingRadius:
    """The radius of an objective's region, and what was measured since an adaptive one was last changed.

    Args:
        rule: The schedule of a run of unknown length, or the rule that follows a measurement.
    """

    def __init__(self, rule: Schedule | Adaptive) -> None:
        self.rule = rule
        self._measured = [0.0, 0.0]  # numerator and denominator

    @property
    def measures(self) -> bool:
        """Whether the radius follows a metric of the full set."""
        return isinstance(self.rule, Adaptive)

    def value(self, step: int, steps: int) -> float:
        """The radius at an optimiser step.

        Args:
            step: Steps done.
            steps: Steps of the run.
        """
        if isinstance(self.rule, Schedule):
            return dataclasses.replace(self.rule, steps=steps)(step)
        return self.rule.value

    def measure(self, metrics: Mapping[str, Total], radius: float) -> None:
        """Add the measurement of a micro-batch.

        Args:
            metrics: The pooled metrics of the micro-batch.
            radius: The radius that it was trained with.
        """
        if not isinstance(self.rule, Adaptive):
            return
        by_divergence = self.rule.rises
        seen = metrics["band/divergence_mean" if by_divergence else "outside_fraction/any"]
        self._measured[0] += seen.numerator * (radius if by_divergence else 1.0)
        self._measured[1] += seen.denominator

    def after_rollout(self) -> None:
        """Change an adaptive radius by what was measured since the last change, if a valid token was measured."""
        if isinstance(self.rule, Adaptive) and self._measured[1] > 0:
            self.rule.update(self._measured[0] / self._measured[1])
            self._measured = [0.0, 0.0]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {
            "measured": self._measured,
            "radius": self.rule.state_dict() if isinstance(self.rule, Adaptive) else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: A mapping with the keys of `state_dict`. A run whose radius did not move has written none of them.
        """
        numerator, denominator = state.get("measured", (0.0, 0.0))
        self._measured = [float(numerator), float(denominator)]
        if isinstance(self.rule, Adaptive):
            self.rule.load_state_dict(state["radius"])


class MovingPenalty:
    """The β of PPO's KL penalty to π_old, and the KL that was measured since it was last changed.

    After each rollout, β doubles if the KL is above 1.5 times the target, and halves if it is below the target over 1.5
    (arXiv:1707.06347, sec. 4). The KL is the mean of `kl/old_new` over the tokens of all steps on a rollout. The paper takes it
    after the last step, where it is larger.

    Args:
        rule: The rule, with the objective's own β as its first value.
    """

    def __init__(self, rule: Adaptive) -> None:
        self.rule = rule
        self._measured = [0.0, 0.0]  # numerator and denominator

    def measure(self, metrics: Mapping[str, Total]) -> None:
        """Add the measurement of a micro-batch.

        Args:
            metrics: The pooled metrics of the micro-batch.
        """
        seen = metrics["kl/old_new"]
        self._measured[0] += seen.numerator
        self._measured[1] += seen.denominator

    def after_rollout(self) -> float:
        """β for the steps on the next rollout; it does not change if no valid token was measured."""
        if self._measured[1] > 0:
            self.rule.update(self._measured[0] / self._measured[1])
            self._measured = [0.0, 0.0]
        return self.rule.value

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"penalty": {**self.rule.state_dict(), "measured": self._measured}}

    def load_state_dict(self, state: Mapping[str, Any]) -> float:
        """Restore what `state_dict` returned.

        Args:
            state: A mapping with the keys of `state_dict`. A run whose β did not move has written none of them.

        Returns:
            The restored β.
        """
        saved = state.get("penalty")
        if saved is not None:
            numerator, denominator = saved["measured"]
            self._measured = [float(numerator), float(denominator)]
            self.rule.load_state_dict({"value": float(saved["value"])})
        return self.rule.value
