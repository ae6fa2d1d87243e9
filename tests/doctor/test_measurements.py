"""What the doctor measures of a batch, against brute force over all tokens in float64 and independent programs."""

import math
import tracemalloc

import mpmath
import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from bandpo import OBJECTIVES, policy_loss
from bandpo.doctor import batch as doctor_batch
from bandpo.doctor import examine_batch, examine_log, truncation
from bandpo.doctor.batch import load_batch
from bandpo.doctor.noise import Noise, noise
from bandpo.doctor.streams import LogSum, Moments, Quantiles
from bandpo.doctor.truncation import SETTINGS, KeptMass, Truncation, kept_mass
from bandpo.metrics import PROB_BINS, PROB_EDGES

EDGES = np.array(PROB_EDGES)


def batch(rows=24, width=20, seed=0, scale=0.3, per_token=False, dtype=torch.float64, broken=True):
    """Holes in the mask, sequences of different lengths, one of them empty, numbers that are not finite."""
    g = torch.Generator().manual_seed(seed)
    old = -6 * torch.rand(rows, width, generator=g, dtype=torch.float64).pow(3) - 1e-3
    new = (old + scale * torch.randn(old.shape, generator=g, dtype=torch.float64)).clamp(max=-1e-6)
    mask = (torch.rand(old.shape, generator=g) < 0.9) & (
        torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=g)
    )
    mask[3 % rows] = False
    mask[0, 0] = True
    a = torch.randn(rows, width if per_token else 1, generator=g, dtype=torch.float64)
    if broken and rows > 6:
        new[5, 0], old[6, 1] = math.nan, -math.inf
        mask[5, :2] = mask[6, :3] = True
    b = {"logprobs": new.to(dtype), "old_logprobs": old.to(dtype), "advantages": a.to(dtype), "mask": mask}
    return {**b, "advantages": b["advantages"] if per_token else b["advantages"].squeeze(1)}


def named(found, rule):
    [one] = [f for f in found if f.rule == rule]
    return one


def usable(b):
    a = b["advantages"] if b["advantages"].ndim == 2 else b["advantages"].unsqueeze(1).expand(b["mask"].shape)
    valid = b["mask"] & b["logprobs"].isfinite() & b["old_logprobs"].isfinite() & a.isfinite()
    return valid.numpy(), a.double().numpy()


def close(found, expected, rel=1e-7):
    return found == pytest.approx(expected, rel=rel, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_effective_size_is_that_of_kish(dtype):
    b = batch(dtype=dtype)
    b["rollout_logprobs"] = b["old_logprobs"] - 0.1 * torch.rand(
        b["mask"].shape, generator=torch.Generator().manual_seed(9)
    ).to(dtype)
    valid, _ = usable(b)
    numbers = named(examine_batch(b), "effective size").numbers
    for key, name in (("old", "old_logprobs"), ("sampler", "rollout_logprobs")):
        x = (b["logprobs"].double() - b[name].double()).numpy()
        w = np.exp(x[valid])
        assert close(numbers[f"tokens/{key}"], w.sum() ** 2 / (w**2).sum() / len(w))
        assert close(numbers[f"tokens/{key}/largest"], w.max() / w.sum())
        whole = [i for i in range(len(x)) if valid[i].any() and (valid[i] == b["mask"].numpy()[i]).all()]
        s = np.array([np.exp(x[i][valid[i]].sum()) for i in whole])
        assert close(numbers[f"sequences/{key}"], s.sum() ** 2 / (s**2).sum() / len(s))


def test_weights_of_any_size_neither_overflow_nor_vanish():
    x = [800.0, 799.0, -900.0, 0.0]
    found, twice = LogSum(), LogSum()
    for part in (x[:1], x[1:3], x[3:]):
        found.add(torch.tensor(part, dtype=torch.float64))
        twice.add(2 * torch.tensor(part, dtype=torch.float64))
    exact = mpmath.log(sum(mpmath.exp(v) for v in x))
    assert close(found.value, float(exact), 1e-14)
    assert close(twice.value, float(mpmath.log(sum(mpmath.exp(2 * v) for v in x))), 1e-14)
    old = torch.full((2, 2), -1000.0, dtype=torch.float64)
    b = {
        "logprobs": torch.tensor([[-1.0, -1000.0], [-1000.0, -1000.0]]).double(),
        "old_logprobs": old,
        "advantages": torch.ones(2),
    }
    found = named(examine_batch(b), "effective size")
    assert found.level == "warning" and "one token has 100.0% of the weight" in found.seen
    assert close(found.numbers["tokens/old"], 0.25)


ZOO = ["grpo", "dapo", "dr-grpo", "bandpo-kl", "gspo", "cispo", "dppo-kl", "no-clip", "sapo"]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("name", [n for n in ZOO if n in OBJECTIVES])
def test_gradient_mass_is_the_gradient_of_the_loss(name, per_token):
    """Against backward passes through the loss itself, of the objective and of r·A without a region."""
    objective = OBJECTIVES[name]
    b = batch(per_token=per_token, seed=4)
    b["rollout_logprobs"] = b["old_logprobs"] + 0.01
    valid, a = usable(b)
    free = OBJECTIVES["no-clip"]

    def gradients(o):
        new = b["logprobs"].clone().requires_grad_()
        extra = {"max_length": 20} if o.aggregation == "seq-mean-token-sum-norm" else {}
        loss, _ = policy_loss(**{**b, "logprobs": new}, objective=o, metrics="none", **extra)
        return torch.autograd.grad(loss, new)[0].abs().numpy()

    import dataclasses

    kept = gradients(objective)
    whole = gradients(
        dataclasses.replace(objective, bounds=free.bounds, surrogate=free.surrogate, filter=None, group_stats=None)
    )
    taken = np.maximum(whole - kept, 0)
    anchor = b["rollout_logprobs" if objective.anchor == "rollout" else "old_logprobs"].exp().numpy()
    bins = np.searchsorted(EDGES, anchor, side="right")
    found = named(examine_batch(b, objectives=[objective]), "gradient")
    for half, sign in (("upper", a > 0), ("lower", a < 0)):
        chosen = valid & sign
        for key, inside in (
            ("", bins >= 0),
            ("/rare", bins < 4),
            *((f"/{at}", bins == i) for i, at in enumerate(PROB_BINS)),
        ):
            k, t = kept[chosen & inside].sum(), taken[chosen & inside].sum()
            if kept[valid].sum():
                assert close(found.numbers[f"{name}/{half}/kept_share{key}"], k / kept[valid].sum())
            if k + t > 0:
                assert close(found.numbers[f"{name}/{half}/taken{key}"], t / (k + t))
            else:
                assert f"{name}/{half}/taken{key}" not in found.numbers


def test_tokens_without_an_advantage_are_of_neither_half():
    """A penalty has a gradient there too."""
    b = batch(broken=False)
    b["advantages"][:12] = 0
    b["mask"][12:, 0] = True
    half = {k: v[12:] for k, v in b.items()}
    for name in ("ppo-kl", "grpo"):
        found = [named(examine_batch(x, objectives=[OBJECTIVES[name]]), "gradient").numbers for x in (b, half)]
        assert found[0] == pytest.approx(found[1])


def test_gradient_says_which_objectives_it_cannot_evaluate():
    b = batch(broken=False)
    [needs] = [n for n in ("etr-reading",) if n in OBJECTIVES]
    found = named(
        examine_batch(b, objectives=[OBJECTIVES["grpo"], OBJECTIVES[needs], OBJECTIVES["dppo-kl"]]), "gradient"
    )
    assert any(row.startswith(f"left out: {needs}, because it needs signal") for row in found.details)
    assert any("dppo-kl, because it needs the sampler" in row for row in found.details)
    flat = {k: (v if v.ndim == 2 else v.unsqueeze(1).expand(24, 20))[b["mask"]] for k, v in b.items() if k != "mask"}
    found = named(examine_batch(flat, objectives=[OBJECTIVES["gspo"], OBJECTIVES["bandpo-kl"]]), "gradient")
    assert "every token has the same weight" in found.seen
    assert any("gspo, because it needs whole sequences" in row for row in found.details)
    # nothing is left of one half: a warning
    far = {
        **b,
        "logprobs": b["old_logprobs"] + 1.0,
        "advantages": torch.ones(24).double(),
        "old_logprobs": b["old_logprobs"] - 1.0,
    }
    assert (
        named(
            examine_batch({**far, "logprobs": far["old_logprobs"] + 0.9}, objectives=[OBJECTIVES["grpo"]]), "gradient"
        ).level
        == "warning"
    )


@pytest.mark.parametrize("versions", [False, True])
@pytest.mark.parametrize("shape", ["sequence", "column", "token"])
def test_ages_are_counted_as_by_hand(versions, shape):
    b = batch(per_token=False, broken=shape == "token")
    g = torch.Generator().manual_seed(1)
    age = torch.randint(0, 4, (24, 20) if shape == "token" else (24,), generator=g)
    given = age.unsqueeze(1) if shape == "column" else age
    b["weight_version" if False else "version" if versions else "age"] = 7 - given if versions else given
    valid, a = usable(b)
    per_token = (age if shape == "token" else age.unsqueeze(1).expand(24, 20)).numpy()
    youngest = per_token[valid].min() if versions else 0
    found = named(examine_batch(b, objectives=[OBJECTIVES["grpo"]]), "age")
    x = (b["logprobs"] - b["old_logprobs"]).numpy()
    for at in np.unique(per_token[valid]):
        inside = valid & (per_token == at)
        r = np.exp(x[inside])
        left = np.where(a[inside] > 0, r > 1.2, (r < 0.8) & (a[inside] < 0))
        key = f"{at - youngest:g}"
        assert close(found.numbers[f"share/{key}"], inside.sum() / valid.sum())
        assert close(found.numbers[f"outside/{key}"], left.mean())
        assert close(found.numbers[f"moved/{key}"], np.abs(x[inside]).mean())
    assert found.level == "ok" and close(found.numbers["mean"], per_token[valid].mean() - youngest)


def test_old_samples_ages_below_0_and_columns_of_something_else():
    b = batch(broken=False)
    ages = torch.full((24,), 20)
    assert named(examine_batch({**b, "age": ages}), "age").level == "warning"
    assert "at least" in named(examine_batch({**b, "age": -ages}), "age").seen
    noise_column = torch.randn(24, 20, generator=torch.Generator().manual_seed(0)).mul(1e6).round()
    many = {k: v.repeat(10, 1) if v.ndim == 2 else v.repeat(10) for k, v in b.items()}
    found = named(
        examine_batch({**many, "version": noise_column.repeat(10, 1) + torch.arange(240.0).unsqueeze(1)}), "age"
    )
    assert found.seen.startswith("not known")
    wide = named(examine_batch({**b, "age": torch.arange(24)}), "age")
    assert len(wide.details) == 10 and wide.details[-1].split()[0] == ">=9"  # a header, eight ages, the others together
    left_out = [
        f.seen for f in examine_batch({**b, "age": torch.ones(3), "group": torch.ones(24)}) if f.rule == "columns"
    ]
    assert left_out == [
        "not used: age: it has the shape (3,), logprobs (24, 20)",
        "not used: group: it has the dtype torch.float32",
    ]


def test_groups_and_duplicates_are_counted_as_by_hand():
    b = batch(rows=40, broken=False)
    g = torch.Generator().manual_seed(2)
    b["group"] = torch.arange(40) // 4
    b["completion_ids"] = torch.randint(0, 2, (40, 20), generator=g)
    b["mask"][:, 3:] = False
    b["mask"][:, 0] = True
    b["advantages"][8:16] = 0
    found = examine_batch(b)
    groups = named(found, "groups")
    silent = sum(not b["advantages"][b["group"] == i].any() for i in range(10))
    assert (groups.numbers["without_signal"], groups.numbers["groups"]) == (silent / 10, 10)
    repeated = 0
    for i in range(10):
        texts = [tuple(b["completion_ids"][r][b["mask"][r]].tolist()) for r in range(40) if b["group"][r] == i]
        repeated += len(texts) - len(set(texts))
    assert close(named(found, "duplicates").numbers["repeated"], repeated / 40)
    same = {**b, "completion_ids": torch.zeros(40, 20, dtype=torch.int32)}
    same["mask"] = torch.ones(40, 20)
    assert named(examine_batch(same), "duplicates").level == "warning"
    assert named(examine_batch({**b, "advantages": b["advantages"] * 0}), "groups").level == "warning"


def test_length_bias_is_that_of_a_sort():
    for seed in range(4):
        b = batch(rows=41, seed=seed)
        valid, a = usable(b)
        x = (b["logprobs"] - b["old_logprobs"]).numpy()
        used = [i for i in range(41) if valid[i].any()]
        lengths = np.array([int(b["mask"][i].sum()) for i in used])
        mass = np.array([(np.abs(a[i]) * np.exp(x[i]))[valid[i]].sum() for i in used])
        numbers = named(examine_batch(b), "length bias").numbers
        for key, m in (("token-mean", mass), ("seq-mean-token-mean", mass / lengths)):
            # what belongs to sequences of one length is shared equally, and a quarter of the sequences is taken from above
            share, left = 0.0, len(used) / 4
            for length in sorted(set(lengths), reverse=True):
                n = (lengths == length).sum()
                share += min(1.0, left / n) * m[lengths == length].sum()
                left -= min(left, n)
            assert close(numbers[f"longest_quarter/{key}"], share / m.sum())
        means = np.array([a[i][valid[i]].mean() for i in used])
        assert close(numbers["correlation"], np.corrcoef(lengths, means)[0, 1])


def test_kl_estimates_are_those_of_numpy_and_name_what_they_descend():
    b = batch(scale=0.1)
    b["ref_logprobs"] = (
        b["logprobs"] + 0.2 * torch.randn(b["mask"].shape, generator=torch.Generator().manual_seed(3))
    ).clamp(max=0)
    valid, _ = usable(b)
    valid &= b["ref_logprobs"].isfinite().numpy()
    x = (b["ref_logprobs"] - b["logprobs"]).numpy()[valid]
    r = np.exp((b["logprobs"] - b["old_logprobs"]).numpy()[valid])
    found = named(examine_batch(b), "kl estimate")
    values = {"k1": -x, "k2": x**2 / 2, "k3": np.exp(x) - x - 1, "k3-ratio": r * (np.exp(x) - x - 1)}
    for name, v in values.items():
        assert close(found.numbers[f"{name}/mean"], v.mean()) and close(
            found.numbers[f"{name}/variance"], v.var(ddof=1)
        )
    assert any(row.startswith("k3 ") and row.endswith("that of KL(π_ref ‖ π)") for row in found.details)
    b["ref_logprobs"][0, 0], b["logprobs"][0, 0] = -1e-3, -12.0
    assert "one token has" in named(examine_batch(b), "kl estimate").seen


def quantile(values, share):
    """The middle between the two numbers that the rank lies between."""
    ordered = np.sort(values)[::-1]
    rank = math.floor((1 - share) * len(ordered) + 1e-9)
    return ordered[0] if not 0 < rank < len(ordered) else (ordered[rank - 1] + ordered[rank]) / 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_noise_is_that_of_a_sort(dtype):
    g = torch.Generator().manual_seed(0)
    first = (-8 * torch.rand(50, 40, generator=g, dtype=torch.float64).pow(3) - 1e-4).to(dtype)
    second = (
        (first.double() * (1 + 0.02 * torch.randn(50, 40, generator=g, dtype=torch.float64))).clamp(max=0).to(dtype)
    )
    mask = torch.rand(50, 40, generator=g) < 0.8
    first[0, 0], second[1, 1] = math.nan, -math.inf
    names = ["grpo", "bandpo-kl", "dcpo"]
    found = noise(first, second, mask, objectives=[OBJECTIVES[n] for n in names])
    valid = (mask & first.isfinite() & second.isfinite()).numpy()
    a, b = (x.double().numpy()[valid] for x in (first, second))
    d, bins = np.abs(b - a), np.searchsorted(EDGES, np.exp(a), side="right")
    assert found.tokens == valid.sum()
    for i, at in enumerate(PROB_BINS):
        if (bins == i).any():
            for share in (0.5, 0.9, 0.99):
                assert found.quantiles(at, share) == quantile(d[bins == i], share)
            assert close(found.numbers()[f"{at}/max"], d[bins == i].max())
    for name in names:
        lower, upper = (x.numpy() for x in OBJECTIVES[name].bounds(torch.from_numpy(a)))
        out = ((b - a) > np.log(upper)) & (upper * np.exp(a) < 1 - 1e-9) | ((b - a) < np.log(np.maximum(lower, 1e-300)))
        assert found.crossed[name] == out.sum()
        for i, at in enumerate(PROB_BINS):
            if not (bins == i).any():
                continue
            middle = torch.tensor([a[bins == i].mean()], dtype=torch.float64)
            low, high = (x.item() for x in OBJECTIVES[name].bounds(middle))
            sides = [-math.log(low)] * (low > 0) + [math.log(high)] * (math.log(high) < -middle.item() - 1e-9)
            expected = np.mean(sides) / quantile(d[bins == i], 0.99) if sides else math.inf
            assert found.widths(OBJECTIVES[name])[at] == pytest.approx(expected, rel=1e-9)


def test_noise_of_a_batch_is_told_against_the_run_s_region():
    b = batch(scale=0.05, broken=False)
    for size, level in ((0.001, "ok"), (0.08, "warning"), (0.5, "problem")):
        again = {
            **b,
            "again_logprobs": b["logprobs"]
            - size * torch.rand(b["mask"].shape, generator=torch.Generator().manual_seed(0)),
        }
        found = named(examine_batch(again, objectives=[OBJECTIVES["grpo"]]), "noise")
        assert found.level == level, found.seen
        assert "grpo at p = " in found.seen and bool(found.knob) == (level != "ok")
    same = named(examine_batch({**b, "again_logprobs": b["logprobs"]}), "noise")
    assert same.level == "ok" and same.numbers["all/max"] == 0
    with pytest.raises(ValueError, match="have one shape"):
        noise(torch.zeros(2), torch.zeros(3))
    assert Noise().finding().seen.startswith("not known")


WARPERS = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9999), words=st.sampled_from([1, 2, 7, 300, 900]), scale=st.sampled_from([0.0, 0.5, 3.0, 12.0]),
       top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.05]), top_k=st.sampled_from([0, 1, 5, 280, 2000]),
       min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]))  # fmt: skip
def test_kept_mass_is_that_of_the_warpers_of_transformers(seed, words, scale, top_p, top_k, min_p):
    g = torch.Generator().manual_seed(seed)
    scores = scale * torch.randn(5, words, generator=g, dtype=torch.float64) + 1e-9 * torch.rand(5, words, generator=g)
    cut = scores
    for name, value, on in (("top_k", top_k, top_k > 0), ("top_p", top_p, top_p < 1), ("min_p", min_p, min_p > 0)):
        cut = WARPERS[name](value)(None, cut) if on else cut
    logp = scores.log_softmax(-1)
    kept, last = kept_mass(logp, Truncation(top_p=top_p, top_k=top_k, min_p=min_p))
    inside = cut.isfinite()
    expected = (logp.exp() * inside).sum(-1)
    step = logp.exp().amax(-1)  # where two tokens are equal up to rounding, either may be the last one
    assert ((kept - expected).abs() <= (1e-9 if scale else step * 1.5)).all()
    if scale:
        torch.testing.assert_close(last, logp.masked_fill(~inside, math.inf).amin(-1))


def test_stored_top_tokens_give_the_same_where_they_reach_far_enough():
    g = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(6, 10, 80, generator=g)
    logp = logits.double().log_softmax(-1)
    b = {k: v[:6, :10] if v.ndim == 2 else v[:6] for k, v in batch(broken=False).items()}
    b["completion_ids"] = logp.argmax(-1)
    whole = named(examine_batch({**b, "logits": logits}), "kept mass")
    chosen = logp.topk(30).values.flip(-1)
    top = named(examine_batch({**b, "old_logprobs": logp.amax(-1), "old_topk_logprobs": chosen}), "kept mass")
    mask = b["mask"]
    for cut in SETTINGS:
        kept, _ = kept_mass(logp[mask], cut)
        assert close(whole.numbers[f"{cut}/kept"], kept.mean().item())
        assert close(whole.numbers[f"{cut}/bias"], (-kept.log()).mean().item())
        known = whole.numbers["tokens"] - top.numbers.get(f"{cut}/not_known", whole.numbers["tokens"])
        if known == whole.numbers["tokens"]:
            assert close(top.numbers[f"{cut}/kept"], whole.numbers[f"{cut}/kept"])
    assert top.numbers["top_k=20/not_known"] == 0 and whole.numbers["top_p=0.9/sampled_cut"] == 0
    few = named(examine_batch({**b, "old_topk_logprobs": logp.topk(2).values}), "kept mass")
    assert few.numbers["top_p=0.99/not_known"] > 0 and any("not known" in row for row in few.details)
    named_run = named(examine_batch({**b, "logits": logits}, truncation=Truncation(top_p=0.9)), "kept mass")
    assert named_run.level == "warning" and "top_p=0.9 keeps" in named_run.seen
    off = named(examine_batch({**b, "logits": logits}, truncation=Truncation()), "kept mass")
    assert off.level == "ok"
    none = named(examine_batch({**b, "old_topk_logprobs": -chosen}), "kept mass")
    assert none.seen.startswith("not known") and "left out" in none.details[-1]
    for wrong in ({"top_p": 0.0}, {"top_k": -1}, {"min_p": 2.0}):
        with pytest.raises(ValueError, match="truncation needs"):
            Truncation(**wrong)


def test_tokens_that_the_sampler_should_have_cut_are_counted():
    logp = torch.tensor([[0.6, 0.3, 0.07, 0.03]]).log().expand(4, 4)
    measure = KeptMass(Truncation(top_p=0.8))
    measure.add(logp, torch.tensor([0.6, 0.3, 0.07, 0.03]).log())
    [found] = measure.findings()
    assert found.numbers["top_p=0.8/sampled_cut"] == 0.5
    assert close(found.numbers["top_p=0.8/bias"], -math.log(0.9), 1e-6)


def test_columns_that_cannot_be_read_do_not_make_a_batch_unreadable(tmp_path):
    columns = {"logprobs": [-1.0, -2.0], "old_logprobs": [-1.0, -1.5], "advantages": [1.0, -1.0]}
    pq.write_table(pyarrow.table({**columns, "uid": ["a", "b"]}), tmp_path / "b.parquet")
    with pytest.warns(UserWarning, match="columns beside the tensors of the loss are left out"):
        found = load_batch(tmp_path / "b.parquet")
    assert sorted(found) == sorted(columns)
    pq.write_table(pyarrow.table({**columns, "staleness": [1, 2]}), tmp_path / "b.parquet")
    assert named(examine_batch(load_batch(tmp_path / "b.parquet")), "age").numbers["mean"] == 1.5


def test_memory_of_the_logits_of_a_batch():
    b = batch(broken=False)
    assert "480 tokens x 1000 words" in named(examine_batch(b, vocabulary=1000), "memory").seen
    large = {k: v.repeat(100, 1) if v.ndim == 2 else v.repeat(100) for k, v in b.items()}
    found = named(examine_batch(large, vocabulary=150_000), "memory")
    assert found.level == "note" and "token_logprobs" in found.knob and "whole batch is scored at once" in found.seen


def everything(seed=0, rows=24):
    b = batch(seed=seed, rows=rows)
    g = torch.Generator().manual_seed(seed + 100)
    shape = b["mask"].shape
    b["rollout_logprobs"] = b["old_logprobs"] - 0.05 * torch.rand(shape, generator=g)
    b["ref_logprobs"] = b["logprobs"] - 0.1 * torch.rand(shape, generator=g)
    b["again_logprobs"] = b["logprobs"] - 0.01 * torch.rand(shape, generator=g)
    b["age"], b["group"] = torch.randint(0, 3, (rows,), generator=g), torch.arange(rows) // 4
    b["completion_ids"] = torch.randint(0, 2, shape, generator=g)
    b["logits"] = torch.randn(*shape, 12, generator=g)
    return b


def told(found):
    return {f.rule: (f.level, dict(f.numbers)) for f in found if f.numbers}


def agree(one, other):
    assert one.keys() == other.keys()
    for rule, (level, numbers) in one.items():
        assert level == other[rule][0]
        assert numbers == pytest.approx(other[rule][1], rel=1e-7, abs=1e-10), rule


@pytest.mark.parametrize("size", [1, 21, 100, 479])
def test_parts_files_and_strides_give_the_same_numbers(size, monkeypatch, tmp_path):
    b = everything()
    whole = told(examine_batch(b))
    assert {"effective size", "age", "gradient", "groups", "duplicates", "length bias", "kl estimate", "noise", "kept mass",
            "memory"} - {"memory"} <= whole.keys()  # fmt: skip
    monkeypatch.setattr(doctor_batch, "_PART", size)
    agree(told(examine_batch(b)), whole)
    save_file({k: v.contiguous() for k, v in b.items()}, tmp_path / "b.safetensors")
    agree(told(examine_batch(load_batch(tmp_path / "b.safetensors"))), whole)
    torch.save(b, tmp_path / "b.pt")
    agree(told(examine_batch(load_batch(tmp_path / "b.pt"))), whole)
    agree(told(examine_batch({k: v.t().contiguous().t() if v.ndim == 2 else v for k, v in b.items()})), whole)


def test_memory_does_not_grow_with_the_batch(tmp_path, monkeypatch):
    """Of what Python allocates, which are the buffers of the file, with every column."""
    monkeypatch.setattr(doctor_batch, "_PART", 1 << 11)
    monkeypatch.setattr(truncation, "_AT_A_TIME", 1 << 14)
    peaks = []
    for rows in (200, 2000):
        save_file(
            {k: v.contiguous() for k, v in everything(rows=rows).items() if k != "group"}, tmp_path / "b.safetensors"
        )
        tracemalloc.start()
        examine_batch(load_batch(tmp_path / "b.safetensors"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 100_000


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(8, 30))
def test_the_order_of_the_sequences_does_not_matter(seed, rows):
    b = everything(seed, rows)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    agree(told(examine_batch({k: v[order] for k, v in b.items()})), told(examine_batch(b)))


def test_one_sequence_one_token_and_silent_batches():
    b = {"logprobs": torch.tensor([[-1.0]]), "old_logprobs": torch.tensor([[-1.1]]), "advantages": torch.tensor([0.5])}
    rich = {**b, "ref_logprobs": torch.tensor([[-1.2]]), "again_logprobs": torch.tensor([[-1.0]]), "version": torch.tensor([3]),
            "group": torch.tensor([1]), "completion_ids": torch.tensor([[4]])}  # fmt: skip
    found = {f.rule: f for f in examine_batch(rich)}
    assert {"effective size", "gradient", "age", "groups", "duplicates", "kl estimate", "noise"} <= found.keys()
    assert "length bias" not in found and "1 have one completion" in found["groups"].seen
    silent = {f.rule for f in examine_batch({**b, "advantages": torch.zeros(1)})}
    assert "gradient" not in silent and "signal" in silent


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=60),
    st.integers(1, 7),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]),
)
def test_streams(values, size, share):
    q, m = Quantiles(), Moments()
    for part in torch.tensor(values, dtype=torch.float64).split(size):
        q.add(part)
        m.add(part)
    assert q.at(share) == quantile(np.array(values), share) and q.largest == max(values)
    assert m.mean == pytest.approx(np.mean(values)) and m.largest == max(values)
    if len(values) > 1:
        assert m.variance == pytest.approx(np.var(values, ddof=1), abs=1e-9 * max(values) ** 2)


def test_quantiles_of_long_streams_are_within_their_bound(monkeypatch):
    monkeypatch.setattr(Quantiles, "KEPT", 1000)
    values = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).pow(6)
    q = Quantiles()
    for part in values.split(777):
        q.add(part)
    for share in (0.5, 0.9, 0.99):
        assert abs(q.at(share) / quantile(values.numpy(), share) - 1) <= 2**-10
    assert q.error == 2**-10 and q.largest == values.max().item()


def log(n=20, **series):
    return [{name: (f(i / (n - 1)) if callable(f) else f) for name, f in series.items()} for i in range(n)]


CAUSES = [
    ("warning", "upper edge clips", lambda x: 1 - 0.8 * x, 0.001, 0.02, "upper edge keeps"),
    ("warning", "lower edge clips", lambda x: 0.5 + x, 0.02, 0.001, "lower edge keeps"),
    ("note", "lower edge clips", lambda x: 1 - 0.8 * x, 0.02, 0.001, "would have raised"),
    ("note", "upper edge clips", lambda x: 0.5 + x, 0.001, 0.02, "would have lowered"),
    ("note", "both edges alike clip", lambda x: 1 - 0.8 * x, 0.01, 0.012, "opposite"),
    ("ok", "steady", lambda x: 1 - 0.1 * x, 0.02, 0.001, ""),
    ("ok", "no edge is its cause", lambda x: 1 - 0.8 * x, 0.0, 0.0, ""),
]


@pytest.mark.parametrize(("level", "words", "entropy", "low", "high", "cause"), CAUSES)
@pytest.mark.parametrize(
    "names", [("clip_ratio/low_mean", "clip_ratio/high_mean"), ("clip_fraction/low", "clip_fraction/high")]
)
def test_entropy_is_attributed_to_the_side_that_clips(level, words, entropy, low, high, cause, names):
    found = named(examine_log(log(entropy=entropy, **{names[0]: low, names[1]: high})), "entropy cause")
    assert found.level == level and words in found.seen and cause in found.cause
    assert bool(found.knob) == (level != "ok")


def test_weights_and_ages_of_a_log():
    for name, rule, sick, well in (
        ("rollout_corr/rollout_is_eff_sample_size", "effective size", 0.2, 0.95),
        ("correction/effective_sample_size", "effective size", 0.2, 0.95),
        ("async/staleness_mean", "age", 20.0, 2.0),
        ("off_policy_level/all/mean", "age", 20.0, 2.0),
    ):
        assert named(examine_log(log(**{name: sick})), rule).level == "warning"
        assert named(examine_log(log(**{name: well})), rule).level == "ok"
    assert (
        "not a share" in named(examine_log(log(**{"correction/effective_sample_size": 100.0})), "effective size").seen
    )
    assert not any(f.rule in ("age", "entropy cause") for f in examine_log(log(entropy=1.0)))
