"""Made-up evidence for tests of the pages and figures: numbers of a random generator, which say nothing of any objective."""

import dataclasses

import numpy as np

_SHIFT = {"bandpo-kl-upper": 0.06, "bandpo-kl-lower": -0.07, "bandpo-kl": -0.03, "clip-higher": 0.02, "no-clip": -0.15}


def made_up_values(protocol):
    """Values of every run of a protocol: `[experiment][place][arm][measure]`, one for each seed, inside of the ranges."""
    random = np.random.default_rng(5)

    def numbers(arm, measure, seeds):
        low, high = measure.range or (-1.0, 1.0)
        found = 0.5 + 2 * _SHIFT.get(arm, 0.0) + 0.05 * random.standard_normal(seeds)
        return (low + (high - low) * found.clip(0, 1)).tolist()

    return {
        name: {
            place: {
                arm: {name: numbers(arm, measure, has.seeds) for name, measure in has.measures.items()}
                for arm in has.arms
            }
            for place, has in experiment.places.items()
        }
        for name, experiment in protocol.experiments.items()
    }


def few_seeds(protocol, seeds=8):
    """The protocol with few seeds, so that a test takes less than a second."""
    fewer = {
        name: dataclasses.replace(
            x, seeds=seeds, places={place: dataclasses.replace(has, seeds=seeds) for place, has in x.places.items()}
        )
        for name, x in protocol.experiments.items()
    }
    return dataclasses.replace(protocol, experiments=fewer)
