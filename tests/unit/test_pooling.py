"""Metrics as sums: parts of any sizes pool to the whole, nothing is no number, and what is no number is in no mean."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bandpo import OBJECTIVES, RatioBounds, TokenObjective, policy_metrics, token_objective
from bandpo.integrations._host import evaluate
from bandpo.integrations._host_metrics import mean_proof
from bandpo.integrations.trl.pooled import MOST_WAITING, Measured, PooledLog, Total, over_processes, without_empty
from bandpo.integrations.trl.radius import MovingRadius
from bandpo.metrics import EFFECTIVE_SAMPLE_SIZE, PROB_BINS, PooledSum, effective_size, masked_mean, policy_sums
from bandpo.schedules import Schedule


def batch(seed, rows=6, width=5):
    g = torch.Generator().manual_seed(seed)
    old = -6 * torch.rand(rows, width, generator=g) ** 2 - 0.001
    return {
        "logprobs": old + 0.5 * torch.randn(rows, width, generator=g), "old_logprobs": old,
        "advantages": torch.randn(rows, 1, generator=g), "mask": torch.rand(rows, width, generator=g) < 0.6,
    }  # fmt: skip


def made(seed, objective="bandpo-kl", **changed):
    """Terms with the weights of a correction, and the entropy of each token."""
    data = batch(seed) | changed
    g = torch.Generator().manual_seed(seed + 1)
    terms = token_objective(OBJECTIVES[objective], **data)
    shape = data["mask"].shape
    return terms._replace(weights=torch.rand(shape, generator=g)), torch.rand(shape, generator=g)


def rows_of(terms, pick):
    def part(x):
        if isinstance(x, RatioBounds):
            return RatioBounds(*(b[pick] for b in x))
        return x[pick] if isinstance(x, torch.Tensor) else x

    return TokenObjective(*map(part, terms))


def parts_of(made_terms, *picks):
    terms, entropy = made_terms
    return [policy_sums(rows_of(terms, pick), entropy=entropy[pick]) for pick in picks]


def metrics_of(made_terms):
    terms, entropy = made_terms
    return policy_metrics(terms, entropy=entropy)


def oracle(made_terms):
    """By numpy and plain counting, from the definitions."""
    terms, entropy = made_terms
    on = terms.mask.numpy()
    x, p = terms.log_ratio.double().numpy()[on], np.exp(terms.anchor_logprobs.double().numpy())[on]
    r, a = np.exp(x), np.broadcast_to(terms.advantages.double().numpy(), on.shape)[on]
    lower, upper = (b.double().numpy()[on] for b in terms.bounds)
    low, high = (a < 0) & (r < lower), (a > 0) & (r > upper)
    found = {"clip_fraction/low": low.mean(), "clip_fraction/high": high.mean(), "outside_fraction/low": low.mean(),
             "outside_fraction/any": (low | high).mean(), "ratio/mean": r.mean(),
             "kl/old_new": (r - x - 1).mean(), "entropy": entropy.double().numpy()[on].mean(),
             "correction/weight_mean": terms.weights.double().numpy()[on].mean(),
             "band/cap_fraction": (upper[a > 0] == 10).sum() / (a != 0).sum()}  # fmt: skip
    edges = [0, 1e-4, 1e-3, 1e-2, 1e-1, 0.5, 0.9, 0.99, 2]
    for name, left, right in zip(PROB_BINS, edges[:-1], edges[1:], strict=True):
        inside = (p >= left) & (p < right)
        found[f"token_fraction_by_prob/{name}"] = inside.mean()
        found[f"clip_fraction_by_prob/any/{name}"] = (low | high)[inside].mean() if inside.any() else math.nan
    return found


class OneProcess:
    device = torch.device("cpu")

    @staticmethod
    def gather(x):
        return x


class Processes:
    """A stand-in that has been given what the other processes hold; the real gather is in tests/contract/test_resume.py."""

    device = torch.device("cpu")

    def __init__(self, others):
        self.others = others

    def gather(self, x):
        return torch.cat([x, *self.others])


def table(*groups):
    """The row of another process: its numbers by dtype, in the order in which the dtypes are met."""
    numbers = [x for sums in groups for s in sums.values() for x in s[:2]]
    kinds = dict.fromkeys(x.dtype for x in numbers)
    return torch.stack([x.double() for kind in kinds for x in numbers if x.dtype == kind]).unsqueeze(0)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**31), objective=st.sampled_from(["bandpo-kl", "dapo", "dcpo"]),
       cuts=st.lists(st.integers(0, 6), max_size=4), ranks=st.integers(1, 3), settled=st.sets(st.integers(0, 6)))  # fmt: skip
def test_any_split_into_ranks_and_micro_batches_pools_to_the_whole(seed, objective, cuts, ranks, settled):
    """Empty parts, and parts without a valid token, are among them; and settling in between changes nothing."""
    data = made(seed, objective=objective)
    whole = metrics_of(data)
    edges = [0, *sorted(cuts), 6]
    parts = parts_of(data, *(slice(a, b) for a, b in itertools.pairwise(edges)))
    (none,) = parts_of(data, slice(0, 0))
    parts += [none] * (-len(parts) % ranks)
    pooled, log, waiting = PooledLog(), {}, []
    for start in range(0, len(parts), ranks):
        here, *others = parts[start : start + ranks]
        waiting.append((here, others))
        pooled.wait(Measured(here, lambda found: [pooled.put(*part) for part in found.items()]))
        if start in settled or start + ranks >= len(parts):
            pooled.settle(Processes([table(*(o[rank] for _, o in waiting)) for rank in range(ranks - 1)]), log)
            waiting = []
    ess = whole.pop(EFFECTIVE_SAMPLE_SIZE)  # no sum, but made from two means
    if not math.isnan(ess):
        means = (log[f"correction/weight_{name}"][0] for name in ("mean", "square_mean"))
        assert effective_size(*means) == pytest.approx(ess.item(), rel=1e-5)
    for name, value in whole.items():
        if math.isnan(value):
            assert name not in log
        else:
            # float32 sums of at most 30 terms below 20 in another order, one rounding at the end
            assert log[name][0] == pytest.approx(value.item(), rel=1e-5, abs=30 * 2**-24), name
            assert len(log[name]) == 1


def test_the_oracle_agrees():
    for seed in range(20):
        data = made(seed)
        found = metrics_of(data)
        for name, value in oracle(data).items():
            assert found[name].item() == pytest.approx(value, rel=1e-5, nan_ok=True), name


def test_nothing_is_no_number_for_every_statistic():
    empty = torch.zeros(6, 5, dtype=torch.bool)
    (no_rows,) = parts_of(made(1), slice(0, 0))
    for found in (metrics_of(made(1, mask=empty)), {name: part.value() for name, part in no_rows.items()}):
        assert found.keys() | {EFFECTIVE_SAMPLE_SIZE} == metrics_of(made(1)).keys()
        assert all(x.isnan() for x in found.values())
    assert masked_mean(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool)).isnan()


def test_a_whole_of_equal_advantages_has_no_edge_that_it_is_pushed_to():
    found = metrics_of(made(2, advantages=torch.zeros(6, 1)))
    assert found["band/cap_fraction"].isnan() and found["clip_fraction/any"] == 0


@pytest.mark.parametrize("where", ["new", "old", "both", "advantage", "said", "bounds"])
def test_tokens_that_are_no_numbers_are_counted_and_are_in_no_mean(where):
    data = batch(3)
    data["mask"][0] = True
    data["advantages"] = data["advantages"].expand(6, 5).clone()
    clean = {**data, "mask": data["mask"].clone()}
    clean["mask"][0, 0] = False
    data = {k: v.clone() for k, v in data.items()}
    if where in ("new", "both"):
        data["logprobs"][0, 0] = -math.inf if where == "new" else math.nan
    if where in ("old", "both"):
        data["old_logprobs"][0, 0] = -math.inf
    if where == "advantage":
        data["advantages"][0, 0] = math.nan
    terms, entropy = made(3, **data)
    if where == "said":
        terms.nonfinite[0, 0] = True
    if where == "bounds":
        terms.bounds.upper[0, 0] = math.nan
    found, want = policy_metrics(terms, entropy=entropy), metrics_of(made(3, **clean))
    assert found.pop("nonfinite_fraction").item() == pytest.approx(1 / data["mask"].sum().item())
    for name, value in found.items():
        torch.testing.assert_close(value, want[name], rtol=1e-6, atol=1e-7, equal_nan=True, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype):
    want, data = metrics_of(made(4)), made(4)
    torch.set_default_dtype(dtype)
    try:
        found = metrics_of(data)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in want.items():
        assert found[name].dtype == value.dtype == torch.float32, name
        assert torch.equal(found[name], value) or value.isnan(), name


def test_a_mean_of_means_would_be_another_number():
    """The findings' case: 48 tokens on one rank and 8 on the other."""
    first, second = (policy_sums(one_sided(n, clipped)) for n, clipped in ((48, 20), (8, 1)))
    (found,) = over_processes(Processes([table(second)]), [first])
    assert found["clip_fraction/any"] == Total(21.0, 56.0)
    assert found["band/divergence_max"].numerator == max(s["band/divergence_max"].numerator for s in (first, second))


def one_sided(tokens, clipped):
    old = torch.full((1, tokens), -1.0)
    log_ratio = torch.where(torch.arange(tokens) < clipped, 1.0, 0.0).unsqueeze(0)
    return token_objective(OBJECTIVES["bandpo-kl"], logprobs=old + log_ratio, old_logprobs=old, advantages=torch.ones(1, 1),
                           mask=torch.ones(1, tokens))  # fmt: skip


def test_the_pool_begins_anew_with_each_line_and_takes_over_the_host_s_values():
    log, pooled = {}, PooledLog()

    def settle(*parts):
        one = torch.tensor(1.0)
        pooled.wait(Measured({"x": PooledSum(one, one)}, lambda _: [pooled.put(*part) for part in parts]))
        pooled.settle(OneProcess, log)

    for value, tokens in ((0.5, 8), (0.25, 24)):
        settle(("kl", Total(value * tokens, tokens)), ("low", Total(value, tokens, "min")))
    assert log == {"kl": [(0.5 * 8 + 0.25 * 24) / 32], "low": [0.25]}
    pooled.settle(OneProcess, log)  # nothing waits: nothing happens
    assert log["kl"] == [0.3125]
    log.clear()  # TRL has written its line
    pooled.forget()
    settle(("kl", Total(0.5, 4)))
    assert log == {"kl": [0.125]}  # and no name that was measured for the line before
    settle(("kl", Total(0.0, 0.0)), ("nothing", Total(0.0, 0.0)), ("strange", Total(math.nan, 1.0)))
    assert log == {"kl": [0.125]}  # a batch without a valid token is no evidence
    log["none"], log["some"] = [math.nan], [math.nan, 1.0]
    without_empty(log)
    assert set(log) == {"kl", "some"}


def test_only_parts_of_the_line_in_progress_are_restored():
    pooled = PooledLog()
    pooled.load({"kl": [1.0, 2.0, "mean"], "written": [1.0, 2.0, "mean"]}, of={"kl": [0.5]})
    assert set(pooled.parts) == {"kl"}


def test_waiting_metrics_are_kept_within_bounds():
    pooled, part = PooledLog(), Measured({}, lambda _: None)
    assert [pooled.wait(part) for _ in range(MOST_WAITING)].index(True) == MOST_WAITING - 1


def test_what_a_host_averages_itself_is_the_whole_where_its_parts_have_one_size():
    data = made(5, mask=torch.ones(6, 5, dtype=torch.bool))
    parts = [mean_proof(sums) for sums in parts_of(data, *(slice(i, i + 2) for i in (0, 2, 4)))]
    whole = mean_proof(policy_sums(data[0], entropy=data[1]))
    assert not any(x.isnan() for x in whole.values())
    for name, value in whole.items():
        if not name.endswith("_max"):
            mean = sum(part[name] for part in parts) / 3
            torch.testing.assert_close(mean, value, rtol=1e-5, atol=1e-6, msg=name)
    shares = [v for k, v in whole.items() if k.startswith("clip_fraction_by_prob_of_all/any/")]
    torch.testing.assert_close(sum(shares), whole["clip_fraction/any"])


@pytest.mark.parametrize("objective", ["grpo", "bandpo-kl", "bandpo-tv-upper", "gspo", "tis"])
def test_a_host_gets_the_same_objective_with_either_level_of_metrics(objective):
    """The basic metrics need one edge for each token, the full ones both."""
    found = {}
    for detail in ("basic", "full"):
        data = batch(7, rows=40)
        data["logprobs"].requires_grad_()
        data["advantages"][3] = 0.0
        weights = torch.linspace(0.5, 1.5, 200).view(40, 5).index_fill(0, torch.tensor([5]), torch.nan)
        one = evaluate(
            OBJECTIVES[objective], **data, rollout_logprobs=data["old_logprobs"] - 0.1, weights=weights, detail=detail
        )
        (slope,) = torch.autograd.grad(one.value.sum(), data["logprobs"])
        found[detail] = one, slope
    (basic, slope), (full, other) = found.values()
    assert basic.clipped.any() and torch.equal(basic.clipped, full.clipped) and torch.equal(basic.used, full.used)
    assert torch.equal(basic.value, full.value) and torch.equal(slope, other)
    assert torch.equal(basic.log_ratio, full.log_ratio)
    for name, value in basic.metrics.items():
        if name in full.metrics:
            torch.testing.assert_close(value, full.metrics[name], rtol=1e-6, atol=1e-7, msg=name)


def test_a_run_whose_radius_did_not_move_goes_on_with_a_schedule():
    """A checkpoint of such a run holds nothing about its radius."""
    moving = MovingRadius(Schedule(0.05, 0.1, 1, "linear"))
    moving.load_state_dict({"step": 3})
    assert moving.value(5, 10) == pytest.approx(0.075) and moving.state_dict() == {"measured": [0.0, 0.0], "radius": {}}
