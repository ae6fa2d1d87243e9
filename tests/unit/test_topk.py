"""Top-K divergences against the full distribution (DPPO, arXiv:2602.04879, eq. 15-16, appendix B)."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bandpo import KL, OBJECTIVES, TV, Objective
from bandpo.bounds.regions import TopK, topk_divergence
from bandpo.divergences import DIVERGENCES, binary_divergence
from bandpo.surrogates import mask
from batches import batch, complete, run

V = 40


def pair(seed, tokens=64, drift=0.5):
    g = torch.Generator().manual_seed(seed)
    old = (2.5 * torch.randn(tokens, V, generator=g, dtype=torch.float64)).log_softmax(-1)
    new = (old + drift * torch.randn(tokens, V, generator=g, dtype=torch.float64)).log_softmax(-1)
    sampled = torch.multinomial(old.exp(), 1, generator=g)
    return old, new, sampled


def distance(divergence, old, new, sampled, k):
    top, ids = old.topk(k)
    return topk_divergence(
        divergence, logprobs=new.gather(-1, sampled).squeeze(-1), old_logprobs=old.gather(-1, sampled).squeeze(-1),
        topk_logprobs=new.gather(-1, ids), old_topk_logprobs=top, sampled_in_topk=(ids == sampled).any(-1),
    )  # fmt: skip


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.sampled_from(sorted(DIVERGENCES)))
def test_lower_bounds_that_rise_to_the_full_divergence(seed, name):
    divergence = DIVERGENCES[name]
    old, new, sampled = pair(seed)
    full = (old.exp() * divergence((new - old).exp())).sum(-1)
    ladder = [distance(divergence, old, new, sampled, k) for k in range(V + 1)]
    torch.testing.assert_close(
        ladder[0], binary_divergence((new - old).gather(-1, sampled), old.gather(-1, sampled), divergence).squeeze(-1),
        rtol=1e-8, atol=1e-12,
    )  # fmt: skip
    for coarse, fine in pairwise(ladder):
        assert (coarse <= fine * (1 + 1e-9) + 1e-13).all()
    torch.testing.assert_close(ladder[-1], full, rtol=1e-8, atol=1e-12)
    assert (ladder[20] <= full * (1 + 1e-9)).all()


@pytest.mark.parametrize("divergence", [TV, KL], ids=lambda d: d.name)
def test_against_the_papers_sums(divergence):
    old, new, sampled = pair(5)
    for k in (1, 5, 20):
        got = distance(divergence, old, new, sampled, k)
        for i in range(len(old)):
            chosen = sorted(set(old[i].topk(k).indices.tolist()) | {sampled[i].item()})
            p, q = old[i].exp()[chosen].tolist(), new[i].exp()[chosen].tolist()
            p, q = [*p, 1 - sum(p)], [*q, 1 - sum(q)]
            if divergence is TV:
                want = 0.5 * sum(abs(a - b) for a, b in zip(p, q, strict=True))
            else:
                want = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            assert got[i].item() == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_float32_and_masses_that_leave_no_rest():
    old, new, sampled = pair(1)
    exact = distance(KL, old, new, sampled, 20)
    rough = distance(KL, old.float(), new.float(), sampled, 20)
    # 41 log-probs of up to 2^-21 error each, weighted by p·log(p/q)
    torch.testing.assert_close(rough, exact, rtol=1e-4, atol=1e-6)
    sharp = torch.tensor([[0.0, -1e3, -1e3]], dtype=torch.float32)  # all mass on one token, before and after
    nothing = distance_of_three(sharp, sharp)
    assert nothing.item() == 0
    moved = distance_of_three(sharp, torch.tensor([[-1e3, 0.0, -1e3]]))
    assert moved.item() > 10


def distance_of_three(old, new):
    return distance(KL, old, new, torch.tensor([[0]]), 2)


@pytest.mark.parametrize("name", ["dppo-topk-tv", "dppo-topk-kl"])
def test_without_top_tokens_it_is_the_binary_mask(name):
    data = complete(name, batch())
    for key in ("topk_logprobs", "old_topk_logprobs"):
        data["extras"][key] = data["extras"][key][..., :0]
    binary = complete(name.replace("-topk", ""), batch())
    for a, b in zip(run(name, data)[:2], run(name.replace("-topk", ""), binary)[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_radius_of_each_side_and_bad_input():
    name = "dppo-topk-kl"
    data = complete(name, batch())
    tight = Objective(bounds=TopK(KL, (1e-9, 1e9)), surrogate=mask, anchor="rollout")
    data["advantages"] = data["advantages"] - data["advantages"].mean()
    _, _, metrics = run(tight, data)
    assert metrics["clip_fraction/low"] > 0
    assert metrics["clip_fraction/high"] == 0
    assert not [k for k in metrics if k.startswith("band/")]
    assert OBJECTIVES[name].with_radius(0.2).bounds == TopK(KL, 0.2)
    for kwargs, words in (({"k": 0}, "k must be"), ({"radius": -1.0}, "radius"), ({"divergence": "kll"}, "kll")):
        with pytest.raises(ValueError, match=words):
            TopK(**kwargs)
