"""The figures of a preference run show what its rows can tell: no samples of the initial policy as if they were later ones."""

import pytest
from matplotlib import pyplot as plt

from bandpo.plots import plot_preference

BOTH = {"rewards/chosen": 0.1, "rewards/rejected": -0.1, "rewards/accuracies": 0.6}
SAMPLED = {**BOTH, "reward": 0.3, "concentrability/log_mean": 0.0}


def titles(rows, unit="round"):
    figure = plot_preference([{"step": i + 1, **row} for i, row in enumerate(rows)], unit)
    found = [axes.get_title() for axes in figure.axes]
    plt.close(figure)
    return found


@pytest.mark.parametrize(
    ("rows", "unit", "want"),
    [
        ([SAMPLED, SAMPLED], "round", ["Samples before each fit", "Their KL to the start"]),
        (
            [SAMPLED],
            "round",
            ["First preferred by β φ"],
        ),  # one round, offline or not: its samples are the initial policy's
        ([SAMPLED, BOTH, BOTH], "round", ["First preferred by β φ"]),  # offline: only the first round has new samples
        ([{**BOTH, "reward": 0.3}] * 2, "round", ["Samples before each fit"]),  # at another temperature: no distance
        ([BOTH, BOTH], "step", ["First preferred by β φ"]),
    ],
)
def test_samples_are_drawn_where_there_are_some_of_the_trained_policy(rows, unit, want):
    assert titles(rows, unit) == [*want, "Implicit reward in training"]
