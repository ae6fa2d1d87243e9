"""Pruning: unbiased by exhaustive enumeration, biased where it says so, and its variance."""

import io
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bandpo import OBJECTIVES, group_advantages, policy_loss
from bandpo.groups import informative
from bandpo.selection import Informative, PromptScores, Pruning, effective_sample_size, pruning, stratified

G = 6


def every_order(size):
    """Uniform noise in each of its orders: all outcomes of a draw of a fixed number, equally likely."""
    for order in itertools.permutations(range(size)):
        yield torch.tensor(order, dtype=torch.float64).add(0.5).div(size)


def outcomes(select, mode, monkeypatch, size=G):
    """Every outcome of a selection of one group with its probability."""
    if mode == "bernoulli":
        yield from bernoulli_outcomes(select, monkeypatch, size)
        return
    orders = list(every_order(size))
    for noise in orders:
        monkeypatch.setattr(pruning.torch, "rand", lambda shape, noise=noise, **_: noise.expand(shape))
        yield 1 / len(orders), select()


def bernoulli_outcomes(select, monkeypatch, size):
    for drawn in itertools.product([0.0, 1.0 - 1e-9], repeat=size):
        noise = torch.tensor(drawn, dtype=torch.float64)
        monkeypatch.setattr(pruning.torch, "rand", lambda shape, noise=noise, **_: noise.expand(shape))
        found = select()
        p = found.dropping
        yield (
            math.prod((x if d < 0.5 else 1 - x) if x else 0.5 for x, d in zip(p[0].tolist(), drawn, strict=True)),
            found,
        )


def advantages(seed=0):
    rewards = torch.rand(1, G, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return group_advantages(rewards.flatten(), G).view(1, G)


VALUES = torch.randn(1, G, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)  # gradients of samples


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("mode", ["fixed_count", "bernoulli"])
def test_the_weighted_sum_is_unbiased(mode, rate, monkeypatch):
    a = advantages()
    prune = Pruning(completions=rate, mode=mode)
    mean, total = 0.0, 0.0
    for p, found in outcomes(lambda: prune(a, a), mode, monkeypatch):
        mean = mean + p * (found.weight.double().unsqueeze(-1) * VALUES).sum(1) / G
        total += p
    assert total == pytest.approx(1.0)
    # Weights are float32: that is the rounding.
    torch.testing.assert_close(mean, VALUES.mean(1), rtol=0, atol=4 * torch.finfo(torch.float32).eps)


def test_mean_over_survivors_times_c_is_unbiased_with_a_fixed_count_and_not_with_bernoulli(monkeypatch):
    a = advantages()
    bias = {}
    for mode in ("fixed_count", "bernoulli"):
        prune = Pruning(completions=0.5, mode=mode)
        mean = 0.0
        for p, found in outcomes(lambda prune=prune: prune(a, a), mode, monkeypatch):
            c = found.keep.double().mean() if mode == "fixed_count" else (1 - found.dropping.double()).mean()
            mean = mean + p * c * (found.weight.double().unsqueeze(-1) * VALUES).sum(1) / found.keep.sum()
        bias[mode] = (mean - VALUES.mean(1)).norm().item()
    assert bias["fixed_count"] < 1e-6
    assert bias["bernoulli"] > 1e-2


def test_the_biased_variants_are_biased(monkeypatch):
    """Without weights; the k smallest |A| for certain; advantages made again after pruning."""
    a = advantages()
    full = (a.unsqueeze(-1) * VALUES).mean(1)
    prune = Pruning(completions=0.5)
    unweighted = again = 0.0
    for p, found in outcomes(lambda: prune(a, a), "fixed_count", monkeypatch):
        kept = found.keep
        unweighted = unweighted + p * (a.unsqueeze(-1) * VALUES)[kept].mean(0)
        remade = group_advantages(a[kept], int(kept.sum()))
        again = again + p * (remade.unsqueeze(-1) * VALUES[kept]).mean(0)
    lowest = Pruning(completions=0.5, mode="topk_biased")(a, a)
    biases = [
        (unweighted - full).norm(), (again - full).norm(),
        ((lowest.weight.double() * a).unsqueeze(-1) * VALUES).sum(1).div(lowest.keep.sum()).sub(full).norm(),
    ]  # fmt: skip
    assert min(biases) > 1e-2


def test_prompts_and_completions_together_are_unbiased(monkeypatch):
    """Four prompts of which two are low, two completions dropped of each group that is sampled."""
    prune = Pruning(prompts=0.5, completions=0.5, history={"a": 0.1, "b": 0.2, "c": 1.0, "d": 2.0})
    a = torch.cat([advantages(s) for s in range(4)])
    x = torch.randn(4, G, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean = 0.0
    for p, prompts in outcomes(lambda: prune.select_prompts("abcd"), "fixed_count", monkeypatch, size=4):
        rows = prompts.keep.nonzero().flatten()
        # The draws of the groups are independent, and the sum is linear: one group at a time.
        for q in rows.tolist():
            for r, found in outcomes(lambda q=q: prune(a[q : q + 1], a[q : q + 1]), "fixed_count", monkeypatch):
                weight = prompts.weight[q].double() * found.weight[0].double()
                mean = mean + p * r * (weight * x[q]).sum() / (4 * G)
    assert float(mean) == pytest.approx(float(x.mean()), abs=1e-6)


@pytest.mark.parametrize("name", ["bandpo-kl", "grpo", "dppo-tv", "cfpo", "cispo", "dr_grpo"])
def test_the_gradient_of_a_clipped_loss_with_a_kl_term_keeps_its_expectation(name, monkeypatch):
    """For the batch as it is: clip and KL per token make no difference. One group, all orders of the draw."""
    objective = OBJECTIVES[name]
    g = torch.Generator().manual_seed(0)
    a = advantages(3)[0]
    logprobs = (-2 + torch.randn(G, 5, generator=g, dtype=torch.float64)).clamp(max=-0.01).requires_grad_(True)
    old = (logprobs.detach() + 0.4 * torch.randn(G, 5, generator=g, dtype=torch.float64)).clamp(max=-0.01)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 5, 2, 4]).unsqueeze(1)
    normalizer = float(mask.sum()) if objective.aggregation == "token-mean" else float(G)
    max_length = 5 if objective.aggregation == "seq-mean-token-sum-norm" else None

    def gradient(rows, weight):
        loss, _ = policy_loss(
            logprobs=logprobs[rows], old_logprobs=old[rows], advantages=a[rows], mask=mask[rows], objective=objective,
            rollout_logprobs=old[rows], ref_logprobs=old[rows] - 0.1, kl_coef=0.1, normalizer=normalizer,
            max_length=max_length, sample_weight=weight,
        )  # fmt: skip
        return torch.autograd.grad(loss, logprobs)[0]

    full = gradient(torch.arange(G), None)
    prune = Pruning(completions=0.5)
    cache, mean = {}, 0.0
    for p, found in outcomes(lambda: prune(a.unsqueeze(0), a.unsqueeze(0)), "fixed_count", monkeypatch):
        rows = found.keep[0].nonzero().flatten()
        key = tuple(rows.tolist())
        if key not in cache:
            cache[key] = gradient(rows, found.weight[0, rows].double())
        mean = mean + p * cache[key]
    assert len(cache) > 1
    torch.testing.assert_close(mean, full, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7, 0.9])
def test_variance_of_bernoulli_pruning(rate, monkeypatch):
    """`Σ P/(1-P) ‖A g‖²/G²`: it grows by 0.43, 1, 2.3 and 9."""
    a = advantages()
    x = a.unsqueeze(-1) * VALUES
    prune = Pruning(completions=rate, mode="bernoulli")
    second = 0.0
    for p, found in outcomes(lambda: prune(a, a), "bernoulli", monkeypatch):
        estimate = (found.weight.double().unsqueeze(-1) * x).sum(1) / G
        second += p * (estimate - x.mean(1)).square().sum().item()
    low = found.dropping[0] > 0
    expected = (rate / (1 - rate) * x[0, low].square().sum() / G**2).item()
    assert second == pytest.approx(expected, rel=1e-5)


@given(st.integers(1, 12), st.floats(0.0, 0.99), st.integers(0, 1000))
def test_fixed_counts_are_fixed_and_weights_add_up(size, rate, seed):
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(7, size, generator=g)
    low = torch.rand(7, size, generator=g) < 0.6
    found = stratified(scores, low, rate, generator=g)
    count = (low.sum(1).double() * rate + 1e-9).floor().long()
    assert (low.sum(1) - (found.keep & low).sum(1)).tolist() == count.tolist()
    assert found.keep[~low].all()
    torch.testing.assert_close(found.weight.sum(1), torch.full((7,), float(size)))  # in every draw, not only on average


def test_groups_without_spread_go_where_they_carry_nothing_and_stay_where_they_do():
    zero = torch.zeros(2, 5)
    assert not Pruning(completions=0.9)(zero, zero).keep.any()
    assert Pruning(completions=0.9, zeros=False)(zero, zero).keep.all()
    equal = torch.full((2, 5), 0.7)
    assert Pruning(completions=0.9)(equal, equal).keep.all()


def test_history_decides_prompts_and_survives():
    prune = Pruning(prompts=0.5)
    keys = [f"q{i}" for i in range(8)]
    assert prune.select_prompts(keys).keep.all()  # nobody is known
    prune.update(keys[:6], torch.tensor([[0.0, 0.0]] * 4 + [[1.0, -1.0]] * 2))
    found = prune.select_prompts(keys, generator=torch.Generator().manual_seed(0))
    assert found.keep[4:].all() and found.keep[:4].sum() == 2  # two of the four that gave nothing
    assert found.weight[:4].sum() == 4
    again = Pruning(prompts=0.5)
    again.load_state_dict(prune.state_dict())
    assert torch.equal(again.select_prompts(keys, generator=torch.Generator().manual_seed(0)).keep, found.keep)


@given(st.lists(st.tuples(st.text(max_size=3), st.floats(-9, 9) | st.just(math.nan)), max_size=30))
def test_scores_are_those_of_a_dictionary_of_prompts(pairs):
    known, scores = {}, PromptScores()
    for prompt, score in pairs:
        known |= {prompt: score} if math.isfinite(score) else {}
        scores.update([(prompt, score)])
    assert scores == known and len(scores) == len(known)
    assert list(scores.values()) == list(known.values())  # in the order in which they came
    assert all(prompt in scores for prompt in known) and "long one" not in scores
    mean = sum(known.values()) / len(known) if known else math.nan
    assert scores.mean() == pytest.approx(mean, nan_ok=True, abs=1e-12)
    again = PromptScores.from_state_dict(scores.state_dict())
    assert again == scores and list(again) == list(scores)
    assert scores != PromptScores({"another": 1.0}) and scores != {**known, "another": 1.0}


def test_checkpoints_hold_no_prompts_and_those_of_older_versions_are_read():
    prompts = [f"{i} apples and {i * i} pears: how many? " * 8 for i in range(500)]
    scores = [i % 7 / 7 for i in range(500)]
    prune, older = Pruning(prompts=0.5), Pruning(prompts=0.5)
    prune.update(prompts, torch.tensor(scores, dtype=torch.float64).unsqueeze(1))
    older.load_state_dict({"history": dict(zip(prompts, scores, strict=True))})
    assert older.history == prune.history
    saved, was = io.BytesIO(), io.BytesIO()
    torch.save(prune.state_dict(), saved)
    torch.save({"history": dict(zip(prompts, scores, strict=True))}, was)
    assert b"apples" not in saved.getvalue() and saved.tell() < 500 * 24 + 3000 < was.tell() / 8
    saved.seek(0)
    again = Pruning(prompts=0.5)
    again.load_state_dict(torch.load(saved, weights_only=True))
    draws = [p.select_prompts(prompts, generator=torch.Generator().manual_seed(0)).keep for p in (prune, older, again)]
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])


def test_a_prompt_is_a_text_or_a_key():
    lone = "\ud800"  # half of a pair, as a damaged file may hold it
    scores = PromptScores({lone: 1.0})
    assert scores[lone] == scores[PromptScores.key(lone)] == 1.0
    for bad in (b"short", 3, None):
        with pytest.raises(TypeError, match="by a key of 16 bytes"):
            PromptScores.key(bad)


def test_dynamic_sampling_is_a_selector_too():
    rewards = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    a = group_advantages(rewards.flatten(), 3).view(2, 3)
    for selector in (Informative(), Pruning(completions=0.5)):  # the line to swap
        found = selector(rewards, a, generator=torch.Generator().manual_seed(0))
        assert found.keep.shape == rewards.shape
    assert torch.equal(Informative()(rewards, a).keep.flatten(), informative(rewards.flatten(), 3))


def test_effective_sample_size():
    assert effective_sample_size(torch.tensor([3.0, 3.0, 0.0])).item() == pytest.approx(1.0)
    assert effective_sample_size(torch.tensor([1.0, 3.0])).item() == pytest.approx(16 / 10 / 2)


@pytest.mark.parametrize(
    "options", [{"prompts": 1.0}, {"completions": -0.1}, {"mode": "magic"}, {"until": 0.0}, {"prompts": "x"}]
)
def test_mistakes_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Pruning(**options)


def test_sample_weights_are_checked():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="sample_weight"):
        policy_loss(logprobs=x, old_logprobs=x, advantages=x[:, 0], mask=x + 1, sample_weight=torch.ones(3))
