"""Matched radii do the same as what they match; schedules and controllers do what they say."""

import math

import pytest
import torch

from bandpo import CHI2, DCPO, HELLINGER, JS, KL, REVERSE_KL, TV, Band, Clip, match_radius, ratio_bounds
from bandpo.bounds.calibration import max_shift
from bandpo.bounds.regions import TopK
from bandpo.schedules import Adaptive, Schedule
from batches import batch

FAMILIES = [KL, REVERSE_KL, TV, CHI2, HELLINGER, JS]


@pytest.mark.parametrize("divergence", FAMILIES, ids=lambda d: d.name)
@pytest.mark.parametrize("side", ["upper", "lower"])
@pytest.mark.parametrize("like", [Band(KL, 0.05, max_ratio=None), Clip(0.2, 0.28)], ids=["kl", "clip"])
def test_the_same_bound_at_p(divergence, side, like):
    for p in (0.1, 0.3, 0.5):
        logp = torch.tensor([p], dtype=torch.float64).log()
        radius = match_radius(divergence, like=like, by=f"{side}@{p}")
        want, got = getattr(like(logp), side), getattr(ratio_bounds(logp, divergence, radius), side)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("divergence", FAMILIES, ids=lambda d: d.name)
@pytest.mark.parametrize("like", [Band(KL, 0.05, max_ratio=None), Band(TV, 0.1), Clip(0.2), DCPO()], ids=repr)
def test_the_same_largest_shift(divergence, like):
    radius = match_radius(divergence, like=like, by="max_shift")
    p = torch.linspace(1e-4, 1 - 1e-4, 20_001, dtype=torch.float64)  # by brute force, on other points

    def shift(bounds):
        return torch.minimum(p * (bounds(p.log()).upper - 1), 1 - p).max().item()

    assert shift(Band(divergence, radius, max_ratio=None)) == pytest.approx(shift(like), rel=1e-3)
    assert max_shift(Band(divergence, radius, max_ratio=None)) == pytest.approx(max_shift(like), rel=1e-6)


def test_known_shifts():
    assert max_shift(Band(KL, 0.05, max_ratio=None)) == pytest.approx(0.1577, abs=5e-5)  # of an independent oracle
    assert max_shift(Band(KL, 0.2, max_ratio=None)) == pytest.approx(0.3127, abs=5e-5)
    assert max_shift(Clip(0.25)) == pytest.approx(0.2, rel=1e-9)  # p = 1/1.25
    assert match_radius(TV, like=Band(TV, 0.07, max_ratio=None)) == pytest.approx(0.07, rel=1e-9)
    assert match_radius(KL, like=Band(KL, 0.05, max_ratio=None)) == pytest.approx(0.05, rel=1e-9)


@pytest.mark.parametrize("divergence", FAMILIES, ids=lambda d: d.name)
def test_the_same_number_of_clipped_tokens(divergence):
    data = batch()
    x, a = data["logprobs"] - data["old_logprobs"], data["advantages"].unsqueeze(1)
    like = Clip(0.2)
    tokens = {"log_ratio": x, "old_logprobs": data["old_logprobs"], "advantages": a, "mask": data["mask"]}
    radius = match_radius(divergence, like=like, by="outside_fraction", batch=tokens)

    def clipped(bounds):
        lower, upper = bounds(data["old_logprobs"])
        return (data["mask"] & torch.where(a > 0, x.exp() > upper, x.exp() < lower)).sum()

    assert clipped(Band(divergence, radius, max_ratio=None)) == clipped(like) > 3


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"by": "upper"}, "choose 'upper@P'"),
        ({"by": "upper@x"}, "probability between 0 and 1"),
        ({"by": "upper@1.5"}, "probability between 0 and 1"),
        ({"by": "upper@0.9", "like": Clip(0.5)}, "simplex' edge"),
        ({"by": "lower@0.5", "like": Clip(1.0, 1.0)}, "no single radius"),
        ({"by": "outside_fraction"}, "pass batch="),
        ({"by": "outside_fraction", "batch": {"log_ratio": torch.zeros(2)}}, "batch needs"),
        (
            {"by": "outside_fraction", "batch": dict.fromkeys(("log_ratio", "old_logprobs", "advantages"), torch.zeros(2))},
            "0 of the 0 tokens",
        ),
        ({"by": "max_shift", "like": Clip(1.0, math.inf)}, "no ball to match"),
    ],
)  # fmt: skip
def test_what_cannot_be_matched_is_named(kwargs, words):
    with pytest.raises(ValueError, match=words):
        match_radius(KL, **{"like": Band(KL, 0.05), **kwargs})


def test_only_intervals_can_be_matched():
    with pytest.raises(TypeError, match=r"missing 4 required|no interval"):
        match_radius(KL, like=TopK(KL))


def test_schedules():
    for shape, middle in (("linear", 0.06), ("cosine", 0.06)):
        s = Schedule(0.1, 0.02, steps=10, shape=shape)
        assert (s(0), s(5), s(10), s(99)) == pytest.approx((0.1, middle, 0.02, 0.02))
    assert Schedule(0.1, 0.02, steps=10, shape="cosine")(1) > Schedule(0.1, 0.02, steps=10, shape="linear")(1)
    assert Schedule(0.1)(7) == 0.1
    for kwargs, words in (
        ({"shape": "step"}, "choose one of constant"), ({"shape": "linear"}, "needs an end"),
        ({"end": 0.2}, "would be ignored"), ({"steps": 0}, "steps"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            Schedule(0.1, **kwargs)


def test_adaptive_closes_in_on_its_target_and_survives_a_checkpoint():
    radius = Adaptive(0.001, target=0.02, rises=False, factor=1.2)
    for _ in range(60):
        radius.update(0.001 / radius.value)  # a clip fraction that falls with the radius
    assert 0.02 / 1.5 / 1.2 <= 0.001 / radius.value <= 0.02 * 1.5 * 1.2
    again = Adaptive(1.0, target=0.02, rises=False, factor=1.2)
    again.load_state_dict(radius.state_dict())
    assert again == radius
    beta = Adaptive(1.0, target=0.01, rises=False)  # PPO's rule: double above 1.5 d, halve below d / 1.5
    assert [beta.update(d) for d in (0.016, 0.0149, 0.0067, 0.0066, math.nan)] == [2.0, 2.0, 2.0, 1.0, 1.0]
    realised = Adaptive(1.0, target=0.01, rises=True, low=0.4)
    assert [realised.update(d) for d in (0.1, 0.1, 0.001)] == [0.5, 0.4, 0.8]
    for kwargs, words in (({"target": 0.0}, "target"), ({"factor": 1.0}, "factor"), ({"low": 2.0}, "low <= value")):
        with pytest.raises(ValueError, match=words):
            Adaptive(1.0, **{"target": 0.1, "rises": True, **kwargs})
