"""Objectives that differ in their trust region alone."""

from dataclasses import replace

from bandpo.objective import Objective


def aligned(objective: Objective, name: str) -> Objective:
    """The objective with the aggregation, advantage and anchor that all arms share, and without a KL to a reference.

    Args:
        objective: Whose bounds and surrogate are kept.
        name: The name of the arm.
    """
    return replace(objective, name=name, aggregation="seq-mean-token-mean", advantage="std", anchor="old", kl_coef=0.0)
