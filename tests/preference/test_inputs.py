"""What the preference losses and designs are given: wrong shapes, dtypes and values are named, odd ones are honoured."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bandpo.preference as p
from bandpo.preference import (
    PREFERENCES,
    PairObjective,
    kto_loss,
    pair_loss,
    preference_confidence,
    preferential_g_optimal,
    reward_calibration,
)

N = 4
NEW = torch.tensor([-12.0, -9.5, -3.0, -20.0]), torch.tensor([-11.0, -10.0, -8.0, -19.0])
REF = torch.tensor([-12.5, -9.0, -4.0, -20.0]), torch.tensor([-11.0, -9.0, -8.0, -18.0])


def call(name="dpo", **changes):
    objective = PREFERENCES[name]
    given = {"chosen_logprobs": NEW[0], "rejected_logprobs": NEW[1]}
    if objective.reference != "none":
        given |= {"ref_chosen_logprobs": REF[0], "ref_rejected_logprobs": REF[1]}
    if objective.length == "mean":
        given |= {"chosen_lengths": torch.tensor([3, 4, 5, 6]), "rejected_lengths": torch.tensor([3, 4, 5, 6])}
    if objective.target == "squared" or name == "pdfr":
        given["reward_gap"] = torch.tensor([1.0, 0.0, -2.0, 0.5])
    if name == "rbrm":
        given["confidence"] = torch.full((N,), 0.8)
    return pair_loss(**{k: v for k, v in {**given, **changes}.items() if v is not None}, objective=objective)


WRONG = [
    (
        "dpo",
        {"chosen_logprobs": torch.zeros(N, 7), "rejected_logprobs": torch.zeros(N, 7)},
        ValueError,
        "sum log-probs over time",
    ),
    ("dpo", {"chosen_logprobs": torch.zeros(())}, ValueError, "one dimension"),
    (
        "dpo",
        {"chosen_logprobs": torch.zeros(N, dtype=torch.int64)},
        TypeError,
        "chosen_logprobs must have a float dtype",
    ),
    (
        "dpo",
        {"rejected_logprobs": torch.zeros(N, dtype=torch.bool)},
        TypeError,
        "rejected_logprobs must have a float dtype",
    ),
    ("dpo", {"chosen_logprobs": [-1.0] * N}, TypeError, "torch.Tensor"),
    ("dpo", {"rejected_logprobs": torch.zeros(N - 1)}, ValueError, "must be equal"),
    ("dpo", {"ref_chosen_logprobs": torch.zeros(1)}, ValueError, "must be equal"),
    ("dpo", {"ref_rejected_logprobs": torch.zeros(N, dtype=torch.int32)}, TypeError, "float dtype"),
    ("dpo", {"chosen_lengths": torch.ones(N)}, ValueError, "makes no use of chosen_lengths"),
    ("simpo", {"ref_chosen_logprobs": REF[0]}, ValueError, "makes no use of ref_chosen_logprobs"),
    ("ipo", {"chosen_lengths": torch.tensor([3, 0, 1, 2])}, ValueError, "at least 1: a completion has a token, got 0"),
    ("ipo", {"chosen_lengths": torch.tensor([3.0, math.nan, 1, 2])}, ValueError, "got nan"),
    ("ipo", {"rejected_lengths": torch.ones(N, dtype=torch.bool)}, TypeError, "must hold numbers"),
    ("rbrm", {"confidence": torch.full((N,), 9.0)}, ValueError, r"probability, in \[0, 1\], got 9.0"),
    ("rbrm", {"confidence": torch.tensor([0.5, -0.1, 1, 1])}, ValueError, "got -0.1"),
    ("rbrm", {"confidence": torch.tensor([0.5, math.nan, 1, 1])}, ValueError, "got nan"),
    ("rbrm", {"confidence": torch.full((N, 1), 0.5)}, ValueError, "must be equal"),
    ("rbrm", {"confidence": 0.5}, TypeError, "torch.Tensor"),
    ("vcb", {"reward_gap": torch.tensor([1.0, math.nan, 0, 0])}, ValueError, "reward_gap must be finite.*got nan"),
    ("pdfr", {"reward_gap": torch.tensor([1.0, math.inf, 0, 0])}, ValueError, "got inf"),
    ("rebel", {"reward_gap": torch.ones(N, dtype=torch.bool)}, TypeError, "must hold numbers"),
]


@pytest.mark.parametrize(("name", "changes", "error", "message"), WRONG)
def test_wrong_input_of_pair_loss_is_named(name, changes, error, message):
    with pytest.raises(error, match=message):
        call(name, **changes)


@pytest.mark.parametrize("name", PREFERENCES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["chosen_logprobs", "rejected_logprobs", "ref_chosen_logprobs"])
def test_a_pair_that_is_no_number_counts_and_adds_nothing(name, value, where):
    if where.startswith("ref") and PREFERENCES[name].reference == "none":
        return
    spoiled = {
        "chosen_logprobs": NEW[0].clone(),
        "rejected_logprobs": NEW[1].clone(),
        "ref_chosen_logprobs": REF[0].clone(),
    }
    spoiled = {k: v for k, v in spoiled.items() if not k.startswith("ref") or PREFERENCES[name].reference != "none"}
    spoiled[where][2] = value
    leaves = {k: v.requires_grad_(not k.startswith("ref")) for k, v in spoiled.items()}
    losses, metrics = call(name, **leaves)
    losses.mean().backward()
    whole, _ = call(name)
    rest = [0, 1, 3]
    assert losses[2] == 0 and torch.equal(losses.detach()[rest], whole[rest])
    for k, leaf in leaves.items():
        if not k.startswith("ref"):
            assert leaf.grad[2] == 0 and leaf.grad.isfinite().all()
    assert metrics["nonfinite_fraction"] == 0.25 and all(v.isfinite() for v in metrics.values())
    # The metrics are those of the pairs that are numbers.
    sides = torch.stack(
        [NEW[i][rest] - (0 if PREFERENCES[name].reference == "none" else REF[i][rest]) for i in range(2)]
    )
    if PREFERENCES[name].length == "mean":
        sides = sides / torch.tensor([3, 4, 6])
    torch.testing.assert_close(metrics["log_ratio/chosen"], sides[0].mean())
    torch.testing.assert_close(metrics["log_ratio/rejected"], sides[1].mean())


def test_a_mean_over_no_pair_is_no_number():
    losses, metrics = call(chosen_logprobs=torch.full((N,), math.nan))
    assert (losses == 0).all() and metrics["nonfinite_fraction"] == 1
    assert all(v.isnan() for k, v in metrics.items() if k != "nonfinite_fraction")


@pytest.mark.parametrize("name", ["dpo", "chipo", "rbrm", "ipo", "rdrc"])
def test_the_checks_do_not_break_a_compiled_graph(name):
    compiled = torch.compile(lambda new: call(name, chosen_logprobs=new)[0], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(NEW[0]), call(name)[0])


KTO_WRONG = [
    ({"desirable": torch.tensor([0, 1, 1, 0])}, TypeError, r"must be bool, got torch.int64; convert .* \.bool\(\)"),
    ({"desirable": torch.tensor([0.0, 1, 1, 0])}, TypeError, "must be bool"),
    ({"desirable": torch.ones(3, dtype=torch.bool)}, ValueError, "differ"),
    ({"kl": torch.zeros(2, 1)}, ValueError, r"0-d, got shape \(2, 1\)"),
    ({"kl": torch.zeros(1)}, ValueError, "0-d"),
    ({"kl": 0.0}, TypeError, "torch.Tensor"),
    ({"kl": torch.tensor(-0.5)}, ValueError, "kl must be finite and >= 0, got -0.5"),
    ({"kl": torch.tensor(math.nan)}, ValueError, "got nan"),
    ({"log_ratio": torch.zeros(N, 2), "desirable": torch.ones(N, 2, dtype=torch.bool)}, ValueError, "one dimension"),
    ({"log_ratio": torch.zeros(N, dtype=torch.int64)}, TypeError, "float dtype"),
    ({"beta": 0.0}, ValueError, "beta must be a number > 0"),
    ({"beta": "0.1"}, TypeError, "beta must be a number"),
    ({"beta": True}, TypeError, "beta must be a number"),
    ({"beta": math.inf}, ValueError, "beta"),
    ({"desirable_weight": -1.0}, ValueError, "desirable_weight"),
    ({"undesirable_weight": math.nan}, ValueError, "undesirable_weight"),
]


@pytest.mark.parametrize(("changes", "error", "message"), KTO_WRONG)
def test_wrong_input_of_kto_loss_is_named(changes, error, message):
    good = {"log_ratio": torch.zeros(N), "desirable": torch.tensor([True, False, True, False]), "kl": torch.tensor(0.1)}
    with pytest.raises(error, match=message):
        kto_loss(**{**good, **changes})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_kto_in_every_dtype_and_with_a_completion_that_is_no_number(dtype):
    d = torch.tensor([0.5, math.nan, -0.25, math.inf], dtype=dtype, requires_grad=True)
    out = kto_loss(d, torch.tensor([True, True, False, False]), torch.tensor(0.25, dtype=dtype), beta=0.5)
    out.sum().backward()
    expected = [1 / (1 + math.exp(0.5 * 0.25)), 0, 1 / (1 + math.exp(0.5 * 0.5)), 0]
    assert out.tolist() == pytest.approx(expected, rel=1e-6)  # 0.5, 0.25 are exact in every dtype
    assert d.grad.isfinite().all() and d.grad[1] == d.grad[3] == 0


CONFIDENCE_WRONG = [
    ((torch.zeros(3), torch.zeros(2)), {}, ValueError, "must be equal"),
    ((torch.zeros(3, 2), torch.zeros(3, 2)), {}, ValueError, "one dimension"),
    ((torch.tensor([1.0, math.nan]), torch.zeros(2)), {}, ValueError, "must not be NaN"),
    ((torch.zeros(2, dtype=torch.int64), torch.zeros(2)), {}, TypeError, "float dtype"),
    ((torch.zeros(2), torch.zeros(2)), {"alpha": math.nan}, ValueError, "alpha"),
    ((torch.zeros(2), torch.zeros(2)), {"alpha": "7"}, TypeError, "alpha"),
    ((torch.zeros(2), torch.zeros(2)), {"floor": 1.0}, ValueError, "floor"),
    ((torch.zeros(2), torch.zeros(2)), {"floor": -0.1}, ValueError, "floor"),
    ((torch.zeros(2), torch.zeros(2)), {"level": "token"}, ValueError, "level"),
]


@pytest.mark.parametrize(("rewards", "options", "error", "message"), CONFIDENCE_WRONG)
def test_wrong_input_of_the_confidence_is_named(rewards, options, error, message):
    with pytest.raises(error, match=message):
        preference_confidence(*rewards, **options)


@pytest.mark.parametrize(
    ("rewards", "log_ratio", "calibration", "error"),
    [
        (torch.zeros(2), torch.tensor([0.0, math.nan]), 0.1, ValueError), (torch.zeros(2), torch.zeros(3), 0.1, ValueError),
        (torch.zeros(2), torch.zeros(2), -1, ValueError), (torch.zeros(2), torch.zeros(2), math.nan, ValueError),
        (torch.zeros(2), torch.zeros(2), "x", TypeError), (torch.zeros(2, dtype=torch.int64), torch.zeros(2), 0.1, TypeError),
        (torch.zeros(2), 1.0, 0.1, TypeError),
    ],
)  # fmt: skip
def test_wrong_input_of_the_calibration_is_named(rewards, log_ratio, calibration, error):
    with pytest.raises(error, match=r"calibration|log_ratio|rewards"):
        reward_calibration(rewards, log_ratio, calibration)


@pytest.mark.parametrize("field", ["beta", "label_scale", "margin", "label_smoothing", "calibration", "r_max"])
@pytest.mark.parametrize("value", ["0.1", None, True, [0.1], math.nan, math.inf])
def test_fields_of_an_objective_are_numbers(field, value):
    if (field, value) == ("r_max", None):
        return
    with pytest.raises((TypeError, ValueError), match=f"PairObjective: {field}"):
        PairObjective(**{field: value})


# ---- designs

BASE = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(st.floats(-12, 12), st.floats(-12, 12), st.floats(-5, 5), st.sampled_from(["design", "uniform"]))
def test_a_design_does_not_change_with_the_units_and_the_origin_of_its_features(a, b, shift, prompts):
    scale = torch.tensor([10.0**a, 10.0**b], dtype=torch.float64)
    expected = preferential_g_optimal(BASE, prompts=prompts)
    found = preferential_g_optimal((BASE + shift) * scale, prompts=prompts)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("factor", [1e10, 1e-10, 1e150, 1e-150, 1e300, 1e-300])
def test_the_optimum_is_the_rank_whatever_the_size_of_the_features(factor):
    design = preferential_g_optimal(BASE * factor)
    assert ((design.conditional - 2).abs() < 1e-3 * 3).all()  # Kiefer and Wolfowitz, within the tolerance
    assert design.leverage <= 4 * (1 + 1e-2)


def test_actions_without_a_difference_have_no_direction():
    phi = torch.full((2, 3, 2), 0.1, dtype=torch.float64)
    design = preferential_g_optimal(phi)
    torch.testing.assert_close(design.actions, torch.full((2, 3), 1 / 3, dtype=torch.float64))
    assert design.conditional.tolist() == [0, 0] and design.leverage == 0 and design.prompts.tolist() == [0.5, 0.5]
    phi[0] = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])  # one prompt with one direction, one with none
    design = preferential_g_optimal(phi)
    assert design.prompts.tolist() == pytest.approx([1, 0], abs=1e-9) and design.conditional[1] == 0
    assert design.conditional[0].item() == pytest.approx(1, abs=3e-3)


def test_integer_and_half_features_are_taken():
    ints = torch.randint(-3, 4, (2, 5, 2), generator=torch.Generator().manual_seed(1))
    expected = preferential_g_optimal(ints.double())
    for dtype in (torch.int64, torch.float16, torch.bfloat16, torch.float32):
        torch.testing.assert_close(preferential_g_optimal(ints.to(dtype)).actions, expected.actions)


DESIGN_WRONG = [
    (torch.full((2, 3, 2), math.nan), {}, ValueError, "features must be finite, got nan"),
    (torch.full((2, 3, 2), -math.inf), {}, ValueError, "finite, got -inf"),
    (torch.ones(2, 3, 2, dtype=torch.complex64), {}, TypeError, "real numbers"),
    (np.ones((2, 3, 2)), {}, TypeError, "torch.Tensor"),
    (torch.ones(3, 2), {}, ValueError, "shape"),
    (torch.ones(2, 1, 2), {}, ValueError, "actions >= 2"),
    (torch.ones(0, 3, 2), {}, ValueError, "prompts >= 1"),
    (torch.ones(2, 3, 0), {}, ValueError, "d >= 1"),
    (BASE, {"prompts": "all"}, ValueError, "design or uniform"),
    (BASE, {"tolerance": 0.0}, ValueError, "tolerance"),
    (BASE, {"tolerance": math.nan}, ValueError, "tolerance"),
    (BASE, {"steps": 0}, ValueError, "steps"),
    (BASE, {"steps": 1.5}, TypeError, "steps"),
]


@pytest.mark.parametrize(("features", "options", "error", "message"), DESIGN_WRONG)
def test_wrong_features_are_named(features, options, error, message):
    with pytest.raises(error, match=message):
        preferential_g_optimal(features, **options)


# ---- designs, samplers, tables, the probe

HALF = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
ONE = torch.tensor([0.5, 0.5])
PHI = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
G = torch.Generator().manual_seed(0)
HIDDEN = torch.zeros(6, 2, 4)
NAN = torch.tensor([1.0, math.nan])

REFUSED = {
    "features that are not 3-D": (lambda: p.feature_covariance(HALF, PHI[0], ONE), ValueError, "prompts, actions, d"),
    "a feature that is NaN": (lambda: p.feature_covariance(HALF, PHI * math.nan, ONE), ValueError, "features must be finite"),
    "a policy of other actions": (lambda: p.feature_coverage(HALF[:, :1], HALF, PHI, ONE), ValueError, r"\(\.\.\., 2, 2\)"),
    "a negative probability": (lambda: p.feature_coverage(-HALF, HALF, PHI, ONE), ValueError, "finite and >= 0, got -0.5"),
    "prompts of another number": (lambda: p.feature_covariance(HALF, PHI, ONE[:1]), ValueError, "prompt_probs must be"),
    "functions of other shapes": (lambda: p.mad_coverage(HALF, HALF, PHI, ONE), ValueError, "policy must be"),
    "integers as a policy": (lambda: p.mad_coverage(HALF.int(), HALF, torch.ones(1, 2, 2), ONE), TypeError, "float dtype"),
    "prompt_probs of a batch": (lambda: p.OnPolicy(HALF), ValueError, "prompt_probs must be"),
    "prompt_probs of NaN": (lambda: p.OnPolicy(NAN), ValueError, "got nan"),
    "a policy of other prompts": (lambda: p.OnPolicy(ONE)(HALF[:1], 3, G), ValueError, "policy must be"),
    "pairs that are no number": (lambda: p.OnPolicy(ONE)(HALF, 2.5, G), TypeError, "n must be an integer"),
    "fewer than no pairs": (lambda: p.OnPolicy(ONE)(HALF, -1, G), ValueError, "n must be at least 0"),
    "a row without probability": (lambda: p.OnPolicy(ONE)(HALF * 0, 3, G), ValueError, "positive sum, got 0"),
    "a behaviour of other prompts": (lambda: p.Offline(ONE, HALF[:1]), ValueError, "behaviour must be"),
    "a policy beside another behaviour": (lambda: p.Offline(ONE, HALF)(HALF[:, :1], 3, G), ValueError, "policy must be"),
    "a design of other prompts": (
        lambda: p.HybridDesign(ONE[:1], p.preferential_g_optimal(PHI)), ValueError, "has 2 prompts, prompt_probs 1",
    ),
    "a gap without a score": (lambda: p.first_wins(NAN), ValueError, "reward_gap must not be NaN, got nan; leave"),
    "half a pair": (lambda: p.batch_schedule(3.5, 4, last=2), TypeError, "first must be an integer"),
    "a reward that is NaN": (lambda: p.tabular_optimum(NAN, ONE.log(), beta=0.1), ValueError, "rewards must be finite"),
    "a beta below 0 in a tensor": (
        lambda: p.tabular_optimum(HALF, HALF.log(), beta=torch.tensor([0.1, -1.0])), ValueError, "beta must be positive.*-1",
    ),
    "a beta that is True": (lambda: p.tabular_optimum(ONE, ONE.log(), beta=True), TypeError, "beta must be a number"),
    "the name of a link": (lambda: p.tabular_optimum(ONE, ONE.log(), beta=1.0, link="log"), TypeError, "as_link"),
    "probabilities as log-probs": (lambda: p.tabular_optimum(ONE, ONE, beta=1.0), ValueError, "not above 0, got 0.5"),
    "a reference without an action": (
        lambda: p.tabular_optimum(ONE, torch.full((2,), -math.inf), beta=1.0), ValueError, "must have an action",
    ),
    "another shape of the reference": (lambda: p.concentrability(HALF.log(), ONE.log()), ValueError, "must be equal"),
    "a log-prob of NaN": (lambda: p.concentrability(NAN - 2, ONE.log()), ValueError, "log-probs, not above 0, got nan"),
    "a log-ratio of integers": (lambda: p.estimate_concentrability(torch.ones(3).int()), TypeError, "float dtype"),
    "theta of another size": (lambda: p.linear_softmax(torch.ones(2), PHI, HALF.log()), ValueError, "theta must be"),
    "wins of another number": (
        lambda: p.fit_pairs(PHI[0].double(), ONE[:1], ONE, beta=1.0, radius=1.0), ValueError, "must be equal",
    ),
    "losses below 0": (
        lambda: p.fit_pairs(PHI[0].double(), ONE, -ONE, beta=1.0, radius=1.0), ValueError, "losses must be finite and >= 0",
    ),
    "an infinite beta": (
        lambda: p.fit_pairs(PHI[0].double(), ONE, ONE, beta=math.inf, radius=1.0), ValueError, "fit_pairs: beta",
    ),
    "layers that are no number": (lambda: p.LayerProbe(2.0, 4), TypeError, "layers must be an integer"),
    "hidden states of integers": (lambda: p.LayerProbe(2, 4)(HIDDEN.int()), TypeError, "hidden must have a float dtype"),
    "sides that broadcast": (lambda: p.LayerProbe(2, 4).loss(HIDDEN, HIDDEN[:1]), ValueError, "but rejected has"),
    "a margin of NaN": (lambda: p.LayerProbe(2, 4).loss(HIDDEN, HIDDEN, margin=math.nan), ValueError, "margin"),
    "a hidden state of NaN": (
        lambda: p.LayerProbe(2, 4).fit(HIDDEN * math.nan, HIDDEN), ValueError, "chosen must be finite, got nan",
    ),
    "no epoch": (lambda: p.LayerProbe(2, 4).fit(HIDDEN, HIDDEN, epochs=0), ValueError, "epochs must be at least 1"),
    "nothing to train on": (lambda: p.LayerProbe(2, 4).fit(HIDDEN, HIDDEN, held_out=1.0), ValueError, "none of 6 pairs"),
    "no layers": (lambda: p.pool_hidden([], torch.ones(2, 3)), ValueError, "has no layer"),
    "layers of another time": (lambda: p.pool_hidden([torch.ones(2, 4, 5)], torch.ones(2, 3)), ValueError, "with a mask"),
    "scores that are a list": (lambda: p.rerank([[1.0, 2.0]]), TypeError, "scores must be a torch.Tensor"),
    "half of the best": (lambda: p.rerank(HALF, top=1.0), TypeError, "top must be an integer"),
    "rewards that broadcast": (lambda: p.relabel(torch.ones(3, 1), torch.ones(3)), ValueError, "one dimension"),
    "a reward without a score": (lambda: p.relabel(NAN, ONE), ValueError, "chosen_rewards must not be NaN"),
    "a link at a number": (lambda: p.LOG(1.0), TypeError, "log_ratio must be a torch.Tensor"),
    "a link's power in words": (lambda: p.chi2_kl("1"), TypeError, "alpha must be a number"),
    "an order that is True": (lambda: p.alpha_link(True), TypeError, "a must be a number"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_wrong_in_silence_is_named(case):
    call_it, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call_it()


def test_an_action_that_no_policy_takes_adds_nothing_to_the_concentrability():
    """-inf less -inf is NaN, which made the whole row NaN; the χ² of the other actions by hand."""
    new, ref = torch.tensor([[0.9, 0.1, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64)
    assert p.concentrability(new.log(), ref.log()).item() == pytest.approx(0.9**2 / 0.5 + 0.1**2 / 0.5, rel=1e-12)
    assert p.concentrability(ref.log(), torch.tensor([1.0, 0.0, 0.0]).double().log()) == math.inf


def test_completions_without_a_ratio_are_left_out_of_the_estimate_and_counted():
    delta = torch.tensor([0.0, 1.0, math.nan, -math.inf, -0.5])
    found, clean = p.estimate_concentrability(delta), p.estimate_concentrability(delta[[0, 1, 4]])
    assert found.nonfinite.item() == pytest.approx(0.4) and clean.nonfinite == 0
    assert found[:3] == clean[:3]
    assert clean.mean.item() == pytest.approx((1 + math.e + math.exp(-0.5)) / 3, rel=1e-6)
    for nothing in (torch.zeros(0), torch.full((2,), math.nan)):
        assert all(v.isnan() for v in p.estimate_concentrability(nothing)[:3])


def test_samples_of_the_reference_estimate_no_distance():
    """What an offline run would report: mean e^Δ tends to 1 and mean Δ is below 0, however far the policy is."""
    g = torch.Generator().manual_seed(0)
    ref, new = (torch.randn(50, generator=g, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    own, old = (torch.multinomial(x.exp(), 200_000, replacement=True, generator=g) for x in (new, ref))
    right, wrong = (p.estimate_concentrability((new - ref)[i]) for i in (own, old))
    kl = (new.exp() * (new - ref)).sum().item()
    assert right.log_mean.item() == pytest.approx(kl, abs=5 * 2 / 200_000**0.5) and kl > 0.5
    assert right.mean.item() == pytest.approx(p.concentrability(new, ref).item(), rel=0.05)
    assert wrong.log_mean < -0.5 and wrong.mean.item() == pytest.approx(1.0, abs=0.05)
